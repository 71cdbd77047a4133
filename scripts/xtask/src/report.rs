// SPDX-License-Identifier: GPL-2.0

//! The end of a test run: failures, skips with their reasons, a table, one line of totals.

use crate::ktap::{Outcome, Test};
use crate::step::took;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// The tests of one suite, and how long they took.
pub struct Suite {
    name: String,
    tests: Vec<Test>,
    time: Duration,
}

impl Suite {
    /// A suite whose time does not matter.
    pub fn new(name: &str, tests: Vec<Test>) -> Self {
        Self {
            name: name.into(),
            tests,
            time: Duration::ZERO,
        }
    }

    /// Runs a suite; an error that keeps it from running is a failed test.
    pub fn run(name: &str, work: impl FnOnce() -> anyhow::Result<Vec<Test>>) -> Self {
        let start = Instant::now();
        let tests = work().unwrap_or_else(|e| vec![Test::fail("suite", format!("{e:#}"))]);
        Self {
            name: name.into(),
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
    for suite in suites {
        for test in &suite.tests {
            match &test.outcome {
                Outcome::Fail(why) => {
                    out += &format!("FAIL {}: {}\n", suite.name, test.name);
                    out.extend(why.lines().map(|l| format!("     {l}\n")));
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
    let head = format!(
        "{:<40}{:>8}{:>8}{:>8}{:>10}\n",
        "suite", "passed", "failed", "skipped", "time"
    );
    out += &format!("\n{head}");
    let mut sum = [0; 3];
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
        for (total, n) in sum.iter_mut().zip(n) {
            *total += n;
        }
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
                "a",
                vec![Test::pass("x"), Test::pass("y"), skip("z", "no device")],
            ),
            Suite::new("b", vec![Test::pass("x")]),
        ];
        let (text, good) = text(&suites);
        assert!(good);
        assert_eq!(text.lines().last(), Some("3 passed, 0 failed, 1 skipped"));
        assert!(text.contains("SKIP a: z (no device)"));
        assert!(text.lines().all(|l| l.len() <= 80));
    }

    #[test]
    fn failures_and_empty_suites_fail() {
        assert!(!text(&[Suite::new("a", vec![Test::fail("x", "because")])]).1);
        assert!(
            !text(&[
                Suite::new("a", vec![Test::pass("x")]),
                Suite::new("b", vec![])
            ])
            .1
        );
        assert!(!text(&[]).1);
        let broken = Suite::run("a", || anyhow::bail!("no kernel"));
        let (text, good) = text(&[broken]);
        assert!(!good && text.contains("no kernel"));
    }
}
