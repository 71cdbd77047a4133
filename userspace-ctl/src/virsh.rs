// SPDX-License-Identifier: GPL-2.0

//! Domains whose QMP socket is libvirt's own: their balloons and guest agents through `virsh`.
//!
//! Its commands are libvirt's stable interface, they respect its locks, and they need no library of
//! it. Each runs for some milliseconds and always ends by a deadline.

use crate::qmp::GuestStats;
use crate::text::{escape, shorten};
use std::collections::HashMap;
use std::io::{ErrorKind, Read};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long a command may take.
const LIMIT: Duration = Duration::from_secs(10);
/// Pause between two looks whether it ended.
const PAUSE: Duration = Duration::from_millis(5);
/// How much of a complaint is shown.
const SHOWN_COLUMNS: usize = 160;

/// What went wrong with virsh.
#[derive(Debug, Error)]
pub enum VirshError {
    /// It cannot be run.
    #[error("cannot run virsh: {0}; libvirt's domains are reached through it (libvirt-clients)")]
    Run(std::io::Error),
    /// It did not end in time.
    #[error("virsh {command} did not end within {} s", LIMIT.as_secs())]
    Timeout {
        /// Which command.
        command: &'static str,
    },
    /// It refused.
    #[error("virsh {command}: {complaint}")]
    Refused {
        /// Which command.
        command: &'static str,
        /// Its words, escaped.
        complaint: String,
    },
}

/// One domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain(pub String);

/// What libvirt tells about a domain's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// What the balloon leaves the guest; `None` without a balloon device.
    pub actual_kb: Option<u64>,
    /// What the guest's driver told; `None` where it never told anything.
    pub stats: Option<GuestStats>,
}

impl Domain {
    /// Has the guest's driver tell its figures every so many seconds.
    pub fn poll_stats(&self, period_s: u64) -> Result<(), VirshError> {
        let period = period_s.to_string();
        self.run("dommemstat", &["--live", "--period", &period])
            .map(|_| ())
    }

    /// The balloon and what the driver told last.
    pub fn memory_stats(&self) -> Result<MemoryStats, VirshError> {
        Ok(parse(&self.run("dommemstat", &[])?))
    }

    /// Asks the guest to be so large.
    pub fn set_kb(&self, kb: u64) -> Result<(), VirshError> {
        let size = kb.to_string();
        self.run("setmem", &["--live", "--size", &size]).map(|_| ())
    }

    /// Sends a line to the guest agent; its answer.
    pub fn agent(&self, line: &str) -> Result<String, VirshError> {
        self.run("qemu-agent-command", &["--timeout", "3", "--cmd", line])
    }

    fn run(&self, command: &'static str, args: &[&str]) -> Result<String, VirshError> {
        let mut virsh = Command::new("virsh");
        virsh
            .args(["-q", "-c", "qemu:///system", command, "--domain", &self.0])
            .args(args)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = virsh.spawn().map_err(VirshError::Run)?;
        let ended = wait(&mut child);
        let Some(success) = ended.map_err(VirshError::Run)? else {
            // It may be gone by now.
            let _ = child.kill();
            let _ = child.wait();
            return Err(VirshError::Timeout { command });
        };
        if success {
            return text_of(child.stdout.take()).map_err(VirshError::Run);
        }
        let complaint = text_of(child.stderr.take()).map_err(VirshError::Run)?;
        let complaint = complaint.trim().trim_start_matches("error: ");
        Err(VirshError::Refused {
            command,
            complaint: shorten(&escape(complaint.as_bytes()), SHOWN_COLUMNS),
        })
    }
}

/// Whether it succeeded; `None` where it does not end in time. What these commands print is less
/// than a pipe holds.
fn wait(child: &mut Child) -> std::io::Result<Option<bool>> {
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status.success()));
        }
        if Instant::now() >= end {
            return Ok(None);
        }
        thread::sleep(PAUSE);
    }
}

fn text_of(stream: Option<impl Read>) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    if let Some(mut stream) = stream {
        match stream.read_to_end(&mut bytes) {
            Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Lines of `name number`; sizes are KiB there.
fn parse(text: &str) -> MemoryStats {
    let figures: HashMap<&str, u64> = text
        .lines()
        .filter_map(|line| {
            let (name, value) = line.trim().split_once(' ')?;
            Some((name, value.trim().parse().ok()?))
        })
        .collect();
    let figure = |name: &str| figures.get(name).copied();
    let told = figure("last_update").filter(|at| *at > 0);
    MemoryStats {
        actual_kb: figure("actual"),
        stats: told.map(|last_update_s| GuestStats {
            last_update_s,
            total_kb: figure("available"),
            free_kb: figure("unused"),
            available_kb: figure("usable"),
            caches_kb: figure("disk_caches"),
            swap_in_kb: figure("swap_in"),
            swap_out_kb: figure("swap_out"),
            major_faults: figure("major_fault"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_libvirt_calls_the_figures() {
        let text = "actual 1048576\nswap_in 4\nswap_out 8\nmajor_fault 209\nminor_fault 125342\n\
                    unused 867424\navailable 991232\nusable 842560\nlast_update 1700000000\n\
                    disk_caches 60212\nhugetlb_pgalloc 0\nrss 1137396\n\n";
        let got = parse(text);
        assert_eq!(got.actual_kb, Some(1_048_576));
        let stats = got.stats.unwrap();
        assert_eq!(stats.total_kb, Some(991_232));
        assert_eq!(stats.free_kb, Some(867_424));
        assert_eq!(stats.available_kb, Some(842_560));
        assert_eq!(stats.swapped_out_kb(), Some(4));
        // A driver that never told anything, and no balloon at all.
        let got = parse("actual 1048576\nlast_update 0\nrss 1137396\n");
        assert_eq!((got.actual_kb, got.stats), (Some(1_048_576), None));
        assert_eq!(parse("rss 5\nodd\nmore x\n"), MemoryStats::default());
    }

    proptest! {
        #[test]
        fn figures_are_those_of_their_names(text in "((actual|usable|last_update|unused|rss| |x) ?[0-9a-z-]{0,21}\r?\n){0,9}") {
            let got = parse(&text);
            let told = |name: &str| {
                let lines = text.lines().filter_map(|line| line.trim().strip_prefix(name)?.strip_prefix(' '));
                lines.filter_map(|value| value.trim().parse().ok()).last()
            };
            prop_assert_eq!(got.actual_kb, told("actual"));
            let update: Option<u64> = told("last_update");
            prop_assert_eq!(got.stats.is_some(), update.is_some_and(|at| at > 0));
            if let Some(stats) = got.stats {
                prop_assert_eq!(stats.available_kb, told("usable"));
                let _ = stats.swapped_out_kb();
            }
        }
    }
}
