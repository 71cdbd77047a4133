// SPDX-License-Identifier: GPL-2.0

//! 512 pages become a folio of 2 MiB again, when the host has had memory for a while.
//!
//! Which regions: those that are worth it, and lose nothing by it.
//!
//! | what is in it | collapsed |
//! |---|---|
//! | 512 pages of its own, half of them mapped | yes |
//! | up to 64 pages of zeroes beside | yes, they take memory again |
//! | a page that others share | no: it would be memory lost |
//! | a page that the scanner has not looked at | not yet: it may have equals |
//! | a page that was given back, or never written | no: a balloon would get it back |
//! | a compressed page | no: it is cold |
//! | fewer than half mapped since they were last looked at by the reclaimer | no: it is cold |
//!
//! One region at a time: zap all of it; freeze each page in turn with the one reference that we hold,
//! and copy it to its place in a fresh folio; put the folio into the region, free the pages. While the
//! region is locked nothing can map a page that was zapped, so what was frozen once stays as it is.
//! Whatever fails leaves the region as it was, but out of the page tables: it counts as cold until it
//! is touched again.
//!
//! Page tables are left over from the small pages: the next fault takes the empty table away
//! (`fault`), and the one after that maps 2 MiB.
//!
//! Lock order: region. The folio is allocated before.

use super::{
    count,
    host::Host,
    region::{Region, RegionGuard},
};
use crate::{
    logic::{
        huge::{Refusal, Worth},
        state::HostState,
        tunables::RunMode,
    },
    sys::{clock, huge::HugeFrame, slots::SLOTS, task},
};
use core::sync::atomic::{AtomicU64, Ordering};
use kernel::sync::Arc;

/// Regions that are looked at in one go, with a second between two of them.
const LOOKS: u32 = 16384;

/// Why a collapse was refused, each with its own counter, and those that were made.
#[derive(Default)]
pub(crate) struct CollapseEvents {
    /// Regions that became folios.
    pub(crate) collapses: AtomicU64,
    /// Microseconds that it took, with the region locked.
    pub(crate) took_us: AtomicU64,
    /// Page tables that were taken away for a folio.
    pub(crate) tables: AtomicU64,
    /// Refusals that are known before anything is done.
    pub(crate) unworthy: [AtomicU64; Refusal::COUNT],
    /// Somebody held a reference: O_DIRECT, vhost, a pipe, a reader.
    pub(crate) pinned: AtomicU64,
    /// No 2 MiB in one piece.
    pub(crate) no_memory: AtomicU64,
    /// The memory behind a page is broken.
    pub(crate) poisoned: AtomicU64,
}

/// Where the walk over all regions is, and since when the host has had memory.
pub(crate) struct Collapser {
    next: u32,
    high_since_us: Option<u64>,
    due_us: u64,
}

impl Collapser {
    /// At the first region.
    pub(crate) fn new() -> Collapser {
        Collapser {
            next: 0,
            high_since_us: None,
            due_us: 0,
        }
    }

    /// Collapses some regions, once a second, if it is time to.
    pub(crate) fn round(&mut self, host: &Host) {
        let now_us = clock::now_us();
        if host.state() != HostState::High {
            self.high_since_us = None;
            return;
        }
        let since_us = *self.high_since_us.get_or_insert(now_us);
        let after_us = host
            .knobs
            .collapse_after_secs
            .load(Ordering::Relaxed)
            .saturating_mul(1_000_000);
        if now_us < self.due_us || now_us.saturating_sub(since_us) < after_us {
            return;
        }
        self.due_us = now_us.saturating_add(900_000);
        let mut left = host.knobs.collapse_per_sec.load(Ordering::Relaxed);
        let end = host.registry().end();
        for _ in 0..LOOKS.min(end) {
            if left == 0 || task::should_stop() || host.state() != HostState::High {
                return;
            }
            if self.next >= end {
                self.next = 0;
            }
            let id = self.next;
            self.next = self.next.saturating_add(1);
            if let Some(region) = host.registry().get(id) {
                left = left.saturating_sub(u64::from(collapse(host, &region)));
            }
            task::cond_resched();
        }
    }
}

/// Collapses the region if it is worth it. False, with everything as it was, if not; each reason is
/// counted.
fn collapse(host: &Host, region: &Arc<Region>) -> bool {
    let vm = region.vm();
    if region.looks_huge() || region.looks_empty() || !host.wants_large(vm) {
        return false;
    }
    let scanned = host.run_mode() == RunMode::Run && vm.shares();
    let refused = |refusal: Refusal| {
        if let Some(counter) = host.collapses.unworthy.get(refusal as usize) {
            count(counter);
        }
        false
    };
    if let Err(refusal) = Worth::of((0..SLOTS).map(|index| region.peek(index)), scanned).verdict() {
        return refused(refusal);
    }
    let Some(mut folio) = vm.pays(|| HugeFrame::alloc(region.node())) else {
        count(&host.collapses.no_memory);
        return false;
    };
    let start = clock::now_us();
    let mut guard = region.lock();
    if guard.is_retired() || guard.huge().is_some() {
        return false;
    }
    let worth = Worth::of((0..SLOTS).map(|index| guard.slot(index)), scanned);
    let pages = || (0..SLOTS).filter_map(|index| guard.page(index));
    if let Err(refusal) = worth.and_mapped(pages().filter(|page| page.is_mapped()).count()) {
        return refused(refusal);
    }
    // Most pins are seen without a zap, which the guest would feel.
    if !pages().all(|page| page.is_unpinned()) {
        count(&host.collapses.pinned);
        return false;
    }
    if !copy_all(host, &guard, &mut folio) {
        return false;
    }
    // Before anybody can see it.
    count(&host.collapses.collapses);
    guard.collapse(folio, &mut |content| host.release(content));
    drop(guard);
    let took_us = clock::now_us().saturating_sub(start);
    host.collapses.took_us.fetch_add(took_us, Ordering::Relaxed);
    true
}

/// Copies all pages of the region to their places in `folio`, which is all zero, while nobody can
/// reach them.
fn copy_all(host: &Host, guard: &RegionGuard<'_>, folio: &mut HugeFrame) -> bool {
    guard.zap_range(0, SLOTS);
    for index in 0..SLOTS {
        let Some(page) = guard.page(index) else {
            continue;
        };
        let Some(frozen) = page.freeze() else {
            count(&host.collapses.pinned);
            return false;
        };
        if folio.fill_part(index, frozen.page()).is_err() {
            count(&host.collapses.poisoned);
            return false;
        }
    }
    true
}
