// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Removals within removals: a switch goes while a device below it is on its way out or was asked to go.
//!
//! ```text
//! rp1 ── sw ─┬─ dp0 ── d0      a read of it takes long
//!            └─ dp1 ── d1      works
//! ```

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{
    add, add_node, announce, deleted_with, disk, disk_path, downstream, gone_once, machine, output,
    refused, remove, until,
};
use crate::system::hotplug::{GUEST, LOOK, shell, wait_for, write_disk};
use crate::system::{Ground, MIB, STEP_LIMIT, clean_kernel_log};
use crate::vmm::Vmm;

/// How long one read takes: longer than all that is looked at meanwhile.
const LATENCY: Duration = Duration::from_secs(25);
/// Reads before that one: those of a kernel that looks at a new disk among them.
const QUICK_READS: u32 = 200;
/// In which the guest has seen that a button was pressed; it waits for five seconds then.
const PRESSED: Duration = Duration::from_secs(1);
/// What goes at once goes within this.
const TOGETHER_MS: u64 = 50;
const ALL: [&str; 5] = ["sw", "dp0", "d0", "dp1", "d1"];
const ORDER: [(&str, &str); 4] = [("d0", "dp0"), ("d1", "dp1"), ("dp0", "sw"), ("dp1", "sw")];

/// First as a guest does it that is asked for both, then as one that does not wait.
pub fn nested(ground: &Ground) -> Result<()> {
    let images = tempfile::tempdir()?;
    let mut vmm = ground.start(&machine(ground, 8))?;
    add_node(
        &mut vmm,
        json!({"driver": "null-co", "node-name": "m0", "size": 64 << 20}),
    )?;
    add_node(&mut vmm, slow("n0", "m0", LATENCY))?;
    let path = images.path().join("n1");
    std::fs::File::create(&path)?.set_len(64 * MIB)?;
    add_node(
        &mut vmm,
        json!({"driver": "file", "node-name": "n1", "filename": path}),
    )?;

    for first in ["d1", "sw"] {
        put_together(&mut vmm)?;
        work(&mut vmm)?;
        one_after_the_other(&mut vmm, first).with_context(|| format!("{first} first"))?;
    }

    put_together(&mut vmm)?;
    work(&mut vmm)?;
    while_the_child_drains(&mut vmm)?;
    vmm.qmp().execute("quit", Value::Null)?;
    let status = vmm.wait_exit(STEP_LIMIT)?;
    ensure!(status.success(), "the VMM ended with {status}{}", vmm.log());
    Ok(())
}

/// A node of which one read takes `latency`, and all others no time.
pub(super) fn slow(name: &str, medium: &str, latency: Duration) -> Value {
    let nanoseconds = latency.as_nanos();
    let rule = format!("fault=delay,delay-ns={nanoseconds},op=read,skip={QUICK_READS},count=1");
    json!({"driver": "x-ebbtide-fault", "node-name": name, "file": medium, "rules": [rule]})
}

/// Reads from the disk until a read does not come back. Not before the time returned.
pub(super) fn read_until_it_waits(vmm: &mut Vmm, path: &str) -> Result<Instant> {
    let name = path.trim_start_matches("/dev/");
    let begun = Instant::now();
    let reader =
        format!("dd if={path} of=/dev/null bs=4k iflag=direct < /dev/null > /dev/null 2>&1 &");
    shell(vmm, &reader)?;
    let waits = format!(
        "set -- $(cat /sys/block/{name}/stat); was=$1; sleep 0.3; set -- $(cat /sys/block/{name}/stat); \
         read reads writes < /sys/block/{name}/inflight; [ $reads -gt 0 ] && [ $was -eq $1 ]"
    );
    until(vmm, "a read does not come back", &waits)?;
    Ok(begun)
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
/// driver would wait for itself.
fn one_after_the_other(vmm: &mut Vmm, first: &str) -> Result<()> {
    let second = if first == "sw" { "d1" } else { "sw" };
    remove(vmm, first)?;
    std::thread::sleep(PRESSED);
    remove(vmm, second)?;
    std::thread::sleep(PRESSED);
    // Once more, which takes nothing back.
    refused(vmm, "device_del", json!({"id": "sw"}), "blinking")?;
    let gone = deleted_with(vmm, "sw")?;
    gone_once(&gone, &ALL, &ORDER)?;
    wait_for(vmm, "/sys/block/vd*", false)?;
    clean_kernel_log(vmm)
}

/// The guest writes to d1 from now on.
fn work(vmm: &mut Vmm) -> Result<()> {
    let path = disk_path(vmm, "d1")?;
    write_disk(vmm, &path)
}

/// The guest turns the root port off without a word to its drivers.
fn while_the_child_drains(vmm: &mut Vmm) -> Result<()> {
    let path = disk_path(vmm, "d0")?;
    // All that takes an emulated guest long is done before the read begins.
    let power_off = power_off(vmm)?;
    let begun = read_until_it_waits(vmm, &path)?;
    remove(vmm, "d0")?;
    vmm.qmp()
        .execute("x-ebbtide-device-force", json!({"id": "d0"}))?;
    let removals = in_phase(vmm, "d0", "draining")?;
    let holder = find(&removals, "d0")?["holders"][0]["what"].clone();
    ensure!(holder == "1 request", "{removals}");
    // Requested, and then gone with what it is below.
    remove(vmm, "d1")?;
    remove(vmm, "sw")?;
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
    let refusals = nothing_else_begins(vmm);
    let left = vmm.qmp().execute("x-ebbtide-query-removals", Value::Null)?;
    find(&left, "d0").context("this machine is too busy: the read is over")?;
    refusals?;
    shell(vmm, "true").context("the guest does not go on")?;

    let gone = deleted_with(vmm, "sw")?;
    ensure!(
        begun.elapsed() >= LATENCY,
        "gone under the read: {:?}",
        begun.elapsed()
    );
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
