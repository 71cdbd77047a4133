// SPDX-License-Identifier: GPL-2.0

//! The two means by which a page is seen to be touched, to be measured against each other
//! (docs/measurements.md). *Zapping* takes it out of every page table: a touch is a fault. *Cleaning*
//! takes it out of KVM's alone and clears its dirty bits and its referenced bit: a touch sets one of
//! them, and costs no fault of ours. The module zaps; a debug build (`THINRAM_DEBUG=y`) has a switch.

/// The name of the switch in debugfs.
#[cfg(thinram_debug)]
pub(crate) const NAME: &kernel::str::CStr = c"sample_by_cleaning";

/// Whether the pages of the next period are cleaned.
#[cfg(not(thinram_debug))]
#[inline(always)]
pub(crate) const fn by_cleaning() -> bool {
    false
}

#[cfg(thinram_debug)]
pub(crate) use switched::{by_cleaning, switch};

#[cfg(thinram_debug)]
mod switched {
    use core::sync::atomic::{AtomicBool, Ordering};

    static CLEANING: AtomicBool = AtomicBool::new(false);

    /// The switch.
    pub(crate) fn switch() -> &'static AtomicBool {
        &CLEANING
    }

    /// Whether the pages of the next period are cleaned.
    pub(crate) fn by_cleaning() -> bool {
        CLEANING.load(Ordering::Relaxed)
    }
}
