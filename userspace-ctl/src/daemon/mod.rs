// SPDX-License-Identifier: GPL-2.0

//! `thinramctl daemon`: the loop of [`crate::control`] with the world around it.
//!
//! One thread a VM talks to its QEMU, so that one that hangs holds up nobody else. The main thread
//! looks at the host once a second, and at once when the module says that its state got worse.
//! Nothing is stored: whatever happens to the daemon, the next one goes on from what is.

pub mod api;
mod find;
mod http;
mod link;
pub mod meminfo;
mod report;
mod told;
mod wake;
mod wish;

pub use find::{module_name, qmp_of_command_line};

use crate::agent;
use crate::config::{Config, VmConfig};
use crate::control::{Controller, HostState, Observation, Order, Safety, Seen};
use crate::host::Host;
use crate::metrics::expose;
use crate::policy::Asked;
use crate::rates::Rates;
use crate::runtime::{self, Runtime};
use crate::snapshot::{HostSample, VmSample};
use crate::sysfs::Dir;
use crate::text::harmless;
use crate::units::{exact_kb, long_kb};
use crate::vm::{Vm, VmName};
use http::Http;
use link::{Link, Way};
use sd_notify::NotifyState;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};
use thiserror::Error;
use wake::{listen, wait, Manager, Signals, StateFile};
use wish::Wishes;

/// Pause between two looks.
const TICK: Duration = Duration::from_secs(1);

/// Why the daemon cannot run.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// Its socket cannot be made.
    #[error("cannot listen on {path}: {cause}")]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// Another one runs.
    #[error("another daemon answers on {0}")]
    Running(PathBuf),
    /// The system refuses what every process may do.
    #[error("cannot wait for events: {0}")]
    Wait(io::Error),
}

/// How the daemon runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// Below which the system is read.
    pub root: PathBuf,
    /// The configuration.
    pub config: PathBuf,
    /// Only say what would be ordered.
    pub dry_run: bool,
}

/// How much a line of the log matters, in systemd's levels.
#[derive(Clone, Copy)]
enum Level {
    Error = 3,
    Warning = 4,
    Info = 6,
}

/// Says a line to the journal, or to whoever reads standard error.
fn say(level: Level, message: &str) {
    use std::io::Write;
    // There is nobody to tell that telling failed.
    let _ = writeln!(io::stderr(), "<{}>{}", level as u8, harmless(message));
}

struct Daemon {
    options: Options,
    /// The configuration as it is in the file.
    file: Config,
    /// What was told since the host started.
    runtime: Runtime,
    /// The file's configuration with what was told laid over it.
    config: Config,
    controller: Controller,
    asked: Asked,
    links: BTreeMap<String, Link>,
    /// What guests that may control their size ask for.
    wishes: BTreeMap<String, Wishes>,
    /// VMs whose `cap` was written, with it.
    caps: BTreeMap<String, u64>,
    start: Instant,
    /// What was last wrong with the host, so that it is said once.
    trouble: Option<String>,
    /// What was last wrong with a VM's files, by its name in the module.
    troubles: BTreeMap<OsString, String>,
    /// How often things happen to a VM, by its name in the module.
    rates: BTreeMap<OsString, Rates>,
    latest: Option<Latest>,
    /// Who tells our metrics, and why nobody does.
    http: Option<Http>,
    http_error: Option<String>,
}

/// What the last look saw.
struct Latest {
    host: HostSample,
    /// What all sharing saves.
    saved_kb: u64,
    /// All VMs of the module.
    vms: Vec<Vm>,
    seen: Observation,
}

impl Latest {
    /// The module's VM of a VM of the configuration.
    fn vm(&self, name: &str) -> Option<&Vm> {
        find_vm(&self.vms, name)
    }
}

/// The module's VM of a VM of the configuration.
fn find_vm<'a>(vms: &'a [Vm], name: &str) -> Option<&'a Vm> {
    let found = module_name(vms.iter().map(|vm| vm.name.raw()), name)?.to_owned();
    vms.iter().find(|vm| vm.name.raw() == found)
}

/// Runs until SIGTERM or SIGINT.
pub fn run(options: Options) -> Result<(), DaemonError> {
    let file = Config::load(&options.config)?;
    let socket = api::socket_path(&options.root);
    let listener = listen(&socket)?;
    let signals = Signals::new().map_err(DaemonError::Wait)?;
    let runtime = Runtime::load(&runtime::path(&options.root)).unwrap_or_else(|error| {
        say(
            Level::Error,
            &format!("{error}; what was told before is forgotten"),
        );
        Runtime::default()
    });
    let mut daemon = Daemon {
        controller: Controller::new(Safety::default()),
        asked: Asked::default(),
        links: BTreeMap::new(),
        wishes: BTreeMap::new(),
        caps: BTreeMap::new(),
        start: Instant::now(),
        trouble: None,
        troubles: BTreeMap::new(),
        rates: BTreeMap::new(),
        latest: None,
        http: None,
        http_error: None,
        options,
        config: file.clone(),
        file,
        runtime,
    };
    daemon.take_over();
    say(
        Level::Info,
        &format!("policy {}", daemon.config.host.policy.name()),
    );
    let ended = daemon.serve(&listener, &signals);
    // What cannot be removed is replaced by the next daemon.
    let _ = fs::remove_file(&socket);
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    ended
}

impl Daemon {
    fn serve(&mut self, listener: &UnixListener, signals: &Signals) -> Result<(), DaemonError> {
        let mut state = StateFile(None);
        let mut next = Instant::now();
        let mut manager = Manager::default();
        loop {
            if Instant::now() >= next {
                let dir = Dir::open(&self.options.root).ok();
                state.arm(dir.as_ref());
                self.look(dir.as_ref());
                next = Instant::now() + TICK;
                manager.tell(&self.one_line());
            }
            let worse =
                wait(listener, signals, state.0.as_ref(), next).map_err(DaemonError::Wait)?;
            if worse {
                next = Instant::now();
            }
            if Signals::came(&signals.end) {
                say(
                    Level::Info,
                    "ended by a signal; the balloons stay as they are",
                );
                return Ok(());
            }
            if Signals::came(&signals.hang_up) {
                self.reload();
            }
            while let Ok((stream, _)) = listener.accept() {
                api::answer(stream, |request| self.answer(request));
            }
        }
    }

    fn reload(&mut self) {
        match Config::load(&self.options.config) {
            Ok(config) => match self.all_may_have(&config) {
                Ok(()) => {
                    self.file = config;
                    self.take_over();
                    say(Level::Info, "configuration read again");
                }
                Err(error) => {
                    say(
                        Level::Error,
                        &format!("{error}; the old configuration is kept"),
                    );
                }
            },
            Err(error) => {
                say(
                    Level::Error,
                    &format!("{error}; the old configuration is kept"),
                );
            }
        }
    }

    /// Makes the configuration and what was told hold from now on.
    fn take_over(&mut self) {
        let (config, misfits) = self.runtime.over(&self.file);
        for misfit in misfits {
            let said = format!("what was told does not fit the configuration: {misfit}");
            say(Level::Warning, &said);
        }
        self.config = config;
        self.asked.sizes = self.runtime.sizes.clone();
        self.lift_caps();
        self.caps.clear();
        self.controller.decide_next();
    }

    /// Takes the module's limits away that were written for caps which are no longer configured.
    fn lift_caps(&self) {
        let Some(latest) = self.latest.as_ref().filter(|_| !self.options.dry_run) else {
            return;
        };
        let has_cap = |name: &str| self.config.vm(name).is_some_and(|vm| vm.cap_kb.is_some());
        for name in self.caps.keys().filter(|name| !has_cap(name)) {
            let (Some(vm), Ok(dir)) = (latest.vm(name), Dir::open(&self.options.root)) else {
                continue;
            };
            match dir.child("vms").child(vm.name.raw()).write("limit_kb", "0") {
                Ok(()) => say(
                    Level::Info,
                    &format!("{name}: limit_kb is 0, the cap is gone"),
                ),
                Err(error) => say(Level::Error, &error.to_string()),
            }
        }
    }

    /// Seconds since 1970: reservations outlive this process.
    fn clock_s() -> f64 {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        since.map_or(0.0, |since| since.as_secs_f64())
    }

    /// Says what is wrong with the host when that changes.
    fn trouble(&mut self, trouble: Option<String>) {
        if self.trouble != trouble {
            match &trouble {
                Some(trouble) => say(Level::Error, trouble),
                None => say(Level::Info, "the host can be read again"),
            }
            self.trouble = trouble;
        }
    }

    /// One look at everything, and what follows from it.
    fn look(&mut self, dir: Option<&Dir>) {
        let (host, trouble) = match (meminfo::read(&self.options.root), dir) {
            (Ok(host), Some(_)) => (Some(host), None),
            (Ok(host), None) => {
                let missing =
                    "/sys/fs/thinram is missing: is the module loaded? sudo modprobe thinram";
                (Some(host), Some(missing.to_owned()))
            }
            (Err(error), _) => (None, Some(error)),
        };
        self.trouble(trouble);
        let Some(host) = host else { return };

        let all = self.read_vms(dir);
        let mut vms = Vec::new();
        for config in self.config.vms.clone() {
            let vm = find_vm(&all, &config.name);
            self.connect(&config, vm);
            if let (Some(dir), Some(vm)) = (dir, vm) {
                self.cap(dir, &config, vm);
            }
            vms.extend(self.see(&config, vm));
        }
        let configured = |name: &String| self.config.vm(name).is_some();
        self.links.retain(|name, _| configured(name));
        self.wishes.retain(|name, _| configured(name));
        self.caps.retain(|name, _| self.config.vm(name).is_some());

        let module = dir.and_then(|dir| Host::read(dir).ok()).unwrap_or_default();
        let mut seen = Observation {
            now_s: self.now_s(),
            state: module.state.as_deref().and_then(HostState::parse),
            host,
            vms,
        };
        let latest = Latest {
            host,
            saved_kb: module.figures.saved_kb.unwrap_or(0),
            vms: all,
            seen: seen.clone(),
        };
        let reserved_kb = self.keep_reservations(&latest);
        seen.host.reserved_kb = reserved_kb;
        self.latest = Some(Latest {
            host: seen.host,
            seen: seen.clone(),
            ..latest
        });
        self.hear_wishes();
        self.tell_metrics(&module);
        for order in self.controller.tick(&self.config, &seen, &self.asked) {
            self.carry_out(&order);
        }
    }

    /// Starts, ends or feeds the server of metrics, as it is configured.
    fn tell_metrics(&mut self, module: &Host) {
        let Some(port) = self.config.host.metrics_port else {
            self.http = None;
            return;
        };
        if self.http.as_ref().is_none_or(|http| http.port() != port) {
            self.http = None;
            match Http::start(port) {
                Ok(http) => {
                    say(
                        Level::Info,
                        &format!("metrics on http://127.0.0.1:{port}/metrics"),
                    );
                    self.http_error = None;
                    self.http = Some(http);
                }
                Err(error) => {
                    let error = format!("no metrics: cannot listen on 127.0.0.1:{port}: {error}");
                    if self.http_error.as_ref() != Some(&error) {
                        say(Level::Error, &error);
                        self.http_error = Some(error);
                    }
                }
            }
        }
        if let (Some(http), Some(latest)) = (&self.http, &self.latest) {
            let report = serde_json::to_value(self.report()).ok();
            http.put(expose(
                module,
                Some(latest.host),
                &latest.vms,
                report.as_ref(),
            ));
        }
    }

    fn now_s(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    /// All VMs of the module; what is wrong with one is said once.
    fn read_vms(&mut self, dir: Option<&Dir>) -> Vec<Vm> {
        let Some(dir) = dir.map(|dir| dir.child("vms")) else {
            return Vec::new();
        };
        let now_s = self.now_s();
        let mut vms = Vec::new();
        for name in dir.dirs().unwrap_or_default() {
            match Vm::read(&dir, &VmName::new(name.clone())) {
                Ok(None) => {}
                Ok(Some(vm)) => {
                    self.troubles.remove(&name);
                    self.rates.entry(name).or_default().note(now_s, &vm.figures);
                    vms.push(vm);
                }
                Err(error) => {
                    let error = error.to_string();
                    if self.troubles.get(&name) != Some(&error) {
                        say(Level::Warning, &error);
                        self.troubles.insert(name, error);
                    }
                }
            }
        }
        self.rates
            .retain(|name, _| vms.iter().any(|vm| vm.name.raw() == name));
        vms
    }

    /// Keeps a thread for a VM whose balloon can be reached.
    fn connect(&mut self, config: &VmConfig, vm: Option<&Vm>) {
        let pid = || vm?.figures.owner_pid.filter(|pid| *pid > 0);
        let configured = config.qmp.clone().map(Way::Qmp);
        let wanted = configured.or_else(|| find::way_of(&self.options.root, pid()?));
        if let Some(way) = wanted {
            if self
                .links
                .get(&config.name)
                .is_none_or(|link| *link.way() != way)
            {
                self.links.insert(config.name.clone(), Link::start(way));
            }
        }
        if !config.guest_control {
            self.wishes.remove(&config.name);
            return;
        }
        let configured = config.agent.clone().map(agent::Way::Socket);
        let wanted = configured.or_else(|| find::agent_of(&self.options.root, pid()?));
        if let Some(way) = wanted {
            if self
                .wishes
                .get(&config.name)
                .is_none_or(|wishes| *wishes.way() != way)
            {
                self.wishes.insert(config.name.clone(), Wishes::start(way));
            }
        }
    }

    /// Takes in what guests' own roots ask for, within their bounds.
    fn hear_wishes(&mut self) {
        let mut asked = BTreeMap::new();
        for config in self.config.vms.iter().filter(|vm| vm.guest_control) {
            let Some(wishes) = self.wishes.get(&config.name) else {
                continue;
            };
            if let Some(kb) = wishes.look().asked_kb {
                if api::within_bounds(config, kb).is_ok() {
                    asked.insert(config.name.clone(), kb);
                }
            }
        }
        if asked != self.asked.by_guest {
            self.asked.by_guest = asked;
            self.controller.decide_next();
        }
    }

    /// Writes a VM's cap to the module: once, and again when a new VM of that name has no limit.
    fn cap(&mut self, dir: &Dir, config: &VmConfig, vm: &Vm) {
        let Some(cap) = config.cap_kb else { return };
        let Some(has) = vm.knobs.get("limit_kb") else {
            return;
        };
        let known = self.caps.insert(config.name.clone(), cap);
        // Somebody else's limit is left, the lack of one is not.
        let left = known == Some(cap) && has != "0";
        if left || *has == cap.to_string() || self.options.dry_run {
            return;
        }
        let vms = dir.child("vms").child(vm.name.raw());
        match vms.write("limit_kb", &cap.to_string()) {
            Ok(()) => say(
                Level::Info,
                &format!("{}: limit_kb is {}", config.name, exact_kb(cap)),
            ),
            Err(error) => say(Level::Error, &error.to_string()),
        }
    }

    /// What is known about a guest; `None` for one that does not run.
    fn see(&self, config: &VmConfig, vm: Option<&Vm>) -> Option<Seen> {
        let link = self.links.get(&config.name)?;
        let link = link.look();
        let stats = link.fresh_stats();
        let total = stats.and_then(|stats| stats.total_kb);
        let available = stats.and_then(|stats| stats.available_kb);
        // Where the module does not sample, what the guest uses by its own words stands in.
        let used = || Some(total?.saturating_sub(available?));
        let knob = |name: &str| vm.and_then(|vm| vm.knobs.get(name)?.parse().ok());
        let sample = VmSample {
            name: config.name.clone(),
            current_kb: Some(link.actual_kb?),
            committed_kb: None,
            guest_total_kb: total,
            guest_free_kb: stats.and_then(|stats| stats.free_kb),
            guest_available_kb: available,
            active_kb: vm.and_then(|vm| vm.figures.active_kb).or_else(used),
            resident_kb: vm.and_then(|vm| vm.figures.resident_kb),
            swapped_out_kb: stats.and_then(|stats| stats.swapped_out_kb()),
            reservation_kb: knob("reservation_kb"),
            limit_kb: knob("limit_kb"),
        };
        Some(Seen {
            sample,
            swap_in_kb: stats.and_then(|stats| stats.swap_in_kb),
            // What the module took away, where it counts that, and what the guest dropped itself.
            refaults: match (
                vm.and_then(|vm| vm.figures.refaults),
                stats.and_then(|stats| stats.major_faults),
            ) {
                (None, None) => None,
                (module, guest) => Some(module.unwrap_or(0).saturating_add(guest.unwrap_or(0))),
            },
            shared_kb: vm.and_then(|vm| {
                let figures = &vm.figures;
                Some(figures.shared_kb?.saturating_add(figures.zero_kb?))
            }),
        })
    }

    fn carry_out(&mut self, order: &Order) {
        let what = format!("{}: {} ({})", order.name, long_kb(order.kb), order.why);
        if self.options.dry_run {
            say(Level::Info, &format!("would order {what}"));
            return;
        }
        say(Level::Info, &what);
        if let Some(link) = self.links.get(&order.name) {
            link.order(order.kb);
        }
    }

    fn one_line(&self) -> String {
        match &self.trouble {
            Some(trouble) => trouble.clone(),
            None => format!(
                "{} VMs, {} of them reached",
                self.config.vms.len(),
                self.controller.guests().len()
            ),
        }
    }
}
