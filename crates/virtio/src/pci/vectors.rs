// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which MSI-X vector tells what, and the ISR status byte (4.1.4.5, 4.1.5.1.2).

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use ebbtide_bus::pci::{Msix, MsixVector};

use super::layout::NO_VECTOR;
use crate::interrupt::Interrupts;

/// ISR status: a queue was used.
const ISR_QUEUE: u8 = 1;
/// ISR status: the configuration changed.
const ISR_CONFIG: u8 = 2;

pub(super) struct Vectors {
    vectors: Box<[MsixVector]>,
    config: AtomicU16,
    queues: Box<[AtomicU16]>,
    isr: AtomicU8,
}

impl Vectors {
    /// For `queues` queues, none of which has a vector yet.
    pub(super) fn new(msix: &Arc<Msix>, queues: u16) -> Self {
        Self {
            vectors: (0..msix.vector_count())
                .filter_map(|index| msix.vector(index))
                .collect(),
            config: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
        }
    }

    /// The vector of configuration changes.
    pub(super) fn config_vector(&self) -> u16 {
        self.config.load(Ordering::Relaxed)
    }

    /// Sets the vector of configuration changes; one that does not exist reads back as "no vector".
    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config.store(self.existing(vector), Ordering::Relaxed);
    }

    /// The vector of a queue; "no vector" for a queue that does not exist.
    pub(super) fn queue_vector(&self, queue: u16) -> u16 {
        self.queues
            .get(usize::from(queue))
            .map_or(NO_VECTOR, |vector| vector.load(Ordering::Relaxed))
    }

    /// Sets the vector of a queue; one that does not exist reads back as "no vector".
    pub(super) fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(field) = self.queues.get(usize::from(queue)) {
            field.store(self.existing(vector), Ordering::Relaxed);
        }
    }

    /// Reads and clears the ISR status.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    /// Back to power-on.
    pub(super) fn reset(&self) {
        let Self {
            vectors: _,
            config,
            queues,
            isr,
        } = self;
        config.store(NO_VECTOR, Ordering::Relaxed);
        for queue in queues {
            queue.store(NO_VECTOR, Ordering::Relaxed);
        }
        isr.store(0, Ordering::Release);
    }

    fn existing(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.vectors.len() {
            vector
        } else {
            NO_VECTOR
        }
    }

    fn set_isr(&self, bit: u8) {
        // Usually nobody reads it, so it is set already.
        if self.isr.load(Ordering::Acquire) & bit == 0 {
            self.isr.fetch_or(bit, Ordering::AcqRel);
        }
    }

    fn signal(&self, vector: u16) {
        if let Some(vector) = self.vectors.get(usize::from(vector)) {
            vector.signal();
        }
    }
}

impl Interrupts for Vectors {
    fn queue(&self, index: u16) {
        // Demanded without MSI-X, allowed with it (4.1.4.5.1). There is no INTx behind it: a driver without MSI-X polls.
        self.set_isr(ISR_QUEUE);
        self.signal(self.queue_vector(index));
    }

    fn config(&self) {
        // This bit is set whether or not there is a vector (4.1.4.5.1).
        self.set_isr(ISR_CONFIG);
        self.signal(self.config_vector());
    }
}
