// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The console device, and the ports on its bus: devices of their own, below it in the tree.

use std::sync::{Arc, Weak};

use ebbtide_device::{Draining, Model, NodeId, Phase};
use ebbtide_gate::Gate;
use ebbtide_qmp::{Properties, QmpError};
use ebbtide_virtio::console::{ConsoleSpec, PORTS_MAX, PortKind, PortSpec, VirtioConsole};

use super::{Below, COMMON_THREAD, Driver, Face, Made, Make, Serving, on_pci, serving};
use crate::hotplug::Devices;

pub(super) const DEVICE: Driver = Driver {
    name: "virtio-serial-pci",
    aliases: &["virtio-serial", "virtio-serial-pci-non-transitional"],
    hotpluggable: true,
    properties: &[("max_ports", "uint32"), ("iothread", "link<iothread>")],
    make: Make::Pci(device),
};

const PORT_PROPERTIES: &[(&str, &str)] = &[("chardev", "str"), ("nr", "uint32"), ("name", "str")];

pub(super) const CONSOLE: Driver = Driver {
    name: "virtconsole",
    aliases: &[],
    hotpluggable: true,
    properties: PORT_PROPERTIES,
    make: Make::Below(|devices, name, bus, properties| {
        let driver = CONSOLE.name;
        port(devices, driver, PortKind::Console, name, bus, properties)
    }),
};

pub(super) const SERIAL_PORT: Driver = Driver {
    name: "virtserialport",
    aliases: &[],
    hotpluggable: true,
    properties: PORT_PROPERTIES,
    make: Make::Below(|devices, name, bus, properties| {
        let driver = SERIAL_PORT.name;
        port(devices, driver, PortKind::Serial, name, bus, properties)
    }),
};

fn device(devices: &Devices, name: &str, properties: &mut Properties) -> Result<Made, QmpError> {
    let spec = ConsoleSpec {
        max_ports: properties
            .take_uint::<u32>("max_ports")?
            .unwrap_or(PORTS_MAX),
        events: Some(devices.news().console.clone()),
        ..ConsoleSpec::new(name)
    };
    let Serving { first, uses, .. } =
        serving(devices, DEVICE.name, name, COMMON_THREAD, properties)?;
    let device =
        VirtioConsole::new(spec, first.clone()).map_err(|e| QmpError::generic(e.to_string()))?;
    Ok(Made {
        face: Face::Console(Arc::downgrade(&device)),
        uses,
        ..on_pci(devices, name, device, &first)?
    })
}

fn port(
    devices: &Devices,
    driver: &str,
    kind: PortKind,
    name: &str,
    bus: Option<&str>,
    mut properties: Properties,
) -> Result<Below, QmpError> {
    let (parent, device) = find_device(devices, driver, bus)?;
    let spec = PortSpec {
        id: name.to_owned(),
        kind,
        number: properties.take_uint::<u32>("nr")?,
        name: properties.take_string("name")?,
    };
    let chardev = properties.take_string("chardev")?;
    properties.finish_device(driver)?;
    let chardev = chardev.ok_or_else(|| {
        QmpError::generic(format!("Device '{driver}' needs the property 'chardev'"))
    })?;
    let chardev = devices.take_chardev(driver, &chardev, name)?;
    let number = device
        .add_port(spec, chardev.value().wire())
        .map_err(|e| QmpError::generic(e.to_string()))?;
    let model = Port {
        device: Arc::downgrade(&device),
        number,
        gate: Gate::new(name),
    };
    Ok(Below {
        parent,
        model: Box::new(model),
        face: Face::Plain,
        uses: vec![Box::new(chardev)],
    })
}

/// The device with this bus; the first without a name.
fn find_device(
    devices: &Devices,
    driver: &str,
    bus: Option<&str>,
) -> Result<(NodeId, Arc<VirtioConsole>), QmpError> {
    let tree = devices.tree().borrow();
    for (id, node) in tree.iter() {
        let Face::Console(device) = &node.info.face else {
            continue;
        };
        let own = bus_name(node.identity.id.as_deref());
        if bus.is_some_and(|bus| bus != own) || node.phase() >= Phase::Draining {
            continue;
        }
        if let Some(device) = device.upgrade() {
            return Ok((id, device));
        }
    }
    Err(match bus {
        None => QmpError::no_bus("virtio-serial-bus", driver),
        Some(bus) if bus == &**devices.bridge().bus().name() => QmpError::bad_bus(driver, "PCI"),
        Some(bus) => QmpError::bus_not_found(bus),
    })
}

/// What the bus of a device is called.
pub(super) fn bus_name(device: Option<&str>) -> String {
    format!("{}.0", device.unwrap_or("virtio-serial-bus"))
}

/// A port as the lifecycle of devices sees it.
struct Port {
    /// Kept by its own model.
    device: Weak<VirtioConsole>,
    number: u32,
    /// Nothing enters it: the queues of a port belong to the device, whose gates are for that.
    gate: Arc<Gate>,
}

impl Model for Port {
    fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// When the port is taken, no byte goes to its wire or comes from it any more, and the driver is told.
    fn drain(&mut self) -> Draining {
        if let Some(device) = self.device.upgrade()
            && let Err(e) = device.remove_port(self.number)
        {
            tracing::error!("{e}");
        }
        Box::pin(self.gate.drained())
    }
}
