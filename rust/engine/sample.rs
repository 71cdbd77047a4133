// SPDX-License-Identifier: GPL-2.0

//! `active_kb`: how much memory a VM uses, by sampling, without the guest's help.
//!
//! At the start of a period pages drawn at random from all of a VM's regions are taken out of the
//! page tables; a fault on one of them says that it is in use. The sample is spread evenly over the
//! regions, up to four pages in each; a region of one 2 MiB page counts as a whole. Memory that came
//! since the period began is in use: a guest that fills its memory would else look idle.
//!
//! Taking a page out costs the guest a fault, and a 2 MiB page has no fault but these. So on a host
//! with memory they are taken out only while somebody asks for `active_kb`, and count as in use
//! otherwise: whoever does not ask runs as on hugetlbfs.
//!
//! Lock order: region, for one page at a time.

use super::{count, host::Host, vm::Vm};
use crate::{
    logic::{
        sample::{samples_in, Outcome},
        state::HostState,
    },
    sys::{clock, hash, slots::SLOTS, task},
};
use core::sync::atomic::{AtomicU64, Ordering};
use kernel::sync::Arc;

/// No estimate yet.
const UNKNOWN: u64 = u64::MAX;

/// Periods for which one question keeps 2 MiB pages under watch.
const ASKED_PERIODS: u64 = 10;

/// What sampling knows of a VM. Only the reclaimer's thread changes it, but for `touched` and `asked`.
pub(crate) struct Sample {
    /// Regions that the VM had when the period began.
    regions: AtomicU64,
    /// Regions that were seen so far, of a walk.
    seen: AtomicU64,
    /// Pages under watch.
    watched: AtomicU64,
    /// Those that were touched.
    touched: AtomicU64,
    /// The last estimate in pages.
    active: AtomicU64,
    /// Pages that were not empty when the period began.
    began: AtomicU64,
    /// Periods that 2 MiB pages are still watched for, because somebody asked.
    asked: AtomicU64,
}

impl Sample {
    /// Nothing known yet.
    pub(crate) const fn new() -> Sample {
        Sample {
            regions: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            watched: AtomicU64::new(0),
            touched: AtomicU64::new(0),
            active: AtomicU64::new(UNKNOWN),
            began: AtomicU64::new(0),
            asked: AtomicU64::new(0),
        }
    }

    /// Somebody wants to know: the next periods look at 2 MiB pages too.
    pub(crate) fn ask(&self) {
        self.asked.store(ASKED_PERIODS, Ordering::Relaxed);
    }

    fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed) > 0
    }

    /// So many pages under watch were touched.
    pub(crate) fn count_touched(&self, pages: usize) {
        self.touched.fetch_add(pages as u64, Ordering::Relaxed);
    }

    /// Pages in use of `filled` that are not empty: those of the last estimate and what came since the
    /// period began, all of them before the first estimate.
    pub(crate) fn active_pages(&self, filled: u64) -> u64 {
        match self.active.load(Ordering::Relaxed) {
            UNKNOWN => filled,
            active => active.saturating_add(self.grown(filled)).min(filled),
        }
    }

    /// Pages that came since the period began.
    fn grown(&self, filled: u64) -> u64 {
        filled.saturating_sub(self.began.load(Ordering::Relaxed))
    }

    /// Ends a period and begins the next one with `filled` pages that are not empty. What it saw counts
    /// if it was a `whole` one; else the estimate before it holds.
    fn end(&self, filled: u64, whole: bool) {
        let outcome = Outcome {
            watched: self.watched.swap(0, Ordering::Relaxed),
            touched: self.touched.swap(0, Ordering::Relaxed),
        };
        let pages = self
            .regions
            .swap(0, Ordering::Relaxed)
            .saturating_mul(SLOTS as u64);
        let before = self.active.load(Ordering::Relaxed);
        let seen = match whole {
            true => outcome.active(pages),
            false => Some(before).filter(|&active| active != UNKNOWN),
        };
        if let Some(active) = seen {
            let active = active.saturating_add(self.grown(filled));
            self.active.store(active.min(filled), Ordering::Relaxed);
        }
        self.began.store(filled, Ordering::Relaxed);
        self.seen.store(0, Ordering::Relaxed);
        let _ = (self.asked).fetch_update(Ordering::Relaxed, Ordering::Relaxed, |periods| {
            periods.checked_sub(1)
        });
    }
}

/// Draws samples, period by period.
pub(crate) struct Sampler {
    began_us: u64,
    random: u64,
    /// The period began on a host with memory: it does not look at all 2 MiB pages.
    spares: bool,
}

impl Sampler {
    /// Begins with the first period.
    pub(crate) fn new() -> Sampler {
        Sampler {
            began_us: 0,
            random: hash::random_key(),
            spares: false,
        }
    }

    /// Ends the period and begins the next one, if it is over.
    pub(crate) fn turn(&mut self, host: &Host, vms: &[Arc<Vm>]) {
        let knobs = &host.knobs;
        let wanted = knobs.active_sample_pages.load(Ordering::Relaxed);
        let period_us = knobs
            .active_sample_period_secs
            .load(Ordering::Relaxed)
            .saturating_mul(1_000_000);
        let now_us = clock::now_us();
        let over = now_us.saturating_sub(self.began_us) >= period_us;
        let short = host.state() != HostState::High;
        // Who will pay is asked soon: what is known of 2 MiB pages has to be true by then.
        let early = short && self.spares;
        if !over && !early {
            return;
        }
        self.began_us = now_us;
        self.spares = !short;
        for vm in vms {
            vm.sample.end(vm.filled_pages(), over);
        }
        if over {
            count(&host.events.active_samples);
        }
        // Who comes meanwhile has no region counted, and is drawn from in the next period.
        for id in 0..host.registry().end() {
            if let Some(region) = host.registry().get(id) {
                count(&region.vm().sample.regions);
            }
        }
        for id in 0..host.registry().end() {
            let Some(region) = host.registry().get(id) else {
                continue;
            };
            let sample = &region.vm().sample;
            let (rank, regions) = (
                sample.seen.fetch_add(1, Ordering::Relaxed),
                sample.regions.load(Ordering::Relaxed),
            );
            let pages = samples_in(rank, regions, wanted);
            let mut guard = region.lock();
            guard.watch_nothing();
            let spared = self.spares && guard.huge().is_some() && !sample.is_asked();
            for _ in 0..pages {
                if spared {
                    count(&sample.watched);
                    count(&sample.touched);
                } else if guard.watch(self.draw()) {
                    count(&sample.watched);
                }
            }
            drop(guard);
            task::cond_resched();
            if task::should_stop() {
                return;
            }
        }
    }

    /// A place in a region that no guest can foresee.
    fn draw(&mut self) -> usize {
        // Vigna's xorshift64*, from a random start; its high bits are the good ones.
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        let drawn = self.random.wrapping_mul(0x2545_f491_4f6c_dd1d);
        (drawn >> 32) as usize % SLOTS
    }
}
