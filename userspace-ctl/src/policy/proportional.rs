// SPDX-License-Identifier: GPL-2.0

//! All guests at the same part of the way between their bounds.

use super::{Budget, Decision, Guest};
use crate::units::long_kb;

pub(super) fn size(budget: &Budget, guests: &[Guest]) -> Vec<Decision> {
    let wide = |guest: &Guest| u128::from(guest.ceiling_kb() - guest.floor_kb());
    let floors: i128 = guests
        .iter()
        .map(|guest| i128::from(guest.floor_kb()))
        .sum();
    let spread: u128 = guests.iter().map(wide).sum();
    let room = u128::try_from(budget.pool_kb - floors)
        .unwrap_or(0)
        .min(spread);
    let pool = long_kb(u64::try_from(budget.pool_kb.max(0)).unwrap_or(u64::MAX));
    guests
        .iter()
        .map(|guest| {
            let part = (wide(guest) * room).checked_div(spread).unwrap_or(0);
            let target_kb = guest.floor_kb() + u64::try_from(part).unwrap_or(u64::MAX);
            let reason = if budget.pool_kb < floors {
                format!("proportional: the pool of {pool} is below the sum of the minima")
            } else {
                let percent = (room * 100).checked_div(spread).unwrap_or(100);
                format!("proportional: a pool of {pool} gives {percent}% of the way to dynamic_max")
            };
            Decision { target_kb, reason }
        })
        .collect()
}
