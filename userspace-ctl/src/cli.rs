// SPDX-License-Identifier: GPL-2.0

//! The command line.

use crate::config::VM_KEYS;
use crate::knobs::{Knob, Scope};
use crate::policy::PolicyKind;
use crate::units::{self, SIZE_FORMS};
use clap::{Parser, Subcommand};
use clap_complete::Shell;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// Shows and steers thin-provisioned guest memory.
#[derive(Debug, Parser)]
#[command(name = "thinramctl", version, about, after_help = EXIT_HELP, max_term_width = 80)]
pub struct Cli {
    /// Read the system below this directory.
    #[arg(long, value_name = "DIR", default_value = "/", global = true)]
    pub root: PathBuf,
    /// Print JSON: sizes in KiB, figures under their sysfs names, absent ones left out.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_HELP: &str = "Exit code: 0 done, 1 it failed, 2 the command line or a value is wrong, \
                         3 admission was refused.";

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the host and its VMs.
    ///
    /// A VM's `saved` is the module's figure where it has one; else the VM's zero pages and its
    /// part, by shared pages, of what sharing saves on the whole host.
    Status {
        /// Show it again every so many seconds.
        #[arg(long, value_name = "SECONDS", value_parser = seconds)]
        watch: Option<Duration>,
        /// Stop after this many times.
        #[arg(long, value_name = "N", requires = "watch", value_parser = clap::value_parser!(u64).range(1..))]
        count: Option<u64>,
    },
    /// Show host and VMs live: sortable, with what each held over time.
    ///
    /// In a terminal, `?` tells the keys. Elsewhere each look is printed as a screen of text.
    Top {
        /// Seconds between two looks.
        #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
        interval: Duration,
        /// Stop after this many looks.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        count: Option<u64>,
    },
    /// Estimate what sharing would save, by VM and by pair, without merging.
    ///
    /// Reads the VMs' memory, of which nothing is changed, and compares hashes. `status` shows the
    /// last result for VMs that are domains of their own.
    Estimate {
        /// The VMs; all where none is named.
        vms: Vec<OsString>,
        /// Part of the pages that is read; less is faster, and says too much where VMs hold pages
        /// several times.
        #[arg(long, value_name = "PERCENT", default_value = "100%", value_parser = sample)]
        sample: f64,
    },
    /// Write what the daemon's policies decide from to a file, again and again.
    Record {
        /// The file, a JSON object a line; `-` is standard output. It must not exist.
        file: PathBuf,
        /// Seconds between two lines.
        #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
        interval: Duration,
        /// Stop after so long; without it, when the program is ended.
        #[arg(long = "for", value_name = "TIME", value_parser = recording)]
        time: Option<Duration>,
    },
    /// Have a policy decide what was recorded, offline.
    Replay {
        /// The recorded file.
        file: PathBuf,
        /// The configuration; /etc/thinram/thinram.toml below the root where none is given.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// One policy for all VMs, instead of the configured ones.
        #[arg(long, value_parser = policy)]
        policy: Option<PolicyKind>,
    },
    /// Print host, VMs and guests as OpenMetrics; the daemon tells the same on `metrics_port`.
    Metrics,
    /// Print a shell's completions.
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Print the manual page, or write one for each command.
    Man {
        /// Where the pages are written; standard output has only the first one.
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
    /// Show and steer VMs.
    #[command(subcommand)]
    Vm(VmCommand),
    /// Print one value of the module, as it is.
    Get {
        /// A knob or a figure of the host.
        name: String,
    },
    /// Set one knob of the host, and show what holds then.
    #[command(after_help = knob_help(Scope::Host))]
    Set {
        /// The knob.
        name: String,
        /// Its new value.
        #[arg(allow_negative_numbers = true)]
        value: String,
    },
    /// Drive the guests' balloons by the configured policies, until SIGTERM; SIGHUP reads the
    /// configuration again.
    Daemon {
        /// The configuration; /etc/thinram/thinram.toml below the root where none is given.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Only say what would be ordered.
        #[arg(long)]
        dry_run: bool,
    },
    /// Show the guests as the daemon sees them.
    Guests,
    /// Size a VM by hand, and keep that until it is released.
    Balloon {
        /// Name of the VM in the configuration.
        vm: String,
        /// Its size, with a unit, within its bounds.
        size: String,
        /// The configuration, for use without a daemon.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Ask whether a VM may start, and keep its minimum for it until it runs.
    ///
    /// It may when the minima and overheads of all VMs fit into the host, when its own minimum is
    /// free now, and when memory is left for sharing that breaks, as far as the operator wants that
    /// backed. Without a daemon nothing can be kept for it.
    Admit {
        /// Least memory that the VM can run with.
        #[arg(long, value_name = "SIZE", value_parser = size, required_unless_present = "cancel")]
        min: Option<u64>,
        /// Most memory that it may get; the minimum where not given. The answer says how much of it
        /// is there now; only the minimum is kept.
        #[arg(long, value_name = "SIZE", value_parser = size)]
        max: Option<u64>,
        /// Its name, as in the mount; the reservation ends when that VM has come.
        #[arg(long, value_name = "NAME")]
        vm: Option<String>,
        /// Let the guests make room, and ask again for so long; at most 600s.
        #[arg(long, value_name = "TIME", value_parser = waiting)]
        wait: Option<Duration>,
        /// How long its minimum is kept for it.
        #[arg(long, value_name = "TIME", default_value = "120s", value_parser = holding)]
        hold: Duration,
        /// Percentage of all sharing breaking at once that need not be backed by memory; the
        /// configuration's where not given.
        #[arg(long, value_name = "PERCENT", value_parser = risk)]
        unshare_risk: Option<u64>,
        /// Keep nothing for the VM any more.
        #[arg(long, requires = "vm", conflicts_with_all = ["max", "wait", "unshare_risk"])]
        cancel: bool,
        /// The configuration, for use without a daemon.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Leave a VM to its policy again that was sized by hand or moved by somebody else.
    Release {
        /// Name of the VM in the configuration.
        vm: String,
    },
    /// Show the daemon's last decisions about a VM, and why.
    Explain {
        /// Name of the VM in the configuration.
        vm: String,
    },
    /// Check a configuration.
    Check {
        /// The file; /etc/thinram/thinram.toml below the root where none is given.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Do one step of the policies offline, and show what each VM would get and why.
    Plan {
        /// The configuration; /etc/thinram/thinram.toml below the root where none is given.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// The host and its VMs at one time, as JSON.
        #[arg(long, value_name = "FILE")]
        snapshot: PathBuf,
    },
}

/// What to do with VMs.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// List the VMs.
    List,
    /// Show all figures and knobs of one VM.
    Show {
        /// Name of the VM, as it is or as `vm list` shows it.
        vm: OsString,
    },
    /// Print one value of a VM, as it is.
    Get {
        /// Name of the VM.
        vm: OsString,
        /// A knob or a figure of a VM.
        name: String,
    },
    /// Set one knob of a VM and show what holds then, or change a setting of the daemon's.
    ///
    /// A setting holds until the host ends or `vm remove`, also across a restart of the daemon;
    /// `default` takes it away. The configuration file is not written.
    #[command(after_help = knob_help(Scope::Vm) + &setting_help())]
    Set {
        /// Name of the VM; for settings, the one in the configuration.
        vm: OsString,
        /// The knob or setting.
        name: String,
        /// Its new value.
        #[arg(allow_negative_numbers = true)]
        value: String,
    },
    /// Have the daemon size a VM that is not in the configuration file.
    #[command(after_help = setting_help())]
    Add {
        /// Name of the VM, as in the mount.
        vm: String,
        /// Its settings; dynamic_min and dynamic_max are needed.
        #[arg(value_name = "SETTING=VALUE", value_parser = setting, required = true)]
        settings: Vec<(String, String)>,
    },
    /// Have the daemon leave a VM alone, whatever the configuration file says.
    Remove {
        /// Name of the VM in the configuration.
        vm: String,
    },
}

/// A size with a unit, in KiB.
pub fn size(text: &str) -> Result<u64, String> {
    let kb = units::parse_kb(text).map_err(|error| error.to_string())?;
    if text.ends_with(|c: char| c.is_ascii_digit()) {
        return Err(format!("`{text}` has no unit: write {text}M or {text}G"));
    }
    match kb {
        0 => Err(format!("`{text}` is nothing")),
        kb => Ok(kb),
    }
}

/// A time such as `90`, `60s`, `10m` or `1h`, within bounds in seconds.
fn time(text: &str, least: u64, most: u64) -> Result<Duration, String> {
    let refused = || format!("`{text}` is no time such as 60s or 2m, from {least}s to {most}s");
    let (digits, unit) = match text.strip_suffix(['s', 'm', 'h']) {
        Some(digits) => (digits, &text[digits.len()..]),
        None => (text, "s"),
    };
    let number = units::parse_number(digits).map_err(|_| refused())?;
    let scale = match unit {
        "s" => 1,
        "m" => 60,
        _ => 3600,
    };
    let seconds = number.checked_mul(scale).ok_or_else(refused)?;
    if (least..=most).contains(&seconds) {
        Ok(Duration::from_secs(seconds))
    } else {
        Err(refused())
    }
}

fn waiting(text: &str) -> Result<Duration, String> {
    time(text, 0, 600)
}

fn holding(text: &str) -> Result<Duration, String> {
    time(text, 1, 3600)
}

fn recording(text: &str) -> Result<Duration, String> {
    time(text, 1, 31 * 86400)
}

fn policy(text: &str) -> Result<PolicyKind, String> {
    PolicyKind::ALL
        .into_iter()
        .find(|policy| policy.name() == text)
        .ok_or_else(|| {
            let names = PolicyKind::ALL.map(PolicyKind::name).join(", ");
            format!("`{text}` is none of {names}")
        })
}

fn risk(text: &str) -> Result<u64, String> {
    match units::parse_percent(text) {
        Ok(percent) if percent <= 100 => Ok(percent),
        _ => Err(format!("`{text}` is no percentage from 0 to 100")),
    }
}

/// A percentage above 0 as a fraction.
fn sample(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).trim_end();
    match number.parse::<f64>() {
        Ok(percent) if (0.01..=100.0).contains(&percent) => Ok(percent / 100.0),
        _ => Err(format!("`{text}` is no percentage from 0.01 to 100")),
    }
}

fn setting(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("`{text}` is not of the form SETTING=VALUE")),
    }
}

/// The settings of a VM, for a help text.
fn setting_help() -> String {
    let mut help = String::from("\n\nSettings, as in the configuration file:\n");
    for key in VM_KEYS {
        help.push_str(&format!("  {:<15}{}\n", key.name, key.help));
    }
    help
}

fn seconds(text: &str) -> Result<Duration, String> {
    let refused = || format!("`{text}` is not a number of seconds from 0.1 to 86400");
    let seconds: f64 = text.parse().map_err(|_| refused())?;
    if (0.1..=86400.0).contains(&seconds) {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err(refused())
    }
}

/// The knobs of a scope, for a help text.
fn knob_help(scope: Scope) -> String {
    let mut help = String::from("Knobs:\n");
    for knob in Knob::all(scope) {
        for (nth, line) in crate::text::wrap(&knob.describe(), 0, 74)
            .iter()
            .enumerate()
        {
            if nth == 0 {
                help.push_str(&format!("  {}\n", knob.name));
            }
            help.push_str(&format!("      {line}\n"));
        }
    }
    let forms = format!(
        "A size (_kb) is plain KiB or has a unit, 1024-based: {SIZE_FORMS}. A percentage \
         (_percent) is written like 50 or 50%."
    );
    help.push('\n');
    help.push_str(&crate::text::wrap(&forms, 0, 80).join("\n"));
    help
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use proptest::prelude::*;

    #[test]
    fn definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_names_every_knob() {
        assert!(setting_help().lines().all(|line| line.len() <= 80));
        for scope in [Scope::Host, Scope::Vm] {
            let help = knob_help(scope);
            assert!(Knob::all(scope).all(|knob| help.contains(knob.name)));
            assert!(help.lines().all(|line| line.len() <= 80), "{help}");
        }
    }

    #[test]
    fn sizes_times_and_settings_are_checked() {
        assert_eq!(size("1.5G"), Ok(3 << 19));
        for text in ["", "1", "0M", "lots", "-1G"] {
            assert!(size(text).is_err(), "{text}");
        }
        let said: Vec<_> = ["60s", "60", "1m", "0"].map(waiting).into();
        let minute = Ok(Duration::from_secs(60));
        assert_eq!(said[..3], [minute.clone(), minute.clone(), minute]);
        assert_eq!(said[3], Ok(Duration::ZERO));
        for text in [
            "601s",
            "11m",
            "1h",
            "s",
            "",
            "-1s",
            "1.5m",
            "99999999999999999999",
        ] {
            assert!(waiting(text).is_err(), "{text}");
        }
        assert!(holding("0s").is_err() && holding("1h").is_ok());
        assert_eq!((risk("0%"), risk("100")), (Ok(0), Ok(100)));
        assert!(risk("101").is_err() && risk("some").is_err());
        assert_eq!(setting("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(setting("=1").is_err() && setting("amr").is_err());
    }

    #[test]
    fn seconds_are_checked() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["0", "-1", "nan", "inf", "1e9", "soon"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }

    /// A number and what follows it, as std reads the number.
    fn number_and(text: &str) -> (Option<u64>, &str) {
        let end = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        (text[..end].parse().ok(), &text[end..])
    }

    proptest! {
        #[test]
        fn times_are_what_they_say(text in "[0-9]{0,20}[smhd +-]?|\\PC{0,6}", most in 0u64..1 << 40) {
            let (number, unit) = number_and(&text);
            let scale = match unit {
                "" | "s" => Some(1),
                "m" => Some(60),
                "h" => Some(3600),
                _ => None,
            };
            let told = number.zip(scale).and_then(|(number, scale)| number.checked_mul(scale));
            let told = told.filter(|seconds| (1..=most).contains(seconds));
            prop_assert_eq!(time(&text, 1, most).ok(), told.map(Duration::from_secs), "{}", text);
        }

        #[test]
        fn sizes_need_a_unit(text in "[0-9]{1,12}(\\.[0-9]{0,3})?[KMGTP]?(iB|B)?|\\PC{0,6}") {
            let kb = units::parse_kb(&text).ok().filter(|kb| *kb > 0);
            let has_unit = text.contains(|c: char| c.is_ascii_alphabetic());
            prop_assert_eq!(size(&text).ok(), kb.filter(|_| has_unit), "{}", text);
        }

        #[test]
        fn percentages_are_of_a_whole(text in "[0-9]{0,4}(\\.[0-9]{0,3})?[ %]{0,2}|\\PC{0,5}") {
            let (number, rest) = number_and(&text);
            let whole = number.filter(|_| rest.is_empty() || rest.trim_start() == "%");
            prop_assert_eq!(risk(&text).ok(), whole.filter(|n| *n <= 100), "{}", text);
            if let Ok(part) = sample(&text) {
                prop_assert!(part > 0.0 && part <= 1.0, "{} {}", text, part);
                let number: f64 = text.trim_end_matches('%').trim_end().parse().unwrap();
                prop_assert_eq!(part, number / 100.0);
            }
        }

        #[test]
        fn seconds_are_what_std_reads(text in "[0-9]{1,6}(\\.[0-9]{0,3})?|(1e[0-9]|inf|NaN|-0|\\PC){0,4}") {
            let number = text.parse::<f64>().ok().filter(|n| *n >= 0.1 && *n <= 86400.0);
            let told = seconds(&text).ok().map(|told| told.as_secs_f64());
            prop_assert_eq!(told.is_some(), number.is_some(), "{}", text);
            if let (Some(told), Some(number)) = (told, number) {
                prop_assert!((told - number).abs() < 1e-9, "{}", text);
            }
        }

        #[test]
        fn settings_come_back(key in "[^=]{1,9}", value in "\\PC{0,9}", text in "\\PC{0,9}") {
            prop_assert_eq!(setting(&format!("{key}={value}")), Ok((key, value)));
            if let Ok((key, value)) = setting(&text) {
                prop_assert_eq!(format!("{key}={value}"), text);
            }
        }

        #[test]
        fn a_policy_is_one_by_its_name(text in "(static|shares|pressure|[a-z]{0,9}| ){0,2}") {
            let named = PolicyKind::ALL.into_iter().find(|policy| policy.name() == text);
            prop_assert_eq!(policy(&text).ok(), named);
        }
    }
}
