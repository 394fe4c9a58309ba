// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The region tree.

use std::marker::PhantomData;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::{Error, RamBlock, Ticket};

/// Device registers.
pub trait Mmio: Send + Sync {
    /// A load of 1, 2, 4 or 8 bytes at `offset` of the region, naturally aligned. Called outside any read section.
    fn read(&self, offset: u64, size: u8) -> u64;
    /// A store of 1, 2, 4 or 8 bytes.
    fn write(&self, offset: u64, size: u8, value: u64);
}

/// A write that signals an eventfd instead of being dispatched.
#[derive(Clone, Debug)]
pub struct Ioeventfd {
    /// Offset in the region, bytes.
    pub offset: u64,
    /// Bytes of the write it matches; 0 for any.
    pub size: u8,
    /// The value it matches, if any.
    pub datamatch: Option<u64>,
    /// The eventfd.
    pub fd: Arc<OwnedFd>,
}

/// A node of the tree.
pub struct Region {}

impl Region {
    /// Only children.
    pub fn container(_name: impl Into<String>, _size: u128) -> Arc<Region> {
        todo!()
    }
    /// RAM: the whole block.
    pub fn ram(_name: impl Into<String>, _block: &Arc<RamBlock>) -> Arc<Region> {
        todo!()
    }
    /// ROM: the whole block, read-only to the guest and to devices.
    pub fn rom(_name: impl Into<String>, _block: &Arc<RamBlock>) -> Arc<Region> {
        todo!()
    }
    /// Device registers.
    pub fn mmio(_name: impl Into<String>, _size: u64, _ops: Arc<dyn Mmio>) -> Arc<Region> {
        todo!()
    }
    /// Keeps a range free.
    pub fn reservation(_name: impl Into<String>, _size: u64) -> Arc<Region> {
        todo!()
    }
    /// Shows `size` bytes of another region from `offset` on.
    pub fn alias(
        _name: impl Into<String>,
        _target: &Arc<Region>,
        _offset: u64,
        _size: u64,
    ) -> Arc<Region> {
        todo!()
    }
    /// The name.
    pub fn name(&self) -> &str {
        todo!()
    }
    /// Bytes.
    pub fn size(&self) -> u128 {
        todo!()
    }
}

/// A change of the tree under way. See [`crate::Memory::update`].
pub struct Transaction<'a> {
    _memory: PhantomData<&'a mut ()>,
}

impl Transaction<'_> {
    /// Places `child` at `offset` of `parent`; higher priority hides lower.
    pub fn add(
        &mut self,
        _parent: &Arc<Region>,
        _child: &Arc<Region>,
        _offset: u64,
        _priority: i32,
    ) -> Result<(), Error> {
        todo!()
    }
    /// Takes `child` out of its parent.
    pub fn remove(&mut self, _child: &Arc<Region>) -> Result<(), Error> {
        todo!()
    }
    /// Takes RAM out of its parent for good.
    pub fn unplug(&mut self, _child: &Arc<Region>) -> Result<Ticket, Error> {
        todo!()
    }
    /// Shows or hides `region`.
    pub fn set_enabled(&mut self, _region: &Arc<Region>, _enabled: bool) -> Result<(), Error> {
        todo!()
    }
    /// Moves `child` within its parent.
    pub fn set_offset(&mut self, _child: &Arc<Region>, _offset: u64) -> Result<(), Error> {
        todo!()
    }
    /// Adds an ioeventfd.
    pub fn add_ioeventfd(
        &mut self,
        _region: &Arc<Region>,
        _ioeventfd: Ioeventfd,
    ) -> Result<(), Error> {
        todo!()
    }
    /// Removes an ioeventfd (same offset, size, datamatch and fd).
    pub fn remove_ioeventfd(
        &mut self,
        _region: &Arc<Region>,
        _ioeventfd: &Ioeventfd,
    ) -> Result<(), Error> {
        todo!()
    }
}
