// SPDX-License-Identifier: GPL-2.0

//! A page fault as the kernel hands it over.

use super::{
    bindings,
    huge::HugeFrame,
    inject::{self, Point},
    page::{Frame, PageRef, Purpose},
    protect,
};
use core::ptr::NonNull;

/// How a fault was answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Answer {
    /// The page table has what is needed, or the access comes again.
    Done,
    /// The fault lock was dropped; the access comes again.
    Retry,
    /// Beyond the end of the file, or of a file that is gone.
    BusError,
    /// The memory behind the page is broken.
    Poisoned,
    /// No 2 MiB page here: the access comes again as a fault of 4 KiB.
    Fallback,
}

impl Answer {
    /// As the kernel's VM_FAULT code.
    pub(crate) fn code(self) -> bindings::vm_fault_t {
        match self {
            Answer::Done => bindings::vm_fault_reason_VM_FAULT_NOPAGE,
            Answer::Retry => bindings::vm_fault_reason_VM_FAULT_RETRY,
            Answer::BusError => bindings::vm_fault_reason_VM_FAULT_SIGBUS,
            Answer::Poisoned => bindings::vm_fault_reason_VM_FAULT_HWPOISON,
            Answer::Fallback => bindings::vm_fault_reason_VM_FAULT_FALLBACK,
        }
    }
}

/// The page tables could not be allocated.
#[derive(Debug)]
pub(crate) struct NoPageTable;

/// What the page table has for the 2 MiB around a fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Middle {
    /// Nothing.
    Nothing,
    /// A 2 MiB page.
    Huge,
    /// A table of entries of 4 KiB.
    Table,
}

/// A fault in the handler of `fault`, `huge_fault` or `page_mkwrite`.
///
/// # Invariants
///
/// The pointer is the kernel's `struct vm_fault` of the fault that the current task is in, and its
/// fault lock (mmap_lock or VMA lock) is held.
pub(crate) struct Fault(NonNull<bindings::vm_fault>);

impl Fault {
    /// Wraps what the kernel passed to a handler.
    ///
    /// # Safety
    ///
    /// As the type's invariant says, for as long as the value lives.
    pub(crate) unsafe fn from_raw(vmf: NonNull<bindings::vm_fault>) -> Fault {
        Fault(vmf)
    }

    /// The kernel's own.
    pub(super) fn as_ptr(&self) -> *mut bindings::vm_fault {
        self.0.as_ptr()
    }

    fn raw(&self) -> &bindings::vm_fault {
        // SAFETY: By the type's invariant.
        unsafe { self.0.as_ref() }
    }

    fn flags(&self) -> u32 {
        self.raw().flags
    }

    fn place(&self) -> &bindings::vm_fault__bindgen_ty_1 {
        &self.raw().__bindgen_anon_1
    }

    /// The faulting page's number in the file.
    pub(crate) fn page_number(&self) -> u64 {
        self.place().pgoff as u64
    }

    /// Whether the access is a write.
    pub(crate) fn is_write(&self) -> bool {
        self.flags() & bindings::fault_flag_FAULT_FLAG_WRITE != 0
    }

    /// Allocates a frame by the policy of the mapping that faulted.
    pub(crate) fn alloc(&self, purpose: Purpose) -> Option<Frame> {
        if inject::fails(Point::Frame) {
            return None;
        }
        // SAFETY: The mapping is valid while the fault lock is held.
        let page = unsafe {
            bindings::thinram_page_alloc_vma(purpose.gfp(), self.place().vma, self.place().address)
        };
        // SAFETY: A fresh order-0 page whose only reference is ours.
        NonNull::new(page).map(|page| unsafe { Frame::from_page(page) })
    }

    /// Maps `page`: writable if `writable` and the mapping allows it, else read-only.
    ///
    /// The caller holds the region lock and knows that no other page is mapped here.
    pub(crate) fn map(&self, page: PageRef<'_>, writable: bool) -> Result<Answer, NoPageTable> {
        if inject::fails(Point::PageTable) {
            return Err(NoPageTable);
        }
        // SAFETY: By the type's invariant; the page is alive.
        let code =
            unsafe { bindings::vmf_insert_page_mkwrite(self.0.as_ptr(), page.as_ptr(), writable) };
        match code {
            bindings::vm_fault_reason_VM_FAULT_NOPAGE => Ok(Answer::Done),
            bindings::vm_fault_reason_VM_FAULT_OOM => Err(NoPageTable),
            _ => Ok(Answer::BusError),
        }
    }

    /// Maps a page that must not be written through this mapping.
    pub(crate) fn map_shared(&self, page: PageRef<'_>) -> Result<Answer, NoPageTable> {
        self.map(page, !protect::armed(protect::Protection::ReadOnly))
    }

    /// The page whose read-only mapping is being written to (`page_mkwrite` only).
    pub(crate) fn written_pfn(&self) -> Option<u64> {
        let page = NonNull::new(self.raw().page)?;
        // SAFETY: The kernel holds a reference to it during page_mkwrite.
        Some(unsafe { bindings::thinram_page_to_pfn(page.as_ptr()) as u64 })
    }

    /// Whether the mapping covers the whole 2 MiB around the fault, and lies in the address space as
    /// it lies in the file.
    pub(crate) fn fits_huge(&self) -> bool {
        // SAFETY: By the type's invariant.
        unsafe { bindings::thinram_huge_fits(self.0.as_ptr()) }
    }

    /// What the page table has for the 2 MiB around the fault. With the region locked, nothing else
    /// puts anything there; it may go to `Nothing` at any time.
    pub(crate) fn middle(&self) -> Middle {
        // SAFETY: By the type's invariant; handlers get the entry's address.
        match unsafe { bindings::thinram_huge_middle(self.0.as_ptr()) } {
            0 => Middle::Nothing,
            1 => Middle::Huge,
            _ => Middle::Table,
        }
    }

    /// Allocates a zeroed folio of 2 MiB by the policy of the mapping that faulted.
    pub(crate) fn alloc_huge(&self) -> Option<HugeFrame> {
        if inject::fails(Point::HugeFrame) {
            return None;
        }
        // SAFETY: The mapping is valid while the fault lock is held.
        let page = unsafe { bindings::thinram_huge_alloc_vma(self.0.as_ptr()) };
        // SAFETY: A fresh folio of 512 pages whose only reference is ours.
        NonNull::new(page).map(|page| unsafe { HugeFrame::from_page(page) })
    }

    /// Maps the whole folio: writable if `writable` and the mapping allows it, else read-only.
    ///
    /// The caller holds the region lock, knows that [`Fault::middle`] is no table, and that no other
    /// folio is mapped here.
    pub(crate) fn map_huge(&self, frame: &HugeFrame, writable: bool) -> Answer {
        if inject::fails(Point::PageTable) {
            return Answer::Fallback;
        }
        // SAFETY: By the type's invariant; the folio is alive.
        let code =
            unsafe { bindings::thinram_huge_insert(self.0.as_ptr(), frame.as_ptr(), writable) };
        match code {
            bindings::vm_fault_reason_VM_FAULT_NOPAGE => Answer::Done,
            bindings::vm_fault_reason_VM_FAULT_OOM => Answer::Fallback,
            _ => Answer::BusError,
        }
    }

    /// Whether the fault may wait with its lock dropped, and has not done so before.
    pub(crate) fn may_wait(&self) -> bool {
        let wanted = bindings::fault_flag_FAULT_FLAG_ALLOW_RETRY;
        let unwanted =
            bindings::fault_flag_FAULT_FLAG_RETRY_NOWAIT | bindings::fault_flag_FAULT_FLAG_TRIED;
        self.flags() & (wanted | unwanted) == wanted
    }

    /// Runs `f` with the fault lock dropped; the access comes again. Only after
    /// [`Fault::may_wait`] said so.
    pub(crate) fn retry_after(self, f: impl FnOnce()) -> Answer {
        if self.may_wait() {
            self.unlocked(f);
        }
        Answer::Retry
    }

    /// Runs `f` with the fault lock dropped, which is how the fault ends: only where it may be
    /// retried, and not at once.
    fn unlocked(self, f: impl FnOnce()) {
        // SAFETY: The lock is held by the type's invariant; `self` ends here. The file keeps the
        // mount, and so this module. Of a user's task the last fput is done on the way back to user
        // space, when it has left the module. A kernel thread (KVM's for asynchronous faults) keeps the
        // process's mm until its fault is over, so the file goes only with a munmap() meanwhile, and
        // then in a work item a tick later.
        unsafe {
            let file = bindings::thinram_vmf_file(self.0.as_ptr());
            bindings::thinram_release_fault_lock(self.0.as_ptr());
            f();
            bindings::thinram_file_put(file);
        }
    }

    /// Runs `wait` with the fault lock dropped where that is allowed; where nobody may wait, runs
    /// `ask` alone. The access comes again.
    pub(crate) fn wait_for_io(self, ask: impl FnOnce(), wait: impl FnOnce()) -> Answer {
        let retry = bindings::fault_flag_FAULT_FLAG_ALLOW_RETRY;
        let no_wait = bindings::fault_flag_FAULT_FLAG_RETRY_NOWAIT;
        if self.flags() & retry == 0 {
            wait();
            return Answer::Done;
        }
        if self.flags() & no_wait != 0 {
            ask();
            return Answer::Retry;
        }
        self.unlocked(wait);
        Answer::Retry
    }

    /// Waits a moment for memory, with the fault lock dropped where that is allowed.
    pub(crate) fn wait_for_memory(self) -> Answer {
        const WAIT_US: u64 = 10_000;
        let retry = bindings::fault_flag_FAULT_FLAG_ALLOW_RETRY;
        let no_wait = bindings::fault_flag_FAULT_FLAG_RETRY_NOWAIT;
        if self.flags() & retry == 0 {
            super::task::sleep_killable(WAIT_US);
            return Answer::Done;
        }
        if self.flags() & no_wait == 0 {
            self.unlocked(|| super::task::sleep_killable(WAIT_US));
        }
        Answer::Retry
    }
}
