// SPDX-License-Identifier: GPL-2.0

//! Random calls against a model of what files and mappings must hold.

mod bench;
mod common;
mod fsx;
mod knobs;
mod op;

use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use self::bench::{Bench, Crowd};
use self::common::Common;
use self::op::Shape;
use crate::contention::force;
use crate::ctx::Ctx;
use crate::harness::Case;
use crate::huge;
use crate::sys::{self, Child};

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
        "three processes at once, each with a model, one file of all three, and the host's knobs",
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
    println!("seed {}", ctx.setup.seed);
    let count = bench.run(Instant::now() + ctx.span(10.0), None)?;
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
    let span = ctx.span(10.0);
    println!("seed {}", ctx.setup.seed);
    let last = Instant::now() + span + ctx.limit(15.0);
    loop {
        let count = bench.run(Instant::now() + span, None)?;
        let most = bench.most_large();
        let seen = format!(
            "{count} calls: at most {} KiB of 2 MiB pages, {} KiB mapped as such, {} moves of 2 MiB, \
             {} split",
            most.huge_kb,
            most.mapped_kb,
            most.moves,
            sys.get("splits")? - splits
        );
        println!("{seen}");
        let all =
            most.huge_kb > 0 && most.mapped_kb > 0 && most.moves > 0 && sys.get("splits")? > splits;
        // So many calls are made again for what comes of them, not for what there was.
        if all || ctx.setup.calls.is_some() {
            return counters(ctx);
        }
        ensure!(Instant::now() < last, "expected some of each: {seen}");
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

/// Processes with files of their own, equal contents, and one file of all, and one process that turns
/// the host's knobs.
fn processes(ctx: &Ctx) -> Result<()> {
    const COUNT: usize = 3;
    let mount = ctx.mount("m", OPTIONS)?;
    let seed = ctx.setup.seed;
    println!("seed {seed}, of which each process's calls come");
    let mut benches = Vec::new();
    let mut files = Vec::new();
    for number in 0..COUNT {
        let bench = Bench::new(ctx, &mount, number, Shape::SMALL.among(COUNT))?;
        files.extend(bench.shared_files()?);
        benches.push(bench);
    }
    let common = Common::new(&mount, COUNT)?;
    let end = Instant::now() + ctx.span(10.0);
    let mut children = Vec::new();
    for (number, bench) in benches.iter_mut().enumerate() {
        children.push(sys::fork(|| {
            let crowd = Crowd {
                files: &files,
                common: common.join(number)?,
            };
            let count = bench
                .run(end, Some(&crowd))
                .with_context(|| format!("process {number}"))?;
            println!("process {number}: {count} calls");
            Ok(())
        })?);
    }
    let mut rng = SmallRng::seed_from_u64(seed);
    let vm = ctx.sys().vm(common::VM);
    while ctx.is_thinram() && busy(&mut children)? {
        knobs::vm(&vm, rng.random_range(0..64))?;
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
    common.end(ctx)?;
    counters(ctx)
}

/// Whether some still run.
fn busy(children: &mut [Child]) -> Result<bool> {
    for child in children {
        if child.poll()?.is_none() {
            return Ok(true);
        }
    }
    Ok(false)
}
