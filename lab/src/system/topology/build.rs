// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A switch is put together in a running guest, which sees it when it is complete; then more is plugged below it.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::{
    add, add_node, announce, ask, deleted_with, disk, disk_path, downstream, gone_once, machine,
    output, read, refused, until,
};
use crate::system::hotplug::{Residue, deleted, wait_for};
use crate::system::{BOOT_LIMIT, Ground, clean_kernel_log, finish};
use crate::vmm::Vmm;

/// For a switch with three ports and another with two in one of these: each port takes a bus, each switch one more.
const BUSES: u8 = 40;
const NODES: [&str; 4] = ["n0", "n1", "n2", "n3"];

/// By native hot-plug, switches in switches, then a bridge to conventional PCI by ACPI, then amid a reset.
pub fn built(ground: &Ground) -> Result<()> {
    let mut vmm = ground.start(&machine(ground, BUSES))?;
    for node in NODES {
        add_node(
            &mut vmm,
            json!({"driver": "null-co", "node-name": node, "size": 64 << 20}),
        )?;
    }
    // The first disk brings a thread that stays.
    add(&mut vmm, &disk("d0", "pcie.0", "n0"))?;
    read(&mut vmm, "d0")?;
    ask(&mut vmm, "d0")?;
    deleted(&mut vmm, "d0")?;
    wait_for(&mut vmm, "/sys/block/vd*", false)?;
    let before = Residue::of(&mut vmm)?;
    out_of_sight(&mut vmm)?;
    more_below(&mut vmm)?;
    switch_in_switch(&mut vmm)?;
    all_gone(&mut vmm)?;
    by_acpi(&mut vmm)?;
    before.again(&mut vmm)?;
    clean_kernel_log(&mut vmm)?;
    amid_a_reset(&mut vmm)?;
    for node in NODES {
        vmm.qmp()
            .execute("blockdev-del", json!({"node-name": node}))?;
    }
    finish(vmm)
}

fn unannounced(driver: &str, id: &str, bus: &str) -> Value {
    json!({"driver": driver, "id": id, "bus": bus, "x-ebbtide-announce": false})
}

/// Functions the guest has found, after it has looked again.
fn functions(vmm: &mut Vmm) -> Result<usize> {
    let count = "echo 1 > /sys/bus/pci/rescan; ls /sys/bus/pci/devices | wc -l";
    Ok(output(vmm, count)?.trim().parse()?)
}

/// Nothing is seen of it until it is announced, not by a guest that looks; what is taken out again was never there.
fn out_of_sight(vmm: &mut Vmm) -> Result<()> {
    let (seen, listed) = (
        functions(vmm)?,
        vmm.qmp().execute("query-pci", Value::Null)?,
    );
    add(vmm, &unannounced("x3130-upstream", "sw", "rp1"))?;
    for port in ["dp0", "dp1", "dp2", "wrong"] {
        add(vmm, &downstream(port, "sw"))?;
    }
    add(vmm, &disk("d0", "dp0", "n0"))?;
    add(vmm, &disk("d3", "wrong", "n3"))?;
    refused(vmm, "device_add", disk("d1", "sw", "n1"), "sw")?;
    let no_slot = unannounced("xio3130-downstream", "dp9", "sw");
    refused(vmm, "device_add", no_slot, "x-ebbtide-announce")?;
    ensure!(functions(vmm)? == seen, "the guest sees it");
    let now = vmm.qmp().execute("query-pci", Value::Null)?;
    ensure!(now == listed, "listed: {now}");
    ask(vmm, "wrong")?;
    gone_once(&deleted_with(vmm, "wrong")?, &["d3", "wrong"], &[])?;
    ask(vmm, "d0")?;
    deleted(vmm, "d0")?;
    add(vmm, &disk("d0", "dp0", "n0"))?;

    announce(vmm, "sw")?;
    read(vmm, "d0")?;
    ensure!(functions(vmm)? == seen + 5, "not the switch and its disk");
    let again = json!({"id": "sw"});
    refused(vmm, "x-ebbtide-device-announce", again, "announced already")?;
    let unknown = json!({"id": "nope"});
    refused(vmm, "x-ebbtide-device-announce", unknown, "nope")?;
    let late = downstream("dp9", "sw");
    refused(vmm, "device_add", late, "does not support hotplugging")
}

/// The ports' own slots take it from here.
fn more_below(vmm: &mut Vmm) -> Result<()> {
    add(vmm, &disk("d1", "dp1", "n1"))?;
    read(vmm, "d1")?;
    ask(vmm, "d1")?;
    deleted(vmm, "d1")?;
    wait_for(vmm, "/sys/block/vdb", false)?;
    add(vmm, &disk("d1", "dp1", "n1"))?;
    read(vmm, "d1")
}

/// Another switch in a port of the first one: bus numbers and addresses are there for it.
fn switch_in_switch(vmm: &mut Vmm) -> Result<()> {
    add(vmm, &unannounced("x3130-upstream", "sw2", "dp2"))?;
    add(vmm, &downstream("dp3", "sw2"))?;
    add(vmm, &downstream("dp4", "sw2"))?;
    announce(vmm, "sw2")?;
    // The hot-plug services of downstream ports.
    let slots = "[ $(ls /sys/bus/pci_express/devices | grep -c pcie204) = 5 ]";
    until(vmm, "each port has its driver", slots)?;
    add(vmm, &disk("d2", "dp3", "n2"))?;
    add(vmm, &disk("d3", "dp4", "n3"))?;
    ["d0", "d1", "d2", "d3"]
        .iter()
        .try_for_each(|it| read(vmm, it))
}

fn all_gone(vmm: &mut Vmm) -> Result<()> {
    ask(vmm, "sw")?;
    let gone = deleted_with(vmm, "sw")?;
    let all = [
        "sw", "dp0", "dp1", "dp2", "d0", "d1", "sw2", "dp3", "dp4", "d2", "d3",
    ];
    let order = [("d2", "dp3"), ("dp4", "sw2"), ("sw2", "dp2"), ("dp2", "sw")];
    gone_once(&gone, &all, &order)?;
    wait_for(vmm, "/sys/block/vd*", false)
}

/// A bridge on bus 0, which has no slots of its own either.
fn by_acpi(vmm: &mut Vmm) -> Result<()> {
    add(vmm, &unannounced("pci-bridge", "br", "pcie.0"))?;
    for (id, node) in [("d0", "n0"), ("d1", "n1")] {
        add(vmm, &disk(id, "br", node))?;
    }
    announce(vmm, "br")?;
    read(vmm, "d0")?;
    read(vmm, "d1")?;
    ask(vmm, "br")?;
    let order = [("d0", "br"), ("d1", "br")];
    gone_once(&deleted_with(vmm, "br")?, &["br", "d0", "d1"], &order)?;
    wait_for(vmm, "/sys/block/vd*", false)
}

/// The next guest does not see it either until it is announced; what is announced is there at its start.
fn amid_a_reset(vmm: &mut Vmm) -> Result<()> {
    add(vmm, &unannounced("x3130-upstream", "sw", "rp1"))?;
    add(vmm, &downstream("dp0", "sw"))?;
    add(vmm, &disk("d0", "dp0", "n0"))?;
    vmm.qmp().execute("system_reset", Value::Null)?;
    vmm.wait_ready(BOOT_LIMIT)?;
    wait_for(vmm, "/sys/block/vd*", false)?;
    add(vmm, &downstream("dp1", "sw"))?;
    announce(vmm, "sw")?;
    read(vmm, "d0")?;
    vmm.qmp().execute("system_reset", Value::Null)?;
    vmm.wait_ready(BOOT_LIMIT)?;
    disk_path(vmm, "d0")?;
    add(vmm, &disk("d1", "dp1", "n1"))?;
    read(vmm, "d1")?;
    ask(vmm, "sw")?;
    let gone = deleted_with(vmm, "sw")?;
    gone_once(&gone, &["sw", "dp0", "d0", "dp1", "d1"], &[("d1", "dp1")])
}
