// SPDX-License-Identifier: GPL-2.0

//! The working set: `active_kb` follows what a guest does, and idle memory pays.

use anyhow::{bail, Result};

use crate::check::{eq, within};
use crate::contention::force;
use crate::ctx::{Ctx, Guest};
use crate::harness::Case;
use crate::huge::{always, mapped_large, LARGE, LARGE_KB};
use crate::sharing::merged_twins;

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::thinram(
        "contend/active",
        "active_kb follows a guest from idle to busy and back",
        active,
    ),
    Case::thinram(
        "contend/idle-tax",
        "of two alike the idle one pays first",
        idle_tax,
    ),
    Case::thinram(
        "contend/idle-first",
        "pages in use stay while another VM has idle ones, whatever its shares",
        |ctx| idle_first(ctx, false),
    ),
    Case::thinram(
        "huge/idle-first",
        "the same where all of it is 2 MiB pages",
        |ctx| idle_first(ctx, true),
    ),
    Case::thinram(
        "contend/idle-shared",
        "shared pages touched within a period stay while a VM has idle ones",
        idle_shared,
    ),
    Case::thinram(
        "contend/filling",
        "what came since a period began is in use, and does not pay for idle memory",
        filling,
    ),
    Case::thinram(
        "huge/active",
        "2 MiB pages are only watched while somebody asks, or memory is short",
        active_large,
    ),
];

/// Touches the first `pages` pages of `guest`.
fn touch(guest: &Guest, pages: usize) {
    let mut sum = 0u64;
    for page in 0..pages {
        sum = sum.wrapping_add(guest.map.get(page, 0));
    }
    std::hint::black_box(sum);
}

/// What `read` says after a period in which `work` was done. It ends when this says so, and the next
/// lasts for as long as the caller likes; one that ended by itself, because this had no CPU for a
/// second, tells nothing, and another takes its place.
fn after_period<T>(ctx: &Ctx, work: impl Fn(), read: impl Fn() -> Result<T>) -> Result<T> {
    const TRIES: usize = 30;
    let sys = ctx.sys();
    let end = || -> Result<u64> {
        let now = sys.get("active_samples")?;
        sys.set("active_sample_period_secs", 1)?;
        ctx.until_least("active_samples", now + 1, 30.0)?;
        sys.set("active_sample_period_secs", 3600)?;
        sys.get("active_samples")
    };
    for _ in 0..TRIES {
        let began = end()?;
        work();
        let ended = end()?;
        let seen = read()?;
        if (ended, sys.get("active_samples")?) == (began + 1, ended) {
            return Ok(seen);
        }
        println!("a period ended by itself");
    }
    bail!("{TRIES} periods of a second ended by themselves")
}

/// Lets the period that is under way and a whole one pass: two at most.
fn two_periods(ctx: &Ctx) -> Result<()> {
    let now = ctx.sys().get("active_samples")?;
    ctx.until_least("active_samples", now + 2, 30.0)
}

fn active(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 16384;
    let size = 4 * PAGES as u64;
    let sys = ctx.sys();
    for (name, default) in [
        ("active_sample_pages", 100),
        ("active_sample_period_secs", 30),
    ] {
        eq(name, sys.get(name)?, default)?;
    }
    let mount = ctx.mount("m", "size=128M,domain=lab")?;
    let guest = mount.guest("web", PAGES)?;
    for page in 0..PAGES {
        guest.map.set(page, 0, page as u64 + 1);
    }
    let vm = guest.sysfs(ctx);
    eq(
        "active_kb before the first period is over",
        vm.get("active_kb")?,
        size,
    )?;
    for round in 0..2 {
        // With 100 samples, 20 % is four times the deviation of a half.
        for (pages, low, high) in [(PAGES / 2, 30, 70), (0, 0, 0), (PAGES, 100, 100)] {
            let seen = after_period(ctx, || touch(&guest, pages), || vm.get("active_kb"))?;
            let seen = seen * 100 / size;
            println!(
                "round {round}: {} % in use, {seen} % seen",
                pages * 100 / PAGES
            );
            within(
                format!("percent seen of {pages} pages in use"),
                seen,
                low,
                high,
            )?;
        }
    }
    for page in 0..PAGES {
        eq(
            format!("page {page}"),
            guest.map.get(page, 0),
            page as u64 + 1,
        )?;
    }
    Ok(())
}

fn active_large(ctx: &Ctx) -> Result<()> {
    /// Regions, fewer than a period has samples: all of them are under watch, or none.
    const REGIONS: usize = 8;
    /// Periods for which a question keeps them under watch.
    const ASKED: u64 = 10;
    always(ctx)?;
    let sys = ctx.sys();
    sys.set("run", 0)?;
    let mount = ctx.mount("m", "size=128M,domain=lab")?;
    let guest = mount.guest("web", REGIONS * LARGE)?;
    guest.fill(0, REGIONS * LARGE, 1);
    let vm = guest.sysfs(ctx);
    let all_kb = REGIONS as u64 * LARGE_KB;
    sys.set("active_sample_period_secs", 1)?;
    let spared = |what: &str| -> Result<()> {
        let faults = vm.get("faults")?;
        two_periods(ctx)?;
        eq(
            format!("KiB mapped large {what}"),
            mapped_large(&guest.map)?,
            all_kb,
        )?;
        guest.holds(0, REGIONS * LARGE, 1)?;
        eq(format!("faults {what}"), vm.get("faults")? - faults, 0)
    };
    spared("while nobody asks")?;
    eq(
        "active_kb of what nobody watched",
        vm.get("active_kb")?,
        all_kb,
    )?;
    for regions in [0, REGIONS / 2, 0, REGIONS] {
        let seen = after_period(
            ctx,
            || touch(&guest, regions * LARGE),
            || vm.get("active_kb"),
        )?;
        let kb = regions as u64 * LARGE_KB;
        // Two samples of a region may be of one page, and count once.
        within(
            format!("active_kb with {regions} regions in use"),
            seen,
            kb * 9 / 10,
            (kb * 11 / 10).min(all_kb),
        )?;
    }
    sys.set("active_sample_period_secs", 1)?;
    let asked = sys.get("active_samples")?;
    ctx.until_least("active_samples", asked + ASKED + 1, 60.0)?;
    guest.holds(0, REGIONS * LARGE, 1)?;
    spared("when nobody asked for long")?;
    // Memory is short: who will pay for it has to be known, whether somebody asks or not.
    force(ctx, "clear")?;
    two_periods(ctx)?;
    eq("KiB mapped large, idle", mapped_large(&guest.map)?, 0)?;
    eq("active_kb, idle", vm.get("active_kb")?, 0)?;
    guest.holds(0, REGIONS * LARGE, 1)
}

fn idle_tax(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let (idle, busy) = (mount.guest("idle", 2048)?, mount.guest("busy", 2048)?);
    for (guest, first) in [(&idle, 1), (&busy, 5000)] {
        guest.fill(0, 2048, first);
        guest.sysfs(ctx).set("compress_max_percent", 100)?;
    }
    // The busy one has a bit less to its name: without the tax it would pay first.
    busy.sysfs(ctx).set("shares", 900)?;
    after_period(ctx, || touch(&busy, 2048), || Ok(()))?;
    force(ctx, "hard")?;
    ctx.until("the busy VM pays too", 60.0, || {
        // In this order: what the idle one has left afterwards is no more than it had then.
        let kept = busy.sysfs(ctx).stat()?.get("private_kb")?;
        let left = idle.sysfs(ctx).stat()?.get("private_kb")?;
        let pays = kept < 8192;
        if pays {
            let what = format!("KiB of the idle VM while the busy one has {kept}");
            within(what, left, 0, kept / 2)?;
        }
        Ok((pays, format!("{kept} and {left} KiB left")))
    })?;
    force(ctx, "none")?;
    idle.holds(0, 2048, 1)?;
    busy.holds(0, 2048, 5000)
}

/// Waits until all of `first` was compressed; by then `lost`, pages `of` something else, must not have grown.
fn pays_before(ctx: &Ctx, first: &Guest, of: &str, lost: impl Fn() -> Result<u64>) -> Result<()> {
    let vm = first.sysfs(ctx);
    let before = lost()?;
    ctx.until(
        &format!("all of {} is compressed", first.name),
        60.0,
        || {
            // In this order: what is left afterwards was there when the others' pages were counted.
            let lost = lost()? - before;
            let stat = vm.stat()?;
            let left = stat.get("private_kb")? + stat.get("huge_kb")?;
            if left > 0 {
                let what = format!("{of} pages compressed, {left} KiB of {}", first.name);
                eq(what, lost, 0)?;
            }
            Ok((left == 0, format!("{left} KiB left")))
        },
    )
}

fn idle_shared(ctx: &Ctx) -> Result<()> {
    const IDLE: usize = 4 * LARGE;
    const SHARED: usize = LARGE;
    let sys = ctx.sys();
    let (mount, a, b) = merged_twins(ctx, SHARED)?;
    let idle = mount.guest("idle", IDLE)?;
    idle.fill(0, IDLE, 5000);
    idle.sysfs(ctx).set("compress_max_percent", 100)?;
    sys.set("active_sample_period_secs", 1)?;
    two_periods(ctx)?;
    // What was touched so far was touched within this one.
    sys.set("active_sample_period_secs", 3600)?;
    let lost = || sys.get("shared_compressions");
    let before = lost()?;
    force(ctx, "hard")?;
    pays_before(ctx, &idle, "shared", lost)?;
    // When no VM has idle pages left, what nobody touches for two rounds goes.
    ctx.until("all shared pages are compressed", 60.0, || {
        let seen = lost()? - before;
        Ok((seen == SHARED as u64, seen.to_string()))
    })?;
    force(ctx, "none")?;
    a.holds(0, SHARED, 1)?;
    b.holds(0, SHARED, 1)?;
    idle.holds(0, IDLE, 5000)
}

fn idle_first(ctx: &Ctx, large: bool) -> Result<()> {
    const IDLE: usize = 4 * LARGE;
    const BUSY: usize = 6 * LARGE;
    let sys = ctx.sys();
    sys.set("run", 0)?;
    if large {
        always(ctx)?;
    }
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let (idle, busy) = (mount.guest("idle", IDLE)?, mount.guest("busy", BUSY)?);
    for (guest, pages, first) in [(&idle, IDLE, 1), (&busy, BUSY, 5000)] {
        guest.fill(0, pages, first);
        guest.sysfs(ctx).set("compress_max_percent", 100)?;
        if large {
            let kb = guest.sysfs(ctx).get("huge_kb")?;
            eq(format!("huge_kb of {}", guest.name), kb, 4 * pages as u64)?;
        }
    }
    // By shares and tax alone the busy one would pay for all.
    idle.sysfs(ctx).set("shares", 100_000)?;
    busy.sysfs(ctx).set("shares", 100)?;
    let compressed = |guest: &Guest| guest.sysfs(ctx).get("compressions");
    if large {
        // They are watched only for who asks.
        for guest in [&idle, &busy] {
            guest.sysfs(ctx).get("active_kb")?;
        }
    }
    after_period(ctx, || touch(&busy, BUSY), || Ok(()))?;
    force(ctx, "hard")?;
    pays_before(ctx, &idle, "busy", || compressed(&busy))?;
    // When nobody has idle pages left, those in use are paid with.
    ctx.until("pages of the busy VM are compressed", 60.0, || {
        let seen = compressed(&busy)?;
        Ok((seen > 0, seen.to_string()))
    })?;
    force(ctx, "none")?;
    idle.holds(0, IDLE, 1)?;
    busy.holds(0, BUSY, 5000)?;
    if large {
        return Ok(());
    }
    // Without a tax shares alone decide.
    sys.set("idle_tax_percent", 0)?;
    after_period(ctx, || touch(&busy, BUSY), || Ok(()))?;
    let (of_idle, of_busy) = (compressed(&idle)?, compressed(&busy)?);
    force(ctx, "hard")?;
    ctx.until("the busy VM pays", 60.0, || {
        let seen = compressed(&busy)? - of_busy;
        Ok((seen > 512, seen.to_string()))
    })?;
    eq(
        "compressions of the idle VM",
        compressed(&idle)? - of_idle,
        0,
    )?;
    force(ctx, "none")?;
    idle.holds(0, IDLE, 1)?;
    busy.holds(0, BUSY, 5000)
}

fn filling(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 2048;
    const AT_FIRST: usize = 64;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = |name: &str, pages: usize, first: u64| -> Result<Guest> {
        let guest = mount.guest(name, PAGES)?;
        guest.fill(0, pages, first);
        guest.sysfs(ctx).set("compress_max_percent", 100)?;
        Ok(guest)
    };
    let old = guest("old", PAGES, 1)?;
    let (new, one) = (guest("new", AT_FIRST, 5000)?, guest("one", AT_FIRST, 9000)?);
    // By shares alone the new one would pay first.
    new.sysfs(ctx).set("shares", 100)?;
    sys.set("active_sample_period_secs", 1)?;
    two_periods(ctx)?;
    let active = |guest: &Guest| guest.sysfs(ctx).get("active_kb");
    for guest in [&old, &new, &one] {
        let what = format!("active_kb of {}, idle", guest.name);
        eq(what, active(guest)?, 0)?;
    }
    // One period that lasts for as long as it is told to.
    sys.set("active_sample_period_secs", 600)?;
    let came = 4 * (PAGES - AT_FIRST) as u64;
    one.fill(AT_FIRST, PAGES, 9000);
    eq("active_kb of what came", active(&one)?, came)?;
    // It counts for the period in which it came, and is as any other memory in the next.
    let samples = sys.get("active_samples")?;
    sys.set("active_sample_period_secs", 8)?;
    ctx.until_least("active_samples", samples + 1, 30.0)?;
    // Places that were empty are drawn too, and touched as they fill: what was there may count as well.
    let all = 4 * PAGES as u64;
    within("active_kb after that period", active(&one)?, came, all)?;
    ctx.until_least("active_samples", samples + 2, 30.0)?;
    eq("active_kb after the next", active(&one)?, 0)?;
    drop(one);
    sys.set("active_sample_period_secs", 600)?;
    new.fill(AT_FIRST, PAGES, 5000);
    eq("active_kb of what came", active(&new)?, came)?;
    eq("active_kb of the other", active(&old)?, 0)?;
    force(ctx, "hard")?;
    pays_before(ctx, &old, "new", || new.sysfs(ctx).get("compressions"))?;
    force(ctx, "none")?;
    old.holds(0, PAGES, 1)?;
    new.holds(0, PAGES, 5000)
}
