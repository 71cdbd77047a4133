// SPDX-License-Identifier: GPL-2.0

//! Random calls against a model of what files and mappings must hold.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::uio::{process_vm_readv, process_vm_writev, RemoteIoVec};
use nix::unistd::Pid;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::check::{bytes_are, eq, fails, within};
use crate::content::page_bytes;
use crate::contention;
use crate::ctx::Ctx;
use crate::harness::Case;
use crate::sys::{self, Map, PAGE, R, RW};

/// The table of cases.
pub const CASES: &[Case] = &[Case::both(
    "fuzz/calls",
    "random calls against a model; replay with --seed",
    calls,
)
.span(10.0)];

/// Largest length of a file, in pages.
const CAP: usize = 48;
/// Pages of address space that mappings come and go in.
const ARENA: usize = 96;
const FILES: usize = 3;
/// Contents that pages have in common, so that they merge.
const CLASSES: u64 = 6;
/// Calls between two changes of whether pages are compressed.
const SQUEEZE: u64 = 500;
/// Calls that a failure shows.
const SHOWN: usize = 12;

/// One call with its arguments.
#[derive(Debug, Clone)]
enum Op {
    Pwrite {
        file: usize,
        at: usize,
        seed: u64,
        len: usize,
    },
    Pread {
        file: usize,
        at: usize,
        len: usize,
    },
    Truncate {
        file: usize,
        len: usize,
    },
    Punch {
        file: usize,
        at: usize,
        len: usize,
    },
    Prealloc {
        file: usize,
        at: usize,
        len: usize,
    },
    Map {
        at: usize,
        file: usize,
        page: usize,
        pages: usize,
        prot: i32,
    },
    Unmap {
        at: usize,
        pages: usize,
    },
    Protect {
        at: usize,
        pages: usize,
        prot: i32,
    },
    Move {
        from: usize,
        to: usize,
    },
    Advise {
        at: usize,
        pages: usize,
        advice: i32,
    },
    Store {
        at: usize,
        word: usize,
        words: usize,
        value: u64,
    },
    Load {
        at: usize,
    },
    Poke {
        at: usize,
        offset: usize,
        seed: u64,
        len: usize,
    },
    Peek {
        at: usize,
        pages: usize,
    },
    Lock {
        at: usize,
        pages: usize,
    },
    Sync,
    /// Gives the scanner time to merge.
    Rest,
    Setting {
        number: usize,
    },
}

/// What one page of the arena shows.
#[derive(Debug, Clone, Copy)]
struct Slot {
    file: usize,
    page: usize,
    prot: i32,
}

struct Model {
    /// The bytes of each file; the length is the file's.
    files: [Vec<u8>; FILES],
    arena: [Option<Slot>; ARENA],
}

impl Model {
    /// The bytes behind an arena page, `None` where it lies beyond the file's end in part.
    fn whole(&self, slot: Slot) -> Option<std::ops::Range<usize>> {
        let range = slot.page * PAGE..(slot.page + 1) * PAGE;
        (range.end <= self.files[slot.file].len()).then_some(range)
    }

    /// The slot at `at` if it allows `prot` and lies wholly within its file.
    fn usable(&self, at: usize, prot: i32) -> Option<Slot> {
        let slot = self.arena[at]?;
        (slot.prot & prot == prot && self.whole(slot).is_some()).then_some(slot)
    }

    /// Whether all of the run is usable.
    fn all_usable(&self, at: usize, pages: usize, prot: i32) -> bool {
        (at..at + pages).all(|page| self.usable(page, prot).is_some())
    }

    /// Whether all of the run is mapped.
    fn all_mapped(&self, at: usize, pages: usize) -> bool {
        self.arena[at..at + pages].iter().all(Option::is_some)
    }

    fn write(&mut self, file: usize, at: usize, data: &[u8]) {
        let bytes = &mut self.files[file];
        if bytes.len() < at + data.len() {
            bytes.resize(at + data.len(), 0);
        }
        bytes[at..at + data.len()].copy_from_slice(data);
    }

    fn zero(&mut self, file: usize, at: usize, len: usize) {
        let size = self.files[file].len();
        self.files[file][at.min(size)..(at + len).min(size)].fill(0);
    }
}

/// `len` bytes that lie at `at`: pages of one of the common contents, so that aligned ones are
/// equal wherever they are.
fn data(at: usize, seed: u64, len: usize) -> Vec<u8> {
    let page = page_bytes(seed);
    (at..at + len).map(|i| page[i % PAGE]).collect()
}

/// Draws the next call.
fn draw(rng: &mut SmallRng) -> Op {
    let file = rng.random_range(0..FILES);
    let seed = if rng.random_bool(0.8) {
        rng.random_range(0..CLASSES)
    } else {
        rng.random()
    };
    // Half of the ranges are aligned.
    let range = |rng: &mut SmallRng, most: usize| -> (usize, usize) {
        if rng.random() {
            let at = rng.random_range(0..CAP);
            (at * PAGE, rng.random_range(1..=most.min(CAP - at)) * PAGE)
        } else {
            let at = rng.random_range(0..CAP * PAGE);
            (at, rng.random_range(1..=(most * PAGE).min(CAP * PAGE - at)))
        }
    };
    let at = rng.random_range(0..ARENA);
    let pages = rng.random_range(1..=12.min(ARENA - at));
    let prot = [libc::PROT_NONE, R, RW, RW, RW][rng.random_range(0..5)];
    match rng.random_range(0..100) {
        0..=14 => {
            let (at, len) = range(rng, 3);
            Op::Pwrite {
                file,
                at,
                seed,
                len,
            }
        }
        15..=19 => {
            let (at, len) = range(rng, 8);
            Op::Pread { file, at, len }
        }
        20..=22 => {
            let len = rng.random_range(0..=CAP * PAGE);
            Op::Truncate {
                file,
                len: if rng.random() { len / PAGE * PAGE } else { len },
            }
        }
        23..=28 => {
            let (at, len) = range(rng, 8);
            Op::Punch { file, at, len }
        }
        29..=31 => {
            let (at, len) = range(rng, 8);
            Op::Prealloc { file, at, len }
        }
        32..=41 => {
            let page = rng.random_range(0..CAP);
            Op::Map {
                at,
                file,
                page,
                pages: pages.min(CAP - page),
                prot,
            }
        }
        42..=44 => Op::Unmap { at, pages },
        45..=49 => Op::Protect { at, pages, prot },
        50..=53 => Op::Move {
            from: at,
            to: rng.random_range(0..ARENA),
        },
        54..=61 => {
            let advice = ADVICES[rng.random_range(0..ADVICES.len())];
            Op::Advise { at, pages, advice }
        }
        62..=77 => {
            let word = rng.random_range(0..512);
            let words = rng.random_range(1..=512 - word);
            Op::Store {
                at,
                word,
                words,
                value: seed,
            }
        }
        78..=87 => Op::Load { at },
        88..=91 => {
            let offset = rng.random_range(0..PAGE);
            Op::Poke {
                at,
                offset,
                seed,
                len: rng.random_range(1..=pages * PAGE - offset),
            }
        }
        92..=95 => Op::Peek { at, pages },
        96 => Op::Lock { at, pages },
        97 => Op::Sync,
        98 => Op::Rest,
        _ => Op::Setting {
            number: rng.random_range(0..8),
        },
    }
}

/// Every advice that is for a caller without special needs; two may be unknown to the kernel.
const ADVICES: [i32; 17] = [
    libc::MADV_NORMAL,
    libc::MADV_RANDOM,
    libc::MADV_SEQUENTIAL,
    libc::MADV_WILLNEED,
    libc::MADV_DONTNEED,
    libc::MADV_FREE,
    libc::MADV_REMOVE,
    libc::MADV_DONTFORK,
    libc::MADV_DONTDUMP,
    libc::MADV_MERGEABLE,
    libc::MADV_UNMERGEABLE,
    libc::MADV_HUGEPAGE,
    libc::MADV_NOHUGEPAGE,
    libc::MADV_COLD,
    libc::MADV_PAGEOUT,
    libc::MADV_POPULATE_READ,
    libc::MADV_POPULATE_WRITE,
];

/// The real thing beside its model.
struct Bench<'a> {
    ctx: &'a Ctx,
    files: Vec<File>,
    arena: Map,
    model: Model,
}

impl Bench<'_> {
    fn apply(&mut self, op: &Op) -> Result<()> {
        match *op {
            Op::Pwrite {
                file,
                at,
                seed,
                len,
            } => {
                let data = data(at, seed, len);
                eq(
                    "bytes written",
                    self.files[file].write_at(&data, at as u64)?,
                    len,
                )?;
                self.model.write(file, at, &data);
            }
            Op::Pread { file, at, len } => {
                let size = self.model.files[file].len();
                let expected = &self.model.files[file][at.min(size)..(at + len).min(size)];
                let mut seen = vec![0xa5; len];
                let n = self.files[file].read_at(&mut seen, at as u64)?;
                bytes_are(format!("file {file} at {at}"), &seen[..n], expected)?;
            }
            Op::Truncate { file, len } => {
                self.files[file].set_len(len as u64)?;
                self.model.files[file].resize(len, 0);
            }
            Op::Punch { file, at, len } => {
                sys::punch(&self.files[file], at as u64, len as u64)?;
                self.model.zero(file, at, len);
            }
            Op::Prealloc { file, at, len } => {
                sys::fallocate(&self.files[file], 0, at as i64, len as i64)?;
                let size = self.model.files[file].len().max(at + len);
                self.model.files[file].resize(size, 0);
            }
            Op::Map {
                at,
                file,
                page,
                pages,
                prot,
            } => {
                let offset = (page * PAGE) as u64;
                let source = Some((&self.files[file], offset, prot));
                self.arena.replace(at * PAGE, pages * PAGE, source)?;
                for i in 0..pages {
                    self.model.arena[at + i] = Some(Slot {
                        file,
                        page: page + i,
                        prot,
                    });
                }
            }
            Op::Unmap { at, pages } => {
                self.arena.replace(at * PAGE, pages * PAGE, None)?;
                self.model.arena[at..at + pages].fill(None);
            }
            Op::Protect { at, pages, prot } => {
                if self.model.all_mapped(at, pages) {
                    self.arena.protect(at * PAGE, pages * PAGE, prot)?;
                    for slot in self.model.arena[at..at + pages].iter_mut().flatten() {
                        slot.prot = prot;
                    }
                }
            }
            Op::Move { from, to } => {
                if from != to && self.model.arena[from].is_some() {
                    self.arena.shift(from * PAGE, to * PAGE, PAGE)?;
                    self.model.arena[to] = self.model.arena[from].take();
                }
            }
            Op::Advise { at, pages, advice } => self.advise(at, pages, advice)?,
            Op::Store {
                at,
                word,
                words,
                value,
            } => {
                if let Some(slot) = self.model.usable(at, RW) {
                    let content = data(word * 8, value, words * 8);
                    for (i, chunk) in content.chunks_exact(8).enumerate() {
                        self.arena
                            .set(at, word + i, u64::from_ne_bytes(chunk.try_into()?));
                    }
                    self.model
                        .write(slot.file, slot.page * PAGE + word * 8, &content);
                }
            }
            Op::Load { at } => {
                if let Some(slot) = self.model.usable(at, R) {
                    let seen: Vec<u8> = self.arena.bytes()[at * PAGE..(at + 1) * PAGE]
                        .iter()
                        .map(|byte| byte.load(Ordering::Relaxed))
                        .collect();
                    self.compare(at, slot, &seen)?;
                }
            }
            Op::Poke {
                at,
                offset,
                seed,
                len,
            } => {
                let pages = (offset + len).div_ceil(PAGE);
                if self.model.all_usable(at, pages, RW) {
                    let content = data(offset, seed, len);
                    let base = self.arena.addr() + at * PAGE + offset;
                    let remote = [RemoteIoVec { base, len }];
                    let n = process_vm_writev(Pid::this(), &[IoSlice::new(&content)], &remote)?;
                    eq("bytes by process_vm_writev", n, len)?;
                    let mut done = 0;
                    while done < len {
                        let position = offset + done;
                        let part = (PAGE - position % PAGE).min(len - done);
                        if let Some(slot) = self.model.arena[at + position / PAGE] {
                            let to = slot.page * PAGE + position % PAGE;
                            self.model.write(slot.file, to, &content[done..done + part]);
                        }
                        done += part;
                    }
                }
            }
            Op::Peek { at, pages } => {
                if self.model.all_usable(at, pages, R) {
                    let mut seen = vec![0xa5; pages * PAGE];
                    let len = seen.len();
                    let remote = [RemoteIoVec {
                        base: self.arena.addr() + at * PAGE,
                        len,
                    }];
                    let local = &mut [IoSliceMut::new(&mut seen)];
                    let n = process_vm_readv(Pid::this(), local, &remote)?;
                    eq("bytes by process_vm_readv", n, len)?;
                    for (i, page) in seen.chunks_exact(PAGE).enumerate() {
                        if let Some(slot) = self.model.arena[at + i] {
                            self.compare(at + i, slot, page)?;
                        }
                    }
                }
            }
            Op::Lock { at, pages } => {
                if self.model.all_usable(at, pages, R) {
                    self.arena.lock_part(at * PAGE, pages * PAGE)?;
                    // Locked memory refuses some advices on tmpfs, and not on ThinRAM.
                    self.arena.unlock_part(at * PAGE, pages * PAGE)?;
                }
            }
            Op::Sync => self.arena.sync(libc::MS_SYNC)?,
            Op::Rest => std::thread::sleep(std::time::Duration::from_millis(2)),
            Op::Setting { number } => self.setting(number)?,
        }
        Ok(())
    }

    fn advise(&mut self, at: usize, pages: usize, advice: i32) -> Result<()> {
        if !self.model.all_mapped(at, pages) {
            return Ok(());
        }
        let needs = match advice {
            libc::MADV_POPULATE_READ => Some(R),
            libc::MADV_POPULATE_WRITE => Some(RW),
            _ => None,
        };
        if needs.is_some_and(|prot| !self.model.all_usable(at, pages, prot)) {
            return Ok(());
        }
        let done = self.arena.advise(at * PAGE, pages * PAGE, advice);
        match advice {
            libc::MADV_FREE => fails("MADV_FREE", done, Errno::EINVAL)?,
            libc::MADV_MERGEABLE
            | libc::MADV_UNMERGEABLE
            | libc::MADV_HUGEPAGE
            | libc::MADV_NOHUGEPAGE
                if done == Err(Errno::EINVAL) => {}
            _ => done.with_context(|| format!("advice {advice}"))?,
        }
        if advice == libc::MADV_REMOVE {
            for i in at..at + pages {
                if let Some(slot) = self.model.arena[i] {
                    self.model.zero(slot.file, slot.page * PAGE, PAGE);
                }
            }
        }
        Ok(())
    }

    /// Changes something about sharing that must change no content.
    fn setting(&self, number: usize) -> Result<()> {
        if !self.ctx.is_thinram() {
            return Ok(());
        }
        let sys = self.ctx.sys();
        let vm = sys.vm(["a", "b", "c"][number % 3]);
        match number {
            0 => sys.set("run", 2).and_then(|()| sys.set("run", 1)),
            1 => sys.set("run", 0).and_then(|()| sys.set("run", 1)),
            2 => vm.set("share", 0).and_then(|()| vm.set("share", 1)),
            3 => vm.set("domain", "other"),
            4 => vm.set("domain", "lab"),
            5 => sys.set("max_page_sharing", 2),
            6 => sys.set("max_page_sharing", 65536),
            _ => vm.stat()?.check_sum(),
        }
    }

    fn compare(&self, at: usize, slot: Slot, seen: &[u8]) -> Result<()> {
        match self.model.whole(slot) {
            Some(range) => bytes_are(
                format!("arena page {at}, file {} page {}", slot.file, slot.page),
                seen,
                &self.model.files[slot.file][range],
            ),
            None => Ok(()),
        }
    }

    /// Every file and every usable page of the arena.
    fn compare_all(&mut self) -> Result<()> {
        for file in 0..FILES {
            let size = self.model.files[file].len();
            eq(
                format!("size of file {file}"),
                self.files[file].metadata()?.len(),
                size as u64,
            )?;
            self.apply(&Op::Pread {
                file,
                at: 0,
                len: size,
            })?;
        }
        for at in 0..ARENA {
            self.apply(&Op::Load { at })?;
        }
        Ok(())
    }
}

fn calls(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let mut files = Vec::new();
    for vm in ["a", "b", "c"] {
        files.push(mount.file(vm, "ram", 0)?);
    }
    let mut arena = Map::anonymous(ARENA * PAGE)?;
    arena.replace(0, ARENA * PAGE, None)?;
    let model = Model {
        files: Default::default(),
        arena: [None; ARENA],
    };
    let mut bench = Bench {
        ctx,
        files,
        arena,
        model,
    };
    if ctx.is_thinram() {
        ctx.sys().flat_out()?;
    }
    let seed = ctx.setup.seed;
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut last: VecDeque<(u64, Op)> = VecDeque::new();
    let end = Instant::now() + ctx.span(10.0);
    let mut count = 0u64;
    while Instant::now() < end {
        if ctx.is_thinram() && count % SQUEEZE == 0 {
            // Pages are compressed underneath for as many calls, then not.
            let squeeze = count / SQUEEZE % 2 == 1;
            contention::force(ctx, if squeeze { "hard" } else { "none" })?;
        }
        let op = draw(&mut rng);
        last.push_back((count, op.clone()));
        if last.len() > SHOWN {
            last.pop_front();
        }
        let mut done = bench.apply(&op);
        if done.is_ok() && count % 200 == 199 {
            done = bench.compare_all();
        }
        if done.is_err() {
            for (number, op) in &last {
                println!("call {number}: {op:?}");
            }
        }
        done.with_context(|| format!("call {count} of --seed {seed}"))?;
        count += 1;
    }
    bench
        .compare_all()
        .with_context(|| format!("after {count} calls of --seed {seed}"))?;
    println!("{count} calls, seed {seed}");
    within("calls", count, 100, u64::MAX)?;
    if ctx.is_thinram() {
        let sys = ctx.sys();
        println!(
            "cow_breaks {}, full_scans {}, compressions {}, decompressions {}",
            sys.get("cow_breaks")?,
            sys.get("full_scans")?,
            sys.get("compressions")?,
            sys.get("decompressions")?
        );
        for vm in ["a", "b", "c"] {
            sys.vm(vm).stat()?.check_sum()?;
        }
    }
    Ok(())
}
