// SPDX-License-Identifier: GPL-2.0

//! The slot machine: slot words, hints, catalog, records, clusters and counts put together as the module
//! does it, driven by random operations beside a model that only knows what each page should read as,
//! and which states an operation may take it to.
//!
//! A page's content is one number here, its hash a function of it that may be made to collide. What
//! becomes of it when it is compressed is a function of it as well.

use super::{
    catalog::{self, Catalog, Entry, GroupPage, PageStore, StableOutcome},
    cell::SlotCell,
    clusters::{Cluster, Clusters, Fill, Place},
    counts::{self, Counts},
    hints::{self, Pages},
    huge::{HugeWord, PartClass, Worth},
    records::{Bytes, Dropped, Form, RecordPage, RecordStore, Records},
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

/// Frames, objects or places by number; whoever frees one twice, or uses a free one, is caught.
#[derive(Default)]
struct Things {
    content: HashMap<u64, u64>,
    free: Vec<u64>,
    next: u64,
}

impl Things {
    fn alloc(&mut self, content: u64) -> u64 {
        let id = self.free.pop().unwrap_or_else(|| {
            self.next += 1;
            self.next
        });
        self.put(id, content);
        id
    }

    fn put(&mut self, id: u64, content: u64) {
        assert_eq!(self.content.insert(id, content), None, "{id} is in use");
    }

    fn take(&mut self, id: u64) -> u64 {
        self.content.remove(&id).expect("freed twice")
    }

    fn free(&mut self, id: u64) {
        self.take(id);
        self.free.push(id);
    }

    fn get(&self, id: u64) -> u64 {
        self.content[&id]
    }
}

/// What compression makes of a content.
#[derive(Clone, Copy, PartialEq)]
enum Packs {
    /// Four bytes over and over.
    Filled,
    /// So many bytes.
    To(u16),
    /// Too many.
    Not,
}

fn packs(content: u64) -> Packs {
    match content % 16 {
        0 | 3 => Packs::Filled,
        5 | 9 => Packs::Not,
        _ => Packs::To(200 + (mix(content) % 1800) as u16),
    }
}

/// Pages of a region.
const REGION: usize = 512;
/// Clusters of the swap file.
const CLUSTERS: u32 = 24;
/// Bytes of a page.
const PAGE_BYTES: usize = 4096;

/// The words of a VM's pages. The place of a page is its id.
struct Words(Vec<SlotCell>);

impl Words {
    fn get(&self, page: usize) -> Slot {
        self.0[page].peek()
    }
}

impl Pages for Words {
    fn peek(&self, page: u32) -> Option<Slot> {
        self.0.get(page as usize).map(SlotCell::peek)
    }
}

/// A host with one VM.
struct Machine {
    slots: Words,
    /// The parts of the regions that are one folio.
    folios: HashMap<usize, Vec<u64>>,
    pinned: HashSet<usize>,
    /// Regions whose folio is held.
    held: HashSet<usize>,
    counts: Counts,
    frames: Things,
    /// Compressed pages, by their address in units of eight bytes.
    objects: Things,
    /// What is in the swap file, by place.
    places: Things,
    clusters: Clusters<Vec<Cluster>>,
    filling: Option<Fill>,
    writing: Vec<u32>,
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
            slots: Words(Vec::new()),
            folios: HashMap::new(),
            pinned: HashSet::new(),
            held: HashSet::new(),
            counts: Counts::new(),
            frames: Things::default(),
            objects: Things::default(),
            places: Things::default(),
            clusters: Clusters::new(vec![Cluster::FREE; CLUSTERS as usize]),
            filling: None,
            writing: Vec::new(),
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
        assert_eq!(machine.clusters.add(CLUSTERS), CLUSTERS);
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
            State::Compressed | State::Filled => counts::Class::Compressed,
            State::Swapped => counts::Class::Swapped,
        }
    }

    fn len(&self) -> usize {
        self.slots.0.len()
    }

    fn is_folio(&self, page: usize) -> bool {
        self.folios.contains_key(&(page / REGION))
    }

    fn part(&mut self, page: usize) -> &mut u64 {
        let folio = self.folios.get_mut(&(page / REGION)).unwrap();
        &mut folio[page % REGION]
    }

    /// Gives the slot another word, and lets go of what it owned.
    fn set(&mut self, page: usize, slot: Slot) {
        let old = self.slots.0[page].swap(slot);
        self.counts
            .transition(Self::count(old), Self::count(slot), 1)
            .unwrap();
        match old.state() {
            State::Empty | State::Zero | State::Huge | State::Filled => {}
            State::Private => self.frames.free(old.payload()),
            State::Shared => self.leave(old.record()),
            State::Compressed => self.objects.free(old.object_address() / 8),
            State::Swapped => self.release(old.place()),
        }
    }

    fn note(&self, page: usize, slot: Slot) {
        self.slots.0[page].note(slot);
    }

    fn release(&mut self, place: Place) {
        self.places.take(place.payload());
        assert!(self.clusters.release(place));
    }

    fn free_bytes(&mut self, bytes: Bytes) {
        match bytes.form {
            Form::Free => unreachable!("a record in use"),
            Form::Frame => self.frames.free(bytes.payload),
            Form::Compressed => self.objects.free(bytes.payload),
            Form::Swapped => self.release(Place::from_payload(bytes.payload)),
        }
    }

    fn leave(&mut self, id: u32) {
        if let Dropped::Last(bytes) = self.records.drop_sharer(id).unwrap() {
            let hash = self.labels.remove(&id).unwrap();
            let listed = !self.unlisted.remove(&id);
            assert_eq!(self.catalog.remove(hash, Entry::Stable(id)), listed);
            self.free_bytes(bytes);
        }
    }

    fn read_record(&self, id: u32) -> u64 {
        let bytes = self.records.get(id).unwrap().bytes;
        match bytes.form {
            Form::Free => unreachable!("a record in use"),
            Form::Frame => self.frames.get(bytes.payload),
            Form::Compressed => self.objects.get(bytes.payload),
            Form::Swapped => self.places.get(bytes.payload),
        }
    }

    fn read(&self, page: usize) -> u64 {
        let slot = self.slots.get(page);
        match slot.state() {
            State::Empty | State::Zero => 0,
            State::Private => self.frames.get(slot.payload()),
            State::Shared => self.read_record(slot.record()),
            State::Huge => self.folios[&(page / REGION)][page % REGION],
            State::Compressed => self.objects.get(slot.object_address() / 8),
            State::Filled => slot.pattern().into(),
            State::Swapped => self.places.get(slot.place().payload()),
        }
    }

    /// A guest touches the page: from here on it is in memory, and mapped.
    fn fault(&mut self, page: usize) {
        let slot = self.slots.get(page);
        match slot.state() {
            State::Empty if self.is_folio(page) => self.set(page, HugeWord::NEW.slot()),
            State::Empty | State::Zero => self.note(page, slot.with_zero_mapped()),
            State::Private | State::Huge => {}
            State::Shared => self.unpack_record(slot.record()),
            State::Compressed | State::Filled | State::Swapped => {
                let pfn = self.frames.alloc(self.read(page));
                self.set(page, Slot::private(pfn));
            }
        }
    }

    /// The page of a record comes back, for all its sharers.
    fn unpack_record(&mut self, id: u32) {
        self.records.note_idle(id, false);
        if self.records.get(id).unwrap().bytes.form != Form::Frame {
            let pfn = self.frames.alloc(self.read_record(id));
            let old = self.records.put(id, Bytes::frame(pfn)).unwrap();
            self.free_bytes(old);
        }
    }

    fn write(&mut self, page: usize, content: u64) {
        self.fault(page);
        let slot = self.slots.get(page);
        match slot.state() {
            State::Private => {
                self.slots.0[page].forget_stable();
                self.frames.content.insert(slot.payload(), content);
            }
            State::Huge => {
                self.slots.0[page].forget_stable();
                *self.part(page) = content;
            }
            state => {
                let backoff = slot.backoff() + u8::from(state == State::Shared);
                let pfn = self.frames.alloc(content);
                self.set(page, Slot::private(pfn).with_backoff(backoff));
            }
        }
    }

    /// Punches a hole, or (`cut`) lets the pages go that are beyond the end from here on.
    fn punch(&mut self, pages: std::ops::Range<usize>, cut: bool) {
        for page in pages {
            self.pinned.remove(&page);
            match self.slots.get(page).state() {
                State::Huge => {
                    *self.part(page) = 0;
                    if cut {
                        self.set(page, Slot::EMPTY);
                    } else {
                        self.note(page, HugeWord::hole().slot());
                    }
                }
                _ => self.set(page, Slot::EMPTY),
            }
            self.drop_folio_if_unused(page / REGION);
        }
    }

    /// A folio of holes alone goes.
    fn drop_folio_if_unused(&mut self, region: usize) {
        let pages = self.pages_of(region);
        let is_hole = |slot| HugeWord::from_slot(slot).is_none_or(HugeWord::is_hole);
        let zero = self
            .folios
            .get(&region)
            .is_some_and(|parts| parts.iter().all(|&part| part == 0));
        if zero && pages.clone().all(|page| is_hole(self.slots.get(page))) {
            pages.for_each(|page| self.set(page, Slot::EMPTY));
            self.folios.remove(&region);
            self.held.remove(&region);
        }
    }

    fn pages_of(&self, region: usize) -> std::ops::Range<usize> {
        region * REGION..(region * REGION + REGION).min(self.len())
    }

    /// The pages of a region that lies within the VM as a whole.
    fn whole(&self, region: usize) -> Option<std::ops::Range<usize>> {
        Some(self.pages_of(region)).filter(|pages| pages.len() == REGION)
    }

    fn resize(&mut self, pages: usize) {
        if pages < self.len() {
            self.punch(pages..self.len(), true);
            let cut = self.len() - pages;
            self.slots.0.truncate(pages);
            self.counts.remove_empty(cut as u64).unwrap();
        }
        self.counts.add_empty((pages - self.len()) as u64).unwrap();
        self.slots
            .0
            .resize_with(pages, || SlotCell::new(Slot::EMPTY));
    }

    /// An untouched region becomes a folio of zeroes.
    fn become_huge(&mut self, region: usize) {
        let Some(pages) = self.whole(region) else {
            return;
        };
        if self.is_folio(pages.start)
            || !pages
                .clone()
                .all(|page| self.slots.get(page).state() == State::Empty)
        {
            return;
        }
        self.folios.insert(region, vec![0; REGION]);
        pages.for_each(|page| self.set(page, HugeWord::NEW.slot()));
    }

    fn split(&mut self, region: usize) {
        if self.held.contains(&region) {
            return;
        }
        let Some(parts) = self.folios.remove(&region) else {
            return;
        };
        for page in self.pages_of(region) {
            let Some(word) = HugeWord::from_slot(self.slots.get(page)) else {
                continue;
            };
            match parts[page % REGION] {
                0 if word.is_hole() => self.set(page, Slot::EMPTY),
                0 => self.set(page, Slot::ZERO),
                content => {
                    let pfn = self.frames.alloc(content);
                    self.set(page, Slot::private(pfn));
                    if let Some(hash) = word.hash() {
                        self.note(page, Slot::private(pfn).looked_at(Class::Unshared, hash));
                    }
                }
            }
        }
    }

    fn collapse(&mut self, region: usize) {
        let Some(pages) = self.whole(region) else {
            return;
        };
        let worth = Worth::of(pages.clone().map(|page| self.slots.get(page)), true);
        let free = pages.clone().all(|page| !self.pinned.contains(&page));
        if worth.and_mapped(REGION).is_err() || !free {
            return;
        }
        let parts = pages.clone().map(|page| self.read(page)).collect();
        assert!(self.folios.insert(region, parts).is_none());
        pages.for_each(|page| self.set(page, HugeWord::NEW.slot()));
    }

    /// Puts an object into the swap file, if it has room.
    fn stage(&mut self, content: u64, bytes: usize) -> Option<Place> {
        loop {
            let mut fill = match self.filling.take() {
                Some(fill) => fill,
                None => self.clusters.take()?,
            };
            if let Some(place) = self.clusters.place(&mut fill, 16 + bytes) {
                self.filling = Some(fill);
                self.places.put(place.payload(), content);
                return Some(place);
            }
            let cluster = fill.cluster();
            if self.clusters.seal(fill) {
                self.writing.push(cluster);
            }
        }
    }

    /// What is full was written.
    fn write_out(&mut self) {
        for cluster in self.writing.drain(..) {
            self.clusters.written(cluster);
        }
    }

    fn compress(&mut self, page: usize) {
        let slot = self.slots.get(page);
        if slot.state() != State::Private || self.pinned.contains(&page) {
            return;
        }
        let content = self.read(page);
        match packs(content) {
            Packs::Filled => self.set(page, Slot::filled(content as u32)),
            Packs::To(len) => {
                let address = 8 * self.objects.alloc(content);
                assert!(Slot::can_hold(address, len));
                self.set(page, Slot::compressed(address, len));
            }
            Packs::Not => {
                if let Some(place) = self.stage(content, PAGE_BYTES) {
                    self.set(page, Slot::swapped(place));
                }
            }
        }
    }

    /// A compressed page goes on to the swap file.
    fn evict(&mut self, page: usize) {
        let slot = self.slots.get(page);
        if slot.state() != State::Compressed {
            return;
        }
        if let Some(place) = self.stage(self.read(page), slot.object_len().into()) {
            self.set(page, Slot::swapped(place));
        }
    }

    /// A page leaves the swap file without being touched.
    fn put_back(&mut self, page: usize) {
        if self.slots.get(page).state() != State::Swapped {
            return;
        }
        let content = self.read(page);
        match packs(content) {
            Packs::To(len) => {
                let address = 8 * self.objects.alloc(content);
                self.set(page, Slot::compressed(address, len));
            }
            _ => self.fault(page),
        }
    }

    /// A shared page goes a step farther away, or a step back, for all its sharers.
    fn move_record(&mut self, nth: usize, away: bool) {
        let mut live = self.labels.keys().copied().collect::<Vec<_>>();
        live.sort_unstable();
        let Some(&id) = live.get(nth % live.len().max(1)) else {
            return;
        };
        let (form, content) = (
            self.records.get(id).unwrap().bytes.form,
            self.read_record(id),
        );
        let Packs::To(len) = packs(content) else {
            return;
        };
        let bytes = match (form, away) {
            // Whoever touched it since the last look keeps it.
            (Form::Frame, true) if !self.records.note_idle(id, true) => return,
            (Form::Frame, true) | (Form::Swapped, false) => {
                Bytes::compressed(self.objects.alloc(content))
            }
            (Form::Compressed, true) => match self.stage(content, len.into()) {
                Some(place) => Bytes::swapped(place.payload()),
                None => return,
            },
            (Form::Compressed, false) => return self.unpack_record(id),
            (Form::Frame, false) | (Form::Swapped, true) => return,
            (Form::Free, _) => unreachable!("a record in use"),
        };
        let old = self.records.put(id, bytes).unwrap();
        self.free_bytes(old);
    }

    /// A page that lost its hint is hashed again.
    fn forget(&self, page: u32) {
        if let Some(cell) = self.slots.0.get(page as usize) {
            cell.forget_stable();
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
                hint => hints::bits_of_entry(slots, hint),
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

    /// Notes a look at a page that has no equal, and leaves its hint.
    fn settle(&mut self, page: usize, looked: Slot, hash: u64) {
        let Machine {
            slots,
            catalog,
            pass,
            ..
        } = self;
        let mut evicted = None;
        hints::settle(
            looked,
            |slot| slots.0[page].note(slot),
            || {
                let purge = *pass % 2 == 1;
                let left = hints::leave(catalog, (hash, page as u32), purge, slots);
                evicted = left.evicted;
                left.placed
            },
        );
        if let Some(owner) = evicted {
            self.forget(owner);
        }
    }

    /// One look of the scanner.
    fn scan(&mut self, page: usize) {
        self.maintain();
        match self.slots.get(page).state() {
            State::Private => self.scan_private(page),
            State::Shared => self.scan_shared(page),
            State::Huge => self.survey(page),
            State::Empty | State::Zero | State::Compressed | State::Filled | State::Swapped => {}
        }
    }

    fn scan_private(&mut self, page: usize) {
        let slot = self.slots.get(page);
        let content = self.read(page);
        let hash = self.hash(content);
        if slot.is_stable() {
            assert_eq!(slot.tag(), hash as u16, "a stable page has changed");
            return;
        }
        if slot.skipped_in(self.pass, page as u64) {
            return;
        }
        if slot.class() != Class::Unchecked && slot.tag() != hash as u16 {
            let backoff = slot.backoff();
            let looked = slot.looked_at(Class::Volatile, hash);
            return self.note(page, looked.with_backoff(backoff));
        }
        let looked = slot
            .looked_at(Class::Unshared, hash)
            .with_backoff(slot.backoff().saturating_sub(1));
        if self.pinned.contains(&page) {
            self.note(page, looked);
        } else if content == 0 {
            self.set(page, Slot::ZERO);
        } else if !self.merge(page, content, hash) {
            self.settle(page, looked.with_stable(true), hash);
        }
    }

    /// Gives a lonely shared frame back; moves a sharer to an older record of the same content.
    fn scan_shared(&mut self, page: usize) {
        let slot = self.slots.get(page);
        let shared = self.records.get(slot.record()).unwrap();
        if shared.bytes.form != Form::Frame {
            return;
        }
        let content = self.read(page);
        if shared.sharers == 1 {
            let own = self.frames.alloc(content);
            return self.set(page, Slot::private(own).with_backoff(slot.backoff()));
        }
        let hash = self.labels[&slot.record()];
        let older = self.catalog.lookup(hash).find_map(|entry| match entry {
            Entry::Stable(id) if id < slot.record() && self.read_record(id) == content => Some(id),
            _ => None,
        });
        let joined = older.filter(|&id| self.records.add_sharer(id, self.max_sharers).is_ok());
        if let Some(id) = joined {
            self.set(page, Slot::shared(id).with_backoff(slot.backoff()));
        }
    }

    /// Looks at a part of a folio: what would a split gain?
    fn survey(&mut self, page: usize) {
        let Some(word) = HugeWord::from_slot(self.slots.get(page)) else {
            return;
        };
        let content = self.read(page);
        let hash = self.hash(content);
        if word.is_stable() && word.class() != PartClass::Zero {
            assert!(word.has_hash(hash), "a stable part has changed");
        }
        let stable = !self.held.contains(&(page / REGION));
        let looked = |class, stable| word.looked_at(class, hash).with_stable(stable).slot();
        if content == 0 {
            self.note(page, looked(PartClass::Zero, stable));
        } else if word.changed_to(hash) {
            self.note(page, looked(PartClass::Unique, false));
        } else if self.has_equal(page, hash) {
            self.note(page, looked(PartClass::Duplicate, stable));
        } else {
            self.settle(page, looked(PartClass::Unique, stable), hash);
        }
    }

    fn has_equal(&self, page: usize, hash: u64) -> bool {
        self.catalog.lookup(hash).any(|entry| match entry {
            Entry::Stable(id) => (self.labels[&id] ^ hash) & HugeWord::HASH_MASK == 0,
            Entry::Hint(other) if other as usize == page => false,
            Entry::Hint(other) => {
                let slot = self.slots.peek(other).unwrap_or(Slot::EMPTY);
                match HugeWord::from_slot(slot) {
                    Some(word) if word.has_hash(hash) => {
                        self.slots.0[other as usize].try_note(slot, word.with_twin().slot());
                        true
                    }
                    Some(_) => false,
                    None => is_hinted(slot, hash),
                }
            }
        })
    }

    fn merge(&mut self, page: usize, content: u64, hash: u64) -> bool {
        let candidates: Vec<Entry> = self.catalog.lookup(hash).collect();
        for candidate in candidates {
            match candidate {
                // Never the hash alone.
                Entry::Stable(id) => {
                    let equal = self.read_record(id) == content;
                    if equal && self.records.add_sharer(id, self.max_sharers).is_ok() {
                        self.set(page, Slot::shared(id));
                        return true;
                    }
                }
                Entry::Hint(other) if other as usize == page => {}
                Entry::Hint(other) => {
                    let slot = self.slots.peek(other).unwrap_or(Slot::EMPTY);
                    if !is_hinted(slot, hash) {
                        hints::take_back(&mut self.catalog, (hash, other), &self.slots);
                        continue;
                    }
                    let at = other as usize;
                    if self.pinned.contains(&at) || self.read(at) != content {
                        continue;
                    }
                    self.publish(hash, content, page, at);
                    return true;
                }
            }
        }
        false
    }

    /// Makes a shared frame of two pages, in place of the hint of the second.
    fn publish(&mut self, hash: u64, content: u64, page: usize, hinted: usize) {
        let fresh = self.frames.alloc(content);
        let id = self.records.alloc(fresh, 2).unwrap();
        assert_eq!(self.labels.insert(id, hash), None);
        if !self.catalog.promote(hash, hinted as u32, id) {
            match self.catalog.insert_stable(hash, id) {
                StableOutcome::Placed => {}
                StableOutcome::Evicted(owner) => self.forget(owner),
                StableOutcome::Refused => assert!(self.unlisted.insert(id)),
            }
        }
        for page in [page, hinted] {
            self.set(page, Slot::shared(id));
        }
    }

    fn scan_all(&mut self) {
        (0..self.len()).for_each(|page| self.scan(page));
        self.catalog.end_pass();
        self.pass += 1;
    }

    /// Breaks every share, as `run` 2 does.
    fn unshare(&mut self) {
        for page in 0..self.len() {
            if self.slots.get(page).state() == State::Shared {
                let own = self.frames.alloc(self.read(page));
                self.set(page, Slot::private(own));
            }
        }
        self.catalog.clear_hints();
        (0..self.len()).for_each(|page| self.forget(page as u32));
    }

    /// All books agree, and every page reads as `model` says.
    fn check(&self, model: &[u64]) {
        assert_eq!(self.len(), model.len());
        let mut counts = Counts::new();
        let mut sharers: HashMap<u32, u32> = HashMap::new();
        let mut owned = Owned::default();
        for (page, &content) in model.iter().enumerate() {
            let slot = self.slots.get(page);
            assert_eq!(self.read(page), content, "page {page}");
            counts.pages[Self::count(slot) as usize] += 1;
            match slot.state() {
                State::Empty | State::Zero | State::Filled => {}
                State::Private => owned.add(Form::Frame, slot.payload()),
                State::Shared => *sharers.entry(slot.record()).or_default() += 1,
                State::Huge => assert!(self.is_folio(page)),
                State::Compressed => owned.add(Form::Compressed, slot.object_address() / 8),
                State::Swapped => owned.add(Form::Swapped, slot.place().payload()),
            }
            self.check_hint(page, slot, content);
        }
        assert_eq!(counts, self.counts);
        assert_eq!(counts.total(), model.len() as u64);
        for (&id, &of) in &sharers {
            let shared = self.records.get(id).unwrap();
            assert_eq!(shared.sharers, of);
            owned.add(shared.bytes.form, shared.bytes.payload);
            let hash = self.labels[&id];
            assert_eq!(hash, self.hash(self.read_record(id)));
            let listed = self
                .catalog
                .lookup(hash)
                .any(|entry| entry == Entry::Stable(id));
            assert_eq!(listed, !self.unlisted.contains(&id));
        }
        let kept = [
            (Form::Frame, &self.frames),
            (Form::Compressed, &self.objects),
            (Form::Swapped, &self.places),
        ];
        for (form, things) in kept {
            assert_eq!(
                owned.of(form),
                things.content.len(),
                "{form:?}s that nobody owns"
            );
        }
        assert_eq!(self.clusters.live(), self.places.content.len() as u64);
        self.check_records(&sharers);
        for region in self.folios.keys() {
            let huge = |page| self.slots.get(page).state() == State::Huge;
            assert!(self.pages_of(*region).any(huge), "a folio without a part");
        }
    }

    /// What is not hashed again can be found.
    fn check_hint(&self, page: usize, slot: Slot, content: u64) {
        let relies = match HugeWord::from_slot(slot) {
            Some(word) => word.is_stable() && word.class() == PartClass::Unique,
            None => slot.state() == State::Private && slot.is_stable(),
        };
        if relies {
            let own = Entry::Hint(page as u32);
            let hinted = (self.catalog.lookup(self.hash(content))).any(|entry| entry == own);
            assert!(hinted, "page {page} is stable, and has no hint");
        }
    }

    fn check_records(&self, sharers: &HashMap<u32, u32>) {
        let in_form = |form| {
            let is = |id: &&u32| self.records.get(**id).unwrap().bytes.form == form;
            sharers.keys().filter(is).count() as u64
        };
        assert_eq!(self.records.len(), sharers.len() as u64);
        assert_eq!(self.records.compressed(), in_form(Form::Compressed));
        assert_eq!(self.records.swapped(), in_form(Form::Swapped));
        assert_eq!(self.labels.len(), sharers.len());
        let shared = self.counts.get(counts::Class::Shared);
        assert_eq!(self.records.sharers(), shared);
        assert_eq!(self.records.pages_sharing(), shared - sharers.len() as u64);
        let listed = self.labels.len() - self.unlisted.len();
        assert_eq!(self.catalog.stable_entries(), listed as u64);
    }

    /// Frames that equal contents could do without.
    fn unmerged(&self) -> usize {
        let contents: HashSet<u64> = self.frames.content.values().copied().collect();
        self.frames.content.len() - contents.len()
    }

    fn states(&self) -> Vec<State> {
        self.slots
            .0
            .iter()
            .map(|cell| cell.peek().state())
            .collect()
    }
}

/// Whether the slot's page left a hint that can be of this hash.
fn is_hinted(slot: Slot, hash: u64) -> bool {
    slot.state() == State::Private && slot.class() == Class::Unshared && slot.tag() == hash as u16
}

/// What slots and records own; nothing is owned twice.
#[derive(Default)]
struct Owned(HashSet<(u8, u64)>);

impl Owned {
    fn add(&mut self, form: Form, id: u64) {
        assert!(
            self.0.insert((form as u8, id)),
            "{form:?} {id} is owned twice"
        );
    }

    fn of(&self, form: Form) -> usize {
        self.0
            .iter()
            .filter(|(kind, _)| *kind == form as u8)
            .count()
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
    Touch {
        page: usize,
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
    Hold {
        region: usize,
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
    BecomeHuge {
        region: usize,
    },
    Split {
        region: usize,
    },
    Collapse {
        region: usize,
    },
    Compress {
        page: usize,
        pages: usize,
    },
    Evict {
        page: usize,
        pages: usize,
    },
    PutBack {
        page: usize,
        pages: usize,
    },
    WriteOut,
    MoveRecord {
        nth: usize,
        away: bool,
    },
    MoveAll {
        away: bool,
    },
}

const REGIONS: usize = 3;
const PAGES: usize = REGIONS * REGION;

fn op() -> impl Strategy<Value = Op> {
    let page = || 0..PAGES;
    let region = || 0..REGIONS;
    let few = || 1usize..400;
    // Whole regions now and then.
    let range = || {
        prop_oneof![
            6 => (page(), few()),
            1 => region().prop_map(|region| (region * REGION, REGION)),
            1 => Just((0, PAGES)),
        ]
    };
    // Few contents that many pages have, and many that few have; 0 is a zero page.
    let content = || prop_oneof![0u64..8, 0u64..100_000];
    let memory = prop_oneof![
        8 => (page(), content()).prop_map(|(page, content)| Op::Write { page, content }),
        6 => (range(), content())
            .prop_map(|((page, pages), content)| Op::WriteRange { page, pages, content }),
        6 => (page(), page(), few()).prop_map(|(from, to, pages)| Op::Copy { from, to, pages }),
        3 => range().prop_map(|(page, pages)| Op::Touch { page, pages }),
        3 => range().prop_map(|(page, pages)| Op::Punch { page, pages }),
        1 => (1..=PAGES).prop_map(|pages| Op::Resize { pages }),
        1 => Just(Op::Resize { pages: PAGES }),
        2 => page().prop_map(|page| Op::Pin { page }),
        1 => region().prop_map(|region| Op::Hold { region }),
        1 => Just(Op::UnpinAll),
    ];
    let module = prop_oneof![
        4 => range().prop_map(|(page, pages)| Op::Scan { page, pages }),
        6 => Just(Op::ScanAll),
        1 => (2u32..9).prop_map(|max| Op::MaxSharers { max }),
        1 => Just(Op::Unshare),
        3 => region().prop_map(|region| Op::BecomeHuge { region }),
        3 => region().prop_map(|region| Op::Split { region }),
        3 => region().prop_map(|region| Op::Collapse { region }),
        4 => range().prop_map(|(page, pages)| Op::Compress { page, pages }),
        4 => range().prop_map(|(page, pages)| Op::Evict { page, pages }),
        2 => range().prop_map(|(page, pages)| Op::PutBack { page, pages }),
        2 => Just(Op::WriteOut),
        2 => (any::<usize>(), any::<bool>())
            .prop_map(|(nth, away)| Op::MoveRecord { nth, away }),
        4 => prop::bool::weighted(0.75).prop_map(|away| Op::MoveAll { away }),
    ];
    prop_oneof![memory, module]
}

/// What the VM's pages should read as.
struct Model(Vec<u64>);

impl Model {
    /// Does `op` on both.
    fn step(&mut self, machine: &mut Machine, op: &Op) {
        let model = &mut self.0;
        let len = model.len();
        let range = |page: usize, pages: usize| page.min(len)..(page + pages).min(len);
        match *op {
            Op::Write { page, content } => {
                for page in range(page, 1) {
                    machine.write(page, content);
                    model[page] = content;
                }
            }
            Op::WriteRange {
                page,
                pages,
                content,
            } => {
                for page in range(page, pages) {
                    let content = match page {
                        // A few pages are zero, others repeat themselves, or have no equal.
                        _ if page % 67 == 0 => 0,
                        _ if content < 8 => content + page as u64 % 97,
                        _ => content + page as u64,
                    };
                    machine.write(page, content);
                    model[page] = content;
                }
            }
            Op::Copy { from, to, pages } => {
                for (from, to) in range(from, pages).zip(range(to, pages)) {
                    machine.write(to, machine.read(from));
                    model[to] = model[from];
                }
            }
            Op::Touch { page, pages } => range(page, pages).for_each(|page| machine.fault(page)),
            Op::Punch { page, pages } => {
                machine.punch(range(page, pages), false);
                model[range(page, pages)].fill(0);
            }
            Op::Resize { pages } => {
                machine.resize(pages);
                model.resize(pages, 0);
            }
            Op::Pin { page } => {
                let state = range(page, 1)
                    .next()
                    .map(|page| machine.slots.get(page).state());
                if state == Some(State::Private) {
                    machine.forget(page as u32);
                    machine.pinned.insert(page);
                }
            }
            Op::Hold { region } => {
                if machine.folios.contains_key(&region) {
                    machine
                        .pages_of(region)
                        .for_each(|page| machine.forget(page as u32));
                    machine.held.insert(region);
                }
            }
            Op::UnpinAll => {
                machine.pinned.clear();
                machine.held.clear();
            }
            Op::Scan { page, pages } => range(page, pages).for_each(|page| machine.scan(page)),
            Op::ScanAll => machine.scan_all(),
            Op::MaxSharers { max } => machine.max_sharers = max,
            Op::Unshare => machine.unshare(),
            Op::BecomeHuge { region } => machine.become_huge(region),
            Op::Split { region } => machine.split(region),
            Op::Collapse { region } => machine.collapse(region),
            Op::Compress { page, pages } => {
                range(page, pages).for_each(|page| machine.compress(page));
            }
            Op::Evict { page, pages } => range(page, pages).for_each(|page| machine.evict(page)),
            Op::PutBack { page, pages } => {
                range(page, pages).for_each(|page| machine.put_back(page));
            }
            Op::WriteOut => machine.write_out(),
            Op::MoveRecord { nth, away } => machine.move_record(nth, away),
            Op::MoveAll { away } => {
                (0..machine.labels.len()).for_each(|nth| machine.move_record(nth, away));
            }
        }
    }

    /// Whether `op` may take a page of this content from one state to another.
    fn allows(op: &Op, before: State, after: State, content: u64) -> bool {
        use State::{Compressed, Empty, Filled, Huge, Private, Shared, Swapped, Zero};
        let packed = matches!(before, Compressed | Filled | Swapped);
        match op {
            _ if before == after => true,
            Op::Write { .. } | Op::WriteRange { .. } | Op::Copy { .. } => {
                matches!((before, after), (Empty, Huge)) || before != Huge && after == Private
            }
            Op::Touch { .. } => {
                packed && after == Private || matches!((before, after), (Empty, Huge))
            }
            Op::Punch { .. } | Op::Resize { .. } => after == Empty,
            Op::Scan { .. } | Op::ScanAll => match (before, after) {
                (Private, Zero) => content == 0,
                (Private, Shared) => content != 0,
                (Shared, Private) => true,
                _ => false,
            },
            Op::Unshare => (before, after) == (Shared, Private),
            Op::BecomeHuge { .. } => (before, after) == (Empty, Huge),
            Op::Split { .. } => match (before, after) {
                (Huge, Empty | Zero) => content == 0,
                (Huge, Private) => content != 0,
                _ => false,
            },
            Op::Collapse { .. } => matches!((before, after), (Private | Zero, Huge)),
            Op::Compress { .. } => match (before, after) {
                (Private, Filled) => packs(content) == Packs::Filled,
                (Private, Compressed) => matches!(packs(content), Packs::To(_)),
                (Private, Swapped) => packs(content) == Packs::Not,
                _ => false,
            },
            Op::Evict { .. } => (before, after) == (Compressed, Swapped),
            Op::PutBack { .. } => matches!((before, after), (Swapped, Compressed | Private)),
            // These do nothing to a slot: what a record's page is made of is the record's affair.
            Op::Pin { .. } | Op::Hold { .. } | Op::UnpinAll | Op::MaxSharers { .. } => false,
            Op::WriteOut | Op::MoveRecord { .. } | Op::MoveAll { .. } => false,
        }
    }

    /// The states that `op` took the pages to are those that it may.
    fn check(&self, op: &Op, before: &[State], after: &[State]) {
        for (page, (&before, &after)) in before.iter().zip(after).enumerate() {
            let content = self.0[page];
            assert!(
                Self::allows(op, before, after, content),
                "{op:?} took page {page} from {before:?} to {after:?}"
            );
            if before != State::Shared && after == State::Shared {
                let other = |(other, &equal): (usize, &u64)| other != page && equal == content;
                assert!(
                    self.0.iter().enumerate().any(other),
                    "page {page} shares with nobody"
                );
            }
        }
        // What came is untouched.
        let came = after.get(before.len()..).unwrap_or(&[]);
        assert!(came.iter().all(|&state| state == State::Empty));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn agrees_with_the_model(
        ops in prop::collection::vec(op(), 1..100),
        hash_mask in prop_oneof![4 => Just(u64::MAX), 1 => Just(0xff_00ff), 1 => Just(0)],
        catalog_pages in 1usize..8,
    ) {
        let mut machine = Machine::new(hash_mask, catalog_pages);
        machine.resize(PAGES);
        let mut model = Model(vec![0u64; PAGES]);
        for op in &ops {
            let before = machine.states();
            model.step(&mut machine, op);
            machine.check(&model.0);
            model.check(op, &before, &machine.states());
        }
        // Left alone, with room and honest hashes, all that is equal comes together.
        machine.pinned.clear();
        machine.held.clear();
        machine.max_sharers = 1 << 20;
        machine.catalog_pages = 64;
        (0..REGIONS).for_each(|region| machine.split(region));
        (0..machine.len()).for_each(|page| machine.fault(page));
        machine.unshare();
        (0..20).for_each(|_| machine.scan_all());
        machine.check(&model.0);
        if hash_mask == u64::MAX && machine.unlisted.is_empty() {
            prop_assert_eq!(machine.unmerged(), 0);
        }
        // And nothing is left of it in the end.
        machine.resize(0);
        machine.check(&[]);
        machine.write_out();
        let filling = u32::from(machine.filling.is_some());
        prop_assert_eq!(machine.clusters.free() + filling, CLUSTERS);
    }
}

/// The operations are such that every state is come by, and every way between two.
#[test]
fn the_operations_reach_every_state() {
    use proptest::{strategy::ValueTree, test_runner::TestRunner};
    let mut runner = TestRunner::deterministic();
    let ops = prop::collection::vec(op(), 400..401);
    let mut ways = HashSet::new();
    let mut forms = HashSet::new();
    for _ in 0..8 {
        let mut machine = Machine::new(u64::MAX, 4);
        machine.resize(PAGES);
        let mut model = Model(vec![0u64; PAGES]);
        for op in ops.new_tree(&mut runner).unwrap().current() {
            let before = machine.states();
            model.step(&mut machine, &op);
            let after = machine.states();
            let pairs = before
                .iter()
                .zip(&after)
                .filter(|(before, after)| before != after);
            ways.extend(pairs.map(|(before, after)| format!("{before:?} to {after:?}")));
            let records = machine.labels.keys();
            forms.extend(records.map(|&id| machine.records.get(id).unwrap().bytes.form as u8));
        }
    }
    let expected = [
        "Empty to Private",
        "Empty to Huge",
        "Zero to Private",
        "Zero to Huge",
        "Zero to Empty",
        "Private to Empty",
        "Private to Zero",
        "Private to Shared",
        "Private to Huge",
        "Private to Compressed",
        "Private to Filled",
        "Private to Swapped",
        "Shared to Private",
        "Shared to Empty",
        "Huge to Private",
        "Huge to Zero",
        "Huge to Empty",
        "Compressed to Private",
        "Compressed to Swapped",
        "Compressed to Empty",
        "Filled to Private",
        "Filled to Empty",
        "Swapped to Private",
        "Swapped to Compressed",
        "Swapped to Empty",
    ];
    let mut ways = ways.into_iter().collect::<Vec<_>>();
    ways.sort_unstable();
    let mut all = expected.map(String::from).to_vec();
    all.sort_unstable();
    assert_eq!(ways, all);
    assert_eq!(forms.len(), 3, "forms of a shared page");
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
