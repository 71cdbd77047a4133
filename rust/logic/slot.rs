// SPDX-License-Identifier: GPL-2.0

//! The slot word: all that is known about one 4 KiB page of a guest, in eight bytes.
//!
//! ```text
//!  63                                    24 23            8 7   6 5    4 3      2    0
//! +----------------------------------------+---------------+-----+------+--------+------+
//! | payload: frame number or record id (40)| tag (16)      | back| class| stable | state|
//! +----------------------------------------+---------------+-----+------+--------+------+
//!                                                            2      2      1        3
//! ```
//!
//! | state   | payload           | bytes owned by                      | leaves by           |
//! |---------|-------------------|-------------------------------------|---------------------|
//! | Empty   | 1: zero mapped    | nobody                              | write fault, write  |
//! | Zero    | 1: zero mapped    | the module's zero frames            | write fault, punch  |
//! | Private | frame number      | this slot, one reference            | merge, punch        |
//! | Shared  | shared record id  | the record, one sharer of it        | write fault, punch  |
//! | Huge    | see `logic::huge` | the region's 2 MiB folio            | split, punch        |
//! | Filled  | four bytes        | nobody: they fill the page          | any fault, punch    |
//! | Swapped | a place           | the swap file, or a buffer before   | any fault, punch    |
//!
//! A Compressed page needs more room: its bytes are an object in the VM's pool.
//!
//! ```text
//!  63        52 51                                        4 3      2    0
//! +------------+-------------------------------------------+--------+------+
//! | length (12)| physical address of the object's handle (48, in 8 bytes) | 0 | state|
//! +------------+-------------------------------------------+--------+------+
//! ```
//!
//! The tag is the low 16 bits of the content hash that the last scan saw; class says what that scan
//! made of the page; stable says that the content cannot have changed since, because every mapping
//! of it is write-protected; back-off is the number of passes (as a power of two) between two tries.

use super::clusters::Place;

/// Bits of the payload.
pub const PAYLOAD_BITS: u32 = 40;
/// The largest payload: a frame number of a machine with 52 physical address bits.
pub const PAYLOAD_MAX: u64 = (1 << PAYLOAD_BITS) - 1;
/// Highest back-off: a try every 8th pass.
pub const BACKOFF_MAX: u8 = 3;

const STATE_MASK: u64 = 0b111;
/// The state of a word of a 2 MiB folio.
pub(super) const HUGE: u64 = 4;
const COMPRESSED: u64 = 5;
const FILLED: u64 = 6;
const SWAPPED: u64 = 7;
const ADDRESS_SHIFT: u32 = 4;
const ADDRESS_BITS: u32 = 48;
const LENGTH_SHIFT: u32 = ADDRESS_SHIFT + ADDRESS_BITS;
/// The stable bit alone: it may be cleared without the region lock (see [`Slot::STABLE_BIT`]).
const STABLE: u64 = 1 << 3;
const CLASS_SHIFT: u32 = 4;
const BACKOFF_SHIFT: u32 = 6;
const TAG_SHIFT: u32 = 8;
const PAYLOAD_SHIFT: u32 = 24;

const _: () = assert!(PAYLOAD_SHIFT + PAYLOAD_BITS == u64::BITS);
const _: () = assert!(LENGTH_SHIFT + 12 == u64::BITS && ADDRESS_SHIFT == STABLE.ilog2() + 1);
const _: () = assert!(TAG_SHIFT + u16::BITS == PAYLOAD_SHIFT);

/// What the last scan made of a Private page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Class {
    /// Not looked at since it became Private.
    Unchecked,
    /// Its content had no equal.
    Unshared,
    /// Its content changed between the last two looks.
    Volatile,
}

/// The state of a page without its payload.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum State {
    /// Never written, or given back.
    Empty,
    /// Known to be all zero; holds no memory.
    Zero,
    /// A frame of its own.
    Private,
    /// One sharer of a shared record.
    Shared,
    /// A part of the region's 2 MiB folio; the rest of the word is a [`super::huge::HugeWord`].
    Huge,
    /// An object in the VM's pool.
    Compressed,
    /// The same four bytes over and over; holds no memory.
    Filled,
    /// An object in the VM's swap file.
    Swapped,
}

/// A slot word, taken apart by accessors.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Slot(u64);

impl Slot {
    /// A page that was never written.
    pub const EMPTY: Slot = Slot(0);
    /// A page of zeroes.
    pub const ZERO: Slot = Slot(1);
    /// The mask that clears the stable bit. Clearing it at any time is harmless: the page is hashed
    /// once more.
    pub const NOT_STABLE: u64 = !STABLE;
    /// The stable bit's mask.
    pub const STABLE_BIT: u64 = STABLE;

    /// A page with a frame of its own. Payloads above [`PAYLOAD_MAX`] do not exist on x86_64.
    #[inline]
    pub const fn private(pfn: u64) -> Slot {
        Slot(2 | ((pfn & PAYLOAD_MAX) << PAYLOAD_SHIFT))
    }

    /// One sharer of record `id`.
    #[inline]
    pub const fn shared(id: u32) -> Slot {
        Slot(3 | ((id as u64) << PAYLOAD_SHIFT))
    }

    /// The longest compressed page.
    pub const LENGTH_MAX: u16 = (1 << 12) - 1;

    /// Whether a Compressed word can name an object whose handle lies at this physical address: up
    /// to 2 PiB, in steps of 8 bytes.
    #[inline]
    pub const fn can_hold(address: u64, len: u16) -> bool {
        address % 8 == 0 && address >> (ADDRESS_BITS + 3) == 0 && len <= Self::LENGTH_MAX
    }

    /// A page that was compressed to `len` bytes, for what [`Slot::can_hold`].
    #[inline]
    pub const fn compressed(address: u64, len: u16) -> Slot {
        let length = (len & Self::LENGTH_MAX) as u64;
        let place = (address >> 3) & ((1 << ADDRESS_BITS) - 1);
        Slot(COMPRESSED | (place << ADDRESS_SHIFT) | (length << LENGTH_SHIFT))
    }

    /// Physical address of a Compressed page's handle.
    #[inline]
    pub const fn object_address(self) -> u64 {
        ((self.0 >> ADDRESS_SHIFT) & ((1 << ADDRESS_BITS) - 1)) << 3
    }

    /// Bytes that a Compressed page takes.
    #[inline]
    pub const fn object_len(self) -> u16 {
        (self.0 >> LENGTH_SHIFT) as u16
    }

    /// A page that `pattern` fills.
    #[inline]
    pub const fn filled(pattern: u32) -> Slot {
        Slot(FILLED | ((pattern as u64) << PAYLOAD_SHIFT))
    }

    /// What fills a Filled page.
    #[inline]
    pub const fn pattern(self) -> u32 {
        self.payload() as u32
    }

    /// A page that lies in the swap file.
    #[inline]
    pub const fn swapped(place: Place) -> Slot {
        Slot(SWAPPED | (place.payload() << PAYLOAD_SHIFT))
    }

    /// Where a Swapped page lies.
    #[inline]
    pub const fn place(self) -> Place {
        Place::from_payload(self.payload())
    }

    /// From the word as it is stored.
    #[inline]
    pub const fn from_word(word: u64) -> Slot {
        Slot(word)
    }

    /// The word to store.
    #[inline]
    pub const fn word(self) -> u64 {
        self.0
    }

    /// The state.
    #[inline]
    pub const fn state(self) -> State {
        match self.0 & STATE_MASK {
            1 => State::Zero,
            2 => State::Private,
            3 => State::Shared,
            HUGE => State::Huge,
            COMPRESSED => State::Compressed,
            FILLED => State::Filled,
            SWAPPED => State::Swapped,
            _ => State::Empty,
        }
    }

    /// Frame number (Private) or record id (Shared).
    #[inline]
    pub const fn payload(self) -> u64 {
        self.0 >> PAYLOAD_SHIFT
    }

    /// Record id of a Shared slot.
    #[inline]
    pub const fn record(self) -> u32 {
        self.payload() as u32
    }

    /// What the last scan made of the page.
    #[inline]
    pub const fn class(self) -> Class {
        match (self.0 >> CLASS_SHIFT) & 3 {
            1 => Class::Unshared,
            2 => Class::Volatile,
            _ => Class::Unchecked,
        }
    }

    /// Whether a zero frame may be mapped at this Empty or Zero page.
    #[inline]
    pub const fn is_zero_mapped(self) -> bool {
        matches!(self.state(), State::Empty | State::Zero) && self.payload() != 0
    }

    /// An Empty or Zero page at which a zero frame is mapped; any other slot stays as it is.
    #[inline]
    pub const fn with_zero_mapped(self) -> Slot {
        match self.state() {
            State::Empty | State::Zero => Slot(self.0 | (1 << PAYLOAD_SHIFT)),
            _ => self,
        }
    }

    /// Whether both are of one state and own the same frame or record, if any.
    #[inline]
    pub const fn owns_the_same(self, other: Slot) -> bool {
        let bits = match self.state() {
            State::Empty | State::Zero | State::Huge => STATE_MASK,
            State::Compressed => !STABLE,
            _ => STATE_MASK | (PAYLOAD_MAX << PAYLOAD_SHIFT),
        };
        (self.0 ^ other.0) & bits == 0
    }

    /// Whether the content cannot have changed since it was hashed.
    #[inline]
    pub const fn is_stable(self) -> bool {
        self.0 & STABLE != 0
    }

    /// Low 16 bits of the hash that the last scan saw; meaningless while Unchecked.
    #[inline]
    pub const fn tag(self) -> u16 {
        (self.0 >> TAG_SHIFT) as u16
    }

    /// Back-off as a power of two of passes, 0 = every pass.
    #[inline]
    pub const fn backoff(self) -> u8 {
        ((self.0 >> BACKOFF_SHIFT) & 3) as u8
    }

    /// With the outcome of a look at the page.
    #[inline]
    pub const fn looked_at(self, class: Class, hash: u64) -> Slot {
        let class = match class {
            Class::Unchecked => 0,
            Class::Unshared => 1,
            Class::Volatile => 2,
        };
        let cleared = self.0 & !((3 << CLASS_SHIFT) | (0xffff << TAG_SHIFT) | STABLE);
        Slot(cleared | (class << CLASS_SHIFT) | ((hash & 0xffff) << TAG_SHIFT))
    }

    /// With the stable bit set or cleared.
    #[inline]
    pub const fn with_stable(self, stable: bool) -> Slot {
        if stable {
            Slot(self.0 | STABLE)
        } else {
            Slot(self.0 & !STABLE)
        }
    }

    /// With the back-off set (capped at [`BACKOFF_MAX`]).
    #[inline]
    pub const fn with_backoff(self, backoff: u8) -> Slot {
        let backoff = if backoff > BACKOFF_MAX {
            BACKOFF_MAX
        } else {
            backoff
        };
        Slot((self.0 & !(3 << BACKOFF_SHIFT)) | ((backoff as u64) << BACKOFF_SHIFT))
    }

    /// Whether a page with this back-off is passed over in pass number `pass`.
    ///
    /// `spread` (the page's place) keeps the pages of one back-off from all coming in one pass.
    #[inline]
    pub const fn skipped_in(self, pass: u64, spread: u64) -> bool {
        let mask = (1u64 << self.backoff()) - 1;
        pass.wrapping_add(spread) & mask != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_do_not_touch_each_other() {
        let slot = Slot::private(PAYLOAD_MAX)
            .looked_at(Class::Volatile, 0xdead_beef)
            .with_backoff(2)
            .with_stable(true);
        assert_eq!(slot.state(), State::Private);
        assert_eq!(slot.payload(), PAYLOAD_MAX);
        assert_eq!(slot.class(), Class::Volatile);
        assert_eq!(slot.tag(), 0xbeef);
        assert_eq!(slot.backoff(), 2);
        assert!(slot.is_stable());
        let word = slot.word() & Slot::NOT_STABLE;
        assert!(!Slot::from_word(word).is_stable());
        assert_eq!(Slot::from_word(word).with_stable(true), slot);
    }

    #[test]
    fn a_look_clears_stable_and_keeps_the_rest() {
        let slot = Slot::private(77).with_backoff(9).with_stable(true);
        let looked = slot.looked_at(Class::Unshared, 5);
        assert!(!looked.is_stable());
        assert_eq!((looked.backoff(), looked.payload()), (BACKOFF_MAX, 77));
        assert_eq!(
            looked.looked_at(Class::Unchecked, 0).class(),
            Class::Unchecked
        );
    }

    #[test]
    fn states_are_told_apart() {
        assert_eq!(Slot::EMPTY.state(), State::Empty);
        assert_eq!(Slot::ZERO.state(), State::Zero);
        assert_eq!(Slot::shared(u32::MAX).record(), u32::MAX);
        assert_eq!(Slot::shared(0).state(), State::Shared);
        assert_eq!(Slot::from_word(HUGE).state(), State::Huge);
        let place = Place::from_payload(0x55_5555_5555);
        let slot = Slot::swapped(place).with_backoff(1);
        assert_eq!((slot.state(), slot.place()), (State::Swapped, place));
        assert!(!slot.owns_the_same(Slot::swapped(Place::from_payload(1))));
    }

    #[test]
    fn a_mapped_zero_frame_is_remembered_only_where_nothing_is_owned() {
        assert!(!Slot::EMPTY.is_zero_mapped());
        assert!(Slot::EMPTY.with_zero_mapped().is_zero_mapped());
        assert_eq!(Slot::ZERO.with_zero_mapped().state(), State::Zero);
        assert_eq!(Slot::private(3).with_zero_mapped(), Slot::private(3));
        assert!(!Slot::private(3).is_zero_mapped());
        assert!(Slot::ZERO.owns_the_same(Slot::ZERO.with_zero_mapped()));
        assert!(!Slot::private(3).owns_the_same(Slot::private(4)));
        assert!(!Slot::shared(3).owns_the_same(Slot::private(3)));
    }

    #[test]
    fn a_compressed_word_holds_address_and_length() {
        const LAST: u64 = (1 << 51) - 8;
        for address in [0, 8, 0x1234_5678, 1 << 46, LAST] {
            for len in [1, 37, 2048, Slot::LENGTH_MAX] {
                assert!(Slot::can_hold(address, len));
                let slot = Slot::compressed(address, len);
                assert_eq!(slot.state(), State::Compressed);
                assert_eq!((slot.object_address(), slot.object_len()), (address, len));
                // Who forgets that a page is unchanged does so without looking at the state.
                assert_eq!(slot.word() & Slot::NOT_STABLE, slot.word());
                assert!(!slot.owns_the_same(Slot::compressed(address ^ 8, len)));
            }
        }
        assert!(!Slot::can_hold(LAST + 8, 1));
        assert!(!Slot::can_hold(12, 1));
        assert!(!Slot::can_hold(8, Slot::LENGTH_MAX + 1));
    }

    #[test]
    fn a_filled_word_holds_its_pattern() {
        let slot = Slot::filled(0xdead_beef).with_backoff(3);
        assert_eq!((slot.state(), slot.pattern()), (State::Filled, 0xdead_beef));
        assert!(!slot.owns_the_same(Slot::filled(0)));
        assert!(!slot.is_zero_mapped());
    }

    #[test]
    fn backoff_skips_all_but_one_pass_in_two_to_the_n() {
        for level in 0..=BACKOFF_MAX {
            let slot = Slot::private(1).with_backoff(level);
            let tried = (0..64).filter(|&pass| !slot.skipped_in(pass, 3)).count();
            assert_eq!(tried, 64 >> level);
        }
    }
}
