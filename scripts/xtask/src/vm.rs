// SPDX-License-Identifier: GPL-2.0

//! Runs a shell script as root on a kernel of its own: the stock kernel under QEMU,
//! or User-Mode Linux. Both have the sysroot as their root, so every tool, the
//! checkout and the cache are there. The script's output and the kernel's log come
//! out apart; a verdict needs both.

use crate::env::{cache, output_of_uname, read, src, target, write, Kernel};
use crate::ktap::{self, Test};
use crate::setup;
use crate::step::{last_line, output, run, say, stamp, step, tail, tied, took, Progress};
use anyhow::{bail, Context, Result};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What the machine's own /dev/kvm can do, found by booting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hardware {
    /// Nothing, or it is not there: emulate.
    None,
    /// It boots the stock kernel, but without a /dev/kvm in it.
    Plain,
    /// It boots the stock kernel, which can run guests itself.
    Nested,
}

/// The kernel that a script runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Place {
    /// The stock kernel with /dev/kvm. One CPU where it is emulated: emulated SVM resets guests with two.
    KvmHost,
    /// The same, emulated in any case, with a clock that counts instructions: a nanosecond each. What is
    /// measured there does not depend on what else the machine does.
    KvmCounted,
    /// The stock kernel on two CPUs with a NUMA node each, without guests.
    SmpHost,
    /// User-Mode Linux on one CPU at native speed, the module built in.
    Uml,
    /// The same with a module whose protections can be taken out.
    UmlDebug,
    /// That module on User-Mode Linux with KASAN, lockdep and what else watches a kernel.
    UmlKasan,
    /// The same watching on x86_64, with two CPUs as `smp-host`.
    SmpDebug,
    /// On x86_64 with /dev/kvm, as `kvm-host`.
    KvmDebug,
}

impl Place {
    /// The User-Mode Linux that it is, if it is one.
    pub fn uml(self) -> Option<setup::Uml> {
        match self {
            Place::Uml => Some(setup::Uml::Plain),
            Place::UmlDebug => Some(setup::Uml::Debug),
            Place::UmlKasan => Some(setup::Uml::Kasan),
            Place::KvmHost
            | Place::KvmCounted
            | Place::SmpHost
            | Place::SmpDebug
            | Place::KvmDebug => None,
        }
    }

    /// Two CPUs with a NUMA node each, and no guests.
    fn is_smp(self) -> bool {
        matches!(self, Place::SmpHost | Place::SmpDebug)
    }

    /// The kernel made here, not the stock one.
    fn is_debug(self) -> bool {
        matches!(self, Place::SmpDebug | Place::KvmDebug)
    }
}

/// One run of a script.
#[derive(Clone)]
pub struct Job {
    /// Names the run's folder below `target/runs`.
    pub name: String,
    /// Where it runs.
    pub place: Place,
    /// The shell script.
    pub script: String,
    /// It is killed after this long.
    pub timeout: Duration,
    /// Memory of the machine, in MiB.
    pub memory_mib: u32,
    /// More of the kernel's command line.
    pub append: String,
    /// Show the script's output as it comes.
    pub stream: bool,
    /// A file that is the second disk and outlives the run; else it is a fresh one.
    pub scratch: Option<PathBuf>,
}

impl Job {
    /// The disks, in the order in which the machine sees them: their files in `dir`, unless one is to
    /// stay.
    fn disks(&self, dir: &Path) -> [PathBuf; 2] {
        let scratch = self.scratch.clone();
        [
            dir.join(DISKS[0].0),
            scratch.unwrap_or_else(|| dir.join(DISKS[1].0)),
        ]
    }
}

/// What a run left.
pub struct Outcome {
    /// What the script printed.
    pub output: String,
    /// The kernel's log.
    pub kernel_log: String,
    /// The script's exit status, if it got that far.
    pub exit: Option<i32>,
    /// What the kernel complained of, and time-outs.
    pub problems: Vec<String>,
    /// How long it took.
    pub time: Duration,
    /// The run's folder, with all logs.
    pub dir: PathBuf,
}

impl Outcome {
    /// The run as tests: what its KTAP says, and one for the kernel's log and the end.
    pub fn tests(&self) -> Vec<Test> {
        let mut tests = ktap::parse(&self.output);
        tests.extend(self.health());
        tests
    }

    /// Whether the kernel stayed quiet and the script came to its end.
    pub fn health(&self) -> Vec<Test> {
        let mut why = self.problems.clone();
        match self.exit {
            Some(0) => {}
            Some(code) => why.push(format!("the script ended with status {code}")),
            None => why.push(format!(
                "the script did not end, logs in {}",
                self.dir.display()
            )),
        }
        if why.is_empty() {
            return vec![Test::pass("kernel log is clean, run ended")];
        }
        vec![Test::fail("kernel log is clean, run ended", why.join("; "))]
    }
}

/// On the kernel's command line in [`Place::KvmCounted`].
pub const COUNTED: &str = "thinram.counted=1";

/// The size of the disk that each run gets, mounted at /run/disk.
const DISK_BYTES: u64 = 1 << 30;
/// And of a second one, for cases that make a file system of their own on it.
const SCRATCH_BYTES: u64 = 64 << 20;
/// Their files, in this order.
const DISKS: [(&str, u64); 2] = [("disk.img", DISK_BYTES), ("scratch.img", SCRATCH_BYTES)];

/// Signs of a kernel in trouble.
const BAD: &[&str] = &[
    // The module says so of itself: `bug_once` in rust/sys/report.rs.
    "thinram: bug:",
    "BUG:",
    "WARNING:",
    "Bad rss-counter",
    "Bad page state",
    "Bad page map",
    "Oops",
    "Call Trace",
    "blocked for more than",
    "Kernel panic",
    "general protection fault",
    "KASAN:",
    "possible circular locking",
    "suspicious RCU usage",
    "unreferenced object",
    "self-detected stall",
    // A free page that somebody wrote to (page_poison=1).
    "pagealloc: ",
];

/// What the OOM killer prints for each process that it looks at.
const OOM_TRACE: &str = "Call Trace";
/// A test says so in the log before and after what the OOM killer is meant to do.
pub const OOM_BEGINS: &str = "an OOM kill is expected from here";
pub const OOM_ENDS: &str = "an OOM kill is expected no more";

/// The lines of a kernel log that say something is wrong.
pub fn problems(log: &str) -> Vec<String> {
    let mut oom = false;
    let mut found = Vec::new();
    for line in log.lines() {
        if line.contains(OOM_BEGINS) || line.contains(OOM_ENDS) {
            oom = line.contains(OOM_BEGINS);
        }
        let bad = |b: &&&str| line.contains(**b) && !(oom && **b == OOM_TRACE);
        if BAD.iter().any(|b| bad(&b)) {
            found.push(line.trim().to_string());
        }
    }
    found.truncate(8);
    found
}

fn exit_of(output: &str) -> Option<i32> {
    let line = output
        .lines()
        .rev()
        .find_map(|l| l.trim().strip_prefix("thinram-exit: "))?;
    line.trim().parse().ok()
}

/// The initramfs with which a virtual host reaches the sysroot.
pub fn host_initramfs(k: &Kernel) -> Result<PathBuf> {
    let dest = cache(format!("host-initramfs-{}.cpio", k.abi));
    let init = read(src("scripts/vm/host-initramfs"))?;
    let inputs = format!("{}\n{init}", k.version);
    step(
        "initramfs of the virtual host",
        &stamp("host-initramfs"),
        &inputs,
        || {
            let modules = ["netfs", "9pnet", "9pnet_virtio", "9p"];
            let files = [("init", src("scripts/vm/host-initramfs"))];
            initramfs(k, &dest, &files, &modules)
        },
    )?;
    Ok(dest)
}

/// Builds the guests' side, into `target/guests`: `small.vmlinuz`, `stock.vmlinuz` and the
/// initramfs of each, `small.initrd` and `stock.initrd`; `agent.initrd`, which is the small one with
/// QEMU's guest agent; the selftests of KVM; and the programs that serve guests.
pub fn guests(k: &Kernel) -> Result<PathBuf> {
    setup::stock(k)?;
    crate::kvm_selftests::build(k)?;
    crate::vhost_user::fetch()?;
    let small = setup::guest_kernel(k)?;
    let dir = target("guests");
    fs::create_dir_all(&dir)?;
    let log = target("guests/build.log");
    let mut cargo = tied("cargo");
    cargo.args(["rustc", "--quiet", "--release", "--package", "guest-load"]);
    run(&log, cargo.args(["--", "-C", "target-feature=+crt-static"]))?;
    let load = PathBuf::from(std::env::var("CARGO_TARGET_DIR")?).join("release/guest-load");
    let init = src("scripts/vm/guest-init");
    let files = [("init", init), ("bin/guest-load", load)];
    initramfs(k, &dir.join("small.initrd"), &files, &[])?;
    let modules = ["virtio_balloon", "failover", "net_failover", "virtio_net"];
    initramfs(k, &dir.join("stock.initrd"), &files, &modules)?;
    let agent = setup::unpacked("qemu-guest-agent")?.join("usr/sbin/qemu-ga");
    let libraries = libraries(&agent)?;
    let with_agent: Vec<(&str, PathBuf)> = files
        .into_iter()
        .chain([("bin/qemu-ga", agent)])
        .chain(
            libraries
                .iter()
                .map(|at| (at.trim_start_matches('/'), at.into())),
        )
        .collect();
    initramfs(k, &dir.join("agent.initrd"), &with_agent, &[])?;
    for (name, from) in [("small", small), ("stock", k.vmlinuz())] {
        let to = dir.join(format!("{name}.vmlinuz"));
        // Replaced at once: a guest of another run may be about to read it.
        let new = dir.join(format!("{name}.new"));
        fs::copy(&from, &new).with_context(|| format!("{}", from.display()))?;
        fs::rename(&new, &to)?;
    }
    Ok(dir)
}

/// The shared libraries that a program needs, by their paths.
pub fn libraries(program: &Path) -> Result<Vec<String>> {
    let text = output(Command::new("ldd").arg(program))?;
    let mut found = Vec::new();
    for line in text.lines() {
        if line.contains("not found") {
            bail!("{}: {}", program.display(), line.trim());
        }
        found.extend(line.split_whitespace().find(|word| word.starts_with('/')));
    }
    Ok(found.into_iter().map(str::to_string).collect())
}

/// Makes an initramfs of busybox, the files given (name, source) and modules of the stock kernel.
pub fn initramfs(
    k: &Kernel,
    dest: &Path,
    files: &[(&str, PathBuf)],
    modules: &[&str],
) -> Result<()> {
    let log = cache("logs/initramfs.log");
    let dir = dest.with_extension("tmp");
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    for d in ["bin", "proc", "sys", "dev", "root", "tmp"] {
        fs::create_dir_all(dir.join(d))?;
    }
    fs::copy("/bin/busybox", dir.join("bin/busybox"))?;
    for (name, from) in files {
        let to = dir.join(name);
        fs::create_dir_all(to.parent().unwrap_or(&dir))?;
        fs::copy(from, &to).with_context(|| format!("{}", from.display()))?;
        run(&log, tied("chmod").arg("755").arg(&to))?;
    }
    for name in modules {
        let mut find = Command::new("modinfo");
        find.arg("-b")
            .arg(k.stock().join("usr"))
            .args(["-k", &k.abi, "-F", "filename", name]);
        let from = PathBuf::from(output(&mut find)?);
        let to = dir.join(format!("{name}.ko"));
        match from.extension().and_then(|e| e.to_str()) {
            Some("xz") => {
                let out = fs::File::create(&to)?;
                let status = tied("xz").arg("-dc").arg(&from).stdout(out).status()?;
                if !status.success() {
                    bail!("xz -dc {}: {status}", from.display());
                }
            }
            _ => {
                fs::copy(&from, &to).with_context(|| format!("{}", from.display()))?;
            }
        }
    }
    let tmp = dest.with_extension("new");
    let pack = "find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0 >\"$0\"";
    run(
        &log,
        tied("sh").args(["-c", pack]).arg(&tmp).current_dir(&dir),
    )?;
    fs::remove_dir_all(&dir)?;
    fs::rename(&tmp, dest).with_context(|| format!("{}", dest.display()))
}

fn qemu(k: &Kernel, job: &Job, dir: &Path, hardware: Hardware) -> Result<Command> {
    let mut c = tied("qemu-system-x86_64");
    c.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    let counted = job.place == Place::KvmCounted;
    let nested = !job.place.is_smp();
    let native = match hardware {
        _ if counted => false,
        Hardware::None => false,
        Hardware::Plain => !nested,
        Hardware::Nested => true,
    };
    if native {
        c.args(["-machine", "q35,accel=kvm", "-cpu", "host"]);
    } else if nested {
        let thread = if counted { "single" } else { "multi" };
        c.args(["-machine", "q35", "-accel", &format!("tcg,thread={thread}")]);
        if counted {
            c.args(["-icount", "shift=0"]);
        }
        c.args(["-cpu", "EPYC,+svm,+npt,+x2apic"]);
    } else {
        c.args(["-machine", "q35", "-accel", "tcg,thread=multi"]);
        c.args(["-cpu", "EPYC,+x2apic"]);
    }
    c.args(["-m", &format!("{}M", job.memory_mib)]);
    if job.place.is_smp() {
        // An IOMMU, and a device that nobody needs: for VFIO.
        c.args(["-device", "intel-iommu", "-device", "edu"]);
        // A NUMA node for each CPU: two sockets, or the kernel warns of a cache over nodes.
        c.args(["-smp", "2,sockets=2"]);
        let half = job.memory_mib / 2;
        for (node, mib) in [half, job.memory_mib - half].into_iter().enumerate() {
            let memory = format!("memory-backend-ram,id=n{node},size={mib}M");
            let numa = format!("node,nodeid={node},cpus={node},memdev=n{node}");
            c.args(["-object", &memory, "-numa", &numa]);
        }
    } else {
        c.args(["-smp", if native { "2" } else { "1" }]);
    }
    let root = if job.place.is_debug() {
        // It has what the stock kernel gets from an initramfs. Checks of slabs (F) leave each CPU without
        // its list of free objects, in which kmemleak sees pointers to what was handed out long ago.
        // KVM is built in and takes the TSC's rate before that is refined: with one that is no longer the
        // host's, timers of guests come minutes late. So the first one is kept.
        c.arg("-kernel").arg(setup::debug_image(k));
        "root=root rootfstype=9p rootflags=trans=virtio,version=9p2000.L,msize=512000,cache=mmap \
         rw init=/src/scripts/vm/init slab_debug=F page_poison=1 setcpuid=tsc_known_freq"
    } else {
        c.arg("-kernel").arg(k.vmlinuz());
        c.arg("-initrd").arg(host_initramfs(k)?);
        ""
    };
    // The root stays reachable while devices are suspended: its driver cannot start anew.
    c.args([
        "-fsdev",
        "local,id=root,path=/,security_model=none,multidevs=remap",
        "-device",
        "pcie-root-port,id=rootport,chassis=1",
        "-device",
        "virtio-9p-pci,bus=rootport,fsdev=root,mount_tag=root,x-pcie-pm-no-soft-reset=on",
    ]);
    c.args([
        "-object",
        "rng-random,id=rng,filename=/dev/urandom",
        "-device",
        "virtio-rng-pci,rng=rng",
    ]);
    for disk in job.disks(dir) {
        c.arg("-drive").arg(format!(
            "if=virtio,format=raw,cache=unsafe,file={}",
            disk.display()
        ));
    }
    let out = dir.join("output.log");
    c.args([
        "-serial",
        &format!("file:{}", dir.join("kernel.log").display()),
    ]);
    if job.append.contains("thinram.shell=1") {
        c.args(["-serial", "mon:stdio"]);
    } else {
        c.args(["-serial", &format!("file:{}", out.display())]);
    }
    // An emulated timer that comes late on a busy machine is no reason to stop at.
    c.arg("-append").arg(format!(
        "console=ttyS0 panic=-1 panic_on_warn=1 oops=panic no_timer_check loglevel=6 thinram.dir={} \
         thinram.out=/dev/ttyS1 {root} {} {}",
        dir.display(),
        if counted { COUNTED } else { "" },
        job.append
    ));
    Ok(c)
}

fn uml(linux: &Path, job: &Job, dir: &Path) -> Command {
    let mut c = tied(linux);
    let [disk, scratch] = job.disks(dir);
    // One CPU: a TLB flush on UML only takes effect when the process next enters the kernel, so with
    // two a process goes on writing to a page that was taken from it.
    c.arg(match job.place {
        // Built by clang, it kills its first process under seccomp: it gets ptrace, which is slower.
        Place::UmlKasan => "seccomp=off",
        _ => "seccomp=on",
    });
    c.args([
        &format!("mem={}M", job.memory_mib),
        "ncpus=1",
        "rootfstype=hostfs",
        "rootflags=/",
        "rw",
        "init=/src/scripts/vm/init",
        "con=null",
        "ssl=null",
        "panic=-1",
        "panic_on_warn=1",
        &format!("ubd0={}", disk.display()),
        &format!("ubd1={}", scratch.display()),
        &format!("thinram.dir={}", dir.display()),
    ]);
    if job.place == Place::UmlKasan {
        c.arg("page_poison=1");
    }
    if job.append.contains("thinram.shell=1") {
        c.args(["con0=fd:0,fd:1", "thinram.out=/dev/tty0"]);
    } else {
        c.args([
            "con0=null,fd:1",
            &format!("thinram.out={}", dir.join("output.log").display()),
        ]);
    }
    c.args(job.append.split_whitespace());
    c
}

fn start(k: &Kernel, job: &Job, hardware: Hardware) -> Result<(Command, PathBuf)> {
    let dir = target("runs").join(&job.name);
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    write(dir.join("job"), &job.script)?;
    write(dir.join("output.log"), "")?;
    write(dir.join("kernel.log"), "")?;
    // Sparse: only what the run writes takes room.
    for (disk, (_, bytes)) in job.disks(&dir).iter().zip(DISKS) {
        let mut options = fs::File::options();
        options.write(true).create(true).truncate(false);
        options.open(disk)?.set_len(bytes)?;
    }
    let cmd = match job.place.uml() {
        Some(kind) => uml(&kind.image(), job, &dir),
        None => {
            setup::stock(k)?;
            qemu(k, job, &dir, hardware)?
        }
    };
    Ok((cmd, dir))
}

/// Runs the job to its end, showing its last line meanwhile.
pub fn execute(k: &Kernel, job: &Job) -> Result<Outcome> {
    let hardware = match job.place.uml() {
        Some(_) => Hardware::None,
        None => hardware(k)?,
    };
    execute_on(k, job, hardware)
}

fn execute_on(k: &Kernel, job: &Job, hardware: Hardware) -> Result<Outcome> {
    let (mut cmd, dir) = start(k, job, hardware)?;
    let host_log = dir.join("host.log");
    let host = fs::File::create(&host_log)?;
    let stdout = match job.place.uml() {
        Some(_) => fs::File::create(dir.join("kernel.log"))?,
        None => host.try_clone()?,
    };
    cmd.stdin(Stdio::null()).stdout(stdout).stderr(host);
    let begin = Instant::now();
    let mut child = cmd.spawn().with_context(|| format!("{cmd:?}"))?;
    let (out, log) = (dir.join("output.log"), dir.join("kernel.log"));
    let mut progress = Progress::new();
    let mut stream = Stream::new(job.stream.then_some(out.as_path()));
    let mut ended: Option<Instant> = None;
    let mut problems = Vec::new();
    loop {
        if child.try_wait()?.is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
        if job.stream {
            stream.pass_on();
        } else {
            progress.tick(|| {
                let line = last_line(&out);
                let line = if line.is_empty() {
                    last_line(&log)
                } else {
                    line
                };
                format!("{}: {line}", job.name)
            });
        }
        if ended.is_none() && exit_of(&last_line(&out)).is_some() {
            ended = Some(Instant::now());
        }
        if ended.is_some_and(|t| t.elapsed() > Duration::from_secs(20)) {
            problems.push("did not power off".to_string());
            kill(&mut child);
        }
        if fs::read_to_string(&host_log).is_ok_and(|t| t.contains("KVM internal error")) {
            problems.push("QEMU: KVM internal error".to_string());
            kill(&mut child);
        }
        if begin.elapsed() > job.timeout {
            problems.push(format!("timed out after {}", took(job.timeout)));
            kill(&mut child);
        }
    }
    progress.end();
    stream.pass_on();
    for (disk, _) in DISKS {
        // One that outlives the run lies elsewhere.
        let disk = dir.join(disk);
        if disk.exists() {
            fs::remove_file(disk)?;
        }
    }
    let lossy = |p: &Path| String::from_utf8_lossy(&fs::read(p).unwrap_or_default()).into_owned();
    let (output, kernel_log) = (lossy(&out), lossy(&log));
    problems.extend(self::problems(&kernel_log));
    let exit = exit_of(&output);
    if exit.is_none() {
        let said = tail(&host_log, 3);
        if !said.is_empty() {
            problems.push(said);
        }
    }
    Ok(Outcome {
        output,
        kernel_log,
        exit,
        problems,
        time: begin.elapsed(),
        dir,
    })
}

/// Passes on what is appended to a file, by whole lines.
struct Stream {
    file: Option<fs::File>,
    partial: Vec<u8>,
}

impl Stream {
    fn new(path: Option<&Path>) -> Self {
        Self {
            file: path.and_then(|p| fs::File::open(p).ok()),
            partial: Vec::new(),
        }
    }

    fn pass_on(&mut self) {
        let Some(file) = &mut self.file else { return };
        if file.read_to_end(&mut self.partial).is_err() {
            return;
        }
        let Some(end) = self.partial.iter().rposition(|b| *b == b'\n') else {
            return;
        };
        let rest = self.partial.split_off(end + 1);
        let text = std::mem::replace(&mut self.partial, rest);
        for line in String::from_utf8_lossy(&text).lines() {
            if !line.starts_with("thinram-exit: ") {
                println!("{line}");
            }
        }
    }
}

fn kill(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// A shell in the place, on this terminal.
pub fn shell(k: &Kernel, place: Place, script: &str, memory_mib: u32) -> Result<()> {
    let job = Job {
        name: "shell".into(),
        place,
        script: format!("#!/bin/sh\n{script}\nexec bash -i\n"),
        timeout: Duration::MAX,
        memory_mib,
        append: "thinram.shell=1".into(),
        stream: false,
        scratch: None,
    };
    let hardware = match place.uml() {
        Some(_) => Hardware::None,
        None => hardware(k)?,
    };
    let (mut cmd, dir) = start(k, &job, hardware)?;
    run(
        dir.join("host.log"),
        tied("chmod").arg("755").arg(dir.join("job")),
    )?;
    say("`exit` ends it; in QEMU Ctrl-A X kills it");
    let status = cmd.status()?;
    if !status.success() {
        bail!("{status}");
    }
    Ok(())
}

/// Finds out, once for each kernel and QEMU, what /dev/kvm of this machine can do.
///
/// Some sandboxes offer a /dev/kvm that cannot run a stock kernel, or does so without
/// nesting: only a boot tells.
pub fn hardware(k: &Kernel) -> Result<Hardware> {
    if !Path::new("/dev/kvm").exists() {
        return Ok(Hardware::None);
    }
    let verdict = cache("probe-kvm");
    let qemu = output(Command::new("qemu-system-x86_64").arg("--version"))?;
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus
        .lines()
        .find(|l| l.starts_with("model name"))
        .unwrap_or("");
    let inputs = format!("{} {} {qemu} {model}", k.version, output_of_uname()?);
    step(
        "probe of /dev/kvm by a boot (up to 40 s)",
        &stamp("probe-kvm"),
        &inputs,
        || {
            let job = Job {
            name: "probe-kvm".into(),
            place: Place::KvmHost,
            script: "modprobe -d /cache/STOCK/usr kvm_amd || modprobe -d /cache/STOCK/usr kvm_intel\n\
                     [ -c /dev/kvm ] && echo nested\nexit 0\n"
                .replace("STOCK", &format!("stock-{}", k.abi)),
            timeout: Duration::from_secs(40),
            memory_mib: 1024,
            append: String::new(),
            stream: false,
            scratch: None,
        };
            let run = execute_on(k, &job, Hardware::Nested)?;
            let found = match (run.exit, run.output.lines().any(|l| l.trim() == "nested")) {
                (Some(0), true) => "nested",
                (Some(0), false) => "plain",
                _ => "none",
            };
            write(&verdict, found)
        },
    )?;
    Ok(match read(&verdict)?.as_str() {
        "nested" => Hardware::Nested,
        "plain" => Hardware::Plain,
        _ => Hardware::None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(exit: Option<i32>, log: &str) -> Outcome {
        Outcome {
            output: "1..1\nok 1 a\n".into(),
            kernel_log: log.into(),
            exit,
            problems: problems(log),
            time: Duration::ZERO,
            dir: PathBuf::new(),
        }
    }

    #[test]
    fn a_quiet_run_passes() {
        let tests = outcome(Some(0), "[    0.1] Linux version\n").tests();
        assert!(
            tests.iter().all(|t| t.outcome == ktap::Outcome::Pass),
            "{tests:?}"
        );
        assert_eq!(tests.len(), 2);
    }

    #[test]
    fn a_kernel_complaint_fails_a_run_that_says_ok() {
        for bad in [
            "WARNING: CPU: 0",
            "BUG: Bad rss-counter state",
            "Oops: general",
            "[    2.3] thinram: bug: page counts are off",
        ] {
            let tests = outcome(Some(0), bad).tests();
            assert!(
                tests
                    .iter()
                    .any(|t| matches!(t.outcome, ktap::Outcome::Fail(_))),
                "{bad}"
            );
        }
    }

    #[test]
    fn only_an_expected_oom_kill_may_show_a_trace() {
        let between = |what: &str| format!("{OOM_BEGINS}\n{what}\n{OOM_ENDS}\n");
        assert_eq!(problems(&between("Call Trace:")), [""; 0]);
        for log in [
            "Call Trace:".to_string(),
            between("BUG: Bad page state"),
            between("") + "Call Trace:",
        ] {
            assert_eq!(problems(&log).len(), 1, "{log}");
        }
    }

    #[test]
    fn no_end_or_a_bad_one_fails() {
        for exit in [None, Some(1)] {
            let tests = outcome(exit, "").tests();
            assert!(tests
                .iter()
                .any(|t| matches!(t.outcome, ktap::Outcome::Fail(_))));
        }
    }

    #[test]
    fn the_exit_status_is_read_from_the_last_line() {
        assert_eq!(exit_of("x\nthinram-exit: 3\r\n"), Some(3));
        assert_eq!(exit_of("x\n"), None);
    }
}
