// SPDX-License-Identifier: GPL-2.0

//! How short of memory the host is, in five steps, after ESX (Waldspurger, OSDI 2002; its sliding
//! scale of free memory is that of ESX 5).
//!
//! Each state has a threshold of available memory, as a share of `minfree`, below which it is
//! entered at once. It is left upwards only when a tenth more than its threshold was available for
//! two seconds on end, so that a host on the brink does not flap.

words! {
    /// How short of memory the host is, the best first: later means shorter.
    #[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
    #[repr(u8)]
    pub enum HostState {
        /// Plenty: nothing is split, compressed or swapped for the host's sake.
        #[default]
        High = "high",
        /// Below 4 minfree.
        Clear = "clear",
        /// Below minfree: balloons are asked for.
        Soft = "soft",
        /// Below 64 % of minfree: compress and swap.
        Hard = "hard",
        /// Below 32 % of minfree: allocations wait.
        Low = "low",
    }
}

/// Number of states.
pub const STATES: usize = HostState::ALL.len();

/// A state is left upwards at its threshold times this, in percent.
const LEAVE_PERCENT: u64 = 110;
/// And only after so long above that, in microseconds.
pub const HOLD_US: u64 = 2_000_000;

impl HostState {
    /// Available KiB below which the state is entered; `None` for High, which nothing enters.
    pub fn enter_kb(self, minfree_kb: u64) -> Option<u64> {
        let percent = match self {
            HostState::High => return None,
            HostState::Clear => 400,
            HostState::Soft => 100,
            HostState::Hard => 64,
            HostState::Low => 32,
        };
        Some(percent_of(minfree_kb, percent))
    }

    /// Available KiB from which on the state can be left for a better one.
    pub fn leave_kb(self, minfree_kb: u64) -> u64 {
        self.enter_kb(minfree_kb)
            .map_or(0, |kb| percent_of(kb, LEAVE_PERCENT))
    }

    /// The state that `available_kb` means, with every threshold scaled by `percent`.
    fn of(available_kb: u64, minfree_kb: u64, percent: u64) -> HostState {
        let short = |state: &&HostState| {
            state
                .enter_kb(minfree_kb)
                .is_some_and(|kb| available_kb < percent_of(kb, percent))
        };
        Self::ALL
            .iter()
            .rev()
            .find(short)
            .copied()
            .unwrap_or(HostState::High)
    }
}

fn percent_of(kb: u64, percent: u64) -> u64 {
    // The kernel has no division of 128 bits.
    (kb / 100)
        .saturating_mul(percent)
        .saturating_add((kb % 100).saturating_mul(percent) / 100)
}

/// The memory that a host of `total_kb` should keep free: 6 % of the first 4 GiB, 4 % of the next
/// 8, 2 % of the next 16, 1 % of the rest.
pub fn minfree_kb(total_kb: u64) -> u64 {
    const GIB: u64 = 1 << 20;
    const STEPS: [(u64, u64); 4] = [(4 * GIB, 6), (12 * GIB, 4), (28 * GIB, 2), (u64::MAX, 1)];
    let mut from = 0;
    let mut kb = 0u64;
    for (to, percent) in STEPS {
        let part = total_kb.min(to).saturating_sub(from);
        kb = kb.saturating_add(percent_of(part, percent));
        from = to;
    }
    kb
}

/// Follows the available memory through the states, and keeps the time spent in each.
#[derive(Clone, Copy, Debug)]
pub struct Tracker {
    state: HostState,
    forced: bool,
    /// Since when more than enough for a better state was available, and the worst of them.
    better: Option<(u64, HostState)>,
    last_us: u64,
    spent_us: [u64; STATES],
}

impl Tracker {
    /// High from `now_us` on.
    pub const fn new(now_us: u64) -> Self {
        Tracker {
            state: HostState::High,
            forced: false,
            better: None,
            last_us: now_us,
            spent_us: [0; STATES],
        }
    }

    /// The state.
    pub const fn state(&self) -> HostState {
        self.state
    }

    /// Whether the state was forced.
    pub const fn is_forced(&self) -> bool {
        self.forced
    }

    fn pass_time(&mut self, now_us: u64) {
        let dt_us = now_us.saturating_sub(self.last_us);
        self.last_us = self.last_us.max(now_us);
        if let Some(spent) = self.spent_us.get_mut(self.state.index()) {
            *spent = spent.saturating_add(dt_us);
        }
    }

    /// Takes note of what is available now; true if the state changed.
    pub fn observe(&mut self, now_us: u64, available_kb: u64, minfree_kb: u64) -> bool {
        self.pass_time(now_us);
        if self.forced {
            return false;
        }
        let worse = HostState::of(available_kb, minfree_kb, 100);
        if worse > self.state {
            self.better = None;
            self.state = worse;
            return true;
        }
        let better = HostState::of(available_kb, minfree_kb, LEAVE_PERCENT);
        if better >= self.state {
            self.better = None;
            return false;
        }
        let (since_us, worst) = match self.better {
            Some((since_us, worst)) => (since_us, worst.max(better)),
            None => (now_us, better),
        };
        self.better = Some((since_us, worst));
        if now_us.saturating_sub(since_us) < HOLD_US {
            return false;
        }
        self.better = None;
        self.state = worst;
        true
    }

    /// Holds the state at `forced`, or lets it follow the memory again: it stays until the next
    /// look, which moves it at once. True if the state changed.
    pub fn force(&mut self, now_us: u64, forced: Option<HostState>) -> bool {
        self.pass_time(now_us);
        self.better = None;
        self.forced = forced.is_some();
        let state = forced.unwrap_or(HostState::High);
        let changed = state != self.state;
        self.state = state;
        changed
    }

    /// Microseconds spent in each state, in the order of [`HostState::ALL`].
    pub fn spent_us(&self, now_us: u64) -> [u64; STATES] {
        let mut copy = *self;
        copy.pass_time(now_us);
        copy.spent_us
    }

    /// Microseconds until the next look is due: soon while memory is short or about to be.
    pub fn next_look_us(&self, available_kb: u64, minfree_kb: u64) -> u64 {
        match HostState::of(available_kb, minfree_kb, 200) {
            HostState::High if self.state == HostState::High => 1_000_000,
            _ => 100_000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const G: u64 = 1 << 20;

    #[test]
    fn minfree_slides() {
        assert_eq!(minfree_kb(0), 0);
        assert_eq!(minfree_kb(2 * G), 2 * G * 6 / 100);
        let four = 4 * G * 6 / 100;
        assert_eq!(minfree_kb(4 * G), four);
        let twelve = four + 8 * G * 4 / 100;
        assert_eq!(minfree_kb(12 * G), twelve);
        let most = twelve + 16 * G * 2 / 100;
        assert_eq!(minfree_kb(28 * G), most);
        assert_eq!(minfree_kb(100 * G), most + 72 * G / 100);
        assert_eq!(minfree_kb(u64::MAX) / G, u64::MAX / 100 / G);
    }

    #[test]
    fn words_and_numbers_agree() {
        for (i, state) in HostState::ALL.into_iter().enumerate() {
            assert_eq!(state.index(), i);
            assert_eq!(state.as_str(), HostState::WORDS[i]);
            assert_eq!(HostState::from_index(i), Some(state));
        }
        assert_eq!(HostState::from_index(STATES), None);
        assert!(HostState::Low > HostState::High);
    }

    #[test]
    fn worse_at_once_and_at_the_thresholds() {
        for (available, state) in [
            (400, HostState::High),
            (399, HostState::Clear),
            (100, HostState::Clear),
            (99, HostState::Soft),
            (64, HostState::Soft),
            (63, HostState::Hard),
            (32, HostState::Hard),
            (31, HostState::Low),
            (0, HostState::Low),
        ] {
            let mut tracker = Tracker::new(0);
            assert_eq!(tracker.observe(1, available, 100), state != HostState::High);
            assert_eq!(tracker.state(), state, "{available}");
        }
    }

    #[test]
    fn better_only_after_a_while_and_a_tenth_above() {
        let mut tracker = Tracker::new(0);
        assert!(tracker.observe(0, 500, 1000));
        assert_eq!(tracker.state(), HostState::Hard);
        // Above the threshold, but not by a tenth.
        assert!(!tracker.observe(9 * HOLD_US, 703, 1000));
        assert!(!tracker.observe(10 * HOLD_US, 704, 1000));
        assert!(!tracker.observe(11 * HOLD_US - 1, 5000, 1000));
        assert!(tracker.observe(11 * HOLD_US, 5000, 1000));
        // The worst of those two seconds counts.
        assert_eq!(tracker.state(), HostState::Soft);
        assert!(!tracker.observe(12 * HOLD_US, 5000, 1000));
        assert!(tracker.observe(13 * HOLD_US, 5000, 1000));
        assert_eq!(tracker.state(), HostState::High);
    }

    #[test]
    fn a_dip_begins_the_wait_anew() {
        let mut tracker = Tracker::new(0);
        tracker.observe(0, 90, 100);
        tracker.observe(1, 120, 100);
        tracker.observe(HOLD_US / 2, 105, 100);
        assert!(!tracker.observe(HOLD_US + 1, 120, 100));
        assert!(tracker.observe(2 * HOLD_US + 1, 120, 100));
        assert_eq!(tracker.state(), HostState::Clear);
    }

    #[test]
    fn a_forced_state_stays_until_let_go() {
        let mut tracker = Tracker::new(0);
        assert!(tracker.force(5, Some(HostState::Hard)));
        assert!(tracker.is_forced());
        assert!(!tracker.observe(6, 1000, 100));
        assert!(!tracker.observe(99 * HOLD_US, 1000, 100));
        assert_eq!(tracker.state(), HostState::Hard);
        assert!(!tracker.force(99 * HOLD_US, Some(HostState::Hard)));
        assert!(tracker.force(100 * HOLD_US, None));
        assert!(tracker.observe(100 * HOLD_US, 50, 100));
        assert_eq!(tracker.state(), HostState::Hard);
    }

    #[test]
    fn looks_come_often_when_memory_is_short() {
        let mut tracker = Tracker::new(0);
        assert_eq!(tracker.next_look_us(900, 100), 1_000_000);
        assert_eq!(tracker.next_look_us(700, 100), 100_000);
        tracker.observe(0, 50, 100);
        assert_eq!(tracker.next_look_us(900, 100), 100_000);
    }

    proptest! {
        #[test]
        fn time_is_never_lost(steps in prop::collection::vec((0u64..3_000_000, 0u64..600), 1..60)) {
            let mut tracker = Tracker::new(0);
            let mut now = 0;
            for (dt, available) in steps {
                now += dt;
                let before = tracker.state();
                let changed = tracker.observe(now, available, 100);
                prop_assert_eq!(changed, before != tracker.state());
                // Never better than the memory says, never worse than before without a reason.
                prop_assert!(tracker.state() >= HostState::of(available, 100, 100));
                if tracker.state() > before {
                    prop_assert_eq!(tracker.state(), HostState::of(available, 100, 100));
                }
                prop_assert_eq!(tracker.spent_us(now).iter().sum::<u64>(), now);
            }
        }

        #[test]
        fn a_steady_level_is_reached(available in 0u64..600, from in 0usize..STATES) {
            let mut tracker = Tracker::new(0);
            tracker.force(0, HostState::from_index(from));
            tracker.force(0, None);
            for i in 0..10 {
                tracker.observe(i * HOLD_US, available, 100);
            }
            prop_assert!(tracker.state() <= HostState::of(available, 100, LEAVE_PERCENT));
            prop_assert!(tracker.state() >= HostState::of(available, 100, 100));
        }

        #[test]
        fn more_memory_is_never_a_worse_state(a: u64, b: u64, minfree: u64) {
            let (less, more) = (a.min(b), a.max(b));
            prop_assert!(HostState::of(less, minfree, 100) >= HostState::of(more, minfree, 100));
        }
    }
}
