// SPDX-License-Identifier: GPL-2.0

//! What the daemon tells about host and guests.

use super::api::{within_bounds, FoundReport, GuestReport, HostReport, Report, ReservationReport};
use super::link::{self, Link};
use super::wish::Wishes;
use super::{find, Daemon};
use crate::config::VmConfig;
use crate::control::{linux_floor_kb, Guest};
use crate::text::escape;

impl Daemon {
    pub(super) fn report(&self) -> Report {
        let kept = self.runtime.reservations.all();
        let now_s = Self::clock_s();
        Report {
            policy: self.config.host.policy,
            admission_ok: self.controller.admission_ok(),
            trouble: self.trouble.clone(),
            host: self.host_report(),
            reservations: kept
                .map(|kept| ReservationReport {
                    name: kept.name.clone(),
                    min_kb: kept.min_kb,
                    left_s: (kept.until_s - now_s).max(0.0),
                    admitted: kept.admitted,
                })
                .collect(),
            guests: self.config.vms.iter().map(|vm| self.guest(vm)).collect(),
            found: self.found(),
        }
    }

    fn host_report(&self) -> Option<HostReport> {
        let latest = self.latest.as_ref()?;
        let config = &self.config.host;
        let backed_percent = 100 - u128::from(config.unshare_risk_percent.min(100));
        let backed = u128::from(latest.saved_kb) * backed_percent / 100;
        let kept = config.slush_kb.saturating_add(latest.host.reserved_kb);
        Some(HostReport {
            state: latest.seen.state,
            total_kb: latest.host.total_kb,
            available_kb: latest.host.available_kb,
            slush_kb: config.slush_kb,
            reserved_kb: latest.host.reserved_kb,
            unshare_kb: latest.saved_kb,
            unshare_risk_percent: config.unshare_risk_percent,
            unshare_ok: backed + u128::from(kept) <= u128::from(latest.host.available_kb),
        })
    }

    fn guest(&self, config: &VmConfig) -> GuestReport {
        let link = self.links.get(&config.name);
        let seen = link.map(Link::look);
        let heard = self.wishes.get(&config.name).map(Wishes::look);
        let vm = self
            .latest
            .as_ref()
            .and_then(|latest| latest.vm(&config.name));
        let guest = self.controller.guests().get(&config.name);
        let stats = seen.as_ref().and_then(link::Seen::fresh_stats);
        let total = stats.and_then(|stats| stats.total_kb);
        let available = stats.and_then(|stats| stats.available_kb);
        let committed = total
            .zip(available)
            .map(|(total, available)| total.saturating_sub(available))
            .map(|used| used + stats.and_then(|s| s.swapped_out_kb()).unwrap_or(0));
        let last = guest.and_then(|guest| guest.decisions().last());
        let current = seen.as_ref().and_then(|seen| seen.actual_kb);
        let started_with = vm
            .and_then(|vm| vm.figures.size_kb)
            .unwrap_or(config.static_max_kb);
        GuestReport {
            name: config.name.clone(),
            module_name: vm.map(|vm| vm.name.shown()),
            link: link.map(|link| link.way().to_string()),
            policy: self.config.policy_of(config),
            by_hand: self.asked.sizes.contains_key(&config.name),
            guest_control: config.guest_control,
            by_guest: !self.asked.sizes.contains_key(&config.name)
                && self.asked.by_guest.contains_key(&config.name),
            guest_asks_kb: heard.as_ref().and_then(|heard| heard.asked_kb),
            driver: seen.as_ref().and_then(|seen| seen.driver),
            conduct: guest.map(Guest::conduct),
            min_kb: config.dynamic_min_kb,
            entitlement_kb: config.entitlement_kb,
            max_kb: config.ceiling_kb(),
            chunk_kb: config.chunk_kb,
            amr: config.amr,
            comfortable_kb: committed.map(|kb| kb.max(linux_floor_kb(config.static_max_kb))),
            target_kb: last.and_then(|last| last.wanted_kb),
            ordered_kb: guest.map(Guest::ordered_kb),
            current_kb: current,
            ballooned_kb: current.map(|current| started_with.saturating_sub(current)),
            guest_total_kb: total,
            guest_free_kb: stats.and_then(|stats| stats.free_kb),
            guest_available_kb: available,
            guest_caches_kb: stats.and_then(|stats| stats.caches_kb),
            guest_swap_in_kb: stats.and_then(|stats| stats.swap_in_kb),
            guest_swap_out_kb: stats.and_then(|stats| stats.swap_out_kb),
            guest_major_faults: stats.and_then(|stats| stats.major_faults),
            committed_kb: committed,
            pressure_percent: committed
                .zip(total)
                .and_then(|(c, t)| (c * 100).checked_div(t)),
            active_kb: vm.and_then(|vm| vm.figures.active_kb),
            resident_kb: vm.and_then(|vm| vm.figures.resident_kb),
            stats_age_s: seen
                .as_ref()
                .and_then(link::Seen::stats_age)
                .map(|age| age.as_secs_f64()),
            rates: vm
                .and_then(|vm| self.rates.get(vm.name.raw()))
                .map(|rates| rates.per_second())
                .unwrap_or_default(),
            reason: last.map(|last| last.reason.clone()),
            error: self.wrong(config, seen.as_ref(), vm.is_some()),
            tally: guest.map(Guest::tally),
        }
    }

    /// What is wrong with a guest: its balloon first, then what it asks for.
    fn wrong(&self, config: &VmConfig, seen: Option<&link::Seen>, exists: bool) -> Option<String> {
        match seen {
            Some(seen) if seen.error.is_some() => return seen.error.clone(),
            Some(_) => {}
            None if exists => return Some("its QMP socket is not known".to_owned()),
            None => {
                let said = "its QMP socket is not known: the module has no such VM";
                return Some(said.to_owned());
            }
        }
        if !config.guest_control {
            return None;
        }
        let Some(wishes) = self.wishes.get(&config.name) else {
            return Some("guest_control: its guest agent is not known".to_owned());
        };
        let heard = wishes.look();
        let outside = heard.asked_kb.map(|kb| within_bounds(config, kb));
        let outside = outside.and_then(Result::err);
        heard
            .error
            .or(outside)
            .map(|error| format!("guest_control: {error}"))
    }

    /// VMs that run and that nobody configured.
    fn found(&self) -> Vec<FoundReport> {
        let Some(latest) = &self.latest else {
            return Vec::new();
        };
        let ours: Vec<_> = self
            .config
            .vms
            .iter()
            .filter_map(|config| Some(latest.vm(&config.name)?.name.raw()))
            .collect();
        latest
            .vms
            .iter()
            .filter(|vm| !ours.contains(&vm.name.raw()))
            .map(|vm| {
                let owner_pid = vm.figures.owner_pid.filter(|pid| *pid > 0);
                FoundReport {
                    name: escape(vm.name.raw().as_encoded_bytes()),
                    resident_kb: vm.figures.resident_kb,
                    owner_pid,
                    link: owner_pid
                        .and_then(|pid| find::way_of(&self.options.root, pid))
                        .map(|way| way.to_string()),
                }
            })
            .collect()
    }
}
