// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From a guest range to slices of host memory, with access rights.

use std::io;
use std::iter::FusedIterator;

use vm_memory::guest_memory::{Error, GuestMemorySliceIterator, Result};
use vm_memory::{GuestAddress, Permissions, VolatileSlice};

use super::Marks;
use crate::{Access, AccessError, Gpa};

/// Gives contiguous pieces of guest memory that stay valid for as long as it is borrowed.
pub(super) trait Pieces {
    /// The memory at `gpa`: at least 1 and at most `len` bytes (`len` is not 0).
    fn piece(
        &self,
        gpa: Gpa,
        len: u64,
        access: Access,
    ) -> std::result::Result<VolatileSlice<'_, Marks<'_>>, AccessError>;
}

/// What the device does, in this crate's words. Who asks for nothing gets what can be read.
pub(super) fn access(permissions: Permissions) -> Access {
    match permissions {
        Permissions::No | Permissions::Read => Access::Read,
        Permissions::Write => Access::Write,
        Permissions::ReadWrite => Access::ReadWrite,
    }
}

/// The pieces of a range, in order; ends after the first error.
pub(super) struct Slices<'a, P> {
    of: &'a P,
    at: u64,
    rest: u64,
    access: Access,
}

impl<'a, P: Pieces> Slices<'a, P> {
    pub(super) fn new(
        of: &'a P,
        at: GuestAddress,
        count: usize,
        permissions: Permissions,
    ) -> Slices<'a, P> {
        Slices {
            of,
            at: at.0,
            rest: count as u64,
            access: access(permissions),
        }
    }
}

impl<'a, P: Pieces> Iterator for Slices<'a, P> {
    type Item = Result<VolatileSlice<'a, Marks<'a>>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest == 0 {
            return None;
        }
        let gpa = Gpa(self.at);
        let piece = self.of.piece(gpa, self.rest, self.access);
        let found = piece
            .map_err(|error| refused(gpa, error))
            .and_then(|piece| {
                self.rest -= piece.len() as u64;
                let next = self.at.checked_add(piece.len() as u64);
                self.at = match next {
                    Some(next) => next,
                    None if self.rest == 0 => 0,
                    None => return Err(Error::GuestAddressOverflow),
                };
                Ok(piece)
            });
        if found.is_err() {
            self.rest = 0;
        }
        Some(found)
    }
}

impl<P: Pieces> FusedIterator for Slices<'_, P> {}

impl<'a, P: Pieces> GuestMemorySliceIterator<'a, Marks<'a>> for Slices<'a, P> {}

/// vm-memory's word for a refusal.
fn refused(gpa: Gpa, error: AccessError) -> Error {
    match error {
        AccessError::ReadOnly { .. } => {
            Error::IOError(io::Error::new(io::ErrorKind::PermissionDenied, error))
        }
        AccessError::HostFault { .. } => Error::IOError(io::Error::other(error)),
        AccessError::Overflow { .. } => Error::GuestAddressOverflow,
        _ => Error::InvalidGuestAddress(GuestAddress(gpa.0)),
    }
}
