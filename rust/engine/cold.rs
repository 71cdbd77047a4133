// SPDX-License-Identifier: GPL-2.0

//! Shared pages that no sharer uses: packed once for all of them, in the pool of their scope (their
//! domain's, as a rule), and brought back where that pool is larger than it may be.
//!
//! Two walks take turns. The first takes shared pages out of the page tables of all sharers. The
//! second goes over the records: one that no page table maps is noted as idle, and whoever maps it
//! takes the note away; one that is idle still when the walk comes again was touched by nobody in
//! between, and is packed. A record knows nothing of its sharers, so nothing is done for each of them.
//!
//! Lock order: region > index. The list of pools is a leaf.

use super::{
    count,
    host::Host,
    region::Region,
    vm::{Scope, Vm},
};
use crate::{
    logic::slot::State,
    sys::{
        clock,
        frames::NotPacked,
        packed::Packed,
        page::{Frame, Label, Purpose},
        slots::SLOTS,
        task,
        zs::{Compressor, NoRoom, Scratch, Store},
    },
};
use core::sync::atomic::Ordering;
use kernel::{
    new_mutex,
    prelude::*,
    sync::{Arc, Mutex},
};

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

/// The pools of packed shared pages, one for each scope that needed one.
#[pin_data]
pub(crate) struct SharedPools {
    #[pin]
    list: Mutex<KVec<(Scope, Arc<Store>)>>,
}

impl SharedPools {
    /// None yet.
    pub(crate) fn new() -> impl PinInit<SharedPools> {
        pin_init!(SharedPools {
            list <- new_mutex!(KVec::new(), "thinram_shared_pools"),
        })
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.list.lock().is_empty()
    }

    /// Pages of memory that all of them take.
    pub(crate) fn pages(&self) -> u64 {
        let list = self.list.lock();
        list.iter()
            .fold(0, |sum, (_, store)| sum.saturating_add(store.pages()))
    }

    /// All of them as of now.
    pub(crate) fn all(&self) -> Result<KVec<(Scope, Arc<Store>)>> {
        let list = self.list.lock();
        let mut all = KVec::with_capacity(list.len(), GFP_KERNEL)?;
        for (scope, store) in list.iter() {
            all.push((*scope, store.clone()), GFP_KERNEL)?;
        }
        Ok(all)
    }

    /// That of `scope`, made if need be; only the reclaimer calls this.
    fn of(&self, scope: Scope) -> Result<Arc<Store>> {
        let find = |list: &KVec<(Scope, Arc<Store>)>| {
            let (_, store) = list.iter().find(|(of, _)| *of == scope)?;
            Some(store.clone())
        };
        if let Some(store) = find(&self.list.lock()) {
            return Ok(store);
        }
        let store = Store::new()?;
        store.open()?;
        self.list.lock().push((scope, store.clone()), GFP_KERNEL)?;
        Ok(store)
    }

    /// Drops those that are empty and of no VM's scope any more; only the reclaimer calls this.
    fn prune(&self, quotas: &[Quota]) {
        let mut dropped = KVec::new();
        let mut list = self.list.lock();
        let mut place = 0;
        while let Some((scope, store)) = list.get(place) {
            if store.objects() > 0 || quota_of(quotas, *scope).is_some() {
                place = place.saturating_add(1);
            } else if let Ok(pool) = list.remove(place) {
                // Without room for it in the list of what goes, it goes at once.
                let _ = dropped.push(pool, GFP_KERNEL);
            }
        }
        drop(list);
        drop(dropped);
    }
}

/// How much the pool of a scope may hold.
struct Quota {
    scope: Scope,
    pages: u64,
    store: Option<Arc<Store>>,
    /// It holds as much as it may.
    full: bool,
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
    let mut sizes = KVec::with_capacity(vms.len(), GFP_KERNEL)?;
    for vm in vms.iter().filter(|vm| vm.scope() != Scope::NONE) {
        sizes.push((vm.scope(), vm.snapshot().pages.total()), GFP_KERNEL)?;
    }
    sizes.sort_unstable_by_key(|(scope, _)| scope.0);
    let mut quotas: KVec<Quota> = KVec::with_capacity(sizes.len(), GFP_KERNEL)?;
    for (scope, size) in sizes {
        match quotas.last_mut() {
            Some(last) if last.scope == scope => last.pages = last.pages.saturating_add(size),
            _ => quotas.push(
                Quota {
                    scope,
                    pages: size,
                    store: None,
                    full: false,
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
    /// Pages that this round packed.
    freed: u64,
    /// Rounds in a row that packed nothing.
    barren: u32,
    rest_until_us: u64,
}

impl Hand {
    /// Goes on with the walks until `wanted` pages were packed, or for a while.
    pub(crate) fn step(
        &mut self,
        host: &Host,
        vms: &[Arc<Vm>],
        compressor: &mut Compressor,
        wanted: u64,
    ) -> Step {
        if self.rest_until_us > clock::now_us() || host.figures().pages_shared == 0 {
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
                    if let Some(quota) = quota.and_then(|place| quotas.get_mut(place)) {
                        if pack(host, quota, compressor, id, frame, label) {
                            left -= 1;
                            self.freed = self.freed.saturating_add(1);
                        }
                    }
                }
                None if self.record == u32::MAX => {
                    self.end_round();
                    return Step::Resting;
                }
                None => looks -= 1,
            }
            task::cond_resched();
        }
        Step::Busy
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
        self.rest_until_us = clock::now_us().saturating_add(REST_US << doublings);
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

    /// Brings pages back, the longest packed first, until no pool is larger than it may be or for a
    /// while.
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
        for (scope, store) in pools.iter() {
            let quota = quota_of(&quotas, *scope).and_then(|place| quotas.get(place));
            let cap = quota.map_or(0, |quota| quota.pages);
            if store.pages() > cap {
                store.compact();
                outcome = match self.shrink(host, *scope, store, cap, scratch) {
                    Step::Busy => Step::Busy,
                    Step::Resting => outcome,
                };
            }
        }
        host.shared_pools.prune(&quotas);
        outcome
    }

    /// Brings back a part of what one pool has too much.
    fn shrink(
        &self,
        host: &Host,
        scope: Scope,
        store: &Store,
        cap: u64,
        scratch: &mut Scratch,
    ) -> Step {
        // What was packed longest ago comes next under the hand.
        let (mut from, mut wrapped) = (self.record, false);
        for _ in 0..STEP_PAGES {
            if store.pages() <= cap || task::should_stop() {
                return Step::Resting;
            }
            match host.index().next_packed(&mut from, LOOK, scope) {
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

/// Packs one record, whose frame the caller found idle. False when it stays.
fn pack(
    host: &Host,
    quota: &mut Quota,
    compressor: &mut Compressor,
    id: u32,
    frame: Frame,
    label: Label,
) -> bool {
    let refusals = &host.compress_refusals;
    let page = frame.as_ref();
    if page.is_poisoned() {
        count(&refusals.poisoned);
        return false;
    }
    let store = match &quota.store {
        Some(store) => store.clone(),
        None => {
            let Ok(store) = host.shared_pools.of(quota.scope) else {
                count(&refusals.no_memory);
                return false;
            };
            quota.store.insert(store).clone()
        }
    };
    let node = page.node();
    // Nobody writes to a shared frame, so it need not be frozen to be read.
    let packed = match page.filled_with() {
        Some(pattern) => Packed::filled(label, node, &store, pattern),
        None if quota.full || store.pages() > quota.pages => Err(NoRoom::Full),
        None => {
            let Some(bytes) = compressor.compress(page, host.max_object_bytes()) else {
                count(&refusals.incompressible);
                return false;
            };
            Packed::compressed(label, node, &store, bytes, quota.pages)
        }
    };
    let packed = match packed {
        Ok(packed) => packed,
        Err(NoRoom::Full) => {
            quota.full = true;
            count(&refusals.pool_full);
            return false;
        }
        Err(NoRoom::Memory) => {
            count(&refusals.no_memory);
            return false;
        }
    };
    match host.index().pack(id, frame, packed) {
        Ok(()) => {
            count(&host.events.shared_compressions);
            true
        }
        Err(NotPacked::Held) => {
            count(&refusals.pinned);
            false
        }
        Err(NotPacked::Changed) => false,
    }
}

/// Gives a packed page `frame`, for all its sharers; a reference to what it has then.
pub(crate) fn bring_back(
    host: &Host,
    id: u32,
    frame: Frame,
    scratch: &mut Scratch,
) -> Result<Frame> {
    match host.index().bring_back(id, frame, scratch) {
        Ok(frame) => {
            count(&host.events.shared_decompressions);
            Ok(frame)
        }
        Err(_) => {
            count(&host.events.decompressions_failed);
            Err(EIO)
        }
    }
}

/// Pages that must become frames again before no shared pool is larger than `percent` allows.
pub(crate) fn pages_above(host: &Host, vms: &[Arc<Vm>], percent: u64) -> Result<u64> {
    let quotas = quotas_at(vms, percent)?;
    let mut pages = 0u64;
    for (scope, store) in host.shared_pools.all()? {
        let quota = quota_of(&quotas, scope).and_then(|place| quotas.get(place));
        let pool = store.pages();
        let excess = pool.saturating_sub(quota.map_or(0, |quota| quota.pages));
        if excess > 0 {
            let back = store.objects().saturating_mul(excess).div_ceil(pool);
            pages = pages.saturating_add(back);
        }
    }
    Ok(pages)
}
