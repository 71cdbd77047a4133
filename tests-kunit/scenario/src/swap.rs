// SPDX-License-Identifier: GPL-2.0

//! Swap: what is pushed out of a VM's pool lies encrypted on a disk, and every byte comes back; or the
//! guest is told.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::mount::{mount, umount, MsFlags};
use nix::sys::signal::Signal;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use crate::check::{bytes_are, eq, fails, page_is, skip, within, BusError};
use crate::content::{self, page_bytes};
use crate::contention::force;
use crate::ctx::{tool, Ctx, Guest};
use crate::harness::Case;
use crate::huge;
use crate::sys::{self, Map, PageBuf, PAGE, RW, WORDS};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::thinram(
        "swap/dir",
        "swap_dir takes a directory that can be swapped to, nothing else",
        dir,
    ),
    Case::thinram(
        "swap/round-trip",
        "a whole VM goes to swap and comes back, twice",
        round_trip,
    ),
    Case::thinram(
        "swap/incompressible",
        "pages that do not compress go to swap as they are",
        incompressible,
    ),
    Case::thinram(
        "swap/cap",
        "a full pool pushes into swap, and a lower cap too",
        cap,
    ),
    Case::thinram(
        "swap/cap-alone",
        "the limit of one VM swaps none of another's pages",
        cap_alone,
    ),
    Case::thinram(
        "swap/access",
        "every access to a swapped page sees its bytes",
        access,
    ),
    Case::thinram(
        "swap/holes",
        "holes and truncation free what is in swap, and its room is used again",
        holes,
    ),
    Case::thinram(
        "swap/mount-option",
        "swap_dir= of a mount is for its VMs alone",
        mount_option,
    ),
    Case::thinram(
        "swap/drain",
        "swap_dir set empty brings everything back, or is ENOMEM",
        drain,
    ),
    Case::thinram(
        "swap/drain-fails",
        "what cannot be read is lost when swap_dir is set empty, and keeps no mount",
        drain_fails,
    ),
    Case::thinram("swap/no-space", "on a full disk the pages stay", no_space),
    Case::thinram(
        "swap/write-fails",
        "what cannot be written stays as it was",
        write_fails,
    ),
    Case::thinram(
        "swap/read-fails",
        "what cannot be read is EIO or SIGBUS, and the VM goes on",
        read_fails,
    ),
    Case::thinram(
        "swap/corrupt",
        "a flipped byte on the disk loses one page and never shows",
        corrupt,
    ),
    Case::thinram(
        "swap/encrypted",
        "nothing of a guest is readable on the disk",
        encrypted,
    ),
    Case::thinram(
        "swap/killed",
        "VMs killed in the middle of I/O leave nothing behind",
        killed,
    ),
    Case::thinram("swap/ends", "a VM that ends in swap frees its file", ends),
    Case::thinram(
        "swap/huge",
        "pages of 2 MiB are split and go to swap",
        from_huge,
    ),
    Case::thinram(
        "swap/every-stage",
        "stamps of all pages, over and over, wherever they are meanwhile",
        every_stage,
    )
    .span(10.0),
];

/// Seconds within which a few thousand pages surely are on the disk or back.
const SOON: f64 = 40.0;
/// Size of a small disk, in KiB.
pub const SMALL_KB: u64 = 6 << 10;

/// An ext4 on the scratch disk, and swapping to it.
pub struct Disk<'a> {
    ctx: &'a Ctx,
    device: PathBuf,
    /// Where it is mounted.
    pub path: PathBuf,
}

impl<'a> Disk<'a> {
    /// Makes it and points `swap_dir` at it.
    pub fn new(ctx: &'a Ctx) -> Result<Disk<'a>> {
        Disk::again(ctx, "disk")
    }

    /// Makes it anew, mounted at `name`.
    pub fn again(ctx: &'a Ctx, name: &str) -> Result<Disk<'a>> {
        Disk::sized(ctx, name, None)
    }

    /// A disk that is soon full, of [`SMALL_KB`].
    pub fn small(ctx: &'a Ctx) -> Result<Disk<'a>> {
        Disk::sized(ctx, "small", Some(SMALL_KB))
    }

    fn sized(ctx: &'a Ctx, name: &str, kb: Option<u64>) -> Result<Disk<'a>> {
        let device = scratch(ctx)?;
        let made = Command::new(tool("mkfs.ext4")?)
            .args(["-q", "-F", "-E", "nodiscard,lazy_itable_init=0"])
            .arg(&device)
            .args(kb.map(|kb| format!("{kb}k")))
            .output()
            .context("run mkfs.ext4")?;
        ensure!(made.status.success(), "mkfs.ext4: {made:?}");
        let disk = Disk::found(ctx, name)?;
        disk.on()?;
        Ok(disk)
    }

    /// As it is on the scratch disk, mounted at `name`; nothing swaps to it yet.
    pub fn found(ctx: &'a Ctx, name: &str) -> Result<Disk<'a>> {
        let device = scratch(ctx)?;
        let path = ctx.dir.join(name);
        fs::create_dir(&path)?;
        mount(
            Some(&device),
            &path,
            Some("ext4"),
            MsFlags::empty(),
            None::<&str>,
        )
        .with_context(|| format!("mount {}", device.display()))?;
        Ok(Disk { ctx, device, path })
    }

    /// Points `swap_dir` at it.
    pub fn on(&self) -> Result<()> {
        self.ctx.sys().set("swap_dir", self.path.display())
    }

    /// The device, past every cache.
    pub fn raw(&self) -> Result<File> {
        raw(&self.device, true)
    }

    /// All of the disk, past every cache.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        disk_bytes(&self.device)
    }

    /// Blocks that are in use on it.
    pub fn used_blocks(&self) -> Result<u64> {
        let stat = nix::sys::statfs::statfs(&self.path)?;
        Ok(stat.blocks() - stat.blocks_free())
    }

    /// Lets go of it, which nothing may keep from happening.
    pub fn unmount(&self) -> Result<()> {
        self.ctx.sys().set("swap_dir", "\n")?;
        self.ctx.until("the disk to be free", SOON, || {
            Ok(match umount(&self.path) {
                Ok(()) => (true, String::new()),
                Err(e) => (false, e.to_string()),
            })
        })
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        if self.ctx.sys().set("swap_dir", "\n").is_err() {
            return;
        }
        let start = Instant::now();
        while umount(&self.path) == Err(Errno::EBUSY) && start.elapsed() < self.ctx.limit(10.0) {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The device that cases may format, or a skip.
pub fn scratch(ctx: &Ctx) -> Result<PathBuf> {
    let device = ctx.setup.scratch.clone();
    device.ok_or_else(|| skip("no --scratch device to make a file system on"))
}

fn raw(device: &Path, write: bool) -> Result<File> {
    File::options()
        .read(true)
        .write(write)
        .custom_flags(libc::O_DIRECT)
        .open(device)
        .with_context(|| format!("open {}", device.display()))
}

/// All of a disk, past every cache.
pub fn disk_bytes(device: &Path) -> Result<Vec<u8>> {
    const STEP: usize = 1 << 20;
    let file = raw(device, false)?;
    let buffer = Map::anonymous(STEP)?;
    let mut all = Vec::new();
    loop {
        let read = sys::pread_into(&file, &buffer, 0, STEP, all.len() as u64)?;
        if read == 0 {
            return Ok(all);
        }
        for word in &buffer.words()[..read / 8] {
            let word = word.load(std::sync::atomic::Ordering::Relaxed);
            all.extend_from_slice(&word.to_ne_bytes());
        }
    }
}

/// Waits until value `name` of a VM is good; its states add up all the while.
pub fn until_vm(ctx: &Ctx, guest: &Guest, name: &str, good: impl Fn(u64) -> bool) -> Result<()> {
    let vm = guest.sysfs(ctx);
    ctx.until(&format!("a good {name} of {}", guest.name), SOON, || {
        vm.stat()?.check_sum()?;
        let seen = vm.get(name)?;
        Ok((good(seen), format!("{seen} in {:?}", vm.stat()?)))
    })
}

/// Pushes all of a VM out, and lets go when it is there.
pub fn push_out(ctx: &Ctx, guest: &Guest, pages: usize) -> Result<()> {
    force(ctx, "hard")?;
    until_vm(ctx, guest, "swapped_kb", |kb| kb == 4 * pages as u64)?;
    force(ctx, "none")
}

/// The guest's file, mapped by the running process: a fork does not inherit mappings of it.
pub fn map_again(guest: &Guest) -> Result<Map> {
    Ok(Map::shared(&guest.file, 0, guest.map.pages() * PAGE, RW)?)
}

/// Whether this is User-Mode Linux: it has no answer to a touch of a page that is lost, and would stop.
pub fn is_uml() -> Result<bool> {
    Ok(fs::read_to_string("/proc/cpuinfo")?.contains("User Mode Linux"))
}

/// Touching a page that is lost kills by SIGBUS.
pub fn touch_lost(ctx: &Ctx, guest: &Guest, page: usize) -> Result<()> {
    if is_uml()? {
        return Ok(());
    }
    sys::fork(|| {
        map_again(guest)?.get(page, 0);
        Ok(())
    })?
    .expect_signal(Signal::SIGBUS, ctx.limit(20.0))
}

fn dir(ctx: &Ctx) -> Result<()> {
    let disk = Disk::new(ctx)?;
    let sys = ctx.sys();
    let good = disk.path.display().to_string();
    eq("swap_dir", sys.word("swap_dir")?, good.clone())?;
    let own = ctx.mount("m", "size=16M")?;
    let file = ctx.dir.join("file");
    fs::write(&file, "x")?;
    let tmpfs = ctx.dir.join("tmpfs");
    fs::create_dir(&tmpfs)?;
    let kind = Some("tmpfs");
    mount(kind, &tmpfs, kind, MsFlags::empty(), None::<&str>)?;
    let text = |path: &Path| path.display().to_string();
    for (value, errno) in [
        ("relative".to_owned(), Errno::EINVAL),
        (text(&ctx.dir.join("missing")), Errno::ENOENT),
        (text(&file), Errno::ENOTDIR),
        ("/proc/self".to_owned(), Errno::EOPNOTSUPP),
        (text(&tmpfs), Errno::EOPNOTSUPP),
        (text(&own.path), Errno::EINVAL),
        (format!("/{}", "x".repeat(300)), Errno::ENAMETOOLONG),
    ] {
        fails(&value, sys.try_set("swap_dir", value.as_bytes()), errno)?;
        eq(
            "swap_dir after a refusal",
            sys.word("swap_dir")?,
            good.clone(),
        )?;
    }
    sys.set("swap_dir", format!("{good}\n"))?;
    ensure!(
        umount(&disk.path) == Err(Errno::EBUSY),
        "swap_dir does not keep its mount"
    );
    sys.set("swap_dir", "\n")?;
    eq(
        "swap_dir when it is off",
        sys.word("swap_dir")?,
        String::new(),
    )?;
    // Nothing of what was refused holds its mount.
    umount(&tmpfs)?;
    Ok(())
}

fn round_trip(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 4096;
    let size = 4 * PAGES as u64;
    let disk = Disk::new(ctx)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", PAGES)?;
    let vm = guest.sysfs(ctx);
    for first in [1, 77_000] {
        guest.fill(0, PAGES, first);
        let (outs, ins) = (vm.get("swap_outs")?, vm.get("swap_ins")?);
        push_out(ctx, &guest, PAGES)?;
        // All but what is not yet a full cluster.
        until_vm(ctx, &guest, "swap_outs", |n| n + 64 >= outs + PAGES as u64)?;
        eq("resident_kb", vm.get("resident_kb")?, 0)?;
        within("swap_file_kb", vm.get("swap_file_kb")?, size / 5, size)?;
        guest.holds(0, PAGES, first)?;
        eq("swap_ins", vm.get("swap_ins")?, ins + PAGES as u64)?;
        eq("swapped_kb", vm.get("swapped_kb")?, 0)?;
        eq("private_kb", vm.get("private_kb")?, size)?;
    }
    // Neighbours came with the page that was asked for.
    let sys = ctx.sys();
    ensure!(
        sys.get("swap_reads")? * 4 < sys.get("swap_ins")?,
        "{} reads for {} pages",
        sys.get("swap_reads")?,
        sys.get("swap_ins")?
    );
    drop(guest);
    drop(mount);
    disk.unmount()
}

fn incompressible(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 1024;
    let _disk = Disk::new(ctx)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", PAGES)?;
    guest.fill_noise(0, PAGES);
    let name = "compressions_refused_incompressible";
    let before = ctx.sys().get(name)?;
    push_out(ctx, &guest, PAGES)?;
    ctx.until_least(name, before + PAGES as u64, SOON)?;
    eq("resident_kb", guest.sysfs(ctx).get("resident_kb")?, 0)?;
    guest.holds_noise(0, PAGES)
}

fn cap(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 4096;
    let size = 4 * PAGES as u64;
    let _disk = Disk::new(ctx)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", PAGES)?;
    guest.fill(0, PAGES, 1);
    let vm = guest.sysfs(ctx);
    vm.set("compress_max_percent", 40)?;
    let limit = size * 6 / 10;
    vm.set("limit_kb", limit)?;
    until_vm(ctx, &guest, "resident_kb", |kb| kb <= limit)?;
    within(
        "compressed_pool_kb",
        vm.get("compressed_pool_kb")?,
        0,
        size * 2 / 5,
    )?;
    eq("swapped_kb before the cap", vm.get("swapped_kb")?, 0)?;
    vm.set("compress_max_percent", 5)?;
    until_vm(ctx, &guest, "compressed_pool_kb", |kb| kb <= size / 20)?;
    within("swapped_kb", vm.get("swapped_kb")?, 1, size)?;
    guest.holds(0, PAGES, 1)?;
    until_vm(ctx, &guest, "resident_kb", |kb| kb <= limit)?;
    guest.holds(0, PAGES, 1)
}

fn cap_alone(ctx: &Ctx) -> Result<()> {
    let _disk = Disk::new(ctx)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let (a, b) = (mount.guest("a", 1024)?, mount.guest("b", 1024)?);
    a.fill(0, 1024, 1);
    b.fill(0, 1024, 5000);
    a.sysfs(ctx).set("limit_kb", 500)?;
    until_vm(ctx, &a, "resident_kb", |kb| kb <= 500)?;
    within(
        "swapped_kb of a",
        a.sysfs(ctx).get("swapped_kb")?,
        2000,
        4096,
    )?;
    eq("private_kb of b", b.sysfs(ctx).get("private_kb")?, 4096)?;
    eq("swap_outs of b", b.sysfs(ctx).get("swap_outs")?, 0)?;
    b.holds(0, 1024, 5000)?;
    a.holds(0, 1024, 1)
}

fn access(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 512;
    let _disk = Disk::new(ctx)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", PAGES)?;
    guest.fill(0, PAGES, 1);
    push_out(ctx, &guest, PAGES)?;
    let vm = guest.sysfs(ctx);
    // read(2) leaves the page where it is.
    let mut seen = vec![0; PAGE];
    guest.file.read_exact_at(&mut seen, 100 * PAGE as u64)?;
    bytes_are("page 100 by read(2)", &seen, &page_bytes(101))?;
    eq("swapped_kb after read(2)", vm.get("swapped_kb")?, 2048)?;
    // A part of one page, and parts of two.
    guest.file.write_all_at(b"hello", 7 * PAGE as u64 + 100)?;
    let mut expected = page_bytes(8);
    expected[100..105].copy_from_slice(b"hello");
    guest.file.read_exact_at(&mut seen, 7 * PAGE as u64)?;
    bytes_are("page 7", &seen, &expected)?;
    guest.file.write_all_at(&[9; 200], 21 * PAGE as u64 - 100)?;
    let mut expected = page_bytes(21);
    expected[PAGE - 100..].fill(9);
    guest.file.read_exact_at(&mut seen, 20 * PAGE as u64)?;
    bytes_are("page 20", &seen, &expected)?;
    // A write through the mapping, as a first touch.
    guest.map.set(300, 5, 42);
    let mut expected = content::page(301);
    expected[5] = 42;
    page_is("page 300", &guest.map.read_page(300), &expected)?;
    // Another process.
    sys::fork(|| {
        let map = map_again(&guest)?;
        page_is(
            "page 200 of a child",
            &map.read_page(200),
            &content::page(201),
        )
    })?
    .expect_ok(ctx.limit(20.0))?;
    vm.stat()?.check_sum()?;
    guest.holds(400, PAGES, 1)
}

fn holes(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 2048;
    let disk = Disk::new(ctx)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", PAGES)?;
    let vm = guest.sysfs(ctx);
    guest.fill_noise(0, PAGES);
    push_out(ctx, &guest, PAGES)?;
    let file_kb = vm.get("swap_file_kb")?;
    let bytes = (PAGES * PAGE) as u64;
    sys::punch(&guest.file, 0, bytes / 2)?;
    eq("swapped_kb", vm.get("swapped_kb")?, 4 * PAGES as u64 / 2)?;
    guest.is_zero(0, 100)?;
    sys::ftruncate(&guest.file, bytes as i64 / 4 * 3)?;
    eq("swapped_kb", vm.get("swapped_kb")?, 4 * PAGES as u64 / 4)?;
    sys::ftruncate(&guest.file, bytes as i64)?;
    guest.holds_noise(PAGES / 2, PAGES / 4 * 3)?;
    // Three times over: the room of what is gone is used again.
    for _ in 0..3 {
        guest.fill_noise(0, PAGES);
        push_out(ctx, &guest, PAGES)?;
        vm.stat()?.check_sum()?;
        guest.holds_noise(0, PAGES)?;
    }
    within(
        "swap_file_kb",
        vm.get("swap_file_kb")?,
        file_kb / 2,
        file_kb * 2,
    )?;
    drop(guest);
    drop(mount);
    disk.unmount()
}

fn mount_option(ctx: &Ctx) -> Result<()> {
    let disk = Disk::new(ctx)?;
    ctx.sys().set("swap_dir", "\n")?;
    let bad = ctx.try_mount("bad", "swap_dir=/proc/self")?.map(drop);
    eq("a bad directory", bad, Err(Errno::EOPNOTSUPP))?;
    let bad = ctx.try_mount("bad", "swap_dir=/nowhere")?.map(drop);
    eq("no directory", bad, Err(Errno::ENOENT))?;
    let options = format!("size=64M,domain=lab,swap_dir={}", disk.path.display());
    let (with, without) = (
        ctx.mount("with", &options)?,
        ctx.mount("without", "size=64M,domain=lab")?,
    );
    let mounts = fs::read_to_string("/proc/mounts")?;
    ensure!(
        mounts.contains(&format!("swap_dir={}", disk.path.display())),
        "{mounts}"
    );
    let (a, b) = (with.guest("a", 512)?, without.guest("b", 512)?);
    a.fill_noise(0, 512);
    b.fill_noise(0, 512);
    force(ctx, "hard")?;
    until_vm(ctx, &a, "swapped_kb", |kb| kb == 2048)?;
    eq("swapped_kb of b", b.sysfs(ctx).get("swapped_kb")?, 0)?;
    eq("private_kb of b", b.sysfs(ctx).get("private_kb")?, 2048)?;
    force(ctx, "none")?;
    a.holds_noise(0, 512)?;
    b.holds_noise(0, 512)
}

fn drain(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 2048;
    let disk = Disk::new(ctx)?;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", PAGES)?;
    let vm = guest.sysfs(ctx);
    guest.fill(0, PAGES, 1);
    push_out(ctx, &guest, PAGES)?;
    // What is out does not fit under the limit, and nothing changes.
    vm.set("limit_kb", 1000)?;
    fails(
        "swap_dir off",
        sys.try_set("swap_dir", b"\n"),
        Errno::ENOMEM,
    )?;
    eq(
        "swap_dir",
        sys.word("swap_dir")?,
        disk.path.display().to_string(),
    )?;
    eq("swapped_kb", vm.get("swapped_kb")?, 4 * PAGES as u64)?;
    vm.set("limit_kb", 0)?;
    sys.set("swap_dir", "\n")?;
    until_vm(ctx, &guest, "swapped_kb", |kb| kb == 0)?;
    disk.unmount()?;
    guest.holds(0, PAGES, 1)
}

fn drain_fails(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 1024;
    let disk = Disk::new(ctx)?;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", PAGES)?;
    let vm = guest.sysfs(ctx);
    guest.fill_noise(0, PAGES);
    push_out(ctx, &guest, PAGES)?;
    until_vm(ctx, &guest, "swap_outs", |n| n + 16 >= PAGES as u64)?;
    let lost = sys.get("swap_pages_lost")?;
    sys::shut_down(&disk.path)?;
    disk.unmount()?;
    let lost = sys.get("swap_pages_lost")? - lost;
    within("swap_pages_lost", lost, PAGES as u64 - 160, PAGES as u64)?;
    // They count as what they were, and the rest is back.
    let stat = vm.stat()?;
    stat.check_sum()?;
    eq("swapped_kb", stat.get("swapped_kb")?, 4 * lost)?;
    eq("swap_file_kb", vm.get("swap_file_kb")?, 0)?;
    let mut seen = vec![0; PAGE];
    let mut gone = Vec::new();
    for page in 0..PAGES {
        match guest.file.read_exact_at(&mut seen, (page * PAGE) as u64) {
            Ok(()) => {
                let expected = content::bytes_of(&content::noise(page as u64));
                bytes_are(format!("page {page}"), &seen, &expected)?;
            }
            Err(e) => {
                eq("errno", e.raw_os_error(), Some(libc::EIO))?;
                gone.push(page);
            }
        }
    }
    eq("pages that are EIO", gone.len() as u64, lost)?;
    touch_lost(ctx, &guest, gone[0])?;
    // Nobody will see the rest of a page that a part is cut off from.
    sys::punch(&guest.file, (gone[0] * PAGE) as u64 + 100, 1000)?;
    // On another disk the VM swaps on, and what is lost stays lost.
    let next = Disk::again(ctx, "next")?;
    force(ctx, "hard")?;
    until_vm(ctx, &guest, "swapped_kb", |kb| kb == 4 * PAGES as u64)?;
    force(ctx, "none")?;
    let page_0 = guest.file.read_exact_at(&mut seen, (gone[0] * PAGE) as u64);
    fails("read(2) of a lost page", page_0, Errno::EIO)?;
    next.unmount()?;
    eq("swapped_kb", vm.get("swapped_kb")?, 4 * lost)?;
    // A hole frees them.
    sys::punch(&guest.file, 0, (PAGES * PAGE) as u64)?;
    guest.is_zero(0, PAGES)?;
    vm.stat()?.check_sum()?;
    eq("swapped_kb", vm.get("swapped_kb")?, 0)?;
    guest.fill_noise(0, PAGES);
    guest.holds_noise(0, PAGES)
}

fn no_space(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 4096;
    let disk = Disk::small(ctx)?;
    full_disk(ctx, PAGES)?;
    disk.unmount()
}

fn full_disk(ctx: &Ctx, pages: usize) -> Result<()> {
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", pages)?;
    let vm = guest.sysfs(ctx);
    guest.fill_noise(0, pages);
    let refused = sys.get("swap_outs_refused_no_space")?;
    force(ctx, "hard")?;
    ctx.until_least("swap_outs_refused_no_space", refused + 1, SOON)?;
    until_vm(ctx, &guest, "swapped_kb", |kb| kb > 2048)?;
    let stat = vm.stat()?;
    within("swapped_kb", stat.get("swapped_kb")?, 2048, SMALL_KB)?;
    eq(
        "private_kb is the rest",
        stat.get("private_kb")?,
        4 * pages as u64 - stat.get("swapped_kb")?,
    )?;
    force(ctx, "none")?;
    guest.holds_noise(0, pages)?;
    // And once more, with what came free.
    force(ctx, "hard")?;
    until_vm(ctx, &guest, "swapped_kb", |kb| kb > 2048)?;
    force(ctx, "none")?;
    guest.holds_noise(0, pages)
}

/// A VM whose pages were in swap and are back, and whose disk fails from now on.
fn write_fails(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 1024;
    let disk = Disk::new(ctx)?;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", PAGES)?;
    let vm = guest.sysfs(ctx);
    guest.fill_noise(0, PAGES);
    push_out(ctx, &guest, PAGES)?;
    guest.holds_noise(0, PAGES)?;
    eq("swapped_kb", vm.get("swapped_kb")?, 0)?;
    let (outs, failed) = (vm.get("swap_outs")?, sys.get("swap_writes_failed")?);
    sys::shut_down(&disk.path)?;
    force(ctx, "hard")?;
    // It fails to write, or believes that it did not.
    ctx.until("a write", SOON, || {
        let seen = (sys.get("swap_writes_failed")?, vm.get("swap_outs")?);
        Ok((seen.0 > failed || seen.1 > outs, format!("{seen:?}")))
    })?;
    for _ in 0..20 {
        vm.stat()?.check_sum()?;
        thread::sleep(Duration::from_millis(20));
    }
    force(ctx, "none")?;
    // By read(2) first: it tells what is lost on every kernel.
    for page in 0..PAGES {
        let mut seen = vec![0; PAGE];
        match guest.file.read_exact_at(&mut seen, (page * PAGE) as u64) {
            Err(e) if e.raw_os_error() == Some(libc::EIO) => return Err(BusError.into()),
            read => read?,
        }
    }
    guest.holds_noise(0, PAGES)?;
    eq("swap_outs", vm.get("swap_outs")?, outs)?;
    drop(guest);
    drop(mount);
    disk.unmount()
}

fn read_fails(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 1024;
    let disk = Disk::new(ctx)?;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", PAGES)?;
    guest.fill_noise(0, PAGES);
    push_out(ctx, &guest, PAGES)?;
    let failed = sys.get("swap_reads_failed")?;
    sys::shut_down(&disk.path)?;
    let mut seen = vec![0; PAGE];
    let page_0 = guest.file.read_exact_at(&mut seen, 0);
    fails("read(2) of page 0", page_0, Errno::EIO)?;
    ctx.until_least("swap_reads_failed", failed + 1, SOON)?;
    touch_lost(ctx, &guest, 1)?;
    // A part of a lost page cannot be written; a hole frees it, and it is a page again.
    let part = guest.file.write_all_at(&[1; 10], PAGE as u64);
    fails("write(2) of a part", part, Errno::EIO)?;
    // Nor can a part be cut off: it would be there again with the disk.
    let at = PAGE as u64 + 100;
    let hole = sys::punch(&guest.file, at, 1000);
    fails("a hole in a part", hole, Errno::EIO)?;
    let end = sys::ftruncate(&guest.file, at as i64);
    fails("an end within it", end, Errno::EIO)?;
    eq("size", guest.file.metadata()?.len(), (PAGES * PAGE) as u64)?;
    sys::punch(&guest.file, 0, 8 * PAGE as u64)?;
    guest.is_zero(0, 8)?;
    guest.map.write_page(0, &content::noise(7));
    page_is("page 0", &guest.map.read_page(0), &content::noise(7))?;
    guest.sysfs(ctx).stat()?.check_sum()?;
    drop(guest);
    drop(mount);
    disk.unmount()
}

/// Blocks that hold what looks random, and was not there before.
pub fn dense(before: &[u8], after: &[u8]) -> Vec<usize> {
    let blocks = before.chunks(PAGE).zip(after.chunks(PAGE)).enumerate();
    blocks
        .filter(|(_, (before, after))| {
            let zeroes = after.iter().filter(|&&byte| byte == 0).count();
            before != after && zeroes < 100
        })
        .map(|(block, _)| block)
        .collect()
}

fn corrupt(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 1024;
    const FLIPS: usize = 8;
    let disk = Disk::new(ctx)?;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", PAGES)?;
    guest.fill_noise(0, PAGES);
    let before = disk.bytes()?;
    push_out(ctx, &guest, PAGES)?;
    until_vm(ctx, &guest, "swap_outs", |n| n + 16 >= PAGES as u64)?;
    let blocks = dense(&before, &disk.bytes()?);
    within(
        "blocks of swapped pages",
        blocks.len(),
        PAGES * 3 / 4,
        PAGES + 64,
    )?;
    let raw = disk.raw()?;
    let buffer = Map::anonymous(PAGE)?;
    for block in blocks
        .iter()
        .skip(3)
        .step_by(blocks.len() / FLIPS)
        .take(FLIPS)
    {
        let at = (block * PAGE) as u64;
        eq("read", sys::pread_into(&raw, &buffer, 0, PAGE, at)?, PAGE)?;
        buffer.set(0, WORDS / 2, !buffer.get(0, WORDS / 2));
        let written = sys::pwrite_from(&raw, &buffer, 0, PAGE, at)?;
        eq("written", written, PAGE)?;
    }
    let bad = sys.get("swap_objects_corrupt")?;
    let mut lost = 0;
    for page in 0..PAGES {
        let mut seen = vec![0; PAGE];
        match guest.file.read_exact_at(&mut seen, (page * PAGE) as u64) {
            Ok(()) => {
                let expected = content::bytes_of(&content::noise(page as u64));
                bytes_are(format!("page {page}"), &seen, &expected)?;
            }
            Err(e) => {
                eq("errno", e.raw_os_error(), Some(libc::EIO))?;
                touch_lost(ctx, &guest, page)?;
                lost += 1;
            }
        }
    }
    // Each flip hit one page, or what separates two.
    within("lost pages", lost, FLIPS / 2, FLIPS)?;
    within(
        "swap_objects_corrupt",
        sys.get("swap_objects_corrupt")?,
        bad + lost as u64,
        u64::MAX,
    )?;
    guest.sysfs(ctx).stat()?.check_sum()
}

/// What a search for a page of a guest looks for: sixteen bytes that no other page has.
pub fn stamp(page: usize) -> [u8; 16] {
    let mut stamp = [0; 16];
    stamp[..8].copy_from_slice(&content::mix(page as u64).to_ne_bytes());
    stamp[8..].copy_from_slice(&content::mix(!(page as u64)).to_ne_bytes());
    stamp[0] = 0xa7;
    stamp
}

/// A page with its [`stamp`]; every second one compresses.
pub fn stamped(page: usize) -> PageBuf {
    let mut content = match page % 2 {
        0 => content::noise(page as u64),
        _ => content::page(page as u64),
    };
    let stamp = stamp(page);
    let (low, high) = stamp.split_at(8);
    for (word, bytes) in content[100..102].iter_mut().zip([low, high]) {
        *word = bytes
            .iter()
            .rev()
            .fold(0, |word, byte| (word << 8) | u64::from(*byte));
    }
    content
}

/// A file of nothing but stamps, which is on the disk when this returns.
pub fn write_stamps(path: &Path, pages: Range<usize>) -> Result<()> {
    let mut file = File::create(path)?;
    for page in pages {
        std::io::Write::write_all(&mut file, &stamp(page))?;
    }
    file.sync_all().map_err(Into::into)
}

/// How many of the needles are in the hay.
pub fn found(hay: &[u8], needles: &[[u8; 16]]) -> usize {
    let mut windows = std::collections::HashSet::new();
    for at in 0..hay.len().saturating_sub(15) {
        // Every needle begins with an odd byte that few others begin with.
        if hay[at] == 0xa7 {
            windows.insert(&hay[at..at + 16]);
        }
    }
    needles.iter().filter(|n| windows.contains(&n[..])).count()
}

fn encrypted(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 1024;
    const STAMPED: usize = 32;
    let disk = Disk::new(ctx)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", PAGES)?;
    for page in 0..PAGES {
        guest.map.write_page(page, &stamped(page));
    }
    push_out(ctx, &guest, PAGES)?;
    until_vm(ctx, &guest, "swap_outs", |n| n + 64 >= PAGES as u64)?;
    // The search finds what is there: stamps in a file beside.
    let plain = PAGES..PAGES + STAMPED;
    write_stamps(&disk.path.join("plain"), plain.clone())?;
    let plain: Vec<[u8; 16]> = plain.map(stamp).collect();
    let bytes = disk.bytes()?;
    eq("stamps of a plain file", found(&bytes, &plain), STAMPED)?;
    let secret: Vec<[u8; 16]> = (0..PAGES).map(stamp).collect();
    eq("stamps of swapped pages", found(&bytes, &secret), 0)
}

fn killed(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 2048;
    let disk = Disk::new(ctx)?;
    for round in 0..4u64 {
        let mut mount = ctx.mount("m", "size=64M,domain=lab")?;
        {
            let guest = mount.guest("web", PAGES)?;
            guest.fill_noise(0, PAGES);
            force(ctx, "hard")?;
            let mut child = sys::fork(|| {
                let map = map_again(&guest)?;
                loop {
                    for page in 0..PAGES {
                        map.get(page, 0);
                    }
                }
            })?;
            until_vm(ctx, &guest, "swap_outs", |n| n > 200)?;
            thread::sleep(Duration::from_millis(20 * round));
            nix::sys::signal::kill(child.pid(), Signal::SIGKILL)?;
            child.expect_signal(Signal::SIGKILL, ctx.limit(20.0))?;
            guest.sysfs(ctx).stat()?.check_sum()?;
            fs::remove_file(&guest.path)?;
        }
        mount.unmount()?;
        force(ctx, "none")?;
        eq("VMs", ctx.sys().vms()?.len(), 0)?;
    }
    disk.unmount()
}

fn ends(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 2048;
    let disk = Disk::new(ctx)?;
    let before = disk.used_blocks()?;
    let mut mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", PAGES)?;
    guest.fill_noise(0, PAGES);
    push_out(ctx, &guest, PAGES)?;
    ensure!(
        disk.used_blocks()? > before + 1000,
        "nothing is on the disk"
    );
    drop(guest);
    mount.unmount()?;
    ctx.until("the disk to be empty", SOON, || {
        let used = disk.used_blocks()?;
        Ok((
            used <= before + 16,
            format!("{used} blocks, {before} before"),
        ))
    })?;
    disk.unmount()
}

fn from_huge(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 2048;
    let _disk = Disk::new(ctx)?;
    huge::always(ctx)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", PAGES)?;
    guest.fill(0, PAGES, 1);
    within(
        "huge_kb",
        guest.sysfs(ctx).get("huge_kb")?,
        2048,
        4 * PAGES as u64,
    )?;
    push_out(ctx, &guest, PAGES)?;
    guest.holds(0, PAGES, 1)
}

fn every_stage(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 8192;
    // Twice, so that each page had the time to go and to come.
    const ROUNDS_MIN: u64 = 2;
    const WAYS: [&str; 4] = ["compressions", "decompressions", "swap_outs", "swap_ins"];
    let size = 4 * PAGES as u64;
    let _disk = Disk::new(ctx)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", PAGES)?;
    let vm = guest.sysfs(ctx);
    let seed = |page: usize, version: u64| content::mix(((page as u64) << 32) | version);
    let mut versions = vec![0u64; PAGES];
    for page in 0..PAGES {
        guest.map.write_page(page, &content::page(seed(page, 0)));
    }
    vm.set("limit_kb", size / 2)?;
    let count = || -> Result<Vec<u64>> { WAYS.iter().map(|way| vm.get(way)).collect() };
    let before = count()?;
    let mut rng = SmallRng::seed_from_u64(ctx.setup.seed);
    let mut order: Vec<usize> = (0..PAGES).collect();
    let end = Instant::now() + ctx.span(10.0);
    let mut shown = Instant::now();
    let (mut rounds, mut checked) = (0u64, 0u64);
    while rounds < ROUNDS_MIN || Instant::now() < end {
        order.shuffle(&mut rng);
        for &page in &order {
            let expected = content::page(seed(page, versions[page]));
            let what = format!("page {page}, version {}", versions[page]);
            page_is(what, &guest.map.read_page(page), &expected)?;
            checked += 1;
            if rng.random_ratio(1, 8) {
                versions[page] += 1;
                let next = content::page(seed(page, versions[page]));
                guest.map.write_page(page, &next);
            }
        }
        rounds += 1;
        if shown.elapsed() > Duration::from_secs(10) {
            shown = Instant::now();
            println!("{checked} pages checked");
        }
    }
    println!("{checked} pages checked");
    for ((way, before), after) in WAYS.iter().zip(before).zip(count()?) {
        println!("{way}: {}", after - before);
        within(way, after - before, PAGES as u64 / 8, u64::MAX)?;
    }
    Ok(())
}
