// SPDX-License-Identifier: GPL-2.0

//! Sharing: what merges, what never does, and what breaks it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{IoSlice, Read};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use nix::sys::uio::{process_vm_writev, RemoteIoVec};
use nix::unistd::Pid;

use crate::check::{bytes_are, eq, page_is, that, within};
use crate::content::{self, page_bytes, pages_bytes};
use crate::ctx::{Ctx, Guest, Mount};
use crate::harness::Case;
use crate::mapping::Disk;
use crate::sys::{self, Map, PAGE, R, RW, WORDS};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::thinram(
        "share/zero",
        "pages of zeroes are found and give their memory back",
        zero,
    ),
    Case::thinram(
        "share/prealloc-zero",
        "preallocated pages are found as zeroes",
        prealloc_zero,
    ),
    Case::thinram(
        "share/within-vm",
        "duplicates in one VM, also over two files",
        within_vm,
    ),
    Case::thinram(
        "share/across-vms",
        "duplicates over the VMs of one domain",
        across_vms,
    ),
    Case::thinram(
        "share/fresh-frame",
        "a merge takes a fresh frame, never that of a sharer",
        fresh_frame,
    ),
    Case::thinram(
        "share/first-pass",
        "the first pass already merges",
        first_pass,
    ),
    Case::thinram(
        "share/across-domains",
        "never over a domain's border",
        across_domains,
    ),
    Case::thinram(
        "share/own-domain",
        "without domain= a VM meets only itself",
        own_domain,
    ),
    Case::thinram(
        "share/nearly-equal",
        "pages that differ in one bit never merge",
        nearly_equal,
    ),
    Case::thinram("share/read-keeps", "reading breaks no share", read_keeps),
    Case::thinram(
        "share/write-breaks",
        "a write by any means leaves the neighbour",
        write_breaks,
    ),
    Case::thinram(
        "share/all-mappings",
        "merge and break reach every mapping",
        all_mappings,
    ),
    Case::thinram(
        "share/read-only-maps",
        "merge under read-only mappings",
        read_only_maps,
    ),
    Case::thinram(
        "share/neighbour-ends",
        "a neighbour's end leaves the data",
        neighbour_ends,
    ),
    Case::thinram(
        "share/pinned",
        "a page that a pipe holds is not merged",
        pinned,
    ),
    Case::thinram(
        "share/cold-then-equal",
        "what was unique for long still merges",
        cold_then_equal,
    ),
    Case::thinram(
        "share/stale-hash",
        "a write by any means is seen by the scan",
        stale_hash,
    ),
];

/// Seconds within which a few hundred pages surely merge.
pub const SOON: f64 = 30.0;

/// Two guests of `pages` pages in one domain, page `i` of both made from seed `i`.
pub fn twins(ctx: &Ctx, pages: usize) -> Result<(Mount<'_>, Guest, Guest)> {
    let mount = ctx.mount("m", "size=256M,domain=lab")?;
    let (a, b) = (mount.guest("a", pages)?, mount.guest("b", pages)?);
    a.fill(0, pages, 1);
    b.fill(0, pages, 1);
    Ok((mount, a, b))
}

/// [`twins`], merged, and the scanner stopped again.
pub fn merged_twins(ctx: &Ctx, pages: usize) -> Result<(Mount<'_>, Guest, Guest)> {
    let (mount, a, b) = twins(ctx, pages)?;
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.until_is("pages_sharing", pages as u64, SOON)?;
    sys.set("run", 0)?;
    Ok((mount, a, b))
}

/// The physical frames of `guest`, every page touched. The scanner may unmap a page between the
/// touch and the look: then all are touched again.
pub fn frames(guest: &Guest) -> Result<BTreeSet<u64>> {
    const TRIES: usize = 50;
    for _ in 0..TRIES {
        let mut sum = 0u64;
        for page in 0..guest.map.pages() {
            sum = sum.wrapping_add(guest.map.get(page, 0));
        }
        std::hint::black_box(sum);
        let seen: Option<BTreeSet<u64>> = sys::frames(&guest.map)?.into_iter().collect();
        if let Some(frames) = seen {
            return Ok(frames);
        }
    }
    bail!(
        "{}: touched {TRIES} times, and some page is still not mapped",
        guest.name
    )
}

/// No frame is mapped by both.
pub fn apart(what: &str, a: &Guest, b: &Guest) -> Result<()> {
    let (a_frames, b_frames) = (frames(a)?, frames(b)?);
    let common = a_frames.intersection(&b_frames).count();
    eq(
        format!("{what}: frames common to {} and {}", a.name, b.name),
        common,
        0,
    )
}

/// Both map the very same frames.
pub fn together(a: &Guest, b: &Guest) -> Result<()> {
    let (a_frames, b_frames) = (frames(a)?, frames(b)?);
    eq(
        format!("frames of {} that {} maps too", a.name, b.name),
        a_frames.intersection(&b_frames).count(),
        a_frames.len(),
    )
}

fn zero(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M")?;
    let guest = mount.guest("web", 256)?;
    guest.fill(0, 256, 1);
    for page in 0..200 {
        guest.map.write_page(page, &[0; WORDS]);
    }
    ctx.expect_used("before the scan", &mount, "web", 1024)?;
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.until_is("zero_pages", 200, SOON)?;
    sys.set("run", 0)?;
    ctx.expect_used("after the scan", &mount, "web", 224)?;
    let vm = guest.sysfs(ctx);
    eq("zero_kb", vm.get("zero_kb")?, 800)?;
    eq("saved_kb", sys.get("saved_kb")?, 800)?;
    eq("pages_sharing", sys.get("pages_sharing")?, 0)?;
    guest.is_zero(0, 200)?;
    guest.holds(200, 256, 1)?;
    let breaks = vm.get("cow_breaks")?;
    for page in 0..50 {
        guest.map.set(page, 300, 5);
    }
    let mut expected = [0; WORDS];
    expected[300] = 5;
    for page in 0..50 {
        page_is(
            format!("written page {page}"),
            &guest.map.read_page(page),
            &expected,
        )?;
    }
    guest.is_zero(50, 200)?;
    eq("zero_pages after 50 writes", sys.get("zero_pages")?, 150)?;
    eq("cow_breaks of the VM", vm.get("cow_breaks")? - breaks, 50)?;
    ctx.expect_used("after 50 writes", &mount, "web", 424)?;
    // write(2) is no different.
    guest.file.write_all_at(&page_bytes(9), 60 * PAGE as u64)?;
    page_is(
        "page written by write(2)",
        &guest.map.read_page(60),
        &content::page(9),
    )?;
    eq("zero_pages after write(2)", sys.get("zero_pages")?, 149)?;
    eq(
        "cow_breaks of the VM after write(2)",
        vm.get("cow_breaks")? - breaks,
        51,
    )
}

fn prealloc_zero(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M")?;
    let guest = mount.guest("web", 512)?;
    sys::fallocate(&guest.file, 0, 0, 512 * PAGE as i64)?;
    ctx.expect_used("after fallocate", &mount, "web", 2048)?;
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.until_is("zero_pages", 512, SOON)?;
    ctx.expect_used("after the scan", &mount, "web", 0)?;
    guest.fill(0, 512, 1);
    guest.holds(0, 512, 1)
}

fn within_vm(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M")?;
    let guest = mount.guest("web", 128)?;
    for page in 0..128 {
        guest.map.write_page(page, &content::page(page as u64 % 32));
    }
    let dimm = mount.file("web", "dimm1", 32)?;
    dimm.write_all_at(&pages_bytes(0, 32), 0)?;
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.until_is("pages_sharing", 128, SOON)?;
    eq("pages_shared", sys.get("pages_shared")?, 32)?;
    sys.set("run", 0)?;
    ctx.expect_used("after the merge", &mount, "web", 0)?;
    eq("shared_kb", guest.sysfs(ctx).get("shared_kb")?, 640)?;
    for page in 0..128 {
        let what = format!("page {page}");
        page_is(
            what,
            &guest.map.read_page(page),
            &content::page(page as u64 % 32),
        )?;
    }
    let mut seen = vec![0; 32 * PAGE];
    dimm.read_exact_at(&mut seen, 0)?;
    bytes_are("the second file", &seen, &pages_bytes(0, 32))
}

fn across_vms(ctx: &Ctx) -> Result<()> {
    let (mount, a, b) = merged_twins(ctx, 256)?;
    let sys = ctx.sys();
    eq("pages_shared", sys.get("pages_shared")?, 256)?;
    for guest in [&a, &b] {
        ctx.expect_used("after the merge", &mount, &guest.name, 0)?;
        let stat = guest.sysfs(ctx).stat()?;
        stat.check_sum()?;
        eq(
            format!("shared_kb of {}", guest.name),
            stat.get("shared_kb")?,
            1024,
        )?;
        guest.holds(0, 256, 1)?;
    }
    eq("shared_frames_kb", sys.get("shared_frames_kb")?, 1024)?;
    together(&a, &b)
}

fn fresh_frame(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 256;
    let (_mount, a, b) = twins(ctx, PAGES)?;
    let own = [sys::frames(&a.map)?, sys::frames(&b.map)?];
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.until_is("pages_sharing", PAGES as u64, SOON)?;
    sys.set("run", 0)?;
    for guest in [&a, &b] {
        guest.holds(0, PAGES, 1)?;
        for (page, frame) in sys::frames(&guest.map)?.into_iter().enumerate() {
            that(
                format!("page {page} has a frame that none of the two had"),
                frame.is_some() && own.iter().all(|own| own[page] != frame),
            )?;
        }
    }
    Ok(())
}

fn first_pass(ctx: &Ctx) -> Result<()> {
    let (_mount, a, b) = twins(ctx, 1024)?;
    let sys = ctx.sys();
    // Slow enough to look right after the first pass over these 2048 pages, on a busy machine too.
    sys.set("scan_pages_per_sec", 500)?;
    let before = sys.get("pages_scanned")?;
    sys.flat_out_but_pages()?;
    ctx.until_least("pages_scanned", before + 2048, SOON)?;
    let (merged, scanned) = (
        sys.get("pages_sharing")?,
        sys.get("pages_scanned")? - before,
    );
    sys.set("run", 0)?;
    println!("{merged} of 1024 pages merged when {scanned} of 2048 were scanned");
    within("pages scanned by then", scanned, 2048, 3000)?;
    within("pages merged in the first pass", merged, 512, 1024)?;
    a.holds(0, 1024, 1)?;
    b.holds(0, 1024, 1)
}

fn across_domains(ctx: &Ctx) -> Result<()> {
    let one = ctx.mount("one", "size=64M,domain=one")?;
    let two = ctx.mount("two", "size=64M,domain=two")?;
    let (a, b, c) = (
        one.guest("a", 128)?,
        two.guest("b", 128)?,
        two.guest("c", 128)?,
    );
    for guest in [&a, &b] {
        guest.fill(0, 128, 1);
    }
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.passes(4)?;
    eq(
        "pages_sharing over the border",
        sys.get("pages_sharing")?,
        0,
    )?;
    apart("after the scan", &a, &b)?;
    // Inside one of them the same content merges.
    c.fill(0, 128, 1);
    ctx.until_is("pages_sharing", 128, SOON)?;
    sys.set("run", 0)?;
    together(&b, &c)?;
    apart("after the merge inside", &a, &b)?;
    apart("after the merge inside", &a, &c)?;
    for guest in [&a, &b, &c] {
        guest.holds(0, 128, 1)?;
    }
    Ok(())
}

fn own_domain(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M")?;
    let (a, b) = (mount.guest("a", 128)?, mount.guest("b", 128)?);
    for guest in [&a, &b] {
        guest.fill(0, 64, 1);
        guest.fill(64, 128, 1000);
    }
    // The second half of `a` repeats its first.
    for page in 0..64 {
        a.map.write_page(64 + page, &content::page(1 + page as u64));
    }
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.until_is("pages_sharing", 64, SOON)?;
    ctx.passes(3)?;
    eq("pages_sharing", sys.get("pages_sharing")?, 64)?;
    eq("shared_kb of b", b.sysfs(ctx).get("shared_kb")?, 0)?;
    sys.set("run", 0)?;
    apart("after the scan", &a, &b)?;
    a.holds(0, 64, 1)?;
    b.holds(0, 64, 1)
}

fn nearly_equal(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let (a, b) = (mount.guest("a", 514)?, mount.guest("b", 514)?);
    let base = content::page(1);
    for page in 0..512 {
        let mut other = base;
        other[page] ^= 1 << (page % 64);
        a.map.write_page(page, &other);
        other[page] ^= 1 << (page % 64);
        other[page] ^= 1 << ((page + 1) % 64);
        b.map.write_page(page, &other);
    }
    // Zero but for one bit.
    a.map.set(512, 511, 1 << 63);
    b.map.set(512, 0, 1);
    a.map.write_page(513, &base);
    b.map.write_page(513, &base);
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.until_is("pages_sharing", 1, SOON)?;
    ctx.passes(4)?;
    eq("pages_sharing", sys.get("pages_sharing")?, 1)?;
    eq("zero_pages", sys.get("zero_pages")?, 0)?;
    for page in 0..512 {
        let mut expected = base;
        expected[page] ^= 1 << (page % 64);
        page_is(format!("a {page}"), &a.map.read_page(page), &expected)?;
        expected[page] ^= 1 << (page % 64);
        expected[page] ^= 1 << ((page + 1) % 64);
        page_is(format!("b {page}"), &b.map.read_page(page), &expected)?;
    }
    eq(
        "last word of the page that is nearly zero",
        a.map.get(512, 511),
        1 << 63,
    )
}

fn read_keeps(ctx: &Ctx) -> Result<()> {
    let (_mount, a, b) = merged_twins(ctx, 64)?;
    let sys = ctx.sys();
    let breaks = sys.get("cow_breaks")?;
    for guest in [&a, &b] {
        guest.holds(0, 64, 1)?;
        let mut seen = vec![0; 64 * PAGE];
        guest.file.read_exact_at(&mut seen, 0)?;
        bytes_are("by read(2)", &seen, &pages_bytes(1, 64))?;
    }
    let (from, to) = nix::unistd::pipe()?;
    sys::vmsplice(&to, &a.map, 0, PAGE)?;
    let mut seen = vec![0; PAGE];
    fs::File::from(from).read_exact(&mut seen)?;
    bytes_are("by a pipe", &seen, &page_bytes(1))?;
    let other = Map::shared(&fs::File::open(&a.path)?, 0, 64 * PAGE, R)?;
    page_is(
        "by a read-only mapping",
        &other.read_page(9),
        &content::page(10),
    )?;
    eq("pages_sharing", sys.get("pages_sharing")?, 64)?;
    eq("cow_breaks", sys.get("cow_breaks")?, breaks)
}

/// A way to store one word at a page of a guest.
type Writer = (&'static str, fn(&Guest, usize, usize, u64) -> Result<()>);

fn by_mapping(guest: &Guest, page: usize, word: usize, value: u64) -> Result<()> {
    guest.map.set(page, word, value);
    Ok(())
}

fn by_pwrite(guest: &Guest, page: usize, word: usize, value: u64) -> Result<()> {
    guest
        .file
        .write_all_at(&value.to_ne_bytes(), (page * PAGE + word * 8) as u64)?;
    Ok(())
}

fn by_process_vm(guest: &Guest, page: usize, word: usize, value: u64) -> Result<()> {
    let remote = [RemoteIoVec {
        base: guest.map.addr() + page * PAGE + word * 8,
        len: 8,
    }];
    process_vm_writev(Pid::this(), &[IoSlice::new(&value.to_ne_bytes())], &remote)?;
    Ok(())
}

fn by_fresh_mapping(guest: &Guest, page: usize, word: usize, value: u64) -> Result<()> {
    Map::shared(&guest.file, (page * PAGE) as u64, PAGE, RW)?.set(0, word, value);
    Ok(())
}

fn by_protect(guest: &Guest, page: usize, word: usize, value: u64) -> Result<()> {
    guest.map.protect(page * PAGE, PAGE, R)?;
    std::hint::black_box(guest.map.get(page, word));
    guest.map.protect(page * PAGE, PAGE, RW)?;
    guest.map.set(page, word, value);
    Ok(())
}

fn by_other_process(guest: &Guest, page: usize, word: usize, value: u64) -> Result<()> {
    sys::fork(|| by_fresh_mapping(guest, page, word, value))?.expect_ok(Duration::from_secs(120))
}

fn by_read_syscall(guest: &Guest, page: usize, word: usize, value: u64) -> Result<()> {
    let (from, to) = nix::unistd::pipe()?;
    nix::unistd::write(&to, &value.to_ne_bytes())?;
    // read(2) from a pipe straight into the mapping.
    let remote = sys::read_into(&from, &guest.map, page * PAGE + word * 8, 8)?;
    eq("bytes read into the mapping", remote, 8)
}

const WRITERS: [Writer; 7] = [
    ("the mapping", by_mapping),
    ("write(2)", by_pwrite),
    ("process_vm_writev", by_process_vm),
    ("a fresh mapping", by_fresh_mapping),
    ("mprotect and the mapping", by_protect),
    ("another process", by_other_process),
    ("read(2) into the mapping", by_read_syscall),
];

fn write_breaks(ctx: &Ctx) -> Result<()> {
    let (mount, a, b) = merged_twins(ctx, 64)?;
    let sys = ctx.sys();
    for (i, (name, write)) in WRITERS.iter().enumerate() {
        let page = i * 4;
        let word = 37 * (i + 1) % WORDS;
        let vm = a.sysfs(ctx);
        let (breaks, of_vm) = (sys.get("cow_breaks")?, vm.get("cow_breaks")?);
        write(&a, page, word, 0xdead_0000 + i as u64).context(*name)?;
        let mut expected = content::page(1 + page as u64);
        expected[word] = 0xdead_0000 + i as u64;
        page_is(
            format!("page written by {name}"),
            &a.map.read_page(page),
            &expected,
        )?;
        b.holds(page, page + 1, 1)
            .with_context(|| format!("neighbour after {name}"))?;
        eq(
            format!("cow_breaks by {name}"),
            sys.get("cow_breaks")? - breaks,
            1,
        )?;
        eq(
            format!("cow_breaks of a by {name}"),
            vm.get("cow_breaks")? - of_vm,
            1,
        )?;
    }
    if let Ok(disk) = Disk::new(ctx, 1 << 20) {
        let source = Map::anonymous(PAGE)?;
        source.write_page(0, &content::page(4242));
        sys::pwrite_from(&disk.file, &source, 0, PAGE, 0)?;
        sys::pread_into(&disk.file, &a.map, 60 * PAGE, PAGE, 0).context("O_DIRECT")?;
        page_is(
            "page read by O_DIRECT",
            &a.map.read_page(60),
            &content::page(4242),
        )?;
    } else {
        println!("no disk: without O_DIRECT");
        a.map.write_page(60, &content::page(4242));
    }
    b.holds(0, 64, 1)?;
    let broken = WRITERS.len() as u64 + 1;
    eq("pages_sharing", sys.get("pages_sharing")?, 64 - broken)?;
    eq("pages_shared", sys.get("pages_shared")?, 64)?;
    ctx.expect_used("after the writes", &mount, "a", 4 * broken)?;
    ctx.expect_used("after the writes", &mount, "b", 0)?;
    // The last sharer writes as well: then nothing is left of the shared page.
    for page in (0..28).step_by(4) {
        b.map.set(page, 0, 1);
    }
    eq(
        "pages_shared after the last sharer's writes",
        sys.get("pages_shared")?,
        57,
    )
}

fn all_mappings(ctx: &Ctx) -> Result<()> {
    let (_mount, a, b) = twins(ctx, 64)?;
    let second = Map::shared(&a.file, 0, 64 * PAGE, RW)?;
    let turns = Map::anonymous(PAGE)?;
    let mut child = sys::fork(|| {
        let map = Map::shared(&a.file, 0, 64 * PAGE, RW)?;
        for page in 0..64 {
            page_is(
                "the child's page",
                &map.read_page(page),
                &content::page(1 + page as u64),
            )?;
        }
        turns.set(0, 0, 1);
        ctx.until("the merge", 60.0, || {
            Ok((turns.get(0, 0) == 2, "none".into()))
        })?;
        for page in 0..64 {
            page_is(
                "the child's page, merged",
                &map.read_page(page),
                &content::page(1 + page as u64),
            )?;
        }
        map.set(7, 7, 77);
        turns.set(0, 0, 3);
        ctx.until("the parent's write", 60.0, || {
            Ok((turns.get(0, 0) == 4, "none".into()))
        })?;
        eq("the parent's word in the child", map.get(8, 8), 88)
    })?;
    ctx.until("the child to map", 20.0, || {
        Ok((turns.get(0, 0) == 1, "not yet".into()))
    })?;
    page_is("second mapping", &second.read_page(5), &content::page(6))?;
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.until_is("pages_sharing", 64, SOON)?;
    sys.set("run", 0)?;
    a.holds(0, 64, 1)?;
    page_is(
        "second mapping, merged",
        &second.read_page(5),
        &content::page(6),
    )?;
    turns.set(0, 0, 2);
    ctx.until("the child's write", 20.0, || {
        Ok((turns.get(0, 0) == 3, "none".into()))
    })?;
    eq("the child's word by the first mapping", a.map.get(7, 7), 77)?;
    eq(
        "the child's word by the second mapping",
        second.get(7, 7),
        77,
    )?;
    second.set(8, 8, 88);
    eq("a word of the second by the first", a.map.get(8, 8), 88)?;
    turns.set(0, 0, 4);
    child.expect_ok(ctx.limit(60.0))?;
    b.holds(0, 64, 1)
}

fn read_only_maps(ctx: &Ctx) -> Result<()> {
    let (_mount, a, b) = twins(ctx, 64)?;
    let ro = Map::shared(&fs::File::open(&a.path)?, 0, 64 * PAGE, R)?;
    a.map.protect(0, 64 * PAGE, R)?;
    a.holds(0, 64, 1)?;
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.until_is("pages_sharing", 64, SOON)?;
    sys.set("run", 0)?;
    a.holds(0, 64, 1)?;
    // Touched while read-only, then writable: the write must still copy.
    a.map.protect(0, 64 * PAGE, RW)?;
    for page in 0..64 {
        a.map.set(page, 1, page as u64);
    }
    b.holds(0, 64, 1)?;
    for page in 0..64 {
        let mut expected = content::page(1 + page as u64);
        expected[1] = page as u64;
        page_is(
            format!("page {page} by the read-only mapping"),
            &ro.read_page(page),
            &expected,
        )?;
    }
    eq("pages_sharing", sys.get("pages_sharing")?, 0)
}

fn neighbour_ends(ctx: &Ctx) -> Result<()> {
    let (mount, a, b) = merged_twins(ctx, 128)?;
    let sys = ctx.sys();
    drop(b.map);
    eq(
        "pages_sharing after the neighbour's unmap",
        sys.get("pages_sharing")?,
        128,
    )?;
    fs::remove_file(&b.path)?;
    drop(b.file);
    eq("pages_sharing after its end", sys.get("pages_sharing")?, 0)?;
    a.holds(0, 128, 1)?;
    ctx.expect_used("after the neighbour's end", &mount, "a", 0)
        .or_else(|_| ctx.expect_used("given back to it", &mount, "a", 512))?;
    // The scanner may give single frames back to their slot; the data stay the same.
    sys.flat_out()?;
    ctx.passes(3)?;
    a.holds(0, 128, 1)?;
    a.fill(0, 128, 500);
    a.holds(0, 128, 500)?;
    eq("pages_sharing at the end", sys.get("pages_sharing")?, 0)
}

fn pinned(ctx: &Ctx) -> Result<()> {
    let (_mount, a, b) = twins(ctx, 16)?;
    let (from, to) = nix::unistd::pipe()?;
    sys::vmsplice(&to, &a.map, 0, PAGE)?;
    let held = sys::frames(&a.map)?[0];
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.until_is("pages_sharing", 15, SOON)?;
    ctx.passes(3)?;
    eq(
        "pages_sharing while page 0 is held",
        sys.get("pages_sharing")?,
        15,
    )?;
    // Each pass zaps the page before it sees that it is held: look while nothing does.
    sys.set("run", 0)?;
    a.holds(0, 16, 1)?;
    eq("frame of the held page", sys::frames(&a.map)?[0], held)?;
    sys.set("run", 1)?;
    let mut seen = vec![0; PAGE];
    fs::File::from(from).read_exact(&mut seen)?;
    bytes_are("what the pipe held", &seen, &page_bytes(1))?;
    drop(to);
    ctx.until_is("pages_sharing", 16, SOON)?;
    a.holds(0, 16, 1)?;
    b.holds(0, 16, 1)
}

fn cold_then_equal(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let (a, b) = (mount.guest("a", 512)?, mount.guest("b", 512)?);
    a.fill(0, 512, 1);
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.passes(8)?;
    eq("pages_sharing before", sys.get("pages_sharing")?, 0)?;
    ctx.until_is("pages_unshared", 512, SOON)?;
    b.fill(0, 512, 1);
    ctx.until_is("pages_sharing", 512, SOON)?;
    a.holds(0, 512, 1)?;
    b.holds(0, 512, 1)
}

fn stale_hash(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let count = WRITERS.len();
    let (a, b) = (mount.guest("a", count)?, mount.guest("b", count)?);
    a.fill(0, count, 1);
    b.fill(0, count, 1);
    for page in 0..count {
        b.map.set(page, 200, 9);
    }
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.passes(8)?;
    eq(
        "pages_sharing of unlike pages",
        sys.get("pages_sharing")?,
        0,
    )?;
    // Both are cold by now; each writer makes one page of `a` equal to that of `b`.
    for (page, (name, write)) in WRITERS.iter().enumerate() {
        write(&a, page, 200, 9).context(*name)?;
        ctx.until_is("pages_sharing", page as u64 + 1, SOON)
            .with_context(|| format!("after a write by {name}"))?;
    }
    for page in 0..count {
        let mut expected = content::page(1 + page as u64);
        expected[200] = 9;
        page_is(format!("a {page}"), &a.map.read_page(page), &expected)?;
        page_is(format!("b {page}"), &b.map.read_page(page), &expected)?;
    }
    Ok(())
}
