// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The registers of a 16550A (PC16550D data sheet, 8.0) with a level for its interrupt.
//!
//! Sending takes no time, so the transmitter is always empty; receiving takes none either, so bytes below the trigger
//! level are a time-out at once. Lines to the other side are constant.
//!
//! ```text
//! interrupt:  line status > received data or time-out > transmitter empty > modem status
//! cleared by: LSR read      RBR read below the level    IIR read, THR write  MSR read
//! ```

use std::collections::VecDeque;

/// Bytes the receiver holds; one when the FIFO is off.
const FIFO_BYTES: usize = 16;
/// 9600 baud of a 1.8432 MHz clock: the chip keeps whatever it had, software sets it.
const DIVISOR: u16 = 12;

/// Registers by their offset.
pub(super) mod at {
    pub const DATA: u8 = 0;
    pub const INTERRUPT_ENABLE: u8 = 1;
    /// Interrupt identification when read, FIFO control when written.
    pub const IDENTIFICATION: u8 = 2;
    pub const LINE_CONTROL: u8 = 3;
    pub const MODEM_CONTROL: u8 = 4;
    pub const LINE_STATUS: u8 = 5;
    pub const MODEM_STATUS: u8 = 6;
    pub const SCRATCH: u8 = 7;
}

/// Interrupt enable: received data, transmitter empty, line status, modem status.
const ENABLE_RECEIVED: u8 = 1 << 0;
const ENABLE_EMPTY: u8 = 1 << 1;
const ENABLE_LINE: u8 = 1 << 2;
const ENABLE_MODEM: u8 = 1 << 3;
/// Identification: none (bit 0), the sources, and the FIFO's two bits.
const NONE: u8 = 0x01;
const MODEM: u8 = 0x00;
const EMPTY: u8 = 0x02;
const RECEIVED: u8 = 0x04;
const LINE: u8 = 0x06;
const TIMEOUT: u8 = 0x0c;
const FIFO_ON: u8 = 0xc0;
/// FIFO control.
const FIFO_ENABLE: u8 = 1 << 0;
const FIFO_CLEAR_RECEIVER: u8 = 1 << 1;
/// Line control: offsets 0 and 1 are the divisor.
const DIVISOR_LATCH: u8 = 1 << 7;
/// Modem control: what is sent is received, and the outputs are the inputs.
const LOOPBACK: u8 = 1 << 4;
/// Line status.
const DATA_READY: u8 = 1 << 0;
const OVERRUN: u8 = 1 << 1;
const TRANSMITTER_EMPTY: u8 = 0x60;
/// Modem status: inputs in the high half, what changed in the low one. The other side is always there.
const CTS_DSR_DCD: u8 = 0xb0;
const RING: u8 = 1 << 6;

/// The chip.
#[derive(Debug)]
pub(super) struct Uart {
    divisor: u16,
    interrupt_enable: u8,
    fifo: bool,
    trigger: usize,
    line_control: u8,
    modem_control: u8,
    modem_changes: u8,
    scratch: u8,
    received: VecDeque<u8>,
    overrun: bool,
    /// The transmitter became empty and nobody has been told.
    emptied: bool,
}

impl Default for Uart {
    /// After a master reset (8.0, table I).
    fn default() -> Self {
        Self {
            divisor: DIVISOR,
            interrupt_enable: 0,
            fifo: false,
            trigger: 1,
            line_control: 0,
            modem_control: 0,
            modem_changes: 0,
            scratch: 0,
            received: VecDeque::new(),
            overrun: false,
            emptied: false,
        }
    }
}

impl Uart {
    /// Whether the interrupt output is high.
    pub(super) fn interrupt(&self) -> bool {
        self.source() != NONE
    }

    /// How many bytes from outside can be received now; none in loopback.
    pub(super) fn room(&self) -> usize {
        if self.modem_control & LOOPBACK != 0 {
            return 0;
        }
        self.capacity().saturating_sub(self.received.len())
    }

    /// Bytes from outside, not more than there is [`room`](Self::room) for; others are dropped.
    pub(super) fn receive(&mut self, bytes: &[u8]) {
        let room = self.room();
        self.received.extend(bytes.iter().take(room));
    }

    /// A read of `register`, 0 to 7.
    pub(super) fn read(&mut self, register: u8) -> u8 {
        let [low, high] = self.divisor.to_le_bytes();
        let latch = self.line_control & DIVISOR_LATCH != 0;
        match register {
            at::DATA if latch => low,
            at::INTERRUPT_ENABLE if latch => high,
            at::DATA => self.received.pop_front().unwrap_or_default(),
            at::INTERRUPT_ENABLE => self.interrupt_enable,
            at::IDENTIFICATION => self.identify(),
            at::LINE_CONTROL => self.line_control,
            at::MODEM_CONTROL => self.modem_control,
            at::LINE_STATUS => self.line_status(),
            at::MODEM_STATUS => self.modem_status(),
            at::SCRATCH => self.scratch,
            _ => u8::MAX,
        }
    }

    /// A write to `register`, 0 to 7. Returns a byte that is sent.
    pub(super) fn write(&mut self, register: u8, value: u8) -> Option<u8> {
        let [low, high] = self.divisor.to_le_bytes();
        let latch = self.line_control & DIVISOR_LATCH != 0;
        match register {
            at::DATA if latch => self.divisor = u16::from_le_bytes([value, high]),
            at::INTERRUPT_ENABLE if latch => self.divisor = u16::from_le_bytes([low, value]),
            at::DATA => return self.send(value),
            at::INTERRUPT_ENABLE => self.set_interrupt_enable(value),
            at::IDENTIFICATION => self.set_fifo_control(value),
            at::LINE_CONTROL => self.line_control = value,
            at::MODEM_CONTROL => self.set_modem_control(value),
            at::SCRATCH => self.scratch = value,
            // The status registers are for reading.
            _ => {}
        }
        None
    }

    fn capacity(&self) -> usize {
        if self.fifo { FIFO_BYTES } else { 1 }
    }

    /// The source of the highest priority, as the low four bits of the identification.
    fn source(&self) -> u8 {
        let enabled = |bit| self.interrupt_enable & bit != 0;
        if enabled(ENABLE_LINE) && self.overrun {
            LINE
        } else if enabled(ENABLE_RECEIVED) && !self.received.is_empty() {
            let reached = !self.fifo || self.received.len() >= self.trigger;
            if reached { RECEIVED } else { TIMEOUT }
        } else if enabled(ENABLE_EMPTY) && self.emptied {
            EMPTY
        } else if enabled(ENABLE_MODEM) && self.modem_changes != 0 {
            MODEM
        } else {
            NONE
        }
    }

    fn identify(&mut self) -> u8 {
        let source = self.source();
        if source == EMPTY {
            self.emptied = false;
        }
        source | if self.fifo { FIFO_ON } else { 0 }
    }

    fn send(&mut self, byte: u8) -> Option<u8> {
        self.emptied = true;
        if self.modem_control & LOOPBACK == 0 {
            return Some(byte);
        }
        if self.received.len() < self.capacity() {
            self.received.push_back(byte);
        } else {
            self.overrun = true;
        }
        None
    }

    fn set_interrupt_enable(&mut self, value: u8) {
        let all = ENABLE_RECEIVED | ENABLE_EMPTY | ENABLE_LINE | ENABLE_MODEM;
        let before = std::mem::replace(&mut self.interrupt_enable, value & all);
        // The transmitter is empty: whoever begins to ask is told.
        if value & !before & ENABLE_EMPTY != 0 {
            self.emptied = true;
        }
    }

    fn set_fifo_control(&mut self, value: u8) {
        let enable = value & FIFO_ENABLE != 0;
        if enable != self.fifo || (enable && value & FIFO_CLEAR_RECEIVER != 0) {
            self.received.clear();
        }
        self.fifo = enable;
        // The other bits are only programmed together with this one.
        if enable {
            self.trigger = match value >> 6 {
                0 => 1,
                1 => 4,
                2 => 8,
                _ => 14,
            };
        }
    }

    fn set_modem_control(&mut self, value: u8) {
        let before = self.modem_inputs();
        self.modem_control = value & 0x1f;
        let after = self.modem_inputs();
        // The ring indicator's bit tells of its end only.
        let changed = (before ^ after) & CTS_DSR_DCD | before & !after & RING;
        self.modem_changes |= changed >> 4;
    }

    /// CTS, DSR, RI, DCD in bits 4 to 7: in loopback RTS, DTR, OUT1, OUT2.
    fn modem_inputs(&self) -> u8 {
        if self.modem_control & LOOPBACK == 0 {
            return CTS_DSR_DCD;
        }
        let (dtr, rts) = (self.modem_control & 1, self.modem_control >> 1 & 1);
        rts << 4 | dtr << 5 | (self.modem_control >> 2 & 3) << 6
    }

    fn line_status(&mut self) -> u8 {
        let ready = if self.received.is_empty() {
            0
        } else {
            DATA_READY
        };
        let overrun = if std::mem::take(&mut self.overrun) {
            OVERRUN
        } else {
            0
        };
        TRANSMITTER_EMPTY | ready | overrun
    }

    fn modem_status(&mut self) -> u8 {
        self.modem_inputs() | std::mem::take(&mut self.modem_changes)
    }
}

#[cfg(test)]
mod tests {
    use super::at::*;
    use super::*;

    /// A chip with its FIFO on and the trigger at 8.
    fn chip() -> Uart {
        let mut uart = Uart::default();
        uart.write(IDENTIFICATION, 0x81);
        uart
    }

    fn source(uart: &mut Uart) -> u8 {
        uart.read(IDENTIFICATION) & 0xf
    }

    #[test]
    fn sources_have_their_order_and_each_its_end() {
        let mut uart = chip();
        uart.write(MODEM_CONTROL, LOOPBACK);
        for byte in 0..17 {
            uart.write(DATA, byte);
        }
        assert!(!uart.interrupt(), "none is enabled");
        uart.write(INTERRUPT_ENABLE, 0xff);
        assert_eq!(uart.read(INTERRUPT_ENABLE), 0x0f);
        assert_eq!(source(&mut uart), LINE);
        assert_eq!(source(&mut uart), LINE, "reading it does not end it");
        assert_eq!(uart.read(LINE_STATUS), 0x63);
        for expected in 0..16 {
            let level = if expected <= 8 { RECEIVED } else { TIMEOUT };
            assert_eq!(source(&mut uart), level, "{expected} taken");
            assert_eq!(uart.read(DATA), expected);
        }
        assert_eq!(uart.read(LINE_STATUS), 0x60);
        assert_eq!(source(&mut uart), EMPTY);
        assert_eq!(source(&mut uart), MODEM);
        assert_eq!(uart.read(MODEM_STATUS), 0x0b, "all inputs fell");
        assert_eq!(uart.read(MODEM_STATUS), 0);
        assert_eq!(source(&mut uart), NONE);
        assert!(!uart.interrupt());
    }

    #[test]
    fn the_level_stays_until_all_data_is_taken_or_disabled() {
        let mut uart = chip();
        uart.write(INTERRUPT_ENABLE, ENABLE_RECEIVED);
        uart.receive(b"ab");
        assert!(uart.interrupt());
        uart.read(IDENTIFICATION);
        uart.read(DATA);
        assert!(uart.interrupt(), "one is left");
        uart.write(INTERRUPT_ENABLE, 0);
        assert!(!uart.interrupt());
        uart.write(INTERRUPT_ENABLE, ENABLE_RECEIVED);
        assert!(uart.interrupt());
        uart.write(IDENTIFICATION, 0x83);
        assert!(!uart.interrupt(), "cleared");
    }

    #[test]
    fn without_a_fifo_there_is_one_byte() {
        let mut uart = Uart::default();
        assert_eq!(uart.read(IDENTIFICATION), NONE, "no fifo bits");
        assert_eq!(uart.room(), 1);
        uart.receive(b"xyz");
        assert_eq!((uart.room(), uart.read(DATA)), (0, b'x'));
        assert_eq!(uart.read(LINE_STATUS), 0x60);
        uart.write(IDENTIFICATION, 0x81);
        assert_eq!(uart.room(), 16);
        uart.write(MODEM_CONTROL, LOOPBACK);
        assert_eq!(uart.room(), 0);
    }

    #[test]
    fn ring_indicator_tells_of_its_end_only() {
        let mut uart = chip();
        uart.write(MODEM_CONTROL, LOOPBACK | 0xf);
        uart.read(MODEM_STATUS);
        uart.write(MODEM_CONTROL, LOOPBACK | 0xb);
        assert_eq!(uart.read(MODEM_STATUS), 0xb4);
        uart.write(MODEM_CONTROL, LOOPBACK | 0xf);
        assert_eq!(uart.read(MODEM_STATUS), 0xf0);
    }
}
