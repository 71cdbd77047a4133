// SPDX-License-Identifier: GPL-2.0

//! Debug builds only: whatever can fail does so, one after the other; and an index that cannot grow.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::thread;

use anyhow::{anyhow, bail, ensure, Context, Result};
use nix::errno::Errno;
use nix::sys::signal::Signal;

use crate::check::{bytes_are, eq, fails, page_is, skip, that, within, Code};
use crate::content;
use crate::contention::force;
use crate::ctx::Ctx;
use crate::harness::Case;
use crate::host;
use crate::huge::{self, LARGE, LARGE_KB};
use crate::live::Live;
use crate::operations::{
    merged, Before, Operation, Pair, FURTHER, LARGE_PAGES, ON_DISK, OPERATIONS,
};
use crate::refused;
use crate::sharing::{twins, SOON};
use crate::swap::{self, Disk};
use crate::sys::{self, Map, PAGE, RW};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::thinram(
        "debug/lost-hint",
        "with an index too small for all, equal pages merge yet",
        lost_hint,
    ),
    Case::thinram(
        "debug/late-entry",
        "a shared page that found no place in the index is found once there is one",
        late_entry,
    ),
    Case::thinram(
        "debug/fail-allocation",
        "whatever the module asks for in each operation fails once: nothing is lost",
        fail_allocation,
    )
    .span(120.0),
    Case::thinram(
        "debug/fail-on-disk",
        "the same of what needs a swap disk: objects and shared pages go there and come back, swap_dir",
        fail_on_disk,
    )
    .span(120.0),
    Case::thinram(
        "debug/fail-large",
        "the same of what needs pages of 2 MiB",
        fail_large,
    )
    .span(120.0),
    Case::thinram(
        "debug/fail-swap",
        "whatever it asks for on the way to swap and back fails once: nothing is lost",
        fail_swap,
    )
    .span(120.0),
    Case::thinram(
        "debug/fail-load",
        "whatever it asks for as it is loaded fails once: insmod is refused, the next one works",
        fail_load,
    )
    .span(60.0),
    Case::thinram(
        "debug/fail-swap-write",
        "clusters cannot be written: the pages stay, and go later",
        |ctx| refused::writes_fail(ctx, &all_of(Switch::new(ctx, "fail_swap_write")?)),
    ),
    Case::thinram(
        "debug/fail-swap-read",
        "clusters cannot be read: EIO or SIGBUS, until they can",
        |ctx| refused::reads_fail(ctx, &all_of(Switch::new(ctx, "fail_swap_read")?)),
    ),
    Case::thinram(
        "debug/no-swap-file",
        "a swap file cannot be made, or has no room: the pages stay, and go later",
        no_swap_file,
    )
    .span(30.0),
    Case::thinram(
        "debug/broken-copy",
        "memory that breaks while it is copied: EIO, SIGBUS, no merge, and nothing else changes",
        broken_copy,
    ),
    Case::thinram(
        "debug/broken-object",
        "a compressed page that is damaged: EIO, SIGBUS, and it stays",
        broken_object,
    ),
    Case::thinram(
        "debug/late-answer",
        "what a swap disk says late is nothing to the swap file that came after",
        late_answer,
    ),
    Case::thinram(
        "debug/region-numbers",
        "more memory touched than the host has numbers for: SIGBUS, ENOSPC, the rest is intact",
        region_numbers,
    ),
    Case::thinram(
        "debug/crowded",
        "more mappings of a zero frame and of a shared one than they can have: the rest get their own",
        crowded,
    ),
    Case::thinram(
        "debug/no-large",
        "no 2 MiB in one piece: 4 KiB, and 2 MiB the next time",
        no_large,
    ),
    Case::thinram(
        "debug/split-reserve",
        "without any memory a 2 MiB page is split all the same, from the reserve",
        split_reserve,
    ),
];

/// A file of a debug build in debugfs, put back to 0 when the value goes.
struct Switch(PathBuf);

impl Switch {
    fn new(ctx: &Ctx, name: &str) -> Result<Switch> {
        let path = ctx.setup.debug.join(name);
        if !path.exists() {
            return Err(skip("not a debug build of the module"));
        }
        Ok(Switch(path))
    }

    fn set(&self, value: u64) -> Result<()> {
        self.write(&value.to_string())
    }

    /// From now on every one fails, until the value is set or goes.
    fn fail_all(&self) -> Result<()> {
        self.write("1-")
    }

    fn write(&self, text: &str) -> Result<()> {
        fs::write(&self.0, text).with_context(|| format!("{}", self.0.display()))
    }

    fn get(&self) -> Result<u64> {
        let text = fs::read_to_string(&self.0).with_context(|| format!("{}", self.0.display()))?;
        Ok(text.trim_end().parse()?)
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        if let Err(e) = self.set(0) {
            eprintln!("{e:#}");
        }
    }
}

/// Lets all of a kind fail, or none.
fn all_of(switch: Switch) -> impl Fn(bool) -> Result<()> {
    move |on| {
        if on {
            switch.fail_all()
        } else {
            switch.set(0)
        }
    }
}

fn no_swap_file(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 64;
    for kind in ["fail_swap_file", "fail_swap_room"] {
        let fail = Switch::new(ctx, kind)?;
        let disk = Disk::again(ctx, kind)?;
        let sys = ctx.sys();
        let mount = ctx.mount("m", "size=16M,domain=lab")?;
        let guest = mount.guest("web", PAGES)?;
        guest.fill_noise(0, PAGES);
        let refused = sys.get("swap_outs_refused_no_space")?;
        fail.fail_all()?;
        force(ctx, "hard")?;
        ctx.until_least("swap_outs_refused_no_space", refused + 1, SOON)?;
        force(ctx, "none")?;
        eq(
            format!("swapped_kb with {kind}"),
            guest.sysfs(ctx).get("swapped_kb")?,
            0,
        )?;
        guest.holds_noise(0, PAGES)?;
        fail.set(0)?;
        swap::push_out(ctx, &guest, PAGES)?;
        guest.holds_noise(0, PAGES)?;
        guest.sysfs(ctx).stat()?.check_sum()?;
        drop(guest);
        drop(mount);
        ctx.until_no_vm()?;
        disk.unmount()?;
    }
    Ok(())
}

/// One of a kind fails: `access` ends with EIO, and works the next time.
fn fails_once(what: &str, fail: &Switch, access: &mut dyn FnMut() -> io::Result<()>) -> Result<()> {
    fail.set(1)?;
    fails(what, access(), Errno::EIO)?;
    eq(format!("{what}: failures to come"), fail.get()?, 0)?;
    access().with_context(|| format!("{what}, the second time"))
}

fn broken_copy(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 8;
    let fail = Switch::new(ctx, "fail_copy")?;
    let (_mount, a, b) = twins(ctx, PAGES)?;
    let sys = ctx.sys();
    let all = PAGES as u64;
    sys.flat_out()?;
    ctx.until_is("pages_sharing", all, SOON)?;
    sys.set("run", 0)?;
    let intact = || -> Result<()> {
        a.holds(0, PAGES, 1)?;
        b.holds(0, PAGES, 1)?;
        a.sysfs(ctx).stat()?.check_sum()
    };
    let bytes = content::pages_bytes(1, 1);
    fails_once("write(2) to a shared page", &fail, &mut || {
        a.file.write_all_at(&bytes, 0)
    })?;
    intact()?;
    if !swap::is_uml()? {
        // The first SIGBUS has Rust's handler try again.
        fail.fail_all()?;
        host::touch_kills(ctx, &a, 1, true)?;
        fail.set(0)?;
        intact()?;
    }
    let sharing = sys.get("pages_sharing")?;
    fail.set(1)?;
    fails("run 2", sys.try_set("run", b"2"), Errno::EIO)?;
    eq("pages_sharing after it", sys.get("pages_sharing")?, sharing)?;
    sys.set("run", 2)?;
    eq("pages_sharing after run 2", sys.get("pages_sharing")?, 0)?;
    intact()?;
    let refused = sys.get("merges_refused_poisoned")?;
    fail.fail_all()?;
    sys.set("run", 1)?;
    ctx.until_least("merges_refused_poisoned", refused + all, SOON)?;
    eq("pages_sharing meanwhile", sys.get("pages_sharing")?, 0)?;
    intact()?;
    fail.set(0)?;
    ctx.until_is("pages_sharing", all, 2.0 * SOON)?;
    intact()
}

fn broken_object(ctx: &Ctx) -> Result<()> {
    let fail = Switch::new(ctx, "fail_decompress")?;
    let sys = ctx.sys();
    sys.set("compress_max_percent", 100)?;
    for before in [Before::Compressed, Before::Packed] {
        let pair = Pair::new(ctx, before)?;
        let mut page = vec![0; PAGE];
        fails_once(&format!("read(2), {before:?}"), &fail, &mut || {
            pair.a.file.read_exact_at(&mut page, 0)
        })?;
        bytes_are("page 0", &page, &content::pages_bytes(1, 1))?;
        let bytes = content::pages_bytes(2, 1);
        fails_once(&format!("write(2), {before:?}"), &fail, &mut || {
            pair.a.file.write_all_at(&bytes, PAGE as u64)
        })?;
        if !swap::is_uml()? {
            for (page, write) in [(2, false), (3, true)] {
                let failed = sys.get("decompressions_failed")?;
                fail.fail_all()?;
                host::touch_kills(ctx, &pair.a, page, write)?;
                fail.set(0)?;
                let failed = sys.get("decompressions_failed")? - failed;
                that("decompressions_failed grows", failed > 0)?;
            }
        }
        pair.intact(&merged())?;
        drop(pair);
        ctx.until_no_vm()?;
    }
    Ok(())
}

fn no_large(ctx: &Ctx) -> Result<()> {
    let fail = Switch::new(ctx, "fail_huge_frame")?;
    huge::always(ctx)?;
    let sys = ctx.sys();
    sys.set("collapse_per_sec", 0)?;
    sys.set("collapse_after_secs", 0)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", 3 * LARGE)?;
    let refused = || sys.get("large_pages_refused_no_memory");
    // What a read needs is there: the region, and the folio of zeroes.
    guest.is_zero(0, 3 * LARGE)?;
    let before = refused()?;
    fail.set(1)?;
    guest.fill(0, 1, 1);
    eq("2 MiB asked for before the one that fails", fail.get()?, 0)?;
    eq("refused by a fault", refused()? - before, 1)?;
    huge::huge_is(ctx, "after a fault without one", "web", 0)?;
    ctx.expect_used("after a fault without one", &mount, "web", 4)?;
    guest.fill(1, LARGE, 1);
    ctx.expect_used("of 512 small ones", &mount, "web", LARGE_KB)?;
    // Preallocating gets its 2 MiB as well, in pieces.
    fail.set(1)?;
    sys::fallocate(&guest.file, 0, (LARGE * PAGE) as i64, (LARGE * PAGE) as i64)?;
    eq("refused by fallocate", refused()? - before, 2)?;
    huge::huge_is(ctx, "after fallocate without one", "web", 0)?;
    ctx.expect_used("after fallocate", &mount, "web", 2 * LARGE_KB)?;
    guest.fill(LARGE, 2 * LARGE, 1);
    // A collapse comes again a second later.
    let collapses = sys.get("collapses_refused_no_memory")?;
    fail.set(1)?;
    sys.set("collapse_per_sec", 1)?;
    ctx.until_least("collapses_refused_no_memory", collapses + 1, 20.0)?;
    ctx.until("huge_kb of 4096", 20.0, || {
        let seen = sys.vm("web").get("huge_kb")?;
        Ok((seen == 2 * LARGE_KB, seen.to_string()))
    })?;
    guest.fill(2 * LARGE, 3 * LARGE, 1);
    huge::huge_is(ctx, "the next time", "web", 3 * LARGE_KB)?;
    guest.holds(0, 3 * LARGE, 1)?;
    ctx.expect_used("at the end", &mount, "web", 3 * LARGE_KB)
}

fn split_reserve(ctx: &Ctx) -> Result<()> {
    /// In a second the splitter comes by on its own.
    const WAIT: f64 = 4.0;
    let fail = Switch::new(ctx, "fail_frame")?;
    huge::always(ctx)?;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", 2 * LARGE)?;
    huge::fill_equal(&guest, 0);
    huge::fill_equal(&guest, 1);
    let holds = || -> Result<()> {
        guest.holds(0, LARGE, 1)?;
        for page in 0..LARGE {
            let seen = guest.map.read_page(LARGE + page);
            let expected = content::page(page as u64 + 1);
            page_is(format!("page {page} of the second"), &seen, &expected)?;
        }
        Ok(())
    };
    sys.flat_out()?;
    ctx.passes(2)?;
    huge::huge_is(ctx, "before", "web", 2 * LARGE_KB)?;
    eq(
        "splittable_kb",
        sys.vm("web").get("splittable_kb")?,
        LARGE_KB,
    )?;
    // The reserve was filled when the splitter came by, a pass or a second ago.
    thread::sleep(ctx.limit(WAIT / 2.0));
    let refused = sys.get("splits_refused_no_memory")?;
    let splits = sys.get("splits")?;
    fail.fail_all()?;
    force(ctx, "clear")?;
    ctx.until_least("splits", splits + 1, WAIT)?;
    // Nothing comes after it that would fill the reserve again: no more is split, nothing is lost.
    ctx.until_least("splits_refused_no_memory", refused + 2, WAIT)?;
    eq("splits without memory", sys.get("splits")? - splits, 1)?;
    huge::huge_is(ctx, "without memory", "web", LARGE_KB)?;
    ctx.expect_used("without memory", &mount, "web", 2 * LARGE_KB)?;
    holds()?;
    fail.set(0)?;
    ctx.until_is("pages_sharing", LARGE as u64, 4.0 * SOON)?;
    eq("splits with memory", sys.get("splits")? - splits, 2)?;
    holds()
}

fn lost_hint(ctx: &Ctx) -> Result<()> {
    // The index begins with one page: 666 entries.
    const CONTENTS: usize = 6000;
    const EQUAL: usize = 64;
    let growth = Switch::new(ctx, "break_index_growth")?;
    growth.set(1)?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let (a, b) = (mount.guest("a", CONTENTS)?, mount.guest("b", EQUAL)?);
    a.fill(0, CONTENTS, 1);
    let twin = |page: usize| page * (CONTENTS / EQUAL);
    for page in 0..EQUAL {
        b.map
            .write_page(page, &content::page(1 + twin(page) as u64));
    }
    let sys = ctx.sys();
    let passes = sys.get("full_scans")?;
    sys.flat_out()?;
    ctx.passes(2)?;
    let early = sys.get("pages_sharing")?;
    that(
        format!("{early} of {EQUAL} pages merged in the first passes: the index holds all of them"),
        early < EQUAL as u64,
    )?;
    ctx.until_is("pages_sharing", EQUAL as u64, 4.0 * SOON)?;
    sys.set("run", 0)?;
    println!(
        "{early} merged at first, all in {} passes",
        sys.get("full_scans")? - passes
    );
    a.holds(0, CONTENTS, 1)?;
    for page in 0..EQUAL {
        let expected = content::page(1 + twin(page) as u64);
        page_is("an equal page", &b.map.read_page(page), &expected)?;
    }
    Ok(())
}

fn late_entry(ctx: &Ctx) -> Result<()> {
    // More than the one page of the index takes: 566 of shared pages.
    const CONTENTS: usize = 1024;
    let growth = Switch::new(ctx, "break_index_growth")?;
    growth.set(1)?;
    let (mount, a, b) = twins(ctx, CONTENTS)?;
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.until_is("pages_sharing", CONTENTS as u64, 4.0 * SOON)?;
    let c = mount.guest("c", CONTENTS)?;
    c.fill(0, CONTENTS, 1);
    // Those that are found are found in the second pass.
    ctx.passes(4)?;
    let found = sys.get("pages_sharing")? - CONTENTS as u64;
    within("found in a full index", found, 1, CONTENTS as u64 - 1)?;
    growth.set(0)?;
    ctx.until_is("pages_sharing", 2 * CONTENTS as u64, 4.0 * SOON)?;
    for guest in [&a, &b, &c] {
        guest.holds(0, CONTENTS, 1)?;
    }
    Ok(())
}

fn late_answer(ctx: &Ctx) -> Result<()> {
    /// Pages that do not compress: they fill a cluster, and one waits in the buffer of the next.
    const PAGES: usize = 8;
    const WRITTEN: u64 = PAGES as u64 - 1;
    let hold = Switch::new(ctx, "hold_reads")?;
    let disk = Disk::new(ctx)?;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", PAGES)?;
    let out = |times: u64| -> Result<()> {
        guest.fill_noise(0, PAGES);
        swap::push_out(ctx, &guest, PAGES)?;
        ctx.until(&format!("{times} clusters written"), SOON, || {
            let seen = guest.sysfs(ctx).get("swap_outs")?;
            Ok((seen == times * WRITTEN, seen.to_string()))
        })
    };
    let read = || -> io::Result<Vec<u8>> {
        let mut seen = vec![0; PAGES * PAGE];
        guest.file.read_exact_at(&mut seen, 0)?;
        Ok(seen)
    };
    let came = |answers: u64| {
        ctx.until(&format!("{answers} answers"), SOON, || {
            let seen = hold.get()?;
            Ok((seen == answers, seen.to_string()))
        })
    };
    let corrupt = sys.get("swap_objects_corrupt")?;
    out(1)?;
    hold.set(1)?;
    thread::scope(|s| -> Result<()> {
        let early = s.spawn(read);
        let work = || -> Result<()> {
            came(1)?;
            // Nothing is left that the answer is for, and the file goes.
            sys::punch(&guest.file, 0, (PAGES * PAGE) as u64)?;
            let other = disk.path.join("other");
            fs::create_dir(&other)?;
            sys.set("swap_dir", other.display())?;
            out(2)
        };
        let done = work();
        let late = s.spawn(read);
        let done = done.and_then(|()| came(2));
        // The first comes while the other file's same cluster is read.
        hold.set(2)?;
        thread::sleep(ctx.limit(0.2));
        hold.set(0)?;
        done?;
        early
            .join()
            .map_err(|_| anyhow!("the early reader panicked"))??;
        let seen = late
            .join()
            .map_err(|_| anyhow!("the late reader panicked"))?
            .context("the late reader")?;
        let expected: Vec<u8> = (0..PAGES)
            .flat_map(|page| content::bytes_of(&content::noise(page as u64)))
            .collect();
        bytes_are("what the other file has", &seen, &expected)
    })?;
    eq(
        "swap_objects_corrupt",
        sys.get("swap_objects_corrupt")? - corrupt,
        0,
    )
}

fn crowded(ctx: &Ctx) -> Result<()> {
    // Of zeroes there are eight frames; the switch leaves each of them 16 references.
    const REFERENCES: u64 = 16;
    const ZEROES: u64 = 8 * REFERENCES;
    const PAGES: usize = 1024;
    const HALF: usize = PAGES / 2;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", PAGES)?;
    let vm = ctx.sys().vm("web");
    for page in 0..HALF {
        guest.map.write_page(page, &content::page(7));
    }
    ctx.sys().flat_out()?;
    ctx.until_is("pages_sharing", HALF as u64 - 1, SOON)?;
    ctx.sys().set("run", 0)?;
    let few = Switch::new(ctx, "break_references")?;
    few.set(1)?;
    let sum: u64 = (HALF..PAGES).map(|page| guest.map.get(page, 0)).sum();
    eq("sum of zeroes", sum, 0)?;
    let own = vm.get("private_kb")? / 4;
    within(
        "frames instead of zeroes",
        own,
        HALF as u64 - ZEROES,
        HALF as u64,
    )?;
    // Nothing shows the shared frame until it is read.
    for page in 0..HALF {
        page_is(
            "an equal page",
            &guest.map.read_page(page),
            &content::page(7),
        )?;
    }
    let shared = vm.get("shared_kb")? / 4;
    within("pages that share", shared, 1, REFERENCES)?;
    few.set(0)?;
    for page in 0..HALF {
        guest.map.set(HALF + page, 1, page as u64);
        page_is(
            "an equal page",
            &guest.map.read_page(page),
            &content::page(7),
        )?;
    }
    Ok(())
}

fn region_numbers(ctx: &Ctx) -> Result<()> {
    // So many the switch leaves.
    const NUMBERS: usize = 8;
    const BEYOND: usize = NUMBERS * LARGE;
    let few = Switch::new(ctx, "break_region_numbers")?;
    few.set(1)?;
    let mount = ctx.mount("m", "size=64M")?;
    let guest = mount.guest("web", BEYOND + LARGE)?;
    let sys = ctx.sys();
    let refused = || -> Result<()> {
        for write in [false, true] {
            sys::fork(|| {
                let map = Map::shared(&guest.file, 0, (BEYOND + LARGE) * PAGE, RW)?;
                if write {
                    map.set(BEYOND, 0, 1);
                } else {
                    map.get(BEYOND, 0);
                }
                bail!("a page without a number was touched")
            })?
            .expect_signal(Signal::SIGBUS, ctx.limit(10.0))?;
        }
        let at = (BEYOND * PAGE) as i64;
        eq(
            "write(2)",
            sys::pwrite(&guest.file, &[1; 64], at),
            Err(Errno::ENOSPC),
        )?;
        let allocated = sys::fallocate(&guest.file, 0, at, PAGE as i64);
        eq("fallocate", allocated, Err(Errno::ENOSPC))
    };
    guest.fill(0, BEYOND, 1);
    let empty = || sys.vm("web").get("empty_kb");
    let before = empty()?;
    refused()?;
    eq("empty_kb after the refusals", empty()?, before)?;
    guest.holds(0, BEYOND, 1)?;
    // A hole leaves the region its number, the end of the file does not.
    sys::punch(&guest.file, 0, (LARGE * PAGE) as u64)?;
    refused()?;
    let other = mount.guest("other", 1)?;
    let written = sys::pwrite(&other.file, &[1; 64], 0);
    eq("write(2) to another VM", written, Err(Errno::ENOSPC))?;
    few.set(0)?;
    guest.fill(BEYOND, BEYOND + 1, 1);
    guest.is_zero(0, LARGE)?;
    guest.holds(LARGE, BEYOND + 1, 1)?;
    fs::remove_file(&guest.path)?;
    drop(guest);
    few.set(1)?;
    other.fill(0, 1, 1);
    other.holds(0, 1, 1)
}

/// More failures than any of the operations comes to.
const MOST: u64 = 20_000;

/// What lets requests fail, one at a time.
pub trait Failing {
    /// Lets the `nth` from now on fail.
    fn arm(&self, nth: u64) -> Result<()>;
    /// Lets all succeed again; whether one failed.
    fn disarm(&self) -> Result<bool>;
    /// Which errors may come of it.
    fn errors(&self) -> &'static [Errno];
}

impl Failing for Switch {
    fn arm(&self, nth: u64) -> Result<()> {
        self.set(nth)
    }

    fn disarm(&self) -> Result<bool> {
        let failed = self.get()? == 0;
        self.set(0)?;
        Ok(failed)
    }

    fn errors(&self) -> &'static [Errno] {
        &[Errno::ENOMEM, Errno::ENOSPC]
    }
}

/// The error of a system call that `e` is about.
pub fn errno_of(e: &anyhow::Error) -> Option<Errno> {
    e.chain().find_map(|cause| {
        let io = cause.downcast_ref::<io::Error>().map(Code::code);
        io.or(cause.downcast_ref::<Errno>().copied())
    })
}

/// What needs nothing of the module's that may be refused.
const WITHOUT: [&str; 2] = ["read(2)", "large_pages of a VM"];

fn fail_all(ctx: &Ctx, operations: &[Operation], next: &dyn Fn(u64) -> u64) -> Result<()> {
    let countdown = Switch::new(ctx, "fail_allocation")?;
    for operation in operations {
        let failures = fail_each(ctx, operation, &countdown, next)?;
        that(
            format!("{} allocates something", operation.name),
            failures > 0 || WITHOUT.contains(&operation.name),
        )?;
    }
    Ok(())
}

fn fail_allocation(ctx: &Ctx) -> Result<()> {
    fail_all(ctx, OPERATIONS, &|nth| nth + 1)?;
    fail_all(ctx, FURTHER, &|nth| nth + 1)
}

fn fail_on_disk(ctx: &Ctx) -> Result<()> {
    drop(Switch::new(ctx, "fail_allocation")?);
    let disk = Disk::new(ctx)?;
    // A file that could not be made or grow is tried again after 8 s: one of three requests fails, by
    // the seed another each time.
    let first = 2 + ctx.setup.seed % 3;
    fail_all(ctx, ON_DISK, &|nth| if nth == 1 { first } else { nth + 3 })?;
    disk.unmount()
}

fn fail_large(ctx: &Ctx) -> Result<()> {
    drop(Switch::new(ctx, "fail_allocation")?);
    huge::always(ctx)?;
    // A split makes some 500 requests, all alike but the first and the last.
    fail_all(ctx, LARGE_PAGES, &|nth| nth + 1 + nth / 4)
}

/// Carries the operation out while its first request fails, then while a later one does, as `next` says,
/// and so on until all its requests are over before the one that would fail. How often one did.
pub fn fail_each(
    ctx: &Ctx,
    operation: &Operation,
    failing: &dyn Failing,
    next: &dyn Fn(u64) -> u64,
) -> Result<u64> {
    let (mut refused, mut failures, mut nth) = (0, 0, 1);
    let mut live = Live::now(ctx)?;
    let mut once = |nth| {
        let failed = try_once(ctx, operation, failing, nth, &mut refused)?;
        live.until_back(ctx).map(|()| failed)
    };
    while once(nth).with_context(|| format!("{}, failure {nth}", operation.name))? {
        failures += 1;
        nth = next(nth);
        ensure!(nth < MOST, "{}: no end of failures", operation.name);
    }
    println!(
        "{}: {failures} failures among {nth}, {refused} refusals",
        operation.name
    );
    Ok(failures)
}

/// Lets the `nth` request of the operation fail; false if it made fewer.
fn try_once(
    ctx: &Ctx,
    operation: &Operation,
    failing: &dyn Failing,
    nth: u64,
    refused: &mut u64,
) -> Result<bool> {
    let pair = Pair::new(ctx, operation.before)?;
    let sys = ctx.sys();
    let sharing = sys.get("pages_sharing")?;
    failing.arm(nth)?;
    let done = (operation.run)(&pair);
    let failed = failing.disarm()?;
    let done = match done {
        // The way there is refused as well as what it leads to.
        Err(e) if failed => Err(errno_of(&e).ok_or(e)?.into()),
        done => done?,
    };
    match done {
        Ok(()) => {}
        Err(e) if failed && failing.errors().contains(&e.code()) => {
            *refused += 1;
            // A knob that is refused has changed nothing.
            if operation.before == Before::Merged && (operation.done)() == merged() {
                eq("pages_sharing", sys.get("pages_sharing")?, sharing)?;
                pair.intact(&merged())?;
            }
            match (operation.run)(&pair)? {
                Ok(()) => {}
                Err(e) => bail!("the second time, with memory: {e}"),
            }
        }
        Err(e) => bail!("it is refused with {e}"),
    }
    pair.intact(&(operation.done)())?;
    // As every case begins.
    sys.set("run", 0)?;
    sys.set("share_scope", "domain")?;
    let Pair { mount, a, b, .. } = pair;
    drop((a, b));
    drop(mount);
    ctx.until_no_vm()?;
    Ok(failed)
}

/// A VM's pages go to swap and come back, again and again, until each request on the way has failed.
pub fn fail_swapping(ctx: &Ctx, failing: &dyn Failing, next: &dyn Fn(u64) -> u64) -> Result<()> {
    // Several clusters of the swap file.
    const PAGES: usize = 48;
    let noise = |page: usize| content::bytes_of(&content::noise(page as u64));
    let disk = Disk::new(ctx)?;
    // A page that is there, so that no write to it asks for memory.
    let path = ctx.dir.join("copy");
    fs::write(&path, [0; PAGE])?;
    let copy = File::options().read(true).write(true).open(&path)?;
    let mut live = Live::now(ctx)?;
    let (mut failures, mut refused, mut nth) = (0, 0, 1);
    loop {
        let mount = ctx.mount("m", "size=16M,domain=lab")?;
        let guest = mount.guest("web", PAGES)?;
        guest.fill_noise(0, PAGES);
        let back = || {
            let mut page = vec![1; PAGE];
            guest.file.read_exact_at(&mut page, 0)?;
            bytes_are("page 0 by read(2)", &page, &noise(0))?;
            // By the mapping; what cannot be had there is EFAULT here, where a load would be killed.
            for number in 0..PAGES {
                let from = number * PAGE;
                let length = sys::pwrite_from(&copy, &guest.map, from, PAGE, 0)?;
                eq("bytes of a page", length, PAGE)?;
                copy.read_exact_at(&mut page, 0)?;
                bytes_are(format!("page {number}"), &page, &noise(number))?;
            }
            Ok(())
        };
        let there_and_back = || swap::push_out(ctx, &guest, PAGES).and_then(|()| back());
        let unread = ctx.sys().get("swap_reads_failed")?;
        failing.arm(nth)?;
        let done = there_and_back();
        let failed = failing.disarm()?;
        if let Err(e) = done {
            let errno = errno_of(&e);
            let expected = errno.is_some_and(|errno| failing.errors().contains(&errno));
            let unread = ctx.sys().get("swap_reads_failed")? - unread;
            if !(failed && expected) || (errno == Some(Errno::EIO) && unread == 0) {
                return Err(e.context(format!("failure {nth}, {unread} reads failed")));
            }
            refused += 1;
            if unread > 0 {
                // It is tried again after a second.
                ctx.until("what was not read", 10.0, || {
                    let seen = back();
                    Ok((seen.is_ok(), format!("{seen:?}")))
                })?;
            }
        }
        there_and_back().with_context(|| format!("the second time, after failure {nth}"))?;
        guest.holds_noise(0, PAGES)?;
        guest.sysfs(ctx).stat()?.check_sum()?;
        drop(guest);
        drop(mount);
        ctx.until_no_vm()?;
        (live.until_back(ctx)).with_context(|| format!("after failure {nth}"))?;
        if !failed {
            break;
        }
        failures += 1;
        nth = next(nth);
        ensure!(nth < MOST, "no end of failures");
    }
    println!("{failures} failures among {nth}, {refused} refusals");
    that("swapping allocates something", failures > 0)?;
    disk.unmount()
}

fn fail_swap(ctx: &Ctx) -> Result<()> {
    let countdown = Switch::new(ctx, "fail_allocation")?;
    fail_swapping(ctx, &countdown, &|nth| nth + 1)
}

/// Unloads the module, and loads it while its first request fails, then its second, until it loads
/// without. `attempt` loads it while the `nth` fails, and says whether one did; `errors` may come of it.
pub fn fail_loading(
    ctx: &Ctx,
    next: &dyn Fn(u64) -> u64,
    errors: &[Errno],
    attempt: impl Fn(&File, u64) -> Result<(nix::Result<()>, bool)>,
) -> Result<()> {
    let Some(ko) = &ctx.setup.ko else {
        return Err(skip("no --ko, or the module is built in"));
    };
    let file = File::open(ko).with_context(|| format!("open {}", ko.display()))?;
    let sys = ctx.sys();
    // A mount that just ended may still be on its way out.
    let unload = || {
        ctx.until("the module to go", 20.0, || {
            let gone = sys::remove_module("thinram");
            Ok((gone.is_ok(), format!("{gone:?}")))
        })
    };
    let (mut failures, mut refused, mut nth) = (0, 0, 1);
    loop {
        unload()?;
        eq("sysfs after rmmod", sys.exists(), false)?;
        let (loaded, failed) = attempt(&file, nth)?;
        match loaded {
            Ok(()) => {}
            Err(e) if failed && errors.contains(&e) => {
                refused += 1;
                eq(format!("sysfs after failure {nth}"), sys.exists(), false)?;
                sys::insert_module(&file, "").context("insmod, with memory")?;
            }
            Err(e) => {
                // For the cases that come after this one.
                sys::insert_module(&file, "").context("insmod, with memory")?;
                bail!("failure {nth}: insmod ends with {e}");
            }
        }
        let mount = ctx.mount("m", "size=16M,domain=lab")?;
        let guest = mount.guest("web", 4)?;
        guest.fill(0, 4, 1);
        guest.holds(0, 4, 1)?;
        drop(guest);
        drop(mount);
        ctx.until_no_vm()?;
        if !failed {
            break;
        }
        failures += 1;
        nth = next(nth);
        ensure!(nth < MOST, "no end of failures");
    }
    println!("{failures} failures among {nth}, {refused} refusals");
    that("loading allocates something", refused > 0)
}

fn fail_load(ctx: &Ctx) -> Result<()> {
    // Before it is unloaded: whether it has a parameter of that name.
    drop(Switch::new(ctx, "fail_allocation")?);
    let attempt = |file: &File, nth: u64| {
        let loaded = sys::insert_module(file, &format!("fail_allocation={nth}"));
        let failed = match loaded {
            Ok(()) => Switch::new(ctx, "fail_allocation")?.disarm()?,
            Err(_) => true,
        };
        Ok((loaded, failed))
    };
    fail_loading(ctx, &|nth| nth + 1, &[Errno::ENOMEM], attempt)
}
