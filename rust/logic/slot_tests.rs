// SPDX-License-Identifier: GPL-2.0

//! The slot word against a plain struct of what it should say.

use super::slot::{Class, Slot, State, BACKOFF_MAX, PAYLOAD_MAX};
use proptest::prelude::*;

/// A slot as one would write it down without counting bits.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Plain {
    state: State,
    owned: u64,
    zero_mapped: bool,
    class: Class,
    tag: u16,
    stable: bool,
    backoff: u8,
}

impl Plain {
    fn new(state: State, owned: u64) -> Self {
        Plain {
            state,
            owned,
            zero_mapped: false,
            class: Class::Unchecked,
            tag: 0,
            stable: false,
            backoff: 0,
        }
    }

    fn agrees(&self, slot: Slot) -> bool {
        let seen = Plain {
            state: slot.state(),
            owned: match slot.state() {
                State::Private => slot.payload(),
                State::Shared => slot.record().into(),
                State::Filled => slot.pattern().into(),
                State::Empty | State::Zero | State::Huge => 0,
                State::Compressed | State::Swapped => unreachable!("its word has other fields"),
            },
            zero_mapped: slot.is_zero_mapped(),
            class: slot.class(),
            tag: slot.tag(),
            stable: slot.is_stable(),
            backoff: slot.backoff(),
        };
        seen == *self && Slot::from_word(slot.word()) == slot
    }
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Become(State, u64),
    Look(Class, u64),
    Stable(bool),
    LoseStable,
    Backoff(u8),
    MapZero,
}

fn op() -> impl Strategy<Value = Op> {
    const STATES: [State; 5] = [
        State::Empty,
        State::Zero,
        State::Private,
        State::Shared,
        State::Filled,
    ];
    const CLASSES: [Class; 3] = [Class::Unchecked, Class::Unshared, Class::Volatile];
    prop_oneof![
        2 => (prop::sample::select(&STATES[..]), 0..=PAYLOAD_MAX)
            .prop_map(|(state, owned)| Op::Become(state, owned)),
        3 => (prop::sample::select(&CLASSES[..]), any::<u64>())
            .prop_map(|(class, hash)| Op::Look(class, hash)),
        2 => any::<bool>().prop_map(Op::Stable),
        1 => Just(Op::LoseStable),
        2 => any::<u8>().prop_map(Op::Backoff),
        1 => Just(Op::MapZero),
    ]
}

proptest! {
    #[test]
    fn every_field_keeps_to_itself(ops in prop::collection::vec(op(), 1..60)) {
        let (mut slot, mut plain) = (Slot::EMPTY, Plain::new(State::Empty, 0));
        for op in ops {
            let before = (slot, plain);
            match op {
                Op::Become(state, owned) => {
                    (slot, plain) = match state {
                        State::Empty => (Slot::EMPTY, Plain::new(state, 0)),
                        State::Zero => (Slot::ZERO, Plain::new(state, 0)),
                        State::Huge => unreachable!("see logic::huge"),
                        State::Private => (Slot::private(owned), Plain::new(state, owned)),
                        State::Shared => {
                            let record = owned as u32;
                            (Slot::shared(record), Plain::new(state, record.into()))
                        }
                        State::Filled => {
                            let pattern = owned as u32;
                            (Slot::filled(pattern), Plain::new(state, pattern.into()))
                        }
                        State::Compressed | State::Swapped => unreachable!("its word has other fields"),
                    };
                }
                Op::Look(class, hash) => {
                    slot = slot.looked_at(class, hash);
                    plain = Plain { class, tag: hash as u16, stable: false, ..plain };
                }
                Op::Stable(stable) => {
                    slot = slot.with_stable(stable);
                    plain.stable = stable;
                }
                Op::LoseStable => {
                    slot = Slot::from_word(slot.word() & Slot::NOT_STABLE);
                    plain.stable = false;
                }
                Op::Backoff(backoff) => {
                    slot = slot.with_backoff(backoff);
                    plain.backoff = backoff.min(BACKOFF_MAX);
                }
                Op::MapZero => {
                    slot = slot.with_zero_mapped();
                    plain.zero_mapped = matches!(plain.state, State::Empty | State::Zero);
                }
            }
            prop_assert!(plain.agrees(slot), "{plain:?} is not {slot:?}");
            let same = (plain.state, plain.owned) == (before.1.state, before.1.owned);
            prop_assert_eq!(slot.owns_the_same(before.0), same);
        }
    }

    #[test]
    fn no_word_does_harm(word: u64, pass: u64, spread: u64) {
        let slot = Slot::from_word(word);
        prop_assert_eq!(slot.word(), word);
        let owns = matches!(slot.state(), State::Private | State::Shared);
        prop_assert!(!(owns && slot.is_zero_mapped()));
        prop_assert!(slot.backoff() <= BACKOFF_MAX);
        // A page that is passed over comes up within as many passes as its back-off says.
        let passes = 1u64 << slot.backoff();
        let skipped = |i: u64| slot.skipped_in(pass.wrapping_add(i), spread);
        prop_assert_eq!((0..passes).filter(|&i| !skipped(i)).count(), 1);
    }
}
