// SPDX-License-Identifier: GPL-2.0

//! A region: 2 MiB of a file, 512 slots and the lock that decides about them.
//!
//! Lock order: inode lock > mmap_lock or VMA lock > region lock (a second one only by try_lock) >
//! i_mmap_rwsem > KVM's notifiers > page-table lock. Leaves under a region lock: the shared index,
//! a VM's counts, the registry.

use super::vm::Vm;
use crate::{
    logic::{
        counts,
        huge::{Calm, HugeWord},
        sample::Watch,
        slot::{Class, Slot, State},
    },
    sys::{
        alloc, clock,
        huge::HugeFrame,
        mapping::Mapping,
        page::{Frame, PageRef, Purpose},
        protect,
        slots::{Content, SlotKey, SlotWords, SLOTS},
        watching,
        zs::{Corrupt, NoRoom, Scratch},
    },
};
use core::{
    ops::Range,
    sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering},
};
use kernel::{
    new_mutex, new_spinlock,
    page::PAGE_SIZE,
    prelude::*,
    sync::{lock::mutex::MutexBackend, lock::Guard, Arc, Mutex, SpinLock},
};

/// A set of slots of one region.
pub(crate) type SlotSet = [u64; SLOTS / 64];

/// See [`RegionGuard::may_ask_again`].
const ASKS: u8 = 16;

struct Inner {
    key: SlotKey,
    /// Gone once the file is: a retired region maps nothing and owns nothing.
    mapping: Option<Mapping>,
    /// Pages whose mappings are all read-only since the scanner made them so.
    protected: SlotSet,
    /// What all slots in state Huge are parts of. Slots that a truncation cut off are Empty, and
    /// their parts zeroed; all others are Huge.
    huge: Option<HugeFrame>,
    /// Some slots of the folio may be Empty.
    cut: bool,
    /// When protecting it pays.
    calm: Calm,
    /// Faults of 4 KiB that may still be sent back to come as one of 2 MiB.
    asks: u8,
}

/// 2 MiB of a file.
#[pin_data]
pub(crate) struct Region {
    /// Number of the region among all of the host, part of the page ids in hints.
    id: AtomicU32,
    /// Number of the first page within the file.
    first_page: u64,
    vm: Arc<Vm>,
    /// The NUMA node of its first frame, -1 before: for frames that are allocated where no policy of
    /// the guest's is at hand.
    node: AtomicI32,
    words: SlotWords,
    /// Pages under watch; changed with the region locked.
    watch: AtomicU64,
    /// Tasks that wait for the lock: the scanner makes way for them.
    waiters: AtomicU32,
    /// When the reclaimer's sweep took pages out of page tables last, by [`now_ms`].
    swept_ms: AtomicU32,
    #[pin]
    inner: Mutex<Inner>,
}

impl Region {
    /// An empty region that begins at page `first_page` of a file of `vm`.
    pub(crate) fn new(first_page: u64, vm: Arc<Vm>, mapping: Mapping) -> Result<Arc<Region>> {
        let (words, key) = SlotWords::new(vm.store().clone())?;
        alloc::counted_in_place(
            pin_init!(Region {
                id: AtomicU32::new(u32::MAX),
                first_page,
                vm,
                node: AtomicI32::new(-1),
                words,
                watch: AtomicU64::new(Watch::NONE.word()),
                waiters: AtomicU32::new(0),
                swept_ms: AtomicU32::new(0),
                inner <- new_mutex!(
                    Inner {
                        key,
                        mapping: Some(mapping),
                        protected: [0; SLOTS / 64],
                        huge: None,
                        cut: false,
                        calm: Calm::NEW,
                        asks: ASKS,
                    },
                    "thinram_region"
                ),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Memory that a region takes.
    pub(crate) const BYTES: u64 =
        (core::mem::size_of::<Region>() + SLOTS * core::mem::size_of::<u64>()) as u64;

    /// The VM that the region belongs to.
    pub(crate) fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// The node that its frames should lie on, -1 for any.
    pub(crate) fn node(&self) -> i32 {
        self.node.load(Ordering::Relaxed)
    }

    /// A frame for a page that comes back to this region, at the expense of its VM, on its node.
    pub(crate) fn returned_frame(&self) -> Option<Frame> {
        (self.vm).pays(|| Frame::alloc(Purpose::Returned, self.node()))
    }

    /// Notes where the policy of a faulting process put a frame; the first one counts.
    pub(crate) fn prefer_node(&self, node: i32) {
        let _ = self
            .node
            .compare_exchange(-1, node, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// The region's number on the host.
    pub(crate) fn id(&self) -> u32 {
        self.id.load(Ordering::Relaxed)
    }

    /// The id of one of its pages, as hints use it.
    pub(crate) fn page_id(&self, index: usize) -> u32 {
        self.id()
            .wrapping_mul(SLOTS as u32)
            .wrapping_add(index as u32)
    }

    /// The slot as it is just now, without the lock.
    #[inline]
    pub(crate) fn peek(&self, index: usize) -> Slot {
        self.words.peek(index)
    }

    /// Whether the region is, just now, one 2 MiB folio.
    pub(crate) fn looks_huge(&self) -> bool {
        // A truncation never cuts off the first page: the folio would go.
        self.peek(0).state() == State::Huge
    }

    /// Whether no page of the region, just now, was ever written.
    pub(crate) fn looks_empty(&self) -> bool {
        (0..SLOTS).all(|index| self.peek(index).state() == State::Empty)
    }

    /// Changes what is known of a page that is still exactly `old`, without the lock. It must not
    /// change what is counted of it.
    pub(crate) fn try_note(&self, index: usize, old: Slot, new: Slot) {
        self.words.try_note(index, old, new);
    }

    /// Makes the next pass hash the page again, without the lock.
    pub(crate) fn forget_stable(&self, index: usize) {
        self.words.clear_stable(index);
    }

    /// Takes the lock for a guest or a syscall, ahead of the scanner.
    pub(crate) fn lock(&self) -> RegionGuard<'_> {
        let inner = match self.lock_if_free() {
            Some(inner) => inner,
            None => {
                self.waiters.fetch_add(1, Ordering::Relaxed);
                let inner = self.inner.lock();
                self.waiters.fetch_sub(1, Ordering::Relaxed);
                inner
            }
        };
        RegionGuard {
            region: self,
            inner,
            unmapped: 0..0,
        }
    }

    /// The lock, if nobody has it. Lockdep learns no order from one that was merely tried: on a kernel
    /// with it, every one is waited for.
    fn lock_if_free(&self) -> Option<Guard<'_, Inner, MutexBackend>> {
        if cfg!(CONFIG_PROVE_LOCKING) {
            return None;
        }
        self.inner.try_lock()
    }

    /// Takes the lock only if nobody has it: for a second region, and for those who can come again.
    pub(crate) fn try_lock(&self) -> Option<RegionGuard<'_>> {
        self.inner.try_lock().map(|inner| RegionGuard {
            region: self,
            inner,
            unmapped: 0..0,
        })
    }

    /// Whether somebody waits for the lock.
    #[inline]
    pub(crate) fn is_wanted(&self) -> bool {
        self.waiters.load(Ordering::Relaxed) != 0
    }

    /// The reclaimer's sweep took pages out of page tables, whether they are in use or not.
    pub(crate) fn note_sweep(&self) {
        self.swept_ms.store(now_ms(), Ordering::Relaxed);
    }

    /// Whether that was in the last `ms` milliseconds.
    pub(crate) fn was_swept_within(&self, ms: u32) -> bool {
        now_ms().wrapping_sub(self.swept_ms.load(Ordering::Relaxed)) < ms
    }
}

/// Milliseconds of the clock, which come round every seven weeks.
fn now_ms() -> u32 {
    (clock::now_us() / 1000) as u32
}

/// A locked region.
pub(crate) struct RegionGuard<'a> {
    region: &'a Region,
    inner: Guard<'a, Inner, MutexBackend>,
    /// Pages that no page table shows until the lock is dropped.
    unmapped: Range<usize>,
}

fn counted_as(slot: Slot) -> counts::Class {
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

impl RegionGuard<'_> {
    /// The region.
    pub(crate) fn region(&self) -> &Region {
        self.region
    }

    /// Whether the file is gone.
    pub(crate) fn is_retired(&self) -> bool {
        self.inner.mapping.is_none()
    }

    /// The slot's word.
    #[inline]
    pub(crate) fn slot(&self, index: usize) -> Slot {
        self.region.words.peek(index)
    }

    /// The frame of a Private slot.
    #[inline]
    pub(crate) fn page(&self, index: usize) -> Option<PageRef<'_>> {
        self.region.words.page(&self.inner.key, index)
    }

    /// The region's folio, while it is one.
    pub(crate) fn huge(&self) -> Option<&HugeFrame> {
        self.inner.huge.as_ref()
    }

    /// The page that the slot owns: the frame of a Private slot, the part of a Huge one.
    pub(crate) fn own_page(&self, index: usize) -> Option<PageRef<'_>> {
        match self.slot(index).state() {
            State::Huge => self.inner.huge.as_ref().map(|huge| huge.part(index)),
            _ => self.page(index),
        }
    }

    /// Makes the region, if it is empty, one folio of zeroes. No mapping shows a page of it
    /// afterwards.
    ///
    /// # Errors
    ///
    /// The folio, where a page is not Empty.
    pub(crate) fn become_huge(&mut self, frame: HugeFrame) -> core::result::Result<(), HugeFrame> {
        let mut mapped = false;
        for index in 0..SLOTS {
            let slot = self.slot(index);
            if slot.state() != State::Empty {
                return Err(frame);
            }
            mapped |= slot.is_zero_mapped();
        }
        if mapped {
            self.zap_range(0, SLOTS);
        }
        // As `set` for each of them; this is most of what a first touch costs beside the zeroes.
        let words = &self.region.words;
        for index in 0..SLOTS {
            let new = Content::Huge(HugeWord::NEW);
            let _ = words.replace(&mut self.inner.key, index, new, 0);
        }
        self.region
            .vm
            .counts()
            .move_pages(counts::Class::Empty, counts::Class::Huge, SLOTS as u64);
        self.inner.protected = [0; SLOTS / 64];
        self.inner.huge = Some(frame);
        self.inner.cut = false;
        self.inner.calm = Calm::NEW;
        self.inner.asks = ASKS;
        Ok(())
    }

    /// Puts `frame` in place of all pages, whose content it has and which no mapping shows; `release`
    /// gets what each slot owned.
    pub(crate) fn collapse(&mut self, frame: HugeFrame, release: &mut dyn FnMut(Content)) {
        for index in 0..SLOTS {
            release(self.set(index, Content::Huge(HugeWord::NEW), 0));
        }
        self.inner.huge = Some(frame);
        self.inner.cut = false;
        self.inner.calm = Calm::NEW;
        self.inner.asks = ASKS;
    }

    /// Whether a fault of 4 KiB in a folio is worth another try by 2 MiB: not for ever, for some
    /// mappings never get one.
    pub(crate) fn may_ask_again(&mut self) -> bool {
        let may = self.inner.asks > 0;
        self.inner.asks = self.inner.asks.saturating_sub(1);
        may
    }

    /// The folio was mapped as a whole.
    pub(crate) fn mapped_whole(&mut self) {
        self.inner.asks = ASKS;
    }

    /// Takes the folio out: every slot in state Huge gets another content next.
    pub(crate) fn leave_huge(&mut self) -> Option<HugeFrame> {
        self.inner.huge.take()
    }

    /// Makes an Empty slot of a huge region a part of its folio again: its bytes are zeroes.
    pub(crate) fn revive(&mut self, index: usize) {
        if self.inner.huge.is_some() && self.slot(index).state() == State::Empty {
            let _ = self.set(index, Content::Huge(HugeWord::NEW), 0);
        }
    }

    /// The same for all of them; the whole region lies before the end of the file.
    pub(crate) fn revive_all(&mut self) {
        if core::mem::take(&mut self.inner.cut) {
            for index in 0..SLOTS {
                self.revive(index);
            }
        }
    }

    /// Punches pages `first..end`, which no mapping shows, out of the folio; hands it over when it
    /// was the whole. `cut`: they are beyond the file's end from here on.
    pub(crate) fn punch_huge(&mut self, first: usize, end: usize, cut: bool) -> Option<HugeFrame> {
        let whole =
            (0..SLOTS).all(|i| (first..end).contains(&i) || self.slot(i).state() == State::Empty);
        for index in first..end {
            let part = self.inner.huge.as_ref().map(|huge| huge.part(index));
            if let Some(part) = part.filter(|part| !whole && !part.is_poisoned()) {
                part.zero_hole(0, PAGE_SIZE);
            }
            if whole || cut {
                let _ = self.set(index, Content::Empty, 0);
            } else if self.slot(index).state() == State::Huge {
                self.note(index, HugeWord::hole().slot());
            }
        }
        if whole {
            self.inner.huge.take()
        } else {
            self.inner.cut |= cut;
            None
        }
    }

    /// Notes that a zero frame may be mapped at each page of an empty region.
    pub(crate) fn note_all_zero_mapped(&mut self) {
        for index in 0..SLOTS {
            let slot = self.slot(index);
            self.region
                .words
                .note(&mut self.inner.key, index, slot.with_zero_mapped());
        }
    }

    /// Notes what was learned about the page; what the slot owns stays.
    pub(crate) fn note(&mut self, index: usize, slot: Slot) {
        let old = self.slot(index);
        self.region.words.note(&mut self.inner.key, index, slot);
        let new = self.slot(index);
        let mut counts = self.region.vm.counts();
        counts.reclassify(known_class(old), known_class(new));
        counts.count_gain(gains(old), gains(new));
    }

    /// Puts `content` into the slot and hands over what it owned, a place in the swap file excepted:
    /// that is given back here. No mapping may show the old one.
    pub(crate) fn set(&mut self, index: usize, content: Content, backoff: u8) -> Content {
        let old = self.slot(index);
        self.set_protected(index, false);
        let owned = self
            .region
            .words
            .replace(&mut self.inner.key, index, content, backoff);
        let new = self.slot(index);
        let mut counts = self.region.vm.counts();
        counts.move_page(counted_as(old), counted_as(new));
        counts.reclassify(known_class(old), known_class(new));
        counts.count_gain(gains(old), gains(new));
        drop(counts);
        match owned {
            Content::Swapped(place) => {
                self.region.vm.swap().release(place);
                Content::Empty
            }
            owned => owned,
        }
    }

    /// Keeps `bytes` in place of a Private page, which is freed, if the VM's pool is not larger than
    /// `max_pages` then. No mapping may show the page.
    pub(crate) fn pack(
        &mut self,
        index: usize,
        bytes: &[u8],
        node: i32,
        max_pages: u64,
    ) -> core::result::Result<(), NoRoom> {
        let old = self.slot(index);
        let frame = self
            .region
            .words
            .pack(&mut self.inner.key, index, bytes, node, max_pages)?;
        self.set_protected(index, false);
        let mut counts = self.region.vm.counts();
        counts.move_page(counts::Class::Private, counts::Class::Compressed);
        counts.reclassify(known_class(old), None);
        drop(counts);
        drop(frame);
        Ok(())
    }

    /// Fills `to` with what a Compressed or Filled slot stands for; the slot stays as it is.
    pub(crate) fn unpack(
        &self,
        index: usize,
        scratch: &mut Scratch,
        to: &mut Frame,
    ) -> core::result::Result<(), Corrupt> {
        self.region
            .words
            .unpack(&self.inner.key, index, scratch, to)
    }

    /// Copies the object of a Compressed slot; `None` for any other.
    pub(crate) fn packed<'a>(&self, index: usize, scratch: &'a mut Scratch) -> Option<&'a [u8]> {
        self.region.words.packed(&self.inner.key, index, scratch)
    }

    /// Keeps `bytes` in the VM's pool in place of what a Swapped slot has in the swap file.
    pub(crate) fn put_back(
        &mut self,
        index: usize,
        bytes: &[u8],
    ) -> core::result::Result<(), NoRoom> {
        let node = self.region.node();
        let place = self
            .region
            .words
            .put_back(&mut self.inner.key, index, bytes, node)?;
        let mut counts = self.region.vm.counts();
        counts.move_page(counts::Class::Swapped, counts::Class::Compressed);
        drop(counts);
        self.region.vm.swap().release(place);
        Ok(())
    }

    fn watched(&self) -> Watch {
        Watch::from_word(self.region.watch.load(Ordering::Relaxed))
    }

    fn set_watched(&mut self, watch: Watch) {
        self.region.watch.store(watch.word(), Ordering::Relaxed);
    }

    /// Takes the page out of every page table, and notes whether it is touched from here on. Whether
    /// it is the VM's own now; `None` when there is no room for one more, or the page is under watch.
    pub(crate) fn watch(&mut self, index: usize) -> Option<bool> {
        let own = self.is_own(index);
        let watch = self.watched().watch(index, own)?;
        if !watching::by_cleaning() || self.clean(index).is_none() {
            self.zap(index);
        }
        self.set_watched(watch);
        Some(own)
    }

    /// Cleans a small page of the VM's own. Whether it was touched since it was last cleaned; `None` for
    /// any other page.
    fn clean(&self, index: usize) -> Option<bool> {
        let page = self.page(index)?;
        let mapping = self.inner.mapping.as_ref()?;
        let dirty = mapping.clean(self.region.first_page.saturating_add(index as u64));
        Some(page.take_referenced() || dirty)
    }

    /// Pages under watch that were touched without a fault of ours, as cleaning tells: how many, and how
    /// many of them were the VM's own.
    pub(crate) fn touched_unseen(&self) -> (usize, usize) {
        self.watched()
            .pages()
            .filter(|&(index, _)| self.clean(index) == Some(true))
            .fold((0, 0), |(all, owned), (_, own)| {
                (all + 1, owned + usize::from(own))
            })
    }

    /// Whether the page holds data that are the VM's alone, wherever they are.
    fn is_own(&self, index: usize) -> bool {
        !matches!(
            self.slot(index).state(),
            State::Empty | State::Zero | State::Shared
        )
    }

    /// Ends the watch over all pages.
    pub(crate) fn watch_nothing(&mut self) {
        self.set_watched(Watch::NONE);
    }

    /// The page is touched: if it was under watch, whether it was the VM's own then.
    #[inline]
    pub(crate) fn touch(&mut self, index: usize) -> Option<bool> {
        let (rest, own) = self.watched().touched(index)?;
        self.set_watched(rest);
        Some(own)
    }

    /// Some page of a 2 MiB page is touched: how many were under watch, and were the VM's own.
    pub(crate) fn touch_all(&mut self) -> (usize, usize) {
        let watched = self.watched();
        self.set_watched(Watch::NONE);
        (watched.len(), watched.own())
    }

    /// Takes the page out of every page table.
    pub(crate) fn zap(&self, index: usize) {
        if !self.unmapped.contains(&index) {
            self.zap_range(index, 1);
        }
    }

    /// Takes a range of pages out at once, for those who [`RegionGuard::zap`] each of them soon. They
    /// map nothing under this lock, and nobody else can.
    pub(crate) fn zap_ahead(&mut self, index: usize, pages: usize) {
        if pages > 1 {
            self.zap_range(index, pages);
            self.unmapped = index..index.saturating_add(pages);
        }
    }

    /// Takes a range of pages out of every page table.
    pub(crate) fn zap_range(&self, index: usize, pages: usize) {
        if let Some(mapping) = &self.inner.mapping {
            mapping.zap(
                self.region.first_page.saturating_add(index as u64),
                pages as u64,
            );
        }
    }

    /// The same before the content is thrown away.
    pub(crate) fn zap_punched(&self, index: usize, pages: usize) {
        if let Some(mapping) = &self.inner.mapping {
            mapping.zap_punched(
                self.region.first_page.saturating_add(index as u64),
                pages as u64,
            );
        }
    }

    /// Makes every mapping of the range read-only, so that a write is noticed.
    pub(crate) fn protect(&mut self, index: usize, pages: usize) {
        let Some(mapping) = &self.inner.mapping else {
            return;
        };
        mapping.write_protect(
            self.region.first_page.saturating_add(index as u64),
            pages as u64,
        );
        for i in index..index.saturating_add(pages).min(SLOTS) {
            self.set_protected(i, true);
        }
    }

    /// Makes every mapping of the region's folio read-only, so that a write is noticed.
    pub(crate) fn protect_huge(&mut self) {
        let (Some(mapping), Some(folio)) = (&self.inner.mapping, &self.inner.huge) else {
            return;
        };
        mapping.write_protect_folio(self.region.first_page, folio.part(0).pfn());
        for index in 0..SLOTS {
            if self.slot(index).state() == State::Huge {
                self.set_protected(index, true);
            }
        }
    }

    /// Whether mappings of any page are read-only, so that a write is noticed.
    pub(crate) fn is_any_protected(&self) -> bool {
        self.inner.protected.iter().any(|&word| word != 0)
    }

    /// Whether that is true of all parts of the folio.
    pub(crate) fn is_all_protected(&self) -> bool {
        (0..SLOTS).all(|i| self.is_protected(i) || self.slot(i).state() != State::Huge)
    }

    /// To be called before any page may change: all count as changed from here on. True if a mapping
    /// may have been read-only for it.
    pub(crate) fn all_may_change(&mut self) -> bool {
        let protected = self.is_any_protected();
        if protected {
            for index in 0..SLOTS {
                self.may_change(index);
            }
        }
        protected
    }

    /// When protecting the folio pays.
    pub(crate) fn calm(&mut self) -> &mut Calm {
        &mut self.inner.calm
    }

    /// Whether every mapping of the page is read-only by [`RegionGuard::protect`].
    pub(crate) fn is_protected(&self, index: usize) -> bool {
        self.inner
            .protected
            .get(index / 64)
            .is_some_and(|word| word >> (index % 64) & 1 != 0)
    }

    fn set_protected(&mut self, index: usize, protected: bool) {
        if let Some(word) = self.inner.protected.get_mut(index / 64) {
            let bit = 1u64 << (index % 64);
            if protected {
                *word |= bit;
            } else {
                *word &= !bit;
            }
        }
    }

    /// To be called before the page may change: it counts as changed from here on.
    pub(crate) fn may_change(&mut self, index: usize) {
        self.set_protected(index, false);
        self.region.words.clear_stable(index);
    }

    /// Lets the file go: every page is unmapped, `release` gets what each slot owned.
    pub(crate) fn retire(&mut self, release: &mut dyn FnMut(Content)) {
        self.zap_range(0, SLOTS);
        for index in 0..SLOTS {
            if self.slot(index).state() != State::Empty {
                release(self.set(index, Content::Empty, 0));
            }
        }
        self.inner.mapping = None;
        drop(self.inner.huge.take());
    }
}

fn gains(slot: Slot) -> bool {
    HugeWord::from_slot(slot).is_some_and(HugeWord::gains)
}

fn known_class(slot: Slot) -> Option<Class> {
    match slot.state() {
        State::Private => Some(slot.class()),
        _ => None,
    }
}

/// All regions of the host by their numbers: what the scanner walks and hints point into.
///
/// A number is reused after its region is gone; who follows a hint checks what it finds.
#[pin_data]
pub(crate) struct Registry {
    #[pin]
    table: SpinLock<Table>,
}

struct Table {
    regions: KVVec<Option<Arc<Region>>>,
    free: KVVec<u32>,
    live: u64,
}

impl Registry {
    /// Region numbers fit the 31-bit page ids of hints: 8 TiB of guests.
    const MAX: u64 = 1 << 22;
    /// So many there are where tests see them run out.
    const FEW: u64 = 8;

    /// No regions.
    pub(crate) fn new() -> impl PinInit<Registry> {
        pin_init!(Registry {
            table <- new_spinlock!(
                Table { regions: KVVec::new(), free: KVVec::new(), live: 0 },
                "thinram_registry"
            ),
        })
    }

    /// Gives `region` a number; ENOSPC when there is none left.
    pub(crate) fn add(&self, region: &Arc<Region>) -> Result {
        let most = if protect::armed(protect::Protection::RegionNumbers) {
            Self::MAX
        } else {
            Self::FEW
        };
        loop {
            let mut table = self.table.lock();
            if table.live >= most {
                return Err(ENOSPC);
            }
            if let Some(id) = table.free.pop() {
                region.id.store(id, Ordering::Relaxed);
                if let Some(place) = table.regions.get_mut(id as usize) {
                    *place = Some(region.clone());
                }
                table.live = table.live.saturating_add(1);
                return Ok(());
            }
            let len = table.regions.len();
            if len < table.regions.capacity() && len < table.free.capacity() {
                region.id.store(len as u32, Ordering::Relaxed);
                table
                    .regions
                    .push_within_capacity(Some(region.clone()))
                    .map_err(|_| ENOMEM)?;
                table.live = table.live.saturating_add(1);
                return Ok(());
            }
            drop(table);
            self.grow(len)?;
        }
    }

    /// Room for more numbers, so that neither adding nor removing ever allocates under the lock.
    fn grow(&self, len: usize) -> Result {
        let capacity = len.saturating_mul(3).checked_div(2).unwrap_or(len).max(256);
        let mut regions = alloc::long_list(capacity)?;
        let mut free = alloc::long_list(capacity)?;
        let mut table = self.table.lock();
        if table.regions.len() > len || table.regions.len() == capacity {
            return Ok(());
        }
        for region in table.regions.drain_all() {
            regions.push_within_capacity(region).map_err(|_| ENOMEM)?;
        }
        for id in table.free.drain_all() {
            free.push_within_capacity(id).map_err(|_| ENOMEM)?;
        }
        core::mem::swap(&mut table.regions, &mut regions);
        core::mem::swap(&mut table.free, &mut free);
        drop(table);
        Ok(())
    }

    /// Takes the region out.
    pub(crate) fn remove(&self, region: &Region) {
        let id = region.id();
        let mut table = self.table.lock();
        let gone = table.regions.get_mut(id as usize).and_then(Option::take);
        if gone.is_some() {
            table.live = table.live.saturating_sub(1);
            // `add` keeps room for every number, so this cannot fail.
            let _ = table.free.push_within_capacity(id);
        }
        drop(table);
        drop(gone);
    }

    /// The region of that number.
    pub(crate) fn get(&self, id: u32) -> Option<Arc<Region>> {
        self.table.lock().regions.get(id as usize)?.clone()
    }

    /// The region and the place in it that a page id means.
    pub(crate) fn page(&self, page_id: u32) -> Option<(Arc<Region>, usize)> {
        let region = self.get(page_id / SLOTS as u32)?;
        Some((region, page_id as usize % SLOTS))
    }

    /// The word of a page.
    pub(crate) fn peek(&self, page_id: u32) -> Option<Slot> {
        self.look(page_id, Region::peek)
    }

    /// A page lost its hint: the next pass hashes it again, so that no pair is missed for ever.
    pub(crate) fn forget_stable(&self, page_id: u32) {
        self.look(page_id, Region::forget_stable);
    }

    /// What `f` says of a page, without a reference to its region: the index is locked, where none may be
    /// the last one to go.
    fn look<T>(&self, page_id: u32, f: impl FnOnce(&Region, usize) -> T) -> Option<T> {
        let table = self.table.lock();
        let region = table.regions.get((page_id / SLOTS as u32) as usize)?;
        Some(f(region.as_ref()?, page_id as usize % SLOTS))
    }

    /// Regions that there are.
    pub(crate) fn live(&self) -> u64 {
        self.table.lock().live
    }

    /// One more than the highest number in use.
    pub(crate) fn end(&self) -> u32 {
        self.table.lock().regions.len() as u32
    }

    /// Memory taken by all regions and the tables.
    pub(crate) fn bytes(&self) -> u64 {
        let table = self.table.lock();
        let tables =
            table.regions.capacity().saturating_mul(8) + table.free.capacity().saturating_mul(4);
        table
            .live
            .saturating_mul(Region::BYTES)
            .saturating_add(tables as u64)
    }
}
