// SPDX-License-Identifier: GPL-2.0

//! Shared pages that no sharer uses: packed once for all of them, in the pool of their scope (their
//! domain's, as a rule), and brought back where that pool is larger than it may be. With a swap file
//! behind it what was packed longest ago goes there instead, and so does what does not get small
//! enough.
//!
//! Two walks take turns. The first takes shared pages out of the page tables of all sharers. The
//! second goes over the records: one that no page table maps is noted as idle, and whoever maps it
//! takes the note away; one that is idle still when the walk comes again was touched by nobody in
//! between, and is packed. A record knows nothing of its sharers, so nothing is done for each of them.
//! As long as a VM has memory that is surely not in use, a round begins only a period of sampling after
//! the last one, so that what any sharer uses is in use by the same measure.
//!
//! Lock order: region > index.

use super::{
    count,
    host::Host,
    pools::{NotHad, SharedPool},
    region::Region,
    shared::{Before, MovedIn, MovedOut},
    vm::{Scope, Vm},
    volume::{Ready, Which},
};
use crate::{
    logic::slot::State,
    sys::{
        alloc, clock,
        frames::NotPacked,
        packed::Packed,
        page::{Frame, Label, Purpose},
        slots::SLOTS,
        swapio::SwapDir,
        task,
        zs::{Compressor, NoRoom, Scratch},
    },
};
use core::sync::atomic::Ordering;
use kernel::{prelude::*, sync::Arc};

/// Pages under one hold of a region's lock.
const WINDOW: usize = 64;
/// Regions of the first walk in one step.
const REGIONS_PER_STEP: u32 = 16;
/// Records looked at under one hold of the index's lock.
const LOOK: u32 = 64;
/// Such looks in one step of the second walk.
const LOOKS_PER_STEP: u32 = 64;
/// Pages packed or brought back in one step.
const STEP_PAGES: u64 = 256;
/// Between two rounds of both walks guests have so long to touch what they need.
const REST_US: u64 = 100_000;
/// And twice as long each time that a round packs nothing, so many times.
const REST_DOUBLINGS: u32 = 6;
/// After so many of them what is packed goes on to the swap file.
const BARREN_ROUNDS: u32 = 2;
/// Objects that go to a swap file at a time.
const EVICT: u32 = 256;
/// Pages that a full pool is made smaller by, at least.
const LEAST_ROOM: u64 = 8;

/// How much the pool of a scope may hold.
struct Quota {
    scope: Scope,
    pages: u64,
    /// That of the mount of its oldest VM that has one.
    dir: Option<Arc<SwapDir>>,
    pool: Option<SharedPool>,
    /// It holds as much as it may.
    full: bool,
    /// Though it holds nothing: what is compressed goes to the swap file at once.
    direct: bool,
    /// The swap file takes nothing for now.
    closed: bool,
}

impl Quota {
    /// The pool, made if need be.
    fn pool(&mut self, host: &Host) -> Option<SharedPool> {
        if self.pool.is_none() {
            self.pool = host.shared_pools.of(self.scope, self.dir.clone()).ok();
        }
        self.pool.clone()
    }
}

fn quota_of(quotas: &[Quota], scope: Scope) -> Option<usize> {
    quotas
        .binary_search_by_key(&scope.0, |quota| quota.scope.0)
        .ok()
}

/// The quota of each scope that has a VM, in the order of scopes: `compress_max_percent` of the sizes
/// of its VMs.
fn quotas(host: &Host, vms: &[Arc<Vm>]) -> Result<KVec<Quota>> {
    let percent = host.knobs.compress_max_percent.load(Ordering::Relaxed);
    quotas_at(vms, percent)
}

fn quotas_at(vms: &[Arc<Vm>], percent: u64) -> Result<KVec<Quota>> {
    let mut sizes = alloc::list(vms.len())?;
    for vm in vms.iter().filter(|vm| vm.scope() != Scope::NONE) {
        sizes.push((vm.scope(), vm), GFP_KERNEL)?;
    }
    sizes.sort_unstable_by_key(|(scope, vm)| (scope.0, vm.id()));
    let mut quotas: KVec<Quota> = alloc::list(sizes.len())?;
    for (scope, vm) in sizes {
        let size = vm.snapshot().pages.total();
        match quotas.last_mut() {
            Some(last) if last.scope == scope => {
                last.pages = last.pages.saturating_add(size);
                last.dir = last.dir.take().or_else(|| vm.swap().own_dir());
            }
            _ => quotas.push(
                Quota {
                    scope,
                    pages: size,
                    dir: vm.swap().own_dir(),
                    pool: None,
                    full: false,
                    direct: false,
                    closed: false,
                },
                GFP_KERNEL,
            )?,
        }
    }
    for quota in quotas.iter_mut() {
        quota.pages = quota.pages.saturating_mul(percent) / 100;
    }
    Ok(quotas)
}

/// What a step came to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Step {
    /// There is more to do.
    Busy,
    /// Nothing to do for now.
    Resting,
}

/// Where the walks are.
#[derive(Default)]
pub(crate) struct Hand {
    /// Number of the region that the first walk is at; the second walk goes when it is done.
    region: u32,
    zapped: bool,
    /// The record that the second walk is at.
    record: u32,
    /// The record from which on pages go to a swap file: those ahead were packed longest ago, for the
    /// second walk goes the same way.
    evict: u32,
    /// Pages that this round packed.
    freed: u64,
    /// Rounds in a row that packed nothing.
    barren: u32,
    rest_until_us: u64,
    /// When the last round ended.
    ended_us: u64,
}

impl Hand {
    /// Goes on with the walks until `wanted` pages were packed, or for a while. What was touched in the
    /// `unused_us` before is in use.
    pub(crate) fn step(
        &mut self,
        host: &Host,
        vms: &[Arc<Vm>],
        compressor: &mut Compressor,
        scratch: &mut Scratch,
        wanted: u64,
        unused_us: impl FnOnce() -> u64,
    ) -> Step {
        let now_us = clock::now_us();
        if self.rest_until_us > now_us || host.figures().pages_shared == 0 {
            return Step::Resting;
        }
        // It asks every VM, so only when it matters.
        if self.ended_us.saturating_add(unused_us()) > now_us {
            return Step::Resting;
        }
        if !self.zapped {
            self.zap(host);
            return Step::Busy;
        }
        let Ok(mut quotas) = quotas(host, vms) else {
            return Step::Resting;
        };
        let mut left = wanted.min(STEP_PAGES);
        let mut looks = LOOKS_PER_STEP;
        while left > 0 && looks > 0 && !task::should_stop() {
            match host.index().next_idle(&mut self.record, LOOK) {
                Some((id, frame, label)) => {
                    let quota = quota_of(&quotas, Scope(label.scope));
                    let Some(quota) = quota.and_then(|place| quotas.get_mut(place)) else {
                        continue;
                    };
                    match pack(host, quota, compressor, id, frame, label) {
                        Packing::Done => {
                            left -= 1;
                            self.freed = self.freed.saturating_add(1);
                        }
                        Packing::Stays => {}
                        Packing::NeedsWay => {
                            // It comes next once there is room.
                            self.record = id;
                            looks -= 1;
                            if self.make_way(host, quota, scratch) == Ready::Soon {
                                return Step::Resting;
                            }
                        }
                    }
                }
                None if self.record == u32::MAX => {
                    let moved = self.push_on(host, scratch, wanted);
                    self.end_round();
                    return match moved {
                        0 => Step::Resting,
                        _ => Step::Busy,
                    };
                }
                None => looks -= 1,
            }
            task::cond_resched();
        }
        Step::Busy
    }

    /// Makes room where a page could not go.
    fn make_way(&mut self, host: &Host, quota: &mut Quota, scratch: &mut Scratch) -> Ready {
        let Some(pool) = quota.pool(host) else {
            quota.closed = true;
            return Ready::No;
        };
        let ready = if quota.full && !quota.direct {
            let cap = quota.pages;
            // So much less that not every page finds it full.
            let goal = (cap - cap / 16).min(pool.store.pages().saturating_sub(LEAST_ROOM));
            let (moved, ready) = self.evict(host, &pool, scratch, goal);
            quota.direct = moved == 0 && ready == Ready::Now;
            quota.full = moved == 0;
            match moved {
                0 => ready,
                _ => Ready::Now,
            }
        } else {
            pool.swap.prepare(&host.swap)
        };
        quota.closed = ready == Ready::No;
        ready
    }

    /// When there is nothing more to pack, what is packed goes on to the swap files. Returns how many
    /// pages did.
    fn push_on(&mut self, host: &Host, scratch: &mut Scratch, wanted: u64) -> u32 {
        if self.freed > 0 || self.barren < BARREN_ROUNDS {
            return 0;
        }
        let mut moved = 0u32;
        for pool in host.shared_pools.all().iter().flatten() {
            if pool.swap.is_on(&host.swap) && pool.store.objects() > 0 {
                let goal = pool.store.pages().saturating_sub(wanted);
                moved = moved.saturating_add(self.evict(host, pool, scratch, goal).0);
            }
        }
        moved
    }

    /// Moves what was packed longest ago to the swap file, until the pool has no more than `pages`
    /// pages, or so many objects that others have their turn. Returns how many went, and what the swap
    /// file is ready for.
    fn evict(
        &mut self,
        host: &Host,
        pool: &SharedPool,
        scratch: &mut Scratch,
        pages: u64,
    ) -> (u32, Ready) {
        let mut ready = pool.swap.prepare(&host.swap);
        let (mut moved, mut wrapped) = (0, false);
        while ready == Ready::Now && moved < EVICT && !task::should_stop() {
            let objects = pool.store.objects();
            if objects == 0 || pool.store.pages() <= pages {
                break;
            }
            let at = self.evict;
            let (next, scope) = (&mut self.evict, pool.scope);
            match host
                .index()
                .next_packed(next, LOOK, scope, Packed::is_object)
            {
                Some((id, _)) => match host.index().move_out(id, pool, &host.swap, scratch) {
                    MovedOut::Out => moved += 1,
                    MovedOut::Stays => {}
                    MovedOut::NeedsSwap => {
                        self.evict = at;
                        ready = pool.swap.prepare(&host.swap);
                    }
                },
                None if self.evict == u32::MAX => {
                    self.evict = 0;
                    if wrapped {
                        break;
                    }
                    wrapped = true;
                }
                None => {}
            }
            task::cond_resched();
        }
        pool.store.compact();
        (moved, ready)
    }

    fn end_round(&mut self) {
        self.barren = match self.freed {
            0 => self.barren.saturating_add(1).min(REST_DOUBLINGS),
            _ => 0,
        };
        self.freed = 0;
        self.record = 0;
        self.region = 0;
        self.zapped = false;
        // The first barren round only took notes.
        let doublings = self.barren.saturating_sub(1);
        self.ended_us = clock::now_us();
        self.rest_until_us = self.ended_us.saturating_add(REST_US << doublings);
    }

    /// What did not work before may work now.
    pub(crate) fn try_anew(&mut self) {
        self.barren = 0;
        self.rest_until_us = 0;
    }

    /// Takes shared pages out of the page tables, of some regions.
    fn zap(&mut self, host: &Host) {
        for _ in 0..REGIONS_PER_STEP {
            if self.region >= host.registry().end() {
                self.zapped = true;
                return;
            }
            if let Some(region) = host.registry().get(self.region) {
                zap_shared(host, &region);
            }
            self.region = self.region.saturating_add(1);
            task::cond_resched();
        }
    }

    /// Swaps pages out, or brings them back where there is no swap, the longest packed first, until no
    /// pool is larger than it may be or for a while.
    pub(crate) fn enforce_caps(
        &mut self,
        host: &Host,
        vms: &[Arc<Vm>],
        scratch: &mut Scratch,
    ) -> Step {
        let (Ok(pools), Ok(quotas)) = (host.shared_pools.all(), quotas(host, vms)) else {
            return Step::Resting;
        };
        let mut outcome = Step::Resting;
        for pool in pools.iter() {
            let quota = quota_of(&quotas, pool.scope).and_then(|place| quotas.get(place));
            if let Some(quota) = quota {
                if pool.swap.set_own_dir(quota.dir.clone()) {
                    host.swap.writer_bell.ring();
                }
            }
            let cap = quota.map_or(0, |quota| quota.pages);
            if pool.store.pages() <= cap {
                continue;
            }
            pool.store.compact();
            let step = if pool.swap.is_on(&host.swap) {
                match self.evict(host, pool, scratch, cap) {
                    (1.., Ready::Now) => Step::Busy,
                    _ => Step::Resting,
                }
            } else {
                self.shrink(host, pool, cap, scratch)
            };
            if step == Step::Busy {
                outcome = Step::Busy;
            }
        }
        host.shared_pools
            .prune(|scope| quota_of(&quotas, scope).is_some());
        outcome
    }

    /// Brings back a part of what one pool has too much.
    fn shrink(&self, host: &Host, pool: &SharedPool, cap: u64, scratch: &mut Scratch) -> Step {
        let (store, scope) = (&pool.store, pool.scope);
        // What was packed longest ago comes next under the hand.
        let (mut from, mut wrapped) = (self.record, false);
        for _ in 0..STEP_PAGES {
            if store.pages() <= cap || task::should_stop() {
                return Step::Resting;
            }
            match (host.index()).next_packed(&mut from, LOOK, scope, Packed::is_object) {
                Some((id, node)) => {
                    let Some(frame) = Frame::alloc(Purpose::Shared, node) else {
                        return Step::Resting;
                    };
                    // A page that cannot be read stays what it is.
                    let _ = bring_back(host, id, frame, scratch);
                }
                None if from == u32::MAX && wrapped => return Step::Resting,
                None if from == u32::MAX => (from, wrapped) = (0, true),
                None => {}
            }
            task::cond_resched();
        }
        store.compact();
        Step::Busy
    }
}

/// Takes the shared pages of a region out of its file's page tables: those alone, so that what is not
/// shared keeps its age.
fn zap_shared(host: &Host, region: &Region) {
    for start in (0..SLOTS).step_by(WINDOW) {
        let end = start + WINDOW;
        let is_shared = |index: &usize| region.peek(*index).state() == State::Shared;
        if !(start..end).any(|index| is_shared(&index)) {
            continue;
        }
        let guard = region.lock();
        if guard.is_retired() {
            return;
        }
        let mut run = start;
        for index in start..=end {
            let slot = guard.slot(index);
            let mapped = index < end
                && slot.state() == State::Shared
                && host.index().is_mapped(slot.record());
            if !mapped {
                if run < index {
                    guard.zap_range(run, index - run);
                }
                run = index + 1;
            }
        }
        drop(guard);
        task::cond_resched();
    }
}

/// What became of an idle page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Packing {
    /// Its frame is free.
    Done,
    /// It stays.
    Stays,
    /// It could go if there were room: see [`Hand::make_way`].
    NeedsWay,
}

/// Packs one record, whose frame the caller found idle.
fn pack(
    host: &Host,
    quota: &mut Quota,
    compressor: &mut Compressor,
    id: u32,
    frame: Frame,
    label: Label,
) -> Packing {
    let refusals = &host.compress_refusals;
    let page = frame.as_ref();
    if page.is_poisoned() {
        count(&refusals.poisoned);
        return Packing::Stays;
    }
    let Some(pool) = quota.pool(host) else {
        count(&refusals.no_memory);
        return Packing::Stays;
    };
    let swaps = !quota.closed && pool.swap.is_on(&host.swap);
    let (node, store) = (page.node(), &pool.store);
    let stage = |bytes: &[u8]| pool.swap.stage(&host.swap, bytes);
    // Nobody writes to a shared frame, so it need not be frozen to be read.
    let mut place = None;
    let packed = if let Some(pattern) = page.filled_with() {
        Packed::filled(label, node, store, pattern)
    } else {
        quota.full |= store.pages() > quota.pages;
        if quota.full && !quota.direct {
            return is_full(host, swaps);
        }
        match compressor.compress(page, host.max_object_bytes()) {
            Some(bytes) if !quota.direct => {
                match Packed::compressed(label, node, store, bytes, quota.pages) {
                    Err(NoRoom::Full) => {
                        quota.full = true;
                        return is_full(host, swaps);
                    }
                    packed => packed,
                }
            }
            bytes => {
                if bytes.is_none() {
                    count(&refusals.incompressible);
                }
                if !swaps {
                    return Packing::Stays;
                }
                place = match bytes {
                    Some(bytes) => stage(bytes),
                    None => stage(page.published_bytes()),
                };
                let Some(place) = place else {
                    return Packing::NeedsWay;
                };
                Packed::swapped(label, node, store, place)
            }
        }
    };
    let done = packed.map_err(|_| &refusals.no_memory).and_then(|packed| {
        match host.index().pack(id, frame, packed) {
            Ok(()) => Ok(true),
            Err(NotPacked::Held) => Err(&refusals.pinned),
            Err(NotPacked::Changed) => Ok(false),
        }
    });
    match (&done, place) {
        (Ok(true), Some(_)) => {}
        (Ok(true), None) => count(&host.events.shared_compressions),
        (_, Some(place)) => pool.swap.release(place),
        (_, None) => {}
    }
    match done {
        Ok(true) => Packing::Done,
        Ok(false) => Packing::Stays,
        Err(why) => {
            count(why);
            Packing::Stays
        }
    }
}

fn is_full(host: &Host, swaps: bool) -> Packing {
    count(&host.compress_refusals.pool_full);
    match swaps {
        true => Packing::NeedsWay,
        false => Packing::Stays,
    }
}

/// Gives a packed page `frame`, for all its sharers; a reference to what it has then.
pub(crate) fn bring_back(
    host: &Host,
    id: u32,
    frame: Frame,
    scratch: &mut Scratch,
) -> Result<Frame, NotHad> {
    let outcome = (host.index()).bring_back(id, frame, scratch, host.away());
    match &outcome {
        Ok((_, Before::Frame)) | Err(NotHad::Unread(_) | NotHad::Lost) => {}
        Ok((_, Before::Packed)) => count(&host.events.shared_decompressions),
        Ok((_, Before::Swapped)) => {
            count(&host.events.shared_swap_ins);
            count(&host.swap.events.ins);
            if host.refusals.swapped.load(Ordering::Relaxed) > 0 {
                // New pages with the same bytes may share a record of their own meanwhile.
                host.index().expect_doubles();
            }
        }
        Err(NotHad::Corrupt) => count(&host.events.decompressions_failed),
    }
    outcome.map(|(frame, _)| frame)
}

/// Pages that the pool of `scope` may have.
pub(crate) fn pool_cap_pages(host: &Host, scope: Scope) -> Result<u64> {
    let quotas = quotas(host, &host.vms().all()?)?;
    let quota = quota_of(&quotas, scope).and_then(|place| quotas.get(place));
    Ok(quota.map_or(0, |quota| quota.pages))
}

/// Takes the pages that lie in `which` clusters out of a swap file, into the pool while that has fewer
/// pages than the first of `into`. What cannot be read stays, and is counted; if the second says so, it
/// is lost for good. `None` when memory is short, or the thread is to stop.
pub(super) fn bring_in(
    host: &Host,
    pool: &SharedPool,
    scratch: &mut Scratch,
    (pool_pages, gives_up): (u64, bool),
    which: Which<'_>,
) -> Option<u64> {
    let is_swapped = |packed: &Packed| packed.place().is_some_and(|place| !place.is_lost());
    let (mut from, mut spare, mut unread) = (0, None, 0u64);
    loop {
        let Some((id, node)) = host
            .index()
            .next_packed(&mut from, LOOK, pool.scope, is_swapped)
        else {
            if from == u32::MAX {
                return Some(unread);
            }
            task::cond_resched();
            continue;
        };
        loop {
            if task::should_stop() {
                return None;
            }
            let tools = (&mut *scratch, &mut spare);
            let index = host.index();
            match index.move_in(id, pool, host.away(), tools, (pool_pages, which)) {
                MovedIn::Done => break,
                MovedIn::Lost => {
                    unread = unread.saturating_add(1);
                    if gives_up {
                        host.index().lose(id, pool);
                    }
                    break;
                }
                MovedIn::InFrame => {
                    count(&host.events.shared_swap_ins);
                    count(&host.swap.events.ins);
                    break;
                }
                MovedIn::Unread(unread) => unread.load(&host.swap),
                MovedIn::NoMemory => return None,
                MovedIn::NeedsFrame => {
                    spare = Frame::alloc(Purpose::Shared, node);
                    spare.as_ref()?;
                }
            }
        }
        task::cond_resched();
    }
}

/// Pages that must become frames again before no swap file in the host's directory is needed.
pub(crate) fn pages_in_host_dir(host: &Host) -> Result<u64> {
    let pools = host.shared_pools.all()?;
    let pools = pools.iter().filter(|pool| pool.swap.own_dir().is_none());
    Ok(pools.fold(0, |sum, pool| sum.saturating_add(pool.swap.live())))
}

/// Pages that must become frames again before no shared pool is larger than `percent` allows.
pub(crate) fn pages_above(host: &Host, vms: &[Arc<Vm>], percent: u64) -> Result<u64> {
    let quotas = quotas_at(vms, percent)?;
    let mut pages = 0u64;
    for SharedPool { scope, store, swap } in host.shared_pools.all()? {
        let quota = quota_of(&quotas, scope).and_then(|place| quotas.get(place));
        let pool = store.pages();
        let excess = pool.saturating_sub(quota.map_or(0, |quota| quota.pages));
        if excess > 0 && !swap.is_on(&host.swap) {
            let back = store.objects().saturating_mul(excess).div_ceil(pool);
            pages = pages.saturating_add(back);
        }
    }
    Ok(pages)
}
