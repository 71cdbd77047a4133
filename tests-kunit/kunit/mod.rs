// SPDX-License-Identifier: GPL-2.0

//! KUnit suites: what only a kernel can show, on real pages. Compiled only where KUnit is built in
//! (User-Mode Linux in `make test`); the pure logic has its tests in the host crate.
//!
//! A failed assertion skips destructors, so a failing run may leak.

mod crypt;
mod frames;
mod index;
mod packed;
mod slots;
