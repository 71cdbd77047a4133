// SPDX-License-Identifier: GPL-2.0

//! What a case gets: its directory, mounts, VMs, and patience.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use clap::ValueEnum;
use nix::errno::Errno;
use nix::mount::{mount, umount, umount2, MntFlags, MsFlags};

use crate::check::{self, skip};
use crate::content;
use crate::harness::comment;
use crate::sys::{self, Map, PAGE, RW};
use crate::sysfs::{Sys, Vm};

/// The file system under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Fs {
    /// The module's.
    Thinram,
    /// The kernel's, to try the tests themselves.
    Tmpfs,
}

impl Fs {
    /// The name that mount(2) takes.
    pub fn name(self) -> &'static str {
        match self {
            Fs::Thinram => "thinram",
            Fs::Tmpfs => "tmpfs",
        }
    }
}

/// What the command line says about this machine and run.
#[derive(Debug, Clone)]
pub struct Setup {
    /// File system under test.
    pub fs: Fs,
    /// Directory below which cases mount.
    pub base: PathBuf,
    /// The module's sysfs directory.
    pub sys: PathBuf,
    /// The module's debugfs directory.
    pub debug: PathBuf,
    /// Factor for the length of torture and fuzz cases.
    pub scale: f64,
    /// Factor for every limit on time, for slow machines.
    pub patience: f64,
    /// Seed of everything random.
    pub seed: u64,
    /// How many calls a fuzz case makes, whatever time that takes; by time where it is not given.
    pub calls: Option<u64>,
    /// The module's file, for a second insmod.
    pub ko: Option<PathBuf>,
    /// A directory on a file system that knows O_DIRECT.
    pub disk: Option<PathBuf>,
    /// A block device whose content is nobody's.
    pub scratch: Option<PathBuf>,
}

/// What one case works with.
pub struct Ctx {
    /// The run.
    pub setup: Setup,
    /// The case's own empty directory.
    pub dir: PathBuf,
    unmount_failed: AtomicBool,
}

impl Ctx {
    /// The context of the case whose directory is `dir`.
    pub fn new(setup: Setup, dir: PathBuf) -> Ctx {
        Ctx {
            setup,
            dir,
            unmount_failed: AtomicBool::new(false),
        }
    }

    /// Whether ThinRAM is under test, not tmpfs.
    pub fn is_thinram(&self) -> bool {
        self.setup.fs == Fs::Thinram
    }

    /// The module's sysfs.
    pub fn sys(&self) -> Sys {
        Sys::new(&self.setup.sys)
    }

    /// Brings the module to where every case starts: scanner stopped, no huge pages, no VMs.
    pub fn start_clean(&self) -> Result<()> {
        if !self.is_thinram() {
            return Ok(());
        }
        let sys = self.sys();
        ensure!(
            sys.exists(),
            "{} is missing: is thinram loaded?",
            self.setup.sys.display()
        );
        let left = sys.vms()?;
        ensure!(left.is_empty(), "VMs are left from before: {left:?}");
        sys.set("run", 0)?;
        let forced = self.setup.debug.join("force_state");
        if forced.exists() {
            fs::write(&forced, "none").with_context(|| format!("write {}", forced.display()))?;
        }
        if sys.has("swap_dir") {
            sys.set("swap_dir", "\n")?;
        }
        if sys.has("large_pages") {
            sys.set("large_pages", "never")?;
        }
        Ok(())
    }

    /// Whether a mount of the case could not be taken down.
    pub fn leaked_mount(&self) -> bool {
        self.unmount_failed.load(Ordering::Relaxed)
    }

    /// Whether a fuzz case goes on after `count` calls: to those that were asked for, else until `end`,
    /// and for `least` of them at any rate.
    pub fn more_calls(&self, count: u64, least: u64, end: Instant) -> bool {
        match self.setup.calls {
            Some(calls) => count < calls,
            None => count < least || Instant::now() < end,
        }
    }

    /// What draws all calls again, up to number `call`, that one included.
    pub fn replay(&self, call: u64) -> String {
        format!("--seed {} --calls {}", self.setup.seed, call + 1)
    }

    /// `seconds` on this machine.
    pub fn limit(&self, seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds * self.setup.patience)
    }

    /// How long a case whose work is bounded by time runs, `seconds` at scale 1.
    pub fn span(&self, seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds * self.setup.scale)
    }

    /// Polls `probe` until it says true; it also says what it saw.
    pub fn until(
        &self,
        what: &str,
        seconds: f64,
        mut probe: impl FnMut() -> Result<(bool, String)>,
    ) -> Result<()> {
        let limit = self.limit(seconds);
        let start = Instant::now();
        loop {
            let (done, seen) = probe()?;
            if done {
                return Ok(());
            }
            if start.elapsed() > limit {
                if self.sys().exists() {
                    let second = Duration::from_secs(1);
                    let counting = self.sys().counting(second)?;
                    comment(&format!(
                        "state {}, in a second: {counting}",
                        self.sys().word("state")?
                    ));
                }
                bail!("after {limit:?}: expected {what}, seen {seen}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the counter `name` is at least `least`.
    pub fn until_least(&self, name: &str, least: u64, seconds: f64) -> Result<()> {
        let sys = self.sys();
        self.until(&format!("{name} of at least {least}"), seconds, || {
            let seen = sys.get(name)?;
            Ok((seen >= least, seen.to_string()))
        })
    }

    /// Waits until the counter `name` is exactly `value`.
    pub fn until_is(&self, name: &str, value: u64, seconds: f64) -> Result<()> {
        let sys = self.sys();
        self.until(&format!("{name} of {value}"), seconds, || {
            let seen = sys.get(name)?;
            Ok((seen == value, seen.to_string()))
        })
    }

    /// Waits until the last VM is gone.
    pub fn until_no_vm(&self) -> Result<()> {
        let sys = self.sys();
        self.until("no VM", 60.0, || {
            let left = sys.vms()?;
            Ok((left.is_empty(), format!("{left:?}")))
        })
    }

    /// Lets the scanner make `count` whole passes from now on.
    pub fn passes(&self, count: u64) -> Result<()> {
        // The pass that is under way has seen part of the memory as it was before.
        let now = self.sys().get("full_scans")?;
        self.until_least("full_scans", now + count + 1, 20.0 + count as f64)
    }

    /// Mounts the file system at `name` below the case's directory; `options` are ThinRAM's,
    /// tmpfs is not told the `domain`.
    pub fn mount(&self, name: &str, options: &str) -> Result<Mount<'_>> {
        self.try_mount(name, options)?
            .with_context(|| format!("mount with {options:?}"))
    }

    /// As [`Ctx::mount`], the kernel's refusal in the inner result.
    pub fn try_mount(&self, name: &str, options: &str) -> Result<nix::Result<Mount<'_>>> {
        let path = self.dir.join(name);
        if !path.is_dir() {
            fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        }
        let kept = self.options(options);
        Ok(mount(
            Some("none"),
            &path,
            Some(self.setup.fs.name()),
            MsFlags::empty(),
            Some(&*kept),
        )
        .map(|()| Mount {
            ctx: self,
            path,
            mounted: true,
        }))
    }

    /// The options that the file system under test knows.
    pub fn options(&self, options: &str) -> String {
        let keep = |option: &&str| self.is_thinram() || !option.starts_with("domain=");
        options
            .split(',')
            .filter(keep)
            .collect::<Vec<_>>()
            .join(",")
    }

    /// Memory in KiB that `vm` on `mount` holds: what the VM's `resident_kb` says, on tmpfs what
    /// the whole mount holds.
    pub fn used_kb(&self, mount: &Mount<'_>, vm: &str) -> Result<u64> {
        if self.is_thinram() {
            return self.sys().vm(vm).get("resident_kb");
        }
        let stat = nix::sys::statfs::statfs(&mount.path)?;
        Ok((stat.blocks() - stat.blocks_free()) * (stat.block_size() as u64) / 1024)
    }

    /// [`Ctx::used_kb`] becomes `kb` at once.
    pub fn expect_used(&self, what: &str, mount: &Mount<'_>, vm: &str, kb: u64) -> Result<()> {
        check::eq(
            format!("KiB that {vm} holds {what}"),
            self.used_kb(mount, vm)?,
            kb,
        )
    }
}

/// A mounted instance, taken down when the value goes.
pub struct Mount<'a> {
    ctx: &'a Ctx,
    /// Its root.
    pub path: PathBuf,
    mounted: bool,
}

impl Mount<'_> {
    /// Takes it down now.
    pub fn unmount(&mut self) -> nix::Result<()> {
        umount(&self.path)?;
        self.mounted = false;
        Ok(())
    }

    /// Takes it out of the tree though it is in use (`umount -l`).
    pub fn detach(&mut self) -> nix::Result<()> {
        umount2(&self.path, MntFlags::MNT_DETACH)?;
        self.mounted = false;
        Ok(())
    }

    /// Remounts with `options`.
    pub fn remount(&self, flags: MsFlags, options: &str) -> nix::Result<()> {
        let none: Option<&str> = None;
        mount(
            none,
            &self.path,
            none,
            flags | MsFlags::MS_REMOUNT,
            Some(options),
        )
    }

    /// The path of `name` in it.
    pub fn at(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// Creates the directory `vm`.
    pub fn mkdir(&self, vm: &str) -> Result<PathBuf> {
        let path = self.at(vm);
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&path)
            .with_context(|| format!("mkdir {}", path.display()))?;
        Ok(path)
    }

    /// Creates `file` of `pages` pages in the directory `vm`, which is made where it is missing.
    pub fn file(&self, vm: &str, file: &str, pages: usize) -> Result<File> {
        let path = self.mkdir(vm)?.join(file);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .with_context(|| format!("create {}", path.display()))?;
        file.set_len((pages * PAGE) as u64)
            .with_context(|| format!("set length of {} to {pages} pages", path.display()))?;
        Ok(file)
    }

    /// A VM of one mapped file `ram` of `pages` pages.
    pub fn guest(&self, vm: &str, pages: usize) -> Result<Guest> {
        let file = self.file(vm, "ram", pages)?;
        let map =
            Map::shared(&file, 0, pages * PAGE, RW).with_context(|| format!("map {vm}/ram"))?;
        Ok(Guest {
            name: vm.to_owned(),
            path: self.at(vm).join("ram"),
            file,
            map,
        })
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        if !self.mounted {
            return;
        }
        // What still uses it may be on its way out (a killed child, a kernel thread).
        let start = Instant::now();
        loop {
            match umount(&self.path) {
                Ok(()) => return,
                Err(Errno::EBUSY) if start.elapsed() < self.ctx.limit(10.0) => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(e) => {
                    eprintln!("umount {}: {e}", self.path.display());
                    break;
                }
            }
        }
        self.ctx.unmount_failed.store(true, Ordering::Relaxed);
    }
}

/// A process that stands for a VM: one file, mapped shared.
pub struct Guest {
    /// The VM's name.
    pub name: String,
    /// The file's path.
    pub path: PathBuf,
    /// The file.
    pub file: File,
    /// Its mapping, read and write.
    pub map: Map,
}

impl Guest {
    /// Fills pages `from..to`, page `i` from seed `first + i`.
    pub fn fill(&self, from: usize, to: usize, first: u64) {
        for page in from..to {
            self.map
                .write_page(page, &content::page(first + page as u64));
        }
    }

    /// Pages `from..to` hold what [`Guest::fill`] wrote.
    pub fn holds(&self, from: usize, to: usize, first: u64) -> Result<()> {
        for page in from..to {
            let expected = content::page(first + page as u64);
            let what = format!("{} page {page}", self.name);
            check::page_is(what, &self.map.read_page(page), &expected)?;
        }
        Ok(())
    }

    /// Fills pages `from..to` with what does not compress, each with its own.
    pub fn fill_noise(&self, from: usize, to: usize) {
        for page in from..to {
            self.map.write_page(page, &content::noise(page as u64));
        }
    }

    /// Pages `from..to` hold what [`Guest::fill_noise`] wrote.
    pub fn holds_noise(&self, from: usize, to: usize) -> Result<()> {
        for page in from..to {
            let what = format!("{} page {page}", self.name);
            let expected = content::noise(page as u64);
            check::page_is(what, &self.map.read_page(page), &expected)?;
        }
        Ok(())
    }

    /// Pages `from..to` hold zeroes.
    pub fn is_zero(&self, from: usize, to: usize) -> Result<()> {
        for page in from..to {
            let what = format!("{} page {page}", self.name);
            check::page_is(what, &self.map.read_page(page), &[0; crate::sys::WORDS])?;
        }
        Ok(())
    }

    /// A page of it goes into a pipe and is written to after what happens `meanwhile`: the pipe has to
    /// show that.
    pub fn held_shows_writes(
        &self,
        page: usize,
        meanwhile: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        const SEED: u64 = 987_654;
        let held = Held::page(&self.map, page)?;
        meanwhile()?;
        self.map.write_page(page, &content::page(SEED));
        held.shows(&content::page_bytes(SEED))
    }

    /// Its sysfs directory.
    pub fn sysfs(&self, ctx: &Ctx) -> Vm {
        ctx.sys().vm(&self.name)
    }
}

/// A page of a mapping that a pipe holds, as a pin would.
pub struct Held {
    reader: OwnedFd,
    _writer: OwnedFd,
}

impl Held {
    /// Gives page `page` to a pipe.
    pub fn page(map: &Map, page: usize) -> Result<Held> {
        let (reader, writer) = nix::unistd::pipe()?;
        let put = sys::vmsplice(&writer, map, page * PAGE, PAGE)?;
        check::eq("bytes in the pipe", put, PAGE)?;
        Ok(Held {
            reader,
            _writer: writer,
        })
    }

    /// The page has these bytes now, by the pipe, which lets it go.
    pub fn shows(self, expected: &[u8]) -> Result<()> {
        let mut seen = vec![0; PAGE];
        let got = nix::unistd::read(&self.reader, &mut seen)?;
        check::eq("bytes from the pipe", got, PAGE)?;
        check::bytes_are("what the pipe held", &seen, expected)
    }
}

/// The path of `tool`, or a skip.
pub fn tool(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| skip(format!("no {name} in PATH")))
}
