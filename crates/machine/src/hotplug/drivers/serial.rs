// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A serial port on PCI.

use ebbtide_devices::serial_pci::SerialPci;
use ebbtide_qmp::{Properties, QmpError};

use super::{Driver, Made, Make};
use crate::hotplug::Devices;

pub(super) const DRIVER: Driver = Driver {
    name: "pci-serial",
    aliases: &[],
    hotpluggable: true,
    properties: &[("chardev", "str")],
    make: Make::Pci(make),
};

fn make(devices: &Devices, name: &str, properties: &mut Properties) -> Result<Made, QmpError> {
    let chardev = properties
        .take_string("chardev")?
        .ok_or_else(|| QmpError::generic("Can't create serial device, empty char device"))?;
    let chardev = devices.take_chardev(DRIVER.name, &chardev, name)?;
    let function = SerialPci::new(name, chardev.value().wire())
        .map_err(|e| QmpError::generic(e.to_string()))?;
    Ok(Made {
        uses: vec![Box::new(chardev)],
        ..Made::new(function)
    })
}
