// SPDX-License-Identifier: GPL-2.0

//! Contention: what the module does when the host's memory is short.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use crate::check::{eq, within};
use crate::ctx::Ctx;
use crate::harness::Case;
use crate::sys::{self, PAGE};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::thinram(
        "contend/states",
        "a forced state is shown, timed and kept",
        states,
    ),
    Case::thinram(
        "contend/poll",
        "poll(2) on `state` wakes at a change, and only then",
        polled,
    ),
    Case::thinram(
        "contend/minfree",
        "states by minfree_kb: down at once, up after 2 s",
        minfree,
    ),
    Case::thinram(
        "contend/memory-use",
        "a guest that takes memory changes the state",
        memory_use,
    ),
];

/// The words of `state`, the best first.
const STATES: [&str; 5] = ["high", "clear", "soft", "hard", "low"];

/// The file that holds a state.
fn hook(ctx: &Ctx) -> Result<PathBuf> {
    let path = ctx.setup.debug.join("force_state");
    // A look may fail where allocations do.
    let there = path
        .try_exists()
        .with_context(|| format!("{}", path.display()))?;
    ensure!(there, "{} is missing: no debugfs?", path.display());
    Ok(path)
}

/// Holds the host in `state`, or lets it go with `none`.
pub fn force(ctx: &Ctx, state: &str) -> Result<()> {
    let path = hook(ctx)?;
    fs::write(&path, state).with_context(|| format!("write {state:?} to {}", path.display()))
}

fn until_state(ctx: &Ctx, state: &str, seconds: f64) -> Result<()> {
    let sys = ctx.sys();
    ctx.until(&format!("state {state}"), seconds, || {
        let seen = sys.word("state")?;
        Ok((seen == state, seen))
    })
}

fn states(ctx: &Ctx) -> Result<()> {
    let (sys, path) = (ctx.sys(), hook(ctx)?);
    eq(
        "force_state at first",
        fs::read_to_string(&path)?,
        "none\n".to_owned(),
    )?;
    for state in STATES.into_iter().rev() {
        let before = sys.get(&format!("state_{state}_ms"))?;
        force(ctx, state)?;
        eq("state", sys.word("state")?, state.to_owned())?;
        eq(
            "force_state",
            fs::read_to_string(&path)?,
            format!("{state}\n"),
        )?;
        // Longer than the reclaimer's longest sleep: it leaves a forced state alone.
        thread::sleep(Duration::from_millis(1300));
        eq("state 1.3 s later", sys.word("state")?, state.to_owned())?;
        let spent = sys.get(&format!("state_{state}_ms"))? - before;
        ensure!(spent >= 1250, "state_{state}_ms grew by {spent} in 1300 ms");
    }
    for bad in ["", "High", "none ", "1", "a word that is much too long"] {
        let error = fs::write(&path, bad).err().and_then(|e| e.raw_os_error());
        // An empty write reaches no handler.
        if !bad.is_empty() {
            eq(
                format!("force_state {bad:?}"),
                error,
                Some(Errno::EINVAL as i32),
            )?;
        }
    }
    eq(
        "state after bad words",
        sys.word("state")?,
        "high".to_owned(),
    )?;
    force(ctx, "none")
}

fn polled(ctx: &Ctx) -> Result<()> {
    force(ctx, "high")?;
    let path = ctx.setup.sys.join("state");
    let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
    let wait = |ms: u16| -> Result<bool> {
        let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
        Ok(poll(&mut fds, PollTimeout::from(ms))? > 0)
    };
    let seen = || -> Result<String> {
        let mut text = String::new();
        let mut file = &file;
        file.rewind()?;
        file.read_to_string(&mut text)?;
        Ok(text)
    };
    eq("state", seen()?, "high\n".to_owned())?;
    ensure!(!wait(200)?, "poll woke although nothing changed");
    force(ctx, "high")?;
    ensure!(!wait(200)?, "poll woke for the state that was there before");
    for state in ["soft", "low", "clear", "high"] {
        thread::scope(|scope| -> Result<()> {
            let woken = scope.spawn(|| wait(20_000));
            thread::sleep(Duration::from_millis(50));
            force(ctx, state)?;
            let woken = woken.join().expect("the thread does not panic")?;
            ensure!(woken, "poll did not wake at {state}");
            eq("state", seen()?, format!("{state}\n"))
        })?;
    }
    force(ctx, "none")
}

fn minfree(ctx: &Ctx) -> Result<()> {
    /// What a better state waits for.
    const HOLD: Duration = Duration::from_secs(2);
    let sys = ctx.sys();
    eq("minfree_kb", sys.get("minfree_kb")?, 0)?;
    let computed = sys.get("minfree_effective_kb")?;
    let text = fs::read_to_string("/proc/meminfo")?;
    let total: u64 = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.split_whitespace().next())
        .context("no MemTotal in /proc/meminfo")?
        .parse()?;
    ensure!(
        total < 4 << 20,
        "this test expects a machine of less than 4 GiB, not {total} KiB"
    );
    within(
        "computed minfree, KiB",
        computed,
        total * 6 / 100 - 1,
        total * 6 / 100 + 1,
    )?;
    // What share of minfree is available, and the state that means.
    for (percent, state) in [(220, "clear"), (80, "soft"), (48, "hard"), (20, "low")] {
        sys.set("minfree_kb", sys.get("available_kb")? * 100 / percent)?;
        eq(
            format!("state at {percent} %"),
            sys.word("state")?,
            state.to_owned(),
        )?;
        for bad in ["-1", "1k", "", "x"] {
            let error = sys.try_set("minfree_kb", bad.as_bytes()).err();
            if !bad.is_empty() {
                let errno = error.and_then(|e| e.raw_os_error());
                eq(
                    format!("minfree_kb {bad:?}"),
                    errno,
                    Some(Errno::EINVAL as i32),
                )?;
            }
        }
        let error = sys.try_set("minfree_kb", b"18014398509481984").err();
        let errno = error.and_then(|e| e.raw_os_error());
        eq("minfree_kb of 2^54", errno, Some(Errno::ERANGE as i32))?;
        eq(
            "state after bad values",
            sys.word("state")?,
            state.to_owned(),
        )?;
    }
    // Better by the next step only, and not before two seconds.
    let start = Instant::now();
    sys.set("minfree_kb", sys.get("available_kb")? * 100 / 80)?;
    ctx.until("another state than low", 20.0, || {
        let seen = sys.word("state")?;
        Ok((seen != "low", seen))
    })?;
    let kept = start.elapsed();
    ensure!(kept >= HOLD, "the state was better after {kept:?} already");
    until_state(ctx, "soft", 20.0)?;
    sys.set("minfree_kb", 1)?;
    until_state(ctx, "high", 10.0)?;
    sys.set("minfree_kb", 0)
}

fn memory_use(ctx: &Ctx) -> Result<()> {
    let sys = ctx.sys();
    let available = sys.get("available_kb")?;
    // A border at 85 % of what is available: it is left at 93.5 %, and the guest takes 25 %.
    sys.set("minfree_kb", available * 85 / 100 / 4)?;
    until_state(ctx, "high", 10.0)?;
    let mount = ctx.mount("m", &format!("size={available}k,domain=lab"))?;
    let guest = mount.guest("web", usize::try_from(available / 16)?)?;
    let bytes = i64::try_from(guest.map.pages() * PAGE)?;
    sys::fallocate(&guest.file, 0, 0, bytes)?;
    until_state(ctx, "clear", 10.0)?;
    sys::punch(&guest.file, 0, bytes.unsigned_abs())?;
    until_state(ctx, "high", 20.0)?;
    // The same by faults.
    for page in 0..guest.map.pages() {
        guest.map.set(page, 0, page as u64);
    }
    until_state(ctx, "clear", 10.0)
}
