// SPDX-License-Identifier: GPL-2.0

//! Frames (order-0 pages that we own a reference of) and the freeze protocol.
//!
//! A frame that the slots own has one reference of ours, and one more for each page-table entry that
//! maps it. Freezing takes the count from exactly one to zero: it succeeds only when nobody else, no
//! mapping, no pin and no reader, holds the page, and nobody can get hold of it until it is unfrozen.

use super::{
    bindings,
    inject::{self, Point},
    live::Lent,
    protect,
};
use crate::logic::hash::STEP;
use core::{marker::PhantomData, ptr::NonNull};
use kernel::{ffi::c_void, page::PAGE_SIZE};

/// What a frame is for, which decides who is charged and how hard the allocator tries.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) enum Purpose {
    /// A guest's own page, about to be overwritten whole; charged to the faulting task's cgroup.
    Guest,
    /// The same, zeroed.
    GuestZeroed,
    /// A guest's own page that a share gives back, about to be overwritten whole; charged, and
    /// nobody is killed for it: it is not a guest that asks.
    Returned,
    /// A frame that several share: the host's.
    Shared,
    /// The same, and a guest waits for it.
    Awaited,
}

impl Purpose {
    pub(super) fn gfp(self) -> bindings::gfp_t {
        // SAFETY: Constants of helpers.c, never written.
        unsafe {
            let flags = match self {
                Purpose::GuestZeroed if protect::armed(protect::Protection::Zeroed) => {
                    bindings::thinram_gfp_guest_zeroed
                }
                Purpose::Guest | Purpose::GuestZeroed => bindings::thinram_gfp_guest,
                Purpose::Returned => bindings::thinram_gfp_returned,
                Purpose::Shared => bindings::thinram_gfp_shared,
                Purpose::Awaited => bindings::thinram_gfp_awaited,
            };
            if protect::armed(protect::Protection::Charge) {
                flags
            } else {
                // These two differ by the charge alone.
                flags & !(bindings::thinram_gfp_guest ^ bindings::thinram_gfp_awaited)
            }
        }
    }
}

/// One reference to an order-0 page, or to a part of a 2 MiB folio; dropping it puts the reference.
pub(crate) struct Frame(NonNull<bindings::page>);

// SAFETY: A page reference belongs to no task and no CPU.
unsafe impl Send for Frame {}
// SAFETY: `&Frame` only gives out `PageRef`s, whose methods may be called from any thread.
unsafe impl Sync for Frame {}

impl Frame {
    /// Allocates a page near `node` (negative: anywhere near).
    pub(crate) fn alloc(purpose: Purpose, node: i32) -> Option<Frame> {
        if inject::fails(Point::Frame) {
            return None;
        }
        // SAFETY: May sleep; callers hold no spinlock.
        NonNull::new(unsafe { bindings::thinram_page_alloc(purpose.gfp(), node) }).map(Frame::own)
    }

    /// A reference that is ours from here on.
    fn own(page: NonNull<bindings::page>) -> Frame {
        Lent::Frame.out();
        Frame(page)
    }

    /// Takes over a reference that the caller owns.
    ///
    /// # Safety
    ///
    /// `page` is an order-0 page and the caller owns a reference, which passes to the frame.
    pub(super) unsafe fn from_page(page: NonNull<bindings::page>) -> Frame {
        Frame::own(page)
    }

    /// Gives the reference away as a frame number.
    pub(super) fn into_pfn(self) -> u64 {
        let pfn = self.as_ref().pfn();
        core::mem::forget(self);
        pfn
    }

    /// The reverse of [`Frame::into_pfn`].
    ///
    /// # Safety
    ///
    /// `pfn` came from [`Frame::into_pfn`] and is turned back only once.
    pub(super) unsafe fn from_pfn(pfn: u64) -> Frame {
        // SAFETY: A frame number that a frame gave out has a struct page.
        let page = unsafe { bindings::thinram_pfn_to_page(pfn as usize) };
        // SAFETY: pfn_to_page of a valid frame number is never null.
        Frame(unsafe { NonNull::new_unchecked(page) })
    }

    /// The page, for as long as the frame is borrowed.
    #[inline]
    pub(crate) fn as_ref(&self) -> PageRef<'_> {
        PageRef(self.0, PhantomData)
    }

    /// Zeroes the whole frame.
    pub(crate) fn clear(&mut self) {
        self.as_ref().zero_range(0, PAGE_SIZE);
    }

    /// Fills the whole frame with `pattern`.
    pub(crate) fn fill(&mut self, pattern: u32) {
        // SAFETY: The page is PAGE_SIZE long, aligned, and ours alone.
        unsafe {
            core::slice::from_raw_parts_mut(
                self.as_ref().address().cast::<u32>(),
                PAGE_SIZE / core::mem::size_of::<u32>(),
            )
        }
        .fill(pattern);
    }

    /// Overwrites the whole frame.
    pub(crate) fn overwrite(&mut self, bytes: &[u8; PAGE_SIZE]) {
        // SAFETY: The page is PAGE_SIZE long, and ours alone.
        unsafe {
            core::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.as_ref().address().cast::<u8>(),
                PAGE_SIZE,
            );
        }
    }

    /// Sets one byte.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(crate) fn fill_for_test(&mut self, at: usize, value: u8) {
        if at < PAGE_SIZE {
            // SAFETY: The byte lies within the page, which is ours alone.
            unsafe { self.as_ref().address().cast::<u8>().add(at).write(value) };
        }
    }

    /// Copies the whole content of `from`; memory that is marked as broken is not touched.
    pub(crate) fn copy_from(&mut self, from: PageRef<'_>) -> Result<(), PoisonedMemory> {
        copy_page(self.0, from)
    }

    /// The content hash that a shared frame was published under.
    pub(crate) fn set_label(&mut self, label: Label) {
        // SAFETY: We own the page; `private` and `index` of a page that is in no page cache and on
        // no LRU list are the owner's to use.
        unsafe {
            bindings::thinram_page_set_private(self.0.as_ptr(), label.hash as usize);
            bindings::thinram_page_set_note(self.0.as_ptr(), label.scope as usize);
        }
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        Lent::Frame.back();
        // SAFETY: We own one reference.
        unsafe { bindings::thinram_page_put(self.0.as_ptr()) }
    }
}

/// The page is marked as broken, or the memory controller reported an uncorrectable error while it
/// was read.
#[derive(Debug)]
pub(crate) struct PoisonedMemory;

pub(super) fn copy_page(
    to: NonNull<bindings::page>,
    from: PageRef<'_>,
) -> Result<(), PoisonedMemory> {
    if from.is_poisoned() || inject::fails(Point::Copy) {
        return Err(PoisonedMemory);
    }
    // SAFETY: Both pages are in the direct map, PAGE_SIZE long and distinct: `to` is a frame that
    // the caller owns alone.
    let left = unsafe {
        bindings::thinram_copy_mc(
            bindings::thinram_page_address(to.as_ptr()),
            from.address(),
            PAGE_SIZE as u32,
        )
    };
    if left == 0 {
        Ok(())
    } else {
        Err(PoisonedMemory)
    }
}

/// What a shared frame keeps in its own struct page, so that it costs no memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Label {
    /// The content hash.
    pub(crate) hash: u64,
    /// The sharing scope.
    pub(crate) scope: u32,
}

/// Where the bytes of a page lie, to ask for them ahead. Nothing is read there.
#[derive(Clone, Copy)]
pub(super) struct Lines(*const u64);

impl Lines {
    /// Cache lines of a page.
    pub(super) const IN_PAGE: usize = PAGE_SIZE / (STEP * core::mem::size_of::<u64>());

    /// Asks for one of them, so that it is in the cache when it is read soon after.
    #[inline(always)]
    pub(super) fn ask(self, line: usize) {
        // SAFETY: A prefetch changes nothing, and faults at no address.
        unsafe {
            core::arch::asm!(
                "prefetcht0 [{}]",
                in(reg) self.0.wrapping_add(line.wrapping_mul(STEP)),
                options(nostack, preserves_flags, readonly)
            );
        }
    }
}

/// The bytes of a page that somebody keeps alive for `'a`. Guests may write to them meanwhile.
#[derive(Clone, Copy)]
pub(super) struct Words<'a>(*const u64, PhantomData<&'a Frame>);

impl Words<'_> {
    /// A word as it is now; zero beyond the page.
    #[inline(always)]
    fn word(self, at: usize) -> u64 {
        if at >= Lines::IN_PAGE * STEP {
            return 0;
        }
        // SAFETY: The word lies within the page, which is alive, in the direct map and aligned. It is read
        // once, and what comes is something that was there.
        unsafe { self.0.wrapping_add(at).read_volatile() }
    }

    /// A cache line as it is now.
    #[inline(always)]
    pub(super) fn line(self, line: usize) -> [u64; STEP] {
        let start = line.wrapping_mul(STEP);
        core::array::from_fn(|word| self.word(start.wrapping_add(word)))
    }
}

/// A page that somebody keeps alive for `'a`.
#[derive(Clone, Copy)]
pub(crate) struct PageRef<'a>(NonNull<bindings::page>, PhantomData<&'a Frame>);

impl<'a> PageRef<'a> {
    /// The page behind a frame number.
    ///
    /// # Safety
    ///
    /// `pfn` came from [`Frame::into_pfn`] and its reference outlives `'a`.
    pub(super) unsafe fn from_pfn(pfn: u64) -> PageRef<'a> {
        // SAFETY: As in `Frame::from_pfn`.
        let page = unsafe { NonNull::new_unchecked(bindings::thinram_pfn_to_page(pfn as usize)) };
        PageRef(page, PhantomData)
    }

    /// A page that is alive.
    ///
    /// # Safety
    ///
    /// Somebody keeps `page` for `'a`.
    pub(super) unsafe fn from_page(page: NonNull<bindings::page>) -> PageRef<'a> {
        PageRef(page, PhantomData)
    }

    #[inline]
    pub(super) fn as_ptr(self) -> *mut bindings::page {
        self.0.as_ptr()
    }

    /// Start of the page in the direct map.
    #[inline]
    pub(super) fn address(self) -> *mut c_void {
        // SAFETY: The page is alive; x86_64 and 64-bit UML map all of memory.
        unsafe { bindings::thinram_page_address(self.0.as_ptr()) }
    }

    /// Where the page's bytes lie.
    #[inline]
    pub(super) fn lines(self) -> Lines {
        Lines(self.address().cast_const().cast())
    }

    /// The page's bytes, to be read as they are at each moment.
    #[inline]
    pub(super) fn words(self) -> Words<'a> {
        Words(self.address().cast_const().cast(), PhantomData)
    }

    /// The frame number.
    #[inline]
    pub(crate) fn pfn(self) -> u64 {
        // SAFETY: The page is alive.
        unsafe { bindings::thinram_page_to_pfn(self.0.as_ptr()) as u64 }
    }

    /// Whether it is the page of `frame`.
    pub(crate) fn is(self, frame: &Frame) -> bool {
        self.0 == frame.0
    }

    /// The NUMA node.
    pub(crate) fn node(self) -> i32 {
        // SAFETY: The page is alive.
        unsafe { bindings::thinram_page_to_nid(self.0.as_ptr()) }
    }

    /// One more reference, for use after the slot's lock was dropped.
    pub(crate) fn get(self) -> Frame {
        // SAFETY: The page is alive and not frozen: freezing needs the lock under which `self` was
        // borrowed.
        unsafe { bindings::thinram_page_get(self.0.as_ptr()) };
        Frame::own(self.0)
    }

    /// Whether memory_failure() marked the page.
    pub(crate) fn is_poisoned(self) -> bool {
        if !protect::armed(protect::Protection::Poison) {
            return false;
        }
        // SAFETY: The page is alive.
        unsafe { bindings::thinram_page_poisoned(self.0.as_ptr()) }
    }

    /// Whether nobody but page tables and one owner holds the page: no pin that could still write.
    pub(crate) fn is_unpinned(self) -> bool {
        if !protect::armed(protect::Protection::Unpinned) {
            return true;
        }
        // SAFETY: The page is alive. References are read first: mappings only go while the region is
        // locked, so if the counts agree there was no pin.
        unsafe {
            let references = bindings::thinram_page_refcount(self.0.as_ptr());
            let mapped = bindings::thinram_page_mapcount(self.0.as_ptr());
            references == mapped.saturating_add(1)
        }
    }

    /// Whether so many mappings show the page that its count of references might overflow with more. One
    /// page for all of a long file makes that cheap: 8 bytes of a page table for each reference.
    pub(crate) fn is_crowded(self) -> bool {
        let most = if protect::armed(protect::Protection::References) {
            Self::REFERENCES_MAX
        } else {
            Self::FEW_REFERENCES
        };
        // SAFETY: The page is alive.
        unsafe { bindings::thinram_page_refcount(self.0.as_ptr()) > most }
    }

    /// References that one page gets by read-only mappings of it in many places; half of what the count
    /// holds, for those who look at the same time.
    const REFERENCES_MAX: i32 = i32::MAX / 2;
    /// So many where tests see them run out.
    const FEW_REFERENCES: i32 = 16;

    /// Freezes a page of which we hold the only reference; `None` when anybody else holds one.
    pub(crate) fn freeze(self) -> Option<Frozen<'a>> {
        // SAFETY: The page is alive.
        if unsafe { bindings::thinram_page_freeze(self.0.as_ptr(), 1) } {
            Some(Frozen {
                page: self,
                real: true,
            })
        } else if !protect::armed(protect::Protection::Freeze) {
            Some(Frozen {
                page: self,
                real: false,
            })
        } else {
            None
        }
    }

    /// Whether all bytes are zero.
    pub(crate) fn is_zero(self) -> bool {
        // SAFETY: The page is in the direct map and PAGE_SIZE long.
        unsafe { bindings::memchr_inv(self.address(), 0, PAGE_SIZE).is_null() }
    }

    /// The four bytes that fill the page, if it is nothing else. They stay true as long as the page
    /// cannot change.
    pub(crate) fn filled_with(self) -> Option<u32> {
        const STEP: usize = core::mem::size_of::<u32>();
        let start = self.address().cast::<u8>();
        // SAFETY: The page is PAGE_SIZE long and aligned; each of its words equals the next.
        unsafe {
            (bindings::memcmp(start.cast(), start.add(STEP).cast(), PAGE_SIZE - STEP) == 0)
                .then(|| start.cast::<u32>().read())
        }
    }

    /// The bytes of a shared frame, which nobody writes to.
    pub(crate) fn published_bytes(&self) -> &[u8] {
        // SAFETY: The page is in the direct map and PAGE_SIZE long; by its kind nobody writes to it as
        // long as it has the reference that is borrowed here.
        unsafe { core::slice::from_raw_parts(self.address().cast(), PAGE_SIZE) }
    }

    /// Whether both pages, frozen or immutable, hold the same bytes.
    pub(crate) fn same_content(self, other: PageRef<'_>) -> bool {
        if !protect::armed(protect::Protection::Compare) {
            return true;
        }
        // SAFETY: Both pages are in the direct map and PAGE_SIZE long.
        unsafe { bindings::memcmp(self.address(), other.address(), PAGE_SIZE) == 0 }
    }

    /// Whether any page table maps the page: none does since it was last taken out of them, if it
    /// was not touched since.
    pub(crate) fn is_mapped(self) -> bool {
        // SAFETY: The page is alive.
        unsafe { bindings::thinram_page_mapcount(self.0.as_ptr()) != 0 }
    }

    /// Takes back the kernel's note that somebody looked the page up by its mapping, as KVM does for each
    /// fault of a guest. True if there was one.
    pub(crate) fn take_referenced(self) -> bool {
        // SAFETY: The page is alive; an atomic bit of its flags that nobody else looks at, for the page is
        // on no list of the kernel's.
        unsafe { bindings::thinram_page_take_referenced(self.0.as_ptr()) }
    }

    /// The label of a shared frame; meaningless for any other.
    pub(crate) fn label(self) -> Label {
        // SAFETY: The page is alive.
        unsafe {
            Label {
                hash: bindings::thinram_page_private(self.0.as_ptr()) as u64,
                scope: bindings::thinram_page_note(self.0.as_ptr()) as u32,
            }
        }
    }

    /// Writes zeroes where a hole or a new end of the file cut `from` to `to` off.
    pub(crate) fn zero_hole(self, from: usize, to: usize) {
        if protect::armed(protect::Protection::ZeroHole) {
            self.zero_range(from, to);
        }
    }

    /// Writes zeroes from `from` to `to` (bytes within the page).
    pub(crate) fn zero_range(self, from: usize, to: usize) {
        let to = to.min(PAGE_SIZE);
        if from >= to {
            return;
        }
        // SAFETY: The range lies within the page, which is in the direct map. Guests that write the
        // same bytes meanwhile see one or the other, as with any file.
        unsafe { core::ptr::write_bytes(self.address().cast::<u8>().add(from), 0, to - from) };
    }
}

/// A page that nobody else can reach: its bytes cannot change. Unfreezes when dropped.
///
/// # Invariants
///
/// While `real`, the page's reference count is zero and one reference is ours to give back.
pub(crate) struct Frozen<'a> {
    page: PageRef<'a>,
    real: bool,
}

impl<'a> Frozen<'a> {
    /// The page; what is read through it stays true until the thaw.
    pub(crate) fn page(&self) -> PageRef<'a> {
        self.page
    }

    /// The bytes, which nobody changes until the thaw.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: The page is in the direct map and PAGE_SIZE long; nobody else holds it.
        unsafe { core::slice::from_raw_parts(self.page.address().cast(), PAGE_SIZE) }
    }

    /// Whether the frozen page is all zero.
    pub(crate) fn is_zero(&self) -> bool {
        !protect::armed(protect::Protection::Compare) || self.page.is_zero()
    }

    /// The four bytes that fill the frozen page, if it is nothing else.
    pub(crate) fn filled_with(&self) -> Option<u32> {
        self.page.filled_with()
    }

    /// Whether the frozen page equals `other`, which must be frozen or immutable.
    pub(crate) fn equals(&self, other: PageRef<'_>) -> bool {
        self.page.same_content(other)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        if self.real {
            // SAFETY: By the invariant the count is zero and was one before.
            unsafe { bindings::thinram_page_unfreeze(self.page.as_ptr(), 1) }
        }
    }
}

/// Copies between a page and what a syscall brought. The caller keeps the page with a reference, so
/// that it is not frozen meanwhile, and holds no region lock: user memory may fault.
impl PageRef<'_> {
    /// To user memory; returns the bytes that were copied.
    pub(crate) fn copy_to_iter(
        self,
        offset: usize,
        bytes: usize,
        to: *mut bindings::iov_iter,
    ) -> usize {
        // SAFETY: The range lies within the page, as the callers in glue compute it; `to` is the
        // kernel's iterator of the running syscall.
        unsafe { bindings::copy_page_to_iter(self.as_ptr(), offset, bytes, to) }
    }

    /// From user memory; returns the bytes that were copied.
    pub(crate) fn copy_from_iter(
        self,
        offset: usize,
        bytes: usize,
        from: *mut bindings::iov_iter,
    ) -> usize {
        // SAFETY: As above.
        unsafe { bindings::copy_page_from_iter(self.as_ptr(), offset, bytes, from) }
    }
}
