// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The two registers a PC is reset by. Each calls the closure it was made with, on the vCPU's thread: the closure must
//! only post a message.

use ebbtide_bus::gated::all_ones;
use ebbtide_memory::Mmio;

/// The reset control register, port 0xcf9, a byte wide: a write with bit 2 (RST_CPU) set is a reset, hard or soft as
/// bit 1 says. It shares its port with CONFIG_ADDRESS, so it is handed to the PCI host bridge.
pub struct ResetControl {
    reset: Box<dyn Fn() + Send + Sync>,
}

/// RST_CPU.
const RESET_CPU: u64 = 1 << 2;

impl ResetControl {
    /// A register that reports resets to `reset`.
    pub fn new(reset: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            reset: Box::new(reset),
        }
    }
}

impl Mmio for ResetControl {
    fn read(&self, offset: u64, size: u8) -> u64 {
        // Between resets it holds what a reset leaves behind.
        if (offset, size) == (0, 1) {
            0
        } else {
            all_ones(size)
        }
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        if (offset, size) == (0, 1) && value & RESET_CPU != 0 {
            (self.reset)();
        }
    }
}

/// What is left of the keyboard controller, ports 0x60 to 0x64: the reset pulse (command 0xfe at 0x64) and system
/// control port B (0x61).
///
/// There is no keyboard. Status always says "output full, input empty": a guest that waits until it may send a command
/// goes on at once, and one that probes for a controller finds that the output can't be emptied and gives up at once.
pub struct KeyboardController {
    reset: Box<dyn Fn() + Send + Sync>,
}

const DATA: u64 = 0;
const PORT_B: u64 = 1;
const STATUS_OR_COMMAND: u64 = 4;
/// Status: output buffer full (bit 0), input buffer empty (bit 1 clear).
const OUTPUT_FULL: u64 = 1;
/// Port B: the output of timer 2 is high. Whoever waits for it to end a calibration sees that it has.
const TIMER2_OUTPUT: u64 = 1 << 5;
/// Pulse output lines, bit 0 clear: the processor's reset line.
const PULSE_RESET: u64 = 0xfe;

impl KeyboardController {
    /// First of its ports.
    pub const PORT: u16 = 0x60;
    /// Bytes of its ports.
    pub const SIZE_BYTES: u64 = 5;

    /// A controller that reports resets to `reset`.
    pub fn new(reset: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            reset: Box::new(reset),
        }
    }
}

impl Mmio for KeyboardController {
    fn read(&self, offset: u64, size: u8) -> u64 {
        match (offset, size) {
            (DATA, 1) => 0,
            (PORT_B, 1) => TIMER2_OUTPUT,
            (STATUS_OR_COMMAND, 1) => OUTPUT_FULL,
            _ => all_ones(size),
        }
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        if (offset, size, value & 0xff) == (STATUS_OR_COMMAND, 1, PULSE_RESET) {
            (self.reset)();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn counter() -> (Arc<AtomicUsize>, impl Fn() + Send + Sync + 'static) {
        let count = Arc::new(AtomicUsize::new(0));
        let counted = count.clone();
        (count, move || {
            counted.fetch_add(1, Ordering::SeqCst);
        })
    }

    #[test]
    fn reset_control_resets_on_rst_cpu_only() {
        let (count, reset) = counter();
        let register = ResetControl::new(reset);
        register.write(0, 1, 0x02);
        register.write(0, 2, 0x06);
        register.write(1, 1, 0x06);
        assert_eq!(count.load(Ordering::SeqCst), 0);
        register.write(0, 1, 0x06);
        register.write(0, 1, 0x0e);
        assert_eq!(count.load(Ordering::SeqCst), 2);
        assert_eq!(register.read(0, 1), 0);
    }

    #[test]
    fn keyboard_controller_resets_on_the_pulse_only() {
        let (count, reset) = counter();
        let controller = KeyboardController::new(reset);
        for value in (0..=0xff).filter(|&value| value != 0xfe) {
            controller.write(4, 1, value);
            controller.write(0, 1, value);
        }
        controller.write(0, 1, 0xfe);
        controller.write(4, 2, 0xfe);
        assert_eq!(count.load(Ordering::SeqCst), 0);
        controller.write(4, 1, 0xfe);
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn nobody_waits_for_the_keyboard_controller() {
        let controller = KeyboardController::new(|| {});
        assert_eq!(controller.read(4, 1) & 2, 0, "a command may be sent");
        assert_eq!(controller.read(4, 1) & 1, 1, "a probe gives up");
        assert_eq!(controller.read(1, 1) & 0x20, 0x20, "a calibration ends");
    }
}
