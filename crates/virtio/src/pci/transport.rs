// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The structures in the BAR: what each register does.

use std::sync::{Arc, OnceLock};

use ebbtide_bus::log_limit::LogLimit;
use ebbtide_gate::Handle;
use ebbtide_iothread::Remote;
use ebbtide_memory::{AddressSpace, Mmio, Region};

use super::layout::{self, COMMON, DEVICE, ISR};
use super::registers::{QueueRegisters, Registers, Shown, Write};
use super::session::Phase;
use super::vectors::Vectors;
use crate::control::Link;
use crate::device::VirtioDevice;
use crate::features;
use crate::sync::{Mutex, lock};
use crate::virtq::{Queue, QueueError};

/// Everything behind the gate of a [`VirtioPci`](super::VirtioPci) except its configuration space.
pub(super) struct Transport {
    pub(super) name: String,
    pub(super) device: Arc<dyn VirtioDevice>,
    pub(super) space: Arc<AddressSpace>,
    pub(super) remote: Remote,
    pub(super) link: Arc<Link>,
    pub(super) vectors: Arc<Vectors>,
    /// Taken by vCPU threads and by the end of a reset; never by the device's threads.
    pub(super) state: Mutex<State>,
    pub(super) wiring: OnceLock<Wiring>,
    pub(super) complaints: LogLimit,
}

/// What refers back to the transport and therefore exists only after it.
pub(super) struct Wiring {
    /// The BAR's region, on which ioeventfds are placed.
    pub(super) region: Arc<Region>,
    /// For what outlives a register access: the end of a reset.
    pub(super) handle: Handle<Transport>,
}

pub(super) struct State {
    pub(super) registers: Registers,
    pub(super) phase: Phase,
}

impl Transport {
    /// The features offered: the device's own and the transport's.
    pub(super) fn offered(&self) -> u64 {
        self.device.features() & features::DEVICE_OWN | features::TRANSPORT
    }

    /// Reads `size` bytes at `offset` of the BAR. What is not a register reads as zero.
    pub(super) fn read(&self, offset: u64, size: u8) -> u64 {
        let mut bytes = [0; 8];
        let Some(wanted) = bytes.get_mut(..usize::from(size)) else {
            return 0;
        };
        if DEVICE.contains(&offset) {
            self.link
                .read_config(|| self.device.read_config(offset - DEVICE.start, wanted));
        } else if ISR.contains(&offset) {
            wanted.fill(0);
            wanted
                .iter_mut()
                .take(1)
                .for_each(|byte| *byte = self.vectors.take_isr());
        } else if COMMON.contains(&offset) {
            self.read_common(offset as usize, wanted);
        }
        u64::from_le_bytes(bytes)
    }

    fn read_common(&self, offset: usize, wanted: &mut [u8]) {
        let state = lock(&self.state);
        let registers = &state.registers;
        let image = registers.image(&Shown {
            device_features: self.offered(),
            config_vector: self.vectors.config_vector(),
            queue_vector: self.vectors.queue_vector(registers.queue_select),
            status: self.link.status().get(),
            generation: self.link.config_generation(),
        });
        for (to, from) in wanted.iter_mut().zip(image.iter().skip(offset)) {
            *to = *from;
        }
    }

    /// Writes `size` bytes at `offset` of the BAR. What is not a register, or not a whole one, takes nothing.
    pub(super) fn write(&self, offset: u64, size: u8, value: u64) {
        if COMMON.contains(&offset) {
            match Write::decode(offset, size, value) {
                Some(write) => self.write_common(write),
                None => self.complain(|| {
                    format!("write of {size} bytes at {offset:#x} of the common configuration")
                }),
            }
        } else if DEVICE.contains(&offset) {
            let bytes = value.to_le_bytes();
            let Some(bytes) = bytes.get(..usize::from(size)) else {
                return;
            };
            if !lock(&self.state).phase.is_ending() {
                self.link
                    .write_config(|| self.device.write_config(offset - DEVICE.start, bytes));
            }
        } else if offset >= layout::NOTIFY {
            self.notify(offset - layout::NOTIFY);
        }
    }

    /// A kick that did not take the short way through an ioeventfd.
    fn notify(&self, offset: u64) {
        let stride = u64::from(layout::NOTIFY_STRIDE);
        if offset.is_multiple_of(stride) {
            lock(&self.state).phase.kick(offset / stride);
        }
    }

    fn write_common(&self, write: Write) {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        // A driver that resets has to wait until the status reads 0; what it writes before that is lost.
        if state.phase.is_ending() && write != Write::Status(0) {
            return;
        }
        let registers = &mut state.registers;
        match write {
            Write::DeviceFeatureSelect(select) => registers.device_feature_select = select,
            Write::DriverFeatureSelect(select) => registers.driver_feature_select = select,
            Write::DriverFeature(word) => {
                // Settled by FEATURES_OK (3.1.1).
                if self.link.status().get() & crate::status::FEATURES_OK == 0 {
                    registers.set_driver_feature(word);
                }
            }
            Write::ConfigVector(vector) => self.vectors.set_config_vector(vector),
            Write::Status(status) => self.write_status(state, status),
            Write::QueueSelect(select) => registers.queue_select = select,
            Write::QueueSize(size) => {
                let max = self
                    .device
                    .queue_sizes()
                    .get(usize::from(registers.queue_select))
                    .copied();
                if let (Some(queue), Some(max)) = (registers.programmable(), max)
                    && size.is_power_of_two()
                    && size <= max
                {
                    queue.config.size = size;
                }
            }
            Write::QueueVector(vector) => self
                .vectors
                .set_queue_vector(registers.queue_select, vector),
            Write::QueueEnable(enable) => {
                if enable == 1 {
                    self.enable_queue(state);
                }
            }
            Write::QueueRing { ring, mask, value } => registers.set_ring(ring, mask, value),
        }
    }

    /// Enables the selected queue if its rings are usable; marks the device otherwise.
    fn enable_queue(&self, state: &mut State) {
        // Too late for the activation, which has taken its queues (4.1.4.3.2: before DRIVER_OK).
        if state.phase.is_active() {
            self.complain(|| "queue enabled behind DRIVER_OK".to_owned());
            return;
        }
        let features = state.registers.driver_features;
        let select = state.registers.queue_select;
        let Some(queue) = state.registers.programmable() else {
            return;
        };
        match self.check_queue(queue, features) {
            Ok(()) => queue.enabled = true,
            Err(error) => {
                self.complain(|| format!("queue {select} cannot be enabled: {error}"));
                self.link
                    .control(Some(self.link.status().session()))
                    .needs_reset();
            }
        }
    }

    fn check_queue(&self, queue: &QueueRegisters, features: u64) -> Result<(), QueueError> {
        let queue = Queue::new(&self.space, queue.config, features)?;
        let reader = self.space.memory().register();
        queue.check(&self.space.read(&reader))
    }

    /// Logs what the driver did wrong, now and then.
    pub(super) fn complain(&self, what: impl FnOnce() -> String) {
        if let Some(suppressed) = self.complaints.allow() {
            tracing::warn!(device = self.name, suppressed, "{}", what());
        }
    }
}

impl Mmio for Transport {
    fn read(&self, offset: u64, size: u8) -> u64 {
        self.read(offset, size)
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        self.write(offset, size, value);
    }
}
