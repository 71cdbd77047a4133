// SPDX-License-Identifier: GPL-2.0

//! What ThinRAM does with the pages of its guests. No `unsafe` here.
//!
//! ```text
//! host -> { scan, reclaim, regroup, pressure } -> { merge, compress, cold } -> { shared, region }
//! fault, data -> { region, shared, compress, cold, stall }
//! ```
//!
//! A page's way: `fault` fills a slot of a `region`, `scan` hashes it, `shared` knows whether the
//! content was met before, `merge` puts one frame under several slots, and a write in `fault` gives
//! the writer a frame of its own again. `data` is the same for read(2), write(2) and fallocate(2).

pub(crate) mod backing;
pub(crate) mod caps;
pub(crate) mod cold;
pub(crate) mod collapse;
pub(crate) mod compress;
pub(crate) mod data;
pub(crate) mod fault;
pub(crate) mod host;
pub(crate) mod huge;
pub(crate) mod merge;
pub(crate) mod pools;
pub(crate) mod pressure;
pub(crate) mod reclaim;
pub(crate) mod region;
pub(crate) mod regroup;
pub(crate) mod sample;
pub(crate) mod scan;
pub(crate) mod shared;
pub(crate) mod shrink;
pub(crate) mod split;
pub(crate) mod stall;
pub(crate) mod survey;
pub(crate) mod swap;
pub(crate) mod swapper;
pub(crate) mod vm;
pub(crate) mod volume;

use core::sync::atomic::{AtomicU64, Ordering};

/// One more of what a counter counts; nobody orders anything by it.
fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
