// SPDX-License-Identifier: GPL-2.0

//! `estimate`, on files that stand for guests' memory.

use crate::tree::Tree;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::symlink;

const PAGE: usize = 4096;

/// Pages by content; 0 is a page of zeroes.
fn memory(contents: &[u32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for content in contents {
        bytes.extend(content.to_le_bytes().repeat(PAGE / 4));
    }
    bytes
}

/// web1's file has lost its name and is only mapped, the database's is only on the mount, and web2's
/// is both.
fn tree() -> Tree {
    let tree = Tree::full();
    let root = tree.root();
    for dir in [
        "proc/self",
        "proc/4711/map_files",
        "proc/4712/map_files",
        "run/thinram/web2",
    ] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    let db = "run/thinram/a-database-with-a-long-name";
    fs::create_dir_all(root.join(db)).unwrap();
    fs::write(
        root.join("proc/self/mountinfo"),
        "25 1 8:1 / / rw - ext4 /dev/sda1 rw\n36 25 0:43 / /run/thinram rw - thinram thinram rw\n",
    )
    .unwrap();
    let maps = "7f0000000000-7f0000005000 rw-s 00000000 00:2b 7 /web1/qemu_back_mem (deleted)\n\
                7f1000000000-7f1000005000 rw-p 00000000 08:01 9 /usr/bin/qemu\n";
    fs::write(root.join("proc/4711/maps"), maps).unwrap();
    let gone = root.join("gone");
    fs::write(&gone, memory(&[1, 2, 3, 3, 0])).unwrap();
    symlink(
        gone,
        root.join("proc/4711/map_files/7f0000000000-7f0000005000"),
    )
    .unwrap();

    fs::write(root.join("run/thinram/web2/ram"), memory(&[3, 4, 1, 0, 0])).unwrap();
    fs::write(
        root.join("proc/4712/maps"),
        "7f0000000000-7f0000005000 rw-s 00000000 00:2b 8 /web2/ram\n",
    )
    .unwrap();
    symlink(
        root.join("run/thinram/web2/ram"),
        root.join("proc/4712/map_files/7f0000000000-7f0000005000"),
    )
    .unwrap();
    tree.write("vms/web2/owner_pid", "4712\n");

    fs::write(root.join(db).join("ram"), memory(&[1, 9])).unwrap();
    tree.write("vms/a-database-with-a-long-name/owner_pid", "0\n");
    tree
}

#[test]
fn by_vm_and_by_pair() {
    let tree = tree();
    let (_, shown, _) = tree.ctl(&["status"]);
    assert!(
        shown.contains("thinramctl estimate says what that would save"),
        "{shown}"
    );
    let (code, out, complaint) = tree.ctl(&["estimate", "--json"]);
    assert_eq!((code, complaint.as_str()), (Some(0), ""));
    let result: Value = serde_json::from_str(&out).unwrap();
    let vm = |nth: usize, key: &str| result["vms"][nth][key].as_u64().unwrap() / 4;
    assert_eq!(result["vms"][1]["name"], "web1");
    let figures = |nth| ["memory_kb", "zero_kb", "within_kb", "opening_kb"].map(|key| vm(nth, key));
    assert_eq!(figures(0), [2, 0, 0, 1]);
    assert_eq!(figures(1), [5, 1, 1, 2]);
    assert_eq!(figures(2), [5, 2, 0, 2]);
    assert_eq!(result["pairs"].as_array().unwrap().len(), 3);
    assert_eq!(result["pairs"][0]["saved_kb"], 8);
    assert_eq!(
        (&result["pairs"][0]["a"], &result["pairs"][0]["b"]),
        (&"web1".into(), &"web2".into())
    );
    // 12 pages; 3 are zero, and 9 others have the contents 1, 2, 3, 4 and 9.
    assert_eq!(result["all_kb"], (3 + 9 - 5) * 4);

    let (_, shown, _) = tree.ctl(&["estimate"]);
    assert!(
        shown.contains("in common") && shown.contains("would save 28 KiB"),
        "{shown}"
    );
    let (_, shown, _) = tree.ctl(&["status"]);
    let said = "One domain with all others would save 4 KiB in a-database-with-a-long-name";
    assert!(shown.replace("\n  ", " ").contains(said), "{shown}");

    let (code, out, _) = tree.ctl(&["estimate", "web1", "--json"]);
    let one: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, one["vms"].as_array().unwrap().len()), (Some(0), 1));
    let (code, out, _) = tree.ctl(&["estimate", "--sample", "50%", "--json"]);
    let half: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (code, half["sample_percent"].as_f64()),
        (Some(0), Some(50.0))
    );
}

#[test]
fn what_cannot_be_read_is_said() {
    let tree = tree();
    tree.vm("ghost", "", [4, 4, 0, 0, 0]);
    tree.write("vms/ghost/owner_pid", "99\n");
    let (code, _, complaint) = tree.ctl(&["estimate"]);
    assert_eq!(code, Some(0));
    assert!(
        complaint.contains("no memory of ghost was found"),
        "{complaint}"
    );
    for args in [
        &["estimate", "--sample", "0"][..],
        &["estimate", "--sample", "101%"],
    ] {
        assert_eq!(tree.ctl(args).0, Some(2));
    }
    let (code, _, complaint) = tree.ctl(&["estimate", "wbe1"]);
    assert!(
        code == Some(1) && complaint.contains("do you mean web1"),
        "{complaint}"
    );
    fs::remove_file(tree.root().join("proc/self/mountinfo")).unwrap();
    let (code, _, complaint) = tree.ctl(&["estimate"]);
    assert!(
        code == Some(1) && complaint.contains("cannot read"),
        "{complaint}"
    );
    let (code, _, complaint) = Tree::bare().ctl(&["estimate"]);
    assert!(
        code == Some(1) && complaint.contains("is the module loaded?"),
        "{complaint}"
    );
}
