// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `pci-testdev`.

use ebbtide_devices::testdev::TestDevice;
use ebbtide_qmp::{Properties, QmpError};

use super::{Driver, Made, Make};
use crate::hotplug::Devices;

pub(super) const DRIVER: Driver = Driver {
    name: "pci-testdev",
    aliases: &[],
    hotpluggable: true,
    properties: &[("membar", "size")],
    make: Make::Pci(make),
};

fn make(devices: &Devices, name: &str, properties: &mut Properties) -> Result<Made, QmpError> {
    // 0: no such BAR.
    let empty_bar_bytes = properties.take_size("membar")?.filter(|bytes| *bytes > 0);
    let function = TestDevice::new(name, devices.system().memory(), empty_bar_bytes)
        .map_err(|e| QmpError::generic(e.to_string()))?;
    Ok(Made::new(function))
}
