// SPDX-License-Identifier: GPL-2.0

//! A slot word where all can see it.
//!
//! Who holds the region's lock changes it. Without the lock others read it, clear its stable bit, and
//! note what they learned of a word that is still the same.

use super::{
    slot::Slot,
    sync::{AtomicU64, Ordering::Relaxed},
};

/// The word of one page. All zero bytes are one of an empty page.
#[derive(Debug)]
#[repr(transparent)]
pub struct SlotCell(AtomicU64);

impl SlotCell {
    /// A cell with `slot` in it.
    pub fn new(slot: Slot) -> Self {
        SlotCell(AtomicU64::new(slot.word()))
    }

    /// The word as it is just now.
    #[inline]
    pub fn peek(&self) -> Slot {
        Slot::from_word(self.0.load(Relaxed))
    }

    /// Clears the stable bit, so that the next pass hashes the page. True when it was set.
    #[inline]
    pub fn forget_stable(&self) -> bool {
        self.0.fetch_and(Slot::NOT_STABLE, Relaxed) & Slot::STABLE_BIT != 0
    }

    /// Changes what is known of a word that is still exactly `old`, without the lock; what it owns
    /// stays.
    pub fn try_note(&self, old: Slot, new: Slot) {
        if old.owns_the_same(new) {
            // Whoever came first knows better.
            let _ = (self.0).compare_exchange(old.word(), new.word(), Relaxed, Relaxed);
        }
    }

    /// Changes tag, class, back-off or stable bit, with the lock held; a word of another state or
    /// payload is left alone.
    ///
    /// A stable bit that is set here must come from a look that was just taken, and before the hint
    /// that goes with it ([`super::hints::settle`]): one that was cleared meanwhile would be lost.
    #[inline]
    pub fn note(&self, slot: Slot) {
        if self.peek().owns_the_same(slot) {
            self.0.store(slot.word(), Relaxed);
        }
    }

    /// Puts another word in, with the lock held, and hands over the old one with what it owned.
    #[inline]
    pub fn swap(&self, slot: Slot) -> Slot {
        Slot::from_word(self.0.swap(slot.word(), Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logic::slot::Class;

    #[test]
    fn notes_leave_what_is_owned() {
        let known = Slot::private(7)
            .looked_at(Class::Unshared, 9)
            .with_stable(true);
        let cell = SlotCell::new(Slot::private(7));
        cell.note(Slot::private(8).with_stable(true));
        assert_eq!(cell.peek(), Slot::private(7));
        cell.note(known);
        assert_eq!(cell.peek(), known);
        assert!(cell.forget_stable() && !cell.forget_stable());
        cell.try_note(known, Slot::private(7));
        assert_eq!(cell.peek(), known.with_stable(false));
        cell.try_note(known.with_stable(false), Slot::EMPTY);
        assert_eq!(cell.peek(), known.with_stable(false));
        cell.try_note(known.with_stable(false), known);
        assert_eq!(cell.swap(Slot::ZERO), known);
        assert_eq!(cell.peek(), Slot::ZERO);
    }
}
