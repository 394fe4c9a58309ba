// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The process that starts passt for a machine that may start nothing: this program again, with another command.
//!
//! It is there before the machine has opened anything, so it has nothing of a guest's; it is no child of a process with
//! memory to copy. It starts the programs that its command line names, at the machine's request
//! ([`serve_launcher`](ebbtide_machine::serve_launcher)), and ends with the machine: when its socket does. Landlock is
//! not for it: passt, which inherits that, makes itself a file system of its own, and landlock forbids to mount. A seccomp
//! filter refuses both what neither needs ([`confine_launcher`](ebbtide_machine::confine_launcher)); the rest passt gives up by
//! itself. It is not told to die with its launcher (PR_SET_PDEATHSIG): guests are to keep their networks then, and passt, when root
//! starts it, changes its user, with which the kernel forgets that anyway.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use ebbtide_machine::config::MachineConfig;
use ebbtide_machine::{Launcher, Seccomp};
use rustix::fs::{Mode, OFlags};
use rustix::process::{DumpableBehavior, set_dumpable_behavior, setsid};
use rustix::thread::{set_name, set_no_new_privs};

use crate::run::SeccompMode;

/// The hidden command.
pub const COMMAND: &str = "passt-launcher";
/// What `--passt` says when there is to be none.
const NONE: &str = "off";
const FIRST_INHERITED: libc::c_uint = 3;

#[derive(clap::Args)]
pub struct LauncherArgs {
    /// What it may not do: refuse it, log it, or let it pass
    #[arg(long, default_value = "on")]
    seccomp: SeccompMode,
    /// What may be started
    #[arg(required = true)]
    programs: Vec<PathBuf>,
}

/// Serves until standard input, which is a socket, is closed at its other end.
pub fn main(args: LauncherArgs) -> ExitCode {
    let served = isolated().and_then(|socket| {
        ebbtide_machine::confine_launcher(args.seccomp.into())?;
        ebbtide_machine::serve_launcher(socket, &args.programs)
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("ebbtide {COMMAND}: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Leaves behind what came with the start of the process; its socket.
fn isolated() -> io::Result<OwnedFd> {
    // SAFETY: the process has just begun, and nothing in it owns a descriptor beyond the standard ones.
    if unsafe { libc::close_range(FIRST_INHERITED, libc::c_uint::MAX, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    set_name(c"passt-launcher")?;
    // A terminal's signals are for the machine, which ends in order and still needs its network meanwhile.
    setsid()?;
    set_no_new_privs(true)?;
    // Others of the same user do not look into it.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let first = i32::try_from(FIRST_INHERITED).unwrap_or(i32::MAX);
    let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), first)?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(socket)
}

/// The launcher of a machine, started if anybody could ask it for something: a monitor, or `--netdev`. `program` is
/// what `--passt` says.
///
/// # Errors
/// The process can't be started.
pub fn of(config: &MachineConfig, program: &OsString) -> io::Result<Option<Launcher>> {
    let programs = programs(config, program);
    if programs.is_empty() {
        return Ok(None);
    }
    let mode = match config.confinement.seccomp {
        Seccomp::On => "on",
        Seccomp::Log => "log",
        Seccomp::Off => "off",
    };
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg0("ebbtide")
        .arg(COMMAND)
        .args(["--seccomp", mode])
        .arg("--")
        .args(&programs);
    Launcher::start(&mut command, programs).map(Some)
}

/// What it may start, the usual one first; nothing: there is to be none.
pub fn programs(config: &MachineConfig, program: &OsString) -> Vec<PathBuf> {
    let mut cards = config
        .netdevs
        .iter()
        .filter(|it| it.kind == "passt")
        .peekable();
    if program == NONE || (config.qmp.is_empty() && cards.peek().is_none()) {
        return Vec::new();
    }
    let mut programs = vec![PathBuf::from(program)];
    let named = cards.filter_map(|it| it.properties.get("path")?.as_str());
    for path in named.map(PathBuf::from) {
        if !programs.contains(&path) {
            programs.push(path);
        }
    }
    programs
}
