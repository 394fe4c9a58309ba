// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Long-lived translations.

use std::cell::Cell;
use std::sync::Arc;

use crate::{Access, AccessError, AddressSpace, Gpa, GuestSlice, ReadGuard};

/// A translation kept across read sections: not a pin, revalidated by one compare.
pub struct CachedMap {
    _cached: Cell<u64>,
}

impl CachedMap {
    /// A translation of `len` bytes at `gpa`, made at the first use.
    pub fn new(_space: &Arc<AddressSpace>, _gpa: Gpa, _len: usize, _access: Access) -> CachedMap {
        todo!()
    }
    /// Bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        todo!()
    }
    /// Address.
    pub fn gpa(&self) -> Gpa {
        todo!()
    }
    /// The bytes, for as long as the guard lives.
    pub fn get<'g>(&self, _guard: &'g ReadGuard<'_>) -> Result<GuestSlice<'g>, AccessError> {
        todo!()
    }
}
