// SPDX-License-Identifier: GPL-2.0

//! The module's logic as a host crate, so that it can be tested where tests are cheap.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

#[path = "mod.rs"]
mod logic;

pub use logic::*;
