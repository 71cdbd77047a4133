// SPDX-License-Identifier: GPL-2.0

//! What a file has beside its bytes: times, mode bits, limits of the process, leases, handles.

use std::fs::{self, File};
use std::os::unix::fs::{chown, FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::resource::{setrlimit, Resource};
use nix::sys::signal::Signal;
use nix::unistd::{setgid, setuid, Gid, Uid};

use crate::check::{eq, fails, that};
use crate::ctx::Ctx;
use crate::harness::Case;
use crate::sys::{self, PAGE};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::both(
        "fs/file-size-limit",
        "RLIMIT_FSIZE: EFBIG for ftruncate, fallocate and write, the length stays",
        file_size_limit,
    ),
    Case::both(
        "fs/set-id",
        "set-id bits go when another user writes, truncates, punches or allocates",
        set_id,
    ),
    Case::both(
        "fs/times",
        "reads and changes, by each call, are seen in the times",
        times,
    ),
    Case::both("fs/lease", "a lease is had, and lost to a writer", lease),
    Case::both(
        "fs/no-such-call",
        "seals, handles and inode flags: refused",
        no_such_call,
    ),
];

const LIMIT: Duration = Duration::from_secs(20);

fn file_size_limit(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 4)?;
    let page = PAGE as u64;
    let most = 8 * page;
    sys::fork(|| {
        sys::ignore(Signal::SIGXFSZ)?;
        setrlimit(Resource::RLIMIT_FSIZE, most, most)?;
        fails("ftruncate", file.set_len(most + 1), Errno::EFBIG)?;
        for mode in [0, libc::FALLOC_FL_KEEP_SIZE] {
            let done = sys::fallocate(&file, mode, 0, most as i64 + 1);
            fails(format!("fallocate, mode {mode}"), done, Errno::EFBIG)?;
        }
        let done = file.write_at(b"x", most);
        fails("write", done, Errno::EFBIG)?;
        eq("length", file.metadata()?.len(), 4 * page)?;
        sys::fallocate(&file, 0, 0, most as i64).context("fallocate up to the limit")
    })?
    .expect_ok(LIMIT)?;
    eq("length", file.metadata()?.len(), most)
}

/// Runs `f` as a user who owns nothing.
fn as_another(f: impl FnOnce() -> Result<()>) -> Result<()> {
    sys::fork(|| {
        setgid(Gid::from_raw(1234))?;
        setuid(Uid::from_raw(1234))?;
        f()
    })?
    .expect_ok(LIMIT)
}

fn set_id(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 4)?;
    let path = mount.at("web/ram");
    let page = PAGE as i64;
    let calls: [(&str, &dyn Fn() -> Result<()>); 4] = [
        ("write", &|| Ok(file.write_all_at(b"x", 0)?)),
        ("ftruncate", &|| Ok(file.set_len(2 * PAGE as u64)?)),
        ("a hole", &|| Ok(sys::punch(&file, 0, PAGE as u64)?)),
        ("fallocate", &|| Ok(sys::fallocate(&file, 0, 0, page)?)),
    ];
    for (what, call) in calls {
        fs::set_permissions(&path, fs::Permissions::from_mode(0o6777))?;
        as_another(call)?;
        eq(
            format!("mode after {what} by another"),
            fs::metadata(&path)?.mode() & 0o7777,
            0o777,
        )?;
    }
    // An owner's change of owner takes them as well.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o6755))?;
    chown(&path, Some(1234), Some(1234))?;
    let meta = fs::metadata(&path)?;
    eq("owner", (meta.uid(), meta.gid()), (1234, 1234))?;
    eq("mode after chown", meta.mode() & 0o7777, 0o755)
}

/// Whether the time of access, and that of the last change, moved when `f` ran.
fn moved(path: &Path, f: impl FnOnce() -> Result<()>) -> Result<(bool, bool)> {
    let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    File::options()
        .write(true)
        .open(path)?
        .set_times(fs::FileTimes::new().set_accessed(old).set_modified(old))?;
    f()?;
    let meta = fs::metadata(path)?;
    Ok((meta.accessed()? != old, meta.modified()? != old))
}

fn times(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 4)?;
    let path = mount.at("web/ram");
    let page = PAGE as i64;
    let mut byte = [0];
    let seen = |what: &str, accessed, changed, f: &mut dyn FnMut() -> Result<()>| {
        eq(
            format!("access and change seen after {what}"),
            moved(&path, f)?,
            (accessed, changed),
        )
    };
    seen("read", true, false, &mut || {
        Ok(file.read_exact_at(&mut byte, 0)?)
    })?;
    seen("a copy", true, false, &mut || {
        Ok(fs::copy(&path, mount.at("web/copy")).map(drop)?)
    })?;
    seen(
        "write",
        false,
        true,
        &mut || Ok(file.write_all_at(b"x", 0)?),
    )?;
    seen("truncate", false, true, &mut || {
        Ok(nix::unistd::truncate(&path, 3 * page)?)
    })?;
    seen("ftruncate", false, true, &mut || {
        Ok(file.set_len(2 * PAGE as u64)?)
    })?;
    seen("fallocate", false, true, &mut || {
        Ok(sys::fallocate(&file, 0, 0, 4 * page)?)
    })?;
    seen("a hole", false, true, &mut || {
        Ok(sys::punch(&file, 0, PAGE as u64)?)
    })?;
    seen("nothing", false, false, &mut || Ok(()))
}

fn lease(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    drop(mount.file("web", "ram", 4)?);
    let path = mount.at("web/ram");
    let file = File::open(&path)?;
    // It comes when somebody wants the lease to end.
    sys::ignore(Signal::SIGIO)?;
    sys::lease(&file, libc::F_RDLCK).context("a read lease")?;
    let open = sys::open_now(&path);
    fails("open for writing meanwhile", open, Errno::EWOULDBLOCK)?;
    sys::lease(&file, libc::F_UNLCK).context("the lease given back")?;
    sys::open_now(&path).map(drop).context("open for writing")
}

fn no_such_call(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M")?;
    let file = mount.file("web", "ram", 4)?;
    let thinram = ctx.is_thinram();
    let no_seal = if thinram { Errno::EINVAL } else { Errno::EPERM };
    fails("F_ADD_SEALS", sys::seal(&file), no_seal)?;
    let handle = sys::file_handle(&mount.at("web/ram"));
    let flags = sys::inode_flags(&file);
    if thinram {
        fails("name_to_handle_at", handle, Errno::EOPNOTSUPP)?;
        return fails("FS_IOC_GETFLAGS", flags, Errno::ENOTTY);
    }
    handle.context("name_to_handle_at")?;
    that("no flags", flags.context("FS_IOC_GETFLAGS")? == 0)
}
