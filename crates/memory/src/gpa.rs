// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest-physical addresses.

use std::fmt;

/// A guest-physical address, in bytes.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Gpa(pub u64);

impl Gpa {
    /// The address `offset` bytes further on, or `None` past the end of the address space.
    pub const fn checked_add(self, offset: u64) -> Option<Gpa> {
        match self.0.checked_add(offset) {
            Some(address) => Some(Gpa(address)),
            None => None,
        }
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpa({:#x})", self.0)
    }
}

impl From<u64> for Gpa {
    fn from(address: u64) -> Gpa {
        Gpa(address)
    }
}
