// SPDX-License-Identifier: GPL-2.0

//! How short of memory the host is: `state`, what it is measured by, and who is told.
//!
//! Available memory is looked at by the reclaimer's thread, at least once a second and ten times
//! as often when it is short, and by those who take memory, once in a while.
//!
//! Lock order: one spinlock, a leaf.

use crate::{
    logic::state::{self, HostState, Tracker, STATES},
    sys::{clock, kobj::FileNotice, memory},
};
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicU8, Ordering};
use kernel::{new_spinlock, prelude::*, sync::SpinLock};

/// Below this percentage of minfree nobody gets memory before the reclaimer made progress.
const CRITICAL_PERCENT: u64 = 16;

struct Inner {
    tracker: Tracker,
    /// Who polls `state`.
    notice: Option<FileNotice>,
}

/// How short of memory the host is.
#[pin_data]
pub(crate) struct Pressure {
    /// The tracker's state, for those who look without the lock.
    state: AtomicU8,
    /// Whether so little is available that nobody gets any.
    critical: AtomicBool,
    /// `minfree_kb`, 0 = computed.
    minfree_kb: AtomicU64,
    #[pin]
    inner: SpinLock<Inner>,
}

impl Pressure {
    /// Plenty of memory, until the first look.
    pub(crate) fn new() -> impl PinInit<Pressure> {
        pin_init!(Pressure {
            state: AtomicU8::new(0),
            critical: AtomicBool::new(false),
            minfree_kb: AtomicU64::new(0),
            inner <- new_spinlock!(
                Inner { tracker: Tracker::new(clock::now_us()), notice: None },
                "thinram_pressure"
            ),
        })
    }

    /// The state of the last look.
    #[inline]
    pub(crate) fn state(&self) -> HostState {
        HostState::from_index(self.state.load(Ordering::Relaxed).into()).unwrap_or_default()
    }

    /// Looks at the memory; true if the state changed. May be called with any lock held.
    pub(crate) fn look(&self) -> bool {
        let (available_kb, minfree_kb) = (memory::available_kb(), self.effective_minfree_kb());
        let critical = available_kb < minfree_kb / 100 * CRITICAL_PERCENT;
        self.critical.store(critical, Ordering::Relaxed);
        self.change(|tracker, now_us| tracker.observe(now_us, available_kb, minfree_kb))
    }

    /// Whether so little is available that everybody has to wait.
    #[inline]
    pub(crate) fn is_critical(&self) -> bool {
        self.critical.load(Ordering::Relaxed)
    }

    /// KiB that the reclaimer should free for the host: until what Hard is left at is available, or
    /// everything while that state is forced.
    pub(crate) fn wanted_kb(&self) -> u64 {
        if self.state() < HostState::Hard {
            return 0;
        }
        if self.is_forced() {
            return u64::MAX;
        }
        HostState::Hard
            .leave_kb(self.effective_minfree_kb())
            .saturating_sub(memory::available_kb())
    }

    /// Holds the state, or lets it follow the memory again. True if it changed.
    pub(crate) fn force(&self, state: Option<HostState>) -> bool {
        let before = self.state();
        self.change(|tracker, now_us| tracker.force(now_us, state));
        if state.is_none() {
            self.look();
        }
        before != self.state()
    }

    /// Whether the state is held.
    pub(crate) fn is_forced(&self) -> bool {
        self.inner.lock().tracker.is_forced()
    }

    fn change(&self, f: impl FnOnce(&mut Tracker, u64) -> bool) -> bool {
        let mut inner = self.inner.lock();
        let changed = f(&mut inner.tracker, clock::now_us());
        if changed {
            let state = inner.tracker.state().index() as u8;
            self.state.store(state, Ordering::Relaxed);
            if let Some(notice) = &inner.notice {
                notice.changed();
            }
        }
        changed
    }

    /// Tells `notice` of every change from here on.
    pub(crate) fn tell(&self, notice: FileNotice) {
        self.inner.lock().notice = Some(notice);
    }

    /// `minfree_kb` as it was set, 0 = computed.
    pub(crate) fn minfree_kb(&self) -> u64 {
        self.minfree_kb.load(Ordering::Relaxed)
    }

    /// Sets `minfree_kb`; the state follows at once. True if it changed.
    pub(crate) fn set_minfree_kb(&self, kb: u64) -> bool {
        self.minfree_kb.store(kb, Ordering::Relaxed);
        self.look()
    }

    /// The KiB that the states are measured by.
    pub(crate) fn effective_minfree_kb(&self) -> u64 {
        match self.minfree_kb() {
            0 => state::minfree_kb(memory::total_kb()),
            kb => kb,
        }
    }

    /// Milliseconds in each state, in the order of [`HostState::ALL`].
    pub(crate) fn spent_ms(&self) -> [u64; STATES] {
        let tracker = self.inner.lock().tracker;
        tracker.spent_us(clock::now_us()).map(|us| us / 1000)
    }

    /// Microseconds until the next look is due.
    pub(crate) fn next_look_us(&self) -> u64 {
        let tracker = self.inner.lock().tracker;
        tracker.next_look_us(memory::available_kb(), self.effective_minfree_kb())
    }
}
