// SPDX-License-Identifier: GPL-2.0

//! Names and lines as they go to a terminal.

use std::fmt::Write as _;
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// Makes bytes from outside safe to show: what a terminal would act on, or a reader would not see,
/// becomes `\xNN` or `\u{N}`, and a backslash is doubled, so that no two names look alike.
pub fn escape(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\t' => out.push_str("\\t"),
                c if c.is_ascii() && !c.is_control() => out.push(c),
                c if c.is_alphanumeric() && c.width() != Some(0) => out.push(c),
                c if c.is_ascii() => {
                    let _ = write!(out, "\\x{:02x}", u32::from(c));
                }
                c => {
                    let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
                }
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
    out
}

/// Makes a sentence of ours safe to show, in which names are escaped already: what a terminal would
/// act on, or a reader would not see, becomes `\n` or `\u{N}`.
pub fn harmless(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match (c, c.width()) {
            ('\n', _) => out.push_str("\\n"),
            (c, None | Some(0)) => {
                let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
            }
            (c, Some(_)) => out.push(c),
        }
    }
    out
}

/// Columns that a text takes on a terminal.
pub fn width(text: &str) -> usize {
    text.width()
}

/// Shortens a text to at most `columns`, the cut shown by `…`.
pub fn shorten(text: &str, columns: usize) -> String {
    if width(text) <= columns {
        return text.to_owned();
    }
    let mut out = String::new();
    let mut used = 1;
    for c in text.chars() {
        used += c.width().unwrap_or(0);
        if used > columns {
            break;
        }
        out.push(c);
    }
    if columns > 0 {
        out.push('…');
    }
    out
}

/// Breaks words into lines of at most `columns`; lines after the first start with `indent` spaces.
/// A word that is wider than a line is shortened.
pub fn wrap(text: &str, indent: usize, columns: usize) -> Vec<String> {
    let indent = if indent + 8 > columns { 0 } else { indent };
    let mut lines = Vec::new();
    let mut line = String::new();
    let mut used = 0;
    for word in text.split(' ') {
        let mut at = used + usize::from(used > 0);
        if used > 0 && at + width(word) > columns {
            lines.push(std::mem::take(&mut line));
            line = " ".repeat(indent);
            at = indent;
        } else if used > 0 {
            line.push(' ');
        }
        let word = shorten(word, columns.saturating_sub(at).max(1));
        used = at + width(&word);
        line.push_str(&word);
    }
    lines.push(line);
    lines
        .iter()
        .map(|line| line.trim_end().to_owned())
        .collect()
}

/// The same as a text, each line with its end.
pub fn paragraph(text: &str, indent: usize, columns: usize) -> String {
    wrap(text, indent, columns).join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn odd_names_are_escaped() {
        assert_eq!(escape(b"web1"), "web1");
        assert_eq!(escape("büro-ÿ-虚".as_bytes()), "büro-ÿ-虚");
        assert_eq!(escape(b"a\x1b[31m\n"), "a\\x1b[31m\\n");
        assert_eq!(escape(b"a\\n"), "a\\\\n");
        assert_eq!(escape(b"\xff\xfe"), "\\xff\\xfe");
        assert_eq!(
            escape("a\u{202e}b\u{200b}".as_bytes()),
            "a\\u{202e}b\\u{200b}"
        );
    }

    #[test]
    fn sentences_are_escaped_once() {
        let said = format!("no VM named {}: `web…`", escape(b"a\x1b\\"));
        assert_eq!(said, "no VM named a\\x1b\\\\: `web…`");
        assert_eq!(harmless(&said), said);
        assert_eq!(harmless("a\x1b[31m\n\u{202e}"), "a\\u{1b}[31m\\n\\u{202e}");
    }

    #[test]
    fn shortened_to_the_column() {
        assert_eq!(shorten("database", 8), "database");
        assert_eq!(shorten("database", 7), "databa…");
        assert_eq!(shorten("虚拟机", 4), "虚…");
        assert_eq!(shorten("ab", 1), "…");
        assert_eq!(shorten("ab", 0), "");
    }

    #[test]
    fn wrapped_with_a_hanging_indent() {
        assert_eq!(
            wrap("pace  one two three four", 6, 14),
            ["pace  one two", "      three", "      four"]
        );
        assert_eq!(wrap("", 6, 14), [""]);
    }

    proptest! {
        #[test]
        fn never_wider(text in any::<String>(), columns in 1usize..60, indent in 0usize..12) {
            prop_assert!(width(&shorten(&text, columns)) <= columns);
            let safe = escape(text.as_bytes());
            for line in wrap(&safe, indent, columns) {
                prop_assert!(width(&line) <= columns, "{:?}", line);
            }
        }

        #[test]
        fn escaping_keeps_names_apart(a in any::<Vec<u8>>(), b in any::<Vec<u8>>()) {
            prop_assert_eq!(a == b, escape(&a) == escape(&b));
            prop_assert!(!escape(&a).chars().any(char::is_control));
        }
    }
}
