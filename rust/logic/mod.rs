// SPDX-License-Identifier: GPL-2.0

//! What ThinRAM decides and counts: plain data and arithmetic, without locks, memory or I/O.
//!
//! The kernel module includes this file as one of its modules, and `lib.rs` makes a host crate of
//! it. Nothing here is unsafe, allocates, or panics.

// Each side uses its own part of this.
#![allow(dead_code)]

#[macro_use]
mod words;

pub mod batch;
pub mod bell;
pub mod catalog;
pub mod cell;
pub mod clusters;
pub mod counts;
pub mod funding;
pub mod hash;
pub mod hints;
pub mod hist;
pub mod huge;
pub mod object;
pub mod options;
pub mod pace;
pub mod records;
pub mod sample;
pub mod scope;
pub mod slot;
pub mod state;
mod sync;
pub mod tunables;

#[cfg(all(test, loom))]
mod loom_tests;
#[cfg(test)]
mod machine_tests;
#[cfg(test)]
mod slot_tests;
