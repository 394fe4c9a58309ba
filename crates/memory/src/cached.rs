// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Long-lived translations: virtqueue rings, event rings.

use std::cell::Cell;
use std::fmt;
use std::ptr;
use std::sync::Arc;

use crate::dirty::SlotLog;
use crate::{Access, AccessError, AddressSpace, Gpa, GuestSlice, ReadGuard};

/// A translation kept across read sections. Not a pin: it never holds up an unplug. Each use is
/// checked by one compare with a number that every change of the map and every seal raises.
pub struct CachedMap {
    space: Arc<AddressSpace>,
    gpa: Gpa,
    len: usize,
    access: Access,
    /// Generation the pointer is good for; 0 for none.
    generation: Cell<u64>,
    host: Cell<*mut u8>,
    slot: Cell<u32>,
}

// SAFETY: the pointer is only used after the generation was compared inside a read section,
// whichever thread does it (M9).
unsafe impl Send for CachedMap {}

impl CachedMap {
    /// A translation of `len` bytes at `gpa`, made at its first use.
    pub fn new(space: &Arc<AddressSpace>, gpa: Gpa, len: usize, access: Access) -> CachedMap {
        let space = Arc::clone(space);
        CachedMap {
            space,
            gpa,
            len,
            access,
            generation: Cell::new(0),
            host: Cell::new(ptr::null_mut()),
            slot: Cell::new(0),
        }
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The guest address.
    pub fn gpa(&self) -> Gpa {
        self.gpa
    }

    /// The address space.
    pub fn space(&self) -> &Arc<AddressSpace> {
        &self.space
    }

    /// The memory, for as long as the section is open.
    ///
    /// # Errors
    /// As [`ReadGuard::pin`]: the range must be one piece of one region.
    ///
    /// # Panics
    /// When the section is one of another address space.
    #[inline(always)]
    pub fn get<'g>(&self, guard: &'g ReadGuard<'_>) -> Result<GuestSlice<'g>, AccessError> {
        assert!(
            guard.is_of(&self.space),
            "a section of another address space"
        );
        if guard.reader().hub().generation() != self.generation.get() {
            self.refresh(guard)?;
        }
        let log = SlotLog::new(guard.reader().hub().dirty(), self.slot.get());
        let (host, writable) = (self.host.get(), self.access.writes());
        // SAFETY: the generation has not changed since the translation was made, inside a section
        // (M9).
        Ok(unsafe { GuestSlice::new(host, self.len, writable, self.gpa, log) })
    }

    #[cold]
    fn refresh(&self, guard: &ReadGuard<'_>) -> Result<(), AccessError> {
        self.generation.set(0);
        // Before the bitmap and the view are looked at: a change that comes later raises it.
        let generation = guard.reader().hub().generation();
        let (host, slot) = guard.find(self.gpa, self.len, self.access)?;
        self.host.set(host);
        self.slot.set(slot);
        // The section may be older than the newest view: good for this section only.
        if self.space.is_current(guard.view()) {
            self.generation.set(generation);
        }
        Ok(())
    }
}

impl fmt::Debug for CachedMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "CachedMap({} + {:#x}, {:?})",
            self.gpa, self.len, self.access
        )
    }
}
