// SPDX-License-Identifier: GPL-2.0

//! A page becomes an object in its VM's pool, and a page again.
//!
//! Packing follows the protocol of every replacement: with the region locked the page is in no page
//! table, its reference count is frozen, and only then it is read. Whatever fails leaves the slot
//! as it was. Unpacking needs no more than the lock: nobody can reach what is compressed.
//!
//! Lock order: region > the locks of zsmalloc.

use super::{count, host::Host, region::RegionGuard};
use crate::{
    logic::{clusters::Place, tunables::RunMode},
    sys::{
        page::Frame,
        slots::Content,
        zs::{Compressor, Corrupt, NoRoom, Scratch},
    },
};
use core::sync::atomic::AtomicU64;

/// Why a page was not compressed, each with its own counter.
#[derive(Default)]
pub(crate) struct Refusals {
    /// Somebody held a reference: O_DIRECT, vhost, a debugger, a reader.
    pub(crate) pinned: AtomicU64,
    /// It did not get as small as `compress_max_object_percent` asks for.
    pub(crate) incompressible: AtomicU64,
    /// The VM's pool was as large as `compress_max_percent` allows.
    pub(crate) pool_full: AtomicU64,
    /// No memory for the object.
    pub(crate) no_memory: AtomicU64,
    /// The memory behind the page is broken.
    pub(crate) poisoned: AtomicU64,
}

/// What became of an attempt.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Outcome {
    /// The frame is free.
    Packed,
    /// This page stays.
    Refused,
    /// The pool is full, for every page of the VM.
    PoolFull,
    /// The swap file has to be prepared for it first.
    NeedsSwap,
}

/// Where a page may go besides the pool.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Beyond {
    /// Nowhere.
    Nothing,
    /// Into the swap file if it does not compress.
    Incompressible,
    /// Also if the pool is full.
    All,
}

/// Compresses the Private page of a slot, which must be in no page table; or lets it go `beyond`.
pub(crate) fn pack(
    host: &Host,
    guard: &mut RegionGuard<'_>,
    index: usize,
    compressor: &mut Compressor,
    beyond: Beyond,
) -> Outcome {
    let refusals = &host.compress_refusals;
    let vm = guard.region().vm();
    let cap = vm.pool_cap_pages(&host.knobs);
    let zeroes_are_shared = vm.shares() && host.run_mode() == RunMode::Run;
    let pool_is_full = vm.store().pages() > cap;
    let Some(page) = guard.page(index) else {
        return Outcome::Refused;
    };
    if page.is_poisoned() {
        count(&refusals.poisoned);
        return Outcome::Refused;
    }
    let node = page.node();
    let Some(frozen) = page.freeze() else {
        count(&refusals.pinned);
        return Outcome::Refused;
    };
    if let Some(pattern) = frozen.filled_with() {
        drop(frozen);
        let content = match pattern {
            0 if zeroes_are_shared => Content::Zero,
            pattern => Content::Filled(pattern),
        };
        let backoff = guard.slot(index).backoff();
        host.release(guard.set(index, content, backoff));
        packed(host, guard);
        return Outcome::Packed;
    }
    if pool_is_full && beyond != Beyond::All {
        count(&refusals.pool_full);
        return Outcome::PoolFull;
    }
    let Some(bytes) = compressor.compress(frozen.page(), host.max_object_bytes()) else {
        count(&refusals.incompressible);
        if beyond == Beyond::Nothing {
            return Outcome::Refused;
        }
        let place = vm.swap().stage(&host.swap, frozen.bytes());
        drop(frozen);
        return swapped(host, guard, index, place);
    };
    drop(frozen);
    if pool_is_full {
        let place = vm.swap().stage(&host.swap, bytes);
        return swapped(host, guard, index, place);
    }
    match guard.pack(index, bytes, node, cap) {
        Ok(()) => {
            packed(host, guard);
            Outcome::Packed
        }
        Err(NoRoom::Full) if beyond == Beyond::All => {
            let place = guard.region().vm().swap().stage(&host.swap, bytes);
            swapped(host, guard, index, place)
        }
        Err(NoRoom::Full) => {
            count(&refusals.pool_full);
            Outcome::PoolFull
        }
        Err(NoRoom::Memory) => {
            count(&refusals.no_memory);
            Outcome::Refused
        }
    }
}

/// The page goes to where it was put in the swap file.
fn swapped(
    host: &Host,
    guard: &mut RegionGuard<'_>,
    index: usize,
    place: Option<Place>,
) -> Outcome {
    let Some(place) = place else {
        return Outcome::NeedsSwap;
    };
    host.release(guard.set(index, Content::Swapped(place), 0));
    Outcome::Packed
}

/// Moves the object of a Compressed slot to the swap file.
pub(crate) fn swap_out(
    host: &Host,
    guard: &mut RegionGuard<'_>,
    index: usize,
    scratch: &mut Scratch,
) -> Outcome {
    let Some(bytes) = guard.packed(index, scratch) else {
        return Outcome::Refused;
    };
    let place = guard.region().vm().swap().stage(&host.swap, bytes);
    swapped(host, guard, index, place)
}

fn packed(host: &Host, guard: &RegionGuard<'_>) {
    count(&host.events.compressions);
    count(&guard.region().vm().events.compressions);
}

/// Gives a Compressed or Filled slot `frame` with its content. On failure the slot stays as it is;
/// what it stands for is lost.
pub(crate) fn unpack(
    host: &Host,
    guard: &mut RegionGuard<'_>,
    index: usize,
    scratch: &mut Scratch,
    mut frame: Frame,
) -> Result<(), Corrupt> {
    if guard.unpack(index, scratch, &mut frame).is_err() {
        count(&host.events.decompressions_failed);
        return Err(Corrupt);
    }
    host.release(guard.set(index, Content::Private(frame), 0));
    count(&host.events.decompressions);
    count(&guard.region().vm().events.decompressions);
    Ok(())
}
