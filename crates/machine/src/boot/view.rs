// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Boot RAM as the loader's crates want it.
use std::sync::Arc;

use ebbtide_memory::RamBlock;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::Error;
use crate::layout::Layout;

/// The RAM ranges of `layout`, backed by `block`.
pub fn of(block: &Arc<RamBlock>, layout: &Layout) -> Result<GuestMemoryMmap<()>, Error> {
    let failed = |e: &dyn std::fmt::Display| Error::part("boot RAM", e);
    let mut offset = 0usize;
    let mut regions = Vec::new();
    for range in layout.ram() {
        let bytes = usize::try_from(range.end - range.start).map_err(|e| failed(&e))?;
        // SAFETY: the block is boot RAM, mapped readable and writable from end to end as long as the machine lives, and the offsets of the
        // layout's ranges add up to its size.
        let region = unsafe {
            MmapRegionBuilder::new_with_bitmap(bytes, ())
                .with_raw_mmap_pointer(block.host().as_ptr().add(offset))
        }
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
        .build()
        .map_err(|e| failed(&e))?;
        offset += bytes;
        let region = GuestRegionMmap::new(region, GuestAddress(range.start))
            .ok_or_else(|| failed(&"address overflow"))?;
        regions.push(region);
    }
    GuestMemoryMmap::from_regions(regions).map_err(|e| failed(&e))
}
