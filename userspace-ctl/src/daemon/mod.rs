// SPDX-License-Identifier: GPL-2.0

//! `thinramctl daemon`: the loop of [`crate::control`] with the world around it.
//!
//! One thread a VM talks to its QEMU, so that one that hangs holds up nobody else. The main thread
//! looks at the host once a second, and at once when the module says that its state got worse.
//! Nothing is stored: whatever happens to the daemon, the next one goes on from what is.

pub mod api;
mod find;
mod link;
mod meminfo;

pub use find::qmp_of_command_line;

use crate::config::{Config, VmConfig};
use crate::control::{linux_floor_kb, Controller, HostState, Observation, Order, Safety, Seen};
use crate::policy::Asked;
use crate::snapshot::VmSample;
use crate::sysfs::Dir;
use crate::text::escape;
use crate::units::{exact_kb, long_kb};
use crate::vm::{Vm, VmName};
use api::{GuestReport, Reply, Report, Request};
use link::Link;
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use thiserror::Error;

/// Pause between two looks.
const TICK: Duration = Duration::from_secs(1);

/// Why the daemon cannot run.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// Its socket cannot be made.
    #[error("cannot listen on {path}: {source}")]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
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
    let _ = writeln!(
        io::stderr(),
        "<{}>{}",
        level as u8,
        escape(message.as_bytes())
    );
}

struct Daemon {
    options: Options,
    config: Config,
    controller: Controller,
    asked: Asked,
    links: BTreeMap<String, Link>,
    /// VMs whose `cap` was written, with it.
    caps: BTreeMap<String, u64>,
    start: Instant,
    /// What was last wrong with the host, so that it is said once.
    trouble: Option<String>,
}

/// Runs until SIGTERM or SIGINT.
pub fn run(options: Options) -> Result<(), DaemonError> {
    let config = Config::load(&options.config)?;
    let socket = api::socket_path(&options.root);
    let listener = listen(&socket)?;
    let signals = Signals::new().map_err(DaemonError::Wait)?;
    let mut daemon = Daemon {
        controller: Controller::new(Safety::default()),
        asked: Asked::default(),
        links: BTreeMap::new(),
        caps: BTreeMap::new(),
        start: Instant::now(),
        trouble: None,
        options,
        config,
    };
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

/// Makes the socket; one that nobody answers on any more is replaced.
fn listen(path: &PathBuf) -> Result<UnixListener, DaemonError> {
    let failed = |source| DaemonError::Listen {
        path: path.clone(),
        source,
    };
    if UnixStream::connect(path).is_ok() {
        return Err(DaemonError::Running(path.clone()));
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

/// Signals as bytes that can be polled for.
struct Signals {
    hang_up: UnixStream,
    end: UnixStream,
}

impl Signals {
    fn new() -> io::Result<Self> {
        let pipe = |signals: &[i32]| {
            let (read, write) = UnixStream::pair()?;
            read.set_nonblocking(true)?;
            for signal in signals {
                signal_hook::low_level::pipe::register(*signal, write.try_clone()?)?;
            }
            Ok::<_, io::Error>(read)
        };
        Ok(Self {
            hang_up: pipe(&[SIGHUP])?,
            end: pipe(&[SIGTERM, SIGINT])?,
        })
    }

    /// Whether one came since the last look.
    fn came(mut stream: &UnixStream) -> bool {
        let mut bytes = [0; 64];
        let mut came = false;
        while matches!(stream.read(&mut bytes), Ok(1..)) {
            came = true;
        }
        came
    }
}

/// The module's `state`, which wakes us when it changes.
struct StateFile(Option<File>);

impl StateFile {
    /// Reads it, without which it would not wake us.
    fn arm(&mut self, dir: Option<&Dir>) {
        let mut text = String::new();
        let read = |file: &mut File, text: &mut String| {
            file.seek(SeekFrom::Start(0))
                .and_then(|_| file.read_to_string(text))
        };
        let armed = self
            .0
            .as_mut()
            .is_some_and(|file| read(file, &mut text).is_ok());
        if !armed {
            self.0 = dir.and_then(|dir| File::open(dir.path().join("state")).ok());
            if let Some(file) = &mut self.0 {
                let _ = read(file, &mut text);
            }
        }
    }
}

/// The service manager that started us, if one did.
#[derive(Default)]
struct Manager {
    last: String,
}

impl Manager {
    /// Says that we live, and how we are where that changed. The first time means "ready".
    fn tell(&mut self, status: &str) {
        let mut said = Vec::new();
        if self.last.is_empty() {
            said.push(NotifyState::Ready);
        }
        if self.last != status {
            said.push(NotifyState::Status(status));
        }
        if sd_notify::watchdog_enabled().is_some() {
            said.push(NotifyState::Watchdog);
        }
        if !said.is_empty() {
            // Without a manager there is nobody to tell.
            let _ = sd_notify::notify(&said);
        }
        status.clone_into(&mut self.last);
    }
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
            Ok(config) => {
                self.config = config;
                self.caps.clear();
                self.controller.decide_next();
                say(Level::Info, "configuration read again");
            }
            Err(error) => {
                say(
                    Level::Error,
                    &format!("{error}; the old configuration is kept"),
                );
            }
        }
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

        let mut vms = Vec::new();
        for config in self.config.vms.clone() {
            let vm = dir.and_then(|dir| {
                let read = Vm::read(&dir.child("vms"), &VmName::new(&config.name));
                read.unwrap_or_else(|error| {
                    say(Level::Warning, &error.to_string());
                    None
                })
            });
            self.connect(&config, vm.as_ref());
            if let (Some(dir), Some(vm)) = (dir, &vm) {
                self.cap(dir, &config, vm);
            }
            vms.extend(self.see(&config, vm.as_ref()));
        }
        let configured = |name: &String| self.config.vm(name).is_some();
        self.links.retain(|name, _| configured(name));
        self.caps.retain(|name, _| self.config.vm(name).is_some());

        let state = dir.and_then(|dir| dir.read("state").ok().flatten());
        let seen = Observation {
            now_s: self.start.elapsed().as_secs_f64(),
            state: state.and_then(|word| HostState::parse(&word)),
            host,
            vms,
        };
        for order in self.controller.tick(&self.config, &seen, &self.asked) {
            self.carry_out(&order);
        }
    }

    /// Keeps a thread for a VM whose socket is known.
    fn connect(&mut self, config: &VmConfig, vm: Option<&Vm>) {
        let found = || find::qmp_of(&self.options.root, vm?.figures.owner_pid?);
        let wanted = config.qmp.clone().or_else(found);
        let Some(path) = wanted else { return };
        if self
            .links
            .get(&config.name)
            .is_none_or(|link| link.path() != path)
        {
            self.links.insert(config.name.clone(), Link::start(path));
        }
    }

    /// Writes a VM's cap to the module, once.
    fn cap(&mut self, dir: &Dir, config: &VmConfig, vm: &Vm) {
        let Some(cap) = config.cap_kb else { return };
        let has = vm.knobs.get("limit_kb");
        if has.is_none() || self.caps.get(&config.name) == Some(&cap) {
            return;
        }
        self.caps.insert(config.name.clone(), cap);
        if has.is_some_and(|value| *value == cap.to_string()) || self.options.dry_run {
            return;
        }
        let vms = dir.child("vms").child(&config.name);
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
        };
        Some(Seen {
            sample,
            swap_in_kb: stats.and_then(|stats| stats.swap_in_kb),
            refaults: vm.and_then(|vm| vm.figures.refaults),
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

    fn answer(&mut self, request: Request) -> Result<Reply, String> {
        match request {
            Request::Status => Ok(Reply::Status(self.report())),
            Request::Explain { vm } => {
                self.known(&vm)?;
                let guest = self.controller.guests().get(&vm);
                let decisions = guest.map(|guest| guest.decisions().cloned().collect());
                Ok(Reply::Explain {
                    now_s: self.start.elapsed().as_secs_f64(),
                    decisions: decisions.unwrap_or_default(),
                })
            }
            Request::Balloon { vm, kb } => {
                let config = self.known(&vm)?;
                api::within_bounds(config, kb)?;
                self.asked.sizes.insert(vm, kb);
                self.controller.decide_next();
                Ok(Reply::Done {})
            }
            Request::Release { vm } => {
                self.known(&vm)?;
                self.asked.sizes.remove(&vm);
                self.controller.release(&vm);
                self.controller.decide_next();
                Ok(Reply::Done {})
            }
        }
    }

    fn known(&self, name: &str) -> Result<&VmConfig, String> {
        self.config
            .vm(name)
            .ok_or_else(|| format!("no VM named {} is configured", escape(name.as_bytes())))
    }

    fn report(&self) -> Report {
        let guests = self.config.vms.iter().map(|config| {
            let link = self.links.get(&config.name).map(Link::look);
            let guest = self.controller.guests().get(&config.name);
            let stats = link.as_ref().and_then(link::Seen::fresh_stats);
            let total = stats.and_then(|stats| stats.total_kb);
            let available = stats.and_then(|stats| stats.available_kb);
            let committed = total
                .zip(available)
                .map(|(total, available)| total.saturating_sub(available))
                .map(|used| used + stats.and_then(|s| s.swapped_out_kb()).unwrap_or(0));
            let last = guest.and_then(|guest| guest.decisions().last());
            GuestReport {
                name: config.name.clone(),
                policy: self.config.policy_of(config),
                by_hand: self.asked.sizes.contains_key(&config.name),
                driver: link.as_ref().map(|link| link.driver).unwrap_or_default(),
                conduct: guest.map(crate::control::Guest::conduct),
                min_kb: config.dynamic_min_kb,
                entitlement_kb: config.entitlement_kb,
                max_kb: config.ceiling_kb(),
                chunk_kb: config.chunk_kb,
                amr: config.amr,
                comfortable_kb: committed.map(|kb| kb.max(linux_floor_kb(config.static_max_kb))),
                target_kb: last.and_then(|last| last.wanted_kb),
                ordered_kb: guest.map(crate::control::Guest::ordered_kb),
                current_kb: link.as_ref().and_then(|link| link.actual_kb),
                guest_total_kb: total,
                guest_free_kb: stats.and_then(|stats| stats.free_kb),
                guest_available_kb: available,
                committed_kb: committed,
                pressure_percent: committed
                    .zip(total)
                    .and_then(|(c, t)| (c * 100).checked_div(t)),
                reason: last.map(|last| last.reason.clone()),
                error: match &link {
                    Some(link) => link.error.clone(),
                    None => Some("its QMP socket is not known".to_owned()),
                },
                tally: guest.map(crate::control::Guest::tally),
            }
        });
        Report {
            policy: self.config.host.policy,
            admission_ok: self.controller.admission_ok(),
            trouble: self.trouble.clone(),
            guests: guests.collect(),
        }
    }
}

/// Waits for a client, a signal, a worse state (then the answer is `true`) or the time.
fn wait(
    listener: &UnixListener,
    signals: &Signals,
    state: Option<&File>,
    until: Instant,
) -> io::Result<bool> {
    let left = until.saturating_duration_since(Instant::now());
    let left = Timespec::try_from(left).map_err(|_| io::Error::from(ErrorKind::InvalidInput))?;
    let mut fds = vec![
        PollFd::new(listener, PollFlags::IN),
        PollFd::new(&signals.hang_up, PollFlags::IN),
        PollFd::new(&signals.end, PollFlags::IN),
    ];
    if let Some(file) = state {
        fds.push(PollFd::new(file, PollFlags::PRI));
    }
    match poll(&mut fds, Some(&left)) {
        Ok(_) => Ok(fds
            .get(3)
            .is_some_and(|fd| fd.revents().contains(PollFlags::PRI))),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
