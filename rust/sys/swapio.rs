// SPDX-License-Identifier: GPL-2.0

//! Files to swap to: a directory that somebody chose, nameless files in it, and direct I/O on them
//! in whole clusters.

use super::{
    alloc, bindings,
    inject::{self, Point},
};
use crate::logic::clusters::CLUSTER_BYTES;
use core::ptr::NonNull;
use kernel::{
    alloc::{
        flags::{__GFP_NOWARN, __GFP_ZERO},
        AllocError,
    },
    error::from_err_ptr,
    prelude::*,
    str::CString,
    sync::UniqueArc,
};

/// What a cluster is read into and written from.
#[repr(C, align(4096))]
pub(crate) struct Buffer(pub(crate) [u8; CLUSTER_BYTES]);

impl Buffer {
    /// The same for what is about to free memory: it may take from what is kept for that, and waits
    /// for nothing.
    pub(crate) fn reserved() -> Result<UniqueArc<Buffer>, AllocError> {
        // SAFETY: Concerns the running task alone.
        let flags = unsafe { bindings::thinram_memalloc_begin() };
        let buffer = Buffer::new();
        // SAFETY: As above.
        unsafe { bindings::thinram_memalloc_end(flags) };
        buffer
    }

    /// A buffer of zeroes.
    pub(crate) fn new() -> Result<UniqueArc<Buffer>, AllocError> {
        if inject::fails(Point::Buffer) {
            return Err(AllocError);
        }
        let buffer = UniqueArc::<Buffer>::new_uninit(GFP_KERNEL | __GFP_ZERO | __GFP_NOWARN)?;
        // SAFETY: Zeroed bytes.
        Ok(unsafe { buffer.assume_init() })
    }
}

/// A directory that swap files are made in. It keeps its mount.
pub(crate) struct SwapDir {
    path: bindings::path,
    name: KVec<u8>,
}

// SAFETY: A path is two counted references, which belong to no task.
unsafe impl Send for SwapDir {}
// SAFETY: As above; nothing changes it.
unsafe impl Sync for SwapDir {}

impl SwapDir {
    /// Finds directory `name` as the running process sees it, and tries a file in it.
    ///
    /// # Errors
    ///
    /// EOPNOTSUPP when the file system has no nameless files or no direct I/O, or keeps its files in
    /// memory; EINVAL for a name that is not absolute or names ThinRAM itself, and what looking it up or
    /// writing to it gave.
    pub(crate) fn open(name: &[u8]) -> Result<SwapDir> {
        if name.first() != Some(&b'/') {
            return Err(EINVAL);
        }
        let text = core::str::from_utf8(name).map_err(|_| EINVAL)?;
        let text = CString::try_from_fmt(kernel::prelude::fmt!("{text}"))?;
        let owned = alloc::copied(name)?;
        if inject::fails(Point::SwapDir) {
            return Err(ENOMEM);
        }
        // SAFETY: All-zero is valid for this plain structure.
        let mut path: bindings::path = unsafe { core::mem::zeroed() };
        // SAFETY: The name is a C string, and `path` is ours to be filled.
        kernel::error::to_result(unsafe {
            bindings::thinram_find_dir(text.as_char_ptr(), &mut path)
        })?;
        let dir = SwapDir { path, name: owned };
        // SAFETY: The path was found.
        if unsafe { bindings::thinram_path_is_ours(&dir.path) } {
            return Err(EINVAL);
        }
        // SAFETY: As above.
        if unsafe { bindings::thinram_path_is_memory(&dir.path) } {
            return Err(EOPNOTSUPP);
        }
        let file = dir.make_file()?;
        let mut buffer = Buffer::new()?;
        file.write(0, &buffer)?;
        file.read(0, &mut buffer)?;
        Ok(dir)
    }

    /// The name that it was given by.
    pub(crate) fn name(&self) -> &[u8] {
        &self.name
    }

    /// Whether both are the same directory.
    pub(crate) fn is(&self, other: &SwapDir) -> bool {
        self.path.mnt == other.path.mnt && self.path.dentry == other.path.dentry
    }

    /// Makes a nameless file. Not in the middle of a fault.
    pub(crate) fn make_file(&self) -> Result<SwapFile> {
        if inject::fails(Point::SwapFile) {
            return Err(ENOMEM);
        }
        // SAFETY: The path is held; write access to the mount is given back below. An open file has
        // its own.
        let file = unsafe {
            kernel::error::to_result(bindings::mnt_want_write(self.path.mnt))?;
            let file = from_err_ptr(bindings::thinram_swap_file(&self.path));
            bindings::mnt_drop_write(self.path.mnt);
            file
        };
        match file {
            Ok(file) => NonNull::new(file).map(SwapFile).ok_or(EIO),
            // What an open with O_DIRECT says to a file that has none.
            Err(error) if error == EINVAL => Err(EOPNOTSUPP),
            Err(error) => Err(error),
        }
    }
}

impl Drop for SwapDir {
    fn drop(&mut self) {
        // SAFETY: `open` took the references.
        unsafe { bindings::path_put(&self.path) }
    }
}

/// A nameless file, for direct I/O; gone when it is dropped.
pub(crate) struct SwapFile(NonNull<bindings::file>);

// SAFETY: A file reference belongs to no task.
unsafe impl Send for SwapFile {}
// SAFETY: Reading and writing take what locks they need.
unsafe impl Sync for SwapFile {}

impl SwapFile {
    /// Sees to it that there is room for `len` bytes at `at`, as far as the file system can tell
    /// beforehand.
    pub(crate) fn reserve(&self, at: u64, len: u64) -> Result {
        if inject::fails(Point::SwapRoom) {
            return Err(ENOSPC);
        }
        let (at, len) = (i64::try_from(at)?, i64::try_from(len)?);
        // SAFETY: The file is open for writing.
        let done = unsafe { bindings::vfs_fallocate(self.0.as_ptr(), 0, at, len) };
        match kernel::error::to_result(done) {
            // Then it is the first write that tells.
            Err(error) if error == EOPNOTSUPP => Ok(()),
            done => done,
        }
    }

    /// Writes a cluster at byte `at`. Sleeps until it is done.
    pub(crate) fn write(&self, at: u64, buffer: &Buffer) -> Result {
        if inject::fails(Point::SwapWrite) {
            return Err(EIO);
        }
        let address = buffer.0.as_ptr().cast_mut();
        // SAFETY: The buffer is as long as a cluster, and is only read.
        unsafe { self.transfer(at, address, true) }
    }

    /// Reads a cluster from byte `at`. Sleeps until it is done.
    pub(crate) fn read(&self, at: u64, buffer: &mut Buffer) -> Result {
        if inject::fails(Point::SwapRead) {
            return Err(EIO);
        }
        // SAFETY: The buffer is as long as a cluster, and is ours alone.
        unsafe { self.transfer(at, buffer.0.as_mut_ptr(), false) }
    }

    /// # Safety
    ///
    /// `address` is that of a [`Buffer`] that the caller may read or, unless `write`, write.
    unsafe fn transfer(&self, at: u64, address: *mut u8, write: bool) -> Result {
        // SAFETY: All-zero is valid for these plain structures, which are filled before use. The
        // buffer lies in the direct map, and the I/O is over when the call returns: the kiocb has no
        // completion function.
        let done = unsafe {
            let mut kiocb: bindings::kiocb = core::mem::zeroed();
            let mut iter: bindings::iov_iter = core::mem::zeroed();
            let mut vec: bindings::bio_vec = core::mem::zeroed();
            bindings::thinram_kiocb_init(&mut kiocb, self.0.as_ptr(), i64::try_from(at)?);
            bindings::thinram_bvec_set(&mut vec, address.cast(), CLUSTER_BYTES as u32);
            let direction = u32::from(write);
            bindings::iov_iter_bvec(&mut iter, direction, &vec, 1, CLUSTER_BYTES);
            if write {
                // To free memory it may take from what is kept for that.
                let flags = bindings::thinram_memalloc_begin();
                let done = bindings::vfs_iocb_iter_write(self.0.as_ptr(), &mut kiocb, &mut iter);
                bindings::thinram_memalloc_end(flags);
                done
            } else {
                bindings::vfs_iocb_iter_read(self.0.as_ptr(), &mut kiocb, &mut iter)
            }
        };
        match usize::try_from(done) {
            Ok(CLUSTER_BYTES) => Ok(()),
            Ok(_) => Err(EIO),
            Err(_) => Err(Error::from_errno(i32::try_from(done).unwrap_or(-5))),
        }
    }
}

impl Drop for SwapFile {
    fn drop(&mut self) {
        // SAFETY: We hold one reference. A kernel thread lets go of the file at once, or its mount
        // would be busy for a while.
        unsafe {
            if bindings::thinram_is_kernel_thread() {
                bindings::__fput_sync(self.0.as_ptr());
            } else {
                bindings::fput(self.0.as_ptr());
            }
        }
    }
}
