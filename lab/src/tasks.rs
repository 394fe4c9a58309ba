// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The long tasks: each runs on this machine's KVM or, where that can't carry a kernel, as a whole
//! in the capsule.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ebbtide_lab::capsule::{self, Capsule};
use ebbtide_lab::delay;
use ebbtide_lab::kernel::{Kernel, Series};
use ebbtide_lab::probe::{self, Place};
use ebbtide_lab::process::Contained;
use ebbtide_lab::system::{self, Ground};
use ebbtide_lab::{agent, bench as guests, demo as show, image, packages, python};

/// RAM of the capsule for guests that grow to 8 GiB, in MiB.
const LARGE_CAPSULE_MIB: u64 = 14_000;
/// Processors of the capsule for guests: it runs on one core, and a second one only adds switches
/// between them.
const GUESTS: u32 = 1;
/// Processors of the capsule where one thread's kick must meet another's guest.
const KICKS: u32 = 2;
/// No short task takes this long, whatever else the machine does.
const SHORT: Duration = Duration::from_secs(20 * 60);
/// Nor a long one this.
const LONG: Duration = Duration::from_secs(3 * 3600);
/// Nor a single program of `each`.
const PROGRAM: Duration = Duration::from_secs(5 * 60);

#[derive(clap::Args)]
pub struct PrepareOptions {
    #[command(flatten)]
    common: Common,
}

#[derive(clap::Args)]
pub struct DemoOptions {
    #[command(flatten)]
    common: Common,
    /// The kernel: 6.1 or 6.12
    #[arg(long, default_value = "6.1")]
    kernel: Series,
}

#[derive(clap::Args)]
pub struct SystemOptions {
    #[command(flatten)]
    common: Common,
    /// The kernel: 6.1 or 6.12; both if not given
    #[arg(long)]
    kernel: Option<Series>,
    /// Full length instead of the short form
    #[arg(long)]
    long: bool,
    /// Only the scenario of this name, or those whose name contains it
    #[arg(long)]
    only: Option<String>,
    /// Wait at random before what is asked of VMM and guest: finds tests that only pass in a hurry
    #[arg(long, value_name = "SEED")]
    delays: Option<u64>,
}

#[derive(clap::Args)]
pub struct EachOptions {
    #[command(flatten)]
    common: Common,
    /// The programs
    #[arg(last = true, required = true)]
    programs: Vec<PathBuf>,
}

#[derive(clap::Args)]
pub struct BenchOptions {
    #[command(flatten)]
    common: Common,
    /// What to measure
    #[arg(long, value_enum, default_value_t = Suite::Guests)]
    suite: Suite,
    /// How often `unplug` and `blk` are measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..))]
    rounds: u8,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Suite {
    /// Boot, grow, shrink, memory of the VMM
    Guests,
    /// Disks that their guest ejects while requests of theirs are under way
    Unplug,
    /// Of these only the rows of this machine's own KVM
    UnplugHost,
    /// Disks that their guest reads as fast as it goes
    Blk,
}

/// What every task is given.
#[derive(clap::Args)]
struct Common {
    /// The ebbtide binary
    #[arg(long)]
    ebbtide: PathBuf,
    /// Where results go; the demo's into DIR/demo
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Where words for people go: tasks whose standard output is read by a program say them elsewhere.
#[derive(Clone, Copy)]
pub enum Words {
    Standard,
    Error,
}

/// What a task needs of a capsule.
#[derive(Clone, Copy)]
pub struct Needs<'a> {
    /// Directories it writes to.
    pub shares: &'a [PathBuf],
    /// Processors.
    pub cpus: u32,
    /// It is ended after this.
    pub limit: Duration,
}

impl Needs<'_> {
    /// Of a task that boots guests.
    pub fn guests(long: bool) -> Self {
        Needs {
            shares: &[],
            cpus: GUESTS,
            limit: if long { LONG } else { SHORT },
        }
    }
}

pub fn prepare(options: &PrepareOptions) -> Result<ExitCode> {
    let choice = probe::choose(Some(&options.common.ebbtide))?;
    if choice.place == Place::Capsule {
        packages::ensure_packages(&["qemu-system-x86"])?;
        Kernel::full()?.vmlinux()?;
    }
    python::ensure()?;
    agent::build_flat()?;
    for series in Series::ALL {
        image::build(series)?;
        image::with_all_drivers(series)?;
    }
    Ok(ExitCode::SUCCESS)
}

pub fn demo(options: &DemoOptions) -> Result<ExitCode> {
    let image = image::build(options.kernel)?;
    let dir = options.common.out.join("demo");
    let place = elsewhere(
        Some(&options.common.ebbtide),
        Needs {
            shares: std::slice::from_ref(&dir),
            ..Needs::guests(false)
        },
        Words::Standard,
    )?;
    if let Some(code) = place {
        return Ok(code);
    }
    let kvm = if capsule::is_inside() {
        "capsule"
    } else {
        "host"
    };
    show::run(&options.common.ebbtide, image, kvm, &dir)?;
    Ok(ExitCode::SUCCESS)
}

pub fn system(options: &SystemOptions) -> Result<ExitCode> {
    let kernels = match options.kernel {
        Some(series) => vec![series],
        None => Series::ALL.to_vec(),
    };
    let python = python::ensure()?;
    packages::ensure_packages(&["passt"])?;
    let flat = agent::build_flat()?;
    let log = std::env::temp_dir().join(format!("ebbtide-system-{}.log", std::process::id()));
    let grounds = kernels
        .into_iter()
        .map(|series| {
            Ok(Ground {
                ebbtide: options.common.ebbtide.clone(),
                image: image::build(series)?,
                all_drivers: image::with_all_drivers(series)?,
                series,
                hostile: flat.hostile.clone(),
                ejector: flat.ejector.clone(),
                long: options.long,
                python: python.clone(),
                log: log.clone(),
            })
        })
        .collect::<Result<Vec<_>>>()?;
    if let Some(code) = elsewhere(
        Some(&options.common.ebbtide),
        Needs::guests(options.long),
        Words::Standard,
    )? {
        return Ok(code);
    }
    if let Some(seed) = options.delays {
        delay::begin(seed);
    }
    let result = system::run(&grounds, options.only.as_deref());
    // Only there if a VM was started.
    let _ = std::fs::remove_file(log);
    result.map(|()| ExitCode::SUCCESS)
}

pub fn each(options: &EachOptions) -> Result<ExitCode> {
    if let Some(code) = elsewhere(
        Some(&options.common.ebbtide),
        Needs {
            cpus: KICKS,
            ..Needs::guests(false)
        },
        Words::Standard,
    )? {
        return Ok(code);
    }
    for program in &options.programs {
        let mut command = Command::new(program);
        command.env("EBBTIDE_REQUIRE_KVM", "1");
        let status = Contained::spawn(&mut command, &[])?.wait(PROGRAM)?;
        if !status.success() {
            bail!("{} ended with {status}", program.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub fn bench(options: &BenchOptions) -> Result<ExitCode> {
    packages::ensure_packages(&["qemu-system-x86"])?;
    match options.suite {
        Suite::UnplugHost => {
            return match unplug_on_host(options)? {
                None => Ok(ExitCode::SUCCESS),
                Some(reason) => bail!("this machine's own KVM runs no guest: {reason}"),
            };
        }
        Suite::Unplug if !capsule::is_inside() => {
            if let Some(reason) = unplug_on_host(options)? {
                eprintln!("no ejects on this machine's own KVM, which runs no guest: {reason}");
            }
        }
        _ => {}
    }
    let image = image::build(Series::V6_1)?;
    if let Some(code) = elsewhere(
        Some(&options.common.ebbtide),
        Needs::guests(true),
        Words::Error,
    )? {
        return Ok(code);
    }
    match options.suite {
        Suite::Guests => guests::run(&options.common.ebbtide, &image)?,
        Suite::Unplug | Suite::UnplugHost => {
            guests::unplug::run(&options.common.ebbtide, &image, options.rounds.into())?
        }
        Suite::Blk => guests::blk::run(&options.common.ebbtide, &image, options.rounds.into())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Measures with a guest that is its own kernel, on this machine's own KVM; why not, if that runs none.
fn unplug_on_host(options: &BenchOptions) -> Result<Option<String>> {
    let ebbtide = &options.common.ebbtide;
    let refused = probe::refuses_flat_guests(ebbtide)?;
    if refused.is_none() {
        let guest = agent::build_flat()?.ejector;
        guests::unplug::run_on_host(ebbtide, &guest, options.rounds.into())?;
    }
    Ok(refused)
}

/// Runs this very command line in the capsule if a guest can't run here; None: go on here.
pub fn elsewhere(
    ebbtide: Option<&Path>,
    needs: Needs<'_>,
    words: Words,
) -> Result<Option<ExitCode>> {
    let choice = probe::choose(ebbtide)?;
    let text = match choice.place {
        Place::Host if capsule::is_inside() => return Ok(None),
        Place::Host => format!("KVM: this machine's ({})", choice.reason),
        Place::Capsule => format!("KVM: the capsule's ({})", choice.reason),
    };
    match words {
        Words::Standard => println!("{text}"),
        Words::Error => eprintln!("{text}"),
    }
    // The capsule writes past our buffer.
    std::io::stdout().flush()?;
    if choice.place == Place::Host {
        return Ok(None);
    }
    packages::ensure_packages(&["qemu-system-x86"])?;
    let itself = std::env::current_exe().context("own path")?;
    let argv = std::iter::once(itself.into_os_string())
        .chain(std::env::args_os().skip(1))
        .map(|word| word.into_string().ok().context("an argument is not UTF-8"))
        .collect::<Result<Vec<_>>>()?;
    let capsule = Capsule {
        memory_mib: LARGE_CAPSULE_MIB,
        shares: needs.shares.to_vec(),
        cpus: needs.cpus,
        timeout: Some(needs.limit),
        ..Capsule::default()
    };
    super::run_and_pass_on(&capsule, argv, false).map(Some)
}
