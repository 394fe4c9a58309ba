// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The PCI Express capability (PCIe 5.0, 7.5.3).

use super::{Config, PciError};

const CAPABILITY_EXPRESS: u8 = 0x10;
/// Bytes of the version 2 structure.
const BYTES: usize = 0x3c;

/// Offsets in the structure.
pub(super) const DEVICE_CONTROL: u16 = 0x08;
pub(super) const DEVICE_STATUS: u16 = 0x0a;
pub(super) const LINK_STATUS: u16 = 0x12;
pub(super) const SLOT_CONTROL: u16 = 0x18;
pub(super) const SLOT_STATUS: u16 = 0x1a;

/// Version 2, in the low bits of the capabilities register; the device type is above, then "slot implemented".
const VERSION: u16 = 2;
const SLOT_IMPLEMENTED: u16 = 1 << 8;
/// Device capabilities: role-based error reporting, which is not optional.
const ROLE_BASED_ERRORS: u32 = 1 << 15;
/// Device control: error reporting enables, relaxed ordering, payload and read request sizes.
const DEVICE_CONTROL_WRITABLE: u16 = 0x70ff;
/// Relaxed ordering, read requests of 512 bytes.
const DEVICE_CONTROL_INITIAL: u16 = 0x2010;
/// Error bits of the device status.
const DEVICE_STATUS_ERRORS: u16 = 0x000f;
/// A link of 16 lanes at 16 GT/s (speed 4): nothing here is slowed down by it, and no driver complains.
const LINK_SPEED_AND_WIDTH: u16 = 16 << 4 | 4;
const LINK_SPEEDS: u32 = 0x1e;
/// Link capabilities: the link status says whether the link is up.
const LINK_ACTIVE_REPORTING: u32 = 1 << 20;
/// Link status: the link is up.
pub(super) const LINK_ACTIVE: u16 = 1 << 13;
/// Link control: read completion boundary, common clock, extended synch.
const LINK_CONTROL_WRITABLE: u16 = 0x00c8;
/// Root control: the system error enables and the PME interrupt.
const ROOT_CONTROL_WRITABLE: u16 = 0x000f;
/// Slot capabilities: attention button, power controller, both indicators, hot-plug capable. No surprise removal, no
/// latch, no interlock; commands complete with an event.
const SLOT_HOTPLUG: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6;

/// What a function is in the hierarchy; the values are those of the capabilities register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpressType {
    /// A device.
    Endpoint = 0,
    /// A port of the root complex.
    RootPort = 4,
    /// The port of a switch towards the root.
    Upstream = 5,
    /// A port of a switch away from the root.
    Downstream = 6,
    /// A bridge to conventional PCI.
    ToPci = 7,
    /// A device of the root complex itself: one on bus 0.
    IntegratedEndpoint = 9,
}

/// The slot behind a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SlotCapabilities {
    /// Physical slot number, 13 bits.
    pub(super) number: u16,
    pub(super) hotplug: bool,
}

impl Config {
    /// Adds the PCI Express capability of a device, on a link or on bus 0.
    ///
    /// # Errors
    /// [`PciError::CapabilitySpace`].
    pub fn add_express(&mut self, kind: ExpressType) -> Result<u16, PciError> {
        self.add_express_port(kind, None)
    }

    pub(super) fn add_express_port(
        &mut self,
        kind: ExpressType,
        slot: Option<SlotCapabilities>,
    ) -> Result<u16, PciError> {
        let Structure { values, writable } = Structure::new(kind, slot);
        // The id and the link are not part of the body.
        let body = values.get(2..).unwrap_or_default();
        let writable = writable.get(2..).unwrap_or_default();
        let at = self.add_capability(CAPABILITY_EXPRESS, body, writable)?;
        self.define_write_one_clears(at + DEVICE_STATUS, &DEVICE_STATUS_ERRORS.to_le_bytes());
        self.express = Some(at);
        Ok(at)
    }
}

/// The structure being written.
struct Structure {
    values: [u8; BYTES],
    writable: [u8; BYTES],
}

impl Structure {
    /// Slot control and status are the port's.
    fn new(kind: ExpressType, slot: Option<SlotCapabilities>) -> Self {
        let mut this = Self {
            values: [0; BYTES],
            writable: [0; BYTES],
        };
        let implemented = if slot.is_some() { SLOT_IMPLEMENTED } else { 0 };
        this.value16(0x02, VERSION | (kind as u16) << 4 | implemented);
        this.value32(0x04, ROLE_BASED_ERRORS);
        this.value16(DEVICE_CONTROL, DEVICE_CONTROL_INITIAL);
        this.writable16(DEVICE_CONTROL, DEVICE_CONTROL_WRITABLE);
        if kind != ExpressType::IntegratedEndpoint {
            let reporting = match kind {
                ExpressType::RootPort | ExpressType::Downstream => LINK_ACTIVE_REPORTING,
                _ => 0,
            };
            this.value32(0x0c, u32::from(LINK_SPEED_AND_WIDTH) | reporting);
            this.writable16(0x10, LINK_CONTROL_WRITABLE);
            this.value16(LINK_STATUS, LINK_SPEED_AND_WIDTH);
            this.value32(0x2c, LINK_SPEEDS);
        }
        if kind == ExpressType::RootPort {
            this.writable16(0x1c, ROOT_CONTROL_WRITABLE);
        }
        if let Some(slot) = slot {
            let hotplug = if slot.hotplug { SLOT_HOTPLUG } else { 0 };
            this.value32(0x14, u32::from(slot.number & 0x1fff) << 19 | hotplug);
        }
        this
    }

    fn value16(&mut self, at: u16, value: u16) {
        put(&mut self.values, at, &value.to_le_bytes());
    }

    fn value32(&mut self, at: u16, value: u32) {
        put(&mut self.values, at, &value.to_le_bytes());
    }

    fn writable16(&mut self, at: u16, bits: u16) {
        put(&mut self.writable, at, &bits.to_le_bytes());
    }
}

fn put(structure: &mut [u8; BYTES], at: u16, bytes: &[u8]) {
    for (to, from) in structure.iter_mut().skip(at.into()).zip(bytes) {
        *to = *from;
    }
}
