// SPDX-License-Identifier: GPL-2.0

//! A page's stable bit and its hint.
//!
//! A page whose bytes cannot have changed is not hashed again: others find it by the hint that it left,
//! or not at all. So a page must not stay stable without its hint. The catalog is changed under a
//! lock that slot words know nothing of, and this is the order that keeps the two together:
//!
//! 1. with the region locked, the word says what the page's hint will say, and that it is stable;
//! 2. with the catalog locked, the hint goes in;
//! 3. whoever takes a hint out looks at its page's word with the catalog locked, and leaves a hint that
//!    goes with the word alone; one that has to go all the same (it made way for another) takes the stable
//!    bit along, later, which finds the bit that was set in 1.

use super::{
    catalog::{Catalog, Entry, HintOutcome, PageStore},
    huge::HugeWord,
    slot::{Class, Slot, State},
};

/// The pages that hints point to.
pub trait Pages {
    /// The word of a page; `None` if there is no such page (any more).
    fn peek(&self, page: u32) -> Option<Slot>;
}

/// The low bits of the hash that a page left its hint under, as long as it may have one.
pub fn bits_of(slot: Slot) -> Option<u16> {
    match slot.state() {
        State::Private if slot.class() == Class::Unshared => Some(slot.tag()),
        State::Huge => HugeWord::from_slot(slot)?.tag(),
        _ => None,
    }
}

/// The same by what an entry says: `None` for one of a shared record, or when the page has changed.
pub fn bits_of_entry(pages: &impl Pages, entry: Entry) -> Option<u16> {
    match entry {
        Entry::Hint(page) => bits_of(pages.peek(page)?),
        Entry::Stable(_) => None,
    }
}

/// What became of a hint.
#[must_use = "a page that lost its hint must not stay stable"]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Left {
    /// It is in the catalog.
    pub placed: bool,
    /// This page's hint is not, any more: its stable bit is to be cleared.
    pub evicted: Option<u32>,
}

/// Leaves the hint of `page`; its word says so already. `purge`: first clears the group of hints whose
/// pages have changed.
pub fn leave<S: PageStore>(
    catalog: &mut Catalog<S>,
    (hash, page): (u64, u32),
    purge: bool,
    pages: &impl Pages,
) -> Left {
    if purge {
        catalog.purge(hash, &mut |entry| bits_of_entry(pages, entry));
    }
    let (placed, evicted) = match catalog.insert_hint(hash, page) {
        HintOutcome::Placed | HintOutcome::Replaced(_) => (true, None),
        HintOutcome::Evicted(owner) => (true, Some(owner)),
        HintOutcome::Refused => (false, None),
    };
    Left { placed, evicted }
}

/// Takes back a hint whose page has other content now, none of its own, or is gone. One that may be of
/// another hash with the same tag stays: its page relies on it.
pub fn take_back<S: PageStore>(
    catalog: &mut Catalog<S>,
    (hash, page): (u64, u32),
    pages: &impl Pages,
) {
    let hint = Entry::Hint(page);
    let told = bits_of_entry(pages, hint).is_some_and(|bits| catalog.can_be_under(hash, bits));
    if !told {
        catalog.remove(hash, hint);
    }
}

/// Notes a look at a page and leaves its hint, in this order. Without a hint it is not stable. True
/// when `leave` found a place for the hint.
pub fn settle(looked: Slot, mut note: impl FnMut(Slot), leave: impl FnOnce() -> bool) -> bool {
    note(looked);
    let placed = leave();
    if !placed {
        note(looked.with_stable(false));
    }
    placed
}
