// SPDX-License-Identifier: GPL-2.0

//! Who must wait before it gets more memory, and for how long.
//!
//! A VM over its `limit_kb` waits for the reclaimer to bring it below; on a host that is `low` VMs
//! above their fair share wait, and when hardly anything is left all of them. Each wait ends with a
//! signal and is bounded: then the allocation is made all the same, for a guest that got no memory at all
//! would have to die.

use super::{count, host::Host, vm::Vm};
use crate::{
    logic::state::HostState,
    sys::{
        clock,
        fault::{Answer, Fault},
        protect::{self, Protection},
        task,
    },
};
use core::sync::atomic::Ordering;
use kernel::sync::Arc;

/// The longest wait for one page.
const STALL_MAX_US: u64 = 200_000;

impl Host {
    /// Whether `vm` must wait before it gets more memory.
    #[inline]
    pub(crate) fn must_wait(&self, vm: &Vm) -> bool {
        if !protect::armed(Protection::Throttle) {
            return false;
        }
        vm.is_over_limit() && !vm.is_stuck()
            || self.state() == HostState::Low && (vm.is_over_share() || self.pressure.is_critical())
    }

    /// Waits until `vm` may have more memory, for a syscall that holds no lock of the engine.
    pub(crate) fn throttle(&self, vm: &Vm) {
        self.ask_for(vm);
        if self.must_wait(vm) {
            self.wait_for(vm);
        }
    }

    /// Lets the reclaimer know in time that `vm` is about to reach its limit.
    fn ask_for(&self, vm: &Vm) {
        if vm.should_ask() {
            self.reclaimer_bell.ring();
        }
    }

    fn wait_for(&self, vm: &Vm) {
        let start = clock::now_us();
        self.reclaimer_bell.ring();
        task::stalled_for_memory(|| {
            vm.wait_for_relief(STALL_MAX_US, || !self.must_wait(vm));
        });
        count(&vm.events.stalls);
        vm.events
            .stall_us
            .fetch_add(clock::now_us().saturating_sub(start), Ordering::Relaxed);
    }
}

/// As [`Host::throttle`] for a fault, with the fault lock dropped. Handed back is a fault that need
/// not wait, has waited before, or cannot.
pub(crate) fn throttle_fault(
    host: &Arc<Host>,
    vm: &Arc<Vm>,
    fault: Fault,
) -> Result<Fault, Answer> {
    host.ask_for(vm);
    if !host.must_wait(vm) || !fault.may_wait() {
        return Ok(fault);
    }
    // With the fault lock dropped the mapping, and with it the file, may go.
    let (host, vm) = (host.clone(), vm.clone());
    Err(fault.retry_after(|| host.wait_for(&vm)))
}
