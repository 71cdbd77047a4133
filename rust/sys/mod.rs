// SPDX-License-Identifier: GPL-2.0

//! Thin safe faces of what the kernel offers: the only home of bindings, and with `glue` the only
//! home of `unsafe`. Nothing here decides anything.

pub(crate) mod alloc;
pub(crate) mod bindings;
pub(crate) mod cgroup;
pub(crate) mod clock;
pub(crate) mod crypt;
pub(crate) mod fault;
pub(crate) mod frames;
pub(crate) mod hash;
pub(crate) mod huge;
pub(crate) mod inject;
pub(crate) mod kobj;
pub(crate) mod live;
pub(crate) mod mapping;
pub(crate) mod memory;
pub(crate) mod packed;
pub(crate) mod page;
pub(crate) mod protect;
pub(crate) mod report;
pub(crate) mod shrinker;
pub(crate) mod slots;
pub(crate) mod swapio;
pub(crate) mod table;
pub(crate) mod task;
pub(crate) mod watching;
#[cfg(thinram_debug)]
pub(crate) mod wrong;
pub(crate) mod zs;
