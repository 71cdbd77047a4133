// SPDX-License-Identifier: GPL-2.0

//! Scenario, torture and fuzz tests of a mounted ThinRAM, run as root inside a test machine.

mod active;
mod attributes;
mod cgroup;
mod check;
mod cold;
mod collapse;
mod compress;
mod content;
mod contention;
mod controls;
mod crash;
mod ctx;
mod data;
mod edges;
mod fuzz;
mod harness;
mod host;
mod huge;
mod inject;
mod ksm;
mod live;
mod log;
mod mapping;
mod mounts;
mod names;
mod nodes;
mod noticed;
mod operations;
mod peers;
mod pins;
mod prove;
mod refused;
mod selftest;
mod sharing;
mod swap;
mod swapshared;
mod sys;
mod sysfs;
mod torture;
mod zswap;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{bail, Context, Result};
use clap::{Args, Parser, Subcommand};
use rand::{Rng, SeedableRng};

use crate::ctx::{Fs, Setup};
use crate::harness::{Case, Report};

#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print the table of cases
    List,
    /// Run cases, with the results in KTAP on stdout
    Run {
        #[command(flatten)]
        options: Options,
        /// Only cases whose name contains this; may be given several times
        #[arg(long)]
        filter: Vec<String>,
        /// Print the cases that would run
        #[arg(long)]
        dry_run: bool,
    },
    /// Take protections of a debug build out, one at a time: the torture must notice each
    Prove {
        #[command(flatten)]
        options: Options,
        /// The protection, `all` of those that can be missed anywhere, or `stock`: the rest
        #[arg(long, default_value = "all")]
        protection: String,
        /// Print the table of protections
        #[arg(long)]
        list: bool,
    },
    /// One of the two halves of the test of a panic, which need a boot each
    Crash {
        #[command(flatten)]
        options: Options,
        #[arg(value_enum)]
        half: Half,
    },
    /// Check the harness itself with cases that fail in every way there is
    Selftest {
        #[command(flatten)]
        options: Options,
    },
    /// Run one case in this process
    #[command(hide = true)]
    Child {
        name: String,
        dir: PathBuf,
        #[command(flatten)]
        options: Options,
    },
}

/// Which half of the test of a panic.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Half {
    /// Brings guests into swap and ends this machine by a panic
    Panic,
    /// Looks at the disk that the other left
    After,
}

#[derive(Args)]
struct Options {
    /// Directory below which the cases mount; created where it is missing
    #[arg(long, default_value = "/tmp/thinram-scenario")]
    mount: PathBuf,
    /// The module's sysfs directory
    #[arg(long, default_value = "/sys/fs/thinram")]
    sys: PathBuf,
    /// The module's debugfs directory
    #[arg(long, default_value = "/sys/kernel/debug/thinram")]
    debugfs: PathBuf,
    /// File system under test
    #[arg(long, value_enum, default_value_t = Fs::Thinram)]
    fs: Fs,
    /// Factor for the length of torture and fuzz cases
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Factor for every limit on time; 10 or more under TCG
    #[arg(long, default_value_t = 1.0)]
    patience: f64,
    /// Seed of everything random; a new one each run where it is not given
    #[arg(long)]
    seed: Option<u64>,
    /// Calls that a fuzz case makes, in each of its processes, whatever time that takes; a failure
    /// says with how many its seed draws the same again
    #[arg(long)]
    calls: Option<u64>,
    /// The module's file: checks that a second insmod is refused
    #[arg(long)]
    ko: Option<PathBuf>,
    /// Directory on a disk file system that knows O_DIRECT
    #[arg(long)]
    disk: Option<PathBuf>,
    /// Block device that cases may format: ALL ON IT IS LOST
    #[arg(long)]
    scratch: Option<PathBuf>,
}

impl Options {
    fn setup(self) -> Result<Setup> {
        for (name, value) in [("--scale", self.scale), ("--patience", self.patience)] {
            if !(value > 0.0 && value <= 10_000.0) {
                bail!("{name} {value}: give a number above 0 and up to 10000");
            }
        }
        if !nix::unistd::geteuid().is_root() {
            bail!("not root: the cases mount, so run this as root inside a test machine");
        }
        std::fs::create_dir_all(&self.mount)
            .with_context(|| format!("create {}", self.mount.display()))?;
        let base = self
            .mount
            .canonicalize()
            .with_context(|| format!("resolve {}", self.mount.display()))?;
        Ok(Setup {
            fs: self.fs,
            base,
            sys: self.sys,
            debug: self.debugfs,
            scale: self.scale,
            patience: self.patience,
            seed: self
                .seed
                .unwrap_or_else(|| rand::rngs::SmallRng::from_os_rng().random()),
            calls: self.calls,
            ko: self.ko,
            disk: self.disk,
            scratch: self.scratch,
        })
    }
}

/// All cases in the order in which they run. Those of a debug build come first: one of them needs an
/// index that has not grown yet.
fn cases() -> impl Iterator<Item = &'static Case> {
    [
        inject::CASES,
        live::CASES,
        names::CASES,
        data::CASES,
        edges::CASES,
        attributes::CASES,
        mounts::CASES,
        mapping::CASES,
        host::CASES,
        pins::CASES,
        sharing::CASES,
        controls::CASES,
        noticed::CASES,
        peers::CASES,
        ksm::CASES,
        contention::CASES,
        nodes::CASES,
        cgroup::CASES,
        huge::CASES,
        collapse::CASES,
        compress::CASES,
        cold::CASES,
        swap::CASES,
        swapshared::CASES,
        zswap::CASES,
        active::CASES,
        refused::CASES,
        fuzz::CASES,
        torture::CASES,
    ]
    .into_iter()
    .flatten()
}

fn case(name: &str) -> Result<&'static Case> {
    cases()
        .chain(selftest::CASES)
        .chain(crash::CASES)
        .find(|case| case.name == name)
        .with_context(|| format!("no case is named {name:?}; `list` prints the names"))
}

fn main() -> ExitCode {
    match Cli::parse().command.run() {
        Ok(code) => code,
        Err(e) => {
            eprintln!("thinram-scenario: {e:#}");
            ExitCode::FAILURE
        }
    }
}

impl Command {
    fn run(self) -> Result<ExitCode> {
        match self {
            Command::List => {
                for case in cases() {
                    let on = if case.fits(Fs::Tmpfs) {
                        "both"
                    } else {
                        "thinram"
                    };
                    println!("{:<36} {on:<8} {}", case.name, case.checks);
                }
            }
            Command::Run {
                options,
                filter,
                dry_run,
            } => {
                let setup = options.setup()?;
                let fits_none = |f: &&String| !cases().any(|case| case.name.contains(&***f));
                if let Some(none) = filter.iter().find(fits_none) {
                    bail!("no case has {none:?} in its name; `list` prints the names");
                }
                let wanted = |case: &&Case| {
                    case.fits(setup.fs)
                        && (filter.is_empty() || filter.iter().any(|f| case.name.contains(&**f)))
                };
                let chosen: Vec<&Case> = cases().filter(wanted).collect();
                if dry_run {
                    chosen.iter().for_each(|case| println!("{}", case.name));
                } else {
                    run(&chosen, &setup)?;
                }
            }
            Command::Prove {
                options,
                protection,
                list,
            } => {
                if list {
                    prove::list();
                } else {
                    prove::run(&options.setup()?, &protection)?;
                }
            }
            Command::Crash { options, half } => {
                let name = match half {
                    Half::Panic => "crash/panic",
                    Half::After => "crash/after",
                };
                run(&[case(name)?], &options.setup()?)?;
            }
            Command::Selftest { options } => selftest::run(&options.setup()?)?,
            Command::Child { name, dir, options } => {
                let code = harness::run_child(case(&name)?, options.setup()?, &dir);
                return Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)));
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn run(chosen: &[&Case], setup: &Setup) -> Result<()> {
    sys::become_subreaper()?;
    let mut report = Report::start(chosen.len());
    harness::comment(&format!(
        "{} on {}, seed {}, scale {}, patience {}",
        setup.fs.name(),
        setup.base.display(),
        setup.seed,
        setup.scale,
        setup.patience,
    ));
    for case in chosen {
        let start = Instant::now();
        let verdict = harness::run_case(case, setup)?;
        report.result(case.name, &verdict, start.elapsed());
    }
    report.end()
}

#[cfg(test)]
mod tests {
    use super::cases;

    /// The last column of the tables in docs/limits.md.
    fn tested_by() -> impl Iterator<Item = (&'static str, &'static str)> {
        let rows = include_str!("../../../docs/limits.md").lines();
        rows.filter_map(|line| line.strip_suffix(" |")?.rsplit_once(" | "))
            .filter(|(what, test)| what.starts_with("| ") && *test != "test")
    }

    #[test]
    fn each_limit_has_a_test_that_exists() {
        let part = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "/-".contains(c);
        for (what, test) in tested_by() {
            let words = test.split(|c| !part(c)).filter(|word| word.contains('/'));
            let named: Vec<&str> = words.collect();
            for name in &named {
                assert!(cases().any(|case| case.name == *name), "{what}: {name}");
            }
            // What the test machines cannot show says so.
            let other = ["kvm: ", "no such CPU here", "needs 17 GiB"];
            let other = other.iter().any(|word| test.contains(word));
            assert!(other || !named.is_empty(), "{what}: {test}");
        }
        assert!(tested_by().count() > 80);
    }
}
