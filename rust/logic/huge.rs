// SPDX-License-Identifier: GPL-2.0

//! The slot word of a 4 KiB part of a 2 MiB folio: what a split would gain here.
//!
//! ```text
//!  63                                             9   8      7     6    5    4    3      2    0
//! +------------------------------------------------+------+------+------+--------+------+------+
//! |                   hash (55)                    | fresh| twin | hole | class  |stable| state|
//! +------------------------------------------------+------+------+------+--------+------+------+
//!                                                      1      1      1       2       1      3
//! ```
//!
//! The hash is what the scanner saw last; class says what it made of it; stable says that the bytes
//! are those that were hashed, because every mapping is read-only. Of several equal parts one
//! is the twin of the others: it is Unique, and its region has to be split as well before the others
//! can merge. Who finds it marks it, and makes the mark fresh; two looks without anybody who does,
//! and it is gone.
//!
//! A hole is a part that was punched out: its bytes were zeroed and nothing mapped it then. It may
//! be mapped again, as a part of the whole, and written to without notice, so a hole is a hint, as
//! all of this: who acts on it looks at the bytes.

use super::slot::{Class, Slot, State, HUGE};

/// What the last look made of a part.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PartClass {
    /// Not looked at, or changed since.
    Unknown,
    /// Nothing was equal to it.
    Unique,
    /// Some other page had the same content before it.
    Duplicate,
    /// All bytes were zero.
    Zero,
}

/// A part of a 2 MiB folio.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct HugeWord(u64);

const STABLE: u64 = Slot::STABLE_BIT;
const CLASS_SHIFT: u32 = 4;
const HOLE: u64 = 1 << 6;
const TWIN: u64 = 1 << 7;
const FRESH: u64 = 1 << 8;
const HASH_SHIFT: u32 = 9;

impl HugeWord {
    /// A part of which nothing is known.
    pub const NEW: HugeWord = HugeWord(HUGE);

    /// The word of a slot in state Huge.
    pub const fn from_slot(slot: Slot) -> Option<HugeWord> {
        match slot.state() {
            State::Huge => Some(HugeWord(slot.word())),
            _ => None,
        }
    }

    /// As a slot.
    pub const fn slot(self) -> Slot {
        Slot::from_word(self.0)
    }

    /// Whether the part was punched out, and not written to by a syscall since.
    pub const fn is_hole(self) -> bool {
        self.0 & HOLE != 0
    }

    /// As a hole, of which only that is known.
    pub const fn hole() -> HugeWord {
        HugeWord(HUGE | HOLE).of_class(PartClass::Zero)
    }

    /// What the last look made of it.
    pub const fn class(self) -> PartClass {
        match (self.0 >> CLASS_SHIFT) & 3 {
            1 => PartClass::Unique,
            2 => PartClass::Duplicate,
            3 => PartClass::Zero,
            _ => PartClass::Unknown,
        }
    }

    const fn of_class(self, class: PartClass) -> HugeWord {
        let bits = match class {
            PartClass::Unknown => 0,
            PartClass::Unique => 1,
            PartClass::Duplicate => 2,
            PartClass::Zero => 3,
        };
        HugeWord((self.0 & !(3 << CLASS_SHIFT)) | (bits << CLASS_SHIFT))
    }

    /// The low 16 bits of the hash, where one is known.
    pub const fn tag(self) -> Option<u16> {
        match self.class() {
            PartClass::Unknown | PartClass::Zero => None,
            PartClass::Unique | PartClass::Duplicate => Some((self.0 >> HASH_SHIFT) as u16),
        }
    }

    /// The bits of a hash that a word has room for.
    pub const HASH_MASK: u64 = u64::MAX >> HASH_SHIFT;

    /// What is known of the hash: its low 55 bits.
    pub const fn hash(self) -> Option<u64> {
        match self.tag() {
            Some(_) => Some(self.0 >> HASH_SHIFT),
            None => None,
        }
    }

    /// Whether other pages are known to have its content.
    pub const fn has_others(self) -> bool {
        self.is_twin() || matches!(self.class(), PartClass::Duplicate)
    }

    /// Whether the last look saw this hash (of which 55 bits count).
    pub const fn has_hash(self, hash: u64) -> bool {
        self.tag().is_some() && self.0 >> HASH_SHIFT == hash << HASH_SHIFT >> HASH_SHIFT
    }

    /// Whether a look that sees `hash` finds another content than the one before.
    pub const fn changed_to(self, hash: u64) -> bool {
        self.tag().is_some() && !self.has_hash(hash)
    }

    /// With the outcome of a look. A hole is one as long as it is zero.
    pub const fn looked_at(self, class: PartClass, hash: u64) -> HugeWord {
        let kept = match class {
            PartClass::Zero => HugeWord(HUGE | (self.0 & HOLE)),
            _ if self.has_hash(hash) && self.0 & FRESH != 0 => HugeWord(HUGE | TWIN),
            _ => HugeWord(HUGE),
        };
        HugeWord(kept.0 | (hash << HASH_SHIFT)).of_class(class)
    }

    /// Whether the bytes cannot have changed since they were hashed.
    pub const fn is_stable(self) -> bool {
        self.0 & STABLE != 0
    }

    /// With the stable bit set or cleared.
    pub const fn with_stable(self, stable: bool) -> HugeWord {
        HugeWord((self.0 & !STABLE) | if stable { STABLE } else { 0 })
    }

    /// As the twin of a part that was just looked at.
    pub const fn with_twin(self) -> HugeWord {
        HugeWord(self.0 | TWIN | FRESH)
    }

    /// Whether another part waits for this one's split.
    pub const fn is_twin(self) -> bool {
        self.0 & TWIN != 0
    }

    /// Whether a split gives this page back: it is zero, or there is another one.
    pub const fn gains(self) -> bool {
        matches!(self.class(), PartClass::Duplicate | PartClass::Zero)
    }

    /// What a look saw is void; a hole stays one.
    pub const fn forgotten(self) -> HugeWord {
        if self.is_hole() {
            HugeWord::hole()
        } else {
            HugeWord::NEW
        }
    }
}

/// What is known of a folio as a whole.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Gain {
    /// Pages that a split gives back.
    pub pages: u16,
    /// Pages for whose sake others give theirs back.
    pub twins: u16,
    /// Pages that are zero.
    pub zeroes: u16,
    /// Holes.
    pub holes: u16,
}

impl Gain {
    /// Adds up the parts of a folio.
    pub fn of(words: impl Iterator<Item = HugeWord>) -> Gain {
        words.fold(Gain::default(), |sum, word| Gain {
            pages: sum.pages.saturating_add(u16::from(word.gains())),
            twins: sum.twins.saturating_add(u16::from(word.is_twin())),
            zeroes: sum
                .zeroes
                .saturating_add(u16::from(matches!(word.class(), PartClass::Zero))),
            holes: sum.holes.saturating_add(u16::from(word.is_hole())),
        })
    }

    /// The place among others: the higher, the sooner it is split. 0: nothing is gained.
    pub fn rank(self) -> u16 {
        self.pages.saturating_add(self.twins)
    }
}

/// Why a region of small pages is not worth to be made a folio.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Refusal {
    /// A page is shared: a copy would take memory.
    Shared,
    /// A page is a hole, or was never written.
    Holes,
    /// A page is compressed, so it is cold.
    Compressed,
    /// Too many pages of zeroes, which take no memory now.
    Zeroes,
    /// The scanner has not looked at all of it: a page may have an equal.
    Unscanned,
    /// Too few pages are mapped: nobody uses it.
    Cold,
}

impl Refusal {
    /// How many there are.
    pub const COUNT: usize = 6;
}

/// What a region of small pages holds.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Worth {
    pages: usize,
    private: usize,
    zeroes: usize,
    shared: usize,
    packed: usize,
    unknown: usize,
}

impl Worth {
    /// One in so many pages may be zero.
    const ZERO_SHARE: usize = 8;

    /// Adds up the slots of a region. `scanned`: the scanner looks at them, in time.
    pub fn of(slots: impl Iterator<Item = Slot>, scanned: bool) -> Worth {
        let mut worth = Worth::default();
        for slot in slots {
            worth.pages = worth.pages.saturating_add(1);
            let counter = match slot.state() {
                State::Private => {
                    let unknown = scanned && slot.class() == Class::Unchecked;
                    worth.unknown = worth.unknown.saturating_add(usize::from(unknown));
                    &mut worth.private
                }
                State::Zero => &mut worth.zeroes,
                State::Shared => &mut worth.shared,
                State::Compressed | State::Filled | State::Swapped => &mut worth.packed,
                State::Empty | State::Huge => continue,
            };
            *counter = counter.saturating_add(1);
        }
        worth
    }

    /// Whether it should become a folio, as far as slots tell.
    ///
    /// # Errors
    ///
    /// The first reason why not.
    pub fn verdict(self) -> Result<(), Refusal> {
        let owned = [self.private, self.zeroes, self.packed];
        let holes = owned.iter().sum::<usize>() != self.pages;
        match self {
            Worth { shared: 1.., .. } => Err(Refusal::Shared),
            _ if holes => Err(Refusal::Holes),
            Worth { packed: 1.., .. } => Err(Refusal::Compressed),
            _ if self.zeroes > self.pages / Self::ZERO_SHARE => Err(Refusal::Zeroes),
            Worth { unknown: 1.., .. } => Err(Refusal::Unscanned),
            _ => Ok(()),
        }
    }

    /// The same, when `mapped` of its pages are mapped.
    ///
    /// # Errors
    ///
    /// The first reason why not.
    pub fn and_mapped(self, mapped: usize) -> Result<(), Refusal> {
        self.verdict()?;
        if mapped < self.pages / 2 {
            return Err(Refusal::Cold);
        }
        Ok(())
    }
}

/// When write-protecting a folio pays: a write costs a fault for all of its 512 pages, and saves 512
/// hashes if none comes. A folio that was written to between two passes is left alone for 1, 3, 7 ..
/// passes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Calm {
    /// Passes to let go by.
    skip: u8,
    /// How often in a row it was in vain, up to a point.
    level: u8,
    /// Whether it was protected last.
    tried: bool,
}

impl Calm {
    /// A folio that was not hashed yet: the first pass protects nothing.
    pub const NEW: Calm = Calm {
        skip: 1,
        level: 0,
        tried: false,
    };

    const LEVEL_MAX: u8 = 5;

    /// A pass comes by; `holds`: the folio is still protected since the last time. True if it is to
    /// be protected now.
    pub fn pass(&mut self, holds: bool) -> bool {
        if holds {
            self.level = 0;
            return true;
        }
        if self.tried {
            self.tried = false;
            self.level = self.level.saturating_add(1).min(Self::LEVEL_MAX);
            self.skip = (1 << self.level) - 1;
        }
        if self.skip > 0 {
            self.skip = self.skip.saturating_sub(1);
            return false;
        }
        self.tried = true;
        true
    }
}

/// The best of many, the best first.
pub struct Best<T, const N: usize> {
    places: [Option<(u16, T)>; N],
}

impl<T, const N: usize> Default for Best<T, N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T, const N: usize> Best<T, N> {
    /// None yet.
    pub fn new() -> Self {
        Best {
            places: core::array::from_fn(|_| None),
        }
    }

    /// Offers one; whatever finds no place is dropped.
    pub fn offer(&mut self, rank: u16, value: T) {
        let mut held = Some((rank, value));
        for place in &mut self.places {
            let better = match (&held, &*place) {
                (Some((rank, _)), Some((other, _))) => rank > other,
                (Some(_), None) => true,
                (None, _) => return,
            };
            if better {
                core::mem::swap(place, &mut held);
            }
        }
    }

    /// Those that found a place, the best first.
    pub fn in_order(self) -> impl Iterator<Item = T> {
        self.places.into_iter().flatten().map(|(_, value)| value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    #[test]
    fn a_word_is_huge_and_a_hole_only_when_it_says_so() {
        assert_eq!(HugeWord::from_slot(Slot::private(5)), None);
        assert_eq!(HugeWord::from_slot(Slot::EMPTY), None);
        let word = HugeWord::from_slot(HugeWord::NEW.slot());
        assert_eq!(word.map(HugeWord::is_hole), Some(false));
        assert_eq!(word.map(HugeWord::gains), Some(false));
        let hole = HugeWord::from_slot(HugeWord::hole().slot());
        assert_eq!(hole.map(HugeWord::is_hole), Some(true));
        assert_eq!(hole.map(HugeWord::gains), Some(true));
    }

    #[test]
    fn a_hole_is_one_until_it_is_seen_to_hold_data() {
        let hole = HugeWord::hole();
        assert!(hole.looked_at(PartClass::Zero, 3).is_hole());
        assert!(!hole.looked_at(PartClass::Unique, 3).is_hole());
        assert!(!hole.looked_at(PartClass::Duplicate, 3).is_hole());
        assert_eq!(hole.forgotten(), hole);
    }

    #[test]
    fn a_twin_is_one_for_two_looks_unless_it_is_found_again_or_changes() {
        let word = HugeWord::NEW.looked_at(PartClass::Unique, 77).with_twin();
        let once = word.looked_at(PartClass::Unique, 77);
        assert!(once.is_twin());
        assert!(!once.looked_at(PartClass::Unique, 77).is_twin());
        assert!(once.with_twin().looked_at(PartClass::Unique, 77).is_twin());
        assert!(!word.looked_at(PartClass::Unique, 78).is_twin());
        assert!(!word.looked_at(PartClass::Zero, 77).is_twin());
    }

    #[test]
    fn protection_in_vain_is_tried_less_and_less_often() {
        let mut calm = Calm::NEW;
        let mut tries = Vec::new();
        for pass in 0..100 {
            if calm.pass(false) {
                tries.push(pass);
            }
        }
        assert_eq!(tries[..6], [1, 3, 7, 15, 31, 63]);
        assert_eq!(tries[6], 95);
        let mut calm = Calm::NEW;
        assert!(!calm.pass(false) && calm.pass(false));
        assert!((0..10).all(|_| calm.pass(true)));
        // After that one write costs no more than two passes.
        assert!(!calm.pass(false) && calm.pass(false));
    }

    #[test]
    fn what_is_worth_to_be_a_folio() {
        let known = Slot::private(7).looked_at(Class::Unshared, 1);
        let changing = Slot::private(7).looked_at(Class::Volatile, 1);
        let verdict = |count: usize, other: Slot, scanned| {
            let slots = (0..512).map(|i| if i < count { other } else { known });
            Worth::of(slots, scanned).verdict()
        };
        assert_eq!(verdict(0, known, true), Ok(()));
        assert_eq!(verdict(512, changing, true), Ok(()));
        assert_eq!(verdict(64, Slot::ZERO, true), Ok(()));
        assert_eq!(verdict(65, Slot::ZERO, true), Err(Refusal::Zeroes));
        assert_eq!(verdict(1, Slot::EMPTY, true), Err(Refusal::Holes));
        assert_eq!(verdict(1, Slot::shared(3), true), Err(Refusal::Shared));
        assert_eq!(verdict(1, Slot::filled(3), true), Err(Refusal::Compressed));
        assert_eq!(
            verdict(1, Slot::compressed(8, 9), true),
            Err(Refusal::Compressed)
        );
        assert_eq!(verdict(1, Slot::private(8), true), Err(Refusal::Unscanned));
        assert_eq!(verdict(512, Slot::private(8), false), Ok(()));
        assert_eq!(
            verdict(512, HugeWord::NEW.slot(), false),
            Err(Refusal::Holes)
        );
        let worth = Worth::of([known; 512].into_iter(), true);
        assert_eq!(worth.and_mapped(255), Err(Refusal::Cold));
        assert_eq!(worth.and_mapped(256), Ok(()));
        assert_eq!(Refusal::Cold as usize + 1, Refusal::COUNT);
    }

    proptest! {
        #[test]
        fn fields_do_not_touch_each_other(hash: u64, other: u64, duplicate: bool) {
            let class = if duplicate { PartClass::Duplicate } else { PartClass::Unique };
            let word = HugeWord::NEW.looked_at(class, hash);
            prop_assert_eq!(HugeWord::from_slot(word.slot()), Some(word));
            prop_assert_eq!(word.class(), class);
            prop_assert_eq!(word.tag(), Some(hash as u16));
            prop_assert!(word.has_hash(hash) && !word.changed_to(hash));
            prop_assert_eq!(word.has_hash(other), hash << 9 == other << 9);
            prop_assert_eq!(word.hash(), Some(hash & HugeWord::HASH_MASK));
            prop_assert_eq!(word.gains(), duplicate);
            prop_assert!(!word.is_hole() && !word.is_twin());
            let twin = word.with_twin();
            prop_assert!(twin.is_twin() && twin.has_hash(hash));
            prop_assert_eq!(twin.class(), class);
            let stable = twin.with_stable(true);
            prop_assert!(stable.is_stable() && stable.is_twin() && stable.has_hash(hash));
            prop_assert_eq!(stable.with_stable(false), twin);
            prop_assert_eq!(stable.slot().word() & Slot::NOT_STABLE, twin.slot().word());
            prop_assert!(!stable.looked_at(class, hash).is_stable());
            prop_assert_eq!(word.forgotten(), HugeWord::NEW);
            prop_assert!(!HugeWord::NEW.changed_to(hash));
        }

        #[test]
        fn the_best_are_kept_in_order(ranks in prop::collection::vec(0u16..600, 0..100)) {
            let mut best = Best::<u16, 8>::new();
            for &rank in &ranks {
                best.offer(rank, rank);
            }
            let mut expected = ranks.clone();
            expected.sort_unstable_by(|a, b| b.cmp(a));
            expected.truncate(8);
            prop_assert_eq!(best.in_order().collect::<Vec<_>>(), expected);
        }

        #[test]
        fn a_gain_adds_up(kinds in prop::collection::vec(0u8..5, 0..512)) {
            let word = |kind| match kind {
                0 => HugeWord::NEW,
                1 => HugeWord::hole(),
                2 => HugeWord::NEW.looked_at(PartClass::Duplicate, 5),
                3 => HugeWord::NEW.looked_at(PartClass::Unique, 6).with_twin(),
                _ => HugeWord::NEW.looked_at(PartClass::Zero, 7),
            };
            let count = |kind| kinds.iter().filter(|&&k| k == kind).count() as u16;
            let gain = Gain::of(kinds.iter().map(|&kind| word(kind)));
            prop_assert_eq!(gain.pages, count(1) + count(2) + count(4));
            prop_assert_eq!(gain.zeroes, count(1) + count(4));
            prop_assert_eq!((gain.twins, gain.holes), (count(3), count(1)));
            prop_assert_eq!(gain.rank(), gain.pages + gain.twins);
        }
    }
}
