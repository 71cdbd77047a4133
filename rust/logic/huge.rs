// SPDX-License-Identifier: GPL-2.0

//! The slot word of a 4 KiB part of a 2 MiB folio.
//!
//! ```text
//!  63                                                     8   7    6    5    3      2    0
//! +--------------------------------------------------------+----+------+------+--------+------+
//! |                          0                             | 0  | hole | 0    | stable | state|
//! +--------------------------------------------------------+----+------+------+--------+------+
//!                                                                  1      2      1        3
//! ```
//!
//! A hole is a part that was punched out: its bytes were zeroed and nothing mapped it then. It may
//! be mapped again, as a part of the whole, and written to without notice, so a hole is a hint: who
//! acts on it looks at the bytes.

use super::slot::{Slot, State, HUGE};

/// A part of a 2 MiB folio.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct HugeWord(u64);

const HOLE: u64 = 1 << 6;

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

    /// As a hole: nothing else is known of it.
    pub const fn hole() -> HugeWord {
        HugeWord(HUGE | HOLE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_huge_and_a_hole_only_when_it_says_so() {
        assert_eq!(HugeWord::from_slot(Slot::private(5)), None);
        assert_eq!(HugeWord::from_slot(Slot::EMPTY), None);
        let word = HugeWord::from_slot(HugeWord::NEW.slot());
        assert_eq!(word.map(HugeWord::is_hole), Some(false));
        let hole = HugeWord::from_slot(HugeWord::hole().slot());
        assert_eq!(hole.map(HugeWord::is_hole), Some(true));
    }
}
