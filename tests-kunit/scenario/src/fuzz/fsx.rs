// SPDX-License-Identifier: GPL-2.0

//! The checks of fsx, the file system exerciser: one file, read and written by calls and by
//! mappings, cut, grown, with holes; after each operation its length is checked, and what lies
//! beyond its end in the last page, which must be zeroes whenever somebody gets to see it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::copy_file_range;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::check::{bytes_are, eq};
use crate::ctx::Ctx;
use crate::sys::{self, Map, PAGE, R, RW};

/// Largest length of the file, as fsx has it by default.
const MOST: usize = 256 << 10;
/// Longest operation.
const LONGEST: usize = 64 << 10;
/// With fewer operations nothing was tested.
const OPERATIONS_MIN: u64 = 100;

#[derive(Debug)]
enum Op {
    Read {
        at: usize,
        len: usize,
    },
    Write {
        at: usize,
        len: usize,
    },
    MapRead {
        at: usize,
        len: usize,
    },
    MapWrite {
        at: usize,
        len: usize,
    },
    Truncate {
        len: usize,
    },
    /// fallocate.
    Mode {
        mode: i32,
        at: usize,
        len: usize,
    },
    Copy {
        at: usize,
        to: usize,
        len: usize,
    },
    /// Writes beyond the end, in the last page: nobody may see it when the file grows.
    Pollute,
    Reopen,
    Sync,
}

/// What fallocate may do; fsx leaves out what the file system does not know.
const MODES: [i32; 6] = [
    0,
    libc::FALLOC_FL_KEEP_SIZE,
    libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
    libc::FALLOC_FL_ZERO_RANGE,
    libc::FALLOC_FL_COLLAPSE_RANGE,
    libc::FALLOC_FL_INSERT_RANGE,
];

/// Draws the next operation; `pollute` where the file system keeps that from being seen.
fn draw(rng: &mut SmallRng, size: usize, pollute: bool) -> Op {
    let at = rng.random_range(0..MOST);
    let len = rng.random_range(1..=LONGEST.min(MOST - at));
    // Within the file, for what changes no length.
    let inner = |rng: &mut SmallRng| {
        let at = rng.random_range(0..size);
        (at, rng.random_range(1..=LONGEST.min(size - at)))
    };
    match rng.random_range(0..10) {
        0 if size > 0 => {
            let (at, len) = inner(rng);
            Op::Read { at, len }
        }
        1 | 2 => Op::Write { at, len },
        3 if size > 0 => {
            let (at, len) = inner(rng);
            Op::MapRead { at, len }
        }
        4 | 5 => Op::MapWrite { at, len },
        6 => Op::Truncate {
            len: rng.random_range(0..=MOST),
        },
        7 => Op::Mode {
            mode: MODES[rng.random_range(0..MODES.len())],
            at,
            len,
        },
        8 if size > 0 => {
            let (at, len) = inner(rng);
            let to = rng.random_range(0..=MOST - len);
            Op::Copy { at, to, len }
        }
        9 if size % PAGE > 0 && pollute => Op::Pollute,
        _ if rng.random() => Op::Reopen,
        _ => Op::Sync,
    }
}

/// The file and what it must hold.
struct Fsx<'a> {
    path: &'a Path,
    file: File,
    good: Vec<u8>,
    /// Each write has bytes of its own.
    writes: u8,
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .with_context(|| format!("open {}", path.display()))
}

impl Fsx<'_> {
    /// The pages of `at..at + len`, mapped, and where `at` is in them.
    fn map(&self, at: usize, len: usize, prot: i32) -> Result<(Map, usize)> {
        let from = at / PAGE * PAGE;
        let map = Map::shared(
            &self.file,
            from as u64,
            (at + len - from).next_multiple_of(PAGE),
            prot,
        )?;
        Ok((map, at - from))
    }

    /// As fsx does: bytes that tell the place and the turn.
    fn fresh(&mut self, at: usize, len: usize) -> Vec<u8> {
        self.writes = self.writes.wrapping_add(1);
        (at..at + len)
            .map(|i| (i as u8).wrapping_mul(7) ^ self.writes)
            .collect()
    }

    fn put(&mut self, at: usize, data: &[u8]) {
        if self.good.len() < at + data.len() {
            self.good.resize(at + data.len(), 0);
        }
        self.good[at..at + data.len()].copy_from_slice(data);
    }

    fn apply(&mut self, op: &Op) -> Result<()> {
        match *op {
            Op::Read { at, len } => {
                let mut seen = vec![0xa5; len];
                self.file.read_exact_at(&mut seen, at as u64)?;
                bytes_are(format!("read at {at}"), &seen, &self.good[at..at + len])?;
            }
            Op::Write { at, len } => {
                let data = self.fresh(at, len);
                self.file.write_all_at(&data, at as u64)?;
                self.put(at, &data);
            }
            Op::MapRead { at, len } => {
                let (map, skip) = self.map(at, len, R)?;
                let seen = copy_of(&map, skip, len);
                bytes_are(format!("mapped at {at}"), &seen, &self.good[at..at + len])?;
            }
            Op::MapWrite { at, len } => {
                let data = self.fresh(at, len);
                if at + len > self.good.len() {
                    self.file.set_len((at + len) as u64)?;
                }
                let (map, skip) = self.map(at, len, RW)?;
                store(&map, skip, &data);
                self.put(at, &data);
            }
            Op::Truncate { len } => {
                self.file.set_len(len as u64)?;
                self.good.resize(len, 0);
            }
            Op::Mode { mode, at, len } => self.fallocate(mode, at, len)?,
            Op::Copy { at, to, len } => {
                if at + len <= to || to + len <= at {
                    let (mut from, mut target) = (at as i64, to as i64);
                    let mut left = len;
                    while left > 0 {
                        let (file, into) = (&self.file, &self.file);
                        left -=
                            copy_file_range(file, Some(&mut from), into, Some(&mut target), left)?;
                    }
                    let data = self.good[at..at + len].to_vec();
                    self.put(to, &data);
                }
            }
            Op::Pollute => {
                let size = self.good.len();
                let (map, skip) = self.map(size, 1, RW)?;
                store(&map, skip, &vec![0xee; PAGE - size % PAGE]);
            }
            Op::Reopen => self.file = open(self.path)?,
            Op::Sync => self.file.sync_all()?,
        }
        Ok(())
    }

    fn fallocate(&mut self, mode: i32, at: usize, len: usize) -> Result<()> {
        let done = sys::fallocate(&self.file, mode, at as i64, len as i64);
        let size = self.good.len();
        match mode {
            0 => {
                done?;
                self.good.resize(size.max(at + len), 0);
            }
            libc::FALLOC_FL_KEEP_SIZE => done?,
            m if m & libc::FALLOC_FL_PUNCH_HOLE != 0 => {
                done?;
                self.good[at.min(size)..(at + len).min(size)].fill(0);
            }
            // Neither file system here knows them; nothing may change.
            _ => eq(format!("fallocate {mode}"), done, Err(Errno::EOPNOTSUPP))?,
        }
        Ok(())
    }

    /// Length by two calls; zeroes after the end for a mapping of the last page, unless that was
    /// just written.
    fn check(&self, polluted: bool) -> Result<()> {
        let size = self.good.len();
        eq("length by fstat", self.file.metadata()?.len(), size as u64)?;
        let end = sys::lseek(&self.file, 0, libc::SEEK_END)?;
        eq("length by lseek", end, size as i64)?;
        if size % PAGE > 0 && !polluted {
            let (map, _) = self.map(size, 1, R)?;
            let tail = copy_of(&map, size % PAGE, PAGE - size % PAGE);
            bytes_are("the last page beyond the end", &tail, &vec![0; tail.len()])?;
        }
        Ok(())
    }
}

fn copy_of(map: &Map, from: usize, len: usize) -> Vec<u8> {
    let bytes = &map.bytes()[from..from + len];
    bytes
        .iter()
        .map(|byte| byte.load(std::sync::atomic::Ordering::Relaxed))
        .collect()
}

fn store(map: &Map, from: usize, data: &[u8]) {
    for (byte, value) in map.bytes()[from..].iter().zip(data) {
        byte.store(*value, std::sync::atomic::Ordering::Relaxed);
    }
}

/// The case.
pub fn fsx(ctx: &Ctx) -> Result<()> {
    let mount = ctx.mount("m", "size=16M,domain=lab")?;
    if ctx.is_thinram() {
        ctx.sys().flat_out()?;
    }
    let seed = ctx.setup.seed;
    let mut rng = SmallRng::seed_from_u64(seed);
    let file = mount.file("web", "ram", 0)?;
    let path = mount.at("web/ram");
    let mut fsx = Fsx {
        path: &path,
        file,
        good: Vec::new(),
        writes: 0,
    };
    let end = Instant::now() + ctx.span(8.0);
    let (mut count, mut polluted) = (0u64, false);
    let mut last = std::collections::VecDeque::new();
    while ctx.more_calls(count, OPERATIONS_MIN, end) {
        // tmpfs shows what was written beyond the end when the file grows.
        let op = draw(&mut rng, fsx.good.len(), ctx.is_thinram());
        let before = fsx.good.len();
        let done = fsx.apply(&op);
        // What was written there stays until the length changes.
        polluted = match op {
            Op::Pollute => true,
            _ => polluted && fsx.good.len() == before,
        };
        last.push_back(format!("{count}: {op:?}, length {}", fsx.good.len()));
        if last.len() > 12 {
            last.pop_front();
        }
        let done = done.and_then(|()| fsx.check(polluted));
        if done.is_err() {
            last.iter().for_each(|line| println!("{line}"));
        }
        done.with_context(|| format!("operation {count}; again by {}", ctx.replay(count)))?;
        count += 1;
    }
    println!("{count} operations, seed {seed}");
    Ok(())
}
