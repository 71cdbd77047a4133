// SPDX-License-Identifier: GPL-2.0

//! The lock-free parts, and the orders that they are used in, in every order in which threads can come
//! by them, on a machine that reorders as much as the language allows (loom).
//!
//! Each model of an order comes with one of the order that was wrong: there loom has to find the fault,
//! or the model shows nothing.

use super::{
    bell::{self, Ear, Request, Rings, Rope},
    catalog::{Catalog, Entry, GroupPage, GROUP_ENTRIES, SPILL_ENTRIES},
    cell::SlotCell,
    hints::{self, Pages},
    hist::AtomicHist,
    machine_tests::Boxed,
    slot::{Class, Slot},
    sync::{
        AtomicBool, AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
};
use loom::{
    model::Builder,
    sync::{Mutex, MutexGuard},
    thread::{self, Thread},
};
use std::sync::Arc;

/// Tries all orders in which no thread is interrupted more often than `preemptions` times.
fn model(preemptions: usize, f: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(f);
}

/// The page that is scanned, and the hash of its content: of all hints of its group the first to go.
const PAGE: u32 = 0;
const HASH: u64 = 0;
/// Another page, whose hint takes the last place there is.
const OTHER: u32 = 1;
const OTHER_HASH: u64 = 500 << 16;
/// Pages of which nothing changes, from here on.
const FILLERS: u32 = 100;

/// What the scanner knows of the page once it has looked at it.
fn looked_at() -> Slot {
    Slot::private(7)
        .looked_at(Class::Unshared, HASH)
        .with_stable(true)
}

/// An index and the pages that hints point to.
struct World {
    catalog: Mutex<Catalog<Boxed<GroupPage>>>,
    cells: [SlotCell; 2],
}

impl World {
    /// The page is not known yet. `hints` of others are in the index: in its group, or if they are more
    /// than fit there, in all groups.
    fn new(hints: usize) -> World {
        let mut catalog = Catalog::new(Boxed::default());
        catalog.store_mut().0.push(Box::default());
        for n in 1..=hints as u32 {
            let group = if hints > ONE_LEFT { n % 16 } else { 0 };
            let tag = group << 12 | n;
            catalog.insert_hint(u64::from(tag) << 16, FILLERS + n);
        }
        World {
            catalog: Mutex::new(catalog),
            cells: [
                SlotCell::new(Slot::private(7)),
                SlotCell::new(Slot::private(8).looked_at(Class::Unshared, OTHER_HASH)),
            ],
        }
    }

    /// As the engine does it.
    fn hint(&self, hash: u64, page: u32, purge: bool) -> bool {
        let mut catalog = self.catalog.lock().unwrap();
        let left = hints::leave(&mut catalog, (hash, page), purge, self);
        drop(catalog);
        if let Some(owner) = left.evicted {
            self.forget(owner);
        }
        left.placed
    }

    fn forget(&self, page: u32) {
        if let Some(cell) = self.cells.get(page as usize) {
            cell.forget_stable();
        }
    }

    /// The scanner's look.
    fn settle(&self) {
        let cell = &self.cells[PAGE as usize];
        hints::settle(
            looked_at(),
            |slot| cell.note(slot),
            || self.hint(HASH, PAGE, false),
        );
    }

    /// The look in the wrong order.
    fn settle_late(&self) {
        let placed = self.hint(HASH, PAGE, false);
        self.cells[PAGE as usize].note(looked_at().with_stable(placed));
    }

    /// A step of growth, which takes out the hints whose pages say something else.
    fn grow(&self) {
        let mut catalog = self.catalog.lock().unwrap();
        assert!(catalog.grow_step(&mut |entry| hints::bits_of_entry(self, entry)));
        while let Some(Entry::Hint(page)) = catalog.pop_displaced() {
            self.forget(page);
        }
    }

    fn take_back(&self) {
        hints::take_back(&mut self.catalog.lock().unwrap(), (HASH, PAGE), self);
    }

    /// A page that is not hashed again can be found.
    fn check(&self) {
        let catalog = self.catalog.lock().unwrap();
        let hinted = catalog.lookup(HASH).any(|entry| entry == Entry::Hint(PAGE));
        let stable = self.cells[PAGE as usize].peek().is_stable();
        assert!(hinted || !stable, "stable without a hint");
    }
}

impl Pages for World {
    fn peek(&self, page: u32) -> Option<Slot> {
        if page > FILLERS {
            return Some(Slot::private(9).looked_at(Class::Unshared, 0));
        }
        Some(self.cells.get(page as usize)?.peek())
    }
}

/// Runs the scanner's look beside something that takes its hint, in an index of so many hints.
fn race(hints: usize, scan: fn(&World), other: fn(&World), before: fn(&World)) {
    model(3, move || {
        let world = Arc::new(World::new(hints));
        before(&world);
        let scanner = world.clone();
        let scanner = thread::spawn(move || scan(&scanner));
        other(&world);
        scanner.join().unwrap();
        world.check();
    });
}

/// There is one place left in the group.
const ONE_LEFT: usize = GROUP_ENTRIES + SPILL_ENTRIES - 1;
/// The index wants to grow.
const MANY: usize = 600;

fn evict(world: &World) {
    world.hint(OTHER_HASH, OTHER, false);
}

fn purge(world: &World) {
    world.hint(OTHER_HASH, OTHER, true);
}

fn nothing(_: &World) {}

/// The hint of an earlier look, whose page changed since.
fn hinted_before(world: &World) {
    world.hint(HASH, PAGE, false);
}

#[test]
fn a_hint_that_makes_way_takes_the_stable_bit_along() {
    race(ONE_LEFT, World::settle, evict, nothing);
}

#[test]
#[should_panic(expected = "stable without a hint")]
fn a_stable_bit_set_after_the_hint_made_way_is_noticed() {
    race(ONE_LEFT, World::settle_late, evict, nothing);
}

#[test]
fn a_hint_is_not_purged_before_its_page_says_so() {
    race(ONE_LEFT, World::settle, purge, nothing);
}

#[test]
#[should_panic(expected = "stable without a hint")]
fn a_stable_bit_set_after_the_hint_was_purged_is_noticed() {
    race(ONE_LEFT, World::settle_late, purge, nothing);
}

#[test]
fn growth_keeps_the_hint() {
    race(MANY, World::settle, World::grow, nothing);
}

#[test]
#[should_panic(expected = "stable without a hint")]
fn a_stable_bit_set_after_growth_dropped_the_hint_is_noticed() {
    race(MANY, World::settle_late, World::grow, nothing);
}

#[test]
fn a_new_hint_is_not_taken_for_the_old_one() {
    race(0, World::settle, World::take_back, hinted_before);
}

#[test]
#[should_panic(expected = "stable without a hint")]
fn a_look_at_the_page_before_the_lock_is_noticed() {
    fn take_back_late(world: &World) {
        let seen = hints::bits_of(world.cells[PAGE as usize].peek());
        if seen.is_none() {
            let mut catalog = world.catalog.lock().unwrap();
            catalog.remove(HASH, Entry::Hint(PAGE));
        }
    }
    race(0, World::settle, take_back_late, hinted_before);
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

/// A queue of sleepers, as the kernel has it: who is in it is woken, asleep or not yet.
///
/// A sleep has no other end: a lost wake-up is a deadlock, which loom finds. It tells by a panic, so
/// nobody holds a lock meanwhile.
#[derive(Default)]
struct Sleepers(Mutex<Vec<Thread>>);

impl Sleepers {
    fn enter(&self) {
        self.0.lock().unwrap().push(thread::current());
    }

    fn wake_all(&self) {
        let sleepers = core::mem::take(&mut *self.0.lock().unwrap());
        sleepers.iter().for_each(Thread::unpark);
    }
}

/// A bell as the engine's.
#[derive(Default)]
struct TestBell {
    rings: Mutex<Rings>,
    sleepers: Sleepers,
}

impl Rope for TestBell {
    type Held<'a> = MutexGuard<'a, Rings>;

    fn lock(&self) -> MutexGuard<'_, Rings> {
        self.rings.lock().unwrap()
    }

    fn wait<'a>(&'a self, held: MutexGuard<'a, Rings>, _us: u64) -> MutexGuard<'a, Rings> {
        self.sleepers.enter();
        drop(held);
        thread::park();
        self.lock()
    }

    fn wake_all(&self) {
        self.sleepers.wake_all();
    }
}

/// Words that change, a request to look at them, a bell.
#[derive(Default)]
struct Asked {
    request: Request,
    relaxed: AtomicBool,
    done: AtomicU64,
    bell: TestBell,
}

/// Two ask for something each, the first one of them rings; the thread ends when it saw both.
fn two_ask(make: fn(&Asked) -> bool, take: fn(&Asked) -> bool) {
    model(3, move || {
        let asked = Arc::new(Asked::default());
        let ask = |asked: Arc<Asked>| {
            move || {
                asked.done.fetch_add(1, Relaxed);
                if make(&asked) {
                    bell::ring(&asked.bell);
                }
            }
        };
        let first = thread::spawn(ask(asked.clone()));
        let second = thread::spawn(ask(asked.clone()));
        let mut ear = Ear::new();
        while !(take(&asked) && asked.done.load(Relaxed) == 2) {
            bell::sleep(&asked.bell, &mut ear, 1, || false);
        }
        first.join().unwrap();
        second.join().unwrap();
    });
}

#[test]
fn no_request_is_lost() {
    two_ask(|asked| asked.request.make(), |asked| asked.request.take());
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_request_without_order_is_noticed() {
    two_ask(
        |asked| !asked.relaxed.swap(true, Relaxed),
        |asked| asked.relaxed.swap(false, Relaxed),
    );
}

/// What two readers are asked to read.
#[derive(Default)]
struct Reading<B> {
    queue: Mutex<Vec<u32>>,
    bell: B,
    second: AtomicBool,
    waits_for_second: Sleepers,
}

impl<B> Reading<B> {
    fn ask(&self, cluster: u32, ring: fn(&B)) {
        self.queue.lock().unwrap().push(cluster);
        ring(&self.bell);
    }

    /// A reader reads one cluster. The first one does not come before the second one.
    fn read_one(&self, sleep: fn(&B, &mut Ear)) {
        let mut ear = Ear::new();
        let cluster = loop {
            let next = self.queue.lock().unwrap().pop();
            match next {
                Some(cluster) => break cluster,
                None => sleep(&self.bell, &mut ear),
            }
        };
        if cluster == 2 {
            self.second.store(true, SeqCst);
            self.waits_for_second.wake_all();
            return;
        }
        self.waits_for_second.enter();
        if !self.second.load(SeqCst) {
            thread::park();
        }
    }
}

/// Two readers, who sleep by `sleep` while there is nothing to read.
fn two_readers<B: Default + Send + Sync + 'static>(ring: fn(&B), sleep: fn(&B, &mut Ear)) {
    model(2, move || {
        let reading = Arc::new(Reading::<B>::default());
        let readers = [reading.clone(), reading.clone()]
            .map(|reading| thread::spawn(move || reading.read_one(sleep)));
        reading.ask(1, ring);
        reading.ask(2, ring);
        for reader in readers {
            reader.join().unwrap();
        }
    });
}

#[test]
fn each_listener_hears_the_bell() {
    two_readers::<TestBell>(
        |bell| bell::ring(bell),
        |bell, ear| bell::sleep(bell, ear, 1, || false),
    );
}

/// A bell whose ring one of several listeners takes from the others.
#[derive(Default)]
struct OneRing {
    rung: Mutex<bool>,
    sleepers: Sleepers,
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_ring_heard_in_anothers_place_is_noticed() {
    two_readers::<OneRing>(
        |bell| {
            *bell.rung.lock().unwrap() = true;
            bell.sleepers.wake_all();
        },
        |bell, _| {
            let mut rung = bell.rung.lock().unwrap();
            if !*rung {
                bell.sleepers.enter();
                drop(rung);
                thread::park();
                rung = bell.rung.lock().unwrap();
            }
            *rung = false;
        },
    );
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
