// SPDX-License-Identifier: GPL-2.0

//! Guests that are reached through libvirt, and guests that ask for a size themselves.

use crate::world::{size, World, CONFIG, M};
use serde_json::{json, Value};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

/// A virsh whose one domain has its size in a file; `setmem` is refused above 2 GiB.
fn fake_virsh(dir: &Path) {
    let script = format!(
        "#!/bin/sh\n\
         [ \"$1 $2 $3\" = '-q -c qemu:///system' ] || exit 9\n\
         [ \"$6\" = web1 ] || {{ echo \"error: failed to get domain '$6'\" >&2; exit 1; }}\n\
         cd {dir} || exit 9\n\
         case $4 in\n\
         setmem) [ $9 -le 2097152 ] || {{ echo 'error: cannot set memory' >&2; exit 1; }}\n\
             echo $9 >new && mv new size ;;\n\
         dommemstat) [ -e gone ] && {{ echo 'error: domain is not running' >&2; exit 1; }}\n\
             s=$(cat size); printf 'actual %s\\nswap_in 0\\nswap_out 0\\nunused 1000\\navailable %s\\n\
         usable %s\\nlast_update %s\\nrss 5\\n' $s $s $((s - 65536)) $(date +%s) ;;\n\
         *) exit 9 ;;\n\
         esac\n",
        dir = dir.display()
    );
    let program = dir.join("virsh");
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(dir.join("size"), "1048576\n").unwrap();
}

#[test]
fn a_domain_of_libvirt() {
    let mut world = World::new(4096 * M);
    let programs = world.tree.root().join("programs");
    fs::create_dir_all(&programs).unwrap();
    fake_virsh(&programs);
    world.programs = Some(programs.clone());
    let kb = 1024 * M;
    world.tree.vm("7-web1", "", [kb, kb, 0, 0, 0]);
    let process = world.tree.root().join("proc/4711");
    fs::create_dir_all(&process).unwrap();
    let line = "qemu -name guest=web1,debug-threads=on -chardev socket,id=charmonitor,fd=23 -mon \
                chardev=charmonitor,id=monitor,mode=control";
    fs::write(process.join("cmdline"), line.replace(' ', "\0")).unwrap();
    world.step();
    world.config(
        "[host]\npolicy = 'pressure'\nslush = '0'\ninterval_s = 1\n[[vm]]\nname = 'web1'\n\
         dynamic_min = '512M'\ndynamic_max = '4G'\n",
    );
    let daemon = world.daemon(&[], None);
    let libvirts = || fs::read_to_string(programs.join("size")).unwrap();
    world.run_until("the balloon is moved", |_| {
        libvirts() == format!("{}\n", 512 * M)
    });
    let report = world.guests_json();
    let guest = &report["guests"][0];
    assert_eq!(guest["module_name"], "7-web1");
    assert_eq!(guest["link"], "libvirt:web1");
    assert_eq!(guest["driver"], "driver");
    let (_, shown, _) = world.ctl(&["vm", "show", "7-web1"]);
    assert!(shown.contains("driver driver"), "{shown}");

    // What libvirt refuses is said.
    assert_eq!(world.ctl(&["balloon", "web1", "3G"]).0, Some(0));
    world.run_until("the refusal is said", |world| {
        let error = world.guests_json()["guests"][0]["error"].clone();
        error
            .as_str()
            .is_some_and(|error| error.contains("cannot set memory"))
            || error == Value::Null && libvirts() != format!("{}\n", 512 * M)
    });
    fs::write(programs.join("gone"), "").unwrap();
    world.run_until("its end is said", |world| {
        let error = world.guests_json()["guests"][0]["error"].clone();
        error
            .as_str()
            .is_some_and(|error| error.contains("domain is not running"))
    });
    fs::remove_file(programs.join("gone")).unwrap();
    fs::remove_file(programs.join("virsh")).unwrap();
    drop(daemon);
}

/// An agent in whose guest the file holds what a test puts there.
fn fake_agent(path: &Path, file: Arc<Mutex<Option<String>>>) {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let reader = BufReader::new(stream.try_clone().unwrap());
            for line in reader.split(b'\n') {
                let Ok(line) = line else { break };
                let line: Vec<u8> = line.into_iter().filter(|byte| *byte != 0xff).collect();
                let question: Value = serde_json::from_slice(&line).unwrap();
                let file = file.lock().unwrap().clone();
                let answer = match (question["execute"].as_str().unwrap(), file) {
                    ("guest-sync-delimited", _) => {
                        stream.write_all(b"\xff").unwrap();
                        json!({"return": question["arguments"]["id"]})
                    }
                    ("guest-file-open", None) => {
                        json!({"error": {"class": "GenericError", "desc": "No such file or directory"}})
                    }
                    ("guest-file-open", _) => json!({"return": 1000}),
                    ("guest-file-read", Some(text)) => json!({"return": {"buf-b64": text}}),
                    _ => json!({"return": {}}),
                };
                if writeln!(stream, "{answer}").is_err() {
                    break;
                }
            }
        }
    });
}

#[test]
fn a_guest_asks_for_a_size() {
    let mut world = World::new(4096 * M);
    let a = world.guest("a", 1024 * M, 64 * M);
    let file = Arc::new(Mutex::new(None));
    let agent = world.tree.root().join("a.agent");
    fake_agent(&agent, Arc::clone(&file));
    let settings = format!(
        "\"2G\"\nguest_control = true\nagent = \"{}\"",
        agent.display()
    );
    world.config(&CONFIG.replacen("\"2G\"", &settings, 1));
    let _daemon = world.daemon(&[], None);
    world.run_until("its policy sizes it", |_| size(&a) == 512 * M);
    let put = |text: &str| *file.lock().unwrap() = Some(text.to_owned());
    put("MTUwME0K"); // 1500M
    world.run_until("it has what it asks for", |_| size(&a) == 1500 * M);
    let guest = world.guests_json()["guests"][0].clone();
    assert_eq!(
        (&guest["by_guest"], &guest["guest_asks_kb"]),
        (&true.into(), &(1500 * M).into())
    );
    let (_, said, _) = world.ctl(&["explain", "a"]);
    let words: Vec<&str> = said.split_whitespace().collect();
    let said = words.join(" ");
    assert!(said.contains("asked for by the guest's root"), "{said}");
    // The operator goes first.
    assert_eq!(world.ctl(&["balloon", "a", "700M"]).0, Some(0));
    world.run_until("by hand", |_| size(&a) == 700 * M);
    assert_eq!(world.ctl(&["release", "a"]).0, Some(0));
    // Beyond its bounds it gets nothing, and is told of.
    put("OEcK"); // 8G
    world.run_until("its policy again", |world| {
        let error = world.guests_json()["guests"][0]["error"].clone();
        let error = error.as_str().unwrap_or("");
        error.contains("guest_control: 8G is not within 512M and 2G") && size(&a) <= 560 * M
    });
    put("bG90cw=="); // lots
    world.run_until("nonsense is said", |world| {
        let error = world.guests_json()["guests"][0]["error"].clone();
        error
            .as_str()
            .unwrap_or("")
            .contains("`lots`, which is no size")
    });
    // It excludes AMR.
    let (code, _, complaint) = world.ctl(&["vm", "set", "a", "amr", "on"]);
    assert!(
        code == Some(1) && complaint.contains("guest_control excludes amr"),
        "{complaint}"
    );
}
