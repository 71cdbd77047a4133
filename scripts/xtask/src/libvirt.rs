// SPDX-License-Identifier: GPL-2.0

//! A guest that Debian's libvirtd runs: its configuration and its nested directories as they
//! are on a real host, QEMU as the unprivileged user of the package.

use crate::env::{read, target};
use crate::inside::{fast, number, sh, until, Fs, Mount, BOOT, SOON};
use anyhow::{ensure, Context, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const MEMORY: &str = "/run/thinram-libvirt";
/// What QEMU reads, where its user may read.
const FILES: &str = "/run/libvirt-guest";
const GUEST: &str = "web1";
const USER: &str = "libvirt-qemu";
const GROUP: &str = "kvm";
const GUEST_MIB: u64 = 96;

/// The daemons, and what they keep on disk: on tmpfs, as the root is shared with other hosts.
struct Libvirt {
    daemons: Vec<Child>,
    _state: Vec<Mount>,
}

impl Libvirt {
    fn start() -> Result<Self> {
        let mut state = Vec::new();
        for dir in ["/etc", "/var/lib", "/var/cache", "/var/log"] {
            state.push(Mount::new(Fs::Tmpfs, format!("{dir}/libvirt"), None)?);
        }
        // There is neither cgroup v1 nor AppArmor in the host, and no polkit to ask.
        let qemu = format!(
            "user = \"{USER}\"\ngroup = \"{GROUP}\"\nsecurity_driver = \"none\"\n\
             cgroup_controllers = []\nmemory_backing_dir = \"{MEMORY}\"\n"
        );
        fs::write("/etc/libvirt/qemu.conf", qemu)?;
        fs::write("/etc/libvirt/libvirtd.conf", "auth_unix_rw = \"none\"\n")?;
        let mut libvirt = Self {
            daemons: Vec::new(),
            _state: state,
        };
        for (name, socket) in [("virtlogd", "virtlogd-sock"), ("libvirtd", "libvirt-sock")] {
            let log = fs::File::create(Path::new(FILES).join(format!("{name}.log")))?;
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig", "KILL", "--", name]);
            command.stdin(Stdio::null()).stdout(log.try_clone()?);
            let child = command.stderr(log).spawn();
            libvirt.daemons.push(child.context(name)?);
            let socket = Path::new("/run/libvirt").join(socket);
            until(name, SOON, || Ok(socket.exists()))?;
        }
        Ok(libvirt)
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        // QEMU outlives libvirtd, so it goes first, also when the case failed.
        if let Ok(pid) = qemu_pid() {
            let _ = sh(Command::new("kill").args(["-KILL", &pid.to_string()]));
        }
        for daemon in self.daemons.iter_mut().rev() {
            let pid = daemon.id().to_string();
            let ended = || Ok(daemon.try_wait()?.is_some());
            let asked = sh(Command::new("kill").arg(pid));
            if asked.is_err() || until("end", Duration::from_secs(10), ended).is_err() {
                let _ = daemon.kill();
                let _ = daemon.wait();
            }
        }
    }
}

fn virsh(args: &[&str]) -> Result<String> {
    sh(Command::new("virsh")
        .args(["-q", "-c", "qemu:///system"])
        .args(args))
}

fn qemu_pid() -> Result<u64> {
    let path = format!("/run/libvirt/qemu/{GUEST}.pid");
    let text = read(&path)?;
    text.trim()
        .parse()
        .with_context(|| format!("{path}: {text}"))
}

fn id(flag: &str) -> Result<String> {
    Ok(sh(Command::new("id").args([flag, USER]))?
        .trim()
        .to_string())
}

/// Two loads of the same content, so that there is something to share in one guest. They stop
/// by themselves: a console on a file takes no input.
const RUN: &str = "load() { (sleep 20; echo stop) | guest-load web1 16; }; \
                   load &amp; load &amp; wait; sleep 600";
const LOADS: usize = 2;

fn domain() -> String {
    format!(
        "<domain type='kvm'><name>{GUEST}</name><memory unit='MiB'>{GUEST_MIB}</memory>
         <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>
         <os><type arch='x86_64' machine='q35'>hvm</type>
           <kernel>{FILES}/small.vmlinuz</kernel><initrd>{FILES}/small.initrd</initrd>
           <cmdline>console=ttyS0 quiet panic=-1 reboot=t tsc=reliable no_timer_check RUN=\"{RUN}\"\
</cmdline></os>
         <features><acpi/></features><cpu mode='host-passthrough'/>
         <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
           <controller type='usb' model='none'/><memballoon model='virtio'/>
           <serial type='file'><source path='{FILES}/console.log'/></serial></devices></domain>"
    )
}

/// The lines of the guest's console; of one that is still being written nothing.
fn console() -> Vec<String> {
    let text = fs::read(Path::new(FILES).join("console.log")).unwrap_or_default();
    whole_lines(&String::from_utf8_lossy(&text))
}

/// The lines that have an end.
fn whole_lines(text: &str) -> Vec<String> {
    let whole = text.split_inclusive('\n').filter(|l| l.ends_with('\n'));
    whole.map(|l| l.trim_end().to_string()).collect()
}

/// Waits for `count` lines with `what` on the console.
fn wait(what: &str, count: usize, limit: Duration) -> Result<()> {
    let seen = || console().iter().filter(|l| l.contains(what)).count();
    let waited = until(what, limit, || Ok(seen() >= count));
    waited.with_context(|| {
        let lines = console();
        let last = lines[lines.len().saturating_sub(4)..].join(" | ");
        let log = read(format!("/var/log/libvirt/qemu/{GUEST}.log")).unwrap_or_default();
        let said = log.lines().last().unwrap_or("nothing").to_string();
        format!("{GUEST} under libvirt, console: {last}; QEMU: {said}")
    })
}

/// QEMU is the owner that sysfs names, and has only the rights of `uid`.
fn check_owner(vm: &str, uid: &str) -> Result<()> {
    let pid = qemu_pid()?;
    let owner = number(&format!("vms/{vm}/owner_pid"))?;
    ensure!(owner == pid, "owner_pid is {owner}, QEMU is {pid}");
    let exe = fs::read_link(format!("/proc/{pid}/exe"))?;
    ensure!(
        exe.ends_with("qemu-system-x86_64"),
        "process {pid} is {}",
        exe.display()
    );
    let status = read(format!("/proc/{pid}/status"))?;
    let ids = status.lines().find_map(|l| l.strip_prefix("Uid:"));
    let ids: Vec<&str> = ids.unwrap_or("").split_whitespace().collect();
    ensure!(
        uid != "0" && ids == [uid; 4],
        "QEMU runs as {ids:?}, not as {uid}"
    );
    Ok(())
}

/// libvirt makes, runs and destroys a guest whose memory lies on the mount.
pub fn guest() -> Result<()> {
    let (uid, gid) = (id("-u")?, id("-g")?);
    sh(Command::new("chown").args([&format!("root:{gid}"), "/dev/kvm"]))?;
    fs::set_permissions("/dev/kvm", fs::Permissions::from_mode(0o660))?;
    fs::create_dir_all(FILES)?;
    for name in ["small.vmlinuz", "small.initrd"] {
        fs::copy(target("guests").join(name), Path::new(FILES).join(name))?;
    }
    let xml = format!("{FILES}/domain.xml");
    fs::write(&xml, domain())?;

    // As the README says.
    fs::create_dir_all(MEMORY)?;
    let options = format!("domain=lab,uid={uid},gid={gid}");
    sh(Command::new("mount").args(["-t", "thinram", "-o", &options, "thinram", MEMORY]))?;
    let mount = Mount {
        fs: Fs::Thinram,
        path: MEMORY.into(),
    };
    let libvirt = Libvirt::start()?;
    virsh(&["create", &xml])?;
    let vm = format!("{}-{GUEST}", virsh(&["domid", GUEST])?.trim());
    let dir = mount.path.join("libvirt/qemu").join(&vm);
    ensure!(dir.is_dir(), "libvirt did not make {}", dir.display());
    check_owner(&vm, &uid)?;
    let size = number(&format!("vms/{vm}/size_kb"))?;
    ensure!(
        size == GUEST_MIB * 1024,
        "size_kb of {vm} is {size}, want {}",
        GUEST_MIB * 1024
    );

    wait("guest: up ", 1, BOOT)?;
    fast()?;
    wait("guest-load: pass=1 ", LOADS, SOON)?;
    for state in ["private_kb", "shared_kb", "zero_kb"] {
        until(&format!("{state} of {vm}"), SOON, || {
            Ok(number(&format!("vms/{vm}/{state}"))? > 0)
        })?;
    }
    wait("guest-load: end ", LOADS, SOON)?;
    let lines = console();
    let intact = lines.iter().filter(|l| l.contains("verdict=intact"));
    ensure!(
        intact.count() == LOADS && !lines.iter().any(|l| l.contains("CORRUPT")),
        "{GUEST} found its memory corrupt: {lines:?}"
    );
    crate::balloons::of_libvirt(GUEST, &vm, GUEST_MIB)?;

    virsh(&["destroy", GUEST])?;
    let sysfs = Path::new("/sys/fs/thinram/vms").join(&vm);
    until("end of the destroyed guest's memory", SOON, || {
        Ok(!sysfs.exists() && !dir.exists() && number("shared_frames_kb")? == 0)
    })?;
    drop(libvirt);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::whole_lines;

    #[test]
    fn half_a_line_says_nothing() {
        let text = "pass 1\r\nend passes=29 bad=0 ok\n";
        assert_eq!(whole_lines(text), ["pass 1", "end passes=29 bad=0 ok"]);
        // Without its verdict a guest has not said that its memory is corrupt.
        for cut in 8..text.len() {
            assert_eq!(whole_lines(&text[..cut]), ["pass 1"], "{cut}");
        }
        assert!(whole_lines("").is_empty());
    }
}
