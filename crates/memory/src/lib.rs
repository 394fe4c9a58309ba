// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory whose parts come and go while the guest runs.

mod access;
mod cached;
mod copy;
mod error;
mod flat;
mod gpa;
mod grace;
mod guard;
mod index;
mod listener;
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
pub use cached::CachedMap;
pub use error::Error;
pub use flat::{FlatIoeventfd, FlatSection, RegionHold, SectionKind};
pub use gpa::Gpa;
pub use guard::{ReadGuard, Section};
pub use listener::{Listener, ListenerError, ListenerId};
pub use memory::{Memory, MemoryConfig};
pub use pin::{Pin, PinList};
pub use ram::{
    Backing, HostMemory, NotifierId, Plugged, RamBlock, RamList, RamNotifier, RamSpec, Seal,
};
pub use reader::Reader;
pub use slice::GuestSlice;
pub use space::AddressSpace;
pub use ticket::{Holder, Phase, Ticket};
pub use tree::{Ioeventfd, Mmio, Region, Transaction};
#[cfg(feature = "vm-memory")]
pub use vm_memory::{
    DmaSpace, DmaView, LocalSpace, Marks, PinnedRam, PinnedRegion, RamSpace, SectionView, WriteLog,
    Written,
};
