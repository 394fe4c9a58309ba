// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The address reservation all RAM blocks live in.
//!
//! Addresses are handed out once. What was given back, the gaps between blocks and the unplugged
//! parts of sparse blocks are inaccessible, so that a pointer used too late faults instead of
//! reaching somebody else's memory (README, M8).

use std::io;
use std::ptr::{self, NonNull};

use crate::Error;
use crate::sync::{Mutex, lock};

/// Alignment of blocks of at least `LARGE`: the host's page tables and huge pages fit.
const LARGE: u64 = 1 << 30;
/// Alignment of smaller blocks, and the least gap between two.
const SMALL: u64 = 2 << 20;

/// A placing that can be taken back, as long as there was no other since.
pub(crate) struct Placed {
    before: u64,
}

pub(crate) struct Arena {
    mapped: NonNull<u8>,
    mapped_bytes: usize,
    /// Where in the mapping the first aligned byte is.
    skip: u64,
    bytes: u64,
    next: Mutex<u64>,
}

// SAFETY: the pointer names a reservation that belongs to the arena alone; all changes of it go
// through system calls, and `next` is locked.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    pub(crate) fn new(bytes: u64) -> Result<Arena, Error> {
        let refuse = |source| Error::Reserve { bytes, source };
        let mapped_bytes = bytes
            .checked_add(LARGE)
            .and_then(|b| usize::try_from(b).ok())
            .ok_or_else(|| refuse(io::ErrorKind::InvalidInput.into()))?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address =
            unsafe { libc::mmap(ptr::null_mut(), mapped_bytes, libc::PROT_NONE, flags, -1, 0) };
        if address == libc::MAP_FAILED {
            return Err(refuse(io::Error::last_os_error()));
        }
        let mapped =
            NonNull::new(address.cast()).ok_or_else(|| refuse(io::Error::other("mapped at 0")))?;
        let skip = (mapped.as_ptr() as u64).next_multiple_of(LARGE) - mapped.as_ptr() as u64;
        Ok(Arena {
            mapped,
            mapped_bytes,
            skip,
            bytes,
            next: Mutex::new(0),
        })
    }

    /// Whether `bytes` could be placed now, alignment left aside.
    pub(crate) fn check_room(&self, name: &str, bytes: u64) -> Result<(), Error> {
        let left = self.bytes.saturating_sub(*lock(&self.next));
        if bytes <= left {
            return Ok(());
        }
        let name = name.to_owned();
        Err(Error::ArenaFull { name, bytes, left })
    }

    /// Takes `bytes` that were never handed out before, aligned to `align` at least (a power of
    /// two); inaccessible until mapped over. Also returns what [`Arena::take_back`] needs.
    pub(crate) fn place(
        &self,
        name: &str,
        bytes: u64,
        align: u64,
    ) -> Result<(NonNull<u8>, Placed), Error> {
        let align = align.max(if bytes >= LARGE { LARGE } else { SMALL });
        let mut next = lock(&self.next);
        let full = |left| Error::ArenaFull {
            name: name.to_owned(),
            bytes,
            left,
        };
        let left = self.bytes.saturating_sub(*next);
        let start = next
            .checked_next_multiple_of(align)
            .ok_or_else(|| full(left))?;
        let end = start
            .checked_add(bytes)
            .filter(|end| *end <= self.bytes)
            .ok_or_else(|| full(left))?;
        let placed = Placed { before: *next };
        *next = end.next_multiple_of(SMALL).saturating_add(SMALL);
        // SAFETY: start + skip is below the length of the mapping.
        let address = unsafe { self.mapped.add((self.skip + start) as usize) };
        Ok((address, placed))
    }

    /// Takes the last placing back: nobody but its maker has known the addresses, and they are
    /// inaccessible again.
    pub(crate) fn take_back(&self, placed: Placed) {
        *lock(&self.next) = placed.before;
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the reservation is the arena's own, and nobody holds a pin on it (M8).
        let result = unsafe { libc::munmap(self.mapped.as_ptr().cast(), self.mapped_bytes) };
        if result != 0 {
            tracing::error!(error = %io::Error::last_os_error(), "cannot give the address reservation back");
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_aligned_apart_and_never_placed_twice() {
        let arena = Arena::new(8 << 30).unwrap();
        let small = arena.place("a", 4096, 1).unwrap().0.as_ptr() as u64;
        let other = arena.place("b", 5 << 20, 1).unwrap().0.as_ptr() as u64;
        let large = arena.place("c", 1 << 30, 1).unwrap().0.as_ptr() as u64;
        assert_eq!(small % SMALL, 0);
        assert!(other >= small + 4096 + SMALL && other.is_multiple_of(SMALL));
        assert!(large >= other + (5 << 20) + SMALL && large.is_multiple_of(LARGE));
        let error = arena
            .place("d", 7 << 30, 1)
            .map(drop)
            .unwrap_err()
            .to_string();
        assert!(error.contains("do not fit"), "{error}");
    }
}
