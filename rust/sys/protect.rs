// SPDX-License-Identifier: GPL-2.0

//! The protections that keep a guest's bytes its own, by name. A debug build (`THINRAM_DEBUG=y`) can
//! take each one out, to show that a test notices; any other build has no such switch, and `armed`
//! is the constant `true`.

/// A protection that a test must miss when it is gone.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(usize)]
pub(crate) enum Protection {
    /// Zap the mappings before a page is frozen and replaced.
    Zap,
    /// Freeze the reference count: no pin may write to a page that is being replaced.
    Freeze,
    /// Compare all bytes under freeze; never trust the hash.
    Compare,
    /// Map shared and zero frames read-only.
    ReadOnly,
    /// Zap a punched range before its frames are freed.
    PunchZap,
    /// Write-protect a page before its hash is trusted.
    WriteProtect,
    /// Trust the hash of a page only while no pin could write to it.
    Unpinned,
    /// Distrust the hash once a page may change.
    NoteChange,
    /// Keep what is of different domains apart.
    Border,
    /// Hash a page as a whole. Without it nothing may go wrong: it makes hashes of unlike pages equal,
    /// so that only [`Protection::Compare`] tells them apart.
    WholeHash,
    /// Let nothing out of a swap file that is not what was written.
    Checksum,
    /// Let a page go to the swap file only once it was written there.
    WriteResult,
    /// Take what a swap file gives back for that file's alone.
    SwapFile,
    /// Give a guest no frame that shows what another left in it.
    Zeroed,
    /// Zero what a hole or a new end cuts off in a page that stays.
    ZeroHole,
    /// Merge into a fresh frame, never into that of a sharer, who may have chosen where it lies.
    FreshFrame,
    /// Keep off memory that is marked as broken.
    Poison,
    /// Encrypt what goes to a swap file.
    Encrypt,
    /// Charge a guest's own pages to its memory cgroup.
    Charge,
    /// Leave a VM what is reserved for it.
    Reservation,
    /// Have VMs wait that want more than their part while the host is short of memory.
    Throttle,
    /// Lock a second region only if it is free: who waits for one with another locked may wait for ever.
    TryLock,
    /// Break the shares across a border before a change of it returns.
    Unshare,
    /// Let the index grow: without it, more contents than it holds have to take turns.
    IndexGrowth,
    /// Keep frames for a split for which there is no memory.
    SplitReserve,
    /// Have a number for each region of 8 TiB. Without it there are few, and tests see them run out.
    RegionNumbers,
    /// Keep a shared page to as many sharers as `max_page_sharing` says.
    Sharers,
    /// Keep pages of different nodes apart where `merge_across_nodes` says so.
    Nodes,
    /// Keep a VM to its `limit_kb`.
    Limit,
    /// Keep a VM's compressed pages to what `compress_max_percent` leaves them.
    PoolCap,
    /// Let a page have a billion references. Without it there are few, and tests see what comes then.
    References,
}

#[cfg(thinram_debug)]
/// All of them, with the names of their switches in debugfs.
pub(crate) const ALL: [(Protection, &kernel::str::CStr); 31] = [
    (Protection::Zap, c"break_zap"),
    (Protection::Freeze, c"break_freeze"),
    (Protection::Compare, c"break_compare"),
    (Protection::ReadOnly, c"break_read_only"),
    (Protection::PunchZap, c"break_punch_zap"),
    (Protection::WriteProtect, c"break_write_protect"),
    (Protection::Unpinned, c"break_unpinned"),
    (Protection::NoteChange, c"break_note_change"),
    (Protection::Border, c"break_border"),
    (Protection::WholeHash, c"break_whole_hash"),
    (Protection::Checksum, c"break_checksum"),
    (Protection::WriteResult, c"break_write_result"),
    (Protection::SwapFile, c"break_swap_file"),
    (Protection::Zeroed, c"break_zeroed"),
    (Protection::ZeroHole, c"break_zero_hole"),
    (Protection::FreshFrame, c"break_fresh_frame"),
    (Protection::Poison, c"break_poison"),
    (Protection::Encrypt, c"break_encrypt"),
    (Protection::Charge, c"break_charge"),
    (Protection::Reservation, c"break_reservation"),
    (Protection::Throttle, c"break_throttle"),
    (Protection::TryLock, c"break_try_lock"),
    (Protection::Unshare, c"break_unshare"),
    (Protection::IndexGrowth, c"break_index_growth"),
    (Protection::SplitReserve, c"break_split_reserve"),
    (Protection::RegionNumbers, c"break_region_numbers"),
    (Protection::Sharers, c"break_sharers"),
    (Protection::Nodes, c"break_nodes"),
    (Protection::Limit, c"break_limit"),
    (Protection::PoolCap, c"break_pool_cap"),
    (Protection::References, c"break_references"),
];

#[cfg(not(thinram_debug))]
#[inline(always)]
pub(crate) const fn armed(_protection: Protection) -> bool {
    true
}

#[cfg(thinram_debug)]
pub(crate) use switched::{armed, switch};

#[cfg(thinram_debug)]
mod switched {
    use super::{Protection, ALL};
    use core::sync::atomic::{AtomicBool, Ordering};

    static BROKEN: [AtomicBool; ALL.len()] = [const { AtomicBool::new(false) }; ALL.len()];

    /// The switch of one protection: true = taken out.
    pub(crate) fn switch(protection: Protection) -> &'static AtomicBool {
        &BROKEN[protection as usize]
    }

    /// Whether the protection is in place.
    pub(crate) fn armed(protection: Protection) -> bool {
        !switch(protection).load(Ordering::Relaxed)
    }
}
