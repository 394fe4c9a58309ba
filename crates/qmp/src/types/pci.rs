// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The PCI buses as the guest has set them up.

use serde::{Deserialize, Serialize};

use crate::schema::{Member, ObjectInfo, Qapi, Type, qapi_struct};

qapi_struct! {
    /// A range of addresses; empty when `limit` is below `base`.
    #[derive(Copy, Eq)]
    pub struct PciMemoryRange {
        /// The first address.
        base as "base": i64,
        /// The last address.
        limit as "limit": i64,
    }
}

qapi_struct! {
    /// A BAR.
    #[derive(Eq)]
    pub struct PciMemoryRegion {
        /// Its index, 6 for the expansion ROM.
        bar as "bar": i64,
        /// `io` or `memory`.
        kind as "type": String,
        /// Where it is, -1 when it is not mapped.
        address as "address": i64,
        /// Bytes.
        size as "size": i64,
        /// Of memory: prefetchable.
        prefetch as "prefetch": Option<bool>,
        /// Of memory: a BAR of 64 bits.
        mem_type_64 as "mem_type_64": Option<bool>,
    }
}

qapi_struct! {
    /// The buses and windows of a bridge.
    #[derive(Copy, Eq)]
    pub struct PciBusInfo {
        /// The bus it is on.
        number as "number": i64,
        /// The bus behind it.
        secondary as "secondary": i64,
        /// The last bus behind it.
        subordinate as "subordinate": i64,
        /// Its window of I/O ports.
        io_range as "io_range": PciMemoryRange,
        /// Its window of memory.
        memory_range as "memory_range": PciMemoryRange,
        /// Its window of prefetchable memory.
        prefetchable_range as "prefetchable_range": PciMemoryRange,
    }
}

/// A bridge and what is behind it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciBridgeInfo {
    /// Buses and windows.
    pub bus: PciBusInfo,
    /// What is behind it, when the guest has numbered its bus.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub devices: Option<Vec<PciDeviceInfo>>,
}

qapi_struct! {
    /// A class code.
    #[derive(Eq)]
    pub struct PciDeviceClass {
        /// For people.
        desc as "desc": Option<String>,
        /// Base class and sub-class.
        class as "class": i64,
    }
}

qapi_struct! {
    /// Whose device it is.
    #[derive(Copy, Eq)]
    pub struct PciDeviceId {
        /// Device id.
        device as "device": i64,
        /// Vendor id.
        vendor as "vendor": i64,
        /// Subsystem id.
        subsystem as "subsystem": Option<i64>,
        /// Subsystem vendor id.
        subsystem_vendor as "subsystem-vendor": Option<i64>,
    }
}

/// One function. A bridge has functions in it, so that the type is a part of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciDeviceInfo {
    /// Its bus.
    pub bus: i64,
    /// Its slot.
    pub slot: i64,
    /// Its function.
    pub function: i64,
    /// What it is.
    pub class_info: PciDeviceClass,
    /// Whose it is.
    pub id: PciDeviceId,
    /// The line the guest has noted for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub irq: Option<i64>,
    /// Its interrupt pin, 0 for none.
    pub irq_pin: i64,
    /// The device's id, or an empty text.
    pub qdev_id: String,
    /// For a bridge.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pci_bridge: Option<PciBridgeInfo>,
    /// Its BARs.
    pub regions: Vec<PciMemoryRegion>,
}

const fn member(name: &'static str, ty: Type, optional: bool) -> Member {
    Member { name, ty, optional }
}

// Bridges have devices and devices may be bridges: statics have addresses, by which they can refer to each other.
static PCI_DEVICE: Type = Type::Object(&PCI_DEVICE_INFO);

static PCI_BRIDGE_INFO: ObjectInfo = ObjectInfo {
    name: "PciBridgeInfo",
    members: &[
        member("bus", PciBusInfo::TYPE, false),
        member("devices", Type::Array(&PCI_DEVICE), true),
    ],
    variants: None,
    open: false,
};

static PCI_DEVICE_INFO: ObjectInfo = ObjectInfo {
    name: "PciDeviceInfo",
    members: &[
        member("bus", Type::Int, false),
        member("slot", Type::Int, false),
        member("function", Type::Int, false),
        member("class_info", PciDeviceClass::TYPE, false),
        member("id", PciDeviceId::TYPE, false),
        member("irq", Type::Int, true),
        member("irq_pin", Type::Int, false),
        member("qdev_id", Type::Str, false),
        member("pci_bridge", Type::Object(&PCI_BRIDGE_INFO), true),
        member("regions", <Vec<PciMemoryRegion>>::TYPE, false),
    ],
    variants: None,
    open: false,
};

impl Qapi for PciBridgeInfo {
    const TYPE: Type = Type::Object(&PCI_BRIDGE_INFO);
}

impl Qapi for PciDeviceInfo {
    const TYPE: Type = Type::Object(&PCI_DEVICE_INFO);
}

qapi_struct! {
    /// A bus without a bridge above it: one item of `query-pci`.
    #[derive(Eq)]
    pub struct PciInfo {
        /// Its number.
        bus as "bus": i64,
        /// What is on it.
        devices as "devices": Vec<PciDeviceInfo>,
    }
}
