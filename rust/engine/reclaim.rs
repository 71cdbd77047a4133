// SPDX-License-Identifier: GPL-2.0

//! The reclaimer: the thread that keeps an eye on the host's memory.

use super::host::Host;
use crate::sys::task::{self, Work};
use kernel::sync::Arc;

/// The thread's work.
pub(crate) struct Reclaimer(pub(crate) Arc<Host>);

impl Work for Reclaimer {
    fn run(&self) {
        let host = &self.0;
        while !task::should_stop() {
            host.pressure.look();
            let sleep_us = host.pressure.next_look_us();
            host.reclaimer_bell.sleep(sleep_us, task::should_stop);
        }
    }

    fn wake(&self) {
        self.0.reclaimer_bell.ring();
    }
}
