// SPDX-License-Identifier: GPL-2.0

//! Who pays for a guest's memory where no process of the guest allocates it: the memory cgroup of
//! the process that mapped it, for the scanner and for other kernel threads.

use super::bindings;
use core::ptr::NonNull;

/// A memory cgroup, held.
pub(crate) struct Payer(NonNull<bindings::mem_cgroup>);

// SAFETY: A held cgroup belongs to no task.
unsafe impl Send for Payer {}
// SAFETY: `&Payer` only lends the pointer to the allocator, which takes its own locks.
unsafe impl Sync for Payer {}

impl Payer {
    /// The running process's cgroup; `None` where the kernel has none, and in kernel threads.
    pub(crate) fn of_current() -> Option<Payer> {
        // SAFETY: Looks at the current task, and takes a reference.
        NonNull::new(unsafe { bindings::thinram_memcg_of_current() }).map(Payer)
    }

    /// Runs `f`, whose charged allocations are at the expense of `payer`; without one, of the
    /// running task's own cgroup.
    pub(crate) fn pays<R>(payer: Option<&Payer>, f: impl FnOnce() -> R) -> R {
        let Some(payer) = payer else {
            return f();
        };
        // SAFETY: The cgroup is held while it is the active one, and what was is put back.
        let before = unsafe { bindings::thinram_memcg_charge_to(payer.0.as_ptr()) };
        let result = f();
        // SAFETY: As above.
        unsafe { bindings::thinram_memcg_charge_to(before) };
        result
    }
}

impl Drop for Payer {
    fn drop(&mut self) {
        // SAFETY: We hold one reference.
        unsafe { bindings::thinram_memcg_put(self.0.as_ptr()) }
    }
}
