// SPDX-License-Identifier: GPL-2.0

//! Shared pages that nobody uses: compressed once for all their sharers, and shared still when they
//! come back.

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Result};
use nix::errno::Errno;
use nix::sys::signal::{kill, Signal};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::check::{bytes_are, eq, page_is, within, Gaps};
use crate::content::{self, mix, page_bytes};
use crate::contention::force;
use crate::ctx::{Ctx, Guest, Mount};
use crate::harness::Case;
use crate::sys::{self, End, Map, PAGE, RW, WORDS};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::thinram(
        "cold/three-sharers",
        "compressed once for three VMs, each killed in turn",
        three_sharers,
    ),
    Case::thinram(
        "cold/in-use",
        "what one sharer uses stays, the rest goes",
        in_use,
    ),
    Case::thinram(
        "cold/merge-new",
        "a new page merges with a compressed one, which stays so",
        merge_new,
    ),
    Case::thinram(
        "cold/access",
        "every access to a compressed shared page sees its bytes",
        access,
    ),
    Case::thinram(
        "cold/unshare",
        "run 2 gives every sharer its own copy",
        unshare,
    ),
    Case::thinram(
        "cold/domains",
        "who leaves the domain takes a copy, who moves together goes on sharing",
        domains,
    ),
    Case::thinram(
        "cold/chains",
        "copies by max_page_sharing are compressed each for its own",
        chains,
    ),
    Case::thinram(
        "cold/holes",
        "holes and truncation only drop sharers, the last one frees the page",
        holes,
    ),
    Case::thinram(
        "cold/same-filled",
        "same-filled shared pages take no room in the pool",
        same_filled,
    ),
    Case::thinram(
        "cold/incompressible",
        "random shared pages are refused, counted and intact",
        incompressible,
    ),
    Case::thinram(
        "cold/cap",
        "the cap of the domain's pool holds, and is lowered live",
        cap,
    ),
    Case::thinram(
        "cold/race",
        "sharers, scanner, reclaim and live changes at once",
        race,
    )
    .span(10.0),
];

/// Seconds within which a few thousand pages surely are merged or compressed.
const SOON: f64 = 30.0;

/// VMs of these names whose page `i` is made from seed `1 + i`, all merged, with the scanner
/// stopped.
fn merged(ctx: &Ctx, mount: &Mount<'_>, names: &[&str], pages: usize) -> Result<Vec<Guest>> {
    merged_from(ctx, mount, names, pages, |page| {
        content::page(1 + page as u64)
    })
}

/// The same with other `words` in page `i`.
pub fn merged_from(
    ctx: &Ctx,
    mount: &Mount<'_>,
    names: &[&str],
    pages: usize,
    words: impl Fn(usize) -> [u64; WORDS],
) -> Result<Vec<Guest>> {
    let sys = ctx.sys();
    let mut guests = Vec::new();
    for name in names {
        let guest = mount.guest(name, pages)?;
        for page in 0..pages {
            guest.map.write_page(page, &words(page));
        }
        guests.push(guest);
    }
    sys.flat_out()?;
    let sharing = ((names.len() - 1) * pages) as u64;
    ctx.until_is("pages_sharing", sharing, SOON)?;
    sys.set("run", 0)?;
    Ok(guests)
}

/// Compresses all shared pages, `pages` contents.
pub fn pack(ctx: &Ctx, pages: usize) -> Result<()> {
    force(ctx, "hard")?;
    ctx.until_is("shared_compressed_kb", 4 * pages as u64, SOON)?;
    force(ctx, "none")
}

/// Merges once more, until that many pages are saved, and packs them.
fn merge_and_pack(ctx: &Ctx, sharing: u64, pages: usize) -> Result<()> {
    let sys = ctx.sys();
    sys.set("run", 1)?;
    ctx.until_is("pages_sharing", sharing, SOON)?;
    sys.set("run", 0)?;
    pack(ctx, pages)
}

/// What the host says of shared pages, in one place: KiB in frames and compressed, pages shared and
/// sharing.
fn figures(ctx: &Ctx) -> Result<[u64; 4]> {
    let sys = ctx.sys();
    Ok([
        sys.get("shared_frames_kb")?,
        sys.get("shared_compressed_kb")?,
        sys.get("pages_shared")?,
        sys.get("pages_sharing")?,
    ])
}

fn three_sharers(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 512;
    const KB: u64 = 4 * PAGES as u64;
    let all = PAGES as u64;
    let sys = ctx.sys();
    sys.set("compress_max_percent", 50)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guests = merged(ctx, &mount, &["a", "b", "c"], PAGES)?;
    eq("merged", figures(ctx)?, [KB, 0, all, 2 * all])?;
    let saved = sys.get("saved_kb")?;
    pack(ctx, PAGES)?;
    eq("compressed", figures(ctx)?, [0, KB, all, 2 * all])?;
    eq("saved_kb", sys.get("saved_kb")?, saved)?;
    eq("shared_compressions", sys.get("shared_compressions")?, {
        sys.get("shared_decompressions")? + all
    })?;
    // Content of ratio 3, and no VM pays for it.
    let pool = sys.get("shared_compressed_pool_kb")?;
    within("shared_compressed_pool_kb", pool, KB / 5, KB / 2)?;
    for guest in &guests {
        let stat = guest.sysfs(ctx).stat()?;
        stat.check_sum()?;
        eq("shared_kb", stat.get("shared_kb")?, KB)?;
        eq("compressed_kb", stat.get("compressed_kb")?, 0)?;
        eq("compressed_pool_kb", stat.get("compressed_pool_kb")?, 0)?;
        eq("resident_kb", stat.get("resident_kb")?, 0)?;
    }
    let back = sys.get("shared_decompressions")?;
    // A touch of one brings the frame back for all three.
    page_is(
        "page 3 of a",
        &guests[0].map.read_page(3),
        &content::page(4),
    )?;
    eq("one came back", figures(ctx)?, [4, KB - 4, all, 2 * all])?;
    for guest in &guests {
        page_is("page 3", &guest.map.read_page(3), &content::page(4))?;
    }
    eq("brought back", sys.get("shared_decompressions")? - back, 1)?;
    eq("one is back", figures(ctx)?, [4, KB - 4, all, 2 * all])?;
    // A write takes a copy of it, and leaves it to the others.
    guests[1].map.set(5, 7, 77);
    eq(
        "one was written",
        figures(ctx)?,
        [8, KB - 8, all, 2 * all - 1],
    )?;
    let mut expected = content::page(6);
    expected[7] = 77;
    page_is("page 5 of b", &guests[1].map.read_page(5), &expected)?;
    page_is(
        "page 5 of c",
        &guests[2].map.read_page(5),
        &content::page(6),
    )?;
    eq("private_kb", guests[1].sysfs(ctx).get("private_kb")?, 4)?;
    // Each VM's process is killed, and its file deleted, in turn.
    let mut left = guests;
    for sharers in [2, 1, 0u64] {
        let Guest {
            name, path, file, ..
        } = left.remove(0);
        let mut process = sys::fork(|| {
            let map = Map::shared(&file, 0, PAGES * PAGE, RW)?;
            loop {
                // Some of what it uses is just coming back when it ends.
                for page in (sharers as usize..PAGES).step_by(16) {
                    std::hint::black_box(map.get(page, 0));
                }
                thread::sleep(Duration::from_millis(1));
            }
        })?;
        thread::sleep(Duration::from_millis(30));
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
        let [frames, compressed, shared, sharing] = figures(ctx)?;
        eq("frames and compressed", frames + compressed, 4 * shared)?;
        match sharers {
            2 => eq("two are left", (shared, sharing), (all, all - 1))?,
            1 => eq("one is left", (shared, sharing), (all, 0))?,
            _ => eq("none is left", figures(ctx)?, [0; 4])?,
        }
        for guest in &left {
            let written = guest.name == "b";
            guest.holds(0, 5, 1)?;
            guest.holds(6, PAGES, 1)?;
            let word = guest.map.get(5, 7);
            eq("word 7 of page 5", word == 77, written)?;
            guest.sysfs(ctx).stat()?.check_sum()?;
        }
        if sharers > 0 {
            pack(ctx, PAGES)?;
        }
    }
    eq("the pool", sys.get("shared_compressed_pool_kb")?, 0)
}

fn in_use(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 512;
    const HOT: usize = 64;
    const TRIES: usize = 10;
    let sys = ctx.sys();
    sys.set("compress_max_percent", 100)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guests = merged(ctx, &mount, &["a", "b", "c"], PAGES)?;
    let stop = AtomicBool::new(false);
    let gaps = Mutex::new(Gaps::new());
    let lock = || gaps.lock().expect("nobody panics with it");
    thread::scope(|scope| {
        let user = &guests[1];
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for page in 0..HOT {
                    std::hint::black_box(user.map.get(page, 0));
                }
                lock().turn();
                thread::sleep(Duration::from_millis(5));
            }
        });
        let done = (|| {
            force(ctx, "hard")?;
            let cold = 4 * (PAGES - HOT) as u64;
            ctx.until_least("shared_compressed_kb", cold, SOON)?;
            for _ in 0..TRIES {
                lock().measure();
                let back = sys.get("shared_decompressions")?;
                thread::sleep(Duration::from_secs(2));
                let back = sys.get("shared_decompressions")? - back;
                println!("{back} pages in use were compressed");
                if back <= HOT as u64 / 4 || lock().harmless() {
                    within("pages in use that went", back, 0, HOT as u64 / 4)?;
                    return force(ctx, "none");
                }
            }
            bail!("{TRIES} times no CPU to use pages with")
        })();
        stop.store(true, Ordering::Relaxed);
        done
    })?;
    for guest in &guests {
        guest.holds(0, PAGES, 1)?;
    }
    eq("pages_sharing", sys.get("pages_sharing")?, 2 * PAGES as u64)
}

fn merge_new(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 512;
    let (sys, all) = (ctx.sys(), PAGES as u64);
    sys.set("compress_max_percent", 100)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guests = merged(ctx, &mount, &["a", "b"], PAGES)?;
    pack(ctx, PAGES)?;
    let back = sys.get("shared_decompressions")?;
    let late = mount.guest("late", PAGES)?;
    late.fill(0, PAGES, 1);
    sys.set("run", 1)?;
    ctx.until_is("pages_sharing", 2 * all, SOON)?;
    sys.set("run", 0)?;
    eq("all compressed", figures(ctx)?, [0, 4 * all, all, 2 * all])?;
    eq("resident_kb", late.sysfs(ctx).get("resident_kb")?, 0)?;
    eq("brought back", sys.get("shared_decompressions")?, back)?;
    late.holds(0, PAGES, 1)?;
    for guest in &guests {
        guest.holds(0, PAGES, 1)?;
    }
    eq("all back", figures(ctx)?, [4 * all, 0, all, 2 * all])?;
    eq(
        "brought back",
        sys.get("shared_decompressions")?,
        back + all,
    )
}

fn access(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 256;
    let (sys, all) = (ctx.sys(), PAGES as u64);
    sys.set("compress_max_percent", 100)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guests = merged(ctx, &mount, &["a", "b", "c"], PAGES)?;
    pack(ctx, PAGES)?;
    let [a, b, c] = [&guests[0], &guests[1], &guests[2]];
    // read(2) leaves them compressed.
    let mut bytes = vec![0; PAGE];
    for page in 0..PAGES {
        a.file.read_exact_at(&mut bytes, (page * PAGE) as u64)?;
        let what = format!("read of page {page}");
        bytes_are(what, &bytes, &page_bytes(1 + page as u64))?;
    }
    eq("all compressed", figures(ctx)?, [0, 4 * all, all, 2 * all])?;
    // So does a write(2), which takes a copy: a part of a page, and all of one.
    a.file.write_all_at(&[0xee; 100], (7 * PAGE + 50) as u64)?;
    let mut expected = page_bytes(8);
    expected[50..150].fill(0xee);
    a.file.read_exact_at(&mut bytes, (7 * PAGE) as u64)?;
    bytes_are("page 7 of a", &bytes, &expected)?;
    a.file.write_all_at(&page_bytes(900), (8 * PAGE) as u64)?;
    page_is("page 8 of a", &a.map.read_page(8), &content::page(900))?;
    eq("two broken", figures(ctx)?, [0, 4 * all, all, 2 * all - 2])?;
    b.holds(7, 9, 1)?;
    c.holds(7, 9, 1)?;
    // A process that may only read, and one that writes at once.
    let mut child = sys::fork(|| {
        let map = Map::shared(&b.file, 0, PAGES * PAGE, RW)?;
        for page in (20..PAGES).step_by(2) {
            map.set(page, 0, page as u64);
        }
        Ok(())
    })?;
    eq("child", child.wait(ctx.limit(30.0))?, End::Exit(0))?;
    for page in (20..PAGES).step_by(2) {
        let mut expected = content::page(1 + page as u64);
        expected[0] = page as u64;
        page_is("written", &b.map.read_page(page), &expected)?;
    }
    a.holds(9, PAGES, 1)?;
    c.holds(0, PAGES, 1)?;
    for guest in &guests {
        guest.sysfs(ctx).stat()?.check_sum()?;
    }
    Ok(())
}

fn unshare(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 512;
    let sys = ctx.sys();
    sys.set("compress_max_percent", 100)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guests = merged(ctx, &mount, &["a", "b", "c"], PAGES)?;
    pack(ctx, PAGES)?;
    sys.set("run", 2)?;
    eq("unshared", figures(ctx)?, [0; 4])?;
    eq("the pool", sys.get("shared_compressed_pool_kb")?, 0)?;
    for guest in &guests {
        let private = guest.sysfs(ctx).get("private_kb")?;
        eq("private_kb", private, 4 * PAGES as u64)?;
        guest.holds(0, PAGES, 1)?;
    }
    // And once more from the start.
    merge_and_pack(ctx, 2 * PAGES as u64, PAGES)?;
    for guest in &guests {
        guest.holds(0, PAGES, 1)?;
    }
    Ok(())
}

fn domains(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 512;
    let (sys, all) = (ctx.sys(), PAGES as u64);
    sys.set("compress_max_percent", 100)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guests = merged(ctx, &mount, &["a", "b", "c"], PAGES)?;
    pack(ctx, PAGES)?;
    // One leaves: it has its own copies, the others share what is compressed still.
    guests[2].sysfs(ctx).set("domain", "away")?;
    eq("c left", figures(ctx)?, [0, 4 * all, all, all])?;
    let private = guests[2].sysfs(ctx).get("private_kb")?;
    eq("private_kb of c", private, 4 * all)?;
    guests[2].holds(0, PAGES, 1)?;
    eq("c read", figures(ctx)?, [0, 4 * all, all, all])?;
    // Those two move together: brought back for it, shared as before.
    sys.set("share_scope", "host")?;
    eq("moved", figures(ctx)?, [4 * all, 0, all, all])?;
    for guest in &guests[..2] {
        guest.holds(0, PAGES, 1)?;
    }
    pack(ctx, PAGES)?;
    // In the new scope c's pages, brought back as well, meet what is compressed there.
    guests[2].holds(0, PAGES, 1)?;
    merge_and_pack(ctx, 2 * all, PAGES)?;
    sys.set("share_scope", "domain")?;
    for guest in &guests {
        guest.holds(0, PAGES, 1)?;
        guest.sysfs(ctx).stat()?.check_sum()?;
    }
    // The scope of the host has no VM any more: nor has it a pool.
    let [frames, compressed, shared, _] = figures(ctx)?;
    eq("frames and compressed", frames + compressed, 4 * shared)?;
    for guest in &guests {
        guest.sysfs(ctx).set("share", 0)?;
    }
    eq("nobody shares", figures(ctx)?, [0; 4])?;
    for guest in &guests {
        guest.holds(0, PAGES, 1)?;
    }
    Ok(())
}

fn chains(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 128;
    let (sys, all) = (ctx.sys(), PAGES as u64);
    sys.set("compress_max_percent", 100)?;
    sys.set("max_page_sharing", 2)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let mut guests = Vec::new();
    for name in ["a", "b", "c", "d"] {
        let guest = mount.guest(name, PAGES)?;
        guest.fill(0, PAGES, 1);
        guests.push(guest);
    }
    sys.flat_out()?;
    ctx.until_is("pages_sharing", 2 * all, SOON)?;
    sys.set("run", 0)?;
    eq("two copies", figures(ctx)?, [8 * all, 0, 2 * all, 2 * all])?;
    pack(ctx, 2 * PAGES)?;
    let back = sys.get("shared_decompressions")?;
    guests[0].holds(0, PAGES, 1)?;
    eq("one copy", sys.get("shared_decompressions")? - back, all)?;
    for guest in &guests {
        guest.holds(0, PAGES, 1)?;
    }
    eq("both", sys.get("shared_decompressions")? - back, 2 * all)?;
    eq("back", figures(ctx)?, [8 * all, 0, 2 * all, 2 * all])
}

fn holes(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 512;
    let (sys, all) = (ctx.sys(), PAGES as u64);
    sys.set("compress_max_percent", 100)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guests = merged(ctx, &mount, &["a", "b"], PAGES)?;
    pack(ctx, PAGES)?;
    let page = PAGE as u64;
    sys::punch(&guests[0].file, 100 * page, 200 * page)?;
    eq("a hole", figures(ctx)?, [0, 4 * all, all, all - 200])?;
    guests[0].is_zero(100, 300)?;
    // The ends of a hole are zeroed in copies.
    sys::punch(&guests[0].file, 300 * page + 1000, page)?;
    let mut expected = content::page(301);
    expected[125..].fill(0);
    page_is("page 300", &guests[0].map.read_page(300), &expected)?;
    sys::ftruncate(&guests[0].file, 400 * PAGE as i64)?;
    sys::ftruncate(&guests[0].file, 512 * PAGE as i64)?;
    guests[0].is_zero(400, 512)?;
    guests[1].holds(100, 512, 1)?;
    pack(ctx, PAGES)?;
    // With the last sharer it goes.
    sys::punch(&guests[1].file, 0, all * page)?;
    let left = all - 200 - 112 - 2;
    eq("the rest", figures(ctx)?, [0, 4 * left, left, 0])?;
    guests[0].holds(0, 100, 1)?;
    sys::punch(&guests[0].file, 0, all * page)?;
    eq("nothing", figures(ctx)?, [0; 4])?;
    eq("the pool", sys.get("shared_compressed_pool_kb")?, 0)
}

fn same_filled(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 200;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let pattern = |page: usize| [0x0101_0101_0101_0101u64.wrapping_mul(page as u64 + 1); WORDS];
    let mut guests = Vec::new();
    for name in ["a", "b"] {
        let guest = mount.guest(name, PAGES)?;
        for page in 0..PAGES {
            guest.map.write_page(page, &pattern(page));
        }
        guests.push(guest);
    }
    sys.flat_out()?;
    ctx.until_is("pages_sharing", PAGES as u64, SOON)?;
    sys.set("run", 0)?;
    // No pool is needed: this works though it may have no size at all.
    sys.set("compress_max_percent", 0)?;
    pack(ctx, PAGES)?;
    eq("the pool", sys.get("shared_compressed_pool_kb")?, 0)?;
    for guest in &guests {
        for page in 0..PAGES {
            let what = format!("page {page} of {}", guest.name);
            page_is(what, &guest.map.read_page(page), &pattern(page))?;
        }
    }
    eq("pages_sharing", sys.get("pages_sharing")?, PAGES as u64)
}

fn incompressible(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 128;
    let (sys, all) = (ctx.sys(), PAGES as u64);
    sys.set("compress_max_percent", 100)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let mut guests = Vec::new();
    for name in ["a", "b"] {
        let guest = mount.guest(name, PAGES)?;
        guest.fill_noise(0, PAGES);
        guests.push(guest);
    }
    sys.flat_out()?;
    ctx.until_is("pages_sharing", all, SOON)?;
    sys.set("run", 0)?;
    let name = "compressions_refused_incompressible";
    let before = sys.get(name)?;
    force(ctx, "hard")?;
    ctx.until_least(name, before + all, SOON)?;
    force(ctx, "none")?;
    eq("all in frames", figures(ctx)?, [4 * all, 0, all, all])?;
    for guest in &guests {
        guest.holds_noise(0, PAGES)?;
    }
    Ok(())
}

fn cap(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 2048;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guests = merged(ctx, &mount, &["a", "b"], PAGES)?;
    // Of the sizes of both VMs.
    let size = 2 * 4 * PAGES as u64;
    sys.set("compress_max_percent", 10)?;
    let refused = sys.get("compressions_refused_pool_full")?;
    force(ctx, "hard")?;
    ctx.until_least("compressions_refused_pool_full", refused + 1, SOON)?;
    let pool = sys.get("shared_compressed_pool_kb")?;
    within("the pool at 10 %", pool, size / 20, size / 10)?;
    let grows = |name: &str, least: u64| ctx.until_least(name, least, SOON);
    sys.set("compress_max_percent", 15)?;
    grows("shared_compressed_pool_kb", size / 9)?;
    let shrinks = |percent: u64| -> Result<()> {
        sys.set("compress_max_percent", percent)?;
        ctx.until(&format!("a pool of {percent} %"), SOON, || {
            let seen = sys.get("shared_compressed_pool_kb")?;
            Ok((seen <= size * percent / 100, seen.to_string()))
        })
    };
    shrinks(5)?;
    let [frames, compressed, shared, sharing] = figures(ctx)?;
    eq("frames and compressed", frames + compressed, 4 * shared)?;
    eq("sharing", (shared, sharing), (PAGES as u64, PAGES as u64))?;
    // What would not fit is refused, and changes nothing.
    force(ctx, "none")?;
    sys.set("minfree_kb", sys.get("available_kb")? * 2)?;
    let error = sys.try_set("compress_max_percent", b"0").err();
    let errno = error.and_then(|e| e.raw_os_error());
    eq("errno", errno, Some(Errno::ENOMEM as i32))?;
    eq("compress_max_percent", sys.get("compress_max_percent")?, 5)?;
    sys.set("minfree_kb", 0)?;
    shrinks(0)?;
    eq("none is compressed", sys.get("shared_compressed_kb")?, 0)?;
    for guest in &guests {
        guest.holds(0, PAGES, 1)?;
    }
    Ok(())
}

/// What the owner of a VM in [`race`] knows of its pages: `None` for a hole.
type Known = Vec<Option<u64>>;

const RACE_PAGES: usize = 1024;

/// Seed of page `page` in `version`; version 0 is the same in all VMs.
fn race_seed(vm: usize, page: usize, version: u64) -> u64 {
    match version {
        0 => 1 + page as u64,
        _ => mix(((vm as u64) << 50) | ((page as u64) << 32) | version),
    }
}

/// One VM's work in [`race`]: it alone writes to its file, and checks what it reads.
fn work(guest: &Guest, vm: usize, seed: u64, stop: &AtomicBool, breaks: &AtomicU64) -> Result<()> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut known: Known = vec![Some(0); RACE_PAGES];
    let mut version = 0u64;
    let check = |page: usize, known: &Known, by_map: bool| -> Result<()> {
        let expected = known[page].map_or([0; WORDS], |v| content::page(race_seed(vm, page, v)));
        let what = format!("page {page} of {}", guest.name);
        if by_map {
            return page_is(what, &guest.map.read_page(page), &expected);
        }
        let mut bytes = vec![0; PAGE];
        (guest.file).read_exact_at(&mut bytes, (page * PAGE) as u64)?;
        let expected: Vec<u8> = expected
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        bytes_are(what, &bytes, &expected)
    };
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..16 {
            let page = rng.random_range(0..RACE_PAGES);
            check(page, &known, rng.random())?;
            // Mostly what all have in common, so that it is shared again.
            let next = match rng.random_range(0..12) {
                0..6 => continue,
                6..9 => Some(0),
                9..11 => {
                    version += 1;
                    Some(version)
                }
                _ => None,
            };
            known[page] = next;
            breaks.fetch_add(1, Ordering::Relaxed);
            match next {
                None => sys::punch(&guest.file, (page * PAGE) as u64, PAGE as u64)?,
                Some(v) if rng.random() => {
                    let bytes = page_bytes(race_seed(vm, page, v));
                    guest.file.write_all_at(&bytes, (page * PAGE) as u64)?;
                }
                Some(v) => {
                    let words = content::page(race_seed(vm, page, v));
                    guest.map.write_page(page, &words);
                }
            }
        }
        thread::sleep(Duration::from_millis(5));
    }
    for page in 0..RACE_PAGES {
        check(page, &known, page % 2 == 0)?;
    }
    Ok(())
}

fn race(ctx: &Ctx) -> Result<()> {
    let counters = ["shared_compressions", "shared_decompressions"];
    race_at(ctx, ["50", "20", "1"], counters)
}

/// Sharers that write, read and check, while everything else changes; `caps` are what
/// `compress_max_percent` goes through, the first one at the start. It takes as long as pages need to go
/// and to come back, as `counters` count them.
pub fn race_at(ctx: &Ctx, caps: [&str; 3], counters: [&str; 2]) -> Result<()> {
    let least = |pages: f64| (pages * ctx.setup.scale.clamp(0.2, 1.0)) as u64;
    let (gone_min, back_min) = (least(300.0), least(100.0));
    let sys = ctx.sys();
    sys.set("compress_max_percent", caps[0])?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guests = merged(ctx, &mount, &["a", "b", "c"], RACE_PAGES)?;
    sys.set("run", 1)?;
    let counted = || -> Result<(u64, u64)> { Ok((sys.get(counters[0])?, sys.get(counters[1])?)) };
    let before = counted()?;
    let (stop, breaks) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut rng = SmallRng::seed_from_u64(ctx.setup.seed);
    let seeds: [u64; 3] = rng.random();
    thread::scope(|scope| {
        let workers: Vec<_> = (guests.iter().zip(seeds).enumerate())
            .map(|(vm, (guest, seed))| {
                let (stop, breaks) = (&stop, &breaks);
                scope.spawn(move || {
                    let done = work(guest, vm, seed, stop, breaks);
                    if done.is_err() {
                        stop.store(true, Ordering::Relaxed);
                    }
                    done
                })
            })
            .collect();
        // In turn, so that none is in force for long.
        let mut next_caps = caps.iter().cycle().skip(1);
        let mut disturb = |rng: &mut SmallRng| -> Result<()> {
            let vm = guests[rng.random_range(0..guests.len())].sysfs(ctx);
            match rng.random_range(0..16) {
                0 => force(ctx, "none")?,
                1 => {
                    let percent = next_caps.next().map_or("", |cap| cap);
                    match sys.try_set("compress_max_percent", percent.as_bytes()) {
                        // What comes back would not fit under some VM's limit.
                        Err(e) if e.raw_os_error() == Some(Errno::ENOMEM as i32) => {}
                        done => done?,
                    }
                }
                2 => vm.set("domain", ["lab", "away"][rng.random_range(0..2)])?,
                3 => {
                    sys.set("run", 2)?;
                    sys.set("run", 1)?;
                }
                4 => sys.set("share_scope", ["host", "domain"][rng.random_range(0..2)])?,
                5 => vm.set("limit_kb", [0, 1000, 3000][rng.random_range(0..3)])?,
                6 => sys.set("max_page_sharing", [2, 65536][rng.random_range(0..2)])?,
                7..10 => {
                    vm.stat()?.check_sum()?;
                    figures(ctx)?;
                }
                _ => force(ctx, "hard")?,
            }
            Ok(())
        };
        let start = Instant::now();
        let (end, last) = (ctx.span(10.0), ctx.span(10.0) + ctx.limit(20.0));
        let mut done = Ok(());
        while done.is_ok() && !stop.load(Ordering::Relaxed) {
            let now = counted()?;
            let enough = now.0 - before.0 >= gone_min && now.1 - before.1 >= back_min;
            if start.elapsed() >= last || start.elapsed() >= end && enough {
                break;
            }
            done = disturb(&mut rng);
            thread::sleep(Duration::from_millis(rng.random_range(50..400)));
        }
        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            done = done.and(worker.join().expect("a worker does not panic"));
        }
        done
    })?;
    let after = counted()?;
    let (gone, back) = (after.0 - before.0, after.1 - before.1);
    println!(
        "{} {gone}, {} {back}, changed {breaks:?}",
        counters[0], counters[1]
    );
    within(counters[0], gone, gone_min, u64::MAX)?;
    within(counters[1], back, back_min, u64::MAX)?;
    force(ctx, "none")?;
    sys.set("run", 0)?;
    // The cap that was set last may still move some.
    ctx.until("all forms together", SOON, || {
        let [frames, compressed, shared, _] = figures(ctx)?;
        let known = frames + compressed + sys.get("shared_swapped_kb")?;
        Ok((known == 4 * shared, format!("{known} of {}", 4 * shared)))
    })?;
    let [_, _, shared, sharing] = figures(ctx)?;
    let mut slots = 0;
    for guest in &guests {
        let stat = guest.sysfs(ctx).stat()?;
        stat.check_sum()?;
        slots += stat.get("shared_kb")? / 4;
    }
    eq("slots that share", slots, shared + sharing)?;
    ensure!(breaks.load(Ordering::Relaxed) > 0, "nothing was changed");
    Ok(())
}
