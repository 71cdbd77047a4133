// SPDX-License-Identifier: GPL-2.0

//! The program as it is run, on fake trees.

use crate::tree::Tree;
use assert_cmd::Command;
use serde_json::{json, Value};
use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Output, Stdio};

fn command(root: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_thinramctl"));
    command.env_remove("COLUMNS").arg("--root").arg(root);
    command
}

fn run(tree: &Tree, args: &[&str]) -> Output {
    command(tree.root()).args(args).output().unwrap()
}

/// Standard output of a run that must succeed and say nothing else.
#[track_caller]
fn ok(tree: &Tree, args: &[&str]) -> String {
    let output = run(tree, args);
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        (output.status.code(), complaint.as_str()),
        (Some(0), ""),
        "{args:?}"
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Complaint of a run that must fail with this code and print nothing.
#[track_caller]
fn fails(tree: &Tree, code: i32, args: &[&str]) -> String {
    let output = run(tree, args);
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {complaint}");
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "", "{args:?}");
    assert!(!complaint.contains("panicked"), "{complaint}");
    let root = tree.root().to_str().unwrap();
    complaint.replace(root, "ROOT")
}

fn json_of(tree: &Tree, args: &[&str]) -> Value {
    serde_json::from_str(&ok(tree, args)).unwrap()
}

/// Compares with a file of `tests/golden`; `BLESS=1` writes it anew.
#[track_caller]
fn golden(tree: &Tree, name: &str, columns: &str, args: &[&str]) {
    let output = command(tree.root())
        .args(args)
        .env("COLUMNS", columns)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let got = String::from_utf8(output.stdout).unwrap();
    let limit: usize = columns.parse().unwrap();
    for line in got.lines() {
        assert!(line.chars().count() <= limit.min(80), "too wide: {line}");
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    if std::env::var_os("BLESS").is_some() {
        fs::write(&file, &got).unwrap();
    }
    let want = fs::read_to_string(&file).unwrap_or_default();
    assert!(got == want, "{} differs; it is now:\n{got}", file.display());
}

#[test]
fn screens_of_80_and_40_columns() {
    let tree = Tree::full();
    for columns in ["80", "40"] {
        golden(
            &tree,
            &format!("status-{columns}.txt"),
            columns,
            &["status"],
        );
        golden(
            &tree,
            &format!("vm-list-{columns}.txt"),
            columns,
            &["vm", "list"],
        );
        golden(
            &tree,
            &format!("vm-show-{columns}.txt"),
            columns,
            &["vm", "show", "web1"],
        );
    }
    golden(&tree, "status-80.txt", "200", &["status"]);
}

#[test]
fn many_vms_of_their_own_are_not_all_named() {
    let tree = Tree::empty();
    for nth in 0..40 {
        tree.vm(format!("vm{nth:02}"), "", [4, 4, 0, 0, 0]);
    }
    let shown = ok(&tree, &["status"]);
    assert!(shown.contains("vm00, vm01, vm02, vm03, vm04 and 35 more are domains of their own"));
    assert!(shown.contains("= 40 VMs"));
}

#[test]
fn status_without_vms() {
    let shown = ok(&Tree::empty(), &["status"]);
    assert!(shown.contains("No VM: start a guest"), "{shown}");
    assert_eq!(
        json_of(&Tree::empty(), &["--json", "status"])["vms"],
        json!([])
    );
}

#[test]
fn status_of_a_module_with_few_files() {
    let tree = Tree::bare();
    fs::create_dir_all(tree.dir().join("vms/web1")).unwrap();
    tree.write("run", "1\n");
    assert_eq!(
        ok(&tree, &["status"]),
        "scanner   running\n\n\
         VM    domain  size  resident  shared  zero  zipped  swapped  active  saved\n\
         web1  -          -         -       -     -       -        -       -      -\n\
         (no room for: private, empty)\n\n\
         No daemon runs (thinramctl daemon): no balloon is moved, and what the guests say\n  \
         is not known.\n"
    );
    let json = json_of(&tree, &["--json", "status"]);
    assert_eq!(json, json!({"host": {"run": 1}, "vms": [{"name": "web1"}]}));
}

#[test]
fn what_a_module_lacks_is_a_dash() {
    let tree = Tree::full();
    for name in ["swap_ins", "swap_outs", "active_kb"] {
        let _ = fs::remove_file(tree.dir().join("vms/web1").join(name));
    }
    let shown = ok(&tree, &["vm", "show", "web1"]);
    for label in ["swap_ins", "swap_outs", "active"] {
        let line = shown
            .lines()
            .find(|line| line.trim_start().starts_with(label));
        let cells: Vec<&str> = line.unwrap_or("").split_whitespace().skip(1).collect();
        assert!(
            !cells.is_empty() && cells.iter().all(|cell| *cell == "-"),
            "{shown}"
        );
    }
    tree.write("vms/web1/swap_ins", "12\n");
    let shown = ok(&tree, &["vm", "show", "web1"]);
    assert!(shown.lines().any(|line| line.ends_with("12")), "{shown}");
    assert!(json_of(&tree, &["vm", "show", "web1", "--json"])["swap_outs"].is_null());
}

#[test]
fn contended_vms_get_more_columns() {
    let tree = Tree::full();
    let stat = "size_kb 1000\nhuge_kb 512\ncompressed_kb 200\nswapped_kb 88\nempty_kb 200\n";
    tree.write("vms/web1/stat", stat);
    let shown = ok(&tree, &["status"]);
    assert!(shown.contains("zipped"), "{shown}");
    assert!(
        shown.lines().all(|line| line.chars().count() <= 80),
        "{shown}"
    );
}

#[test]
fn json_has_the_sysfs_names() {
    let tree = Tree::full();
    let status = json_of(&tree, &["--json", "status"]);
    let host = &status["host"];
    assert_eq!(host["state"], "high");
    assert_eq!(host["run"], 1);
    assert_eq!(host["swap_dir"], "");
    assert_eq!(host["pages_sharing"], 81233);
    assert_eq!(host["merges_refused_pinned"], 17);
    assert_eq!(host["merges_refused_busy"], 0);
    assert_eq!(host.get("a_file_of_a_newer_module"), None);
    let names: Vec<&str> = status["vms"]
        .as_array()
        .unwrap()
        .iter()
        .map(|vm| vm["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["a-database-with-a-long-name", "web1", "web2"]);
    let vm = &status["vms"][1];
    assert_eq!(vm["size_kb"], 1_048_576);
    assert_eq!(vm["domain"], "lab");
    assert_eq!(vm["cow_breaks"], 12);
    assert_eq!(vm.get("saved_kb"), None);
    assert_eq!(vm.get("busy"), None);

    assert_eq!(
        json_of(&tree, &["vm", "list", "--json"]),
        json!({"vms": status["vms"]})
    );
    let shown = json_of(&tree, &["--json", "vm", "show", "web1"]);
    assert_eq!(
        shown["sum_check"],
        json!({"size_kb": 1_048_576, "states_kb": 1_048_576, "ok": true})
    );
    assert_eq!(shown["shares"], 1000);
}

#[test]
fn general_profit_may_be_negative() {
    let tree = Tree::full();
    tree.write("general_profit", "-2864192\n");
    assert_eq!(
        json_of(&tree, &["--json", "status"])["host"]["general_profit"],
        -2_864_192
    );
    assert!(ok(&tree, &["status"]).contains("general profit -2.7 MiB"));
}

#[test]
fn states_that_do_not_add_up_are_shown() {
    let tree = Tree::full();
    tree.write("vms/web1/stat", "size_kb 1000\nprivate_kb 900\n");
    assert!(ok(&tree, &["vm", "show", "web1"]).contains(
        "sum check: WRONG: the states add up to 900 KiB, 100 KiB less than the size, 1000\n  KiB"
    ));
    assert!(ok(&tree, &["status"]).contains("web1: WRONG"));
    assert_eq!(
        json_of(&tree, &["--json", "vm", "show", "web1"])["sum_check"]["ok"],
        false
    );
    tree.write("vms/web1/stat", "size_kb 1000\nprivate_kb 1001\n");
    assert!(ok(&tree, &["vm", "show", "web1"]).contains("1 KiB more than"));
}

#[test]
fn figures_without_stat_are_no_snapshot() {
    let tree = Tree::full();
    fs::remove_file(tree.dir().join("vms/web1/stat")).unwrap();
    tree.write("vms/web1/size_kb", "1000\n");
    let shown = ok(&tree, &["vm", "show", "web1"]);
    assert!(shown.contains("not from one snapshot"), "{shown}");
    assert_eq!(
        json_of(&tree, &["--json", "vm", "show", "web1"])["size_kb"],
        1000
    );
}

#[test]
fn states_are_never_mixed_from_two_readings() {
    let tree = Tree::full();
    tree.write("vms/web1/stat", "size_kb 1000\nprivate_kb 900\n");
    tree.write("vms/web1/zero_kb", "100\n");
    tree.write("vms/web1/faults", "7\n");
    let vm = json_of(&tree, &["--json", "vm", "show", "web1"]);
    assert_eq!((vm.get("zero_kb"), &vm["faults"]), (None, &json!(7)));
}

#[test]
fn get_prints_what_is_there() {
    let tree = Tree::full();
    assert_eq!(ok(&tree, &["get", "scan_period_secs"]), "200\n");
    assert_eq!(ok(&tree, &["get", "general_profit"]), "375000000\n");
    assert_eq!(
        ok(&tree, &["get", "a_file_of_a_newer_module"]),
        "whatever\n"
    );
    assert_eq!(ok(&tree, &["vm", "get", "web1", "domain"]), "lab\n");
    assert_eq!(
        json_of(&tree, &["--json", "get", "share_scope"]),
        json!({"name": "share_scope", "value": "domain"})
    );
    assert_eq!(
        json_of(&tree, &["--json", "vm", "get", "web1", "shares"]),
        json!({"vm": "web1", "name": "shares", "value": 1000})
    );
}

#[test]
fn set_writes_and_shows_what_holds() {
    let tree = Tree::full();
    assert_eq!(
        ok(&tree, &["set", "scan_period_secs", "60"]),
        "scan_period_secs: 200 -> 60\n"
    );
    assert_eq!(tree.read("scan_period_secs"), "60\n");
    assert_eq!(
        ok(&tree, &["vm", "set", "web1", "limit_kb", "1.5G"]),
        "limit_kb of web1: 0 (none) -> 1536M\n"
    );
    assert_eq!(tree.read("vms/web1/limit_kb"), "1572864\n");
    assert_eq!(
        ok(&tree, &["set", "idle_tax_percent", "50%"]),
        "idle_tax_percent: 75% -> 50%\n"
    );
    assert_eq!(
        ok(&tree, &["vm", "set", "web1", "share", "off"]),
        "share of web1: 1 (on) -> 0 (off)\n"
    );
    assert_eq!(
        json_of(&tree, &["--json", "vm", "set", "web1", "domain", "prod"]),
        json!({"vm": "web1", "name": "domain", "value": "prod", "previous": "lab"})
    );
}

#[test]
fn a_knob_of_a_newer_module_is_passed_through() {
    let tree = Tree::full();
    tree.write("new_knob", "1\n");
    assert_eq!(ok(&tree, &["set", "new_knob", "2"]), "new_knob: 1 -> 2\n");
}

#[test]
fn what_the_module_made_of_it_is_said() {
    let tree = Tree::full();
    // Reads back another value than was written, as a file of the kernel's may.
    fs::remove_file(tree.dir().join("vms/web1/scan_pages_per_sec")).unwrap();
    symlink(
        "/proc/self/timerslack_ns",
        tree.dir().join("vms/web1/scan_pages_per_sec"),
    )
    .unwrap();
    let said = ok(&tree, &["vm", "set", "web1", "scan_pages_per_sec", "0"]);
    assert!(said.contains("(asked for 0"), "{said}");
}

#[test]
fn bad_values_change_nothing() {
    let tree = Tree::full();
    for (name, value, said) in [
        ("run", "3", "run: `3` is out of range: 0 to 2"),
        ("run", "-1", "run: `-1` is no whole number"),
        ("run", "fast", "run: `fast` is no whole number"),
        (
            "scan_cpu_max_percent",
            "101%",
            "`101%` is out of range: 1% to 100%",
        ),
        ("share_scope", "all", "`all` is none of vm, domain, host"),
        ("max_page_sharing", "1", "`1` is out of range: 2 to 1048576"),
        (
            "minfree_kb",
            "2Q",
            "`2Q` is no size: write it like 4096 (KiB), 512K, 512M, 1.5G",
        ),
        ("minfree_kb", "99999999999G", "`99999999999G` is too large"),
        ("swap_dir", "/a\nb", "has a control character"),
    ] {
        let before = tree.read(name);
        let complaint = fails(&tree, 2, &["set", name, value]);
        assert!(complaint.contains(said), "{complaint}");
        assert_eq!(tree.read(name), before);
    }
}

#[test]
fn what_the_kernel_refuses_is_explained() {
    let tree = Tree::full();
    // A file of the kernel's that refuses numbers above 1000 with EINVAL.
    fs::remove_file(tree.dir().join("vms/web1/shares")).unwrap();
    symlink(
        "/proc/self/oom_score_adj",
        tree.dir().join("vms/web1/shares"),
    )
    .unwrap();
    let complaint = fails(&tree, 1, &["vm", "set", "web1", "shares", "5000"]);
    assert!(
        complaint.contains("takes no `5000` for shares"),
        "{complaint}"
    );
    assert!(complaint.contains("default 1000"), "{complaint}");
}

#[test]
fn unknown_names_get_suggestions() {
    let tree = Tree::full();
    for (args, said) in [
        (
            &["set", "scan_period_sec", "1"][..],
            "do you mean scan_period_secs",
        ),
        (
            &["get", "pages_shareing"],
            "do you mean pages_sharing, pages_shared",
        ),
        (&["vm", "get", "web1", "size"], "do you mean size_kb"),
        (&["vm", "set", "web1", "limit", "1"], "do you mean limit_kb"),
        (&["get", "qqqq"], "there are run,"),
        (&["get", "vms"], "the host has no `vms`"),
        (&["get", "../../kernel/uevent_seqnum"], "the host has no"),
        (&["get", ""], "the host has no ``"),
        (&["set", "..", "1"], "the host has no `..`"),
        (
            &["set", "vms/web1/share", "0"],
            "the host has no `vms/web1/share`",
        ),
        (
            &["set", "full_scans", "0"],
            "`full_scans` is a figure of the module, no knob",
        ),
        (&["vm", "set", "web1", "stat", "0"], "`stat` is a figure"),
    ] {
        let complaint = fails(&tree, 2, args);
        assert!(complaint.contains(said), "{args:?}: {complaint}");
    }
    for (name, said) in [
        ("web3", "no VM is named web3: do you mean web1, web2?"),
        ("zzz", "no VM is named zzz: see thinramctl vm list"),
        ("..", "no VM is named ..: see"),
        ("", "no VM is named : see"),
    ] {
        let complaint = fails(&tree, 1, &["vm", "show", name]);
        assert!(complaint.contains(said), "{complaint}");
    }
    assert!(fails(&Tree::empty(), 1, &["vm", "show", "a"]).contains("there is none at all"));
}

#[test]
fn knobs_and_figures_that_this_module_lacks() {
    let tree = Tree::full();
    fs::remove_file(tree.dir().join("zero_only")).unwrap();
    fs::remove_file(tree.dir().join("full_scans")).unwrap();
    assert!(fails(&tree, 1, &["set", "zero_only", "1"]).contains("this module has no `zero_only`"));
    assert!(fails(&tree, 1, &["get", "full_scans"]).contains("this module has no `full_scans`"));
}

#[test]
fn read_only_files_are_not_written() {
    use std::os::unix::fs::PermissionsExt;
    let tree = Tree::full();
    let file = tree.dir().join("zero_only");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o444)).unwrap();
    assert!(fails(&tree, 1, &["set", "zero_only", "1"]).contains("read-only"));
    assert_eq!(tree.read("zero_only"), "0\n");
}

#[test]
fn module_not_loaded() {
    let tree = Tree::bare();
    let said = "thinramctl: ROOT/sys/fs/thinram is missing: is the module loaded? \
                sudo modprobe thinram\n";
    for args in [
        &["status"][..],
        &["--json", "status"],
        &["vm", "list"],
        &["vm", "show", "web1"],
        &["get", "run"],
        &["set", "run", "1"],
        &["vm", "get", "web1", "share"],
        &["vm", "set", "web1", "share", "1"],
    ] {
        assert_eq!(fails(&tree, 1, args), said, "{args:?}");
    }
    fs::create_dir_all(tree.root().join("sys/fs")).unwrap();
    tree_file(&tree);
    assert_eq!(fails(&tree, 1, &["status"]), said);
}

/// A file where the directory belongs.
fn tree_file(tree: &Tree) {
    fs::write(tree.dir(), "").unwrap();
}

#[test]
fn garbage_is_named_with_its_place() {
    for (file, content, said) in [
        (
            "full_scans",
            &b"twelve\n"[..],
            "ROOT/sys/fs/thinram/full_scans: `twelve` is no whole",
        ),
        ("full_scans", b"-1\n", "full_scans: `-1` is no whole number"),
        ("full_scans", b"", "full_scans: `` is no whole number"),
        (
            "full_scans",
            b"99999999999999999999\n",
            "`99999999999999999999` is no whole number",
        ),
        (
            "general_profit",
            b"--5\n",
            "general_profit: `--5` is no whole number",
        ),
        (
            "scan_period_secs",
            b"\x1b[2J\n",
            "scan_period_secs: `\\x1b[2J` is no whole number",
        ),
        (
            "state",
            b"\xff\xfe\n",
            "state holds no text: `\\xff\\xfe\\n`",
        ),
        (
            "merges_refused_pinned",
            b"[1]\n",
            "merges_refused_pinned: `[1]` is no whole number",
        ),
        (
            "vms/web1/stat",
            b"size_kb 1\nzero_kb x\n",
            "vms/web1/stat line 2: `zero_kb x` is no",
        ),
        (
            "vms/web1/stat",
            b"size_kb 1\nzero_kb\n",
            "stat line 2: `zero_kb` is not of the form",
        ),
        (
            "vms/web1/stat",
            b"\xc3\x28",
            "vms/web1/stat holds no text: `\\xc3(`",
        ),
        (
            "vms/web1/faults",
            b"1 2\n",
            "vms/web1/faults: `1 2` is no whole number",
        ),
        (
            "vms/web1/shares",
            b"many\n",
            "vms/web1/shares: `many` is no whole number",
        ),
    ] {
        let tree = Tree::full();
        tree.write(file, content);
        for args in [&["status"][..], &["--json", "status"]] {
            let complaint = fails(&tree, 1, args);
            assert!(complaint.contains(said), "{complaint}");
            assert_eq!(complaint.lines().count(), 1, "{complaint}");
        }
    }
}

#[test]
fn endless_and_unreadable_files() {
    let tree = Tree::full();
    tree.write("state", vec![b'a'; 70_000]);
    assert!(fails(&tree, 1, &["status"]).contains("state is longer than"));
    fs::remove_file(tree.dir().join("state")).unwrap();
    fs::create_dir(tree.dir().join("state")).unwrap();
    assert!(fails(&tree, 1, &["status"]).contains("cannot read ROOT/sys/fs/thinram/state"));
}

#[test]
fn odd_names_are_escaped_and_found() {
    let tree = Tree::empty();
    for name in [
        &b"a\x1b[31m\nb"[..],
        b"\xff\xfe",
        b"two words",
        b"back\\slash",
    ] {
        tree.vm(OsStr::from_bytes(name), "lab", [4, 4, 0, 0, 0]);
    }
    let shown = ok(&tree, &["vm", "list"]);
    assert!(!shown.contains('\x1b'), "{shown:?}");
    for name in ["a\\x1b[31m\\nb", "\\xff\\xfe", "two words", "back\\\\slash"] {
        assert!(shown.contains(name), "{shown}");
        assert_eq!(ok(&tree, &["vm", "get", name, "domain"]), "lab\n");
        assert_eq!(
            json_of(&tree, &["--json", "vm", "show", name])["name"],
            name
        );
    }
    let raw = OsStr::from_bytes(b"\xff\xfe");
    let output = command(tree.root())
        .args(["vm", "get"])
        .arg(raw)
        .arg("share")
        .output()
        .unwrap();
    assert_eq!(output.stdout, b"1\n");
}

#[test]
fn watch_repeats() {
    let tree = Tree::full();
    let shown = ok(&tree, &["status", "--watch", "0.1", "--count", "3"]);
    assert_eq!(shown.matches("state     high").count(), 3);
    let lines = ok(
        &tree,
        &["--json", "status", "--watch", "0.1", "--count", "2"],
    );
    assert_eq!(lines.lines().count(), 2);
    for line in lines.lines() {
        assert_eq!(
            serde_json::from_str::<Value>(line).unwrap()["host"]["run"],
            1
        );
    }
    for args in [
        &["status", "--count", "2"][..],
        &["status", "--watch", "0"],
        &["status", "--watch", "soon"],
        &["status", "--watch", "1", "--count", "0"],
    ] {
        fails(&tree, 2, args);
    }
}

#[test]
fn usage_errors() {
    let tree = Tree::full();
    for args in [
        &["frobnicate"][..],
        &[],
        &["set", "run"],
        &["vm"],
        &["status", "extra"],
    ] {
        let output = run(&tree, args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
    }
    let help = ok(&tree, &["set", "--help"]);
    assert!(help.contains("scan_cpu_max_percent"), "{help}");
    assert!(
        help.lines().all(|line| line.chars().count() <= 80),
        "{help}"
    );
    assert!(ok(&tree, &["--version"]).starts_with("thinramctl "));
}

#[test]
fn a_closed_pipe_is_quiet() {
    let tree = Tree::full();
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_thinramctl"))
        .arg("--root")
        .arg(tree.root())
        .args(["status", "--watch", "0.1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0; 16];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), output.stderr.as_slice()),
        (Some(0), &b""[..])
    );
}

#[test]
fn a_full_disk_is_an_error() {
    let tree = Tree::full();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_thinramctl"))
        .arg("--root")
        .arg(tree.root())
        .arg("status")
        .stdout(
            fs::OpenOptions::new()
                .write(true)
                .open("/dev/full")
                .unwrap(),
        )
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot write the output"));
}

/// A terminal of that size: its two ends.
fn terminal(columns: u16) -> (fs::File, fs::File) {
    use rustix::pty::{grantpt, openpt, ptsname, unlockpt, OpenptFlags};
    use rustix::termios::{tcsetwinsize, Winsize};
    let pty = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&pty).unwrap();
    unlockpt(&pty).unwrap();
    let name = ptsname(&pty, Vec::new()).unwrap();
    let tty = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(name.to_str().unwrap())
        .unwrap();
    let size = Winsize {
        ws_row: 24,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&tty, size).unwrap();
    (fs::File::from(pty), tty)
}

#[test]
fn width_is_the_terminals() {
    let tree = Tree::full();
    let shown = |columns: u16| {
        let (mut pty, tty) = terminal(columns);
        let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_thinramctl"))
            .env("COLUMNS", "33")
            .arg("--root")
            .arg(tree.root())
            .args(["vm", "list"])
            .stdout(tty)
            .spawn()
            .unwrap();
        let mut text = Vec::new();
        // The last end of the terminal is closed: reading ends with EIO.
        let _ = pty.read_to_end(&mut text);
        assert!(child.wait().unwrap().success());
        String::from_utf8(text).unwrap().replace("\r\n", "\n")
    };
    let widest = |text: &str| text.lines().map(|line| line.chars().count()).max().unwrap();
    let wide = shown(120);
    assert!(wide.contains("a-database-with-a-long-name"), "{wide}");
    assert!((81..=120).contains(&widest(&wide)), "{wide}");
    assert!((34..=60).contains(&widest(&shown(60))));
    assert!(widest(&shown(0)) <= 33);
}

#[test]
fn top_on_a_terminal_and_without() {
    let tree = Tree::full();
    let shown = ok(&tree, &["top", "--count", "2", "--interval", "0.1"]);
    assert_eq!(shown.lines().count(), 48, "{shown}");
    assert!(
        shown.lines().all(|line| line.chars().count() <= 80),
        "{shown}"
    );
    assert!(
        shown.contains("a-database-…") && shown.contains("no daemon"),
        "{shown}"
    );
    let json = ok(
        &tree,
        &["top", "--json", "--count", "2", "--interval", "0.1"],
    );
    let second: Value = serde_json::from_str(json.lines().nth(1).unwrap()).unwrap();
    assert_eq!(second["rates"]["web1"]["faults"], 0.0);
    assert_eq!(second["rates"]["web1"]["stall_us"], 0.0);
    let complaint = fails(&Tree::bare(), 1, &["top", "--count", "1"]);
    assert!(complaint.contains("is the module loaded?"), "{complaint}");

    let (mut pty, tty) = terminal(80);
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_thinramctl"))
        .arg("--root")
        .arg(tree.root())
        .args(["top", "--interval", "60"])
        .stdin(tty.try_clone().unwrap())
        .stdout(tty)
        .spawn()
        .unwrap();
    pty.write_all(b"nRq").unwrap();
    let mut bytes = Vec::new();
    let _ = pty.read_to_end(&mut bytes);
    assert!(child.wait().unwrap().success());
    let screen = String::from_utf8_lossy(&bytes);
    assert!(
        screen.contains("web2") && screen.contains("quit"),
        "{screen}"
    );
    // The terminal is as it was: the other screen is left, the cursor shown.
    assert!(
        screen.contains("\x1b[?1049l") && screen.contains("\x1b[?25h"),
        "{screen:?}"
    );
}

#[test]
fn completions_and_manual_pages() {
    let tree = Tree::bare();
    for shell in ["bash", "zsh", "fish"] {
        let text = ok(&tree, &["completions", shell]);
        assert!(
            text.contains("thinramctl") && text.contains("estimate"),
            "{shell}"
        );
    }
    fails(&tree, 2, &["completions", "dos"]);
    assert!(ok(&tree, &["man"]).contains(".TH thinramctl"));
    let dir = tree.root().join("man");
    ok(&tree, &["man", "--dir", dir.to_str().unwrap()]);
    for page in ["thinramctl.1", "thinramctl-admit.1", "thinramctl-vm-add.1"] {
        assert!(dir.join(page).exists(), "{page}");
    }
    let page = fs::read_to_string(dir.join("thinramctl-set.1")).unwrap();
    assert!(
        page.contains("scan\\_period\\_secs") || page.contains("scan_period_secs"),
        "{page}"
    );
    let file = dir.join("thinramctl.1");
    let complaint = fails(&tree, 1, &["man", "--dir", file.to_str().unwrap()]);
    assert!(
        complaint.contains("cannot write manual pages"),
        "{complaint}"
    );
}

#[test]
fn an_error_is_said_once_and_nothing_endless_is_read() {
    let tree = Tree::empty();
    for args in [
        &["check", "--config", "/nonexistent"][..],
        &["replay", "/nonexistent", "--config", "/dev/null"],
        &[
            "plan",
            "--config",
            "/dev/null",
            "--snapshot",
            "/nonexistent",
        ],
    ] {
        assert_eq!(
            fails(&tree, 1, args),
            "thinramctl: cannot read /nonexistent: No such file or directory (os error 2)\n"
        );
    }
    for args in [
        &["check", "--config", "/dev/zero"][..],
        &["plan", "--config", "/dev/null", "--snapshot", "/dev/zero"],
    ] {
        let complaint = fails(&tree, 1, args);
        assert!(
            complaint.contains("/dev/zero: it is longer than"),
            "{complaint}"
        );
    }
}
