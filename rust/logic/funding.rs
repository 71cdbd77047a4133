// SPDX-License-Identifier: GPL-2.0

//! Which VM gives memory when the host is short of it: min-funding revocation with an idle tax
//! (Waldspurger, OSDI 2002).
//!
//! A VM pays for its memory with its shares. Memory that it does not use costs more, by `1 / (1 -
//! tax)`. Whoever pays least for a page, `rho = shares / (active + idle / (1 - tax))`, gives one up.

/// What a VM holds and pays.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Holding {
    /// Its weight.
    pub shares: u64,
    /// Pages that it holds.
    pub pages: u64,
    /// Pages of them that it uses.
    pub active: u64,
    /// Pages that it may be left with at least.
    pub reserved: u64,
}

impl Holding {
    /// Pages that may be taken.
    pub fn spare(&self) -> u64 {
        self.pages.saturating_sub(self.reserved)
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

/// The place of the one that pays least among those that have pages to spare.
pub fn poorest(holdings: impl Iterator<Item = Holding>, tax_percent: u64) -> Option<usize> {
    holdings
        .enumerate()
        .filter(|(_, holding)| holding.spare() > 0)
        .reduce(|least, next| {
            if next.1.pays_less_than(&least.1, tax_percent) {
                next
            } else {
                least
            }
        })
        .map(|(place, _)| place)
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

    fn holding(shares: u64, pages: u64, active: u64) -> Holding {
        Holding {
            shares,
            pages,
            active,
            reserved: 0,
        }
    }

    #[test]
    fn equal_shares_and_use_the_larger_pays() {
        let vms = [holding(1000, 500, 500), holding(1000, 900, 900)];
        assert_eq!(poorest(vms.into_iter(), 75), Some(1));
    }

    #[test]
    fn idle_memory_is_taxed() {
        // The idle one is smaller, but each of its pages counts four times.
        let vms = [holding(1000, 900, 900), holding(1000, 500, 0)];
        assert_eq!(poorest(vms.into_iter(), 75), Some(1));
        assert_eq!(poorest(vms.into_iter(), 0), Some(0));
        // The paper's example: with a tax of 75 % an idle page costs as much as four active ones.
        assert_eq!(
            holding(1, 100, 0).taxed(75),
            4 * holding(1, 100, 100).taxed(75)
        );
    }

    #[test]
    fn nothing_is_taken_below_the_reservation() {
        let mut small = holding(1, 500, 0);
        small.reserved = 500;
        assert_eq!(poorest([small].into_iter(), 75), None);
        let vms = [small, holding(1_000_000, 10, 10)];
        assert_eq!(poorest(vms.into_iter(), 75), Some(1));
        assert_eq!(poorest([].into_iter(), 75), None);
    }

    #[test]
    fn shares_buy_memory() {
        // Taking page by page from the poorest ends where memory is as the shares are.
        let mut vms = [holding(3000, 1000, 1000), holding(1000, 1000, 1000)];
        for _ in 0..1200 {
            let place = poorest(vms.into_iter(), 75).unwrap();
            vms[place].pages -= 1;
            vms[place].active -= 1;
        }
        assert_eq!(vms.map(|vm| vm.pages), [600, 200]);
        assert_eq!(fair_share(3000, 4000, 800), 600);
        assert_eq!(fair_share(1, u64::MAX, 800), 0);
        assert_eq!(fair_share(0, 0, 800), 0);
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
        fn fair_shares_never_exceed_all(shares in prop::collection::vec(any::<u32>(), 1..20), pages in 0u64..1 << 50) {
            let all: u64 = shares.iter().map(|&s| u64::from(s)).sum();
            let sum: u64 = shares.iter().map(|&s| fair_share(s.into(), all, pages)).sum();
            prop_assert!(sum <= pages);
        }
    }
}
