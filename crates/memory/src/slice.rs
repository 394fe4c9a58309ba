// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory as seen inside a read section.

use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::Ordering;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::dirty::SlotLog;
use crate::fault::Fault;
use crate::{AccessError, Gpa, copy};

/// A contiguous piece of guest memory inside a read section. Offsets are in bytes. The guest may
/// change the bytes at any time.
#[derive(Clone, Copy)]
pub struct GuestSlice<'g> {
    host: *mut u8,
    len: usize,
    writable: bool,
    gpa: Gpa,
    log: SlotLog,
    _guard: PhantomData<&'g ()>,
}

macro_rules! atomic_access {
    ($load:ident, $store:ident, $int:ty) => {
        /// Loads a value of the host's byte order atomically.
        ///
        /// # Errors
        /// `Overflow` outside the slice or when the address is not aligned; `HostFault`.
        ///
        /// # Panics
        /// When `order` is not one for loads.
        #[inline(always)]
        pub fn $load(&self, offset: usize, order: Ordering) -> Result<$int, AccessError> {
            let at = self.aligned::<$int>(offset)?;
            // SAFETY: inside the slice, aligned; the guest's accesses are atomic as the
            // hardware's are (M10).
            unsafe { copy::load(at, order) }
                .map_err(|fault| self.fault(offset, size_of::<$int>(), fault))
        }

        /// Stores a value in the host's byte order atomically.
        ///
        /// # Errors
        /// `Overflow` outside the slice or when the address is not aligned; `ReadOnly`;
        /// `HostFault`.
        ///
        /// # Panics
        /// When `order` is not one for stores.
        #[inline(always)]
        pub fn $store(
            &self,
            offset: usize,
            value: $int,
            order: Ordering,
        ) -> Result<(), AccessError> {
            let at = self.aligned::<$int>(offset)?;
            self.check_writable(offset, size_of::<$int>())?;
            // SAFETY: as above, and writable (M10).
            let result = unsafe { copy::store(at, value, order) };
            self.mark(at.cast(), size_of::<$int>());
            result.map_err(|fault| self.fault(offset, size_of::<$int>(), fault))
        }
    };
}

impl<'g> GuestSlice<'g> {
    /// # Safety
    /// `host` must be valid for `len` bytes of guest memory for `'g`, for writes if `writable`.
    /// They lie in the block of `log`, and `'g` is inside a read section whose view shows it.
    #[inline(always)]
    pub(crate) unsafe fn new(
        host: *mut u8,
        len: usize,
        writable: bool,
        gpa: Gpa,
        log: SlotLog,
    ) -> GuestSlice<'g> {
        GuestSlice {
            host,
            len,
            writable,
            gpa,
            log,
            _guard: PhantomData,
        }
    }

    /// Bytes.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The host address of the first byte, valid for as long as the section is open. What is
    /// written through it is marked by nobody.
    #[inline(always)]
    pub fn as_ptr(&self) -> *mut u8 {
        self.host
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The guest address of the first byte.
    pub fn gpa(&self) -> Gpa {
        self.gpa
    }

    atomic_access!(load_u8, store_u8, u8);
    atomic_access!(load_u16, store_u16, u16);
    atomic_access!(load_u32, store_u32, u32);
    atomic_access!(load_u64, store_u64, u64);

    /// Reads a value of any alignment; not atomic.
    ///
    /// # Errors
    /// `Overflow` outside the slice; `HostFault`.
    #[inline]
    pub fn read<T: FromBytes>(&self, offset: usize) -> Result<T, AccessError> {
        let at = self.at(offset, size_of::<T>())?;
        // SAFETY: inside the slice (M10).
        unsafe { copy::read(at) }.map_err(|fault| self.fault(offset, size_of::<T>(), fault))
    }

    /// Writes a value of any alignment; not atomic.
    ///
    /// # Errors
    /// `Overflow` outside the slice; `ReadOnly`; `HostFault`.
    #[inline]
    pub fn write<T: IntoBytes + Immutable>(
        &self,
        offset: usize,
        value: T,
    ) -> Result<(), AccessError> {
        let at = self.at(offset, size_of::<T>())?;
        self.check_writable(offset, size_of::<T>())?;
        // SAFETY: inside the slice, and writable (M10).
        let result = unsafe { copy::write(at, &value) };
        self.mark(at, size_of::<T>());
        result.map_err(|fault| self.fault(offset, size_of::<T>(), fault))
    }

    /// Copies out.
    ///
    /// # Errors
    /// `Overflow` outside the slice; `HostFault`.
    pub fn copy_to(&self, offset: usize, bytes: &mut [u8]) -> Result<(), AccessError> {
        let at = self.at(offset, bytes.len())?;
        // SAFETY: inside the slice (M10).
        unsafe { copy::from_guest(at, bytes.as_mut_ptr(), bytes.len()) }
            .map_err(|fault| self.fault(offset, bytes.len(), fault))
    }

    /// Copies in.
    ///
    /// # Errors
    /// `Overflow` outside the slice; `ReadOnly`; `HostFault`.
    pub fn copy_from(&self, offset: usize, bytes: &[u8]) -> Result<(), AccessError> {
        let at = self.at(offset, bytes.len())?;
        self.check_writable(offset, bytes.len())?;
        // SAFETY: inside the slice, and writable (M10).
        let result = unsafe { copy::to_guest(bytes.as_ptr(), at, bytes.len()) };
        self.mark(at, bytes.len());
        result.map_err(|fault| self.fault(offset, bytes.len(), fault))
    }

    /// A part of it.
    ///
    /// # Errors
    /// `Overflow` outside the slice.
    pub fn subslice(&self, offset: usize, len: usize) -> Result<GuestSlice<'g>, AccessError> {
        let host = self.at(offset, len)?;
        let gpa = Gpa(self.gpa.0.wrapping_add(offset as u64));
        Ok(GuestSlice {
            host,
            len,
            gpa,
            ..*self
        })
    }

    /// Marks what was written at `at`, a part of the slice.
    #[inline(always)]
    fn mark(&self, at: *const u8, len: usize) {
        // SAFETY: a part of the slice, which lies in the block of its log, in the section that
        // `'g` stands for.
        unsafe { self.log.mark(at, len) };
    }

    #[inline(always)]
    fn at(&self, offset: usize, len: usize) -> Result<*mut u8, AccessError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(self.host.wrapping_add(offset)),
            _ => Err(self.outside(offset, len)),
        }
    }

    #[inline(always)]
    fn aligned<T>(&self, offset: usize) -> Result<*mut T, AccessError> {
        let at = self.at(offset, size_of::<T>())?.cast::<T>();
        if at.is_aligned() {
            Ok(at)
        } else {
            Err(self.outside(offset, size_of::<T>()))
        }
    }

    #[inline(always)]
    fn check_writable(&self, offset: usize, len: usize) -> Result<(), AccessError> {
        if self.writable {
            return Ok(());
        }
        Err(AccessError::ReadOnly {
            gpa: Gpa(self.gpa.0.wrapping_add(offset as u64)),
            len: len as u64,
        })
    }

    #[cold]
    fn fault(&self, offset: usize, len: usize, fault: Fault) -> AccessError {
        AccessError::host_fault(Gpa(self.gpa.0.wrapping_add(offset as u64)), len, fault)
    }

    #[cold]
    fn outside(&self, offset: usize, len: usize) -> AccessError {
        AccessError::Overflow {
            gpa: Gpa(self.gpa.0.wrapping_add(offset as u64)),
            len: len as u64,
        }
    }
}

impl fmt::Debug for GuestSlice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GuestSlice({} + {:#x})", self.gpa, self.len)
    }
}
