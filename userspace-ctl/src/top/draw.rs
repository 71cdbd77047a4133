// SPDX-License-Identifier: GPL-2.0

//! How the screen is drawn.

use super::{History, Row, Sort, Top};
use crate::rates::short_rate;
use crate::text;
use crate::units::{long_kb, short_kb};
use ratatui::backend::TestBackend;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Clear, Paragraph, Row as TableRow, Table, TableState};
use ratatui::{Frame, Terminal};
use serde_json::Value;

const ABSENT: &str = "-";
/// Columns of a name.
const NAME: u16 = 12;
/// Lines about the selected VM.
const DETAIL: u16 = 4;
/// Heights of a sparkline's columns.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// The screen as text, for what is no terminal.
pub fn text_of(top: &Top, width: u16, height: u16) -> String {
    let Ok(mut terminal) = Terminal::new(TestBackend::new(width, height)) else {
        return String::new();
    };
    if terminal.draw(|frame| draw(frame, top)).is_err() {
        return String::new();
    }
    let buffer = terminal.backend().buffer();
    let mut out = String::new();
    for y in 0..height {
        let line: String = (0..width)
            .filter_map(|x| buffer.cell((x, y)))
            .map(ratatui::buffer::Cell::symbol)
            .collect();
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// Draws everything.
pub fn draw(frame: &mut Frame, top: &Top) {
    let [host, table, detail, keys] = Layout::vertical([
        Constraint::Length(3),
        Constraint::Min(3),
        Constraint::Length(DETAIL),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    let rows = top.rows();
    frame.render_widget(Paragraph::new(host_lines(top, host.width)), host);
    draw_table(frame, top, &rows, table);
    let selected = rows.get(top.selected);
    let lines = selected.map_or_else(Vec::new, |row| detail_lines(row, detail.width));
    frame.render_widget(Paragraph::new(lines), detail);
    let said = "q quit  ↑↓ choose  ←→ sort  R reverse  space pause  ? keys";
    let style = Style::new().add_modifier(Modifier::DIM);
    frame.render_widget(Paragraph::new(Span::styled(said, style)), keys);
    if top.help {
        draw_help(frame);
    }
}

fn host_lines(top: &Top, width: u16) -> Vec<Line<'static>> {
    let width = usize::from(width);
    let state = top
        .overview
        .as_ref()
        .and_then(|overview| overview.status.host.state.clone());
    let mut head = format!(
        "thinram  state {}",
        state.map_or_else(|| ABSENT.to_owned(), |state| text::escape(state.as_bytes()))
    );
    if let Some(host) = top.host {
        let percent = (host.available_kb * 100)
            .checked_div(host.total_kb)
            .unwrap_or(0);
        head.push_str(&format!(
            "  available {} of {} ({percent}%)",
            short_kb(host.available_kb),
            short_kb(host.total_kb)
        ));
    }
    if let Some(overview) = &top.overview {
        let vms = overview.status.vms.len();
        head.push_str(&format!("  {vms} VMs"));
        if overview.daemon.is_none() {
            head.push_str("  no daemon");
        }
    }
    if top.paused {
        head.push_str("  PAUSED");
    }
    let head = match &top.error {
        Some(error) => Span::styled(
            text::shorten(&text::harmless(error), width),
            Style::new().fg(Color::Red),
        ),
        None => Span::styled(
            text::shorten(&head, width),
            Style::new().add_modifier(Modifier::BOLD),
        ),
    };
    let graph = |label: &str, history: &History| {
        let now = history.back().map_or_else(String::new, |kb| short_kb(*kb));
        let label = format!("{label:<10}{now:>7} ");
        let bars = spark(history, width.saturating_sub(label.len()));
        Line::from(label + &bars)
    };
    vec![
        Line::from(head),
        graph("available", &top.available),
        graph("saved", &top.saved),
    ]
}

/// The last values as bars, the highest one full.
fn spark(history: &History, width: usize) -> String {
    let most = history.iter().copied().max().unwrap_or(0).max(1);
    let skip = history.len().saturating_sub(width);
    history
        .iter()
        .skip(skip)
        .map(|value| {
            let last = BARS.len() as u64 - 1;
            let at = u128::from(*value) * u128::from(last) / u128::from(most);
            BARS[usize::try_from(at).unwrap_or(0).min(BARS.len() - 1)]
        })
        .collect()
}

fn shown(row: &Row, sort: Sort) -> String {
    let Some(value) = row.cell(sort) else {
        return ABSENT.to_owned();
    };
    match sort {
        Sort::Name => row.name.clone(),
        Sort::Faults | Sort::Breaks => short_rate(value),
        Sort::Pressure => format!("{value:.0}%"),
        _ => short_kb(value.max(0.0) as u64),
    }
}

/// The columns that fit beside a graph; what few need gives way to it.
fn columns(top: &Top, rows: &[Row], width: u16) -> Vec<Sort> {
    let away = |row: &Row| row.cell(Sort::Away).is_some_and(|kb| kb > 0.0);
    let wide = width >= 96;
    Sort::ALL
        .into_iter()
        .filter(|sort| match sort {
            _ if wide || *sort == top.sort => true,
            Sort::Shared => false,
            Sort::Away => rows.iter().any(away),
            _ => true,
        })
        .collect()
}

fn draw_table(frame: &mut Frame, top: &Top, rows: &[Row], area: Rect) {
    let columns = columns(top, rows, area.width);
    let head = columns.iter().map(|sort| {
        let title = if *sort == Sort::Name {
            format!("{:<1$}", sort.title(), usize::from(NAME))
        } else {
            format!("{:>1$}", sort.title(), usize::from(width_of(*sort)))
        };
        let mut style = Style::new().add_modifier(Modifier::BOLD);
        if *sort == top.sort {
            style = style.add_modifier(Modifier::REVERSED);
        }
        Cell::from(Span::styled(title, style))
    });
    let head = TableRow::new(head.chain([Cell::from("HISTORY")]));
    let fixed: u16 = columns.iter().map(|sort| width_of(*sort) + 1).sum();
    let graph = usize::from(area.width.saturating_sub(fixed));
    let body = rows.iter().map(|row| {
        let uncooperative = row
            .guest
            .as_ref()
            .is_some_and(|guest| guest["conduct"] == "uncooperative");
        let mut style = Style::new();
        if uncooperative {
            style = style.fg(Color::Yellow);
        }
        let cells = columns.iter().map(|sort| match sort {
            Sort::Name => Cell::from(text::shorten(&row.name, usize::from(NAME))),
            sort => Cell::from(format!(
                "{:>1$}",
                shown(row, *sort),
                usize::from(width_of(*sort))
            )),
        });
        let history = top
            .resident
            .iter()
            .find(|(name, _)| name.shown() == row.name)
            .map(|(_, history)| spark(history, graph))
            .unwrap_or_default();
        TableRow::new(cells.chain([Cell::from(history)])).style(style)
    });
    let widths = columns
        .iter()
        .map(|sort| Constraint::Length(width_of(*sort)))
        .chain([Constraint::Fill(1)]);
    let table = Table::new(body, widths)
        .header(head)
        .column_spacing(1)
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    let mut state = TableState::default().with_selected(Some(top.selected));
    frame.render_stateful_widget(table, area, &mut state);
}

fn width_of(sort: Sort) -> u16 {
    match sort {
        Sort::Name => NAME,
        Sort::Pressure => 5,
        Sort::Faults | Sort::Breaks => 5,
        _ => 6,
    }
}

fn detail_lines(row: &Row, width: u16) -> Vec<Line<'static>> {
    let Some(guest) = &row.guest else {
        let said = format!("{}: the daemon does not size it", row.name);
        return vec![Line::from(text::shorten(&said, usize::from(width)))];
    };
    let kb = |value: &Value| value.as_u64().map_or_else(|| ABSENT.to_owned(), long_kb);
    let word = |value: &Value| {
        value
            .as_str()
            .map_or_else(|| ABSENT.to_owned(), |text| text::escape(text.as_bytes()))
    };
    let tally = &guest["tally"];
    let lines = [
        format!(
            "{}: {}, {}, driver {}, {} to {}, entitlement {}",
            row.name,
            word(&guest["policy"]),
            word(&guest["conduct"]),
            word(&guest["driver"]),
            kb(&guest["min_kb"]),
            kb(&guest["max_kb"]),
            kb(&guest["entitlement_kb"]),
        ),
        format!(
            "guest: total {}, free {}, available {}, comfortable {}",
            kb(&guest["guest_total_kb"]),
            kb(&guest["guest_free_kb"]),
            kb(&guest["guest_available_kb"]),
            kb(&guest["comfortable_kb"]),
        ),
        format!(
            "moved: {} added, {} removed, {} grants waited {:.0} s",
            kb(&tally["added_kb"]),
            kb(&tally["removed_kb"]),
            tally["waits"].as_u64().unwrap_or(0),
            tally["waited_s"].as_f64().unwrap_or(0.0),
        ),
        match guest["error"].as_str() {
            Some(error) => format!("wrong: {}", text::harmless(error)),
            None => format!("why: {}", word(&guest["reason"])),
        },
    ];
    lines
        .iter()
        .map(|line| Line::from(text::shorten(line, usize::from(width))))
        .collect()
}

fn draw_help(frame: &mut Frame) {
    let mut lines: Vec<Line> = Sort::ALL
        .iter()
        .map(|sort| Line::from(format!("{}  sort by {}", sort.key(), sort.title())))
        .collect();
    for line in [
        "←→ < >  sort by the next column",
        "R  reverse",
        "↑↓ j k  choose a VM",
        "space  pause",
        "q  quit",
    ] {
        lines.push(Line::from(line));
    }
    let area = frame.area();
    let width = 40.min(area.width);
    let height = u16::try_from(lines.len() + 2)
        .unwrap_or(u16::MAX)
        .min(area.height);
    let place = Rect {
        x: (area.width - width) / 2,
        y: (area.height - height) / 2,
        width,
        height,
    };
    frame.render_widget(Clear, place);
    let block = Block::bordered().title(" keys ");
    frame.render_widget(Paragraph::new(lines).block(block), place);
}
