// SPDX-License-Identifier: GPL-2.0

//! What each command does.

use crate::drive;
use crate::live;
use crate::output;
use crate::Usage;
use anyhow::{bail, Context};
use clap::CommandFactory;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};
use thinramctl::cli::{Cli, Command, VmCommand};
use thinramctl::config::{self, Config};
use thinramctl::daemon::api::{self, Request};
use thinramctl::daemon::{self, meminfo, Options};
use thinramctl::estimate::{read_vm, Collector, Estimate, Memory};
use thinramctl::guests::render_guest;
use thinramctl::host::{knob_json, Host, HostFigures};
use thinramctl::knobs::{nearest, Knob, Scope};
use thinramctl::metrics::expose;
use thinramctl::overview::{Overview, Watch};
use thinramctl::plan::render as render_plan;
use thinramctl::policy::{self, Asked};
use thinramctl::snapshot::Snapshot;
use thinramctl::status::{render_vm, Status, VmDetail};
use thinramctl::sysfs::{Dir, Error};
use thinramctl::text::escape;
use thinramctl::trace;
use thinramctl::vm::{Vm, VmFigures, VmName};

/// Figures of the host that are not in its struct of numbers.
const OTHER_FIGURES: [&str; 2] = ["state", "general_profit"];

/// Does what the command line says.
pub fn run(cli: &Cli) -> anyhow::Result<()> {
    match &cli.command {
        Command::Status { watch, count } => status(cli, *watch, *count),
        Command::Top { interval, count } if cli.json => status(cli, Some(*interval), *count),
        Command::Top { interval, count } => live::top(cli, *interval, *count),
        Command::Estimate { vms, sample } => estimate(cli, vms, *sample),
        Command::Record {
            file,
            interval,
            time,
        } => record(cli, file, *interval, *time),
        Command::Replay {
            file,
            config,
            policy,
        } => {
            let config = Config::load(&config_path(cli, config.as_deref()))?;
            let trace = trace::load(file).map_err(anyhow::Error::msg)?;
            let replay = trace::replay(&config, *policy, &trace);
            if cli.json {
                output::print_json(&replay, false)
            } else {
                output::print(&trace::render(&replay, output::width()))
            }
        }
        Command::Metrics => {
            let status = Status::read(&Dir::open(&cli.root)?)?;
            let memory = meminfo::read(&cli.root).ok();
            let report = daemon_report(cli);
            let text = expose(&status.host, memory, &status.vms, report.as_ref());
            if cli.json {
                output::print_json(&serde_json::json!({ "openmetrics": text }), false)
            } else {
                output::print(&text)
            }
        }
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "thinramctl", &mut text);
            output::print(&String::from_utf8(text)?)
        }
        Command::Man { dir: None } => {
            let mut text = Vec::new();
            clap_mangen::Man::new(Cli::command()).render(&mut text)?;
            output::print(&String::from_utf8(text)?)
        }
        Command::Man { dir: Some(dir) } => {
            let made = std::fs::create_dir_all(dir);
            made.and_then(|()| clap_mangen::generate_to(Cli::command(), dir))
                .with_context(|| format!("cannot write manual pages to {}", dir.display()))
        }
        Command::Get { name } => get(cli, &Target::host(cli)?, name),
        Command::Set { name, value } => set(cli, None, name, value),
        Command::Check { config } => check(cli, config.as_deref()),
        Command::Plan { config, snapshot } => plan(cli, config.as_deref(), snapshot),
        Command::Daemon { config, dry_run } => {
            let config = config_path(cli, config.as_deref());
            let options = Options {
                root: cli.root.clone(),
                config,
                dry_run: *dry_run,
            };
            Ok(daemon::run(options)?)
        }
        Command::Balloon { .. }
        | Command::Release { .. }
        | Command::Explain { .. }
        | Command::Admit { .. }
        | Command::Guests => drive::run(cli),
        Command::Vm(VmCommand::List) => list(cli),
        Command::Vm(VmCommand::Show { vm }) => show(cli, vm),
        Command::Vm(VmCommand::Get { vm, name }) => get(cli, &Target::vm(cli, vm)?, name),
        Command::Vm(VmCommand::Set { vm, name, value }) => {
            let knob = Knob::find(Scope::Vm, name);
            match config::vm_key(name) {
                Some(_) if knob.is_none() => drive::set(cli, vm, name, value),
                // The weight of a VM is the module's and the daemon's matter.
                Some(_) => {
                    drive::set_both(cli, vm, name, value, || set(cli, Some(vm), name, value))
                }
                None => set(cli, Some(vm), name, value),
            }
        }
        Command::Vm(VmCommand::Add { vm, settings }) => drive::add(cli, vm, settings),
        Command::Vm(VmCommand::Remove { vm }) => drive::remove(cli, vm),
    }
}

fn status(cli: &Cli, watch: Option<Duration>, count: Option<u64>) -> anyhow::Result<()> {
    let mut shown = 0;
    let start = Instant::now();
    let mut rates = Watch::default();
    loop {
        let status = Status::read(&Dir::open(&cli.root)?)?;
        let status = Overview {
            rates: match watch {
                Some(_) => rates.note(start.elapsed().as_secs_f64(), &status.vms),
                None => BTreeMap::new(),
            },
            daemon: daemon_report(cli),
            estimate: Estimate::load(&cli.root),
            status,
        };
        if cli.json {
            output::print_json(&status, watch.is_some())?;
        } else {
            let screen = status.render(output::width());
            let before = match (watch, output::is_terminal(), shown) {
                (Some(_), true, _) => "\x1b[H\x1b[2J",
                (Some(_), false, 1..) => "\n",
                _ => "",
            };
            output::print(&format!("{before}{screen}"))?;
        }
        shown += 1;
        match watch {
            Some(pause) if count.is_none_or(|count| shown < count) => thread::sleep(pause),
            _ => return Ok(()),
        }
    }
}

/// The daemon's report, where one runs and answers us.
pub(crate) fn daemon_report(cli: &Cli) -> Option<Value> {
    api::ask(&cli.root, &Request::Status {}).ok()
}

/// What the daemon says about a VM of the module.
fn guest_report(cli: &Cli, name: &VmName) -> Option<Value> {
    let report = daemon_report(cli)?;
    let guests = report["guests"].as_array()?;
    let shown = name.shown();
    let found = guests
        .iter()
        .find(|guest| guest["module_name"].as_str() == Some(&shown));
    found.cloned()
}

fn record(
    cli: &Cli,
    path: &Path,
    interval: Duration,
    time: Option<Duration>,
) -> anyhow::Result<()> {
    // Without a daemon no file is made.
    let mut snapshot = api::ask(&cli.root, &Request::Snapshot {})?;
    let end = time.map(|time| Instant::now() + time);
    let mut file = match path {
        path if path == Path::new("-") => None,
        path => Some(
            File::create_new(path).with_context(|| format!("cannot make {}", path.display()))?,
        ),
    };
    loop {
        let line = serde_json::to_string(&snapshot)? + "\n";
        match &mut file {
            None => output::print(&line)?,
            Some(file) => file
                .write_all(line.as_bytes())
                .with_context(|| format!("cannot write {}", path.display()))?,
        }
        let next = Instant::now() + interval;
        if end.is_some_and(|end| next > end) {
            return Ok(());
        }
        thread::sleep(interval);
        snapshot = api::ask(&cli.root, &Request::Snapshot {})?;
    }
}

fn estimate(cli: &Cli, wanted: &[OsString], sample: f64) -> anyhow::Result<()> {
    let vms = Dir::open(&cli.root)?.child("vms");
    let names: Vec<VmName> = wanted
        .iter()
        .map(|name| find_vm(&vms, name))
        .collect::<anyhow::Result<_>>()?;
    let mut all = Vm::read_all(&vms)?;
    let memory = Memory::find(&cli.root, &all).map_err(anyhow::Error::msg)?;
    all.retain(|vm| names.is_empty() || names.contains(&vm.name));
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let now = now.unwrap_or_default();
    let one_in_65536 = (sample * 65536.0).round().max(1.0) as u32;
    let mut pages = Collector::new(f64::from(one_in_65536) / 65536.0);
    let seed = u64::from(now.subsec_nanos());
    for vm in &all {
        let found = read_vm(&memory, vm, one_in_65536, seed, &mut pages);
        if !found.map_err(anyhow::Error::msg)? {
            output::complain(&format!(
                "thinramctl: no memory of {} was found: nothing maps it and no mount has its files",
                vm.name.shown()
            ))?;
        }
    }
    let result = pages.finish(now.as_secs());
    if names.is_empty() {
        // `status` does without it where it cannot be kept.
        let _ = result.save(&cli.root);
    }
    if cli.json {
        output::print_json(&result, false)
    } else {
        output::print(&result.render(output::width()))
    }
}

fn list(cli: &Cli) -> anyhow::Result<()> {
    let status = Status::read(&Dir::open(&cli.root)?)?;
    if cli.json {
        #[derive(Serialize)]
        struct List<'a> {
            vms: &'a [Vm],
        }
        output::print_json(&List { vms: &status.vms }, false)
    } else {
        output::print(&status.render_vms(output::width()))
    }
}

fn show(cli: &Cli, name: &OsStr) -> anyhow::Result<()> {
    let dir = Dir::open(&cli.root)?;
    let vms = dir.child("vms");
    let name = find_vm(&vms, name)?;
    let Some(vm) = Vm::read(&vms, &name)? else {
        bail!("VM {} ended while it was read", name.shown());
    };
    let guest = guest_report(cli, &name);
    if cli.json {
        output::print_json(
            &VmDetail {
                vm: &vm,
                sum_check: vm.sum_check(),
                guest,
            },
            false,
        )
    } else {
        let host = Host::read(&dir)?;
        let width = output::width();
        let mut screen = render_vm(&vm, &host, width);
        if let Some(guest) = guest {
            screen.push('\n');
            screen.push_str(&render_guest(&guest, width));
        }
        output::print(&screen)
    }
}

/// The VM that an operator means: by its name, or by its name as it is shown.
fn find_vm(vms: &Dir, wanted: &OsStr) -> anyhow::Result<VmName> {
    let names: Vec<VmName> = vms.dirs()?.into_iter().map(VmName::new).collect();
    let found = names.iter().find(|name| name.raw() == wanted).or_else(|| {
        names
            .iter()
            .find(|name| OsStr::new(&name.shown()) == wanted)
    });
    match found {
        Some(name) => Ok(name.clone()),
        None => {
            let wanted = escape(wanted.as_encoded_bytes());
            let shown: Vec<String> = names.iter().map(VmName::shown).collect();
            let near = nearest(&wanted, shown.iter().map(String::as_str));
            match (near.as_slice(), shown.as_slice()) {
                ([], []) => bail!("no VM is named {wanted}: there is none at all"),
                ([], _) => bail!("no VM is named {wanted}: see thinramctl vm list"),
                (near, _) => bail!("no VM is named {wanted}: do you mean {}?", near.join(", ")),
            }
        }
    }
}

/// The directory whose files are read or written.
struct Target {
    scope: Scope,
    dir: Dir,
    vm: Option<VmName>,
}

#[derive(Serialize)]
struct Shown<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    vm: Option<String>,
    name: &'a str,
    value: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    previous: Option<Value>,
}

impl Target {
    fn host(cli: &Cli) -> anyhow::Result<Self> {
        Ok(Self {
            scope: Scope::Host,
            dir: Dir::open(&cli.root)?,
            vm: None,
        })
    }

    fn vm(cli: &Cli, name: &OsStr) -> anyhow::Result<Self> {
        let vms = Dir::open(&cli.root)?.child("vms");
        let name = find_vm(&vms, name)?;
        Ok(Self {
            scope: Scope::Vm,
            dir: vms.child(name.raw()),
            vm: Some(name),
        })
    }

    /// Reads a file; `None` where the module does not have it.
    fn read(&self, name: &str) -> anyhow::Result<Option<String>> {
        let value = self.dir.read(name)?;
        match (&value, &self.vm) {
            (None, Some(vm)) if !self.dir.exists() => {
                bail!("VM {} ended while it was read", vm.shown())
            }
            _ => Ok(value),
        }
    }

    fn json(&self, name: &str, value: &str) -> Value {
        match Knob::find(self.scope, name) {
            Some(knob) => knob_json(knob, value),
            None => match value.parse::<i64>() {
                Ok(number) => number.into(),
                Err(_) => value
                    .parse::<u64>()
                    .map_or_else(|_| value.into(), Value::from),
            },
        }
    }

    fn vm_shown(&self) -> Option<String> {
        self.vm.as_ref().map(VmName::shown)
    }
}

/// Names of the files that a scope is known to have.
fn known_names(scope: Scope) -> Vec<&'static str> {
    let mut names: Vec<&str> = Knob::all(scope).map(|knob| knob.name).collect();
    match scope {
        Scope::Host => names.extend(HostFigures::NAMES.iter().chain(&OTHER_FIGURES)),
        Scope::Vm => names.extend(VmFigures::NAMES.iter().chain(&["stat"])),
    }
    names
}

/// The mistake of naming something that is not there.
fn unknown(scope: Scope, name: &str, candidates: &[&str]) -> anyhow::Error {
    let what = match scope {
        Scope::Host => "the host",
        Scope::Vm => "a VM",
    };
    let near = nearest(name, candidates.iter().copied());
    let hint = match near.as_slice() {
        [] => format!("there are {}", candidates.join(", ")),
        near => format!("do you mean {}?", near.join(", ")),
    };
    Usage(format!(
        "{what} has no `{}`: {hint}",
        escape(name.as_bytes())
    ))
    .into()
}

/// A file of a directory, and neither the directory nor one elsewhere.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0'])
}

fn get(cli: &Cli, target: &Target, name: &str) -> anyhow::Result<()> {
    let known = known_names(target.scope);
    if !is_plain(name) || target.dir.child(name).exists() {
        return Err(unknown(target.scope, name, &known));
    }
    let Some(value) = target.read(name)? else {
        if known.contains(&name) {
            bail!("this module has no `{name}`");
        }
        return Err(unknown(target.scope, name, &known));
    };
    if cli.json {
        let value = target.json(name, &value);
        output::print_json(
            &Shown {
                vm: target.vm_shown(),
                name,
                value,
                previous: None,
            },
            false,
        )
    } else {
        output::print(&format!("{value}\n"))
    }
}

fn set(cli: &Cli, vm: Option<&OsStr>, name: &str, text: &str) -> anyhow::Result<()> {
    let scope = if vm.is_some() { Scope::Vm } else { Scope::Host };
    let knob = Knob::find(scope, name);
    // What is wrong whatever the system says comes first.
    let value = match knob {
        Some(knob) => knob.parse(text).map_err(|error| Usage(error.to_string()))?,
        None if known_names(scope).contains(&name) => {
            return Err(Usage(format!("`{name}` is a figure of the module, no knob")).into());
        }
        None => text.to_owned(),
    };
    let target = match vm {
        Some(vm) => Target::vm(cli, vm)?,
        None => Target::host(cli)?,
    };
    let knobs: Vec<&str> = Knob::all(scope).map(|knob| knob.name).collect();
    match if is_plain(name) {
        target.dir.writable(name)
    } else {
        None
    } {
        Some(true) => {}
        Some(false) => bail!("{name} of this module cannot be set: it is read-only"),
        None if knob.is_some() && (target.vm.is_none() || target.dir.exists()) => {
            bail!("this module has no `{name}`")
        }
        None if knob.is_some() => bail!("VM {} ended", target.vm_shown().unwrap_or_default()),
        None => return Err(unknown(scope, name, &knobs)),
    }
    let previous = target.read(name)?;
    target
        .dir
        .write(name, &value)
        .map_err(|error| match (knob, &error) {
            (Some(knob), Error::Io { .. }) => anyhow::anyhow!(knob.explain(&value, &error)),
            _ => error.into(),
        })?;
    let Some(now) = target.read(name)? else {
        bail!("{name} was written, and is gone now");
    };
    if cli.json {
        let previous = previous.map(|previous| target.json(name, &previous));
        let value = target.json(name, &now);
        return output::print_json(
            &Shown {
                vm: target.vm_shown(),
                name,
                value,
                previous,
            },
            false,
        );
    }
    let show = |value: &str| knob.map_or_else(|| escape(value.as_bytes()), |knob| knob.show(value));
    let of = target
        .vm_shown()
        .map(|vm| format!(" of {vm}"))
        .unwrap_or_default();
    let before = previous.map_or_else(|| "?".to_owned(), |previous| show(&previous));
    let mut line = format!("{name}{of}: {before} -> {}", show(&now));
    if now != value {
        line.push_str(&format!(" (asked for {})", show(&value)));
    }
    output::print(&(line + "\n"))
}

pub(crate) fn config_path(cli: &Cli, given: Option<&Path>) -> PathBuf {
    given.map_or_else(|| cli.root.join(config::PATH), Path::to_owned)
}

fn check(cli: &Cli, given: Option<&Path>) -> anyhow::Result<()> {
    let path = config_path(cli, given);
    let config = Config::load(&path)?;
    let policy = config.host.policy;
    if cli.json {
        #[derive(Serialize)]
        struct Checked {
            ok: bool,
            policy: policy::PolicyKind,
            vms: usize,
        }
        return output::print_json(
            &Checked {
                ok: true,
                policy,
                vms: config.vms.len(),
            },
            false,
        );
    }
    let vms = match config.vms.len() {
        1 => "1 VM".to_owned(),
        count => format!("{count} VMs"),
    };
    let path = escape(path.as_os_str().as_encoded_bytes());
    output::print(&format!(
        "{path} is good: policy {}, {vms}\n",
        policy.name()
    ))
}

fn plan(cli: &Cli, given: Option<&Path>, snapshot: &Path) -> anyhow::Result<()> {
    let config = Config::load(&config_path(cli, given))?;
    let snapshot = Snapshot::load(snapshot)?;
    let plan = policy::step(&config, &snapshot, &Asked::default());
    if cli.json {
        output::print_json(&plan, false)
    } else {
        output::print(&render_plan(&plan, &snapshot, output::width()))
    }
}
