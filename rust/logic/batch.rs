// SPDX-License-Identifier: GPL-2.0

//! A few things that are dealt with together, in the order in which they came.

/// Up to `N` things.
pub struct Batch<T, const N: usize> {
    things: [Option<T>; N],
    len: usize,
}

impl<T: Copy, const N: usize> Default for Batch<T, N> {
    fn default() -> Self {
        Batch {
            things: [None; N],
            len: 0,
        }
    }
}

impl<T: Copy, const N: usize> Batch<T, N> {
    /// Whether no more fit.
    pub fn is_full(&self) -> bool {
        self.len >= N
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds one; false, and it is not added, when no more fit.
    #[must_use]
    pub fn push(&mut self, thing: T) -> bool {
        let Some(place) = self.things.get_mut(self.len) else {
            return false;
        };
        *place = Some(thing);
        self.len += 1;
        true
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = T> + Clone + '_ {
        self.things.iter().map_while(|thing| *thing)
    }
}

/// How many of the ascending `places` follow each other without a gap, from the first on.
pub fn run_length(places: impl Iterator<Item = usize>) -> usize {
    let mut first = None;
    places
        .enumerate()
        .take_while(|&(n, place)| place.checked_sub(*first.get_or_insert(place)) == Some(n))
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_fit() {
        let mut batch = Batch::<u8, 2>::default();
        assert!(batch.is_empty() && !batch.is_full());
        assert!(batch.push(1) && !batch.is_full());
        assert!(batch.push(2) && batch.is_full());
        assert!(!batch.push(3));
        assert_eq!(batch.iter().collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn runs_end_at_the_first_gap() {
        let length = |places: &[usize]| run_length(places.iter().copied());
        assert_eq!(length(&[]), 0);
        assert_eq!(length(&[7]), 1);
        assert_eq!(length(&[7, 8, 9, 11, 12]), 3);
        assert_eq!(length(&[7, 9, 10]), 1);
        assert_eq!(length(&[usize::MAX, 0]), 1);
    }
}
