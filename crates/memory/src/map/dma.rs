// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device's way to memory.

use std::fmt;
use std::sync::Arc;

use ebbtide_gate::Gate;

use super::bounce::{Bounced, pin};
use super::plan::Plan;
use super::{BounceGrant, BounceWait, Budget};
use crate::busy::{Busy, EntryPoint};
use crate::dispatch::{self, Bytes, OnError};
use crate::iommu::Flight;
use crate::{Access, AccessError, AddressSpace, Error, Gpa, Memory, PinList, Reader, Region};

/// One device's DMA: the address space it sees, how much of it may be bounced at once, and which
/// device it is. Clones share the budget.
#[derive(Clone)]
pub struct Dma {
    shared: Arc<Shared>,
}

struct Shared {
    space: Arc<AddressSpace>,
    gate: Arc<Gate>,
    budget: Arc<Budget>,
}

/// What a request got. See [`Dma::map`].
#[derive(Debug)]
pub enum Mapping {
    /// All of it is RAM, pinned.
    Direct(DirectMapping),
    /// Some of it is bounced.
    Bounce(Bounced),
    /// The device has no bounce buffer left now: await it, then hand the grant to
    /// [`Dma::map_granted`].
    Wait(BounceWait),
}

/// A mapping that is RAM alone.
pub struct DirectMapping {
    pins: PinList,
    /// Keeps invalidations of the translations used waiting.
    _flights: Vec<Flight>,
}

impl Mapping {
    /// The pieces in order, valid until the mapping is completed or dropped; none of a request
    /// that waits.
    pub fn iovecs(&self) -> &[libc::iovec] {
        match self {
            Mapping::Direct(direct) => direct.pins.iovecs(),
            Mapping::Bounce(bounced) => bounced.iovecs(),
            Mapping::Wait(_) => &[],
        }
    }

    /// Bytes in all; 0 of a request that waits.
    pub fn total_len(&self) -> usize {
        match self {
            Mapping::Direct(direct) => direct.pins.total_len(),
            Mapping::Bounce(bounced) => bounced.total_len(),
            Mapping::Wait(_) => 0,
        }
    }

    /// Ends the mapping after `len` bytes were transferred: see [`Bounced::complete`]. What was
    /// written to RAM is there already.
    ///
    /// # Errors
    /// As [`Bounced::complete`].
    pub fn complete(self, reader: &Reader, len: usize) -> Result<(), AccessError> {
        match self {
            Mapping::Bounce(bounced) => bounced.complete(reader, len),
            Mapping::Direct(_) | Mapping::Wait(_) => Ok(()),
        }
    }
}

impl DirectMapping {
    /// The pinned memory.
    pub fn pins(&self) -> &PinList {
        &self.pins
    }
}

impl fmt::Debug for DirectMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.pins.fmt(f)
    }
}

impl Dma {
    /// Bytes a device may bounce at once unless told otherwise.
    pub const BOUNCE_BYTES: u64 = 1 << 20;

    /// The DMA of the device behind `gate`, which sees `space`.
    pub fn new(space: &Arc<AddressSpace>, gate: &Arc<Gate>) -> Dma {
        Dma::with_bounce_bytes(space, gate, Dma::BOUNCE_BYTES)
    }

    /// As [`Dma::new`], with another limit on what is bounced at once.
    pub fn with_bounce_bytes(space: &Arc<AddressSpace>, gate: &Arc<Gate>, bytes: u64) -> Dma {
        Dma {
            shared: Arc::new(Shared {
                space: Arc::clone(space),
                gate: Arc::clone(gate),
                budget: Budget::new(bytes),
            }),
        }
    }

    /// The address space the device sees.
    pub fn space(&self) -> &Arc<AddressSpace> {
        &self.shared.space
    }

    /// The device's gate.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.shared.gate
    }

    /// Bytes bounced now.
    pub fn bounced_bytes(&self) -> u64 {
        self.shared.budget.used()
    }

    /// Reads from whatever answers, registers included, and so not inside a read section. For
    /// small things; what a backend transfers is mapped.
    ///
    /// # Errors
    /// That of the first part that does not answer; what lies before it has been read.
    pub fn read(&self, reader: &Reader, gpa: Gpa, bytes: &mut [u8]) -> Result<(), AccessError> {
        let _busy = Busy::note(self.gate(), EntryPoint::Dma);
        let into = Bytes::Load(bytes);
        dispatch::transfer(self.space(), reader, gpa.raw(), into, OnError::Stop)
    }

    /// Writes to whatever answers, registers included, and so not inside a read section.
    ///
    /// # Errors
    /// That of the first part that does not answer; what lies before it has been written.
    pub fn write(&self, reader: &Reader, gpa: Gpa, bytes: &[u8]) -> Result<(), AccessError> {
        let _busy = Busy::note(self.gate(), EntryPoint::Dma);
        let from = Bytes::Store(bytes);
        dispatch::transfer(self.space(), reader, gpa.raw(), from, OnError::Stop)
    }

    /// Maps the ranges of one request, in order. Ranges of length 0 are left out. Registers are
    /// read now if the device is to read them, and written when the mapping is completed; neither
    /// belongs into a read section.
    ///
    /// # Errors
    /// What is in the way of the first range that cannot be had; `BounceLimit` when the request
    /// needs more bounce buffer than the device may ever have.
    pub fn map(
        &self,
        reader: &Reader,
        ranges: &[(Gpa, u32)],
        access: Access,
    ) -> Result<Mapping, AccessError> {
        let mut pins = PinList::new();
        let pinned = self
            .space()
            .read(reader)
            .pin_list(ranges, access, &mut pins);
        match pinned {
            Ok(()) => Ok(Mapping::Direct(DirectMapping {
                pins,
                _flights: Vec::new(),
            })),
            // Registers, what an IOMMU translates, or a ROM device.
            Err(AccessError::NotRam { .. } | AccessError::ReadOnly { .. }) => {
                self.map_beside_ram(reader, ranges, access, None)
            }
            Err(error) => Err(error),
        }
    }

    /// As [`Dma::map`], for a request that has waited. Should the map have changed so that the
    /// grant is not enough, the request waits again, at the end of the queue.
    ///
    /// # Errors
    /// As [`Dma::map`].
    pub fn map_granted(
        &self,
        reader: &Reader,
        ranges: &[(Gpa, u32)],
        access: Access,
        grant: BounceGrant,
    ) -> Result<Mapping, AccessError> {
        let own = grant.is_of(&self.shared.budget);
        self.map_beside_ram(reader, ranges, access, own.then_some(grant))
    }

    /// As [`Dma::map`], and waits in its turn for as long as it takes.
    ///
    /// # Errors
    /// As [`Dma::map`].
    pub async fn mapped(
        &self,
        reader: &Reader,
        ranges: &[(Gpa, u32)],
        access: Access,
    ) -> Result<Mapping, AccessError> {
        let mut mapping = self.map(reader, ranges, access)?;
        while let Mapping::Wait(wait) = mapping {
            let grant = wait.await;
            mapping = self.map_granted(reader, ranges, access, grant)?;
        }
        Ok(mapping)
    }

    fn map_beside_ram(
        &self,
        reader: &Reader,
        ranges: &[(Gpa, u32)],
        access: Access,
        grant: Option<BounceGrant>,
    ) -> Result<Mapping, AccessError> {
        let limit = self.shared.budget.limit();
        let plan = Plan::new(self.space(), reader, ranges, access, limit)?;
        let Some((_, len)) = plan.bounced else {
            return self.pin_plan(reader, plan, access);
        };
        let grant = match grant.filter(|grant| grant.bytes() >= len) {
            Some(grant) => grant,
            // Nothing is held while waiting: no pin, no translation.
            None => match self.shared.budget.take(len) {
                Ok(grant) => grant,
                Err(wait) => return Ok(Mapping::Wait(wait)),
            },
        };
        Bounced::new(self, reader, plan, access, grant).map(Mapping::Bounce)
    }

    /// Everything led to RAM after all.
    fn pin_plan(
        &self,
        reader: &Reader,
        plan: Plan,
        access: Access,
    ) -> Result<Mapping, AccessError> {
        let mut pins = PinList::new();
        for piece in &plan.pieces {
            let space = piece.space.as_ref().unwrap_or(self.space());
            pin(space, reader, piece, access, &mut pins)?;
        }
        Ok(Mapping::Direct(DirectMapping {
            pins,
            _flights: plan.flights,
        }))
    }
}

impl fmt::Debug for Dma {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dma")
            .field("space", &self.shared.space)
            .field("gate", &self.shared.gate)
            .finish_non_exhaustive()
    }
}

/// The address space of one PCI function: all of the system's memory, or nothing while its bus
/// mastering is off. Sub-trees are shared, not copied.
pub struct BusMaster {
    space: Arc<AddressSpace>,
    window: Arc<Region>,
}

impl BusMaster {
    /// The bus-master view named `name` of what `root` shows; off.
    ///
    /// # Errors
    /// `Foreign`, `Reentrant`.
    pub fn new(memory: &Arc<Memory>, name: &str, root: &Arc<Region>) -> Result<BusMaster, Error> {
        let container = Region::container(format!("{name}-container"), 1 << 64);
        let window = Region::alias(format!("{name}-master"), root, 0, root.size());
        memory.update(|map| {
            map.set_enabled(&window, false)?;
            map.add(&container, &window, 0, 0)
        })?;
        let space = memory.address_space(name, &container)?;
        Ok(BusMaster { space, window })
    }

    /// The address space.
    pub fn space(&self) -> &Arc<AddressSpace> {
        &self.space
    }

    /// Switches bus mastering. Pins taken before stay; nothing new is found once it is off.
    ///
    /// # Errors
    /// `Reentrant` from within a change; what a listener of the space says.
    pub fn set_enabled(&self, enabled: bool) -> Result<(), Error> {
        let memory = self.space.memory();
        memory.update(|map| map.set_enabled(&self.window, enabled))
    }

    /// As [`BusMaster::set_enabled`], as part of a change.
    ///
    /// # Errors
    /// `Foreign`.
    pub fn set_enabled_in(
        &self,
        map: &mut crate::Transaction<'_>,
        enabled: bool,
    ) -> Result<(), Error> {
        map.set_enabled(&self.window, enabled)
    }
}
