// SPDX-License-Identifier: GPL-2.0

//! Where shared pages go that nobody uses: for each scope (a domain, as a rule) a pool of compressed
//! pages, and a swap file behind it.
//!
//! They are no VM's: they stay as long as a page is in them or the scope has a VM. Only the reclaimer
//! makes them and lets them go.
//!
//! Lock order: region > index > the list of pools > a swap file. Nothing is allocated with the list
//! locked.

use super::{
    vm::Scope,
    volume::{Swap, SwapWork},
};
use crate::{
    logic::clusters::Place,
    sys::{alloc, frames::Owned, report::bug_once, swapio::SwapDir, zs::Store},
};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{Arc, Mutex},
};

/// The pool and the swap file of one scope.
#[derive(Clone)]
pub(crate) struct SharedPool {
    /// Whose.
    pub(crate) scope: Scope,
    /// Compressed pages.
    pub(crate) store: Arc<Store>,
    /// Those that it had too much of.
    pub(crate) swap: Arc<Swap>,
}

/// All of them.
#[pin_data]
pub(crate) struct SharedPools {
    #[pin]
    list: Mutex<KVec<SharedPool>>,
}

impl SharedPools {
    /// None yet.
    pub(crate) fn new() -> impl PinInit<SharedPools> {
        pin_init!(SharedPools {
            list <- new_mutex!(KVec::new(), "thinram_shared_pools"),
        })
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.list.lock().is_empty()
    }

    fn sum(&self, of: impl Fn(&SharedPool) -> u64) -> u64 {
        let list = self.list.lock();
        list.iter()
            .fold(0, |sum, pool| sum.saturating_add(of(pool)))
    }

    /// Pages of memory that the compressed pages take.
    pub(crate) fn pages(&self) -> u64 {
        self.sum(|pool| pool.store.pages())
    }

    /// KiB that the swap files take.
    pub(crate) fn file_kb(&self) -> u64 {
        self.sum(|pool| pool.swap.file_kb())
    }

    /// Memory that the swap files take.
    pub(crate) fn bytes(&self) -> u64 {
        self.sum(|pool| pool.swap.bytes())
    }

    /// That of `scope`, if it has one.
    pub(crate) fn get(&self, scope: Scope) -> Option<SharedPool> {
        let list = self.list.lock();
        list.iter().find(|pool| pool.scope == scope).cloned()
    }

    /// The swap file of `scope`, if it has one.
    pub(crate) fn swap_of(&self, scope: u32) -> Option<Arc<Swap>> {
        self.get(Scope(scope)).map(|pool| pool.swap)
    }

    /// All of them as of now.
    pub(crate) fn all(&self) -> Result<KVec<SharedPool>> {
        let mut all = KVec::new();
        loop {
            let list = self.list.lock();
            if list.len() <= all.capacity() {
                for pool in list.iter() {
                    // There is room.
                    let _ = all.push_within_capacity(pool.clone());
                }
                return Ok(all);
            }
            let len = list.len();
            drop(list);
            all = alloc::list(len)?;
        }
    }

    /// That of `scope`, made if need be, swapping to `dir`; only the reclaimer calls this.
    pub(super) fn of(&self, scope: Scope, dir: Option<Arc<SwapDir>>) -> Result<SharedPool> {
        if let Some(pool) = self.get(scope) {
            return Ok(pool);
        }
        let store = Store::new()?;
        store.open()?;
        let swap = Swap::new(dir)?;
        let pool = SharedPool { scope, store, swap };
        let len = self.list.lock().len();
        let mut longer = alloc::list(len.saturating_add(1))?;
        let mut list = self.list.lock();
        for pool in list.drain_all() {
            // Nobody else makes any.
            let _ = longer.push_within_capacity(pool);
        }
        let _ = longer.push_within_capacity(pool.clone());
        core::mem::swap(&mut *list, &mut longer);
        drop(list);
        drop(longer);
        Ok(pool)
    }

    /// Drops those that nothing is in and that nobody `needs`; only the reclaimer calls this.
    pub(super) fn prune(&self, needs: impl Fn(Scope) -> bool) {
        loop {
            let mut list = self.list.lock();
            let unused = |pool: &SharedPool| {
                pool.store.objects() == 0 && pool.swap.live() == 0 && !needs(pool.scope)
            };
            let Some(place) = list.iter().position(unused) else {
                return;
            };
            let dropped = list.remove(place);
            drop(list);
            if let Ok(pool) = dropped {
                pool.swap.close();
                pool.swap.set_own_dir(None);
            }
        }
    }

    /// Takes what the last sharer of a page left.
    pub(crate) fn free(&self, owned: Owned) {
        let Owned::Packed(packed) = &owned else {
            return;
        };
        if let Some(place) = packed.place() {
            self.release(packed.label().scope, place);
        }
    }

    /// A page of `scope` is not in the swap file any more.
    pub(crate) fn release(&self, scope: u32, place: Place) {
        if place.is_lost() {
            return;
        }
        match self.swap_of(scope) {
            Some(swap) => swap.release(place),
            None => bug_once!("a shared page has lost its swap file"),
        }
    }
}

/// What it takes to find a page that is in no memory.
#[derive(Clone, Copy)]
pub(crate) struct Away<'a> {
    /// Where pages went.
    pub(crate) pools: &'a SharedPools,
    /// Who reads them.
    pub(crate) work: &'a SwapWork,
}

/// A shared page must be read first.
pub(crate) struct Unread {
    /// From there.
    pub(crate) swap: Arc<Swap>,
    /// It lies there.
    pub(crate) place: Place,
}

impl Unread {
    /// Sees to it that it is in memory: see [`Swap::load`].
    pub(crate) fn load(&self, work: &SwapWork) {
        self.swap.load(work, self.place);
    }
}

/// Why a shared page cannot be had.
pub(crate) enum NotHad {
    /// It must be read first.
    Unread(Unread),
    /// It cannot be read from the disk, or is not what was written.
    Lost,
    /// The memory that it is in is broken.
    Corrupt,
}
