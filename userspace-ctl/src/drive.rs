// SPDX-License-Identifier: GPL-2.0

//! Commands that go to the daemon, or do without it what it would do.

use crate::commands::{config_path, daemon_report};
use crate::output;
use crate::{Refused, Usage};
use anyhow::bail;
use serde::Serialize;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};
use thinramctl::admission::{self, Applicant, Reservations, Running, Situation};
use thinramctl::cli::{self, Cli, Command};
use thinramctl::config::{self, Config, ConfigError};
use thinramctl::daemon::api::{self, ApiError, Request};
use thinramctl::daemon::{meminfo, module_name};
use thinramctl::guests::{render_decisions, render_guests, render_rates, RateRow};
use thinramctl::qmp::{Balloon, Client};
use thinramctl::status::Status;
use thinramctl::sysfs::Dir;
use thinramctl::text::escape;
use thinramctl::units;

/// Pause between two questions whether a VM may start.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// Does what the command line says.
pub fn run(cli: &Cli) -> anyhow::Result<()> {
    match &cli.command {
        Command::Balloon { vm, size, config } => balloon(cli, vm, size, config.as_deref()),
        Command::Release { vm } => {
            let request = Request::Release { vm: vm.clone() };
            done(
                cli,
                &request,
                &format!("{} is left to its policy", escape(vm.as_bytes())),
            )
        }
        Command::Explain { vm } => explain(cli, vm),
        Command::Admit {
            vm: Some(vm),
            cancel: true,
            ..
        } => {
            let said = format!("nothing is kept for {} any more", escape(vm.as_bytes()));
            done(cli, &Request::Cancel { vm: vm.clone() }, &said)
        }
        Command::Admit { .. } => admit(cli),
        _ => guests(cli),
    }
}

/// A VM's name as the daemon has it.
fn daemon_name(vm: &OsStr) -> anyhow::Result<&str> {
    match vm.to_str() {
        Some(vm) => Ok(vm),
        None => bail!(
            "{} is no name of the configuration: it is no UTF-8",
            escape(vm.as_encoded_bytes())
        ),
    }
}

/// Changes a setting of the daemon's.
pub fn set(cli: &Cli, vm: &OsStr, key: &str, value: &str) -> anyhow::Result<()> {
    let vm = daemon_name(vm)?;
    let request = Request::Set {
        vm: vm.to_owned(),
        key: key.to_owned(),
        value: value.to_owned(),
    };
    let (name, value) = (escape(vm.as_bytes()), escape(value.as_bytes()));
    done(cli, &request, &format!("{key} of {name}: {value}"))
}

/// Sets what is both a knob and a setting: the daemon's where it sizes that VM, and the module's by
/// `module`.
pub fn set_both(
    cli: &Cli,
    vm: &OsStr,
    key: &str,
    value: &str,
    module: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let report = daemon_report(cli).unwrap_or_default();
    let sized = report["guests"].as_array().is_some_and(|guests| {
        guests
            .iter()
            .any(|guest| guest["name"].as_str() == vm.to_str())
    });
    if !sized {
        return module();
    }
    let request = Request::Set {
        vm: daemon_name(vm)?.to_owned(),
        key: key.to_owned(),
        value: value.to_owned(),
    };
    api::ask(&cli.root, &request)?;
    if Dir::open(&cli.root).is_ok_and(|dir| dir.child("vms").child(vm).writable(key).is_some()) {
        return module();
    }
    let vm = escape(vm.as_encoded_bytes());
    if cli.json {
        output::print_json(&serde_json::json!({}), false)
    } else {
        output::print(&format!(
            "{key} of {vm}: {} (the daemon's)\n",
            escape(value.as_bytes())
        ))
    }
}

/// Has the daemon size one more VM.
pub fn add(cli: &Cli, vm: &str, settings: &[(String, String)]) -> anyhow::Result<()> {
    let mut all = BTreeMap::new();
    for (key, value) in settings {
        if all.insert(key.clone(), value.clone()).is_some() {
            return Err(Usage(format!("{key} is given twice")).into());
        }
    }
    config::vm_from_settings(vm, &all).map_err(Usage)?;
    let request = Request::Add {
        vm: vm.to_owned(),
        settings: all,
    };
    let said = format!("{} is sized from now on", escape(vm.as_bytes()));
    done(cli, &request, &said)
}

/// Has the daemon leave a VM alone.
pub fn remove(cli: &Cli, vm: &str) -> anyhow::Result<()> {
    let said = format!("{} is left alone from now on", escape(vm.as_bytes()));
    done(cli, &Request::Remove { vm: vm.to_owned() }, &said)
}

#[derive(Serialize)]
struct Admission {
    admitted: bool,
    vm: String,
    min_kb: u64,
    max_kb: u64,
    /// What of the maximum it could have now; absent where it was refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    room_kb: Option<u64>,
    /// Whether its minimum is kept for it.
    reserved: bool,
    hold_s: u64,
    reason: String,
}

fn admit(cli: &Cli) -> anyhow::Result<()> {
    let Command::Admit {
        min: Some(min),
        max,
        vm,
        wait,
        hold,
        unshare_risk,
        config,
        ..
    } = &cli.command
    else {
        bail!("not a question of admission");
    };
    let max_kb = max.unwrap_or(*min);
    if max_kb < *min {
        let (min, max) = (units::exact_kb(*min), units::exact_kb(max_kb));
        return Err(Usage(format!("--min ({min}) is above --max ({max})")).into());
    }
    let vm = match vm {
        Some(vm) => vm.clone(),
        None => format!("unnamed-{}", std::process::id()),
    };
    let end = wait.map(|wait| Instant::now() + wait);
    let (room_kb, reserved, reason) = loop {
        let waits = end.is_some_and(|end| Instant::now() < end);
        let request = Request::Admit {
            vm: vm.clone(),
            min_kb: *min,
            max_kb,
            unshare_risk_percent: *unshare_risk,
            hold_s: hold.as_secs(),
            wait: waits,
        };
        let (room_kb, reserved, reason) = match api::ask(&cli.root, &request) {
            Ok(answer) => (
                answer["room_kb"].as_u64(),
                true,
                answer["reason"].as_str().unwrap_or("").to_owned(),
            ),
            Err(ApiError::NotRunning(_)) => {
                let (now, by_config) = situation(cli, config.as_deref())?;
                let applicant = Applicant {
                    name: vm.clone(),
                    min_kb: *min,
                    max_kb,
                    unshare_risk_percent: unshare_risk.unwrap_or(by_config),
                };
                match admission::admit(&now, &Reservations::default(), &applicant) {
                    Ok(room_kb) => (
                        Some(room_kb),
                        false,
                        format!(
                            "the daemon does not run, so nothing is kept for it{}",
                            admission::room(&applicant, room_kb)
                        ),
                    ),
                    Err(refusal) => (None, false, refusal.reason),
                }
            }
            Err(error) => return Err(error.into()),
        };
        if room_kb.is_some() || !waits {
            break (room_kb, reserved, reason);
        }
        thread::sleep(ASK_AGAIN);
    };
    let admitted = room_kb.is_some();
    if !admitted {
        // What was kept while it waited; it lapses by itself soon where this fails.
        let _ = api::ask(&cli.root, &Request::Cancel { vm: vm.clone() });
    }
    let answer = Admission {
        admitted,
        vm: escape(vm.as_bytes()),
        min_kb: *min,
        max_kb,
        room_kb,
        reserved: reserved && admitted,
        hold_s: hold.as_secs(),
        reason: reason.clone(),
    };
    if cli.json {
        output::print_json(&answer, false)?;
    } else if admitted {
        output::print(&format!("admitted: {reason}\n"))?;
    }
    if admitted {
        Ok(())
    } else {
        Err(Refused(reason).into())
    }
}

/// The host as the daemon would see it, and the configured risk.
fn situation(cli: &Cli, given: Option<&Path>) -> anyhow::Result<(Situation, u64)> {
    let path = config_path(cli, given);
    let config = match Config::load(&path) {
        Ok(config) => config,
        // Without a configuration its defaults hold.
        Err(ConfigError::Read { cause, .. })
            if given.is_none() && cause.kind() == std::io::ErrorKind::NotFound =>
        {
            Config::default()
        }
        Err(error) => return Err(error.into()),
    };
    let status = Status::read(&Dir::open(&cli.root)?)?;
    let host = meminfo::read(&cli.root).map_err(anyhow::Error::msg)?;
    let mut running: BTreeMap<String, Running> = BTreeMap::new();
    for vm in &status.vms {
        let resident_kb = vm.figures.resident_kb.unwrap_or(0);
        let name = vm.name.raw();
        let ours = config
            .vms
            .iter()
            .find(|config| module_name([name].into_iter(), &config.name).is_some());
        let holds = Running {
            min_kb: ours.map_or(resident_kb, |config| config.dynamic_min_kb),
            resident_kb,
        };
        running.insert(name.to_string_lossy().into_owned(), holds);
    }
    let situation = Situation {
        total_kb: host.total_kb,
        available_kb: host.available_kb,
        saved_kb: status.host.figures.saved_kb.unwrap_or(0),
        slush_kb: config.host.slush_kb,
        overhead_kb: config.host.vm_overhead_kb,
        running,
    };
    Ok((situation, config.host.unshare_risk_percent))
}

/// How long QEMU may take to answer when it is asked without a daemon.
const QMP_LIMIT: Duration = Duration::from_secs(5);

/// Asks the daemon for something that has no answer but that it is done.
fn done(cli: &Cli, request: &Request, said: &str) -> anyhow::Result<()> {
    let answer = api::ask(&cli.root, request)?;
    if cli.json {
        output::print_json(&answer, false)
    } else {
        output::print(&format!("{said}\n"))
    }
}

fn balloon(cli: &Cli, vm: &str, size: &str, config: Option<&Path>) -> anyhow::Result<()> {
    let kb = cli::size(size).map_err(Usage)?;
    let request = Request::Balloon {
        vm: vm.to_owned(),
        kb,
    };
    let name = escape(vm.as_bytes());
    match done(
        cli,
        &request,
        &format!("{name} shall have {} and keeps it", units::exact_kb(kb)),
    ) {
        Err(error) if matches!(error.downcast_ref(), Some(ApiError::NotRunning(_))) => {}
        outcome => return outcome,
    }
    // Without a daemon QEMU is told directly, and nobody keeps what it is told.
    let config = Config::load(&config_path(cli, config))?;
    let Some(vm) = config.vm(vm) else {
        bail!("no VM named {name} is configured")
    };
    api::within_bounds(vm, kb).map_err(ApiError::Refused)?;
    let Some(socket) = &vm.qmp else {
        bail!("the daemon does not run, and the configuration names no qmp socket for {name}")
    };
    Balloon::open(Client::connect(socket, QMP_LIMIT)?, 2)?.set_kb(kb)?;
    if cli.json {
        output::print_json(&serde_json::json!({}), false)
    } else {
        output::print(&format!(
            "{name} was told to have {}\n",
            units::exact_kb(kb)
        ))
    }
}

fn guests(cli: &Cli) -> anyhow::Result<()> {
    let report = api::ask(&cli.root, &Request::Status {})?;
    if cli.json {
        output::print_json(&report, false)
    } else {
        let width = output::width();
        let rates = RateRow::of_report(&report);
        let mut screen = render_guests(&report, width);
        if !rates.is_empty() {
            screen.push('\n');
            screen.push_str(&render_rates(&rates, width));
        }
        output::print(&screen)
    }
}

fn explain(cli: &Cli, vm: &str) -> anyhow::Result<()> {
    let answer = api::ask(&cli.root, &Request::Explain { vm: vm.to_owned() })?;
    if cli.json {
        output::print_json(&answer, false)
    } else {
        output::print(&render_decisions(&answer, output::width()))
    }
}
