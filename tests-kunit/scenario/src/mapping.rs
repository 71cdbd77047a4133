// SPDX-License-Identifier: GPL-2.0

//! Mappings: what a VMM, a debugger, or another process may do with them.

use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::Ordering;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::resource::{setrlimit, Resource};
use nix::sys::signal::Signal;
use nix::sys::uio::{process_vm_readv, process_vm_writev, RemoteIoVec};
use nix::sys::wait::{waitpid, WaitStatus};
use nix::unistd::Pid;

use crate::check::{bytes_are, eq, fails, page_is, skip, that};
use crate::content::{self, page_bytes, pages_bytes};
use crate::ctx::{Ctx, Guest};
use crate::harness::Case;
use crate::log::is_logged;
use crate::sys::{self, LoopDisk, Map, PAGE, R, RW, WORDS};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::thinram(
        "mmap/private",
        "MAP_PRIVATE is EINVAL and one line says why",
        private,
    ),
    Case::both(
        "mmap/read-only",
        "a read-only file maps, but never writable",
        read_only,
    ),
    Case::both("mmap/lengths", "odd lengths and offsets", lengths),
    Case::both(
        "mmap/fork",
        "a child of fork has no mapping, the parent keeps its",
        fork,
    ),
    Case::both(
        "mmap/protect",
        "mprotect to read-only, none, and back",
        protect,
    ),
    Case::both("mmap/grow", "mremap cannot grow the mapping: EFAULT", grow),
    Case::both(
        "mmap/move",
        "mremap moves and shrinks the mapping",
        move_around,
    ),
    Case::both(
        "mmap/partial-unmap",
        "munmap of the middle leaves the ends",
        partial_unmap,
    ),
    Case::both("mmap/dontneed", "MADV_DONTNEED keeps the data", dontneed),
    Case::both("mmap/remove", "MADV_REMOVE punches a hole", remove),
    Case::both(
        "mmap/advice",
        "every other advice: accepted or its errno, data kept",
        advice,
    ),
    Case::both("mmap/mlock", "mlock and munlock succeed", mlock),
    Case::both("mmap/coredump", "guest RAM is not in a core dump", coredump),
    Case::both(
        "mmap/process-vm",
        "process_vm_readv and writev reach the mapping",
        process_vm,
    ),
    Case::both(
        "mmap/debugger",
        "ptrace and /proc/PID/mem read and write it",
        debugger,
    ),
    Case::both(
        "mmap/o-direct",
        "O_DIRECT from a disk into the mapping and back",
        o_direct,
    ),
    Case::both("mmap/vmsplice", "a pipe may hold its pages", vmsplice),
    Case::both(
        "mmap/long-pin",
        "io_uring fixed buffers are refused: EFAULT",
        long_pin,
    ),
    Case::both(
        "mmap/userfaultfd",
        "userfaultfd is refused: EINVAL",
        userfaultfd,
    ),
    Case::both(
        "mmap/futex",
        "a shared futex in it: EFAULT, a private one works",
        futex,
    ),
    Case::both("mmap/mbind", "a NUMA policy is accepted", mbind),
    Case::both("mmap/msync", "msync succeeds", msync),
    Case::both("mmap/mincore", "mincore says what was touched", mincore),
    Case::both(
        "mmap/coherent",
        "mappings of one file always agree",
        coherent,
    ),
    Case::both(
        "mmap/syscalls",
        "write(2) shows in the mapping at once and back",
        syscalls,
    ),
    Case::both(
        "mmap/read-then-write",
        "a write after a read fault",
        read_then_write,
    ),
    Case::both(
        "mmap/write-from-itself",
        "write(2) of a file from its own mapping",
        from_itself,
    ),
    Case::both(
        "mmap/fresh-is-zero",
        "a fresh page shows nothing of the guest before",
        fresh_is_zero,
    ),
    Case::both("mmap/sparse", "a 64 GiB file takes what is touched", sparse),
    Case::both(
        "mmap/atomics",
        "threads and processes count in one word",
        atomics,
    ),
    Case::both(
        "mmap/hole-while-spinning",
        "a hole reaches a process that makes no call",
        hole_while_spinning,
    ),
    Case::both(
        "mmap/fault-race",
        "threads that fault one page at once agree",
        fault_race,
    )
    .span(2.0),
];

fn private(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 4)?;
    guest.fill(0, 4, 1);
    let ro = File::open(&guest.path)?;
    for (what, file, prot) in [
        ("read-write", &guest.file, RW),
        ("read", &guest.file, R),
        ("of a read-only file", &ro, R),
    ] {
        let map = Map::with_flags(file, 0, 4 * PAGE, prot, libc::MAP_PRIVATE);
        fails(format!("MAP_PRIVATE, {what}"), map, Errno::EINVAL)?;
    }
    guest.holds(0, 4, 1)?;
    ctx.expect_used("after the refusals", &mount, "web", 16)?;
    is_logged(ctx, &["share=on"], || {
        let map = Map::with_flags(&ro, 0, PAGE, R, libc::MAP_PRIVATE);
        fails("MAP_PRIVATE", map, Errno::EINVAL)
    })
}

fn read_only(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 4)?;
    guest.fill(0, 2, 1);
    let ro = File::open(&guest.path)?;
    fails(
        "a writable mapping",
        Map::shared(&ro, 0, 4 * PAGE, RW),
        Errno::EACCES,
    )?;
    let map = Map::shared(&ro, 0, 4 * PAGE, R)?;
    page_is("page 0", &map.read_page(0), &content::page(1))?;
    page_is("page 2, never written", &map.read_page(2), &[0; WORDS])?;
    guest.fill(2, 3, 1);
    page_is(
        "page 2 after a write by the other",
        &map.read_page(2),
        &content::page(3),
    )?;
    fails(
        "mprotect to writable",
        map.protect(0, PAGE, RW),
        Errno::EACCES,
    )?;
    let remove = map.advise(0, PAGE, libc::MADV_REMOVE);
    fails("MADV_REMOVE", remove, Errno::EACCES)?;
    let mut child = sys::fork(|| {
        let map = Map::shared(&ro, 0, 4 * PAGE, R)?;
        map.set(0, 0, 1);
        bail!("a write went through a read-only mapping")
    })?;
    child.expect_signal(Signal::SIGSEGV, ctx.limit(10.0))?;
    guest.holds(0, 3, 1)?;
    let wo = File::options().write(true).open(&guest.path)?;
    fails(
        "a mapping of a write-only file",
        Map::shared(&wo, 0, PAGE, R),
        Errno::EACCES,
    )
}

fn lengths(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 4)?;
    guest.fill(0, 4, 1);
    fails(
        "length 0",
        Map::shared(&guest.file, 0, 0, RW),
        Errno::EINVAL,
    )?;
    fails(
        "an unaligned offset",
        Map::shared(&guest.file, 100, PAGE, RW),
        Errno::EINVAL,
    )?;
    fails(
        "a length that overflows",
        Map::shared(&guest.file, 0, usize::MAX - PAGE, RW),
        Errno::ENOMEM,
    )?;
    let odd = Map::shared(&guest.file, PAGE as u64, PAGE + 8, RW)?;
    page_is("page 1 by an offset", &odd.read_page(0), &content::page(2))?;
    eq(
        "first word of page 2",
        odd.words()[WORDS].load(Ordering::SeqCst),
        content::word(3, 0),
    )?;
    // Longer than the file is fine as long as nobody touches what is beyond.
    let long = Map::shared(&guest.file, 0, 64 * PAGE, RW)?;
    page_is("page 3", &long.read_page(3), &content::page(4))?;
    guest.file.set_len(8 * PAGE as u64)?;
    long.write_page(7, &content::page(70));
    let mut seen = vec![0; PAGE];
    guest.file.read_exact_at(&mut seen, 7 * PAGE as u64)?;
    bytes_are("page 7 once the file is longer", &seen, &page_bytes(70))
}

fn fork(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 4)?;
    guest.fill(0, 4, 1);
    let thinram = ctx.is_thinram();
    let mut child = sys::fork(|| {
        // On tmpfs the child shares the mapping, on ThinRAM this ends it.
        guest.holds(0, 4, 1)?;
        guest.map.set(3, 0, 7);
        Ok(())
    })?;
    let limit = ctx.limit(10.0);
    if thinram {
        child.expect_signal(Signal::SIGSEGV, limit)?;
        guest.holds(0, 4, 1)?;
    } else {
        child.expect_ok(limit)?;
        eq("what the child wrote", guest.map.get(3, 0), 7)?;
        guest.fill(3, 4, 1);
    }
    // The child inherits the file, and can map that.
    let mut child = sys::fork(|| {
        let map = Map::shared(&guest.file, 0, 4 * PAGE, RW)?;
        page_is("page 2 in the child", &map.read_page(2), &content::page(3))?;
        map.write_page(2, &content::page(33));
        Ok(())
    })?;
    child.expect_ok(limit)?;
    page_is(
        "what the child wrote",
        &guest.map.read_page(2),
        &content::page(33),
    )?;
    ctx.expect_used("after the children", &mount, "web", 16)
}

fn protect(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 8)?;
    guest.fill(0, 8, 1);
    let all = 8 * PAGE;
    guest.map.protect(0, all, R)?;
    guest.holds(0, 8, 1)?;
    let write_dies = |map: &Map, page: usize| -> Result<()> {
        // A fork has no mapping, so the child writes through the kernel, which obeys protections.
        let pid = std::process::id();
        let remote = [RemoteIoVec {
            base: map.addr() + page * PAGE,
            len: 8,
        }];
        let pid = Pid::from_raw(i32::try_from(pid)?);
        let done = process_vm_writev(pid, &[IoSlice::new(&[0xff; 8])], &remote);
        fails(
            format!("a write to protected page {page}"),
            done,
            Errno::EFAULT,
        )
    };
    write_dies(&guest.map, 2)?;
    guest.holds(0, 8, 1)?;
    // The file itself is writable all the same, and the read-only mapping follows.
    guest.file.write_all_at(&page_bytes(50), 2 * PAGE as u64)?;
    page_is("page 2", &guest.map.read_page(2), &content::page(50))?;
    guest.map.protect(0, 4 * PAGE, RW)?;
    guest.fill(0, 4, 1);
    write_dies(&guest.map, 5)?;
    guest.map.protect(PAGE, PAGE, libc::PROT_NONE)?;
    write_dies(&guest.map, 1)?;
    let mut buffer = [0; 8];
    let pid = Pid::this();
    let remote = [RemoteIoVec {
        base: guest.map.addr() + PAGE,
        len: 8,
    }];
    let read = process_vm_readv(pid, &mut [IoSliceMut::new(&mut buffer)], &remote);
    fails("a read of a PROT_NONE page", read, Errno::EFAULT)?;
    guest.map.protect(0, all, RW)?;
    guest.holds(0, 8, 1)?;
    guest.fill(0, 8, 20);
    guest.holds(0, 8, 20)?;
    // A read-only mapping of what was never written, then writable.
    let sparse = mount.guest("db", 4)?;
    sparse.map.protect(0, 4 * PAGE, R)?;
    sparse.is_zero(0, 4)?;
    sparse.map.protect(0, 4 * PAGE, RW)?;
    sparse.fill(0, 4, 5);
    sparse.holds(0, 4, 5)?;
    guest
        .map
        .protect(0, all, libc::PROT_READ | libc::PROT_EXEC)
        .context("mprotect to executable")?;
    guest.holds(0, 8, 20)
}

fn grow(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let mut guest = mount.guest("web", 8)?;
    guest.fill(0, 8, 1);
    guest
        .map
        .remap(4 * PAGE, 0)
        .context("mremap to half the length")?;
    guest.holds(0, 4, 1)?;
    let grown = guest.map.remap(8 * PAGE, libc::MREMAP_MAYMOVE);
    if ctx.is_thinram() {
        fails("mremap to a larger length", grown, Errno::EFAULT)?;
        let kept = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
        let moved = guest.map.remap(4 * PAGE, kept);
        fails("mremap that keeps the old range", moved, Errno::EINVAL)?;
        eq("pages mapped", guest.map.pages(), 4)?;
        guest.holds(0, 4, 1)?;
        // A VMM maps anew instead.
        guest.map = Map::shared(&guest.file, 0, 8 * PAGE, RW)?;
    } else {
        grown?;
    }
    guest.holds(0, 8, 1)
}

fn move_around(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M")?;
    let pages = 1536;
    let mut guest = mount.guest("web", pages)?;
    guest.fill(0, pages, 1);
    let second = Map::shared(&guest.file, 0, pages * PAGE, RW)?;
    for round in 0..3 {
        let target = Map::anonymous(pages * PAGE)?;
        let to = target.addr();
        guest.map.move_over(target)?;
        eq("address", guest.map.addr(), to)?;
        guest.holds(0, pages, 1)?;
        let value = 1000 + round;
        guest.map.set(7, 3, value);
        eq(
            "a write after the move, by another mapping",
            second.get(7, 3),
            value,
        )?;
        guest.fill(7, 8, 1);
    }
    guest.map.remap(100 * PAGE, 0)?;
    guest.holds(0, 100, 1)?;
    drop(guest.map);
    page_is(
        "the last page by another mapping",
        &second.read_page(pages - 1),
        &content::page(pages as u64),
    )?;
    ctx.expect_used("after the moves", &mount, "web", pages as u64 * 4)
}

fn partial_unmap(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let mut guest = mount.guest("web", 32)?;
    guest.fill(0, 32, 1);
    guest.map.replace(8 * PAGE, 16 * PAGE, None)?;
    guest.holds(0, 8, 1)?;
    guest.holds(24, 32, 1)?;
    // The other way round: the file's end over its start.
    guest.map.replace(
        8 * PAGE,
        8 * PAGE,
        Some((&guest.file, 24 * PAGE as u64, RW)),
    )?;
    for page in 0..8 {
        page_is(
            "end over the middle",
            &guest.map.read_page(8 + page),
            &guest.map.read_page(24 + page),
        )?;
    }
    guest.map.set(8, 0, 99);
    eq(
        "a write to page 24 by its other address",
        guest.map.get(24, 0),
        99,
    )?;
    guest.fill(24, 25, 1);
    guest.map.replace(
        8 * PAGE,
        16 * PAGE,
        Some((&guest.file, 8 * PAGE as u64, RW)),
    )?;
    guest.holds(0, 32, 1)?;
    ctx.expect_used("after all that", &mount, "web", 128)
}

fn dontneed(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 16)?;
    guest.fill(0, 16, 1);
    guest.map.advise(0, 16 * PAGE, libc::MADV_DONTNEED)?;
    ctx.expect_used("after MADV_DONTNEED", &mount, "web", 64)?;
    guest.holds(0, 16, 1)?;
    guest.map.advise(4 * PAGE, PAGE, libc::MADV_DONTNEED)?;
    guest.fill(4, 5, 50);
    guest.map.advise(0, 16 * PAGE, libc::MADV_DONTNEED)?;
    guest.holds(4, 5, 50)?;
    guest.holds(5, 16, 1)
}

fn remove(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 16)?;
    guest.fill(0, 16, 1);
    guest.map.advise(2 * PAGE, 6 * PAGE, libc::MADV_REMOVE)?;
    ctx.expect_used("after MADV_REMOVE", &mount, "web", 40)?;
    guest.is_zero(2, 8)?;
    guest.holds(0, 2, 1)?;
    guest.holds(8, 16, 1)?;
    guest.fill(2, 8, 1);
    guest.holds(0, 16, 1)?;
    // QEMU's discard of a block: the hole in the file, then MADV_DONTNEED.
    sys::punch(&guest.file, 8 * PAGE as u64, 8 * PAGE as u64)?;
    guest.map.advise(8 * PAGE, 8 * PAGE, libc::MADV_DONTNEED)?;
    guest.is_zero(8, 16)?;
    fails(
        "an unaligned address",
        guest.map.advise(100, PAGE, libc::MADV_REMOVE),
        Errno::EINVAL,
    )
}

// In libc not yet.
const GUARD_INSTALL: i32 = 102;
const GUARD_REMOVE: i32 = 103;

/// Advices with what ThinRAM and tmpfs answer; `None` is success.
const ADVICES: [(&str, i32, Option<Errno>, Option<Errno>); 19] = [
    ("MADV_GUARD_REMOVE", GUARD_REMOVE, Some(Errno::EINVAL), None),
    ("MADV_NORMAL", libc::MADV_NORMAL, None, None),
    ("MADV_RANDOM", libc::MADV_RANDOM, None, None),
    ("MADV_SEQUENTIAL", libc::MADV_SEQUENTIAL, None, None),
    ("MADV_WILLNEED", libc::MADV_WILLNEED, None, None),
    (
        "MADV_FREE",
        libc::MADV_FREE,
        Some(Errno::EINVAL),
        Some(Errno::EINVAL),
    ),
    ("MADV_COLD", libc::MADV_COLD, None, None),
    ("MADV_PAGEOUT", libc::MADV_PAGEOUT, None, None),
    ("MADV_POPULATE_READ", libc::MADV_POPULATE_READ, None, None),
    ("MADV_POPULATE_WRITE", libc::MADV_POPULATE_WRITE, None, None),
    ("MADV_DONTFORK", libc::MADV_DONTFORK, None, None),
    ("MADV_DOFORK", libc::MADV_DOFORK, Some(Errno::EINVAL), None),
    ("MADV_DONTDUMP", libc::MADV_DONTDUMP, None, None),
    ("MADV_DODUMP", libc::MADV_DODUMP, Some(Errno::EINVAL), None),
    (
        "MADV_WIPEONFORK",
        libc::MADV_WIPEONFORK,
        Some(Errno::EINVAL),
        Some(Errno::EINVAL),
    ),
    ("MADV_KEEPONFORK", libc::MADV_KEEPONFORK, None, None),
    (
        "an unknown advice",
        777,
        Some(Errno::EINVAL),
        Some(Errno::EINVAL),
    ),
    // Present only where the kernel was built with them: success or EINVAL.
    ("MADV_MERGEABLE", libc::MADV_MERGEABLE, None, None),
    ("MADV_HUGEPAGE", libc::MADV_HUGEPAGE, None, None),
];

fn advice(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 16)?;
    guest.fill(0, 16, 1);
    for (name, advice, thinram, tmpfs) in ADVICES {
        let expected = if ctx.is_thinram() { thinram } else { tmpfs };
        let optional = [libc::MADV_MERGEABLE, libc::MADV_HUGEPAGE].contains(&advice);
        match (guest.map.advise(0, 16 * PAGE, advice), expected) {
            (Ok(()), None) => {}
            (Err(Errno::EINVAL), None) if optional => println!("{name}: EINVAL"),
            (result, None) => result.context(name)?,
            (result, Some(errno)) => fails(name, result, errno)?,
        }
        guest.holds(0, 16, 1).context(name)?;
        guest.fill(3, 5, 1);
    }
    if ctx.is_thinram() {
        let guard = guest.map.advise(0, PAGE, GUARD_INSTALL);
        fails("MADV_GUARD_INSTALL", guard, Errno::EINVAL)?;
        guest.holds(0, 16, 1)?;
    }
    ctx.expect_used("after the advices", &mount, "web", 64)?;
    // Populating makes writable memory of what was never touched.
    let fresh = mount.guest("db", 8)?;
    fresh.map.advise(0, 4 * PAGE, libc::MADV_POPULATE_WRITE)?;
    ctx.expect_used(
        "after MADV_POPULATE_WRITE of 4 pages",
        &mount,
        "db",
        if ctx.is_thinram() { 16 } else { 80 },
    )?;
    fresh.is_zero(0, 8)
}

fn mlock(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 16)?;
    guest.fill(0, 8, 1);
    guest.map.lock().context("mlock")?;
    guest.holds(0, 8, 1)?;
    guest.is_zero(8, 16)?;
    guest.fill(8, 16, 1);
    sys::punch(&guest.file, 0, PAGE as u64).context("a hole in locked memory")?;
    guest.is_zero(0, 1)?;
    guest.map.unlock().context("munlock")?;
    guest.holds(1, 16, 1)
}

/// Puts the kernel's core pattern back.
struct CorePattern(String);

impl CorePattern {
    const PATH: &'static str = "/proc/sys/kernel/core_pattern";

    fn set(new: &str) -> Result<CorePattern> {
        let Ok(old) = fs::read_to_string(CorePattern::PATH) else {
            return Err(skip("this kernel dumps no core"));
        };
        fs::write(CorePattern::PATH, new).context("write core_pattern")?;
        Ok(CorePattern(old))
    }
}

impl Drop for CorePattern {
    fn drop(&mut self) {
        if let Err(e) = fs::write(CorePattern::PATH, &self.0) {
            eprintln!("{} stays changed: {e}", CorePattern::PATH);
        }
    }
}

fn coredump(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 4)?;
    let control = Map::anonymous(PAGE)?;
    // Another process writes, so that the words are nowhere else in the one that dumps.
    let mut writer = sys::fork(|| {
        guest.file.write_all_at(&pages_bytes(0xfeed, 4), 0)?;
        control.write_page(0, &content::page(0xbeef));
        Ok(())
    })?;
    let limit = ctx.limit(10.0);
    writer.expect_ok(limit)?;
    let core = ctx.dir.join("core");
    let pattern = CorePattern::set(&core.display().to_string())?;
    let mut child = sys::fork(|| {
        fs::write("/proc/self/coredump_filter", "0xff")?;
        setrlimit(Resource::RLIMIT_CORE, 1 << 30, 1 << 30)?;
        let map = Map::shared(&guest.file, 0, 4 * PAGE, RW)?;
        for page in 0..4 {
            std::hint::black_box(map.get(page, 9));
        }
        std::process::abort()
    })?;
    child.expect_signal(Signal::SIGABRT, limit)?;
    drop(pattern);
    let dump = fs::read(&core).with_context(|| format!("read {}", core.display()))?;
    let find = |seed: u64| {
        let needle = &page_bytes(seed)[8 * 100..8 * 108];
        dump.windows(needle.len())
            .step_by(8)
            .any(|window| window == needle)
    };
    that("the dump holds ordinary shared memory", find(0xbeef))?;
    eq(
        "the dump holds the mapping",
        find(0xfeed + 1),
        !ctx.is_thinram(),
    )
}

fn process_vm(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 8)?;
    guest.fill(0, 4, 1);
    let owner = Pid::this();
    let base = guest.map.addr();
    let mut child = sys::fork(|| {
        let mut seen = vec![0xff; 6 * PAGE];
        let remote = [RemoteIoVec {
            base: base + 100,
            len: 6 * PAGE,
        }];
        let n = process_vm_readv(owner, &mut [IoSliceMut::new(&mut seen)], &remote)?;
        eq("bytes read", n, 6 * PAGE)?;
        let mut expected = pages_bytes(1, 4);
        expected.resize(8 * PAGE, 0);
        bytes_are(
            "read by another process",
            &seen,
            &expected[100..100 + 6 * PAGE],
        )?;
        let data = pages_bytes(40, 2);
        let remote = [RemoteIoVec {
            base: base + 3 * PAGE + 8,
            len: 2 * PAGE,
        }];
        let n = process_vm_writev(owner, &[IoSlice::new(&data)], &remote)?;
        eq("bytes written", n, 2 * PAGE)
    })?;
    child.expect_ok(ctx.limit(10.0))?;
    let mut expected = pages_bytes(1, 4);
    expected.resize(8 * PAGE, 0);
    expected[3 * PAGE + 8..5 * PAGE + 8].copy_from_slice(&pages_bytes(40, 2));
    let mut seen = vec![0; 8 * PAGE];
    guest.file.read_exact_at(&mut seen, 0)?;
    bytes_are("written by another process", &seen, &expected)?;
    let word = u64::from_ne_bytes(expected[3 * PAGE + 8..3 * PAGE + 16].try_into()?);
    eq("the same by the mapping", guest.map.get(3, 1), word)
}

/// A process for a debugger: it maps four pages and waits.
pub struct Debuggee {
    /// The process.
    pub child: sys::Child,
    /// Where it has the mapping.
    pub addr: usize,
    shared: Map,
}

impl Debuggee {
    /// Starts it; `check` runs in it at the end.
    pub fn start(
        ctx: &Ctx,
        file: &File,
        prot: libc::c_int,
        check: impl FnOnce(&Map) -> Result<()>,
    ) -> Result<Debuggee> {
        let shared = Map::anonymous(PAGE)?;
        let child = sys::fork(|| {
            let map = Map::shared(file, 0, 4 * PAGE, prot)?;
            shared.set(0, 1, map.addr() as u64);
            while shared.get(0, 0) == 0 {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            check(&map)
        })?;
        ctx.until("the child's address", 10.0, || {
            Ok((shared.get(0, 1) != 0, "0".into()))
        })?;
        let addr = usize::try_from(shared.get(0, 1))?;
        Ok(Debuggee {
            child,
            addr,
            shared,
        })
    }

    /// Lets it check its memory and end.
    pub fn end(mut self, ctx: &Ctx) -> Result<()> {
        self.shared.set(0, 0, 1);
        self.child.expect_ok(ctx.limit(10.0))
    }
}

fn debugger(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 4)?;
    file.write_all_at(&pages_bytes(1, 2), 0)?;
    let debuggee = Debuggee::start(ctx, &file, RW, |map| {
        eq("the poked word", map.get(2, 5), 0x1234_5678)?;
        eq("the word by /proc/PID/mem", map.get(1, 6), 0xabcd)
    })?;
    let (addr, pid) = (debuggee.addr, debuggee.child.pid());
    let at = |page: usize, word: usize| (addr + page * PAGE + word * 8) as ptrace::AddressType;
    ptrace::attach(pid)?;
    match waitpid(pid, None)? {
        WaitStatus::Stopped(..) => {}
        other => bail!("expected that the child stops, seen {other:?}"),
    }
    eq(
        "peeked word",
        ptrace::read(pid, at(1, 3))? as u64,
        content::word(2, 3),
    )?;
    eq(
        "peeked word of an untouched page",
        ptrace::read(pid, at(3, 0))?,
        0,
    )?;
    ptrace::write(pid, at(2, 5), 0x1234_5678)?;
    let memory = File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/{pid}/mem"))?;
    let mut seen = vec![0; PAGE];
    memory.read_exact_at(&mut seen, addr as u64)?;
    bytes_are("page by /proc/PID/mem", &seen, &page_bytes(1))?;
    memory.write_all_at(&0xabcd_u64.to_ne_bytes(), (addr + PAGE + 48) as u64)?;
    ptrace::detach(pid, None)?;
    debuggee.end(ctx)?;
    file.read_exact_at(&mut seen[..8], 2 * PAGE as u64 + 40)?;
    bytes_are(
        "the poked word in the file",
        &seen[..8],
        &0x1234_5678_u64.to_ne_bytes(),
    )
}

/// A disk whose O_DIRECT reads and writes reach the caller's pages.
pub struct Disk {
    /// Opened with O_DIRECT.
    pub file: File,
    /// The loop device behind it, kept as long.
    _device: Option<LoopDisk>,
}

impl Disk {
    /// One of `bytes`: a file on `--disk`, else a loop device; a skip where there is neither.
    pub fn new(ctx: &Ctx, bytes: u64) -> Result<Disk> {
        if let Some(dir) = &ctx.setup.disk {
            let path = dir.join(format!("scenario-{}", std::process::id()));
            let file = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .custom_flags(libc::O_DIRECT)
                .open(&path)
                .with_context(|| format!("create {} with O_DIRECT", path.display()))?;
            fs::remove_file(&path)?;
            file.set_len(bytes)?;
            return Ok(Disk {
                file,
                _device: None,
            });
        }
        let device = LoopDisk::new(&ctx.dir, bytes)
            .map_err(|e| skip(format!("neither --disk nor a loop device ({e:#})")))?;
        Ok(Disk {
            file: device.open_direct()?,
            _device: Some(device),
        })
    }
}

fn o_direct(ctx: &Ctx) -> Result<()> {
    let disk = Disk::new(ctx, 1 << 20)?;
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 64)?;
    guest.fill(0, 16, 1);
    let len = 16 * PAGE;
    let written = sys::pwrite_from(&disk.file, &guest.map, 0, len, 0).context("mapping to disk")?;
    eq("bytes written", written, len)?;
    // Into pages that were never touched, that hold data, and that were only read.
    guest.fill(32, 48, 500);
    guest.is_zero(48, 64)?;
    for page in [16, 32, 48] {
        let read = sys::pread_into(&disk.file, &guest.map, page * PAGE, len, 0)
            .context("disk to mapping")?;
        eq("bytes read", read, len)?;
        for i in 0..16 {
            let expected = content::page(1 + i as u64);
            page_is(
                format!("page {}", page + i),
                &guest.map.read_page(page + i),
                &expected,
            )?;
        }
    }
    // Part of a page.
    sys::pread_into(&disk.file, &guest.map, 1024, 512, 3 * PAGE as u64)?;
    let mut expected = content::page(1);
    expected[128..192].copy_from_slice(&content::page(4)[..64]);
    page_is("page 0 after 512 bytes", &guest.map.read_page(0), &expected)?;
    guest.map.protect(0, PAGE, R)?;
    let refused = sys::pread_into(&disk.file, &guest.map, 0, PAGE, 0);
    fails("a read into a read-only mapping", refused, Errno::EFAULT)?;
    page_is(
        "page 0 after the refusal",
        &guest.map.read_page(0),
        &expected,
    )
}

fn vmsplice(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 4)?;
    guest.fill(0, 4, 1);
    let (from, to) = nix::unistd::pipe()?;
    let n = sys::vmsplice(&to, &guest.map, 0, 3 * PAGE).context("vmsplice")?;
    eq("bytes spliced", n, 3 * PAGE)?;
    // A hole and new data while the pipe holds the old page.
    sys::punch(&guest.file, PAGE as u64, PAGE as u64)?;
    guest.is_zero(1, 2)?;
    guest.fill(1, 2, 200);
    let mut seen = vec![0; 3 * PAGE];
    File::from(from).read_exact(&mut seen)?;
    bytes_are("first page of the pipe", &seen[..PAGE], &page_bytes(1))?;
    bytes_are("last page of the pipe", &seen[2 * PAGE..], &page_bytes(3))?;
    // What was punched away must stay as it was or be zero: it belongs to nobody else yet.
    let middle = &seen[PAGE..2 * PAGE];
    that(
        "the punched page is old or zero",
        middle == page_bytes(2) || middle.iter().all(|b| *b == 0),
    )?;
    guest.holds(1, 2, 200)?;
    drop(to);
    ctx.expect_used("after the pipe", &mount, "web", 16)
}

/// Registers a mapping as an io_uring fixed buffer, which pins it for long.
fn register_buffer(map: &Map) -> Result<nix::Result<()>> {
    match sys::io_uring_register_buffer(map) {
        Err(Errno::ENOSYS | Errno::EPERM) => Err(skip("this kernel has no io_uring")),
        other => Ok(other),
    }
}

fn long_pin(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 4)?;
    guest.fill(0, 4, 1);
    let anonymous = Map::anonymous(4 * PAGE)?;
    register_buffer(&anonymous)?.context("anonymous memory as a fixed buffer")?;
    let done = register_buffer(&guest.map)?;
    if ctx.is_thinram() {
        fails("guest RAM as a fixed buffer", done, Errno::EFAULT)?;
    } else {
        done?;
    }
    guest.holds(0, 4, 1)
}

fn userfaultfd(ctx: &Ctx) -> Result<()> {
    let uffd = match sys::UserFault::open() {
        Err(Errno::ENOSYS | Errno::EPERM) => return Err(skip("this kernel has no userfaultfd")),
        other => other.context("userfaultfd")?,
    };
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 4)?;
    guest.fill(0, 2, 1);
    for (what, mode) in [("missing", 1), ("write-protect", 2)] {
        let done = uffd.register(&guest.map, mode);
        if ctx.is_thinram() {
            fails(format!("register for {what}"), done, Errno::EINVAL)?;
        }
    }
    drop(uffd);
    guest.holds(0, 2, 1)?;
    guest.fill(2, 4, 1);
    guest.holds(0, 4, 1)
}

fn futex(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 4)?;
    guest.map.set(0, 0, 5);
    let shared = sys::futex_wake(&guest.map, 0, false);
    if ctx.is_thinram() {
        fails("a shared futex", shared, Errno::EFAULT)?;
    } else {
        eq("woken by a shared futex", shared?, 0)?;
    }
    eq(
        "woken by a private futex",
        sys::futex_wake(&guest.map, 0, true)?,
        0,
    )?;
    eq("the word", guest.map.get(0, 0), 5)
}

fn mbind(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 8)?;
    guest.fill(0, 4, 1);
    // Without MPOL_MF_STRICT: the pages may lie on the node of another CPU, and stay there.
    match sys::numa::bind(&guest.map, 0, sys::numa::MOVE) {
        Err(Errno::ENOSYS) => return Err(skip("this kernel has no NUMA")),
        other => other.context("mbind to node 0")?,
    }
    guest.holds(0, 4, 1)?;
    guest.fill(4, 8, 1);
    guest.holds(0, 8, 1)
}

fn msync(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 4)?;
    guest.fill(0, 4, 1);
    for (name, flags) in [
        ("MS_SYNC", libc::MS_SYNC),
        ("MS_ASYNC", libc::MS_ASYNC),
        ("MS_INVALIDATE", libc::MS_SYNC | libc::MS_INVALIDATE),
    ] {
        guest.map.sync(flags).context(name)?;
    }
    guest.holds(0, 4, 1)
}

fn mincore(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 8)?;
    eq(
        "resident before a touch",
        guest.map.resident()?,
        vec![false; 8],
    )?;
    guest.fill(2, 4, 1);
    let expected: Vec<bool> = (0..8).map(|page| (2..4).contains(&page)).collect();
    eq(
        "resident after writing pages 2 and 3",
        guest.map.resident()?,
        expected.clone(),
    )?;
    sys::punch(&guest.file, 2 * PAGE as u64, PAGE as u64)?;
    eq("resident after a hole", guest.map.resident()?[2], false)
}

fn coherent(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 16)?;
    let second = Map::shared(&guest.file, 4 * PAGE as u64, 12 * PAGE, RW)?;
    let own_open = File::options().read(true).write(true).open(&guest.path)?;
    let third = Map::shared(&own_open, 0, 16 * PAGE, RW)?;
    // Read first, so that each holds whatever stands for an empty page.
    guest.is_zero(0, 16)?;
    page_is("second mapping", &second.read_page(0), &[0; WORDS])?;
    page_is("third mapping", &third.read_page(4), &[0; WORDS])?;
    for round in 0..50u64 {
        let page = 4 + (round as usize * 5) % 12;
        let writer = [&guest.map, &second, &third][round as usize % 3];
        let at = if round % 3 == 1 { page - 4 } else { page };
        writer.write_page(at, &content::page(round));
        for (name, seen) in [
            ("first", guest.map.read_page(page)),
            ("second", second.read_page(page - 4)),
            ("third", third.read_page(page)),
        ] {
            page_is(
                format!("round {round}, {name} mapping"),
                &seen,
                &content::page(round),
            )?;
        }
    }
    let turns = Map::anonymous(PAGE)?;
    let mut child = sys::fork(|| {
        let map = Map::shared(&guest.file, 0, 16 * PAGE, RW)?;
        ping_pong(ctx, &turns, &map, 1)
    })?;
    ping_pong(ctx, &turns, &guest.map, 0)?;
    child.expect_ok(ctx.limit(10.0))
}

/// Two processes write pages in turn; each checks what the other wrote.
fn ping_pong(ctx: &Ctx, turns: &Map, map: &Map, who: u64) -> Result<()> {
    for round in 0..200u64 {
        let turn = round * 2 + who;
        ctx.until("the other's turn to end", 10.0, || {
            Ok((
                turns.get(0, 0) == turn,
                format!("turn {} in {turn}", turns.get(0, 0)),
            ))
        })?;
        let page = (turn % 16) as usize;
        if turn > 0 {
            let before = ((turn - 1) % 16) as usize;
            let expected = content::page(7000 + turn - 1);
            page_is("what the other wrote", &map.read_page(before), &expected)?;
        }
        map.write_page(page, &content::page(7000 + turn));
        turns.set(0, 0, turn + 1);
    }
    Ok(())
}

fn syscalls(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 16)?;
    guest.is_zero(0, 16)?;
    for round in 0..100u64 {
        let page = (round * 7 % 16) as usize;
        let at = (page * PAGE) as u64;
        if round % 2 == 0 {
            guest.file.write_all_at(&page_bytes(round), at)?;
            let what = format!("round {round}, written by write(2)");
            page_is(what, &guest.map.read_page(page), &content::page(round))?;
        } else {
            guest.map.write_page(page, &content::page(round));
            let mut seen = vec![0; PAGE];
            guest.file.read_exact_at(&mut seen, at)?;
            bytes_are(format!("round {round}, read(2)"), &seen, &page_bytes(round))?;
        }
    }
    // Across pages, one of them untouched so far.
    let other = mount.guest("db", 4)?;
    other.map.get(1, 0);
    other
        .file
        .write_all_at(&pages_bytes(1, 2), PAGE as u64 / 2)?;
    let mut expected = vec![0; 4 * PAGE];
    expected[PAGE / 2..PAGE / 2 + 2 * PAGE].copy_from_slice(&pages_bytes(1, 2));
    let seen: Vec<u8> = other
        .map
        .bytes()
        .iter()
        .map(|b| b.load(Ordering::SeqCst))
        .collect();
    bytes_are("a write over pages, by the mapping", &seen, &expected)
}

fn read_then_write(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 32)?;
    guest.is_zero(0, 32)?;
    guest.map.set(5, 100, 1);
    let mut expected = [0; WORDS];
    expected[100] = 1;
    page_is("page 5", &guest.map.read_page(5), &expected)?;
    guest.is_zero(0, 5)?;
    guest.is_zero(6, 32)?;
    guest.fill(0, 32, 1);
    guest.holds(0, 32, 1)?;
    // The other way round, by one byte.
    let other = mount.guest("db", 2)?;
    other.map.bytes()[4095].store(9, Ordering::SeqCst);
    eq(
        "the byte",
        other.map.bytes()[4095].load(Ordering::SeqCst),
        9,
    )?;
    other.is_zero(1, 2)
}

fn from_itself(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 16)?;
    guest.fill(0, 4, 1);
    // A page onto itself, onto another, and over a border: where a naive lock would hang.
    let copies = [
        (0, 0, PAGE),
        (0, 8 * PAGE, 4 * PAGE),
        (100, 5 * PAGE, PAGE),
        (6 * PAGE, 9 * PAGE, 10),
    ];
    let mut expected = pages_bytes(1, 4);
    expected.resize(16 * PAGE, 0);
    for (from, to, len) in copies {
        let n = sys::pwrite_from(&guest.file, &guest.map, from, len, to as u64)?;
        eq("bytes written", n, len)?;
        expected.copy_within(from..from + len, to);
        let n = sys::pread_into(&guest.file, &guest.map, from, len, from as u64)?;
        eq("bytes read onto themselves", n, len)?;
        let mut seen = vec![0; 16 * PAGE];
        guest.file.read_exact_at(&mut seen, 0)?;
        bytes_are(
            format!("after {len} bytes from {from} to {to}"),
            &seen,
            &expected,
        )?;
    }
    let Guest { file, map, .. } = mount.guest("db", 2)?;
    // Neither source nor target exist yet.
    eq(
        "bytes",
        sys::pwrite_from(&file, &map, 0, PAGE, PAGE as u64)?,
        PAGE,
    )?;
    page_is("zeroes written", &map.read_page(1), &[0; WORDS])
}

fn fresh_is_zero(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 768;
    const THIRD: usize = PAGES / 3;
    let mount = ctx.mount("m", "size=64M")?;
    for _ in 0..3 {
        // What one leaves behind is what the next is given.
        let goes = mount.guest("goes", PAGES)?;
        goes.fill_noise(0, PAGES);
        std::fs::remove_file(&goes.path)?;
        drop(goes);
        let comes = mount.guest("comes", PAGES)?;
        let third = (THIRD * PAGE) as i64;
        sys::fallocate(&comes.file, 0, 2 * third, third).context("fallocate")?;
        for page in 0..2 * THIRD {
            let word = 7 + page as u64;
            if page < THIRD {
                comes.map.set(page, 3, word);
            } else {
                let at = (page * PAGE + 24) as u64;
                comes.file.write_all_at(&word.to_ne_bytes(), at)?;
            }
            let mut expected = [0; WORDS];
            expected[3] = word;
            let what = format!("page {page} around a word");
            page_is(what, &comes.map.read_page(page), &expected)?;
        }
        comes.is_zero(2 * THIRD, PAGES)?;
        std::fs::remove_file(&comes.path)?;
    }
    Ok(())
}

fn sparse(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=128G")?;
    let file = mount.file("web", "ram", 0)?;
    let len = 64usize << 30;
    file.set_len(len as u64).context("a length of 64 GiB")?;
    let map = Map::shared(&file, 0, len, RW)?;
    let pages: Vec<usize> = (0..64).map(|i| (i << 18) + i * 37 % 512).collect();
    for page in &pages {
        map.write_page(*page, &content::page(*page as u64));
    }
    ctx.expect_used("after 64 writes", &mount, "web", 256)?;
    for page in &pages {
        page_is(
            format!("page {page}"),
            &map.read_page(*page),
            &content::page(*page as u64),
        )?;
        eq("its neighbour", map.get(page + 1, 0), 0)?;
    }
    if ctx.is_thinram() {
        let stat = ctx.sys().vm("web").stat()?;
        stat.check_sum()?;
        eq("size_kb", stat.get("size_kb")?, 64 << 20)?;
        ctx.expect_used("after reading beside them", &mount, "web", 256)?;
    }
    let last = sys::lseek(&file, ((pages[62] + 1) * PAGE) as i64, libc::SEEK_DATA)?;
    that("the next data is found", last as usize <= pages[63] * PAGE)?;
    sys::punch(&file, 0, len as u64).context("a hole of 64 GiB")?;
    ctx.expect_used("after the hole", &mount, "web", 0)
}

fn atomics(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 64)?;
    let rounds = 20_000;
    let work = |map: &Map| {
        for i in 0..rounds {
            map.page(i % 64)[i % WORDS].fetch_add(1, Ordering::Relaxed);
        }
    };
    let mut child = sys::fork(|| {
        let map = Map::shared(&file, 0, 64 * PAGE, RW)?;
        work(&map);
        Ok(())
    })?;
    let map = Map::shared(&file, 0, 64 * PAGE, RW)?;
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| work(&map));
        }
    });
    child.expect_ok(ctx.limit(10.0))?;
    let sum: u64 = map
        .words()
        .iter()
        .map(|word| word.load(Ordering::SeqCst))
        .sum();
    eq("sum of all words", sum, 4 * rounds as u64)
}

fn fault_race(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let pages = 64;
    let guest = mount.guest("web", pages)?;
    let threads = 4;
    let end = std::time::Instant::now() + ctx.span(2.0);
    let mut round = 0;
    while std::time::Instant::now() < end {
        let gate = std::sync::Barrier::new(threads);
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let (gate, map) = (&gate, &guest.map);
                scope.spawn(move || {
                    gate.wait();
                    for page in 0..pages {
                        // Half of the threads read first.
                        if thread % 2 == 0 {
                            std::hint::black_box(map.get(page, 511));
                        }
                        map.page(page)[thread].fetch_add(1 + round, Ordering::Relaxed);
                    }
                });
            }
        });
        for page in 0..pages {
            let mut expected = [0; WORDS];
            expected[..threads].fill(1 + round);
            page_is(
                format!("round {round}, page {page}"),
                &guest.map.read_page(page),
                &expected,
            )?;
        }
        sys::punch(&guest.file, 0, (pages * PAGE) as u64)?;
        round += 1;
    }
    println!("{round} rounds");
    that("there was a round", round > 0)?;
    ctx.expect_used("after the last hole", &mount, "web", 0)
}

/// What every merge relies on: when a page was taken from a process that runs in user mode on
/// another CPU, that process no longer reaches it. User-Mode Linux on two CPUs fails this with
/// tmpfs as well, because it changes a running process's mappings at its next kernel entry only.
fn hole_while_spinning(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 1)?;
    let turns = Map::anonymous(PAGE)?;
    let rounds = 300u64;
    let stop = u64::MAX;
    let mut child = sys::fork(|| {
        let map = Map::shared(&file, 0, PAGE, RW)?;
        let mut stale = 0;
        for round in 1..=rounds {
            map.set(0, 0, round);
            turns.set(0, 0, round);
            // No system call from here until the word was read.
            loop {
                match turns.get(0, 1) {
                    turn if turn == round => break,
                    turn if turn == stop => return Ok(()),
                    _ => std::hint::spin_loop(),
                }
            }
            if map.get(0, 0) != 0 {
                stale += 1;
            }
        }
        eq(
            format!("of {rounds} holes, those that left the old page in reach"),
            stale,
            0,
        )
    })?;
    let punch_all = || -> Result<()> {
        for round in 1..=rounds {
            ctx.until("the child's word", 10.0, || {
                let seen = turns.get(0, 0);
                Ok((seen == round, format!("round {seen} in {round}")))
            })?;
            sys::punch(&file, 0, PAGE as u64)?;
            turns.set(0, 1, round);
        }
        Ok(())
    };
    let punched = punch_all();
    if punched.is_err() {
        turns.set(0, 1, stop);
    }
    child.expect_ok(ctx.limit(10.0)).and(punched)
}
