// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the region tree looks like once overlaps are resolved.

use std::fmt;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr;
use std::sync::Arc;

use crate::index::{Solo, Window};
use crate::tree::RegionKind;
use crate::{RamBlock, Region};

/// What answers in a section.
#[derive(Clone, Debug)]
pub enum SectionKind {
    /// RAM or ROM.
    Ram {
        /// The block shown.
        block: Arc<RamBlock>,
        /// Where in the block the section starts, in bytes.
        block_offset: u64,
        /// Whether it is ROM, or a ROM device, whose registers get the stores.
        readonly: bool,
    },
    /// Device registers.
    Mmio,
    /// Translated when used; [`Region::domain`] tells of changes.
    Iommu,
    /// Kept free: reads give all ones, writes are dropped.
    Reservation,
}

/// One contiguous piece of an address space that one region answers.
#[derive(Clone)]
#[non_exhaustive]
pub struct FlatSection {
    /// Addresses.
    pub range: Range<u64>,
    /// What answers.
    pub kind: SectionKind,
    /// Where in the region the section starts, in bytes.
    pub offset_in_region: u64,
    /// The region.
    pub region: Arc<Region>,
}

impl FlatSection {
    pub(crate) fn new(
        range: Range<u64>,
        offset_in_region: u64,
        region: Arc<Region>,
    ) -> FlatSection {
        let kind = match region.kind() {
            RegionKind::Ram {
                block, readonly, ..
            } => SectionKind::Ram {
                block: Arc::clone(block),
                block_offset: offset_in_region,
                readonly: *readonly,
            },
            RegionKind::RomDevice { block, .. } if region.is_direct() => SectionKind::Ram {
                block: Arc::clone(block),
                block_offset: offset_in_region,
                readonly: true,
            },
            RegionKind::Mmio(_) | RegionKind::RomDevice { .. } => SectionKind::Mmio,
            RegionKind::Iommu(_) => SectionKind::Iommu,
            RegionKind::Container | RegionKind::Reservation | RegionKind::Alias { .. } => {
                SectionKind::Reservation
            }
        };
        FlatSection {
            range,
            kind,
            offset_in_region,
            region,
        }
    }

    /// Whether it is RAM that belongs to a device (see [`Region::ram_device`]): no place for what
    /// the machine loads, dumps or migrates.
    pub fn is_ram_device(&self) -> bool {
        self.region.is_ram_device()
    }

    /// Counts as a user of the section's RAM until dropped. An external mapper (KVM slot, VFIO,
    /// vhost-user, fixed io_uring buffers) takes it when it learns of the section and keeps it
    /// until its removal is acknowledged. Seals do not wait for holds, unplugs do.
    pub fn hold(&self) -> RegionHold {
        self.hold_as("external mapper")
    }

    /// As [`FlatSection::hold`]; a ticket reports the holder as `what`.
    pub fn hold_as(&self, what: &str) -> RegionHold {
        let block = match &self.kind {
            SectionKind::Ram { block, .. } => Some((Arc::clone(block), block.holds().add(what))),
            SectionKind::Mmio | SectionKind::Iommu | SectionKind::Reservation => None,
        };
        RegionHold {
            block,
            _region: Arc::clone(&self.region),
        }
    }

    /// The host address of the section's first byte, for RAM. For system calls that describe
    /// memory; keep a [`RegionHold`] for as long as the kernel or a peer knows it.
    pub fn host(&self) -> Option<ptr::NonNull<u8>> {
        match &self.kind {
            SectionKind::Ram {
                block,
                block_offset,
                ..
            } => {
                // SAFETY: a section lies inside its block.
                Some(unsafe { block.host().add(*block_offset as usize) })
            }
            SectionKind::Mmio | SectionKind::Iommu | SectionKind::Reservation => None,
        }
    }
}

impl fmt::Debug for FlatSection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Range { start, end } = self.range;
        write!(
            f,
            "{start:#x}..{end:#x} {}+{:#x}",
            self.region.name(),
            self.offset_in_region
        )
    }
}

/// The right of an external mapper to the RAM of a section. See [`FlatSection::hold`].
pub struct RegionHold {
    block: Option<(Arc<RamBlock>, u64)>,
    _region: Arc<Region>,
}

impl Drop for RegionHold {
    fn drop(&mut self) {
        if let Some((block, id)) = &self.block {
            block.holds().remove(*id);
        }
    }
}

/// An ioeventfd at its place in an address space.
#[derive(Clone, Debug)]
pub struct FlatIoeventfd {
    /// Address.
    pub addr: u64,
    /// Bytes of the write it matches; 0 for any.
    pub size: u8,
    /// The value it matches, if any.
    pub datamatch: Option<u64>,
    /// The eventfd.
    pub fd: Arc<OwnedFd>,
}

impl PartialEq for FlatIoeventfd {
    fn eq(&self, other: &FlatIoeventfd) -> bool {
        (self.addr, self.size, self.datamatch) == (other.addr, other.size, other.datamatch)
            && Arc::ptr_eq(&self.fd, &other.fd)
    }
}

/// A range of registers at its place in an address space whose writes may be kept back: the
/// hypervisor notes them and hands them over, in order, before the next access that it passes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlatCoalesced {
    /// Addresses.
    pub range: Range<u64>,
}

/// A section as views hold it.
pub(crate) struct Flat {
    pub(crate) section: FlatSection,
    window: Window,
    /// A node of the index that shows nothing but this section.
    solo: Solo,
}

impl Flat {
    pub(crate) fn new(section: FlatSection) -> Arc<Flat> {
        // Made where it stays, not to be copied there.
        let flat = Arc::<Flat>::new_uninit();
        let at = flat.as_ptr().cast_mut();
        // SAFETY: room for a section that nobody knows yet, with all its parts then: what the node shows
        // comes last, and is its own.
        unsafe {
            (&raw mut (*at).window).write(Window::new(&section));
            (&raw mut (*at).section).write(section);
            (&raw mut (*at).solo).write(Solo::new());
            let flat = flat.assume_init();
            flat.solo.show(&flat);
            flat
        }
    }

    /// The section as pins see it.
    #[inline(always)]
    pub(crate) fn window(&self) -> &Window {
        &self.window
    }

    pub(crate) fn block(&self) -> Option<&Arc<RamBlock>> {
        match &self.section.kind {
            SectionKind::Ram { block, .. } => Some(block),
            SectionKind::Mmio | SectionKind::Iommu | SectionKind::Reservation => None,
        }
    }

    /// The node that shows nothing but this section.
    pub(crate) fn solo(&self) -> &Solo {
        &self.solo
    }
}
