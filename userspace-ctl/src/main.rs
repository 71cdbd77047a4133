// SPDX-License-Identifier: GPL-2.0

//! `thinramctl`: see `thinramctl --help`.

mod commands;
mod drive;
mod live;
mod output;

use clap::Parser;
use std::process::ExitCode;
use thinramctl::cli::Cli;

/// A mistake in what the operator wrote, as opposed to something that failed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// What was asked for is not allowed, by a rule and not by a failure.
#[derive(Debug, thiserror::Error)]
#[error("refused: {0}")]
pub struct Refused(pub String);

fn main() -> ExitCode {
    let cli = Cli::parse();
    match commands::run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_closed(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let message = format!("thinramctl: {error:#}");
            // Nobody is left to tell when stderr is closed too.
            let _ = output::complain(&message);
            ExitCode::from(match error {
                error if error.is::<Usage>() => 2,
                error if error.is::<Refused>() => 3,
                _ => 1,
            })
        }
    }
}
