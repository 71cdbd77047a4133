// SPDX-License-Identifier: GPL-2.0

use super::*;
use crate::config::AMR_UNIT_KB;
use crate::snapshot::{HostSample, VmSample};
use proptest::prelude::*;

const M: u64 = 1 << 10;
const G: u64 = 1 << 20;

fn config(host: &str, vms: &[&str]) -> Config {
    let mut text = format!("[host]\nslush = \"0\"\n{host}\n");
    for vm in vms {
        text.push_str(&format!("[[vm]]\n{vm}\n"));
    }
    Config::parse(&text).unwrap_or_else(|(line, message)| panic!("line {line}: {message}\n{text}"))
}

/// A guest that sees all it has, with so much committed and in use.
fn guest(name: &str, current_kb: u64, committed_kb: u64) -> VmSample {
    VmSample {
        name: name.to_owned(),
        current_kb: Some(current_kb),
        committed_kb: Some(committed_kb),
        guest_total_kb: Some(current_kb),
        guest_free_kb: Some(0),
        guest_available_kb: Some(current_kb.saturating_sub(committed_kb)),
        active_kb: Some(committed_kb.min(current_kb)),
        resident_kb: Some(current_kb),
        ..VmSample::default()
    }
}

fn snapshot(available_kb: u64, vms: &[VmSample]) -> Snapshot {
    let host = HostSample {
        total_kb: 64 * G,
        available_kb,
        ..HostSample::default()
    };
    Snapshot {
        now_s: 0.0,
        host,
        vms: vms.to_vec(),
    }
}

fn sizes(plan: &Plan) -> Vec<u64> {
    plan.targets
        .iter()
        .map(|target| target.target_kb.unwrap())
        .collect()
}

fn run(config: &Config, snapshot: &Snapshot) -> Plan {
    step(config, snapshot, &Asked::default())
}

/// What the host looks like when all targets were reached.
fn applied(snapshot: &Snapshot, plan: &Plan) -> Snapshot {
    let mut next = snapshot.clone();
    let mut available = i128::from(next.host.available_kb);
    for (vm, target) in next.vms.iter_mut().zip(&plan.targets) {
        let (Some(current), Some(size)) = (vm.current_kb, target.target_kb) else {
            continue;
        };
        available -= i128::from(size) - i128::from(current);
        vm.resident_kb = vm
            .resident_kb
            .map(|resident| (resident + size).saturating_sub(current));
        vm.current_kb = Some(size);
        vm.guest_total_kb = Some(size);
    }
    next.host.available_kb = u64::try_from(available.max(0)).unwrap();
    next
}

#[test]
fn proportional_is_the_formula() {
    let config = config(
        "",
        &[
            "name = 'a'\ndynamic_min = '1G'\ndynamic_max = '3G'",
            "name = 'b'\ndynamic_min = '1G'\ndynamic_max = '5G'",
        ],
    );
    let at = |available| {
        run(
            &config,
            &snapshot(available, &[guest("a", G, 0), guest("b", G, 0)]),
        )
    };
    // 2 GiB are held and 3 are free: half of the 6 GiB between the bounds.
    let plan = at(3 * G);
    assert_eq!(sizes(&plan), [2 * G, 3 * G]);
    assert!(
        plan.targets[0].reason.contains("50%"),
        "{}",
        plan.targets[0].reason
    );
    assert_eq!(sizes(&at(60 * G)), [3 * G, 5 * G]);
    assert_eq!(sizes(&at(0)), [G, G]);
}

#[test]
fn proportional_counts_what_is_held_and_not_what_was_promised() {
    let config = config("", &["name = 'a'\ndynamic_min = '1G'\ndynamic_max = '4G'"]);
    let mut vm = guest("a", 4 * G, 0);
    vm.resident_kb = Some(G);
    assert_eq!(sizes(&run(&config, &snapshot(G, &[vm]))), [2 * G]);
}

#[test]
fn slush_is_kept_back() {
    let config = config("", &["name = 'a'\ndynamic_min = '1G'\ndynamic_max = '4G'"]);
    let mut kept = config.clone();
    kept.host.slush_kb = 512 * M;
    let snapshot = snapshot(G, &[guest("a", G, 0)]);
    assert_eq!(sizes(&run(&config, &snapshot)), [2 * G]);
    assert_eq!(sizes(&run(&kept, &snapshot)), [2 * G - 512 * M]);
}

#[test]
fn equal_bounds_and_nobody() {
    for policy in [
        "proportional",
        "pressure",
        "entitlement",
        "shares",
        "manual",
    ] {
        let host = format!("policy = '{policy}'");
        let one = config(
            &host,
            &["name = 'a'\ndynamic_min = '1G'\ndynamic_max = '1G'"],
        );
        for available in [0, G] {
            assert_eq!(
                sizes(&run(&one, &snapshot(available, &[guest("a", G, G)]))),
                [G]
            );
        }
        assert!(run(&one, &snapshot(G, &[])).targets.is_empty());
    }
}

#[test]
fn pressure_meets_demands_and_keeps_the_rest() {
    let config = config(
        "policy = 'pressure'",
        &[
            "name = 'a'\ndynamic_min = '512M'\ndynamic_max = '4G'",
            "name = 'b'\ndynamic_min = '512M'\ndynamic_max = '4G'\nbuffer_percent = 50",
        ],
    );
    let plan = run(
        &config,
        &snapshot(20 * G, &[guest("a", G, 1000 * M), guest("b", G, 1000 * M)]),
    );
    assert_eq!(sizes(&plan), [1200 * M, 1500 * M]);
    assert!(
        plan.targets[0].reason.contains("pressure 97%"),
        "{}",
        plan.targets[0].reason
    );
    // An idle guest goes to its least, however much the host has.
    let plan = run(
        &config,
        &snapshot(20 * G, &[guest("a", G, 0), guest("b", G, 0)]),
    );
    assert_eq!(sizes(&plan), [512 * M, 512 * M]);
}

#[test]
fn pressure_shares_what_is_short_by_priority() {
    let config = config(
        "policy = 'pressure'",
        &[
            "name = 'a'\ndynamic_min = '1G'\ndynamic_max = '8G'",
            "name = 'b'\ndynamic_min = '1G'\ndynamic_max = '8G'\npriority = 2",
            "name = 'idle'\ndynamic_min = '1G'\ndynamic_max = '8G'\npriority = 100",
        ],
    );
    let guests = [
        guest("a", G, 8 * G),
        guest("b", G, 8 * G),
        guest("idle", G, 0),
    ];
    let plan = run(&config, &snapshot(3 * G, &guests));
    assert_eq!(sizes(&plan), [2 * G, 3 * G, G]);
    assert!(plan.targets[0].reason.contains("fair share at priority 1"));
    // A guest grows on its own pressure while others are idle.
    let plan = run(
        &config,
        &snapshot(3 * G, &[guest("a", G, 3 * G), guest("b", G, 0)]),
    );
    assert_eq!(sizes(&plan), [3 * G + 3 * G / 5, G]);
}

#[test]
fn entitlement_moves_chunks_to_pressure() {
    let config = config(
        "policy = 'entitlement'",
        &[
            "name = 'busy'\ndynamic_min = '1G'\ndynamic_max = '8G'\nentitlement = '2G'\namr = true",
            "name = 'idle'\ndynamic_min = '1G'\ndynamic_max = '8G'\nentitlement = '2G'\namr = true",
            "name = 'idler'\ndynamic_min = '1G'\ndynamic_max = '8G'\nentitlement = '2G'\namr = true",
            "name = 'off'\ndynamic_min = '1G'\ndynamic_max = '8G'\nentitlement = '2G'",
        ],
    );
    let guests = |busy: u64| {
        [
            guest("busy", busy, 7 * G),
            guest("idle", 4 * G, G),
            guest("idler", 4 * G, M),
            guest("off", 4 * G, 0),
        ]
    };
    // Free memory comes first.
    let plan = run(&config, &snapshot(G, &guests(2 * G)));
    assert_eq!(sizes(&plan), [2 * G + 256 * M, 4 * G, 4 * G, 4 * G]);
    // Then that of the guest with the least pressure.
    let plan = run(&config, &snapshot(100 * M, &guests(2 * G)));
    assert_eq!(
        sizes(&plan),
        [2 * G + 256 * M, 4 * G, 4 * G - 192 * M, 4 * G]
    );
    assert!(
        plan.targets[0].reason.contains("64.0 MiB from free memory"),
        "{:?}",
        plan.targets[0]
    );
    assert!(
        plan.targets[0].reason.contains("192 MiB from idler"),
        "{:?}",
        plan.targets[0]
    );
    assert!(
        plan.targets[2].reason.contains("gives 192 MiB to busy"),
        "{:?}",
        plan.targets[2]
    );
    assert!(
        plan.targets[3].reason.contains("amr is off"),
        "{:?}",
        plan.targets[3]
    );
    // Never beyond dynamic_max.
    let plan = run(&config, &snapshot(G, &guests(8 * G)));
    assert_eq!(sizes(&plan)[0], 8 * G);
}

#[test]
fn entitlement_is_a_right() {
    let config = config(
        "policy = 'entitlement'",
        &[
            "name = 'poor'\ndynamic_min = '1G'\ndynamic_max = '8G'\nentitlement = '2G'\namr = true",
            "name = 'rich'\ndynamic_min = '1G'\ndynamic_max = '8G'\nentitlement = '2G'\namr = true",
        ],
    );
    // Both are under pressure; one is below its right and takes, but not beyond it.
    let mut now = snapshot(0, &[guest("poor", G, 4 * G), guest("rich", 6 * G, 7 * G)]);
    for _ in 0..20 {
        let plan = run(&config, &now);
        now = applied(&now, &plan);
    }
    assert_eq!(sizes(&run(&config, &now)), [2 * G, 5 * G]);
    // Nobody falls below the entitlement for the host's sake.
    let mut short = config.clone();
    short.host.slush_kb = 60 * G;
    for _ in 0..100 {
        let plan = run(&short, &now);
        now = applied(&now, &plan);
    }
    assert_eq!(sizes(&run(&short, &now)), [2 * G, 2 * G]);
}

#[test]
fn shares_tax_idle_memory() {
    let vm = |name: &str, more: &str| {
        format!("name = '{name}'\ndynamic_min = '256M'\ndynamic_max = '4G'\n{more}")
    };
    let both = [vm("busy", ""), vm("idle", "")];
    let config = config("policy = 'shares'", &[&both[0], &both[1]]);
    let guests = [guest("busy", 2 * G, 4 * G), guest("idle", 2 * G, 0)];
    let mut now = snapshot(0, &guests);
    now.vms[0].active_kb = Some(4 * G);
    let plan = run(&config, &now);
    // Idle memory costs four times as much, but a balloon takes no more than 65 % of a VM.
    let least = (4 * G * 35).div_ceil(100);
    assert_eq!(sizes(&plan)[1], least);
    assert!((4 * G - least).abs_diff(sizes(&plan)[0]) < 16, "{plan:?}");
    // Without the tax both get the same.
    let mut untaxed = config.clone();
    untaxed.host.idle_tax_percent = 0;
    let same = sizes(&run(&untaxed, &now));
    assert!(
        same[0].abs_diff(2 * G) < 16 && same[1].abs_diff(2 * G) < 16,
        "{same:?}"
    );
    // With enough for all nobody is ballooned.
    now.host.available_kb = 60 * G;
    assert_eq!(sizes(&run(&config, &now)), [4 * G, 4 * G]);
}

#[test]
fn shares_weigh() {
    let vm = |name: &str, shares: u64| {
        format!("name = '{name}'\ndynamic_min = '256M'\ndynamic_max = '8G'\nshares = {shares}")
    };
    let both = |shares: u64| config("policy = 'shares'", &[&vm("a", shares), &vm("b", 2000)]);
    let mut now = snapshot(0, &[guest("a", 5 * G, 0), guest("b", 5 * G, 0)]);
    for vm in &mut now.vms {
        vm.active_kb = Some(8 * G);
    }
    let check = |shares: u64, want: [u64; 2]| {
        let got = sizes(&run(&both(shares), &now));
        assert!(
            got[0].abs_diff(want[0]) < 16 && got[1].abs_diff(want[1]) < 16,
            "{got:?}"
        );
    };
    check(3000, [6 * G, 4 * G]);
    check(2000, [5 * G, 5 * G]);
    // The most that a guest may have, and the least that a balloon leaves it.
    check(
        100_000,
        [
            10 * G - (8 * G * 35).div_ceil(100),
            (8 * G * 35).div_ceil(100),
        ],
    );
}

#[test]
fn manual_keeps_what_was_asked() {
    let config = config(
        "policy = 'manual'",
        &[
            "name = 'a'\ndynamic_min = '1G'\ndynamic_max = '4G'",
            "name = 'b'\ndynamic_min = '1G'\ndynamic_max = '4G'\nstart_target = '3G'",
            "name = 'c'\ndynamic_min = '1G'\ndynamic_max = '4G'",
        ],
    );
    let now = snapshot(
        G,
        &[
            guest("a", 2 * G, 0),
            guest("b", 2 * G, 0),
            guest("c", 2 * G, 0),
        ],
    );
    let mut asked = Asked::default();
    asked.sizes.insert("c".into(), 9 * G);
    let plan = step(&config, &now, &asked);
    assert_eq!(sizes(&plan), [2 * G, 3 * G, 4 * G]);
    assert!(
        plan.targets[2].reason.contains("within its bounds"),
        "{:?}",
        plan.targets[2]
    );
}

#[test]
fn policies_side_by_side_share_what_is_free() {
    let config = config(
        "policy = 'proportional'",
        &[
            "name = 'a'\ndynamic_min = '1G'\ndynamic_max = '3G'",
            "name = 'b'\ndynamic_min = '1G'\ndynamic_max = '3G'\npolicy = 'pressure'",
            "name = 'm'\ndynamic_min = '1G'\ndynamic_max = '3G'\npolicy = 'manual'\nstart_target = '2G'",
        ],
    );
    let now = snapshot(
        3 * G,
        &[guest("a", G, 0), guest("b", G, 9 * G), guest("m", G, 0)],
    );
    assert_eq!(sizes(&run(&config, &now)), [2 * G, 2 * G, 2 * G]);
}

#[test]
fn the_modules_reservation_and_limit_bound_every_policy() {
    for policy in PolicyKind::ALL {
        let host = format!("policy = '{}'", policy.name());
        let both = "dynamic_min = '1G'\ndynamic_max = '8G'\namr = true\nentitlement = '2G'";
        let config = config(
            &host,
            &[
                &format!("name = 'a'\n{both}"),
                &format!("name = 'b'\n{both}"),
            ],
        );
        let mut reserved = guest("a", 4 * G, 0);
        reserved.reservation_kb = Some(3 * G);
        let mut limited = guest("b", 4 * G, 8 * G);
        limited.limit_kb = Some(3 * G);
        let got = sizes(&run(
            &config,
            &snapshot(0, &[reserved.clone(), limited.clone()]),
        ));
        assert!(got[0] >= 3 * G && got[1] <= 3 * G, "{policy:?} {got:?}");
        // 0 is no limit, and bounds of the configuration hold whatever the module has.
        limited.limit_kb = Some(0);
        reserved.reservation_kb = Some(64 * G);
        let got = sizes(&run(&config, &snapshot(64 * G, &[reserved, limited])));
        assert!(got[0] <= 8 * G && got[1] >= 3 * G, "{policy:?} {got:?}");
    }
}

#[test]
fn cap_bounds_every_policy() {
    for policy in ["proportional", "pressure", "shares", "manual"] {
        let config = config(
            &format!("policy = '{policy}'"),
            &["name = 'a'\ndynamic_min = '1G'\ndynamic_max = '4G'\ncap = '2G'\nstart_target = '3G'"],
        );
        assert_eq!(
            sizes(&run(&config, &snapshot(9 * G, &[guest("a", G, 9 * G)]))),
            [2 * G],
            "{policy}"
        );
    }
}

#[test]
fn what_is_not_ready_is_said_and_left_alone() {
    let config = config(
        "",
        &[
            "name = 'a'\ndynamic_min = '1G'\ndynamic_max = '3G'",
            "name = 'b'\ndynamic_min = '1G'\ndynamic_max = '3G'",
            "name = 'gone'\ndynamic_min = '1G'\ndynamic_max = '3G'",
        ],
    );
    let mut unready = guest("b", 2 * G, 0);
    unready.resident_kb = None;
    let mut unknown = guest("c", 2 * G, 0);
    unknown.current_kb = None;
    let plan = run(&config, &snapshot(G, &[guest("a", G, 0), unready, unknown]));
    let said: Vec<(Option<u64>, bool, &str)> = plan
        .targets
        .iter()
        .map(|t| (t.target_kb, t.ready, t.reason.as_str()))
        .collect();
    assert_eq!(said[0].0, Some(2 * G));
    assert_eq!(
        said[1],
        (Some(2 * G), false, "not ready: no resident_kb; left alone")
    );
    assert_eq!(said[2], (None, false, "not configured: left alone"));
}

#[test]
fn admission_counts_minima_and_overheads() {
    let mut config = config(
        "",
        &[
            "name = 'a'\ndynamic_min = '32G'\ndynamic_max = '32G'",
            "name = 'b'\ndynamic_min = '32G'\ndynamic_max = '32G'",
        ],
    );
    let both = snapshot(0, &[guest("a", 32 * G, 0), guest("b", 32 * G, 0)]);
    assert!(run(&config, &both).admission_ok);
    config.host.vm_overhead_kb = 1;
    assert!(!run(&config, &both).admission_ok);
    assert!(run(&config, &snapshot(0, &[guest("a", 32 * G, 0)])).admission_ok);
}

const ALL: &[&str] = &[
    "proportional",
    "pressure",
    "entitlement",
    "shares",
    "manual",
];

/// Any host with a handful of guests, all of one of these policies.
fn any_host(policies: &'static [&'static str]) -> impl Strategy<Value = (Config, Snapshot)> {
    let policy = prop::sample::select(policies);
    let vm = (
        (1..4 * G, 0..8 * G, 0..2 * G, 0..100u64),
        (0..12 * G, 0..20 * G, 0..12 * G, 0..12 * G),
        (1..10_000u64, 0..200u64, 1..50u64, any::<bool>(), 1..6u64),
    );
    (
        policy,
        0..64 * G,
        0..G,
        0..100u64,
        prop::collection::vec(vm, 0..6),
    )
        .prop_map(|(policy, available, slush, tax, vms)| {
            let mut text = format!(
                "[host]\npolicy = '{policy}'\nslush = '{slush}K'\nidle_tax_percent = {}\n",
                tax.min(99)
            );
            let mut samples = Vec::new();
            for (nth, (bounds, figures, knobs)) in vms.into_iter().enumerate() {
                let (min, spread, above, right) = bounds;
                let (current, committed, active, resident) = figures;
                let (shares, buffer, priority, amr, chunks) = knobs;
                let max = min + spread;
                let entitlement = min + spread * right / 100;
                text.push_str(&format!(
                    "[[vm]]\nname = 'vm{nth}'\ndynamic_min = '{min}K'\ndynamic_max = '{max}K'\n\
                     static_max = '{}K'\nentitlement = '{entitlement}K'\namr = {amr}\n\
                     chunk = '{}K'\nshares = {shares}\nbuffer_percent = {buffer}\n\
                     priority = {priority}\n",
                    max + above,
                    chunks * AMR_UNIT_KB,
                ));
                let mut sample = guest(&format!("vm{nth}"), current, committed);
                sample.active_kb = Some(active);
                sample.resident_kb = Some(resident);
                samples.push(sample);
            }
            (Config::parse(&text).unwrap(), snapshot(available, &samples))
        })
}

proptest! {
    #[test]
    fn bounds_are_kept((config, now) in any_host(ALL)) {
        let plan = run(&config, &now);
        prop_assert_eq!(plan.targets.len(), now.vms.len());
        for target in &plan.targets {
            let vm = config.vm(&target.name).unwrap();
            let size = target.target_kb.unwrap();
            prop_assert!(size >= vm.dynamic_min_kb && size <= vm.ceiling_kb(), "{:?}", target);
            prop_assert!(target.ready && !target.reason.is_empty());
        }
    }

    #[test]
    fn no_more_is_given_than_there_is((config, now) in any_host(&["proportional", "pressure"])) {
        let plan = run(&config, &now);
        let given: u128 = sizes(&plan).iter().map(|kb| u128::from(*kb)).sum();
        let floors: u128 = config.vms.iter().map(|vm| u128::from(vm.dynamic_min_kb)).sum();
        let held: u128 = now.vms.iter().map(|vm| u128::from(vm.resident_kb.unwrap())).sum();
        let pool = (held + u128::from(now.host.available_kb)).saturating_sub(config.host.slush_kb.into());
        prop_assert!(given <= pool.max(floors), "{} {} {}", given, pool, floors);
    }

    #[test]
    fn shares_give_no_more_than_there_is((config, now) in any_host(&["shares"])) {
        let plan = run(&config, &now);
        let given: u128 = sizes(&plan).iter().map(|kb| u128::from(*kb)).sum();
        let held: u128 = now.vms.iter().map(|vm| u128::from(vm.resident_kb.unwrap())).sum();
        let pool = (held + u128::from(now.host.available_kb)).saturating_sub(config.host.slush_kb.into());
        let least: u128 = config.vms.iter().map(|vm| {
            let unballooned = (u128::from(vm.static_max_kb) * 35).div_ceil(100);
            u128::from(vm.dynamic_min_kb).max(unballooned).min(vm.dynamic_max_kb.into())
        }).sum();
        prop_assert!(given <= pool.max(least));
    }

    #[test]
    fn entitlement_takes_nothing_out_of_thin_air((config, now) in any_host(&["entitlement"])) {
        // Within bounds to start with: bringing a guest within them is not the policy's choice.
        let mut now = now;
        for sample in &mut now.vms {
            let vm = config.vm(&sample.name).unwrap();
            let aligned = sample.current_kb.unwrap() / AMR_UNIT_KB * AMR_UNIT_KB;
            let least = vm.dynamic_min_kb.div_ceil(AMR_UNIT_KB) * AMR_UNIT_KB;
            let most = vm.dynamic_max_kb / AMR_UNIT_KB * AMR_UNIT_KB;
            sample.current_kb = Some(if least <= most { aligned.clamp(least, most) } else { vm.dynamic_min_kb });
        }
        let plan = run(&config, &now);
        let mut grown: i128 = 0;
        for (sample, target) in now.vms.iter().zip(&plan.targets) {
            let vm = config.vm(&sample.name).unwrap();
            let (current, size) = (sample.current_kb.unwrap(), target.target_kb.unwrap());
            grown += i128::from(size) - i128::from(current);
            prop_assert!(size <= current + vm.chunk_kb + AMR_UNIT_KB, "{:?}", target);
            let takes_part = !target.reason.contains("stays") || target.reason.contains("pressure");
            if takes_part {
                prop_assert_eq!(size % AMR_UNIT_KB, 0, "{:?}", target);
                prop_assert!(size >= current.min(vm.entitlement_kb.unwrap()), "{:?}", target);
            }
        }
        let free = i128::from(now.host.available_kb) - i128::from(config.host.slush_kb);
        let rounding = i128::from(AMR_UNIT_KB) * plan.targets.len() as i128;
        prop_assert!(grown <= free.max(0) + rounding, "{} {}", grown, free);
    }

    #[test]
    fn more_memory_takes_nothing_from_anyone((config, now) in any_host(&["proportional", "pressure", "shares", "manual"]), more in 0..32 * G) {
        let before = sizes(&run(&config, &now));
        let mut richer = now;
        richer.host.available_kb += more;
        for (less, more) in before.iter().zip(sizes(&run(&config, &richer))) {
            prop_assert!(*less <= more, "{} {}", less, more);
        }
    }

    #[test]
    fn sizes_settle((config, now) in any_host(ALL)) {
        let mut now = now;
        // What a guest holds follows what it is given.
        for sample in &mut now.vms {
            sample.resident_kb = sample.current_kb;
        }
        let mut last = Vec::new();
        let mut steps = 0;
        loop {
            let plan = run(&config, &now);
            let got = sizes(&plan);
            now = applied(&now, &plan);
            if got == last {
                break;
            }
            last = got;
            steps += 1;
            prop_assert!(steps < 2000, "no end: {:?}", plan);
        }
        prop_assert_eq!(sizes(&run(&config, &now)), last);
    }
}
