// SPDX-License-Identifier: GPL-2.0

//! The benchmark of a host that is short of memory: three guests of together 1.6 times its memory,
//! two idle and one busy, on ThinRAM with swap, and on anonymous memory with KSM and zswap.
//!
//! Both merge at the same pace, with the same ceiling on CPU time, compress by LZ4 into zsmalloc, and
//! swap to the same disk; everything else is left as it comes. The idle guests fill and check their
//! memory first, and are left alone. What is counted begins with the start of the busy one and ends with
//! its last pass over all its memory.
//! Counts are judged; times under emulation are only told.

use crate::env::{read, target, write};
use crate::guest::{Guest, Kind, Spec};
use crate::inside::{self, number, set, sh, Fs, Mount, MOUNT};
use crate::step::took;
use anyhow::{ensure, Context, Result};
use serde::Serialize;
use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The memory of the machine, in MiB.
pub const HOST_MIB: u32 = 768;
/// Three of them are 1.6 times that.
const GUEST_MIB: u64 = 410;
/// What the load of a guest fills of it.
const LOAD_MIB: u64 = 352;
const GUESTS: [&str; 3] = ["idle1", "idle2", "busy"];
/// Passes of the busy guest that are counted.
const PASSES: u64 = 5;
/// How long the two idle guests are left alone first, in periods of sampling; and what such a period
/// is here: what a guest does in the usual 30 s takes it many times as long under emulation.
const IDLE_PERIODS: u64 = 2;
const PERIOD_SECS: u64 = 60;
/// A line tells how it goes as often.
const TELL: Duration = Duration::from_secs(15);
/// Seconds for a pass over all memory, and the most of a CPU, for both scanners.
const SCAN_SECS: &str = "30";
const SCAN_CPU_PERCENT: &str = "30";
/// Everything takes long with an emulated CPU that three guests and their reclaim share.
const LONG: Duration = Duration::from_secs(900);
const DISK: &str = "/run/disk";
const GROUPS: &str = "/sys/fs/cgroup";

/// The report's path.
pub fn report_path() -> PathBuf {
    target("bench/contention.json")
}

/// What guests' memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum On {
    /// Files of ThinRAM, with `swap_dir`.
    Thinram,
    /// Anonymous memory, KSM, zswap, a swap file.
    KsmZswap,
}

/// What happened to a guest's pages; counts go up from its start.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Counts {
    /// Faults on pages that had to be decompressed or read.
    major_faults: u64,
    compressed_pages: u64,
    decompressed_pages: u64,
    /// Pages written to the disk, and read from it: what they are in memory.
    swapped_out_kb: u64,
    swapped_in_kb: u64,
}

impl Counts {
    fn since(self, before: Counts) -> Counts {
        Counts {
            major_faults: self.major_faults - before.major_faults,
            compressed_pages: self.compressed_pages - before.compressed_pages,
            decompressed_pages: self.decompressed_pages - before.decompressed_pages,
            swapped_out_kb: self.swapped_out_kb - before.swapped_out_kb,
            swapped_in_kb: self.swapped_in_kb - before.swapped_in_kb,
        }
    }

    fn swapped_kb(&self) -> u64 {
        self.swapped_out_kb + self.swapped_in_kb
    }
}

#[derive(Clone, Debug, Serialize)]
struct GuestFigures {
    name: &'static str,
    intact: bool,
    /// From the start of the busy guest to its last pass.
    counts: Counts,
}

#[derive(Clone, Debug, Serialize)]
struct Figures {
    on: On,
    guests: Vec<GuestFigures>,
    /// From the busy guest's start to the end of its first pass, in which it fills its memory.
    busy_start_ms: u64,
    /// The passes that follow.
    busy_pass_ms: Vec<u64>,
    /// MemAvailable: the least that was seen, and at the end of the last pass.
    available_least_kb: u64,
    available_end_kb: u64,
    /// What the disk saw meanwhile, files of the system too.
    disk_written_kb: u64,
    disk_read_kb: u64,
    /// Pages saved by merging, at the end of the last pass.
    saved_kb: u64,
}

impl Figures {
    fn busy(&self) -> Counts {
        self.guests
            .iter()
            .find(|g| g.name == "busy")
            .map(|g| g.counts)
            .unwrap_or_default()
    }

    fn intact(&self) -> bool {
        self.guests.len() == GUESTS.len() && self.guests.iter().all(|g| g.intact)
    }
}

#[derive(Serialize)]
struct Report {
    host_mib: u32,
    guest_mib: u64,
    runs: Vec<Figures>,
    /// ThinRAM's busy guest had no more major faults, and no more was swapped of it; nothing where
    /// not both were run.
    reached: Option<bool>,
}

/// What `name` of `text`'s lines `name value` is.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(char::is_whitespace)?;
        let value = value.split_whitespace().next()?;
        (key.trim_end_matches(':') == name).then(|| value.parse().ok())?
    })
}

fn available_kb() -> Result<u64> {
    field(&read("/proc/meminfo")?, "MemAvailable").context("/proc/meminfo has no MemAvailable")
}

/// KiB that the disk read and wrote so far.
fn disk_kb() -> Result<(u64, u64)> {
    let text = read("/sys/block/vda/stat")?;
    let sectors = |n: usize| -> Result<u64> {
        let field = text
            .split_whitespace()
            .nth(n)
            .context("/sys/block/vda/stat")?;
        Ok(field.parse::<u64>()? / 2)
    };
    Ok((sectors(2)?, sectors(6)?))
}

fn shell(line: &str) -> Result<String> {
    sh(Command::new("sh").args(["-c", &format!("set -e; {line}")]))
}

impl On {
    fn begin(self) -> Result<Option<Mount>> {
        shell("sync; echo 3 >/proc/sys/vm/drop_caches")?;
        match self {
            On::Thinram => {
                inside::load(Fs::Thinram)?;
                let mount = Mount::new(Fs::Thinram, MOUNT, Some("lab"))?;
                set("scan_period_secs", SCAN_SECS)?;
                set("scan_cpu_max_percent", SCAN_CPU_PERCENT)?;
                set("active_sample_period_secs", &PERIOD_SECS.to_string())?;
                set("swap_dir", DISK)?;
                Ok(Some(mount))
            }
            On::KsmZswap => {
                inside::load(Fs::Tmpfs)?;
                shell(&format!(
                    "dd if=/dev/zero of={DISK}/swap bs=1M count=900 oflag=direct status=none
                     chmod 600 {DISK}/swap; mkswap -q {DISK}/swap; swapon {DISK}/swap
                     cd /sys/module/zswap/parameters; echo lz4 >compressor; echo Y >enabled
                     cd /sys/kernel/mm/ksm; echo 1 >use_zero_pages
                     echo scan-time >advisor_mode; echo {SCAN_SECS} >advisor_target_scan_time
                     echo {SCAN_CPU_PERCENT} >advisor_max_cpu; echo 1 >run"
                ))?;
                Ok(None)
            }
        }
    }

    fn end(self, mount: Option<Mount>) -> Result<()> {
        match self {
            On::Thinram => {
                drop(mount);
                inside::unload(Fs::Thinram)
            }
            On::KsmZswap => {
                shell(&format!(
                    "echo 0 >/sys/kernel/mm/ksm/run; swapoff {DISK}/swap; rm {DISK}/swap
                     echo N >/sys/module/zswap/parameters/enabled"
                ))?;
                Ok(())
            }
        }
    }

    /// Starts a guest in a memory cgroup of its own.
    fn start(self, name: &'static str, mount: Option<&Mount>) -> Result<Guest> {
        let dir = match mount {
            Some(mount) => mount.vm(name)?,
            None => PathBuf::new(),
        };
        let mut spec = Spec::new(name, Kind::Small, GUEST_MIB, &dir, LOAD_MIB);
        if self == On::KsmZswap {
            spec.backends = vec![format!(
                "memory-backend-ram,id=m0,size={GUEST_MIB}M,merge=on"
            )];
        }
        let work = name.trim_end_matches(char::is_numeric);
        spec.append = format!("RUN=\"guest-load {name} {LOAD_MIB} {work}\"");
        let group = Path::new(GROUPS).join(name);
        fs::create_dir_all(&group)?;
        fs::write(group.join("cgroup.procs"), "0")?;
        let guest = Guest::start(&spec);
        fs::write(Path::new(GROUPS).join("cgroup.procs"), "0")?;
        guest
    }

    /// Of one guest since its start.
    fn counts(self, name: &str) -> Result<Counts> {
        match self {
            On::Thinram => {
                let of = |what: &str| number(&format!("vms/{name}/{what}"));
                let (unpacked, read) = (of("decompressions")?, of("swap_ins")?);
                Ok(Counts {
                    // No VM is charged with pages that it shares: the busy one gets all of them.
                    major_faults: unpacked
                        + read
                        + if name == "busy" {
                            number("shared_decompressions")?
                        } else {
                            0
                        },
                    compressed_pages: of("compressions")?,
                    decompressed_pages: unpacked,
                    swapped_out_kb: 4 * of("swap_outs")?,
                    swapped_in_kb: 4 * read,
                })
            }
            On::KsmZswap => {
                let text = read(Path::new(GROUPS).join(name).join("memory.stat"))?;
                let of = |what: &str| {
                    field(&text, what).with_context(|| format!("memory.stat has no {what}"))
                };
                Ok(Counts {
                    major_faults: of("pgmajfault")?,
                    compressed_pages: of("zswpout")?,
                    decompressed_pages: of("zswpin")?,
                    swapped_out_kb: 4 * of("pswpout")?,
                    swapped_in_kb: 4 * of("pswpin")?,
                })
            }
        }
    }

    /// Of all guests.
    fn all_counts(self) -> Result<Vec<Counts>> {
        GUESTS
            .iter()
            .map(|name| match self.counts(name) {
                // The busy one is not there yet.
                Err(_) if *name == "busy" => Ok(Counts::default()),
                counts => counts,
            })
            .collect()
    }

    fn saved_kb(self) -> Result<u64> {
        match self {
            On::Thinram => number("saved_kb"),
            On::KsmZswap => {
                let of = |name: &str| -> Result<u64> {
                    Ok(read(Path::new("/sys/kernel/mm/ksm").join(name))?.parse()?)
                };
                Ok(4 * (of("pages_sharing")? + of("ksm_zero_pages")?))
            }
        }
    }

    /// A line on the host, and on each guest.
    fn view(self) -> Result<String> {
        let mut line = format!("{} MiB available", available_kb()? / 1024);
        if self == On::KsmZswap {
            return Ok(line);
        }
        line += &format!(", {}", read("/sys/fs/thinram/state")?);
        for name in GUESTS {
            let of = |what: &str| number(&format!("vms/{name}/{what}"));
            if of("size_kb").is_ok() {
                line += &format!(
                    "; {name} {} resident, {} in use, {} compressed, {} swapped, {} ms waited",
                    of("resident_kb")? / 1024,
                    of("active_kb")? / 1024,
                    of("compressed_kb")? / 1024,
                    of("swapped_kb")? / 1024,
                    of("stall_us")? / 1000,
                );
            }
        }
        Ok(line)
    }

    fn run(self) -> Result<Figures> {
        let start = Instant::now();
        let tell = |text: String| println!("[{}] {self:?}: {text}", took(start.elapsed()));
        let mount = self.begin()?;
        tell(format!("{} MiB available", available_kb()? / 1024));
        let mut guests = Vec::new();
        for name in &GUESTS[..2] {
            let mut guest = self.start(name, mount.as_ref())?;
            guest.wait("first pass", LONG, |g| g.passes() >= 1)?;
            tell(format!("{name} is idle, {}", self.view()?));
            guests.push(guest);
        }
        std::thread::sleep(Duration::from_secs(IDLE_PERIODS * PERIOD_SECS));
        tell(self.view()?);
        let (before, disk) = (self.all_counts()?, disk_kb()?);
        // Counts of what shared pages took before are not the busy one's.
        let shared = match self {
            On::Thinram => number("shared_decompressions")?,
            On::KsmZswap => 0,
        };
        let least = Cell::new(u64::MAX);
        let told = Cell::new(Instant::now());
        let begin = Instant::now();
        let mut busy = self.start("busy", mount.as_ref())?;
        let mut times = Vec::new();
        for pass in 1..=PASSES + 1 {
            let from = begin.elapsed();
            busy.wait("pass", LONG, |g| {
                least.set(least.get().min(available_kb().unwrap_or(u64::MAX)));
                if told.get().elapsed() > TELL {
                    told.set(Instant::now());
                    tell(self.view().unwrap_or_default());
                }
                g.passes() >= pass
            })?;
            times.push((begin.elapsed() - from).as_millis() as u64);
            let now = self.counts("busy")?;
            tell(format!(
                "busy: pass {pass}, {} major faults, {} MiB swapped, {} MiB available",
                now.major_faults - shared,
                now.swapped_kb() / 1024,
                available_kb()? / 1024
            ));
        }
        let counts = self.all_counts()?;
        let after = disk_kb()?;
        let (available_end_kb, saved_kb) = (available_kb()?, self.saved_kb()?);
        guests.push(busy);
        let mut figures = Vec::new();
        // The busy one first: with its memory the others come back.
        for ((name, guest), (counts, before)) in GUESTS
            .iter()
            .zip(guests.iter_mut())
            .zip(counts.into_iter().zip(before))
            .rev()
        {
            let mut counts = counts.since(before);
            if *name == "busy" {
                counts.major_faults -= shared;
            }
            let intact = guest.finish(LONG)?;
            guest.ended(LONG)?;
            tell(format!(
                "{name}: {}",
                if intact { "intact" } else { "CORRUPT" }
            ));
            figures.push(GuestFigures {
                name,
                intact,
                counts,
            });
        }
        drop(guests);
        self.end(mount)?;
        for name in GUESTS {
            fs::remove_dir(Path::new(GROUPS).join(name))
                .with_context(|| format!("the memory cgroup {name}"))?;
        }
        Ok(Figures {
            on: self,
            guests: figures,
            busy_start_ms: times.remove(0),
            busy_pass_ms: times,
            available_least_kb: least.get(),
            available_end_kb,
            disk_written_kb: after.1 - disk.1,
            disk_read_kb: after.0 - disk.0,
            saved_kb,
        })
    }
}

/// Runs inside the virtual KVM host: `only` these, or all. True if all guests were intact.
pub fn run(only: &[On]) -> Result<bool> {
    ensure!(
        Path::new(DISK).join("lost+found").exists(),
        "{DISK} is no disk"
    );
    shell(&format!("echo +memory >{GROUPS}/cgroup.subtree_control"))?;
    let mut runs = Vec::new();
    for on in [On::Thinram, On::KsmZswap] {
        if only.is_empty() || only.contains(&on) {
            runs.push(on.run().with_context(|| format!("{on:?}"))?);
        }
    }
    print!("{}", table(&runs));
    let intact = runs.iter().all(Figures::intact);
    if let Some(spared) = spared(&runs) {
        println!(
            "no more major faults and swapped bytes of the busy guest: {}",
            if spared { "reached" } else { "NOT reached" }
        );
    }
    let report = Report {
        host_mib: HOST_MIB,
        guest_mib: GUEST_MIB,
        reached: spared(&runs),
        runs,
    };
    write(report_path(), serde_json::to_string_pretty(&report)? + "\n")?;
    Ok(intact)
}

/// Whether the busy guest was spared as much as on KSM and zswap; `None` without both.
fn spared(runs: &[Figures]) -> Option<bool> {
    let of = |on: On| runs.iter().find(|r| r.on == on).map(Figures::busy);
    let (ours, theirs) = (of(On::Thinram)?, of(On::KsmZswap)?);
    Some(ours.major_faults <= theirs.major_faults && ours.swapped_kb() <= theirs.swapped_kb())
}

fn table(runs: &[Figures]) -> String {
    let mut out = format!("{:<32}", "");
    for run in runs {
        out += &format!("{:>14}", format!("{:?}", run.on));
    }
    type Row = (&'static str, fn(&Figures) -> u64);
    let idle = |run: &Figures, of: fn(&Counts) -> u64| -> u64 {
        run.guests
            .iter()
            .filter(|g| g.name != "busy")
            .map(|g| of(&g.counts))
            .sum()
    };
    let rows: [Row; 10] = [
        ("busy: major faults", |r| r.busy().major_faults),
        ("busy: swapped, MiB", |r| r.busy().swapped_kb() / 1024),
        ("busy: boot and fill, s", |r| r.busy_start_ms / 1000),
        ("busy: a pass, ms", |r| {
            r.busy_pass_ms.iter().sum::<u64>() / PASSES
        }),
        ("least available, MiB", |r| r.available_least_kb / 1024),
        ("available at the end, MiB", |r| r.available_end_kb / 1024),
        ("disk written, MiB", |r| r.disk_written_kb / 1024),
        ("disk read, MiB", |r| r.disk_read_kb / 1024),
        ("saved by merging, MiB", |r| r.saved_kb / 1024),
        ("guests intact", |r| {
            r.guests.iter().filter(|g| g.intact).count() as u64
        }),
    ];
    out += "\n";
    for (what, of) in rows {
        out += &format!("{what:<32}");
        for run in runs {
            out += &format!("{:>14}", of(run));
        }
        out += "\n";
    }
    type Count = (&'static str, fn(&Counts) -> u64);
    let rows: [Count; 2] = [
        ("idle, both: major faults", |c| c.major_faults),
        ("idle, both: swapped, MiB", |c| c.swapped_kb() / 1024),
    ];
    for (what, of) in rows {
        out += &format!("{what:<32}");
        for run in runs {
            out += &format!("{:>14}", idle(run, of));
        }
        out += "\n";
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(on: On, major_faults: u64, swapped_out_kb: u64) -> Figures {
        let counts = Counts {
            major_faults,
            swapped_out_kb,
            ..Counts::default()
        };
        Figures {
            on,
            guests: GUESTS
                .iter()
                .map(|name| GuestFigures {
                    name,
                    intact: true,
                    counts,
                })
                .collect(),
            busy_start_ms: 1,
            busy_pass_ms: vec![1; PASSES as usize],
            available_least_kb: 1,
            available_end_kb: 1,
            disk_written_kb: 1,
            disk_read_kb: 1,
            saved_kb: 1,
        }
    }

    #[test]
    fn both_counts_decide() {
        let theirs = figures(On::KsmZswap, 10, 100);
        for (faults, kb, want) in [
            (10, 100, true),
            (0, 0, true),
            (11, 0, false),
            (0, 101, false),
        ] {
            let runs = [figures(On::Thinram, faults, kb), theirs.clone()];
            assert_eq!(spared(&runs), Some(want));
        }
        assert_eq!(spared(&[theirs]), None);
    }

    #[test]
    fn a_corrupt_or_missing_guest_is_noticed() {
        let mut run = figures(On::Thinram, 0, 0);
        assert!(run.intact());
        run.guests[1].intact = false;
        assert!(!run.intact());
        run.guests.remove(1);
        assert!(!run.intact());
    }

    #[test]
    fn guests_are_1_6_times_the_host() {
        let sum = GUEST_MIB * GUESTS.len() as u64;
        assert_eq!(sum * 10 / u64::from(HOST_MIB), 16);
    }

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "zswpout_x 3\nzswpout 7\nMemAvailable:    5 kB";
        assert_eq!(field(text, "zswpout"), Some(7));
        assert_eq!(field(text, "MemAvailable"), Some(5));
        assert_eq!(field(text, "zswp"), None);
    }

    #[test]
    fn tables_fit_a_terminal() {
        let runs = [On::Thinram, On::KsmZswap].map(|on| figures(on, 1, 1));
        assert!(table(&runs).lines().all(|l| l.len() <= 80));
    }
}
