// SPDX-License-Identifier: GPL-2.0

//! How far 2 MiB pages come up to hugetlbfs: KVM's own statistics of a guest, first touches by a
//! process, and what becomes of them while memory is short. Runs inside the virtual KVM host.
//!
//! Emulation has no hardware TLB: counts decide, times are for comparison within one run.

use crate::bench::minor_faults;
use crate::env::{read, target, write};
use crate::guest::{Guest, Kind, Spec};
use crate::inside::{number, set, until, Fs, Mount, BOOT, MOUNT, SOON};
use anyhow::{ensure, Context, Result};
use rustix::fs::{memfd_create, MemfdFlags};
use rustix::mm::{madvise, mmap, munmap, Advice, MapFlags, ProtFlags};
use serde::Serialize;
use std::ffi::c_void;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
/// Pages in a 2 MiB page.
const PARTS: usize = 512;
const KVM: &str = "/sys/kernel/debug/kvm";
const THP: &str = "/sys/kernel/mm/transparent_hugepage";
const HUGETLB: &str = "/proc/sys/vm/nr_hugepages";
/// A guest's memory, MiB.
const GUEST_MIB: u64 = 96;
/// What a process touches: the host has 2 GiB, of which hugetlbfs takes as much again.
const TOUCH_MIB: usize = 512;
const ROUNDS: usize = 5;

/// The report's path.
pub fn report_path() -> PathBuf {
    target("bench/large.json")
}

/// What memory lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum On {
    ThinramLarge,
    ThinramSmall,
    Hugetlb,
    MemfdThp,
    MemfdSmall,
}

#[derive(Clone, Debug, Serialize)]
struct GuestFigures {
    on: On,
    /// 2 MiB entries of KVM's own page table.
    pages_2m: u64,
    pages_4k: u64,
    /// Nested page faults.
    pf_taken: u64,
    exits: u64,
    /// Of them for devices, interrupts and sleep: they come by the clock.
    exits_by_clock: u64,
    boot_ms: u64,
}

#[derive(Clone, Debug, Serialize)]
struct TouchFigures {
    on: On,
    mib: usize,
    faults: u64,
    median_ms: f64,
}

/// The state of all memory at a moment.
#[derive(Clone, Debug, Serialize)]
struct Sample {
    ms: u64,
    phase: &'static str,
    huge_kb: u64,
    resident_kb: u64,
    saved_kb: u64,
    splits: u64,
    collapses: u64,
}

#[derive(Serialize)]
struct Report {
    guests: Vec<GuestFigures>,
    touch: Vec<TouchFigures>,
    split_us_each: f64,
    collapse_us_each: f64,
    over_time: Vec<Sample>,
}

fn large_pages(on: On) -> Result<()> {
    let word = if on == On::ThinramSmall {
        "never"
    } else {
        "always"
    };
    set("large_pages", word)
}

fn reserve_hugetlb(mib: usize) -> Result<()> {
    let pages = mib.div_ceil(2);
    fs::write(HUGETLB, pages.to_string())?;
    let got: usize = read(HUGETLB)?.parse()?;
    ensure!(got == pages, "hugetlbfs got {got} of {pages} pages");
    Ok(())
}

/// Boots a guest, lets its load make some passes, and reads what KVM counted.
fn guest(on: On, mount: &Mount) -> Result<GuestFigures> {
    large_pages(on)?;
    let dir = mount.vm("web1")?;
    let mut spec = Spec::new("web1", Kind::Small, GUEST_MIB, &dir, 48);
    if on == On::Hugetlb {
        reserve_hugetlb(GUEST_MIB as usize)?;
        spec.backends = vec![format!(
            "memory-backend-memfd,id=m0,size={GUEST_MIB}M,share=on,hugetlb=on,hugetlbsize=2M"
        )];
    }
    let count = |name: &str| -> Result<u64> {
        let path = Path::new(KVM).join(name);
        read(&path)?
            .parse()
            .with_context(|| path.display().to_string())
    };
    let by_clock = || -> Result<u64> {
        let names = [
            "io_exits",
            "mmio_exits",
            "irq_exits",
            "irq_window_exits",
            "halt_exits",
        ];
        names.into_iter().map(count).sum()
    };
    let before = (count("pf_taken")?, count("exits")?, by_clock()?);
    let start = Instant::now();
    let mut guest = Guest::start(&spec)?;
    guest.wait("boot", BOOT, Guest::booted)?;
    let boot_ms = start.elapsed().as_millis() as u64;
    guest.wait("pass", SOON, |g| g.passes() >= 3)?;
    let figures = GuestFigures {
        on,
        pages_2m: count("pages_2m")?,
        pages_4k: count("pages_4k")?,
        pf_taken: count("pf_taken")? - before.0,
        exits: count("exits")? - before.1,
        exits_by_clock: by_clock()? - before.2,
        boot_ms,
    };
    ensure!(
        guest.finish(SOON)?,
        "{on:?}: the guest found its memory corrupt"
    );
    guest.ended(SOON)?;
    if on == On::Hugetlb {
        reserve_hugetlb(0)?;
    }
    Ok(figures)
}

/// Mounts debugfs where it is not.
fn debugfs() {
    if !Path::new(KVM).exists() {
        let _ = std::process::Command::new("mount")
            .args(["-t", "debugfs", "none", "/sys/kernel/debug"])
            .status();
    }
}

/// Neither the scanner nor sampling takes anything out of page tables: the latter does so for up to
/// `active_sample_pages` of a guest's 2 MiB pages in a period.
fn quiet() -> Result<()> {
    set("run", "0")?;
    set("active_sample_pages", "0")
}

/// A test: KVM maps a guest on ThinRAM by 2 MiB as one on hugetlbfs, and takes as few faults.
pub fn kvm_maps_2_mib() -> Result<()> {
    debugfs();
    let mount = Mount::new(Fs::Thinram, MOUNT, Some("lab"))?;
    quiet()?;
    let figures = guests(&mount);
    set("run", "1")?;
    set("active_sample_pages", "100")?;
    large_pages(On::ThinramLarge)?;
    let figures = figures?;
    for line in guest_table(&figures).lines() {
        println!("# {line}");
    }
    let of = |on| {
        figures
            .iter()
            .find(|f| f.on == on)
            .context("a guest is missing")
    };
    let (ours, small, hugetlb) = (
        of(On::ThinramLarge)?,
        of(On::ThinramSmall)?,
        of(On::Hugetlb)?,
    );
    ensure!(
        hugetlb.pages_2m > 0 && ours.pages_2m * 100 >= hugetlb.pages_2m * 98,
        "KVM maps {} pages of 2 MiB, on hugetlbfs {}",
        ours.pages_2m,
        hugetlb.pages_2m
    );
    ensure!(
        small.pages_2m == 0,
        "{} with large_pages never",
        small.pages_2m
    );
    let most = hugetlb.pf_taken * 102 / 100;
    ensure!(
        ours.pf_taken <= most,
        "{} nested faults, want {most} at most, on hugetlbfs {}",
        ours.pf_taken,
        hugetlb.pf_taken
    );
    Ok(())
}

fn guests(mount: &Mount) -> Result<Vec<GuestFigures>> {
    [On::Hugetlb, On::ThinramLarge, On::ThinramSmall]
        .into_iter()
        .map(|on| guest(on, mount).with_context(|| format!("{on:?}")))
        .collect()
}

fn guest_table(figures: &[GuestFigures]) -> String {
    let mut out = format!(
        "{:<16}{:>10}{:>10}{:>14}{:>8}{:>10}{:>9}\n",
        "guest on", "2M pages", "4K pages", "nested faults", "exits", "by clock", "boot ms"
    );
    for f in figures {
        out += &format!(
            "{:<16}{:>10}{:>10}{:>14}{:>8}{:>10}{:>9}\n",
            format!("{:?}", f.on),
            f.pages_2m,
            f.pages_4k,
            f.pf_taken,
            f.exits,
            f.exits_by_clock,
            f.boot_ms
        );
    }
    out
}

/// A shared mapping of a file; unmapped when dropped.
struct Mapped {
    at: *mut c_void,
    bytes: usize,
}

impl Mapped {
    fn new(file: &OwnedFd, bytes: usize) -> Result<Self> {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: A new mapping at an address of the kernel's choice; nobody truncates the file.
        let at = unsafe { mmap(std::ptr::null_mut(), bytes, prot, flags, file, 0)? };
        Ok(Self { at, bytes })
    }

    /// Writes a word of page `page`.
    fn set(&self, page: usize, value: u64) {
        assert!((page + 1) * PAGE <= self.bytes);
        // SAFETY: The page lies in the mapping, which only this process uses.
        unsafe {
            self.at
                .cast::<u8>()
                .add(page * PAGE)
                .cast::<u64>()
                .write_volatile(value)
        };
    }

    fn pages(&self) -> usize {
        self.bytes / PAGE
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: The mapping is self's own and no reference into it is left.
        let _ = unsafe { munmap(self.at, self.bytes) };
    }
}

fn file_on(on: On, mount: &Mount, bytes: usize) -> Result<OwnedFd> {
    let file: OwnedFd = match on {
        On::ThinramLarge | On::ThinramSmall => {
            large_pages(on)?;
            let path = mount.vm("touch")?.join("ram");
            let file = fs::File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(&path)?;
            fs::remove_file(&path)?;
            file.into()
        }
        On::Hugetlb => memfd_create("t", MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)?,
        On::MemfdThp | On::MemfdSmall => {
            let word = if on == On::MemfdThp {
                "always"
            } else {
                "never"
            };
            fs::write(Path::new(THP).join("shmem_enabled"), word)?;
            memfd_create("t", MemfdFlags::empty())?
        }
    };
    rustix::fs::ftruncate(&file, bytes as u64)?;
    Ok(file)
}

/// Touches each page of a fresh file once, several times over.
fn touch(on: On, mount: &Mount) -> Result<TouchFigures> {
    if on == On::Hugetlb {
        reserve_hugetlb(TOUCH_MIB)?;
    }
    let mut rounds = Vec::new();
    let mut faults = Vec::new();
    for _ in 0..ROUNDS {
        let file = file_on(on, mount, TOUCH_MIB << 20)?;
        let map = Mapped::new(&file, TOUCH_MIB << 20)?;
        if on == On::MemfdThp {
            // SAFETY: The range is the mapping; the advice does not change its content.
            unsafe { madvise(map.at, map.bytes, Advice::LinuxHugepage)? };
        }
        let before = minor_faults()?;
        let start = Instant::now();
        for page in 0..map.pages() {
            map.set(page, 1);
        }
        rounds.push(start.elapsed().as_secs_f64() * 1000.0);
        faults.push(minor_faults()? - before);
    }
    if on == On::Hugetlb {
        reserve_hugetlb(0)?;
    }
    rounds.sort_by(f64::total_cmp);
    faults.sort_unstable();
    Ok(TouchFigures {
        on,
        mib: TOUCH_MIB,
        faults: faults[ROUNDS / 2],
        median_ms: (rounds[ROUNDS / 2] * 10.0).round() / 10.0,
    })
}

fn touch_table(figures: &[TouchFigures]) -> String {
    let mut out = format!(
        "{:<16}{:>8}{:>10}{:>12}\n",
        "touched on", "MiB", "faults", "median ms"
    );
    for f in figures {
        out += &format!(
            "{:<16}{:>8}{:>10}{:>12}\n",
            format!("{:?}", f.on),
            f.mib,
            f.faults,
            f.median_ms
        );
    }
    out
}

/// Two VMs, half of whose memory is equal: idle, then short of memory, then idle again.
fn over_time(mount: &Mount) -> Result<Vec<Sample>> {
    const REGIONS: usize = 48;
    large_pages(On::ThinramLarge)?;
    set("scan_cpu_max_percent", "60")?;
    set("scan_period_secs", "2")?;
    set("collapse_after_secs", "5")?;
    set("collapse_per_sec", "8")?;
    set("run", "1")?;
    let mut maps = Vec::new();
    for name in ["a", "b"] {
        let path = mount.vm(name)?.join("ram");
        let file = fs::File::create_new(&path)?;
        file.set_len((REGIONS * PARTS * PAGE) as u64)?;
        let file = fs::File::options().read(true).write(true).open(&path)?;
        maps.push(Mapped::new(&file.into(), REGIONS * PARTS * PAGE)?);
    }
    let fill = |vm: usize, own: u64| {
        for page in 0..REGIONS * PARTS {
            let equal = (page / PARTS) % 2 == 0 && own == 0;
            let salt = if equal {
                0
            } else {
                (vm as u64 + 1 + own) << 40
            };
            maps[vm].set(page, salt + page as u64 + 1);
        }
    };
    fill(0, 0);
    fill(1, 0);
    let start = Instant::now();
    let mut samples = Vec::new();
    let mut sample = |phase: &'static str| -> Result<(u64, u64)> {
        let sum = |name: &str| -> Result<u64> {
            Ok(number(&format!("vms/a/{name}"))? + number(&format!("vms/b/{name}"))?)
        };
        let now = Sample {
            ms: start.elapsed().as_millis() as u64,
            phase,
            huge_kb: sum("huge_kb")?,
            resident_kb: sum("resident_kb")? + number("shared_frames_kb")?,
            saved_kb: number("saved_kb")?,
            splits: number("splits")?,
            collapses: number("collapses")?,
        };
        let seen = (now.saved_kb, now.huge_kb);
        samples.push(now);
        Ok(seen)
    };
    let scans = number("full_scans")?;
    until("passes of an idle host", SOON, || {
        sample("idle")?;
        Ok(number("full_scans")? >= scans + 4)
    })?;
    // Twice what is available has to be, for the host to count as having memory.
    set("minfree_kb", &(number("available_kb")? / 2).to_string())?;
    let equal_kb = (REGIONS / 2 * PARTS * 4) as u64;
    let shared = until("the equal half to be shared", SOON * 2, || {
        Ok(sample("contention")?.0 >= equal_kb * 95 / 100)
    });
    set("minfree_kb", "0")?;
    shared?;
    // The guests go on with memory of their own.
    fill(0, 5);
    fill(1, 5);
    let all_kb = (2 * REGIONS * PARTS * 4) as u64;
    until("all to be of 2 MiB again", SOON * 2, || {
        Ok(sample("idle again")?.1 >= all_kb)
    })?;
    Ok(samples)
}

/// A line for each sample: `#` is the share of memory that is huge, `.` the rest.
fn picture(samples: &[Sample]) -> String {
    const WIDTH: u64 = 50;
    const LINES: usize = 40;
    let step = samples.len().div_ceil(LINES).max(1);
    let all = samples.iter().map(|s| s.huge_kb).max().unwrap_or(1).max(1);
    let mut out = String::from("     s  huge, of all memory\n");
    for s in samples.iter().step_by(step) {
        let marks = (s.huge_kb * WIDTH / all).min(WIDTH) as usize;
        out += &format!(
            "{:>6.1}  {}{}  {:<10} {:>4} MiB saved\n",
            s.ms as f64 / 1000.0,
            "#".repeat(marks),
            ".".repeat(WIDTH as usize - marks),
            s.phase,
            s.saved_kb / 1024
        );
    }
    out
}

/// The benchmark.
pub fn run() -> Result<bool> {
    debugfs();
    crate::inside::load(Fs::Thinram)?;
    let mount = Mount::new(Fs::Thinram, MOUNT, Some("lab"))?;
    set("run", "0")?;
    let mut figures = Vec::new();
    for on in [
        On::MemfdSmall,
        On::MemfdThp,
        On::Hugetlb,
        On::ThinramSmall,
        On::ThinramLarge,
    ] {
        figures.push(touch(on, &mount).with_context(|| format!("{on:?}"))?);
    }
    println!("{}", touch_table(&figures));
    let each = |sum: &str, of: &str| -> Result<f64> {
        Ok(number(sum)? as f64 / number(of)?.max(1) as f64)
    };
    let over_time = over_time(&mount)?;
    println!("{}", picture(&over_time));
    let (split_us_each, collapse_us_each) = (
        each("split_us", "splits")?,
        each("collapse_us", "collapses")?,
    );
    println!("split {split_us_each:.0} us, collapse {collapse_us_each:.0} us for 2 MiB");
    quiet()?;
    std::thread::sleep(Duration::from_secs(1));
    let guests = guests(&mount)?;
    println!("{}", guest_table(&guests));
    let report = Report {
        guests,
        touch: figures,
        split_us_each,
        collapse_us_each,
        over_time,
    };
    drop(mount);
    crate::inside::unload(Fs::Thinram)?;
    write(report_path(), serde_json::to_string_pretty(&report)? + "\n")?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_picture_shows_what_is_huge() {
        let sample = |ms, huge_kb| Sample {
            ms,
            phase: "idle",
            huge_kb,
            resident_kb: 8192,
            saved_kb: 2048,
            splits: 0,
            collapses: 0,
        };
        let text = picture(&[sample(0, 8192), sample(500, 4096), sample(1500, 0)]);
        let marks: Vec<usize> = text
            .lines()
            .skip(1)
            .map(|line| line.matches('#').count())
            .collect();
        assert_eq!(marks, [50, 25, 0]);
        assert!(text.contains("   1.5  ....") && text.contains("2 MiB saved"));
        assert_eq!(picture(&[]).lines().count(), 1);
    }
}
