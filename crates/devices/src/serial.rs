// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A 16550A serial port.
//!
//! The registers are vm-superio's: always ready to send, a 64-byte receive FIFO, interrupts as edges. Around them this
//! module puts what keeps the vCPU from ever waiting: output goes into a [`Wire`], input comes from one, and a guest that
//! reads the last byte of its FIFO finds it filled again.

use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ebbtide_bus::gated::all_ones;
use ebbtide_bus::irq::{IrqLine, pulse};
use ebbtide_gate::{Entry, Owned};
use ebbtide_memory::Mmio;
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};

use crate::chardev::Wire;

/// Register offsets: data (DLAB clear), modem control, line status.
const DATA: u8 = 0;
const MODEM_CONTROL: u8 = 4;
const LINE_STATUS: u8 = 5;
/// Line status: the receive FIFO is not empty.
const DATA_READY: u8 = 1;
/// Modem control: what is sent is received.
const LOOPBACK: u8 = 1 << 4;

/// A serial port: eight byte-wide registers.
pub struct SerialPort {
    wire: Arc<Wire>,
    line: Arc<dyn IrqLine>,
    uart: Mutex<Uart>,
}

type Uart = Serial<Edge, NoEvents, Sender>;

/// The interrupt: 16550s on a PC are edge-triggered.
struct Edge(Arc<dyn IrqLine>);

impl Trigger for Edge {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        pulse(&*self.0);
        Ok(())
    }
}

/// The transmitter.
struct Sender(Arc<Wire>);

impl io::Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.put(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl SerialPort {
    /// Bytes of its ports.
    pub const SIZE_BYTES: u64 = 8;
    /// First port of COM1.
    pub const COM1: u16 = 0x3f8;

    /// A port named `name` that raises `line` and is connected to `wire`. Input that arrives on the wire is given to the
    /// guest as long as the owner has not closed the port.
    pub fn new(name: &str, line: Arc<dyn IrqLine>, wire: &Arc<Wire>) -> Owned<SerialPort> {
        let uart = Mutex::new(power_on(&line, wire));
        let port = Owned::new(
            name,
            SerialPort {
                wire: Arc::clone(wire),
                line,
                uart,
            },
        );
        let handle = port.handle();
        wire.on_input(move || {
            if let Some(port) = handle.enter(Entry::Io) {
                port.refill(&mut port.uart());
            }
        });
        port
    }

    /// Power-on state. Input that has not reached the FIFO is kept.
    pub fn reset(&self) {
        *self.uart() = power_on(&self.line, &self.wire);
        self.refill(&mut self.uart());
    }

    /// Moves input into the FIFO as far as it goes.
    fn refill(&self, uart: &mut Uart) {
        // In loopback nothing is received from outside; the input waits.
        if uart.read(MODEM_CONTROL) & LOOPBACK != 0 {
            return;
        }
        let mut bytes = [0; 64];
        let room = uart.fifo_capacity().min(bytes.len());
        let count = self.wire.get(bytes.get_mut(..room).unwrap_or_default());
        // There is room for all of them, and interrupts can't fail.
        let _ = uart.enqueue_raw_bytes(bytes.get(..count).unwrap_or_default());
    }

    fn read_byte(&self, uart: &mut Uart, register: u8) -> u8 {
        let byte = uart.read(register);
        if register == DATA && uart.read(LINE_STATUS) & DATA_READY == 0 {
            self.refill(uart);
        }
        byte
    }

    fn write_byte(&self, uart: &mut Uart, register: u8, byte: u8) {
        // Neither the wire nor the line can fail.
        let _ = uart.write(register, byte);
        if register == MODEM_CONTROL {
            self.refill(uart);
        }
    }

    fn uart(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn power_on(line: &Arc<dyn IrqLine>, wire: &Arc<Wire>) -> Uart {
    let (edge, sender) = (Edge(Arc::clone(line)), Sender(Arc::clone(wire)));
    Serial::new(edge, sender)
}

/// The registers an access covers; a wide access to the byte-wide device is several byte accesses.
fn registers(offset: u64, size: u8) -> Option<std::ops::Range<u8>> {
    let end = offset
        .checked_add(size.into())
        .filter(|&end| end <= SerialPort::SIZE_BYTES)?;
    Some(offset as u8..end as u8)
}

impl Mmio for SerialPort {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let Some(registers) = registers(offset, size) else {
            return all_ones(size);
        };
        let mut uart = self.uart();
        registers.enumerate().fold(0, |value, (at, register)| {
            value | u64::from(self.read_byte(&mut uart, register)) << (8 * at)
        })
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        let mut uart = self.uart();
        for (register, byte) in registers(offset, size)
            .into_iter()
            .flatten()
            .zip(value.to_le_bytes())
        {
            self.write_byte(&mut uart, register, byte);
        }
    }
}

#[cfg(test)]
mod tests;
