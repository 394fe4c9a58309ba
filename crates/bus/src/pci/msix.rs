// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! MSI-X (PCI 3.0, 6.8.2): a table of messages in a BAR, masks, pending bits.
//!
//! What becomes of a signal:
//!
//! ```text
//! MSI-X disabled                              dropped: the function has no other interrupt
//! function or vector masked, or no route      pending bit set
//! else                                        message sent
//! ```
//!
//! A pending bit is cleared when its message is sent, which happens as soon as nothing masks it. Each vector has a lock
//! of its own, held while its message is sent: when a guest's write that masks a vector returns, no message of that
//! vector is on its way any more.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ebbtide_memory::Mmio;

use super::PciError;
use crate::gated::all_ones;
use crate::irq::{MsiController, MsiMessage, MsiRoute};
use crate::log_limit::LogLimit;

/// Message control: MSI-X is on.
pub(super) const CONTROL_ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
pub(super) const CONTROL_FUNCTION_MASK: u16 = 1 << 14;

const MAX_VECTORS: u16 = 2048;
/// Bytes of a table entry: message address (two dwords), message data, vector control.
const ENTRY_BYTES: u64 = 16;
/// The smallest part of the BAR for the table or for the pending bits.
const MIN_HALF_BYTES: u64 = 2048;
/// Vector control: the vector is masked.
const VECTOR_MASKED: u32 = 1;
/// The low bits of a message address are zero.
const ADDRESS_MASK: u32 = !3;

/// The MSI-X vectors of one function. As [`Mmio`] it is the BAR that holds the table (from 0 on) and the pending bits
/// (from the middle on).
pub struct Msix {
    vectors: Box<[Vector]>,
    /// Where the pending bits start in the BAR.
    half_bytes: u64,
    delivery: Mutex<Delivery>,
    refused: LogLimit,
}

/// One vector of an [`Msix`], for the device to signal.
#[derive(Clone)]
pub struct MsixVector {
    msix: Arc<Msix>,
    index: u16,
}

/// The function-wide part of whether a vector's message is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Delivery {
    Disabled,
    Masked,
    Enabled,
}

struct Vector {
    route: Arc<dyn MsiRoute>,
    state: Mutex<VectorState>,
}

struct VectorState {
    message: MsiMessage,
    masked: bool,
    pending: bool,
    delivery: Delivery,
    /// What the route delivers.
    programmed: Option<MsiMessage>,
}

impl Msix {
    /// `vectors` masked vectors, each with a route of `controller`.
    ///
    /// # Errors
    /// No such number of vectors, or no routes for them.
    pub fn new(vectors: u16, controller: &dyn MsiController) -> Result<Arc<Self>, PciError> {
        if vectors == 0 || vectors > MAX_VECTORS {
            return Err(PciError::VectorCount(vectors));
        }
        let half_bytes = (u64::from(vectors) * ENTRY_BYTES)
            .next_power_of_two()
            .max(MIN_HALF_BYTES);
        let vectors = (0..vectors)
            .map(|_| Ok(Vector::new(controller.route()?)))
            .collect::<Result<_, PciError>>()?;
        Ok(Arc::new(Self {
            vectors,
            half_bytes,
            delivery: Mutex::new(Delivery::Disabled),
            refused: LogLimit::default(),
        }))
    }

    /// How many vectors there are.
    pub fn vector_count(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// Vector `index`, if there is one.
    pub fn vector(self: &Arc<Self>, index: u16) -> Option<MsixVector> {
        (index < self.vector_count()).then(|| MsixVector {
            msix: Arc::clone(self),
            index,
        })
    }

    /// Whether the guest has turned MSI-X on.
    pub fn enabled(&self) -> bool {
        *self.delivery.lock().unwrap_or_else(PoisonError::into_inner) != Delivery::Disabled
    }

    /// Bytes of the BAR with the table and the pending bits.
    pub fn bar_size_bytes(&self) -> u64 {
        2 * self.half_bytes
    }

    /// Offset of the pending bits in the BAR.
    pub(super) fn pending_offset(&self) -> u32 {
        self.half_bytes as u32
    }

    /// Follows the capability's message control register.
    pub(super) fn set_control(&self, control: u16) {
        let delivery = match (
            control & CONTROL_ENABLE != 0,
            control & CONTROL_FUNCTION_MASK != 0,
        ) {
            (false, _) => Delivery::Disabled,
            (true, true) => Delivery::Masked,
            (true, false) => Delivery::Enabled,
        };
        // Held until all vectors know, so that two writers don't leave them in different states.
        let mut current = self.delivery.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut *current, delivery) == delivery {
            return;
        }
        for vector in &self.vectors {
            self.change(vector, |state| state.delivery = delivery);
        }
    }

    /// Power-on state: disabled, all vectors masked, no message, nothing pending.
    pub(super) fn reset(&self) {
        self.set_control(0);
        for vector in &self.vectors {
            self.change(vector, |state| {
                *state = VectorState {
                    programmed: state.programmed,
                    ..VectorState::default()
                };
            });
        }
    }

    /// Changes a vector and does what follows from it.
    fn change(&self, vector: &Vector, change: impl FnOnce(&mut VectorState)) {
        let mut state = vector.state();
        change(&mut state);
        let Err(error) = state.settle(&*vector.route) else {
            return;
        };
        if let Some(suppressed) = self.refused.allow() {
            tracing::warn!(%error, suppressed, "an msi-x message was refused");
        }
    }

    /// The dword at `offset` of the BAR, which is a multiple of 4.
    fn load(&self, offset: u64) -> u32 {
        match offset.checked_sub(self.half_bytes) {
            Some(offset) => self.pending_bits(offset),
            None => match self.entry(offset) {
                Some((vector, register)) => vector.state().register(register),
                None => 0,
            },
        }
    }

    fn pending_bits(&self, offset: u64) -> u32 {
        let first = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .saturating_mul(8);
        let vectors = self.vectors.iter().skip(first).take(32);
        vectors.enumerate().fold(0, |bits, (bit, vector)| {
            bits | u32::from(vector.state().pending) << bit
        })
    }

    fn entry(&self, offset: u64) -> Option<(&Vector, u8)> {
        let vector = self
            .vectors
            .get(usize::try_from(offset / ENTRY_BYTES).ok()?)?;
        Some((vector, (offset % ENTRY_BYTES / 4) as u8))
    }
}

impl Mmio for Msix {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let aligned = offset & !3;
        match size {
            1 | 2 if offset % 4 + u64::from(size) <= 4 => {
                u64::from(self.load(aligned)) >> (8 * (offset - aligned)) & all_ones(size)
            }
            4 if offset == aligned => self.load(offset).into(),
            8 if offset.is_multiple_of(8) => {
                u64::from(self.load(offset + 4)) << 32 | u64::from(self.load(offset))
            }
            _ => all_ones(size),
        }
    }

    /// Dwords and qwords; the result of anything else is undefined, so it has none.
    fn write(&self, offset: u64, size: u8, value: u64) {
        let dwords = match size {
            4 => 1,
            8 => 2,
            _ => return,
        };
        if !offset.is_multiple_of(size.into()) || offset >= self.half_bytes {
            return;
        }
        let Some((vector, register)) = self.entry(offset) else {
            return;
        };
        // Both halves of a qword at once: no message is made of one new and one old half.
        self.change(vector, |state| {
            for (dword, register) in [value as u32, (value >> 32) as u32]
                .into_iter()
                .zip(register..)
                .take(dwords)
            {
                state.set_register(register, dword);
            }
        });
    }
}

impl MsixVector {
    /// Sends the vector's message, or marks it pending as long as it is masked. From any thread; takes one lock that
    /// nobody holds for longer than the host needs to route a message.
    pub fn signal(&self) {
        if let Some(vector) = self.msix.vectors.get(usize::from(self.index)) {
            vector.signal();
        }
    }

    /// Its number in the table.
    pub fn index(&self) -> u16 {
        self.index
    }
}

impl Vector {
    fn new(route: Arc<dyn MsiRoute>) -> Self {
        Self {
            route,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, VectorState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn signal(&self) {
        let mut state = self.state();
        match state.delivery {
            Delivery::Disabled => {}
            _ if state.open() && state.programmed.is_some() => self.route.signal(),
            _ => state.pending = true,
        }
    }
}

impl Default for VectorState {
    fn default() -> Self {
        let message = MsiMessage {
            address: 0,
            data: 0,
        };
        Self {
            message,
            masked: true,
            pending: false,
            delivery: Delivery::Disabled,
            programmed: None,
        }
    }
}

impl VectorState {
    fn open(&self) -> bool {
        self.delivery == Delivery::Enabled && !self.masked
    }

    /// Makes the route follow the state. A masked vector's route is left alone: programming is expensive, and a guest
    /// masks vectors for every change of their messages.
    fn settle(&mut self, route: &dyn MsiRoute) -> Result<(), crate::irq::IrqError> {
        if self.delivery == Delivery::Disabled {
            self.pending = false;
            return match self.programmed.take() {
                Some(_) => route.program(None),
                None => Ok(()),
            };
        }
        if !self.open() {
            return Ok(());
        }
        if self.programmed != Some(self.message) {
            self.programmed = None;
            route.program(Some(self.message))?;
            self.programmed = Some(self.message);
        }
        if std::mem::take(&mut self.pending) {
            route.signal();
        }
        Ok(())
    }

    fn register(&self, register: u8) -> u32 {
        match register {
            0 => self.message.address as u32,
            1 => (self.message.address >> 32) as u32,
            2 => self.message.data,
            _ => u32::from(self.masked),
        }
    }

    fn set_register(&mut self, register: u8, value: u32) {
        let address = self.message.address;
        match register {
            0 => {
                self.message.address =
                    address & !u64::from(u32::MAX) | u64::from(value & ADDRESS_MASK)
            }
            1 => self.message.address = address & u64::from(u32::MAX) | u64::from(value) << 32,
            2 => self.message.data = value,
            _ => self.masked = value & VECTOR_MASKED != 0,
        }
    }
}

#[cfg(test)]
mod tests;
