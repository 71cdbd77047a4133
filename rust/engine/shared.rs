// SPDX-License-Identifier: GPL-2.0

//! The shared index: which content was met before, and the frames that several slots share.
//!
//! Lock order: the index is a leaf under region locks; below it only the registry's lock.

use super::{region::Registry, vm::Scope};
use crate::{
    logic::{
        catalog::{Catalog, Entry, GroupPage, HintOutcome, StableOutcome, GROW_PERCENT},
        huge::HugeWord,
        slot::{Class, Slot, State},
    },
    sys::{
        frames::{self, AfterDrop, Boxes, FrameRecords},
        page::{Frame, Label},
        protect,
        slots::Sharer,
    },
};
use core::sync::atomic::{AtomicU32, Ordering};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{lock::mutex::MutexBackend, lock::Guard, Mutex},
};

/// How many entries of one hash are looked at.
pub(crate) const CANDIDATES: usize = 4;

/// So many passes after something that can leave two records of one content, sharers are moved to the
/// older one. Each slot is looked at twice by then.
const UNITING_PASSES: u32 = 16;

/// Free records that the scanner may need before it calls `maintain` again.
const ROOM: u64 = 64;

/// A content's name: its hash within its scope.
#[derive(Clone, Copy)]
pub(crate) struct Key {
    /// The hash, seeded by the scope.
    pub(crate) hash: u64,
    /// The scope.
    pub(crate) scope: Scope,
}

impl Key {
    fn label(self) -> Label {
        Label {
            hash: self.hash,
            scope: self.scope.0,
        }
    }

    /// Whether the label may be this key's: of a part of a folio less than the whole hash is known.
    fn looks_like(self, label: Label) -> bool {
        label.scope == self.scope.0 && (label.hash ^ self.hash) & HugeWord::HASH_MASK == 0
    }
}

/// What the index says about a content.
#[derive(Clone, Copy)]
pub(crate) enum Candidate {
    /// A shared frame that was published under this key.
    Record(u32),
    /// A page that had this hash when it was looked at.
    Page(u32),
}

struct Inner {
    catalog: Catalog<Boxes<GroupPage>>,
    records: FrameRecords,
    /// There are clearly more entries than contents: many are of pages that changed or are gone.
    has_stale: bool,
}

impl Inner {
    fn new() -> Inner {
        Inner {
            catalog: Catalog::new(Boxes::new()),
            records: FrameRecords::new(),
            has_stale: false,
        }
    }
}

/// Figures of the index.
#[derive(Clone, Copy, Default)]
pub(crate) struct IndexFigures {
    /// Shared records with one sharer or more.
    pub(crate) pages_shared: u64,
    /// Sum of (sharers - 1).
    pub(crate) pages_sharing: u64,
    /// Memory of the tables.
    pub(crate) bytes: u64,
}

/// The index.
#[pin_data]
pub(crate) struct SharedIndex {
    #[pin]
    inner: Mutex<Inner>,
    /// Passes for which there may be more than one record of a content.
    uniting_passes: AtomicU32,
}

impl SharedIndex {
    /// An empty index, without memory yet.
    pub(crate) fn new() -> impl PinInit<SharedIndex> {
        pin_init!(SharedIndex {
            inner <- new_mutex!(Inner::new(), "thinram_index"),
            uniting_passes: AtomicU32::new(0),
        })
    }

    fn lock(&self) -> Guard<'_, Inner, MutexBackend> {
        self.inner.lock()
    }

    /// What is known under `key`, shared frames first. Frames of another scope are left out, and
    /// those with `max` sharers: true if there were such.
    pub(crate) fn find(
        &self,
        key: Key,
        max: u32,
        out: &mut [Option<Candidate>; CANDIDATES],
    ) -> bool {
        let inner = self.lock();
        let mut places = out.iter_mut();
        let mut full = false;
        for entry in inner.catalog.lookup(key.hash) {
            let candidate = match entry {
                Entry::Stable(id) => {
                    let label = inner.records.page(id).map(|page| page.label());
                    if !label.is_some_and(|label| key.looks_like(label)) {
                        continue;
                    }
                    if inner.records.sharers(id) >= max {
                        full = true;
                        continue;
                    }
                    Candidate::Record(id)
                }
                Entry::Hint(page) => Candidate::Page(page),
            };
            match places.next() {
                Some(place) => *place = Some(candidate),
                None => break,
            }
        }
        full
    }

    /// Joins record `id` unless it has `max` sharers; the frame cannot go while the sharer is held.
    pub(crate) fn join(&self, id: u32, max: u32) -> Option<(Sharer, Frame)> {
        let mut inner = self.lock();
        let frame = inner.records.page(id)?.get();
        Some((inner.records.join(id, max)?, frame))
    }

    /// The frame of a record that the caller's slot is a sharer of.
    pub(crate) fn frame(&self, id: u32) -> Option<Frame> {
        Some(self.lock().records.page(id)?.get())
    }

    /// The frame of a record that the caller's slot is a sharer of, and the hash that it was
    /// published under; `None` for a record of another scope.
    pub(crate) fn frame_and_hash(&self, id: u32, scope: Scope) -> Option<(Frame, u64)> {
        let inner = self.lock();
        let page = inner.records.page(id)?;
        (page.label().scope == scope.0).then(|| (page.get(), page.label().hash))
    }

    /// How many share the record.
    pub(crate) fn sharers(&self, id: u32) -> u32 {
        self.lock().records.sharers(id)
    }

    /// Whether a record can be published just now; `maintain` makes room.
    pub(crate) fn has_room(&self) -> bool {
        !self.lock().records.wants_page()
    }

    /// Makes `frame` a shared frame with two sharers, in place of the hint to `page_id`.
    pub(crate) fn publish(
        &self,
        key: Key,
        frame: Frame,
        page_id: u32,
        registry: &Registry,
    ) -> Result<(Sharer, Sharer), Frame> {
        let mut inner = self.lock();
        let sharers = inner.records.publish(frame, key.label())?;
        let id = sharers.0.record();
        if !inner.catalog.promote(key.hash, page_id, id) {
            // Without an entry the record still works; only newcomers cannot find it.
            self.expect_doubles();
            if let StableOutcome::Evicted(owner) = inner.catalog.insert_stable(key.hash, id) {
                drop(inner);
                forget_owner(registry, owner);
            }
        }
        Ok(sharers)
    }

    /// Gives a sharer back; the last one's frame is returned, to be freed with no lock held.
    pub(crate) fn leave(&self, sharer: Sharer) -> Option<Frame> {
        let mut inner = self.lock();
        let id = sharer.record();
        let label = inner.records.page(id).map(|page| page.label());
        match inner.records.leave(sharer) {
            AfterDrop::Shared => None,
            AfterDrop::Last(frame) => {
                if let Some(label) = label {
                    inner.catalog.remove(label.hash, Entry::Stable(id));
                }
                Some(frame)
            }
        }
    }

    /// Leaves a hint. False when there was no place for it.
    pub(crate) fn hint(&self, hash: u64, page_id: u32, registry: &Registry) -> bool {
        let mut inner = self.lock();
        if inner.has_stale {
            inner
                .catalog
                .purge(hash, &mut |entry| owner_bits(registry, entry));
        }
        let outcome = inner.catalog.insert_hint(hash, page_id);
        drop(inner);
        match outcome {
            HintOutcome::Placed | HintOutcome::Replaced(_) => true,
            HintOutcome::Evicted(owner) => {
                forget_owner(registry, owner);
                true
            }
            HintOutcome::Refused => false,
        }
    }

    /// Takes back a hint whose page has other content now, or none of its own (`slot`). One that may be
    /// of another hash with the same tag stays: its page relies on it.
    pub(crate) fn unhint_if_stale(&self, hash: u64, page_id: u32, slot: Slot) {
        let mut inner = self.lock();
        let told = tag_of(slot).is_some_and(|tag| inner.catalog.can_be_under(hash, tag));
        if !told {
            inner.catalog.remove(hash, Entry::Hint(page_id));
        }
    }

    /// Takes a hint back, as far as the known bits of its hash find it.
    pub(crate) fn unhint(&self, hash: u64, page_id: u32) {
        self.lock().catalog.remove(hash, Entry::Hint(page_id));
    }

    /// The scanner has been over everything once.
    pub(crate) fn end_pass(&self) {
        self.lock().catalog.end_pass();
        let less = |passes: u32| passes.checked_sub(1);
        let _ = self
            .uniting_passes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// There may be two records of one content from here on.
    pub(crate) fn expect_doubles(&self) {
        self.uniting_passes.store(UNITING_PASSES, Ordering::Relaxed);
    }

    /// Whether there may be two records of one content.
    pub(crate) fn expects_doubles(&self) -> bool {
        self.uniting_passes.load(Ordering::Relaxed) > 0
    }

    /// Makes room: called by the scanner between pages, with no region locked. The catalog grows
    /// while it has fewer places than there are contents it may have to hold (`contents`).
    pub(crate) fn maintain(&self, registry: &Registry, contents: u64) -> Result {
        loop {
            let mut inner = self.lock();
            inner.has_stale = inner.catalog.entries() > contents.saturating_add(contents / 16);
            let wants_records = inner.records.table().free() < ROOM;
            let too_small = protect::armed(protect::Protection::IndexGrowth)
                && inner.catalog.capacity().saturating_mul(GROW_PERCENT)
                    < contents.saturating_mul(100);
            let wants_groups =
                inner.catalog.wants_page() && (too_small || inner.catalog.capacity() == 0);
            let wants_growth = inner.catalog.wants_growth() && too_small;
            drop(inner);
            if wants_records {
                let page = frames::record_page()?;
                self.lock().records.add_page(page)?;
            } else if wants_groups && (wants_growth || self.lock().catalog.capacity() == 0) {
                let page = frames::group_page()?;
                self.lock().catalog.store_mut().push(page)?;
            } else if wants_growth {
                let owner_bits = |entry: Entry| owner_bits(registry, entry);
                let mut inner = self.lock();
                let Inner {
                    catalog, records, ..
                } = &mut *inner;
                let grew = catalog.grow_step(&mut |entry| match entry {
                    Entry::Stable(id) => records.page(id).map(|page| page.label().hash as u16),
                    hint => owner_bits(hint),
                });
                while let Some(displaced) = catalog.pop_displaced() {
                    // A record without an entry still works; only newcomers cannot find it.
                    if let Entry::Hint(owner) = displaced {
                        forget_owner(registry, owner);
                    }
                }
                if !grew {
                    return Ok(());
                }
            } else {
                return Ok(());
            }
        }
    }

    /// Gives the memory of the tables back if no frame is shared: for when the last guest has gone.
    pub(crate) fn reset_if_unused(&self) {
        let mut inner = self.lock();
        if inner.records.table().is_empty() {
            let old = core::mem::replace(&mut *inner, Inner::new());
            drop(inner);
            drop(old);
        }
    }

    /// Publishes every record that `rename` has a new key for under that key; all hints are dropped
    /// because their hashes may be of another seed.
    pub(crate) fn rename_records(&self, mut rename: impl FnMut(u32, &Frame, Label) -> Option<Key>) {
        self.expect_doubles();
        let mut inner = self.lock();
        inner.catalog.clear_hints();
        let mut next = 0;
        while let Some(id) = inner.records.table().next_live(next) {
            next = id.saturating_add(1);
            let Some(page) = inner.records.page(id) else {
                continue;
            };
            let (frame, old) = (page.get(), page.label());
            if let Some(key) = rename(id, &frame, old) {
                inner.catalog.remove(old.hash, Entry::Stable(id));
                inner.records.relabel(id, key.label());
                inner.catalog.insert_stable(key.hash, id);
            }
        }
    }

    /// One more than the highest record id in use.
    pub(crate) fn records_end(&self) -> u32 {
        let inner = self.lock();
        let mut end = 0;
        while let Some(id) = inner.records.table().next_live(end) {
            end = id.saturating_add(1);
        }
        end
    }

    /// The scope that a record was published under.
    pub(crate) fn scope_of(&self, id: u32) -> Option<Scope> {
        Some(Scope(self.lock().records.page(id)?.label().scope))
    }

    /// Figures for sysfs.
    pub(crate) fn figures(&self) -> IndexFigures {
        let inner = self.lock();
        IndexFigures {
            pages_shared: inner.records.table().len(),
            pages_sharing: inner.records.table().pages_sharing(),
            bytes: inner
                .catalog
                .bytes()
                .saturating_add(inner.records.table().bytes()),
        }
    }
}

/// A page lost its hint: let the next pass hash it again, so that no pair is missed for ever.
fn forget_owner(registry: &Registry, page_id: u32) {
    if let Some((region, index)) = registry.page(page_id) {
        region.forget_stable(index);
    }
}

/// The low bits of the hash that a hint's page had when it was looked at; `None` if it has changed.
fn owner_bits(registry: &Registry, entry: Entry) -> Option<u16> {
    let Entry::Hint(page_id) = entry else {
        return None;
    };
    let (region, index) = registry.page(page_id)?;
    tag_of(region.peek(index))
}

/// The low bits of the hash that a page left its hint under, as long as it may have one.
fn tag_of(slot: Slot) -> Option<u16> {
    match slot.state() {
        State::Private if slot.class() == Class::Unshared => Some(slot.tag()),
        State::Huge => HugeWord::from_slot(slot)?.tag(),
        _ => None,
    }
}
