// SPDX-License-Identifier: GPL-2.0

//! How far 2 MiB pages come up to hugetlbfs: KVM's own statistics of a guest, first touches by a
//! process, and what becomes of them while memory is short. Runs inside the virtual KVM host.
//!
//! Emulation has no hardware TLB: counts decide, times are for comparison within one run.

use crate::bench::minor_faults;
use crate::env::{read, target, write};
use crate::guest::{Guest, Kind, Spec};
use crate::inside::{number, set, until, Fs, Mount, BOOT, MOUNT, SOON};
use crate::vm;
use anyhow::{ensure, Context, Result};
use rustix::fs::{memfd_create, MemfdFlags};
use rustix::mm::{madvise, mmap, munmap, Advice, MapFlags, ProtFlags};
use serde::Serialize;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
/// Pages in a 2 MiB page.
const PARTS: usize = 512;
const KVM: &str = "/sys/kernel/debug/kvm";
const KVM_EXIT: &str = "/sys/kernel/tracing/events/kvm/kvm_exit";
const THP: &str = "/sys/kernel/mm/transparent_hugepage";
const HUGETLB: &str = "/proc/sys/vm/nr_hugepages";
/// Memory of the host that [`run`] is for, MiB: there has to be room beside what a process touches.
pub const HOST_MIB: u32 = 4096;
/// What a process touches.
const TOUCH_MIB: usize = 1024;
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

/// A guest's memory, and the area in it that it fills and reads, MiB.
#[derive(Clone, Copy)]
struct Sizes {
    guest: u64,
    area: u64,
}

/// For the benchmark: an area that is large beside the guest's own needs.
const LARGE: Sizes = Sizes {
    guest: 384,
    area: 256,
};
/// For the test, which has a smaller host.
const SMALL: Sizes = Sizes {
    guest: 128,
    area: 64,
};

/// What KVM counted so far, or in between.
#[derive(Clone, Debug, Default, Serialize)]
struct Counted {
    /// Nested page faults.
    pf_taken: u64,
    exits: u64,
    /// The exits by the processor's reason.
    by_reason: BTreeMap<String, u64>,
    ms: u64,
}

/// What depends on how long the guest takes, not on what its memory lies on: interrupts and timers of
/// host and guest, its sleep, and what it does while it waits for a device.
const BY_CLOCK: [&str; 7] = [
    "interrupt",
    "interrupt window",
    "hlt",
    "io",
    "msr",
    "timer",
    "cr0",
];

impl Counted {
    /// What came since `before`.
    fn since(&self, before: &Counted) -> Counted {
        let earlier = |reason: &String| before.by_reason.get(reason).copied().unwrap_or(0);
        Counted {
            pf_taken: self.pf_taken - before.pf_taken,
            exits: self.exits - before.exits,
            by_reason: (self.by_reason.iter())
                .map(|(reason, count)| (reason.clone(), count.saturating_sub(earlier(reason))))
                .filter(|(_, count)| *count > 0)
                .collect(),
            ms: self.ms - before.ms,
        }
    }

    /// Exits that the guest's own work causes.
    fn by_work(&self) -> u64 {
        let clock = |reason: &str| self.by_reason.get(reason).copied().unwrap_or(0);
        self.exits
            .saturating_sub(BY_CLOCK.iter().map(|reason| clock(reason)).sum())
    }
}

#[derive(Clone, Debug, Serialize)]
struct GuestFigures {
    on: On,
    /// 2 MiB entries of KVM's own page table.
    pages_2m: u64,
    pages_4k: u64,
    /// Until its first process runs.
    boot: Counted,
    /// It writes to each page of the area.
    fill: Counted,
    /// It reads words of the area in random order.
    reads: Counted,
    /// What the reads took by the guest's clock.
    reads_us: u64,
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

/// Microseconds for 2 MiB, the region locked.
#[derive(Serialize)]
struct Costs {
    split_us: f64,
    collapse_us: f64,
}

#[derive(Serialize)]
struct Report {
    guests: Vec<GuestFigures>,
    touch: Vec<TouchFigures>,
    costs: Costs,
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

/// The kernel counts KVM's exits by their reasons; no more when dropped.
struct ByReason;

impl ByReason {
    const TRIGGER: &'static str = "hist:keys=exit_reason:size=1024";

    fn start() -> Result<Self> {
        let path = Path::new(KVM_EXIT).join("trigger");
        fs::write(&path, Self::TRIGGER).with_context(|| format!("{}", path.display()))?;
        Ok(Self)
    }

    fn read(&self) -> Result<BTreeMap<String, u64>> {
        by_reason(&read(Path::new(KVM_EXIT).join("hist"))?)
    }
}

impl Drop for ByReason {
    fn drop(&mut self) {
        let path = Path::new(KVM_EXIT).join("trigger");
        if let Err(e) = fs::write(&path, format!("!{}", Self::TRIGGER)) {
            eprintln!("{}: {e}", path.display());
        }
    }
}

/// The lines `{ exit_reason: N } hitcount: M` of a histogram.
fn by_reason(text: &str) -> Result<BTreeMap<String, u64>> {
    let mut sums = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with('{')) {
        let mut numbers = line
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|word| word.parse().ok());
        let (Some(code), Some(hits)) = (numbers.next(), numbers.next()) else {
            anyhow::bail!("not a line of a histogram: {line}");
        };
        *sums.entry(reason(code)).or_insert(0) += hits;
    }
    Ok(sums)
}

/// A name for the processor's number: AMD's, and Intel's, which are lower.
fn reason(code: u64) -> String {
    let name = match code {
        0x400 | 48 => "nested fault",
        49 => "mmio",
        0x60 | 1 => "interrupt",
        0x64 | 7 => "interrupt window",
        0x78 | 12 => "hlt",
        0x7b | 30 => "io",
        0x7c | 31 | 32 => "msr",
        52 => "timer",
        0x65 | 28 => "cr0",
        0x72 | 10 => "cpuid",
        _ => return format!("{code:#x}"),
    };
    name.into()
}

/// One of KVM's own statistics, over all guests.
pub fn kvm(name: &str) -> Result<u64> {
    let path = Path::new(KVM).join(name);
    read(&path)?
        .parse()
        .with_context(|| path.display().to_string())
}

/// Boots a guest that fills an area and reads in it; what KVM counted at each step.
fn guest(on: On, mount: &Mount, sizes: Sizes) -> Result<GuestFigures> {
    large_pages(on)?;
    let dir = mount.vm("web1")?;
    let Sizes { guest: mib, area } = sizes;
    let mut spec = Spec::new("web1", Kind::Small, mib, &dir, area);
    spec.append = format!("RUN=\"guest-load web1 {area} reads\"");
    if on == On::Hugetlb {
        reserve_hugetlb(mib as usize)?;
        spec.backends = vec![format!(
            "memory-backend-memfd,id=m0,size={mib}M,share=on,hugetlb=on,hugetlbsize=2M"
        )];
    }
    let reasons = ByReason::start()?;
    let start = Instant::now();
    let counted = || -> Result<Counted> {
        let pf_taken = kvm("pf_taken")?;
        let mut by_reason = reasons.read()?;
        // AMD has one reason for both.
        let nested = by_reason.get("nested fault").copied().unwrap_or(0);
        let faults = by_reason.keys().any(|reason| reason == "mmio");
        if !faults {
            let mmio = nested.saturating_sub(pf_taken);
            by_reason.insert("nested fault".into(), nested - mmio);
            by_reason.insert("mmio".into(), mmio);
        }
        Ok(Counted {
            pf_taken,
            exits: kvm("exits")?,
            by_reason,
            ms: start.elapsed().as_millis() as u64,
        })
    };
    let says =
        |what: &'static str| move |g: &Guest| g.lines().iter().any(|line| line.contains(what));
    let at_start = counted()?;
    let mut guest = Guest::start(&spec)?;
    guest.wait("boot", BOOT, Guest::booted)?;
    let booted = counted()?;
    guest.wait("area", SOON, says("guest-load: start "))?;
    let filled = counted()?;
    guest.type_line("read")?;
    guest.wait("reads", SOON, says("guest-load: reads="))?;
    let done = counted()?;
    let line = guest.lines().into_iter();
    let took = line.filter_map(|l| l.split_once(" us=")?.1.trim().parse().ok());
    let figures = GuestFigures {
        on,
        pages_2m: kvm("pages_2m")?,
        pages_4k: kvm("pages_4k")?,
        boot: booted.since(&at_start),
        fill: filled.since(&booted),
        reads: done.since(&filled),
        reads_us: took.last().context("the guest did not say how long")?,
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
pub fn debugfs() {
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

/// A test: KVM maps a guest on ThinRAM by 2 MiB as one on hugetlbfs, and it costs no more exits. All of
/// them count where time does ([`vm::COUNTED`]); elsewhere those that memory may cause.
pub fn kvm_maps_2_mib() -> Result<()> {
    debugfs();
    let mount = Mount::new(Fs::Thinram, MOUNT, Some("lab"))?;
    quiet()?;
    let figures = guests(&mount, SMALL, 1);
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
    let few = |what: &str, ours: u64, theirs: u64| {
        ensure!(
            ours <= theirs * 102 / 100,
            "{ours} {what}, on hugetlbfs {theirs}"
        );
        Ok(())
    };
    let whole = [ours, hugetlb].map(GuestFigures::whole);
    few("nested faults", whole[0].pf_taken, whole[1].pf_taken)?;
    few("exits by its work", whole[0].by_work(), whole[1].by_work())?;
    if read("/proc/cmdline")?.contains(vm::COUNTED) {
        few("exits", whole[0].exits, whole[1].exits)?;
    }
    Ok(())
}

/// A test: what a guest reports as free goes by 2 MiB, and all else stays of 2 MiB, in KVM's page
/// table too.
pub fn reported_memory() -> Result<()> {
    /// Memory that the guest fills and lets go of, and what of that has to come back, KiB.
    const FILLED: u64 = 80 << 10;
    const BACK: u64 = FILLED * 3 / 4;
    debugfs();
    let mount = Mount::new(Fs::Thinram, MOUNT, Some("lab"))?;
    quiet()?;
    large_pages(On::ThinramLarge)?;
    let dir = mount.vm("web1")?;
    let mut spec = Spec::new("web1", Kind::Small, 192, &dir, 16);
    spec.args = vec![
        "-device".into(),
        "virtio-balloon-device,free-page-reporting=on".into(),
    ];
    spec.append = format!(
        "RUN=\"dd if=/dev/urandom of=/tmp/a bs=1M count={} 2>/dev/null; \
         echo guest: full; read go; rm /tmp/a; read go; guest-load web1 16\"",
        FILLED >> 10
    );
    let figures = || -> Result<[u64; 4]> {
        Ok([
            number("vms/web1/huge_kb")?,
            number("vms/web1/private_kb")?,
            number("splits")?,
            kvm("pages_2m")?,
        ])
    };
    let mut guest = Guest::start(&spec)?;
    guest.wait("boot", BOOT, Guest::booted)?;
    guest.wait("full", SOON, |g| {
        g.lines().iter().any(|l| l.contains("guest: full"))
    })?;
    let [huge_kb, private_kb, splits, pages_2m] = figures()?;
    ensure!(huge_kb > FILLED, "only {huge_kb} KiB are of 2 MiB");
    guest.type_line("go")?;
    until("memory that the guest reported as free", SOON, || {
        Ok(number("vms/web1/huge_kb")? + BACK <= huge_kb)
    })?;
    // It reports every two seconds, and is idle but for that.
    let mut now = figures()?;
    loop {
        std::thread::sleep(Duration::from_secs(5));
        let before = std::mem::replace(&mut now, figures()?);
        if before == now {
            break;
        }
    }
    println!(
        "# reported: {huge_kb} KiB of 2 MiB pages became {}, KVM's {pages_2m} became {}",
        now[0], now[3]
    );
    ensure!(
        now[1] <= private_kb,
        "{} KiB of small pages, {private_kb} before",
        now[1]
    );
    ensure!(now[2] == splits, "{} splits", now[2] - splits);
    let gone = (huge_kb - now[0]) / 2048;
    ensure!(
        now[3] + gone >= pages_2m,
        "KVM has {} pages of 2 MiB left of {pages_2m}, of which {gone} were reported",
        now[3]
    );
    // What it took back is of 2 MiB again.
    guest.type_line("go")?;
    guest.wait("pass", SOON, |g| g.passes() >= 1)?;
    ensure!(
        number("vms/web1/private_kb")? <= private_kb,
        "what the guest took back is of 4 KiB"
    );
    ensure!(guest.finish(SOON)?, "the guest found its memory corrupt");
    guest.ended(SOON)?;
    set("run", "1")?;
    set("active_sample_pages", "100")
}

/// A guest on each kind of memory, `rounds` times in turn; of each kind the medians.
fn guests(mount: &Mount, sizes: Sizes, rounds: usize) -> Result<Vec<GuestFigures>> {
    let kinds = [On::Hugetlb, On::ThinramLarge, On::ThinramSmall];
    let mut all = Vec::new();
    for _ in 0..rounds {
        for on in kinds {
            all.push(guest(on, mount, sizes).with_context(|| format!("{on:?}"))?);
        }
    }
    Ok(kinds
        .into_iter()
        .map(|on| GuestFigures::median(&all.iter().filter(|f| f.on == on).collect::<Vec<_>>()))
        .collect())
}

fn median(values: impl Iterator<Item = u64>) -> u64 {
    let mut values: Vec<u64> = values.collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

impl Counted {
    /// The median of each figure.
    fn median(all: &[&Counted]) -> Counted {
        let of = |figure: &dyn Fn(&Counted) -> u64| median(all.iter().map(|c| figure(c)));
        let reasons: std::collections::BTreeSet<&String> =
            all.iter().flat_map(|c| c.by_reason.keys()).collect();
        let by_reason = reasons.into_iter().map(|reason| {
            let hits = |c: &Counted| c.by_reason.get(reason).copied().unwrap_or(0);
            (reason.clone(), of(&hits))
        });
        Counted {
            pf_taken: of(&|c| c.pf_taken),
            exits: of(&|c| c.exits),
            by_reason: by_reason.collect(),
            ms: of(&|c| c.ms),
        }
    }
}

impl GuestFigures {
    /// The median of each figure of one kind of memory.
    fn median(all: &[&GuestFigures]) -> GuestFigures {
        let of = |figure: &dyn Fn(&GuestFigures) -> u64| median(all.iter().map(|g| figure(g)));
        let phase = |phase: &dyn Fn(&GuestFigures) -> &Counted| {
            let phases: Vec<Counted> = all.iter().map(|g| phase(g).clone()).collect();
            Counted::median(&phases.iter().collect::<Vec<_>>())
        };
        GuestFigures {
            on: all.first().map_or(On::Hugetlb, |g| g.on),
            pages_2m: of(&|g| g.pages_2m),
            pages_4k: of(&|g| g.pages_4k),
            boot: phase(&|g| &g.boot),
            fill: phase(&|g| &g.fill),
            reads: phase(&|g| &g.reads),
            reads_us: of(&|g| g.reads_us),
        }
    }

    /// All phases together.
    fn whole(&self) -> Counted {
        let mut sum = Counted::default();
        for phase in [&self.boot, &self.fill, &self.reads] {
            sum.pf_taken += phase.pf_taken;
            sum.exits += phase.exits;
            sum.ms += phase.ms;
            for (reason, count) in &phase.by_reason {
                *sum.by_reason.entry(reason.clone()).or_insert(0) += count;
            }
        }
        sum
    }
}

fn guest_table(figures: &[GuestFigures]) -> String {
    let mut out = String::new();
    for f in figures {
        out += &format!(
            "guest on {:?}: {} pages of 2 MiB, {} of 4 KiB, reads took {} us\n",
            f.on, f.pages_2m, f.pages_4k, f.reads_us
        );
        out += &format!(
            "  {:<8}{:>15}{:>10}{:>12}{:>9}  by reason\n",
            "", "nested faults", "exits", "by work", "ms"
        );
        let whole = f.whole();
        for (name, counted) in [
            ("boot", &f.boot),
            ("fill", &f.fill),
            ("reads", &f.reads),
            ("all", &whole),
        ] {
            let by_reason: Vec<String> = counted
                .by_reason
                .iter()
                .map(|(reason, count)| format!("{reason} {count}"))
                .collect();
            out += &format!(
                "  {name:<8}{:>15}{:>10}{:>12}{:>9}  {}\n",
                counted.pf_taken,
                counted.exits,
                counted.by_work(),
                counted.ms,
                by_reason.join(", ")
            );
        }
    }
    out
}

/// A shared mapping of a file; unmapped when dropped.
pub struct Mapped {
    at: *mut c_void,
    bytes: usize,
}

impl Mapped {
    /// Of the first `bytes` of a file that nobody truncates.
    pub fn new(file: &OwnedFd, bytes: usize) -> Result<Self> {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: A new mapping at an address of the kernel's choice; nobody truncates the file.
        let at = unsafe { mmap(std::ptr::null_mut(), bytes, prot, flags, file, 0)? };
        Ok(Self { at, bytes })
    }

    /// The first word of page `page`, which lies in the mapping.
    fn word(&self, page: usize) -> *mut u64 {
        assert!((page + 1) * PAGE <= self.bytes);
        self.at.cast::<u8>().wrapping_add(page * PAGE).cast()
    }

    /// Writes a word of page `page`.
    pub fn set(&self, page: usize, value: u64) {
        // SAFETY: The page lies in the mapping, which only this process uses.
        unsafe { self.word(page).write_volatile(value) };
    }

    /// Reads a word of page `page`.
    pub fn get(&self, page: usize) -> u64 {
        // SAFETY: As for `set`.
        unsafe { self.word(page).read_volatile() }
    }

    /// Its pages of 4 KiB.
    pub fn pages(&self) -> usize {
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

/// Two VMs, `a` and `b`, of which every other 2 MiB are equal until they get contents of their own.
struct Pair {
    maps: Vec<Mapped>,
    regions: usize,
}

impl Pair {
    fn new(mount: &Mount, regions: usize) -> Result<Self> {
        large_pages(On::ThinramLarge)?;
        for (knob, value) in [
            ("scan_cpu_max_percent", "60"),
            ("scan_period_secs", "2"),
            ("collapse_after_secs", "5"),
            ("collapse_per_sec", "8"),
            ("run", "1"),
        ] {
            set(knob, value)?;
        }
        let mut maps = Vec::new();
        for name in ["a", "b"] {
            let path = mount.vm(name)?.join("ram");
            let file = fs::File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&path)?;
            file.set_len((regions * PARTS * PAGE) as u64)?;
            maps.push(Mapped::new(&file.into(), regions * PARTS * PAGE)?);
            fs::remove_file(&path)?;
        }
        let pair = Self { maps, regions };
        pair.fill(0);
        Ok(pair)
    }

    /// Writes all pages; unless `own` is 0 no two are equal.
    fn fill(&self, own: u64) {
        for (vm, map) in self.maps.iter().enumerate() {
            for page in 0..map.pages() {
                let equal = (page / PARTS) % 2 == 0 && own == 0;
                let salt = if equal {
                    0
                } else {
                    (vm as u64 + 1 + own) << 40
                };
                map.set(page, salt + page as u64 + 1);
            }
        }
    }

    /// KiB of one VM that are equal to the other's.
    fn equal_kb(&self) -> u64 {
        (self.regions / 2 * PARTS * 4) as u64
    }

    /// KiB of both.
    fn all_kb(&self) -> u64 {
        (2 * self.regions * PARTS * 4) as u64
    }
}

/// A sum over both VMs of a [`Pair`].
fn of_both(name: &str) -> Result<u64> {
    Ok(number(&format!("vms/a/{name}"))? + number(&format!("vms/b/{name}"))?)
}

/// Memory is short while `f` runs.
fn while_short<R>(f: impl FnOnce() -> Result<R>) -> Result<R> {
    // Twice what is available has to be, for the host to count as having memory.
    set("minfree_kb", &(number("available_kb")? / 2).to_string())?;
    let result = f();
    set("minfree_kb", "0")?;
    result
}

/// Lets the scanner see all of the memory, and see it again.
fn scanned(mut meanwhile: impl FnMut() -> Result<()>) -> Result<()> {
    let scans = number("full_scans")?;
    until("passes of an idle host", SOON, || {
        meanwhile()?;
        Ok(number("full_scans")? >= scans + 4)
    })
}

/// What a split and a collapse take: the median over some rounds, of the mean in each.
fn costs(mount: &Mount) -> Result<Costs> {
    const REGIONS: usize = 16;
    let each = |us: &str, times: &str, f: &dyn Fn() -> Result<()>| -> Result<f64> {
        let before = (number(us)?, number(times)?);
        f()?;
        let times = number(times)? - before.1;
        ensure!(times > 0, "nothing happened");
        Ok((number(us)? - before.0) as f64 / times as f64)
    };
    let (mut splits, mut collapses) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let pair = Pair::new(mount, REGIONS)?;
        scanned(|| Ok(()))?;
        let wanted = number("saved_kb")? + pair.equal_kb() * 95 / 100;
        splits.push(each("split_us", "splits", &|| {
            while_short(|| until("a split", SOON, || Ok(number("saved_kb")? >= wanted)))
        })?);
        pair.fill(5);
        collapses.push(each("collapse_us", "collapses", &|| {
            until("a collapse", SOON, || {
                Ok(of_both("huge_kb")? >= pair.all_kb())
            })
        })?);
    }
    let median = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2].round()
    };
    Ok(Costs {
        split_us: median(&mut splits),
        collapse_us: median(&mut collapses),
    })
}

/// Half of the memory of two VMs is equal: idle, then short of memory, then idle again.
fn over_time(mount: &Mount) -> Result<Vec<Sample>> {
    let pair = Pair::new(mount, 48)?;
    let start = Instant::now();
    let mut samples = Vec::new();
    let mut sample = |phase: &'static str| -> Result<(u64, u64)> {
        let now = Sample {
            ms: start.elapsed().as_millis() as u64,
            phase,
            huge_kb: of_both("huge_kb")?,
            resident_kb: of_both("resident_kb")? + number("shared_frames_kb")?,
            saved_kb: number("saved_kb")?,
            splits: number("splits")?,
            collapses: number("collapses")?,
        };
        let seen = (now.saved_kb, now.huge_kb);
        samples.push(now);
        Ok(seen)
    };
    scanned(|| sample("idle").map(drop))?;
    while_short(|| {
        until("the equal half to be shared", SOON * 2, || {
            Ok(sample("contention")?.0 >= pair.equal_kb() * 95 / 100)
        })
    })?;
    // The guests go on with memory of their own.
    pair.fill(5);
    until("all to be of 2 MiB again", SOON * 2, || {
        Ok(sample("idle again")?.1 >= pair.all_kb())
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
    let over_time = over_time(&mount)?;
    println!("{}", picture(&over_time));
    let costs = costs(&mount)?;
    println!(
        "split {} us, collapse {} us for 2 MiB",
        costs.split_us, costs.collapse_us
    );
    quiet()?;
    std::thread::sleep(Duration::from_secs(1));
    let guests = guests(&mount, LARGE, ROUNDS)?;
    println!("{}", guest_table(&guests));
    let report = Report {
        guests,
        touch: figures,
        costs,
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

    #[test]
    fn a_histogram_is_read_by_reason() {
        let text = "# event histogram\n#\n\n\
                    { exit_reason:         96 } hitcount:        310\n\
                    { exit_reason:       1024 } hitcount:       3010\n\
                    { exit_reason:        135 } hitcount:          4\n\n\
                    Totals:\n    Hits: 3324\n    Entries: 3\n    Dropped: 0\n";
        let seen = by_reason(text).unwrap();
        let expected = [("interrupt", 310), ("nested fault", 3010), ("0x87", 4)];
        assert_eq!(seen.len(), expected.len());
        for (name, count) in expected {
            assert_eq!(seen.get(name), Some(&count), "{name}");
        }
        assert!(by_reason("{ exit_reason: } hitcount: 4\n").is_err());
    }

    #[test]
    fn what_comes_by_the_clock_is_told_apart() {
        let counted = |interrupts, faults| Counted {
            pf_taken: faults,
            exits: interrupts + faults + 1,
            by_reason: [
                ("interrupt", interrupts),
                ("nested fault", faults),
                ("cpuid", 1),
            ]
            .map(|(reason, count)| (reason.to_string(), count))
            .into(),
            ms: interrupts,
        };
        let between = counted(17, 30).since(&counted(7, 10));
        assert_eq!(between.by_reason.len(), 2);
        assert_eq!((between.exits, between.by_work(), between.ms), (30, 20, 10));
        let many = [counted(3, 9), counted(1, 5), counted(2, 7)];
        let middle = Counted::median(&many.iter().collect::<Vec<_>>());
        assert_eq!((middle.ms, middle.pf_taken, middle.by_work()), (2, 7, 8));
    }
}
