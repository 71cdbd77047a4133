// SPDX-License-Identifier: GPL-2.0

//! What runs inside the virtual KVM host: the module's life, mounts, its sysfs, and the
//! tests with real guests, which print KTAP.

use crate::env::{read, target};
use crate::guest::{Guest, Kind, Spec};
use crate::{harm, kvm_selftests, real, vhost_user};
use anyhow::{bail, ensure, Context, Result};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Where the tests mount.
pub const MOUNT: &str = "/run/thinram";
const SYS: &str = "/sys/fs/thinram";
/// Long enough for a nested guest to boot under emulation beside others.
pub const BOOT: Duration = Duration::from_secs(600);
/// Long enough for one pass of a load, or for an answer.
pub const SOON: Duration = Duration::from_secs(400);

/// How often what goes in rounds goes round in `make test`.
pub const ROUNDS: u64 = 2;

/// The file system that guests' memory lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Fs {
    /// The module.
    Thinram,
    /// The kernel's own: shows that a test fails because of the module, not of itself.
    Tmpfs,
}

/// A mounted file system; unmounted when dropped.
pub struct Mount {
    /// What it is.
    pub fs: Fs,
    /// Where it is.
    pub path: PathBuf,
}

impl Mount {
    /// Mounts at `path`, with `domain=NAME` if one is given.
    pub fn new(fs: Fs, path: impl AsRef<Path>, domain: Option<&str>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        fs::create_dir_all(&path)?;
        let mut c = Command::new("mount");
        match fs {
            Fs::Thinram => {
                c.args(["-t", "thinram"]);
                if let Some(domain) = domain {
                    c.args(["-o", &format!("domain={domain}")]);
                }
                c.arg("thinram");
            }
            Fs::Tmpfs => {
                c.args(["-t", "tmpfs", "-o", "size=1500M", "tmpfs"]);
            }
        }
        sh(c.arg(&path))?;
        Ok(Self { fs, path })
    }

    /// Makes the folder of a VM.
    pub fn vm(&self, name: &str) -> Result<PathBuf> {
        let dir = self.path.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("{}", dir.display()))?;
        Ok(dir)
    }

    /// Makes a file of `bytes` for a VM.
    pub fn file(&self, vm: &str, bytes: u64) -> Result<fs::File> {
        let file = fs::File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(self.vm(vm)?.join("ram"))?;
        file.set_len(bytes)?;
        Ok(file)
    }

    /// What the VM takes of the host, in KiB: of all VMs for tmpfs.
    pub fn resident_kb(&self, vm: &str) -> Result<u64> {
        match self.fs {
            Fs::Thinram => number(&format!("vms/{vm}/resident_kb")),
            Fs::Tmpfs => {
                let s = rustix::fs::statvfs(&self.path)?;
                Ok((s.f_blocks - s.f_bfree) * s.f_frsize / 1024)
            }
        }
    }
}

impl Mount {
    /// Takes it out of the tree though it is in use (`umount -l`).
    pub fn detach(self) -> Result<()> {
        sh(Command::new("umount").arg("-l").arg(&self.path))?;
        std::mem::forget(self);
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let start = Instant::now();
        // A killed QEMU lets go of its files a moment after it was waited for.
        while sh(Command::new("umount").arg(&self.path)).is_err() {
            if start.elapsed() > Duration::from_secs(60) {
                eprintln!("# {} is still busy", self.path.display());
                return;
            }
            std::thread::sleep(Duration::from_millis(300));
        }
    }
}

/// Runs a command; its error text if it fails.
pub fn sh(c: &mut Command) -> Result<String> {
    crate::step::output(c)
}

/// A number from the module's sysfs.
pub fn number(name: &str) -> Result<u64> {
    let path = Path::new(SYS).join(name);
    let text = read(&path)?;
    text.parse()
        .with_context(|| format!("{}: {text}", path.display()))
}

/// Sets a control of the module.
pub fn set(name: &str, value: &str) -> Result<()> {
    let path = Path::new(SYS).join(name);
    fs::write(&path, value).with_context(|| format!("{value} to {}", path.display()))
}

/// Keeps 2 MiB pages out of what follows, where the module has them: only 4 KiB pages merge.
pub fn small_pages() -> Result<()> {
    if Path::new(SYS).join("large_pages").exists() {
        set("large_pages", "never")?;
    }
    Ok(())
}

/// Whether it is the one that watches memory and locks.
fn is_debug_kernel() -> Result<bool> {
    Ok(release()?.ends_with("-thinram-debug"))
}

/// The module that was built for the kernel that runs.
pub fn module() -> Result<PathBuf> {
    Ok(target(if is_debug_kernel()? {
        "module-sanitized/thinram.ko"
    } else {
        "module/thinram.ko"
    }))
}

fn release() -> Result<String> {
    read("/proc/sys/kernel/osrelease")
}

/// Loads drivers of the stock kernel; another kernel has them built in.
pub fn modprobe(drivers: &[&str]) -> Result<()> {
    let modules = format!("/cache/stock-{}/usr", release()?);
    if Path::new(&modules).exists() {
        sh(Command::new("modprobe")
            .args(["-d", &modules, "-a"])
            .args(drivers))?;
    }
    Ok(())
}

/// Loads KVM, and the module if it is used.
pub fn load(fs: Fs) -> Result<()> {
    let cpus = read("/proc/cpuinfo")?;
    let kvm = if cpus.contains("vmx") {
        "kvm_intel"
    } else {
        "kvm_amd"
    };
    modprobe(&[kvm])?;
    if fs == Fs::Thinram && !Path::new(SYS).exists() {
        sh(Command::new("insmod").arg(module()?))?;
    }
    Ok(())
}

/// Unloads the module, which has to be possible once nothing is mounted.
pub fn unload(fs: Fs) -> Result<()> {
    if fs == Fs::Thinram {
        sh(Command::new("rmmod").arg("thinram"))?;
        ensure!(!Path::new(SYS).exists(), "{SYS} is left after rmmod");
    }
    Ok(())
}

/// Waits until `done` says so.
pub fn until(what: &str, limit: Duration, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !done()? {
        ensure!(
            start.elapsed() < limit,
            "no {what} in {} s",
            limit.as_secs()
        );
        std::thread::sleep(Duration::from_millis(250));
    }
    Ok(())
}

/// What a case gets.
pub struct Ctx {
    /// The file system for guests' memory.
    pub fs: Fs,
    /// How often what goes in rounds goes round.
    pub rounds: u64,
}

impl Ctx {
    /// Mounts at the usual place.
    pub fn mount(&self) -> Result<Mount> {
        Mount::new(self.fs, MOUNT, Some("lab"))
    }
}

struct Case {
    name: &'static str,
    /// It asks for what only the module has.
    module: bool,
    run: fn(&Ctx) -> Result<()>,
}

const CASES: &[Case] = &[
    Case {
        name: "guest_on_a_folder_is_intact",
        module: false,
        run: folder,
    },
    Case {
        name: "guest_on_a_file_is_intact",
        module: false,
        run: file,
    },
    Case {
        name: "two_backends_for_one_guest",
        module: false,
        run: two_backends,
    },
    Case {
        name: "prealloc_takes_all_memory_at_start",
        module: false,
        run: prealloc,
    },
    Case {
        name: "plugged_dimm_is_used",
        module: false,
        run: dimm,
    },
    Case {
        name: "balloon_gives_memory_back_and_takes_it",
        module: false,
        run: balloon,
    },
    Case {
        name: "free_page_reporting_gives_memory_back",
        module: false,
        run: reporting,
    },
    Case {
        name: "disk_with_cache_none_reads_what_it_wrote",
        module: false,
        run: direct_disk,
    },
    Case {
        name: "killed_guest_gives_all_memory_back",
        module: false,
        run: killed,
    },
    Case {
        name: "stock_kernel_as_guest_is_intact",
        module: false,
        run: stock,
    },
    Case {
        name: "live_migration_and_upgrade_of_the_module",
        module: false,
        run: real::migration,
    },
    Case {
        name: "snapshot_to_a_file_and_back",
        module: false,
        run: real::snapshot,
    },
    Case {
        name: "savevm_and_loadvm",
        module: false,
        run: real::savevm,
    },
    Case {
        name: "virtio_mem_plugs_and_unplugs",
        module: false,
        run: real::virtio_mem,
    },
    Case {
        name: "vhost_net_carries_what_the_guest_sends",
        module: false,
        run: real::vhost_net,
    },
    Case {
        name: "vhost_user_disk_reads_what_it_wrote",
        module: false,
        run: vhost_user::disk,
    },
    Case {
        name: "virtiofs_folder_reads_what_it_wrote",
        module: false,
        run: vhost_user::folder,
    },
    Case {
        name: "sudden_ends_leave_nothing_behind",
        module: false,
        run: real::sudden_ends,
    },
    Case {
        name: "what_the_host_does_leaves_a_guest_alone",
        module: false,
        run: harm::host,
    },
    Case {
        name: "private_mapping_is_refused_with_a_hint",
        module: true,
        run: private,
    },
    Case {
        name: "identical_pages_of_running_guests_merge",
        module: true,
        run: merge,
    },
    Case {
        name: "mounts_without_domain_do_not_share",
        module: true,
        run: no_domain,
    },
    Case {
        name: "kvm_maps_2_mib_as_on_hugetlbfs",
        module: true,
        run: |_| crate::large::kvm_maps_2_mib(),
    },
    Case {
        name: "reported_memory_leaves_the_rest_of_2_mib",
        module: true,
        run: |_| crate::large::reported_memory(),
    },
    Case {
        name: "limited_guest_is_compressed_and_intact",
        module: true,
        run: limited,
    },
    Case {
        name: "active_kb_follows_what_a_guest_does",
        module: true,
        run: crate::bench_sampling::follows_a_guest,
    },
    Case {
        name: "kvm_selftest_demand_paging",
        module: true,
        run: kvm_selftests::demand_paging,
    },
    Case {
        name: "kvm_selftest_dirty_log",
        module: true,
        run: kvm_selftests::dirty_log,
    },
    Case {
        name: "kvm_selftest_memslots",
        module: true,
        run: kvm_selftests::memslots,
    },
    Case {
        name: "kvm_selftest_page_tables",
        module: true,
        run: kvm_selftests::page_tables,
    },
    Case {
        name: "libvirt_runs_a_guest_unprivileged",
        module: true,
        run: |_| crate::libvirt::guest(),
    },
    Case {
        name: "daemon_moves_balloons_to_where_pressure_is",
        module: true,
        run: |_| crate::balloons::daemon(),
    },
    Case {
        name: "guest_asks_the_daemon_through_its_agent",
        module: true,
        run: |_| crate::balloons::guest_control(),
    },
];

/// What takes long and finds little that the others do not.
const LONG_CASES: &[Case] = &[
    Case {
        name: "kvm_selftest_memory_regions",
        module: true,
        run: kvm_selftests::regions,
    },
    Case {
        name: "broken_memory_and_the_oom_killer_end_one_guest_each",
        module: true,
        run: harm::ends,
    },
];

/// Those that watch how fast thinramctl's daemon moves balloons.
const OF_THE_DAEMON: [&str; 2] = [
    "libvirt_runs_a_guest_unprivileged",
    "daemon_moves_balloons_to_where_pressure_is",
];

/// Why a case does not run here, if so.
fn why_not(case: &Case, fs: Fs) -> Result<Option<String>> {
    Ok(if case.module && fs != Fs::Thinram {
        Some(format!("needs the module, runs on {fs:?}"))
    } else if OF_THE_DAEMON.contains(&case.name) && is_debug_kernel()? {
        Some("virsh and QMP take longer there than the daemon's 10 s and 3 s".into())
    } else {
        None
    })
}

/// Runs the cases whose name contains `filter`; KTAP on stdout. True if none failed. With more
/// `rounds` than usual those that take long are among them.
pub fn guests(fs: Fs, filter: &str, rounds: u64) -> Result<bool> {
    load(fs)?;
    let long = if rounds > ROUNDS { LONG_CASES } else { &[] };
    let all = CASES.iter().chain(long);
    let cases: Vec<&Case> = all.filter(|c| c.name.contains(filter)).collect();
    println!("KTAP version 1\n1..{}", cases.len() + 1);
    let ctx = Ctx { fs, rounds };
    let mut good = true;
    for (i, case) in cases.iter().enumerate() {
        let n = i + 1;
        if let Some(why) = why_not(case, fs)? {
            println!("ok {n} {} # SKIP {why}", case.name);
            continue;
        }
        let start = Instant::now();
        match (case.run)(&ctx) {
            Ok(()) => println!("ok {n} {}", case.name),
            Err(e) => {
                good = false;
                println!("# {}", format!("{e:#}").replace('\n', " "));
                println!("not ok {n} {}", case.name);
            }
        }
        eprintln!("{} took {} s", case.name, start.elapsed().as_secs());
    }
    let n = cases.len() + 1;
    match unload(fs) {
        Ok(()) => println!("ok {n} module_unloads_after_guests"),
        Err(e) => {
            good = false;
            println!("# {e:#}\nnot ok {n} module_unloads_after_guests");
        }
    }
    Ok(good)
}

/// Lets a guest boot, work for some passes, and takes its verdict.
pub fn work(guest: &mut Guest, passes: u64) -> Result<()> {
    guest.wait("boot", BOOT, Guest::booted)?;
    guest.wait("pass", SOON, |g| g.passes() >= passes)?;
    ensure!(
        guest.finish(SOON)?,
        "{} found its memory corrupt: {:?}",
        guest.name,
        guest.lines()
    );
    guest.ended(SOON)?;
    Ok(())
}

fn folder(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount()?;
    let dir = mount.vm("web1")?;
    let mut guest = Guest::start(&Spec::new("web1", Kind::Small, 96, &dir, 32))?;
    work(&mut guest, 3)
}

fn file(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount()?;
    let ram = mount.vm("web1")?.join("ram");
    let mut guest = Guest::start(&Spec::new("web1", Kind::Small, 96, &ram, 32))?;
    guest.wait("boot", BOOT, Guest::booted)?;
    ensure!(
        fs::metadata(&ram)?.len() == 96 << 20,
        "{} is not the guest's size",
        ram.display()
    );
    work(&mut guest, 3)
}

fn two_backends(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount()?;
    let dir = mount.vm("web1")?;
    let mut spec = Spec::new("web1", Kind::SmallPc, 128, &dir, 64);
    let half = |i: u32| {
        format!(
            "memory-backend-file,id=m{i},mem-path={},size=64M,share=on",
            dir.display()
        )
    };
    spec.backends = vec![half(0), half(1)];
    work(&mut Guest::start(&spec)?, 3)
}

fn prealloc(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount()?;
    let dir = mount.vm("web1")?;
    let mut spec = Spec::new("web1", Kind::Small, 96, &dir, 16);
    spec.backends[0] += ",prealloc=on";
    if ctx.fs == Fs::Thinram {
        // Zero pages that merge would hide what was allocated.
        set("run", "0")?;
    }
    let mut guest = Guest::start(&spec)?;
    guest.wait("boot", BOOT, Guest::booted)?;
    let resident = mount.resident_kb("web1")?;
    let run = work(&mut guest, 1);
    if ctx.fs == Fs::Thinram {
        set("run", "1")?;
    }
    ensure!(
        resident >= 96 * 1024,
        "only {resident} kB of 98304 kB are resident"
    );
    run
}

fn dimm(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount()?;
    let dir = mount.vm("web1")?;
    let mut spec = Spec::new("web1", Kind::SmallPc, 96, &dir, 16);
    spec.append = "RUN=\"while [ $(grep -c ^ /proc/iomem) -gt 0 ] && \
                   [ $(sed -n 's/MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo) -lt 180000 ]; \
                   do sleep 1; done; echo guest: grown; guest-load web1 120\""
        .into();
    let mut guest = Guest::start(&spec)?;
    guest.wait("boot", BOOT, Guest::booted)?;
    let path = dir.display().to_string();
    guest.qmp(
        "object-add",
        json!({"qom-type": "memory-backend-file", "id": "d1", "mem-path": path,
               "size": 128 << 20, "share": true}),
    )?;
    guest.qmp(
        "device_add",
        json!({"driver": "pc-dimm", "id": "p1", "memdev": "d1"}),
    )?;
    let grown = |g: &Guest| g.lines().iter().any(|l| l.contains("guest: grown"));
    guest.wait("use of the DIMM", SOON, grown)?;
    work(&mut guest, 2)
}

fn balloon(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount()?;
    let dir = mount.vm("web1")?;
    let mut spec = Spec::new("web1", Kind::Small, 128, &dir, 24);
    spec.backends[0] += ",prealloc=on";
    spec.args = vec!["-device".into(), "virtio-balloon-device".into()];
    let mut guest = Guest::start(&spec)?;
    guest.wait("boot", BOOT, Guest::booted)?;
    guest.wait("pass", SOON, |g| g.passes() >= 1)?;
    let before = mount.resident_kb("web1")?;
    guest.qmp("balloon", json!({"value": 80 << 20}))?;
    let freed = 40 * 1024;
    until("memory from the balloon", SOON, || {
        Ok(mount.resident_kb("web1")? + freed <= before)
    })?;
    guest.qmp("balloon", json!({"value": 128 << 20}))?;
    let passes = guest.passes();
    guest.wait("pass", SOON, |g| g.passes() > passes + 1)?;
    work(&mut guest, 3)
}

fn reporting(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount()?;
    let dir = mount.vm("web1")?;
    let mut spec = Spec::new("web1", Kind::Small, 160, &dir, 24);
    spec.args = vec![
        "-device".into(),
        "virtio-balloon-device,free-page-reporting=on".into(),
    ];
    // Fills 80 MiB of page cache with what does not compress to zero, then lets go of it.
    spec.append = "RUN=\"dd if=/dev/urandom of=/tmp/a bs=1M count=80 2>/dev/null; \
                   echo guest: full; read go; rm /tmp/a; guest-load web1 16\""
        .into();
    let mut guest = Guest::start(&spec)?;
    guest.wait("boot", BOOT, Guest::booted)?;
    guest.wait("full", SOON, |g| {
        g.lines().iter().any(|l| l.contains("guest: full"))
    })?;
    let before = mount.resident_kb("web1")?;
    ensure!(
        before > 80 * 1024,
        "only {before} kB resident though 80 MiB were written"
    );
    guest.type_line("go")?;
    until("memory that the guest reported as free", SOON, || {
        Ok(mount.resident_kb("web1")? + 40 * 1024 <= before)
    })?;
    work(&mut guest, 2)
}

fn direct_disk(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount()?;
    let dir = mount.vm("web1")?;
    let image = Path::new("/run/disk/guest.img");
    fs::File::create(image)?.set_len(64 << 20)?;
    let mut spec = Spec::new("web1", Kind::Small, 96, &dir, 16);
    spec.args = [
        "-drive",
        "if=none,id=d,format=raw,cache=none,aio=io_uring,file=/run/disk/guest.img",
        "-device",
        "virtio-blk-device,drive=d",
    ]
    .map(String::from)
    .to_vec();
    // The same bytes are read back three times past the guest's own cache, into its user space.
    spec.append = "RUN=\"dd if=/dev/urandom of=/tmp/a bs=1M count=16 2>/dev/null; \
                   want=$(md5sum </tmp/a); dd if=/tmp/a of=/dev/vda bs=1M conv=fsync 2>/dev/null; \
                   for i in 1 2 3; do echo 3 >/proc/sys/vm/drop_caches; \
                   got=$(dd if=/dev/vda bs=1M count=16 iflag=direct 2>/dev/null | md5sum); \
                   [ $got = $want ] 2>/dev/null && echo guest: same || echo guest: other $got; \
                   done; guest-load web1 16\""
        .replace("md5sum </tmp/a", "md5sum </tmp/a | cut -c1-32")
        .replace("| md5sum)", "| md5sum | cut -c1-32)");
    let mut guest = Guest::start(&spec)?;
    guest.wait("boot", BOOT, Guest::booted)?;
    let count = |g: &Guest, what: &str| g.lines().iter().filter(|l| l.contains(what)).count();
    guest.wait("disk", SOON, |g| {
        count(g, "guest: same") + count(g, "guest: other") >= 3
    })?;
    ensure!(
        count(&guest, "guest: same") == 3,
        "disk: {:?}",
        guest.lines()
    );
    work(&mut guest, 2)
}

fn killed(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount()?;
    let dir = mount.vm("web1")?;
    let mut guest = Guest::start(&Spec::new("web1", Kind::Small, 96, &dir, 48))?;
    guest.wait("boot", BOOT, Guest::booted)?;
    guest.wait("pass", SOON, |g| g.passes() >= 1)?;
    let before = mount.resident_kb("web1")?;
    ensure!(before > 16 * 1024, "only {before} kB were resident");
    drop(guest);
    until("memory of the killed guest", SOON, || {
        Ok(mount.resident_kb("web1").unwrap_or(0) == 0)
    })
}

fn stock(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount()?;
    let dir = mount.vm("debian")?;
    let mut spec = Spec::new("debian", Kind::Stock, 320, &dir, 32);
    spec.args = vec!["-device".into(), "virtio-balloon-pci".into()];
    work(&mut Guest::start(&spec)?, 2)
}

fn private(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount()?;
    let dir = mount.vm("web1")?;
    let mut spec = Spec::new("web1", Kind::Small, 96, &dir, 16);
    spec.backends[0] = spec.backends[0].replace("share=on", "share=off");
    let mut guest = Guest::start(&spec)?;
    let code = guest.ended(SOON)?;
    ensure!(code != Some(0), "QEMU ran on a private mapping");
    let said = guest.errors();
    ensure!(
        said.contains("Invalid argument"),
        "QEMU's error is another one: {said}"
    );
    let log = sh(&mut Command::new("dmesg"))?;
    ensure!(
        log.contains("share=on"),
        "the kernel's log does not say share=on"
    );
    Ok(())
}

/// Flat out, and with a pass that ends soon.
pub fn fast() -> Result<()> {
    small_pages()?;
    set("scan_cpu_max_percent", "60")?;
    set("scan_period_secs", "5")?;
    set("run", "1")
}

fn pair(mounts: [&Mount; 2]) -> Result<(Guest, Guest)> {
    let mut guests = Vec::new();
    for (mount, name) in mounts.into_iter().zip(["web1", "web2"]) {
        let dir = mount.vm(name)?;
        guests.push(Guest::start(&Spec::new(name, Kind::Small, 96, &dir, 48))?);
    }
    for guest in &mut guests {
        guest.wait("boot", BOOT, Guest::booted)?;
        guest.wait("pass", SOON, |g| g.passes() >= 1)?;
    }
    match (guests.pop(), guests.pop()) {
        (Some(b), Some(a)) => Ok((a, b)),
        _ => bail!("two guests were started"),
    }
}

/// The pages of a load that every guest has: a quarter, in runs of 64 pages.
const SAME_PAGES: u64 = 48 * 256 / 4;

fn merge(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount()?;
    fast()?;
    let (mut a, mut b) = pair([&mount, &mount])?;
    let scans = number("full_scans")?;
    until("three full scans", SOON, || {
        Ok(number("full_scans")? >= scans + 3)
    })?;
    let (sharing, zero) = (number("pages_sharing")?, number("zero_pages")?);
    ensure!(
        sharing >= SAME_PAGES,
        "{sharing} pages are saved by sharing, want {SAME_PAGES}"
    );
    ensure!(
        zero >= 2 * SAME_PAGES * 9 / 10,
        "{zero} zero pages, want {}",
        2 * SAME_PAGES * 9 / 10
    );
    let passes = a.passes();
    a.wait("pass", SOON, |g| g.passes() >= passes + 2)?;
    ensure!(
        number("cow_breaks")? > 0,
        "the guests write to merged pages, yet cow_breaks is 0"
    );
    work(&mut a, 3)?;
    work(&mut b, 3)
}

fn no_domain(ctx: &Ctx) -> Result<()> {
    let one = Mount::new(ctx.fs, "/run/thinram-1", None)?;
    let two = Mount::new(ctx.fs, "/run/thinram-2", None)?;
    fast()?;
    let (mut a, mut b) = pair([&one, &two])?;
    let scans = number("full_scans")?;
    until("three full scans", SOON, || {
        Ok(number("full_scans")? >= scans + 3)
    })?;
    let sharing = number("pages_sharing")?;
    ensure!(
        sharing < SAME_PAGES,
        "{sharing} pages are shared: more than two guests alone can have"
    );
    work(&mut a, 3)?;
    work(&mut b, 3)
}

/// A guest that may hold 4 MiB less than it has: its cold pages are compressed under it.
fn limited(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount()?;
    small_pages()?;
    // The scanner would find the pages of zeroes first.
    set("run", "0")?;
    let dir = mount.vm("web1")?;
    let mut guest = Guest::start(&Spec::new("web1", Kind::Small, 96, &dir, 32))?;
    guest.wait("boot", BOOT, Guest::booted)?;
    guest.wait("pass", SOON, |g| g.passes() >= 1)?;
    let limit = mount.resident_kb("web1")?.saturating_sub(4096);
    set("vms/web1/compress_max_percent", "50")?;
    set("vms/web1/limit_kb", &limit.to_string())?;
    until("the guest to be within its limit", SOON, || {
        Ok(mount.resident_kb("web1")? <= limit)
    })?;
    let passes = guest.passes();
    guest.wait("pass", SOON, |g| g.passes() >= passes + 2)?;
    ensure!(
        number("vms/web1/decompressions")? > 0,
        "the guest reads all of its load, yet decompressions is 0"
    );
    set("vms/web1/limit_kb", "0")?;
    work(&mut guest, passes + 3)?;
    set("run", "1")
}

#[cfg(test)]
mod tests {
    use super::{CASES, LONG_CASES, OF_THE_DAEMON};

    #[test]
    fn what_is_no_case_for_the_debug_kernel_exists() {
        for name in OF_THE_DAEMON {
            assert!(CASES.iter().any(|case| case.name == name), "{name}");
        }
    }

    #[test]
    fn guests_that_the_limits_name_exist() {
        let limits = include_str!("../../../docs/limits.md");
        let rows = limits.lines().filter(|line| line.starts_with("| "));
        let mut named = 0;
        for word in rows.flat_map(|row| row.split("kvm: ").skip(1)) {
            let part = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
            let name = word.split(part).next().unwrap_or("");
            let mut all = CASES.iter().chain(LONG_CASES);
            let exists = all.any(|case| case.name.contains(name));
            assert!(exists && !name.is_empty(), "no guest is named {name:?}");
            named += 1;
        }
        assert!(named > 4);
    }
}
