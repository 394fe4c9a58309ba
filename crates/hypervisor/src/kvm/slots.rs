// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory slots: which guest addresses KVM backs with host memory by itself.
//!
//! One slot per RAM section, never split: an unplugged block inside a section is inaccessible host memory, and the slot
//! stays. A slot keeps its section's hold from before KVM learns of it until KVM has acknowledged its deletion; KVM does
//! so when it no longer reads or maps the memory.
//!
//! While a block is logged, KVM notes which pages of its slots the guest writes; that is merged into the block's dirty log
//! on demand. A slot that goes while it is logged leaves all its pages dirty: between asking KVM what it knows and deleting
//! the slot, vcpus would write unseen. KVM notes in a bitmap for each slot, or in a ring for each vcpu (`rings`).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ebbtide_memory::{
    FlatIoeventfd, FlatSection, Listener, ListenerError, RamBlock, RegionHold, SectionKind,
};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};

use super::ioeventfds::Bus;
use super::vm::Machine;

/// What KVM maps; a section that is not a whole number of these is served by exits at its edges.
const PAGE_BYTES: u64 = 4096;

/// The machine's slot numbers.
pub(super) struct SlotNumbers {
    limit: usize,
    state: Mutex<Numbers>,
}

#[derive(Default)]
struct Numbers {
    /// Below `next` and not in use.
    free: BTreeSet<u32>,
    next: u32,
}

impl SlotNumbers {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            state: Mutex::default(),
        })
    }

    pub(super) fn in_use(&self) -> usize {
        let numbers = self.lock();
        numbers.next as usize - numbers.free.len()
    }

    /// The lowest number that is free: KVM's tables are as long as the highest one needs.
    pub(super) fn take(&self) -> Option<u32> {
        let mut numbers = self.lock();
        if let Some(slot) = numbers.free.pop_first() {
            return Some(slot);
        }
        if numbers.next as usize >= self.limit {
            return None;
        }
        let slot = numbers.next;
        numbers.next += 1;
        Some(slot)
    }

    fn give_back(&self, slot: u32) {
        self.lock().free.insert(slot);
    }

    fn lock(&self) -> MutexGuard<'_, Numbers> {
        // No code panics while it holds the lock; numbers stay consistent whatever happened elsewhere.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The part of a section that KVM can map: whole pages, aligned alike for guest and host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    gpa: u64,
    size_bytes: u64,
    host: u64,
}

impl Extent {
    fn whole_pages(gpa: u64, size_bytes: u64, host: u64) -> Option<Self> {
        if gpa % PAGE_BYTES != host % PAGE_BYTES {
            return None;
        }
        let start = gpa.checked_next_multiple_of(PAGE_BYTES)?;
        let end = gpa.checked_add(size_bytes)? / PAGE_BYTES * PAGE_BYTES;
        let size_bytes = end.checked_sub(start).filter(|&size| size > 0)?;
        Some(Self {
            gpa: start,
            size_bytes,
            host: host.checked_add(start - gpa)?,
        })
    }
}

struct Slot {
    number: u32,
    extent: Extent,
    /// What it shows, and where in the block it starts, in bytes.
    block: Arc<RamBlock>,
    block_offset: u64,
    readonly: bool,
    /// KVM notes what the guest writes.
    logged: bool,
    /// Given back when KVM no longer uses the memory.
    _hold: RegionHold,
}

impl Slot {
    fn flags(&self) -> u32 {
        let readonly = if self.readonly { KVM_MEM_READONLY } else { 0 };
        let logged = if self.logged {
            KVM_MEM_LOG_DIRTY_PAGES
        } else {
            0
        };
        readonly | logged
    }

    fn mark_all(&self) {
        let end = self.block_offset.saturating_add(self.extent.size_bytes);
        self.block.mark_dirty(self.block_offset..end);
    }
}

/// Follows the memory address space: RAM becomes slots, its ioeventfds become KVM's.
pub(super) struct SlotListener {
    machine: Arc<Machine>,
    numbers: Arc<SlotNumbers>,
    bus: Bus,
    /// By the first address of their section.
    slots: BTreeMap<u64, Slot>,
    /// Slots whose deletion KVM refused: what they hold is never given back.
    stuck: Vec<Slot>,
    /// Dirty rings could not be reset: what is logged counts as written from then on.
    rings_failed: bool,
}

impl SlotListener {
    pub(super) fn new(machine: Arc<Machine>, numbers: Arc<SlotNumbers>) -> Self {
        let bus = Bus::memory(Arc::clone(&machine));
        Self {
            machine,
            numbers,
            bus,
            slots: BTreeMap::new(),
            stuck: Vec::new(),
            rings_failed: false,
        }
    }

    /// Makes or changes a slot; of size 0, deletes it.
    fn set(&self, slot: &Slot, size_bytes: u64) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: slot.number,
            flags: slot.flags(),
            guest_phys_addr: slot.extent.gpa,
            memory_size: size_bytes,
            userspace_addr: slot.extent.host,
        };
        // SAFETY: the host range belongs to a RAM block, which stays mapped as long as the section's hold; that is kept
        // from before this call until after the slot's deletion.
        unsafe { self.machine.fd.set_user_memory_region(region) }.map_err(Into::into)
    }

    fn add(&mut self, section: &FlatSection) -> Result<(), ListenerError> {
        let SectionKind::Ram {
            block,
            block_offset,
            readonly,
        } = &section.kind
        else {
            return Ok(());
        };
        let Some(host) = section.host() else {
            return Ok(());
        };
        let size_bytes = section.range.end.saturating_sub(section.range.start);
        let host = host.as_ptr() as u64;
        let Some(extent) = Extent::whole_pages(section.range.start, size_bytes, host) else {
            tracing::debug!(?section.range, "no whole page to map, every access will exit");
            return Ok(());
        };
        let refused = |reason: String| ListenerError {
            what: format!(
                "kvm slot at {:#x}, {:#x} bytes of {}{}",
                extent.gpa,
                extent.size_bytes,
                section.region.name(),
                if *readonly { " (read-only)" } else { "" },
            ),
            reason,
        };
        self.check_reach(extent).map_err(refused)?;
        let hold = section.hold_as("kvm slot");
        let number = self
            .numbers
            .take()
            .ok_or_else(|| refused(format!("all {} slots are in use", self.numbers.limit)))?;
        let slot = Slot {
            number,
            extent,
            block: Arc::clone(block),
            // Forward by what the extent left out to reach a whole page.
            block_offset: block_offset + (extent.gpa - section.range.start),
            readonly: *readonly,
            logged: !readonly && block.is_logged(),
            _hold: hold,
        };
        // Before KVM can name the slot in a ring.
        let rings = self.machine.rings.as_deref().filter(|_| !readonly);
        if let Some(rings) = rings {
            rings.add_slot(number, block, slot.block_offset, extent.size_bytes);
        }
        if let Err(error) = self.set(&slot, extent.size_bytes) {
            if let Some(rings) = rings {
                rings.remove_slot(number);
            }
            self.numbers.give_back(number);
            return Err(refused(error.to_string()));
        }
        tracing::debug!(
            number,
            gpa = extent.gpa,
            size = extent.size_bytes,
            readonly,
            "slot added"
        );
        self.slots.insert(section.range.start, slot);
        Ok(())
    }

    /// KVM does not refuse this everywhere, but the guest's processor cannot address it.
    fn check_reach(&self, extent: Extent) -> Result<(), String> {
        let bits = self.machine.cpuid.phys_bits();
        let last = extent.gpa.saturating_add(extent.size_bytes - 1);
        match last.checked_shr(bits.into()) {
            None | Some(0) => Ok(()),
            Some(_) => Err(format!(
                "it ends beyond this processor's {bits} physical address bits"
            )),
        }
    }

    /// Has KVM note what the guest writes to a section's slot, or stop that.
    fn log(&mut self, section: &FlatSection, logged: bool) -> io::Result<()> {
        // A section without a whole page has no slot: the guest's accesses are ours.
        let Some(mut slot) = self.slots.remove(&section.range.start) else {
            return Ok(());
        };
        let before = slot.logged;
        slot.logged = logged && !slot.readonly;
        let mut result = Ok(());
        if slot.logged != before {
            result = self.set(&slot, slot.extent.size_bytes);
            if result.is_err() {
                slot.logged = before;
            }
        }
        self.slots.insert(section.range.start, slot);
        result
    }

    /// Merges what KVM has noted in rings, for all slots.
    fn sync_rings(&mut self) {
        let logged = self.slots.values().any(|slot| slot.logged);
        let Some(rings) = self.machine.rings.as_ref().filter(|_| logged) else {
            return;
        };
        if let Err(error) = rings.sync(&self.machine.fd) {
            tracing::error!(%error, "kvm does not reset its dirty rings; all that is logged counts as written");
            self.rings_failed = true;
        }
    }

    /// Merges what KVM has noted into the block. KVM then watches the pages anew.
    fn sync(&self, slot: &Slot) {
        if self.machine.rings.is_some() {
            if self.rings_failed {
                slot.mark_all();
            }
            return;
        }
        let size_bytes = slot.extent.size_bytes as usize;
        match self.machine.fd.get_dirty_log(slot.number, size_bytes) {
            Ok(words) => slot.block.merge_dirty(slot.block_offset, &words),
            Err(error) => {
                tracing::error!(
                    %error, number = slot.number, gpa = slot.extent.gpa,
                    "kvm does not tell what the guest wrote; all of the slot counts as written"
                );
                slot.mark_all();
            }
        }
    }

    fn remove(&mut self, slot: Slot) {
        if let Err(error) = self.set(&slot, 0) {
            tracing::error!(
                %error, number = slot.number, gpa = slot.extent.gpa, size = slot.extent.size_bytes,
                "kvm keeps a memory slot; its memory is never given back"
            );
            self.stuck.push(slot);
            return;
        }
        if let Some(rings) = &self.machine.rings {
            rings.remove_slot(slot.number);
        }
        // After that: what a ring still says of the slot is ignored.
        if slot.logged {
            slot.mark_all();
        }
        tracing::debug!(number = slot.number, gpa = slot.extent.gpa, "slot removed");
        self.numbers.give_back(slot.number);
    }
}

impl Listener for SlotListener {
    fn region_add(&mut self, section: &FlatSection) -> Result<(), ListenerError> {
        self.add(section)
    }

    fn region_del(&mut self, section: &FlatSection) {
        // A section without a whole page never got one.
        if let Some(slot) = self.slots.remove(&section.range.start) {
            self.remove(slot);
        }
    }

    fn log_start(&mut self, section: &FlatSection) -> Result<(), ListenerError> {
        self.log(section, true).map_err(|error| ListenerError {
            what: format!(
                "dirty log of the kvm slot at {:#x}, region {}",
                section.range.start,
                section.region.name()
            ),
            reason: error.to_string(),
        })
    }

    fn log_stop(&mut self, section: &FlatSection) {
        if let Err(error) = self.log(section, false) {
            // Costs the guest time, nothing else.
            tracing::error!(%error, gpa = section.range.start, "kvm goes on with a dirty log");
        }
    }

    fn log_sync_begin(&mut self) {
        self.sync_rings();
    }

    fn log_sync(&mut self, section: &FlatSection) {
        if let Some(slot) = self.slots.get(&section.range.start)
            && slot.logged
        {
            self.sync(slot);
        }
    }

    fn ioeventfd_add(&mut self, ioeventfd: &FlatIoeventfd) -> Result<(), ListenerError> {
        self.bus.add(ioeventfd)
    }

    fn ioeventfd_del(&mut self, ioeventfd: &FlatIoeventfd) {
        self.bus.remove(ioeventfd);
    }
}

impl Drop for SlotListener {
    fn drop(&mut self) {
        // The memory may go as soon as the holds do.
        while let Some((_, slot)) = self.slots.pop_last() {
            self.remove(slot);
        }
        for slot in self.stuck.drain(..) {
            std::mem::forget(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_recycled_lowest_first() {
        let numbers = SlotNumbers::new(3);
        assert_eq!(
            [numbers.take(), numbers.take(), numbers.take()],
            [Some(0), Some(1), Some(2)]
        );
        assert_eq!(numbers.take(), None);
        numbers.give_back(1);
        numbers.give_back(0);
        assert_eq!(numbers.in_use(), 1);
        assert_eq!(
            [numbers.take(), numbers.take(), numbers.take()],
            [Some(0), Some(1), None]
        );
    }

    #[test]
    fn an_extent_is_the_whole_pages_of_a_section() {
        let extent = |gpa, size_bytes, host| Extent {
            gpa,
            size_bytes,
            host,
        };
        assert_eq!(
            Extent::whole_pages(0x1000, 0x2000, 0x7000),
            Some(extent(0x1000, 0x2000, 0x7000))
        );
        assert_eq!(
            Extent::whole_pages(0x1800, 0x2000, 0x7800),
            Some(extent(0x2000, 0x1000, 0x8000))
        );
        assert_eq!(Extent::whole_pages(0x1800, 0x1000, 0x7800), None);
        assert_eq!(Extent::whole_pages(0x1000, 0x800, 0x7000), None);
        assert_eq!(Extent::whole_pages(0x1000, 0x1000, 0x7800), None);
        assert_eq!(Extent::whole_pages(0x1000, 0, 0x7000), None);
        assert_eq!(Extent::whole_pages(u64::MAX - 0xfff, 0x1000, 0x7000), None);
    }
}
