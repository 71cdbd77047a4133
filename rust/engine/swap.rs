// SPDX-License-Identifier: GPL-2.0

//! A page comes back from its VM's swap file.
//!
//! Lock order: region > the lock of a swap file.

use super::{host::Host, region::RegionGuard, volume::Fetched};
use crate::{
    logic::clusters::Place,
    sys::{page::Frame, slots::Content, zs::Scratch},
};
use core::sync::atomic::Ordering;
use kernel::{page::PAGE_SIZE, prelude::*};

/// Why a page did not come back.
pub(crate) enum NotIn {
    /// It must be read first: [`Swap::load`]. The frame was not used.
    Absent(Place, Frame),
    /// It cannot be read, or is not what was written.
    Lost,
}

/// Gives a Swapped slot `frame` with its content. On failure the slot stays as it is.
pub(crate) fn swap_in(
    host: &Host,
    guard: &mut RegionGuard<'_>,
    index: usize,
    scratch: &mut Scratch,
    mut frame: Frame,
) -> Result<(), NotIn> {
    let place = guard.slot(index).place();
    let swap = guard.region().vm().swap();
    match swap.fill(&host.swap, place, scratch, &mut frame) {
        Fetched::Bytes(_) => {
            swap.ins.fetch_add(1, Ordering::Relaxed);
            host.swap.events.ins.fetch_add(1, Ordering::Relaxed);
            host.release(guard.set(index, Content::Private(frame), 0));
            Ok(())
        }
        Fetched::Absent => Err(NotIn::Absent(place, frame)),
        Fetched::Lost => Err(NotIn::Lost),
    }
}

/// Fills `frame` with what a Swapped slot stands for; the slot stays as it is. False when it must be
/// read first, EIO when it cannot be.
pub(crate) fn peek_in(
    host: &Host,
    guard: &RegionGuard<'_>,
    index: usize,
    scratch: &mut Scratch,
    frame: &mut Frame,
) -> Result<bool> {
    let place = guard.slot(index).place();
    match (guard.region().vm().swap()).fill(&host.swap, place, scratch, frame) {
        Fetched::Bytes(_) => Ok(true),
        Fetched::Absent => Ok(false),
        Fetched::Lost => Err(EIO),
    }
}

/// What became of a page that was to leave the swap file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Back {
    /// It did.
    Done,
    /// It must be read first.
    Absent,
    /// It needs a frame.
    NeedsFrame,
    /// No memory for it.
    NoMemory,
    /// It cannot be read: it stays, and its guest is told when it asks for it.
    Lost,
}

/// Takes a Swapped page out of the file: into the pool as far as `pool_pages` allow, else into the
/// frame.
pub(super) fn bring_back(
    host: &Host,
    guard: &mut RegionGuard<'_>,
    index: usize,
    scratch: &mut Scratch,
    frame: &mut Option<Frame>,
    pool_pages: u64,
) -> Back {
    let place = guard.slot(index).place();
    let vm = guard.region().vm().clone();
    let len = match vm.swap().fetch(&host.swap, place, scratch) {
        Fetched::Bytes(len) => len,
        Fetched::Absent => return Back::Absent,
        Fetched::Lost => return Back::Lost,
    };
    if len < PAGE_SIZE && vm.store().pages() < pool_pages {
        let bytes = scratch.bytes().get(..len).unwrap_or(&[]);
        return match guard.put_back(index, bytes) {
            Ok(()) => Back::Done,
            Err(_) => Back::NoMemory,
        };
    }
    let Some(taken) = frame.take() else {
        return Back::NeedsFrame;
    };
    match swap_in(host, guard, index, scratch, taken) {
        Ok(()) => Back::Done,
        Err(NotIn::Absent(_, taken)) => {
            *frame = Some(taken);
            Back::Absent
        }
        Err(NotIn::Lost) => Back::Lost,
    }
}
