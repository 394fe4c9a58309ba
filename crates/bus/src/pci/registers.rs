// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bytes of a configuration space and what a guest may do to each bit.

use super::CONFIG_SIZE_BYTES;

/// Offsets of the type 0 header (PCI 3.0, 6.1) and of the extended space (PCIe 5.0, 7.6).
pub(super) const VENDOR: u16 = 0x00;
pub(super) const COMMAND: u16 = 0x04;
pub(super) const STATUS: u16 = 0x06;
pub(super) const REVISION: u16 = 0x08;
pub(super) const CACHE_LINE: u16 = 0x0c;
pub(super) const HEADER_TYPE: u16 = 0x0e;
pub(super) const BAR0: u16 = 0x10;
pub(super) const SUBSYSTEM_VENDOR: u16 = 0x2c;
pub(super) const CAPABILITIES: u16 = 0x34;
pub(super) const INTERRUPT_LINE: u16 = 0x3c;
pub(super) const INTERRUPT_PIN: u16 = 0x3d;
pub(super) const HEADER_END: u16 = 0x40;

/// Offsets of the type 1 header (PCI-to-PCI Bridge 1.2, 3.2) where it differs.
pub(super) const BUS_NUMBERS: u16 = 0x18;
pub(super) const SECONDARY_STATUS: u16 = 0x1e;
pub(super) const MEMORY_BASE: u16 = 0x20;
pub(super) const PREFETCHABLE_BASE: u16 = 0x24;
pub(super) const PREFETCHABLE_BASE_UPPER: u16 = 0x28;
pub(super) const PREFETCHABLE_LIMIT_UPPER: u16 = 0x2c;
pub(super) const BRIDGE_CONTROL: u16 = 0x3e;

/// Bits of STATUS and of a bridge's secondary status that a guest clears by writing ones: parity and abort errors.
pub(super) const STATUS_ERRORS: u16 = 0xf900;
pub(super) const EXTENDED: u16 = 0x100;

/// One byte of configuration space.
#[derive(Clone, Copy, Default)]
struct Cell {
    value: u8,
    /// Bits the guest sets as it likes.
    writable: u8,
    /// Bits the guest clears by writing 1.
    write_one_clears: u8,
    /// The value at power-on.
    initial: u8,
}

/// 4 KiB of configuration space. Accesses may have any offset and length: what is outside reads as all ones and is not
/// written.
pub(super) struct Registers(Box<[Cell]>);

impl Registers {
    pub(super) fn new() -> Self {
        Self(vec![Cell::default(); CONFIG_SIZE_BYTES.into()].into_boxed_slice())
    }

    fn cells(&self, offset: u16, len: usize) -> Option<&[Cell]> {
        let start = usize::from(offset);
        self.0.get(start..start.checked_add(len)?)
    }

    fn cells_mut(&mut self, offset: u16, len: usize) -> &mut [Cell] {
        let start = usize::from(offset);
        start
            .checked_add(len)
            .and_then(|end| self.0.get_mut(start..end))
            .unwrap_or_default()
    }

    /// Defines registers: their power-on value and which bits a guest may write.
    pub(super) fn define(&mut self, offset: u16, bytes: &[u8], writable: &[u8]) {
        let masks = writable.iter().copied().chain(std::iter::repeat(0));
        for ((cell, &byte), writable) in self
            .cells_mut(offset, bytes.len())
            .iter_mut()
            .zip(bytes)
            .zip(masks)
        {
            *cell = Cell {
                value: byte,
                writable,
                write_one_clears: 0,
                initial: byte,
            };
        }
    }

    /// Makes bits write-one-to-clear.
    pub(super) fn define_write_one_clears(&mut self, offset: u16, bits: &[u8]) {
        for (cell, &bits) in self.cells_mut(offset, bits.len()).iter_mut().zip(bits) {
            cell.write_one_clears = bits;
            cell.writable &= !bits;
        }
    }

    /// Changes what registers read as, whatever the guest may write.
    pub(super) fn set(&mut self, offset: u16, bytes: &[u8]) {
        for (cell, &byte) in self.cells_mut(offset, bytes.len()).iter_mut().zip(bytes) {
            cell.value = byte;
        }
    }

    /// `size` bytes, little-endian; all ones where there is nothing or `size` is above 4.
    pub(super) fn read(&self, offset: u16, size: u8) -> u32 {
        let Some(cells) = self
            .cells(offset, size.into())
            .filter(|cells| cells.len() <= 4)
        else {
            return u32::MAX;
        };
        cells
            .iter()
            .rev()
            .fold(0, |value, cell| value << 8 | u32::from(cell.value))
    }

    pub(super) fn read_u16(&self, offset: u16) -> u16 {
        self.read(offset, 2) as u16
    }

    /// A guest's write of the low `size` bytes of `value`.
    pub(super) fn write(&mut self, offset: u16, size: u8, value: u32) {
        let bytes = value.to_le_bytes();
        for (cell, byte) in self.cells_mut(offset, size.into()).iter_mut().zip(bytes) {
            let kept = cell.value & !cell.writable;
            cell.value = (kept & !(byte & cell.write_one_clears)) | (byte & cell.writable);
        }
    }

    /// Every register to its power-on value.
    pub(super) fn reset(&mut self) {
        for cell in &mut self.0 {
            cell.value = cell.initial;
        }
    }
}

/// Whether an access of `size` bytes at `offset` touches the `len` bytes from `start` on.
pub(super) fn touches(offset: u16, size: u8, start: u16, len: u16) -> bool {
    let (offset, size) = (u32::from(offset), u32::from(size));
    let (start, len) = (u32::from(start), u32::from(len));
    offset < start + len && start < offset + size
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_rule_each_bit() {
        let mut registers = Registers::new();
        registers.define(0x10, &[0x0c, 0, 0, 0], &[0, 0xf0, 0xff, 0xff]);
        registers.write(0x10, 4, u32::MAX);
        assert_eq!(registers.read(0x10, 4), 0xffff_f00c);
        registers.write(0x11, 1, 0);
        assert_eq!(registers.read(0x10, 4), 0xffff_000c);
        registers.reset();
        assert_eq!(registers.read(0x10, 4), 0x0c);
    }

    #[test]
    fn ones_clear_and_zeros_keep() {
        let mut registers = Registers::new();
        registers.define(6, &[0x10, 0], &[0, 0xff]);
        registers.define_write_one_clears(6, &[0, 0xf9]);
        registers.set(6, &[0x10, 0xf9]);
        registers.write(6, 2, 0x0100);
        assert_eq!(registers.read(6, 2), 0xf810);
        registers.write(6, 2, 0);
        assert_eq!(registers.read(6, 2), 0xf810);
        registers.write(6, 2, 0xffff);
        assert_eq!(registers.read(6, 2), 0x0610, "bits 9 and 10 are plain");
    }

    #[test]
    fn outside_is_all_ones() {
        let mut registers = Registers::new();
        assert_eq!(registers.read(4094, 4), u32::MAX);
        assert_eq!(registers.read(u16::MAX, 1), u32::MAX);
        assert_eq!(registers.read(0, 8), u32::MAX);
        registers.write(4094, 4, 0);
        registers.write(u16::MAX, 255, 0);
    }

    #[test]
    fn overlap() {
        assert!(touches(4, 2, 4, 2));
        assert!(touches(4, 4, 6, 2));
        assert!(!touches(4, 2, 6, 2));
        assert!(!touches(8, 4, 6, 2));
        assert!(touches(u16::MAX, 4, u16::MAX, 1));
    }
}
