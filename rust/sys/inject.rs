// SPDX-License-Identifier: GPL-2.0

//! Allocations that fail when a test says so. Each place in `sys` that allocates asks [`fails`]
//! first; a debug build (`THINRAM_DEBUG=y`) counts down to the one that fails, any other build has
//! the constant `false`.

#[cfg(not(thinram_debug))]
#[inline(always)]
pub(crate) const fn fails() -> bool {
    false
}

#[cfg(thinram_debug)]
pub(crate) use counted::{fail_after, fails, left};

#[cfg(thinram_debug)]
mod counted {
    use core::sync::atomic::{AtomicU64, Ordering};

    /// Allocations until the one that fails, that one included; 0: none fails.
    static LEFT: AtomicU64 = AtomicU64::new(0);

    /// Lets the `nth` allocation from now on fail, and none after it; 0: none at all.
    pub(crate) fn fail_after(nth: u64) {
        LEFT.store(nth, Ordering::Relaxed);
    }

    /// How many it still is to the one that fails; 0 after it failed.
    pub(crate) fn left() -> u64 {
        LEFT.load(Ordering::Relaxed)
    }

    /// Whether this allocation is the one.
    pub(crate) fn fails() -> bool {
        let count_down = |left: u64| left.checked_sub(1);
        LEFT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, count_down) == Ok(1)
    }
}
