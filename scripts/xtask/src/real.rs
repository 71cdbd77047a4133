// SPDX-License-Identifier: GPL-2.0

//! What programs do to a guest's memory beside running the guest: migration, snapshots, memory
//! that comes and goes, packets, and a sudden end. The guest itself checks its data.

use crate::env::read;
use crate::guest::{Guest, Kind, Spec};
use crate::inside::{
    fast, load, modprobe, number, sh, unload, until, work, Ctx, Fs, Mount, BOOT, SOON,
};
use anyhow::{bail, ensure, Context, Result};
use serde_json::{json, Value};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const MIB: u64 = 96;
const LOAD_MIB: u64 = 24;

/// A guest on a folder.
fn on(dir: &Path) -> Spec {
    Spec::new("web1", Kind::Small, MIB, dir, LOAD_MIB)
}

/// The same on memory that has nothing to do with the module: a memfd.
fn on_plain() -> Spec {
    let mut spec = on(Path::new("-"));
    spec.backends = vec![format!("memory-backend-memfd,id=m0,size={MIB}M,share=on")];
    spec
}

/// The same, which waits for the state of another.
fn awaiting(mut spec: Spec) -> Spec {
    spec.args.extend(["-incoming".into(), "defer".into()]);
    spec
}

/// Waits until a migration is over, at either end.
fn until_moved(guest: &mut Guest) -> Result<()> {
    until("end of the migration", SOON, || {
        let told = guest.qmp("query-migrate", json!({}))?;
        match told["status"].as_str() {
            Some("failed") => bail!("the migration failed: {told}"),
            status => Ok(status == Some("completed")),
        }
    })
}

/// Sends the running guest `from` to `to`, and ends what is left of it.
fn migrate(mut from: Guest, to: &mut Guest) -> Result<()> {
    let uri = "unix:/run/migration";
    to.qmp("migrate-incoming", json!({ "uri": uri }))?;
    let parameters = json!({"max-bandwidth": 1u64 << 30, "downtime-limit": 5000});
    from.qmp("migrate-set-parameters", parameters)?;
    from.qmp("migrate", json!({ "uri": uri }))?;
    until_moved(&mut from)?;
    until_moved(to)?;
    // The load goes on counting where it was.
    let passes = from.passes();
    to.wait("passes after the migration", SOON, |g| {
        g.passes() > passes + 1
    })
}

/// Takes the verdict of a guest that did not boot here.
pub fn verdict(guest: &mut Guest) -> Result<()> {
    verdict_in(guest, SOON)
}

/// The same, with more or less time for it.
pub fn verdict_in(guest: &mut Guest, limit: Duration) -> Result<()> {
    ensure!(
        guest.finish(limit)?,
        "{} found its memory corrupt: {:?}",
        guest.name,
        guest.lines()
    );
    guest.ended(limit).map(drop)
}

/// A guest that has checked its data once.
pub fn booted(spec: &Spec) -> Result<Guest> {
    let mut guest = Guest::start(spec)?;
    guest.wait("boot", BOOT, Guest::booted)?;
    guest.wait("pass", SOON, |g| g.passes() >= 1)?;
    Ok(guest)
}

fn scan(ctx: &Ctx) -> Result<()> {
    match ctx.fs {
        Fs::Thinram => fast(),
        Fs::Tmpfs => Ok(()),
    }
}

/// Live, from a VM to another one, to plain memory, and back after the module was exchanged.
pub fn migration(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount()?;
    scan(ctx)?;
    let first = booted(&on(&mount.vm("web1")?))?;
    let mut second = Guest::start(&awaiting(on(&mount.vm("web1-new")?)))?;
    migrate(first, &mut second)?;
    until("memory of the guest that went", SOON, || {
        Ok(mount.resident_kb("web1").unwrap_or(0) == 0 || ctx.fs == Fs::Tmpfs)
    })?;
    let mut third = Guest::start(&awaiting(on_plain()))?;
    migrate(second, &mut third)?;
    drop(mount);
    unload(ctx.fs)?;
    load(ctx.fs)?;
    let mount = ctx.mount()?;
    scan(ctx)?;
    let mut fourth = Guest::start(&awaiting(on(&mount.vm("web1")?)))?;
    migrate(third, &mut fourth)?;
    verdict(&mut fourth)
}

/// To a file, and from it into another VM.
pub fn snapshot(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount()?;
    scan(ctx)?;
    let uri = "file:/run/disk/web1.state";
    let mut first = booted(&on(&mount.vm("web1")?))?;
    first.qmp("stop", json!({}))?;
    first.qmp("migrate", json!({ "uri": uri }))?;
    until_moved(&mut first)?;
    let passes = first.passes();
    drop(first);
    let mut second = Guest::start(&awaiting(on(&mount.vm("web2")?)))?;
    second.qmp("migrate-incoming", json!({ "uri": uri }))?;
    until_moved(&mut second)?;
    second.qmp("cont", json!({}))?;
    second.wait("pass", SOON, |g| g.passes() > passes + 1)?;
    fs::remove_file("/run/disk/web1.state")?;
    verdict(&mut second)
}

/// Runs a QMP job to its end.
fn job(guest: &mut Guest, command: &str, mut arguments: Value) -> Result<()> {
    arguments["job-id"] = json!("job");
    guest.qmp(command, arguments)?;
    until(command, SOON, || {
        let jobs = guest.qmp("query-jobs", json!({}))?;
        let told = &jobs[0];
        if let Some(error) = told.get("error") {
            bail!("{command}: {error}");
        }
        Ok(told["status"] == "concluded")
    })?;
    guest.qmp("job-dismiss", json!({"id": "job"})).map(drop)
}

/// A snapshot inside an image (savevm), and back to it while the guest runs.
pub fn savevm(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount()?;
    scan(ctx)?;
    let image = Path::new("/run/disk/web1.qcow2");
    fs::File::create(image)?;
    let mut guest = booted(&on(&mount.vm("web1")?))?;
    let file = json!({"driver": "file", "node-name": "file", "filename": image});
    guest.qmp("blockdev-add", file)?;
    let options = json!({"driver": "qcow2", "file": "file", "size": 1 << 20});
    job(&mut guest, "blockdev-create", json!({ "options": options }))?;
    let disk = json!({"driver": "qcow2", "node-name": "disk", "file": "file"});
    guest.qmp("blockdev-add", disk)?;
    let what = json!({"tag": "one", "vmstate": "disk", "devices": ["disk"]});
    job(&mut guest, "snapshot-save", what.clone())?;
    let saved = guest.passes();
    guest.wait("pass", SOON, |g| g.passes() >= saved + 3)?;
    guest.qmp("stop", json!({}))?;
    job(&mut guest, "snapshot-load", what)?;
    let before = guest.lines().len();
    guest.qmp("cont", json!({}))?;
    // It makes passes again that it made before.
    guest.wait("pass from then", SOON, |g| {
        let again = g.passes_since(before);
        again.is_some_and(|pass| pass <= saved + 2)
    })?;
    guest.wait("pass", SOON, |g| g.passes() >= saved + 2)?;
    fs::remove_file(image)?;
    verdict(&mut guest)
}

const PLUGGED_MIB: u64 = 128;

/// virtio-mem: memory is plugged, used, unplugged, and back at the host.
pub fn virtio_mem(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount()?;
    let dir = mount.vm("web1")?;
    let mut spec = Spec::new("web1", Kind::SmallPc, 128, &dir, 16);
    spec.args = vec![
        "-object".into(),
        format!(
            "memory-backend-file,id=v0,mem-path={},size=256M,share=on,align=2M",
            dir.display()
        ),
        "-device".into(),
        "virtio-mem-pci,id=v,memdev=v0,requested-size=0".into(),
    ];
    // Fills more than there was before, then lets go of it.
    spec.append = "RUN=\"while [ $(sed -n 's/MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo) \
                   -lt 200000 ]; do sleep 1; done; mount -o remount,size=160M /tmp; \
                   dd if=/dev/urandom of=/tmp/a bs=1M count=100 2>/dev/null; \
                   md5sum </tmp/a >/b; echo guest: full; read go; \
                   md5sum </tmp/a | cmp - /b && echo guest: same; \
                   rm /tmp/a; guest-load web1 16\""
        .into();
    let mut guest = Guest::start(&spec)?;
    guest.wait("boot", BOOT, Guest::booted)?;
    let ask = |guest: &mut Guest, mib: u64| {
        let request = json!({"path": "v", "property": "requested-size", "value": mib << 20});
        guest.qmp("qom-set", request)
    };
    let size = |guest: &mut Guest| -> Result<u64> {
        let told = guest.qmp("qom-get", json!({"path": "v", "property": "size"}))?;
        told.as_u64().context("size is a number")
    };
    ask(&mut guest, PLUGGED_MIB)?;
    until("memory that is plugged", SOON, || {
        Ok(size(&mut guest)? == PLUGGED_MIB << 20)
    })?;
    let said = |g: &Guest, what: &str| g.lines().iter().any(|l| l.contains(what));
    guest.wait("use of it", SOON, |g| said(g, "guest: full"))?;
    let full = mount.resident_kb("web1")?;
    ensure!(full > 100 << 10, "only {full} kB resident of 100 MiB");
    guest.type_line("go")?;
    guest.wait("check of it", SOON, |g| said(g, "guest: same"))?;
    ask(&mut guest, 0)?;
    // What the guest's kernel itself has taken of it stays.
    until("memory that is unplugged", SOON, || {
        Ok(size(&mut guest)? <= (PLUGGED_MIB / 2) << 20)
    })?;
    until("memory of what was unplugged", SOON, || {
        Ok(mount.resident_kb("web1")? + (PLUGGED_MIB << 10) / 4 <= full)
    })?;
    work(&mut guest, 2)
}

/// Sends back what each of its callers sent; ends with the process.
fn echo(listener: &TcpListener) {
    for caller in listener.incoming() {
        let back = caller.and_then(|mut stream| {
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes)?;
            stream.write_all(&bytes)
        });
        if let Err(e) = back {
            eprintln!("echo: {e}");
        }
    }
}

/// Packets that the host's kernel reads from the guest's memory and writes there.
pub fn vhost_net(ctx: &Ctx) -> Result<()> {
    modprobe(&["tun", "vhost_net"])?;
    let mount = ctx.mount()?;
    scan(ctx)?;
    let dir = mount.vm("debian")?;
    let mut spec = Spec::new("debian", Kind::Stock, 320, &dir, 16);
    spec.args = [
        "-netdev",
        "tap,id=n,ifname=tap0,script=no,downscript=no,vhost=on",
        "-device",
        "virtio-net-pci,netdev=n,romfile=",
    ]
    .map(String::from)
    .to_vec();
    spec.append =
        "RUN=\"dd if=/dev/urandom of=/tmp/a bs=1M count=2 2>/dev/null; echo guest: full; \
                   read go; ifconfig eth0 10.9.0.2 netmask 255.255.255.0 up; \
                   for i in 1 2 3; do nc 10.9.0.1 9000 </tmp/a >/tmp/b; \
                   cmp /tmp/a /tmp/b && echo guest: same || echo guest: other; done; \
                   guest-load debian 16\""
            .into();
    let mut guest = Guest::start(&spec)?;
    guest.wait("boot", BOOT, Guest::booted)?;
    sh(Command::new("ip").args(["address", "add", "10.9.0.1/24", "dev", "tap0"]))?;
    sh(Command::new("ip").args(["link", "set", "tap0", "up"]))?;
    let listener = TcpListener::bind("10.9.0.1:9000")?;
    std::thread::spawn(move || echo(&listener));
    let count = |g: &Guest, what: &str| g.lines().iter().filter(|l| l.contains(what)).count();
    guest.wait("full", SOON, |g| count(g, "guest: full") > 0)?;
    guest.type_line("go")?;
    guest.wait("network", SOON, |g| {
        count(g, "guest: same") + count(g, "guest: other") >= 3
    })?;
    let same = count(&guest, "guest: same");
    ensure!(same == 3, "network: {:?}", guest.lines());
    ensure!(
        carried_by_vhost()?,
        "QEMU carries the packets itself, not vhost-net"
    );
    work(&mut guest, 2)
}

/// Whether a process has a thread in which vhost works.
fn carried_by_vhost() -> Result<bool> {
    for process in fs::read_dir("/proc")? {
        let Ok(threads) = fs::read_dir(process?.path().join("task")) else {
            continue;
        };
        let mut comms = threads.flatten().map(|thread| thread.path().join("comm"));
        // A thread may end meanwhile.
        if comms.any(|comm| read(comm).is_ok_and(|name| name.starts_with("vhost-"))) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// QEMUs end at any moment, from the first instant on; one that shares with them does not notice.
pub fn sudden_ends(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount()?;
    scan(ctx)?;
    let mut stays = booted(&on(&mount.vm("stays")?))?;
    let start = Instant::now();
    for round in 0..ctx.rounds {
        let mut guests = Vec::new();
        for name in ["dies1", "dies2"] {
            let dir = mount.vm(name)?;
            guests.push(Guest::start(&Spec::new(name, Kind::Small, MIB, &dir, 32))?);
        }
        // From before the first page of it to somewhere in the load.
        let moment = 300 + (round * 7919 + u64::from(start.elapsed().subsec_millis())) % 15_000;
        std::thread::sleep(Duration::from_millis(moment));
        let last = guests.pop();
        drop(guests);
        let half = Duration::from_millis(moment / 2);
        std::thread::sleep(half.min(Duration::from_secs(2)));
        drop(last);
        for name in ["dies1", "dies2"] {
            fs::remove_dir(mount.path.join(name)).context(name)?;
        }
        if ctx.fs == Fs::Thinram {
            until("end of the VMs", SOON, || {
                Ok(fs::read_dir("/sys/fs/thinram/vms")?.count() == 1)
            })?;
        }
        let passes = stays.passes();
        stays.wait("pass", SOON, |g| g.passes() > passes)?;
    }
    verdict(&mut stays)?;
    drop(stays);
    drop(mount);
    if ctx.fs == Fs::Thinram {
        for name in ["pages_shared", "pages_sharing", "zero_pages"] {
            let left = number(name)?;
            ensure!(left == 0, "{name} is {left} without a VM");
        }
    }
    unload(ctx.fs)?;
    load(ctx.fs)?;
    let mount = Mount::new(ctx.fs, crate::inside::MOUNT, Some("lab"))?;
    let mut guest = Guest::start(&on(&mount.vm("web1")?))?;
    work(&mut guest, 2)
}
