// SPDX-License-Identifier: GPL-2.0

//! The slot machine: slot words, records, catalog and counts put together as the module does it,
//! driven by random operations beside a model that only knows what each page should read as.
//!
//! A page's content is one number here, its hash a function of it that may be made to collide.

use super::{
    catalog::{self, Catalog, Entry, GroupPage, HintOutcome, PageStore, StableOutcome},
    counts::{self, Counts},
    records::{Dropped, RecordPage, RecordStore, Records},
    slot::{Class, Slot, State},
};
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};

#[derive(Default)]
pub(super) struct Boxed<T>(pub(super) Vec<Box<T>>);

impl PageStore for Boxed<GroupPage> {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn page(&self, i: usize) -> Option<&GroupPage> {
        self.0.get(i).map(|page| &**page)
    }

    fn page_mut(&mut self, i: usize) -> Option<&mut GroupPage> {
        self.0.get_mut(i).map(|page| &mut **page)
    }
}

impl RecordStore for Boxed<RecordPage> {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn page(&self, i: usize) -> Option<&RecordPage> {
        self.0.get(i).map(|page| &**page)
    }

    fn page_mut(&mut self, i: usize) -> Option<&mut RecordPage> {
        self.0.get_mut(i).map(|page| &mut **page)
    }
}

fn mix(n: u64) -> u64 {
    catalog::tests::mix(n)
}

/// Frames by number; whoever frees one twice, or uses a free one, is caught.
#[derive(Default)]
struct Frames {
    content: HashMap<u64, u64>,
    free: Vec<u64>,
    next: u64,
}

impl Frames {
    fn alloc(&mut self, content: u64) -> u64 {
        let pfn = self.free.pop().unwrap_or_else(|| {
            self.next += 1;
            self.next
        });
        assert_eq!(
            self.content.insert(pfn, content),
            None,
            "frame {pfn} given out twice"
        );
        pfn
    }

    fn free(&mut self, pfn: u64) {
        assert!(
            self.content.remove(&pfn).is_some(),
            "frame {pfn} freed twice"
        );
        self.free.push(pfn);
    }

    fn get(&self, pfn: u64) -> u64 {
        self.content[&pfn]
    }
}

/// A host with one VM of so many pages that the index of a page is its id.
struct Machine {
    slots: Vec<Slot>,
    pinned: HashSet<usize>,
    counts: Counts,
    frames: Frames,
    records: Records<Boxed<RecordPage>>,
    /// The hash that a record was published under.
    labels: HashMap<u32, u64>,
    /// Records that the catalog has no entry for.
    unlisted: HashSet<u32>,
    catalog: Catalog<Boxed<GroupPage>>,
    catalog_pages: usize,
    hash_mask: u64,
    max_sharers: u32,
    pass: u64,
}

impl Machine {
    fn new(hash_mask: u64, catalog_pages: usize) -> Self {
        let mut machine = Machine {
            slots: Vec::new(),
            pinned: HashSet::new(),
            counts: Counts::new(),
            frames: Frames::default(),
            records: Records::new(Boxed::default()),
            labels: HashMap::new(),
            unlisted: HashSet::new(),
            catalog: Catalog::new(Boxed::default()),
            catalog_pages,
            hash_mask,
            max_sharers: 1 << 20,
            pass: 0,
        };
        machine.catalog.store_mut().0.push(Box::default());
        machine
    }

    fn hash(&self, content: u64) -> u64 {
        mix(content) & self.hash_mask
    }

    fn count(slot: Slot) -> counts::Class {
        match slot.state() {
            State::Empty => counts::Class::Empty,
            State::Zero => counts::Class::Zero,
            State::Private => counts::Class::Private,
            State::Shared => counts::Class::Shared,
            State::Huge => counts::Class::Huge,
            State::Compressed | State::Filled | State::Swapped => {
                unreachable!("this machine compresses nothing")
            }
        }
    }

    /// Gives the slot another word; what it owned has to be let go by the caller.
    fn set(&mut self, page: usize, slot: Slot) -> Slot {
        let old = self.slots[page];
        self.counts
            .transition(Self::count(old), Self::count(slot), 1)
            .unwrap();
        self.slots[page] = slot;
        old
    }

    fn release(&mut self, old: Slot) {
        match old.state() {
            State::Empty | State::Zero | State::Huge => {}
            State::Private => self.frames.free(old.payload()),
            State::Shared => self.leave(old.record()),
            State::Compressed | State::Filled | State::Swapped => {
                unreachable!("this machine compresses nothing")
            }
        }
    }

    fn leave(&mut self, id: u32) {
        if let Dropped::Last(bytes) = self.records.drop_sharer(id).unwrap() {
            self.unlist(id);
            self.frames.free(bytes.payload);
        }
    }

    fn unlist(&mut self, id: u32) {
        let hash = self.labels.remove(&id).unwrap();
        let listed = !self.unlisted.remove(&id);
        assert_eq!(self.catalog.remove(hash, Entry::Stable(id)), listed);
    }

    fn resize(&mut self, pages: usize) {
        while self.slots.len() > pages {
            let last = self.slots.len() - 1;
            self.punch(last);
            self.slots.pop();
            self.counts.remove_empty(1).unwrap();
        }
        self.counts
            .add_empty((pages - self.slots.len()) as u64)
            .unwrap();
        self.slots.resize(pages, Slot::EMPTY);
    }

    fn read(&self, page: usize) -> u64 {
        let slot = self.slots[page];
        match slot.state() {
            State::Empty | State::Zero => 0,
            State::Huge => unreachable!("the model has no folios"),
            State::Private => self.frames.get(slot.payload()),
            State::Compressed | State::Filled | State::Swapped => {
                unreachable!("this machine compresses nothing")
            }
            State::Shared => self
                .frames
                .get(self.records.get(slot.record()).unwrap().bytes.payload),
        }
    }

    fn write(&mut self, page: usize, content: u64) {
        let slot = self.slots[page];
        if slot.state() == State::Private {
            self.slots[page] = Slot::from_word(slot.word() & Slot::NOT_STABLE);
            self.frames.content.insert(slot.payload(), content);
            return;
        }
        let backoff = slot.backoff() + u8::from(slot.state() == State::Shared);
        let pfn = self.frames.alloc(content);
        let old = self.set(page, Slot::private(pfn).with_backoff(backoff));
        self.release(old);
    }

    fn punch(&mut self, page: usize) {
        self.pinned.remove(&page);
        let old = self.set(page, Slot::EMPTY);
        self.release(old);
    }

    /// A page that lost its hint is hashed again.
    fn forget(&mut self, page: u32) {
        if let Some(slot) = self.slots.get_mut(page as usize) {
            *slot = slot.with_stable(false);
        }
    }

    fn maintain(&mut self) {
        while self.records.wants_page() {
            self.records.store_mut().0.push(Box::default());
        }
        while self.catalog.wants_growth() {
            if self.catalog.wants_page() {
                if self.catalog.bytes() / 4096 >= self.catalog_pages as u64 {
                    return;
                }
                self.catalog.store_mut().0.push(Box::default());
            }
            let (slots, labels) = (&self.slots, &self.labels);
            let grown = self.catalog.grow_step(&mut |entry| match entry {
                Entry::Stable(id) => labels.get(&id).map(|&hash| hash as u16),
                Entry::Hint(page) => {
                    let slot = *slots.get(page as usize)?;
                    let told = slot.state() == State::Private && slot.class() == Class::Unshared;
                    told.then(|| slot.tag())
                }
            });
            assert!(grown, "a step with a page for it was not taken");
            while let Some(entry) = self.catalog.pop_displaced() {
                match entry {
                    Entry::Hint(page) => self.forget(page),
                    Entry::Stable(id) => assert!(self.unlisted.insert(id)),
                }
            }
        }
    }

    /// One look of the scanner.
    fn scan(&mut self, page: usize) {
        self.maintain();
        let slot = self.slots[page];
        match slot.state() {
            State::Empty | State::Zero | State::Huge => return,
            State::Shared => {
                let shared = self.records.get(slot.record()).unwrap();
                if shared.sharers == 1 {
                    let own = self.frames.alloc(self.frames.get(shared.bytes.payload));
                    let old = self.set(page, Slot::private(own).with_backoff(slot.backoff()));
                    self.release(old);
                }
                return;
            }
            State::Private => {}
            State::Compressed | State::Filled | State::Swapped => {
                unreachable!("this machine compresses nothing")
            }
        }
        let content = self.frames.get(slot.payload());
        let hash = self.hash(content);
        if slot.is_stable() {
            assert_eq!(slot.tag(), hash as u16, "a stable page has changed");
            return;
        }
        if slot.skipped_in(self.pass, page as u64) {
            return;
        }
        if slot.class() != Class::Unchecked && slot.tag() != hash as u16 {
            self.slots[page] = slot
                .looked_at(Class::Volatile, hash)
                .with_backoff(slot.backoff());
            return;
        }
        let pinned = self.pinned.contains(&page);
        let looked = slot
            .looked_at(Class::Unshared, hash)
            .with_backoff(slot.backoff().saturating_sub(1));
        if pinned {
            self.slots[page] = looked;
            return;
        }
        if content == 0 {
            let old = self.set(page, Slot::ZERO);
            self.release(old);
            return;
        }
        if self.merge(page, content, hash) {
            return;
        }
        let hinted = match self.catalog.insert_hint(hash, page as u32) {
            HintOutcome::Placed | HintOutcome::Replaced(_) => true,
            HintOutcome::Evicted(owner) => {
                self.forget(owner);
                owner as usize != page
            }
            HintOutcome::Refused => false,
        };
        self.slots[page] = looked.with_stable(hinted);
    }

    fn merge(&mut self, page: usize, content: u64, hash: u64) -> bool {
        let candidates: Vec<Entry> = self.catalog.lookup(hash).collect();
        for candidate in candidates {
            match candidate {
                Entry::Stable(id) => {
                    // Never the hash alone.
                    let equal =
                        self.frames.get(self.records.get(id).unwrap().bytes.payload) == content;
                    if equal && self.records.add_sharer(id, self.max_sharers).is_ok() {
                        let old = self.set(page, Slot::shared(id));
                        self.release(old);
                        return true;
                    }
                }
                Entry::Hint(other) if other as usize == page => {}
                Entry::Hint(other) => {
                    let at = other as usize;
                    let slot = self.slots.get(at).copied().unwrap_or(Slot::EMPTY);
                    let told = slot.state() == State::Private && slot.class() == Class::Unshared;
                    if !told || !self.catalog.can_be_under(hash, slot.tag()) {
                        assert!(self.catalog.remove(hash, candidate));
                        continue;
                    }
                    // Else it is under a hash that looks alike here, and has to stay.
                    if slot.tag() != hash as u16 {
                        continue;
                    }
                    if self.pinned.contains(&at) || self.frames.get(slot.payload()) != content {
                        continue;
                    }
                    let fresh = self.frames.alloc(content);
                    let id = self.records.alloc(fresh, 2).unwrap();
                    assert_eq!(self.labels.insert(id, hash), None);
                    if !self.catalog.promote(hash, other, id) {
                        match self.catalog.insert_stable(hash, id) {
                            StableOutcome::Placed => {}
                            StableOutcome::Evicted(owner) => self.forget(owner),
                            StableOutcome::Refused => assert!(self.unlisted.insert(id)),
                        }
                    }
                    for page in [page, at] {
                        let old = self.set(page, Slot::shared(id));
                        self.release(old);
                    }
                    return true;
                }
            }
        }
        false
    }

    fn scan_all(&mut self) {
        (0..self.slots.len()).for_each(|page| self.scan(page));
        self.catalog.end_pass();
        self.pass += 1;
    }

    /// Breaks every share, as `run` 2 does.
    fn unshare(&mut self) {
        for page in 0..self.slots.len() {
            if self.slots[page].state() == State::Shared {
                self.write(page, self.read(page));
            }
        }
        self.catalog.clear_hints();
        self.slots
            .iter_mut()
            .for_each(|slot| *slot = slot.with_stable(false));
    }

    /// All books agree, and every page reads as `model` says.
    fn check(&self, model: &[u64]) {
        assert_eq!(self.slots.len(), model.len());
        let mut counts = Counts::new();
        let mut sharers: HashMap<u32, u32> = HashMap::new();
        let mut owned = HashSet::new();
        for (page, (&slot, &content)) in self.slots.iter().zip(model).enumerate() {
            assert_eq!(self.read(page), content, "page {page}");
            counts.pages[Self::count(slot) as usize] += 1;
            match slot.state() {
                State::Private => assert!(owned.insert(slot.payload()), "a frame of two slots"),
                State::Shared => *sharers.entry(slot.record()).or_default() += 1,
                State::Empty | State::Zero | State::Huge => {}
                State::Compressed | State::Filled | State::Swapped => {
                    unreachable!("this machine compresses nothing")
                }
            }
        }
        assert_eq!(counts, self.counts);
        assert_eq!(counts.total(), model.len() as u64);
        for (&id, &of) in &sharers {
            let shared = self.records.get(id).unwrap();
            assert_eq!(shared.sharers, of);
            assert!(
                owned.insert(shared.bytes.payload),
                "a frame of a record and of something else"
            );
            let hash = self.labels[&id];
            assert_eq!(hash, self.hash(self.frames.get(shared.bytes.payload)));
            let listed = self
                .catalog
                .lookup(hash)
                .any(|entry| entry == Entry::Stable(id));
            assert_eq!(listed, !self.unlisted.contains(&id));
        }
        assert_eq!(
            owned.len(),
            self.frames.content.len(),
            "frames that nobody owns"
        );
        assert_eq!(self.records.len(), sharers.len() as u64);
        assert_eq!(self.labels.len(), sharers.len());
        let shared = self.counts.get(counts::Class::Shared);
        assert_eq!(self.records.pages_sharing(), shared - sharers.len() as u64);
        let listed = self.labels.len() - self.unlisted.len();
        assert_eq!(self.catalog.stable_entries(), listed as u64);
    }

    /// Frames that equal contents could do without.
    fn unmerged(&self) -> usize {
        let contents: HashSet<u64> = self.frames.content.values().copied().collect();
        self.frames.content.len() - contents.len()
    }
}

#[derive(Clone, Debug)]
enum Op {
    Write {
        page: usize,
        content: u64,
    },
    WriteRange {
        page: usize,
        pages: usize,
        content: u64,
    },
    Copy {
        from: usize,
        to: usize,
        pages: usize,
    },
    Punch {
        page: usize,
        pages: usize,
    },
    Resize {
        pages: usize,
    },
    Pin {
        page: usize,
    },
    UnpinAll,
    Scan {
        page: usize,
        pages: usize,
    },
    ScanAll,
    MaxSharers {
        max: u32,
    },
    Unshare,
}

const PAGES: usize = 1500;

fn op() -> impl Strategy<Value = Op> {
    let page = || 0..PAGES;
    let few = || 1usize..400;
    // Few contents that many pages have, and many that few have; 0 is a zero page.
    let content = || prop_oneof![0u64..8, 0u64..100_000];
    prop_oneof![
        8 => (page(), content()).prop_map(|(page, content)| Op::Write { page, content }),
        6 => (page(), few(), content())
            .prop_map(|(page, pages, content)| Op::WriteRange { page, pages, content }),
        6 => (page(), page(), few()).prop_map(|(from, to, pages)| Op::Copy { from, to, pages }),
        2 => (page(), few()).prop_map(|(page, pages)| Op::Punch { page, pages }),
        1 => (1..=PAGES).prop_map(|pages| Op::Resize { pages }),
        2 => page().prop_map(|page| Op::Pin { page }),
        1 => Just(Op::UnpinAll),
        4 => (page(), few()).prop_map(|(page, pages)| Op::Scan { page, pages }),
        6 => Just(Op::ScanAll),
        1 => (2u32..9).prop_map(|max| Op::MaxSharers { max }),
        1 => Just(Op::Unshare),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn agrees_with_the_model(
        ops in prop::collection::vec(op(), 1..80),
        hash_mask in prop_oneof![4 => Just(u64::MAX), 1 => Just(0xff_00ff), 1 => Just(0)],
        catalog_pages in 1usize..8,
    ) {
        let mut machine = Machine::new(hash_mask, catalog_pages);
        machine.resize(PAGES);
        let mut model = vec![0u64; PAGES];
        for op in ops {
            let len = model.len();
            let range = |page: usize, pages: usize| page.min(len)..(page + pages).min(len);
            match op {
                Op::Write { page, content } => for page in range(page, 1) {
                    machine.write(page, content);
                    model[page] = content;
                },
                Op::WriteRange { page, pages, content } => for page in range(page, pages) {
                    let content = content + page as u64 % 97;
                    machine.write(page, content);
                    model[page] = content;
                },
                Op::Copy { from, to, pages } => for (from, to) in
                    range(from, pages).zip(range(to, pages))
                {
                    machine.write(to, machine.read(from));
                    model[to] = model[from];
                },
                Op::Punch { page, pages } => for page in range(page, pages) {
                    machine.punch(page);
                    model[page] = 0;
                },
                Op::Resize { pages } => {
                    machine.resize(pages);
                    model.resize(pages, 0);
                }
                Op::Pin { page } => if machine.slots.get(page).is_some_and(|slot| slot.state() == State::Private) {
                    machine.slots[page] = machine.slots[page].with_stable(false);
                    machine.pinned.insert(page);
                },
                Op::UnpinAll => machine.pinned.clear(),
                Op::Scan { page, pages } => range(page, pages).for_each(|page| machine.scan(page)),
                Op::ScanAll => machine.scan_all(),
                Op::MaxSharers { max } => machine.max_sharers = max,
                Op::Unshare => machine.unshare(),
            }
            machine.check(&model);
        }
        // Left alone, with room and honest hashes, all that is equal comes together.
        machine.pinned.clear();
        machine.max_sharers = 1 << 20;
        machine.catalog_pages = 64;
        machine.unshare();
        (0..20).for_each(|_| machine.scan_all());
        machine.check(&model);
        if hash_mask == u64::MAX && machine.unlisted.is_empty() {
            prop_assert_eq!(machine.unmerged(), 0);
        }
        // And nothing is left of it in the end.
        machine.resize(0);
        machine.check(&[]);
        prop_assert!(machine.frames.content.is_empty());
    }
}

#[test]
fn first_merges_come_in_the_first_pass() {
    let mut machine = Machine::new(u64::MAX, 64);
    machine.resize(4000);
    for page in 0..4000 {
        machine.write(page, 1 + page as u64 % 1000);
    }
    machine.scan_all();
    let first = machine.unmerged();
    assert!(first <= 10, "{first} of 3000 left after the first pass");
    machine.scan_all();
    assert_eq!(machine.unmerged(), 0);
    assert_eq!(machine.records.pages_sharing(), 3000);
}

#[test]
fn no_pair_is_missed_for_ever_by_an_undersized_table() {
    let mut machine = Machine::new(u64::MAX, 2);
    let (pages, pairs) = (4000, 1000);
    machine.resize(pages);
    // Each page of a pair half the memory away from the other, with unique pages between.
    for page in 0..pages {
        let half = page % (pages / 2);
        let content = if half < pairs {
            1 + half
        } else {
            10_000 + page
        };
        machine.write(page, content as u64);
    }
    let mut passes = 0;
    let mut left = machine.unmerged();
    assert_eq!(left, pairs);
    while left > 0 && passes < 200 {
        machine.scan_all();
        let now = machine.unmerged();
        assert!(now <= left);
        left = now;
        passes += 1;
        assert!(
            passes < 20 || left <= pairs / 20,
            "{left} left after {passes} passes"
        );
    }
    assert_eq!(left, 0, "pairs that were not found in {passes} passes");
    // The table is too small to find them at once, or this tests nothing.
    assert!(machine.catalog.capacity() < pages as u64 / 3 && passes > 2);
}
