// SPDX-License-Identifier: GPL-2.0

//! What the kernel asks about mappings.

use super::node;
use crate::{
    engine::{backing::Backing, fault, huge},
    sys::{
        bindings,
        fault::{Answer, Fault},
        huge::ORDER,
        task,
    },
};
use core::ptr::NonNull;
use kernel::{
    ffi::{c_int, c_uint, c_ulong, c_void},
    prelude::*,
};

/// Runs `f` on the backing that a mapping shows.
///
/// # Safety
///
/// `vma` is a mapping of one of our files, locked.
unsafe fn with_backing<R>(
    vma: *const bindings::vm_area_struct,
    f: impl FnOnce(&Backing) -> R,
) -> Option<R> {
    // SAFETY: A mapping holds its file, and that its inode.
    let node = unsafe { node::of_inode(bindings::thinram_vma_inode(vma)) }.ok()?;
    Some(f(node.file().ok()?))
}

/// # Safety
///
/// Called by the kernel with the fault that the current task is in.
unsafe fn answer(
    vmf: *mut bindings::vm_fault,
    how: fn(&Backing, Fault) -> Answer,
) -> bindings::vm_fault_t {
    let Some(vmf) = NonNull::new(vmf) else {
        return Answer::BusError.code();
    };
    // SAFETY: The kernel's vm_fault, with its fault lock held.
    let (vma, fault) = unsafe { ((*vmf.as_ptr()).__bindgen_anon_1.vma, Fault::from_raw(vmf)) };
    // SAFETY: The fault's mapping is one of ours: it has our vm_ops. The inode outlives a dropped
    // fault lock only as far as the engine needs it: it touches neither after dropping the lock.
    unsafe { with_backing(vma, |backing| how(backing, fault)) }
        .unwrap_or(Answer::BusError)
        .code()
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_fault(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
    // SAFETY: By the caller.
    unsafe { answer(vmf, fault::serve) }
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_huge_fault(
    vmf: *mut bindings::vm_fault,
    order: c_uint,
) -> bindings::vm_fault_t {
    if order != ORDER {
        return Answer::Fallback.code();
    }
    // SAFETY: By the caller.
    unsafe { answer(vmf, huge::serve) }
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_page_mkwrite(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
    // SAFETY: By the caller.
    unsafe { answer(vmf, fault::make_writable) }
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_open(vma: *mut bindings::vm_area_struct) {
    // SAFETY: By the caller.
    unsafe {
        let read_only = bindings::thinram_vma_read_only(vma);
        with_backing(vma, |backing| backing.vm().mapping_added(read_only))
    };
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_close(vma: *mut bindings::vm_area_struct) {
    // SAFETY: By the caller.
    unsafe {
        let read_only = bindings::thinram_vma_read_only(vma);
        with_backing(vma, |backing| backing.vm().mapping_ended(read_only))
    };
}

/// # Safety
///
/// Called by the kernel once a new mapping is in place.
#[no_mangle]
unsafe extern "C" fn thinram_rs_mapped(
    _start: c_ulong,
    _end: c_ulong,
    _pgoff: c_ulong,
    file: *const bindings::file,
    _private: *mut *mut c_void,
) -> c_int {
    // SAFETY: The file is one of ours and is held by the mapping.
    let (node, read_only) = unsafe {
        let node = node::of_inode(bindings::thinram_file_inode(file));
        (node, bindings::thinram_file_read_only(file))
    };
    super::errno(node.and_then(|node| {
        let vm = node.file()?.vm();
        vm.mapped_by(task::owner_pid(), read_only);
        Ok(())
    }))
}

/// # Safety
///
/// Called by the kernel before it makes a mapping.
#[no_mangle]
pub(crate) unsafe extern "C" fn thinram_rs_mmap_prepare(
    desc: *mut bindings::vm_area_desc,
) -> c_int {
    // SAFETY: The kernel's description of the mapping to be.
    unsafe {
        if !bindings::thinram_vma_shared(desc) {
            if task::may_log() {
                pr_warn!("a private mapping was refused: use share=on (MAP_SHARED)\n");
            }
            return EINVAL.to_errno();
        }
        bindings::thinram_vma_prepare(desc);
    }
    0
}
