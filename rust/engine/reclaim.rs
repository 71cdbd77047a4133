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
        funding::{self, Holding},
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
            if self.sweep(host, vm, wanted, vm.is_over_limit()) {
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
                return Next::Idle;
            }
            let more_shared = self.take_shared(host, vms, wanted) == cold::Step::Busy;
            // Others pay for one that rests only when there is no time to lose.
            let urgent = host.state() == HostState::Low;
            let tax = host.knobs.idle_tax_percent.load(Ordering::Relaxed);
            let holdings = vms.iter().map(|vm| {
                if is_stuck(vm) || urgent && self.rests(vm) {
                    Holding::default()
                } else {
                    vm.holding(host)
                }
            });
            let poorest = funding::poorest(holdings, tax).and_then(|place| vms.get(place));
            let Some(vm) = poorest.filter(|vm| !self.rests(vm)) else {
                if more_shared {
                    host.pressure.look();
                    continue;
                }
                return Next::Soon;
            };
            let spare = vm.holding(host).spare();
            if self.sweep(host, vm, STEP_PAGES.min(spare).min(wanted), true) {
                return Next::Soon;
            }
            host.pressure.look();
            task::cond_resched();
        }
        Next::Again
    }

    /// Goes on with the sweep of a VM until `wanted` pages were taken or the hand came round. Pages
    /// in use are taken only if that `must` be. True when it has to wait for the swap file.
    fn sweep(&mut self, host: &Host, vm: &Vm, wanted: u64, must: bool) -> bool {
        let mut clock = vm.clock();
        let (Some(compressor), Some(scratch), Ok(())) = (
            made(&mut self.compressor, || Compressor::new().ok()),
            made(&mut self.scratch, Scratch::new),
            vm.store().open(),
        ) else {
            clock.rest_until_us = clock::now_us().saturating_add(STUCK_US);
            vm.set_clock(clock);
            return false;
        };
        let swaps = vm.swap().is_on(&host.swap);
        let mut taking = Taking {
            host,
            compressor,
            force: must && clock.barren >= GENTLE_SWEEPS,
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
        let mut in_vain = ended && clock.freed == 0 && clock.barren >= GENTLE_SWEEPS;
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
        self.hand.step(host, vms, compressor, scratch, wanted)
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
    /// What the VM holds and pays. Of shared frames it holds as much as all of the host's sharers
    /// hold on average.
    fn holding(&self, host: &Host) -> Holding {
        let shared = self
            .snapshot()
            .pages
            .get(crate::logic::counts::Class::Shared);
        let figures = host.figures();
        let slots = figures.pages_shared.saturating_add(figures.pages_sharing);
        let away = figures.packed.saturating_add(figures.swapped);
        let held =
            (figures.pages_shared.saturating_sub(away)).saturating_add(host.shared_pools.pages());
        let frames = shared.saturating_mul(held).checked_div(slots).unwrap_or(0);
        let own = self.resident_kb() / PAGE_KB;
        let pages = own.saturating_add(frames);
        Holding {
            shares: self.claims.shares.load(Ordering::Relaxed),
            pages,
            active: self.sample.active_pages(self.filled_pages()),
            reserved: (self
                .claims
                .reservation_kb
                .load(Ordering::Relaxed)
                .div_ceil(PAGE_KB))
            .saturating_add(frames),
        }
    }
}
