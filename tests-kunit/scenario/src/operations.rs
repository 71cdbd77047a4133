// SPDX-License-Identifier: GPL-2.0

//! What guests, administrators and the module do that allocates: each is carried out while something
//! is refused to it, in `inject`.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::MsFlags;

use crate::check::{bytes_are, page_is};
use crate::cold::pack;
use crate::compress::squeeze;
use crate::content::pages_bytes;
use crate::contention::force;
use crate::ctx::{Ctx, Guest, Mount};
use crate::huge::{self, LARGE, LARGE_KB};
use crate::sharing::SOON;
use crate::swap::{push_out, until_vm};
use crate::swapshared;
use crate::sys::{self, PAGE};

/// Pages of each file but those of 2 MiB.
pub const PAGES: usize = 8;
/// KiB of them.
const KB: u64 = 4 * PAGES as u64;

/// What each operation works on: `a` and `b` hold the same pages.
pub struct Pair<'a> {
    /// The case.
    pub ctx: &'a Ctx,
    /// The VM that is worked on.
    pub a: Guest,
    /// The one that must not change.
    pub b: Guest,
    /// Where both are: taken down when they are gone.
    pub mount: Mount<'a>,
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
    /// The same, and then gone to swap; needs a `swap_dir`.
    Swapped,
    /// All are merged with `b`'s, and these are compressed.
    Packed,
    /// The same, and then gone to swap.
    PackedSwapped,
    /// 512 pages, of which nobody touched one, and 2 MiB would be had for them.
    LargeUntouched,
    /// One page of 2 MiB; the first of it are `b`'s.
    Large,
}

impl Before {
    fn pages(self) -> usize {
        match self {
            Before::LargeUntouched | Before::Large => LARGE,
            _ => PAGES,
        }
    }
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
        let b = mount.guest("b", PAGES)?;
        b.fill(0, PAGES, 1);
        let a = mount.guest("a", before.pages())?;
        let sys = ctx.sys();
        let merge = || -> Result<()> {
            a.fill(0, PAGES, 1);
            sys.flat_out()?;
            ctx.until_is("pages_sharing", PAGES as u64, SOON)?;
            sys.set("run", 0)
        };
        let compress = || -> Result<()> {
            a.fill(0, PAGES, 1);
            for vm in [&a, &b] {
                vm.sysfs(ctx).set("compress_max_percent", 100)?;
            }
            squeeze(ctx, &a, PAGES as u64)
        };
        let pack_merged = || -> Result<()> {
            sys.set("compress_max_percent", 100)?;
            merge()?;
            pack(ctx, PAGES)
        };
        match before {
            Before::Untouched => {}
            Before::Merged => merge()?,
            Before::Compressed => compress()?,
            Before::Swapped => {
                sys.set("swap_dir", swap_dir(ctx).display())?;
                compress()?;
                a.sysfs(ctx).set("compress_max_percent", 0)?;
                push_out(ctx, &a, PAGES)?;
            }
            Before::Packed => pack_merged()?,
            Before::PackedSwapped => {
                pack_merged()?;
                swapshared::push_out(ctx, KB)?;
            }
            Before::LargeUntouched => huge::always(ctx)?,
            Before::Large => {
                huge::always(ctx)?;
                a.fill(0, LARGE, 1);
                huge::huge_is(ctx, "before", "a", LARGE_KB)?;
            }
        }
        Ok(Pair { ctx, mount, a, b })
    }

    /// `a` holds `expected`, by its mapping and its file; `b` what it always held; sums are right.
    pub fn intact(&self, expected: &[u8]) -> Result<()> {
        let pages = self.a.map.pages();
        let mut seen = vec![0; pages * PAGE];
        self.a.file.read_exact_at(&mut seen, 0)?;
        bytes_are("a by read(2)", &seen, expected)?;
        for page in 0..pages {
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

fn read_all(pair: &Pair<'_>) -> Result<io::Result<()>> {
    Ok(pair.a.file.read_exact_at(&mut merged(), 0))
}

fn write_all(pair: &Pair<'_>) -> Result<io::Result<()>> {
    Ok(pair.a.file.write_all_at(&rewritten(), 0))
}

fn read_faults(pair: &Pair<'_>) -> Result<io::Result<()>> {
    pair.a.holds(0, PAGES, 1).map(Ok)
}

fn write_faults(pair: &Pair<'_>) -> Result<io::Result<()>> {
    pair.a.fill(0, PAGES, 900);
    Ok(Ok(()))
}

/// Waits until there is no VM but the two.
fn until_two(pair: &Pair<'_>) -> Result<()> {
    pair.ctx.until("no third VM", SOON, || {
        let left = pair.ctx.sys().vms().unwrap_or_default();
        Ok((left.len() == 2, format!("{left:?}")))
    })
}

fn large() -> Vec<u8> {
    pages_bytes(1, LARGE)
}

/// What needs a swap disk.
pub const ON_DISK: &[Operation] = &[
    Operation {
        name: "compressed objects to swap",
        before: Before::Compressed,
        run: |pair| {
            pair.a.sysfs(pair.ctx).set("compress_max_percent", 0)?;
            until_vm(pair.ctx, &pair.a, "swapped_kb", |kb| kb == KB)?;
            Ok(Ok(()))
        },
        done: merged,
    },
    Operation {
        name: "read faults on swapped objects",
        before: Before::Swapped,
        run: read_faults,
        done: merged,
    },
    Operation {
        name: "write faults on swapped objects",
        before: Before::Swapped,
        run: write_faults,
        done: rewritten,
    },
    Operation {
        name: "read(2) of swapped objects",
        before: Before::Swapped,
        run: read_all,
        done: merged,
    },
    Operation {
        name: "a hole that begins and ends in swapped objects",
        before: Before::Swapped,
        run: punch,
        done: cut,
    },
    Operation {
        name: "shared pages to swap",
        before: Before::Packed,
        run: |pair| {
            swapshared::push_out(pair.ctx, KB)?;
            Ok(Ok(()))
        },
        done: merged,
    },
    Operation {
        name: "read faults on swapped shared pages",
        before: Before::PackedSwapped,
        run: read_faults,
        done: merged,
    },
    Operation {
        name: "write faults on swapped shared pages",
        before: Before::PackedSwapped,
        run: write_faults,
        done: rewritten,
    },
    Operation {
        name: "another swap_dir, and the first one again",
        before: Before::Untouched,
        run: |pair| {
            let sys = pair.ctx.sys();
            let other = swap_dir(pair.ctx).join("lost+found");
            let dirs = [other, swap_dir(pair.ctx)];
            let mut set = dirs.iter().map(|dir| {
                let dir = dir.display().to_string();
                sys.try_set("swap_dir", dir.as_bytes())
            });
            Ok(set.try_for_each(|done| done))
        },
        done: zeroes,
    },
    Operation {
        name: "no swap_dir any more, and all comes back",
        before: Before::Swapped,
        run: |pair| set(pair, "swap_dir", "\n"),
        done: merged,
    },
];

/// Where the cases of [`ON_DISK`] have their disk.
fn swap_dir(ctx: &Ctx) -> PathBuf {
    ctx.dir.join("disk")
}

/// What needs pages of 2 MiB.
pub const LARGE_PAGES: &[Operation] = &[
    Operation {
        name: "faults of 2 MiB",
        before: Before::LargeUntouched,
        run: |pair| {
            pair.a.fill(0, LARGE, 1);
            Ok(Ok(()))
        },
        done: large,
    },
    Operation {
        name: "fallocate of 2 MiB",
        before: Before::LargeUntouched,
        run: |pair| {
            let len = (LARGE * PAGE) as i64;
            Ok(sys::fallocate(&pair.a.file, 0, 0, len).map_err(io::Error::from))
        },
        done: || vec![0; LARGE * PAGE],
    },
    Operation {
        name: "a split that merges",
        before: Before::Large,
        run: |pair| {
            let sys = pair.ctx.sys();
            sys.flat_out()?;
            force(pair.ctx, "clear")?;
            pair.ctx.until_is("pages_sharing", PAGES as u64, SOON)?;
            force(pair.ctx, "none")?;
            sys.set("run", 0)?;
            Ok(Ok(()))
        },
        done: large,
    },
];

/// What any kernel can do.
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
        run: write_faults,
        done: rewritten,
    },
    Operation {
        name: "write faults on shared pages",
        before: Before::Merged,
        run: write_faults,
        done: rewritten,
    },
    Operation {
        name: "write(2)",
        before: Before::Untouched,
        run: write_all,
        done: rewritten,
    },
    Operation {
        name: "write(2) to shared pages",
        before: Before::Merged,
        run: write_all,
        done: rewritten,
    },
    Operation {
        name: "read(2)",
        before: Before::Merged,
        run: read_all,
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
        run: read_faults,
        done: merged,
    },
    Operation {
        name: "write faults on compressed pages",
        before: Before::Compressed,
        run: write_faults,
        done: rewritten,
    },
    Operation {
        name: "read(2) of compressed pages",
        before: Before::Compressed,
        run: read_all,
        done: merged,
    },
    Operation {
        name: "write(2) to compressed pages",
        before: Before::Compressed,
        run: write_all,
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
                until_two(pair)?;
            }
            Ok(done)
        },
        done: zeroes,
    },
];

/// The same; fail/allocations, in which the kernel refuses, leaves them out.
pub const FURTHER: &[Operation] = &[
    Operation {
        name: "limit_kb",
        before: Before::Untouched,
        run: |pair| {
            pair.a.fill(0, PAGES, 1);
            let vm = pair.a.sysfs(pair.ctx);
            vm.set("compress_max_percent", 100)?;
            vm.set("limit_kb", KB / 2)?;
            // So little takes as much in the pool as before.
            until_vm(pair.ctx, &pair.a, "compressed_kb", |kb| kb >= KB / 2)?;
            Ok(vm.try_set("limit_kb", b"0"))
        },
        done: merged,
    },
    Operation {
        name: "shared pages compressed",
        before: Before::Merged,
        run: |pair| {
            pair.ctx.sys().set("compress_max_percent", 100)?;
            pack(pair.ctx, PAGES)?;
            Ok(Ok(()))
        },
        done: merged,
    },
    Operation {
        name: "read faults on compressed shared pages",
        before: Before::Packed,
        run: read_faults,
        done: merged,
    },
    Operation {
        name: "write faults on compressed shared pages",
        before: Before::Packed,
        run: write_faults,
        done: rewritten,
    },
    Operation {
        name: "read(2) of compressed shared pages",
        before: Before::Packed,
        run: read_all,
        done: merged,
    },
    Operation {
        name: "write(2) to compressed shared pages",
        before: Before::Packed,
        run: write_all,
        done: rewritten,
    },
    Operation {
        name: "run 2 with compressed shared pages",
        before: Before::Packed,
        run: |pair| set(pair, "run", "2"),
        done: merged,
    },
    Operation {
        name: "large_pages of a VM",
        before: Before::Untouched,
        run: |pair| {
            let values = ["always", "never"].iter();
            let mut set = values.map(|value| set_vm(pair, "large_pages", value));
            set.try_fold(Ok(()), |done, set| Ok(done.and(set?)))
        },
        done: zeroes,
    },
    Operation {
        name: "a VM that is renamed, and back",
        before: Before::Untouched,
        run: |pair| {
            let (old, new) = (pair.mount.at("a"), pair.mount.at("z"));
            // The first attempt may have got half-way.
            let done = match new.exists() {
                true => Ok(()),
                false => fs::rename(&old, &new),
            };
            Ok(done.and_then(|()| fs::rename(&new, &old)))
        },
        done: zeroes,
    },
    Operation {
        name: "a mount that comes, grows and goes",
        before: Before::Untouched,
        run: |pair| {
            // That of the first attempt is on its way out.
            until_two(pair)?;
            let mut mount = pair.ctx.mount("n", "size=4M,domain=lab")?;
            let guest = mount.guest("c", 2)?;
            guest.fill(0, 2, 1);
            guest.holds(0, 2, 1)?;
            mount.remount(MsFlags::empty(), "size=8M")?;
            drop(guest);
            mount.unmount()?;
            until_two(pair)?;
            Ok(Ok(()))
        },
        done: zeroes,
    },
];
