// SPDX-License-Identifier: GPL-2.0

//! What guests, administrators and the module do that allocates: each is carried out while something
//! is refused to it, in `inject`.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};

use crate::check::{bytes_are, page_is};
use crate::compress::squeeze;
use crate::content::pages_bytes;
use crate::ctx::{Ctx, Guest, Mount};
use crate::sharing::SOON;
use crate::sys::{self, PAGE};

/// Pages of each file.
pub const PAGES: usize = 8;

/// What each operation works on: `a` and `b` hold the same pages.
pub struct Pair<'a> {
    /// The case.
    pub ctx: &'a Ctx,
    /// Where both are.
    pub mount: Mount<'a>,
    /// The VM that is worked on.
    pub a: Guest,
    /// The one that must not change.
    pub b: Guest,
}

/// What `a` is before an operation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Before {
    /// Nobody touched its pages.
    Untouched,
    /// All are merged with `b`'s.
    Merged,
    /// All are compressed, none is shared.
    Compressed,
}

/// An operation that allocates.
pub struct Operation {
    /// Names it.
    pub name: &'static str,
    /// What it begins with.
    pub before: Before,
    /// Carries it out. What it may refuse comes back as an error of the inner result.
    pub run: fn(&Pair<'_>) -> Result<io::Result<()>>,
    /// What all pages of `a` hold afterwards; what `b` holds is what it held.
    pub done: fn() -> Vec<u8>,
}

impl<'a> Pair<'a> {
    /// Two VMs in a new mount, as an operation needs them.
    pub fn new(ctx: &'a Ctx, before: Before) -> Result<Pair<'a>> {
        let mount = ctx.mount("m", "size=16M,domain=lab")?;
        let (a, b) = (mount.guest("a", PAGES)?, mount.guest("b", PAGES)?);
        b.fill(0, PAGES, 1);
        let sys = ctx.sys();
        match before {
            Before::Untouched => {}
            Before::Merged => {
                a.fill(0, PAGES, 1);
                sys.flat_out()?;
                ctx.until_is("pages_sharing", PAGES as u64, SOON)?;
                sys.set("run", 0)?;
            }
            Before::Compressed => {
                a.fill(0, PAGES, 1);
                for vm in [&a, &b] {
                    vm.sysfs(ctx).set("compress_max_percent", 100)?;
                }
                squeeze(ctx, &a, PAGES as u64)?;
            }
        }
        Ok(Pair { ctx, mount, a, b })
    }

    /// `a` holds `expected`, by its mapping and its file; `b` what it always held; sums are right.
    pub fn intact(&self, expected: &[u8]) -> Result<()> {
        let mut seen = vec![0; PAGES * PAGE];
        self.a.file.read_exact_at(&mut seen, 0)?;
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
            page_is("a by its mapping", &self.a.map.read_page(page), wanted)?;
        }
        self.b.holds(0, PAGES, 1)?;
        for vm in [&self.a, &self.b] {
            vm.sysfs(self.ctx).stat()?.check_sum()?;
        }
        Ok(())
    }
}

/// What both hold once they were filled.
pub fn merged() -> Vec<u8> {
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

/// Removes a file and its directory, if they are there.
fn remove(file: &Path, dir: &Path) -> io::Result<()> {
    for gone in [fs::remove_file(file), fs::remove_dir(dir)] {
        gone.or_else(|e| match e.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(e),
        })?;
    }
    Ok(())
}

fn punch(pair: &Pair<'_>) -> Result<io::Result<()>> {
    let len = 3 * PAGE as u64 + 100;
    Ok(sys::punch(&pair.a.file, 100, len).map_err(io::Error::from))
}

/// All of them.
pub const OPERATIONS: &[Operation] = &[
    Operation {
        name: "read faults",
        before: Before::Untouched,
        run: |pair| pair.a.is_zero(0, PAGES).map(Ok),
        done: zeroes,
    },
    Operation {
        name: "write faults",
        before: Before::Untouched,
        run: |pair| {
            pair.a.fill(0, PAGES, 900);
            Ok(Ok(()))
        },
        done: rewritten,
    },
    Operation {
        name: "write faults on shared pages",
        before: Before::Merged,
        run: |pair| {
            pair.a.fill(0, PAGES, 900);
            Ok(Ok(()))
        },
        done: rewritten,
    },
    Operation {
        name: "write(2)",
        before: Before::Untouched,
        run: |pair| Ok(pair.a.file.write_all_at(&rewritten(), 0)),
        done: rewritten,
    },
    Operation {
        name: "write(2) to shared pages",
        before: Before::Merged,
        run: |pair| Ok(pair.a.file.write_all_at(&rewritten(), 0)),
        done: rewritten,
    },
    Operation {
        name: "read(2)",
        before: Before::Merged,
        run: |pair| Ok(pair.a.file.read_exact_at(&mut merged(), 0)),
        done: merged,
    },
    Operation {
        name: "fallocate",
        before: Before::Untouched,
        run: |pair| {
            let len = (PAGES * PAGE) as i64;
            Ok(sys::fallocate(&pair.a.file, 0, 0, len).map_err(io::Error::from))
        },
        done: zeroes,
    },
    Operation {
        name: "a hole that begins and ends in shared pages",
        before: Before::Merged,
        run: punch,
        done: cut,
    },
    Operation {
        name: "merge",
        before: Before::Untouched,
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
        before: Before::Merged,
        run: |pair| set(pair, "run", "2"),
        done: merged,
    },
    Operation {
        name: "share_scope vm",
        before: Before::Merged,
        run: |pair| set(pair, "share_scope", "vm"),
        done: merged,
    },
    Operation {
        name: "another domain",
        before: Before::Merged,
        run: |pair| set_vm(pair, "domain", "other"),
        done: merged,
    },
    Operation {
        name: "share 0",
        before: Before::Merged,
        run: |pair| set_vm(pair, "share", "0"),
        done: merged,
    },
    Operation {
        name: "compress",
        before: Before::Untouched,
        run: |pair| {
            pair.a.fill(0, PAGES, 1);
            pair.a.sysfs(pair.ctx).set("compress_max_percent", 100)?;
            squeeze(pair.ctx, &pair.a, PAGES as u64)?;
            Ok(Ok(()))
        },
        done: merged,
    },
    Operation {
        name: "read faults on compressed pages",
        before: Before::Compressed,
        run: |pair| pair.a.holds(0, PAGES, 1).map(Ok),
        done: merged,
    },
    Operation {
        name: "write faults on compressed pages",
        before: Before::Compressed,
        run: |pair| {
            pair.a.fill(0, PAGES, 900);
            Ok(Ok(()))
        },
        done: rewritten,
    },
    Operation {
        name: "read(2) of compressed pages",
        before: Before::Compressed,
        run: |pair| Ok(pair.a.file.read_exact_at(&mut merged(), 0)),
        done: merged,
    },
    Operation {
        name: "write(2) to compressed pages",
        before: Before::Compressed,
        run: |pair| Ok(pair.a.file.write_all_at(&rewritten(), 0)),
        done: rewritten,
    },
    Operation {
        name: "a hole that begins and ends in compressed pages",
        before: Before::Compressed,
        run: punch,
        done: cut,
    },
    Operation {
        name: "truncation within a compressed page",
        before: Before::Compressed,
        run: |pair| {
            let truncated = pair.a.file.set_len(2 * PAGE as u64 + 100);
            Ok(truncated.and_then(|()| pair.a.file.set_len((PAGES * PAGE) as u64)))
        },
        done: || {
            let mut bytes = merged();
            bytes[2 * PAGE + 100..].fill(0);
            bytes
        },
    },
    Operation {
        name: "a VM that comes and goes",
        before: Before::Untouched,
        run: |pair| {
            let dir = pair.mount.at("c");
            let ram = dir.join("ram");
            // What the first attempt left when removing failed goes first.
            let done = remove(&ram, &dir)
                .and_then(|()| fs::create_dir(&dir))
                .and_then(|()| File::create_new(&ram))
                .and_then(|file| file.set_len((PAGES * PAGE) as u64))
                .and_then(|()| remove(&ram, &dir));
            if done.is_ok() {
                pair.ctx.until("VM c is gone", SOON, || {
                    let left = pair.ctx.sys().vms().unwrap_or_default();
                    Ok((left.len() == 2, format!("{left:?}")))
                })?;
            }
            Ok(done)
        },
        done: zeroes,
    },
];
