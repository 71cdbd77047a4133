// SPDX-License-Identifier: GPL-2.0

//! Host, VMs and guests as OpenMetrics.
//!
//! Names have their unit in them, sizes are bytes. What is not known is left out: an alert on
//! something absent is better than one on a made-up 0.

use crate::host::Host;
use crate::snapshot::HostSample;
use crate::vm::Vm;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;

/// What such a text is called in HTTP.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Labels = Vec<(&'static str, String)>;
type GaugeFamily = Family<Labels, Gauge<f64, AtomicU64>>;
type CounterFamily = Family<Labels, Counter<f64, AtomicU64>>;

const STATES: [&str; 5] = ["high", "clear", "soft", "hard", "low"];
const CONDUCTS: [&str; 6] = [
    "settled",
    "moving",
    "inactive",
    "uncooperative",
    "held",
    "notready",
];
const DRIVERS: [&str; 3] = ["none", "any", "driver"];

/// Sizes of a VM in KiB, and what they mean.
const VM_SIZES: [(&str, &str); 12] = [
    ("size_kb", "Length of the VM's files"),
    ("resident_kb", "Host memory that the VM itself holds"),
    ("private_kb", "Frames of the VM's own"),
    ("shared_kb", "Memory that shares frames"),
    ("zero_kb", "Memory that is known to be zero"),
    ("huge_kb", "Memory in 2 MiB pages"),
    ("empty_kb", "Memory never touched, or given back"),
    ("splittable_kb", "What splitting 2 MiB pages would save"),
    ("compressed_kb", "Compressed memory, as large as it was"),
    ("compressed_pool_kb", "What compressed memory takes"),
    ("swapped_kb", "Swapped memory"),
    ("active_kb", "Memory that the VM lately used"),
];

/// Counters of a VM.
const VM_COUNTERS: [(&str, &str); 7] = [
    ("faults", "Faults served"),
    ("refaults", "Faults on pages that had been taken away"),
    ("cow_breaks", "Shared and zero pages that were written"),
    ("decompressions", "Pages decompressed"),
    ("swap_ins", "Pages read from swap"),
    ("swap_outs", "Pages written to swap"),
    (
        "protect_faults",
        "Faults that the scanner's protection cost",
    ),
];

/// Sizes of a guest in KiB, of the daemon's report.
const GUEST_SIZES: [(&str, &str); 11] = [
    ("min_kb", "Least that a policy may leave the guest"),
    ("max_kb", "Most that a policy may give the guest"),
    ("entitlement_kb", "What the guest has a right to"),
    ("target_kb", "What the policy wants the guest to have"),
    ("current_kb", "What its balloon leaves the guest"),
    ("ballooned_kb", "What its balloon took of the guest"),
    ("comfortable_kb", "What the guest could live with now"),
    ("guest_total_kb", "Memory that the guest sees"),
    ("guest_free_kb", "Free memory in the guest"),
    (
        "guest_available_kb",
        "What the guest's programs could still get",
    ),
    ("committed_kb", "What the guest's programs use, an estimate"),
];

struct Writer(Registry);

impl Writer {
    fn gauges(&mut self, name: &str, help: &str, values: Vec<(Labels, f64)>) {
        if let [(labels, value)] = values.as_slice() {
            if labels.is_empty() {
                let metric = Gauge::<f64, AtomicU64>::default();
                metric.set(*value);
                return self.0.register(name, help, metric);
            }
        }
        if values.is_empty() {
            return;
        }
        let family = GaugeFamily::default();
        self.0.register(name, help, family.clone());
        for (labels, value) in values {
            family.get_or_create(&labels).set(value);
        }
    }

    fn counters(&mut self, name: &str, help: &str, values: Vec<(Labels, f64)>) {
        if let [(labels, value)] = values.as_slice() {
            if labels.is_empty() {
                let metric = Counter::<f64, AtomicU64>::default();
                metric.inc_by(*value);
                return self.0.register(name, help, metric);
            }
        }
        if values.is_empty() {
            return;
        }
        let family = CounterFamily::default();
        self.0.register(name, help, family.clone());
        for (labels, value) in values {
            family.get_or_create(&labels).inc_by(value);
        }
    }
}

fn bytes(kb: u64) -> f64 {
    kb as f64 * 1024.0
}

/// `guest_free_kb` of a guest is `thinram_guest_free_bytes`.
fn name_of(prefix: &str, field: &str) -> String {
    let field = field.strip_prefix("guest_").unwrap_or(field);
    format!("{prefix}_{}_bytes", field.trim_end_matches("_kb"))
}

/// The text; `report` is the daemon's.
pub fn expose(
    host: &Host,
    memory: Option<HostSample>,
    vms: &[Vm],
    report: Option<&Value>,
) -> String {
    let mut out = Writer(Registry::default());
    of_host(&mut out, host, memory);
    of_vms(&mut out, vms);
    if let Some(report) = report {
        of_guests(&mut out, report);
    }
    let mut text = String::new();
    // Writing into a text does not fail.
    let _ = encode(&mut text, &out.0);
    text
}

fn of_host(out: &mut Writer, host: &Host, memory: Option<HostSample>) {
    let one = |value: f64| vec![(Labels::new(), value)];
    if let Some(memory) = memory {
        out.gauges(
            "thinram_host_memory_bytes",
            "All memory of the host",
            one(bytes(memory.total_kb)),
        );
        out.gauges(
            "thinram_host_available_bytes",
            "What can be had without swapping",
            one(bytes(memory.available_kb)),
        );
    }
    if let Some(state) = &host.state {
        let values = STATES.iter().map(|known| {
            let is = if known == state { 1.0 } else { 0.0 };
            (vec![("state", (*known).to_owned())], is)
        });
        out.gauges(
            "thinram_host_state",
            "State of the host, 1 for the one that it is in",
            values.collect(),
        );
    }
    let figures = &host.figures;
    for (name, help, kb) in [
        (
            "thinram_saved_bytes",
            "Saved by sharing and zero pages",
            figures.saved_kb,
        ),
        (
            "thinram_shared_frames_bytes",
            "Frames of shared pages",
            figures.shared_frames_kb,
        ),
    ] {
        if let Some(kb) = kb {
            out.gauges(name, help, one(bytes(kb)));
        }
    }
    if let Some(metadata) = figures.metadata_bytes {
        let help = "The module's own bookkeeping";
        out.gauges("thinram_metadata_bytes", help, one(metadata as f64));
    }
    if let Some(profit) = host.general_profit {
        let help = "Saved memory less bookkeeping";
        out.gauges("thinram_profit_bytes", help, one(profit as f64));
    }
    for (name, help, pages) in [
        (
            "thinram_shared_pages",
            "Shared frames",
            figures.pages_shared,
        ),
        (
            "thinram_sharing_pages",
            "Pages that sharing saves",
            figures.pages_sharing,
        ),
        ("thinram_zero_pages", "Pages of zeroes", figures.zero_pages),
    ] {
        if let Some(pages) = pages {
            out.gauges(name, help, one(pages as f64));
        }
    }
    for (name, help, count) in [
        (
            "thinram_scanned_pages",
            "Pages looked at",
            figures.pages_scanned,
        ),
        (
            "thinram_full_scans",
            "Passes over all memory",
            figures.full_scans,
        ),
        (
            "thinram_cow_breaks",
            "Shared and zero pages that were written",
            figures.cow_breaks,
        ),
    ] {
        if let Some(count) = count {
            out.counters(name, help, one(count as f64));
        }
    }
    if let Some(ms) = figures.scan_cpu_ms {
        let help = "CPU time of the scanner";
        out.counters("thinram_scan_cpu_seconds", help, one(ms as f64 / 1000.0));
    }
    let refusals = host
        .refusals
        .iter()
        .map(|(reason, count)| (vec![("reason", reason.clone())], *count as f64));
    out.counters(
        "thinram_refusals",
        "Things that were not done, by reason",
        refusals.collect(),
    );
}

fn of_vms(out: &mut Writer, vms: &[Vm]) {
    let labels = |vm: &Vm| -> Labels { vec![("vm", vm.name.shown())] };
    for (field, help) in VM_SIZES {
        let values = vms
            .iter()
            .filter_map(|vm| Some((labels(vm), bytes(vm.figures.get(field)?))));
        out.gauges(&name_of("thinram_vm", field), help, values.collect());
    }
    for (field, help) in VM_COUNTERS {
        let values = vms
            .iter()
            .filter_map(|vm| Some((labels(vm), vm.figures.get(field)? as f64)));
        out.counters(&format!("thinram_vm_{field}"), help, values.collect());
    }
    let values = vms
        .iter()
        .filter_map(|vm| Some((labels(vm), vm.figures.stall_us? as f64 / 1e6)));
    let help = "Time that faults waited for memory";
    out.counters("thinram_vm_stall_seconds", help, values.collect());
}

fn of_guests(out: &mut Writer, report: &Value) {
    let guests = report["guests"].as_array().map_or(&[][..], Vec::as_slice);
    let label = |guest: &Value| -> Labels {
        // The module's name, so that VM and guest can be joined.
        let name = guest["module_name"].as_str().or(guest["name"].as_str());
        vec![("vm", name.unwrap_or("").to_owned())]
    };
    let each = |value: &dyn Fn(&Value) -> Option<f64>| -> Vec<(Labels, f64)> {
        let values = guests.iter();
        values
            .filter_map(|guest| Some((label(guest), value(guest)?)))
            .collect()
    };
    for (field, help) in GUEST_SIZES {
        let values = each(&|guest| guest[field].as_u64().map(bytes));
        out.gauges(&name_of("thinram_guest", field), help, values);
    }
    let pressure = each(&|guest| Some(guest["pressure_percent"].as_f64()? / 100.0));
    let help = "Committed memory by what the guest sees";
    out.gauges("thinram_guest_pressure_ratio", help, pressure);
    let age = each(&|guest| guest["stats_age_s"].as_f64());
    let help = "How old the guest's figures are";
    out.gauges("thinram_guest_stats_age_seconds", help, age);
    let tally = |name: &'static str| move |guest: &Value| guest["tally"][name].as_f64();
    for (name, help, field, scale) in [
        (
            "thinram_guest_added_bytes",
            "Memory given to the guest",
            "added_kb",
            1024.0,
        ),
        (
            "thinram_guest_removed_bytes",
            "Memory taken from the guest",
            "removed_kb",
            1024.0,
        ),
        (
            "thinram_guest_orders",
            "Sizes that its balloon was told",
            "orders",
            1.0,
        ),
        (
            "thinram_guest_grant_waits",
            "Grants that had to wait for memory",
            "waits",
            1.0,
        ),
        (
            "thinram_guest_grant_wait_seconds",
            "How long they waited",
            "waited_s",
            1.0,
        ),
    ] {
        let read = tally(field);
        out.counters(name, help, each(&|guest| Some(read(guest)? * scale)));
    }
    let mut sets: BTreeMap<&str, Vec<(Labels, f64)>> = BTreeMap::new();
    for guest in guests {
        for (key, words) in [("conduct", &CONDUCTS[..]), ("driver", &DRIVERS[..])] {
            let Some(now) = guest[key].as_str() else {
                continue;
            };
            for word in words {
                let mut labels = label(guest);
                labels.push((
                    if key == "conduct" {
                        "conduct"
                    } else {
                        "driver"
                    },
                    (*word).to_owned(),
                ));
                let is = if *word == now { 1.0 } else { 0.0 };
                sets.entry(key).or_default().push((labels, is));
            }
        }
    }
    let help = "How the guest behaves, 1 for what holds";
    out.gauges(
        "thinram_guest_conduct",
        help,
        sets.remove("conduct").unwrap_or_default(),
    );
    let help = "How far the guest can be ballooned, 1 for what holds";
    out.gauges(
        "thinram_guest_driver",
        help,
        sets.remove("driver").unwrap_or_default(),
    );
    let host = &report["host"];
    for (name, help, kb) in [
        (
            "thinram_host_reserved_bytes",
            "Kept for VMs that start",
            &host["reserved_kb"],
        ),
        (
            "thinram_host_unshare_bytes",
            "Needed if all sharing broke",
            &host["unshare_kb"],
        ),
    ] {
        if let Some(kb) = kb.as_u64() {
            out.gauges(name, help, vec![(Labels::new(), bytes(kb))]);
        }
    }
    for (name, help, ok) in [
        (
            "thinram_admission_ok",
            "1 while all minima fit",
            &report["admission_ok"],
        ),
        (
            "thinram_unshare_ok",
            "1 while the risk of unsharing is as allowed",
            &host["unshare_ok"],
        ),
    ] {
        if let Some(ok) = ok.as_bool() {
            out.gauges(name, help, vec![(Labels::new(), f64::from(u8::from(ok)))]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::{VmFigures, VmName};
    use serde_json::json;
    use std::collections::BTreeSet;

    fn text() -> String {
        let mut host = Host {
            state: Some("soft".into()),
            general_profit: Some(-5),
            ..Host::default()
        };
        for name in crate::host::HostFigures::NAMES {
            host.figures.set(name, 7);
        }
        host.figures.saved_kb = Some(2);
        host.refusals.insert("merges_refused_busy".into(), 3);
        let mut figures = VmFigures::default();
        for name in VmFigures::NAMES {
            figures.set(name, 11);
        }
        let vm = Vm {
            name: VmName::new("we\"b\n"),
            figures,
            one_snapshot: true,
            knobs: BTreeMap::new(),
        };
        let memory = HostSample {
            total_kb: 4,
            available_kb: 1,
            reserved_kb: 0,
        };
        let guest = json!({"name": "web", "module_name": "7-web", "min_kb": 1, "max_kb": 1,
            "entitlement_kb": 1, "target_kb": 1, "current_kb": 3, "ballooned_kb": 1, "comfortable_kb": 1,
            "guest_total_kb": 1, "guest_free_kb": 1, "guest_available_kb": null, "committed_kb": 1,
            "pressure_percent": 50, "stats_age_s": 2.5, "conduct": "uncooperative", "driver": "any",
            "tally": {"added_kb": 1, "removed_kb": 2, "orders": 3, "waits": 4, "waited_s": 5.5}});
        let second = json!({"name": "b", "guest_available_kb": 1});
        let report = json!({"admission_ok": true, "guests": [guest, second],
            "host": {"reserved_kb": 1, "unshare_kb": 1, "unshare_ok": false}});
        expose(&host, Some(memory), &[vm], Some(&report))
    }

    #[test]
    fn what_is_known_is_told() {
        let text = text();
        for line in [
            "thinram_host_available_bytes 1024.0",
            "thinram_host_state{state=\"soft\"} 1.0",
            "thinram_host_state{state=\"high\"} 0.0",
            "thinram_saved_bytes 2048.0",
            "thinram_profit_bytes -5.0",
            "thinram_cow_breaks_total 7.0",
            "thinram_refusals_total{reason=\"merges_refused_busy\"} 3.0",
            "thinram_guest_current_bytes{vm=\"7-web\"} 3072.0",
            "thinram_guest_pressure_ratio{vm=\"7-web\"} 0.5",
            "thinram_guest_removed_bytes_total{vm=\"7-web\"} 2048.0",
            "thinram_guest_grant_wait_seconds_total{vm=\"7-web\"} 5.5",
            "thinram_guest_conduct{vm=\"7-web\",conduct=\"uncooperative\"} 1.0",
            "thinram_guest_available_bytes{vm=\"b\"} 1024.0",
            "thinram_unshare_ok 0.0",
        ] {
            assert!(text.lines().any(|got| got == line), "{line}:\n{text}");
        }
        assert!(!text.contains("thinram_guest_available_bytes{vm=\"7-web\"}"));
        assert!(text.contains("we\\\"b"), "names are escaped: {text}");
        assert!(text.ends_with("# EOF\n"));
        let none = expose(&Host::default(), None, &[], None);
        assert_eq!(none, "# EOF\n");
    }

    /// Names of metrics in a text of another kind.
    fn names(text: &str) -> BTreeSet<String> {
        text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .filter(|word| word.starts_with("thinram_"))
            .map(str::to_owned)
            .collect()
    }

    /// Metrics and the labels by which they are picked: `name{label=...,label=~...}`.
    fn picked(text: &str) -> Vec<(&str, &str)> {
        let mut found = Vec::new();
        for (at, _) in text.match_indices('{') {
            let start = text[..at].rfind(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            let name = &text[start.map_or(0, |start| start + 1)..at];
            let Some((inner, _)) = text[at + 1..].split_once('}') else {
                continue;
            };
            if name.starts_with("thinram_") {
                let labels = inner.split(',').filter_map(|part| part.split_once('='));
                found.extend(labels.map(|(label, _)| (name, label.trim())));
            }
        }
        found
    }

    #[test]
    fn dashboard_and_alerts_pick_by_labels_that_are_told() {
        let told = text();
        for (file, least) in [
            (include_str!("../dist/grafana-thinram.json"), 10),
            (include_str!("../dist/thinram-alerts.yml"), 2),
        ] {
            let used = picked(file);
            assert!(used.len() >= least, "{used:?}");
            for (name, label) in used {
                let has = |line: &str| {
                    line.starts_with(&format!("{name}{{")) && line.contains(&format!("{label}=\""))
                };
                assert!(told.lines().any(has), "{name} has no label {label}");
            }
        }
        assert_eq!(
            picked("rate(thinram_x{a=~\"b\",c=\"d\"}[1m])"),
            [("thinram_x", "a"), ("thinram_x", "c")]
        );
    }

    #[test]
    fn dashboard_and_alerts_use_what_is_told() {
        let told = names(&text());
        for (file, least) in [
            (include_str!("../dist/grafana-thinram.json"), 12),
            (include_str!("../dist/thinram-alerts.yml"), 4),
        ] {
            let used = names(file);
            assert!(used.len() >= least, "{used:?}");
            for name in used {
                assert!(told.contains(&name), "{name} is told by nobody");
            }
        }
        let dashboard: Value =
            serde_json::from_str(include_str!("../dist/grafana-thinram.json")).unwrap();
        assert!(dashboard["panels"]
            .as_array()
            .is_some_and(|panels| panels.len() >= 6));
    }
}
