// SPDX-License-Identifier: GPL-2.0

//! VMs that come and go while they are read.

use crate::tree::Tree;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use thinramctl::status::Status;
use thinramctl::sysfs::Dir;
use thinramctl::vm::{Vm, VmName};

#[test]
fn a_vm_that_is_gone_is_none() {
    let tree = Tree::full();
    let vms = Dir::open(tree.root()).unwrap().child("vms");
    assert!(Vm::read(&vms, &VmName::new("web1")).unwrap().is_some());
    assert!(Vm::read(&vms, &VmName::new("gone")).unwrap().is_none());
}

#[test]
fn ending_vms_are_left_out() {
    let tree = Tree::full();
    let dir = Dir::open(tree.root()).unwrap();
    let stop = AtomicBool::new(false);
    let mut seen = 0;
    let mut missed = 0;
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                tree.vm("fleeting", "lab", [4, 4, 0, 0, 0]);
                thread::yield_now();
                fs::remove_dir_all(tree.dir().join("vms/fleeting")).unwrap();
            }
        });
        for _ in 0..5000 {
            let status = Status::read(&dir).unwrap();
            let named = |name| status.vms.iter().any(|vm| vm.name == VmName::new(name));
            assert!(named("web1") && named("web2"));
            match named("fleeting") {
                true => seen += 1,
                false => missed += 1,
            }
            if seen > 20 && missed > 20 {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(
        seen > 0 && missed > 0,
        "the race was not met: seen {seen}, missed {missed}"
    );
}
