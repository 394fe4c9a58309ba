// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A board with a console device of three ports; the test is the driver and what is at the other end of the wires.
#![allow(dead_code)] // Not every test file uses all of it.

use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use ebbtide_devices::chardev::Wire;
use ebbtide_iothread::{Receiver, channel};
use ebbtide_lab_driver::{Board, Layout, Part};
use ebbtide_memory::Gpa;
use ebbtide_virtio::console::{ConsoleEvent, ConsoleSpec, PortKind, PortSpec, Size, VirtioConsole};

use crate::device::{self, ALL};

pub const MAX_PORTS: u32 = 3;
pub const SIZES: [u16; 8] = [64, 64, 32, 32, 64, 64, 64, 64];
/// The control queues.
pub const TO_DRIVER: u16 = 2;
pub const FROM_DRIVER: u16 = 3;
pub const SIZE: Size = Size {
    columns: 132,
    rows: 43,
};

/// `event` of a control message.
pub mod event {
    pub const DEVICE_READY: u16 = 0;
    pub const DEVICE_ADD: u16 = 1;
    pub const DEVICE_REMOVE: u16 = 2;
    pub const PORT_READY: u16 = 3;
    pub const CONSOLE_PORT: u16 = 4;
    pub const RESIZE: u16 = 5;
    pub const PORT_OPEN: u16 = 6;
    pub const PORT_NAME: u16 = 7;
}

pub fn rx(port: u32) -> u16 {
    [0, 4, 6][port as usize]
}

pub fn tx(port: u32) -> u16 {
    rx(port) + 1
}

pub fn console(id: &str) -> PortSpec {
    PortSpec {
        id: id.into(),
        kind: PortKind::Console,
        number: None,
        name: None,
    }
}

pub fn serial(id: &str, name: &str) -> PortSpec {
    PortSpec {
        kind: PortKind::Serial,
        name: Some(name.into()),
        ..console(id)
    }
}

/// Port, event, value, what follows.
pub type Message = (u32, u16, u16, Vec<u8>);

pub fn message(port: u32, event: u16, value: u16) -> Message {
    (port, event, value, Vec::new())
}

pub struct Rig {
    pub rig: device::Rig,
    pub console: Arc<VirtioConsole>,
    /// Of ports 0 and 1.
    pub wires: [Arc<Wire>; 2],
    pub events: Receiver<ConsoleEvent>,
    posted: HashMap<(u16, u16), (Gpa, usize)>,
}

impl Deref for Rig {
    type Target = device::Rig;

    fn deref(&self) -> &device::Rig {
        &self.rig
    }
}

impl DerefMut for Rig {
    fn deref_mut(&mut self) -> &mut device::Rig {
        &mut self.rig
    }
}

impl Rig {
    /// The driver is there and has said nothing. Port 0 is a console, port 1 a pipe named "org.ebbtide.1"; port 2 is free.
    /// Somebody listens on the console.
    pub fn with(wanted: u64) -> Rig {
        let board = Board::new(32 << 20).unwrap();
        let (sender, events) = channel();
        let spec = ConsoleSpec {
            max_ports: MAX_PORTS,
            size: Some(SIZE),
            events: Some(sender),
            ..ConsoleSpec::new("serial0")
        };
        let device = VirtioConsole::new(spec, board.remote()).unwrap();
        let wires = [Wire::new(), Wire::new()];
        wires[0].listen(true);
        let [first, second] = &wires;
        assert_eq!(device.add_port(console("hvc"), first), Ok(0));
        let pipe = serial("pipe", "org.ebbtide.1");
        assert_eq!(device.add_port(pipe, second), Ok(1));
        let rig = device::Rig::new(board, Arc::clone(&device) as _, wanted, &SIZES);
        Rig {
            rig,
            console: device,
            wires,
            events,
            posted: HashMap::new(),
        }
    }

    /// The driver has set up both ports and opened them.
    pub fn new() -> Rig {
        let mut rig = Rig::with(ALL);
        rig.set_up();
        rig
    }

    pub fn restart(&mut self, wanted: u64) {
        self.posted.clear();
        self.rig.restart(wanted);
    }

    /// Goes through the start of a driver, up to open ports.
    pub fn set_up(&mut self) {
        self.post_for_messages(30);
        self.say(0, event::DEVICE_READY, 1);
        assert_eq!(self.hear(), message(0, event::DEVICE_ADD, 0));
        assert_eq!(self.hear(), message(1, event::DEVICE_ADD, 0));
        self.say(0, event::PORT_READY, 1);
        assert_eq!(self.hear(), message(0, event::CONSOLE_PORT, 1));
        assert_eq!(self.hear(), message(0, event::PORT_OPEN, 1));
        self.say(1, event::PORT_READY, 1);
        let name = (1, event::PORT_NAME, 1, b"org.ebbtide.1".to_vec());
        assert_eq!(self.hear(), name);
        if self.wires[1].is_listening() {
            assert_eq!(self.hear(), message(1, event::PORT_OPEN, 1));
        }
        self.say(0, event::PORT_OPEN, 1);
        self.say(1, event::PORT_OPEN, 1);
    }

    pub fn post(&mut self, queue: u16, len: usize) {
        let gpa = self.board.ram().alloc(len, 1);
        let head = self.add(queue, &[Part::writable(gpa, len)], Layout::Direct);
        self.posted.insert((queue, head), (gpa, len));
    }

    pub fn post_for_messages(&mut self, count: usize) {
        (0..count).for_each(|_| self.post(TO_DRIVER, 300));
    }

    /// What the device put into the next used buffer of a queue.
    pub fn buffer(&mut self, queue: u16) -> Vec<u8> {
        let used = self.used(queue);
        let (gpa, len) = self.posted.remove(&(queue, used.head)).expect("posted");
        let bytes = self.board.ram().read(gpa, used.written as usize);
        self.board.ram().free(gpa, len);
        bytes
    }

    /// The next message of the device.
    pub fn hear(&mut self) -> Message {
        let bytes = self.buffer(TO_DRIVER);
        let (head, tail) = bytes.split_at(8);
        let port = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
        let half = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
        (port, half(4), half(6), tail.to_vec())
    }

    /// Sends a chain with these bytes; returns when the device has given it back.
    pub fn transmit(&mut self, queue: u16, bytes: &[u8]) {
        self.make_available(queue, bytes);
        assert_eq!(self.used(queue).written, 0);
    }

    /// Adds a chain with these bytes.
    pub fn make_available(&mut self, queue: u16, bytes: &[u8]) {
        let gpa = self.board.ram().alloc(bytes.len(), 1);
        self.board.ram().write(gpa, bytes);
        self.add(queue, &[Part::readable(gpa, bytes.len())], Layout::Direct);
    }

    pub fn say(&mut self, port: u32, event: u16, value: u16) {
        let mut bytes = port.to_le_bytes().to_vec();
        bytes.extend([event.to_le_bytes(), value.to_le_bytes()].concat());
        self.transmit(FROM_DRIVER, &bytes);
    }

    /// Bytes get through each way of the console.
    pub fn assert_works(&mut self) {
        assert!(!self.driver.needs_reset());
        self.wires[0].take();
        self.transmit(tx(0), b"there");
        assert_eq!(self.wires[0].take(), b"there");
        self.post(rx(0), 100);
        self.wires[0].receive(b"back");
        assert_eq!(self.buffer(rx(0)), b"back");
    }
}
