// SPDX-License-Identifier: GPL-2.0

//! What a guest does in the demo and in tests: it fills memory with data that it can
//! compute again, rewrites some of it, and checks every byte, pass after pass.
//!
//! `guest-load NAME MIB` splits MIB into four parts: pages that every guest has, zero
//! pages, pages of this guest only, and pages that change in each pass between what
//! every guest has and what is its own (so shares are made and broken all the time).
//! Lines on stdout start with `guest-load:`. A line `stop` on stdin ends it after the
//! pass; its last line is `guest-load: end passes=N bad=N verdict=intact|corrupt`.

use std::io::{BufRead, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

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

/// The part that a page belongs to: parts alternate in runs of 64 pages.
fn part(page: usize) -> Part {
    match (page / 64) % 4 {
        0 => Part::Same,
        1 => Part::Zero,
        2 => Part::Own,
        _ => Part::Changing,
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
fn seed(own: u64, page: usize, pass: u64) -> Option<u64> {
    let page_seed = mix(page as u64);
    match part(page) {
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

fn word(seed: Option<u64>, i: usize) -> u64 {
    match seed {
        None => 0,
        Some(s) => s.wrapping_mul(2 * i as u64 + 1) ^ i as u64,
    }
}

fn fill(page: &mut Page, seed: Option<u64>) {
    for (i, w) in page.0.iter_mut().enumerate() {
        *w = word(seed, i);
    }
}

/// The first word that is not as it should be.
fn wrong(page: &Page, seed: Option<u64>) -> Option<usize> {
    page.0
        .iter()
        .enumerate()
        .position(|(i, w)| *w != word(seed, i))
}

struct Load {
    own: u64,
    pages: Vec<Page>,
    pass: u64,
}

impl Load {
    fn new(name: &str, mib: usize) -> Self {
        let own = name.bytes().fold(1, |h, b| mix(h ^ u64::from(b)));
        let count = mib * 1024 * 1024 / PAGE;
        let mut pages = vec![Page([0; WORDS]); count];
        for (i, page) in pages.iter_mut().enumerate() {
            // Zero pages are written too: a page that was never touched proves nothing.
            fill(page, Some(u64::MAX));
            fill(page, seed(own, i, 0));
        }
        Self {
            own,
            pages,
            pass: 0,
        }
    }

    /// Rewrites what is due in the next pass; the number of pages written.
    fn advance(&mut self) -> usize {
        self.pass += 1;
        let mut written = 0;
        for (i, page) in self.pages.iter_mut().enumerate() {
            let now = seed(self.own, i, self.pass);
            if part(i) == Part::Changing && now != seed(self.own, i, self.pass - 1) {
                fill(page, now);
                written += 1;
            }
        }
        written
    }

    /// Checks every byte; the pages that are wrong.
    fn check(&self, mut report: impl FnMut(usize, usize, u64, u64)) -> usize {
        let mut bad = 0;
        for (i, page) in self.pages.iter().enumerate() {
            let s = seed(self.own, i, self.pass);
            if let Some(at) = wrong(page, s) {
                bad += 1;
                report(i, at * 8, word(s, at), page.0[at]);
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

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (name, mib) = match &args[..] {
        [name, mib] => (name.clone(), mib.parse::<usize>().unwrap_or(0)),
        _ => (String::new(), 0),
    };
    if mib == 0 {
        eprintln!("usage: guest-load NAME MIB (both given, MIB above 0), got {args:?}");
        return ExitCode::from(2);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let told = stop.clone();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if line.trim() == "stop" {
                told.store(true, Ordering::Relaxed);
            }
        }
    });
    let mut load = Load::new(&name, mib);
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
        std::thread::sleep(Duration::from_millis(500));
    }
    let verdict = if bad == 0 { "intact" } else { "corrupt" };
    say(&format!(
        "end passes={} bad={bad} verdict={verdict}",
        load.pass
    ));
    ExitCode::from(u8::from(bad != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stays_intact_over_passes() {
        let mut load = Load::new("a", 4);
        for _ in 0..20 {
            assert!(load.advance() > 0);
            assert_eq!(load.check(|_, _, _, _| {}), 0);
        }
    }

    #[test]
    fn finds_one_flipped_bit() {
        let mut load = Load::new("a", 2);
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
        let mut load = Load::new("a", 2);
        load.advance();
        let old = load.pages.clone();
        for _ in 0..8 {
            load.advance();
        }
        load.pages[193] = old[193].clone();
        assert_eq!(part(193), Part::Changing);
        assert_eq!(load.check(|_, _, _, _| {}), 1);
    }

    #[test]
    fn guests_share_some_pages_and_not_others() {
        let (a, b) = (Load::new("a", 4), Load::new("b", 4));
        let same = |p: Part| {
            a.pages
                .iter()
                .zip(&b.pages)
                .enumerate()
                .filter(|(i, (x, y))| part(*i) == p && x.0 == y.0)
                .count()
        };
        assert_eq!(same(Part::Same), 256);
        assert_eq!(same(Part::Zero), 256);
        assert_eq!(same(Part::Own), 0);
        assert!(same(Part::Changing) > 0);
    }
}
