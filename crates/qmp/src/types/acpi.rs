// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the guest's ACPI says about devices.

use crate::schema::{qapi_enum, qapi_struct};

qapi_enum! {
    /// Kinds of slots with an `_OST` method.
    pub enum AcpiSlotType {
        /// A DIMM.
        Dimm = "DIMM",
        /// A vCPU.
        Cpu = "CPU",
    }
}

qapi_struct! {
    /// What the guest said last about a slot: `_OST`, ACPI 6.5 section 6.3.5.
    #[derive(Eq)]
    pub struct AcpiOstInfo {
        /// The id of what is in the slot, if something with an id is.
        device as "device": Option<String>,
        /// The slot's number, unique in its type.
        slot as "slot": String,
        /// What kind of slot.
        slot_type as "slot-type": AcpiSlotType,
        /// What it is about: an event's number, 3 for a request to eject; 0 when the guest has said nothing.
        source as "source": i64,
        /// What has come of it; 0 is success.
        status as "status": i64,
    }
}

qapi_struct! {
    /// Data of `ACPI_DEVICE_OST`.
    #[derive(Eq)]
    pub struct AcpiDeviceOst {
        /// What the guest said.
        info as "info": AcpiOstInfo,
    }
}

/// What `_OST` says about an ejection, for people (ACPI 6.5 section 6.3.5, ejection request and ejection
/// processing).
///
/// ```
/// assert_eq!(ebbtide_qmp::types::acpi::ejection_status(0x82), "the device is busy");
/// ```
pub fn ejection_status(status: i64) -> &'static str {
    match status {
        0 => "success",
        1 => "failure for no stated reason",
        2 => "the guest does not know this notification",
        0x80 => "the guest does not support ejecting it",
        0x81 => "the device is in use by an application",
        0x82 => "the device is busy",
        0x83 => "what depends on the device is busy or cannot be ejected",
        0x84 => "the guest is still working on it",
        _ => "a reason this program does not know",
    }
}
