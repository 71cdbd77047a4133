// SPDX-License-Identifier: GPL-2.0

//! The daemon of `thinramctl` with real guests: it finds them by itself, moves their balloons to
//! where pressure is, and what goes wrong with one of them holds up nobody else.

use crate::env::target;
use crate::guest::{Guest, Kind, Spec};
use crate::inside::{number, set, sh, until, Fs, Mount, BOOT, MOUNT, SOON};
use anyhow::{bail, ensure, Context, Result};
use serde_json::Value;
use std::fs;
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};

const CONFIG: &str = "/run/balloons.toml";
const LOG: &str = "/run/balloons.log";
const HANGING: &str = "/run/hanging.qmp";
/// Kept by the operating system in a file that only root sees; what the daemon was told.
const TOLD: &str = "/run/thinramctl.json";
const SIZE_MIB: u64 = 160;
const MIN_MIB: u64 = 88;
/// The stock kernel's guest.
const STOCK_MIB: u64 = 320;
/// Where the agent of a guest is reached.
const AGENT: &str = "/run/web4.agent";
const MIB: u64 = 1024;

/// Nothing merges while this lives, so that memory moves by balloons alone.
struct Unmerged;

impl Unmerged {
    fn new() -> Result<Self> {
        set("run", "0")?;
        Ok(Self)
    }
}

impl Drop for Unmerged {
    fn drop(&mut self) {
        if let Err(e) = set("run", "1") {
            eprintln!("# {e:#}");
        }
    }
}

fn ctl(args: &[&str]) -> Result<(Option<i32>, String, String)> {
    let mut command = Command::new(target("sysroot/release/thinramctl"));
    let output = command.args(args).output().context("thinramctl")?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let code = output.status.code();
    Ok((code, text(&output.stdout), text(&output.stderr)))
}

/// What a command prints as JSON.
fn json(args: &[&str]) -> Result<Value> {
    let (code, out, complaint) = ctl(args)?;
    ensure!(code == Some(0), "thinramctl {args:?}: {code:?} {complaint}");
    serde_json::from_str(&out).with_context(|| format!("thinramctl {args:?}: {out}"))
}

/// What the daemon says about a guest.
fn told(vm: &str) -> Result<Value> {
    let report = json(&["guests", "--json"])?;
    let guests = report["guests"].as_array().context("guests")?;
    let guest = guests.iter().find(|guest| guest["name"] == vm);
    Ok(guest.with_context(|| format!("{vm} is not told"))?.clone())
}

fn current_mib(vm: &str) -> Result<u64> {
    Ok(told(vm)?["current_kb"].as_u64().unwrap_or(0) / MIB)
}

fn resident(vm: &str) -> Result<u64> {
    number(&format!("vms/{vm}/resident_kb"))
}

fn available() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let number = line.and_then(|l| l.split_whitespace().next());
    number
        .and_then(|n| n.parse().ok())
        .context("no MemAvailable in /proc/meminfo")
}

struct Daemon(Child);

impl Daemon {
    fn start() -> Result<Self> {
        let log = fs::OpenOptions::new().create(true).append(true).open(LOG)?;
        let mut command = Command::new(target("sysroot/release/thinramctl"));
        command.args(["daemon", "--config", CONFIG]);
        command.stdin(Stdio::null()).stderr(log);
        let daemon = Self(command.spawn().context("thinramctl daemon")?);
        until("answer of the daemon", SOON, || {
            Ok(ctl(&["guests"])?.0 == Some(0))
        })?;
        Ok(daemon)
    }

    fn signal(&self, signal: &str) -> Result<()> {
        let pid = self.0.id().to_string();
        sh(Command::new("kill").args([signal, &pid])).map(|_| ())
    }

    /// Ends it politely; it must say that all is well.
    fn end(mut self) -> Result<()> {
        self.signal("-TERM")?;
        let status = self.0.wait()?;
        ensure!(status.success(), "the daemon ended with {status}");
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn guest(mount: &Mount, name: &str, run: &str) -> Result<Guest> {
    let dir = mount.vm(name)?;
    let mut spec = Spec::new(name, Kind::Small, SIZE_MIB, &dir, 16);
    // So whatever the balloon takes is the host's to have.
    spec.backends[0] += ",prealloc=on";
    spec.args = vec!["-device".into(), "virtio-balloon-device".into()];
    spec.append = format!("RUN=\"{run}\"");
    Guest::start(&spec)
}

fn says(guest: &mut Guest, word: &str) -> Result<()> {
    guest.wait(word, BOOT, |g| {
        g.lines()
            .iter()
            .any(|l| l.contains(&format!("guest: {word}")))
    })
}

/// A guest of the stock kernel that has a balloon, and has not loaded the driver of it.
fn guest_without_driver(mount: &Mount, name: &str) -> Result<Guest> {
    let mut spec = Spec::new(name, Kind::Stock, STOCK_MIB, &mount.vm(name)?, 16);
    spec.backends[0] += ",prealloc=on";
    spec.args = vec!["-device".into(), "virtio-balloon-pci".into()];
    spec.append = "MODULES=none RUN=\"[ -e /sys/bus/virtio/drivers/virtio_balloon ] || \
                   echo guest: bare; read go\""
        .into();
    Guest::start(&spec)
}

/// Needs little.
const IDLE: &str = "echo guest: idle; read go; echo guest: ended";
/// Grows by and by to more than it was left with, so that the balloon has to follow, and can.
const GROWS: &str = "mount -o remount,size=150M /tmp; echo guest: idle; read go; i=0; \
                     while [ $i -lt 20 ]; do \
                     dd if=/dev/urandom of=/tmp/p$i bs=1M count=5 2>/dev/null; i=$((i+1)); sleep 2; \
                     done; echo guest: grown; read go; echo guest: ended";

/// Asks for a size as its root, for a silly one, and for none.
const ASKS: &str = "mkdir -p /run; qemu-ga -m isa-serial -p /dev/ttyS1 -t /run -f /run/ga.pid & \
                    read kb; echo $kb >/run/thinram-size; read kb; echo $kb >/run/thinram-size; \
                    read kb; rm /run/thinram-size; read go; echo guest: ended";

fn host_table(policy: &str, slush_kb: u64) -> String {
    format!("[host]\npolicy = \"{policy}\"\ninterval_s = 2\nslush = \"{slush_kb}K\"\n")
}

fn vm_table(name: &str, min_mib: u64, max_mib: u64) -> String {
    format!(
        "[[vm]]\nname = \"{name}\"\ndynamic_min = \"{min_mib}M\"\ndynamic_max = \"{max_mib}M\"\n\
         buffer_percent = 100\n"
    )
}

fn configure(policy: &str, slush_kb: u64) -> Result<()> {
    let mut text = host_table(policy, slush_kb);
    // Nobody names their sockets: the daemon finds them.
    for vm in ["web1", "web2"] {
        text += &vm_table(vm, MIN_MIB, SIZE_MIB);
    }
    text += &vm_table("web3", STOCK_MIB / 2, STOCK_MIB);
    text += &format!(
        "[[vm]]\nname = \"hangs\"\nqmp = \"{HANGING}\"\ndynamic_min = \"64M\"\n\
         dynamic_max = \"64M\"\n"
    );
    fs::write(CONFIG, text).context(CONFIG)
}

/// The last lines of the daemon's log, for a failure.
fn with_log(result: Result<()>) -> Result<()> {
    result.map_err(|error| {
        let log = fs::read_to_string(LOG).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let last = lines[lines.len().saturating_sub(12)..].join(" | ");
        error.context(format!("the daemon said: {last}"))
    })
}

/// Two guests, one of which gets under pressure, and others with which something is wrong.
pub fn daemon() -> Result<()> {
    for path in [LOG, TOLD, HANGING] {
        let _ = fs::remove_file(path);
    }
    let mount = Mount::new(Fs::Thinram, MOUNT, Some("lab"))?;
    let _unmerged = Unmerged::new()?;
    let mut idle = guest(&mount, "web1", IDLE)?;
    let mut grows = guest(&mount, "web2", GROWS)?;
    says(&mut idle, "idle")?;
    says(&mut grows, "idle")?;
    common_memory_is_estimated()?;

    let mut bare = guest_without_driver(&mount, "web3")?;
    says(&mut bare, "bare")?;
    let hanging = UnixListener::bind(HANGING)?;
    configure("pressure", available()?.saturating_sub(40 * MIB))?;
    let daemon = Daemon::start()?;
    with_log(moves(&mut grows, &hanging))?;

    // Killed at any moment, the next one goes on from what is.
    let before = (current_mib("web1")?, current_mib("web2")?);
    drop(daemon);
    let daemon = Daemon::start()?;
    let same = || {
        let now = (current_mib("web1")?, current_mib("web2")?);
        ensure!(
            now.0 == 0 || now.0.abs_diff(before.0) <= 16,
            "web1 went from {} to {} MiB by a restart",
            before.0,
            now.0
        );
        Ok(now.0 > 0 && now.1 > 0)
    };
    with_log(until("guests of the next daemon", SOON, same))?;
    with_log(a_guest_is_killed(&mount, grows))?;
    with_log(a_cap_is_a_limit())?;
    with_log(shares_give_what_there_is(&daemon))?;
    with_log(a_short_host_wakes(&daemon))?;
    drop(bare);
    daemon.end()?;
    idle.type_line("end")?;
    idle.ended(SOON)?;
    fs::remove_file(TOLD).context(TOLD)
}

/// Both guests run the same kernel, so they have a good deal in common; nothing is merged by that.
fn common_memory_is_estimated() -> Result<()> {
    let estimate = json(&["estimate", "--json"])?;
    let common = estimate["pairs"][0]["saved_kb"].as_u64().unwrap_or(0);
    ensure!(
        common >= 2 * MIB,
        "two guests have only {common} kB in common: {estimate}"
    );
    ensure!(number("pages_sharing")? == 0, "the estimate merged pages");
    let status = json(&["status", "--json"])?;
    ensure!(
        status["estimate"]["pairs"] == estimate["pairs"],
        "status has no estimate"
    );
    Ok(())
}

fn moves(grows: &mut Guest, hanging: &UnixListener) -> Result<()> {
    hanging.set_nonblocking(true)?;
    let mut held = Vec::new();
    let (before, room) = (resident("web1")?, available()?);
    // Both need less than they have: it is taken, and arrives at the host.
    until("memory from idle guests", SOON, || {
        held.extend(hanging.accept().ok());
        let both = [told("web1"), told("web2")];
        Ok(both.iter().flatten().all(|guest| {
            guest["driver"] == "driver"
                && guest["current_kb"]
                    .as_u64()
                    .is_some_and(|kb| kb <= 112 * MIB)
        }))
    })?;
    let arrived = until("its arrival at the host", SOON, || {
        Ok(resident("web1")? + 40 * MIB <= before && available()? >= room + 40 * MIB)
    });
    arrived.with_context(|| {
        format!(
            "web1 held {before} kB and holds {:?}, available were {room} kB and are {:?}",
            resident("web1"),
            available()
        )
    })?;

    // One comes under pressure and gets what the other one gave.
    let small = resident("web2")?;
    let had = current_mib("web2")?;
    grows.type_line("go")?;
    until("memory for the guest under pressure", SOON, || {
        held.extend(hanging.accept().ok());
        Ok(current_mib("web2")? >= had + 12 && resident("web2")? >= small + 12 * MIB)
    })
    .with_context(|| format!("{:?}, console {:?}", told("web2"), grows.lines().last()))?;
    ensure!(
        current_mib("web1")? <= 112,
        "the idle guest got memory as well: {}",
        told("web1")?
    );
    says(grows, "grown")?;

    let web3 = told("web3")?;
    ensure!(web3["driver"] == "any", "a guest without a driver: {web3}");
    let said = told("hangs")?["error"].as_str().unwrap_or("").to_owned();
    ensure!(said.contains("no answer"), "a socket that hangs: {said}");
    let (code, _, why) = ctl(&["admit", "--min", "64G"])?;
    ensure!(
        code == Some(3) && why.contains("the minima do not fit"),
        "{code:?} {why}"
    );
    let (code, explained, _) = ctl(&["explain", "web2"])?;
    ensure!(
        code == Some(0) && explained.contains("demand"),
        "{explained}"
    );
    Ok(())
}

/// QEMU ends in the middle; the others go on, and a new one of that name is found.
fn a_guest_is_killed(mount: &Mount, victim: Guest) -> Result<()> {
    let (code, _, why) = ctl(&["balloon", "web2", &format!("{MIN_MIB}M")])?;
    ensure!(code == Some(0), "{why}");
    drop(victim);
    let (code, _, why) = ctl(&["balloon", "web1", "128M"])?;
    ensure!(code == Some(0), "{why}");
    until("the other guest's size by hand", SOON, || {
        Ok(current_mib("web1")? == 128)
    })?;
    until("the end of the killed guest", SOON, || {
        let guest = told("web2")?;
        Ok(guest["current_kb"].is_null() && !guest["error"].is_null())
    })?;
    let (code, _, why) = ctl(&["release", "web2"])?;
    ensure!(code == Some(0), "{why}");
    let mut again = guest(mount, "web2", IDLE)?;
    until("a new guest of that name", SOON, || {
        Ok(told("web2")?["current_kb"].as_u64().is_some())
    })?;
    says(&mut again, "idle")?;
    until("its size", SOON, || {
        Ok((MIN_MIB..=112).contains(&current_mib("web2")?))
    })?;
    if again.verdict() == Some(false) {
        bail!("its memory is corrupt");
    }
    Ok(())
}

/// The cap of a guest is the module's hard limit, and goes with it.
fn a_cap_is_a_limit() -> Result<()> {
    for (cap, limit_kb) in [("128M", 128 * MIB), ("default", 0)] {
        let (code, _, why) = ctl(&["vm", "set", "web1", "cap", cap])?;
        ensure!(code == Some(0), "cap {cap}: {why}");
        until("limit of the cap", SOON, || {
            Ok(number("vms/web1/limit_kb")? == limit_kb)
        })
        .with_context(|| format!("limit_kb is {:?}", number("vms/web1/limit_kb")))?;
    }
    Ok(())
}

/// Where `pressure` keeps what nobody needs, `shares` gives all that there is.
fn shares_give_what_there_is(daemon: &Daemon) -> Result<()> {
    let (code, _, why) = ctl(&["release", "web1"])?;
    ensure!(code == Some(0), "{why}");
    until("the idle guest's size under pressure", SOON, || {
        Ok(current_mib("web1")? <= 112)
    })?;
    configure("shares", 9 * MIB)?;
    daemon.signal("-HUP")?;
    until("all memory that shares give", SOON, || {
        // The last 16 MiB are within the dead band.
        Ok(current_mib("web1")? + 16 >= SIZE_MIB)
    })
    .with_context(|| format!("{:?}", told("web1")))?;
    let (_, explained, _) = ctl(&["explain", "web1"])?;
    ensure!(explained.contains("shares 1000"), "{explained}");
    Ok(())
}

/// A guest's root asks through QEMU's real guest agent.
pub fn guest_control() -> Result<()> {
    for path in [LOG, TOLD, AGENT] {
        let _ = fs::remove_file(path);
    }
    let mount = Mount::new(Fs::Thinram, MOUNT, Some("lab"))?;
    let mut spec = Spec::new("web4", Kind::SmallPc, SIZE_MIB, &mount.vm("web4")?, 16);
    spec.initrd = Some("agent");
    spec.append = format!("RUN=\"{ASKS}\"");
    let chardev = format!("socket,id=ga,path={AGENT},server=on,wait=off");
    spec.args = ["-device", "virtio-balloon-pci", "-chardev", &chardev]
        .into_iter()
        .chain(["-serial", "chardev:ga"])
        .map(String::from)
        .collect();
    let mut guest = Guest::start(&spec)?;
    guest.wait("boot", BOOT, Guest::booted)?;
    let text = host_table("pressure", 9 * MIB) + &vm_table("web4", MIN_MIB, SIZE_MIB);
    let text = text + &format!("guest_control = true\nagent = \"{AGENT}\"\n");
    fs::write(CONFIG, text).context(CONFIG)?;
    let daemon = Daemon::start()?;
    with_log(asks(&mut guest))?;
    daemon.end()?;
    guest.type_line("end")?;
    guest.ended(SOON).map(|_| ())
}

fn asks(guest: &mut Guest) -> Result<()> {
    let settled = |what: &str, done: fn(&Value) -> bool| {
        until(what, SOON, || Ok(done(&told("web4")?)))
            .with_context(|| format!("{:?}", told("web4")))
    };
    settled("policy's size", |web4| {
        web4["guest_control"] == true
            && web4["current_kb"]
                .as_u64()
                .is_some_and(|kb| kb > 0 && kb <= 112 * MIB)
    })?;
    guest.type_line("132M")?;
    settled("size that the guest asks for", |web4| {
        web4["guest_asks_kb"] == 132 * MIB
            && web4["by_guest"] == true
            && web4["current_kb"] == 132 * MIB
    })?;
    guest.type_line("9T")?;
    settled("refusal of too much", |web4| {
        web4["by_guest"] == false
            && web4["current_kb"]
                .as_u64()
                .is_some_and(|kb| kb <= 112 * MIB)
    })?;
    guest.type_line("nothing")?;
    settled("end of what it asks for", |web4| {
        web4["guest_asks_kb"].is_null()
    })
}

/// When the last decision about a guest was made, by the daemon's clock.
fn decided_s(vm: &str) -> Result<f64> {
    let explained = json(&["explain", vm, "--json"])?;
    let last = explained["decisions"].as_array().and_then(|all| all.last());
    last.and_then(|last| last["at_s"].as_f64())
        .with_context(|| format!("no decision about {vm}: {explained}"))
}

/// The module's state wakes a daemon that would not decide for an hour.
fn a_short_host_wakes(daemon: &Daemon) -> Result<()> {
    let text = fs::read_to_string(CONFIG)?.replace("interval_s = 2", "interval_s = 3600");
    fs::write(CONFIG, text)?;
    daemon.signal("-HUP")?;
    let mut last = decided_s("web1")?;
    until("end of decisions", SOON, || {
        std::thread::sleep(std::time::Duration::from_secs(5));
        let before = std::mem::replace(&mut last, decided_s("web1")?);
        Ok(before == last)
    })?;
    set("minfree_kb", &(available()? * 6 / 5).to_string())?;
    let woken = until("decision of a host that is short of memory", SOON, || {
        Ok(decided_s("web1")? > last)
    });
    let state = crate::env::read("/sys/fs/thinram/state");
    set("minfree_kb", "0")?;
    woken.with_context(|| format!("the module's state is {state:?}"))
}

/// The balloon of a domain whose QMP socket is libvirt's: `vm` is what libvirt made of its name. It
/// needs little of its `size_mib`.
pub fn of_libvirt(domain: &str, vm: &str, size_mib: u64) -> Result<()> {
    for path in [LOG, TOLD] {
        let _ = fs::remove_file(path);
    }
    let least = size_mib * 3 / 4;
    fs::write(
        CONFIG,
        format!(
            "[host]\npolicy = \"pressure\"\ninterval_s = 2\n[[vm]]\nname = \"{domain}\"\n\
             dynamic_min = \"{least}M\"\ndynamic_max = \"{size_mib}M\"\n"
        ),
    )?;
    let daemon = Daemon::start()?;
    let moved = until("balloon of a domain of libvirt", SOON, || {
        let guest = told(domain)?;
        Ok(guest["driver"] == "driver" && guest["current_kb"] == least * MIB)
    });
    with_log(moved.with_context(|| format!("{:?}", told(domain))))?;
    let guest = told(domain)?;
    ensure!(
        guest["link"] == format!("libvirt:{domain}") && guest["module_name"] == vm,
        "{vm} is reached otherwise: {guest}"
    );
    daemon.end()
}
