// SPDX-License-Identifier: GPL-2.0

//! Each guest has a right to its entitlement; what is above moves, by chunks, to where pressure is.
//!
//! A guest under pressure grows by its chunk. The memory is the host's free memory first, then that
//! of guests above their entitlement, those with the least pressure first. Up to its entitlement a
//! guest takes what others have beyond theirs; beyond it, only what a giver does not need itself:
//! otherwise two guests under pressure would pass the same chunk to and fro.

use super::{Budget, Decision, Guest};
use crate::config::AMR_UNIT_KB;
use crate::units::long_kb;

const UNIT: u64 = AMR_UNIT_KB;

/// A guest that takes part.
struct Member<'a> {
    /// Its place among the guests.
    at: usize,
    guest: &'a Guest<'a>,
    /// Size, a multiple of the unit.
    size: u64,
    /// Least and largest size, multiples of the unit.
    least: u64,
    largest: u64,
    /// Its right, a multiple of the unit.
    right: u64,
    demand: u64,
    pressure: u64,
    gave: Vec<String>,
    got: Vec<String>,
}

pub(super) fn size(budget: &Budget, guests: &[Guest]) -> Vec<Decision> {
    let mut decisions: Vec<Decision> = guests.iter().map(stays).collect();
    let mut members: Vec<Member> = guests
        .iter()
        .enumerate()
        .filter_map(|(at, guest)| Member::new(at, guest))
        .collect();
    let before: i128 = members
        .iter()
        .map(|m| i128::from(m.guest.figures.current_kb))
        .sum();
    let rounded: i128 = members.iter().map(|member| i128::from(member.size)).sum();
    let mut free = budget.free_kb + before - rounded;

    // Least pressure first, so that givers are asked in this order and takers in the opposite one.
    members.sort_by(|a, b| {
        a.pressure
            .cmp(&b.pressure)
            .then_with(|| a.guest.config.name.cmp(&b.guest.config.name))
    });
    for member in &mut members {
        if free < 0 {
            let give = member.can_give().min(units_for(free.unsigned_abs()));
            member.give(give, "the host, which is short");
            free += i128::from(give);
        }
    }
    let mut order: Vec<usize> = (0..members.len()).rev().collect();
    order.sort_by_key(|nth| members[*nth].size >= members[*nth].right);
    for taker in order {
        grow(&mut members, taker, &mut free);
    }
    for member in &members {
        decisions[member.at] = member.decision();
    }
    decisions
}

/// Grows one member by its chunk, if it is under pressure and somebody has the memory.
fn grow(members: &mut [Member], taker: usize, free: &mut i128) {
    let member = &members[taker];
    if member.demand <= member.size || !member.gave.is_empty() {
        return;
    }
    let mut wanted = member
        .guest
        .config
        .chunk_kb
        .min(member.largest - member.size);
    let from_free = wanted.min(units_in(*free));
    if from_free > 0 {
        members[taker].take(from_free, "free memory");
        *free -= i128::from(from_free);
        wanted -= from_free;
    }
    for giver in 0..members.len() {
        if giver == taker {
            continue;
        }
        let spare = members[giver].spare();
        let owed = members[taker].right.saturating_sub(members[taker].size);
        let give = members[giver].can_give().min(wanted).min(spare.max(owed));
        if give == 0 || !members[giver].got.is_empty() {
            continue;
        }
        let (taker_name, giver_name) = (
            members[taker].guest.config.name.clone(),
            members[giver].guest.config.name.clone(),
        );
        members[giver].give(give, &taker_name);
        members[taker].take(give, &giver_name);
        wanted -= give;
    }
}

impl<'a> Member<'a> {
    fn new(at: usize, guest: &'a Guest<'a>) -> Option<Self> {
        let config = guest.config;
        let entitlement = config.entitlement_kb.filter(|_| config.amr)?;
        let least = guest.floor_kb().div_ceil(UNIT) * UNIT;
        let largest = guest.ceiling_kb() / UNIT * UNIT;
        // Bounds without a multiple of the unit between them leave nothing to move.
        if least > largest {
            return None;
        }
        let right = (entitlement.div_ceil(UNIT) * UNIT).clamp(least, largest);
        let current = guest.figures.current_kb;
        let mut size = (current / UNIT * UNIT).clamp(least, largest);
        if current >= entitlement {
            size = size.max(right);
        }
        Some(Self {
            at,
            guest,
            size,
            least,
            largest,
            right,
            demand: guest.demand_kb(),
            pressure: guest.figures.pressure_percent(),
            gave: Vec::new(),
            got: Vec::new(),
        })
    }

    /// What its right lets it give.
    fn can_give(&self) -> u64 {
        self.size.saturating_sub(self.right.max(self.least))
    }

    /// What it does not need itself.
    fn spare(&self) -> u64 {
        self.size.saturating_sub(self.demand) / UNIT * UNIT
    }

    fn give(&mut self, kb: u64, to: &str) {
        if kb > 0 {
            self.size -= kb;
            self.gave.push(format!("gives {} to {to}", long_kb(kb)));
        }
    }

    fn take(&mut self, kb: u64, from: &str) {
        self.size += kb;
        self.got
            .push(format!("grows by {} from {from}", long_kb(kb)));
    }

    fn decision(&self) -> Decision {
        let mut moves: Vec<&str> = self
            .gave
            .iter()
            .chain(&self.got)
            .map(String::as_str)
            .collect();
        if moves.is_empty() {
            moves.push(if self.demand <= self.size {
                "not under pressure, stays"
            } else if self.size == self.largest {
                "at its largest, stays"
            } else {
                "under pressure, but nobody has memory to give"
            });
        }
        let reason = format!(
            "entitlement {}, pressure {}%: {}",
            long_kb(self.right),
            self.pressure,
            moves.join(", ")
        );
        Decision {
            target_kb: self.size,
            reason,
        }
    }
}

fn stays(guest: &Guest) -> Decision {
    let config = guest.config;
    let why = match (config.amr, config.entitlement_kb) {
        (false, _) => "amr is off",
        (true, None) => "it has no entitlement",
        (true, Some(_)) => "no multiple of 64M lies within its bounds",
    };
    let target_kb = guest.within_bounds(guest.figures.current_kb);
    Decision {
        target_kb,
        reason: format!("entitlement: {why}, stays"),
    }
}

/// Whole units in a free amount.
fn units_in(free: i128) -> u64 {
    u64::try_from(free.max(0)).unwrap_or(u64::MAX) / UNIT * UNIT
}

/// Whole units that cover a lack.
fn units_for(lack: u128) -> u64 {
    u64::try_from(lack.div_ceil(u128::from(UNIT)) * u128::from(UNIT)).unwrap_or(u64::MAX)
}
