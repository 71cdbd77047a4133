// SPDX-License-Identifier: GPL-2.0

//! What the kernel's reclaim asks.

use crate::{engine::host::Host, sys::shrinker::Shrinker};
use kernel::{
    ffi::{c_ulong, c_void},
    prelude::*,
    sync::Arc,
};

/// `SHRINK_STOP`: no use to ask again for now.
const STOP: c_ulong = c_ulong::MAX;
/// `SHRINK_EMPTY`: there is nothing.
const EMPTY: c_ulong = c_ulong::MAX - 1;

/// The host's shrinker; the shrinker goes first.
pub(crate) struct HostShrinker {
    _shrinker: Shrinker,
    _host: Arc<Host>,
}

impl HostShrinker {
    /// Registers it.
    pub(crate) fn new(host: Arc<Host>) -> Result<HostShrinker> {
        let data = core::ptr::from_ref::<Host>(&host).cast();
        // SAFETY: The callbacks expect a host, which is kept until after the shrinker is gone.
        let shrinker = unsafe { Shrinker::register(data)? };
        Ok(HostShrinker {
            _shrinker: shrinker,
            _host: host,
        })
    }
}

/// # Safety
///
/// `data` is the host that [`HostShrinker::new`] gave to the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_shrinker_count(data: *mut c_void) -> c_ulong {
    // SAFETY: By the contract of the function.
    let host = unsafe { &*data.cast_const().cast::<Host>() };
    match host.shrinkable_pages() {
        0 => EMPTY,
        pages => usize::try_from(pages).unwrap_or(usize::MAX / 2),
    }
}

/// # Safety
///
/// As for [`thinram_rs_shrinker_count`].
#[no_mangle]
unsafe extern "C" fn thinram_rs_shrinker_scan(data: *mut c_void, pages: c_ulong) -> c_ulong {
    // SAFETY: By the contract of the function.
    let host = unsafe { &*data.cast_const().cast::<Host>() };
    match host.shrink(pages as u64) {
        0 => STOP,
        freed => usize::try_from(freed).unwrap_or(usize::MAX / 2),
    }
}
