// SPDX-License-Identifier: GPL-2.0

//! The host around the guests: its figures, reclaim, broken memory.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::sys::signal::Signal;

use crate::check::{bytes_are, eq, fails_any, page_is, skip, that, within, Code};
use crate::content::{self, page_bytes, pages_bytes};
use crate::contention::force;
use crate::ctx::{tool, Ctx};
use crate::harness::Case;
use crate::huge::{self, LARGE, LARGE_KB};
use crate::mapping::Debuggee;
use crate::sharing::{merged_twins, twins, SOON};
use crate::sys::{self, Map, PAGE, RW, WORDS};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::thinram(
        "host/rss",
        "RSS counts each mapped page, shared or not",
        rss,
    ),
    Case::both(
        "host/meminfo",
        "guest memory is in Mapped while mapped, in no line else",
        meminfo,
    ),
    Case::thinram(
        "host/unmovable",
        "drop_caches, compaction and pageout move no guest page",
        unmovable,
    ),
    Case::thinram(
        "host/offline",
        "a memory block under a guest cannot go offline",
        offline,
    ),
    Case::thinram(
        "host/hwpoison",
        "a broken page: SIGBUS, EIO, no merge, until a hole replaces it",
        hwpoison,
    ),
    Case::thinram(
        "host/hwpoison-shared",
        "a broken shared frame breaks for all its sharers",
        hwpoison_shared,
    ),
    Case::thinram(
        "host/hwpoison-large",
        "a broken part of a 2 MiB page; the others are served",
        hwpoison_large,
    ),
    Case::both(
        "mmap/vfio",
        "VFIO cannot have guest memory for a device's DMA: EFAULT",
        vfio,
    ),
    Case::both(
        "mmap/gdb",
        "gdb attaches, reads and writes the mapping",
        gdb,
    ),
];

/// One value in KiB of a file of `Name:  value kB` lines.
fn field_kb(path: &str, name: &str) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    find_kb(&text, name).with_context(|| format!("{path} has no {name}"))
}

fn find_kb(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let rest = line.strip_prefix(name)?.strip_prefix(':')?;
        rest.trim().trim_end_matches(" kB").parse().ok()
    })
}

/// What smaps says of the one mapping at `map`.
fn smaps_kb(map: &Map, name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/self/smaps").context("read /proc/self/smaps")?;
    let start = format!("{:x}-", map.addr());
    let at = text
        .lines()
        .position(|line| line.starts_with(&start))
        .context("smaps does not show the mapping")?;
    let rest: Vec<&str> = text.lines().skip(at + 1).collect();
    find_kb(&rest.join("\n"), name).with_context(|| format!("smaps has no {name}"))
}

fn rss(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 1024;
    const KB: u64 = PAGES as u64 * 4;
    // The kernel sums its counters up in batches, for each CPU.
    const NEARLY: u64 = KB / 4;
    let status = |name: &str| field_kb("/proc/self/status", name);
    let (rss, file) = (status("VmRSS")?, status("RssFile")?);
    let (mount, a, b) = merged_twins(ctx, PAGES)?;
    eq("shared_frames_kb", ctx.sys().get("shared_frames_kb")?, KB)?;
    // The merge unmapped them; each that is touched again counts, though frames are common.
    for guest in [&a, &b] {
        guest.holds(0, PAGES, 1)?;
        eq("Rss of one of them", smaps_kb(&guest.map, "Rss")?, KB)?;
    }
    let grown = status("VmRSS")?.saturating_sub(rss);
    within("growth of VmRSS", grown, 2 * KB - NEARLY, 2 * KB + NEARLY)?;
    let grown = status("RssFile")?.saturating_sub(file);
    within("growth of RssFile", grown, 2 * KB - NEARLY, 2 * KB + NEARLY)?;
    // Zero frames as well.
    let zeroes = mount.guest("z", 256)?;
    zeroes.is_zero(0, 256)?;
    eq(
        "Rss of pages that were only read",
        smaps_kb(&zeroes.map, "Rss")?,
        1024,
    )
}

fn meminfo(ctx: &Ctx) -> Result<()> {
    const MIB: u64 = 48;
    const KB: u64 = MIB << 10;
    /// What else may come and go meanwhile.
    const NOISE: u64 = 12 << 10;
    const LINES: [&str; 13] = [
        "AnonPages",
        "Shmem",
        "Cached",
        "Buffers",
        "Active(file)",
        "Inactive(file)",
        "Active(anon)",
        "Inactive(anon)",
        "Unevictable",
        "Mlocked",
        "Slab",
        "KernelStack",
        "VmallocUsed",
    ];
    let mount = ctx.mount("m", &format!("size={MIB}M"))?;
    let pages = (MIB as usize) << 8;
    let file = mount.file("web", "ram", pages)?;
    let look = || fs::read_to_string("/proc/meminfo").context("read /proc/meminfo");
    let value = |text: &str, name: &str| {
        find_kb(text, name).with_context(|| format!("/proc/meminfo has no {name}"))
    };
    // What earlier cases freed comes in first.
    let mut free_kb = 0;
    ctx.until("MemFree to stand still", 20.0, || {
        thread::sleep(Duration::from_millis(200));
        let now = value(&look()?, "MemFree")?;
        let by = now.abs_diff(std::mem::replace(&mut free_kb, now));
        Ok((by < 512, format!("{by} KiB of change")))
    })?;
    let before = look()?;
    let map = Map::shared(&file, 0, pages * PAGE, RW)?;
    for page in 0..pages {
        map.set(page, 0, 1 + page as u64);
    }
    let mapped = look()?;
    let grown = |name: &str, to: &str| -> Result<i64> {
        Ok(value(to, name)? as i64 - value(&before, name)? as i64)
    };
    that(
        format!("Mapped grew by {MIB} MiB: {} kB", grown("Mapped", &mapped)?),
        grown("Mapped", &mapped)? > (KB - NOISE) as i64,
    )?;
    that(
        format!(
            "MemFree fell by {MIB} MiB, or half of it at least: {} kB",
            grown("MemFree", &mapped)?
        ),
        // What earlier cases freed may still come in.
        grown("MemFree", &mapped)? < -((KB / 2) as i64),
    )?;
    if ctx.is_thinram() {
        for name in LINES {
            let by = grown(name, &mapped)?;
            that(
                format!("{name} did not grow with it: {by} kB"),
                by < NOISE as i64,
            )?;
        }
    }
    drop(map);
    let unmapped = look()?;
    that(
        format!("Mapped fell again: {} kB", grown("Mapped", &unmapped)?),
        grown("Mapped", &unmapped)? < NOISE as i64,
    )?;
    that(
        format!("the file keeps it: {} kB", grown("MemFree", &unmapped)?),
        grown("MemFree", &unmapped)? < -((KB - NOISE) as i64),
    )
}

/// Writes to a file of the kernel.
fn order(path: impl AsRef<Path>, value: &str) -> std::io::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(value.as_bytes())
}

fn unmovable(ctx: &Ctx) -> Result<()> {
    let (mount, a, b) = merged_twins(ctx, 128)?;
    let own = mount.guest("own", 128)?;
    own.fill(0, 128, 1000);
    a.holds(0, 128, 1)?;
    let before = [sys::frames(&own.map)?, sys::frames(&a.map)?];
    own.map
        .advise(0, 128 * PAGE, libc::MADV_PAGEOUT)
        .context("MADV_PAGEOUT")?;
    order("/proc/sys/vm/drop_caches", "3").context("drop_caches")?;
    match order("/proc/sys/vm/compact_memory", "1") {
        Ok(()) => {}
        Err(e) if e.code() == Errno::ENOENT => println!("no compaction in this kernel"),
        Err(e) => return Err(e).context("compact_memory"),
    }
    let after = [sys::frames(&own.map)?, sys::frames(&a.map)?];
    that("no page was unmapped or moved", before == after)?;
    own.holds(0, 128, 1000)?;
    a.holds(0, 128, 1)?;
    b.holds(0, 128, 1)?;
    eq("pages_sharing", ctx.sys().get("pages_sharing")?, 128)
}

fn offline(ctx: &Ctx) -> Result<()> {
    let blocks = Path::new("/sys/devices/system/memory");
    let Ok(size) = fs::read_to_string(blocks.join("block_size_bytes")) else {
        return Err(skip("this kernel has no memory hotplug"));
    };
    let size = u64::from_str_radix(size.trim(), 16)?;
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 64)?;
    // The first block has holes, which is another reason to refuse it.
    let nodes = sys::numa::several_nodes()?;
    let last = nodes.last().copied().unwrap_or(0);
    sys::numa::bind(&guest.map, last, sys::numa::STRICT | sys::numa::MOVE)?;
    guest.fill(0, 64, 1);
    let frame = sys::frames(&guest.map)?[0].context("page 0 is not mapped")?;
    let block = blocks.join(format!("memory{}", frame * PAGE as u64 / size));
    let state = block.join("state");
    let refused = order(&state, "offline");
    fails_any(
        format!("{} offline", block.display()),
        refused,
        &[Errno::EBUSY, Errno::EAGAIN],
    )?;
    eq(
        "its state",
        fs::read_to_string(&state)?.trim_end(),
        "online",
    )?;
    eq("frame of page 0", sys::frames(&guest.map)?[0], Some(frame))?;
    guest.holds(0, 64, 1)
}

/// Marks the frame behind a page as broken, as memory_failure() does when the machine reports it.
fn break_frame(map: &Map, page: usize) -> Result<()> {
    let switch = Path::new("/sys/devices/system/memory/hard_offline_page");
    if !switch.exists() {
        return Err(skip("this kernel has no memory_failure()"));
    }
    let frame = sys::frames(map)?[page].context("the page is not mapped")?;
    // It says that it cannot handle such a page, and has marked it by then.
    match order(switch, &format!("{:#x}", frame * PAGE as u64)) {
        Err(e) if [Errno::EBUSY, Errno::EIO, Errno::ENOTRECOVERABLE].contains(&e.code()) => Ok(()),
        Ok(()) => bail!("memory_failure() claims to have recovered frame {frame:#x}"),
        Err(e) => Err(e).context("hard_offline_page"),
    }
}

/// A process that touches `page` of the guest anew is killed by SIGBUS.
/// A touch of the page kills by SIGBUS.
pub fn touch_kills(ctx: &Ctx, guest: &crate::ctx::Guest, page: usize, write: bool) -> Result<()> {
    let mut child = sys::fork(|| {
        let map = Map::shared(&guest.file, 0, guest.map.pages() * PAGE, RW)?;
        if write {
            map.set(page, 0, 1);
        } else {
            std::hint::black_box(map.get(page, 0));
        }
        bail!("a touch of broken memory went through")
    })?;
    child.expect_signal(Signal::SIGBUS, ctx.limit(10.0))
}

fn hwpoison(ctx: &Ctx) -> Result<()> {
    let (mount, a, b) = twins(ctx, 8)?;
    break_frame(&a.map, 3)?;
    for write in [false, true] {
        touch_kills(ctx, &a, 3, write)?;
    }
    let mut seen = vec![0; PAGE];
    let at = 3 * PAGE as u64;
    let eio = [Errno::EIO];
    fails_any("read(2)", a.file.read_exact_at(&mut seen, at), &eio)?;
    fails_any("write(2)", a.file.write_all_at(&seen, at), &eio)?;
    // The other seven merge, that one never does.
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.until_is("pages_sharing", 7, SOON)?;
    ctx.passes(3)?;
    sys.set("run", 0)?;
    eq("pages_sharing", sys.get("pages_sharing")?, 7)?;
    b.holds(0, 8, 1)?;
    a.holds(0, 3, 1)?;
    a.holds(4, 8, 1)?;
    // A hole puts the frame out of use, and what comes then is fresh.
    sys::punch(&a.file, at, PAGE as u64)?;
    page_is("the page after a hole", &a.map.read_page(3), &[0; WORDS])?;
    a.file.write_all_at(&page_bytes(4), at)?;
    a.holds(0, 8, 1)?;
    sys.set("run", 1)?;
    ctx.until_is("pages_sharing", 8, SOON)?;
    ctx.expect_used("at the end", &mount, "a", 0)
}

fn hwpoison_large(ctx: &Ctx) -> Result<()> {
    huge::always(ctx)?;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", 2 * LARGE)?;
    guest.fill(0, 2 * LARGE, 1);
    // What would be split for its zeroes.
    for page in 10..20 {
        guest.map.write_page(page, &[0; WORDS]);
    }
    break_frame(&guest.map, 3)?;
    for write in [false, true] {
        touch_kills(ctx, &guest, 3, write)?;
    }
    let mut seen = vec![0; PAGE];
    let read = guest.file.read_exact_at(&mut seen, 3 * PAGE as u64);
    fails_any("read(2)", read, &[Errno::EIO])?;
    // Its neighbours are served, page by page.
    let second = Map::shared(&guest.file, 0, 2 * LARGE * PAGE, RW)?;
    for page in [2, 4, LARGE - 1, LARGE] {
        let expected = content::page(1 + page as u64);
        page_is("a neighbour", &second.read_page(page), &expected)?;
    }
    second.set(2, 5, 7);
    eq("a write beside it", guest.map.get(2, 5), 7)?;
    // It is never split: a copy would not know what was there.
    let refused = sys.get("splits_refused_poisoned")?;
    sys.flat_out()?;
    ctx.passes(2)?;
    force(ctx, "clear")?;
    ctx.until_least("splits_refused_poisoned", refused + 1, SOON)?;
    huge::huge_is(ctx, "with a broken page", "web", 2 * LARGE_KB)?;
    guest.holds(20, 2 * LARGE, 1)?;
    force(ctx, "high")?;
    // A hole of the whole puts it out of use.
    sys::punch(&guest.file, 0, (LARGE * PAGE) as u64)?;
    guest.fill(0, LARGE, 5000);
    guest.holds(0, LARGE, 5000)?;
    guest.holds(LARGE, 2 * LARGE, 1)
}

fn hwpoison_shared(ctx: &Ctx) -> Result<()> {
    let (mount, a, b) = merged_twins(ctx, 4)?;
    a.holds(0, 4, 1)?;
    break_frame(&a.map, 1)?;
    for guest in [&a, &b] {
        for write in [false, true] {
            touch_kills(ctx, guest, 1, write)?;
        }
        let mut seen = vec![0; PAGE];
        let read = guest.file.read_exact_at(&mut seen, PAGE as u64);
        fails_any("read(2)", read, &[Errno::EIO])?;
    }
    // A third of that content shares the good frames, never the broken one.
    let third = mount.guest("c", 4)?;
    third.fill(0, 4, 1);
    let sys = ctx.sys();
    sys.set("run", 1)?;
    ctx.until_is("pages_sharing", 7, SOON)?;
    ctx.passes(3)?;
    third.holds(0, 4, 1)?;
    // Shares that end without a write must not make it look whole.
    sys.set("run", 2)?;
    for guest in [&a, &b] {
        touch_kills(ctx, guest, 1, false)?;
        sys::punch(&guest.file, PAGE as u64, PAGE as u64)?;
        guest.is_zero(1, 2)?;
        guest.holds(2, 4, 1)?;
    }
    third.holds(0, 4, 1)
}

fn vfio(ctx: &Ctx) -> Result<()> {
    let container = sys::vfio::Container::new()?;
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 4)?;
    guest.fill(0, 4, 1);
    let done = container.map(&guest.map);
    if ctx.is_thinram() {
        fails_any("guest memory", done, &[Errno::EFAULT])?;
        // The refusal is of this memory, not of the container.
        let anonymous = Map::anonymous(4 * PAGE)?;
        container.map(&anonymous).context("anonymous memory")?;
    } else {
        done.context("a file of tmpfs")?;
    }
    guest.holds(0, 4, 1)
}

fn gdb(ctx: &Ctx) -> Result<()> {
    let gdb = tool("gdb")?;
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 4)?;
    file.write_all_at(&pages_bytes(1, 2), 0)?;
    let debuggee = Debuggee::start(ctx, &file, RW, |map| {
        eq("the word that gdb set", map.get(2, 5), 0x1234_5678)
    })?;
    let addr = debuggee.addr as u64;
    let untouched = addr + 3 * PAGE as u64;
    let written = addr + 2 * PAGE as u64 + 40;
    let copy = ctx.dir.join("gdb-copy");
    let out = Command::new(gdb)
        .args(["-nx", "-batch", "-p", &debuggee.child.pid().to_string()])
        .args(["-ex", &format!("output *(unsigned long *){addr:#x}")])
        .args([
            "-ex",
            &format!("set *(unsigned long *){written:#x} = 0x12345678"),
        ])
        .args(["-ex", &format!("output *(unsigned long *){untouched:#x}")])
        .args([
            "-ex",
            &format!(
                "dump binary memory {} {addr:#x} {:#x}",
                copy.display(),
                addr + PAGE as u64
            ),
        ])
        .args(["-ex", "detach"])
        .env("DEBUGINFOD_URLS", "")
        .output()
        .context("run gdb")?;
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    let errors = String::from_utf8_lossy(&out.stderr);
    that(
        format!("gdb printed the first word and 0: {said} {errors}"),
        said.contains(&content::word(1, 0).to_string()) && out.status.success(),
    )?;
    let dumped = fs::read(&copy).with_context(|| format!("gdb's dump: {said} {errors}"))?;
    bytes_are("the page that gdb dumped", &dumped, &page_bytes(1))?;
    debuggee.end(ctx)?;
    let mut seen = [0; 8];
    file.read_exact_at(&mut seen, 2 * PAGE as u64 + 40)?;
    eq(
        "the word in the file",
        u64::from_ne_bytes(seen),
        0x1234_5678,
    )
}
