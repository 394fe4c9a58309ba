// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The nodes of the tree.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};

use crate::{Error, RamBlock};

/// Device registers.
///
/// Called outside any read section, from several threads at once, with the region perhaps
/// already out of the map: what the device does with late accesses is its own business.
pub trait Mmio: Send + Sync {
    /// A load of `size` bytes (1, 2, 4 or 8) at `offset` of the region, a multiple of `size`.
    fn read(&self, offset: u64, size: u8) -> u64;
    /// A store of `size` bytes (1, 2, 4 or 8) at `offset` of the region, a multiple of `size`.
    fn write(&self, offset: u64, size: u8, value: u64);
}

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
    },
    Mmio(Arc<dyn Mmio>),
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
}

#[derive(Clone)]
pub(super) struct Child {
    pub(super) region: Arc<Region>,
    pub(super) offset: u64,
    pub(super) size: u64,
    pub(super) priority: i32,
    pub(super) enabled: bool,
}

impl Region {
    fn new(name: impl Into<String>, kind: RegionKind, size: u64) -> Arc<Region> {
        let (name, size) = (name.into(), AtomicU64::new(size));
        Arc::new(Region {
            name,
            kind,
            size,
            memory: OnceLock::new(),
            state: Mutex::default(),
        })
    }

    /// A region that answers nothing itself; `size` in bytes, at most 2^64.
    pub fn container(name: impl Into<String>, size: u128) -> Arc<Region> {
        Region::new(
            name,
            RegionKind::Container,
            u64::try_from(size).unwrap_or(u64::MAX),
        )
    }

    /// RAM: all of `block` as it is now.
    pub fn ram(name: impl Into<String>, block: &Arc<RamBlock>) -> Arc<Region> {
        let kind = RegionKind::Ram {
            block: Arc::clone(block),
            readonly: block.is_readonly(),
        };
        Region::new(name, kind, block.size_bytes())
    }

    /// ROM: all of `block`; neither the guest nor a device can write to it.
    pub fn rom(name: impl Into<String>, block: &Arc<RamBlock>) -> Arc<Region> {
        let kind = RegionKind::Ram {
            block: Arc::clone(block),
            readonly: true,
        };
        Region::new(name, kind, block.size_bytes())
    }

    /// Device registers; `size` in bytes.
    pub fn mmio(name: impl Into<String>, size: u64, ops: Arc<dyn Mmio>) -> Arc<Region> {
        Region::new(name, RegionKind::Mmio(ops), size)
    }

    /// Keeps a range from being used by what lies behind; `size` in bytes.
    pub fn reservation(name: impl Into<String>, size: u64) -> Arc<Region> {
        Region::new(name, RegionKind::Reservation, size)
    }

    /// Shows `size` bytes of `target` from `offset` on.
    pub fn alias(
        name: impl Into<String>,
        target: &Arc<Region>,
        offset: u64,
        size: u64,
    ) -> Arc<Region> {
        let alias = Region::new(
            name,
            RegionKind::Alias {
                target: Arc::clone(target),
                offset,
            },
            size,
        );
        let mut state = target.state();
        state.aliases.retain(|alias| alias.strong_count() > 0);
        state.aliases.push(Arc::downgrade(&alias));
        drop(state);
        alias
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
            RegionKind::Ram { block, .. } => Some(block),
            _ => None,
        }
    }

    /// Makes the region part of the memory numbered `memory`.
    pub(crate) fn bind(&self, memory: u64) -> Result<(), Error> {
        if *self.memory.get_or_init(|| memory) == memory {
            return Ok(());
        }
        Err(Error::Foreign(format!("region {}", self.name)))
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
        let children: Vec<Arc<Region>> = self
            .state()
            .children
            .iter()
            .map(|c| Arc::clone(&c.region))
            .collect();
        children.iter().any(|child| child.reaches(other))
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({}, {:#x})", self.name, self.size())
    }
}
