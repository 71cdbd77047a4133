// SPDX-License-Identifier: GPL-2.0

//! What the kernel itself refuses in the midst of an operation: memory, and requests to a disk. Needs a
//! kernel with fault injection (Documentation/fault-injection), as the debug kernels are.

use std::fs::{self, File};
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use nix::errno::Errno;

use crate::check::{bytes_are, eq, fails, skip, that};
use crate::content;
use crate::contention::force;
use crate::ctx::{Ctx, Guest};
use crate::harness::Case;
use crate::inject::{self, Failing};
use crate::operations::OPERATIONS;
use crate::swap::{push_out, touch_lost, until_vm, Disk};
use crate::sys::{self, PAGE};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::thinram(
        "fail/allocations",
        "what the kernel allocates in each operation fails: nothing is lost",
        allocations,
    )
    .span(240.0),
    Case::thinram(
        "fail/swap-allocations",
        "what it allocates, and asks of the disk, on the way to swap and back: nothing is lost",
        swap_allocations,
    )
    .span(120.0),
    Case::thinram(
        "fail/swap-writes",
        "requests to write to a swap file fail: the pages stay, and go later",
        swap_writes,
    ),
    Case::thinram(
        "fail/swap-reads",
        "requests to read from it fail: EIO or SIGBUS, until they do not; nothing cut off comes back",
        swap_reads,
    ),
    Case::thinram(
        "fail/load",
        "what the kernel allocates for insmod fails: it is refused, and works the next time",
        load,
    )
    .span(240.0),
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

/// Each of some tasks has one of its allocations fail, or its requests to a disk that may.
struct Tasks {
    own: File,
    others: Vec<File>,
    errors: &'static [Errno],
}

/// Of memory. The last: a page of the caller's own buffer that could not be had.
const OF_MEMORY: &[Errno] = &[Errno::ENOMEM, Errno::ENOSPC, Errno::EFAULT];
/// And of a disk that does not read.
const OF_DISK: &[Errno] = &[Errno::ENOMEM, Errno::ENOSPC, Errno::EFAULT, Errno::EIO];

impl Tasks {
    /// The thread that calls, and the processes whose names begin so; what may come of it.
    fn new(others: &str, errors: &'static [Errno]) -> Result<Tasks> {
        let open = |path: &Path| File::options().read(true).write(true).open(path);
        let Ok(own) = open(Path::new("/proc/thread-self/fail-nth")) else {
            return Err(skip("a kernel without fault injection"));
        };
        // Those count that may wait and those of any size; nothing is written to the log.
        for (file, value) in [
            ("failslab/ignore-gfp-wait", "N"),
            ("failslab/verbose", "0"),
            ("fail_page_alloc/ignore-gfp-wait", "N"),
            ("fail_page_alloc/ignore-gfp-highmem", "N"),
            ("fail_page_alloc/min-order", "0"),
            ("fail_page_alloc/verbose", "0"),
            ("fail_make_request/verbose", "0"),
        ] {
            tell(Path::new(DEBUGFS).join(file), value)?;
        }
        let others = processes(others)?
            .iter()
            .map(|path| open(&path.join("fail-nth")))
            .collect::<std::io::Result<Vec<_>>>()?;
        that("there are such processes", !others.is_empty())?;
        Ok(Tasks {
            own,
            others,
            errors,
        })
    }
}

impl Failing for Tasks {
    fn arm(&self, nth: u64) -> Result<()> {
        let nth = nth.to_string();
        for mut task in self.others.iter().chain([&self.own]) {
            task.write_all(nth.as_bytes())?;
        }
        Ok(())
    }

    fn disarm(&self) -> Result<bool> {
        let mut failed = false;
        for mut task in [&self.own].into_iter().chain(&self.others) {
            let mut left = [0; 24];
            let length = task.read_at(&mut left, 0)?;
            failed |= left[..length].trim_ascii() == b"0";
            task.write_all(b"0")?;
        }
        Ok(failed)
    }

    fn errors(&self) -> &'static [Errno] {
        self.errors
    }
}

/// Every failure at first, then one of more and more, insmod makes thousands of requests; the larger the
/// scale, the more of them.
fn sparser(ctx: &Ctx) -> impl Fn(u64) -> u64 {
    let steps = (16.0 * ctx.setup.scale).max(1.0) as u64;
    move |nth| nth + 1 + nth / steps
}

fn allocations(ctx: &Ctx) -> Result<()> {
    let tasks = Tasks::new("thinram_", OF_MEMORY)?;
    for operation in OPERATIONS {
        let failures = inject::fail_each(ctx, operation, &tasks, &sparser(ctx))?;
        that(
            format!("the kernel allocates something for {}", operation.name),
            failures > 0 || operation.name == "read(2)",
        )?;
    }
    Ok(())
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

fn swap_allocations(ctx: &Ctx) -> Result<()> {
    let tasks = Tasks::new("thinram_", OF_DISK)?;
    // Requests of these threads count as well: the disk is one that may fail.
    let requests = Requests::new(ctx, "thinram_swap")?;
    tell(&requests.device, "1")?;
    inject::fail_swapping(ctx, &tasks, &sparser(ctx))
}

fn swap_writes(ctx: &Ctx) -> Result<()> {
    let requests = Requests::new(ctx, "thinram_swapout")?;
    writes_fail(ctx, &|on| requests.fail(on))
}

/// What is written to a swap file fails while `fail` says so, after it has room: the pages stay, and go
/// later.
pub fn writes_fail(ctx: &Ctx, fail: &dyn Fn(bool) -> Result<()>) -> Result<()> {
    const PAGES: usize = 512;
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
    fail(true)?;
    force(ctx, "hard")?;
    ctx.until_least("swap_writes_failed", failed + 2, 40.0)?;
    force(ctx, "none")?;
    eq("swap_outs", vm.get("swap_outs")?, outs)?;
    vm.stat()?.check_sum()?;
    guest.holds_noise(0, PAGES)?;
    fail(false)?;
    push_out(ctx, &guest, PAGES)?;
    until_vm(ctx, &guest, "swap_outs", |seen| seen > outs)?;
    guest.holds_noise(0, PAGES)?;
    drop(guest);
    drop(mount);
    disk.unmount()
}

fn swap_reads(ctx: &Ctx) -> Result<()> {
    let requests = Requests::new(ctx, "thinram_swapin")?;
    reads_fail(ctx, &|on| requests.fail(on))
}

/// What is read from one fails while `fail` says so: EIO or SIGBUS, until it does not any more.
pub fn reads_fail(ctx: &Ctx, fail: &dyn Fn(bool) -> Result<()>) -> Result<()> {
    const PAGES: usize = 512;
    let disk = Disk::new(ctx)?;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", PAGES)?;
    let vm = guest.sysfs(ctx);
    guest.fill_noise(0, PAGES);
    push_out(ctx, &guest, PAGES)?;
    until_vm(ctx, &guest, "swap_outs", |outs| outs + 16 >= PAGES as u64)?;
    let failed = sys.get("swap_reads_failed")?;
    fail(true)?;
    let mut seen = vec![0; PAGE];
    let page_0 = guest.file.read_exact_at(&mut seen, 0);
    fails("read(2) of page 0", page_0, Errno::EIO)?;
    ctx.until_least("swap_reads_failed", failed + 1, 40.0)?;
    touch_lost(ctx, &guest, 1)?;
    let mut expected: Vec<u8> = (0..PAGES)
        .flat_map(|page| content::bytes_of(&content::noise(page as u64)))
        .collect();
    // What cuts off a part of a page that cannot be read is refused, or what it cut off stays so.
    let (holes, ends) = cut(&guest, &mut expected)?;
    that(format!("{holes} holes are refused"), holes > 0)?;
    that(format!("{ends} new ends are refused"), ends > 0)?;
    vm.stat()?.check_sum()?;
    fail(false)?;
    // Nothing was given up: what could not be read is tried again after a second.
    for page in 0..PAGES {
        ctx.until(&format!("page {page} to be readable again"), 10.0, || {
            let read = guest.file.read_exact_at(&mut seen, (page * PAGE) as u64);
            Ok((read.is_ok(), format!("{read:?}")))
        })?;
    }
    let intact = |expected: &[u8]| -> Result<()> {
        for page in 0..PAGES {
            let at = page * PAGE;
            let of_page = &expected[at..at + PAGE];
            let mut seen = vec![0; PAGE];
            guest.file.read_exact_at(&mut seen, at as u64)?;
            bytes_are(format!("page {page}"), &seen, of_page)?;
        }
        Ok(())
    };
    intact(&expected)?;
    eq("cuts that are refused", cut(&guest, &mut expected)?, (0, 0))?;
    intact(&expected)?;
    for page in 0..PAGES {
        let mapped = content::bytes_of(&guest.map.read_page(page));
        let at = page * PAGE;
        bytes_are(
            format!("page {page}, mapped"),
            &mapped,
            &expected[at..at + PAGE],
        )?;
    }
    vm.stat()?.check_sum()?;
    drop(guest);
    drop(mount);
    disk.unmount()
}

/// Punches holes that end within pages, and cuts the file off within one and lets it grow again, at
/// several places. `expected`, what the file holds, becomes what it holds then; how many holes and new
/// ends were refused for an error of the disk.
fn cut(guest: &Guest, expected: &mut [u8]) -> Result<(u32, u32)> {
    let len = expected.len();
    let (mut holes, mut ends) = (0, 0);
    let mut apply = |done: nix::Result<()>, cut: Range<usize>, refused: &mut u32| -> Result<bool> {
        match done {
            Ok(()) => expected[cut].fill(0),
            Err(Errno::EIO) => *refused += 1,
            Err(e) => bail!("bytes {cut:?} cut off: {e}"),
        }
        Ok(done.is_ok())
    };
    // Places that no two clusters of the swap file hold together.
    for first in [40, 80, 120] {
        let at = |page: usize, byte: usize| (first + page) * PAGE + byte;
        // Within a page, to the end of one and from the start of one: the whole page is not touched if
        // the part is refused.
        for hole in [
            at(0, 100)..at(0, 2000),
            at(2, 100)..at(4, 0),
            at(5, 0)..at(6, 100),
        ] {
            let done = sys::punch(&guest.file, hole.start as u64, hole.len() as u64);
            apply(done, hole, &mut holes)?;
        }
    }
    for pages in [40, 80, 120] {
        let end = len - pages * PAGE + 100;
        let done = sys::ftruncate(&guest.file, end as i64);
        let size = guest.file.metadata()?.len();
        if apply(done, end..len, &mut ends)? {
            eq("size", size, end as u64)?;
            sys::ftruncate(&guest.file, len as i64)?;
        } else {
            eq("size after a refusal", size, len as u64)?;
        }
    }
    Ok((holes, ends))
}

fn load(ctx: &Ctx) -> Result<()> {
    // Threads are made by the kernel's own.
    let tasks = Tasks::new("kthreadd", OF_MEMORY)?;
    // The kernel itself says EAGAIN for one that got no `struct kthread` (copy_process).
    let errors = [Errno::ENOMEM, Errno::EAGAIN];
    inject::fail_loading(ctx, &sparser(ctx), &errors, |file, nth| {
        tasks.arm(nth)?;
        let loaded = sys::insert_module(file, "");
        Ok((loaded, tasks.disarm()?))
    })
}
