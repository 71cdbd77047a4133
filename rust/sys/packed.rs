// SPDX-License-Identifier: GPL-2.0

//! A shared page without a frame: compressed in a store, known by the four bytes that fill it, or in a
//! swap file.
//!
//! The label that a shared frame keeps in its struct page is kept here, so that a packed page is
//! found by its content all the same. 32 bytes; a record names one by its physical address.

use super::{
    bindings,
    inject::{self, Point},
    page::{Frame, Label},
    zs::{Corrupt, NoRoom, Object, Scratch, Store},
};
use crate::logic::{clusters::Place, records::PAYLOAD_MAX};
use core::ptr;
use kernel::{
    alloc::flags::{GFP_NOWAIT, __GFP_NOWARN},
    prelude::*,
    sync::Arc,
};

/// See the top of the file.
///
/// # Invariants
///
/// With a length, but for [`SWAPPED`], `what` is the handle of a live object of `store` that this value
/// owns.
#[repr(align(32))]
pub(crate) struct Packed {
    hash: u64,
    store: Arc<Store>,
    /// The object's handle, the pattern, or the place in the scope's swap file.
    what: usize,
    scope: u32,
    /// Of the object; 0: `what` is a pattern, [`SWAPPED`]: a place.
    len: u16,
    /// Where the frame was.
    node: i16,
}

/// A length that no object has.
const SWAPPED: u16 = u16::MAX;
/// Bytes of one, in steps of which a payload counts.
const STEP: usize = 32;
const _: () = assert!(core::mem::size_of::<Packed>() == STEP);
const _: () = assert!(core::mem::align_of::<Packed>() == STEP);

impl Packed {
    /// Memory that each takes besides its object.
    pub(crate) const BYTES: u64 = STEP as u64;

    /// Keeps `bytes` in `store`, if that is no larger than `max_pages` then. Does not wait for memory.
    pub(crate) fn compressed(
        label: Label,
        node: i32,
        store: &Arc<Store>,
        bytes: &[u8],
        max_pages: u64,
    ) -> Result<KBox<Packed>, NoRoom> {
        let object = store.put(bytes, node, max_pages)?;
        // INVARIANT: the object is this value's from here on; without one it is freed.
        let (what, len) = object.into_parts();
        Packed::boxed(Packed {
            hash: label.hash,
            store: store.clone(),
            what,
            scope: label.scope,
            len,
            node: node as i16,
        })
    }

    /// A page that `pattern` fills; `store` is where others of its kind are.
    pub(crate) fn filled(
        label: Label,
        node: i32,
        store: &Arc<Store>,
        pattern: u32,
    ) -> Result<KBox<Packed>, NoRoom> {
        // INVARIANT: no length, no object.
        Packed::boxed(Packed {
            hash: label.hash,
            store: store.clone(),
            what: pattern as usize,
            scope: label.scope,
            len: 0,
            node: node as i16,
        })
    }

    /// A page that lies at `place` in the swap file of its scope; whoever has the value gives the place
    /// back. `store` is where others of its scope are.
    pub(crate) fn swapped(
        label: Label,
        node: i32,
        store: &Arc<Store>,
        place: Place,
    ) -> Result<KBox<Packed>, NoRoom> {
        // INVARIANT: `SWAPPED`, no object.
        Packed::boxed(Packed {
            hash: label.hash,
            store: store.clone(),
            what: place.payload() as usize,
            scope: label.scope,
            len: SWAPPED,
            node: node as i16,
        })
    }

    fn boxed(packed: Packed) -> Result<KBox<Packed>, NoRoom> {
        if inject::fails(Point::Packed) {
            return Err(NoRoom::Memory);
        }
        let packed = KBox::new(packed, GFP_NOWAIT | __GFP_NOWARN).map_err(|_| NoRoom::Memory)?;
        if payload_of(&packed) > PAYLOAD_MAX {
            return Err(NoRoom::Memory);
        }
        Ok(packed)
    }

    /// Gives the ownership away as a number that a record can hold.
    pub(super) fn into_payload(packed: KBox<Packed>) -> u64 {
        let payload = payload_of(&packed);
        core::mem::forget(packed);
        payload
    }

    /// The reverse of [`Packed::into_payload`].
    ///
    /// # Safety
    ///
    /// `payload` came from [`Packed::into_payload`] and is turned back only once.
    pub(super) unsafe fn from_payload(payload: u64) -> KBox<Packed> {
        // SAFETY: A box of this type lies there, and its ownership was given away.
        unsafe { KBox::from_raw(pointer_of(payload)) }
    }

    /// The same without ownership.
    ///
    /// # Safety
    ///
    /// `payload` came from [`Packed::into_payload`] and is not turned back as long as `'a`.
    pub(super) unsafe fn of_payload<'a>(payload: u64) -> &'a Packed {
        // SAFETY: A box of this type lies there for so long.
        unsafe { &*pointer_of(payload) }
    }

    /// What the page was published under.
    pub(crate) fn label(&self) -> Label {
        Label {
            hash: self.hash,
            scope: self.scope,
        }
    }

    /// The NUMA node of the frame that it was.
    pub(crate) fn node(&self) -> i32 {
        self.node.into()
    }

    /// Where it lies in the swap file of its scope, if it does.
    pub(crate) fn place(&self) -> Option<Place> {
        (self.len == SWAPPED).then(|| Place::from_payload(self.what as u64))
    }

    /// The object, if it is one.
    fn object(&self) -> Option<Object> {
        if matches!(self.len, 0 | SWAPPED) {
            return None;
        }
        // SAFETY: By the invariant; nobody frees it as long as this value is borrowed.
        Some(unsafe { Object::from_parts(self.what, self.len) })
    }

    /// Whether it takes room in its store.
    pub(crate) fn is_object(&self) -> bool {
        self.object().is_some()
    }

    /// Copies the object, if it is one.
    pub(crate) fn read<'a>(&self, scratch: &'a mut Scratch) -> Option<&'a [u8]> {
        self.store.read(&self.object()?, scratch)
    }

    /// Fills `to` with the page, unless it is in a swap file. Does not sleep.
    pub(crate) fn copy_to(&self, to: &mut Frame, scratch: &mut Scratch) -> Result<(), Corrupt> {
        match self.object() {
            Some(object) => self.store.get(&object, scratch, to),
            None if self.len == 0 => {
                to.fill(self.what as u32);
                Ok(())
            }
            None => Err(Corrupt),
        }
    }

    /// The page lies at `place` from here on; its object is freed.
    pub(super) fn move_out(&mut self, place: Place) {
        let object = self.object();
        // INVARIANT: `SWAPPED`, no object.
        (self.what, self.len) = (place.payload() as usize, SWAPPED);
        if let Some(object) = object {
            self.store.free(object);
        }
    }

    /// Keeps `bytes`, what lies at its place, in the store, whatever its size; hands the place over.
    /// Does not wait for memory.
    pub(super) fn move_in(&mut self, bytes: &[u8]) -> Result<Place, NoRoom> {
        let place = self.place().ok_or(NoRoom::Memory)?;
        let object = self.store.put(bytes, self.node.into(), u64::MAX)?;
        // INVARIANT: the object is this value's from here on.
        (self.what, self.len) = object.into_parts();
        Ok(place)
    }
}

impl Drop for Packed {
    fn drop(&mut self) {
        if let Some(object) = self.object() {
            self.store.free(object);
        }
    }
}

fn payload_of(packed: &Packed) -> u64 {
    // SAFETY: Small boxes come from a slab, which lies in the direct map.
    unsafe { bindings::thinram_virt_to_phys(ptr::from_ref(packed).cast()) / STEP as u64 }
}

fn pointer_of(payload: u64) -> *mut Packed {
    // SAFETY: Turns a number into an address, which is looked at by those who promise that it is one.
    unsafe { bindings::thinram_phys_to_virt(payload.wrapping_mul(STEP as u64)).cast() }
}
