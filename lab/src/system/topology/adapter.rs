// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A SCSI adapter is ejected while a read of one of its disks is held. Linux's own driver would wait for the read first;
//! this guest writes the eject register.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ebbtide_agent::protocol::DiskStart;
use serde_json::{Value, json};

use super::nested::{held_read, read_until_held};
use super::{add, add_node, deleted_with, disk, disk_path};
use crate::deny;
use crate::system::hotplug::{GUEST, LOOK, release_one, until, wait_for};
use crate::system::{BOOT, Ground, MIB, STEP_LIMIT, USUAL_CPUS};
use crate::vmm::Vmm;

/// How long the read is held after the eject, in the short form and in the long one.
const HELD: (Duration, Duration) = (Duration::from_secs(6), Duration::from_secs(20));
/// The eject register of bus 0, a bit for each slot.
const EJECT: u16 = 0xae08;
const BUS: u16 = 0xae10;
const SLOT: u32 = 9;
/// What waits for the read takes longer; whoever does not is held up by a busy host at most. The benchmark of an eject
/// measures it alone.
const AT_ONCE: Duration = Duration::from_secs(3);
/// The other disk works for this long before the eject.
const STEADY: Duration = Duration::from_millis(500);

/// The write returns at once, another disk goes on, the read ends when it ends, then the adapter is gone.
pub fn adapter(ground: &Ground) -> Result<()> {
    let images = tempfile::tempdir()?;
    let mut vmm = ground.boot(USUAL_CPUS, BOOT)?;
    let path = images.path().join("work");
    std::fs::File::create(&path)?.set_len(64 * MIB)?;
    let image = json!({"driver": "file", "node-name": "n1", "filename": path});
    for node in held_read().into_iter().chain([image]) {
        add_node(&mut vmm, node)?;
    }
    add(&mut vmm, &disk("work", "pcie.0", "n1"))?;
    add(
        &mut vmm,
        &json!({"driver": "virtio-scsi-pci", "id": "hba", "addr": "9", "guest-eject": "on"}),
    )?;
    add(
        &mut vmm,
        &json!({"driver": "scsi-hd", "id": "lun", "bus": "hba.0", "drive": "n0"}),
    )?;
    wait_for(&mut vmm, "/dev/sda", true)?;
    let work = disk_path(&mut vmm, "work")?;
    eject(ground, &mut vmm, &work)?;
    let done = vmm.guest().disk_stop_verified(&work, STEP_LIMIT)?;
    ensure!(done.errors == 0 && done.mismatches == 0, "{done:?}");
    nothing_but_the_disk(&mut vmm)?;
    // Its driver waits for the status of a device that is gone.
    vmm.qmp().execute("quit", Value::Null)?;
    let status = vmm.wait_exit(STEP_LIMIT)?;
    ensure!(status.success(), "the VMM ended with {status}{}", vmm.log());
    Ok(())
}

fn eject(ground: &Ground, vmm: &mut Vmm, work: &str) -> Result<()> {
    let held = if ground.long { HELD.1 } else { HELD.0 };
    read_until_held(vmm, "/dev/sda")?;
    vmm.guest().disk_start(DiskStart {
        path: work.to_owned(),
        seed: 5,
        verify: true,
        pause_us: 5_000,
        span_bytes: 0,
    })?;
    std::thread::sleep(STEADY);
    vmm.guest().port_write(BUS, 0, STEP_LIMIT)?;
    let before = vmm.guest().disk_status(work)?;
    let ejected = Instant::now();
    let written = vmm.guest().port_write(EJECT, 1 << SLOT, STEP_LIMIT)?;
    ensure!(written < AT_ONCE, "the eject took {written:?}");
    // The control thread hears of it a moment later.
    while let Err(not_yet) = it_drains(vmm) {
        ensure!(ejected.elapsed() < GUEST, "{not_yet:#}");
        std::thread::sleep(LOOK);
    }
    std::thread::sleep(held.saturating_sub(ejected.elapsed()));
    it_drains(vmm)?;
    let after = vmm.guest().disk_status(work)?;
    println!(
        "{:<5} eject written in {written:?}, the other disk's longest gap {} ms, before {} ms",
        ground.series, after.longest_gap_ms, before.longest_gap_ms
    );
    ensure!(
        after.ok
            && after.writes > before.writes
            && Duration::from_millis(after.longest_gap_ms) < AT_ONCE,
        "the other disk: {after:?}"
    );
    release_one(vmm, "n0")?;
    let gone = deleted_with(vmm, "hba")?;
    ensure!(gone == ["lun", "hba"], "{gone:?}");
    let read = "set -- $(cat /sys/block/sda/stat); [ $1 -gt 200 ]";
    until(vmm, "the read has ended", read)
}

/// The adapter and its disk are on their way, and wait for the read.
fn it_drains(vmm: &mut Vmm) -> Result<()> {
    let removals = vmm.qmp().execute("x-ebbtide-query-removals", Value::Null)?;
    for id in ["hba", "lun"] {
        let all = removals.as_array().into_iter().flatten();
        let mut its = all.filter(|it| it["id"] == id && it["phase"] == "draining");
        its.next()
            .with_context(|| format!("{id} does not drain: {removals}"))?;
    }
    ensure!(
        removals.to_string().contains("1 request"),
        "the read is not named: {removals}"
    );
    Ok(())
}

/// What the guest's kernel says of the disk that is gone is so; it complains of nothing else.
fn nothing_but_the_disk(vmm: &mut Vmm) -> Result<()> {
    let mut denied = vmm.guest().denied_kernel_messages(&deny::patterns())?;
    denied.retain(|line| !line.contains("I/O error, dev sda"));
    ensure!(denied.is_empty(), "the log holds:\n{}", denied.join("\n"));
    Ok(())
}
