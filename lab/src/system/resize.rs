// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory grows and shrinks; what is written to it stays, what is given back reaches the host.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ebbtide_hostile::Random;
use serde_json::{Value, json};

use super::hotplug::{LOOK, deleted, release_one, shell, until, wait_for, wait_held};
use super::{
    BOOT, GIB, Ground, MIB, STEP_LIMIT, USUAL_CPUS, clean_kernel_log, finish, no_acpi_error,
};
use crate::resident;
use crate::stalls::Stalls;
use crate::vmm::Vmm;

/// How far the host's memory after a round may be from that before the first, the guest's boot RAM left aside.
const RSS_SLACK: u64 = 64 * MIB;
/// After the last change of the target, until the guest has followed.
const FOLLOW_LIMIT: Duration = Duration::from_secs(30);
const BLOCK: u64 = 2 * MIB;

/// Rounds of grow, fill, check, free, shrink.
pub fn rounds(ground: &Ground) -> Result<()> {
    let (rounds, top) = if ground.long {
        (10, 8 * GIB)
    } else {
        (2, BOOT + GIB)
    };
    let mut vmm = ground.boot(USUAL_CPUS, top)?;
    let own = resident::beside_boot_ram(&mut vmm)?;
    for round in 0..rounds {
        vmm.resize(top, STEP_LIMIT)
            .with_context(|| format!("round {round}: grow"))?;
        let pattern = (top - BOOT) / 10 * 9;
        vmm.guest()
            .fill(pattern, round, STEP_LIMIT)
            .with_context(|| format!("round {round}: fill"))?;
        let checked = vmm.guest().check(STEP_LIMIT)?;
        ensure!(checked.ok, "round {round}: {:?}", checked.mismatch);
        vmm.guest().free()?;
        vmm.resize(BOOT, STEP_LIMIT)
            .with_context(|| format!("round {round}: shrink"))?;
        resident::beside_boot_ram_within(&mut vmm, own + RSS_SLACK)
            .with_context(|| format!("round {round}"))?;
        clean_kernel_log(&mut vmm)?;
    }
    finish(vmm)
}

/// The target changes while the guest still follows the last one; in the end it is reached, and
/// the driver is alive.
pub fn random_targets(ground: &Ground) -> Result<()> {
    let changes = if ground.long { 500 } else { 20 };
    let top = 3 * GIB;
    let mut vmm = ground.boot(1, top)?;
    let mut random = Random::new(1);
    let blocks = (top - BOOT) / BLOCK;
    for change in 0..changes {
        let total = BOOT + random.below(blocks + 1) * BLOCK;
        vmm.request_total(total)
            .with_context(|| format!("change {change}"))?;
        std::thread::sleep(Duration::from_millis(random.below(400)));
    }
    for last in [GIB, BOOT] {
        let stalls = Stalls::watch();
        let took = vmm.resize(last, STEP_LIMIT);
        let took = took.context("the last target")?;
        stalls.within(FOLLOW_LIMIT, took, "the last target")?;
    }
    finish(vmm)
}

/// The requests of the disks are held for so long at least, in the long form; in the short one until all has been seen.
const HELD: Duration = Duration::from_secs(60);
/// A GiB more is there within this: in the short form an emulated guest may be one of several.
const GROWS: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(5));
/// The slot of the disk on bus 0, and the registers by which its guest ejects it.
const SLOT: u16 = 7;
const EJECT: u16 = 0xae08;
const BUS: u16 = 0xae10;
const REGISTER: Duration = Duration::from_secs(10);
/// The guest lets go of what is behind a port five seconds after it was asked to, on a thread that waits for requests.
const PORT_WAITS: &str = "cat /proc/[0-9]*/stat 2>/dev/null | grep -q 'pciehp) D '";

/// Memory grows while disks wait for a request of theirs on their way out: one behind a port, for whose request the
/// guest waits, and one that its guest has ejected amid the request.
pub fn beside_held_requests(ground: &Ground) -> Result<()> {
    let grows = if ground.long { GROWS.0 } else { GROWS.1 };
    let mut machine = ground.machine(USUAL_CPUS, BOOT + 2 * GIB);
    let port = ["--device", "pcie-root-port,id=rp1"];
    machine.more.extend(port.map(Into::into));
    let mut vmm = ground.start(&machine)?;
    for (at, place) in [
        ("vda", json!({"bus": "rp1"})),
        (
            "vdb",
            json!({"addr": SLOT.to_string(), "guest-eject": "on"}),
        ),
    ] {
        slow_disk(&mut vmm, at, place)?;
    }
    let begun = Instant::now();
    for disk in ["vda", "vdb"] {
        let write = format!(
            "(dd if=/dev/zero of=/dev/{disk} bs=64k count=1 oflag=direct; echo $? > /{disk}.ended) \
             < /dev/null > /dev/null 2>&1 &"
        );
        shell(&mut vmm, &write)?;
        let in_flight = format!("read r w < /sys/block/{disk}/inflight && [ $w -gt 0 ]");
        until(&mut vmm, "a write is in flight", &in_flight)?;
    }
    vmm.qmp().execute("device_del", json!({"id": "vda"}))?;
    vmm.guest().port_write(BUS, 0, REGISTER)?;
    vmm.guest().port_write(EJECT, 1 << SLOT, REGISTER)?;
    grow(&mut vmm, BOOT + GIB, grows)?;
    // Now the guest's driver of the first disk is on its way out, too.
    until(&mut vmm, "the guest waits for the request", PORT_WAITS)?;
    grow(&mut vmm, BOOT + 2 * GIB, grows)?;
    if ground.long {
        std::thread::sleep(HELD.saturating_sub(begun.elapsed()));
    }
    are_on_their_way(&mut vmm)?;
    for disk in ["vda", "vdb"] {
        shell(&mut vmm, &format!("[ ! -e /{disk}.ended ]")).context("the write has ended")?;
    }
    for event in vmm.qmp().take_events()? {
        let gone = event.name == "DEVICE_DELETED";
        ensure!(!gone, "{} before its request has ended", event.data);
    }
    for disk in ["vda", "vdb"] {
        let faults = faults_of(disk);
        wait_held(&mut vmm, &faults)?;
        release_one(&mut vmm, &faults)?;
        deleted(&mut vmm, disk)?;
        until(
            &mut vmm,
            "the write ends well",
            &format!("[ \"$(cat /{disk}.ended)\" = 0 ]"),
        )?;
    }
    clean_kernel_log(&mut vmm)?;
    no_acpi_error(&mut vmm)?;
    // Not by the guest: its driver of the ejected disk waits for the status of a device that is gone to read 0.
    vmm.qmp().execute("quit", Value::Null)?;
    let status = vmm.wait_exit(STEP_LIMIT)?;
    ensure!(status.success(), "the VMM ended with {status}");
    Ok(())
}

/// The node of a disk that holds its writes.
fn faults_of(id: &str) -> String {
    format!("{id}-faults")
}

/// A disk whose writes are held until they are let go.
fn slow_disk(vmm: &mut Vmm, id: &str, place: Value) -> Result<()> {
    let medium = format!("{id}-medium");
    let node = json!({"driver": "null-co", "node-name": medium, "size": 64 * MIB});
    vmm.qmp().execute("blockdev-add", node)?;
    let faults = faults_of(id);
    let rule = "fault=hold,op=write";
    let node =
        json!({"driver": "x-ebbtide-fault", "node-name": faults, "file": medium, "rules": [rule]});
    vmm.qmp().execute("blockdev-add", node)?;
    let mut disk = place;
    disk["driver"] = json!("virtio-blk-pci");
    disk["id"] = json!(id);
    disk["drive"] = json!(faults);
    vmm.qmp().execute("device_add", disk)?;
    wait_for(vmm, &format!("/dev/{id}"), true)
}

/// The removals are as far as they can come while the requests are held.
fn are_on_their_way(vmm: &mut Vmm) -> Result<()> {
    let phases = ["vda requested", "vdb draining"];
    let removals = vmm.qmp().execute("x-ebbtide-query-removals", Value::Null)?;
    let now: Vec<String> = removals
        .as_array()
        .into_iter()
        .flatten()
        .map(|it| format!("{} {}", text(&it["id"]), text(&it["phase"])))
        .collect();
    ensure!(now == phases, "the removals are {now:?}, not {phases:?}");
    Ok(())
}

/// Memory grows in time, and the removals are as far as before.
fn grow(vmm: &mut Vmm, total: u64, limit: Duration) -> Result<()> {
    let stalls = Stalls::watch();
    let took = vmm.resize(total, STEP_LIMIT)?;
    stalls.within(limit, took, "1 GiB more")?;
    are_on_their_way(vmm)?;
    // The last block is the guest's a moment after it was given.
    let begun = Instant::now();
    loop {
        let guest = vmm.guest().report()?;
        if guest.virtio_mem.added + BOOT >= total {
            break;
        }
        ensure!(
            begun.elapsed() < FOLLOW_LIMIT,
            "the guest has {} MiB of virtio-mem",
            guest.virtio_mem.added / MIB
        );
        std::thread::sleep(LOOK);
    }
    println!("      1 GiB more in {took:.2?} beside held requests");
    Ok(())
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}
