// SPDX-License-Identifier: GPL-2.0

//! Mounts, their options, and what sysfs and the module make of them.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::mount::MsFlags;

use crate::check::{eq, fails, fails_any, page_is, skip, that};
use crate::content;
use crate::ctx::Ctx;
use crate::harness::Case;
use crate::log::is_logged;
use crate::names::new_file;
use crate::sys::{self, Map, PAGE, RW};
use crate::sysfs::Node;

/// The table of cases.
pub const CASES: &[Case] = &[
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
        "fs/refusals-logged",
        "what is refused is a line in the log: what, which value, what is right",
        refusals_logged,
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
    Case::thinram(
        "fs/sysfs-vm",
        "a VM's files: sizes, owner_pid, and its end",
        sysfs_vm,
    ),
];

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
        vec![
            "size=4096k",
            "mode=0751",
            "uid=1001",
            "gid=1002",
            "domain=lab",
        ]
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
        ("size=1", PAGE as u64),
        ("size=4097", 2 * PAGE as u64),
        ("size=1G,size=2M", 2 << 20),
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
        bad.extend([
            "size=1.5G",
            "mode=1777",
            "domain=..",
            "domain=a/b",
            "share=2",
        ]);
        bad.extend([
            "large_pages=maybe",
            "swap_dir=here",
            "scan_pages_per_sec=0x10",
        ]);
        bad.extend(["scan_pages_per_sec=+5", "scan_pages_per_sec=1k"]);
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
    let mounted = "mode=0755,uid=1001,gid=1002";
    let mount = ctx.mount("m", &format!("size=4M,{mounted}"))?;
    let size = || -> Result<u64> {
        let stat = nix::sys::statfs::statfs(&mount.path)?;
        Ok(stat.blocks() * stat.block_size() as u64)
    };
    let guest = mount.guest("web", 512)?;
    guest.fill(0, 512, 1);
    // mount(8) repeats what fstab says.
    mount
        .remount(MsFlags::empty(), &format!("size=16M,{mounted}"))
        .context("remount to a larger size")?;
    if ctx.is_thinram() {
        for other in ["uid=1003", "gid=1003", "mode=0700", "domain=x", "share=0"] {
            let done = mount.remount(MsFlags::empty(), &format!("size=8M,{other}"));
            fails(other, done, Errno::EINVAL)?;
        }
    }
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
        ctx.until_no_vm()?;
    }
    Ok(())
}

fn refusals_logged(ctx: &Ctx) -> Result<()> {
    // The log shows a backslash as \x5c.
    for (options, says) in [
        ("size=1.5G", "size=1.5G: it takes bytes"),
        ("mode=1777", "mode=1777: it takes an octal"),
        ("domain=a/b", "domain=a/b: it takes 1 to 255"),
        ("large_pages=no", "large_pages=no: it takes never or always"),
        (
            "scan_pages_per_sec=1k",
            "scan_pages_per_sec=1k: it takes a number",
        ),
        ("swap_dir=/none", "swap_dir=/none: there is no such"),
        ("nonsense=1", "Unknown parameter 'nonsense'"),
    ] {
        is_logged(ctx, &[says], || {
            let mounted = ctx.try_mount("m", options)?.map(drop);
            fails_any(options, mounted, &[Errno::EINVAL, Errno::ENOENT])
        })?;
    }
    let mount = ctx.mount("m", "size=1M")?;
    let file = mount.file("web", "ram", 2)?;
    is_logged(ctx, &["1028 KiB more", "size=1024k, 8 are"], || {
        let done = file.set_len((1 << 20) + PAGE as u64 * 3);
        fails("more than size=", done, Errno::ENOSPC)
    })?;
    is_logged(ctx, &["a file of 9223372036854775807 bytes"], || {
        fails("2^63 - 1", file.set_len(i64::MAX as u64), Errno::EFBIG)
    })?;
    is_logged(ctx, &["`a\\x5cnb` is no name for a VM"], || {
        fails("mkdir", fs::create_dir(mount.at("a\nb")), Errno::EINVAL)
    })?;
    let other = ctx.mount("n", "")?;
    other.mkdir("web")?;
    is_logged(ctx, &["a VM `web` is there"], || {
        let second = new_file(&other.at("web/ram"));
        fails("a VM twice", second, Errno::EEXIST)
    })?;
    let (sys, vm) = (ctx.sys(), ctx.sys().vm("web"));
    let files: [(&Node, &str, &[u8], &str); 9] = [
        (
            &sys,
            "run",
            b"3\n",
            "run: `3` was refused: it takes a number from 0 to 2",
        ),
        (
            &sys,
            "scan_period_secs",
            b"-1",
            "scan_period_secs: `-1` was refused",
        ),
        (&sys, "share_scope", b"all", "it takes vm or domain or host"),
        (
            &sys,
            "large_pages",
            b"\n",
            "large_pages: `` was refused: it takes never",
        ),
        (
            &sys,
            "swap_dir",
            b"a\nb",
            "swap_dir: `a\\x5cnb` was refused: give the absolute path",
        ),
        (
            &vm,
            "limit_kb",
            b"1G",
            "web/limit_kb: `1G` was refused: it takes a number",
        ),
        (
            &vm,
            "shares",
            b"0",
            "web/shares: `0` was refused: it takes a number from 1",
        ),
        (
            &vm,
            "domain",
            b"\xff",
            "web/domain: `\\x5cxff` was refused: it takes 1 to 255",
        ),
        (
            &vm,
            "large_pages",
            b"always\n\n",
            "web/large_pages: `always\\x5cn` was refused",
        ),
    ];
    for (node, name, value, says) in files {
        let before = node.word(name)?;
        is_logged(ctx, &[says], || {
            let done = node.try_set(name, value);
            fails_any(name, done, &[Errno::EINVAL, Errno::ERANGE])
        })?;
        eq(name, node.word(name)?, before)?;
    }
    eq("length", file.metadata()?.len(), 2 * PAGE as u64)
}

fn second_insmod(ctx: &Ctx) -> Result<()> {
    let Some(ko) = &ctx.setup.ko else {
        return Err(skip("no --ko, or the module is built in"));
    };
    let file = File::open(ko).with_context(|| format!("open {}", ko.display()))?;
    let mount = ctx.mount("m", "size=4M")?;
    let guest = mount.guest("web", 2)?;
    guest.fill(0, 2, 1);
    fails(
        "a second insmod",
        sys::insert_module(&file, ""),
        Errno::EEXIST,
    )?;
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
