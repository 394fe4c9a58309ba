// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory whose parts come and go while the guest runs.
//!
//! A [`Memory`] is the memory of one virtual machine. RAM comes from its [`RamList`] as
//! [`RamBlock`]s; [`Region`]s (containers, RAM, ROM, registers, aliases) put blocks at guest
//! addresses; an [`AddressSpace`] shows the tree below one of them, flattened, to CPUs and
//! devices. The tree is changed by [`Memory::update`], in which all changes become visible at
//! once, and never waits for anybody.
//!
//! Guest memory is touched in three ways:
//!
//! - inside a read section, a [`ReadGuard`], for look-ups and copies. Sections are for the thread
//!   that registered a [`Reader`], and are over before anything blocks;
//! - through a [`CachedMap`], for rings that are looked at all the time. It holds up nothing and
//!   is checked at each use;
//! - under a [`Pin`] (a [`PinList`] for several ranges), for I/O that goes on while the thread
//!   does something else. The request owns it and drops it, on any thread.
//!
//! RAM goes by [`Transaction::unplug`]: the map is published without it, and the [`Ticket`] says
//! when the last user is gone. Parts of a sparse block go by [`RamBlock::seal`].
//!
//! # To start from
//!
//! RAM is plugged, a device writes to it, and it is unplugged while the write is under way. The
//! futures need no particular executor; without one, [`Ticket::wait`] and [`Seal::wait`] block.
//!
//! ```
//! use std::sync::mpsc;
//! use std::thread;
//!
//! use ebbtide_memory::{Access, AccessError, Gpa, Memory, MemoryConfig, Phase, RamSpec, Region};
//! # use std::{future::Future, sync::Arc, task::{Context, Poll, Wake, Waker}};
//! # struct Unpark(thread::Thread);
//! # impl Wake for Unpark {
//! #     fn wake(self: Arc<Self>) { self.0.unpark() }
//! # }
//! # fn block_on(future: impl Future<Output = ()>) {
//! #     let mut future = std::pin::pin!(future);
//! #     let waker = Waker::from(Arc::new(Unpark(thread::current())));
//! #     while let Poll::Pending = future.as_mut().poll(&mut Context::from_waker(&waker)) {
//! #         thread::park();
//! #     }
//! # }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let memory = Memory::new(MemoryConfig::default())?;
//! let root = Region::container("system", 1 << 48);
//! let system = memory.address_space("memory", &root)?;
//!
//! // Plug: a block of RAM, a region that shows it, a place in the map.
//! let block = memory.ram().add(RamSpec::anon("dimm0", 64 << 20))?;
//! let dimm = Region::ram("dimm0", &block);
//! let base = Gpa(4 << 30);
//! memory.update(|t| t.add(&root, &dimm, base.0, 0))?;
//!
//! // Each thread registers once. A section costs two plain stores.
//! let reader = memory.register();
//! system.read(&reader).write(base, 0x1234_5678u32)?;
//! assert_eq!(system.read(&reader).read::<u32>(base)?, 0x1234_5678);
//!
//! // DMA: the pin is taken inside a section and outlives it. It belongs to the request.
//! let pin = system.read(&reader).pin(base, 4096, Access::Write)?;
//! let (disk, completion) = mpsc::channel();
//! let request = thread::spawn(move || {
//!     let data: Vec<u8> = completion.recv().unwrap(); // the disk takes its time
//!     pin.write_at(0, &data)
//!     // The I/O is over: the pin is dropped here.
//! });
//!
//! // Unplug while it runs. This waits for nothing.
//! let ticket = memory.update(|t| t.unplug(&dimm))?;
//! let late = system.read(&reader).pin(base, 4096, Access::Write);
//! assert!(matches!(late, Err(AccessError::Unmapped { .. })));
//!
//! block_on(ticket.reached(Phase::Draining));
//! for holder in ticket.holders() {
//!     println!("dimm0 is still used by {holder}");
//! }
//! let ticket = match ticket.destroy() {
//!     Err((ticket, error)) => {
//!         println!("{error}"); // too early, and says because of whom
//!         ticket
//!     }
//!     Ok(()) => panic!("given back under a running request"),
//! };
//!
//! disk.send(vec![0xab; 4096])?;
//! // Drained: nobody uses the memory. Gone: the host has it back.
//! block_on(ticket.drained());
//! let gone = ticket.reached(Phase::Gone);
//! ticket.destroy().map_err(|(_, error)| error)?;
//! block_on(gone);
//! request.join().unwrap()?;
//! # Ok(())
//! # }
//! ```
//!
//! # From another library
//!
//! With feature `vm-memory` the traits of that crate are implemented, so that `virtio-queue`,
//! `linux-loader` and `vhost` work on an [`AddressSpace`]. The README says with which type, and
//! what cannot be had. It also draws the protocol and numbers the invariants that the comments on
//! `unsafe` refer to (M1 and following).

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod access;
mod busy;
mod cached;
mod copy;
#[cfg(all(test, not(loom)))]
mod counted;
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
mod turns;
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
    Backing, Discard, HostMemory, NotifierId, NumaPolicy, Plugged, RamBlock, RamBlocks, RamList,
    RamListGuard, RamNotifier, RamPolicy, RamSpec, Seal,
};
pub use reader::Reader;
pub use slice::GuestSlice;
pub use space::AddressSpace;
pub use ticket::{Holder, Phase, Phases, Ticket, UnplugReport};
pub use tree::{AccessRules, Endian, Ioeventfd, Mmio, Region, Registers, Transaction};
#[cfg(feature = "vm-memory")]
pub use vm_memory::{
    DmaMemory, DmaSpace, DmaView, LocalSpace, LocalView, Marks, PinnedRam, PinnedRegion, RamSpace,
    SectionView, WriteLog, Written,
};
