// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ports of a device, and what the driver is still to be told of them.
//!
//! ```text
//!   port added ──ADD──▶ the driver says it is ready ──CONSOLE, NAME, OPEN──▶ in use ──▶ port removed ──REMOVE──▶
//! ```
//!
//! What is owed is a set of bits for each port, turned into messages when the driver has room for them: a message says
//! what is so at that moment. Locks: the driver's, then one port's.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ebbtide_bus::log_limit::LogLimit;
use ebbtide_devices::chardev::Wire;
use ebbtide_iothread::{Sender, Signal};

use super::{ConsoleError, ConsoleEvent, NAME_BYTES_MAX, PortKind, PortSpec, Size, feature};

/// Messages to the driver (5.3.6.2), as bits of what is owed, in the order they are sent in.
mod owed {
    pub(super) const REMOVE: u8 = 1 << 0;
    pub(super) const ADD: u8 = 1 << 1;
    pub(super) const CONSOLE: u8 = 1 << 2;
    pub(super) const NAME: u8 = 1 << 3;
    pub(super) const OPEN: u8 = 1 << 4;
    pub(super) const RESIZE: u8 = 1 << 5;
}

/// `event` of a control message.
pub(super) mod event {
    pub(in crate::console) const DEVICE_READY: u16 = 0;
    pub(in crate::console) const DEVICE_ADD: u16 = 1;
    pub(in crate::console) const DEVICE_REMOVE: u16 = 2;
    pub(in crate::console) const PORT_READY: u16 = 3;
    pub(in crate::console) const CONSOLE_PORT: u16 = 4;
    pub(in crate::console) const RESIZE: u16 = 5;
    pub(in crate::console) const PORT_OPEN: u16 = 6;
    pub(in crate::console) const PORT_NAME: u16 = 7;
}

/// A control message without what may follow it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message {
    pub port: u32,
    pub event: u16,
    pub value: u16,
}

impl Message {
    pub(super) const BYTES: usize = 8;

    pub(super) fn parse(bytes: &[u8; Self::BYTES]) -> Message {
        let [p0, p1, p2, p3, e0, e1, v0, v1] = *bytes;
        Message {
            port: u32::from_le_bytes([p0, p1, p2, p3]),
            event: u16::from_le_bytes([e0, e1]),
            value: u16::from_le_bytes([v0, v1]),
        }
    }

    fn to_bytes(self) -> Vec<u8> {
        let mut bytes = self.port.to_le_bytes().to_vec();
        bytes.extend(self.event.to_le_bytes());
        bytes.extend(self.value.to_le_bytes());
        bytes
    }
}

/// What a console device has done, since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ConsoleMetrics {
    /// Bytes of the driver that went to a wire, or nowhere if nobody listened or the port was gone.
    pub sent_bytes: u64,
    /// Bytes given to the driver.
    pub received_bytes: u64,
    /// Control messages that are none, and buffers for them that are too small.
    pub malformed: u64,
    /// Chains with memory that is no RAM.
    pub bad_memory: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub sent_bytes: AtomicU64,
    pub received_bytes: AtomicU64,
    pub malformed: AtomicU64,
    pub bad_memory: AtomicU64,
}

impl Counters {
    pub(super) fn add(counter: &AtomicU64, count: usize) {
        counter.fetch_add(count as u64, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self) -> ConsoleMetrics {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ConsoleMetrics {
            sent_bytes: load(&self.sent_bytes),
            received_bytes: load(&self.received_bytes),
            malformed: load(&self.malformed),
            bad_memory: load(&self.bad_memory),
        }
    }
}

/// All of them.
pub(super) struct Ports {
    name: String,
    slots: Vec<Slot>,
    driver: Mutex<Driver>,
    /// Raised when something more is owed.
    pub outbox: Signal,
    pub counters: Counters,
    /// What the driver does wrong.
    pub complaints: LogLimit,
    size: Option<Size>,
    events: Option<Sender<ConsoleEvent>>,
}

#[derive(Default)]
struct Driver {
    /// Which one, counted.
    epoch: u64,
    /// It said that it is ready to hear of ports.
    ready: bool,
    features: u64,
}

/// Where a port may be.
#[derive(Default)]
pub(super) struct Slot {
    state: Mutex<State>,
    /// Raised when another port is here, or the driver opened it.
    pub changed: Signal,
}

#[derive(Default)]
struct State {
    port: Option<Port>,
    owed: u8,
    /// The driver was told that there is a port.
    announced: bool,
    /// The driver has set the port up.
    ready: bool,
    /// The driver has it open.
    guest_open: bool,
    /// The driver was told that we have it open.
    host_open_told: bool,
}

struct Port {
    id: String,
    kind: PortKind,
    name: Option<String>,
    wire: Arc<Wire>,
    size: Option<Size>,
}

impl Port {
    fn host_open(&self) -> bool {
        self.kind == PortKind::Console || self.wire.is_listening()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ports {
    pub(super) fn new(
        name: String,
        count: u32,
        size: Option<Size>,
        events: Option<Sender<ConsoleEvent>>,
    ) -> Arc<Ports> {
        Arc::new(Ports {
            name,
            slots: (0..count).map(|_| Slot::default()).collect(),
            driver: Mutex::default(),
            outbox: Signal::new(),
            counters: Counters::default(),
            complaints: LogLimit::default(),
            size,
            events,
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn slot(&self, number: u32) -> Option<&Slot> {
        self.slots.get(usize::try_from(number).ok()?)
    }

    /// The size of port 0, or what it will be.
    pub(super) fn console_size(&self) -> Option<Size> {
        let first = self.slots.first()?;
        let state = lock(&first.state);
        state.port.as_ref().map_or(self.size, |port| port.size)
    }

    pub(super) fn add(&self, spec: PortSpec, wire: &Arc<Wire>) -> Result<u32, ConsoleError> {
        let driver = lock(&self.driver);
        self.check_name(spec.name.as_deref())?;
        let number = self.free_number(&spec)?;
        let Some(slot) = self.slot(number) else {
            return Err(self.no_such_port(number));
        };
        let PortSpec { id, kind, name, .. } = spec;
        let mut state = lock(&slot.state);
        state.port = Some(Port {
            id,
            kind,
            name,
            wire: Arc::clone(wire),
            size: self.size,
        });
        if driver.ready {
            state.owed |= owed::ADD;
        }
        drop((state, driver));
        slot.changed.raise();
        self.outbox.raise();
        Ok(number)
    }

    pub(super) fn remove(&self, number: u32) -> Result<(), ConsoleError> {
        let _driver = lock(&self.driver);
        let Some(slot) = self.slot(number) else {
            return Err(self.no_such_port(number));
        };
        let mut state = lock(&slot.state);
        let Some(port) = state.port.take() else {
            drop(state);
            return Err(self.no_such_port(number));
        };
        let was_open = state.guest_open;
        // Of a port it has not heard of yet it need not hear.
        let owed = if state.announced {
            owed::REMOVE
        } else {
            state.owed & owed::REMOVE
        };
        *state = State {
            owed,
            ..State::default()
        };
        drop(state);
        if was_open {
            self.tell(port.id, false);
        }
        slot.changed.raise();
        self.outbox.raise();
        Ok(())
    }

    pub(super) fn resize(&self, number: u32, size: Size) -> Result<(), ConsoleError> {
        let driver = lock(&self.driver);
        let Some(slot) = self.slot(number) else {
            return Err(self.no_such_port(number));
        };
        let mut state = lock(&slot.state);
        let ready = state.ready && driver.features & feature::SIZE != 0;
        let Some(port) = &mut state.port else {
            drop(state);
            return Err(self.no_such_port(number));
        };
        port.size = Some(size);
        if ready && port.kind == PortKind::Console {
            state.owed |= owed::RESIZE;
        }
        drop((state, driver));
        self.outbox.raise();
        Ok(())
    }

    fn check_name(&self, name: Option<&str>) -> Result<(), ConsoleError> {
        let Some(name) = name else {
            return Ok(());
        };
        let device = self.name.clone();
        if !(1..=NAME_BYTES_MAX).contains(&name.len()) || name.contains(['\0', '/']) {
            let name = name.to_owned();
            return Err(ConsoleError::Name { device, name });
        }
        let taken = self.slots.iter().any(|slot| {
            let state = lock(&slot.state);
            let port = state.port.as_ref();
            port.is_some_and(|port| port.name.as_deref() == Some(name))
        });
        if taken {
            let name = name.to_owned();
            return Err(ConsoleError::NameTaken { device, name });
        }
        Ok(())
    }

    fn free_number(&self, spec: &PortSpec) -> Result<u32, ConsoleError> {
        let device = self.name.clone();
        let max = u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
        let holder = |number| {
            let state = lock(&self.slot(number)?.state);
            state.port.as_ref().map(|port| port.id.clone())
        };
        let first = match spec.kind {
            PortKind::Console => 0,
            PortKind::Serial => 1,
        };
        let Some(number) = spec.number else {
            let free = (first..max).find(|&number| holder(number).is_none());
            return free.ok_or_else(|| ConsoleError::NoPortFree {
                device,
                id: spec.id.clone(),
                max,
            });
        };
        if number >= max {
            return Err(ConsoleError::PortNumber {
                device,
                number,
                max,
            });
        }
        if number < first {
            let id = spec.id.clone();
            return Err(ConsoleError::PortZero { device, id });
        }
        match holder(number) {
            None => Ok(number),
            Some(by) => Err(ConsoleError::PortTaken { device, number, by }),
        }
    }

    fn no_such_port(&self, number: u32) -> ConsoleError {
        ConsoleError::NoSuchPort {
            device: self.name.clone(),
            number,
        }
    }

    fn tell(&self, id: String, open: bool) {
        if let Some(events) = &self.events {
            events.send(ConsoleEvent::PortChange { id, open });
        }
    }

    // --- the driver ---------------------------------------------------------------------------

    pub(super) fn new_driver(&self, features: u64) {
        let mut driver = lock(&self.driver);
        self.forget(&mut driver);
        driver.features = features;
    }

    /// The number of the driver that is there now.
    pub(super) fn epoch(&self) -> u64 {
        lock(&self.driver).epoch
    }

    /// The driver number `epoch` is gone. Does nothing when there is another already.
    pub(super) fn driver_gone(&self, epoch: u64) {
        let mut driver = lock(&self.driver);
        if driver.epoch == epoch {
            self.forget(&mut driver);
        }
    }

    fn forget(&self, driver: &mut Driver) {
        *driver = Driver {
            epoch: driver.epoch.wrapping_add(1),
            ..Driver::default()
        };
        for slot in &self.slots {
            let mut state = lock(&slot.state);
            let port = state.port.take();
            let was_open = state.guest_open;
            let id = port.as_ref().map(|port| port.id.clone());
            *state = State {
                port,
                ..State::default()
            };
            drop(state);
            if let Some(id) = id.filter(|_| was_open) {
                self.tell(id, false);
            }
        }
    }

    /// What the driver says. False: that is nothing a driver says.
    pub(super) fn hear(&self, message: Message) -> bool {
        let Message { port, event, value } = message;
        if event == event::DEVICE_READY {
            self.device_ready(value != 0);
            return true;
        }
        let Some(slot) = self.slot(port) else {
            return false;
        };
        let known = match event {
            event::PORT_READY => slot.port_ready(value != 0),
            event::PORT_OPEN => {
                if let Some(id) = slot.guest_opens(value != 0) {
                    self.tell(id, value != 0);
                }
                slot.changed.raise();
                true
            }
            _ => false,
        };
        self.outbox.raise();
        known
    }

    fn device_ready(&self, ready: bool) {
        let mut driver = lock(&self.driver);
        driver.ready = ready;
        for slot in &self.slots {
            let mut state = lock(&slot.state);
            if ready && state.port.is_some() {
                state.owed |= owed::ADD;
            }
        }
        drop(driver);
        self.outbox.raise();
    }

    /// Whether there is a message for the driver.
    pub(super) fn owes(&self) -> bool {
        self.slots.iter().any(|slot| lock(&slot.state).owed != 0)
    }

    /// The next message for the driver.
    pub(super) fn next_message(&self) -> Option<Vec<u8>> {
        let mut slots = (0..).zip(&self.slots);
        slots.find_map(|(number, slot)| lock(&slot.state).next_message(number))
    }
}

impl State {
    fn next_message(&mut self, port: u32) -> Option<Vec<u8>> {
        while self.owed != 0 {
            let bit = 1 << self.owed.trailing_zeros();
            self.owed &= !bit;
            if let Some(message) = self.message(port, bit) {
                return Some(message);
            }
        }
        None
    }

    /// `None`: it is not so any more.
    fn message(&mut self, port: u32, bit: u8) -> Option<Vec<u8>> {
        let plain = |event, value| Message { port, event, value }.to_bytes();
        if bit == owed::REMOVE {
            return Some(plain(event::DEVICE_REMOVE, 0));
        }
        let there = self.port.as_ref()?;
        match bit {
            owed::ADD => {
                self.announced = true;
                Some(plain(event::DEVICE_ADD, 0))
            }
            owed::CONSOLE => Some(plain(event::CONSOLE_PORT, 1)),
            owed::NAME => {
                let mut bytes = plain(event::PORT_NAME, 1);
                bytes.extend(there.name.as_ref()?.bytes());
                Some(bytes)
            }
            owed::OPEN => {
                self.host_open_told = there.host_open();
                Some(plain(event::PORT_OPEN, self.host_open_told.into()))
            }
            owed::RESIZE => {
                let size = there.size?;
                let mut bytes = plain(event::RESIZE, 0);
                bytes.extend(size.columns.to_le_bytes());
                bytes.extend(size.rows.to_le_bytes());
                Some(bytes)
            }
            _ => None,
        }
    }
}

impl Slot {
    /// The driver has set the port up, or could not. False: there is no such port.
    fn port_ready(&self, ready: bool) -> bool {
        let mut state = lock(&self.state);
        let Some(port) = &state.port else {
            return false;
        };
        let when = |condition, bit| if condition { bit } else { 0 };
        let owed = when(port.kind == PortKind::Console, owed::CONSOLE)
            | when(port.name.is_some(), owed::NAME)
            | when(port.host_open(), owed::OPEN);
        state.ready = ready;
        if ready {
            state.owed |= owed;
        }
        true
    }

    /// The id of the port if that is news.
    fn guest_opens(&self, open: bool) -> Option<String> {
        let mut state = lock(&self.state);
        let id = state.port.as_ref()?.id.clone();
        let was = std::mem::replace(&mut state.guest_open, open);
        (was != open).then_some(id)
    }

    /// Looks whether the driver has to hear that we opened or closed the port.
    pub(super) fn update_host_open(&self, outbox: &Signal) {
        let mut state = lock(&self.state);
        let Some(port) = state.port.as_ref().filter(|_| state.ready) else {
            return;
        };
        if port.host_open() != state.host_open_told && state.owed & owed::OPEN == 0 {
            state.owed |= owed::OPEN;
            drop(state);
            outbox.raise();
        }
    }

    /// The wire of the port that is here, to wait for.
    pub(super) fn wire(&self) -> Option<Arc<Wire>> {
        let state = lock(&self.state);
        state.port.as_ref().map(|port| Arc::clone(&port.wire))
    }

    /// Hands bytes to the port; how many it took. Without a port they go nowhere.
    pub(super) fn offer(&self, bytes: &[u8]) -> usize {
        let state = lock(&self.state);
        state
            .port
            .as_ref()
            .map_or(bytes.len(), |port| port.wire.offer(bytes))
    }

    /// Takes bytes for the driver, as many as there are and fit. With `when_open`, none while it has the port closed.
    pub(super) fn get(&self, bytes: &mut [u8], when_open: bool) -> usize {
        let state = lock(&self.state);
        if when_open && !state.guest_open {
            return 0;
        }
        state.port.as_ref().map_or(0, |port| port.wire.get(bytes))
    }
}
