// SPDX-License-Identifier: GPL-2.0

//! Live changes of who may share with whom: `domain`, `share`, `share_scope` and `run` 2.
//!
//! No new merges begin (the policy lock keeps the scanner out), the frames that breaking needs are
//! allocated first, then every share that crosses the new border is broken, then the change holds.
//! Without memory for all of them nothing is changed. Compressed records that move to another scope
//! are brought back first: their hash and their pool will be others.
//!
//! Lock order: policy > region > index. With the policy locked no VM comes; one that ends meanwhile only
//! has fewer pages.

use super::{
    cold,
    host::{Host, Policy},
    pools::{NotHad, Unread},
    region::RegionGuard,
    shared::{Key, SharedPage},
    vm::{Domain, Vm},
};
use crate::{
    logic::{
        huge::HugeWord,
        scope::{Group, Scope},
        slot::{Class, State},
        tunables::ShareScope,
    },
    sys::{
        alloc, hash,
        page::{Frame, Purpose},
        protect::{self, Protection},
        slots::{Content, SLOTS},
        task,
        zs::Scratch,
    },
};
use kernel::{
    prelude::*,
    sync::{lock::mutex::MutexBackend, lock::Guard, Arc},
};

/// A change to who shares with whom.
pub(crate) enum Change<'a> {
    /// Another `share_scope` for the host.
    ShareScope(ShareScope),
    /// Another domain for a VM.
    Domain(&'a Arc<Vm>, Arc<Domain>),
    /// A VM begins or ceases to share.
    Share(&'a Arc<Vm>, bool),
    /// Nobody shares any more; the scopes stay as they are.
    Unshare,
}

impl Change<'_> {
    /// The scope that `vm` will have.
    fn scope_of(&self, vm: &Vm, now: ShareScope) -> Scope {
        match self {
            Change::ShareScope(scope) => vm.scope_under(*scope),
            Change::Domain(moved, domain) if moved.id() == vm.id() => {
                vm.scope_with(now, vm.shares(), domain.id())
            }
            Change::Share(changed, share) if changed.id() == vm.id() => {
                vm.scope_with(now, *share, vm.domain().id())
            }
            Change::Unshare => Scope::NONE,
            _ => vm.scope(),
        }
    }
}

/// Carries out `change`. ENOMEM without memory for all of it: then nothing was changed. EINTR when
/// killed, EIO when a shared frame turns out to be broken memory: then the setting is what it was,
/// but a part of the shares may be broken; the scanner makes them anew.
pub(crate) fn apply(host: &Host, change: &Change<'_>) -> Result {
    let mut policy = host.policy();
    // Only one is here at a time, by the policy's lock.
    host.index().hold_still(true);
    let outcome = apply_held_still(host, &mut policy, change);
    host.index().hold_still(false);
    outcome
}

fn apply_held_still(
    host: &Host,
    policy: &mut Guard<'_, Policy, MutexBackend>,
    change: &Change<'_>,
) -> Result {
    let now = policy.share_scope;
    // None comes while the policy is locked.
    let vms = host.vms().all()?;
    let groups = groups(host, change, now)?;
    // Room for all, so that nothing can fail once the change is made.
    let mut changed = alloc::list(vms.len())?;
    let breaks = |guard: &RegionGuard<'_>, record: u32| {
        if !protect::armed(Protection::Unshare) {
            return false;
        }
        let group = groups.get(record as usize).copied();
        let group = group.unwrap_or(Group::Several);
        let new = change.scope_of(guard.region().vm(), now);
        group.breaks(new, host.index().scope_of(record))
    };
    let mut scratch = Scratch::new().ok_or(ENOMEM)?;
    bring_movers_back(host, &groups, &mut scratch)?;
    let mut reserves = frames_for(host, vms.iter(), &breaks)?;
    break_shares(host, &breaks, &mut reserves, &mut scratch)?;
    if let Change::Unshare = change {
        return Ok(());
    }
    commit(policy, change);
    for vm in &vms {
        let scope = change.scope_of(vm, policy.share_scope);
        if scope != vm.scope() {
            vm.set_scope(scope);
            let _ = changed.push_within_capacity(vm.id());
        }
    }
    rename_records(host, &groups);
    forget_looks(host, &changed);
    Ok(())
}

fn commit(policy: &mut Guard<'_, Policy, MutexBackend>, change: &Change<'_>) {
    match change {
        Change::ShareScope(scope) => policy.share_scope = *scope,
        Change::Domain(vm, domain) => vm.set_domain(domain.clone()),
        Change::Share(vm, share) => vm.set_shares(*share),
        Change::Unshare => {}
    }
}

/// What is done to a Shared slot, of that record; or what it has to be read first.
type Visit<'a> = &'a mut dyn FnMut(&mut RegionGuard<'_>, usize, u32) -> Result<Option<Unread>>;

/// Runs `f` on every Shared slot of the host, and again once what it has to be read first was read.
fn each_shared(host: &Host, f: Visit<'_>) -> Result {
    for id in 0..host.registry().end() {
        let Some(region) = host.registry().get(id) else {
            continue;
        };
        if task::fatal_signal_pending() {
            return Err(EINTR);
        }
        for index in 0..SLOTS {
            if region.peek(index).state() != State::Shared {
                continue;
            }
            loop {
                let mut guard = region.lock();
                let slot = guard.slot(index);
                if slot.state() != State::Shared {
                    break;
                }
                let Some(unread) = f(&mut guard, index, slot.record())? else {
                    break;
                };
                drop(guard);
                unread.load(&host.swap);
                if task::fatal_signal_pending() {
                    return Err(EINTR);
                }
            }
        }
        task::cond_resched();
    }
    Ok(())
}

/// For each record, who its sharers will be.
fn groups(host: &Host, change: &Change<'_>, now: ShareScope) -> Result<KVVec<Group>> {
    let mut groups = KVVec::from_elem(
        Group::Unseen,
        host.index().records_end() as usize,
        GFP_KERNEL,
    )?;
    each_shared(host, &mut |guard, _, record| {
        let new = change.scope_of(guard.region().vm(), now);
        if let Some(group) = groups.get_mut(record as usize) {
            *group = group.with(new);
        }
        Ok(None)
    })?;
    Ok(groups)
}

/// Gives frames to the compressed records whose sharers will all be in another scope.
fn bring_movers_back(host: &Host, groups: &[Group], scratch: &mut Scratch) -> Result {
    for (id, group) in (0u32..).zip(groups) {
        let index = host.index();
        let Some(SharedPage::Packed { node }) = index.page(id) else {
            continue;
        };
        let published = index.scope_of(id);
        if published
            .and_then(|scope| group.moves_from(scope))
            .is_none()
        {
            continue;
        }
        if task::fatal_signal_pending() {
            return Err(EINTR);
        }
        // One that cannot be read keeps its name, and nobody will find it under another.
        loop {
            let frame = Frame::alloc(Purpose::Shared, node).ok_or(ENOMEM)?;
            let Err(NotHad::Unread(unread)) = cold::bring_back(host, id, frame, scratch) else {
                break;
            };
            unread.load(&host.swap);
            if task::fatal_signal_pending() {
                return Err(EINTR);
            }
        }
        task::cond_resched();
    }
    Ok(())
}

/// Frames for the slots of one VM, at its expense.
struct Reserve {
    vm: Arc<Vm>,
    needed: usize,
    frames: KVVec<Frame>,
}

/// Frames for every VM's slots.
struct Reserves {
    of: KVVec<Reserve>,
    /// The one that was asked for last: the slots of a VM come one after the other.
    last: usize,
}

impl Reserves {
    fn of(&mut self, vm: &Vm) -> Option<&mut Reserve> {
        let is_it = |reserve: &Reserve| reserve.vm.id() == vm.id();
        if !self.of.get(self.last).is_some_and(is_it) {
            self.last = self.of.iter().position(is_it)?;
        }
        self.of.get_mut(self.last)
    }
}

/// One frame for each slot that will be broken, or none at all.
fn frames_for<'a>(
    host: &Host,
    vms: impl Iterator<Item = &'a Arc<Vm>>,
    breaks: &dyn Fn(&RegionGuard<'_>, u32) -> bool,
) -> Result<Reserves> {
    let mut reserves = Reserves {
        of: KVVec::new(),
        last: 0,
    };
    for vm in vms {
        let reserve = Reserve {
            vm: vm.clone(),
            needed: 0,
            frames: KVVec::new(),
        };
        reserves.of.push(reserve, GFP_KERNEL)?;
    }
    each_shared(host, &mut |guard, _, record| {
        if breaks(guard, record) {
            let reserve = reserves.of(guard.region().vm()).ok_or(ENOMEM)?;
            reserve.needed = reserve.needed.saturating_add(1);
        }
        Ok(None)
    })?;
    for reserve in reserves.of.iter_mut() {
        reserve.frames.reserve(reserve.needed, GFP_KERNEL)?;
        for _ in 0..reserve.needed {
            let frame = reserve.vm.pays(|| Frame::alloc(Purpose::Returned, -1));
            reserve.frames.push(frame.ok_or(ENOMEM)?, GFP_KERNEL)?;
            if task::fatal_signal_pending() {
                return Err(EINTR);
            }
            task::cond_resched();
        }
    }
    Ok(reserves)
}

fn break_shares(
    host: &Host,
    breaks: &dyn Fn(&RegionGuard<'_>, u32) -> bool,
    reserves: &mut Reserves,
    scratch: &mut Scratch,
) -> Result {
    each_shared(host, &mut |guard, index, record| {
        if !breaks(guard, record) {
            return Ok(None);
        }
        match host.index().page(record).ok_or(ENOMEM)? {
            // Nobody can read it, so nobody sees another's bytes in it.
            SharedPage::Frame(frame) if frame.as_ref().is_poisoned() => return Ok(None),
            _ => {}
        }
        // Guests only ever break shares meanwhile, so the frames suffice.
        let reserve = reserves.of(guard.region().vm()).ok_or(ENOMEM)?;
        let mut own = reserve.frames.pop().ok_or(ENOMEM)?;
        match (host.index()).copy(record, &mut own, scratch, host.away()) {
            Ok(()) => {}
            Err(NotHad::Unread(unread)) => {
                // There is room: it was taken out just now.
                let _ = reserve.frames.push_within_capacity(own);
                return Ok(Some(unread));
            }
            // As above.
            Err(NotHad::Lost) if host.index().is_lost(record) => {
                let _ = reserve.frames.push_within_capacity(own);
                return Ok(None);
            }
            Err(NotHad::Lost | NotHad::Corrupt) => return Err(EIO),
        }
        guard.zap(index);
        host.release(guard.set(index, Content::Private(own), 0));
        Ok(None)
    })
}

/// Records whose sharers moved together are found under the new scope from here on.
fn rename_records(host: &Host, groups: &[Group]) {
    host.index().rename_records(|id, frame, old| {
        // Broken memory is not read again, and not found again.
        if frame.as_ref().is_poisoned() {
            return None;
        }
        let scope = groups.get(id as usize)?.moves_from(Scope(old.scope))?;
        let hash = hash::of_page(frame.as_ref(), host.seed(scope));
        Some(Key { hash, scope })
    });
}

impl Host {
    /// `zero_only`: whether only zero pages are merged.
    pub(crate) fn set_zero_only(&self, zero_only: bool) {
        let mut policy = self.policy();
        // Pages that were hashed meanwhile left no hints.
        if core::mem::replace(&mut policy.zero_only, zero_only) && !zero_only {
            forget_looks(self, &[]);
        }
        drop(policy);
        self.scanner_bell.ring();
    }
}

/// What the scanner noted about private pages was under other hashes: it looks at them anew.
///
/// Hints are gone or were not left, so this is for every VM's pages; only the changed VMs' tags are void
/// too.
fn forget_looks(host: &Host, changed: &[u32]) {
    for id in 0..host.registry().end() {
        let Some(region) = host.registry().get(id) else {
            continue;
        };
        let new_hashes = changed.contains(&region.vm().id());
        for index in 0..SLOTS {
            region.forget_stable(index);
            let looked = matches!(region.peek(index).state(), State::Private | State::Huge);
            if new_hashes && looked {
                let mut guard = region.lock();
                let slot = guard.slot(index);
                let forgotten = match HugeWord::from_slot(slot) {
                    Some(word) => word.forgotten().slot(),
                    None => slot.looked_at(Class::Unchecked, 0),
                };
                guard.note(index, forgotten);
            }
        }
        task::cond_resched();
    }
}
