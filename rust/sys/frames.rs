// SPDX-License-Identifier: GPL-2.0

//! What shared records own, frames and packed pages, and the memory that the shared index lives in.

use super::{
    inject::{self, Point},
    packed::Packed,
    page::{Frame, Label, PageRef},
    slots::Sharer,
    zs::{Corrupt, NoRoom, Scratch},
};
use crate::logic::{
    catalog::{GroupPage, PageStore},
    clusters::Place,
    records::{Bytes, Dropped, Form, RecordPage, RecordStore, Records},
};
use kernel::{
    alloc::{flags::__GFP_ZERO, AllocError, Flags},
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

/// The bytes of a record as a value, to be dropped with no lock held.
pub(crate) enum Owned {
    /// A frame.
    Frame(Frame),
    /// A page without a frame.
    Packed(KBox<Packed>),
}

impl Owned {
    /// Gives the ownership away as words of a record.
    fn into_bytes(self) -> Bytes {
        match self {
            Owned::Frame(frame) => Bytes::frame(frame.into_pfn()),
            Owned::Packed(packed) => {
                let swapped = packed.place().is_some();
                let payload = Packed::into_payload(packed);
                match swapped {
                    true => Bytes::swapped(payload),
                    false => Bytes::compressed(payload),
                }
            }
        }
    }

    /// The reverse of [`Owned::into_bytes`].
    ///
    /// # Safety
    ///
    /// `bytes` came from [`Owned::into_bytes`] and are turned back only once.
    unsafe fn from_bytes(bytes: Bytes) -> Owned {
        // SAFETY: By the caller's promise, for whichever form it was.
        unsafe {
            match bytes.form {
                Form::Compressed | Form::Swapped => {
                    Owned::Packed(Packed::from_payload(bytes.payload))
                }
                _ => Owned::Frame(Frame::from_pfn(bytes.payload)),
            }
        }
    }
}

/// The bytes of a record, as long as its owner is borrowed.
#[derive(Clone, Copy)]
pub(crate) enum Held<'a> {
    /// A frame.
    Frame(PageRef<'a>),
    /// A page without a frame.
    Packed(&'a Packed),
}

impl Held<'_> {
    /// What the record was published under.
    pub(crate) fn label(&self) -> Label {
        match self {
            Held::Frame(page) => page.label(),
            Held::Packed(packed) => packed.label(),
        }
    }
}

/// What became of a record that lost a sharer.
pub(crate) enum AfterDrop {
    /// Others share it still.
    Shared,
    /// That was the last one: the record is gone, here is what it owned.
    Last(Owned),
}

/// Why a record was not packed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum NotPacked {
    /// It has no frame, or another one than was thought.
    Changed,
    /// Somebody holds the frame, or a page table maps it.
    Held,
}

/// Why a record has no frame of what it was packed to; it is what it was.
pub(crate) enum NotUnpacked {
    /// It was not packed: here is the frame that was meant for it.
    Changed(Frame),
    /// What was packed cannot be read.
    Corrupt,
}

impl From<Corrupt> for NotUnpacked {
    fn from(_: Corrupt) -> NotUnpacked {
        NotUnpacked::Corrupt
    }
}

/// Records that own frames and packed pages.
///
/// # Invariants
///
/// The bytes of each live record came from [`Owned::into_bytes`], and are turned back once the
/// record has others or is gone.
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
                Owned::Frame(frame).into_bytes();
                Ok((Sharer::new(id), Sharer::new(id)))
            }
            None => Err(frame),
        }
    }

    /// What a record owns that somebody keeps a sharer of.
    pub(crate) fn held(&self, id: u32) -> Option<Held<'_>> {
        let bytes = self.0.get(id)?.bytes;
        // SAFETY: By the invariant the record owns what its bytes say; it gives it away only through
        // `&mut self`.
        Some(unsafe {
            match bytes.form {
                Form::Compressed | Form::Swapped => Held::Packed(Packed::of_payload(bytes.payload)),
                _ => Held::Frame(PageRef::from_pfn(bytes.payload)),
            }
        })
    }

    /// How many share the record, 0 for one that does not exist.
    pub(crate) fn sharers(&self, id: u32) -> u32 {
        self.0.get(id).map_or(0, |record| record.sharers)
    }

    /// One more sharer, unless the record has `max` already.
    pub(crate) fn join(&mut self, id: u32, max: u32) -> Option<Sharer> {
        self.0.add_sharer(id, max).ok().map(|_| Sharer::new(id))
    }

    /// Renames what a record was published under; one without a frame keeps its label.
    pub(crate) fn relabel(&mut self, id: u32, label: Label) {
        let Some(bytes) = self.0.get(id).map(|record| record.bytes) else {
            return;
        };
        if bytes.form == Form::Frame {
            // SAFETY: The record owns the reference; the second owner made here is forgotten below.
            let mut frame = unsafe { Frame::from_pfn(bytes.payload) };
            frame.set_label(label);
            frame.into_pfn();
        }
    }

    /// Whether nobody touched the record's frame since it was last asked, and no page table maps it.
    /// Who is about to map it says [`FrameRecords::touch`].
    pub(crate) fn stays_idle(&mut self, id: u32) -> bool {
        let unused = matches!(self.held(id), Some(Held::Frame(page)) if !page.is_mapped());
        self.0.note_idle(id, unused) && unused
    }

    /// The record's frame is about to be mapped.
    pub(crate) fn touch(&mut self, id: u32) {
        self.0.note_idle(id, false);
    }

    /// Puts `packed`, which was made from `frame`, in the place of a record's frame, which is handed
    /// over. It must be that one and nobody else's: in no page table, not pinned, and nobody about to
    /// map it.
    pub(crate) fn pack(
        &mut self,
        id: u32,
        frame: Frame,
        packed: KBox<Packed>,
    ) -> Result<Owned, (NotPacked, Owned)> {
        let why = match self.held(id) {
            Some(Held::Frame(page)) if page.is(&frame) && page.label() == packed.label() => {
                drop(frame);
                // Thawed at once: who wants a reference has to borrow these records first.
                page.freeze().is_none().then_some(NotPacked::Held)
            }
            _ => Some(NotPacked::Changed),
        };
        match why {
            None => self
                .exchange(id, Owned::Packed(packed))
                .map_err(|packed| (NotPacked::Changed, packed)),
            Some(why) => Err((why, Owned::Packed(packed))),
        }
    }

    /// Gives a packed record `frame` with its content. What it was packed to is handed over.
    pub(crate) fn unpack(
        &mut self,
        id: u32,
        mut frame: Frame,
        scratch: &mut Scratch,
    ) -> Result<Owned, NotUnpacked> {
        let Some(Held::Packed(packed)) = self.held(id) else {
            return Err(NotUnpacked::Changed(frame));
        };
        packed.copy_to(&mut frame, scratch)?;
        self.put_frame(id, frame).ok_or(NotUnpacked::Corrupt)
    }

    /// Gives a packed record `frame`, which has its content. What it was packed to is handed over.
    pub(crate) fn put_frame(&mut self, id: u32, mut frame: Frame) -> Option<Owned> {
        let Some(Held::Packed(packed)) = self.held(id) else {
            return None;
        };
        frame.set_label(packed.label());
        self.exchange(id, Owned::Frame(frame)).ok()
    }

    /// A compressed record lies at `place` of its swap file from here on.
    pub(crate) fn move_out(&mut self, id: u32, place: Place) -> bool {
        self.change(id, |packed| {
            packed.move_out(place);
            Ok(())
        })
        .is_ok()
    }

    /// Keeps `bytes`, what a record has in the swap file, in its store; hands its place over.
    pub(crate) fn move_in(&mut self, id: u32, bytes: &[u8]) -> Result<Place, NoRoom> {
        self.change(id, |packed| packed.move_in(bytes))
    }

    /// Changes what a packed record is packed to.
    fn change<T>(
        &mut self,
        id: u32,
        change: impl FnOnce(&mut Packed) -> Result<T, NoRoom>,
    ) -> Result<T, NoRoom> {
        let bytes = self.0.get(id).ok_or(NoRoom::Memory)?.bytes;
        if bytes.form == Form::Frame {
            return Err(NoRoom::Memory);
        }
        // SAFETY: The record owns it; the second owner made here gives it away again below, with the
        // same payload, and nobody else has it as long as the records are borrowed.
        let mut packed = unsafe { Packed::from_payload(bytes.payload) };
        let done = change(&mut packed);
        // The same payload as before: the record can hold it.
        self.0.put(id, Owned::Packed(packed).into_bytes());
        done
    }

    /// Puts `new` in the place of what a record owned, which is handed over; `new` comes back if the
    /// record cannot hold it.
    fn exchange(&mut self, id: u32, new: Owned) -> Result<Owned, Owned> {
        let bytes = new.into_bytes();
        // SAFETY: What the record had is turned back once, for it has other bytes now; `bytes` are
        // turned back only if no record has them.
        unsafe {
            match self.0.put(id, bytes) {
                Some(old) => Ok(Owned::from_bytes(old)),
                None => Err(Owned::from_bytes(bytes)),
            }
        }
    }

    /// Gives a sharer back.
    pub(crate) fn leave(&mut self, sharer: Sharer) -> AfterDrop {
        match self.0.drop_sharer(sharer.record()) {
            // SAFETY: The record is gone, and with it the owner of these bytes.
            Ok(Dropped::Last(bytes)) => AfterDrop::Last(unsafe { Owned::from_bytes(bytes) }),
            _ => AfterDrop::Shared,
        }
    }
}

/// Allocates a page of a table in place: a page is too large for the stack of a fault.
///
/// # Safety
///
/// A `T` of all zero bytes is valid.
pub(super) unsafe fn zeroed_box<T>(flags: Flags) -> Result<KBox<T>, AllocError> {
    let page = KBox::<T>::new_uninit(flags | __GFP_ZERO)?;
    // SAFETY: The allocation is zeroed, which the caller says is a valid `T`.
    Ok(unsafe { page.assume_init() })
}

/// An empty page of the catalog.
pub(crate) fn group_page() -> Result<KBox<GroupPage>, AllocError> {
    if inject::fails(Point::Index) {
        return Err(AllocError);
    }
    // SAFETY: Arrays of integers. All-zero is the empty page, as a test in logic says.
    unsafe { zeroed_box(GFP_KERNEL) }
}

/// An empty page of records.
pub(crate) fn record_page() -> Result<KBox<RecordPage>, AllocError> {
    if inject::fails(Point::Index) {
        return Err(AllocError);
    }
    // SAFETY: As above.
    unsafe { zeroed_box(GFP_KERNEL) }
}
