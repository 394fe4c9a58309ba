// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ports and bridges.

use std::sync::Arc;

use ebbtide_bus::pci::{Port, PortModel, PortSpec, Reservation};
use ebbtide_qmp::{Properties, QmpError};

use super::{Driver, Made, Make};
use crate::hotplug::Devices;

/// Physical slot numbers, 13 bits.
const MAX_SLOT_NUMBER: u16 = 0x1fff;

const WITH_SLOT: &[(&str, &str)] = &[
    ("slot", "uint16"),
    ("hotplug", "bool"),
    ("bus-reserve", "uint32"),
    ("mem-reserve", "size"),
    ("pref64-reserve", "size"),
];
const WITHOUT_SLOT: &[(&str, &str)] = &[
    ("bus-reserve", "uint32"),
    ("mem-reserve", "size"),
    ("pref64-reserve", "size"),
];

const fn driver(
    name: &'static str,
    properties: &'static [(&'static str, &'static str)],
    make: fn(&Devices, &str, &mut Properties) -> Result<Made, QmpError>,
) -> Driver {
    Driver {
        name,
        aliases: &[],
        hotpluggable: true,
        properties,
        make: Make::Pci(make),
    }
}

pub(super) const ROOT_PORT: Driver = driver("pcie-root-port", WITH_SLOT, |d, n, p| {
    make(d, n, p, PortModel::RootPort)
});
pub(super) const IOH3420: Driver = driver("ioh3420", WITH_SLOT, |d, n, p| {
    make(d, n, p, PortModel::Ioh3420)
});
pub(super) const UPSTREAM: Driver = driver("x3130-upstream", WITHOUT_SLOT, |d, n, p| {
    make(d, n, p, PortModel::X3130Upstream)
});
pub(super) const DOWNSTREAM: Driver = driver("xio3130-downstream", WITH_SLOT, |d, n, p| {
    make(d, n, p, PortModel::Xio3130Downstream)
});
pub(super) const PCI_BRIDGE: Driver = driver("pci-bridge", WITHOUT_SLOT, |d, n, p| {
    make(d, n, p, PortModel::PciBridge)
});
pub(super) const DMI_BRIDGE: Driver = driver("i82801b11-bridge", WITHOUT_SLOT, |d, n, p| {
    make(d, n, p, PortModel::I82801b11)
});

fn make(
    devices: &Devices,
    name: &str,
    properties: &mut Properties,
    model: PortModel,
) -> Result<Made, QmpError> {
    // The bus behind it is named as it is, by which devices and ejects find it.
    if devices.has_bus(name) {
        return Err(QmpError::generic(format!(
            "Bus '{name}' exists already: a {} needs an id of its own for the bus behind it",
            model.name()
        )));
    }
    let hotplug = model.has_slot() && properties.take_bool("hotplug")?.unwrap_or(true);
    let slot_number = match model.has_slot() {
        true => properties.take_uint::<u16>("slot")?,
        false => None,
    };
    let slot_number = match slot_number {
        Some(number) if number > MAX_SLOT_NUMBER => {
            let value = number.to_string();
            return Err(QmpError::property_value(model.name(), "slot", &value));
        }
        Some(number) => number,
        None => devices.free_slot_number(),
    };
    let spec = PortSpec {
        name: name.to_owned(),
        model,
        slot_number,
        hotplug: hotplug.then(|| Arc::clone(devices.ejector()) as _),
        reservation: reservation(properties, model)?,
    };
    let port = Port::new(devices.bridge(), spec, devices.msi())
        .map_err(|e| QmpError::generic(e.to_string()))?;
    Ok(Made {
        port: Some(Arc::downgrade(&port)),
        ..Made::new(port)
    })
}

/// What is to be kept free behind it, where any of it was said.
fn reservation(
    properties: &mut Properties,
    model: PortModel,
) -> Result<Option<Reservation>, QmpError> {
    let buses = properties.take_uint::<u8>("bus-reserve")?;
    let memory = properties.take_size("mem-reserve")?;
    let prefetchable = properties.take_size("pref64-reserve")?;
    if (buses, memory, prefetchable) == (None, None, None) {
        return Ok(None);
    }
    let default = Reservation::default();
    // The bridge's own bus is one more than what its user asks for.
    let own = |buses: u8| {
        buses.checked_add(1).ok_or_else(|| {
            QmpError::property_value(model.name(), "bus-reserve", &buses.to_string())
        })
    };
    Ok(Some(Reservation {
        buses: buses.map_or(Ok(default.buses), own)?,
        memory_bytes: memory.unwrap_or(default.memory_bytes),
        prefetchable_bytes: prefetchable.unwrap_or(default.prefetchable_bytes),
    }))
}
