// SPDX-License-Identifier: GPL-2.0

//! Debug builds only: allocations that fail one after the other, and an index that cannot grow.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{bail, ensure, Context, Result};
use nix::errno::Errno;

use crate::check::{bytes_are, eq, page_is, skip, that, Code};
use crate::content::{self, pages_bytes};
use crate::ctx::{Ctx, Guest, Mount};
use crate::harness::Case;
use crate::huge::{self, LARGE, LARGE_KB};
use crate::sharing::SOON;
use crate::sys::{self, PAGE};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::thinram(
        "debug/lost-hint",
        "with an index too small for all, equal pages merge yet",
        lost_hint,
    ),
    Case::thinram(
        "debug/fail-allocation",
        "each allocation of each operation fails once: nothing is lost",
        fail_allocation,
    ),
    Case::thinram(
        "debug/no-large",
        "no 2 MiB in one piece: 4 KiB, and 2 MiB the next time",
        no_large,
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
        fs::write(&self.0, value.to_string()).with_context(|| format!("{}", self.0.display()))
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

fn no_large(ctx: &Ctx) -> Result<()> {
    let fail = Switch::new(ctx, "fail_allocation")?;
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
    eq("allocations left to the one that fails", fail.get()?, 0)?;
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

const PAGES: usize = 8;

/// What each operation works on: `a` and `b` hold the same pages.
struct Pair<'a> {
    ctx: &'a Ctx,
    mount: Mount<'a>,
    a: Guest,
    b: Guest,
}

/// An operation that allocates.
struct Operation {
    name: &'static str,
    /// It works on pages that were merged, else on pages that nobody touched.
    merged: bool,
    /// Carries it out. What it may refuse comes back as an error of the inner result.
    run: fn(&Pair<'_>) -> Result<io::Result<()>>,
    /// What all pages of `a` hold afterwards; what `b` holds is what it held.
    done: fn() -> Vec<u8>,
}

fn merged() -> Vec<u8> {
    pages_bytes(1, PAGES)
}

fn zeroes() -> Vec<u8> {
    vec![0; PAGES * PAGE]
}

fn rewritten() -> Vec<u8> {
    pages_bytes(900, PAGES)
}

fn cut() -> Vec<u8> {
    let mut bytes = merged();
    bytes[100..3 * PAGE + 200].fill(0);
    bytes
}

fn set(pair: &Pair<'_>, name: &str, value: &str) -> Result<io::Result<()>> {
    Ok(pair.ctx.sys().try_set(name, value.as_bytes()))
}

fn set_vm(pair: &Pair<'_>, name: &str, value: &str) -> Result<io::Result<()>> {
    Ok(pair.a.sysfs(pair.ctx).try_set(name, value.as_bytes()))
}

const OPERATIONS: &[Operation] = &[
    Operation {
        name: "read faults",
        merged: false,
        run: |pair| pair.a.is_zero(0, PAGES).map(Ok),
        done: zeroes,
    },
    Operation {
        name: "write faults",
        merged: false,
        run: |pair| {
            pair.a.fill(0, PAGES, 900);
            Ok(Ok(()))
        },
        done: rewritten,
    },
    Operation {
        name: "write faults on shared pages",
        merged: true,
        run: |pair| {
            pair.a.fill(0, PAGES, 900);
            Ok(Ok(()))
        },
        done: rewritten,
    },
    Operation {
        name: "write(2)",
        merged: false,
        run: |pair| Ok(pair.a.file.write_all_at(&rewritten(), 0)),
        done: rewritten,
    },
    Operation {
        name: "write(2) to shared pages",
        merged: true,
        run: |pair| Ok(pair.a.file.write_all_at(&rewritten(), 0)),
        done: rewritten,
    },
    Operation {
        name: "read(2)",
        merged: true,
        run: |pair| Ok(pair.a.file.read_exact_at(&mut merged(), 0)),
        done: merged,
    },
    Operation {
        name: "fallocate",
        merged: false,
        run: |pair| {
            let len = (PAGES * PAGE) as i64;
            Ok(sys::fallocate(&pair.a.file, 0, 0, len).map_err(io::Error::from))
        },
        done: zeroes,
    },
    Operation {
        name: "a hole that begins and ends in shared pages",
        merged: true,
        run: |pair| {
            let len = 3 * PAGE as u64 + 100;
            Ok(sys::punch(&pair.a.file, 100, len).map_err(io::Error::from))
        },
        done: cut,
    },
    Operation {
        name: "merge",
        merged: false,
        run: |pair| {
            pair.a.fill(0, PAGES, 1);
            pair.ctx.sys().flat_out()?;
            pair.ctx.until_is("pages_sharing", PAGES as u64, SOON)?;
            Ok(Ok(()))
        },
        done: merged,
    },
    Operation {
        name: "run 2",
        merged: true,
        run: |pair| set(pair, "run", "2"),
        done: merged,
    },
    Operation {
        name: "share_scope vm",
        merged: true,
        run: |pair| set(pair, "share_scope", "vm"),
        done: merged,
    },
    Operation {
        name: "another domain",
        merged: true,
        run: |pair| set_vm(pair, "domain", "other"),
        done: merged,
    },
    Operation {
        name: "share 0",
        merged: true,
        run: |pair| set_vm(pair, "share", "0"),
        done: merged,
    },
];

/// More allocations than any of the operations makes.
const MOST: u64 = 200;

fn fail_allocation(ctx: &Ctx) -> Result<()> {
    let countdown = Switch::new(ctx, "fail_allocation")?;
    for operation in OPERATIONS {
        let mut refused = 0;
        let mut nth = 1;
        // Until it is over before the one that would fail.
        while try_once(ctx, operation, &countdown, nth, &mut refused)
            .with_context(|| format!("{}, allocation {nth} fails", operation.name))?
        {
            nth += 1;
            ensure!(nth < MOST, "{}: no end of allocations", operation.name);
        }
        println!(
            "{}: {} allocations, {refused} refusals",
            operation.name,
            nth - 1
        );
        that(
            format!("{} allocates something", operation.name),
            nth > 1 || operation.name == "read(2)",
        )?;
    }
    Ok(())
}

/// Lets the `nth` allocation of the operation fail; false if it made fewer.
fn try_once(
    ctx: &Ctx,
    operation: &Operation,
    countdown: &Switch,
    nth: u64,
    refused: &mut u64,
) -> Result<bool> {
    let mount = ctx.mount("m", "size=16M,domain=lab")?;
    let (a, b) = (mount.guest("a", PAGES)?, mount.guest("b", PAGES)?);
    b.fill(0, PAGES, 1);
    let sys = ctx.sys();
    if operation.merged {
        a.fill(0, PAGES, 1);
        sys.flat_out()?;
        ctx.until_is("pages_sharing", PAGES as u64, SOON)?;
        sys.set("run", 0)?;
    }
    let sharing = sys.get("pages_sharing")?;
    let pair = Pair { ctx, mount, a, b };
    countdown.set(nth)?;
    let done = (operation.run)(&pair)?;
    let failed = countdown.get()? == 0;
    countdown.set(0)?;
    match done {
        Ok(()) => {}
        Err(e) if failed && [Errno::ENOMEM, Errno::ENOSPC].contains(&e.code()) => {
            *refused += 1;
            // A knob that is refused has changed nothing.
            if operation.merged && (operation.done)() == merged() {
                eq("pages_sharing", sys.get("pages_sharing")?, sharing)?;
                intact(&pair, &merged())?;
            }
            match (operation.run)(&pair)? {
                Ok(()) => {}
                Err(e) => bail!("the second time, with memory: {e}"),
            }
        }
        Err(e) => bail!("it is refused with {e}"),
    }
    intact(&pair, &(operation.done)())?;
    // As every case begins.
    sys.set("run", 0)?;
    sys.set("share_scope", "domain")?;
    let Pair { mount, a, b, .. } = pair;
    drop((a, b));
    drop(mount);
    ctx.until("no VM", 5.0, || {
        let left = sys.vms()?;
        Ok((left.is_empty(), format!("{left:?}")))
    })?;
    Ok(failed)
}

/// `a` holds `expected`, by its mapping and its file; `b` what it always held; sums are right.
fn intact(pair: &Pair<'_>, expected: &[u8]) -> Result<()> {
    let mut seen = vec![0; PAGES * PAGE];
    pair.a.file.read_exact_at(&mut seen, 0)?;
    bytes_are("a by read(2)", &seen, expected)?;
    for page in 0..PAGES {
        let of_page = &expected[page * PAGE..(page + 1) * PAGE];
        let words: Vec<u64> = of_page
            .chunks_exact(8)
            .map(|word| word.try_into().map(u64::from_ne_bytes))
            .collect::<Result<_, _>>()?;
        let wanted = words
            .as_slice()
            .try_into()
            .context("a page's worth of words")?;
        page_is("a by its mapping", &pair.a.map.read_page(page), wanted)?;
    }
    pair.b.holds(0, PAGES, 1)?;
    for vm in [&pair.a, &pair.b] {
        vm.sysfs(pair.ctx).stat()?.check_sum()?;
    }
    Ok(())
}
