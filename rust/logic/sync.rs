// SPDX-License-Identifier: GPL-2.0

//! The atomics of this floor: the language's own, or loom's where every order in which threads can
//! come by them is tried out (`--cfg loom`).

#[cfg(not(loom))]
pub(super) use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
#[cfg(loom)]
pub(super) use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
