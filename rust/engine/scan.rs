// SPDX-License-Identifier: GPL-2.0

//! The scanner: walks all regions in the order of their numbers, hashes what may have changed and
//! hands it to `merge`.
//!
//! Lock order: policy > region > index. The policy lock is held for a step, the region lock for one
//! page while anybody waits for it, for a window of pages otherwise, and neither while the scanner
//! sleeps.
//!
//! Pages that have an equal, it seems, are queued and merged some at a time, so that pages side by
//! side are taken out of the page tables in one go: each time costs the guest's CPUs an interrupt.
//!
//! What cannot have changed is not hashed again. A region whose pages were mostly unchanged earns
//! protection: its mappings are made read-only, and a page that was hashed under protection, with no
//! pin on it, is stable until a write fault, write(2) or punch says otherwise.

use super::{
    count,
    host::Host,
    merge::{self, Outcome},
    region::{Region, RegionGuard},
    shared::{Key, SharedPage},
    survey,
    vm::{Scope, Vm},
};
use crate::{
    logic::{
        batch::{run_length, Batch},
        bell::Ear,
        hints,
        huge::HugeWord,
        pace::{Limits, Pacer},
        slot::{Class, Slot, State},
        tunables::RunMode,
    },
    sys::{
        clock,
        hash::{self, Seed},
        page::{Frame, Purpose},
        slots::{Content, SLOTS},
        task::{self, Work},
        zs::Scratch,
    },
};
use core::sync::atomic::Ordering;
use kernel::sync::Arc;

/// The thread's work.
pub(crate) struct Scanner(pub(crate) Arc<Host>);

impl Work for Scanner {
    fn run(&self) {
        task::be_nice(5);
        let host = &self.0;
        let mut walk = Walk::new();
        let mut pacer = Pacer::new(clock::now_us());
        let mut ear = Ear::new();
        while !task::should_stop() {
            let limits = host.limits();
            let running = host.run_mode() == RunMode::Run;
            if !running || limits.total_pages == 0 {
                walk.rest();
                // Memory that is touched for the first time rings no bell.
                let idle_us = if running { 1_000_000 } else { u64::MAX };
                (host.scanner_bell).sleep(&mut ear, idle_us, task::should_stop);
                pacer = Pacer::new(clock::now_us());
                continue;
            }
            let cpu_before = clock::thread_cpu_us();
            let done = walk.step(host, pacer.batch(&limits));
            let cpu_us = clock::thread_cpu_us().saturating_sub(cpu_before);
            let mut sleep_us = pacer.after(&host.limits(), clock::now_us(), done, cpu_us);
            while sleep_us > 0 && !task::should_stop() && host.run_mode() == RunMode::Run {
                (host.scanner_bell).sleep(&mut ear, sleep_us, task::should_stop);
                sleep_us = pacer.after(&host.limits(), clock::now_us(), 0, 0);
            }
            task::cond_resched();
        }
    }

    fn wake(&self) {
        self.0.scanner_bell.ring();
    }
}

/// Where the scanner is.
struct Walk {
    region: u32,
    index: usize,
    /// Frames for new shared pages.
    spares: [Option<Frame>; AHEAD],
    /// To look into compressed shared pages.
    scratch: Option<Scratch>,
    /// The node that they were asked for: with `merge_across_nodes` 0, that of the next page.
    spare_node: i32,
    /// A frame for the next page that is given back to a VM, at that VM's expense.
    own: Option<(u32, Frame)>,
    /// End of the pages that were considered for protection.
    window: usize,
    /// The scope of the last visit, with its seed and the hash of a zero page.
    known: Option<(Scope, Seed, u64)>,
    /// Whether the index may need room: set by each hash.
    dirty: bool,
    /// Whether any region was found in this pass.
    found: bool,
}

/// Pages that are merged in one go.
const AHEAD: usize = 16;

/// A page that has an equal, it seems.
#[derive(Clone, Copy)]
struct Found {
    index: usize,
    /// What it was when it was hashed.
    slot: Slot,
    hash: u64,
    /// The hash stays true until a fault says otherwise.
    trusted: bool,
}

/// What is the same for all pages of a region.
struct Visit {
    scope: Scope,
    seed: Seed,
    zero_hash: u64,
    zero_only: bool,
    rules: merge::Rules,
    /// There may be two records of one content.
    unites: bool,
    pass: u64,
}

impl Walk {
    fn new() -> Walk {
        Walk {
            region: 0,
            index: 0,
            window: 0,
            spares: [const { None }; AHEAD],
            scratch: None,
            spare_node: ANY_NODE,
            own: None,
            known: None,
            dirty: true,
            found: false,
        }
    }

    /// Looks at up to `pages` pages; returns how many it was.
    fn step(&mut self, host: &Host, pages: u64) -> u64 {
        let policy = host.policy();
        // `run` may have changed while this waited for the policy: its writer counts on no merge.
        if host.run_mode() != RunMode::Run {
            return 0;
        }
        let done = self.walk(host, policy.zero_only, pages);
        // With the policy locked: who stopped the scanner sees its counters stand still.
        host.events
            .scan_cpu_us
            .store(clock::thread_cpu_us(), Ordering::Relaxed);
        done
    }

    /// Looks at up to `pages` pages, with the policy locked; returns how many it was.
    fn walk(&mut self, host: &Host, zero_only: bool, pages: u64) -> u64 {
        /// Pages between two looks at whether the index needs room.
        const STRIDE: u64 = 64;
        let contents = host.contents();
        let mut done = 0;
        while done < pages {
            let room = core::mem::take(&mut self.dirty);
            if room && host.index().maintain(host.registry(), contents).is_err() {
                count(&host.refusals.no_memory);
            }
            if self.region >= host.registry().end() {
                self.end_pass(host);
                // A pass over nothing must not spin.
                done = done.saturating_add(1);
                if !self.found {
                    return pages;
                }
                self.found = false;
                continue;
            }
            let Some(region) = host.registry().get(self.region) else {
                self.next_region();
                continue;
            };
            self.found = true;
            let vm = region.vm();
            let left = (pages - done).min(STRIDE).min((SLOTS - self.index) as u64) as usize;
            if !vm.shares() || !vm.may_scan(clock::now_us(), left as u64) {
                self.next_region();
                done = done.saturating_add(1);
                continue;
            }
            let scope = vm.scope();
            let (seed, zero_hash) = self.hashes_of(host, scope);
            let visit = Visit {
                scope,
                seed,
                zero_hash,
                zero_only,
                rules: host.rules(),
                unites: host.index().expects_doubles(),
                pass: host.events.full_scans.load(Ordering::Relaxed),
            };
            done = done.saturating_add(self.visit(host, &region, &visit, left) as u64);
        }
        done
    }

    /// Seed of a scope, and the hash of a zero page under it.
    fn hashes_of(&mut self, host: &Host, scope: Scope) -> (Seed, u64) {
        match self.known {
            Some((known, seed, zero_hash)) if known == scope => (seed, zero_hash),
            _ => {
                let seed = host.seed(scope);
                let zero_hash = hash::of_page(host.zero_frame(0), seed);
                self.known = Some((scope, seed, zero_hash));
                (seed, zero_hash)
            }
        }
    }

    fn next_region(&mut self) {
        self.region = self.region.saturating_add(1);
        self.index = 0;
        self.window = 0;
    }

    fn restart(&mut self) {
        self.region = 0;
        self.index = 0;
        self.window = 0;
    }

    /// The next pass is a whole one, and may be long in coming: what is kept for it goes.
    fn rest(&mut self) {
        self.restart();
        self.spares = [const { None }; AHEAD];
        self.own = None;
    }

    fn end_pass(&mut self, host: &Host) {
        self.restart();
        if self.found {
            host.index().end_pass();
            count(&host.events.full_scans);
        }
    }

    /// Looks at up to `left` pages of one region, from where the walk is.
    fn visit(&mut self, host: &Host, region: &Region, visit: &Visit, left: usize) -> usize {
        let vm = region.vm();
        let end = self.index.saturating_add(left).min(SLOTS);
        let from = self.index;
        let mut skipped = 0u64;
        let mut scanned = 0u64;
        while self.index < end {
            // Most pages of a calm host need nothing: pass over them without the lock.
            while self.index < end && !needs_look(region.peek(self.index), visit.pass, self.index) {
                skipped += u64::from(holds_data(region.peek(self.index)));
                self.index += 1;
            }
            if self.index >= end {
                break;
            }
            if !self.provide(host, region) {
                self.index += 1;
                continue;
            }
            let mut guard = region.lock();
            if guard.is_retired() {
                drop(guard);
                self.next_region();
                return left;
            }
            self.protect_if_calm(&mut guard);
            let mut queue = Batch::default();
            while self.index < end.min(self.window) && !queue.is_full() {
                let slot = guard.slot(self.index);
                if needs_look(slot, visit.pass, self.index) {
                    let alone = slot.state() == State::Shared && is_alone(host, slot);
                    if alone && !self.has_own(vm) {
                        break;
                    }
                    let node = self.spare_node_of_next(&guard, visit);
                    if node != self.spare_node {
                        if queue.is_empty() {
                            self.drop_spares(node);
                        }
                        break;
                    }
                    if is_known(slot, visit.pass, self.index) {
                        skipped += 1;
                    } else if holds_data(slot) {
                        scanned += 1;
                    }
                    if slot.state() != State::Shared {
                        if let Some(found) = self.look(host, &mut guard, visit, slot) {
                            // The loop ends when it is full.
                            let _ = queue.push(found);
                        }
                    } else if !alone {
                        if visit.unites || is_recheck(visit.pass, self.index) {
                            merge::unite(host, &mut guard, self.index, visit.rules);
                        }
                    } else if let Some((_, own)) = self.own.take() {
                        give_back(host, &mut guard, self.index, own);
                    }
                } else {
                    skipped += u64::from(holds_data(slot));
                }
                self.index += 1;
                if region.is_wanted() {
                    break;
                }
            }
            self.merge_all(host, &mut guard, visit, &queue);
            drop(guard);
            if region.is_wanted() {
                count(&host.events.scan_yields);
                give_way(region);
            }
        }
        host.events
            .pages_scanned
            .fetch_add(scanned, Ordering::Relaxed);
        host.events
            .pages_skipped
            .fetch_add(skipped, Ordering::Relaxed);
        let looked = self.index.saturating_sub(from).max(1);
        if self.index >= SLOTS {
            self.next_region();
        }
        looked
    }

    /// Where a merge of the next page needs its frame.
    fn spare_node_of_next(&self, guard: &RegionGuard<'_>, visit: &Visit) -> i32 {
        match guard.page(self.index) {
            _ if visit.rules.across_nodes => ANY_NODE,
            Some(page) => page.node(),
            None => self.spare_node,
        }
    }

    /// The spare frames that come next are asked for on `node`.
    fn drop_spares(&mut self, node: i32) {
        self.spare_node = node;
        self.spares = [const { None }; AHEAD];
    }

    /// Whether there is a frame that was allocated at the expense of `vm`.
    fn has_own(&self, vm: &Vm) -> bool {
        matches!(self.own, Some((id, _)) if id == vm.id())
    }

    /// Allocates what the page at hand may need, with no lock held. False if there is no memory for a
    /// page that cannot do without.
    fn provide(&mut self, host: &Host, region: &Region) -> bool {
        for spare in self.spares.iter_mut().filter(|spare| spare.is_none()) {
            *spare = Frame::alloc(Purpose::Shared, self.spare_node);
            if spare.is_none() {
                break;
            }
        }
        let figures = host.figures();
        if self.scratch.is_none() && figures.packed.saturating_add(figures.swapped) > 0 {
            self.scratch = Scratch::new();
        }
        let vm = region.vm();
        let slot = region.peek(self.index);
        if slot.state() != State::Shared || !is_alone(host, slot) {
            return true;
        }
        if !self.has_own(vm) {
            let own = region.returned_frame();
            self.own = own.map(|own| (vm.id(), own));
        }
        if self.own.is_none() {
            count(&host.refusals.no_memory);
        }
        self.own.is_some()
    }

    /// Write-protects the next window of pages, once a pass, when they were mostly unchanged lately.
    fn protect_if_calm(&mut self, guard: &mut RegionGuard<'_>) {
        /// Pages that are protected in one go, with the lock held.
        const WINDOW: usize = 64;
        /// A window earns protection when fewer than one in this many of its pages were volatile.
        const CALM: usize = 8;
        if self.index < self.window {
            return;
        }
        if guard.huge().is_some() {
            self.window = SLOTS;
            survey::protect_if_calm(guard);
            return;
        }
        self.window = (self.index + 1).next_multiple_of(WINDOW);
        let (mut first, mut last, mut wild, mut open) = (SLOTS, 0, 0usize, 0usize);
        for index in self.index..self.window {
            let slot = guard.slot(index);
            if slot.state() != State::Private || slot.is_stable() {
                continue;
            }
            match slot.class() {
                Class::Volatile => wild += 1,
                Class::Unshared if !guard.is_protected(index) => {
                    open += 1;
                    first = first.min(index);
                    last = index;
                }
                _ => {}
            }
        }
        // The kernel's walk ends at a mapping that can never write, and would leave others writable.
        let watched = guard
            .region()
            .vm()
            .read_only_mappings
            .load(Ordering::Relaxed)
            == 0;
        if watched && open > 0 && wild * CALM < (self.window - self.index).max(CALM) {
            guard.protect(first, last - first + 1);
        }
    }

    /// Looks at one page of the VM's own that may have changed; returns it if it is to be merged.
    fn look(
        &mut self,
        host: &Host,
        guard: &mut RegionGuard<'_>,
        visit: &Visit,
        slot: Slot,
    ) -> Option<Found> {
        let index = self.index;
        if is_known(slot, visit.pass, index) {
            survey::refresh(host, guard, index, visit.scope);
            return None;
        }
        let page = guard.own_page(index)?;
        self.dirty = true;
        if page.is_poisoned() {
            count(&host.refusals.poisoned);
            return None;
        }
        // In this order: protected, then nobody holds a pin from before, then the hash.
        let trusted = guard.is_protected(index) && page.is_unpinned();
        // What takes longest is to get hold of a page's bytes.
        let next = guard.own_page(index.saturating_add(1));
        let hash = hash::of_page_before(page, visit.seed, next);
        let key = visit.key(hash);
        if slot.state() == State::Huge {
            survey::note(host, guard, index, key, hash == visit.zero_hash, trusted);
            return None;
        }
        let found = Found {
            index,
            slot,
            hash,
            trusted,
        };
        let changed = slot.class() != Class::Unchecked && slot.tag() != hash as u16;
        if changed {
            let backoff = slot.backoff();
            guard.note(
                index,
                slot.looked_at(Class::Volatile, hash).with_backoff(backoff),
            );
            return None;
        }
        if hash == visit.zero_hash {
            return Some(found);
        }
        if visit.zero_only {
            found.note(guard, found.trusted);
            return None;
        }
        let own = guard.region().page_id(index);
        if merge::has_equal(host, key, own, visit.rules) {
            return Some(found);
        }
        found.settle(host, guard, key);
        None
    }

    /// Merges what was found, in one go for as long as nobody waits; the walk goes on at the first
    /// page that was left.
    fn merge_all(
        &mut self,
        host: &Host,
        guard: &mut RegionGuard<'_>,
        visit: &Visit,
        queue: &Batch<Found, AHEAD>,
    ) {
        let mut unmapped_to = 0;
        let mut rest = queue.iter();
        while let Some(found) = rest.next() {
            let wanted = guard.region().is_wanted();
            let is_first = unmapped_to == 0;
            if !is_first && (wanted || self.spares.iter().all(Option::is_none)) {
                self.index = found.index;
                return;
            }
            if found.index >= unmapped_to {
                // With nodes apart a page may be refused before it would be unmapped.
                let ahead = if wanted || !visit.rules.across_nodes {
                    0
                } else {
                    let places = rest.clone().map(|found| found.index);
                    run_length(core::iter::once(found.index).chain(places))
                };
                guard.zap_ahead(found.index, ahead);
                unmapped_to = found.index.saturating_add(ahead.max(1));
            }
            // It may have been the other page of a pair.
            if guard.slot(found.index) == found.slot {
                self.merge(host, guard, visit, found);
            }
        }
    }

    /// Merges one page, or notes why not.
    fn merge(&mut self, host: &Host, guard: &mut RegionGuard<'_>, visit: &Visit, found: Found) {
        let index = found.index;
        if found.hash == visit.zero_hash {
            if merge::try_zero(host, guard, index) != Outcome::Merged {
                found.note(guard, false);
            }
            return;
        }
        let mut spare = self.spares.iter_mut().find_map(Option::take);
        let room = merge::Room {
            spare: &mut spare,
            scratch: &mut self.scratch,
        };
        let key = visit.key(found.hash);
        let outcome = merge::try_merge(host, guard, index, key, visit.rules, room);
        if let Some(place) = self.spares.iter_mut().find(|place| place.is_none()) {
            *place = spare;
        }
        match outcome {
            Outcome::Merged => {}
            Outcome::Unique => found.settle(host, guard, key),
            Outcome::NotNow => found.note(guard, false),
        }
    }
}

impl Visit {
    fn key(&self, hash: u64) -> Key {
        Key {
            hash,
            scope: self.scope,
        }
    }
}

impl Found {
    /// What a page is that was not merged.
    fn looked_at(&self, stable: bool) -> Slot {
        self.slot
            .looked_at(Class::Unshared, self.hash)
            .with_backoff(self.slot.backoff().saturating_sub(1))
            .with_stable(stable)
    }

    /// Notes that.
    fn note(&self, guard: &mut RegionGuard<'_>, stable: bool) {
        guard.note(self.index, self.looked_at(stable));
    }

    /// Notes that, and leaves a hint for the next page that comes with the same content.
    fn settle(&self, host: &Host, guard: &mut RegionGuard<'_>, key: Key) {
        let own = guard.region().page_id(self.index);
        let note = |slot| guard.note(self.index, slot);
        hints::settle(self.looked_at(self.trusted), note, || {
            merge::leave_hint(host, key, own)
        });
    }
}

/// No node in particular.
const ANY_NODE: i32 = -1;

/// An unchanged page is hashed again every so many passes.
const RECHECK: u64 = 64;

/// Whether it is time to look at a slot at which nothing is known to have changed.
fn is_recheck(pass: u64, index: usize) -> bool {
    pass.wrapping_add(index as u64) % RECHECK == 0
}

/// Whether the scanner has anything to do at this slot in this pass.
#[inline]
fn needs_look(slot: Slot, pass: u64, index: usize) -> bool {
    match slot.state() {
        // Hints are lossy: a page that lost its hint unnoticed is found by its next hash.
        State::Private if slot.is_stable() => is_recheck(pass, index),
        State::Private => !slot.skipped_in(pass, index as u64),
        // Every 8th pass is soon enough to give a lonely shared frame back, or to unite two.
        State::Shared => pass.wrapping_add(index as u64) % 8 == 0,
        // What a split would gain is found out anew in each pass: others come and go.
        State::Huge => !slot.is_stable() || is_recheck(pass, index) || has_others(slot),
        State::Empty | State::Zero | State::Compressed | State::Filled | State::Swapped => false,
    }
}

/// Whether the slot has memory of its own to hash.
fn holds_data(slot: Slot) -> bool {
    matches!(slot.state(), State::Private | State::Huge)
}

fn has_others(slot: Slot) -> bool {
    HugeWord::from_slot(slot).is_some_and(HugeWord::has_others)
}

/// Whether the slot is a part of a folio whose hash needs not be taken in this pass.
fn is_known(slot: Slot, pass: u64, index: usize) -> bool {
    slot.state() == State::Huge && slot.is_stable() && !is_recheck(pass, index)
}

/// Gives a sharer that is alone a copy of its own, and the shared frame back to the host. The shared
/// frame itself is nobody's: a pipe or a pin that was taken through another sharer must never see
/// what is written from here on, and its memory was never charged.
pub(crate) fn give_back(host: &Host, guard: &mut RegionGuard<'_>, index: usize, mut own: Frame) {
    let slot = guard.slot(index);
    let Some(shared) = (host.index().page(slot.record())).and_then(SharedPage::frame) else {
        return;
    };
    if own.copy_from(shared.as_ref()).is_err() {
        count(&host.refusals.poisoned);
        return;
    }
    drop(shared);
    guard.zap(index);
    host.release(guard.set(index, Content::Private(own), slot.backoff()));
}

/// Whether a Shared slot is the only sharer of its record, which has a frame to give back.
fn is_alone(host: &Host, slot: Slot) -> bool {
    host.index().is_alone(slot.record())
}

/// Lets those who wait for the region have it. The mutex hands itself over to who waits longest, so
/// this need not sleep, and must not: the policy is locked.
fn give_way(region: &Region) {
    const TRIES: u32 = 100;
    for _ in 0..TRIES {
        if !region.is_wanted() {
            return;
        }
        task::cond_resched();
        core::hint::spin_loop();
    }
}

impl Host {
    /// The ceilings of the moment.
    fn limits(&self) -> Limits {
        Limits {
            pages_per_sec: self.knobs.scan_pages_per_sec.load(Ordering::Relaxed),
            period_secs: self.knobs.scan_period_secs.load(Ordering::Relaxed),
            cpu_max_percent: self.knobs.scan_cpu_max_percent.load(Ordering::Relaxed) as u32,
            total_pages: self.walked_pages(),
        }
    }
}
