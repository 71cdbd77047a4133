// SPDX-License-Identifier: GPL-2.0

//! Whether the harness itself notices: cases that fail in every way there is, and what each must
//! be reported as.

use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, Result};

use crate::check::{self, skip, BusError, Corrupt};
use crate::ctx::{Ctx, Setup};
use crate::harness::{comment, run_case, Case, Report, Verdict};
use crate::sys::{self, Map, PAGE, RW};

const fn quick(name: &'static str, checks: &'static str, run: fn(&Ctx) -> Result<()>) -> Case {
    Case {
        limit: 3.0,
        ..Case::both(name, checks, run)
    }
}

/// Cases that are no tests of a file system.
pub const CASES: &[Case] = &[
    quick("self/pass", "ends well", |_| Ok(())),
    quick("self/skip", "skips", |_| Err(skip("nothing to do"))),
    quick("self/fail", "sees something else than expected", |_| {
        check::eq("one", 2, 1)
    }),
    quick("self/corrupt", "sees data that nobody wrote", |_| {
        Err(anyhow!(Corrupt("on purpose".into())))
    }),
    quick("self/child-bus-error", "a helper gets SIGBUS", |_| {
        Err(anyhow!(BusError))
    }),
    quick(
        "self/bus-error",
        "touches beyond the end of a file",
        |ctx| {
            let mount = ctx.mount("m", "size=1M")?;
            let file = mount.file("web", "ram", 1)?;
            let map = Map::shared(&file, 0, 2 * PAGE, RW)?;
            bail!("read {} beyond the end", map.get(1, 0))
        },
    ),
    quick("self/panic", "panics", |_| panic!("on purpose")),
    quick("self/abort", "is killed by a signal", |_| {
        std::process::abort()
    }),
    quick("self/hang", "does not end", |_| loop {
        std::thread::sleep(Duration::from_secs(1));
    }),
    quick(
        "self/leave-helper",
        "leaves a process that holds a mount",
        |ctx| {
            let mount = ctx.mount("m", "size=1M")?;
            let file = mount.file("web", "ram", 1)?;
            std::mem::forget(sys::fork(|| {
                let _open = file;
                loop {
                    std::thread::sleep(Duration::from_secs(1));
                }
            })?);
            std::process::exit(0)
        },
    ),
    quick("self/leave-mount", "leaves a mount", |ctx| {
        std::mem::forget(ctx.mount("m", "size=1M")?);
        Ok(())
    }),
];

/// What each must be reported as.
fn expected(name: &str) -> Verdict {
    match name {
        // What is left behind is taken down by the harness.
        "self/pass" | "self/leave-helper" | "self/leave-mount" => Verdict::Pass,
        "self/skip" => Verdict::Skip("nothing to do".into()),
        "self/corrupt" => Verdict::Corrupt,
        "self/child-bus-error" | "self/bus-error" => Verdict::BusError,
        _ => Verdict::Fail,
    }
}

/// Runs them, and reports in KTAP whether each was seen for what it is.
pub fn run(setup: &Setup) -> Result<()> {
    sys::become_subreaper()?;
    let mut report = Report::start(CASES.len());
    for case in CASES {
        let start = Instant::now();
        let seen = run_case(case, setup)?;
        let wanted = expected(case.name);
        let mounts = std::fs::read_to_string("/proc/self/mounts")?;
        let dir = setup.base.join(case.name.replace('/', "-"));
        let clean = !dir.exists() && !mounts.contains(&*dir.to_string_lossy());
        let verdict = if seen == wanted && clean {
            Verdict::Pass
        } else {
            comment(&format!(
                "expected {wanted:?} and no leftovers, seen {seen:?}, clean {clean}"
            ));
            Verdict::Fail
        };
        report.result(case.name, &verdict, start.elapsed());
    }
    report.end()
}
