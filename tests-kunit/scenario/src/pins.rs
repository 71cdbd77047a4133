// SPDX-License-Identifier: GPL-2.0

//! Memory that a device holds for long: RDMA.

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;

use crate::check::{eq, fails};
use crate::ctx::{Ctx, Guest};
use crate::harness::Case;
use crate::sharing::{twins, SOON};
use crate::sys::rdma::{Access, Device};
use crate::sys::{self, Map, PAGE};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::both(
        "mmap/rdma",
        "RDMA cannot have guest memory to write to: EFAULT",
        rdma,
    ),
    Case::thinram(
        "mmap/rdma-read",
        "memory that RDMA may read stays where it is, shared or not",
        rdma_read,
    ),
];

fn rdma(ctx: &Ctx) -> Result<()> {
    let device = Device::new()?;
    let mount = ctx.mount("m", "size=16M")?;
    let guest = mount.guest("web", 4)?;
    guest.fill(0, 4, 1);
    let done = device.register(&guest.map, Access::Write);
    if ctx.is_thinram() {
        fails("guest memory", done, Errno::EFAULT)?;
        // The refusal is of this memory, not of the device.
        let anonymous = Map::anonymous(4 * PAGE)?;
        let region = device.register(&anonymous, Access::Write);
        device.release(region.context("anonymous memory")?)?;
    } else {
        device.release(done.context("a file of tmpfs")?)?;
    }
    guest.holds(0, 4, 1)
}

/// The frames of all pages, each of which is touched.
fn frames(guest: &Guest, first: u64) -> Result<Vec<Option<u64>>> {
    guest.holds(0, guest.map.pages(), first)?;
    sys::frames(&guest.map)
}

fn rdma_read(ctx: &Ctx) -> Result<()> {
    const PAGES: usize = 8;
    let device = Device::new()?;
    let (_mount, a, b) = twins(ctx, PAGES)?;
    let sys = ctx.sys();
    let region = device.register(&a.map, Access::Read)?;
    let before = frames(&a, 1)?;
    let refused = sys.get("merges_refused_pinned")?;
    sys.flat_out()?;
    ctx.until_least("merges_refused_pinned", refused + 1, SOON)?;
    ctx.passes(2)?;
    sys.set("run", 0)?;
    eq("pages_sharing", sys.get("pages_sharing")?, 0)?;
    eq("frames after some passes", frames(&a, 1)?, before.clone())?;
    // What the guest writes the device would send.
    a.fill(0, PAGES, 50);
    eq("frames after a write", frames(&a, 50)?, before)?;
    a.fill(0, PAGES, 1);
    device.release(region)?;

    sys.flat_out()?;
    ctx.until_is("pages_sharing", PAGES as u64, SOON)?;
    sys.set("run", 0)?;
    // A page that is shared by then: the device has the common frame, and the guest's next write
    // goes elsewhere.
    let region = device.register(&a.map, Access::Read)?;
    let shared = frames(&a, 1)?;
    eq("frames of its twin", frames(&b, 1)?, shared.clone())?;
    a.fill(0, PAGES, 90);
    for (page, (now, then)) in frames(&a, 90)?.into_iter().zip(&shared).enumerate() {
        ensure!(
            now != *then,
            "page {page}: a write went to the shared frame"
        );
    }
    eq("frames of its twin", frames(&b, 1)?, shared)?;
    device.release(region)?;
    a.holds(0, PAGES, 90)
}
