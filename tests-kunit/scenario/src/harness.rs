// SPDX-License-Identifier: GPL-2.0

//! Runs cases in processes of their own and reports in KTAP.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use nix::mount::{umount, umount2, MntFlags};
use nix::sys::signal::{killpg, Signal};
use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};
use nix::unistd::Pid;

use crate::check::{BusError, Corrupt, Skip};
use crate::ctx::{Ctx, Fs, Setup};
use crate::sys;
use crate::sysfs::Sys;

/// Where a case makes sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum On {
    /// On both file systems.
    Both,
    /// On ThinRAM only.
    Thinram,
}

/// One test.
pub struct Case {
    /// `topic/name`.
    pub name: &'static str,
    /// One line on what it asserts.
    pub checks: &'static str,
    /// Where it makes sense.
    pub on: On,
    /// Seconds after which it hangs, without what grows with `--scale`.
    pub limit: f64,
    /// Seconds that it runs at scale 1 where it is bounded by time, else 0.
    pub span: f64,
    /// The test.
    pub run: fn(&Ctx) -> Result<()>,
}

impl Case {
    /// A case on both file systems with the usual limit.
    pub const fn both(
        name: &'static str,
        checks: &'static str,
        run: fn(&Ctx) -> Result<()>,
    ) -> Case {
        Case {
            name,
            checks,
            on: On::Both,
            limit: 20.0,
            span: 0.0,
            run,
        }
    }

    /// A case that needs ThinRAM, with the usual limit.
    pub const fn thinram(
        name: &'static str,
        checks: &'static str,
        run: fn(&Ctx) -> Result<()>,
    ) -> Case {
        Case {
            name,
            checks,
            on: On::Thinram,
            limit: 60.0,
            span: 0.0,
            run,
        }
    }

    /// Bounded by time.
    pub const fn span(self, seconds: f64) -> Case {
        Case {
            span: seconds,
            ..self
        }
    }

    /// Whether it can run on `fs`.
    pub fn fits(&self, fs: Fs) -> bool {
        self.on == On::Both || fs == Fs::Thinram
    }

    /// Limit on the time of the whole child.
    pub fn time_limit(&self, setup: &Setup) -> Duration {
        Duration::from_secs_f64((self.limit + self.span * setup.scale * 2.0) * setup.patience)
    }
}

const EXIT_FAIL: i32 = 1;
const EXIT_SKIP: i32 = 77;
const EXIT_CORRUPT: i32 = 78;
const EXIT_BUS_ERROR: i32 = 79;

/// How a case ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Well.
    Pass,
    /// It cannot say anything here.
    Skip(String),
    /// It saw data that nobody wrote.
    Corrupt,
    /// A process of it was killed by SIGBUS.
    BusError,
    /// Otherwise.
    Fail,
}

/// What a case leaves behind is on its way out for less than this, on any machine.
const LEAVING: Duration = Duration::from_secs(60);

/// What the last line of a child says why it skipped.
const SKIP_MARK: &str = "SKIP: ";

/// The child's side: runs `case` in `dir` and returns the exit code.
pub fn run_child(case: &Case, setup: Setup, dir: &Path) -> i32 {
    sys::die_with_parent();
    let ctx = Ctx::new(setup, dir.to_owned());
    let result = ctx.start_clean().and_then(|()| (case.run)(&ctx));
    let code = match &result {
        Ok(()) => 0,
        Err(e) => {
            if let Some(skip) = e.downcast_ref::<Skip>() {
                println!("{SKIP_MARK}{skip}");
                EXIT_SKIP
            } else {
                println!("{e:#}");
                match e {
                    e if e.is::<Corrupt>() => EXIT_CORRUPT,
                    e if e.is::<BusError>() => EXIT_BUS_ERROR,
                    _ => EXIT_FAIL,
                }
            }
        }
    };
    if ctx.leaked_mount() {
        println!("a mount of the case is still busy");
        return if code == 0 { EXIT_FAIL } else { code };
    }
    code
}

/// What was seen of a case.
pub struct Seen {
    /// How it ended.
    pub verdict: Verdict,
    /// The lines that it said.
    pub said: Vec<String>,
    /// Whether it ended by itself, in time, and left nothing behind.
    pub orderly: bool,
}

/// The parent's side: runs `case` in a child, shows what it says, and cleans up after it.
pub fn run_case(case: &Case, setup: &Setup) -> Result<Verdict> {
    Ok(observe(case, setup)?.verdict)
}

/// The same, with what it said.
pub fn observe(case: &Case, setup: &Setup) -> Result<Seen> {
    let dir = setup.base.join(case.name.replace('/', "-"));
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let sys = (setup.fs == Fs::Thinram).then(|| Sys::new(&setup.sys));
    let before = sys.as_ref().map(Sys::snapshot);

    let limit = case.time_limit(setup);
    let Seen {
        mut verdict,
        said,
        mut orderly,
    } = match spawn(case, setup, &dir) {
        Ok((child, lines)) => watch(child, &lines, limit)?,
        Err(e) => Seen {
            verdict: Verdict::Fail,
            said: vec![format!("{e:#}")],
            orderly: false,
        },
    };
    let mut problems = reap_orphans();
    problems.extend(take_down(&dir)?);
    if let (Some(sys), Some(before)) = (&sys, &before) {
        problems.extend(sys.restore(before));
        problems.extend(leftovers(sys));
    }
    if fs::remove_dir_all(&dir).is_err() {
        problems.push(format!("{} cannot be removed", dir.display()));
    }
    if !problems.is_empty() {
        for problem in problems {
            comment(&problem);
        }
        if !matches!(verdict, Verdict::Corrupt | Verdict::BusError) {
            verdict = Verdict::Fail;
        }
        orderly = false;
    }
    if let (Verdict::Skip(why), Some(last)) = (&mut verdict, said.last()) {
        *why = last.strip_prefix(SKIP_MARK).unwrap_or(last).to_owned();
    }
    Ok(Seen {
        verdict,
        said,
        orderly,
    })
}

fn spawn(case: &Case, setup: &Setup, dir: &Path) -> Result<(Child, Receiver<String>)> {
    let mut command = Command::new("/proc/self/exe");
    command.arg("child").arg(case.name).arg(dir);
    command.args(["--fs", setup.fs.name()]);
    command
        .arg("--mount")
        .arg(&setup.base)
        .arg("--sys")
        .arg(&setup.sys);
    command.arg("--debugfs").arg(&setup.debug);
    command.arg("--scale").arg(setup.scale.to_string());
    command.arg("--patience").arg(setup.patience.to_string());
    command.arg("--seed").arg(setup.seed.to_string());
    if let Some(calls) = setup.calls {
        command.arg("--calls").arg(calls.to_string());
    }
    if let Some(ko) = &setup.ko {
        command.arg("--ko").arg(ko);
    }
    if let Some(disk) = &setup.disk {
        command.arg("--disk").arg(disk);
    }
    if let Some(scratch) = &setup.scratch {
        command.arg("--scratch").arg(scratch);
    }
    command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().context("start a child of /proc/self/exe")?;
    let (sender, lines) = channel();
    let streams: [Option<Box<dyn std::io::Read + Send>>; 2] = [
        child
            .stdout
            .take()
            .map(|s| Box::new(s) as Box<dyn std::io::Read + Send>),
        child
            .stderr
            .take()
            .map(|s| Box::new(s) as Box<dyn std::io::Read + Send>),
    ];
    for stream in streams.into_iter().flatten() {
        let sender = sender.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                if sender
                    .send(String::from_utf8_lossy(&line).into_owned())
                    .is_err()
                {
                    return;
                }
            }
        });
    }
    Ok((child, lines))
}

/// Shows a child's lines until it ends or its time is over.
fn watch(mut child: Child, lines: &Receiver<String>, limit: Duration) -> Result<Seen> {
    let start = Instant::now();
    let mut said = Vec::new();
    let group = Pid::from_raw(i32::try_from(child.id())?);
    let mut hear = |wait: Duration| match lines.recv_timeout(wait) {
        Ok(line) => {
            if !line.starts_with(SKIP_MARK) {
                comment(&line);
            }
            said.push(line);
            true
        }
        Err(RecvTimeoutError::Timeout) => true,
        Err(RecvTimeoutError::Disconnected) => false,
    };
    let mut timed_out = false;
    let status = loop {
        hear(Duration::from_millis(10));
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if start.elapsed() > limit {
            timed_out = true;
            // The group may have ended in this very moment.
            let _ended = killpg(group, Signal::SIGKILL);
            break wait_killed(&mut child)?;
        }
    };
    // Helpers of the case that still run hold the pipe open.
    let _ended = killpg(group, Signal::SIGKILL);
    let drain = Instant::now();
    while drain.elapsed() < Duration::from_secs(2) && hear(Duration::from_millis(10)) {}
    let verdict = match status {
        _ if timed_out => {
            comment(&format!("expected an end within {limit:?}, killed"));
            if status.is_none() {
                comment("the child does not even die: it hangs in the kernel");
            }
            Verdict::Fail
        }
        Some(status) => verdict_of(status),
        None => Verdict::Fail,
    };
    let ended = status.is_some_and(|status| status.code().is_some());
    Ok(Seen {
        verdict,
        said,
        orderly: ended && !timed_out,
    })
}

fn wait_killed(child: &mut Child) -> Result<Option<ExitStatus>> {
    let start = Instant::now();
    while start.elapsed() < LEAVING {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(None)
}

fn verdict_of(status: ExitStatus) -> Verdict {
    match status.code() {
        Some(0) => Verdict::Pass,
        Some(EXIT_SKIP) => Verdict::Skip(String::new()),
        Some(EXIT_CORRUPT) => Verdict::Corrupt,
        Some(EXIT_BUS_ERROR) => Verdict::BusError,
        Some(EXIT_FAIL) => Verdict::Fail,
        _ => {
            comment(&format!("expected an exit code, seen {status}"));
            match status.signal() {
                Some(libc::SIGBUS) => Verdict::BusError,
                _ => Verdict::Fail,
            }
        }
    }
}

/// Reaps what a case forked and lost; its group was killed before.
fn reap_orphans() -> Vec<String> {
    let start = Instant::now();
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) if start.elapsed() < LEAVING => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(WaitStatus::StillAlive) => {
                return vec!["a helper does not die: it hangs in the kernel".into()];
            }
            Ok(_) => {}
            Err(_) => return Vec::new(),
        }
    }
}

/// Takes down every mount at or below `dir`, the innermost first.
fn take_down(dir: &Path) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    let table = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    let mut points: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .map(|field| PathBuf::from(field.replace("\\040", " ")))
        .filter(|path| path.starts_with(dir))
        .collect();
    points.reverse();
    for point in points {
        let start = Instant::now();
        let gone = loop {
            match umount(&point) {
                Ok(()) => break true,
                Err(_) if start.elapsed() > LEAVING => break false,
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        if !gone {
            problems.push(format!("{} stays busy, detached", point.display()));
            umount2(&point, MntFlags::MNT_DETACH)
                .with_context(|| format!("detach {}", point.display()))?;
        }
    }
    Ok(problems)
}

/// VMs that outlive the mounts of their case.
fn leftovers(sys: &Sys) -> Vec<String> {
    let start = Instant::now();
    loop {
        match sys.vms() {
            Ok(left) if left.is_empty() => return Vec::new(),
            Ok(_) if start.elapsed() < LEAVING => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(left) => return vec![format!("VMs outlive their mount: {left:?}")],
            Err(e) => return vec![format!("{e:#}")],
        }
    }
}

/// Prints one diagnostic line.
pub fn comment(line: &str) {
    println!("# {line}");
    flush();
}

fn flush() {
    // A console that is gone cannot be told so.
    let _ignored = std::io::stdout().flush();
}

/// Numbers of a whole run.
#[derive(Debug, Default, Clone, Copy)]
pub struct Totals {
    passed: usize,
    failed: usize,
    skipped: usize,
}

/// Prints a KTAP plan and then one result after the other.
pub struct Report {
    next: usize,
    totals: Totals,
    reasons: BTreeMap<String, usize>,
}

impl Report {
    /// Starts the report of `count` results.
    pub fn start(count: usize) -> Report {
        println!("KTAP version 1\n1..{count}");
        flush();
        Report {
            next: 1,
            totals: Totals::default(),
            reasons: BTreeMap::new(),
        }
    }

    /// Prints one result.
    pub fn result(&mut self, name: &str, verdict: &Verdict, took: Duration) {
        let number = self.next;
        self.next += 1;
        match verdict {
            Verdict::Pass => {
                self.totals.passed += 1;
                println!("# {name}: {:.1} s", took.as_secs_f64());
                println!("ok {number} {name}");
            }
            Verdict::Skip(why) => {
                self.totals.skipped += 1;
                *self.reasons.entry(why.clone()).or_default() += 1;
                println!("ok {number} {name} # SKIP {why}");
            }
            Verdict::Corrupt | Verdict::BusError | Verdict::Fail => {
                self.totals.failed += 1;
                println!("# {name}: {:.1} s", took.as_secs_f64());
                println!("not ok {number} {name}");
            }
        }
        flush();
    }

    /// Prints the totals; an error where a result was bad or nothing passed.
    pub fn end(self) -> Result<()> {
        let Totals {
            passed,
            failed,
            skipped,
        } = self.totals;
        for (why, count) in &self.reasons {
            comment(&format!("skipped {count}: {why}"));
        }
        comment(&format!(
            "Totals: pass:{passed} fail:{failed} skip:{skipped} total:{}",
            passed + failed + skipped
        ));
        if failed > 0 {
            bail!("{failed} of {} cases failed", passed + failed + skipped);
        }
        if passed == 0 {
            bail!("no case passed: the filter fits none, or all were skipped");
        }
        Ok(())
    }
}
