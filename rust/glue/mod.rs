// SPDX-License-Identifier: GPL-2.0

//! Trampolines of a few lines: what the kernel calls, handed to the engine. With `sys` the only home
//! of `unsafe`.

pub(crate) mod debug;
pub(crate) mod file;
pub(crate) mod fs;
pub(crate) mod mount;
pub(crate) mod node;
pub(crate) mod shrinker;
pub(crate) mod sysfs;
pub(crate) mod vm_ops;

use crate::logic::tunables::{Shown, Takes};
use kernel::{error::Error, ffi::c_int};

/// The kernel crate's `fmt!` and `pr_*!` take its own trait.
macro_rules! show_as_in_core {
    ($($type:ty),*) => {
        $(impl kernel::fmt::Display for $type {
            fn fmt(&self, out: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
                core::fmt::Display::fmt(self, out)
            }
        })*
    };
}
show_as_in_core!(Shown<'_>, Takes<'_>);

/// A result as the kernel's C wants it.
fn errno<T>(result: Result<T, Error>) -> c_int {
    match result {
        Ok(_) => 0,
        Err(error) => error.to_errno(),
    }
}

/// A length or a negative errno.
fn length(result: Result<usize, Error>) -> isize {
    match result {
        Ok(length) => isize::try_from(length).unwrap_or(isize::MAX),
        Err(error) => error.to_errno() as isize,
    }
}

/// Makes the host known to all of `glue` and shows it in sysfs. Called once, by the module's init.
pub(crate) fn start(host: &kernel::sync::Arc<crate::engine::host::Host>) -> Result<(), Error> {
    // SAFETY: The module's init runs once, before the kernel can call anything else of ours.
    unsafe {
        mount::set_host(host.clone());
        sysfs::make_tree(host)
    }
    .inspect_err(|_| mount::forget_host())
}
