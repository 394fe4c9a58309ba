// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! All DIMM slots a machine can have.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{LOOK, SECTION, machine};
use crate::system::{GIB, Ground, MIB, finish, no_acpi_error};
use crate::vmm::Vmm;

/// As many as there can be.
const SLOTS: u16 = 256;
/// DIMMs in the long form and in the short one.
const DIMMS: (usize, usize) = (256, 12);
/// The guest adds or removes one within this, on average.
const EACH: Duration = Duration::from_secs(2);
/// And needs this much at worst.
const FIRST: Duration = Duration::from_secs(30);

/// A machine of 256 slots: DIMMs into many of them or all, the last one among them; all are in use, all go at once.
pub fn many(ground: &Ground) -> Result<()> {
    let count = if ground.long { DIMMS.0 } else { DIMMS.1 };
    let mut machine = machine(ground, "");
    machine.memory_slots = SLOTS;
    machine.max_bytes = None;
    // The guest describes each DIMM in 2 MiB of what it has already.
    machine.boot_bytes = if ground.long {
        2 * GIB
    } else {
        machine.boot_bytes
    };
    let mut vmm = ground.start(&machine)?;
    let empty = vmm.guest().report()?;
    let map = memory_map(&mut vmm)?;
    for at in 0..count {
        // The last slot first, then the lowest that is free.
        let slot = (at == 0).then_some(SLOTS - 1);
        plug(&mut vmm, at, slot).with_context(|| format!("DIMM {at}"))?;
    }
    online(&mut vmm, empty.blocks.online + u32::try_from(count)?, count)?;
    described(&mut vmm, count)?;
    if count == usize::from(SLOTS) {
        let Err(error) = plug(&mut vmm, count, None) else {
            bail!("there is a slot for one more");
        };
        ensure!(format!("{error:#}").contains("256"), "{error:#}");
        let object = json!({"id": format!("m{count}")});
        vmm.qmp().execute("object-del", object)?;
    }
    let full = vmm.guest().report()?.mem_total;
    ensure!(
        full > empty.mem_total + count as u64 * (SECTION - 4 * MIB),
        "the guest has {} MiB",
        full / MIB
    );
    for at in 0..count {
        let id = json!({"id": format!("dimm{at}")});
        vmm.qmp().execute("device_del", id)?;
    }
    all_gone(&mut vmm, count)?;
    online(&mut vmm, empty.blocks.online, count)?;
    let devices = vmm.qmp().execute("query-memory-devices", Value::Null)?;
    ensure!(devices == json!([]), "{devices}");
    let after = memory_map(&mut vmm)?;
    ensure!(map == after, "the map was\n{map}\nand is\n{after}");
    no_acpi_error(&mut vmm)?;
    finish(vmm)
}

fn plug(vmm: &mut Vmm, at: usize, slot: Option<u16>) -> Result<()> {
    let memdev = format!("m{at}");
    let object = json!({"qom-type": "memory-backend-ram", "id": memdev, "size": SECTION});
    vmm.qmp().execute("object-add", object)?;
    let mut dimm = json!({"driver": "pc-dimm", "id": format!("dimm{at}"), "memdev": memdev});
    if let Some(slot) = slot {
        dimm["slot"] = json!(slot);
    }
    vmm.qmp().execute("device_add", dimm)?;
    Ok(())
}

/// What management is told of `count` DIMMs.
fn described(vmm: &mut Vmm, count: usize) -> Result<()> {
    let devices = vmm.qmp().execute("query-memory-devices", Value::Null)?;
    let items: Vec<&Value> = devices.as_array().into_iter().flatten().collect();
    ensure!(items.len() == count, "{} devices", items.len());
    for part in ["slot", "addr", "id", "memdev"] {
        let values: HashSet<String> = items
            .iter()
            .map(|it| it["data"][part].to_string())
            .collect();
        ensure!(values.len() == count, "{part}: {values:?}");
    }
    ensure!(
        items.iter().any(|it| it["data"]["slot"] == SLOTS - 1),
        "nothing is in the last slot"
    );
    let said = vmm.qmp().execute("query-acpi-ospm-status", Value::Null)?;
    let slots: Vec<&Value> = said.as_array().into_iter().flatten().collect();
    ensure!(slots.len() == usize::from(SLOTS), "{} slots", slots.len());
    let occupied = slots.iter().filter(|it| it["device"].is_string()).count();
    ensure!(occupied == count, "{occupied} slots have a device");
    Ok(())
}

/// Waits until the guest has so many blocks of memory that are online.
fn online(vmm: &mut Vmm, blocks: u32, changed: usize) -> Result<()> {
    let begun = Instant::now();
    loop {
        let now = vmm.guest().report()?.blocks;
        if now.online == blocks && now.offline == 0 {
            return Ok(());
        }
        if begun.elapsed() > limit(changed) {
            bail!("the guest has {now:?}, not {blocks} blocks online");
        }
        std::thread::sleep(10 * LOOK);
    }
}

fn limit(changed: usize) -> Duration {
    FIRST + EACH * u32::try_from(changed).unwrap_or(u32::MAX)
}

/// Waits for the end of each removal; backends are free then.
fn all_gone(vmm: &mut Vmm, count: usize) -> Result<()> {
    let deadline = Instant::now() + limit(count);
    let mut gone = HashSet::new();
    while gone.len() < count {
        let left = deadline.saturating_duration_since(Instant::now());
        let event = vmm.qmp().wait_event("DEVICE_DELETED", left);
        let event = event.with_context(|| format!("{} of {count} have gone", gone.len()))?;
        let id = event.data["device"].as_str().unwrap_or_default().to_owned();
        let memdev = id.replace("dimm", "m");
        vmm.qmp().execute("object-del", json!({"id": memdev}))?;
        ensure!(gone.insert(id), "{} twice", event.data);
    }
    Ok(())
}

fn memory_map(vmm: &mut Vmm) -> Result<String> {
    let map = json!({"command-line": "info mtree -f"});
    let answer = vmm.qmp().execute("human-monitor-command", map)?;
    Ok(answer.as_str().unwrap_or_default().to_owned())
}
