// SPDX-License-Identifier: GPL-2.0

//! How often things happen to a VM, from counters that only go up.

use crate::vm::VmFigures;
use serde::Serialize;
use std::collections::VecDeque;

/// Seconds over which a rate is taken.
const WINDOW_S: f64 = 10.0;

/// Counters whose rates are of interest.
const COUNTERS: [&str; 7] = [
    "faults",
    "refaults",
    "cow_breaks",
    "decompressions",
    "swap_ins",
    "swap_outs",
    "stall_us",
];

/// Events in a second; one that the module does not count is `None`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct PerSecond {
    /// Faults served.
    pub faults: Option<f64>,
    /// Faults on pages that a sample or reclaim had taken away.
    pub refaults: Option<f64>,
    /// Shared and zero pages that were written and copied.
    pub cow_breaks: Option<f64>,
    /// Pages that were decompressed.
    pub decompressions: Option<f64>,
    /// Pages that were read from swap.
    pub swap_ins: Option<f64>,
    /// Pages that were written to swap.
    pub swap_outs: Option<f64>,
    /// Microseconds that faults waited.
    pub stall_us: Option<f64>,
}

/// A VM's counters over the last seconds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rates {
    looks: VecDeque<(f64, VmFigures)>,
}

impl Rates {
    /// Takes in what the counters are now.
    pub fn note(&mut self, now_s: f64, figures: &VmFigures) {
        // One that is left before the window's start is what the rates are taken from.
        while self
            .looks
            .get(1)
            .is_some_and(|(at, _)| now_s - at >= WINDOW_S)
        {
            self.looks.pop_front();
        }
        self.looks.push_back((now_s, figures.clone()));
    }

    /// The rates; nothing before the second look.
    pub fn per_second(&self) -> PerSecond {
        let mut rates = PerSecond::default();
        let (Some((from_s, from)), Some((to_s, to))) = (self.looks.front(), self.looks.back())
        else {
            return rates;
        };
        let elapsed_s = to_s - from_s;
        if elapsed_s <= 0.0 {
            return rates;
        }
        let rate = |name: &str| {
            let (before, after) = (from.get(name)?, to.get(name)?);
            // A VM of the same name that started anew counts from 0.
            Some(after.checked_sub(before)? as f64 / elapsed_s)
        };
        let [faults, refaults, cow_breaks, decompressions, swap_ins, swap_outs, stall_us] =
            COUNTERS.map(rate);
        rates = PerSecond {
            faults,
            refaults,
            cow_breaks,
            decompressions,
            swap_ins,
            swap_outs,
            stall_us,
        };
        rates
    }
}

/// A rate for tables: `0`, `0.3`, `12`, `4.1k`.
pub fn short_rate(rate: f64) -> String {
    match rate {
        rate if rate < 0.05 => "0".to_owned(),
        rate if rate < 9.95 => format!("{rate:.1}"),
        rate if rate < 9999.5 => format!("{rate:.0}"),
        rate if rate < 9.9995e6 => format!("{:.0}k", rate / 1e3),
        rate => format!("{:.0}M", rate / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(faults: u64) -> VmFigures {
        VmFigures {
            faults: Some(faults),
            ..VmFigures::default()
        }
    }

    #[test]
    fn over_the_last_seconds() {
        let mut rates = Rates::default();
        assert_eq!(rates.per_second(), PerSecond::default());
        rates.note(0.0, &figures(100));
        assert_eq!(rates.per_second().faults, None);
        rates.note(2.0, &figures(150));
        assert_eq!(rates.per_second().faults, Some(25.0));
        assert_eq!(rates.per_second().swap_ins, None);
        for second in 3..40 {
            rates.note(f64::from(second), &figures(150));
        }
        assert_eq!(rates.per_second().faults, Some(0.0));
        assert!(rates.looks.len() <= 12);
        rates.note(41.0, &figures(0));
        assert_eq!(rates.per_second().faults, None);
    }

    #[test]
    fn shown_in_few_columns() {
        let shown = [0.0, 0.04, 0.3, 9.96, 1234.0, 99_999.0, 5e7].map(short_rate);
        assert_eq!(shown, ["0", "0", "0.3", "10", "1234", "100k", "50M"]);
    }
}
