// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Address spaces and read sections.

use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::{
    Access, AccessError, Error, Gpa, Listener, ListenerId, Memory, Pin, PinList, Reader, Region,
    SectionKind,
};

/// A root region as devices and CPUs see it.
pub struct AddressSpace {}

impl AddressSpace {
    /// The name.
    pub fn name(&self) -> &str {
        todo!()
    }
    /// The memory it belongs to.
    pub fn memory(&self) -> &Arc<Memory> {
        todo!()
    }
    /// Opens a read section on the current view.
    pub fn read<'r>(&self, _reader: &'r Reader) -> ReadGuard<'r> {
        todo!()
    }
    /// Adds a listener and shows it the current view.
    pub fn add_listener(
        &self,
        _listener: Box<dyn Listener>,
        _priority: i32,
    ) -> Result<ListenerId, Error> {
        todo!()
    }
    /// Removes a listener: it is shown the removal of everything.
    pub fn remove_listener(&self, _id: ListenerId) {
        todo!()
    }
    /// What a CPU's load gives.
    pub fn load(&self, _reader: &Reader, _addr: u64, _size: u8) -> u64 {
        todo!()
    }
    /// What a CPU's store does.
    pub fn store(&self, _reader: &Reader, _addr: u64, _size: u8, _value: u64) {
        todo!()
    }
}

/// One read section on one view.
pub struct ReadGuard<'r> {
    _reader: &'r Reader,
}

impl<'r> ReadGuard<'r> {
    /// What is at an address.
    pub fn lookup(&self, _gpa: Gpa) -> Option<Section<'_>> {
        todo!()
    }
    /// Copies from guest memory.
    pub fn read_bytes(&self, _gpa: Gpa, _bytes: &mut [u8]) -> Result<(), AccessError> {
        todo!()
    }
    /// Copies to guest memory.
    pub fn write_bytes(&self, _gpa: Gpa, _bytes: &[u8]) -> Result<(), AccessError> {
        todo!()
    }
    /// Reads a value.
    pub fn read<T: FromBytes>(&self, _gpa: Gpa) -> Result<T, AccessError> {
        todo!()
    }
    /// Writes a value.
    pub fn write<T: IntoBytes + Immutable>(&self, _gpa: Gpa, _value: T) -> Result<(), AccessError> {
        todo!()
    }
    /// Pins `len` bytes within one region.
    pub fn pin(&self, _gpa: Gpa, _len: usize, _access: Access) -> Result<Pin, AccessError> {
        todo!()
    }
    /// Pins a list of ranges.
    pub fn pin_list(
        &self,
        _ranges: &[(Gpa, u32)],
        _access: Access,
        _list: &mut PinList,
    ) -> Result<(), AccessError> {
        todo!()
    }
}

/// What answers at an address.
pub struct Section<'g> {
    _guard: PhantomData<&'g ()>,
}

impl Section<'_> {
    /// The addresses of the whole section.
    pub fn range(&self) -> Range<u64> {
        todo!()
    }
    /// Bytes from the address looked up to the end of the section.
    pub fn remaining(&self) -> u64 {
        todo!()
    }
    /// Host address of the address looked up, for RAM. Valid inside the read section only.
    pub fn host(&self) -> Option<NonNull<u8>> {
        todo!()
    }
    /// What answers.
    pub fn kind(&self) -> &SectionKind {
        todo!()
    }
    /// The region.
    pub fn region(&self) -> &Arc<Region> {
        todo!()
    }
    /// Offset in the region of the address looked up.
    pub fn offset_in_region(&self) -> u64 {
        todo!()
    }
}
