// SPDX-License-Identifier: GPL-2.0

//! `thinramctl top`: looks, keys and the terminal.

use crate::commands::daemon_report;
use crate::output;
use ratatui::crossterm::event::{self, Event, KeyEventKind};
use std::io::{self, IsTerminal};
use std::thread;
use std::time::{Duration, Instant};
use thinramctl::cli::Cli;
use thinramctl::daemon::meminfo;
use thinramctl::overview::{Overview, Watch};
use thinramctl::snapshot::HostSample;
use thinramctl::status::Status;
use thinramctl::sysfs::Dir;
use thinramctl::top::{draw, text_of, Top};

/// Rows of a screen that is printed.
const ROWS: u16 = 24;

struct Looks<'a> {
    cli: &'a Cli,
    start: Instant,
    watch: Watch,
}

impl Looks<'_> {
    fn take(&mut self) -> anyhow::Result<(Overview, Option<HostSample>)> {
        let status = Status::read(&Dir::open(&self.cli.root)?)?;
        let rates = self
            .watch
            .note(self.start.elapsed().as_secs_f64(), &status.vms);
        let overview = Overview {
            rates,
            daemon: daemon_report(self.cli),
            estimate: None,
            status,
        };
        Ok((overview, meminfo::read(&self.cli.root).ok()))
    }
}

/// Shows looks until a key or their number ends it.
pub fn top(cli: &Cli, interval: Duration, count: Option<u64>) -> anyhow::Result<()> {
    let mut looks = Looks {
        cli,
        start: Instant::now(),
        watch: Watch::default(),
    };
    let mut top = Top::default();
    // A module that is not there is a failure, one that goes away later is shown.
    top.note(Ok(looks.take()?));
    if !output::is_terminal() || !io::stdin().is_terminal() {
        let width = u16::try_from(output::width()).unwrap_or(80);
        let mut shown = 0;
        loop {
            output::print(&text_of(&top, width, ROWS))?;
            shown += 1;
            if count.is_some_and(|count| shown >= count) {
                return Ok(());
            }
            thread::sleep(interval);
            top.note(looks.take().map_err(|error| format!("{error:#}")));
        }
    }
    let mut terminal = ratatui::try_init()?;
    let ended = on_screen(&mut terminal, &mut top, &mut looks, interval, count);
    ratatui::try_restore()?;
    ended
}

fn on_screen(
    terminal: &mut ratatui::DefaultTerminal,
    top: &mut Top,
    looks: &mut Looks,
    interval: Duration,
    count: Option<u64>,
) -> anyhow::Result<()> {
    let mut next = Instant::now() + interval;
    let mut shown = 1;
    loop {
        terminal.draw(|frame| draw(frame, top))?;
        let left = next.saturating_duration_since(Instant::now());
        if event::poll(left)? {
            match event::read()? {
                Event::Key(key) if key.kind != KeyEventKind::Release => {
                    if !top.key(key) {
                        return Ok(());
                    }
                }
                _ => {}
            }
        }
        if Instant::now() >= next {
            if count.is_some_and(|count| shown >= count) {
                return Ok(());
            }
            shown += 1;
            if !top.is_paused() {
                top.note(looks.take().map_err(|error| format!("{error:#}")));
            }
            next = Instant::now() + interval;
        }
    }
}
