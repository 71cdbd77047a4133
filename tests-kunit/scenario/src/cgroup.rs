// SPDX-License-Identifier: GPL-2.0

//! Memory cgroups: who is charged for guest memory, and what a limit does.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::sys::signal::Signal;

use crate::check::{eq, fails, page_is, skip, that, within};
use crate::compress;
use crate::content;
use crate::ctx::{Ctx, Guest};
use crate::harness::Case;
use crate::huge;
use crate::sharing::SOON;
use crate::sys::{self, Child, Map, PAGE, RW};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::thinram(
        "memcg/charge",
        "a guest's own pages are its cgroup's, as kernel memory",
        charge,
    ),
    Case::thinram(
        "memcg/charge-large",
        "its 2 MiB pages are as well",
        charge_large,
    ),
    Case::thinram(
        "memcg/sparse",
        "what is noted of memory that was only read is its cgroup's too, until the file is gone",
        sparse,
    ),
    Case::thinram(
        "memcg/shared",
        "shared and zero frames are charged to nobody; what `run` 2 gives back is",
        shared,
    ),
    Case::thinram(
        "memcg/compressed",
        "compressed pages are charged to nobody, and to their cgroup when they are back",
        compressed,
    ),
    Case::thinram(
        "memcg/reclaim",
        "memory.reclaim of a cgroup gets nothing from guests: EAGAIN",
        reclaim,
    ),
    Case::thinram(
        "memcg/limit",
        "at memory.max the OOM killer takes the VMM, others live",
        limit,
    ),
    Case::thinram(
        "memcg/limit-waits",
        "where nobody may be killed the fault waits for the limit",
        limit_waits,
    ),
];

/// A cgroup of a case, removed when the value goes.
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes one, where there are any.
    pub fn new(name: &str) -> Result<Cgroup> {
        let root = Path::new("/sys/fs/cgroup");
        let control = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
        if !control.split_whitespace().any(|c| c == "memory") {
            return Err(skip("no cgroup2 with memory at /sys/fs/cgroup"));
        }
        fs::write(root.join("cgroup.subtree_control"), "+memory")
            .context("enable the memory controller")?;
        let dir = root.join(format!("thinram-{name}-{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
        Ok(Cgroup(dir))
    }

    /// Writes one of its files.
    pub fn set(&self, name: &str, value: impl ToString) -> Result<()> {
        let path = self.0.join(name);
        fs::write(&path, value.to_string()).with_context(|| format!("write {}", path.display()))
    }

    /// Moves the calling process here.
    fn enter(&self) -> Result<()> {
        self.set("cgroup.procs", std::process::id())
    }

    /// Does `work` with the calling process in it.
    pub fn while_in(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.enter()?;
        let done = work();
        fs::write(
            "/sys/fs/cgroup/cgroup.procs",
            std::process::id().to_string(),
        )
        .context("leave the cgroup")?;
        done
    }

    /// A line `name value` of one of its files.
    fn get(&self, file: &str, name: &str) -> Result<u64> {
        let path = self.0.join(file);
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let line = line.with_context(|| format!("{} has no {name}", path.display()))?;
        Ok(line.parse()?)
    }

    /// Pages of its kernel memory.
    fn kernel_pages(&self) -> Result<u64> {
        Ok(self.get("memory.stat", "kernel")? / PAGE as u64)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Its last process may be on its way out.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        eprintln!("{} cannot be removed", self.0.display());
    }
}

/// Steps that a parent and a process in a cgroup take in turn.
struct Turns(Map);

impl Turns {
    fn new() -> Result<Turns> {
        Ok(Turns(Map::anonymous(PAGE)?))
    }

    fn done(&self, step: u64) {
        self.0.set(0, 0, step);
    }

    fn wait(&self, ctx: &Ctx, step: u64) -> Result<()> {
        ctx.until(&format!("step {step}"), 30.0, || {
            let now = self.0.get(0, 0);
            Ok((now >= step, format!("step {now}")))
        })
    }
}

/// What counts as nothing: page tables, and what a CPU keeps in store for the next charge.
const SLACK: u64 = 400;

/// A process in the cgroup that maps the guest's file and does `work` with it.
fn vmm(group: &Cgroup, guest: &Guest, work: impl FnOnce(&Map) -> Result<()>) -> Result<Child> {
    sys::fork(|| {
        group.enter()?;
        work(&Map::shared(&guest.file, 0, guest.map.pages() * PAGE, RW)?)
    })
}

fn charge(ctx: &Ctx) -> Result<()> {
    charge_of(ctx, 0)
}

fn charge_large(ctx: &Ctx) -> Result<()> {
    huge::always(ctx)?;
    charge_of(ctx, PAGES * 4)
}

/// Pages whose charge is looked at: a multiple of 2 MiB.
const PAGES: u64 = 2048;

/// The charge of a guest, of which `huge_kb` is to be in 2 MiB pages.
fn charge_of(ctx: &Ctx, huge_kb: u64) -> Result<()> {
    let group = Cgroup::new("charge")?;
    let mount = ctx.mount("m", "size=64M")?;
    let guest = mount.guest("web", PAGES as usize)?;
    let turns = Turns::new()?;
    let mut child = vmm(&group, &guest, |map| {
        turns.done(1);
        turns.wait(ctx, 2)?;
        for page in 0..PAGES as usize {
            map.write_page(page, &content::page(page as u64));
        }
        turns.done(3);
        turns.wait(ctx, 4)
    })?;
    turns.wait(ctx, 1)?;
    let before = group.kernel_pages()?;
    turns.done(2);
    turns.wait(ctx, 3)?;
    let grown = group.kernel_pages()?.saturating_sub(before);
    within("pages of `kernel`", grown, PAGES - SLACK, PAGES + SLACK)?;
    huge::huge_is(ctx, "of a process in a cgroup", "web", huge_kb)?;
    for name in ["anon", "file", "shmem"] {
        let pages = group.get("memory.stat", name)? / PAGE as u64;
        that(format!("it is not in {name}: {pages}"), pages < PAGES / 2)?;
    }
    let current: u64 = fs::read_to_string(group.0.join("memory.current"))?
        .trim()
        .parse()?;
    that(
        format!("it is in memory.current: {current}"),
        current / PAGE as u64 >= PAGES,
    )?;
    turns.done(4);
    child.expect_ok(ctx.limit(20.0))?;
    // The file keeps the memory, and the cgroup its charge, until there is a hole.
    let kept = group.kernel_pages()?;
    that(
        format!("the file's pages stay charged after its process: {kept}"),
        kept >= PAGES - SLACK,
    )?;
    sys::punch(&guest.file, 0, PAGES * PAGE as u64)?;
    let left = group.kernel_pages()?;
    that(format!("nothing stays after a hole: {left}"), left < SLACK)
}

/// One page is read of each 2 MiB of a sparse file: that gives the guest no memory, but the module keeps
/// a table for each.
fn sparse(ctx: &Ctx) -> Result<()> {
    const LARGE: usize = 512;
    const TABLES: u64 = 1024;
    let group = Cgroup::new("sparse")?;
    let mount = ctx.mount("m", "size=2G")?;
    let guest = mount.guest("web", 1)?;
    let pages = TABLES as usize * LARGE;
    sys::ftruncate(&guest.file, (pages * PAGE) as i64)?;
    let mut child = sys::fork(|| {
        group.enter()?;
        let map = Map::shared(&guest.file, 0, pages * PAGE, RW)?;
        let sum: u64 = (0..pages).step_by(LARGE).map(|page| map.get(page, 0)).sum();
        eq("sum of zeroes", sum, 0)
    })?;
    child.expect_ok(ctx.limit(20.0))?;
    let at_most = |what: &str, name: &str| {
        ctx.until(what, 10.0, || {
            let pages = group.get("memory.stat", name)? / PAGE as u64;
            Ok((pages < SLACK, format!("{pages} pages")))
        })
    };
    // They are as many, and go with the process, after a grace period of RCU.
    at_most("its page tables are gone", "pagetables")?;
    let kept = group.kernel_pages()?;
    that(
        format!("{TABLES} tables of a page each are charged: {kept}"),
        kept >= TABLES,
    )?;
    fs::remove_file(&guest.path)?;
    drop(guest);
    at_most("nothing stays after the file", "kernel")
}

fn compressed(ctx: &Ctx) -> Result<()> {
    let group = Cgroup::new("compressed")?;
    let mount = ctx.mount("m", "size=64M")?;
    let guest = mount.guest("web", PAGES as usize)?;
    let turns = Turns::new()?;
    let mut child = vmm(&group, &guest, |map| {
        for page in 0..PAGES as usize {
            map.write_page(page, &content::page(page as u64));
        }
        turns.done(1);
        turns.wait(ctx, 2)?;
        for page in 0..PAGES as usize {
            let expected = content::page(page as u64);
            page_is(format!("page {page}"), &map.read_page(page), &expected)?;
        }
        Ok(())
    })?;
    turns.wait(ctx, 1)?;
    let charged = group.kernel_pages()?;
    that(
        format!("its own pages are charged: {charged}"),
        charged >= PAGES,
    )?;
    let vm = guest.sysfs(ctx);
    vm.set("compress_max_percent", 50)?;
    compress::squeeze(ctx, &guest, PAGES)?;
    that("there is a pool", vm.get("compressed_pool_kb")? > 0)?;
    let left = group.kernel_pages()?;
    that(format!("nothing of it is charged: {left}"), left < SLACK)?;
    turns.done(2);
    child.expect_ok(ctx.limit(20.0))?;
    let back = group.kernel_pages()?;
    within(
        "pages of `kernel` again",
        back,
        PAGES - SLACK,
        PAGES + SLACK,
    )
}

fn reclaim(ctx: &Ctx) -> Result<()> {
    let group = Cgroup::new("reclaim")?;
    let mount = ctx.mount("m", "size=64M")?;
    let guest = mount.guest("web", PAGES as usize)?;
    let mut child = vmm(&group, &guest, |map| {
        for page in 0..PAGES as usize {
            map.write_page(page, &content::page(page as u64));
        }
        Ok(())
    })?;
    child.expect_ok(ctx.limit(20.0))?;
    guest.sysfs(ctx).set("compress_max_percent", 50)?;
    let charged = group.kernel_pages()?;
    let asked = fs::write(group.0.join("memory.reclaim"), "4M");
    fails("memory.reclaim", asked, Errno::EAGAIN)?;
    let left = group.kernel_pages()?;
    within("pages of `kernel`", left, charged - SLACK, charged + SLACK)?;
    ctx.expect_used("after memory.reclaim", &mount, "web", 4 * PAGES)?;
    guest.holds(0, PAGES as usize, 0)
}

fn shared(ctx: &Ctx) -> Result<()> {
    const PAGES: u64 = 2048;
    let group = Cgroup::new("shared")?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", 2 * PAGES as usize)?;
    let turns = Turns::new()?;
    let half = PAGES as usize;
    let mut child = vmm(&group, &guest, |map| {
        // Zero frames for reads first.
        let sum: u64 = (0..2 * half).map(|page| map.get(page, 0)).sum();
        eq("sum of zeroes", sum, 0)?;
        turns.done(1);
        turns.wait(ctx, 2)?;
        for page in 0..2 * half {
            map.write_page(page, &content::page((page % half) as u64));
        }
        turns.done(3);
        turns.wait(ctx, 4)?;
        for page in 0..2 * half {
            let expected = content::page((page % half) as u64);
            crate::check::page_is("a merged page", &map.read_page(page), &expected)?;
        }
        turns.done(5);
        turns.wait(ctx, 6)
    })?;
    turns.wait(ctx, 1)?;
    let read = group.kernel_pages()?;
    that(format!("reads are charged nothing: {read}"), read < SLACK)?;
    turns.done(2);
    turns.wait(ctx, 3)?;
    let own = group.kernel_pages()?;
    that(
        format!("own pages are charged: {own}"),
        own >= 2 * PAGES - SLACK,
    )?;
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.until_is("pages_sharing", PAGES, SOON)?;
    sys.set("run", 0)?;
    turns.done(4);
    turns.wait(ctx, 5)?;
    let left = group.kernel_pages()?;
    that(
        format!("{PAGES} shared frames are charged to nobody: {left}"),
        left < SLACK,
    )?;
    // Frames that come back are charged: without room for them nothing changes.
    group.set("memory.max", PAGES * PAGE as u64)?;
    fails(
        "run 2 beyond memory.max",
        sys.try_set("run", b"2"),
        Errno::ENOMEM,
    )?;
    eq("run after ENOMEM", sys.get("run")?, 0)?;
    eq(
        "pages_sharing after ENOMEM",
        sys.get("pages_sharing")?,
        PAGES,
    )?;
    group.set("memory.max", "max")?;
    sys.set("run", 2)?;
    eq("pages_sharing", sys.get("pages_sharing")?, 0)?;
    let back = group.kernel_pages()?;
    that(
        format!("frames that come back are charged again: {back}"),
        back >= 2 * PAGES - SLACK,
    )?;
    turns.done(6);
    child.expect_ok(ctx.limit(20.0))
}

/// Tells whoever reads the kernel's log that an OOM kill of a case begins or ends: its stack
/// traces are no defect.
struct OomExpected;

impl OomExpected {
    const BEGINS: &str = "<5>thinram-scenario: an OOM kill is expected from here";
    const ENDS: &str = "<5>thinram-scenario: an OOM kill is expected no more";

    fn new() -> Result<OomExpected> {
        Self::say(Self::BEGINS)?;
        Ok(OomExpected)
    }

    fn say(line: &str) -> Result<()> {
        OpenOptions::new()
            .write(true)
            .open("/dev/kmsg")
            .and_then(|mut log| log.write_all(line.as_bytes()))
            .context("write to /dev/kmsg")
    }
}

impl Drop for OomExpected {
    fn drop(&mut self) {
        if let Err(e) = Self::say(Self::ENDS) {
            eprintln!("{e:#}");
        }
    }
}

/// As much as a VMM of these cases may have; it wants four times that.
const MAX_PAGES: u64 = 2048;

fn limit(ctx: &Ctx) -> Result<()> {
    let group = Cgroup::new("limit")?;
    let mount = ctx.mount("m", "size=128M,domain=lab")?;
    let guest = mount.guest("web", 4 * MAX_PAGES as usize)?;
    let neighbour = mount.guest("db", 256)?;
    neighbour.fill(0, 256, 1);
    group.set("memory.max", MAX_PAGES * PAGE as u64)?;
    let expected = OomExpected::new()?;
    let mut child = vmm(&group, &guest, |map| {
        for page in 0..map.pages() {
            map.write_page(page, &content::page(page as u64));
        }
        bail!(
            "{} pages were touched under a limit of {MAX_PAGES}",
            map.pages()
        )
    })?;
    child.expect_signal(Signal::SIGKILL, ctx.limit(60.0))?;
    drop(expected);
    eq("oom_kill", group.get("memory.events", "oom_kill")?, 1)?;
    let kept = group.kernel_pages()?;
    that(
        format!("it never went over: {kept} of {MAX_PAGES}"),
        kept <= MAX_PAGES,
    )?;
    let resident = guest.sysfs(ctx).get("resident_kb")? / 4;
    within(
        "pages that were its own by then",
        resident,
        MAX_PAGES / 2,
        MAX_PAGES,
    )?;
    guest.holds(0, 64, 0)?;
    neighbour.holds(0, 256, 1)?;
    // What the dead VMM left is reachable by its file, and goes with it.
    fs::remove_file(&guest.path)?;
    drop(guest);
    let left = group.kernel_pages()?;
    that(
        format!("nothing stays after the file: {left}"),
        left < SLACK,
    )
}

fn limit_waits(ctx: &Ctx) -> Result<()> {
    /// Waits in a row after which the fault gets no page any more.
    const IN_VAIN: u64 = 10;
    /// The least that each takes: 10 ms, less a tick of the kernel's clock.
    const WAIT_US: u64 = 5_000;
    let group = Cgroup::new("waits")?;
    let mount = ctx.mount("m", "size=128M")?;
    let guest = mount.guest("web", 2 * MAX_PAGES as usize)?;
    group.set("memory.max", MAX_PAGES * PAGE as u64)?;
    let at = Map::anonymous(PAGE)?;
    let expected = OomExpected::new()?;
    let mut child = vmm(&group, &guest, |map| {
        // Nobody in this cgroup may be killed.
        fs::write("/proc/self/oom_score_adj", "-1000")?;
        for page in 0..map.pages() {
            map.write_page(page, &content::page(page as u64));
            at.set(0, 0, page as u64 + 1);
        }
        Ok(())
    })?;
    let sys = ctx.sys();
    let vm = guest.sysfs(ctx);
    let waits = || sys.get("waits_for_memory");
    let before = waits()?;
    ctx.until_least("waits_for_memory", before + 1, 30.0)?;
    let first = at.get(0, 0);
    // What a CPU holds in store of the cgroup's charges a worker of that CPU gives back; the fault does
    // not wait for it, and goes on for some pages after a first wait.
    let (mut seen, mut since) = (first, waits()?);
    ctx.until(&format!("{IN_VAIN} waits without a page"), 30.0, || {
        let (now, page) = (waits()?, at.get(0, 0));
        if page != seen {
            (seen, since) = (page, waits()?);
        }
        let in_vain = now.saturating_sub(since);
        Ok((in_vain >= IN_VAIN, format!("{in_vain} at page {page}")))
    })?;
    println!("page {first} at the first wait, {seen} at the limit");
    that(
        format!("it waits at its limit: page {seen} of {MAX_PAGES}"),
        seen <= MAX_PAGES && seen > MAX_PAGES / 2,
    )?;
    group.set("memory.max", "max")?;
    child.expect_ok(ctx.limit(60.0))?;
    drop(expected);
    guest.holds(0, 2 * MAX_PAGES as usize, 0)?;
    eq("oom_kill", group.get("memory.events", "oom_kill")?, 0)?;
    let (stalled, waits) = (vm.get("stall_us")?, waits()? - before);
    that(
        format!("stall_us counts them: {stalled} us in {waits} waits"),
        stalled >= waits * WAIT_US,
    )
}
