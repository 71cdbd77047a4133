// SPDX-License-Identifier: GPL-2.0

//! The working set: `active_kb` follows what a guest does, and idle memory pays.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::Result;

use crate::check::{eq, within};
use crate::contention::force;
use crate::ctx::{Ctx, Guest};
use crate::harness::Case;

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
