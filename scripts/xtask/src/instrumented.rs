// SPDX-License-Identifier: GPL-2.0

//! The host's tests once more, built with what the compiler can add: a sanitizer, loom's atomics, or
//! counters of which lines ran.

use crate::env::{read, target, write};
use crate::ktap::{Outcome, Test};
use crate::setup;
use crate::step::{output, run, say, tied};
use crate::suites::unit_tests;
use anyhow::{ensure, Context, Result};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The crates with logic that a host can run.
const CRATES: [&str; 3] = ["thinram-logic", "thinramctl", "xtask"];
/// Of each property so many cases: a sanitizer makes each several times as slow.
const CASES: &str = "24";

/// What watches the tests as they run. Debian's compiler knows both, and LLVM's package has the library
/// for each, of the same version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Sanitizer {
    /// Of memory that is none, or none any more
    Address,
    /// Of what two threads touch at once
    Thread,
}

/// A program that each has to stop, or it is none.
const USE_AFTER_FREE: &str = "fn main() {
    let freed = { let page = vec![7u8; 4096]; page.as_ptr() };
    // SAFETY: There is none; this is what the sanitizer must notice.
    std::process::exit(unsafe { std::ptr::read_volatile(freed) }.into());
}
";
const RACE: &str = "static mut COUNT: u64 = 0;
fn main() {
    // SAFETY: There is none; this is what the sanitizer must notice.
    let count = || for _ in 0..100_000 { unsafe { COUNT += 1 } };
    for thread in [0, 1].map(|_| std::thread::spawn(count)) {
        thread.join().unwrap();
    }
}
";

impl Sanitizer {
    /// Its name for the compiler.
    fn name(self) -> &'static str {
        match self {
            Sanitizer::Address => "address",
            Sanitizer::Thread => "thread",
        }
    }

    /// The program that it has to stop, and what it says of it.
    fn mistake(self) -> (&'static str, &'static str) {
        match self {
            Sanitizer::Address => (USE_AFTER_FREE, "heap-use-after-free"),
            Sanitizer::Thread => (RACE, "ThreadSanitizer: data race"),
        }
    }

    /// What builds a program that it watches.
    fn flags(self) -> Result<[String; 5]> {
        let runtime = setup::unpacked("libclang-rt-19-dev")?.join("usr/lib/llvm-19/lib/clang/19");
        Ok([
            format!("-Zsanitizer={}", self.name()),
            "-Zexternal-clangrt".into(),
            "-Clinker=clang".into(),
            format!("-Clink-arg=-fsanitize={}", self.name()),
            format!("-Clink-arg=-resource-dir={}", runtime.display()),
        ])
    }

    /// The unit tests of the logic and of thinramctl under it.
    pub fn tests(self) -> Result<Vec<Test>> {
        let what = format!("{} sanitizer", self.name());
        say(format!("unit tests under the {what}"));
        let flags = self.flags()?;
        let dir = target(format!("sanitizer-{}", self.name()));
        let mut tests = vec![self.notices(&dir, &flags)?];
        let log = target(format!("sanitizer-{}.log", self.name()));
        let mut cargo = tied("cargo");
        cargo
            .args(["test", "--no-fail-fast", "--lib"])
            // Else build scripts and macros would be built with it as well.
            .args(["--target", "x86_64-unknown-linux-gnu"])
            .args(["--package", "thinram-logic", "--package", "thinramctl"])
            .env("RUSTC_BOOTSTRAP", "1")
            .env("RUSTFLAGS", flags.join(" "))
            .env("CARGO_TARGET_DIR", &dir)
            .env("PROPTEST_CASES", CASES);
        if self == Sanitizer::Thread {
            // It has to see how the standard library hands memory from thread to thread.
            cargo.arg("-Zbuild-std");
        }
        tests.extend(verdicts(&what, &log, &mut cargo)?);
        Ok(tests)
    }

    /// Whether it stops the program that it has to.
    fn notices(self, dir: &Path, flags: &[String]) -> Result<Test> {
        let (source, sign) = self.mistake();
        let (file, program) = (dir.join("mistake.rs"), dir.join("mistake"));
        write(&file, source)?;
        let mut rustc = tied("rustc");
        rustc.args(flags).arg("-o").arg(&program).arg(&file);
        let log = target(format!("sanitizer-{}-probe.log", self.name()));
        run(log, rustc.env("RUSTC_BOOTSTRAP", "1"))?;
        let ended = tied(&program).output().context("mistake")?;
        let said = String::from_utf8_lossy(&ended.stderr);
        let name = format!("the {} sanitizer notices a mistake", self.name());
        Ok(match said.contains(sign) {
            true => Test::pass(name),
            false => Test::fail(name, format!("{}: {said}", ended.status)),
        })
    }
}

/// Runs tests; none at all is an error.
fn verdicts(what: &str, log: &Path, cargo: &mut Command) -> Result<Vec<Test>> {
    let ended = run(log, cargo);
    let mut tests = unit_tests(&read(log)?, log);
    ensure!(!tests.is_empty(), "no test ran, see {}", log.display());
    let failed = tests.iter().any(|t| matches!(t.outcome, Outcome::Fail(_)));
    // What ends the whole program leaves no verdict on the test.
    if let (Err(e), false) = (ended, failed) {
        tests.push(Test::fail(what, format!("{e:#}")));
    }
    Ok(tests)
}

/// The models of the lock-free parts of the logic, in a build of their own: its atomics are loom's,
/// which tries every order in which threads can come by them.
pub fn loom() -> Result<Vec<Test>> {
    say("unit tests, loom");
    let mut cargo = tied("cargo");
    cargo
        .args(["test", "--no-fail-fast", "--lib"])
        .args(["--package", "thinram-logic", "--", "loom_tests"])
        .env("RUSTFLAGS", "--cfg=loom")
        .env("CARGO_TARGET_DIR", target("loom"));
    verdicts("loom", &target("loom.log"), &mut cargo)
}

/// Lines of a file or of a crate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Lines {
    all: u64,
    ran: u64,
}

impl Lines {
    fn add(&mut self, other: Lines) {
        self.all += other.all;
        self.ran += other.ran;
    }

    fn show(self, name: &str) -> String {
        let percent = (self.ran * 1000).checked_div(self.all).unwrap_or(1000);
        let (whole, tenth) = (percent / 10, percent % 10);
        format!(
            "{name:<46} {:>7} {:>7} {whole:>5}.{tenth} %\n",
            self.all, self.ran
        )
    }
}

/// Runs the tests of the host's crates and tells which lines ran: a table by file in
/// `target/coverage/table.txt`, and every line with its count in `lines.txt`.
pub fn coverage() -> Result<()> {
    let dir = target("coverage");
    let raw = dir.join("raw");
    if raw.exists() {
        fs::remove_dir_all(&raw)?;
    }
    let log = target("coverage.log");
    let mut cargo = tied("cargo");
    cargo.args(["test", "--no-fail-fast"]);
    for krate in CRATES {
        cargo.args(["--package", krate]);
    }
    cargo
        .env("RUSTFLAGS", "-Cinstrument-coverage")
        .env("CARGO_TARGET_DIR", dir.join("build"))
        .env("LLVM_PROFILE_FILE", raw.join("%p-%m.profraw"));
    run(&log, &mut cargo)?;
    let profile = dir.join("profile");
    let mut merge = tied("llvm-profdata");
    merge.args(["merge", "--sparse", "-o"]).arg(&profile);
    for entry in fs::read_dir(&raw).with_context(|| format!("{}", raw.display()))? {
        merge.arg(entry?.path());
    }
    run(target("coverage-merge.log"), &mut merge)?;
    let programs = programs(&read(&log)?, &dir.join("build/debug/thinramctl"));
    ensure!(!programs.is_empty(), "no test program in {}", log.display());
    let summary = output(cov("export", &profile, &programs).arg("--summary-only"))?;
    let table = table(&serde_json::from_str(&summary)?)?;
    write(dir.join("table.txt"), &table)?;
    let lines = output(&mut cov("show", &profile, &programs))?;
    write(dir.join("lines.txt"), lines)?;
    print!("{table}");
    say("target/coverage/table.txt, and lines.txt with a count for each line");
    Ok(())
}

/// The programs that cargo ran, and the one that tests ran.
fn programs(log: &str, also: &Path) -> Vec<PathBuf> {
    let ran = log.lines().filter_map(|line| {
        let line = line.trim().strip_prefix("Running ")?;
        let (_, path) = line.strip_suffix(')')?.rsplit_once('(')?;
        Some(PathBuf::from(path))
    });
    let also = also.exists().then(|| also.to_path_buf());
    ran.chain(also).collect()
}

fn cov(command: &str, profile: &Path, programs: &[PathBuf]) -> Command {
    let mut cov = tied("llvm-cov");
    cov.arg(command).arg("--instr-profile").arg(profile);
    for program in programs {
        cov.arg("--object").arg(program);
    }
    // Dependencies, the library, and tests themselves.
    cov.arg("--ignore-filename-regex=/cargo/|/rustc/|/usr/|tests?\\.rs|/tests/|logic/machine\\.rs");
    cov
}

/// A line for each file, and one for each crate.
fn table(summary: &Value) -> Result<String> {
    let mut crates: BTreeMap<String, (Lines, String)> = BTreeMap::new();
    let files = summary["data"][0]["files"].as_array();
    for file in files.context("llvm-cov: no files")? {
        let name = file["filename"].as_str().context("llvm-cov: no name")?;
        let name = name.strip_prefix("/src/").unwrap_or(name);
        let lines = &file["summary"]["lines"];
        let count = |key: &str| lines[key].as_u64().context("llvm-cov: no count");
        let lines = Lines {
            all: count("count")?,
            ran: count("covered")?,
        };
        let krate = name
            .rsplit_once("/src/")
            .map_or("rust/logic", |(krate, _)| krate);
        let (sum, rows) = crates.entry(krate.to_string()).or_default();
        sum.add(lines);
        rows.push_str(&lines.show(name));
    }
    ensure!(!crates.is_empty(), "llvm-cov: no files");
    let mut out = format!("{:<46} {:>7} {:>7} {:>9}\n", "", "lines", "ran", "");
    let mut sums = String::new();
    let mut all = Lines::default();
    for (name, (sum, rows)) in crates {
        out += &rows;
        sums += &sum.show(&name);
        all.add(sum);
    }
    Ok(out + "\n" + &sums + &all.show("all"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn files_are_summed_up_by_crate() {
        let file = |name: &str, count: u64, covered: u64| json!({"filename": name, "summary": {"lines": {"count": count, "covered": covered}}});
        let files = [
            file("/src/rust/logic/slot.rs", 10, 9),
            file("/src/userspace-ctl/src/top/draw.rs", 4, 1),
            file("/src/userspace-ctl/src/vm.rs", 4, 4),
        ];
        let table = table(&json!({"data": [{"files": files}]})).unwrap();
        let rows: Vec<Vec<&str>> = table
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert!(rows.contains(&vec![
            "userspace-ctl/src/top/draw.rs",
            "4",
            "1",
            "25.0",
            "%"
        ]));
        assert!(rows.contains(&vec!["userspace-ctl", "8", "5", "62.5", "%"]));
        assert_eq!(rows.last().unwrap(), &["all", "18", "14", "77.7", "%"]);
        assert!(super::table(&json!({"data": [{"files": []}]})).is_err());
        assert!(super::table(&json!({})).is_err());
    }

    #[test]
    fn programs_are_those_that_ran() {
        let log = "   Compiling x v0.1.0 (/src/x)\n     Running unittests lib.rs (/t/deps/a-1)\n\
                   running 1 test\ntest a ... ok\n     Running tests/it/main.rs (/t/deps/it-2)\n";
        let none = Path::new("/nonexistent");
        assert_eq!(
            programs(log, none),
            [Path::new("/t/deps/a-1"), Path::new("/t/deps/it-2")]
        );
    }
}
