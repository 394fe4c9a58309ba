// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hot-plug of the slots of bus 0 through ACPI: the registers its AML reads and writes. They are laid out as guests' tools
//! and other machines' tables know them, a dword each:
//!
//! ```text
//! 0x00 up         slots with something new in them, by bit              read-only
//! 0x04 down       slots whose function is asked for                     read-only
//! 0x08 eject      write: slots the guest has let go of; reads 0 (no further features)
//! 0x0c removable  slots whose functions can come and go                 read-only
//! 0x10 bsel       which bus the others are about: 0, or none
//! 0x14 index      write: a slot, by bit; read: its instance number, 0 for none
//! ```
//!
//! An `up` bit stays set until what is in the slot is detached, so a guest may be told more than once, which costs it a
//! look. A `down` bit stays set until the guest ejects, the request is taken back, or what it is about has gone: a guest
//! that starts later finds it at its first scan. What has gone before the guest saw that it was to go is `down` once more:
//! to a check Linux looks for what has come only, and finds nothing new in a slot of which it has not let go.

mod aml;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ebbtide_memory::Mmio;

pub(super) use aml::{scan, slots};

use super::{Event, EventDevice};
use crate::gated::all_ones;
use crate::pci::{
    Bus, EjectSink, HostBridge, HotplugError, HotplugSlot, Indicator, Removal, SlotAddress,
    SlotState,
};

/// I/O ports of [`PciHotplug`].
pub const PCI_HOTPLUG_PORTS: Range<u16> = 0xae00..0xae18;

/// The slots that have AML: all but that of the host bridge.
pub(super) const SLOTS: Range<u8> = 1..32;
/// Their bits.
const ALL: u32 = 0xffff_fffe;

const UP: u64 = 0x00;
const DOWN: u64 = 0x04;
const EJECT: u64 = 0x08;
const REMOVABLE: u64 = 0x0c;
const BUS: u64 = 0x10;
const INDEX: u64 = 0x14;

/// The registers. Mapped at [`PCI_HOTPLUG_PORTS`].
pub struct PciHotplug {
    bus: Arc<Bus>,
    sink: Arc<dyn EjectSink>,
    events: Arc<EventDevice>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    up: u32,
    down: u32,
    /// Ejected by the guest, not detached yet.
    ejected: u32,
    /// Of `down`, what the guest has seen.
    told: u32,
    /// Detached without an eject from a guest that had not seen itself asked: shown as `down` once, for it to let go of what
    /// is not there any more.
    gone: u32,
    /// Not removable.
    fixed: u32,
    bus: u32,
    index_slot: Option<u8>,
    indices: BTreeMap<u8, u32>,
}

/// A slot of bus 0.
struct Slot {
    registers: Arc<PciHotplug>,
    address: SlotAddress,
    bit: u32,
}

impl PciHotplug {
    /// Bytes of the registers.
    pub const SIZE_BYTES: u64 = 0x18;

    /// The registers for bus 0 of `host`. Ejects are told to `sink`; the guest is told through `events`.
    pub fn new(host: &HostBridge, sink: Arc<dyn EjectSink>, events: Arc<EventDevice>) -> Arc<Self> {
        Arc::new(Self {
            bus: Arc::clone(host.bus()),
            sink,
            events,
            state: Mutex::default(),
        })
    }

    /// Slot `slot`, for the control thread; `None` for the host bridge's own and those that do not exist.
    pub fn slot(self: &Arc<Self>, slot: u8) -> Option<Arc<dyn HotplugSlot>> {
        SLOTS.contains(&slot).then(|| {
            Arc::new(Slot {
                registers: Arc::clone(self),
                address: self.address(slot),
                bit: 1 << slot,
            }) as Arc<dyn HotplugSlot>
        })
    }

    /// Says whether what is in `slot` can be removed; it can unless this says otherwise. Ejects of a slot that can't are
    /// ignored.
    pub fn set_removable(&self, slot: u8, removable: bool) {
        let bit = 1u32.checked_shl(slot.into()).unwrap_or(0);
        let mut state = self.state();
        state.fixed = state.fixed & !bit | if removable { 0 } else { bit };
    }

    /// Gives what is in `slot` an instance number (PCI Firmware 3.3, 4.6.7), from which guests make names like `eno1`; 0
    /// takes it away.
    pub fn set_index(&self, slot: u8, index: u32) {
        let mut state = self.state();
        match index {
            0 => state.indices.remove(&slot),
            _ => state.indices.insert(slot, index),
        };
    }

    /// The instance number of what is in `slot`.
    pub fn index(&self, slot: u8) -> Option<u32> {
        self.state().indices.get(&slot).copied()
    }

    /// The slot of the function that has instance number `index`.
    pub fn slot_of_index(&self, index: u32) -> Option<u8> {
        let state = self.state();
        let mut indices = state.indices.iter();
        indices.find_map(|(slot, has)| (*has == index).then_some(*slot))
    }

    /// Power-on state, after the event device's: the next guest scans the bus by itself and is asked again for what the last
    /// one was asked for.
    pub fn reset(&self) {
        let mut state = self.state();
        (state.up, state.told, state.gone) = (0, 0, 0);
        (state.bus, state.index_slot) = (0, None);
        let asked = state.down != 0;
        drop(state);
        if asked {
            self.events.raise(Event::Pci);
        }
    }

    fn address(&self, slot: u8) -> SlotAddress {
        SlotAddress {
            bus: Arc::clone(self.bus.name()),
            slot,
        }
    }

    fn eject(&self, slots: u32) {
        let mut state = self.state();
        let possible = slots & ALL & !state.fixed & !state.ejected;
        let present = |slot: &u8| possible >> slot & 1 != 0 && self.bus.is_occupied(*slot);
        let ejected: Vec<u8> = SLOTS.filter(present).collect();
        for slot in &ejected {
            state.ejected |= 1 << slot;
            state.down &= !(1 << slot);
        }
        drop(state);
        for slot in ejected {
            self.sink.eject(&self.address(slot));
        }
    }

    fn load(&self, offset: u64) -> u32 {
        let mut state = self.state();
        let selected = state.bus == 0;
        match offset {
            BUS => state.bus,
            UP if selected => state.up,
            DOWN if selected => {
                state.told |= state.down;
                state.down | std::mem::take(&mut state.gone)
            }
            REMOVABLE if selected => ALL & !state.fixed,
            INDEX if selected => {
                let slot = state.index_slot.as_ref();
                slot.and_then(|slot| state.indices.get(slot))
                    .copied()
                    .unwrap_or(0)
            }
            _ => 0,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Mmio for PciHotplug {
    /// Dwords, and parts of them.
    fn read(&self, offset: u64, size: u8) -> u64 {
        let within = offset % 4;
        if !matches!(size, 1 | 2 | 4) || within + u64::from(size) > 4 || offset >= Self::SIZE_BYTES
        {
            return all_ones(size);
        }
        u64::from(self.load(offset - within)) >> (8 * within) & all_ones(size)
    }

    /// Whole dwords only.
    fn write(&self, offset: u64, size: u8, value: u64) {
        if size != 4 {
            return;
        }
        let value = value as u32;
        let mut state = self.state();
        match offset {
            BUS => state.bus = value,
            INDEX if state.bus == 0 => {
                state.index_slot = value.checked_ilog2().map(|_| value.trailing_zeros() as u8);
            }
            EJECT if state.bus == 0 => {
                drop(state);
                self.eject(value);
            }
            _ => {}
        }
    }
}

impl Slot {
    /// Changes the registers and, if `change` says so, tells the guest to look at them.
    fn change<T>(&self, change: impl FnOnce(&mut State, u32) -> (T, bool)) -> T {
        let (result, tell) = change(&mut self.registers.state(), self.bit);
        if tell {
            self.registers.events.raise(Event::Pci);
        }
        result
    }
}

impl HotplugSlot for Slot {
    fn address(&self) -> &SlotAddress {
        &self.address
    }

    fn plugged(&self) {
        let known = |state: &State| state.up & self.bit != 0 && state.ejected & self.bit == 0;
        if !known(&self.registers.state()) {
            self.registers.bus.settle(self.address.slot);
        }
        self.change(|state, bit| {
            let known = known(state);
            state.up |= bit;
            state.down &= !bit;
            state.told &= !bit;
            state.ejected &= !bit;
            ((), !known)
        });
    }

    fn request_removal(&self) -> Result<Removal, HotplugError> {
        let occupied = self.registers.bus.is_occupied(self.address.slot);
        self.change(|state, bit| {
            if state.ejected & bit != 0 {
                (Ok(Removal::Unused), false)
            } else if !occupied {
                (Err(HotplugError::Empty), false)
            } else if state.fixed & bit != 0 {
                (Err(HotplugError::NotHotpluggable), false)
            } else {
                state.down |= bit;
                (Ok(Removal::Asked), true)
            }
        })
    }

    fn cancel(&self) {
        self.change(|state, bit| {
            state.down &= !bit;
            state.told &= !bit;
            ((), false)
        });
    }

    fn detached(&self) {
        self.change(|state, bit| {
            // A guest that was told is on its way, and would take away what comes to the slot next when told again.
            let surprise = (state.ejected | state.told) & bit == 0;
            if surprise {
                state.gone |= bit;
            }
            state.up &= !bit;
            state.down &= !bit;
            state.told &= !bit;
            state.ejected &= !bit;
            state.indices.remove(&self.address.slot);
            ((), surprise)
        });
    }

    fn state(&self) -> SlotState {
        let occupied = self.registers.bus.is_occupied(self.address.slot);
        let state = self.registers.state();
        let ejected = state.ejected & self.bit != 0;
        SlotState {
            occupied: occupied || ejected,
            requested: state.down & self.bit != 0,
            ejected,
            powered: true,
            power_indicator: Indicator::On,
        }
    }
}
