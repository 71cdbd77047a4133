// SPDX-License-Identifier: GPL-2.0

//! The working set of a VM, by sampling (Waldspurger, OSDI 2002): a few pages drawn at random are
//! taken out of the page tables, and those that are touched again within a period are counted.

/// Pages of one region under watch at a time.
pub const LANES: usize = 4;
/// A lane without a page.
const NONE: u16 = u16::MAX;

/// The pages of a region under watch, in one word: four numbers of 16 bits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Watch(u64);

impl Watch {
    /// No page.
    pub const NONE: Watch = Watch(u64::MAX);

    /// From the word as it is stored.
    #[inline]
    pub const fn from_word(word: u64) -> Watch {
        Watch(word)
    }

    /// The word to store.
    #[inline]
    pub const fn word(self) -> u64 {
        self.0
    }

    #[inline]
    const fn lane(self, lane: usize) -> u16 {
        (self.0 >> (16 * lane)) as u16
    }

    const fn with_lane(self, lane: usize, page: u16) -> Watch {
        let shift = 16 * lane;
        Watch(self.0 & !(0xffff << shift) | ((page as u64) << shift))
    }

    /// Also watches page `index`, if there is a lane for it and it is not watched yet.
    pub fn watch(self, index: usize) -> Option<Watch> {
        let page = u16::try_from(index).ok().filter(|&page| page != NONE)?;
        if (0..LANES).any(|lane| self.lane(lane) == page) {
            return None;
        }
        let free = (0..LANES).find(|&lane| self.lane(lane) == NONE)?;
        Some(self.with_lane(free, page))
    }

    /// The rest when page `index` is touched; `None` if it is not under watch.
    #[inline]
    pub fn touched(self, index: usize) -> Option<Watch> {
        if self.0 == Self::NONE.0 {
            return None;
        }
        let lane = (0..LANES).find(|&lane| usize::from(self.lane(lane)) == index)?;
        Some(self.with_lane(lane, NONE))
    }

    /// Pages under watch.
    pub fn len(self) -> usize {
        (0..LANES).filter(|&lane| self.lane(lane) != NONE).count()
    }

    /// Whether no page is.
    pub fn is_empty(self) -> bool {
        self == Self::NONE
    }
}

/// How many of `wanted` samples the region takes that is number `rank` of `regions`, so that they
/// are spread evenly over all; at most [`LANES`].
pub fn samples_in(rank: u64, regions: u64, wanted: u64) -> usize {
    let up_to = |rank: u64| {
        (rank / regions.max(1))
            .saturating_mul(wanted)
            .saturating_add((rank % regions.max(1)).saturating_mul(wanted) / regions.max(1))
    };
    let mine = up_to(rank.saturating_add(1)).saturating_sub(up_to(rank));
    usize::try_from(mine).unwrap_or(LANES).min(LANES)
}

/// What became of the samples of a period.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Outcome {
    /// Pages that were watched.
    pub watched: u64,
    /// Those that were touched.
    pub touched: u64,
}

impl Outcome {
    /// Of `pages`, as many as were touched by this outcome; `None` without samples.
    pub fn active(self, pages: u64) -> Option<u64> {
        let touched = self.touched.min(self.watched);
        (pages / self.watched.max(1))
            .saturating_mul(touched)
            .checked_add(
                (pages % self.watched.max(1)).saturating_mul(touched) / self.watched.max(1),
            )
            .filter(|_| self.watched > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lanes_fill_and_empty() {
        let mut watch = Watch::NONE;
        assert!(watch.is_empty());
        for page in [0, 511, 7, 100] {
            watch = watch.watch(page).unwrap();
            assert_eq!(watch.watch(page), None);
        }
        assert_eq!((watch.len(), watch.watch(8)), (4, None));
        assert_eq!(watch.touched(8), None);
        let watch = watch.touched(0).unwrap();
        assert_eq!((watch.len(), watch.touched(0)), (3, None));
        let rest = [511, 7, 100]
            .into_iter()
            .fold(watch, |w, p| w.touched(p).unwrap());
        assert!(rest.is_empty());
        assert_eq!(Watch::from_word(watch.word()), watch);
        assert_eq!(Watch::NONE.touched(usize::from(u16::MAX)), None);
        assert_eq!(Watch::NONE.watch(usize::from(u16::MAX)), None);
    }

    #[test]
    fn estimates() {
        let outcome = |touched, watched| Outcome { watched, touched };
        assert_eq!(outcome(25, 100).active(4000), Some(1000));
        assert_eq!(outcome(0, 100).active(4000), Some(0));
        assert_eq!(outcome(100, 100).active(4001), Some(4001));
        assert_eq!(outcome(0, 0).active(4000), None);
        assert_eq!(outcome(9, 3).active(u64::MAX), Some(u64::MAX));
    }

    proptest! {
        #[test]
        fn samples_add_up(regions in 1u64..3000, wanted in 0u64..3000) {
            let all: usize = (0..regions).map(|rank| samples_in(rank, regions, wanted)).sum();
            let most = regions * LANES as u64;
            prop_assert!(all as u64 <= wanted.min(most));
            if wanted <= regions * (LANES as u64 - 1) {
                prop_assert_eq!(all as u64, wanted);
            }
        }

        #[test]
        fn no_more_is_active_than_there_is(pages: u64, watched: u64, touched: u64) {
            let outcome = Outcome { watched, touched };
            prop_assert!(outcome.active(pages).unwrap_or(0) <= pages);
        }
    }
}
