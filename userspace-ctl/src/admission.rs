// SPDX-License-Identifier: GPL-2.0

//! Whether one more VM may start, and what is kept for it until it runs.
//!
//! Pure: what is running, what is reserved and what is asked for go in, an answer with a reason comes
//! out. A VM may start when all minima fit into the host, when its minimum is there now, and when
//! memory is left for the part of all sharing breaking at once that the operator wants backed.

use crate::units::long_kb;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a VM that runs has a claim to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Running {
    /// Least that it may be left with: its `dynamic_min`, or what it holds where it has none.
    pub min_kb: u64,
    /// Host memory that it holds.
    pub resident_kb: u64,
}

/// The host as it is now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Situation {
    /// All memory.
    pub total_kb: u64,
    /// What can be had without swapping.
    pub available_kb: u64,
    /// What sharing saves: what it would cost if all of it broke.
    pub saved_kb: u64,
    /// Kept back from all VMs.
    pub slush_kb: u64,
    /// What each VM costs beside its memory.
    pub overhead_kb: u64,
    /// The VMs that run, by name.
    pub running: BTreeMap<String, Running>,
}

/// A VM that is to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applicant {
    /// Its name, also that of its reservation.
    pub name: String,
    /// Least that it can run with.
    pub min_kb: u64,
    /// Most that it may get.
    pub max_kb: u64,
    /// Part of all sharing breaking that need not be backed by memory.
    pub unshare_risk_percent: u64,
}

/// What is kept for a VM that starts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reservation {
    /// The VM.
    pub name: String,
    /// Its minimum.
    pub min_kb: u64,
    /// Until when, in seconds of the keeper's clock.
    pub until_s: f64,
    /// It was admitted; else it still waits for the memory.
    pub admitted: bool,
}

/// All reservations, by VM.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Reservations(BTreeMap<String, Reservation>);

impl Reservations {
    /// Adds one, or replaces the one of that VM.
    pub fn put(&mut self, reservation: Reservation) {
        self.0.insert(reservation.name.clone(), reservation);
    }

    /// Ends the one of that VM; `false` where there is none.
    pub fn cancel(&mut self, name: &str) -> bool {
        self.0.remove(name).is_some()
    }

    /// All of them, by name.
    pub fn all(&self) -> impl Iterator<Item = &Reservation> {
        self.0.values()
    }

    /// The one of that VM.
    pub fn get(&self, name: &str) -> Option<&Reservation> {
        self.0.get(name)
    }

    /// Ends those whose time is over and those whose VM has come: `arrived` says so of a VM that is
    /// accounted for by itself, and one that holds its minimum needs no keeping either. The names of
    /// those that ended.
    pub fn expire(
        &mut self,
        now_s: f64,
        running: &BTreeMap<String, Running>,
        arrived: impl Fn(&str) -> bool,
    ) -> Vec<String> {
        let holds = |kept: &Reservation| {
            running
                .get(&kept.name)
                .is_some_and(|vm| vm.resident_kb >= kept.min_kb)
        };
        let ended: Vec<String> = self
            .0
            .values()
            .filter(|kept| {
                now_s >= kept.until_s || kept.admitted && (arrived(&kept.name) || holds(kept))
            })
            .map(|kept| kept.name.clone())
            .collect();
        for name in &ended {
            self.0.remove(name);
        }
        ended
    }

    /// Available memory that is spoken for: what the VMs that start have not taken yet.
    pub fn outstanding_kb(&self, situation: &Situation) -> u64 {
        self.outstanding_but(situation, None)
    }

    fn outstanding_but(&self, situation: &Situation, but: Option<&str>) -> u64 {
        self.0
            .values()
            .filter(|kept| Some(kept.name.as_str()) != but)
            .map(|kept| {
                let holds = situation.running.get(&kept.name);
                let holds = holds.map_or(0, |vm| vm.resident_kb);
                kept.min_kb
                    .saturating_add(situation.overhead_kb)
                    .saturating_sub(holds)
            })
            .fold(0, u64::saturating_add)
    }
}

/// Sum of the minima and overheads of all that run or were promised to.
fn minima_kb(situation: &Situation, reservations: &Reservations, but: &str) -> u128 {
    let mut minima: BTreeMap<&str, u64> = situation
        .running
        .iter()
        .map(|(name, vm)| (name.as_str(), vm.min_kb))
        .collect();
    for kept in reservations.all() {
        let min = minima.entry(&kept.name).or_default();
        *min = kept.min_kb.max(*min);
    }
    minima.remove(but);
    minima
        .values()
        .map(|min| u128::from(*min) + u128::from(situation.overhead_kb))
        .sum()
}

/// Why a VM may not start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Whether memory that guests could still give may change the answer.
    pub may_pass: bool,
    /// In words, with the figures.
    pub reason: String,
}

/// Decides. The answer is what of its maximum the VM could have now: its minimum is certain, and what
/// is above depends on what the policies make of it.
///
/// # Errors
///
/// [`Refusal`], with the first of the three conditions that does not hold.
pub fn admit(
    situation: &Situation,
    reservations: &Reservations,
    applicant: &Applicant,
) -> Result<u64, Refusal> {
    let needs = u128::from(applicant.min_kb) + u128::from(situation.overhead_kb);
    let slush = u128::from(situation.slush_kb);
    let total = u128::from(situation.total_kb);
    let others = minima_kb(situation, reservations, &applicant.name);
    if others + needs + slush > total {
        let reason = format!(
            "the minima do not fit: {} for {}, {} for the other VMs and {} of slush are more than the \
             host's {}",
            long(needs),
            applicant.name,
            long(others),
            long(slush),
            long(total),
        );
        return Err(Refusal {
            may_pass: false,
            reason,
        });
    }
    let spoken_for = u128::from(reservations.outstanding_but(situation, Some(&applicant.name)));
    let available = u128::from(situation.available_kb);
    if needs + spoken_for + slush > available {
        let reason = format!(
            "not enough is free now: {} are available, {} of it kept for others and as slush, and {} \
             needs {}",
            long(available),
            long(spoken_for + slush),
            applicant.name,
            long(needs),
        );
        return Err(Refusal {
            may_pass: true,
            reason,
        });
    }
    let backed_percent = 100 - u128::from(applicant.unshare_risk_percent.min(100));
    let broken = u128::from(situation.saved_kb) * backed_percent / 100;
    let spare = available.checked_sub(needs + spoken_for + slush + broken);
    let Some(spare) = spare else {
        let reason = format!(
            "if all sharing broke, {} more would be needed, and {backed_percent}% of that ({}) has to \
             be backed by memory (unshare risk {}%): with {} for {} that is more than the {} that are \
             available",
            long_kb(situation.saved_kb),
            long(broken),
            applicant.unshare_risk_percent,
            long(needs + spoken_for + slush),
            applicant.name,
            long(available),
        );
        return Err(Refusal {
            may_pass: true,
            reason,
        });
    };
    let spare = u64::try_from(spare).unwrap_or(u64::MAX);
    let room_kb = applicant.min_kb.saturating_add(spare);
    Ok(room_kb.min(applicant.max_kb))
}

/// What an admitted VM is told of its maximum.
pub fn room(applicant: &Applicant, room_kb: u64) -> String {
    let max = long_kb(applicant.max_kb);
    if applicant.max_kb <= applicant.min_kb {
        String::new()
    } else if room_kb >= applicant.max_kb {
        format!("; its maximum of {max} is there now")
    } else {
        let room = long_kb(room_kb);
        format!("; of its maximum of {max} {room} are there now, more only as others give it")
    }
}

fn long(kb: u128) -> String {
    long_kb(u64::try_from(kb).unwrap_or(u64::MAX))
}

/// One guest, when another one's entitlement is to be raised.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Claim {
    /// Its name.
    pub name: String,
    /// What it has a right to: its entitlement, else its minimum; with the overhead of a VM.
    pub right_kb: u64,
    /// What its balloon leaves it.
    pub current_kb: u64,
    /// What may be taken from it for another one's right.
    pub spare_kb: u64,
}

/// Whether the guest `name` may be given a right to `to_kb`: all rights have to fit into the host,
/// and what it has not got yet must be free or in the hands of those who have more than their right.
///
/// # Errors
///
/// A sentence with the figures.
pub fn raise(
    total_kb: u64,
    free_kb: i128,
    claims: &[Claim],
    name: &str,
    to_kb: u64,
) -> Result<(), String> {
    let others = || claims.iter().filter(|claim| claim.name != name);
    let rights: u128 = others().map(|claim| u128::from(claim.right_kb)).sum();
    if rights + u128::from(to_kb) > u128::from(total_kb) {
        return Err(format!(
            "{name} cannot have a right to {}: the other VMs have rights to {}, and the host has {}",
            long_kb(to_kb),
            long(rights),
            long_kb(total_kb)
        ));
    }
    let Some(own) = claims.iter().find(|claim| claim.name == name) else {
        return Ok(());
    };
    let lack = i128::from(to_kb.saturating_sub(own.current_kb));
    let spare: i128 = others().map(|claim| i128::from(claim.spare_kb)).sum();
    if lack > free_kb.max(0) + spare {
        let there = u64::try_from(free_kb.max(0) + spare).unwrap_or(u64::MAX);
        return Err(format!(
            "{name} has {} and cannot have a right to {}: only {} more can be got, free or from VMs \
             above their rights",
            long_kb(own.current_kb),
            long_kb(to_kb),
            long_kb(there)
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const G: u64 = 1 << 20;

    fn host(available_kb: u64, saved_kb: u64, running: &[(&str, u64, u64)]) -> Situation {
        Situation {
            total_kb: 16 * G,
            available_kb,
            saved_kb,
            slush_kb: 0,
            overhead_kb: 0,
            running: running
                .iter()
                .map(|(name, min_kb, resident_kb)| {
                    let vm = Running {
                        min_kb: *min_kb,
                        resident_kb: *resident_kb,
                    };
                    ((*name).to_owned(), vm)
                })
                .collect(),
        }
    }

    fn wants(name: &str, min_kb: u64, unshare_risk_percent: u64) -> Applicant {
        Applicant {
            name: name.to_owned(),
            min_kb,
            max_kb: min_kb,
            unshare_risk_percent,
        }
    }

    fn kept(name: &str, min_kb: u64) -> Reservation {
        Reservation {
            name: name.to_owned(),
            min_kb,
            until_s: 60.0,
            admitted: true,
        }
    }

    #[test]
    fn minima_overheads_and_slush_have_to_fit() {
        let none = Reservations::default();
        let mut now = host(8 * G, 0, &[("a", 10 * G, 4 * G)]);
        assert!(admit(&now, &none, &wants("b", 6 * G, 100)).is_ok());
        let refused = admit(&now, &none, &wants("b", 6 * G + 1, 100)).unwrap_err();
        assert!(!refused.may_pass && refused.reason.contains("the minima do not fit"));
        now.slush_kb = 1;
        assert!(admit(&now, &none, &wants("b", 6 * G, 100)).is_err());
        now.slush_kb = 0;
        now.overhead_kb = 1;
        assert!(admit(&now, &none, &wants("b", 6 * G - 1, 100)).is_err());
        assert!(admit(&now, &none, &wants("b", 6 * G - 2, 100)).is_ok());
        // One that is asked for again is not counted twice.
        assert!(admit(&now, &none, &wants("a", 8 * G - 1, 100)).is_ok());
    }

    #[test]
    fn what_is_not_there_yet_may_come() {
        let now = host(G, 0, &[("a", 2 * G, 15 * G)]);
        let refused = admit(&now, &Reservations::default(), &wants("b", 2 * G, 100)).unwrap_err();
        assert!(
            refused.may_pass && refused.reason.contains("not enough is free now"),
            "{refused:?}"
        );
    }

    #[test]
    fn sharing_that_breaks_has_to_be_backed_as_far_as_wanted() {
        let now = host(4 * G, 4 * G, &[("a", G, 12 * G)]);
        let none = Reservations::default();
        assert!(admit(&now, &none, &wants("b", 2 * G, 100)).is_ok());
        assert!(admit(&now, &none, &wants("b", 2 * G, 50)).is_ok());
        let refused = admit(&now, &none, &wants("b", 2 * G, 49)).unwrap_err();
        assert!(
            refused
                .reason
                .contains("if all sharing broke, 4.0 GiB more"),
            "{refused:?}"
        );
    }

    #[test]
    fn the_answer_says_what_of_the_maximum_is_there() {
        let none = Reservations::default();
        let grows = |max_kb, risk| Applicant {
            max_kb,
            ..wants("b", G, risk)
        };
        let mut now = host(4 * G, 2 * G, &[("a", G, 12 * G)]);
        for (max_kb, risk, room_kb, said) in [
            (G, 100, G, ""),
            (3 * G, 100, 3 * G, "; its maximum of 3.0 GiB is there now"),
            (
                8 * G,
                100,
                4 * G,
                "; of its maximum of 8.0 GiB 4.0 GiB are there",
            ),
            // What sharing that breaks would need is not there for it.
            (
                8 * G,
                50,
                3 * G,
                "; of its maximum of 8.0 GiB 3.0 GiB are there",
            ),
            (
                u64::MAX,
                0,
                2 * G,
                " 2.0 GiB are there now, more only as others",
            ),
        ] {
            let applicant = grows(max_kb, risk);
            assert_eq!(admit(&now, &none, &applicant), Ok(room_kb), "{applicant:?}");
            let told = room(&applicant, room_kb);
            assert!(
                told.contains(said) && told.is_empty() == said.is_empty(),
                "{told}"
            );
        }
        (now.overhead_kb, now.slush_kb) = (1, 2);
        assert_eq!(admit(&now, &none, &grows(8 * G, 100)), Ok(4 * G - 3));
    }

    #[test]
    fn what_is_reserved_is_reserved() {
        let mut reservations = Reservations::default();
        reservations.put(kept("b", 3 * G));
        let now = host(4 * G, 0, &[("a", G, 12 * G)]);
        assert_eq!(reservations.outstanding_kb(&now), 3 * G);
        assert!(admit(&now, &reservations, &wants("c", 2 * G, 100)).is_err());
        assert!(admit(&now, &reservations, &wants("c", G, 100)).is_ok());
        // It starts: what it took is gone from what is available, and no longer kept.
        let half = host(2 * G, 0, &[("a", G, 12 * G), ("b", 0, 2 * G)]);
        assert_eq!(reservations.outstanding_kb(&half), G);
        assert!(admit(&half, &reservations, &wants("c", G, 100)).is_ok());
        assert!(admit(&half, &reservations, &wants("c", G + 1, 100)).is_err());
    }

    #[test]
    fn a_right_needs_memory() {
        let claim = |name: &str, right_kb, current_kb, spare_kb| Claim {
            name: name.to_owned(),
            right_kb,
            current_kb,
            spare_kb,
        };
        let claims = [claim("a", G, G, 0), claim("b", 2 * G, 4 * G, 2 * G)];
        assert_eq!(raise(8 * G, G as i128, &claims, "a", 4 * G), Ok(()));
        let short = raise(8 * G, G as i128, &claims, "a", 4 * G + 1).unwrap_err();
        assert!(short.contains("only 3.0 GiB more can be got"), "{short}");
        let short = raise(8 * G, -5, &claims, "a", 4 * G).unwrap_err();
        assert!(short.contains("only 2.0 GiB more"), "{short}");
        let much = raise(8 * G, 64 * G as i128, &claims, "a", 7 * G).unwrap_err();
        assert!(
            much.contains("the other VMs have rights to 2.0 GiB"),
            "{much}"
        );
        assert_eq!(raise(8 * G, 0, &claims, "starts-later", 5 * G), Ok(()));
    }

    #[test]
    fn reservations_end() {
        let mut reservations = Reservations::default();
        for name in ["late", "come", "holds", "stays"] {
            reservations.put(kept(name, G));
        }
        reservations.put(Reservation {
            until_s: 5.0,
            ..kept("late", G)
        });
        let now = host(0, 0, &[("holds", 0, G), ("come", 0, 1)]);
        let mut ended = reservations.expire(5.0, &now.running, |name| name == "come");
        ended.sort();
        assert_eq!(ended, ["come", "holds", "late"]);
        assert!(reservations.cancel("stays") && !reservations.cancel("stays"));
    }

    proptest! {
        #[test]
        fn who_is_admitted_can_be_held(
            available in 0..16 * G,
            mins in prop::collection::vec(0..4 * G, 0..6),
            wanted in prop::collection::vec(1..4 * G, 1..8),
            saved in 0..8 * G,
            risk in 0u64..=100,
        ) {
            let names: Vec<String> = (0..mins.len()).map(|nth| format!("vm{nth}")).collect();
            let running: Vec<(&str, u64, u64)> =
                names.iter().zip(&mins).map(|(name, min)| (name.as_str(), *min, *min)).collect();
            let now = host(available, saved, &running);
            let mut reservations = Reservations::default();
            let mut admitted = 0;
            for (nth, min) in wanted.iter().enumerate() {
                let name = format!("new{nth}");
                if admit(&now, &reservations, &wants(&name, *min, risk)).is_ok() {
                    reservations.put(kept(&name, *min));
                    admitted += min;
                }
            }
            let backed = u128::from(saved) * u128::from(100 - risk) / 100;
            if admitted > 0 {
                prop_assert!(u128::from(admitted) + backed <= u128::from(available));
                prop_assert!(admitted + mins.iter().sum::<u64>() <= 16 * G);
            }
            prop_assert_eq!(reservations.outstanding_kb(&now), admitted);
        }
    }
}
