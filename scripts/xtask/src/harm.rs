// SPDX-License-Identifier: GPL-2.0

//! What happens to a host while guests run: somebody unmounts, drops caches, suspends, attaches a
//! debugger; memory breaks, memory is short.

use crate::env::read;
use crate::guest::{Guest, Kind, Spec};
use crate::inside::{fast, number, set, sh, until, Ctx, Fs, Mount, SOON};
use crate::real::{booted, verdict};
use anyhow::{bail, ensure, Context, Result};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

const MIB: u64 = 96;
const LOAD_MIB: u64 = 24;
const PAGE: u64 = 4096;
/// More than the first and the last memory block of the test's host together, which have holes.
const SPREAD_MIB: u64 = 288;

fn guest(mount: &Mount, name: &str, mib: u64) -> Result<Spec> {
    Ok(Spec::new(
        name,
        Kind::Small,
        mib,
        &mount.vm(name)?,
        LOAD_MIB,
    ))
}

/// Two more passes, so all of its data were read at least once since.
fn goes_on(guest: &mut Guest, after: &str) -> Result<()> {
    let passes = guest.passes();
    guest.wait(&format!("pass after {after}"), SOON, |g| {
        g.passes() >= passes + 2
    })
}

/// Where QEMU has the guest's memory in its address space.
fn memory(guest: &Guest, mount: &Mount) -> Result<std::ops::Range<u64>> {
    let maps = read(format!("/proc/{}/maps", guest.pid()))?;
    let below = format!("{}/", mount.path.display());
    let line = maps.lines().find(|line| line.contains(&below));
    let range = line.and_then(|line| line.split(' ').next()?.split_once('-'));
    let (from, to) = range.with_context(|| format!("{} maps nothing of {below}", guest.name))?;
    Ok(u64::from_str_radix(from, 16)?..u64::from_str_radix(to, 16)?)
}

/// A page of the guest's load, by its content: the address in QEMU, and the first two words.
fn load_page(guest: &Guest, mount: &Mount) -> Result<(u64, [u64; 2])> {
    let memory = memory(guest, mount)?;
    let file = fs::File::open(format!("/proc/{}/mem", guest.pid()))?;
    // From the middle on: the kernel lies below.
    let middle = memory.start + (memory.end - memory.start) / 2;
    for at in (middle..memory.end).step_by(PAGE as usize) {
        let mut bytes = [0; 16];
        file.read_exact_at(&mut bytes, at)?;
        let (low, high) = bytes.split_at(8);
        let words = [
            u64::from_le_bytes(low.try_into()?),
            u64::from_le_bytes(high.try_into()?),
        ];
        // As guest-load makes them of a seed.
        if words[0] != 0 && words[1] == words[0].wrapping_mul(3) ^ 1 {
            return Ok((at, words));
        }
    }
    bail!("{} has no page of its load in memory", guest.name)
}

/// The frame behind an address of QEMU.
fn frame(guest: &Guest, at: u64) -> Result<u64> {
    let mut bytes = [0; 8];
    let map = fs::File::open(format!("/proc/{}/pagemap", guest.pid()))?;
    map.read_exact_at(&mut bytes, at / PAGE * 8)?;
    let entry = u64::from_ne_bytes(bytes);
    ensure!(entry >> 63 == 1, "{at:#x} is not mapped");
    Ok(entry & ((1 << 55) - 1))
}

/// Memory blocks of `size` that have no hole: one with a hole is refused whatever is in it.
fn whole_blocks(size: u64) -> Result<Vec<u64>> {
    let map = read("/proc/iomem")?;
    let ram = map.lines().filter_map(|line| {
        let (range, name) = line.split_once(" : ")?;
        let (from, to) = range.split_once('-')?;
        // What is indented is a part of another.
        (name == "System RAM").then(|| {
            let from = u64::from_str_radix(from, 16)?;
            Ok((
                from.div_ceil(size),
                (u64::from_str_radix(to, 16)? + 1) / size,
            ))
        })
    });
    let ranges: Vec<(u64, u64)> = ram.collect::<Result<_>>()?;
    Ok(ranges.into_iter().flat_map(|(from, to)| from..to).collect())
}

/// A memory block with a page of the guest cannot go offline.
fn cannot_go_offline(guest: &Guest, mount: &Mount) -> Result<()> {
    let blocks = Path::new("/sys/devices/system/memory");
    let size = u64::from_str_radix(&read(blocks.join("block_size_bytes"))?, 16)?;
    let whole = whole_blocks(size)?;
    let mut blocks_held = memory(guest, mount)?
        .step_by(2 << 20)
        .filter_map(|at| Some(frame(guest, at).ok()? * PAGE / size));
    let block = blocks_held.find(|block| whole.contains(block));
    let block = block.context("the guest has no page in a block without holes")?;
    let state = blocks.join(format!("memory{block}/state"));
    // The second is that of a page which is about to move.
    const REFUSALS: [i32; 2] = [16 /* EBUSY */, 11 /* EAGAIN */];
    match fs::write(&state, "offline") {
        Err(e) if e.raw_os_error().is_some_and(|n| REFUSALS.contains(&n)) => {}
        other => bail!("{}: expected EBUSY, seen {other:?}", state.display()),
    }
    let now = read(&state)?;
    ensure!(now == "online", "{} is {now}", state.display());
    Ok(())
}

/// Suspends the host as far as its devices, and comes back.
fn suspend() -> Result<()> {
    let test = Path::new("/sys/power/pm_test");
    let successes = "/sys/power/suspend_stats/success";
    let before: u64 = read(successes)?.parse()?;
    fs::write("/sys/module/suspend/parameters/pm_test_delay", "1")?;
    fs::write(test, "devices").context("pm_test")?;
    let done = fs::write("/sys/power/state", "freeze");
    fs::write(test, "none")?;
    done.context("suspend")?;
    let after: u64 = read(successes)?.parse()?;
    ensure!(after == before + 1, "{successes}: {before}, then {after}");
    let log = sh(&mut Command::new("dmesg"))?;
    ensure!(
        log.contains("suspend debug: Waiting for 1 second"),
        "the kernel did not get as far as its devices"
    );
    Ok(())
}

/// gdb reads a page of the guest in QEMU, and writes to it what it holds.
fn debug(guest: &Guest, mount: &Mount) -> Result<()> {
    let (at, words) = load_page(guest, mount)?;
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-batch", "-iex", "set auto-solib-add off"]);
    gdb.args(["-p", &guest.pid().to_string()]);
    for command in [
        format!("output *(unsigned long *){at:#x}"),
        format!("set *(unsigned long *){at:#x} = {}", words[0]),
        format!("output *(unsigned long *){:#x}", at + 8),
        "detach".into(),
    ] {
        gdb.args(["-ex", &command]);
    }
    let said = sh(gdb.env("DEBUGINFOD_URLS", ""))?;
    for word in words {
        ensure!(
            said.contains(&word.to_string()),
            "gdb does not see {word}: {said}"
        );
    }
    Ok(())
}

/// A guest runs on, whatever its host does.
pub fn host(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount()?;
    let mut spec = guest(&mount, "web1", MIB)?;
    if ctx.fs == Fs::Thinram {
        // All of it is there, and stays until a block was tried.
        spec = guest(&mount, "web1", SPREAD_MIB)?;
        for backend in &mut spec.backends {
            backend.push_str(",prealloc=on");
        }
        set("run", "0")?;
    }
    let mut guest = booted(&spec)?;
    if ctx.fs == Fs::Thinram {
        cannot_go_offline(&guest, &mount)?;
        fast()?;
        goes_on(&mut guest, "memory offline")?;
    }
    let umount = sh(Command::new("umount").arg(&mount.path));
    let said = umount.err().context("umount under a guest")?.to_string();
    ensure!(said.contains("busy"), "umount: {said}");
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    fs::write("/proc/sys/vm/compact_memory", "1")?;
    goes_on(&mut guest, "umount and drop_caches")?;
    debug(&guest, &mount)?;
    goes_on(&mut guest, "gdb")?;
    suspend()?;
    goes_on(&mut guest, "a suspend")?;
    let path = mount.path.clone();
    mount.detach()?;
    ensure!(
        fs::read_dir(&path)?.count() == 0,
        "the mount is there after umount -l"
    );
    goes_on(&mut guest, "umount -l")?;
    verdict(&mut guest)?;
    drop(guest);
    if ctx.fs == Fs::Thinram {
        until("end of the VM", SOON, || {
            Ok(fs::read_dir("/sys/fs/thinram/vms")?.count() == 0)
        })?;
    }
    // Its place is free again.
    ctx.mount().map(drop)
}

/// Marks a page of the guest's load as broken, as memory_failure() does when the machine reports it,
/// and lets the guest come across it.
fn break_page(guest: &mut Guest, mount: &Mount) -> Result<()> {
    let (at, _) = load_page(guest, mount)?;
    let address = frame(guest, at)? * PAGE;
    let switch = "/sys/devices/system/memory/hard_offline_page";
    // It says that it cannot handle such a page, and has marked it by then.
    ensure!(
        fs::write(switch, format!("{address:#x}")).is_err(),
        "memory_failure() claims to have recovered {address:#x}"
    );
    // Really broken memory would stop the guest at once. This one works, until the page is touched anew:
    // sampling takes it out of the page tables.
    set("active_sample_pages", "10000")?;
    set("active_sample_period_secs", "1")?;
    guest
        .wait("machine check", SOON, |g| {
            let errors = g.errors();
            errors.contains("Memory Error") || errors.contains("Hardware memory error")
        })
        .or_else(|e| match guest.ended(SOON) {
            // Its kernel has no handler of machine checks and ends with QEMU.
            Ok(_) if guest.errors().contains("emory") => Ok(()),
            _ => Err(e),
        })?;
    set("active_sample_period_secs", "30")?;
    set("active_sample_pages", "100")?;
    // What it read before was right, and nothing else came after.
    ensure!(
        guest.verdict() != Some(false),
        "{} read what nobody wrote: {:?}",
        guest.name,
        guest.lines()
    );
    Ok(())
}

/// A cgroup with a limit on memory; removed when dropped.
struct Group(&'static str);

impl Group {
    fn new() -> Result<Group> {
        let group = Group("/sys/fs/cgroup/thinram-oom");
        fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory")?;
        fs::create_dir(group.0)?;
        Ok(group)
    }

    fn set(&self, file: &str, value: &str) -> Result<()> {
        let path = format!("{}/{file}", self.0);
        fs::write(&path, value).with_context(|| format!("{value} to {path}"))
    }

    fn kills(&self) -> Result<u64> {
        let events = read(format!("{}/memory.events", self.0))?;
        let line = events.lines().find_map(|l| l.strip_prefix("oom_kill "));
        Ok(line.context("memory.events has no oom_kill")?.parse()?)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir(self.0) {
            eprintln!("{}: {e}", self.0);
        }
    }
}

/// Tells whoever reads the kernel's log, and goes on telling until dropped, that what the OOM killer
/// prints is no defect.
struct OomExpected;

impl OomExpected {
    fn new() -> Result<OomExpected> {
        fs::write("/dev/kmsg", format!("<5>{}", crate::vm::OOM_BEGINS))?;
        Ok(OomExpected)
    }
}

impl Drop for OomExpected {
    fn drop(&mut self) {
        if let Err(e) = fs::write("/dev/kmsg", format!("<5>{}", crate::vm::OOM_ENDS)) {
            eprintln!("/dev/kmsg: {e}");
        }
    }
}

/// The OOM killer comes for a QEMU whose cgroup may have half of what it has.
fn run_out_of_memory(guest: &mut Guest, group: &Group) -> Result<()> {
    let current: u64 = read(format!("{}/memory.current", group.0))?.parse()?;
    ensure!(
        current > LOAD_MIB << 20,
        "the cgroup is charged {current} bytes only"
    );
    let expected = OomExpected::new()?;
    group.set("memory.max", &(current / 2).to_string())?;
    let code = guest.ended(SOON)?;
    drop(expected);
    ensure!(code.is_none(), "QEMU ended by itself: {code:?}");
    let kills = group.kills()?;
    ensure!(kills == 1, "oom_kill is {kills}");
    Ok(())
}

/// One guest meets broken memory, one the OOM killer; the third, which shares with both, does not
/// notice, and nothing is left of the two.
pub fn ends(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount()?;
    fast()?;
    let group = Group::new()?;
    let mut guests = Vec::new();
    for name in ["breaks", "starves", "stays"] {
        guests.push(Guest::start(&guest(&mount, name, MIB)?)?);
        if name == "starves" {
            group.set("cgroup.procs", &guests[1].pid().to_string())?;
        }
    }
    for guest in &mut guests {
        guest.wait("pass", crate::inside::BOOT + SOON, |g| g.passes() >= 1)?;
    }
    let [breaks, starves, stays] = &mut guests[..] else {
        bail!("three guests were started");
    };
    break_page(breaks, &mount)?;
    goes_on(stays, "a neighbour's memory broke")?;
    run_out_of_memory(starves, &group)?;
    goes_on(stays, "a neighbour was killed")?;
    verdict(stays)?;
    drop(guests);
    drop(group);
    until("end of all VMs", SOON, || {
        Ok(fs::read_dir("/sys/fs/thinram/vms")?.count() == 0)
    })?;
    for name in ["pages_shared", "pages_sharing", "zero_pages"] {
        let left = number(name)?;
        ensure!(left == 0, "{name} is {left} without a VM");
    }
    Ok(())
}
