// SPDX-License-Identifier: GPL-2.0

//! The lock-free parts, and the orders that they are used in, in every order in which threads can come
//! by them, on a machine that reorders as much as the language allows (loom).

use super::{
    cell::SlotCell,
    hist::AtomicHist,
    slot::{Class, Slot},
};
use loom::{model::Builder, thread};
use std::sync::Arc;

/// Tries all orders in which no thread is interrupted more often than `preemptions` times.
fn model(preemptions: usize, f: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(f);
}

/// What the scanner knows of a page once it has looked at it.
fn looked_at() -> Slot {
    Slot::private(7)
        .looked_at(Class::Unshared, 0)
        .with_stable(true)
}

#[test]
fn a_cleared_stable_bit_stays_cleared() {
    model(4, || {
        let old = looked_at();
        let cell = Arc::new(SlotCell::new(old));
        let noting = cell.clone();
        let noting = thread::spawn(move || noting.try_note(old, old.with_backoff(1)));
        let clearing = cell.clone();
        let clearing = thread::spawn(move || clearing.forget_stable());
        noting.join().unwrap();
        assert!(clearing.join().unwrap(), "it was set");
        assert!(!cell.peek().is_stable());
        assert!(cell.peek().owns_the_same(old));
    });
}

#[test]
fn what_is_owned_is_handed_over_once() {
    model(4, || {
        let old = looked_at();
        let cell = Arc::new(SlotCell::new(old));
        let noting = cell.clone();
        let noting = thread::spawn(move || noting.try_note(old, old.with_backoff(1)));
        let taken = cell.swap(Slot::ZERO);
        noting.join().unwrap();
        assert!(taken.owns_the_same(old));
        assert_eq!(cell.peek(), Slot::ZERO);
    });
}

#[test]
fn times_that_are_counted_together_are_all_there() {
    model(3, || {
        let hist = Arc::new(AtomicHist::new());
        let other = hist.clone();
        let other = thread::spawn(move || other.record(3));
        hist.record(70);
        // Whatever the other has done by now, nothing is counted that was not.
        let between = hist.snapshot();
        assert!(between.count() <= 2 && matches!(between.max, 3 | 70));
        other.join().unwrap();
        let all = hist.snapshot();
        assert_eq!((all.count(), all.sum, all.max), (2, 73, 70));
    });
}
