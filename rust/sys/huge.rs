// SPDX-License-Identifier: GPL-2.0

//! 2 MiB folios: what a region's 512 pages lie in as long as they are one.
//!
//! A folio has one reference of ours, and one more for each page-table entry (of either size) that
//! maps it or a part of it. Each part can be kept by a [`super::page::Frame`] of its own, which is a
//! reference to the whole.

use super::{
    bindings,
    inject::{self, Point},
    live::Lent,
    page::{copy_page, PageRef, PoisonedMemory},
    protect,
    slots::SLOTS,
};
use core::ptr::NonNull;
use kernel::page::PAGE_SIZE;

/// Order of a folio of 512 pages.
pub(crate) const ORDER: u32 = SLOTS.ilog2();

/// One reference to a folio of 512 pages; dropping it puts the reference.
pub(crate) struct HugeFrame(NonNull<bindings::page>);

// SAFETY: A reference to a folio belongs to no task and no CPU.
unsafe impl Send for HugeFrame {}
// SAFETY: `&HugeFrame` only gives out `PageRef`s, whose methods may be called from any thread.
unsafe impl Sync for HugeFrame {}

impl HugeFrame {
    /// Bytes of it.
    pub(crate) const BYTES: usize = SLOTS * PAGE_SIZE;

    /// Allocates a zeroed folio near `node` (negative: anywhere near), without much effort: `None`
    /// where memory is short or in pieces, or where the kernel has no such folios.
    pub(crate) fn alloc(node: i32) -> Option<HugeFrame> {
        if inject::fails(Point::HugeFrame) {
            return None;
        }
        // SAFETY: May sleep; callers hold no spinlock.
        NonNull::new(unsafe { bindings::thinram_huge_alloc(node) }).map(HugeFrame::own)
    }

    /// A reference that is ours from here on.
    fn own(page: NonNull<bindings::page>) -> HugeFrame {
        Lent::Folio.out();
        HugeFrame(page)
    }

    /// Takes over a reference that the caller owns.
    ///
    /// # Safety
    ///
    /// `page` is the first page of a folio of [`ORDER`] and the caller owns a reference, which passes
    /// to the value.
    pub(super) unsafe fn from_page(page: NonNull<bindings::page>) -> HugeFrame {
        HugeFrame::own(page)
    }

    pub(super) fn as_ptr(&self) -> *mut bindings::page {
        self.0.as_ptr()
    }

    /// One of the 512 pages. Its reference count is that of the whole.
    pub(crate) fn part(&self, index: usize) -> PageRef<'_> {
        // SAFETY: The index lies within the folio, whose struct pages are an array.
        let page = unsafe { self.0.add(index % SLOTS) };
        // SAFETY: `self` keeps the folio.
        unsafe { PageRef::from_page(page) }
    }

    /// Fills one of the 512 pages with the content of `from`.
    pub(crate) fn fill_part(
        &mut self,
        index: usize,
        from: PageRef<'_>,
    ) -> Result<(), PoisonedMemory> {
        // SAFETY: The index lies within the folio, which nobody else has while it is ours mutably
        // and in no region.
        copy_page(unsafe { self.0.add(index % SLOTS) }, from)
    }

    /// Whether memory_failure() marked any of the pages.
    pub(crate) fn is_poisoned(&self) -> bool {
        (0..SLOTS).any(|index| self.part(index).is_poisoned())
    }
}

impl HugeFrame {
    /// Freezes a folio of which we hold the only reference; `None` when anybody else holds one, or
    /// one of a part.
    pub(crate) fn freeze(&self) -> Option<FrozenHuge<'_>> {
        // SAFETY: `self` keeps the folio.
        let real = unsafe { bindings::thinram_page_freeze(self.0.as_ptr(), 1) };
        if real || !protect::armed(protect::Protection::Freeze) {
            // INVARIANT: frozen just now, unless a debug build took the protection out.
            Some(FrozenHuge { folio: self, real })
        } else {
            None
        }
    }
}

/// A folio that nobody else can reach: its bytes cannot change. Unfreezes when dropped.
///
/// # Invariants
///
/// While `real`, the folio's reference count is zero and one reference is ours to give back.
pub(crate) struct FrozenHuge<'a> {
    folio: &'a HugeFrame,
    real: bool,
}

impl<'a> FrozenHuge<'a> {
    /// One of the 512 pages; what is read through it stays true until the thaw.
    pub(crate) fn part(&self, index: usize) -> PageRef<'a> {
        self.folio.part(index)
    }
}

impl Drop for FrozenHuge<'_> {
    fn drop(&mut self) {
        if self.real {
            // SAFETY: By the invariant the count is zero and was one before.
            unsafe { bindings::thinram_page_unfreeze(self.folio.as_ptr(), 1) }
        }
    }
}

impl Drop for HugeFrame {
    fn drop(&mut self) {
        Lent::Folio.back();
        // SAFETY: We own one reference.
        unsafe { bindings::thinram_page_put(self.0.as_ptr()) }
    }
}
