// SPDX-License-Identifier: GPL-2.0

//! What the daemon does when it is asked.

use super::api::{self, Reply, Request};
use super::{say, Daemon, Latest, Level};
use crate::admission::{self, Applicant, Claim, Reservation, Running, Situation};
use crate::config::{Config, VmConfig};
use crate::policy::PolicyKind;
use crate::runtime::{self, Runtime};
use crate::snapshot::Snapshot;
use crate::text::escape;
use crate::units::long_kb;
use std::collections::BTreeMap;

/// How long what an applicant waits for is kept for it after it last asked, in seconds.
const PENDING_S: f64 = 5.0;

impl Daemon {
    pub(super) fn answer(&mut self, request: Request) -> Result<Reply, String> {
        match request {
            Request::Status {} => Ok(Reply::Status(Box::new(self.report()))),
            Request::Snapshot {} => self.snapshot(),
            Request::Explain { vm } => {
                self.known(&vm)?;
                let guest = self.controller.guests().get(&vm);
                let decisions = guest.map(|guest| guest.decisions().cloned().collect());
                Ok(Reply::Explain {
                    now_s: self.now_s(),
                    decisions: decisions.unwrap_or_default(),
                })
            }
            Request::Balloon { vm, kb } => {
                let config = self.known(&vm)?;
                api::within_bounds(config, kb)?;
                self.change(|runtime, _| {
                    runtime.sizes.insert(vm, kb);
                    Ok(())
                })
            }
            Request::Release { vm } => {
                self.known(&vm)?;
                self.controller.release(&vm);
                self.change(|runtime, _| {
                    runtime.sizes.remove(&vm);
                    Ok(())
                })
            }
            Request::Add { vm, settings } => self.change(|runtime, daemon| {
                runtime.add(&daemon.file, &daemon.config, &vm, &settings)
            }),
            Request::Set { vm, key, value } => {
                self.known(&vm)?;
                self.change(|runtime, daemon| runtime.set(&daemon.file, &vm, &key, &value))
            }
            Request::Remove { vm } => {
                self.known(&vm)?;
                self.change(|runtime, daemon| {
                    runtime.remove(&daemon.file, &vm);
                    Ok(())
                })
            }
            Request::Admit {
                vm,
                min_kb,
                max_kb,
                unshare_risk_percent,
                hold_s,
                wait,
            } => {
                let applicant = Applicant {
                    name: vm,
                    min_kb,
                    max_kb,
                    unshare_risk_percent: unshare_risk_percent
                        .unwrap_or(self.config.host.unshare_risk_percent),
                };
                self.admit(&applicant, hold_s, wait)
            }
            Request::Cancel { vm } => {
                if !self.runtime.reservations.cancel(&vm) {
                    return Err(format!("nothing is reserved for {}", escape(vm.as_bytes())));
                }
                self.store();
                Ok(Reply::Done {})
            }
        }
    }

    fn known(&self, name: &str) -> Result<&VmConfig, String> {
        self.config
            .vm(name)
            .ok_or_else(|| format!("no VM named {} is configured", escape(name.as_bytes())))
    }

    /// Changes what was told, unless the change or what would come of it is refused.
    fn change(
        &mut self,
        change: impl FnOnce(&mut Runtime, &Self) -> Result<(), String>,
    ) -> Result<Reply, String> {
        let mut runtime = self.runtime.clone();
        change(&mut runtime, self)?;
        self.all_may_have(&runtime.over(&self.file).0)?;
        self.runtime = runtime;
        self.take_over();
        self.store();
        Ok(Reply::Done {})
    }

    /// Refuses a configuration that gives a VM a right to memory that is not there.
    pub(super) fn all_may_have(&self, config: &Config) -> Result<(), String> {
        config
            .vms
            .iter()
            .try_for_each(|vm| self.may_have(vm, self.config.vm(&vm.name)))
    }

    /// Refuses a minimum or an entitlement that is raised beyond the memory that is there.
    fn may_have(&self, vm: &VmConfig, before: Option<&VmConfig>) -> Result<(), String> {
        let right = |vm: &VmConfig| vm.dynamic_min_kb.max(vm.entitlement_kb.unwrap_or(0));
        if before.is_some_and(|before| right(before) >= right(vm)) {
            return Ok(());
        }
        let Some(latest) = &self.latest else {
            return Ok(());
        };
        let free = self.controller.budget(&self.config, &latest.seen);
        let claims: Vec<Claim> = latest
            .seen
            .vms
            .iter()
            .filter_map(|seen| self.claim(&seen.sample.name, seen.sample.current_kb?))
            .collect();
        let kept = self.config.host.slush_kb + self.config.host.vm_overhead_kb;
        let total = latest.host.total_kb.saturating_sub(kept);
        admission::raise(total, free, &claims, &vm.name, right(vm))
    }

    fn claim(&self, name: &str, current_kb: u64) -> Option<Claim> {
        let config = self.config.vm(name)?;
        let entitled = config.entitlement_kb.filter(|_| config.amr);
        let right_kb = config.dynamic_min_kb.max(entitled.unwrap_or(0));
        let kept_kb = match self.config.policy_of(config) {
            _ if self.asked.of(name).is_some() => current_kb,
            PolicyKind::Manual => current_kb,
            PolicyKind::Entitlement if entitled.is_none() => current_kb,
            PolicyKind::Entitlement => right_kb,
            _ => config.dynamic_min_kb,
        };
        Some(Claim {
            name: name.to_owned(),
            right_kb: right_kb + self.config.host.vm_overhead_kb,
            current_kb,
            spare_kb: current_kb.saturating_sub(kept_kb),
        })
    }

    /// Writes what was told where the next daemon finds it.
    fn store(&self) {
        if self.options.dry_run {
            return;
        }
        let path = runtime::path(&self.options.root);
        if let Err(error) = self.runtime.save(&path) {
            let said = format!("cannot write {}: {error}", path.display());
            say(Level::Error, &said);
        }
    }

    fn snapshot(&self) -> Result<Reply, String> {
        let latest = self.seen()?;
        Ok(Reply::Snapshot(Snapshot {
            now_s: latest.seen.now_s,
            host: latest.host,
            vms: latest
                .seen
                .vms
                .iter()
                .map(|seen| seen.sample.clone())
                .collect(),
        }))
    }

    fn seen(&self) -> Result<&Latest, String> {
        self.latest.as_ref().ok_or_else(|| match &self.trouble {
            Some(trouble) => trouble.clone(),
            None => "the daemon has not seen the host yet: try again".to_owned(),
        })
    }

    /// The host and all that runs on it, as admission sees it.
    fn situation(&self, latest: &Latest) -> Situation {
        let mut running: BTreeMap<String, Running> = BTreeMap::new();
        for vm in &latest.vms {
            let resident_kb = vm.figures.resident_kb.unwrap_or(0);
            // Nothing can be taken from a VM that is not ours to size.
            let holds = Running {
                min_kb: resident_kb,
                resident_kb,
            };
            running.insert(vm.name.raw().to_string_lossy().into_owned(), holds);
        }
        for vm in &self.config.vms {
            let found = latest.vm(&vm.name);
            if let Some(found) = found {
                running.remove(found.name.raw().to_string_lossy().as_ref());
            } else if !self.controller.guests().contains_key(&vm.name) {
                continue;
            }
            let holds = Running {
                min_kb: vm.dynamic_min_kb,
                resident_kb: found.and_then(|vm| vm.figures.resident_kb).unwrap_or(0),
            };
            running.insert(vm.name.clone(), holds);
        }
        Situation {
            total_kb: latest.host.total_kb,
            available_kb: latest.host.available_kb,
            saved_kb: latest.saved_kb,
            slush_kb: self.config.host.slush_kb,
            overhead_kb: self.config.host.vm_overhead_kb,
            running,
        }
    }

    fn admit(&mut self, applicant: &Applicant, hold_s: u64, wait: bool) -> Result<Reply, String> {
        let latest = self.seen()?;
        let situation = self.situation(latest);
        let mut until_s = Self::clock_s() + hold_s as f64;
        let outcome = admission::admit(&situation, &self.runtime.reservations, applicant);
        let name = escape(applicant.name.as_bytes());
        let (room_kb, reason) = match outcome {
            Ok(room_kb) => (
                Some(room_kb),
                format!(
                    "{} are kept for {name} for {hold_s} s{}",
                    long_kb(applicant.min_kb.saturating_add(situation.overhead_kb)),
                    admission::room(applicant, room_kb)
                ),
            ),
            Err(refusal) => {
                // The guests make room for what is waited for.
                until_s = Self::clock_s() + PENDING_S;
                if !(wait && refusal.may_pass) {
                    return Ok(Reply::Admission {
                        admitted: false,
                        room_kb: None,
                        reason: refusal.reason,
                    });
                }
                (None, refusal.reason)
            }
        };
        let admitted = room_kb.is_some();
        let known = self.runtime.reservations.get(&applicant.name);
        if known.is_none_or(|known| admitted != known.admitted) {
            say(
                Level::Info,
                &match admitted {
                    true => format!("admitted: {reason}"),
                    false => format!("{name} waits for admission: {reason}"),
                },
            );
            self.controller.decide_next();
        }
        self.runtime.reservations.put(Reservation {
            name: applicant.name.clone(),
            min_kb: applicant.min_kb,
            until_s,
            admitted,
        });
        self.store();
        Ok(Reply::Admission {
            admitted,
            room_kb,
            reason,
        })
    }

    /// Ends the reservations that are over; what the others still keep.
    pub(super) fn keep_reservations(&mut self, latest: &Latest) -> u64 {
        let situation = self.situation(latest);
        let guests = self.controller.guests();
        let arrived = |name: &str| guests.contains_key(name);
        let ended = self
            .runtime
            .reservations
            .expire(Self::clock_s(), &situation.running, arrived);
        if !ended.is_empty() {
            let names = escape(ended.join(", ").as_bytes());
            say(Level::Info, &format!("no longer reserved for: {names}"));
            self.store();
        }
        self.runtime.reservations.outstanding_kb(&situation)
    }
}
