// SPDX-License-Identifier: GPL-2.0

//! `cargo xtask test`: every suite, from unit tests to guests on the stock kernel.

use crate::env::{read, target, Kernel};
use crate::instrumented::{self, Sanitizer};
use crate::ktap::{self, Outcome, Test};
use crate::report::{Kind, Suite};
use crate::step::{run, say, tied};
use crate::vm::{self, Job, Place};
use crate::{check, inside, setup, soak};
use anyhow::Result;
use std::path::Path;
use std::time::Duration;

const MINUTE: Duration = Duration::from_secs(60);

/// All suites. One that cannot run is a failure, and the others run all the same.
pub fn all(k: &Kernel) -> Vec<Suite> {
    let mut suites = vec![
        Suite::run(Kind::Host, "unit tests", workspace),
        Suite::run(Kind::Host, "unit tests, address sanitizer", || {
            Sanitizer::Address.tests()
        }),
        Suite::run(Kind::Host, "unit tests, thread sanitizer", || {
            Sanitizer::Thread.tests()
        }),
        Suite::run(Kind::Host, "unit tests, loom", instrumented::loom),
        Suite::run(Kind::Host, "check", || check::all(k)),
    ];
    let module = Suite::run(Kind::Host, "module for the stock kernel", || {
        setup::module(k)?;
        Ok(vec![Test::pass("module builds")])
    });
    let built = module.good();
    suites.push(module);
    if let Err(e) = programs() {
        suites.push(Suite::new(
            Kind::Host,
            "programs",
            vec![Test::fail("programs build", format!("{e:#}"))],
        ));
        return suites;
    }
    suites.extend(uml(k));
    if !built {
        return suites;
    }
    let name = "stock kernel, 2 CPUs: scenarios";
    let smp = || {
        let scenarios = Suite::run(Kind::Scenario, name, || smp(k, Place::SmpHost));
        let large = "stock kernel: each protection is missed";
        vec![
            scenarios,
            Suite::run(Kind::Scenario, large, || large_proofs(k)),
            killed_by_a_panic(k),
        ]
    };
    // The one with guests has a single CPU.
    let (kvm, smp) = beside(name, smp, || {
        Suite::run(Kind::Kvm, "stock kernel: KVM guests", || {
            guests(k, Place::KvmHost)
        })
    });
    suites.extend(smp);
    suites.push(kvm);
    suites
}

/// Two machines fit on two cores: `other` works in a thread beside `one`, and is a failed suite of that
/// name if it panics.
fn beside<T>(
    name: &str,
    other: impl FnOnce() -> Vec<Suite> + Send,
    one: impl FnOnce() -> T,
) -> (T, Vec<Suite>) {
    std::thread::scope(|s| {
        let other = s.spawn(other);
        let one = one();
        let other = other.join().unwrap_or_else(|_| {
            let test = Test::fail("suite", "the runner itself panicked");
            vec![Suite::new(Kind::Scenario, name, vec![test])]
        });
        (one, other)
    })
}

/// What runs inside the machines.
pub fn programs() -> Result<()> {
    let mut cargo = tied("cargo");
    cargo.args([
        "build",
        "--release",
        "--package",
        "thinram-scenario",
        "--package",
        "thinramctl",
    ]);
    run(target("programs.log"), &mut cargo)
}

fn workspace() -> Result<Vec<Test>> {
    say("unit tests");
    let others: &[&str] = &["--workspace", "--exclude", "thinramctl"];
    // With those that need QEMU, which the sysroot has.
    let ctl: &[&str] = &["--package", "thinramctl", "--", "--include-ignored"];
    let mut all = Vec::new();
    for (log, args) in [("unit-tests.log", others), ("unit-tests-ctl.log", ctl)] {
        let log = target(log);
        let mut cargo = tied("cargo");
        cargo.args(["test", "--no-fail-fast"]).args(args);
        let ended = run(&log, &mut cargo);
        let tests = unit_tests(&read(&log)?, &log);
        let failed = tests.iter().any(|t| matches!(t.outcome, Outcome::Fail(_)));
        all.extend(tests);
        if let (Err(e), false) = (ended, failed) {
            all.push(Test::fail("cargo test", format!("{e:#}")));
        }
    }
    Ok(all)
}

/// The tests in the output of `cargo test`. A binary of which less or more results are seen than it
/// announced is a failure of its own.
pub fn unit_tests(text: &str, log: &Path) -> Vec<Test> {
    let mut krate = String::new();
    let mut tests = Vec::new();
    // What the binary that runs announced, and where its results begin.
    let mut planned: Option<(usize, usize)> = None;
    for line in text.lines() {
        let line = line.trim();
        if line.starts_with("Running ") {
            let binary = line.rsplit('/').next().unwrap_or("");
            krate = binary.split('-').next().unwrap_or("").to_string();
        } else if let Some(name) = line.strip_prefix("Doc-tests ") {
            krate = format!("{name} (doc)");
        }
        if let Some(count) = announced(line) {
            check_plan(&mut tests, planned, log);
            planned = Some((count, tests.len()));
        }
        let Some((name, verdict)) = line
            .strip_prefix("test ")
            .and_then(|l| l.rsplit_once(" ... "))
        else {
            continue;
        };
        let name = format!("{krate}: {name}");
        let outcome = match verdict {
            "ok" => Outcome::Pass,
            v if v.starts_with("ignored") => {
                let why = v
                    .trim_start_matches("ignored")
                    .trim_start_matches([',', ' ']);
                Outcome::Skip(why.to_string())
            }
            _ => Outcome::Fail(format!("see {}", log.display())),
        };
        tests.push(Test { name, outcome });
    }
    check_plan(&mut tests, planned, log);
    tests
}

/// Tests that a binary says that it will run.
fn announced(line: &str) -> Option<usize> {
    let count = line.strip_prefix("running ")?;
    let count = count
        .strip_suffix(" tests")
        .or(count.strip_suffix(" test"))?;
    count.parse().ok()
}

fn check_plan(tests: &mut Vec<Test>, planned: Option<(usize, usize)>, log: &Path) {
    let Some((count, from)) = planned else { return };
    let seen = tests.len() - from;
    if seen != count {
        let said = format!("{count} announced, {seen} seen: see {}", log.display());
        tests.push(Test::fail("cargo test: results", said));
    }
}

fn uml(k: &Kernel) -> Vec<Suite> {
    let built = match setup::uml(k, setup::Uml::Plain) {
        Ok(_) => Test::pass("User-Mode Linux builds"),
        Err(e) => {
            let test = Test::fail("User-Mode Linux builds", format!("{e:#}"));
            return vec![Suite::new(Kind::Scenario, "UML", vec![test])];
        }
    };
    let (mut suites, sanitized) = beside("UML, sanitizers", || sanitized(k), || plain(k, built));
    suites.extend(sanitized);
    suites
}

/// The suites of the kernel as a distribution would build it, which `built` says was.
fn plain(k: &Kernel, built: Test) -> Vec<Suite> {
    let kunit = Suite::run(Kind::KUnit, "UML: KUnit", || {
        let run = vm::execute(
            k,
            &Job {
                append: KUNIT.into(),
                ..job("kunit", Place::Uml, "true")
            },
        )?;
        let mut tests = vec![built];
        tests.extend(ktap::parse(&run.kernel_log));
        tests.extend(run.health());
        Ok(tests)
    });
    let scenarios = Suite::run(Kind::Scenario, "UML, native speed: scenarios", || {
        let script = "/src/scripts/vm/process --patience 2";
        Ok(vm::execute(k, &job("uml-scenarios", Place::Uml, script))?.tests())
    });
    let harness = Suite::run(Kind::Scenario, "UML: the harness notices", || {
        let scenario = "/src/target/sysroot/release/thinram-scenario";
        let script = &format!("{scenario} selftest --patience 2 --mount /run/thinram");
        Ok(vm::execute(k, &job("selftest", Place::Uml, script))?.tests())
    });
    let proofs = Suite::run(Kind::Scenario, "UML: each protection is missed", || {
        proofs(k)
    });
    let soak = Suite::run(Kind::Scenario, "UML: a short soak", || {
        soak::tests(k, soak::Load::Processes, MINUTE)
    });
    vec![kunit, harness, scenarios, proofs, soak]
}

/// What runs of the scenarios on the kernel with sanitizers: a case takes ten times as long there, so
/// those that reach most of the code.
const SANITIZED: [&str; 18] = [
    "fs/create",
    "fs/rename-dir",
    "fs/punch-mapped",
    "fs/truncate-mapped",
    "mmap/coherent",
    "mmap/fork",
    "mmap/o-direct",
    "mmap/move",
    "share/across-vms",
    "share/scope",
    "share/run-unshare",
    "share/max-sharers",
    "cold/three-sharers",
    "fail/allocations",
    "fail/swap-writes",
    "fail/swap-reads",
    "fuzz/fsx",
    "torture/churn",
];

/// KUnit and a part of the scenarios on User-Mode Linux with KASAN, lockdep and others.
fn sanitized(k: &Kernel) -> Vec<Suite> {
    let names = ["UML, sanitizers: KUnit", "UML, sanitizers: scenarios"];
    if let Err(e) = setup::uml(k, setup::Uml::Kasan) {
        let test = Test::fail("User-Mode Linux builds", format!("{e:#}"));
        return vec![Suite::new(Kind::Scenario, names[1], vec![test])];
    }
    // Both in one boot, which takes a minute there.
    let mut units = Vec::new();
    let scenarios = Suite::run(Kind::Scenario, names[1], || {
        let mut script = "/src/scripts/vm/process --scale 0.1 --patience 10".to_string();
        script.extend(SANITIZED.map(|name| format!(" --filter {name}")));
        let run = vm::execute(
            k,
            &Job {
                append: KUNIT.into(),
                timeout: 20 * MINUTE,
                ..job("kasan-scenarios", Place::UmlKasan, &script)
            },
        )?;
        units = ktap::parse(&run.kernel_log);
        Ok(run.tests())
    });
    let noticed = Suite::run(
        Kind::Scenario,
        "UML, sanitizers: the harness notices",
        || noticed(k, "kasan-noticed", Place::UmlKasan),
    );
    vec![
        Suite::new(Kind::KUnit, names[0], units),
        scenarios,
        noticed,
        lock_order(k),
    ]
}

/// Mistakes that a debug build makes when it is told so, and what a run is told of each.
const MISTAKES: [(&str, &str); 4] = [
    ("report", "thinram: bug: a test asked"),
    ("use_after_free", "KASAN: slab-use-after-free"),
    ("sleep", "sleeping function called from invalid context"),
    ("leak", "objects were forgotten"),
];

/// Whether each mistake makes a run on that kernel fail, and says which it was.
fn noticed(k: &Kernel, name: &str, place: Place) -> Result<Vec<Test>> {
    // User-Mode Linux has the module built in, and never looks for what it forgot.
    let mistakes = &MISTAKES[..if place.uml().is_some() { 3 } else { 4 }];
    let words: Vec<&str> = mistakes.iter().map(|(word, _)| *word).collect();
    let script = format!(
        "env DO_WRONG='{}' /src/scripts/vm/process --patience 30 --filter fs/create",
        words.join(" ")
    );
    let mut job = job(name, place, &script);
    job.append += " panic_on_warn=0";
    let told: Vec<String> = vm::execute(k, &job)?
        .tests()
        .into_iter()
        .filter_map(|test| match test.outcome {
            Outcome::Fail(why) => Some(why),
            _ => None,
        })
        .collect();
    let test = |(word, sign): &(&str, &str)| {
        if told.iter().any(|why| why.contains(sign)) {
            Test::pass(*word)
        } else {
            Test::fail(*word, format!("no failure says {sign:?}: {told:?}"))
        }
    };
    Ok(mistakes.iter().map(test).collect())
}

/// Takes one protection out at a time; the torture has to see corrupt data each time. What the
/// kernel says of that is no failure, what it says of the cases before is.
fn proofs(k: &Kernel) -> Result<Vec<Test>> {
    setup::uml(k, setup::Uml::Debug)?;
    let scenario = "/src/target/sysroot/release/thinram-scenario";
    // The cases of a debug build come first: one of them needs an index that has not grown yet.
    let script = format!(
        "sh -c '{scenario} run --filter debug/ --patience 2 --mount /run/thinram --scratch /dev/ubdb; \
         echo {PROOFS_BEGIN} >/dev/kmsg; \
         {scenario} prove --patience 2 --mount /run/thinram --disk /run/disk --scratch /dev/ubdb'"
    );
    prove(k, job("proofs", Place::UmlDebug, &script))
}

/// Everything of [`all`], then [`debug`], which takes hours.
pub fn full(k: &Kernel) -> Vec<Suite> {
    let mut suites = all(k);
    suites.extend(debug(k, ""));
    suites
}

/// A suite: its kind, its name, its work.
type Named = (Kind, &'static str, fn(&Kernel) -> Result<Vec<Test>>);

/// Those on the kernel that watches memory and locks.
const DEBUG: [Named; 5] = [
    (Kind::KUnit, "debug kernel: KUnit", debug_kunit),
    (Kind::Scenario, "debug kernel: the harness notices", |k| {
        noticed(k, "debug-noticed", Place::SmpDebug)
    }),
    (Kind::Scenario, "debug kernel: load and unload", debug_loads),
    (Kind::Scenario, "debug kernel, 2 CPUs: scenarios", |k| {
        smp(k, Place::SmpDebug)
    }),
    (Kind::Kvm, "debug kernel: KVM guests", |k| {
        guests(k, Place::KvmDebug)
    }),
];

/// The suites on the kernel that watches memory and locks whose names contain `filter`.
pub fn debug(k: &Kernel, filter: &str) -> Vec<Suite> {
    let build = Suite::run(Kind::Host, "module for the debug kernel", || {
        setup::sanitized_module(k)?;
        programs()?;
        Ok(vec![Test::pass("kernel and module build")])
    });
    let built = build.good();
    let mut suites = vec![build];
    if !built {
        return suites;
    }
    for (kind, name, work) in DEBUG {
        if name.contains(filter) {
            suites.push(Suite::run(kind, name, || work(k)));
        }
    }
    if suites.len() == 1 {
        let test = Test::fail("filter", format!("no name has {filter:?} in it"));
        suites.push(Suite::new(Kind::Host, "debug kernel", vec![test]));
    }
    suites
}

/// The module comes and goes, and its objects with DEBUG_KOBJECT_RELEASE later than it let them go.
fn debug_loads(k: &Kernel) -> Result<Vec<Test>> {
    let script = "env LOADS=50 /src/scripts/vm/process --patience 30 --filter fs/create";
    Ok(vm::execute(k, &job("debug-loads", Place::SmpDebug, script))?.tests())
}

/// The suites of KUnit in the debug kernel: a module's run when it is loaded.
fn debug_kunit(k: &Kernel) -> Result<Vec<Test>> {
    // Before that the kernel's log has the results of none, of the kernel itself.
    let begins = "thinram: KUnit suites come next";
    let script = format!(
        "sh -c 'echo {begins} >/dev/kmsg; \
         insmod /src/target/module-sanitized/thinram.ko && rmmod thinram'"
    );
    let run = vm::execute(
        k,
        &Job {
            append: format!("{KUNIT} loglevel=7"),
            ..job("debug-kunit", Place::SmpDebug, &script)
        },
    )?;
    let log = run.kernel_log.split_once(begins);
    let mut tests = ktap::parse(log.map_or("", |(_, log)| log));
    tests.extend(run.health());
    Ok(tests)
}

/// What a script tells the kernel's log before the first protection is taken out.
const PROOFS_BEGIN: &str = "thinram: protections are taken out from here";

/// Runs such a job: from [`PROOFS_BEGIN`] on it may bring warnings of the kernel, but has to end.
fn prove(k: &Kernel, mut job: Job) -> Result<Vec<Test>> {
    job.append += " panic_on_warn=0";
    let run = vm::execute(k, &job)?;
    let mut tests = ktap::parse(&run.output);
    tests.push(quiet_until_proofs(&run));
    if run.exit.is_none() {
        let why = format!("the run did not end, logs in {}", run.dir.display());
        tests.push(Test::fail("proofs end", why));
    }
    Ok(tests)
}

/// Whether the kernel had nothing to say of the cases before the proofs.
fn quiet_until_proofs(run: &vm::Outcome) -> Test {
    let name = "kernel log is clean before the proofs";
    let Some((before, _)) = run.kernel_log.split_once(PROOFS_BEGIN) else {
        let why = format!("they did not begin, logs in {}", run.dir.display());
        return Test::fail(name, why);
    };
    match &*vm::problems(before) {
        [] => Test::pass(name),
        said => Test::fail(name, said.join("; ")),
    }
}

/// What a script tells the kernel's log before the order of locks is broken.
const ORDER_BROKEN: &str = "thinram: a second region is waited for from here";
/// What lockdep says then.
const LOCKDEP: &str = "possible recursive locking detected";

/// Lockdep has nothing to say of two guests that merge, until a second region is waited for.
pub fn lock_order(k: &Kernel) -> Suite {
    Suite::run(
        Kind::Scenario,
        "UML: lockdep knows the order of locks",
        || {
            setup::uml(k, setup::Uml::Kasan)?;
            let case =
                "/src/target/sysroot/release/thinram-scenario run --filter share/across-vms \
                    --patience 10 --mount /run/thinram";
            let script = format!(
                "sh -c '{case}; echo {ORDER_BROKEN} >/dev/kmsg; \
             echo 1 >/sys/kernel/debug/thinram/break_try_lock; {case}'"
            );
            let mut job = job("lock-order", Place::UmlKasan, &script);
            job.append += " panic_on_warn=0";
            Ok(vec![order_is_known(&vm::execute(k, &job)?)])
        },
    )
}

fn order_is_known(run: &vm::Outcome) -> Test {
    let name = "prove/try_lock-share/across-vms";
    let Some((before, after)) = run.kernel_log.split_once(ORDER_BROKEN) else {
        let why = format!("the first half did not end, logs in {}", run.dir.display());
        return Test::fail(name, why);
    };
    let mut why = vm::problems(before);
    let passed = ktap::parse(&run.output);
    if !matches!(passed.first(), Some(first) if first.outcome == Outcome::Pass) {
        why.push("two guests did not merge".into());
    }
    if !after.contains(LOCKDEP) {
        why.push(format!("expected {LOCKDEP:?} without the protection"));
    }
    match why.is_empty() {
        true => Test::pass(name),
        false => Test::fail(name, why.join("; ")),
    }
}

/// Only this module's suites; a plan of nothing is a failure.
const KUNIT: &str = "kunit.filter_glob=thinram*";

fn smp(k: &Kernel, place: Place) -> Result<Vec<Test>> {
    let (name, patience) = match place {
        Place::SmpDebug => ("debug-scenarios", 30),
        _ => ("smp-scenarios", 15),
    };
    let script = format!("/src/scripts/vm/process --patience {patience} --scale 0.3");
    Ok(vm::execute(k, &job(name, place, &script))?.tests())
}

/// The same as [`proofs`] for what User-Mode Linux has not: pages of 2 MiB.
fn large_proofs(k: &Kernel) -> Result<Vec<Test>> {
    let out = target("module-debug");
    setup::build_module(k, &out, &target("module-debug.log"), &["THINRAM_DEBUG=y"])?;
    let scenario = "/src/target/sysroot/release/thinram-scenario";
    let script = format!(
        "sh -c 'insmod /src/target/module-debug/thinram.ko; \
         {scenario} run --filter debug/fail-a --filter debug/fail-l --filter debug/no-large \
         --filter debug/lost-hint --filter debug/split --patience 15 --mount /run/thinram \
         --ko /src/target/module-debug/thinram.ko; \
         echo {PROOFS_BEGIN} >/dev/kmsg; \
         {scenario} prove --protection stock --patience 15 --mount /run/thinram'"
    );
    prove(k, job("large-proofs", Place::SmpHost, &script))
}

/// What the kernel says when sysrq makes it panic.
const PANIC: &str = "sysrq: Trigger a crash";

/// Guests go to swap, the host panics, and boots again with the same disk.
pub fn killed_by_a_panic(k: &Kernel) -> Suite {
    let name = "stock kernel: killed by a panic, and booted again";
    Suite::run(Kind::Scenario, name, || crash(k))
}

fn crash(k: &Kernel) -> Result<Vec<Test>> {
    let scratch = target("runs/crash-scratch.img");
    if scratch.exists() {
        std::fs::remove_file(&scratch)?;
    }
    let half = |name: &str| {
        let script = format!(
            "sh -c 'insmod /src/target/module/thinram.ko; \
             /src/target/sysroot/release/thinram-scenario crash {name} --patience 15 \
             --mount /run/thinram --scratch /dev/vdb'"
        );
        let job = Job {
            scratch: Some(scratch.clone()),
            ..job(&format!("crash-{name}"), Place::SmpHost, &script)
        };
        vm::execute(k, &job)
    };
    let first = half("panic")?;
    let mut tests = vec![panicked(&first)];
    let second = half("after")?;
    tests.extend(second.tests());
    std::fs::remove_file(&scratch)?;
    Ok(tests)
}

/// Whether the run ended by the panic that was asked for, and was well until then.
fn panicked(run: &vm::Outcome) -> Test {
    let name = "panic with guests in swap";
    let Some((before, after)) = run.kernel_log.split_once(PANIC) else {
        let why = format!("there was no panic, logs in {}", run.dir.display());
        return Test::fail(name, why);
    };
    let mut why = vm::problems(before);
    if !run.output.contains("all is in swap, here comes the panic") {
        why.push("it came too early".into());
    }
    if run.exit.is_some() || !after.contains("Kernel panic") {
        why.push("the kernel went on after it".into());
    }
    match why.is_empty() {
        true => Test::pass(name),
        false => Test::fail(name, why.join("; ")),
    }
}

fn guests(k: &Kernel, place: Place) -> Result<Vec<Test>> {
    vm::guests(k)?;
    let (name, rounds) = match place {
        // With what takes long.
        Place::KvmDebug => ("debug-guests", inside::ROUNDS + 1),
        _ => ("kvm-guests", inside::ROUNDS),
    };
    let script = format!("/src/target/sysroot/release/xtask inside guests --rounds {rounds}");
    Ok(vm::execute(k, &job(name, place, &script))?.tests())
}

/// A job of the size that the suites need. What hangs has limits of its own; a machine that others
/// use as well may take several times as long as an idle one.
fn job(name: &str, place: Place, script: &str) -> Job {
    // KUnit is built in everywhere but in the stock kernel.
    let (append, minutes, memory_mib) = match place {
        Place::Uml | Place::UmlDebug | Place::UmlKasan => ("kunit.enable=0", 30, 2048),
        Place::SmpHost | Place::KvmHost | Place::KvmCounted => ("", 60, 2048),
        // KASAN takes an eighth of the memory, and keeps what was freed for a while.
        Place::SmpDebug | Place::KvmDebug => ("kunit.enable=0", 6 * 60, 3072),
    };
    Job {
        name: name.into(),
        place,
        script: format!("exec {script}\n"),
        timeout: minutes * MINUTE,
        memory_mib,
        append: append.into(),
        stream: false,
        scratch: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lockdep_has_to_speak_after_the_order_is_broken_and_not_before() {
        let pass = "KTAP version 1\n1..1\nok 1 share/across-vms\n";
        let seen = format!("quiet\n{ORDER_BROKEN}\nWARNING: {LOCKDEP}\n");
        let run = |output: &str, log: &str| vm::Outcome {
            output: output.into(),
            kernel_log: log.into(),
            exit: Some(0),
            problems: Vec::new(),
            time: Duration::ZERO,
            dir: "log".into(),
        };
        assert_eq!(order_is_known(&run(pass, &seen)).outcome, Outcome::Pass);
        for (output, log) in [
            (pass, format!("quiet\n{ORDER_BROKEN}\nquiet\n")),
            (pass, format!("WARNING: {LOCKDEP}\n{seen}")),
            (pass, "quiet\n".into()),
            ("", seen.clone()),
        ] {
            let test = order_is_known(&run(output, &log));
            assert!(matches!(test.outcome, Outcome::Fail(_)), "{log}");
        }
    }

    #[test]
    fn what_the_kernel_says_before_the_proofs_counts() {
        let run = |log: &str| vm::Outcome {
            output: String::new(),
            kernel_log: log.into(),
            exit: Some(0),
            problems: Vec::new(),
            time: Duration::ZERO,
            dir: "log".into(),
        };
        let after = format!("quiet\n[ 1.0] {PROOFS_BEGIN}\nWARNING: bad\n");
        assert_eq!(quiet_until_proofs(&run(&after)).outcome, Outcome::Pass);
        for log in ["quiet\n", &*format!("thinram: bug: x\n{after}")] {
            let test = quiet_until_proofs(&run(log));
            assert!(matches!(test.outcome, Outcome::Fail(_)), "{log}");
        }
    }

    #[test]
    fn only_the_panic_that_was_asked_for_counts() {
        let ready = "# all is in swap, here comes the panic\n";
        let panics = format!("quiet\n[ 1.0] {PANIC}\nKernel panic - not syncing: sysrq\n");
        let run = |output: &str, log: &str, exit| vm::Outcome {
            output: output.into(),
            kernel_log: log.into(),
            exit,
            problems: Vec::new(),
            time: Duration::ZERO,
            dir: "log".into(),
        };
        assert_eq!(panicked(&run(ready, &panics, None)).outcome, Outcome::Pass);
        for (output, log, exit) in [
            (ready, "quiet\nKernel panic - not syncing: other\n", None),
            ("", &*panics, None),
            (ready, &*panics, Some(1)),
            (ready, &*format!("BUG: bad\n{panics}"), None),
        ] {
            let test = panicked(&run(output, log, exit));
            assert!(matches!(test.outcome, Outcome::Fail(_)), "{log}");
        }
    }

    #[test]
    fn cargo_test_output_is_read() {
        let text = "     Running unittests src/main.rs (target/debug/deps/xtask-5c8a)\n\
                    running 3 tests\ntest a::b ... ok\ntest c ... FAILED\n\
                    test d ... ignored, needs a disk\n   Doc-tests thinram_logic\n\
                    running 1 test\ntest lib.rs - f (line 3) ... ok\n";
        let tests = unit_tests(text, Path::new("log"));
        assert_eq!(tests.len(), 4);
        assert_eq!(tests[0], Test::pass("xtask: a::b"));
        assert!(matches!(tests[1].outcome, Outcome::Fail(_)));
        assert_eq!(tests[2].outcome, Outcome::Skip("needs a disk".into()));
        assert_eq!(tests[3].name, "thinram_logic (doc): lib.rs - f (line 3)");
    }

    fn cargo_line(test: &Test) -> String {
        let name = &test.name;
        match &test.outcome {
            Outcome::Pass => format!("test {name} ... ok"),
            Outcome::Fail(_) => format!("test {name} ... FAILED"),
            Outcome::Skip(why) => format!("test {name} ... ignored, {why}"),
        }
    }

    fn cargo_test() -> impl Strategy<Value = Test> {
        let outcome = prop_oneof![
            4 => Just(Outcome::Pass),
            1 => Just(Outcome::Fail("see log".into())),
            1 => "[a-z][a-z ]{0,9}[a-z]".prop_map(Outcome::Skip),
        ];
        let name = "[a-z_]{1,9}(::[a-z_]{1,9}){0,2}( - should panic)?( \\(line [0-9]{1,3}\\))?";
        (name, outcome).prop_map(|(name, outcome)| Test { name, outcome })
    }

    proptest! {
        #[test]
        fn each_result_of_cargo_counts(
            binaries in prop::collection::vec(prop::collection::vec(cargo_test(), 0..6), 1..4),
            noise in "(warning: \\PC{0,9}|thread 'a' panicked|failures:|    a::b|test result: FAILED\\. 0 passed)?",
            lost in any::<prop::sample::Index>(),
        ) {
            let (mut lines, mut results, mut expected) = (Vec::new(), Vec::new(), Vec::new());
            for (nth, tests) in binaries.iter().enumerate() {
                lines.push(format!("     Running unittests src/lib.rs (target/debug/deps/b{nth}-5c8a)"));
                let s = if tests.len() == 1 { "" } else { "s" };
                lines.push(format!("running {} test{s}", tests.len()));
                for test in tests {
                    results.push(lines.len());
                    lines.push(cargo_line(test));
                    lines.push(noise.clone());
                    expected.push(Test { name: format!("b{nth}: {}", test.name), ..test.clone() });
                }
            }
            let log = Path::new("log");
            prop_assert_eq!(unit_tests(&lines.join("\n"), log), expected);
            // Without one of them, as of a binary that crashed, or with one more, it is a failure.
            if !results.is_empty() {
                let at = *lost.get(&results);
                let mut fewer = lines.clone();
                let line = fewer.remove(at);
                let told = |lines: &[String]| {
                    let tests = unit_tests(&lines.join("\n"), log);
                    tests.iter().filter(|test| test.name == "cargo test: results").count()
                };
                prop_assert_eq!(told(&fewer), 1);
                lines.insert(at, line);
                prop_assert_eq!(told(&lines), 1);
            }
        }

        #[test]
        fn no_output_of_cargo_passes_unseen(text in "(\\PC|\n|test |a::b| \\.\\.\\. |ok|ignored|FAILED|running [0-9] tests|Running a/b-c){0,30}") {
            let tests = unit_tests(&text, Path::new("log"));
            let said = text.lines().filter(|line| line.trim().ends_with(" ... ok")).count();
            let passed = tests.iter().filter(|test| test.outcome == Outcome::Pass).count();
            prop_assert!(passed <= said, "{:?}", tests);
        }
    }
}
