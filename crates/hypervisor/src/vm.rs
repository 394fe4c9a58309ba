// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machine as a hypervisor sees it: processors, memory slots, interrupt controllers.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use ebbtide_bus::irq::{IrqLine, MsiController};
use ebbtide_memory::Listener;

use crate::{Error, Vcpu};

/// A machine inside a hypervisor. Shared by all threads.
pub trait Vm: Send + Sync {
    /// Creates processor `index` of a machine that has `cpus` of them.
    ///
    /// # Errors
    /// The index is taken or too high, or the host is out of resources.
    fn create_vcpu(&self, index: u8, cpus: u8) -> Result<Box<dyn Vcpu>, Error>;

    /// What turns the RAM of the memory address space into slots, and its ioeventfds into the hypervisor's. One per
    /// machine.
    fn memory_listener(&self) -> Box<dyn Listener>;

    /// What turns the ioeventfds of the port address space into the hypervisor's. One per machine.
    fn port_listener(&self) -> Box<dyn Listener>;

    /// The controller of message-signalled interrupts.
    fn msi(&self) -> Arc<dyn MsiController>;

    /// Input `gsi` of the I/O APIC, 0 to 23. One holder at a time; dropping the line lowers it.
    ///
    /// # Errors
    /// No such input, or it is taken.
    fn irq_line(&self, gsi: u32) -> Result<Arc<dyn IrqLine>, Error>;

    /// The state of the interrupt controllers that belong to no processor.
    ///
    /// # Errors
    /// The hypervisor refused to tell.
    fn save_chips(&self) -> Result<ChipState, Error>;

    /// Goes back to a saved state. A line that is high afterwards must be driven low and high again to be seen.
    ///
    /// # Errors
    /// The state is another hypervisor's, or was refused.
    fn restore_chips(&self, state: &ChipState) -> Result<(), Error>;

    /// The guest's clock, in nanoseconds since the machine was made.
    ///
    /// # Errors
    /// The hypervisor refused to tell.
    fn clock_ns(&self) -> Result<u64, Error>;

    /// Sets the guest's clock: a stopped machine goes on at the time it stopped. No processor may be running.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn set_clock_ns(&self, clock_ns: u64) -> Result<(), Error>;

    /// What the hypervisor can carry.
    fn limits(&self) -> Limits;

    /// What the hypervisor has of the machine's resources, as far as it has confirmed to have taken or given it back.
    fn holdings(&self) -> Holdings;
}

/// How much of what devices and memory need a hypervisor has: the same before and after they came and went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holdings {
    /// Memory slots.
    pub slots: usize,
    /// Ioeventfds, of memory and ports.
    pub ioeventfds: usize,
    /// Irqfds.
    pub irqfds: usize,
    /// Messages in the routing table the hypervisor was given last.
    pub messages: usize,
}

/// What a hypervisor can carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Memory slots of one machine.
    pub slots: usize,
    /// Width of a guest physical address in bits. Nothing can be mapped at or above `1 << phys_bits`.
    pub phys_bits: u8,
    /// Processors of one machine.
    pub vcpus: u8,
    /// Frequency of the guest's time stamp counter; known once there is a processor, if the host knows it.
    pub tsc_khz: Option<u32>,
}

/// The state of a machine's interrupt controllers, opaque; only a machine of the same hypervisor takes it back.
pub struct ChipState(pub(crate) Box<dyn Any + Send + Sync>);

impl fmt::Debug for ChipState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ChipState")
    }
}
