// SPDX-License-Identifier: GPL-2.0

//! Min-funding revocation with a tax on idle memory, in its steady state.
//!
//! A guest pays `cost = active + k * idle` for its memory, `k = 1 / (1 - tax)`; whoever has the
//! fewest shares for each KiB of cost gives memory to whoever has most. That ends where all guests
//! within their bounds have the same cost by share, so that level is looked for directly.

use super::{Budget, Decision, Guest};
use crate::units::long_kb;

/// Balloons take at most so much of a VM.
const MAX_BALLOON_PERCENT: u64 = 65;
/// Fraction bits of the level.
const LEVEL_BITS: u32 = 20;
/// Above every level that a guest can be at.
const LEVEL_LIMIT: u128 = 1 << 84;

struct Claim {
    shares: u128,
    active: u128,
    floor: u128,
    ceiling: u128,
}

impl Claim {
    fn of(guest: &Guest) -> Self {
        let unballooned = (u128::from(guest.config.static_max_kb)
            * u128::from(100 - MAX_BALLOON_PERCENT))
        .div_ceil(100);
        let ceiling = u128::from(guest.ceiling_kb());
        Self {
            shares: u128::from(guest.config.shares),
            active: u128::from(guest.figures.active_kb),
            floor: u128::from(guest.floor_kb()).max(unballooned).min(ceiling),
            ceiling,
        }
    }

    /// Memory that the guest gets for `level` of cost by share.
    fn memory(&self, level: u128, tax_percent: u128) -> u128 {
        let cost = (self.shares * level) >> LEVEL_BITS;
        let memory = match cost.checked_sub(self.active) {
            None => cost,
            Some(idle) => self.active + idle * (100 - tax_percent) / 100,
        };
        memory.clamp(self.floor, self.ceiling)
    }
}

pub(super) fn size(budget: &Budget, guests: &[Guest]) -> Vec<Decision> {
    let tax = u128::from(budget.idle_tax_percent.min(99));
    let claims: Vec<Claim> = guests.iter().map(Claim::of).collect();
    let pool = u128::try_from(budget.pool_kb).unwrap_or(0);
    let sum = |level: u128| {
        claims
            .iter()
            .map(|claim| claim.memory(level, tax))
            .sum::<u128>()
    };
    let level = if sum(LEVEL_LIMIT) <= pool {
        LEVEL_LIMIT
    } else {
        let (mut fits, mut too_much) = (0, LEVEL_LIMIT);
        while too_much - fits > 1 {
            let middle = fits + (too_much - fits) / 2;
            if sum(middle) <= pool {
                fits = middle;
            } else {
                too_much = middle;
            }
        }
        fits
    };
    guests
        .iter()
        .zip(&claims)
        .map(|(guest, claim)| {
            let memory = claim.memory(level, tax);
            let target_kb = u64::try_from(memory).unwrap_or(u64::MAX);
            let why = if memory == claim.ceiling {
                "enough for all it may have"
            } else if memory == claim.floor {
                "down to its least"
            } else if memory < claim.active {
                "less than it uses"
            } else {
                "its active memory, and taxed idle memory"
            };
            let reason = format!(
                "shares {}, active {}: {why}",
                guest.config.shares,
                long_kb(guest.figures.active_kb)
            );
            Decision { target_kb, reason }
        })
        .collect()
}
