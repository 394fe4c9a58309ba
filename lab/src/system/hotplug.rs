// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices come and go while the guest uses them. Nothing hangs, nothing is lost, nothing is left behind.

mod force;
mod held;
mod holding;
mod mistakes;
mod models;
pub(super) mod peer;
mod residue;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ebbtide_agent::protocol::{Command, KernelLog};
use serde_json::{Value, json};

use super::{BOOT, Ground, USUAL_CPUS, clean_kernel_log, finish};
use crate::kernel::Series;
use crate::vmm::Vmm;
pub(super) use force::{each_by_force, forced, quarantined, until};
pub(super) use held::{awaited, outlasted, waited_for};
pub(super) use holding::{delete, holding, release_one, wait_held};
pub use mistakes::mistakes;
use models::Model;
pub(super) use models::{disk_is_gone, has_ended, read_rng, shell, write_disk};
pub(super) use residue::Residue;

/// A guest notices a device, or lets go of it, within this.
pub(super) const GUEST: Duration = Duration::from_secs(60);
/// How often the guest is looked at meanwhile.
pub(super) const LOOK: Duration = Duration::from_millis(20);
/// Cycles of the short form and of the long one.
const CYCLES: (u32, u32) = (3, 200);
/// In whose short form what the VMM holds is looked at, which is the same with either kernel.
const LOOKED_AT: Series = Series::V6_1;
/// What is left behind is looked for from here on: the first cycles fill caches.
const SETTLED: u32 = 1;

/// Each model, by ACPI on bus 0: plugged, used, unplugged while it is used, over and over.
pub fn cycles(ground: &Ground) -> Result<()> {
    let mut vmm = ground.boot(USUAL_CPUS, BOOT)?;
    let mut others = Vec::new();
    for model in models::ALL {
        match model.missing_module(&mut vmm)? {
            None => cycles_of(ground, &mut vmm, model)?,
            Some(_) => others.push(model),
        }
    }
    finish(vmm)?;
    if others.is_empty() {
        return Ok(());
    }
    // This kernel has no driver for them, the larger one of the same series has.
    let mut machine = ground.machine(USUAL_CPUS, BOOT);
    let larger = ground.all_drivers.clone();
    machine.image = larger.context("a driver is missing, and there is no larger kernel")?;
    let mut vmm = ground.start(&machine)?;
    for model in others {
        cycles_of(ground, &mut vmm, model)?;
    }
    finish(vmm)
}

fn cycles_of(ground: &Ground, vmm: &mut Vmm, model: &Model) -> Result<()> {
    let cycles = match ground.long {
        true => CYCLES.1,
        false if ground.series == LOOKED_AT => CYCLES.0,
        // Each comes and goes twice more where it goes by force.
        false => 1,
    };
    let begun = Instant::now();
    come_and_go(vmm, model, None, cycles).with_context(|| model.driver.to_owned())?;
    clean_kernel_log(vmm).with_context(|| model.driver.to_owned())?;
    if ground.long {
        // Half an hour in all: what has been done is shown on the way.
        let (driver, seconds) = (model.driver, begun.elapsed().as_secs());
        println!(
            "{:<5} {driver}: {cycles} cycles in {seconds} s",
            ground.series
        );
    }
    Ok(())
}

/// Says so when the guest's kernel has no driver for a model.
fn is_left_out(ground: &Ground, vmm: &mut Vmm, model: &Model) -> Result<bool> {
    let missing = model.missing_module(vmm)?;
    if let Some(module) = missing {
        println!(
            "{:<5} {}: NOT TRIED, this kernel has no {module}",
            ground.series, model.driver
        );
    }
    Ok(missing.is_some())
}

/// The same behind a root port, with its own hot-plug hardware. The guest takes 5 s for each removal.
pub fn native(ground: &Ground) -> Result<()> {
    let mut machine = ground.machine(USUAL_CPUS, BOOT);
    machine
        .more
        .extend(["--device".into(), "pcie-root-port,id=rp1".into()]);
    let mut vmm = ground.start(&machine)?;
    let cycles = if ground.long { 20 } else { 1 };
    let models: &[Model] = if ground.long {
        models::ALL
    } else {
        &models::ALL[..1]
    };
    // What brings a bus of its own is not behind the port.
    let on_pci = |model: &&Model| (model.arguments)().get("bus").is_none();
    for model in models.iter().filter(on_pci) {
        if models::ROOT_BUS_ONLY.contains(&model.driver) || is_left_out(ground, &mut vmm, model)? {
            continue;
        }
        come_and_go(&mut vmm, model, Some("rp1"), cycles)
            .with_context(|| model.driver.to_owned())?;
    }
    no_ports_behind_a_bridge(&mut vmm)?;
    finish(vmm)
}

/// What needs I/O ports is refused behind a bridge, and nothing of it stays.
fn no_ports_behind_a_bridge(vmm: &mut Vmm) -> Result<()> {
    let null = json!({"id": "null0", "backend": {"type": "null", "data": {}}});
    vmm.qmp().execute("chardev-add", null)?;
    let port = json!({"driver": "pci-serial", "id": "s0", "chardev": "null0", "bus": "rp1"});
    let Err(error) = vmm.qmp().execute("device_add", port) else {
        bail!("a port with an I/O BAR is taken behind a bridge");
    };
    ensure!(
        format!("{error:#}").contains("needs i/o ports"),
        "{error:#}"
    );
    vmm.qmp()
        .execute("chardev-remove", json!({"id": "null0"}))?;
    Ok(())
}

fn come_and_go(vmm: &mut Vmm, model: &Model, bus: Option<&str>, cycles: u32) -> Result<()> {
    let ground = tempfile::tempdir()?;
    (model.prepare)(vmm, ground.path()).context("prepare")?;
    let mut settled = None;
    for cycle in 0..cycles {
        one_cycle(vmm, model, bus).with_context(|| format!("cycle {cycle}"))?;
        if cycle == SETTLED {
            settled = Some(Residue::of(vmm)?);
        }
    }
    if let Some(settled) = settled.filter(|_| cycles > SETTLED + 1) {
        settled.again(vmm)?;
    }
    residue::nothing_is_pinned(vmm)?;
    (model.clean_up)(vmm).context("clean up")
}

fn one_cycle(vmm: &mut Vmm, model: &Model, bus: Option<&str>) -> Result<()> {
    in_use(vmm, model, bus)?;
    ask(vmm, "dev0")?;
    gone(vmm, model)
}

/// Asks for a device, as soon as the guest is through with what it does to its slot: it uses what a port has plugged a
/// moment before its driver for the slot is ready.
pub(super) fn ask(vmm: &mut Vmm, id: &str) -> Result<()> {
    let begun = Instant::now();
    loop {
        let Err(error) = vmm.qmp().execute("device_del", json!({"id": id})) else {
            return Ok(());
        };
        let is_busy = format!("{error:#}").contains("is blinking");
        if !is_busy || begun.elapsed() > GUEST {
            return Err(error.context(id.to_owned()));
        }
        std::thread::sleep(LOOK);
    }
}

/// Plugs the model as dev0 and has the guest use it.
fn in_use(vmm: &mut Vmm, model: &Model, bus: Option<&str>) -> Result<()> {
    let mut arguments = (model.arguments)();
    arguments["driver"] = json!(model.driver);
    arguments["id"] = json!("dev0");
    if let Some(bus) = bus {
        arguments["bus"] = json!(bus);
    }
    vmm.qmp().execute("device_add", arguments.clone())?;
    wait_for(vmm, model.present, true)?;
    (model.start)(vmm).context("use")
}

/// Waits until dev0, which was in use, has gone, for management and for the guest.
fn gone(vmm: &mut Vmm, model: &Model) -> Result<()> {
    all_deleted(vmm, model.below)?;
    deleted(vmm, "dev0")?;
    wait_for(vmm, model.present, false)?;
    (model.stop)(vmm).context("after the end")?;
    Ok(())
}

/// Waits for DEVICE_DELETED of `id`; it must come once.
pub(super) fn deleted(vmm: &mut Vmm, id: &str) -> Result<()> {
    let gone = deleted_device(vmm)?;
    ensure!(gone == json!(id), "DEVICE_DELETED of {gone}, not of {id}");
    Ok(())
}

/// Waits for DEVICE_DELETED of each of `ids`, in any order; no other may come.
pub(super) fn all_deleted(vmm: &mut Vmm, ids: &[&str]) -> Result<()> {
    let mut left = ids.to_vec();
    while !left.is_empty() {
        let gone = deleted_device(vmm)?;
        let found = left.iter().position(|id| gone == json!(id));
        let at = found.with_context(|| format!("{gone} has gone, not {left:?}"))?;
        left.swap_remove(at);
    }
    Ok(())
}

/// Waits for the next DEVICE_DELETED; of what.
fn deleted_device(vmm: &mut Vmm) -> Result<Value> {
    let event = vmm.qmp().wait_event("DEVICE_DELETED", GUEST);
    let event = event.with_context(|| {
        let log = kernel_log(vmm).unwrap_or_else(|e| format!("{e:#}"));
        format!("{}\n{log}", removals(vmm))
    })?;
    Ok(event.data["device"].clone())
}

/// What is known of the removals under way, for errors.
pub(super) fn removals(vmm: &mut Vmm) -> String {
    match vmm.qmp().execute("x-ebbtide-query-removals", Value::Null) {
        Ok(removals) => format!("removals: {removals}"),
        Err(e) => format!("removals: {e:#}"),
    }
}

/// The end of the guest's kernel log, for errors.
pub(super) fn kernel_log(vmm: &mut Vmm) -> Result<String> {
    let log: KernelLog = vmm.guest().call(
        Command::Dmesg {
            deny: Vec::new(),
            tail: 60,
        },
        GUEST,
    )?;
    Ok(log.tail.join("\n"))
}

/// Waits until the path, which may hold `*`, is there in the guest, or is not. A disk is there when it can be opened, which
/// is a moment later.
pub(super) fn wait_for(vmm: &mut Vmm, path: &str, there: bool) -> Result<()> {
    let begun = Instant::now();
    let found = match there {
        true => "if [ -b $f ]; then (true < $f) 2> /dev/null; else [ -e $f ]; fi",
        false => "[ -e $f ]",
    };
    let script = format!("for f in {path}; do {found} && exit 0; done; exit 1");
    loop {
        let test = vmm
            .guest()
            .exec(&["/bin/busybox", "sh", "-c", &script], GUEST)?;
        if (test.code == Some(0)) == there {
            return Ok(());
        }
        if begun.elapsed() > GUEST {
            let what = if there { "does not come" } else { "stays" };
            bail!("{path} {what}; {}\n{}", removals(vmm), kernel_log(vmm)?);
        }
        std::thread::sleep(LOOK);
    }
}

/// Whether a DEVICE_DELETED has come; the VMM tells before it answers what comes after.
fn says_deleted(vmm: &mut Vmm) -> Result<bool> {
    let events = vmm.qmp().take_events()?;
    Ok(events.iter().any(|e| e.name == "DEVICE_DELETED"))
}

/// A device that is added again and again at every moment of another's way out: of one that the guest lets go of, and of
/// one that is taken away.
pub fn reuse(ground: &Ground) -> Result<()> {
    /// How often while a request keeps it.
    const TRIES: u32 = 5;
    let mut vmm = ground.boot(USUAL_CPUS, BOOT)?;
    // One write of each round.
    let [medium, node] = holding("op=write,count=2");
    for node in [&medium, &node] {
        vmm.qmp().execute("blockdev-add", node.clone())?;
    }
    let disk = json!({"driver": "virtio-blk-pci", "id": "d0", "drive": "n0", "addr": "7"});
    vmm.qmp().execute("device_add", disk.clone())?;
    for by_force in [false, true] {
        wait_for(&mut vmm, "/dev/vda", true)?;
        let write =
            "dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct < /dev/null > /dev/null 2>&1 &";
        shell(&mut vmm, write)?;
        wait_held(&mut vmm, "n0")?;
        vmm.qmp().execute("device_del", json!({"id": "d0"}))?;
        let phase = if by_force { "draining" } else { "requested" };
        if by_force {
            force::force(&mut vmm)?;
        }
        for _ in 0..TRIES {
            force::in_phase(&mut vmm, phase)?;
            let taken = try_again(&mut vmm, &disk, &node, false)?;
            ensure!(!taken, "what the device has was given away under it");
        }
        release_one(&mut vmm, "n0")?;
        again_and_again(&mut vmm, &disk, &node).with_context(|| phase.to_owned())?;
    }
    wait_for(&mut vmm, "/dev/vda", true)?;
    vmm.qmp().execute("device_del", json!({"id": "d0"}))?;
    deleted(&mut vmm, "d0")?;
    delete(&mut vmm)?;
    finish(vmm)
}

/// Tries until the device that was there before has gone, and so it is taken.
fn again_and_again(vmm: &mut Vmm, disk: &Value, node: &Value) -> Result<()> {
    let begun = Instant::now();
    let mut told = false;
    while !told {
        if begun.elapsed() > GUEST {
            bail!("it does not go: {}\n{}", removals(vmm), kernel_log(vmm)?);
        }
        // What the VMM takes from now on, it must take: it has said so before.
        told |= says_deleted(vmm)?;
        let taken = try_again(vmm, disk, node, told)?;
        if taken {
            // It may have gone between the look at the events and the command.
            told |= says_deleted(vmm)?;
            ensure!(told, "what the device has was given away under it");
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// Adds the device once more, and takes its node away if that is refused. Whether either was taken; then the device is there.
fn try_again(vmm: &mut Vmm, disk: &Value, node: &Value, must: bool) -> Result<bool> {
    let again = vmm.qmp().execute("device_add", disk.clone());
    let Err(refused) = again else {
        return Ok(true);
    };
    let removed = vmm
        .qmp()
        .execute("blockdev-del", json!({"node-name": "n0"}));
    if removed.is_ok() {
        vmm.qmp().execute("blockdev-add", node.clone())?;
        vmm.qmp().execute("device_add", disk.clone())?;
        return Ok(true);
    }
    ensure!(
        !must,
        "the id, the slot and the node are not free after DEVICE_DELETED: {refused:#}"
    );
    Ok(false)
}
