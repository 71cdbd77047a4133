// SPDX-License-Identifier: GPL-2.0

//! One frame under several slots.
//!
//! Each merge follows one protocol: with the region locked, zap the page, freeze its reference
//! count, compare all bytes, replace the slot, thaw. Whatever fails leaves the slot as it was. The
//! shared frame is always a fresh one, never a sharer's own, so nobody can choose where it lies.
//!
//! Lock order: region > (second region by try_lock) > index.

use super::{
    count,
    host::Host,
    pools::NotHad,
    region::RegionGuard,
    shared::{Candidate, Key, SharedPage, CANDIDATES},
};
use crate::{
    logic::slot::{Class, State},
    sys::{
        page::{Frame, PageRef},
        protect::{self, Protection},
        slots::Content,
        zs::Scratch,
    },
};
use core::sync::atomic::AtomicU64;

/// Why a merge was refused, each with its own counter.
#[derive(Default)]
pub(crate) struct Refusals {
    /// Somebody held a reference: O_DIRECT, vhost, a debugger, a reader.
    pub(crate) pinned: AtomicU64,
    /// The bytes differed although the hashes were equal, or changed meanwhile.
    pub(crate) differs: AtomicU64,
    /// The record had as many sharers as `max_page_sharing` allows.
    pub(crate) full: AtomicU64,
    /// The other page's region was locked.
    pub(crate) busy: AtomicU64,
    /// No memory for a shared frame or its record.
    pub(crate) no_memory: AtomicU64,
    /// The pages lie on two nodes and `merge_across_nodes` is 0.
    pub(crate) nodes: AtomicU64,
    /// The index had no place for a hint.
    pub(crate) no_hint: AtomicU64,
    /// The memory behind the page is broken.
    pub(crate) poisoned: AtomicU64,
    /// The equal page is in a swap file.
    pub(crate) swapped: AtomicU64,
}

/// Rules of the moment.
#[derive(Clone, Copy)]
pub(crate) struct Rules {
    /// `max_page_sharing`
    pub(crate) max_sharers: u32,
    /// `merge_across_nodes`
    pub(crate) across_nodes: bool,
}

/// What a merge may need, allocated with no lock held.
pub(crate) struct Room<'a> {
    /// A frame for a new shared page; taken if used.
    pub(crate) spare: &'a mut Option<Frame>,
    /// To look into a compressed one.
    pub(crate) scratch: &'a mut Option<Scratch>,
}

/// What became of an attempt.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Outcome {
    /// The slot is Shared or Zero now.
    Merged,
    /// Nothing has the same content. Of [`try_merge`]: a hint is to be left for who comes next.
    Unique,
    /// There may be an equal page, but not now: try again next pass.
    NotNow,
}

/// Lets the slot go back to being empty of memory if its page is all zero.
pub(crate) fn try_zero(host: &Host, guard: &mut RegionGuard<'_>, index: usize) -> Outcome {
    guard.zap(index);
    let Some(page) = guard.page(index) else {
        return Outcome::NotNow;
    };
    let Some(frozen) = page.freeze() else {
        count(&host.refusals.pinned);
        return Outcome::NotNow;
    };
    if !frozen.is_zero() {
        count(&host.refusals.differs);
        return Outcome::NotNow;
    }
    drop(frozen);
    let backoff = guard.slot(index).backoff();
    host.release(guard.set(index, Content::Zero, backoff));
    Outcome::Merged
}

/// Whether it is worth unmapping page `own` for a merge under `key`.
pub(crate) fn has_equal(host: &Host, key: Key, own: u32, rules: Rules) -> bool {
    let mut candidates = [None; CANDIDATES];
    // A full record has to be counted as a refusal.
    host.index().find(key, rules.max_sharers, &mut candidates)
        || candidates
            .into_iter()
            .flatten()
            .any(|candidate| !matches!(candidate, Candidate::Page(id) if id == own))
}

/// Leaves a hint for the next page that comes with the content of `own`, whose slot says so already.
/// False when there is no place for it.
pub(crate) fn leave_hint(host: &Host, key: Key, own: u32) -> bool {
    let placed = host.index().hint(key.hash, own, host.registry());
    if !placed {
        count(&host.refusals.no_hint);
    }
    placed
}

/// Looks for an equal page and merges with it.
pub(crate) fn try_merge(
    host: &Host,
    guard: &mut RegionGuard<'_>,
    index: usize,
    key: Key,
    rules: Rules,
    mut room: Room<'_>,
) -> Outcome {
    let mut candidates = [None; CANDIDATES];
    if host.index().find(key, rules.max_sharers, &mut candidates) {
        count(&host.refusals.full);
        host.index().expect_doubles();
    }
    let own = guard.region().page_id(index);
    let mut not_now = false;
    for candidate in candidates.into_iter().flatten() {
        let outcome = match candidate {
            Candidate::Record(id) => join(host, guard, index, id, rules, &mut room),
            Candidate::Page(id) if id == own => continue,
            Candidate::Page(id) => pair(host, guard, index, id, key, rules, room.spare),
        };
        match outcome {
            Outcome::Merged => return Outcome::Merged,
            Outcome::NotNow => not_now = true,
            Outcome::Unique => {}
        }
    }
    if not_now {
        Outcome::NotNow
    } else {
        Outcome::Unique
    }
}

/// Joins a record that is there already. One that is compressed stays so, until a sharer asks for it.
fn join(
    host: &Host,
    guard: &mut RegionGuard<'_>,
    index: usize,
    id: u32,
    rules: Rules,
    room: &mut Room<'_>,
) -> Outcome {
    let Some((sharer, shared)) = host.index().join(id, rules.max_sharers) else {
        count(&host.refusals.full);
        return Outcome::Unique;
    };
    let node = match &shared {
        SharedPage::Frame(frame) => frame.as_ref().node(),
        SharedPage::Packed { node } => *node,
    };
    // The content of a record never changes: a copy to compare with is as good.
    let (frame, of_room) = match shared {
        SharedPage::Frame(frame) => (frame, false),
        SharedPage::Packed { .. } => {
            let (Some(mut copy), Some(scratch)) = (room.spare.take(), room.scratch.as_mut()) else {
                count(&host.refusals.no_memory);
                host.leave(sharer);
                return Outcome::NotNow;
            };
            if let Err(why) = (host.index()).copy(id, &mut copy, scratch, host.away()) {
                count(match why {
                    // It takes no memory there: not worth reading for every page that comes along.
                    NotHad::Unread(_) => &host.refusals.swapped,
                    NotHad::Lost | NotHad::Corrupt => &host.refusals.poisoned,
                });
                *room.spare = Some(copy);
                host.leave(sharer);
                return Outcome::Unique;
            }
            (copy, true)
        }
    };
    let outcome = 'check: {
        let Some(page) = guard.page(index) else {
            break 'check Outcome::NotNow;
        };
        if frame.as_ref().is_poisoned() || page.is_poisoned() {
            count(&host.refusals.poisoned);
            break 'check Outcome::Unique;
        }
        if !rules.across_nodes && page.node() != node {
            count(&host.refusals.nodes);
            break 'check Outcome::Unique;
        }
        guard.zap(index);
        let Some(frozen) = page.freeze() else {
            count(&host.refusals.pinned);
            break 'check Outcome::NotNow;
        };
        if !frozen.equals(frame.as_ref()) {
            count(&host.refusals.differs);
            break 'check Outcome::Unique;
        }
        Outcome::Merged
    };
    if of_room {
        *room.spare = Some(frame);
    }
    if outcome == Outcome::Merged {
        let backoff = guard.slot(index).backoff();
        host.release(guard.set(index, Content::Shared(sharer), backoff));
    } else {
        host.leave(sharer);
    }
    outcome
}

/// Moves a sharer to an older record of the same content, where there is one: two are left when
/// scopes grow together, or when `max_page_sharing` was reached.
pub(crate) fn unite(host: &Host, guard: &mut RegionGuard<'_>, index: usize, rules: Rules) {
    let slot = guard.slot(index);
    let scope = guard.region().vm().scope();
    let known = (host.index()).frame_and_hash(slot.record(), scope, host.registry());
    let Some((old, hash)) = known else {
        return;
    };
    let mut candidates = [None; CANDIDATES];
    host.index()
        .find(Key { hash, scope }, rules.max_sharers, &mut candidates);
    let older = candidates
        .into_iter()
        .flatten()
        .find_map(|candidate| match candidate {
            Candidate::Record(id) if id < slot.record() => Some(id),
            _ => None,
        });
    let Some((sharer, shared)) = older.and_then(|id| host.index().join(id, rules.max_sharers))
    else {
        return;
    };
    // Two that are in use, or were lately, are united; a compressed one waits until it is.
    let Some(frame) = shared.frame() else {
        host.leave(sharer);
        return;
    };
    if old.as_ref().is_poisoned() || frame.as_ref().is_poisoned() {
        count(&host.refusals.poisoned);
        host.leave(sharer);
        return;
    }
    let far = !rules.across_nodes && frame.as_ref().node() != old.as_ref().node();
    // Shared frames are immutable: there is nothing to freeze.
    if far || !old.as_ref().same_content(frame.as_ref()) {
        host.leave(sharer);
        return;
    }
    guard.zap(index);
    host.release(guard.set(index, Content::Shared(sharer), slot.backoff()));
}

/// Makes a shared frame of this page and the one that a hint points to.
fn pair(
    host: &Host,
    guard: &mut RegionGuard<'_>,
    index: usize,
    other_id: u32,
    key: Key,
    rules: Rules,
    spare: &mut Option<Frame>,
) -> Outcome {
    let Some((other_region, other)) = host.registry().page(other_id) else {
        (host.index()).unhint_if_stale(key.hash, other_id, host.registry());
        return Outcome::Unique;
    };
    let is_hinted = |slot: crate::logic::slot::Slot| {
        slot.state() == State::Private
            && slot.class() == Class::Unshared
            && slot.tag() == key.hash as u16
    };
    let vm = other_region.vm();
    if !is_hinted(other_region.peek(other)) {
        (host.index()).unhint_if_stale(key.hash, other_id, host.registry());
        return Outcome::Unique;
    }
    // The hint stays: it may be of another content whose hash has the same tag.
    if vm.scope() != key.scope {
        return Outcome::Unique;
    }
    let same_region = core::ptr::eq(&*other_region, guard.region());
    let mut second = if same_region {
        None
    } else if !protect::armed(Protection::TryLock) {
        Some(other_region.lock())
    } else {
        match other_region.try_lock() {
            Some(second) => Some(second),
            None => {
                count(&host.refusals.busy);
                return Outcome::NotNow;
            }
        }
    };
    let other_slot = second.as_ref().unwrap_or(&*guard).slot(other);
    if !is_hinted(other_slot) {
        return Outcome::Unique;
    }
    if !host.index().has_room() {
        count(&host.refusals.no_memory);
        return Outcome::NotNow;
    }
    let Some(mut fresh) = spare.take() else {
        count(&host.refusals.no_memory);
        return Outcome::NotNow;
    };
    let outcome = {
        let second = second.as_ref().unwrap_or(&*guard);
        match (guard.page(index), second.page(other)) {
            (Some(page), Some(other_page)) => {
                let nodes = [page.node(), other_page.node(), fresh.as_ref().node()];
                if !rules.across_nodes && nodes.iter().any(|&node| node != nodes[0]) {
                    count(&host.refusals.nodes);
                    Outcome::Unique
                } else {
                    guard.zap(index);
                    second.zap(other);
                    let outcome = copy_if_equal(host, page, other_page, &mut fresh);
                    if outcome == Outcome::Merged && !protect::armed(Protection::FreshFrame) {
                        fresh = page.get();
                    }
                    outcome
                }
            }
            _ => Outcome::NotNow,
        }
    };
    if outcome != Outcome::Merged {
        *spare = Some(fresh);
        return outcome;
    }
    match host.index().publish(key, fresh, other_id, host.registry()) {
        Ok((mine, others)) => {
            let backoff = guard.slot(index).backoff();
            host.release(guard.set(index, Content::Shared(mine), backoff));
            let (content, backoff) = (Content::Shared(others), other_slot.backoff());
            host.release(match second.as_mut() {
                Some(second) => second.set(other, content, backoff),
                None => guard.set(other, content, backoff),
            });
            Outcome::Merged
        }
        Err(fresh) => {
            count(&host.refusals.no_memory);
            *spare = Some(fresh);
            Outcome::NotNow
        }
    }
}

/// Freezes both pages and fills `fresh` with what both hold, if both hold the same.
fn copy_if_equal(host: &Host, page: PageRef<'_>, other: PageRef<'_>, fresh: &mut Frame) -> Outcome {
    let (Some(frozen), Some(other)) = (page.freeze(), other.freeze()) else {
        count(&host.refusals.pinned);
        return Outcome::NotNow;
    };
    if page.is_poisoned() || other.page().is_poisoned() || fresh.copy_from(frozen.page()).is_err() {
        count(&host.refusals.poisoned);
        return Outcome::NotNow;
    }
    if !other.equals(fresh.as_ref()) {
        count(&host.refusals.differs);
        return Outcome::Unique;
    }
    Outcome::Merged
}
