// SPDX-License-Identifier: GPL-2.0

//! The work behind `make`: sysroot, kernels, boots, verdicts, reports.

mod abi;
mod balloons;
mod bench;
mod bench_cache;
mod bench_sampling;
mod bench_swap;
mod check;
mod contention;
mod demo;
mod env;
mod guest;
mod harm;
mod inside;
mod instrumented;
mod ktap;
mod kvm_selftests;
mod large;
mod libvirt;
mod lint;
mod promtool;
mod real;
mod report;
mod setup;
mod soak;
mod soak_record;
mod step;
mod suites;
mod vhost_user;
mod vm;

use crate::instrumented::Sanitizer;
use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;
use std::time::Duration;

#[derive(Parser)]
#[command(about = "Builds, tests and shows ThinRAM inside its sysroot")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Prepare everything that the other commands need
    Setup,
    /// Prepare a KDIR for modules of the stock kernel and name it
    Kdir,
    /// Build target/module/thinram.ko for the stock kernel
    Module,
    /// Formatting, lints and the rules of the house
    Check,
    /// Every test
    Test,
    /// Those of `test`, and all scenarios and guests on a kernel that watches memory and locks: hours
    TestFull,
    /// What `test-full` adds to `test`
    Debug {
        /// Only suites whose name contains this
        #[arg(long, default_value = "")]
        filter: String,
    },
    /// The unit tests under a sanitizer
    Sanitizer {
        /// Which one
        #[arg(value_enum, default_value_t = Sanitizer::Address)]
        which: Sanitizer,
    },
    /// The models of what is lock-free, in every order of their threads
    Loom,
    /// Which lines the host's tests run; target/coverage/table.txt
    Coverage,
    /// Three KVM guests share memory on the stock kernel; target/demo/report.json
    Demo,
    /// ThinRAM against KSM, zswap and hugetlbfs; target/bench/*.json
    Bench,
    /// A panic with guests in swap, and what the disk tells after the next boot
    Crash,
    /// Guests come and go with everything on; target/soak/ has a record, a picture and a verdict
    Soak {
        /// For how long; fractions are allowed
        #[arg(long, default_value_t = 1.0)]
        hours: f64,
    },
    /// Run a shell command as root in a kernel of its own and show what it says
    Run {
        /// Which kernel
        #[arg(value_enum)]
        place: vm::Place,
        /// The command, for a shell
        command: String,
        /// Give up after this many seconds
        #[arg(long, default_value_t = 600)]
        timeout: u64,
        /// Memory of the machine in MiB
        #[arg(long, default_value_t = 2048)]
        memory: u32,
        /// More of the kernel's command line
        #[arg(long, default_value = "")]
        append: String,
    },
    /// The part of tests and demo that runs inside the virtual KVM host
    #[command(subcommand, hide = true)]
    Inside(Inside),
    /// A shell in a virtual KVM host
    HostShell,
    /// A shell in User-Mode Linux
    UmlShell,
    /// Remove target/
    Clean,
}

#[derive(Subcommand)]
enum Inside {
    /// The part of the benchmark that compares scanners
    BenchScan {
        /// Only with so many percent duplicates; may be repeated
        #[arg(long)]
        dup: Vec<u32>,
    },
    /// The part of it that compares compression
    BenchCache,
    /// The benchmark
    Bench,
    /// The part of it that compares 2 MiB pages, on the stock kernel
    BenchLarge,
    /// The part of it on a host that is short of memory, with guests
    BenchContention {
        /// Only on this kind of memory; may be repeated
        #[arg(long, value_enum)]
        on: Vec<contention::On>,
    },
    /// Two means of sampling a working set against each other, with a module of a debug build
    BenchSampling,
    /// The demo
    Demo,
    /// A soak
    Soak {
        /// What takes the memory
        #[arg(value_enum)]
        load: soak::Load,
        /// For so many seconds
        seconds: u64,
    },
    /// Tests with real guests, in KTAP
    Guests {
        /// The file system for their memory
        #[arg(long, value_enum, default_value_t = inside::Fs::Thinram)]
        fs: inside::Fs,
        /// Only cases whose name contains this
        #[arg(long, default_value = "")]
        filter: String,
        /// How often what goes in rounds goes round; more than usual adds what takes long
        #[arg(long, default_value_t = inside::ROUNDS)]
        rounds: u64,
    },
}

fn main() -> ExitCode {
    match work(Cli::parse().command) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("xtask: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn work(task: Task) -> Result<ExitCode> {
    env::require_sysroot()?;
    if let Task::Inside(task) = task {
        let good = match task {
            Inside::Bench => bench::run(&[])? & bench_cache::run()?,
            Inside::BenchScan { dup } => bench::run(&dup)?,
            Inside::BenchLarge => large::run()?,
            Inside::BenchCache => bench_cache::run()?,
            Inside::BenchContention { on } => contention::run(&on)?,
            Inside::BenchSampling => bench_sampling::run()?,
            Inside::Demo => demo::run()?,
            Inside::Soak { load, seconds } => soak::inside(load, seconds)?,
            Inside::Guests { fs, filter, rounds } => inside::guests(fs, &filter, rounds)?,
        };
        return Ok(if good {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }
    let kernel = setup::packages()?;
    let _lock = match task {
        Task::Test
        | Task::TestFull
        | Task::Debug { .. }
        | Task::Coverage
        | Task::Demo
        | Task::Bench
        | Task::Soak { .. } => Some(step::lock_checkout()?),
        _ => None,
    };
    match task {
        Task::Inside(_) => {}
        Task::Setup => {
            setup::stock(&kernel)?;
            setup::kdir(&kernel)?;
            vm::host_initramfs(&kernel)?;
            step::say(format!("{:?}", vm::hardware(&kernel)?));
            vm::guests(&kernel)?;
            for kind in [setup::Uml::Plain, setup::Uml::Kasan] {
                setup::uml(&kernel, kind)?;
            }
        }
        Task::Kdir => {
            let dir = setup::kdir(&kernel)?;
            let runs = env::output_of_uname()?;
            if runs != kernel.abi {
                eprintln!(
                    "xtask: modules built with this are for kernel {}; this machine runs {runs}",
                    kernel.abi
                );
            }
            let host = std::env::var("THINRAM_HOST_CACHE").unwrap_or_default();
            println!(
                "{}",
                dir.display().to_string().replacen(env::CACHE, &host, 1)
            );
        }
        Task::Module => println!("{}", setup::module(&kernel)?.display()),
        Task::Check => {
            return Ok(report::show(&[report::Suite::new(
                report::Kind::Host,
                "check",
                check::all(&kernel)?,
            )]))
        }
        Task::Test => return Ok(report::show(&suites::all(&kernel))),
        Task::TestFull => return Ok(report::show(&suites::full(&kernel))),
        Task::Debug { filter } => return Ok(report::show(&suites::debug(&kernel, &filter))),
        Task::Sanitizer { which } => {
            return Ok(alone("unit tests, sanitizer", || which.tests()));
        }
        Task::Loom => return Ok(alone("unit tests, loom", instrumented::loom)),
        Task::Coverage => instrumented::coverage()?,
        Task::Bench => return bench_host(&kernel),
        Task::Demo => return demo_host(&kernel),
        Task::Crash => {
            setup::module(&kernel)?;
            suites::programs()?;
            return Ok(report::show(&[suites::killed_by_a_panic(&kernel)]));
        }
        Task::Soak { hours } => return soak::run(&kernel, hours),
        Task::Run {
            place,
            command,
            timeout,
            memory,
            append,
        } => {
            match place {
                vm::Place::KvmHost | vm::Place::KvmCounted => drop(vm::guests(&kernel)?),
                vm::Place::SmpHost => {}
                vm::Place::SmpDebug => drop(setup::sanitized_module(&kernel)?),
                vm::Place::KvmDebug => {
                    setup::sanitized_module(&kernel)?;
                    vm::guests(&kernel)?;
                }
                vm::Place::Uml | vm::Place::UmlDebug | vm::Place::UmlKasan => {
                    if let Some(kind) = place.uml() {
                        setup::uml(&kernel, kind)?;
                    }
                }
            }
            let job = vm::Job {
                name: format!("run-{}", std::process::id()),
                place,
                script: command,
                timeout: Duration::from_secs(timeout),
                memory_mib: memory,
                append,
                stream: true,
                scratch: None,
            };
            let run = vm::execute(&kernel, &job)?;
            step::say(format!(
                "{}, logs in {}",
                step::took(run.time),
                run.dir.display()
            ));
            for problem in &run.problems {
                step::say(problem);
            }
            if run.exit != Some(0) || !run.problems.is_empty() {
                return Ok(ExitCode::FAILURE);
            }
        }
        Task::HostShell => vm::shell(&kernel, vm::Place::KvmHost, "", 2048)?,
        Task::UmlShell => {
            setup::uml(&kernel, setup::Uml::Plain)?;
            vm::shell(&kernel, vm::Place::Uml, "", 1024)?;
        }
        Task::Clean => {
            let dir = env::target("");
            if dir.exists() {
                std::fs::remove_dir_all(dir)?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// One suite of the host's, by itself.
fn alone(name: &str, work: impl FnOnce() -> Result<Vec<ktap::Test>>) -> ExitCode {
    report::show(&[report::Suite::run(report::Kind::Host, name, work)])
}

/// The demo as seen from outside: everything is made ready, then the host boots.
fn demo_host(kernel: &env::Kernel) -> Result<ExitCode> {
    setup::module(kernel)?;
    suites::programs()?;
    vm::guests(kernel)?;
    let report = demo::report_path();
    if report.exists() {
        std::fs::remove_file(&report)?;
    }
    step::say("boot of the stock kernel as KVM host");
    let job = vm::Job {
        name: "demo".into(),
        place: vm::Place::KvmHost,
        script: "exec /src/target/sysroot/release/xtask inside demo\n".into(),
        timeout: Duration::from_secs(20 * 60),
        memory_mib: 2048,
        append: String::new(),
        stream: true,
        scratch: None,
    };
    let run = vm::execute(kernel, &job)?;
    for problem in &run.problems {
        step::say(format!("kernel: {problem}"));
    }
    let good = run.exit == Some(0) && run.problems.is_empty();
    let verdict = if good {
        "every guest was intact"
    } else {
        "FAILED"
    };
    step::say(format!("demo: {verdict}, {}", step::took(run.time)));
    step::say("report: target/demo/report.json");
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The benchmark as seen from outside.
fn bench_host(kernel: &env::Kernel) -> Result<ExitCode> {
    setup::uml(kernel, setup::Uml::Plain)?;
    let report = bench::report_path();
    let job = vm::Job {
        name: "bench".into(),
        place: vm::Place::Uml,
        script: "exec chrt -f 10 /src/target/sysroot/release/xtask inside bench\n".into(),
        timeout: Duration::from_secs(20 * 60),
        memory_mib: 1500,
        append: "kunit.enable=0 slab_nomerge".into(),
        stream: true,
        scratch: None,
    };
    // On the stock kernel: User-Mode Linux has no pages of 2 MiB, and no KVM.
    setup::module(kernel)?;
    suites::programs()?;
    vm::guests(kernel)?;
    let large = vm::Job {
        name: "bench-large".into(),
        place: vm::Place::KvmCounted,
        script: "exec /src/target/sysroot/release/xtask inside bench-large\n".into(),
        memory_mib: large::HOST_MIB,
        timeout: Duration::from_secs(40 * 60),
        append: String::new(),
        ..job.clone()
    };
    let contention = vm::Job {
        name: "bench-contention".into(),
        script: "exec /src/target/sysroot/release/xtask inside bench-contention\n".into(),
        place: vm::Place::KvmHost,
        timeout: Duration::from_secs(60 * 60),
        memory_mib: contention::HOST_MIB,
        ..large.clone()
    };
    let jobs = [
        (
            job,
            vec![
                report,
                bench_cache::report_path(),
                bench_swap::report_path(),
            ],
        ),
        (large, vec![large::report_path()]),
        (contention, vec![contention::report_path()]),
    ];
    for (job, reports) in jobs {
        for report in reports.iter().filter(|report| report.exists()) {
            std::fs::remove_file(report)?;
        }
        let run = vm::execute(kernel, &job)?;
        for problem in &run.problems {
            step::say(format!("kernel: {problem}"));
        }
        let all = reports.iter().all(|report| report.exists());
        if run.exit != Some(0) || !run.problems.is_empty() || !all {
            step::say("the benchmark failed");
            return Ok(ExitCode::FAILURE);
        }
        step::say(format!("{} took {}", job.name, step::took(run.time)));
    }
    step::say("reports: target/bench/{scan,compress,swap,large,contention}.json");
    Ok(ExitCode::SUCCESS)
}
