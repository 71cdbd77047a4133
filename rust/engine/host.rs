// SPDX-License-Identifier: GPL-2.0

//! The host: all VMs, the index, the knobs and the counters.
//!
//! Lock order: policy > VM list > region > index > registry.

use super::{
    collapse::CollapseEvents,
    compress,
    merge::{Refusals, Rules},
    pools::{Away, SharedPools},
    pressure::Pressure,
    region::Registry,
    regroup::{self, Change},
    shared::{IndexFigures, SharedIndex},
    shrink::Shrinking,
    split::SplitEvents,
    vm::{MakeDirectory, Scope, Vm, VmDefaults, Vms},
    volume::SwapWork,
};
use crate::{
    logic::{
        bell::{self, Ear, Request, Rings, Rope},
        counts::Class,
        hist::AtomicHist,
        state::HostState,
        tunables::{LargePages, RunMode, ShareScope},
    },
    sys::{
        alloc,
        hash::{self, Seed},
        huge::HugeFrame,
        page::{Frame, PageRef, Purpose},
        protect::{self, Protection},
        slots::{Content, Sharer, SLOTS},
    },
};
use core::sync::atomic::{AtomicU64, AtomicU8, Ordering};
use kernel::{
    new_condvar, new_mutex,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        lock::{mutex::MutexBackend, Guard},
        Arc, CondVar, Mutex, SetOnce,
    },
    time::msecs_to_jiffies,
};

/// Zero frames: several, so that no single reference count is everybody's.
const ZERO_FRAMES: usize = 8;

/// What may be merged with what; held by the scanner for each step, and by whoever changes it.
pub(crate) struct Policy {
    /// Who shares with whom.
    pub(crate) share_scope: ShareScope,
    /// Only zero pages are merged.
    pub(crate) zero_only: bool,
}

/// Numbers that are set through sysfs and read without a lock.
pub(crate) struct Knobs {
    /// Ceiling on pages a second, 0 = none.
    pub(crate) scan_pages_per_sec: AtomicU64,
    /// Target time for a pass over everything, seconds.
    pub(crate) scan_period_secs: AtomicU64,
    /// Ceiling on the scanner's CPU time, percent of one CPU.
    pub(crate) scan_cpu_max_percent: AtomicU64,
    /// Whether pages of different NUMA nodes are merged.
    pub(crate) merge_across_nodes: AtomicU64,
    /// Sharers of one frame at most.
    pub(crate) max_page_sharing: AtomicU64,
    /// Size of a VM's pool at most, percent of the VM's size.
    pub(crate) compress_max_percent: AtomicU64,
    /// Size of a compressed page at most, percent of a page.
    pub(crate) compress_max_object_percent: AtomicU64,
    /// How much more idle memory costs: `1 / (1 - tax)`.
    pub(crate) idle_tax_percent: AtomicU64,
    /// Pages of a VM that are watched for being touched.
    pub(crate) active_sample_pages: AtomicU64,
    /// For so many seconds.
    pub(crate) active_sample_period_secs: AtomicU64,
    /// Holes that a 2 MiB folio may have, percent of it.
    pub(crate) split_holes_percent: AtomicU64,
    /// Seconds that the host has to be `high` for before regions are collapsed.
    pub(crate) collapse_after_secs: AtomicU64,
    /// Regions that are collapsed in a second at most, 0 = none.
    pub(crate) collapse_per_sec: AtomicU64,
}

/// What the host counts.
#[derive(Default)]
pub(crate) struct Events {
    /// Private pages that the scanner hashed.
    pub(crate) pages_scanned: AtomicU64,
    /// Private pages that it passed over: unchanged, or backing off.
    pub(crate) pages_skipped: AtomicU64,
    /// Passes over everything.
    pub(crate) full_scans: AtomicU64,
    /// Times that the scanner let go of a region because a fault wanted it.
    pub(crate) scan_yields: AtomicU64,
    /// CPU time of the scanner, microseconds.
    pub(crate) scan_cpu_us: AtomicU64,
    /// Shared and zero pages that a write gave a frame of their own.
    pub(crate) cow_breaks: AtomicU64,
    /// Write faults that write protection by the scanner cost.
    pub(crate) protect_faults: AtomicU64,
    /// Faults that had to wait for memory.
    pub(crate) waits_for_memory: AtomicU64,
    /// Empty regions for which there was no folio of 2 MiB.
    pub(crate) large_pages_refused_no_memory: AtomicU64,
    /// Pages that were compressed, same-filled ones too.
    pub(crate) compressions: AtomicU64,
    /// Pages that were brought back.
    pub(crate) decompressions: AtomicU64,
    /// Shared pages that were compressed, once for all their sharers.
    pub(crate) shared_compressions: AtomicU64,
    /// Those that were brought back.
    pub(crate) shared_decompressions: AtomicU64,
    /// Shared pages that came back from a swap file.
    pub(crate) shared_swap_ins: AtomicU64,
    /// Shared pages that were written to one.
    pub(crate) shared_swap_outs: AtomicU64,
    /// Pages that could not be: the memory of the pool is broken.
    pub(crate) decompressions_failed: AtomicU64,
    /// Periods of sampling that are over.
    pub(crate) active_samples: AtomicU64,
    /// CPU time of the reclaimer, microseconds.
    pub(crate) reclaim_cpu_us: AtomicU64,
}

/// Wakes threads out of their sleep.
#[pin_data]
pub(crate) struct Bell {
    #[pin]
    rings: Mutex<Rings>,
    #[pin]
    sound: CondVar,
}

impl Bell {
    pub(super) fn new() -> impl PinInit<Bell> {
        pin_init!(Bell {
            rings <- new_mutex!(Rings::new(), "thinram_bell"),
            sound <- new_condvar!("thinram_bell"),
        })
    }

    /// Ends the current or the next sleep of each listener.
    pub(crate) fn ring(&self) {
        bell::ring(self);
    }

    /// Sleeps for `us` microseconds, until a ring that `ear` has not heard, or until `stop`: by
    /// [`crate::sys::task::should_stop`], which comes with a signal (kthread_stop() sets
    /// TIF_NOTIFY_SIGNAL), so that no wait begins after it.
    pub(crate) fn sleep(&self, ear: &mut Ear, us: u64, stop: fn() -> bool) {
        bell::sleep(self, ear, us, stop);
    }
}

impl Rope for Bell {
    type Held<'a> = Guard<'a, Rings, MutexBackend>;

    fn lock(&self) -> Self::Held<'_> {
        self.rings.lock()
    }

    fn wait<'a>(&'a self, mut held: Self::Held<'a>, us: u64) -> Self::Held<'a> {
        let ms = u32::try_from(us.div_ceil(1000))
            .unwrap_or(u32::MAX)
            .min(3_600_000);
        let _ = (self.sound).wait_interruptible_timeout(&mut held, msecs_to_jiffies(ms));
        held
    }

    fn wake_all(&self) {
        self.sound.notify_all();
    }
}

/// The host.
#[pin_data]
pub(crate) struct Host {
    key: u64,
    run: AtomicU8,
    /// Index in `LargePages::ALL`.
    large_pages: AtomicU8,
    /// Numbers from sysfs.
    pub(crate) knobs: Knobs,
    /// Counters.
    pub(crate) events: Events,
    /// Refused merges by reason.
    pub(crate) refusals: Refusals,
    /// Refused compressions by reason.
    pub(crate) compress_refusals: compress::Refusals,
    /// Splits of 2 MiB folios.
    pub(crate) splits: SplitEvents,
    /// Folios that were made of small pages.
    pub(crate) collapses: CollapseEvents,
    /// How long faults waited for a region's lock.
    pub(crate) lock_wait_us: AtomicHist,
    /// Wakes the scanner.
    #[pin]
    pub(crate) scanner_bell: Bell,
    /// Wakes the reclaimer.
    #[pin]
    pub(crate) reclaimer_bell: Bell,
    /// Wakes the splitter.
    #[pin]
    pub(crate) splitter_bell: Bell,
    /// Swap files.
    #[pin]
    pub(crate) swap: SwapWork,
    /// How short of memory the host is.
    #[pin]
    pub(crate) pressure: Pressure,
    #[pin]
    policy: Mutex<Policy>,
    #[pin]
    vms: Vms,
    #[pin]
    registry: Registry,
    #[pin]
    index: SharedIndex,
    /// Where shared pages are compressed to.
    #[pin]
    pub(crate) shared_pools: SharedPools,
    /// What the kernel's own reclaim got.
    #[pin]
    pub(crate) shrinking: Shrinking,
    /// The reclaimer is to try anew what did not work with shared pages.
    pub(super) shared_anew: Request,
    zero_frames: KVec<Frame>,
    /// 2 MiB of zeroes, once they were asked for.
    pub(super) zero_folio: SetOnce<HugeFrame>,
}

/// All VMs' counts, added up.
#[derive(Clone, Copy, Default)]
pub(crate) struct Totals {
    /// Pages in state Zero.
    pub(crate) zero: u64,
    /// Pages in state Private.
    pub(crate) private: u64,
    /// Pages in state Shared.
    pub(crate) shared: u64,
    /// Private pages without an equal.
    pub(crate) unshared: u64,
    /// Private pages that keep changing.
    pub(crate) volatile: u64,
    /// Pages in state Huge.
    pub(crate) huge: u64,
    /// Pages of them that a split would give back.
    pub(crate) splittable: u64,
}

impl Host {
    /// A host without VMs, with DESIGN's defaults.
    pub(crate) fn new() -> Result<Arc<Host>> {
        let mut zero_frames = alloc::list(ZERO_FRAMES)?;
        for _ in 0..ZERO_FRAMES {
            let mut frame = Frame::alloc(Purpose::Shared, -1).ok_or(ENOMEM)?;
            frame.clear();
            zero_frames.push(frame, GFP_KERNEL)?;
        }
        let shrinking = Shrinking::new()?;
        alloc::counted_in_place(
            try_pin_init!(Host {
                key: hash::random_key(),
                run: AtomicU8::new(1),
                large_pages: AtomicU8::new(LargePages::default().index() as u8),
                knobs: Knobs {
                    scan_pages_per_sec: AtomicU64::new(0),
                    scan_period_secs: AtomicU64::new(200),
                    scan_cpu_max_percent: AtomicU64::new(20),
                    merge_across_nodes: AtomicU64::new(1),
                    max_page_sharing: AtomicU64::new(65536),
                    compress_max_percent: AtomicU64::new(10),
                    compress_max_object_percent: AtomicU64::new(50),
                    idle_tax_percent: AtomicU64::new(75),
                    active_sample_pages: AtomicU64::new(100),
                    active_sample_period_secs: AtomicU64::new(30),
                    split_holes_percent: AtomicU64::new(50),
                    collapse_after_secs: AtomicU64::new(60),
                    collapse_per_sec: AtomicU64::new(16),
                },
                events: Events::default(),
                refusals: Refusals::default(),
                compress_refusals: compress::Refusals::default(),
                splits: SplitEvents::default(),
                collapses: CollapseEvents::default(),
                lock_wait_us: AtomicHist::new(),
                scanner_bell <- Bell::new(),
                reclaimer_bell <- Bell::new(),
                splitter_bell <- Bell::new(),
                swap <- SwapWork::new(),
                pressure <- Pressure::new(),
                policy <- new_mutex!(
                    Policy { share_scope: ShareScope::Domain, zero_only: false },
                    "thinram_policy"
                ),
                vms <- Vms::new(),
                registry <- Registry::new(),
                index <- SharedIndex::new(),
                shared_pools <- SharedPools::new(),
                shrinking <- shrinking,
                shared_anew: Request::new(),
                zero_frames,
                zero_folio: SetOnce::new(),
            }),
            GFP_KERNEL,
        )
    }

    /// How short of memory the host is.
    #[inline]
    pub(crate) fn state(&self) -> HostState {
        self.pressure.state()
    }

    /// Looks at the memory, and wakes the reclaimer when that changes anything.
    pub(crate) fn look_at_memory(&self) {
        if self.pressure.look() {
            self.reclaimer_bell.ring();
        }
    }

    /// The VMs.
    pub(crate) fn vms(&self) -> &Vms {
        &self.vms
    }

    /// All regions.
    pub(crate) fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The shared index.
    pub(crate) fn index(&self) -> &SharedIndex {
        &self.index
    }

    /// What may be merged with what, locked.
    pub(crate) fn policy(&self) -> Guard<'_, Policy, MutexBackend> {
        self.policy.lock()
    }

    /// The hash seed of a scope: contents of different scopes never look alike.
    pub(crate) fn seed(&self, scope: Scope) -> Seed {
        Seed::new(self.key, u64::from(scope.0))
    }

    /// A frame of zeroes for page `page`.
    pub(crate) fn zero_frame(&self, page: u64) -> PageRef<'_> {
        let index = usize::try_from(page).unwrap_or(0) % ZERO_FRAMES;
        // `new` made all of them.
        match self.zero_frames.get(index) {
            Some(frame) => frame.as_ref(),
            None => self.zero_frames[0].as_ref(),
        }
    }

    /// Frees what a slot owned.
    pub(crate) fn release(&self, content: Content) {
        match content {
            // A place in a swap file was given back by `RegionGuard::set`.
            Content::Empty
            | Content::Zero
            | Content::Huge(_)
            | Content::Filled(_)
            | Content::Swapped(_) => {}
            Content::Private(frame) => drop(frame),
            Content::Shared(sharer) => self.leave(sharer),
        }
    }

    /// Gives a sharer of a shared page back.
    pub(crate) fn leave(&self, sharer: Sharer) {
        if let Some(owned) = self.index.leave(sharer) {
            self.shared_pools.free(owned);
        }
    }

    /// What it takes to find a shared page that is in no memory.
    pub(crate) fn away(&self) -> Away<'_> {
        Away {
            pools: &self.shared_pools,
            work: &self.swap,
        }
    }

    /// The largest object that a compressed page is kept as.
    pub(crate) fn max_object_bytes(&self) -> usize {
        let percent = self
            .knobs
            .compress_max_object_percent
            .load(Ordering::Relaxed);
        usize::try_from(percent).unwrap_or(0).min(100) * PAGE_SIZE / 100
    }

    /// Rules for merging, of the moment.
    pub(crate) fn rules(&self) -> Rules {
        let max = self.knobs.max_page_sharing.load(Ordering::Relaxed);
        let max = if protect::armed(Protection::Sharers) {
            u32::try_from(max).unwrap_or(u32::MAX)
        } else {
            u32::MAX
        };
        Rules {
            max_sharers: max,
            across_nodes: self.knobs.merge_across_nodes.load(Ordering::Relaxed) != 0
                || !protect::armed(Protection::Nodes),
        }
    }

    /// When empty regions become 2 MiB pages, for VMs that do not say it themselves.
    pub(crate) fn large_pages(&self) -> LargePages {
        let index = self.large_pages.load(Ordering::Relaxed);
        LargePages::from_index(index.into()).unwrap_or_default()
    }

    /// Sets [`Host::large_pages`].
    pub(crate) fn set_large_pages(&self, value: LargePages) {
        self.large_pages
            .store(value.index() as u8, Ordering::Relaxed);
    }

    /// Pages that were kept apart may be merged now.
    pub(crate) fn merge_rules_changed(&self) {
        self.index().expect_doubles();
        self.scanner_bell.ring();
    }

    /// What the scanner is told to do.
    pub(crate) fn run_mode(&self) -> RunMode {
        RunMode::from_index(self.run.load(Ordering::Relaxed).into()).unwrap_or_default()
    }

    /// `run`: 2 breaks all shares before it returns; killed meanwhile, the old value stays.
    pub(crate) fn set_run_mode(&self, mode: RunMode) -> Result {
        match mode {
            RunMode::Run => self.run.store(1, Ordering::Relaxed),
            RunMode::Stop => self.stop_scanning(0),
            RunMode::Unshare => {
                let before = self.run.load(Ordering::Relaxed);
                self.stop_scanning(2);
                if let Err(error) = regroup::apply(self, &Change::Unshare) {
                    self.run.store(before, Ordering::Relaxed);
                    self.scanner_bell.ring();
                    return Err(error);
                }
            }
        }
        self.scanner_bell.ring();
        Ok(())
    }

    /// Stores the mode and waits for the scanner's current step to end.
    fn stop_scanning(&self, mode: u8) {
        self.run.store(mode, Ordering::Relaxed);
        drop(self.policy());
    }

    /// A live change of who shares with whom.
    pub(crate) fn regroup(&self, change: &Change<'_>) -> Result {
        regroup::apply(self, change)?;
        self.scanner_bell.ring();
        Ok(())
    }

    /// Makes a file's VM, or adds a file to it.
    pub(crate) fn attach(
        &self,
        place: &Mutex<Option<Arc<Vm>>>,
        name: &[u8],
        domain: Option<&[u8]>,
        defaults: VmDefaults,
        make_directory: MakeDirectory<'_>,
    ) -> Result<Arc<Vm>> {
        loop {
            // The policy stays locked until the VM is listed, so that its scope cannot be stale.
            let policy = self.policy();
            let scope = policy.share_scope;
            let made = self
                .vms
                .attach(place, name, domain, &defaults, scope, make_directory)?;
            drop(policy);
            match made {
                Some(vm) => {
                    self.scanner_bell.ring();
                    return Ok(vm);
                }
                None => self.vms.wait_for_an_end(place)?,
            }
        }
    }

    /// Pages that a pass walks over: all slots of all regions, touched or not.
    pub(crate) fn walked_pages(&self) -> u64 {
        self.registry.live().saturating_mul(SLOTS as u64)
    }

    /// Different contents that the index may have to hold.
    pub(crate) fn contents(&self) -> u64 {
        let totals = self.totals();
        totals
            .private
            .saturating_add(totals.huge)
            .saturating_add(self.index.figures().pages_shared)
    }

    /// All VMs' counts.
    pub(crate) fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        self.vms.for_each(|vm| {
            let counts = vm.snapshot();
            let pages = |class| counts.pages.get(class);
            totals.zero = totals.zero.saturating_add(pages(Class::Zero));
            totals.private = totals.private.saturating_add(pages(Class::Private));
            totals.shared = totals.shared.saturating_add(pages(Class::Shared));
            totals.unshared = totals.unshared.saturating_add(counts.unshared);
            totals.volatile = totals.volatile.saturating_add(counts.volatile);
            totals.huge = totals.huge.saturating_add(pages(Class::Huge));
            totals.splittable = totals.splittable.saturating_add(counts.splittable);
        });
        totals
    }

    /// Memory that ThinRAM takes for itself.
    pub(crate) fn metadata_bytes(&self) -> u64 {
        let folio = self.zero_folio.as_ref().map_or(0, |_| HugeFrame::BYTES);
        let reserve = self.splits.reserve.load(Ordering::Relaxed);
        let frames = (ZERO_FRAMES * 4096 + folio) as u64 + reserve.saturating_mul(4096);
        self.registry
            .bytes()
            .saturating_add(self.index.figures().bytes)
            .saturating_add(self.vms.bytes())
            .saturating_add(self.shared_pools.bytes())
            .saturating_add(frames)
    }

    /// Figures of the index.
    pub(crate) fn figures(&self) -> IndexFigures {
        self.index.figures()
    }
}
