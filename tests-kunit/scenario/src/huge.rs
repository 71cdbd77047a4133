// SPDX-License-Identifier: GPL-2.0

//! Pages of 2 MiB: when there are some, and that nobody sees a difference.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{bail, ensure, Context, Result};
use nix::errno::Errno;
use nix::sys::signal::Signal;

use crate::check::{bytes_are, eq, fails_any, page_is, skip, that, within};
use crate::content::{self, pages_bytes};
use crate::contention::force;
use crate::ctx::{Ctx, Guest, Held, Mount};
use crate::harness::Case;
use crate::sys::{self, Map, PAGE, R, RW, WORDS};

/// Pages of a large one.
pub const LARGE: usize = 512;
/// KiB of a large page.
pub const LARGE_KB: u64 = 2048;

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::thinram("huge/touch", "one write maps 2 MiB, in one fault", touch),
    Case::thinram(
        "huge/contention",
        "no new ones while memory is short; old ones serve",
        contention,
    ),
    Case::thinram("huge/read", "a read takes no memory, a write does", read),
    Case::thinram(
        "huge/knobs",
        "large_pages of host, mount and VM; bad words",
        knobs,
    ),
    Case::thinram(
        "huge/odd-sizes",
        "odd lengths and offsets: 4 KiB where 2 MiB do not fit",
        odd_sizes,
    ),
    Case::thinram(
        "huge/used-before",
        "a region with a 4 KiB page stays of 4 KiB",
        used_before,
    ),
    Case::thinram(
        "huge/two-mappings",
        "one mapping by 2 MiB, one by 4 KiB: one memory",
        two_mappings,
    ),
    Case::thinram(
        "huge/parts",
        "mprotect, munmap, mremap of a part; RSS exact",
        parts,
    ),
    Case::thinram(
        "huge/holes",
        "4 KiB holes read as zeroes, a whole one frees",
        holes,
    ),
    Case::thinram(
        "huge/truncate",
        "the end cut through the middle, and grown",
        truncate,
    ),
    Case::thinram("huge/syscalls", "read(2) and write(2)", syscalls),
    Case::thinram("huge/prealloc", "fallocate makes 2 MiB pages", prealloc),
    Case::thinram(
        "huge/held",
        "a pipe holds a part, whose page is freed later",
        held,
    ),
    Case::thinram(
        "huge/idle",
        "on a host with memory nothing is split in 20 passes",
        idle,
    ),
    Case::thinram(
        "huge/write-noticed",
        "unchanged ones are hashed once; a write by either size is seen",
        write_noticed,
    ),
    Case::thinram(
        "huge/late-pin",
        "a folio with a pin from before is hashed in each pass",
        late_pin,
    ),
    Case::thinram(
        "huge/split",
        "contention: duplicates come back, the rest stays large",
        split,
    ),
    Case::thinram(
        "huge/split-zeroes",
        "contention: zeroes come back",
        split_zeroes,
    ),
    Case::thinram(
        "huge/split-pinned",
        "a folio that somebody holds is split later",
        split_pinned,
    ),
    Case::thinram(
        "huge/split-holes",
        "half of it holes: split on a host with memory",
        split_holes,
    ),
    Case::thinram(
        "huge/reported",
        "2 MiB given back one by one, as free page reporting does: the rest stays large",
        reported,
    ),
    Case::thinram(
        "huge/split-alone",
        "share 0: no duplicates counted, none split",
        split_alone,
    ),
    Case::thinram(
        "huge/limit",
        "a VM over its limit is split and compressed",
        limit,
    ),
    Case::thinram(
        "huge/again",
        "4 KiB become 2 MiB again after MADV_DONTNEED and a hole",
        again,
    ),
    Case::thinram(
        "huge/split-held",
        "who holds a part sees what is written to it, split or not",
        split_held,
    ),
    Case::thinram(
        "huge/fragmented",
        "free memory in pieces smaller than 2 MiB: 4 KiB, and 2 MiB afterwards",
        fragmented,
    ),
    Case::thinram(
        "huge/races",
        "faults of both sizes, holes and parts at once",
        races,
    )
    .span(6.0),
];

/// Sets `large_pages`, or skips where the kernel has no 2 MiB pages of files.
pub fn always(ctx: &Ctx) -> Result<()> {
    let enabled = Path::new("/sys/kernel/mm/transparent_hugepage/enabled");
    match fs::read_to_string(enabled) {
        Ok(modes) if modes.contains("[always]") => {}
        Ok(modes) => bail!("expected [always] in {}, seen {modes}", enabled.display()),
        Err(_) => return Err(skip("this kernel has no transparent huge pages")),
    }
    force(ctx, "high")?;
    ctx.sys().set("large_pages", "always")
}

/// KiB that this process has mapped of `map` by 2 MiB entries.
pub fn mapped_large(map: &Map) -> Result<u64> {
    field("/proc/self/smaps", map, "FilePmdMapped:")
}

/// KiB of `map` that count as resident.
pub fn rss(map: &Map) -> Result<u64> {
    field("/proc/self/smaps", map, "Rss:")
}

/// Sums a field over the parts of the mapping that are still there.
fn field(path: &str, map: &Map, name: &str) -> Result<u64> {
    let text = fs::read_to_string(path)?;
    let end = map.addr() + map.pages() * PAGE;
    let (mut inside, mut sum) = (false, 0);
    for line in text.lines() {
        let first = line.split(' ').next().unwrap_or("");
        if let Some((from, to)) = first.split_once('-') {
            let from = usize::from_str_radix(from, 16)?;
            let to = usize::from_str_radix(to, 16)?;
            inside = from < end && to > map.addr();
        } else if inside && first == name {
            let value = line[name.len()..].trim().trim_end_matches(" kB");
            sum += value.parse::<u64>().with_context(|| line.to_owned())?;
        }
    }
    Ok(sum)
}

/// `huge_kb` is `kb`, and all states add up.
pub fn huge_is(ctx: &Ctx, what: &str, vm: &str, kb: u64) -> Result<()> {
    let stat = ctx.sys().vm(vm).stat()?;
    stat.check_sum()?;
    eq(format!("huge_kb {what}"), stat.get("huge_kb")?, kb)
}

/// A VM of `pages` pages on a mount of its own, with large pages on.
fn guest(ctx: &Ctx, pages: usize) -> Result<(Mount<'_>, Guest)> {
    always(ctx)?;
    let mount = ctx.mount("m", "size=512M,domain=lab")?;
    let guest = mount.guest("web", pages)?;
    Ok((mount, guest))
}

fn touch(ctx: &Ctx) -> Result<()> {
    let (mount, guest) = guest(ctx, 4 * LARGE)?;
    eq(
        "alignment of the mapping",
        guest.map.addr() % (LARGE * PAGE),
        0,
    )?;
    let vm = guest.sysfs(ctx);
    let faults = vm.get("faults")?;
    guest.map.set(LARGE + 7, 3, 99);
    huge_is(ctx, "after one write", "web", LARGE_KB)?;
    eq("faults of one write", vm.get("faults")? - faults, 1)?;
    eq("KiB mapped large", mapped_large(&guest.map)?, LARGE_KB)?;
    eq("Rss", rss(&guest.map)?, LARGE_KB)?;
    ctx.expect_used("after one write", &mount, "web", LARGE_KB)?;
    guest.is_zero(LARGE, LARGE + 7)?;
    guest.is_zero(LARGE + 8, 2 * LARGE)?;
    eq("the word", guest.map.get(LARGE + 7, 3), 99)?;
    guest.fill(0, 4 * LARGE, 1);
    guest.holds(0, 4 * LARGE, 1)?;
    eq("faults of 8 MiB", vm.get("faults")? - faults, 4)?;
    huge_is(ctx, "of all", "web", 4 * LARGE_KB)?;
    eq("st_blocks", blocks(&guest)?, 4 * LARGE_KB * 2)?;
    // Another process maps them large as well, and its end takes nothing along.
    sys::fork(|| {
        let file = fs::File::options()
            .read(true)
            .write(true)
            .open(&guest.path)?;
        let map = Map::shared(&file, 0, 4 * LARGE * PAGE, RW)?;
        page_is(
            "a page by another process",
            &map.read_page(5),
            &content::page(6),
        )?;
        map.set(6, 0, 1);
        eq("KiB mapped large by it", mapped_large(&map)?, LARGE_KB)
    })?
    .expect_ok(ctx.limit(10.0))?;
    eq("its write", guest.map.get(6, 0), 1)?;
    drop(guest.map);
    huge_is(ctx, "without a mapping", "web", 4 * LARGE_KB)?;
    guest.file.set_len(0)?;
    huge_is(ctx, "of an empty file", "web", 0)?;
    ctx.expect_used("of an empty file", &mount, "web", 0)
}

fn contention(ctx: &Ctx) -> Result<()> {
    let (mount, guest) = guest(ctx, 3 * LARGE)?;
    guest.map.set(0, 0, 1);
    for state in ["clear", "soft", "hard", "low"] {
        force(ctx, state)?;
        guest.map.set(LARGE, 0, 2);
        sys::fallocate(
            &guest.file,
            0,
            (2 * LARGE * PAGE) as i64,
            (LARGE * PAGE) as i64,
        )?;
        huge_is(ctx, state, "web", LARGE_KB)?;
        sys::punch(
            &guest.file,
            (LARGE * PAGE) as u64,
            (2 * LARGE * PAGE) as u64,
        )?;
    }
    let second = Map::shared(&guest.file, 0, 3 * LARGE * PAGE, RW)?;
    eq("the old one by a new mapping", second.get(0, 0), 1)?;
    eq("KiB mapped large", mapped_large(&second)?, LARGE_KB)?;
    force(ctx, "high")?;
    second.set(LARGE, 0, 3);
    huge_is(ctx, "high again", "web", 2 * LARGE_KB)?;
    ctx.expect_used("high again", &mount, "web", 2 * LARGE_KB)
}

fn blocks(guest: &Guest) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(guest.file.metadata()?.blocks())
}

fn read(ctx: &Ctx) -> Result<()> {
    let (mount, guest) = guest(ctx, 2 * LARGE)?;
    guest.is_zero(0, 2 * LARGE)?;
    huge_is(ctx, "after reads", "web", 0)?;
    ctx.expect_used("after reads", &mount, "web", 0)?;
    eq("KiB mapped large", mapped_large(&guest.map)?, 2 * LARGE_KB)?;
    eq("st_blocks", blocks(&guest)?, 0)?;
    let second = Map::shared(&guest.file, 0, 2 * LARGE * PAGE, R)?;
    eq("by a second mapping", second.get(9, 0), 0)?;
    guest.map.set(9, 0, 5);
    eq("the write by the second mapping", second.get(9, 0), 5)?;
    huge_is(ctx, "after a write", "web", LARGE_KB)?;
    guest.is_zero(10, 2 * LARGE)?;
    // A page of 4 KiB under the zeroes of 2 MiB.
    ctx.sys().set("large_pages", "never")?;
    guest.map.set(LARGE + 1, 0, 6);
    eq(
        "the write by the second mapping",
        second.get(LARGE + 1, 0),
        6,
    )?;
    huge_is(ctx, "after never", "web", LARGE_KB)?;
    ctx.expect_used("after never", &mount, "web", LARGE_KB + 4)?;
    guest.is_zero(LARGE + 2, 2 * LARGE)?;
    page_is("before it", &second.read_page(LARGE), &[0; WORDS])
}

fn knobs(ctx: &Ctx) -> Result<()> {
    always(ctx)?;
    let sys = ctx.sys();
    eq("large_pages", sys.word("large_pages")?, "always".into())?;
    for bad in [
        "\n",
        "1",
        "Always",
        "always never",
        "[always] never",
        "madvise",
    ] {
        let set = sys.try_set("large_pages", bad.as_bytes());
        fails_any(format!("large_pages {bad:?}"), set, &[Errno::EINVAL])?;
    }
    eq("large_pages", sys.word("large_pages")?, "always".into())?;
    let mount = ctx.mount("m", "size=64M")?;
    let small = ctx.mount("n", "size=64M,large_pages=never")?;
    let table = fs::read_to_string("/proc/self/mounts")?;
    that(
        "/proc/self/mounts has large_pages=never",
        table.contains("large_pages=never"),
    )?;
    for bad in ["large_pages=", "large_pages=1", "large_pages"] {
        let refused = ctx.try_mount("o", bad)?.map(drop);
        fails_any(bad, refused, &[Errno::EINVAL])?;
    }
    let (a, b) = (mount.guest("a", 4 * LARGE)?, small.guest("b", 4 * LARGE)?);
    let (vm_a, vm_b) = (a.sysfs(ctx), b.sysfs(ctx));
    eq("large_pages of a", vm_a.word("large_pages")?, String::new())?;
    eq(
        "large_pages of b",
        vm_b.word("large_pages")?,
        "never".into(),
    )?;
    a.map.set(0, 0, 1);
    b.map.set(0, 0, 1);
    huge_is(ctx, "of a", "a", LARGE_KB)?;
    huge_is(ctx, "of b", "b", 0)?;
    vm_a.set("large_pages", "never")?;
    vm_b.set("large_pages", "always")?;
    fails_any(
        "large_pages 7 of a VM",
        vm_a.try_set("large_pages", b"7"),
        &[Errno::EINVAL],
    )?;
    eq(
        "large_pages of a",
        vm_a.word("large_pages")?,
        "never".into(),
    )?;
    a.map.set(LARGE, 0, 1);
    b.map.set(LARGE, 0, 1);
    huge_is(ctx, "of a after never", "a", LARGE_KB)?;
    huge_is(ctx, "of b after always", "b", LARGE_KB)?;
    sys.set("large_pages", "never")?;
    vm_a.try_set("large_pages", b"\n")?;
    vm_b.try_set("large_pages", b"\n")?;
    a.map.set(2 * LARGE, 0, 1);
    huge_is(ctx, "of a as the host", "a", LARGE_KB)?;
    sys.set("large_pages", "always")?;
    a.map.set(3 * LARGE, 0, 1);
    b.map.set(2 * LARGE, 0, 1);
    huge_is(ctx, "of a as the host", "a", 2 * LARGE_KB)?;
    huge_is(ctx, "of b as the host", "b", 2 * LARGE_KB)
}

fn odd_sizes(ctx: &Ctx) -> Result<()> {
    let (mount, guest) = guest(ctx, 2 * LARGE)?;
    guest.file.set_len(((LARGE + 300) * PAGE + 17) as u64)?;
    guest.fill(0, LARGE + 301, 1);
    huge_is(ctx, "of 3.2 MiB", "web", LARGE_KB)?;
    ctx.expect_used("of 3.2 MiB", &mount, "web", LARGE_KB + 301 * 4)?;
    guest.holds(0, LARGE + 301, 1)?;
    // A mapping whose addresses do not lie as the file does.
    let (name, pages) = ("odd", 3 * LARGE);
    let file = mount.file(name, "ram", pages)?;
    let mut map = Map::anonymous((pages + 1) * PAGE)?;
    let shift = if map.addr() % (LARGE * PAGE) == 0 {
        PAGE
    } else {
        0
    };
    map.replace(shift, pages * PAGE, Some((&file, 0, RW)))?;
    for page in 0..pages {
        map.write_page(page + shift / PAGE, &content::page(page as u64));
    }
    if (map.addr() + shift) % (LARGE * PAGE) != 0 {
        huge_is(ctx, "of a mapping that lies across", name, 0)?;
    }
    // A mapping of the second half of one region and the first of the next.
    let file = mount.file("middle", "ram", pages)?;
    let part = Map::shared(&file, (LARGE / 2 * PAGE) as u64, LARGE * PAGE, RW)?;
    for page in 0..LARGE {
        part.write_page(page, &content::page(page as u64));
    }
    huge_is(ctx, "of two halves", "middle", 0)?;
    for page in 0..LARGE {
        page_is(
            "two halves",
            &part.read_page(page),
            &content::page(page as u64),
        )?;
    }
    ctx.expect_used("of two halves", &mount, "middle", LARGE_KB)
}

fn used_before(ctx: &Ctx) -> Result<()> {
    always(ctx)?;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M")?;
    let guest = mount.guest("web", 2 * LARGE)?;
    sys.set("large_pages", "never")?;
    guest.map.set(5, 0, 1);
    sys.set("large_pages", "always")?;
    let second = Map::shared(&guest.file, 0, 2 * LARGE * PAGE, RW)?;
    second.set(6, 0, 2);
    second.set(LARGE, 0, 3);
    huge_is(ctx, "with one region used before", "web", LARGE_KB)?;
    ctx.expect_used("two pages and a large one", &mount, "web", LARGE_KB + 8)?;
    eq("page 5", second.get(5, 0), 1)?;
    eq("page 6", guest.map.get(6, 0), 2)?;
    eq("page 512", guest.map.get(LARGE, 0), 3)?;
    // Empty again, it may be large the next time.
    sys::punch(&guest.file, 0, (LARGE * PAGE) as u64)?;
    let third = Map::shared(&guest.file, 0, 2 * LARGE * PAGE, RW)?;
    third.set(1, 0, 4);
    huge_is(ctx, "of a region emptied by a hole", "web", 2 * LARGE_KB)?;
    eq("page 1", guest.map.get(1, 0), 4)?;
    guest.is_zero(5, 7)
}

/// A mapping of all of `file` at addresses that do not lie as the file does.
pub fn across(file: &fs::File, pages: usize) -> Result<Map> {
    let mut map = Map::anonymous((pages + LARGE) * PAGE)?;
    let start = map.addr().next_multiple_of(LARGE * PAGE) - map.addr() + PAGE;
    ensure!(start + pages * PAGE <= map.pages() * PAGE);
    map.replace(start, pages * PAGE, Some((file, 0, RW)))?;
    // What is before and after stays anonymous; pages are counted from the file's start.
    map.keep(start, pages * PAGE)?;
    Ok(map)
}

fn two_mappings(ctx: &Ctx) -> Result<()> {
    let (mount, guest) = guest(ctx, 2 * LARGE)?;
    let small = across(&guest.file, 2 * LARGE)?;
    eq("a read by 4 KiB", small.get(3, 0), 0)?;
    guest.fill(0, LARGE, 1);
    for page in 0..LARGE {
        page_is(
            "by 4 KiB",
            &small.read_page(page),
            &content::page(1 + page as u64),
        )?;
    }
    huge_is(ctx, "with both", "web", LARGE_KB)?;
    eq(
        "KiB mapped large by one",
        mapped_large(&guest.map)?,
        LARGE_KB,
    )?;
    eq("KiB mapped large by the other", mapped_large(&small)?, 0)?;
    eq("Rss of one", rss(&guest.map)?, LARGE_KB)?;
    eq("Rss of the other", rss(&small)?, LARGE_KB)?;
    small.set(100, 9, 77);
    eq("a write by 4 KiB", guest.map.get(100, 9), 77)?;
    guest.map.set(101, 9, 78);
    eq("a write by 2 MiB", small.get(101, 9), 78)?;
    sys::punch(&guest.file, 100 * PAGE as u64, PAGE as u64)?;
    eq("a hole by 2 MiB", guest.map.get(100, 9), 0)?;
    eq("a hole by 4 KiB", small.get(100, 9), 0)?;
    small.set(100, 9, 79);
    eq("a write into the hole", guest.map.get(100, 9), 79)?;
    // The other way round: 4 KiB first.
    small.set(LARGE + 4, 0, 1);
    guest.map.set(LARGE + 5, 0, 2);
    eq("4 KiB first", guest.map.get(LARGE + 4, 0), 1)?;
    huge_is(ctx, "4 KiB first", "web", LARGE_KB)?;
    drop(small);
    drop(guest.map);
    guest.file.set_len(0)?;
    ctx.expect_used("of an empty file", &mount, "web", 0)
}

fn parts(ctx: &Ctx) -> Result<()> {
    let (mount, mut guest) = guest(ctx, 4 * LARGE)?;
    guest.fill(0, 4 * LARGE, 1);
    eq("KiB mapped large", mapped_large(&guest.map)?, 4 * LARGE_KB)?;
    // A part read-only, then back.
    guest.map.protect(100 * PAGE, 50 * PAGE, R)?;
    guest.holds(0, LARGE, 1)?;
    sys::fork(|| {
        let map = Map::shared(&guest.file, 0, LARGE * PAGE, RW)?;
        map.protect(100 * PAGE, 50 * PAGE, R)?;
        map.set(99, 0, map.get(99, 0));
        map.set(120, 0, 1);
        Ok(())
    })?
    .expect_signal(Signal::SIGSEGV, ctx.limit(10.0))?;
    eq(
        "mapped large, without the one",
        mapped_large(&guest.map)?,
        3 * LARGE_KB,
    )?;
    guest.map.protect(100 * PAGE, 50 * PAGE, RW)?;
    guest.fill(90, 160, 9000);
    guest.holds(90, 160, 9000)?;
    guest.fill(90, 160, 1);
    eq("Rss with all touched", rss(&guest.map)?, 4 * LARGE_KB)?;
    // The whole read-only and back: by 2 MiB, or by 4 KiB, but right.
    guest.map.protect(LARGE * PAGE, LARGE * PAGE, R)?;
    guest.holds(LARGE, 2 * LARGE, 1)?;
    guest.map.protect(LARGE * PAGE, LARGE * PAGE, RW)?;
    guest.fill(LARGE, 2 * LARGE, 1);
    // A part unmapped, and mapped again.
    let at = (2 * LARGE + 10) * PAGE;
    guest.map.replace(at, 20 * PAGE, None)?;
    guest.holds(2 * LARGE, 2 * LARGE + 10, 1)?;
    guest.holds(2 * LARGE + 30, 3 * LARGE, 1)?;
    guest
        .map
        .replace(at, 20 * PAGE, Some((&guest.file, at as u64, RW)))?;
    guest.holds(2 * LARGE, 3 * LARGE, 1)?;
    // A part moved elsewhere, within the mapping and out of line.
    let len = 100 * PAGE;
    guest.map.shift((3 * LARGE + 3) * PAGE, 10 * PAGE, len)?;
    for page in 0..100 {
        let expected = content::page(1 + (3 * LARGE + 3 + page) as u64);
        page_is("moved", &guest.map.read_page(10 + page), &expected)?;
    }
    guest.map.write_page(10, &content::page(4711));
    let second = Map::shared(&guest.file, 0, 4 * LARGE * PAGE, RW)?;
    page_is(
        "a write after the move",
        &second.read_page(3 * LARGE + 3),
        &content::page(4711),
    )?;
    page_is(
        "what was under it",
        &second.read_page(10),
        &content::page(11),
    )?;
    // Moved as a whole.
    let target = Map::anonymous(4 * LARGE * PAGE)?;
    let mut second = second;
    second.move_over(target)?;
    page_is(
        "moved as a whole",
        &second.read_page(777),
        &content::page(778),
    )?;
    second.set(778, 0, 5);
    huge_is(ctx, "after all that", "web", 4 * LARGE_KB)?;
    ctx.expect_used("after all that", &mount, "web", 4 * LARGE_KB)?;
    second.advise(0, 4 * LARGE * PAGE, libc::MADV_DONTNEED)?;
    eq("Rss after MADV_DONTNEED", rss(&second)?, 0)?;
    eq("the data stay", second.get(778, 0), 5)?;
    drop(second);
    drop(guest.map);
    guest.file.set_len(0)?;
    ctx.expect_used("of an empty file", &mount, "web", 0)
}

fn holes(ctx: &Ctx) -> Result<()> {
    let (mount, guest) = guest(ctx, 3 * LARGE)?;
    ctx.sys().set("split_holes_percent", 100)?;
    guest.fill(0, 3 * LARGE, 1);
    let hole = |from: usize, pages: usize| {
        sys::punch(&guest.file, (from * PAGE) as u64, (pages * PAGE) as u64)
    };
    hole(7, 1)?;
    hole(100, 30)?;
    guest.is_zero(7, 8)?;
    guest.is_zero(100, 130)?;
    guest.holds(0, 7, 1)?;
    guest.holds(8, 100, 1)?;
    guest.holds(130, LARGE, 1)?;
    huge_is(ctx, "with some holes", "web", 3 * LARGE_KB)?;
    eq(
        "mapped large again",
        mapped_large(&guest.map)?,
        3 * LARGE_KB,
    )?;
    let seek = |at: usize, whence| sys::lseek(&guest.file, (at * PAGE) as i64, whence);
    eq("SEEK_HOLE", seek(0, libc::SEEK_HOLE)?, 7 * PAGE as i64)?;
    eq("SEEK_DATA", seek(7, libc::SEEK_DATA)?, 8 * PAGE as i64)?;
    eq(
        "SEEK_DATA behind 30 pages",
        seek(100, libc::SEEK_DATA)?,
        130 * PAGE as i64,
    )?;
    // What is written into a hole is data again, by mapping and by syscall.
    guest.map.set(110, 0, 1);
    guest.file.write_all_at(&[2], (7 * PAGE) as u64)?;
    eq("SEEK_HOLE", seek(0, libc::SEEK_HOLE)?, 100 * PAGE as i64)?;
    eq("SEEK_DATA", seek(100, libc::SEEK_DATA)?, 110 * PAGE as i64)?;
    eq("byte of page 7", guest.map.get(7, 0), 2)?;
    // A whole one frees at once, also where it was in pieces before.
    hole(LARGE, LARGE)?;
    huge_is(ctx, "without one", "web", 2 * LARGE_KB)?;
    ctx.expect_used("without one", &mount, "web", 2 * LARGE_KB)?;
    guest.is_zero(LARGE, 2 * LARGE)?;
    hole(0, LARGE)?;
    huge_is(ctx, "without two", "web", LARGE_KB)?;
    // A hole over the border, with parts of pages.
    sys::punch(
        &guest.file,
        ((LARGE + 300) * PAGE + 5) as u64,
        (712 * PAGE) as u64,
    )?;
    guest.holds(2 * LARGE + 501, 3 * LARGE, 1)?;
    guest.is_zero(2 * LARGE, 2 * LARGE + 500)?;
    let mut last = [0; PAGE];
    guest
        .file
        .read_exact_at(&mut last, ((2 * LARGE + 500) * PAGE) as u64)?;
    bytes_are("the zeroed start of a page", &last[..5], &[0; 5])?;
    bytes_are(
        "the rest of it",
        &last[5..],
        &content::page_bytes((2 * LARGE + 501) as u64)[5..],
    )?;
    // And again: it becomes large when it is written.
    guest.map.set(9, 9, 9);
    eq("written again", guest.map.get(9, 9), 9)?;
    guest.is_zero(10, LARGE)?;
    huge_is(ctx, "written again", "web", 2 * LARGE_KB)
}

fn truncate(ctx: &Ctx) -> Result<()> {
    let (mount, guest) = guest(ctx, 2 * LARGE)?;
    guest.fill(0, 2 * LARGE, 1);
    let cut = (LARGE + 100) * PAGE + 10;
    guest.file.set_len(cut as u64)?;
    guest.holds(0, LARGE + 100, 1)?;
    let expected = &content::page_bytes((LARGE + 101) as u64)[..10];
    let mut page = [1; PAGE];
    eq(
        "read at the end",
        guest
            .file
            .read_at(&mut page, ((LARGE + 100) * PAGE) as u64)?,
        10,
    )?;
    bytes_are("before the end", &page[..10], expected)?;
    let tail = guest.map.read_page(LARGE + 100);
    that(
        "zeroes behind the end",
        tail[2..].iter().all(|&word| word == 0),
    )?;
    let stat = ctx.sys().vm("web").stat()?;
    stat.check_sum()?;
    eq("size_kb", stat.get("size_kb")?, LARGE_KB + 101 * 4)?;
    sys::fork(|| {
        let map = Map::shared(&guest.file, 0, 2 * LARGE * PAGE, RW)?;
        std::hint::black_box(map.get(LARGE + 101, 0));
        Ok(())
    })?
    .expect_signal(Signal::SIGBUS, ctx.limit(10.0))?;
    // Longer, but not yet whole.
    guest.file.set_len(((LARGE + 200) * PAGE) as u64)?;
    guest.is_zero(LARGE + 101, LARGE + 200)?;
    guest.fill(LARGE + 150, LARGE + 200, 1);
    guest.holds(LARGE + 150, LARGE + 200, 1)?;
    ctx.sys().vm("web").stat()?.check_sum()?;
    // Whole again, and more.
    guest.file.set_len((3 * LARGE * PAGE) as u64)?;
    guest.is_zero(LARGE + 200, 2 * LARGE)?;
    guest.fill(LARGE + 200, 2 * LARGE, 1);
    guest.holds(LARGE + 150, 2 * LARGE, 1)?;
    huge_is(ctx, "whole again", "web", 2 * LARGE_KB)?;
    // At a border, and to nothing.
    guest.file.set_len((LARGE * PAGE) as u64)?;
    huge_is(ctx, "cut at a border", "web", LARGE_KB)?;
    ctx.expect_used("cut at a border", &mount, "web", LARGE_KB)?;
    guest.file.set_len(1)?;
    ctx.sys().vm("web").stat()?.check_sum()?;
    guest.file.set_len(0)?;
    ctx.expect_used("of an empty file", &mount, "web", 0)
}

fn syscalls(ctx: &Ctx) -> Result<()> {
    let (_mount, guest) = guest(ctx, 2 * LARGE)?;
    guest.map.set(0, 0, 1);
    huge_is(ctx, "after a touch", "web", LARGE_KB)?;
    // Over a border of pages and of regions: the second region gets pages of 4 KiB.
    let data = pages_bytes(50, 20);
    let at = (LARGE - 10) * PAGE + 100;
    guest.file.write_all_at(&data, at as u64)?;
    huge_is(ctx, "after write(2)", "web", LARGE_KB)?;
    let mut seen = vec![0; data.len()];
    guest.file.read_exact_at(&mut seen, at as u64)?;
    bytes_are("read(2) of what write(2) wrote", &seen, &data)?;
    let by_map: Vec<u8> = (at..at + data.len())
        .map(|i| guest.map.bytes()[i].load(Ordering::Relaxed))
        .collect();
    bytes_are("the mapping", &by_map, &data)?;
    guest.map.set(3, 3, 3);
    let mut word = [0; 8];
    guest
        .file
        .read_exact_at(&mut word, (3 * PAGE + 24) as u64)?;
    eq("read(2) of a word", u64::from_ne_bytes(word), 3)?;
    // A VM that was only ever written to by syscalls.
    let mut whole = vec![0; LARGE * PAGE];
    guest.file.read_exact_at(&mut whole, 0)?;
    eq("first word", whole[0], 1)
}

fn prealloc(ctx: &Ctx) -> Result<()> {
    let (mount, guest) = guest(ctx, 4 * LARGE)?;
    // From the middle of the first region to the middle of the third.
    let (from, len) = (LARGE / 2 * PAGE, 2 * LARGE * PAGE);
    sys::fallocate(&guest.file, 0, from as i64, len as i64)?;
    huge_is(ctx, "of one whole region", "web", LARGE_KB)?;
    ctx.expect_used("of 4 MiB", &mount, "web", 2 * LARGE_KB)?;
    sys::fallocate(&guest.file, 0, 0, (4 * LARGE * PAGE) as i64)?;
    huge_is(ctx, "of two", "web", 2 * LARGE_KB)?;
    ctx.expect_used("of all", &mount, "web", 4 * LARGE_KB)?;
    let faults = guest.sysfs(ctx).get("faults")?;
    guest.is_zero(LARGE, 2 * LARGE)?;
    guest.fill(LARGE, 2 * LARGE, 1);
    eq(
        "faults of 2 MiB",
        guest.sysfs(ctx).get("faults")? - faults,
        1,
    )?;
    guest.is_zero(0, LARGE)?;
    guest.is_zero(2 * LARGE, 4 * LARGE)?;
    guest.holds(LARGE, 2 * LARGE, 1)
}

fn held(ctx: &Ctx) -> Result<()> {
    let (mount, guest) = guest(ctx, 2 * LARGE)?;
    guest.fill(0, 2 * LARGE, 1);
    let pin = Held::page(&guest.map, 9)?;
    sys::punch(&guest.file, 0, (LARGE * PAGE) as u64)?;
    huge_is(ctx, "with one in a pipe", "web", LARGE_KB)?;
    guest.fill(0, LARGE, 5000);
    pin.shows(&content::page_bytes(10))?;
    guest.holds(0, LARGE, 5000)?;
    huge_is(ctx, "written anew", "web", 2 * LARGE_KB)?;
    drop(guest.map);
    guest.file.set_len(0)?;
    ctx.expect_used("of an empty file", &mount, "web", 0)
}

/// Two VMs of 8 large pages each: four have the same content in both, four have their own. One page
/// in eight of the equal ones differs all the same.
pub fn half_twins(ctx: &Ctx) -> Result<(Mount<'_>, Guest, Guest)> {
    let (mount, a) = guest(ctx, 8 * LARGE)?;
    let b = mount.guest("b", 8 * LARGE)?;
    fill_half(&a, 1 << 32);
    fill_half(&b, 2 << 32);
    Ok((mount, a, b))
}

/// Pages of [`half_twins`] that are equal.
pub const EQUAL: u64 = (4 * LARGE * 7 / 8) as u64;

fn seed(page: usize, own: u64) -> u64 {
    let equal = (page / LARGE) % 2 == 0 && page % 8 != 0;
    if equal {
        page as u64
    } else {
        own + page as u64
    }
}

pub fn fill_half(guest: &Guest, own: u64) {
    for page in 0..8 * LARGE {
        guest.map.write_page(page, &content::page(seed(page, own)));
    }
}

pub fn holds_half(guest: &Guest, own: u64) -> Result<()> {
    for page in 0..8 * LARGE {
        let what = format!("{} page {page}", guest.name);
        let expected = content::page(seed(page, own));
        page_is(what, &guest.map.read_page(page), &expected)?;
    }
    Ok(())
}

fn splittable(ctx: &Ctx) -> Result<u64> {
    let mut sum = 0;
    for name in ctx.sys().vms()? {
        sum += ctx.sys().vm(&name).get("splittable_kb")?;
    }
    Ok(sum)
}

fn idle(ctx: &Ctx) -> Result<()> {
    let (_mount, a, b) = half_twins(ctx)?;
    let sys = ctx.sys();
    let splits = sys.get("splits")?;
    sys.flat_out()?;
    ctx.passes(20)?;
    eq("splits", sys.get("splits")? - splits, 0)?;
    for vm in [&a, &b] {
        huge_is(ctx, "after 20 passes", &vm.name, 8 * LARGE_KB)?;
        eq("KiB mapped large", mapped_large(&vm.map)?, 8 * LARGE_KB)?;
    }
    eq("pages_sharing", sys.get("pages_sharing")?, 0)?;
    eq("pages_unshared", sys.get("pages_unshared")?, 0)?;
    // Hints are lossy: one in a hundred may be missed in a pass.
    let nearly = |kb: u64| (kb - kb / 100, kb);
    let (low, high) = nearly(EQUAL * 4);
    within("splittable_kb of both", splittable(ctx)?, low, high)?;
    // What is written is not splittable any more, what was equal first neither.
    a.fill(0, 8 * LARGE, 1 << 40);
    ctx.passes(3)?;
    eq("splittable_kb without equals", splittable(ctx)?, 0)?;
    b.fill(0, LARGE, 1 << 40);
    ctx.passes(3)?;
    let (low, high) = nearly(LARGE_KB);
    within("splittable_kb of one region", splittable(ctx)?, low, high)?;
    drop(b.map);
    b.file.set_len(0)?;
    ctx.passes(2)?;
    eq("splittable_kb of one VM alone", splittable(ctx)?, 0)
}

/// Two VMs with one large page each, of the same content, that the scanner takes for unchanged. `a`
/// is mapped by 4 KiB entries as well.
fn unchanged(ctx: &Ctx) -> Result<(Mount<'_>, Guest, Guest, Map)> {
    /// Passes after which what did not change is protected, and hashed.
    const COLD: u64 = 4;
    let (mount, a) = guest(ctx, LARGE)?;
    let b = mount.guest("b", LARGE)?;
    a.fill(0, LARGE, 1);
    b.fill(0, LARGE, 1);
    let small = across(&a.file, LARGE)?;
    for page in 0..LARGE {
        small.set(page, 0, small.get(page, 0));
    }
    ctx.sys().flat_out()?;
    ctx.passes(COLD)?;
    Ok((mount, a, b, small))
}

/// Pages that were hashed, and those that were passed over, in a few passes.
fn hashed(ctx: &Ctx) -> Result<(u64, u64)> {
    let seen = || -> Result<(u64, u64)> {
        let sys = ctx.sys();
        Ok((sys.get("pages_scanned")?, sys.get("pages_skipped")?))
    };
    let before = seen()?;
    ctx.passes(FEW)?;
    let after = seen()?;
    Ok((after.0 - before.0, after.1 - before.1))
}

/// Few enough that the look which each page gets in every 64th pass finds little.
const FEW: u64 = 3;

fn write_noticed(ctx: &Ctx) -> Result<()> {
    let (_mount, a, b, small) = unchanged(ctx)?;
    let sys = ctx.sys();
    let both = 2 * LARGE as u64;
    let (scanned, skipped) = hashed(ctx)?;
    that(
        format!("{scanned} of {both} pages hashed in {FEW} passes, {skipped} passed over"),
        scanned < both && skipped >= FEW * both * 3 / 4,
    )?;
    eq("splittable_kb", splittable(ctx)?, LARGE_KB)?;
    huge_is(ctx, "of a", "web", LARGE_KB)?;
    eq("KiB mapped large", mapped_large(&a.map)?, LARGE_KB)?;
    // Reading costs nothing, and stays possible.
    let faults = sys.get("protect_faults")?;
    a.holds(0, LARGE, 1)?;
    eq(
        "protect_faults of reads",
        sys.get("protect_faults")? - faults,
        0,
    )?;
    // The scanner is halted meanwhile: all of it lies between two passes.
    sys.set("run", 0)?;
    a.map.write_page(1, &content::page(9001));
    small.write_page(2, &content::page(9002));
    a.file
        .write_all_at(&content::page_bytes(9003), (3 * PAGE) as u64)?;
    b.map.write_page(4, &content::page(9004));
    sys::punch(&b.file, (5 * PAGE) as u64, PAGE as u64)?;
    small.write_page(6, &content::page(9006));
    within("protect_faults", sys.get("protect_faults")? - faults, 2, 5)?;
    sys.set("run", 1)?;
    ctx.passes(FEW)?;
    // Six have no equal any more; the hole is zero.
    eq("splittable_kb", splittable(ctx)?, LARGE_KB - 5 * 4)?;
    for (page, seed) in [(1, 9001), (2, 9002), (3, 9003), (6, 9006)] {
        page_is("of a", &a.map.read_page(page), &content::page(seed))?;
        page_is("of a", &small.read_page(page), &content::page(seed))?;
    }
    a.holds(7, LARGE, 1)?;
    b.is_zero(5, 6)?;
    b.holds(6, LARGE, 1)?;
    // mprotect, there and back, makes nothing writable without notice.
    ctx.passes(FEW)?;
    a.map.protect(0, LARGE * PAGE, R)?;
    a.map.protect(0, LARGE * PAGE, RW)?;
    sys.set("run", 0)?;
    a.map.write_page(7, &content::page(9007));
    sys.set("run", 1)?;
    ctx.passes(FEW)?;
    eq("splittable_kb", splittable(ctx)?, LARGE_KB - 6 * 4)?;
    eq("mapped large again", mapped_large(&a.map)?, LARGE_KB)
}

fn late_pin(ctx: &Ctx) -> Result<()> {
    let (_mount, a, b, small) = unchanged(ctx)?;
    drop(small);
    let sys = ctx.sys();
    // A page in a pipe stands for a pin that may write: both are references that no mapping has.
    let pin = Held::page(&a.map, 9)?;
    // A write takes the protection away; what is hashed from here on is not trusted.
    a.map.write_page(8, &content::page(9008));
    // By then it is protected again, and but for the pin nothing would be hashed.
    ctx.passes(16)?;
    let (scanned, _) = hashed(ctx)?;
    within("pages hashed", scanned, FEW * LARGE as u64, u64::MAX)?;
    pin.shows(&content::page_bytes(10))?;
    ctx.until("pages not hashed any more", 30.0, || {
        let (scanned, _) = hashed(ctx)?;
        Ok((scanned < LARGE as u64 / 2, scanned.to_string()))
    })?;
    eq("splittable_kb", splittable(ctx)?, LARGE_KB - 4)?;
    sys.set("run", 0)?;
    a.holds(9, LARGE, 1)?;
    b.holds(0, LARGE, 1)
}

fn split(ctx: &Ctx) -> Result<()> {
    let (mount, a, b) = half_twins(ctx)?;
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.passes(2)?;
    let (splits, pinned) = (sys.get("splits")?, sys.get("splits_refused_pinned")?);
    force(ctx, "clear")?;
    ctx.until_is("pages_sharing", EQUAL, 30.0)?;
    eq("splits", sys.get("splits")? - splits, 8)?;
    eq(
        "refused splits",
        sys.get("splits_refused_pinned")? - pinned,
        0,
    )?;
    eq("splittable_kb", splittable(ctx)?, 0)?;
    holds_half(&a, 1 << 32)?;
    holds_half(&b, 2 << 32)?;
    for vm in [&a, &b] {
        huge_is(ctx, "of the unique half", &vm.name, 4 * LARGE_KB)?;
        eq("KiB mapped large", mapped_large(&vm.map)?, 4 * LARGE_KB)?;
        ctx.expect_used("split", &mount, &vm.name, 4 * LARGE_KB + LARGE_KB / 2)?;
    }
    // And it stays so: what gains nothing is left alone.
    ctx.passes(3)?;
    eq("splits", sys.get("splits")? - splits, 8)?;
    // Writes break shares as they always do.
    fill_half(&a, 7 << 32);
    b.fill(0, LARGE, 9 << 32);
    holds_half(&a, 7 << 32)?;
    b.holds(0, LARGE, 9 << 32)?;
    drop((a.map, b.map));
    a.file.set_len(0)?;
    b.file.set_len(0)?;
    eq("pages_shared", sys.get("pages_shared")?, 0)
}

fn split_zeroes(ctx: &Ctx) -> Result<()> {
    let (mount, guest) = guest(ctx, 4 * LARGE)?;
    let sys = ctx.sys();
    // One word in the first, all in the second, none in the third, which was only preallocated.
    guest.map.set(5, 0, 1);
    guest.fill(LARGE, 2 * LARGE, 1);
    sys::fallocate(&guest.file, 0, 0, (3 * LARGE * PAGE) as i64)?;
    huge_is(ctx, "before", "web", 3 * LARGE_KB)?;
    sys.flat_out()?;
    ctx.passes(2)?;
    eq("splittable_kb", splittable(ctx)?, 2 * LARGE_KB - 4)?;
    force(ctx, "soft")?;
    ctx.until("huge_kb of 2048", 30.0, || {
        let seen = sys.vm("web").get("huge_kb")?;
        Ok((seen == LARGE_KB, seen.to_string()))
    })?;
    let stat = sys.vm("web").stat()?;
    stat.check_sum()?;
    eq("zero_kb", stat.get("zero_kb")?, 2 * LARGE_KB - 4)?;
    ctx.expect_used("split", &mount, "web", LARGE_KB + 4)?;
    eq("the word", guest.map.get(5, 0), 1)?;
    guest.holds(LARGE, 2 * LARGE, 1)?;
    guest.is_zero(6, LARGE)?;
    guest.is_zero(2 * LARGE, 4 * LARGE)
}

fn split_pinned(ctx: &Ctx) -> Result<()> {
    let (_mount, a, b) = half_twins(ctx)?;
    let sys = ctx.sys();
    let pin = Held::page(&a.map, 9)?;
    sys.flat_out()?;
    ctx.passes(2)?;
    let pinned = sys.get("splits_refused_pinned")?;
    let wanted = EQUAL * 3 / 4;
    force(ctx, "clear")?;
    ctx.until_is("pages_sharing", wanted, 30.0)?;
    ctx.until_least("splits_refused_pinned", pinned + 1, 10.0)?;
    huge_is(ctx, "of the one with a held page", "web", 5 * LARGE_KB)?;
    holds_half(&a, 1 << 32)?;
    pin.shows(&content::page_bytes(seed(9, 0)))?;
    ctx.until_is("pages_sharing", EQUAL, 30.0)?;
    holds_half(&a, 1 << 32)?;
    holds_half(&b, 2 << 32)
}

fn split_holes(ctx: &Ctx) -> Result<()> {
    let (mount, guest) = guest(ctx, 3 * LARGE)?;
    let sys = ctx.sys();
    eq("split_holes_percent", sys.get("split_holes_percent")?, 50)?;
    for bad in ["0", "101", "-1", "half"] {
        fails_any(
            format!("split_holes_percent {bad}"),
            sys.try_set("split_holes_percent", bad.as_bytes()),
            &[Errno::EINVAL, Errno::ERANGE],
        )?;
    }
    guest.fill(0, 3 * LARGE, 1);
    let hole = |page: usize| sys::punch(&guest.file, (page * PAGE) as u64, PAGE as u64);
    let splits = sys.get("splits")?;
    for page in (0..LARGE).step_by(2) {
        hole(page)?;
    }
    thread::sleep(ctx.limit(0.1));
    huge_is(ctx, "with half of one in holes", "web", 3 * LARGE_KB)?;
    eq("splits", sys.get("splits")? - splits, 0)?;
    hole(1)?;
    ctx.until_is("splits", splits + 1, 20.0)?;
    huge_is(ctx, "with more than half", "web", 2 * LARGE_KB)?;
    ctx.expect_used("with 255 pages left", &mount, "web", 2 * LARGE_KB + 255 * 4)?;
    guest.is_zero(1, 3)?;
    for page in (3..LARGE).step_by(2) {
        guest.holds(page, page + 1, 1)?;
    }
    let stat = sys.vm("web").stat()?;
    eq("empty_kb", stat.get("empty_kb")?, 257 * 4)?;
    // Holes that were written to again are no holes.
    sys.set("split_holes_percent", 10)?;
    for page in 0..50 {
        hole(LARGE + page)?;
    }
    guest.fill(LARGE, LARGE + 50, 1);
    hole(LARGE + 60)?;
    hole(LARGE + 61)?;
    ctx.until_is("splits", splits + 2, 20.0)?;
    guest.holds(LARGE, LARGE + 60, 1)?;
    guest.holds(LARGE + 62, 2 * LARGE, 1)?;
    guest.is_zero(LARGE + 60, LARGE + 62)?;
    let used = LARGE_KB + 255 * 4 + 510 * 4;
    ctx.expect_used("of those written to again", &mount, "web", used)
}

fn reported(ctx: &Ctx) -> Result<()> {
    const REGIONS: usize = 8;
    let (mount, guest) = guest(ctx, REGIONS * LARGE)?;
    let sys = ctx.sys();
    let splits = sys.get("splits")?;
    guest.fill(0, REGIONS * LARGE, 1);
    eq(
        "KiB mapped large",
        mapped_large(&guest.map)?,
        REGIONS as u64 * LARGE_KB,
    )?;
    sys.flat_out()?;
    // Every other one, as QEMU discards it.
    for region in (0..REGIONS).step_by(2) {
        let at = region * LARGE * PAGE;
        sys::punch(&guest.file, at as u64, (LARGE * PAGE) as u64)?;
        guest.map.advise(at, LARGE * PAGE, libc::MADV_DONTNEED)?;
    }
    let left = REGIONS as u64 / 2 * LARGE_KB;
    huge_is(ctx, "of the rest", "web", left)?;
    ctx.passes(2)?;
    eq(
        "KiB mapped large of the rest",
        mapped_large(&guest.map)?,
        left,
    )?;
    ctx.expect_used("of the rest", &mount, "web", left)?;
    for region in (1..REGIONS).step_by(2) {
        guest.holds(region * LARGE, (region + 1) * LARGE, 1)?;
    }
    // One fault for each that the guest takes back.
    let faults = guest.sysfs(ctx).get("faults")?;
    sys.set("run", 0)?;
    for region in (0..REGIONS).step_by(2) {
        guest.fill(region * LARGE, (region + 1) * LARGE, 1);
    }
    let taken = guest.sysfs(ctx).get("faults")? - faults;
    eq("faults", taken, REGIONS as u64 / 2)?;
    guest.holds(0, REGIONS * LARGE, 1)?;
    huge_is(ctx, "taken back", "web", REGIONS as u64 * LARGE_KB)?;
    eq("splits", sys.get("splits")? - splits, 0)
}

/// Fills region `region` so that it equals every other one that is filled so.
pub fn fill_equal(guest: &Guest, region: usize) {
    for page in 0..LARGE {
        let content = content::page(page as u64 + 1);
        guest.map.write_page(region * LARGE + page, &content);
    }
}

fn split_alone(ctx: &Ctx) -> Result<()> {
    always(ctx)?;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M,domain=lab,share=0")?;
    let guest = mount.guest("web", 4 * LARGE)?;
    fill_equal(&guest, 0);
    fill_equal(&guest, 1);
    guest.map.set(2 * LARGE, 0, 1);
    let other = mount.guest("other", LARGE)?;
    other.sysfs(ctx).set("share", 1)?;
    fill_equal(&other, 0);
    sys.flat_out()?;
    force(ctx, "clear")?;
    ctx.passes(4)?;
    eq("splittable_kb", splittable(ctx)?, 0)?;
    huge_is(ctx, "of the VM with share 0", "web", 3 * LARGE_KB)?;
    eq("pages_sharing", sys.get("pages_sharing")?, 0)?;
    // Its zero pages are not looked for either, and holes do not make it do so.
    sys::punch(&guest.file, (2 * LARGE * PAGE) as u64, (300 * PAGE) as u64)?;
    ctx.until("huge_kb of 4096", 20.0, || {
        let seen = sys.vm("web").get("huge_kb")?;
        Ok((seen == 2 * LARGE_KB, seen.to_string()))
    })?;
    let stat = sys.vm("web").stat()?;
    eq("zero_kb", stat.get("zero_kb")?, 0)?;
    eq("private_kb", stat.get("private_kb")?, 212 * 4)
}

fn limit(ctx: &Ctx) -> Result<()> {
    let (_mount, guest) = guest(ctx, 4 * LARGE)?;
    let vm = guest.sysfs(ctx);
    // Pages that differ, and compress well.
    for page in 0..4 * LARGE {
        guest.map.set(page, 3, page as u64 + 1);
    }
    huge_is(ctx, "before", "web", 4 * LARGE_KB)?;
    vm.set("limit_kb", 2 * LARGE_KB)?;
    ctx.until("resident_kb of 4096 at most", 60.0, || {
        let seen = vm.get("resident_kb")?;
        Ok((seen <= 2 * LARGE_KB, seen.to_string()))
    })?;
    vm.stat()?.check_sum()?;
    within(
        "compressed_kb",
        vm.get("compressed_kb")?,
        LARGE_KB,
        u64::MAX,
    )?;
    for page in 0..4 * LARGE {
        eq("the word", guest.map.get(page, 3), page as u64 + 1)?;
    }
    vm.set("limit_kb", 0)
}

fn again(ctx: &Ctx) -> Result<()> {
    let (_mount, guest) = guest(ctx, 2 * LARGE)?;
    let sys = ctx.sys();
    guest.map.set(1, 0, 1);
    sys.flat_out()?;
    ctx.passes(2)?;
    force(ctx, "clear")?;
    ctx.until("huge_kb of 0", 30.0, || {
        let seen = sys.vm("web").get("huge_kb")?;
        Ok((seen == 0, seen.to_string()))
    })?;
    sys.set("run", 0)?;
    guest.map.set(2, 0, 2);
    eq("the word", guest.map.get(1, 0), 1)?;
    eq("KiB mapped large", mapped_large(&guest.map)?, 0)?;
    force(ctx, "high")?;
    // As QEMU discards the memory that its guest gives back.
    sys::punch(&guest.file, 0, (LARGE * PAGE) as u64)?;
    guest.map.advise(0, LARGE * PAGE, libc::MADV_DONTNEED)?;
    guest.map.set(3, 0, 3);
    guest.is_zero(1, 3)?;
    huge_is(ctx, "after a discard", "web", LARGE_KB)?;
    eq("KiB mapped large", mapped_large(&guest.map)?, LARGE_KB)
}

/// Waits until one of two counters has grown.
pub fn until_one_grows(ctx: &Ctx, names: [&str; 2]) -> Result<()> {
    let sum = || -> Result<u64> { Ok(ctx.sys().get(names[0])? + ctx.sys().get(names[1])?) };
    let before = sum()?;
    ctx.until(&format!("{names:?} to grow"), 30.0, || {
        let now = sum()?;
        Ok((now > before, now.to_string()))
    })
}

fn split_held(ctx: &Ctx) -> Result<()> {
    let (_mount, guest) = guest(ctx, LARGE)?;
    guest.fill(0, LARGE / 2, 1);
    ctx.sys().flat_out()?;
    ctx.passes(2)?;
    guest.held_shows_writes(9, || {
        force(ctx, "clear")?;
        until_one_grows(ctx, ["splits", "splits_refused_pinned"])
    })?;
    guest.holds(10, LARGE / 2, 1)?;
    guest.is_zero(LARGE / 2, LARGE)
}

/// All 2 MiB that the kernel finds in one piece, given to hugetlbfs.
struct Taken;

impl Taken {
    const PAGES: &'static str = "/proc/sys/vm/nr_hugepages";

    /// Goes on until nothing more comes, whatever the kernel gives up and moves together: an
    /// allocation does both, and so finds more than what is free at the moment.
    fn all() -> Result<Taken> {
        const ROUNDS_IN_VAIN: u32 = 3;
        let order = |path: &str, value: &str| fs::write(path, value).context(path.to_owned());
        let taken = Taken;
        let (mut most, mut in_vain) = (0, 0);
        while in_vain < ROUNDS_IN_VAIN {
            order("/proc/sys/vm/drop_caches", "3")?;
            order("/proc/sys/vm/compact_memory", "1")?;
            order(Self::PAGES, "1000000")?;
            let pages: u64 = fs::read_to_string(Self::PAGES)?.trim().parse()?;
            in_vain = if pages > most { 0 } else { in_vain + 1 };
            most = most.max(pages);
        }
        Ok(taken)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Err(e) = fs::write(Self::PAGES, "0") {
            eprintln!("{}: {e}", Self::PAGES);
        }
    }
}

fn fragmented(ctx: &Ctx) -> Result<()> {
    /// Pieces of memory that stay free: enough for all others on the machine.
    const PIECES: usize = 128;
    /// Regions that are to be refused 2 MiB, by faults and then by fallocate.
    const REFUSED: u64 = 6;
    /// Regions that ask for them at most: what others free meanwhile may be whole.
    const ASKING: usize = 24;
    always(ctx)?;
    let sys = ctx.sys();
    sys.set("collapse_per_sec", 0)?;
    let mount = ctx.mount("m", "size=512M,domain=lab")?;
    let other = ctx.mount("n", "size=512M,domain=other,large_pages=never,share=0")?;
    // One page of 4 KiB stays in each 2 MiB of the host's memory that the file got some of.
    let filler = other.guest("filler", PIECES * LARGE)?;
    for page in 0..PIECES * LARGE {
        filler.map.set(page, 0, page as u64 + 1);
    }
    let mut seen = BTreeSet::new();
    let stays: Vec<bool> = sys::frames(&filler.map)?
        .into_iter()
        .map(|frame| frame.is_some_and(|frame| seen.insert(frame / LARGE as u64)))
        .collect();
    let mut page = 0;
    for run in stays.chunk_by(|a, b| a == b) {
        if !run[0] {
            let (at, len) = (page * PAGE, run.len() * PAGE);
            sys::punch(&filler.file, at as u64, len as u64)?;
        }
        page += run.len();
    }
    let taken = Taken::all()?;
    let waits = sys.get("waits_for_memory")?;
    let guest = mount.guest("web", 2 * ASKING * LARGE)?;
    let vm = guest.sysfs(ctx);
    let by_fault = |region: usize| -> Result<()> {
        guest.fill(region * LARGE, (region + 1) * LARGE, 1);
        Ok(())
    };
    let by_fallocate = |region: usize| -> Result<()> {
        let (at, len) = ((region * LARGE * PAGE) as i64, (LARGE * PAGE) as i64);
        Ok(sys::fallocate(&guest.file, 0, at, len)?)
    };
    let ask = |how: &str, first: usize, ask: &dyn Fn(usize) -> Result<()>| -> Result<usize> {
        let refused = || sys.get("large_pages_refused_no_memory");
        let (before, huge) = (refused()?, vm.get("huge_kb")?);
        for asked in 1..=ASKING {
            ask(first + asked - 1)?;
            // A region has 2 MiB, or was refused them: never both, and never neither.
            let huge = (vm.get("huge_kb")? - huge) / LARGE_KB;
            let refused = refused()? - before;
            eq(
                format!("regions that were refused or got 2 MiB by {how}"),
                refused + huge,
                asked as u64,
            )?;
            if refused == REFUSED {
                println!("{how}: {refused} of {asked} regions refused");
                return Ok(asked);
            }
        }
        bail!("{how}: {ASKING} regions, and fewer than {REFUSED} were refused 2 MiB")
    };
    let filled = ask("a fault", 0, &by_fault)?;
    eq("waits_for_memory", sys.get("waits_for_memory")? - waits, 0)?;
    let empty = ask("fallocate", filled, &by_fallocate)?;
    guest.holds(0, filled * LARGE, 1)?;
    guest.is_zero(filled * LARGE, (filled + empty) * LARGE)?;
    let used_kb = (filled + empty) as u64 * LARGE_KB;
    ctx.expect_used("of either size", &mount, "web", used_kb)?;
    vm.stat()?.check_sum()?;
    drop(taken);
    let late = mount.guest("late", LARGE)?;
    late.fill(0, LARGE, 7);
    huge_is(ctx, "once there is memory in one piece", "late", LARGE_KB)?;
    for (page, _) in stays.iter().enumerate().filter(|(_, stays)| **stays) {
        eq(
            "a page that stayed",
            filler.map.get(page, 0),
            page as u64 + 1,
        )?;
    }
    Ok(())
}

/// Regions of the race: the last one is the puncher's.
const REGIONS: usize = 3;

fn races(ctx: &Ctx) -> Result<()> {
    let (mount, guest) = guest(ctx, REGIONS * LARGE)?;
    let sys = ctx.sys();
    sys.flat_out()?;
    let waits = sys.get("waits_for_memory")?;
    let stop = AtomicBool::new(false);
    let end = Instant::now() + ctx.span(6.0);
    let running = || !stop.load(Ordering::Relaxed) && Instant::now() < end;
    let own = (REGIONS - 1) * LARGE;
    let results: Vec<Result<u64>> = thread::scope(|scope| {
        let guest = &guest;
        let running = &running;
        let mut threads = Vec::new();
        // Each counts in a word of its own in every page, by 2 MiB and by 4 KiB.
        for lane in 0..2usize {
            threads.push(scope.spawn(move || {
                let small = across(&guest.file, REGIONS * LARGE)?;
                let mut round = 0;
                while round == 0 || running() {
                    for page in (lane..own).step_by(3) {
                        let map = if round % 2 == 0 { &small } else { &guest.map };
                        eq("a word", map.get(page, lane), round)?;
                        map.set(page, lane, round + 1);
                    }
                    round += 1;
                }
                for page in (lane..own).step_by(3) {
                    eq("a word at the end", guest.map.get(page, lane), round)?;
                }
                Ok(round)
            }));
        }
        // Maps parts, protects, moves, and lets go.
        threads.push(scope.spawn(move || {
            let mut round = 0usize;
            while round == 0 || running() {
                let mut map = Map::shared(&guest.file, 0, REGIONS * LARGE * PAGE, RW)?;
                std::hint::black_box(map.get(round % own, 3));
                map.protect((round * 7 % (own - 1)) * PAGE, PAGE, R)?;
                map.set(own - 1, 10, round as u64);
                map.replace((round * 11 % (own - 1)) * PAGE, PAGE, None)?;
                map.advise(0, LARGE * PAGE, libc::MADV_DONTNEED)?;
                map.move_over(Map::anonymous(REGIONS * LARGE * PAGE)?)?;
                eq("a word of its own", map.get(own - 1, 10), round as u64)?;
                round += 1;
            }
            Ok(round as u64)
        }));
        // Owns the last region: holes of every size, checked at once.
        threads.push(scope.spawn(move || {
            let mut round = 0usize;
            while round == 0 || running() {
                guest.fill(own, own + LARGE, round as u64);
                let from = round * 37 % LARGE;
                let pages = match round % 3 {
                    0 => LARGE,
                    _ => (round * 5 % 90 + 1).min(LARGE - from),
                };
                let from = own + if pages == LARGE { 0 } else { from };
                sys::punch(&guest.file, (from * PAGE) as u64, (pages * PAGE) as u64)?;
                guest.is_zero(from, from + pages)?;
                guest.holds(own, from, round as u64)?;
                guest.holds(from + pages, own + LARGE, round as u64)?;
                round += 1;
            }
            Ok(round as u64)
        }));
        threads
            .into_iter()
            .map(|thread| {
                let result = thread
                    .join()
                    .unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked")));
                if result.is_err() {
                    stop.store(true, Ordering::Relaxed);
                }
                result
            })
            .collect()
    });
    eq(
        "faults that waited for memory",
        sys.get("waits_for_memory")? - waits,
        0,
    )?;
    let mut rounds = Vec::new();
    for result in results {
        rounds.push(result?);
    }
    println!("rounds {rounds:?}");
    ctx.sys().vm("web").stat()?.check_sum()?;
    drop(guest.map);
    guest.file.set_len(0)?;
    ctx.expect_used("of an empty file", &mount, "web", 0)
}
