// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A switch, a bridge to conventional PCI and the devices below them go at once, while they work.
//!
//! ```text
//! rp1 ── sw ─┬─ dp0 ── d0
//!            ├─ dp1 ── hba ── lun
//!            └─ dp2 ── br ─┬─ d1
//!                          └─ rng
//! ```

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{
    SLOT, add, announce, ask, deleted_with, disk, disk_path, downstream, gone_once, machine, note,
    only_slot_heard,
};
use crate::system::hotplug::{Residue, disk_is_gone, has_ended, read_rng, wait_for, write_disk};
use crate::system::{Ground, MIB, clean_kernel_log, finish};
use crate::vmm::Vmm;

/// Cycles of the short form and of the long one. The first is with what was there at boot.
const CYCLES: (u32, u32) = (3, 20);
/// What is left behind is looked for from here on.
const SETTLED: u32 = 1;
const ALL: [&str; 10] = [
    "sw", "dp0", "dp1", "dp2", "d0", "hba", "lun", "br", "d1", "rng",
];
/// Who goes before whom.
const ORDER: [(&str, &str); 9] = [
    ("d0", "dp0"),
    ("lun", "hba"),
    ("hba", "dp1"),
    ("d1", "br"),
    ("rng", "br"),
    ("br", "dp2"),
    ("dp0", "sw"),
    ("dp1", "sw"),
    ("dp2", "sw"),
];
const NODES: [&str; 3] = ["n0", "n1", "n2"];
const RNG: &str = "/sys/bus/virtio/drivers/virtio_rng/virtio*";

/// There at boot or put together since: it goes as a whole, over and over, and nothing is left.
pub fn whole(ground: &Ground) -> Result<()> {
    let images = tempfile::tempdir()?;
    let mut machine = machine(ground, 8);
    let mut option = |name: &str, value: String| machine.more.extend([name.to_owned(), value]);
    option("--object", "rng-random,id=r0,filename=/dev/urandom".into());
    for node in NODES {
        option("--blockdev", image(images.path(), node)?.to_string());
    }
    for device in devices() {
        option("--device", device.to_string());
    }
    let mut vmm = ground.start(&machine)?;
    let cycles = if ground.long { CYCLES.1 } else { CYCLES.0 };
    let mut settled = None;
    for cycle in 0..cycles {
        if cycle > 0 {
            put_together(&mut vmm)?;
        }
        one_cycle(&mut vmm, cycle).with_context(|| format!("cycle {cycle}"))?;
        if cycle == SETTLED {
            settled = Some(Residue::of(&mut vmm)?);
        }
    }
    settled.context("too few cycles")?.again(&mut vmm)?;
    for node in NODES {
        vmm.qmp()
            .execute("blockdev-del", json!({"node-name": node}))?;
    }
    vmm.qmp().execute("object-del", json!({"id": "r0"}))?;
    finish(vmm)
}

fn image(directory: &Path, node: &str) -> Result<Value> {
    let path = directory.join(node);
    std::fs::File::create(&path)?.set_len(64 * MIB)?;
    Ok(json!({"driver": "file", "node-name": node, "filename": path}))
}

fn devices() -> Vec<Value> {
    vec![
        json!({"driver": "x3130-upstream", "id": "sw", "bus": "rp1"}),
        downstream("dp0", "sw"),
        downstream("dp1", "sw"),
        downstream("dp2", "sw"),
        disk("d0", "dp0", "n0"),
        json!({"driver": "virtio-scsi-pci", "id": "hba", "bus": "dp1"}),
        json!({"driver": "scsi-hd", "id": "lun", "bus": "hba.0", "drive": "n1"}),
        json!({"driver": "pci-bridge", "id": "br", "bus": "dp2"}),
        disk("d1", "br", "n2"),
        json!({"driver": "virtio-rng-pci", "id": "rng", "bus": "br", "rng": "r0"}),
    ]
}

fn put_together(vmm: &mut Vmm) -> Result<()> {
    for mut device in devices() {
        if device["id"] == "sw" {
            device["x-ebbtide-announce"] = json!(false);
        }
        add(vmm, &device)?;
    }
    announce(vmm, "sw")
}

fn one_cycle(vmm: &mut Vmm, cycle: u32) -> Result<()> {
    let disks = [
        (disk_path(vmm, "d0")?, "n0"),
        (disk_path(vmm, "d1")?, "n2"),
        ("/dev/sda".to_owned(), "n1"),
    ];
    wait_for(vmm, "/dev/sda", true)?;
    wait_for(vmm, RNG, true)?;
    for (disk, _) in &disks {
        write_disk(vmm, disk)?;
    }
    read_rng(vmm)?;
    let noted = format!("removal {cycle}");
    note(vmm, &noted)?;
    ask(vmm, "sw")?;
    let gone = deleted_with(vmm, "sw")?;
    gone_once(&gone, &ALL, &ORDER)?;
    wait_for(vmm, "/sys/block/vd* /sys/block/sd*", false)?;
    wait_for(vmm, RNG, false)?;
    only_slot_heard(vmm, &noted, SLOT)?;
    for (disk, node) in &disks {
        disk_is_gone(vmm, disk, node)?;
    }
    has_ended(vmm)?;
    let removals = vmm.qmp().execute("x-ebbtide-query-removals", Value::Null)?;
    ensure!(removals == json!([]), "{removals}");
    clean_kernel_log(vmm)
}
