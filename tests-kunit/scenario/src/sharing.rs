// SPDX-License-Identifier: GPL-2.0

//! Sharing: what merges, what never does, what breaks it, and what the counters say.

use std::collections::BTreeSet;
use std::fs;
use std::io::{IoSlice, Read};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::sys::uio::{process_vm_writev, RemoteIoVec};
use nix::unistd::Pid;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::check::{bytes_are, eq, fails_any, page_is, that, within};
use crate::content::{self, page_bytes, pages_bytes};
use crate::ctx::{Ctx, Guest, Mount};
use crate::harness::Case;
use crate::mapping::Disk;
use crate::sys::{self, Map, PAGE, R, RW, WORDS};
use crate::sysfs::{Node, Sys};

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
    Case::thinram(
        "share/off",
        "share=0 keeps a VM out, and breaks what is",
        off,
    ),
    Case::thinram(
        "share/domain-change",
        "a live change of domain breaks at once",
        domain_change,
    ),
    Case::thinram("share/scope", "share_scope vm, domain, host, live", scope),
    Case::thinram(
        "share/zero-only",
        "zero_only merges zeroes alone",
        zero_only,
    ),
    Case::thinram(
        "share/max-sharers",
        "max_page_sharing caps one frame's sharers",
        max_sharers,
    ),
    Case::thinram("share/run-stop", "run 0 stops the scan at once", run_stop),
    Case::thinram(
        "share/run-unshare",
        "run 2 unshares everything, data intact",
        run_unshare,
    ),
    Case::thinram(
        "share/pace-pages",
        "scan_pages_per_sec is a ceiling",
        pace_pages,
    ),
    Case::thinram(
        "share/pace-change",
        "a change of pace takes effect at once",
        pace_change,
    ),
    Case::thinram(
        "share/pace-cpu",
        "scan_cpu_max_percent is a ceiling",
        pace_cpu,
    ),
    Case::thinram(
        "share/pace-period",
        "scan_period_secs spreads a pass",
        pace_period,
    ),
    Case::thinram(
        "share/pace-vm",
        "a VM's own ceiling holds back that VM alone",
        pace_vm,
    ),
    Case::thinram(
        "share/full-scans",
        "full_scans and pages_scanned count",
        full_scans,
    ),
    Case::thinram(
        "share/freed",
        "freed memory leaves the index at once",
        freed,
    ),
    Case::thinram(
        "share/volatile",
        "pages that change are counted, not merged",
        volatile,
    ),
    Case::thinram(
        "share/back-off",
        "pages that break again and again are left",
        back_off,
    ),
    Case::thinram(
        "share/sum",
        "states add up to the size at every moment",
        sum,
    )
    .span(5.0),
    Case::thinram(
        "share/counters",
        "saved_kb, general_profit and VM counters agree",
        counters,
    ),
    Case::thinram(
        "share/bad-values",
        "bad values: EINVAL or ERANGE, no change",
        bad_values,
    ),
    Case::thinram(
        "share/all-gone",
        "every counter is 0 when all is unmounted",
        all_gone,
    ),
];

/// Seconds within which a few hundred pages surely merge.
const SOON: f64 = 30.0;

/// Two guests of `pages` pages in one domain, page `i` of both made from seed `i`.
fn twins<'a>(ctx: &'a Ctx, pages: usize) -> Result<(Mount<'a>, Guest, Guest)> {
    let mount = ctx.mount("m", "size=256M,domain=lab")?;
    let (a, b) = (mount.guest("a", pages)?, mount.guest("b", pages)?);
    a.fill(0, pages, 1);
    b.fill(0, pages, 1);
    Ok((mount, a, b))
}

/// [`twins`], merged, and the scanner stopped again.
fn merged_twins<'a>(ctx: &'a Ctx, pages: usize) -> Result<(Mount<'a>, Guest, Guest)> {
    let (mount, a, b) = twins(ctx, pages)?;
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.until_is("pages_sharing", pages as u64, SOON)?;
    sys.set("run", 0)?;
    Ok((mount, a, b))
}

/// The physical frames of `guest`, every page touched.
fn frames(guest: &Guest) -> Result<BTreeSet<u64>> {
    let mut sum = 0u64;
    for page in 0..guest.map.pages() {
        sum = sum.wrapping_add(guest.map.get(page, 0));
    }
    std::hint::black_box(sum);
    Ok(sys::frames(&guest.map)?.into_iter().flatten().collect())
}

/// No frame is mapped by both.
fn apart(what: &str, a: &Guest, b: &Guest) -> Result<()> {
    let (a_frames, b_frames) = (frames(a)?, frames(b)?);
    let common = a_frames.intersection(&b_frames).count();
    eq(
        format!("{what}: frames common to {} and {}", a.name, b.name),
        common,
        0,
    )
}

/// Both map the very same frames.
fn together(a: &Guest, b: &Guest) -> Result<()> {
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

fn first_pass(ctx: &Ctx) -> Result<()> {
    let (_mount, a, b) = twins(ctx, 1024)?;
    let sys = ctx.sys();
    // Slow enough to look right after the first pass over these 2048 pages.
    sys.set("scan_pages_per_sec", 2000)?;
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
    sys::fork(|| by_fresh_mapping(guest, page, word, value))?.expect_ok(Duration::from_secs(20))
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
    a.holds(0, 16, 1)?;
    eq("frame of the held page", sys::frames(&a.map)?[0], held)?;
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

fn off(ctx: &Ctx) -> Result<()> {
    let (mount, a, b) = merged_twins(ctx, 128)?;
    let sys = ctx.sys();
    let vm = b.sysfs(ctx);
    eq("share", vm.get("share")?, 1)?;
    vm.set("share", 0)?;
    // At once, with the scanner stopped.
    eq(
        "shared_kb of b when the write returned",
        vm.get("shared_kb")?,
        0,
    )?;
    eq(
        "pages_sharing when the write returned",
        sys.get("pages_sharing")?,
        0,
    )?;
    apart("when the write returned", &a, &b)?;
    ctx.expect_used("when the write returned", &mount, "b", 512)?;
    a.holds(0, 128, 1)?;
    b.holds(0, 128, 1)?;
    sys.flat_out()?;
    ctx.passes(4)?;
    eq(
        "pages_sharing while share is 0",
        sys.get("pages_sharing")?,
        0,
    )?;
    eq("shared_kb of b while share is 0", vm.get("shared_kb")?, 0)?;
    apart("after passes with share 0", &a, &b)?;
    vm.set("share", 1)?;
    ctx.until_is("pages_sharing", 128, SOON)?;
    a.holds(0, 128, 1)?;
    b.holds(0, 128, 1)
}

fn domain_change(ctx: &Ctx) -> Result<()> {
    let (mount, a, b) = twins(ctx, 64)?;
    let c = mount.guest("c", 64)?;
    c.fill(0, 64, 1);
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.until_is("pages_sharing", 128, SOON)?;
    sys.set("run", 0)?;
    let intact = || -> Result<()> {
        for guest in [&a, &b, &c] {
            guest.holds(0, 64, 1)?;
            guest.sysfs(ctx).stat()?.check_sum()?;
        }
        Ok(())
    };
    c.sysfs(ctx).set("domain", "other")?;
    eq(
        "domain of c",
        c.sysfs(ctx).word("domain")?,
        "other".to_owned(),
    )?;
    apart("when the write returned", &a, &c)?;
    apart("when the write returned", &b, &c)?;
    within("pages_sharing without c", sys.get("pages_sharing")?, 0, 64)?;
    intact()?;
    b.sysfs(ctx).set("domain", "other")?;
    apart("when the second write returned", &a, &b)?;
    eq(
        "pages_sharing with b and c newly together",
        sys.get("pages_sharing")?,
        0,
    )?;
    intact()?;
    sys.flat_out()?;
    ctx.until_is("pages_sharing", 64, SOON)?;
    ctx.passes(3)?;
    sys.set("run", 0)?;
    eq(
        "pages_sharing in the new domain",
        sys.get("pages_sharing")?,
        64,
    )?;
    together(&b, &c)?;
    apart("after the scan", &a, &b)?;
    intact()
}

fn scope(ctx: &Ctx) -> Result<()> {
    let one = ctx.mount("one", "size=64M,domain=one")?;
    let two = ctx.mount("two", "size=64M,domain=two")?;
    let guests = [
        one.guest("a", 64)?,
        one.guest("b", 64)?,
        two.guest("c", 64)?,
    ];
    // 32 contents that each VM has once, 16 that each has twice.
    for guest in &guests {
        guest.fill(0, 48, 1);
        for page in 48..64 {
            guest
                .map
                .write_page(page, &content::page(1 + page as u64 - 16));
        }
    }
    let intact = || -> Result<()> {
        for guest in &guests {
            guest.holds(0, 48, 1)?;
            for page in 48..64 {
                let expected = content::page(1 + page as u64 - 16);
                page_is(
                    format!("{} {page}", guest.name),
                    &guest.map.read_page(page),
                    &expected,
                )?;
            }
        }
        Ok(())
    };
    let [a, b, c] = &guests;
    let sys = ctx.sys();
    eq(
        "share_scope at first",
        sys.word("share_scope")?,
        "domain".to_owned(),
    )?;
    sys.flat_out()?;
    // a and b: 32 with 2 sharers, 16 with 4; c: 16 with 2.
    ctx.until_is("pages_sharing", 32 + 48 + 16, SOON)?;
    eq("pages_shared in scope domain", sys.get("pages_shared")?, 64)?;
    apart("in scope domain", a, c)?;
    sys.set("share_scope", "host")?;
    // The 32 are found in c as well. Of the 16, each domain has a frame already, and these need
    // not become one.
    ctx.until_least("pages_sharing", 64 + 48 + 16, SOON)?;
    within(
        "pages_sharing in scope host",
        sys.get("pages_sharing")?,
        128,
        144,
    )?;
    intact()?;
    sys.set("run", 0)?;
    sys.set("share_scope", "vm")?;
    apart("when scope vm was set", a, b)?;
    apart("when scope vm was set", a, c)?;
    apart("when scope vm was set", b, c)?;
    within(
        "pages_sharing when scope vm was set",
        sys.get("pages_sharing")?,
        0,
        48,
    )?;
    intact()?;
    sys.set("run", 1)?;
    ctx.until_is("pages_sharing", 48, SOON)?;
    eq("pages_shared in scope vm", sys.get("pages_shared")?, 48)?;
    sys.set("share_scope", "domain")?;
    ctx.until_is("pages_sharing", 96, SOON)?;
    apart("in scope domain again", a, c)?;
    apart("in scope domain again", b, c)?;
    intact()
}

fn zero_only(ctx: &Ctx) -> Result<()> {
    let (_mount, a, b) = twins(ctx, 64)?;
    for page in 0..16 {
        a.map.write_page(page, &[0; WORDS]);
    }
    let sys = ctx.sys();
    sys.set("zero_only", 1)?;
    sys.flat_out()?;
    ctx.until_is("zero_pages", 16, SOON)?;
    ctx.passes(3)?;
    eq("pages_sharing with zero_only", sys.get("pages_sharing")?, 0)?;
    sys.set("zero_only", 0)?;
    ctx.until_is("pages_sharing", 48, SOON)?;
    a.is_zero(0, 16)?;
    a.holds(16, 64, 1)?;
    b.holds(0, 64, 1)
}

fn max_sharers(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M")?;
    let guest = mount.guest("web", 64)?;
    for page in 0..64 {
        guest.map.write_page(page, &content::page(7));
    }
    let sys = ctx.sys();
    sys.set("max_page_sharing", 4)?;
    sys.flat_out()?;
    ctx.until("64 pages on frames of at most 4", SOON, || {
        let (shared, sharing) = (sys.get("pages_shared")?, sys.get("pages_sharing")?);
        Ok((
            shared + sharing == 64,
            format!("shared {shared}, sharing {sharing}"),
        ))
    })?;
    ctx.passes(2)?;
    sys.set("run", 0)?;
    let shared = sys.get("pages_shared")?;
    within("pages_shared", shared, 16, 24)?;
    for page in 0..64 {
        page_is(
            format!("page {page}"),
            &guest.map.read_page(page),
            &content::page(7),
        )?;
    }
    let all: Vec<u64> = sys::frames(&guest.map)?.into_iter().flatten().collect();
    let distinct: BTreeSet<u64> = all.iter().copied().collect();
    eq("pages with a frame", all.len(), 64)?;
    eq("distinct frames", distinct.len() as u64, shared)?;
    for frame in distinct {
        within(
            "sharers of a frame",
            all.iter().filter(|f| **f == frame).count(),
            1,
            4,
        )?;
    }
    Ok(())
}

fn run_stop(ctx: &Ctx) -> Result<()> {
    let (_mount, a, b) = merged_twins(ctx, 256)?;
    let sys = ctx.sys();
    eq("run", sys.get("run")?, 0)?;
    let seen = || -> Result<Vec<u64>> {
        [
            "pages_scanned",
            "full_scans",
            "pages_shared",
            "pages_sharing",
            "scan_cpu_ms",
        ]
        .iter()
        .map(|name| sys.get(name))
        .collect()
    };
    // New duplicates appear, and nobody looks at them.
    a.fill(0, 128, 900);
    b.fill(0, 128, 900);
    let before = seen()?;
    thread::sleep(ctx.limit(0.5));
    eq(
        "scanned, full scans, shared, sharing, CPU while stopped",
        seen()?,
        before,
    )?;
    sys.set("run", 1)?;
    ctx.until_is("pages_sharing", 256, SOON)?;
    a.holds(0, 128, 900)?;
    b.holds(128, 256, 1)
}

fn run_unshare(ctx: &Ctx) -> Result<()> {
    let (mount, a, b) = twins(ctx, 256)?;
    let zeroes = mount.guest("c", 64)?;
    zeroes.fill(0, 64, 1);
    for page in 0..32 {
        zeroes.map.write_page(page, &[0; WORDS]);
    }
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.until_is("pages_sharing", 256 + 32, SOON)?;
    ctx.until_is("zero_pages", 32, SOON)?;
    sys.set("run", 2)?;
    eq("run", sys.get("run")?, 2)?;
    eq("pages_sharing", sys.get("pages_sharing")?, 0)?;
    eq("pages_shared", sys.get("pages_shared")?, 0)?;
    eq("zero_pages", sys.get("zero_pages")?, 32)?;
    for guest in [&a, &b] {
        eq("shared_kb", guest.sysfs(ctx).get("shared_kb")?, 0)?;
        ctx.expect_used("unshared", &mount, &guest.name, 1024)?;
        guest.holds(0, 256, 1)?;
    }
    apart("unshared", &a, &b)?;
    zeroes.is_zero(0, 32)?;
    zeroes.holds(32, 64, 1)?;
    let scanned = passed(&sys)?;
    thread::sleep(ctx.limit(0.3));
    eq("pages scanned while run is 2", passed(&sys)?, scanned)?;
    sys.set("run", 1)?;
    ctx.until_is("pages_sharing", 256 + 32, SOON)?;
    a.holds(0, 256, 1)?;
    b.holds(0, 256, 1)
}

/// Private pages that the scan came by so far, whether it hashed them or knew that nothing changed.
fn passed(sys: &Sys) -> Result<u64> {
    Ok(sys.get("pages_scanned")? + sys.get("pages_skipped")?)
}

/// Pages scanned within `seconds`, and how long that really was.
fn scanned_in(sys: &Sys, seconds: f64) -> Result<(f64, f64)> {
    let (start, before) = (Instant::now(), passed(sys)?);
    thread::sleep(Duration::from_secs_f64(seconds));
    let after = passed(sys)?;
    Ok(((after - before) as f64, start.elapsed().as_secs_f64()))
}

/// Waits until the scan came by `pages` more pages.
fn until_passed(ctx: &Ctx, pages: u64, seconds: f64) -> Result<()> {
    let sys = ctx.sys();
    let before = passed(&sys)?;
    ctx.until(&format!("{pages} pages more"), seconds, || {
        let seen = passed(&sys)? - before;
        Ok((seen >= pages, seen.to_string()))
    })
}

/// A guest large enough that one pass takes a while, and the scanner without other ceilings.
fn paced<'a>(ctx: &'a Ctx, pages: usize) -> Result<(Mount<'a>, Guest)> {
    let mount = ctx.mount("m", "size=512M")?;
    let guest = mount.guest("web", pages)?;
    guest.fill(0, pages, 1);
    Ok((mount, guest))
}

fn pace_pages(ctx: &Ctx) -> Result<()> {
    let (_mount, guest) = paced(ctx, 16384)?;
    let sys = ctx.sys();
    sys.set("scan_pages_per_sec", 2000)?;
    sys.flat_out_but_pages()?;
    thread::sleep(Duration::from_millis(300));
    for rate in [2000.0, 500.0, 4000.0] {
        sys.set("scan_pages_per_sec", rate as u64)?;
        thread::sleep(Duration::from_millis(200));
        let (pages, seconds) = scanned_in(&sys, 3.0)?;
        println!("{rate} pages/s: {:.0}", pages / seconds);
        // A batch may straddle either end of the window.
        let low = if ctx.setup.patience > 2.0 { 0.2 } else { 0.7 };
        within(
            "pages scanned",
            pages,
            rate * seconds * low,
            rate * seconds * 1.1 + 128.0,
        )?;
    }
    guest.holds(0, 64, 1)
}

fn pace_change(ctx: &Ctx) -> Result<()> {
    let (_mount, _guest) = paced(ctx, 16384)?;
    let sys = ctx.sys();
    sys.set("scan_pages_per_sec", 1)?;
    sys.flat_out_but_pages()?;
    thread::sleep(Duration::from_millis(500));
    for round in 0..3 {
        let (pages, _) = scanned_in(&sys, 1.0)?;
        within(
            format!("round {round}: pages in a second at 1 a second"),
            pages,
            0.0,
            128.0,
        )?;
        sys.set("scan_pages_per_sec", 0)?;
        // At 1 a second this would take hours: the sleep must have been cut short.
        until_passed(ctx, 5000, 2.0)
            .with_context(|| format!("round {round}: after the ceiling went"))?;
        sys.set("scan_pages_per_sec", 1)?;
        thread::sleep(Duration::from_millis(100));
    }
    // The other paces are no different.
    sys.set("scan_pages_per_sec", 0)?;
    sys.set("scan_period_secs", 86400)?;
    thread::sleep(Duration::from_millis(200));
    let (pages, _) = scanned_in(&sys, 1.0)?;
    within("pages in a second at a pass a day", pages, 0.0, 128.0)?;
    sys.flat_out()?;
    until_passed(ctx, 5000, 2.0).context("after the period was shortened")
}

fn pace_cpu(ctx: &Ctx) -> Result<()> {
    let (_mount, _guest) = paced(ctx, 16384)?;
    let sys = ctx.sys();
    sys.flat_out()?;
    for percent in [5.0, 20.0] {
        sys.set("scan_cpu_max_percent", percent as u64)?;
        thread::sleep(Duration::from_millis(300));
        let (start, cpu, pages) = (Instant::now(), sys.get("scan_cpu_ms")?, passed(&sys)?);
        thread::sleep(Duration::from_secs(3));
        let used = (sys.get("scan_cpu_ms")? - cpu) as f64;
        let wall = start.elapsed().as_secs_f64() * 1000.0;
        println!("ceiling {percent} %: {:.1} %", used * 100.0 / wall);
        // A batch and a tick of the clock more than the share, more where clocks are coarse.
        let slack = if ctx.setup.patience > 2.0 { 1.5 } else { 1.2 };
        within("CPU ms", used, 0.0, wall * percent / 100.0 * slack + 20.0)?;
        that("the scan went on", passed(&sys)? > pages)?;
    }
    Ok(())
}

fn pace_period(ctx: &Ctx) -> Result<()> {
    let (_mount, _guest) = paced(ctx, 8192)?;
    let sys = ctx.sys();
    sys.flat_out()?;
    sys.set("scan_period_secs", 4)?;
    thread::sleep(Duration::from_millis(500));
    let (pages, seconds) = scanned_in(&sys, 3.0)?;
    let rate = 8192.0 / 4.0;
    println!(
        "{:.0} pages/s, {rate} would be one pass in 4 s",
        pages / seconds
    );
    let low = if ctx.setup.patience > 2.0 { 0.2 } else { 0.6 };
    within(
        "pages scanned",
        pages,
        rate * seconds * low,
        rate * seconds * 1.5 + 128.0,
    )
}

fn pace_vm(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M")?;
    let (slow, quick) = (mount.guest("slow", 4096)?, mount.guest("quick", 4096)?);
    for guest in [&slow, &quick] {
        sys::fallocate(&guest.file, 0, 0, 4096 * PAGE as i64)?;
    }
    let (slow, quick) = (slow.sysfs(ctx), quick.sysfs(ctx));
    slow.set("scan_pages_per_sec", 300)?;
    let sys = ctx.sys();
    let start = Instant::now();
    sys.flat_out()?;
    ctx.until("all zeroes of the quick VM", SOON, || {
        let kb = quick.get("zero_kb")?;
        Ok((kb == 16384, format!("{kb} KiB")))
    })?;
    thread::sleep(Duration::from_secs(2));
    let found = slow.get("zero_kb")? as f64 / 4.0;
    let seconds = start.elapsed().as_secs_f64();
    println!("slow VM: {found} zeroes in {seconds:.1} s");
    within(
        "pages of the slow VM",
        found,
        1.0,
        (seconds * 300.0 * 1.2 + 128.0).min(4095.0),
    )?;
    slow.set("scan_pages_per_sec", 0)?;
    ctx.until("all zeroes of the slow VM", SOON, || {
        let kb = slow.get("zero_kb")?;
        Ok((kb == 16384, format!("{kb} KiB")))
    })
}

fn full_scans(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M")?;
    let guest = mount.guest("web", 1000)?;
    guest.fill(0, 1000, 1);
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.passes(1)?;
    let (scans, pages) = (sys.get("full_scans")?, passed(&sys)?);
    ctx.until_least("full_scans", scans + 10, SOON)?;
    let (scans, pages) = (sys.get("full_scans")? - scans, passed(&sys)? - pages);
    sys.set("run", 0)?;
    // Whole passes over 1000 pages, and at most one more that was under way at either end.
    within(
        "pages of these passes",
        pages,
        (scans - 1) * 1000,
        (scans + 2) * 1000,
    )?;
    ctx.expect_used("after the passes", &mount, "web", 4000)
}

fn freed(ctx: &Ctx) -> Result<()> {
    let (mount, a, b) = merged_twins(ctx, 256)?;
    let sys = ctx.sys();
    let zeroes = mount.guest("c", 64)?;
    zeroes.fill(0, 64, 3000);
    for page in 0..64 {
        zeroes.map.write_page(page, &[0; WORDS]);
    }
    sys.set("run", 1)?;
    ctx.until_is("zero_pages", 64, SOON)?;
    sys.set("run", 0)?;
    sys::punch(&a.file, 0, 64 * PAGE as u64)?;
    eq("pages_sharing after a hole", sys.get("pages_sharing")?, 192)?;
    eq("pages_shared after a hole", sys.get("pages_shared")?, 256)?;
    sys::punch(&b.file, 0, 64 * PAGE as u64)?;
    eq(
        "pages_shared after both holes",
        sys.get("pages_shared")?,
        192,
    )?;
    eq(
        "shared_frames_kb after both holes",
        sys.get("shared_frames_kb")?,
        768,
    )?;
    a.file.set_len(128 * PAGE as u64)?;
    eq("pages_sharing after the cut", sys.get("pages_sharing")?, 64)?;
    b.file.set_len(128 * PAGE as u64)?;
    eq("pages_shared after both cuts", sys.get("pages_shared")?, 64)?;
    a.map.advise(64 * PAGE, 32 * PAGE, libc::MADV_REMOVE)?;
    eq(
        "pages_sharing after MADV_REMOVE",
        sys.get("pages_sharing")?,
        32,
    )?;
    sys::punch(&zeroes.file, 0, 32 * PAGE as u64)?;
    eq("zero_pages after a hole", sys.get("zero_pages")?, 32)?;
    fs::remove_file(&b.path)?;
    drop(b);
    eq(
        "pages_sharing after the neighbour's end",
        sys.get("pages_sharing")?,
        0,
    )?;
    fs::remove_file(&zeroes.path)?;
    drop(zeroes);
    eq(
        "zero_pages after the end of their VM",
        sys.get("zero_pages")?,
        0,
    )?;
    a.holds(96, 128, 1)?;
    a.is_zero(64, 96)
}

fn volatile(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M")?;
    let guest = mount.guest("web", 256)?;
    guest.fill(0, 256, 1);
    let stop = AtomicBool::new(false);
    let sys = ctx.sys();
    // A pass takes long enough for every one of the 64 pages to change in between.
    sys.flat_out_but_pages()?;
    sys.set("scan_pages_per_sec", 2000)?;
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut round = 1u64;
            while !stop.load(Ordering::Relaxed) {
                for page in 0..64 {
                    guest.map.set(page, (round % 512) as usize, round);
                }
                round += 1;
                thread::sleep(Duration::from_millis(5));
            }
        });
        let seen = ctx
            .until("60 to 64 volatile pages", SOON, || {
                let pages = sys.get("pages_volatile")?;
                Ok(((60..=64).contains(&pages), pages.to_string()))
            })
            .and_then(|()| ctx.until_is("pages_unshared", 192, SOON))
            .and_then(|()| eq("pages_sharing", sys.get("pages_sharing")?, 0));
        stop.store(true, Ordering::Relaxed);
        let ended = writer
            .join()
            .map_err(|_| anyhow::anyhow!("the writer panicked"));
        seen.and(ended)
    })?;
    ctx.until_is("pages_volatile", 0, SOON)
        .context("after the writes ended")?;
    guest.holds(64, 256, 1)
}

fn back_off(ctx: &Ctx) -> Result<()> {
    let (_mount, a, b) = twins(ctx, 64)?;
    let sys = ctx.sys();
    sys.flat_out_but_pages()?;
    sys.set("scan_pages_per_sec", 4000)?;
    let start = (sys.get("full_scans")?, sys.get("cow_breaks")?);
    let mut writes = 0u64;
    // Every page is broken as soon as it is merged, and at once equal again.
    while sys.get("full_scans")? < start.0 + 40 {
        for page in 0..64 {
            let word = a.map.get(page, 0);
            a.map.set(page, 0, word);
        }
        writes += 1;
        thread::sleep(Duration::from_millis(2));
    }
    sys.set("run", 0)?;
    let breaks = sys.get("cow_breaks")? - start.1;
    println!("{breaks} breaks of 64 pages in 40 passes, {writes} rounds of writes");
    // Without a back-off each pass would merge and each round break: 64 * 40.
    within("breaks", breaks, 64, 64 * 20)?;
    a.holds(0, 64, 1)?;
    b.holds(0, 64, 1)?;
    sys.flat_out()?;
    ctx.until_is("pages_sharing", 64, SOON)
        .context("after the writes ended")
}

fn sum(ctx: &Ctx) -> Result<()> {
    let (mount, a, b) = twins(ctx, 512)?;
    let sys = ctx.sys();
    sys.flat_out()?;
    let stop = AtomicBool::new(false);
    let samples = AtomicU64::new(0);
    let (vm_a, vm_b) = (a.sysfs(ctx), b.sysfs(ctx));
    let sample = || -> Result<()> {
        while !stop.load(Ordering::Relaxed) {
            for vm in [&vm_a, &vm_b] {
                vm.stat()?
                    .check_sum()
                    .with_context(|| format!("vms/{}", vm.name))?;
                samples.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    };
    let mut rng = SmallRng::seed_from_u64(ctx.setup.seed);
    let end = Instant::now() + ctx.span(5.0);
    thread::scope(|scope| -> Result<()> {
        let sampler = scope.spawn(sample);
        let mut work = || -> Result<()> {
            while Instant::now() < end && !sampler.is_finished() {
                let guest = if rng.random() { &a } else { &b };
                let page = rng.random_range(0..400usize);
                let len = rng.random_range(1..64usize);
                let (from, bytes) = ((page * PAGE) as u64, (len * PAGE) as u64);
                match rng.random_range(0..20) {
                    0..=11 => guest.fill(page, page + len, 1),
                    12 | 13 => guest.map.write_page(page, &[0; WORDS]),
                    14 | 15 => sys::punch(&guest.file, from, bytes)?,
                    16 => sys::fallocate(&guest.file, 0, from as i64, bytes as i64)?,
                    17 => {
                        guest.file.set_len(480 * PAGE as u64)?;
                        guest.file.set_len(512 * PAGE as u64)?;
                    }
                    18 => {
                        let value = rng.random_range(0..2);
                        guest.sysfs(ctx).set("share", value)?;
                    }
                    _ => {
                        let file = mount.file(&guest.name, "dimm", 64)?;
                        file.write_all_at(&pages_bytes(1, 64), 0)?;
                        fs::remove_file(mount.at(&guest.name).join("dimm"))?;
                    }
                }
            }
            Ok(())
        };
        let worked = work();
        stop.store(true, Ordering::Relaxed);
        let sampled = sampler
            .join()
            .map_err(|_| anyhow::anyhow!("the sampler panicked"))?;
        sampled.and(worked)
    })?;
    let samples = samples.load(Ordering::Relaxed);
    println!("{samples} samples, seed {}", ctx.setup.seed);
    within("samples", samples, 20, u64::MAX)
}

fn counters(ctx: &Ctx) -> Result<()> {
    let (mount, a, b) = merged_twins(ctx, 128)?;
    let sys = ctx.sys();
    let c = mount.guest("c", 64)?;
    sys::fallocate(&c.file, 0, 0, 64 * PAGE as i64)?;
    sys.set("run", 1)?;
    ctx.until_is("zero_pages", 64, SOON)?;
    sys.set("run", 0)?;
    let agree = |when: &str| -> Result<()> {
        let saved = 4 * (sys.get("pages_sharing")? + sys.get("zero_pages")?);
        eq(format!("saved_kb {when}"), sys.get("saved_kb")?, saved)?;
        let metadata = i64::try_from(sys.get("metadata_bytes")?)?;
        let profit: i64 = sys
            .word("general_profit")?
            .parse()
            .context("general_profit")?;
        eq(
            format!("general_profit {when}"),
            profit,
            i64::try_from(saved)? * 1024 - metadata,
        )?;
        let mut shared = 0;
        for guest in [&a, &b, &c] {
            let vm = guest.sysfs(ctx);
            let stat = vm.stat()?;
            stat.check_sum()?;
            for name in ["size_kb", "private_kb", "shared_kb", "zero_kb", "empty_kb"] {
                eq(
                    format!("{name} of {} {when}", vm.name),
                    vm.get(name)?,
                    stat.get(name)?,
                )?;
            }
            shared += stat.get("shared_kb")?;
        }
        let slots = sys.get("pages_shared")? + sys.get("pages_sharing")?;
        eq(format!("KiB in shared slots {when}"), shared, 4 * slots)
    };
    agree("merged")?;
    eq("pages_shared merged", sys.get("pages_shared")?, 128)?;
    a.fill(0, 10, 5000);
    agree("after writes")?;
    sys::punch(&b.file, 0, 20 * PAGE as u64)?;
    agree("after a hole")?;
    c.fill(0, 30, 1);
    agree("after writes to zeroes")?;
    let metadata = sys.get("metadata_bytes")?;
    println!("{metadata} bytes of metadata for 320 pages");
    that("metadata is counted", metadata >= 320 * 8)
}

/// Values that no number file takes.
const NO_NUMBERS: [&[u8]; 11] = [
    b"\n",
    b"x",
    b"-1",
    b"99999999999999999999999",
    b"12x",
    b" ",
    b"1.5",
    b"1 2",
    b"+",
    b"1\n2",
    b"\0",
];

fn refuses(node: &Node, name: &str, value: &[u8]) -> Result<()> {
    let before = node.word(name)?;
    let shown = String::from_utf8_lossy(value).escape_debug().to_string();
    let done = node.try_set(name, value);
    fails_any(
        format!("{shown:?} to {name}"),
        done,
        &[Errno::EINVAL, Errno::ERANGE],
    )?;
    eq(
        format!("{name} after the refusal of {shown:?}"),
        node.word(name)?,
        before,
    )
}

fn bad_values(ctx: &Ctx) -> Result<()> {
    let (_mount, a, b) = merged_twins(ctx, 16)?;
    let sys = ctx.sys();
    for name in [
        "run",
        "scan_pages_per_sec",
        "scan_period_secs",
        "scan_cpu_max_percent",
        "zero_only",
        "merge_across_nodes",
        "max_page_sharing",
    ] {
        for value in NO_NUMBERS {
            refuses(&sys, name, value)?;
        }
    }
    let limits: [(&str, &[&[u8]]); 8] = [
        ("run", &[b"3", b"256"]),
        ("zero_only", &[b"2"]),
        ("merge_across_nodes", &[b"2"]),
        ("max_page_sharing", &[b"0", b"1", b"1048577"]),
        ("scan_cpu_max_percent", &[b"0", b"101"]),
        ("scan_pages_per_sec", &[b"18446744073709551616"]),
        ("scan_period_secs", &[b"18446744073709551616"]),
        (
            "share_scope",
            &[b"\n", b"vms", b"Domain", b"vm domain", b"0", b"[vm]"],
        ),
    ];
    for (name, values) in limits {
        for value in values {
            refuses(&sys, name, value)?;
        }
    }
    let vm = a.sysfs(ctx);
    for name in ["share", "scan_pages_per_sec"] {
        for value in NO_NUMBERS {
            refuses(&vm, name, value)?;
        }
    }
    refuses(&vm, "share", b"2")?;
    let long = [b'd'; 4000];
    refuses(&vm, "domain", &long)?;
    refuses(&vm, "domain", b"not utf-8 \xff")?;
    refuses(&vm, "domain", b"..")?;
    refuses(&vm, "domain", b"a\nb")?;
    // State is not writable, unknown names are not there.
    for name in [
        "pages_shared",
        "pages_sharing",
        "full_scans",
        "metadata_bytes",
    ] {
        let done = sys.try_set(name, b"1");
        fails_any(
            format!("a write to {name}"),
            done,
            &[Errno::EACCES, Errno::EPERM, Errno::EIO],
        )?;
    }
    // Good ones with and without a newline, at the ends of their ranges.
    for (name, values) in [
        ("max_page_sharing", ["2", "1048576\n"]),
        ("scan_cpu_max_percent", ["1\n", "100"]),
        ("scan_pages_per_sec", ["0", "1000000\n"]),
        ("zero_only", ["1\n", "0"]),
        ("merge_across_nodes", ["0\n", "1"]),
        ("share_scope", ["host\n", "domain"]),
    ] {
        for value in values {
            sys.set(name, value)?;
            eq(name, sys.word(name)?, value.trim_end().to_owned())?;
        }
    }
    eq(
        "pages_sharing after all that",
        sys.get("pages_sharing")?,
        16,
    )?;
    a.holds(0, 16, 1)?;
    b.holds(0, 16, 1)
}

fn all_gone(ctx: &Ctx) -> Result<()> {
    let sys = ctx.sys();
    let states = [
        "pages_shared",
        "pages_sharing",
        "saved_kb",
        "shared_frames_kb",
        "pages_unshared",
        "pages_volatile",
        "zero_pages",
    ];
    let base = sys.get("metadata_bytes")?;
    for round in 0..3 {
        let (mount, a, b) = twins(ctx, 512)?;
        for page in 0..64 {
            a.map.write_page(page, &[0; WORDS]);
        }
        b.fill(400, 512, 10_000);
        sys.flat_out()?;
        ctx.until_is("pages_sharing", 336, SOON)?;
        ctx.until_is("zero_pages", 64, SOON)?;
        // The scanner keeps running while everything ends.
        drop((a, b));
        drop(mount);
        ctx.until("no VM", 10.0, || {
            let left = sys.vms()?;
            Ok((left.is_empty(), format!("{left:?}")))
        })?;
        for name in states {
            eq(
                format!("round {round}: {name} when all is gone"),
                sys.get(name)?,
                0,
            )?;
        }
    }
    let now = sys.get("metadata_bytes")?;
    println!("metadata: {base} bytes before, {now} after");
    ensure!(
        now <= base + (1 << 20),
        "metadata grew from {base} to {now} bytes and stayed"
    );
    Ok(())
}
