// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pins.

use crate::{AccessError, Gpa};

/// An I/O's right to a piece of guest memory.
pub struct Pin {
    ptr: *mut u8,
    len: usize,
    gpa: Gpa,
}

// SAFETY: skeleton.
unsafe impl Send for Pin {}

impl Pin {
    /// Host address.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }
    /// Bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }
    /// Guest address.
    pub fn gpa(&self) -> Gpa {
        self.gpa
    }
    /// Copies out.
    pub fn read_at(&self, _offset: usize, _bytes: &mut [u8]) -> Result<(), AccessError> {
        todo!()
    }
    /// Copies in; `ReadOnly` unless pinned for writing.
    pub fn write_at(&self, _offset: usize, _bytes: &[u8]) -> Result<(), AccessError> {
        todo!()
    }
}

impl Clone for Pin {
    fn clone(&self) -> Pin {
        todo!()
    }
}

/// The pins and iovecs of one request.
#[derive(Default)]
pub struct PinList {
    iovecs: Vec<libc::iovec>,
}

// SAFETY: skeleton.
unsafe impl Send for PinList {}

impl PinList {
    /// An empty list.
    pub fn new() -> PinList {
        PinList::default()
    }
    /// The pieces in order.
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs
    }
    /// Bytes in all.
    pub fn total_len(&self) -> usize {
        todo!()
    }
    /// Copies out of the pinned memory, from byte `offset` of the list on.
    pub fn copy_to(&self, _offset: usize, _bytes: &mut [u8]) -> Result<(), AccessError> {
        todo!()
    }
    /// Copies into the pinned memory, from byte `offset` of the list on.
    pub fn copy_from(&self, _offset: usize, _bytes: &[u8]) -> Result<(), AccessError> {
        todo!()
    }
    /// Releases all pins.
    pub fn clear(&mut self) {
        todo!()
    }
}
