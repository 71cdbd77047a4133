// SPDX-License-Identifier: GPL-2.0

//! A host with guests that behave in every way, and a clock that a test moves.

use super::{Controller, HostState, Observation, Order, Safety, Seen};
use crate::config::Config;
use crate::policy::Asked;
use crate::snapshot::{HostSample, VmSample};

/// How a guest answers its balloon.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Nature {
    /// Goes where it is told.
    Ideal,
    /// Does not go below this.
    Least(u64),
    /// Does not go above this.
    Most(u64),
    /// Never moves.
    Stuck,
    /// Moves for so many seconds, then does not for as many.
    NowAndThen(f64),
    /// Says that it moved, and gives nothing back.
    Lying,
}

/// A guest.
#[derive(Debug, Clone)]
pub struct SimGuest {
    pub name: &'static str,
    pub nature: Nature,
    /// What its balloon leaves it, by its own words.
    pub current: u64,
    /// The same, a second ago.
    pub was: u64,
    pub target: u64,
    /// Host memory that it holds.
    pub resident: u64,
    /// What it has without holding it.
    pub shared: u64,
    pub committed: u64,
    /// What its programs ask for more, each second, up to the second number.
    pub growth: (u64, u64),
    /// Below this it swaps.
    pub working_set: u64,
    pub swap_in: u64,
    /// Seconds after which it touches all it has; before, only what it had.
    pub touches_at: f64,
    /// Movement in a second.
    pub rate: u64,
}

impl SimGuest {
    pub fn new(name: &'static str, nature: Nature, current: u64) -> Self {
        Self {
            name,
            nature,
            current,
            was: current,
            target: current,
            resident: current,
            shared: 0,
            committed: 0,
            growth: (0, 0),
            working_set: 0,
            swap_in: 0,
            touches_at: 0.0,
            rate: 256 << 10,
        }
    }

    fn step(&mut self, now_s: f64) {
        let mut target = self.target;
        self.was = self.current;
        match self.nature {
            Nature::Ideal | Nature::Lying => {}
            Nature::Least(kb) => target = target.max(kb.min(self.current)),
            Nature::Most(kb) => target = target.min(kb.max(self.current)),
            Nature::Stuck => target = self.current,
            Nature::NowAndThen(period) if (now_s / period) as u64 % 2 == 1 => target = self.current,
            Nature::NowAndThen(_) => {}
        }
        self.current = if target > self.current {
            target.min(self.current + self.rate)
        } else {
            target.max(self.current.saturating_sub(self.rate))
        };
        if self.nature != Nature::Lying {
            self.resident = self.resident.min(self.current);
        }
        if now_s >= self.touches_at {
            self.resident = self
                .resident
                .max(self.current - self.shared.min(self.current));
        }
        self.committed = (self.committed + self.growth.0).min(self.growth.1.max(self.committed));
        if self.current < self.working_set {
            self.swap_in += (self.working_set - self.current) / 8;
        }
    }
}

/// The host, its guests and the loop that moves them.
pub struct Sim {
    pub now_s: f64,
    /// Whether what the guests say is a second old.
    pub lag: bool,
    pub total: u64,
    pub state: Option<HostState>,
    pub config: Config,
    pub asked: Asked,
    pub controller: Controller,
    pub guests: Vec<SimGuest>,
    pub orders: Vec<(f64, Order)>,
    /// Least that was ever available; below 0 the host was overcommitted.
    pub worst: i128,
}

impl Sim {
    pub fn new(total: u64, config: Config, safety: Safety, guests: Vec<SimGuest>) -> Self {
        let controller = Controller::new(safety);
        let mut sim = Self {
            now_s: 0.0,
            lag: false,
            total,
            state: None,
            config,
            asked: Asked::default(),
            controller,
            guests,
            orders: Vec::new(),
            worst: 0,
        };
        sim.worst = sim.available();
        sim
    }

    pub fn available(&self) -> i128 {
        let held: i128 = self
            .guests
            .iter()
            .map(|guest| i128::from(guest.resident))
            .sum();
        i128::from(self.total) - held
    }

    pub fn observe(&self) -> Observation {
        let said = |guest: &SimGuest| if self.lag { guest.was } else { guest.current };
        let seen = |guest: &SimGuest| Seen {
            sample: VmSample {
                name: guest.name.to_owned(),
                current_kb: Some(said(guest)),
                committed_kb: Some(guest.committed),
                guest_total_kb: Some(said(guest)),
                guest_free_kb: Some(0),
                guest_available_kb: Some(said(guest).saturating_sub(guest.committed)),
                active_kb: Some(guest.committed.min(said(guest))),
                resident_kb: Some(guest.resident),
                ..VmSample::default()
            },
            swap_in_kb: Some(guest.swap_in),
            refaults: None,
            shared_kb: Some(guest.shared),
        };
        Observation {
            now_s: self.now_s,
            state: self.state,
            host: HostSample {
                total_kb: self.total,
                available_kb: u64::try_from(self.available()).unwrap_or(0),
                ..HostSample::default()
            },
            vms: self.guests.iter().map(seen).collect(),
        }
    }

    /// Lets one second pass.
    pub fn second(&mut self) {
        let seen = self.observe();
        for order in self.controller.tick(&self.config, &seen, &self.asked) {
            if let Some(guest) = self
                .guests
                .iter_mut()
                .find(|guest| guest.name == order.name)
            {
                guest.target = order.kb;
            }
            self.orders.push((self.now_s, order));
        }
        for guest in &mut self.guests {
            guest.step(self.now_s);
        }
        self.worst = self.worst.min(self.available());
        self.now_s += 1.0;
    }

    pub fn run(&mut self, seconds: u32) {
        for _ in 0..seconds {
            self.second();
        }
    }

    pub fn guest(&mut self, name: &str) -> &mut SimGuest {
        self.guests
            .iter_mut()
            .find(|guest| guest.name == name)
            .unwrap()
    }

    pub fn size(&self, name: &str) -> u64 {
        self.guests
            .iter()
            .find(|guest| guest.name == name)
            .unwrap()
            .current
    }

    pub fn orders_to(&self, name: &str) -> usize {
        self.orders
            .iter()
            .filter(|(_, order)| order.name == name)
            .count()
    }
}
