// SPDX-License-Identifier: GPL-2.0

//! Recorded snapshots, one JSON object a line, and what a policy would have made of them.

use crate::config::Config;
use crate::files;
use crate::policy::{self, Asked, Plan, PolicyKind};
use crate::snapshot::Snapshot;
use crate::table::{self, Column};
use crate::text::{escape, paragraph};
use crate::units::short_kb;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;

/// More than a year of a host at a line each 10 s.
const MOST_BYTES: u64 = 4 << 30;

/// Reads a trace. A last line without an end is one that was being written, and is passed over. An
/// error is a sentence.
pub fn load(path: &Path) -> Result<Vec<Snapshot>, String> {
    let shown = escape(path.as_os_str().as_encoded_bytes());
    let bytes = files::read(path, MOST_BYTES);
    let bytes = bytes.map_err(|error| format!("cannot read {shown}: {error}"))?;
    let text = String::from_utf8(bytes).map_err(|_| format!("{shown} is no UTF-8 text"))?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let mut trace: Vec<Snapshot> = Vec::new();
    for (nth, line) in whole.lines().enumerate() {
        let wrong = |what: String| format!("{shown}:{}: {what}", nth + 1);
        let snapshot: Snapshot =
            serde_json::from_str(line).map_err(|error| wrong(error.to_string()))?;
        if trace.last().is_some_and(|last| last.now_s > snapshot.now_s) {
            return Err(wrong(
                "its time is before that of the line above".to_owned(),
            ));
        }
        trace.push(snapshot);
    }
    if trace.is_empty() {
        return Err(format!("{shown} has no whole line: it is no trace"));
    }
    Ok(trace)
}

/// What a policy would have made of a trace.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Replay {
    /// One for each snapshot.
    pub steps: Vec<Step>,
    /// Over all steps, by VM.
    pub vms: Vec<Summary>,
}

/// One snapshot.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Step {
    /// When it was taken.
    pub now_s: f64,
    /// What each VM should have had.
    #[serde(flatten)]
    pub plan: Plan,
}

/// One VM over all steps.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Its name.
    pub name: String,
    /// Steps in which it was ready.
    pub ready: u64,
    /// Steps in which it was seen.
    pub seen: u64,
    /// Least target.
    pub least_kb: u64,
    /// Mean of the targets.
    pub mean_kb: u64,
    /// Largest target.
    pub most_kb: u64,
    /// Steps whose target differs from the one before.
    pub changes: u64,
    /// Sum of these differences.
    pub moved_kb: u64,
    /// Steps in which its target was below what it had committed.
    pub short: u64,
}

/// Has the policies of a configuration, or one policy for all, decide every step. The guests of a
/// trace do not follow: each step shows what would have been wanted as things were.
pub fn replay(config: &Config, policy: Option<PolicyKind>, trace: &[Snapshot]) -> Replay {
    let mut config = config.clone();
    if let Some(policy) = policy {
        config.host.policy = policy;
        for vm in &mut config.vms {
            vm.policy = None;
        }
    }
    let mut vms: BTreeMap<String, (Summary, Option<u64>, u128)> = BTreeMap::new();
    let mut steps = Vec::with_capacity(trace.len());
    for snapshot in trace {
        let plan = policy::step(&config, snapshot, &Asked::default());
        for (target, sample) in plan.targets.iter().zip(&snapshot.vms) {
            let (summary, last, sum) = vms.entry(target.name.clone()).or_default();
            summary.seen += 1;
            let Some(kb) = target.target_kb.filter(|_| target.ready) else {
                continue;
            };
            summary.least_kb = if summary.ready == 0 {
                kb
            } else {
                summary.least_kb.min(kb)
            };
            summary.ready += 1;
            summary.most_kb = summary.most_kb.max(kb);
            *sum += u128::from(kb);
            if let Some(last) = last.replace(kb).filter(|last| *last != kb) {
                summary.changes += 1;
                summary.moved_kb += last.abs_diff(kb);
            }
            if sample
                .figures()
                .is_ok_and(|figures| figures.committed_kb > kb)
            {
                summary.short += 1;
            }
        }
        steps.push(Step {
            now_s: snapshot.now_s,
            plan,
        });
    }
    let vms = vms
        .into_iter()
        .map(|(name, (summary, _, sum))| {
            let mean = sum.checked_div(u128::from(summary.ready)).unwrap_or(0);
            Summary {
                name,
                mean_kb: u64::try_from(mean).unwrap_or(u64::MAX),
                ..summary
            }
        })
        .collect();
    Replay { steps, vms }
}

/// As it is shown: the summary.
pub fn render(replay: &Replay, width: usize) -> String {
    let columns = [
        Column::text("VM", 12, 0),
        Column::number("ready", 4),
        Column::number("least", 1),
        Column::number("mean", 0),
        Column::number("most", 1),
        Column::number("changes", 3),
        Column::number("moved", 2),
        Column::number("short", 2),
    ];
    let rows: Vec<Vec<String>> = replay
        .vms
        .iter()
        .map(|vm| {
            vec![
                escape(vm.name.as_bytes()),
                format!("{}/{}", vm.ready, vm.seen),
                short_kb(vm.least_kb),
                short_kb(vm.mean_kb),
                short_kb(vm.most_kb),
                vm.changes.to_string(),
                short_kb(vm.moved_kb),
                vm.short.to_string(),
            ]
        })
        .collect();
    let mut out = table::render(&columns, &rows, width);
    let time_s = match (replay.steps.first(), replay.steps.last()) {
        (Some(first), Some(last)) => last.now_s - first.now_s,
        _ => 0.0,
    };
    let unfit = replay.steps.iter().filter(|step| !step.plan.admission_ok);
    let unfit = match unfit.count() {
        0 => String::new(),
        steps => format!("; in {steps} of them the minima do not fit into the host"),
    };
    let said = format!(
        "{} steps over {time_s:.0} s{unfit}. short: steps with a target below the committed memory.",
        replay.steps.len()
    );
    out.push('\n');
    out.push_str(&paragraph(&said, 0, width));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::tests::any_snapshot;
    use crate::snapshot::{HostSample, VmSample};
    use proptest::prelude::*;
    use std::fs;

    const G: u64 = 1 << 20;

    fn at(now_s: f64, committed_kb: u64) -> Snapshot {
        Snapshot {
            now_s,
            host: HostSample {
                total_kb: 16 * G,
                available_kb: 8 * G,
                reserved_kb: 0,
            },
            vms: vec![VmSample {
                name: "a".into(),
                current_kb: Some(2 * G),
                committed_kb: Some(committed_kb),
                guest_total_kb: Some(2 * G),
                guest_free_kb: Some(0),
                guest_available_kb: Some(0),
                active_kb: Some(G),
                resident_kb: Some(2 * G),
                ..VmSample::default()
            }],
        }
    }

    #[test]
    fn any_policy_over_a_trace() {
        let text =
            "[[vm]]\nname = 'a'\ndynamic_min = '1G'\ndynamic_max = '4G'\nbuffer_percent = 0\n\
                    policy = 'manual'\n";
        let config = Config::parse(text).unwrap();
        let mut missing = at(3.0, G);
        missing.vms[0].active_kb = None;
        let trace = [at(1.0, G), at(2.0, 3 * G), missing, at(4.0, 8 * G)];
        let pressure = replay(&config, Some(PolicyKind::Pressure), &trace);
        assert_eq!(
            pressure.vms,
            [Summary {
                name: "a".into(),
                ready: 3,
                seen: 4,
                least_kb: G,
                mean_kb: (1 + 3 + 4) * G / 3,
                most_kb: 4 * G,
                changes: 2,
                moved_kb: 3 * G,
                short: 1,
            }]
        );
        let manual = replay(&config, None, &trace);
        assert_eq!((manual.vms[0].changes, manual.vms[0].mean_kb), (0, 2 * G));
        let shown = render(&pressure, 80);
        assert!(
            shown.contains("3/4") && shown.contains("4 steps over 3 s"),
            "{shown}"
        );
    }

    #[test]
    fn traces_that_are_none() {
        let dir = tempfile::TempDir::new().unwrap();
        let file = dir.path().join("t");
        let line = |now_s: f64| serde_json::to_string(&at(now_s, G)).unwrap();
        fs::write(&file, format!("{}\n{}\n{{\"now", line(1.0), line(2.0))).unwrap();
        assert_eq!(load(&file).unwrap(), [at(1.0, G), at(2.0, G)]);
        for (text, said) in [
            (String::new(), "no whole line"),
            ("{}\n".to_owned(), "t:1: missing field `now_s`"),
            (
                format!("{}\n{}\n", line(2.0), line(1.0)),
                "t:2: its time is before",
            ),
        ] {
            fs::write(&file, text).unwrap();
            let error = load(&file).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
        fs::remove_file(&file).unwrap();
        assert!(load(&file).unwrap_err().contains("cannot read"));
    }

    proptest! {
        #[test]
        fn any_trace_is_read_and_replayed(
            snapshots in prop::collection::vec(any_snapshot(), 1..6),
            policy in prop::sample::select(&PolicyKind::ALL[..]),
            cut in 0usize..60,
            noise in "[a-z{}\",:]{0,3}",
        ) {
            let mut snapshots = snapshots;
            snapshots.sort_by(|a, b| a.now_s.total_cmp(&b.now_s));
            let lines: Vec<_> =
                snapshots.iter().map(|s| serde_json::to_string(s).unwrap()).collect();
            let dir = tempfile::TempDir::new().unwrap();
            let path = dir.path().join("trace");
            // What was being written last is passed over.
            fs::write(&path, lines.join("\n") + "\n" + &lines[0][..cut.min(1)]).unwrap();
            let read = load(&path).unwrap();
            prop_assert_eq!(&read, &snapshots);
            let config = "[[vm]]\nname = 'a'\ndynamic_min = '1G'\ndynamic_max = '4G'\nstatic_max = '4G'\n\
                          [[vm]]\nname = 'b'\ndynamic_min = '1G'\ndynamic_max = '1024T'\nstatic_max = '1024T'\n";
            let config = Config::parse(config).unwrap();
            let replayed = replay(&config, Some(policy), &read);
            prop_assert_eq!(replayed.steps.len(), read.len());
            for vm in &replayed.vms {
                prop_assert!(vm.ready <= vm.seen);
                prop_assert!(vm.least_kb <= vm.mean_kb && vm.mean_kb <= vm.most_kb);
            }
            // Noise in a line is told with its number, or changes nothing of the others.
            let at = lines[0].char_indices().nth(cut).map_or(0, |(at, _)| at);
            let mut spoiled = lines.clone();
            spoiled[0].insert_str(at, &noise);
            fs::write(&path, spoiled.join("\n") + "\n").unwrap();
            match load(&path) {
                Ok(read) => prop_assert_eq!(&read[1..], &snapshots[1..]),
                Err(error) => prop_assert!(error.contains("trace:1: ") || error.contains("trace:2: its time"), "{}", error),
            }
        }
    }
}
