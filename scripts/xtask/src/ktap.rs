// SPDX-License-Identifier: GPL-2.0

//! Reads KTAP (Documentation/dev-tools/ktap.rst of the kernel) and finds fault
//! with it: no plan, an empty plan, and a plan that was not fulfilled are failures.

use serde::{Deserialize, Serialize};

/// What became of one test.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// It passed.
    Pass,
    /// It failed, with what is known of the cause.
    Fail(String),
    /// It did not run, and why.
    Skip(String),
}

/// One test and its outcome.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Test {
    /// `suite: test` for nested results.
    pub name: String,
    /// What became of it.
    pub outcome: Outcome,
}

impl Test {
    /// A test that failed, or could not be run at all.
    pub fn fail(name: impl Into<String>, why: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            outcome: Outcome::Fail(why.into()),
        }
    }
    /// A test that passed.
    pub fn pass(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            outcome: Outcome::Pass,
        }
    }
}

#[derive(Default)]
struct Level {
    plan: Option<usize>,
    seen: usize,
    tests: Vec<Test>,
    notes: Vec<String>,
    subtest: String,
}

/// The tests of all KTAP documents in `text`, which may hold other lines and the
/// time stamps of a kernel log. Defects of the documents appear as failed tests.
pub fn parse(text: &str) -> Vec<Test> {
    let mut done = Vec::new();
    let mut levels: Vec<Level> = Vec::new();
    for raw in text.lines() {
        let line = strip_time(raw.trim_end_matches('\r'));
        let body = line.trim_start_matches(' ');
        let depth = (line.len() - body.len()) / 4;
        let relevant = body.starts_with("ok ")
            || body.starts_with("not ok ")
            || body.starts_with("1..")
            || body.starts_with("KTAP version")
            || body.starts_with("# ")
            || body.starts_with("Bail out!");
        if !relevant {
            continue;
        }
        if let Some(note) = body.strip_prefix("# ") {
            note_line(&mut levels, note);
            continue;
        }
        if let Some(why) = body.strip_prefix("Bail out!") {
            done.push(Test::fail("bail out", why.trim()));
            continue;
        }
        if body.starts_with("KTAP version") {
            if depth == 0
                && levels
                    .first()
                    .is_some_and(|l| l.plan.is_some() || l.seen > 0)
            {
                close(&mut levels, 0, &mut done);
            }
            if levels.len() <= depth {
                levels.resize_with(depth + 1, Level::default);
            }
            continue;
        }
        if let Some(n) = body.strip_prefix("1..") {
            let n = n.split_whitespace().next().and_then(|n| n.parse().ok());
            if depth == 0 && levels.first().is_some_and(|l| l.plan.is_some()) {
                close(&mut levels, 0, &mut done);
            }
            if levels.len() <= depth {
                levels.resize_with(depth + 1, Level::default);
            }
            levels[depth].plan = n;
            continue;
        }
        if levels.len() <= depth {
            levels.resize_with(depth + 1, Level::default);
        }
        let nested = close_below(&mut levels, depth);
        levels[depth].seen += 1;
        let (name, outcome) = result(body);
        let failed = matches!(outcome, Outcome::Fail(_));
        if nested.is_empty() {
            let notes = std::mem::take(&mut levels[depth].notes);
            let outcome = match outcome {
                Outcome::Fail(why) if why.is_empty() => Outcome::Fail(notes.join("; ")),
                other => other,
            };
            levels[depth].tests.push(Test { name, outcome });
        } else {
            let any = nested.iter().any(|t| matches!(t.outcome, Outcome::Fail(_)));
            if failed && !any {
                levels[depth]
                    .tests
                    .push(Test::fail(&name, "failed, though no test in it did"));
            }
            levels[depth].tests.extend(nested.into_iter().map(|t| Test {
                name: format!("{name}: {}", t.name),
                outcome: t.outcome,
            }));
        }
    }
    if levels.is_empty() {
        done.push(Test::fail("KTAP", "no test result in the output"));
    }
    close(&mut levels, 0, &mut done);
    done
}

fn note_line(levels: &mut [Level], note: &str) {
    let Some(level) = levels.last_mut() else {
        return;
    };
    if let Some(name) = note.strip_prefix("Subtest: ") {
        level.subtest = name.trim().to_string();
    } else if level.notes.len() < 12 && !note.starts_with("module:") {
        level.notes.push(note.trim().to_string());
    }
}

/// Ends the levels deeper than `depth` and hands back their tests.
fn close_below(levels: &mut Vec<Level>, depth: usize) -> Vec<Test> {
    let mut nested = Vec::new();
    if levels.len() > depth + 1 {
        close(levels, depth + 1, &mut nested);
    }
    nested
}

fn close(levels: &mut Vec<Level>, depth: usize, into: &mut Vec<Test>) {
    while levels.len() > depth {
        let Some(level) = levels.pop() else { return };
        let name = if level.subtest.is_empty() {
            "KTAP"
        } else {
            &level.subtest
        };
        let before = level.seen;
        into.extend(level.tests);
        match level.plan {
            None => into.push(Test::fail(
                name,
                format!("no plan (1..N), {before} results"),
            )),
            Some(0) => into.push(Test::fail(name, "empty plan: not one test ran")),
            Some(n) if n != before => {
                into.push(Test::fail(
                    name,
                    format!("{n} tests planned, {before} results"),
                ));
            }
            Some(_) => {}
        }
    }
}

fn result(body: &str) -> (String, Outcome) {
    let (ok, rest) = match body.strip_prefix("not ok ") {
        Some(rest) => (false, rest),
        None => (true, body.strip_prefix("ok ").unwrap_or(body)),
    };
    let rest = rest.trim_start();
    let rest = rest
        .trim_start_matches(|c: char| c.is_ascii_digit())
        .trim_start();
    let rest = rest.strip_prefix("- ").unwrap_or(rest);
    let (name, directive) = match rest.split_once(" # ") {
        Some((name, directive)) => (name, directive),
        None => (rest, ""),
    };
    let name = name.trim().trim_start_matches("# ").to_string();
    let skip = directive
        .get(..4)
        .is_some_and(|d| d.eq_ignore_ascii_case("skip"));
    let outcome = match (ok, skip) {
        (true, true) => Outcome::Skip(directive[4..].trim().to_string()),
        (true, false) => Outcome::Pass,
        (false, _) => Outcome::Fail(directive.trim().to_string()),
    };
    (name, outcome)
}

/// Drops the `[    1.234567] ` of a kernel log.
fn strip_time(line: &str) -> &str {
    let Some(rest) = line.strip_prefix('[') else {
        return line;
    };
    let Some((stamp, text)) = rest.split_once("] ") else {
        return line;
    };
    let number = stamp.trim();
    if number.chars().all(|c| c.is_ascii_digit() || c == '.') && number.contains('.') {
        text
    } else {
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn failed(text: &str) -> Vec<String> {
        parse(text)
            .into_iter()
            .filter(|t| matches!(t.outcome, Outcome::Fail(_)))
            .map(|t| t.name)
            .collect()
    }

    #[test]
    fn reads_results() {
        let tests = parse("noise\n1..3\nok 1 a\nnot ok 2 - b\nok 3 c # SKIP no device\n");
        assert_eq!(
            tests,
            [
                Test::pass("a"),
                Test::fail("b", ""),
                Test {
                    name: "c".into(),
                    outcome: Outcome::Skip("no device".into())
                },
            ]
        );
    }

    #[test]
    fn a_failure_brings_its_notes() {
        let tests = parse("1..2\n# one\nok 1 a\n# wanted 3, got 4\nnot ok 2 b\n");
        assert_eq!(tests[1], Test::fail("b", "wanted 3, got 4"));
    }

    #[test]
    fn reads_kunit_in_a_kernel_log() {
        let log = "[    0.100000] KTAP version 1\n[    0.100000] 1..1\n\
                   [    0.1]     KTAP version 1\n[    0.1]     # Subtest: thinram_slot\n\
                   [    0.1]     1..2\n[    0.1]     ok 1 packs\n[    0.1]     ok 2 ages\n\
                   [    0.1] ok 1 thinram_slot\n";
        assert_eq!(
            parse(log),
            [
                Test::pass("thinram_slot: packs"),
                Test::pass("thinram_slot: ages")
            ]
        );
    }

    #[test]
    fn faults_are_failures() {
        assert_eq!(failed(""), ["KTAP"]);
        assert_eq!(failed("hello\n"), ["KTAP"]);
        assert_eq!(failed("KTAP version 1\n"), ["KTAP"]);
        assert_eq!(failed("1..0\n"), ["KTAP"]);
        assert_eq!(failed("ok 1 a\n"), ["KTAP"]);
        assert_eq!(failed("1..2\nok 1 a\n"), ["KTAP"]);
        assert_eq!(failed("1..1\nok 1 a\nok 2 b\n"), ["KTAP"]);
        assert_eq!(
            failed("1..1\nok 1 a\nBail out! lost the host\n"),
            ["bail out"]
        );
    }

    #[test]
    fn an_empty_suite_inside_a_good_plan_fails() {
        let log = "KTAP version 1\n1..1\n    KTAP version 1\n    # Subtest: s\n    1..0\nok 1 s\n";
        assert_eq!(failed(log), ["s: s"]);
    }

    #[test]
    fn a_suite_that_fails_outside_its_tests_fails() {
        let log = "1..1\n    1..1\n    ok 1 a\nnot ok 1 s\n";
        assert_eq!(failed(log), ["s"]);
    }

    #[test]
    fn two_documents_both_count() {
        let tests = parse("KTAP version 1\n1..1\nok 1 a\nKTAP version 1\n1..2\nok 1 b\nok 2 c\n");
        assert_eq!(tests.len(), 3);
        assert_eq!(
            failed("KTAP version 1\n1..1\nok 1 a\nKTAP version 1\n1..0\n"),
            ["KTAP"]
        );
    }

    fn outcome() -> impl Strategy<Value = Outcome> {
        prop_oneof![
            4 => Just(Outcome::Pass),
            1 => Just(Outcome::Fail(String::new())),
            1 => "[a-z]{1,9}".prop_map(Outcome::Skip),
        ]
    }

    fn line(nth: usize, test: &Test) -> String {
        let (ok, directive) = match &test.outcome {
            Outcome::Pass => ("ok", String::new()),
            Outcome::Fail(_) => ("not ok", String::new()),
            Outcome::Skip(why) => ("ok", format!(" # SKIP {why}")),
        };
        format!("{ok} {} {}{directive}", nth + 1, test.name)
    }

    proptest! {
        #[test]
        fn no_text_panics_or_passes_unplanned(text in "(\\PC|\n|    |ok 1 a\n|not ok |# |1\\.\\.[0-9]|KTAP version 1\n|\\[ 0\\.1\\] ){0,40}") {
            let tests = parse(&text);
            prop_assert!(!tests.is_empty());
            let has_plan = text.contains("1..");
            prop_assert!(has_plan || tests.iter().any(|t| matches!(t.outcome, Outcome::Fail(_))));
        }

        #[test]
        fn every_result_counts(
            outcomes in prop::collection::vec(outcome(), 1..20),
            stamped in any::<bool>(),
            lost in any::<usize>(),
        ) {
            let tests: Vec<Test> = outcomes
                .into_iter()
                .enumerate()
                .map(|(nth, outcome)| Test { name: format!("t{nth}"), outcome })
                .collect();
            let stamp = if stamped { "[    1.5] " } else { "" };
            let mut lines = vec![format!("{stamp}KTAP version 1"), format!("{stamp}1..{}", tests.len())];
            lines.extend(tests.iter().enumerate().map(|(nth, test)| format!("{stamp}{}", line(nth, test))));
            prop_assert_eq!(parse(&lines.join("\nnoise\n")), tests);
            // Without one of them, the plan or a result, the run is a failure.
            lines.remove(1 + lost % (lines.len() - 1));
            let left = parse(&lines.join("\n"));
            prop_assert!(left.iter().any(|t| t.name == "KTAP" && matches!(t.outcome, Outcome::Fail(_))));
        }
    }
}
