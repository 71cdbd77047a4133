// SPDX-License-Identifier: GPL-2.0

//! Standard output and the terminal behind it.

use serde::Serialize;
use std::io::{self, ErrorKind, IsTerminal, Write};

const DEFAULT_WIDTH: usize = 80;
const LEAST_WIDTH: usize = 20;

/// Standard output failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the output: {0}")]
struct OutputError(io::Error);

/// Whether an error only says that the reader of standard output left.
pub fn is_closed(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<OutputError>()
        .is_some_and(|e| e.0.kind() == ErrorKind::BrokenPipe)
}

/// Writes a text to standard output.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(OutputError)?;
    Ok(())
}

/// Writes a value as JSON: over several lines, or in one where many follow each other.
pub fn print_json(value: &impl Serialize, one_line: bool) -> anyhow::Result<()> {
    let text = if one_line {
        serde_json::to_string(value)
    } else {
        serde_json::to_string_pretty(value)
    };
    print(&(text? + "\n"))
}

/// Writes a line to standard error.
pub fn complain(message: &str) -> io::Result<()> {
    writeln!(io::stderr().lock(), "{message}")
}

/// Whether standard output is a terminal.
pub fn is_terminal() -> bool {
    io::stdout().is_terminal()
}

/// Columns that tables may take: the terminal's, else `COLUMNS`, else 80; what is no terminal gets
/// at most 80.
pub fn width() -> usize {
    let columns = std::env::var("COLUMNS")
        .ok()
        .and_then(|text| text.parse().ok());
    let width = if is_terminal() {
        let size = rustix::termios::tcgetwinsize(io::stdout()).ok();
        let size = size
            .map(|size| usize::from(size.ws_col))
            .filter(|columns| *columns > 0);
        size.or(columns).unwrap_or(DEFAULT_WIDTH)
    } else {
        columns.unwrap_or(DEFAULT_WIDTH).min(DEFAULT_WIDTH)
    };
    width.max(LEAST_WIDTH)
}
