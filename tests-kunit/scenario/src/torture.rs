// SPDX-License-Identifier: GPL-2.0

//! Torture: version-stamped writers and readers on the same pages while the scanner runs flat out.
//!
//! A page has four lanes of 1 KiB, and each lane has one writer, so that several threads and
//! processes write one page at once without any lock that could hide a race. What a lane holds
//! follows from its version number alone (see [`Spot::word`]); a table in shared memory says which
//! version a writer began and which it completed. A reader notes the completed version, reads,
//! notes the begun one, and every word must then be of a version in between. Most versions hold
//! content that is the same in all files, so pages merge, and are broken, all the time.

use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{fence, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{anyhow, Context, Result};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::uio::{process_vm_readv, process_vm_writev, RemoteIoVec};
use nix::unistd::Pid;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use crate::check::{eq, within, BusError, Corrupt};
use crate::content::mix;
use crate::contention::force;
use crate::ctx::Ctx;
use crate::harness::Case;
use crate::mapping::Disk;
use crate::sys::{self, End, Map, PAGE, R, RW, WORDS};

/// The table of cases.
pub const CASES: &[Case] = &[
    Case::both("torture/mapping", "writers and readers by mapping", |ctx| {
        torture(ctx, &Plan::new())
    })
    .span(8.0),
    Case::both(
        "torture/syscalls",
        "with read(2) and write(2) mixed in",
        |ctx| {
            torture(
                ctx,
                &Plan {
                    by: &[By::Map, By::Syscall],
                    ..Plan::new()
                },
            )
        },
    )
    .span(8.0),
    Case::both(
        "torture/process-vm",
        "with process_vm_readv and writev mixed in",
        |ctx| {
            torture(
                ctx,
                &Plan {
                    by: &[By::Map, By::ProcessVm],
                    ..Plan::new()
                },
            )
        },
    )
    .span(8.0),
    Case::both(
        "torture/direct",
        "with O_DIRECT from a disk into the mapping",
        |ctx| {
            torture(
                ctx,
                &Plan {
                    by: &[By::Map, By::Direct, By::Direct],
                    ..Plan::new()
                },
            )
        },
    )
    .span(8.0),
    Case::both("torture/punch", "with holes punched underneath", |ctx| {
        torture(
            ctx,
            &Plan {
                punch: true,
                ..Plan::new()
            },
        )
    })
    .span(8.0),
    Case::both(
        "torture/truncate",
        "with the end of the files cut and grown",
        |ctx| {
            torture(
                ctx,
                &Plan {
                    by: &[By::Map, By::Syscall],
                    truncate: true,
                    ..Plan::new()
                },
            )
        },
    )
    .span(8.0),
    Case::both(
        "torture/churn",
        "with fork, mmap, munmap, mprotect, madvise",
        |ctx| {
            torture(
                ctx,
                &Plan {
                    churn: true,
                    ..Plan::new()
                },
            )
        },
    )
    .span(8.0),
    Case::thinram(
        "torture/toggles",
        "with run, share, domain, scope set live",
        |ctx| {
            torture(
                ctx,
                &Plan {
                    toggle: true,
                    ..Plan::new()
                },
            )
        },
    )
    .span(8.0),
    Case::thinram(
        "torture/squeeze",
        "with pages compressed underneath, all ways of access",
        |ctx| {
            torture(
                ctx,
                &Plan {
                    by: &[By::Map, By::Map, By::Syscall, By::ProcessVm, By::Direct],
                    punch: true,
                    squeeze: true,
                    ..Plan::new()
                },
            )
        },
    )
    .span(10.0),
    Case::thinram(
        "torture/large",
        "all of these on 2 MiB pages that are split meanwhile",
        |ctx| {
            crate::huge::always(ctx)?;
            torture(
                ctx,
                &Plan {
                    by: &[By::Map, By::Map, By::Syscall, By::ProcessVm, By::Direct],
                    punch: true,
                    truncate: true,
                    churn: true,
                    toggle: true,
                    large: true,
                    ..Plan::new()
                },
            )
        },
    )
    .span(15.0),
    Case::thinram(
        "torture/collapse",
        "with 2 MiB pages that are split and collapsed again, time after time",
        |ctx| {
            crate::huge::always(ctx)?;
            torture(
                ctx,
                &Plan {
                    by: &[By::Map, By::Map, By::Syscall, By::ProcessVm, By::Direct],
                    punch: true,
                    churn: true,
                    large: true,
                    collapse: true,
                    ..Plan::new()
                },
            )
        },
    )
    .span(15.0),
    Case::both("torture/all", "all of these at once", |ctx| {
        let by = &[By::Map, By::Map, By::Syscall, By::ProcessVm, By::Direct];
        torture(
            ctx,
            &Plan {
                by,
                punch: true,
                truncate: true,
                churn: true,
                toggle: true,
                squeeze: true,
                ..Plan::new()
            },
        )
    })
    .span(15.0),
];

/// A way to read and write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    /// Loads and stores.
    Map,
    /// read(2) and write(2) of the file.
    Syscall,
    /// process_vm_readv and writev of the mapping.
    ProcessVm,
    /// O_DIRECT between a disk and the mapping.
    Direct,
}

/// What goes on besides.
#[derive(Clone)]
struct Plan {
    by: &'static [By],
    punch: bool,
    truncate: bool,
    churn: bool,
    toggle: bool,
    squeeze: bool,
    /// The pages lie on both sides of a border of 2 MiB, among others that are never touched.
    large: bool,
    /// Times with and without memory, and holes, take turns: see [`Turns`].
    collapse: bool,
}

impl Plan {
    const fn new() -> Plan {
        Plan {
            by: &[By::Map],
            punch: false,
            truncate: false,
            churn: false,
            toggle: false,
            squeeze: false,
            large: false,
            collapse: false,
        }
    }
}

const LANES: usize = 4;
const LANE_WORDS: usize = WORDS / LANES;
const LANE_BYTES: usize = LANE_WORDS * 8;
/// Versions in an epoch: the first writes the whole lane, odd ones stamp a few words, even ones
/// put these back.
const EPOCH: u64 = 8;
/// Distinct contents that pages of all files have in common; number 0 is all zeroes.
const CLASSES: u64 = 16;
const FILES: usize = 4;
/// Pages of a file; those from `HEAD` on are what truncation cuts.
const PAGES: usize = 96;
const HEAD: usize = 64;
/// Stamped words of a lane are this far apart.
const STAMP_STRIDE: usize = LANE_WORDS / 4;

/// Number of the first page within its file.
static BASE: AtomicUsize = AtomicUsize::new(0);
/// A border of 2 MiB lies between the pages before and behind `HEAD` then.
const LARGE_BASE: usize = 512 - HEAD;

fn base() -> usize {
    BASE.load(Ordering::Relaxed)
}

/// Pages of a file, with those that nobody touches.
fn file_pages() -> usize {
    if base() > 0 {
        1024
    } else {
        PAGES
    }
}

/// Where a lane is.
#[derive(Debug, Clone, Copy)]
struct Spot {
    file: usize,
    page: usize,
    lane: usize,
}

impl Spot {
    /// A word that says whose it is: no other file, page, lane or version has it.
    fn stamp(self, version: u64) -> u64 {
        let place = ((self.file << 16) | (self.page << 4) | self.lane) as u64;
        (0xa << 60) | (place << 40) | (version & ((1 << 40) - 1))
    }

    /// Whether the versions of this epoch stamp word `index`.
    fn stamped(self, epoch: u64, index: usize) -> bool {
        index % STAMP_STRIDE == (mix(epoch ^ ((self.lane as u64) << 50)) as usize) % STAMP_STRIDE
    }

    /// Word `index` of the lane in `version`.
    fn word(self, version: u64, index: usize) -> u64 {
        let (epoch, step) = (version / EPOCH, version % EPOCH);
        if step % 2 == 1 && self.stamped(epoch, index) {
            return self.stamp(version);
        }
        // One epoch in eight, but not the first, is like nothing else; all others are what the
        // class of the page is.
        let place = ((self.file << 24) | (self.page << 8) | self.lane) as u64;
        if epoch > 1 && mix((epoch << 32) ^ place) % 8 == 0 {
            return self.stamp(epoch * EPOCH);
        }
        match self.page as u64 % CLASSES {
            0 => 0,
            class => {
                // Four words alike in a row: it compresses.
                let place = (self.lane * LANE_WORDS + index) / 4;
                (0xc << 60) | (mix((class << 32) | place as u64) >> 4)
            }
        }
    }

    /// The last version up to `version` that may have stored word `index`; `whole` is the last
    /// one that stored all words.
    fn stored(self, version: u64, index: usize, whole: u64) -> u64 {
        let (epoch, step) = (version / EPOCH, version % EPOCH);
        // Of whole writes before the last one nothing is known: this version may have been one.
        if whole > version || (step > 0 && self.stamped(epoch, index)) {
            return version;
        }
        whole.max(epoch * EPOCH)
    }

    fn content(self, version: u64) -> [u64; LANE_WORDS] {
        std::array::from_fn(|index| self.word(version, index))
    }

    /// Byte offset in the file.
    fn offset(self) -> usize {
        (base() + self.page) * PAGE + self.lane * LANE_BYTES
    }
}

/// What a foreign or stale word is, as far as it says so itself.
fn describe(word: u64) -> String {
    match word >> 60 {
        0xa => {
            let place = (word >> 40) & 0xf_ffff;
            let (file, page, lane) = (place >> 16, (place >> 4) & 0xfff, place & 0xf);
            let version = word & ((1 << 40) - 1);
            format!("stamp of file {file} page {page} lane {lane} version {version}")
        }
        0xc => "content common to a class of pages".into(),
        _ if word == 0 => "zero".into(),
        _ => "nothing that anybody wrote".into(),
    }
}

/// One lane's entry in the shared table.
#[derive(Clone, Copy)]
struct Entry<'a>(&'a [AtomicU64]);

impl<'a> Entry<'a> {
    const WORDS: usize = 5;

    /// The version whose write began last.
    fn begun(self) -> &'a AtomicU64 {
        &self.0[0]
    }

    /// The version whose write was completed last.
    fn done(self) -> &'a AtomicU64 {
        &self.0[1]
    }

    /// What was stored up to this version was punched away.
    fn floor(self) -> &'a AtomicU64 {
        &self.0[2]
    }

    /// The number of holes begun when the last whole write began; none of these can have hit it.
    fn clean(self) -> &'a AtomicU64 {
        &self.0[3]
    }

    /// The last version that stored the whole lane.
    fn whole(self) -> &'a AtomicU64 {
        &self.0[4]
    }
}

/// The table that all processes share.
struct Table {
    map: Map,
}

/// Words of the table's head.
#[derive(Clone, Copy)]
enum Head {
    Stop,
    Corrupt,
    Writes,
    Reads,
    Skips,
    Holes,
    Events,
}

impl Table {
    /// Holes begun and ended, then the lanes.
    const STRIDE: usize = 2 + LANES * Entry::WORDS;

    fn new() -> Result<Table> {
        let bytes = PAGE + FILES * PAGES * Table::STRIDE * 8;
        Ok(Table {
            map: Map::anonymous(bytes.next_multiple_of(PAGE))?,
        })
    }

    fn head(&self, which: Head) -> &AtomicU64 {
        &self.map.words()[which as usize]
    }

    fn stopped(&self) -> bool {
        self.head(Head::Stop).load(Ordering::Relaxed) != 0
    }

    fn page(&self, file: usize, page: usize) -> &[AtomicU64] {
        let at = WORDS + (file * PAGES + page) * Table::STRIDE;
        &self.map.words()[at..at + Table::STRIDE]
    }

    fn holes_begun(&self, file: usize, page: usize) -> &AtomicU64 {
        &self.page(file, page)[0]
    }

    fn holes_ended(&self, file: usize, page: usize) -> &AtomicU64 {
        &self.page(file, page)[1]
    }

    fn lane(&self, spot: Spot) -> Entry<'_> {
        let at = 2 + spot.lane * Entry::WORDS;
        Entry(&self.page(spot.file, spot.page)[at..at + Entry::WORDS])
    }

    /// Takes pages `from..to` of `file` away by `cut`, and notes what must be gone then.
    fn take_away(
        &self,
        file: usize,
        from: usize,
        to: usize,
        cut: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let spots =
            (from..to).flat_map(|page| (0..LANES).map(move |lane| Spot { file, page, lane }));
        for page in from..to {
            self.holes_begun(file, page).fetch_add(1, Ordering::SeqCst);
        }
        let floors: Vec<u64> = spots
            .clone()
            .map(|spot| self.lane(spot).done().load(Ordering::SeqCst))
            .collect();
        cut()?;
        for (spot, floor) in spots.zip(floors) {
            self.lane(spot).floor().fetch_max(floor, Ordering::SeqCst);
        }
        for page in from..to {
            self.holes_ended(file, page).fetch_add(1, Ordering::SeqCst);
        }
        self.head(Head::Holes).fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// One thread's hold on files, mappings and buffers.
struct Hand<'a> {
    table: &'a Table,
    files: &'a [File],
    maps: &'a [Map],
    disk: Option<&'a Disk>,
    /// Where this thread's blocks are on the disk.
    slot: u64,
    buffer: Map,
    rng: SmallRng,
    start: Instant,
}

impl Hand<'_> {
    /// Half of the time the page where all threads are in this moment, else any.
    fn pick(&mut self) -> (usize, usize) {
        let at = if self.rng.random() {
            mix(self.start.elapsed().as_micros() as u64 / 256)
        } else {
            self.rng.random()
        };
        ((at >> 32) as usize % FILES, at as u32 as usize % PAGES)
    }

    /// The way to reach `page`: what truncation may cut is not touched by mapping.
    fn way(&mut self, plan: &Plan, page: usize) -> By {
        if plan.truncate && page >= HEAD {
            return By::Syscall;
        }
        plan.by.choose(&mut self.rng).copied().unwrap_or(By::Map)
    }

    /// Writes the next version of a lane that is this thread's own.
    fn write(&mut self, plan: &Plan, spot: Spot, by: By) -> Result<()> {
        let entry = self.table.lane(spot);
        let version = entry.done().load(Ordering::Relaxed) + 1;
        let (epoch, step) = (version / EPOCH, version % EPOCH);
        let whole = step == 0 || by == By::Direct;
        let ended = self
            .table
            .holes_ended(spot.file, spot.page)
            .load(Ordering::SeqCst);
        let begun = self
            .table
            .holes_begun(spot.file, spot.page)
            .load(Ordering::SeqCst);
        entry.begun().store(version, Ordering::SeqCst);
        if whole {
            entry.clean().store(u64::MAX, Ordering::SeqCst);
            entry.whole().store(version, Ordering::SeqCst);
        }
        let content = spot.content(version);
        let chosen = |index: &usize| whole || spot.stamped(epoch, *index);
        match by {
            By::Map => {
                let at = (base() + spot.page) * WORDS + spot.lane * LANE_WORDS;
                let words = &self.maps[spot.file].words()[at..at + LANE_WORDS];
                for index in (0..LANE_WORDS).filter(chosen) {
                    words[index].store(content[index], Ordering::Release);
                }
            }
            By::Syscall if whole => {
                self.files[spot.file].write_all_at(&bytes(&content), spot.offset() as u64)?;
            }
            By::Syscall => {
                for index in (0..LANE_WORDS).filter(chosen) {
                    let at = (spot.offset() + index * 8) as u64;
                    self.files[spot.file].write_all_at(&content[index].to_ne_bytes(), at)?;
                }
            }
            By::ProcessVm => {
                let data = bytes(&content);
                let base = self.maps[spot.file].addr() + spot.offset();
                let (mut local, mut remote) = (Vec::new(), Vec::new());
                if whole {
                    local.push(IoSlice::new(&data));
                    remote.push(RemoteIoVec {
                        base,
                        len: data.len(),
                    });
                } else {
                    for index in (0..LANE_WORDS).filter(chosen) {
                        local.push(IoSlice::new(&data[index * 8..index * 8 + 8]));
                        remote.push(RemoteIoVec {
                            base: base + index * 8,
                            len: 8,
                        });
                    }
                }
                let wanted: usize = remote.iter().map(|r| r.len).sum();
                let n =
                    process_vm_writev(Pid::this(), &local, &remote).context("process_vm_writev")?;
                eq("bytes by process_vm_writev", n, wanted)?;
            }
            By::Direct => {
                let disk = self.disk.context("no disk")?;
                for (word, value) in self.buffer.words().iter().zip(&content) {
                    word.store(*value, Ordering::Relaxed);
                }
                let at = self.slot * PAGE as u64;
                let n = sys::pwrite_from(&disk.file, &self.buffer, 0, LANE_BYTES, at)?;
                eq("bytes to the disk", n, LANE_BYTES)?;
                let map = &self.maps[spot.file];
                let n = sys::pread_into(&disk.file, map, spot.offset(), LANE_BYTES, at)
                    .context("O_DIRECT into the mapping")?;
                eq("bytes from the disk", n, LANE_BYTES)?;
            }
        }
        if whole && begun == ended {
            entry.clean().store(begun, Ordering::SeqCst);
        }
        entry.done().store(version, Ordering::SeqCst);
        self.table
            .head(Head::Writes)
            .fetch_add(1, Ordering::Relaxed);
        // Nobody else writes this lane: what was just written must be there, whoever looks.
        if by != By::Map || self.rng.random_bool(0.25) {
            let mapped = !plan.truncate || spot.page < HEAD;
            self.check(spot, if mapped { By::Map } else { By::Syscall })?;
        }
        Ok(())
    }

    /// Loads a lane; `None` where the file ends before it.
    fn load(&mut self, spot: Spot, by: By) -> Result<Option<[u64; LANE_WORDS]>> {
        let mut raw = [0u8; LANE_BYTES];
        let map = &self.maps[spot.file];
        match by {
            By::Map => {
                let at = (base() + spot.page) * WORDS + spot.lane * LANE_WORDS;
                let words = &map.words()[at..at + LANE_WORDS];
                return Ok(Some(std::array::from_fn(|i| {
                    words[i].load(Ordering::Acquire)
                })));
            }
            By::Syscall => {
                let n = self.files[spot.file].read_at(&mut raw, spot.offset() as u64)?;
                if n < LANE_BYTES {
                    return Ok(None);
                }
            }
            By::ProcessVm => {
                let remote = [RemoteIoVec {
                    base: map.addr() + spot.offset(),
                    len: LANE_BYTES,
                }];
                let n = process_vm_readv(Pid::this(), &mut [IoSliceMut::new(&mut raw)], &remote)
                    .context("process_vm_readv")?;
                eq("bytes by process_vm_readv", n, LANE_BYTES)?;
            }
            By::Direct => {
                let disk = self.disk.context("no disk")?;
                let at = self.slot * PAGE as u64;
                let n = sys::pwrite_from(&disk.file, map, spot.offset(), LANE_BYTES, at)
                    .context("O_DIRECT from the mapping")?;
                eq("bytes to the disk", n, LANE_BYTES)?;
                sys::pread_into(&disk.file, &self.buffer, 0, LANE_BYTES, at)?;
                let words = self.buffer.words();
                return Ok(Some(std::array::from_fn(|i| {
                    words[i].load(Ordering::Relaxed)
                })));
            }
        }
        let mut words = [0; LANE_WORDS];
        for (word, chunk) in words.iter_mut().zip(raw.chunks_exact(8)) {
            *word = u64::from_ne_bytes(chunk.try_into()?);
        }
        Ok(Some(words))
    }

    /// Reads a lane and checks every word of it.
    fn check(&mut self, spot: Spot, by: By) -> Result<()> {
        let entry = self.table.lane(spot);
        let first = entry.done().load(Ordering::SeqCst);
        let floor = entry.floor().load(Ordering::SeqCst);
        let clean = entry.clean().load(Ordering::SeqCst);
        let Some(words) = self.load(spot, by)? else {
            return Ok(());
        };
        fence(Ordering::SeqCst);
        let last = entry.begun().load(Ordering::SeqCst);
        let whole = entry.whole().load(Ordering::SeqCst);
        let holes = self
            .table
            .holes_begun(spot.file, spot.page)
            .load(Ordering::SeqCst);
        if last - first > 4 * EPOCH {
            // The writer was far quicker than this reader: nothing to hold on to.
            self.table.head(Head::Skips).fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        let zero = clean != holes || first / EPOCH != last / EPOCH && holes > 0;
        let allowed = |index: usize, version: u64| {
            (spot.stored(version, index, whole) > floor).then(|| spot.word(version, index))
        };
        for (index, &word) in words.iter().enumerate() {
            let mut candidates = (first..=last).filter_map(|version| allowed(index, version));
            if (zero && word == 0) || candidates.any(|candidate| candidate == word) {
                continue;
            }
            // A copy that is under way may have stored part of the word's bytes.
            let mixed = (last > first || clean != holes)
                && word.to_ne_bytes().iter().enumerate().all(|(i, byte)| {
                    (zero && *byte == 0)
                        || (first..=last)
                            .filter_map(|version| allowed(index, version))
                            .any(|candidate| candidate.to_ne_bytes()[i] == *byte)
                });
            if mixed {
                continue;
            }
            let wrong = words
                .iter()
                .enumerate()
                .filter(|(i, w)| !(first..=last).any(|version| allowed(*i, version) == Some(**w)))
                .count();
            return Err(anyhow!(Corrupt(format!(
                "file {} page {} lane {} word {index}, read by {by:?}: expected version {first} \
                 to {last} stored after {floor}, such as {}; seen {word:#018x}, {}; {wrong} of \
                 {LANE_WORDS} words are wrong",
                spot.file,
                spot.page,
                spot.lane,
                describe(spot.word(last, index)),
                describe(word),
            ))));
        }
        self.table.head(Head::Reads).fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Sleeps as long as leaves the scanner time to merge, most of the time.
    fn rest(&mut self) {
        // Times of hurry and of leisure take turns, the same for all threads.
        let slice = self.start.elapsed().as_millis() as u64 / 40;
        if mix(slice) % 4 != 0 {
            thread::sleep(Duration::from_micros(self.rng.random_range(300..3000)));
        }
    }

    fn writer(&mut self, plan: &Plan, lane: usize) -> Result<()> {
        while !self.table.stopped() {
            for _ in 0..8 {
                let (file, page) = self.pick();
                let spot = Spot { file, page, lane };
                let by = self.way(plan, page);
                self.write(plan, spot, by)?;
                let odd = self.table.lane(spot).done().load(Ordering::Relaxed) % 2 == 1;
                // Back to what other pages hold as well, or the page could never merge.
                if odd && self.rng.random_bool(0.85) {
                    let by = self.way(plan, page);
                    self.write(plan, spot, by)?;
                }
            }
            self.rest();
        }
        Ok(())
    }

    fn reader(&mut self, plan: &Plan) -> Result<()> {
        while !self.table.stopped() {
            for _ in 0..16 {
                let (file, page) = self.pick();
                let by = self.way(plan, page);
                for lane in 0..LANES {
                    self.check(Spot { file, page, lane }, by)?;
                }
            }
            self.rest();
        }
        Ok(())
    }

    /// Everything, once nobody writes any more.
    fn check_all(&mut self, plan: &Plan) -> Result<()> {
        for file in 0..FILES {
            for page in 0..PAGES {
                for lane in 0..LANES {
                    let by = self.way(plan, page);
                    self.check(Spot { file, page, lane }, by)?;
                    self.check(Spot { file, page, lane }, By::Syscall)?;
                }
            }
        }
        Ok(())
    }
}

fn bytes(words: &[u64; LANE_WORDS]) -> [u8; LANE_BYTES] {
    let mut out = [0; LANE_BYTES];
    for (chunk, word) in out.chunks_exact_mut(8).zip(words) {
        chunk.copy_from_slice(&word.to_ne_bytes());
    }
    out
}

/// Punches holes, by the file or by the mapping.
fn puncher(hand: &mut Hand<'_>, plan: &Plan) -> Result<()> {
    while !hand.table.stopped() {
        if plan.collapse && !Turns::is_short(hand.start) {
            thread::sleep(Duration::from_millis(20));
            continue;
        }
        let (file, page) = hand.pick();
        // Now and then a whole 2 MiB, so that there are large pages again.
        let whole = base() > 0 && !plan.collapse && hand.rng.random_bool(0.05);
        let from = if whole { 0 } else { page % HEAD };
        let to = match whole {
            true => HEAD,
            false => (from + hand.rng.random_range(1..6)).min(HEAD),
        };
        let (at, len) = match whole {
            true => (0, (base() + HEAD) * PAGE),
            false => ((base() + from) * PAGE, (to - from) * PAGE),
        };
        let by_map = hand.rng.random();
        hand.table.take_away(file, from, to, || {
            if by_map {
                hand.maps[file]
                    .advise(at, len, libc::MADV_REMOVE)
                    .context("MADV_REMOVE")
            } else {
                sys::punch(&hand.files[file], at as u64, len as u64).context("hole")
            }
        })?;
        thread::sleep(Duration::from_micros(hand.rng.random_range(100..2000)));
    }
    Ok(())
}

/// Cuts files and grows them again.
fn truncater(hand: &mut Hand<'_>) -> Result<()> {
    while !hand.table.stopped() {
        let file = hand.rng.random_range(0..FILES);
        let from = hand.rng.random_range(HEAD..PAGES);
        hand.table.take_away(file, from, PAGES, || {
            hand.files[file]
                .set_len(((base() + from) * PAGE) as u64)
                .context("cut")
        })?;
        if hand.rng.random() {
            // A writer may have made it longer meanwhile; that must not be cut again.
            let full = (file_pages() * PAGE) as i64;
            sys::fallocate(&hand.files[file], 0, full - PAGE as i64, PAGE as i64)
                .context("grow")?;
        }
        thread::sleep(Duration::from_micros(hand.rng.random_range(200..4000)));
    }
    Ok(())
}

/// Maps, unmaps, protects, advises and forks.
fn churner(hand: &mut Hand<'_>, head: usize) -> Result<()> {
    while !hand.table.stopped() {
        let file = hand.rng.random_range(0..FILES);
        let from = hand.rng.random_range(0..head);
        let pages = hand.rng.random_range(1..=head - from);
        let (at, len) = ((base() + from) * PAGE, pages * PAGE);
        match hand.rng.random_range(0..8) {
            0 => sys::fork_and_exit().context("fork")?,
            1 => hand.maps[file]
                .advise(at, len, libc::MADV_DONTNEED)
                .context("MADV_DONTNEED")?,
            2 => hand.maps[file]
                .advise(at, len, libc::MADV_COLD)
                .context("MADV_COLD")?,
            3 => hand.maps[file]
                .advise(at, len, libc::MADV_POPULATE_READ)
                .context("populate")?,
            4 => hand.maps[file]
                .advise(at, len, libc::MADV_POPULATE_WRITE)
                .context("populate")?,
            5 if base() > 0 => {
                // As a whole, so that 2 MiB fit.
                let map = Map::shared(&hand.files[file], 0, file_pages() * PAGE, RW)?;
                std::hint::black_box(map.get(base() + from, 0));
                // Nobody looks at this word.
                map.set(0, 0, from as u64);
            }
            5 => {
                let map = Map::shared(&hand.files[file], at as u64, len, R)?;
                for page in 0..pages {
                    std::hint::black_box(map.get(page, 0));
                }
                map.protect(0, len, RW)?;
                std::hint::black_box(map.get(0, 1));
            }
            _ => {
                let mut map = Map::shared(&hand.files[file], at as u64, len, RW)?;
                std::hint::black_box(map.get(pages - 1, 0));
                map.protect(0, len, R)?;
                map.move_over(Map::anonymous(len)?)?;
                std::hint::black_box(map.get(0, 0));
                map.protect(0, len, RW)?;
            }
        }
        hand.table
            .head(Head::Events)
            .fetch_add(1, Ordering::Relaxed);
        thread::sleep(Duration::from_micros(hand.rng.random_range(50..1000)));
    }
    Ok(())
}

/// Sets controls live.
fn toggler(ctx: &Ctx, hand: &mut Hand<'_>) -> Result<()> {
    let sys = ctx.sys();
    let vms = ["a", "b", "c"].map(|name| sys.vm(name));
    while !hand.table.stopped() {
        let vm = &vms[hand.rng.random_range(0..vms.len())];
        if base() > 0 && hand.rng.random_bool(0.3) {
            force(ctx, ["high", "clear"][hand.rng.random_range(0..2)])?;
        }
        match hand.rng.random_range(0..7) {
            0 => vm.set("share", hand.rng.random_range(0..2))?,
            1 => vm.set("domain", ["lab", "other"][hand.rng.random_range(0..2)])?,
            2 => {
                sys.set("run", [0, 2][hand.rng.random_range(0..2)])?;
                sys.set("run", 1)?;
            }
            3 => sys.set(
                "share_scope",
                ["vm", "domain", "host"][hand.rng.random_range(0..3)],
            )?,
            4 => sys.set(
                "max_page_sharing",
                [2, 3, 65536][hand.rng.random_range(0..3)],
            )?,
            5 => sys.set("zero_only", hand.rng.random_range(0..2))?,
            _ => vm.stat()?.check_sum()?,
        }
        hand.table
            .head(Head::Events)
            .fetch_add(1, Ordering::Relaxed);
        // Long enough for merges under each setting.
        thread::sleep(Duration::from_millis(hand.rng.random_range(1..40)));
    }
    Ok(())
}

/// Makes the module compress, live.
fn squeezer(ctx: &Ctx, hand: &mut Hand<'_>) -> Result<()> {
    let sys = ctx.sys();
    let vms = ["a", "b", "c"].map(|name| sys.vm(name));
    while !hand.table.stopped() {
        let vm = &vms[hand.rng.random_range(0..vms.len())];
        match hand.rng.random_range(0..8) {
            0 => vm.set("limit_kb", [0, 1, 100, 200][hand.rng.random_range(0..4)])?,
            1 => vm.set(
                "reservation_kb",
                [0, 100, 4000][hand.rng.random_range(0..3)],
            )?,
            // Refused where what is compressed would not fit into the limit.
            2 => {
                let percent = [0, 5, 50][hand.rng.random_range(0..3)];
                match vm.try_set("compress_max_percent", format!("{percent}").as_bytes()) {
                    Err(e) if e.raw_os_error() != Some(Errno::ENOMEM as i32) => {
                        return Err(e.into())
                    }
                    _ => {}
                }
            }
            3 => force(ctx, ["none", "low"][hand.rng.random_range(0..2)])?,
            4 | 5 => force(ctx, "hard")?,
            _ => vm.stat()?.check_sum()?,
        }
        hand.table
            .head(Head::Events)
            .fetch_add(1, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(hand.rng.random_range(1..60)));
    }
    for vm in &vms {
        vm.set("limit_kb", 0)?;
    }
    force(ctx, "none")
}

/// Everything the threads of one process use.
struct Crew<'a> {
    ctx: &'a Ctx,
    plan: &'a Plan,
    table: &'a Table,
    files: Vec<File>,
    maps: Vec<Map>,
    disk: Option<&'a Disk>,
    start: Instant,
}

impl<'a> Crew<'a> {
    fn new(
        ctx: &'a Ctx,
        plan: &'a Plan,
        table: &'a Table,
        paths: &[PathBuf],
        disk: Option<&'a Disk>,
        start: Instant,
    ) -> Result<Crew<'a>> {
        let open = |path: &PathBuf| File::options().read(true).write(true).open(path);
        let files = paths.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let map = |file: &File| Map::shared(file, 0, file_pages() * PAGE, RW);
        let maps = files.iter().map(map).collect::<Result<Vec<_>, _>>()?;
        Ok(Crew {
            ctx,
            plan,
            table,
            files,
            maps,
            disk,
            start,
        })
    }

    fn hand(&self, slot: u64) -> Result<Hand<'_>> {
        Ok(Hand {
            table: self.table,
            files: &self.files,
            maps: &self.maps,
            disk: self.disk,
            slot,
            buffer: Map::anonymous(PAGE)?,
            rng: SmallRng::seed_from_u64(mix(self.ctx.setup.seed ^ (slot << 56))),
            start: self.start,
        })
    }

    /// Runs `work`; whoever fails stops everybody.
    fn guarded(&self, slot: u64, work: impl FnOnce(&mut Hand<'_>) -> Result<()>) -> Result<()> {
        let done = self.hand(slot).and_then(|mut hand| work(&mut hand));
        if let Err(e) = &done {
            if e.is::<Corrupt>() {
                self.table.head(Head::Corrupt).store(1, Ordering::SeqCst);
            }
            self.table.head(Head::Stop).store(1, Ordering::SeqCst);
        }
        done
    }

    /// All threads of process `number`, until the table says stop.
    fn run(&self, number: usize, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
        let plan = self.plan;
        let slot = |thread: u64| number as u64 * 16 + thread;
        thread::scope(|scope| {
            let mut threads = Vec::new();
            for i in 0..LANES / 2 {
                let lane = number * LANES / 2 + i;
                let work = move || self.guarded(slot(i as u64), |hand| hand.writer(plan, lane));
                threads.push(scope.spawn(work));
            }
            threads.push(scope.spawn(|| self.guarded(slot(8), |hand| hand.reader(plan))));
            if plan.churn {
                let head = if plan.truncate { HEAD } else { PAGES };
                threads
                    .push(scope.spawn(move || self.guarded(slot(9), |hand| churner(hand, head))));
            }
            // Holes of one page must not overlap each other, so each kind has one thread.
            if number == 0 && plan.punch {
                threads.push(scope.spawn(|| self.guarded(slot(10), |h| puncher(h, plan))));
            }
            if number == 0 && plan.truncate {
                threads.push(scope.spawn(|| self.guarded(slot(11), truncater)));
            }
            if number == 1 && plan.toggle && self.ctx.is_thinram() {
                let ctx = self.ctx;
                threads.push(scope.spawn(move || self.guarded(slot(12), |h| toggler(ctx, h))));
            }
            if number == 1 && plan.squeeze && self.ctx.is_thinram() {
                let ctx = self.ctx;
                threads.push(scope.spawn(move || self.guarded(slot(7), |h| squeezer(ctx, h))));
            }
            let mut result = self.guarded(slot(15), |_| meanwhile());
            for thread in threads {
                let ended = thread
                    .join()
                    .unwrap_or_else(|_| Err(anyhow!("a thread panicked")));
                // The first to fail says most; corruption says more than what follows from it.
                result = match (result, ended) {
                    (Err(a), Err(b)) if b.is::<Corrupt>() && !a.is::<Corrupt>() => Err(b),
                    (Ok(()), ended) => ended,
                    (result, _) => result,
                };
            }
            result
        })
    }
}

/// Memory that is short and then is not, in turns, for [`Plan::collapse`]. File [`Turns::FILE`] shares
/// nothing: while memory is short holes split its first 2 MiB, afterwards they are put together again.
/// The pages that nobody writes have to be data, and in use, for that.
struct Turns<'a> {
    ctx: &'a Ctx,
    file: File,
    map: Map,
    start: Instant,
    short: Option<bool>,
}

impl Turns<'_> {
    /// The VM that has the file, and the file's number.
    const VM: &'static str = "b";
    const FILE: usize = 2;
    /// Long enough for a round of the collapser on a slow machine.
    const TURN: Duration = Duration::from_millis(2500);
    /// Pages of its first 2 MiB.
    const LARGE: usize = 512;
    /// The word of an unwritten page that says which it is; the churner writes the first one.
    const MARK: usize = 1;

    fn is_short(start: Instant) -> bool {
        (start.elapsed().as_millis() / Self::TURN.as_millis()) % 2 == 0
    }

    fn begin<'a>(ctx: &'a Ctx, paths: &[PathBuf], start: Instant) -> Result<Turns<'a>> {
        let sys = ctx.sys();
        sys.vm(Self::VM).set("share", 0)?;
        sys.set("split_holes_percent", 1)?;
        sys.set("collapse_after_secs", 0)?;
        sys.set("collapse_per_sec", 1000)?;
        let path = &paths[Self::FILE];
        let file = File::options().read(true).write(true).open(path)?;
        let map = Map::shared(&file, 0, file_pages() * PAGE, RW)?;
        let turns = Turns {
            ctx,
            file,
            map,
            start,
            short: None,
        };
        for page in turns.unwritten() {
            turns.map.set(page, Self::MARK, page as u64 + 1);
        }
        Ok(turns)
    }

    /// Pages of the first 2 MiB that no writer has.
    fn unwritten(&self) -> std::ops::Range<usize> {
        0..base()
    }

    /// To be called often.
    fn go_on(&mut self) -> Result<()> {
        let short = Self::is_short(self.start);
        if self.short.replace(short) != Some(short) {
            force(self.ctx, if short { "clear" } else { "high" })?;
        }
        if !short {
            // What was punched out is memory again, of zeroes.
            sys::fallocate(&self.file, 0, 0, (Self::LARGE * PAGE) as i64)?;
            for page in self.unwritten() {
                eq(
                    format!("page {page}, which nobody writes"),
                    self.map.get(page, Self::MARK),
                    page as u64 + 1,
                )?;
            }
            for page in self.unwritten().end..Self::LARGE {
                std::hint::black_box(self.map.get(page, 0));
            }
        }
        Ok(())
    }
}

/// What a run must have come to, or it would have tested nothing.
const LARGE_MIN: u64 = 3;
const WRITES_MIN: u64 = 1000;
const READS_MIN: u64 = 1000;
const HOLES_MIN: u64 = 20;
const BREAKS_MIN: u64 = 100;
const SHARING_MIN: u64 = 20;
const PACKED_MIN: u64 = 100;
const UNPACKED_MIN: u64 = 50;

fn torture(ctx: &Ctx, plan: &Plan) -> Result<()> {
    if plan.large {
        BASE.store(LARGE_BASE, Ordering::Relaxed);
    }
    let table = Table::new()?;
    let disk = if plan.by.contains(&By::Direct) {
        Some(Disk::new(ctx, 1 << 20)?)
    } else {
        None
    };
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let other = ctx.mount("n", "size=64M,domain=other")?;
    let mut paths = Vec::new();
    for (mount, vm, name) in [
        (&mount, "a", "ram0"),
        (&mount, "a", "ram1"),
        (&mount, "b", "ram"),
        (&other, "c", "ram"),
    ] {
        let file = mount.file(vm, name, file_pages())?;
        if plan.large {
            sys::fallocate(&file, 0, 0, (file_pages() * PAGE) as i64)?;
        }
        paths.push(mount.at(vm).join(name));
    }
    let start = Instant::now();
    fill(ctx, plan, &table, &paths, disk.as_ref(), start)?;

    const SEEN: usize = 8;
    let seen = || -> Result<[u64; SEEN]> {
        let sys = ctx.sys();
        let names = [
            "pages_sharing",
            "zero_pages",
            "cow_breaks",
            "full_scans",
            "compressions",
            "decompressions",
            "splits",
            "collapses",
        ];
        let mut values = [0; SEEN];
        for (value, name) in values.iter_mut().zip(names) {
            *value = sys.get(name)?;
        }
        Ok(values)
    };
    let mut turns = match plan.collapse {
        true => Some(Turns::begin(ctx, &paths, start)?),
        false => None,
    };
    let before = if ctx.is_thinram() {
        let [.., splits, _] = seen()?;
        ctx.sys().flat_out()?;
        if plan.large {
            force(ctx, "clear")?;
        }
        // Before anybody writes: how many pages share at a time later is a matter of who is faster.
        ctx.until("the first merges", 20.0, || {
            let sharing = seen()?[0];
            Ok((sharing >= SHARING_MIN, format!("{sharing} pages")))
        })?;
        // Those of the first merges count.
        let mut before = seen()?;
        before[6] = splits;
        before
    } else {
        [0; SEEN]
    };
    let mut child = sys::fork(|| {
        Crew::new(ctx, plan, &table, &paths, disk.as_ref(), start)?.run(1, || Ok(()))
    })?;
    let crew = Crew::new(ctx, plan, &table, &paths, disk.as_ref(), start)?;
    let end = Instant::now() + ctx.span(8.0);
    // A slow machine gets the time that it takes to have tested something.
    let last = end + ctx.limit(15.0);
    let mut most_sharing = before[0];
    let count = |which: Head| table.head(which).load(Ordering::Relaxed);
    let enough = |now: &[u64; SEEN], most_sharing: u64| {
        count(Head::Writes) >= WRITES_MIN
            && count(Head::Reads) >= READS_MIN
            && (!plan.punch || count(Head::Holes) >= HOLES_MIN)
            && (!ctx.is_thinram()
                || now[2] - before[2] >= BREAKS_MIN && most_sharing >= SHARING_MIN)
            && (!plan.squeeze
                || !ctx.is_thinram()
                || now[4] - before[4] >= PACKED_MIN && now[5] - before[5] >= UNPACKED_MIN)
            && (!plan.large || now[6] - before[6] >= LARGE_MIN)
            && (!plan.collapse || now[7] - before[7] >= LARGE_MIN)
    };
    let mut result = crew.run(0, || {
        let mut shown = Instant::now();
        let mut now_seen = before;
        while !table.stopped() {
            let now = Instant::now();
            if now >= last || now >= end && enough(&now_seen, most_sharing) {
                break;
            }
            thread::sleep(Duration::from_millis(50));
            if let Some(turns) = &mut turns {
                turns.go_on()?;
            }
            if ctx.is_thinram() {
                now_seen = seen()?;
                most_sharing = most_sharing.max(now_seen[0]);
            }
            if shown.elapsed() > Duration::from_secs(10) {
                shown = Instant::now();
                progress(&table, end);
            }
        }
        table.head(Head::Stop).store(1, Ordering::SeqCst);
        Ok(())
    });
    let helper = match child.wait(ctx.limit(20.0)) {
        Ok(End::Signal(Signal::SIGBUS)) => Err(anyhow!(BusError)),
        Ok(End::Exit(0)) => Ok(()),
        Ok(other) => Err(anyhow!(
            "the second process: expected exit 0, seen {other:?}"
        )),
        Err(e) => Err(e),
    };
    let own = matches!(&result, Err(e) if e.is::<Corrupt>());
    if !own && table.head(Head::Corrupt).load(Ordering::SeqCst) != 0 {
        result = Err(anyhow!(Corrupt("seen by the second process".into())));
    }
    result?;
    helper?;
    // Whoever lost a write without a reader's notice is found now.
    crew.guarded(14, |hand| hand.check_all(plan))?;
    progress(&table, Instant::now());
    within("writes", count(Head::Writes), WRITES_MIN, u64::MAX)?;
    within("checked reads", count(Head::Reads), READS_MIN, u64::MAX)?;
    if plan.punch {
        within("holes", count(Head::Holes), HOLES_MIN, u64::MAX)?;
    }
    if ctx.is_thinram() {
        let after = seen()?;
        let breaks = after[2] - before[2];
        println!(
            "passes {}, breaks {breaks}, most pages sharing {most_sharing}",
            after[3] - before[3],
        );
        if plan.squeeze {
            let (packed, unpacked) = (after[4] - before[4], after[5] - before[5]);
            println!("compressed {packed}, brought back {unpacked}");
            within("compressions", packed, PACKED_MIN, u64::MAX)?;
            within("decompressions", unpacked, UNPACKED_MIN, u64::MAX)?;
        }
        let (splits, collapses) = (after[6] - before[6], after[7] - before[7]);
        if plan.large {
            println!("splits {splits}, collapses {collapses}");
            within("splits", splits, LARGE_MIN, u64::MAX)?;
        }
        if plan.collapse {
            within("collapses", collapses, LARGE_MIN, u64::MAX)?;
        }
        within("breaks", breaks, BREAKS_MIN, u64::MAX)?;
        within("most pages sharing", most_sharing, SHARING_MIN, u64::MAX)?;
        for vm in ["a", "b", "c"] {
            ctx.sys().vm(vm).stat()?.check_sum()?;
        }
    }
    drop((crew, turns));
    for path in &paths {
        fs::remove_file(path)?;
    }
    Ok(())
}

/// Writes the first version of every lane.
fn fill(
    ctx: &Ctx,
    plan: &Plan,
    table: &Table,
    paths: &[PathBuf],
    disk: Option<&Disk>,
    start: Instant,
) -> Result<()> {
    let crew = Crew::new(ctx, plan, table, paths, disk, start)?;
    let mut hand = crew.hand(13)?;
    for (file, _) in paths.iter().enumerate() {
        for page in 0..PAGES {
            for lane in 0..LANES {
                let spot = Spot { file, page, lane };
                table.lane(spot).done().store(EPOCH - 1, Ordering::SeqCst);
                hand.write(plan, spot, By::Syscall)?;
            }
        }
    }
    hand.check_all(plan)
}

fn progress(table: &Table, end: Instant) {
    let count = |which: Head| table.head(which).load(Ordering::Relaxed);
    println!(
        "writes {}, reads {}, too quick {}, holes {}, events {}, {} s left",
        count(Head::Writes),
        count(Head::Reads),
        count(Head::Skips),
        count(Head::Holes),
        count(Head::Events),
        end.saturating_duration_since(Instant::now()).as_secs(),
    );
}

/// A lane is written by whole blocks of any disk.
const _: () = assert!(LANE_BYTES % 512 == 0);
/// Places and versions fit their fields of a stamp.
const _: () = assert!(FILES <= 16 && PAGES <= 0xfff && LANES <= 16);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_are_distinct_and_say_whose_they_are() {
        let a = Spot {
            file: 1,
            page: 17,
            lane: 2,
        };
        let b = Spot {
            file: 2,
            page: 17,
            lane: 2,
        };
        assert_ne!(a.stamp(9), b.stamp(9));
        assert_ne!(a.stamp(9), a.stamp(10));
        assert_eq!(
            describe(a.stamp(9)),
            "stamp of file 1 page 17 lane 2 version 9"
        );
        assert_eq!(describe(0), "zero");
    }

    #[test]
    fn most_versions_are_common_to_all_files() {
        let same = |version: u64| {
            let a = Spot {
                file: 1,
                page: 17,
                lane: 2,
            };
            let b = Spot {
                file: 2,
                page: 17 + CLASSES as usize,
                lane: 2,
            };
            a.content(version) == b.content(version)
        };
        assert!(same(EPOCH));
        // Half of the steps, where both are in the seven epochs of eight.
        let common = (0..8000).filter(|step| same(2 * EPOCH + step)).count();
        assert!((2700..3500).contains(&common), "{common}");
    }

    #[test]
    fn each_version_differs_from_the_one_before() {
        let spot = Spot {
            file: 0,
            page: 3,
            lane: 1,
        };
        for version in 9..16 {
            let changed: Vec<usize> = (0..LANE_WORDS)
                .filter(|i| spot.word(version, *i) != spot.word(version - 1, *i))
                .collect();
            assert_eq!(changed.len(), 4, "version {version}");
            assert!(changed
                .iter()
                .all(|i| spot.stored(version, *i, 0) == version));
        }
    }
}
