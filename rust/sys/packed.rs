// SPDX-License-Identifier: GPL-2.0

//! A shared page without a frame: compressed in a store, or known by the four bytes that fill it.
//!
//! The label that a shared frame keeps in its struct page is kept here, so that a packed page is
//! found by its content all the same. 32 bytes; a record names one by its physical address.

use super::{
    bindings,
    inject::{self, Point},
    page::{Frame, Label},
    zs::{Corrupt, NoRoom, Object, Scratch, Store},
};
use crate::logic::records::PAYLOAD_MAX;
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
/// With a length, `what` is the handle of a live object of `store` that this value owns.
#[repr(align(32))]
pub(crate) struct Packed {
    hash: u64,
    store: Arc<Store>,
    /// The object's handle, or the pattern.
    what: usize,
    scope: u32,
    /// Of the object; 0: `what` is a pattern.
    len: u16,
    /// Where the frame was.
    node: i16,
}

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

    /// Fills `to` with the page. Does not sleep.
    pub(crate) fn copy_to(&self, to: &mut Frame, scratch: &mut Scratch) -> Result<(), Corrupt> {
        if self.len == 0 {
            to.fill(self.what as u32);
            return Ok(());
        }
        // SAFETY: By the invariant.
        let object = unsafe { Object::from_parts(self.what, self.len) };
        self.store.get(&object, scratch, to)
    }
}

impl Drop for Packed {
    fn drop(&mut self) {
        if self.len != 0 {
            // SAFETY: By the invariant; nobody looks at it any more.
            let object = unsafe { Object::from_parts(self.what, self.len) };
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
