// SPDX-License-Identifier: GPL-2.0

use super::*;
use crate::host::Host;
use crate::rates::PerSecond;
use crate::status::Status;
use crate::vm::{Vm, VmFigures};
use serde_json::json;

const G: u64 = 1 << 20;

fn vm(name: &str, resident_kb: u64) -> Vm {
    Vm {
        name: VmName::new(name),
        figures: VmFigures {
            size_kb: Some(4 * G),
            resident_kb: Some(resident_kb),
            ..VmFigures::default()
        },
        one_snapshot: true,
        knobs: BTreeMap::new(),
    }
}

fn overview(vms: Vec<Vm>) -> Overview {
    let guests: Vec<Value> = vms
        .iter()
        .map(|vm| {
            json!({"module_name": vm.name.shown(), "name": vm.name.shown(), "current_kb": 2 * G,
                   "target_kb": 3 * G, "pressure_percent": 50, "conduct": "settled",
                   "driver": "driver", "policy": "pressure", "min_kb": G, "max_kb": 4 * G,
                   "reason": "pressure 50%: met"})
        })
        .collect();
    let rates = PerSecond {
        faults: Some(12_345.0),
        ..PerSecond::default()
    };
    Overview {
        rates: vms.iter().map(|vm| (vm.name.shown(), rates)).collect(),
        status: Status {
            host: Host {
                state: Some("high".into()),
                ..Host::default()
            },
            vms,
        },
        daemon: Some(json!({ "guests": guests })),
        estimate: None,
    }
}

fn host() -> Option<HostSample> {
    Some(HostSample {
        total_kb: 16 * G,
        available_kb: 4 * G,
        reserved_kb: 0,
    })
}

fn press(top: &mut Top, keys: &str) {
    for c in keys.chars() {
        assert!(top.key(KeyEvent::from(KeyCode::Char(c))), "{c} ended it");
    }
}

fn order(top: &Top) -> Vec<String> {
    top.rows().into_iter().map(|row| row.name).collect()
}

#[test]
fn a_screen_of_80x24() {
    let mut top = Top::default();
    for step in 1..=200 {
        let vms = vec![
            vm("web1", step * 10_000),
            vm("a-database-with-a-long-name", G),
            vm("odd\u{1b}[31m", 7),
        ];
        top.note(Ok((overview(vms), host())));
    }
    let screen = text_of(&top, 80, 24);
    assert_eq!(screen.lines().count(), 24);
    assert!(
        screen.lines().all(|line| text_width(line) <= 80),
        "{screen}"
    );
    for part in [
        "state high  available 4.0G of 16.0G (25%)  3 VMs",
        "RESID",
        "a-database-…",
        "odd\\x1b[31m",
        "12k",
        "50%",
        "▇█",
        "web1: pressure, settled, driver driver, 1.0 GiB to 4.0 GiB",
        "why: pressure 50%: met",
        "q quit",
    ] {
        assert!(screen.contains(part), "{part}:\n{screen}");
    }
    // Small and large terminals are drawn as well.
    for (width, height) in [(20, 5), (1, 1), (200, 60)] {
        text_of(&top, width, height);
    }
    press(&mut top, "?");
    assert!(text_of(&top, 80, 24).contains("sort by RESID"));
    text_of(&top, 10, 3);
}

fn text_width(line: &str) -> usize {
    crate::text::width(line)
}

#[test]
fn sorted_by_every_column() {
    let mut top = Top::default();
    top.note(Ok((
        overview(vec![vm("b", 5), vm("a", 9), vm("c", 7)]),
        host(),
    )));
    assert_eq!(order(&top), ["a", "c", "b"]);
    press(&mut top, "R");
    assert_eq!(order(&top), ["b", "c", "a"]);
    press(&mut top, "Rn");
    assert_eq!(order(&top), ["a", "b", "c"]);
    for sort in Sort::ALL {
        press(&mut top, &sort.key().to_string());
        assert_eq!(top.sort, sort);
    }
    press(&mut top, ">");
    assert_eq!(top.sort, Sort::Name);
    press(&mut top, "<");
    assert_eq!(top.sort, Sort::Breaks);
    // What is not known comes last, and is shown as that.
    let mut unknown = vm("z", 0);
    unknown.figures.resident_kb = None;
    top.note(Ok((overview(vec![unknown, vm("a", 0)]), host())));
    press(&mut top, "r");
    assert_eq!(order(&top), ["a", "z"]);
}

#[test]
fn keys_choose_pause_and_end() {
    let mut top = Top::default();
    press(&mut top, "jk");
    top.note(Ok((
        overview(vec![vm("a", 3), vm("b", 2), vm("c", 1)]),
        host(),
    )));
    press(&mut top, "jj");
    assert!(text_of(&top, 80, 24).contains("c: pressure, settled"));
    press(&mut top, "j ");
    assert!(top.is_paused() && text_of(&top, 80, 24).contains("PAUSED"));
    // The one that was chosen ends.
    top.note(Ok((overview(vec![vm("a", 3)]), host())));
    assert!(text_of(&top, 80, 24).contains("a: pressure, settled"));
    assert!(!top.key(KeyEvent::from(KeyCode::Char('q'))));
    let stop = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert!(!top.key(stop));
}

#[test]
fn trouble_is_shown_and_goes() {
    let mut top = Top::default();
    top.note(Err("/sys/fs/thinram is missing".into()));
    assert!(text_of(&top, 80, 24).contains("is missing"));
    let mut alone = overview(vec![vm("a", 3)]);
    alone.daemon = None;
    top.note(Ok((alone, host())));
    let screen = text_of(&top, 80, 24);
    assert!(
        !screen.contains("is missing") && screen.contains("no daemon"),
        "{screen}"
    );
    assert!(screen.contains("the daemon does not size it"), "{screen}");
}
