// SPDX-License-Identifier: GPL-2.0

//! The benchmark of compression: ThinRAM's reclaimer against zswap (lz4), in one boot of
//! User-Mode Linux (native speed), on the same content.
//!
//! Reclaim is timed by the CPU time of who does it: ThinRAM's thread while a state is forced, and
//! for zswap the task that writes memory.reclaim of a cgroup. A fault is timed by the clock around
//! the first touch of a page. Memory is what the pools take, and what else grows meanwhile: zswap's
//! entries (a slab), and the module's metadata. zswap's trees are not in it.
//!
//! What a fault cannot do without is measured for itself: the first touch of a page of fresh anonymous
//! memory, which allocates one, and LZ4 by itself (liblz4, of which the kernel's is a copy, on the
//! same pages, by the thread's CPU time). The goals are judged by these.

use crate::env::{read, target, write};
use crate::inside::{number, set, sh, until, Fs, Mount};
use anyhow::{ensure, Context, Result};
use lz4::block::{compress_bound, compress_to_buffer, decompress_to_buffer, CompressionMode};
use rustix::mm::{mmap, mmap_anonymous, munmap, MapFlags, ProtFlags};
use serde::Serialize;
use std::ffi::c_void;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

pub const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;
/// 64 MiB.
pub const PAGES: usize = 16384;
pub const MIB: f64 = (PAGES * PAGE) as f64 / 1048576.0;
pub const GROUP: &str = "/sys/fs/cgroup/bench";
pub const FORCE: &str = "/sys/kernel/debug/thinram/force_state";
const SWAP: &str = "/run/disk/swap";
pub const SOON: Duration = Duration::from_secs(120);
/// The goals: reclaim so many times as fast as zswap's, a fault so many times as long as what it cannot
/// do without, and so many bytes beyond the object.
const RECLAIM_LEAST: f64 = 1.3;
const FAULT_MOST: f64 = 1.2;
const OVERHEAD_MOST: f64 = 32.0;

/// The report's path.
pub fn report_path() -> PathBuf {
    target("bench/compress.json")
}

#[derive(Serialize)]
struct Run {
    /// What the content compresses to, 0 for a mix of all.
    ratio: f64,
    bare: Bare,
    zswap: Figures,
    thinram: Figures,
    goals: Goals,
}

/// What nobody can do without.
#[derive(Clone, Debug, Serialize)]
struct Bare {
    /// LZ4 alone, CPU time.
    compress_us: f64,
    decompress_us: f64,
    /// The mean compressed page.
    object_bytes: f64,
    /// The first touch of fresh anonymous memory: a page is allocated, zeroed and mapped.
    allocate_p50_us: f64,
    allocate_p99_us: f64,
}

/// How far ThinRAM is from what was aimed at.
#[derive(Clone, Debug, Serialize)]
struct Goals {
    /// Of zswap's rate of reclaim.
    reclaim_ratio: f64,
    reclaim_reached: bool,
    /// Of bare decompression and allocation of a page.
    fault_ratio: f64,
    fault_reached: bool,
    /// Beyond the object, a page.
    overhead_bytes: f64,
    overhead_reached: bool,
}

impl Goals {
    fn judge(bare: &Bare, zswap: &Figures, thinram: &Figures) -> Goals {
        let reclaim = thinram.reclaim_mib_per_cpu_s / zswap.reclaim_mib_per_cpu_s;
        let fault = thinram.fault_p50_us / (bare.decompress_us + bare.allocate_p50_us);
        let overhead = thinram.bytes_per_page - bare.object_bytes;
        Goals {
            reclaim_ratio: round(reclaim),
            reclaim_reached: reclaim >= RECLAIM_LEAST,
            fault_ratio: round(fault),
            fault_reached: fault <= FAULT_MOST,
            overhead_bytes: round(overhead),
            overhead_reached: overhead <= OVERHEAD_MOST,
        }
    }
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
pub struct Memory(*mut c_void);

impl Memory {
    /// Anonymous memory.
    pub fn anonymous() -> Result<Self> {
        // SAFETY: A new mapping at an address of the kernel's choice.
        let at =
            unsafe { mmap_anonymous(std::ptr::null_mut(), PAGES * PAGE, RW, MapFlags::PRIVATE)? };
        Ok(Self(at))
    }

    /// A file's, of PAGES pages.
    pub fn file(file: &fs::File) -> Result<Self> {
        // SAFETY: A new mapping at an address of the kernel's choice; nobody truncates the file.
        let at = unsafe {
            mmap(
                std::ptr::null_mut(),
                PAGES * PAGE,
                RW,
                MapFlags::SHARED,
                file,
                0,
            )?
        };
        Ok(Self(at))
    }

    fn page(&mut self, i: usize) -> &mut [u64; WORDS] {
        assert!(i < PAGES);
        // SAFETY: The mapping holds PAGES pages and lives as long as self; each byte pattern is a u64.
        unsafe { &mut *self.0.cast::<[u64; WORDS]>().add(i) }
    }

    /// Content that compresses to about one part in `ratio`, 0 for pages of 1.3, 2 and 3 in turn.
    pub fn fill(&mut self, ratio: f64) {
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
        self.touch_in(0..PAGES)
    }

    /// Touches these pages in this order.
    pub fn touch_in(&mut self, pages: impl Iterator<Item = usize>) -> (f64, f64) {
        let mut times = Vec::with_capacity(PAGES);
        let mut sum = 0u64;
        for i in pages {
            assert!(i < PAGES);
            let start = Instant::now();
            // SAFETY: As in `page`; volatile, so that the touch is where it is written.
            sum ^= unsafe { self.0.cast::<u64>().add(i * WORDS).read_volatile() };
            times.push(start.elapsed().as_secs_f64() * 1e6);
        }
        std::hint::black_box(sum);
        times.sort_by(f64::total_cmp);
        (times[times.len() / 2], times[times.len() * 99 / 100])
    }

    /// The same by a write of a word to each page.
    fn touch_writing(&mut self) -> (f64, f64) {
        let mut times = Vec::with_capacity(PAGES);
        for i in 0..PAGES {
            let start = Instant::now();
            // SAFETY: As in `page`.
            unsafe { self.0.cast::<u64>().add(i * WORDS).write_volatile(1) };
            times.push(start.elapsed().as_secs_f64() * 1e6);
        }
        times.sort_by(f64::total_cmp);
        (times[PAGES / 2], times[PAGES * 99 / 100])
    }

    fn bytes(&self, i: usize) -> &[u8] {
        assert!(i < PAGES);
        // SAFETY: The mapping holds PAGES pages and lives as long as self.
        unsafe { std::slice::from_raw_parts(self.0.cast::<u8>().add(i * PAGE), PAGE) }
    }

    /// What LZ4 takes of it, alone, and a fault that only allocates.
    fn bare(&self) -> Result<Bare> {
        let room = compress_bound(PAGE)?;
        // Written, or the faults on it would be timed.
        let mut objects = vec![1; room * PAGES];
        let mut lengths = vec![1; PAGES];
        let start = own_cpu()?;
        for (i, object) in objects.chunks_exact_mut(room).enumerate() {
            let fast = Some(CompressionMode::FAST(1));
            lengths[i] = compress_to_buffer(self.bytes(i), fast, false, object)?;
        }
        let packing = own_cpu()? - start;
        let mut back = [0; PAGE];
        let start = own_cpu()?;
        for (object, length) in objects.chunks_exact(room).zip(&lengths) {
            decompress_to_buffer(&object[..*length], Some(PAGE as i32), &mut back)?;
            std::hint::black_box(&back);
        }
        let unpacking = own_cpu()? - start;
        ensure!(back == self.bytes(PAGES - 1), "LZ4 gave other bytes back");
        let each = |time: Duration| round(time.as_secs_f64() * 1e6 / PAGES as f64);
        let (p50, p99) = Memory::anonymous()?.touch_writing();
        Ok(Bare {
            compress_us: each(packing),
            decompress_us: each(unpacking),
            object_bytes: round(lengths.iter().sum::<usize>() as f64 / PAGES as f64),
            allocate_p50_us: round(p50),
            allocate_p99_us: round(p99),
        })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: The mapping is self's own and no reference into it is left.
        let _ = unsafe { munmap(self.0, PAGES * PAGE) };
    }
}

const RW: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

pub fn round(x: f64) -> f64 {
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
    let mut memory = Memory::file(&file)?;
    memory.fill(ratio);
    let metadata = number("metadata_bytes")?;
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
    let grown = number("metadata_bytes")?.saturating_sub(metadata);
    let bytes = number("vms/bench/compressed_pool_kb")? * 1024 + grown;
    let faults = memory.touch();
    ensure!(number("vms/bench/decompressions")? == PAGES as u64);
    Ok(figures(pages, cpu, bytes, faults))
}

pub fn shell(line: &str) -> Result<String> {
    sh(Command::new("sh").args(["-c", line]))
}

pub fn own_cpu() -> Result<Duration> {
    let text = read("/proc/thread-self/schedstat")?;
    let ns = text.split_whitespace().next().unwrap_or("").parse()?;
    Ok(Duration::from_nanos(ns))
}

/// `Zswapped` or `Zswap` of /proc/meminfo: bytes that were compressed, and what the pool takes.
pub fn meminfo(name: &str) -> Result<u64> {
    let text = read("/proc/meminfo")?;
    let kib: u64 = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .and_then(|rest| rest.split_whitespace().next())
        .with_context(|| format!("/proc/meminfo has no {name}"))?
        .parse()?;
    Ok(kib * 1024)
}

/// Bytes of zswap's entries.
fn zswap_entries() -> Result<u64> {
    let slabs = read("/proc/slabinfo")?;
    let bytes = slabs.lines().find_map(|line| {
        let mut fields = line.strip_prefix("zswap_entry ")?.split_whitespace();
        let (_, total, size) = (fields.next()?, fields.next()?, fields.next()?);
        Some(total.parse::<u64>().ok()? * size.parse::<u64>().ok()?)
    });
    bytes.context("/proc/slabinfo shows no zswap_entry: boot with slab_nomerge")
}

fn zswap(ratio: f64) -> Result<Figures> {
    let mut memory = Memory::anonymous()?;
    memory.fill(ratio);
    let entries = zswap_entries()?;
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
    let grown = zswap_entries()?.saturating_sub(entries);
    let (pages, bytes) = (
        meminfo("Zswapped")? / PAGE as u64,
        meminfo("Zswap")? + grown,
    );
    ensure!(
        pages >= want / PAGE as u64,
        "zswap took {pages} of {PAGES} pages"
    );
    let faults = memory.touch();
    Ok(figures(pages, cpu, bytes, faults))
}

fn bare(ratio: f64) -> Result<Bare> {
    let mut memory = Memory::anonymous()?;
    memory.fill(ratio);
    memory.bare()
}

/// Runs inside User-Mode Linux.
pub fn run() -> Result<bool> {
    // Pages that were written back stay in swap a while.
    let mib = PAGES * PAGE / 1048576 * 4;
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
        let bare = bare(ratio).with_context(|| format!("{what}: LZ4"))?;
        let zswap = zswap(ratio).with_context(|| format!("{what}: zswap"))?;
        let thinram = thinram(ratio).with_context(|| format!("{what}: ThinRAM"))?;
        let run = Run {
            ratio,
            goals: Goals::judge(&bare, &zswap, &thinram),
            bare,
            zswap,
            thinram,
        };
        print!("{}", table(&run));
        runs.push(run);
    }
    let text = serde_json::to_string_pretty(&runs)? + "\n";
    write(report_path(), text)?;
    crate::bench_swap::run()?;
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
    let (bare, goals) = (&run.bare, &run.goals);
    out += &format!(
        "LZ4 alone: {} us to compress, {} us back, {} bytes; a page allocated: {} us\n",
        bare.compress_us, bare.decompress_us, bare.object_bytes, bare.allocate_p50_us
    );
    for (what, value, goal, reached) in [
        (
            "reclaim, times zswap's",
            goals.reclaim_ratio,
            format!("at least {RECLAIM_LEAST}"),
            goals.reclaim_reached,
        ),
        (
            "fault p50, times bare",
            goals.fault_ratio,
            format!("at most {FAULT_MOST}"),
            goals.fault_reached,
        ),
        (
            "bytes beyond the object",
            goals.overhead_bytes,
            format!("at most {OVERHEAD_MOST}"),
            goals.overhead_reached,
        ),
    ] {
        let word = if reached { "reached" } else { "NOT reached" };
        out += &format!("{what:<28}{value:>12}{goal:>16}   {word}\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run() -> Run {
        let bare = Bare {
            compress_us: 5.0,
            decompress_us: 1.0,
            object_bytes: 1000.0,
            allocate_p50_us: 9.0,
            allocate_p99_us: 20.0,
        };
        let zswap = figures(
            PAGES as u64,
            Duration::from_secs(1),
            2000 * PAGES as u64,
            (20.0, 30.0),
        );
        let thinram = figures(
            PAGES as u64,
            Duration::from_millis(500),
            1032 * PAGES as u64,
            (12.0, 30.0),
        );
        Run {
            ratio: 1.3,
            goals: Goals::judge(&bare, &zswap, &thinram),
            bare,
            zswap,
            thinram,
        }
    }

    #[test]
    fn goals_are_judged_at_their_limits() {
        let run = run();
        let goals = &run.goals;
        assert!(goals.reclaim_reached && goals.fault_reached && goals.overhead_reached);
        assert_eq!((goals.fault_ratio, goals.overhead_bytes), (1.2, 32.0));
        let mut slow = run.thinram.clone();
        slow.fault_p50_us = 12.1;
        slow.bytes_per_page = 1032.5;
        slow.reclaim_mib_per_cpu_s = run.zswap.reclaim_mib_per_cpu_s * 1.29;
        let goals = Goals::judge(&run.bare, &run.zswap, &slow);
        assert!(!goals.reclaim_reached && !goals.fault_reached && !goals.overhead_reached);
    }

    #[test]
    fn tables_fit_a_terminal() {
        assert!(table(&run()).lines().all(|l| l.len() <= 80));
    }
}
