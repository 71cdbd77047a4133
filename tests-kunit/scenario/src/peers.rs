// SPDX-License-Identifier: GPL-2.0

//! What KSM's own tests check (the kernel's selftests, LTP), on files of ThinRAM, and what
//! cloud-hypervisor calls; docs/testing.md has the tables.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::waitpid;
use nix::unistd::mkstemp;

use crate::check::{eq, fails, page_is};
use crate::content;
use crate::ctx::{Ctx, Guest, Mount};
use crate::harness::Case;
use crate::mapping::Debuggee;
use crate::sharing::{merged_twins, twins, SOON};
use crate::sys::{self, numa, Map, PAGE, R, RW, WORDS};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::thinram(
        "ltp/ksm01",
        "three VMs filled in steps: counters are exact in each",
        patterns,
    ),
    Case::thinram(
        "ksm/functional-unmerge-discarded",
        "merged pages are dropped in part, then unshared",
        discarded,
    ),
    Case::thinram(
        "ksm/functional-prot-none",
        "merge and unshare under a mapping without access",
        prot_none,
    ),
    Case::thinram(
        "ltp/ksm05",
        "processes die while their pages are scanned",
        dying,
    ),
    Case::thinram(
        "peers/read-only-merge",
        "merge and unshare under a mapping that may only read",
        read_only_merge,
    ),
    Case::both(
        "peers/cloud-hypervisor",
        "what cloud-hypervisor calls for a zone: boot, balloon, plug, snapshot, hand-over",
        cloud_hypervisor,
    ),
];

/// A page of one byte over and over.
pub fn of(byte: u8) -> [u64; WORDS] {
    [u64::from_ne_bytes([byte; 8]); WORDS]
}

/// Fills a guest with one byte.
pub fn fill(guest: &Guest, byte: u8) {
    for page in 0..guest.map.pages() {
        guest.map.write_page(page, &of(byte));
    }
}

fn patterns(ctx: &Ctx) -> Result<()> {
    create_same_memory(ctx, None)
}

/// LTP's create_same_memory: three VMs are filled in steps, their memory on `node` if one is given.
pub fn create_same_memory(ctx: &Ctx, node: Option<u32>) -> Result<()> {
    const PAGES: usize = 256;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let vms = [
        mount.guest("a", PAGES)?,
        mount.guest("b", PAGES)?,
        mount.guest("c", PAGES)?,
    ];
    if let Some(node) = node {
        for guest in &vms {
            numa::bind(&guest.map, node, numa::STRICT | numa::MOVE).context("mbind")?;
        }
    }
    let sys = ctx.sys();
    // What each VM is filled with, and how many contents and further pages that makes; the last
    // word of the last page is of its own where there is a second byte.
    type Fill = (u8, Option<u8>);
    let steps: [([Fill; 3], u64, u64, u64); 5] = [
        ([(b'c', None), (b'a', None), (b'b', None)], 3, 765, 0),
        ([(b'c', None), (b'b', None), (b'b', None)], 2, 766, 0),
        ([(b'd', None), (b'd', None), (b'd', None)], 1, 767, 0),
        ([(b'd', None), (b'd', None), (b'd', Some(b'e'))], 1, 766, 1),
        ([(0, None), (0, None), (0, None)], 0, 0, 0),
    ];
    for (number, (fills, shared, sharing, unshared)) in steps.into_iter().enumerate() {
        sys.set("run", 0)?;
        for (guest, (byte, last)) in vms.iter().zip(fills) {
            fill(guest, byte);
            if let Some(last) = last {
                let word = u64::from_ne_bytes([last; 8]);
                guest.map.set(PAGES - 1, WORDS - 1, word);
            }
        }
        sys.flat_out()?;
        let zero = if fills[0].0 == 0 { 3 * PAGES as u64 } else { 0 };
        let wanted = (shared, sharing, unshared, zero);
        let what = format!("shared, sharing, unshared, zero of {wanted:?} in step {number}");
        ctx.until(&what, SOON, || {
            let seen = (
                sys.get("pages_shared")?,
                sys.get("pages_sharing")?,
                sys.get("pages_unshared")?,
                sys.get("zero_pages")?,
            );
            Ok((seen == wanted, format!("{seen:?}")))
        })?;
        for (guest, (byte, last)) in vms.iter().zip(fills) {
            for page in 0..PAGES {
                let mut expected = of(byte);
                if let (Some(last), true) = (last, page + 1 == PAGES) {
                    expected[WORDS - 1] = u64::from_ne_bytes([last; 8]);
                }
                page_is(
                    format!("page {page}"),
                    &guest.map.read_page(page),
                    &expected,
                )?;
            }
        }
    }
    Ok(())
}

fn discarded(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 256;
    let (mount, a, b) = merged_twins(ctx, PAGES)?;
    let sys = ctx.sys();
    // Dropped from one process's tables, which keeps the data; and from the file, which does not.
    a.map
        .advise(0, PAGES * PAGE / 2, libc::MADV_DONTNEED)
        .context("MADV_DONTNEED")?;
    a.map
        .advise(PAGES * PAGE / 2, PAGES * PAGE / 4, libc::MADV_REMOVE)
        .context("MADV_REMOVE")?;
    let left = (PAGES * 3 / 4) as u64;
    eq("pages_sharing", sys.get("pages_sharing")?, left)?;
    sys.set("run", 2)?;
    eq("pages_sharing unshared", sys.get("pages_sharing")?, 0)?;
    a.holds(0, PAGES / 2, 1)?;
    a.is_zero(PAGES / 2, PAGES * 3 / 4)?;
    a.holds(PAGES * 3 / 4, PAGES, 1)?;
    b.holds(0, PAGES, 1)?;
    ctx.expect_used("unshared", &mount, "a", 4 * left)?;
    ctx.expect_used("unshared", &mount, "b", 4 * PAGES as u64)
}

/// Merges two VMs, one of them under `prot`, unshares them, and merges them again.
fn under(ctx: &Ctx, prot: libc::c_int) -> Result<()> {
    const PAGES: usize = 64;
    let (_mount, a, b) = twins(ctx, PAGES)?;
    let sys = ctx.sys();
    a.map.protect(0, PAGES * PAGE, prot)?;
    for _ in 0..2 {
        sys.flat_out()?;
        ctx.until_is("pages_sharing", PAGES as u64, SOON)?;
        sys.set("run", 2)?;
        eq("pages_sharing unshared", sys.get("pages_sharing")?, 0)?;
    }
    a.map.protect(0, PAGES * PAGE, RW)?;
    a.holds(0, PAGES, 1)?;
    b.holds(0, PAGES, 1)?;
    a.fill(0, PAGES, 700);
    a.holds(0, PAGES, 700)?;
    b.holds(0, PAGES, 1)
}

fn prot_none(ctx: &Ctx) -> Result<()> {
    under(ctx, libc::PROT_NONE)?;
    // A debugger may read what is merged; a write it may force into private memory only.
    let (_mount, a, _b) = merged_twins(ctx, 4)?;
    let debuggee = Debuggee::start(ctx, &a.file, libc::PROT_NONE, |_| Ok(()))?;
    let (pid, at) = (debuggee.child.pid(), debuggee.addr + PAGE);
    ptrace::attach(pid)?;
    waitpid(pid, None)?;
    let seen = ptrace::read(pid, at as ptrace::AddressType)? as u64;
    eq("peeked word", seen, content::word(2, 0))?;
    let written = ptrace::write(pid, at as ptrace::AddressType, 1);
    fails("a forced write", written, Errno::EIO)?;
    ptrace::detach(pid, None)?;
    debuggee.end(ctx)?;
    eq("pages_sharing", ctx.sys().get("pages_sharing")?, 4)
}

fn read_only_merge(ctx: &Ctx) -> Result<()> {
    under(ctx, R)
}

fn dying(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 16;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let stays = mount.guest("stays", PAGES)?;
    stays.fill(0, PAGES, 1);
    let sys = ctx.sys();
    sys.flat_out()?;
    let before = sys.get("full_scans")?;
    for round in 0..60 {
        let name = format!("dies{round}");
        let file = mount.file(&name, "ram", PAGES)?;
        std::fs::remove_file(mount.at(&name).join("ram"))?;
        let mut child = sys::fork(move || {
            let map = Map::shared(&file, 0, PAGES * PAGE, RW)?;
            for page in 0..PAGES {
                map.write_page(page, &content::page(1 + page as u64));
            }
            drop(file);
            // Half of them while they are merged, half right away.
            if round % 2 == 0 {
                std::thread::sleep(std::time::Duration::from_millis(4));
            }
            map.protect(0, PAGE, libc::PROT_NONE)?;
            map.set(0, 0, 1);
            bail!("a write without access went through")
        })?;
        child.expect_signal(Signal::SIGSEGV, ctx.limit(10.0))?;
    }
    ctx.until_least("full_scans", before + 1, SOON)?;
    ctx.until("the VM that stays alone", 10.0, || {
        let vms = sys.vms()?;
        Ok((vms == ["stays"], format!("{vms:?}")))
    })?;
    eq("pages_sharing", sys.get("pages_sharing")?, 0)?;
    stays.holds(0, PAGES, 1)
}

/// A zone of `--memory-zone file=DIR,shared=on`: a file that loses its name at once.
fn zone(mount: &Mount<'_>, vm: &str, pages: usize) -> Result<Guest> {
    let (fd, path) = mkstemp(&mount.mkdir(vm)?.join("tmpfile_XXXXXX"))?;
    fs::remove_file(&path)?;
    let file = File::from(fd);
    file.set_len((pages * PAGE) as u64)?;
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    let map = Map::with_flags(&file, 0, pages * PAGE, RW, flags)?;
    Ok(Guest {
        name: vm.into(),
        path,
        file,
        map,
    })
}

/// What the balloon, free page reporting and virtio-mem do with memory that the guest does not use.
fn give_back(guest: &Guest, from: usize, to: usize) -> Result<()> {
    let (at, len) = (from * PAGE, (to - from) * PAGE);
    sys::punch(&guest.file, at as u64, len as u64).context("a hole")?;
    let done = guest.map.advise(at, len, libc::MADV_DONTNEED);
    done.context("MADV_DONTNEED")
}

/// Copies what is not a hole, by file offsets.
fn save(guest: &Guest, path: &Path) -> Result<u64> {
    let to = File::create_new(path)?;
    to.set_len(guest.file.metadata()?.len())?;
    let (mut at, mut saved) = (0, 0);
    loop {
        let from = match sys::lseek(&guest.file, at, libc::SEEK_DATA) {
            Err(Errno::ENXIO) => return Ok(saved),
            from => from?,
        };
        at = sys::lseek(&guest.file, from, libc::SEEK_HOLE)?;
        let len = (at - from) as usize;
        let done = sys::pwrite_from(&to, &guest.map, from as usize, len, from as u64)?;
        eq("bytes saved", done, len)?;
        saved += len as u64;
    }
}

fn cloud_hypervisor(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 96;
    const KB: u64 = PAGES as u64 * 4;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let boot = zone(&mount, "web1", PAGES)?;
    // thp=on and mergeable=on; as on other memory, whatever the kernel was built with.
    let anonymous = Map::anonymous(PAGES * PAGE)?;
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_MERGEABLE] {
        let done = |map: &Map| map.advise(0, PAGES * PAGE, advice);
        eq(
            format!("advice {advice}"),
            done(&boot.map),
            done(&anonymous),
        )?;
    }
    // prefault=on
    boot.map
        .advise(0, PAGES * PAGE, libc::MADV_POPULATE_WRITE)
        .context("MADV_POPULATE_WRITE")?;
    ctx.expect_used("prefaulted", &mount, "web1", KB)?;
    boot.fill(0, PAGES, 1);

    // The balloon takes a half, and gives a part of it back, which the guest uses.
    give_back(&boot, 32, 80)?;
    ctx.expect_used("with a balloon", &mount, "web1", KB - 48 * 4)?;
    boot.is_zero(32, 80)?;
    boot.map
        .advise(32 * PAGE, 16 * PAGE, libc::MADV_WILLNEED)
        .context("MADV_WILLNEED")?;
    boot.fill(32, 48, 500);

    // A second zone of the VM is plugged, used, and in part unplugged.
    let plugged = zone(&mount, "web1", PAGES)?;
    plugged.fill(0, PAGES, 1000);
    ctx.expect_used("with two zones", &mount, "web1", 2 * KB - 32 * 4)?;
    give_back(&plugged, 0, 64)?;
    ctx.expect_used("after the unplug", &mount, "web1", 64 * 4 + 32 * 4)?;
    plugged.holds(64, PAGES, 1000)?;

    // The guest is stopped: its snapshot has what it holds, and another VM begins with that.
    let path = ctx.dir.join("memory-ranges");
    eq("bytes of data", save(&boot, &path)?, 64 * PAGE as u64)?;
    let saved = File::open(&path)?;
    let restored = zone(&mount, "web2", PAGES)?;
    let read = sys::pread_into(&saved, &restored.map, 0, PAGES * PAGE, 0)?;
    eq("bytes restored", read, PAGES * PAGE)?;
    for guest in [&boot, &restored] {
        guest.holds(0, 32, 1)?;
        guest.holds(32, 48, 500)?;
        guest.is_zero(48, 80)?;
        guest.holds(80, PAGES, 1)?;
    }

    // A new cloud-hypervisor takes the descriptor over, and the guest goes on there.
    let Guest { file, map, .. } = boot;
    let heir = file.try_clone()?;
    let mut child = sys::fork(move || {
        let map = Map::shared(&heir, 0, PAGES * PAGE, RW)?;
        page_is(
            "a page handed over",
            &map.read_page(40),
            &content::page(540),
        )?;
        map.write_page(40, &content::page(9999));
        Ok(())
    })?;
    drop(map);
    child.expect_ok(ctx.limit(10.0))?;
    let mut seen = vec![0; PAGE];
    file.read_exact_at(&mut seen, 40 * PAGE as u64)?;
    crate::check::bytes_are("what it wrote", &seen, &content::page_bytes(9999))?;

    // What is common to the two is merged as any other VMs' pages are.
    drop(plugged);
    if ctx.is_thinram() {
        let sys = ctx.sys();
        sys.flat_out()?;
        ctx.until_is("pages_sharing", 63, SOON)?;
    }
    restored.holds(0, 32, 1)?;
    restored.holds(32, 48, 500)?;
    drop((file, restored));
    if ctx.is_thinram() {
        ctx.until_no_vm()?;
    }
    Ok(())
}
