// SPDX-License-Identifier: GPL-2.0

//! The content hash (`logic::hash`) over a whole page, with a seed. It is never trusted: pages are
//! compared before they are merged.

use super::{
    bindings,
    page::{Lines, PageRef},
    protect::{self, Protection},
};
use crate::logic::hash::{mix, PageHash};

/// A seed for one sharing scope, made from the key of this load of the module.
#[derive(Clone, Copy)]
pub(crate) struct Seed(PageHash);

impl Seed {
    /// Mixes `scope` into `key`.
    pub(crate) fn new(key: u64, scope: u64) -> Seed {
        let mixed = mix(key ^ scope.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        Seed(PageHash::new(mixed))
    }
}

/// Cache lines that a weakened hash looks at.
const WEAK_LINES: usize = 1;

/// Hashes the page as it is now; a mapped page may change meanwhile, then the hash is of no content
/// that ever was.
pub(crate) fn of_page(page: PageRef<'_>, seed: Seed) -> u64 {
    of_page_before(page, seed, None)
}

/// The same for one whose turn is before that of `next`. That one's bytes are asked for meanwhile, for
/// to wait for them takes longer than to hash them.
#[inline]
pub(crate) fn of_page_before(page: PageRef<'_>, seed: Seed, next: Option<PageRef<'_>>) -> u64 {
    let lines = if protect::armed(Protection::WholeHash) {
        Lines::IN_PAGE
    } else {
        WEAK_LINES
    };
    let (words, next) = (page.words(), next.unwrap_or(page).lines());
    let mut hash = seed.0;
    for line in 0..lines {
        next.ask(line);
        hash.add(words.line(line));
    }
    hash.finish()
}

/// A random key, drawn once at load.
pub(crate) fn random_key() -> u64 {
    // SAFETY: No precondition.
    unsafe { bindings::get_random_u64() }
}
