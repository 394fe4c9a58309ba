// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest-physical address map.
//!
//! ```text
//! 0                    low RAM, up to 3 GiB (640 KiB..1 MiB is reserved in e820, the tables live there)
//! 0xc000_0000          32-bit PCI window
//! 0xe000_0000          ECAM, room for 256 buses
//! 0xfec0_0000          IOAPIC          0xfee0_0000  local APICs
//! 4 GiB                high RAM
//!                      device memory: virtio-mem, aligned to 2 GiB
//!                      DIMMs, where there are slots for them: up to 128 GiB, a quarter of what is left
//!                      64-bit PCI window, to the end of the physical address space (at most 512 GiB of it)
//! ```

use std::ops::Range;

use crate::Error;

/// 1 GiB in bytes.
pub const GIB: u64 = 1 << 30;
/// 1 MiB in bytes.
pub const MIB: u64 = 1 << 20;

/// Low RAM ends here at the latest.
pub const LOW_RAM_LIMIT: u64 = 3 * GIB;
/// High RAM starts here.
pub const HIGH_RAM_START: u64 = 4 * GIB;
/// The 32-bit window of the PCI host bridge.
pub const PCI_MMIO32: Range<u64> = 0xc000_0000..0xe000_0000;
/// The ports of the PCI host bridge: above everything a PC has at fixed ones.
pub const PCI_IO: Range<u64> = 0xc000..0x1_0000;
/// PCIe configuration space (ECAM): room for buses 0 to 255. The guest is told of those that bridges answer for, and of
/// [`SPARE_BUSES`]: Linux looks into every bus that the tables name and its scan has not found, 32 accesses each, which
/// for 256 of them costs a guest a second of its boot under an emulated KVM.
pub const ECAM: Range<u64> = 0xe000_0000..0xf000_0000;
/// Bus numbers for bridges that are plugged into bus 0 later: for a root port with a switch of six ports.
pub const SPARE_BUSES: u8 = 8;
/// The RSDP and the tables it points to; inside the area firmware owns on a PC.
pub const ACPI_TABLES: Range<u64> = 0xe_0000..0xf_f000;
/// Conventional memory ends here; from here to 1 MiB e820 says reserved.
pub const EBDA_START: u64 = 0x9_fc00;

/// Device memory is aligned so that guests with 2 GiB memory blocks lose no edge of it.
const DEVICE_MEMORY_ALIGN: u64 = 2 * GIB;
/// What the addresses of DIMMs are cut to.
const DIMMS_MAX: u64 = 128 * GIB;
/// What the 64-bit PCI window is cut to: enough for every BAR the machine can have.
const MMIO64_MAX: u64 = 512 * GIB;
/// The smallest 64-bit PCI window worth having.
const MMIO64_MIN: u64 = GIB;

/// Where everything is, for one machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// RAM below 4 GiB, from 0.
    pub low_ram: Range<u64>,
    /// RAM from 4 GiB on; empty when all of it fits below.
    pub high_ram: Range<u64>,
    /// Room for each memory device, in the order asked for.
    pub device_memory: Vec<Range<u64>>,
    /// Where DIMMs go; empty without slots for them.
    pub dimms: Range<u64>,
    /// The 64-bit window of the PCI host bridge.
    pub mmio64: Range<u64>,
}

impl Layout {
    /// Lays out `ram_bytes` of boot RAM and one range for each of `devices_bytes` in a guest
    /// with `phys_bits` physical address bits.
    ///
    /// # Errors
    /// [`Error::AddressSpace`] when it does not fit.
    pub fn new(
        ram_bytes: u64,
        devices_bytes: &[u64],
        dimm_slots: u16,
        phys_bits: u8,
    ) -> Result<Layout, Error> {
        let end = 1u64 << phys_bits.min(52);
        let too_large = |needed: u64| Error::AddressSpace {
            needed_bytes: needed,
            available_bytes: end,
            phys_bits,
        };
        let low = ram_bytes.min(LOW_RAM_LIMIT);
        let high_end = HIGH_RAM_START
            .checked_add(ram_bytes - low)
            .ok_or_else(|| too_large(u64::MAX))?;
        let mut next = high_end;
        let mut device_memory = Vec::with_capacity(devices_bytes.len());
        for &size in devices_bytes {
            let start = align_up(next, DEVICE_MEMORY_ALIGN).ok_or_else(|| too_large(u64::MAX))?;
            let stop = start.checked_add(size).ok_or_else(|| too_large(u64::MAX))?;
            device_memory.push(start..stop);
            next = stop;
        }
        let dimms_start = align_up(next, DEVICE_MEMORY_ALIGN).ok_or_else(|| too_large(u64::MAX))?;
        let dimms = if dimm_slots == 0 {
            dimms_start..dimms_start
        } else {
            // A quarter of what is left: the PCI window and what grows need room, too.
            let room = end.saturating_sub(dimms_start) / 4 / GIB * GIB;
            dimms_start..dimms_start.saturating_add(room.min(DIMMS_MAX))
        };
        if dimm_slots > 0 && dimms.is_empty() {
            return Err(too_large(dimms_start.saturating_add(GIB)));
        }
        next = dimms.end;
        let window = align_up(next, DEVICE_MEMORY_ALIGN).ok_or_else(|| too_large(u64::MAX))?;
        let needed = window.saturating_add(MMIO64_MIN);
        if needed > end {
            return Err(too_large(needed));
        }
        Ok(Layout {
            low_ram: 0..low,
            high_ram: HIGH_RAM_START..high_end,
            device_memory,
            dimms,
            mmio64: window..end.min(window.saturating_add(MMIO64_MAX)),
        })
    }

    /// The ranges of boot RAM, in address order.
    pub fn ram(&self) -> Vec<Range<u64>> {
        let mut ranges = vec![self.low_ram.clone()];
        if !self.high_ram.is_empty() {
            ranges.push(self.high_ram.clone());
        }
        ranges
    }
}

fn align_up(value: u64, align: u64) -> Option<u64> {
    value.checked_next_multiple_of(align)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_ram_is_below_the_hole() {
        let l = Layout::new(512 * MIB, &[7680 * MIB], 0, 40).unwrap();
        assert_eq!(l.low_ram, 0..512 * MIB);
        assert!(l.high_ram.is_empty());
        assert_eq!(l.device_memory.len(), 1);
        assert_eq!(l.device_memory[0], 4 * GIB..4 * GIB + 7680 * MIB);
        assert_eq!(l.mmio64.start, 12 * GIB);
        assert_eq!(l.ram().len(), 1);
        assert_eq!(l.ram()[0], 0..512 * MIB);
    }

    #[test]
    fn ram_past_3_gib_goes_above_4() {
        let l = Layout::new(5 * GIB, &[GIB, GIB], 0, 46).unwrap();
        assert_eq!(l.high_ram, 4 * GIB..6 * GIB);
        assert_eq!(l.device_memory, [6 * GIB..7 * GIB, 8 * GIB..9 * GIB]);
        assert_eq!(l.mmio64, 10 * GIB..522 * GIB);
    }

    #[test]
    fn dimms_are_between_other_memory_and_the_window() {
        let l = Layout::new(GIB, &[GIB], 16, 40).unwrap();
        assert_eq!(l.dimms, 6 * GIB..134 * GIB);
        assert_eq!(l.mmio64.start, 134 * GIB);
        let small = Layout::new(GIB, &[], 1, 36).unwrap();
        assert_eq!(small.dimms, 4 * GIB..19 * GIB);
        assert!(Layout::new(GIB, &[], 0, 36).unwrap().dimms.is_empty());
        assert!(Layout::new(GIB, &[], 1, 32).is_err());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(matches!(
            Layout::new(GIB, &[1024 * GIB], 0, 40),
            Err(Error::AddressSpace { phys_bits: 40, .. })
        ));
        assert!(Layout::new(GIB, &[u64::MAX], 0, 52).is_err());
        assert!(Layout::new(u64::MAX, &[], 0, 52).is_err());
        assert!(Layout::new(GIB, &[1000 * GIB], 0, 40).is_ok());
    }
}
