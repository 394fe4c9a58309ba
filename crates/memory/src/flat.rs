// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the region tree looks like once overlaps are resolved.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::{RamBlock, Region};

/// What answers in a section.
#[derive(Clone)]
pub enum SectionKind {
    /// RAM or ROM.
    Ram {
        /// The block shown.
        block: Arc<RamBlock>,
        /// Where in the block the section starts, bytes.
        block_offset: u64,
        /// Whether it is ROM.
        readonly: bool,
    },
    /// Device registers.
    Mmio,
    /// Kept free: reads give all ones, writes are dropped.
    Reservation,
}

/// One contiguous piece of an address space answered by one region.
#[derive(Clone)]
#[non_exhaustive]
pub struct FlatSection {
    /// Addresses.
    pub range: Range<u64>,
    /// What answers.
    pub kind: SectionKind,
    /// Where in the region the section starts, bytes.
    pub offset_in_region: u64,
    /// The region.
    pub region: Arc<Region>,
}

impl FlatSection {
    /// Counts as a user of the section's RAM until dropped: an external mapper (KVM slot, VFIO,
    /// vhost-user, fixed io_uring buffers) keeps it until its removal is acknowledged.
    pub fn hold(&self) -> RegionHold {
        self.hold_as("external mapper")
    }

    /// As [`FlatSection::hold`], with the name under which a ticket reports the holder.
    pub fn hold_as(&self, _what: &str) -> RegionHold {
        todo!()
    }
}

/// The right of an external mapper to the RAM of a section. See [`FlatSection::hold`].
pub struct RegionHold {}

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
