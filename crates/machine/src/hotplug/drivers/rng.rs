// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! virtio-rng.

use std::sync::Arc;
use std::time::Duration;

use ebbtide_qmp::{Properties, QmpError};
use ebbtide_virtio::rng::{Builtin, RngBackend, RngSpec, VirtioRng};

use super::{COMMON_THREAD, Driver, Made, Make, Serving, on_pci, serving};
use crate::hotplug::{Devices, Object};

pub(super) const DRIVER: Driver = Driver {
    name: "virtio-rng-pci",
    aliases: &["virtio-rng", "virtio-rng-pci-non-transitional"],
    hotpluggable: true,
    properties: &[
        ("rng", "link<rng-backend>"),
        ("max-bytes", "uint64"),
        ("period", "uint32"),
        ("iothread", "link<iothread>"),
    ],
    make: Make::Pci(make),
};

fn make(devices: &Devices, name: &str, properties: &mut Properties) -> Result<Made, QmpError> {
    let mut spec = RngSpec::new(name);
    if let Some(bytes) = properties.take_size("max-bytes")? {
        spec.max_bytes = bytes;
    }
    if let Some(milliseconds) = properties.take_uint::<u32>("period")? {
        spec.period = Duration::from_millis(milliseconds.into());
    }
    let source = properties.take_string("rng")?;
    let Serving {
        first, mut uses, ..
    } = serving(devices, DRIVER.name, name, COMMON_THREAD, properties)?;
    let backend = match source {
        // As in QEMU: one of its own.
        None => RngBackend::new(format!("{name}-builtin"), Builtin),
        Some(id) => {
            let object = devices
                .objects()
                .share(&id, name)
                .map_err(|_| QmpError::no_such_backend(DRIVER.name, "rng", &id))?;
            let Object::Rng(backend) = &**object.value() else {
                return Err(QmpError::property_value(DRIVER.name, "rng", &id));
            };
            let backend = Arc::clone(backend);
            uses.push(Box::new(object));
            backend
        }
    };
    let device = VirtioRng::new(spec, &backend, first.clone())
        .map_err(|e| QmpError::generic(e.to_string()))?;
    Ok(Made {
        uses,
        ..on_pci(devices, name, device, &first)?
    })
}
