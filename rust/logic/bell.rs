// SPDX-License-Identifier: GPL-2.0

//! What kernel threads are asked to do, and how they are woken for it.
//!
//! Who asks makes a [`Request`], or changes what the thread looks at, and then rings the bell. The
//! thread takes the request before it looks, and sleeps on the bell when there is nothing to do: a ring
//! since its last sleep keeps it from sleeping. Each thread has an ear of its own, so that several can
//! listen to one bell and none hears a ring in another's place.

use super::sync::{
    AtomicBool,
    Ordering::{AcqRel, Relaxed},
};
use core::ops::DerefMut;

/// A request, made by many and taken by one thread.
///
/// Who takes it sees all that was done before it was made, by whoever made it.
#[derive(Debug)]
pub struct Request(AtomicBool);

impl Request {
    /// None was made.
    pub fn new() -> Self {
        Request(AtomicBool::new(false))
    }

    /// Makes the request; true if it was not there already. The bell is to be rung next, in that case at
    /// least.
    pub fn make(&self) -> bool {
        !self.0.swap(true, AcqRel)
    }

    /// Takes the request; true if there was one. What it is about must be looked at after this.
    pub fn take(&self) -> bool {
        self.0.swap(false, AcqRel)
    }

    /// Whether there is one, to be taken by another.
    pub fn is_made(&self) -> bool {
        self.0.load(Relaxed)
    }
}

impl Default for Request {
    fn default() -> Self {
        Self::new()
    }
}

/// How often a bell was rung.
#[derive(Debug, Default, Eq, PartialEq)]
pub struct Rings(u64);

impl Rings {
    /// Not yet.
    pub const fn new() -> Self {
        Rings(0)
    }
}

/// What one thread heard of a bell.
#[derive(Debug, Default)]
pub struct Ear(u64);

impl Ear {
    /// Nothing, so that it hears what was rung before the thread began.
    pub const fn new() -> Self {
        Ear(0)
    }
}

/// What a bell hangs on: a lock that one can sleep on.
pub trait Rope {
    /// The lock, held.
    type Held<'a>: DerefMut<Target = Rings>
    where
        Self: 'a;

    /// Takes the lock.
    fn lock(&self) -> Self::Held<'_>;
    /// Gives the lock up and sleeps for `us` microseconds at most, or until [`Rope::wake_all`]; none that
    /// comes after the lock was given up is missed. Takes the lock again.
    fn wait<'a>(&'a self, held: Self::Held<'a>, us: u64) -> Self::Held<'a>;
    /// Wakes all who sleep.
    fn wake_all(&self);
}

/// Ends the current or the next sleep of each thread that listens.
pub fn ring(rope: &impl Rope) {
    let mut rings = rope.lock();
    rings.0 = rings.0.wrapping_add(1);
    drop(rings);
    rope.wake_all();
}

/// Sleeps for `us` microseconds, until a ring that `ear` has not heard, or until `stop`.
///
/// `stop` must wake the sleeper by itself when it comes true, as a signal does.
pub fn sleep(rope: &impl Rope, ear: &mut Ear, us: u64, stop: impl FnOnce() -> bool) {
    let mut rings = rope.lock();
    if rings.0 == ear.0 && !stop() {
        rings = rope.wait(rings, us);
    }
    ear.0 = rings.0;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::{Cell, RefCell, RefMut};

    #[derive(Default)]
    struct Counted {
        rings: RefCell<Rings>,
        waits: Cell<u32>,
    }

    impl Rope for Counted {
        type Held<'a> = RefMut<'a, Rings>;

        fn lock(&self) -> RefMut<'_, Rings> {
            self.rings.borrow_mut()
        }

        fn wait<'a>(&'a self, held: RefMut<'a, Rings>, _us: u64) -> RefMut<'a, Rings> {
            self.waits.set(self.waits.get() + 1);
            held
        }

        fn wake_all(&self) {}
    }

    #[test]
    fn each_ear_hears_each_ring_once() {
        let bell = Counted::default();
        let (mut one, mut two) = (Ear::new(), Ear::new());
        ring(&bell);
        ring(&bell);
        for ear in [&mut one, &mut two] {
            sleep(&bell, ear, 1, || false);
        }
        assert_eq!(bell.waits.get(), 0);
        sleep(&bell, &mut one, 1, || true);
        assert_eq!(bell.waits.get(), 0);
        sleep(&bell, &mut one, 1, || false);
        assert_eq!(bell.waits.get(), 1);
        ring(&bell);
        sleep(&bell, &mut two, 1, || false);
        assert_eq!(bell.waits.get(), 1);
    }

    #[test]
    fn a_request_is_taken_once() {
        let request = Request::new();
        assert!(!request.take());
        assert!(request.make() && !request.make() && request.is_made());
        assert!(request.take() && !request.take() && !request.is_made());
    }
}
