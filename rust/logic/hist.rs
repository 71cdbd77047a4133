// SPDX-License-Identifier: GPL-2.0

//! Histograms of times in microseconds, with a bucket for each power of two.
//!
//! Bucket 0 holds 0 us, bucket `b` holds 2^(b-1) to 2^b - 1 us, the last one all from 4.2 s on.

use super::sync::{AtomicU64, Ordering::Relaxed};

/// Number of buckets.
pub const BUCKETS: usize = 24;

/// The bucket of a time.
#[inline]
const fn bucket_of(us: u64) -> usize {
    let bits = (u64::BITS - us.leading_zeros()) as usize;
    if bits < BUCKETS {
        bits
    } else {
        BUCKETS - 1
    }
}

/// Least and largest time of a bucket, in microseconds; the last has no upper bound.
pub const fn bucket_bounds(bucket: usize) -> (u64, u64) {
    match bucket {
        0 => (0, 0),
        1..BUCKETS if bucket < BUCKETS - 1 => (1 << (bucket - 1), (1 << bucket) - 1),
        _ => (1 << (BUCKETS - 2), u64::MAX),
    }
}

/// Times as they were counted.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Hist {
    /// Events by bucket.
    pub buckets: [u64; BUCKETS],
    /// The longest time, in microseconds.
    pub max: u64,
    /// All times together, in microseconds.
    pub sum: u64,
}

impl Hist {
    /// No events.
    pub const fn new() -> Self {
        Hist {
            buckets: [0; BUCKETS],
            max: 0,
            sum: 0,
        }
    }

    /// Counts an event that took so long.
    pub fn record(&mut self, us: u64) {
        if let Some(events) = self.buckets.get_mut(bucket_of(us)) {
            *events = events.saturating_add(1);
        }
        self.max = self.max.max(us);
        self.sum = self.sum.saturating_add(us);
    }

    /// Adds another histogram's events.
    pub fn merge(&mut self, other: &Hist) {
        for (events, more) in self.buckets.iter_mut().zip(other.buckets) {
            *events = events.saturating_add(more);
        }
        self.max = self.max.max(other.max);
        self.sum = self.sum.saturating_add(other.sum);
    }

    /// Events.
    pub fn count(&self) -> u64 {
        self.buckets
            .iter()
            .fold(0, |sum, &events| sum.saturating_add(events))
    }

    /// Mean time; 0 without events.
    pub fn mean(&self) -> u64 {
        self.sum.checked_div(self.count()).unwrap_or(0)
    }

    /// A time that `percent` of the events did not exceed: the upper bound of the bucket that the
    /// event falls into, at most the longest time. 0 without events.
    pub fn percentile(&self, percent: u32) -> u64 {
        // In two parts: the kernel has no 128-bit division, and the product could overflow.
        let (count, percent) = (self.count(), u64::from(percent.min(100)));
        let rank = (count / 100 * percent + (count % 100 * percent).div_ceil(100)).max(1);
        let mut seen = 0u64;
        for (bucket, &events) in self.buckets.iter().enumerate() {
            seen = seen.saturating_add(events);
            if seen >= rank {
                return bucket_bounds(bucket).1.min(self.max);
            }
        }
        self.max
    }

    /// The median.
    pub fn p50(&self) -> u64 {
        self.percentile(50)
    }

    /// What one event in a hundred exceeds.
    pub fn p99(&self) -> u64 {
        self.percentile(99)
    }
}

/// A histogram that several threads count into at once.
#[derive(Debug)]
pub struct AtomicHist {
    buckets: [AtomicU64; BUCKETS],
    max: AtomicU64,
    sum: AtomicU64,
}

impl AtomicHist {
    /// No events.
    pub fn new() -> Self {
        AtomicHist {
            buckets: core::array::from_fn(|_| AtomicU64::new(0)),
            max: AtomicU64::new(0),
            sum: AtomicU64::new(0),
        }
    }

    /// Counts an event that took so long.
    #[inline]
    pub fn record(&self, us: u64) {
        if let Some(events) = self.buckets.get(bucket_of(us)) {
            events.fetch_add(1, Relaxed);
        }
        self.sum.fetch_add(us, Relaxed);
        // Most events are no record, and a load does not take the line from other CPUs.
        if us > self.max.load(Relaxed) {
            self.max.fetch_max(us, Relaxed);
        }
    }

    /// The counts. Events that are counted meanwhile may be in one figure and not yet in another.
    pub fn snapshot(&self) -> Hist {
        let mut hist = Hist::new();
        for (events, atomic) in hist.buckets.iter_mut().zip(&self.buckets) {
            *events = atomic.load(Relaxed);
        }
        hist.max = self.max.load(Relaxed);
        hist.sum = self.sum.load(Relaxed);
        hist
    }

    /// Forgets all events.
    pub fn clear(&self) {
        for events in &self.buckets {
            events.store(0, Relaxed);
        }
        self.max.store(0, Relaxed);
        self.sum.store(0, Relaxed);
    }
}

impl Default for AtomicHist {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn buckets_follow_one_another() {
        assert_eq!(bucket_bounds(0), (0, 0));
        for bucket in 1..BUCKETS {
            let (low, high) = bucket_bounds(bucket);
            assert_eq!(low, bucket_bounds(bucket - 1).1 + 1);
            assert_eq!((bucket_of(low), bucket_of(high)), (bucket, bucket));
        }
        assert_eq!(bucket_bounds(BUCKETS - 1).1, u64::MAX);
        assert_eq!(bucket_bounds(BUCKETS), bucket_bounds(BUCKETS - 1));
    }

    #[test]
    fn nothing_yet() {
        let hist = Hist::new();
        assert_eq!(
            (hist.count(), hist.mean(), hist.p50(), hist.p99(), hist.max),
            (0, 0, 0, 0, 0)
        );
    }

    #[test]
    fn rare_long_times_show_in_p99_only() {
        let mut hist = Hist::new();
        for _ in 0..980 {
            hist.record(3);
        }
        for _ in 0..20 {
            hist.record(70_000);
        }
        assert_eq!((hist.p50(), hist.p99(), hist.max), (3, 70_000, 70_000));
        assert_eq!(hist.percentile(98), 3);
        assert_eq!(hist.mean(), (980 * 3 + 20 * 70_000) / 1000);
        hist.record(u64::MAX);
        assert_eq!((hist.max, hist.sum), (u64::MAX, u64::MAX));
    }

    #[test]
    fn threads_lose_no_event() {
        let hist = AtomicHist::new();
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let hist = &hist;
                scope.spawn(move || (0..10_000).for_each(|i| hist.record(thread * 1000 + i % 7)));
            }
        });
        let seen = hist.snapshot();
        assert_eq!((seen.count(), seen.max), (40_000, 3006));
        hist.clear();
        assert_eq!(hist.snapshot(), Hist::new());
    }

    proptest! {
        #[test]
        fn percentiles_bound_the_sorted_times(mut times in prop::collection::vec(0u64..1 << 30, 1..200), percent in 1u32..=100) {
            let (mut hist, atomic) = (Hist::new(), AtomicHist::new());
            for &us in &times {
                hist.record(us);
                atomic.record(us);
            }
            prop_assert_eq!(atomic.snapshot(), hist);
            times.sort_unstable();
            let rank = (times.len() * percent as usize).div_ceil(100).max(1);
            let exact = times[rank - 1];
            let (low, high) = bucket_bounds(bucket_of(exact));
            let told = hist.percentile(percent);
            prop_assert!(told >= exact && told <= high.min(hist.max));
            prop_assert!(exact >= low);
        }

        #[test]
        fn merged_is_as_counted_together(a in prop::collection::vec(any::<u64>(), 0..50), b in prop::collection::vec(any::<u64>(), 0..50)) {
            let of = |times: &[u64]| {
                let mut hist = Hist::new();
                times.iter().for_each(|&us| hist.record(us));
                hist
            };
            let mut merged = of(&a);
            merged.merge(&of(&b));
            let together: Vec<u64> = a.iter().chain(&b).copied().collect();
            prop_assert_eq!(merged, of(&together));
        }
    }
}
