// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the structures of the transport lie in their BAR, and the capabilities that say so (4.1.4).
//!
//! ```text
//! BAR 0   0x0000  common configuration    0x1000  ISR status
//!         0x2000  device configuration    0x3000  notification, 4 bytes for each queue
//! ```

use std::ops::Range;

/// PCI vendor of every virtio device (4.1.2).
pub(super) const VENDOR: u16 = 0x1af4;
/// PCI device number of device type 0; the others follow (4.1.2).
pub(super) const DEVICE_BASE: u16 = 0x1040;
/// A device that is not transitional has at least this revision (4.1.2.1).
pub(super) const REVISION: u8 = 1;

/// The BAR that holds the structures.
pub(super) const BAR: u8 = 0;
/// Its size.
pub(super) const BAR_BYTES: u64 = 0x4000;
/// The BAR that holds the MSI-X table and pending bits.
pub(super) const MSIX_BAR: u8 = 2;

/// Common configuration; without the fields of features that are not offered.
pub(super) const COMMON: Range<u64> = 0..0x38;
/// ISR status.
pub(super) const ISR: Range<u64> = 0x1000..0x1001;
/// The device's own configuration.
pub(super) const DEVICE: Range<u64> = 0x2000..0x3000;
/// Where the notification addresses begin.
pub(super) const NOTIFY: u64 = 0x3000;
/// Distance of the notification addresses of two queues.
pub(super) const NOTIFY_STRIDE: u32 = 4;
/// As many queues as there are notification addresses.
pub(super) const MAX_QUEUES: usize = ((BAR_BYTES - NOTIFY) / NOTIFY_STRIDE as u64) as usize;

/// "No vector" in the vector fields (4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;

/// Address of a queue's notification, from the start of the BAR.
pub(super) fn notify_offset(queue: u16) -> u64 {
    NOTIFY + u64::from(queue) * u64::from(NOTIFY_STRIDE)
}

/// Kinds of structures (4.1.4, `cfg_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Common = 1,
    Notify = 2,
    Isr = 3,
    Device = 4,
    PciConfig = 5,
}

/// Offset of the capability's parts from its start, which is the capability ID (4.1.4).
pub(super) mod field {
    /// Number of the BAR.
    pub(in crate::pci) const BAR: usize = 4;
    /// Offset in the BAR.
    pub(in crate::pci) const OFFSET: usize = 8;
    /// Bytes.
    pub(in crate::pci) const LENGTH: usize = 12;
    /// Data of the configuration window (4.1.4.9).
    pub(in crate::pci) const DATA: usize = 16;
}

/// A vendor-specific capability from its third byte on (what follows ID and next pointer).
pub(super) fn capability(kind: Kind, range: Range<u64>, extra: Option<u32>) -> Vec<u8> {
    let length = 16 + if extra.is_some() { 4 } else { 0 };
    let mut bytes = vec![length, kind as u8, BAR, 0, 0, 0];
    // The layout's numbers all fit 32 bits.
    bytes.extend_from_slice(&(range.start as u32).to_le_bytes());
    bytes.extend_from_slice(&((range.end - range.start) as u32).to_le_bytes());
    bytes.extend(extra.into_iter().flat_map(u32::to_le_bytes));
    bytes
}

/// PCI class, subclass and programming interface for a device type: what generic tools and firmware call it.
pub(super) fn class(device_type: u16) -> u32 {
    match device_type {
        1 => 0x02_0000,
        2 | 8 => 0x01_0000,
        3 => 0x07_8000,
        16 => 0x03_8000,
        _ => 0xff_0000,
    }
}
