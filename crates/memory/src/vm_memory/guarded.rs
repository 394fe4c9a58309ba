// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Copies by vm-memory's slices that survive what the host does not provide.
//!
//! vm-memory copies with plain instructions: a page that is not there ends the process. Its
//! `Bytes` is implemented for every `GuestMemory` at once, so that a view cannot bring its own.
//! What a view can have is methods of the same names, which come first wherever the type of the
//! view is known; and what it hands out to the others it can look at before.

use std::fmt::Display;
use std::io;
use std::sync::atomic::Ordering;

use vm_memory::bitmap::Bitmap;
use vm_memory::guest_memory::{Error, Result};
use vm_memory::{GuestAddress, Permissions, VolatileSlice};

use super::Marks;
use super::pieces::{Pieces, Slices};
use crate::fault::Fault;
use crate::{RamBlock, copy};

type Slice<'a> = VolatileSlice<'a, Marks<'a>>;

/// Refuses memory whose last byte the host does not provide: a file that was cut short lacks
/// whatever is behind the cut. Blocks without a file are not touched.
///
/// # Safety
/// `host` is guest memory of `block`, `len` bytes (at least 1) that nobody unmaps meanwhile.
#[inline(always)]
pub(super) unsafe fn probe(
    block: &RamBlock,
    host: *const u8,
    len: usize,
) -> std::result::Result<(), Fault> {
    if !block.is_file() {
        return Ok(());
    }
    // SAFETY: the last of the bytes; a byte is aligned.
    let last = unsafe { copy::load(host.wrapping_add(len - 1), Ordering::Relaxed) };
    last.map(|_: u8| ())
}

/// A fault in vm-memory's words.
#[cold]
pub(super) fn not_provided(at: impl Display) -> Error {
    let what = format!("the host does not provide the memory at {at}");
    Error::IOError(io::Error::other(what))
}

/// Copies out of a slice, as much as both have.
pub(super) fn read(slice: &Slice<'_>, bytes: &mut [u8]) -> std::result::Result<usize, Fault> {
    let count = slice.len().min(bytes.len());
    let from = slice.ptr_guard();
    // SAFETY: a slice of this crate's is guest memory that stays for as long as it is borrowed.
    unsafe { copy::from_guest(from.as_ptr(), bytes.as_mut_ptr(), count) }.map(|()| count)
}

/// Copies into a slice, as much as both have, and marks it.
pub(super) fn write(slice: &Slice<'_>, bytes: &[u8]) -> std::result::Result<usize, Fault> {
    let count = slice.len().min(bytes.len());
    let to = slice.ptr_guard_mut();
    // SAFETY: as above, and slices are made for writing only where that is allowed.
    let result = unsafe { copy::to_guest(bytes.as_ptr(), to.as_ptr(), count) };
    // Also after a fault: some may have been written.
    slice.bitmap().mark_dirty(0, count);
    result.map(|()| count)
}

/// Copies all of `bytes` out of guest memory.
pub(super) fn read_all(of: &impl Pieces, bytes: &mut [u8], at: GuestAddress) -> Result<()> {
    let mut rest = bytes;
    let mut gpa = at.0;
    for piece in Slices::new(of, at, rest.len(), Permissions::Read) {
        let done = read(&piece?, rest).map_err(|fault| fault_at(gpa, fault))?;
        rest = rest.get_mut(done..).unwrap_or_default();
        gpa = gpa.wrapping_add(done as u64);
    }
    Ok(())
}

/// Copies all of `bytes` into guest memory.
pub(super) fn write_all(of: &impl Pieces, bytes: &[u8], at: GuestAddress) -> Result<()> {
    let mut rest = bytes;
    let mut gpa = at.0;
    for piece in Slices::new(of, at, rest.len(), Permissions::Write) {
        let done = write(&piece?, rest).map_err(|fault| fault_at(gpa, fault))?;
        rest = rest.get(done..).unwrap_or_default();
        gpa = gpa.wrapping_add(done as u64);
    }
    Ok(())
}

#[cold]
fn fault_at(gpa: u64, fault: Fault) -> Error {
    not_provided(crate::Gpa(gpa.wrapping_add(fault.done as u64)))
}

/// Methods of a view that come before those of vm-memory's `Bytes`.
macro_rules! guarded_bytes {
    ($view:ty) => {
        /// As the methods of vm-memory's `Bytes`, before which they come where the type is known.
        /// Memory that the host does not provide, of a file that was cut short say, is an error
        /// here; by way of the trait it ends the process.
        impl $view {
            /// Copies out of guest memory.
            ///
            /// # Errors
            /// When any part cannot be read, or the host does not provide it (`IOError`). What
            /// lies before that part has been copied.
            pub fn read_slice(&self, bytes: &mut [u8], at: GuestAddress) -> Result<()> {
                $crate::vm_memory::guarded::read_all(self, bytes, at)
            }

            /// Copies into guest memory.
            ///
            /// # Errors
            /// When any part cannot be written, or the host does not provide it (`IOError`). What
            /// lies before that part has been copied.
            pub fn write_slice(&self, bytes: &[u8], at: GuestAddress) -> Result<()> {
                $crate::vm_memory::guarded::write_all(self, bytes, at)
            }

            /// Reads a value of any alignment.
            ///
            /// # Errors
            /// As `read_slice`.
            pub fn read_obj<T: ByteValued>(&self, at: GuestAddress) -> Result<T> {
                let mut value = T::zeroed();
                self.read_slice(value.as_mut_slice(), at).map(|()| value)
            }

            /// Writes a value at any alignment.
            ///
            /// # Errors
            /// As `write_slice`.
            pub fn write_obj<T: ByteValued>(&self, value: T, at: GuestAddress) -> Result<()> {
                self.write_slice(value.as_slice(), at)
            }
        }
    };
}
pub(super) use guarded_bytes;
