// SPDX-License-Identifier: GPL-2.0

//! `cargo xtask check`: formatting, lints, and the rules of the house.

use crate::env::{read, src, target, Kernel};
use crate::ktap::Test;
use crate::lint;
use crate::step::{run, say, tied};
use crate::{abi, env, promtool, setup};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// All checks, each one a test.
pub fn all(k: &Kernel) -> Result<Vec<Test>> {
    say("check");
    let files = sources(&src(""))?;
    let mut tests = vec![
        tool(
            "rustfmt: workspace",
            "fmt.log",
            "cargo",
            &["fmt", "--all", "--check"],
        )?,
        rustfmt_module(&files)?,
        tool(
            "clippy: workspace",
            "clippy.log",
            "cargo",
            &[
                "clippy",
                "--quiet",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ],
        )?,
    ];
    let text: Vec<(String, String)> = files
        .iter()
        .map(|p| {
            Ok((
                relative(p),
                std::fs::read_to_string(p).context(relative(p))?,
            ))
        })
        .collect::<Result<_>>()?;
    tests.push(rule(
        "unsafe: only in rust/sys and rust/glue, with a reason",
        &text,
        unsafe_code,
    ));
    tests.push(rule("floors: no arrow runs up", &text, |path, text| {
        path.strip_prefix("rust/")
            .map_or(Vec::new(), |p| lint::arrows(p, text))
    }));
    tests.push(rule("engine: no way upstairs", &text, |path, text| {
        path.strip_prefix("rust/")
            .map_or(Vec::new(), |p| lint::stairs(p, text))
    }));
    tests.push(rule("C: only rust/helpers.c and headers", &text, foreign_c));
    tests.push(rule("SPDX line on every source file", &text, spdx));
    tests.extend(abi::tests()?);
    tests.extend(promtool::tests()?);
    if src("rust/thinram.rs").exists() {
        tests.push(clippy_module(k)?);
    } else {
        tests.push(Test::fail("clippy: module", "rust/thinram.rs is missing"));
    }
    Ok(tests)
}

fn relative(path: &Path) -> String {
    path.strip_prefix(env::SRC)
        .unwrap_or(path)
        .to_string_lossy()
        .trim_start_matches('/')
        .into()
}

/// Rust, C and shell below the checkout, without what was built.
fn sources(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("{}", dir.display()))? {
        let path = entry?.path();
        let name = path
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        if path.is_dir() {
            if name != "target" && name != ".git" {
                found.extend(sources(&path)?);
            }
        } else if name.ends_with(".rs") || name.ends_with(".c") || name.ends_with(".h") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn tool(name: &str, log: &str, program: &str, args: &[&str]) -> Result<Test> {
    Ok(
        match run(target("check").join(log), tied(program).args(args)) {
            Ok(()) => Test::pass(name),
            Err(e) => Test::fail(name, format!("{e:#}")),
        },
    )
}

fn rustfmt_module(files: &[PathBuf]) -> Result<Test> {
    let module = src("rust");
    let files: Vec<String> = files
        .iter()
        .filter(|p| p.starts_with(&module) && p.extension().is_some_and(|e| e == "rs"))
        .map(|p| p.to_string_lossy().into_owned())
        .collect();
    let mut args = vec![
        "--check",
        "--edition",
        "2021",
        "--config-path",
        "/src/rustfmt.toml",
    ];
    args.extend(files.iter().map(String::as_str));
    tool("rustfmt: module", "fmt-module.log", "rustfmt", &args)
}

/// The kernel's clippy on the module: a warning fails it.
fn clippy_module(k: &Kernel) -> Result<Test> {
    let name = "clippy: module";
    let log = target("check/clippy-module.log");
    Ok(
        match setup::build_module(k, &target("module-clippy"), &log, &["CLIPPY=1"]) {
            Err(e) => Test::fail(name, format!("{e:#}")),
            Ok(_) => match warning(&read(&log)?) {
                None => Test::pass(name),
                Some(first) => Test::fail(name, first),
            },
        },
    )
}

/// The first compiler warning in a build log.
fn warning(log: &str) -> Option<String> {
    let at = log
        .lines()
        .position(|l| l.starts_with("warning:") || l.starts_with("error"))?;
    Some(
        log.lines()
            .skip(at)
            .take(4)
            .map(str::trim)
            .collect::<Vec<_>>()
            .join(" "),
    )
}

/// A rule on each file as one test that lists the places.
fn rule(
    name: &str,
    files: &[(String, String)],
    check: impl Fn(&str, &str) -> Vec<(usize, String)>,
) -> Test {
    if files.is_empty() {
        return Test::fail(name, "no source file found");
    }
    let found: Vec<String> = files
        .iter()
        .flat_map(|(path, text)| {
            check(path, text)
                .into_iter()
                .map(move |(line, what)| format!("{path}:{line}: {what}"))
        })
        .collect();
    if found.is_empty() {
        Test::pass(name)
    } else {
        Test::fail(name, found.join("\n"))
    }
}

/// The module's floors; user space answers to clippy alone.
fn unsafe_code(path: &str, text: &str) -> Vec<(usize, String)> {
    if !path.starts_with("rust/") || !path.ends_with(".rs") {
        return Vec::new();
    }
    let allowed = path.starts_with("rust/sys/") || path.starts_with("rust/glue/");
    lint::unsafe_code(text, allowed)
}

fn foreign_c(path: &str, _text: &str) -> Vec<(usize, String)> {
    let header = path.starts_with("rust/") && path.ends_with(".h");
    if path.ends_with(".rs") || path == "rust/helpers.c" || header {
        return Vec::new();
    }
    vec![(1, "C outside rust/helpers.c".to_string())]
}

fn spdx(_path: &str, text: &str) -> Vec<(usize, String)> {
    let first = text.lines().next().unwrap_or("");
    if first.contains("SPDX-License-Identifier: GPL-2.0") {
        return Vec::new();
    }
    vec![(1, "no SPDX line".to_string())]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ktap::Outcome;

    fn fails(test: &Test) -> bool {
        matches!(test.outcome, Outcome::Fail(_))
    }

    fn file(path: &str, text: &str) -> Vec<(String, String)> {
        vec![(path.to_string(), text.to_string())]
    }

    #[test]
    fn rules_fail_where_they_should() {
        let bad = file(
            "rust/engine/a.rs",
            "fn f() {\n    // SAFETY: x.\n    unsafe { g() }\n}\n",
        );
        assert!(fails(&rule("unsafe", &bad, unsafe_code)));
        assert!(fails(&rule("spdx", &bad, spdx)));
        assert!(fails(&rule("c", &file("rust/engine/a.c", ""), foreign_c)));
        assert!(fails(&rule("c", &file("userspace-ctl/a.h", ""), foreign_c)));
        assert!(fails(&rule("nothing to check", &[], spdx)));
    }

    #[test]
    fn rules_pass_where_they_should() {
        let text = "// SPDX-License-Identifier: GPL-2.0\nfn f() {\n    // SAFETY: x.\n    unsafe { g() }\n}\n";
        let good = file("rust/sys/a.rs", text);
        assert!(!fails(&rule("unsafe", &good, unsafe_code)));
        assert!(!fails(&rule("spdx", &good, spdx)));
        assert!(!fails(&rule("c", &file("rust/helpers.c", ""), foreign_c)));
    }

    #[test]
    fn a_failing_tool_fails() {
        let log = std::env::temp_dir().join("xtask-check-test.log");
        let log = log.to_string_lossy();
        assert!(fails(&tool("t", &log, "false", &[]).unwrap()));
        assert!(!fails(&tool("t", &log, "true", &[]).unwrap()));
    }

    #[test]
    fn compiler_warnings_are_found() {
        assert_eq!(warning("  CLIPPY a\n"), None);
        assert!(warning("  CLIPPY a\nwarning: unused\n --> a.rs\n").is_some());
        assert!(warning("error[E1]: x\n").is_some());
    }
}
