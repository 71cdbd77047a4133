// SPDX-License-Identifier: GPL-2.0

//! Shows that tests notice: a debug build takes one protection out, and must be caught.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{bail, Context, Result};

use crate::ctx::Setup;
use crate::harness::{comment, run_case, Report, Verdict};
use crate::sys::become_subreaper;

/// One protection of the module that a debug build can take out.
struct Protection {
    /// The switch is `break_<name>` in the module's debugfs directory; 1 takes it out.
    name: &'static str,
    /// What it protects from.
    prevents: &'static str,
    /// The case that must notice.
    case: &'static str,
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
    sees: Sees,
) -> Protection {
    Protection {
        name,
        prevents,
        case,
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
    sees: Sees,
    with: Option<&'static str>,
) -> Protection {
    Protection {
        name,
        prevents,
        case,
        sees,
        stock: true,
        with,
    }
}

impl Sees {
    fn fits(self, verdict: &Verdict) -> bool {
        match self {
            Sees::Corruption => *verdict == Verdict::Corrupt,
            Sees::CorruptionOrBusError => matches!(verdict, Verdict::Corrupt | Verdict::BusError),
            Sees::Otherwise(_) => *verdict == Verdict::Fail,
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
        // The next write fault finds another page mapped than the slot's.
        Sees::CorruptionOrBusError,
    ),
    small(
        "freeze",
        "replacing a page that somebody else holds",
        "share/held-for-writing",
        Sees::Corruption,
    ),
    small(
        "freeze",
        "compressing a page that somebody else holds",
        "contend/held",
        Sees::Corruption,
    ),
    Protection {
        name: "compare",
        prevents: "merging pages whose hash alone is the same",
        case: "torture/mapping",
        sees: Sees::Corruption,
        stock: false,
        with: Some("whole_hash"),
    },
    Protection {
        name: "compare",
        prevents: "uniting shared pages whose hash alone is the same",
        case: "share/unlike-records",
        sees: Sees::Corruption,
        stock: false,
        with: Some("whole_hash"),
    },
    small(
        "read_only",
        "writing to a frame that others share",
        "torture/mapping",
        Sees::Corruption,
    ),
    small(
        "punch_zap",
        "a mapping that outlives the page's hole",
        "torture/punch",
        // The same, where what was there is mapped read-only.
        Sees::CorruptionOrBusError,
    ),
    small(
        "write_protect",
        "trusting a hash though a write would not be noticed",
        "share/write-noticed",
        WRONG_SHARING,
    ),
    small(
        "note_change",
        "trusting a hash after a write",
        "share/write-noticed",
        WRONG_SHARING,
    ),
    small(
        "unpinned",
        "trusting a hash while a pin may write",
        "share/late-pin",
        WRONG_SHARING,
    ),
    small(
        "border",
        "sharing over the border of a domain",
        "share/across-domains",
        WRONG_SHARING,
    ),
    small(
        "unshare",
        "sharing on over a border that was just drawn",
        "share/domain-change",
        WRONG_SHARING,
    ),
    small(
        "fresh_frame",
        "a sharer who chose where the common frame lies",
        "share/fresh-frame",
        WRONG_SHARING,
    ),
    small(
        "zeroed",
        "showing a guest what another left in a frame",
        "mmap/fresh-is-zero",
        Sees::Corruption,
    ),
    small(
        "zero_hole",
        "showing again what a hole cut off",
        "fs/punch-unaligned",
        Sees::Corruption,
    ),
    small(
        "zero_hole",
        "showing again what a new end cut off",
        "fs/beyond-end",
        Sees::Corruption,
    ),
    small(
        "charge",
        "memory that no cgroup's limit holds back",
        "memcg/charge",
        Sees::Otherwise("pages that are not charged"),
    ),
    small(
        "reservation",
        "taking what is reserved for a VM",
        "contend/reservation",
        Sees::Otherwise("a VM below its reservation"),
    ),
    small(
        "throttle",
        "giving away what reclaim needs to go on",
        "contend/low",
        Sees::Otherwise("a VM that does not wait"),
    ),
    small(
        "encrypt",
        "a disk that tells what guests had in memory",
        "swap/encrypted",
        Sees::Otherwise("plain text on the disk"),
    ),
    small(
        "checksum",
        "believing what a disk gives back",
        "swap/corrupt",
        Sees::Corruption,
    ),
    small(
        "write_result",
        "giving a page up that was not written",
        "swap/write-fails",
        // Its processes cannot read it again.
        Sees::CorruptionOrBusError,
    ),
    small(
        "swap_file",
        "taking what one swap file gave back for another's",
        "debug/late-answer",
        Sees::Otherwise("a page that cannot be read"),
    ),
    small(
        "checksum",
        "believing what a disk gives back of a shared page",
        "swap/shared-corrupt",
        Sees::Corruption,
    ),
    small(
        "write_result",
        "giving a shared page up that was not written",
        "swap/shared-write-fails",
        Sees::CorruptionOrBusError,
    ),
    small(
        "sharers",
        "a page with more sharers than max_page_sharing",
        "share/max-sharers",
        Sees::Otherwise("more sharers than there may be"),
    ),
    small(
        "limit",
        "a VM that keeps more than its limit_kb",
        "contend/limit",
        Sees::Otherwise("a VM above its limit"),
    ),
    small(
        "pool_cap",
        "compressed pages that take more than their part",
        "contend/cap",
        Sees::Otherwise("a pool above its cap"),
    ),
    stock(
        "nodes",
        "sharing between nodes that are to be kept apart",
        "ksm/numa-merge",
        WRONG_SHARING,
        None,
    ),
    stock(
        "freeze",
        "splitting a folio that somebody holds a part of",
        "huge/split-held",
        Sees::Corruption,
        None,
    ),
    stock(
        "freeze",
        "collapsing a region of which somebody holds a page",
        "huge/collapse-held",
        Sees::Corruption,
        // The look before the zap finds nearly all of them; it alone is not enough.
        Some("unpinned"),
    ),
    stock(
        "punch_zap",
        "a mapping that outlives a folio's hole",
        "huge/holes",
        Sees::Corruption,
        None,
    ),
    stock(
        "zero_hole",
        "showing again what a hole in a folio cut off",
        "huge/holes",
        Sees::Corruption,
        None,
    ),
    stock(
        "poison",
        "serving memory that is marked as broken",
        "host/hwpoison",
        Sees::Otherwise("broken memory that is served"),
        None,
    ),
    stock(
        "write_protect",
        "trusting the hash of a part though a write would not be noticed",
        "huge/write-noticed",
        WRONG_SHARING,
        None,
    ),
    stock(
        "note_change",
        "trusting the hash of a part after a write",
        "huge/write-noticed",
        WRONG_SHARING,
        None,
    ),
    stock(
        "unpinned",
        "trusting the hash of a part while a pin may write",
        "huge/late-pin",
        WRONG_SHARING,
        None,
    ),
    stock(
        "split_reserve",
        "a split that waits for memory when there is none",
        "debug/split-reserve",
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
    let seen = run_case(crate::case(protection.case)?, &patient);
    turn(&switch, false)?;
    let seen = seen?;
    if protection.sees.fits(&seen) {
        return Ok(Verdict::Pass);
    }
    comment(&format!(
        "expected that {} sees {} without the protection from {}, seen {seen:?}",
        protection.case,
        protection.sees.text(),
        protection.prevents,
    ));
    Ok(Verdict::Fail)
}

fn turn(switch: &Path, out: bool) -> Result<()> {
    fs::write(switch, if out { "1" } else { "0" })
        .with_context(|| format!("write {}", switch.display()))
}
