// SPDX-License-Identifier: GPL-2.0

//! Cached steps and the commands they run: each step has a stamp that holds its
//! inputs verbatim, and is done again when they change or it was interrupted.

use crate::env::{cache, ci, write};
use anyhow::{bail, Context, Result};
use rustix::fs::{flock, FlockOperation};
use std::fs::File;
use std::io::{IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Says one line of progress.
pub fn say(text: impl AsRef<str>) {
    eprintln!("xtask: {}", text.as_ref());
}

/// How long something took, as `12s` or `3m05s`.
pub fn took(d: Duration) -> String {
    match d.as_secs() {
        s if s < 60 => format!("{s}s"),
        s => format!("{}m{:02}s", s / 60, s % 60),
    }
}

/// Holds the lock `name` of the cache until dropped. Waits, and says so.
pub fn lock(name: &str) -> Result<File> {
    let plain = name.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
    lock_file(&cache("locks").join(plain), name)
}

/// Holds the lock of this checkout's runs, which share folders below `target/`.
pub fn lock_checkout() -> Result<File> {
    lock_file(&crate::env::target("run.lock"), "in this checkout")
}

fn lock_file(path: &Path, name: &str) -> Result<File> {
    write(path, "")?;
    let file = File::open(path)?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        say(format!("waiting for another run ({name})"));
        flock(&file, FlockOperation::LockExclusive)?;
    }
    Ok(file)
}

/// Does `work` unless the stamp at `stamp` holds `inputs`. True if it was done.
pub fn step(
    name: &str,
    stamp: &Path,
    inputs: &str,
    work: impl FnOnce() -> Result<()>,
) -> Result<bool> {
    let fresh = || std::fs::read_to_string(stamp).is_ok_and(|old| old == inputs);
    if fresh() {
        return Ok(false);
    }
    let _lock = lock(name)?;
    if fresh() {
        return Ok(false);
    }
    say(name);
    let start = Instant::now();
    if stamp.exists() {
        std::fs::remove_file(stamp)?;
    }
    work().with_context(|| format!("step `{name}`"))?;
    write(stamp, inputs)?;
    say(format!("{name}: done in {}", took(start.elapsed())));
    Ok(true)
}

/// A step's stamp in the cache.
pub fn stamp(name: &str) -> PathBuf {
    cache("stamps").join(name)
}

/// A command that dies with the thread that started it, so that an interrupted
/// run leaves nothing behind.
pub fn tied(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut c = Command::new("setpriv");
    c.args(["--pdeathsig", "KILL", "--"]).arg(program);
    c
}

/// Runs a command with its output in a log file, showing time and last line.
///
/// # Errors
/// Names the command, its exit status, the log, and the log's last lines.
pub fn run(log: impl AsRef<Path>, cmd: &mut Command) -> Result<()> {
    let log = log.as_ref();
    write(log, "")?;
    let out = File::options().append(true).open(log)?;
    cmd.stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out);
    let mut child = cmd.spawn().with_context(|| format!("{cmd:?}"))?;
    let mut progress = Progress::new();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        std::thread::sleep(Duration::from_millis(100));
        progress.tick(|| last_line(log));
    };
    progress.end();
    if !status.success() {
        bail!(
            "{} ({cmd:?}), log {}:\n{}",
            status,
            log.display(),
            tail(log, 25)
        );
    }
    Ok(())
}

/// The output of a command, trimmed; an error if it fails.
pub fn output(cmd: &mut Command) -> Result<String> {
    let out = cmd
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{cmd:?}"))?;
    if !out.status.success() {
        bail!(
            "{} ({cmd:?}): {}",
            out.status,
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&out.stdout).trim().to_string())
}

/// A line that says that work goes on: rewritten in place on a terminal, one
/// every half minute elsewhere.
pub struct Progress {
    start: Instant,
    shown: Instant,
    tty: bool,
    width: usize,
}

impl Progress {
    /// Starts the clock.
    pub fn new() -> Self {
        let err = std::io::stderr();
        let tty = err.is_terminal() && !ci();
        let width = rustix::termios::tcgetwinsize(&err).map_or(80, |w| usize::from(w.ws_col));
        Self {
            start: Instant::now(),
            shown: Instant::now(),
            tty,
            width: width.max(40),
        }
    }

    /// Shows `line()` if it is time to.
    pub fn tick(&mut self, line: impl FnOnce() -> String) {
        let every = if self.tty { 500 } else { 30_000 };
        if self.shown.elapsed() < Duration::from_millis(every) {
            return;
        }
        self.shown = Instant::now();
        let text = format!("  {:>6}  {}", took(self.start.elapsed()), line());
        let text: String = text
            .chars()
            .filter(|c| !c.is_control())
            .take(self.width - 1)
            .collect();
        if self.tty {
            eprint!("\r\x1b[K{text}");
            let _ = std::io::stderr().flush();
        } else {
            eprintln!("{text}");
        }
    }

    /// Clears the line.
    pub fn end(&mut self) {
        if self.tty {
            eprint!("\r\x1b[K");
        }
    }
}

/// The end of a file as text: up to `max` bytes.
fn end_of(path: &Path, max: u64) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut f = File::open(path)?;
        let len = f.metadata()?.len();
        f.seek(SeekFrom::Start(len.saturating_sub(max)))?;
        let mut buf = Vec::new();
        f.read_to_end(&mut buf)?;
        Ok(buf)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

/// The last line of a file that is not empty.
pub fn last_line(path: &Path) -> String {
    let text = end_of(path, 4096);
    text.lines()
        .rev()
        .find(|l| !l.trim().is_empty())
        .unwrap_or("")
        .trim()
        .to_string()
}

/// The last `n` lines of a file.
pub fn tail(path: &Path, n: usize) -> String {
    let text = end_of(path, 65536);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(n)..].join("\n")
}
