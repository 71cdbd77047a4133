// SPDX-License-Identifier: GPL-2.0

//! The client against a real QEMU, `QEMU` in the environment or the one in PATH:
//! `cargo test -p thinramctl --test it -- --ignored`.

use std::env;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use thinramctl::qmp::{Balloon, Client, QmpError};

const LIMIT: Duration = Duration::from_secs(20);

struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a machine that never runs, with these devices, and connects to it.
fn start(dir: &Path, devices: &[&str]) -> (Qemu, Client) {
    let socket = dir.join("qmp");
    let program = env::var_os("QEMU").unwrap_or_else(|| "qemu-system-x86_64".into());
    let child = Command::new(program)
        .args([
            "-machine",
            "pc",
            "-accel",
            "tcg",
            "-nodefaults",
            "-display",
            "none",
            "-m",
            "256M",
            "-S",
        ])
        .args(devices)
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .stdin(Stdio::null())
        .spawn()
        .expect("QEMU does not start: install qemu-system-x86 or set QEMU");
    let qemu = Qemu(child);
    let end = Instant::now() + LIMIT;
    loop {
        match Client::connect(&socket, LIMIT) {
            Ok(client) => return (qemu, client),
            Err(QmpError::Connect { .. }) if Instant::now() < end => {
                thread::sleep(Duration::from_millis(50));
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
#[ignore = "needs QEMU"]
fn balloons_of_a_real_qemu() {
    for device in ["virtio-balloon-pci", "virtio-balloon-pci,id=balloon0"] {
        let dir = TempDir::new().unwrap();
        let (_qemu, client) = start(dir.path(), &["-device", device]);
        let mut balloon = Balloon::open(client, 2).unwrap();
        assert!(balloon.has_device());
        assert_eq!(balloon.actual_kb().unwrap(), Some(256 << 10));
        assert_eq!(balloon.stats().unwrap(), None, "no driver ran");
        balloon.set_kb(128 << 10).unwrap();
        let refused = balloon.set_kb(0).unwrap_err();
        assert!(refused.is_refusal(), "{refused}");
    }
}

#[test]
#[ignore = "needs QEMU"]
fn a_real_qemu_without_balloon() {
    let dir = TempDir::new().unwrap();
    let (_qemu, client) = start(dir.path(), &[]);
    let mut balloon = Balloon::open(client, 2).unwrap();
    assert!(!balloon.has_device());
    assert_eq!(balloon.actual_kb().unwrap(), None);
    let refused = balloon.set_kb(128 << 10).unwrap_err();
    assert!(refused.to_string().contains("DeviceNotActive"), "{refused}");
}

#[test]
#[ignore = "needs QEMU"]
fn a_real_qemu_that_is_killed() {
    let dir = TempDir::new().unwrap();
    let (qemu, client) = start(dir.path(), &["-device", "virtio-balloon-pci"]);
    let mut balloon = Balloon::open(client, 2).unwrap();
    drop(qemu);
    assert!(matches!(balloon.actual_kb(), Err(QmpError::Closed { .. })));
}
