// SPDX-License-Identifier: GPL-2.0

//! What the kernel's test of zswap (cgroup/test_zswap.c) checks, each case rebuilt on files of
//! ThinRAM and named after it: a VM stands for a memory cgroup, `limit_kb` for memory.max,
//! `compress_max_percent` for memory.zswap.max, and `swap_dir` for memory.zswap.writeback.

use std::thread;
use std::time::Duration;

use anyhow::{ensure, Context, Result};

use crate::check::{eq, page_is, within};
use crate::compress::TRIED_KB;
use crate::content;
use crate::contention::force;
use crate::ctx::{Ctx, Guest};
use crate::harness::Case;
use crate::swap::Disk;
use crate::sys::{PageBuf, PAGE, WORDS};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::thinram(
        "zswap/usage",
        "what is above a VM's limit goes into its cache",
        usage,
    ),
    Case::thinram(
        "zswap/swapin-nozswap",
        "with a cap of 0 pages go to swap and nothing stays in the cache",
        swapin_nozswap,
    ),
    Case::thinram(
        "zswap/zswapin",
        "four times the limit, read again: all comes back from the cache",
        zswapin,
    ),
    Case::thinram(
        "zswap/writeback-enabled",
        "a quarter of the room for the same pages: the rest is written to swap",
        writeback_enabled,
    ),
    Case::thinram(
        "zswap/writeback-disabled",
        "without swap_dir the rest stays where it is",
        writeback_disabled,
    ),
    Case::thinram(
        "zswap/no-kmem-bypass",
        "what the host's shortage pushes out counts for its VM",
        no_kmem_bypass,
    ),
    Case::thinram(
        "zswap/no-invasive-cgroup-shrink",
        "a full cache writes out its own pages, no other VM's",
        no_invasive_cgroup_shrink,
    ),
    Case::thinram(
        "zswap/incompressible",
        "random data are counted, in swap as without",
        incompressible,
    ),
];

/// Seconds within which some thousand pages surely go.
const SOON: f64 = 40.0;
/// Pages in a MiB.
const MIB: usize = 256;

/// A page whose first `bytes` bytes are made by `byte`, the others zero.
fn page_of(bytes: usize, byte: impl Fn(usize) -> u8) -> PageBuf {
    let mut page = [0; WORDS];
    for (i, word) in page.iter_mut().enumerate() {
        let of = |k: usize| match i * 8 + k {
            at if at < bytes => byte(at),
            _ => 0,
        };
        *word = u64::from_ne_bytes(std::array::from_fn(of));
    }
    page
}

/// The pages that allocate_bytes() makes: an `a`, then zeroes.
fn allocated() -> PageBuf {
    page_of(1, |_| b'a')
}

/// The pages of attempt_writeback(): half of each counts up.
fn counting() -> PageBuf {
    page_of(PAGE / 2, |at| at as u8)
}

fn fill(guest: &Guest, page: &PageBuf) {
    for at in 0..guest.map.pages() {
        guest.map.write_page(at, page);
    }
}

fn holds(guest: &Guest, page: &PageBuf) -> Result<()> {
    for at in 0..guest.map.pages() {
        page_is(
            format!("{} page {at}", guest.name),
            &guest.map.read_page(at),
            page,
        )?;
    }
    Ok(())
}

/// Waits for a figure of the VM, whose states add up in all readings.
fn until_vm(ctx: &Ctx, guest: &Guest, name: &str, good: impl Fn(u64) -> bool) -> Result<()> {
    let vm = guest.sysfs(ctx);
    ctx.until(&format!("a good {name} of {}", guest.name), SOON, || {
        vm.stat()?.check_sum()?;
        let seen = vm.get(name)?;
        Ok((good(seen), format!("{seen} in {:?}", vm.stat()?)))
    })
}

/// Pages of a VM in its cache or in swap.
fn out_kb(ctx: &Ctx, guest: &Guest) -> Result<u64> {
    let stat = guest.sysfs(ctx).stat()?;
    Ok(stat.get("compressed_kb")? + stat.get("swapped_kb")?)
}

fn usage(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M")?;
    let guest = mount.guest("no_shrink", 4 * MIB)?;
    let vm = guest.sysfs(ctx);
    eq("compressions before", vm.get("compressions")?, 0)?;
    vm.set("limit_kb", 1024)?;
    fill(&guest, &allocated());
    until_vm(ctx, &guest, "resident_kb", |kb| kb <= 1024)?;
    let compressed = vm.get("compressed_kb")?;
    within("compressed_kb", compressed, 3 * 1024, 4 * 1024)?;
    within("compressions", vm.get("compressions")?, 3 * 256, u64::MAX)?;
    holds(&guest, &allocated())
}

fn swapin_nozswap(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 512;
    let size = 4 * PAGES as u64;
    let _disk = Disk::new(ctx)?;
    let sys = ctx.sys();
    sys.set("compress_max_percent", 0)?;
    let mount = ctx.mount("m", "size=64M")?;
    let guest = mount.guest("no_zswap", PAGES)?;
    let vm = guest.sysfs(ctx);
    vm.set("limit_kb", size * 3 / 4)?;
    let pooled = || -> Result<u64> {
        let stat = vm.stat()?;
        stat.check_sum()?;
        Ok(stat.get("compressed_kb")? + stat.get("compressed_pool_kb")?)
    };
    fill(&guest, &allocated());
    ctx.until("a quarter in swap", SOON, || {
        eq("KiB in the cache", pooled()?, 0)?;
        let seen = vm.get("swapped_kb")?;
        Ok((seen >= size / 4, format!("{seen} KiB")))
    })?;
    holds(&guest, &allocated())?;
    eq("KiB in the cache", pooled()?, 0)?;
    within("swap_ins", vm.get("swap_ins")?, size / 16, u64::MAX)?;
    eq("decompressions", vm.get("decompressions")?, 0)
}

fn zswapin(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M")?;
    let guest = mount.guest("zswapin", 32 * MIB)?;
    let vm = guest.sysfs(ctx);
    vm.set("compress_max_percent", 100)?;
    vm.set("limit_kb", 8 << 10)?;
    fill(&guest, &allocated());
    until_vm(ctx, &guest, "resident_kb", |kb| kb <= 8 << 10)?;
    holds(&guest, &allocated())?;
    let back = vm.get("decompressions")?;
    within("pages brought back", back, 24 * MIB as u64, u64::MAX)?;
    eq("swap_ins", vm.get("swap_ins")?, 0)
}

/// attempt_writeback(): all into the cache and back, then again with a quarter of that room.
/// With `swap` all of it has to go, else what fits.
fn attempt_writeback(ctx: &Ctx, name: &str, swap: bool) -> Result<()> {
    const PAGES: usize = 8 * MIB;
    let size = 4 * PAGES as u64;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M")?;
    let guest = mount.guest(name, PAGES)?;
    let vm = guest.sysfs(ctx);
    vm.set("compress_max_percent", 100)?;
    fill(&guest, &counting());
    // With swap the oldest of the cache go on to it while the host is short: a limit does not ask
    // for more than itself.
    vm.set("limit_kb", size / 2)?;
    until_vm(ctx, &guest, "resident_kb", |kb| kb <= size / 2)?;
    let (compressed, pool) = (vm.get("compressed_kb")?, vm.get("compressed_pool_kb")?);
    ensure!(compressed > 0 && pool > 0, "{compressed} KiB in {pool}");
    eq("swap_outs within the cap", vm.get("swap_outs")?, 0)?;
    vm.set("limit_kb", 0)?;
    holds(&guest, &counting())?;
    // Half of the VM took that pool: a quarter of what all of it would take.
    let percent = (pool * 2 / 4 * 100 / size).max(1);
    vm.set("compress_max_percent", percent)?;
    let refused = sys.get("compressions_refused_pool_full")?;
    force(ctx, "hard")?;
    if swap {
        until_vm(ctx, &guest, "swap_outs", |pages| pages > 0)?;
        ctx.until("all pages are out", SOON, || {
            let seen = out_kb(ctx, &guest)?;
            Ok((seen == size, format!("{seen} KiB")))
        })?;
    } else {
        ctx.until_least("compressions_refused_pool_full", refused + 1, SOON)?;
        // It stays so: nothing is written, and nothing above the cap.
        thread::sleep(Duration::from_millis(500));
        eq("swap_outs", vm.get("swap_outs")?, 0)?;
        eq("swapped_kb", vm.get("swapped_kb")?, 0)?;
        within("private_kb", vm.get("private_kb")?, size / 4, size - 1)?;
    }
    within(
        "compressed_pool_kb",
        vm.get("compressed_pool_kb")?,
        0,
        size * percent / 100 + TRIED_KB,
    )?;
    force(ctx, "none")?;
    holds(&guest, &counting())
}

fn writeback_enabled(ctx: &Ctx) -> Result<()> {
    let disk = Disk::new(ctx)?;
    attempt_writeback(ctx, "writeback", true)?;
    ctx.until_no_vm()?;
    // The directory is taken away: the next VM has none, as a child of a cgroup that may not.
    drop(disk);
    attempt_writeback(ctx, "child", false)
}

fn writeback_disabled(ctx: &Ctx) -> Result<()> {
    attempt_writeback(ctx, "writeback", false)?;
    ctx.until_no_vm()?;
    // Nor does another VM, with limits of its own.
    attempt_writeback(ctx, "child", false)
}

fn no_kmem_bypass(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 16 * MIB;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M")?;
    let (guest, other) = (
        mount.guest("kmem_bypass", PAGES)?,
        mount.guest("other", MIB)?,
    );
    fill(&guest, &allocated());
    fill(&other, &counting());
    let (vm, beside) = (guest.sysfs(ctx), other.sysfs(ctx));
    beside.set("reservation_kb", 1024)?;
    let (before, of_vm) = (sys.get("compressions")?, vm.get("compressions")?);
    // The host's own measure of what is available, not a forced state.
    sys.set("minfree_kb", sys.get("available_kb")? * 100 / 50)?;
    eq("state", sys.word("state")?, "hard".to_owned())?;
    let threshold = 4 * PAGES as u64 / 5;
    until_vm(ctx, &guest, "compressed_kb", |kb| kb > threshold)?;
    sys.set("minfree_kb", 1)?;
    ctx.until("high", SOON, || {
        let state = sys.word("state")?;
        Ok((state == "high", state))
    })?;
    // What was begun before may still end.
    ctx.until("as many compressions of the VM as of all", SOON, || {
        let all = sys.get("compressions")? - before;
        let own = vm.get("compressions")? - of_vm;
        Ok((own == all, format!("{own} of {all}")))
    })?;
    // It is the VM's memory, too: its frames shrank to the pool.
    let stat = vm.stat()?;
    within(
        "compressed_pool_kb",
        stat.get("compressed_pool_kb")?,
        1,
        u64::MAX,
    )?;
    eq(
        "resident_kb",
        stat.get("resident_kb")?,
        stat.get("private_kb")? + stat.get("compressed_pool_kb")?,
    )?;
    eq("private_kb beside it", beside.get("private_kb")?, 1024)?;
    holds(&guest, &allocated())?;
    holds(&other, &counting())
}

fn no_invasive_cgroup_shrink(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 4 * MIB;
    let size = 4 * PAGES as u64;
    let _disk = Disk::new(ctx)?;
    let mount = ctx.mount("m", "size=64M")?;
    let (wb, zw) = (mount.guest("wb", PAGES)?, mount.guest("zw", PAGES)?);
    let (wb_vm, zw_vm) = (wb.sysfs(ctx), zw.sysfs(ctx));
    for vm in [&wb_vm, &zw_vm] {
        vm.set("limit_kb", size / 2)?;
    }
    // As little as there is; 0 is the host's.
    wb_vm.set("compress_max_percent", 1)?;
    zw_vm.set("compress_max_percent", 100)?;
    // Simple data, easy to compress.
    let easy = page_of(PAGE / 4, |_| b'a');
    fill(&zw, &easy);
    until_vm(ctx, &zw, "resident_kb", |kb| kb <= size / 2)?;
    let before = zw_vm.get("swap_outs")?;
    eq("swap_outs of zw", before, 0)?;
    let compressed = zw_vm.get("compressed_kb")?;
    within("compressed_kb of zw", compressed, 1, size)?;
    // A quarter of each page is random.
    let hard = |page: usize| {
        let mut content = [0; WORDS];
        content[..WORDS / 4].copy_from_slice(&content::noise(page as u64)[..WORDS / 4]);
        content
    };
    for page in 0..PAGES {
        wb.map.write_page(page, &hard(page));
    }
    until_vm(ctx, &wb, "swap_outs", |pages| pages > 0)?;
    until_vm(ctx, &wb, "resident_kb", |kb| kb <= size / 2)?;
    eq("swap_outs of zw", zw_vm.get("swap_outs")?, before)?;
    eq("swapped_kb of zw", zw_vm.get("swapped_kb")?, 0)?;
    // Nothing leaves its cache. Its own reclaim may still have been on the way to a sixteenth below the limit.
    within(
        "compressed_kb of zw",
        zw_vm.get("compressed_kb")?,
        compressed,
        compressed + size / 32,
    )?;
    for page in 0..PAGES {
        let what = format!("wb page {page}");
        page_is(what, &wb.map.read_page(page), &hard(page))?;
    }
    holds(&zw, &easy)
}

fn incompressible(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 4 * MIB;
    let sys = ctx.sys();
    let name = "compressions_refused_incompressible";
    let random = |guest: &Guest, check: bool| -> Result<()> {
        for page in 0..PAGES {
            let content = content::noise(page as u64);
            if check {
                page_is(format!("page {page}"), &guest.map.read_page(page), &content)?;
            } else {
                guest.map.write_page(page, &content);
            }
        }
        Ok(())
    };
    for swap in [false, true] {
        let disk = if swap { Some(Disk::new(ctx)?) } else { None };
        let mount = ctx.mount("m", "size=64M")?;
        let guest = mount.guest("incompressible", PAGES)?;
        let vm = guest.sysfs(ctx);
        random(&guest, false)?;
        let before = sys.get(name)?;
        force(ctx, "hard")?;
        ctx.until_least(name, before + PAGES as u64, SOON)
            .with_context(|| format!("swap: {swap}"))?;
        if disk.is_some() {
            until_vm(ctx, &guest, "swapped_kb", |kb| kb == 4 * PAGES as u64)?;
        } else {
            eq("private_kb", vm.get("private_kb")?, 4 * PAGES as u64)?;
        }
        eq("compressed_kb", vm.get("compressed_kb")?, 0)?;
        force(ctx, "none")?;
        random(&guest, true)?;
    }
    Ok(())
}
