// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk is taken away by force while the guest writes to it; also one whose backend is dead.

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::holding::{delete, holding, release_one, wait_held};
use super::models::Model;
use super::{
    GUEST, LOOK, ask, deleted, gone, in_use, is_left_out, kernel_log, models, one_cycle, removals,
    shell, wait_for,
};
use crate::deny;
use crate::qmp::QmpError;
use crate::system::{BOOT, Ground, STEP_LIMIT, USUAL_CPUS};
use crate::vmm::{Machine, Vmm};

/// What holds each write; it has begun.
pub(super) const HELD: &str = "op=write,point=begun";
/// How often is tried what a guest may be too quick for, or too slow.
const TRIES: u32 = 5;
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
    // A guest that has begun to let go meanwhile fails the next write itself, and logs nothing: the port's waits for 5 s.
    for _ in 1..TRIES {
        if only_the_error_is_logged(&mut vmm)? > 0 {
            break;
        }
        one_by_force(&mut vmm, "rp1").context("once more")?;
        another(&mut vmm, "rp1").context("once more, again")?;
    }
    let errors = only_the_error_is_logged(&mut vmm)?;
    ensure!(errors > 0, "no write failed by the device");
    vmm.power_off(STEP_LIMIT).context("power off")
}

fn one_by_force(vmm: &mut Vmm, bus: &str) -> Result<()> {
    write_to(vmm, holding(HELD), bus)?;
    ask(vmm, "d0")?;
    force(vmm)?;
    let removal = in_phase(vmm, "draining")?;
    names_the_request(&removal)?;
    // The second gives the backend up, which has begun the request: it ends all the same.
    force(vmm)?;
    let again = vmm
        .qmp()
        .execute("x-ebbtide-device-force", json!({"id": "d0"}));
    ensure!(again.is_err(), "it is forced a third time");
    release_one(vmm, "n0")?;
    deleted(vmm, "d0")?;
    the_writer_fails(vmm)?;
    delete(vmm)
}

fn the_writer_fails(vmm: &mut Vmm) -> Result<()> {
    until(vmm, "the writer ends", "[ -s /ended ]")?;
    shell(vmm, "[ $(cat /ended) -ne 0 ]").context("the writer has not failed")
}

/// A port goes by force, with a disk behind it that the guest writes to. The guest takes both down in one go.
fn with_its_port(vmm: &mut Vmm) -> Result<()> {
    let unseen = json!({"driver": "pcie-root-port", "id": "rp2", "bus": "pcie.0",
                        "x-ebbtide-announce": false});
    vmm.qmp().execute("device_add", unseen)?;
    plug(vmm, holding(HELD), "rp2")?;
    vmm.qmp()
        .execute("x-ebbtide-device-announce", json!({"id": "rp2"}))?;
    write(vmm)?;
    vmm.qmp().execute("device_del", json!({"id": "rp2"}))?;
    vmm.qmp()
        .execute("x-ebbtide-device-force", json!({"id": "rp2"}))?;
    release_one(vmm, "n0")?;
    deleted(vmm, "d0")?;
    deleted(vmm, "rp2")?;
    the_writer_fails(vmm)?;
    delete(vmm)
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
    ask(vmm, "d1")?;
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
        let mut tries = 0;
        while !taken_away(&mut vmm, model).with_context(|| format!("{} by force", model.driver))? {
            tries += 1;
            ensure!(
                tries < TRIES,
                "{}: the guest is always quicker",
                model.driver
            );
        }
        one_cycle(&mut vmm, model, None).with_context(|| format!("{} again", model.driver))?;
        (model.clean_up)(&mut vmm).context("clean up")?;
    }
    vmm.power_off(STEP_LIMIT).context("power off")
}

/// Whether it was taken away; a guest that is asked may have let go of it before.
fn taken_away(vmm: &mut Vmm, model: &Model) -> Result<bool> {
    in_use(vmm, model, None)?;
    vmm.qmp().execute("device_del", json!({"id": "dev0"}))?;
    let mut was_there = true;
    // A disk of an adapter is not asked for.
    if model.driver != "scsi-hd"
        && let Err(error) = vmm
            .qmp()
            .execute("x-ebbtide-device-force", json!({"id": "dev0"}))
    {
        let refused = error.downcast::<QmpError>()?;
        let is_over =
            refused.class == "DeviceNotFound" || refused.desc.contains("nothing is left to force");
        ensure!(is_over, "{refused}");
        was_there = false;
    }
    gone(vmm, model)?;
    Ok(was_there)
}

/// What never answers is given up, named, kept, and in the way of nothing: the machine goes on until `quit`, which fails
/// for it.
pub fn quarantined(ground: &Ground) -> Result<()> {
    let mut vmm = writing(ground, HELD)?;
    ask(&mut vmm, "d0")?;
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
    ensure!(vmm.said()?.contains("d0"), "the disk is not named:{log}");
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

/// A guest that writes to a disk behind a port; the request in flight is held by `rule`.
pub(super) fn writing(ground: &Ground, rule: &str) -> Result<Vmm> {
    let mut vmm = ground.start(&machine(ground))?;
    write_to(&mut vmm, holding(rule), "rp1")?;
    Ok(vmm)
}

/// A machine with a port that is empty.
fn machine(ground: &Ground) -> Machine {
    let mut machine = ground.machine(USUAL_CPUS, BOOT);
    let more = ["--device", "pcie-root-port,id=rp1", "--drain-timeout", "2"];
    machine.more.extend(more.map(Into::into));
    machine
}

/// Plugs a disk into `bus`, on the node n0 of `nodes`, and has the guest write to it; one request is in flight, and held.
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
    wait_held(vmm, "n0")
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

/// The guest's kernel complains about nothing but writes that failed, which they did: no task hangs. How many it names.
fn only_the_error_is_logged(vmm: &mut Vmm) -> Result<usize> {
    let denied = vmm.guest().denied_kernel_messages(&deny::patterns())?;
    let (errors, others): (Vec<_>, Vec<_>) = denied
        .into_iter()
        .partition(|line| line.contains("I/O error, dev vda") && line.contains("(WRITE)"));
    ensure!(others.is_empty(), "the log holds:\n{}", others.join("\n"));
    Ok(errors.len())
}

/// By `quit`: errors of disks that went are in the guest's log.
pub(super) fn end(mut vmm: Vmm) -> Result<()> {
    vmm.qmp().execute("quit", Value::Null)?;
    let status = vmm.wait_exit(STEP_LIMIT)?;
    ensure!(status.success(), "the VMM ended with {status}");
    Ok(())
}
