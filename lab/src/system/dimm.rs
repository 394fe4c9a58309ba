// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DIMMs come and go; a guest that can't let go says so.

mod held;
mod host;
mod kept;
mod slots;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::hotplug::{Residue, deleted, kernel_log};
use super::{BOOT, GIB, Ground, MIB, STEP_LIMIT, USUAL_CPUS, finish};
use crate::resident;
use crate::stalls::Stalls;
use crate::vmm::{Machine, Vmm};
use held::WorkingDisk;
pub use held::in_flight;
pub use host::{full, truncated};
pub use kept::{no_answer, refusal_undone, withdrawn};
pub use slots::many;

const DIMM: u64 = 256 * MIB;
/// The smallest DIMM there is.
const SECTION: u64 = 128 * MIB;
/// A guest adds a DIMM, or removes an empty one, within this.
const GUEST: Duration = Duration::from_secs(30);
/// How far the host's memory after a cycle may be from that before the first, the guest's boot RAM left aside.
const RSS_SLACK: u64 = 64 * MIB;
const LOOK: Duration = Duration::from_millis(50);
/// A guest that can't let go says so within this, or the test is over.
const REFUSAL: Duration = Duration::from_secs(20);
/// And has to within this.
const REFUSED_WITHIN: Duration = Duration::from_secs(5);

fn machine(ground: &Ground, parameters: &str) -> Machine {
    let mut machine = ground.machine(USUAL_CPUS, BOOT);
    machine.memory_slots = 8;
    machine.command_line = format!("{} {parameters}", machine.command_line);
    machine
}

/// Plugged, filled, checked, unplugged while what was filled is in use, over and over, while disks work. Nothing more is left
/// behind by the last cycle than by an early one.
pub fn cycles(ground: &Ground) -> Result<()> {
    let mut vmm = ground.start(&machine(ground, ""))?;
    let disks = [
        WorkingDisk::start(&mut vmm, "vda")?,
        WorkingDisk::start(&mut vmm, "vdb")?,
    ];
    let own = resident::beside_boot_ram(&mut vmm)?;
    let (cycles, early) = if ground.long { (50, 9) } else { (3, 0) };
    let mut settled = None;
    for cycle in 0..cycles {
        one_cycle(&mut vmm, cycle).with_context(|| format!("cycle {cycle}"))?;
        resident::beside_boot_ram_within(&mut vmm, own + RSS_SLACK)
            .with_context(|| format!("cycle {cycle}"))?;
        match &settled {
            None if cycle < early => {}
            None => settled = Some(Residue::of(&mut vmm)?),
            Some(residue) => residue.again(&mut vmm)?,
        }
    }
    for disk in disks {
        disk.stop(&mut vmm, GUEST)?;
    }
    finish(vmm)
}

fn one_cycle(vmm: &mut Vmm, seed: u64) -> Result<()> {
    let before = plug(vmm, "memory-backend-ram")?;
    // What moves is put on memory that can go, before any other.
    vmm.guest().fill(DIMM / 2, seed, GUEST).context("fill")?;
    intact(vmm)?;
    // In use to the end: it moves, and nothing of it is lost.
    unplug(vmm)?;
    intact(vmm).context("moved off the DIMM")?;
    vmm.guest().free()?;
    wait_total(vmm, before, false)
}

/// What was filled holds what it was filled with.
fn intact(vmm: &mut Vmm) -> Result<()> {
    let checked = vmm.guest().check(STEP_LIMIT)?;
    ensure!(checked.ok, "{:?}", checked.mismatch);
    Ok(())
}

/// Gives the guest a DIMM; returns how much memory it had before.
fn plug(vmm: &mut Vmm, backend: &str) -> Result<u64> {
    let before = vmm.guest().report()?.mem_total;
    let object = json!({"qom-type": backend, "id": "m0", "size": DIMM});
    vmm.qmp().execute("object-add", object)?;
    let dimm = json!({"driver": "pc-dimm", "id": "dimm0", "memdev": "m0"});
    vmm.qmp().execute("device_add", dimm)?;
    wait_total(vmm, before + DIMM, true)?;
    Ok(before)
}

fn unplug(vmm: &mut Vmm) -> Result<()> {
    vmm.qmp().execute("device_del", json!({"id": "dimm0"}))?;
    deleted(vmm, "dimm0")?;
    vmm.qmp().execute("object-del", json!({"id": "m0"}))?;
    Ok(())
}

/// Waits until the guest's memory is about `bytes`: it needs some of a DIMM to describe it.
fn wait_total(vmm: &mut Vmm, bytes: u64, grows: bool) -> Result<()> {
    let slack = DIMM / 8;
    let begun = Instant::now();
    loop {
        let total = vmm.guest().report()?.mem_total;
        let there = if grows {
            total + slack >= bytes
        } else {
            total <= bytes + slack
        };
        if there {
            return Ok(());
        }
        if begun.elapsed() > GUEST {
            let log = kernel_log(vmm)?;
            bail!(
                "the guest has {} MiB, not {}\n{log}",
                total / MIB,
                bytes / MIB
            );
        }
        std::thread::sleep(LOOK);
    }
}

/// What the VMM says holds `words` in one line, soon.
fn said(vmm: &mut Vmm, words: &[&str]) -> Result<()> {
    let begun = Instant::now();
    while !vmm.has_said(words)? {
        let log = vmm.log();
        ensure!(
            begun.elapsed() < GUEST,
            "no line has all of {words:?}:{log}"
        );
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// A guest whose kernel uses a DIMM for itself refuses, and is told on; the DIMM goes on working.
pub fn refusal(ground: &Ground) -> Result<()> {
    let mut vmm = ground.start(&machine(ground, "memhp_default_state=online_kernel"))?;
    let before = vmm.guest().report()?.mem_total;
    // The kernel takes from the first what it never gives back, and from the second when the first is full.
    for (at, id) in ["dimm0", "dimm1"].into_iter().enumerate() {
        let memdev = format!("m{at}");
        let object = json!({"qom-type": "memory-backend-ram", "id": memdev, "size": SECTION});
        vmm.qmp().execute("object-add", object)?;
        let dimm = json!({"driver": "pc-dimm", "id": id, "memdev": memdev});
        vmm.qmp().execute("device_add", dimm)?;
        wait_total(&mut vmm, before + (at as u64 + 1) * SECTION, true)?;
    }
    // Pipes can't be moved.
    let held = SECTION + SECTION / 4;
    vmm.guest().hold_in_pipes(held, STEP_LIMIT)?;
    // What it says from here on is of this removal.
    vmm.qmp().take_events()?;
    let (stalls, begun) = (Stalls::watch(), Instant::now());
    vmm.qmp().execute("device_del", json!({"id": "dimm1"}))?;
    let event = vmm.qmp().wait_event("DEVICE_UNPLUG_GUEST_ERROR", REFUSAL)?;
    ensure!(event.data["device"] == json!("dimm1"), "{}", event.data);
    let said = vmm.qmp().execute("query-acpi-ospm-status", Value::Null)?;
    let refused =
        json!({"device": "dimm1", "slot": "1", "slot-type": "DIMM", "source": 3, "status": 0x82});
    ensure!(said[1] == refused, "{said}");
    let told = event.at.saturating_duration_since(begun);
    stalls.within(REFUSED_WITHIN, told, "the refusal")?;
    // The last of what it said, of this DIMM or another, by an event of its own.
    let events = vmm.qmp().take_events()?;
    let last = events.iter().rfind(|it| it.name == "ACPI_DEVICE_OST");
    let last = last.context("no ACPI_DEVICE_OST")?;
    ensure!(last.data["info"] == refused, "{}", last.data);
    let told = last.at.saturating_duration_since(begun);
    stalls.within(REFUSED_WITHIN, told, "the last ACPI_DEVICE_OST")?;
    let removals = vmm.qmp().execute("x-ebbtide-query-removals", Value::Null)?;
    ensure!(removals == json!([]), "{removals}");
    // It is as before, and in use.
    vmm.guest().free_pipes()?;
    vmm.guest().fill(SECTION, 1, GUEST)?;
    let checked = vmm.guest().check(GUEST)?;
    ensure!(checked.ok, "{:?}", checked.mismatch);
    // Asked again, it answers again: the kernel keeps some page there for ever, once it has had the choice.
    vmm.qmp().execute("device_del", json!({"id": "dimm1"}))?;
    wait_for_end(&mut vmm)?;
    vmm.power_off(STEP_LIMIT)
}

/// Has the guest's kernel use a DIMM for what it can't move: pipes. It is the memory that is taken first, as boot RAM is
/// all below 4 GiB, in a zone that others may need.
fn hold_the_dimm(vmm: &mut Vmm) -> Result<()> {
    vmm.guest().hold_in_pipes(32 * MIB, STEP_LIMIT)?;
    Ok(())
}

/// Waits for the end of a removal; false: it was refused.
fn wait_for_end(vmm: &mut Vmm) -> Result<bool> {
    let begun = Instant::now();
    while begun.elapsed() < GUEST {
        for event in vmm.qmp().take_events()? {
            match event.name.as_str() {
                "DEVICE_DELETED" => return Ok(true),
                "DEVICE_UNPLUG_GUEST_ERROR" => return Ok(false),
                _ => {}
            }
        }
        std::thread::sleep(LOOK);
    }
    bail!("neither gone nor refused")
}

/// A reset in the middle of a removal ends it; DIMMs that were not asked for are there for the next guest.
pub fn reset(ground: &Ground) -> Result<()> {
    let mut vmm = ground.start(&machine(ground, "memhp_default_state=online_kernel"))?;
    let before = plug(&mut vmm, "memory-backend-memfd")?;
    let object = json!({"qom-type": "memory-backend-ram", "id": "m1", "size": DIMM});
    vmm.qmp().execute("object-add", object)?;
    let dimm = json!({"driver": "pc-dimm", "id": "dimm1", "memdev": "m1"});
    vmm.qmp().execute("device_add", dimm)?;
    wait_total(&mut vmm, before + 2 * DIMM, true)?;
    hold_the_dimm(&mut vmm)?;
    vmm.qmp().execute("stop", Value::Null)?;
    vmm.qmp().execute("device_del", json!({"id": "dimm0"}))?;
    vmm.qmp().execute("system_reset", Value::Null)?;
    deleted(&mut vmm, "dimm0")?;
    vmm.qmp().execute("object-del", json!({"id": "m0"}))?;
    vmm.qmp().execute("cont", Value::Null)?;
    vmm.wait_ready(super::BOOT_LIMIT)?;
    wait_total(&mut vmm, before + DIMM, true)?;
    wait_total(&mut vmm, before + DIMM, false)?;
    finish(vmm)
}

/// Mistakes are refused by name.
pub fn mistakes(ground: &Ground) -> Result<()> {
    let mut vmm = ground.start(&machine(ground, ""))?;
    for (id, size) in [
        ("small", 64 * MIB),
        ("odd", 200 * MIB),
        ("huge", 4096 * GIB),
        ("fine", DIMM),
    ] {
        let object = json!({"qom-type": "memory-backend-ram", "id": id, "size": size});
        let added = vmm.qmp().execute("object-add", object);
        ensure!(added.is_ok() == (id != "huge"), "{id}: {added:?}");
    }
    let map = json!({"command-line": "info mtree -f"});
    let before = vmm.qmp().execute("human-monitor-command", map.clone())?;
    for (arguments, part) in [
        (json!({"memdev": "small"}), "0x4000000"),
        (json!({"memdev": "odd"}), "0xc800000"),
        (json!({"memdev": "nope"}), "nope"),
        (json!({}), "memdev"),
        (json!({"memdev": "fine", "slot": 8}), "8"),
        (json!({"memdev": "fine", "addr": 0x1000}), "0x1000"),
        (json!({"memdev": "fine", "node": 1}), "node"),
        (json!({"memdev": "fine", "bus": "pcie.0"}), "pcie.0"),
        (json!({"memdev": "fine", "nope": 1}), "nope"),
    ] {
        let mut dimm = arguments;
        dimm["driver"] = json!("pc-dimm");
        dimm["id"] = json!("d");
        let Err(error) = vmm.qmp().execute("device_add", dimm.clone()) else {
            bail!("{dimm} is not refused");
        };
        ensure!(format!("{error:#}").contains(part), "{dimm}: {error:#}");
    }
    let after = vmm.qmp().execute("human-monitor-command", map)?;
    ensure!(before == after, "the map has changed");
    let dimm = json!({"driver": "pc-dimm", "id": "d", "memdev": "fine"});
    vmm.qmp().execute("device_add", dimm)?;
    let used = vmm.qmp().execute("object-del", json!({"id": "fine"}));
    ensure!(used.is_err(), "a backend in use is deleted");
    finish(vmm)
}
