// SPDX-License-Identifier: GPL-2.0

//! 2 MiB folios become 512 pages, where that gives memory back.
//!
//! | when | which folios |
//! |---|---|
//! | the host is not `high` | those of which something would be gained, the best first |
//! | at any time | those with more holes than `split_holes_percent` |
//! | the host is `hard`, or the VM over its limit | any, where there is nothing else to compress |
//!
//! One folio at a time, until the host is `high` again: zap all of it, freeze it with the one
//! reference that we hold, drop what is zero, copy the rest to frames, replace the slots, thaw, free
//! the folio. Then the pages of which others are known are merged at once, so that the memory is back
//! before the next folio is considered.
//!
//! The frames are charged to the VM where they are to be had. Where they are not, they come from a
//! reserve that was filled while there was memory: the folio that is freed by it fills it again.
//!
//! Lock order: policy > region > index. The reserve is filled with no lock held.

use super::{
    collapse::Collapser,
    count,
    host::Host,
    merge,
    region::{Region, RegionGuard},
    shared::Key,
    vm::Vm,
};
use crate::{
    logic::{
        bell::{Ear, Request},
        huge::{Best, Gain, HugeWord},
        slot::{Class, State},
        state::HostState,
        tunables::RunMode,
    },
    sys::{
        alloc, clock, hash,
        page::{Frame, Purpose},
        protect::{self, Protection},
        slots::{Content, SlotsOf, SLOTS},
        task::{self, Work},
        zs::Scratch,
    },
};
use core::sync::atomic::{AtomicU64, Ordering};
use kernel::{prelude::*, sync::Arc};

/// Folios that are chosen in one go.
const STEP: usize = 16;

/// Why a split was refused, each with its own counter, and those that were made.
#[derive(Default)]
pub(crate) struct SplitEvents {
    /// Folios that were split.
    pub(crate) splits: AtomicU64,
    /// Pages that were dropped by it: zero, or merged right away.
    pub(crate) gained: AtomicU64,
    /// Microseconds that splits took, with their regions locked.
    pub(crate) took_us: AtomicU64,
    /// Somebody held a reference: O_DIRECT, vhost, a pipe, a reader.
    pub(crate) pinned: AtomicU64,
    /// Not enough frames.
    pub(crate) no_memory: AtomicU64,
    /// The memory behind a part is broken.
    pub(crate) poisoned: AtomicU64,
    /// Frames that are kept for the next split.
    pub(crate) reserve: AtomicU64,
    /// Some folio may have too many holes.
    holes: Request,
}

/// The thread's work.
pub(crate) struct Splitter(pub(crate) Arc<Host>);

impl Work for Splitter {
    fn run(&self) {
        task::be_nice(5);
        let host = &self.0;
        let mut kept = None;
        let mut collapser = Collapser::new();
        let mut ear = Ear::new();
        while !task::should_stop() {
            let busy = self.round(&mut kept);
            let reserve = kept.as_ref().map_or(0, |supply| supply.reserve.len());
            (host.splits.reserve).store(reserve as u64, Ordering::Relaxed);
            collapser.round(host);
            if busy {
                task::cond_resched();
            } else {
                (host.splitter_bell).sleep(&mut ear, 1_000_000, task::should_stop);
            }
        }
    }

    fn wake(&self) {
        self.0.splitter_bell.ring();
    }
}

impl Splitter {
    /// Splits some folios; false when there is nothing more to do by now.
    fn round(&self, kept: &mut Option<Supply>) -> bool {
        let host = &self.0;
        if host.totals().huge == 0 {
            *kept = None;
            return false;
        }
        if kept.is_none() {
            *kept = Supply::new().ok();
        }
        let Some(supply) = kept else {
            count(&host.splits.no_memory);
            return false;
        };
        // While there is memory: at the worst moment there must be no need for any.
        supply.fill();
        let holes = host.splits.holes.take();
        let mut needed = holes || host.is_short();
        host.vms().for_each(|vm| needed |= host.needs_small(vm));
        if !needed {
            return false;
        }
        let mut split = false;
        for region in host.chosen().in_order() {
            if task::should_stop() || !host.wants_split(&region) {
                break;
            }
            // Without a gain there is no hurry: what was split last is compressed first.
            let gains = gain_of(&region).rank() > 0;
            split |= split_and_merge(host, &region, supply) && gains;
            supply.own.clear();
            task::cond_resched();
        }
        // Those that were left out, or refused, are tried again.
        if holes && host.chosen().in_order().next().is_some() {
            host.splits.holes.make();
        }
        split
    }
}

/// What a split takes. All of it is there before it is needed, and stays from split to split.
struct Supply {
    /// Frames at the expense of the VM whose folio is split.
    own: KVec<Frame>,
    /// Frames in place of those that are not to be had.
    reserve: KVec<Frame>,
    /// What the folio's parts become.
    parts: SlotsOf<Part>,
}

impl Supply {
    /// A folio without a page of zeroes, and the first page of a merge, which gives two back.
    const RESERVE: usize = SLOTS + 1;

    /// Room for all of it, and no frame yet.
    fn new() -> Result<Supply> {
        Ok(Supply {
            own: alloc::list(SLOTS)?,
            reserve: alloc::list(Self::RESERVE)?,
            parts: SlotsOf::new()?,
        })
    }

    /// Fills the reserve with what is to be had.
    fn fill(&mut self) {
        while self.reserve.len() < Self::RESERVE && protect::armed(Protection::SplitReserve) {
            let Some(frame) = Frame::alloc(Purpose::Shared, -1) else {
                return;
            };
            if self.reserve.push_within_capacity(frame).is_err() {
                return;
            }
        }
    }

    /// Provides frames for all parts of the region's folio that may hold data; false when there are
    /// too few.
    fn provide(&mut self, region: &Region) -> bool {
        self.fill();
        let needed = SLOTS.saturating_sub(usize::from(gain_of(region).zeroes));
        while self.own.len() < needed {
            let frame = region.returned_frame();
            if frame.is_none_or(|frame| self.own.push_within_capacity(frame).is_err()) {
                break;
            }
        }
        self.own.len().saturating_add(self.reserve.len()) >= needed
    }

    fn take(&mut self) -> Option<Frame> {
        self.own.pop().or_else(|| self.reserve.pop())
    }
}

/// What is known of a region's folio.
fn gain_of(region: &Region) -> Gain {
    Gain::of((0..SLOTS).filter_map(|index| HugeWord::from_slot(region.peek(index))))
}

impl Host {
    /// Whether folios are split because memory is short.
    fn is_short(&self) -> bool {
        self.state() != HostState::High && self.run_mode() == RunMode::Run
    }

    /// Whether the folio has more holes than it may.
    fn has_too_many_holes(&self, gain: Gain) -> bool {
        let percent = self.knobs.split_holes_percent.load(Ordering::Relaxed);
        u64::from(gain.holes).saturating_mul(100) > percent.saturating_mul(SLOTS as u64)
    }

    /// `split_holes_percent`: folios that have too many holes now are split.
    pub(crate) fn set_split_holes_percent(&self, percent: u64) {
        self.knobs
            .split_holes_percent
            .store(percent, Ordering::Relaxed);
        self.splits.holes.make();
        self.splitter_bell.ring();
    }

    /// Tells the splitter when a hole in `region` was one too many.
    pub(crate) fn hole_punched(&self, region: &Region) {
        if region.looks_huge() && self.has_too_many_holes(gain_of(region)) {
            self.splits.holes.make();
            self.splitter_bell.ring();
        }
    }

    /// Whether a split of the region makes sense just now.
    fn wants_split(&self, region: &Region) -> bool {
        let gain = gain_of(region);
        region.looks_huge()
            && (self.has_too_many_holes(gain)
                || (self.is_short() && gain.rank() > 0)
                || self.needs_small(region.vm()))
    }

    /// Whether the VM's memory is to be compressed, and there is nothing left of it but folios.
    fn needs_small(&self, vm: &Vm) -> bool {
        let hard = self.state() >= HostState::Hard;
        vm.is_stuck() && (vm.is_over_limit() || hard) || vm.wants_small() && hard
    }

    /// The folios to split next.
    fn chosen(&self) -> Best<Arc<Region>, STEP> {
        let mut best = Best::new();
        for id in 0..self.registry().end() {
            let Some(region) = self.registry().get(id) else {
                continue;
            };
            if self.wants_split(&region) {
                best.offer(gain_of(&region).rank(), region);
            }
            task::cond_resched();
        }
        best
    }
}

/// What a part becomes.
enum Part {
    /// It was cut off.
    Cut,
    /// A hole that is still empty.
    Hole,
    /// All bytes are zero.
    Zero,
    /// A copy.
    Copy(Frame),
}

/// Splits the region's folio. What a part was known as stays noted of its page. False, with
/// everything as it was, when that is not possible; each reason is counted.
fn split(host: &Host, guard: &mut RegionGuard<'_>, supply: &mut Supply) -> bool {
    let start = clock::now_us();
    if !copy_parts(host, guard, supply) {
        supply.parts.clear();
        return false;
    }
    let folio = guard.leave_huge();
    let mut gained = 0u64;
    for index in 0..SLOTS {
        let content = match supply.parts.take(index) {
            None | Some(Part::Cut) => continue,
            Some(Part::Hole) => Content::Empty,
            Some(Part::Zero) => Content::Zero,
            Some(Part::Copy(frame)) => Content::Private(frame),
        };
        gained += u64::from(!matches!(content, Content::Private(_)));
        let known = HugeWord::from_slot(guard.slot(index)).and_then(|word| word.hash());
        host.release(guard.set(index, content, 0));
        let slot = guard.slot(index);
        if let (Some(hash), State::Private) = (known, slot.state()) {
            guard.note(index, slot.looked_at(Class::Unshared, hash));
        }
    }
    drop(folio);
    count(&host.splits.splits);
    host.splits.gained.fetch_add(gained, Ordering::Relaxed);
    host.splits
        .took_us
        .fetch_add(clock::now_us().saturating_sub(start), Ordering::Relaxed);
    true
}

/// Copies all parts that hold data while nobody can reach the folio. False, with the folio as it
/// was, when that is not possible.
fn copy_parts(host: &Host, guard: &RegionGuard<'_>, supply: &mut Supply) -> bool {
    let Some(folio) = guard.huge() else {
        return false;
    };
    if folio.is_poisoned() {
        count(&host.splits.poisoned);
        return false;
    }
    guard.zap_range(0, SLOTS);
    let Some(frozen) = folio.freeze() else {
        count(&host.splits.pinned);
        return false;
    };
    for index in 0..SLOTS {
        let Some(word) = HugeWord::from_slot(guard.slot(index)) else {
            supply.parts.put(index, Part::Cut);
            continue;
        };
        let page = frozen.part(index);
        let part = if word.is_hole() && page.is_zero() {
            Part::Hole
        } else if guard.region().vm().shares() && page.is_zero() {
            Part::Zero
        } else {
            let copied = supply
                .take()
                .map(|mut frame| frame.copy_from(page).map(|()| frame));
            match copied {
                Some(Ok(frame)) => Part::Copy(frame),
                Some(Err(_)) => {
                    count(&host.splits.poisoned);
                    return false;
                }
                None => {
                    count(&host.splits.no_memory);
                    return false;
                }
            }
        };
        supply.parts.put(index, part);
    }
    true
}

/// Splits a folio and merges the pages of which it knows others. True when it was split.
fn split_and_merge(host: &Host, region: &Region, supply: &mut Supply) -> bool {
    /// Pages that are merged with the lock held.
    const RUN: usize = 32;
    let policy = host.policy();
    let vm = region.vm();
    let merges = host.run_mode() == RunMode::Run && vm.shares() && !policy.zero_only;
    let mut known = [0u64; SLOTS / 64];
    // Before the guest feels anything of it.
    if !supply.provide(region) {
        count(&host.splits.no_memory);
        return false;
    }
    {
        let mut guard = region.lock();
        if guard.is_retired() || guard.huge().is_none() {
            return false;
        }
        for index in 0..SLOTS {
            let word = HugeWord::from_slot(guard.slot(index));
            let wanted = word.is_some_and(|word| word.tag().is_some() && word.has_others());
            if let Some(set) = known.get_mut(index / 64) {
                *set |= u64::from(wanted) << (index % 64);
            }
        }
        if !split(host, &mut guard, supply) {
            return false;
        }
    }
    if !merges {
        return true;
    }
    let scope = vm.scope();
    let seed = host.seed(scope);
    let mut spare = None;
    // Without it compressed shared pages are passed over; the scanner merges with them later.
    let mut scratch = Scratch::new();
    for first in (0..SLOTS).step_by(RUN) {
        // Without room no pair is made; the scanner makes it later.
        let _ = host.index().maintain(host.registry(), host.contents());
        let mut index = first;
        while index < first + RUN {
            if known.get(index / 64).copied().unwrap_or(0) >> (index % 64) & 1 == 0 {
                index += 1;
                continue;
            }
            if spare.is_none() {
                spare = Frame::alloc(Purpose::Shared, -1).or_else(|| supply.reserve.pop());
            }
            let mut guard = region.lock();
            let slot = guard.slot(index);
            if let Some(page) = guard.page(index).filter(|page| !page.is_poisoned()) {
                let key = Key {
                    hash: hash::of_page(page, seed),
                    scope,
                };
                // The scanner's own rule: what changed since the last look is left alone.
                if slot.class() == Class::Unshared && slot.tag() == key.hash as u16 {
                    let rules = host.rules();
                    let room = merge::Room {
                        spare: &mut spare,
                        scratch: &mut scratch,
                    };
                    let outcome = merge::try_merge(host, &mut guard, index, key, rules, room);
                    match outcome {
                        merge::Outcome::Merged => count(&host.splits.gained),
                        // The next pass looks at it again, with or without.
                        merge::Outcome::Unique => {
                            let _ = merge::leave_hint(host, key, region.page_id(index));
                        }
                        merge::Outcome::NotNow => {}
                    }
                }
            }
            index += 1;
        }
        task::cond_resched();
    }
    true
}
