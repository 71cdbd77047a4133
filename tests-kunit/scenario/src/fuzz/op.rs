// SPDX-License-Identifier: GPL-2.0

//! The calls that are made, and how they are drawn.

use rand::rngs::SmallRng;
use rand::Rng;

use super::common;
use crate::sys::{PAGE, R, RW};

/// Contents that pages have in common, so that they merge.
const CLASSES: u64 = 6;
/// Files of one process.
pub const FILES: usize = 3;
/// Pages in a 2 MiB page.
pub const LARGE: usize = 512;

/// How large everything is.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Largest length of a file, in pages.
    pub cap: usize,
    /// Pages of address space that mappings come and go in.
    pub arena: usize,
    /// Largest range of a call, in pages.
    pub long: usize,
    /// Processes that have something in common; 0 for one alone.
    pub crowd: usize,
}

impl Shape {
    /// Small files: many calls hit the same pages.
    pub const SMALL: Shape = Shape {
        cap: 48,
        arena: 96,
        long: 12,
        crowd: 0,
    };
    /// Room for some 2 MiB pages.
    pub const LARGE: Shape = Shape {
        cap: 3 * LARGE,
        arena: 4 * LARGE,
        long: 2 * LARGE,
        crowd: 0,
    };

    /// The same for one of `count` processes.
    pub fn among(self, count: usize) -> Shape {
        Shape {
            crowd: count,
            ..self
        }
    }

    /// Whether a 2 MiB page fits a file.
    pub fn is_large(self) -> bool {
        self.cap >= LARGE
    }
}

/// How bytes go from one file to another.
#[derive(Debug, Clone, Copy)]
pub enum Way {
    Splice,
    Sendfile,
    CopyRange,
}

/// One call with its arguments.
#[derive(Debug, Clone)]
pub enum Op {
    /// Empties 2 MiB of a file, gives it memory again, maps it whole from page `at` on, writes, and
    /// moves it.
    Large {
        file: usize,
        region: usize,
        at: usize,
        to: usize,
        value: u64,
    },
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
        keep: bool,
    },
    Copy {
        way: Way,
        from: usize,
        at: usize,
        to: usize,
        to_at: usize,
        len: usize,
    },
    Map {
        at: usize,
        file: usize,
        page: usize,
        pages: usize,
        prot: i32,
        /// After a munmap, not over what is there.
        anew: bool,
    },
    /// By munmap; what lies around it stays.
    Unmap {
        at: usize,
        pages: usize,
    },
    Protect {
        at: usize,
        pages: usize,
        prot: i32,
    },
    /// mremap of as many of `pages` as are of one mapping, to as many less `less`, but one at least.
    Move {
        from: usize,
        pages: usize,
        to: usize,
        less: usize,
    },
    /// mremap to more pages, which is refused.
    Grow {
        at: usize,
        pages: usize,
        more: usize,
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
    /// O_DIRECT from the mapping to a disk, at the same place of it.
    ToDisk {
        at: usize,
        pages: usize,
    },
    /// O_DIRECT from the disk into the mapping.
    FromDisk {
        at: usize,
        pages: usize,
    },
    Lock {
        at: usize,
        pages: usize,
    },
    Sync,
    /// A child writes a page by a mapping of its own.
    Fork {
        file: usize,
        page: usize,
        seed: u64,
    },
    /// A mount of its own comes, holds a VM, and goes.
    Instance {
        seed: u64,
    },
    /// A call that must be refused.
    Refused {
        number: usize,
        file: usize,
        at: usize,
    },
    /// On what all processes have in common.
    Common(common::Call),
    /// Reads another process's memory and files, whatever is in them.
    Neighbour {
        number: usize,
        at: usize,
        pages: usize,
    },
    /// Gives the scanner time to merge.
    Rest,
    /// A VM's knob.
    Vm {
        vm: usize,
        number: usize,
    },
    /// A knob of the host.
    Host {
        number: usize,
    },
}

/// Every advice but MADV_HWPOISON and MADV_SOFT_OFFLINE, each of which takes a page from the machine
/// for good; the kernel may not know some.
const ADVICES: [i32; 26] = [
    libc::MADV_NORMAL,
    libc::MADV_RANDOM,
    libc::MADV_SEQUENTIAL,
    libc::MADV_WILLNEED,
    libc::MADV_DONTNEED,
    libc::MADV_DONTNEED_LOCKED,
    libc::MADV_FREE,
    libc::MADV_REMOVE,
    libc::MADV_REMOVE,
    libc::MADV_DONTFORK,
    libc::MADV_DOFORK,
    libc::MADV_WIPEONFORK,
    libc::MADV_KEEPONFORK,
    libc::MADV_DONTDUMP,
    libc::MADV_DODUMP,
    libc::MADV_MERGEABLE,
    libc::MADV_UNMERGEABLE,
    libc::MADV_HUGEPAGE,
    libc::MADV_NOHUGEPAGE,
    MADV_COLLAPSE,
    libc::MADV_COLD,
    libc::MADV_PAGEOUT,
    libc::MADV_POPULATE_READ,
    libc::MADV_POPULATE_WRITE,
    MADV_GUARD_INSTALL,
    MADV_GUARD_REMOVE,
];

/// Not known to the C library's headers yet.
const MADV_COLLAPSE: i32 = 25;
pub const MADV_GUARD_INSTALL: i32 = 102;
pub const MADV_GUARD_REMOVE: i32 = 103;

/// A range of bytes within the largest file; half of them are whole pages, and some of the long
/// ones whole 2 MiB.
fn range(rng: &mut SmallRng, shape: Shape, most: usize) -> (usize, usize) {
    let (cap, most) = (shape.cap, most.min(shape.cap));
    if shape.long > LARGE && rng.random_bool(0.1) {
        let at = rng.random_range(0..cap / LARGE) * LARGE;
        return (at * PAGE, LARGE * PAGE);
    }
    if rng.random() {
        let at = rng.random_range(0..cap);
        (at * PAGE, rng.random_range(1..=most.min(cap - at)) * PAGE)
    } else {
        let at = rng.random_range(0..cap * PAGE);
        (at, rng.random_range(1..=(most * PAGE).min(cap * PAGE - at)))
    }
}

/// A page's number: anywhere, or in a large shape more often near the borders of 2 MiB.
fn page(rng: &mut SmallRng, pages: usize) -> usize {
    if pages > LARGE && rng.random() {
        let border = rng.random_range(0..pages / LARGE) * LARGE;
        return border + rng.random_range(0..4);
    }
    rng.random_range(0..pages)
}

/// A move from `at`: of whole 2 MiB where there is room for some, as often as of other lengths. A third
/// of them leave something behind, some of these stay where they are.
fn move_of(rng: &mut SmallRng, shape: Shape, at: usize, pages: usize) -> Op {
    let less = match rng.random_range(0..3) {
        0 => rng.random_range(1..=pages),
        _ => 0,
    };
    if shape.is_large() && rng.random() {
        let mut border = || rng.random_range(0..shape.arena / LARGE) * LARGE;
        return Op::Move {
            from: border(),
            pages: LARGE,
            to: border(),
            less,
        };
    }
    let to = page(rng, shape.arena);
    Op::Move {
        from: at,
        pages,
        to: if less > 0 && rng.random() { at } else { to },
        less,
    }
}

/// Draws the next call.
pub fn draw(rng: &mut SmallRng, shape: Shape) -> Op {
    let file = rng.random_range(0..FILES);
    let seed = if rng.random_bool(0.8) {
        rng.random_range(0..CLASSES)
    } else {
        rng.random()
    };
    // By chance there would be none: a region has to be empty when all of it is asked for.
    if shape.is_large() && rng.random_bool(0.02) {
        return Op::Large {
            file,
            region: rng.random_range(0..shape.cap / LARGE),
            at: rng.random_range(0..shape.arena / LARGE) * LARGE,
            to: rng.random_range(0..shape.arena / LARGE) * LARGE,
            value: seed,
        };
    }
    let at = page(rng, shape.arena);
    let long = if rng.random_bool(0.8) { 12 } else { shape.long };
    let pages = rng.random_range(1..=long.min(shape.arena - at));
    let prot = [libc::PROT_NONE, R, RW, RW, RW][rng.random_range(0..5)];
    let kinds = if shape.crowd > 0 { 160 } else { 120 };
    match rng.random_range(0..kinds) {
        0..=14 => {
            let (at, len) = range(rng, shape, 3);
            Op::Pwrite {
                file,
                at,
                seed,
                len,
            }
        }
        15..=19 => {
            let (at, len) = range(rng, shape, 8);
            Op::Pread { file, at, len }
        }
        20..=22 => {
            let len = rng.random_range(0..=shape.cap * PAGE);
            Op::Truncate {
                file,
                len: if rng.random() { len / PAGE * PAGE } else { len },
            }
        }
        23..=28 => {
            let (at, len) = range(rng, shape, 8);
            Op::Punch { file, at, len }
        }
        29..=31 => {
            let (at, len) = range(rng, shape, 8);
            Op::Prealloc {
                file,
                at,
                len,
                keep: rng.random(),
            }
        }
        32..=41 => {
            // As a rule so that 2 MiB of the file can be 2 MiB of the mapping.
            let page = if shape.arena > LARGE && rng.random_bool(0.7) {
                at % shape.cap
            } else {
                rng.random_range(0..shape.cap)
            };
            Op::Map {
                at,
                file,
                page,
                pages: pages.min(shape.cap - page),
                prot,
                anew: rng.random(),
            }
        }
        42..=44 => Op::Unmap { at, pages },
        45..=49 => Op::Protect { at, pages, prot },
        50..=52 => move_of(rng, shape, at, pages),
        53 => Op::Grow {
            at,
            pages,
            more: rng.random_range(1..=8),
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
        99..=102 => {
            let (at, len) = range(rng, shape, 8);
            let to_at = range(rng, shape, 1).0;
            Op::Copy {
                way: [Way::Splice, Way::Sendfile, Way::CopyRange][rng.random_range(0..3)],
                from: file,
                at,
                to: rng.random_range(0..FILES),
                to_at,
                len: len.min(shape.cap * PAGE - to_at),
            }
        }
        103..=105 => Op::ToDisk { at, pages },
        106..=108 => Op::FromDisk { at, pages },
        109 => Op::Fork {
            file,
            page: page(rng, shape.cap),
            seed,
        },
        110 if rng.random_bool(0.2) => Op::Instance { seed },
        110..=112 => Op::Refused {
            number: rng.random_range(0..16),
            file,
            at,
        },
        113..=114 => Op::Neighbour {
            number: rng.random_range(0..16),
            at,
            pages,
        },
        115..=117 => Op::Vm {
            vm: file,
            number: rng.random_range(0..64),
        },
        120.. => Op::Common(common::draw(rng, shape.crowd, seed)),
        _ => Op::Host {
            number: rng.random_range(0..64),
        },
    }
}
