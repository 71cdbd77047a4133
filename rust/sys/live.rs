// SPDX-License-Identifier: GPL-2.0

//! How much of what the kernel lends the module is out, in a debug build (`THINRAM_DEBUG=y`): kmemleak
//! finds forgotten objects of slabs, but no pages.

/// What is lent.
#[derive(Clone, Copy)]
#[repr(usize)]
pub(crate) enum Lent {
    /// References to pages, one by one or to a part of a folio; those of mappings are the kernel's.
    Frame,
    /// References to folios of 2 MiB.
    Folio,
    /// Pools of zsmalloc.
    Pool,
    /// Objects in them.
    Object,
}

#[cfg(not(thinram_debug))]
impl Lent {
    /// One more is out.
    #[inline(always)]
    pub(super) const fn out(self) {}

    /// One is back.
    #[inline(always)]
    pub(super) const fn back(self) {}
}

#[cfg(thinram_debug)]
pub(crate) use counted::LENT;

#[cfg(thinram_debug)]
mod counted {
    use super::Lent;
    use core::sync::atomic::{AtomicI64, Ordering};

    /// All kinds, with the names of their files in debugfs.
    pub(crate) const LENT: [(Lent, &kernel::str::CStr); 4] = [
        (Lent::Frame, c"live_frames"),
        (Lent::Folio, c"live_folios"),
        (Lent::Pool, c"live_pools"),
        (Lent::Object, c"live_objects"),
    ];

    static LIVE: [AtomicI64; LENT.len()] = [const { AtomicI64::new(0) }; LENT.len()];

    impl Lent {
        fn count(self, by: i64) {
            if let Some(live) = LIVE.get(self as usize) {
                live.fetch_add(by, Ordering::Relaxed);
            }
        }

        /// One more is out.
        pub(in crate::sys) fn out(self) {
            self.count(1);
        }

        /// One is back.
        pub(in crate::sys) fn back(self) {
            self.count(-1);
        }

        /// So many are out.
        pub(crate) fn live(self) -> i64 {
            LIVE.get(self as usize)
                .map_or(0, |live| live.load(Ordering::Relaxed))
        }
    }
}
