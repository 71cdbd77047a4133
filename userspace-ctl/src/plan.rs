// SPDX-License-Identifier: GPL-2.0

//! How a plan is shown.

use crate::policy::Plan;
use crate::snapshot::Snapshot;
use crate::table::{self, Column};
use crate::text::{escape, paragraph};
use crate::units::short_kb;

/// A table of sizes, and a line of reasons for each VM.
pub fn render(plan: &Plan, snapshot: &Snapshot, width: usize) -> String {
    let columns = [
        Column::text("VM", 12, 0),
        Column::number("current", 1),
        Column::number("target", 0),
        Column::number("change", 0),
    ];
    let size = |kb: Option<u64>| kb.map_or_else(|| "-".to_owned(), short_kb);
    let rows: Vec<Vec<String>> = plan
        .targets
        .iter()
        .zip(&snapshot.vms)
        .map(|(target, sample)| {
            let change = match (sample.current_kb, target.target_kb) {
                (Some(now), Some(then)) if then > now => format!("+{}", short_kb(then - now)),
                (Some(now), Some(then)) if then < now => format!("-{}", short_kb(now - then)),
                (Some(_), Some(_)) => "0".to_owned(),
                _ => "-".to_owned(),
            };
            let name = escape(target.name.as_bytes());
            vec![
                name,
                size(sample.current_kb),
                size(target.target_kb),
                change,
            ]
        })
        .collect();
    let mut out = table::render(&columns, &rows, width);
    out.push('\n');
    for target in &plan.targets {
        let said = format!("{}: {}", escape(target.name.as_bytes()), target.reason);
        out.push_str(&paragraph(&said, 2, width));
    }
    if !plan.admission_ok {
        let said = "admission: refused, the sum of the dynamic minima and overheads is more than \
                    the host has";
        out.push_str(&paragraph(said, 2, width));
    }
    out
}
