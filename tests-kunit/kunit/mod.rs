// SPDX-License-Identifier: GPL-2.0

//! KUnit suites: what only a kernel can show, on real pages. Compiled only where KUnit is built in
//! (User-Mode Linux in `make test`). The pure logic has its tests in the host crate; here is what of it
//! the kernel's build could make another thing of: overflow checks, its own `core`, words that several
//! look at.
//!
//! A failed assertion skips destructors, so a failing run may leak.

mod crypt;
mod engine;
mod frames;
mod index;
mod logic;
mod packed;
mod slots;
mod volume;
