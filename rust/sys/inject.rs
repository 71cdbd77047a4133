// SPDX-License-Identifier: GPL-2.0

//! What fails when a test says so. Each place in `sys` and `glue` that may be refused something asks
//! [`fails`] first; a debug build (`THINRAM_DEBUG=y`) counts down to the one that fails, of a kind or of all
//! kinds, any other build has the constant `false`. And what comes late: [`hold_answer`].

/// A kind of places that may fail.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(usize)]
pub(crate) enum Point {
    /// A frame of 4 KiB, charged or not.
    Frame,
    /// A folio of 2 MiB.
    HugeFrame,
    /// A page table on the way into a mapping.
    PageTable,
    /// The words of a region.
    Slots,
    /// A page of the index: hints or records.
    Index,
    /// A pool of zsmalloc.
    Pool,
    /// An object in a pool.
    Object,
    /// A shared page without a frame.
    Packed,
    /// What compression and decompression work in.
    Scratch,
    /// What swap writes from and reads into.
    Buffer,
    /// A kernel thread.
    Thread,
    /// A directory in sysfs.
    Kobject,
    /// A file in sysfs.
    Attribute,
    /// A small object, or a list of them.
    Memory,
    /// A region in its file's table.
    Entry,
    /// The file system, made known to the kernel.
    FileSystem,
    /// The shrinker, made known to the kernel.
    Shrinker,
    /// A directory to swap to, looked up.
    SwapDir,
    /// A swap file.
    SwapFile,
    /// Room in a swap file.
    SwapRoom,
    /// A cluster written to a swap file.
    SwapWrite,
    /// A cluster read from one.
    SwapRead,
    /// A page copied: its memory is found to be broken.
    Copy,
    /// A compressed page taken apart: it is found to be damaged.
    Decompress,
}

#[cfg(thinram_debug)]
impl Point {
    /// Whether what fails is a request that is refused. Else it is data that does not come.
    const fn is_request(self) -> bool {
        !matches!(
            self,
            Point::SwapWrite | Point::SwapRead | Point::Copy | Point::Decompress
        )
    }
}

#[cfg(thinram_debug)]
/// All of them, with the names of their switches in debugfs.
pub(crate) const POINTS: [(Point, &kernel::str::CStr); 24] = [
    (Point::Frame, c"fail_frame"),
    (Point::HugeFrame, c"fail_huge_frame"),
    (Point::PageTable, c"fail_page_table"),
    (Point::Slots, c"fail_slots"),
    (Point::Index, c"fail_index"),
    (Point::Pool, c"fail_pool"),
    (Point::Object, c"fail_object"),
    (Point::Packed, c"fail_packed"),
    (Point::Scratch, c"fail_scratch"),
    (Point::Buffer, c"fail_buffer"),
    (Point::Thread, c"fail_thread"),
    (Point::Kobject, c"fail_kobject"),
    (Point::Attribute, c"fail_attribute"),
    (Point::Memory, c"fail_memory"),
    (Point::Entry, c"fail_entry"),
    (Point::FileSystem, c"fail_file_system"),
    (Point::Shrinker, c"fail_shrinker"),
    (Point::SwapDir, c"fail_swap_dir"),
    (Point::SwapFile, c"fail_swap_file"),
    (Point::SwapRoom, c"fail_swap_room"),
    (Point::SwapWrite, c"fail_swap_write"),
    (Point::SwapRead, c"fail_swap_read"),
    (Point::Copy, c"fail_copy"),
    (Point::Decompress, c"fail_decompress"),
];

#[cfg(not(thinram_debug))]
#[inline(always)]
pub(crate) const fn fails(_point: Point) -> bool {
    false
}

#[cfg(thinram_debug)]
pub(crate) use counted::{fails, Countdown};

#[cfg(thinram_debug)]
mod counted {
    use super::{Point, POINTS};
    use core::sync::atomic::{AtomicU64, Ordering};

    /// In a countdown: all that come after the one that fails do so too.
    const ALL_AFTER: u64 = 1 << 63;

    /// For each kind, and last for all requests: how many it still is until one fails, that one
    /// included; 0: none fails.
    static LEFT: [AtomicU64; POINTS.len() + 1] = [const { AtomicU64::new(0) }; POINTS.len() + 1];

    /// The countdown of one kind, or of any request.
    #[derive(Clone, Copy)]
    pub(crate) struct Countdown(Option<Point>);

    impl Countdown {
        /// That of `point`; of any request for `None`.
        pub(crate) const fn of(point: Option<Point>) -> Countdown {
            Countdown(point)
        }

        fn left_word(self) -> &'static AtomicU64 {
            let [points @ .., any] = &LEFT;
            self.0
                .and_then(|point| points.get(point as usize))
                .unwrap_or(any)
        }

        /// Lets the `nth` from now on fail, and all after it or none; 0: none at all.
        pub(crate) fn fail_after(self, nth: u64, all_after: bool) {
            let after = if all_after { ALL_AFTER } else { 0 };
            self.left_word().store(nth | after, Ordering::Relaxed);
        }

        /// How many it still is to the first that fails; 0 after it failed, 1 while all do.
        pub(crate) fn left(self) -> u64 {
            self.left_word().load(Ordering::Relaxed) & !ALL_AFTER
        }

        fn is_over(self) -> bool {
            let relaxed = Ordering::Relaxed;
            let next = |left: u64| match left & !ALL_AFTER {
                0 => None,
                1 if left != 1 => Some(left),
                _ => left.checked_sub(1),
            };
            self.left_word()
                .fetch_update(relaxed, relaxed, next)
                .is_ok_and(|left| left & !ALL_AFTER == 1)
        }
    }

    /// Whether this one is to fail.
    pub(crate) fn fails(point: Point) -> bool {
        let own = Countdown::of(Some(point)).is_over();
        (point.is_request() && Countdown::of(None).is_over()) || own
    }
}

#[cfg(not(thinram_debug))]
#[inline(always)]
pub(crate) const fn hold_answer() {}

#[cfg(thinram_debug)]
pub(crate) use held::{hold_answer, HeldAnswers};

#[cfg(thinram_debug)]
mod held {
    use crate::sys::task;
    use core::sync::atomic::{AtomicU64, Ordering};

    /// Answers are held from this one on, counted from 1; 0: none is.
    static FROM: AtomicU64 = AtomicU64::new(0);
    /// Answers that came since then.
    static CAME: AtomicU64 = AtomicU64::new(0);

    /// What a swap disk answered to one of its readers, until a test lets it through.
    #[derive(Clone, Copy)]
    pub(crate) struct HeldAnswers;

    impl HeldAnswers {
        /// Holds the `first` answer from when none was held, and all after it; 0 lets all through.
        pub(crate) fn hold_from(self, first: u64) {
            if FROM.swap(first, Ordering::Relaxed) == 0 {
                CAME.store(0, Ordering::Relaxed);
            }
        }

        /// Answers that came since.
        pub(crate) fn came(self) -> u64 {
            CAME.load(Ordering::Relaxed)
        }
    }

    /// Waits while this answer is held. For kernel threads, with no lock held.
    pub(crate) fn hold_answer() {
        const STEP_US: u64 = 5_000;
        if FROM.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mine = CAME.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        let is_held = || (1..=mine).contains(&FROM.load(Ordering::Relaxed));
        while is_held() && !task::should_stop() {
            task::sleep_killable(STEP_US);
        }
    }
}
