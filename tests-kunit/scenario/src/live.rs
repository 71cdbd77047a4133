// SPDX-License-Identifier: GPL-2.0

//! Debug builds only: how much of what the kernel lends the module is out. kmemleak sees no pages.

use std::fs;
use std::path::PathBuf;
use std::thread;

use anyhow::{Context, Result};

use crate::check::{eq, skip, that};
use crate::compress::squeeze;
use crate::ctx::Ctx;
use crate::harness::Case;

/// The table of cases.
pub const CASES: &[Case] = &[Case::thinram(
    "debug/forgotten-page",
    "what the kernel lends is counted, and a page that does not come back is noticed",
    forgotten_page,
)];

/// References to pages and to 2 MiB folios, pools of zsmalloc, and objects in them.
const KINDS: [&str; 4] = ["frames", "folios", "pools", "objects"];

/// What was out while there was no VM: nothing where the module does not count.
pub struct Live {
    files: Vec<PathBuf>,
    most: Vec<i64>,
}

impl Live {
    /// As of now.
    pub fn now(ctx: &Ctx) -> Result<Live> {
        let files = KINDS
            .map(|kind| ctx.setup.debug.join(format!("live_{kind}")))
            .into_iter()
            .filter(|file| file.exists())
            .collect();
        let mut live = Live {
            files,
            most: Vec::new(),
        };
        live.most = live.read()?;
        Ok(live)
    }

    fn read(&self) -> Result<Vec<i64>> {
        let number = |file: &PathBuf| {
            let text = fs::read_to_string(file).with_context(|| format!("{}", file.display()))?;
            Ok(text.trim_end().parse()?)
        };
        self.files.iter().map(number).collect()
    }

    /// Whether no more is out than there was, and how much is. The next time it may be no more than now.
    fn is_back(&mut self) -> Result<(bool, String)> {
        let seen = self.read()?;
        let back = seen.iter().zip(&self.most).all(|(now, most)| now <= most);
        let text = format!("{seen:?} of {KINDS:?}, {:?} before", self.most);
        if back {
            self.most = seen;
        }
        Ok((back, text))
    }

    /// Waits until no more is out, after the last VM went.
    pub fn until_back(&mut self, ctx: &Ctx) -> Result<()> {
        ctx.until("all that the kernel lent to be back", 20.0, || {
            self.is_back()
        })
    }
}

fn forgotten_page(ctx: &Ctx) -> Result<()> {
    const PAGES: i64 = 32;
    let wrong = ctx.setup.debug.join("do_wrong");
    let mut live = Live::now(ctx)?;
    if live.files.is_empty() {
        return Err(skip("not a debug build of the module"));
    }
    eq("kinds that are counted", live.files.len(), KINDS.len())?;
    // The scanner, which just stopped, gives back what it kept.
    thread::sleep(ctx.limit(0.3));
    live.until_back(ctx)?;
    let mount = ctx.mount("m", "size=16M,domain=lab")?;
    let guest = mount.guest("web", PAGES as usize)?;
    guest.fill(0, PAGES as usize, 1);
    let until = |more: [i64; KINDS.len()]| {
        ctx.until(&format!("{more:?} more of {KINDS:?}"), 10.0, || {
            let seen = live.read()?;
            let seen: Vec<i64> = seen.iter().zip(&live.most).map(|(a, b)| a - b).collect();
            Ok((seen == more, format!("{seen:?}")))
        })
    };
    until([PAGES, 0, 0, 0])?;
    guest.sysfs(ctx).set("compress_max_percent", 100)?;
    squeeze(ctx, &guest, PAGES as u64)?;
    until([0, 0, 1, PAGES])?;
    guest.holds(0, PAGES as usize, 1)?;
    drop(guest);
    drop(mount);
    ctx.until_no_vm()?;
    live.until_back(ctx)?;
    fs::write(&wrong, "leak_frame").with_context(|| format!("{}", wrong.display()))?;
    let (back, seen) = live.is_back()?;
    that(format!("a forgotten page is noticed: {seen}"), !back)
}
