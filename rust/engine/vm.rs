// SPDX-License-Identifier: GPL-2.0

//! VMs and sharing domains: who owns pages, and who may share them with whom.
//!
//! Lock order: the VM list > a VM's domain. A VM's counts are a leaf under any region lock.

use super::{
    host::Knobs,
    sample::{Sample, Standing},
    volume::Swap,
};
pub(crate) use crate::logic::scope::Scope;
use crate::{
    logic::{
        bell::Request,
        counts::{self, Counts},
        pace::TokenBucket,
        slot,
        tunables::{LargePages, ShareScope},
    },
    sys::{
        alloc, cgroup::Payer, clock, kobj::Directory, protect, report::bug_once, swapio::SwapDir,
        task, zs::Store,
    },
};
use core::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicU8, Ordering};
use kernel::{
    new_condvar, new_mutex, new_spinlock,
    prelude::*,
    sync::{
        lock::{spinlock::SpinLockBackend, Guard},
        Arc, CondVar, CondVarTimeoutResult, Mutex, SpinLock,
    },
    time::msecs_to_jiffies,
};

/// A name under which VMs share pages.
pub(crate) struct Domain {
    id: u32,
    name: KVec<u8>,
}

impl Domain {
    /// The name, as it was given.
    pub(crate) fn name(&self) -> &[u8] {
        &self.name
    }
}

/// How a VM's slots are counted; changed under one lock, so that every look is a true snapshot.
#[derive(Clone, Copy, Default)]
pub(crate) struct VmCounts {
    /// Pages by state.
    pub(crate) pages: Counts,
    /// Private pages that were looked at and have no equal.
    pub(crate) unshared: u64,
    /// Private pages that changed between the last two looks.
    pub(crate) volatile: u64,
    /// Pages of 2 MiB folios that a split would give back.
    pub(crate) splittable: u64,
}

impl VmCounts {
    /// A split begins or ceases to give a page back.
    pub(crate) fn count_gain(&mut self, from: bool, to: bool) {
        self.splittable = self
            .splittable
            .saturating_add(u64::from(to))
            .saturating_sub(u64::from(from));
    }

    /// A page goes from one state to another.
    pub(crate) fn move_page(&mut self, from: counts::Class, to: counts::Class) {
        self.move_pages(from, to, 1);
    }

    /// Pages go from one state to another.
    pub(crate) fn move_pages(&mut self, from: counts::Class, to: counts::Class, pages: u64) {
        // A refusal would mean that a page was counted twice; the sum stays true either way.
        if from != to && self.pages.transition(from, to, pages).is_err() {
            bug_once!("page counts are off ({:?} to {:?})", from, to);
        }
    }

    /// A Private page's class changes; `None` for a page that is not Private.
    pub(crate) fn reclassify(&mut self, from: Option<slot::Class>, to: Option<slot::Class>) {
        match from {
            Some(slot::Class::Unshared) => self.unshared = self.unshared.saturating_sub(1),
            Some(slot::Class::Volatile) => self.volatile = self.volatile.saturating_sub(1),
            _ => {}
        }
        match to {
            Some(slot::Class::Unshared) => self.unshared = self.unshared.saturating_add(1),
            Some(slot::Class::Volatile) => self.volatile = self.volatile.saturating_add(1),
            _ => {}
        }
    }
}

/// What a VM counts as it runs.
#[derive(Default)]
pub(crate) struct VmEvents {
    /// Faults served.
    pub(crate) faults: AtomicU64,
    /// Shared and zero pages that a write gave a frame of their own.
    pub(crate) cow_breaks: AtomicU64,
    /// Write faults on pages that the scanner had write-protected.
    pub(crate) protect_faults: AtomicU64,
    /// Microseconds that its tasks waited for memory.
    pub(crate) stall_us: AtomicU64,
    /// Times that one had to wait because the VM, or the host, has too little.
    pub(crate) stalls: AtomicU64,
    /// Pages that were compressed, same-filled ones too.
    pub(crate) compressions: AtomicU64,
    /// Pages that were brought back.
    pub(crate) decompressions: AtomicU64,
}

/// What the reclaimer knows of a VM.
#[derive(Clone, Copy, Default)]
pub(crate) struct Clock {
    /// Number of the region that it is at.
    pub(crate) region: u32,
    /// The page that comes next in it.
    pub(crate) index: usize,
    /// Pages of the window around that which were mapped when the sweep came to them.
    pub(crate) touched: u64,
    /// What is swapped out next: a region, and a page in it. What was compressed longest ago comes next
    /// here, for the sweep goes the same way.
    pub(crate) swap_at: (u32, usize),
    /// Pages that this sweep freed.
    pub(crate) freed: u64,
    /// Sweeps in a row that freed nothing.
    pub(crate) barren: u32,
    /// Times in a row that there was nothing to take.
    pub(crate) stuck: u32,
    /// It is left alone until then.
    pub(crate) rest_until_us: u64,
    /// Sweeps in a row for pages that are not in use which found hardly any.
    pub(crate) lean: u32,
    /// Since when the splitter was asked for small pages because of that; 0 if it was not.
    pub(crate) lean_since_us: u64,
    /// Whatever the sample says, sweeps found that all of its pages are in use.
    pub(crate) spent: bool,
    /// Its pool cannot be made smaller before.
    pub(crate) pool_rest_until_us: u64,
}

/// How much memory a VM may have, and what it pays; read without a lock.
pub(crate) struct Claims {
    /// `shares`
    pub(crate) shares: AtomicU64,
    /// `reservation_kb`
    pub(crate) reservation_kb: AtomicU64,
    /// `limit_kb`, 0 = none.
    pub(crate) limit_kb: AtomicU64,
    /// Its own `compress_max_percent`, 0 = the host's.
    pub(crate) compress_max_percent: AtomicU64,
}

impl Claims {
    /// What it may keep whatever happens.
    pub(crate) fn reserved_kb(&self) -> u64 {
        if protect::armed(protect::Protection::Reservation) {
            self.reservation_kb.load(Ordering::Relaxed)
        } else {
            0
        }
    }
}

/// One VM: the files of one directory.
#[pin_data]
pub(crate) struct Vm {
    id: u32,
    #[pin]
    name: Mutex<KVec<u8>>,
    #[pin]
    domain: Mutex<Arc<Domain>>,
    /// The scope that its pages are shared under now; changed by `regroup` only.
    scope: AtomicU32,
    /// Whether its pages may be shared at all.
    share: AtomicBool,
    #[pin]
    counts: SpinLock<VmCounts>,
    /// What it counts.
    pub(crate) events: VmEvents,
    /// Its own ceiling on scanned pages a second, 0 = none.
    pub(crate) scan_pages_per_sec: AtomicU64,
    /// Index in `LargePages::ALL`, or [`AS_HOST`].
    large_pages: AtomicU8,
    #[pin]
    scan_budget: SpinLock<TokenBucket>,
    /// How much memory it may have.
    pub(crate) claims: Claims,
    /// How much it uses.
    pub(crate) sample: Sample,
    store: Arc<Store>,
    swap: Arc<Swap>,
    #[pin]
    clock: SpinLock<Clock>,
    /// What did not work before may work now.
    anew: Request,
    /// It told the reclaimer that it is about to reach its limit.
    asked: Request,
    /// Tasks that wait until it has less.
    waiters: AtomicU32,
    #[pin]
    relief: Mutex<()>,
    #[pin]
    relieved: CondVar,
    /// The reclaimer found nothing more to take.
    stuck: AtomicBool,
    /// It has idle memory in folios only.
    wants_small: AtomicBool,
    /// It holds more than its fair share.
    over_share: AtomicBool,
    owner_pid: AtomicI32,
    /// The cgroup of the process that mapped its memory last: it pays where a kernel thread allocates.
    #[pin]
    payer: SpinLock<Option<Arc<Payer>>>,
    /// Mappings of its files.
    pub(crate) mappings: AtomicU64,
    /// Those of them that can never write.
    pub(crate) read_only_mappings: AtomicU64,
    /// Files; changed under the VM list's lock.
    files: AtomicU32,
    #[pin]
    directory: Mutex<Option<Directory<Vm>>>,
}

/// No value of its own.
const AS_HOST: u8 = u8::MAX;

/// Defaults for new VMs: mount options.
#[derive(Clone)]
pub(crate) struct VmDefaults {
    /// Whether they share.
    pub(crate) share: bool,
    /// Their ceiling on scanned pages a second, 0 = none.
    pub(crate) scan_pages_per_sec: u64,
    /// When their empty regions become 2 MiB pages, `None` = as the host says.
    pub(crate) large_pages: Option<LargePages>,
    /// Where their swap files are made, `None` = where the host says.
    pub(crate) swap_dir: Option<Arc<SwapDir>>,
}

impl Vm {
    /// Number of the VM on the host.
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// Runs `f` on the name.
    pub(crate) fn with_name<R>(&self, f: impl FnOnce(&[u8]) -> R) -> R {
        f(&self.name.lock())
    }

    /// The counts, locked: a leaf.
    pub(crate) fn counts(&self) -> Guard<'_, VmCounts, SpinLockBackend> {
        self.counts.lock()
    }

    /// A snapshot of the counts.
    pub(crate) fn snapshot(&self) -> VmCounts {
        *self.counts.lock()
    }

    /// The scope that its pages are shared under now.
    pub(crate) fn scope(&self) -> Scope {
        match Scope(self.scope.load(Ordering::Relaxed)) {
            Scope::NONE => Scope::NONE,
            _ if !protect::armed(protect::Protection::Border) => Scope::HOST,
            scope => scope,
        }
    }

    /// Only `regroup` calls this, once no share crosses the new border.
    pub(super) fn set_scope(&self, scope: Scope) {
        self.scope.store(scope.0, Ordering::Relaxed);
    }

    /// Whether its pages may be shared.
    pub(crate) fn shares(&self) -> bool {
        self.share.load(Ordering::Relaxed)
    }

    pub(super) fn set_shares(&self, share: bool) {
        self.share.store(share, Ordering::Relaxed);
    }

    /// Its domain.
    pub(crate) fn domain(&self) -> Arc<Domain> {
        self.domain.lock().clone()
    }

    pub(super) fn set_domain(&self, domain: Arc<Domain>) {
        let old = core::mem::replace(&mut *self.domain.lock(), domain);
        drop(old);
    }

    /// The scope that `share_scope` means for this VM.
    pub(crate) fn scope_under(&self, share_scope: ShareScope) -> Scope {
        self.scope_with(share_scope, self.shares(), self.domain().id)
    }

    /// The same with another domain or `share` than it has now.
    pub(super) fn scope_with(&self, share_scope: ShareScope, shares: bool, domain: u32) -> Scope {
        Scope::of(share_scope, shares, self.id, domain)
    }

    /// Whether its own ceiling allows `pages` more pages now.
    pub(crate) fn may_scan(&self, now_us: u64, pages: u64) -> bool {
        let rate = self.scan_pages_per_sec.load(Ordering::Relaxed);
        rate == 0 || self.scan_budget.lock().take(now_us, rate, pages)
    }

    /// When its empty regions become 2 MiB pages, `None` = as the host says.
    pub(crate) fn large_pages(&self) -> Option<LargePages> {
        LargePages::from_index(self.large_pages.load(Ordering::Relaxed).into())
    }

    /// Sets [`Vm::large_pages`].
    pub(crate) fn set_large_pages(&self, value: Option<LargePages>) {
        let index = value.map_or(AS_HOST, |value| value.index() as u8);
        self.large_pages.store(index, Ordering::Relaxed);
    }

    /// Its compressed pages.
    pub(crate) fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Its swap file.
    pub(crate) fn swap(&self) -> &Arc<Swap> {
        &self.swap
    }

    /// KiB that its compressed pages take.
    pub(crate) fn pool_kb(&self) -> u64 {
        counts::pages_to_kb(self.store.pages())
    }

    /// Pages that are not empty, wherever they are.
    pub(crate) fn filled_pages(&self) -> u64 {
        self.standing().filled
    }

    /// What it has, and what came back to it.
    pub(super) fn standing(&self) -> Standing {
        let pages = self.snapshot().pages;
        let not_own = [
            counts::Class::Empty,
            counts::Class::Zero,
            counts::Class::Shared,
        ];
        let of = |class: &counts::Class| pages.get(*class);
        let not_own = not_own.iter().map(of).fold(0, u64::saturating_add);
        Standing {
            filled: (pages.total()).saturating_sub(pages.get(counts::Class::Empty)),
            own: pages.total().saturating_sub(not_own),
            returned: (self.events.decompressions.load(Ordering::Relaxed))
                .saturating_add(self.swap.ins.load(Ordering::Relaxed)),
        }
    }

    /// KiB that the VM itself holds.
    pub(crate) fn resident_kb(&self) -> u64 {
        self.snapshot().pages.resident_kb(self.pool_kb())
    }

    /// The largest size of its pool, by the host's knob if it has none of its own.
    pub(crate) fn pool_cap_pages(&self, knobs: &Knobs) -> u64 {
        let percent = match self.claims.compress_max_percent.load(Ordering::Relaxed) {
            0 => knobs.compress_max_percent.load(Ordering::Relaxed),
            own => own,
        };
        if !protect::armed(protect::Protection::PoolCap) {
            return u64::MAX;
        }
        self.snapshot().pages.total().saturating_mul(percent) / 100
    }

    /// `limit_kb`, if it has one.
    pub(crate) fn limit_kb(&self) -> Option<u64> {
        match self.claims.limit_kb.load(Ordering::Relaxed) {
            0 => None,
            _ if !protect::armed(protect::Protection::Limit) => None,
            limit_kb => Some(limit_kb),
        }
    }

    /// Whether it holds more than `limit_kb`.
    pub(crate) fn is_over_limit(&self) -> bool {
        self.limit_kb()
            .is_some_and(|limit_kb| self.resident_kb() > limit_kb)
    }

    /// KiB above which the reclaimer begins to keep it below its limit, and KiB at which it ends:
    /// who takes memory should not have to wait each time. `None` without a limit.
    pub(crate) fn limit_marks_kb(&self) -> Option<(u64, u64)> {
        self.limit_kb()
            .map(|limit_kb| (limit_kb - limit_kb / 64, limit_kb - limit_kb / 16))
    }

    /// Whether it may take `kb` more and stay well below its limit.
    pub(crate) fn has_room_for_kb(&self, kb: u64) -> bool {
        self.limit_marks_kb()
            .is_none_or(|(high_kb, _)| self.resident_kb().saturating_add(kb) <= high_kb)
    }

    /// Whether the reclaimer should be told that it is about to reach its limit; once.
    pub(crate) fn should_ask(&self) -> bool {
        self.limit_marks_kb()
            .is_some_and(|(high_kb, _)| self.resident_kb() > high_kb)
            && self.asked.make()
    }

    /// The reclaimer heard it, and looks next.
    pub(super) fn heard(&self) {
        self.asked.take();
    }

    /// Waits until `over` says so, for `us` microseconds at most, or for a signal.
    pub(crate) fn wait_for_relief(&self, us: u64, over: impl Fn() -> bool) {
        /// What is waited for may come without a word.
        const STEP_MS: u32 = 10;
        self.waiters.fetch_add(1, Ordering::Relaxed);
        let start = clock::now_us();
        let mut relief = self.relief.lock();
        while !over() && clock::now_us().saturating_sub(start) < us {
            let step = msecs_to_jiffies(STEP_MS);
            match self.relieved.wait_interruptible_timeout(&mut relief, step) {
                CondVarTimeoutResult::Signal { .. } => break,
                _ => continue,
            }
        }
        drop(relief);
        self.waiters.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether a task waits until it has less.
    pub(super) fn is_awaited(&self) -> bool {
        self.waiters.load(Ordering::Relaxed) != 0
    }

    /// It has less: who waits looks again.
    pub(super) fn relieve_waiters(&self) {
        self.relieved.notify_all();
    }

    /// Whether the reclaimer found nothing more to take from it.
    pub(crate) fn is_stuck(&self) -> bool {
        self.stuck.load(Ordering::Relaxed)
    }

    /// Only the reclaimer calls this.
    pub(super) fn set_stuck(&self, stuck: bool) {
        self.stuck.store(stuck, Ordering::Relaxed);
    }

    /// Whether its folios are to be split, whatever they would give back: there is no other idle memory.
    pub(crate) fn wants_small(&self) -> bool {
        self.wants_small.load(Ordering::Relaxed)
    }

    /// Only the reclaimer calls this.
    pub(super) fn set_wants_small(&self, wanted: bool) {
        self.wants_small.store(wanted, Ordering::Relaxed);
    }

    /// The host has memory: what sweeps found by now is of no use the next time.
    pub(super) fn forget_sweeps(&self) {
        self.set_wants_small(false);
        let mut clock = self.clock.lock();
        clock.lean = 0;
        clock.lean_since_us = 0;
    }

    /// Whether it held more than its fair share when the host became short of memory.
    pub(crate) fn is_over_share(&self) -> bool {
        self.over_share.load(Ordering::Relaxed)
    }

    /// Only the reclaimer calls this.
    pub(super) fn set_over_share(&self, over: bool) {
        self.over_share.store(over, Ordering::Relaxed);
    }

    /// The reclaimer's place in it.
    pub(super) fn clock(&self) -> Clock {
        let mut clock = self.clock.lock();
        if self.anew.take() {
            self.set_stuck(false);
            clock.barren = 0;
            clock.stuck = 0;
            clock.rest_until_us = 0;
            clock.spent = false;
            clock.pool_rest_until_us = 0;
        }
        *clock
    }

    /// What is known of its working set is new.
    pub(super) fn sampled_anew(&self) {
        let mut clock = self.clock.lock();
        clock.spent = false;
        clock.lean = 0;
    }

    /// Only the reclaimer calls this.
    pub(super) fn set_clock(&self, clock: Clock) {
        *self.clock.lock() = clock;
    }

    /// A knob changed: the reclaimer tries again what did not work.
    pub(crate) fn try_anew(&self) {
        self.set_stuck(false);
        self.anew.make();
    }

    /// A mapping was made by the running process, which is `pid`.
    pub(crate) fn mapped_by(&self, pid: i32, read_only: bool) {
        self.owner_pid.store(pid, Ordering::Relaxed);
        self.set_payer(Payer::of_current());
        self.mapping_added(read_only);
    }

    /// A mapping was copied or split.
    pub(crate) fn mapping_added(&self, read_only: bool) {
        self.mappings.fetch_add(1, Ordering::Relaxed);
        if read_only {
            self.read_only_mappings.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A mapping ended.
    pub(crate) fn mapping_ended(&self, read_only: bool) {
        if read_only {
            self.read_only_mappings.fetch_sub(1, Ordering::Relaxed);
        }
        if self.mappings.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.owner_pid.store(0, Ordering::Relaxed);
            self.set_payer(None);
        }
    }

    /// Without memory for the note, whoever faults pays.
    fn set_payer(&self, payer: Option<Payer>) {
        let payer = payer.and_then(|payer| alloc::counted(payer).ok());
        let before = core::mem::replace(&mut *self.payer.lock(), payer);
        drop(before);
    }

    /// Runs `f`, whose charged allocations are at the expense of the VM's cgroup.
    pub(crate) fn pays<R>(&self, f: impl FnOnce() -> R) -> R {
        let payer = self.payer.lock().clone();
        Payer::pays(payer.as_deref(), f)
    }

    /// The same where a process pays for itself: for a fault, which may be a process's own or that of
    /// a kernel thread (KVM's asynchronous faults).
    pub(crate) fn pays_for_kernel<R>(&self, f: impl FnOnce() -> R) -> R {
        if task::is_kernel_thread() {
            self.pays(f)
        } else {
            f()
        }
    }

    /// Process that mapped its memory last, 0 = none.
    pub(crate) fn owner_pid(&self) -> i32 {
        self.owner_pid.load(Ordering::Relaxed)
    }
}

impl Domain {
    /// Number of the domain on the host.
    pub(crate) fn id(&self) -> u32 {
        self.id
    }
}

struct VmList {
    vms: KVec<Arc<Vm>>,
    domains: KVec<Arc<Domain>>,
    next_id: u32,
}

/// All VMs of the host, and the domains that they name.
#[pin_data]
pub(crate) struct Vms {
    #[pin]
    list: Mutex<VmList>,
    /// Told when a VM has gone for good.
    #[pin]
    gone: CondVar,
}

/// What is to be made in sysfs for a new VM.
pub(crate) type MakeDirectory<'a> = &'a dyn Fn(&Arc<Vm>, &[u8]) -> Result<Directory<Vm>>;

impl Vms {
    /// No VMs.
    pub(crate) fn new() -> impl PinInit<Vms> {
        pin_init!(Vms {
            list <- new_mutex!(
                VmList { vms: KVec::new(), domains: KVec::new(), next_id: 0 },
                "thinram_vms"
            ),
            gone <- new_condvar!("thinram_vm_gone"),
        })
    }

    /// One more file of the VM in `place` (a directory's memory of its VM), made if need be.
    ///
    /// `None` when a VM is just ending in that place: wait with [`Vms::wait_for_an_end`] and try
    /// again. A name that another VM has is EEXIST.
    pub(crate) fn attach(
        &self,
        place: &Mutex<Option<Arc<Vm>>>,
        name: &[u8],
        domain: Option<&[u8]>,
        defaults: &VmDefaults,
        share_scope: ShareScope,
        make_directory: MakeDirectory<'_>,
    ) -> Result<Option<Arc<Vm>>> {
        let mut list = self.list.lock();
        let known = place.lock().clone();
        if let Some(vm) = known {
            if vm.files.load(Ordering::Relaxed) > 0 {
                vm.files.fetch_add(1, Ordering::Relaxed);
                return Ok(Some(vm));
            }
            if list.vms.iter().any(|other| Arc::ptr_eq(other, &vm)) {
                return Ok(None);
            }
            *place.lock() = None;
        }
        if list
            .vms
            .iter()
            .any(|vm| vm.with_name(|other| other == name))
        {
            return Err(EEXIST);
        }
        let id = list.next_id;
        list.next_id = id.wrapping_add(1);
        let domain = match domain {
            Some(name) => list.domain(name)?,
            None => alloc::counted(Domain {
                id: list.take_id(),
                name: KVec::new(),
            })?,
        };
        let vm = Vm::new(id, name, domain, defaults, share_scope)?;
        alloc::push(&mut list.vms, vm.clone())?;
        match make_directory(&vm, name) {
            Ok(directory) => *vm.directory.lock() = Some(directory),
            Err(error) => {
                list.vms.retain(|other| !Arc::ptr_eq(other, &vm));
                return Err(error);
            }
        }
        *place.lock() = Some(vm.clone());
        Ok(Some(vm))
    }

    /// Waits until the VM in `place` has ended. Holds no lock that its end could need.
    pub(crate) fn wait_for_an_end(&self, place: &Mutex<Option<Arc<Vm>>>) -> Result {
        let mut list = self.list.lock();
        loop {
            let Some(vm) = place.lock().clone() else {
                return Ok(());
            };
            let ending = vm.files.load(Ordering::Relaxed) == 0
                && list.vms.iter().any(|other| Arc::ptr_eq(other, &vm));
            if !ending {
                return Ok(());
            }
            if self.gone.wait_interruptible(&mut list) {
                return Err(ERESTARTSYS);
            }
        }
    }

    /// A file of `vm` was evicted; with the last one the VM ends.
    pub(crate) fn detach(&self, vm: &Arc<Vm>) {
        let list = self.list.lock();
        if vm.files.fetch_sub(1, Ordering::Relaxed) != 1 {
            return;
        }
        drop(list);
        // Waits for readers of its files in sysfs, which take no lock of ours that is held here.
        // The guard ends first: a rename waits for it with the list locked.
        let directory = vm.directory.lock().take();
        drop(directory);
        vm.swap.close();
        let mut list = self.list.lock();
        list.vms.retain(|other| !Arc::ptr_eq(other, vm));
        list.forget_domains();
        self.gone.notify_all();
    }

    /// Gives the VM another name. EEXIST when it is taken.
    pub(crate) fn rename(&self, vm: &Arc<Vm>, name: &[u8]) -> Result {
        let list = self.list.lock();
        if list
            .vms
            .iter()
            .any(|o| !Arc::ptr_eq(o, vm) && o.with_name(|other| other == name))
        {
            return Err(EEXIST);
        }
        let owned = alloc::copied(name)?;
        if let Some(directory) = &*vm.directory.lock() {
            directory.rename(name)?;
        }
        *vm.name.lock() = owned;
        Ok(())
    }

    /// Runs `f` on each VM.
    pub(crate) fn for_each(&self, mut f: impl FnMut(&Arc<Vm>)) {
        for vm in &self.list.lock().vms {
            f(vm);
        }
    }

    /// The same unless the list is locked, for who must not wait.
    pub(crate) fn try_for_each(&self, mut f: impl FnMut(&Arc<Vm>)) {
        if let Some(list) = self.list.try_lock() {
            for vm in &list.vms {
                f(vm);
            }
        }
    }

    /// All of them as of now.
    pub(crate) fn all(&self) -> Result<KVec<Arc<Vm>>> {
        let list = self.list.lock();
        let mut vms = alloc::list(list.vms.len())?;
        for vm in &list.vms {
            vms.push(vm.clone(), GFP_KERNEL)?;
        }
        Ok(vms)
    }

    /// The domain of that name, made if need be; the empty name is a new domain of nobody else.
    pub(crate) fn domain(&self, name: &[u8]) -> Result<Arc<Domain>> {
        let mut list = self.list.lock();
        if name.is_empty() {
            let id = list.take_id();
            return Ok(alloc::counted(Domain {
                id,
                name: KVec::new(),
            })?);
        }
        list.domain(name)
    }

    /// Memory taken by VMs and domains, without their regions.
    pub(crate) fn bytes(&self) -> u64 {
        let list = self.list.lock();
        let vms = list.vms.len().saturating_mul(core::mem::size_of::<Vm>());
        let domains = list
            .domains
            .len()
            .saturating_mul(core::mem::size_of::<Domain>());
        let swap = list
            .vms
            .iter()
            .fold(0u64, |sum, vm| sum.saturating_add(vm.swap.bytes()));
        (vms.saturating_add(domains) as u64).saturating_add(swap)
    }
}

#[cfg(CONFIG_KUNIT = "y")]
impl Vms {
    /// A VM of one file, without a directory in sysfs.
    pub(crate) fn attach_for_test(&self, name: &[u8], domain: &[u8]) -> Result<Arc<Vm>> {
        let mut list = self.list.lock();
        let defaults = VmDefaults {
            share: true,
            scan_pages_per_sec: 0,
            large_pages: None,
            swap_dir: None,
        };
        let (id, domain) = (list.take_id(), list.domain(domain)?);
        let vm = Vm::new(id, name, domain, &defaults, ShareScope::Domain)?;
        list.vms.push(vm.clone(), GFP_KERNEL)?;
        Ok(vm)
    }
}

impl VmList {
    fn take_id(&mut self) -> u32 {
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        id
    }

    fn domain(&mut self, name: &[u8]) -> Result<Arc<Domain>> {
        if let Some(domain) = self.domains.iter().find(|d| d.name() == name) {
            return Ok(domain.clone());
        }
        let owned = alloc::copied(name)?;
        let domain = alloc::counted(Domain {
            id: self.take_id(),
            name: owned,
        })?;
        alloc::push(&mut self.domains, domain.clone())?;
        Ok(domain)
    }

    /// With the last VM the names go; before that one may just be on its way to a VM.
    fn forget_domains(&mut self) {
        if self.vms.is_empty() {
            self.domains.clear();
        }
    }
}

impl Vm {
    fn new(
        id: u32,
        name: &[u8],
        domain: Arc<Domain>,
        defaults: &VmDefaults,
        share_scope: ShareScope,
    ) -> Result<Arc<Vm>> {
        let owned = alloc::copied(name)?;
        let vm = alloc::counted_in_place(
            try_pin_init!(Vm {
                id,
                name <- new_mutex!(owned, "thinram_vm_name"),
                domain <- new_mutex!(domain, "thinram_vm_domain"),
                scope: AtomicU32::new(0),
                share: AtomicBool::new(defaults.share),
                counts <- new_spinlock!(VmCounts::default(), "thinram_vm_counts"),
                events: VmEvents::default(),
                scan_pages_per_sec: AtomicU64::new(defaults.scan_pages_per_sec),
                large_pages: AtomicU8::new(AS_HOST),
                scan_budget <- new_spinlock!(TokenBucket::new(0), "thinram_vm_budget"),
                claims: Claims {
                    shares: AtomicU64::new(1000),
                    reservation_kb: AtomicU64::new(0),
                    limit_kb: AtomicU64::new(0),
                    compress_max_percent: AtomicU64::new(0),
                },
                sample: Sample::new(),
                store: Store::new()?,
                swap: Swap::new(defaults.swap_dir.clone())?,
                clock <- new_spinlock!(Clock::default(), "thinram_vm_clock"),
                anew: Request::new(),
                asked: Request::new(),
                waiters: AtomicU32::new(0),
                relief <- new_mutex!((), "thinram_vm_relief"),
                relieved <- new_condvar!("thinram_vm_relieved"),
                stuck: AtomicBool::new(false),
                wants_small: AtomicBool::new(false),
                over_share: AtomicBool::new(false),
                owner_pid: AtomicI32::new(0),
                payer <- new_spinlock!(None, "thinram_vm_payer"),
                mappings: AtomicU64::new(0),
                read_only_mappings: AtomicU64::new(0),
                files: AtomicU32::new(1),
                directory <- new_mutex!(None, "thinram_vm_directory"),
            }),
            GFP_KERNEL,
        )?;
        vm.set_scope(vm.scope_under(share_scope));
        vm.set_large_pages(defaults.large_pages);
        Ok(vm)
    }
}
