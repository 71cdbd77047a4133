// SPDX-License-Identifier: GPL-2.0

//! Page faults: a guest, or any process that maps a file, touches a page.
//!
//! Lock order: the kernel holds mmap_lock or the VMA lock; the region lock is taken here. Frames are
//! allocated before the region lock, and whoever waits for memory has dropped it.
//!
//! | slot    | read                              | write                                   |
//! |---------|-----------------------------------|-----------------------------------------|
//! | Empty   | a zero frame, read-only           | a zeroed frame                          |
//! | Zero    | a zero frame, read-only           | a zeroed frame (a copy on write)        |
//! | Private | its frame, writable at once [^1]  | its frame, writable                     |
//! | Shared  | the shared frame [^2], read-only  | a copy of the shared frame [^2]         |
//! | Huge    | its part of the folio, writable   | its part of the folio, writable         |
//! | Compressed, Filled, Swapped | a frame with the content, writable | the same           |
//!
//! [^1]: read-only if the scanner write-protected it, so that the write is noticed.
//!
//! A zero frame or a shared one that has all the mappings it can have is not mapped once more: then a
//! read is answered as a write.
//!
//! [^2]: brought back first, for all its sharers, if it was compressed or in their swap file.

use super::{
    backing::Backing,
    cold, compress, count, huge,
    pools::{NotHad, Unread},
    region::RegionGuard,
    shared::SharedPage,
    stall,
    swap::{self, NotIn},
};
use crate::{
    logic::slot::{Slot, State, BACKOFF_MAX},
    sys::{
        clock,
        fault::{Answer, Fault, Middle, NoPageTable},
        page::{Frame, Purpose},
        slots::Content,
        zs::Scratch,
    },
};
use core::sync::atomic::Ordering;
use kernel::error::code::ENOSPC;

/// One fault in so many looks at the host's memory: 2 MiB at most go unnoticed for each VM.
const FAULTS_PER_LOOK: u64 = 512;

/// A frame allocated before the lock was taken.
struct Spare {
    frame: Frame,
    zeroed: bool,
}

impl Spare {
    fn into_zeroed(mut self) -> Frame {
        if !self.zeroed {
            self.frame.clear();
        }
        self.frame
    }
}

/// What was allocated before the lock was taken.
#[derive(Default)]
struct Supplies {
    spare: Option<Spare>,
    scratch: Option<Scratch>,
    /// For a shared page that comes back.
    shared: Option<Frame>,
    /// It is needed, on that node.
    wants_shared: Option<i32>,
}

impl Supplies {
    /// What a shared page needs that comes back; false without memory.
    fn provide_shared(&mut self) -> bool {
        let Some(node) = self.wants_shared else {
            return true;
        };
        if self.shared.is_none() {
            self.shared = Frame::alloc(Purpose::Awaited, node);
        }
        self.provide_scratch() && self.shared.is_some()
    }

    /// What decompression needs; false without memory.
    fn provide_scratch(&mut self) -> bool {
        if self.scratch.is_none() {
            self.scratch = Scratch::new();
        }
        self.scratch.is_some()
    }
}

/// What a look at the locked slot came to.
enum Step {
    Answered(Answer),
    NeedsFrame,
    /// More mappings show what it shares than one page can have: it gets a frame, as for a write.
    NeedsOwn,
    NeedsMemory,
    /// From a swap file.
    NeedsRead(Unread),
}

impl From<Result<Answer, NoPageTable>> for Step {
    fn from(mapped: Result<Answer, NoPageTable>) -> Step {
        match mapped {
            Ok(answer) => Step::Answered(answer),
            Err(NoPageTable) => Step::NeedsMemory,
        }
    }
}

/// Which frame a write to this slot needs, if any.
fn frame_for(slot: Slot, write: bool) -> Option<Purpose> {
    match slot.state() {
        State::Compressed | State::Filled | State::Swapped => Some(Purpose::Guest),
        _ if !write => None,
        State::Empty | State::Zero => Some(Purpose::GuestZeroed),
        State::Shared => Some(Purpose::Guest),
        State::Private | State::Huge => None,
    }
}

/// Answers a fault on a page that is not mapped, or not as the access needs it.
pub(crate) fn serve(backing: &Backing, fault: Fault) -> Answer {
    answer(backing, fault, false)
}

/// Answers a write through a read-only mapping (`page_mkwrite`).
///
/// The kernel holds a reference to the page that is mapped there: the fault lock is never dropped
/// here, and when there is no memory the mapping is taken out, so that the write comes back as a
/// fault that can wait.
pub(crate) fn make_writable(backing: &Backing, fault: Fault) -> Answer {
    answer(backing, fault, true)
}

fn answer(backing: &Backing, mut fault: Fault, make_writable: bool) -> Answer {
    let page = fault.page_number();
    let mut write = make_writable || fault.is_write();
    let events = &backing.vm().events;
    if events.faults.fetch_add(1, Ordering::Relaxed) % FAULTS_PER_LOOK == 0 {
        backing.host().look_at_memory();
    }
    if page >= backing.pages() {
        return Answer::BusError;
    }
    let region = match backing.region_or_new(page) {
        Ok(region) => region,
        // More touched guest memory than the host's tables can name.
        Err(error) if error == ENOSPC => return Answer::BusError,
        Err(_) => return wait(backing, fault, make_writable),
    };
    let index = Backing::index(page);
    let mut supplies = Supplies::default();
    if !make_writable && frame_for(region.peek(index), write).is_some() {
        fault = match stall::throttle_fault(backing.host(), backing.vm(), fault) {
            Ok(fault) => fault,
            Err(answer) => return answer,
        };
    }
    loop {
        let packed = matches!(
            region.peek(index).state(),
            State::Compressed | State::Filled | State::Swapped
        );
        if packed && make_writable {
            // What was mapped read-only is gone meanwhile: the write comes again as a fault.
            return Answer::Done;
        }
        if packed && !supplies.provide_scratch() || !supplies.provide_shared() {
            return wait(backing, fault, make_writable);
        }
        if let (None, Some(purpose)) = (&supplies.spare, frame_for(region.peek(index), write)) {
            let zeroed = purpose == Purpose::GuestZeroed;
            match backing.vm().pays_for_kernel(|| fault.alloc(purpose)) {
                Some(frame) => {
                    region.prefer_node(frame.as_ref().node());
                    supplies.spare = Some(Spare { frame, zeroed });
                }
                None if make_writable => {
                    region.lock().zap(index);
                    return Answer::Done;
                }
                None => return wait(backing, fault, false),
            }
        }
        let asked = clock::now_us();
        let mut guard = region.lock();
        let waited = clock::now_us().saturating_sub(asked);
        backing.host().lock_wait_us.record(waited);
        if guard.is_retired() || page >= backing.pages() {
            return Answer::BusError;
        }
        if fault.middle() == Middle::Huge {
            // Another thread mapped the whole meanwhile.
            return Answer::Done;
        }
        if !make_writable && huge::shall_come_again(backing, &fault, &mut guard) {
            return Answer::Done;
        }
        guard.revive(index);
        if let Some(own) = guard.touch(index) {
            backing.vm().sample.count_touched(1, usize::from(own));
        }
        let step = look(
            backing,
            &fault,
            &mut guard,
            index,
            write,
            make_writable,
            &mut supplies,
        );
        drop(guard);
        match step {
            Step::Answered(answer) => return answer,
            Step::NeedsFrame => {}
            Step::NeedsOwn => write = true,
            Step::NeedsMemory => return wait(backing, fault, make_writable),
            Step::NeedsRead(unread) => return wait_for_read(backing, fault, unread),
        }
    }
}

fn wait(backing: &Backing, fault: Fault, make_writable: bool) -> Answer {
    count(&backing.host().events.waits_for_memory);
    if make_writable {
        return Answer::Done;
    }
    // With the fault lock dropped the mapping, and with it the file, may go.
    let vm = backing.vm().clone();
    let start = clock::now_us();
    let answer = fault.wait_for_memory();
    vm.events
        .stall_us
        .fetch_add(clock::now_us().saturating_sub(start), Ordering::Relaxed);
    answer
}

/// The page lies in a swap file: a thread of ours reads it.
fn wait_for_read(backing: &Backing, fault: Fault, unread: Unread) -> Answer {
    // As in `wait`.
    let host = backing.host().clone();
    fault.wait_for_io(
        || {
            unread.swap.ask(&host.swap, unread.place);
        },
        || unread.load(&host.swap),
    )
}

/// The fault, with the region locked.
fn look(
    backing: &Backing,
    fault: &Fault,
    guard: &mut RegionGuard<'_>,
    index: usize,
    write: bool,
    make_writable: bool,
    supplies: &mut Supplies,
) -> Step {
    let host = backing.host();
    let slot = guard.slot(index);
    match slot.state() {
        State::Private | State::Huge => {
            let Some(page) = guard.own_page(index) else {
                return Step::NeedsFrame;
            };
            if page.is_poisoned() {
                guard.zap(index);
                return Step::Answered(Answer::Poisoned);
            }
            if make_writable && fault.written_pfn() != Some(page.pfn()) {
                // The mapping shows what the slot held before: let the write come again.
                guard.zap(index);
                return Step::Answered(Answer::Done);
            }
            if write && guard.is_protected(index) {
                count(&backing.vm().events.protect_faults);
                count(&host.events.protect_faults);
            }
            let writable = write || !guard.is_protected(index);
            if writable {
                guard.may_change(index);
            }
            match guard.own_page(index) {
                Some(page) => fault.map(page, writable).into(),
                None => Step::NeedsFrame,
            }
        }
        State::Empty | State::Zero if !write => {
            let zeroes = host.zero_frame(fault.page_number());
            if zeroes.is_crowded() {
                return Step::NeedsOwn;
            }
            guard.note(index, slot.with_zero_mapped());
            fault.map_shared(zeroes).into()
        }
        State::Shared if !write => match shared_frame(backing, slot, supplies) {
            Ok(frame) if frame.as_ref().is_poisoned() => Step::Answered(Answer::Poisoned),
            Ok(frame) if frame.as_ref().is_crowded() => Step::NeedsOwn,
            Ok(frame) => fault.map_shared(frame.as_ref()).into(),
            Err(step) => step,
        },
        State::Empty | State::Zero => {
            let Some(spare) = supplies.spare.take() else {
                return Step::NeedsFrame;
            };
            if slot.is_zero_mapped() {
                guard.zap(index);
            }
            let broken = slot.state() == State::Zero;
            let backoff = if broken {
                slot.backoff().saturating_add(1)
            } else {
                0
            };
            if broken {
                backing.count_break();
            }
            host.release(guard.set(index, Content::Private(spare.into_zeroed()), backoff));
            map_own(fault, guard, index)
        }
        State::Compressed | State::Filled | State::Swapped if make_writable => {
            Step::Answered(Answer::Done)
        }
        State::Swapped => {
            let Some(scratch) = &mut supplies.scratch else {
                return Step::NeedsFrame;
            };
            let Some(taken) = supplies.spare.take() else {
                return Step::NeedsFrame;
            };
            match swap::swap_in(host, guard, index, scratch, taken.frame) {
                Ok(()) => map_own(fault, guard, index),
                Err(NotIn::Absent(place, _)) => {
                    let swap = backing.vm().swap().clone();
                    Step::NeedsRead(Unread { swap, place })
                }
                Err(NotIn::Lost) => Step::Answered(Answer::Poisoned),
            }
        }
        State::Compressed | State::Filled => {
            let Some(scratch) = &mut supplies.scratch else {
                return Step::NeedsFrame;
            };
            let Some(taken) = supplies.spare.take() else {
                return Step::NeedsFrame;
            };
            match compress::unpack(host, guard, index, scratch, taken.frame) {
                Ok(()) => map_own(fault, guard, index),
                Err(_) => Step::Answered(Answer::Poisoned),
            }
        }
        State::Shared => {
            let shared = match shared_frame(backing, slot, supplies) {
                Ok(frame) => frame,
                // The mapping that was written through is gone: the write comes again as a fault.
                Err(_) if make_writable => return Step::Answered(Answer::Done),
                Err(step) => return step,
            };
            let Some(mut taken) = supplies.spare.take() else {
                return Step::NeedsFrame;
            };
            if taken.frame.copy_from(shared.as_ref()).is_err() {
                return Step::Answered(Answer::Poisoned);
            }
            drop(shared);
            guard.zap(index);
            backing.count_break();
            let backoff = slot.backoff().saturating_add(1).min(BACKOFF_MAX);
            host.release(guard.set(index, Content::Private(taken.frame), backoff));
            map_own(fault, guard, index)
        }
    }
}

/// The frame of a Shared slot's record, brought back for all its sharers if need be.
fn shared_frame(backing: &Backing, slot: Slot, supplies: &mut Supplies) -> Result<Frame, Step> {
    let host = backing.host();
    match host.index().page_to_map(slot.record()) {
        Some(SharedPage::Frame(frame)) => Ok(frame),
        Some(SharedPage::Packed { node }) => {
            let (Some(scratch), Some(frame)) = (&mut supplies.scratch, supplies.shared.take())
            else {
                supplies.wants_shared = Some(node);
                return Err(Step::NeedsFrame);
            };
            cold::bring_back(host, slot.record(), frame, scratch).map_err(|why| match why {
                NotHad::Unread(unread) => Step::NeedsRead(unread),
                NotHad::Lost | NotHad::Corrupt => Step::Answered(Answer::Poisoned),
            })
        }
        None => Err(Step::NeedsMemory),
    }
}

fn map_own(fault: &Fault, guard: &mut RegionGuard<'_>, index: usize) -> Step {
    match guard.page(index) {
        Some(page) => fault.map(page, true).into(),
        None => Step::NeedsFrame,
    }
}
