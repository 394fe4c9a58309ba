// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! System tests: Debian guests under Ebbtide, seen from inside the guest and from management.

mod boot;
mod endings;
mod mistakes;
mod monitor;
mod reset;
mod resize;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::deny;
use crate::image::Image;
use crate::kernel::Series;
use crate::vmm::{Machine, Program, Vmm, log_tail};

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const GIB: u64 = 1 << 30;
/// Boot RAM of the guests here.
pub(crate) const BOOT: u64 = 512 * MIB;
/// A guest under emulated KVM is up well within this.
pub(crate) const BOOT_LIMIT: Duration = Duration::from_secs(90);
pub(crate) const STEP_LIMIT: Duration = Duration::from_secs(180);

/// What the scenarios run on.
pub struct Ground {
    /// The binary.
    pub ebbtide: PathBuf,
    /// The guest.
    pub image: Image,
    /// Which kernel that is.
    pub series: Series,
    /// Full length instead of the short form.
    pub long: bool,
    /// A Python interpreter that has `qemu.qmp`.
    pub python: PathBuf,
    /// Where the VMM of the moment writes its log.
    pub log: PathBuf,
}

impl Ground {
    /// A guest with `cpus` vCPUs that may grow to `max_bytes`.
    pub(crate) fn machine(&self, cpus: u32, max_bytes: u64) -> Machine {
        Machine {
            cpus,
            max_bytes: Some(max_bytes),
            log: Some(self.log.clone()),
            ..Machine::new(Program::Ebbtide(self.ebbtide.clone()), self.image.clone())
        }
    }

    /// vCPUs of a guest whose number of them does not matter.
    pub(crate) fn usual_cpus(&self) -> u32 {
        if self.long { 2 } else { 1 }
    }

    /// Starts such a guest and waits for its agent.
    pub(crate) fn boot(&self, cpus: u32, max_bytes: u64) -> Result<Vmm> {
        let mut vmm = Vmm::start(&self.machine(cpus, max_bytes))?;
        vmm.wait_ready(BOOT_LIMIT).context("boot")?;
        Ok(vmm)
    }
}

/// One test.
struct Scenario {
    name: &'static str,
    /// Needs one kernel only: what it tests is on the host's side.
    once: bool,
    /// Left to the long form: does not pass every time yet, see ARCHITECTURE.md.
    long: bool,
    run: fn(&Ground) -> Result<()>,
}

const fn each(name: &'static str, run: fn(&Ground) -> Result<()>) -> Scenario {
    Scenario {
        name,
        once: false,
        long: false,
        run,
    }
}

const fn once(name: &'static str, run: fn(&Ground) -> Result<()>) -> Scenario {
    Scenario {
        name,
        once: true,
        long: false,
        run,
    }
}

const fn long(name: &'static str, run: fn(&Ground) -> Result<()>) -> Scenario {
    Scenario {
        long: true,
        ..each(name, run)
    }
}

const SCENARIOS: &[Scenario] = &[
    once("mistakes on the command line", mistakes::command_line),
    once("mistakes with files and sockets", mistakes::files),
    each("boot", boot::processors),
    each("grow and shrink with a pattern", resize::rounds),
    each("targets at random", resize::random_targets),
    long("reboot, reset, stop and continue", reset::in_mid_resize),
    once("a triple fault ends with --no-reboot", reset::no_reboot),
    once("signals end the VM in order", endings::signals),
    once("quit ends the VM in order", endings::quit),
    once("a monitor client is killed", monitor::killed_client),
    once("garbage on the monitor", monitor::garbage),
    once("qemu.qmp", monitor::python_client),
];

/// Runs the scenarios whose name contains `only`, on each of `grounds`.
///
/// # Errors
/// Names those that failed; the others have run.
pub fn run(grounds: &[Ground], only: Option<&str>) -> Result<()> {
    let mut passed = 0u32;
    let mut failed = Vec::new();
    for (index, ground) in grounds.iter().enumerate() {
        for scenario in SCENARIOS {
            let wanted = only.is_none_or(|o| scenario.name.contains(o));
            if !wanted || (scenario.once && index > 0) {
                continue;
            }
            if scenario.long && !ground.long {
                println!(
                    "{:<5} {:<40} left to the long form",
                    ground.series, scenario.name
                );
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
                    println!("{e:#}{}", log_tail(&ground.log));
                    failed.push(format!("{} on {}", scenario.name, ground.series));
                }
            }
        }
    }
    println!("system: {passed} passed, {} failed", failed.len());
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

/// Powers off; the VMM must end well and leave no socket.
pub(crate) fn finish(mut vmm: Vmm) -> Result<()> {
    clean_kernel_log(&mut vmm)?;
    let socket = vmm.qmp_path();
    vmm.power_off(STEP_LIMIT).context("power off")?;
    ensure!(!socket.exists(), "{} is left behind", socket.display());
    Ok(())
}
