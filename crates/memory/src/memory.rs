// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The core object.

use std::future::Future;
use std::sync::Arc;

use crate::{AddressSpace, Error, RamList, Reader, Region, Transaction};

/// How a [`Memory`] is made.
#[derive(Clone, Debug)]
pub struct MemoryConfig {
    /// Address space reserved for RAM blocks, in bytes. Costs nothing but address space, and is
    /// never reused within one `Memory`: take several times what will ever be plugged.
    pub arena_bytes: u64,
}

impl Default for MemoryConfig {
    fn default() -> MemoryConfig {
        MemoryConfig {
            arena_bytes: 8 << 40,
        }
    }
}

/// The memory core of one virtual machine.
pub struct Memory {}

impl Memory {
    /// Makes an empty memory.
    pub fn new(_config: MemoryConfig) -> Result<Arc<Memory>, Error> {
        todo!()
    }
    /// This thread's reader.
    pub fn register(self: &Arc<Self>) -> Reader {
        todo!()
    }
    /// The RAM blocks.
    pub fn ram(&self) -> &RamList {
        todo!()
    }
    /// Makes an address space that shows `root`.
    pub fn address_space(
        self: &Arc<Self>,
        _name: &str,
        _root: &Arc<Region>,
    ) -> Result<Arc<AddressSpace>, Error> {
        todo!()
    }
    /// Changes the tree: all or nothing.
    pub fn update<T>(
        &self,
        _f: impl FnOnce(&mut Transaction<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        todo!()
    }
    /// A grace period.
    pub fn grace(&self) -> impl Future<Output = ()> + Send + 'static {
        async { todo!() }
    }
    /// A grace period, waited for on this thread.
    pub fn synchronize(&self) {
        todo!()
    }
    /// The tree, or the flat views, as text.
    pub fn mtree(&self, _flat: bool) -> String {
        todo!()
    }
}
