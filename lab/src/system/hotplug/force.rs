// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk is taken away by force while the guest writes to it; also one whose backend is dead.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{GUEST, LOOK, deleted, kernel_log, removals, shell, wait_for};
use crate::deny;
use crate::system::{BOOT, Ground, STEP_LIMIT, USUAL_CPUS};
use crate::vmm::Vmm;

/// How long the backend takes for each request.
const LATENCY: Duration = Duration::from_secs(2);
/// The last request ends with its backend; this is for an emulated guest to find out.
const SOON: Duration = Duration::from_secs(10);
/// Writes past the cache, one request after the other, until one fails; says how it ended.
const WRITER: &str = "rm -f /ended; (dd if=/dev/zero of=/dev/vda bs=64k oflag=direct; echo $? > /ended) \
                      < /dev/null > /dev/null 2>&1 &";

/// The guest has five seconds to let go of what is behind a port, and is not waited for: its writer's request in flight
/// is answered when the backend answers, and the next one with an error, although the registers are gone. Nothing in the
/// guest waits for ever.
pub fn forced(ground: &Ground) -> Result<()> {
    let latency = u64::try_from(LATENCY.as_nanos())?;
    let node =
        json!({"driver": "null-co", "node-name": "n0", "size": 64 << 20, "latency-ns": latency});
    let mut vmm = writing(ground, [node])?;
    vmm.qmp().execute("device_del", json!({"id": "d0"}))?;
    force(&mut vmm)?;
    let begun = Instant::now();
    let removal = in_phase(&mut vmm, "draining")?;
    names_the_request(&removal)?;
    // The second gives the backend up, which has begun the request: it ends all the same.
    force(&mut vmm)?;
    let again = vmm
        .qmp()
        .execute("x-ebbtide-device-force", json!({"id": "d0"}));
    ensure!(again.is_err(), "it is forced a third time");

    deleted(&mut vmm, "d0")?;
    until(&mut vmm, "the writer ends", "[ -s /ended ]")?;
    ensure!(
        begun.elapsed() < LATENCY + SOON,
        "it took {:?}",
        begun.elapsed()
    );
    shell(&mut vmm, "[ $(cat /ended) -ne 0 ]").context("the writer has not failed")?;
    vmm.qmp()
        .execute("blockdev-del", json!({"node-name": "n0"}))?;
    only_the_error_is_logged(&mut vmm)?;
    end(vmm)
}

/// What never answers is given up, named, kept, and in the way of nothing: the machine goes on until `quit`, which fails
/// for it.
pub fn quarantined(ground: &Ground) -> Result<()> {
    let medium = json!({"driver": "null-co", "node-name": "m0", "size": 64 << 20});
    let rules = ["fault=hold,op=write"];
    let dead =
        json!({"driver": "x-ebbtide-fault", "node-name": "n0", "file": "m0", "rules": rules});
    let mut vmm = writing(ground, [medium, dead])?;
    vmm.qmp().execute("device_del", json!({"id": "d0"}))?;
    force(&mut vmm)?;
    in_phase(&mut vmm, "draining")?;
    force(&mut vmm)?;
    let removal = in_phase(&mut vmm, "quarantined")?;
    names_the_request(&removal)?;
    shell(&mut vmm, "true").context("the guest does not go on")?;
    let node = vmm
        .qmp()
        .execute("blockdev-del", json!({"node-name": "n0"}));
    ensure!(node.is_err(), "the node goes under the request");
    vmm.qmp().execute("quit", Value::Null)?;
    let status = vmm.wait_exit(STEP_LIMIT)?;
    let log = vmm.log();
    ensure!(status.code() == Some(1), "the VMM ended with {status}{log}");
    ensure!(log.contains("d0"), "the disk is not named:{log}");
    Ok(())
}

fn names_the_request(removal: &Value) -> Result<()> {
    let holder = &removal["holders"][0];
    ensure!(
        holder["what"] == "1 request" && holder["age-ms"].is_u64(),
        "the request in flight is not named: {removal}"
    );
    Ok(())
}

/// A guest that writes to a disk behind a port, on the node n0 of `nodes`; one request is in flight.
pub(super) fn writing(ground: &Ground, nodes: impl IntoIterator<Item = Value>) -> Result<Vmm> {
    let mut machine = ground.machine(USUAL_CPUS, BOOT);
    let more = ["--device", "pcie-root-port,id=rp1", "--drain-timeout", "5"];
    machine.more.extend(more.map(Into::into));
    let mut vmm = ground.start(&machine)?;
    for node in nodes {
        vmm.qmp().execute("blockdev-add", node)?;
    }
    let disk = json!({"driver": "virtio-blk-pci", "id": "d0", "drive": "n0", "bus": "rp1"});
    vmm.qmp().execute("device_add", disk)?;
    wait_for(&mut vmm, "/dev/vda", true)?;
    shell(&mut vmm, WRITER)?;
    until(
        &mut vmm,
        "a write is in flight",
        "read r w < /sys/block/vda/inflight && [ $w -gt 0 ]",
    )?;
    Ok(vmm)
}

pub(super) fn force(vmm: &mut Vmm) -> Result<()> {
    vmm.qmp()
        .execute("x-ebbtide-device-force", json!({"id": "d0"}))?;
    Ok(())
}

/// The removal, once it has come so far.
pub(super) fn in_phase(vmm: &mut Vmm, phase: &str) -> Result<Value> {
    let begun = Instant::now();
    loop {
        let removals = vmm.qmp().execute("x-ebbtide-query-removals", Value::Null)?;
        if removals[0]["phase"] == phase {
            return Ok(removals[0].clone());
        }
        ensure!(begun.elapsed() < GUEST, "it is not {phase}: {removals}");
        std::thread::sleep(LOOK);
    }
}

/// Waits until `test` ends well in the guest.
pub(in crate::system) fn until(vmm: &mut Vmm, what: &str, test: &str) -> Result<()> {
    let begun = Instant::now();
    while shell(vmm, test).is_err() {
        if begun.elapsed() > GUEST {
            bail!("not so: {what}; {}\n{}", removals(vmm), kernel_log(vmm)?);
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// The guest's kernel says that a write failed, which is so, and complains about nothing else: no task hangs.
fn only_the_error_is_logged(vmm: &mut Vmm) -> Result<()> {
    let denied = vmm.guest().denied_kernel_messages(&deny::patterns())?;
    let (errors, others): (Vec<_>, Vec<_>) = denied
        .into_iter()
        .partition(|line| line.contains("I/O error, dev vda") && line.contains("(WRITE)"));
    ensure!(others.is_empty(), "the log holds:\n{}", others.join("\n"));
    ensure!(!errors.is_empty(), "no write failed");
    Ok(())
}

/// By `quit`: a Linux guest's driver waits for the status of a device that is gone to read 0, and that thread would wait
/// at the end of the guest, too.
pub(super) fn end(mut vmm: Vmm) -> Result<()> {
    vmm.qmp().execute("quit", Value::Null)?;
    let status = vmm.wait_exit(STEP_LIMIT)?;
    ensure!(status.success(), "the VMM ended with {status}");
    Ok(())
}
