// SPDX-License-Identifier: GPL-2.0

//! What `thinramctl` is made of.
//!
//! Reading and writing ([`sysfs`], [`host`], [`vm`]) is kept apart from what is shown ([`table`],
//! [`status`]), so that every screen is a pure function of a snapshot and a width.

pub mod admission;
pub mod agent;
pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
pub mod estimate;
mod figures;
mod files;
pub mod guests;
pub mod host;
pub mod knobs;
pub mod metrics;
pub mod overview;
pub mod plan;
pub mod policy;
pub mod qmp;
pub mod rates;
pub mod runtime;
pub mod snapshot;
pub mod status;
pub mod sysfs;
pub mod table;
pub mod text;
pub mod top;
pub mod trace;
pub mod units;
pub mod virsh;
pub mod vm;
