// SPDX-License-Identifier: GPL-2.0

//! `make soak`: guests come and go for hours with everything on at once, and at the end no memory is
//! missing. Processes stand for guests on User-Mode Linux, at native speed; real ones run on the stock
//! kernel. Both at the same time.

use crate::env::{read, target, write, Kernel};
use crate::guest::{Guest, Kind, Spec};
use crate::inside::{self, load, number, set, unload, until, Ctx, Fs, Mount, MOUNT, SOON};
use crate::ktap::Test;
use crate::real::verdict_in;
use crate::report::{self, Suite};
use crate::setup;
use crate::soak_record::{self, head, parse, picture, Sample, FIGURES};
use crate::step::say;
use crate::suites;
use crate::vm::{self, Job, Place};
use anyhow::{bail, ensure, Context, Result};
use serde_json::json;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What takes the host's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Load {
    /// The scenarios that do everything at once, on User-Mode Linux.
    Processes,
    /// QEMUs, on the stock kernel.
    Guests,
}

impl Load {
    fn name(self) -> &'static str {
        match self {
            Load::Processes => "processes",
            Load::Guests => "guests",
        }
    }

    /// Where the record and what is made of it lie.
    fn file(self, ending: &str) -> PathBuf {
        target("soak").join(format!("{}.{ending}", self.name()))
    }
}

/// Real guests boot for half a minute or more each under emulation: less than this is too short for
/// them to come and go often enough.
const LEAST_FOR_GUESTS: Duration = Duration::from_secs(12 * 60);

/// The soak as seen from outside.
pub fn run(kernel: &Kernel, hours: f64) -> Result<ExitCode> {
    ensure!(
        hours > 0.0 && hours <= 1000.0,
        "HOURS={hours}: give a number above 0 and up to 1000"
    );
    let span = Duration::from_secs_f64(hours * 3600.0);
    suites::programs()?;
    setup::uml(kernel, setup::Uml::Plain)?;
    let guests = span >= LEAST_FOR_GUESTS;
    if guests {
        setup::module(kernel)?;
        vm::guests(kernel)?;
    } else {
        say("processes only: real guests take HOURS=0.2 at least");
    }
    let suite = |kind, load: Load| {
        let name = format!("soak: {}", load.name());
        Suite::run(kind, &name, || tests(kernel, load, span))
    };
    let suites: Vec<Suite> = std::thread::scope(|s| {
        let real = guests.then(|| s.spawn(|| suite(report::Kind::Kvm, Load::Guests)));
        let mut suites = vec![suite(report::Kind::Scenario, Load::Processes)];
        suites.extend(real.and_then(|thread| thread.join().ok()));
        suites
    });
    ensure!(
        suites.len() == 1 + usize::from(guests),
        "the runner itself panicked"
    );
    Ok(report::show(&suites))
}

/// One soak of that length, its verdict, and its picture.
pub fn tests(k: &Kernel, load: Load, span: Duration) -> Result<Vec<Test>> {
    let record = load.file("tsv");
    write(&record, head())?;
    let seconds = span.as_secs();
    let job = Job {
        name: format!("soak-{}", load.name()),
        place: match load {
            Load::Processes => Place::Uml,
            Load::Guests => Place::KvmHost,
        },
        script: format!(
            "exec /src/target/sysroot/release/xtask inside soak {} {seconds}\n",
            load.name()
        ),
        // The last round begins before the end.
        timeout: span + 2 * PATIENCE,
        memory_mib: 2048,
        append: match load {
            Load::Processes => "kunit.enable=0".into(),
            Load::Guests => String::new(),
        },
        stream: false,
        scratch: None,
    };
    let run = vm::execute(k, &job)?;
    let mut tests = run.health();
    let samples = parse(&read(&record)?)?;
    let title = format!("ThinRAM soak, {}, {seconds} s", load.name());
    write(load.file("svg"), picture(&samples, &title))?;
    let name = format!("no growth without {}", load.name());
    tests.push(match soak_record::verdict(&samples) {
        Ok((table, grew)) => {
            write(load.file("txt"), &table)?;
            say(format!("{title}:\n{table}"));
            match &grew[..] {
                [] => Test::pass(name),
                grew => Test::fail(name, format!("{} grew\n{table}", grew.join(", "))),
            }
        }
        Err(e) => Test::fail(name, format!("{e:#}")),
    });
    Ok(tests)
}

/// The record, to which two threads write.
struct Record {
    start: Instant,
    file: fs::File,
}

impl Record {
    fn open(load: Load) -> Result<Record> {
        let path = load.file("tsv");
        let file = fs::File::options().append(true).open(&path);
        Ok(Record {
            start: Instant::now(),
            file: file.with_context(|| format!("{}", path.display()))?,
        })
    }

    fn look(&self, idle: bool) -> Result<()> {
        let sample = Sample {
            seconds: self.start.elapsed().as_secs_f64(),
            idle,
            values: figures()?,
        };
        // A whole line in one write.
        (&self.file).write_all(sample.line().as_bytes())?;
        Ok(())
    }
}

/// The value of `name` in the text of /proc/meminfo.
fn field(text: &str, name: &str) -> Result<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let line = line.with_context(|| format!("/proc/meminfo has no {name}"))?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Pages that wait in the lists of each CPU: MemAvailable leaves them out, up to 14 MiB each.
fn listed_kb() -> Result<u64> {
    let zones = read("/proc/zoneinfo")?;
    let counts = zones.lines().filter_map(|line| {
        let count = line.trim_start().strip_prefix("count:")?;
        count.trim().parse::<u64>().ok()
    });
    Ok(counts.sum::<u64>() * 4)
}

/// In the order of [`FIGURES`].
fn figures() -> Result<[f64; FIGURES.len()]> {
    let info = read("/proc/meminfo")?;
    let of = |name: &str| field(&info, name);
    let vms: Vec<String> = fs::read_dir("/sys/fs/thinram/vms")?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    // One that ends in this moment has none.
    let sum = |name: &str| -> u64 {
        let values = vms.iter().map(|vm| number(&format!("vms/{vm}/{name}")));
        values.map(|value| value.unwrap_or(0)).sum()
    };
    let available = of("MemAvailable")? + listed_kb()?;
    let kernel = of("KernelStack")? + of("PageTables")? + of("VmallocUsed")? + of("Percpu")?;
    let values = [
        of("MemTotal")?.saturating_sub(available),
        of("SUnreclaim")?,
        kernel,
        number("metadata_bytes")? / 1024,
        sum("resident_kb"),
        number("saved_kb")?,
        sum("compressed_kb"),
        sum("swapped_kb"),
        vms.len() as u64,
    ];
    Ok(values.map(|value| value as f64))
}

/// What the module must have none of once no guest is there.
const GONE: [&str; 6] = [
    "pages_shared",
    "pages_sharing",
    "zero_pages",
    "shared_frames_kb",
    "shared_compressed_kb",
    "shared_swapped_kb",
];

/// A look with no guest there.
fn look_idle(record: &Record) -> Result<()> {
    until("end of all VMs", SOON, || {
        Ok(fs::read_dir("/sys/fs/thinram/vms")?.count() == 0)
    })?;
    for name in GONE {
        let left = number(name)?;
        ensure!(left == 0, "{name} is {left} without a VM");
    }
    inside::sh(&mut Command::new("sync"))?;
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    // What was freed by RCU and by the last of a process comes in.
    std::thread::sleep(Duration::from_millis(500));
    record.look(true)
}

/// The part inside the machine. True if every guest was intact.
pub fn inside(kind: Load, seconds: u64) -> Result<bool> {
    let span = Duration::from_secs(seconds);
    if kind == Load::Guests {
        load(Fs::Thinram)?;
    }
    let record = Record::open(kind)?;
    let done = AtomicBool::new(false);
    let rounds = std::thread::scope(|s| {
        s.spawn(|| {
            // Some hundred dots in the picture.
            let step = (span / 500).max(Duration::from_secs(1));
            while !done.load(Ordering::Relaxed) {
                if let Err(e) = record.look(false) {
                    eprintln!("record: {e:#}");
                }
                std::thread::sleep(step);
            }
        });
        let rounds = rounds(kind, span, &record);
        done.store(true, Ordering::Relaxed);
        rounds
    });
    match rounds {
        Ok(count) => println!("{count} rounds"),
        Err(e) => {
            println!("{e:#}");
            return Ok(false);
        }
    }
    if kind == Load::Guests {
        unload(Fs::Thinram)?;
    }
    Ok(true)
}

fn rounds(kind: Load, span: Duration, record: &Record) -> Result<u64> {
    let mut dice = Dice::new()?;
    let mut round = 0;
    // On a busy machine a round takes longer, but a verdict takes as many looks.
    while record.start.elapsed() < span || round < soak_record::LEAST as u64 {
        round += 1;
        let seed = dice.state;
        match kind {
            Load::Processes => processes(dice.draw()),
            Load::Guests => guests(round, &mut dice),
        }
        .with_context(|| format!("round {round}, seed {seed}"))?;
        look_idle(record).with_context(|| format!("after round {round}"))?;
        println!("round {round} ended after {:?}", record.start.elapsed());
    }
    Ok(round)
}

/// Numbers to choose by (SplitMix64).
struct Dice {
    state: u64,
}

impl Dice {
    fn new() -> Result<Dice> {
        let mut bytes = [0; 8];
        std::io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut bytes)?;
        Ok(Dice {
            state: u64::from_ne_bytes(bytes),
        })
    }

    fn draw(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        thinram_logic::hash::mix(self.state)
    }

    fn one_of<T: Copy>(&mut self, of: &[T]) -> Option<T> {
        let index = self.draw().checked_rem(of.len() as u64)?;
        of.get(index as usize).copied()
    }
}

/// The cases that do everything at once, with what they check; each of them leaves nothing.
const CASES: [&str; 5] = [
    "torture/all",
    "fuzz/calls",
    "fuzz/processes",
    "cold/race",
    "swap/shared-race",
];

fn processes(seed: u64) -> Result<()> {
    let mut scenario = Command::new(target("sysroot/release/thinram-scenario"));
    scenario.args(["run", "--mount", MOUNT, "--disk", "/run/disk"]);
    scenario.args([
        "--scratch",
        "/dev/ubdb",
        "--scale",
        "0.05",
        "--patience",
        "15",
    ]);
    scenario.args(["--seed", &seed.to_string()]);
    for case in CASES {
        scenario.args(["--filter", case]);
    }
    let output = scenario.output().context("thinram-scenario")?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stdout));
    }
    Ok(())
}

const GUEST_MIB: u64 = 96;
const LOAD_MIB: u64 = 24;

/// The host's controls as a round finds and leaves them.
const CONTROLS: [(&str, &str); 8] = [
    ("run", "1"),
    ("share_scope", "domain"),
    ("zero_only", "0"),
    ("max_page_sharing", "65536"),
    ("large_pages", "always"),
    ("compress_max_percent", "10"),
    ("scan_period_secs", "5"),
    ("scan_cpu_max_percent", "60"),
];

/// What is set meanwhile.
const CHANGES: [(&str, &[&str]); 8] = [
    ("run", &["0", "1", "1", "2"]),
    ("share_scope", &["vm", "domain", "host"]),
    ("zero_only", &["0", "0", "1"]),
    ("max_page_sharing", &["2", "65536"]),
    ("large_pages", &["always", "never"]),
    ("compress_max_percent", &["0", "10", "50"]),
    ("scan_period_secs", &["5", "20"]),
    ("scan_cpu_max_percent", &["20", "60"]),
];

/// How long a guest may take for a boot or a pass: one that stands still is an error, but not one on a
/// machine with much else to do.
const PATIENCE: Duration = Duration::from_secs(20 * 60);
/// How often something changes.
const STEP: Duration = Duration::from_secs(2);

fn force_state(state: &str) -> Result<()> {
    let file = "/sys/kernel/debug/thinram/force_state";
    fs::write(file, state).with_context(|| format!("{state} to {file}"))
}

/// Sets a control; without memory it may stay what it was.
fn set_if_possible(name: &str, value: &str) -> Result<()> {
    const ENOMEM: i32 = 12;
    match set(name, value) {
        Err(e)
            if e.downcast_ref::<std::io::Error>()
                .is_some_and(|e| e.raw_os_error() == Some(ENOMEM)) =>
        {
            Ok(())
        }
        done => done,
    }
}

/// Changes one thing of the host or of a guest.
fn change(dice: &mut Dice, guests: &mut [Guest]) -> Result<()> {
    let of = guests.len() as u64;
    let one = dice
        .draw()
        .checked_rem(of)
        .and_then(|one| guests.get_mut(one as usize));
    match (dice.draw() % 8, one) {
        (0..=1, _) => {
            let states = ["high", "none", "none", "clear", "soft", "hard"];
            force_state(dice.one_of(&states).unwrap_or("none"))
        }
        (2, Some(guest)) if guest.booted() => {
            let control = format!("vms/{}/limit_kb", guest.name);
            let resident = number(&format!("vms/{}/resident_kb", guest.name))?;
            let limit = dice
                .one_of(&[0, resident * 3 / 4, resident / 2])
                .unwrap_or(0);
            set_if_possible(&control, &limit.to_string())
        }
        (3, Some(guest)) if guest.booted() => {
            let value = dice.one_of(&["0", "1", "1"]).unwrap_or("1");
            set_if_possible(&format!("vms/{}/share", guest.name), value)
        }
        (4, Some(guest)) if guest.booted() => {
            let mib = dice
                .one_of(&[GUEST_MIB, GUEST_MIB * 3 / 4])
                .unwrap_or(GUEST_MIB);
            guest.qmp("balloon", json!({"value": mib << 20})).map(drop)
        }
        _ => {
            let Some((name, values)) = dice.one_of(&CHANGES) else {
                return Ok(());
            };
            set_if_possible(name, dice.one_of(values).unwrap_or("1"))
        }
    }
}

/// Changes things until `done` with all guests.
fn drive(
    dice: &mut Dice,
    guests: &mut [Guest],
    what: &str,
    done: impl Fn(&Guest) -> bool,
) -> Result<()> {
    let start = Instant::now();
    let mut changed = start;
    loop {
        let mut waits = false;
        for guest in guests.iter_mut() {
            if !done(guest) {
                waits = true;
                // An end that came too early is an error.
                guest.wait(what, PATIENCE, |g| {
                    done(g) || changed.elapsed() > STEP || start.elapsed() > PATIENCE
                })?;
            }
        }
        if !waits {
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE, "no {what} in time");
        if changed.elapsed() > STEP {
            changed = Instant::now();
            change(dice, guests)?;
        }
    }
}

/// A guest whose disk is read past every cache all the time, with a balloon.
fn start(mount: &Mount, name: &str) -> Result<Guest> {
    let mut spec = Spec::new(name, Kind::Small, GUEST_MIB, &mount.vm(name)?, LOAD_MIB);
    spec.args = [
        "-device",
        "virtio-balloon-device",
        "-drive",
        "if=none,id=d,format=raw,cache=none,aio=io_uring,readonly=on,file=/run/disk/soak.img",
        "-device",
        "virtio-blk-device,drive=d",
    ]
    .map(String::from)
    .to_vec();
    spec.append = format!(
        "RUN=\"(while dd if=/dev/vda of=/dev/null bs=256k iflag=direct 2>/dev/null; \
         do sleep 1; done) & guest-load {name} {LOAD_MIB}\""
    );
    Guest::start(&spec)
}

/// Three guests come, one after the others. One is killed, two end and say that all was right.
fn guests(round: u64, dice: &mut Dice) -> Result<()> {
    let ctx = Ctx {
        fs: Fs::Thinram,
        rounds: 1,
    };
    let image = Path::new("/run/disk/soak.img");
    if !image.exists() {
        fs::write(image, vec![0x5a; 4 << 20])?;
    }
    let mount = ctx.mount()?;
    for (name, value) in CONTROLS {
        set(name, value)?;
    }
    set("swap_dir", "/run/disk")?;
    let name = |which: &str| format!("web{round}-{which}");
    let mut guests = vec![start(&mount, &name("a"))?, start(&mount, &name("b"))?];
    drive(dice, &mut guests, "pass", |g| g.passes() >= 1)?;
    guests.push(start(&mount, &name("c"))?);
    drive(dice, &mut guests, "pass beside a new guest", |g| {
        g.passes() >= 2
    })?;
    force_state("none")?;
    // The second one is killed, in the middle of whatever it does.
    drop(guests.remove(1));
    verdict_in(&mut guests.remove(0), PATIENCE)?;
    drive(dice, &mut guests, "pass of the last guest", |g| {
        g.passes() >= 3
    })?;
    force_state("none")?;
    for (name, value) in CONTROLS {
        set(name, value)?;
    }
    guests
        .iter_mut()
        .try_for_each(|guest| verdict_in(guest, PATIENCE))?;
    drop(guests);
    drop(mount);
    set("swap_dir", "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_round_changes_it_puts_back() {
        for (name, values) in CHANGES {
            let back = CONTROLS.iter().find(|(control, _)| *control == name);
            let (_, value) = back.expect(name);
            assert!(values.contains(value), "{name}");
        }
        assert_eq!(CHANGES.len(), CONTROLS.len());
    }

    #[test]
    fn fields_of_meminfo_are_read() {
        let text = "MemTotal:        100 kB\nMemAvailable:     60 kB\nMem: 1\n";
        assert_eq!(field(text, "MemAvailable").expect("it is there"), 60);
        assert!(field(text, "MemFree").is_err());
    }
}
