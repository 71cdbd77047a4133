// SPDX-License-Identifier: GPL-2.0

//! The working set of a VM, by sampling (Waldspurger, OSDI 2002): a few pages drawn at random are
//! taken out of the page tables, and those that are touched again within a period are counted.

/// Pages of one region under watch at a time.
pub const LANES: usize = 4;
/// A lane without a page.
const NONE: u16 = u16::MAX;
/// The bit of a lane that says that the page was the VM's own when the watch began.
const OWN: u16 = 1 << 15;

/// The pages of a region under watch, in one word: four numbers of 15 bits, and for each whether the
/// page was the VM's own.
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

    /// The lane that page `index` is in.
    #[inline]
    fn find(self, index: usize) -> Option<usize> {
        (0..LANES).find(|&lane| {
            let held = self.lane(lane);
            held != NONE && usize::from(held & !OWN) == index
        })
    }

    /// Also watches page `index`, which is the VM's `own` or not, if there is a lane for it and it is
    /// not watched yet.
    pub fn watch(self, index: usize, own: bool) -> Option<Watch> {
        let page = u16::try_from(index)
            .ok()
            .filter(|&page| page < NONE & !OWN)?;
        if self.find(index).is_some() {
            return None;
        }
        let free = (0..LANES).find(|&lane| self.lane(lane) == NONE)?;
        Some(self.with_lane(free, if own { page | OWN } else { page }))
    }

    /// The rest when page `index` is touched, and whether it was the VM's own; `None` if it is not
    /// under watch.
    #[inline]
    pub fn touched(self, index: usize) -> Option<(Watch, bool)> {
        if self.0 == Self::NONE.0 {
            return None;
        }
        let lane = self.find(index)?;
        Some((self.with_lane(lane, NONE), self.lane(lane) & OWN != 0))
    }

    /// The pages under watch, and whether each was the VM's own.
    pub fn pages(self) -> impl Iterator<Item = (usize, bool)> {
        (0..LANES)
            .map(move |lane| self.lane(lane))
            .filter(|&held| held != NONE)
            .map(|held| (usize::from(held & !OWN), held & OWN != 0))
    }

    /// Pages under watch.
    pub fn len(self) -> usize {
        self.pages().count()
    }

    /// Those of them that were the VM's own.
    pub fn own(self) -> usize {
        self.pages().filter(|&(_, own)| own).count()
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

    /// By how much [`Outcome::active`] of `pages` may be wrong: two standard deviations of drawing at
    /// random, `2 sqrt(t (n - t) / n) / n` of the pages. Nothing where all or none were touched.
    pub fn noise(self, pages: u64) -> u64 {
        let n = self.watched.clamp(1, 1 << 28);
        let touched = self.touched.min(n);
        // Eight times the root, for its fractions: 8 sqrt(n) at most.
        let root = (touched.saturating_mul(n - touched).saturating_mul(4 * 64) / n).isqrt();
        let eightfold = (pages / n)
            .saturating_mul(root)
            .saturating_add((pages % n).saturating_mul(root) / n);
        eightfold / 8
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
            watch = watch.watch(page, page > 50).unwrap();
            assert_eq!(watch.watch(page, false), None);
            assert_eq!(watch.watch(page, true), None);
        }
        assert_eq!((watch.len(), watch.own()), (4, 2));
        let pages = [(0, false), (511, true), (7, false), (100, true)];
        assert!(watch.pages().eq(pages));
        assert_eq!((watch.watch(8, true), watch.touched(8)), (None, None));
        let (watch, own) = watch.touched(0).unwrap();
        assert_eq!((watch.len(), own, watch.touched(0)), (3, false, None));
        let rest = [511, 7, 100].into_iter().fold(watch, |w, p| {
            let (rest, own) = w.touched(p).unwrap();
            assert_eq!(own, p > 50);
            rest
        });
        assert!(rest.is_empty());
        assert_eq!(rest.own(), 0);
        assert_eq!(Watch::from_word(watch.word()), watch);
        for odd in [u16::MAX, u16::MAX & !OWN] {
            assert_eq!(Watch::NONE.touched(odd.into()), None);
            assert_eq!(Watch::NONE.watch(odd.into(), true), None);
        }
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

    #[test]
    fn noise_is_two_deviations() {
        let noise = |touched, watched| Outcome { watched, touched }.noise(10_000);
        // A half of 100: 5 % is one deviation.
        assert_eq!(noise(50, 100), 1000);
        assert_eq!(noise(25, 100), 862);
        assert_eq!(noise(2500, 10_000), 86);
        assert_eq!((noise(0, 100), noise(100, 100), noise(0, 0)), (0, 0, 0));
        assert_eq!(noise(1, 2), 6875);
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
            prop_assert!(outcome.noise(pages) <= pages);
        }
    }
}
