// SPDX-License-Identifier: GPL-2.0

//! Assertions that say what was expected and what was seen.

use std::fmt::{Debug, Display};
use std::io;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, Result};
use nix::errno::Errno;

use crate::sys::{PageBuf, WORDS};

/// Why a case cannot say anything here.
#[derive(Debug)]
pub struct Skip(pub String);

impl Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// The error that makes a case a skip.
pub fn skip(why: impl Display) -> anyhow::Error {
    anyhow!(Skip(why.to_string()))
}

/// A page or file held what no writer wrote: the one verdict that `prove` looks for.
#[derive(Debug)]
pub struct Corrupt(pub String);

impl Display for Corrupt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "data corrupted: {}", self.0)
    }
}

impl std::error::Error for Corrupt {}

/// A process was killed by SIGBUS where nothing was truncated.
#[derive(Debug)]
pub struct BusError;

impl Display for BusError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a process was killed by SIGBUS within its file")
    }
}

impl std::error::Error for BusError {}

/// `seen` equals `expected`.
pub fn eq<T: PartialEq + Debug>(what: impl Display, seen: T, expected: T) -> Result<()> {
    if seen != expected {
        bail!("{what}: expected {expected:?}, seen {seen:?}");
    }
    Ok(())
}

/// `seen` is between `low` and `high`, both included.
pub fn within<T: PartialOrd + Debug>(what: impl Display, seen: T, low: T, high: T) -> Result<()> {
    if seen < low || seen > high {
        bail!("{what}: expected {low:?} to {high:?}, seen {seen:?}");
    }
    Ok(())
}

/// `condition` holds.
pub fn that(what: impl Display, condition: bool) -> Result<()> {
    if !condition {
        bail!("expected that {what}");
    }
    Ok(())
}

/// An error that carries an errno.
pub trait Code {
    /// The errno.
    fn code(&self) -> Errno;
}

impl Code for Errno {
    fn code(&self) -> Errno {
        *self
    }
}

impl Code for io::Error {
    fn code(&self) -> Errno {
        Errno::from_raw(self.raw_os_error().unwrap_or(0))
    }
}

/// `result` failed with `expected`.
pub fn fails<T, E: Code>(what: impl Display, result: Result<T, E>, expected: Errno) -> Result<()> {
    fails_any(what, result, &[expected])
}

/// `result` failed with one of `expected`.
pub fn fails_any<T, E: Code>(
    what: impl Display,
    result: Result<T, E>,
    expected: &[Errno],
) -> Result<()> {
    match result {
        Ok(_) => bail!("{what}: expected {expected:?}, seen success"),
        Err(e) if expected.contains(&e.code()) => Ok(()),
        Err(e) => bail!("{what}: expected {expected:?}, seen {:?}", e.code()),
    }
}

/// A page holds exactly `expected`.
pub fn page_is(what: impl Display, seen: &PageBuf, expected: &PageBuf) -> Result<()> {
    let wrong: Vec<usize> = (0..WORDS).filter(|&i| seen[i] != expected[i]).collect();
    match wrong.first() {
        None => Ok(()),
        Some(&i) => Err(anyhow!(Corrupt(format!(
            "{what}: {} of {WORDS} words differ, first word {i}: expected {:#018x}, seen {:#018x}",
            wrong.len(),
            expected[i],
            seen[i],
        )))),
    }
}

/// Bytes equal `expected`.
pub fn bytes_are(what: impl Display, seen: &[u8], expected: &[u8]) -> Result<()> {
    eq(format!("{what}: length"), seen.len(), expected.len())?;
    match seen.iter().zip(expected).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(i) => Err(anyhow!(Corrupt(format!(
            "{what}: byte {i}: expected {:#04x}, seen {:#04x}",
            expected[i], seen[i],
        )))),
    }
}

/// The longest time between two of somebody's turns: who had no CPU for longer than pages may rest
/// did not use them, whatever was meant.
pub struct Gaps {
    last: Instant,
    longest: Duration,
}

impl Gaps {
    /// Shorter ones are no reason for a page in use to go: the module leaves 100 ms between two looks.
    const HARMLESS: Duration = Duration::from_millis(80);

    /// The first turn begins.
    pub fn new() -> Gaps {
        Gaps {
            last: Instant::now(),
            longest: Duration::ZERO,
        }
    }

    /// A turn ends.
    pub fn turn(&mut self) {
        self.longest = self.longest.max(self.last.elapsed());
        self.last = Instant::now();
    }

    /// What is measured from now on counts, the gap that is under way included.
    pub fn measure(&mut self) {
        self.longest = Duration::ZERO;
    }

    /// Whether the turns came often enough for what was measured; says so if not.
    pub fn harmless(&self) -> bool {
        let longest = self.longest.max(self.last.elapsed());
        let good = longest < Self::HARMLESS;
        if !good {
            println!("{longest:?} between two turns: not counted");
        }
        good
    }
}
