// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is asked for wrongly, and is refused.

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};

use super::wait_for;
use crate::system::{BOOT, GIB, Ground, MIB, finish};
use crate::vmm::Vmm;

/// What can't be taken out of a running machine, and what it is below.
const FIXED: &[&str] = &[
    "pcie-root-port,id=rp1",
    "x3130-upstream,id=sw,bus=rp1",
    "xio3130-downstream,id=dp0,bus=sw",
];

/// What is asked for wrongly is refused by name, and nothing changes.
pub fn mistakes(ground: &Ground) -> Result<()> {
    let mut machine = ground.machine(1, BOOT + GIB);
    for device in FIXED {
        machine.more.extend(["--device".into(), (*device).into()]);
    }
    let mut vmm = ground.start(&machine)?;
    let images = tempfile::tempdir()?;
    let image = images.path().join("image");
    std::fs::File::create(&image)?.set_len(16 * MIB)?;
    let file = |name: &str| json!({"driver": "file", "node-name": name, "filename": image});
    let node = json!({"driver": "null-co", "node-name": "n0", "size": 64 << 20});
    vmm.qmp().execute("blockdev-add", node.clone())?;
    vmm.qmp().execute("blockdev-add", file("locked"))?;
    let memory = json!({"qom-type": "memory-backend-ram", "id": "m0", "size": 128 * MIB});
    vmm.qmp().execute("object-add", memory)?;
    let before = all_there_is(&mut vmm)?;
    let disk = |more: Value| {
        let mut disk = json!({"driver": "virtio-blk-pci", "id": "d0", "drive": "n0"});
        for (key, value) in more.as_object().into_iter().flatten() {
            disk[key] = value.clone();
        }
        disk
    };
    for (command, arguments, class, part) in [
        (
            "device_add",
            json!({"driver": "nope", "id": "x"}),
            "GenericError",
            "'nope' is not a valid device model name",
        ),
        ("device_add", json!({"id": "x"}), "GenericError", "'driver'"),
        (
            "device_add",
            json!({"driver": "pcie-root-port", "id": "pcie.0"}),
            "GenericError",
            "Bus 'pcie.0' exists already",
        ),
        (
            "device_add",
            disk(json!({"nope": 1})),
            "GenericError",
            "nope",
        ),
        (
            "device_add",
            disk(json!({"bus": "nope"})),
            "GenericError",
            "Bus 'nope' not found",
        ),
        (
            "device_add",
            disk(json!({"addr": "0"})),
            "GenericError",
            "in use",
        ),
        (
            "device_add",
            disk(json!({"addr": "20"})),
            "GenericError",
            "addr",
        ),
        (
            "device_add",
            disk(json!({"addr": "3.1"})),
            "GenericError",
            "function",
        ),
        (
            "device_add",
            disk(json!({"drive": "nope"})),
            "GenericError",
            "nope",
        ),
        (
            "device_add",
            disk(json!({"id": "0x"})),
            "GenericError",
            "id",
        ),
        (
            "device_add",
            disk(json!({"num-queues": 0})),
            "GenericError",
            "num-queues",
        ),
        (
            "device_add",
            disk(json!({"queue-size": 3})),
            "GenericError",
            "queue-size",
        ),
        (
            "device_add",
            disk(json!({"guest-eject": "maybe"})),
            "GenericError",
            "maybe",
        ),
        (
            "device_add",
            disk(json!({"serial": "123456789012345678901"})),
            "GenericError",
            "serial",
        ),
        (
            "device_del",
            json!({"id": "nope"}),
            "DeviceNotFound",
            "nope",
        ),
        ("blockdev-add", node, "GenericError", "n0"),
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "../n\0"}),
            "GenericError",
            "Invalid node-name: '../n\0'",
        ),
        (
            "blockdev-add",
            json!({"driver": "file", "node-name": "n1", "filename": images.path()}),
            "GenericError",
            "': is a directory",
        ),
        (
            "blockdev-add",
            json!({"driver": "file", "node-name": "n1", "filename": images.path().join("none")}),
            "GenericError",
            "none': no such file",
        ),
        ("blockdev-add", file("n1"), "GenericError", "image': locked"),
        (
            "device_add",
            json!({"driver": "virtio-net-pci", "id": "x"}),
            "GenericError",
            "netdev property not set",
        ),
        (
            "device_add",
            json!({"driver": "virtio-net-pci", "id": "x", "netdev": "nope"}),
            "GenericError",
            "netdev' can't find value 'nope'",
        ),
        (
            "device_add",
            json!({"driver": "pc-dimm", "id": "x", "memdev": "m0"}),
            "GenericError",
            "has no DIMM slots",
        ),
        (
            "device_add",
            json!({"driver": "AC97", "id": "x"}),
            "GenericError",
            "no sound hardware",
        ),
        (
            "device_del",
            json!({"id": "vmem0"}),
            "GenericError",
            "Device 'vmem0' does not support hotplugging",
        ),
        (
            "device_del",
            json!({"id": "dp0"}),
            "GenericError",
            "Device 'dp0' does not support hotplugging",
        ),
        (
            "blockdev-add",
            json!({"driver": "file", "node-name": "n1", "filename": "/nope/x"}),
            "GenericError",
            "/nope/x",
        ),
        (
            "blockdev-add",
            json!({"driver": "raw", "node-name": "n1", "file": "nope"}),
            "GenericError",
            "nope",
        ),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "n1"}),
            "GenericError",
            "qcow2",
        ),
        (
            "blockdev-del",
            json!({"node-name": "nope"}),
            "GenericError",
            "nope",
        ),
        (
            "x-ebbtide-device-cancel",
            json!({"id": "nope"}),
            "DeviceNotFound",
            "nope",
        ),
        (
            "device_add",
            json!({"driver": "pci-serial", "id": "x"}),
            "GenericError",
            "char device",
        ),
        (
            "device_add",
            json!({"driver": "pci-serial", "id": "x", "chardev": "nope"}),
            "GenericError",
            "can't find value 'nope'",
        ),
        (
            "device_add",
            json!({"driver": "i6300esb", "id": "x", "action": "inject-nmi"}),
            "GenericError",
            "inject-nmi is not supported",
        ),
        (
            "device_add",
            json!({"driver": "i6300esb", "id": "x", "action": "nope"}),
            "GenericError",
            "nope",
        ),
        (
            "device_add",
            json!({"driver": "pci-testdev", "id": "x", "membar": "12K"}),
            "GenericError",
            "power of two",
        ),
        (
            "device_add",
            json!({"driver": "ivshmem-plain", "id": "x"}),
            "GenericError",
            "memdev",
        ),
        (
            "device_add",
            json!({"driver": "ivshmem-plain", "id": "x", "memdev": "nope"}),
            "GenericError",
            "nope",
        ),
        (
            "device_add",
            json!({"driver": "ivshmem-doorbell", "id": "x"}),
            "GenericError",
            "ivshmem-plain",
        ),
        (
            "chardev-add",
            json!({"id": "c0", "backend": {"type": "pty", "data": {}}}),
            "GenericError",
            "'pty' is not supported",
        ),
        (
            "chardev-remove",
            json!({"id": "nope"}),
            "GenericError",
            "'nope' not found",
        ),
        (
            "watchdog-set-action",
            json!({"action": "inject-nmi"}),
            "GenericError",
            "inject-nmi is not supported",
        ),
    ] {
        let refused = vmm.qmp().execute(command, arguments.clone());
        let error = match refused {
            Ok(answer) => bail!("{command} {arguments} is answered with {answer}"),
            Err(error) => error,
        };
        let error = error.downcast::<crate::qmp::QmpError>()?;
        ensure!(
            error.class == class && error.desc.contains(part),
            "{command} {arguments}: {error}: {class} and {part:?} are missed"
        );
    }
    unchanged(&mut vmm, &before)?;
    vmm.qmp()
        .execute("device_add", disk(json!({"addr": "7"})))?;
    wait_for(&mut vmm, "/dev/vda", true)?;
    let before = all_there_is(&mut vmm)?;
    for (command, arguments, part) in [
        (
            "device_add",
            disk(json!({})),
            "GenericError: Duplicate device ID 'd0'",
        ),
        (
            "device_add",
            disk(json!({"id": "d1"})),
            "GenericError: Node 'n0' is in use by 'd0'",
        ),
        (
            "device_add",
            disk(json!({"id": "d1", "drive": "locked", "addr": "7"})),
            "GenericError: PCI: slot 0x7 of bus 'pcie.0' is in use by 'd0'",
        ),
        (
            "blockdev-del",
            json!({"node-name": "n0"}),
            "GenericError: Node 'n0' is in use by 'd0'",
        ),
        ("x-ebbtide-device-cancel", json!({"id": "d0"}), "d0"),
        ("x-ebbtide-device-force", json!({"id": "d0"}), "d0"),
        (
            "x-ebbtide-wait",
            json!({"id": "d0", "phase": "deleted", "timeout": -1e300}),
            "not -1e300",
        ),
    ] {
        let Err(error) = vmm.qmp().execute(command, arguments.clone()) else {
            bail!("{command} {arguments} is not refused");
        };
        ensure!(format!("{error:#}").contains(part), "{command}: {error:#}");
    }
    unchanged(&mut vmm, &before)?;
    finish(vmm)
}

/// What the monitor lists of a machine.
fn all_there_is(vmm: &mut Vmm) -> Result<Vec<Value>> {
    let mut all = Vec::new();
    for line in ["info mtree", "info qtree", "info ramblock"] {
        let line = json!({"command-line": line});
        all.push(vmm.qmp().execute("human-monitor-command", line)?);
    }
    for query in [
        "query-named-block-nodes",
        "query-memdev",
        "query-chardev",
        "query-iothreads",
        "x-ebbtide-query-removals",
    ] {
        all.push(vmm.qmp().execute(query, Value::Null)?);
    }
    Ok(all)
}

fn unchanged(vmm: &mut Vmm, before: &[Value]) -> Result<()> {
    for (before, after) in before.iter().zip(all_there_is(vmm)?) {
        ensure!(*before == after, "what was\n{before}\nis\n{after}");
    }
    Ok(())
}
