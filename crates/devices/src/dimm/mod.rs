// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DIMMs: memory that comes and goes by ACPI.
//!
//! The registers and the guest's half are [`MemoryHotplug`]'s; here is the memory. A DIMM has no registers of its own and
//! no gate: the guest enters it by its addresses, devices by pins, and both are what the unplug ticket waits for.
//!
//! ```text
//!   Dimm::plug ─► Dimm ── request_removal ─► guest: _EJ0 ─► sink: eject(slot)
//!                  │  ▲                                          │
//!                  │  └── sink: refused(slot), cancel_removal    ▼
//!                  │                                   Dimm::isolate: out of the map, KVM's slot deleted
//!                  └── withdraw (reset, force) ───────────────►  │
//!                                                         IsolatedDimm: drained() when the last pin is gone
//!                                                                │ detach: the slot is empty, the guest may see it
//!                                                         DetachedDimm
//!                                                                │ destroy (may block): the host has the memory back
//!                                                         DimmInfo, for DEVICE_DELETED
//! ```
//!
//! Each step consumes the one before, so none can be left out, and none but `destroy` blocks: a control thread calls them
//! and awaits `drained()` in between. Until `isolate` an ejected DIMM's memory is valid and answers; a guest that goes on
//! to touch it harms itself alone.

mod bank;
mod error;

#[cfg(test)]
mod tests;

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;

use ebbtide_bus::acpi::{Arrival, DimmPlace, GuestEject, MemoryHotplug, SlotError, SlotState};
use ebbtide_memory::{Holder, Phase, RamBlock, Region, Ticket};

pub use bank::{DimmArea, DimmBank, SECTION_BYTES};
pub use error::DimmError;

/// What a DIMM is to be.
#[derive(Clone, Debug)]
pub struct DimmSpec {
    /// Its id.
    pub id: String,
    /// The id of the memory backend that its RAM block is.
    pub memdev: String,
    /// NUMA node of the guest.
    pub node: u32,
    /// The slot, or the lowest that is free.
    pub slot: Option<u16>,
    /// Its guest-physical address, or the lowest that fits.
    pub addr: Option<u64>,
    /// Whether the guest may eject it.
    pub guest_eject: GuestEject,
    /// Whether the guest is running and has to be told.
    pub arrival: Arrival,
}

/// What there is to know about a DIMM; QEMU's `PCDIMMDeviceInfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DimmInfo {
    /// Its id.
    pub id: String,
    /// The id of its memory backend.
    pub memdev: String,
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub size_bytes: u64,
    /// Slot.
    pub slot: u16,
    /// NUMA node of the guest.
    pub node: u32,
    /// It came while the guest ran.
    pub hotplugged: bool,
}

impl DimmInfo {
    /// Its guest-physical addresses.
    pub fn range(&self) -> Range<u64> {
        self.addr..self.addr.saturating_add(self.size_bytes)
    }
}

/// A DIMM in its slot, in use by the guest.
///
/// Dropping it changes nothing for the guest: the memory stays in the map, the slot occupied.
#[must_use = "a dimm that is dropped can't be removed any more"]
pub struct Dimm {
    bank: Arc<DimmBank>,
    info: DimmInfo,
    region: Arc<Region>,
}

impl Dimm {
    /// Puts `block` into the guest's memory map, then into a slot, then tells the guest. All or nothing. `block` is
    /// allocated already as its backend wants it: nothing here blocks.
    ///
    /// # Errors
    /// Everything in [`DimmError`] about sizes, addresses, slots and backends.
    pub fn plug(
        bank: &Arc<DimmBank>,
        spec: &DimmSpec,
        block: &Arc<RamBlock>,
    ) -> Result<Dimm, DimmError> {
        check_backend(spec, block)?;
        let size_bytes = block.size_bytes();
        let (slot, range) = bank.claim(spec, size_bytes, block.page_size_bytes())?;
        let region = Region::ram(&spec.id, block);
        let info = DimmInfo {
            id: spec.id.clone(),
            memdev: spec.memdev.clone(),
            addr: range.start,
            size_bytes,
            slot,
            node: spec.node,
            hotplugged: spec.arrival == Arrival::Hot,
        };
        let dimm = Dimm {
            bank: Arc::clone(bank),
            info,
            region,
        };
        match dimm.enter(spec) {
            Ok(()) => Ok(dimm),
            Err(error) => {
                bank.free(slot);
                Err(error)
            }
        }
    }

    /// The map first: a guest that sees the slot enabled uses the memory at once.
    fn enter(&self, spec: &DimmSpec) -> Result<(), DimmError> {
        let (memory, root) = (&self.bank.memory, &self.bank.root);
        memory
            .update(|t| t.add(root, &self.region, self.info.addr, self.bank.area.priority))
            .map_err(|source| self.memory_error(source))?;
        let place = DimmPlace {
            base: self.info.addr,
            size_bytes: self.info.size_bytes,
            node: self.info.node,
            guest_eject: spec.guest_eject,
        };
        let plugged = self.registers().plug(self.info.slot, place, spec.arrival);
        plugged.map_err(|source| {
            if let Err(error) = memory.update(|t| t.remove(&self.region)) {
                tracing::error!(%error, id = self.info.id, "a dimm without a slot stays in the map");
            }
            self.slot_error(source)
        })
    }

    /// What it is and where.
    pub fn info(&self) -> &DimmInfo {
        &self.info
    }

    /// How far its removal is, as the guest sees it.
    pub fn state(&self) -> SlotState {
        // The slot was there when the DIMM was put into it.
        self.registers()
            .state(self.info.slot)
            .unwrap_or(SlotState::Empty)
    }

    /// Its memory.
    pub fn block(&self) -> Option<&Arc<RamBlock>> {
        self.region.ram_block()
    }

    /// For a system reset that the use of its memory outlasts: the next guest finds `block` in its place, which was
    /// [renewed](ebbtide_memory::RamList::renew) from it. The ticket is that of the old memory.
    ///
    /// # Errors
    /// [`DimmError::Memory`] when something else shows the memory; nothing has changed then.
    pub fn renew(&mut self, block: &Arc<RamBlock>) -> Result<Ticket, DimmError> {
        let region = Region::ram(&self.info.id, block);
        let ticket = self.bank.memory.update(|t| {
            let ticket = t.unplug(&self.region)?;
            let (root, priority) = (&self.bank.root, self.bank.area.priority);
            t.add(root, &region, self.info.addr, priority)?;
            Ok(ticket)
        });
        let ticket = ticket.map_err(|source| self.memory_error(source))?;
        self.region = region;
        Ok(ticket)
    }

    /// Asks the guest to let go of it, or asks again. The answer comes to the registers' sink: `eject`, `refused`, or none
    /// for as long as the guest tries (or does not listen).
    ///
    /// # Errors
    /// [`DimmError::Slot`] once the guest has ejected it.
    pub fn request_removal(&self) -> Result<(), DimmError> {
        let asked = self.registers().request_removal(self.info.slot);
        asked.map_err(|source| self.slot_error(source))
    }

    /// Takes the request back.
    ///
    /// # Errors
    /// [`DimmError::Slot`] without a request, or when the guest was faster: the DIMM is to be isolated then.
    pub fn cancel_removal(&self) -> Result<(), DimmError> {
        let cancelled = self.registers().cancel_removal(self.info.slot);
        cancelled.map_err(|source| self.slot_error(source))
    }

    /// Takes it from a guest that is not asked: one that is being reset, or by force. [`isolate`](Self::isolate) follows.
    ///
    /// # Errors
    /// [`DimmError::Slot`] when the guest has ejected it by itself.
    pub fn withdraw(&self) -> Result<(), DimmError> {
        let withdrawn = self.registers().withdraw(self.info.slot);
        withdrawn.map_err(|source| self.slot_error(source))
    }

    /// Takes the memory of an ejected DIMM out of the map. From now on nobody finds it any more, and translations kept of
    /// it (virtqueue rings) are void; whoever holds a pin goes on with it.
    ///
    /// # Errors
    /// [`DimmError::Slot`] when the guest has not let go, [`DimmError::Memory`] when something else shows the memory (an
    /// alias). Nothing has changed then, and the DIMM comes back.
    pub fn isolate(self) -> Result<IsolatedDimm, (Box<Dimm>, DimmError)> {
        if self.state() != SlotState::Ejected {
            let slot = self.info.slot;
            let error = self.slot_error(SlotError::NotEjected { slot });
            return Err((Box::new(self), error));
        }
        match self.bank.memory.update(|t| t.unplug(&self.region)) {
            Ok(ticket) => Ok(IsolatedDimm {
                bank: self.bank,
                info: self.info,
                ticket,
            }),
            Err(source) => {
                let error = self.memory_error(source);
                Err((Box::new(self), error))
            }
        }
    }

    fn registers(&self) -> &MemoryHotplug {
        &self.bank.registers
    }

    fn slot_error(&self, source: SlotError) -> DimmError {
        let id = self.info.id.clone();
        DimmError::Slot { id, source }
    }

    fn memory_error(&self, source: ebbtide_memory::Error) -> DimmError {
        let id = self.info.id.clone();
        DimmError::Memory { id, source }
    }
}

fn check_backend(spec: &DimmSpec, block: &RamBlock) -> Result<(), DimmError> {
    let reason = if block.block_size_bytes().is_some() {
        "is made of blocks that come and go by themselves"
    } else if block.is_readonly() {
        "is read-only"
    } else if block.max_size_bytes() != block.size_bytes() {
        "can grow"
    } else {
        return Ok(());
    };
    Err(DimmError::Backend {
        id: spec.id.clone(),
        memdev: spec.memdev.clone(),
        reason,
    })
}

/// A DIMM out of the map, waiting for those who use its memory.
#[must_use = "its memory is kept until it is detached and destroyed"]
pub struct IsolatedDimm {
    bank: Arc<DimmBank>,
    info: DimmInfo,
    ticket: Ticket,
}

impl IsolatedDimm {
    /// What it is and where it was.
    pub fn info(&self) -> &DimmInfo {
        &self.info
    }

    /// How far it is, who is in the way, and since when.
    pub fn ticket(&self) -> &Ticket {
        &self.ticket
    }

    /// Ready when nobody uses the memory any more.
    pub fn drained(&self) -> impl Future<Output = ()> + Send + 'static {
        self.ticket.drained()
    }

    /// Empties the slot: the guest reads that nothing is there, and slot, addresses and id are free.
    ///
    /// # Errors
    /// [`DimmError::InUse`] before it has drained, naming who is left; it comes back then.
    pub fn detach(self) -> Result<DetachedDimm, (Box<IsolatedDimm>, DimmError)> {
        if self.ticket.phase() < Phase::Drained {
            let holders = self.ticket.holders();
            let error = DimmError::InUse {
                id: self.info.id.clone(),
                holders: match holders.is_empty() {
                    // Sections that began before the memory went: over within microseconds.
                    true => "accesses under way".to_owned(),
                    false => list(&holders),
                },
            };
            return Err((Box::new(self), error));
        }
        if let Err(source) = self.bank.registers.detach(self.info.slot) {
            let id = self.info.id.clone();
            return Err((Box::new(self), DimmError::Slot { id, source }));
        }
        self.bank.free(self.info.slot);
        Ok(DetachedDimm {
            info: self.info,
            ticket: self.ticket,
        })
    }
}

fn list(holders: &[Holder]) -> String {
    let names: Vec<String> = holders.iter().map(ToString::to_string).collect();
    names.join(", ")
}

/// A DIMM the guest has seen go. Only the host's memory is left of it.
#[must_use = "its memory is kept until it is destroyed"]
pub struct DetachedDimm {
    info: DimmInfo,
    ticket: Ticket,
}

impl DetachedDimm {
    /// What it was.
    pub fn info(&self) -> &DimmInfo {
        &self.info
    }

    /// Gives the memory back to the host, which may take a while. What it returns says that all of the DIMM is gone.
    ///
    /// # Errors
    /// [`DimmError::Memory`] when the host refuses; it comes back then.
    pub fn destroy(self) -> Result<DimmInfo, (Box<DetachedDimm>, DimmError)> {
        let DetachedDimm { info, ticket } = self;
        match ticket.destroy() {
            Ok(()) => Ok(info),
            Err((ticket, source)) => {
                let id = info.id.clone();
                let kept = DetachedDimm { info, ticket };
                Err((Box::new(kept), DimmError::Memory { id, source }))
            }
        }
    }
}

macro_rules! debug_as_info {
    ($($state:ident),+) => {$(
        impl fmt::Debug for $state {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_tuple(stringify!($state)).field(&self.info).finish()
            }
        }
    )+};
}
debug_as_info!(Dimm, IsolatedDimm, DetachedDimm);
