// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ebbtide: a virtual machine monitor whose guests' memory and devices come and go.

mod ctl;
mod doctor;
mod launcher;
mod run;
mod seconds;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A KVM virtual machine monitor whose guests' memory and devices come and go while they run
#[derive(Parser)]
#[command(name = "ebbtide", version, propagate_version = true)]
#[command(after_help = "\
Examples:
  ebbtide doctor
  ebbtide run --kernel vmlinuz --initrd initrd.img --cmdline console=ttyS0 \\
      --memory 512M,max=8G --qmp unix:vm.qmp
  ebbtide ctl --qmp vm.qmp resize 4G --wait

The log goes to standard error; RUST_LOG=debug shows more of it.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a guest
    Run(run::RunArgs),
    /// Talk to a running guest's VMM
    Ctl(ctl::CtlArgs),
    /// Say what this machine offers: KVM that can run a guest, huge pages, io_uring
    Doctor(doctor::DoctorArgs),
    /// Start passt for `run`, which starts this by itself
    #[command(name = launcher::COMMAND, hide = true)]
    Launcher(launcher::LauncherArgs),
}

/// Colours are for a person at a terminal who has not asked for none (<https://no-color.org>).
fn colours() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .with_writer(std::io::stderr)
        .with_ansi(colours())
        .with_target(false)
        .init();
    match cli.command {
        Command::Run(args) => run::main(args),
        Command::Ctl(args) => ctl::main(args),
        Command::Doctor(args) => doctor::main(&args),
        Command::Launcher(args) => launcher::main(args),
    }
}
