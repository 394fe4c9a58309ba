// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory grows and shrinks; what is written to it stays, what is given back reaches the host.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ebbtide_hostile::Random;
use serde_json::{Value, json};

use super::hotplug::{shell, until, wait_for};
use super::{
    BOOT, GIB, Ground, MIB, STEP_LIMIT, USUAL_CPUS, clean_kernel_log, finish, no_acpi_error,
};
use crate::vmm::Vmm;

/// How far the host's memory after a round may be from that after the first.
const RSS_SLACK: u64 = 64 * MIB;
/// After the last change of the target, until the guest has followed.
const FOLLOW_LIMIT: Duration = Duration::from_secs(30);
const BLOCK: u64 = 2 * MIB;
/// After a shrink, until what the guest gave back is off the books.
const SETTLE: Duration = Duration::from_secs(1);

/// Rounds of grow, fill, check, free, shrink.
pub fn rounds(ground: &Ground) -> Result<()> {
    let (rounds, top) = if ground.long {
        (10, 8 * GIB)
    } else {
        (2, 2 * GIB)
    };
    let mut vmm = ground.boot(USUAL_CPUS, top)?;
    let mut first = None;
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
        std::thread::sleep(SETTLE);
        let rss = vmm.rss_bytes()?;
        let first = *first.get_or_insert(rss);
        ensure!(
            rss <= first + RSS_SLACK,
            "round {round}: the VMM holds {} MiB, {} after the first round",
            rss / MIB,
            first / MIB
        );
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
        vmm.request_total(last)?;
        vmm.wait_total(last, FOLLOW_LIMIT)
            .context("the last target")?;
    }
    finish(vmm)
}

/// The request of a disk takes this long in the long form and in the short one; Linux lets go of what is behind a port
/// only after 5 s.
const HELD: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(20));
const BUTTON: Duration = Duration::from_secs(5);
/// A GiB more is there within this: in the short form an emulated guest may be one of several, and would be held up for
/// as long as the request if it were.
const GROWS: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(5));
/// A request has ended, or a disk is gone, so long after it should at the latest.
const SOON: Duration = Duration::from_secs(30);
/// The slot of the disk on bus 0, and the registers by which its guest ejects it.
const SLOT: u16 = 7;
const EJECT: u16 = 0xae08;
const BUS: u16 = 0xae10;
const REGISTER: Duration = Duration::from_secs(10);

/// Memory grows while disks wait for a request of theirs on their way out: one behind a port, for whose request the
/// guest waits, and one that its guest has ejected amid the request.
pub fn beside_held_requests(ground: &Ground) -> Result<()> {
    let (held, grows) = match ground.long {
        true => (HELD.0, GROWS.0),
        false => (HELD.1, GROWS.1),
    };
    let mut machine = ground.machine(USUAL_CPUS, BOOT + 2 * GIB);
    let port = ["--device", "pcie-root-port,id=rp1"];
    machine.more.extend(port.map(Into::into));
    let mut vmm = ground.start(&machine)?;
    let rule = format!("fault=delay,op=write,delay-ns={}", held.as_nanos());
    for (at, place) in [
        ("vda", json!({"bus": "rp1"})),
        (
            "vdb",
            json!({"addr": SLOT.to_string(), "guest-eject": "on"}),
        ),
    ] {
        slow_disk(&mut vmm, at, place, &rule)?;
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
    let asked = Instant::now();
    vmm.guest().port_write(BUS, 0, REGISTER)?;
    vmm.guest().port_write(EJECT, 1 << SLOT, REGISTER)?;
    grow(&mut vmm, BOOT + GIB, grows)?;
    // Now the guest's driver of the first disk is on its way out, too.
    std::thread::sleep((BUTTON + Duration::from_secs(2)).saturating_sub(asked.elapsed()));
    grow(&mut vmm, BOOT + 2 * GIB, grows)?;
    ensure!(
        begun.elapsed() < held,
        "the requests have ended: this machine is too busy"
    );
    for _ in 0..2 {
        let gone = vmm.qmp().wait_event("DEVICE_DELETED", held + SOON)?;
        ensure!(
            gone.at >= begun + held,
            "{} before its request has ended",
            gone.data
        );
    }
    for disk in ["vda", "vdb"] {
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

/// A disk whose writes are held up.
fn slow_disk(vmm: &mut Vmm, id: &str, place: Value, rule: &str) -> Result<()> {
    let medium = format!("{id}-medium");
    let node = json!({"driver": "null-co", "node-name": medium, "size": 64 * MIB});
    vmm.qmp().execute("blockdev-add", node)?;
    let faults = format!("{id}-faults");
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

/// Memory grows in time, and these removals are as far as before.
fn grow(vmm: &mut Vmm, total: u64, limit: Duration) -> Result<()> {
    let phases = ["vda requested", "vdb draining"];
    let took = vmm.resize(total, STEP_LIMIT)?;
    let removals = vmm.qmp().execute("x-ebbtide-query-removals", Value::Null)?;
    ensure!(took <= limit, "1 GiB more took {took:?}; {removals}");
    let now: Vec<String> = removals
        .as_array()
        .into_iter()
        .flatten()
        .map(|it| format!("{} {}", text(&it["id"]), text(&it["phase"])))
        .collect();
    ensure!(now == phases, "the removals are {now:?}, not {phases:?}");
    let guest = vmm.guest().report()?;
    ensure!(
        guest.virtio_mem.added + BOOT >= total,
        "the guest has {} MiB of virtio-mem",
        guest.virtio_mem.added / MIB
    );
    println!("      1 GiB more in {took:.2?} while {}", now.join(", "));
    Ok(())
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}
