// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory aligned for direct I/O.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::io;
use std::ptr::NonNull;

use crate::buffer::Buffer;

/// Zeroed heap memory at an aligned address.
pub(crate) struct AlignedBuffer {
    start: NonNull<u8>,
    layout: Layout,
    iovec: libc::iovec,
}

impl AlignedBuffer {
    /// # Errors
    /// `OutOfMemory`, or `InvalidInput` when `len` is 0 or `align` no power of two.
    pub(crate) fn new(len: usize, align: usize) -> io::Result<AlignedBuffer> {
        let layout =
            Layout::from_size_align(len, align).map_err(|_| io::ErrorKind::InvalidInput)?;
        if len == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the layout has a size other than zero.
        let start =
            NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(io::ErrorKind::OutOfMemory)?;
        let iovec = libc::iovec {
            iov_base: start.as_ptr().cast(),
            iov_len: len,
        };
        Ok(AlignedBuffer {
            start,
            layout,
            iovec,
        })
    }

    /// Uses only the first `len` bytes from now on, at most what was allocated.
    pub(crate) fn set_len(&mut self, len: usize) {
        self.iovec.iov_len = len.min(self.layout.size());
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: so many initialised bytes were allocated, and `&self` keeps writers out.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.iovec.iov_len) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: so many initialised bytes were allocated, and `&mut self` keeps everybody else out.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.iovec.iov_len) }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, freed only here.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

// SAFETY: the memory stays allocated at its address until the value is dropped, and is reached only through it.
unsafe impl Buffer for AlignedBuffer {
    fn iovecs(&self) -> &[libc::iovec] {
        std::slice::from_ref(&self.iovec)
    }

    fn total_len(&self) -> usize {
        self.iovec.iov_len
    }

    fn copy_to(&self, offset: usize, bytes: &mut [u8]) -> io::Result<()> {
        let from = self
            .bytes()
            .get(offset..)
            .and_then(|rest| rest.get(..bytes.len()));
        bytes.copy_from_slice(from.ok_or(io::ErrorKind::InvalidInput)?);
        Ok(())
    }

    fn copy_from(&mut self, offset: usize, bytes: &[u8]) -> io::Result<()> {
        let to = self
            .bytes_mut()
            .get_mut(offset..)
            .and_then(|rest| rest.get_mut(..bytes.len()));
        to.ok_or(io::ErrorKind::InvalidInput)?
            .copy_from_slice(bytes);
        Ok(())
    }
}
