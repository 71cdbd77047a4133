// SPDX-License-Identifier: GPL-2.0

//! NUMA: where frames come from, and sharing between nodes.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;

use crate::check::{eq, fails, skip, that};
use crate::content::pages_bytes;
use crate::ctx::{Ctx, Guest};
use crate::harness::Case;
use crate::huge::{self, LARGE, LARGE_KB};
use crate::sharing::{apart, together, SOON};
use crate::sys::numa::{self, MOVE, STRICT};
use crate::sys::{self, End, Map, PAGE, RW};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::thinram(
        "numa/bind",
        "pages come from the node that mbind names, and stay there",
        bind,
    ),
    Case::thinram(
        "numa/large",
        "2 MiB pages come from the node that mbind names",
        large,
    ),
    Case::thinram(
        "numa/no-policy",
        "write(2) and fallocate take the caller's node",
        no_policy,
    ),
    Case::thinram(
        "numa/region-node",
        "where a guest's first page lies, write(2) and fallocate put the others",
        region_node,
    ),
    Case::thinram(
        "numa/merge-across-nodes",
        "merge_across_nodes 0 keeps nodes apart, 1 does not",
        merge_across,
    ),
    Case::thinram(
        "numa/balancing",
        "NUMA balancing stays away from guest memory",
        balancing,
    ),
];

fn all_on(what: &str, map: &Map, node: u32) -> Result<()> {
    let seen = numa::nodes(map)?;
    let there = seen.iter().filter(|at| **at == Some(node)).count();
    eq(format!("{what}: pages on node {node}"), there, seen.len())
}

/// Fills a guest whose pages are to lie on `node`.
fn fill_on(guest: &Guest, node: u32, first: u64) -> Result<()> {
    numa::bind(&guest.map, node, STRICT | MOVE).context("mbind")?;
    guest.fill(0, guest.map.pages(), first);
    all_on(&guest.name, &guest.map, node)
}

fn large(ctx: &Ctx) -> Result<()> {
    let nodes = numa::several_nodes()?;
    huge::always(ctx)?;
    let mount = ctx.mount("m", "size=64M")?;
    for &node in &nodes {
        let guest = mount.guest(&format!("large{node}"), 2 * LARGE)?;
        fill_on(&guest, node, 1)?;
        huge::huge_is(ctx, "by mbind", &guest.name, 2 * LARGE_KB)?;
    }
    Ok(())
}

fn bind(ctx: &Ctx) -> Result<()> {
    let nodes = numa::several_nodes()?;
    let mount = ctx.mount("m", "size=64M")?;
    for &node in &nodes {
        let guest = mount.guest(&format!("on{node}"), 64)?;
        fill_on(&guest, node, 1)?;
        // By a CPU of every node.
        for &at in &nodes {
            sys::punch(&guest.file, 0, 64 * PAGE as u64)?;
            std::thread::scope(|scope| {
                let filler = scope.spawn(|| -> Result<()> {
                    numa::run_on(at)?;
                    guest.fill(0, 64, 1);
                    Ok(())
                });
                filler
                    .join()
                    .unwrap_or_else(|_| Err(anyhow::anyhow!("the filler panicked")))
            })?;
            all_on(&format!("written from node {at}"), &guest.map, node)?;
        }
        // What is there already stays where it is, and the call says so.
        let other = *nodes.iter().find(|n| **n != node).unwrap_or(&node);
        let moved = numa::bind(&guest.map, other, STRICT | MOVE);
        fails("mbind of touched pages to another node", moved, Errno::EIO)?;
        numa::bind(&guest.map, other, MOVE).context("mbind without MPOL_MF_STRICT")?;
        all_on("after mbind to another node", &guest.map, node)?;
        guest.holds(0, 64, 1)?;
    }
    Ok(())
}

fn no_policy(ctx: &Ctx) -> Result<()> {
    let nodes = numa::several_nodes()?;
    let mount = ctx.mount("m", "size=64M")?;
    for &node in &nodes {
        numa::run_on(node)?;
        for how in ["write", "fallocate"] {
            let file = mount.file(&format!("{how}{node}"), "ram", 64)?;
            if how == "write" {
                file.write_all_at(&pages_bytes(1, 64), 0)?;
            } else {
                sys::fallocate(&file, 0, 0, 64 * PAGE as i64)?;
            }
            let map = Map::shared(&file, 0, 64 * PAGE, RW)?;
            let sum = (0..64).fold(0u64, |sum, page| sum.wrapping_add(map.get(page, 0)));
            std::hint::black_box(sum);
            all_on(how, &map, node)?;
        }
    }
    Ok(())
}

fn region_node(ctx: &Ctx) -> Result<()> {
    let nodes = numa::several_nodes()?;
    let mount = ctx.mount("m", "size=64M")?;
    for &node in &nodes {
        let guest = mount.guest(&format!("on{node}"), 64)?;
        numa::bind(&guest.map, node, STRICT).context("mbind")?;
        guest.fill(0, 1, 1);
        // The caller runs elsewhere.
        let away = *nodes.iter().find(|n| **n != node).unwrap_or(&node);
        numa::run_on(away)?;
        guest.file.write_all_at(&pages_bytes(2, 31), PAGE as u64)?;
        sys::fallocate(&guest.file, 0, 32 * PAGE as i64, 32 * PAGE as i64)?;
        guest.holds(0, 32, 1)?;
        guest.is_zero(32, 64)?;
        all_on("the region's pages", &guest.map, node)?;
    }
    Ok(())
}

fn merge_across(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 128;
    let nodes = numa::several_nodes()?;
    let (here, there) = (nodes[0], nodes[1]);
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = |name: &str, node: u32| -> Result<Guest> {
        let guest = mount.guest(name, PAGES)?;
        fill_on(&guest, node, 1)?;
        Ok(guest)
    };
    let (a, b) = (guest("a", here)?, guest("b", there)?);
    let sys = ctx.sys();
    sys.set("merge_across_nodes", 0)?;
    sys.flat_out()?;
    ctx.passes(4)?;
    eq("pages_sharing over nodes", sys.get("pages_sharing")?, 0)?;
    sys.set("run", 0)?;
    // Each node has a neighbour now: both pairs merge, each on its own node.
    let (c, d) = (guest("c", here)?, guest("d", there)?);
    sys.set("run", 1)?;
    ctx.until_is("pages_sharing", 2 * PAGES as u64, SOON)?;
    ctx.passes(2)?;
    sys.set("run", 0)?;
    eq("pages_shared", sys.get("pages_shared")?, 2 * PAGES as u64)?;
    together(&a, &c)?;
    together(&b, &d)?;
    apart("nodes", &a, &b)?;
    for (guest, node) in [(&a, here), (&b, there), (&c, here), (&d, there)] {
        guest.holds(0, PAGES, 1)?;
        all_on("merged on its node", &guest.map, node)?;
    }
    // Allowed to, they end in one frame.
    sys.set("merge_across_nodes", 1)?;
    sys.flat_out()?;
    ctx.until_is("pages_sharing", 3 * PAGES as u64, 3.0 * SOON)?;
    for guest in [&a, &b, &c, &d] {
        guest.holds(0, PAGES, 1)?;
    }
    Ok(())
}

/// Page-table entries that NUMA balancing took away, of all processes.
/// What NUMA balancing did to this thread's process, by /proc/thread-self/sched.
struct Balanced {
    /// Passes over its address space.
    passes: u64,
    /// Pages that this thread found taken out of its page tables for it: half of what it was in the
    /// pass before, and those since.
    faults: u64,
}

fn balanced() -> Result<Balanced> {
    let path = "/proc/thread-self/sched";
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    let get = |name: &str| -> Result<u64> {
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'));
        value
            .with_context(|| format!("{path} has no {name}"))?
            .trim()
            .parse()
            .with_context(|| format!("{name} in {path}"))
    };
    Ok(Balanced {
        passes: get("mm->numa_scan_seq")?,
        faults: get("total_numa_faults")?,
    })
}

/// A file of the kernel, put back to what it held when the value goes.
struct Tuned(&'static str, String);

impl Tuned {
    fn set(path: &'static str, value: &str) -> Result<Tuned> {
        let old = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
        fs::write(path, value).with_context(|| format!("write {path}"))?;
        Ok(Tuned(path, old.trim_end().to_owned()))
    }
}

impl Drop for Tuned {
    fn drop(&mut self) {
        if let Err(e) = fs::write(self.0, &self.1) {
            eprintln!("{} stays changed: {e}", self.0);
        }
    }
}

fn balancing(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 8192;
    numa::several_nodes()?;
    if !std::path::Path::new("/proc/sys/kernel/numa_balancing").exists() {
        return Err(skip("this kernel has no NUMA balancing"));
    }
    let limit = ctx.limit(60.0);
    let _on = Tuned::set("/proc/sys/kernel/numa_balancing", "1")?;
    let _delay = Tuned::set("/sys/kernel/debug/sched/numa_balancing/scan_delay_ms", "10")?;
    let _min = Tuned::set(
        "/sys/kernel/debug/sched/numa_balancing/scan_period_min_ms",
        "20",
    )?;
    let _max = Tuned::set(
        "/sys/kernel/debug/sched/numa_balancing/scan_period_max_ms",
        "100",
    )?;
    // Touches all pages until that is enough. To be called once in a process: what was taken before
    // would count as well. Returns the most that was taken, and the passes of the kernel.
    let touch = |map: &Map, enough: &dyn Fn(&Balanced) -> bool| -> Result<Balanced> {
        let (start, mut most) = (Instant::now(), 0);
        loop {
            for page in 0..map.pages() {
                map.page(page)[0].fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
            let now = balanced()?;
            most = most.max(now.faults);
            if enough(&now) {
                return Ok(Balanced {
                    faults: most,
                    ..now
                });
            }
            ensure!(
                start.elapsed() < limit,
                "{most} pages taken in {} passes and {limit:?}",
                now.passes
            );
        }
    };
    // A control first, in a process like the other's: anonymous memory of that size.
    let told = ctx.dir.join("passes");
    let mut control = sys::fork(|| {
        let map = Map::anonymous(PAGES * PAGE)?;
        let Balanced { passes, faults } = touch(&map, &|now| now.faults >= PAGES as u64)?;
        println!("{faults} of {PAGES} anonymous pages in {passes} passes");
        Ok(fs::write(&told, passes.to_string())?)
    })?;
    eq("the control", control.wait(2 * limit)?, End::Exit(0))?;
    let passes = fs::read_to_string(&told)?.parse::<u64>()? + 3;
    let mount = ctx.mount("m", "size=64M")?;
    let guest = mount.guest("web", PAGES)?;
    let mut guests = sys::fork(|| {
        let map = Map::shared(&guest.file, 0, PAGES * PAGE, RW)?;
        let taken = touch(&map, &|now| now.passes >= passes)?.faults;
        println!("{taken} of {PAGES} guest pages in {passes} passes");
        that(
            format!("it left guest memory alone: {taken} pages"),
            taken < PAGES as u64 / 4,
        )
    })?;
    eq("guest memory", guests.wait(2 * limit)?, End::Exit(0))
}
