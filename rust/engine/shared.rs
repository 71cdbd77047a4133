// SPDX-License-Identifier: GPL-2.0

//! The shared index: which content was met before, and the pages that several slots share, in a
//! frame or packed.
//!
//! A page is packed for all its sharers at once, in the pool of its scope, when none of them maps it
//! and nobody is about to: whoever wants to map it takes a reference under the index's lock. It comes
//! back for all of them as well, and is shared as it was. From the pool it may go on to the scope's swap
//! file; what is read from there is read with the index locked, so that its place cannot be given to
//! another page meanwhile. That is a copy out of a buffer: nobody waits for a disk here.
//!
//! Lock order: the index is a leaf under region locks; below it only the registry's lock, those of
//! zsmalloc, the list of pools and the locks of their swap files.

use super::{
    pools::{Away, NotHad, SharedPool, Unread},
    region::Registry,
    vm::Scope,
    volume::{self, Fetched, SwapWork, Which},
};
use crate::{
    logic::{
        catalog::{Catalog, Entry, GroupPage, StableOutcome, GROW_PERCENT},
        clusters::Place,
        hints::{self, Pages},
        huge::HugeWord,
        slot::Slot,
    },
    sys::{
        frames::{self, AfterDrop, Boxes, FrameRecords, Held, NotPacked, NotUnpacked, Owned},
        packed::Packed,
        page::{Frame, Label},
        protect,
        slots::Sharer,
        zs::Scratch,
    },
};
use core::sync::atomic::{AtomicU32, Ordering};
use kernel::{
    new_mutex,
    page::PAGE_SIZE,
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

/// A shared page, as whoever holds a sharer of it finds it.
pub(crate) enum SharedPage {
    /// A frame, with a reference for the caller.
    Frame(Frame),
    /// Packed, here or in a swap file; its frame was on that node.
    Packed {
        /// NUMA node.
        node: i32,
    },
}

impl SharedPage {
    fn of(held: Held<'_>) -> SharedPage {
        match held {
            Held::Frame(page) => SharedPage::Frame(page.get()),
            Held::Packed(packed) => SharedPage::Packed {
                node: packed.node(),
            },
        }
    }

    /// The frame; `None` for a packed page.
    pub(crate) fn frame(self) -> Option<Frame> {
        match self {
            SharedPage::Frame(frame) => Some(frame),
            SharedPage::Packed { .. } => None,
        }
    }
}

struct Inner {
    catalog: Catalog<Boxes<GroupPage>>,
    records: FrameRecords,
    /// Nothing is packed: somebody goes over all records.
    held_still: bool,
    /// There are clearly more entries than contents: many are of pages that changed or are gone.
    has_stale: bool,
}

/// Fills `frame` with the page that lies at `place` of the swap file of `scope`.
fn read(
    scope: u32,
    place: Place,
    scratch: &mut Scratch,
    frame: &mut Frame,
    away: Away<'_>,
) -> Result<(), NotHad> {
    if place.is_lost() {
        return Err(NotHad::Lost);
    }
    let swap = away.pools.swap_of(scope).ok_or(NotHad::Lost)?;
    match swap.fill(away.work, place, scratch, frame) {
        Fetched::Bytes(_) => Ok(()),
        Fetched::Absent => Err(NotHad::Unread(Unread { swap, place })),
        Fetched::Lost => Err(NotHad::Lost),
    }
}

/// Enters a record in the catalog, if it is not there and has a place; the lock ends with that.
fn enter(mut inner: Guard<'_, Inner, MutexBackend>, hash: u64, id: u32, registry: &Registry) {
    let entered = inner.catalog.insert_stable(hash, id);
    drop(inner);
    if let StableOutcome::Evicted(owner) = entered {
        registry.forget_stable(owner);
    }
}

impl Inner {
    /// The scope and the place of a record that is in a swap file.
    fn place_of(&self, id: u32) -> Option<(u32, Place)> {
        match self.records.held(id)? {
            Held::Packed(packed) => Some((packed.label().scope, packed.place()?)),
            Held::Frame(_) => None,
        }
    }

    fn new() -> Inner {
        Inner {
            catalog: Catalog::new(Boxes::new()),
            records: FrameRecords::new(),
            held_still: false,
            has_stale: false,
        }
    }
}

/// Where a page that has a frame now was before.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Before {
    /// There already.
    Frame,
    /// In a pool, or in four bytes.
    Packed,
    /// In a swap file.
    Swapped,
}

/// What became of a page that was to leave its swap file.
pub(crate) enum MovedIn {
    /// It is in the pool, or was not to be moved.
    Done,
    /// It has a frame.
    InFrame,
    /// It must be read first.
    Unread(Unread),
    /// It needs a frame for that.
    NeedsFrame,
    /// No memory for it.
    NoMemory,
    /// It cannot be read: it stays, and its guests are told when they ask for it.
    Lost,
}

/// What became of a page that was to leave its pool.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum MovedOut {
    /// It is in the swap file, or in a buffer before.
    Out,
    /// It is not in the pool, or not to be moved now.
    Stays,
    /// The swap file has to be prepared for it first.
    NeedsSwap,
}

/// Figures of the index.
#[derive(Clone, Copy, Default)]
pub(crate) struct IndexFigures {
    /// Shared records with one sharer or more.
    pub(crate) pages_shared: u64,
    /// Those of them that are packed, in a pool or without any memory.
    pub(crate) packed: u64,
    /// Those that are in a swap file.
    pub(crate) swapped: u64,
    /// Sum of (sharers - 1).
    pub(crate) pages_sharing: u64,
    /// Memory of the tables, and of what packed pages take besides their objects.
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
                    let label = inner.records.held(id).map(|held| held.label());
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

    /// Joins record `id` unless it has `max` sharers; the page cannot go while the sharer is held.
    pub(crate) fn join(&self, id: u32, max: u32) -> Option<(Sharer, SharedPage)> {
        let mut inner = self.lock();
        let page = SharedPage::of(inner.records.held(id)?);
        Some((inner.records.join(id, max)?, page))
    }

    /// The page of a record that the caller's slot is a sharer of.
    pub(crate) fn page(&self, id: u32) -> Option<SharedPage> {
        Some(SharedPage::of(self.lock().records.held(id)?))
    }

    /// The same for a caller that is about to map it.
    pub(crate) fn page_to_map(&self, id: u32) -> Option<SharedPage> {
        let mut inner = self.lock();
        inner.records.touch(id);
        Some(SharedPage::of(inner.records.held(id)?))
    }

    /// Gives a packed page `frame`, for all its sharers. A reference to what it has then, and where it
    /// was before.
    pub(crate) fn bring_back(
        &self,
        id: u32,
        mut frame: Frame,
        scratch: &mut Scratch,
        away: Away<'_>,
    ) -> Result<(Frame, Before), NotHad> {
        let mut inner = self.lock();
        let place = inner.place_of(id);
        let (packed, spare, before) = match place {
            Some((scope, place)) => {
                read(scope, place, scratch, &mut frame, away)?;
                let packed = inner.records.put_frame(id, frame).ok_or(NotHad::Lost)?;
                away.pools.release(scope, place);
                (Some(packed), None, Before::Swapped)
            }
            None => match inner.records.unpack(id, frame, scratch) {
                Ok(packed) => (Some(packed), None, Before::Packed),
                Err(NotUnpacked::Changed(frame)) => (None, Some(frame), Before::Frame),
                Err(NotUnpacked::Corrupt) => return Err(NotHad::Corrupt),
            },
        };
        let page = inner.records.held(id).map(SharedPage::of);
        drop(inner);
        drop((packed, spare));
        let frame = page.and_then(SharedPage::frame).ok_or(NotHad::Lost)?;
        Ok((frame, before))
    }

    /// Fills `to` with the page of a record that the caller's slot is a sharer of; a packed one stays
    /// packed.
    pub(crate) fn copy(
        &self,
        id: u32,
        to: &mut Frame,
        scratch: &mut Scratch,
        away: Away<'_>,
    ) -> Result<(), NotHad> {
        let inner = self.lock();
        if let Some((scope, place)) = inner.place_of(id) {
            return read(scope, place, scratch, to, away);
        }
        match inner.records.held(id) {
            Some(Held::Packed(packed)) => packed.copy_to(to, scratch).map_err(|_| NotHad::Corrupt),
            Some(Held::Frame(page)) => {
                let frame = page.get();
                drop(inner);
                to.copy_from(frame.as_ref()).map_err(|_| NotHad::Corrupt)
            }
            None => Err(NotHad::Corrupt),
        }
    }

    /// Moves a compressed record of a scope from its pool to its swap file.
    pub(crate) fn move_out(
        &self,
        id: u32,
        pool: &SharedPool,
        work: &SwapWork,
        scratch: &mut Scratch,
    ) -> MovedOut {
        let mut inner = self.lock();
        if inner.held_still {
            return MovedOut::Stays;
        }
        let bytes = match inner.records.held(id) {
            Some(Held::Packed(packed)) if packed.label().scope == pool.scope.0 => {
                packed.read(scratch)
            }
            _ => None,
        };
        let Some(bytes) = bytes else {
            return MovedOut::Stays;
        };
        let Some(place) = pool.swap.stage(work, bytes) else {
            return MovedOut::NeedsSwap;
        };
        if inner.records.move_out(id, place) {
            MovedOut::Out
        } else {
            pool.swap.release(place);
            MovedOut::Stays
        }
    }

    /// Takes a record of a scope out of its swap file if it lies in `which` of its clusters: into the
    /// pool as far as `pool_pages` allow, else into the frame.
    pub(super) fn move_in(
        &self,
        id: u32,
        pool: &SharedPool,
        away: Away<'_>,
        tools: (&mut Scratch, &mut Option<Frame>),
        (pool_pages, which): (u64, Which<'_>),
    ) -> MovedIn {
        let (scratch, frame) = tools;
        let mut inner = self.lock();
        let Some((_, place)) = (inner.place_of(id)).filter(|(scope, _)| *scope == pool.scope.0)
        else {
            return MovedIn::Done;
        };
        let wanted = {
            let swap = pool.swap.lock();
            let volume = swap.volume.as_ref();
            volume.is_some_and(|volume| which(volume, place.cluster()))
        };
        if !wanted {
            return MovedIn::Done;
        }
        let len = match pool.swap.fetch(away.work, place, scratch) {
            Fetched::Bytes(len) => len,
            Fetched::Absent => {
                let swap = pool.swap.clone();
                return MovedIn::Unread(Unread { swap, place });
            }
            Fetched::Lost => return MovedIn::Lost,
        };
        if len < PAGE_SIZE && pool.store.pages() < pool_pages {
            let bytes = scratch.bytes().get(..len).unwrap_or(&[]);
            return match inner.records.move_in(id, bytes) {
                Ok(place) => {
                    pool.swap.release(place);
                    MovedIn::Done
                }
                Err(_) => MovedIn::NoMemory,
            };
        }
        let Some(mut taken) = frame.take() else {
            return MovedIn::NeedsFrame;
        };
        if volume::unpack(len, scratch, &mut taken).is_err() {
            *frame = Some(taken);
            return MovedIn::Lost;
        }
        let packed = inner.records.put_frame(id, taken);
        if packed.is_some() {
            pool.swap.release(place);
        }
        drop(inner);
        drop(packed);
        MovedIn::InFrame
    }

    /// A record of a scope that cannot be read is lost for good; its place is given back.
    pub(super) fn lose(&self, id: u32, pool: &SharedPool) {
        let mut inner = self.lock();
        match inner.place_of(id) {
            Some((scope, place)) if scope == pool.scope.0 && !place.is_lost() => {
                if inner.records.move_out(id, Place::LOST) {
                    pool.swap.release(place);
                }
            }
            _ => {}
        }
    }

    /// Whether the record is lost for good.
    pub(crate) fn is_lost(&self, id: u32) -> bool {
        matches!(self.lock().place_of(id), Some((_, place)) if place.is_lost())
    }

    /// Puts `packed` in the place of `frame`, a record's. An error when somebody holds the frame, or
    /// everything is to stay as it is.
    pub(crate) fn pack(
        &self,
        id: u32,
        frame: Frame,
        packed: KBox<Packed>,
    ) -> Result<(), NotPacked> {
        let mut inner = self.lock();
        if inner.held_still {
            return Err(NotPacked::Changed);
        }
        let outcome = inner.records.pack(id, frame, packed);
        drop(inner);
        match outcome {
            Ok(frame) => {
                drop(frame);
                Ok(())
            }
            Err((why, _packed)) => Err(why),
        }
    }

    /// Nothing is packed from here on, or it may be again.
    pub(crate) fn hold_still(&self, still: bool) {
        self.lock().held_still = still;
    }

    /// The next record from `*from` on, of at most `look` that are looked at, whose frame nobody
    /// touched since the last time that it was looked at; a reference keeps it. `*from` is moved on.
    pub(crate) fn next_idle(&self, from: &mut u32, look: u32) -> Option<(u32, Frame, Label)> {
        let mut inner = self.lock();
        for _ in 0..look {
            let Some(id) = inner.records.table().next_live(*from) else {
                *from = u32::MAX;
                return None;
            };
            *from = id.saturating_add(1);
            if inner.records.stays_idle(id) {
                if let Some(Held::Frame(page)) = inner.records.held(id) {
                    return Some((id, page.get(), page.label()));
                }
            }
        }
        None
    }

    /// The next packed record of `scope` from `*from` on, as above, that is of a `kind`, and its frame's
    /// node.
    pub(crate) fn next_packed(
        &self,
        from: &mut u32,
        look: u32,
        scope: Scope,
        kind: fn(&Packed) -> bool,
    ) -> Option<(u32, i32)> {
        let inner = self.lock();
        for _ in 0..look {
            let Some(id) = inner.records.table().next_live(*from) else {
                *from = u32::MAX;
                return None;
            };
            *from = id.saturating_add(1);
            match inner.records.held(id) {
                Some(Held::Packed(packed)) if packed.label().scope == scope.0 && kind(packed) => {
                    return Some((id, packed.node()));
                }
                _ => {}
            }
        }
        None
    }

    /// Whether any page table maps a record's frame.
    pub(crate) fn is_mapped(&self, id: u32) -> bool {
        let inner = self.lock();
        matches!(inner.records.held(id), Some(Held::Frame(page)) if page.is_mapped())
    }

    /// The frame of a record that the caller's slot is a sharer of, and the hash that it was
    /// published under; `None` for a record of another scope or without a frame. One that got no entry,
    /// for want of room, is entered if there is some now.
    pub(crate) fn frame_and_hash(
        &self,
        id: u32,
        scope: Scope,
        registry: &Registry,
    ) -> Option<(Frame, u64)> {
        let inner = self.lock();
        let Held::Frame(page) = inner.records.held(id)? else {
            return None;
        };
        let label = page.label();
        if label.scope != scope.0 {
            return None;
        }
        let frame = page.get();
        enter(inner, label.hash, id, registry);
        Some((frame, label.hash))
    }

    /// Whether the record has one sharer, and a frame: a packed one is left in peace.
    pub(crate) fn is_alone(&self, id: u32) -> bool {
        let inner = self.lock();
        inner.records.sharers(id) == 1 && matches!(inner.records.held(id), Some(Held::Frame(_)))
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
            // Without an entry the record still works; only newcomers cannot find it yet.
            self.expect_doubles();
            enter(inner, key.hash, id, registry);
        }
        Ok(sharers)
    }

    /// Gives a sharer back; what the last one leaves is returned, to be freed with no lock held by
    /// `SharedPools::free`.
    pub(crate) fn leave(&self, sharer: Sharer) -> Option<Owned> {
        let mut inner = self.lock();
        let id = sharer.record();
        let label = inner.records.held(id).map(|held| held.label());
        match inner.records.leave(sharer) {
            AfterDrop::Shared => None,
            AfterDrop::Last(owned) => {
                if let Some(label) = label {
                    inner.catalog.remove(label.hash, Entry::Stable(id));
                }
                Some(owned)
            }
        }
    }

    /// Leaves a hint; its page's slot says so already ([`hints::settle`]). False when there was no
    /// place for it.
    pub(crate) fn hint(&self, hash: u64, page_id: u32, registry: &Registry) -> bool {
        let mut inner = self.lock();
        let purge = inner.has_stale;
        let left = hints::leave(&mut inner.catalog, (hash, page_id), purge, registry);
        drop(inner);
        if let Some(owner) = left.evicted {
            registry.forget_stable(owner);
        }
        left.placed
    }

    /// Takes back a hint whose page has other content now, none of its own, or is gone.
    pub(crate) fn unhint_if_stale(&self, hash: u64, page_id: u32, registry: &Registry) {
        hints::take_back(&mut self.lock().catalog, (hash, page_id), registry);
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
    /// while it has fewer places than there are contents it may have to hold (`contents`), or is
    /// crowded with those of shared pages.
    pub(crate) fn maintain(&self, registry: &Registry, contents: u64) -> Result {
        loop {
            let mut inner = self.lock();
            inner.has_stale = inner.catalog.entries() > contents.saturating_add(contents / 16);
            let wants_records = inner.records.table().free() < ROOM;
            let catalog = &inner.catalog;
            let places = catalog.capacity().saturating_mul(GROW_PERCENT);
            let too_small = protect::armed(protect::Protection::IndexGrowth)
                && (catalog.is_crowded() || places < contents.saturating_mul(100));
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
                let mut inner = self.lock();
                let Inner {
                    catalog, records, ..
                } = &mut *inner;
                let grew = catalog.grow_step(&mut |entry| match entry {
                    Entry::Stable(id) => records.held(id).map(|held| held.label().hash as u16),
                    hint => hints::bits_of_entry(registry, hint),
                });
                while let Some(displaced) = catalog.pop_displaced() {
                    // A record without an entry still works; only newcomers cannot find it yet.
                    if let Entry::Hint(owner) = displaced {
                        registry.forget_stable(owner);
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

    /// Gives the memory of the tables back if no frame is shared and no hint is needed: for when the
    /// last guest has gone.
    pub(crate) fn reset_if_unused(&self, registry: &Registry) {
        let mut inner = self.lock();
        // A region that comes later leaves its hints later, too.
        if registry.live() == 0 && inner.records.table().is_empty() {
            let old = core::mem::replace(&mut *inner, Inner::new());
            drop(inner);
            drop(old);
        }
    }

    /// Publishes every record with a frame that `rename` has a new key for under that key; all hints
    /// are dropped because their hashes may be of another seed.
    pub(crate) fn rename_records(&self, mut rename: impl FnMut(u32, &Frame, Label) -> Option<Key>) {
        self.expect_doubles();
        let mut inner = self.lock();
        inner.catalog.clear_hints();
        let mut next = 0;
        while let Some(id) = inner.records.table().next_live(next) {
            next = id.saturating_add(1);
            let Some(Held::Frame(page)) = inner.records.held(id) else {
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
        Some(Scope(self.lock().records.held(id)?.label().scope))
    }

    /// Figures for sysfs.
    pub(crate) fn figures(&self) -> IndexFigures {
        let inner = self.lock();
        IndexFigures {
            pages_shared: inner.records.table().len(),
            packed: inner.records.table().compressed(),
            swapped: inner.records.table().swapped(),
            pages_sharing: inner.records.table().pages_sharing(),
            bytes: inner
                .catalog
                .bytes()
                .saturating_add(inner.records.table().bytes())
                .saturating_add(
                    (inner.records.table().compressed())
                        .saturating_add(inner.records.table().swapped())
                        .saturating_mul(Packed::BYTES),
                ),
        }
    }
}

impl Pages for Registry {
    fn peek(&self, page_id: u32) -> Option<Slot> {
        self.peek(page_id)
    }
}
