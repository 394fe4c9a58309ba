// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory of one vectored request.

use std::fmt;
use std::ops::Range;

use smallvec::SmallVec;

use super::Token;
use crate::fault::Fault;
use crate::reader::counters::Lane;
use crate::reader::row::Row;
use crate::{Access, AccessError, Gpa, copy};

/// Pieces of guest memory in order, with one pin per region: what a vectored I/O needs. Filled by
/// [`crate::ReadGuard::pin_list`].
pub struct PinList {
    iovecs: SmallVec<[libc::iovec; 4]>,
    /// By piece, the token to mark it by as dirty, if it was pinned for writing.
    writes: SmallVec<[Option<u32>; 4]>,
    tokens: SmallVec<[Token; 2]>,
    total_len: usize,
    writable: bool,
}

// SAFETY: the pointers stay valid on every thread until the tokens are dropped (M3).
unsafe impl Send for PinList {}
// SAFETY: shared use gives the pointers and copies through them.
unsafe impl Sync for PinList {}

impl Default for PinList {
    fn default() -> PinList {
        PinList {
            iovecs: SmallVec::new(),
            writes: SmallVec::new(),
            tokens: SmallVec::new(),
            total_len: 0,
            writable: true,
        }
    }
}

impl PinList {
    /// An empty list.
    pub fn new() -> PinList {
        PinList::default()
    }

    /// The pieces in order, valid until the list is cleared or dropped; writable if all of it was
    /// pinned for writing.
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs
    }

    /// The host addresses of the pieces, in order.
    pub fn host_ranges(&self) -> impl Iterator<Item = Range<u64>> {
        self.iovecs.iter().map(|iovec| {
            let start = iovec.iov_base as u64;
            start..start + iovec.iov_len as u64
        })
    }

    /// Bytes in all.
    pub fn total_len(&self) -> usize {
        self.total_len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.iovecs.is_empty()
    }

    /// Copies out of the memory, from byte `offset` of the list on.
    ///
    /// # Errors
    /// `Overflow` past the end, `HostFault`; the address in them is the offset.
    pub fn copy_to(&self, offset: usize, bytes: &mut [u8]) -> Result<(), AccessError> {
        let target = bytes.as_mut_ptr();
        self.each(offset, bytes.len(), |host, at, count| {
            // SAFETY: `each` stays inside the pinned memory (M3) and inside `bytes`.
            unsafe { copy::from_guest(host, target.add(at), count) }
        })
    }

    /// Copies into the memory, from byte `offset` of the list on.
    ///
    /// # Errors
    /// `Overflow` past the end; `ReadOnly` unless all of it was pinned for writing; `HostFault`.
    pub fn copy_from(&self, offset: usize, bytes: &[u8]) -> Result<(), AccessError> {
        if !self.writable {
            return Err(AccessError::ReadOnly {
                gpa: Gpa(offset as u64),
                len: bytes.len() as u64,
            });
        }
        self.each(offset, bytes.len(), |host, at, count| {
            // SAFETY: `each` stays inside the pinned memory (M3) and inside `bytes`.
            unsafe { copy::to_guest(bytes.as_ptr().add(at), host, count) }
        })
    }

    /// Lets everything go.
    pub fn clear(&mut self) {
        self.truncate(Mark {
            iovecs: 0,
            tokens: 0,
            total_len: 0,
        });
        self.writable = true;
    }

    /// Calls `f` with each piece of `len` bytes from `offset` on, and where in the `len` it is.
    fn each(
        &self,
        offset: usize,
        len: usize,
        mut f: impl FnMut(*mut u8, usize, usize) -> Result<(), Fault>,
    ) -> Result<(), AccessError> {
        if offset
            .checked_add(len)
            .is_none_or(|end| end > self.total_len)
        {
            return Err(AccessError::Overflow {
                gpa: Gpa(offset as u64),
                len: len as u64,
            });
        }
        let (mut skip, mut done) = (offset, 0);
        for iovec in &self.iovecs {
            if done == len {
                break;
            }
            if skip >= iovec.iov_len {
                skip -= iovec.iov_len;
                continue;
            }
            let count = (iovec.iov_len - skip).min(len - done);
            f(iovec.iov_base.cast::<u8>().wrapping_add(skip), done, count).map_err(|fault| {
                let done = done + fault.done;
                AccessError::host_fault(Gpa(offset as u64), len, Fault { done })
            })?;
            done += count;
            skip = 0;
        }
        Ok(())
    }

    // --- for the section that fills it --------------------------------------------------------

    pub(crate) fn mark(&self) -> Mark {
        Mark {
            iovecs: self.iovecs.len(),
            tokens: self.tokens.len(),
            total_len: self.total_len,
        }
    }

    pub(crate) fn truncate(&mut self, mark: Mark) {
        self.mark_dirty(mark.iovecs);
        self.iovecs.truncate(mark.iovecs);
        self.writes.truncate(mark.iovecs);
        self.total_len = mark.total_len;
        self.tokens.truncate(mark.tokens);
    }

    /// The number of a pin that also covers more memory that counts in `lane`.
    pub(crate) fn holds(&self, row: &'static Row, lane: Lane) -> Option<u32> {
        let mut tokens = self.tokens.iter();
        let at = tokens.position(|token| token.is(row, lane))?;
        Some(at as u32)
    }

    /// Adds a pin; returns its number.
    pub(crate) fn hold(&mut self, token: Token) -> u32 {
        self.tokens.push(token);
        (self.tokens.len() - 1) as u32
    }

    /// Adds a piece; `written` is the number of a pin of its block, if it may be written.
    pub(crate) fn push(&mut self, host: *mut u8, len: usize, written: Option<u32>) {
        self.writes.push(written);
        self.iovecs.push(libc::iovec {
            iov_base: host.cast(),
            iov_len: len,
        });
        self.total_len = self.total_len.saturating_add(len);
    }

    /// Marks what may have been written of the pieces from number `first` on.
    fn mark_dirty(&self, first: usize) {
        for (iovec, written) in self.iovecs.iter().zip(&self.writes).skip(first) {
            if let Some(token) = written.and_then(|at| self.tokens.get(at as usize)) {
                // SAFETY: the piece lies in the token's block, which the token still holds.
                unsafe { token.mark_dirty(iovec.iov_base.cast(), iovec.iov_len) };
            }
        }
    }

    pub(crate) fn limit_access(&mut self, access: Access) {
        self.writable &= access.writes();
    }
}

impl Drop for PinList {
    fn drop(&mut self) {
        // Before the pins: a block that has drained has been marked.
        self.mark_dirty(0);
    }
}

/// A state of the list to go back to.
pub(crate) struct Mark {
    iovecs: usize,
    tokens: usize,
    total_len: usize,
}

impl fmt::Debug for PinList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "PinList({} bytes in {} pieces, {} pins)",
            self.total_len,
            self.iovecs.len(),
            self.tokens.len()
        )
    }
}
