// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The nodes of the tree.

use std::fmt;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};

use super::registers::{Mmio, Registers};
use crate::iommu::{Domain, Iommu};
use crate::{Error, RamBlock};

/// A guest's write that signals an eventfd instead of being dispatched.
#[derive(Clone, Debug)]
pub struct Ioeventfd {
    /// Offset in the region, in bytes.
    pub offset: u64,
    /// Bytes of the write it matches; 0 for any.
    pub size: u8,
    /// The value it matches, if any.
    pub datamatch: Option<u64>,
    /// The eventfd.
    pub fd: Arc<OwnedFd>,
}

impl Ioeventfd {
    pub(super) fn same_place(&self, other: &Ioeventfd) -> bool {
        (self.offset, self.size, self.datamatch) == (other.offset, other.size, other.datamatch)
    }
}

pub(crate) enum RegionKind {
    Container,
    Ram {
        block: Arc<RamBlock>,
        readonly: bool,
        /// Memory of a device, not of the machine.
        device: bool,
    },
    /// Loads come from the block while the region is direct; the rest goes to the registers.
    RomDevice {
        block: Arc<RamBlock>,
        registers: Registers,
    },
    Mmio(Registers),
    Iommu(Domain),
    Reservation,
    Alias {
        target: Arc<Region>,
        offset: u64,
    },
}

/// A node of the tree: something that answers a range of addresses, or holds what does.
///
/// A region is placed in one parent at most; aliases show it elsewhere. Any region but an alias
/// can hold children, which hide what it answers itself. All changes go through
/// [`crate::Memory::update`].
pub struct Region {
    name: String,
    kind: RegionKind,
    /// Bytes; what a container has at the very last address of a 64-bit space is out of reach.
    size: AtomicU64,
    /// Bytes it may grow to.
    max_size: AtomicU64,
    /// Bytes it was to have: more than the above when they do not fit an address space.
    wanted_size: u128,
    /// Of a ROM device: loads come from its block.
    direct: AtomicBool,
    /// The memory whose tree the region is part of, by number; set at its first use.
    memory: OnceLock<u64>,
    state: Mutex<State>,
}

/// What only the holder of the tree's lock looks at; the mutex is never contended.
#[derive(Default)]
pub(super) struct State {
    pub(super) parent: Option<Weak<Region>>,
    /// Front to back: by falling priority, later ones before earlier ones.
    pub(super) children: Vec<Child>,
    /// Aliases that show this region.
    pub(super) aliases: Vec<Weak<Region>>,
    /// Address spaces whose root this is, by number.
    pub(super) spaces: Vec<u64>,
    pub(super) disabled: bool,
    pub(super) ioeventfds: Vec<Ioeventfd>,
    /// Ranges (bytes of the region) whose writes may be kept back; disjoint.
    pub(super) coalesced: Vec<Range<u64>>,
}

impl State {
    /// Number of the place of `child`.
    pub(super) fn place_of(&self, child: &Arc<Region>) -> Option<usize> {
        let mut places = self.children.iter();
        places.position(|place| Arc::ptr_eq(&place.region, child))
    }

    /// Whether an address space or an alias shows the region, besides what its parent does.
    pub(super) fn is_shown_elsewhere(&self) -> bool {
        !self.spaces.is_empty() || !self.aliases.is_empty()
    }
}

#[derive(Clone)]
pub(super) struct Child {
    pub(super) region: Arc<Region>,
    pub(super) offset: u64,
    pub(super) size: u64,
    pub(super) priority: i32,
    pub(super) enabled: bool,
    /// See [`Region::is_machine_ram`].
    pub(super) machine_ram: bool,
}

impl Region {
    fn new(name: impl Into<String>, kind: RegionKind, size: u128) -> Arc<Region> {
        let counted = u64::try_from(size).unwrap_or(u64::MAX);
        Arc::new(Region {
            name: name.into(),
            kind,
            size: AtomicU64::new(counted),
            max_size: AtomicU64::new(counted),
            wanted_size: size,
            direct: AtomicBool::new(true),
            memory: OnceLock::new(),
            state: Mutex::default(),
        })
    }

    fn of_ram(
        name: impl Into<String>,
        block: &Arc<RamBlock>,
        readonly: bool,
        device: bool,
    ) -> Arc<Region> {
        let kind = RegionKind::Ram {
            block: Arc::clone(block),
            readonly,
            device,
        };
        Region::new(name, kind, block.size_bytes().into())
    }

    /// A region that answers nothing itself; `size` in bytes, at most 2^64.
    pub fn container(name: impl Into<String>, size: u128) -> Arc<Region> {
        Region::new(name, RegionKind::Container, size)
    }

    /// RAM: all of `block` as it is now.
    pub fn ram(name: impl Into<String>, block: &Arc<RamBlock>) -> Arc<Region> {
        Region::of_ram(name, block, block.is_readonly(), false)
    }

    /// RAM that belongs to a device, such as a BAR: mapped directly and reached by DMA without a
    /// bounce buffer, but no memory of the machine. The guest may move it over other RAM.
    pub fn ram_device(name: impl Into<String>, block: &Arc<RamBlock>) -> Arc<Region> {
        Region::of_ram(name, block, block.is_readonly(), true)
    }

    /// ROM: all of `block`; neither the guest nor a device can write to it.
    pub fn rom(name: impl Into<String>, block: &Arc<RamBlock>) -> Arc<Region> {
        Region::of_ram(name, block, true, false)
    }

    /// A ROM device, such as flash: loads come from `block`, stores go to `registers`; both go
    /// there after [`crate::Transaction::set_rom_direct`] has switched it off.
    pub fn rom_device(
        name: impl Into<String>,
        block: &Arc<RamBlock>,
        registers: Registers,
    ) -> Arc<Region> {
        let kind = RegionKind::RomDevice {
            block: Arc::clone(block),
            registers,
        };
        Region::new(name, kind, block.size_bytes().into())
    }

    /// Device registers that take every access; `size` in bytes.
    pub fn mmio(name: impl Into<String>, size: u64, ops: Arc<dyn Mmio>) -> Arc<Region> {
        Region::registers(name, size, Registers::new(ops))
    }

    /// Device registers; `size` in bytes.
    pub fn registers(name: impl Into<String>, size: u64, registers: Registers) -> Arc<Region> {
        Region::new(name, RegionKind::Mmio(registers), size.into())
    }

    /// Addresses that `iommu` translates; `size` in bytes, at most 2^64.
    pub fn iommu(name: impl Into<String>, size: u128, iommu: Arc<dyn Iommu>) -> Arc<Region> {
        Region::new(name, RegionKind::Iommu(Domain::new(iommu)), size)
    }

    /// Keeps a range from being used by what lies behind; `size` in bytes.
    pub fn reservation(name: impl Into<String>, size: u64) -> Arc<Region> {
        Region::new(name, RegionKind::Reservation, size.into())
    }

    /// Shows `size` bytes of `target` from `offset` on.
    pub fn alias(
        name: impl Into<String>,
        target: &Arc<Region>,
        offset: u64,
        size: u64,
    ) -> Arc<Region> {
        let kind = RegionKind::Alias {
            target: Arc::clone(target),
            offset,
        };
        let alias = Region::new(name, kind, size.into());
        let mut state = target.state();
        state.aliases.retain(|alias| alias.strong_count() > 0);
        state.aliases.push(Arc::downgrade(&alias));
        drop(state);
        alias
    }

    /// Lets the region grow up to `max` bytes later, by [`crate::Transaction::resize`]. A region
    /// made without it can only shrink, and grow back to what it was.
    #[must_use]
    pub fn growing_to(self: Arc<Self>, max: u64) -> Arc<Self> {
        self.max_size.fetch_max(max, Ordering::Relaxed);
        self
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes; a container of 2^64 bytes counts one less.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// The block a RAM or ROM region shows.
    pub fn ram_block(&self) -> Option<&Arc<RamBlock>> {
        match &self.kind {
            RegionKind::Ram { block, .. } | RegionKind::RomDevice { block, .. } => Some(block),
            _ => None,
        }
    }

    /// Whether it is RAM of a device: see [`Region::ram_device`].
    pub fn is_ram_device(&self) -> bool {
        matches!(self.kind, RegionKind::Ram { device: true, .. })
    }

    /// Bytes it may grow to.
    pub fn max_size(&self) -> u64 {
        self.max_size.load(Ordering::Relaxed)
    }

    /// What tells holders of translations of an IOMMU region that those change.
    pub fn domain(&self) -> Option<&Domain> {
        match &self.kind {
            RegionKind::Iommu(domain) => Some(domain),
            _ => None,
        }
    }

    /// Whether loads come straight from the block.
    pub(crate) fn is_direct(&self) -> bool {
        match &self.kind {
            RegionKind::Ram { .. } => true,
            RegionKind::RomDevice { .. } => self.direct.load(Ordering::Relaxed),
            _ => false,
        }
    }

    pub(super) fn set_direct(&self, direct: bool) {
        self.direct.store(direct, Ordering::Relaxed);
    }

    /// Whether it, or what it is an alias of, is RAM of the machine.
    pub(super) fn is_machine_ram(&self) -> bool {
        match &self.kind {
            RegionKind::Ram {
                readonly, device, ..
            } => !readonly && !device,
            RegionKind::Alias { target, .. } => target.is_machine_ram(),
            _ => false,
        }
    }

    /// Whether its size and rules are possible.
    fn check(&self) -> Result<(), Error> {
        let size = self.wanted_size;
        let bad = |reason| {
            Err(Error::BadSize {
                region: self.name.clone(),
                reason: format!("{size:#x} bytes: {reason}"),
            })
        };
        if size == 0 {
            return bad("a region has at least one byte");
        }
        if size > 1 << 64 {
            return bad("an address space ends at 2^64");
        }
        match &self.kind {
            RegionKind::Alias { offset, .. } if u128::from(*offset) + size > 1 << 64 => {
                bad("the alias shows what lies past 2^64")
            }
            RegionKind::Mmio(registers) | RegionKind::RomDevice { registers, .. } => {
                let fault = registers.fault();
                fault.map_or(Ok(()), |reason| {
                    Err(Error::BadRules {
                        region: self.name.clone(),
                        reason,
                    })
                })
            }
            _ => Ok(()),
        }
    }

    /// Makes the region part of the memory numbered `memory`.
    pub(crate) fn bind(&self, memory: u64) -> Result<(), Error> {
        self.check()?;
        if *self.memory.get_or_init(|| memory) == memory {
            return Ok(());
        }
        Err(Error::Foreign(format!("region {}", self.name)))
    }

    /// Whether it is part of another memory than the one numbered `memory`.
    pub(crate) fn is_foreign(&self, memory: u64) -> bool {
        self.memory.get().is_some_and(|own| *own != memory)
    }

    pub(super) fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Relaxed);
    }

    pub(crate) fn kind(&self) -> &RegionKind {
        &self.kind
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub(super) fn parent(&self) -> Option<Arc<Region>> {
        self.state().parent.as_ref()?.upgrade()
    }

    /// Its priority in its parent; 0 without one.
    pub(super) fn priority(self: &Arc<Self>) -> i32 {
        let Some(parent) = self.parent() else {
            return 0;
        };
        let state = parent.state();
        let mut places = state.children.iter();
        let place = places.find(|place| Arc::ptr_eq(&place.region, self));
        place.map_or(0, |place| place.priority)
    }

    /// Whether `other` is this region or lies below it, aliases followed.
    pub(super) fn reaches(&self, other: &Region) -> bool {
        if std::ptr::eq(self, other) {
            return true;
        }
        if let RegionKind::Alias { target, .. } = &self.kind
            && target.reaches(other)
        {
            return true;
        }
        let state = self.state();
        if state.children.is_empty() {
            return false;
        }
        let children: Vec<Arc<Region>> = state
            .children
            .iter()
            .map(|c| Arc::clone(&c.region))
            .collect();
        drop(state);
        children.iter().any(|child| child.reaches(other))
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({}, {:#x})", self.name, self.size())
    }
}
