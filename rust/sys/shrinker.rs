// SPDX-License-Identifier: GPL-2.0

//! A cache that the kernel's own reclaim counts on.

use super::{
    bindings,
    inject::{self, Point},
};
use core::ptr::NonNull;
use kernel::{ffi::c_void, prelude::*};

/// Tells the reclaim that the running task is in, if any, that `pages` pages came free: it does not
/// see these by itself, and reclaim that frees nothing ends with the OOM killer.
pub(crate) fn account(pages: u64) {
    let pages = usize::try_from(pages).unwrap_or(0);
    // SAFETY: Adds to a number of the current task.
    unsafe { bindings::thinram_account_reclaimed(pages) }
}

/// A registered shrinker. Dropping it waits until the kernel is in none of its callbacks.
pub(crate) struct Shrinker(NonNull<bindings::shrinker>);

// SAFETY: Registering and freeing are bound to no thread.
unsafe impl Send for Shrinker {}
// SAFETY: Nothing is done through `&Shrinker`.
unsafe impl Sync for Shrinker {}

impl Shrinker {
    /// Lets the kernel call `thinram_rs_shrinker_count` and `_scan` with `data` from here on.
    ///
    /// # Safety
    ///
    /// `data` is what those expect, and stays so until the value is dropped.
    pub(crate) unsafe fn register(data: *const c_void) -> Result<Shrinker> {
        if inject::fails(Point::Shrinker) {
            return Err(ENOMEM);
        }
        // SAFETY: By the caller's promise; allocates.
        let shrinker = unsafe { bindings::thinram_shrinker_register(data.cast_mut()) };
        NonNull::new(shrinker).map(Shrinker).ok_or(ENOMEM)
    }
}

impl Drop for Shrinker {
    fn drop(&mut self) {
        // SAFETY: Registered, and freed only here.
        unsafe { bindings::shrinker_free(self.0.as_ptr()) }
    }
}
