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
    /// On the stock kernel: it needs 2 MiB pages, which User-Mode Linux has not.
    large: bool,
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
    /// That pages merge which must not, or do not which must: no byte is wrong.
    WrongSharing,
}

/// A protection whose case is about 2 MiB pages.
const fn large(
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
        large: true,
        with,
    }
}

impl Sees {
    fn fits(self, verdict: &Verdict) -> bool {
        match self {
            Sees::Corruption => *verdict == Verdict::Corrupt,
            Sees::CorruptionOrBusError => matches!(verdict, Verdict::Corrupt | Verdict::BusError),
            Sees::WrongSharing => *verdict == Verdict::Fail,
        }
    }

    fn text(self) -> &'static str {
        match self {
            Sees::Corruption => "corrupted data",
            Sees::CorruptionOrBusError => "corrupted data or SIGBUS",
            Sees::WrongSharing => "wrong sharing",
        }
    }
}

const PROTECTIONS: &[Protection] = &[
    Protection {
        name: "zap",
        prevents: "a mapping that outlives the page in its slot",
        case: "torture/syscalls",
        // The next write fault finds another page mapped than the slot's.
        sees: Sees::CorruptionOrBusError,
        large: false,
        with: None,
    },
    Protection {
        name: "freeze",
        prevents: "replacing a page that somebody else holds",
        case: "share/held-for-writing",
        sees: Sees::Corruption,
        large: false,
        with: None,
    },
    Protection {
        name: "freeze",
        prevents: "compressing a page that somebody else holds",
        case: "contend/held",
        sees: Sees::Corruption,
        large: false,
        with: None,
    },
    Protection {
        name: "compare",
        prevents: "merging pages whose hash alone is the same",
        case: "torture/mapping",
        sees: Sees::Corruption,
        large: false,
        with: Some("whole_hash"),
    },
    Protection {
        name: "read_only",
        prevents: "writing to a frame that others share",
        case: "torture/mapping",
        sees: Sees::Corruption,
        large: false,
        with: None,
    },
    Protection {
        name: "punch_zap",
        prevents: "a mapping that outlives the page's hole",
        case: "torture/punch",
        // The same, where what was there is mapped read-only.
        sees: Sees::CorruptionOrBusError,
        large: false,
        with: None,
    },
    Protection {
        name: "write_protect",
        prevents: "trusting a hash though a write would not be noticed",
        case: "share/write-noticed",
        sees: Sees::WrongSharing,
        large: false,
        with: None,
    },
    Protection {
        name: "note_change",
        prevents: "trusting a hash after a write",
        case: "share/write-noticed",
        sees: Sees::WrongSharing,
        large: false,
        with: None,
    },
    Protection {
        name: "unpinned",
        prevents: "trusting a hash while a pin may write",
        case: "share/late-pin",
        sees: Sees::WrongSharing,
        large: false,
        with: None,
    },
    Protection {
        name: "border",
        prevents: "sharing over the border of a domain",
        case: "share/across-domains",
        sees: Sees::WrongSharing,
        large: false,
        with: None,
    },
    Protection {
        name: "checksum",
        prevents: "believing what a disk gives back",
        case: "swap/corrupt",
        sees: Sees::Corruption,
        large: false,
        with: None,
    },
    Protection {
        name: "write_result",
        prevents: "giving a page up that was not written",
        case: "swap/write-fails",
        // Its processes cannot read it again.
        sees: Sees::CorruptionOrBusError,
        large: false,
        with: None,
    },
    Protection {
        name: "checksum",
        prevents: "believing what a disk gives back of a shared page",
        case: "swap/shared-corrupt",
        sees: Sees::Corruption,
        large: false,
        with: None,
    },
    Protection {
        name: "write_result",
        prevents: "giving a shared page up that was not written",
        case: "swap/shared-write-fails",
        sees: Sees::CorruptionOrBusError,
        large: false,
        with: None,
    },
    large(
        "freeze",
        "splitting a folio that somebody holds a part of",
        "huge/split-held",
        Sees::Corruption,
        None,
    ),
    large(
        "freeze",
        "collapsing a region of which somebody holds a page",
        "huge/collapse-held",
        Sees::Corruption,
        // The look before the zap finds nearly all of them; it alone is not enough.
        Some("unpinned"),
    ),
    large(
        "punch_zap",
        "a mapping that outlives a folio's hole",
        "huge/holes",
        Sees::Corruption,
        None,
    ),
    large(
        "write_protect",
        "trusting the hash of a part though a write would not be noticed",
        "huge/write-noticed",
        Sees::WrongSharing,
        None,
    ),
    large(
        "note_change",
        "trusting the hash of a part after a write",
        "huge/write-noticed",
        Sees::WrongSharing,
        None,
    ),
    large(
        "unpinned",
        "trusting the hash of a part while a pin may write",
        "huge/late-pin",
        Sees::WrongSharing,
        None,
    ),
    large(
        "split_reserve",
        "a split that waits for memory when there is none",
        "debug/split-reserve",
        Sees::WrongSharing,
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
            "all" => !p.large,
            "large" => p.large,
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
