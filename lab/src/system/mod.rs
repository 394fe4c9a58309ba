// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! System tests: Debian guests under Ebbtide, seen from inside the guest and from management.

mod boot;
mod ctl;
mod dimm;
mod endings;
mod flat;
mod hostile;
mod hotplug;
mod mistakes;
mod monitor;
mod reset;
mod resize;
mod topology;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::deny;
use crate::host_log;
use crate::image::Image;
use crate::kernel::Series;
use crate::vmm::{Machine, Program, Vmm, log_tail};

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const GIB: u64 = 1 << 30;
/// Boot RAM of the guests here.
pub(crate) const BOOT: u64 = 512 * MIB;
/// A guest under emulated KVM is up well within this.
pub(crate) const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// vCPUs of a guest whose number of them does not matter.
pub(crate) const USUAL_CPUS: u32 = 2;
pub(crate) const STEP_LIMIT: Duration = Duration::from_secs(180);

/// What the scenarios run on.
pub struct Ground {
    /// The binary.
    pub ebbtide: PathBuf,
    /// The guest.
    pub image: Image,
    /// The guest with a larger kernel of the same series, where that one lacks drivers.
    pub all_drivers: Option<Image>,
    /// Which kernel that is.
    pub series: Series,
    /// The guest that is its own kernel and does to its devices what no driver would.
    pub hostile: PathBuf,
    /// The guest that ejects disks.
    pub ejector: PathBuf,
    /// Full length instead of the short form.
    pub long: bool,
    /// A Python interpreter that has `qemu.qmp`.
    pub python: PathBuf,
    /// Where the VMM of the moment writes its log.
    pub log: PathBuf,
}

impl Ground {
    /// Whether a scenario runs here; one that was asked for does.
    fn runs(&self, scenario: &Scenario, asked: bool) -> bool {
        match scenario.short {
            Short::On(series) => series == self.series || self.long || asked,
            Short::Everywhere => true,
        }
    }

    /// A guest with `cpus` vCPUs that may grow to `max_bytes`.
    pub(crate) fn machine(&self, cpus: u32, max_bytes: u64) -> Machine {
        Machine {
            cpus,
            max_bytes: Some(max_bytes),
            log: Some(self.log.clone()),
            ..Machine::new(Program::Ebbtide(self.ebbtide.clone()), self.image.clone())
        }
    }

    /// Starts such a guest and waits for its agent.
    pub(crate) fn boot(&self, cpus: u32, max_bytes: u64) -> Result<Vmm> {
        self.start(&self.machine(cpus, max_bytes))
    }

    /// Starts a guest and waits for its agent.
    pub(crate) fn start(&self, machine: &Machine) -> Result<Vmm> {
        let mut vmm = Vmm::start(machine)?;
        vmm.wait_ready(BOOT_LIMIT).context("boot")?;
        let cpus = vmm.ready().map(|ready| ready.cpus);
        ensure!(
            cpus == Some(machine.cpus),
            "the guest has {cpus:?} CPUs, not {}",
            machine.cpus
        );
        Ok(vmm)
    }
}

/// One test.
struct Scenario {
    name: &'static str,
    run: fn(&Ground) -> Result<()>,
    /// Where it runs in the short form; at full length it runs everywhere.
    short: Short,
}

/// Which kernels' guests are enough for a short form.
#[derive(Clone, Copy, PartialEq)]
enum Short {
    Everywhere,
    /// The guest's kernel makes no difference, or an older one would be the first to fail.
    On(Series),
}

const fn scenario(name: &'static str, run: fn(&Ground) -> Result<()>) -> Scenario {
    let short = Short::Everywhere;
    Scenario { name, run, short }
}

/// A scenario of which the short form runs on one kernel: those that take long, and those of the
/// VMM alone.
const fn one(series: Series, name: &'static str, run: fn(&Ground) -> Result<()>) -> Scenario {
    let short = Short::On(series);
    Scenario { name, run, short }
}

const SCENARIOS: &[Scenario] = &[
    one(
        Series::V6_1,
        "mistakes on the command line",
        mistakes::command_line,
    ),
    one(
        Series::V6_1,
        "mistakes with files and sockets",
        mistakes::files,
    ),
    scenario("boot", boot::processors),
    // The demo does so on 6.1.
    one(
        Series::V6_12,
        "grow and shrink with a pattern",
        resize::rounds,
    ),
    scenario("targets at random", resize::random_targets),
    scenario(
        "memory grows beside held requests",
        resize::beside_held_requests,
    ),
    one(
        Series::V6_12,
        "reboot, reset, stop and continue",
        reset::in_mid_resize,
    ),
    one(
        Series::V6_1,
        "a triple fault ends with --no-reboot",
        reset::no_reboot,
    ),
    scenario("devices come and go", hotplug::cycles),
    scenario("devices come and go behind a port", hotplug::native),
    scenario("an id, a slot and a node are used again", hotplug::reuse),
    scenario("a disk goes by force while it works", hotplug::forced),
    one(
        Series::V6_1,
        "a dead disk goes by force",
        hotplug::quarantined,
    ),
    one(
        Series::V6_12,
        "devices of each kind go by force",
        hotplug::each_by_force,
    ),
    one(
        Series::V6_12,
        "a removal is waited for",
        hotplug::waited_for,
    ),
    one(
        Series::V6_12,
        "a reset that a read outlasts",
        hotplug::outlasted,
    ),
    one(
        Series::V6_12,
        "a reset that has to wait for a read",
        hotplug::awaited,
    ),
    one(Series::V6_1, "mistakes with devices", hotplug::mistakes),
    one(
        Series::V6_12,
        "a switch goes with all that is below",
        topology::whole,
    ),
    one(
        Series::V6_1,
        "a switch is put together out of sight",
        topology::built,
    ),
    one(
        Series::V6_1,
        "a switch goes while its child drains",
        topology::nested,
    ),
    one(
        Series::V6_12,
        "an adapter goes amid a long read",
        topology::adapter,
    ),
    one(
        Series::V6_1,
        "devices come while the guest boots",
        topology::at_boot,
    ),
    one(
        Series::V6_12,
        "what there is, by guest and by monitor",
        topology::inventory,
    ),
    scenario("dimms come and go", dimm::cycles),
    scenario("a guest keeps a dimm", dimm::refusal),
    scenario("a dimm stays until its reason ends", dimm::refusal_undone),
    scenario("a dimm that can't be let go of", dimm::no_answer),
    scenario("the removal of a dimm is withdrawn", dimm::withdrawn),
    one(Series::V6_1, "a dimm goes under a request", dimm::in_flight),
    one(Series::V6_12, "many dimms", dimm::many),
    one(Series::V6_12, "a dimm on a full file system", dimm::full),
    one(
        Series::V6_12,
        "a dimm on a file that is cut short",
        dimm::truncated,
    ),
    one(
        Series::V6_1,
        "a reset amid the removal of a dimm",
        dimm::reset,
    ),
    one(Series::V6_1, "mistakes with dimms", dimm::mistakes),
    one(Series::V6_12, "devices come and go by hand", ctl::by_hand),
    one(
        Series::V6_12,
        "cards of passt come and go by hand",
        ctl::user_network,
    ),
    one(Series::V6_1, "a hostile guest", hostile::run),
    one(Series::V6_1, "a flat guest ejects disks", flat::ejects),
    one(
        Series::V6_1,
        "signals end the VM in order",
        endings::signals,
    ),
    one(Series::V6_1, "quit ends the VM in order", endings::quit),
    one(
        Series::V6_1,
        "a monitor client is killed",
        monitor::killed_client,
    ),
    one(Series::V6_1, "garbage on the monitor", monitor::garbage),
    one(
        Series::V6_1,
        "lines typed at the monitor",
        monitor::typed_lines,
    ),
    one(Series::V6_1, "qemu.qmp", monitor::python_client),
];

/// Runs the scenario called `only`, or those whose name contains it, on each of `grounds`.
///
/// # Errors
/// Names those that failed; the others have run.
pub fn run(grounds: &[Ground], only: Option<&str>) -> Result<()> {
    let (mut passed, mut elsewhere) = (0u32, 0u32);
    let mut failed = Vec::new();
    let is_whole = |part| SCENARIOS.iter().any(|it| it.name == part);
    let chosen = |name: &str| match only {
        None => true,
        Some(part) if is_whole(part) => name == part,
        Some(part) => name.contains(part),
    };
    for ground in grounds {
        for scenario in SCENARIOS {
            if !chosen(scenario.name) {
                continue;
            }
            if !ground.runs(scenario, only.is_some()) {
                elsewhere += 1;
                continue;
            }
            let begun = Instant::now();
            let result = (scenario.run)(ground);
            let seconds = begun.elapsed().as_secs_f64();
            let verdict = if result.is_ok() { "ok" } else { "FAILED" };
            println!(
                "{:<5} {:<40} {seconds:>6.1} s  {verdict}",
                ground.series, scenario.name
            );
            match result {
                Ok(()) => passed += 1,
                Err(e) => {
                    println!("{e:#}{}{}", log_tail(&ground.log), host_log::tail());
                    let reason = format!("{e:#}");
                    let reason: String = reason
                        .lines()
                        .next()
                        .unwrap_or_default()
                        .chars()
                        .take(160)
                        .collect();
                    let (name, series) = (scenario.name, ground.series);
                    failed.push(format!("{name} on {series} ({reason})"));
                }
            }
        }
    }
    println!(
        "system: {passed} passed, {} failed, {elsewhere} on the other kernel only",
        failed.len()
    );
    ensure!(
        passed > 0 || !failed.is_empty(),
        "no scenario has this name"
    );
    if !failed.is_empty() {
        bail!("failed: {}", failed.join("; "));
    }
    Ok(())
}

/// The guest's kernel must have nothing to complain about.
pub(crate) fn clean_kernel_log(vmm: &mut Vmm) -> Result<()> {
    let denied = vmm.guest().denied_kernel_messages(&deny::patterns())?;
    ensure!(
        denied.is_empty(),
        "the guest's kernel log holds:\n{}",
        denied.join("\n")
    );
    Ok(())
}

/// What Linux writes when an ACPI method fails, or a device is not what it said.
const ACPI_ERRORS: &[&str] = &[
    "ACPI Error",
    "ACPI BIOS Error",
    "ACPI Exception",
    "ACPI Warning",
    "AE_",
    "Eject failed",
    "Eject incomplete",
];

/// The guest's ACPI must have nothing to complain about.
pub(crate) fn no_acpi_error(vmm: &mut Vmm) -> Result<()> {
    let patterns: Vec<String> = ACPI_ERRORS.iter().map(|it| (*it).to_owned()).collect();
    let found = vmm.guest().denied_kernel_messages(&patterns)?;
    ensure!(
        found.is_empty(),
        "the guest's ACPI says:\n{}",
        found.join("\n")
    );
    Ok(())
}

/// Powers off; the VMM must end well and leave no socket.
pub(crate) fn finish(mut vmm: Vmm) -> Result<()> {
    clean_kernel_log(&mut vmm)?;
    let socket = vmm.qmp_path();
    vmm.power_off(STEP_LIMIT).context("power off")?;
    ensure!(!socket.exists(), "{} is left behind", socket.display());
    Ok(())
}
