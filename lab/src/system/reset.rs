// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest restarts, is reset and is stopped, with memory plugged and in the middle of a resize.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{BOOT, BOOT_LIMIT, GIB, Ground, STEP_LIMIT, USUAL_CPUS, clean_kernel_log, finish};
use crate::vmm::Vmm;

const EVENT_LIMIT: Duration = Duration::from_secs(30);
/// Long enough for a resize to be under way, short enough for it not to be done.
const MID_RESIZE: Duration = Duration::from_millis(150);

/// One guest goes through all of it: booting is what takes the time.
pub fn in_mid_resize(ground: &Ground) -> Result<()> {
    let mut vmm = ground.boot(USUAL_CPUS, 3 * GIB)?;
    stop_and_continue(&mut vmm).context("stop and cont in mid-resize")?;
    guest_reboot(&mut vmm).context("guest reboot with memory plugged")?;
    system_reset(&mut vmm).context("system_reset in mid-resize")?;
    finish(vmm)
}

fn stop_and_continue(vmm: &mut Vmm) -> Result<()> {
    vmm.request_total(3 * GIB)?;
    std::thread::sleep(MID_RESIZE);
    vmm.qmp().execute("stop", Value::Null)?;
    vmm.qmp().wait_event("STOP", EVENT_LIMIT)?;
    ensure!(vmm.status()? == "paused", "the VM is {}", vmm.status()?);
    let stopped_at = vmm.total()?;
    std::thread::sleep(Duration::from_millis(500));
    // One request may have been in the queue; a stopped guest sends no more.
    let later = vmm.total()?;
    ensure!(
        later - stopped_at <= 128 << 20,
        "memory went on from {stopped_at} to {later} while the guest was stopped"
    );
    vmm.qmp().execute("cont", Value::Null)?;
    vmm.qmp().wait_event("RESUME", EVENT_LIMIT)?;
    vmm.wait_total(3 * GIB, STEP_LIMIT)?;
    clean_kernel_log(vmm)
}

fn guest_reboot(vmm: &mut Vmm) -> Result<()> {
    vmm.guest().reboot()?;
    let reset = vmm.qmp().wait_event("RESET", EVENT_LIMIT)?;
    ensure!(reset.data["guest"] == true, "RESET says {}", reset.data);
    vmm.wait_ready(BOOT_LIMIT).context("second boot")?;
    // The target still stands: the new guest grows to it again.
    vmm.wait_total(3 * GIB, STEP_LIMIT)?;
    clean_kernel_log(vmm)
}

fn system_reset(vmm: &mut Vmm) -> Result<()> {
    vmm.resize(BOOT, STEP_LIMIT)?;
    vmm.request_total(3 * GIB)?;
    std::thread::sleep(MID_RESIZE);
    vmm.qmp().execute("system_reset", Value::Null)?;
    let reset = vmm.qmp().wait_event("RESET", EVENT_LIMIT)?;
    ensure!(reset.data["guest"] == false, "RESET says {}", reset.data);
    vmm.wait_ready(BOOT_LIMIT).context("boot after the reset")?;
    vmm.wait_total(3 * GIB, STEP_LIMIT)?;
    vmm.resize(BOOT, STEP_LIMIT)?;
    clean_kernel_log(vmm)
}

/// With `--no-reboot` a reboot of the guest ends the VM, and well.
pub fn no_reboot(ground: &Ground) -> Result<()> {
    let mut machine = ground.machine(1, GIB);
    machine.more.push("--no-reboot".into());
    let mut vmm = Vmm::start(&machine)?;
    vmm.wait_ready(BOOT_LIMIT)?;
    vmm.guest().reboot()?;
    let event = vmm.qmp().wait_event("SHUTDOWN", EVENT_LIMIT)?;
    ensure!(
        event.data["guest"] == true && event.data["reason"] == "guest-reset",
        "SHUTDOWN says {}",
        event.data
    );
    let status = vmm.wait_exit(EVENT_LIMIT)?;
    ensure!(status.success(), "the VMM ended with {status}");
    Ok(())
}
