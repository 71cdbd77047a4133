// SPDX-License-Identifier: GPL-2.0

//! The slot machine: slot words, hints, catalog, records, clusters and counts put together as the module
//! does it, driven by random operations beside a model that only knows what each page should read as,
//! which states an operation may take it to, and who may share with whom.
//!
//! Three VMs in two domains share by rules that change. Any request for memory, and any read and write of
//! the swap file, may be refused: then a page may be out of reach for now, or a change may not come
//! about, but nothing is lost.
//!
//! A page's content is one number here, its hash a function of it that may be made to collide. What
//! becomes of it when it is compressed is a function of it as well.

use super::{
    catalog::{self, Catalog, Entry, GroupPage, PageStore, StableOutcome},
    cell::SlotCell,
    clusters::{Cluster, Clusters, Fill, Phase, Place},
    counts::{self, Counts},
    hints::{self, Pages},
    huge::{HugeWord, PartClass, Worth},
    records::{Bytes, Dropped, Form, RecordPage, RecordStore, Records},
    scope::{Group, Scope},
    slot::{Class, Slot, State},
    tunables::ShareScope,
};
use proptest::prelude::*;
use std::{
    cell::Cell,
    collections::{HashMap, HashSet},
    ops::Range,
};

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

/// What may be refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    /// A frame of 4 KiB.
    Frame,
    /// A folio of 2 MiB.
    Folio,
    /// An object in a pool.
    Object,
    /// A page of the index.
    Index,
    /// The write of a cluster.
    Write,
    /// The read of one.
    Read,
}

impl Kind {
    const ALL: [Kind; 6] = [
        Kind::Frame,
        Kind::Folio,
        Kind::Object,
        Kind::Index,
        Kind::Write,
        Kind::Read,
    ];
}

/// Of each kind, which request from now on is refused, and whether all that follow are.
#[derive(Default)]
struct Refusals {
    armed: [Cell<Option<(u32, bool)>>; Kind::ALL.len()],
    /// How many were.
    happened: [Cell<u32>; Kind::ALL.len()],
}

impl Refusals {
    fn arm(&self, kind: Kind, after: u32, often: bool) {
        self.armed[kind as usize].set(Some((after, often)));
    }

    fn disarm(&self) {
        self.armed.iter().for_each(|armed| armed.set(None));
    }

    /// Makes a request.
    fn refuses(&self, kind: Kind) -> bool {
        let armed = &self.armed[kind as usize];
        match armed.get() {
            None => return false,
            Some((0, often)) => armed.set(Some((0, true)).filter(|_| often)),
            Some((left, often)) => {
                armed.set(Some((left - 1, often)));
                return false;
            }
        }
        let happened = &self.happened[kind as usize];
        happened.set(happened.get() + 1);
        true
    }
}

/// Bits of a content that lie in a quarter of the page, from a quarter on.
fn quarters_from(quarter: usize) -> u64 {
    u64::MAX
        .checked_shl(8 * quarter as u32)
        .filter(|_| quarter < 4)
        .unwrap_or(0)
}

/// One virtual machine.
struct Vm {
    /// Its first page, at the start of a region.
    start: usize,
    len: usize,
    counts: Counts,
    domain: u32,
    shares: bool,
    scope: Scope,
}

/// A change to who shares with whom.
#[derive(Clone, Copy, Debug)]
enum Change {
    ShareScope(ShareScope),
    Domain(usize, u32),
    Share(usize, bool),
    Unshare,
}

/// The words of all VMs' pages. The place of a page is its id.
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

/// A host with its VMs.
struct Machine {
    vms: Vec<Vm>,
    share_scope: ShareScope,
    refusals: Refusals,
    /// Changes that were refused.
    turned_down: u32,
    slots: Words,
    /// The parts of the regions that are one folio.
    folios: HashMap<usize, Vec<u64>>,
    pinned: HashSet<usize>,
    /// Regions whose folio is held.
    held: HashSet<usize>,
    frames: Things,
    /// Compressed pages, by their address in units of eight bytes.
    objects: Things,
    /// What is in the swap file, by place.
    places: Things,
    clusters: Clusters<Vec<Cluster>>,
    filling: Option<Fill>,
    writing: Vec<u32>,
    records: Records<Boxed<RecordPage>>,
    /// The hash and the scope that a record was published under.
    labels: HashMap<u32, (u64, Scope)>,
    /// Records that the catalog has no entry for.
    unlisted: HashSet<u32>,
    catalog: Catalog<Boxed<GroupPage>>,
    catalog_pages: usize,
    hash_mask: u64,
    max_sharers: u32,
    pass: u64,
}

impl Machine {
    /// VMs of no pages yet that have room for so many, each in a domain.
    fn new(hash_mask: u64, catalog_pages: usize, vms: &[(usize, u32)]) -> Self {
        let mut machine = Machine {
            vms: Vec::new(),
            share_scope: ShareScope::Domain,
            refusals: Refusals::default(),
            turned_down: 0,
            slots: Words(Vec::new()),
            folios: HashMap::new(),
            pinned: HashSet::new(),
            held: HashSet::new(),
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
        for &(room, domain) in vms {
            let start = machine.slots.0.len();
            let end = start + room.next_multiple_of(REGION);
            let empty = || SlotCell::new(Slot::EMPTY);
            machine.slots.0.resize_with(end, empty);
            machine.vms.push(Vm {
                start,
                len: 0,
                counts: Counts::new(),
                domain,
                shares: true,
                scope: Scope::of_domain(domain),
            });
        }
        machine.catalog.store_mut().0.push(Box::default());
        assert_eq!(machine.clusters.add(CLUSTERS), CLUSTERS);
        machine
    }

    /// One VM, alone in its domain.
    fn with_one_vm(hash_mask: u64, catalog_pages: usize, pages: usize) -> Self {
        let mut machine = Self::new(hash_mask, catalog_pages, &[(pages, 0)]);
        machine.resize(0, pages);
        machine
    }

    fn hash(&self, content: u64, scope: Scope) -> u64 {
        mix(content ^ mix(scope.0.into())) & self.hash_mask
    }

    fn vm_of(&self, page: usize) -> usize {
        let before = |vm: &Vm| vm.start <= page;
        self.vms.iter().rposition(before).unwrap()
    }

    fn scope_of(&self, page: usize) -> Scope {
        self.vms[self.vm_of(page)].scope
    }

    /// The pages of a VM.
    fn pages_of_vm(&self, vm: usize) -> Range<usize> {
        let vm = &self.vms[vm];
        vm.start..vm.start + vm.len
    }

    /// All pages that there are.
    fn pages(&self) -> impl Iterator<Item = usize> + use<> {
        let all: Vec<_> = (0..self.vms.len()).map(|vm| self.pages_of_vm(vm)).collect();
        all.into_iter().flatten()
    }

    /// A frame, unless it is refused.
    fn frame(&mut self, content: u64) -> Option<u64> {
        (!self.refusals.refuses(Kind::Frame)).then(|| self.frames.alloc(content))
    }

    /// Objects have addresses in units of eight bytes.
    fn object(&mut self, content: u64) -> Option<u64> {
        (!self.refusals.refuses(Kind::Object)).then(|| self.objects.alloc(content))
    }

    /// Whether what lies there can be read now: from the buffer that it was put into, or the disk.
    fn is_readable(&self, place: Place) -> bool {
        let cluster = self.clusters.get(place.cluster()).unwrap();
        cluster.phase() != Phase::Written || !self.refusals.refuses(Kind::Read)
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
        let vm = self.vm_of(page);
        self.vms[vm]
            .counts
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
            let (hash, _) = self.labels.remove(&id).unwrap();
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

    /// The content of a page that is to come back; `None` while it cannot be read.
    fn load(&self, page: usize) -> Option<u64> {
        let slot = self.slots.get(page);
        let is_readable = slot.state() != State::Swapped || self.is_readable(slot.place());
        is_readable.then(|| self.read(page))
    }

    /// The same of a record.
    fn load_record(&self, id: u32) -> Option<u64> {
        let bytes = self.records.get(id).unwrap().bytes;
        let is_away = bytes.form == Form::Swapped;
        let is_readable = !is_away || self.is_readable(Place::from_payload(bytes.payload));
        is_readable.then(|| self.read_record(id))
    }

    /// A guest touches the page: from here on it is in memory, and mapped. False when it has to wait:
    /// then all is as it was.
    fn fault(&mut self, page: usize) -> bool {
        let slot = self.slots.get(page);
        match slot.state() {
            State::Empty if self.is_folio(page) => self.set(page, HugeWord::NEW.slot()),
            State::Empty | State::Zero => self.note(page, slot.with_zero_mapped()),
            State::Private | State::Huge => {}
            State::Shared => return self.unpack_record(slot.record()),
            State::Compressed | State::Filled | State::Swapped => {
                let content = self.load(page);
                let Some(pfn) = content.and_then(|content| self.frame(content)) else {
                    return false;
                };
                self.set(page, Slot::private(pfn));
            }
        }
        true
    }

    /// The page of a record comes back, for all its sharers. False when it cannot.
    fn unpack_record(&mut self, id: u32) -> bool {
        self.records.note_idle(id, false);
        if self.records.get(id).unwrap().bytes.form != Form::Frame {
            let content = self.load_record(id);
            let Some(pfn) = content.and_then(|content| self.frame(content)) else {
                return false;
            };
            let old = self.records.put(id, Bytes::frame(pfn)).unwrap();
            self.free_bytes(old);
        }
        true
    }

    /// False when the write has to wait.
    fn write(&mut self, page: usize, content: u64) -> bool {
        if !self.fault(page) {
            return false;
        }
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
                let Some(pfn) = self.frame(content) else {
                    return false;
                };
                self.set(page, Slot::private(pfn).with_backoff(backoff));
            }
        }
        true
    }

    /// A hole or an end that leaves the bits of `mask` of a page. False when it could not be.
    fn cut(&mut self, page: usize, mask: u64) -> bool {
        match self.slots.get(page).state() {
            State::Empty | State::Zero => true,
            _ => self.fault(page) && self.write(page, self.read(page) & mask),
        }
    }

    /// Punches a hole, or (`cut`) lets the pages go that are beyond the end from here on.
    fn punch(&mut self, pages: Range<usize>, cut: bool) {
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

    fn pages_of(&self, region: usize) -> Range<usize> {
        let start = region * REGION;
        let end = self.pages_of_vm(self.vm_of(start)).end;
        start..(start + REGION).min(end).max(start)
    }

    /// The pages of a region that lies within its VM as a whole.
    fn whole(&self, region: usize) -> Option<Range<usize>> {
        Some(self.pages_of(region)).filter(|pages| pages.len() == REGION)
    }

    fn resize(&mut self, vm: usize, pages: usize) {
        let now = self.pages_of_vm(vm);
        if pages < now.len() {
            self.punch(now.start + pages..now.end, true);
            self.vms[vm].len = pages;
            let cut = (now.len() - pages) as u64;
            self.vms[vm].counts.remove_empty(cut).unwrap();
        } else {
            self.vms[vm].len = pages;
            let came = (pages - now.len()) as u64;
            self.vms[vm].counts.add_empty(came).unwrap();
        }
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
            || self.refusals.refuses(Kind::Folio)
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
        let Some(parts) = self.folios.get(&region) else {
            return;
        };
        // All that it takes is there before, or nothing happens.
        let (needed, mut frames) = (parts.iter().filter(|part| **part != 0).count(), Vec::new());
        while frames.len() < needed {
            match self.frame(0) {
                Some(pfn) => frames.push(pfn),
                None => return frames.into_iter().for_each(|pfn| self.frames.free(pfn)),
            }
        }
        let parts = self.folios.remove(&region).unwrap();
        for page in self.pages_of(region) {
            let Some(word) = HugeWord::from_slot(self.slots.get(page)) else {
                continue;
            };
            match parts[page % REGION] {
                0 if word.is_hole() => self.set(page, Slot::EMPTY),
                0 => self.set(page, Slot::ZERO),
                content => {
                    let pfn = frames.pop().unwrap();
                    self.frames.content.insert(pfn, content);
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
        if worth.and_mapped(REGION).is_err() || !free || self.refusals.refuses(Kind::Folio) {
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

    /// What is full is written. What cannot be comes back, as far as there is memory.
    fn write_out(&mut self) {
        for cluster in std::mem::take(&mut self.writing) {
            if self.refusals.refuses(Kind::Write) {
                self.empty_cluster(cluster);
                let live = self.clusters.get(cluster).unwrap().live();
                if live > 0 {
                    self.writing.push(cluster);
                    continue;
                }
            }
            self.clusters.written(cluster);
        }
    }

    fn empty_cluster(&mut self, cluster: u32) {
        for page in self.pages() {
            let slot = self.slots.get(page);
            if slot.state() == State::Swapped && slot.place().cluster() == cluster {
                self.put_back(page);
            }
        }
        for id in self.live_records() {
            let bytes = self.records.get(id).unwrap().bytes;
            let place = Place::from_payload(bytes.payload);
            if bytes.form == Form::Swapped && place.cluster() == cluster {
                self.move_record(id, false);
            }
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
                let Some(object) = self.object(content) else {
                    return;
                };
                assert!(Slot::can_hold(8 * object, len));
                self.set(page, Slot::compressed(8 * object, len));
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
        let Some(content) = self.load(page) else {
            return;
        };
        match packs(content) {
            Packs::To(len) => {
                if let Some(object) = self.object(content) {
                    self.set(page, Slot::compressed(8 * object, len));
                }
            }
            _ => {
                self.fault(page);
            }
        }
    }

    fn live_records(&self) -> Vec<u32> {
        let mut live = self.labels.keys().copied().collect::<Vec<_>>();
        live.sort_unstable();
        live
    }

    /// A shared page goes a step farther away, or a step back, for all its sharers.
    fn move_record(&mut self, id: u32, away: bool) {
        let form = self.records.get(id).unwrap().bytes.form;
        let Some(content) = self.load_record(id) else {
            return;
        };
        let Packs::To(len) = packs(content) else {
            return;
        };
        let bytes = match (form, away) {
            // Whoever touched it since the last look keeps it.
            (Form::Frame, true) if !self.records.note_idle(id, true) => return,
            (Form::Frame, true) | (Form::Swapped, false) => match self.object(content) {
                Some(object) => Bytes::compressed(object),
                None => return,
            },
            (Form::Compressed, true) => match self.stage(content, len.into()) {
                Some(place) => Bytes::swapped(place.payload()),
                None => return,
            },
            (Form::Compressed, false) => {
                self.unpack_record(id);
                return;
            }
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
        while self.records.wants_page() && !self.refusals.refuses(Kind::Index) {
            self.records.store_mut().0.push(Box::default());
        }
        while self.catalog.wants_growth() {
            if self.catalog.wants_page() {
                let is_full = self.catalog.bytes() / 4096 >= self.catalog_pages as u64;
                if is_full || self.refusals.refuses(Kind::Index) {
                    return;
                }
                self.catalog.store_mut().0.push(Box::default());
            }
            let (slots, labels) = (&self.slots, &self.labels);
            let grown = self.catalog.grow_step(&mut |entry| match entry {
                Entry::Stable(id) => labels.get(&id).map(|&(hash, _)| hash as u16),
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
        if self.scope_of(page) == Scope::NONE {
            return;
        }
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
        let hash = self.hash(content, self.scope_of(page));
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
        } else {
            match self.merge(page, content, hash) {
                Merge::Done => {}
                Merge::NotNow => self.note(page, looked),
                Merge::Unique => self.settle(page, looked.with_stable(true), hash),
            }
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
            if let Some(own) = self.frame(content) {
                self.set(page, Slot::private(own).with_backoff(slot.backoff()));
            }
            return;
        }
        let (hash, scope) = self.labels[&slot.record()];
        assert_eq!(scope, self.scope_of(page));
        self.enter_again(slot.record(), hash);
        let older = self.catalog.lookup(hash).find_map(|entry| match entry {
            Entry::Stable(id) if id >= slot.record() || self.labels[&id].1 != scope => None,
            Entry::Stable(id) if self.records.get(id).unwrap().bytes.form != Form::Frame => None,
            Entry::Stable(id) if self.read_record(id) == content => Some(id),
            _ => None,
        });
        let joined = older.filter(|&id| self.records.add_sharer(id, self.max_sharers).is_ok());
        if let Some(id) = joined {
            self.set(page, Slot::shared(id).with_backoff(slot.backoff()));
        }
    }

    /// A record that got no entry gets one if there is a place now.
    fn enter_again(&mut self, id: u32, hash: u64) {
        if self.unlisted.remove(&id) {
            self.enter(id, hash);
        }
    }

    fn enter(&mut self, id: u32, hash: u64) {
        match self.catalog.insert_stable(hash, id) {
            StableOutcome::Placed => {}
            StableOutcome::Evicted(owner) => self.forget(owner),
            StableOutcome::Refused => assert!(self.unlisted.insert(id)),
        }
    }

    /// Looks at a part of a folio: what would a split gain?
    fn survey(&mut self, page: usize) {
        let Some(word) = HugeWord::from_slot(self.slots.get(page)) else {
            return;
        };
        let content = self.read(page);
        let hash = self.hash(content, self.scope_of(page));
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
        let scope = self.scope_of(page);
        self.catalog.lookup(hash).any(|entry| match entry {
            Entry::Stable(id) => {
                let (label, published) = self.labels[&id];
                published == scope && (label ^ hash) & HugeWord::HASH_MASK == 0
            }
            Entry::Hint(other) if other as usize == page => false,
            Entry::Hint(other) if self.scope_of(other as usize) != scope => false,
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

    fn merge(&mut self, page: usize, content: u64, hash: u64) -> Merge {
        let scope = self.scope_of(page);
        let mut nothing = Merge::Unique;
        let candidates: Vec<Entry> = self.catalog.lookup(hash).collect();
        for candidate in candidates {
            match candidate {
                // The hash of another scope's page may be the same by chance.
                Entry::Stable(id) if self.labels[&id].1 != scope => {}
                // Never the hash alone.
                Entry::Stable(id) => {
                    let is_packed = self.records.get(id).unwrap().bytes.form != Form::Frame;
                    if is_packed && self.refusals.refuses(Kind::Frame) {
                        nothing = Merge::NotNow;
                        continue;
                    }
                    let equal = self.load_record(id) == Some(content);
                    if equal && self.records.add_sharer(id, self.max_sharers).is_ok() {
                        self.set(page, Slot::shared(id));
                        return Merge::Done;
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
                    if self.scope_of(at) != scope {
                        continue;
                    }
                    if self.pinned.contains(&at) || self.records.wants_page() {
                        nothing = Merge::NotNow;
                        continue;
                    }
                    if self.read(at) != content {
                        continue;
                    }
                    if self.publish(hash, content, page, at) {
                        return Merge::Done;
                    }
                    nothing = Merge::NotNow;
                }
            }
        }
        nothing
    }

    /// Makes a shared frame of two pages, in place of the hint of the second. False without memory.
    fn publish(&mut self, hash: u64, content: u64, page: usize, hinted: usize) -> bool {
        let Some(fresh) = self.frame(content) else {
            return false;
        };
        let id = self.records.alloc(fresh, 2).unwrap();
        let label = (hash, self.scope_of(page));
        assert_eq!(self.labels.insert(id, label), None);
        if !self.catalog.promote(hash, hinted as u32, id) {
            self.enter(id, hash);
        }
        for page in [page, hinted] {
            self.set(page, Slot::shared(id));
        }
        true
    }

    fn scan_all(&mut self) {
        self.pages().for_each(|page| self.scan(page));
        self.catalog.end_pass();
        self.pass += 1;
    }

    /// The scope that a VM will have.
    fn scope_after(&self, change: Change, vm: usize) -> Scope {
        let Vm { domain, shares, .. } = self.vms[vm];
        let of = |scope, shares, domain| Scope::of(scope, shares, vm as u32, domain);
        match change {
            Change::ShareScope(scope) => of(scope, shares, domain),
            Change::Domain(moved, domain) if moved == vm => of(self.share_scope, shares, domain),
            Change::Share(changed, shares) if changed == vm => of(self.share_scope, shares, domain),
            Change::Unshare => Scope::NONE,
            _ => self.vms[vm].scope,
        }
    }

    /// Carries a change out, or changes no slot and no setting and says so.
    fn regroup(&mut self, change: Change) -> bool {
        let shared: Vec<(usize, u32)> = self
            .pages()
            .map(|page| (page, self.slots.get(page)))
            .filter(|(_, slot)| slot.state() == State::Shared)
            .map(|(page, slot)| (page, slot.record()))
            .collect();
        let after: Vec<Scope> = (0..self.vms.len())
            .map(|vm| self.scope_after(change, vm))
            .collect();
        let mut groups: HashMap<u32, Group> = HashMap::new();
        for &(page, id) in &shared {
            let group = groups.entry(id).or_insert(Group::Unseen);
            *group = group.with(after[self.vm_of(page)]);
        }
        // What is compressed and moves has another hash there, and another pool.
        for (&id, group) in &groups {
            if group.moves_from(self.labels[&id].1).is_some() && !self.unpack_record(id) {
                return false;
            }
        }
        let mut broken: Vec<(usize, u64)> = Vec::new();
        for &(page, id) in &shared {
            let published = Some(self.labels[&id].1);
            if groups[&id].breaks(after[self.vm_of(page)], published) {
                let content = self.load_record(id);
                let Some(own) = content.and_then(|content| self.frame(content)) else {
                    broken
                        .into_iter()
                        .for_each(|(_, own)| self.frames.free(own));
                    return false;
                };
                broken.push((page, own));
            }
        }
        for (page, own) in broken {
            self.set(page, Slot::private(own));
        }
        match change {
            Change::ShareScope(scope) => self.share_scope = scope,
            Change::Domain(vm, domain) => self.vms[vm].domain = domain,
            Change::Share(vm, shares) => self.vms[vm].shares = shares,
            Change::Unshare => return true,
        }
        self.rename(&groups);
        for (vm, scope) in after.into_iter().enumerate() {
            let is_other = core::mem::replace(&mut self.vms[vm].scope, scope) != scope;
            self.pages_of_vm(vm)
                .for_each(|page| self.forget_look(page, is_other));
        }
        true
    }

    /// Records whose sharers moved together are found under the new scope from here on.
    fn rename(&mut self, groups: &HashMap<u32, Group>) {
        self.catalog.clear_hints();
        for id in self.live_records() {
            let (old, published) = self.labels[&id];
            let group = groups.get(&id).copied().unwrap_or(Group::Unseen);
            if let Some(scope) = group.moves_from(published) {
                let listed = !self.unlisted.remove(&id);
                assert_eq!(self.catalog.remove(old, Entry::Stable(id)), listed);
                let hash = self.hash(self.read_record(id), scope);
                self.labels.insert(id, (hash, scope));
                self.enter(id, hash);
            }
        }
    }

    /// The hint is gone; what was noted of the page is void as well where its hash is `other`.
    fn forget_look(&self, page: usize, other: bool) {
        self.forget(page as u32);
        let slot = self.slots.get(page);
        match (other, HugeWord::from_slot(slot), slot.state()) {
            (true, Some(word), _) => self.note(page, word.forgotten().slot()),
            (true, None, State::Private) => {
                self.note(page, slot.looked_at(Class::Unchecked, 0));
            }
            _ => {}
        }
    }

    /// All books agree, and every page reads as `model` says.
    fn check(&self, model: &[u64]) {
        let mut counts = vec![Counts::new(); self.vms.len()];
        let mut sharers: HashMap<u32, u32> = HashMap::new();
        let mut owned = Owned::default();
        for page in self.pages() {
            let content = model[page];
            let slot = self.slots.get(page);
            assert_eq!(self.read(page), content, "page {page}");
            counts[self.vm_of(page)].pages[Self::count(slot) as usize] += 1;
            match slot.state() {
                State::Empty | State::Zero | State::Filled => {}
                State::Private => owned.add(Form::Frame, slot.payload()),
                State::Shared => {
                    *sharers.entry(slot.record()).or_default() += 1;
                    assert_eq!(self.labels[&slot.record()].1, self.scope_of(page));
                }
                State::Huge => assert!(self.is_folio(page)),
                State::Compressed => owned.add(Form::Compressed, slot.object_address() / 8),
                State::Swapped => owned.add(Form::Swapped, slot.place().payload()),
            }
            self.check_hint(page, slot, content);
        }
        for (vm, counts) in self.vms.iter().zip(&counts) {
            assert_eq!(*counts, vm.counts);
            assert_eq!(counts.total(), vm.len as u64);
        }
        for (&id, &of) in &sharers {
            let shared = self.records.get(id).unwrap();
            assert_eq!(shared.sharers, of);
            owned.add(shared.bytes.form, shared.bytes.payload);
            let (hash, scope) = self.labels[&id];
            assert_ne!(scope, Scope::NONE);
            assert_eq!(hash, self.hash(self.read_record(id), scope));
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
            let hash = self.hash(content, self.scope_of(page));
            let hinted = self.catalog.lookup(hash).any(|entry| entry == own);
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
        let of_vm = |vm: &Vm| vm.counts.get(counts::Class::Shared);
        let shared: u64 = self.vms.iter().map(of_vm).sum();
        assert_eq!(self.records.sharers(), shared);
        assert_eq!(self.records.pages_sharing(), shared - sharers.len() as u64);
        let listed = self.labels.len() - self.unlisted.len();
        assert_eq!(self.catalog.stable_entries(), listed as u64);
    }

    /// Frames that equal contents within one border could do without.
    fn unmerged(&self) -> usize {
        let (mut frames, mut contents) = (HashSet::new(), HashSet::new());
        for page in self.pages() {
            let (slot, scope) = (self.slots.get(page), self.scope_of(page));
            let owned = match slot.state() {
                State::Private => slot.payload(),
                State::Shared => self.records.get(slot.record()).unwrap().bytes.payload,
                _ => continue,
            };
            if scope != Scope::NONE {
                frames.insert(owned);
                contents.insert((scope, self.read(page)));
            }
        }
        frames.len() - contents.len()
    }

    fn words(&self) -> Vec<Slot> {
        self.slots.0.iter().map(SlotCell::peek).collect()
    }

    fn states(&self) -> Vec<State> {
        self.words().into_iter().map(Slot::state).collect()
    }
}

/// What became of an attempt to merge.
enum Merge {
    Done,
    /// There may be an equal page, but not now.
    NotNow,
    Unique,
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
    /// From a quarter of a page to another.
    Hole {
        page: usize,
        quarter: usize,
        quarters: usize,
    },
    Resize {
        vm: usize,
        quarters: usize,
    },
    Regroup {
        change: Change,
    },
    Refuse {
        kind: Kind,
        after: u32,
        often: bool,
    },
    RefuseNothing,
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

/// Room for pages, and domains.
const VMS: [(usize, u32); 3] = [(2 * REGION, 0), (REGION, 0), (REGION, 1)];
const REGIONS: usize = 4;
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
        3 => (page(), 0usize..4, 1usize..1600)
            .prop_map(|(page, quarter, quarters)| Op::Hole { page, quarter, quarters }),
        1 => (0..VMS.len(), 1..=4 * 2 * REGION)
            .prop_map(|(vm, quarters)| Op::Resize { vm, quarters }),
        1 => (0..VMS.len()).prop_map(|vm| Op::Resize { vm, quarters: 4 * VMS[vm].0 }),
        2 => page().prop_map(|page| Op::Pin { page }),
        1 => region().prop_map(|region| Op::Hold { region }),
        1 => Just(Op::UnpinAll),
    ];
    let module = prop_oneof![
        4 => range().prop_map(|(page, pages)| Op::Scan { page, pages }),
        6 => Just(Op::ScanAll),
        1 => (2u32..9).prop_map(|max| Op::MaxSharers { max }),
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
    let scope = prop::sample::select(
        &[
            ShareScope::Vm,
            ShareScope::Domain,
            ShareScope::Host,
            ShareScope::Host,
        ][..],
    );
    let change = prop_oneof![
        2 => scope.prop_map(Change::ShareScope),
        3 => (0..VMS.len(), 0u32..2).prop_map(|(vm, domain)| Change::Domain(vm, domain)),
        1 => (0..VMS.len(), prop::bool::weighted(0.7)).prop_map(|(vm, on)| Change::Share(vm, on)),
        1 => Just(Change::Unshare),
    ];
    // The index asks for memory while it grows, and never again.
    let kind = prop_oneof![
        5 => prop::sample::select(&Kind::ALL[..]),
        2 => Just(Kind::Index),
    ];
    let refused = (
        kind,
        prop_oneof![2 => 0u32..2, 1 => 2u32..80],
        prop::bool::weighted(0.3),
    );
    let host = prop_oneof![
        3 => change.prop_map(|change| Op::Regroup { change }),
        6 => refused.prop_map(|(kind, after, often)| Op::Refuse { kind, after, often }),
        1 => Just(Op::RefuseNothing),
    ];
    prop_oneof![5 => memory, 5 => module, 2 => host]
}

/// What the VMs' pages should read as, and who may share with whom.
struct Model {
    pages: Vec<u64>,
    share_scope: ShareScope,
    /// Domain and `share` of each VM.
    vms: Vec<(u32, bool)>,
}

impl Model {
    fn new() -> Self {
        Model {
            pages: vec![0; PAGES],
            share_scope: ShareScope::Domain,
            vms: VMS.iter().map(|&(_, domain)| (domain, true)).collect(),
        }
    }

    /// Whether pages of two VMs, or of one, may be one.
    fn may_share(&self, a: usize, b: usize) -> bool {
        let ((a_domain, a_shares), (b_domain, b_shares)) = (self.vms[a], self.vms[b]);
        let within = match self.share_scope {
            ShareScope::Vm => a == b,
            ShareScope::Domain => a_domain == b_domain,
            ShareScope::Host => true,
        };
        a_shares && b_shares && within
    }

    /// Does `op` on both.
    fn step(&mut self, machine: &mut Machine, op: &Op) {
        let model = &mut self.pages;
        // As far as the page's VM goes.
        let ends: Vec<usize> = (0..PAGES)
            .step_by(REGION)
            .map(|page| machine.pages_of_vm(machine.vm_of(page)).end)
            .collect();
        let range = |page: usize, pages: usize| {
            let end = ends[page / REGION];
            page.min(end)..(page + pages).min(end)
        };
        match *op {
            Op::Write { page, content } => {
                for page in range(page, 1) {
                    if machine.write(page, content) {
                        model[page] = content;
                    }
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
                    if machine.write(page, content) {
                        model[page] = content;
                    }
                }
            }
            Op::Copy { from, to, pages } => {
                for (from, to) in range(from, pages).zip(range(to, pages)) {
                    if machine.write(to, model[from]) {
                        model[to] = model[from];
                    }
                }
            }
            Op::Touch { page, pages } => range(page, pages).for_each(|page| {
                machine.fault(page);
            }),
            Op::Punch { page, pages } => {
                machine.punch(range(page, pages), false);
                model[range(page, pages)].fill(0);
            }
            Op::Hole {
                page: start,
                quarter,
                quarters,
            } => {
                let end = quarter + quarters;
                for page in range(start, end.div_ceil(4)) {
                    let at = |quarters: usize| quarters.saturating_sub(4 * (page - start));
                    let left = !quarters_from(at(quarter)) | quarters_from(at(end));
                    if left == 0 {
                        machine.punch(page..page + 1, false);
                        model[page] = 0;
                    } else if machine.cut(page, left) {
                        model[page] &= left;
                    }
                }
            }
            Op::Resize { vm, quarters } => {
                let quarters = quarters.min(4 * VMS[vm].0);
                let pages = quarters.div_ceil(4);
                let last = machine.pages_of_vm(vm).start + pages - 1;
                let left = !quarters_from(quarters - 4 * (pages - 1));
                let old = machine.pages_of_vm(vm).end;
                machine.resize(vm, pages);
                model[(last + 1).min(old)..old].fill(0);
                if last < old && machine.cut(last, left) {
                    model[last] &= left;
                }
            }
            Op::Regroup { change } => {
                let before = machine.states();
                if machine.regroup(change) {
                    match change {
                        Change::ShareScope(scope) => self.share_scope = scope,
                        Change::Domain(vm, domain) => self.vms[vm].0 = domain,
                        Change::Share(vm, shares) => self.vms[vm].1 = shares,
                        Change::Unshare => assert!(!machine.states().contains(&State::Shared)),
                    }
                } else {
                    machine.turned_down += 1;
                    assert_eq!(machine.states(), before, "a change that was refused");
                }
            }
            Op::Refuse { kind, after, often } => machine.refusals.arm(kind, after, often),
            Op::RefuseNothing => machine.refusals.disarm(),
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
            Op::MoveRecord { nth, away } => {
                let live = machine.live_records();
                if let Some(&id) = live.get(nth % live.len().max(1)) {
                    machine.move_record(id, away);
                }
            }
            Op::MoveAll { away } => {
                let live = machine.live_records();
                live.into_iter()
                    .for_each(|id| machine.move_record(id, away));
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
            Op::Punch { .. } => after == Empty,
            Op::Hole { .. } | Op::Resize { .. } => {
                let edge = packed || before == Shared;
                after == Empty || edge && after == Private
            }
            Op::Scan { .. } | Op::ScanAll => match (before, after) {
                (Private, Zero) => content == 0,
                (Private, Shared) => content != 0,
                (Shared, Private) => true,
                _ => false,
            },
            Op::Regroup { .. } => (before, after) == (Shared, Private),
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
            Op::WriteOut => matches!((before, after), (Swapped, Compressed | Private)),
            Op::Refuse { .. } | Op::RefuseNothing => false,
            Op::MoveRecord { .. } | Op::MoveAll { .. } => false,
        }
    }

    /// The states that `op` took the pages to are those that it may; who shares may.
    fn check(&self, machine: &Machine, op: &Op, before: &[Slot]) {
        let mut sharers: HashMap<u32, HashSet<usize>> = HashMap::new();
        for page in machine.pages() {
            let slot = machine.slots.get(page);
            let (content, vm) = (self.pages[page], machine.vm_of(page));
            let (was, is) = (before[page].state(), slot.state());
            assert!(
                Self::allows(op, was, is, content),
                "{op:?} took page {page} from {was:?} to {is:?}"
            );
            if is == State::Shared {
                sharers.entry(slot.record()).or_default().insert(vm);
            }
            if was != State::Shared && is == State::Shared {
                let other = |other: usize| {
                    let equal = other != page && self.pages[other] == content;
                    equal && self.may_share(vm, machine.vm_of(other))
                };
                assert!(machine.pages().any(other), "page {page} shares with nobody");
            }
        }
        for (id, vms) in &sharers {
            let apart = |a: &usize| vms.iter().any(|b| !self.may_share(*a, *b));
            assert!(!vms.iter().any(apart), "{vms:?} share record {id}");
        }
        if let Op::Regroup { change } = *op {
            self.check_broken(machine, change, before);
        }
    }

    /// No share was broken that could stay.
    fn check_broken(&self, machine: &Machine, change: Change, before: &[Slot]) {
        let mut sharers: HashMap<u32, HashSet<usize>> = HashMap::new();
        let shared = |page: usize| before[page].state() == State::Shared;
        for page in machine.pages().filter(|page| shared(*page)) {
            let of = sharers.entry(before[page].record()).or_default();
            of.insert(machine.vm_of(page));
        }
        for page in machine.pages().filter(|page| shared(*page)) {
            let broken = machine.slots.get(page).state() != State::Shared;
            let (vm, with) = (machine.vm_of(page), &sharers[&before[page].record()]);
            let has_to = with.iter().any(|other| !self.may_share(vm, *other));
            let all = matches!(change, Change::Unshare);
            assert!(
                !broken || all || has_to,
                "{change:?} broke the share of page {page}"
            );
        }
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
        let mut machine = machine(hash_mask, catalog_pages);
        let mut model = Model::new();
        for op in &ops {
            let before = machine.words();
            model.step(&mut machine, op);
            machine.check(&model.pages);
            model.check(&machine, op, &before);
        }
        // Left alone, with room and honest hashes, all that is equal comes together within its border.
        machine.refusals.disarm();
        machine.pinned.clear();
        machine.held.clear();
        machine.max_sharers = 1 << 20;
        machine.catalog_pages = 64;
        (0..REGIONS).for_each(|region| machine.split(region));
        machine.pages().for_each(|page| assert!(machine.fault(page)));
        prop_assert!(machine.regroup(Change::Unshare));
        // As in one of 64 passes: what has not changed may have got an equal that was stable as well.
        machine.pages().for_each(|page| machine.forget(page as u32));
        (0..20).for_each(|_| machine.scan_all());
        machine.check(&model.pages);
        if hash_mask == u64::MAX && machine.unlisted.is_empty() {
            prop_assert_eq!(machine.unmerged(), 0);
        }
        // And nothing is left of it in the end.
        (0..VMS.len()).for_each(|vm| machine.resize(vm, 0));
        machine.check(&[]);
        machine.write_out();
        let filling = u32::from(machine.filling.is_some());
        prop_assert_eq!(machine.clusters.free() + filling, CLUSTERS);
    }
}

/// All VMs, in full length.
fn machine(hash_mask: u64, catalog_pages: usize) -> Machine {
    let mut machine = Machine::new(hash_mask, catalog_pages, &VMS);
    for (vm, (pages, _)) in VMS.into_iter().enumerate() {
        machine.resize(vm, pages);
    }
    machine
}

/// The operations are such that every state is come by, and every way between two.
#[test]
fn the_operations_reach_every_state() {
    use proptest::{strategy::ValueTree, test_runner::TestRunner};
    let mut runner = TestRunner::deterministic();
    let ops = prop::collection::vec(op(), 400..401);
    let mut ways = HashSet::new();
    let mut forms = HashSet::new();
    let mut refused = HashSet::new();
    // VMs of one record, changes that broke shares, and those that were refused.
    let (mut across, mut broken, mut turned_down) = (HashSet::new(), 0, 0);
    for _ in 0..16 {
        let mut machine = machine(u64::MAX, 8);
        let mut model = Model::new();
        for op in ops.new_tree(&mut runner).unwrap().current() {
            let before = machine.states();
            model.step(&mut machine, &op);
            let after = machine.states();
            let pairs = before
                .iter()
                .zip(&after)
                .filter(|(before, after)| before != after);
            if let Op::Regroup { .. } = op {
                broken += usize::from(pairs.clone().count() > 0);
            }
            ways.extend(pairs.map(|(before, after)| format!("{before:?} to {after:?}")));
            let records = machine.labels.keys();
            forms.extend(records.map(|&id| machine.records.get(id).unwrap().bytes.form as u8));
            let mut vms: HashMap<u32, HashSet<usize>> = HashMap::new();
            for page in machine.pages() {
                let slot = machine.slots.get(page);
                if slot.state() == State::Shared {
                    vms.entry(slot.record())
                        .or_default()
                        .insert(machine.vm_of(page));
                }
            }
            across.extend(vms.values().map(HashSet::len));
        }
        turned_down += machine.turned_down;
        let happened = |kind: &Kind| machine.refusals.happened[*kind as usize].get() > 0;
        refused.extend(
            Kind::ALL
                .into_iter()
                .filter(happened)
                .map(|kind| kind as u8),
        );
    }
    assert_eq!(across, HashSet::from([1, 2, 3]), "VMs of a record");
    assert!(broken > 10 && turned_down > 0, "{broken} {turned_down}");
    assert_eq!(
        refused.len(),
        Kind::ALL.len(),
        "kinds that were refused: {refused:?}"
    );
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
    let mut machine = Machine::with_one_vm(u64::MAX, 64, 4000);
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
    let (pages, pairs) = (4000, 1000);
    let mut machine = Machine::with_one_vm(u64::MAX, 2, pages);
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
