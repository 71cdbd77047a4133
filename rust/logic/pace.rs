// SPDX-License-Identifier: GPL-2.0

//! How fast the scanner may go: pages per second, a target time for a full pass, and a ceiling on
//! its use of a CPU. The lowest one that is set wins.
//!
//! Each ceiling is a token bucket (Turner 1986) that fills with time and is drained by work. It
//! holds at most what a tenth of a second brings, so an idle time is not made up for by a burst, and
//! it may be overdrawn by the work of one batch, which is waited for afterwards. When a ceiling
//! changes, no more is owed than a second brings at the new rate: a change counts at once.

/// A bucket holds what comes in so many microseconds.
const CREDIT_US: i64 = 100_000;
/// The longest sleep that is asked for, and the most that an old debt costs at a new rate.
pub const SLEEP_MAX_US: u64 = 1_000_000;
/// The most pages of a batch.
pub const BATCH_MAX: u64 = 512;
/// A batch is at most what comes in so many microseconds.
const BATCH_US: u64 = 50_000;
/// Faster is no ceiling; also keeps the arithmetic far from its bounds.
const RATE_MAX: u64 = 1_000_000_000;
/// Cost of a page before one was measured, in microseconds.
const FIRST_COST_US: u64 = 20;

/// Ceilings on the scanner.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Limits {
    /// Pages per second, 0 = none.
    pub pages_per_sec: u64,
    /// Seconds that a full pass shall take, 0 = none.
    pub period_secs: u64,
    /// Percent of one CPU; 100 and more = none.
    pub cpu_max_percent: u32,
    /// Pages of a full pass.
    pub total_pages: u64,
}

impl Limits {
    /// Pages per second that the first two ceilings allow; `None` without any.
    pub fn rate(&self) -> Option<u64> {
        let by_rate = (self.pages_per_sec > 0).then_some(self.pages_per_sec);
        let by_period =
            (self.period_secs > 0).then(|| self.total_pages.div_ceil(self.period_secs).max(1));
        let lowest = match (by_rate, by_period) {
            (Some(a), Some(b)) => a.min(b),
            (a, b) => a.or(b)?,
        };
        (lowest < RATE_MAX).then_some(lowest)
    }

    /// Percent of one CPU, 1 to 99; `None` without that ceiling.
    fn percent(&self) -> Option<u64> {
        (self.cpu_max_percent < 100).then_some(self.cpu_max_percent.max(1).into())
    }
}

/// Tokens that come at a rate per microsecond.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    tokens: i64,
    /// The rate of the last time.
    rate: u64,
}

impl Bucket {
    const fn new() -> Self {
        Bucket { tokens: 0, rate: 0 }
    }

    /// Lets `dt_us` pass at `rate` tokens a microsecond.
    fn fill(&mut self, dt_us: u64, rate: u64) {
        let each = rate.min(RATE_MAX) as i64;
        if rate != self.rate {
            self.rate = rate;
            let second = each.saturating_mul(SLEEP_MAX_US as i64);
            self.tokens = self.tokens.max(second.saturating_neg());
        }
        let come = each.saturating_mul(i64::try_from(dt_us).unwrap_or(i64::MAX));
        let full = each.saturating_mul(CREDIT_US);
        self.tokens = self.tokens.saturating_add(come).min(full);
    }

    fn drain(&mut self, tokens: u64) {
        self.tokens = self.tokens.saturating_sub_unsigned(tokens);
    }

    /// Microseconds until nothing is owed.
    fn wait_us(&self, rate: u64) -> u64 {
        let owed = self.tokens.saturating_neg().max(0) as u64;
        owed.div_ceil(rate.clamp(1, RATE_MAX)).min(SLEEP_MAX_US)
    }
}

/// Tokens of one page: rates are per second, time is in microseconds.
const PAGE_TOKENS: u64 = 1_000_000;
/// Tokens of one microsecond of CPU: rates are in percent.
const CPU_TOKENS: u64 = 100;

/// Paces the scanner.
#[derive(Clone, Copy, Debug)]
pub struct Pacer {
    last_us: u64,
    pages: Bucket,
    cpu: Bucket,
    /// CPU time of a page, in 1/256 us: the recent worst, slowly forgotten.
    cost: u64,
}

impl Pacer {
    /// Starts with nothing owed and nothing saved up.
    pub fn new(now_us: u64) -> Self {
        Pacer {
            last_us: now_us,
            pages: Bucket::new(),
            cpu: Bucket::new(),
            cost: FIRST_COST_US << 8,
        }
    }

    /// Pages to look at before [`Pacer::after`] is asked: 1 to [`BATCH_MAX`], and no more than take
    /// a twentieth of a second's allowance.
    pub fn batch(&self, limits: &Limits) -> u64 {
        let by_rate = limits
            .rate()
            .map_or(BATCH_MAX, |rate| rate.saturating_mul(BATCH_US) / 1_000_000);
        let by_cpu = limits.percent().map_or(BATCH_MAX, |percent| {
            let cpu_us = percent * BATCH_US / 100;
            (cpu_us << 8) / self.cost.max(1)
        });
        by_rate.min(by_cpu).clamp(1, BATCH_MAX)
    }

    /// Takes account of a batch and answers for how many microseconds to sleep, 0 = go on.
    ///
    /// `cpu_us` is the CPU time since the last call. After a sleep, ask again with no work done until
    /// the answer is 0: the sleep may have been cut short, or capped at [`SLEEP_MAX_US`].
    pub fn after(&mut self, limits: &Limits, now_us: u64, pages_done: u64, cpu_us: u64) -> u64 {
        let dt_us = now_us.saturating_sub(self.last_us);
        self.last_us = now_us;
        if let Some(cost) = cpu_us.saturating_mul(256).checked_div(pages_done) {
            self.cost = cost.max(self.cost - self.cost / 16);
        }
        let mut sleep_us = 0;
        if let Some(rate) = limits.rate() {
            self.pages.fill(dt_us, rate);
            self.pages.drain(pages_done.saturating_mul(PAGE_TOKENS));
            sleep_us = self.pages.wait_us(rate);
        } else {
            self.pages = Bucket::new();
        }
        if let Some(percent) = limits.percent() {
            self.cpu.fill(dt_us, percent);
            self.cpu.drain(cpu_us.saturating_mul(CPU_TOKENS));
            sleep_us = sleep_us.max(self.cpu.wait_us(percent));
        } else {
            self.cpu = Bucket::new();
        }
        sleep_us
    }
}

/// A ceiling on the pages of one VM.
#[derive(Clone, Copy, Debug, Default)]
pub struct TokenBucket {
    last_us: u64,
    bucket: Bucket,
}

impl TokenBucket {
    /// Starts with nothing owed and nothing saved up.
    pub const fn new(now_us: u64) -> Self {
        TokenBucket {
            last_us: now_us,
            bucket: Bucket::new(),
        }
    }

    /// Whether `n` pages may be looked at now; if so they are accounted for. `rate_per_sec` 0 = no
    /// ceiling. More than there is may be taken at once, and is waited for before the next.
    pub fn take(&mut self, now_us: u64, rate_per_sec: u64, n: u64) -> bool {
        let dt_us = now_us.saturating_sub(self.last_us);
        self.last_us = now_us.max(self.last_us);
        if rate_per_sec == 0 {
            self.bucket = Bucket::new();
            return true;
        }
        self.bucket.fill(dt_us, rate_per_sec);
        if self.bucket.tokens < 0 {
            return false;
        }
        self.bucket.drain(n.saturating_mul(PAGE_TOKENS));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a simulated scanner did: when a batch began, its pages and its CPU time.
    struct Batch {
        at_us: u64,
        pages: u64,
        cpu_us: u64,
    }

    /// A scanner that follows the pacer on a clock of its own.
    struct Scanner {
        pacer: Pacer,
        now_us: u64,
        done: Vec<Batch>,
    }

    impl Scanner {
        fn new(now_us: u64) -> Self {
            Scanner {
                pacer: Pacer::new(now_us),
                now_us,
                done: Vec::new(),
            }
        }

        /// Works until `until_us`; `cost_us` is the CPU time of a page, and each sleep takes
        /// `late_us` longer than asked for.
        fn work(&mut self, limits: &Limits, until_us: u64, cost_us: u64, late_us: u64) {
            while self.now_us < until_us {
                let pages = self.pacer.batch(limits);
                assert!((1..=BATCH_MAX).contains(&pages));
                let (at_us, cpu_us) = (self.now_us, pages * cost_us);
                self.now_us += cpu_us.max(200);
                self.done.push(Batch {
                    at_us,
                    pages,
                    cpu_us,
                });
                let mut sleep_us = self.pacer.after(limits, self.now_us, pages, cpu_us);
                while sleep_us > 0 {
                    assert!(sleep_us <= SLEEP_MAX_US);
                    self.now_us += sleep_us + late_us;
                    sleep_us = self.pacer.after(limits, self.now_us, 0, 0);
                }
            }
        }

        /// The most work that any window of `window_us` saw, counted by `what`.
        fn most(&self, window_us: u64, what: impl Fn(&Batch) -> u64) -> u64 {
            let (mut from, mut sum, mut most) = (0, 0, 0);
            for batch in &self.done {
                sum += what(batch);
                while batch.at_us - self.done[from].at_us > window_us {
                    sum -= what(&self.done[from]);
                    from += 1;
                }
                most = most.max(sum);
            }
            most
        }
    }

    fn limits(pages_per_sec: u64, period_secs: u64, cpu_max_percent: u32) -> Limits {
        Limits {
            pages_per_sec,
            period_secs,
            cpu_max_percent,
            total_pages: 100_000,
        }
    }

    #[test]
    fn lowest_limit_wins() {
        assert_eq!(limits(0, 0, 100).rate(), None);
        assert_eq!(limits(700, 0, 100).rate(), Some(700));
        assert_eq!(limits(0, 200, 100).rate(), Some(500));
        assert_eq!(limits(700, 200, 100).rate(), Some(500));
        assert_eq!(limits(300, 200, 100).rate(), Some(300));
        assert_eq!(limits(0, 300, 100).rate(), Some(334));
        assert_eq!(limits(u64::MAX, 0, 100).rate(), None);
        assert_eq!(
            Limits {
                period_secs: 9,
                ..Limits::default()
            }
            .rate(),
            Some(1)
        );
    }

    #[test]
    fn no_limit_never_sleeps() {
        let mut scanner = Scanner::new(0);
        scanner.work(&limits(0, 0, 100), 1_000_000, 1, 0);
        assert_eq!(
            scanner.most(1_000_000, |batch| batch.cpu_us),
            scanner.now_us
        );
    }

    #[test]
    fn a_limit_is_reached_not_only_kept() {
        let mut scanner = Scanner::new(77);
        scanner.work(&limits(0, 200, 100), 20_000_000, 1, 50);
        let pages: u64 = scanner.done.iter().map(|batch| batch.pages).sum();
        assert!(
            (9_900..=10_100).contains(&pages),
            "{pages} pages in 20 s at 500 a second"
        );
        let mut scanner = Scanner::new(77);
        scanner.work(&limits(0, 0, 20), 20_000_000, 1, 50);
        let cpu_us: u64 = scanner.done.iter().map(|batch| batch.cpu_us).sum();
        assert!(
            (3_900_000..=4_100_000).contains(&cpu_us),
            "{cpu_us} us in 20 s at 20 %"
        );
    }

    #[test]
    fn idle_time_is_not_hoarded() {
        let slow = limits(1000, 0, 100);
        let mut scanner = Scanner::new(0);
        scanner.work(&slow, 1_000_000, 1, 0);
        scanner.now_us += 3_600_000_000;
        let from = scanner.now_us;
        scanner.work(&slow, from + 1_000_000, 1, 0);
        let burst: u64 = scanner
            .done
            .iter()
            .filter(|batch| batch.at_us >= from)
            .map(|batch| batch.pages)
            .sum();
        assert!(
            burst <= 1000 + 100 + 50,
            "{burst} pages in the second after an idle hour"
        );
    }

    #[test]
    fn old_debts_do_not_outlive_a_change() {
        let mut pacer = Pacer::new(0);
        assert_eq!(
            pacer.after(&limits(1, 0, 100), 10, 100_000, 10),
            SLEEP_MAX_US
        );
        assert_eq!(pacer.after(&limits(0, 0, 100), 20, 0, 0), 0);
        assert_eq!(
            pacer.after(&limits(1, 0, 100), 30, 100_000, 10),
            SLEEP_MAX_US
        );
        let again = pacer.after(&limits(2, 0, 100), 40, 0, 0);
        assert!(again <= SLEEP_MAX_US);
        assert_eq!(pacer.after(&limits(2, 0, 100), 40 + again, 0, 0), 0);
    }

    #[test]
    fn a_slow_vm_waits_for_what_it_took() {
        let mut bucket = TokenBucket::new(0);
        assert!(bucket.take(0, 10, 64));
        assert!(!bucket.take(6_399_999, 10, 64));
        assert!(bucket.take(6_400_000, 10, 64));
        assert!(bucket.take(6_400_001, 0, 1_000_000), "no ceiling");
        assert!(bucket.take(6_400_002, 10, 1), "and no debt from it");
        assert!(
            !bucket.take(6_400_001, 10, 1),
            "a clock that goes back brings nothing"
        );
    }

    proptest! {
        #[test]
        fn windows_keep_the_limits(
            rate in prop_oneof![Just(0u64), 1u64..20, 20u64..200_000],
            period in prop_oneof![Just(0u64), 1u64..3000],
            percent in 1u32..=100,
            costs in prop::collection::vec(prop_oneof![0u64..4, 0u64..300], 1..4),
            late_us in 0u64..20_000,
        ) {
            let limits = limits(rate, period, percent);
            let mut scanner = Scanner::new(1 << 40);
            for cost_us in costs {
                scanner.work(&limits, scanner.now_us + 3_000_000, cost_us, late_us);
            }
            let batch = scanner.done.iter().map(|batch| batch.pages).max().unwrap_or(0);
            let batch_cpu_us = scanner.done.iter().map(|batch| batch.cpu_us).max().unwrap_or(0);
            for window_us in [1_000_000, 2_500_000] {
                if let Some(rate) = limits.rate() {
                    let pages = scanner.most(window_us, |batch| batch.pages);
                    prop_assert!(pages <= rate * (window_us + 100_000) / 1_000_000 + batch + 1);
                }
                if percent < 100 {
                    let cpu_us = scanner.most(window_us, |batch| batch.cpu_us);
                    let allowed = u64::from(percent) * (window_us + 100_000) / 100;
                    prop_assert!(cpu_us <= allowed + batch_cpu_us + 1, "{cpu_us} > {allowed}");
                }
            }
        }

        #[test]
        fn a_change_counts_from_the_next_call(
            before in (0u64..100_000, 0u64..1000, 1u32..=100),
            after in (1u64..100_000, 0u64..1000, 1u32..=100),
            cost_us in 0u64..200,
        ) {
            let (before, after) =
                (limits(before.0, before.1, before.2), limits(after.0, after.1, after.2));
            let mut scanner = Scanner::new(0);
            scanner.work(&before, 2_000_000, cost_us, 0);
            scanner.done.clear();
            let changed_us = scanner.now_us;
            scanner.work(&after, changed_us + 4_000_000, cost_us, 0);
            let batch = scanner.done.iter().map(|batch| batch.pages).max().unwrap_or(0);
            let rate = after.rate().unwrap();
            let pages = scanner.most(2_000_000, |batch| batch.pages);
            prop_assert!(pages <= rate * 21 / 10 + batch + 1);
            let worked: u64 = scanner.done.iter().map(|batch| batch.pages).sum();
            let pace_cpu = 1_000_000 * u64::from(after.cpu_max_percent) / 100 / cost_us.max(1);
            // A second at most is lost to what was owed before.
            prop_assert!(worked + batch >= rate.min(pace_cpu) * 28 / 10, "{worked} at {rate}");
        }

        #[test]
        fn a_bucket_keeps_its_rate(
            rate in 1u64..10_000,
            takes in prop::collection::vec((0u64..200_000, 1u64..600), 1..300),
        ) {
            let mut bucket = TokenBucket::new(0);
            let (mut now_us, mut taken) = (0u64, 0u64);
            for (dt_us, n) in takes {
                now_us += dt_us;
                if bucket.take(now_us, rate, n) {
                    prop_assert!(taken * 1_000_000 <= rate * (now_us + 100_000));
                    taken += n;
                }
            }
        }

        #[test]
        fn odd_input_does_no_harm(
            steps in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>(), any::<u32>(), any::<u64>()), 1..20),
        ) {
            let mut pacer = Pacer::new(u64::MAX);
            let mut bucket = TokenBucket::new(u64::MAX);
            for (now_us, pages, cpu_us, pages_per_sec, period_secs, cpu_max_percent, total_pages) in steps {
                let limits = Limits { pages_per_sec, period_secs, cpu_max_percent, total_pages };
                prop_assert!(pacer.after(&limits, now_us, pages, cpu_us) <= SLEEP_MAX_US);
                prop_assert!((1..=BATCH_MAX).contains(&pacer.batch(&limits)));
                bucket.take(now_us, pages_per_sec, pages);
            }
        }
    }
}
