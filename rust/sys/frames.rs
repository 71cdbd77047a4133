// SPDX-License-Identifier: GPL-2.0

//! The frames that shared records own, and the memory that the shared index lives in.

use super::{
    inject,
    page::{Frame, Label, PageRef},
    slots::Sharer,
};
use crate::logic::{
    catalog::{GroupPage, PageStore},
    records::{Dropped, RecordPage, RecordStore, Records},
};
use kernel::{
    alloc::{flags::__GFP_ZERO, AllocError},
    prelude::*,
};

/// Pages of a table, one box each.
pub(crate) struct Boxes<T>(KVVec<KBox<T>>);

impl<T> Boxes<T> {
    /// No page yet.
    pub(crate) const fn new() -> Self {
        Boxes(KVVec::new())
    }

    /// Adds a page; the vector of pointers may have to move.
    pub(crate) fn push(&mut self, page: KBox<T>) -> Result<(), AllocError> {
        self.0.push(page, GFP_KERNEL)
    }
}

impl PageStore for Boxes<GroupPage> {
    fn len(&self) -> usize {
        self.0.len()
    }
    fn page(&self, i: usize) -> Option<&GroupPage> {
        self.0.get(i).map(|page| &**page)
    }
    fn page_mut(&mut self, i: usize) -> Option<&mut GroupPage> {
        self.0.get_mut(i).map(|page| &mut **page)
    }
}

impl RecordStore for Boxes<RecordPage> {
    fn len(&self) -> usize {
        self.0.len()
    }
    fn page(&self, i: usize) -> Option<&RecordPage> {
        self.0.get(i).map(|page| &**page)
    }
    fn page_mut(&mut self, i: usize) -> Option<&mut RecordPage> {
        self.0.get_mut(i).map(|page| &mut **page)
    }
}

/// What became of a record that lost a sharer.
pub(crate) enum AfterDrop {
    /// Others share it still.
    Shared,
    /// That was the last one: the record is gone, here is its frame.
    Last(Frame),
}

/// Records that own frames.
///
/// # Invariants
///
/// The payload of each live record is a frame number that owns one reference.
pub(crate) struct FrameRecords(Records<Boxes<RecordPage>>);

impl FrameRecords {
    /// No records.
    pub(crate) fn new() -> Self {
        FrameRecords(Records::new(Boxes::new()))
    }

    /// The bookkeeping, for counts and for growing.
    pub(crate) fn table(&self) -> &Records<Boxes<RecordPage>> {
        &self.0
    }

    /// Whether [`FrameRecords::publish`] would fail for want of a page of records.
    pub(crate) fn wants_page(&self) -> bool {
        self.0.wants_page()
    }

    /// Adds room for more records.
    pub(crate) fn add_page(&mut self, page: KBox<RecordPage>) -> Result<(), AllocError> {
        self.0.store_mut().push(page)
    }

    /// Makes a record of `frame` with two sharers. From here on the frame is immutable.
    pub(crate) fn publish(
        &mut self,
        mut frame: Frame,
        label: Label,
    ) -> Result<(Sharer, Sharer), Frame> {
        frame.set_label(label);
        match self.0.alloc(frame.as_ref().pfn(), 2) {
            Some(id) => {
                // INVARIANT: the record takes the frame's reference over.
                frame.into_pfn();
                Ok((Sharer::new(id), Sharer::new(id)))
            }
            None => Err(frame),
        }
    }

    /// The frame of a record that somebody keeps a sharer of.
    pub(crate) fn page(&self, id: u32) -> Option<PageRef<'_>> {
        let record = self.0.get(id)?;
        // SAFETY: By the invariant the record owns a reference; it gives it away only through
        // `&mut self`.
        Some(unsafe { PageRef::from_pfn(record.pfn) })
    }

    /// How many share the record, 0 for one that does not exist.
    pub(crate) fn sharers(&self, id: u32) -> u32 {
        self.0.get(id).map_or(0, |record| record.sharers)
    }

    /// One more sharer, unless the record has `max` already.
    pub(crate) fn join(&mut self, id: u32, max: u32) -> Option<Sharer> {
        self.0.add_sharer(id, max).ok().map(|_| Sharer::new(id))
    }

    /// Renames what a record was published under.
    pub(crate) fn relabel(&mut self, id: u32, label: Label) {
        if let Some(record) = self.0.get(id) {
            // SAFETY: The record owns the reference; the second owner made here is forgotten below.
            let mut frame = unsafe { Frame::from_pfn(record.pfn) };
            frame.set_label(label);
            frame.into_pfn();
        }
    }

    /// Gives a sharer back.
    pub(crate) fn leave(&mut self, sharer: Sharer) -> AfterDrop {
        match self.0.drop_sharer(sharer.record()) {
            // SAFETY: The record is gone, and with it the owner of this reference.
            Ok(Dropped::Last { pfn }) => AfterDrop::Last(unsafe { Frame::from_pfn(pfn) }),
            _ => AfterDrop::Shared,
        }
    }
}

/// Allocates a page of a table in place: a page is too large for the stack of a fault.
///
/// # Safety
///
/// A `T` of all zero bytes is valid.
pub(super) unsafe fn zeroed_box<T>() -> Result<KBox<T>, AllocError> {
    let page = KBox::<T>::new_uninit(GFP_KERNEL | __GFP_ZERO)?;
    // SAFETY: The allocation is zeroed, which the caller says is a valid `T`.
    Ok(unsafe { page.assume_init() })
}

/// An empty page of the catalog.
pub(crate) fn group_page() -> Result<KBox<GroupPage>, AllocError> {
    if inject::fails() {
        return Err(AllocError);
    }
    // SAFETY: Arrays of integers. All-zero is the empty page, as a test in logic says.
    unsafe { zeroed_box() }
}

/// An empty page of records.
pub(crate) fn record_page() -> Result<KBox<RecordPage>, AllocError> {
    if inject::fails() {
        return Err(AllocError);
    }
    // SAFETY: As above.
    unsafe { zeroed_box() }
}
