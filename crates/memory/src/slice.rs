// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory as seen inside a read section.

use std::marker::PhantomData;
use std::sync::atomic::Ordering;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::AccessError;

/// Guest memory inside a read section. Offsets are in bytes; an offset outside, or a misaligned
/// atomic, gives `Overflow`.
#[derive(Clone, Copy)]
pub struct GuestSlice<'g> {
    _guard: PhantomData<&'g ()>,
}

macro_rules! atomics {
    ($load:ident, $store:ident, $int:ty) => {
        /// Atomic load; little-endian values are the caller's to convert.
        pub fn $load(&self, _offset: usize, _order: Ordering) -> Result<$int, AccessError> {
            todo!()
        }
        /// Atomic store.
        pub fn $store(
            &self,
            _offset: usize,
            _value: $int,
            _order: Ordering,
        ) -> Result<(), AccessError> {
            todo!()
        }
    };
}

impl<'g> GuestSlice<'g> {
    /// Bytes.
    pub fn len(&self) -> usize {
        todo!()
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    atomics!(load_u8, store_u8, u8);
    atomics!(load_u16, store_u16, u16);
    atomics!(load_u32, store_u32, u32);
    atomics!(load_u64, store_u64, u64);
    /// Reads a value.
    pub fn read<T: FromBytes>(&self, _offset: usize) -> Result<T, AccessError> {
        todo!()
    }
    /// Writes a value.
    pub fn write<T: IntoBytes + Immutable>(
        &self,
        _offset: usize,
        _value: T,
    ) -> Result<(), AccessError> {
        todo!()
    }
    /// Copies out.
    pub fn copy_to(&self, _offset: usize, _bytes: &mut [u8]) -> Result<(), AccessError> {
        todo!()
    }
    /// Copies in.
    pub fn copy_from(&self, _offset: usize, _bytes: &[u8]) -> Result<(), AccessError> {
        todo!()
    }
    /// A part.
    pub fn subslice(&self, _offset: usize, _len: usize) -> Result<GuestSlice<'g>, AccessError> {
        todo!()
    }
}
