// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ports guests write to without wanting anything.

use ebbtide_bus::gated::all_ones;
use ebbtide_memory::Mmio;

/// Takes every write and does nothing with it; reads as all ones, like a port nobody answers at.
///
/// For port 0x80, which kernels write to in order to lose a microsecond.
pub struct Sink;

impl Sink {
    /// The POST code port.
    pub const POST_PORT: u16 = 0x80;
}

impl Mmio for Sink {
    fn read(&self, _offset: u64, size: u8) -> u64 {
        all_ones(size)
    }

    fn write(&self, _offset: u64, _size: u8, _value: u64) {}
}
