// SPDX-License-Identifier: GPL-2.0

//! Rules of the house that no compiler checks, on the text of Rust files: where
//! `unsafe` may stand and that it says why, and that no floor calls a higher one.

/// A Rust file with the parts that are not code blanked; lines stay where they are.
struct Source<'a> {
    lines: Vec<&'a str>,
    code: Vec<String>,
}

#[derive(PartialEq)]
enum In {
    Code,
    Line,
    Block(u32),
    Text,
    Raw(usize),
}

impl<'a> Source<'a> {
    fn new(text: &'a str) -> Self {
        let code = blank(text);
        Self {
            lines: text.lines().collect(),
            code: code.lines().map(str::to_string).collect(),
        }
    }
}

/// Replaces comments, strings and characters by spaces.
fn blank(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut state = In::Code;
    let mut i = 0;
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    while i < chars.len() {
        let c = chars[i];
        let mut skip = 1;
        match state {
            In::Code => match (c, at(i + 1)) {
                ('/', '/') => state = In::Line,
                ('/', '*') => {
                    state = In::Block(1);
                    skip = 2;
                }
                ('"', _) => state = In::Text,
                ('r', '"' | '#')
                    if !ident(if i > 0 { at(i - 1) } else { ' ' })
                        || at(i - 1) == 'b'
                        || at(i - 1) == 'c' =>
                {
                    let hashes = chars[i + 1..].iter().take_while(|c| **c == '#').count();
                    if at(i + 1 + hashes) == '"' {
                        state = In::Raw(hashes);
                        skip = hashes + 2;
                    }
                }
                ('\'', '\\') => {
                    let close = chars[i + 3..].iter().position(|c| *c == '\'').unwrap_or(0);
                    skip = close + 4;
                }
                ('\'', _) if at(i + 2) == '\'' => skip = 3,
                _ => {}
            },
            In::Line if c == '\n' => state = In::Code,
            In::Block(depth) => match (c, at(i + 1)) {
                ('*', '/') => {
                    state = if depth == 1 {
                        In::Code
                    } else {
                        In::Block(depth - 1)
                    };
                    skip = 2;
                    for _ in 0..skip {
                        out.push(' ');
                    }
                    i += skip;
                    continue;
                }
                ('/', '*') => {
                    state = In::Block(depth + 1);
                    skip = 2;
                }
                _ => {}
            },
            In::Text => match c {
                '\\' => skip = 2,
                '"' => {
                    state = In::Code;
                    out.push(' ');
                    i += 1;
                    continue;
                }
                _ => {}
            },
            In::Raw(hashes) if c == '"' => {
                if chars[i + 1..]
                    .iter()
                    .take(hashes)
                    .filter(|c| **c == '#')
                    .count()
                    == hashes
                {
                    state = In::Code;
                    for _ in 0..=hashes {
                        out.push(' ');
                    }
                    i += hashes + 1;
                    continue;
                }
            }
            _ => {}
        }
        for c in chars.iter().skip(i).take(skip) {
            let keep = *c == '\n' || (state == In::Code && skip == 1);
            out.push(if keep { *c } else { ' ' });
        }
        i += skip;
    }
    out
}

fn ident(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The places where `word` stands alone in `line`.
fn words<'a>(line: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    line.match_indices(word).map(|(i, _)| i).filter(move |i| {
        let before = line[..*i].chars().next_back();
        let after = line[i + word.len()..].chars().next();
        !before.is_some_and(ident) && !after.is_some_and(ident)
    })
}

/// Defects in the use of `unsafe`: (line, what). `allowed`: it may stand in this file.
pub fn unsafe_code(text: &str, allowed: bool) -> Vec<(usize, String)> {
    let source = Source::new(text);
    let mut found = Vec::new();
    for (n, line) in source.code.iter().enumerate() {
        for at in words(line, "unsafe") {
            if line[..at].trim_end().ends_with('[') || line[at..].starts_with("unsafe(") {
                continue;
            }
            if !allowed {
                found.push((
                    n + 1,
                    "unsafe stands outside rust/sys and rust/glue".to_string(),
                ));
                continue;
            }
            let private = !line.contains("pub") && declares(&line[at..]);
            if private || names_a_type(&line[at..]) || says_why(&source, n) {
                continue;
            }
            found.push((n + 1, "unsafe without a SAFETY comment".to_string()));
        }
    }
    found
}

/// `unsafe extern "C" fn(...)` and `unsafe fn(...)` without a name are types.
fn names_a_type(code: &str) -> bool {
    words(code, "fn").next().is_some_and(|at| {
        let between = code["unsafe".len()..at].trim();
        let head = between.is_empty() || between.starts_with("extern");
        head && code[at + 2..].trim_start().starts_with('(')
    })
}

/// `unsafe fn name` and `unsafe extern "C" fn name`: what it does unsafely stands in blocks of
/// its own (the kernel denies unsafe_op_in_unsafe_fn), so only a public one has to say more.
fn declares(code: &str) -> bool {
    let rest = code["unsafe".len()..].trim_start();
    rest.starts_with("fn ") || (rest.starts_with("extern") && rest.contains(" fn "))
}

/// Whether the comment above the statement of line `n` argues its safety.
fn says_why(source: &Source<'_>, n: usize) -> bool {
    let why = |l: &str| l.contains("SAFETY:") || l.contains("# Safety");
    if why(source.lines[n]) {
        return true;
    }
    for i in (0..n).rev() {
        let (line, code) = (source.lines[i].trim(), source.code[i].trim());
        if code.is_empty() {
            if line.is_empty() {
                return false;
            }
            if why(line) {
                return true;
            }
            continue;
        }
        if code.starts_with("#[") {
            continue;
        }
        if code.ends_with([';', '{', '}', ',']) {
            return false;
        }
    }
    false
}

/// The floors of the module, lowest first, and what each may use.
const FLOORS: &[(&str, &[&str])] = &[
    ("logic", &["logic"]),
    ("sys", &["sys", "logic"]),
    ("engine", &["engine", "logic", "sys"]),
    ("glue", &["glue", "engine", "logic", "sys"]),
];

/// Paths that lead to a floor which this file's floor may not use: (line, what).
///
/// `path` is relative to `rust/`, such as `engine/scan.rs`.
pub fn arrows(path: &str, text: &str) -> Vec<(usize, String)> {
    let floor = path.split('/').next().unwrap_or("");
    let Some((_, allowed)) = FLOORS.iter().find(|(name, _)| *name == floor) else {
        return Vec::new();
    };
    let depth = path.matches('/').count() + usize::from(!path.ends_with("/mod.rs"));
    let source = Source::new(text);
    let mut found = Vec::new();
    let mut inline: Vec<usize> = Vec::new();
    let mut braces = 0;
    for (n, line) in source.code.iter().enumerate() {
        let opens_module = words(line, "mod").next().is_some() && line.contains('{');
        let level = depth + inline.len() + usize::from(opens_module);
        // A `use` may go on for lines.
        let more = source.code[n + 1..].iter().take(40);
        let whole = if words(line, "use").next().is_some() && !line.contains(';') {
            more.fold(line.clone(), |all, l| {
                if all.contains(';') {
                    all
                } else {
                    all + " " + l
                }
            })
        } else {
            line.clone()
        };
        for to in targets(&whole, level) {
            let known = FLOORS.iter().any(|(name, _)| *name == to);
            if floor == "logic" && to == "kernel" {
                found.push((n + 1, "logic uses the kernel crate".to_string()));
            } else if known && !allowed.contains(&to.as_str()) {
                found.push((n + 1, format!("{floor} uses {to}, which lies above it")));
            }
        }
        if opens_module {
            inline.push(braces);
        }
        for c in line.chars() {
            match c {
                '{' => braces += 1,
                '}' => {
                    braces -= 1;
                    if inline.last() == Some(&braces) {
                        inline.pop();
                    }
                }
                _ => {}
            }
        }
    }
    found
}

/// The files of the engine by storey: objects, what is done to pages, and who does it. A file uses
/// its own storey and those below, but those who do it are independent of each other.
const STOREYS: &[&[&str]] = &[
    &[
        "vm", "region", "shared", "pools", "pressure", "sample", "stall", "volume",
    ],
    &[
        "backing", "merge", "split", "compress", "cold", "caps", "swap", "huge", "survey",
    ],
    &[
        "fault", "data", "scan", "reclaim", "regroup", "swapper", "shrink",
    ],
];

/// The object that ties all of the engine together: it uses every storey, and every storey uses it
/// but for these, which can be understood without it.
const TOP: &str = "host";
const WITHOUT_TOP: &[&str] = &["region", "shared", "pools"];

/// Paths inside the engine that lead upstairs: (line, what).
pub fn stairs(path: &str, text: &str) -> Vec<(usize, String)> {
    let Some(name) = path
        .strip_prefix("engine/")
        .and_then(|file| file.strip_suffix(".rs"))
    else {
        return Vec::new();
    };
    let storey = |name: &str| STOREYS.iter().position(|files| files.contains(&name));
    let Some(own) = storey(name) else {
        return Vec::new();
    };
    let source = Source::new(text);
    let code = source.code.join("\n");
    let mut found = Vec::new();
    for head in ["super", "crate::engine"] {
        for at in words(&code, head) {
            for to in heads(code[at + head.len()..].trim_start()) {
                let wrong = match storey(&to) {
                    _ if to == name => false,
                    _ if to == TOP => WITHOUT_TOP.contains(&name),
                    Some(other) => other > own || (other == own && own + 1 == STOREYS.len()),
                    None => false,
                };
                if wrong {
                    let line = code[..at].matches('\n').count() + 1;
                    found.push((line, format!("engine: {name} uses {to}")));
                }
            }
        }
    }
    found
}

/// The top-level names that the paths in a line lead to, seen `level` modules below the crate.
fn targets(line: &str, level: usize) -> Vec<String> {
    let mut found = Vec::new();
    for at in words(line, "crate") {
        let rest = line[at + 5..].trim_start();
        found.extend(heads(rest));
    }
    for at in words(line, "super") {
        if line[..at].trim_end().ends_with("::") {
            continue;
        }
        let mut rest = &line[at..];
        let mut up = 0;
        while let Some(r) = rest.trim_start().strip_prefix("super") {
            up += 1;
            match r.trim_start().strip_prefix("::") {
                Some(r) => rest = r,
                None => {
                    rest = r;
                    break;
                }
            }
        }
        if up >= level {
            found.extend(heads(&format!("::{}", rest.trim_start_matches("::"))));
        }
    }
    for at in words(line, "kernel") {
        let start = line[..at].trim_end();
        if !start.ends_with("::") && line[at + 6..].starts_with("::") {
            found.push("kernel".to_string());
        }
    }
    found
}

/// The first names after `::`, also of a group `::{a, b::c}`.
fn heads(rest: &str) -> Vec<String> {
    let Some(rest) = rest.strip_prefix("::") else {
        return Vec::new();
    };
    let rest = rest.trim_start();
    let name = |s: &str| {
        s.trim_start()
            .chars()
            .take_while(|c| ident(*c))
            .collect::<String>()
    };
    match rest.strip_prefix('{') {
        None => vec![name(rest)],
        Some(group) => {
            let mut depth = 0;
            let mut parts = vec![String::new()];
            for c in group.chars() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => {
                        parts.push(String::new());
                        continue;
                    }
                    _ => {}
                }
                if let Some(last) = parts.last_mut() {
                    last.push(c);
                }
            }
            parts.iter().map(|p| name(p)).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_strings_are_no_code() {
        let text =
            "// unsafe\n/* unsafe /* x */ unsafe */ a \"unsafe \\\" unsafe\" 'u' r#\"unsafe\"# b\n";
        let code = blank(text);
        assert!(!code.contains("unsafe"), "{code}");
        assert!(code.contains('a') && code.contains('b'));
        assert_eq!(code.lines().count(), text.lines().count());
    }

    #[test]
    fn lifetimes_do_not_start_characters() {
        assert!(blank("fn f<'a>(x: &'a u8) { unsafe {} }").contains("unsafe"));
        assert!(blank("let c = '\\''; unsafe {}").contains("unsafe"));
    }

    #[test]
    fn unsafe_in_the_wrong_place_is_found() {
        let text = "fn f() {\n    // SAFETY: fine.\n    unsafe { g() }\n}\n";
        assert_eq!(unsafe_code(text, false).len(), 1);
        assert!(unsafe_code(text, true).is_empty());
    }

    #[test]
    fn unsafe_without_a_reason_is_found() {
        assert_eq!(
            unsafe_code("fn f() {\n    unsafe { g() }\n}\n", true).len(),
            1
        );
        assert_eq!(
            unsafe_code("// SAFETY: a.\nlet a = b;\nunsafe { g() }\n", true).len(),
            1
        );
        assert_eq!(
            unsafe_code("// SAFETY: a.\n\nunsafe impl Send for A {}\n", true).len(),
            1
        );
        assert_eq!(unsafe_code("pub(crate) unsafe fn f() {}\n", true).len(), 1);
        let public = "pub unsafe extern \"C\" fn f() {}\n";
        assert_eq!(unsafe_code(public, true).len(), 1);
    }

    #[test]
    fn reasons_and_types_are_accepted() {
        let good = [
            "// SAFETY: a.\n#[inline]\nunsafe impl Send for A {}\n",
            "/// Does.\n///\n/// # Safety\n///\n/// Only once.\npub unsafe fn f() {}\n",
            "// SAFETY: a.\nlet x =\n    unsafe { g() };\n",
            "struct A { f: Option<unsafe extern \"C\" fn(u8)> }\n",
            "let x = unsafe { g() }; // SAFETY: a.\n",
            "#[no_mangle]\nunsafe extern \"C\" fn f() {}\n",
            "#[unsafe(no_mangle)]\nfn f() {}\n",
        ];
        for text in good {
            assert_eq!(unsafe_code(text, true), [], "{text}");
        }
    }

    #[test]
    fn arrows_up_are_found() {
        for (path, text) in [
            ("logic/slot.rs", "use crate::sys::page;"),
            ("logic/slot.rs", "use kernel::prelude::*;"),
            ("logic/slot.rs", "use super::super::engine::scan;"),
            ("logic/mod.rs", "use super::engine;"),
            ("sys/page.rs", "fn f(x: crate::engine::Vm) {}"),
            ("sys/page.rs", "use super::super::glue::fs;"),
            ("engine/scan.rs", "use crate::{logic::slot, glue::fs};"),
            (
                "engine/scan.rs",
                "use crate::{\n    logic::slot,\n    glue::fs,\n};",
            ),
            (
                "engine/scan.rs",
                "mod tests {\n    use super::super::super::glue;\n}",
            ),
        ] {
            assert_eq!(arrows(path, text).len(), 1, "{path}: {text}");
        }
    }

    #[test]
    fn arrows_down_and_sideways_are_accepted() {
        for (path, text) in [
            ("logic/slot.rs", "use super::hash; use crate::logic::index;"),
            (
                "engine/scan.rs",
                "use crate::{logic::slot, sys::{page, zap}};\nuse super::region;",
            ),
            (
                "engine/scan.rs",
                "mod tests {\n    use super::super::region;\n}\nuse kernel::sync;",
            ),
            ("glue/fs.rs", "use crate::engine::vm; use crate::sys::page;"),
            ("thinram.rs", "use crate::glue::fs;"),
            ("engine/scan.rs", "// crate::glue\nlet s = \"crate::glue\";"),
        ] {
            assert_eq!(arrows(path, text), [], "{path}: {text}");
        }
    }

    #[test]
    fn ways_upstairs_inside_the_engine_are_found() {
        for (path, text) in [
            ("engine/region.rs", "use super::host::Host;"),
            ("engine/shared.rs", "use super::{region::Region, merge};"),
            (
                "engine/merge.rs",
                "use super::{\n    host::Host,\n    scan::{self, Walk},\n};",
            ),
            (
                "engine/vm.rs",
                "fn f(b: &crate::engine::backing::Backing) {}",
            ),
            ("engine/fault.rs", "use super::scan;"),
            ("engine/scan.rs", "fn f() { super::reclaim::go() }"),
        ] {
            assert_eq!(stairs(path, text).len(), 1, "{path}: {text}");
        }
    }

    #[test]
    fn ways_downstairs_inside_the_engine_are_accepted() {
        for (path, text) in [
            ("engine/host.rs", "use super::{merge, scan, region};"),
            (
                "engine/merge.rs",
                "use super::{host::Host, region, shared, huge};",
            ),
            ("engine/scan.rs", "use super::{merge::{self, scan}, vm};"),
            ("engine/region.rs", "use super::vm::Vm; // super::host"),
            ("engine/new.rs", "use super::scan;"),
            ("glue/region.rs", "use super::host;"),
        ] {
            assert_eq!(stairs(path, text), [], "{path}: {text}");
        }
    }
}
