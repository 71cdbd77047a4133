// SPDX-License-Identifier: GPL-2.0

//! The files of sysfs in three places: where the module makes them, in docs/abi.md, and in what
//! thinramctl knows. They have to be the same.

use crate::env::{read, src};
use crate::ktap::Test;
use anyhow::Result;
use std::collections::{BTreeMap, BTreeSet};

/// Files by directory and name, with whether they can be written.
type Files = BTreeMap<(Dir, String), bool>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Dir {
    Host,
    Vm,
}

impl Dir {
    fn path(self) -> &'static str {
        match self {
            Dir::Host => "/sys/fs/thinram",
            Dir::Vm => "/sys/fs/thinram/vms/NAME",
        }
    }
}

/// One test for each place that has to agree with the module.
pub fn tests() -> Result<Vec<Test>> {
    let module = made(&read(src("rust/glue/sysfs.rs"))?);
    let documented = self::documented(&read(src("docs/abi.md"))?);
    let knobs = self::knobs(&read(src("userspace-ctl/src/knobs.rs"))?);
    let mut figures = self::figures(Dir::Host, &read(src("userspace-ctl/src/host.rs"))?);
    figures.extend(self::figures(
        Dir::Vm,
        &read(src("userspace-ctl/src/vm.rs"))?,
    ));
    let writable: Files = only(&module, |_, writable| writable);
    // Words and signed numbers are read by themselves, refusals by their names.
    let counted: Files = only(&module, |name, writable| {
        let by_itself = ["state", "stat", "general_profit"];
        !writable && !name.contains("refused") && !by_itself.contains(&name)
    });
    Ok(vec![
        verdict(
            "docs/abi.md has every file of sysfs, and no other",
            [
                missing("is in no table of docs/abi.md", &module, &documented),
                missing(
                    "is documented, but the module has none",
                    &documented,
                    &module,
                ),
            ],
        ),
        verdict(
            "thinramctl knows every knob, and no other",
            [
                missing("is no knob of thinramctl", &writable, &knobs),
                missing(
                    "is a knob of thinramctl, but not the module's",
                    &knobs,
                    &writable,
                ),
            ],
        ),
        verdict(
            "thinramctl knows every figure",
            [
                missing("is no figure of thinramctl", &counted, &figures),
                vec![],
            ],
        ),
    ])
}

fn only(files: &Files, keep: impl Fn(&str, bool) -> bool) -> Files {
    let kept = files
        .iter()
        .filter(|((_, name), writable)| keep(name, **writable));
    kept.map(|(file, writable)| (file.clone(), *writable))
        .collect()
}

fn missing(what: &str, files: &Files, there: &Files) -> Vec<String> {
    let gone = files.keys().filter(|file| !there.contains_key(file));
    gone.map(|(dir, name)| format!("{}/{name} {what}", dir.path()))
        .collect()
}

fn verdict(name: &str, faults: [Vec<String>; 2]) -> Test {
    let faults = faults.concat();
    match faults.is_empty() {
        true => Test::pass(name),
        false => Test::fail(name, faults.join("\n")),
    }
}

/// What the two tables of `files!` make.
fn made(text: &str) -> Files {
    let mut files = Files::new();
    for (dir, head) in [
        (Dir::Host, "    HOST_ATTRIBUTES,"),
        (Dir::Vm, "    VM_ATTRIBUTES,"),
    ] {
        let table = text.split_once(head).map_or("", |(_, rest)| rest);
        let table = table.split_once("\n}").map_or("", |(table, _)| table);
        let entries = table.split("\n    \"").skip(1);
        for entry in entries {
            let Some((name, code)) = entry.split_once("\":") else {
                continue;
            };
            // The one that writes comes after the one that reads.
            let code = code.trim_end().trim_end_matches(';');
            let writes = code.contains("bytes|") || code.contains("number!(");
            files.insert((dir, name.to_string()), writes);
        }
    }
    files
}

/// The first column of the tables below the headings of the two directories.
fn documented(text: &str) -> Files {
    let mut files = Files::new();
    let mut dir = None;
    for line in text.lines() {
        if let Some(heading) = line.strip_prefix("## ") {
            dir = [Dir::Host, Dir::Vm]
                .into_iter()
                .find(|dir| dir.path() == heading);
        }
        let (Some(dir), Some(row)) = (dir, line.strip_prefix("| `")) else {
            continue;
        };
        let cell = row.split(" | ").next().unwrap_or("");
        let names: Vec<&str> = cell
            .split('`')
            .step_by(2)
            .filter(|n| !n.is_empty())
            .collect();
        // A row from one state to another stands for all of them.
        let states = ["high", "clear", "soft", "hard", "low"];
        let is_state = |name: &str| states.contains(&name);
        match names[..] {
            ["state_high_ms", "state_low_ms"] => {
                let all = states.map(|state| ((dir, format!("state_{state}_ms")), false));
                files.extend(all);
            }
            _ => {
                let names = names.into_iter().filter(|name| !is_state(name));
                files.extend(names.map(|name| ((dir, name.to_string()), false)));
            }
        }
    }
    files
}

/// The knobs of thinramctl's table.
fn knobs(text: &str) -> Files {
    let entries = text.split("knob!(").skip(1);
    let knobs = entries.filter_map(|entry| {
        let mut parts = entry.split(',').map(str::trim);
        let dir = match parts.next()? {
            "Host" => Dir::Host,
            "Vm" => Dir::Vm,
            _ => return None,
        };
        let name = parts.next()?.strip_prefix('"')?.strip_suffix('"')?;
        Some(((dir, name.to_string()), true))
    });
    knobs.collect()
}

/// The fields of a table of figures.
fn figures(dir: Dir, text: &str) -> Files {
    let table = text.split_once("figures! {").map_or("", |(_, rest)| rest);
    let table = table.split_once("\n}").map_or("", |(table, _)| table);
    let fields: BTreeSet<&str> = table
        .lines()
        .filter_map(|line| line.trim().strip_suffix(','))
        .filter(|field| field.chars().all(|c| c.is_ascii_lowercase() || c == '_'))
        .collect();
    let files = fields
        .into_iter()
        .map(|field| ((dir, field.to_string()), false));
    files.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODULE: &str = "files! {\n    HOST_ATTRIBUTES, HOST_FILES: HostFiles;\n    \
        \"run\": |h, page| line(page, 1),\n        |h, bytes| {\n            x(bytes)\n        };\n    \
        \"pace\": |h, page| {\n            line(page, 2)\n        },\n        number!(\"pace\", pace);\n    \
        \"scans\": |h, page| line(page, 3);\n}\n\nfiles! {\n    VM_ATTRIBUTES, VM_FILES: Vm;\n    \
        \"size_kb\": |vm, page| line(page, 4);\n}\n";

    fn names(files: &Files) -> Vec<(Dir, &str, bool)> {
        files
            .iter()
            .map(|((dir, name), w)| (*dir, name.as_str(), *w))
            .collect()
    }

    #[test]
    fn what_the_module_makes() {
        let files = made(MODULE);
        let expected = [
            (Dir::Host, "pace", true),
            (Dir::Host, "run", true),
            (Dir::Host, "scans", false),
            (Dir::Vm, "size_kb", false),
        ];
        assert_eq!(names(&files), expected);
    }

    #[test]
    fn what_is_documented() {
        let text =
            "## Mount options\n\n| `size=N` | x |\n\n## /sys/fs/thinram\n\n| file | values |\n\
            | --- | --- |\n| `run` | `0` `1` |\n| `state_high_ms` ... `state_low_ms` | ms |\n\
            | `high` | at least 400 % |\n\n## /sys/fs/thinram/vms/NAME\n\n| `size_kb` | KiB |\n\
            ## debugfs\n\n| `x` | y |\n";
        let files = documented(text);
        assert_eq!(files.len(), 7);
        assert!(files.contains_key(&(Dir::Host, "run".into())));
        assert!(files.contains_key(&(Dir::Host, "state_soft_ms".into())));
        assert!(files.contains_key(&(Dir::Vm, "size_kb".into())));
    }

    #[test]
    fn what_thinramctl_knows() {
        let files = knobs("knob!(\n        Host,\n        \"run\",\n        Kind::Number,\n knob!(Vm, \"share\", K)");
        assert_eq!(
            names(&files),
            [(Dir::Host, "run", true), (Dir::Vm, "share", true)]
        );
        let files = figures(
            Dir::Host,
            "figures! {\n    /// Figures.\n    pub struct F {\n        /// Scans, all.\n        scans,\n    }\n}\n",
        );
        assert_eq!(names(&files), [(Dir::Host, "scans", false)]);
    }

    #[test]
    fn a_file_that_is_not_in_step_is_named() {
        let (all, mut some) = (made(MODULE), made(MODULE));
        some.remove(&(Dir::Vm, "size_kb".into()));
        let faults = missing("is gone", &all, &some);
        assert_eq!(faults, ["/sys/fs/thinram/vms/NAME/size_kb is gone"]);
        assert_eq!(missing("is gone", &some, &all), [""; 0]);
        assert!(matches!(
            verdict("v", [faults, vec![]]).outcome,
            crate::ktap::Outcome::Fail(why) if why.contains("size_kb")
        ));
    }
}
