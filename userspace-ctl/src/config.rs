// SPDX-License-Identifier: GPL-2.0

//! `/etc/thinram/thinram.toml`: what the operator wants, checked as a whole.
//!
//! Sizes are strings with units. Every error names the line that it is about, and a key that is not
//! known is one: a limit with a typing mistake must not be no limit.

use crate::files;
use crate::policy::PolicyKind;
use crate::text::escape;
use crate::units;
use serde::de::{self, Deserializer, Visitor};
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use thiserror::Error;
use toml::Spanned;

/// Where it lies below the root.
pub const PATH: &str = "etc/thinram/thinram.toml";
/// What AMR's chunks and targets are multiples of, in KiB.
pub const AMR_UNIT_KB: u64 = 64 << 10;

/// More than any host's VMs take.
const MOST_BYTES: u64 = 16 << 20;
/// Longest name of a directory, and longest path of a socket (`sun_path` less its end), in bytes.
const MOST_NAME: usize = 255;
const MOST_SOCKET: usize = 107;

const DEFAULT_SLUSH_KB: u64 = 9 << 10;
const DEFAULT_INTERVAL_S: u64 = 10;
const DEFAULT_CHUNK_KB: u64 = 256 << 10;
const DEFAULT_SHARES: u64 = 1000;
const DEFAULT_BUFFER_PERCENT: u64 = 20;
const DEFAULT_IDLE_TAX_PERCENT: u64 = 75;
const DEFAULT_UNSHARE_RISK_PERCENT: u64 = 100;
const DEFAULT_PRIORITY: u64 = 1;

/// Why a configuration is refused.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {cause}")]
    Read {
        /// Which one.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// It says something wrong.
    #[error("{path}:{line}: {message}")]
    Wrong {
        /// Which file.
        path: PathBuf,
        /// Line, counted from 1.
        line: usize,
        /// What is wrong and what would be right.
        message: String,
    },
}

/// Everything, checked and with defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The host.
    pub host: HostConfig,
    /// The VMs, in the order of the file; names are unique.
    pub vms: Vec<VmConfig>,
}

/// The table `[host]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostConfig {
    /// Policy of the VMs that name none.
    pub policy: PolicyKind,
    /// Host memory that is never given to VMs.
    pub slush_kb: u64,
    /// Seconds between two steps of the policy.
    pub interval_s: u64,
    /// Part of the worst case, all sharing breaking at once, that need not be backed by memory.
    pub unshare_risk_percent: u64,
    /// What a VM costs beside its memory; admission counts it.
    pub vm_overhead_kb: u64,
    /// How much dearer idle memory is under `shares`.
    pub idle_tax_percent: u64,
    /// Loopback port on which the daemon tells its metrics.
    pub metrics_port: Option<u16>,
}

/// A table `[[vm]]`: `static_min <= dynamic_min <= dynamic_max <= static_max`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmConfig {
    /// Name, as in the mount.
    pub name: String,
    /// Its QMP socket; without one it is looked for.
    pub qmp: Option<PathBuf>,
    /// The socket of its guest agent; without one it is looked for.
    pub agent: Option<PathBuf>,
    /// Least that the VM can run with.
    pub static_min_kb: u64,
    /// Least that a policy may leave it.
    pub dynamic_min_kb: u64,
    /// Most that a policy may give it.
    pub dynamic_max_kb: u64,
    /// What it was started with.
    pub static_max_kb: u64,
    /// Its size under `manual` before one is asked for.
    pub start_target_kb: Option<u64>,
    /// What it has a right to under `entitlement`.
    pub entitlement_kb: Option<u64>,
    /// Whether `entitlement` moves its memory.
    pub amr: bool,
    /// Step of `entitlement`.
    pub chunk_kb: u64,
    /// Weight under `shares`.
    pub shares: u64,
    /// What `pressure` adds to the committed memory.
    pub buffer_percent: u64,
    /// Weight under `pressure`.
    pub priority: u64,
    /// Policy; `None` is the host's.
    pub policy: Option<PolicyKind>,
    /// Hard cap: the module's `limit_kb`, and no target is above it.
    pub cap_kb: Option<u64>,
    /// Whether the guest's own root may ask for a size.
    pub guest_control: bool,
    /// The settings as they were given, without the name; values as an operator writes them.
    pub given: BTreeMap<String, String>,
}

/// What the value of a VM's setting is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    /// A size with a unit.
    Size,
    /// A path or a word.
    Text,
    /// A percentage.
    Percent,
    /// A whole number.
    Number,
    /// On or off.
    Switch,
}

/// One setting of a VM.
#[derive(Debug)]
pub struct Key {
    /// As it is written in the file.
    pub name: &'static str,
    /// What its value is.
    pub kind: KeyKind,
    /// One sentence.
    pub help: &'static str,
}

const fn key(name: &'static str, kind: KeyKind, help: &'static str) -> Key {
    Key { name, kind, help }
}

/// Every setting of a VM but its name.
pub const VM_KEYS: &[Key] = &[
    key("qmp", KeyKind::Text, "QMP socket; looked for without it."),
    key(
        "agent",
        KeyKind::Text,
        "Guest agent's socket; looked for without it.",
    ),
    key(
        "static_min",
        KeyKind::Size,
        "Least that the VM can run with; default dynamic_min.",
    ),
    key(
        "dynamic_min",
        KeyKind::Size,
        "Least that a policy may leave it.",
    ),
    key(
        "dynamic_max",
        KeyKind::Size,
        "Most that a policy may give it.",
    ),
    key(
        "static_max",
        KeyKind::Size,
        "What it was started with; default dynamic_max.",
    ),
    key(
        "start_target",
        KeyKind::Size,
        "Its size under manual before one is asked for.",
    ),
    key(
        "entitlement",
        KeyKind::Size,
        "What it has a right to under entitlement.",
    ),
    key(
        "amr",
        KeyKind::Switch,
        "Whether entitlement moves its memory; default off.",
    ),
    key(
        "chunk",
        KeyKind::Size,
        "Step of entitlement, a multiple of 64M; default 256M.",
    ),
    key(
        "shares",
        KeyKind::Number,
        "Weight under shares; default 1000.",
    ),
    key(
        "buffer_percent",
        KeyKind::Percent,
        "Added to the committed memory by pressure; default 20.",
    ),
    key(
        "priority",
        KeyKind::Number,
        "Weight under pressure; default 1.",
    ),
    key("policy", KeyKind::Text, "Its policy; default the host's."),
    key(
        "cap",
        KeyKind::Size,
        "No target above it, and the module's limit_kb.",
    ),
    key(
        "guest_control",
        KeyKind::Switch,
        "Whether the guest's root may ask for a size; default off.",
    ),
];

/// The setting of that name.
pub fn vm_key(name: &str) -> Option<&'static Key> {
    VM_KEYS.iter().find(|key| key.name == name)
}

/// A VM from settings as an operator writes them; an error is a sentence.
pub fn vm_from_settings(
    name: &str,
    settings: &BTreeMap<String, String>,
) -> Result<VmConfig, String> {
    let mut text = format!("[[vm]]\nname = {}\n", quoted(name));
    for (key, value) in settings {
        let Some(known) = vm_key(key) else {
            let near = crate::knobs::nearest(key, VM_KEYS.iter().map(|key| key.name));
            let hint = match near.as_slice() {
                [] => String::new(),
                near => format!(": do you mean {}?", near.join(", ")),
            };
            return Err(format!(
                "`{}` is no setting of a VM{hint}",
                crate::text::escape(key.as_bytes())
            ));
        };
        let shown = || crate::text::escape(value.as_bytes());
        let literal = match known.kind {
            KeyKind::Size | KeyKind::Text | KeyKind::Percent => quoted(value),
            KeyKind::Number => units::parse_number(value)
                .map_err(|error| format!("{key}: {error}"))?
                .to_string(),
            KeyKind::Switch => match value.as_str() {
                "on" | "yes" | "true" | "1" => "true".to_owned(),
                "off" | "no" | "false" | "0" => "false".to_owned(),
                _ => return Err(format!("{key}: `{}` is neither on nor off", shown())),
            },
        };
        text.push_str(&format!("{key} = {literal}\n"));
    }
    let config = Config::parse(&text).map_err(|(_, message)| message)?;
    match config.vms.into_iter().next() {
        Some(vm) => Ok(vm),
        None => Err(format!("`{name}` gives no VM")),
    }
}

/// A text as TOML has it.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// A value of the file as an operator writes it.
fn as_written(value: &toml::Value) -> Option<String> {
    Some(match value {
        toml::Value::String(text) => text.clone(),
        toml::Value::Integer(number) => number.to_string(),
        toml::Value::Boolean(true) => "on".to_owned(),
        toml::Value::Boolean(false) => "off".to_owned(),
        _ => return None,
    })
}

impl VmConfig {
    /// Most that a target may be.
    pub fn ceiling_kb(&self) -> u64 {
        self.cap_kb
            .map_or(self.dynamic_max_kb, |cap| cap.min(self.dynamic_max_kb))
    }
}

#[derive(Clone, Copy)]
struct Size(u64);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;
        impl Visitor<'_> for SizeVisitor {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size with a unit in quotes, such as \"512M\" or \"4G\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                let kb = units::parse_kb(text).map_err(E::custom)?;
                if kb > 0 && text.ends_with(|c: char| c.is_ascii_digit()) {
                    return Err(E::custom(format_args!(
                        "`{text}` has no unit: write \"{text}K\", \"{text}M\" or \"{text}G\""
                    )));
                }
                Ok(Size(kb))
            }
        }
        deserializer.deserialize_any(SizeVisitor)
    }
}

#[derive(Clone, Copy)]
struct Percent(u64);

impl<'de> Deserialize<'de> for Percent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PercentVisitor;
        impl Visitor<'_> for PercentVisitor {
            type Value = Percent;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a percentage such as 20 or \"20%\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Percent, E> {
                units::parse_percent(text).map(Percent).map_err(E::custom)
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Percent, E> {
                u64::try_from(value)
                    .map(Percent)
                    .map_err(|_| E::custom(format_args!("`{value}` is below 0")))
            }
        }
        deserializer.deserialize_any(PercentVisitor)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    #[serde(default)]
    host: RawHost,
    #[serde(default)]
    vm: Vec<Spanned<RawVm>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct RawHost {
    policy: Option<PolicyKind>,
    slush: Option<Size>,
    interval_s: Option<Spanned<u64>>,
    unshare_risk: Option<Spanned<Percent>>,
    vm_overhead: Option<Size>,
    idle_tax_percent: Option<Spanned<Percent>>,
    metrics_port: Option<Spanned<u64>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawVm {
    name: Spanned<String>,
    qmp: Option<Spanned<PathBuf>>,
    agent: Option<Spanned<PathBuf>>,
    static_min: Option<Spanned<Size>>,
    dynamic_min: Option<Spanned<Size>>,
    dynamic_max: Option<Spanned<Size>>,
    static_max: Option<Spanned<Size>>,
    start_target: Option<Spanned<Size>>,
    entitlement: Option<Spanned<Size>>,
    #[serde(default)]
    amr: bool,
    chunk: Option<Spanned<Size>>,
    shares: Option<Spanned<u64>>,
    buffer_percent: Option<Spanned<Percent>>,
    priority: Option<Spanned<u64>>,
    policy: Option<PolicyKind>,
    cap: Option<Spanned<Size>>,
    guest_control: Option<Spanned<bool>>,
}

impl Default for Config {
    /// What holds where nothing is configured.
    fn default() -> Self {
        Self {
            host: HostConfig {
                policy: PolicyKind::default(),
                slush_kb: DEFAULT_SLUSH_KB,
                interval_s: DEFAULT_INTERVAL_S,
                unshare_risk_percent: DEFAULT_UNSHARE_RISK_PERCENT,
                vm_overhead_kb: 0,
                idle_tax_percent: DEFAULT_IDLE_TAX_PERCENT,
                metrics_port: None,
            },
            vms: Vec::new(),
        }
    }
}

/// A message and where in the text it belongs.
type Fault = (Range<usize>, String);

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let bytes = files::read(path, MOST_BYTES).map_err(|cause| ConfigError::Read {
            path: path.to_owned(),
            cause,
        })?;
        let wrong = |line, message| ConfigError::Wrong {
            path: path.to_owned(),
            line,
            message,
        };
        match String::from_utf8(bytes) {
            Ok(text) => Self::parse(&text).map_err(|(line, message)| wrong(line, message)),
            Err(error) => {
                let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
                let line = 1 + good.iter().filter(|byte| **byte == b'\n').count();
                Err(wrong(line, "these bytes are no UTF-8 text".to_owned()))
            }
        }
    }

    /// Checks a text; an error is a line, counted from 1, and a message.
    pub fn parse(text: &str) -> Result<Self, (usize, String)> {
        let raw: RawConfig = toml::from_str(text).map_err(|error| {
            let span = error.span().unwrap_or(0..0);
            (line_of(text, span.start), in_words(error.message()))
        })?;
        let mut config =
            Self::check(raw).map_err(|(span, message)| (line_of(text, span.start), message))?;
        // What was given, as opposed to what holds by default.
        #[derive(Deserialize)]
        struct Given {
            #[serde(default)]
            vm: Vec<toml::Table>,
        }
        let given: Given = toml::from_str(text).map_err(|error| (1, in_words(error.message())))?;
        for (vm, table) in config.vms.iter_mut().zip(given.vm) {
            vm.given = table
                .iter()
                .filter(|(key, _)| *key != "name")
                .filter_map(|(key, value)| Some((key.clone(), as_written(value)?)))
                .collect();
        }
        Ok(config)
    }

    fn check(raw: RawConfig) -> Result<Self, Fault> {
        let host = HostConfig {
            policy: raw.host.policy.unwrap_or_default(),
            slush_kb: raw.host.slush.map_or(DEFAULT_SLUSH_KB, |size| size.0),
            interval_s: within(
                "interval_s",
                raw.host.interval_s,
                DEFAULT_INTERVAL_S,
                1,
                3600,
            )?,
            unshare_risk_percent: percent(
                "unshare_risk",
                raw.host.unshare_risk,
                DEFAULT_UNSHARE_RISK_PERCENT,
                100,
            )?,
            vm_overhead_kb: raw.host.vm_overhead.map_or(0, |size| size.0),
            idle_tax_percent: percent(
                "idle_tax_percent",
                raw.host.idle_tax_percent,
                DEFAULT_IDLE_TAX_PERCENT,
                99,
            )?,
            metrics_port: match raw.host.metrics_port {
                Some(port) => {
                    let port = within("metrics_port", Some(port), 0, 1, 65535)?;
                    u16::try_from(port).ok()
                }
                None => None,
            },
        };
        let mut vms = Vec::with_capacity(raw.vm.len());
        let mut seen = HashMap::new();
        let mut names = Vec::new();
        for (nth, vm) in raw.vm.into_iter().enumerate() {
            let table = vm.span();
            let vm = vm.into_inner();
            let name = vm.name.span();
            let checked = VmConfig::check(vm, table)?;
            if let Some(first) = seen.insert(checked.name.clone(), nth + 1) {
                let message = format!(
                    "there are two VMs named `{}`: [[vm]] {first} and {}",
                    checked.name,
                    nth + 1
                );
                return Err((name, message));
            }
            vms.push(checked);
            names.push(name);
        }
        let config = Self { host, vms };
        match config.shared_socket() {
            Some((nth, message)) => Err((names.swap_remove(nth), message)),
            None => Ok(config),
        }
    }

    /// A VM, by its place, with a socket that is named before; an error in words.
    pub fn shared_socket(&self) -> Option<(usize, String)> {
        let mut sockets = HashMap::new();
        for (nth, vm) in self.vms.iter().enumerate() {
            for (key, socket) in [("qmp", &vm.qmp), ("agent", &vm.agent)] {
                let Some(socket) = socket else { continue };
                if let Some(other) = sockets.insert(socket, &vm.name) {
                    let message = format!(
                        "VM `{}`: {key} ({}) is a socket of VM `{other}` as well: each serves one",
                        vm.name,
                        escape(socket.as_os_str().as_encoded_bytes())
                    );
                    return Some((nth, message));
                }
            }
        }
        None
    }

    /// The VM of that name.
    pub fn vm(&self, name: &str) -> Option<&VmConfig> {
        self.vms.iter().find(|vm| vm.name == name)
    }

    /// The policy that a VM is under.
    pub fn policy_of(&self, vm: &VmConfig) -> PolicyKind {
        vm.policy.unwrap_or(self.host.policy)
    }
}

impl VmConfig {
    fn check(raw: RawVm, table: Range<usize>) -> Result<Self, Fault> {
        let name = raw.name.get_ref().clone();
        let named = raw.name.span();
        let odd = |c: char| c == '/' || c.is_control();
        if name.is_empty() || name == "." || name == ".." || name.contains(odd) {
            let name = escape(name.as_bytes());
            return Err((
                named,
                format!("`{name}` cannot be the name of a VM: it is a directory's"),
            ));
        }
        if name.len() > MOST_NAME {
            let message = format!("a VM's name of {} bytes: {MOST_NAME} at most", name.len());
            return Err((named, message));
        }
        let about = |message: String| format!("VM `{name}`: {message}");

        let dynamic_min = raw.dynamic_min.as_ref().or(raw.static_min.as_ref());
        let dynamic_max = raw.dynamic_max.as_ref().or(raw.static_max.as_ref());
        let (Some(dynamic_min), Some(dynamic_max)) = (dynamic_min, dynamic_max) else {
            let missing = if dynamic_min.is_none() {
                "dynamic_min"
            } else {
                "dynamic_max"
            };
            return Err((table, about(format!("{missing} is missing"))));
        };
        let static_min = raw.static_min.as_ref().unwrap_or(dynamic_min);
        let static_max = raw.static_max.as_ref().unwrap_or(dynamic_max);
        let bounds = [
            ("static_min", static_min),
            ("dynamic_min", dynamic_min),
            ("dynamic_max", dynamic_max),
            ("static_max", static_max),
        ];
        for pair in bounds.windows(2) {
            let [(low_name, low), (high_name, high)] = [pair[0], pair[1]];
            if kb(low) > kb(high) {
                let message = format!(
                    "{low_name} ({}) is above {high_name} ({}): it must be static_min <= \
                     dynamic_min <= dynamic_max <= static_max",
                    units::exact_kb(kb(low)),
                    units::exact_kb(kb(high)),
                );
                return Err((low.span(), about(message)));
            }
        }
        let (min, max) = (kb(dynamic_min), kb(dynamic_max));
        if min == 0 {
            return Err((dynamic_min.span(), about("dynamic_min is 0".to_owned())));
        }
        for (key, value) in [
            ("start_target", &raw.start_target),
            ("entitlement", &raw.entitlement),
        ] {
            if let Some(value) = value
                .as_ref()
                .filter(|value| !(min..=max).contains(&kb(value)))
            {
                let message = format!(
                    "{key} ({}) is not within dynamic_min ({}) and dynamic_max ({})",
                    units::exact_kb(kb(value)),
                    units::exact_kb(min),
                    units::exact_kb(max),
                );
                return Err((value.span(), about(message)));
            }
        }
        if let Some(chunk) = raw
            .chunk
            .as_ref()
            .filter(|chunk| kb(chunk) == 0 || kb(chunk) % AMR_UNIT_KB != 0)
        {
            let message = format!(
                "chunk ({}) is not a multiple of 64M",
                units::exact_kb(kb(chunk))
            );
            return Err((chunk.span(), about(message)));
        }
        if let Some(cap) = raw.cap.as_ref().filter(|cap| kb(cap) < min) {
            let message = format!(
                "cap ({}) is below dynamic_min ({})",
                units::exact_kb(kb(cap)),
                units::exact_kb(min),
            );
            return Err((cap.span(), about(message)));
        }
        let guest_control = raw.guest_control.as_ref().is_some_and(|on| *on.get_ref());
        if let Some(on) = raw.guest_control.filter(|on| *on.get_ref() && raw.amr) {
            let message = "guest_control excludes amr: switch one of them off".to_owned();
            return Err((on.span(), about(message)));
        }
        let socket = |key: &str, path: Option<Spanned<PathBuf>>| match path {
            Some(path) if !path.get_ref().is_absolute() => {
                let shown = escape(path.get_ref().as_os_str().as_encoded_bytes());
                let message = format!("{key} (`{shown}`) is no absolute path");
                Err((path.span(), about(message)))
            }
            Some(path) if path.get_ref().as_os_str().len() > MOST_SOCKET => {
                let length = path.get_ref().as_os_str().len();
                let message = format!(
                    "{key} is a path of {length} bytes: a socket's has {MOST_SOCKET} at most"
                );
                Err((path.span(), about(message)))
            }
            path => Ok(path.map(Spanned::into_inner)),
        };
        let (qmp, agent) = (socket("qmp", raw.qmp)?, socket("agent", raw.agent)?);
        Ok(Self {
            qmp,
            agent,
            given: BTreeMap::new(),
            static_min_kb: kb(static_min),
            dynamic_min_kb: min,
            dynamic_max_kb: max,
            static_max_kb: kb(static_max),
            start_target_kb: raw.start_target.as_ref().map(kb),
            entitlement_kb: raw.entitlement.as_ref().map(kb),
            amr: raw.amr,
            chunk_kb: raw.chunk.as_ref().map_or(DEFAULT_CHUNK_KB, kb),
            shares: within("shares", raw.shares, DEFAULT_SHARES, 1, 1_000_000)?,
            buffer_percent: percent(
                "buffer_percent",
                raw.buffer_percent,
                DEFAULT_BUFFER_PERCENT,
                2000,
            )?,
            priority: within("priority", raw.priority, DEFAULT_PRIORITY, 1, 10_000)?,
            policy: raw.policy,
            cap_kb: raw.cap.as_ref().map(kb),
            guest_control,
            name,
        })
    }
}

fn kb(size: &Spanned<Size>) -> u64 {
    size.get_ref().0
}

fn within(
    key: &str,
    value: Option<Spanned<u64>>,
    default: u64,
    least: u64,
    most: u64,
) -> Result<u64, Fault> {
    let Some(value) = value else {
        return Ok(default);
    };
    let number = *value.get_ref();
    if (least..=most).contains(&number) {
        Ok(number)
    } else {
        Err((
            value.span(),
            format!("{key} ({number}) is not within {least} and {most}"),
        ))
    }
}

fn percent(
    key: &str,
    value: Option<Spanned<Percent>>,
    default: u64,
    most: u64,
) -> Result<u64, Fault> {
    let value = value.map(|value| Spanned::new(value.span(), value.get_ref().0));
    within(key, value, default, 0, most)
}

/// What the parser says, for operators: in one line, and without Rust's types.
fn in_words(message: &str) -> String {
    message
        .trim()
        .replace('\n', ", ")
        .replace("expected u64", "expected a whole number of 0 or more")
        .replace(
            "invalid type: map, expected a sequence",
            "VMs are a list: write [[vm]]",
        )
}

fn line_of(text: &str, at: usize) -> usize {
    1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = r#"
[host]
policy = "pressure"
slush = "64M"
interval_s = 5
unshare_risk = "50%"

[[vm]]
name = "web1"
qmp = "/run/web1.qmp"
static_min = "256M"
dynamic_min = "512M"
dynamic_max = "2G"
static_max = "4G"
start_target = "1G"
entitlement = "1G"
amr = true
chunk = "128M"
cap = "3G"
policy = "manual"

[[vm]]
name = "db"
dynamic_min = "1G"
dynamic_max = "1.5G"
"#;

    #[test]
    fn a_whole_file() {
        let config = Config::parse(GOOD).unwrap();
        assert_eq!(config.host.policy, PolicyKind::Pressure);
        assert_eq!(config.host.slush_kb, 64 << 10);
        assert_eq!(
            (config.host.interval_s, config.host.unshare_risk_percent),
            (5, 50)
        );
        let web = config.vm("web1").unwrap();
        assert_eq!((web.static_min_kb, web.static_max_kb), (256 << 10, 4 << 20));
        assert_eq!(config.policy_of(web), PolicyKind::Manual);
        assert_eq!(web.ceiling_kb(), 2 << 20);
        let db = config.vm("db").unwrap();
        assert_eq!((db.static_min_kb, db.static_max_kb), (1 << 20, 3 << 19));
        assert_eq!((db.shares, db.buffer_percent, db.priority), (1000, 20, 1));
        assert_eq!(
            (db.chunk_kb, db.amr, db.qmp.as_deref()),
            (256 << 10, false, None)
        );
        assert_eq!(config.policy_of(db), PolicyKind::Pressure);
        assert!(config.vm("nobody").is_none());
    }

    #[test]
    fn an_empty_file_is_the_defaults() {
        let config = Config::parse("").unwrap();
        assert_eq!(config.host.policy, PolicyKind::Proportional);
        assert_eq!(config.host.slush_kb, 9 << 10);
        assert_eq!(config.host.interval_s, 10);
        assert!(config.vms.is_empty());
    }

    /// Replaces a line of the good file, and tells which line then is refused with which message.
    #[track_caller]
    fn refused(old: &str, new: &str, line: usize, said: &str) {
        assert!(GOOD.contains(old), "{old}");
        let text = GOOD.replacen(old, new, 1);
        let (at, message) = Config::parse(&text).unwrap_err();
        assert_eq!(at, line, "{message}");
        assert!(message.contains(said), "{message}");
    }

    #[test]
    fn wrong_lines_are_named() {
        refused("slush =", "sluhs =", 4, "unknown field `sluhs`");
        refused("amr = true", "arm = true", 17, "unknown field `arm`");
        refused("[host]", "[hots]", 2, "unknown field `hots`");
        refused(
            "\"pressure\"",
            "\"pressured\"",
            3,
            "unknown variant `pressured`",
        );
        refused("\"64M\"", "\"64Q\"", 4, "`64Q` is no size");
        refused("\"64M\"", "\"64\"", 4, "`64` has no unit");
        refused("\"64M\"", "64", 4, "a size with a unit in quotes");
        refused("\"64M\"", "\"99999999999P\"", 4, "too large");
        refused("= 5", "= 0", 5, "interval_s (0) is not within 1 and 3600");
        refused("= 5", "= -5", 5, "invalid value: integer `-5`");
        refused(
            "\"50%\"",
            "\"150%\"",
            6,
            "unshare_risk (150) is not within 0 and 100",
        );
        refused("\"50%\"", "\"half\"", 6, "no percentage");
        refused(
            "name = \"web1\"",
            "name = \"\"",
            9,
            "cannot be the name of a VM",
        );
        refused(
            "name = \"web1\"",
            "name = \"a/b\"",
            9,
            "cannot be the name of a VM",
        );
        refused("name = \"web1\"\n", "", 8, "missing field `name`");
        refused(
            "name = \"db\"",
            "name = \"web1\"",
            23,
            "two VMs named `web1`: [[vm]] 1 and 2",
        );
        refused("\"/run/web1.qmp\"", "\"web1.qmp\"", 10, "no absolute path");
        refused(
            "\"256M\"",
            "\"1G\"",
            11,
            "static_min (1G) is above dynamic_min (512M)",
        );
        refused(
            "\"512M\"",
            "\"3G\"",
            12,
            "dynamic_min (3G) is above dynamic_max (2G)",
        );
        refused(
            "\"4G\"",
            "\"1G\"",
            13,
            "dynamic_max (2G) is above static_max (1G)",
        );
        refused(
            "start_target = \"1G\"",
            "start_target = \"3G\"",
            15,
            "start_target (3G)",
        );
        refused(
            "entitlement = \"1G\"",
            "entitlement = \"256M\"",
            16,
            "entitlement (256M)",
        );
        refused("amr = true", "amr = 1", 17, "expected a boolean");
        refused(
            "\"128M\"",
            "\"100M\"",
            18,
            "chunk (100M) is not a multiple of 64M",
        );
        refused("\"128M\"", "\"0\"", 18, "chunk (0K)");
        refused(
            "\"3G\"",
            "\"256M\"",
            19,
            "cap (256M) is below dynamic_min (512M)",
        );
        refused(
            "amr = true",
            "amr = true\nguest_control = true",
            18,
            "guest_control excludes amr",
        );
        refused(
            "dynamic_min = \"1G\"\n",
            "",
            22,
            "VM `db`: dynamic_min is missing",
        );
        refused(
            "dynamic_min = \"1G\"",
            "dynamic_min = \"0\"",
            24,
            "dynamic_min is 0",
        );
        refused("cap = \"3G\"", "shares = 0", 19, "shares (0) is not within");
        refused(
            "cap = \"3G\"",
            "priority = 0",
            19,
            "priority (0) is not within",
        );
        refused("cap = \"3G\"", "cap = [", 20, "unexpected");
        refused(
            "cap = \"3G\"",
            "shares = -5",
            19,
            "expected a whole number of 0 or more",
        );
        refused(
            "[[vm]]\nname = \"db\"",
            "[vm]\nname = \"db\"",
            22,
            "duplicate key",
        );
        refused(
            "\"web1\"",
            "\"we\\nb1\"",
            9,
            "`we\\nb1` cannot be the name of a VM",
        );
        let long = "x".repeat(256);
        refused(
            "\"web1\"",
            &format!("\"{long}\""),
            9,
            "256 bytes: 255 at most",
        );
        refused(
            "/run/web1.qmp",
            &format!("/run/{}", &long[..103]),
            10,
            "a path of 108 bytes: a socket's has 107 at most",
        );
        refused(
            "name = \"db\"",
            "name = \"db\"\nagent = \"/run/web1.qmp\"",
            23,
            "agent (/run/web1.qmp) is a socket of VM `web1` as well",
        );
        let (_, said) = Config::parse("[vm]\nname = \"a\"\n").unwrap_err();
        assert!(said.contains("write [[vm]]"), "{said}");
        refused("chunk = \"128M\"", "amr = false", 18, "duplicate key");
    }

    proptest! {
        #[test]
        fn no_text_panics(text in any::<String>(), cut in 0..GOOD.len(), noise in "[\\[\\]\"=a-z0-9\n]{0,6}") {
            let _ = Config::parse(&text);
            let mut broken = GOOD[..cut].to_owned();
            broken.push_str(&noise);
            broken.push_str(&GOOD[cut..]);
            if let Err((line, _)) = Config::parse(&broken) {
                prop_assert!(line <= broken.lines().count() + 1);
            }
        }
    }
}
