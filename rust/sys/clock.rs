// SPDX-License-Identifier: GPL-2.0

//! Time: the monotonic clock and the CPU time of the running thread.

use super::bindings;

/// Microseconds of the monotonic clock.
#[inline]
pub(crate) fn now_us() -> u64 {
    // SAFETY: Reading the clock has no precondition once the kernel is up.
    let ns = unsafe { bindings::ktime_get() };
    u64::try_from(ns).unwrap_or(0) / 1000
}

/// CPU time that the current thread has used, in microseconds, as of the last scheduler tick.
#[inline]
pub(crate) fn thread_cpu_us() -> u64 {
    // SAFETY: Reads a counter of the current task.
    unsafe { bindings::thinram_thread_cpu_ns() / 1000 }
}
