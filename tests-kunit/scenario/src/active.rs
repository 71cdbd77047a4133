// SPDX-License-Identifier: GPL-2.0

//! The working set: `active_kb` follows what a guest does, and idle memory pays.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::Result;

use crate::check::{eq, within};
use crate::contention::force;
use crate::ctx::{Ctx, Guest};
use crate::harness::Case;
use crate::huge::{always, mapped_large, LARGE, LARGE_KB};

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
        "huge/active",
        "2 MiB pages are only watched while somebody asks, or memory is short",
        active_large,
    ),
];

/// Touches the first `hot` pages of `guest`, whatever that is, over and over while `work` runs.
fn while_touching(
    guest: &Guest,
    hot: &AtomicUsize,
    work: impl FnOnce() -> Result<()>,
) -> Result<()> {
    const STOP: usize = usize::MAX;
    thread::scope(|scope| {
        scope.spawn(|| loop {
            let pages = match hot.load(Ordering::Relaxed) {
                STOP => break,
                pages => pages,
            };
            let mut sum = 0u64;
            for page in 0..pages {
                sum = sum.wrapping_add(guest.map.get(page, 0));
            }
            std::hint::black_box(sum);
            thread::sleep(std::time::Duration::from_millis(20));
        });
        let done = work();
        hot.store(STOP, Ordering::Relaxed);
        done
    })
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
    sys.set("active_sample_period_secs", 1)?;
    let hot = AtomicUsize::new(PAGES / 2);
    while_touching(&guest, &hot, || {
        for round in 0..2 {
            // With 100 samples, 20 % is four times the deviation of a half.
            for (pages, low, high) in [(PAGES / 2, 30, 70), (0, 0, 0), (PAGES, 100, 100)] {
                hot.store(pages, Ordering::Relaxed);
                two_periods(ctx)?;
                let seen = vm.get("active_kb")? * 100 / size;
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
        Ok(())
    })?;
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
    let hot = AtomicUsize::new(0);
    while_touching(&guest, &hot, || {
        for regions in [0, REGIONS / 2, 0, REGIONS] {
            hot.store(regions * LARGE, Ordering::Relaxed);
            two_periods(ctx)?;
            let seen = vm.get("active_kb")?;
            let kb = regions as u64 * LARGE_KB;
            // Two samples of a region may be of one page, and count once.
            within(
                format!("active_kb with {regions} regions in use"),
                seen,
                kb * 9 / 10,
                (kb * 11 / 10).min(all_kb),
            )?;
        }
        Ok(())
    })?;
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
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let (idle, busy) = (mount.guest("idle", 2048)?, mount.guest("busy", 2048)?);
    for (guest, first) in [(&idle, 1), (&busy, 5000)] {
        guest.fill(0, 2048, first);
        guest.sysfs(ctx).set("compress_max_percent", 100)?;
    }
    // The busy one has a bit less to its name: without the tax it would pay first.
    busy.sysfs(ctx).set("shares", 900)?;
    sys.set("active_sample_period_secs", 1)?;
    let hot = AtomicUsize::new(2048);
    while_touching(&busy, &hot, || {
        two_periods(ctx)?;
        force(ctx, "hard")?;
        let vm = idle.sysfs(ctx);
        ctx.until("half of the idle VM is compressed", 30.0, || {
            let seen = vm.get("compressed_kb")?;
            Ok((seen >= 4096, format!("{seen} KiB")))
        })?;
        eq(
            "compressions of the busy VM by then",
            busy.sysfs(ctx).get("compressions")?,
            0,
        )?;
        force(ctx, "none")
    })?;
    idle.holds(0, 2048, 1)?;
    busy.holds(0, 2048, 5000)
}
