// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The SCSI adapter, and the disks on its bus: devices of their own, below it in the tree.

use std::sync::Arc;

use ebbtide_block::Disk;
use ebbtide_device::{Draining, Model, NodeId, Phase};
use ebbtide_gate::Gate;
use ebbtide_qmp::{Properties, QmpError};
use ebbtide_virtio::scsi::{Identity, ScsiSpec, VirtioScsi};

use super::threads::{MAPPING, Serving, serving_queues};
use super::{Below, Driver, Face, Made, Make, blk, on_pci, queue_count, queue_size};
use crate::hotplug::Devices;

pub(super) const ADAPTER: Driver = Driver {
    name: "virtio-scsi-pci",
    aliases: &["virtio-scsi", "virtio-scsi-pci-non-transitional"],
    hotpluggable: true,
    properties: &[
        ("num_queues", "uint32"),
        ("virtqueue_size", "uint32"),
        ("max_sectors", "uint32"),
        ("cmd_per_lun", "uint32"),
        ("hotplug", "bool"),
        ("param_change", "bool"),
        ("iothread", "link<iothread>"),
        (MAPPING, "IOThreadVirtQueueMappingList"),
    ],
    make: Make::Pci(adapter),
};

pub(super) const DISK: Driver = Driver {
    name: "scsi-hd",
    aliases: &[],
    hotpluggable: true,
    properties: &[
        ("drive", "str"),
        ("channel", "uint32"),
        ("scsi-id", "uint32"),
        ("lun", "uint32"),
        ("serial", "str"),
        ("vendor", "str"),
        ("product", "str"),
        ("ver", "str"),
        ("device_id", "str"),
        ("wwn", "uint64"),
        ("rotation_rate", "uint16"),
    ],
    make: Make::Below(disk),
};

fn adapter(devices: &Devices, name: &str, properties: &mut Properties) -> Result<Made, QmpError> {
    let queues = queue_count(ADAPTER.name, "num_queues", properties)?;
    // Command, response and data take three descriptors.
    let sizes = (4, 1024);
    let queue_size = queue_size(ADAPTER.name, "virtqueue_size", 256, sizes, properties)?;
    let Serving { first, more, uses } =
        serving_queues(devices, ADAPTER.name, name, blk::THREAD, queues, properties)?;
    let mut spec = ScsiSpec {
        queues,
        queue_size,
        more_iothreads: more,
        ..ScsiSpec::new(name)
    };
    for (property, value) in [
        ("max_sectors", &mut spec.max_sectors),
        ("cmd_per_lun", &mut spec.cmd_per_lun),
    ] {
        match properties.take_uint::<u32>(property)? {
            Some(0) => return Err(QmpError::property_value(ADAPTER.name, property, "0")),
            Some(given) => *value = given,
            None => {}
        }
    }
    if let Some(hotplug) = properties.take_bool("hotplug")? {
        spec.hotplug = hotplug;
    }
    if let Some(change) = properties.take_bool("param_change")? {
        spec.param_change = change;
    }
    let device = VirtioScsi::new(spec, first.clone());
    Ok(Made {
        face: Face::Scsi(Arc::downgrade(&device)),
        uses,
        ..on_pci(devices, name, device, &first)?
    })
}

fn disk(
    devices: &Devices,
    name: &str,
    bus: Option<&str>,
    mut properties: Properties,
) -> Result<Below, QmpError> {
    let (parent, adapter) = find_adapter(devices, bus)?;
    let drive = properties
        .take_string("drive")?
        .ok_or_else(|| QmpError::generic("drive property not set"))?;
    let (target, lun) = address(&adapter, &mut properties)?;
    let identity = identity(&mut properties)?;
    properties.finish_device(DISK.name)?;
    let node = devices.blocks().take(&drive, name)?;
    let disk = Arc::clone(node.value().disk());
    adapter
        .add_lun(target, lun, Arc::clone(&disk), identity)
        .map_err(|e| QmpError::generic(e.to_string()))?;
    let gate = adapter
        .lun_gate(target, lun)
        .map_err(|e| QmpError::generic(e.to_string()))?;
    let model = Unit {
        adapter,
        target,
        lun,
        gate,
        disk,
    };
    Ok(Below {
        parent,
        model: Box::new(model),
        face: Face::Disk { node: drive },
        uses: vec![Box::new(node)],
    })
}

/// The adapter with this bus; the first without a name.
fn find_adapter(
    devices: &Devices,
    bus: Option<&str>,
) -> Result<(NodeId, Arc<VirtioScsi>), QmpError> {
    let tree = devices.tree().borrow();
    for (id, node) in tree.iter() {
        let Face::Scsi(adapter) = &node.info.face else {
            continue;
        };
        let own = bus_name(node.identity.id.as_deref());
        if bus.is_some_and(|bus| bus != own) {
            continue;
        }
        let adapter = adapter.upgrade();
        match adapter.filter(|_| node.phase() < Phase::Draining) {
            Some(adapter) => return Ok((id, adapter)),
            None if bus.is_some() => {
                return Err(QmpError::generic(format!(
                    "Bus '{own}': its adapter is being removed"
                )));
            }
            None => {}
        }
    }
    match bus {
        None => Err(QmpError::no_bus("SCSI", DISK.name)),
        Some(bus) if bus == &**devices.bridge().bus().name() => {
            Err(QmpError::bad_bus(DISK.name, "PCI"))
        }
        Some(bus) => Err(QmpError::bus_not_found(bus)),
    }
}

/// What the bus of an adapter is called.
pub(super) fn bus_name(adapter: Option<&str>) -> String {
    format!("{}.0", adapter.unwrap_or("scsi"))
}

/// Where the disk is to be: the first target without a unit of this number, if none is named.
fn address(adapter: &VirtioScsi, properties: &mut Properties) -> Result<(u8, u16), QmpError> {
    let number = |property: &str, properties: &mut Properties| {
        let value = properties.take_uint::<u32>(property)?;
        Ok::<_, QmpError>(value)
    };
    if let Some(channel @ 1..) = number("channel", properties)? {
        let value = channel.to_string();
        return Err(QmpError::property_value(DISK.name, "channel", &value));
    }
    let lun = number("lun", properties)?.unwrap_or(0);
    let lun = u16::try_from(lun)
        .map_err(|_| QmpError::property_value(DISK.name, "lun", &lun.to_string()))?;
    if let Some(target) = number("scsi-id", properties)? {
        let target = u8::try_from(target)
            .map_err(|_| QmpError::property_value(DISK.name, "scsi-id", &target.to_string()))?;
        return Ok((target, lun));
    }
    let taken = adapter.luns();
    let free = (0..=u8::MAX).find(|target| !taken.contains(&(*target, lun)));
    let free = free.ok_or_else(|| {
        QmpError::generic(format!("no target without a LUN {lun} is left on the bus"))
    })?;
    Ok((free, lun))
}

fn identity(properties: &mut Properties) -> Result<Identity, QmpError> {
    type Set = fn(Identity, &str) -> Result<Identity, ebbtide_virtio::scsi::IdentityError>;
    const TEXTS: [(&str, Set); 5] = [
        ("serial", Identity::serial),
        ("vendor", Identity::vendor),
        ("product", Identity::product),
        ("ver", Identity::revision),
        ("device_id", Identity::device_id),
    ];
    let mut identity = Identity::new();
    for (property, set) in TEXTS {
        if let Some(text) = properties.take_string(property)? {
            identity = set(identity, &text).map_err(|e| QmpError::generic(e.to_string()))?;
        }
    }
    if let Some(wwn) = properties.take_uint::<u64>("wwn")? {
        identity = identity.wwn(wwn);
    }
    if let Some(rate) = properties.take_uint::<u16>("rotation_rate")? {
        identity = identity.rotation_rate(rate);
    }
    Ok(identity)
}

/// A unit as the lifecycle of devices sees it.
struct Unit {
    adapter: Arc<VirtioScsi>,
    target: u8,
    lun: u16,
    /// The unit's own.
    gate: Arc<Gate>,
    disk: Arc<Disk>,
}

impl Model for Unit {
    fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// The driver is told at its end, if it is still there.
    fn drain(&mut self) -> Draining {
        match self.adapter.remove_lun(self.target, self.lun) {
            Ok(removal) => Box::pin(async move {
                // The block node keeps the disk open.
                drop(removal.gone().await);
            }),
            Err(e) => {
                tracing::error!("{e}");
                Box::pin(std::future::ready(()))
            }
        }
    }

    fn force(&mut self) -> bool {
        // What is under way keeps what it needs by itself.
        let _ = self.disk.abandon();
        true
    }
}
