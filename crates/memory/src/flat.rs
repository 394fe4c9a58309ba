// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the region tree looks like once overlaps are resolved.

use std::fmt;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr;
use std::sync::{Arc, OnceLock};

use crate::index::Node;
use crate::ram::fence;
use crate::sync::AtomicU64;
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
        /// Whether it is ROM.
        readonly: bool,
    },
    /// Device registers.
    Mmio,
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
        region: &Arc<Region>,
    ) -> FlatSection {
        let kind = match region.kind() {
            RegionKind::Ram { block, readonly } => SectionKind::Ram {
                block: Arc::clone(block),
                block_offset: offset_in_region,
                readonly: *readonly,
            },
            RegionKind::Mmio(_) => SectionKind::Mmio,
            RegionKind::Container | RegionKind::Reservation | RegionKind::Alias { .. } => {
                SectionKind::Reservation
            }
        };
        FlatSection {
            range,
            kind,
            offset_in_region,
            region: Arc::clone(region),
        }
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
            SectionKind::Mmio | SectionKind::Reservation => None,
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
            SectionKind::Mmio | SectionKind::Reservation => None,
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

/// A section as views hold it: what pins of sparse RAM need comes first.
#[repr(C)]
pub(crate) struct Flat {
    /// Bank and plugged bitmap of a sparse block, else null.
    words: *const AtomicU64,
    words_len: usize,
    /// Host address of the block.
    block_host: u64,
    /// Size of the blocks less 1, and log2 of it.
    block_mask: u64,
    block_shift: u32,
    pub(crate) section: FlatSection,
    /// A node of the index that shows nothing but this section.
    solo: OnceLock<Node>,
}

// SAFETY: `words` points into the block that `section` keeps alive.
unsafe impl Send for Flat {}
// SAFETY: as above; what it points to are atomics.
unsafe impl Sync for Flat {}

impl Flat {
    pub(crate) fn new(section: FlatSection) -> Arc<Flat> {
        let mut flat = Flat {
            words: ptr::null(),
            words_len: 0,
            block_host: 0,
            block_mask: 0,
            block_shift: 0,
            section,
            solo: OnceLock::new(),
        };
        if let SectionKind::Ram { block, .. } = &flat.section.kind {
            flat.block_host = block.host().as_ptr() as u64;
            if let Some((fence, shift)) = block.fence() {
                let words = fence.map().words();
                flat.words = words.as_ptr();
                flat.words_len = words.len();
                flat.block_mask = (1 << shift) - 1;
                flat.block_shift = shift;
            }
        }
        Arc::new(flat)
    }

    pub(crate) fn block(&self) -> Option<&Arc<RamBlock>> {
        match &self.section.kind {
            SectionKind::Ram { block, .. } => Some(block),
            SectionKind::Mmio | SectionKind::Reservation => None,
        }
    }

    pub(crate) fn is_sparse(&self) -> bool {
        !self.words.is_null()
    }

    /// Whether `len` bytes (at least 1) at host address `host` of a sparse block lie in one
    /// plugged block of it, and the bank a pin of them counts in. Inside a read section.
    ///
    /// # Safety
    /// `host` is the address of a byte of this section.
    #[inline(always)]
    pub(crate) unsafe fn admit_one(&self, host: u64, len: u64) -> Option<usize> {
        let offset = host.wrapping_sub(self.block_host);
        if (offset & self.block_mask) + (len - 1) > self.block_mask {
            return None;
        }
        // SAFETY: the words belong to the block, which lives as long as the section does; a byte
        // of the section lies in a block of the map.
        unsafe { fence::admit_one(self.words, offset >> (self.block_shift & 63)) }
    }

    /// As [`Flat::admit_one`], across blocks.
    ///
    /// # Safety
    /// `host` is the address of a byte of this section, and `len` bytes from there are.
    pub(crate) unsafe fn admit(&self, host: u64, len: u64) -> Option<usize> {
        let offset = host.wrapping_sub(self.block_host);
        let last = (offset + (len - 1)) >> self.block_shift;
        // SAFETY: set together in `new`; the block lives as long as the section does.
        let words = unsafe { std::slice::from_raw_parts(self.words, self.words_len) };
        fence::admit(words, offset >> self.block_shift, last)
    }

    /// Bytes from `host` on, at most `len`, that are plugged. Inside a read section.
    ///
    /// # Safety
    /// `host` is the address of a byte of this section, and `len` bytes from there are.
    pub(crate) unsafe fn admitted(&self, host: u64, len: u64) -> u64 {
        let block = 1u64 << self.block_shift;
        let mut done = 0;
        while done < len {
            let at = host + done;
            let step = (block - (at.wrapping_sub(self.block_host) & (block - 1))).min(len - done);
            // SAFETY: a byte of the section, by the caller's promise.
            if unsafe { self.admit(at, step) }.is_none() {
                break;
            }
            done += step;
        }
        done
    }

    /// The node that shows nothing but this section.
    pub(crate) fn solo(self: &Arc<Flat>) -> &Node {
        self.solo.get_or_init(|| Node::solo(self))
    }
}
