// SPDX-License-Identifier: GPL-2.0

//! The end of a test run: failures, skips with their reasons, a table, one line of totals.

use crate::ktap::{Outcome, Test};
use crate::step::took;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Where tests run and what they are: the summary counts each kind by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Unit tests, lints and builds, on this machine.
    Host,
    /// Suites inside a kernel.
    KUnit,
    /// Scenarios of processes on a kernel of their own.
    Scenario,
    /// Guests under KVM.
    Kvm,
}

impl Kind {
    const ALL: [(Kind, &'static str); 4] = [
        (Kind::Host, "host"),
        (Kind::KUnit, "KUnit"),
        (Kind::Scenario, "scenarios"),
        (Kind::Kvm, "KVM guests"),
    ];
}

/// The tests of one suite, and how long they took.
pub struct Suite {
    name: String,
    kind: Kind,
    tests: Vec<Test>,
    time: Duration,
}

impl Suite {
    /// A suite whose time does not matter.
    pub fn new(kind: Kind, name: &str, tests: Vec<Test>) -> Self {
        Self {
            name: name.into(),
            kind,
            tests,
            time: Duration::ZERO,
        }
    }

    /// Runs a suite; an error that keeps it from running is a failed test.
    pub fn run(kind: Kind, name: &str, work: impl FnOnce() -> anyhow::Result<Vec<Test>>) -> Self {
        let start = Instant::now();
        let tests = work().unwrap_or_else(|e| vec![Test::fail("suite", format!("{e:#}"))]);
        Self {
            name: name.into(),
            kind,
            tests,
            time: start.elapsed(),
        }
    }

    /// True if it ran and nothing failed.
    pub fn good(&self) -> bool {
        !self.tests.is_empty() && self.count(failed) == 0
    }

    fn count(&self, wanted: fn(&Outcome) -> bool) -> usize {
        self.tests.iter().filter(|t| wanted(&t.outcome)).count()
    }
}

fn passed(o: &Outcome) -> bool {
    matches!(o, Outcome::Pass)
}

fn failed(o: &Outcome) -> bool {
    matches!(o, Outcome::Fail(_))
}

fn skipped(o: &Outcome) -> bool {
    matches!(o, Outcome::Skip(_))
}

/// The report as text. A suite without a test is a failure.
fn text(suites: &[Suite]) -> (String, bool) {
    let mut out = String::new();
    // Failures come last, next to the table: the skipped are many, and the end is what people see.
    let mut failures = String::new();
    for suite in suites {
        for test in &suite.tests {
            match &test.outcome {
                Outcome::Fail(why) => {
                    failures += &format!("FAIL {}: {}\n", suite.name, test.name);
                    failures.extend(why.lines().map(|l| format!("     {l}\n")));
                }
                Outcome::Skip(why) => {
                    let why = if why.is_empty() {
                        "no reason given"
                    } else {
                        why
                    };
                    out += &format!("SKIP {}: {} ({why})\n", suite.name, test.name);
                }
                Outcome::Pass => {}
            }
        }
    }
    out += &failures;
    let head = format!(
        "{:<40}{:>8}{:>8}{:>8}{:>10}\n",
        "suite", "passed", "failed", "skipped", "time"
    );
    out += &format!("\n{head}");
    let mut sum = [0; 3];
    let mut kinds = Kind::ALL.map(|(kind, name)| (kind, name, [0; 3]));
    for suite in suites {
        let empty = usize::from(suite.tests.is_empty());
        if empty > 0 {
            out += &format!("FAIL {}: not one test ran\n", suite.name);
        }
        let n = [
            suite.count(passed),
            suite.count(failed) + empty,
            suite.count(skipped),
        ];
        let name: String = suite.name.chars().take(39).collect();
        let time = took(suite.time);
        out += &format!("{name:<40}{:>8}{:>8}{:>8}{time:>10}\n", n[0], n[1], n[2]);
        let of_kind = kinds.iter_mut().find(|(kind, ..)| *kind == suite.kind);
        let totals = of_kind.map(|(.., totals)| totals);
        for sums in std::iter::once(&mut sum).chain(totals) {
            for (total, n) in sums.iter_mut().zip(n) {
                *total += n;
            }
        }
    }
    out += "\n";
    for (_, name, n) in kinds.into_iter().filter(|(.., n)| *n != [0; 3]) {
        out += &format!("{name:<40}{:>8}{:>8}{:>8}\n", n[0], n[1], n[2]);
    }
    if sum == [0; 3] {
        out += "FAIL: not one test ran\n";
        sum[1] = 1;
    }
    out += &format!(
        "\n{} passed, {} failed, {} skipped\n",
        sum[0], sum[1], sum[2]
    );
    (out, sum[1] == 0)
}

/// Prints the report; success is that nothing failed and something ran.
pub fn show(suites: &[Suite]) -> ExitCode {
    let (text, good) = text(suites);
    print!("{text}");
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skip(name: &str, why: &str) -> Test {
        Test {
            name: name.into(),
            outcome: Outcome::Skip(why.into()),
        }
    }

    #[test]
    fn totals_are_the_last_line() {
        let suites = [
            Suite::new(
                Kind::Scenario,
                "a",
                vec![Test::pass("x"), Test::pass("y"), skip("z", "no device")],
            ),
            Suite::new(Kind::KUnit, "b", vec![Test::pass("x")]),
        ];
        let (text, good) = text(&suites);
        assert!(good);
        assert_eq!(text.lines().last(), Some("3 passed, 0 failed, 1 skipped"));
        assert!(text.contains("SKIP a: z (no device)"));
        assert!(text.lines().all(|l| l.len() <= 80));
        let counts = |name: &str| {
            let line = text.lines().find(|l| l.starts_with(name)).unwrap();
            line.split_whitespace()
                .skip(1)
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(counts("scenarios"), "2 0 1");
        assert_eq!(counts("KUnit"), "1 0 0");
        assert!(!text.contains("KVM guests"), "no such suite ran");
    }

    #[test]
    fn failures_come_after_the_skipped() {
        let failed = Suite::new(Kind::Host, "a", vec![Test::fail("x", "because\nof that")]);
        let skipped = Suite::new(Kind::Host, "b", vec![skip("z", "no device")]);
        let (text, good) = text(&[failed, skipped]);
        assert!(!good);
        let told = "SKIP b: z (no device)\nFAIL a: x\n     because\n     of that\n\nsuite";
        assert!(text.starts_with(told), "{text}");
    }

    #[test]
    fn failures_and_empty_suites_fail() {
        assert!(
            !text(&[Suite::new(
                Kind::Host,
                "a",
                vec![Test::fail("x", "because")]
            )])
            .1
        );
        assert!(
            !text(&[
                Suite::new(Kind::Host, "a", vec![Test::pass("x")]),
                Suite::new(Kind::Host, "b", vec![])
            ])
            .1
        );
        assert!(!text(&[]).1);
        let broken = Suite::run(Kind::Host, "a", || anyhow::bail!("no kernel"));
        let (text, good) = text(&[broken]);
        assert!(!good && text.contains("no kernel"));
    }
}
