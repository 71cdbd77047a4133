// SPDX-License-Identifier: GPL-2.0

//! The demo: three real guests in one sharing domain, on the stock kernel.

use crate::env::{read, target, write};
use crate::guest::{Guest, Kind, Spec};
use crate::inside::{self, number, set, sh, Fs, Mount, BOOT, MOUNT, SOON};
use crate::step::took;
use anyhow::{ensure, Result};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The report's path, outside and inside of the machine.
pub fn report_path() -> PathBuf {
    target("demo/report.json")
}

#[derive(Serialize)]
struct Report {
    kernel: String,
    guests: Vec<GuestReport>,
    pages_sharing: u64,
    zero_pages: u64,
    saved_kb: u64,
    resident_kb_before: u64,
    resident_kb_after: u64,
    cow_breaks: u64,
    full_scans: u64,
}

#[derive(Serialize)]
struct GuestReport {
    name: String,
    size_kb: u64,
    booted: bool,
    intact: bool,
}

impl Report {
    fn good(&self) -> bool {
        self.saved_kb > 0
            && self.resident_kb_after < self.resident_kb_before
            && self.guests.iter().all(|g| g.booted && g.intact)
    }
}

const GUESTS: &[(&str, Kind, u64, u64)] = &[
    ("web1", Kind::Small, 128, 64),
    ("web2", Kind::Small, 128, 64),
    ("debian1", Kind::Stock, 384, 64),
];

/// Runs inside the virtual KVM host. True if all guests were intact and memory was saved.
pub fn run() -> Result<bool> {
    let start = Instant::now();
    let tell = |text: &str| println!("\n[{}] {text}", took(start.elapsed()));
    let kernel = read("/proc/sys/kernel/osrelease")?;
    inside::load(Fs::Thinram)?;
    let mount = Mount::new(Fs::Thinram, MOUNT, Some("lab"))?;
    tell(&format!(
        "host: Linux {kernel}, thinram.ko is loaded, mounted with domain=lab"
    ));
    set("run", "0")?;
    set("large_pages", "always")?;
    set("scan_period_secs", "10")?;
    set("scan_cpu_max_percent", "50")?;

    tell("three guests start, the scanner is off");
    let mut guests = Vec::new();
    for (name, kind, memory, load) in GUESTS {
        let dir = mount.vm(name)?;
        guests.push(Guest::start(&Spec::new(name, *kind, *memory, &dir, *load))?);
    }
    let started = ready(&mut guests, &tell);
    if let Err(e) = &started {
        println!("{e:#}");
    }
    status();
    let resident = || -> Result<u64> {
        let mut sum = number("shared_frames_kb")?;
        for (name, ..) in GUESTS {
            sum += number(&format!("vms/{name}/resident_kb"))?;
        }
        Ok(sum)
    };
    let before = resident()?;

    tell("the scanner starts; the host has memory, so 2 MiB pages stay as they are");
    set("run", "1")?;
    let scans = number("full_scans")?;
    let limit = Duration::from_secs(120);
    let survey = inside::until("first two passes", limit, || {
        Ok(number("full_scans")? >= scans + 2)
    });
    if let Err(e) = survey {
        println!("{e:#}");
    }
    let sum = |name: &str| -> Result<u64> {
        GUESTS
            .iter()
            .map(|(vm, ..)| number(&format!("vms/{vm}/{name}")))
            .sum()
    };
    tell(&format!(
        "{} kB are in 2 MiB pages, {} of them would come back by splits; {} were split",
        sum("huge_kb")?,
        sum("splittable_kb")?,
        number("splits")?
    ));

    // The host counts as short of memory, by the operator's word, with half of it available.
    tell("the host runs short: minfree_kb is set to half of what is available");
    set("minfree_kb", &(number("available_kb")? / 2).to_string())?;
    let scans = number("full_scans")?;
    let begin = Instant::now();
    let mut shown = Instant::now();
    while number("full_scans")? < scans + 4 && begin.elapsed() < Duration::from_secs(180) {
        std::thread::sleep(Duration::from_millis(500));
        if shown.elapsed() > Duration::from_secs(10) {
            shown = Instant::now();
            tell(&format!("{} kB saved", number("saved_kb")?));
            status();
        }
    }
    tell(&format!(
        "{} pages of 2 MiB were split, {} kB are left of them",
        number("splits")?,
        sum("huge_kb")?
    ));
    tell("the guests check all of their memory again, merged as it is now");
    let mut works = started.is_ok();
    for guest in &mut guests {
        let passes = guest.passes();
        if let Err(e) = guest.wait("pass", SOON, |g| g.passes() >= passes + 2) {
            println!("{e:#}");
            works = false;
        }
    }
    let mut report = Report {
        kernel,
        guests: Vec::new(),
        pages_sharing: number("pages_sharing")?,
        zero_pages: number("zero_pages")?,
        saved_kb: number("saved_kb")?,
        resident_kb_before: before,
        resident_kb_after: resident()?,
        cow_breaks: number("cow_breaks")?,
        full_scans: number("full_scans")?,
    };
    status();
    for mut guest in guests {
        let booted = guest.booted();
        let intact = booted && guest.finish(SOON).is_ok_and(|intact| intact);
        for line in guest
            .lines()
            .iter()
            .filter(|l| l.contains("guest-load: end"))
        {
            println!("{}: {line}", guest.name);
        }
        report.guests.push(GuestReport {
            name: guest.name.clone(),
            size_kb: guest.size_kb,
            booted,
            intact,
        });
    }
    set("minfree_kb", "0")?;
    drop(mount);
    inside::unload(Fs::Thinram)?;
    write(report_path(), serde_json::to_string_pretty(&report)? + "\n")?;
    tell("the guests ended, the module is unloaded");
    println!("{}", summary(&report));
    ensure!(works, "a guest stopped working, see above");
    Ok(report.good())
}

/// Waits until each guest has filled and checked its memory once.
fn ready(guests: &mut [Guest], tell: &dyn Fn(&str)) -> Result<()> {
    for guest in guests.iter_mut() {
        guest.wait("boot", BOOT, Guest::booted)?;
        if let Some(up) = guest.lines().iter().find(|l| l.contains("guest: up ")) {
            tell(&format!("{}: {up}", guest.name));
        }
    }
    for guest in guests.iter_mut() {
        guest.wait("first pass", SOON, |g| g.passes() >= 1)?;
    }
    Ok(())
}

fn status() {
    let ctl = Path::new("/src/target/sysroot/release/thinramctl");
    match sh(Command::new(ctl).arg("status")) {
        Ok(text) => println!("{text}"),
        Err(e) => println!("thinramctl status: {e:#}"),
    }
}

fn summary(r: &Report) -> String {
    let mut out = String::from("\n");
    for g in &r.guests {
        let word = match (g.booted, g.intact) {
            (false, _) => "did not boot",
            (true, true) => "intact",
            (true, false) => "CORRUPT, or without a verdict",
        };
        out += &format!("{:<12}{:>8} MiB   {word}\n", g.name, g.size_kb / 1024);
    }
    out += &format!(
        "resident    {:>8} MiB before, {} MiB after, {} MiB saved by sharing\n",
        r.resident_kb_before / 1024,
        r.resident_kb_after / 1024,
        r.saved_kb / 1024
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(intact: bool, saved_kb: u64) -> Report {
        let guest = GuestReport {
            name: "web1".into(),
            size_kb: 1024,
            booted: true,
            intact,
        };
        Report {
            kernel: "7.3.4+deb13-amd64".into(),
            guests: vec![guest],
            pages_sharing: saved_kb / 4,
            zero_pages: 0,
            saved_kb,
            resident_kb_before: 1000,
            resident_kb_after: 1000 - saved_kb,
            cow_breaks: 1,
            full_scans: 3,
        }
    }

    #[test]
    fn the_report_has_the_promised_fields() {
        let value = serde_json::to_value(report(true, 8)).unwrap();
        let object = value.as_object().unwrap();
        let mut names: Vec<&str> = object.keys().map(String::as_str).collect();
        names.sort_unstable();
        let mut want = [
            "kernel",
            "guests",
            "pages_sharing",
            "zero_pages",
            "saved_kb",
            "resident_kb_before",
            "resident_kb_after",
            "cow_breaks",
            "full_scans",
        ];
        want.sort_unstable();
        assert_eq!(names, want);
        let guest = value["guests"][0].as_object().unwrap();
        assert_eq!(guest.len(), 4);
        assert!(["name", "size_kb", "booted", "intact"]
            .iter()
            .all(|n| guest.contains_key(*n)));
    }

    #[test]
    fn corrupt_guests_and_nothing_saved_fail() {
        assert!(report(true, 8).good());
        assert!(!report(false, 8).good());
        assert!(!report(true, 0).good());
        let mut silent = report(true, 8);
        silent.guests[0].booted = false;
        assert!(!silent.good());
    }
}
