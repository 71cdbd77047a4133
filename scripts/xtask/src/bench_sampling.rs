// SPDX-License-Identifier: GPL-2.0

//! Sampling a working set by two means: zapping and cleaning (rust/sys/watching.rs). What each costs a
//! guest whose working set is known, and what it sees of guests and processes that read or write. Runs
//! inside the virtual KVM host, with a debug build of the module: no other can clean.
//!
//! Counts decide: times under emulation are for comparison within one run.

use crate::env::{read, target, write};
use crate::guest::{Guest, Kind, Spec};
use crate::inside::{number, set, small_pages, until, Ctx, Fs, Mount, BOOT, MOUNT, SOON};
use crate::large::{debugfs, kvm, Mapped};
use anyhow::{anyhow, ensure, Context, Result};
use serde::Serialize;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const SWITCH: &str = "/sys/kernel/debug/thinram/sample_by_cleaning";
/// A guest's memory, and the file in it that it reads over and over, MiB.
const GUEST_MIB: u64 = 96;
const HOT_MIB: u64 = 32;
/// The file of a process, MiB.
const FILE_MIB: usize = 32;
const SAMPLE_PAGES: u64 = 400;
const PERIOD_SECS: u64 = 10;
/// Periods that are counted.
const PERIODS: u64 = 3;

/// The report's path.
pub fn report_path() -> PathBuf {
    target("bench/sampling.json")
}

/// How pages are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Means {
    /// Not at all: what the work itself costs.
    None,
    Zap,
    Clean,
}

impl Means {
    fn begin(self) -> Result<()> {
        let pages = if self == Means::None { 0 } else { SAMPLE_PAGES };
        fs::write(SWITCH, if self == Means::Clean { "1" } else { "0" })?;
        set("active_sample_pages", &pages.to_string())?;
        // What is under watch by another means, and what the work was before, is gone by then.
        periods(2)
    }
}

/// What `PERIODS` periods cost, and what was seen.
#[derive(Clone, Debug, Serialize)]
struct Figures {
    means: Means,
    work: &'static str,
    /// MiB that are known to be in use.
    known_mib: u64,
    /// The estimates at the end of each period, KiB.
    active_kb: Vec<u64>,
    /// Of KVM: nested page faults, and exits for whatever reason.
    nested_faults: u64,
    exits: u64,
    /// That the module served for this VM.
    faults: u64,
    /// CPU time of the thread that samples.
    cpu_ms: u64,
}

fn periods(count: u64) -> Result<()> {
    let from = number("active_samples")?;
    let limit = Duration::from_secs(PERIOD_SECS * (count + 2)) + SOON;
    until("end of a period", limit, || {
        Ok(number("active_samples")? >= from + count)
    })
}

fn watch(means: Means, work: &'static str, vm: &str, known_mib: u64) -> Result<Figures> {
    let of = |name: &str| number(&format!("vms/{vm}/{name}"));
    let counts = || -> Result<[u64; 4]> {
        Ok([
            kvm("pf_taken")?,
            kvm("exits")?,
            of("faults")?,
            number("reclaim_cpu_ms")?,
        ])
    };
    let before = counts()?;
    let mut active_kb = Vec::new();
    for _ in 0..PERIODS {
        periods(1)?;
        active_kb.push(of("active_kb")?);
    }
    let after = counts()?;
    let [nested_faults, exits, faults, cpu_ms] =
        std::array::from_fn(|i| after[i].saturating_sub(before[i]));
    Ok(Figures {
        means,
        work,
        known_mib,
        active_kb,
        nested_faults,
        exits,
        faults,
        cpu_ms,
    })
}

fn said(guest: &Guest, what: &str) -> bool {
    guest.lines().iter().any(|line| line.contains(what))
}

/// A guest that is idle, and from [`read_on`] on reads a file in its memory without end.
fn reader(mount: &Mount) -> Result<Guest> {
    let dir = mount.vm("web1")?;
    let mut spec = Spec::new("web1", Kind::Small, GUEST_MIB, &dir, 16);
    spec.append = format!(
        "RUN=\"dd if=/dev/urandom of=/tmp/a bs=1M count={HOT_MIB}; echo guest: filled; \
         read go; echo guest: reading; while dd if=/tmp/a of=/dev/null bs=64k; do :; done\""
    );
    let mut guest = Guest::start(&spec)?;
    guest.wait("boot", BOOT, Guest::booted)?;
    guest.wait("file", SOON, |g| said(g, "guest: filled"))?;
    Ok(guest)
}

fn read_on(guest: &mut Guest) -> Result<()> {
    guest.type_line("go")?;
    guest.wait("work", SOON, |g| said(g, "guest: reading"))
}

/// `active_kb` is what a guest of KVM uses, while it idles and while it works.
pub fn follows_a_guest(ctx: &Ctx) -> Result<()> {
    /// Some 200 pages are under watch: of 32 MiB in 96 so much less is seen once in a hundred periods.
    const ABOUT_KB: u64 = 8 << 10;
    const HOT_KB: u64 = HOT_MIB << 10;
    small_pages()?;
    let mount = ctx.mount()?;
    let mut guest = reader(&mount)?;
    set("active_sample_pages", &SAMPLE_PAGES.to_string())?;
    set("active_sample_period_secs", &PERIOD_SECS.to_string())?;
    let active_kb = || number("vms/web1/active_kb");
    until("little in use by an idle guest", SOON, || {
        Ok(active_kb()? < HOT_KB / 2)
    })?;
    read_on(&mut guest)?;
    until("what a reading guest reads", SOON, || {
        Ok(active_kb()? > HOT_KB - ABOUT_KB)
    })?;
    // The guest's kernel and programs are in use as well, and no more than they.
    let seen = active_kb()?;
    ensure!(
        seen < HOT_KB * 2,
        "active_kb is {seen} with {HOT_KB} KiB in use"
    );
    set("active_sample_pages", "100")?;
    set("active_sample_period_secs", "30")
}

/// What is seen of a guest, and what it costs, by each means.
fn guest(mount: &Mount, all: &mut Vec<Figures>) -> Result<()> {
    let mut guest = reader(mount)?;
    for means in [Means::None, Means::Zap, Means::Clean] {
        means.begin()?;
        all.push(watch(means, "guest, idle", "web1", 0)?);
    }
    read_on(&mut guest)?;
    for means in [Means::None, Means::Zap, Means::Clean] {
        means.begin()?;
        all.push(watch(means, "guest, reading", "web1", HOT_MIB)?);
    }
    Ok(())
}

/// A process that reads, or writes, all pages of its mapping without end.
fn process(mount: &Mount, all: &mut Vec<Figures>) -> Result<()> {
    let path = mount.vm("proc")?.join("ram");
    let file = fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    file.set_len((FILE_MIB << 20) as u64)?;
    let file = OwnedFd::from(file);
    let mapped = || -> Result<Mapped> { Mapped::new(&file, FILE_MIB << 20) };
    let map = mapped()?;
    for page in 0..map.pages() {
        map.set(page, page as u64 + 1);
    }
    drop(map);
    for (work, writes) in [("process, reading", false), ("process, writing", true)] {
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| -> Result<()> {
            let worker = scope.spawn(|| -> Result<()> {
                let map = mapped()?;
                while !over.load(Ordering::Relaxed) {
                    for page in 0..map.pages() {
                        match writes {
                            true => map.set(page, page as u64 + 1),
                            false => assert_eq!(map.get(page), page as u64 + 1),
                        }
                    }
                    std::thread::sleep(Duration::from_millis(50));
                }
                Ok(())
            });
            let done = [Means::None, Means::Zap, Means::Clean]
                .into_iter()
                .try_for_each(|means| {
                    means.begin()?;
                    all.push(watch(means, work, "proc", FILE_MIB as u64)?);
                    Ok(())
                });
            over.store(true, Ordering::Relaxed);
            let worked = worker
                .join()
                .map_err(|_| anyhow!("a page was not as written"))?;
            done.and(worked)
        })?;
    }
    fs::remove_file(path)?;
    Ok(())
}

fn table(all: &[Figures]) -> String {
    let mut out = format!(
        "{:<18}{:<6}{:>7}{:>19}{:>8}{:>8}{:>8}{:>6}\n",
        "work", "means", "known", "active MiB", "nested", "exits", "faults", "ms"
    );
    for f in all {
        let none = f.means == Means::None;
        let seen: Vec<String> = f
            .active_kb
            .iter()
            .map(|kb| format!("{:.1}", *kb as f64 / 1024.0))
            .collect();
        out += &format!(
            "{:<18}{:<6}{:>7}{:>19}{:>8}{:>8}{:>8}{:>6}\n",
            f.work,
            format!("{:?}", f.means),
            f.known_mib,
            if none { "-".into() } else { seen.join(" ") },
            f.nested_faults,
            f.exits,
            f.faults,
            f.cpu_ms
        );
    }
    out
}

/// The benchmark.
pub fn run() -> Result<bool> {
    debugfs();
    crate::inside::load(Fs::Thinram)?;
    ensure!(
        read(SWITCH).is_ok(),
        "{SWITCH} is missing: insmod a module that was built with THINRAM_DEBUG=y"
    );
    let mount = Mount::new(Fs::Thinram, MOUNT, Some("lab"))?;
    set("run", "0")?;
    set("large_pages", "never")?;
    set("active_sample_period_secs", &PERIOD_SECS.to_string())?;
    let mut all = Vec::new();
    process(&mount, &mut all).context("a process")?;
    guest(&mount, &mut all).context("a guest")?;
    print!("{}", table(&all));
    drop(mount);
    crate::inside::unload(Fs::Thinram)?;
    write(report_path(), serde_json::to_string_pretty(&all)? + "\n")?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_fit_a_terminal() {
        let figures = Figures {
            means: Means::Clean,
            work: "process, reading",
            known_mib: 32,
            active_kb: vec![32 << 10; PERIODS as usize],
            nested_faults: 99_999,
            exits: 99_999,
            faults: 99_999,
            cpu_ms: 99_999,
        };
        let text = table(&[figures]);
        assert!(text.lines().all(|line| line.len() <= 80));
        assert!(text.contains("32.0 32.0 32.0"));
    }
}
