// SPDX-License-Identifier: GPL-2.0

//! Finds a VM's QMP socket in the command line of its QEMU.

use super::link::Way;
use crate::agent;
use crate::virsh::Domain;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

/// Characters that libvirt keeps of a domain's name for its directories.
const LIBVIRT_NAME: usize = 20;

/// The module's name of a VM: its own, or what libvirt makes of it, `7-web1`.
pub fn module_name<'a>(names: impl Iterator<Item = &'a OsStr>, wanted: &str) -> Option<&'a OsStr> {
    let short: String = wanted.chars().take(LIBVIRT_NAME).collect();
    let mut best = None;
    for name in names {
        if name == OsStr::new(wanted) {
            return Some(name);
        }
        let parts = name.to_str().and_then(|name| name.split_once('-'));
        let number = parts.filter(|(_, rest)| *rest == short).map(|(id, _)| id);
        let Some(id) = number.and_then(|id| id.parse::<u64>().ok()) else {
            continue;
        };
        // The last one that was started is the one that runs.
        if best.is_none_or(|(last, _)| id > last) {
            best = Some((id, name));
        }
    }
    best.map(|(_, name)| name)
}

/// The arguments of a process; `None` where it is gone or they are no text.
pub(super) fn arguments(root: &Path, pid: u64) -> Option<Vec<String>> {
    let line = fs::read(root.join(format!("proc/{pid}/cmdline"))).ok()?;
    let line = String::from_utf8(line).ok()?;
    Some(line.split('\0').map(str::to_owned).collect())
}

/// How the balloon of a process's VM is reached; `None` where there is no way for us.
pub(super) fn way_of(root: &Path, pid: u64) -> Option<Way> {
    let words = arguments(root, pid)?;
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match qmp_of_command_line(&words) {
        Some(path) => Some(Way::Qmp(absolute(root, pid, path)?)),
        None => domain_of_command_line(&words).map(Way::Libvirt),
    }
}

/// How the guest agent of a process's VM is reached.
pub(super) fn agent_of(root: &Path, pid: u64) -> Option<agent::Way> {
    let words = arguments(root, pid)?;
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    if let Some(domain) = domain_of_command_line(&words) {
        return Some(agent::Way::Libvirt(domain));
    }
    let path = agent_of_command_line(&words)?;
    Some(agent::Way::Socket(absolute(root, pid, path)?))
}

/// A path as the process sees it.
fn absolute(root: &Path, pid: u64, path: PathBuf) -> Option<PathBuf> {
    if path.is_absolute() {
        return Some(path);
    }
    let home = fs::read_link(root.join(format!("proc/{pid}/cwd"))).ok()?;
    Some(home.join(path))
}

/// The domain of a QEMU whose monitor is libvirt's.
fn domain_of_command_line(words: &[&str]) -> Option<Domain> {
    let pairs = || words.windows(2).map(|pair| (pair[0], pair[1]));
    let is_its = pairs().any(|(option, value)| {
        option == "-mon" && setting(value, "chardev") == Some("charmonitor")
    });
    let name = pairs().find(|(option, _)| *option == "-name")?.1;
    let name = name.strip_prefix("guest=").filter(|_| is_its)?;
    // A comma in a name is written twice.
    let mut out = String::new();
    let mut chars = name.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            break;
        }
        out.push(c);
    }
    Some(Domain(out))
}

/// The socket of the port that the guest agent listens on.
fn agent_of_command_line(words: &[&str]) -> Option<PathBuf> {
    let pairs = || words.windows(2).map(|pair| (pair[0], pair[1]));
    let port = pairs().find(|(option, value)| {
        *option == "-device"
            && value.starts_with("virtserialport")
            && setting(value, "name") == Some("org.qemu.guest_agent.0")
    })?;
    let id = setting(port.1, "chardev")?;
    let socket = pairs().find(|(option, value)| {
        *option == "-chardev" && value.starts_with("socket,") && setting(value, "id") == Some(id)
    })?;
    usable(setting(socket.1, "path")?)
}

/// The listening QMP socket that QEMU's arguments name: `-qmp unix:PATH,...`, or a `-mon` in control
/// mode on a socket `-chardev`. One that libvirt made is libvirt's own and is passed over.
pub fn qmp_of_command_line(words: &[&str]) -> Option<PathBuf> {
    let mut chardevs: HashMap<&str, &str> = HashMap::new();
    let mut monitors = Vec::new();
    for pair in words.windows(2) {
        let [option, value] = [pair[0], pair[1]];
        match option.trim_start_matches('-') {
            "qmp" | "qmp-pretty" if option.starts_with('-') => {
                if let Some(path) = value.strip_prefix("unix:") {
                    return usable(path.split(',').next()?);
                }
                monitors.extend(value.strip_prefix("chardev:"));
            }
            "chardev" if value.starts_with("socket,") => {
                if let (Some(id), Some(path)) = (setting(value, "id"), setting(value, "path")) {
                    chardevs.insert(id, path);
                }
            }
            "mon" if setting(value, "mode") == Some("control") => {
                monitors.extend(setting(value, "chardev").or_else(|| value.split(',').next()));
            }
            _ => {}
        }
    }
    monitors
        .into_iter()
        .find_map(|id| usable(chardevs.get(id)?))
}

fn setting<'a>(options: &'a str, key: &str) -> Option<&'a str> {
    options
        .split(',')
        .find_map(|option| option.strip_prefix(key)?.strip_prefix('='))
}

fn usable(path: &str) -> Option<PathBuf> {
    (!path.is_empty() && !path.contains("/libvirt/")).then(|| PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn find(line: &str) -> Option<String> {
        let words: Vec<&str> = line.split(' ').collect();
        qmp_of_command_line(&words).map(|path| path.to_str().unwrap().to_owned())
    }

    #[test]
    fn sockets_on_command_lines() {
        let plain = "qemu -m 1G -qmp unix:/run/a.qmp,server=on,wait=off -nographic";
        assert_eq!(find(plain).as_deref(), Some("/run/a.qmp"));
        let mon = "qemu -chardev socket,id=m0,path=/run/b,server=on -chardev stdio,id=x -mon chardev=m0,mode=control";
        assert_eq!(find(mon).as_deref(), Some("/run/b"));
        let short = "qemu --chardev socket,path=rel.sock,id=m0 --qmp chardev:m0";
        assert_eq!(find(short).as_deref(), Some("rel.sock"));
        for none in [
            "qemu -m 1G",
            "qemu -qmp tcp:localhost:4444",
            "qemu -qmp",
            "qemu -chardev socket,id=m0,path=/run/b -mon chardev=m0,mode=readline",
            "qemu -mon chardev=gone,mode=control",
            "qemu -chardev socket,id=m,path=/var/lib/libvirt/qemu/d/monitor.sock -mon chardev=m,mode=control",
        ] {
            assert_eq!(find(none), None, "{none}");
        }
    }

    #[test]
    fn names_of_the_module() {
        let names = [
            "3-web1",
            "12-web1",
            "web2",
            "4-web2",
            "x-web3",
            "7-a-name-of-more-than-",
        ];
        let find = |wanted| {
            let names = names.iter().map(OsStr::new);
            module_name(names, wanted).map(|name| name.to_str().unwrap().to_owned())
        };
        assert_eq!(find("web1").as_deref(), Some("12-web1"));
        assert_eq!(find("web2").as_deref(), Some("web2"));
        assert_eq!(find("web3"), None);
        assert_eq!(find("3-web1").as_deref(), Some("3-web1"));
        let long = find("a-name-of-more-than-twenty-letters");
        assert_eq!(long.as_deref(), Some("7-a-name-of-more-than-"));
    }

    #[test]
    fn of_a_process() {
        use std::os::unix::fs::symlink;
        let root = tempfile::TempDir::new().unwrap();
        let dir = root.path().join("proc/7");
        fs::create_dir_all(&dir).unwrap();
        assert_eq!(way_of(root.path(), 7), None);
        fs::write(dir.join("cmdline"), b"qemu\0-qmp\0unix:a.qmp\0").unwrap();
        assert_eq!(way_of(root.path(), 7), None);
        symlink("/run/vm", dir.join("cwd")).unwrap();
        let found = Way::Qmp(PathBuf::from("/run/vm/a.qmp"));
        assert_eq!(way_of(root.path(), 7), Some(found));
        fs::write(dir.join("cmdline"), b"\xff\0-qmp\0unix:a.qmp\0").unwrap();
        assert_eq!(way_of(root.path(), 7), None);
    }

    #[test]
    fn domains_of_libvirt() {
        let words = "qemu -name guest=web,,1,debug-threads=on -chardev \
                     socket,id=charmonitor,fd=23,server=on -mon \
                     chardev=charmonitor,id=monitor,mode=control";
        let words: Vec<&str> = words.split_whitespace().collect();
        assert_eq!(qmp_of_command_line(&words), None);
        assert_eq!(domain_of_command_line(&words), Some(Domain("web,1".into())));
        assert_eq!(domain_of_command_line(&words[..3]), None);
        assert_eq!(domain_of_command_line(&["qemu", "-name", "web1"]), None);
    }

    #[test]
    fn sockets_of_agents() {
        let words = "qemu -chardev socket,path=/run/a.agent,server=on,wait=off,id=qga0 -device \
                     virtio-serial -device virtserialport,chardev=qga0,name=org.qemu.guest_agent.0";
        let words: Vec<&str> = words.split_whitespace().collect();
        let found = agent_of_command_line(&words);
        assert_eq!(found, Some(PathBuf::from("/run/a.agent")));
        assert_eq!(agent_of_command_line(&words[..6]), None);
        assert_eq!(agent_of_command_line(&words[3..]), None);
    }

    proptest! {
        #[test]
        fn no_command_line_panics(words in prop::collection::vec("-qmp|-mon|-chardev|-name|-device|unix:[/a,]{0,5}|socket,id=[ab],path=/[a-z/,]{0,4}|chardev=[ab],mode=control|guest=[a,]{0,6}|\\PC{0,9}", 0..10)) {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            if let Some(path) = qmp_of_command_line(&words) {
                let path = path.to_str().unwrap();
                prop_assert!(!path.is_empty() && words.iter().any(|word| word.contains(path)));
            }
            prop_assert!(domain_of_command_line(&words).is_none(), "no monitor is libvirt's here");
            let _ = agent_of_command_line(&words);
        }

        #[test]
        fn names_of_domains_come_back(name in "[a-z,=]{1,12}") {
            let guest = format!("guest={},debug-threads=on", name.replace(',', ",,"));
            let words = ["-name", &guest, "-mon", "chardev=charmonitor,id=monitor"];
            prop_assert_eq!(domain_of_command_line(&words), Some(Domain(name)));
        }
    }
}
