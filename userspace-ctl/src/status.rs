// SPDX-License-Identifier: GPL-2.0

//! What `status`, `vm list` and `vm show` print: pure functions of a snapshot and a width.

use crate::host::Host;
use crate::knobs::{Knob, Scope};
use crate::sysfs::{Dir, Error};
use crate::table::{self, Column};
use crate::text::{escape, paragraph};
use crate::units::{long_bytes, long_kb, short_kb};
use crate::vm::{SumCheck, Vm, STATES};
use serde::Serialize;

/// Columns for the labels of the host's lines.
const LABEL: usize = 10;
/// Shown where the module has no such figure.
const ABSENT: &str = "-";

/// Everything that `status` shows, at one time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// The host.
    pub host: Host,
    /// Its VMs, sorted by name.
    pub vms: Vec<Vm>,
}

/// One VM with the sum of its states, as `vm show --json` has it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VmDetail<'a> {
    /// The VM.
    #[serde(flatten)]
    pub vm: &'a Vm,
    /// Absent where the size is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sum_check: Option<SumCheck>,
    /// What the daemon says about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest: Option<serde_json::Value>,
}

impl Status {
    /// Reads the host and its VMs.
    pub fn read(dir: &Dir) -> Result<Self, Error> {
        Ok(Self {
            host: Host::read(dir)?,
            vms: Vm::read_all(&dir.child("vms"))?,
        })
    }

    /// The whole screen, no line wider than `width`.
    pub fn render(&self, width: usize) -> String {
        let mut out = String::new();
        for line in self.host_lines() {
            out.push_str(&paragraph(&line, LABEL, width));
        }
        out.push('\n');
        out.push_str(&self.render_vms(width));
        for note in self.notes() {
            out.push_str(&paragraph(&note, 2, width));
        }
        out
    }

    fn host_lines(&self) -> Vec<String> {
        let Host {
            state,
            figures,
            general_profit,
            knobs,
            refusals,
        } = &self.host;
        let mut lines = Vec::new();
        let mut line = |label: &str, parts: &[Option<String>], join: &str| {
            let parts: Vec<&str> = parts.iter().filter_map(|part| part.as_deref()).collect();
            if !parts.is_empty() {
                lines.push(format!("{label:LABEL$}{}", parts.join(join)));
            }
        };
        let counted = |value: Option<u64>, what: &str| value.map(|value| format!("{value} {what}"));

        line(
            "state",
            &[
                state.as_ref().map(|state| escape(state.as_bytes())),
                figures
                    .available_kb
                    .map(|kb| format!("{} available", long_kb(kb))),
                figures
                    .minfree_effective_kb
                    .map(|kb| format!("minfree {}", long_kb(kb))),
            ],
            ", ",
        );
        line(
            "scanner",
            &[
                knobs.get("run").map(|run| run_words(run)),
                knobs
                    .get("scan_period_secs")
                    .map(|period| match period.as_str() {
                        "0" => "no set period".to_owned(),
                        secs => format!("a full scan in {secs} s"),
                    }),
                knobs
                    .get("scan_pages_per_sec")
                    .map(|pages| match pages.as_str() {
                        "0" => "no ceiling of pages".to_owned(),
                        pages => format!("at most {pages} pages/s"),
                    }),
                knobs
                    .get("scan_cpu_max_percent")
                    .map(|cpu| format!("at most {cpu}% of a CPU")),
            ],
            ", ",
        );
        line(
            "scanned",
            &[
                counted(figures.pages_scanned, "pages"),
                counted(figures.full_scans, "full scans"),
                figures
                    .scan_cpu_ms
                    .map(|ms| format!("{}.{} s of CPU", ms / 1000, ms % 1000 / 100)),
            ],
            ", ",
        );
        line(
            "pages",
            &[
                counted(figures.pages_shared, "shared"),
                counted(figures.pages_sharing, "sharing"),
                counted(figures.zero_pages, "zero"),
                counted(figures.pages_unshared, "unshared"),
                counted(figures.pages_volatile, "volatile"),
            ],
            ", ",
        );
        line(
            "saved",
            &[
                figures.saved_kb.map(long_kb),
                figures.metadata_bytes.map(|bytes| {
                    format!(
                        "metadata {}",
                        long_bytes(i64::try_from(bytes).unwrap_or(i64::MAX))
                    )
                }),
                general_profit.map(|profit| format!("general profit {}", long_bytes(profit))),
            ],
            ", ",
        );
        line(
            "broken",
            &[counted(figures.cow_breaks, "copies on write")],
            "",
        );
        line(
            "split",
            &[
                counted(figures.splits, "2 MiB pages"),
                figures
                    .split_pages_gained
                    .map(|pages| format!("{} gained", long_kb(pages.saturating_mul(4)))),
            ],
            ", ",
        );
        line(
            "zipped",
            &[
                counted(figures.compressions, "pages compressed"),
                counted(figures.decompressions, "brought back"),
                figures
                    .shared_compressed_kb
                    .map(|kb| format!("shared pages {}", long_kb(kb))),
                figures
                    .shared_compressed_pool_kb
                    .map(|kb| format!("in a pool of {}", long_kb(kb))),
                figures
                    .shared_swapped_kb
                    .map(|kb| format!("swapped {}", long_kb(kb))),
            ],
            ", ",
        );
        line(
            "swap",
            &[
                counted(figures.swap_outs, "pages out"),
                counted(figures.swap_ins, "in"),
                counted(
                    figures.swap_writes_failed.filter(|n| *n > 0),
                    "writes failed",
                ),
                counted(figures.swap_reads_failed.filter(|n| *n > 0), "reads failed"),
                counted(
                    figures.swap_objects_corrupt.filter(|n| *n > 0),
                    "pages corrupt",
                ),
            ],
            ", ",
        );
        let refused: Vec<Option<String>> = refusals
            .iter()
            .filter(|(_, count)| **count > 0)
            .map(|(name, count)| Some(format!("{} {count}", escape(name.as_bytes()))))
            .collect();
        line("refused", &refused, ", ");
        lines
    }

    /// The table of the VMs.
    pub fn render_vms(&self, width: usize) -> String {
        if self.vms.is_empty() {
            let none = "No VM: start a guest on a directory of a mount (mount -t thinram).";
            return paragraph(none, 0, width);
        }
        let used = |name: &str| {
            self.vms
                .iter()
                .any(|vm| vm.figures.get(name).unwrap_or(0) > 0)
        };
        let mut columns = vec![Column::text("VM", 12, 0), Column::text("domain", 8, 5)];
        let mut names = Vec::new();
        for (title, rank, name, always) in [
            ("size", 0, "size_kb", true),
            ("resident", 0, "resident_kb", true),
            ("private", 7, "private_kb", true),
            ("shared", 1, "shared_kb", true),
            ("zero", 6, "zero_kb", true),
            ("empty", 9, "empty_kb", true),
            ("huge", 8, "huge_kb", false),
            ("zipped", 3, "compressed_kb", true),
            ("swapped", 2, "swapped_kb", true),
            ("active", 4, "active_kb", true),
        ] {
            if always || used(name) {
                columns.push(Column::number(title, rank));
                names.push(name);
            }
        }
        columns.push(Column::number("saved", 0));

        let size = |kb: Option<u64>| kb.map_or_else(|| ABSENT.to_owned(), short_kb);
        let mut rows = Vec::new();
        for vm in &self.vms {
            let mut row = vec![vm.name.shown(), shown_domain(vm)];
            row.extend(names.iter().map(|name| size(vm.figures.get(name))));
            row.push(size(vm.saved_kb(&self.host.figures)));
            rows.push(row);
        }
        if self.vms.len() > 1 {
            let total = |each: &dyn Fn(&Vm) -> Option<u64>| {
                let known: Vec<u64> = self.vms.iter().filter_map(each).collect();
                let sum = known.iter().copied().fold(0, u64::saturating_add);
                (!known.is_empty()).then_some(sum)
            };
            let mut row = vec![format!("= {} VMs", self.vms.len()), String::new()];
            row.extend(
                names
                    .iter()
                    .map(|name| size(total(&|vm| vm.figures.get(name)))),
            );
            row.push(size(total(&|vm| vm.saved_kb(&self.host.figures))));
            rows.push(row);
        }
        table::render(&columns, &rows, width)
    }

    fn notes(&self) -> Vec<String> {
        let alone: Vec<String> = self
            .vms
            .iter()
            .filter(|vm| vm.is_alone())
            .map(|vm| vm.name.shown())
            .collect();
        let mut notes = Vec::new();
        if !alone.is_empty() {
            let are = if alone.len() == 1 {
                "is a domain of its own"
            } else {
                "are domains of their own"
            };
            notes.push(format!(
                "{} {are}: pages are shared within the VM only. To let VMs that trust each other \
                 share: mount -o domain=NAME, or thinramctl vm set VM domain NAME.",
                some_of(&alone)
            ));
        }
        for vm in &self.vms {
            if let Some(check) = vm.sum_check().filter(|check| vm.one_snapshot && !check.ok) {
                notes.push(format!("{}: {}", vm.name.shown(), check.sentence()));
            }
        }
        notes
    }
}

/// The first names of a list, and how many more there are.
fn some_of(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let mut text = names[..names.len().min(SHOWN)].join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}

fn shown_domain(vm: &Vm) -> String {
    match vm.domain() {
        Some(domain) => escape(domain.as_bytes()),
        None if vm.knobs.contains_key("domain") => "(own)".to_owned(),
        None => ABSENT.to_owned(),
    }
}

fn run_words(run: &str) -> String {
    match run {
        "0" => "stopped".to_owned(),
        "1" => "running".to_owned(),
        "2" => "stopped, shares broken".to_owned(),
        other => format!("run {}", escape(other.as_bytes())),
    }
}

/// Everything about one VM.
pub fn render_vm(vm: &Vm, host: &Host, width: usize) -> String {
    let figures = &vm.figures;
    let mut head = format!("VM {}, domain {}", vm.name.shown(), shown_domain(vm));
    if let Some(pid) = figures.owner_pid.filter(|pid| *pid > 0) {
        head.push_str(&format!(", owner pid {pid}"));
    }
    let mut out = paragraph(&head, 2, width) + "\n";

    let mut sizes = Vec::new();
    let mut add = |label: &str, kb: Option<u64>| {
        let Some(kb) = kb else {
            let absent = [label, ABSENT, ABSENT, ""];
            sizes.push(absent.map(str::to_owned).to_vec());
            return;
        };
        let part = figures.size_kb.filter(|size| *size > 0).map(|size| {
            let percent = (u128::from(kb) * 100 + u128::from(size) / 2) / u128::from(size);
            format!("{percent}%")
        });
        sizes.push(vec![
            label.to_owned(),
            long_kb(kb),
            kb.to_string(),
            part.unwrap_or_default(),
        ]);
    };
    add("size", figures.size_kb);
    for name in STATES {
        add(
            &format!("  {}", name.trim_end_matches("_kb")),
            figures.get(name),
        );
    }
    add("resident", figures.resident_kb);
    add("compressed pool", figures.compressed_pool_kb);
    add("swap file", figures.swap_file_kb);
    add("splittable", figures.splittable_kb);
    add("active", figures.active_kb);
    add("saved", vm.saved_kb(&host.figures));
    let columns = [
        Column::text("memory", 17, 0),
        Column::number("", 0),
        Column::number("KiB", 2),
        Column::number("of size", 1),
    ];
    out.push_str(&table::render(&columns, &sizes, width));
    let check = match vm.sum_check() {
        None => "sum check: the size is not known".to_owned(),
        Some(_) if !vm.one_snapshot => {
            "sum check: not possible, the figures are not from one snapshot".to_owned()
        }
        Some(check) => format!("sum check: {}", check.sentence()),
    };
    out.push_str(&paragraph(&check, 2, width));

    let events: Vec<Vec<String>> = [
        "faults",
        "refaults",
        "cow_breaks",
        "protect_faults",
        "compressions",
        "decompressions",
        "swap_ins",
        "swap_outs",
        "stalls",
        "stall_us",
    ]
    .iter()
    .map(|name| {
        let count = figures.get(name);
        let shown = count.map_or_else(|| ABSENT.to_owned(), |count| count.to_string());
        vec![(*name).to_owned(), shown]
    })
    .collect();
    out.push('\n');
    out.push_str(&table::render(
        &[Column::text("events", 17, 0), Column::number("count", 0)],
        &events,
        width,
    ));

    let knobs: Vec<Vec<String>> = Knob::all(Scope::Vm)
        .filter_map(|knob| {
            let value = vm.knobs.get(knob.name)?;
            Some(vec![
                knob.name.to_owned(),
                knob.show(value),
                knob.help.to_owned(),
            ])
        })
        .collect();
    if !knobs.is_empty() {
        out.push('\n');
        let columns = [
            Column::text("knob", 20, 0),
            Column::text("value", 16, 0),
            Column::text("meaning", 30, 1),
        ];
        out.push_str(&table::render(&columns, &knobs, width));
    }
    out
}
