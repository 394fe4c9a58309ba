// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What cannot be done with a DIMM.

use std::ops::Range;

use ebbtide_bus::acpi::SlotError;

/// Why a DIMM does not come, or does not go.
#[derive(Debug, thiserror::Error)]
pub enum DimmError {
    /// The addresses DIMMs are placed in, or what they are aligned to, make no sense.
    #[error("dimm area {area:#x?}, in units of {unit_bytes:#x} bytes: {reason}")]
    Area {
        /// The area.
        area: Range<u64>,
        /// Bytes that sizes and addresses are multiples of.
        unit_bytes: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// An id names one thing.
    #[error("there is a memory device {0} already")]
    DuplicateId(String),
    /// A size or an address the guest could not use all of.
    #[error("dimm {id}: {what} {value:#x} is not a multiple of {align:#x}")]
    Misaligned {
        /// The DIMM.
        id: String,
        /// Size or address.
        what: &'static str,
        /// Bytes or a guest-physical address.
        value: u64,
        /// What it must be a multiple of, in bytes.
        align: u64,
    },
    /// Its memory has no bytes.
    #[error("dimm {0}: its memory backend is empty")]
    Empty(String),
    /// Nowhere in the area is that much room.
    #[error(
        "dimm {id}: {size_bytes:#x} bytes do not fit: the largest free piece of the area has {largest_bytes:#x}"
    )]
    TooLarge {
        /// The DIMM.
        id: String,
        /// Its size.
        size_bytes: u64,
        /// The most there is in one piece, in whole units.
        largest_bytes: u64,
    },
    /// The address asked for is not one for DIMMs.
    #[error("dimm {id}: {range:#x?} is not inside the dimm area {area:#x?}")]
    OutsideArea {
        /// The DIMM.
        id: String,
        /// Its addresses.
        range: Range<u64>,
        /// Where DIMMs may be.
        area: Range<u64>,
    },
    /// Another memory device is there.
    #[error("{id} at {range:#x?} overlaps {other} at {there:#x?}")]
    Overlap {
        /// What is to be placed.
        id: String,
        /// Its addresses.
        range: Range<u64>,
        /// The memory device that is there.
        other: String,
        /// Its addresses.
        there: Range<u64>,
    },
    /// All slots have a DIMM.
    #[error("dimm {id}: none of the {slots} slots is free")]
    NoFreeSlot {
        /// The DIMM.
        id: String,
        /// How many slots there are.
        slots: u16,
    },
    /// The slot asked for has one.
    #[error("dimm {id}: slot {slot} has dimm {other}")]
    SlotTaken {
        /// The DIMM.
        id: String,
        /// The slot.
        slot: u16,
        /// What is in it.
        other: String,
    },
    /// The backend is not one for a DIMM.
    #[error("dimm {id}: memory backend {memdev} {reason}")]
    Backend {
        /// The DIMM.
        id: String,
        /// The backend.
        memdev: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The slot does not allow it.
    #[error("dimm {id}: {source}")]
    Slot {
        /// The DIMM.
        id: String,
        /// Why not.
        source: SlotError,
    },
    /// The memory map does not allow it.
    #[error("dimm {id}: {source}")]
    Memory {
        /// The DIMM.
        id: String,
        /// Why not.
        source: ebbtide_memory::Error,
    },
    /// Its memory is still in use.
    #[error("dimm {id} is in use by {holders}")]
    InUse {
        /// The DIMM.
        id: String,
        /// Who uses it.
        holders: String,
    },
}
