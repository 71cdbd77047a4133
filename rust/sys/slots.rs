// SPDX-License-Identifier: GPL-2.0

//! The 512 slot words of a region, and who owns what they stand for.
//!
//! A word in state Private owns one page reference, one in state Shared owns one sharer of a record,
//! one in state Compressed owns one object in the VM's store, which never leaves this file.
//! [`Content`] is that ownership as a value, so that no frame is dropped or doubled by accident.

use super::{
    inject::{self, Point},
    page::{Frame, PageRef},
    protect,
    zs::{Corrupt, NoRoom, Object, Scratch, Store},
};
use crate::logic::{
    cell::SlotCell,
    clusters::Place,
    huge::HugeWord,
    slot::{Slot, State},
};
use kernel::{alloc::AllocError, prelude::*, sync::Arc};

/// Pages in a region of 2 MiB.
pub(crate) const SLOTS: usize = 512;

/// One sharer of a shared record; given out by the shared index, and to be given back to it.
#[must_use = "a sharer that is not given back keeps its frame for ever"]
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Sharer(u32);

impl Sharer {
    /// Only the shared index makes sharers.
    pub(super) fn new(record: u32) -> Sharer {
        Sharer(record)
    }

    /// The record's id.
    pub(crate) fn record(&self) -> u32 {
        self.0
    }
}

/// What a slot owns.
pub(crate) enum Content {
    /// Nothing.
    Empty,
    /// Nothing; the page is known to be zero.
    Zero,
    /// A frame.
    Private(Frame),
    /// A share in a frame.
    Shared(Sharer),
    /// Nothing: the region's 2 MiB folio is owned by the region.
    Huge(HugeWord),
    /// Nothing; the page is these four bytes over and over.
    Filled(u32),
    /// A place in the VM's swap file, to be given back to that.
    Swapped(Place),
}

/// The right to change the words: lives inside the region's lock.
///
/// # Invariants
///
/// There is one key for each [`SlotWords`], made with it.
pub(crate) struct SlotKey(());

/// The words. They may be read, and their stable bit cleared, by anybody at any time.
pub(crate) struct SlotWords {
    words: KBox<[SlotCell; SLOTS]>,
    /// Where the Compressed ones are.
    store: Arc<Store>,
}

impl SlotWords {
    /// 512 empty slots, whose compressed pages go to `store`, and the key to them.
    pub(crate) fn new(store: Arc<Store>) -> Result<(SlotWords, SlotKey)> {
        if inject::fails(Point::Slots) {
            return Err(ENOMEM);
        }
        // Who touches memory pays for what is noted of it: a sparse file would take any amount.
        // SAFETY: Each cell is an atomic integer; zero is an empty slot.
        let words = unsafe { super::frames::zeroed_box(GFP_KERNEL_ACCOUNT)? };
        Ok((SlotWords { words, store }, SlotKey(())))
    }

    /// The word as it is just now.
    #[inline]
    pub(crate) fn peek(&self, index: usize) -> Slot {
        self.words.get(index).map_or(Slot::EMPTY, SlotCell::peek)
    }

    /// Forgets that the page is unchanged, so that the next pass hashes it. True when it was set.
    pub(crate) fn clear_stable(&self, index: usize) -> bool {
        if !protect::armed(protect::Protection::NoteChange) {
            return false;
        }
        self.words.get(index).is_some_and(SlotCell::forget_stable)
    }

    /// [`SlotCell::try_note`]
    pub(crate) fn try_note(&self, index: usize, old: Slot, new: Slot) {
        if let Some(word) = self.words.get(index) {
            word.try_note(old, new);
        }
    }

    /// [`SlotCell::note`]
    #[inline]
    pub(crate) fn note(&self, _key: &mut SlotKey, index: usize, slot: Slot) {
        if let Some(word) = self.words.get(index) {
            word.note(slot);
        }
    }

    /// Puts `content` into the slot, with its back-off, and hands over what it owned before.
    pub(crate) fn replace(
        &self,
        _key: &mut SlotKey,
        index: usize,
        content: Content,
        backoff: u8,
    ) -> Content {
        let Some(word) = self.words.get(index) else {
            return content;
        };
        let slot = match content {
            Content::Empty => Slot::EMPTY,
            Content::Zero => Slot::ZERO,
            Content::Private(frame) => Slot::private(frame.into_pfn()),
            Content::Shared(sharer) => Slot::shared(sharer.record()),
            Content::Filled(pattern) => Slot::filled(pattern),
            Content::Swapped(place) => Slot::swapped(place),
            Content::Huge(word) => word.slot(),
        };
        let word_now = match slot.state() {
            State::Huge => slot,
            _ => slot.with_backoff(backoff),
        };
        let old = word.swap(word_now);
        match old.state() {
            State::Empty => Content::Empty,
            State::Zero => Content::Zero,
            // SAFETY: The word owned this frame number's reference, and no longer stands anywhere.
            State::Private => Content::Private(unsafe { Frame::from_pfn(old.payload()) }),
            State::Shared => Content::Shared(Sharer::new(old.record())),
            State::Huge => Content::Huge(HugeWord::from_slot(old).unwrap_or(HugeWord::NEW)),
            State::Filled => Content::Filled(old.pattern()),
            State::Swapped => Content::Swapped(old.place()),
            State::Compressed => {
                // SAFETY: The word owned the object, and no longer stands anywhere.
                self.store.free(unsafe { Object::of_slot(old) });
                Content::Empty
            }
        }
    }

    /// Keeps `bytes` in place of a Private slot's frame, which is handed over, if the store is not
    /// larger than `max_pages` then.
    pub(crate) fn pack(
        &self,
        _key: &mut SlotKey,
        index: usize,
        bytes: &[u8],
        node: i32,
        max_pages: u64,
    ) -> Result<Frame, NoRoom> {
        let word = self.words.get(index).ok_or(NoRoom::Memory)?;
        let slot = word.peek();
        if slot.state() != State::Private {
            return Err(NoRoom::Memory);
        }
        let object = self.store.put(bytes, node, max_pages)?;
        word.swap(object.into_slot());
        // SAFETY: The word owned this frame number's reference, and no longer stands anywhere.
        Ok(unsafe { Frame::from_pfn(slot.payload()) })
    }

    /// Copies the object of a Compressed slot; `None` for any other.
    pub(crate) fn packed<'a>(
        &self,
        _key: &SlotKey,
        index: usize,
        scratch: &'a mut Scratch,
    ) -> Option<&'a [u8]> {
        let slot = self.peek(index);
        if slot.state() != State::Compressed {
            return None;
        }
        // SAFETY: As in `unpack`.
        self.store.read(&unsafe { Object::of_slot(slot) }, scratch)
    }

    /// Keeps `bytes` in the store in place of a Swapped slot's place, which is handed over.
    pub(crate) fn put_back(
        &self,
        _key: &mut SlotKey,
        index: usize,
        bytes: &[u8],
        node: i32,
    ) -> Result<Place, NoRoom> {
        let word = self.words.get(index).ok_or(NoRoom::Memory)?;
        let slot = word.peek();
        if slot.state() != State::Swapped {
            return Err(NoRoom::Memory);
        }
        let object = self.store.put(bytes, node, u64::MAX)?;
        word.swap(object.into_slot());
        Ok(slot.place())
    }

    /// Fills `to` with what a Compressed or Filled slot stands for; the slot stays as it is.
    pub(crate) fn unpack(
        &self,
        _key: &SlotKey,
        index: usize,
        scratch: &mut Scratch,
        to: &mut Frame,
    ) -> Result<(), Corrupt> {
        let slot = self.peek(index);
        match slot.state() {
            State::Compressed => {
                // SAFETY: The slot owns the object, which only `replace` frees; that needs the key
                // mutably.
                let object = unsafe { Object::of_slot(slot) };
                self.store.get(&object, scratch, to)
            }
            State::Filled => {
                to.fill(slot.pattern());
                Ok(())
            }
            _ => Err(Corrupt),
        }
    }

    /// The frame of a Private slot, for as long as the key is borrowed.
    #[inline]
    pub(crate) fn page<'a>(&'a self, _key: &'a SlotKey, index: usize) -> Option<PageRef<'a>> {
        let slot = self.peek(index);
        if slot.state() != State::Private {
            return None;
        }
        // SAFETY: The slot owns a reference, which only `replace` gives away; that needs the key
        // mutably, and it is borrowed for 'a.
        Some(unsafe { PageRef::from_pfn(slot.payload()) })
    }
}

impl Drop for SlotWords {
    fn drop(&mut self) {
        let mut key = SlotKey(());
        for index in 0..SLOTS {
            // Sharers were given back when the file was evicted; a frame is put here.
            drop(self.replace(&mut key, index, Content::Empty, 0));
        }
    }
}

/// One value for each slot of a region, each to be taken once.
pub(crate) struct SlotsOf<T>(KVec<Option<T>>);

impl<T> SlotsOf<T> {
    /// No values.
    pub(crate) fn new() -> Result<SlotsOf<T>, AllocError> {
        let mut values = KVec::with_capacity(SLOTS, GFP_KERNEL)?;
        for _ in 0..SLOTS {
            values.push(None, GFP_KERNEL)?;
        }
        Ok(SlotsOf(values))
    }

    /// Sets a value.
    pub(crate) fn put(&mut self, index: usize, value: T) {
        if let Some(place) = self.0.get_mut(index) {
            *place = Some(value);
        }
    }

    /// Takes a value out.
    pub(crate) fn take(&mut self, index: usize) -> Option<T> {
        self.0.get_mut(index)?.take()
    }

    /// Drops all values.
    pub(crate) fn clear(&mut self) {
        self.0.iter_mut().for_each(|value| *value = None);
    }
}
