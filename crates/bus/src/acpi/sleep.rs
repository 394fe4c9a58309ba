// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The sleep control and status registers of a hardware-reduced platform (ACPI 6.5, 4.8.3.7).

use ebbtide_memory::Mmio;

/// The sleep type of S5, as `\_S5` says and the control register takes it.
pub const SLEEP_TYPE_S5: u8 = 5;

/// SLP_EN: enter the sleep state now.
const SLEEP_ENABLE: u8 = 1 << 5;
/// SLP_TYPx, bits 4 to 2.
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;

/// Control at offset 0, status at offset 1, a byte each.
///
/// A guest that sets SLP_EN with the type of S5 wants to be powered off: the closure given to [`new`](Self::new) is
/// called, on the vCPU's thread, each time. Other sleep types are ignored, for no table offers them. Status reads 0: the
/// guest never woke up.
pub struct SleepRegisters {
    power_off: Box<dyn Fn() + Send + Sync>,
}

impl SleepRegisters {
    /// Bytes of the registers.
    pub const SIZE_BYTES: u64 = 2;

    /// Registers that report S5 to `power_off`, which must only post a message.
    pub fn new(power_off: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            power_off: Box::new(power_off),
        }
    }
}

impl Mmio for SleepRegisters {
    fn read(&self, offset: u64, size: u8) -> u64 {
        // SLP_EN always reads zero, and a type without it means nothing.
        match (offset, size) {
            (0, 1 | 2) | (1, 1) => 0,
            _ => u64::MAX,
        }
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        if offset != 0 || !matches!(size, 1 | 2) {
            return;
        }
        let control = value as u8;
        if control & SLEEP_ENABLE != 0
            && (control >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK == SLEEP_TYPE_S5
        {
            (self.power_off)();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn only_s5_with_enable_powers_off() {
        let count = Arc::new(AtomicUsize::new(0));
        let registers = {
            let count = count.clone();
            SleepRegisters::new(move || {
                count.fetch_add(1, Ordering::SeqCst);
            })
        };
        registers.write(0, 1, 5 << 2);
        for kind in (0..8).filter(|&kind| kind != 5) {
            registers.write(0, 1, kind << 2 | 1 << 5);
        }
        registers.write(1, 1, 0x34);
        assert_eq!(count.load(Ordering::SeqCst), 0);
        registers.write(0, 1, 0x34);
        assert_eq!(count.load(Ordering::SeqCst), 1);
        assert_eq!(registers.read(0, 1), 0);
        assert_eq!(registers.read(1, 1), 0);
    }
}
