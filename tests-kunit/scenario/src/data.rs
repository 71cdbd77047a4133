// SPDX-License-Identifier: GPL-2.0

//! Lengths, holes, reads and writes.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::fcntl::{splice, SpliceFFlags};
use nix::sys::signal::Signal;

use crate::check::{self, bytes_are, eq, fails, fails_any, page_is, that};
use crate::content::{self, page_bytes, pages_bytes};
use crate::ctx::{tool, Ctx};
use crate::harness::Case;
use crate::sys::{self, Map, PAGE, R, RW, WORDS};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::both(
        "fs/truncate",
        "ftruncate frees at once, growth reads as zero",
        truncate,
    ),
    Case::both(
        "fs/truncate-mapped",
        "touch beyond the end is SIGBUS, no data returns",
        truncate_mapped,
    ),
    Case::both(
        "fs/prealloc",
        "plain fallocate makes memory resident, once",
        prealloc,
    ),
    Case::both(
        "fs/punch",
        "a hole frees memory at once and reads as zero",
        punch,
    ),
    Case::both(
        "fs/punch-unaligned",
        "unaligned ends are zeroed, neighbours stay",
        punch_unaligned,
    ),
    Case::both(
        "fs/punch-mapped",
        "a hole under mappings of two processes",
        punch_mapped,
    ),
    Case::both(
        "fs/fallocate-bad",
        "modes and ranges that are refused",
        fallocate_bad,
    ),
    Case::both("fs/statfs", "statfs knows size= and what is used", statfs),
    Case::both(
        "fs/seek-holes",
        "SEEK_HOLE and SEEK_DATA find what was written",
        seek_holes,
    ),
    Case::both(
        "fs/read-write",
        "pread and pwrite, aligned or not, over pages",
        read_write,
    ),
    Case::both("fs/append", "O_APPEND writes at the end", append),
    Case::both(
        "fs/sparse-read",
        "holes read as zero and stay holes",
        sparse_read,
    ),
    Case::both(
        "fs/bad-buffers",
        "read and write with bad buffers: EFAULT, no change",
        bad_buffers,
    ),
    Case::both("fs/copy", "copy by read/write and by copy_file_range", copy),
    Case::both("fs/cp-dd", "cp and dd copy a file both ways", cp_dd),
    Case::thinram(
        "fs/beyond-end",
        "what a mapping wrote beyond the end is zero when the file grows",
        beyond_end,
    ),
    Case::both(
        "fs/sendfile-splice",
        "sendfile and splice out, splice in",
        sendfile_splice,
    ),
    Case::both("fs/fsync", "fsync and fdatasync succeed", fsync),
    Case::both("fs/blocks", "st_blocks counts allocated pages", blocks),
    Case::both(
        "fs/full",
        "beyond size=: an errno, and space comes back",
        full,
    ),
    Case::both("fs/overflow", "offsets and lengths that overflow", overflow),
    Case::thinram(
        "fs/largest",
        "a file of 8 TiB is one, of a byte more EFBIG",
        largest,
    ),
];

fn truncate(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 16)?;
    file.write_all_at(&pages_bytes(1, 16), 0)?;
    ctx.expect_used("when full", &mount, "web", 64)?;
    file.set_len(4 * PAGE as u64 + 100)?;
    ctx.expect_used("after the cut", &mount, "web", 20)?;
    eq("size", file.metadata()?.len(), 4 * PAGE as u64 + 100)?;
    let mut tail = vec![0; 200];
    eq(
        "bytes read over the end",
        file.read_at(&mut tail, 4 * PAGE as u64)?,
        100,
    )?;
    bytes_are("last bytes", &tail[..100], &page_bytes(5)[..100])?;
    file.set_len(16 * PAGE as u64)?;
    ctx.expect_used("after growing again", &mount, "web", 20)?;
    let mut seen = vec![0xff; 12 * PAGE];
    file.read_exact_at(&mut seen, 4 * PAGE as u64)?;
    let mut expected = vec![0; 12 * PAGE];
    expected[..100].copy_from_slice(&page_bytes(5)[..100]);
    bytes_are("after growing again", &seen, &expected)?;
    file.set_len(0)?;
    ctx.expect_used("when empty", &mount, "web", 0)?;
    if ctx.is_thinram() {
        let stat = ctx.sys().vm("web").stat()?;
        eq("size_kb", stat.get("size_kb")?, 0)?;
        stat.check_sum()?;
    }
    let ro = File::open(mount.at("web/ram"))?;
    fails(
        "ftruncate of a read-only file",
        sys::ftruncate(&ro, 0),
        Errno::EINVAL,
    )
}

fn truncate_mapped(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 8)?;
    guest.fill(0, 8, 1);
    guest.file.set_len(3 * PAGE as u64 + 800)?;
    guest.holds(0, 3, 1)?;
    // Beyond the end within the last page the kernel shows zeroes.
    let page = guest.map.read_page(3);
    let mut expected = content::page(4);
    expected[100..].fill(0);
    page_is("page with the end in it", &page, &expected)?;
    for (what, write) in [("read", false), ("write", true)] {
        let mut child = sys::fork(|| {
            let map = Map::shared(&guest.file, 0, 8 * PAGE, RW)?;
            if write {
                map.set(4, 0, 1);
            } else {
                map.get(4, 0);
            }
            bail!("a {what} beyond the end went well")
        })?;
        child
            .expect_signal(Signal::SIGBUS, ctx.limit(10.0))
            .context(what)?;
    }
    guest.file.set_len(8 * PAGE as u64)?;
    let mut expected = content::page(4);
    expected[100..].fill(0);
    page_is(
        "cut page after growing again",
        &guest.map.read_page(3),
        &expected,
    )?;
    guest.is_zero(4, 8)?;
    guest.fill(4, 8, 1);
    guest.holds(4, 8, 1)?;
    guest.holds(0, 3, 1)
}

fn prealloc(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 64)?;
    guest.fill(10, 12, 1);
    ctx.expect_used("before", &mount, "web", 8)?;
    sys::fallocate(&guest.file, 0, 0, 32 * PAGE as i64)?;
    ctx.expect_used("after fallocate of 32 pages", &mount, "web", 128)?;
    sys::fallocate(&guest.file, 0, 0, 32 * PAGE as i64)?;
    ctx.expect_used("after the same again", &mount, "web", 128)?;
    guest.is_zero(0, 10)?;
    guest.holds(10, 12, 1)?;
    guest.is_zero(12, 32)?;
    guest.fill(0, 10, 100);
    ctx.expect_used("after writing what was there", &mount, "web", 128)?;
    // Part of a page counts as a page; a range beyond the end makes the file longer.
    sys::fallocate(&guest.file, 0, 100 * PAGE as i64 + 5, 10)?;
    eq("size", guest.file.metadata()?.len(), 100 * PAGE as u64 + 15)?;
    ctx.expect_used("after part of a page", &mount, "web", 132)
}

fn punch(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 16)?;
    file.write_all_at(&pages_bytes(1, 16), 0)?;
    sys::punch(&file, 4 * PAGE as u64, 8 * PAGE as u64)?;
    ctx.expect_used("after the hole", &mount, "web", 32)?;
    eq("size", file.metadata()?.len(), 16 * PAGE as u64)?;
    let mut expected = pages_bytes(1, 16);
    expected[4 * PAGE..12 * PAGE].fill(0);
    let mut seen = vec![0xff; 16 * PAGE];
    file.read_exact_at(&mut seen, 0)?;
    bytes_are("after the hole", &seen, &expected)?;
    sys::punch(&file, 4 * PAGE as u64, 8 * PAGE as u64).context("the same hole again")?;
    sys::punch(&file, 100 * PAGE as u64, PAGE as u64).context("a hole beyond the end")?;
    eq("size", file.metadata()?.len(), 16 * PAGE as u64)?;
    sys::punch(&file, 15 * PAGE as u64, 100 * PAGE as u64).context("a hole over the end")?;
    eq("size", file.metadata()?.len(), 16 * PAGE as u64)?;
    ctx.expect_used("after the hole over the end", &mount, "web", 28)?;
    file.write_all_at(&page_bytes(77), 6 * PAGE as u64)?;
    ctx.expect_used("after a write into the hole", &mount, "web", 32)?;
    file.read_exact_at(&mut seen[..PAGE], 6 * PAGE as u64)?;
    bytes_are("page in the hole", &seen[..PAGE], &page_bytes(77))?;
    sys::punch(&file, 0, 16 * PAGE as u64)?;
    ctx.expect_used("after a hole over everything", &mount, "web", 0)?;
    let ro = File::open(mount.at("web/ram"))?;
    fails(
        "a hole in a read-only file",
        sys::punch(&ro, 0, PAGE as u64),
        Errno::EBADF,
    )
}

fn punch_unaligned(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 8)?;
    let mut expected = pages_bytes(1, 8);
    file.write_all_at(&expected, 0)?;
    let mut seen = vec![0; 8 * PAGE];
    // Over page borders, within a page, up to a border, from a border, one byte.
    let holes = [
        (100, 3 * PAGE),
        (5 * PAGE + 7, 50),
        (6 * PAGE + 1, PAGE - 1),
        (7 * PAGE, 9),
        (4999, 1),
    ];
    let mut kb = 32;
    for (from, len) in holes {
        sys::punch(&file, from as u64, len as u64)?;
        expected[from..from + len].fill(0);
        file.read_exact_at(&mut seen, 0)?;
        bytes_are(
            format!("after a hole of {len} bytes at {from}"),
            &seen,
            &expected,
        )?;
        let whole = (from + len) / PAGE - from.div_ceil(PAGE).min((from + len) / PAGE);
        kb -= 4 * whole as u64;
        ctx.expect_used(
            &format!("after a hole of {len} at {from}"),
            &mount,
            "web",
            kb,
        )?;
    }
    // A hole within a hole makes no page.
    sys::punch(&file, PAGE as u64 + 10, 20)?;
    ctx.expect_used("after a small hole in a hole", &mount, "web", kb)
}

fn punch_mapped(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 16)?;
    guest.fill(0, 16, 1);
    let phase = Map::anonymous(PAGE)?;
    let wait_for = |value: u64| {
        ctx.until("the other process", 10.0, || {
            let seen = phase.get(0, 0);
            Ok((seen >= value, format!("phase {seen}")))
        })
    };
    let mut child = sys::fork(|| {
        let map = Map::shared(&guest.file, 0, 16 * PAGE, RW)?;
        page_is("page 5 in the child", &map.read_page(5), &content::page(6))?;
        phase.set(0, 0, 1);
        wait_for(2)?;
        page_is(
            "page 5 in the child after the hole",
            &map.read_page(5),
            &[0; WORDS],
        )?;
        page_is(
            "page 4 in the child after the hole",
            &map.read_page(4),
            &content::page(5),
        )?;
        map.write_page(5, &content::page(500));
        phase.set(0, 0, 3);
        Ok(())
    })?;
    wait_for(1)?;
    sys::punch(&guest.file, 5 * PAGE as u64, PAGE as u64)?;
    ctx.expect_used("after the hole", &mount, "web", 60)?;
    guest.is_zero(5, 6)?;
    phase.set(0, 0, 2);
    wait_for(3)?;
    child.expect_ok(ctx.limit(10.0))?;
    page_is(
        "what the child wrote",
        &guest.map.read_page(5),
        &content::page(500),
    )?;
    guest
        .map
        .advise(8 * PAGE, 4 * PAGE, libc::MADV_REMOVE)
        .context("MADV_REMOVE")?;
    guest.is_zero(8, 12)?;
    guest.holds(12, 16, 1)?;
    guest.holds(0, 5, 1)
}

fn fallocate_bad(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 8)?;
    guest.fill(0, 8, 1);
    let page = PAGE as i64;
    for (name, mode) in [
        ("PUNCH_HOLE without KEEP_SIZE", libc::FALLOC_FL_PUNCH_HOLE),
        ("COLLAPSE_RANGE", libc::FALLOC_FL_COLLAPSE_RANGE),
        ("INSERT_RANGE", libc::FALLOC_FL_INSERT_RANGE),
        ("ZERO_RANGE", libc::FALLOC_FL_ZERO_RANGE),
        ("UNSHARE_RANGE", libc::FALLOC_FL_UNSHARE_RANGE),
        ("an unknown mode", 0x4000),
    ] {
        fails(
            name,
            sys::fallocate(&guest.file, mode, page, page),
            Errno::EOPNOTSUPP,
        )?;
    }
    fails(
        "length 0",
        sys::fallocate(&guest.file, 0, 0, 0),
        Errno::EINVAL,
    )?;
    fails(
        "negative offset",
        sys::fallocate(&guest.file, 0, -page, page),
        Errno::EINVAL,
    )?;
    fails(
        "negative length",
        sys::fallocate(&guest.file, 0, 0, -1),
        Errno::EINVAL,
    )?;
    let past = sys::fallocate(&guest.file, 0, i64::MAX - page, 2 * page);
    fails("an end that overflows", past, Errno::EFBIG)?;
    eq("size", guest.file.metadata()?.len(), 8 * PAGE as u64)?;
    ctx.expect_used("after the refusals", &mount, "web", 32)?;
    guest.holds(0, 8, 1)?;
    let dir = File::open(mount.at("web"))?;
    fails_any(
        "a directory",
        sys::fallocate(&dir, 0, 0, page),
        &[Errno::EISDIR, Errno::EBADF],
    )
}

fn statfs(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=8M")?;
    let seen = || -> Result<(u64, u64, u64)> {
        let stat = nix::sys::statfs::statfs(&mount.path)?;
        let unit = stat.block_size() as u64;
        Ok((
            stat.blocks() * unit,
            stat.blocks_free() * unit,
            stat.blocks_available() * unit,
        ))
    };
    let (total, free, available) = seen()?;
    eq("size", total, 8 << 20)?;
    eq("free and available", free, available)?;
    eq("free of an empty one", free, 8 << 20)?;
    let file = mount.file("web", "ram", 64)?;
    file.write_all_at(&pages_bytes(1, 64), 0)?;
    eq("size with a file", seen()?.0, 8 << 20)?;
    eq(
        "free with 64 pages",
        seen()?.1,
        (8 << 20) - 64 * PAGE as u64,
    )?;
    sys::punch(&file, 0, 32 * PAGE as u64)?;
    // On ThinRAM a file's length is a promise that a guest can use it all; on tmpfs it is none.
    let left = if ctx.is_thinram() { 64 } else { 32 };
    eq(
        "free after a hole of 32 pages",
        seen()?.1,
        (8 << 20) - left * PAGE as u64,
    )?;
    file.set_len(48 * PAGE as u64)?;
    let left = if ctx.is_thinram() { 48 } else { 16 };
    eq(
        "free after the cut to 48 pages",
        seen()?.1,
        (8 << 20) - left * PAGE as u64,
    )?;
    drop(file);
    fs::remove_file(mount.at("web/ram"))?;
    eq("free after unlink", seen()?.1, 8 << 20)?;
    if ctx.is_thinram() {
        let kind = nix::sys::statfs::statfs(&mount.path)?.filesystem_type().0;
        that(
            "the type is not tmpfs's",
            kind != nix::sys::statfs::TMPFS_MAGIC.0,
        )?;
    }
    Ok(())
}

fn seek_holes(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 64)?;
    let page = PAGE as i64;
    let end = 64 * page;
    fails(
        "data in an empty file",
        sys::lseek(&file, 0, libc::SEEK_DATA),
        Errno::ENXIO,
    )?;
    eq(
        "first hole in an empty file",
        sys::lseek(&file, 0, libc::SEEK_HOLE)?,
        0,
    )?;
    file.write_all_at(&pages_bytes(1, 4), 8 * PAGE as u64)?;
    file.write_all_at(b"x", 40 * PAGE as u64 + 17)?;
    let table = [
        (0, libc::SEEK_DATA, 8 * page),
        (0, libc::SEEK_HOLE, 0),
        (8 * page, libc::SEEK_HOLE, 12 * page),
        (9 * page + 5, libc::SEEK_DATA, 9 * page + 5),
        (9 * page + 5, libc::SEEK_HOLE, 12 * page),
        (12 * page, libc::SEEK_DATA, 40 * page),
        (40 * page + 100, libc::SEEK_HOLE, 41 * page),
        (end - 1, libc::SEEK_HOLE, end - 1),
    ];
    for (from, whence, expected) in table {
        let kind = if whence == libc::SEEK_DATA {
            "data"
        } else {
            "hole"
        };
        eq(
            format!("next {kind} from {from}"),
            sys::lseek(&file, from, whence)?,
            expected,
        )?;
    }
    fails(
        "data after the last",
        sys::lseek(&file, 41 * page, libc::SEEK_DATA),
        Errno::ENXIO,
    )?;
    fails(
        "a hole at the end",
        sys::lseek(&file, end, libc::SEEK_HOLE),
        Errno::ENXIO,
    )?;
    fails(
        "data before the start",
        sys::lseek(&file, -1, libc::SEEK_DATA),
        Errno::ENXIO,
    )?;
    sys::punch(&file, 8 * PAGE as u64, 2 * PAGE as u64)?;
    eq(
        "data after a hole",
        sys::lseek(&file, 0, libc::SEEK_DATA)?,
        10 * page,
    )?;
    eq("SEEK_END", sys::lseek(&file, -5, libc::SEEK_END)?, end - 5)?;
    fails(
        "a negative position",
        sys::lseek(&file, -5, libc::SEEK_SET),
        Errno::EINVAL,
    )
}

fn read_write(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 0)?;
    let mut expected = vec![0u8; 20 * PAGE];
    let mut end = 0;
    let pieces = [
        (0, 1),
        (4095, 2),
        (PAGE, PAGE),
        (3 * PAGE - 1, PAGE + 2),
        (6 * PAGE + 123, 5 * PAGE),
        (17, 12 * PAGE),
        (19 * PAGE, PAGE),
        (0, 0),
    ];
    for (i, (from, len)) in pieces.into_iter().enumerate() {
        let data = &pages_bytes(i as u64 * 100, 12)[..len];
        eq("bytes written", file.write_at(data, from as u64)?, len)?;
        expected[from..from + len].copy_from_slice(data);
        end = end.max(if len == 0 { 0 } else { from + len });
        eq("size", file.metadata()?.len(), end as u64)?;
        let mut seen = vec![0xff; 20 * PAGE];
        eq("bytes read", file.read_at(&mut seen, 0)?, end)?;
        bytes_are(
            format!("after {len} bytes at {from}"),
            &seen[..end],
            &expected[..end],
        )?;
    }
    for (from, len) in [
        (1, 4096),
        (4097, 8191),
        (12 * PAGE - 3, 6),
        (19 * PAGE + 4000, 96),
    ] {
        let mut seen = vec![0; len];
        file.read_exact_at(&mut seen, from as u64)?;
        bytes_are(
            format!("{len} bytes at {from}"),
            &seen,
            &expected[from..from + len],
        )?;
    }
    eq(
        "bytes read at the end",
        file.read_at(&mut [0; 10], 20 * PAGE as u64)?,
        0,
    )?;
    eq("bytes read beyond", file.read_at(&mut [0; 10], 1 << 40)?, 0)?;
    // The file position moves.
    let mut cursor = File::open(mount.at("web/ram"))?;
    cursor.seek(SeekFrom::Start(100))?;
    let mut all = Vec::new();
    cursor.read_to_end(&mut all)?;
    bytes_are("from position 100", &all, &expected[100..])?;
    fails(
        "a write to a read-only file",
        cursor.write(b"x"),
        Errno::EBADF,
    )?;
    let wo = OpenOptions::new().write(true).open(mount.at("web/ram"))?;
    fails(
        "a read of a write-only file",
        wo.read_at(&mut [0], 0),
        Errno::EBADF,
    )
}

fn append(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    mount.file("web", "log", 0)?;
    let path = mount.at("web/log");
    let mut file = OpenOptions::new().append(true).open(&path)?;
    let mut other = OpenOptions::new().append(true).open(&path)?;
    let mut expected = Vec::new();
    for i in 0..200u64 {
        let line = page_bytes(i)[..97].to_vec();
        if i % 2 == 0 { &mut file } else { &mut other }.write_all(&line)?;
        expected.extend_from_slice(&line);
    }
    bytes_are("the whole file", &fs::read(&path)?, &expected)
}

fn sparse_read(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 1024)?;
    file.write_all_at(&page_bytes(1), 500 * PAGE as u64)?;
    let mut seen = vec![0xff; 1024 * PAGE];
    file.read_exact_at(&mut seen, 0)?;
    let mut expected = vec![0; 1024 * PAGE];
    expected[500 * PAGE..501 * PAGE].copy_from_slice(&page_bytes(1));
    bytes_are("a sparse file", &seen, &expected)?;
    ctx.expect_used("after reading all", &mount, "web", 4)?;
    eq(
        "first data",
        sys::lseek(&file, 0, libc::SEEK_DATA)?,
        500 * PAGE as i64,
    )
}

fn bad_buffers(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 4)?;
    file.write_all_at(&pages_bytes(1, 4), 0)?;
    // Two pages, the second out of reach.
    let buffer = Map::anonymous(2 * PAGE)?;
    buffer.write_page(0, &content::page(900));
    buffer.protect(PAGE, PAGE, libc::PROT_NONE)?;
    let into = sys::pread_into(&file, &buffer, PAGE, PAGE, 0);
    fails("read into an unreadable page", into, Errno::EFAULT)?;
    let from = sys::pwrite_from(&file, &buffer, PAGE, PAGE, 0);
    fails("write from an unreadable page", from, Errno::EFAULT)?;
    let mut seen = vec![0; 4 * PAGE];
    file.read_exact_at(&mut seen, 0)?;
    bytes_are("after the refused write", &seen, &pages_bytes(1, 4))?;
    // Half of it can be written: the kernel writes that half, or at least nothing else.
    let half = sys::pwrite_from(&file, &buffer, PAGE - 512, 1024, 0)?;
    check::within("bytes of a half-good write", half, 1, 512)?;
    let mut expected = pages_bytes(1, 4);
    expected[..half].copy_from_slice(&page_bytes(900)[PAGE - 512..PAGE - 512 + half]);
    file.read_exact_at(&mut seen, 0)?;
    bytes_are("after the half-good write", &seen, &expected)?;
    // Beyond the end the file gets as long as what was written.
    let end = 4 * PAGE as u64;
    let beyond = sys::pwrite_from(&file, &buffer, PAGE, PAGE, end);
    fails(
        "write beyond the end from an unreadable page",
        beyond,
        Errno::EFAULT,
    )?;
    eq(
        "length after nothing was written",
        file.metadata()?.len(),
        end,
    )?;
    let half = sys::pwrite_from(&file, &buffer, PAGE - 512, 1024, end)?;
    let length = end + half as u64;
    eq(
        "length after half of it was",
        file.metadata()?.len(),
        length,
    )
}

fn copy(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 100)?;
    file.write_all_at(&pages_bytes(1, 30), 10 * PAGE as u64 + 3)?;
    let expected = fs::read(mount.at("web/ram"))?;
    eq("length by read", expected.len(), 100 * PAGE)?;
    bytes_are(
        "data by read",
        &expected[10 * PAGE + 3..40 * PAGE + 3],
        &pages_bytes(1, 30),
    )?;
    let out = ctx.dir.join("out");
    fs::copy(mount.at("web/ram"), &out).context("copy to another file system")?;
    bytes_are("the copy outside", &fs::read(&out)?, &expected)?;
    fs::copy(&out, mount.at("web/back")).context("copy from another file system")?;
    bytes_are("the copy back", &fs::read(mount.at("web/back"))?, &expected)?;
    fs::copy(mount.at("web/ram"), mount.at("web/beside")).context("copy within")?;
    bytes_are(
        "the copy beside",
        &fs::read(mount.at("web/beside"))?,
        &expected,
    )
}

fn cp_dd(ctx: &Ctx) -> Result<()> {
    let (cp, dd) = (tool("cp")?, tool("dd")?);
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 50)?;
    file.write_all_at(&pages_bytes(1, 20), 7 * PAGE as u64)?;
    let expected = fs::read(mount.at("web/ram"))?;
    let run = |command: &mut Command| -> Result<()> {
        let out = command.output().with_context(|| format!("{command:?}"))?;
        if !out.status.success() {
            bail!(
                "{command:?}: {}: {}",
                out.status,
                String::from_utf8_lossy(&out.stderr)
            );
        }
        Ok(())
    };
    let (a, b) = (ctx.dir.join("a"), ctx.dir.join("b"));
    run(Command::new(&cp).arg(mount.at("web/ram")).arg(&a))?;
    bytes_are("cp out", &fs::read(&a)?, &expected)?;
    run(Command::new(&cp).arg(&a).arg(mount.at("web/in")))?;
    bytes_are("cp in", &fs::read(mount.at("web/in"))?, &expected)?;
    let arg = |name: &str, path: &Path| format!("{name}={}", path.display());
    let mut out = Command::new(&dd);
    run(out
        .arg(arg("if", &mount.at("web/ram")))
        .arg(arg("of", &b))
        .arg("bs=3000"))?;
    bytes_are("dd out", &fs::read(&b)?, &expected)?;
    let mut back = Command::new(&dd);
    run(back
        .arg(arg("if", &b))
        .arg(arg("of", &mount.at("web/dd")))
        .arg("bs=64k"))?;
    bytes_are("dd in", &fs::read(mount.at("web/dd"))?, &expected)
}

fn beyond_end(ctx: &Ctx) -> Result<()> {
    type Grow = fn(&File) -> Result<()>;
    let ways: [(&str, Grow); 3] = [
        ("ftruncate", |file| Ok(file.set_len(2 * PAGE as u64)?)),
        ("write", |file| Ok(file.write_all_at(&[1], PAGE as u64)?)),
        ("fallocate", |file| {
            Ok(sys::fallocate(file, 0, 0, 2 * PAGE as i64)?)
        }),
    ];
    let mount = ctx.mount("m", "size=16M")?;
    for (name, grow) in ways {
        let guest = mount.guest(name, 1)?;
        guest.fill(0, 1, 1);
        guest.file.set_len(800)?;
        guest.map.set(0, 200, 0x5555);
        grow(&guest.file)?;
        let mut expected = page_bytes(1);
        expected[800..].fill(0);
        let mut seen = vec![0xa5; PAGE];
        guest.file.read_exact_at(&mut seen, 0)?;
        bytes_are(format!("grown by {name}"), &seen, &expected)?;
    }
    Ok(())
}

fn sendfile_splice(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 16)?;
    file.write_all_at(&pages_bytes(1, 8), 100)?;
    let expected = fs::read(mount.at("web/ram"))?;
    let out = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(ctx.dir.join("out"))?;
    let (mut from, mut left) = (0i64, expected.len());
    while left > 0 {
        match nix::sys::sendfile::sendfile(&out, &file, Some(&mut from), left)? {
            0 => bail!("sendfile ended {left} bytes early"),
            n => left -= n,
        }
    }
    bytes_are("by sendfile", &fs::read(ctx.dir.join("out"))?, &expected)?;

    let (read_end, write_end) = nix::unistd::pipe()?;
    let mut read_end = File::from(read_end);
    let mut all = Vec::new();
    let mut offset = 0i64;
    while all.len() < expected.len() {
        let n = splice(
            &file,
            Some(&mut offset),
            &write_end,
            None,
            8192,
            SpliceFFlags::empty(),
        )
        .context("splice to a pipe")?;
        that("splice gives data", n > 0)?;
        let mut chunk = vec![0; n];
        read_end.read_exact(&mut chunk)?;
        all.extend_from_slice(&chunk);
    }
    bytes_are("by splice", &all, &expected)?;

    // What lies in a pipe is what was there when it was spliced or newer, never another file's.
    let target = mount.file("web", "in", 4)?;
    let mut write_end = File::from(write_end);
    write_end.write_all(&page_bytes(70))?;
    let mut at = PAGE as i64;
    let mut moved = 0;
    while moved < PAGE {
        let left = PAGE - moved;
        moved += splice(
            read_end.as_fd(),
            None,
            &target,
            Some(&mut at),
            left,
            SpliceFFlags::empty(),
        )
        .context("splice from a pipe")?;
    }
    let mut seen = vec![0; 4 * PAGE];
    target.read_exact_at(&mut seen, 0)?;
    let mut expected = vec![0; 4 * PAGE];
    expected[PAGE..2 * PAGE].copy_from_slice(&page_bytes(70));
    bytes_are("spliced in", &seen, &expected)
}

fn fsync(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 2)?;
    file.write_all_at(&page_bytes(1), 0)?;
    file.sync_all().context("fsync")?;
    file.sync_data().context("fdatasync")?;
    File::open(mount.at("web"))?
        .sync_all()
        .context("fsync of the directory")?;
    let mut seen = vec![0; PAGE];
    file.read_exact_at(&mut seen, 0)?;
    bytes_are("after fsync", &seen, &page_bytes(1))
}

fn blocks(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 64)?;
    let count = || -> Result<u64> { Ok(guest.file.metadata()?.blocks()) };
    eq("blocks of an empty file", count()?, 0)?;
    guest.fill(0, 10, 1);
    eq("blocks after 10 pages", count()?, 80)?;
    guest.file.write_all_at(b"x", 20 * PAGE as u64)?;
    eq("blocks after part of a page", count()?, 88)?;
    sys::punch(&guest.file, 0, 5 * PAGE as u64)?;
    eq("blocks after a hole of 5 pages", count()?, 48)?;
    guest.file.set_len(0)?;
    eq("blocks after the cut", count()?, 0)
}

fn full(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=1M")?;
    if ctx.is_thinram() {
        // A fault must not run out of room, so the promise is made when the length is set.
        let file = mount.file("web", "ram", 128)?;
        fails(
            "a length beyond size=",
            sys::ftruncate(&file, 2 << 20),
            Errno::ENOSPC,
        )?;
        eq("length", file.metadata()?.len(), 128 * PAGE as u64)?;
        let second = mount.file("web", "second", 128)?;
        fails(
            "lengths together beyond size=",
            second.set_len(129 * 4096),
            Errno::ENOSPC,
        )?;
        second.set_len(0)?;
        file.set_len(128 * PAGE as u64)
            .context("a length that still fits")?;
        file.set_len(0)?;
    }
    let file = mount.file("web", "data", 0)?;
    let chunk = pages_bytes(1, 16);
    let mut written = 0;
    let ended = loop {
        match file.write_at(&chunk, written) {
            Ok(0) => bail!("a write returned 0 at {written}"),
            Ok(n) => written += n as u64,
            Err(e) => break check::Code::code(&e),
        }
        that("writes end at size=", written <= 1 << 20)?;
    };
    eq("the end", ended, Errno::ENOSPC)?;
    eq("bytes written until then", written, 1 << 20)?;
    let mut seen = vec![0; written as usize];
    file.read_exact_at(&mut seen, 0)?;
    for (i, part) in seen.chunks(chunk.len()).enumerate() {
        bytes_are(format!("chunk {i}"), part, &chunk[..part.len()])?;
    }
    let more = sys::fallocate(&file, 0, 0, 2 << 20);
    fails_any(
        "fallocate beyond size=",
        more,
        &[Errno::ENOSPC, Errno::EFBIG],
    )?;
    file.set_len(0)?;
    file.write_all_at(&chunk, 0)
        .context("write after making room")
}

fn overflow(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 4)?;
    file.write_all_at(&pages_bytes(1, 4), 0)?;
    fails("ftruncate to -1", sys::ftruncate(&file, -1), Errno::EINVAL)?;
    fails("pwrite at -1", sys::pwrite(&file, b"x", -1), Errno::EINVAL)?;
    if ctx.is_thinram() {
        let last = sys::pwrite(&file, b"xy", i64::MAX - 1);
        fails_any(
            "pwrite over the last offset",
            last,
            &[Errno::EFBIG, Errno::EINVAL],
        )?;
    }
    if ctx.is_thinram() {
        let huge = sys::ftruncate(&file, i64::MAX);
        fails("ftruncate to the largest offset", huge, Errno::EFBIG)?;
    }
    let end = i64::MAX as u64 - PAGE as u64 + 1;
    let hole = sys::punch(&file, end, 2 * PAGE as u64);
    fails("a hole whose end overflows", hole, Errno::EFBIG)?;
    let map = Map::shared(&file, i64::MAX as u64 & !(PAGE as u64 - 1), 2 * PAGE, R);
    fails("a mapping whose end overflows", map, Errno::EOVERFLOW)?;
    eq("size", file.metadata()?.len(), 4 * PAGE as u64)?;
    let mut seen = vec![0; 4 * PAGE];
    file.read_exact_at(&mut seen, 0)?;
    bytes_are("after all that", &seen, &pages_bytes(1, 4))
}

/// The longest that a file may be.
const LARGEST: u64 = 8 << 40;

fn largest(ctx: &Ctx) -> Result<()> {
    for options in ["", "size=16T"] {
        let mount = ctx.mount("m", options)?;
        let file = mount.file("web", "ram", 0)?;
        let end = LARGEST as i64;
        sys::ftruncate(&file, end).context("8 TiB")?;
        eq("size", file.metadata()?.len(), LARGEST)?;
        let page = PAGE as i64;
        for (what, done) in [
            ("ftruncate", sys::ftruncate(&file, end + 1)),
            ("fallocate", sys::fallocate(&file, 0, end, page)),
            (
                "fallocate over the end",
                sys::fallocate(&file, 0, end - page, page + 1),
            ),
            ("pwrite", sys::pwrite(&file, b"x", end).map(drop)),
        ] {
            fails(format!("{what} beyond 8 TiB"), done, Errno::EFBIG)?;
            eq("size", file.metadata()?.len(), LARGEST)?;
        }
        // There is room for a second one, and for no more with the limit.
        let second = mount.file("web", "more", 0)?;
        sys::ftruncate(&second, end).context("8 TiB more")?;
        let third = mount.file("other", "ram", 0)?;
        let done = sys::ftruncate(&third, page);
        match options {
            "" => done.context("a page more")?,
            _ => fails("a page beyond size=", done, Errno::ENOSPC)?,
        }
    }
    let mount = ctx.mount("m", "")?;
    let file = mount.file("web", "ram", 0)?;
    sys::ftruncate(&file, LARGEST as i64)?;
    // What is over the end is cut off, as on other file systems.
    eq(
        "bytes over the end",
        sys::pwrite(&file, b"xy", LARGEST as i64 - 1)?,
        1,
    )?;
    let last = LARGEST - PAGE as u64;
    let map = Map::shared(&file, last, PAGE, RW)?;
    map.write_page(0, &content::page(7));
    let mut seen = vec![0; 2 * PAGE];
    eq("bytes at the end", file.read_at(&mut seen, last)?, PAGE)?;
    bytes_are("the last page", &seen[..PAGE], &page_bytes(7))?;
    let data = sys::lseek(&file, 0, libc::SEEK_DATA)?;
    eq("data after a hole of 8 TiB", data as u64, last)?;
    ctx.expect_used("of one page", &mount, "web", 4)?;
    eq(
        "size_kb",
        ctx.sys().vm("web").get("size_kb")?,
        LARGEST / 1024,
    )?;
    sys::punch(&file, 0, LARGEST)?;
    ctx.expect_used("of a hole of all", &mount, "web", 0)?;
    Ok(())
}
