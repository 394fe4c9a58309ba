// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A 16550A serial port as a PCI function (QEMU's `serial-pci`): one I/O BAR of eight ports, INTA#.
//!
//! ```text
//! guest ── I/O BAR ── gate ──▶ Port ── Uart ──┬─▶ Wire ──▶ character device
//! character device ──▶ Wire ── Handle ──▶ Port└─▶ InterruptPin
//! ```
//!
//! The character device outlives the function: it keeps what was sent and the input nobody has read, and may be given to
//! another function. The wire knows the port by a handle only, so that bytes that arrive during or after the removal
//! find a shut gate. Sending never waits; so neither does the removal, however slow the other side is.
//!
//! Linux: `8250_pci`, by the class code.

mod uart;

use std::future::Future;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ebbtide_bus::gated::{self, all_ones};
use ebbtide_bus::irq::IrqLine;
use ebbtide_bus::pci::{BarKind, BarSpec, Config, Function, Ids, InterruptPin, IntxPin};
use ebbtide_gate::{Entry, Gate, Owned};
use ebbtide_memory::{Mmio, Region};

use self::uart::Uart;
use crate::Error;
use crate::chardev::{InputKey, Wire};

/// The id that guests know a virtual 16550 by; the class says the rest: serial controller, 16550-compatible.
const IDS: Ids = Ids {
    vendor: 0x1b36,
    device: 0x0002,
    revision: 1,
    class: 0x07_00_02,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};
const BAR: u8 = 0;
const SIZE_BYTES: u64 = 8;

/// A serial port on the PCI bus.
///
/// [`close`](Self::close) shuts its gate, which is the one of its [`Config`].
pub struct SerialPci {
    port: Owned<Port>,
    config: Config,
    input: InputKey,
}

struct Port {
    wire: Arc<Wire>,
    pin: Arc<InterruptPin>,
    uart: Mutex<Uart>,
}

impl SerialPci {
    /// A port on a function called `name`, connected to `wire`. Input that waits on the wire is for this port.
    ///
    /// # Errors
    /// The function cannot be made.
    pub fn new(name: &str, wire: &Arc<Wire>) -> Result<Arc<SerialPci>, Error> {
        let pin = InterruptPin::new(IntxPin::A);
        let port = Owned::new(
            name,
            Port {
                wire: Arc::clone(wire),
                pin: Arc::clone(&pin),
                uart: Mutex::default(),
            },
        );
        let mut config = Config::new(port.gate(), IDS);
        config.add_interrupt_pin(&pin);
        let region = Region::mmio(name, SIZE_BYTES, gated::registers(port.handle()));
        let spec = BarSpec {
            size_bytes: SIZE_BYTES,
            kind: BarKind::Io,
        };
        config.add_bar(BAR, spec, region)?;
        let handle = port.handle();
        let input = wire.on_input(move || {
            if let Some(port) = handle.enter(Entry::Io) {
                port.change(|_| ());
            }
        });
        Ok(Arc::new(SerialPci {
            port,
            config,
            input,
        }))
    }

    /// The gate of the function; [`close`](Self::close) shuts it.
    pub fn gate(&self) -> &Arc<Gate> {
        self.port.gate()
    }

    /// Ends the driver's use of the port as a reset does, at once: nothing of it is ever in flight, so the future is ready.
    /// For a reset of the machine, with the vCPUs stopped.
    pub fn quiesce(&self) -> impl Future<Output = ()> + Send + 'static {
        self.port.get().change(|uart| *uart = Uart::default());
        std::future::ready(())
    }

    /// Takes the function away from the guest: from now on its registers read all ones and take no writes, and it takes
    /// no input from the wire. The future is ready when nothing of it is in use any more; it waits for register accesses
    /// that are under way and for nothing else. What was sent stays with the wire. Idempotent.
    pub fn close(self: &Arc<Self>) -> impl Future<Output = ()> + Send + 'static {
        self.port.close();
        self.port.get().wire.forget_input(self.input);
        let this = Arc::clone(self);
        async move {
            this.gate().drained().await;
            this.port.get().pin.set(false);
        }
    }
}

impl Function for SerialPci {
    fn config(&self) -> &Config {
        &self.config
    }

    fn reset(&self) {
        drop(self.quiesce());
        self.config.reset();
    }
}

impl Drop for SerialPci {
    fn drop(&mut self) {
        self.port.get().wire.forget_input(self.input);
    }
}

impl Port {
    /// Does something to the chip, lets in what it has room for before and after, and sets the interrupt pin to what
    /// follows. The pin is driven under the chip's lock, or an older level could be the last.
    fn change<T>(&self, change: impl FnOnce(&mut Uart) -> T) -> T {
        let mut uart = self.uart();
        self.refill(&mut uart);
        let result = change(&mut uart);
        self.refill(&mut uart);
        self.pin.set(uart.interrupt());
        result
    }

    fn refill(&self, uart: &mut Uart) {
        let mut bytes = [0; 16];
        let room = uart.room().min(bytes.len());
        if room == 0 {
            return;
        }
        let count = self.wire.get(bytes.get_mut(..room).unwrap_or_default());
        uart.receive(bytes.get(..count).unwrap_or_default());
    }

    fn uart(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The registers an access covers; a wide access to the byte-wide chip is several byte accesses.
fn registers(offset: u64, size: u8) -> Option<Range<u8>> {
    let end = offset.checked_add(size.into())?;
    (end <= SIZE_BYTES).then_some(offset as u8..end as u8)
}

impl Mmio for Port {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let Some(registers) = registers(offset, size) else {
            return all_ones(size);
        };
        registers.enumerate().fold(0, |value, (at, register)| {
            let byte = self.change(|uart| uart.read(register));
            value | u64::from(byte) << (8 * at)
        })
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        let Some(registers) = registers(offset, size) else {
            return;
        };
        for (register, byte) in registers.zip(value.to_le_bytes()) {
            self.change(|uart| {
                if let Some(sent) = uart.write(register, byte) {
                    self.wire.put(&[sent]);
                }
            });
        }
    }
}
