// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What devices there are and where: disks, PCI buses, the whole tree.

use std::fmt::Write;

use ebbtide_bus::pci::{BarInfo, BarKind, Bridge, Bus, Config, Devfn};
use ebbtide_device::{Node, NodeId};
use ebbtide_qmp::QmpError;
use ebbtide_qmp::schema::Empty;
use ebbtide_qmp::types::block::BlockInfo;
use ebbtide_qmp::types::device::{CpuInfoFast, SysEmuTarget};
use ebbtide_qmp::types::pci::{
    PciBridgeInfo, PciBusInfo, PciDeviceClass, PciDeviceId, PciDeviceInfo, PciInfo, PciMemoryRange,
    PciMemoryRegion,
};
use ebbtide_qmp::{CommandTable, commands};

use super::qom;
use crate::hotplug::{Devices, Face, Info, Site};
use crate::machine::Machine;

/// Registers of a PCI function's header (PCI 3.0, 6.1; PCI-to-PCI bridge 1.2, 3.2).
mod register {
    pub(super) const VENDOR: u16 = 0x00;
    pub(super) const DEVICE: u16 = 0x02;
    pub(super) const CLASS: u16 = 0x0a;
    pub(super) const SUBSYSTEM_VENDOR: u16 = 0x2c;
    pub(super) const SUBSYSTEM: u16 = 0x2e;
    pub(super) const INTERRUPT_LINE: u16 = 0x3c;
    pub(super) const INTERRUPT_PIN: u16 = 0x3d;
    pub(super) const MEMORY_BASE: u16 = 0x20;
    pub(super) const MEMORY_LIMIT: u16 = 0x22;
    pub(super) const PREFETCHABLE_BASE: u16 = 0x24;
    pub(super) const PREFETCHABLE_LIMIT: u16 = 0x26;
    pub(super) const PREFETCHABLE_BASE_UPPER: u16 = 0x28;
    pub(super) const PREFETCHABLE_LIMIT_UPPER: u16 = 0x2c;
}

/// What people call classes of devices (PCI Code and ID Assignment, 1).
const CLASSES: [(u32, &str); 11] = [
    (0x0100, "SCSI controller"),
    (0x0180, "Storage controller"),
    (0x0200, "Ethernet controller"),
    (0x0280, "Network controller"),
    (0x0500, "RAM controller"),
    (0x0600, "Host bridge"),
    (0x0604, "PCI bridge"),
    (0x0700, "Serial port"),
    (0x0780, "Communication controller"),
    (0x0880, "System peripheral"),
    (0x00ff, "Unclassified device"),
];

/// Adds the commands to `table`.
pub(super) fn add(table: CommandTable<Machine>) -> CommandTable<Machine> {
    table
        .on(commands::QUERY_BLOCK, async |m, _, Empty {}| Ok(disks(&m)))
        .on(commands::QUERY_PCI, async |m, _, Empty {}| Ok(pci(&m)))
        .on(commands::QUERY_CPUS_FAST, async |m, _, Empty {}| {
            Ok(cpus(&m))
        })
}

/// What `query-cpus-fast` answers.
pub(super) fn cpus(machine: &Machine) -> Vec<CpuInfoFast> {
    let cpu = |(index, thread): (u32, &i32)| CpuInfoFast {
        cpu_index: index.into(),
        qom_path: format!("{}/device[{index}]", qom::UNATTACHED),
        thread_id: (*thread).into(),
        props: None,
        target: SysEmuTarget::X86_64,
    };
    (0..).zip(machine.vcpu_threads()).map(cpu).collect()
}

/// What `query-block` answers.
pub(super) fn disks(machine: &Machine) -> Vec<BlockInfo> {
    let tree = machine.devices.tree().borrow();
    tree.iter()
        .filter_map(|(_, entry)| {
            let Face::Disk { node } = &entry.info.face else {
                return None;
            };
            let node = machine.devices.blocks().get(node)?;
            let name = entry.identity.name();
            Some(BlockInfo::fixed(name, node.info().clone()))
        })
        .collect()
}

/// What `query-pci` answers: the root bus, with all others behind its bridges.
pub(super) fn pci(machine: &Machine) -> Vec<PciInfo> {
    let devices = functions(&machine.devices, machine.devices.bridge().bus(), 0);
    vec![PciInfo { bus: 0, devices }]
}

/// Where the guest has a device with this id: the number of the bus and the place on it.
///
/// # Errors
/// There is none on PCI, or the guest has not numbered its bus.
pub(super) fn place_of(machine: &Machine, id: &str) -> Result<(u8, Devfn), QmpError> {
    fn search(devices: &[PciDeviceInfo], id: &str) -> Option<(u8, Devfn)> {
        devices.iter().find_map(|device| {
            if device.qdev_id == id {
                let (slot, function) = (device.slot.try_into(), device.function.try_into());
                let at = Devfn::new(slot.ok()?, function.ok()?)?;
                return Some((device.bus.try_into().ok()?, at));
            }
            search(device.pci_bridge.as_ref()?.devices.as_ref()?, id)
        })
    }
    let known = machine.devices.tree().borrow().by_id(id).is_some();
    if !known {
        return Err(QmpError::device_not_found(id));
    }
    let mut buses = pci(machine).into_iter();
    buses
        .find_map(|bus| search(&bus.devices, id))
        .ok_or_else(|| {
            QmpError::generic(format!(
                "Device '{id}' is not on a PCI bus that the guest has a number for"
            ))
        })
}

fn functions(devices: &Devices, bus: &Bus, number: u8) -> Vec<PciDeviceInfo> {
    let functions = bus.shown();
    functions
        .iter()
        .map(|(at, function)| {
            let config = function.config();
            PciDeviceInfo {
                qdev_id: id_at(devices, bus, *at),
                pci_bridge: config
                    .bridge()
                    .map(|bridge| behind(devices, config, bridge, number)),
                ..plain_function(config, *at, number)
            }
        })
        .collect()
}

/// The id of the device at a place of a bus; empty if it has none.
fn id_at(devices: &Devices, bus: &Bus, at: Devfn) -> String {
    let tree = devices.tree().borrow();
    let here = |info: &Info| match &info.site {
        Site::Pci {
            bus: its,
            at: place,
            ..
        } => std::ptr::eq(&**its, bus) && *place == at,
        Site::Dimm(_) | Site::Below => false,
    };
    let mut nodes = tree.iter().map(|(_, node)| node);
    nodes
        .find(|node| here(&node.info))
        .and_then(|node| node.identity.id.clone())
        .unwrap_or_default()
}

fn plain_function(config: &Config, at: Devfn, number: u8) -> PciDeviceInfo {
    let word = |register| i64::from(config.read(register, 2));
    let byte = |register| i64::from(config.read(register, 1));
    let class = config.read(register::CLASS, 2);
    let name = CLASSES.iter().find(|(code, _)| *code == class);
    let (pin, bridge) = (byte(register::INTERRUPT_PIN), config.bridge().is_some());
    PciDeviceInfo {
        bus: number.into(),
        slot: at.slot().into(),
        function: at.function().into(),
        class_info: PciDeviceClass {
            desc: name.map(|(_, name)| (*name).to_owned()),
            class: class.into(),
        },
        id: PciDeviceId {
            device: word(register::DEVICE),
            vendor: word(register::VENDOR),
            // A bridge has something else there.
            subsystem: (!bridge).then(|| word(register::SUBSYSTEM)),
            subsystem_vendor: (!bridge).then(|| word(register::SUBSYSTEM_VENDOR)),
        },
        irq: (pin != 0).then(|| byte(register::INTERRUPT_LINE)),
        irq_pin: pin,
        qdev_id: String::new(),
        pci_bridge: None,
        regions: config.bars().iter().map(region).collect(),
    }
}

fn region(bar: &BarInfo) -> PciMemoryRegion {
    let (kind, memory) = match bar.spec.kind {
        BarKind::Io => ("io", None),
        BarKind::Mem32 => ("memory", Some((false, false))),
        BarKind::Mem64 { prefetchable } => ("memory", Some((true, prefetchable))),
    };
    PciMemoryRegion {
        bar: bar.index.into(),
        kind: kind.to_owned(),
        address: if bar.mapped { signed(bar.address) } else { -1 },
        size: signed(bar.spec.size_bytes),
        prefetch: memory.map(|(_, prefetchable)| prefetchable),
        mem_type_64: memory.map(|(wide, _)| wide),
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn behind(devices: &Devices, config: &Config, bridge: &Bridge, number: u8) -> PciBridgeInfo {
    let secondary = bridge.secondary();
    let bus = PciBusInfo {
        number: number.into(),
        secondary: secondary.into(),
        subordinate: bridge.subordinate().into(),
        // No bridge has a window of ports: what both registers read as zero says.
        io_range: PciMemoryRange { base: 0, limit: -1 },
        memory_range: window(config, register::MEMORY_BASE, register::MEMORY_LIMIT, None),
        prefetchable_range: window(
            config,
            register::PREFETCHABLE_BASE,
            register::PREFETCHABLE_LIMIT,
            Some((
                register::PREFETCHABLE_BASE_UPPER,
                register::PREFETCHABLE_LIMIT_UPPER,
            )),
        ),
    };
    PciBridgeInfo {
        bus,
        devices: (secondary != 0).then(|| functions(devices, bridge.bus(), secondary)),
    }
}

/// A window, as base and limit registers of 1 MiB units say it.
fn window(config: &Config, base: u16, limit: u16, upper: Option<(u16, u16)>) -> PciMemoryRange {
    const ADDRESS_BITS: u32 = 0xfff0;
    const BELOW_UNIT: u64 = 0xf_ffff;
    let low = |register| u64::from(config.read(register, 2) & ADDRESS_BITS) << 16;
    let high = |register| u64::from(config.read(register, 4)) << 32;
    let (base_upper, limit_upper) = upper.map_or((0, 0), |(base, limit)| (high(base), high(limit)));
    PciMemoryRange {
        base: signed(base_upper | low(base)),
        limit: signed(limit_upper | low(limit) | BELOW_UNIT),
    }
}

/// What `info qtree` answers.
pub(super) fn qtree(machine: &Machine) -> String {
    let mut text = String::new();
    let root = machine.devices.bridge().bus();
    bus_below(&mut text, &machine.devices, None, root.name(), "PCIE", 0);
    text
}

/// A bus and the devices on it: those below `parent`.
fn bus_below(
    text: &mut String,
    devices: &Devices,
    parent: Option<NodeId>,
    name: &str,
    kind: &str,
    depth: usize,
) {
    let indent = "  ".repeat(depth);
    // Writing to a text does not fail, here and below.
    let _ = write!(text, "{indent}bus: {name}\r\n{indent}  type {kind}\r\n");
    let tree = devices.tree().borrow();
    for (id, node) in tree.iter().filter(|(_, node)| node.parent() == parent) {
        device(text, devices, node, depth + 1);
        if let Some(port) = node.info.site.port() {
            bus_below(
                text,
                devices,
                Some(id),
                port.bus().name(),
                "PCIE",
                depth + 2,
            );
        }
        if let Some((bus, kind)) = node.info.face.bus(node.identity.id.as_deref()) {
            bus_below(text, devices, Some(id), &bus, kind, depth + 2);
        }
    }
}

fn device(text: &mut String, devices: &Devices, node: &Node<Info>, depth: usize) {
    let indent = "  ".repeat(depth);
    let id = node.identity.id.as_deref().unwrap_or_default();
    let _ = write!(text, "{indent}dev: {}, id \"{id}\"\r\n", node.info.driver);
    if let Site::Pci { at, .. } = &node.info.site {
        let (slot, function) = (at.slot(), at.function());
        let _ = write!(text, "{indent}  addr = {slot:02x}.{function:x}\r\n");
        if let Some(number) = devices.instance(node) {
            let _ = write!(text, "{indent}  acpi-index = {number}\r\n");
        }
    }
    if let Face::Disk { node } = &node.info.face {
        let _ = write!(text, "{indent}  drive = \"{node}\"\r\n");
    }
    if let Face::Net { netdev, .. } = &node.info.face {
        let _ = write!(text, "{indent}  netdev = \"{netdev}\"\r\n");
    }
}
