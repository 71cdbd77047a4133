// SPDX-License-Identifier: GPL-2.0

//! The benchmark of compression: ThinRAM's reclaimer against zswap (lz4), in one boot of
//! User-Mode Linux (native speed), on the same content.
//!
//! Reclaim is timed by the CPU time of who does it: ThinRAM's thread while a state is forced, and
//! for zswap the task that writes memory.reclaim of a cgroup. A fault is timed by the clock around
//! the first touch of a page. Memory is what the pools take: zswap's own entry for each page (a slab)
//! and its trees are not in it. Bare LZ4 is not timed, for no program here links it.

use crate::env::{read, target, write};
use crate::inside::{number, set, sh, until, Fs, Mount};
use anyhow::{ensure, Context, Result};
use rustix::mm::{mmap, mmap_anonymous, munmap, MapFlags, ProtFlags};
use serde::Serialize;
use std::ffi::c_void;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;
/// 64 MiB.
const PAGES: usize = 16384;
const MIB: f64 = (PAGES * PAGE) as f64 / 1048576.0;
const GROUP: &str = "/sys/fs/cgroup/bench";
const FORCE: &str = "/sys/kernel/debug/thinram/force_state";
const SWAP: &str = "/run/disk/swap";
const SOON: Duration = Duration::from_secs(120);

/// The report's path.
pub fn report_path() -> PathBuf {
    target("bench/compress.json")
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
    compressed_pages: u64,
    reclaim_mib_per_cpu_s: f64,
    fault_p50_us: f64,
    fault_p99_us: f64,
    /// Memory taken for each compressed page.
    bytes_per_page: f64,
}

/// Memory to be compressed.
struct Memory(*mut c_void);

impl Memory {
    fn page(&mut self, i: usize) -> &mut [u64; WORDS] {
        assert!(i < PAGES);
        // SAFETY: The mapping holds PAGES pages and lives as long as self; each byte pattern is a u64.
        unsafe { &mut *self.0.cast::<[u64; WORDS]>().add(i) }
    }

    /// Content that compresses to about one part in `ratio`, 0 for pages of 1.3, 2 and 3 in turn.
    fn fill(&mut self, ratio: f64) {
        for i in 0..PAGES {
            let ratio = match ratio {
                0.0 => [1.3, 2.0, 3.0][i % 3],
                ratio => ratio,
            };
            // Random words first, then one and the same.
            let random = (WORDS as f64 / ratio) as usize;
            let mut state = ((i as u64) << 32) | 1;
            for (k, word) in self.page(i).iter_mut().enumerate() {
                state = state
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                *word = if k < random {
                    state ^ (state >> 29)
                } else {
                    i as u64
                };
            }
        }
    }

    /// Touches every page once; microseconds of the median and of the slowest hundredth.
    fn touch(&mut self) -> (f64, f64) {
        let mut times = Vec::with_capacity(PAGES);
        let mut sum = 0u64;
        for i in 0..PAGES {
            let start = Instant::now();
            // SAFETY: As in `page`; volatile, so that the touch is where it is written.
            sum ^= unsafe { self.0.cast::<u64>().add(i * WORDS).read_volatile() };
            times.push(start.elapsed().as_secs_f64() * 1e6);
        }
        std::hint::black_box(sum);
        times.sort_by(f64::total_cmp);
        (times[PAGES / 2], times[PAGES * 99 / 100])
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: The mapping is self's own and no reference into it is left.
        let _ = unsafe { munmap(self.0, PAGES * PAGE) };
    }
}

const RW: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

fn round(x: f64) -> f64 {
    (x * 100.0).round() / 100.0
}

fn figures(pages: u64, cpu: Duration, bytes: u64, faults: (f64, f64)) -> Figures {
    Figures {
        compressed_pages: pages,
        reclaim_mib_per_cpu_s: round(MIB * pages as f64 / PAGES as f64 / cpu.as_secs_f64()),
        fault_p50_us: round(faults.0),
        fault_p99_us: round(faults.1),
        bytes_per_page: round(bytes as f64 / pages.max(1) as f64),
    }
}

fn thinram(ratio: f64) -> Result<Figures> {
    let mount = Mount::new(Fs::Thinram, "/run/thinram", Some("bench"))?;
    set("run", "0")?;
    // As zswap: everything that gets smaller, and no cap.
    set("compress_max_object_percent", "100")?;
    set("compress_max_percent", "100")?;
    let file = mount.file("bench", (PAGES * PAGE) as u64)?;
    // SAFETY: A new mapping at an address of the kernel's choice; nobody truncates the file.
    let at = unsafe {
        mmap(
            std::ptr::null_mut(),
            PAGES * PAGE,
            RW,
            MapFlags::SHARED,
            &file,
            0,
        )?
    };
    let mut memory = Memory(at);
    memory.fill(ratio);
    let before = number("reclaim_cpu_ms")?;
    fs::write(FORCE, "hard")?;
    until("all to be compressed", SOON, || {
        Ok(number("vms/bench/compressed_kb")? == (PAGES * 4) as u64)
    })?;
    fs::write(FORCE, "none")?;
    // The thread says what it used at the end of its round.
    std::thread::sleep(Duration::from_millis(1500));
    let cpu = Duration::from_millis(number("reclaim_cpu_ms")? - before);
    let pages = number("vms/bench/compressed_kb")? / 4;
    let bytes = number("vms/bench/compressed_pool_kb")? * 1024;
    let faults = memory.touch();
    ensure!(number("vms/bench/decompressions")? == PAGES as u64);
    Ok(figures(pages, cpu, bytes, faults))
}

fn shell(line: &str) -> Result<String> {
    sh(Command::new("sh").args(["-c", line]))
}

fn own_cpu() -> Result<Duration> {
    let text = read("/proc/thread-self/schedstat")?;
    let ns = text.split_whitespace().next().unwrap_or("").parse()?;
    Ok(Duration::from_nanos(ns))
}

/// `Zswapped` or `Zswap` of /proc/meminfo: bytes that were compressed, and what the pool takes.
fn meminfo(name: &str) -> Result<u64> {
    let text = read("/proc/meminfo")?;
    let kib: u64 = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .and_then(|rest| rest.split_whitespace().next())
        .with_context(|| format!("/proc/meminfo has no {name}"))?
        .parse()?;
    Ok(kib * 1024)
}

fn zswap(ratio: f64) -> Result<Figures> {
    // SAFETY: A new mapping at an address of the kernel's choice.
    let at = unsafe { mmap_anonymous(std::ptr::null_mut(), PAGES * PAGE, RW, MapFlags::PRIVATE)? };
    let mut memory = Memory(at);
    memory.fill(ratio);
    let want = (PAGES * PAGE) as u64 * 98 / 100;
    let before = own_cpu()?;
    for _ in 0..50 {
        if meminfo("Zswapped")? >= want {
            break;
        }
        // EAGAIN when it did not get all of it.
        let _ = fs::write(
            Path::new(GROUP).join("memory.reclaim"),
            "16M swappiness=max",
        );
    }
    let cpu = own_cpu()? - before;
    let (pages, bytes) = (meminfo("Zswapped")? / PAGE as u64, meminfo("Zswap")?);
    ensure!(
        pages >= want / PAGE as u64,
        "zswap took {pages} of {PAGES} pages"
    );
    let faults = memory.touch();
    Ok(figures(pages, cpu, bytes, faults))
}

/// Runs inside User-Mode Linux.
pub fn run() -> Result<bool> {
    let mib = PAGES * PAGE / 1048576 * 2;
    shell(&format!(
        "set -e; dd if=/dev/zero of={SWAP} bs=1M count={mib} status=none; chmod 600 {SWAP}
         mkswap -q {SWAP} && swapon {SWAP}
         echo 0 >/proc/sys/vm/page-cluster
         cd /sys/module/zswap/parameters
         echo lz4 >compressor; echo N >shrinker_enabled; echo 90 >max_pool_percent; echo Y >enabled
         echo +memory >/sys/fs/cgroup/cgroup.subtree_control; mkdir -p {GROUP}"
    ))?;
    fs::write(Path::new(GROUP).join("cgroup.procs"), "0")?;
    let mut runs = Vec::new();
    for ratio in [1.3, 2.0, 3.0, 0.0] {
        let what = format!("compression, ratio {ratio}");
        let run = Run {
            ratio,
            zswap: zswap(ratio).with_context(|| format!("{what}: zswap"))?,
            thinram: thinram(ratio).with_context(|| format!("{what}: ThinRAM"))?,
        };
        print!("{}", table(&run));
        runs.push(run);
    }
    let text = serde_json::to_string_pretty(&runs)? + "\n";
    write(report_path(), text)?;
    fs::write("/sys/fs/cgroup/cgroup.procs", "0")?;
    shell(&format!("swapoff {SWAP}; rm {SWAP}; rmdir {GROUP}"))?;
    Ok(true)
}

fn table(run: &Run) -> String {
    let name = match run.ratio {
        0.0 => "a mix".to_owned(),
        ratio => format!("ratio {ratio}"),
    };
    let mut out = format!("\ncompression, {name}\n");
    out += &format!(
        "{:<28}{:>12}{:>12}{:>10}\n",
        "", "zswap", "ThinRAM", "ratio"
    );
    let (z, t) = (&run.zswap, &run.thinram);
    for (what, z, t) in [
        (
            "MiB per CPU second",
            z.reclaim_mib_per_cpu_s,
            t.reclaim_mib_per_cpu_s,
        ),
        ("fault p50, us", z.fault_p50_us, t.fault_p50_us),
        ("fault p99, us", z.fault_p99_us, t.fault_p99_us),
        ("bytes a page", z.bytes_per_page, t.bytes_per_page),
    ] {
        out += &format!("{what:<28}{z:>12}{t:>12}{:>10}\n", round(t / z));
    }
    out
}
