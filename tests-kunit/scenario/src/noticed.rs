// SPDX-License-Identifier: GPL-2.0

//! Pages that the scanner takes for unchanged: what changes them must be noticed at once, not by
//! the look that every page gets now and then.

use std::os::unix::fs::FileExt;
use std::thread;

use anyhow::{anyhow, Context, Result};
use nix::errno::Errno;

use crate::check::{eq, skip, that};
use crate::content::{self, page_bytes};
use crate::ctx::{Ctx, Guest, Mount};
use crate::harness::Case;
use crate::sharing::twins;
use crate::sys::{self, Map, UserFault, PAGE};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::thinram(
        "share/write-noticed",
        "a write to a page long unchanged is seen by the next passes",
        write_noticed,
    ),
    Case::thinram(
        "share/zero-only-ends",
        "pages that left no hint under zero_only are found by the next passes",
        zero_only_ends,
    ),
    Case::thinram(
        "share/late-pin",
        "what is written through a pin from before is seen as well",
        late_pin,
    ),
    Case::thinram(
        "share/held-for-writing",
        "pages that somebody is about to write to do not merge, and the write arrives",
        held_for_writing,
    ),
];

/// Passes after which nothing is looked at that did not change.
const COLD: u64 = 10;
/// Passes within which a change has to be noticed; the look that every page gets comes each 64th.
const SOON: u64 = 3;

/// Guests `a` and `b` of `pages` pages without an equal one; page `i` of `b` is of seed 500 + `i`.
fn strangers(ctx: &Ctx, pages: usize) -> Result<(Mount<'_>, Guest, Guest)> {
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let (a, b) = (mount.guest("a", pages)?, mount.guest("b", pages)?);
    a.fill(0, pages, 1);
    b.fill(0, pages, 500);
    Ok((mount, a, b))
}

/// Lets the scanner make [`SOON`] passes and hardly more: a pass takes some 250 ms, or the look that
/// comes each 64th pass would find what nobody noticed.
fn few_passes(ctx: &Ctx) -> Result<()> {
    let sys = ctx.sys();
    let before = sys.get("full_scans")?;
    sys.set("scan_pages_per_sec", 1_000)?;
    sys.flat_out_but_pages()?;
    ctx.passes(SOON)?;
    sys.set("run", 0)?;
    let passes = sys.get("full_scans")? - before;
    that(format!("{passes} passes are few"), passes < 32)
}

/// Stops the scanner once it takes most of `pages` pages of each of two guests for unchanged.
fn until_unchanged(ctx: &Ctx, pages: usize) -> Result<()> {
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.passes(COLD)?;
    let before = (sys.get("pages_skipped")?, sys.get("full_scans")?);
    ctx.passes(COLD)?;
    let skipped = sys.get("pages_skipped")? - before.0;
    let passes = sys.get("full_scans")? + 1 - before.1;
    // Without this nothing is shown: pages that are hashed in each pass need no notice.
    that(
        format!("most pages are skipped by then: {skipped} in {passes} passes"),
        skipped > COLD * pages as u64,
    )?;
    sys.set("run", 0)
}

fn zero_only_ends(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 128;
    let (_mount, a, b) = strangers(ctx, PAGES)?;
    b.fill(0, PAGES, 1);
    let sys = ctx.sys();
    sys.set("zero_only", 1)?;
    until_unchanged(ctx, PAGES)?;
    eq("pages_sharing meanwhile", sys.get("pages_sharing")?, 0)?;
    sys.set("zero_only", 0)?;
    few_passes(ctx)?;
    eq("pages_sharing", sys.get("pages_sharing")?, PAGES as u64)?;
    a.holds(0, PAGES, 1)?;
    b.holds(0, PAGES, 1)
}

fn write_noticed(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 128;
    let (_mount, a, b) = strangers(ctx, PAGES)?;
    until_unchanged(ctx, PAGES)?;
    let sys = ctx.sys();
    for page in 0..PAGES {
        if page % 2 == 0 {
            a.map.write_page(page, &content::page(500 + page as u64));
        } else {
            let at = (page * PAGE) as u64;
            a.file.write_all_at(&page_bytes(500 + page as u64), at)?;
        }
    }
    few_passes(ctx)?;
    eq("pages_sharing", sys.get("pages_sharing")?, PAGES as u64)?;
    a.holds(0, PAGES, 500)?;
    b.holds(0, PAGES, 500)
}

/// As many as one call of process_vm_writev holds at a time.
const HELD: usize = 16;

/// Has somebody take the first [`HELD`] pages of `guest` for writing and wait, runs `meanwhile`, and
/// lets it write: page `i` is of seed 500 + `i` then.
fn written_late(ctx: &Ctx, guest: &Guest, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
    let waits = match UserFault::open() {
        Err(Errno::ENOSYS | Errno::EPERM) => return Err(skip("this kernel has no userfaultfd")),
        other => other.context("userfaultfd")?,
    };
    let source = Map::anonymous(HELD * PAGE)?;
    waits.register(&source, 1).context("register the source")?;
    let filled = Map::anonymous(HELD * PAGE)?;
    for page in 0..HELD {
        filled.write_page(page, &content::page(500 + page as u64));
    }
    thread::scope(|scope| -> Result<()> {
        // It has the guest's pages for writing, and waits for its first byte.
        let writer = scope.spawn(|| sys::write_own_memory(&source, &guest.map));
        let held = || -> Result<()> {
            ctx.until("the writer to wait", 10.0, || {
                Ok((waits.is_awaited()?, "it does not".into()))
            })?;
            meanwhile()
        };
        let seen = held();
        waits
            .resolve(&source, &filled)
            .context("let the writer go")?;
        let written = writer
            .join()
            .map_err(|_| anyhow!("the writer panicked"))?
            .context("process_vm_writev")?;
        seen?;
        eq("bytes written", written, HELD * PAGE)
    })
}

fn late_pin(ctx: &Ctx) -> Result<()> {
    let (_mount, a, b) = strangers(ctx, HELD)?;
    let sys = ctx.sys();
    written_late(ctx, &a, || {
        sys.flat_out()?;
        ctx.passes(COLD)?;
        sys.set("run", 0)?;
        eq("pages_sharing meanwhile", sys.get("pages_sharing")?, 0)?;
        a.holds(0, HELD, 1)
    })?;
    few_passes(ctx)?;
    eq("pages_sharing", sys.get("pages_sharing")?, HELD as u64)?;
    a.holds(0, HELD, 500)?;
    b.holds(0, HELD, 500)
}

fn held_for_writing(ctx: &Ctx) -> Result<()> {
    let (_mount, a, b) = twins(ctx, HELD)?;
    let sys = ctx.sys();
    let refused = sys.get("merges_refused_pinned")?;
    let mut sharing = 0;
    written_late(ctx, &a, || {
        sys.flat_out()?;
        ctx.passes(COLD)?;
        sys.set("run", 0)?;
        sharing = sys.get("pages_sharing")?;
        a.holds(0, HELD, 1)
    })?;
    a.holds(0, HELD, 500)?;
    b.holds(0, HELD, 1)?;
    eq("pages_sharing meanwhile", sharing, 0)?;
    let refused = sys.get("merges_refused_pinned")? - refused;
    that(format!("{refused} merges refused"), refused > 0)
}
