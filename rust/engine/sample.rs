// SPDX-License-Identifier: GPL-2.0

//! `active_kb`: how much memory a VM uses, by sampling, without the guest's help.
//!
//! At the start of a period pages drawn at random from all of a VM's regions are taken out of the
//! page tables; a fault on one of them says that it is in use. The sample is spread evenly over the
//! regions, up to four pages in each; a region of one 2 MiB page counts as a whole. Memory that came
//! since the period began is in use: a guest that fills its memory would else look idle.
//!
//! Who pays for a host that is short is asked of a VM's own pages alone, for only those can be taken from
//! it, and how sure the answer is counts too ([`Sample::own_in_use`]).
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
    sys::{clock, hash, slots::SLOTS, task, watching},
};
use core::sync::atomic::{AtomicU64, Ordering};
use kernel::sync::Arc;

/// No estimate yet.
const UNKNOWN: u64 = u64::MAX;

/// Periods for which one question keeps 2 MiB pages under watch.
const ASKED_PERIODS: u64 = 10;

/// Fewer samples than these tell nothing of what is a VM's own.
const LEAST_SAMPLES: u64 = 4;

/// What a VM has, in pages, and what came back to it so far.
#[derive(Clone, Copy, Default)]
pub(crate) struct Standing {
    /// Pages that are not empty, wherever they are.
    pub(crate) filled: u64,
    /// Pages of them that are its own: neither shared nor zero.
    pub(crate) own: u64,
    /// Times that a page came back from its pool or its swap file.
    pub(crate) returned: u64,
}

/// How many of a VM's own pages are in use.
#[derive(Clone, Copy)]
pub(crate) struct InUse {
    /// The best guess.
    pub(crate) likely: u64,
    /// Hardly ever more.
    pub(crate) most: u64,
}

/// Pages, and those of them that are the VM's own.
struct Tally {
    all: AtomicU64,
    own: AtomicU64,
}

impl Tally {
    const fn new() -> Tally {
        Tally {
            all: AtomicU64::new(0),
            own: AtomicU64::new(0),
        }
    }

    fn add(&self, all: usize, own: usize) {
        self.all.fetch_add(all as u64, Ordering::Relaxed);
        self.own.fetch_add(own as u64, Ordering::Relaxed);
    }

    /// Begins anew.
    fn take(&self) -> (u64, u64) {
        (
            self.all.swap(0, Ordering::Relaxed),
            self.own.swap(0, Ordering::Relaxed),
        )
    }
}

/// A VM's [`Standing`] when a period began.
struct Began {
    filled: AtomicU64,
    own: AtomicU64,
    returned: AtomicU64,
}

impl Began {
    fn get(&self) -> Standing {
        Standing {
            filled: self.filled.load(Ordering::Relaxed),
            own: self.own.load(Ordering::Relaxed),
            returned: self.returned.load(Ordering::Relaxed),
        }
    }

    fn set(&self, now: Standing) {
        self.filled.store(now.filled, Ordering::Relaxed);
        self.own.store(now.own, Ordering::Relaxed);
        self.returned.store(now.returned, Ordering::Relaxed);
    }
}

/// What sampling knows of a VM. Only the reclaimer's thread changes it, but for `touched` and `asked`.
pub(crate) struct Sample {
    /// Regions that the VM had when the period began.
    regions: AtomicU64,
    /// Regions that were seen so far, of a walk.
    seen: AtomicU64,
    /// Pages under watch.
    watched: Tally,
    /// Those that were touched.
    touched: Tally,
    /// The last estimate in pages.
    active: AtomicU64,
    /// The same of its own pages alone.
    own: AtomicU64,
    /// And by how much that may be wrong.
    own_noise: AtomicU64,
    began: Began,
    /// Periods that 2 MiB pages are still watched for, because somebody asked.
    asked: AtomicU64,
}

impl Sample {
    /// Nothing known yet.
    pub(crate) const fn new() -> Sample {
        Sample {
            regions: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            watched: Tally::new(),
            touched: Tally::new(),
            active: AtomicU64::new(UNKNOWN),
            own: AtomicU64::new(UNKNOWN),
            own_noise: AtomicU64::new(0),
            began: Began {
                filled: AtomicU64::new(0),
                own: AtomicU64::new(0),
                returned: AtomicU64::new(0),
            },
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

    /// So many pages under watch were touched; so many of them were the VM's own.
    pub(crate) fn count_touched(&self, pages: usize, own: usize) {
        self.touched.add(pages, own);
    }

    /// Pages in use of `filled` that are not empty: those of the last estimate and what came since the
    /// period began, all of them before the first estimate.
    pub(crate) fn active_pages(&self, filled: u64) -> u64 {
        match self.active.load(Ordering::Relaxed) {
            UNKNOWN => filled,
            active => {
                let grown = filled.saturating_sub(self.began.get().filled);
                active.saturating_add(grown).min(filled)
            }
        }
    }

    /// Its own pages that are in use: those of the last estimate, what came since the period began, and
    /// what was taken away and came back since then. All of them without an estimate.
    pub(crate) fn own_in_use(&self, now: Standing) -> InUse {
        let own = self.own.load(Ordering::Relaxed);
        if own == UNKNOWN {
            return InUse {
                likely: now.own,
                most: now.own,
            };
        }
        let began = self.began.get();
        let likely = own
            .saturating_add(now.own.saturating_sub(began.own))
            .saturating_add(now.returned.saturating_sub(began.returned));
        let most = likely.saturating_add(self.own_noise.load(Ordering::Relaxed));
        InUse {
            likely: likely.min(now.own),
            most: most.min(now.own),
        }
    }

    /// Ends a period and begins the next one with what the VM has `now`. What it saw counts if it was a
    /// `whole` one; else the estimates before it hold.
    fn end(&self, now: Standing, whole: bool) {
        let ((watched, watched_own), (touched, touched_own)) =
            (self.watched.take(), self.touched.take());
        let pages = self
            .regions
            .swap(0, Ordering::Relaxed)
            .saturating_mul(SLOTS as u64);
        let (outcome, outcome_own) = (
            Outcome { watched, touched },
            Outcome {
                watched: watched_own,
                touched: touched_own,
            },
        );
        let began = self.began.get();
        let before = self.active.load(Ordering::Relaxed);
        let seen = match whole {
            true => outcome.active(pages),
            false => Some(before).filter(|&active| active != UNKNOWN),
        };
        if let Some(active) = seen {
            let grown = now.filled.saturating_sub(began.filled);
            let active = active.saturating_add(grown).min(now.filled);
            self.active.store(active, Ordering::Relaxed);
        }
        if whole {
            let seen = outcome_own
                .active(began.own)
                .filter(|_| watched_own >= LEAST_SAMPLES);
            let grown = now.own.saturating_sub(began.own);
            let own = seen.map_or(UNKNOWN, |own| own.saturating_add(grown).min(now.own));
            self.own.store(own, Ordering::Relaxed);
            let noise = outcome_own.noise(began.own);
            self.own_noise.store(noise, Ordering::Relaxed);
        }
        self.began.set(now);
        self.seen.store(0, Ordering::Relaxed);
        let _ = (self.asked).fetch_update(Ordering::Relaxed, Ordering::Relaxed, |periods| {
            periods.checked_sub(1)
        });
    }
}

impl Host {
    /// `active_sample_period_secs`, in microseconds.
    pub(crate) fn sample_period_us(&self) -> u64 {
        let secs = &self.knobs.active_sample_period_secs;
        secs.load(Ordering::Relaxed).saturating_mul(1_000_000)
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
        let period_us = host.sample_period_us();
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
        if watching::by_cleaning() {
            count_unseen(host);
        }
        for vm in vms {
            vm.sample.end(vm.standing(), over);
            vm.sampled_anew();
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
                    sample.watched.add(1, 1);
                    sample.touched.add(1, 1);
                } else if let Some(own) = guard.watch(self.draw()) {
                    sample.watched.add(1, usize::from(own));
                }
            }
            drop(guard);
            task::cond_resched();
            if task::should_stop() {
                return;
            }
        }
        // Last: who sees it knows that what is touched from now on is seen.
        if over {
            count(&host.events.active_samples);
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

/// Counts the pages under watch that were touched without a fault of ours.
fn count_unseen(host: &Host) {
    for id in 0..host.registry().end() {
        if let Some(region) = host.registry().get(id) {
            let (touched, own) = region.lock().touched_unseen();
            region.vm().sample.count_touched(touched, own);
        }
        task::cond_resched();
    }
}
