// SPDX-License-Identifier: GPL-2.0

//! Files and directories by name: which VM they are, who may use them.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{symlink, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::stat::{utimensat, UtimensatFlags};
use nix::sys::statfs::fstatfs;
use nix::sys::time::TimeSpec;
use nix::unistd::{chown, Gid, Uid};

use crate::check::{self, bytes_are, eq, fails, page_is, skip, that};
use crate::content::{self, page_bytes, pages_bytes};
use crate::ctx::Ctx;
use crate::harness::Case;
use crate::sys::{self, Map, PAGE, RW};

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
        "fs/churn",
        "many files made and removed by two processes",
        churn,
    ),
];

/// Creates a file that must not exist.
pub fn new_file(path: &Path) -> std::io::Result<File> {
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
    child.expect_ok(std::time::Duration::from_secs(120))
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

fn churn(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let work = |who: u64| -> Result<()> {
        for round in 0..150u64 {
            let vm = format!("vm{who}-{}", round % 7);
            let file = mount.file(&vm, &format!("f{round}"), 4)?;
            let seed = (who << 32) | round;
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
