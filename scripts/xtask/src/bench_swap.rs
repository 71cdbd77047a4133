// SPDX-License-Identifier: GPL-2.0

//! The benchmark of swap: what ThinRAM writes to a VM's swap file behind its pool, against zswap that
//! writes back to a swap file, in one boot of User-Mode Linux, on the same content and disk.
//!
//! Both caches may take a tenth of the memory. Pages are pushed out until none is resident; CPU time
//! is that of the reclaimer and of the thread that writes, and for zswap of the task that writes
//! memory.reclaim. A fault is timed by the clock: the first half of the pages in their order, the
//! other half in none. The kernel reads eight pages around one that is missing, as it does by default;
//! ThinRAM a cluster of 32 KiB. Bytes are what the disk saw, with the file system's own.

use crate::bench::{cpu, thread};
use crate::bench_cache::{own_cpu, round, shell, Memory, FORCE, GROUP, MIB, PAGE, PAGES, SOON};
use crate::env::{read, target, write};
use crate::inside::{number, set, until, Fs, Mount};
use anyhow::{ensure, Context, Result};
use serde::Serialize;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

const DISK: &str = "/run/disk";
/// What a cache may take, in percent of the memory.
const CACHE_PERCENT: usize = 10;

/// The report's path.
pub fn report_path() -> PathBuf {
    target("bench/swap.json")
}

#[derive(Serialize)]
struct Run {
    /// What the content compresses to, 0 for a mix of all.
    ratio: f64,
    zswap: Figures,
    thinram: Figures,
}

#[derive(Clone, Debug, Serialize)]
struct Figures {
    out_mib_per_cpu_s: f64,
    /// Pages that lay on the disk at the end, and what was written for each.
    swapped_pages: u64,
    disk_bytes_per_page: f64,
    in_order_p50_us: f64,
    in_order_p99_us: f64,
    shuffled_p50_us: f64,
    shuffled_p99_us: f64,
}

/// Bytes written to the disk so far, with all that is on its way.
fn written() -> Result<u64> {
    shell("sync")?;
    let text = read("/sys/block/ubda/stat")?;
    let field = text
        .split_whitespace()
        .nth(6)
        .context("/sys/block/ubda/stat")?;
    Ok(field.parse::<u64>()? * 512)
}

/// All page numbers of the second half, in an order that is the same in each run.
fn shuffled() -> Vec<usize> {
    let mut order: Vec<usize> = (PAGES / 2..PAGES).collect();
    let mut state = 1u64;
    for i in (1..order.len()).rev() {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        order.swap(i, ((state >> 33) % (i as u64 + 1)) as usize);
    }
    order
}

fn figures(memory: &mut Memory, time: Duration, swapped_pages: u64, bytes: u64) -> Figures {
    let in_order = memory.touch_in(0..PAGES / 2);
    let shuffled = memory.touch_in(shuffled().into_iter());
    Figures {
        out_mib_per_cpu_s: round(MIB / time.as_secs_f64()),
        swapped_pages,
        disk_bytes_per_page: round(bytes as f64 / swapped_pages.max(1) as f64),
        in_order_p50_us: round(in_order.0),
        in_order_p99_us: round(in_order.1),
        shuffled_p50_us: round(shuffled.0),
        shuffled_p99_us: round(shuffled.1),
    }
}

fn thinram(ratio: f64) -> Result<Figures> {
    let mount = Mount::new(Fs::Thinram, "/run/thinram", Some("bench"))?;
    set("run", "0")?;
    set("compress_max_object_percent", "100")?;
    set("compress_max_percent", &CACHE_PERCENT.to_string())?;
    set("swap_dir", DISK)?;
    let file = mount.file("bench", (PAGES * PAGE) as u64)?;
    let mut memory = Memory::file(&file)?;
    memory.fill(ratio);
    let writer = thread("thinram_swapout")?;
    let disk = written()?;
    let (before, wrote) = (number("reclaim_cpu_ms")?, cpu(writer)?);
    fs::write(FORCE, "hard")?;
    until("all to be out", SOON, || {
        Ok(number("vms/bench/private_kb")? == 0)
    })?;
    fs::write(FORCE, "none")?;
    // The thread says what it used at the end of its round, and the last cluster is written.
    std::thread::sleep(Duration::from_millis(1500));
    let reclaimed = Duration::from_millis(number("reclaim_cpu_ms")? - before);
    let time = reclaimed + (cpu(writer)? - wrote);
    let bytes = written()? - disk;
    let pages = number("vms/bench/swapped_kb")? / 4;
    ensure!(pages > 0, "nothing was swapped");
    let figures = figures(&mut memory, time, pages, bytes);
    ensure!(number("vms/bench/private_kb")? == 4 * PAGES as u64);
    drop(memory);
    drop(file);
    drop(mount);
    set("swap_dir", "\n")?;
    Ok(figures)
}

fn zswap(ratio: f64) -> Result<Figures> {
    let mut memory = Memory::anonymous()?;
    memory.fill(ratio);
    let group = Path::new(GROUP);
    let cache = PAGES * PAGE * CACHE_PERCENT / 100;
    fs::write(group.join("memory.zswap.max"), cache.to_string())?;
    let count = |name: &str| -> Result<u64> {
        let text = read(group.join("memory.stat"))?;
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(value
            .with_context(|| format!("memory.stat has no {name}"))?
            .parse()?)
    };
    let out = || -> Result<u64> { Ok(read(group.join("memory.swap.current"))?.parse::<u64>()?) };
    let want = (PAGES * PAGE) as u64 * 98 / 100;
    let (disk, wrote) = (written()?, count("pswpout")?);
    let before = own_cpu()?;
    for _ in 0..100 {
        if out()? >= want {
            break;
        }
        // EAGAIN when it did not get all of it.
        let _ = fs::write(group.join("memory.reclaim"), "16M swappiness=max");
    }
    let time = own_cpu()? - before;
    ensure!(out()? >= want, "{} of {want} bytes went out", out()?);
    std::thread::sleep(Duration::from_millis(500));
    let bytes = written()? - disk;
    let pages = count("pswpout")? - wrote;
    ensure!(pages > 0, "nothing was written back");
    let figures = figures(&mut memory, time, pages, bytes);
    drop(memory);
    fs::write(group.join("memory.zswap.max"), "max")?;
    Ok(figures)
}

/// Runs inside User-Mode Linux, after the benchmark of compression made zswap ready.
pub fn run() -> Result<()> {
    shell("echo 3 >/proc/sys/vm/page-cluster")?;
    let mut runs = Vec::new();
    for ratio in [1.3, 2.0, 3.0, 0.0] {
        let what = format!("swap, ratio {ratio}");
        let run = Run {
            ratio,
            zswap: zswap(ratio).with_context(|| format!("{what}: zswap"))?,
            thinram: thinram(ratio).with_context(|| format!("{what}: ThinRAM"))?,
        };
        print!("{}", table(&run));
        runs.push(run);
    }
    write(report_path(), serde_json::to_string_pretty(&runs)? + "\n")
}

fn table(run: &Run) -> String {
    let name = match run.ratio {
        0.0 => "a mix".to_owned(),
        ratio => format!("ratio {ratio}"),
    };
    let mut out = format!("\nswap, {name}\n");
    out += &format!(
        "{:<28}{:>12}{:>12}{:>10}\n",
        "", "zswap", "ThinRAM", "ratio"
    );
    type Row = (&'static str, fn(&Figures) -> f64);
    let rows: [Row; 7] = [
        ("MiB out per CPU second", |f| f.out_mib_per_cpu_s),
        ("pages on the disk", |f| f.swapped_pages as f64),
        ("bytes written a page", |f| f.disk_bytes_per_page),
        ("fault p50, in order, us", |f| f.in_order_p50_us),
        ("fault p99, in order, us", |f| f.in_order_p99_us),
        ("fault p50, shuffled, us", |f| f.shuffled_p50_us),
        ("fault p99, shuffled, us", |f| f.shuffled_p99_us),
    ];
    for (what, of) in rows {
        let (z, t) = (of(&run.zswap), of(&run.thinram));
        out += &format!("{what:<28}{z:>12}{t:>12}{:>10}\n", round(t / z));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_holds_each_page_of_the_second_half_once() {
        let mut order = shuffled();
        assert!(order.windows(2).any(|w| w[1] < w[0]));
        order.sort_unstable();
        assert!(order.into_iter().eq(PAGES / 2..PAGES));
    }

    #[test]
    fn tables_fit_a_terminal() {
        let figures = Figures {
            out_mib_per_cpu_s: 123.45,
            swapped_pages: PAGES as u64,
            disk_bytes_per_page: 4321.09,
            in_order_p50_us: 54321.09,
            in_order_p99_us: 54321.09,
            shuffled_p50_us: 54321.09,
            shuffled_p99_us: 54321.09,
        };
        let run = Run {
            ratio: 1.3,
            zswap: figures.clone(),
            thinram: figures,
        };
        assert!(table(&run).lines().all(|l| l.len() <= 80));
    }
}
