// SPDX-License-Identifier: GPL-2.0

//! What the daemon is told while it runs: VMs, and admission.

use crate::world::{size, World, CONFIG, M};
use serde_json::Value;
use std::fs;
use std::time::{Duration, Instant};

fn names(world: &World) -> Vec<String> {
    let report = world.guests_json();
    let guests = report["guests"].as_array().cloned().unwrap_or_default();
    guests
        .iter()
        .map(|guest| guest["name"].as_str().unwrap().to_owned())
        .collect()
}

fn setting(world: &World, vm: usize, key: &str) -> Value {
    world.guests_json()["guests"][vm][key].clone()
}

#[test]
fn vms_are_added_changed_and_removed() {
    let mut world = World::new(4096 * M);
    let a = world.guest("a", 1024 * M, 64 * M);
    let b = world.guest("b", 1024 * M, 64 * M);
    let only_a: Vec<&str> = CONFIG.split("[[vm]]").take(2).collect();
    world.config(&only_a.join("[[vm]]"));
    let daemon = world.daemon(&[], None);
    world.run_until("a shrinks", |_| size(&a) == 512 * M);
    assert_eq!(size(&b), 1024 * M);
    // It is found, and left alone.
    assert_eq!(world.guests_json()["found"][0]["name"], "b");

    let qmp = format!("qmp={}", world.socket("b").display());
    let add = ["vm", "add", "b", "dynamic_min=600M", "dynamic_max=2G", &qmp];
    let (code, said, complaint) = world.ctl(&add);
    assert_eq!(
        (code, said.as_str()),
        (Some(0), "b is sized from now on\n"),
        "{complaint}"
    );
    world.run_until("b shrinks", |_| size(&b) == 600 * M);
    let (code, _, complaint) = world.ctl(&add);
    assert!(
        code == Some(1) && complaint.contains("there already"),
        "{complaint}"
    );
    for (args, code, said) in [
        (&["vm", "add", "c"][..], 2, "required"),
        (&["vm", "add", "c", "dynamic_min"], 2, "SETTING=VALUE"),
        (
            &["vm", "add", "c", "dynamic_min=1G"],
            2,
            "dynamic_max is missing",
        ),
        (
            &["vm", "add", "c", "dynamicmin=1G"],
            2,
            "do you mean dynamic_min",
        ),
        (
            &["vm", "add", "c", "dynamic_min=1G", "dynamic_min=2G"],
            2,
            "given twice",
        ),
        (
            &["vm", "set", "c", "priority", "2"],
            1,
            "no VM named c is configured",
        ),
        (
            &["vm", "set", "b", "dynamic_min", "4G"],
            1,
            "is above dynamic_max",
        ),
        (&["vm", "set", "b", "dynamic_min", "1"], 1, "has no unit"),
        (&["vm", "set", "b", "policy", "fair"], 1, "unknown variant"),
        (&["vm", "set", "b", "qmp", "b.qmp"], 1, "no absolute path"),
        (&["vm", "remove", "c"], 1, "no VM named c"),
    ] {
        let (got, _, complaint) = world.ctl(args);
        assert!(
            got == Some(code) && complaint.contains(said),
            "{args:?}: {got:?} {complaint}"
        );
    }
    assert_eq!(
        world.ctl(&["vm", "set", "b", "dynamic_min", "700M"]).0,
        Some(0)
    );
    world.run_until("b grows to its minimum", |_| size(&b) == 700 * M);

    // Weights are the module's and the daemon's; bad ones change neither.
    assert_eq!(world.ctl(&["vm", "set", "b", "shares", "0"]).0, Some(1));
    assert_eq!(world.tree.read("vms/b/shares"), "1000\n");
    assert_eq!(world.ctl(&["vm", "set", "b", "shares", "2000"]).0, Some(0));
    assert_eq!(world.tree.read("vms/b/shares"), "2000\n");

    // All of it outlives a reload and the daemon.
    assert_eq!(world.ctl(&["vm", "remove", "a"]).0, Some(0));
    assert_eq!(world.ctl(&["balloon", "b", "900M"]).0, Some(0));
    daemon.signal(rustix::process::Signal::HUP);
    world.run_until("b has what it shall have", |_| size(&b) == 900 * M);
    assert_eq!(names(&world), ["b"]);
    drop(daemon);
    let daemon = world.daemon(&[], None);
    world.run_until("the next daemon", |world| names(world) == ["b"]);
    assert_eq!(setting(&world, 0, "min_kb"), 700 * M);
    assert_eq!(setting(&world, 0, "by_hand"), true);
    assert_eq!(world.ctl(&["vm", "remove", "b"]).0, Some(0));
    assert_eq!(names(&world), [""; 0]);
    drop(daemon);
    let (code, _, complaint) = world.ctl(&["vm", "set", "b", "priority", "2"]);
    assert!(
        code == Some(1) && complaint.contains("the daemon does not run"),
        "{complaint}"
    );
}

#[test]
fn a_right_to_memory_that_is_not_there_is_refused() {
    let mut world = World::new(2048 * M);
    let _a = world.guest("a", 1024 * M, 1000 * M);
    let _b = world.guest("b", 1000 * M, 1000 * M);
    let config = CONFIG.replace(
        "dynamic_min = \"512M\"",
        "dynamic_min = \"512M\"\namr = true\nentitlement = \"896M\"",
    );
    world.config(&config.replace("\"pressure\"", "\"entitlement\""));
    let daemon = world.daemon(&[], None);
    world.run_until("both are seen", |world| {
        let report = world.guests_json();
        (0..2).all(|vm| !report["guests"][vm]["conduct"].is_null())
    });
    let (code, _, complaint) = world.ctl(&["vm", "set", "a", "entitlement", "2G"]);
    assert!(
        code == Some(1) && complaint.contains("the other VMs have rights to"),
        "{complaint}"
    );
    let (code, _, complaint) = world.ctl(&["vm", "set", "a", "entitlement", "1200M"]);
    assert!(code == Some(1), "{complaint}");
    assert_eq!(setting(&world, 0, "entitlement_kb"), 896 * M);
    let (code, _, complaint) = world.ctl(&["vm", "set", "a", "entitlement", "1G"]);
    assert_eq!(code, Some(0), "{complaint}");
    // The file is held to the same.
    world.config(&config.replacen("\"896M\"", "\"1200M\"", 1));
    daemon.signal(rustix::process::Signal::HUP);
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(setting(&world, 0, "entitlement_kb"), 1024 * M);
    daemon.signal(rustix::process::Signal::TERM);
    let (_, said) = daemon.wait();
    assert!(said.contains("the old configuration is kept"), "{said}");
}

#[test]
fn admission_waits_until_the_guests_made_room() {
    let mut world = World::new(4096 * M);
    // Both would like all they have; their minima leave room.
    let a = world.guest("a", 2000 * M, 1990 * M);
    let b = world.guest("b", 2000 * M, 1990 * M);
    world.config(CONFIG);
    let daemon = world.daemon(&[], None);
    world.run_until("both are seen", |world| {
        let report = world.guests_json();
        (0..2).all(|vm| !report["guests"][vm]["conduct"].is_null())
    });
    let (code, out, complaint) = world.ctl(&["admit", "--min", "4G", "--max", "5G"]);
    assert_eq!((code, out.as_str()), (Some(3), ""));
    assert!(
        complaint.contains("refused: the minima do not fit"),
        "{complaint}"
    );
    let now = ["admit", "--min", "1G", "--max", "4G", "--vm", "c"];
    let (code, _, complaint) = world.ctl(&now);
    assert!(
        code == Some(3) && complaint.contains("not enough is free now"),
        "{complaint}"
    );

    let root = world.tree.root().to_owned();
    let asked = std::thread::spawn(move || {
        let output = assert_cmd::Command::new(env!("CARGO_BIN_EXE_thinramctl"))
            .arg("--root")
            .arg(root)
            .args(["admit", "--min", "1G", "--max", "4G", "--vm", "c"])
            .args(["--wait", "600s", "--json"])
            .output()
            .unwrap();
        (output.status.code(), serde_json::from_slice(&output.stdout))
    });
    world.run_until("it is admitted", |_| asked.is_finished());
    let (code, answer) = asked.join().unwrap();
    let answer: Value = answer.unwrap();
    assert_eq!(code, Some(0), "{answer}");
    assert_eq!(
        (&answer["admitted"], &answer["reserved"]),
        (&Value::Bool(true), &Value::Bool(true))
    );
    // It stays kept: the guests do not grow into it, and nobody else gets it.
    let held = Instant::now() + Duration::from_secs(4);
    while Instant::now() < held {
        world.run_until("a moment", |_| true);
        world.step();
        std::thread::sleep(Duration::from_millis(100));
        assert!(size(&a) + size(&b) <= 3072 * M, "{} {}", size(&a), size(&b));
    }
    let (code, _, _) = world.ctl(&["admit", "--min", "512M", "--vm", "d"]);
    assert_eq!(code, Some(3));
    let report = world.guests_json();
    assert_eq!(report["reservations"][0]["name"], "c");
    assert_eq!(report["host"]["reserved_kb"], 1024 * M);
    assert_eq!(world.ctl(&["admit", "--cancel", "--vm", "c"]).0, Some(0));
    assert_eq!(world.ctl(&["admit", "--cancel", "--vm", "c"]).0, Some(1));
    world.run_until("the guests take it back", |_| {
        size(&a) + size(&b) > 3500 * M
    });
    drop(daemon);
}

#[test]
fn admission_without_a_daemon_and_by_risk() {
    let mut world = World::new(4096 * M);
    let _a = world.guest("a", 1024 * M, 0);
    let (code, out, _) = world.ctl(&["admit", "--min", "1G", "--max", "4G"]);
    assert_eq!(code, Some(0));
    assert!(out.contains("nothing is kept for it"), "{out}");
    world.tree.write("saved_kb", "2500000\n");
    assert_eq!(
        world
            .ctl(&["admit", "--min", "1G", "--unshare-risk", "100%"])
            .0,
        Some(0)
    );
    let (code, _, complaint) = world.ctl(&["admit", "--min", "1G", "--unshare-risk", "0"]);
    assert!(
        code == Some(3) && complaint.contains("if all sharing broke"),
        "{complaint}"
    );
    // As configured where it is not said.
    world.config(&CONFIG.replace("slush = \"0\"", "unshare_risk = 0"));
    assert_eq!(world.ctl(&["admit", "--min", "1G"]).0, Some(3));
    for args in [
        &["--min", "1G", "--max", "512M"][..],
        &["--min", "1"],
        &["--min", "1G", "--wait", "601s"],
        &["--min", "1G", "--unshare-risk", "101"],
        &["--max", "1G"],
        &["--min", "1G", "--cancel"],
    ] {
        let all: Vec<&str> = ["admit"].iter().chain(args).copied().collect();
        assert_eq!(world.ctl(&all).0, Some(2), "{args:?}");
    }
    let asked = [
        "admit",
        "--min",
        "256M",
        "--max",
        "64G",
        "--unshare-risk",
        "100",
        "--json",
    ];
    let (code, told, complaint) = world.ctl(&asked);
    assert_eq!(code, Some(0), "{complaint}");
    let told: Value = serde_json::from_str(&told).unwrap();
    let room_kb = told["room_kb"].as_u64().unwrap();
    assert!((256 * M..64 << 20).contains(&room_kb), "{told}");
    assert!(
        told["reason"]
            .as_str()
            .unwrap()
            .contains("of its maximum of 64.0 GiB"),
        "{told}"
    );
    fs::remove_dir_all(world.tree.root().join("sys")).unwrap();
    let (code, _, complaint) = world.ctl(&["admit", "--min", "1G"]);
    assert!(
        code == Some(1) && complaint.contains("is the module loaded?"),
        "{complaint}"
    );
}

#[test]
fn recorded_replayed_and_told_as_metrics() {
    let mut world = World::new(4096 * M);
    let a = world.guest("a", 1024 * M, 64 * M);
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let (code, _, complaint) = world.ctl(&["record", "-"]);
    assert!(
        code == Some(1) && complaint.contains("the daemon does not run"),
        "{complaint}"
    );
    world.config(&CONFIG.replace("slush", &format!("metrics_port = {port}\nslush")));
    let daemon = world.daemon(&[], None);
    world.run_until("a shrinks", |_| size(&a) == 512 * M);

    let trace = world.tree.root().join("trace");
    let trace = trace.to_str().unwrap();
    let record = ["record", trace, "--interval", "0.2", "--for", "1s"];
    assert_eq!(world.ctl(&record).0, Some(0));
    let (code, _, complaint) = world.ctl(&record);
    assert!(
        code == Some(1) && complaint.contains("cannot make"),
        "{complaint}"
    );
    let (code, out, _) = world.ctl(&["replay", trace, "--policy", "proportional", "--json"]);
    let replay: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(code, Some(0));
    assert!(replay["steps"].as_array().unwrap().len() >= 3);
    // Alone on the host it would get all that it may have.
    assert_eq!(replay["vms"][0]["mean_kb"], 2048 * M);
    let (_, shown, _) = world.ctl(&["replay", trace]);
    assert!(shown.contains("512M"), "{shown}");
    assert_eq!(world.ctl(&["replay", trace, "--policy", "fair"]).0, Some(2));
    assert_eq!(world.ctl(&["replay", "/nowhere"]).0, Some(1));

    world.run_until("the daemon has seen it", |world| {
        world.guests_json()["guests"][0]["current_kb"] == 512 * M
    });
    std::thread::sleep(Duration::from_millis(1500));
    let (_, text, _) = world.ctl(&["metrics"]);
    assert!(
        text.contains("thinram_guest_current_bytes{vm=\"a\"} 536870912"),
        "{text}"
    );
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    std::io::Write::write_all(&mut stream, b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut told = String::new();
    std::io::Read::read_to_string(&mut stream, &mut told).unwrap();
    assert!(
        told.contains("thinram_guest_current_bytes{vm=\"a\"} 536870912"),
        "{told}"
    );
    world.config(CONFIG);
    daemon.signal(rustix::process::Signal::HUP);
    world.run_until("no port any more", |_| {
        std::net::TcpStream::connect(("127.0.0.1", port)).is_err()
    });
}
