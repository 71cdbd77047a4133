// SPDX-License-Identifier: GPL-2.0

//! One process's files and mappings beside a model of what they must hold.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::fcntl::{copy_file_range, splice, SpliceFFlags};
use nix::sys::sendfile::sendfile;
use nix::sys::uio::{process_vm_readv, process_vm_writev, RemoteIoVec};
use nix::unistd::Pid;
use rand::rngs::SmallRng;
use rand::SeedableRng;

use super::common::Member;
use super::knobs;
use super::op::{draw, Op, Shape, Way, FILES, LARGE, MADV_GUARD_INSTALL, MADV_GUARD_REMOVE};
use crate::check::{bytes_are, eq, fails, Skip};
use crate::content::page_bytes;
use crate::contention;
use crate::ctx::{Ctx, Mount};
use crate::huge::mapped_large;
use crate::mapping::Disk;
use crate::sys::{self, Map, PAGE, R, RW};

/// Calls between two states of the host.
const SQUEEZE: u64 = 500;
/// With fewer calls nothing was tested.
const CALLS_MIN: u64 = 100;
/// Calls between two looks at everything.
const LOOK: u64 = 200;
/// Calls that a failure shows.
const SHOWN: usize = 12;
/// The most that goes through a pipe at once.
const PIPE: usize = 16 * PAGE;

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
    arena: Vec<Option<Slot>>,
    disk: Vec<u8>,
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

    /// Whether no page of a file is mapped twice in the run.
    fn all_distinct(&self, at: usize, pages: usize) -> bool {
        let mut seen = std::collections::BTreeSet::new();
        self.arena[at..at + pages]
            .iter()
            .flatten()
            .all(|slot| seen.insert((slot.file, slot.page)))
    }

    fn write(&mut self, file: usize, at: usize, data: &[u8]) {
        let bytes = &mut self.files[file];
        if bytes.len() < at + data.len() {
            bytes.resize(at + data.len(), 0);
        }
        bytes[at..at + data.len()].copy_from_slice(data);
    }

    /// Writes through the arena, from byte `offset` of page `at` on.
    fn poke(&mut self, at: usize, offset: usize, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let position = offset + done;
            let part = (PAGE - position % PAGE).min(data.len() - done);
            if let Some(slot) = self.arena[at + position / PAGE] {
                let to = slot.page * PAGE + position % PAGE;
                self.write(slot.file, to, &data[done..done + part]);
            }
            done += part;
        }
    }

    fn zero(&mut self, file: usize, at: usize, len: usize) {
        let size = self.files[file].len();
        self.files[file][at.min(size)..(at + len).min(size)].fill(0);
    }

    /// What a read of `len` bytes at `at` gives.
    fn read(&self, file: usize, at: usize, len: usize) -> &[u8] {
        let size = self.files[file].len();
        &self.files[file][at.min(size)..(at + len).min(size)]
    }
}

/// `len` bytes that lie at `at`: pages of one of the common contents, so that aligned ones are
/// equal wherever they are.
pub fn data(at: usize, seed: u64, len: usize) -> Vec<u8> {
    let page = page_bytes(seed);
    (at..at + len).map(|i| page[i % PAGE]).collect()
}

/// Who else is at it.
pub struct Crowd<'a> {
    /// Everybody's files.
    pub files: &'a [File],
    /// What they have in common.
    pub common: Member<'a>,
}

/// What was seen of 2 MiB pages, the most at once.
#[derive(Debug, Clone, Copy, Default)]
pub struct Large {
    /// KiB of the files.
    pub huge_kb: u64,
    /// KiB of the mappings.
    pub mapped_kb: u64,
    /// Moves of 2 MiB at once.
    pub moves: u64,
}

/// The real thing beside its model.
pub struct Bench<'a> {
    ctx: &'a Ctx,
    mount: &'a Mount<'a>,
    /// Names of the VMs, a file each.
    names: Vec<String>,
    number: usize,
    shape: Shape,
    files: Vec<File>,
    arena: Map,
    disk: Option<Disk>,
    model: Model,
    large: Large,
    /// What the next call is drawn from.
    rng: SmallRng,
    /// Calls that were made.
    count: u64,
    /// The last of them, with their numbers.
    last: VecDeque<(u64, Op)>,
}

impl<'a> Bench<'a> {
    /// The files of process `number`, room for mappings, and calls that its seed draws: the run's and
    /// that number.
    pub fn new(
        ctx: &'a Ctx,
        mount: &'a Mount<'a>,
        number: usize,
        shape: Shape,
    ) -> Result<Bench<'a>> {
        let names: Vec<String> = (0..FILES).map(|file| format!("p{number}-{file}")).collect();
        let mut files = Vec::new();
        for name in &names {
            files.push(mount.file(name, "ram", 0)?);
        }
        let len = shape.arena * PAGE;
        // 2 MiB of a file can only be 2 MiB of a mapping at a multiple of that.
        let mut arena = Map::anonymous(len + (2 << 20))?;
        let skip = arena.addr().next_multiple_of(2 << 20) - arena.addr();
        arena.keep(skip, len)?;
        arena.replace(0, len, None)?;
        let disk = match Disk::new(ctx, len as u64) {
            Ok(disk) => Some(disk),
            Err(e) if e.is::<Skip>() => {
                println!("without O_DIRECT: {e}");
                None
            }
            Err(e) => return Err(e),
        };
        Ok(Bench {
            ctx,
            mount,
            names,
            number,
            shape,
            files,
            arena,
            disk,
            model: Model {
                files: Default::default(),
                arena: vec![None; shape.arena],
                disk: vec![0; len],
            },
            large: Large::default(),
            rng: SmallRng::seed_from_u64(ctx.setup.seed.wrapping_add(number as u64)),
            count: 0,
            last: VecDeque::new(),
        })
    }

    /// What was seen so far; looked at now and then where there is room for any.
    pub fn most_large(&self) -> Large {
        self.large
    }

    fn look_for_large(&mut self) -> Result<()> {
        let mut huge_kb = 0;
        for name in &self.names {
            huge_kb += self.ctx.sys().vm(name).get("huge_kb")?;
        }
        self.large.huge_kb = self.large.huge_kb.max(huge_kb);
        self.large.mapped_kb = self.large.mapped_kb.max(mapped_large(&self.arena)?);
        Ok(())
    }

    /// Its files, for others.
    pub fn shared_files(&self) -> Result<Vec<File>> {
        self.files
            .iter()
            .map(|file| file.try_clone().context("dup"))
            .collect()
    }

    /// Makes calls until `end`, and [`CALLS_MIN`] at least; returns how many, with those before. With a
    /// crowd, the host's knobs are another's.
    pub fn run(&mut self, end: Instant, crowd: Option<&Crowd<'_>>) -> Result<u64> {
        while self.ctx.more_calls(self.count, CALLS_MIN, end) {
            let count = self.count;
            if self.ctx.is_thinram() && crowd.is_none() && count % SQUEEZE == 0 {
                // Underneath, pages are compressed, not, put together, split.
                let states = ["none", "hard", "high", "clear"];
                contention::force(self.ctx, states[(count / SQUEEZE % 4) as usize])?;
            }
            let op = draw(&mut self.rng, self.shape);
            self.last.push_back((count, op.clone()));
            if self.last.len() > SHOWN {
                self.last.pop_front();
            }
            let mut done = self.apply(&op, crowd);
            if done.is_ok() && count % LOOK == LOOK - 1 {
                done = self.compare_all();
                if done.is_ok() && self.shape.is_large() {
                    done = self.look_for_large();
                }
            }
            if done.is_err() {
                for (number, op) in &self.last {
                    println!("call {number}: {op:?}");
                }
            }
            done.with_context(|| format!("call {count}; again by {}", self.ctx.replay(count)))?;
            self.count += 1;
        }
        let count = self.count;
        self.compare_all().with_context(|| {
            let again = self.ctx.replay(count.saturating_sub(1));
            format!("after {count} calls; again by {again}")
        })?;
        Ok(count)
    }

    fn apply(&mut self, op: &Op, crowd: Option<&Crowd<'_>>) -> Result<()> {
        match *op {
            Op::Large {
                file,
                region,
                at,
                to,
                value,
            } => {
                let (from, len) = (region * LARGE * PAGE, LARGE * PAGE);
                let calls = [
                    Op::Punch {
                        file,
                        at: from,
                        len,
                    },
                    Op::Prealloc {
                        file,
                        at: from,
                        len,
                        keep: false,
                    },
                    Op::Map {
                        at,
                        file,
                        page: region * LARGE,
                        pages: LARGE,
                        prot: RW,
                        anew: false,
                    },
                    Op::Store {
                        at,
                        word: 0,
                        words: 1,
                        value,
                    },
                    Op::Move {
                        from: at,
                        pages: LARGE,
                        to,
                        less: 0,
                    },
                    Op::Load { at: to },
                ];
                for call in &calls {
                    self.apply(call, crowd)?;
                }
                self.look_for_large()?;
            }
            Op::Pwrite {
                file,
                at,
                seed,
                len,
            } => {
                let data = data(at, seed, len);
                let written = self.files[file].write_at(&data, at as u64)?;
                eq("bytes written", written, len)?;
                self.model.write(file, at, &data);
            }
            Op::Pread { file, at, len } => {
                let mut seen = vec![0xa5; len];
                let n = self.files[file].read_at(&mut seen, at as u64)?;
                let expected = self.model.read(file, at, len);
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
            Op::Prealloc {
                file,
                at,
                len,
                keep,
            } => {
                let mode = if keep { libc::FALLOC_FL_KEEP_SIZE } else { 0 };
                sys::fallocate(&self.files[file], mode, at as i64, len as i64)?;
                let size = self.model.files[file].len();
                let grown = if keep { size } else { size.max(at + len) };
                self.model.files[file].resize(grown, 0);
            }
            Op::Copy {
                way,
                from,
                at,
                to,
                to_at,
                len,
            } => self.copy(way, (from, at), (to, to_at), len)?,
            Op::Map {
                at,
                file,
                page,
                pages,
                prot,
                anew,
            } => {
                let offset = (page * PAGE) as u64;
                let source = Some((&self.files[file], offset, prot));
                if anew {
                    self.arena.unmap(at * PAGE, pages * PAGE, source)?;
                } else {
                    self.arena.replace(at * PAGE, pages * PAGE, source)?;
                }
                for i in 0..pages {
                    self.model.arena[at + i] = Some(Slot {
                        file,
                        page: page + i,
                        prot,
                    });
                }
            }
            Op::Unmap { at, pages } => {
                self.arena.unmap(at * PAGE, pages * PAGE, None)?;
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
            Op::Move {
                from,
                pages,
                to,
                less,
            } => self.shift(from, pages, to, less)?,
            Op::Grow { at, pages, more } => {
                let most = self.shape.arena - at;
                if self.model.arena[at].is_some() && pages + more <= most {
                    let len = self.arena.one_mapping(at * PAGE, pages * PAGE)?;
                    let grown = self.arena.grow_part(at * PAGE, len, len + more * PAGE);
                    let expected = if self.ctx.is_thinram() {
                        Errno::EFAULT
                    } else {
                        Errno::ENOMEM
                    };
                    fails("mremap to more", grown, expected)?;
                }
            }
            Op::Advise { at, pages, advice } => self.advise(at, pages, advice)?,
            Op::Store {
                at,
                word,
                words,
                value,
            } => {
                if self.model.usable(at, RW).is_some() {
                    let content = data(word * 8, value, words * 8);
                    for (i, chunk) in content.chunks_exact(8).enumerate() {
                        let value = u64::from_ne_bytes(chunk.try_into()?);
                        self.arena.set(at, word + i, value);
                    }
                    self.model.poke(at, word * 8, &content);
                }
            }
            Op::Load { at } => self.load(at)?,
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
                    self.model.poke(at, offset, &content);
                }
            }
            Op::Peek { at, pages } => {
                if self.model.all_usable(at, pages, R) {
                    let mut seen = vec![0xa5; pages * PAGE];
                    let remote = [RemoteIoVec {
                        base: self.arena.addr() + at * PAGE,
                        len: pages * PAGE,
                    }];
                    let local = &mut [IoSliceMut::new(&mut seen)];
                    let n = process_vm_readv(Pid::this(), local, &remote)?;
                    eq("bytes by process_vm_readv", n, pages * PAGE)?;
                    for (i, page) in seen.chunks_exact(PAGE).enumerate() {
                        self.compare(at + i, page)?;
                    }
                }
            }
            Op::ToDisk { at, pages } => {
                let (from, len) = (at * PAGE, pages * PAGE);
                if let (Some(disk), true) = (&self.disk, self.model.all_usable(at, pages, R)) {
                    let n = sys::pwrite_from(&disk.file, &self.arena, from, len, from as u64)?;
                    eq("bytes to the disk", n, len)?;
                    for page in at..at + pages {
                        if let Some(slot) = self.model.arena[page] {
                            let data = self.model.read(slot.file, slot.page * PAGE, PAGE).to_vec();
                            self.model.disk[page * PAGE..][..PAGE].copy_from_slice(&data);
                        }
                    }
                }
            }
            Op::FromDisk { at, pages } => {
                let (to, len) = (at * PAGE, pages * PAGE);
                let fits =
                    self.model.all_usable(at, pages, RW) && self.model.all_distinct(at, pages);
                if let (Some(disk), true) = (&self.disk, fits) {
                    let n = sys::pread_into(&disk.file, &self.arena, to, len, to as u64)?;
                    eq("bytes from the disk", n, len)?;
                    let content = self.model.disk[to..to + len].to_vec();
                    self.model.poke(at, 0, &content);
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
            Op::Fork { file, page, seed } => self.fork(file, page, seed)?,
            Op::Instance { seed } => self.instance(seed)?,
            Op::Refused { number, file, at } => {
                // In a crowd the host's knobs change underneath.
                if crowd.is_none() || number != 13 {
                    self.refused(number, file, at)?;
                }
            }
            Op::Common(ref call) => {
                if let Some(crowd) = crowd {
                    crowd.common.apply(call)?;
                }
            }
            Op::Neighbour { number, at, pages } => {
                if let Some(crowd) = crowd {
                    self.neighbour(crowd, number, at, pages)?;
                }
            }
            Op::Rest => std::thread::sleep(std::time::Duration::from_millis(2)),
            Op::Vm { vm, number } => {
                if self.ctx.is_thinram() {
                    knobs::vm(&self.ctx.sys().vm(&self.names[vm]), number)?;
                }
            }
            Op::Host { number } => {
                if self.ctx.is_thinram() && crowd.is_none() {
                    knobs::host(&self.ctx.sys(), number)?;
                }
            }
        }
        Ok(())
    }

    fn shift(&mut self, from: usize, pages: usize, to: usize, less: usize) -> Result<()> {
        let pages = pages.min(self.shape.arena - from);
        if self.model.arena[from].is_none() {
            return Ok(());
        }
        let pages = self.arena.one_mapping(from * PAGE, pages * PAGE)? / PAGE;
        let kept = pages.saturating_sub(less).max(1);
        let apart = from + pages <= to || to + kept <= from;
        if to + kept > self.shape.arena || (from != to && !apart) {
            return Ok(());
        }
        let (len, kept_len) = (pages * PAGE, kept * PAGE);
        self.arena
            .shift_part(from * PAGE, len, to * PAGE, kept_len)?;
        let moved = self.model.arena[from..from + kept].to_vec();
        self.model.arena[from..from + pages].fill(None);
        self.model.arena[to..to + kept].copy_from_slice(&moved);
        if from != to && kept >= LARGE {
            self.large.moves += 1;
        }
        Ok(())
    }

    /// From one file to another, or to another place of the same.
    fn copy(
        &mut self,
        way: Way,
        (from, at): (usize, usize),
        (to, to_at): (usize, usize),
        len: usize,
    ) -> Result<()> {
        let apart = at + len <= to_at || to_at + len <= at;
        if len == 0 || (from == to && !apart) {
            return Ok(());
        }
        let content = self.model.read(from, at, len).to_vec();
        let (mut source, mut target) = (at as i64, to_at as i64);
        let mut moved = 0;
        let (read_end, write_end) = nix::unistd::pipe()?;
        while moved < content.len() {
            let left = content.len() - moved;
            let (from, to) = (&self.files[from], &self.files[to]);
            let n = match way {
                Way::CopyRange => {
                    copy_file_range(from, Some(&mut source), to, Some(&mut target), left)?
                }
                Way::Sendfile => {
                    let mut to = to;
                    to.seek(SeekFrom::Start((to_at + moved) as u64))?;
                    sendfile(to, from, Some(&mut source), left)?
                }
                Way::Splice => {
                    let flags = SpliceFFlags::empty();
                    let into = left.min(PIPE);
                    let n = splice(from, Some(&mut source), &write_end, None, into, flags)?;
                    let mut out = 0;
                    while out < n {
                        let pipe = read_end.as_fd();
                        out += splice(pipe, None, to, Some(&mut target), n - out, flags)?;
                    }
                    n
                }
            };
            if n == 0 {
                bail!("{way:?} ended {left} bytes early");
            }
            moved += n;
        }
        if !content.is_empty() {
            self.model.write(to, to_at, &content);
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
        let guard = advice == MADV_GUARD_INSTALL || advice == MADV_GUARD_REMOVE;
        if guard && !self.ctx.is_thinram() {
            // tmpfs knows them: what they cover cannot be touched.
            return Ok(());
        }
        let done = self.arena.advise(at * PAGE, pages * PAGE, advice);
        match advice {
            libc::MADV_FREE | libc::MADV_WIPEONFORK => fails("the advice", done, Errno::EINVAL)?,
            // They would take back what the module asked for.
            libc::MADV_DOFORK | libc::MADV_DODUMP if self.ctx.is_thinram() => {
                fails(format!("advice {advice}"), done, Errno::EINVAL)?;
            }
            MADV_GUARD_INSTALL | MADV_GUARD_REMOVE if done.is_ok() => bail!("a guard was set"),
            libc::MADV_NORMAL
            | libc::MADV_RANDOM
            | libc::MADV_SEQUENTIAL
            | libc::MADV_WILLNEED
            | libc::MADV_DONTNEED
            | libc::MADV_REMOVE
            | libc::MADV_COLD
            | libc::MADV_PAGEOUT
            | libc::MADV_POPULATE_READ
            | libc::MADV_POPULATE_WRITE => done.with_context(|| format!("advice {advice}"))?,
            // Others may be unknown to the kernel, or find nothing to do.
            _ => match done {
                Ok(()) | Err(Errno::EINVAL | Errno::EAGAIN | Errno::EBUSY | Errno::ENOMEM) => {}
                Err(e) => bail!("advice {advice}: {e}"),
            },
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

    /// A child that writes a page by a mapping of its own, and reads the rest of the file.
    fn fork(&mut self, file: usize, page: usize, seed: u64) -> Result<()> {
        let whole = self.model.files[file].len() / PAGE;
        if page >= whole {
            return Ok(());
        }
        let content = data(0, seed, PAGE);
        let mut child = sys::fork(|| {
            let map = Map::shared(&self.files[file], 0, whole * PAGE, RW)?;
            for (word, value) in content.chunks_exact(8).enumerate() {
                map.set(page, word, u64::from_ne_bytes(value.try_into()?));
            }
            let next = (page + 1) % whole;
            let expected = if next == page {
                &content[..]
            } else {
                self.model.read(file, next * PAGE, PAGE)
            };
            bytes_are("read by a child", &loaded(&map, next), expected)
        })?;
        child.expect_ok(self.ctx.limit(20.0))?;
        self.model.write(file, page * PAGE, &content);
        Ok(())
    }

    /// A mount that comes and goes with a VM in the same domain.
    fn instance(&self, seed: u64) -> Result<()> {
        let name = format!("instance-{}", self.number);
        let mut mount = self.ctx.mount(&name, "size=1M,domain=lab")?;
        let guest = mount.guest(&name, 8)?;
        let content = data(0, seed, 8 * PAGE);
        guest.file.write_all_at(&content, 0)?;
        std::thread::sleep(std::time::Duration::from_millis(1));
        for page in 0..8 {
            bytes_are("another mount", &loaded(&guest.map, page), &content[..PAGE])?;
        }
        fails("umount in use", mount.unmount(), Errno::EBUSY)?;
        drop(guest);
        mount.unmount().context("umount")
    }

    fn refused(&mut self, number: usize, file: usize, at: usize) -> Result<()> {
        let thinram = self.ctx.is_thinram();
        let offset = (at * PAGE) as i64;
        let target = &self.files[file];
        match number {
            0 if thinram => {
                let mut map = Map::shared(target, 0, PAGE, RW)?;
                let grown = map.remap(2 * PAGE, libc::MREMAP_MAYMOVE);
                fails("mremap to more", grown, Errno::EFAULT)
            }
            1 if thinram => {
                let map = Map::with_flags(target, 0, PAGE, RW, libc::MAP_PRIVATE);
                fails("MAP_PRIVATE", map, Errno::EINVAL)
            }
            2..=6 => {
                let mode = [
                    libc::FALLOC_FL_PUNCH_HOLE,
                    libc::FALLOC_FL_COLLAPSE_RANGE,
                    libc::FALLOC_FL_INSERT_RANGE,
                    libc::FALLOC_FL_ZERO_RANGE,
                    libc::FALLOC_FL_UNSHARE_RANGE,
                ][number - 2];
                let done = sys::fallocate(target, mode, offset, PAGE as i64);
                fails(format!("fallocate mode {mode}"), done, Errno::EOPNOTSUPP)
            }
            7 => fails(
                "length 0",
                sys::fallocate(target, 0, offset, 0),
                Errno::EINVAL,
            ),
            8 => fails("offset -1", sys::fallocate(target, 0, -1, 1), Errno::EINVAL),
            9 => fails("ftruncate to -1", sys::ftruncate(target, -1), Errno::EINVAL),
            10 if thinram => fails(
                "above size=",
                sys::ftruncate(target, 1 << 40),
                Errno::ENOSPC,
            ),
            11 => fails("write at -1", sys::pwrite(target, &[1], -1), Errno::EINVAL),
            12 if thinram => {
                let done = sys::pwrite(target, &[1], 1 << 40);
                fails("write above size=", done, Errno::ENOSPC)
            }
            13 if thinram => knobs::bad(&self.ctx.sys(), at),
            14 if thinram => knobs::bad_vm(&self.ctx.sys().vm(&self.names[file]), at),
            _ => {
                let done = fs::remove_dir(self.mount.at(&self.names[file]));
                fails("rmdir of a VM with a file", done, Errno::ENOTEMPTY)
            }
        }
    }

    /// What others hold is theirs to check; here it is only touched.
    fn neighbour(&self, crowd: &Crowd<'_>, number: usize, at: usize, pages: usize) -> Result<()> {
        let mut seen = vec![0; pages * PAGE];
        if number % 2 == 0 {
            let file = &crowd.files[number % crowd.files.len()];
            file.read_at(&mut seen, (at * PAGE) as u64)?;
            return Ok(());
        }
        let pid = crowd.common.pid_of(number)?;
        if pid.as_raw() == 0 {
            return Ok(());
        }
        let remote = [RemoteIoVec {
            base: self.arena.addr() + at * PAGE,
            len: pages * PAGE,
        }];
        let local = &mut [IoSliceMut::new(&mut seen)];
        match process_vm_readv(pid, local, &remote) {
            // Nothing is mapped there, or it has ended.
            Ok(_) | Err(Errno::EFAULT | Errno::ESRCH | Errno::EPERM) => Ok(()),
            Err(e) => bail!("process_vm_readv of {pid}: {e}"),
        }
    }

    fn load(&self, at: usize) -> Result<()> {
        if self.model.usable(at, R).is_some() {
            self.compare(at, &loaded(&self.arena, at))?;
        }
        Ok(())
    }

    fn compare(&self, at: usize, seen: &[u8]) -> Result<()> {
        let Some(slot) = self.model.arena[at] else {
            return Ok(());
        };
        match self.model.whole(slot) {
            Some(range) => bytes_are(
                format!("arena page {at}, file {} page {}", slot.file, slot.page),
                seen,
                &self.model.files[slot.file][range],
            ),
            None => Ok(()),
        }
    }

    /// Every file, every usable page of the arena, and what the VMs say of themselves.
    fn compare_all(&mut self) -> Result<()> {
        for file in 0..FILES {
            let size = self.model.files[file].len();
            eq(
                format!("size of file {file}"),
                self.files[file].metadata()?.len(),
                size as u64,
            )?;
            let mut seen = vec![0xa5; size];
            self.files[file].read_exact_at(&mut seen, 0)?;
            bytes_are(format!("file {file}"), &seen, &self.model.files[file])?;
            if self.ctx.is_thinram() {
                let stat = self.ctx.sys().vm(&self.names[file]).stat()?;
                stat.check_sum()?;
                let kb = (size.div_ceil(PAGE) * 4) as u64;
                eq(format!("size_kb of file {file}"), stat.get("size_kb")?, kb)?;
            }
        }
        for at in 0..self.shape.arena {
            self.load(at)?;
        }
        Ok(())
    }
}

/// The bytes of one page of a mapping.
fn loaded(map: &Map, page: usize) -> Vec<u8> {
    let words = map.read_page(page);
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}
