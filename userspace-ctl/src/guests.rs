// SPDX-License-Identifier: GPL-2.0

//! How the daemon's answers are shown.
//!
//! The answers are read as JSON and not as types, so that a newer daemon may tell more.

use crate::table::{self, Column};
use crate::text::{escape, wrap};
use crate::units::{long_kb, short_kb};
use serde_json::Value;

const ABSENT: &str = "-";

fn text(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| ABSENT.to_owned(), |text| escape(text.as_bytes()))
}

fn size(value: &Value) -> String {
    value.as_u64().map_or_else(|| ABSENT.to_owned(), short_kb)
}

/// The guests, and what is wrong with them.
pub fn render_guests(report: &Value, width: usize) -> String {
    let columns = [
        Column::text("VM", 12, 0),
        Column::text("driver", 6, 8),
        Column::text("conduct", 8, 1),
        Column::text("policy", 8, 9),
        Column::number("min", 4),
        Column::number("target", 2),
        Column::number("current", 0),
        Column::number("max", 5),
        Column::number("entitl", 10),
        Column::number("comfort", 12),
        Column::number("total", 11),
        Column::number("free", 7),
        Column::number("avail", 6),
        Column::number("press", 3),
    ];
    let guests = report["guests"].as_array().map_or(&[][..], Vec::as_slice);
    let rows: Vec<Vec<String>> = guests
        .iter()
        .map(|guest| {
            let percent = guest["pressure_percent"].as_u64();
            let policy = match guest["by_hand"].as_bool() {
                Some(true) => "by hand".to_owned(),
                _ => text(&guest["policy"]),
            };
            let mut row = vec![
                text(&guest["name"]),
                text(&guest["driver"]),
                text(&guest["conduct"]),
                policy,
            ];
            let sizes = [
                "min_kb",
                "target_kb",
                "current_kb",
                "max_kb",
                "entitlement_kb",
                "comfortable_kb",
                "guest_total_kb",
                "guest_free_kb",
                "guest_available_kb",
            ];
            row.extend(sizes.iter().map(|name| size(&guest[*name])));
            row.push(percent.map_or_else(|| ABSENT.to_owned(), |percent| format!("{percent}%")));
            row
        })
        .collect();
    let mut out = table::render(&columns, &rows, width);
    let mut lines = Vec::new();
    for guest in guests {
        if let Some(error) = guest["error"].as_str() {
            lines.push(format!(
                "{}: {}",
                text(&guest["name"]),
                escape(error.as_bytes())
            ));
        }
    }
    if report["admission_ok"] == Value::Bool(false) {
        lines.push(
            "The sum of the dynamic minima and overheads is more than the host has.".to_owned(),
        );
    }
    if let Some(trouble) = report["trouble"].as_str() {
        lines.push(escape(trouble.as_bytes()));
    }
    for line in lines.iter().flat_map(|line| wrap(line, 2, width)) {
        out.push_str(&line);
        out.push('\n');
    }
    out
}

/// The decisions about a guest, the last one first.
pub fn render_decisions(answer: &Value, width: usize) -> String {
    let now_s = answer["now_s"].as_f64().unwrap_or(0.0);
    let decisions = answer["decisions"]
        .as_array()
        .map_or(&[][..], Vec::as_slice);
    if decisions.is_empty() {
        return "No decision so far: the guest was not reached.\n".to_owned();
    }
    let mut out = String::new();
    for decision in decisions.iter().rev() {
        let ago = now_s - decision["at_s"].as_f64().unwrap_or(now_s);
        let kb = |name: &str| {
            decision[name]
                .as_u64()
                .map_or_else(|| ABSENT.to_owned(), long_kb)
        };
        let said = format!(
            "{ago:.0} s ago: had {}, policy wants {}, aim {}: {}",
            kb("current_kb"),
            kb("wanted_kb"),
            kb("aim_kb"),
            text(&decision["reason"]),
        );
        for line in wrap(&said, 2, width) {
            out.push_str(&line);
            out.push('\n');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn guests_fit_into_80_columns() {
        let report = json!({"admission_ok": false, "trouble": "no module", "guests": [
            {"name": "a-database-with-a-long-name", "driver": "driver", "conduct": "uncooperative",
             "policy": "proportional", "min_kb": 524_288, "target_kb": 1_048_576, "current_kb": 2_097_152,
             "max_kb": 4_194_304, "guest_available_kb": 100, "pressure_percent": 97, "error": null},
            {"name": "b\u{1b}", "driver": "none", "conduct": null, "by_hand": true, "error": "no\nballoon"},
        ]});
        let shown = render_guests(&report, 80);
        assert!(
            shown.lines().all(|line| crate::text::width(line) <= 80),
            "{shown}"
        );
        for part in [
            "97%",
            "uncooper",
            "b\\x1b: no\\nballoon",
            "no module",
            "more than the host has",
        ] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
        assert!(render_guests(&json!(3), 80).starts_with("VM"));
    }

    #[test]
    fn decisions_are_told_backwards() {
        let answer = json!({"now_s": 30.0, "decisions": [
            {"at_s": 10.0, "current_kb": 1024, "wanted_kb": null, "aim_kb": 1024, "reason": "not ready"},
            {"at_s": 20.0, "current_kb": 1024, "wanted_kb": 2048, "aim_kb": 2048, "reason": "met"},
        ]});
        assert_eq!(
            render_decisions(&answer, 80),
            "10 s ago: had 1.0 MiB, policy wants 2.0 MiB, aim 2.0 MiB: met\n\
             20 s ago: had 1.0 MiB, policy wants -, aim 1.0 MiB: not ready\n"
        );
        assert!(render_decisions(&json!({}), 80).contains("No decision so far"));
    }
}
