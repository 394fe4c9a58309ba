// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk is taken away by force while the guest writes to it; also one whose backend is dead.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{
    GUEST, LOOK, deleted, gone, in_use, is_left_out, kernel_log, models, one_cycle, removals,
    shell, wait_for,
};
use crate::deny;
use crate::system::{BOOT, Ground, STEP_LIMIT, USUAL_CPUS};
use crate::vmm::{Machine, Vmm};

/// How long the backend takes for each request.
const LATENCY: Duration = Duration::from_secs(2);
/// The last request ends with its backend; this is for an emulated guest to find out.
const SOON: Duration = Duration::from_secs(10);
/// Writes past the cache, one request after the other, until one fails; says how it ended.
const WRITER: &str = "rm -f /ended; (dd if=/dev/zero of=/dev/vda bs=64k oflag=direct; echo $? > /ended) \
                      < /dev/null > /dev/null 2>&1 &";

/// The guest has time to let go of a disk and is not waited for: its writer's request in flight is answered when the backend
/// answers, and the next one with an error, although the registers are gone. Nothing in the guest waits for ever: not the
/// driver's end either, which resets what is not there any more, on the thread that looks after the slot, or after all slots
/// of bus 0. So the next disk in the slot comes, works and goes as if nothing had been.
pub fn forced(ground: &Ground) -> Result<()> {
    let mut vmm = ground.start(&machine(ground))?;
    for bus in ["rp1", "pcie.0"] {
        one_by_force(&mut vmm, bus).with_context(|| format!("on {bus}"))?;
        // The slot, and what the guest has kept of it.
        another(&mut vmm, bus).with_context(|| format!("on {bus}, again"))?;
    }
    with_its_port(&mut vmm).context("with its port")?;
    another(&mut vmm, "pcie.0").context("in the port's slot")?;
    only_the_error_is_logged(&mut vmm)?;
    vmm.power_off(STEP_LIMIT).context("power off")
}

fn one_by_force(vmm: &mut Vmm, bus: &str) -> Result<()> {
    let latency = u64::try_from(LATENCY.as_nanos())?;
    let node =
        json!({"driver": "null-co", "node-name": "n0", "size": 64 << 20, "latency-ns": latency});
    write_to(vmm, [node], bus)?;
    vmm.qmp().execute("device_del", json!({"id": "d0"}))?;
    force(vmm)?;
    let begun = Instant::now();
    let removal = in_phase(vmm, "draining")?;
    names_the_request(&removal)?;
    // The second gives the backend up, which has begun the request: it ends all the same.
    force(vmm)?;
    let again = vmm
        .qmp()
        .execute("x-ebbtide-device-force", json!({"id": "d0"}));
    ensure!(again.is_err(), "it is forced a third time");

    deleted(vmm, "d0")?;
    until(vmm, "the writer ends", "[ -s /ended ]")?;
    ensure!(
        begun.elapsed() < LATENCY + SOON,
        "it took {:?}",
        begun.elapsed()
    );
    shell(vmm, "[ $(cat /ended) -ne 0 ]").context("the writer has not failed")?;
    vmm.qmp()
        .execute("blockdev-del", json!({"node-name": "n0"}))?;
    Ok(())
}

/// A port goes by force, with a disk behind it that the guest writes to. The guest takes both down in one go.
fn with_its_port(vmm: &mut Vmm) -> Result<()> {
    let unseen = json!({"driver": "pcie-root-port", "id": "rp2", "bus": "pcie.0",
                        "x-ebbtide-announce": false});
    vmm.qmp().execute("device_add", unseen)?;
    let node =
        json!({"driver": "null-co", "node-name": "n0", "size": 64 << 20, "latency-ns": 10_000_000});
    plug(vmm, [node], "rp2")?;
    vmm.qmp()
        .execute("x-ebbtide-device-announce", json!({"id": "rp2"}))?;
    write(vmm)?;
    vmm.qmp().execute("device_del", json!({"id": "rp2"}))?;
    vmm.qmp()
        .execute("x-ebbtide-device-force", json!({"id": "rp2"}))?;
    deleted(vmm, "d0")?;
    deleted(vmm, "rp2")?;
    until(vmm, "the writer ends", "[ -s /ended ]")?;
    vmm.qmp()
        .execute("blockdev-del", json!({"node-name": "n0"}))?;
    Ok(())
}

/// The next disk on `bus`, which the guest lets go of when it is asked.
fn another(vmm: &mut Vmm, bus: &str) -> Result<()> {
    wait_for(vmm, "/dev/vda", false).context("the disk that was forced")?;
    let node = json!({"driver": "null-co", "node-name": "n1", "size": 32 << 20});
    vmm.qmp().execute("blockdev-add", node)?;
    let disk = json!({"driver": "virtio-blk-pci", "id": "d1", "drive": "n1", "bus": bus});
    vmm.qmp().execute("device_add", disk)?;
    wait_for(vmm, "/dev/vda", true)?;
    shell(vmm, "[ $(cat /sys/block/vda/size) -eq 65536 ]").context("it is another disk")?;
    shell(
        vmm,
        "dd if=/dev/zero of=/dev/vda bs=64k count=16 oflag=direct",
    )?;
    vmm.qmp().execute("device_del", json!({"id": "d1"}))?;
    deleted(vmm, "d1")?;
    wait_for(vmm, "/dev/vda", false)?;
    vmm.qmp()
        .execute("blockdev-del", json!({"node-name": "n1"}))?;
    Ok(())
}

/// Each model, by ACPI on bus 0: taken away while it is used, and once more, asked for: the guest has lost nothing but that
/// device.
pub fn each_by_force(ground: &Ground) -> Result<()> {
    let mut vmm = ground.boot(USUAL_CPUS, BOOT)?;
    for model in models::ALL {
        if is_left_out(ground, &mut vmm, model)? {
            continue;
        }
        let files = tempfile::tempdir()?;
        (model.prepare)(&mut vmm, files.path()).context("prepare")?;
        in_use(&mut vmm, model, None).context(model.driver)?;
        vmm.qmp().execute("device_del", json!({"id": "dev0"}))?;
        // A disk of an adapter is not asked for, and may have gone.
        if model.driver != "scsi-hd" {
            vmm.qmp()
                .execute("x-ebbtide-device-force", json!({"id": "dev0"}))
                .context(model.driver)?;
        }
        gone(&mut vmm, model).with_context(|| format!("{} by force", model.driver))?;
        one_cycle(&mut vmm, model, None).with_context(|| format!("{} again", model.driver))?;
        (model.clean_up)(&mut vmm).context("clean up")?;
    }
    vmm.power_off(STEP_LIMIT).context("power off")
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
    let mut vmm = ground.start(&machine(ground))?;
    write_to(&mut vmm, nodes, "rp1")?;
    Ok(vmm)
}

/// A machine with a port that is empty.
fn machine(ground: &Ground) -> Machine {
    let mut machine = ground.machine(USUAL_CPUS, BOOT);
    let more = ["--device", "pcie-root-port,id=rp1", "--drain-timeout", "5"];
    machine.more.extend(more.map(Into::into));
    machine
}

/// Plugs a disk into `bus`, on the node n0 of `nodes`, and has the guest write to it; one request is in flight.
fn write_to(vmm: &mut Vmm, nodes: impl IntoIterator<Item = Value>, bus: &str) -> Result<()> {
    plug(vmm, nodes, bus)?;
    write(vmm)
}

fn plug(vmm: &mut Vmm, nodes: impl IntoIterator<Item = Value>, bus: &str) -> Result<()> {
    for node in nodes {
        vmm.qmp().execute("blockdev-add", node)?;
    }
    let disk = json!({"driver": "virtio-blk-pci", "id": "d0", "drive": "n0", "bus": bus});
    vmm.qmp().execute("device_add", disk)?;
    Ok(())
}

fn write(vmm: &mut Vmm) -> Result<()> {
    wait_for(vmm, "/dev/vda", true)?;
    shell(vmm, WRITER)?;
    until(
        vmm,
        "a write is in flight",
        "read r w < /sys/block/vda/inflight && [ $w -gt 0 ]",
    )
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

/// By `quit`: errors of disks that went are in the guest's log.
pub(super) fn end(mut vmm: Vmm) -> Result<()> {
    vmm.qmp().execute("quit", Value::Null)?;
    let status = vmm.wait_exit(STEP_LIMIT)?;
    ensure!(status.success(), "the VMM ended with {status}");
    Ok(())
}
