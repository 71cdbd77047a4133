// SPDX-License-Identifier: GPL-2.0

//! Borders of sharing, and what becomes of shared pages when one is drawn anew.

use super::tunables::ShareScope;

/// Who shares with whom, as a number: pages meet only under equal numbers.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Scope(pub u32);

impl Scope {
    /// Shares with nobody.
    pub const NONE: Scope = Scope(0);
    /// Everybody on the host.
    pub const HOST: Scope = Scope(1);

    /// All VMs of one domain.
    pub const fn of_domain(id: u32) -> Scope {
        Scope(id.wrapping_mul(2).wrapping_add(2))
    }

    /// One VM alone.
    pub const fn of_vm(id: u32) -> Scope {
        Scope(id.wrapping_mul(2).wrapping_add(3))
    }

    /// That of a VM in a domain, by `share_scope` and by its own `share`.
    pub const fn of(share_scope: ShareScope, shares: bool, vm: u32, domain: u32) -> Scope {
        match share_scope {
            _ if !shares => Scope::NONE,
            ShareScope::Vm => Scope::of_vm(vm),
            ShareScope::Domain => Scope::of_domain(domain),
            ShareScope::Host => Scope::HOST,
        }
    }
}

/// Where the sharers of a record will be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Group {
    /// None of them shares.
    Unseen,
    /// All in this scope: the record moves with them.
    One(Scope),
    /// In several: those that are not in the record's own scope leave it.
    Several,
}

impl Group {
    /// With one sharer more, who will be in that scope.
    #[must_use]
    pub fn with(self, sharer: Scope) -> Group {
        match self {
            group if sharer == Scope::NONE => group,
            Group::Unseen => Group::One(sharer),
            Group::One(scope) if scope == sharer => self,
            _ => Group::Several,
        }
    }

    /// Whether the share of a sharer who will be in `sharer` has to be broken: the record was published
    /// under `published`.
    pub fn breaks(self, sharer: Scope, published: Option<Scope>) -> bool {
        let stays = match self {
            Group::One(scope) => scope == sharer,
            Group::Unseen | Group::Several => published == Some(sharer),
        };
        sharer == Scope::NONE || !stays
    }

    /// The scope that a record moves to with all its sharers; `None` when it stays where it is.
    pub fn moves_from(self, published: Scope) -> Option<Scope> {
        match self {
            Group::One(scope) if scope != published => Some(scope),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn scopes_are_told_apart() {
        let mut seen = HashSet::from([Scope::NONE, Scope::HOST]);
        for id in 0..1000 {
            assert!(seen.insert(Scope::of_domain(id)) && seen.insert(Scope::of_vm(id)));
        }
        let of = |scope| Scope::of(scope, true, 3, 4);
        assert_eq!(of(ShareScope::Vm), Scope::of_vm(3));
        assert_eq!(of(ShareScope::Domain), Scope::of_domain(4));
        assert_eq!(of(ShareScope::Host), Scope::HOST);
        assert_eq!(Scope::of(ShareScope::Host, false, 3, 4), Scope::NONE);
    }

    proptest! {
        /// Whoever is left in a record is in one scope with all others who are, and that is the
        /// record's afterwards; who could stay does.
        #[test]
        fn who_is_left_is_together(
            sharers in prop::collection::vec(0u32..4, 1..8),
            published in 0u32..4,
        ) {
            let published = Scope(published);
            let scopes: Vec<Scope> = sharers.into_iter().map(Scope).collect();
            let group = scopes.iter().fold(Group::Unseen, |group, scope| group.with(*scope));
            let after = group.moves_from(published).unwrap_or(published);
            let left: Vec<_> = scopes.iter().filter(|s| !group.breaks(**s, Some(published))).collect();
            prop_assert!(left.iter().all(|scope| **scope == after && after != Scope::NONE));
            let together = scopes.iter().filter(|scope| **scope != Scope::NONE);
            let apart: HashSet<_> = together.clone().collect();
            if apart.len() == 1 {
                prop_assert_eq!(left.len(), together.count());
            }
        }
    }
}
