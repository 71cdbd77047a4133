// SPDX-License-Identifier: GPL-2.0

//! The kernel's own reclaim asks for memory.
//!
//! It may ask from the middle of any allocation, ours included, so it waits for nothing: each mutex is
//! only tried, but for that of the bell, which is held for no longer than it takes to ring; what is
//! allocated here does not wait either. It takes what costs no zap and no I/O: private pages that are
//! in no page table already and compress into the VM's pool. For all else the reclaimer is woken. As
//! everywhere, nothing is compressed while the host is better than `hard`.
//!
//! What the reclaimer took out of the page tables just now may be in use: guests get the time to
//! touch it, as they do from the reclaimer itself.
//!
//! A region whose file went meanwhile is left to the reclaimer: with its last reference a VM's pool and
//! its hold on a mount may go, which takes locks of the kernel's that whoever allocates may hold.
//!
//! Lock order: the tools (tried) > region (tried) > the locks of zsmalloc. The VM list is tried, and
//! held with none of them. The registry, a VM's counts and the bell are leaves: spinlocks, and a mutex
//! under which nobody allocates.

use super::{
    compress::{self, Beyond, Outcome},
    count,
    host::Host,
    region::Region,
    vm::Vm,
};
use crate::{
    logic::state::HostState,
    sys::{alloc, clock, shrinker, slots::SLOTS, task, zs::Compressor},
};
use core::sync::atomic::{AtomicU64, Ordering};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{Arc, Mutex, UniqueArc},
};

/// Regions that are looked at in one call.
const VISITS: u32 = 64;
/// Regions that were ours alone in the end, before the reclaimer comes round.
const GONE_MAX: usize = 16;
/// What was in page tables so lately is left to guests.
const REST_MS: u32 = 100;
/// The reclaimer is woken once in so long at most: each time it asks all VMs.
const RING_US: u64 = 10_000;

/// What a call works with; one at a time, others come again.
struct Tools {
    compressor: Compressor,
    /// Number of the region that comes next, and the page in it.
    next: (u32, usize),
    /// Regions that only we have any more; it has room for [`GONE_MAX`].
    gone: KVec<Pin<UniqueArc<Region>>>,
}

/// What the host keeps for this.
#[pin_data]
pub(crate) struct Shrinking {
    #[pin]
    tools: Mutex<Tools>,
    /// When the reclaimer was woken last.
    rung_us: AtomicU64,
    /// Times that the kernel asked for memory.
    pub(crate) asked: AtomicU64,
    /// Pages that it got at once, less those that the pools took for it.
    pub(crate) freed: AtomicU64,
}

impl Shrinking {
    /// With what it takes to compress when there is no memory left.
    pub(crate) fn new() -> Result<impl PinInit<Shrinking>> {
        let compressor = Compressor::new()?;
        let gone = alloc::list(GONE_MAX)?;
        Ok(pin_init!(Shrinking {
            tools <- new_mutex!(
                Tools { compressor, next: (0, 0), gone },
                "thinram_shrinking"
            ),
            rung_us: AtomicU64::new(0),
            asked: AtomicU64::new(0),
            freed: AtomicU64::new(0),
        }))
    }
}

/// Pages above what the VM may always keep.
fn spare_pages(vm: &Vm) -> u64 {
    let kept_kb = vm.claims.reserved_kb();
    vm.resident_kb().saturating_sub(kept_kb) / 4
}

impl Host {
    /// Pages that reclaim by us may free, now or soon.
    pub(crate) fn shrinkable_pages(&self) -> u64 {
        if self.state() < HostState::Hard {
            return 0;
        }
        let mut pages = 0u64;
        self.vms()
            .try_for_each(|vm| pages = pages.saturating_add(spare_pages(vm)));
        pages
    }

    /// Tries up to `pages` pages at once, and has the reclaimer go on. Returns how many came free.
    pub(crate) fn shrink(&self, pages: u64) -> u64 {
        if self.state() < HostState::Hard {
            return 0;
        }
        count(&self.shrinking.asked);
        self.wake_for_the_rest();
        let Some(mut tools) = self.shrinking.tools.try_lock() else {
            return 0;
        };
        let mut turn = Turn {
            host: self,
            left: pages,
            freed: 0,
        };
        let end = self.registry().end();
        // The first region comes once more at last, for its first part.
        for _ in 0..=end.min(VISITS) {
            if turn.left == 0 || tools.gone.len() >= GONE_MAX {
                break;
            }
            let (id, index) = match tools.next {
                (id, index) if id < end => (id, index),
                _ => (0, 0),
            };
            let region = self.registry().get(id);
            tools.next = (id.saturating_add(1), 0);
            if let Some(region) = region {
                if let Some(index) = turn.take(&region, index, &mut tools.compressor) {
                    tools.next = (id, index);
                }
                if let Some(last) = Arc::into_unique_or_drop(region) {
                    // There is room, as the loop has it.
                    let _ = tools.gone.push_within_capacity(last);
                }
            }
            task::cond_resched();
        }
        self.shrinking
            .freed
            .fetch_add(turn.freed, Ordering::Relaxed);
        shrinker::account(turn.freed);
        turn.freed
    }

    fn wake_for_the_rest(&self) {
        let now_us = clock::now_us();
        let rung_us = self.shrinking.rung_us.load(Ordering::Relaxed);
        if now_us.saturating_sub(rung_us) >= RING_US {
            self.shrinking.rung_us.store(now_us, Ordering::Relaxed);
            self.reclaimer_bell.ring();
        }
    }

    /// Lets go of regions whose files went while they were looked at; only the reclaimer calls this.
    pub(super) fn bury_regions(&self) {
        // Who has the tools may be slower than the next round.
        while let Some(last) = (self.shrinking.tools.try_lock()).and_then(|mut t| t.gone.pop()) {
            drop(last);
        }
    }
}

/// One call.
struct Turn<'a> {
    host: &'a Host,
    /// Pages that may still be tried.
    left: u64,
    /// Pages that came free.
    freed: u64,
}

impl Turn<'_> {
    /// Compresses pages of a region that no page table shows, from `index` on. Returns where to go on
    /// if the turn is over before the region is.
    fn take(
        &mut self,
        region: &Region,
        mut index: usize,
        compressor: &mut Compressor,
    ) -> Option<usize> {
        let vm = region.vm();
        // Its pool is made by the reclaimer: that allocates.
        if !vm.store().is_open() {
            return None;
        }
        let mut guard = region.try_lock()?;
        if guard.is_retired() || region.was_swept_within(REST_MS) {
            return None;
        }
        let pool_before = vm.store().pages();
        let mut packed = 0u64;
        while index < SLOTS && self.left > 0 && !region.is_wanted() {
            let at = index;
            index += 1;
            if guard.page(at).is_none_or(|page| page.is_mapped()) {
                continue;
            }
            if spare_pages(vm) == 0 {
                break;
            }
            self.left -= 1;
            match compress::pack(self.host, &mut guard, at, compressor, Beyond::Nothing) {
                Outcome::Packed => packed += 1,
                Outcome::PoolFull => break,
                Outcome::Refused | Outcome::NeedsSwap => {}
            }
        }
        let grown = vm.store().pages().saturating_sub(pool_before);
        self.freed = self.freed.saturating_add(packed.saturating_sub(grown));
        (self.left == 0 && index < SLOTS).then_some(index)
    }
}
