// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device's view within one read section.

use std::ops::Deref;
use std::sync::Arc;

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::{GuestMemorySliceIterator, Result};
use vm_memory::{
    ByteValued, GuestAddress, GuestAddressSpace, GuestMemory, Permissions, VolatileSlice,
};

use super::guarded::{self, guarded_bytes};
use super::pieces::{Pieces, Slices};
use super::{Marks, PinnedRam, WriteLog, Written};
use crate::{Access, AccessError, AddressSpace, Gpa, ReadGuard, Reader, SectionKind};

/// A read section as vm-memory's `GuestMemory`. It costs what the section costs; drop it before
/// anything that can block.
#[derive(Clone)]
pub struct SectionView<'r> {
    guard: ReadGuard<'r>,
    log: Option<Arc<dyn WriteLog>>,
}

impl<'r> SectionView<'r> {
    /// The view of `guard`; writes through the traits are told to `log`.
    pub fn new(guard: ReadGuard<'r>, log: Option<Arc<dyn WriteLog>>) -> SectionView<'r> {
        SectionView { guard, log }
    }

    /// The section.
    pub fn guard(&self) -> &ReadGuard<'r> {
        &self.guard
    }
}

impl Pieces for SectionView<'_> {
    #[inline]
    fn piece(
        &self,
        gpa: Gpa,
        len: u64,
        access: Access,
    ) -> std::result::Result<VolatileSlice<'_, Marks<'_>>, AccessError> {
        let (entry, host, count) = self.guard.ram(gpa.raw(), len, access)?;
        let section = &entry.flat().section;
        let SectionKind::Ram {
            block,
            block_offset,
            ..
        } = &section.kind
        else {
            return Err(AccessError::NotRam { gpa, len });
        };
        let offset = block_offset + (gpa.raw() - section.range.start);
        // SAFETY: RAM found in the section, which is open for as long as `self` is borrowed (M2,
        // M7); everybody else accesses it as vm-memory does, with volatile accesses.
        unsafe {
            guarded::probe(block, host, count as usize)
                .map_err(|fault| AccessError::host_fault(gpa, count as usize, fault))?;
            let marks = Marks::held(self.log.as_deref(), block, offset);
            Ok(VolatileSlice::with_bitmap(
                host,
                count as usize,
                marks,
                None,
            ))
        }
    }
}

impl GuestMemory for SectionView<'_> {
    type PhysicalMemory = PinnedRam;
    type Bitmap = Written;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        Slices::new(self, addr, count, access).all(|piece| piece.is_ok())
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Written>>> {
        Ok(Slices::new(self, addr, count, access))
    }
}

guarded_bytes!(SectionView<'_>);

/// A [`SectionView`] that can be handed on.
#[derive(Clone)]
pub struct LocalView<'r>(SectionView<'r>);

impl<'r> Deref for LocalView<'r> {
    type Target = SectionView<'r>;

    fn deref(&self) -> &SectionView<'r> {
        &self.0
    }
}

/// An address space for one thread: its memory is a read section.
#[derive(Clone)]
pub struct LocalSpace<'r> {
    space: Arc<AddressSpace>,
    reader: &'r Reader,
    log: Option<Arc<dyn WriteLog>>,
}

impl<'r> LocalSpace<'r> {
    /// `space` as `reader` sees it; writes through the traits are told to `log`.
    pub fn new(
        space: &Arc<AddressSpace>,
        reader: &'r Reader,
        log: Option<Arc<dyn WriteLog>>,
    ) -> LocalSpace<'r> {
        LocalSpace {
            space: Arc::clone(space),
            reader,
            log,
        }
    }
}

impl<'r> GuestAddressSpace for LocalSpace<'r> {
    type M = SectionView<'r>;
    type T = LocalView<'r>;

    /// Opens a section, which ends with the last clone of the answer.
    ///
    /// # Panics
    /// When the reader is registered with another memory.
    #[inline]
    fn memory(&self) -> LocalView<'r> {
        let guard = self.space.read(self.reader);
        LocalView(SectionView::new(guard, self.log.clone()))
    }
}
