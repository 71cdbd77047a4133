// SPDX-License-Identifier: GPL-2.0

//! The reclaimer: the thread that keeps an eye on the host's memory, takes memory from VMs that
//! are over their limit, or from the host's poorest when it is short, and gives it back where a
//! pool is larger than it may be.
//!
//! A VM's pages are swept as by a clock with one hand. What a sweep finds mapped it takes out of
//! the page tables; what is still out of them when the next sweep comes was not touched since, and
//! is compressed. That costs no bit a page and no look into page tables. The third sweep that frees
//! nothing takes pages whether they are in use or not, and if that frees nothing either the VM is
//! left alone for a while.
//!
//! For the host's sake pages that are not in use go first, whoever has them (`logic::funding`). Which VM
//! has any its sample tells, and what came back to it since; a VM of which two sweeps found hardly any
//! has none until it is sampled anew. Such a sweep takes no page that was touched since the last one.
//! Meanwhile a shared page is not in use if no sharer touched it for a period of sampling; without any
//! such VM, if none did between two rounds.
//!
//! Lock order: region > index. The region lock is held for 64 pages, or for fewer when somebody waits
//! for it.

use super::{
    cold::{self, Hand},
    compress::{self, Beyond, Outcome},
    host::Host,
    region::{Region, RegionGuard},
    sample::Sampler,
    vm::{Clock, Vm},
    volume::Ready,
};
use crate::{
    logic::{
        bell::Ear,
        counts::Class,
        funding::{self, Holding, Pages, Victim},
        slot::State,
        state::HostState,
    },
    sys::{
        clock,
        page::Frame,
        slots::SLOTS,
        task::{self, Work},
        zs::{Compressor, Scratch},
    },
};
use core::sync::atomic::Ordering;
use kernel::sync::Arc;

/// Pages under one hold of a region's lock.
const WINDOW: usize = 64;
/// Pages taken from one VM before it is asked again who is the poorest.
const STEP_PAGES: u64 = 256;
/// Objects that go to the swap file at a time.
const EVICT: u32 = 256;
/// Pages that a full pool is made smaller by, at least.
const LEAST_ROOM: u64 = 8;
/// Between two sweeps guests have so long to touch what they need.
const REST_US: u64 = 100_000;
/// Steps before others have their turn.
const STEPS_PER_ROUND: u32 = 64;
/// A VM with nothing to take is left alone so long.
const STUCK_US: u64 = 500_000;
/// And twice as long each time that there is nothing again, so many times.
const STUCK_DOUBLINGS: u32 = 4;
/// So many sweeps without gain, and the next takes pages that are in use.
const GENTLE_SWEEPS: u32 = 2;
/// A sweep that frees less than this part of what it went over found hardly anything.
const LEAN_PART: u64 = 64;
/// For so long a VM with idle memory in folios waits for the splitter.
const SPLIT_US: u64 = 2_000_000;
/// KiB of a page.
const PAGE_KB: u64 = 4;

/// The thread's work.
pub(crate) struct Reclaimer(pub(crate) Arc<Host>);

impl Work for Reclaimer {
    fn run(&self) {
        let host = &self.0;
        let mut worker = Worker {
            sampler: Sampler::new(),
            compressor: None,
            scratch: None,
            hand: Hand::default(),
        };
        let mut ear = Ear::new();
        while !task::should_stop() {
            if host.pressure.look() {
                host.splitter_bell.ring();
            }
            let next = worker.round(host);
            host.events
                .reclaim_cpu_us
                .store(clock::thread_cpu_us(), Ordering::Relaxed);
            let idle_us = host.pressure.next_look_us();
            match next {
                Next::Again => task::cond_resched(),
                Next::Soon => {
                    (host.reclaimer_bell).sleep(&mut ear, idle_us.min(REST_US), task::should_stop)
                }
                Next::Idle => (host.reclaimer_bell).sleep(&mut ear, idle_us, task::should_stop),
            }
        }
    }

    fn wake(&self) {
        self.0.reclaimer_bell.ring();
    }
}

/// When there is more to do.
#[derive(Clone, Copy, Eq, Ord, PartialEq, PartialOrd)]
enum Next {
    /// When something changes.
    Idle,
    /// Once guests had the time to touch what they need, or memory came free.
    Soon,
    /// At once; others had their turn.
    Again,
}

/// Which pages a sweep takes.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Need {
    /// Those that were not touched; others pay when there are hardly any.
    Idle,
    /// Those that were not touched.
    Cold,
    /// Also others, if there are none.
    Any,
}

/// What the thread works with.
struct Worker {
    sampler: Sampler,
    compressor: Option<Compressor>,
    scratch: Option<Scratch>,
    /// Where it is among the shared pages.
    hand: Hand,
}

impl Worker {
    /// Does a part of what is to be done for each VM and for the host.
    fn round(&mut self, host: &Host) -> Next {
        host.bury_regions();
        let Ok(vms) = host.vms().all() else {
            return Next::Soon;
        };
        self.sampler.turn(host, &vms);
        mark_unfair(host, &vms);
        let mut next = Next::Idle;
        for vm in &vms {
            next = next.max(self.enforce_cap(host, vm));
            next = next.max(self.enforce_limit(host, vm));
        }
        next = next.max(self.enforce_shared_caps(host, &vms));
        next.max(self.relieve(host, &vms))
    }

    /// Takes memory from a VM that is over its `limit_kb`, its own alone.
    fn enforce_limit(&mut self, host: &Host, vm: &Vm) -> Next {
        vm.heard();
        let Some((high_kb, low_kb)) = vm.limit_marks_kb() else {
            return Next::Idle;
        };
        if vm.resident_kb() <= high_kb {
            return Next::Idle;
        }
        for _ in 0..STEPS_PER_ROUND {
            let over_kb = vm.resident_kb().saturating_sub(low_kb);
            if over_kb == 0 || task::should_stop() {
                return Next::Idle;
            }
            if self.rests(vm) {
                return Next::Soon;
            }
            let wanted = over_kb.div_ceil(PAGE_KB).min(STEP_PAGES);
            let need = match vm.is_over_limit() {
                true => Need::Any,
                false => Need::Cold,
            };
            if self.sweep(host, vm, wanted, need) {
                return Next::Soon;
            }
        }
        Next::Again
    }

    /// Whether a VM is to be left alone for now; not while a task waits, unless there is nothing to
    /// take.
    fn rests(&self, vm: &Vm) -> bool {
        let clock = vm.clock();
        clock.rest_until_us > clock::now_us() && (clock.stuck > 0 || !vm.is_awaited())
    }

    /// Takes memory from the VMs that pay least for it until the host is out of the worst.
    fn relieve(&mut self, host: &Host, vms: &[Arc<Vm>]) -> Next {
        for _ in 0..STEPS_PER_ROUND {
            let wanted = host.pressure.wanted_kb().div_ceil(PAGE_KB);
            if wanted == 0 || task::should_stop() {
                vms.iter().for_each(|vm| vm.forget_sweeps());
                return Next::Idle;
            }
            let more_shared = self.take_shared(host, vms, wanted) == cold::Step::Busy;
            let Some((vm, victim)) = self.victim(host, vms) else {
                if more_shared {
                    host.pressure.look();
                    continue;
                }
                return Next::Soon;
            };
            let wanted = STEP_PAGES.min(victim.pages).min(wanted);
            let waits = match victim.with {
                Pages::Any => self.sweep(host, vm, wanted, Need::Any),
                Pages::Idle if vm.idle_pages() > 0 => {
                    let idle = wanted.min(vm.idle_pages());
                    self.sweep(host, vm, idle, Need::Idle)
                }
                Pages::Idle => self.shrink_pool(host, vm, wanted),
            };
            if waits {
                return Next::Soon;
            }
            host.pressure.look();
            task::cond_resched();
        }
        Next::Again
    }

    /// Who pays next; `None` when all that could are to be left alone for now.
    fn victim<'a>(&self, host: &Host, vms: &'a [Arc<Vm>]) -> Option<(&'a Arc<Vm>, Victim)> {
        let poorest = |may: &dyn Fn(&Vm) -> bool| poorest(host, vms, may);
        if host.state() != HostState::Low {
            // Others do not pay for one that rests.
            return poorest(&|vm| !is_stuck(vm)).filter(|(vm, _)| !self.rests(vm));
        }
        // No time to lose: rather than that others pay with pages in use, a rest is cut short.
        let rested = poorest(&|vm| !is_stuck(vm) && !self.rests(vm));
        let is_idle = |(_, victim): &(&Arc<Vm>, Victim)| victim.with == Pages::Idle;
        if rested.as_ref().is_some_and(is_idle) {
            return rested;
        }
        poorest(&|vm| !is_stuck(vm) && !vm.wants_small())
            .filter(is_idle)
            .or(rested)
    }

    /// Moves what takes `wanted` pages of a VM's pool to its swap file. True when it has to wait for that.
    fn shrink_pool(&mut self, host: &Host, vm: &Vm, wanted: u64) -> bool {
        let mut clock = vm.clock();
        let (moved, ready) = match made(&mut self.scratch, Scratch::new) {
            Some(scratch) => {
                let goal = vm.store().pages().saturating_sub(wanted);
                evict(host, vm, &mut clock, scratch, goal)
            }
            None => (0, Ready::No),
        };
        let waits = moved == 0 && ready == Ready::Soon;
        if moved == 0 && !waits {
            clock.pool_rest_until_us = clock::now_us().saturating_add(STUCK_US);
        }
        vm.set_clock(clock);
        vm.relieve_waiters();
        waits
    }

    /// Goes on with the sweep of a VM until `wanted` pages that it has a `need` of were taken or the hand
    /// came round. True when it has to wait for the swap file, or for memory to work in.
    fn sweep(&mut self, host: &Host, vm: &Vm, wanted: u64, need: Need) -> bool {
        let mut clock = vm.clock();
        let (Some(compressor), Some(scratch), Ok(())) = (
            made(&mut self.compressor, || Compressor::new().ok()),
            made(&mut self.scratch, Scratch::new),
            vm.store().open(),
        ) else {
            clock.rest_until_us = clock::now_us().saturating_add(STUCK_US);
            vm.set_clock(clock);
            return true;
        };
        let swaps = vm.swap().is_on(&host.swap);
        let mut taking = Taking {
            host,
            compressor,
            force: need == Need::Any && clock.barren >= GENTLE_SWEEPS,
            left: wanted,
            full: false,
            needs_swap: false,
            beyond: if swaps {
                Beyond::Incompressible
            } else {
                Beyond::Nothing
            },
        };
        let mut waits = false;
        while taking.left > 0 && !taking.full && !task::should_stop() {
            if clock.region >= host.registry().end() {
                break;
            }
            match host.registry().get(clock.region) {
                Some(region) if region.vm().id() == vm.id() => taking.visit(&region, &mut clock),
                _ => clock.next_region(),
            }
            if swaps && (taking.full || taking.needs_swap) {
                match taking.make_way(vm, &mut clock, scratch) {
                    Ready::Now => {}
                    Ready::Soon => {
                        waits = true;
                        break;
                    }
                    Ready::No => {
                        taking.beyond = Beyond::Nothing;
                        taking.needs_swap = false;
                    }
                }
            }
        }
        let taken = wanted.saturating_sub(taking.left);
        clock.freed = clock.freed.saturating_add(taken);
        if waits {
            vm.set_clock(clock);
            vm.relieve_waiters();
            return true;
        }
        let (full, ended) = (taking.full, taking.left > 0 && !task::should_stop());
        // A sweep for idle pages alone is not in vain: there are others.
        let mut in_vain =
            ended && need != Need::Idle && clock.freed == 0 && clock.barren >= GENTLE_SWEEPS;
        let mut moved = 0;
        if in_vain && swaps {
            // All that can be is compressed, and that is not enough.
            let goal = vm.store().pages().saturating_sub(wanted);
            let (went, ready) = evict(host, vm, &mut clock, scratch, goal);
            if went == 0 && ready == Ready::Soon {
                vm.set_clock(clock);
                return true;
            }
            moved = went;
            in_vain = went == 0;
        }
        if ended && !full {
            if need == Need::Idle {
                judge(host, vm, &mut clock);
            }
            clock.barren = match clock.freed {
                0 if !in_vain => clock.barren.saturating_add(1),
                _ => 0,
            };
            clock.freed = 0;
            clock.region = 0;
        }
        let stuck = full || in_vain;
        vm.set_stuck(stuck);
        clock.stuck = if stuck {
            clock.stuck.saturating_add(1)
        } else {
            0
        };
        let rest_us = match (stuck, ended) {
            (true, _) => STUCK_US << clock.stuck.min(STUCK_DOUBLINGS),
            (false, true) if moved == 0 => REST_US,
            (false, _) => 0,
        };
        clock.rest_until_us = clock::now_us().saturating_add(rest_us);
        vm.set_clock(clock);
        vm.relieve_waiters();
        false
    }

    /// Takes shared pages that no sharer uses, of all VMs.
    fn take_shared(&mut self, host: &Host, vms: &[Arc<Vm>], wanted: u64) -> cold::Step {
        let (Some(compressor), Some(scratch)) = (
            made(&mut self.compressor, || Compressor::new().ok()),
            made(&mut self.scratch, Scratch::new),
        ) else {
            return cold::Step::Resting;
        };
        let unused_us = || shared_unused_us(host, vms);
        (self.hand).step(host, vms, compressor, scratch, wanted, unused_us)
    }

    /// Swaps shared pages out, or brings them back, where a pool of theirs is larger than it may be.
    fn enforce_shared_caps(&mut self, host: &Host, vms: &[Arc<Vm>]) -> Next {
        if host.shared_tried_anew() {
            self.hand.try_anew();
        }
        if host.shared_pools.is_empty() {
            return Next::Idle;
        }
        let Some(scratch) = made(&mut self.scratch, Scratch::new) else {
            return Next::Soon;
        };
        match self.hand.enforce_caps(host, vms, scratch) {
            cold::Step::Busy => Next::Again,
            cold::Step::Resting => Next::Idle,
        }
    }

    /// Swaps pages out, or brings them back where there is no swap, until the pool is no larger than it
    /// may be, the longest compressed first.
    fn enforce_cap(&mut self, host: &Host, vm: &Vm) -> Next {
        let cap = vm.pool_cap_pages(&host.knobs);
        if vm.store().pages() <= cap {
            return Next::Idle;
        }
        vm.store().compact();
        let Some(scratch) = made(&mut self.scratch, Scratch::new) else {
            return Next::Soon;
        };
        if vm.swap().is_on(&host.swap) {
            let mut clock = vm.clock();
            let (moved, ready) = evict(host, vm, &mut clock, scratch, cap);
            vm.set_clock(clock);
            return match (moved, ready) {
                (1.., Ready::Now) => Next::Again,
                _ => Next::Soon,
            };
        }
        // What was compressed longest ago comes next under the hand.
        let first = vm.clock().region;
        let end = host.registry().end();
        let mut spare = None;
        for id in Iterator::chain(first..end, 0..first.min(end)) {
            let Some(region) = host.registry().get(id) else {
                continue;
            };
            if region.vm().id() != vm.id() {
                continue;
            }
            for start in (0..SLOTS).step_by(WINDOW) {
                if vm.store().pages() <= cap || task::should_stop() {
                    return Next::Idle;
                }
                if !bring_back(host, &region, start, scratch, &mut spare) {
                    return Next::Soon;
                }
                task::cond_resched();
            }
            vm.store().compact();
        }
        Next::Soon
    }
}

/// Draws the conclusion from a whole sweep for pages that are not in use.
fn judge(host: &Host, vm: &Vm, clock: &mut Clock) {
    let pages = vm.snapshot().pages;
    let small = pages.get(Class::Private);
    let lean = clock.freed.saturating_mul(LEAN_PART) <= small;
    clock.lean = if lean {
        clock.lean.saturating_add(1)
    } else {
        0
    };
    let now_us = clock::now_us();
    let none_left = clock.lean >= GENTLE_SWEEPS;
    if none_left && clock.lean_since_us == 0 {
        clock.lean_since_us = now_us;
    }
    // What is idle may lie in folios, which no sweep takes: they have to be split before.
    let may_split =
        pages.get(Class::Huge) > 0 && now_us.saturating_sub(clock.lean_since_us) < SPLIT_US;
    vm.set_wants_small(none_left && may_split);
    if none_left && may_split {
        host.splitter_bell.ring();
        return;
    }
    clock.spent = none_left;
    clock.lean_since_us = 0;
}

/// What to work with, made when it is first needed.
fn made<T>(tool: &mut Option<T>, make: impl FnOnce() -> Option<T>) -> Option<&mut T> {
    if tool.is_none() {
        *tool = make();
    }
    tool.as_mut()
}

impl Clock {
    fn next_region(&mut self) {
        self.region = self.region.saturating_add(1);
        self.index = 0;
        self.touched = 0;
    }
}

/// Pages that are being taken from a VM.
struct Taking<'a> {
    host: &'a Host,
    compressor: &'a mut Compressor,
    /// Also those that are in use.
    force: bool,
    left: u64,
    /// The VM's pool is full.
    full: bool,
    /// The swap file has to be prepared.
    needs_swap: bool,
    /// Where pages may go besides the pool.
    beyond: Beyond,
}

impl Taking<'_> {
    /// Looks at the Private pages of a region from where the hand is: compresses those that nobody
    /// touched since the last sweep, and takes the others out of the page tables.
    fn visit(&mut self, region: &Region, clock: &mut Clock) {
        while clock.index < SLOTS {
            let end = (clock.index / WINDOW + 1) * WINDOW;
            let is_private = |index| region.peek(index).state() == State::Private;
            if (clock.index..end).any(is_private) {
                let mut guard = region.lock();
                if guard.is_retired() {
                    break;
                }
                self.take_window(region, &mut guard, clock, end);
                drop(guard);
                if self.left == 0 || self.full || self.needs_swap {
                    return;
                }
                task::cond_resched();
            } else {
                clock.index = end;
            }
        }
        clock.next_region();
    }

    /// The same up to `end`, of one window, or until somebody waits for the region.
    fn take_window(
        &mut self,
        region: &Region,
        guard: &mut RegionGuard<'_>,
        clock: &mut Clock,
        end: usize,
    ) {
        if clock.index % WINDOW == 0 {
            clock.touched = 0;
        }
        clock.touched |= unmap_window(guard, clock.index, end);
        while clock.index < end && self.left > 0 {
            let index = clock.index;
            let touched = clock.touched >> (index % WINDOW) & 1 != 0;
            if guard.slot(index).state() == State::Private && (self.force || !touched) {
                match compress::pack(self.host, guard, index, self.compressor, self.beyond) {
                    Outcome::Packed => self.left -= 1,
                    // This page comes next when there is room again.
                    Outcome::PoolFull => {
                        self.full = true;
                        return;
                    }
                    Outcome::NeedsSwap => {
                        self.needs_swap = true;
                        return;
                    }
                    Outcome::Refused => {}
                }
            }
            clock.index += 1;
            if region.is_wanted() {
                return;
            }
        }
    }

    /// Makes room where a page could not go.
    fn make_way(&mut self, vm: &Vm, clock: &mut Clock, scratch: &mut Scratch) -> Ready {
        let cap = vm.pool_cap_pages(&self.host.knobs);
        let ready = if self.full {
            // So much less that not every page finds it full.
            let goal = (cap - cap / 16).min(vm.store().pages().saturating_sub(LEAST_ROOM));
            let (moved, ready) = evict(self.host, vm, clock, scratch, goal);
            if moved == 0 && ready == Ready::Now {
                // Nothing is in the pool: what is compressed goes to the swap file at once.
                self.beyond = Beyond::All;
            }
            match moved {
                0 => ready,
                _ => Ready::Now,
            }
        } else {
            vm.swap().prepare(&self.host.swap)
        };
        if ready == Ready::Now {
            self.full = false;
            self.needs_swap = false;
        }
        ready
    }
}

/// Moves what was compressed longest ago to the swap file, until the pool has no more than `pages`
/// pages, or so many objects that others have their turn. Returns how many went, and what the swap
/// file is ready for.
fn evict(
    host: &Host,
    vm: &Vm,
    clock: &mut Clock,
    scratch: &mut Scratch,
    pages: u64,
) -> (u32, Ready) {
    let mut ready = vm.swap().prepare(&host.swap);
    let mut moved = 0;
    let end = host.registry().end();
    let (first, mut index) = clock.swap_at;
    // The first region comes once more at last, for its first part.
    let round = Iterator::chain(first..end, 0..=first.min(end));
    for id in round {
        clock.swap_at = (id, index);
        let region = host.registry().get(id);
        let region = region.filter(|region| region.vm().id() == vm.id());
        while let Some(region) = &region {
            let next = (index..SLOTS).find(|&i| region.peek(i).state() == State::Compressed);
            let Some(next) = next else { break };
            if moved >= EVICT || ready != Ready::Now || vm.store().pages() <= pages {
                vm.store().compact();
                return (moved, ready);
            }
            let window = (next / WINDOW + 1) * WINDOW;
            let mut guard = region.lock();
            index = next;
            while index < window && !guard.is_retired() {
                match compress::swap_out(host, &mut guard, index, scratch) {
                    Outcome::NeedsSwap => break,
                    Outcome::Packed => moved += 1,
                    _ => {}
                }
                index += 1;
                if region.is_wanted() {
                    break;
                }
            }
            let retired = guard.is_retired();
            drop(guard);
            clock.swap_at = (id, index);
            if index < window {
                ready = vm.swap().prepare(&host.swap);
            }
            task::cond_resched();
            if retired {
                break;
            }
        }
        index = 0;
    }
    clock.swap_at = (0, 0);
    vm.store().compact();
    (moved, ready)
}

/// Takes the Private pages from `first` to `end`, of one window, out of all page tables. Returns
/// those that were in one, a bit for each page of the window.
fn unmap_window(guard: &mut RegionGuard<'_>, first: usize, end: usize) -> u64 {
    let mut mapped = 0;
    let (mut from, mut to) = (end, first);
    for index in first..end {
        if guard.page(index).is_some_and(|page| page.is_mapped()) {
            mapped |= 1 << (index % WINDOW);
            from = from.min(index);
            to = index + 1;
        }
    }
    if from < to {
        guard.zap_range(from, to - from);
        guard.region().note_sweep();
    }
    mapped
}

/// Brings back one window of a region. False without memory.
fn bring_back(
    host: &Host,
    region: &Region,
    start: usize,
    scratch: &mut Scratch,
    spare: &mut Option<Frame>,
) -> bool {
    for index in start..start + WINDOW {
        if !matches!(region.peek(index).state(), State::Compressed) {
            continue;
        }
        if spare.is_none() {
            *spare = region.returned_frame();
        }
        let Some(frame) = spare.take() else {
            return false;
        };
        let mut guard = region.lock();
        if guard.slot(index).state() == State::Compressed {
            // A page that cannot be read stays what it is: its guest is told when it asks for it.
            let _ = compress::unpack(host, &mut guard, index, scratch, frame);
        } else {
            *spare = Some(frame);
        }
    }
    true
}

/// Who pays next, of those that `may`.
fn poorest<'a>(
    host: &Host,
    vms: &'a [Arc<Vm>],
    may: &dyn Fn(&Vm) -> bool,
) -> Option<(&'a Arc<Vm>, Victim)> {
    let tax = host.knobs.idle_tax_percent.load(Ordering::Relaxed);
    let holdings = vms.iter().map(|vm| match may(vm) {
        true => vm.holding(host),
        false => Holding::default(),
    });
    let victim = funding::poorest(holdings, tax)?;
    Some((vms.get(victim.place)?, victim))
}

/// Microseconds in which nobody may have touched a shared page that is to go.
fn shared_unused_us(host: &Host, vms: &[Arc<Vm>]) -> u64 {
    match poorest(host, vms, &|vm| !is_stuck(vm)) {
        Some((_, victim)) if victim.with == Pages::Idle => host.sample_period_us(),
        _ => 0,
    }
}

/// Whether there was nothing more to take from a VM lately.
fn is_stuck(vm: &Vm) -> bool {
    let clock = vm.clock();
    clock.stuck > 0 && clock.rest_until_us > clock::now_us()
}

/// While the host is low, marks the VMs that hold more than their fair share.
fn mark_unfair(host: &Host, vms: &[Arc<Vm>]) {
    if host.state() != HostState::Low {
        for vm in vms {
            vm.set_over_share(false);
        }
        return;
    }
    let (mut shares, mut pages) = (0u64, crate::sys::memory::available_kb() / PAGE_KB);
    for vm in vms {
        let holding = vm.holding(host);
        shares = shares.saturating_add(holding.shares);
        pages = pages.saturating_add(holding.pages);
    }
    for vm in vms {
        let holding = vm.holding(host);
        let fair = funding::fair_share(holding.shares, shares, pages).max(holding.reserved);
        vm.set_over_share(holding.pages > fair);
    }
}

impl Vm {
    /// Its pages of memory that a sweep may take and that are surely not in use.
    fn idle_pages(&self) -> u64 {
        if self.clock().spent {
            return 0;
        }
        let pages = self.snapshot().pages;
        let taken = (pages.get(Class::Private)).saturating_add(pages.get(Class::Huge));
        taken.saturating_sub(self.sample.own_in_use(self.standing()).most)
    }

    /// Pages of its pool that can go to its swap file. Nobody uses them.
    fn stored_pages(&self, host: &Host) -> u64 {
        let rests = self.clock().pool_rest_until_us > clock::now_us();
        match rests || !self.swap().is_on(&host.swap) {
            true => 0,
            false => self.store().pages().saturating_sub(LEAST_ROOM),
        }
    }

    /// What the VM holds and pays. Of shared frames it holds as much as all of the host's sharers
    /// hold on average; they are not taken from a VM, and count as in use.
    fn holding(&self, host: &Host) -> Holding {
        let counted = self.snapshot().pages;
        let shared = counted.get(Class::Shared);
        let figures = host.figures();
        let slots = figures.pages_shared.saturating_add(figures.pages_sharing);
        let away = figures.packed.saturating_add(figures.swapped);
        let held =
            (figures.pages_shared.saturating_sub(away)).saturating_add(host.shared_pools.pages());
        let frames = shared.saturating_mul(held).checked_div(slots).unwrap_or(0);
        let taken = (counted.get(Class::Private)).saturating_add(counted.get(Class::Huge));
        let in_use = self.sample.own_in_use(self.standing()).likely.min(taken);
        Holding {
            shares: self.claims.shares.load(Ordering::Relaxed),
            pages: (self.resident_kb() / PAGE_KB).saturating_add(frames),
            active: in_use.saturating_add(frames),
            idle: self.idle_pages().saturating_add(self.stored_pages(host)),
            reserved: (self.claims.reserved_kb().div_ceil(PAGE_KB)).saturating_add(frames),
        }
    }
}
