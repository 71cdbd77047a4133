// SPDX-License-Identifier: GPL-2.0

//! Which VM gives memory when the host is short of it: min-funding revocation with an idle tax
//! (Waldspurger, OSDI 2002), of memory that is not in use before memory that is.
//!
//! A VM pays for its memory with its shares. Memory that it does not use costs more, by `1 / (1 -
//! tax)`. Whoever pays least for a page, `rho = shares / (active + idle / (1 - tax))`, gives one up.
//!
//! By that alone a VM that uses nothing keeps `1 - tax` of what its neighbour has, while the neighbour
//! thrashes. So as long as somebody has pages to spare that are surely not in use, nobody pays with
//! others, and who has most of those for its shares pays first; rho decides when there are none left.
//! Without a tax idle pages are no worse than others, and shares alone decide.

/// What a VM holds and pays.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Holding {
    /// Its weight.
    pub shares: u64,
    /// Pages that it holds.
    pub pages: u64,
    /// Pages of them that it uses, by the best guess.
    pub active: u64,
    /// Pages of them that can be taken and are surely not in use.
    pub idle: u64,
    /// Pages that it may be left with at least.
    pub reserved: u64,
}

impl Holding {
    /// Pages that may be taken.
    pub fn spare(&self) -> u64 {
        self.pages.saturating_sub(self.reserved)
    }

    /// Pages that may be taken and are surely not in use.
    pub fn idle_spare(&self) -> u64 {
        self.idle.min(self.spare())
    }

    /// Pages that the tax makes of it, times `100 - tax`.
    fn taxed(&self, tax_percent: u64) -> u64 {
        let active = self.active.min(self.pages);
        let idle = self.pages - active;
        let keeps = 100u64.saturating_sub(tax_percent).max(1);
        active
            .saturating_mul(keeps)
            .saturating_add(idle.saturating_mul(100))
    }

    /// Whether this one pays less for a page than `other`.
    pub fn pays_less_than(&self, other: &Holding, tax_percent: u64) -> bool {
        // shares / taxed < other.shares / other.taxed, without dividing.
        u128::from(self.shares) * u128::from(other.taxed(tax_percent))
            < u128::from(other.shares) * u128::from(self.taxed(tax_percent))
    }
}

impl Holding {
    /// Whether this one has fewer shares for each of its idle pages to spare than `other`.
    fn is_idler_than(&self, other: &Holding) -> bool {
        u128::from(self.shares) * u128::from(other.idle_spare())
            < u128::from(other.shares) * u128::from(self.idle_spare())
    }
}

/// Which pages are to be taken.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Pages {
    /// Those that are not in use.
    Idle,
    /// Any.
    Any,
}

/// Who pays.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Victim {
    /// Its place.
    pub place: usize,
    /// With which pages.
    pub with: Pages,
    /// And how many at most.
    pub pages: u64,
}

/// Chooses the one that pays least: for its idle pages to spare if the tax is above 0 and there are any,
/// else for all its pages, of those that have any to spare.
pub fn poorest(holdings: impl Iterator<Item = Holding>, tax_percent: u64) -> Option<Victim> {
    let mut of_idle: Option<(usize, Holding)> = None;
    let mut of_any: Option<(usize, Holding)> = None;
    for (place, holding) in holdings.enumerate() {
        let is_poorer = |(_, least): (usize, Holding)| holding.pays_less_than(&least, tax_percent);
        let is_idler = |(_, least): (usize, Holding)| holding.is_idler_than(&least);
        if holding.spare() > 0 && of_any.is_none_or(is_poorer) {
            of_any = Some((place, holding));
        }
        if tax_percent > 0 && holding.idle_spare() > 0 && of_idle.is_none_or(is_idler) {
            of_idle = Some((place, holding));
        }
    }
    let idle = of_idle.map(|(place, holding)| (place, Pages::Idle, holding.idle_spare()));
    let any = of_any.map(|(place, holding)| (place, Pages::Any, holding.spare()));
    let (place, with, pages) = idle.or(any)?;
    Some(Victim { place, with, pages })
}

/// The pages that a VM may hold when all there are were dealt out by shares.
pub fn fair_share(shares: u64, all_shares: u64, all_pages: u64) -> u64 {
    // Down to what 64 bits can divide: shares of that size differ by less than anybody can set.
    let shift = (64 - all_shares.leading_zeros()).saturating_sub(20);
    let (shares, all) = (shares >> shift, (all_shares >> shift).max(1));
    (all_pages / all)
        .saturating_mul(shares)
        .saturating_add((all_pages % all).saturating_mul(shares) / all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Of which all that is not `active` is surely idle.
    fn holding(shares: u64, pages: u64, active: u64) -> Holding {
        Holding {
            shares,
            pages,
            active,
            idle: pages.saturating_sub(active),
            reserved: 0,
        }
    }

    fn place(vms: &[Holding], tax_percent: u64) -> Option<usize> {
        poorest(vms.iter().copied(), tax_percent).map(|victim| victim.place)
    }

    /// Takes a page from whom it is due `times` times.
    fn take(vms: &mut [Holding], tax_percent: u64, times: u64) {
        for _ in 0..times {
            let Some(victim) = poorest(vms.iter().copied(), tax_percent) else {
                return;
            };
            let vm = &mut vms[victim.place];
            vm.pages -= 1;
            match victim.with {
                Pages::Idle => vm.idle -= 1,
                // Cold ones first, as the sweep does.
                Pages::Any if vm.idle > 0 => vm.idle -= 1,
                Pages::Any => vm.active -= 1,
            }
        }
    }

    #[test]
    fn equal_shares_and_use_the_larger_pays() {
        let vms = [holding(1000, 500, 500), holding(1000, 900, 900)];
        assert_eq!(place(&vms, 75), Some(1));
        let victim = poorest(vms.into_iter(), 75).unwrap();
        assert_eq!((victim.with, victim.pages), (Pages::Any, 900));
    }

    #[test]
    fn idle_memory_is_taxed() {
        // The idle one is smaller, but each of its pages counts four times.
        let vms = [holding(1000, 900, 900), holding(1000, 500, 0)];
        assert_eq!(place(&vms, 75), Some(1));
        assert_eq!(place(&vms, 0), Some(0));
        // The paper's example: with a tax of 75 % an idle page costs as much as four active ones.
        assert_eq!(
            holding(1, 100, 0).taxed(75),
            4 * holding(1, 100, 100).taxed(75)
        );
        // What may be in use is taxed as well, though nothing is sure.
        let unsure =
            [holding(1000, 900, 800), holding(1000, 500, 100)].map(|vm| Holding { idle: 0, ..vm });
        assert_eq!(place(&unsure, 75), Some(1));
        assert_eq!(place(&unsure, 1), Some(0));
    }

    #[test]
    fn who_has_most_idle_memory_for_its_shares_pays_first() {
        // What the first one uses does not make its few idle pages go first.
        let mut vms = [holding(1000, 900, 880), holding(1000, 110, 10)];
        take(&mut vms, 75, 80);
        assert_eq!(vms.map(|vm| vm.pages), [900, 30]);
        take(&mut vms, 75, 20);
        assert_eq!(vms.map(|vm| vm.pages), [890, 20]);
        let mut vms = [holding(3000, 400, 0), holding(1000, 400, 0)];
        take(&mut vms, 75, 400);
        assert_eq!(vms.map(|vm| vm.pages), [300, 100]);
    }

    #[test]
    fn nothing_in_use_is_taken_while_somebody_has_idle_memory() {
        // By rho alone the busy one would pay from 400 idle pages of the others on, or at once.
        for (idle_shares, tax) in [(1000, 75), (1000, 1), (1_000_000, 75)] {
            let mut vms = [
                holding(idle_shares, 1600, 0),
                holding(idle_shares, 1600, 0),
                holding(1000, 1600, 1600),
            ];
            take(&mut vms, tax, 3200);
            assert_eq!(vms.map(|vm| vm.pages), [0, 0, 1600]);
            take(&mut vms, tax, 1);
            assert_eq!(vms[2].pages, 1599);
        }
        let mut vms = [holding(1000, 1600, 0), holding(1000, 1600, 1600)];
        take(&mut vms, 0, 1600);
        assert_eq!(vms.map(|vm| vm.pages), [800, 800]);
    }

    #[test]
    fn nothing_is_taken_below_the_reservation() {
        let mut small = holding(1, 500, 0);
        small.reserved = 500;
        assert_eq!(place(&[small], 75), None);
        let vms = [small, holding(1_000_000, 10, 10)];
        assert_eq!(place(&vms, 75), Some(1));
        assert_eq!(place(&[], 75), None);
        // What is above it is idle, and is all that is taken.
        small.pages = 520;
        let victim = poorest([small, holding(1, 900, 900)].into_iter(), 75).unwrap();
        let expected = Victim {
            place: 0,
            with: Pages::Idle,
            pages: 20,
        };
        assert_eq!(victim, expected);
    }

    #[test]
    fn shares_buy_memory() {
        // Taking page by page from the poorest ends where memory in use is as the shares are.
        let mut vms = [holding(3000, 1000, 1000), holding(1000, 1000, 1000)];
        take(&mut vms, 75, 1200);
        assert_eq!(vms.map(|vm| vm.pages), [600, 200]);
        // Idle memory, however many shares stand behind it, goes before.
        let mut vms = [holding(3000, 1500, 1000), holding(1000, 1200, 1000)];
        take(&mut vms, 75, 700 + 1200);
        assert_eq!(vms.map(|vm| vm.pages), [600, 200]);
        assert_eq!(fair_share(3000, 4000, 800), 600);
        assert_eq!(fair_share(1, u64::MAX, 800), 0);
        assert_eq!(fair_share(0, 0, 800), 0);
    }

    #[test]
    fn what_may_be_in_use_counts_as_in_use() {
        // By the best guess a tenth of the first is idle, but that is not sure.
        let unsure = Holding {
            idle: 0,
            ..holding(1000, 1000, 900)
        };
        let vms = [unsure, holding(1000, 1000, 999)];
        assert_eq!(place(&vms, 75), Some(1));
        assert_eq!(place(&vms[..1], 75), Some(0));
    }

    prop_compose! {
        fn any_holding()(
            shares: u32, pages in 1u64..1 << 40, active: u64, idle: u64, reserved in 0u64..1 << 40,
        ) -> Holding {
            let active = active % (pages + 1);
            Holding { shares: shares.into(), pages, active, idle: idle % (pages - active + 1), reserved }
        }
    }

    proptest! {
        #[test]
        fn paying_less_is_an_order(
            a in any::<(u32, u32, u32)>(), b in any::<(u32, u32, u32)>(), c in any::<(u32, u32, u32)>(),
            tax in 0u64..100,
        ) {
            let [a, b, c] = [a, b, c].map(|(s, p, f)| holding(s.into(), u64::from(p) + 1, f.into()));
            prop_assert!(!a.pays_less_than(&a, tax));
            if a.pays_less_than(&b, tax) {
                prop_assert!(!b.pays_less_than(&a, tax));
                if b.pays_less_than(&c, tax) {
                    prop_assert!(a.pays_less_than(&c, tax));
                }
            }
        }

        #[test]
        fn more_idle_never_pays_more(pages in 1u64..1 << 40, active: u64, shares: u32, tax in 0u64..100) {
            let active = active % (pages + 1);
            let (used, idle) = (holding(shares.into(), pages, pages), holding(shares.into(), pages, active));
            prop_assert!(!used.pays_less_than(&idle, tax));
        }

        #[test]
        fn who_pays_may_and_pays_least(vms in prop::collection::vec(any_holding(), 0..8), tax in 0u64..100) {
            let Some(victim) = poorest(vms.iter().copied(), tax) else {
                prop_assert!(vms.iter().all(|vm| vm.spare() == 0));
                return Ok(());
            };
            let vm = vms[victim.place];
            prop_assert!(victim.pages > 0 && victim.pages <= vm.spare());
            let some_idle = tax > 0 && vms.iter().any(|vm| vm.idle_spare() > 0);
            prop_assert_eq!(victim.with == Pages::Idle, some_idle);
            let could = |vm: &&Holding| match victim.with {
                Pages::Idle => vm.idle_spare() > 0,
                Pages::Any => vm.spare() > 0,
            };
            prop_assert!(could(&&vm));
            let pays_less = |other: &Holding| match victim.with {
                Pages::Idle => other.is_idler_than(&vm),
                Pages::Any => other.pays_less_than(&vm, tax),
            };
            prop_assert!(!vms.iter().filter(could).any(pays_less));
        }

        #[test]
        fn in_use_stays_while_there_is_idle(
            sizes in prop::collection::vec((1u64..5000, 0u64..200, 0u64..200, 0u64..300), 1..6),
            tax in 1u64..100, times in 0u64..2000,
        ) {
            let mut vms: Vec<_> = sizes
                .iter()
                .map(|&(shares, active, idle, reserved)| Holding {
                    reserved,
                    ..holding(shares, active + idle, active)
                })
                .collect();
            let before = vms.clone();
            take(&mut vms, tax, times);
            let paid_active = vms.iter().zip(&before).any(|(now, then)| now.active < then.active);
            prop_assert!(!paid_active || vms.iter().all(|vm| vm.idle_spare() == 0));
            for (now, then) in vms.iter().zip(&before) {
                prop_assert!(now.pages >= then.reserved.min(then.pages));
            }
        }

        #[test]
        fn fair_shares_never_exceed_all(shares in prop::collection::vec(any::<u32>(), 1..20), pages in 0u64..1 << 50) {
            let all: u64 = shares.iter().map(|&s| u64::from(s)).sum();
            let sum: u64 = shares.iter().map(|&s| fair_share(s.into(), all, pages)).sum();
            prop_assert!(sum <= pages);
        }
    }
}
