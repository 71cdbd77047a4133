// SPDX-License-Identifier: GPL-2.0

//! Page contents made from numbers, so that a test knows every byte without keeping it.

use crate::sys::{PageBuf, WORDS};

/// A well-mixed 64-bit value (the finaliser of splitmix64): a word of one seed says nothing
/// about another's.
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Words that are alike in a row, so that a page compresses to about a third.
const ALIKE: usize = 4;

/// Word `index` of the page of `seed`.
pub fn word(seed: u64, index: usize) -> u64 {
    mix(mix(seed) ^ (index / ALIKE) as u64)
}

/// A page that does not compress.
pub fn noise(seed: u64) -> PageBuf {
    let mut out = [0; WORDS];
    for (index, value) in out.iter_mut().enumerate() {
        *value = mix(mix(!seed) ^ index as u64);
    }
    out
}

/// The page of `seed`; equal seeds give equal pages, and no page is all zero.
pub fn page(seed: u64) -> PageBuf {
    let mut out = [0; WORDS];
    for (index, value) in out.iter_mut().enumerate() {
        *value = word(seed, index);
    }
    out
}

/// The page of `seed` as bytes.
pub fn page_bytes(seed: u64) -> Vec<u8> {
    bytes_of(&page(seed))
}

/// A page as bytes.
pub fn bytes_of(page: &PageBuf) -> Vec<u8> {
    page.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// `pages` pages, page `i` made from seed `first + i`.
pub fn pages_bytes(first: u64, pages: usize) -> Vec<u8> {
    (0..pages as u64)
        .flat_map(|i| page_bytes(first + i))
        .collect()
}
