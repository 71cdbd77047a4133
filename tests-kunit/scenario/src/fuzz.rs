// SPDX-License-Identifier: GPL-2.0

//! Random calls against a model of what files and mappings must hold.

mod bench;
mod fsx;
mod knobs;
mod op;

use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use self::bench::{Bench, Crowd};
use self::op::Shape;
use crate::contention::force;
use crate::ctx::Ctx;
use crate::harness::Case;
use crate::huge;
use crate::sys::{self, Map, PAGE};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::both(
        "fuzz/calls",
        "random calls against a model; replay with --seed",
        |ctx| alone(ctx, Shape::SMALL),
    )
    .span(10.0),
    Case::thinram(
        "fuzz/large",
        "the same with 2 MiB pages that come and go",
        |ctx| {
            huge::always(ctx)?;
            large(ctx)
        },
    )
    .span(10.0),
    Case::both(
        "fuzz/processes",
        "three processes at once, each with a model, and the host's knobs",
        processes,
    )
    .span(10.0),
    Case::both(
        "fuzz/fsx",
        "what fsx does and checks, on one file; replay with --seed",
        fsx::fsx,
    )
    .span(8.0),
];

const OPTIONS: &str = "size=256M,domain=lab";

fn alone(ctx: &Ctx, shape: Shape) -> Result<()> {
    let mount = ctx.mount("m", OPTIONS)?;
    let mut bench = Bench::new(ctx, &mount, 0, shape)?;
    if ctx.is_thinram() {
        ctx.sys().flat_out()?;
    }
    let seed = ctx.setup.seed;
    println!("seed {seed}");
    let count = bench.run(seed, Instant::now() + ctx.span(10.0), None)?;
    println!("{count} calls");
    counters(ctx)
}

/// On files with room for 2 MiB pages; goes on until there were some, mapped as such, and some were
/// split and made anew.
fn large(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", OPTIONS)?;
    let mut bench = Bench::new(ctx, &mount, 0, Shape::LARGE)?;
    let sys = ctx.sys();
    sys.flat_out()?;
    sys.set("collapse_after_secs", 0)?;
    let splits = sys.get("splits")?;
    let (span, mut seed) = (ctx.span(10.0), ctx.setup.seed);
    println!("seed {seed}, one more in each round");
    let begin = Instant::now();
    let last = begin + span + ctx.limit(15.0);
    let mut count = 0;
    loop {
        count += bench.run(seed, Instant::now() + span, None)?;
        let most = bench.most_large();
        let seen = format!(
            "{count} calls: at most {} KiB of 2 MiB pages, {} KiB mapped as such, {} split",
            most.huge_kb,
            most.mapped_kb,
            sys.get("splits")? - splits
        );
        println!("{seen}");
        let all = most.huge_kb > 0 && most.mapped_kb > 0 && sys.get("splits")? > splits;
        if all {
            return counters(ctx);
        }
        ensure!(Instant::now() < last, "expected some of each: {seen}");
        seed = seed.wrapping_add(1);
    }
}

fn counters(ctx: &Ctx) -> Result<()> {
    if !ctx.is_thinram() {
        return Ok(());
    }
    let sys = ctx.sys();
    for name in [
        "cow_breaks",
        "full_scans",
        "compressions",
        "decompressions",
        "splits",
        "collapses",
    ] {
        println!("{name} {}", sys.get(name)?);
    }
    Ok(())
}

/// Processes with files of their own, equal contents, and one that turns the host's knobs.
fn processes(ctx: &Ctx) -> Result<()> {
    const COUNT: usize = 3;
    let mount = ctx.mount("m", OPTIONS)?;
    let seed = ctx.setup.seed;
    println!("seed {seed}, one more for each process");
    let mut benches = Vec::new();
    let mut files = Vec::new();
    for number in 0..COUNT {
        let bench = Bench::new(ctx, &mount, number, Shape::SMALL)?;
        files.extend(bench.shared_files()?);
        benches.push(bench);
    }
    let crowd = Crowd {
        pids: Map::anonymous(PAGE)?,
        files,
        count: COUNT,
    };
    let end = Instant::now() + ctx.span(10.0);
    let mut children = Vec::new();
    for (number, bench) in benches.iter_mut().enumerate() {
        let (seed, crowd) = (seed.wrapping_add(number as u64), &crowd);
        let child = sys::fork(|| {
            let count = bench
                .run(seed, end, Some(crowd))
                .with_context(|| format!("process {number}"))?;
            println!("process {number}: {count} calls");
            Ok(())
        })?;
        crowd.pids.set(0, number, child.pid().as_raw() as u64);
        children.push(child);
    }
    let mut rng = SmallRng::seed_from_u64(seed);
    while ctx.is_thinram() && Instant::now() < end {
        knobs::host(&ctx.sys(), rng.random_range(0..64))?;
        if rng.random_bool(0.1) {
            let states = ["none", "high", "clear", "soft", "hard"];
            force(ctx, states[rng.random_range(0..states.len())])?;
        }
        if rng.random_bool(0.02) {
            // Every page may be waited for now.
            force(ctx, "low")?;
            std::thread::sleep(Duration::from_millis(20));
            force(ctx, "none")?;
        }
        std::thread::sleep(Duration::from_millis(rng.random_range(0..10)));
    }
    if ctx.is_thinram() {
        force(ctx, "none")?;
    }
    for child in &mut children {
        child.expect_ok(ctx.limit(20.0))?;
    }
    counters(ctx)
}
