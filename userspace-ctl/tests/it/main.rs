// SPDX-License-Identifier: GPL-2.0

//! Tests of the program and of what needs files: one binary, so that it links once.

mod cli;
mod daemon;
mod estimate;
mod plan;
mod qemu;
mod race;
mod told;
mod tree;
mod ways;
mod world;
