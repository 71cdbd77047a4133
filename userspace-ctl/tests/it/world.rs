// SPDX-License-Identifier: GPL-2.0

//! A fake host with QEMUs that a test plays, and the daemon on it.

use crate::tree::Tree;
use serde_json::{json, Value};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

pub const M: u64 = 1 << 10;
/// Long enough for a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Guest {
    pub name: &'static str,
    pub current_kb: u64,
    pub target_kb: u64,
    pub used_kb: u64,
    pub reports: u64,
    pub major_faults: u64,
}

/// A host with guests whose balloons move by themselves, some MiB each tenth of a second.
pub struct World {
    pub tree: Tree,
    pub guests: Vec<Arc<Mutex<Guest>>>,
    pub total_kb: u64,
    pub worst_kb: i64,
    /// Where the daemon looks for programs first.
    pub programs: Option<PathBuf>,
}

impl World {
    pub fn new(total_kb: u64) -> Self {
        let tree = Tree::empty();
        for dir in ["proc", "run", "etc/thinram"] {
            fs::create_dir_all(tree.root().join(dir)).unwrap();
        }
        Self {
            tree,
            guests: Vec::new(),
            total_kb,
            worst_kb: i64::MAX,
            programs: None,
        }
    }

    pub fn socket(&self, name: &str) -> PathBuf {
        self.tree.root().join(format!("{name}.qmp"))
    }

    /// Adds a guest whose QEMU answers.
    pub fn guest(
        &mut self,
        name: &'static str,
        current_kb: u64,
        used_kb: u64,
    ) -> Arc<Mutex<Guest>> {
        let guest = Guest {
            name,
            current_kb,
            target_kb: current_kb,
            used_kb,
            reports: 1,
            major_faults: 0,
        };
        let guest = Arc::new(Mutex::new(guest));
        let listener = UnixListener::bind(self.socket(name)).unwrap();
        let served = Arc::clone(&guest);
        thread::spawn(move || {
            for stream in listener.incoming() {
                serve(&stream.unwrap(), &served);
            }
        });
        self.tree.vm(name, "", [current_kb, current_kb, 0, 0, 0]);
        self.guests.push(Arc::clone(&guest));
        self.step();
        guest
    }

    pub fn config(&self, text: &str) {
        let mut text = text.to_owned();
        for vm in ["a", "b", "hangs", "other", "missing"] {
            let socket = self.socket(vm).display().to_string();
            text = text.replace(&format!("{vm}.qmp"), &socket);
        }
        self.replace("etc/thinram/thinram.toml", &text);
    }

    /// Replaces a file all at once.
    pub fn replace(&self, path: &str, text: &str) {
        let new = self.tree.root().join("new-file");
        fs::write(&new, text).unwrap();
        fs::rename(new, self.tree.root().join(path)).unwrap();
    }

    /// A tenth of a second.
    pub fn step(&mut self) {
        let mut available = i64::try_from(self.total_kb).unwrap();
        for guest in &self.guests {
            let mut guest = guest.lock().unwrap();
            let (current, target) = (guest.current_kb, guest.target_kb);
            guest.current_kb = target.clamp(current.saturating_sub(16 * M), current + 16 * M);
            guest.reports += 1;
            available -= i64::try_from(guest.current_kb).unwrap();
            let kb = guest.current_kb;
            let stat = format!("size_kb {kb}\nresident_kb {kb}\nprivate_kb {kb}\n");
            let path = format!("sys/fs/thinram/vms/{}/stat", guest.name);
            drop(guest);
            self.replace(&path, &stat);
        }
        self.worst_kb = self.worst_kb.min(available);
        let meminfo = format!(
            "MemTotal: {} kB\nMemAvailable: {} kB\n",
            self.total_kb,
            available.max(0)
        );
        self.replace("proc/meminfo", &meminfo);
    }

    #[track_caller]
    pub fn run_until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(self) {
            let late = Instant::now() >= end;
            assert!(
                !late,
                "{what}: it never came to that: {:#}",
                self.guests_json()
            );
            thread::sleep(Duration::from_millis(100));
            self.step();
        }
    }

    pub fn ctl(&self, args: &[&str]) -> (Option<i32>, String, String) {
        self.tree.ctl(args)
    }

    pub fn guests_json(&self) -> Value {
        let (_, out, _) = self.ctl(&["guests", "--json"]);
        serde_json::from_str(&out).unwrap_or_default()
    }

    pub fn daemon(&self, more: &[&str], notify: Option<&Path>) -> Daemon {
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_thinramctl"));
        command
            .arg("--root")
            .arg(self.tree.root())
            .arg("daemon")
            .args(more);
        command.stderr(log.reopen().unwrap());
        if let Some(programs) = &self.programs {
            let path = std::env::var("PATH").unwrap();
            command.env("PATH", format!("{}:{path}", programs.display()));
        }
        if let Some(socket) = notify {
            command.env("NOTIFY_SOCKET", socket);
        }
        Daemon {
            child: command.spawn().unwrap(),
            log,
        }
    }
}

pub struct Daemon {
    pub child: Child,
    pub log: tempfile::NamedTempFile,
}

impl Daemon {
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Its exit code and what it said.
    pub fn wait(mut self) -> (Option<i32>, String) {
        let code = self.child.wait().unwrap().code();
        (code, fs::read_to_string(self.log.path()).unwrap())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!(
                "the daemon said: {}",
                fs::read_to_string(self.log.path()).unwrap_or_default()
            );
        }
    }
}

/// Plays QEMU for one connection.
fn serve(stream: &UnixStream, guest: &Mutex<Guest>) {
    let mut out = stream;
    if writeln!(out, r#"{{"QMP": {{"version": {{}}, "capabilities": []}}}}"#).is_err() {
        return;
    }
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { return };
        let request: Value = serde_json::from_str(&line).unwrap();
        let arguments = &request["arguments"];
        let mut guest = guest.lock().unwrap();
        let answer = match request["execute"].as_str().unwrap() {
            "qom-list" => json!([{"name": "balloon0", "type": "child<virtio-balloon-pci>"}]),
            "query-balloon" => json!({"actual": guest.current_kb * 1024}),
            "balloon" => {
                guest.target_kb = arguments["value"].as_u64().unwrap() / 1024;
                json!({})
            }
            "qom-get" => {
                let available = guest.current_kb.saturating_sub(guest.used_kb);
                json!({"last-update": guest.reports, "stats": {
                    "stat-total-memory": guest.current_kb * 1024, "stat-free-memory": available * 1024,
                    "stat-available-memory": available * 1024, "stat-swap-in": 0, "stat-swap-out": 0,
                    "stat-major-faults": guest.major_faults, "stat-disk-caches": 0
                }})
            }
            _ => json!({}),
        };
        drop(guest);
        if writeln!(out, "{}", json!({"return": answer, "id": request["id"]})).is_err() {
            return;
        }
    }
}

pub const CONFIG: &str = r#"
[host]
policy = "pressure"
slush = "0"
interval_s = 1

[[vm]]
name = "a"
qmp = "a.qmp"
dynamic_min = "512M"
dynamic_max = "2G"

[[vm]]
name = "b"
qmp = "b.qmp"
dynamic_min = "512M"
dynamic_max = "2G"
"#;

pub fn size(guest: &Mutex<Guest>) -> u64 {
    guest.lock().unwrap().current_kb
}
