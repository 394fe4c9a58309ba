// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! virtio-blk.

use std::sync::Arc;

use ebbtide_qmp::{Properties, QmpError};
use ebbtide_virtio::VirtioPci;
use ebbtide_virtio::blk::{BlkSpec, VirtioBlk};
use ebbtide_virtio::virtq::MAX_SIZE;

use super::{Driver, Made};
use crate::hotplug::Devices;

/// The thread of all disks that name none.
pub(crate) const THREAD: &str = "io-disks";
/// More queues than that serve nobody: a machine has fewer vCPUs.
const MAX_QUEUES: u16 = 64;
/// Bytes a guest reads of a serial number.
const SERIAL_BYTES: usize = 20;

pub(super) const DRIVER: Driver = Driver {
    name: "virtio-blk-pci",
    aliases: &["virtio-blk", "virtio-blk-pci-non-transitional"],
    hotpluggable: true,
    properties: &[
        ("drive", "str"),
        ("serial", "str"),
        ("num-queues", "uint16"),
        ("queue-size", "uint16"),
    ],
    make,
};

fn make(devices: &Devices, name: &str, properties: &mut Properties) -> Result<Made, QmpError> {
    let drive = properties
        .take_string("drive")?
        .ok_or_else(|| QmpError::generic("drive property not set"))?;
    let serial = properties.take_string("serial")?.unwrap_or_default();
    if serial.len() > SERIAL_BYTES {
        return Err(QmpError::property_value(DRIVER.name, "serial", &serial));
    }
    let queues = properties.take_uint::<u16>("num-queues")?.unwrap_or(1);
    if !(1..=MAX_QUEUES).contains(&queues) {
        let value = queues.to_string();
        return Err(QmpError::property_value(DRIVER.name, "num-queues", &value));
    }
    let queue_size = properties.take_uint::<u16>("queue-size")?.unwrap_or(256);
    if !queue_size.is_power_of_two() || !(4..=MAX_SIZE).contains(&queue_size) {
        let value = queue_size.to_string();
        return Err(QmpError::property_value(DRIVER.name, "queue-size", &value));
    }
    let node = devices.blocks().take(&drive, name)?;
    let remote = devices.thread(THREAD)?;
    let spec = BlkSpec {
        serial,
        queues,
        queue_size,
        ..BlkSpec::new(name)
    };
    let device = VirtioBlk::new(spec, Arc::clone(node.value().disk()), remote.clone());
    let function = VirtioPci::new(name, device as _, devices.system(), devices.msi(), &remote)
        .map_err(|e| QmpError::generic(e.to_string()))?;
    Ok(Made {
        function,
        port: None,
        uses: vec![Box::new(node)],
    })
}
