// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device models that `device_add` knows: a line in [`DRIVERS`] for each, and a function that makes one from its
//! properties.

mod balloon;
mod blk;
mod console;
mod ivshmem;
mod net;
mod ports;
mod refused;
mod rng;
mod scsi;
mod serial;
mod testdev;
mod threads;
mod watchdog;

use std::sync::{Arc, Weak};

use ebbtide_bus::pci::Port;
use ebbtide_device::{Model, NodeId};
use ebbtide_iothread::Remote;
use ebbtide_qmp::{Properties, QmpError};
use ebbtide_virtio::balloon::VirtioBalloon;
use ebbtide_virtio::console::VirtioConsole;
use ebbtide_virtio::net::VirtioNet;
use ebbtide_virtio::scsi::VirtioScsi;
use ebbtide_virtio::{VirtioDevice, VirtioPci};

use super::{AnyUse, Devices, Removable};
use threads::{Serving, serving};

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
    /// Makes one.
    pub(crate) make: Make,
}

/// How a device is made. The text is its name.
pub(crate) enum Make {
    /// A function that goes onto a PCI bus; takes its own properties.
    Pci(fn(&Devices, &str, &mut Properties) -> Result<Made, QmpError>),
    /// Something on the bus of another device, where it is put at once; takes all properties. The second text is the
    /// name of the bus, if one was given.
    Below(fn(&Devices, &str, Option<&str>, Properties) -> Result<Below, QmpError>),
}

/// What commands about one kind of device do with it. The model in the tree keeps it alive.
pub(crate) enum Face {
    /// Nothing.
    Plain,
    /// A disk.
    Disk {
        /// The name of its block node.
        node: String,
    },
    /// A network card.
    Net {
        /// The card.
        card: Weak<VirtioNet>,
        /// Its network backend.
        netdev: String,
    },
    /// The balloon.
    Balloon(Weak<VirtioBalloon>),
    /// A SCSI adapter: its bus is called like it with `.0`.
    Scsi(Weak<VirtioScsi>),
    /// A console device: its bus is called like it with `.0`.
    Console(Weak<VirtioConsole>),
}

/// A device that was made and is not on a bus yet.
pub(crate) struct Made {
    /// The function.
    pub(crate) function: Arc<dyn Removable>,
    /// It, where it is a bridge.
    pub(crate) port: Option<Weak<Port>>,
    /// What commands about its kind do with it.
    pub(crate) face: Face,
    /// What it stands on.
    pub(crate) uses: Vec<Box<dyn AnyUse>>,
}

impl Made {
    /// A function that stands on nothing.
    pub(crate) fn new(function: Arc<dyn Removable>) -> Made {
        Made {
            function,
            port: None,
            face: Face::Plain,
            uses: Vec::new(),
        }
    }
}

/// A device that was put onto the bus of another.
pub(crate) struct Below {
    /// The device it is below.
    pub(crate) parent: NodeId,
    /// Takes it off again.
    pub(crate) model: Box<dyn Model>,
    /// What commands about its kind do with it.
    pub(crate) face: Face,
    /// What it stands on.
    pub(crate) uses: Vec<Box<dyn AnyUse>>,
}

/// The properties of every device on PCI.
const PCI_PROPERTIES: &[(&str, &str)] = &[
    ("addr", "str"),
    ("guest-eject", "str"),
    (super::announcing::PROPERTY, "bool"),
    (super::instance::PROPERTY, "uint32"),
];
/// The thread of all devices that move little and name no thread.
const COMMON_THREAD: &str = "io-devices";

const DRIVERS: &[Driver] = &[
    blk::DRIVER,
    scsi::ADAPTER,
    scsi::DISK,
    net::DRIVER,
    console::DEVICE,
    console::CONSOLE,
    console::SERIAL_PORT,
    rng::DRIVER,
    balloon::DRIVER,
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

impl Driver {
    /// The properties it takes, those of every device included.
    pub(crate) fn all_properties(
        &self,
    ) -> impl Iterator<Item = &'static (&'static str, &'static str)> {
        let of_bus = match self.make {
            Make::Pci(_) => PCI_PROPERTIES,
            Make::Below(_) => &[],
        };
        of_bus.iter().chain(self.properties)
    }
}

impl Face {
    /// The name and the type of the bus that a device with this id has, if it has one of another kind than PCI.
    pub(crate) fn bus(&self, id: Option<&str>) -> Option<(String, &'static str)> {
        match self {
            Face::Scsi(_) => Some((scsi::bus_name(id), "SCSI")),
            Face::Console(_) => Some((console::bus_name(id), "virtio-serial-bus")),
            Face::Plain | Face::Disk { .. } | Face::Net { .. } | Face::Balloon(_) => None,
        }
    }
}

/// Puts a virtio device on a PCI function that resets itself on `remote`.
fn on_pci(
    devices: &Devices,
    name: &str,
    device: Arc<dyn VirtioDevice>,
    remote: &Remote,
) -> Result<Made, QmpError> {
    let function = VirtioPci::new(name, device, devices.system(), devices.msi(), remote)
        .map_err(|e| QmpError::generic(e.to_string()))?;
    Ok(Made::new(function))
}

/// Takes the size of a queue, a power of two from `least` to `most`.
fn queue_size(
    driver: &str,
    property: &str,
    default: u16,
    (least, most): (u16, u16),
    properties: &mut Properties,
) -> Result<u16, QmpError> {
    let size = properties.take_uint::<u16>(property)?.unwrap_or(default);
    if size.is_power_of_two() && (least..=most).contains(&size) {
        return Ok(size);
    }
    Err(QmpError::property_value(
        driver,
        property,
        &size.to_string(),
    ))
}

/// Takes a number of queues.
fn queue_count(driver: &str, property: &str, properties: &mut Properties) -> Result<u16, QmpError> {
    /// More queues than that serve nobody: a machine has fewer vCPUs.
    const MAX_QUEUES: u16 = 64;
    let queues = properties.take_uint::<u16>(property)?.unwrap_or(1);
    if (1..=MAX_QUEUES).contains(&queues) {
        return Ok(queues);
    }
    let value = queues.to_string();
    Err(QmpError::property_value(driver, property, &value))
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
    match refused::reason(name) {
        Some(reason) => Err(QmpError::generic(format!(
            "'{name}' is not a valid device model name: {reason}"
        ))),
        None => Err(QmpError::invalid_driver(name)),
    }
}

/// Whether `--device` and `device_add` know a driver of this name.
///
/// # Errors
/// They don't; for some names the reason is said.
pub fn check_driver(name: &str) -> Result<(), String> {
    if name == super::dimm::DRIVER {
        return Ok(());
    }
    find(name).map(|_| ()).map_err(|e| e.desc)
}

/// The names of all drivers of `--device`, DIMMs included.
pub fn driver_names() -> Vec<&'static str> {
    names().chain([super::dimm::DRIVER]).collect()
}

/// All names, without aliases.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    DRIVERS.iter().map(|driver| driver.name)
}

/// Whether an id has the form of one: a letter, then letters, digits, `-`, `.`, `_`.
pub(crate) fn is_id(id: &str) -> bool {
    let mut letters = id.chars();
    letters.next().is_some_and(|c| c.is_ascii_alphabetic())
        && letters.all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
}

/// Checks the form of an id.
///
/// # Errors
/// It has [another](is_id).
pub(crate) fn check_id(id: &str) -> Result<(), QmpError> {
    if is_id(id) {
        return Ok(());
    }
    Err(QmpError::invalid_id("id"))
}
