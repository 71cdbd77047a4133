// SPDX-License-Identifier: GPL-2.0

//! `check` and `plan`, as they are run.

use assert_cmd::Command;
use serde_json::{json, Value};
use std::fs;
use std::path::PathBuf;
use std::process::Output;
use tempfile::TempDir;

const CONFIG: &str = r#"
[host]
policy = "proportional"
slush = "0"

[[vm]]
name = "a"
dynamic_min = "1G"
dynamic_max = "3G"

[[vm]]
name = "b"
dynamic_min = "1G"
dynamic_max = "5G"
policy = "pressure"
"#;

struct Files {
    dir: TempDir,
}

impl Files {
    fn new(config: &str, snapshot: &Value) -> Self {
        let files = Self {
            dir: TempDir::new().unwrap(),
        };
        fs::write(files.path("thinram.toml"), config).unwrap();
        fs::write(files.path("snapshot.json"), snapshot.to_string()).unwrap();
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_thinramctl"))
            .current_dir(self.dir.path())
            .env("COLUMNS", "60")
            .args(args)
            .output()
            .unwrap()
    }

    #[track_caller]
    fn plan(&self) -> Value {
        let output = self.run(&[
            "plan",
            "--config",
            "thinram.toml",
            "--snapshot",
            "snapshot.json",
            "--json",
        ]);
        assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
        assert_eq!(output.status.code(), Some(0));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    #[track_caller]
    fn refused(&self, said: &str) {
        let args = [
            "plan",
            "--config",
            "thinram.toml",
            "--snapshot",
            "snapshot.json",
            "--json",
        ];
        let output = self.run(&args);
        let complaint = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            (output.status.code(), output.stdout.len()),
            (Some(1), 0),
            "{complaint}"
        );
        assert!(complaint.contains(said), "{complaint}");
        assert_eq!(complaint.lines().count(), 1, "{complaint}");
    }
}

fn vm(name: &str, current_kb: u64, committed_kb: u64) -> Value {
    json!({
        "name": name, "current_kb": current_kb, "committed_kb": committed_kb,
        "guest_total_kb": current_kb, "guest_free_kb": 1, "guest_available_kb": 1,
        "active_kb": 1, "resident_kb": current_kb
    })
}

fn snapshot(available_kb: u64, vms: &[Value]) -> Value {
    json!({
        "now_s": 0, "host": {"total_kb": 16_777_216, "available_kb": available_kb}, "vms": vms
    })
}

#[test]
fn one_step_as_json() {
    let now = snapshot(0, &[vm("a", 2 << 20, 0), vm("b", 1 << 20, 1 << 20)]);
    let plan = Files::new(CONFIG, &now).plan();
    assert_eq!(plan["admission_ok"], true);
    assert_eq!(plan["targets"][0]["name"], "a");
    assert_eq!(plan["targets"][0]["target_kb"], 2 << 20);
    assert_eq!(plan["targets"][1]["target_kb"], 1 << 20);
    let keys: Vec<&String> = plan["targets"][0].as_object().unwrap().keys().collect();
    assert_eq!(keys, ["name", "reason", "target_kb"]);
}

#[test]
fn a_missing_field_is_said() {
    for field in [
        "current_kb",
        "guest_total_kb",
        "guest_free_kb",
        "guest_available_kb",
        "active_kb",
        "resident_kb",
    ] {
        let mut b = vm("b", 1 << 20, 1 << 20);
        b.as_object_mut().unwrap().remove(field);
        let plan = Files::new(CONFIG, &snapshot(0, &[vm("a", 2 << 20, 0), b])).plan();
        assert_eq!(plan["targets"][0]["target_kb"], 2 << 20);
        let reason = plan["targets"][1]["reason"].as_str().unwrap();
        assert!(
            reason.starts_with("not ready") && reason.contains(field),
            "{reason}"
        );
    }
    let mut estimated = vm("b", 1 << 20, 0);
    estimated.as_object_mut().unwrap().remove("committed_kb");
    let plan = Files::new(CONFIG, &snapshot(1 << 20, &[estimated])).plan();
    assert!(
        plan["targets"][0]["reason"]
            .as_str()
            .unwrap()
            .contains("(estimated)"),
        "{plan}"
    );
}

#[test]
fn a_screen() {
    let files = Files::new(
        CONFIG,
        &snapshot(0, &[vm("a", 2 << 20, 0), vm("x\u{1b}y", 1 << 20, 0)]),
    );
    let output = files.run(&[
        "plan",
        "--config",
        "thinram.toml",
        "--snapshot",
        "snapshot.json",
    ]);
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "VM      current  target  change\n\
         a          2.0G    2.0G       0\n\
         x\\x1by     1.0G    1.0G       0\n\
         \n\
         a: proportional: a pool of 2.0 GiB gives 50% of the way to\n  dynamic_max\n\
         x\\x1by: not configured: left alone\n"
    );
}

#[test]
fn bad_snapshots() {
    let good = snapshot(0, &[vm("a", 1, 0)]);
    let files = Files::new(CONFIG, &good);
    for (text, said) in [
        ("", "snapshot.json: EOF while parsing"),
        ("{", "line 1 column 1"),
        ("[]", "snapshot.json: invalid length"),
        (r#"{"now_s": 0, "vms": []}"#, "missing field `host`"),
        (
            r#"{"now_s": 0, "host": {"total_kb": -1, "available_kb": 0}, "vms": []}"#,
            "invalid value: integer `-1`",
        ),
        (
            r#"{"now_s": 0, "host": {"total_kb": 1, "available_kb": 0}, "vms": [{}]}"#,
            "missing field `name`",
        ),
        (
            r#"{"now_s": 0, "host": {"total_kb": 1, "available_kb": 0}, "vms": [{"name": "a"}, {"name": "a"}]}"#,
            "two VMs named `a`",
        ),
        (
            r#"{"now_s": 0, "host": {"total_kb": 1, "available_kb": 0}, "vms": [{"name": "a", "current_kb": -7}]}"#,
            "`-7` is no size",
        ),
        (
            r#"{"now_s": 0, "host": {"total_kb": 1, "available_kb": 0}, "vms": [{"name": "a", "current_kb": 1e99}]}"#,
            "floating point",
        ),
    ] {
        fs::write(files.path("snapshot.json"), text).unwrap();
        files.refused(said);
    }
    fs::remove_file(files.path("snapshot.json")).unwrap();
    files.refused("cannot read snapshot.json: No such file");
    fs::write(files.path("thinram.toml"), "[host]\nfrobs = 1\n").unwrap();
    files.refused("thinram.toml:2: unknown field `frobs`");
}

#[test]
fn check_says_what_is_wrong_where() {
    let files = Files::new(CONFIG, &json!({}));
    let output = files.run(&["check", "--config", "thinram.toml"]);
    assert_eq!(
        output.stdout,
        b"thinram.toml is good: policy proportional, 2 VMs\n"
    );
    let output = files.run(&["check", "--config", "thinram.toml", "--json"]);
    let checked: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        checked,
        json!({"ok": true, "policy": "proportional", "vms": 2})
    );

    fs::write(
        files.path("thinram.toml"),
        CONFIG.replace("\"5G\"", "\"5G\"\nbalast = 1"),
    )
    .unwrap();
    let output = files.run(&["check", "--config", "thinram.toml"]);
    assert_eq!(output.status.code(), Some(1));
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert!(
        complaint.starts_with("thinramctl: thinram.toml:15: unknown field `balast`"),
        "{complaint}"
    );
    fs::write(files.path("thinram.toml"), b"# \xff\n").unwrap();
    let complaint = files.run(&["check", "--config", "thinram.toml"]).stderr;
    assert_eq!(
        complaint,
        b"thinramctl: thinram.toml:1: these bytes are no UTF-8 text\n"
    );
    let complaint = files.run(&["check", "--root", "nowhere"]).stderr;
    let complaint = String::from_utf8(complaint).unwrap();
    assert!(
        complaint.contains("cannot read nowhere/etc/thinram/thinram.toml"),
        "{complaint}"
    );
}

#[test]
fn the_example_is_good() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/dist/thinram.toml");
    let output = Files::new("", &json!({})).run(&["check", "--config", example]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}
