// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest restarts, is reset and is stopped, with memory plugged and in the middle of a resize.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{BOOT, BOOT_LIMIT, GIB, Ground, STEP_LIMIT, USUAL_CPUS, clean_kernel_log, finish};
use crate::vmm::Vmm;

const EVENT_LIMIT: Duration = Duration::from_secs(30);
/// How often it is tried to come upon a resize that is under way.
const TRIES: u32 = 10;
/// A guest that is stopped is looked at again after this.
const STANDS: Duration = Duration::from_millis(500);
/// To how much the guest grows.
const GROWN: u64 = 3 * GIB;

/// One guest goes through all of it: booting is what takes the time.
pub fn in_mid_resize(ground: &Ground) -> Result<()> {
    let mut vmm = ground.boot(USUAL_CPUS, GROWN)?;
    stop_and_continue(&mut vmm).context("stop and cont in mid-resize")?;
    guest_reboot(&mut vmm).context("guest reboot with memory plugged")?;
    system_reset(&mut vmm).context("system_reset in mid-resize")?;
    finish(vmm)
}

fn stop_and_continue(vmm: &mut Vmm) -> Result<()> {
    let stopped_at = stop_amid_growth(vmm)?;
    std::thread::sleep(STANDS);
    // One request may have been in the queue; a stopped guest sends no more.
    let later = vmm.total()?;
    ensure!(
        (stopped_at..=stopped_at + (128 << 20)).contains(&later),
        "memory went on from {stopped_at} to {later} while the guest was stopped"
    );
    go_on(vmm)?;
    vmm.wait_total(GROWN, STEP_LIMIT)?;
    clean_kernel_log(vmm)
}

/// Has a guest without plugged memory grow, and stops it before it is done; with how much it has then.
fn stop_amid_growth(vmm: &mut Vmm) -> Result<u64> {
    for _ in 0..TRIES {
        begin_to_grow(vmm)?;
        vmm.qmp().execute("stop", Value::Null)?;
        vmm.qmp().wait_event("STOP", EVENT_LIMIT)?;
        ensure!(vmm.status()? == "paused", "the VM is {}", vmm.status()?);
        let total = vmm.total()?;
        if total < GROWN {
            return Ok(total);
        }
        println!("      it had grown before it was stopped: once more");
        go_on(vmm)?;
        vmm.resize(BOOT, STEP_LIMIT)?;
    }
    bail!("{TRIES} times it had grown before it was stopped")
}

fn go_on(vmm: &mut Vmm) -> Result<()> {
    vmm.qmp().execute("cont", Value::Null)?;
    vmm.qmp().wait_event("RESUME", EVENT_LIMIT)?;
    Ok(())
}

/// Asks for more memory, and waits until the guest has taken some of it.
fn begin_to_grow(vmm: &mut Vmm) -> Result<()> {
    vmm.request_total(GROWN)?;
    let begun = Instant::now();
    while vmm.total()? == BOOT {
        ensure!(begun.elapsed() < STEP_LIMIT, "it does not grow");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn guest_reboot(vmm: &mut Vmm) -> Result<()> {
    vmm.guest().reboot()?;
    let reset = vmm.qmp().wait_event("RESET", EVENT_LIMIT)?;
    ensure!(reset.data["guest"] == true, "RESET says {}", reset.data);
    vmm.wait_ready(BOOT_LIMIT).context("second boot")?;
    // The target still stands: the new guest grows to it again.
    vmm.wait_total(GROWN, STEP_LIMIT)?;
    clean_kernel_log(vmm)
}

fn system_reset(vmm: &mut Vmm) -> Result<()> {
    let events = vmm.qmp().take_events()?;
    ensure!(
        events.iter().all(|event| event.name != "RESET"),
        "one more reset than was asked for: {events:?}"
    );
    let mut tries = 0..TRIES;
    loop {
        tries.next().context("each time it grows at once")?;
        vmm.resize(BOOT, STEP_LIMIT)?;
        begin_to_grow(vmm)?;
        if vmm.total()? < GROWN {
            break;
        }
    }
    vmm.qmp().execute("system_reset", Value::Null)?;
    let reset = vmm.qmp().wait_event("RESET", EVENT_LIMIT)?;
    ensure!(reset.data["guest"] == false, "RESET says {}", reset.data);
    vmm.wait_ready(BOOT_LIMIT).context("boot after the reset")?;
    vmm.wait_total(GROWN, STEP_LIMIT)?;
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
