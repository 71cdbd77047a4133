// SPDX-License-Identifier: GPL-2.0

//! What is done to all mappings of a file at once.

use super::{bindings, protect};
use core::ptr::NonNull;

/// The mappings of one file.
///
/// # Invariants
///
/// The pointer is good for as long as the value exists: it is kept only inside regions and dropped
/// from them, under their locks, before the inode goes (`engine::region::Region::retire`).
pub(crate) struct Mapping(NonNull<bindings::address_space>);

// SAFETY: The functions below may be called from any thread.
unsafe impl Send for Mapping {}
// SAFETY: As above; the address space has its own locks.
unsafe impl Sync for Mapping {}

/// Where the mappings of a file's regions come from.
pub(crate) struct MappingSource(NonNull<bindings::address_space>);

// SAFETY: Holds a pointer that only `mapping` hands on.
unsafe impl Send for MappingSource {}
// SAFETY: As above.
unsafe impl Sync for MappingSource {}

impl MappingSource {
    /// The mappings of `inode`.
    ///
    /// # Safety
    ///
    /// The source is not used, and every [`Mapping`] from it is dropped, before `inode` is freed.
    pub(crate) unsafe fn of_inode(inode: NonNull<bindings::inode>) -> Option<MappingSource> {
        // SAFETY: The caller holds the inode.
        NonNull::new(unsafe { (*inode.as_ptr()).i_mapping }).map(MappingSource)
    }

    /// For one more region.
    pub(crate) fn mapping(&self) -> Mapping {
        // INVARIANT: by the promise made to `of_inode`.
        Mapping(self.0)
    }
}

/// An address space that nothing ever maps.
#[cfg(CONFIG_KUNIT = "y")]
struct Unmapped(kernel::types::Opaque<bindings::address_space>);

// SAFETY: The address space has its own locks.
#[cfg(CONFIG_KUNIT = "y")]
unsafe impl Sync for Unmapped {}

#[cfg(CONFIG_KUNIT = "y")]
impl MappingSource {
    /// That of a file that nothing ever maps.
    pub(crate) fn for_test() -> MappingSource {
        use core::sync::atomic::{AtomicBool, Ordering};
        static UNMAPPED: Unmapped = Unmapped(kernel::types::Opaque::uninit());
        static READY: AtomicBool = AtomicBool::new(false);
        let space = UNMAPPED.0.get();
        // Tests run one after the other.
        if !READY.swap(true, Ordering::Relaxed) {
            // SAFETY: Nobody uses it before; it clears all of it first.
            unsafe { bindings::address_space_init_once(space) };
        }
        // SAFETY: The address of a static, which stays for as long as the module does.
        MappingSource(unsafe { NonNull::new_unchecked(space) })
    }
}

impl Mapping {
    /// Takes `pages` pages from `first` on out of every page table, KVM's included.
    #[inline]
    pub(crate) fn zap(&self, first: u64, pages: u64) {
        if protect::armed(protect::Protection::Zap) {
            // SAFETY: By the type's invariant. May sleep; the caller holds a region lock (a mutex)
            // and no spinlock.
            unsafe {
                bindings::unmap_mapping_pages(
                    self.0.as_ptr(),
                    first as usize,
                    pages as usize,
                    false,
                )
            }
        }
    }

    /// The same for a range whose content is being thrown away.
    pub(crate) fn zap_punched(&self, first: u64, pages: u64) {
        if protect::armed(protect::Protection::PunchZap) {
            self.zap(first, pages);
        }
    }

    /// Makes every mapping of the range read-only and clean, so that the next write is a fault.
    ///
    /// The second walk is needed because mprotect() makes a dirty entry writable without a fault.
    pub(crate) fn write_protect(&self, first: u64, pages: u64) {
        if !protect::armed(protect::Protection::WriteProtect) {
            return;
        }
        let (first, pages) = (first as usize, pages as usize);
        let (mut start, mut end) = (pages, 0);
        let mut dirty = [0usize; super::slots::SLOTS / usize::BITS as usize];
        // SAFETY: By the type's invariant; the region is Small, so no writable huge entry is met.
        // The bitmap has a bit for each page of a region, more is never asked for.
        unsafe {
            bindings::wp_shared_mapping_range(self.0.as_ptr(), first, pages);
            bindings::clean_record_shared_mapping_range(
                self.0.as_ptr(),
                first,
                pages.min(super::slots::SLOTS),
                first,
                dirty.as_mut_ptr(),
                &mut start,
                &mut end,
            );
        }
    }

    /// Takes a small page out of KVM's page tables alone and makes its entries in all others clean. True
    /// if any was dirty. The page's region must not be a folio: a writable entry of 2 MiB is a warning.
    pub(crate) fn clean(&self, page: u64) -> bool {
        let page = page as usize;
        let (mut start, mut end, mut dirty) = (1, 0, 0usize);
        // SAFETY: By the type's invariant; the bitmap has a bit for the one page that is asked for.
        let cleaned = unsafe {
            bindings::clean_record_shared_mapping_range(
                self.0.as_ptr(),
                page,
                1,
                page,
                &mut dirty,
                &mut start,
                &mut end,
            )
        };
        cleaned > 0
    }

    /// [`Mapping::write_protect`] for the mappings, of either size, of a folio of 512 pages from `pfn` on.
    pub(crate) fn write_protect_folio(&self, first: u64, pfn: u64) {
        if !protect::armed(protect::Protection::WriteProtect) {
            return;
        }
        // SAFETY: By the type's invariant; the frames are alive, the caller holds their region's lock.
        unsafe {
            bindings::mapping_wrprotect_range(
                self.0.as_ptr(),
                first as usize,
                pfn as usize,
                super::slots::SLOTS,
            );
        }
    }
}
