// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `ebbtide-lab`: runs commands in the capsule, builds guest images.

mod tasks;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use ebbtide_lab::capsule::{Capsule, Interrupted, Invocation};
use ebbtide_lab::kernel::Series;
use ebbtide_lab::vmm::Program;
use ebbtide_lab::{image, selftest};

/// Where Ebbtide is tried out: guest images and the capsule.
#[derive(Parser)]
#[command(name = "ebbtide-lab")]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a command in a machine that has a real KVM (QEMU emulates it)
    ///
    /// The command sees this machine's files, read-only, under the same paths; /tmp is fresh.
    /// Its exit code is this program's.
    Capsule(CapsuleOptions),
    /// Build a guest image and print the paths of its kernel and initrd
    Image {
        /// The kernel: 6.1 or 6.12
        #[arg(long)]
        kernel: Series,
    },
    /// Prove the lab itself: boot guests and use all it has
    ///
    /// Runs on this machine's KVM if EBBTIDE_KVM=host, else in the capsule.
    Selftest(SelftestOptions),
    /// Get and build what the tasks below need, so that they begin sooner
    Prepare(tasks::PrepareOptions),
    /// The demo: a guest that grows, uses what it got, and gives it back
    Demo(tasks::DemoOptions),
    /// Debian guests: memory, disks, resets, monitors
    System(tasks::SystemOptions),
    /// Run programs one after the other where a KVM is
    Each(tasks::EachOptions),
    /// Whole guests beside Debian's QEMU; one JSON row a line
    Bench(tasks::BenchOptions),
}

#[derive(clap::Args)]
struct SelftestOptions {
    /// `qemu`, or the path of an ebbtide binary
    #[arg(long, default_value = "qemu")]
    vmm: String,
    /// Guest kernels: 6.1, 6.12 or both
    #[arg(long, value_delimiter = ',', default_value = "6.1,6.12")]
    kernel: Vec<Series>,
    /// How many processors the guests have, in turn
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    cpus: Vec<u32>,
    /// How much guest memory to fill, in MiB
    #[arg(long, default_value_t = 1024)]
    fill: u64,
    /// Only boot, so many times, and count the failures
    #[arg(long, value_name = "TIMES")]
    boots: Option<u32>,
}

#[derive(clap::Args)]
struct CapsuleOptions {
    /// RAM of the machine in MiB
    #[arg(long, default_value_t = 10_000)]
    memory: u64,
    /// Processors of the machine
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Its kind of processor, as QEMU's -cpu
    #[arg(long)]
    processor: Option<String>,
    /// A directory the command may write to, under the same path; may be repeated
    #[arg(long, value_name = "DIR")]
    share: Vec<PathBuf>,
    /// Give up after this many seconds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<f64>,
    /// Keep the kernel's messages in this file
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
    /// Say how long it took
    #[arg(long)]
    verbose: bool,
    /// The command
    #[arg(last = true, required = true)]
    argv: Vec<String>,
}

fn main() -> ExitCode {
    match run(Options::parse()) {
        Ok(code) => code,
        Err(error) => {
            if let Some(interrupted) = error.downcast_ref::<Interrupted>() {
                return exit_code(128 + interrupted.signal);
            }
            eprintln!("ebbtide-lab: {error:#}");
            // Told apart from the command's own failures, as `env` and `timeout` do.
            ExitCode::from(125)
        }
    }
}

fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

fn run(options: Options) -> Result<ExitCode> {
    match options.command {
        Command::Capsule(options) => run_in_capsule(options),
        Command::Image { kernel } => {
            let image = image::build(kernel)?;
            for path in std::iter::once(&image.kernel).chain(&image.initrd) {
                println!("{}", path.display());
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Selftest(options) => selftest(&options),
        Command::Prepare(options) => tasks::prepare(&options),
        Command::Demo(options) => tasks::demo(&options),
        Command::System(options) => tasks::system(&options),
        Command::Each(options) => tasks::each(&options),
        Command::Bench(options) => tasks::bench(&options),
    }
}

fn selftest(options: &SelftestOptions) -> Result<ExitCode> {
    let (program, binary) = match options.vmm.as_str() {
        "qemu" => (Program::Qemu, None),
        path => {
            let path = std::path::absolute(path).context("--vmm")?;
            (Program::Ebbtide(path.clone()), Some(path))
        }
    };
    let images = options
        .kernel
        .iter()
        .map(|series| image::build(*series))
        .collect::<Result<Vec<_>>>()?;
    if let Some(code) = tasks::elsewhere(
        binary.as_deref(),
        tasks::Needs::guests(true),
        tasks::Words::Standard,
    )? {
        return Ok(code);
    }
    for image in &images {
        for cpus in &options.cpus {
            let result = match options.boots {
                Some(times) => selftest::boots(&program, image, *cpus, times),
                None => selftest::run(&program, image, *cpus, options.fill << 20),
            };
            result.with_context(|| format!("{} with {cpus} CPUs", image.version))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn run_in_capsule(options: CapsuleOptions) -> Result<ExitCode> {
    let default = Capsule::default();
    let capsule = Capsule {
        processor: options.processor.unwrap_or(default.processor),
        memory_mib: options.memory,
        cpus: options.cpus,
        shares: options.share,
        timeout: options
            .timeout
            .map(Duration::try_from_secs_f64)
            .transpose()
            .context("--timeout")?,
        console_log: options.console,
        ..default
    };
    run_and_pass_on(&capsule, options.argv, options.verbose)
}

/// Runs `argv` in `capsule` and passes on what it prints and how it ends.
fn run_and_pass_on(capsule: &Capsule, argv: Vec<String>, verbose: bool) -> Result<ExitCode> {
    let invocation = Invocation::here(argv)?;
    let outcome = capsule.run(&invocation, &mut std::io::stdout(), &mut std::io::stderr())?;
    if verbose {
        eprintln!(
            "capsule: command started after {:.2?}, ended after {:.2?}",
            outcome.boot, outcome.total
        );
    }
    Ok(exit_code(outcome.shell_code()))
}
