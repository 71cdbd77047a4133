// SPDX-License-Identifier: GPL-2.0

//! The content hash: the kernel's xxh64 over a whole page, with a seed. It is never trusted: pages
//! are compared before they are merged.

use super::{
    bindings,
    page::PageRef,
    protect::{self, Protection},
};
use kernel::page::PAGE_SIZE;

/// A seed for one sharing scope, made from the key of this load of the module.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) struct Seed(u64);

impl Seed {
    /// Mixes `scope` into `key` (a round of splitmix64).
    pub(crate) fn new(key: u64, scope: u64) -> Seed {
        let mut x = key ^ scope.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Seed(x ^ (x >> 31))
    }
}

/// Bytes that a weakened hash looks at.
const WEAK_BYTES: usize = 64;

/// Hashes the page as it is now; a mapped page may change meanwhile, then the hash is of no content
/// that ever was.
#[inline]
pub(crate) fn of_page(page: PageRef<'_>, seed: Seed) -> u64 {
    let bytes = if protect::armed(Protection::WholeHash) {
        PAGE_SIZE
    } else {
        WEAK_BYTES
    };
    // SAFETY: A PageRef's page is in the direct map and PAGE_SIZE long as long as the PageRef lives.
    unsafe { bindings::xxh64(page.address().cast(), bytes, seed.0) }
}

/// A random key, drawn once at load.
pub(crate) fn random_key() -> u64 {
    // SAFETY: No precondition.
    unsafe { bindings::get_random_u64() }
}
