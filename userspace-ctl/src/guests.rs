// SPDX-License-Identifier: GPL-2.0

//! How the daemon's answers are shown.
//!
//! The answers are read as JSON and not as types, so that a newer daemon may tell more.

use crate::rates::{short_rate, PerSecond};
use crate::table::{self, Column};
use crate::text::{escape, harmless, paragraph, wrap};
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

/// What happens to one VM in a second, as it is shown.
#[derive(Debug, Clone, PartialEq)]
pub struct RateRow {
    name: String,
    cells: [Option<f64>; 7],
}

impl RateRow {
    /// From rates.
    pub fn new(name: String, rates: &PerSecond) -> Self {
        let cells = [
            rates.faults,
            rates.cow_breaks,
            rates.refaults,
            rates.decompressions,
            rates.swap_ins,
            rates.swap_outs,
            rates.stall_us.map(|us| us / 1000.0),
        ];
        Self { name, cells }
    }

    /// From the daemon's report; guests whose rates are not known are left out.
    pub fn of_report(report: &Value) -> Vec<Self> {
        let guests = report["guests"].as_array().map_or(&[][..], Vec::as_slice);
        let row = |guest: &Value| {
            let rate = |name: &str| guest["rates"][name].as_f64();
            let rates = PerSecond {
                faults: rate("faults"),
                refaults: rate("refaults"),
                cow_breaks: rate("cow_breaks"),
                decompressions: rate("decompressions"),
                swap_ins: rate("swap_ins"),
                swap_outs: rate("swap_outs"),
                stall_us: rate("stall_us"),
            };
            Self::new(text(&guest["name"]), &rates)
        };
        guests.iter().map(row).filter(Self::is_known).collect()
    }

    /// Whether any of it is known.
    pub fn is_known(&self) -> bool {
        self.cells.iter().any(Option::is_some)
    }
}

/// What happens to the VMs, in a second.
pub fn render_rates(rows: &[RateRow], width: usize) -> String {
    let columns = [
        Column::text("VM", 12, 0),
        Column::number("faults/s", 0),
        Column::number("cow/s", 1),
        Column::number("refault/s", 4),
        Column::number("unzip/s", 3),
        Column::number("swpin/s", 2),
        Column::number("swpout/s", 5),
        Column::number("stall ms/s", 6),
    ];
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let mut cells = vec![row.name.clone()];
            let rate = |rate: &Option<f64>| rate.map_or_else(|| ABSENT.to_owned(), short_rate);
            cells.extend(row.cells.iter().map(rate));
            cells
        })
        .collect();
    table::render(&columns, &rows, width)
}

/// What stands in a column about a guest.
type Cell<'a> = &'a dyn Fn(&Value) -> String;

/// A table with one row a guest: a name, and cells by their titles.
fn guest_table(guests: &[Value], columns: &[(Column, Cell)], width: usize) -> String {
    let name = Column::text("VM", 12, 0);
    let titles: Vec<Column> = std::iter::once(name)
        .chain(columns.iter().map(|(column, _)| column.clone()))
        .collect();
    let rows: Vec<Vec<String>> = guests
        .iter()
        .map(|guest| {
            let cells = columns.iter().map(|(_, cell)| cell(guest));
            std::iter::once(text(&guest["name"])).chain(cells).collect()
        })
        .collect();
    table::render(&titles, &rows, width)
}

/// The guests: what they shall have and have, how they behave, what they say; and what is wrong.
pub fn render_guests(report: &Value, width: usize) -> String {
    let guests = report["guests"].as_array().map_or(&[][..], Vec::as_slice);
    let kb = |name: &'static str| move |guest: &Value| size(&guest[name]);
    let word = |name: &'static str| move |guest: &Value| text(&guest[name]);
    let policy = |guest: &Value| match (guest["by_hand"].as_bool(), guest["by_guest"].as_bool()) {
        (Some(true), _) => "by hand".to_owned(),
        (_, Some(true)) => "by guest".to_owned(),
        _ => text(&guest["policy"]),
    };
    let amr = |guest: &Value| match guest["amr"].as_bool() {
        Some(true) => "on".to_owned(),
        Some(false) => "off".to_owned(),
        None => ABSENT.to_owned(),
    };
    let number = |value: &Value| {
        value
            .as_u64()
            .map_or_else(|| ABSENT.to_owned(), |n| n.to_string())
    };
    let waited = |guest: &Value| {
        let tally = &guest["tally"];
        match (tally["waits"].as_u64(), tally["waited_s"].as_f64()) {
            (Some(0), _) => "0".to_owned(),
            (Some(waits), Some(waited_s)) => format!("{waits}/{waited_s:.0}s"),
            _ => ABSENT.to_owned(),
        }
    };
    let pressure = |guest: &Value| {
        let percent = guest["pressure_percent"].as_u64();
        percent.map_or_else(|| ABSENT.to_owned(), |percent| format!("{percent}%"))
    };
    let added = |guest: &Value| size(&guest["tally"]["added_kb"]);
    let removed = |guest: &Value| size(&guest["tally"]["removed_kb"]);
    let orders = |guest: &Value| number(&guest["tally"]["orders"]);
    let sizes: [(Column, Cell); 7] = [
        (Column::number("min", 3), &kb("min_kb")),
        (Column::number("entitl", 4), &kb("entitlement_kb")),
        (Column::number("max", 5), &kb("max_kb")),
        (Column::number("target", 1), &kb("target_kb")),
        (Column::number("current", 0), &kb("current_kb")),
        (Column::number("ballooned", 6), &kb("ballooned_kb")),
        (Column::number("comfort", 2), &kb("comfortable_kb")),
    ];
    let conduct: [(Column, Cell); 9] = [
        (Column::text("driver", 6, 2), &word("driver")),
        (Column::text("conduct", 8, 1), &word("conduct")),
        (Column::text("policy", 8, 3), &policy),
        (Column::text("AMR", 3, 5), &amr),
        (Column::number("chunk", 6), &kb("chunk_kb")),
        (Column::number("added", 7), &added),
        (Column::number("removed", 8), &removed),
        (Column::number("orders", 9), &orders),
        (Column::number("waited", 4), &waited),
    ];
    let words: [(Column, Cell); 6] = [
        (Column::number("total", 3), &kb("guest_total_kb")),
        (Column::number("free", 2), &kb("guest_free_kb")),
        (Column::number("avail", 1), &kb("guest_available_kb")),
        (Column::number("committed", 4), &kb("committed_kb")),
        (Column::number("press", 0), &pressure),
        (Column::number("active", 5), &kb("active_kb")),
    ];
    let mut out = guest_table(guests, &sizes, width);
    out.push('\n');
    out.push_str(&guest_table(guests, &conduct, width));
    out.push('\n');
    out.push_str(&guest_table(guests, &words, width));
    let mut lines = Vec::new();
    for guest in guests {
        if let Some(error) = guest["error"].as_str() {
            lines.push(format!("{}: {}", text(&guest["name"]), harmless(error)));
        }
    }
    for kept in report["reservations"].as_array().into_iter().flatten() {
        let what = match kept["admitted"].as_bool() {
            Some(true) => "are kept for",
            _ => "are waited for by",
        };
        let left_s = kept["left_s"].as_f64().unwrap_or(0.0);
        let name = text(&kept["name"]);
        let min = kept["min_kb"].as_u64().unwrap_or(0);
        lines.push(format!("{} {what} {name}, {left_s:.0} s yet", long_kb(min)));
    }
    for found in report["found"].as_array().into_iter().flatten() {
        let pid = found["owner_pid"].as_u64();
        let pid = pid.map_or_else(String::new, |pid| format!(" (pid {pid})"));
        // Escaped already: it is the module's, as it is shown.
        let name = harmless(found["name"].as_str().unwrap_or(ABSENT));
        lines.push(format!(
            "{name}{pid} runs and is left alone: thinramctl vm add {name} dynamic_min=SIZE \
             dynamic_max=SIZE"
        ));
    }
    if report["host"]["unshare_ok"] == Value::Bool(false) {
        let kb = report["host"]["unshare_kb"].as_u64().unwrap_or(0);
        lines.push(format!(
            "If all sharing broke, {} more would be needed, and what unshare_risk wants backed of \
             that is not there.",
            long_kb(kb)
        ));
    }
    if report["admission_ok"] == Value::Bool(false) {
        lines.push(
            "The sum of the dynamic minima and overheads is more than the host has.".to_owned(),
        );
    }
    if let Some(trouble) = report["trouble"].as_str() {
        lines.push(harmless(trouble));
    }
    out.extend(lines.iter().map(|line| paragraph(line, 2, width)));
    out
}

/// One guest, as the daemon sees it.
pub fn render_guest(guest: &Value, width: usize) -> String {
    let kb = |value: &Value| value.as_u64().map_or_else(|| ABSENT.to_owned(), long_kb);
    let switch = |value: &Value| match value.as_bool() {
        Some(true) => "on",
        Some(false) => "off",
        None => ABSENT,
    };
    let tally = &guest["tally"];
    let count = |value: &Value| value.as_u64().unwrap_or(0);
    let mut lines = vec![
        ("policy", text(&guest["policy"])),
        (
            "bounds",
            format!(
                "minimum {}, entitlement {}, maximum {}",
                kb(&guest["min_kb"]),
                kb(&guest["entitlement_kb"]),
                kb(&guest["max_kb"])
            ),
        ),
        (
            "balloon",
            format!(
                "target {}, current {}, ballooned {}, driver {}, {}",
                kb(&guest["target_kb"]),
                kb(&guest["current_kb"]),
                kb(&guest["ballooned_kb"]),
                text(&guest["driver"]),
                text(&guest["conduct"]),
            ),
        ),
        (
            "guest",
            format!(
                "total {}, free {}, available {}, committed {} (estimated), comfortable minimum {}, \
                 pressure {}",
                kb(&guest["guest_total_kb"]),
                kb(&guest["guest_free_kb"]),
                kb(&guest["guest_available_kb"]),
                kb(&guest["committed_kb"]),
                kb(&guest["comfortable_kb"]),
                guest["pressure_percent"]
                    .as_u64()
                    .map_or_else(|| ABSENT.to_owned(), |percent| format!("{percent}%")),
            ),
        ),
        (
            "paging",
            format!(
                "page cache {}, swapped in {}, out {}, major faults {}",
                kb(&guest["guest_caches_kb"]),
                kb(&guest["guest_swap_in_kb"]),
                kb(&guest["guest_swap_out_kb"]),
                guest["guest_major_faults"]
                    .as_u64()
                    .map_or_else(|| ABSENT.to_owned(), |faults| faults.to_string()),
            ),
        ),
        (
            "AMR",
            format!("{}, chunk {}", switch(&guest["amr"]), kb(&guest["chunk_kb"])),
        ),
        (
            "moved",
            format!(
                "{} added, {} removed by {} orders; {} grants waited {:.0} s in all",
                kb(&tally["added_kb"]),
                kb(&tally["removed_kb"]),
                count(&tally["orders"]),
                count(&tally["waits"]),
                tally["waited_s"].as_f64().unwrap_or(0.0),
            ),
        ),
    ];
    if let Some(reason) = guest["reason"].as_str() {
        lines.push(("why", harmless(reason)));
    }
    if let Some(error) = guest["error"].as_str() {
        lines.push(("wrong", harmless(error)));
    }
    let lines = lines.iter();
    lines
        .map(|(label, line)| paragraph(&format!("{label:10}{line}"), 10, width))
        .collect()
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
            harmless(decision["reason"].as_str().unwrap_or(ABSENT)),
        );
        let sample = &decision["sample"];
        let inputs: Vec<String> = [
            ("host available", &decision["host"]["available_kb"]),
            ("reserved", &decision["host"]["reserved_kb"]),
            ("resident", &sample["resident_kb"]),
            ("guest total", &sample["guest_total_kb"]),
            ("free", &sample["guest_free_kb"]),
            ("available", &sample["guest_available_kb"]),
            ("active", &sample["active_kb"]),
            ("swapped out", &sample["swapped_out_kb"]),
        ]
        .iter()
        .filter_map(|(what, value)| Some(format!("{what} {}", long_kb(value.as_u64()?))))
        .collect();
        let mut lines = wrap(&said, 2, width);
        if !inputs.is_empty() {
            let inputs = format!("from: {}", inputs.join(", "));
            let inputs = wrap(&inputs, 2, width.saturating_sub(2));
            lines.extend(inputs.iter().map(|line| format!("  {line}")));
        }
        for line in lines {
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
        let report = json!({"admission_ok": false, "trouble": "no module",
            "reservations": [{"name": "c", "min_kb": 1_048_576, "left_s": 9.2, "admitted": true}],
            "found": [{"name": "d", "owner_pid": 7}], "guests": [
            {"name": "a-database-with-a-long-name", "driver": "driver", "conduct": "uncooperative",
             "policy": "proportional", "min_kb": 524_288, "target_kb": 1_048_576, "current_kb": 2_097_152,
             "max_kb": 4_194_304, "guest_available_kb": 100, "pressure_percent": 97, "error": null, "chunk_kb": 262_144,
             "amr": true, "tally": {"added_kb": 1, "removed_kb": 2, "orders": 3, "waits": 3, "waited_s": 12.2}},
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
            "512M  ",
            "entitl",
            "ballooned",
            "comfort",
            "chunk",
            "committed",
            "1.0 GiB are kept for c, 9 s yet",
            "d (pid 7) runs and is left alone",
            "3/12s",
            "b\\x1b: no\\nballoon",
            "no module",
            "more than the host has",
        ] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
        assert!(render_guests(&json!(3), 80).starts_with("VM"));
    }

    #[test]
    fn one_guest_is_told_in_lines() {
        let guest = json!({"policy": "entitlement", "min_kb": 524_288, "entitlement_kb": 1_048_576,
            "driver": "any", "amr": true, "chunk_kb": 262_144, "error": "no\nballoon",
            "tally": {"added_kb": 2048, "removed_kb": 1024, "orders": 3, "waits": 2, "waited_s": 4.0}});
        let shown = render_guest(&guest, 60);
        for part in [
            "minimum 512 MiB, entitlement 1.0 GiB",
            "driver any",
            "AMR       on, chunk 256 MiB",
            "2.0 MiB added, 1.0 MiB removed by 3 orders",
            "wrong     no\\nballoon",
        ] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
        assert!(shown.lines().all(|line| line.len() <= 60), "{shown}");
    }

    #[test]
    fn decisions_are_told_backwards() {
        let answer = json!({"now_s": 30.0, "decisions": [
            {"at_s": 10.0, "current_kb": 1024, "wanted_kb": null, "aim_kb": 1024, "reason": "not ready"},
            {"at_s": 20.0, "current_kb": 1024, "wanted_kb": 2048, "aim_kb": 2048, "reason": "met",
             "sample": {"resident_kb": 1024}, "host": {"available_kb": 4096}},
        ]});
        assert_eq!(
            render_decisions(&answer, 80),
            "10 s ago: had 1.0 MiB, policy wants 2.0 MiB, aim 2.0 MiB: met\n\
             \x20 from: host available 4.0 MiB, resident 1.0 MiB\n\
             20 s ago: had 1.0 MiB, policy wants -, aim 1.0 MiB: not ready\n"
        );
        assert!(render_decisions(&json!({}), 80).contains("No decision so far"));
    }
}
