// SPDX-License-Identifier: GPL-2.0

//! Tables that fit the terminal.

use crate::text;

/// Columns between two columns of a table.
const GAP: usize = 2;
/// To how few columns any text is cut when nothing more can be left out.
const TEXT_LEAST: usize = 4;

/// What a column holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cells {
    /// Texts, aligned left. Where room is short they are cut, with `…`, to this many columns before
    /// other columns are left out.
    Text(usize),
    /// Numbers, aligned right and never cut.
    Number,
}

/// One column.
#[derive(Debug, Clone)]
pub struct Column {
    /// Heading.
    pub title: &'static str,
    /// What it holds.
    pub cells: Cells,
    /// Columns with the highest rank are left out first; those of rank 0 never are.
    pub rank: u8,
}

impl Column {
    /// A column of names or sentences.
    pub const fn text(title: &'static str, least: usize, rank: u8) -> Self {
        Self {
            title,
            cells: Cells::Text(least),
            rank,
        }
    }

    /// A column of numbers.
    pub const fn number(title: &'static str, rank: u8) -> Self {
        Self {
            title,
            cells: Cells::Number,
            rank,
        }
    }

    fn least(&self, natural: usize) -> usize {
        match self.cells {
            Cells::Text(least) => natural.min(least),
            Cells::Number => natural,
        }
    }
}

/// Renders a heading and rows, each line at most `width` columns and ended by a newline. Columns
/// that found no room are named in a last line.
pub fn render(columns: &[Column], rows: &[Vec<String>], width: usize) -> String {
    let natural: Vec<usize> = columns
        .iter()
        .enumerate()
        .map(|(at, column)| {
            let cells = rows
                .iter()
                .filter_map(|row| row.get(at))
                .map(|cell| text::width(cell));
            cells.chain([text::width(column.title)]).max().unwrap_or(0)
        })
        .collect();
    let mut shown: Vec<usize> = (0..columns.len()).collect();
    let mut left_out = Vec::new();
    while least(columns, &natural, &shown) > width {
        let last = shown.iter().copied().filter(|at| columns[*at].rank > 0);
        let Some(worst) = last.max_by_key(|at| columns[*at].rank) else {
            break;
        };
        shown.retain(|at| *at != worst);
        left_out.push(worst);
    }
    let widths = fit(columns, &natural, &shown, width);

    let mut out = String::new();
    let titles: Vec<String> = columns
        .iter()
        .map(|column| column.title.to_owned())
        .collect();
    for row in std::iter::once(&titles).chain(rows) {
        let mut line = String::new();
        for (nth, at) in shown.iter().copied().enumerate() {
            let cell = text::shorten(row.get(at).map_or("", String::as_str), widths[nth]);
            let pad = " ".repeat(widths[nth].saturating_sub(text::width(&cell)));
            if nth > 0 {
                line.push_str(&" ".repeat(GAP));
            }
            match columns[at].cells {
                Cells::Text(_) => line.extend([cell, pad]),
                Cells::Number => line.extend([pad, cell]),
            }
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    if !left_out.is_empty() {
        left_out.sort_unstable();
        let names: Vec<&str> = left_out.iter().map(|at| columns[*at].title).collect();
        let note = format!("(no room for: {})", names.join(", "));
        for line in text::wrap(&note, 1, width) {
            out.push_str(&line);
            out.push('\n');
        }
    }
    out
}

/// Width of the table when every text is cut as far as its column allows.
fn least(columns: &[Column], natural: &[usize], shown: &[usize]) -> usize {
    let cells: usize = shown
        .iter()
        .map(|at| columns[*at].least(natural[*at]))
        .sum();
    cells + GAP * shown.len().saturating_sub(1)
}

/// Widths of the shown columns: the widest text gives way first, and all go below what their
/// columns ask for only when that is not enough.
fn fit(columns: &[Column], natural: &[usize], shown: &[usize], width: usize) -> Vec<usize> {
    let mut widths: Vec<usize> = shown.iter().map(|at| natural[*at]).collect();
    let gaps = GAP * shown.len().saturating_sub(1);
    for polite in [true, false] {
        while widths.iter().sum::<usize>() + gaps > width {
            let texts = (0..shown.len()).filter(|nth| {
                let column = &columns[shown[*nth]];
                let floor = if polite {
                    column.least(usize::MAX)
                } else {
                    TEXT_LEAST
                };
                column.cells != Cells::Number && widths[*nth] > floor
            });
            let Some(widest) = texts.max_by_key(|nth| widths[*nth]) else {
                break;
            };
            widths[widest] -= 1;
        }
    }
    widths
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn columns() -> Vec<Column> {
        vec![
            Column::text("VM", 12, 0),
            Column::number("size", 0),
            Column::number("zero", 2),
            Column::number("huge", 1),
        ]
    }

    fn row(cells: [&str; 4]) -> Vec<String> {
        cells.iter().map(|cell| (*cell).to_owned()).collect()
    }

    #[test]
    fn wide_enough() {
        let table = render(&columns(), &[row(["web1", "2.0G", "100M", "0K"])], 80);
        assert_eq!(table, "VM    size  zero  huge\nweb1  2.0G  100M    0K\n");
    }

    #[test]
    fn names_give_way_then_columns() {
        let rows = [row(["a-very-long-name-of-a-vm", "2.0G", "100M", "0K"])];
        let table = render(&columns(), &rows, 30);
        assert_eq!(
            table,
            "VM            size  zero  huge\na-very-long…  2.0G  100M    0K\n"
        );
        let table = render(&columns(), &rows, 24);
        assert_eq!(
            table,
            "VM            size  huge\na-very-long…  2.0G    0K\n(no room for: zero)\n"
        );
    }

    proptest! {
        #[test]
        fn never_wider(name in "[a-z虚]{0,40}", width in 20usize..100) {
            let table = render(&columns(), &[row([&name, "1023M", "99.9G", "1023K"])], width);
            for line in table.lines() {
                prop_assert!(text::width(line) <= width, "{:?}", line);
            }
        }
    }
}
