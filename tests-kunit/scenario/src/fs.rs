// SPDX-License-Identifier: GPL-2.0

//! The file system: names, sizes, holes, reads and writes, mounts.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{symlink, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::fcntl::{splice, SpliceFFlags};
use nix::mount::MsFlags;
use nix::sys::signal::Signal;
use nix::sys::stat::{utimensat, UtimensatFlags};
use nix::sys::statfs::fstatfs;
use nix::sys::time::TimeSpec;
use nix::unistd::{chown, Gid, Uid};

use crate::check::{self, bytes_are, eq, fails, fails_any, page_is, skip, that};
use crate::content::{self, page_bytes, pages_bytes};
use crate::ctx::{tool, Ctx};
use crate::harness::Case;
use crate::sys::{self, Map, PAGE, R, RW, WORDS};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::both(
        "fs/create",
        "create, O_EXCL, open, O_TRUNC, stat, missing names",
        create,
    ),
    Case::both(
        "fs/tmpfile",
        "O_TMPFILE has no name, holds data, frees it at close",
        tmpfile,
    ),
    Case::both(
        "fs/unlink-mapped",
        "data outlives unlink until the last unmap",
        unlink_mapped,
    ),
    Case::both(
        "fs/rename-file",
        "rename, RENAME_NOREPLACE, and over a file",
        rename_file,
    ),
    Case::both(
        "fs/rename-dir",
        "renaming a directory renames the VM in sysfs",
        rename_dir,
    ),
    Case::thinram(
        "fs/move-between-vms",
        "a file never changes its VM: EXDEV",
        move_between,
    ),
    Case::both(
        "fs/nested",
        "the VM is the directory that directly holds files",
        nested,
    ),
    Case::thinram(
        "fs/root-file",
        "a file in the root is a VM of its own name",
        root_file,
    ),
    Case::both(
        "fs/readdir",
        "readdir lists everything once, also while it changes",
        readdir,
    ),
    Case::both(
        "fs/rmdir",
        "rmdir of full, empty and missing directories",
        rmdir,
    ),
    Case::both(
        "fs/long-names",
        "names of 255 bytes work, of 256 are refused",
        long_names,
    ),
    Case::thinram(
        "fs/odd-names",
        "odd VM names: usable in sysfs or refused cleanly",
        odd_names,
    ),
    Case::thinram(
        "fs/duplicate-vm",
        "one VM name over all mounts: EEXIST",
        duplicate_vm,
    ),
    Case::thinram(
        "fs/name-taken",
        "a VM's name and sysfs live until its last inode",
        name_taken,
    ),
    Case::both(
        "fs/hard-link",
        "hard links share the data; across VMs EXDEV",
        hard_link,
    ),
    Case::both(
        "fs/symlink",
        "symbolic links lead to the file",
        symbolic_link,
    ),
    Case::both(
        "fs/owner-mode-times",
        "chown, chmod and utimes hold",
        owner_mode_times,
    ),
    Case::both(
        "fs/unprivileged",
        "uid= and gid= let an unprivileged VMM in",
        unprivileged,
    ),
    Case::both(
        "fs/security-xattr",
        "a failing security label is EOPNOTSUPP",
        security_xattr,
    ),
    Case::both(
        "fs/truncate",
        "ftruncate frees at once, growth reads as zero",
        truncate,
    ),
    Case::both(
        "fs/truncate-mapped",
        "touch beyond the end is SIGBUS, no data returns",
        truncate_mapped,
    ),
    Case::both(
        "fs/prealloc",
        "plain fallocate makes memory resident, once",
        prealloc,
    ),
    Case::both(
        "fs/punch",
        "a hole frees memory at once and reads as zero",
        punch,
    ),
    Case::both(
        "fs/punch-unaligned",
        "unaligned ends are zeroed, neighbours stay",
        punch_unaligned,
    ),
    Case::both(
        "fs/punch-mapped",
        "a hole under mappings of two processes",
        punch_mapped,
    ),
    Case::both(
        "fs/fallocate-bad",
        "modes and ranges that are refused",
        fallocate_bad,
    ),
    Case::both("fs/statfs", "statfs knows size= and what is used", statfs),
    Case::both(
        "fs/seek-holes",
        "SEEK_HOLE and SEEK_DATA find what was written",
        seek_holes,
    ),
    Case::both(
        "fs/read-write",
        "pread and pwrite, aligned or not, over pages",
        read_write,
    ),
    Case::both("fs/append", "O_APPEND writes at the end", append),
    Case::both(
        "fs/sparse-read",
        "holes read as zero and stay holes",
        sparse_read,
    ),
    Case::both(
        "fs/bad-buffers",
        "read and write with bad buffers: EFAULT, no change",
        bad_buffers,
    ),
    Case::both("fs/copy", "copy by read/write and by copy_file_range", copy),
    Case::both("fs/cp-dd", "cp and dd copy a file both ways", cp_dd),
    Case::both(
        "fs/sendfile-splice",
        "sendfile and splice out, splice in",
        sendfile_splice,
    ),
    Case::both("fs/fsync", "fsync and fdatasync succeed", fsync),
    Case::both("fs/blocks", "st_blocks counts allocated pages", blocks),
    Case::both(
        "fs/full",
        "beyond size=: an errno, and space comes back",
        full,
    ),
    Case::both("fs/overflow", "offsets and lengths that overflow", overflow),
    Case::both(
        "fs/mount-options",
        "size=, mode=, uid=, gid= take effect",
        mount_options,
    ),
    Case::both(
        "fs/mount-bad",
        "unknown options and bad values: EINVAL",
        mount_bad,
    ),
    Case::thinram(
        "fs/mount-mode",
        "0700 and root unless told otherwise",
        mount_mode,
    ),
    Case::both(
        "fs/mounts",
        "several mounts at once, each with its own files",
        mounts,
    ),
    Case::thinram(
        "fs/domains",
        "a VM's domain is its mount's, else its own",
        domains,
    ),
    Case::both(
        "fs/remount",
        "remount changes size=, and ro and back",
        remount,
    ),
    Case::both(
        "fs/busy",
        "a mount with an open file or mapping: EBUSY",
        busy,
    ),
    Case::thinram(
        "fs/second-insmod",
        "a second insmod is refused",
        second_insmod,
    ),
    Case::thinram(
        "fs/rmmod-mounted",
        "rmmod with a mount is refused",
        rmmod_mounted,
    ),
    Case::both(
        "fs/churn",
        "many files made and removed by two processes",
        churn,
    ),
    Case::thinram(
        "fs/sysfs-vm",
        "a VM's files: sizes, owner_pid, and its end",
        sysfs_vm,
    ),
];

fn new_file(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
}

fn create(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let path = mount.mkdir("web")?.join("ram");
    fails("open of a missing file", File::open(&path), Errno::ENOENT)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o640)
        .open(&path)
        .context("create")?;
    fails("O_EXCL on an existing file", new_file(&path), Errno::EEXIST)?;
    let meta = fs::metadata(&path)?;
    that("the file is regular", meta.is_file())?;
    eq("mode", meta.mode() & 0o7777, 0o640)?;
    eq("links", meta.nlink(), 1)?;
    eq("size", meta.len(), 0)?;
    eq("owner", (meta.uid(), meta.gid()), (0, 0))?;
    eq("block size", meta.blksize() % PAGE as u64, 0)?;
    eq(
        "inode by path and by file",
        meta.ino(),
        file.metadata()?.ino(),
    )?;
    file.write_all_at(&page_bytes(1), 0)?;
    let again = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)?;
    eq(
        "size after an open with O_CREAT",
        again.metadata()?.len(),
        PAGE as u64,
    )?;
    let cut = OpenOptions::new().write(true).truncate(true).open(&path)?;
    eq("size after O_TRUNC", cut.metadata()?.len(), 0)?;
    ctx.expect_used("after O_TRUNC", &mount, "web", 0)?;
    fails(
        "open of a directory for writing",
        File::options().write(true).open(mount.at("web")),
        Errno::EISDIR,
    )?;
    fails(
        "open below a file",
        File::open(path.join("x")),
        Errno::ENOTDIR,
    )?;
    fails("mkdir over a file", fs::create_dir(&path), Errno::EEXIST)?;
    fs::remove_file(&path)?;
    fails("second unlink", fs::remove_file(&path), Errno::ENOENT)
}

fn tmpfile(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let dir = mount.mkdir("web")?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(0o600)
        .open(&dir)
        .context("open with O_TMPFILE")?;
    eq("names in the directory", fs::read_dir(&dir)?.count(), 0)?;
    eq("links", file.metadata()?.nlink(), 0)?;
    file.set_len(4 * PAGE as u64)?;
    let map = Map::shared(&file, 0, 4 * PAGE, RW)?;
    for page in 0..4 {
        map.write_page(page, &content::page(page as u64));
    }
    ctx.expect_used("with the file open", &mount, "web", 16)?;
    drop(file);
    for page in 0..4 {
        page_is(
            "page after close",
            &map.read_page(page),
            &content::page(page as u64),
        )?;
    }
    drop(map);
    if ctx.is_thinram() {
        return gone_from(ctx, "web");
    }
    ctx.expect_used("after the last unmap", &mount, "web", 0)
}

/// A VM whose last file is gone holds nothing, whether its directory keeps it in sysfs or not.
fn gone_from(ctx: &Ctx, vm: &str) -> Result<()> {
    let vm = ctx.sys().vm(vm);
    ctx.until("no memory held by the VM", 5.0, || {
        if !vm.exists() {
            return Ok((true, "no VM".into()));
        }
        let stat = vm.stat()?;
        Ok((stat.get("size_kb")? == 0, format!("{stat:?}")))
    })
}

fn unlink_mapped(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 8)?;
    guest.fill(0, 8, 100);
    ctx.expect_used("after writing", &mount, "web", 32)?;
    fs::remove_file(&guest.path)?;
    guest.holds(0, 8, 100)?;
    ctx.expect_used("after unlink", &mount, "web", 32)?;
    eq("links", guest.file.metadata()?.nlink(), 0)?;
    let crate::ctx::Guest { file, map, .. } = guest;
    drop(file);
    for page in 0..8 {
        let expected = content::page(100 + page as u64);
        page_is("page after close", &map.read_page(page), &expected)?;
    }
    // A new file of the same name is another file.
    let other = new_file(&mount.at("web/ram"))?;
    other.set_len(8 * PAGE as u64)?;
    let mut first = [0xff; 16];
    other.read_exact_at(&mut first, 0)?;
    eq("start of a new file of that name", first, [0; 16])?;
    drop(map);
    drop(other);
    ctx.expect_used("after the last unmap", &mount, "web", 0)
}

fn rename_file(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let a = mount.guest("web", 2)?;
    a.fill(0, 2, 1);
    let new = mount.at("web/new");
    fs::rename(&a.path, &new)?;
    fails("open by the old name", File::open(&a.path), Errno::ENOENT)?;
    a.fill(1, 2, 50);
    let mut seen = vec![0; PAGE];
    File::open(&new)?.read_exact_at(&mut seen, PAGE as u64)?;
    bytes_are("page by the new name", &seen, &page_bytes(51))?;

    let b = mount.file("web", "b", 2)?;
    b.write_all_at(&pages_bytes(9, 2), 0)?;
    let to = mount.at("web/b");
    fails(
        "RENAME_NOREPLACE",
        sys::rename_with(&new, &to, libc::RENAME_NOREPLACE),
        Errno::EEXIST,
    )?;
    drop(b);
    ctx.expect_used("with two files", &mount, "web", 16)?;
    fs::rename(&new, &to).context("rename over a file")?;
    ctx.expect_used("after the rename over one", &mount, "web", 8)?;
    File::open(&to)?.read_exact_at(&mut seen, 0)?;
    bytes_are("page by the replaced name", &seen, &page_bytes(1))?;
    fails(
        "rename of a missing file",
        fs::rename(&new, &to),
        Errno::ENOENT,
    )
}

fn rename_dir(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 4)?;
    guest.fill(0, 4, 7);
    fs::rename(mount.at("web"), mount.at("db")).context("rename of the directory")?;
    guest.holds(0, 4, 7)?;
    let mut seen = vec![0; PAGE];
    File::open(mount.at("db/ram"))?.read_exact_at(&mut seen, 0)?;
    bytes_are("page below the new name", &seen, &page_bytes(7))?;
    ctx.expect_used("after the rename", &mount, "db", 16)?;
    mount.file("other", "ram", 1)?;
    fails(
        "rename over a full one",
        fs::rename(mount.at("db"), mount.at("other")),
        Errno::ENOTEMPTY,
    )?;
    if ctx.is_thinram() {
        let sys = ctx.sys();
        that("vms/web is gone", !sys.vm("web").exists())?;
        eq("size_kb of vms/db", sys.vm("db").get("size_kb")?, 16)?;
        let second = ctx.mount("n", "size=16M")?;
        second.file("taken", "ram", 1)?;
        let to_taken = fs::rename(mount.at("db"), mount.at("taken"));
        fails("rename to a VM of another mount", to_taken, Errno::EEXIST)?;
        that("vms/db is still there", sys.vm("db").exists())?;
        that("the directory kept its name", mount.at("db").is_dir())?;
        guest.holds(0, 4, 7)?;
    }
    // The old name is free again.
    let again = mount.guest("web", 1)?;
    again.fill(0, 1, 3);
    ctx.expect_used(
        "by the new VM",
        &mount,
        "web",
        if ctx.is_thinram() { 4 } else { 20 },
    )
}

fn move_between(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 2)?;
    guest.fill(0, 2, 1);
    mount.mkdir("db")?;
    fails(
        "move to an empty directory",
        fs::rename(&guest.path, mount.at("db/ram")),
        Errno::EXDEV,
    )?;
    mount.file("db", "other", 1)?;
    fails(
        "move to another VM",
        fs::rename(&guest.path, mount.at("db/ram")),
        Errno::EXDEV,
    )?;
    fails(
        "move over a file",
        fs::rename(&guest.path, mount.at("db/other")),
        Errno::EXDEV,
    )?;
    fails(
        "move to the root",
        fs::rename(&guest.path, mount.at("ram")),
        Errno::EXDEV,
    )?;
    that("the file is where it was", guest.path.is_file())?;
    guest.holds(0, 2, 1)?;
    ctx.expect_used("after all that", &mount, "web", 8)?;
    ctx.expect_used("after all that", &mount, "db", 0)
}

fn nested(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    DirBuilder::new()
        .recursive(true)
        .create(mount.at("libvirt/qemu"))?;
    let guest = mount.guest("libvirt/qemu/1-web1", 4)?;
    guest.fill(0, 4, 1);
    let second = mount.file("libvirt/qemu/2-db", "ram", 2)?;
    second.write_all_at(&pages_bytes(30, 2), 0)?;
    guest.holds(0, 4, 1)?;
    if ctx.is_thinram() {
        let sys = ctx.sys();
        eq(
            "size_kb of vms/1-web1",
            sys.vm("1-web1").get("size_kb")?,
            16,
        )?;
        eq("size_kb of vms/2-db", sys.vm("2-db").get("size_kb")?, 8)?;
        ctx.expect_used("by itself", &mount, "1-web1", 16)?;
        ctx.expect_used("by itself", &mount, "2-db", 8)?;
    }
    fails(
        "rmdir of a directory in use",
        fs::remove_dir(mount.at("libvirt/qemu")),
        Errno::ENOTEMPTY,
    )?;
    let links = fs::metadata(mount.at("libvirt/qemu"))?.nlink();
    eq("links of a directory with two below it", links, 4)
}

fn root_file(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let path = mount.at("qemu_back_mem.pc.ram.a1B2c3");
    let file = new_file(&path).context("create in the root")?;
    // QEMU unlinks its file before it sets the length.
    fs::remove_file(&path)?;
    file.set_len(4 * PAGE as u64)?;
    let map = Map::shared(&file, 0, 4 * PAGE, RW)?;
    for page in 0..3 {
        map.write_page(page, &content::page(page as u64));
    }
    let vm = ctx.sys().vm("qemu_back_mem.pc.ram.a1B2c3");
    eq("size_kb", vm.get("size_kb")?, 16)?;
    eq("resident_kb", vm.get("resident_kb")?, 12)?;
    vm.stat()?.check_sum()?;
    drop(map);
    drop(file);
    ctx.until("the VM to leave sysfs", 5.0, || {
        Ok((!vm.exists(), "still there".into()))
    })
}

fn readdir(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let dir = mount.mkdir("web")?;
    let mut expected = Vec::new();
    for i in 0..300 {
        let name = format!("file-{i:03}");
        new_file(&dir.join(&name))?;
        expected.push(name);
    }
    let list = || -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            that("the entry is a file", entry.file_type()?.is_file())?;
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    };
    eq("names", list()?, expected.clone())?;
    // What is neither made nor removed meanwhile is listed exactly once.
    let mut seen = Vec::new();
    for (i, entry) in fs::read_dir(&dir)?.enumerate() {
        seen.push(entry?.file_name().to_string_lossy().into_owned());
        if i < 100 {
            new_file(&dir.join(format!("new-{i}")))?;
            fs::remove_file(dir.join(format!("file-{i:03}"))).or_else(|e| match e.kind() {
                std::io::ErrorKind::NotFound => Ok(()),
                _ => Err(e),
            })?;
        }
    }
    for name in &expected[100..] {
        eq(
            format!("times {name} was listed"),
            seen.iter().filter(|s| *s == name).count(),
            1,
        )?;
    }
    let mut root: Vec<_> = Vec::new();
    for entry in fs::read_dir(&mount.path)? {
        root.push(entry?.file_name());
    }
    eq("names in the root", root, vec!["web".into()])
}

fn rmdir(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    mount.file("web", "ram", 1)?;
    fails(
        "rmdir of a full directory",
        fs::remove_dir(mount.at("web")),
        Errno::ENOTEMPTY,
    )?;
    fails(
        "unlink of a directory",
        fs::remove_file(mount.at("web")),
        Errno::EISDIR,
    )?;
    fails(
        "rmdir of a file",
        fs::remove_dir(mount.at("web/ram")),
        Errno::ENOTDIR,
    )?;
    fails(
        "rmdir of nothing",
        fs::remove_dir(mount.at("none")),
        Errno::ENOENT,
    )?;
    fs::remove_file(mount.at("web/ram"))?;
    fs::remove_dir(mount.at("web")).context("rmdir of an empty directory")?;
    fails(
        "stat of a removed directory",
        fs::metadata(mount.at("web")),
        Errno::ENOENT,
    )?;
    if ctx.is_thinram() {
        let vm = ctx.sys().vm("web");
        ctx.until("vms/web to leave", 5.0, || {
            Ok((!vm.exists(), "still there".into()))
        })?;
    }
    mount.mkdir("web").map(drop)
}

fn long_names(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let dir = mount.mkdir("web")?;
    let longest = "n".repeat(255);
    new_file(&dir.join(&longest)).context("create a file whose name has 255 bytes")?;
    let path = dir.join("n".repeat(256));
    fails("a name of 256 bytes", new_file(&path), Errno::ENAMETOOLONG)?;
    fails(
        "a directory of 256 bytes",
        fs::create_dir(&path),
        Errno::ENAMETOOLONG,
    )?;
    eq(
        "f_namelen",
        fstatfs(File::open(&dir)?)?.maximum_name_length(),
        255,
    )
}

fn odd_names(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let long = "v".repeat(255);
    let names: [&[u8]; 14] = [
        b"with space",
        b"-dash",
        b".hidden",
        b"per%cent%s%n",
        b"quo'te\"s",
        b"back\\slash",
        b"new\nline",
        b"tab\tbed",
        b"\x01control",
        "umlaut-\u{e4}\u{f6}".as_bytes(),
        b"not-utf8-\xff\xfe",
        b"colon:semi;comma,",
        b"!bang",
        long.as_bytes(),
    ];
    for name in names {
        let shown = String::from_utf8_lossy(name).escape_debug().to_string();
        let dir = mount.at(std::ffi::OsStr::from_bytes(name));
        let made = fs::create_dir(&dir).and_then(|()| new_file(&dir.join("ram")));
        match made {
            Ok(file) => {
                file.set_len(PAGE as u64)?;
                file.write_all_at(&page_bytes(1), 0)?;
                let vms = ctx
                    .setup
                    .sys
                    .join("vms")
                    .join(std::ffi::OsStr::from_bytes(name));
                let size = fs::read_to_string(vms.join("size_kb"))
                    .with_context(|| format!("size_kb of the accepted VM {shown:?}"))?;
                eq(format!("size_kb of {shown:?}"), size.trim_end(), "4")?;
                println!("{shown:?}: accepted");
                fs::remove_file(dir.join("ram"))?;
                fs::remove_dir(&dir)?;
            }
            Err(e) => {
                eq(
                    format!("errno for {shown:?}"),
                    check::Code::code(&e),
                    Errno::EINVAL,
                )?;
                println!("{shown:?}: EINVAL");
                if dir.exists() {
                    eq("files in it", fs::read_dir(&dir)?.count(), 0)?;
                    fs::remove_dir(&dir)?;
                }
            }
        }
    }
    eq(
        "directories that are left",
        fs::read_dir(&mount.path)?.count(),
        0,
    )?;
    // Ordinary names are never refused.
    mount.file("1-web1.example.org_A", "pc.ram", 1).map(drop)
}

fn duplicate_vm(ctx: &Ctx) -> Result<()> {
    let one = ctx.mount("one", "size=16M,domain=a")?;
    let two = ctx.mount("two", "size=16M,domain=b")?;
    let guest = one.guest("web", 2)?;
    guest.fill(0, 2, 1);
    let dir = two.at("web");
    let made = fs::create_dir(&dir).and_then(|()| new_file(&dir.join("ram")).map(drop));
    fails("the same VM on a second mount", made, Errno::EEXIST)?;
    that("no file was made", !dir.join("ram").exists())?;
    let deep = one.at("deep");
    let made = fs::create_dir(&deep)
        .and_then(|()| fs::create_dir(deep.join("web")))
        .and_then(|()| new_file(&deep.join("web/ram")).map(drop));
    fails("the same VM deeper on the same mount", made, Errno::EEXIST)?;
    fails(
        "a file in the root of that name",
        new_file(&two.at("web")),
        Errno::EEXIST,
    )
    .or_else(|e| {
        if two.at("web").is_dir() {
            Ok(())
        } else {
            Err(e)
        }
    })?;
    guest.holds(0, 2, 1)?;
    ctx.expect_used("after the refusals", &one, "web", 8)?;
    eq(
        "VMs",
        ctx.sys().vms()?.iter().filter(|vm| *vm == "web").count(),
        1,
    )
}

fn name_taken(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 2)?;
    guest.fill(0, 2, 1);
    fs::remove_file(&guest.path)?;
    fs::remove_dir(mount.at("web"))?;
    let vm = ctx.sys().vm("web");
    eq("resident_kb while it is mapped", vm.get("resident_kb")?, 8)?;
    let dir = mount.at("web");
    let made = fs::create_dir(&dir).and_then(|()| new_file(&dir.join("ram")).map(drop));
    fails("a new VM of that name", made, Errno::EEXIST)?;
    guest.holds(0, 2, 1)?;
    drop(guest);
    ctx.until("vms/web to leave", 5.0, || {
        let files = vm.exists() && vm.get("size_kb").is_ok_and(|kb| kb > 0);
        Ok((!files, "still there".into()))
    })?;
    mount
        .file("web", "ram", 1)
        .context("the name after the last unmap")
        .map(drop)
}

fn hard_link(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 2)?;
    guest.fill(0, 2, 1);
    let second = mount.at("web/second");
    fs::hard_link(&guest.path, &second)?;
    eq("links", guest.file.metadata()?.nlink(), 2)?;
    fs::remove_file(&guest.path)?;
    let mut seen = vec![0; PAGE];
    File::open(&second)?.read_exact_at(&mut seen, 0)?;
    bytes_are("page by the second name", &seen, &page_bytes(1))?;
    eq("links", guest.file.metadata()?.nlink(), 1)?;
    if ctx.is_thinram() {
        // A file has one VM.
        mount.file("db", "ram", 1)?;
        fails(
            "a link in another VM",
            fs::hard_link(&second, mount.at("db/x")),
            Errno::EXDEV,
        )?;
        fails(
            "a link in the root",
            fs::hard_link(&second, mount.at("x")),
            Errno::EXDEV,
        )?;
        ctx.expect_used("after the refusals", &mount, "web", 8)?;
    }
    Ok(())
}

fn symbolic_link(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 2)?;
    guest.fill(0, 2, 1);
    let link = mount.at("web/link");
    let linked = symlink("ram", &link);
    if ctx.is_thinram() {
        // Guest RAM has no use for them (docs/limits.md).
        fails("symbolic link", linked, Errno::EPERM)?;
        return that("no name was made", fs::symlink_metadata(&link).is_err());
    }
    linked?;
    eq("target", fs::read_link(&link)?.as_os_str(), "ram".as_ref())?;
    let mut seen = vec![0; PAGE];
    File::open(&link)?.read_exact_at(&mut seen, 0)?;
    bytes_are("page through the link", &seen, &page_bytes(1))
}

fn owner_mode_times(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let path = mount.at("web/ram");
    let file = mount.file("web", "ram", 1)?;
    for at in [&path, &mount.at("web")] {
        chown(at, Some(Uid::from_raw(64055)), Some(Gid::from_raw(106)))?;
        fs::set_permissions(at, fs::Permissions::from_mode(0o750))?;
        let time = TimeSpec::new(1_000_000_007, 0);
        utimensat(
            nix::fcntl::AT_FDCWD,
            at,
            &time,
            &time,
            UtimensatFlags::FollowSymlink,
        )?;
        let meta = fs::metadata(at)?;
        eq("owner", (meta.uid(), meta.gid()), (64055, 106))?;
        eq("mode", meta.mode() & 0o7777, 0o750)?;
        eq(
            "times",
            (meta.atime(), meta.mtime()),
            (1_000_000_007, 1_000_000_007),
        )?;
    }
    file.write_all_at(b"x", 0)?;
    that(
        "a write moves mtime",
        file.metadata()?.mtime() > 1_000_000_007,
    )
}

/// Runs `f` as an unprivileged user and group in a child.
fn as_user(id: u32, f: impl FnOnce() -> Result<()>) -> Result<()> {
    let mut child = sys::fork(|| {
        nix::unistd::setgroups(&[])?;
        nix::unistd::setgid(Gid::from_raw(id))?;
        nix::unistd::setuid(Uid::from_raw(id))?;
        f()
    })?;
    child.expect_ok(std::time::Duration::from_secs(20))
}

fn unprivileged(ctx: &Ctx) -> Result<()> {
    // The case's own directories must let the user through.
    let mut open: &Path = &ctx.dir;
    loop {
        let mode = fs::metadata(open)?.permissions().mode();
        if mode & 0o001 == 0 {
            return Err(skip(format!("{} is closed to other users", open.display())));
        }
        match open.parent() {
            Some(parent) => open = parent,
            None => break,
        }
    }
    let mount = ctx.mount("m", "size=16M,uid=1234,gid=1234,mode=0700")?;
    as_user(1234, || {
        let guest = mount.guest("web", 4)?;
        guest.fill(0, 4, 1);
        guest.holds(0, 4, 1)?;
        sys::punch(&guest.file, 0, PAGE as u64).context("punch")?;
        guest.is_zero(0, 1)?;
        eq("owner", guest.file.metadata()?.uid(), 1234)
    })?;
    as_user(4321, || {
        fails(
            "another user's mkdir",
            fs::create_dir(mount.at("x")),
            Errno::EACCES,
        )?;
        fails(
            "another user's open",
            File::open(mount.at("web/ram")),
            Errno::EACCES,
        )
    })
}

fn security_xattr(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 1)?;
    let label = sys::set_xattr(&file, "security.scenario", b"x");
    if ctx.is_thinram() {
        fails("security.* xattr", label, Errno::EOPNOTSUPP)?;
        let user = sys::set_xattr(&file, "user.scenario", b"x");
        fails("user.* xattr", user, Errno::EOPNOTSUPP)?;
    } else {
        label?;
    }
    file.write_all_at(b"still usable", 0)?;
    Ok(())
}

fn truncate(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 16)?;
    file.write_all_at(&pages_bytes(1, 16), 0)?;
    ctx.expect_used("when full", &mount, "web", 64)?;
    file.set_len(4 * PAGE as u64 + 100)?;
    ctx.expect_used("after the cut", &mount, "web", 20)?;
    eq("size", file.metadata()?.len(), 4 * PAGE as u64 + 100)?;
    let mut tail = vec![0; 200];
    eq(
        "bytes read over the end",
        file.read_at(&mut tail, 4 * PAGE as u64)?,
        100,
    )?;
    bytes_are("last bytes", &tail[..100], &page_bytes(5)[..100])?;
    file.set_len(16 * PAGE as u64)?;
    ctx.expect_used("after growing again", &mount, "web", 20)?;
    let mut seen = vec![0xff; 12 * PAGE];
    file.read_exact_at(&mut seen, 4 * PAGE as u64)?;
    let mut expected = vec![0; 12 * PAGE];
    expected[..100].copy_from_slice(&page_bytes(5)[..100]);
    bytes_are("after growing again", &seen, &expected)?;
    file.set_len(0)?;
    ctx.expect_used("when empty", &mount, "web", 0)?;
    if ctx.is_thinram() {
        let stat = ctx.sys().vm("web").stat()?;
        eq("size_kb", stat.get("size_kb")?, 0)?;
        stat.check_sum()?;
    }
    let ro = File::open(mount.at("web/ram"))?;
    fails(
        "ftruncate of a read-only file",
        sys::ftruncate(&ro, 0),
        Errno::EINVAL,
    )
}

fn truncate_mapped(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 8)?;
    guest.fill(0, 8, 1);
    guest.file.set_len(3 * PAGE as u64 + 800)?;
    guest.holds(0, 3, 1)?;
    // Beyond the end within the last page the kernel shows zeroes.
    let page = guest.map.read_page(3);
    let mut expected = content::page(4);
    expected[100..].fill(0);
    page_is("page with the end in it", &page, &expected)?;
    for (what, write) in [("read", false), ("write", true)] {
        let mut child = sys::fork(|| {
            let map = Map::shared(&guest.file, 0, 8 * PAGE, RW)?;
            if write {
                map.set(4, 0, 1);
            } else {
                map.get(4, 0);
            }
            bail!("a {what} beyond the end went well")
        })?;
        child
            .expect_signal(Signal::SIGBUS, ctx.limit(10.0))
            .context(what)?;
    }
    guest.file.set_len(8 * PAGE as u64)?;
    let mut expected = content::page(4);
    expected[100..].fill(0);
    page_is(
        "cut page after growing again",
        &guest.map.read_page(3),
        &expected,
    )?;
    guest.is_zero(4, 8)?;
    guest.fill(4, 8, 1);
    guest.holds(4, 8, 1)?;
    guest.holds(0, 3, 1)
}

fn prealloc(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 64)?;
    guest.fill(10, 12, 1);
    ctx.expect_used("before", &mount, "web", 8)?;
    sys::fallocate(&guest.file, 0, 0, 32 * PAGE as i64)?;
    ctx.expect_used("after fallocate of 32 pages", &mount, "web", 128)?;
    sys::fallocate(&guest.file, 0, 0, 32 * PAGE as i64)?;
    ctx.expect_used("after the same again", &mount, "web", 128)?;
    guest.is_zero(0, 10)?;
    guest.holds(10, 12, 1)?;
    guest.is_zero(12, 32)?;
    guest.fill(0, 10, 100);
    ctx.expect_used("after writing what was there", &mount, "web", 128)?;
    // Part of a page counts as a page; a range beyond the end makes the file longer.
    sys::fallocate(&guest.file, 0, 100 * PAGE as i64 + 5, 10)?;
    eq("size", guest.file.metadata()?.len(), 100 * PAGE as u64 + 15)?;
    ctx.expect_used("after part of a page", &mount, "web", 132)
}

fn punch(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 16)?;
    file.write_all_at(&pages_bytes(1, 16), 0)?;
    sys::punch(&file, 4 * PAGE as u64, 8 * PAGE as u64)?;
    ctx.expect_used("after the hole", &mount, "web", 32)?;
    eq("size", file.metadata()?.len(), 16 * PAGE as u64)?;
    let mut expected = pages_bytes(1, 16);
    expected[4 * PAGE..12 * PAGE].fill(0);
    let mut seen = vec![0xff; 16 * PAGE];
    file.read_exact_at(&mut seen, 0)?;
    bytes_are("after the hole", &seen, &expected)?;
    sys::punch(&file, 4 * PAGE as u64, 8 * PAGE as u64).context("the same hole again")?;
    sys::punch(&file, 100 * PAGE as u64, PAGE as u64).context("a hole beyond the end")?;
    eq("size", file.metadata()?.len(), 16 * PAGE as u64)?;
    sys::punch(&file, 15 * PAGE as u64, 100 * PAGE as u64).context("a hole over the end")?;
    eq("size", file.metadata()?.len(), 16 * PAGE as u64)?;
    ctx.expect_used("after the hole over the end", &mount, "web", 28)?;
    file.write_all_at(&page_bytes(77), 6 * PAGE as u64)?;
    ctx.expect_used("after a write into the hole", &mount, "web", 32)?;
    file.read_exact_at(&mut seen[..PAGE], 6 * PAGE as u64)?;
    bytes_are("page in the hole", &seen[..PAGE], &page_bytes(77))?;
    sys::punch(&file, 0, 16 * PAGE as u64)?;
    ctx.expect_used("after a hole over everything", &mount, "web", 0)?;
    let ro = File::open(mount.at("web/ram"))?;
    fails(
        "a hole in a read-only file",
        sys::punch(&ro, 0, PAGE as u64),
        Errno::EBADF,
    )
}

fn punch_unaligned(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 8)?;
    let mut expected = pages_bytes(1, 8);
    file.write_all_at(&expected, 0)?;
    let mut seen = vec![0; 8 * PAGE];
    // Over page borders, within a page, up to a border, from a border, one byte.
    let holes = [
        (100, 3 * PAGE),
        (5 * PAGE + 7, 50),
        (6 * PAGE + 1, PAGE - 1),
        (7 * PAGE, 9),
        (4999, 1),
    ];
    let mut kb = 32;
    for (from, len) in holes {
        sys::punch(&file, from as u64, len as u64)?;
        expected[from..from + len].fill(0);
        file.read_exact_at(&mut seen, 0)?;
        bytes_are(
            format!("after a hole of {len} bytes at {from}"),
            &seen,
            &expected,
        )?;
        let whole = (from + len) / PAGE - from.div_ceil(PAGE).min((from + len) / PAGE);
        kb -= 4 * whole as u64;
        ctx.expect_used(
            &format!("after a hole of {len} at {from}"),
            &mount,
            "web",
            kb,
        )?;
    }
    // A hole within a hole makes no page.
    sys::punch(&file, PAGE as u64 + 10, 20)?;
    ctx.expect_used("after a small hole in a hole", &mount, "web", kb)
}

fn punch_mapped(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 16)?;
    guest.fill(0, 16, 1);
    let phase = Map::anonymous(PAGE)?;
    let wait_for = |value: u64| {
        ctx.until("the other process", 10.0, || {
            let seen = phase.get(0, 0);
            Ok((seen >= value, format!("phase {seen}")))
        })
    };
    let mut child = sys::fork(|| {
        let map = Map::shared(&guest.file, 0, 16 * PAGE, RW)?;
        page_is("page 5 in the child", &map.read_page(5), &content::page(6))?;
        phase.set(0, 0, 1);
        wait_for(2)?;
        page_is(
            "page 5 in the child after the hole",
            &map.read_page(5),
            &[0; WORDS],
        )?;
        page_is(
            "page 4 in the child after the hole",
            &map.read_page(4),
            &content::page(5),
        )?;
        map.write_page(5, &content::page(500));
        phase.set(0, 0, 3);
        Ok(())
    })?;
    wait_for(1)?;
    sys::punch(&guest.file, 5 * PAGE as u64, PAGE as u64)?;
    ctx.expect_used("after the hole", &mount, "web", 60)?;
    guest.is_zero(5, 6)?;
    phase.set(0, 0, 2);
    wait_for(3)?;
    child.expect_ok(ctx.limit(10.0))?;
    page_is(
        "what the child wrote",
        &guest.map.read_page(5),
        &content::page(500),
    )?;
    guest
        .map
        .advise(8 * PAGE, 4 * PAGE, libc::MADV_REMOVE)
        .context("MADV_REMOVE")?;
    guest.is_zero(8, 12)?;
    guest.holds(12, 16, 1)?;
    guest.holds(0, 5, 1)
}

fn fallocate_bad(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 8)?;
    guest.fill(0, 8, 1);
    let page = PAGE as i64;
    for (name, mode) in [
        ("PUNCH_HOLE without KEEP_SIZE", libc::FALLOC_FL_PUNCH_HOLE),
        ("COLLAPSE_RANGE", libc::FALLOC_FL_COLLAPSE_RANGE),
        ("INSERT_RANGE", libc::FALLOC_FL_INSERT_RANGE),
        ("ZERO_RANGE", libc::FALLOC_FL_ZERO_RANGE),
        ("UNSHARE_RANGE", libc::FALLOC_FL_UNSHARE_RANGE),
        ("an unknown mode", 0x4000),
    ] {
        fails(
            name,
            sys::fallocate(&guest.file, mode, page, page),
            Errno::EOPNOTSUPP,
        )?;
    }
    fails(
        "length 0",
        sys::fallocate(&guest.file, 0, 0, 0),
        Errno::EINVAL,
    )?;
    fails(
        "negative offset",
        sys::fallocate(&guest.file, 0, -page, page),
        Errno::EINVAL,
    )?;
    fails(
        "negative length",
        sys::fallocate(&guest.file, 0, 0, -1),
        Errno::EINVAL,
    )?;
    let past = sys::fallocate(&guest.file, 0, i64::MAX - page, 2 * page);
    fails("an end that overflows", past, Errno::EFBIG)?;
    eq("size", guest.file.metadata()?.len(), 8 * PAGE as u64)?;
    ctx.expect_used("after the refusals", &mount, "web", 32)?;
    guest.holds(0, 8, 1)?;
    let dir = File::open(mount.at("web"))?;
    fails_any(
        "a directory",
        sys::fallocate(&dir, 0, 0, page),
        &[Errno::EISDIR, Errno::EBADF],
    )
}

fn statfs(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=8M")?;
    let seen = || -> Result<(u64, u64, u64)> {
        let stat = nix::sys::statfs::statfs(&mount.path)?;
        let unit = stat.block_size() as u64;
        Ok((
            stat.blocks() * unit,
            stat.blocks_free() * unit,
            stat.blocks_available() * unit,
        ))
    };
    let (total, free, available) = seen()?;
    eq("size", total, 8 << 20)?;
    eq("free and available", free, available)?;
    eq("free of an empty one", free, 8 << 20)?;
    let file = mount.file("web", "ram", 64)?;
    file.write_all_at(&pages_bytes(1, 64), 0)?;
    eq("size with a file", seen()?.0, 8 << 20)?;
    eq(
        "free with 64 pages",
        seen()?.1,
        (8 << 20) - 64 * PAGE as u64,
    )?;
    sys::punch(&file, 0, 32 * PAGE as u64)?;
    // On ThinRAM a file's length is a promise that a guest can use it all; on tmpfs it is none.
    let left = if ctx.is_thinram() { 64 } else { 32 };
    eq(
        "free after a hole of 32 pages",
        seen()?.1,
        (8 << 20) - left * PAGE as u64,
    )?;
    file.set_len(48 * PAGE as u64)?;
    let left = if ctx.is_thinram() { 48 } else { 16 };
    eq(
        "free after the cut to 48 pages",
        seen()?.1,
        (8 << 20) - left * PAGE as u64,
    )?;
    drop(file);
    fs::remove_file(mount.at("web/ram"))?;
    eq("free after unlink", seen()?.1, 8 << 20)?;
    if ctx.is_thinram() {
        let kind = nix::sys::statfs::statfs(&mount.path)?.filesystem_type().0;
        that(
            "the type is not tmpfs's",
            kind != nix::sys::statfs::TMPFS_MAGIC.0,
        )?;
    }
    Ok(())
}

fn seek_holes(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 64)?;
    let page = PAGE as i64;
    let end = 64 * page;
    fails(
        "data in an empty file",
        sys::lseek(&file, 0, libc::SEEK_DATA),
        Errno::ENXIO,
    )?;
    eq(
        "first hole in an empty file",
        sys::lseek(&file, 0, libc::SEEK_HOLE)?,
        0,
    )?;
    file.write_all_at(&pages_bytes(1, 4), 8 * PAGE as u64)?;
    file.write_all_at(b"x", 40 * PAGE as u64 + 17)?;
    let table = [
        (0, libc::SEEK_DATA, 8 * page),
        (0, libc::SEEK_HOLE, 0),
        (8 * page, libc::SEEK_HOLE, 12 * page),
        (9 * page + 5, libc::SEEK_DATA, 9 * page + 5),
        (9 * page + 5, libc::SEEK_HOLE, 12 * page),
        (12 * page, libc::SEEK_DATA, 40 * page),
        (40 * page + 100, libc::SEEK_HOLE, 41 * page),
        (end - 1, libc::SEEK_HOLE, end - 1),
    ];
    for (from, whence, expected) in table {
        let kind = if whence == libc::SEEK_DATA {
            "data"
        } else {
            "hole"
        };
        eq(
            format!("next {kind} from {from}"),
            sys::lseek(&file, from, whence)?,
            expected,
        )?;
    }
    fails(
        "data after the last",
        sys::lseek(&file, 41 * page, libc::SEEK_DATA),
        Errno::ENXIO,
    )?;
    fails(
        "a hole at the end",
        sys::lseek(&file, end, libc::SEEK_HOLE),
        Errno::ENXIO,
    )?;
    fails(
        "data before the start",
        sys::lseek(&file, -1, libc::SEEK_DATA),
        Errno::ENXIO,
    )?;
    sys::punch(&file, 8 * PAGE as u64, 2 * PAGE as u64)?;
    eq(
        "data after a hole",
        sys::lseek(&file, 0, libc::SEEK_DATA)?,
        10 * page,
    )?;
    eq("SEEK_END", sys::lseek(&file, -5, libc::SEEK_END)?, end - 5)?;
    fails(
        "a negative position",
        sys::lseek(&file, -5, libc::SEEK_SET),
        Errno::EINVAL,
    )
}

fn read_write(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 0)?;
    let mut expected = vec![0u8; 20 * PAGE];
    let mut end = 0;
    let pieces = [
        (0, 1),
        (4095, 2),
        (PAGE, PAGE),
        (3 * PAGE - 1, PAGE + 2),
        (6 * PAGE + 123, 5 * PAGE),
        (17, 12 * PAGE),
        (19 * PAGE, PAGE),
        (0, 0),
    ];
    for (i, (from, len)) in pieces.into_iter().enumerate() {
        let data = &pages_bytes(i as u64 * 100, 12)[..len];
        eq("bytes written", file.write_at(data, from as u64)?, len)?;
        expected[from..from + len].copy_from_slice(data);
        end = end.max(if len == 0 { 0 } else { from + len });
        eq("size", file.metadata()?.len(), end as u64)?;
        let mut seen = vec![0xff; 20 * PAGE];
        eq("bytes read", file.read_at(&mut seen, 0)?, end)?;
        bytes_are(
            format!("after {len} bytes at {from}"),
            &seen[..end],
            &expected[..end],
        )?;
    }
    for (from, len) in [
        (1, 4096),
        (4097, 8191),
        (12 * PAGE - 3, 6),
        (19 * PAGE + 4000, 96),
    ] {
        let mut seen = vec![0; len];
        file.read_exact_at(&mut seen, from as u64)?;
        bytes_are(
            format!("{len} bytes at {from}"),
            &seen,
            &expected[from..from + len],
        )?;
    }
    eq(
        "bytes read at the end",
        file.read_at(&mut [0; 10], 20 * PAGE as u64)?,
        0,
    )?;
    eq("bytes read beyond", file.read_at(&mut [0; 10], 1 << 40)?, 0)?;
    // The file position moves.
    let mut cursor = File::open(mount.at("web/ram"))?;
    cursor.seek(SeekFrom::Start(100))?;
    let mut all = Vec::new();
    cursor.read_to_end(&mut all)?;
    bytes_are("from position 100", &all, &expected[100..])?;
    fails(
        "a write to a read-only file",
        cursor.write(b"x"),
        Errno::EBADF,
    )?;
    let wo = OpenOptions::new().write(true).open(mount.at("web/ram"))?;
    fails(
        "a read of a write-only file",
        wo.read_at(&mut [0], 0),
        Errno::EBADF,
    )
}

fn append(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    mount.file("web", "log", 0)?;
    let path = mount.at("web/log");
    let mut file = OpenOptions::new().append(true).open(&path)?;
    let mut other = OpenOptions::new().append(true).open(&path)?;
    let mut expected = Vec::new();
    for i in 0..200u64 {
        let line = page_bytes(i)[..97].to_vec();
        if i % 2 == 0 { &mut file } else { &mut other }.write_all(&line)?;
        expected.extend_from_slice(&line);
    }
    bytes_are("the whole file", &fs::read(&path)?, &expected)
}

fn sparse_read(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 1024)?;
    file.write_all_at(&page_bytes(1), 500 * PAGE as u64)?;
    let mut seen = vec![0xff; 1024 * PAGE];
    file.read_exact_at(&mut seen, 0)?;
    let mut expected = vec![0; 1024 * PAGE];
    expected[500 * PAGE..501 * PAGE].copy_from_slice(&page_bytes(1));
    bytes_are("a sparse file", &seen, &expected)?;
    ctx.expect_used("after reading all", &mount, "web", 4)?;
    eq(
        "first data",
        sys::lseek(&file, 0, libc::SEEK_DATA)?,
        500 * PAGE as i64,
    )
}

fn bad_buffers(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 4)?;
    file.write_all_at(&pages_bytes(1, 4), 0)?;
    // Two pages, the second out of reach.
    let buffer = Map::anonymous(2 * PAGE)?;
    buffer.write_page(0, &content::page(900));
    buffer.protect(PAGE, PAGE, libc::PROT_NONE)?;
    let into = sys::pread_into(&file, &buffer, PAGE, PAGE, 0);
    fails("read into an unreadable page", into, Errno::EFAULT)?;
    let from = sys::pwrite_from(&file, &buffer, PAGE, PAGE, 0);
    fails("write from an unreadable page", from, Errno::EFAULT)?;
    let mut seen = vec![0; 4 * PAGE];
    file.read_exact_at(&mut seen, 0)?;
    bytes_are("after the refused write", &seen, &pages_bytes(1, 4))?;
    // Half of it can be written: the kernel writes that half, or at least nothing else.
    let half = sys::pwrite_from(&file, &buffer, PAGE - 512, 1024, 0)?;
    check::within("bytes of a half-good write", half, 1, 512)?;
    let mut expected = pages_bytes(1, 4);
    expected[..half].copy_from_slice(&page_bytes(900)[PAGE - 512..PAGE - 512 + half]);
    file.read_exact_at(&mut seen, 0)?;
    bytes_are("after the half-good write", &seen, &expected)
}

fn copy(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 100)?;
    file.write_all_at(&pages_bytes(1, 30), 10 * PAGE as u64 + 3)?;
    let expected = fs::read(mount.at("web/ram"))?;
    eq("length by read", expected.len(), 100 * PAGE)?;
    bytes_are(
        "data by read",
        &expected[10 * PAGE + 3..40 * PAGE + 3],
        &pages_bytes(1, 30),
    )?;
    let out = ctx.dir.join("out");
    fs::copy(mount.at("web/ram"), &out).context("copy to another file system")?;
    bytes_are("the copy outside", &fs::read(&out)?, &expected)?;
    fs::copy(&out, mount.at("web/back")).context("copy from another file system")?;
    bytes_are("the copy back", &fs::read(mount.at("web/back"))?, &expected)?;
    fs::copy(mount.at("web/ram"), mount.at("web/beside")).context("copy within")?;
    bytes_are(
        "the copy beside",
        &fs::read(mount.at("web/beside"))?,
        &expected,
    )
}

fn cp_dd(ctx: &Ctx) -> Result<()> {
    let (cp, dd) = (tool("cp")?, tool("dd")?);
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 50)?;
    file.write_all_at(&pages_bytes(1, 20), 7 * PAGE as u64)?;
    let expected = fs::read(mount.at("web/ram"))?;
    let run = |command: &mut Command| -> Result<()> {
        let out = command.output().with_context(|| format!("{command:?}"))?;
        if !out.status.success() {
            bail!(
                "{command:?}: {}: {}",
                out.status,
                String::from_utf8_lossy(&out.stderr)
            );
        }
        Ok(())
    };
    let (a, b) = (ctx.dir.join("a"), ctx.dir.join("b"));
    run(Command::new(&cp).arg(mount.at("web/ram")).arg(&a))?;
    bytes_are("cp out", &fs::read(&a)?, &expected)?;
    run(Command::new(&cp).arg(&a).arg(mount.at("web/in")))?;
    bytes_are("cp in", &fs::read(mount.at("web/in"))?, &expected)?;
    let arg = |name: &str, path: &Path| format!("{name}={}", path.display());
    let mut out = Command::new(&dd);
    run(out
        .arg(arg("if", &mount.at("web/ram")))
        .arg(arg("of", &b))
        .arg("bs=3000"))?;
    bytes_are("dd out", &fs::read(&b)?, &expected)?;
    let mut back = Command::new(&dd);
    run(back
        .arg(arg("if", &b))
        .arg(arg("of", &mount.at("web/dd")))
        .arg("bs=64k"))?;
    bytes_are("dd in", &fs::read(mount.at("web/dd"))?, &expected)
}

fn sendfile_splice(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 16)?;
    file.write_all_at(&pages_bytes(1, 8), 100)?;
    let expected = fs::read(mount.at("web/ram"))?;
    let out = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(ctx.dir.join("out"))?;
    let (mut from, mut left) = (0i64, expected.len());
    while left > 0 {
        match nix::sys::sendfile::sendfile(&out, &file, Some(&mut from), left)? {
            0 => bail!("sendfile ended {left} bytes early"),
            n => left -= n,
        }
    }
    bytes_are("by sendfile", &fs::read(ctx.dir.join("out"))?, &expected)?;

    let (read_end, write_end) = nix::unistd::pipe()?;
    let mut read_end = File::from(read_end);
    let mut all = Vec::new();
    let mut offset = 0i64;
    while all.len() < expected.len() {
        let n = splice(
            &file,
            Some(&mut offset),
            &write_end,
            None,
            8192,
            SpliceFFlags::empty(),
        )
        .context("splice to a pipe")?;
        that("splice gives data", n > 0)?;
        let mut chunk = vec![0; n];
        read_end.read_exact(&mut chunk)?;
        all.extend_from_slice(&chunk);
    }
    bytes_are("by splice", &all, &expected)?;

    // What lies in a pipe is what was there when it was spliced or newer, never another file's.
    let target = mount.file("web", "in", 4)?;
    let mut write_end = File::from(write_end);
    write_end.write_all(&page_bytes(70))?;
    let mut at = PAGE as i64;
    let mut moved = 0;
    while moved < PAGE {
        let left = PAGE - moved;
        moved += splice(
            read_end.as_fd(),
            None,
            &target,
            Some(&mut at),
            left,
            SpliceFFlags::empty(),
        )
        .context("splice from a pipe")?;
    }
    let mut seen = vec![0; 4 * PAGE];
    target.read_exact_at(&mut seen, 0)?;
    let mut expected = vec![0; 4 * PAGE];
    expected[PAGE..2 * PAGE].copy_from_slice(&page_bytes(70));
    bytes_are("spliced in", &seen, &expected)
}

fn fsync(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 2)?;
    file.write_all_at(&page_bytes(1), 0)?;
    file.sync_all().context("fsync")?;
    file.sync_data().context("fdatasync")?;
    File::open(mount.at("web"))?
        .sync_all()
        .context("fsync of the directory")?;
    let mut seen = vec![0; PAGE];
    file.read_exact_at(&mut seen, 0)?;
    bytes_are("after fsync", &seen, &page_bytes(1))
}

fn blocks(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 64)?;
    let count = || -> Result<u64> { Ok(guest.file.metadata()?.blocks()) };
    eq("blocks of an empty file", count()?, 0)?;
    guest.fill(0, 10, 1);
    eq("blocks after 10 pages", count()?, 80)?;
    guest.file.write_all_at(b"x", 20 * PAGE as u64)?;
    eq("blocks after part of a page", count()?, 88)?;
    sys::punch(&guest.file, 0, 5 * PAGE as u64)?;
    eq("blocks after a hole of 5 pages", count()?, 48)?;
    guest.file.set_len(0)?;
    eq("blocks after the cut", count()?, 0)
}

fn full(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=1M")?;
    if ctx.is_thinram() {
        // A fault must not run out of room, so the promise is made when the length is set.
        let file = mount.file("web", "ram", 128)?;
        fails(
            "a length beyond size=",
            sys::ftruncate(&file, 2 << 20),
            Errno::ENOSPC,
        )?;
        eq("length", file.metadata()?.len(), 128 * PAGE as u64)?;
        let second = mount.file("web", "second", 128)?;
        fails(
            "lengths together beyond size=",
            second.set_len(129 * 4096),
            Errno::ENOSPC,
        )?;
        second.set_len(0)?;
        file.set_len(128 * PAGE as u64)
            .context("a length that still fits")?;
        file.set_len(0)?;
    }
    let file = mount.file("web", "data", 0)?;
    let chunk = pages_bytes(1, 16);
    let mut written = 0;
    let ended = loop {
        match file.write_at(&chunk, written) {
            Ok(0) => bail!("a write returned 0 at {written}"),
            Ok(n) => written += n as u64,
            Err(e) => break check::Code::code(&e),
        }
        that("writes end at size=", written <= 1 << 20)?;
    };
    eq("the end", ended, Errno::ENOSPC)?;
    eq("bytes written until then", written, 1 << 20)?;
    let mut seen = vec![0; written as usize];
    file.read_exact_at(&mut seen, 0)?;
    for (i, part) in seen.chunks(chunk.len()).enumerate() {
        bytes_are(format!("chunk {i}"), part, &chunk[..part.len()])?;
    }
    let more = sys::fallocate(&file, 0, 0, 2 << 20);
    fails_any(
        "fallocate beyond size=",
        more,
        &[Errno::ENOSPC, Errno::EFBIG],
    )?;
    file.set_len(0)?;
    file.write_all_at(&chunk, 0)
        .context("write after making room")
}

fn overflow(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 4)?;
    file.write_all_at(&pages_bytes(1, 4), 0)?;
    fails("ftruncate to -1", sys::ftruncate(&file, -1), Errno::EINVAL)?;
    fails("pwrite at -1", sys::pwrite(&file, b"x", -1), Errno::EINVAL)?;
    if ctx.is_thinram() {
        let last = sys::pwrite(&file, b"xy", i64::MAX - 1);
        fails_any(
            "pwrite over the last offset",
            last,
            &[Errno::EFBIG, Errno::EINVAL],
        )?;
    }
    if ctx.is_thinram() {
        let huge = sys::ftruncate(&file, i64::MAX);
        fails("ftruncate to the largest offset", huge, Errno::EFBIG)?;
    }
    let end = i64::MAX as u64 - PAGE as u64 + 1;
    let hole = sys::punch(&file, end, 2 * PAGE as u64);
    fails("a hole whose end overflows", hole, Errno::EFBIG)?;
    let map = Map::shared(&file, i64::MAX as u64 & !(PAGE as u64 - 1), 2 * PAGE, R);
    fails("a mapping whose end overflows", map, Errno::EOVERFLOW)?;
    eq("size", file.metadata()?.len(), 4 * PAGE as u64)?;
    let mut seen = vec![0; 4 * PAGE];
    file.read_exact_at(&mut seen, 0)?;
    bytes_are("after all that", &seen, &pages_bytes(1, 4))
}

fn mount_options(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=4M,mode=0751,uid=1001,gid=1002,domain=lab")?;
    let meta = fs::metadata(&mount.path)?;
    eq("mode", meta.mode() & 0o7777, 0o751)?;
    eq("owner", (meta.uid(), meta.gid()), (1001, 1002))?;
    let stat = nix::sys::statfs::statfs(&mount.path)?;
    eq("size", stat.blocks() * stat.block_size() as u64, 4 << 20)?;
    let table = fs::read_to_string("/proc/self/mounts")?;
    let path = mount.path.display().to_string();
    let shown = table
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields.get(1) == Some(&&*path))
        .and_then(|fields| fields.get(3).map(|s| s.to_string()))
        .with_context(|| format!("{path} is not in /proc/self/mounts"))?;
    let wanted = if ctx.is_thinram() {
        vec!["size=4096k", "mode=0751", "domain=lab"]
    } else {
        vec!["size=4096k", "mode=751", "uid=1001", "gid=1002"]
    };
    for option in wanted {
        that(
            format!("/proc/self/mounts shows {option}: {shown}"),
            shown.split(',').any(|s| s == option),
        )?;
    }
    drop(mount);
    for (text, bytes) in [
        ("size=65536k", 64u64 << 20),
        ("size=1048576", 1 << 20),
        ("size=1G", 1 << 30),
    ] {
        let mount = ctx.mount("m", text)?;
        let stat = nix::sys::statfs::statfs(&mount.path)?;
        eq(text, stat.blocks() * stat.block_size() as u64, bytes)?;
    }
    Ok(())
}

fn mount_bad(ctx: &Ctx) -> Result<()> {
    let mut bad = vec![
        "nonsense",
        "nonsense=1",
        "size=x",
        "size=",
        "size=-1",
        "size=12q",
        "mode=9",
        "mode=x",
        "uid=x",
        "uid=-1",
        "gid=many",
        "size=1M,nonsense",
    ];
    if ctx.is_thinram() {
        bad.extend(["domain=", "domain", "size=99999999999999999999", "size=0x"]);
    }
    for options in bad {
        fails(
            options,
            ctx.try_mount("m", options)?.map(drop),
            Errno::EINVAL,
        )?;
    }
    // A refusal leaves nothing behind that stops a good one.
    ctx.mount("m", "size=1M").map(drop)
}

fn mount_mode(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "")?;
    let meta = fs::metadata(&mount.path)?;
    eq("mode", meta.mode() & 0o7777, 0o700)?;
    eq("owner", (meta.uid(), meta.gid()), (0, 0))
}

fn mounts(ctx: &Ctx) -> Result<()> {
    let mut all = Vec::new();
    for i in 0..4u64 {
        let mount = ctx.mount(&format!("m{i}"), &format!("size=4M,domain=d{i}"))?;
        let guest = mount.guest(&format!("vm{i}"), 4)?;
        guest.fill(0, 4, i * 10);
        all.push((guest, mount));
    }
    for (i, (guest, mount)) in all.iter().enumerate() {
        guest.holds(0, 4, i as u64 * 10)?;
        eq("names in the root", fs::read_dir(&mount.path)?.count(), 1)?;
    }
    let (one, two) = (&all[0], &all[1]);
    let moved = fs::rename(&one.0.path, two.1.at("vm1/x"));
    fails("rename to another mount", moved, Errno::EXDEV)?;
    // One goes, the others stay.
    let (guest, mut mount) = all.remove(0);
    drop(guest);
    mount.unmount()?;
    for (i, (guest, _)) in all.iter().enumerate() {
        guest.holds(0, 4, (i as u64 + 1) * 10)?;
    }
    Ok(())
}

fn domains(ctx: &Ctx) -> Result<()> {
    let lab = ctx.mount("lab", "size=4M,domain=lab")?;
    let own = ctx.mount("own", "size=4M")?;
    lab.file("a", "ram", 1)?;
    lab.file("b", "ram", 1)?;
    own.file("c", "ram", 1)?;
    own.file("d", "ram", 1)?;
    let sys = ctx.sys();
    eq("domain of a", sys.vm("a").word("domain")?, "lab".to_owned())?;
    eq("domain of b", sys.vm("b").word("domain")?, "lab".to_owned())?;
    let (c, d) = (sys.vm("c").word("domain")?, sys.vm("d").word("domain")?);
    that(format!("c ({c:?}) is not in lab"), c != "lab")?;
    that(format!("d ({d:?}) is not in lab"), d != "lab")?;
    that(
        format!("c and d differ or have none: {c:?}, {d:?}"),
        c != d || c.is_empty(),
    )
}

fn remount(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=4M,mode=0755")?;
    let size = || -> Result<u64> {
        let stat = nix::sys::statfs::statfs(&mount.path)?;
        Ok(stat.blocks() * stat.block_size() as u64)
    };
    let guest = mount.guest("web", 512)?;
    guest.fill(0, 512, 1);
    mount
        .remount(MsFlags::empty(), "size=16M")
        .context("remount to a larger size")?;
    eq("size", size()?, 16 << 20)?;
    fails(
        "a size below what is used",
        mount.remount(MsFlags::empty(), "size=1M"),
        Errno::EINVAL,
    )?;
    eq("size after the refusal", size()?, 16 << 20)?;
    fails(
        "an unknown option",
        mount.remount(MsFlags::empty(), "nonsense=1"),
        Errno::EINVAL,
    )?;
    mount
        .remount(MsFlags::empty(), "size=8M")
        .context("remount to a smaller size")?;
    eq("size", size()?, 8 << 20)?;
    guest.holds(0, 512, 1)?;
    drop(guest);
    mount
        .remount(MsFlags::MS_RDONLY, "")
        .context("remount read-only")?;
    fails(
        "create on a read-only mount",
        new_file(&mount.at("web/x")),
        Errno::EROFS,
    )?;
    let open = OpenOptions::new().write(true).open(mount.at("web/ram"));
    fails("open for writing", open, Errno::EROFS)?;
    mount
        .remount(MsFlags::empty(), "")
        .context("remount writable")?;
    new_file(&mount.at("web/x"))?;
    eq("size after ro and back", size()?, 8 << 20)
}

fn busy(ctx: &Ctx) -> Result<()> {
    let mut mount = ctx.mount("m", "size=4M")?;
    let file = mount.file("web", "ram", 2)?;
    fails("umount with an open file", mount.unmount(), Errno::EBUSY)?;
    let map = Map::shared(&file, 0, 2 * PAGE, RW)?;
    map.write_page(0, &content::page(1));
    drop(file);
    fails("umount with a mapping", mount.unmount(), Errno::EBUSY)?;
    page_is(
        "page after the refusals",
        &map.read_page(0),
        &content::page(1),
    )?;
    drop(map);
    mount.unmount().context("umount when nothing uses it")?;
    if ctx.is_thinram() {
        let sys = ctx.sys();
        ctx.until("no VM", 5.0, || {
            let left = sys.vms()?;
            Ok((left.is_empty(), format!("{left:?}")))
        })?;
    }
    Ok(())
}

fn second_insmod(ctx: &Ctx) -> Result<()> {
    let Some(ko) = &ctx.setup.ko else {
        return Err(skip("no --ko, or the module is built in"));
    };
    let file = File::open(ko).with_context(|| format!("open {}", ko.display()))?;
    let mount = ctx.mount("m", "size=4M")?;
    let guest = mount.guest("web", 2)?;
    guest.fill(0, 2, 1);
    fails("a second insmod", sys::insert_module(&file), Errno::EEXIST)?;
    guest.holds(0, 2, 1)?;
    eq("resident_kb", guest.sysfs(ctx).get("resident_kb")?, 8)
}

fn rmmod_mounted(ctx: &Ctx) -> Result<()> {
    let modules = fs::read_to_string("/proc/modules").unwrap_or_default();
    if !modules.lines().any(|line| line.starts_with("thinram ")) {
        return Err(skip("thinram is built in"));
    }
    let mount = ctx.mount("m", "size=4M")?;
    let guest = mount.guest("web", 2)?;
    guest.fill(0, 2, 1);
    let busy = [Errno::EWOULDBLOCK, Errno::EBUSY];
    fails_any("rmmod with a mount", sys::remove_module("thinram"), &busy)?;
    guest.holds(0, 2, 1)?;
    eq("resident_kb", guest.sysfs(ctx).get("resident_kb")?, 8)
}

fn churn(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let work = |who: u64| -> Result<()> {
        for round in 0..150u64 {
            let vm = format!("vm{who}-{}", round % 7);
            let file = mount.file(&vm, &format!("f{round}"), 4)?;
            let seed = who << 32 | round;
            file.write_all_at(&page_bytes(seed), PAGE as u64)?;
            let map = Map::shared(&file, 0, 4 * PAGE, RW)?;
            page_is("own page", &map.read_page(1), &content::page(seed))?;
            let path = mount.at(&vm).join(format!("f{round}"));
            if round % 3 == 0 {
                fs::rename(&path, path.with_extension("old"))?;
                fs::remove_file(path.with_extension("old"))?;
            } else {
                fs::remove_file(&path)?;
            }
            drop((file, map));
            fs::remove_dir(mount.at(&vm))?;
        }
        Ok(())
    };
    let mut child = sys::fork(|| work(1))?;
    work(2)?;
    child.expect_ok(ctx.limit(20.0))?;
    eq("names that are left", fs::read_dir(&mount.path)?.count(), 0)?;
    if !ctx.is_thinram() {
        return ctx.expect_used("at the end", &mount, "", 0);
    }
    let sys = ctx.sys();
    ctx.until("no VM", 5.0, || {
        let left = sys.vms()?;
        Ok((left.is_empty(), format!("{left:?}")))
    })
}

fn sysfs_vm(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 64)?;
    let vm = guest.sysfs(ctx);
    eq("size_kb", vm.get("size_kb")?, 256)?;
    eq("empty_kb", vm.get("empty_kb")?, 256)?;
    eq(
        "owner_pid",
        vm.get("owner_pid")?,
        u64::from(std::process::id()),
    )?;
    let faults = vm.get("faults")?;
    guest.fill(0, 10, 1);
    guest.map.get(20, 0);
    let stat = vm.stat()?;
    stat.check_sum()?;
    eq("private_kb", stat.get("private_kb")?, 40)?;
    eq("resident_kb", vm.get("resident_kb")?, 40)?;
    eq(
        "zero_kb and empty_kb",
        stat.get("zero_kb")? + stat.get("empty_kb")?,
        216,
    )?;
    that("faults were counted", vm.get("faults")? >= faults + 11)?;
    let second = mount.file("web", "dimm1", 16)?;
    eq("size_kb with a second file", vm.get("size_kb")?, 320)?;
    drop(second);
    fs::remove_file(mount.at("web/dimm1"))?;
    eq("size_kb without it", vm.get("size_kb")?, 256)?;
    drop(guest);
    eq("owner_pid without a mapping", vm.get("owner_pid")?, 0)
}
