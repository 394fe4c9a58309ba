// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The console device (virtio 1.3, 5.3): a console and named ports, each on a character device.
//!
//! ```text
//!   driver ── transmit queue of a port ──▶ port.rs ── Wire::offer ──▶ character device
//!          ◀── receive queue of a port ──         ◀── Wire::get ───
//!          ◀── control queues ──▶ control.rs ◀──▶ ports.rs: what there is, what the driver is still to be told
//! ```
//!
//! Ports come and go while the driver is there. A character device that takes nothing leaves the bytes where they are, in
//! the driver's queue: nothing is lost, and nothing waits with a lease, so port and device can go at any moment. What is
//! to be told to the driver is kept as state and not as a list of messages, so no driver makes it grow.

mod control;
mod port;
mod ports;

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use ebbtide_devices::chardev::Wire;
use ebbtide_iothread::{Remote, Sender};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes};

pub use self::ports::ConsoleMetrics;
use self::ports::Ports;
use crate::control::{Change, TransportControl};
use crate::device::{ActivateError, Activation, ActiveQueue, VirtioDevice};

/// The device type (5.3.1).
pub const DEVICE_TYPE: u16 = 3;

/// Feature bits (5.3.3).
pub mod feature {
    /// The size of the console is told.
    pub const SIZE: u64 = 1 << 0;
    /// There are more ports than one, and control queues.
    pub const MULTIPORT: u64 = 1 << 1;
}

/// Most ports of a device, as in QEMU.
pub const PORTS_MAX: u32 = 31;
/// The longest name of a port, in bytes.
pub const NAME_BYTES_MAX: usize = 255;

/// Sizes of queues, as in QEMU.
const PORT_QUEUE_SIZE: u16 = 128;
const CONTROL_QUEUE_SIZE: u16 = 32;
/// Indices of the control queues (5.3.2).
const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;

/// A size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Characters of a row.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

/// What a console device is to be: QEMU's `virtio-serial-pci`. The names in quotes are those of QEMU's properties.
#[derive(Debug, Clone)]
pub struct ConsoleSpec {
    /// `id`: its name in logs.
    pub id: String,
    /// `max_ports`: 1 to [`PORTS_MAX`]. With 1 there is the console alone, without control queues.
    pub max_ports: u32,
    /// The size of the console, where it is known.
    pub size: Option<Size>,
    /// Where to say that the driver opened or closed a port.
    pub events: Option<Sender<ConsoleEvent>>,
}

impl ConsoleSpec {
    /// As many ports as there can be, no size.
    pub fn new(id: impl Into<String>) -> ConsoleSpec {
        ConsoleSpec {
            id: id.into(),
            max_ports: PORTS_MAX,
            size: None,
            events: None,
        }
    }
}

/// What a port is to the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortKind {
    /// QEMU's `virtconsole`: a terminal, which counts as always open on our side.
    Console,
    /// QEMU's `virtserialport`: a pipe with a name; open on our side while somebody listens.
    Serial,
}

/// What a port is to be. The names in quotes are those of QEMU's properties; its `chardev` is the wire it is added with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortSpec {
    /// `id`, for events.
    pub id: String,
    /// Console or pipe.
    pub kind: PortKind,
    /// `nr`: which port; `None`: the first that is free, 0 only for consoles.
    pub number: Option<u32>,
    /// `name`: by which the guest finds it (`/dev/virtio-ports/NAME`).
    pub name: Option<String>,
}

/// What management is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsoleEvent {
    /// The driver opened or closed a port: QEMU's VSERPORT_CHANGE.
    PortChange {
        /// The port's `id`.
        id: String,
        /// Whether it is open now.
        open: bool,
    },
}

/// Why there is no such device or port.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConsoleError {
    /// `max_ports` is impossible.
    #[error("{id}: max_ports={value} is not 1 to {PORTS_MAX}")]
    MaxPorts {
        /// The device.
        id: String,
        /// What was asked for.
        value: u32,
    },
    /// There is no such port.
    #[error("{device}: port number {number} is not below max_ports={max}")]
    PortNumber {
        /// The device.
        device: String,
        /// What was asked for.
        number: u32,
        /// How many there may be.
        max: u32,
    },
    /// Port 0 is for a console.
    #[error("{device}: port 0 is for a virtconsole, `{id}` is none")]
    PortZero {
        /// The device.
        device: String,
        /// The port.
        id: String,
    },
    /// Another port has the number.
    #[error("{device}: port {number} is taken by `{by}`")]
    PortTaken {
        /// The device.
        device: String,
        /// Which one.
        number: u32,
        /// The `id` of the port that has it.
        by: String,
    },
    /// All ports are there already.
    #[error("{device}: no port is free for `{id}`, max_ports={max}")]
    NoPortFree {
        /// The device.
        device: String,
        /// The port that was to be added.
        id: String,
        /// How many there may be.
        max: u32,
    },
    /// Another port has the name.
    #[error("{device}: there is a port named `{name}` already")]
    NameTaken {
        /// The device.
        device: String,
        /// The name.
        name: String,
    },
    /// A name is empty, too long, or has a byte a file name cannot have.
    #[error(
        "{device}: port name `{name}` does not have 1 to {NAME_BYTES_MAX} bytes without NUL and `/`"
    )]
    Name {
        /// The device.
        device: String,
        /// The name.
        name: String,
    },
    /// There is no port with this number.
    #[error("{device}: there is no port {number}")]
    NoSuchPort {
        /// The device.
        device: String,
        /// Which one.
        number: u32,
    },
    /// The device was made without a size.
    #[error(
        "{device}: the size of the console is not told to this driver: it was not known when the device was made"
    )]
    NoSize {
        /// The device.
        device: String,
    },
}

/// `struct virtio_console_config` (5.3.4).
#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Layout {
    cols: U16,
    rows: U16,
    max_nr_ports: U32,
    emerg_wr: U32,
}

/// A virtio console device. The queues of its ports are served by one iothread.
pub struct VirtioConsole {
    ports: Arc<Ports>,
    features: u64,
    queue_sizes: Vec<u16>,
    max_ports: u32,
    remote: Remote,
    control: OnceLock<TransportControl>,
}

impl VirtioConsole {
    /// A device without ports, served on `remote`.
    ///
    /// # Errors
    /// [`ConsoleError::MaxPorts`].
    pub fn new(spec: ConsoleSpec, remote: Remote) -> Result<Arc<VirtioConsole>, ConsoleError> {
        let ConsoleSpec {
            id,
            max_ports,
            size,
            events,
        } = spec;
        if !(1..=PORTS_MAX).contains(&max_ports) {
            let value = max_ports;
            return Err(ConsoleError::MaxPorts { id, value });
        }
        let when = |condition, bit| if condition { bit } else { 0 };
        Ok(Arc::new(VirtioConsole {
            features: when(size.is_some(), feature::SIZE) | when(max_ports > 1, feature::MULTIPORT),
            queue_sizes: queue_sizes(max_ports),
            ports: Ports::new(id, max_ports, size, events),
            max_ports,
            remote,
            control: OnceLock::new(),
        }))
    }

    /// Adds a port with `wire` on its host side, and returns its number. A driver that is there is told.
    ///
    /// # Errors
    /// The number or the name is impossible or taken, or all ports are there.
    pub fn add_port(&self, spec: PortSpec, wire: &Arc<Wire>) -> Result<u32, ConsoleError> {
        self.ports.add(spec, wire)
    }

    /// Takes a port away. No byte of the driver's gets to its wire any more and none from it to the driver; the wire
    /// itself is left as it is. What the driver had not got rid of stays in its queue, and is dropped.
    ///
    /// # Errors
    /// [`ConsoleError::NoSuchPort`].
    pub fn remove_port(&self, number: u32) -> Result<(), ConsoleError> {
        self.ports.remove(number)
    }

    /// The console of port `number` has another size.
    ///
    /// # Errors
    /// [`ConsoleError::NoSize`], [`ConsoleError::NoSuchPort`].
    pub fn resize(&self, number: u32, size: Size) -> Result<(), ConsoleError> {
        if self.features & feature::SIZE == 0 {
            return Err(ConsoleError::NoSize {
                device: self.ports.name().to_owned(),
            });
        }
        let resize = || {
            let resized = self.ports.resize(number, size);
            // Only port 0 has its size in the configuration.
            let told = match (&resized, number) {
                (Ok(()), 0) => Change::Announced,
                _ => Change::None,
            };
            (resized, told)
        };
        match self.control.get() {
            Some(control) => control.update_config(resize),
            None => resize().0,
        }
    }

    /// What it has done so far.
    pub fn metrics(&self) -> ConsoleMetrics {
        self.ports.counters.snapshot()
    }
}

impl VirtioDevice for VirtioConsole {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let size = self.ports.console_size();
        let layout = Layout {
            cols: U16::new(size.map_or(0, |size| size.columns)),
            rows: U16::new(size.map_or(0, |size| size.rows)),
            max_nr_ports: U32::new(self.max_ports),
            emerg_wr: U32::new(0),
        };
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = layout.as_bytes().get(start..).unwrap_or_default();
        for (to, from) in data
            .iter_mut()
            .zip(rest.iter().chain(std::iter::repeat(&0)))
        {
            *to = *from;
        }
    }

    /// The one field a driver may write, for emergencies, belongs to a feature that is not offered.
    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    /// All choices will do. A new driver knows of no port yet.
    fn accept_features(&self, driver: u64) -> bool {
        self.ports.new_driver(driver);
        true
    }

    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            features,
            queues,
            memory,
            gate,
            control,
        } = activation;
        let multiport = features & feature::MULTIPORT != 0;
        let mut queues: HashMap<u16, ActiveQueue> =
            queues.into_iter().map(|it| (it.index, it)).collect();
        let served = port::Served {
            ports: Arc::clone(&self.ports),
            epoch: self.ports.epoch(),
            gate,
            space: memory,
            control,
        };
        if multiport {
            let pair = port::Queues {
                receive: queues.remove(&CONTROL_RECEIVE),
                transmit: queues.remove(&CONTROL_TRANSMIT),
            };
            pair.listen();
            let served = served.clone();
            self.remote
                .spawn(move |local| control::serve(local, served, pair))
                .map_err(|_| ActivateError::ThreadStopped)?;
        }
        let count = if multiport { self.max_ports } else { 1 };
        for number in 0..count {
            let index = receive_queue(number);
            let pair = port::Queues {
                receive: queues.remove(&index),
                transmit: queues.remove(&index.wrapping_add(1)),
            };
            if pair.receive.is_none() && pair.transmit.is_none() {
                continue;
            }
            pair.listen();
            let served = served.clone();
            self.remote
                .spawn(move |local| port::serve(local, served, pair, number, multiport))
                .map_err(|_| ActivateError::ThreadStopped)?;
        }
        Ok(())
    }

    fn attach(&self, control: TransportControl) {
        // Called once, before anything else.
        let _ = self.control.set(control);
    }
}

/// The index of a port's receive queue; its transmit queue is the next (5.3.2).
fn receive_queue(port: u32) -> u16 {
    let pairs_before = if port == 0 { 0 } else { port + 1 };
    u16::try_from(2 * pairs_before).unwrap_or(u16::MAX)
}

fn queue_sizes(max_ports: u32) -> Vec<u16> {
    let mut sizes = vec![PORT_QUEUE_SIZE; 2];
    if max_ports > 1 {
        sizes.extend([CONTROL_QUEUE_SIZE; 2]);
        sizes.extend((1..max_ports).flat_map(|_| [PORT_QUEUE_SIZE; 2]));
    }
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_of_the_specification() {
        assert_eq!([0, 1, 2, 30].map(receive_queue), [0, 4, 6, 62]);
        assert_eq!(queue_sizes(1), [128, 128]);
        assert_eq!(queue_sizes(2), [128, 128, 32, 32, 128, 128]);
        assert_eq!(queue_sizes(31).len(), 64);
    }
}
