// SPDX-License-Identifier: GPL-2.0

//! Changes of what bounds the compressed pages, and of where they go beyond that.
//!
//! A lower cap brings pages back in the background, unless they can go to the swap file; without
//! `swap_dir` the pages in swap files come back. That takes memory, so a cap that is too low for
//! what there is is refused, and nothing changes.
//!
//! Lock order: VM list > a VM's counts.

use super::{cold, host::Host, vm::Vm};
use crate::{
    logic::{
        counts::{pages_to_kb, Class},
        state::HostState,
    },
    sys::{alloc, memory, swapio::SwapDir},
};
use core::sync::atomic::Ordering;
use kernel::{prelude::*, sync::Arc};

/// KiB that must become frames again before the pool of `vm` is no larger than `percent`, and what
/// the VM holds more then.
fn needed_kb(host: &Host, vm: &Vm, percent: u64) -> (u64, u64) {
    if vm.swap().is_on(&host.swap) {
        return (0, 0);
    }
    let pages = vm.snapshot().pages;
    let (pool, cap) = (
        vm.store().pages(),
        pages.total().saturating_mul(percent) / 100,
    );
    let excess = pool.saturating_sub(cap);
    if excess == 0 {
        return (0, 0);
    }
    let compressed_pages = pages.get(Class::Compressed);
    let back = (compressed_pages.saturating_mul(excess)).div_ceil(pool);
    (pages_to_kb(back), pages_to_kb(back.saturating_sub(excess)))
}

impl Host {
    /// The reclaimer tries anew, for every VM, what did not work before.
    pub(crate) fn try_anew(&self) {
        self.vms().for_each(|vm| vm.try_anew());
        self.shared_anew.make();
        self.reclaimer_bell.ring();
    }

    /// Whether [`Host::try_anew`] was called since this was last asked.
    pub(super) fn shared_tried_anew(&self) -> bool {
        self.shared_anew.take()
    }

    /// The same for one VM.
    pub(crate) fn try_vm_anew(&self, vm: &Vm) {
        vm.try_anew();
        self.reclaimer_bell.ring();
    }

    /// `compress_max_percent`: ENOMEM when what must be brought back would not fit.
    pub(crate) fn set_compress_max_percent(&self, percent: u64) -> Result {
        let mut needed = 0u64;
        let mut fits = true;
        self.vms().for_each(|vm| {
            if vm.claims.compress_max_percent.load(Ordering::Relaxed) == 0 {
                let (back_kb, more_kb) = needed_kb(self, vm, percent);
                needed = needed.saturating_add(back_kb);
                fits &= has_room(vm, more_kb);
            }
        });
        let shared = cold::pages_above(self, &self.vms().all()?, percent)?;
        needed = needed.saturating_add(pages_to_kb(shared));
        if !fits || !self.has_room(needed) {
            return Err(ENOMEM);
        }
        self.knobs
            .compress_max_percent
            .store(percent, Ordering::Relaxed);
        self.try_anew();
        Ok(())
    }

    /// The same of one VM, 0 = the host's.
    pub(crate) fn set_vm_compress_max_percent(&self, vm: &Arc<Vm>, percent: u64) -> Result {
        let effective = match percent {
            0 => self.knobs.compress_max_percent.load(Ordering::Relaxed),
            own => own,
        };
        let (back_kb, more_kb) = needed_kb(self, vm, effective);
        if !has_room(vm, more_kb) || !self.has_room(back_kb) {
            return Err(ENOMEM);
        }
        vm.claims
            .compress_max_percent
            .store(percent, Ordering::Relaxed);
        self.try_vm_anew(vm);
        Ok(())
    }

    /// `swap_dir`, for VMs whose mount names none; the empty name is none. Files in another directory
    /// are emptied in the background: ENOMEM when what is in them would not fit. Else the errors of
    /// [`SwapDir::open`]; nothing changes then.
    pub(crate) fn set_swap_dir(&self, name: &[u8]) -> Result {
        let dir = if name.is_empty() {
            None
        } else {
            Some(alloc::counted(SwapDir::open(name)?)?)
        };
        let same = match (&dir, &self.swap.dir()) {
            (Some(new), Some(old)) => new.is(old),
            _ => false,
        };
        if !same {
            let mut needed = 0u64;
            let mut fits = true;
            self.vms().for_each(|vm| {
                if vm.swap().own_dir().is_none() {
                    let kb = pages_to_kb(vm.swap().live());
                    needed = needed.saturating_add(kb);
                    fits &= has_room(vm, kb);
                }
            });
            let shared = pages_to_kb(cold::pages_in_host_dir(self)?);
            if !fits || !self.has_room(needed.saturating_add(shared)) {
                return Err(ENOMEM);
            }
        }
        self.swap.set_dir(dir);
        self.try_anew();
        Ok(())
    }

    /// Whether the host is not about to compress once it gave `kb` away.
    fn has_room(&self, kb: u64) -> bool {
        let keep_kb = HostState::Hard.leave_kb(self.pressure.effective_minfree_kb());
        kb == 0 || memory::available_kb() >= kb.saturating_add(keep_kb)
    }
}

/// Whether the VM stays within its limit when it holds `kb` more.
fn has_room(vm: &Vm, kb: u64) -> bool {
    vm.limit_kb()
        .is_none_or(|limit_kb| kb == 0 || vm.resident_kb().saturating_add(kb) <= limit_kb)
}
