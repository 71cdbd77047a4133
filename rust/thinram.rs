// SPDX-License-Identifier: GPL-2.0

//! ThinRAM: thin-provisioned RAM for KVM guests.
//!
//! A file system whose files are guest memory. The module owns the pages, so it can share them one
//! by one while the guests run. Floors, from the top, and no arrow runs up: this file, `glue` (what
//! the kernel calls), `engine` (locks and policy), `logic` (pure) and `sys` (thin wrappers).

use kernel::prelude::*;

mod engine;
mod glue;
// Public for the host crate that the same files build as.
#[allow(unreachable_pub)]
mod logic;
mod sys;

#[cfg(CONFIG_KUNIT = "y")]
#[path = "../tests-kunit/kunit/mod.rs"]
mod kunit;

use engine::{
    host::Host,
    reclaim::Reclaimer,
    scan::Scanner,
    split::Splitter,
    swapper::{Reader, Writer, READERS},
};
use sys::task::Thread;

macro_rules! thinram_module {
    ($($parameters:tt)*) => {
        module! {
            type: ThinRam,
            name: "thinram",
            authors: ["The ThinRAM developers"],
            description: "Thin-provisioned RAM for KVM guests",
            license: "GPL",
            alias: ["fs-thinram"],
            $($parameters)*
        }
    };
}

#[cfg(not(thinram_debug))]
thinram_module! {}

#[cfg(thinram_debug)]
thinram_module! {
    params: {
        fail_allocation: u64 {
            default: 0,
            description: "As the file of that name in debugfs: lets the Nth request fail",
        },
    },
}

/// The loaded module. Fields are dropped in this order: first what others can see, then what works,
/// then what they work on.
struct ThinRam {
    _fs: Registration,
    _debug: Pin<KBox<glue::debug::DebugFiles>>,
    _shrinker: glue::shrinker::HostShrinker,
    _scanner: Thread<Scanner>,
    _splitter: Thread<Splitter>,
    _reclaimer: Thread<Reclaimer>,
    _swap_out: Thread<Writer>,
    _swap_in: [Thread<Reader>; READERS],
    _sysfs: SysfsTree,
    _host: HostReference,
    _callbacks: Callbacks,
}

/// The file system, known to the kernel.
struct Registration;

impl Drop for Registration {
    fn drop(&mut self) {
        glue::fs::unregister();
    }
}

/// /sys/fs/thinram.
struct SysfsTree;

impl Drop for SysfsTree {
    fn drop(&mut self) {
        glue::sysfs::remove_tree();
    }
}

/// The host, as `glue` knows it.
struct HostReference;

impl Drop for HostReference {
    fn drop(&mut self) {
        glue::mount::forget_host();
    }
}

/// Code that RCU still calls.
struct Callbacks;

impl Drop for Callbacks {
    fn drop(&mut self) {
        sys::table::wait_for_freed_tables();
    }
}

impl kernel::Module for ThinRam {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        #[cfg(thinram_debug)]
        sys::inject::Countdown::of(None)
            .fail_after(module_parameters::fail_allocation.value(), false);
        let host = Host::new()?;
        glue::start(&host)?;
        let reference = HostReference;
        let sysfs = SysfsTree;
        let work = sys::alloc::counted(Scanner(host.clone()))?;
        let scanner = Thread::start(c"thinram_scan", work)?;
        let work = sys::alloc::counted(Reclaimer(host.clone()))?;
        let reclaimer = Thread::start(c"thinram_reclaim", work)?;
        let work = sys::alloc::counted(Splitter(host.clone()))?;
        let splitter = Thread::start(c"thinram_split", work)?;
        let work = sys::alloc::counted(Writer(host.clone()))?;
        let swap_out = Thread::start(c"thinram_swapout", work)?;
        let reader = || -> Result<Thread<Reader>> {
            let work = sys::alloc::counted(Reader(host.clone()))?;
            Thread::start(c"thinram_swapin", work)
        };
        let swap_in = [reader()?, reader()?, reader()?];
        let shrinker = glue::shrinker::HostShrinker::new(host.clone())?;
        let debug = glue::debug::DebugFiles::new(host)?;
        glue::fs::register()?;
        pr_info!("loaded; mount -t thinram -o domain=NAME thinram DIR\n");
        Ok(ThinRam {
            _fs: Registration,
            _debug: debug,
            _shrinker: shrinker,
            _scanner: scanner,
            _splitter: splitter,
            _reclaimer: reclaimer,
            _swap_out: swap_out,
            _swap_in: swap_in,
            _sysfs: sysfs,
            _host: reference,
            _callbacks: Callbacks,
        })
    }
}
