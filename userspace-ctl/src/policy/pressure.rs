// SPDX-License-Identifier: GPL-2.0

//! What each guest has committed and a buffer; where that is too much, weighted max-min fair
//! shares of what there is above the minima.

use super::{Budget, Decision, Guest};
use crate::units::long_kb;

pub(super) fn size(budget: &Budget, guests: &[Guest]) -> Vec<Decision> {
    let wanted: i128 = guests
        .iter()
        .map(|guest| i128::from(guest.demand_kb()))
        .sum();
    let said = |guest: &Guest| {
        let about = if guest.figures.estimated {
            " (estimated)"
        } else {
            ""
        };
        format!(
            "pressure {}%{about}, demand {}",
            guest.figures.pressure_percent(),
            long_kb(guest.demand_kb())
        )
    };
    if wanted <= budget.pool_kb {
        return guests
            .iter()
            .map(|guest| Decision {
                target_kb: guest.demand_kb(),
                reason: format!("{}: met", said(guest)),
            })
            .collect();
    }

    let floors: i128 = guests
        .iter()
        .map(|guest| i128::from(guest.floor_kb()))
        .sum();
    let room = u128::try_from(budget.pool_kb - floors).unwrap_or(0);
    let claims: Vec<Claim> = guests
        .iter()
        .map(|guest| Claim {
            need: u128::from(guest.demand_kb() - guest.floor_kb()),
            weight: u128::from(guest.config.priority),
        })
        .collect();
    guests
        .iter()
        .zip(fair(room, &claims))
        .map(|(guest, part)| {
            let target_kb = guest.floor_kb() + u64::try_from(part).unwrap_or(u64::MAX);
            let outcome = if target_kb == guest.demand_kb() {
                "met".to_owned()
            } else if budget.pool_kb < floors {
                "dynamic_min, for the pool is below the sum of the minima".to_owned()
            } else {
                format!("a fair share at priority {}", guest.config.priority)
            };
            Decision {
                target_kb,
                reason: format!("{}: {outcome}", said(guest)),
            }
        })
        .collect()
}

struct Claim {
    need: u128,
    weight: u128,
}

/// Weighted max-min fair parts of `room`: nobody gets more than the need, and where one gets less,
/// nobody else gets more by weight.
fn fair(room: u128, claims: &[Claim]) -> Vec<u128> {
    let mut order: Vec<usize> = (0..claims.len()).collect();
    order.sort_by(|a, b| {
        let (a, b) = (&claims[*a], &claims[*b]);
        (a.need * b.weight).cmp(&(b.need * a.weight))
    });
    let mut parts = vec![0; claims.len()];
    let mut room = room;
    let mut weights: u128 = claims.iter().map(|claim| claim.weight).sum();
    for (nth, at) in order.iter().enumerate() {
        let claim = &claims[*at];
        if claim.need * weights > room * claim.weight {
            // The claims that are left, all of them as needy or more, share what is left.
            for at in &order[nth..] {
                parts[*at] = (room * claims[*at].weight)
                    .checked_div(weights)
                    .unwrap_or(0);
            }
            break;
        }
        parts[*at] = claim.need;
        room -= claim.need;
        weights -= claim.weight;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn small_claims_are_met_and_the_rest_shared() {
        let claims = [
            Claim {
                need: 10,
                weight: 1,
            },
            Claim {
                need: 100,
                weight: 1,
            },
            Claim {
                need: 100,
                weight: 2,
            },
        ];
        assert_eq!(fair(100, &claims), [10, 30, 60]);
        assert_eq!(fair(0, &claims), [0, 0, 0]);
        assert_eq!(fair(1000, &claims), [10, 100, 100]);
        assert_eq!(fair(7, &[]), [0u128; 0]);
    }

    proptest! {
        #[test]
        fn fair_parts(room in 0u128..10_000, claims in prop::collection::vec((0u128..3000, 1u128..100), 1..8)) {
            let claims: Vec<Claim> =
                claims.into_iter().map(|(need, weight)| Claim { need, weight }).collect();
            let parts = fair(room, &claims);
            let sum: u128 = parts.iter().sum();
            let needs: u128 = claims.iter().map(|claim| claim.need).sum();
            prop_assert!(sum <= room && sum <= needs);
            prop_assert!(sum + claims.len() as u128 > room.min(needs));
            for (part, claim) in parts.iter().zip(&claims) {
                prop_assert!(*part <= claim.need);
                if *part < claim.need {
                    for (other, its) in parts.iter().zip(&claims) {
                        prop_assert!(other * claim.weight <= (part + 1) * its.weight);
                    }
                }
            }
        }
    }
}
