// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! virtio-blk.

use std::sync::Arc;

use ebbtide_qmp::{Properties, QmpError};
use ebbtide_virtio::blk::{BlkSpec, VirtioBlk};
use ebbtide_virtio::virtq::MAX_SIZE;

use super::threads::{MAPPING, Serving, serving_queues};
use super::{Driver, Face, Made, Make, on_pci, queue_count, queue_size};
use crate::hotplug::Devices;

/// The thread of all disks that name none.
pub(crate) const THREAD: &str = "io-disks";
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
        ("iothread", "link<iothread>"),
        (MAPPING, "IOThreadVirtQueueMappingList"),
    ],
    make: Make::Pci(make),
};

fn make(devices: &Devices, name: &str, properties: &mut Properties) -> Result<Made, QmpError> {
    let drive = properties
        .take_string("drive")?
        .ok_or_else(|| QmpError::generic("drive property not set"))?;
    let serial = properties.take_string("serial")?.unwrap_or_default();
    if serial.len() > SERIAL_BYTES {
        return Err(QmpError::property_value(DRIVER.name, "serial", &serial));
    }
    let queues = queue_count(DRIVER.name, "num-queues", properties)?;
    let queue_size = queue_size(DRIVER.name, "queue-size", 256, (4, MAX_SIZE), properties)?;
    let node = devices.blocks().take(&drive, name)?;
    let Serving {
        first,
        more,
        mut uses,
    } = serving_queues(devices, DRIVER.name, name, THREAD, queues, properties)?;
    let spec = BlkSpec {
        serial,
        queues,
        queue_size,
        more_iothreads: more,
        ..BlkSpec::new(name)
    };
    let device = VirtioBlk::new(spec, Arc::clone(node.value().disk()), first.clone());
    uses.push(Box::new(node));
    Ok(Made {
        face: Face::Disk { node: drive },
        uses,
        ..on_pci(devices, name, device, &first)?
    })
}
