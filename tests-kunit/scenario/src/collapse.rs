// SPDX-License-Identifier: GPL-2.0

//! Small pages that become 2 MiB again: which do, which do not, and that nobody sees a difference.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::Result;

use crate::check::{eq, page_is, that, within};
use crate::content;
use crate::contention::force;
use crate::ctx::{Ctx, Guest, Held, Mount};
use crate::harness::Case;
use crate::huge::{
    across, always, fill_half, half_twins, holds_half, huge_is, mapped_large, rss, until_one_grows,
    EQUAL, LARGE, LARGE_KB,
};
use crate::sys::{self, PAGE, WORDS};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::thinram(
        "huge/collapse",
        "512 pages of one VM's own become 2 MiB again, mapped as such",
        collapse,
    ),
    Case::thinram(
        "huge/collapse-refused",
        "shared, holes, zeroes, cold, held, not yet scanned: left alone",
        collapse_refused,
    ),
    Case::thinram(
        "huge/collapse-held",
        "who holds a page sees what is written to it, collapsed or not",
        collapse_held,
    ),
    Case::thinram(
        "huge/end-of-pressure",
        "contention splits, memory comes back, what was split is large again",
        end_of_pressure,
    ),
    Case::thinram(
        "huge/collapse-races",
        "split and collapsed under writers by mapping and syscall",
        collapse_races,
    ),
];

/// A VM of `regions` regions of small pages, each of its own content; large pages are on from here
/// on, and collapses come as soon as the pages were scanned.
fn small<'a>(ctx: &Ctx, mount: &'a Mount<'a>, name: &str, regions: usize) -> Result<Guest> {
    let sys = ctx.sys();
    sys.set("collapse_per_sec", 0)?;
    sys.set("collapse_after_secs", 0)?;
    sys.set("large_pages", "never")?;
    let guest = mount.guest(name, regions * LARGE)?;
    guest.fill(0, regions * LARGE, 1);
    sys.set("large_pages", "always")?;
    Ok(guest)
}

fn until_huge(ctx: &Ctx, vm: &str, kb: u64) -> Result<()> {
    ctx.until(&format!("huge_kb of {kb}"), 30.0, || {
        let seen = ctx.sys().vm(vm).get("huge_kb")?;
        Ok((seen == kb, seen.to_string()))
    })
}

/// The same, while the guest goes on touching all of its memory: what was taken out of the page tables
/// for a collapse that was refused (a writer held a page) counts as cold until it is touched again.
fn until_huge_in_use(ctx: &Ctx, guest: &Guest, kb: u64) -> Result<()> {
    let vm = guest.sysfs(ctx);
    ctx.until(&format!("huge_kb of {kb}, in use"), 30.0, || {
        for page in 0..8 * LARGE {
            std::hint::black_box(guest.map.get(page, 0));
        }
        let seen = vm.get("huge_kb")?;
        Ok((seen == kb, seen.to_string()))
    })
}

fn collapse(ctx: &Ctx) -> Result<()> {
    always(ctx)?;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=512M,domain=lab")?;
    let guest = small(ctx, &mount, "web", 4)?;
    let across = across(&guest.file, 4 * LARGE)?;
    across.set(1, 3, across.get(1, 3));
    huge_is(ctx, "before", "web", 0)?;
    // Zeroes become memory again, as long as they are few.
    for page in 10..20 {
        guest.map.write_page(page, &[0; WORDS]);
    }
    sys.flat_out()?;
    ctx.passes(3)?;
    eq("zero_kb", guest.sysfs(ctx).get("zero_kb")?, 40)?;
    let (made, tables) = (sys.get("collapses")?, sys.get("collapse_tables_freed")?);
    let begin = Instant::now();
    sys.set("collapse_per_sec", 1)?;
    until_huge(ctx, "web", 4 * LARGE_KB)?;
    that(
        format!("one a second: four took {:?}", begin.elapsed()),
        begin.elapsed().as_secs_f64() > 2.0,
    )?;
    eq("collapses", sys.get("collapses")? - made, 4)?;
    ctx.expect_used("collapsed", &mount, "web", 4 * LARGE_KB)?;
    guest.holds(0, 10, 1)?;
    guest.is_zero(10, 20)?;
    guest.holds(20, 4 * LARGE, 1)?;
    eq(
        "mapped large again",
        mapped_large(&guest.map)?,
        4 * LARGE_KB,
    )?;
    eq(
        "tables freed",
        sys.get("collapse_tables_freed")? - tables,
        4,
    )?;
    eq("Rss", rss(&guest.map)?, 4 * LARGE_KB)?;
    // By the mapping that is of 4 KiB it is the same memory.
    page_is("by 4 KiB", &across.read_page(30), &content::page(31))?;
    across.set(31, 3, 77);
    eq("a write by 4 KiB", guest.map.get(31, 3), 77)?;
    eq("mapped large, across", mapped_large(&across)?, 0)?;
    let before = sys.get("splits")?;
    sys::punch(&guest.file, 0, (300 * PAGE) as u64)?;
    ctx.until_is("splits", before + 1, 20.0)?;
    guest.is_zero(0, 300)?;
    guest.holds(300, 4 * LARGE, 1)?;
    drop(across);
    drop(guest.map);
    guest.file.set_len(0)?;
    ctx.expect_used("of an empty file", &mount, "web", 0)
}

fn collapse_refused(ctx: &Ctx) -> Result<()> {
    always(ctx)?;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=512M,domain=lab")?;
    let guest = small(ctx, &mount, "web", 6)?;
    let twin = mount.guest("twin", 1)?;
    twin.fill(0, 1, 1);
    // 0: one page shared. 1: a hole. 2: zeroes. 3: not mapped. 4: held. 5: nothing.
    sys::punch(&guest.file, ((LARGE + 5) * PAGE) as u64, PAGE as u64)?;
    for page in 2 * LARGE..2 * LARGE + 65 {
        guest.map.write_page(page, &[0; WORDS]);
    }
    guest
        .map
        .advise(3 * LARGE * PAGE, LARGE * PAGE, libc::MADV_DONTNEED)?;
    let held = 4 * LARGE + 9;
    let pin = Held::page(&guest.map, held)?;
    let reasons = ["shared", "holes", "zeroes", "cold", "pinned"];
    let refused = |reason: &str| sys.get(&format!("collapses_refused_{reason}"));
    let mut before = Vec::new();
    for reason in reasons {
        before.push(refused(reason)?);
    }
    // Without a scanner nobody knows about equals, and nobody will.
    sys.flat_out()?;
    ctx.passes(3)?;
    eq("pages_sharing", sys.get("pages_sharing")?, 1)?;
    let made = sys.get("collapses")?;
    huge_is(ctx, "with collapse_per_sec 0", "web", 0)?;
    sys.set("collapse_per_sec", 1000)?;
    until_huge(ctx, "web", LARGE_KB)?;
    for (reason, before) in reasons.into_iter().zip(before) {
        let name = format!("collapses_refused_{reason}");
        ctx.until_least(&name, before + 1, 20.0)?;
    }
    eq("collapses", sys.get("collapses")? - made, 1)?;
    // What is held is still the guest's page: who holds it sees what is written now.
    guest.map.write_page(held, &content::page(4711));
    pin.shows(&content::page_bytes(4711))?;
    until_huge(ctx, "web", 2 * LARGE_KB)?;
    page_is("held", &guest.map.read_page(held), &content::page(4711))?;
    // Each of the others, once its reason is gone.
    guest.fill(LARGE, LARGE + 20, 500_000);
    guest.fill(2 * LARGE, 2 * LARGE + 65, 600_000);
    guest.holds(3 * LARGE, 4 * LARGE, 1)?;
    guest.map.write_page(0, &content::page(700_000));
    until_huge(ctx, "web", 6 * LARGE_KB)?;
    page_is("page 0", &guest.map.read_page(0), &content::page(700_000))?;
    guest.holds(1, LARGE, 1)?;
    guest.holds(LARGE + 20, 2 * LARGE, 1)?;
    guest.holds(2 * LARGE + 65, 4 * LARGE + 9, 1)?;
    guest.holds(4 * LARGE + 10, 6 * LARGE, 1)?;
    // What nobody looked at may have equals.
    sys.set("run", 0)?;
    sys.set("scan_pages_per_sec", 1)?;
    let unscanned = refused("unscanned")?;
    // A round of collapses that began before would not wait for a scanner that does not run.
    sys.set("run", 1)?;
    let late = small(ctx, &mount, "late", 1)?;
    sys.set("collapse_per_sec", 1000)?;
    ctx.until_least("collapses_refused_unscanned", unscanned + 1, 20.0)?;
    huge_is(ctx, "not yet scanned", "late", 0)?;
    // Nor while the VM has no room, or wants none.
    late.sysfs(ctx).set("large_pages", "never")?;
    sys.set("run", 0)?;
    let asked = refused("unscanned")?;
    thread::sleep(ctx.limit(0.15));
    huge_is(ctx, "with large_pages never", "late", 0)?;
    late.sysfs(ctx).set("large_pages", "always")?;
    until_huge(ctx, "late", LARGE_KB)?;
    within(
        "refusals without a scanner",
        refused("unscanned")?,
        asked,
        asked + 1,
    )?;
    late.holds(0, LARGE, 1)
}

fn collapse_held(ctx: &Ctx) -> Result<()> {
    always(ctx)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = small(ctx, &mount, "web", 1)?;
    guest.held_shows_writes(9, || {
        ctx.sys().set("collapse_per_sec", 1000)?;
        until_one_grows(ctx, ["collapses", "collapses_refused_pinned"])
    })?;
    guest.holds(10, LARGE, 1)
}

fn end_of_pressure(ctx: &Ctx) -> Result<()> {
    let (mount, a, b) = half_twins(ctx)?;
    let sys = ctx.sys();
    sys.set("collapse_after_secs", 1)?;
    sys.set("collapse_per_sec", 1000)?;
    sys.flat_out()?;
    ctx.passes(2)?;
    let (splits, made) = (sys.get("splits")?, sys.get("collapses")?);
    force(ctx, "clear")?;
    ctx.until_is("pages_sharing", EQUAL, 30.0)?;
    eq("splits", sys.get("splits")? - splits, 8)?;
    // Nothing is collapsed while memory is short, and shares stay when it is not any more.
    a.fill(0, LARGE, 1 << 50);
    ctx.passes(3)?;
    eq(
        "collapses under contention",
        sys.get("collapses")? - made,
        0,
    )?;
    huge_is(ctx, "under contention", "web", 4 * LARGE_KB)?;
    force(ctx, "high")?;
    until_huge_in_use(ctx, &a, 5 * LARGE_KB)?;
    huge_is(ctx, "of b, whose pages are shared", "b", 4 * LARGE_KB)?;
    // The guests go on, each by itself.
    fill_half(&a, 7 << 32);
    b.fill(0, 8 * LARGE, 9 << 32);
    until_huge_in_use(ctx, &b, 8 * LARGE_KB)?;
    until_huge_in_use(ctx, &a, 8 * LARGE_KB)?;
    holds_half(&a, 7 << 32)?;
    b.holds(0, 8 * LARGE, 9 << 32)?;
    for vm in [&a, &b] {
        eq("mapped large again", mapped_large(&vm.map)?, 8 * LARGE_KB)?;
        ctx.expect_used("at the end", &mount, &vm.name, 8 * LARGE_KB)?;
    }
    Ok(())
}

fn collapse_races(ctx: &Ctx) -> Result<()> {
    /// Pages that the writers leave alone: holes come there.
    const HOLES: std::ops::Range<usize> = 100..120;
    const ROUNDS: u64 = 3;
    always(ctx)?;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=512M,domain=lab")?;
    let guest = small(ctx, &mount, "web", 1)?;
    sys.set("split_holes_percent", 1)?;
    sys.flat_out()?;
    sys.set("collapse_per_sec", 1000)?;
    let stop = AtomicBool::new(false);
    let running = || !stop.load(Ordering::Relaxed);
    let result: Result<Vec<u64>> = thread::scope(|scope| {
        let (guest, running) = (&guest, &running);
        let pages = || (0..LARGE).filter(|page| !HOLES.contains(page));
        let mut writers = Vec::new();
        for lane in 0..3usize {
            writers.push(scope.spawn(move || -> Result<u64> {
                let own = across(&guest.file, LARGE)?;
                let mut round = 0;
                // Each has a word of its own in every page.
                for page in pages() {
                    guest.map.set(page, lane, 0);
                }
                while running() {
                    for page in pages().filter(|page| page % 7 == round as usize % 7) {
                        match lane {
                            0 => guest.map.set(page, lane, round),
                            1 => own.set(page, lane, round),
                            _ => {
                                let at = page * PAGE + lane * 8;
                                guest.file.write_all_at(&round.to_ne_bytes(), at as u64)?;
                            }
                        }
                        let map = if round % 2 == 0 { &own } else { &guest.map };
                        eq("a word", map.get(page, lane), round)?;
                    }
                    round += 1;
                    thread::yield_now();
                }
                Ok(round)
            }));
        }
        let cycle = || -> Result<()> {
            for round in 1..=ROUNDS {
                until_huge(ctx, "web", LARGE_KB)?;
                let splits = sys.get("splits")?;
                sys::punch(
                    &guest.file,
                    (HOLES.start * PAGE) as u64,
                    (HOLES.len() * PAGE) as u64,
                )?;
                ctx.until_least("splits", splits + 1, 30.0)?;
                guest.is_zero(HOLES.start, HOLES.end)?;
                guest.fill(HOLES.start, HOLES.end, round << 40);
            }
            until_huge(ctx, "web", LARGE_KB)?;
            guest.holds(HOLES.start, HOLES.end, ROUNDS << 40)
        };
        let cycled = cycle();
        stop.store(true, Ordering::Relaxed);
        let rounds = writers
            .into_iter()
            .map(|writer| {
                writer
                    .join()
                    .unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked")))
            })
            .collect();
        cycled.and(rounds)
    });
    println!("rounds {:?}", result?);
    guest.sysfs(ctx).stat()?.check_sum()?;
    drop(guest.map);
    guest.file.set_len(0)?;
    ctx.expect_used("of an empty file", &mount, "web", 0)
}
