// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `ebbtide ctl`: one command to a running machine, over its QMP socket.
//!
//! Results go to standard output, progress and errors to standard error. Exit codes: 0 done (`resize --wait`:
//! reached), 1 error, 2 usage, 3 partial or stalled, 4 time-out.

mod interrupt;
mod map;
mod memory;
mod raw;
mod resize;
mod status;
mod table;
mod watch;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use ebbtide_qmp::client::Client;
use ebbtide_qmp::schema::{Command, Qapi};
use ebbtide_qmp::sizes::Size;
use ebbtide_qmp::{ErrorClass, SocketSpec};
use serde::Serialize;

/// The options of `ebbtide ctl`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  ebbtide ctl --qmp /run/vm.qmp status
  ebbtide ctl --qmp /run/vm.qmp resize 8G --wait --timeout 60
  ebbtide ctl --qmp /run/vm.qmp --json memory
  ebbtide ctl --qmp /run/vm.qmp qmp '{\"execute\": \"query-commands\"}'

Exit codes: 0 done, 1 error, 2 usage, 3 resize partial or stalled, 4 time-out.")]
pub struct CtlArgs {
    /// The machine's QMP socket: a path, or unix:PATH as given to `ebbtide run --qmp`
    #[arg(long, value_name = "SOCKET", global = true, value_parser = socket_path)]
    qmp: Option<PathBuf>,
    /// Print JSON: sizes in bytes, times in milliseconds
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    action: Action,
}

/// What to do.
#[derive(Subcommand)]
enum Action {
    /// Show whether the guest runs, its vCPUs, and the VMM's process
    Status,
    /// Show the guest's memory and its memory devices
    Memory,
    /// Change how much memory the guest has
    #[command(after_help = "\
SIZE counts boot memory and memory devices together. Several devices are filled in the order of their ids.
Without --wait the new size is requested and the guest follows in its own time.")]
    Resize(resize::ResizeArgs),
    /// Show the memory until interrupted
    Watch,
    /// Show the memory map
    Map,
    /// Send one QMP command and print what it returns
    #[command(after_help = "\
Examples:
  ebbtide ctl --qmp vm.qmp qmp query-status
  ebbtide ctl --qmp vm.qmp qmp '{\"execute\": \"qom-get\", \"arguments\": {\"path\": \"vmem0\", \"property\": \"size\"}}'")]
    Qmp {
        /// A command as JSON, or the name of one without arguments
        #[arg(value_name = "JSON", value_parser = raw::parse)]
        request: raw::Request,
    },
}

/// Why a command did not end well.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Qmp(#[from] ebbtide_qmp::Error),
    #[error("this server has no command {0}: it is not an ebbtide, or an older one")]
    NotEbbtide(&'static str),
    #[error(transparent)]
    Plan(#[from] resize::plan::PlanError),
    #[error("{0}")]
    Resize(String),
    #[error("cannot write the result: {0}")]
    Output(#[from] io::Error),
}

/// How the process ends when nothing failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    PartialOrStalled,
    TimedOut,
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Done => ExitCode::SUCCESS,
            Outcome::PartialOrStalled => ExitCode::from(3),
            Outcome::TimedOut => ExitCode::from(4),
        }
    }
}

/// A connected machine, and how to answer.
struct Session<'a> {
    client: Client,
    json: bool,
    out: &'a mut dyn Write,
}

/// Carries `ebbtide ctl` out.
pub fn main(args: CtlArgs) -> ExitCode {
    let Some(path) = &args.qmp else {
        eprintln!(
            "error: which machine? --qmp SOCKET is missing\n\nFor more information, try 'ebbtide ctl --help'."
        );
        return ExitCode::from(2);
    };
    match carry_out(&args, path, &mut io::stdout()) {
        Ok(outcome) => outcome.into(),
        // The reader has gone, as `| head` does; nobody is left to tell.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("ebbtide ctl: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn carry_out(args: &CtlArgs, path: &Path, out: &mut dyn Write) -> Result<Outcome, Failure> {
    let client = Client::connect(path)?;
    let mut session = Session {
        client,
        json: args.json,
        out,
    };
    let outcome = match &args.action {
        Action::Status => status::show(&mut session),
        Action::Memory => memory::show(&mut session),
        Action::Resize(args) => resize::resize(&mut session, args),
        Action::Watch => watch::watch(&mut session),
        Action::Map => map::show(&mut session),
        Action::Qmp { request } => raw::send(&mut session, request),
    }?;
    session.out.flush()?;
    Ok(outcome)
}

impl Session<'_> {
    /// Calls one of Ebbtide's own commands, which other servers do not have.
    fn call_own<A: Qapi, R: Qapi>(
        &mut self,
        command: &Command<A, R>,
        arguments: A,
    ) -> Result<R, Failure> {
        self.client
            .call(command, arguments)
            .map_err(|error| match error {
                ebbtide_qmp::Error::Command { error, .. }
                    if error.class == ErrorClass::CommandNotFound =>
                {
                    Failure::NotEbbtide(command.name())
                }
                other => other.into(),
            })
    }

    /// One line of JSON.
    fn print_json(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let text = serde_json::to_string(value).map_err(io::Error::from)?;
        writeln!(self.out, "{text}")?;
        Ok(())
    }
}

fn socket_path(text: &str) -> Result<PathBuf, String> {
    if text.starts_with("unix:") {
        return text
            .parse::<SocketSpec>()
            .map(|spec| spec.path)
            .map_err(|error| error.to_string());
    }
    if text.is_empty() {
        Err("the path is empty".to_owned())
    } else {
        Ok(text.into())
    }
}

/// Bytes for people.
fn human(bytes: u64) -> String {
    Size(bytes).to_string()
}

#[cfg(test)]
mod tests;
