// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! PCI hierarchies that come and go: switches with all that is below them, put together in a running guest and taken away
//! at once; and what guest and management see of them.

mod adapter;
mod boot;
mod build;
mod inventory;
mod nested;
mod subtree;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::hotplug::{GUEST, LOOK, ask, kernel_log, removals, shell, until};
use super::{BOOT, Ground, USUAL_CPUS};
use crate::vmm::{Machine, Vmm};

pub use adapter::adapter;
pub use boot::at_boot;
pub use build::built;
pub use inventory::inventory;
pub use nested::nested;
pub use subtree::whole;

/// Physical slot number of the root port, which the guest's kernel names it by.
const SLOT: u16 = 111;

/// A machine with the root port `rp1`, in slot 3 of bus 0, behind which `buses` bus numbers are kept free.
fn machine(ground: &Ground, buses: u8) -> Machine {
    let mut machine = ground.machine(USUAL_CPUS, BOOT);
    let port = format!("pcie-root-port,id=rp1,addr=3,slot={SLOT},bus-reserve={buses}");
    machine.more.extend(["--device".into(), port]);
    machine
}

/// A downstream port of the switch `switch`.
fn downstream(id: &str, switch: &str) -> Value {
    json!({"driver": "xio3130-downstream", "id": id, "bus": switch})
}

/// A disk with its id as serial number.
fn disk(id: &str, bus: &str, node: &str) -> Value {
    json!({"driver": "virtio-blk-pci", "id": id, "bus": bus, "drive": node, "serial": id})
}

fn add(vmm: &mut Vmm, device: &Value) -> Result<()> {
    let added = vmm.qmp().execute("device_add", device.clone());
    added.map(drop).with_context(|| device.to_string())
}

fn add_node(vmm: &mut Vmm, node: Value) -> Result<()> {
    vmm.qmp().execute("blockdev-add", node).map(drop)
}

fn announce(vmm: &mut Vmm, id: &str) -> Result<()> {
    let told = vmm
        .qmp()
        .execute("x-ebbtide-device-announce", json!({"id": id}));
    told.map(drop).with_context(|| id.to_owned())
}

/// A command must be refused with an error that holds `part`.
fn refused(vmm: &mut Vmm, command: &str, arguments: Value, part: &str) -> Result<()> {
    match vmm.qmp().execute(command, arguments.clone()) {
        Ok(answer) => anyhow::bail!("{command} {arguments} is answered with {answer}"),
        Err(error) => ensure!(
            format!("{error:#}").contains(part),
            "{command} {arguments}: {error:#}: {part:?} is missed"
        ),
    }
    Ok(())
}

/// What a shell command says in the guest.
fn output(vmm: &mut Vmm, script: &str) -> Result<String> {
    let argv = ["/bin/busybox", "sh", "-c", script];
    let done = vmm.guest().exec(&argv, GUEST)?;
    ensure!(done.code == Some(0), "{script}: {done:?}");
    Ok(done.output)
}

/// Waits for the disk with this serial number, until it can be opened, and returns its path.
fn disk_path(vmm: &mut Vmm, serial: &str) -> Result<String> {
    let find = format!(
        "for b in /sys/block/vd*; do d=/dev/${{b##*/}}; [ \"$(cat $b/serial 2>/dev/null)\" = {serial} ] && \
         (true < $d) 2> /dev/null && echo $d && exit 0; done; exit 1"
    );
    until(vmm, &format!("disk {serial} is there"), &find)?;
    Ok(output(vmm, &find)?.trim().to_owned())
}

/// Reads from a disk, past the cache.
fn read(vmm: &mut Vmm, serial: &str) -> Result<()> {
    let path = disk_path(vmm, serial)?;
    let reading = format!("dd if={path} of=/dev/null bs=64k count=4 iflag=direct");
    output(vmm, &reading).map(drop)
}

/// The ids of all DEVICE_DELETED up to that of `top`, in order. Nothing follows it.
fn deleted_with(vmm: &mut Vmm, top: &str) -> Result<Vec<String>> {
    let mut ids = Vec::new();
    while ids.last().is_none_or(|last| last != top) {
        let event = vmm.qmp().wait_event("DEVICE_DELETED", GUEST);
        let event = match event {
            Ok(event) => event,
            Err(e) => {
                let (removals, log) = (removals(vmm), kernel_log(vmm)?);
                return Err(e.context(format!("after {ids:?}; {removals}\n{log}")));
            }
        };
        ids.push(event.data["device"].as_str().context("device")?.to_owned());
    }
    std::thread::sleep(10 * LOOK);
    let more = vmm.qmp().take_events()?;
    let more = more.iter().find(|event| event.name == "DEVICE_DELETED");
    ensure!(more.is_none(), "after that of {top}: {more:?}");
    Ok(ids)
}

/// Checks that each of `all` has gone once, and each pair of `order` in that order.
fn gone_once(gone: &[String], all: &[&str], order: &[(&str, &str)]) -> Result<()> {
    let mut sorted: Vec<&str> = gone.iter().map(String::as_str).collect();
    sorted.sort_unstable();
    let mut all = all.to_vec();
    all.sort_unstable();
    ensure!(sorted == all, "{gone:?} have gone, not {all:?}");
    let position = |id: &str| gone.iter().position(|it| it == id);
    for (first, then) in order {
        ensure!(
            position(first) < position(then),
            "{first} has gone after {then}: {gone:?}"
        );
    }
    Ok(())
}

/// Notes in the guest's kernel log that something begins.
fn note(vmm: &mut Vmm, text: &str) -> Result<()> {
    shell(vmm, &format!("echo '{text}' > /dev/kmsg"))
}

/// The guest's driver of hot-plug slots has heard of `slot`, and of no other, since `noted` was noted.
fn only_slot_heard(vmm: &mut Vmm, noted: &str, slot: u16) -> Result<()> {
    let log = output(vmm, &format!("dmesg | sed -n '/{noted}/,$p'"))?;
    let name = format!("Slot({slot})");
    let messages: Vec<&str> = log.lines().filter(|line| line.contains("Slot(")).collect();
    ensure!(
        !messages.is_empty() && messages.iter().all(|line| line.contains(&name)),
        "not of {name} alone:\n{log}"
    );
    Ok(())
}
