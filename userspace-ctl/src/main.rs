// SPDX-License-Identifier: GPL-2.0

//! `thinramctl`: see `thinramctl --help`.

mod commands;
mod output;

use clap::Parser;
use std::process::ExitCode;
use thinramctl::cli::Cli;

/// A mistake in what the operator wrote, as opposed to something that failed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

fn main() -> ExitCode {
    let cli = Cli::parse();
    match commands::run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_closed(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let message = format!("thinramctl: {error:#}");
            // Nobody is left to tell when stderr is closed too.
            let _ = output::complain(&message);
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}
