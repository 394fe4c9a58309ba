// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device models that `device_add` knows: a line in [`DRIVERS`] for each, and a function that makes one from its
//! properties.

mod blk;
mod ivshmem;
mod ports;
mod serial;
mod testdev;
mod watchdog;

use std::sync::{Arc, Weak};

use ebbtide_bus::pci::Port;
use ebbtide_qmp::{Properties, QmpError};

use super::{AnyUse, Devices, Removable};

/// A model.
pub(crate) struct Driver {
    /// Its name.
    pub(crate) name: &'static str,
    /// Other names of it.
    aliases: &'static [&'static str],
    /// Whether it can come and go; one that can't is only made at the start.
    pub(crate) hotpluggable: bool,
    /// Its own properties: name and type.
    properties: &'static [(&'static str, &'static str)],
    /// Makes one called by the given name; takes its own properties.
    pub(crate) make: fn(&Devices, &str, &mut Properties) -> Result<Made, QmpError>,
}

/// A device that was made and is not on a bus yet.
pub(crate) struct Made {
    /// The function.
    pub(crate) function: Arc<dyn Removable>,
    /// It, where it is a bridge.
    pub(crate) port: Option<Weak<Port>>,
    /// What it stands on.
    pub(crate) uses: Vec<Box<dyn AnyUse>>,
}

/// The properties of every device on PCI.
const PCI_PROPERTIES: &[(&str, &str)] = &[("addr", "str"), ("guest-eject", "str")];

const DRIVERS: &[Driver] = &[
    blk::DRIVER,
    ports::ROOT_PORT,
    ports::IOH3420,
    ports::UPSTREAM,
    ports::DOWNSTREAM,
    ports::PCI_BRIDGE,
    ports::DMI_BRIDGE,
    serial::DRIVER,
    testdev::DRIVER,
    watchdog::DRIVER,
    ivshmem::DRIVER,
];

/// The types of `object-add`.
pub(crate) const OBJECTS: &[&str] = super::MEMORY_BACKENDS;

/// Models that exist elsewhere and not here, each with the reason.
const REFUSED: &[(&str, &str)] = &[
    (
        "virtio-blk-device",
        "there is no virtio-mmio bus: use virtio-blk-pci",
    ),
    (
        "pci-assign",
        "KVM's device assignment is gone from Linux: it was superseded by VFIO",
    ),
    ("xen-pci-passthrough", "it needs a Xen host"),
];

impl Driver {
    /// The properties it takes, those of every device included.
    pub(crate) fn all_properties(
        &self,
    ) -> impl Iterator<Item = &'static (&'static str, &'static str)> {
        PCI_PROPERTIES.iter().chain(self.properties)
    }
}

/// The driver of this name.
///
/// # Errors
/// There is none; for some the reason is said.
pub(crate) fn find(name: &str) -> Result<&'static Driver, QmpError> {
    let named = |driver: &&Driver| driver.name == name || driver.aliases.contains(&name);
    if let Some(driver) = DRIVERS.iter().find(named) {
        return Ok(driver);
    }
    if name.starts_with("ivshmem")
        && let Err(refused) = ebbtide_devices::ivshmem::check_driver(name)
    {
        return Err(QmpError::generic(refused.to_string()));
    }
    match REFUSED.iter().find(|(refused, _)| *refused == name) {
        Some((_, reason)) => Err(QmpError::generic(format!(
            "'{name}' is not a valid device model name: {reason}"
        ))),
        None => Err(QmpError::invalid_driver(name)),
    }
}

/// All names, without aliases.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    DRIVERS.iter().map(|driver| driver.name)
}

/// Checks the form of an id: a letter, then letters, digits, `-`, `.`, `_`.
///
/// # Errors
/// It has another form.
pub(crate) fn check_id(id: &str) -> Result<(), QmpError> {
    let mut letters = id.chars();
    let first = letters.next().is_some_and(|c| c.is_ascii_alphabetic());
    if first && letters.all(|c| c.is_ascii_alphanumeric() || "-._".contains(c)) {
        return Ok(());
    }
    Err(QmpError::invalid_id("id"))
}
