// SPDX-License-Identifier: GPL-2.0

//! What a guest does in the demo and in tests: it fills memory with data that it can
//! compute again, rewrites some of it, and checks every byte, pass after pass.
//!
//! `guest-load NAME MIB` splits MIB into four parts: pages that every guest has, zero
//! pages, pages of this guest only, and pages that change in each pass between what
//! every guest has and what is its own (so shares are made and broken all the time).
//! Lines on stdout start with `guest-load:`. A line `stop` on stdin ends it after the
//! pass; its last line is `guest-load: end passes=N bad=N verdict=intact|corrupt`.
//!
//! `guest-load NAME MIB busy` and `... idle` are guests of a host that is short of memory: most of
//! their pages are their own and compress, to a third, a bit less than half or three quarters. The
//! busy one makes pass after pass without a rest; the idle one makes one, waits for `stop`, and makes
//! another.
//!
//! `guest-load NAME MIB reads` writes a word to each page of MIB and, for each line `read`, reads 200000
//! of them in random order: `guest-load: reads=N bad=N us=N`.

use std::io::{BufRead, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;

/// A page whose address is a page's, so that equal content is equal pages.
#[derive(Clone)]
#[repr(align(4096))]
struct Page([u64; WORDS]);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Part {
    Same,
    Zero,
    Own,
    Changing,
}

/// What pages hold and how the load goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Work {
    /// A quarter of each part, noise; a pass, a rest.
    Even,
    /// Mostly pages of its own, which compress; pass after pass.
    Busy,
    /// The same, without passes but the first and the last.
    Idle,
}

impl Work {
    /// By its name, the third argument.
    fn named(name: Option<&str>) -> Option<Self> {
        match name {
            None => Some(Work::Even),
            Some("busy") => Some(Work::Busy),
            Some("idle") => Some(Work::Idle),
            Some(_) => None,
        }
    }

    /// The part that a page belongs to: parts alternate in runs of 64 pages.
    fn part(self, page: usize) -> Part {
        let run = page / 64;
        match self {
            Work::Even => [Part::Same, Part::Zero, Part::Own, Part::Changing][run % 4],
            Work::Busy | Work::Idle => match run % 8 {
                0 => Part::Same,
                1 => Part::Zero,
                2 => Part::Changing,
                _ => Part::Own,
            },
        }
    }

    /// Words of a page that are noise; the others are all alike.
    fn noise(self, page: usize) -> usize {
        match self {
            Work::Even => WORDS,
            // Compressed pages of 77 %, 45 % and 33 %.
            Work::Busy | Work::Idle => [394, 230, 170][page % 3],
        }
    }
}

/// SplitMix64: one step of a well-mixed sequence.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The seed of a page's content in a pass; None is a page of zeros.
fn seed(part: Part, own: u64, page: usize, pass: u64) -> Option<u64> {
    let page_seed = mix(page as u64);
    match part {
        Part::Zero => None,
        Part::Same => Some(page_seed),
        Part::Own => Some(page_seed ^ own),
        // One page in eight is written in a pass; it keeps that content until its next turn.
        Part::Changing => {
            let turn = (page as u64) % 8;
            let version = (pass + 8 - turn) / 8;
            let own_now = (version + page as u64) % 2 == 1;
            Some(page_seed ^ mix(version) ^ if own_now { own } else { 0 })
        }
    }
}

/// What a page holds: its seed, and how many words are made of it.
#[derive(Clone, Copy)]
struct Content {
    seed: Option<u64>,
    noise: usize,
}

impl Content {
    fn word(self, i: usize) -> u64 {
        match self.seed {
            None => 0,
            Some(s) if i < self.noise => s.wrapping_mul(2 * i as u64 + 1) ^ i as u64,
            Some(s) => s,
        }
    }

    fn fill(self, page: &mut Page) {
        for (i, w) in page.0.iter_mut().enumerate() {
            *w = self.word(i);
        }
    }

    /// The first word that is not as it should be.
    fn wrong(self, page: &Page) -> Option<usize> {
        page.0
            .iter()
            .enumerate()
            .position(|(i, w)| *w != self.word(i))
    }
}

struct Load {
    work: Work,
    own: u64,
    pages: Vec<Page>,
    pass: u64,
}

impl Load {
    fn new(name: &str, mib: usize, work: Work) -> Self {
        let own = name.bytes().fold(1, |h, b| mix(h ^ u64::from(b)));
        let count = mib * 1024 * 1024 / PAGE;
        let mut load = Self {
            work,
            own,
            pages: vec![Page([0; WORDS]); count],
            pass: 0,
        };
        let dirty = Content {
            seed: Some(u64::MAX),
            noise: WORDS,
        };
        for i in 0..count {
            let content = load.content(i, 0);
            // Zero pages are written too: a page that was never touched proves nothing.
            dirty.fill(&mut load.pages[i]);
            content.fill(&mut load.pages[i]);
        }
        load
    }

    /// What a page holds in a pass.
    fn content(&self, page: usize, pass: u64) -> Content {
        Content {
            seed: seed(self.work.part(page), self.own, page, pass),
            noise: self.work.noise(page),
        }
    }

    /// Rewrites what is due in the next pass; the number of pages written.
    fn advance(&mut self) -> usize {
        self.pass += 1;
        let mut written = 0;
        for i in 0..self.pages.len() {
            if self.work.part(i) != Part::Changing {
                continue;
            }
            let now = self.content(i, self.pass);
            if now.seed != self.content(i, self.pass - 1).seed {
                now.fill(&mut self.pages[i]);
                written += 1;
            }
        }
        written
    }

    /// Checks every byte; the pages that are wrong.
    fn check(&self, mut report: impl FnMut(usize, usize, u64, u64)) -> usize {
        let mut bad = 0;
        for (i, page) in self.pages.iter().enumerate() {
            let content = self.content(i, self.pass);
            if let Some(at) = content.wrong(page) {
                bad += 1;
                report(i, at * 8, content.word(at), page.0[at]);
            }
        }
        bad
    }
}

fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    // A console that is gone ends the guest with its host: nothing is left to tell.
    let _ = writeln!(out, "guest-load: {text}");
    let _ = out.flush();
}

/// A large area with a word in each page.
struct Area(Vec<u64>);

impl Area {
    fn new(mib: usize) -> Self {
        // Not touched yet: zeroes come from the kernel.
        let mut words = vec![0; mib * 1024 * 1024 / 8];
        for (page, words) in words.chunks_mut(WORDS).enumerate() {
            words[0] = mix(page as u64);
        }
        Self(words)
    }

    /// Reads so many words in an order that is the same each time; how many are wrong.
    fn read(&self, count: usize) -> usize {
        let pages = self.0.len() / WORDS;
        let mut bad = 0;
        let mut state = 1;
        for _ in 0..count {
            state = mix(state);
            let page = (state % pages as u64) as usize;
            bad += usize::from(self.0[page * WORDS] != mix(page as u64));
        }
        bad
    }
}

/// Random reads, as often as it is asked to.
fn reads(name: &str, mib: usize) -> ExitCode {
    const READS: usize = 200_000;
    let area = Area::new(mib);
    say(&format!("start name={name} pages={}", area.0.len() / WORDS));
    let (mut rounds, mut bad) = (0, 0);
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        match line.trim() {
            "read" => {
                let start = Instant::now();
                let now = area.read(READS);
                let us = start.elapsed().as_micros();
                say(&format!("reads={READS} bad={now} us={us}"));
                rounds += 1;
                bad += now;
            }
            "stop" => break,
            _ => {}
        }
    }
    end(rounds, bad)
}

/// The last line, and the exit status that belongs to it.
fn end(passes: u64, bad: usize) -> ExitCode {
    let verdict = if bad == 0 { "intact" } else { "corrupt" };
    say(&format!("end passes={passes} bad={bad} verdict={verdict}"));
    ExitCode::from(u8::from(bad != 0))
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    if let [name, mib, "reads"] = &words[..] {
        if let Some(mib) = mib.parse().ok().filter(|&mib| mib > 0) {
            return reads(name, mib);
        }
    }
    let parsed = match &words[..] {
        [name, mib, rest @ ..] if rest.len() <= 1 => mib
            .parse::<usize>()
            .ok()
            .filter(|&mib| mib > 0)
            .and_then(|mib| Some((*name, mib, Work::named(rest.first().copied())?))),
        _ => None,
    };
    let Some((name, mib, work)) = parsed else {
        eprintln!("usage: guest-load NAME MIB [busy|idle|reads] (MIB above 0), got {args:?}");
        return ExitCode::from(2);
    };
    let stop = Arc::new(AtomicBool::new(false));
    let told = stop.clone();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if line.trim() == "stop" {
                told.store(true, Ordering::Relaxed);
            }
        }
    });
    let mut load = Load::new(name, mib, work);
    say(&format!("start name={name} pages={}", load.pages.len()));
    let mut bad = 0;
    loop {
        let last = stop.load(Ordering::Relaxed);
        let written = load.advance();
        let now = load.check(|page, offset, want, got| {
            say(&format!(
                "CORRUPT page={page} offset={offset} want={want:#x} got={got:#x}"
            ));
        });
        bad += now;
        say(&format!("pass={} written={written} bad={now}", load.pass));
        if last {
            break;
        }
        match work {
            Work::Even => std::thread::sleep(Duration::from_millis(500)),
            Work::Busy => {}
            Work::Idle => {
                while !stop.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(500));
                }
            }
        }
    }
    end(load.pass, bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stays_intact_over_passes() {
        for work in [Work::Even, Work::Busy, Work::Idle] {
            let mut load = Load::new("a", 4, work);
            for _ in 0..20 {
                assert!(load.advance() > 0);
                assert_eq!(load.check(|_, _, _, _| {}), 0);
            }
        }
    }

    #[test]
    fn finds_one_flipped_bit() {
        let mut load = Load::new("a", 2, Work::Even);
        load.pages[70].0[511] ^= 1 << 63;
        let mut seen = Vec::new();
        assert_eq!(
            load.check(|page, offset, _, _| seen.push((page, offset))),
            1
        );
        assert_eq!(seen, [(70, 4088)]);
    }

    #[test]
    fn finds_a_page_of_an_older_pass() {
        let mut load = Load::new("a", 2, Work::Even);
        load.advance();
        let old = load.pages.clone();
        for _ in 0..8 {
            load.advance();
        }
        load.pages[193] = old[193].clone();
        assert_eq!(Work::Even.part(193), Part::Changing);
        assert_eq!(load.check(|_, _, _, _| {}), 1);
    }

    #[test]
    fn guests_share_some_pages_and_not_others() {
        let (a, b) = (Load::new("a", 4, Work::Even), Load::new("b", 4, Work::Even));
        let same = |p: Part| {
            a.pages
                .iter()
                .zip(&b.pages)
                .enumerate()
                .filter(|(i, (x, y))| Work::Even.part(*i) == p && x.0 == y.0)
                .count()
        };
        assert_eq!(same(Part::Same), 256);
        assert_eq!(same(Part::Zero), 256);
        assert_eq!(same(Part::Own), 0);
        assert!(same(Part::Changing) > 0);
    }

    #[test]
    fn what_a_busy_guest_holds_compresses_and_is_mostly_its_own() {
        let (a, b) = (Load::new("a", 6, Work::Busy), Load::new("b", 6, Work::Idle));
        let equal = a.pages.iter().zip(&b.pages).filter(|(x, y)| x.0 == y.0);
        let count = equal.count();
        assert!(
            (a.pages.len() / 4..a.pages.len() / 2).contains(&count),
            "{count}"
        );
        for (i, page) in a.pages.iter().enumerate() {
            let same = page.0.iter().filter(|w| **w == page.0[WORDS - 1]).count();
            assert!(same >= WORDS - 394, "page {i}: {same} words alike");
        }
    }

    #[test]
    fn an_area_is_read_as_it_was_written() {
        let mut area = Area::new(2);
        assert_eq!(area.read(10_000), 0);
        for page in 0..512 {
            area.0[page * WORDS] += 1;
        }
        assert_eq!(area.read(1000), 1000);
    }

    #[test]
    fn other_work_is_refused() {
        assert_eq!(Work::named(None), Some(Work::Even));
        assert_eq!(Work::named(Some("idle")), Some(Work::Idle));
        assert_eq!(Work::named(Some("lazy")), None);
    }
}
