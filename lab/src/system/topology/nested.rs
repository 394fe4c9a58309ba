// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Removals within removals: a switch goes while a device below it is on its way out or was asked to go.
//!
//! ```text
//! rp1 ── sw ─┬─ dp0 ── d0      a read of it is held
//!            └─ dp1 ── d1      works
//! ```

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{
    add, add_node, announce, ask, deleted_with, disk, disk_path, downstream, gone_once, machine,
    output, refused,
};
use crate::qmp::QmpError;
use crate::system::hotplug::{
    GUEST, LOOK, holding, release_one, shell, wait_for, wait_held, write_disk,
};
use crate::system::{Ground, MIB, STEP_LIMIT, clean_kernel_log};
use crate::vmm::Vmm;

/// One read is held, which the medium has begun; not one of a kernel that looks at a new disk.
const HELD_READ: &str = "op=read,skip=200,count=1,point=begun";
/// How often is tried to ask for one device while the guest waits whether to let go of the other.
const TRIES: u32 = 5;
/// What goes at once goes within this.
const TOGETHER_MS: u64 = 50;
const ALL: [&str; 5] = ["sw", "dp0", "d0", "dp1", "d1"];
const ORDER: [(&str, &str); 4] = [("d0", "dp0"), ("d1", "dp1"), ("dp0", "sw"), ("dp1", "sw")];

/// First as a guest does it that is asked for both, then as one that does not wait.
pub fn nested(ground: &Ground) -> Result<()> {
    let images = tempfile::tempdir()?;
    let mut vmm = ground.start(&machine(ground, 8))?;
    for node in holding(HELD_READ) {
        add_node(&mut vmm, node)?;
    }
    let path = images.path().join("n1");
    std::fs::File::create(&path)?.set_len(64 * MIB)?;
    add_node(
        &mut vmm,
        json!({"driver": "file", "node-name": "n1", "filename": path}),
    )?;

    for first in ["d1", "sw"] {
        let mut tries = 0;
        while !one_after_the_other(&mut vmm, first).with_context(|| format!("{first} first"))? {
            tries += 1;
            ensure!(tries < TRIES, "{first} first: the guest is always quicker");
        }
    }

    put_together(&mut vmm)?;
    work(&mut vmm)?;
    while_the_child_drains(&mut vmm)?;
    vmm.qmp().execute("quit", Value::Null)?;
    let status = vmm.wait_exit(STEP_LIMIT)?;
    ensure!(status.success(), "the VMM ended with {status}{}", vmm.log());
    Ok(())
}

/// The same for the adapter's scenario.
pub(super) fn held_read() -> [Value; 2] {
    holding(HELD_READ)
}

/// Has the guest read from the disk of [`held_read`] until the read that is held.
pub(super) fn read_until_held(vmm: &mut Vmm, path: &str) -> Result<()> {
    let reader =
        format!("dd if={path} of=/dev/null bs=4k iflag=direct < /dev/null > /dev/null 2>&1 &");
    shell(vmm, &reader)?;
    wait_held(vmm, "n0")
}

fn put_together(vmm: &mut Vmm) -> Result<()> {
    let mut switch = json!({"driver": "x3130-upstream", "id": "sw", "bus": "rp1"});
    switch["x-ebbtide-announce"] = json!(false);
    add(vmm, &switch)?;
    for (port, id, node) in [("dp0", "d0", "n0"), ("dp1", "d1", "n1")] {
        add(vmm, &downstream(port, "sw"))?;
        add(vmm, &disk(id, port, node))?;
    }
    announce(vmm, "sw")
}

/// The guest is asked for both within the time it takes for either. It goes on with the one that is above: with both, its
/// driver would wait for itself. False: it had let go of one before it was asked for the other.
fn one_after_the_other(vmm: &mut Vmm, first: &str) -> Result<bool> {
    put_together(vmm)?;
    work(vmm)?;
    let second = if first == "sw" { "d1" } else { "sw" };
    ask(vmm, first)?;
    let mut in_time = blinks(vmm, first)?;
    match ask(vmm, second) {
        // Asked for once more it is not taken back.
        Ok(()) => in_time &= blinks(vmm, "sw")?,
        Err(error) => in_time = !is_over(error)?,
    }
    let gone = deleted_with(vmm, "sw")?;
    gone_once(&gone, &ALL, &ORDER)?;
    wait_for(vmm, "/sys/block/vd*", false)?;
    clean_kernel_log(vmm)?;
    Ok(in_time)
}

/// Asks for a device that was asked for, which changes nothing, until the guest blinks: it waits for five seconds then. False:
/// they are over.
fn blinks(vmm: &mut Vmm, id: &str) -> Result<bool> {
    let begun = Instant::now();
    loop {
        match vmm.qmp().execute("device_del", json!({"id": id})) {
            Ok(_) => ensure!(begun.elapsed() < GUEST, "{id}: the guest does not blink"),
            Err(error) if format!("{error:#}").contains("is blinking") => return Ok(true),
            Err(error) => return is_over(error).map(|over| !over),
        }
        std::thread::sleep(LOOK);
    }
}

/// Whether a removal was refused since the device goes, or has gone; other errors are passed on.
fn is_over(error: anyhow::Error) -> Result<bool> {
    let refused = error.downcast::<QmpError>()?;
    let is_over = refused.class == "DeviceNotFound"
        || refused.desc.contains("already in the process of unplug");
    ensure!(is_over, "{refused}");
    Ok(true)
}

/// The guest writes to d1 from now on.
fn work(vmm: &mut Vmm) -> Result<()> {
    let path = disk_path(vmm, "d1")?;
    write_disk(vmm, &path)
}

/// The guest turns the root port off without a word to its drivers.
fn while_the_child_drains(vmm: &mut Vmm) -> Result<()> {
    let path = disk_path(vmm, "d0")?;
    let power_off = power_off(vmm)?;
    read_until_held(vmm, &path)?;
    ask(vmm, "d0")?;
    vmm.qmp()
        .execute("x-ebbtide-device-force", json!({"id": "d0"}))?;
    let removals = in_phase(vmm, "d0", "draining")?;
    let holder = find(&removals, "d0")?["holders"][0]["what"].clone();
    ensure!(holder == "1 request", "{removals}");
    // Requested, and then gone with what it is below.
    ask(vmm, "d1")?;
    ask(vmm, "sw")?;
    shell(vmm, &power_off)?;
    let removals = in_phase(vmm, "sw", "draining")?;
    let since = |id| drains_since(&removals, id);
    let (all, child) = (since("sw")?, since("d0")?);
    for id in ["dp0", "dp1", "d1"] {
        let its = since(id)?;
        ensure!(its.abs_diff(all) <= TOGETHER_MS, "{id}: {removals}");
    }
    ensure!(
        child > all,
        "the child's removal began anew: {all}: {removals}"
    );
    nothing_else_begins(vmm)?;
    shell(vmm, "true").context("the guest does not go on")?;
    for id in ALL {
        in_phase(vmm, id, "draining").context("gone under the read")?;
    }
    release_one(vmm, "n0")?;
    let gone = deleted_with(vmm, "sw")?;
    gone_once(&gone, &ALL, &ORDER)?;
    // What the guest asked of d1 after that has no answer, and it waits for one: it is not asked how its work went.
    // All of it is free again: what this guest makes of it is another matter.
    put_together(vmm)
}

/// All of it is on its way already.
fn nothing_else_begins(vmm: &mut Vmm) -> Result<()> {
    for id in ["d1", "dp1", "d0", "sw"] {
        let part = "already in the process of unplug";
        refused(vmm, "device_del", json!({"id": id}), part)?;
    }
    let below = disk("d2", "dp1", "n1");
    refused(vmm, "device_add", below, "being removed")?;
    let in_its_place = disk("d2", "rp1", "n1");
    refused(vmm, "device_add", in_its_place, "being removed")?;
    let its_id = disk("d1", "pcie.0", "n1");
    refused(vmm, "device_add", its_id, "being removed")?;
    let its_node = disk("d2", "pcie.0", "n1");
    refused(vmm, "device_add", its_node, "n1")?;
    let switch = json!({"id": "sw"});
    refused(vmm, "x-ebbtide-device-announce", switch, "unplug")
}

/// The command that turns the root port's slot off by its registers, as a driver does at the end of a removal.
fn power_off(vmm: &mut Vmm) -> Result<String> {
    const CONFIG: &str = "/sys/bus/pci/devices/0000:00:03.0/config";
    const SLOT_CONTROL: usize = 0x18;
    const OFF: u16 = 1 << 10 | 3 << 8;
    let bytes = output(vmm, &format!("od -An -v -tx1 {CONFIG}"))?;
    let bytes: Vec<u8> = bytes
        .split_whitespace()
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect::<Result<_, _>>()?;
    let at = express(&bytes).context("no PCI Express capability")? + SLOT_CONTROL;
    let word = bytes.get(at..at + 2).context("config space is short")?;
    let [low, high] = (u16::from_le_bytes([word[0], word[1]]) | OFF).to_le_bytes();
    Ok(format!(
        "printf '\\x{low:02x}\\x{high:02x}' | dd of={CONFIG} bs=2 seek={} conv=notrunc",
        at / 2
    ))
}

/// Where the PCI Express capability is in a configuration space.
fn express(bytes: &[u8]) -> Option<usize> {
    const POINTER: usize = 0x34;
    const PCI_EXPRESS: u8 = 0x10;
    let mut at = usize::from(*bytes.get(POINTER)?);
    while at != 0 && *bytes.get(at)? != PCI_EXPRESS {
        at = usize::from(*bytes.get(at + 1)?);
    }
    (at != 0).then_some(at)
}

/// All removals, once that of `id` has come so far.
fn in_phase(vmm: &mut Vmm, id: &str, phase: &str) -> Result<Value> {
    let begun = Instant::now();
    loop {
        let removals = vmm.qmp().execute("x-ebbtide-query-removals", Value::Null)?;
        if find(&removals, id).is_ok_and(|it| it["phase"] == phase) {
            return Ok(removals);
        }
        ensure!(begun.elapsed() < GUEST, "{id} is not {phase}: {removals}");
        std::thread::sleep(LOOK);
    }
}

fn find<'a>(removals: &'a Value, id: &str) -> Result<&'a Value> {
    let mut all = removals.as_array().into_iter().flatten();
    all.find(|it| it["id"] == id)
        .with_context(|| format!("{id} is not in {removals}"))
}

/// For how many milliseconds a device has been draining.
fn drains_since(removals: &Value, id: &str) -> Result<u64> {
    let removal = find(removals, id)?;
    let mut steps = removal["history"].as_array().into_iter().flatten();
    let step = steps.find(|step| step["phase"] == "draining");
    let at = step.and_then(|step| step["ms"].as_u64());
    let age = removal["age-ms"].as_u64();
    at.zip(age)
        .map(|(at, age)| age - at)
        .with_context(|| format!("{id} does not drain: {removal}"))
}
