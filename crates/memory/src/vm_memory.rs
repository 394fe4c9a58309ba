// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The traits of the vm-memory crate, for loaders.
//!
//! vm-memory's `GuestMemoryBackend` promises memory that never changes and knows no ROM and no
//! registers, so what implements it here is a snapshot: the writable RAM of one view, pinned.
//! A loader may block on a file for as long as it likes; meanwhile the snapshot holds up
//! unplugs, like any I/O. Drop it when the kernel is loaded.

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::{Error, Result};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestMemoryRegionBytes, GuestUsize,
    MemoryRegionAddress, VolatileSlice,
};

use crate::{Access, AddressSpace, Gpa, Pin, Plugged, Reader, SectionKind};

/// The writable, plugged RAM of an address space, pinned: what linux-loader and vhost take.
pub struct PinnedRam {
    /// Ascending.
    regions: Vec<PinnedRegion>,
}

/// One contiguous piece of [`PinnedRam`].
pub struct PinnedRegion {
    pin: Pin,
}

impl PinnedRam {
    /// Pins the RAM that `space` shows now.
    ///
    /// # Errors
    /// `Reentrant` from within a change of the map.
    pub fn new(
        space: &AddressSpace,
        reader: &Reader,
    ) -> std::result::Result<PinnedRam, crate::Error> {
        let mut regions = Vec::new();
        for section in space.sections()? {
            let SectionKind::Ram {
                block,
                block_offset,
                readonly: false,
            } = &section.kind
            else {
                continue;
            };
            let step = block.block_size_bytes().unwrap_or(u64::MAX);
            let mut at = section.range.start;
            while at < section.range.end {
                // The end of the run of plugged blocks that starts here.
                let offset = block_offset + (at - section.range.start);
                let mut end = (at - offset % step)
                    .saturating_add(step)
                    .min(section.range.end);
                let plugged = |from: u64, to: u64| {
                    let shift = |address| block_offset + (address - section.range.start);
                    block.plugged(shift(from)..shift(to)) == Plugged::All
                };
                if plugged(at, end) {
                    while end < section.range.end
                        && plugged(end, (end + step).min(section.range.end))
                    {
                        end = (end + step).min(section.range.end);
                    }
                    // What was unplugged since is left out.
                    let guard = space.read(reader);
                    let pin = guard.pin(Gpa(at), (end - at) as usize, Access::ReadWrite);
                    regions.extend(pin.map(|pin| PinnedRegion { pin }));
                }
                at = end;
            }
        }
        Ok(PinnedRam { regions })
    }
}

impl GuestMemoryBackend for PinnedRam {
    type R = PinnedRegion;

    fn num_regions(&self) -> usize {
        self.regions.len()
    }

    fn find_region(&self, addr: GuestAddress) -> Option<&PinnedRegion> {
        let at = self
            .regions
            .partition_point(|region| region.start_addr() <= addr);
        let region = self.regions.get(at.checked_sub(1)?)?;
        (addr <= region.last_addr()).then_some(region)
    }

    fn iter(&self) -> impl Iterator<Item = &PinnedRegion> {
        self.regions.iter()
    }
}

impl GuestMemoryRegion for PinnedRegion {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.pin.len() as u64
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.pin.gpa().0)
    }

    fn bitmap(&self) -> BS<'_, ()> {}

    fn get_host_address(&self, addr: MemoryRegionAddress) -> Result<*mut u8> {
        let offset = usize::try_from(addr.0)
            .ok()
            .filter(|offset| *offset < self.pin.len());
        let offset = offset.ok_or(Error::InvalidBackendAddress)?;
        Ok(self.pin.as_ptr().wrapping_add(offset))
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, ()>>> {
        let start = usize::try_from(offset.0).map_err(|_| Error::InvalidBackendAddress)?;
        let end = start
            .checked_add(count)
            .filter(|end| *end <= self.pin.len());
        end.ok_or(Error::InvalidBackendAddress)?;
        // SAFETY: inside the pinned memory, which stays for as long as `self` is borrowed (I3);
        // everybody else accesses it as vm-memory does, with volatile accesses.
        Ok(unsafe { VolatileSlice::new(self.pin.as_ptr().wrapping_add(start), count) })
    }
}

impl GuestMemoryRegionBytes for PinnedRegion {}
