// SPDX-License-Identifier: GPL-2.0

//! Syscalls on a file: read, write, seek, fallocate, truncate.

use super::node;
use crate::{
    engine::{
        backing::{Backing, PAGE},
        data::{self, Readable},
    },
    logic::counts::pages_to_kb,
    sys::{bindings, task},
};
use kernel::{
    error::to_result,
    ffi::{c_int, c_long},
    prelude::*,
    sync::Arc,
};

const PUNCH_HOLE: c_int = 0x02;
const KEEP_SIZE: c_int = 0x01;

/// The inode lock, held.
struct InodeLock(*mut bindings::inode);

impl InodeLock {
    /// # Safety
    ///
    /// `inode` outlives the lock.
    unsafe fn lock(inode: *mut bindings::inode) -> InodeLock {
        // SAFETY: By the caller's promise.
        unsafe { bindings::thinram_inode_lock(inode) };
        InodeLock(inode)
    }
}

impl Drop for InodeLock {
    fn drop(&mut self) {
        // SAFETY: Locked by `lock`.
        unsafe { bindings::thinram_inode_unlock(self.0) }
    }
}

/// An open file of ours and its size.
struct Open<'a> {
    inode: *mut bindings::inode,
    backing: &'a Arc<Backing>,
}

impl<'a> Open<'a> {
    /// # Safety
    ///
    /// `inode` is one of our files and outlives `'a`.
    unsafe fn of_inode(inode: *mut bindings::inode) -> Result<Open<'a>> {
        // SAFETY: By the caller's promise.
        let node: &'a node::Node = unsafe { &*((*inode).i_private.cast()) };
        Ok(Open {
            inode,
            backing: node.file()?,
        })
    }

    fn size(&self) -> u64 {
        // SAFETY: The inode is alive.
        u64::try_from(unsafe { bindings::thinram_i_size_read(self.inode) }).unwrap_or(0)
    }

    /// Sets the size, with the inode lock held.
    fn resize(&self, size: i64) -> Result {
        let old_size = self.size();
        let (old, new) = (self.backing.pages(), node::pages_of(size)?);
        // SAFETY: The inode's superblock is ours and filled.
        let mount = unsafe { node::of_sb((*self.inode).i_sb) };
        let size_now = u64::try_from(size).map_err(|_| EINVAL)?;
        // The tail first: it may need memory, and nothing has changed yet. In a file that grows, a
        // mapping may have written beyond the end.
        let end = size_now.min(old_size);
        if size_now != old_size && end % PAGE != 0 {
            data::zero_bytes(self.backing, end / PAGE, end % PAGE, PAGE)?;
        }
        mount.resize(old, new).inspect_err(|_| {
            if task::may_log() {
                let (limit, used) = mount.usage();
                let more = new.saturating_sub(old);
                let [limit, used, more] = [limit, used, more].map(pages_to_kb);
                pr_warn!("{more} KiB more were refused: of size={limit}k, {used} are taken\n");
            }
        })?;
        if size_now < old_size {
            // SAFETY: The inode lock is held.
            unsafe { bindings::thinram_i_size_write(self.inode, size) };
            self.backing.resize(new);
        } else {
            self.backing.resize(new);
            // SAFETY: The inode lock is held.
            unsafe { bindings::thinram_i_size_write(self.inode, size) };
        }
        Ok(())
    }
}

/// Sets a file's size for setattr(), which holds the inode lock.
///
/// # Safety
///
/// `inode` is one of our files, locked.
pub(super) unsafe fn truncate(inode: *mut bindings::inode, size: i64) -> Result {
    // SAFETY: By the caller's promise.
    unsafe { Open::of_inode(inode)?.resize(size) }
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_read_iter(
    iocb: *mut bindings::kiocb,
    to: *mut bindings::iov_iter,
) -> isize {
    // SAFETY: By the caller.
    super::length(unsafe { read(&mut *iocb, to) })
}

/// # Safety
///
/// `to` is the iterator that goes with `iocb`, an operation on a file of ours.
unsafe fn read(iocb: &mut bindings::kiocb, to: *mut bindings::iov_iter) -> Result<usize> {
    // SAFETY: The file holds its inode.
    let file = unsafe { Open::of_inode(bindings::thinram_file_inode(iocb.ki_filp))? };
    let mut done = 0usize;
    let mut pos = u64::try_from(iocb.ki_pos).map_err(|_| EINVAL)?;
    loop {
        let left = file.size().saturating_sub(pos);
        // SAFETY: The iterator is valid.
        let wanted = unsafe { bindings::thinram_iter_count(to) } as u64;
        let offset = pos % PAGE;
        let part = left.min(wanted).min(PAGE - offset) as usize;
        if part == 0 {
            break;
        }
        let copied = match data::readable(file.backing, pos / PAGE) {
            // SAFETY: The iterator is valid.
            Ok(Readable::Zeroes) => unsafe { bindings::iov_iter_zero(part, to) },
            Ok(Readable::Page(frame)) => frame.as_ref().copy_to_iter(offset as usize, part, to),
            Err(_) if done > 0 => break,
            Err(error) => return Err(error),
        };
        done = done.saturating_add(copied);
        pos = pos.saturating_add(copied as u64);
        if copied < part {
            if done == 0 {
                return Err(EFAULT);
            }
            break;
        }
        task::cond_resched();
    }
    // SAFETY: An open file.
    unsafe { bindings::thinram_file_accessed(iocb.ki_filp) };
    iocb.ki_pos = i64::try_from(pos).map_err(|_| EOVERFLOW)?;
    Ok(done)
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_write_iter(
    iocb: *mut bindings::kiocb,
    from: *mut bindings::iov_iter,
) -> isize {
    // SAFETY: By the caller.
    super::length(unsafe { write(&mut *iocb, from) })
}

/// # Safety
///
/// `from` is the iterator that goes with `iocb`, an operation on a file of ours.
unsafe fn write(iocb: &mut bindings::kiocb, from: *mut bindings::iov_iter) -> Result<usize> {
    // SAFETY: The file holds its inode.
    let (inode, file) = unsafe {
        let inode = bindings::thinram_file_inode(iocb.ki_filp);
        (inode, Open::of_inode(inode)?)
    };
    // SAFETY: As above.
    let _lock = unsafe { InodeLock::lock(inode) };
    // SAFETY: Both are the kernel's; the inode lock is held.
    let allowed = unsafe { bindings::generic_write_checks(iocb, from) };
    if allowed <= 0 {
        return if allowed == 0 {
            Ok(0)
        } else {
            Err(Error::from_errno(allowed as c_int))
        };
    }
    // SAFETY: The file is open; the inode lock is held.
    to_result(unsafe { bindings::file_modified(iocb.ki_filp) })?;
    let start = u64::try_from(iocb.ki_pos).map_err(|_| EINVAL)?;
    let end = start.checked_add(allowed as u64).ok_or(EFBIG)?;
    let size_before = file.size();
    if end > size_before {
        file.resize(i64::try_from(end).map_err(|_| EFBIG)?)?;
    }
    let written = copy_in(&file, start, end, from);
    let reached = start.saturating_add(written.unwrap_or(0) as u64);
    if end > size_before && reached < end {
        // What was not written does not count: the file is as long as if it had not been asked for.
        file.resize(i64::try_from(reached.max(size_before))?)?;
    }
    iocb.ki_pos = i64::try_from(reached).map_err(|_| EOVERFLOW)?;
    written
}

/// Writes bytes `start..end` of a file that is long enough; returns how many it was.
fn copy_in(file: &Open<'_>, start: u64, end: u64, from: *mut bindings::iov_iter) -> Result<usize> {
    let (mut pos, mut done) = (start, 0usize);
    while pos < end {
        let offset = pos % PAGE;
        let part = (end - pos).min(PAGE - offset) as usize;
        let copied = match data::writable(file.backing, pos / PAGE) {
            Ok(frame) => frame.as_ref().copy_from_iter(offset as usize, part, from),
            Err(_) if done > 0 => break,
            Err(error) => return Err(error),
        };
        done = done.saturating_add(copied);
        pos = pos.saturating_add(copied as u64);
        if copied < part {
            if done == 0 {
                return Err(EFAULT);
            }
            break;
        }
        task::cond_resched();
    }
    Ok(done)
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_llseek(
    file: *mut bindings::file,
    offset: bindings::loff_t,
    whence: c_int,
) -> bindings::loff_t {
    const DATA: c_int = bindings::SEEK_DATA as c_int;
    const HOLE: c_int = bindings::SEEK_HOLE as c_int;
    // SAFETY: An open file of ours.
    unsafe {
        let inode = bindings::thinram_file_inode(file);
        let max = (*(*inode).i_sb).s_maxbytes;
        if whence != DATA && whence != HOLE {
            let size = bindings::thinram_i_size_read(inode);
            return bindings::generic_file_llseek_size(file, offset, whence, max, size);
        }
        match Open::of_inode(inode).and_then(|open| seek(&open, offset, whence == DATA)) {
            Ok(position) => bindings::vfs_setpos(file, position, max),
            Err(error) => error.to_errno().into(),
        }
    }
}

fn seek(file: &Open<'_>, offset: i64, for_data: bool) -> Result<i64> {
    let size = file.size();
    let offset = u64::try_from(offset).map_err(|_| ENXIO)?;
    if offset >= size {
        return Err(ENXIO);
    }
    let found = data::seek(file.backing, offset / PAGE, size.div_ceil(PAGE), for_data);
    let position = match found {
        Some(page) => page.saturating_mul(PAGE).max(offset).min(size),
        None if for_data => return Err(ENXIO),
        None => size,
    };
    i64::try_from(position).map_err(|_| EOVERFLOW)
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_fallocate(
    file: *mut bindings::file,
    mode: c_int,
    offset: bindings::loff_t,
    len: bindings::loff_t,
) -> c_long {
    // SAFETY: An open file of ours.
    unsafe {
        let inode = bindings::thinram_file_inode(file);
        let _lock = InodeLock::lock(inode);
        let result = Open::of_inode(inode)
            .and_then(|open| allocate(&open, mode, offset, len))
            .and_then(|()| to_result(bindings::file_modified(file)));
        c_long::try_from(super::errno(result)).unwrap_or(-1)
    }
}

fn allocate(file: &Open<'_>, mode: c_int, offset: i64, len: i64) -> Result {
    let end = offset.checked_add(len).ok_or(EFBIG)?;
    let (from, to) = (u64::try_from(offset)?, u64::try_from(end)?);
    match mode {
        m if m == PUNCH_HOLE | KEEP_SIZE => {
            let to = to.min(file.size().next_multiple_of(PAGE));
            if from < to {
                data::punch_bytes(file.backing, from, to)?;
            }
            Ok(())
        }
        0 | KEEP_SIZE => {
            // The process's limit, as on tmpfs also where the length stays.
            // SAFETY: The inode is alive and locked.
            to_result(unsafe { bindings::inode_newsize_ok(file.inode, end) })?;
            let size_before = file.size();
            if mode == 0 && to > size_before {
                file.resize(end)?;
            }
            let to = to.min(file.size()).div_ceil(PAGE);
            let result = data::preallocate(file.backing, from / PAGE, to);
            if result.is_err() && file.size() != size_before {
                file.resize(i64::try_from(size_before)?)?;
            }
            result
        }
        _ => Err(EOPNOTSUPP),
    }
}
