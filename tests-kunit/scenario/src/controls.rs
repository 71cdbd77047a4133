// SPDX-License-Identifier: GPL-2.0

//! Controls and counters of sharing: scope, pace, run, and what the numbers say.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::check::{eq, fails_any, page_is, that, within};
use crate::content::{self, pages_bytes};
use crate::ctx::{Ctx, Guest, Mount};
use crate::harness::Case;
use crate::sharing::{apart, merged_twins, together, twins, SOON};
use crate::sys::{self, PAGE, WORDS};
use crate::sysfs::{Node, Sys};

/// The table of cases.
pub const CASES: &[Case] = &[
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
        "share/unlike-records",
        "shared pages of two domains that begin alike stay two when the domains are one",
        unlike_records,
    ),
    Case::thinram(
        "share/zero-only",
        "zero_only merges zeroes alone",
        zero_only,
    ),
    Case::thinram(
        "share/max-sharers",
        "max_page_sharing caps one frame's sharers, and raising it unites them",
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

fn unlike_records(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 16;
    // As much as a weakened hash looks at.
    const ALIKE: usize = 8;
    // No two pages of a domain begin alike, but page i of the one domain and page i of the other.
    let content = |domain: u64, page: usize| {
        let mut content = content::page(100 * (domain + 1) + page as u64);
        content[..ALIKE].copy_from_slice(&content::page(page as u64)[..ALIKE]);
        content
    };
    let mounts = [
        ctx.mount("one", "size=16M,domain=one")?,
        ctx.mount("two", "size=16M,domain=two")?,
    ];
    let mut guests = Vec::new();
    for (domain, mount) in mounts.iter().enumerate() {
        for twin in 0..2 {
            let guest = mount.guest(&format!("vm{domain}{twin}"), PAGES)?;
            for page in 0..PAGES {
                guest.map.write_page(page, &content(domain as u64, page));
            }
            guests.push((domain as u64, guest));
        }
    }
    let sys = ctx.sys();
    sys.flat_out()?;
    let sharing = 2 * PAGES as u64;
    ctx.until_is("pages_sharing", sharing, SOON)?;
    sys.set("share_scope", "host")?;
    // Every eighth pass looks whether two records are of one content.
    ctx.passes(32)?;
    sys.set("run", 0)?;
    let seen = sys.get("pages_sharing")?;
    sys.set("share_scope", "domain")?;
    for (domain, guest) in &guests {
        for page in 0..PAGES {
            let what = format!("{} page {page}", guest.name);
            page_is(what, &guest.map.read_page(page), &content(*domain, page))?;
        }
    }
    eq("pages_sharing of one domain", seen, sharing)
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
    // Frames that two domains had of the same content become one.
    ctx.until_is("pages_sharing", 64 + 80, SOON)?;
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
    let all_hold_7 = || -> Result<()> {
        for page in 0..64 {
            page_is(
                format!("page {page}"),
                &guest.map.read_page(page),
                &content::page(7),
            )?;
        }
        Ok(())
    };
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
    all_hold_7()?;
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
    sys.set("max_page_sharing", 1024)?;
    sys.set("run", 1)?;
    ctx.until_is("pages_shared", 1, SOON)?;
    eq("pages_sharing", sys.get("pages_sharing")?, 63)?;
    all_hold_7()
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
fn scanned_in(sys: &Sys, seconds: f64) -> Result<f64> {
    let before = passed(sys)?;
    thread::sleep(Duration::from_secs_f64(seconds));
    Ok((passed(sys)? - before) as f64)
}

/// Checks that the scan comes by at least `low` and at most `high` times `rate` pages a second in
/// three seconds, or in more while others have the CPU.
fn scans_at(ctx: &Ctx, rate: f64, low: f64, high: f64) -> Result<()> {
    const LONGEST: f64 = 30.0;
    let sys = ctx.sys();
    let (start, before) = (Instant::now(), passed(&sys)?);
    thread::sleep(Duration::from_secs(3));
    loop {
        let pages = (passed(&sys)? - before) as f64;
        let seconds = start.elapsed().as_secs_f64();
        if pages >= rate * seconds * low || seconds > LONGEST {
            println!("{rate} pages/s: {:.0}", pages / seconds);
            // A batch may straddle either end of the window.
            return within(
                "pages scanned",
                pages,
                rate * seconds * low,
                rate * seconds * high + 128.0,
            );
        }
        thread::sleep(Duration::from_secs(1));
    }
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
fn paced(ctx: &Ctx, pages: usize) -> Result<(Mount<'_>, Guest)> {
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
        let low = if ctx.setup.patience > 2.0 { 0.2 } else { 0.7 };
        scans_at(ctx, rate, low, 1.1)?;
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
        let pages = scanned_in(&sys, 1.0)?;
        within(
            format!("round {round}: pages in a second at 1 a second"),
            pages,
            0.0,
            128.0,
        )?;
        sys.set("scan_pages_per_sec", 0)?;
        // At 1 a second this would take hours: the sleep must have been cut short.
        until_passed(ctx, 5000, SOON)
            .with_context(|| format!("round {round}: after the ceiling went"))?;
        sys.set("scan_pages_per_sec", 1)?;
        thread::sleep(Duration::from_millis(100));
    }
    // The other paces are no different.
    sys.set("scan_pages_per_sec", 0)?;
    sys.set("scan_period_secs", 86400)?;
    thread::sleep(Duration::from_millis(200));
    let pages = scanned_in(&sys, 1.0)?;
    within("pages in a second at a pass a day", pages, 0.0, 128.0)?;
    sys.flat_out()?;
    until_passed(ctx, 5000, SOON).context("after the period was shortened")
}

fn pace_cpu(ctx: &Ctx) -> Result<()> {
    let (_mount, _guest) = paced(ctx, 16384)?;
    let sys = ctx.sys();
    sys.flat_out()?;
    for percent in [5.0, 20.0] {
        sys.set("scan_cpu_max_percent", percent as u64)?;
        thread::sleep(Duration::from_millis(300));
        let (start, cpu, pages) = (Instant::now(), sys.get("scan_cpu_ms")?, passed(&sys)?);
        // A batch and a tick of the clock more than the share, more where clocks are coarse.
        let slack = if ctx.setup.patience > 2.0 { 1.5 } else { 1.2 };
        // A batch counts as long when others had the machine's CPU meanwhile; the scanner makes up
        // for it by the sleep that comes next.
        let mut seconds = 3;
        let (used, most) = loop {
            thread::sleep(Duration::from_secs(seconds));
            let used = (sys.get("scan_cpu_ms")? - cpu) as f64;
            let wall = start.elapsed().as_secs_f64() * 1000.0;
            println!("ceiling {percent} %: {:.1} %", used * 100.0 / wall);
            let most = wall * percent / 100.0 * slack + 20.0;
            if used <= most || wall > 12_000.0 {
                break (used, most);
            }
            seconds = 1;
        };
        within("CPU ms", used, 0.0, most)?;
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
    let low = if ctx.setup.patience > 2.0 { 0.2 } else { 0.6 };
    scans_at(ctx, 8192.0 / 4.0, low, 1.5)
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
    // Read while the scanner stands: on a slow machine passes end between two reads.
    sys.set("run", 0)?;
    let (scans, pages) = (sys.get("full_scans")?, passed(&sys)?);
    sys.set("run", 1)?;
    ctx.until_least("full_scans", scans + 10, SOON)?;
    sys.set("run", 0)?;
    let (scans, pages) = (sys.get("full_scans")? - scans, passed(&sys)? - pages);
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
    const SAMPLES_MIN: u64 = 20;
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
            let enough = || samples.load(Ordering::Relaxed) >= SAMPLES_MIN;
            while (Instant::now() < end || !enough()) && !sampler.is_finished() {
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
    Ok(())
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
