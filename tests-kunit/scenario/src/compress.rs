// SPDX-License-Identifier: GPL-2.0

//! Compression: what reclaim takes, what stays, and that every byte comes back.

use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use nix::errno::Errno;

use crate::check::{bytes_are, eq, page_is, skip, within, Gaps};
use crate::content::{self, page_bytes};
use crate::contention::force;
use crate::ctx::{Ctx, Guest, Mount};
use crate::harness::Case;
use crate::sys::{self, End, Map, PAGE, RW, WORDS};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::thinram(
        "contend/limit",
        "limit_kb holds on an idle host, and data come back",
        limit,
    ),
    Case::thinram(
        "contend/limit-alone",
        "one VM's limit takes nothing from another",
        limit_alone,
    ),
    Case::thinram(
        "contend/limit-unmet",
        "a limit that cannot be kept stops no VM",
        limit_unmet,
    ),
    Case::thinram(
        "contend/incompressible",
        "random data are refused, counted and intact",
        incompressible,
    ),
    Case::thinram(
        "contend/same-filled",
        "same-filled pages take no room in the pool",
        same_filled,
    ),
    Case::thinram(
        "contend/cap",
        "the pool's cap holds, is raised and lowered live",
        cap,
    ),
    Case::thinram(
        "contend/cap-refused",
        "a cap too low for what there is is ENOMEM",
        cap_refused,
    ),
    Case::thinram(
        "contend/object-percent",
        "compress_max_object_percent decides what is kept",
        object_percent,
    ),
    Case::thinram(
        "contend/access",
        "every access to a compressed page sees its bytes",
        access,
    ),
    Case::thinram(
        "contend/holes",
        "holes and truncation free what is compressed",
        holes,
    ),
    Case::thinram(
        "contend/pinned",
        "a page that a pipe holds is not compressed",
        pinned,
    ),
    Case::thinram(
        "contend/held",
        "what is written to it meanwhile is in the pipe too",
        held,
    ),
    Case::thinram(
        "contend/idle-host",
        "a host that is not short compresses nothing",
        idle_host,
    ),
    Case::thinram(
        "contend/cold-first",
        "pages in use stay, cold ones go",
        cold_first,
    ),
    Case::thinram("contend/victim", "who has fewer shares pays first", victim),
    Case::thinram(
        "contend/reservation",
        "nothing is taken below reservation_kb",
        reservation,
    ),
    Case::thinram(
        "contend/low",
        "on a low host VMs above their share wait, not for ever",
        low,
    ),
    Case::thinram(
        "contend/psi",
        "who waits for memory counts as stalled in /proc/pressure/memory",
        psi,
    ),
    Case::thinram(
        "contend/shrinker",
        "drop_caches gets pages of a hard host, none of a high one, none that is reserved",
        shrinker,
    ),
    Case::thinram(
        "contend/knobs",
        "bad values: EINVAL or ERANGE, no change",
        knobs,
    ),
    Case::thinram(
        "contend/ends-compressed",
        "a VM ends with its pages compressed",
        ends,
    ),
];

/// Seconds within which a few thousand pages surely are compressed.
const SOON: f64 = 30.0;

/// A VM of `pages` pages, page `i` made from seed `first + i`.
fn filled(mount: &Mount<'_>, vm: &str, pages: usize, first: u64) -> Result<Guest> {
    let guest = mount.guest(vm, pages)?;
    guest.fill(0, pages, first);
    Ok(guest)
}

fn until_vm(
    ctx: &Ctx,
    guest: &Guest,
    name: &str,
    what: &str,
    good: impl Fn(u64) -> bool,
) -> Result<()> {
    until_vm_in(ctx, guest, name, what, SOON, good)
}

/// The same within `seconds`.
fn until_vm_in(
    ctx: &Ctx,
    guest: &Guest,
    name: &str,
    what: &str,
    seconds: f64,
    good: impl Fn(u64) -> bool,
) -> Result<()> {
    let vm = guest.sysfs(ctx);
    ctx.until(&format!("{name} of {} {what}", guest.name), seconds, || {
        let seen = vm.get(name)?;
        vm.stat()?.check_sum()?;
        Ok((good(seen), seen.to_string()))
    })
}

/// Compresses all that can be of `guest`.
pub fn squeeze(ctx: &Ctx, guest: &Guest, pages: u64) -> Result<()> {
    force(ctx, "hard")?;
    until_vm(ctx, guest, "compressed_kb", "is all", |kb| kb == 4 * pages)?;
    force(ctx, "none")
}

fn limit(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 4096;
    let mount = ctx.mount("m", "size=256M,domain=lab")?;
    let guest = filled(&mount, "web", PAGES, 1)?;
    let vm = guest.sysfs(ctx);
    vm.set("compress_max_percent", 50)?;
    let size = 4 * PAGES as u64;
    eq("resident_kb before", vm.get("resident_kb")?, size)?;
    vm.set("limit_kb", size / 2)?;
    until_vm_in(ctx, &guest, "resident_kb", "within the limit", 10.0, |kb| {
        kb <= size / 2
    })?;
    let stat = vm.stat()?;
    within("compressed_kb", stat.get("compressed_kb")?, size / 2, size)?;
    eq(
        "resident_kb is what is private and the pool",
        stat.get("resident_kb")?,
        stat.get("private_kb")? + stat.get("compressed_pool_kb")?,
    )?;
    // Content of ratio 3: the pool takes less than half of what it holds.
    within(
        "compressed_pool_kb",
        stat.get("compressed_pool_kb")?,
        stat.get("compressed_kb")? / 5,
        stat.get("compressed_kb")? / 2,
    )?;
    eq("state", ctx.sys().word("state")?, "high".to_owned())?;
    let back = vm.get("decompressions")?;
    for _ in 0..2 {
        guest.holds(0, PAGES, 1)?;
        vm.stat()?.check_sum()?;
    }
    ensure!(vm.get("decompressions")? > back, "nothing was brought back");
    until_vm(ctx, &guest, "resident_kb", "within the limit", |kb| {
        kb <= size / 2
    })?;
    vm.set("limit_kb", 0)?;
    guest.holds(0, PAGES, 1)?;
    eq("private_kb after all was read", vm.get("private_kb")?, size)?;
    eq(
        "compressed_kb after all was read",
        vm.get("compressed_kb")?,
        0,
    )?;
    // Written pages are compressed with what was written.
    guest.fill(0, PAGES, 77_000);
    vm.set("limit_kb", size / 2)?;
    until_vm(ctx, &guest, "resident_kb", "within the limit", |kb| {
        kb <= size / 2
    })?;
    guest.holds(0, PAGES, 77_000)
}

fn limit_alone(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let (a, b) = (
        filled(&mount, "a", 1024, 1)?,
        filled(&mount, "b", 1024, 5000)?,
    );
    a.sysfs(ctx).set("compress_max_percent", 100)?;
    a.sysfs(ctx).set("limit_kb", 2500)?;
    until_vm(ctx, &a, "resident_kb", "within the limit", |kb| kb <= 2500)?;
    eq("private_kb of b", b.sysfs(ctx).get("private_kb")?, 4096)?;
    eq("compressions of b", b.sysfs(ctx).get("compressions")?, 0)?;
    a.holds(0, 1024, 1)?;
    b.holds(0, 1024, 5000)
}

fn limit_unmet(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", 256)?;
    let vm = guest.sysfs(ctx);
    vm.set("limit_kb", 100)?;
    let start = Instant::now();
    guest.fill_noise(0, 256);
    // Each new page may wait, none for ever.
    ensure!(
        start.elapsed() < ctx.limit(120.0),
        "256 pages took {:?}",
        start.elapsed()
    );
    guest.holds_noise(0, 256)?;
    eq("private_kb", vm.get("private_kb")?, 1024)?;
    within("stall_us", vm.get("stall_us")?, 1, u64::MAX)?;
    vm.stat()?.check_sum()
}

fn incompressible(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", 512)?;
    guest.fill_noise(0, 512);
    let name = "compressions_refused_incompressible";
    let before = ctx.sys().get(name)?;
    force(ctx, "hard")?;
    ctx.until_least(name, before + 512, SOON)?;
    let vm = guest.sysfs(ctx);
    eq("compressed_kb", vm.get("compressed_kb")?, 0)?;
    eq("private_kb", vm.get("private_kb")?, 2048)?;
    guest.holds_noise(0, 512)?;
    Ok(())
}

fn same_filled(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", 300)?;
    let pattern = |page: usize| 0x0101_0101_0101_0101u64.wrapping_mul(page as u64 % 200 + 1);
    for page in 0..256 {
        guest.map.write_page(page, &[pattern(page); WORDS]);
    }
    for page in 256..300 {
        guest.map.write_page(page, &[0; WORDS]);
    }
    force(ctx, "hard")?;
    until_vm(ctx, &guest, "compressed_kb", "is all", |kb| kb == 1200)?;
    let vm = guest.sysfs(ctx);
    eq("compressed_pool_kb", vm.get("compressed_pool_kb")?, 0)?;
    eq("resident_kb", vm.get("resident_kb")?, 0)?;
    force(ctx, "none")?;
    for page in 0..256 {
        page_is(
            format!("page {page}"),
            &guest.map.read_page(page),
            &[pattern(page); WORDS],
        )?;
    }
    guest.is_zero(256, 300)?;
    eq("decompressions", vm.get("decompressions")?, 300)?;
    // With the scanner on, pages of zeroes become what it makes of them.
    ctx.sys().set("run", 1)?;
    force(ctx, "hard")?;
    until_vm(ctx, &guest, "zero_kb", "is all zeroes", |kb| kb == 44 * 4)?;
    guest.is_zero(256, 300)
}

/// What a pool may have beyond its cap while pages are tried: the kernel's pools grow by up to eight pages
/// for an object, and only then is it seen that this is too much, and given back.
pub const TRIED_KB: u64 = 32;

fn cap(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 4096;
    let size = 4 * PAGES as u64;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = filled(&mount, "web", PAGES, 1)?;
    let vm = guest.sysfs(ctx);
    let refused = sys.get("compressions_refused_pool_full")?;
    force(ctx, "hard")?;
    ctx.until_least("compressions_refused_pool_full", refused + 1, 10.0)?;
    let pool = vm.get("compressed_pool_kb")?;
    // Up to the cap; half of it at least is used.
    let most = size / 10 + TRIED_KB;
    within("compressed_pool_kb at 10 %", pool, size / 20, most)?;
    within(
        "compressed_kb",
        vm.get("compressed_kb")?,
        pool * 2,
        pool * 5,
    )?;
    // Raised: for this VM, then for all.
    vm.set("compress_max_percent", 20)?;
    until_vm(ctx, &guest, "compressed_pool_kb", "grows", |kb| {
        kb > size / 7
    })?;
    vm.set("compress_max_percent", 0)?;
    until_vm(ctx, &guest, "compressed_pool_kb", "shrinks", |kb| {
        kb <= size / 10
    })?;
    sys.set("compress_max_percent", 20)?;
    until_vm(ctx, &guest, "compressed_pool_kb", "grows", |kb| {
        kb > size / 7
    })?;
    within(
        "compressed_pool_kb at 20 %",
        vm.get("compressed_pool_kb")?,
        0,
        size / 5 + TRIED_KB,
    )?;
    // Lowered: pages come back in the background, though the host stays hard.
    sys.set("compress_max_percent", 5)?;
    until_vm(ctx, &guest, "compressed_pool_kb", "shrinks", |kb| {
        kb <= size / 20
    })?;
    guest.holds(0, PAGES / 2, 1)?;
    sys.set("compress_max_percent", 0)?;
    until_vm(ctx, &guest, "compressed_pool_kb", "is gone", |kb| kb == 0)?;
    eq("compressed_kb", vm.get("compressed_kb")?, 0)?;
    eq("private_kb", vm.get("private_kb")?, size)?;
    guest.holds(0, PAGES, 1)
}

fn cap_refused(ctx: &Ctx) -> Result<()> {
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = filled(&mount, "web", 2048, 1)?;
    let vm = guest.sysfs(ctx);
    vm.set("compress_max_percent", 50)?;
    squeeze(ctx, &guest, 2048)?;
    // It may hold 4 MiB, and all of it would take 8.
    vm.set("limit_kb", 4096)?;
    let enomem = |result: std::io::Result<()>| result.err().and_then(|e| e.raw_os_error());
    let error = enomem(vm.try_set("compress_max_percent", b"1"));
    eq("errno", error, Some(Errno::ENOMEM as i32))?;
    eq("compress_max_percent", vm.get("compress_max_percent")?, 50)?;
    vm.set("limit_kb", 0)?;
    // Nor would it fit when the host has nothing left.
    sys.set("minfree_kb", sys.get("available_kb")? * 2)?;
    let error = enomem(vm.try_set("compress_max_percent", b"1"));
    eq("errno", error, Some(Errno::ENOMEM as i32))?;
    sys.set("minfree_kb", 0)?;
    let sum = vm.get("compressed_kb")? + vm.get("private_kb")?;
    eq("compressed_kb and private_kb", sum, 8192)?;
    vm.set("compress_max_percent", 1)?;
    until_vm(ctx, &guest, "compressed_pool_kb", "shrinks", |kb| kb <= 81)?;
    guest.holds(0, 2048, 1)
}

fn object_percent(ctx: &Ctx) -> Result<()> {
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    // About a third of a page.
    let guest = filled(&mount, "web", 512, 1)?;
    guest.sysfs(ctx).set("compress_max_percent", 100)?;
    sys.set("compress_max_object_percent", 25)?;
    let name = "compressions_refused_incompressible";
    let before = sys.get(name)?;
    force(ctx, "hard")?;
    ctx.until_least(name, before + 512, SOON)?;
    eq("compressed_kb", guest.sysfs(ctx).get("compressed_kb")?, 0)?;
    sys.set("compress_max_object_percent", 40)?;
    until_vm(ctx, &guest, "compressed_kb", "is all", |kb| kb == 2048)?;
    guest.holds(0, 512, 1)
}

fn access(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 512;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = filled(&mount, "web", PAGES, 1)?;
    let vm = guest.sysfs(ctx);
    vm.set("compress_max_percent", 100)?;
    let all = PAGES as u64;
    // read(2) leaves them compressed.
    squeeze(ctx, &guest, all)?;
    let mut bytes = vec![0; PAGE];
    for page in 0..PAGES {
        guest.file.read_exact_at(&mut bytes, (page * PAGE) as u64)?;
        bytes_are(
            format!("read of page {page}"),
            &bytes,
            &page_bytes(1 + page as u64),
        )?;
    }
    eq(
        "compressed_kb after read(2)",
        vm.get("compressed_kb")?,
        4 * all,
    )?;
    eq(
        "lseek SEEK_HOLE",
        sys::lseek(&guest.file, 0, libc::SEEK_HOLE)?,
        (PAGES * PAGE) as i64,
    )?;
    // A mapped read brings one back, and that one alone.
    page_is("page 3", &guest.map.read_page(3), &content::page(4))?;
    eq(
        "compressed_kb after a touch",
        vm.get("compressed_kb")?,
        4 * (all - 1),
    )?;
    // A part of a page by write(2), a word by mapping.
    guest
        .file
        .write_all_at(&[0xee; 100], (7 * PAGE + 50) as u64)?;
    let mut expected = page_bytes(8);
    expected[50..150].fill(0xee);
    guest.file.read_exact_at(&mut bytes, (7 * PAGE) as u64)?;
    bytes_are("page 7, written by write(2)", &bytes, &expected)?;
    guest.map.set(9, 100, 5);
    let mut expected = content::page(10);
    expected[100] = 5;
    page_is(
        "page 9, written by mapping",
        &guest.map.read_page(9),
        &expected,
    )?;
    eq(
        "compressed_kb after two writes",
        vm.get("compressed_kb")?,
        4 * (all - 3),
    )?;
    // Another process, a second mapping, a fallocate.
    squeeze(ctx, &guest, all)?;
    let mut child = sys::fork(|| {
        let map = Map::shared(&guest.file, 0, PAGES * PAGE, RW)?;
        for page in (20..PAGES).step_by(2) {
            page_is(
                format!("child: page {page}"),
                &map.read_page(page),
                &content::page(1 + page as u64),
            )?;
        }
        map.set(20, 0, 99);
        Ok(())
    })?;
    eq("child", child.wait(ctx.limit(30.0))?, End::Exit(0))?;
    eq("word 0 of page 20", guest.map.get(20, 0), 99)?;
    sys::fallocate(&guest.file, 0, 0, (PAGES * PAGE) as i64)?;
    guest.holds(21, PAGES, 1)
}

fn holes(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = filled(&mount, "web", 1024, 1)?;
    let vm = guest.sysfs(ctx);
    vm.set("compress_max_percent", 100)?;
    squeeze(ctx, &guest, 1024)?;
    let page = PAGE as u64;
    sys::punch(&guest.file, 100 * page, 200 * page)?;
    eq(
        "compressed_kb after a hole",
        vm.get("compressed_kb")?,
        4 * 824,
    )?;
    eq("empty_kb after a hole", vm.get("empty_kb")?, 800)?;
    guest.is_zero(100, 300)?;
    // The ends of a hole are zeroed in pages that stay.
    sys::punch(&guest.file, 300 * page + 1000, 2 * page)?;
    let mut expected = content::page(301);
    expected[125..].fill(0);
    page_is("page 300", &guest.map.read_page(300), &expected)?;
    sys::ftruncate(&guest.file, 400 * PAGE as i64)?;
    vm.stat()?.check_sum()?;
    within(
        "compressed_kb after the cut",
        vm.get("compressed_kb")?,
        1,
        4 * 200,
    )?;
    sys::ftruncate(&guest.file, 1024 * PAGE as i64)?;
    guest.is_zero(400, 1024)?;
    guest.holds(0, 100, 1)?;
    guest.holds(303, 400, 1)?;
    // All of it is gone: so is the pool.
    sys::punch(&guest.file, 0, 1024 * page)?;
    eq("compressed_kb", vm.get("compressed_kb")?, 0)?;
    eq("compressed_pool_kb", vm.get("compressed_pool_kb")?, 0)
}

fn pinned(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = filled(&mount, "web", 64, 1)?;
    let vm = guest.sysfs(ctx);
    vm.set("compress_max_percent", 100)?;
    let (from, to) = nix::unistd::pipe()?;
    sys::vmsplice(&to, &guest.map, 10 * PAGE, 4 * PAGE)?;
    force(ctx, "hard")?;
    until_vm(ctx, &guest, "compressed_kb", "is all but four", |kb| {
        kb == 240
    })?;
    ctx.until_least("compressions_refused_pinned", 4, SOON)?;
    eq("private_kb", vm.get("private_kb")?, 16)?;
    drop((from, to));
    until_vm(ctx, &guest, "compressed_kb", "is all", |kb| kb == 256)?;
    guest.holds(0, 64, 1)
}

fn held(ctx: &Ctx) -> Result<()> {
    const PAGES: u64 = 64;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = filled(&mount, "web", PAGES as usize, 1)?;
    let vm = guest.sysfs(ctx);
    vm.set("compress_max_percent", 100)?;
    let refused = "compressions_refused_pinned";
    let before = ctx.sys().get(refused)?;
    guest.held_shows_writes(10, || {
        force(ctx, "hard")?;
        ctx.until("all pages were tried", SOON, || {
            let (packed, refused) = (vm.get("compressions")?, ctx.sys().get(refused)? - before);
            let all = packed + u64::from(refused > 0) >= PAGES;
            Ok((all, format!("{packed} packed, {refused} refused")))
        })
    })?;
    guest.holds(0, 10, 1)?;
    guest.holds(11, PAGES as usize, 1)
}

fn idle_host(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = filled(&mount, "web", 512, 1)?;
    for state in ["high", "clear", "soft"] {
        force(ctx, state)?;
        thread::sleep(Duration::from_millis(1300));
        eq(
            format!("compressions while {state}"),
            guest.sysfs(ctx).get("compressions")?,
            0,
        )?;
    }
    guest.holds(0, 512, 1)
}

fn cold_first(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 2048;
    const HOT: usize = 256;
    const TRIES: usize = 10;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = filled(&mount, "web", PAGES, 1)?;
    let vm = guest.sysfs(ctx);
    vm.set("compress_max_percent", 100)?;
    let touch = || {
        let mut sum = 0u64;
        for page in 0..HOT {
            sum = sum.wrapping_add(guest.map.get(page, 0));
        }
        std::hint::black_box(sum);
    };
    for _ in 0..TRIES {
        vm.set("limit_kb", 0)?;
        guest.holds(0, PAGES, 1)?;
        // Half of the VM must go, an eighth is in use all the time.
        let mut gaps = Gaps::new();
        vm.set("limit_kb", 2 * PAGES as u64)?;
        let back = vm.get("decompressions")?;
        ctx.until("resident_kb within the limit", SOON, || {
            touch();
            gaps.turn();
            let seen = vm.get("resident_kb")?;
            Ok((seen <= 2 * PAGES as u64, seen.to_string()))
        })?;
        for _ in 0..20 {
            touch();
            gaps.turn();
            thread::sleep(Duration::from_millis(20));
        }
        let back = vm.get("decompressions")? - back;
        println!(
            "{back} pages in use were brought back, {} were compressed",
            vm.get("compressions")?
        );
        // Chosen at random, about half of the pages in use would have gone.
        if back <= HOT as u64 / 4 || gaps.harmless() {
            within("pages in use that were compressed", back, 0, HOT as u64 / 4)?;
            return guest.holds(0, PAGES, 1);
        }
    }
    bail!("{TRIES} times no CPU to use pages with")
}

fn victim(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let (poor, rich) = (
        filled(&mount, "poor", 1024, 1)?,
        filled(&mount, "rich", 1024, 5000)?,
    );
    for guest in [&poor, &rich] {
        guest.sysfs(ctx).set("compress_max_percent", 100)?;
    }
    poor.sysfs(ctx).set("shares", 100)?;
    rich.sysfs(ctx).set("shares", 100_000)?;
    let before = rich.sysfs(ctx).get("compressions")?;
    force(ctx, "hard")?;
    until_vm(ctx, &poor, "compressed_kb", "is a part", |kb| kb >= 2048)?;
    eq(
        "compressions of the rich by then",
        rich.sysfs(ctx).get("compressions")?,
        before,
    )?;
    // While the state is forced it is the rich one's turn in the end.
    until_vm(ctx, &rich, "compressed_kb", "is all", |kb| kb == 4096)?;
    poor.holds(0, 1024, 1)?;
    rich.holds(0, 1024, 5000)
}

fn reservation(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let (kept, other) = (
        filled(&mount, "kept", 1024, 1)?,
        filled(&mount, "other", 1024, 5000)?,
    );
    for guest in [&kept, &other] {
        guest.sysfs(ctx).set("compress_max_percent", 100)?;
    }
    kept.sysfs(ctx).set("reservation_kb", 3000)?;
    force(ctx, "hard")?;
    until_vm(ctx, &other, "compressed_kb", "is all", |kb| kb == 4096)?;
    until_vm(ctx, &kept, "compressed_kb", "is a part", |kb| kb > 0)?;
    for _ in 0..20 {
        within(
            "resident_kb of kept",
            kept.sysfs(ctx).get("resident_kb")?,
            3000,
            4096,
        )?;
        thread::sleep(Duration::from_millis(50));
    }
    kept.holds(0, 1024, 1)?;
    other.holds(0, 1024, 5000)
}

/// Two VMs with room for 8192 pages each. The first has 4096, and hardly any share of the host.
fn big_and_small(ctx: &Ctx, mount: &Mount<'_>) -> Result<(Guest, Guest)> {
    // Noise, so that reclaim does not change who holds what.
    let guest = |name: &str, pages: usize| -> Result<Guest> {
        let guest = mount.guest(name, 8192)?;
        guest.fill_noise(0, pages);
        Ok(guest)
    };
    let (big, small) = (guest("big", 4096)?, guest("small", 64)?);
    // All that is available counts as to be shared out: leave the large VM a small part.
    big.sysfs(ctx).set("shares", 1)?;
    small.sysfs(ctx).set("shares", 1_000_000)?;
    Ok((big, small))
}

/// Microseconds in which some task was stalled for want of memory, by the kernel.
fn stalled_us() -> Result<u64> {
    let Ok(text) = std::fs::read_to_string("/proc/pressure/memory") else {
        return Err(skip("this kernel tells no pressure (PSI)"));
    };
    let some = text.lines().find(|line| line.starts_with("some "));
    let total = some.and_then(|line| line.split_once("total="));
    let (_, us) = total.context("no total in /proc/pressure/memory")?;
    Ok(us.trim().parse()?)
}

fn psi(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=256M,domain=lab")?;
    let (big, _small) = big_and_small(ctx, &mount)?;
    let before = (stalled_us()?, big.sysfs(ctx).get("stall_us")?);
    force(ctx, "low")?;
    thread::sleep(Duration::from_millis(300));
    for page in 4096..4106 {
        big.map.set(page, 0, 1);
    }
    force(ctx, "none")?;
    let waited = big.sysfs(ctx).get("stall_us")? - before.1;
    within("stall_us", waited, 100_000, u64::MAX)?;
    // One task waits on one CPU, and the kernel takes the average of all that are not idle.
    let cpus = thread::available_parallelism()?.get() as u64;
    // It adds up every two seconds.
    ctx.until("most of it in /proc/pressure/memory", 10.0, || {
        let seen = stalled_us()?.saturating_sub(before.0);
        let text = format!("{seen} of {waited} us, {cpus} CPUs");
        Ok((seen >= waited / cpus * 3 / 4, text))
    })
}

fn low(ctx: &Ctx) -> Result<()> {
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=256M,domain=lab")?;
    let (big, small) = big_and_small(ctx, &mount)?;
    let stalls = |guest: &Guest| guest.sysfs(ctx).get("stalls");
    force(ctx, "low")?;
    thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    for page in 4096..4106 {
        big.map.set(page, 0, 1);
    }
    let took = start.elapsed();
    println!("ten pages of the large VM took {took:?}");
    within("stalls of the large VM", stalls(&big)?, 10, u64::MAX)?;
    within(
        "stall_us",
        big.sysfs(ctx).get("stall_us")?,
        100_000,
        u64::MAX,
    )?;
    // Each wait is bounded.
    ensure!(took < ctx.limit(20.0), "ten pages took {took:?}");
    for page in 64..1000 {
        small.map.set(page, 0, 1);
    }
    eq("stalls of the small VM", stalls(&small)?, 0)?;
    // Who waits can be killed.
    let mut child = sys::fork(|| {
        let map = Map::shared(&big.file, 0, 8192 * PAGE, RW)?;
        for page in 4200..8192 {
            map.set(page, 0, 1);
        }
        Ok(())
    })?;
    thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    nix::sys::signal::kill(child.pid(), nix::sys::signal::Signal::SIGKILL)?;
    child.wait(ctx.limit(10.0))?;
    ensure!(
        start.elapsed() < ctx.limit(2.0),
        "the end took {:?}",
        start.elapsed()
    );
    force(ctx, "none")?;
    eq("state", sys.word("state")?, "high".to_owned())?;
    let before = stalls(&big)?;
    for page in 5000..5100 {
        big.map.set(page, 0, 1);
    }
    eq("stalls on a host that is high", stalls(&big)? - before, 0)
}

fn shrinker(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 256;
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("web", PAGES)?;
    guest.sysfs(ctx).set("compress_max_percent", 100)?;
    let order = || std::fs::write("/proc/sys/vm/drop_caches", "2");
    let figures = || -> Result<(u64, u64)> {
        let calls = sys.get("shrinker_calls")?;
        Ok((calls, sys.get("shrinker_freed_pages")?))
    };
    // Written by write(2): no page table shows them.
    let write = |page: usize, bytes: &[u8]| {
        let at = (page * PAGE) as u64;
        guest.file.write_all_at(bytes, at)
    };
    let noise = |page: usize| -> Vec<u8> {
        let words = content::noise(page as u64);
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    };
    let before = figures()?;
    for page in 0..PAGES {
        write(page, &page_bytes(page as u64))?;
    }
    order()?;
    eq("figures of a high host", figures()?, before)?;
    guest.holds(0, PAGES, 0)?;
    // Random data: the reclaimer gives up for longer and longer, and leaves the rest to the kernel.
    for page in 0..PAGES {
        write(page, &noise(page))?;
    }
    force(ctx, "hard")?;
    let refused = sys.get("compressions_refused_incompressible")?;
    ctx.until_least(
        "compressions_refused_incompressible",
        refused + 8 * PAGES as u64,
        SOON,
    )?;
    let mut seed = 0;
    ctx.until("pages freed by the shrinker", SOON, || {
        seed += PAGES as u64;
        for page in 0..PAGES / 2 {
            write(page, &page_bytes(seed + page as u64))?;
        }
        order()?;
        let now = figures()?;
        Ok((now.0 > before.0 && now.1 > before.1, format!("{now:?}")))
    })?;
    guest.sysfs(ctx).stat()?.check_sum()?;
    // What is reserved is not even counted.
    guest.sysfs(ctx).set("reservation_kb", (PAGES * 8) as u64)?;
    let before = figures()?;
    seed += PAGES as u64;
    for page in 0..PAGES / 2 {
        write(page, &page_bytes(seed + page as u64))?;
    }
    order()?;
    eq("figures of a reservation", figures()?, before)?;
    force(ctx, "none")?;
    guest.holds(0, PAGES / 2, seed)?;
    guest.holds_noise(PAGES / 2, PAGES)?;
    Ok(())
}

fn knobs(ctx: &Ctx) -> Result<()> {
    let sys = ctx.sys();
    let mount = ctx.mount("m", "size=64M")?;
    let guest = mount.guest("web", 16)?;
    let vm = guest.sysfs(ctx);
    let (invalid, range) = (Some(Errno::EINVAL as i32), Some(Errno::ERANGE as i32));
    let host = [
        "compress_max_percent",
        "compress_max_object_percent",
        "idle_tax_percent",
    ];
    let defaults = [10, 50, 75];
    for (name, default) in host.into_iter().zip(defaults) {
        eq(name, sys.get(name)?, default)?;
        for (bad, errno) in [
            ("101", range),
            ("-1", invalid),
            ("5%", invalid),
            ("x", invalid),
        ] {
            let error = sys.try_set(name, bad.as_bytes()).err();
            eq(
                format!("{name} {bad:?}"),
                error.and_then(|e| e.raw_os_error()),
                errno,
            )?;
        }
        eq(format!("{name} after bad values"), sys.get(name)?, default)?;
    }
    let cases = [
        ("shares", 1000, "1", "4294967295", &["0", "4294967296"][..]),
        (
            "reservation_kb",
            0,
            "0",
            "18014398509481983",
            &["18014398509481984"][..],
        ),
        (
            "limit_kb",
            0,
            "0",
            "18014398509481983",
            &["18014398509481984"][..],
        ),
        ("compress_max_percent", 0, "0", "100", &["101"][..]),
    ];
    for (name, default, least, most, out) in cases {
        eq(name, vm.get(name)?, default)?;
        for value in [least, most] {
            vm.set(name, value)?;
            eq(name, vm.word(name)?, value.to_owned())?;
        }
        for bad in out {
            let error = vm.try_set(name, bad.as_bytes()).err();
            eq(
                format!("{name} {bad:?}"),
                error.and_then(|e| e.raw_os_error()),
                range,
            )?;
        }
        for bad in ["-1", "1k", " 1", "x"] {
            let error = vm.try_set(name, bad.as_bytes()).err();
            eq(
                format!("{name} {bad:?}"),
                error.and_then(|e| e.raw_os_error()),
                invalid,
            )?;
        }
        eq(
            format!("{name} after bad values"),
            vm.word(name)?,
            most.to_owned(),
        )?;
    }
    Ok(())
}

fn ends(ctx: &Ctx) -> Result<()> {
    let sys = ctx.sys();
    let before = sys.get("metadata_bytes")?;
    for round in 0..3 {
        let mut mount = ctx.mount("m", "size=64M,domain=lab")?;
        let guest = filled(&mount, "web", 2048, 1)?;
        guest.sysfs(ctx).set("compress_max_percent", 100)?;
        squeeze(ctx, &guest, 2048)?;
        if round == 1 {
            // With a reader in the middle of it.
            let file = guest.file.try_clone()?;
            let reader = thread::spawn(move || {
                let mut bytes = vec![0; 64 * PAGE];
                for _ in 0..20 {
                    file.read_exact_at(&mut bytes, 0)?;
                }
                std::io::Result::Ok(())
            });
            std::fs::remove_file(&guest.path)?;
            reader.join().expect("the reader does not panic")?;
        }
        drop(guest);
        mount.unmount()?;
    }
    eq(
        "metadata_bytes when all is gone",
        sys.get("metadata_bytes")?,
        before,
    )
}
