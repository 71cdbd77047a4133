// SPDX-License-Identifier: GPL-2.0

//! The loop that moves the balloons, as a state machine: it sees, it orders, it has no clock and does
//! no I/O.
//!
//! A step of the policies says how large each guest should be. The way there has two phases: memory
//! is taken first, and given only when it was seen to have arrived at the host. So the host is
//! consistent whenever the loop is stopped, and one that starts anew goes on from what it sees.
//!
//! A guest that makes no progress for [`INACTIVE_S`] is left out, and the others share without it;
//! after [`UNCOOPERATIVE_S`] it is called so and tried again with longer and longer pauses. One that
//! swaps or refaults after its memory was taken gets it back and is left in peace for a while. One
//! that somebody else moved is left to him.

mod guest;

pub use guest::{Conduct, Decision, Guest, Tally};

use crate::config::{Config, VmConfig};
use crate::policy::{self, Asked};
use crate::snapshot::{HostSample, Snapshot, VmSample};
use crate::units::long_kb;
use serde::Serialize;
use std::collections::BTreeMap;

/// Seconds without progress after which a guest is left out.
pub const INACTIVE_S: f64 = 5.0;
/// Seconds without progress after which a guest is called uncooperative.
pub const UNCOOPERATIVE_S: f64 = 20.0;
/// First and longest pause before an uncooperative guest is tried again, in seconds.
pub const RETRY_S: (f64, f64) = (20.0, 900.0);
/// How long a guest is left to somebody else who moved its balloon, in seconds.
pub const HOLD_S: f64 = 300.0;
/// How long after memory was taken the guest is watched for stress, in seconds.
pub const WATCH_S: f64 = 60.0;
/// First and longest peace of a guest that was under stress, in seconds.
pub const PEACE_S: (f64, f64) = (30.0, 900.0);
/// Swap-in after memory was taken that counts as stress.
pub const STRESS_SWAP_KB: u64 = 1 << 10;
/// Refaults after memory was taken that count as stress.
pub const STRESS_REFAULTS: u64 = 4096;
/// Difference of sizes that means nothing.
pub const TOLERANCE_KB: u64 = 1 << 10;
/// Movement away from what was ordered that only somebody else can have caused.
const FOREIGN_KB: u64 = 8 << 10;
/// How old the news of a guest may be, in seconds: so long it may seem to go the old way.
const NEWS_S: f64 = 3.0;
/// Least and relative change that is worth an order.
const DEAD_BAND: (u64, u64) = (16 << 10, 64);
/// Unit of the largest change in one step, and its parts of a guest's size when taking and giving.
const STEP_KB: u64 = 64 << 10;
const TAKE_PART: u64 = 8;
const GIVE_PART: u64 = 4;

/// How short of memory the host is, in the module's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum HostState {
    /// Plenty.
    High,
    /// Huge pages are split and shared.
    Clear,
    /// Balloons are asked for.
    Soft,
    /// Memory is compressed and swapped.
    Hard,
    /// VMs wait.
    Low,
}

impl HostState {
    /// The state of that word.
    pub fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "high" => Self::High,
            "clear" => Self::Clear,
            "soft" => Self::Soft,
            "hard" => Self::Hard,
            "low" => Self::Low,
            _ => return None,
        })
    }
}

/// One guest, as it is seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// What the policies need.
    pub sample: VmSample,
    /// Read from the guest's swap since it started.
    pub swap_in_kb: Option<u64>,
    /// Faults on pages that had been taken away, or that the guest had dropped and read again.
    pub refaults: Option<u64>,
    /// Memory that it has without holding it: shared, or known to be zero.
    pub shared_kb: Option<u64>,
}

/// Host and guests at one time.
#[derive(Debug, Clone, PartialEq)]
pub struct Observation {
    /// Seconds of a clock that never goes back.
    pub now_s: f64,
    /// The module's state; `None` where it has none.
    pub state: Option<HostState>,
    /// The host's memory.
    pub host: HostSample,
    /// The guests.
    pub vms: Vec<Seen>,
}

/// A size to be written to a guest's balloon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Order {
    /// Which guest.
    pub name: String,
    /// Its size.
    pub kb: u64,
    /// Why.
    pub why: String,
}

/// Properties that keep guests and host safe, each with a switch so that a test can show what it
/// is good for. All are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Safety {
    /// Give only what has arrived at the host.
    pub arrival: bool,
    /// No Linux guest below what it needs to live.
    pub floor: bool,
    /// Share without guests that make no progress.
    pub stall: bool,
    /// Longer and longer pauses for uncooperative guests.
    pub back_off: bool,
    /// Give memory back to guests under stress.
    pub stress: bool,
    /// No orders for small differences.
    pub dead_band: bool,
    /// No large steps.
    pub steps: bool,
    /// Leave guests to somebody else who moved them.
    pub respect: bool,
    /// Call off what a loop before this one may have granted.
    pub fresh_start: bool,
}

impl Default for Safety {
    fn default() -> Self {
        Self {
            arrival: true,
            floor: true,
            stall: true,
            back_off: true,
            stress: true,
            dead_band: true,
            steps: true,
            respect: true,
            fresh_start: true,
        }
    }
}

/// What a Linux guest of this size needs to live: piecewise linear, as the kernel's Hyper-V balloon
/// driver has it.
pub fn linux_floor_kb(size_kb: u64) -> u64 {
    const MIB: u64 = 1 << 10;
    let (base_mib, part) = match size_kb / MIB {
        0..128 => (8, 2),
        128..512 => (40, 4),
        512..2048 => (104, 8),
        2048..8192 => (232, 16),
        _ => (488, 32),
    };
    (base_mib * MIB + size_kb / part).min(size_kb)
}

/// The loop's memory of its guests.
#[derive(Debug, Clone, Default)]
pub struct Controller {
    safety: Safety,
    guests: BTreeMap<String, Guest>,
    decided_s: Option<f64>,
    last_s: Option<f64>,
    admission_ok: bool,
}

impl Controller {
    /// One that knows nothing yet.
    pub fn new(safety: Safety) -> Self {
        Self {
            safety,
            ..Self::default()
        }
    }

    /// What is known about each guest.
    pub fn guests(&self) -> &BTreeMap<String, Guest> {
        &self.guests
    }

    /// Whether the host could hold all guests at their least, at the last step.
    pub fn admission_ok(&self) -> bool {
        self.admission_ok
    }

    /// Leaves a guest to the policies again that somebody else had moved.
    pub fn release(&mut self, name: &str) {
        if let Some(guest) = self.guests.get_mut(name) {
            guest.release();
        }
    }

    /// Makes the next tick decide anew, whatever the time.
    pub fn decide_next(&mut self) {
        self.decided_s = None;
    }

    /// Sees, decides when it is time, and orders. To be called about once a second, and at once
    /// when the host's state gets worse.
    pub fn tick(&mut self, config: &Config, seen: &Observation, asked: &Asked) -> Vec<Order> {
        let now = seen.now_s;
        let mut orders = self.observe(config, seen);
        let since = self.decided_s.map(|at| now - at);
        let short = seen.state >= Some(HostState::Soft);
        if short || since.is_none_or(|since| since >= config.host.interval_s as f64) {
            self.decided_s = Some(now);
            self.decide(config, seen, asked, &mut orders);
        }
        self.give(config, seen, &mut orders);
        self.last_s = Some(now);
        orders
    }

    /// Updates every guest's conduct by what it did since the last tick.
    fn observe(&mut self, config: &Config, seen: &Observation) -> Vec<Order> {
        self.guests
            .retain(|name, _| seen.vms.iter().any(|vm| vm.sample.name == *name));
        let mut orders = Vec::new();
        for vm in &seen.vms {
            let Some(current) = vm.sample.current_kb else {
                continue;
            };
            let name = &vm.sample.name;
            let is_new = !self.guests.contains_key(name);
            let guest = self
                .guests
                .entry(name.clone())
                .or_insert_with(|| Guest::new(seen.now_s, current));
            if is_new && self.safety.fresh_start && config.vm(name).is_some() {
                // A loop before this one may have granted it more, and nobody can be asked how much.
                let why = "seen for the first time: what it has is what it shall have".to_owned();
                orders.push(Order {
                    name: name.clone(),
                    kb: current,
                    why,
                });
            }
            if let Some((kb, why)) = guest.observe(seen.now_s, vm, current, &self.safety) {
                orders.push(Order {
                    name: name.clone(),
                    kb,
                    why: why.to_owned(),
                });
            }
        }
        orders
    }

    /// One step of the policies over those guests that take part; orders what is to be taken, and
    /// notes what is to be given.
    fn decide(
        &mut self,
        config: &Config,
        seen: &Observation,
        asked: &Asked,
        orders: &mut Vec<Order>,
    ) {
        let takes_part = |vm: &&Seen| match self.guests.get(&vm.sample.name) {
            Some(guest) => guest.takes_part() || !self.safety.stall && !guest.is_held(),
            None => false,
        };
        let vms = seen
            .vms
            .iter()
            .filter(takes_part)
            .map(|vm| vm.sample.clone())
            .collect();
        let snapshot = Snapshot {
            now_s: seen.now_s,
            host: seen.host,
            vms,
        };
        let plan = policy::step(config, &snapshot, asked);
        self.admission_ok = plan.admission_ok;
        for guest in self.guests.values_mut() {
            guest.forget_plan();
        }
        for target in plan.targets {
            let (Some(guest), Some(vm)) =
                (self.guests.get_mut(&target.name), config.vm(&target.name))
            else {
                continue;
            };
            let sample = snapshot.vms.iter().find(|vm| vm.name == target.name);
            let Some(wanted) = target.target_kb.filter(|_| target.ready) else {
                guest.not_ready(seen.now_s, target.reason);
                if let Some(sample) = sample {
                    guest.note_inputs(sample, seen.host);
                }
                continue;
            };
            // What was asked for by hand is meant to the last MiB.
            let by_hand = asked.of(&target.name).is_some();
            let safety = Safety {
                dead_band: self.safety.dead_band && !by_hand,
                ..self.safety
            };
            let (shaped, why) = shape(guest, vm, wanted, &target.reason, seen.now_s, &safety);
            let order = guest.plan(seen.now_s, wanted, shaped, &why);
            if let Some(sample) = sample {
                guest.note_inputs(sample, seen.host);
            }
            if let Some(kb) = order {
                orders.push(Order {
                    name: target.name,
                    kb,
                    why,
                });
            }
        }
    }

    /// Gives what there is to those who wait for it.
    fn give(&mut self, config: &Config, seen: &Observation, orders: &mut Vec<Order>) {
        let elapsed_s = self.last_s.map_or(0.0, |last| seen.now_s - last);
        let mut needs = Vec::new();
        for (name, guest) in &self.guests {
            if let Some(kb) = guest.waits_for() {
                needs.push((name.clone(), kb));
            }
        }
        let all: u128 = needs.iter().map(|(_, kb)| u128::from(*kb)).sum();
        let budget = if self.safety.arrival {
            u128::try_from(self.budget(config, seen)).unwrap_or(0)
        } else {
            all
        };
        for (name, need) in needs {
            let Some(guest) = self.guests.get_mut(&name) else {
                continue;
            };
            let part = u128::from(need) * budget.min(all) / all.max(1);
            let part = u64::try_from(part).unwrap_or(need);
            // Small change is not worth a message; it adds up to a larger one.
            if part < need.min(DEAD_BAND.0) {
                guest.wait(elapsed_s);
                continue;
            }
            if let Some(kb) = guest.grant(seen.now_s, part) {
                let why = guest.reason().to_owned();
                orders.push(Order { name, kb, why });
            }
        }
    }

    /// Host memory that nobody holds and nobody was promised: a guest may touch all that its balloon
    /// leaves it at any time. What it shares it has already; that costs memory when sharing breaks,
    /// and is kept back as far as the operator does not take that risk.
    pub fn budget(&self, config: &Config, seen: &Observation) -> i128 {
        let kept = i128::from(config.host.slush_kb) + i128::from(seen.host.reserved_kb);
        let mut free = i128::from(seen.host.available_kb) - kept;
        for vm in &seen.vms {
            let (Some(resident), Some(guest)) =
                (vm.sample.resident_kb, self.guests.get(&vm.sample.name))
            else {
                continue;
            };
            if config.vm(&vm.sample.name).is_some() {
                let risk = u128::from(config.host.unshare_risk_percent.min(100));
                let shared = u128::from(vm.shared_kb.unwrap_or(0)) * risk / 100;
                let untouched = u128::from(guest.promised_kb().saturating_sub(resident));
                free -= i128::try_from(untouched.saturating_sub(shared)).unwrap_or(i128::MAX);
            }
        }
        free
    }
}

/// Bends what the policy wants to what may be ordered now.
fn shape(
    guest: &Guest,
    vm: &VmConfig,
    wanted: u64,
    reason: &str,
    now_s: f64,
    safety: &Safety,
) -> (u64, String) {
    let mut kb = wanted;
    let mut why = reason.to_owned();
    let floor = linux_floor_kb(vm.static_max_kb).min(vm.ceiling_kb());
    if safety.floor && kb < floor {
        kb = floor;
        why.push_str(&format!(
            "; not below {}, which Linux needs",
            long_kb(floor)
        ));
    }
    if let Some(keep) = guest.keeps(now_s).filter(|keep| *keep > kb) {
        kb = keep.min(vm.ceiling_kb());
        why.push_str("; it swapped or refaulted when memory was taken, so it keeps what it had");
    }
    let current = guest.current_kb();
    let outside = current < vm.dynamic_min_kb || current > vm.ceiling_kb();
    let band = DEAD_BAND.0.max(current / DEAD_BAND.1);
    // One that is on its way goes on to where it was sent, and is not stopped just before it.
    match guest.on_its_way_to() {
        Some(to) if safety.dead_band && kb.abs_diff(to) < band => return (to, why),
        None if safety.dead_band && !outside && kb.abs_diff(current) < band => {
            return (current, why + "; too small a change");
        }
        _ => {}
    }
    if safety.steps {
        let step = |part: u64| (current / part / STEP_KB * STEP_KB).max(STEP_KB);
        // A step that is under way is not made smaller because a part of it is done.
        let under_way = guest.on_its_way_to().unwrap_or(current);
        let least = current.saturating_sub(step(TAKE_PART)).min(under_way);
        let most = current.saturating_add(step(GIVE_PART)).max(under_way);
        if kb < least || kb > most {
            kb = kb.clamp(least, most);
            why.push_str("; step by step");
        }
    }
    (kb, why)
}

#[cfg(test)]
mod sim;
#[cfg(test)]
mod tests;
