// SPDX-License-Identifier: GPL-2.0

//! The daemon as it is run.

use crate::world::{size, World, CONFIG, M, PATIENCE};
use serde_json::Value;
use std::fs;
use std::io::Write;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::thread;
use std::time::{Duration, Instant};

#[test]
fn memory_goes_to_where_pressure_is() {
    let mut world = World::new(2048 * M);
    let idle = world.guest("a", 1024 * M, 64 * M);
    let busy = world.guest("b", 1024 * M, 1000 * M);
    world.config(CONFIG);
    let notify = world.tree.root().join("notify");
    let told = UnixDatagram::bind(&notify).unwrap();
    told.set_read_timeout(Some(PATIENCE)).unwrap();
    let daemon = world.daemon(&[], Some(&notify));
    let mut message = [0; 4096];
    let len = told.recv(&mut message).unwrap();
    assert!(String::from_utf8_lossy(&message[..len]).contains("READY=1"));

    world.run_until("b gets its demand", |_| {
        size(&busy) >= 1180 * M && size(&idle) < 800 * M
    });
    assert!(world.worst_kb >= 0, "{}", world.worst_kb);
    let report = world.guests_json();
    assert_eq!(report["guests"][1]["driver"], "driver");
    assert_eq!(report["guests"][1]["policy"], "pressure");
    assert_eq!(report["guests"][1]["error"], Value::Null);
    world.run_until("the daemon has seen it", |world| {
        world.guests_json()["guests"][1]["tally"]["added_kb"].as_u64() > Some(100 * M)
    });
    let (code, shown, _) = world.ctl(&["guests"]);
    assert!(code == Some(0) && shown.contains("driver"), "{shown}");
    let (code, said, _) = world.ctl(&["explain", "b"]);
    assert!(code == Some(0) && said.contains("demand"), "{said}");

    // By hand, within bounds, and back.
    let (code, _, complaint) = world.ctl(&["balloon", "b", "4G"]);
    assert_eq!(code, Some(1));
    assert!(
        complaint.contains("4G is not within 512M and 2G, the bounds of VM b"),
        "{complaint}"
    );
    assert_eq!(world.ctl(&["balloon", "b", "900"]).0, Some(2));
    assert_eq!(world.ctl(&["balloon", "b", "much"]).0, Some(2));
    assert_eq!(world.ctl(&["balloon", "zz", "1G"]).0, Some(1));
    let (code, said, _) = world.ctl(&["balloon", "b", "700M"]);
    assert_eq!(
        (code, said.as_str()),
        (Some(0), "b shall have 700M and keeps it\n")
    );
    world.run_until("b has what it was given by hand", |_| {
        size(&busy) == 700 * M
    });
    assert_eq!(world.guests_json()["guests"][1]["by_hand"], true);
    assert_eq!(world.ctl(&["release", "b"]).0, Some(0));
    world.run_until("b grows again", |_| size(&busy) >= 1150 * M);

    // A broken configuration is refused, a good one taken.
    world.config("[host]\npolcy = 1\n");
    daemon.signal(rustix::process::Signal::HUP);
    thread::sleep(Duration::from_millis(1500));
    assert_eq!(world.guests_json()["policy"], "pressure");
    world.config(&CONFIG.replace("\"pressure\"", "\"proportional\""));
    daemon.signal(rustix::process::Signal::HUP);
    world.run_until("the new policy", |world| {
        world.guests_json()["policy"] == "proportional"
    });
    world.run_until("equal guests", |_| {
        size(&busy).abs_diff(size(&idle)) < 64 * M
    });
    assert!(world.worst_kb >= 0, "{}", world.worst_kb);

    // One daemon is enough.
    let (code, said) = world.daemon(&[], None).wait();
    assert!(
        code == Some(1) && said.contains("another daemon answers"),
        "{said}"
    );
    daemon.signal(rustix::process::Signal::TERM);
    let (code, said) = daemon.wait();
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("unknown field `polcy`") && said.contains("old configuration is kept"),
        "{said}"
    );
    let (code, _, complaint) = world.ctl(&["guests"]);
    assert!(
        code == Some(1) && complaint.contains("the daemon does not run"),
        "{complaint}"
    );
}

#[test]
fn what_hangs_or_lies_holds_up_nobody_else() {
    let mut world = World::new(4096 * M);
    let good = world.guest("a", 1024 * M, 64 * M);
    let hangs = UnixListener::bind(world.socket("hangs")).unwrap();
    thread::spawn(move || {
        let mut held = Vec::new();
        for stream in hangs.incoming() {
            held.push(stream.unwrap());
        }
    });
    let other = UnixListener::bind(world.socket("other")).unwrap();
    thread::spawn(move || {
        for stream in other.incoming() {
            let _ = stream.unwrap().write_all(b"220 smtp ready\r\n");
        }
    });
    let mut config = CONFIG
        .split("[[vm]]")
        .take(2)
        .collect::<Vec<_>>()
        .join("[[vm]]");
    for vm in ["hangs", "other", "missing"] {
        config.push_str(&format!(
            "[[vm]]\nname = \"{vm}\"\nqmp = \"{vm}.qmp\"\ndynamic_min = \"1G\"\ndynamic_max = \"1G\"\n"
        ));
    }
    config.push_str("[[vm]]\nname = \"nowhere\"\ndynamic_min = \"1G\"\ndynamic_max = \"1G\"\n");
    world.config(&config);
    let daemon = world.daemon(&[], None);
    world.run_until("a shrinks", |_| size(&good) == 512 * M);
    let errors = |world: &World| -> Vec<String> {
        let report = world.guests_json();
        let guests = report["guests"].as_array().cloned().unwrap_or_default();
        guests
            .iter()
            .map(|guest| guest["error"].as_str().unwrap_or("").to_owned())
            .collect()
    };
    world.run_until("all is said", |world| {
        let errors = errors(world);
        errors.len() == 5
            && errors[0].is_empty()
            && errors[1].contains("no answer to the greeting within 3.000 s")
            && errors[2].contains("is no QMP socket: it says `220 smtp ready")
            && errors[3].contains("cannot connect to")
            && errors[4].contains("its QMP socket is not known")
    });
    // A module that goes away is said, and nothing is moved.
    fs::rename(
        world.tree.root().join("sys"),
        world.tree.root().join("gone"),
    )
    .unwrap();
    fs::create_dir_all(world.tree.root().join("sys/fs/thinram/vms/a")).unwrap();
    fs::remove_dir_all(world.tree.root().join("sys")).unwrap();
    let end = Instant::now() + PATIENCE;
    while world.guests_json()["trouble"] == Value::Null {
        assert!(Instant::now() < end);
        thread::sleep(Duration::from_millis(100));
    }
    assert!(world.guests_json()["trouble"]
        .as_str()
        .unwrap()
        .contains("is the module loaded?"));
    daemon.signal(rustix::process::Signal::INT);
    assert_eq!(daemon.wait().0, Some(0));
}

#[test]
fn a_dry_run_moves_nothing() {
    let mut world = World::new(4096 * M);
    let guest = world.guest("a", 1024 * M, 64 * M);
    world.config(CONFIG);
    let daemon = world.daemon(&["--dry-run"], None);
    world.run_until("it decides", |world| {
        world.ctl(&["explain", "a"]).1.contains("pressure 6%")
    });
    daemon.signal(rustix::process::Signal::TERM);
    let (code, said) = daemon.wait();
    assert!(
        code == Some(0) && said.contains("would order a: "),
        "{said}"
    );
    assert_eq!(guest.lock().unwrap().target_kb, 1024 * M);
}

#[test]
fn a_cap_is_the_modules_limit_too() {
    let mut world = World::new(4096 * M);
    let guest = world.guest("a", 1024 * M, 1000 * M);
    world.config(&CONFIG.replacen("\"2G\"", "\"2G\"\ncap = \"768M\"", 1));
    let _daemon = world.daemon(&[], None);
    world.run_until("the limit is written", |world| {
        world.tree.read("vms/a/limit_kb") == format!("{}\n", 768 * M)
    });
    world.run_until("the balloon follows", |_| size(&guest) == 768 * M);
    // A new VM of that name has no limit at first; somebody else's limit stays.
    world.tree.write("vms/a/limit_kb", "0\n");
    world.run_until("the limit is written again", |world| {
        world.tree.read("vms/a/limit_kb") == format!("{}\n", 768 * M)
    });
    // The limit goes with the cap.
    assert_eq!(world.ctl(&["vm", "set", "a", "cap", "default"]).0, Some(0));
    world.run_until("no limit", |world| {
        world.tree.read("vms/a/limit_kb") == "0\n" && size(&guest) > 1000 * M
    });
}

#[test]
fn who_reads_again_what_it_dropped_gets_its_memory_back() {
    let mut world = World::new(4096 * M);
    let guest = world.guest("a", 1024 * M, 100 * M);
    world.config(CONFIG);
    let _daemon = world.daemon(&[], None);
    world.run_until("memory is taken", |_| size(&guest) <= 900 * M);
    guest.lock().unwrap().major_faults += 5000;
    world.run_until("and given back", |world| {
        let (_, explained, _) = world.ctl(&["explain", "a"]);
        size(&guest) == 1024 * M && explained.contains("it swapped or refaulted")
    });
    let shown = world.guests_json()["guests"][0]["guest_major_faults"].clone();
    assert_eq!(shown, 5000);
    let (_, shown, _) = world.ctl(&["vm", "show", "a"]);
    assert!(shown.contains("major faults 5000"), "{shown}");
}

#[test]
fn wrong_from_the_start() {
    let world = World::new(4096 * M);
    let (code, said) = world.daemon(&[], None).wait();
    assert!(code == Some(1) && said.contains("cannot read"), "{said}");
    world.config("[[vm]]\nname = 'a'\n");
    let (code, said) = world.daemon(&[], None).wait();
    assert!(
        code == Some(1) && said.contains("thinram.toml:1: VM `a`: dynamic_min is missing"),
        "{said}"
    );
    world.config(CONFIG);
    fs::remove_dir(world.tree.root().join("run")).unwrap();
    let (code, said) = world.daemon(&[], None).wait();
    assert!(
        code == Some(1) && said.contains("cannot listen on"),
        "{said}"
    );
}

#[test]
fn without_a_daemon_qemu_is_told_directly() {
    let mut world = World::new(4096 * M);
    let guest = world.guest("a", 1024 * M, 0);
    world.config(CONFIG);
    let (code, said, complaint) = world.ctl(&["balloon", "a", "600M"]);
    assert_eq!(
        (code, said.as_str()),
        (Some(0), "a was told to have 600M\n"),
        "{complaint}"
    );
    assert_eq!(guest.lock().unwrap().target_kb, 600 * M);
    assert_eq!(world.ctl(&["balloon", "a", "100M"]).0, Some(1));
    assert_eq!(guest.lock().unwrap().target_kb, 600 * M);
}
