// SPDX-License-Identifier: GPL-2.0

//! The benchmark: ThinRAM's scanner against the kernel's own KSM, in one boot of
//! User-Mode Linux (native speed), on the same content.
//!
//! A pass is timed by the CPU time of the scanning thread, read while it sleeps before and
//! after, from /proc/PID/schedstat. Content: `dup_percent` of the pages are copies, four of
//! each; the others are unique. What can be merged is three of each four copies.

use crate::env::{read, target, write};
use crate::inside::{sh, Fs, Mount};
use anyhow::{bail, ensure, Context, Result};
use rustix::mm::{madvise, mmap, mmap_anonymous, munmap, Advice, MapFlags, ProtFlags};
use serde::Serialize;
use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
use std::ffi::c_void;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use thinram_logic::hash::{self, PageHash, STEP};

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;
/// 128 MiB, in one VM: on UML each page may be a mapping of the machine's, which allows a process
/// some 65000 of them.
const PAGES: usize = 32768;
/// Copies of each content that is not unique.
const COPIES: usize = 4;
/// More passes than either needs: not to have merged 95 % by then is a failure.
const PASSES: u32 = 20;
const ROUNDS: usize = 3;
/// Passes that a figure of a cold pass is the mean of: one alone takes a millisecond or two, no
/// longer than it takes to stop the scanner.
const COLD_PASSES: u64 = 16;

/// The report's path.
pub fn report_path() -> PathBuf {
    target("bench/scan.json")
}

#[derive(Serialize)]
struct Report {
    runs: Vec<Run>,
}

#[derive(Serialize)]
struct Run {
    dup_percent: u32,
    smart_scan: bool,
    hash_us_per_page: f64,
    ksm: Figures,
    thinram: Figures,
}

#[derive(Clone, Debug, Serialize)]
struct Figures {
    first_us_per_page: f64,
    steady_us_per_page: f64,
    passes_to_95: u32,
    cpu_ms_to_95: f64,
    cold_us_per_page: f64,
    metadata_bytes_per_page: f64,
    /// Faults that writing to a page costs after it was scanned; shown, not reported.
    #[serde(skip)]
    faults_per_write: f64,
    /// Whether 95 % were merged at all in `PASSES` passes.
    #[serde(skip)]
    reached: bool,
}

/// Memory that is scanned: an anonymous mapping for KSM, a file's for ThinRAM.
struct Memory {
    at: *mut c_void,
    order: Vec<u32>,
    dup: usize,
}

impl Memory {
    fn anonymous(dup_percent: u32) -> Result<Self> {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: A new mapping at an address of the kernel's choice.
        let at = unsafe { mmap_anonymous(std::ptr::null_mut(), PAGES * PAGE, prot, flags)? };
        let memory = Self::new(at, dup_percent);
        // SAFETY: The range is the mapping made above; merging does not change its content.
        unsafe { madvise(memory.at, PAGES * PAGE, Advice::LinuxMergeable)? };
        Ok(memory)
    }

    fn file(file: &OwnedFd, dup_percent: u32) -> Result<Self> {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: A new mapping at an address of the kernel's choice; nobody truncates the file.
        let at = unsafe { mmap(std::ptr::null_mut(), PAGES * PAGE, prot, flags, file, 0)? };
        Ok(Self::new(at, dup_percent))
    }

    fn new(at: *mut c_void, dup_percent: u32) -> Self {
        let dup = PAGES * dup_percent as usize / 100 / COPIES * COPIES;
        Self {
            at,
            order: shuffled(),
            dup,
        }
    }

    fn page(&mut self, i: usize) -> &mut [u64; WORDS] {
        assert!(i < PAGES);
        // SAFETY: The mapping holds PAGES pages and lives as long as self; each byte pattern is a u64.
        unsafe { &mut *self.at.cast::<[u64; WORDS]>().add(i) }
    }

    /// The seed of what stands at rank `rank` of the shuffled order, in version `version`.
    fn seed(&self, rank: usize, version: u64) -> u64 {
        if rank < self.dup {
            mix((rank / COPIES) as u64)
        } else {
            mix((rank as u64) ^ (version << 32) ^ (1 << 63))
        }
    }

    /// Writes the pages whose rank `which` picks: copies as they were, unique ones anew.
    fn write(&mut self, version: u64, which: impl Fn(usize) -> bool) -> usize {
        let mut written = 0;
        for rank in (0..PAGES).filter(|r| which(*r)) {
            let seed = self.seed(rank, version);
            let i = self.order[rank] as usize;
            for (k, w) in self.page(i).iter_mut().enumerate() {
                *w = seed.wrapping_mul(2 * k as u64 + 1) ^ k as u64;
            }
            written += 1;
        }
        written
    }

    /// Pages that need not exist once all copies are merged.
    fn mergeable(&self) -> u64 {
        (self.dup / COPIES * (COPIES - 1)) as u64
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: The mapping is self's own and no reference into it is left.
        let _ = unsafe { munmap(self.at, PAGES * PAGE) };
    }
}

fn mix(x: u64) -> u64 {
    hash::mix(x.wrapping_add(0x9e37_79b9_7f4a_7c15))
}

/// All page numbers in an order that is the same in each run.
fn shuffled() -> Vec<u32> {
    let mut order: Vec<u32> = (0..PAGES as u32).collect();
    let mut state = 1;
    for i in (1..order.len()).rev() {
        state = mix(state);
        order.swap(i, (state % (i as u64 + 1)) as usize);
    }
    order
}

/// A scanner that is started for one pass and stopped again.
trait Scanner {
    /// The folder of its controls.
    fn dir(&self) -> &Path;
    /// The scanning thread's name.
    fn thread(&self) -> &str;
    /// Bytes that it holds about the pages.
    fn metadata(&self) -> Result<u64>;
    /// Faults that this process had on the memory so far.
    fn faults(&self) -> Result<u64>;

    fn number(&self, name: &str) -> Result<u64> {
        let path = self.dir().join(name);
        read(&path)?
            .parse()
            .with_context(|| format!("{}", path.display()))
    }

    fn set(&self, name: &str, value: &str) -> Result<()> {
        let path = self.dir().join(name);
        fs::write(&path, value).with_context(|| format!("{value} to {}", path.display()))
    }

    /// One pass; the CPU time that it took.
    fn pass(&self) -> Result<Duration> {
        self.passes(1)
    }

    /// So many passes one after the other; the CPU time that one took.
    fn passes(&self, count: u64) -> Result<Duration> {
        let pid = thread(self.thread())?;
        let before = cpu(pid)?;
        let scans = self.number("full_scans")?;
        let start = Instant::now();
        self.set("run", "1")?;
        while self.number("full_scans")? < scans + count {
            // Runs at a real-time priority: it sees the end at once, and takes nothing meanwhile.
            std::thread::sleep(Duration::from_micros(200));
            ensure!(
                start.elapsed() < Duration::from_secs(120),
                "no full scan in 120 s"
            );
        }
        self.set("run", "0")?;
        let mut last = Duration::ZERO;
        // Its time is brought up to date when it goes to sleep.
        loop {
            std::thread::sleep(Duration::from_millis(30));
            let now = cpu(pid)?;
            if now == last && asleep(pid)? {
                return Ok((now - before) / u32::try_from(count)?);
            }
            last = now;
        }
    }
}

struct Ksm;

impl Scanner for Ksm {
    fn dir(&self) -> &Path {
        Path::new("/sys/kernel/mm/ksm")
    }
    fn thread(&self) -> &str {
        "ksmd"
    }
    fn metadata(&self) -> Result<u64> {
        let slabs = read("/proc/slabinfo")?;
        let bytes = |l: &str| {
            let mut f = l.split_whitespace().skip(1);
            let (_, total, size) = (f.next()?, f.next()?, f.next()?);
            Some(total.parse::<u64>().ok()? * size.parse::<u64>().ok()?)
        };
        let of = |l: &&str| l.starts_with("ksm_rmap_item ") || l.starts_with("ksm_stable_node ");
        let sum: u64 = slabs.lines().filter(of).filter_map(bytes).sum();
        ensure!(
            sum > 0,
            "/proc/slabinfo shows no ksm_rmap_item: boot with slab_nomerge"
        );
        Ok(sum)
    }
    fn faults(&self) -> Result<u64> {
        minor_faults()
    }
}

struct Thinram {
    dir: PathBuf,
}

impl Scanner for Thinram {
    fn dir(&self) -> &Path {
        &self.dir
    }
    fn thread(&self) -> &str {
        "thinram_scan"
    }
    fn metadata(&self) -> Result<u64> {
        self.number("metadata_bytes")
    }
    fn faults(&self) -> Result<u64> {
        minor_faults()
    }
}

pub fn minor_faults() -> Result<u64> {
    let stat = read("/proc/self/stat")?;
    let after = stat.rsplit(')').next().unwrap_or("");
    let field = after.split_whitespace().nth(7).context("/proc/self/stat")?;
    Ok(field.parse()?)
}

/// The one kernel thread of this name.
pub fn thread(name: &str) -> Result<u32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let pid = path
            .file_name()
            .and_then(|n| n.to_str())
            .and_then(|n| n.parse().ok());
        if let (Some(pid), Ok(comm)) = (pid, read(path.join("comm"))) {
            if comm == name {
                found.push(pid);
            }
        }
    }
    match &found[..] {
        [pid] => Ok(*pid),
        _ => bail!("want one thread called {name}, found {found:?}"),
    }
}

pub fn cpu(pid: u32) -> Result<Duration> {
    let text = read(format!("/proc/{pid}/schedstat"))?;
    let ns = text.split_whitespace().next().unwrap_or("").parse()?;
    Ok(Duration::from_nanos(ns))
}

fn asleep(pid: u32) -> Result<bool> {
    let stat = read(format!("/proc/{pid}/stat"))?;
    Ok(!stat
        .rsplit(')')
        .next()
        .unwrap_or("")
        .trim()
        .starts_with('R'))
}

fn us_per_page(time: Duration) -> f64 {
    round(time.as_secs_f64() * 1e6 / PAGES as f64)
}

fn round(x: f64) -> f64 {
    (x * 1e4).round() / 1e4
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Takes one scanner through first, steady and cold passes. `empty` bytes of metadata are there
/// without any memory to scan.
fn measure(scanner: &dyn Scanner, memory: &mut Memory, empty: u64) -> Result<Figures> {
    memory.write(0, |_| true);
    let sharing = scanner.number("pages_sharing")?;
    let goal = memory.mergeable() * 95 / 100;
    let (mut passes, mut total, mut first, mut reached) = (0, Duration::ZERO, 0.0, true);
    loop {
        let time = scanner.pass()?;
        total += time;
        passes += 1;
        if passes == 1 {
            first = us_per_page(time);
        }
        let merged = scanner.number("pages_sharing")? - sharing;
        if merged >= goal {
            break;
        }
        if passes == PASSES {
            reached = false;
            break;
        }
    }
    let (to_95, ms_to_95) = (passes, round(total.as_secs_f64() * 1e3));
    let mut steady = Vec::new();
    let mut faults_per_write = 0.0;
    for round_no in 0..ROUNDS {
        scanner.pass()?;
        let faults = scanner.faults()?;
        let written = memory.write(1 + round_no as u64, |rank| rank % 10 == round_no);
        faults_per_write = round((scanner.faults()? - faults) as f64 / written as f64);
        steady.push(us_per_page(scanner.pass()?));
    }
    for _ in 0..3 {
        scanner.pass()?;
    }
    let cold = (0..ROUNDS)
        .map(|_| scanner.passes(COLD_PASSES).map(us_per_page))
        .collect::<Result<Vec<f64>>>()?;
    Ok(Figures {
        first_us_per_page: first,
        steady_us_per_page: median(steady),
        passes_to_95: to_95,
        cpu_ms_to_95: ms_to_95,
        cold_us_per_page: median(cold),
        metadata_bytes_per_page: round((scanner.metadata()? - empty) as f64 / PAGES as f64),
        faults_per_write,
        reached,
    })
}

/// What the module's hash costs a page when it reads all of the memory, in the order of addresses, and
/// asks for the next page meanwhile, as the scanner does.
fn hash(memory: &mut Memory) -> f64 {
    let mut times = Vec::new();
    let mut sum = 0_u64;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for i in 0..PAGES {
            let next: *const u64 = memory.page((i + 1) % PAGES).as_ptr();
            let mut hash = PageHash::new(0);
            for (at, line) in memory.page(i).chunks_exact(STEP).enumerate() {
                // SAFETY: x86_64 has SSE; a prefetch reads nothing.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(at * STEP).cast()) };
                hash.add(line.try_into().expect("STEP words"));
            }
            sum = sum.wrapping_add(hash.finish());
        }
        times.push(us_per_page(start.elapsed()));
    }
    std::hint::black_box(sum);
    median(times)
}

fn one(dup_percent: u32, smart: bool, empty: u64) -> Result<Run> {
    let ksm = Ksm;
    ksm.set("run", "2")?;
    ksm.set("smart_scan", if smart { "1" } else { "0" })?;
    ksm.set("sleep_millisecs", "0")?;
    ksm.set("pages_to_scan", "1000")?;
    ksm.set("run", "0")?;
    let mut memory = Memory::anonymous(dup_percent)?;
    let ksm_figures = measure(&ksm, &mut memory, 0).context("KSM")?;
    let hash_us_per_page = hash(&mut memory);
    drop(memory);

    let mount = Mount::new(Fs::Thinram, "/run/thinram", Some("bench"))?;
    let thinram = Thinram {
        dir: "/sys/fs/thinram".into(),
    };
    thinram.set("run", "0")?;
    thinram.set("scan_cpu_max_percent", "100")?;
    // As KSM with sleep_millisecs 0: no ceiling at all.
    thinram.set("scan_period_secs", "0")?;
    let file = mount.file("bench", (PAGES * PAGE) as u64)?;
    let mut memory = Memory::file(&file.into(), dup_percent)?;
    let thinram_figures = measure(&thinram, &mut memory, empty).context("ThinRAM")?;
    drop(memory);
    drop(mount);
    Ok(Run {
        dup_percent,
        smart_scan: smart,
        hash_us_per_page,
        ksm: ksm_figures,
        thinram: thinram_figures,
    })
}

/// Runs inside User-Mode Linux, with `percents` of duplicates if any are named.
pub fn run(percents: &[u32]) -> Result<bool> {
    sh(Command::new("sh").args(["-c", "echo none >/sys/kernel/mm/ksm/advisor_mode || true"]))?;
    let thinram = Thinram {
        dir: "/sys/fs/thinram".into(),
    };
    // What is there without any guest; the tables grow with the first, and are counted for each.
    let empty = thinram.metadata()?;
    let mut runs = Vec::new();
    let percents = if percents.is_empty() {
        &[25, 50, 90]
    } else {
        percents
    };
    for &dup_percent in percents {
        for smart in [false, true] {
            let run = one(dup_percent, smart, empty)
                .with_context(|| format!("{dup_percent} % duplicates, smart_scan {smart}"))?;
            print!("{}", table(&run));
            runs.push(run);
        }
    }
    let good = runs.iter().all(|r| r.ksm.reached && r.thinram.reached);
    let text = serde_json::to_string_pretty(&Report { runs })? + "\n";
    write(report_path(), text)?;
    Ok(good)
}

fn table(run: &Run) -> String {
    let (k, t) = (&run.ksm, &run.thinram);
    let smart = if run.smart_scan { "on" } else { "off" };
    let mut out = format!(
        "\n{} % duplicates, smart_scan {smart}, bare hash {} us a page\n",
        run.dup_percent, run.hash_us_per_page
    );
    out += &format!("{:<28}{:>12}{:>12}{:>10}\n", "", "KSM", "ThinRAM", "ratio");
    let rows = [
        (
            "first pass, us a page",
            k.first_us_per_page,
            t.first_us_per_page,
        ),
        (
            "steady pass, us a page",
            k.steady_us_per_page,
            t.steady_us_per_page,
        ),
        (
            "cold pass, us a page",
            k.cold_us_per_page,
            t.cold_us_per_page,
        ),
        (
            "passes to 95 %",
            k.passes_to_95.into(),
            t.passes_to_95.into(),
        ),
        ("CPU ms to 95 %", k.cpu_ms_to_95, t.cpu_ms_to_95),
        (
            "metadata, bytes a page",
            k.metadata_bytes_per_page,
            t.metadata_bytes_per_page,
        ),
        (
            "faults for each page written",
            k.faults_per_write,
            t.faults_per_write,
        ),
    ];
    for (name, ksm, thinram) in rows {
        let ratio = if thinram > 0.0 {
            format!("{:.1}", ksm / thinram)
        } else {
            "-".into()
        };
        out += &format!("{name:<28}{ksm:>12.3}{thinram:>12.3}{ratio:>10}\n");
    }
    for (name, figures) in [("KSM", k), ("ThinRAM", t)] {
        if !figures.reached {
            out += &format!("{name} did not merge 95 % in {PASSES} passes\n");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures() -> Figures {
        Figures {
            first_us_per_page: 6.0,
            steady_us_per_page: 4.0,
            passes_to_95: 2,
            cpu_ms_to_95: 800.0,
            cold_us_per_page: 4.0,
            metadata_bytes_per_page: 70.0,
            faults_per_write: 0.2,
            reached: true,
        }
    }

    #[test]
    fn the_report_has_the_promised_fields() {
        let run = Run {
            dup_percent: 25,
            smart_scan: false,
            hash_us_per_page: 0.5,
            ksm: figures(),
            thinram: figures(),
        };
        let value = serde_json::to_value(Report { runs: vec![run] }).unwrap();
        let run = value["runs"][0].as_object().unwrap();
        assert_eq!(run.len(), 5);
        let mut names: Vec<&str> = run["ksm"]
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        names.sort_unstable();
        assert_eq!(
            names,
            [
                "cold_us_per_page",
                "cpu_ms_to_95",
                "first_us_per_page",
                "metadata_bytes_per_page",
                "passes_to_95",
                "steady_us_per_page"
            ]
        );
    }

    #[test]
    fn the_order_holds_each_page_once() {
        let mut order = shuffled();
        order.sort_unstable();
        assert!(order.iter().enumerate().all(|(i, p)| i == *p as usize));
    }

    #[test]
    fn tables_fit_a_terminal() {
        let run = Run {
            dup_percent: 90,
            smart_scan: true,
            hash_us_per_page: 0.5123,
            ksm: figures(),
            thinram: figures(),
        };
        assert!(table(&run).lines().all(|l| l.len() <= 80));
    }
}
