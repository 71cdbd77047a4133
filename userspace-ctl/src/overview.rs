// SPDX-License-Identifier: GPL-2.0

//! What `status` shows: the module's view of host and VMs, the daemon's view of the guests where one
//! runs, and how often things happen.

use crate::estimate::Estimate;
use crate::guests::{render_guests, render_rates, RateRow};
use crate::rates::{PerSecond, Rates};
use crate::status::Status;
use crate::text::paragraph;
use crate::units::long_kb;
use crate::vm::{Vm, VmName};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::SystemTime;

/// Everything at one time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Overview {
    /// The module's view.
    #[serde(flatten)]
    pub status: Status,
    /// The daemon's report, as it came; `None` where none runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub daemon: Option<Value>,
    /// What sharing would save, as it was last estimated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimate: Option<Estimate>,
    /// Rates by VM, where two looks were taken.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rates: BTreeMap<String, PerSecond>,
}

/// The rates of all VMs over several looks.
#[derive(Debug, Clone, Default)]
pub struct Watch {
    rates: BTreeMap<VmName, Rates>,
}

impl Watch {
    /// Takes in one look; the rates since earlier ones, by the VMs' shown names.
    pub fn note(&mut self, now_s: f64, vms: &[Vm]) -> BTreeMap<String, PerSecond> {
        self.rates
            .retain(|name, _| vms.iter().any(|vm| vm.name == *name));
        let mut rates = BTreeMap::new();
        for vm in vms {
            let looks = self.rates.entry(vm.name.clone()).or_default();
            looks.note(now_s, &vm.figures);
            rates.insert(vm.name.shown(), looks.per_second());
        }
        rates
    }
}

impl Overview {
    /// The whole screen, no line wider than `width`.
    pub fn render(&self, width: usize) -> String {
        let mut out = self.status.render(width);
        let opening = self.opening();
        if !opening.is_empty() {
            out.push_str(&paragraph(&opening, 2, width));
        }
        let rates = self.rate_rows();
        if !rates.is_empty() {
            out.push('\n');
            out.push_str(&render_rates(&rates, width));
        }
        out.push('\n');
        match &self.daemon {
            Some(report) => out.push_str(&render_guests(report, width)),
            None => {
                let none = "No daemon runs (thinramctl daemon): no balloon is moved, and what the \
                            guests say is not known.";
                out.push_str(&paragraph(none, 2, width));
            }
        }
        out
    }

    /// What opening the domains of VMs that share with themselves only would save.
    fn opening(&self) -> String {
        let alone: Vec<String> = self
            .status
            .vms
            .iter()
            .filter(|vm| vm.is_alone())
            .map(|vm| vm.name.shown())
            .collect();
        if alone.is_empty() {
            return String::new();
        }
        let Some(estimate) = &self.estimate else {
            return "thinramctl estimate says what that would save.".to_owned();
        };
        let known: Vec<String> = alone
            .iter()
            .filter_map(|name| Some(format!("{} in {name}", long_kb(estimate.opening_kb(name)?))))
            .take(5)
            .collect();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let age_s = now.map_or(0, |now| now.as_secs().saturating_sub(estimate.at_s));
        let age = match age_s {
            0..120 => format!("{age_s} s"),
            120..7200 => format!("{} min", age_s / 60),
            _ => format!("{} h", age_s / 3600),
        };
        match known.as_slice() {
            [] => "thinramctl estimate says what that would save.".to_owned(),
            known => format!(
                "One domain with all others would save {} (estimate of {age} ago).",
                known.join(", ")
            ),
        }
    }

    fn rate_rows(&self) -> Vec<RateRow> {
        let own = self.rates.iter();
        let told = self.daemon.as_ref().map(RateRow::of_report);
        let told = told.unwrap_or_default();
        let own = own.map(|(name, rates)| RateRow::new(name.clone(), rates));
        let own: Vec<RateRow> = own.filter(RateRow::is_known).collect();
        if own.is_empty() {
            told
        } else {
            own
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Host;
    use crate::vm::VmFigures;
    use serde_json::json;

    fn vm(name: &str, faults: u64) -> Vm {
        Vm {
            name: VmName::new(name),
            figures: VmFigures {
                faults: Some(faults),
                ..VmFigures::default()
            },
            one_snapshot: true,
            knobs: BTreeMap::new(),
        }
    }

    #[test]
    fn rates_come_with_the_second_look() {
        let mut watch = Watch::default();
        let rates = watch.note(0.0, &[vm("a", 10)]);
        let overview = |rates, daemon| Overview {
            status: Status {
                host: Host::default(),
                vms: vec![vm("a", 10)],
            },
            daemon,
            estimate: None,
            rates,
        };
        let shown = overview(rates, None).render(80);
        assert!(shown.contains("No daemon runs") && !shown.contains("faults/s"));
        let rates = watch.note(2.0, &[vm("a", 50), vm("b", 1)]);
        assert!(overview(rates, None).render(80).contains("faults/s"));
        // The daemon's, where there are none of one's own.
        let report = json!({"guests": [{"name": "a", "rates": {"faults": 7.0}}]});
        let shown = overview(BTreeMap::new(), Some(report)).render(80);
        assert!(
            shown.contains("faults/s") && !shown.contains("No daemon"),
            "{shown}"
        );
        assert!(watch.note(3.0, &[]).is_empty());
    }
}
