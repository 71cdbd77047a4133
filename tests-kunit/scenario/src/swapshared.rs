// SPDX-License-Identifier: GPL-2.0

//! Shared pages that went on from their domain's pool to its swap file: once for all their sharers,
//! and shared still when they come back.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use anyhow::{ensure, Result};
use nix::errno::Errno;
use nix::mount::umount;
use nix::sys::signal::{kill, Signal};

use crate::check::{bytes_are, eq, fails, page_is, skip, within, BusError};
use crate::cold::{self, merged_from};
use crate::compress::TRIED_KB;
use crate::content::{self, page_bytes};
use crate::contention::force;
use crate::ctx::{Ctx, Guest};
use crate::harness::Case;
use crate::swap::{dense, touch_lost, Disk, SMALL_KB};
use crate::sys::{self, End, Map, PAGE, RW, WORDS};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::thinram(
        "swap/shared-sharers",
        "from the cache to swap once for three VMs, each killed in turn",
        three_sharers,
    ),
    Case::thinram(
        "swap/shared-access",
        "every access to a shared page in swap sees its bytes",
        access,
    ),
    Case::thinram(
        "swap/shared-changes",
        "run 2, domains and new pages meet what is in swap",
        changes,
    ),
    Case::thinram(
        "swap/shared-cap",
        "the domain's pool is held to its cap, the rest is in swap",
        cap,
    ),
    Case::thinram(
        "swap/shared-drain",
        "swap_dir set empty brings all back still shared, or is ENOMEM",
        drain,
    ),
    Case::thinram(
        "swap/shared-drain-fails",
        "what cannot be read is lost for all sharers, and keeps no mount",
        drain_fails,
    ),
    Case::thinram(
        "swap/shared-mount-option",
        "a mount's swap_dir= is for its domain's shared pages too",
        mount_option,
    ),
    Case::thinram(
        "swap/shared-no-space",
        "on a full disk shared pages stay",
        no_space,
    ),
    Case::thinram(
        "swap/shared-write-fails",
        "what cannot be written stays, for all sharers",
        write_fails,
    ),
    Case::thinram(
        "swap/shared-corrupt",
        "a flipped byte loses one page for all sharers and never shows",
        corrupt,
    ),
    Case::thinram(
        "swap/shared-ends",
        "unmount and rmmod with shared pages in swap leave nothing",
        ends,
    ),
    Case::thinram(
        "swap/shared-race",
        "sharers, scanner, swapping and live changes at once",
        race,
    )
    .span(10.0),
];

/// Seconds within which a few thousand pages surely are on the disk or back.
const SOON: f64 = 40.0;

/// Content of page `page`: every fourth does not compress.
fn words(page: usize) -> [u64; WORDS] {
    match page % 4 {
        3 => content::noise(page as u64),
        _ => content::page(1 + page as u64),
    }
}

fn bytes(page: usize) -> Vec<u8> {
    let words = words(page);
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// VMs of these names with the same pages, all merged, with the scanner stopped.
fn merged(
    ctx: &Ctx,
    mount: &crate::ctx::Mount<'_>,
    names: &[&str],
    pages: usize,
) -> Result<Vec<Guest>> {
    merged_from(ctx, mount, names, pages, words)
}

fn holds(guest: &Guest, from: usize, to: usize) -> Result<()> {
    for page in from..to {
        let what = format!("page {page} of {}", guest.name);
        page_is(what, &guest.map.read_page(page), &words(page))?;
    }
    Ok(())
}

/// KiB in frames, compressed and in swap; pages shared and sharing. For moments at which nothing moves.
fn figures(ctx: &Ctx) -> Result<[u64; 5]> {
    let sys = ctx.sys();
    let seen = [
        sys.get("shared_frames_kb")?,
        sys.get("shared_compressed_kb")?,
        sys.get("shared_swapped_kb")?,
        sys.get("pages_shared")?,
        sys.get("pages_sharing")?,
    ];
    eq("the forms together", seen[..3].iter().sum(), 4 * seen[3])?;
    Ok(seen)
}

/// Every VM's states add up, each time that this is called.
fn sums(ctx: &Ctx) -> Result<()> {
    for vm in ctx.sys().vms()? {
        ctx.sys().vm(&vm).stat()?.check_sum()?;
    }
    Ok(())
}

/// Pushes all shared pages, `kb` of them, into swap.
pub fn push_out(ctx: &Ctx, kb: u64) -> Result<()> {
    let sys = ctx.sys();
    sys.set("compress_max_percent", 0)?;
    force(ctx, "hard")?;
    ctx.until(&format!("shared_swapped_kb of {kb}"), SOON, || {
        sums(ctx)?;
        let seen = sys.get("shared_swapped_kb")?;
        Ok((seen == kb, seen.to_string()))
    })?;
    force(ctx, "none")
}

fn three_sharers(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 512;
    const KB: u64 = 4 * PAGES as u64;
    // One in four does not compress, and goes to swap as it is.
    const SMALL_KB: u64 = KB / 4 * 3;
    let all = PAGES as u64;
    let sys = ctx.sys();
    let disk = Disk::new(ctx)?;
    sys.set("compress_max_percent", 50)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guests = merged(ctx, &mount, &["a", "b", "c"], PAGES)?;
    eq("merged", figures(ctx)?, [KB, 0, 0, all, 2 * all])?;
    let saved = sys.get("saved_kb")?;
    force(ctx, "hard")?;
    ctx.until_is("shared_frames_kb", 0, SOON)?;
    force(ctx, "none")?;
    // What is pushed on without need is the oldest of what is in the cache.
    let [_, compressed, swapped, ..] = figures(ctx)?;
    within("compressed", compressed, 0, SMALL_KB)?;
    within("swapped", swapped, KB - SMALL_KB, KB)?;
    // From the cache to swap.
    push_out(ctx, KB)?;
    eq("in swap", figures(ctx)?, [0, 0, KB, all, 2 * all])?;
    eq("the pool", sys.get("shared_compressed_pool_kb")?, 0)?;
    eq("saved_kb", sys.get("saved_kb")?, saved)?;
    within(
        "shared_swap_file_kb",
        sys.get("shared_swap_file_kb")?,
        KB / 3,
        2 * KB,
    )?;
    for guest in &guests {
        let stat = guest.sysfs(ctx).stat()?;
        stat.check_sum()?;
        eq("shared_kb", stat.get("shared_kb")?, KB)?;
        eq("resident_kb", stat.get("resident_kb")?, 0)?;
        eq("swapped_kb", stat.get("swapped_kb")?, 0)?;
    }
    // A touch of one brings the frame back for all three.
    let ins = sys.get("shared_swap_ins")?;
    for page in [3, 4] {
        page_is("a touch by a", &guests[0].map.read_page(page), &words(page))?;
    }
    eq("two came back", figures(ctx)?, [8, 0, KB - 8, all, 2 * all])?;
    for guest in &guests {
        holds(guest, 3, 5)?;
    }
    eq("shared_swap_ins", sys.get("shared_swap_ins")? - ins, 2)?;
    // A write takes a copy, and leaves the page to the others.
    guests[1].map.set(5, 7, 77);
    eq(
        "one was written",
        figures(ctx)?,
        [12, 0, KB - 12, all, 2 * all - 1],
    )?;
    let mut expected = words(5);
    expected[7] = 77;
    page_is("page 5 of b", &guests[1].map.read_page(5), &expected)?;
    page_is("page 5 of c", &guests[2].map.read_page(5), &words(5))?;
    // Each VM's process is killed in the middle of its reads, and its file deleted, in turn.
    let mut left = guests;
    for sharers in [2, 1, 0u64] {
        let Guest {
            name, path, file, ..
        } = left.remove(0);
        let mut process = sys::fork(|| {
            let map = Map::shared(&file, 0, PAGES * PAGE, RW)?;
            loop {
                for page in (sharers as usize..PAGES).step_by(16) {
                    std::hint::black_box(map.get(page, 0));
                }
                thread::sleep(Duration::from_millis(1));
            }
        })?;
        thread::sleep(Duration::from_millis(10 * sharers));
        kill(process.pid(), Signal::SIGKILL)?;
        eq(
            format!("end of {name}"),
            process.wait(ctx.limit(10.0))?,
            End::Signal(Signal::SIGKILL),
        )?;
        fs::remove_file(&path)?;
        drop(file);
        ctx.until(&format!("{name} is gone"), SOON, || {
            let vms = ctx.sys().vms()?;
            Ok((!vms.contains(&name), format!("{vms:?}")))
        })?;
        let [.., shared, sharing] = figures(ctx)?;
        match sharers {
            2 => eq("two are left", (shared, sharing), (all, all - 1))?,
            1 => eq("one is left", (shared, sharing), (all, 0))?,
            _ => eq("none is left", figures(ctx)?, [0; 5])?,
        }
        for guest in &left {
            holds(guest, 0, 5)?;
            holds(guest, 6, PAGES)?;
            let written = guest.name == "b";
            eq("page 5", guest.map.get(5, 7) == 77, written)?;
            guest.sysfs(ctx).stat()?.check_sum()?;
        }
        if sharers > 0 {
            push_out(ctx, KB)?;
        }
    }
    disk.unmount()
}

fn access(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 256;
    let (sys, all) = (ctx.sys(), PAGES as u64);
    let _disk = Disk::new(ctx)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guests = merged(ctx, &mount, &["a", "b", "c"], PAGES)?;
    push_out(ctx, 4 * all)?;
    let [a, b, c] = [&guests[0], &guests[1], &guests[2]];
    // read(2) leaves them where they are.
    let mut seen = vec![0; PAGE];
    for page in 0..PAGES {
        a.file.read_exact_at(&mut seen, (page * PAGE) as u64)?;
        bytes_are(format!("read of page {page}"), &seen, &bytes(page))?;
    }
    eq("all in swap", figures(ctx)?, [0, 0, 4 * all, all, 2 * all])?;
    // So does a write(2), which takes a copy: a part of a page, and all of one.
    a.file.write_all_at(&[0xee; 100], (7 * PAGE + 50) as u64)?;
    let mut expected = bytes(7);
    expected[50..150].fill(0xee);
    a.file.read_exact_at(&mut seen, (7 * PAGE) as u64)?;
    bytes_are("page 7 of a", &seen, &expected)?;
    a.file.write_all_at(&page_bytes(900), (8 * PAGE) as u64)?;
    page_is("page 8 of a", &a.map.read_page(8), &content::page(900))?;
    eq(
        "two broken",
        figures(ctx)?,
        [0, 0, 4 * all, all, 2 * all - 2],
    )?;
    // A hole drops a sharer, the last one the page; the ends of a hole are zeroed in copies.
    let page = PAGE as u64;
    for guest in &guests {
        sys::punch(&guest.file, 100 * page, 20 * page)?;
    }
    let rest = all - 20;
    eq("holes", figures(ctx)?, [0, 0, 4 * rest, rest, 2 * rest - 2])?;
    sys::punch(&c.file, 130 * page + 1000, page)?;
    let mut expected = words(130);
    expected[125..].fill(0);
    page_is("page 130 of c", &c.map.read_page(130), &expected)?;
    b.is_zero(100, 120)?;
    // A process that writes at once.
    let mut child = sys::fork(|| {
        let map = Map::shared(&b.file, 0, PAGES * PAGE, RW)?;
        for page in (200..PAGES).step_by(2) {
            map.set(page, 0, page as u64);
        }
        Ok(())
    })?;
    eq("child", child.wait(ctx.limit(30.0))?, End::Exit(0))?;
    for page in (200..PAGES).step_by(2) {
        let mut expected = words(page);
        expected[0] = page as u64;
        page_is("written", &b.map.read_page(page), &expected)?;
    }
    holds(a, 120, PAGES)?;
    holds(b, 120, 200)?;
    holds(c, 132, PAGES)?;
    ensure!(sys.get("shared_swap_ins")? > 0, "nothing came back");
    sums(ctx)
}

fn changes(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 512;
    let (sys, all) = (ctx.sys(), PAGES as u64);
    let disk = Disk::new(ctx)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guests = merged(ctx, &mount, &["a", "b", "c"], PAGES)?;
    push_out(ctx, 4 * all)?;
    // New pages do not make a disk read for them; they share with each other.
    let late = [mount.guest("d", PAGES)?, mount.guest("e", PAGES)?];
    for guest in &late {
        for page in 0..PAGES {
            guest.map.write_page(page, &words(page));
        }
    }
    let refused = sys.get("merges_refused_swapped")?;
    sys.set("run", 1)?;
    ctx.until_least("pages_sharing", 3 * all, SOON)?;
    within(
        "merges_refused_swapped",
        sys.get("merges_refused_swapped")?,
        refused + 1,
        u64::MAX,
    )?;
    // Back in frames the two kinds of records become one.
    for guest in guests.iter().chain(&late) {
        holds(guest, 0, PAGES)?;
    }
    ctx.until_is("pages_sharing", 4 * all, SOON)?;
    sys.set("run", 0)?;
    drop(late);
    for name in ["d", "e"] {
        fs::remove_file(mount.at(name).join("ram"))?;
    }
    ctx.until_is("pages_sharing", 2 * all, SOON)?;
    push_out(ctx, 4 * all)?;
    // One leaves the domain: it has its own copies, the others' are in swap still.
    guests[2].sysfs(ctx).set("domain", "away")?;
    eq("c left", figures(ctx)?, [0, 0, 4 * all, all, all])?;
    holds(&guests[2], 0, PAGES)?;
    // The two move together: brought back for it, shared as before.
    sys.set("share_scope", "host")?;
    eq("moved", figures(ctx)?, [4 * all, 0, 0, all, all])?;
    push_out(ctx, 4 * all)?;
    // Everybody gets an own copy.
    sys.set("run", 2)?;
    eq("unshared", figures(ctx)?, [0; 5])?;
    for guest in &guests {
        let vm = guest.sysfs(ctx);
        eq("private_kb and the like", vm.get("shared_kb")?, 0)?;
        holds(guest, 0, PAGES)?;
    }
    sys.set("share_scope", "domain")?;
    drop(guests);
    drop(mount);
    disk.unmount()
}

fn cap(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 2048;
    let sys = ctx.sys();
    let _disk = Disk::new(ctx)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guests = merged(ctx, &mount, &["a", "b"], PAGES)?;
    let size = 2 * 4 * PAGES as u64;
    sys.set("compress_max_percent", 5)?;
    force(ctx, "hard")?;
    ctx.until("no shared frame", SOON, || {
        sums(ctx)?;
        let pool = sys.get("shared_compressed_pool_kb")?;
        within("the pool at 5 %", pool, 0, size / 20 + TRIED_KB)?;
        let left = sys.get("shared_frames_kb")?;
        Ok((left == 0, left.to_string()))
    })?;
    force(ctx, "none")?;
    ctx.until("the pool is within 5 %", SOON, || {
        let pool = sys.get("shared_compressed_pool_kb")?;
        Ok((pool <= size / 20, format!("{pool} KiB")))
    })?;
    let [_, _, swapped, ..] = figures(ctx)?;
    within("shared_swapped_kb", swapped, size / 8, size / 2)?;
    // A lower cap pushes the rest out.
    let swapped = |least: u64| ctx.until_least("shared_swapped_kb", least, SOON);
    sys.set("compress_max_percent", 0)?;
    swapped(size / 2)?;
    for guest in &guests {
        holds(guest, 0, PAGES)?;
    }
    let all = PAGES as u64;
    eq("all back", figures(ctx)?, [4 * all, 0, 0, all, all])
}

fn drain(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 2048;
    let (sys, all) = (ctx.sys(), PAGES as u64);
    let disk = Disk::new(ctx)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guests = merged(ctx, &mount, &["a", "b", "c"], PAGES)?;
    push_out(ctx, 4 * all)?;
    // What would not fit is refused, and changes nothing.
    sys.set("minfree_kb", sys.get("available_kb")? * 2)?;
    fails(
        "swap_dir off",
        sys.try_set("swap_dir", b"\n"),
        Errno::ENOMEM,
    )?;
    eq(
        "swap_dir",
        sys.word("swap_dir")?,
        disk.path.display().to_string(),
    )?;
    sys.set("minfree_kb", 0)?;
    sys.set("swap_dir", "\n")?;
    ctx.until_is("shared_swapped_kb", 0, SOON)?;
    sums(ctx)?;
    eq("back", figures(ctx)?, [4 * all, 0, 0, all, 2 * all])?;
    disk.unmount()?;
    for guest in &guests {
        holds(guest, 0, PAGES)?;
    }
    eq("still shared", figures(ctx)?, [4 * all, 0, 0, all, 2 * all])
}

fn drain_fails(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 1024;
    let (sys, all) = (ctx.sys(), PAGES as u64);
    let disk = Disk::new(ctx)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let noise = |page: usize| content::noise(page as u64);
    let guests = merged_from(ctx, &mount, &["a", "b", "c"], PAGES, noise)?;
    push_out(ctx, 4 * all)?;
    ctx.until_least("shared_swap_outs", all - 16, SOON)?;
    let lost = sys.get("swap_pages_lost")?;
    sys::shut_down(&disk.path)?;
    disk.unmount()?;
    let lost = sys.get("swap_pages_lost")? - lost;
    within("swap_pages_lost", lost, all - 160, all)?;
    // The records stay, and their sharers; the rest has frames again.
    let back = 4 * (all - lost);
    eq("the rest", figures(ctx)?, [back, 0, 4 * lost, all, 2 * all])?;
    eq("shared_swap_file_kb", sys.get("shared_swap_file_kb")?, 0)?;
    let mut seen = vec![0; PAGE];
    for guest in &guests {
        let mut gone = 0;
        for page in 0..PAGES {
            match guest.file.read_exact_at(&mut seen, (page * PAGE) as u64) {
                Ok(()) => {
                    let expected: Vec<u8> =
                        noise(page).iter().flat_map(|w| w.to_ne_bytes()).collect();
                    bytes_are(format!("page {page} of {}", guest.name), &seen, &expected)?;
                }
                Err(e) => {
                    eq("errno", e.raw_os_error(), Some(libc::EIO))?;
                    if gone == 0 {
                        touch_lost(ctx, guest, page)?;
                    }
                    gone += 1;
                }
            }
        }
        eq("pages that are EIO", gone, lost)?;
    }
    // Whoever unshares, or moves, leaves those where they are: nobody can read them.
    sys.set("run", 2)?;
    eq("unshared", figures(ctx)?, [0, 0, 4 * lost, lost, 2 * lost])?;
    guests[0].sysfs(ctx).set("domain", "away")?;
    // A hole in each sharer frees them.
    for guest in &guests {
        sys::punch(&guest.file, 0, (PAGES * PAGE) as u64)?;
        guest.is_zero(0, PAGES)?;
    }
    eq("nothing is left", figures(ctx)?, [0; 5])?;
    sums(ctx)
}

fn mount_option(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 512;
    let (sys, all) = (ctx.sys(), PAGES as u64);
    let disk = Disk::new(ctx)?;
    sys.set("swap_dir", "\n")?;
    let options = format!("size=64M,domain=lab,swap_dir={}", disk.path.display());
    let mut with = ctx.mount("with", &options)?;
    let without = ctx.mount("without", "size=64M,domain=lab")?;
    let other = ctx.mount("other", "size=64M,domain=other")?;
    // Of two mounts with one domain, one names a directory.
    let plain = merged(ctx, &without, &["a", "b"], PAGES)?;
    sys.set("run", 1)?;
    let named = with.guest("c", PAGES)?;
    for page in 0..PAGES {
        named.map.write_page(page, &words(page));
    }
    ctx.until_is("pages_sharing", 2 * all, SOON)?;
    // Another domain has nowhere to swap to.
    let others = [other.guest("x", 64)?, other.guest("y", 64)?];
    for guest in &others {
        for page in 0..64 {
            guest
                .map
                .write_page(page, &content::page(70_000 + page as u64));
        }
    }
    ctx.until_is("pages_sharing", 2 * all + 64, SOON)?;
    sys.set("run", 0)?;
    push_out(ctx, 4 * all)?;
    eq(
        "the rest",
        figures(ctx)?,
        [256, 0, 4 * all, all + 64, 2 * all + 64],
    )?;
    // With the VM goes the directory: the pages come back, and are shared still.
    drop(named);
    fs::remove_file(with.at("c").join("ram"))?;
    ctx.until_is("shared_swapped_kb", 0, SOON)?;
    eq(
        "still shared",
        figures(ctx)?,
        [256 + 4 * all, 0, 0, all + 64, all + 64],
    )?;
    with.unmount()?;
    disk.unmount()?;
    for guest in &plain {
        holds(guest, 0, PAGES)?;
    }
    Ok(())
}

fn no_space(ctx: &Ctx) -> Result<()> {
    let disk = Disk::small(ctx)?;
    full_disk(ctx)?;
    disk.unmount()
}

fn full_disk(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 4096;
    let (sys, all) = (ctx.sys(), PAGES as u64);
    sys.set("compress_max_percent", 0)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let noise = |page: usize| content::noise(page as u64);
    let guests = merged_from(ctx, &mount, &["a", "b"], PAGES, noise)?;
    let refused = sys.get("swap_outs_refused_no_space")?;
    for _ in 0..2 {
        force(ctx, "hard")?;
        ctx.until_least("swap_outs_refused_no_space", refused + 1, SOON)?;
        ctx.until_least("shared_swapped_kb", 2048, SOON)?;
        sums(ctx)?;
        force(ctx, "none")?;
        within(
            "shared_swapped_kb",
            sys.get("shared_swapped_kb")?,
            2048,
            SMALL_KB,
        )?;
        for guest in &guests {
            for page in 0..PAGES {
                let what = format!("page {page} of {}", guest.name);
                page_is(what, &guest.map.read_page(page), &noise(page))?;
            }
        }
        eq("still shared", figures(ctx)?, [4 * all, 0, 0, all, all])?;
    }
    Ok(())
}

/// Shared pages that were in swap and are back, and whose disk fails from now on.
fn write_fails(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 1024;
    let (sys, all) = (ctx.sys(), PAGES as u64);
    let disk = Disk::new(ctx)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guests = merged(ctx, &mount, &["a", "b", "c"], PAGES)?;
    push_out(ctx, 4 * all)?;
    for guest in &guests {
        holds(guest, 0, PAGES)?;
    }
    eq("back", figures(ctx)?, [4 * all, 0, 0, all, 2 * all])?;
    let (outs, failed) = (sys.get("shared_swap_outs")?, sys.get("swap_writes_failed")?);
    sys::shut_down(&disk.path)?;
    force(ctx, "hard")?;
    // It fails to write, or believes that it did not.
    ctx.until("a write", SOON, || {
        let seen = (sys.get("swap_writes_failed")?, sys.get("shared_swap_outs")?);
        Ok((seen.0 > failed || seen.1 > outs, format!("{seen:?}")))
    })?;
    for _ in 0..20 {
        sums(ctx)?;
        thread::sleep(Duration::from_millis(20));
    }
    force(ctx, "none")?;
    // By read(2) first: it tells what is lost on every kernel.
    for guest in &guests {
        for page in 0..PAGES {
            let mut seen = vec![0; PAGE];
            match guest.file.read_exact_at(&mut seen, (page * PAGE) as u64) {
                Err(e) if e.raw_os_error() == Some(libc::EIO) => return Err(BusError.into()),
                read => read?,
            }
        }
        holds(guest, 0, PAGES)?;
    }
    eq("shared_swap_outs", sys.get("shared_swap_outs")?, outs)?;
    eq("still shared", sys.get("pages_sharing")?, 2 * all)?;
    drop(guests);
    drop(mount);
    disk.unmount()
}

fn corrupt(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 1024;
    const FLIPS: usize = 8;
    let (sys, all) = (ctx.sys(), PAGES as u64);
    let disk = Disk::new(ctx)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let noise = |page: usize| content::noise(page as u64);
    let guests = merged_from(ctx, &mount, &["a", "b", "c"], PAGES, noise)?;
    let before = disk.bytes()?;
    push_out(ctx, 4 * all)?;
    ctx.until_least("shared_swap_outs", all - 16, SOON)?;
    let blocks = dense(&before, &disk.bytes()?);
    within(
        "blocks of swapped pages",
        blocks.len(),
        PAGES * 3 / 4,
        PAGES + 64,
    )?;
    let raw = disk.raw()?;
    let buffer = Map::anonymous(PAGE)?;
    let step = blocks.len() / FLIPS;
    for block in blocks.iter().skip(3).step_by(step).take(FLIPS) {
        let at = (block * PAGE) as u64;
        eq("read", sys::pread_into(&raw, &buffer, 0, PAGE, at)?, PAGE)?;
        buffer.set(0, WORDS / 2, !buffer.get(0, WORDS / 2));
        let written = sys::pwrite_from(&raw, &buffer, 0, PAGE, at)?;
        eq("written", written, PAGE)?;
    }
    let bad = sys.get("swap_objects_corrupt")?;
    let mut lost = [0, 0, 0];
    for page in 0..PAGES {
        for (guest, lost) in guests.iter().zip(&mut lost) {
            let mut seen = vec![0; PAGE];
            match guest.file.read_exact_at(&mut seen, (page * PAGE) as u64) {
                Ok(()) => {
                    let expected: Vec<u8> =
                        noise(page).iter().flat_map(|w| w.to_ne_bytes()).collect();
                    bytes_are(format!("page {page} of {}", guest.name), &seen, &expected)?;
                }
                Err(e) => {
                    eq("errno", e.raw_os_error(), Some(libc::EIO))?;
                    touch_lost(ctx, guest, page)?;
                    *lost += 1;
                }
            }
        }
    }
    within("lost pages", lost[0], FLIPS / 2, FLIPS)?;
    eq("for all sharers", lost, [lost[0]; 3])?;
    let corrupt = sys.get("swap_objects_corrupt")?;
    within(
        "swap_objects_corrupt",
        corrupt,
        bad + 3 * lost[0] as u64,
        u64::MAX,
    )?;
    // A hole in each sharer frees a lost page as any other.
    for guest in &guests {
        sys::punch(&guest.file, 0, (PAGES * PAGE) as u64)?;
        guest.is_zero(0, PAGES)?;
    }
    eq("nothing is left", figures(ctx)?, [0; 5])?;
    sums(ctx)
}

fn ends(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 2048;
    let (sys, all) = (ctx.sys(), PAGES as u64);
    let disk = Disk::new(ctx)?;
    let before = disk.used_blocks()?;
    let mut mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guests = merged(ctx, &mount, &["a", "b"], PAGES)?;
    push_out(ctx, 4 * all)?;
    ensure!(disk.used_blocks()? > before + 500, "nothing is on the disk");
    drop(guests);
    mount.unmount()?;
    let Some(ko) = &ctx.setup.ko else {
        ctx.until("the disk to be empty", SOON, || {
            let used = disk.used_blocks()?;
            Ok((
                used <= before + 16,
                format!("{used} blocks, {before} before"),
            ))
        })?;
        return disk.unmount();
    };
    // At once, before anybody could tidy up.
    sys::remove_module("thinram")?;
    sys::insert_module(&File::open(ko)?, "")?;
    umount(&disk.path)?;
    eq("swap_dir", sys.word("swap_dir")?, String::new())
}

fn race(ctx: &Ctx) -> Result<()> {
    if ctx.setup.scratch.is_none() {
        return Err(skip("no --scratch device to make a file system on"));
    }
    let disk = Disk::new(ctx)?;
    let counters = ["shared_swap_outs", "shared_swap_ins"];
    cold::race_at(ctx, ["0", "2", "20"], counters)?;
    disk.unmount()
}
