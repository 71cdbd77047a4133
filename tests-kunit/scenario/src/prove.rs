// SPDX-License-Identifier: GPL-2.0

//! Shows that tests notice: a debug build takes one protection out, and must be caught.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{bail, Context, Result};

use crate::ctx::Setup;
use crate::harness::{comment, observe, run_case, Report, Seen, Verdict};
use crate::sys::become_subreaper;

/// One protection of the module that a debug build can take out.
struct Protection {
    /// The switch is `break_<name>` in the module's debugfs directory; 1 takes it out.
    name: &'static str,
    /// What it protects from.
    prevents: &'static str,
    /// The case that must notice.
    case: &'static str,
    /// A part of the line in which it says what it noticed.
    says: &'static str,
    /// How it notices.
    sees: Sees,
    /// On the stock kernel: it needs 2 MiB pages or broken memory, which User-Mode Linux has not.
    stock: bool,
    /// Another switch, with which the case must pass as long as the protection is in place: it makes
    /// common what the protection is for.
    with: Option<&'static str>,
}

/// What a case must see where a protection is taken out.
#[derive(Clone, Copy)]
enum Sees {
    /// Corrupted data.
    Corruption,
    /// The same, or the kernel notices first and kills the process by SIGBUS.
    CorruptionOrBusError,
    /// No byte is wrong, but something else.
    Otherwise(&'static str),
}

/// That pages merge which must not, or do not which must.
const WRONG_SHARING: Sees = Sees::Otherwise("wrong sharing");

/// A protection whose case runs anywhere.
const fn small(
    name: &'static str,
    prevents: &'static str,
    case: &'static str,
    says: &'static str,
    sees: Sees,
) -> Protection {
    Protection {
        name,
        prevents,
        case,
        says,
        sees,
        stock: false,
        with: None,
    }
}

/// A protection whose case is about what only the stock kernel has.
const fn stock(
    name: &'static str,
    prevents: &'static str,
    case: &'static str,
    says: &'static str,
    sees: Sees,
    with: Option<&'static str>,
) -> Protection {
    Protection {
        name,
        prevents,
        case,
        says,
        sees,
        stock: true,
        with,
    }
}

impl Sees {
    /// Whether it is that, said in a line that contains `says`: any case may fail, run out of time or
    /// leave something for another reason. Who is killed says nothing.
    fn fits(self, seen: &Seen, says: &str) -> bool {
        let corrupt = seen.verdict == Verdict::Corrupt
            && seen.said.iter().any(|line| {
                line.split_once("data corrupted: ")
                    .is_some_and(|(_, what)| what.contains(says))
            });
        match self {
            Sees::Corruption => corrupt,
            Sees::CorruptionOrBusError => corrupt || seen.verdict == Verdict::BusError,
            Sees::Otherwise(_) => {
                seen.verdict == Verdict::Fail
                    && seen.orderly
                    && seen.said.iter().any(|line| line.contains(says))
            }
        }
    }

    fn text(self) -> &'static str {
        match self {
            Sees::Corruption => "corrupted data",
            Sees::CorruptionOrBusError => "corrupted data or SIGBUS",
            Sees::Otherwise(what) => what,
        }
    }
}

const PROTECTIONS: &[Protection] = &[
    small(
        "zap",
        "a mapping that outlives the page in its slot",
        "torture/syscalls",
        "read by",
        // The next write fault finds another page mapped than the slot's.
        Sees::CorruptionOrBusError,
    ),
    small(
        "freeze",
        "replacing a page that somebody else holds",
        "share/held-for-writing",
        "a page",
        Sees::Corruption,
    ),
    small(
        "freeze",
        "compressing a page that somebody else holds",
        "contend/held",
        "what the pipe held",
        Sees::Corruption,
    ),
    Protection {
        name: "compare",
        prevents: "merging pages whose hash alone is the same",
        case: "torture/mapping",
        says: "read by",
        sees: Sees::Corruption,
        stock: false,
        with: Some("whole_hash"),
    },
    Protection {
        name: "compare",
        prevents: "uniting shared pages whose hash alone is the same",
        case: "share/unlike-records",
        says: " page ",
        sees: Sees::Corruption,
        stock: false,
        with: Some("whole_hash"),
    },
    small(
        "read_only",
        "writing to a frame that others share",
        "torture/mapping",
        "read by",
        Sees::Corruption,
    ),
    small(
        "punch_zap",
        "a mapping that outlives the page's hole",
        "torture/punch",
        "read by",
        // The same, where what was there is mapped read-only.
        Sees::CorruptionOrBusError,
    ),
    small(
        "write_protect",
        "trusting a hash though a write would not be noticed",
        "share/write-noticed",
        "pages_sharing: expected 128",
        WRONG_SHARING,
    ),
    small(
        "note_change",
        "trusting a hash after a write",
        "share/write-noticed",
        "pages_sharing: expected 128",
        WRONG_SHARING,
    ),
    small(
        "unpinned",
        "trusting a hash while a pin may write",
        "share/late-pin",
        "pages_sharing: expected 16",
        WRONG_SHARING,
    ),
    small(
        "border",
        "sharing over the border of a domain",
        "share/across-domains",
        "pages_sharing over the border: expected 0",
        WRONG_SHARING,
    ),
    small(
        "unshare",
        "sharing on over a border that was just drawn",
        "share/domain-change",
        "frames common to a and c: expected 0",
        WRONG_SHARING,
    ),
    small(
        "fresh_frame",
        "a sharer who chose where the common frame lies",
        "share/fresh-frame",
        "has a frame that none of the two had",
        WRONG_SHARING,
    ),
    small(
        "zeroed",
        "showing a guest what another left in a frame",
        "mmap/fresh-is-zero",
        "around a word",
        Sees::Corruption,
    ),
    small(
        "zero_hole",
        "showing again what a hole cut off",
        "fs/punch-unaligned",
        "after a hole of",
        Sees::Corruption,
    ),
    small(
        "zero_hole",
        "showing again what a new end cut off",
        "fs/beyond-end",
        "grown by",
        Sees::Corruption,
    ),
    small(
        "charge",
        "memory that no cgroup's limit holds back",
        "memcg/charge",
        "pages of `kernel`: expected",
        Sees::Otherwise("pages that are not charged"),
    ),
    small(
        "reservation",
        "taking what is reserved for a VM",
        "contend/reservation",
        "resident_kb of kept: expected",
        Sees::Otherwise("a VM below its reservation"),
    ),
    small(
        "throttle",
        "giving away what reclaim needs to go on",
        "contend/low",
        "stalls of the large VM: expected",
        Sees::Otherwise("a VM that does not wait"),
    ),
    small(
        "encrypt",
        "a disk that tells what guests had in memory",
        "swap/encrypted",
        "stamps of swapped pages: expected 0",
        Sees::Otherwise("plain text on the disk"),
    ),
    small(
        "checksum",
        "believing what a disk gives back",
        "swap/corrupt",
        "page ",
        Sees::Corruption,
    ),
    small(
        "write_result",
        "giving a page up that was not written",
        "swap/write-fails",
        "page ",
        // Its processes cannot read it again.
        Sees::CorruptionOrBusError,
    ),
    small(
        "swap_file",
        "taking what one swap file gave back for another's",
        "debug/late-answer",
        "the late reader",
        Sees::Otherwise("a page that cannot be read"),
    ),
    small(
        "checksum",
        "believing what a disk gives back of a shared page",
        "swap/shared-corrupt",
        "of a: byte",
        Sees::Corruption,
    ),
    small(
        "write_result",
        "giving a shared page up that was not written",
        "swap/shared-write-fails",
        "page ",
        Sees::CorruptionOrBusError,
    ),
    small(
        "sharers",
        "a page with more sharers than max_page_sharing",
        "share/max-sharers",
        "pages_shared: expected 16",
        Sees::Otherwise("more sharers than there may be"),
    ),
    small(
        "limit",
        "a VM that keeps more than its limit_kb",
        "contend/limit",
        "within the limit",
        Sees::Otherwise("a VM above its limit"),
    ),
    small(
        "pool_cap",
        "compressed pages that take more than their part",
        "contend/cap",
        "compressions_refused_pool_full",
        Sees::Otherwise("a pool above its cap"),
    ),
    stock(
        "nodes",
        "sharing between nodes that are to be kept apart",
        "ksm/numa-merge",
        "pages_sharing between nodes: expected 0",
        WRONG_SHARING,
        None,
    ),
    stock(
        "freeze",
        "splitting a folio that somebody holds a part of",
        "huge/split-held",
        "what the pipe held",
        Sees::Corruption,
        None,
    ),
    stock(
        "freeze",
        "collapsing a region of which somebody holds a page",
        "huge/collapse-held",
        "what the pipe held",
        Sees::Corruption,
        // The look before the zap finds nearly all of them; it alone is not enough.
        Some("unpinned"),
    ),
    stock(
        "punch_zap",
        "a mapping that outlives a folio's hole",
        "huge/holes",
        "web page",
        Sees::Corruption,
        None,
    ),
    stock(
        "zero_hole",
        "showing again what a hole in a folio cut off",
        "huge/holes",
        "web page 7:",
        Sees::Corruption,
        None,
    ),
    stock(
        "poison",
        "serving memory that is marked as broken",
        "host/hwpoison",
        "a touch of broken memory went through",
        Sees::Otherwise("broken memory that is served"),
        None,
    ),
    stock(
        "write_protect",
        "trusting the hash of a part though a write would not be noticed",
        "huge/write-noticed",
        "protect_faults: expected",
        WRONG_SHARING,
        None,
    ),
    stock(
        "note_change",
        "trusting the hash of a part after a write",
        "huge/write-noticed",
        "splittable_kb: expected",
        WRONG_SHARING,
        None,
    ),
    stock(
        "unpinned",
        "trusting the hash of a part while a pin may write",
        "huge/late-pin",
        "pages hashed: expected",
        WRONG_SHARING,
        None,
    ),
    stock(
        "split_reserve",
        "a split that waits for memory when there is none",
        "debug/split-reserve",
        "expected splits of at least",
        Sees::Otherwise("nothing that is split"),
        None,
    ),
];

impl Protection {
    fn label(&self) -> String {
        format!("prove/{}-{}", self.name, self.case)
    }
}

/// Prints the table.
pub fn list() {
    for Protection {
        name,
        prevents,
        case,
        ..
    } in PROTECTIONS
    {
        println!("{name:<20} {case:<18} {prevents}");
    }
}

/// Takes out `wanted`, or each in turn for `all`.
pub fn run(setup: &Setup, wanted: &str) -> Result<()> {
    let chosen: Vec<&Protection> = PROTECTIONS
        .iter()
        .filter(|p| match wanted {
            "all" => !p.stock,
            "stock" => p.stock,
            name => p.name == name,
        })
        .collect();
    if chosen.is_empty() {
        bail!("no protection is named {wanted:?}; `prove --list` prints the names");
    }
    become_subreaper()?;
    let mut cases: Vec<&str> = Vec::new();
    for protection in &chosen {
        if !cases.contains(&protection.case) {
            cases.push(protection.case);
        }
    }
    let mut report = Report::start(cases.len() + chosen.len());
    let mut skipped = Vec::new();
    for case in cases {
        // What is corrupt with all protections in place says nothing of any of them.
        let start = Instant::now();
        let verdict = intact(setup, case)?;
        report.result(&format!("prove/intact-{case}"), &verdict, start.elapsed());
        if let Verdict::Skip(_) = verdict {
            skipped.push((case, verdict));
        }
    }
    for protection in chosen {
        let start = Instant::now();
        let verdict = match skipped.iter().find(|(case, _)| *case == protection.case) {
            Some((_, verdict)) => verdict.clone(),
            None => prove(setup, protection)?,
        };
        report.result(&protection.label(), &verdict, start.elapsed());
    }
    report.end()
}

fn intact(setup: &Setup, case: &str) -> Result<Verdict> {
    for protection in PROTECTIONS {
        let switch = switch(setup, protection.name);
        match fs::read_to_string(&switch) {
            Ok(text) if text.trim_end() == "0" => {}
            Ok(text) => {
                comment(&format!("{}: expected 0, seen {text:?}", switch.display()));
                return Ok(Verdict::Fail);
            }
            Err(e) => {
                comment(&format!(
                    "read {}: {e}: not a debug build, or debugfs is not mounted?",
                    switch.display()
                ));
                return Ok(Verdict::Fail);
            }
        }
    }
    run_case(crate::case(case)?, setup)
}

fn switch(setup: &Setup, name: &str) -> PathBuf {
    setup.debug.join(format!("break_{name}"))
}

fn prove(setup: &Setup, protection: &Protection) -> Result<Verdict> {
    let Some(with) = protection.with else {
        return notices(setup, protection);
    };
    let with = switch(setup, with);
    turn(&with, true)?;
    let verdict = match run_case(crate::case(protection.case)?, setup) {
        Ok(Verdict::Pass) => notices(setup, protection),
        Ok(seen) => {
            comment(&format!("with {} alone: seen {seen:?}", with.display()));
            Ok(Verdict::Fail)
        }
        Err(e) => Err(e),
    };
    turn(&with, false)?;
    verdict
}

/// It takes a while until bytes go wrong that nobody protects. A case ends when it has noticed.
const LONGER: f64 = 8.0;

fn notices(setup: &Setup, protection: &Protection) -> Result<Verdict> {
    let switch = switch(setup, protection.name);
    if let Err(e) = turn(&switch, true) {
        comment(&format!("{e:#}"));
        return Ok(Verdict::Fail);
    }
    let patient = Setup {
        scale: setup.scale * LONGER,
        ..setup.clone()
    };
    let seen = observe(crate::case(protection.case)?, &patient);
    turn(&switch, false)?;
    let seen = seen?;
    if protection.sees.fits(&seen, protection.says) {
        return Ok(Verdict::Pass);
    }
    comment(&format!(
        "expected that {} sees {} without the protection from {}, and says {:?}; seen {:?}{}",
        protection.case,
        protection.sees.text(),
        protection.prevents,
        protection.says,
        seen.verdict,
        if seen.orderly { "" } else { ", in disorder" },
    ));
    Ok(Verdict::Fail)
}

fn turn(switch: &Path, out: bool) -> Result<()> {
    fs::write(switch, if out { "1" } else { "0" })
        .with_context(|| format!("write {}", switch.display()))
}

#[cfg(test)]
mod tests {
    use super::{Sees, WRONG_SHARING};
    use crate::harness::{Seen, Verdict};

    fn seen(verdict: Verdict, line: &str, orderly: bool) -> Seen {
        Seen {
            verdict,
            said: vec!["seed 1".into(), line.into()],
            orderly,
        }
    }

    #[test]
    fn only_what_is_expected_is_noticed() {
        let says = "pages_sharing: expected 128";
        let line = "pages_sharing: expected 128, seen 3";
        assert!(WRONG_SHARING.fits(&seen(Verdict::Fail, line, true), says));
        assert!(!WRONG_SHARING.fits(&seen(Verdict::Fail, line, false), says));
        let other = "umount: EBUSY";
        assert!(!WRONG_SHARING.fits(&seen(Verdict::Fail, other, true), says));
        assert!(!WRONG_SHARING.fits(&seen(Verdict::Pass, line, true), says));
        let corrupt = "child: data corrupted: page 4: byte 1";
        assert!(Sees::Corruption.fits(&seen(Verdict::Corrupt, corrupt, false), "page "));
        assert!(!Sees::Corruption.fits(&seen(Verdict::Corrupt, corrupt, true), "read by"));
        assert!(!Sees::Corruption.fits(&seen(Verdict::BusError, corrupt, true), "page "));
        let killed = seen(Verdict::BusError, "", false);
        assert!(Sees::CorruptionOrBusError.fits(&killed, "read by"));
    }
}
