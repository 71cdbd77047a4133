// SPDX-License-Identifier: GPL-2.0

//! Regions that are one folio of 2 MiB.
//!
//! Lock order: the kernel holds mmap_lock or the VMA lock; the region lock is taken here. Folios are
//! allocated before it.
//!
//! | region                      | read                         | write                        |
//! |-----------------------------|------------------------------|------------------------------|
//! | empty, large pages wanted   | a folio of zeroes, read-only | becomes a zeroed folio       |
//! | a folio                     | its folio, writable [^1]     | its folio, writable          |
//! | any other                   | fault of 4 KiB               | fault of 4 KiB               |
//!
//! [^1]: read-only if the scanner write-protected it, so that the write is noticed.
//!
//! Mappings that do not cover a region as a whole, or lie across it, show its parts by faults of
//! 4 KiB, in `fault`. The first fault on an empty region decides what it is.

use super::{backing::Backing, count, host::Host, region::RegionGuard, vm::Vm};
use crate::{
    logic::{state::HostState, tunables::LargePages},
    sys::{
        fault::{Answer, Fault, Middle},
        huge::HugeFrame,
        slots::SLOTS,
    },
};
use kernel::prelude::*;

/// KiB of a folio.
const HUGE_KB: u64 = 2048;

impl Host {
    /// Whether an empty region of `vm` may become a folio: not while memory is short, for the host or
    /// for the VM.
    pub(crate) fn wants_large(&self, vm: &Vm) -> bool {
        self.state() == HostState::High
            && vm.has_room_for_kb(HUGE_KB)
            && vm.large_pages().unwrap_or(self.large_pages()) == LargePages::Always
    }

    fn no_folio(&self) {
        count(&self.events.large_pages_refused_no_memory);
    }

    /// The folio of zeroes that reads of empty regions show; made when the first one asks.
    fn zero_folio(&self) -> Option<&HugeFrame> {
        if self.zero_folio.as_ref().is_none() {
            // Whoever comes second keeps the first one's.
            self.zero_folio.populate(HugeFrame::alloc(-1)?);
        }
        self.zero_folio.as_ref()
    }
}

/// Answers a fault that a whole 2 MiB page may serve.
pub(crate) fn serve(backing: &Backing, fault: Fault) -> Answer {
    let host = backing.host();
    let first = fault.page_number() / SLOTS as u64 * SLOTS as u64;
    let end = first.saturating_add(SLOTS as u64);
    if !fault.fits_huge() || end > backing.pages() {
        return Answer::Fallback;
    }
    // Without a region it is empty, and whether it shall be a folio is known.
    let known = backing.region(first);
    let huge = known.as_ref().is_some_and(|region| region.looks_huge());
    let empty = known.as_ref().is_none_or(|region| region.looks_empty());
    let may_become = empty && host.wants_large(backing.vm());
    if !huge && !may_become {
        return Answer::Fallback;
    }
    let Ok(region) = backing.region_or_new(first) else {
        return Answer::Fallback;
    };
    let mut spare = None;
    if !huge && fault.is_write() {
        spare = backing.vm().pays_for_kernel(|| fault.alloc_huge());
        let Some(spare) = &spare else {
            host.no_folio();
            return Answer::Fallback;
        };
        region.prefer_node(spare.part(0).node());
    }
    let mut guard = region.lock();
    if guard.is_retired() || end > backing.pages() || fault.middle() == Middle::Table {
        return Answer::Fallback;
    }
    let fresh = guard.huge().is_none();
    if fresh {
        match spare.take() {
            None if region.looks_empty() => return show_zeroes(backing, &fault, guard),
            None => return Answer::Fallback,
            Some(folio) => {
                // Freed only once the region is unlocked.
                spare = guard.become_huge(folio).err();
                if spare.is_some() {
                    return Answer::Fallback;
                }
            }
        }
    }
    count(&backing.vm().events.faults);
    let (touched, own) = guard.touch_all();
    backing.vm().sample.count_touched(touched, own);
    guard.revive_all();
    let writable = fault.is_write() || !guard.is_any_protected();
    if writable && guard.all_may_change() {
        count(&host.events.protect_faults);
        count(&backing.vm().events.protect_faults);
    }
    let answer = match guard.huge() {
        Some(frame) if fresh || !frame.is_poisoned() => fault.map_huge(frame, writable),
        _ => Answer::Fallback,
    };
    if answer == Answer::Done {
        guard.mapped_whole();
    }
    answer
}

/// Whether a fault of 4 KiB in a folio shall come again as one of 2 MiB. The table of 4 KiB entries
/// that is left from when the region was of small pages is taken away for that.
pub(crate) fn shall_come_again(
    backing: &Backing,
    fault: &Fault,
    guard: &mut RegionGuard<'_>,
) -> bool {
    let end = (fault.page_number() / SLOTS as u64 + 1).saturating_mul(SLOTS as u64);
    if guard.huge().is_none() || !fault.fits_huge() || end > backing.pages() {
        return false;
    }
    match fault.middle() {
        Middle::Huge => false,
        // Another thread took the table away.
        Middle::Nothing => guard.may_ask_again(),
        Middle::Table => {
            let gone = fault.drop_empty_table();
            if gone {
                count(&backing.host().collapses.tables);
            }
            gone && guard.may_ask_again()
        }
    }
}

/// Maps the folio of zeroes for a read of a region that is empty.
fn show_zeroes(backing: &Backing, fault: &Fault, mut guard: RegionGuard<'_>) -> Answer {
    // A write that lost its race for the region comes again.
    if fault.is_write() {
        return Answer::Done;
    }
    let Some(zeroes) = backing.host().zero_folio() else {
        return Answer::Fallback;
    };
    if zeroes.part(0).is_crowded() {
        return Answer::Fallback;
    }
    count(&backing.vm().events.faults);
    guard.note_all_zero_mapped();
    fault.map_huge(zeroes, false)
}

/// Makes the region that begins at page `page` a folio, if it is empty, lies before page `to` as a
/// whole, and large pages are wanted. False when it did not.
pub(crate) fn preallocate(backing: &Backing, page: u64, to: u64) -> Result<bool> {
    let whole = page % SLOTS as u64 == 0 && page.saturating_add(SLOTS as u64) <= to;
    if !whole || !backing.host().wants_large(backing.vm()) {
        return Ok(false);
    }
    let region = backing.region_or_new(page)?;
    if !region.looks_empty() {
        return Ok(false);
    }
    let Some(frame) = HugeFrame::alloc(region.node()) else {
        backing.host().no_folio();
        return Ok(false);
    };
    let mut guard = region.lock();
    if guard.is_retired() || guard.huge().is_some() {
        return Ok(false);
    }
    Ok(guard.become_huge(frame).is_ok())
}
