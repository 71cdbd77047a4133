// SPDX-License-Identifier: GPL-2.0

//! The command line.

use crate::knobs::{Knob, Scope};
use crate::units::SIZE_FORMS;
use clap::{Parser, Subcommand};
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

const EXIT_HELP: &str = "Exit code: 0 done, 1 it failed, 2 the command line or a value is wrong.";

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
    /// Set one knob of a VM, and show what holds then.
    #[command(after_help = knob_help(Scope::Vm))]
    Set {
        /// Name of the VM.
        vm: OsString,
        /// The knob.
        name: String,
        /// Its new value.
        #[arg(allow_negative_numbers = true)]
        value: String,
    },
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

    #[test]
    fn definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_names_every_knob() {
        for scope in [Scope::Host, Scope::Vm] {
            let help = knob_help(scope);
            assert!(Knob::all(scope).all(|knob| help.contains(knob.name)));
            assert!(help.lines().all(|line| line.len() <= 80), "{help}");
        }
    }

    #[test]
    fn seconds_are_checked() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["0", "-1", "nan", "inf", "1e9", "soon"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }
}
