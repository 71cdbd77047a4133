// SPDX-License-Identifier: GPL-2.0

//! Policies: how much memory each guest should have.
//!
//! Pure functions from a configuration, a snapshot and what the operator asked for to targets with
//! reasons: no I/O, no clock. The sizes that they give are steady: applied, they are given again.

mod entitlement;
mod pressure;
mod proportional;
mod shares;

use crate::config::{Config, VmConfig};
use crate::snapshot::{Figures, Snapshot};
use crate::units::long_kb;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Which rule sizes a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PolicyKind {
    /// All guests at the same part of the way between their bounds (XCP's squeezed).
    #[default]
    Proportional,
    /// What each has committed, and a buffer (Hyper-V's dynamic memory).
    Pressure,
    /// A right to some memory, more of it by chunks (HP's automatic memory reallocation).
    Entitlement,
    /// By shares, idle memory taxed (ESX's min-funding revocation).
    Shares,
    /// What the operator asks, kept.
    Manual,
}

impl PolicyKind {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Proportional,
        Self::Pressure,
        Self::Entitlement,
        Self::Shares,
        Self::Manual,
    ];

    /// As it is written in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Proportional => "proportional",
            Self::Pressure => "pressure",
            Self::Entitlement => "entitlement",
            Self::Shares => "shares",
            Self::Manual => "manual",
        }
    }
}

/// A guest that takes part in a step.
#[derive(Debug, Clone, Copy)]
struct Guest<'a> {
    config: &'a VmConfig,
    figures: Figures,
}

impl Guest<'_> {
    /// Least that it may be given: its minimum, or what the module reserves for it.
    fn floor_kb(&self) -> u64 {
        let floor = self.config.dynamic_min_kb.max(self.figures.reservation_kb);
        floor.min(self.ceiling_kb())
    }

    /// Most that it may be given: its maximum, or what the module limits it to.
    fn ceiling_kb(&self) -> u64 {
        let ceiling = self.config.ceiling_kb().min(self.figures.limit_kb);
        ceiling.max(self.config.dynamic_min_kb)
    }

    /// What it has, brought within its bounds.
    fn within_bounds(&self, kb: u64) -> u64 {
        kb.clamp(self.floor_kb(), self.ceiling_kb())
    }

    /// Committed memory and its buffer, within the bounds.
    fn demand_kb(&self) -> u64 {
        let committed = u128::from(self.figures.committed_kb);
        let wanted = committed * u128::from(100 + self.config.buffer_percent) / 100;
        self.within_bounds(u64::try_from(wanted).unwrap_or(u64::MAX))
    }
}

/// What the guests of one policy may use together.
#[derive(Debug, Clone, Copy)]
struct Budget {
    /// Host memory that is free for them; negative where the host is short.
    free_kb: i128,
    /// That and what they hold already.
    pool_kb: i128,
    /// How much dearer idle memory is.
    idle_tax_percent: u64,
}

/// A size and why.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Decision {
    target_kb: u64,
    reason: String,
}

/// What was asked for; it outlives the steps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Asked {
    /// Sizes in KiB by VM; a VM that is named here is under `manual`.
    pub sizes: BTreeMap<String, u64>,
    /// What guests' own roots ask for; the operator goes before them.
    pub by_guest: BTreeMap<String, u64>,
}

impl Asked {
    /// What somebody asks for a VM, and who.
    pub fn of(&self, name: &str) -> Option<(u64, &'static str)> {
        let by_hand = self.sizes.get(name).map(|kb| (*kb, "asked for by hand"));
        by_hand.or_else(|| Some((*self.by_guest.get(name)?, "asked for by the guest's root")))
    }
}

/// What one guest should have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Target {
    /// Its name.
    pub name: String,
    /// Its size; `None` where not even its present size is known.
    pub target_kb: Option<u64>,
    /// Whether it is to be acted on: the guest is configured and everything is known about it.
    #[serde(skip)]
    pub ready: bool,
    /// Why.
    pub reason: String,
}

/// One step of the policies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// One for each VM of the snapshot, in its order.
    pub targets: Vec<Target>,
    /// Whether the host can hold all of them at their least.
    pub admission_ok: bool,
}

/// Decides the size of every guest of the snapshot.
pub fn step(config: &Config, snapshot: &Snapshot, asked: &Asked) -> Plan {
    let mut decisions: BTreeMap<&str, Decision> = BTreeMap::new();
    let mut groups: BTreeMap<PolicyKind, Vec<Guest>> = BTreeMap::new();
    for sample in &snapshot.vms {
        if let (Some(vm), Ok(figures)) = (config.vm(&sample.name), sample.figures()) {
            // Who was sized by hand stays so, whatever the policy.
            let kind = if asked.of(&vm.name).is_some() {
                PolicyKind::Manual
            } else {
                config.policy_of(vm)
            };
            groups.entry(kind).or_default().push(Guest {
                config: vm,
                figures,
            });
        }
    }

    let host = &snapshot.host;
    let kept = i128::from(config.host.slush_kb) + i128::from(host.reserved_kb);
    let mut free = i128::from(host.available_kb) - kept;
    // What the operator asks is given first; the others share what is left.
    for guest in groups.remove(&PolicyKind::Manual).unwrap_or_default() {
        let decision = manual(&guest, asked);
        free -= i128::from(decision.target_kb.saturating_sub(guest.figures.current_kb));
        decisions.insert(&guest.config.name, decision);
    }
    let spread = |guests: &[Guest]| -> i128 {
        guests
            .iter()
            .map(|guest| i128::from(guest.ceiling_kb() - guest.floor_kb()))
            .sum()
    };
    let all_spread: i128 = groups.values().map(|guests| spread(guests)).sum();
    for (kind, guests) in &groups {
        // Several policies on one host share the free memory by the width of their guests' bounds.
        let free_kb = match groups.len() {
            1 => free,
            count if all_spread == 0 => free.div_euclid(count as i128),
            _ => (free * spread(guests)).div_euclid(all_spread),
        };
        let resident: i128 = guests
            .iter()
            .map(|guest| i128::from(guest.figures.resident_kb))
            .sum();
        let budget = Budget {
            free_kb,
            pool_kb: free_kb + resident,
            idle_tax_percent: config.host.idle_tax_percent,
        };
        let sized = match kind {
            PolicyKind::Proportional => proportional::size(&budget, guests),
            PolicyKind::Pressure => pressure::size(&budget, guests),
            PolicyKind::Entitlement => entitlement::size(&budget, guests),
            PolicyKind::Shares => shares::size(&budget, guests),
            PolicyKind::Manual => Vec::new(),
        };
        for (guest, decision) in guests.iter().zip(sized) {
            decisions.insert(&guest.config.name, decision);
        }
    }

    let targets = snapshot.vms.iter().map(|sample| {
        let (target_kb, ready, reason) = match decisions.remove(sample.name.as_str()) {
            Some(decision) => (Some(decision.target_kb), true, decision.reason),
            None if config.vm(&sample.name).is_none() => (
                sample.current_kb,
                false,
                "not configured: left alone".to_owned(),
            ),
            None => {
                let missing = sample.figures().err().unwrap_or_default().join(", ");
                (
                    sample.current_kb,
                    false,
                    format!("not ready: no {missing}; left alone"),
                )
            }
        };
        Target {
            name: sample.name.clone(),
            target_kb,
            ready,
            reason,
        }
    });
    Plan {
        targets: targets.collect(),
        admission_ok: minima_fit(config, snapshot),
    }
}

/// Whether the dynamic minima and overheads of the snapshot's VMs fit into the host.
fn minima_fit(config: &Config, snapshot: &Snapshot) -> bool {
    let running = snapshot
        .vms
        .iter()
        .filter_map(|sample| config.vm(&sample.name));
    let needed: u128 = running
        .map(|vm| u128::from(vm.dynamic_min_kb) + u128::from(config.host.vm_overhead_kb))
        .sum();
    let kept = u128::from(config.host.slush_kb) + u128::from(snapshot.host.reserved_kb);
    needed + kept <= u128::from(snapshot.host.total_kb)
}

fn manual(guest: &Guest, asked: &Asked) -> Decision {
    let (wanted, who) = match asked.of(&guest.config.name) {
        Some(asked) => asked,
        None => match guest.config.start_target_kb {
            Some(kb) => (kb, "start_target"),
            None => (guest.figures.current_kb, "nothing asked for: kept"),
        },
    };
    let target_kb = guest.within_bounds(wanted);
    let mut reason = format!("manual: {who}, {}", long_kb(wanted));
    if target_kb != wanted {
        reason.push_str(", brought within its bounds");
    }
    Decision { target_kb, reason }
}

#[cfg(test)]
mod tests;
