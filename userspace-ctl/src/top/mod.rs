// SPDX-License-Identifier: GPL-2.0

//! The screen of `thinramctl top`: what it remembers, how keys change it. Drawing is in [`draw`];
//! both are pure, so that a test can look at the screen.

mod draw;

pub use draw::{draw, text_of};

use crate::overview::Overview;
use crate::snapshot::HostSample;
use crate::vm::VmName;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use serde_json::Value;
use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};

/// Looks that are remembered.
const HISTORY: usize = 120;

/// What the table is sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sort {
    /// Name.
    Name,
    /// Host memory that it holds.
    Resident,
    /// What its balloon leaves it.
    Current,
    /// What it shall have.
    Target,
    /// What it lately used.
    Active,
    /// Shared memory.
    Shared,
    /// What sharing saves.
    Saved,
    /// Compressed and swapped memory.
    Away,
    /// Committed memory by what it sees.
    Pressure,
    /// Faults in a second.
    Faults,
    /// Copies on write in a second.
    Breaks,
}

impl Sort {
    /// In the order of the columns.
    pub const ALL: [Self; 11] = [
        Self::Name,
        Self::Resident,
        Self::Current,
        Self::Target,
        Self::Active,
        Self::Shared,
        Self::Saved,
        Self::Away,
        Self::Pressure,
        Self::Faults,
        Self::Breaks,
    ];

    /// Heading of its column.
    pub fn title(self) -> &'static str {
        match self {
            Self::Name => "VM",
            Self::Resident => "RESID",
            Self::Current => "CURR",
            Self::Target => "TARGET",
            Self::Active => "ACTIVE",
            Self::Shared => "SHARED",
            Self::Saved => "SAVED",
            Self::Away => "AWAY",
            Self::Pressure => "PRES",
            Self::Faults => "FLT/s",
            Self::Breaks => "COW/s",
        }
    }

    /// The key that chooses it.
    pub fn key(self) -> char {
        match self {
            Self::Name => 'n',
            Self::Resident => 'r',
            Self::Current => 'c',
            Self::Target => 't',
            Self::Active => 'a',
            Self::Shared => 'h',
            Self::Saved => 's',
            Self::Away => 'w',
            Self::Pressure => 'p',
            Self::Faults => 'f',
            Self::Breaks => 'b',
        }
    }
}

/// One VM, as it is shown.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Its name, escaped.
    pub name: String,
    /// Sizes in KiB, percent or events, by [`Sort`].
    pub cells: BTreeMap<usize, f64>,
    /// What the daemon says about it.
    pub guest: Option<Value>,
}

impl Row {
    /// The figure of a column.
    pub fn cell(&self, sort: Sort) -> Option<f64> {
        self.cells.get(&(sort as usize)).copied()
    }
}

/// What one VM held at earlier looks.
type History = VecDeque<u64>;

/// All that the screen shows.
#[derive(Debug, Clone)]
pub struct Top {
    /// The last look.
    pub overview: Option<Overview>,
    /// The host's memory at that time.
    pub host: Option<HostSample>,
    /// Why there is no newer one.
    pub error: Option<String>,
    available: History,
    saved: History,
    resident: BTreeMap<VmName, History>,
    sort: Sort,
    reverse: bool,
    selected: usize,
    paused: bool,
    help: bool,
}

impl Default for Top {
    fn default() -> Self {
        Self {
            overview: None,
            host: None,
            error: None,
            available: History::new(),
            saved: History::new(),
            resident: BTreeMap::new(),
            sort: Sort::Resident,
            reverse: false,
            selected: 0,
            paused: false,
            help: false,
        }
    }
}

fn remember(history: &mut History, value: u64) {
    if history.len() == HISTORY {
        history.pop_front();
    }
    history.push_back(value);
}

impl Top {
    /// Whether new looks are wanted.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Takes in a look, or why there was none.
    pub fn note(&mut self, look: Result<(Overview, Option<HostSample>), String>) {
        let (overview, host) = match look {
            Ok(look) => look,
            Err(error) => {
                self.error = Some(error);
                return;
            }
        };
        self.error = None;
        if let Some(host) = host {
            remember(&mut self.available, host.available_kb);
        }
        let status = &overview.status;
        remember(&mut self.saved, status.host.figures.saved_kb.unwrap_or(0));
        self.resident
            .retain(|name, _| status.vms.iter().any(|vm| vm.name == *name));
        for vm in &status.vms {
            let history = self.resident.entry(vm.name.clone()).or_default();
            remember(history, vm.figures.resident_kb.unwrap_or(0));
        }
        self.selected = self.selected.min(status.vms.len().saturating_sub(1));
        self.overview = Some(overview);
        self.host = host;
    }

    /// The VMs in their order.
    pub fn rows(&self) -> Vec<Row> {
        let Some(overview) = &self.overview else {
            return Vec::new();
        };
        let mut rows: Vec<Row> = overview
            .status
            .vms
            .iter()
            .map(|vm| {
                let name = vm.name.shown();
                let guests = overview.daemon.as_ref();
                let guest = guests
                    .and_then(|report| report["guests"].as_array())
                    .and_then(|guests| {
                        guests
                            .iter()
                            .find(|guest| guest["module_name"].as_str() == Some(&name))
                    })
                    .cloned();
                let figures = &vm.figures;
                let told = |key: &str| guest.as_ref()?[key].as_f64();
                let kb = |kb: Option<u64>| kb.map(|kb| kb as f64);
                let rates = overview.rates.get(&name).copied().unwrap_or_default();
                let away = match (figures.compressed_kb, figures.swapped_kb) {
                    (None, None) => None,
                    (zipped, swapped) => Some(zipped.unwrap_or(0) + swapped.unwrap_or(0)),
                };
                let cells = [
                    (Sort::Resident, kb(figures.resident_kb)),
                    (Sort::Current, told("current_kb")),
                    (Sort::Target, told("target_kb")),
                    (Sort::Active, kb(figures.active_kb)),
                    (Sort::Shared, kb(figures.shared_kb)),
                    (Sort::Saved, kb(vm.saved_kb(&overview.status.host.figures))),
                    (Sort::Away, kb(away)),
                    (Sort::Pressure, told("pressure_percent")),
                    (Sort::Faults, rates.faults),
                    (Sort::Breaks, rates.cow_breaks),
                ];
                Row {
                    name,
                    cells: cells
                        .iter()
                        .filter_map(|(sort, value)| Some((*sort as usize, (*value)?)))
                        .collect(),
                    guest,
                }
            })
            .collect();
        let sort = self.sort;
        rows.sort_by(|a, b| {
            let by_name = a.name.cmp(&b.name);
            if sort == Sort::Name {
                return by_name;
            }
            // Most first, and what is not known last.
            let order = match (a.cell(sort), b.cell(sort)) {
                (Some(a), Some(b)) => b.total_cmp(&a),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (None, None) => Ordering::Equal,
            };
            order.then(by_name)
        });
        if self.reverse {
            rows.reverse();
        }
        rows
    }

    /// Does what a key says; `false` ends the program.
    pub fn key(&mut self, key: KeyEvent) -> bool {
        let last = self.rows().len().saturating_sub(1);
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return key.code != KeyCode::Char('c');
        }
        if self.help {
            self.help = false;
            return key.code != KeyCode::Char('q');
        }
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return false,
            KeyCode::Char('?') | KeyCode::F(1) => self.help = true,
            KeyCode::Char(' ') => self.paused = !self.paused,
            KeyCode::Char('R') => self.reverse = !self.reverse,
            KeyCode::Char('>') | KeyCode::Right => self.step_sort(1),
            KeyCode::Char('<') | KeyCode::Left => self.step_sort(Sort::ALL.len() - 1),
            KeyCode::Up | KeyCode::Char('k') => self.selected = self.selected.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => self.selected = last.min(self.selected + 1),
            KeyCode::PageUp => self.selected = self.selected.saturating_sub(10),
            KeyCode::PageDown => self.selected = last.min(self.selected + 10),
            KeyCode::Home => self.selected = 0,
            KeyCode::End => self.selected = last,
            KeyCode::Char(c) => {
                if let Some(sort) = Sort::ALL.into_iter().find(|sort| sort.key() == c) {
                    self.sort = sort;
                }
            }
            _ => {}
        }
        true
    }

    fn step_sort(&mut self, by: usize) {
        let at = (self.sort as usize + by) % Sort::ALL.len();
        self.sort = Sort::ALL[at];
    }
}

#[cfg(test)]
mod tests;
