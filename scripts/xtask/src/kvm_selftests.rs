// SPDX-License-Identifier: GPL-2.0

//! The kernel's own selftests of KVM, with their guests' memory on ThinRAM: `scripts/vm/kvm-selftests`
//! builds them out of the kernel's source with one more source of memory.

use crate::env::{cache, read, src, Kernel};
use crate::inside::{fast, number, Ctx};
use crate::setup;
use crate::step::{run, stamp, step, tied};
use anyhow::{bail, ensure, Context, Result};
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// Tests and their arguments, for one CPU under emulation.
const TESTS: &[(&str, &str)] = &[
    ("demand_paging_test", "-s shmem -b 16M -v 1"),
    ("dirty_log_test", "-i 3 -I 10"),
    ("dirty_log_perf_test", "-s shmem -b 16M -v 1 -i 2"),
    ("memslot_modification_stress_test", "-b 16M -v 1 -i 20"),
    ("kvm_page_table_test", "-s shmem -b 16M -v 1"),
    ("pre_fault_memory_test", ""),
    ("set_memory_region_test", ""),
];

/// More than any of them needs.
const LIMIT: Duration = Duration::from_secs(900);

fn programs() -> PathBuf {
    cache("kvm-selftests")
}

/// Builds them into the cache.
pub fn build(k: &Kernel) -> Result<()> {
    let script = src("scripts/vm/kvm-selftests");
    let inputs = format!("{}\n{TESTS:?}\n{}", k.version, read(&script)?);
    step(
        "the kernel's selftests of KVM",
        &stamp("kvm-selftests"),
        &inputs,
        || {
            let mut command = tied(&script);
            command.arg(setup::source(k)?).arg(programs());
            command.args(TESTS.iter().map(|(name, _)| name));
            run(cache("logs/kvm-selftests.log"), &mut command)
        },
    )
    .map(drop)
}

/// Runs `name` while pages merge and are compressed underneath.
fn one(ctx: &Ctx, name: &str) -> Result<()> {
    const FORCE: &str = "/sys/kernel/debug/thinram/force_state";
    let (_, args) = TESTS
        .iter()
        .find(|(test, _)| *test == name)
        .with_context(|| format!("no test {name}"))?;
    let mount = ctx.mount()?;
    fast()?;
    let log = PathBuf::from(format!("/run/{name}.log"));
    let out = fs::File::create(&log)?;
    let mut child = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--"])
        .arg(programs().join(name))
        .args(args.split_whitespace())
        .env("THINRAM_VM", mount.vm("kvm")?)
        .stdout(out.try_clone()?)
        .stderr(out)
        .spawn()?;
    let start = Instant::now();
    let (mut faults, mut round) = (0, 0u32);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if start.elapsed() > LIMIT {
            child.kill()?;
            child.wait()?;
            bail!("no end in {} s: {}", LIMIT.as_secs(), read(&log)?);
        }
        // The VM is there as long as one of its files is.
        if let Ok(now) = number("vms/kvm/faults") {
            faults = faults.max(now);
        }
        round += 1;
        let state = if round % 8 < 6 { "none" } else { "hard" };
        fs::write(FORCE, state)?;
        std::thread::sleep(Duration::from_millis(50));
    };
    fs::write(FORCE, "none")?;
    ensure!(status.success(), "{status}: {}", read(&log)?);
    ensure!(faults > 0, "no page of its memory was on ThinRAM");
    Ok(())
}

/// Pages that are given to a guest when it touches them.
pub fn demand_paging(ctx: &Ctx) -> Result<()> {
    one(ctx, "demand_paging_test")
}

/// What the guest writes is in the dirty log, and nothing else.
pub fn dirty_log(ctx: &Ctx) -> Result<()> {
    one(ctx, "dirty_log_test")?;
    one(ctx, "dirty_log_perf_test")
}

/// Slots of memory come and go while the guest runs.
pub fn memslots(ctx: &Ctx) -> Result<()> {
    one(ctx, "memslot_modification_stress_test")
}

/// Slots are moved and deleted while they are in use, and as many made as there may be.
pub fn regions(ctx: &Ctx) -> Result<()> {
    one(ctx, "set_memory_region_test")
}

/// Mappings of the guest are made, changed and put together.
pub fn page_tables(ctx: &Ctx) -> Result<()> {
    one(ctx, "kvm_page_table_test")?;
    one(ctx, "pre_fault_memory_test")
}
