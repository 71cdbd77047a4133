// SPDX-License-Identifier: GPL-2.0

//! System calls that no crate wraps, and shared mappings: the only home of `unsafe` here.

pub mod numa;
pub mod rdma;
pub mod vfio;

use std::ffi::{c_int, c_void, CString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;
use std::process;
use std::sync::atomic::{AtomicU64, AtomicU8, Ordering};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{kill, SigHandler, Signal};
use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};
use nix::unistd::Pid;

/// Bytes in a page.
pub const PAGE: usize = 4096;
/// 64-bit words in a page.
pub const WORDS: usize = PAGE / 8;
/// One page's content.
pub type PageBuf = [u64; WORDS];

/// `PROT_READ`
pub const R: c_int = libc::PROT_READ;
/// `PROT_READ | PROT_WRITE`
pub const RW: c_int = libc::PROT_READ | libc::PROT_WRITE;

/// A mapping that ends with the value.
///
/// A touch outside the file's end or against the protection is a signal; cases that want one fork.
#[derive(Debug)]
pub struct Map {
    addr: usize,
    len: usize,
}

impl Map {
    /// Maps `len` bytes of `file` from `offset`, shared.
    pub fn shared(file: impl AsFd, offset: u64, len: usize, prot: c_int) -> nix::Result<Map> {
        Map::with_flags(file, offset, len, prot, libc::MAP_SHARED)
    }

    /// Maps `len` bytes of `file` from `offset` with any `flags` but `MAP_FIXED`.
    pub fn with_flags(
        file: impl AsFd,
        offset: u64,
        len: usize,
        prot: c_int,
        flags: c_int,
    ) -> nix::Result<Map> {
        let fd = file.as_fd().as_raw_fd();
        let offset = libc::off_t::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        // SAFETY: without MAP_FIXED the kernel picks an unused range.
        let addr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                prot,
                flags & !libc::MAP_FIXED,
                fd,
                offset,
            )
        };
        Map::from_result(addr, len)
    }

    /// Maps `len` bytes of fresh memory that forked children share.
    pub fn anonymous(len: usize) -> nix::Result<Map> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        // SAFETY: without MAP_FIXED the kernel picks an unused range.
        let addr = unsafe { libc::mmap(std::ptr::null_mut(), len, RW, flags, -1, 0) };
        Map::from_result(addr, len)
    }

    fn from_result(addr: *mut c_void, len: usize) -> nix::Result<Map> {
        if addr == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Map {
            addr: addr as usize,
            len,
        })
    }

    /// The first byte's address.
    pub fn addr(&self) -> usize {
        self.addr
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.len / PAGE
    }

    /// All words; other threads, processes and the kernel may change them at any time.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the range stays mapped as long as `self`, is aligned, and atomics allow for
        // concurrent change; a page that cannot be touched raises a signal, nothing else.
        unsafe { std::slice::from_raw_parts(self.addr as *const AtomicU64, self.len / 8) }
    }

    /// All bytes, as [`Map::words`].
    pub fn bytes(&self) -> &[AtomicU8] {
        // SAFETY: as in `words`.
        unsafe { std::slice::from_raw_parts(self.addr as *const AtomicU8, self.len) }
    }

    /// The words of one page.
    pub fn page(&self, page: usize) -> &[AtomicU64] {
        &self.words()[page * WORDS..(page + 1) * WORDS]
    }

    /// Stores a whole page.
    pub fn write_page(&self, page: usize, content: &PageBuf) {
        for (word, value) in self.page(page).iter().zip(content) {
            word.store(*value, Ordering::Relaxed);
        }
    }

    /// Loads a whole page.
    pub fn read_page(&self, page: usize) -> PageBuf {
        let mut out = [0; WORDS];
        for (value, word) in out.iter_mut().zip(self.page(page)) {
            *value = word.load(Ordering::Relaxed);
        }
        out
    }

    /// Stores one word of a page.
    pub fn set(&self, page: usize, word: usize, value: u64) {
        self.page(page)[word].store(value, Ordering::SeqCst);
    }

    /// Loads one word of a page.
    pub fn get(&self, page: usize, word: usize) -> u64 {
        self.page(page)[word].load(Ordering::SeqCst)
    }

    /// `madvise` on `len` bytes from byte `from`.
    pub fn advise(&self, from: usize, len: usize, advice: c_int) -> nix::Result<()> {
        self.check(from, len)?;
        // SAFETY: the range is this mapping's; its words are only read as atomics.
        Errno::result(unsafe { libc::madvise((self.addr + from) as *mut c_void, len, advice) })
            .map(drop)
    }

    /// `mprotect` of `len` bytes from byte `from`.
    pub fn protect(&self, from: usize, len: usize, prot: c_int) -> nix::Result<()> {
        self.check(from, len)?;
        // SAFETY: the range is this mapping's, no other memory changes.
        Errno::result(unsafe { libc::mprotect((self.addr + from) as *mut c_void, len, prot) })
            .map(drop)
    }

    /// `msync` of everything.
    pub fn sync(&self, flags: c_int) -> nix::Result<()> {
        // SAFETY: msync changes no memory.
        Errno::result(unsafe { libc::msync(self.addr as *mut c_void, self.len, flags) }).map(drop)
    }

    /// `mlock` of everything.
    pub fn lock(&self) -> nix::Result<()> {
        self.lock_part(0, self.len)
    }

    /// `mlock` of `len` bytes from byte `from`.
    pub fn lock_part(&self, from: usize, len: usize) -> nix::Result<()> {
        self.check(from, len)?;
        // SAFETY: mlock changes no content.
        Errno::result(unsafe { libc::mlock((self.addr + from) as *const c_void, len) }).map(drop)
    }

    /// `munlock` of everything.
    pub fn unlock(&self) -> nix::Result<()> {
        self.unlock_part(0, self.len)
    }

    /// `munlock` of `len` bytes from byte `from`.
    pub fn unlock_part(&self, from: usize, len: usize) -> nix::Result<()> {
        self.check(from, len)?;
        // SAFETY: munlock changes no content.
        Errno::result(unsafe { libc::munlock((self.addr + from) as *const c_void, len) }).map(drop)
    }

    /// `mincore`: which pages are resident.
    pub fn resident(&self) -> nix::Result<Vec<bool>> {
        let mut out = vec![0u8; self.len.div_ceil(PAGE)];
        // SAFETY: `out` has a byte for each page of the range.
        Errno::result(unsafe {
            libc::mincore(self.addr as *mut c_void, self.len, out.as_mut_ptr())
        })?;
        Ok(out.iter().map(|b| b & 1 == 1).collect())
    }

    /// `mremap` to `len` bytes; the mapping is where the kernel put it afterwards.
    pub fn remap(&mut self, len: usize, flags: c_int) -> nix::Result<()> {
        // SAFETY: no reference into the old range outlives `&mut self`.
        let addr = unsafe { libc::mremap(self.addr as *mut c_void, self.len, len, flags) };
        *self = {
            let new = Map::from_result(addr, len)?;
            // The old range is gone: it must not be unmapped again.
            std::mem::forget(std::mem::replace(self, Map { addr: 0, len: 0 }));
            new
        };
        Ok(())
    }

    /// Moves the whole mapping over `target`, which it replaces.
    pub fn move_over(&mut self, target: Map) -> nix::Result<()> {
        if target.len != self.len {
            return Err(Errno::EINVAL);
        }
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: the target range is owned by `target`, which is given up here, and no reference
        // into the old range outlives `&mut self`.
        let addr = unsafe {
            libc::mremap(
                self.addr as *mut c_void,
                self.len,
                self.len,
                flags,
                target.addr as *mut c_void,
            )
        };
        if addr == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        self.addr = addr as usize;
        std::mem::forget(target);
        Ok(())
    }

    /// Unmaps `len` bytes from byte `from` and maps `file` there from `offset`, or nothing where
    /// `file` is `None`.
    pub fn replace(
        &mut self,
        from: usize,
        len: usize,
        file: Option<(&File, u64, c_int)>,
    ) -> nix::Result<()> {
        self.place(from, len, file, libc::MAP_FIXED)
    }

    fn place(
        &mut self,
        from: usize,
        len: usize,
        file: Option<(&File, u64, c_int)>,
        fixed: c_int,
    ) -> nix::Result<()> {
        self.check(from, len)?;
        let at = (self.addr + from) as *mut c_void;
        let (fd, offset, prot, flags) = match file {
            Some((file, offset, prot)) => (file.as_raw_fd(), offset, prot, libc::MAP_SHARED),
            None => (
                -1,
                0,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            ),
        };
        let offset = libc::off_t::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        // SAFETY: the range is this mapping's, and `&mut self` says that nobody holds a reference.
        let got = unsafe { libc::mmap(at, len, prot, flags | fixed, fd, offset) };
        if got == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(())
    }

    /// Moves `len` bytes from byte `from` over those from byte `to`; nothing stays mapped at
    /// `from` but `PROT_NONE`.
    pub fn shift(&mut self, from: usize, to: usize, len: usize) -> nix::Result<()> {
        self.shift_part(from, len, to, len)
    }

    /// The same with the first `kept` bytes, or, where `to` is `from`, leaves them where they are; the
    /// rest of `len` bytes is unmapped by the same `mremap`.
    pub fn shift_part(
        &mut self,
        from: usize,
        len: usize,
        to: usize,
        kept: usize,
    ) -> nix::Result<()> {
        self.check(from, len)?;
        self.check(to, kept)?;
        let (flags, left) = if from == to {
            (0, from + kept..from + len)
        } else {
            (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, from..from + len)
        };
        // SAFETY: both ranges are this mapping's, and `&mut self` says that nobody holds a
        // reference into them.
        let got = unsafe {
            libc::mremap(
                (self.addr + from) as *mut c_void,
                len,
                kept,
                flags,
                (self.addr + to) as *mut c_void,
            )
        };
        if got == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        match left.len() {
            0 => Ok(()),
            len => self.replace(left.start, len, None),
        }
    }

    /// `munmap` of `len` bytes from byte `from`. Then `file` is mapped there from `offset`, or the
    /// place is kept by `PROT_NONE`.
    pub fn unmap(
        &mut self,
        from: usize,
        len: usize,
        file: Option<(&File, u64, c_int)>,
    ) -> nix::Result<()> {
        self.check(from, len)?;
        // SAFETY: the range is this mapping's, and `&mut self` says that nobody holds a reference.
        Errno::result(unsafe { libc::munmap((self.addr + from) as *mut c_void, len) })?;
        let mapped = self.place(from, len, file, libc::MAP_FIXED_NOREPLACE);
        if mapped.is_err() {
            // The place may be another's now: nothing of the mapping is touched any more.
            std::mem::forget(std::mem::replace(self, Map { addr: 0, len: 0 }));
        }
        mapped
    }

    /// Which bytes from byte `from` on, at most `len`, are of one mapping to the kernel, which keeps
    /// apart what was mapped or protected apart.
    pub fn one_mapping(&self, from: usize, len: usize) -> io::Result<usize> {
        let at = self.addr + from;
        let table = std::fs::read_to_string("/proc/self/maps")?;
        let bounds = table.lines().find_map(|line| {
            let (start, end) = line.split(' ').next()?.split_once('-')?;
            let start = usize::from_str_radix(start, 16).ok()?;
            let end = usize::from_str_radix(end, 16).ok()?;
            (start..end).contains(&at).then_some(end)
        });
        Ok(bounds.map_or(0, |end| len.min(end - at)))
    }

    /// `mremap` of `len` bytes from byte `from` to `new`, in place: over what else lies there.
    pub fn grow_part(&mut self, from: usize, len: usize, new: usize) -> nix::Result<()> {
        self.check(from, len)?;
        self.check(from, new)?;
        // SAFETY: the range is this mapping's, and `&mut self` says that nobody holds a reference; it
        // never moves.
        let got = unsafe { libc::mremap((self.addr + from) as *mut c_void, len, new, 0) };
        if got == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(())
    }

    /// Keeps `len` bytes from byte `from` and unmaps the rest.
    pub fn keep(&mut self, from: usize, len: usize) -> nix::Result<()> {
        self.check(from, len)?;
        let whole = std::mem::replace(self, Map { addr: 0, len: 0 });
        *self = Map {
            addr: whole.addr + from,
            len,
        };
        // Each drops its own part.
        drop(Map {
            addr: whole.addr,
            len: from,
        });
        drop(Map {
            addr: whole.addr + from + len,
            len: whole.len - from - len,
        });
        std::mem::forget(whole);
        Ok(())
    }

    fn check(&self, from: usize, len: usize) -> nix::Result<()> {
        match from.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(Errno::EINVAL),
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: the range is this value's, and no reference outlives it.
            unsafe { libc::munmap(self.addr as *mut c_void, self.len) };
        }
    }
}

/// The physical page numbers behind a mapping, `None` where nothing is mapped (root only; a
/// kernel that hides them reports 0, which is an error here).
pub fn frames(map: &Map) -> Result<Vec<Option<u64>>> {
    let file = File::open("/proc/self/pagemap").context("open /proc/self/pagemap")?;
    let mut raw = vec![0u8; map.pages() * 8];
    file.read_exact_at(&mut raw, (map.addr() / PAGE * 8) as u64)
        .context("read pagemap")?;
    raw.chunks_exact(8)
        .map(|chunk| {
            let entry = u64::from_ne_bytes(chunk.try_into()?);
            let frame = entry & ((1 << 55) - 1);
            match (entry >> 63 == 1, frame) {
                (false, _) => Ok(None),
                (true, 0) => bail!("/proc/self/pagemap hides frame numbers (not root?)"),
                (true, frame) => Ok(Some(frame)),
            }
        })
        .collect()
}

/// `fallocate` with any mode.
pub fn fallocate(file: impl AsFd, mode: c_int, offset: i64, len: i64) -> nix::Result<()> {
    // SAFETY: the call takes no pointers.
    Errno::result(unsafe { libc::fallocate(file.as_fd().as_raw_fd(), mode, offset, len) }).map(drop)
}

/// `ftruncate` with any length, negative ones included.
pub fn ftruncate(file: impl AsFd, len: i64) -> nix::Result<()> {
    // SAFETY: the call takes no pointers.
    Errno::result(unsafe { libc::ftruncate(file.as_fd().as_raw_fd(), len) }).map(drop)
}

/// Punches a hole that keeps the size.
pub fn punch(file: impl AsFd, offset: u64, len: u64) -> nix::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let offset = i64::try_from(offset).map_err(|_| Errno::EFBIG)?;
    let len = i64::try_from(len).map_err(|_| Errno::EFBIG)?;
    fallocate(file, mode, offset, len)
}

/// `lseek`; `whence` is one of `SEEK_*`.
pub fn lseek(file: impl AsFd, offset: i64, whence: c_int) -> nix::Result<i64> {
    // SAFETY: the call takes no pointers.
    Errno::result(unsafe { libc::lseek(file.as_fd().as_raw_fd(), offset, whence) })
}

/// `pwrite` at any offset, negative ones included.
pub fn pwrite(file: impl AsFd, data: &[u8], offset: i64) -> nix::Result<usize> {
    // SAFETY: pointer and length are those of `data`.
    let done = unsafe {
        libc::pwrite(
            file.as_fd().as_raw_fd(),
            data.as_ptr().cast(),
            data.len(),
            offset,
        )
    };
    Errno::result(done).map(|n| n as usize)
}

/// Reads from `file` at `offset` into a mapping, as `pread` does.
pub fn pread_into(
    file: impl AsFd,
    map: &Map,
    from: usize,
    len: usize,
    offset: u64,
) -> nix::Result<usize> {
    map.check(from, len)?;
    let offset = libc::off_t::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
    let at = (map.addr + from) as *mut c_void;
    // SAFETY: the range lies in the mapping, whose words are atomics for everybody.
    let done = unsafe { libc::pread(file.as_fd().as_raw_fd(), at, len, offset) };
    Errno::result(done).map(|n| n as usize)
}

/// Reads from `file` at its position into a mapping, as `read` does.
pub fn read_into(file: impl AsFd, map: &Map, from: usize, len: usize) -> nix::Result<usize> {
    map.check(from, len)?;
    let at = (map.addr + from) as *mut c_void;
    // SAFETY: the range lies in the mapping, whose words are atomics for everybody.
    let done = unsafe { libc::read(file.as_fd().as_raw_fd(), at, len) };
    Errno::result(done).map(|n| n as usize)
}

/// Writes to `file` at `offset` from a mapping, as `pwrite` does.
pub fn pwrite_from(
    file: impl AsFd,
    map: &Map,
    from: usize,
    len: usize,
    offset: u64,
) -> nix::Result<usize> {
    map.check(from, len)?;
    let offset = libc::off_t::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
    let at = (map.addr + from) as *const c_void;
    // SAFETY: the range lies in the mapping, which the kernel only reads.
    let done = unsafe { libc::pwrite(file.as_fd().as_raw_fd(), at, len, offset) };
    Errno::result(done).map(|n| n as usize)
}

/// Gives the pages of a mapping to a pipe: they stay referenced until the pipe is read.
pub fn vmsplice(pipe: impl AsFd, map: &Map, from: usize, len: usize) -> nix::Result<usize> {
    map.check(from, len)?;
    let iov = libc::iovec {
        iov_base: (map.addr + from) as *mut c_void,
        iov_len: len,
    };
    // SAFETY: the vector describes a range of the mapping, which the kernel only reads.
    let done = unsafe { libc::vmsplice(pipe.as_fd().as_raw_fd(), &iov, 1, 0) };
    Errno::result(done).map(|n| n as usize)
}

/// `process_vm_writev` from a mapping to an address of this very process: it holds the pages there
/// for writing until it has read all of `from`.
pub fn write_own_memory(from: &Map, to: &Map) -> nix::Result<usize> {
    let len = from.len.min(to.len);
    let vector = |map: &Map| libc::iovec {
        iov_base: map.addr as *mut c_void,
        iov_len: len,
    };
    let (local, remote) = (vector(from), vector(to));
    // SAFETY: both vectors describe mappings, whose words are atomics for everybody.
    let done = unsafe { libc::process_vm_writev(libc::getpid(), &local, 1, &remote, 1, 0) };
    Errno::result(done).map(|n| n as usize)
}

/// `fsetxattr`.
pub fn set_xattr(file: impl AsFd, name: &str, value: &[u8]) -> nix::Result<()> {
    let name = CString::new(name).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the name ends in NUL, pointer and length are those of `value`.
    Errno::result(unsafe {
        libc::fsetxattr(
            file.as_fd().as_raw_fd(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    })
    .map(drop)
}

/// Has a signal do nothing to this process.
pub fn ignore(signal: Signal) -> nix::Result<()> {
    // SAFETY: No handler runs.
    unsafe { nix::sys::signal::signal(signal, SigHandler::SigIgn) }.map(drop)
}

/// Asks for a lease of this kind, or gives it back (F_SETLEASE).
pub fn lease(file: &File, kind: c_int) -> nix::Result<()> {
    // SAFETY: No memory is passed.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) };
    Errno::result(done).map(drop)
}

/// Opens for writing, without waiting for a lease to end.
pub fn open_now(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
}

/// Forbids to shrink a file for good (F_ADD_SEALS).
pub fn seal(file: &File) -> nix::Result<()> {
    // SAFETY: No memory is passed.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
    Errno::result(done).map(drop)
}

/// Asks for a file's handle, as NFS servers do.
pub fn file_handle(path: &Path) -> nix::Result<()> {
    // Its room in bytes and its type, and the room.
    let mut handle = [0u32; 2 + 32];
    handle[0] = 128;
    let mut mount = 0;
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: The path ends with a zero, and the handle has the room that it says.
    let done = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            libc::AT_FDCWD,
            path.as_ptr(),
            handle.as_mut_ptr(),
            &raw mut mount as *mut c_int,
            0,
        )
    };
    Errno::result(done).map(drop)
}

/// A file's flags, as lsattr shows them.
pub fn inode_flags(file: &File) -> nix::Result<libc::c_long> {
    let mut flags: libc::c_long = 0;
    // SAFETY: The kernel writes an int, for which there is room.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_GETFLAGS, &raw mut flags) };
    Errno::result(done).map(|_| flags)
}

/// `renameat2` with flags.
pub fn rename_with(from: &Path, to: &Path, flags: u32) -> nix::Result<()> {
    let from = CString::new(from.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    let to = CString::new(to.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    let cwd = libc::AT_FDCWD;
    // SAFETY: both paths end in NUL.
    Errno::result(unsafe { libc::renameat2(cwd, from.as_ptr(), cwd, to.as_ptr(), flags) }).map(drop)
}

/// Loads a module file.
pub fn insert_module(file: &File, parameters: &str) -> nix::Result<()> {
    let parameters = CString::new(parameters).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the parameter string ends in NUL.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_finit_module,
            file.as_raw_fd(),
            parameters.as_ptr(),
            0,
        )
    })
    .map(drop)
}

/// Unloads a module without waiting.
pub fn remove_module(name: &str) -> nix::Result<()> {
    let name = CString::new(name).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the name ends in NUL.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK)
    })
    .map(drop)
}

/// Registers a mapping as the fixed buffer of a fresh io_uring, and drops both again.
pub fn io_uring_register_buffer(map: &Map) -> nix::Result<()> {
    // `struct io_uring_params` is 120 bytes; zero asks for the defaults.
    let mut params = [0u64; 15];
    // SAFETY: the kernel fills the structure, whose size is as above.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, params.as_mut_ptr()) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel just returned this descriptor, nobody else has it.
    let ring = unsafe { OwnedFd::from_raw_fd(fd as c_int) };
    let iov = libc::iovec {
        iov_base: map.addr as *mut c_void,
        iov_len: map.len,
    };
    const IORING_REGISTER_BUFFERS: c_int = 0;
    // SAFETY: the vector describes the mapping, whose words are atomics for everybody.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            ring.as_raw_fd(),
            IORING_REGISTER_BUFFERS,
            &iov,
            1,
        )
    })
    .map(drop)
}

/// Wakes whoever waits on the first half of `word`; returns how many there were.
pub fn futex_wake(map: &Map, word: usize, private: bool) -> nix::Result<i64> {
    let flag = if private { libc::FUTEX_PRIVATE_FLAG } else { 0 };
    let at: *const AtomicU64 = &map.words()[word];
    // SAFETY: the address lies in the mapping; a wake changes no memory.
    Errno::result(unsafe { libc::syscall(libc::SYS_futex, at, libc::FUTEX_WAKE | flag, 1) })
}

/// A userfaultfd that is ready for `UFFDIO_REGISTER`.
pub struct UserFault(OwnedFd);

/// `struct uffdio_api` and `struct uffdio_register` as the kernel lays them out.
#[repr(C)]
struct UffdApi {
    api: u64,
    features: u64,
    ioctls: u64,
}
#[repr(C)]
struct UffdRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}
nix::ioctl_readwrite!(uffdio_api, 0xaa, 0x3f, UffdApi);
nix::ioctl_readwrite!(uffdio_register, 0xaa, 0x00, UffdRegister);
/// `struct uffdio_copy` as the kernel lays it out.
#[repr(C)]
struct UffdCopy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}
nix::ioctl_readwrite!(uffdio_copy, 0xaa, 0x03, UffdCopy);

impl UserFault {
    /// Opens one; `ENOSYS` where the kernel has none.
    pub fn open() -> nix::Result<UserFault> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the call takes no pointers.
        let fd = Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })?;
        // SAFETY: the kernel just returned this descriptor, nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as c_int) };
        let mut api = UffdApi {
            api: 0xaa,
            features: 0,
            ioctls: 0,
        };
        // SAFETY: the structure has the kernel's layout.
        unsafe { uffdio_api(fd.as_raw_fd(), &mut api) }?;
        Ok(UserFault(fd))
    }

    /// Registers a mapping for missing (`mode` 1) or write-protect (`mode` 2) faults.
    pub fn register(&self, map: &Map, mode: u64) -> nix::Result<()> {
        let mut request = UffdRegister {
            start: map.addr as u64,
            len: map.len as u64,
            mode,
            ioctls: 0,
        };
        // SAFETY: the structure has the kernel's layout.
        unsafe { uffdio_register(self.0.as_raw_fd(), &mut request) }.map(drop)
    }

    /// Whether somebody waits for a page of it.
    pub fn is_awaited(&self) -> nix::Result<bool> {
        // `struct uffd_msg` is 32 bytes.
        let mut message = [0; 32];
        match nix::unistd::read(&self.0, &mut message) {
            Ok(n) => Ok(n == message.len()),
            Err(Errno::EAGAIN) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Gives the registered `map` its pages, a copy of those of `from`.
    pub fn resolve(&self, map: &Map, from: &Map) -> nix::Result<()> {
        let mut request = UffdCopy {
            to: map.addr as u64,
            from: from.addr as u64,
            len: map.len.min(from.len) as u64,
            mode: 0,
            copied: 0,
        };
        // SAFETY: the structure has the kernel's layout; both ranges are mappings whose words are
        // atomics for everybody.
        unsafe { uffdio_copy(self.0.as_raw_fd(), &mut request) }.map(drop)
    }
}

nix::ioctl_read!(ext4_shutdown, b'X', 125, u32);

/// Makes the ext4 at `dir` fail from now on, as if its disk were gone.
pub fn shut_down(dir: &Path) -> Result<()> {
    /// Not even the journal is written.
    const NO_LOG_FLUSH: u32 = 2;
    let root = File::open(dir).with_context(|| format!("open {}", dir.display()))?;
    let mut how = NO_LOG_FLUSH;
    // SAFETY: the request reads one number.
    unsafe { ext4_shutdown(root.as_raw_fd(), &mut how) }.context("EXT4_IOC_SHUTDOWN")?;
    Ok(())
}

nix::ioctl_write_int_bad!(loop_set_fd, 0x4c00);
nix::ioctl_none_bad!(loop_clr_fd, 0x4c01);
nix::ioctl_none_bad!(loop_get_free, 0x4c82);

/// A loop device on an unlinked file: a disk whose O_DIRECT pins the caller's pages.
pub struct LoopDisk {
    device: File,
    path: String,
}

impl LoopDisk {
    /// Makes one of `bytes` over a file in `dir`.
    pub fn new(dir: &Path, bytes: u64) -> Result<LoopDisk> {
        if !Path::new("/dev/loop-control").exists() {
            // Where the driver is no module, or there is no modprobe, the open below says so.
            let _tried = process::Command::new("modprobe").arg("loop").output();
        }
        let control = File::options()
            .read(true)
            .write(true)
            .open("/dev/loop-control")
            .context("open /dev/loop-control")?;
        let backing_path = dir.join(format!("loop-{}", process::id()));
        let backing = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&backing_path)
            .with_context(|| format!("create {}", backing_path.display()))?;
        std::fs::remove_file(&backing_path)?;
        backing.set_len(bytes)?;
        // Another process may take the same free number between the two calls.
        for _ in 0..16 {
            // SAFETY: the request takes no argument.
            let number = unsafe { loop_get_free(control.as_raw_fd()) };
            let number = number.context("LOOP_CTL_GET_FREE")?;
            let path = format!("/dev/loop{number}");
            let device = File::options()
                .read(true)
                .write(true)
                .open(&path)
                .with_context(|| format!("open {path}"))?;
            // SAFETY: the argument is a descriptor that is open.
            match unsafe { loop_set_fd(device.as_raw_fd(), backing.as_raw_fd()) } {
                Ok(_) => return Ok(LoopDisk { device, path }),
                Err(Errno::EBUSY) => continue,
                Err(e) => bail!("LOOP_SET_FD on {path}: {e}"),
            }
        }
        bail!("no free loop device after 16 attempts");
    }

    /// Opens the device with `O_DIRECT`.
    pub fn open_direct(&self) -> Result<File> {
        use std::os::unix::fs::OpenOptionsExt;
        File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(&self.path)
            .with_context(|| format!("open {} with O_DIRECT", self.path))
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        // SAFETY: the request takes no argument.
        if let Err(e) = unsafe { loop_clr_fd(self.device.as_raw_fd()) } {
            eprintln!("{} stays bound: {e}", self.path);
        }
    }
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// By itself, with this code.
    Exit(i32),
    /// By this signal.
    Signal(Signal),
}

/// A forked child, killed where it is still there when the value goes.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    ended: Option<End>,
}

/// Forks; the child runs `f`, and exits with 0 or, with its error on stderr, 1.
///
/// The child inherits the caller's memory but only its thread, so `f` of a threaded caller must
/// not need locks that another thread may hold.
pub fn fork(f: impl FnOnce() -> Result<()>) -> Result<Child> {
    let parent = Pid::this();
    // SAFETY: the child only runs `f` and then `_exit`, so nothing of the parent is torn down
    // twice; see above for threads.
    match unsafe { nix::unistd::fork() }.context("fork")? {
        nix::unistd::ForkResult::Parent { child } => Ok(Child {
            pid: child,
            ended: None,
        }),
        nix::unistd::ForkResult::Child => {
            // SAFETY: sets this process's own death signal.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            if nix::unistd::getppid() != parent {
                // SAFETY: ends this process, nothing else; the caller is gone already.
                unsafe { libc::_exit(1) };
            }
            let code = match catch_unwind(AssertUnwindSafe(f)) {
                Ok(Ok(())) => 0,
                Ok(Err(e)) => {
                    eprintln!("child: {e:#}");
                    1
                }
                Err(_) => 1,
            };
            // SAFETY: ends this process, nothing else.
            unsafe { libc::_exit(code) }
        }
    }
}

/// Forks a child that exits at once: churn for the address space.
pub fn fork_and_exit() -> nix::Result<()> {
    // SAFETY: the child calls nothing but `_exit`.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Parent { child } => waitpid(child, None).map(drop),
        // SAFETY: ends the child, nothing else.
        nix::unistd::ForkResult::Child => unsafe { libc::_exit(0) },
    }
}

impl Child {
    /// Its process id.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Waits until it ends; after `limit` it is killed and that is an error.
    pub fn wait(&mut self, limit: Duration) -> Result<End> {
        let start = Instant::now();
        while start.elapsed() < limit {
            if let Some(end) = self.poll()? {
                return Ok(end);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        bail!("child {} still runs after {limit:?}", self.pid)
    }

    /// Waits until it ends well.
    pub fn expect_ok(&mut self, limit: Duration) -> Result<()> {
        match self.wait(limit)? {
            End::Exit(0) => Ok(()),
            other => bail!("child {}: expected exit 0, seen {other:?}", self.pid),
        }
    }

    /// Waits until it ends by `signal`.
    pub fn expect_signal(&mut self, signal: Signal, limit: Duration) -> Result<()> {
        match self.wait(limit)? {
            End::Signal(seen) if seen == signal => Ok(()),
            other => bail!("child {}: expected {signal}, seen {other:?}", self.pid),
        }
    }

    /// How it ended, if it has.
    pub fn poll(&mut self) -> Result<Option<End>> {
        if self.ended.is_none() {
            self.ended = match waitpid(self.pid, Some(WaitPidFlag::WNOHANG))? {
                WaitStatus::Exited(_, code) => Some(End::Exit(code)),
                WaitStatus::Signaled(_, signal, _) => Some(End::Signal(signal)),
                _ => None,
            };
        }
        Ok(self.ended)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.ended.is_none() {
            // The child may have ended by itself just now; either way it must be reaped.
            let _gone = kill(self.pid, Signal::SIGKILL);
            let _reaped = waitpid(self.pid, None);
        }
    }
}

/// Adopts orphans, so that the harness can end and reap whatever a case leaves behind.
pub fn become_subreaper() -> io::Result<()> {
    // SAFETY: sets an attribute of this process.
    let done = unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
    Errno::result(done).map(drop).map_err(io::Error::from)
}

/// Dies with the parent.
pub fn die_with_parent() {
    // SAFETY: sets this process's own death signal.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}
