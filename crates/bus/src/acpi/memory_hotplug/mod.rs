// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DIMM slots: memory that comes and goes by ACPI (ACPI 6.5, 9.11).
//!
//! A slot has a device in the DSDT (`aml`), whose methods read and write [`MemoryHotplug`]'s registers. These lie where
//! QEMU has them and mean the same, so that AML written for the one works with the other:
//!
//! | offset | read | write |
//! |---|---|---|
//! | 0x0 | address of the selected slot's module, low half | selector |
//! | 0x4 | high half | `_OST` source |
//! | 0x8 | length in bytes, low half | `_OST` status; completes the report |
//! | 0xc | high half | – |
//! | 0x10 | proximity domain | – |
//! | 0x14 | bit 0 enabled, 1 insert event, 2 remove event | 1, 2 acknowledge an event; 3 ejects |
//!
//! A guest has given a module up before it ejects it. When the eject is refused, the module is shown as no longer enabled
//! until the guest reports by `_OST` that it is done, and is then announced by an insert event. An ejected module is no longer enabled but keeps its length until it is detached: the guest reads a `_STA` of 0x0d and
//! knows that it is let go but still there.
//!
//! The host's calls and the guest's accesses meet under one lock, which is held for a few instructions and never while
//! anybody is called. So an eject and a cancellation have an order, and the one that comes second is told.

mod aml;
mod slots;

#[cfg(test)]
mod aml_tests;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ebbtide_memory::Mmio;

use super::{Event, EventDevice};
use crate::log_limit::LogLimit;
pub(super) use aml::{devices, scan};
use slots::{Effect, Slots};

/// The most slots a machine can have, as in QEMU.
pub const MAX_DIMM_SLOTS: u16 = 256;
/// I/O ports of the registers.
pub const MEMORY_HOTPLUG_PORTS: Range<u16> = 0xa00..0xa00 + PORT_COUNT;
const PORT_COUNT: u16 = 0x18;

/// What a guest's accesses to the registers lead to. Called on the vCPU's thread: an implementation posts a message and
/// returns at once.
pub trait DimmEjectSink: Send + Sync {
    /// The guest has let go of the module in `slot`, which is now [`SlotState::Ejected`]. Its memory is to be taken out
    /// of the map, and the slot [detached](MemoryHotplug::detach) once nobody uses it.
    fn eject(&self, slot: u16);

    /// The guest evaluated `_OST` of `slot` with this source and status (ACPI 6.5, 6.3.5).
    fn ost(&self, slot: u16, source: u32, status: u32);

    /// The report just told of was a refusal, and the module is [`SlotState::Plugged`] again.
    fn refused(&self, slot: u16);
}

/// Whether a guest may eject a module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum GuestEject {
    /// At any time.
    On,
    /// Never, not when asked to either.
    Off,
    /// Only while its removal is requested.
    #[default]
    Requested,
}

/// When a module came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// Before the guest started: it finds the module by itself.
    AtBoot,
    /// While the guest runs: it is told.
    Hot,
}

/// A module as its slot tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DimmPlace {
    /// Guest-physical address.
    pub base: u64,
    /// Length in bytes.
    pub size_bytes: u64,
    /// NUMA node.
    pub node: u32,
    /// Whether the guest may eject it.
    pub guest_eject: GuestEject,
}

/// How far the module in a slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SlotState {
    /// No module.
    Empty,
    /// In use by the guest.
    Plugged,
    /// The guest is asked to let go of it.
    Removing,
    /// The guest has let go of it; it waits to be detached.
    Ejected,
}

/// What cannot be done with a slot.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum SlotError {
    /// More slots than there can be.
    #[error("{0} dimm slots: there can be {MAX_DIMM_SLOTS}")]
    Count(u16),
    /// The machine has fewer slots.
    #[error("dimm slot {slot} is not there: the machine has {slots}")]
    NoSuchSlot {
        /// The slot asked for.
        slot: u16,
        /// How many there are, from 0 on.
        slots: u16,
    },
    /// A module of no bytes, or one that ends past the address space.
    #[error("dimm slot {slot}: {size_bytes:#x} bytes at {base:#x} are no range of memory")]
    Place {
        /// The slot.
        slot: u16,
        /// Guest-physical address.
        base: u64,
        /// Length in bytes.
        size_bytes: u64,
    },
    /// There is a module in it.
    #[error("dimm slot {slot} is occupied")]
    Occupied {
        /// The slot.
        slot: u16,
    },
    /// There is none.
    #[error("dimm slot {slot} is empty")]
    Empty {
        /// The slot.
        slot: u16,
    },
    /// The guest has let go of it already.
    #[error("the dimm in slot {slot} is ejected already")]
    Ejected {
        /// The slot.
        slot: u16,
    },
    /// The guest has not let go of it.
    #[error("the dimm in slot {slot} is not ejected by the guest")]
    NotEjected {
        /// The slot.
        slot: u16,
    },
    /// There is no request to take back.
    #[error("no removal of the dimm in slot {slot} is requested")]
    NotRemoving {
        /// The slot.
        slot: u16,
    },
}

/// The registers at [`MEMORY_HOTPLUG_PORTS`] and the slots behind them.
pub struct MemoryHotplug {
    slots: Mutex<Slots>,
    events: Arc<EventDevice>,
    sink: Arc<dyn DimmEjectSink>,
    uninvited: LogLimit,
}

impl MemoryHotplug {
    /// `count` empty slots. What happens is told to the guest through `events` and to the host through `sink`.
    ///
    /// # Errors
    /// [`SlotError::Count`].
    pub fn new(
        count: u16,
        events: Arc<EventDevice>,
        sink: Arc<dyn DimmEjectSink>,
    ) -> Result<Self, SlotError> {
        if count > MAX_DIMM_SLOTS {
            return Err(SlotError::Count(count));
        }
        Ok(Self {
            slots: Mutex::new(Slots::new(count)),
            events,
            sink,
            uninvited: LogLimit::default(),
        })
    }

    /// How many slots there are, numbered from 0.
    pub fn slots(&self) -> u16 {
        self.lock().count()
    }

    /// How far the module in `slot` is.
    ///
    /// # Errors
    /// [`SlotError::NoSuchSlot`].
    pub fn state(&self, slot: u16) -> Result<SlotState, SlotError> {
        self.lock().state(slot)
    }

    /// Puts a module into `slot`; its memory is in the map already.
    ///
    /// # Errors
    /// [`SlotError::NoSuchSlot`], [`SlotError::Occupied`], [`SlotError::Place`].
    pub fn plug(&self, slot: u16, place: DimmPlace, arrival: Arrival) -> Result<(), SlotError> {
        self.lock().plug(slot, place, arrival)?;
        if arrival == Arrival::Hot {
            self.events.raise(Event::Memory);
        }
        Ok(())
    }

    /// Asks the guest to let go of the module; may be repeated for a guest that did not hear it.
    ///
    /// # Errors
    /// [`SlotError::NoSuchSlot`], [`SlotError::Empty`], [`SlotError::Ejected`].
    pub fn request_removal(&self, slot: u16) -> Result<(), SlotError> {
        self.lock().request_removal(slot)?;
        self.events.raise(Event::Memory);
        Ok(())
    }

    /// Takes a request back: an eject that comes later is uninvited.
    ///
    /// # Errors
    /// [`SlotError::NoSuchSlot`], [`SlotError::Empty`], [`SlotError::NotRemoving`]; [`SlotError::Ejected`] when the
    /// guest was faster.
    pub fn cancel_removal(&self, slot: u16) -> Result<(), SlotError> {
        self.lock().cancel_removal(slot)
    }

    /// Ejects the module without asking: for a guest that is being reset, or by force. The sink is not told.
    ///
    /// # Errors
    /// [`SlotError::NoSuchSlot`], [`SlotError::Empty`], [`SlotError::Ejected`].
    pub fn withdraw(&self, slot: u16) -> Result<(), SlotError> {
        self.lock().withdraw(slot)
    }

    /// Empties a slot whose ejected module nobody uses any more.
    ///
    /// # Errors
    /// [`SlotError::NoSuchSlot`], [`SlotError::Empty`], [`SlotError::NotEjected`].
    pub fn detach(&self, slot: u16) -> Result<(), SlotError> {
        self.lock().detach(slot)
    }

    /// For the next guest: no event, no request, nothing selected. Modules stay where they are, and so do ejected ones
    /// that are not detached yet. Whoever wants a requested removal to happen by a reset
    /// [withdraws](Self::withdraw) the module before.
    pub fn reset(&self) {
        self.lock().reset();
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        // Nothing panics while it is held.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report_uninvited(&self, slot: u16) {
        if let Some(suppressed) = self.uninvited.allow() {
            tracing::warn!(
                slot,
                suppressed,
                "the guest ejects a dimm that it may not eject now"
            );
        }
    }
}

impl Mmio for MemoryHotplug {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let value = self.lock().read(offset, size);
        value.map_or_else(|| crate::gated::all_ones(size), u64::from)
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        let effect = self.lock().write(offset, size, value);
        match effect {
            None => {}
            Some(Effect::Eject { slot }) => self.sink.eject(slot),
            Some(Effect::Uninvited { slot }) => self.report_uninvited(slot),
            Some(Effect::Ost {
                slot,
                source,
                status,
                refused,
                announced,
            }) => {
                self.sink.ost(slot, source, status);
                if announced {
                    self.events.raise(Event::Memory);
                }
                if refused {
                    self.sink.refused(slot);
                }
            }
        }
    }
}
