// SPDX-License-Identifier: GPL-2.0

//! The 512 slot words of a region, and who owns what they stand for.
//!
//! A word in state Private owns one page reference, one in state Shared owns one sharer of a record.
//! [`Content`] is that ownership as a value, so that no frame is dropped or doubled by accident.

use super::page::{Frame, PageRef};
use crate::logic::{
    huge::HugeWord,
    slot::{Slot, State},
};
use core::sync::atomic::{AtomicU64, Ordering};
use kernel::{alloc::AllocError, prelude::*};

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
}

/// The right to change the words: lives inside the region's lock.
///
/// # Invariants
///
/// There is one key for each [`SlotWords`], made with it.
pub(crate) struct SlotKey(());

/// The words. They may be read, and their stable bit cleared, by anybody at any time.
pub(crate) struct SlotWords(KBox<[AtomicU64; SLOTS]>);

impl SlotWords {
    /// 512 empty slots and the key to them.
    pub(crate) fn new() -> Result<(SlotWords, SlotKey), AllocError> {
        // SAFETY: Atomic integers; zero is an empty slot.
        let words = unsafe { super::frames::zeroed_box()? };
        Ok((SlotWords(words), SlotKey(())))
    }

    /// The word as it is just now.
    #[inline]
    pub(crate) fn peek(&self, index: usize) -> Slot {
        Slot::from_word(self.0.get(index).map_or(0, |w| w.load(Ordering::Relaxed)))
    }

    /// Forgets that the page is unchanged, so that the next pass hashes it. True when it was set.
    pub(crate) fn clear_stable(&self, index: usize) -> bool {
        self.0.get(index).is_some_and(|w| {
            w.fetch_and(Slot::NOT_STABLE, Ordering::Relaxed) & Slot::STABLE_BIT != 0
        })
    }

    /// Changes tag, class, back-off or stable bit; a slot of another state or payload is left alone.
    #[inline]
    pub(crate) fn note(&self, _key: &mut SlotKey, index: usize, slot: Slot) {
        let Some(word) = self.0.get(index) else {
            return;
        };
        let old = Slot::from_word(word.load(Ordering::Relaxed));
        if old.owns_the_same(slot) {
            word.store(slot.word(), Ordering::Relaxed);
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
        let Some(word) = self.0.get(index) else {
            return content;
        };
        let slot = match content {
            Content::Empty => Slot::EMPTY,
            Content::Zero => Slot::ZERO,
            Content::Private(frame) => Slot::private(frame.into_pfn()),
            Content::Shared(sharer) => Slot::shared(sharer.record()),
            Content::Huge(word) => word.slot(),
        };
        let word_now = match slot.state() {
            State::Huge => slot.word(),
            _ => slot.with_backoff(backoff).word(),
        };
        let old = Slot::from_word(word.swap(word_now, Ordering::Relaxed));
        match old.state() {
            State::Empty => Content::Empty,
            State::Zero => Content::Zero,
            // SAFETY: The word owned this frame number's reference, and no longer stands anywhere.
            State::Private => Content::Private(unsafe { Frame::from_pfn(old.payload()) }),
            State::Shared => Content::Shared(Sharer::new(old.record())),
            State::Huge => Content::Huge(HugeWord::from_slot(old).unwrap_or(HugeWord::NEW)),
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
