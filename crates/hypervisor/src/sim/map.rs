// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Recorded slots and ioeventfds.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use ebbtide_memory::{
    FlatIoeventfd, FlatSection, Listener, ListenerError, RegionHold, SectionKind,
};

use super::lock;
use crate::Limits;

/// A memory slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SimSlot {
    /// First guest physical address.
    pub gpa: u64,
    /// Size.
    pub size_bytes: u64,
    /// The RAM block behind it.
    pub block: String,
    /// Where in the block it starts.
    pub block_offset: u64,
    /// Writes exit.
    pub readonly: bool,
}

/// An ioeventfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimIoeventfd {
    /// Address or port.
    pub address: u64,
    /// Width of the write it waits for, in bytes; 0: any.
    pub size: u8,
    /// The value it waits for.
    pub datamatch: Option<u64>,
}

pub(super) struct Slots {
    limits: Limits,
    state: Mutex<SlotState>,
}

#[derive(Default)]
struct SlotState {
    slots: BTreeMap<u64, (SimSlot, RegionHold)>,
    refuse: u32,
}

impl Slots {
    pub(super) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            state: Mutex::default(),
        })
    }

    pub(super) fn list(&self) -> Vec<SimSlot> {
        lock(&self.state)
            .slots
            .values()
            .map(|(slot, _)| slot.clone())
            .collect()
    }

    pub(super) fn refuse(&self, count: u32) {
        lock(&self.state).refuse = count;
    }

    /// Refuses what KVM would refuse.
    fn add(&self, slot: SimSlot, hold: RegionHold) -> Result<(), String> {
        let mut state = lock(&self.state);
        if state.refuse > 0 {
            state.refuse -= 1;
            return Err("refused as the test asked".to_owned());
        }
        if state.slots.len() >= self.limits.slots {
            return Err(format!("all {} slots are in use", self.limits.slots));
        }
        let end = slot.gpa.saturating_add(slot.size_bytes);
        if end > 1 << self.limits.phys_bits {
            return Err(format!(
                "it ends beyond {} physical address bits",
                self.limits.phys_bits
            ));
        }
        let below = state.slots.range(..end).next_back();
        if let Some((_, (other, _))) = below
            && other.gpa + other.size_bytes > slot.gpa
        {
            return Err(format!("it overlaps the slot at {:#x}", other.gpa));
        }
        state.slots.insert(slot.gpa, (slot, hold));
        Ok(())
    }

    fn remove(&self, gpa: u64) {
        lock(&self.state).slots.remove(&gpa);
    }
}

/// The ioeventfds of one address space.
#[derive(Default)]
pub(super) struct Doorbells(Mutex<Vec<FlatIoeventfd>>);

impl Doorbells {
    pub(super) fn list(&self) -> Vec<SimIoeventfd> {
        let describe = |io: &FlatIoeventfd| SimIoeventfd {
            address: io.addr,
            size: io.size,
            datamatch: io.datamatch,
        };
        lock(&self.0).iter().map(describe).collect()
    }

    pub(super) fn ring(&self, address: u64, data: &[u8]) -> bool {
        let mut value = [0; 8];
        value
            .iter_mut()
            .zip(data)
            .for_each(|(to, from)| *to = *from);
        let value = u64::from_le_bytes(value);
        let doorbells = lock(&self.0);
        let hit = doorbells.iter().find(|io| {
            io.addr == address
                && (io.size == 0 || usize::from(io.size) == data.len())
                && io.datamatch.is_none_or(|wanted| wanted == value)
        });
        let Some(doorbell) = hit else { return false };
        if let Err(error) = signal(doorbell) {
            tracing::error!(%error, address, "ioeventfd not signalled");
        }
        true
    }

    fn add(&self, ioeventfd: &FlatIoeventfd) -> Result<(), ListenerError> {
        let mut doorbells = lock(&self.0);
        if doorbells.iter().any(|other| same(other, ioeventfd)) {
            return Err(ListenerError {
                what: format!("ioeventfd at {:#x}", ioeventfd.addr),
                reason: "there is one already".to_owned(),
            });
        }
        doorbells.push(ioeventfd.clone());
        Ok(())
    }

    fn remove(&self, ioeventfd: &FlatIoeventfd) {
        lock(&self.0).retain(|other| !same(other, ioeventfd));
    }
}

fn same(a: &FlatIoeventfd, b: &FlatIoeventfd) -> bool {
    (a.addr, a.size, a.datamatch) == (b.addr, b.size, b.datamatch)
}

fn signal(doorbell: &FlatIoeventfd) -> std::io::Result<()> {
    use std::io::Write;
    let mut event = std::fs::File::from(doorbell.fd.try_clone()?);
    event.write_all(&1u64.to_ne_bytes())
}

pub(super) struct SimMemoryListener {
    slots: Arc<Slots>,
    doorbells: Arc<Doorbells>,
}

impl SimMemoryListener {
    pub(super) fn new(slots: Arc<Slots>, doorbells: Arc<Doorbells>) -> Self {
        Self { slots, doorbells }
    }
}

impl Listener for SimMemoryListener {
    fn region_add(&mut self, section: &FlatSection) -> Result<(), ListenerError> {
        let SectionKind::Ram {
            block,
            block_offset,
            readonly,
        } = &section.kind
        else {
            return Ok(());
        };
        let slot = SimSlot {
            gpa: section.range.start,
            size_bytes: section.range.end - section.range.start,
            block: block.name().to_owned(),
            block_offset: *block_offset,
            readonly: *readonly,
        };
        let what = format!("slot at {:#x}, {:#x} bytes", slot.gpa, slot.size_bytes);
        let hold = section.hold_as("sim slot");
        self.slots
            .add(slot, hold)
            .map_err(|reason| ListenerError { what, reason })
    }

    fn region_del(&mut self, section: &FlatSection) {
        self.slots.remove(section.range.start);
    }

    fn ioeventfd_add(&mut self, ioeventfd: &FlatIoeventfd) -> Result<(), ListenerError> {
        self.doorbells.add(ioeventfd)
    }

    fn ioeventfd_del(&mut self, ioeventfd: &FlatIoeventfd) {
        self.doorbells.remove(ioeventfd);
    }
}

pub(super) struct SimPortListener {
    doorbells: Arc<Doorbells>,
}

impl SimPortListener {
    pub(super) fn new(doorbells: Arc<Doorbells>) -> Self {
        Self { doorbells }
    }
}

impl Listener for SimPortListener {
    fn region_add(&mut self, _section: &FlatSection) -> Result<(), ListenerError> {
        Ok(())
    }

    fn region_del(&mut self, _section: &FlatSection) {}

    fn ioeventfd_add(&mut self, ioeventfd: &FlatIoeventfd) -> Result<(), ListenerError> {
        self.doorbells.add(ioeventfd)
    }

    fn ioeventfd_del(&mut self, ioeventfd: &FlatIoeventfd) {
        self.doorbells.remove(ioeventfd);
    }
}
