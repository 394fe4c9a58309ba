// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `ebbtide ctl`: one command to a running machine, over its QMP socket.
//!
//! Results go to standard output, progress and errors to standard error. Exit codes: 0 done (with `--wait`: reached),
//! 1 error, 2 usage, 3 refused by the guest, partial or stalled, 4 time-out.

mod add;
mod backend;
mod interrupt;
mod map;
mod memory;
mod raw;
mod remove;
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
  ebbtide ctl --qmp /run/vm.qmp plug-dimm 1G
  ebbtide ctl --qmp /run/vm.qmp disk add data.img --id data
  ebbtide ctl --qmp /run/vm.qmp disk remove data --wait --timeout 30
  ebbtide ctl --qmp /run/vm.qmp qmp '{\"execute\": \"query-commands\"}'

Exit codes: 0 done, 1 error, 2 usage, 3 refused by the guest, partial or stalled, 4 time-out.")]
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
    /// Plug a DIMM in
    #[command(after_help = "\
The DIMM's memory is the object mem-ID. Examples:
  ebbtide ctl --qmp vm.qmp plug-dimm 1G
  ebbtide ctl --qmp vm.qmp plug-dimm 512M --id d1 --backend file --path /dev/shm/d1")]
    PlugDimm(add::PlugDimmArgs),
    /// Ask the guest to let go of a device
    #[command(after_help = UNPLUG_HELP)]
    Unplug(remove::RemoveArgs),
    /// Add or remove a disk
    Disk {
        #[command(subcommand)]
        action: DiskAction,
    },
    /// Add or remove a network device
    Net {
        #[command(subcommand)]
        action: NetAction,
    },
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

const UNPLUG_HELP: &str = "\
Without --wait the removal is only asked for. With it, the guest's refusal and its reason are told \
(exit code 3), and when the device is gone, its backend is closed: the object mem-ID of a memory device, \
a disk's block node, a network device's network. Ctrl-C and --timeout (exit code 4) end the wait and not \
the removal; repeat the command to wait again.";

/// What to do about disks.
#[derive(Subcommand)]
enum DiskAction {
    /// Open an image and plug a disk in
    Add(add::DiskAddArgs),
    /// Ask the guest to let go of a disk, and close its image
    #[command(after_help = UNPLUG_HELP)]
    Remove(remove::RemoveArgs),
}

/// What to do about networks.
#[derive(Subcommand)]
enum NetAction {
    /// Connect a network and plug a network device in
    Add(add::NetAddArgs),
    /// Ask the guest to let go of a network device, and disconnect its network
    #[command(after_help = UNPLUG_HELP)]
    Remove(remove::RemoveArgs),
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
    #[error("{0}")]
    Add(String),
    #[error("{0}")]
    Remove(String),
    #[error("{0}")]
    Usage(String),
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
            match failure {
                Failure::Usage(_) => ExitCode::from(2),
                _ => ExitCode::FAILURE,
            }
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
        Action::PlugDimm(args) => add::plug_dimm(&mut session, args),
        Action::Unplug(args) => remove::device(&mut session, args),
        Action::Disk { action } => match action {
            DiskAction::Add(args) => add::disk(&mut session, args),
            DiskAction::Remove(args) => remove::disk(&mut session, args),
        },
        Action::Net { action } => match action {
            NetAction::Add(args) => add::net(&mut session, args),
            NetAction::Remove(args) => remove::net(&mut session, args),
        },
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

/// A path as the server is to open it: its working directory is another.
fn server_path(path: &Path) -> Result<String, Failure> {
    let absolute = std::path::absolute(path)
        .map_err(|error| Failure::Usage(format!("{}: {error}", path.display())))?;
    match absolute.to_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(Failure::Usage(format!(
            "{}: the path is not UTF-8, and QMP is",
            path.display()
        ))),
    }
}

/// Bytes for people.
fn human(bytes: u64) -> String {
    Size(bytes).to_string()
}

#[cfg(test)]
mod tests;
