// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Feature bits that do not belong to one device (virtio 1.3, 6), as masks.

/// A descriptor may point to a table of descriptors (2.7.5.3).
pub const RING_INDIRECT_DESC: u64 = 1 << 28;
/// Both sides say from which index on they want to be notified (2.7.7, 2.7.10).
pub const RING_EVENT_IDX: u64 = 1 << 29;
/// The device follows virtio 1.0 or later; the only kind there is here.
pub const VERSION_1: u64 = 1 << 32;
/// Device accesses to memory go through the platform's translation.
pub const ACCESS_PLATFORM: u64 = 1 << 33;
/// The packed ring layout (2.8), which no device here offers.
pub const RING_PACKED: u64 = 1 << 34;

/// What every transport here offers on behalf of its device.
pub const TRANSPORT: u64 = VERSION_1 | RING_INDIRECT_DESC | RING_EVENT_IDX;
/// The bits a device may offer itself: device types own 0 to 23 and 50 to 127 (6).
pub const DEVICE_OWN: u64 = ((1 << 24) - 1) | !((1 << 50) - 1);
