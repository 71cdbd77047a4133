// SPDX-License-Identifier: GPL-2.0

//! The hash of a page's content: 64 bits under a key. It is never trusted: pages are compared before
//! they are merged.
//!
//! Four lanes take two words each at every step. One word is mixed with the lane's key, the other with
//! what the lane came to before; their product of 128 bits is folded to 64, as wyhash (Wang Yi, 2019)
//! does. One multiplication takes in 16 bytes, where xxh64 needs two for eight, and there are no
//! vector registers in the kernel that could do it faster. Without the key nobody can choose words that
//! make a factor zero, which would lose what the lane had.

/// Words of a step: a cache line.
pub const STEP: usize = 8;

const LANES: usize = STEP / 2;

/// A hash under way.
#[derive(Clone, Copy)]
pub struct PageHash {
    lanes: [u64; LANES],
    keys: [u64; LANES],
}

impl PageHash {
    /// Of nothing yet, under a key.
    #[inline]
    pub fn new(key: u64) -> PageHash {
        let draw = |nth: usize| {
            let step = (nth as u64).wrapping_add(1);
            mix(key.wrapping_add(step.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
        };
        PageHash {
            // Not the keys: words that change places must not be the same product.
            lanes: core::array::from_fn(|lane| draw(lane.wrapping_add(LANES))),
            keys: core::array::from_fn(draw),
        }
    }

    /// Takes in the next words.
    #[inline(always)]
    pub fn add(&mut self, words: [u64; STEP]) {
        let pairs = words.chunks_exact(2).zip(self.keys);
        for (lane, (pair, key)) in self.lanes.iter_mut().zip(pairs) {
            if let [first, second] = *pair {
                *lane = fold(first ^ key, second ^ *lane);
            }
        }
    }

    /// The hash.
    #[inline]
    pub fn finish(self) -> u64 {
        let rest = self.lanes.iter().zip(self.keys);
        mix(rest.fold(0, |hash: u64, (&lane, key)| {
            mix(hash ^ lane).wrapping_add(key)
        }))
    }
}

/// The product's halves, one over the other.
#[inline(always)]
const fn fold(a: u64, b: u64) -> u64 {
    let product = (a as u128).wrapping_mul(b as u128);
    product as u64 ^ (product >> u64::BITS) as u64
}

/// Each bit out depends on each bit in (splitmix64).
#[inline]
pub const fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    const WORDS: usize = 512;

    fn hash(page: &[u64; WORDS], key: u64) -> u64 {
        let mut hash = PageHash::new(key);
        for step in page.chunks_exact(STEP) {
            hash.add(step.try_into().unwrap());
        }
        hash.finish()
    }

    fn page(seed: u64) -> [u64; WORDS] {
        std::array::from_fn(|i| mix(seed.wrapping_add(mix(i as u64))))
    }

    #[test]
    fn one_bit_changes_half_of_the_hash() {
        let (mut flipped, mut least) = (0, u32::MAX);
        let mut of_bit = [0u32; 64];
        let page = page(1);
        let before = hash(&page, 7);
        for bit in 0..WORDS * 64 {
            let mut other = page;
            other[bit / 64] ^= 1 << (bit % 64);
            let changed = hash(&other, 7) ^ before;
            flipped += changed.count_ones();
            least = least.min(changed.count_ones());
            for (at, count) in of_bit.iter_mut().enumerate() {
                *count += (changed >> at) as u32 & 1;
            }
        }
        let total = (WORDS * 64) as u32;
        assert!((31 * total..33 * total).contains(&flipped), "{flipped}");
        // 64 coins that fall 32768 times are all on one side for 56 less than once in a million runs.
        assert!(least >= 8, "{least}");
        for (at, count) in of_bit.into_iter().enumerate() {
            assert!(
                (total * 47 / 100..total * 53 / 100).contains(&count),
                "{at}"
            );
        }
    }

    #[test]
    fn pages_that_are_much_alike_spread_over_all_tags() {
        // One word counts up in pages of zeroes, at each place: 65536 hashes in 65536 tags.
        for shift in [0, 16, 48] {
            let mut tags = HashSet::new();
            for n in 0..65_536u64 {
                let mut page = [0; WORDS];
                page[(n % 512) as usize] = n / 512 + 1;
                tags.insert((hash(&page, 3) >> shift) as u16);
            }
            // Of so many draws 63 % are met, give or take 0.2 %.
            assert!((40_700..42_200).contains(&tags.len()), "{}", tags.len());
        }
    }

    #[test]
    fn no_two_of_many_simple_pages_collide() {
        let mut seen = HashSet::new();
        for byte in 0..=255u64 {
            let word = byte.wrapping_mul(0x0101_0101_0101_0101);
            assert!(seen.insert(hash(&[word; WORDS], 1)));
        }
        for (i, value) in (0..WORDS).flat_map(|i| [1, u64::MAX, 1 << 63].map(|v| (i, v))) {
            let mut page = [0; WORDS];
            page[i] = value;
            assert!(seen.insert(hash(&page, 1)), "{value:x} at {i}");
        }
    }

    #[test]
    fn it_stays_what_it_is() {
        assert_eq!(hash(&[0; WORDS], 0), hash(&[0; WORDS], 0));
        assert_ne!(hash(&[0; WORDS], 0), hash(&[0; WORDS], 1));
    }

    proptest! {
        #[test]
        fn order_and_key_count(seed in any::<u64>(), key in any::<u64>(), a in 0..WORDS, b in 0..WORDS) {
            let page = page(seed);
            let mut swapped = page;
            swapped.swap(a, b);
            prop_assert_eq!(hash(&page, key) == hash(&swapped, key), page == swapped);
            prop_assert_ne!(hash(&page, key), hash(&page, key.wrapping_add(1)));
        }
    }
}
