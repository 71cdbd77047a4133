// SPDX-License-Identifier: GPL-2.0

//! Reading, writing and preallocating by syscall.
//!
//! Lock order: writers hold the inode lock; the region lock is taken for one page at a time and
//! never while user memory is copied: a reference keeps the page, and keeps it from being frozen.

use super::{
    backing::{Backing, PAGE},
    compress, huge,
    pools::{NotHad, Unread},
    region::{Region, RegionGuard},
    shared::SharedPage,
    swap::{self, NotIn},
};
use crate::{
    logic::{
        clusters::Place,
        huge::HugeWord,
        slot::{Slot, State},
    },
    sys::{
        page::{Frame, PageRef, Purpose},
        slots::{Content, SLOTS},
        task,
        zs::Scratch,
    },
};
use kernel::prelude::*;

/// A page to read from.
pub(crate) enum Readable {
    /// Reads as zeroes.
    Zeroes,
    /// A page, kept for the reader.
    Page(Frame),
}

/// Why a page cannot be had.
enum NotThere {
    /// The memory that it was in is broken, or swap gave it up: whoever reads it gets an error for ever.
    Gone,
    /// Anything else; EIO: it cannot be read from swap now, or is not what was written.
    For(Error),
}

impl From<Error> for NotThere {
    fn from(error: Error) -> NotThere {
        NotThere::For(error)
    }
}

impl From<NotThere> for Error {
    fn from(why: NotThere) -> Error {
        match why {
            NotThere::Gone => EIO,
            NotThere::For(error) => error,
        }
    }
}

impl NotThere {
    /// Swap has not got a page back; `is_lost`: and never will.
    fn swapped(is_lost: bool) -> NotThere {
        if is_lost {
            NotThere::Gone
        } else {
            NotThere::For(EIO)
        }
    }
}

/// Page `page` for reading.
pub(crate) fn readable(backing: &Backing, page: u64) -> Result<Readable> {
    let Some(region) = backing.region(page) else {
        return Ok(Readable::Zeroes);
    };
    let index = Backing::index(page);
    let mut spare: Option<(Frame, Scratch)> = None;
    loop {
        let guard = region.lock();
        let slot = guard.slot(index);
        let frame = match slot.state() {
            State::Empty | State::Zero => return Ok(Readable::Zeroes),
            State::Private | State::Huge => guard.own_page(index).map(|page| page.get()),
            State::Shared => match backing.host().index().page(slot.record()) {
                Some(SharedPage::Packed { .. }) => None,
                Some(SharedPage::Frame(frame)) => Some(frame),
                None => return Err(EIO),
            },
            State::Compressed | State::Filled | State::Swapped => None,
        };
        let frame = match frame {
            Some(frame) => Some(frame),
            // The reader gets a copy, the page stays compressed.
            None if is_packed(slot) => {
                let Some((mut frame, mut scratch)) = spare.take() else {
                    drop(guard);
                    let frame = Frame::alloc(Purpose::Guest, -1).ok_or(ENOMEM)?;
                    spare = Some((frame, Scratch::new().ok_or(ENOMEM)?));
                    continue;
                };
                let unread = if slot.state() != State::Swapped {
                    copy_packed(backing, &guard, index, &mut scratch, &mut frame)?
                } else if !swap::peek_in(backing.host(), &guard, index, &mut scratch, &mut frame)? {
                    Some(own_unread(backing, slot.place()))
                } else {
                    None
                };
                if let Some(unread) = unread {
                    drop(guard);
                    wait_for_read(backing, &unread)?;
                    spare = Some((frame, scratch));
                    continue;
                }
                Some(frame)
            }
            None => None,
        };
        return match frame {
            Some(frame) if frame.as_ref().is_poisoned() => Err(EIO),
            Some(frame) => Ok(Readable::Page(frame)),
            None => Err(EIO),
        };
    }
}

/// Whether the bytes of a slot may be compressed.
fn is_packed(slot: Slot) -> bool {
    matches!(
        slot.state(),
        State::Compressed | State::Filled | State::Shared | State::Swapped
    )
}

/// Fills `to` with a page that is compressed, the VM's own or a shared one, and stays so. A page of the
/// shared ones' swap file may have to be read first.
fn copy_packed(
    backing: &Backing,
    guard: &RegionGuard<'_>,
    index: usize,
    scratch: &mut Scratch,
    to: &mut Frame,
) -> Result<Option<Unread>, NotThere> {
    let (slot, host) = (guard.slot(index), backing.host());
    let copied = match slot.state() {
        State::Shared => (host.index()).copy(slot.record(), to, scratch, host.away()),
        _ => (guard.unpack(index, scratch, to)).map_err(|_| NotHad::Corrupt),
    };
    match copied {
        Ok(()) => Ok(None),
        Err(NotHad::Unread(unread)) => Ok(Some(unread)),
        Err(NotHad::Lost) => Err(NotThere::swapped(host.index().is_lost(slot.record()))),
        Err(NotHad::Corrupt) => Err(NotThere::Gone),
    }
}

/// What lies at a place of the VM's own swap file.
fn own_unread(backing: &Backing, place: Place) -> Unread {
    let swap = backing.vm().swap().clone();
    Unread { swap, place }
}

/// Waits until an object of a swap file was read, or the task is killed.
fn wait_for_read(backing: &Backing, unread: &Unread) -> Result {
    unread.load(&backing.host().swap);
    if task::fatal_signal_pending() {
        return Err(EINTR);
    }
    Ok(())
}

/// Page `page` for writing: a frame of its own, that counts as changed from here on.
///
/// The caller may write to it as long as it keeps the reference.
pub(crate) fn writable(backing: &Backing, page: u64) -> Result<Frame> {
    Ok(try_writable(backing, page)?)
}

fn try_writable(backing: &Backing, page: u64) -> Result<Frame, NotThere> {
    let region = backing.region_or_new(page)?;
    let index = Backing::index(page);
    let mut spare: Option<(Frame, bool)> = None;
    let mut scratch = None;
    if !matches!(region.peek(index).state(), State::Private | State::Huge) {
        backing.host().throttle(backing.vm());
    }
    loop {
        let state = region.peek(index).state();
        if is_packed(region.peek(index)) && scratch.is_none() {
            scratch = Some(Scratch::new().ok_or(ENOMEM)?);
        }
        let wants_zeroed = matches!(state, State::Empty | State::Zero);
        if !matches!(state, State::Private | State::Huge) && spare.is_none() {
            let purpose = if wants_zeroed {
                Purpose::GuestZeroed
            } else {
                Purpose::Guest
            };
            let frame = Frame::alloc(purpose, region.node());
            spare = Some((frame.ok_or(ENOMEM)?, wants_zeroed));
        }
        let mut guard = region.lock();
        if guard.is_retired() || page >= backing.pages() {
            return Err(EFBIG.into());
        }
        let mut to_read = None;
        if make_private(
            backing,
            &mut guard,
            index,
            &mut spare,
            &mut scratch,
            &mut to_read,
        )? {
            guard.may_change(index);
            let frame = guard.own_page(index).map(|page| page.get()).ok_or(EIO)?;
            if frame.as_ref().is_poisoned() {
                return Err(NotThere::Gone);
            }
            return Ok(frame);
        }
        drop(guard);
        if let Some(unread) = to_read {
            wait_for_read(backing, &unread)?;
        }
    }
}

/// Gives the slot a frame of its own if it has none. False when it needs a spare one first, or what
/// is `to_read` from the swap file.
fn make_private(
    backing: &Backing,
    guard: &mut RegionGuard<'_>,
    index: usize,
    spare: &mut Option<(Frame, bool)>,
    scratch: &mut Option<Scratch>,
    to_read: &mut Option<Unread>,
) -> Result<bool, NotThere> {
    let host = backing.host();
    let slot = guard.slot(index);
    match slot.state() {
        State::Private => Ok(true),
        State::Huge => {
            guard.note(index, HugeWord::NEW.slot());
            Ok(true)
        }
        State::Empty if guard.huge().is_some() => {
            guard.revive(index);
            Ok(true)
        }
        State::Empty | State::Zero => {
            let Some((mut frame, zeroed)) = spare.take() else {
                return Ok(false);
            };
            if !zeroed {
                frame.clear();
            }
            if slot.is_zero_mapped() {
                guard.zap(index);
            }
            if slot.state() == State::Zero {
                backing.count_break();
            }
            host.release(guard.set(index, Content::Private(frame), slot.backoff()));
            Ok(true)
        }
        State::Compressed | State::Filled => {
            let Some(scratch) = scratch else {
                return Ok(false);
            };
            let Some((frame, _)) = spare.take() else {
                return Ok(false);
            };
            compress::unpack(host, guard, index, scratch, frame).map_err(|_| NotThere::Gone)?;
            Ok(true)
        }
        State::Swapped => {
            let Some(scratch) = scratch else {
                return Ok(false);
            };
            let Some((frame, _)) = spare.take() else {
                return Ok(false);
            };
            match swap::swap_in(host, guard, index, scratch, frame) {
                Ok(()) => Ok(true),
                Err(NotIn::Absent(place, frame)) => {
                    *spare = Some((frame, false));
                    *to_read = Some(own_unread(backing, place));
                    Ok(false)
                }
                Err(NotIn::Lost) => Err(NotThere::swapped(slot.place().is_lost())),
            }
        }
        State::Shared => {
            let Some(scratch) = scratch else {
                return Ok(false);
            };
            let Some((mut frame, _)) = spare.take() else {
                return Ok(false);
            };
            if let Some(unread) = copy_packed(backing, guard, index, scratch, &mut frame)? {
                *spare = Some((frame, false));
                *to_read = Some(unread);
                return Ok(false);
            }
            guard.zap(index);
            backing.count_break();
            let backoff = slot.backoff().saturating_add(1);
            host.release(guard.set(index, Content::Private(frame), backoff));
            Ok(true)
        }
    }
}

/// Allocates memory for every Empty page of `from..to`. On failure what was allocated stays.
pub(crate) fn preallocate(backing: &Backing, from: u64, to: u64) -> Result {
    let mut next = from;
    while next < to {
        if task::fatal_signal_pending() {
            return Err(EINTR);
        }
        let page = next;
        if huge::preallocate(backing, page, to)? {
            next = next.saturating_add(SLOTS as u64);
            task::cond_resched();
            continue;
        }
        next = next.saturating_add(1);
        let region = backing.region_or_new(page)?;
        let index = Backing::index(page);
        if region.peek(index).state() != State::Empty {
            continue;
        }
        backing.host().throttle(backing.vm());
        let frame = Frame::alloc(Purpose::GuestZeroed, region.node());
        let mut spare = Some((frame.ok_or(ENOSPC)?, true));
        let mut guard = region.lock();
        if guard.slot(index).state() == State::Empty {
            make_private(backing, &mut guard, index, &mut spare, &mut None, &mut None)?;
        }
        drop(guard);
        if page % 64 == 0 {
            backing.host().look_at_memory();
            task::cond_resched();
        }
    }
    Ok(())
}

/// Punches bytes `from..to` out: whole pages are given back, the ends are zeroed.
pub(crate) fn punch_bytes(backing: &Backing, from: u64, to: u64) -> Result {
    let first_whole = from.div_ceil(PAGE);
    let end_whole = to / PAGE;
    if first_whole > end_whole {
        // Both ends in one page.
        return zero_bytes(backing, from / PAGE, from % PAGE, to % PAGE);
    }
    if from % PAGE != 0 {
        zero_bytes(backing, from / PAGE, from % PAGE, PAGE)?;
    }
    if to % PAGE != 0 {
        zero_bytes(backing, end_whole, 0, to % PAGE)?;
    }
    backing.punch(first_whole, end_whole.min(backing.pages()));
    Ok(())
}

/// Zeroes bytes `from..to` of page `page`, without giving memory to a page that has none.
pub(crate) fn zero_bytes(backing: &Backing, page: u64, from: u64, to: u64) -> Result {
    if page >= backing.pages() {
        return Ok(());
    }
    let Some(region) = backing.region(page) else {
        return Ok(());
    };
    if matches!(
        region.peek(Backing::index(page)).state(),
        State::Empty | State::Zero
    ) {
        return Ok(());
    }
    let frame = match try_writable(backing, page) {
        // Nobody will see what it holds.
        Err(NotThere::Gone) => return Ok(()),
        frame => frame?,
    };
    frame
        .as_ref()
        .zero_hole(usize::try_from(from)?, usize::try_from(to)?);
    Ok(())
}

/// The first page at or after `page`, before `end`, that holds data (or does not).
pub(crate) fn seek(backing: &Backing, page: u64, end: u64, data: bool) -> Option<u64> {
    let mut page = page;
    while page < end {
        let Some(region) = backing.region(page) else {
            if !data {
                return Some(page);
            }
            page = backing.next_region_at(page, end);
            continue;
        };
        if holds_data(&region, Backing::index(page)) == data {
            return Some(page);
        }
        page = page.saturating_add(1);
        if Backing::index(page) == 0 {
            task::cond_resched();
        }
    }
    None
}

/// Whether a page is no hole. A hole in a folio may have been written to again, as a part of it.
fn holds_data(region: &Region, index: usize) -> bool {
    let slot = region.peek(index);
    if !HugeWord::from_slot(slot).is_some_and(HugeWord::is_hole) {
        return slot.state() != State::Empty;
    }
    let guard = region.lock();
    let is_zero = |page: PageRef<'_>| !page.is_poisoned() && page.is_zero();
    guard.slot(index).state() != State::Empty && !guard.own_page(index).is_some_and(is_zero)
}

/// Pages of the file that are not Empty, for st_blocks.
pub(crate) fn allocated_pages(backing: &Backing) -> u64 {
    let mut pages = 0u64;
    let end = backing.pages();
    let mut page = 0;
    while page < end {
        match backing.region(page) {
            None => page = backing.next_region_at(page, end),
            Some(region) => {
                let held = (0..SLOTS)
                    .filter(|&index| region.peek(index).state() != State::Empty)
                    .count();
                pages = pages.saturating_add(held as u64);
                page = page.saturating_add(SLOTS as u64);
                task::cond_resched();
            }
        }
    }
    pages
}
