// SPDX-License-Identifier: GPL-2.0

//! What the kernel's own tests of KSM (ksm_tests.c, ksm_functional_tests.c) and LTP's (ksm01 to
//! ksm07) check, each rebuilt on files of ThinRAM and named after it; docs/testing.md has the table.
//! Those on several processes are in `peers`.

use anyhow::{Context, Result};

use crate::cgroup::Cgroup;
use crate::check::{eq, page_is, within};
use crate::content;
use crate::ctx::{Ctx, Guest, Mount};
use crate::harness::Case;
use crate::peers::{create_same_memory, fill, of};
use crate::sharing::{frames, SOON};
use crate::sys::numa::{self, MOVE, STRICT};
use crate::sys::WORDS;

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::thinram(
        "ksm/merge",
        "ksm_tests -M: equal pages merge, by max_page_sharing",
        merge,
    ),
    Case::thinram(
        "ksm/unmerge",
        "ksm_tests -U: a byte that changes ends the sharing",
        unmerge,
    ),
    Case::thinram(
        "ksm/zero-page-merge",
        "ksm_tests -Z: pages of zeroes are not shared with each other",
        zero_page_merge,
    ),
    Case::thinram(
        "ksm/numa-merge",
        "ksm_tests -N: a page on each node, merge_across_nodes 1 and 0",
        numa_merge,
    ),
    Case::thinram(
        "ksm/functional-unmerge",
        "2 MiB of one content, then each page its own",
        functional_unmerge,
    ),
    Case::thinram(
        "ksm/functional-unmerge-zero-pages",
        "counters of zero pages, given back and written",
        functional_unmerge_zero_pages,
    ),
    Case::thinram(
        "ltp/ksm02",
        "three VMs filled in steps, all on one NUMA node, for each",
        ksm02,
    ),
    Case::thinram("ltp/ksm03", "ksm01 in a memory cgroup", ksm03),
    Case::thinram("ltp/ksm04", "ksm02 in a memory cgroup", ksm04),
    Case::thinram(
        "ltp/ksm06",
        "equal memory on each node: a frame for all, or for each node",
        ksm06,
    ),
    Case::thinram(
        "ltp/ksm07",
        "pages that stay as they are are passed over",
        ksm07,
    ),
];

/// A VM whose pages all hold the same byte.
fn filled(mount: &Mount<'_>, name: &str, pages: usize, byte: u8) -> Result<Guest> {
    let guest = mount.guest(name, pages)?;
    fill(&guest, byte);
    Ok(guest)
}

/// What ksm_tests expects of `pages` equal pages: shared ones, and the further ones that share them.
fn expected(pages: u64, most: u64) -> (u64, u64) {
    match (pages / most, pages % most) {
        // One page that is left over has nobody to share with.
        (full, 0 | 1) => (full, full * (most - 1)),
        (full, _) => (full + 1, pages - full - 1),
    }
}

fn until_counts(ctx: &Ctx, shared: u64, sharing: u64) -> Result<()> {
    let sys = ctx.sys();
    let what = format!("{shared} pages shared by {sharing} more");
    ctx.until(&what, SOON, || {
        let seen = (sys.get("pages_shared")?, sys.get("pages_sharing")?);
        Ok((seen == (shared, sharing), format!("{seen:?}")))
    })
}

fn merge(ctx: &Ctx) -> Result<()> {
    let sys = ctx.sys();
    for (pages, most) in [(10, 65536), (2, 2), (12, 5), (11, 5), (10, 5), (300, 256)] {
        sys.set("run", 0)?;
        sys.set("max_page_sharing", most)?;
        let mount = ctx.mount("m", "size=64M,domain=lab")?;
        let guest = filled(&mount, "web", pages, b'*')?;
        sys.flat_out()?;
        let (shared, sharing) = expected(pages as u64, most);
        until_counts(ctx, shared, sharing)
            .with_context(|| format!("{pages} pages, {most} sharers at most"))?;
        // Nor more later on.
        ctx.passes(2)?;
        until_counts(ctx, shared, sharing)?;
        for page in 0..pages {
            page_is(
                format!("page {page}"),
                &guest.map.read_page(page),
                &of(b'*'),
            )?;
        }
    }
    Ok(())
}

fn unmerge(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = filled(&mount, "web", 2, b'*')?;
    ctx.sys().flat_out()?;
    until_counts(ctx, 1, 1)?;
    let changed = |byte: u8| {
        let mut page = of(b'*');
        page[0] = page[0] & !0xff | u64::from(byte);
        page
    };
    for (page, byte) in [(0, b'-'), (1, b'+')] {
        guest.map.set(page, 0, changed(byte)[0]);
    }
    ctx.passes(1)?;
    until_counts(ctx, 0, 0)?;
    page_is("page 0", &guest.map.read_page(0), &changed(b'-'))?;
    page_is("page 1", &guest.map.read_page(1), &changed(b'+'))
}

fn zero_page_merge(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 10;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = filled(&mount, "web", PAGES, 0)?;
    ctx.sys().flat_out()?;
    ctx.until_is("zero_pages", PAGES as u64, SOON)?;
    ctx.passes(2)?;
    until_counts(ctx, 0, 0)?;
    guest.is_zero(0, PAGES)
}

fn numa_merge(ctx: &Ctx) -> Result<()> {
    let nodes = numa::several_nodes()?;
    let sys = ctx.sys();
    for across in [1, 0] {
        sys.set("run", 0)?;
        sys.set("merge_across_nodes", across)?;
        until_counts(ctx, 0, 0)?;
        let mount = ctx.mount("m", "size=64M,domain=lab")?;
        let guests = on_nodes(&mount, &nodes[..2], 1, b'*')?;
        sys.flat_out()?;
        ctx.passes(3)?;
        if across == 1 {
            until_counts(ctx, 1, 1)?;
        } else {
            eq("pages_sharing between nodes", sys.get("pages_sharing")?, 0)?;
            eq("pages_shared between nodes", sys.get("pages_shared")?, 0)?;
        }
        for guest in &guests {
            page_is(&guest.name, &guest.map.read_page(0), &of(b'*'))?;
        }
    }
    Ok(())
}

/// A VM of equal pages on each node.
fn on_nodes(mount: &Mount<'_>, nodes: &[u32], pages: usize, byte: u8) -> Result<Vec<Guest>> {
    let on = |node: &u32| -> Result<Guest> {
        let guest = mount.guest(&format!("on{node}"), pages)?;
        numa::bind(&guest.map, *node, STRICT | MOVE).context("mbind")?;
        fill(&guest, byte);
        Ok(guest)
    };
    nodes.iter().map(on).collect()
}

/// Pages in the 2 MiB of the functional tests.
const TWO_MIB: usize = 512;

/// No two pages of the guest lie in one frame.
fn no_duplicates(guest: &Guest) -> Result<()> {
    eq(
        "frames of the guest",
        frames(guest)?.len(),
        guest.map.pages(),
    )
}

fn functional_unmerge(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = filled(&mount, "web", TWO_MIB, 0xcf)?;
    let sys = ctx.sys();
    sys.flat_out()?;
    until_counts(ctx, 1, TWO_MIB as u64 - 1)?;
    eq("frames while merged", frames(&guest)?.len(), 1)?;
    // The scanner goes on: what was taken out stays out.
    guest.sysfs(ctx).set("share", 0)?;
    until_counts(ctx, 0, 0)?;
    ctx.passes(2)?;
    until_counts(ctx, 0, 0)?;
    no_duplicates(&guest)?;
    for page in 0..TWO_MIB {
        page_is(
            format!("page {page}"),
            &guest.map.read_page(page),
            &of(0xcf),
        )?;
    }
    Ok(())
}

fn functional_unmerge_zero_pages(ctx: &Ctx) -> Result<()> {
    const HALF: usize = TWO_MIB / 2;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = filled(&mount, "web", TWO_MIB, 0)?;
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.until_is("zero_pages", TWO_MIB as u64, SOON)?;
    sys.set("run", 0)?;
    let count = |what: &str, pages: usize| -> Result<()> {
        eq(what, sys.get("zero_pages")?, pages as u64)?;
        eq(
            "zero_kb",
            guest.sysfs(ctx).get("zero_kb")?,
            4 * pages as u64,
        )
    };
    count("merged", TWO_MIB)?;
    // Half of it is given memory, the other half is written.
    for page in (0..HALF).chain(HALF..TWO_MIB) {
        if page == HALF {
            count("half of them written", HALF)?;
        }
        guest.map.set(page, 0, page as u64 + 1);
    }
    count("all of them written", 0)?;
    no_duplicates(&guest)?;
    for page in 0..TWO_MIB {
        let mut expected = [0; WORDS];
        expected[0] = page as u64 + 1;
        page_is(
            format!("page {page}"),
            &guest.map.read_page(page),
            &expected,
        )?;
    }
    Ok(())
}

fn ksm02(ctx: &Ctx) -> Result<()> {
    for node in numa::several_nodes()? {
        create_same_memory(ctx, Some(node)).with_context(|| format!("node {node}"))?;
        ctx.until_no_vm()?;
    }
    Ok(())
}

fn ksm03(ctx: &Ctx) -> Result<()> {
    let group = Cgroup::new("ksm03")?;
    group.set("memory.max", 64 << 20)?;
    group.while_in(|| create_same_memory(ctx, None))
}

fn ksm04(ctx: &Ctx) -> Result<()> {
    let group = Cgroup::new("ksm04")?;
    group.set("memory.max", 64 << 20)?;
    group.while_in(|| ksm02(ctx))
}

fn ksm06(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 512;
    let nodes = numa::several_nodes()?;
    let sys = ctx.sys();
    let (count, pages) = (nodes.len() as u64, PAGES as u64);
    // All of it is one content: a frame for all, or one for each node.
    for (across, shared) in [(1, 1), (0, count)] {
        sys.set("run", 0)?;
        sys.set("merge_across_nodes", across)?;
        let mount = ctx.mount("m", "size=64M,domain=lab")?;
        let guests = on_nodes(&mount, &nodes, PAGES, b'a')?;
        sys.flat_out()?;
        until_counts(ctx, shared, count * pages - shared)?;
        ctx.passes(2)?;
        until_counts(ctx, shared, count * pages - shared)?;
        for guest in &guests {
            for page in 0..PAGES {
                page_is(&guest.name, &guest.map.read_page(page), &of(b'a'))?;
            }
        }
    }
    Ok(())
}

fn ksm07(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 2048;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", PAGES)?;
    // Each page is unlike all others.
    guest.fill(0, PAGES, 1);
    let sys = ctx.sys();
    sys.flat_out()?;
    ctx.passes(4)?;
    let look = || -> Result<(u64, u64, u64)> {
        // The three belong together only while nothing is scanned.
        sys.set("run", 0)?;
        let seen = (
            sys.get("full_scans")?,
            sys.get("pages_scanned")?,
            sys.get("pages_skipped")?,
        );
        sys.set("run", 1)?;
        Ok(seen)
    };
    let before = look()?;
    ctx.passes(8)?;
    let after = look()?;
    let passes = after.0 - before.0;
    let (scanned, skipped) = (after.1 - before.1, after.2 - before.2);
    println!("{scanned} scanned, {skipped} skipped in {passes} passes over {PAGES} pages");
    let all = (PAGES as u64) * passes;
    // Now and then everything is looked at all the same, in one pass of 64.
    within(
        "pages skipped",
        skipped,
        all * 8 / 10 - PAGES as u64,
        all + PAGES as u64,
    )?;
    eq("pages_sharing", sys.get("pages_sharing")?, 0)?;
    // A page that changes is looked at again, and merges.
    guest.map.write_page(7, &content::page(1));
    ctx.until_is("pages_sharing", 1, SOON)?;
    page_is("page 0", &guest.map.read_page(0), &content::page(1))?;
    page_is("page 7", &guest.map.read_page(7), &content::page(1))
}
