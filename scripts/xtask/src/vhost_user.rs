// SPDX-License-Identifier: GPL-2.0

//! Guests whose memory other processes use too: a disk that qemu-storage-daemon serves, and a folder
//! that virtiofsd shares. Both map the guest's file and read and write its buffers themselves, while
//! the guest's pages merge, are split, compressed and come back.

use crate::env::{cache, read};
use crate::guest::{Guest, Kind, Spec};
use crate::inside::{number, set, until, work, Ctx, Fs, Mount, BOOT, SOON};
use crate::setup;
use anyhow::{bail, ensure, Context, Result};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The packages of the two programs, and where they lie in them.
const STORAGE: (&str, &str) = ("qemu-utils", "usr/bin/qemu-storage-daemon");
const SHARE: (&str, &str) = ("virtiofsd", "usr/libexec/virtiofsd");

/// Fetches the programs, and sees that the sysroot has the libraries that they need.
pub fn fetch() -> Result<()> {
    for (package, program) in [STORAGE, SHARE] {
        crate::vm::libraries(&setup::unpacked(package)?.join(program))?;
    }
    Ok(())
}

fn program((package, path): (&str, &str)) -> PathBuf {
    cache(format!("package-{package}")).join(path)
}

/// A process that serves a guest. It is killed when dropped.
struct Backend {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Backend {
    /// Starts it, and waits until its socket is there.
    fn start(name: &'static str, program: &Path, args: &[&str], socket: &str) -> Result<Self> {
        let log = PathBuf::from(format!("/run/{name}.log"));
        let _ = fs::remove_file(socket);
        let output = fs::File::create(&log)?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]);
        command.arg(program).args(args);
        command.stdin(Stdio::null()).stdout(output.try_clone()?);
        let child = command.stderr(output).spawn().context(name)?;
        let mut backend = Self { name, child, log };
        until("socket", SOON, || {
            if let Some(status) = backend.child.try_wait()? {
                bail!("{name} ended ({status}): {}", backend.said());
            }
            Ok(Path::new(socket).exists())
        })?;
        Ok(backend)
    }

    /// All that it printed.
    fn said(&self) -> String {
        read(&self.log).unwrap_or_default()
    }

    /// It runs, and has the files below `mount` in its own address space.
    fn maps(&self, mount: &Mount) -> Result<()> {
        let path = format!("/proc/{}/maps", self.child.id());
        let maps = read(&path)?;
        let below = format!("{}/", mount.path.display());
        ensure!(
            maps.lines().any(|l| l.contains(&below)),
            "{} does not map the guest's memory: {maps}",
            self.name
        );
        Ok(())
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Takes a quarter of its memory from the VM while a scanner runs flat out: what is in 2 MiB pages is
/// split, merged and compressed, and comes back where guest or backend touch it.
fn squeeze(mount: &Mount, vm: &str) -> Result<()> {
    if mount.fs == Fs::Tmpfs {
        return Ok(());
    }
    set("scan_cpu_max_percent", "60")?;
    set("scan_period_secs", "5")?;
    set("run", "1")?;
    let limit = mount.resident_kb(vm)? * 3 / 4;
    set(&format!("vms/{vm}/compress_max_percent"), "50")?;
    set(&format!("vms/{vm}/limit_kb"), &limit.to_string())
}

/// Sees that all of that happened, and gives the VM its memory back.
fn release(mount: &Mount, vm: &str) -> Result<()> {
    if mount.fs == Fs::Tmpfs {
        return Ok(());
    }
    for name in ["cow_breaks", "decompressions"] {
        let name = format!("vms/{vm}/{name}");
        ensure!(number(&name)? > 0, "{name} is 0: nothing moved underneath");
    }
    set(&format!("vms/{vm}/limit_kb"), "0")
}

/// How often the guests write and compare.
const ROUNDS: usize = 4;

/// Boots the guest, lets it go, squeezes it while it compares, and takes its verdict.
fn serve(mount: &Mount, spec: &Spec, backend: &Backend) -> Result<()> {
    let served = run(mount, spec, backend);
    served.with_context(|| format!("{} said: {}", backend.name, backend.said()))
}

fn run(mount: &Mount, spec: &Spec, backend: &Backend) -> Result<()> {
    let thinram = mount.fs == Fs::Thinram;
    if thinram {
        set("large_pages", "always")?;
    }
    let splits = || if thinram { number("splits") } else { Ok(0) };
    let before = splits()?;
    let mut guest = Guest::start(spec)?;
    guest.wait("boot", BOOT, Guest::booted)?;
    guest.type_line("go")?;
    guest.wait("pass", SOON, |g| g.passes() >= 1)?;
    squeeze(mount, &spec.name)?;
    let count = |g: &Guest, what: &str| g.lines().iter().filter(|l| l.contains(what)).count();
    guest.wait("comparisons", BOOT, |g| {
        count(g, "guest: same") + count(g, "guest: other") >= ROUNDS
    })?;
    let same = count(&guest, "guest: same");
    ensure!(same == ROUNDS, "read back otherwise: {:?}", guest.lines());
    backend.maps(mount)?;
    ensure!(!thinram || splits()? > before, "no 2 MiB page was split");
    release(mount, &spec.name)?;
    let passes = guest.passes();
    work(&mut guest, passes + 1)
}

/// A disk of qemu-storage-daemon, whose O_DIRECT goes from and to the guest's pages.
pub fn disk(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount()?;
    let image = "/run/disk/served.img";
    fs::File::create(image)?.set_len(64 << 20)?;
    let socket = "/run/storage.sock";
    let file = format!("driver=file,node-name=f,filename={image},cache.direct=on");
    let export = format!("id=e,node-name=f,writable=on,addr.type=unix,addr.path={socket}");
    let export = format!("type=vhost-user-blk,{export}");
    let args = ["--blockdev", &file, "--export", &export];
    let backend = Backend::start("storage", &program(STORAGE), &args, socket)?;
    // A microvm's devices speak the old virtio, which the daemon does not.
    let mut spec = Spec::new("web1", Kind::SmallPc, 96, &mount.vm("web1")?, 16);
    let chardev = format!("socket,id=c,path={socket}");
    let device = "vhost-user-blk-pci,chardev=c";
    spec.args = ["-chardev", &chardev, "-device", device]
        .map(String::from)
        .to_vec();
    // New bytes in each round, read past the guest's own cache, beside a load that checks its own.
    spec.append = format!(
        "RUN=\"read go; (for i in $(seq {ROUNDS}); do \
         dd if=/dev/urandom of=/tmp/a bs=1M count=8 2>/dev/null; \
         dd if=/tmp/a of=/dev/vda bs=1M conv=fsync 2>/dev/null; \
         dd if=/dev/vda of=/tmp/b bs=1M count=8 iflag=direct 2>/dev/null; \
         cmp /tmp/a /tmp/b && echo guest: same || echo guest: other; \
         done) & guest-load web1 16\""
    );
    serve(&mount, &spec, &backend)?;
    // The last of what it wrote is on the host's disk: 8 MiB of noise.
    drop(backend);
    let written = fs::read(image)?;
    let (noise, rest) = written.split_at(8 << 20);
    ensure!(
        noise.chunks(4096).all(|page| page.iter().any(|b| *b != 0)) && rest.iter().all(|b| *b == 0),
        "{image} is not what the guest wrote"
    );
    fs::remove_file(image).context(image)
}

/// A folder that virtiofsd shares: what the host put there, and what the guest writes there.
pub fn folder(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount()?;
    let shared = Path::new("/run/disk/shared");
    fs::create_dir_all(shared)?;
    let mut given = vec![0; 8 << 20];
    fs::File::open("/dev/urandom")?.read_exact(&mut given)?;
    fs::write(shared.join("given"), &given)?;
    let socket = "/run/virtiofsd.sock";
    let at = format!("--socket-path={socket}");
    let dir = format!("--shared-dir={}", shared.display());
    let mut args = vec![at.as_str(), &dir, "--sandbox=none"];
    // The debug kernel has none.
    if !Path::new("/proc/sys/kernel/seccomp").exists() {
        args.push("--seccomp=none");
    }
    let backend = Backend::start("virtiofsd", &program(SHARE), &args, socket)?;
    let mut spec = Spec::new("debian", Kind::Stock, 320, &mount.vm("debian")?, 16);
    let chardev = format!("socket,id=c,path={socket}");
    let device = "vhost-user-fs-pci,chardev=c,tag=shared";
    spec.args = ["-chardev", &chardev, "-device", device]
        .map(String::from)
        .to_vec();
    spec.append = format!(
        "RUN=\"mkdir /s; mount -t virtiofs shared /s; read go; (for i in $(seq {ROUNDS}); do \
         cat /s/given >/s/back-$i; echo 3 >/proc/sys/vm/drop_caches; \
         cmp /s/given /s/back-$i && echo guest: same || echo guest: other; \
         done) & guest-load debian 16\""
    );
    serve(&mount, &spec, &backend)?;
    for round in 1..=ROUNDS {
        let back = shared.join(format!("back-{round}"));
        ensure!(
            fs::read(&back)? == given,
            "{} is not what the host put there",
            back.display()
        );
    }
    drop(backend);
    fs::remove_dir_all(shared).context("/run/disk/shared")
}
