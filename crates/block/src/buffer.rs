// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory an operation reads or writes.

use std::io;

use ebbtide_memory::PinList;

/// Memory the kernel may read and write while the value exists.
///
/// # Safety
/// From the moment [`iovecs`](Self::iovecs) has been called until the value is dropped, every iovec it returned stays
/// valid for reads, and for writes if the value is given to a read operation; also while the value is moved. Nobody
/// relies on the contents not changing under them.
pub unsafe trait Buffer: 'static {
    /// The pieces, in order.
    fn iovecs(&self) -> &[libc::iovec];

    /// Bytes of all pieces together.
    fn total_len(&self) -> usize;

    /// Copies out of the buffer, from its byte `offset` on.
    ///
    /// # Errors
    /// The buffer ends before `bytes` does.
    fn copy_to(&self, offset: usize, bytes: &mut [u8]) -> io::Result<()>;

    /// Copies into the buffer, from its byte `offset` on.
    ///
    /// # Errors
    /// The buffer ends before `bytes` does, or may not be written.
    fn copy_from(&mut self, offset: usize, bytes: &[u8]) -> io::Result<()>;
}

// SAFETY: a pin keeps its guest memory mapped until it is dropped, wherever the list is moved; guest memory is shared
// with the guest, so nobody expects it to stand still.
unsafe impl Buffer for PinList {
    fn iovecs(&self) -> &[libc::iovec] {
        PinList::iovecs(self)
    }

    fn total_len(&self) -> usize {
        PinList::total_len(self)
    }

    fn copy_to(&self, offset: usize, bytes: &mut [u8]) -> io::Result<()> {
        PinList::copy_to(self, offset, bytes).map_err(io::Error::other)
    }

    fn copy_from(&mut self, offset: usize, bytes: &[u8]) -> io::Result<()> {
        PinList::copy_from(self, offset, bytes).map_err(io::Error::other)
    }
}

// SAFETY: what is in the box is as good as by itself, and moves even less.
unsafe impl<B: Buffer> Buffer for Box<B> {
    fn iovecs(&self) -> &[libc::iovec] {
        B::iovecs(self)
    }

    fn total_len(&self) -> usize {
        B::total_len(self)
    }

    fn copy_to(&self, offset: usize, bytes: &mut [u8]) -> io::Result<()> {
        B::copy_to(self, offset, bytes)
    }

    fn copy_from(&mut self, offset: usize, bytes: &[u8]) -> io::Result<()> {
        B::copy_from(self, offset, bytes)
    }
}

/// Memory of our own, for what the VMM itself reads and writes.
pub struct OwnedBuffer {
    bytes: Box<[u8]>,
    iovec: libc::iovec,
}

impl OwnedBuffer {
    /// A buffer with these contents.
    pub fn new(bytes: impl Into<Box<[u8]>>) -> OwnedBuffer {
        let mut bytes = bytes.into();
        let iovec = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        OwnedBuffer { bytes, iovec }
    }

    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> OwnedBuffer {
        OwnedBuffer::new(vec![0; len])
    }

    /// The contents.
    pub fn into_bytes(self) -> Box<[u8]> {
        self.bytes
    }
}

// SAFETY: the bytes live on the heap until the value is dropped, and nothing reaches them but through the value, of
// which an operation is the only owner.
unsafe impl Buffer for OwnedBuffer {
    fn iovecs(&self) -> &[libc::iovec] {
        std::slice::from_ref(&self.iovec)
    }

    fn total_len(&self) -> usize {
        self.bytes.len()
    }

    fn copy_to(&self, offset: usize, bytes: &mut [u8]) -> io::Result<()> {
        let from = part(offset, bytes.len()).and_then(|part| self.bytes.get(part));
        bytes.copy_from_slice(from.ok_or(io::ErrorKind::InvalidInput)?);
        Ok(())
    }

    fn copy_from(&mut self, offset: usize, bytes: &[u8]) -> io::Result<()> {
        let to = part(offset, bytes.len()).and_then(|part| self.bytes.get_mut(part));
        to.ok_or(io::ErrorKind::InvalidInput)?
            .copy_from_slice(bytes);
        Ok(())
    }
}

fn part(offset: usize, len: usize) -> Option<std::ops::Range<usize>> {
    Some(offset..offset.checked_add(len)?)
}
