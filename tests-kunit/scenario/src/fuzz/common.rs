// SPDX-License-Identifier: GPL-2.0

//! One file that several processes write and read at the same time, beside a model of its bytes in
//! memory that all of them share.
//!
//! Each block of pages has one process that changes it, which never asks anybody; all of them read all
//! blocks. A block's count is odd while its owner changes it. What somebody read counts if the count was
//! even before, and is the same after it and the model were read: then each byte has to be the model's.
//! The last block is cut and grows with the file, so nobody reads it by touching a mapping.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::process;
use std::sync::atomic::{fence, AtomicU64, Ordering};
use std::thread;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::sys::uio::{process_vm_readv, process_vm_writev, RemoteIoVec};
use nix::unistd::Pid;
use rand::rngs::SmallRng;
use rand::Rng;

use super::bench::data;
use crate::check::{bytes_are, eq, that};
use crate::ctx::{Ctx, Mount};
use crate::sys::{self, Map, PAGE, R, RW};

/// The VM with the file.
pub const VM: &str = "common";

/// Bytes of a block.
const BLOCK: usize = 4 * PAGE;
/// Blocks that are always whole, dealt out one by one; the one after them is the first process's.
const BLOCKS: usize = 24;
const TAIL: usize = BLOCKS * BLOCK;
/// Looks at a block whose owner is at it.
const TRIES: usize = 4;

/// How an owner writes.
#[derive(Debug, Clone, Copy)]
pub enum Writer {
    /// write(2)
    Call,
    /// By its mapping.
    Mapping,
    /// process_vm_writev to the mapping of this process.
    Process(usize),
}

/// How a block is read.
#[derive(Debug, Clone, Copy)]
pub enum Reader {
    /// read(2)
    Call,
    /// By the mapping that is always there.
    Mapping,
    /// By one that comes and goes.
    NewMapping,
    /// process_vm_readv from the mapping of this process.
    Process(usize),
}

/// What is done to the file. `own` counts the blocks of the process that draws it.
#[derive(Debug, Clone)]
pub enum Call {
    Write {
        by: Writer,
        own: usize,
        at: usize,
        len: usize,
        seed: u64,
    },
    /// A hole, by fallocate or by MADV_REMOVE of whole pages.
    Hole {
        own: usize,
        at: usize,
        len: usize,
        advice: bool,
    },
    /// The first process's: the file ends so far into the last block.
    Cut {
        len: usize,
    },
    /// The first process's: write(2) into the last block.
    Tail {
        at: usize,
        len: usize,
        seed: u64,
    },
    /// MADV_DONTNEED
    Forget {
        block: usize,
    },
    Read {
        by: Reader,
        block: usize,
    },
}

/// Draws a call for one of `count` processes, with pages of `seed`.
pub fn draw(rng: &mut SmallRng, count: usize, seed: u64) -> Call {
    let own = rng.random_range(0..BLOCKS / count);
    let at = rng.random_range(0..BLOCK);
    let len = rng.random_range(1..=BLOCK - at);
    // Whole pages merge.
    let (at, len) = if rng.random() {
        (
            at / PAGE * PAGE,
            len.next_multiple_of(PAGE).min(BLOCK - at / PAGE * PAGE),
        )
    } else {
        (at, len)
    };
    let other = rng.random_range(0..count);
    match rng.random_range(0..20) {
        0..=5 => Call::Write {
            by: [Writer::Call, Writer::Mapping, Writer::Process(other)][rng.random_range(0..3)],
            own,
            at,
            len,
            seed,
        },
        6 | 7 => Call::Hole {
            own,
            at,
            len,
            advice: rng.random(),
        },
        8 => Call::Cut {
            len: if rng.random() { at } else { BLOCK },
        },
        9 => Call::Tail { at, len, seed },
        10 => Call::Forget {
            block: rng.random_range(0..BLOCKS),
        },
        _ => {
            let readers = [
                Reader::Call,
                Reader::Mapping,
                Reader::NewMapping,
                Reader::Process(other),
            ];
            Call::Read {
                by: readers[rng.random_range(0..readers.len())],
                block: rng.random_range(0..=BLOCKS),
            }
        }
    }
}

/// The file and its model.
pub struct Common {
    file: File,
    /// A page with a word of each kind for each process, one with the counts of all blocks and the
    /// length of the last one.
    words: Map,
    bytes: Map,
    count: usize,
}

/// Kinds of words of a process, so far apart.
const KIND: usize = 64;
const PIDS: usize = 0;
const ADDRESSES: usize = KIND;
const ENDED: usize = 2 * KIND;
const COMPARED: usize = 3 * KIND;

impl Common {
    /// An empty file for `count` processes.
    pub fn new(mount: &Mount<'_>, count: usize) -> Result<Common> {
        Ok(Common {
            file: mount.file(VM, "ram", TAIL / PAGE)?,
            words: Map::anonymous(2 * PAGE)?,
            bytes: Map::anonymous(TAIL + BLOCK)?,
            count,
        })
    }

    /// Makes the calling process the one of this `number`.
    pub fn join(&self, number: usize) -> Result<Member<'_>> {
        let map = Map::shared(&self.file, 0, TAIL + BLOCK, RW)?;
        self.words.set(0, PIDS + number, process::id().into());
        self.words.set(0, ADDRESSES + number, map.addr() as u64);
        Ok(Member {
            common: self,
            number,
            map,
        })
    }

    /// Once all have ended: the file is what the model says, and others' blocks were compared.
    pub fn end(&self, ctx: &Ctx) -> Result<()> {
        let mut seen = vec![0; TAIL + BLOCK];
        let n = self.file.read_at(&mut seen, 0)?;
        let len = TAIL + self.tail() as usize;
        bytes_are("the common file", &seen[..n], &self.model(0, len))?;
        if ctx.is_thinram() {
            ctx.sys().vm(VM).stat()?.check_sum()?;
        }
        let compared: u64 = (0..self.count)
            .map(|i| self.words.get(0, COMPARED + i))
            .sum();
        println!("{compared} blocks of others compared");
        that("blocks of others were compared", compared > 0)
    }

    fn counter(&self, block: usize) -> &AtomicU64 {
        &self.words.page(1)[block]
    }

    /// Bytes of the last block.
    fn tail(&self) -> u64 {
        self.words.get(1, BLOCKS + 1)
    }

    fn model(&self, at: usize, len: usize) -> Vec<u8> {
        let bytes = &self.bytes.bytes()[at..at + len];
        bytes
            .iter()
            .map(|byte| byte.load(Ordering::Relaxed))
            .collect()
    }

    fn set_model(&self, at: usize, content: &[u8]) {
        for (byte, value) in self.bytes.bytes()[at..].iter().zip(content) {
            byte.store(*value, Ordering::Relaxed);
        }
    }
}

/// One of the processes.
pub struct Member<'a> {
    common: &'a Common,
    number: usize,
    map: Map,
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        // Before its mapping goes, which others use.
        self.common.words.set(0, ENDED + self.number, 1);
    }
}

impl Member<'_> {
    /// Another's process id, 0 before it has joined.
    pub fn pid_of(&self, number: usize) -> Result<Pid> {
        let pid = self.common.words.get(0, PIDS + number % self.common.count);
        Ok(Pid::from_raw(i32::try_from(pid)?))
    }

    /// Carries a call out.
    pub fn apply(&self, call: &Call) -> Result<()> {
        match *call {
            Call::Write {
                by,
                own,
                at,
                len,
                seed,
            } => {
                let block = self.own(own);
                let at = block * BLOCK + at;
                let content = data(at, seed, len);
                self.change(block, || {
                    let n = self.write(by, at, &content)?;
                    self.common.set_model(at, &content[..n]);
                    Ok(())
                })
            }
            Call::Hole {
                own,
                at,
                len,
                advice,
            } => {
                let block = self.own(own);
                let (mut from, mut end) = (block * BLOCK + at, block * BLOCK + at + len);
                if advice {
                    (from, end) = (from / PAGE * PAGE, end.next_multiple_of(PAGE));
                }
                self.change(block, || {
                    if advice {
                        self.map.advise(from, end - from, libc::MADV_REMOVE)?;
                    } else {
                        sys::punch(&self.common.file, from as u64, (end - from) as u64)?;
                    }
                    self.common.set_model(from, &vec![0; end - from]);
                    Ok(())
                })
            }
            Call::Cut { len } if self.number == 0 => self.change(BLOCKS, || {
                self.common.file.set_len((TAIL + len) as u64)?;
                self.common.set_model(TAIL + len, &vec![0; BLOCK - len]);
                self.common.words.set(1, BLOCKS + 1, len as u64);
                Ok(())
            }),
            Call::Tail { at, len, seed } if self.number == 0 => self.change(BLOCKS, || {
                let content = data(TAIL + at, seed, len);
                let n = self.common.file.write_at(&content, (TAIL + at) as u64)?;
                eq("bytes written", n, len)?;
                self.common.set_model(TAIL + at, &content);
                let end = self.common.tail().max((at + len) as u64);
                self.common.words.set(1, BLOCKS + 1, end);
                Ok(())
            }),
            Call::Cut { .. } | Call::Tail { .. } => Ok(()),
            Call::Forget { block } => {
                Ok(self.map.advise(block * BLOCK, BLOCK, libc::MADV_DONTNEED)?)
            }
            Call::Read { by, block } => self.look(by, block),
        }
    }

    fn own(&self, own: usize) -> usize {
        own * self.common.count + self.number
    }

    /// Lets `f` change a block of one's own, and its model.
    fn change(&self, block: usize, f: impl FnOnce() -> Result<()>) -> Result<()> {
        let counter = self.common.counter(block);
        counter.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        f()?;
        fence(Ordering::SeqCst);
        counter.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    /// How many bytes were written: all, unless the process whose mapping it was has ended.
    fn write(&self, by: Writer, at: usize, content: &[u8]) -> Result<usize> {
        match by {
            Writer::Call => {
                let n = self.common.file.write_at(content, at as u64)?;
                eq("bytes written", n, content.len())?;
            }
            Writer::Mapping => {
                for (byte, value) in self.map.bytes()[at..].iter().zip(content) {
                    byte.store(*value, Ordering::Relaxed);
                }
            }
            Writer::Process(number) => {
                let local = [IoSlice::new(content)];
                return self.remote(number, at, content.len(), |pid, remote| {
                    process_vm_writev(pid, &local, remote)
                });
            }
        }
        Ok(content.len())
    }

    /// A call on `len` bytes at `at` in the mapping of process `number`: the bytes that it took.
    fn remote(
        &self,
        number: usize,
        at: usize,
        len: usize,
        call: impl FnOnce(Pid, &[RemoteIoVec]) -> nix::Result<usize>,
    ) -> Result<usize> {
        let words = &self.common.words;
        let base = words.get(0, ADDRESSES + number) as usize;
        if base == 0 {
            return Ok(0);
        }
        let remote = [RemoteIoVec {
            base: base + at,
            len,
        }];
        let done = call(self.pid_of(number)?, &remote);
        let ended = words.get(0, ENDED + number) != 0;
        match done {
            Ok(n) if n == len || ended || at >= TAIL => Ok(n),
            // The file ends before it.
            Err(Errno::EFAULT) if at >= TAIL => Ok(0),
            Err(Errno::EFAULT | Errno::ESRCH | Errno::EPERM) if ended => Ok(0),
            Ok(n) => bail!("{n} of {len} bytes of process {number}"),
            Err(e) => Err(e).with_context(|| format!("the memory of process {number}")),
        }
    }

    /// Reads a block and compares it, if its owner does not change it all the time.
    fn look(&self, by: Reader, block: usize) -> Result<()> {
        let counter = self.common.counter(block);
        for _ in 0..TRIES {
            let before = counter.load(Ordering::SeqCst);
            fence(Ordering::SeqCst);
            let seen = self.read(by, block * BLOCK)?;
            let model = self.common.model(block * BLOCK, BLOCK);
            let tail = self.common.tail() as usize;
            fence(Ordering::SeqCst);
            let same = before % 2 == 0 && counter.load(Ordering::SeqCst) == before;
            let Some(seen) = seen else {
                return Ok(());
            };
            if same {
                let expected = match (block, by) {
                    (BLOCKS, Reader::Process(_)) => &model[..tail.next_multiple_of(PAGE)],
                    (BLOCKS, _) => &model[..tail],
                    _ => &model[..],
                };
                bytes_are(format!("block {block} by {by:?}"), &seen, expected)?;
                let own = block % self.common.count == self.number;
                if !own {
                    let compared = &self.common.words.page(0)[COMPARED + self.number];
                    compared.fetch_add(1, Ordering::Relaxed);
                }
                return Ok(());
            }
            thread::yield_now();
        }
        Ok(())
    }

    /// A block's bytes; `None` where the process that was asked for them has not joined or has ended.
    fn read(&self, by: Reader, at: usize) -> Result<Option<Vec<u8>>> {
        let mut seen = vec![0xa5; BLOCK];
        let n = match by {
            Reader::Mapping | Reader::NewMapping if at < TAIL => {
                let new;
                let bytes = if let Reader::NewMapping = by {
                    new = Map::shared(&self.common.file, at as u64, BLOCK, R)?;
                    new.bytes()
                } else {
                    &self.map.bytes()[at..at + BLOCK]
                };
                for (value, byte) in seen.iter_mut().zip(bytes) {
                    *value = byte.load(Ordering::Relaxed);
                }
                BLOCK
            }
            Reader::Process(number) => {
                let local = &mut [IoSliceMut::new(&mut seen)];
                let n = self.remote(number, at, BLOCK, |pid, remote| {
                    process_vm_readv(pid, local, remote)
                })?;
                let words = &self.common.words;
                let there = words.get(0, ADDRESSES + number) != 0;
                if !there || words.get(0, ENDED + number) != 0 {
                    return Ok(None);
                }
                n
            }
            _ => self.common.file.read_at(&mut seen, at as u64)?,
        };
        seen.truncate(n);
        Ok(Some(seen))
    }
}
