// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is left of a function that was detached while its driver had not let go of it.
//!
//! The driver learns of it and resets the device, in vain, as a step of its own end: it writes 0 to the status and waits
//! until it reads 0 (4.1.4.3.2), which a register of all ones never does; Linux waits without a limit, on the thread that
//! serves the slot or all slots. So the status reads 0, and this is what it means (2.1, 2.4.1): the device has been reset and
//! does nothing any more, for it was detached after its drain. All else is as on a bus without the device: all ones, of
//! which a driver takes a vector for "no vector". Configuration space is such a bus's, too; from that a driver tells
//! that the device is gone.

use std::sync::Arc;

use ebbtide_bus::gated::all_ones;
use ebbtide_bus::pci::Remnant;
use ebbtide_memory::{Mmio, Region};

use super::layout::{BAR, COMMON};
use super::registers::at;

/// The common configuration of a function that is gone.
pub(super) struct Detached;

impl Detached {
    /// That of the function called `name`.
    pub(super) fn remnant(name: &str) -> Remnant {
        let bytes = COMMON.end - COMMON.start;
        Remnant {
            bar: BAR,
            offset: COMMON.start,
            region: Region::mmio(format!("{name}-detached"), bytes, Arc::new(Detached)),
        }
    }
}

impl Mmio for Detached {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let status = at::STATUS
            .checked_sub(offset)
            .filter(|byte| *byte < size.into());
        let mask = status.map_or(0, |byte| 0xff_u64.checked_shl(8 * byte as u32).unwrap_or(0));
        all_ones(size) & !mask
    }

    fn write(&self, _offset: u64, _size: u8, _value: u64) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_zero_and_all_else_is_ones() {
        let gone = Detached;
        for offset in COMMON {
            for size in [1, 2, 4, 8] {
                let read = gone.read(offset, size).to_le_bytes();
                for (at, byte) in (offset..).zip(&read[..size.into()]) {
                    let expected = if at == 0x14 { 0 } else { 0xff };
                    assert_eq!(*byte, expected, "{size} bytes at {offset:#x}: {at:#x}");
                }
                assert!(read[size.into()..].iter().all(|byte| *byte == 0));
            }
        }
    }

    #[test]
    fn it_takes_no_writes() {
        let gone = Detached;
        for value in [0, 1, 0xf, u64::MAX] {
            gone.write(0x14, 1, value);
            assert_eq!(gone.read(0x14, 1), 0);
        }
    }
}
