// SPDX-License-Identifier: GPL-2.0

//! How much memory the host has.

use super::bindings;

/// KiB of a page.
const PAGE_KB: u64 = kernel::page::PAGE_SIZE as u64 / 1024;

/// KiB that could be given out without swapping, as /proc/meminfo's MemAvailable.
pub(crate) fn available_kb() -> u64 {
    // SAFETY: Reads the kernel's counters.
    let pages = unsafe { bindings::si_mem_available() };
    u64::try_from(pages).unwrap_or(0).saturating_mul(PAGE_KB)
}

/// KiB of memory that the kernel manages.
pub(crate) fn total_kb() -> u64 {
    // SAFETY: As above.
    let pages = unsafe { bindings::thinram_total_pages() };
    (pages as u64).saturating_mul(PAGE_KB)
}
