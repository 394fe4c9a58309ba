// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory whose parts come and go while the guest runs.

mod access;
mod busy;
mod cached;
mod copy;
mod dirty;
mod discard;
mod dispatch;
mod error;
mod fault;
mod flat;
mod gpa;
mod grace;
mod guard;
mod index;
mod iommu;
mod listener;
mod map;
mod memory;
#[cfg(loom)]
#[doc(hidden)]
pub mod modelled;
mod pin;
mod ram;
mod reader;
mod slice;
mod space;
mod sweeper;
mod sync;
mod ticket;
mod tree;
#[cfg(feature = "vm-memory")]
mod vm_memory;

pub use access::{Access, AccessError};
pub use busy::{Busy, EntryPoint};
pub use cached::CachedMap;
pub use dirty::{DirtyClient, DirtyLog, DirtyRanges, DirtySnapshot};
pub use discard::{
    DiscardCounts, DiscardListener, DiscardRules, DiscardSubscription, DiscardToken,
};
pub use error::Error;
pub use flat::{FlatCoalesced, FlatIoeventfd, FlatSection, RegionHold, SectionKind};
pub use gpa::Gpa;
pub use guard::{ReadGuard, Section};
pub use iommu::{Domain, Iommu, IommuMapping, IommuNotifier, IommuNotifierId, Translation};
pub use listener::{Listener, ListenerError, ListenerId};
pub use map::{BounceGrant, BounceWait, Bounced, BusMaster, DirectMapping, Dma, Mapping};
pub use memory::{Memory, MemoryConfig};
pub use pin::{Pin, PinList};
pub use ram::{
    Backing, HostMemory, NotifierId, NumaPolicy, Plugged, RamBlock, RamBlocks, RamList,
    RamListGuard, RamNotifier, RamPolicy, RamSpec, Seal,
};
pub use reader::Reader;
pub use slice::GuestSlice;
pub use space::AddressSpace;
pub use ticket::{Holder, Phase, Ticket};
pub use tree::{AccessRules, Endian, Ioeventfd, Mmio, Region, Registers, Transaction};
#[cfg(feature = "vm-memory")]
pub use vm_memory::{PinnedRam, PinnedRegion};
