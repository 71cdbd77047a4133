// SPDX-License-Identifier: GPL-2.0

//! A file: its size and its regions.
//!
//! Lock order: the inode lock is held by whoever changes the size; the region table's spinlock is a
//! leaf.

use super::{
    count,
    host::Host,
    region::{Region, RegionGuard},
    vm::Vm,
};
use crate::{
    logic::slot::State,
    sys::{
        alloc,
        mapping::MappingSource,
        report::bug_once,
        slots::{Content, SLOTS},
    },
};
use core::sync::atomic::{AtomicU64, Ordering};
use kernel::{
    new_mutex,
    page::PAGE_SIZE,
    prelude::*,
    sync::{Arc, Mutex},
    xarray::{AllocKind, XArray},
};

/// Bytes of a page.
pub(crate) const PAGE: u64 = PAGE_SIZE as u64;

/// The largest file: 8 TiB.
pub(crate) const MAX_PAGES: u64 = 1 << 31;

/// A file of guest memory.
#[pin_data]
pub(crate) struct Backing {
    host: Arc<Host>,
    vm: Arc<Vm>,
    source: MappingSource,
    /// Size in pages, rounded up; what the mount and the VM account.
    pages: AtomicU64,
    /// One more than the highest number of a region that was ever made; held while one is made.
    #[pin]
    end: Mutex<u64>,
    #[pin]
    regions: XArray<Arc<Region>>,
}

impl Backing {
    /// An empty file of `vm`.
    pub(crate) fn new(host: Arc<Host>, vm: Arc<Vm>, source: MappingSource) -> Result<Arc<Backing>> {
        alloc::counted_in_place(
            pin_init!(Backing {
                host,
                vm,
                source,
                pages: AtomicU64::new(0),
                end <- new_mutex!(0, "thinram_backing"),
                regions <- XArray::new(AllocKind::Alloc),
            }),
            GFP_KERNEL,
        )
    }

    /// The host that the file is on.
    pub(crate) fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// The VM that the file belongs to.
    pub(crate) fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// A write gave a shared or zero page a frame of its own.
    pub(crate) fn count_break(&self) {
        count(&self.vm.events.cow_breaks);
        count(&self.host.events.cow_breaks);
    }

    /// Size in pages.
    pub(crate) fn pages(&self) -> u64 {
        self.pages.load(Ordering::Acquire)
    }

    /// The region that page `page` lies in, if it was ever touched.
    pub(crate) fn region(&self, page: u64) -> Option<Arc<Region>> {
        let number = usize::try_from(page / SLOTS as u64).ok()?;
        self.regions.lock().get(number).map(Arc::from)
    }

    /// The same, made if need be.
    pub(crate) fn region_or_new(&self, page: u64) -> Result<Arc<Region>> {
        if let Some(region) = self.region(page) {
            return Ok(region);
        }
        // One maker at a time: storing may drop the table's lock to allocate.
        let mut end = self.end.lock();
        if let Some(region) = self.region(page) {
            return Ok(region);
        }
        let number = usize::try_from(page / SLOTS as u64)?;
        let first_page = (number as u64).saturating_mul(SLOTS as u64);
        let region = (self.vm)
            .pays_for_kernel(|| Region::new(first_page, self.vm.clone(), self.source.mapping()))?;
        self.host.registry().add(&region)?;
        let stored = alloc::store(&mut self.regions.lock(), number, region.clone());
        if let Err(error) = stored {
            self.host.registry().remove(&region);
            return Err(error);
        }
        *end = (*end).max((number as u64).saturating_add(1));
        Ok(region)
    }

    /// Index of page `page` within its region.
    pub(crate) fn index(page: u64) -> usize {
        (page % SLOTS as u64) as usize
    }

    /// Sets the size in pages; pages beyond it are given back. The caller holds the inode lock.
    pub(crate) fn resize(&self, pages: u64) {
        let old = self.pages.swap(pages, Ordering::Release);
        if pages > old {
            // The counts hold 2^64 pages; a file has 2^31 at most.
            let _ = self.vm.counts().pages.add_empty(pages - old);
        } else {
            self.punch(pages, old);
            let mut counts = self.vm.counts();
            if counts.pages.remove_empty(old - pages).is_err() {
                bug_once!("a file shrank by more than was empty");
            }
        }
    }

    /// Gives pages `from..to` back.
    pub(crate) fn punch(&self, from: u64, to: u64) {
        let cut = from >= self.pages();
        self.each_region(from, to, &mut |guard, first, end| {
            guard.zap_punched(first, end.saturating_sub(first));
            if guard.huge().is_some() {
                drop(guard.punch_huge(first, end, cut));
                self.host.hole_punched(guard.region());
                return;
            }
            for index in first..end {
                if guard.slot(index).state() != State::Empty {
                    self.host.release(guard.set(index, Content::Empty, 0));
                } else {
                    guard.note(index, crate::logic::slot::Slot::EMPTY);
                }
            }
        });
    }

    /// Runs `f` on each region that exists in pages `from..to`, locked, with the part that is meant.
    pub(crate) fn each_region(
        &self,
        from: u64,
        to: u64,
        f: &mut dyn FnMut(&mut RegionGuard<'_>, usize, usize),
    ) {
        const STEP: usize = 64;
        let mut page = from;
        while page < to {
            let first = Self::index(page);
            let next_region = (page - first as u64).saturating_add(SLOTS as u64);
            match self.region(page) {
                None => page = self.next_region_at(next_region, to),
                Some(region) => {
                    let end = if next_region > to {
                        Self::index(to)
                    } else {
                        SLOTS
                    };
                    // Bounded steps, so that no fault waits for the whole region; a folio goes only
                    // as a whole.
                    let pages = if region.looks_huge() { SLOTS } else { STEP };
                    let mut step = first;
                    while step < end {
                        let step_end = step.saturating_add(pages).min(end);
                        f(&mut region.lock(), step, step_end);
                        step = step_end;
                    }
                    page = next_region;
                }
            }
            crate::sys::task::cond_resched();
        }
    }

    /// The first page at or after `page` whose region exists, or `to`.
    pub(crate) fn next_region_at(&self, page: u64, to: u64) -> u64 {
        let end = self.end.lock().saturating_mul(SLOTS as u64).min(to);
        let mut page = page;
        while page < end && self.region(page).is_none() {
            let number = (page / SLOTS as u64).saturating_add(1);
            page = number.saturating_mul(SLOTS as u64);
            yield_at(number);
        }
        if page < end {
            page
        } else {
            to
        }
    }

    /// The file is gone: nothing maps it, everything is given back.
    pub(crate) fn evict(&self) {
        let pages = self.pages.swap(0, Ordering::Release);
        let end = *self.end.lock();
        for number in 0..end {
            let Ok(number) = usize::try_from(number) else {
                break;
            };
            let region = self.regions.lock().remove(number);
            if let Some(region) = region {
                self.host.registry().remove(&region);
                region
                    .lock()
                    .retire(&mut |content| self.host.release(content));
                crate::sys::task::cond_resched();
            }
            yield_at(number as u64);
        }
        if self.host.registry().live() == 0 {
            self.host.index().reset_if_unused(self.host.registry());
        }
        if self.vm.counts().pages.remove_empty(pages).is_err() {
            bug_once!("a file ended with pages that are not empty");
        }
    }
}

/// Lets others run now and then on the way over regions that are not there: a file may have 2^22.
fn yield_at(number: u64) {
    if number % 1024 == 0 {
        crate::sys::task::cond_resched();
    }
}
