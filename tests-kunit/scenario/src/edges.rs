// SPDX-License-Identifier: GPL-2.0

//! Files where ThinRAM is otherwise than tmpfs: rows of docs/limits.md.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{kill, Signal};
use nix::sys::stat::{makedev, mknod, Mode, SFlag};

use crate::check::{bytes_are, eq, fails, that};
use crate::content::{page_bytes, pages_bytes};
use crate::ctx::{Ctx, Guest};
use crate::harness::Case;
use crate::names::new_file;
use crate::sys::{self, Map, PAGE, RW};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::thinram(
        "fs/size-percent",
        "size= in percent and nr_inodes=: EINVAL",
        size_percent,
    ),
    Case::thinram(
        "fs/keep-size",
        "fallocate with KEEP_SIZE stops at the end of the file",
        keep_size,
    ),
    Case::thinram(
        "fs/exchange",
        "RENAME_EXCHANGE and WHITEOUT: EINVAL, both files stay",
        exchange,
    ),
    Case::thinram(
        "fs/rename-root",
        "a file in the root onto another: EEXIST, both VMs stay",
        rename_root,
    ),
    Case::thinram(
        "fs/tmpfile-root",
        "O_TMPFILE in the root makes a VM `#N`",
        tmpfile_root,
    ),
    Case::thinram(
        "fs/special-nodes",
        "device nodes, FIFOs and sockets: EPERM",
        special_nodes,
    ),
    Case::both(
        "fs/end-with-name",
        "a file with a name keeps its memory after its process",
        end_with_name,
    ),
    Case::both(
        "fs/detach",
        "umount -l under a mapping: the memory stays until its end",
        detach,
    ),
    Case::both(
        "fs/exec",
        "a program on it does not start: EACCES, also for root",
        exec,
    ),
];

fn exec(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M")?;
    let path = mount.mkdir("web")?.join("program");
    let program = fs::read(std::env::current_exe()?)?;
    fs::write(&path, &program).context("copy a program")?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    let run = Command::new(&path)
        .arg("list")
        .stdout(Stdio::null())
        .status();
    if ctx.is_thinram() {
        fails("execve", run, Errno::EACCES)?;
        // It is a file as any other.
        return bytes_are("the file", &fs::read(&path)?, &program);
    }
    that("the program runs", run?.success())
}

fn size_percent(ctx: &Ctx) -> Result<()> {
    for options in ["size=50%", "nr_inodes=10", "nr_blocks=10", "huge=always"] {
        let mounted = ctx.try_mount("m", options)?.map(drop);
        fails(options, mounted, Errno::EINVAL)?;
    }
    ctx.mount("m", "size=1M").map(drop)
}

fn keep_size(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 4)?;
    let keep = libc::FALLOC_FL_KEEP_SIZE;
    let page = PAGE as i64;
    sys::fallocate(&file, keep, 0, 16 * page).context("KEEP_SIZE over the end")?;
    eq("length", file.metadata()?.len(), 4 * PAGE as u64)?;
    ctx.expect_used("up to the end", &mount, "web", 16)?;
    sys::fallocate(&file, keep, 8 * page, 8 * page).context("KEEP_SIZE beyond the end")?;
    eq("length", file.metadata()?.len(), 4 * PAGE as u64)?;
    ctx.expect_used("beyond the end", &mount, "web", 16)?;
    // Nothing waits there for the file to grow.
    file.set_len(16 * PAGE as u64)?;
    ctx.expect_used("with a longer file", &mount, "web", 16)?;
    let hole = sys::lseek(&file, 0, libc::SEEK_HOLE)?;
    eq("the first hole", hole, 4 * page)
}

fn exchange(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let (a, b) = (mount.guest("web", 2)?, mount.file("web", "b", 2)?);
    let db = mount.guest("db", 2)?;
    a.fill(0, 2, 1);
    b.write_all_at(&pages_bytes(50, 2), 0)?;
    db.fill(0, 2, 100);
    // In libc for glibc only since lately.
    const RENAME_WHITEOUT: u32 = 4;
    for (what, to) in [
        ("a file of the same VM", mount.at("web/b")),
        ("a file of another VM", db.path.clone()),
    ] {
        for (name, flags) in [
            ("EXCHANGE", libc::RENAME_EXCHANGE),
            ("WHITEOUT", RENAME_WHITEOUT),
        ] {
            let done = sys::rename_with(&a.path, &to, flags);
            fails(format!("{name} with {what}"), done, Errno::EINVAL)?;
        }
    }
    let done = sys::rename_with(&mount.at("web"), &mount.at("db"), libc::RENAME_EXCHANGE);
    fails("EXCHANGE of two VMs", done, Errno::EINVAL)?;
    a.holds(0, 2, 1)?;
    db.holds(0, 2, 100)?;
    let mut seen = vec![0; PAGE];
    File::open(mount.at("web/b"))?.read_exact_at(&mut seen, 0)?;
    bytes_are("the other file", &seen, &page_bytes(50))?;
    File::open(&a.path)?.read_exact_at(&mut seen, 0)?;
    bytes_are("the first file by its name", &seen, &page_bytes(1))
}

/// A mapped file in the root: a VM of its own.
fn root_guest(mount: &crate::ctx::Mount<'_>, name: &str, pages: usize) -> Result<Guest> {
    let path = mount.at(name);
    let file = new_file(&path).with_context(|| format!("create {name} in the root"))?;
    file.set_len((pages * PAGE) as u64)?;
    let map = Map::shared(&file, 0, pages * PAGE, RW)?;
    Ok(Guest {
        name: name.to_owned(),
        path,
        file,
        map,
    })
}

fn rename_root(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let (a, b) = (root_guest(&mount, "a", 2)?, root_guest(&mount, "b", 2)?);
    a.fill(0, 2, 1);
    b.fill(0, 2, 50);
    fails("a onto b", fs::rename(&a.path, &b.path), Errno::EEXIST)?;
    a.holds(0, 2, 1)?;
    b.holds(0, 2, 50)?;
    eq("VMs", ctx.sys().vms()?, vec!["a".to_owned(), "b".into()])?;
    for name in ["a", "b"] {
        ctx.expect_used("after the refusal", &mount, name, 8)?;
        that(format!("{name} has its name"), mount.at(name).is_file())?;
    }
    // To a name that is free it goes, and takes the VM's name along.
    fs::rename(&a.path, mount.at("c")).context("a to a name that is free")?;
    eq("VMs", ctx.sys().vms()?, vec!["b".to_owned(), "c".into()])?;
    ctx.expect_used("after the rename", &mount, "c", 8)?;
    a.holds(0, 2, 1)
}

fn tmpfile_root(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let open = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .open(&mount.path)
            .context("open the root with O_TMPFILE")
    };
    let (one, two) = (open()?, open()?);
    one.set_len(4 * PAGE as u64)?;
    one.write_all_at(&pages_bytes(1, 4), 0)?;
    two.set_len(2 * PAGE as u64)?;
    eq("names in the root", fs::read_dir(&mount.path)?.count(), 0)?;
    let sys = ctx.sys();
    let names = sys.vms()?;
    eq(format!("VMs ({names:?})"), names.len(), 2)?;
    for name in &names {
        let number = name.strip_prefix('#').unwrap_or("");
        let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
        that(format!("{name:?} is `#` and a number"), digits)?;
    }
    let mut sizes = Vec::new();
    for name in &names {
        sizes.push(sys.vm(name).get("size_kb")?);
    }
    sizes.sort_unstable();
    eq("sizes", sizes, vec![8, 16])?;
    drop(one);
    drop(two);
    ctx.until("no VM", 5.0, || {
        let left = sys.vms()?;
        Ok((left.is_empty(), format!("{left:?}")))
    })
}

fn special_nodes(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    mount.mkdir("web")?;
    let mode = Mode::from_bits_truncate(0o600);
    for dir in ["", "web"] {
        let at = mount.at(dir).join("node");
        for (what, kind) in [
            ("a character device", SFlag::S_IFCHR),
            ("a block device", SFlag::S_IFBLK),
            ("a FIFO", SFlag::S_IFIFO),
        ] {
            let made = mknod(&at, kind, mode, makedev(1, 3));
            fails(format!("{what} in {dir:?}"), made, Errno::EPERM)?;
        }
        let bound = UnixListener::bind(&at);
        fails(format!("a socket in {dir:?}"), bound, Errno::EPERM)?;
        that("nothing was made", !at.exists())?;
    }
    eq("VMs", ctx.sys().vms()?, Vec::<String>::new())
}

fn end_with_name(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 64)?;
    let ready = Map::anonymous(PAGE)?;
    let mut child = sys::fork(|| {
        let map = Map::shared(&file, 0, 64 * PAGE, RW)?;
        for page in 0..64 {
            map.write_page(page, &crate::content::page(page as u64));
        }
        ready.set(0, 0, 1);
        loop {
            std::thread::sleep(std::time::Duration::from_secs(1));
        }
    })?;
    drop(file);
    ctx.until("the child's pages", 10.0, || {
        Ok((ready.get(0, 0) == 1, "none".into()))
    })?;
    ctx.expect_used("while it runs", &mount, "web", 256)?;
    kill(child.pid(), Signal::SIGKILL)?;
    child.expect_signal(Signal::SIGKILL, ctx.limit(10.0))?;
    ctx.expect_used("after its end", &mount, "web", 256)?;
    let path = mount.at("web/ram");
    let mut seen = vec![0; 64 * PAGE];
    File::open(&path)?.read_exact_at(&mut seen, 0)?;
    bytes_are("the file after its end", &seen, &pages_bytes(0, 64))?;
    fs::remove_file(&path)?;
    if ctx.is_thinram() {
        return eq("VMs", ctx.sys().vms()?, Vec::<String>::new());
    }
    ctx.expect_used("without a name", &mount, "web", 0)
}

fn detach(ctx: &Ctx) -> Result<()> {
    let mut mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 16)?;
    guest.fill(0, 8, 1);
    fails("umount", mount.unmount(), Errno::EBUSY)?;
    mount.detach().context("umount -l")?;
    eq(
        "names at the mount point",
        fs::read_dir(&mount.path)?.count(),
        0,
    )?;
    guest.holds(0, 8, 1)?;
    guest.fill(8, 16, 1);
    sys::punch(&guest.file, 0, 4 * PAGE as u64)?;
    guest.is_zero(0, 4)?;
    if ctx.is_thinram() {
        let vm = guest.sysfs(ctx);
        eq("resident_kb while detached", vm.get("resident_kb")?, 48)?;
        // The name is taken until the last inode is gone.
        let other = ctx.mount("other", "size=16M")?;
        let dir = other.at("web");
        let made = fs::create_dir(&dir).and_then(|()| new_file(&dir.join("ram")).map(drop));
        fails("the same VM on another mount", made, Errno::EEXIST)?;
    }
    guest.holds(4, 16, 1)?;
    drop(guest);
    if ctx.is_thinram() {
        ctx.until_no_vm()?;
    }
    // What stands there now is an empty directory: a new mount takes its place.
    ctx.mount("m", "size=16M").map(drop)
}
