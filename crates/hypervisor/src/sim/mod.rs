// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A hypervisor without a processor, for tests: what guests do is scripted, what a hypervisor is asked to do is recorded.
//!
//! A [`Script`] plays a vCPU's guest: each [`Step`] is one access or one reason to leave the guest. Slots, ioeventfds,
//! messages and lines can be looked at; messages can be waited for. A store to an ioeventfd signals it and does not exit,
//! as with KVM.

mod interrupts;
mod map;
mod vcpu;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ebbtide_bus::irq::{IrqLine, MsiController, MsiMessage};
use ebbtide_memory::Listener;

pub use interrupts::{LineRecord, NextMessage};
pub use map::{SimIoeventfd, SimSlot};
pub use vcpu::{Script, Step};

use crate::{ChipState, Error, Holdings, Limits, Vcpu, Vm};
use interrupts::Interrupts;
use map::{Doorbells, SimMemoryListener, SimPortListener, Slots};
use vcpu::SimVcpu;

/// What a machine of this double can have unless it is told otherwise.
pub const DEFAULT_LIMITS: Limits = Limits {
    slots: 512,
    phys_bits: 46,
    vcpus: 254,
    tsc_khz: Some(1_000_000),
};

/// A machine of the double.
pub struct SimVm {
    limits: Limits,
    slots: Arc<Slots>,
    memory_doorbells: Arc<Doorbells>,
    port_doorbells: Arc<Doorbells>,
    interrupts: Arc<Interrupts>,
    scripts: Mutex<Vec<Script>>,
    clock_ns: Mutex<u64>,
}

/// The chips of the double have no state of their own; this tells them from others'.
struct SimChips;

impl SimVm {
    /// A machine with [`DEFAULT_LIMITS`].
    pub fn new() -> Arc<Self> {
        Self::with_limits(DEFAULT_LIMITS)
    }

    /// A machine with limits to run into.
    pub fn with_limits(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            slots: Slots::new(limits),
            memory_doorbells: Arc::default(),
            port_doorbells: Arc::default(),
            interrupts: Interrupts::new(),
            scripts: Mutex::default(),
            clock_ns: Mutex::default(),
        })
    }

    /// What the guest of vCPU `index` does; may be written before and while it runs.
    pub fn script(&self, index: u8) -> Script {
        let mut scripts = lock(&self.scripts);
        if let Some(script) = scripts.iter().find(|script| script.index() == index) {
            return script.clone();
        }
        let script = Script::new(
            index,
            Arc::clone(&self.memory_doorbells),
            Arc::clone(&self.port_doorbells),
        );
        scripts.push(script.clone());
        script
    }

    /// The memory slots, by address.
    pub fn slots(&self) -> Vec<SimSlot> {
        self.slots.list()
    }

    /// Refuses the next `count` new slots.
    pub fn refuse_slots(&self, count: u32) {
        self.slots.refuse(count);
    }

    /// The ioeventfds of the memory address space.
    pub fn memory_ioeventfds(&self) -> Vec<SimIoeventfd> {
        self.memory_doorbells.list()
    }

    /// The ioeventfds of the port address space.
    pub fn port_ioeventfds(&self) -> Vec<SimIoeventfd> {
        self.port_doorbells.list()
    }

    /// A guest's store to memory as KVM sees it first: if an ioeventfd waits for it, signals that and returns true; else
    /// the store would exit.
    pub fn ring_memory(&self, gpa: u64, data: &[u8]) -> bool {
        self.memory_doorbells.ring(gpa, data)
    }

    /// As [`ring_memory`](Self::ring_memory), for a port.
    pub fn ring_port(&self, port: u16, data: &[u8]) -> bool {
        self.port_doorbells.ring(port.into(), data)
    }

    /// Takes the messages signalled and not taken yet, oldest first.
    pub fn take_messages(&self) -> Vec<MsiMessage> {
        self.interrupts.take_messages()
    }

    /// The oldest message not taken yet, or the next one.
    pub fn next_message(&self) -> NextMessage {
        self.interrupts.next_message()
    }

    /// As [`next_message`](Self::next_message), blocking; `None` when `limit` is over.
    pub fn wait_message(&self, limit: Duration) -> Option<MsiMessage> {
        self.interrupts.wait_message(limit)
    }

    /// MSI routes in use.
    pub fn routes_in_use(&self) -> usize {
        self.interrupts.routes_in_use()
    }

    /// What happened to line `gsi`.
    pub fn line(&self, gsi: u32) -> LineRecord {
        self.interrupts.line_record(gsi)
    }
}

impl Vm for SimVm {
    fn create_vcpu(&self, index: u8, cpus: u8) -> Result<Box<dyn Vcpu>, Error> {
        let script = self.script(index);
        let refused = |kind: std::io::ErrorKind| {
            Err(Error::refused(
                "creating a vcpu",
                format!("vcpu {index}"),
                kind,
            ))
        };
        if index >= cpus || cpus > self.limits.vcpus {
            return refused(std::io::ErrorKind::InvalidInput);
        }
        if !script.take_guest() {
            return refused(std::io::ErrorKind::AlreadyExists);
        }
        Ok(Box::new(SimVcpu::new(script)))
    }

    fn memory_listener(&self) -> Box<dyn Listener> {
        Box::new(SimMemoryListener::new(
            Arc::clone(&self.slots),
            Arc::clone(&self.memory_doorbells),
        ))
    }

    fn port_listener(&self) -> Box<dyn Listener> {
        Box::new(SimPortListener::new(Arc::clone(&self.port_doorbells)))
    }

    fn msi(&self) -> Arc<dyn MsiController> {
        Arc::clone(&self.interrupts) as Arc<dyn MsiController>
    }

    fn irq_line(&self, gsi: u32) -> Result<Arc<dyn IrqLine>, Error> {
        self.interrupts.line(gsi)
    }

    fn save_chips(&self) -> Result<ChipState, Error> {
        Ok(ChipState(Box::new(SimChips)))
    }

    fn restore_chips(&self, state: &ChipState) -> Result<(), Error> {
        match state.0.downcast_ref() {
            Some(SimChips) => Ok(()),
            None => Err(Error::ForeignState {
                object: "the interrupt controllers".to_owned(),
            }),
        }
    }

    fn clock_ns(&self) -> Result<u64, Error> {
        Ok(*lock(&self.clock_ns))
    }

    fn set_clock_ns(&self, clock_ns: u64) -> Result<(), Error> {
        *lock(&self.clock_ns) = clock_ns;
        Ok(())
    }

    /// It keeps no table of messages: there are none in it.
    fn holdings(&self) -> Holdings {
        Holdings {
            slots: self.slots.list().len(),
            ioeventfds: self.memory_doorbells.list().len() + self.port_doorbells.list().len(),
            irqfds: self.interrupts.routes_in_use(),
            messages: 0,
        }
    }

    fn limits(&self) -> Limits {
        self.limits
    }
}

/// A panicking test must not hide its reason behind a second one.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
