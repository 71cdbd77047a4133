// SPDX-License-Identifier: GPL-2.0

//! Requests to a disk that the kernel itself lets fail. Needs one with fault injection
//! (Documentation/fault-injection), as that with sanitizers is.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::errno::Errno;

use crate::check::{bytes_are, eq, fails, skip, that};
use crate::content;
use crate::contention::force;
use crate::ctx::Ctx;
use crate::harness::Case;
use crate::swap::{push_out, touch_lost, until_vm, Disk};
use crate::sys::PAGE;

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::thinram(
        "fail/swap-writes",
        "requests to write to a swap file fail: the pages stay, and go later",
        swap_writes,
    ),
    Case::thinram(
        "fail/swap-reads",
        "requests to read from it fail: EIO or SIGBUS, until they do not any more",
        swap_reads,
    ),
];

/// Where the kernel's switches are.
const DEBUGFS: &str = "/sys/kernel/debug";

/// Sets a file of the kernel's.
fn tell(path: impl AsRef<Path>, value: &str) -> Result<()> {
    let path = path.as_ref();
    fs::write(path, value).with_context(|| format!("{value} to {}", path.display()))
}

/// Processes of the module, or of the kernel, by the beginning of their names.
fn processes(name: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for process in fs::read_dir("/proc")? {
        let path = process?.path();
        // Others come and go.
        if fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.starts_with(name)) {
            found.push(path);
        }
    }
    Ok(found)
}

/// Requests that threads of the module make to the scratch disk may fail.
struct Requests {
    device: PathBuf,
    threads: Vec<PathBuf>,
}

impl Requests {
    /// Those of threads whose names begin so.
    fn new(ctx: &Ctx, threads: &str) -> Result<Requests> {
        let Some(device) = &ctx.setup.scratch else {
            return Err(skip("no --scratch device to make a file system on"));
        };
        let name = device.file_name().context("a device without a name")?;
        let device = Path::new("/sys/block").join(name).join("make-it-fail");
        if !device.exists() {
            return Err(skip("a kernel without fault injection"));
        }
        let threads: Vec<PathBuf> = processes(threads)?
            .iter()
            .map(|path| path.join("make-it-fail"))
            .collect();
        that("there are such threads", !threads.is_empty())?;
        for (file, value) in [
            ("task-filter", "Y"),
            ("verbose", "0"),
            ("interval", "1"),
            ("space", "0"),
            ("times", "-1"),
        ] {
            tell(
                Path::new(DEBUGFS).join("fail_make_request").join(file),
                value,
            )?;
        }
        Ok(Requests { device, threads })
    }

    /// Whether they do.
    fn fail(&self, on: bool) -> Result<()> {
        let probability = if on { "100" } else { "0" };
        tell(&self.device, if on { "1" } else { "0" })?;
        for thread in &self.threads {
            tell(thread, if on { "1" } else { "0" })?;
        }
        let all = Path::new(DEBUGFS).join("fail_make_request/probability");
        tell(all, probability)
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        if let Err(e) = self.fail(false) {
            eprintln!("{e:#}");
        }
    }
}

fn swap_writes(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 512;
    let requests = Requests::new(ctx, "thinram_swapout")?;
    let disk = Disk::new(ctx)?;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", PAGES)?;
    let vm = guest.sysfs(ctx);
    guest.fill_noise(0, PAGES);
    // The file has its room when they begin to fail.
    push_out(ctx, &guest, PAGES)?;
    guest.holds_noise(0, PAGES)?;
    let (outs, failed) = (vm.get("swap_outs")?, sys.get("swap_writes_failed")?);
    requests.fail(true)?;
    force(ctx, "hard")?;
    ctx.until_least("swap_writes_failed", failed + 2, 40.0)?;
    force(ctx, "none")?;
    eq("swap_outs", vm.get("swap_outs")?, outs)?;
    vm.stat()?.check_sum()?;
    guest.holds_noise(0, PAGES)?;
    requests.fail(false)?;
    push_out(ctx, &guest, PAGES)?;
    until_vm(ctx, &guest, "swap_outs", |seen| seen > outs)?;
    guest.holds_noise(0, PAGES)?;
    drop(guest);
    drop(mount);
    disk.unmount()
}

fn swap_reads(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 512;
    let requests = Requests::new(ctx, "thinram_swapin")?;
    let disk = Disk::new(ctx)?;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", PAGES)?;
    let vm = guest.sysfs(ctx);
    guest.fill_noise(0, PAGES);
    push_out(ctx, &guest, PAGES)?;
    until_vm(ctx, &guest, "swap_outs", |outs| outs + 16 >= PAGES as u64)?;
    let failed = sys.get("swap_reads_failed")?;
    requests.fail(true)?;
    let mut seen = vec![0; PAGE];
    let page_0 = guest.file.read_exact_at(&mut seen, 0);
    fails("read(2) of page 0", page_0, Errno::EIO)?;
    ctx.until_least("swap_reads_failed", failed + 1, 40.0)?;
    touch_lost(ctx, &guest, 1)?;
    vm.stat()?.check_sum()?;
    requests.fail(false)?;
    // Nothing was given up: what could not be read is tried again after a second.
    ctx.until("page 0 to be readable again", 10.0, || {
        let read = guest.file.read_exact_at(&mut seen, 0);
        Ok((read.is_ok(), format!("{read:?}")))
    })?;
    for page in 0..PAGES {
        guest.file.read_exact_at(&mut seen, (page * PAGE) as u64)?;
        let expected = content::bytes_of(&content::noise(page as u64));
        bytes_are(format!("page {page}"), &seen, &expected)?;
    }
    guest.holds_noise(0, PAGES)?;
    vm.stat()?.check_sum()?;
    drop(guest);
    drop(mount);
    disk.unmount()
}
