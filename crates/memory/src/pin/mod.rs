// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pins: an I/O's right to guest memory, across threads and system calls.

mod list;

pub use list::PinList;

use std::fmt;
use std::ops::Range;

use crate::reader::counters::Lane;
use crate::reader::row::Row;
use crate::{Access, AccessError, Gpa, Reader, copy};

/// One count in the row of the thread that took it; lets go when dropped, on any thread.
pub(crate) struct Token {
    row: &'static Row,
    lane: Lane,
}

impl Token {
    /// Takes a pin. The reader is in a section whose view shows the block of the slot, and for a
    /// sparse block the lane comes from the admission in that section (M3).
    #[inline(always)]
    pub(crate) fn take(reader: &Reader, lane: Lane) -> Token {
        Token::count(reader.row(), lane)
    }

    /// As [`Token::take`], by the row of the calling thread.
    #[inline(always)]
    pub(crate) fn count(row: &'static Row, lane: Lane) -> Token {
        row.acquire_home(lane);
        Token { row, lane }
    }

    /// Marks `len` bytes at `host` as written.
    ///
    /// # Safety
    /// They lie in the token's block.
    #[inline(always)]
    unsafe fn mark_dirty(&self, host: *const u8, len: usize) {
        if self.row.may_be_logged() {
            // SAFETY: as for this function.
            unsafe { mark_logged(self.row, self.lane, host, len) };
        }
    }

    /// Whether the token is one of the same row in the same lane: one then does for two.
    #[inline(always)]
    pub(crate) fn is(&self, row: &'static Row, lane: Lane) -> bool {
        std::ptr::eq(self.row, row) && self.lane == lane
    }
}

/// As [`Token::mark_dirty`]. Not by way of the token, which then stays in registers.
///
/// # Safety
/// The bytes lie in the block of the slot of `lane`, on which the caller has a pin.
#[cold]
#[inline(never)]
unsafe fn mark_logged(row: &'static Row, lane: Lane, host: *const u8, len: usize) {
    let dirty = row.hub().dirty();
    // SAFETY: as for this function.
    unsafe { dirty.mark(lane.slot(), host as u64, len as u64) };
}

impl PartialEq for Token {
    fn eq(&self, other: &Token) -> bool {
        self.is(other.row, other.lane)
    }
}

impl Clone for Token {
    fn clone(&self) -> Token {
        self.row.acquire_clone(self.lane);
        Token { ..*self }
    }
}

impl Drop for Token {
    #[inline(always)]
    fn drop(&mut self) {
        self.row.release(self.lane);
    }
}

/// The right of one I/O to a contiguous piece of guest memory.
///
/// As long as it exists the memory stays mapped at the same place with its contents, whatever
/// becomes of the map. The guest may change the bytes at any time. Its owner is the request;
/// it is dropped when the I/O is over, on whatever thread. One taken for writing makes all of the
/// memory dirty then.
#[derive(Clone)]
pub struct Pin {
    /// Keeps the memory.
    token: Token,
    ptr: *mut u8,
    len: usize,
    gpa: Gpa,
    access: Access,
}

// SAFETY: the pointer stays valid on every thread until the token is dropped (M3), and a token
// may be dropped and cloned on any thread.
unsafe impl Send for Pin {}
// SAFETY: shared use gives the pointer and copies through it, as several pins of the same memory
// would.
unsafe impl Sync for Pin {}

impl Pin {
    #[inline(always)]
    pub(crate) fn new(token: Token, ptr: *mut u8, len: usize, gpa: Gpa, access: Access) -> Pin {
        Pin {
            token,
            ptr,
            len,
            gpa,
            access,
        }
    }

    /// The host address, valid for [`Pin::len`] bytes until the pin is dropped; writable if it
    /// was pinned for writing.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// Bytes, at least 1.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The host addresses.
    pub fn host_range(&self) -> Range<u64> {
        let start = self.ptr as u64;
        start..start + self.len as u64
    }

    /// The guest address of the first byte.
    pub fn gpa(&self) -> Gpa {
        self.gpa
    }

    /// What it was taken for.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Copies out of the memory, from `offset` on.
    ///
    /// # Errors
    /// `Overflow` outside of it; `HostFault`.
    pub fn read_at(&self, offset: usize, bytes: &mut [u8]) -> Result<(), AccessError> {
        self.check(offset, bytes.len())?;
        // SAFETY: inside the pinned memory, which the token keeps (M3).
        unsafe { copy::from_guest(self.ptr.add(offset), bytes.as_mut_ptr(), bytes.len()) }
            .map_err(|fault| AccessError::host_fault(self.gpa_at(offset), bytes.len(), fault))
    }

    /// Copies into the memory, from `offset` on.
    ///
    /// # Errors
    /// `Overflow` outside of it; `ReadOnly` unless pinned for writing; `HostFault`.
    pub fn write_at(&self, offset: usize, bytes: &[u8]) -> Result<(), AccessError> {
        self.check(offset, bytes.len())?;
        if !self.access.writes() {
            return Err(AccessError::ReadOnly {
                gpa: self.gpa,
                len: bytes.len() as u64,
            });
        }
        // SAFETY: inside the pinned memory, which the token keeps (M3).
        unsafe { copy::to_guest(bytes.as_ptr(), self.ptr.add(offset), bytes.len()) }
            .map_err(|fault| AccessError::host_fault(self.gpa_at(offset), bytes.len(), fault))
    }

    fn gpa_at(&self, offset: usize) -> Gpa {
        Gpa(self.gpa.0.wrapping_add(offset as u64))
    }

    /// Makes `len` bytes from `offset` on dirty now: for memory that stays pinned after it was
    /// written. Call it after the write.
    ///
    /// # Errors
    /// `Overflow` outside of it.
    #[inline]
    pub fn mark_dirty(&self, offset: usize, len: usize) -> Result<(), AccessError> {
        self.check(offset, len)?;
        if len != 0 {
            let Token { row, lane } = self.token;
            let host = self.ptr as u64 + offset as u64;
            // SAFETY: inside the pinned memory, which lies in the token's block.
            unsafe { row.hub().dirty().mark_expected(lane, host, len as u64) };
        }
        Ok(())
    }

    #[inline(always)]
    fn check(&self, offset: usize, len: usize) -> Result<(), AccessError> {
        if len > self.len || offset > self.len - len {
            return Err(AccessError::Overflow {
                gpa: self.gpa_at(offset),
                len: len as u64,
            });
        }
        Ok(())
    }
}

impl Drop for Pin {
    #[inline(always)]
    fn drop(&mut self) {
        if self.access.writes() {
            // Before the token goes: a block that has drained has been marked.
            // SAFETY: the pinned memory lies in the token's block.
            unsafe { self.token.mark_dirty(self.ptr, self.len) };
        }
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pin({} + {:#x}, {:?})", self.gpa, self.len, self.access)
    }
}
