// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device's view that lasts as long as an I/O.

use std::cell::UnsafeCell;
use std::ops::Deref;
use std::sync::{Arc, Mutex};

use smallvec::SmallVec;

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::{GuestMemorySliceIterator, Result};
use vm_memory::{
    ByteValued, GuestAddress, GuestAddressSpace, GuestMemory, Permissions, VolatileSlice,
};

use super::guarded::{self, guarded_bytes};
use super::pieces::{Pieces, Slices};
use super::{Marks, PinnedRam, WriteLog, Written};
use crate::guard::ram_at;
use crate::pin::Token;
use crate::reader::counters::Lane;
use crate::reader::here::HomeRow;
use crate::reader::row::{Row, make_token, token};
use crate::{Access, AccessError, AddressSpace, Gpa, SectionKind};

/// Guest memory as a device sees it for the length of one I/O, on whatever threads.
///
/// Each access sees the map as it is at that moment. What it finds is pinned until the view is
/// dropped, one pin per block and thread, so that slices stay valid; unplugs of blocks that were
/// not accessed do not wait. Make one per request or per batch of them, and drop it: a view kept
/// for ever holds up the unplugs of all it has met.
pub struct DmaView {
    /// Goes before the memory does.
    held: Held,
    source: Arc<Source>,
}

/// Where views come from. A share in it is a share in memory and log at once.
struct Source {
    space: Arc<AddressSpace>,
    log: Option<Arc<dyn WriteLog>>,
}

impl DmaView {
    /// A view of `space` that has pinned nothing yet; writes through the traits are told to
    /// `log`.
    pub fn new(space: &Arc<AddressSpace>, log: Option<Arc<dyn WriteLog>>) -> DmaView {
        let space = Arc::clone(space);
        DmaView::of(&Arc::new(Source { space, log }))
    }

    #[inline]
    fn of(source: &Arc<Source>) -> DmaView {
        DmaView {
            held: Held::new(),
            source: Arc::clone(source),
        }
    }

    #[inline(always)]
    fn piece_of(
        &self,
        home: HomeRow<'_>,
        gpa: Gpa,
        len: u64,
        access: Access,
    ) -> std::result::Result<VolatileSlice<'_, Marks<'_>>, AccessError> {
        self.source.space.in_section(home, |view| {
            let (entry, _, count) = ram_at(view, gpa.raw(), len, access)?;
            let section = &entry.flat().section;
            let SectionKind::Ram {
                block,
                block_offset,
                ..
            } = &section.kind
            else {
                return Err(AccessError::NotRam { gpa, len });
            };
            let place = entry.window().place_across(gpa.raw(), count, access);
            // Plugged a moment ago.
            let place = place.ok_or(AccessError::Unplugged { gpa, len })?;
            self.held.hold(home.row(), place.lane);
            let block = Arc::as_ptr(block);
            let offset = block_offset + (gpa.raw() - section.range.start);
            let (host, count) = (place.host as *mut u8, count as usize);
            // SAFETY: pinned until the view is dropped (M3); everybody else accesses it as
            // vm-memory does, with volatile accesses. The list of RAM keeps a block until it is
            // destroyed, which needs it to have no pins, and the view keeps the list.
            unsafe {
                let block = &*block;
                guarded::probe(block, host, count)
                    .map_err(|fault| AccessError::host_fault(gpa, count, fault))?;
                let marks = Marks::held(self.source.log.as_deref(), block, offset);
                Ok(VolatileSlice::with_bitmap(host, count, marks, None))
            }
        })
    }

    /// For a thread that keeps no row.
    #[cold]
    #[inline(never)]
    fn piece_registered(
        &self,
        gpa: Gpa,
        len: u64,
        access: Access,
    ) -> std::result::Result<VolatileSlice<'_, Marks<'_>>, AccessError> {
        let reader = self.source.space.memory().register();
        self.piece_of(HomeRow::of(&reader), gpa, len, access)
    }
}

impl Pieces for DmaView {
    #[inline]
    fn piece(
        &self,
        gpa: Gpa,
        len: u64,
        access: Access,
    ) -> std::result::Result<VolatileSlice<'_, Marks<'_>>, AccessError> {
        match self.source.space.home_row() {
            Some(home) => self.piece_of(home, gpa, len, access),
            None => self.piece_registered(gpa, len, access),
        }
    }
}

/// The pins of a view. Only ever grows: most often to one, on the thread that made the view.
struct Held {
    /// The token of that thread.
    home: u64,
    /// Only touched by that thread, and by whoever owns the view alone.
    near: UnsafeCell<SmallVec<[Token; 2]>>,
    /// What other threads have pinned.
    far: Mutex<Vec<Token>>,
}

// SAFETY: `near` is touched by a shared reference on one thread only, the one whose token is
// `home`: tokens are never given to two threads. Everything in it may be dropped on any thread.
unsafe impl Sync for Held {}

impl Held {
    #[inline]
    fn new() -> Held {
        Held {
            home: make_token(),
            near: UnsafeCell::default(),
            far: Mutex::default(),
        }
    }

    /// Holds a pin that counts in `lane` of `row`, the calling thread's, which is in the section
    /// that found the lane (M3).
    #[inline(always)]
    fn hold(&self, row: &'static Row, lane: Lane) {
        if token() == self.home {
            // SAFETY: this thread alone gets here, and nothing below comes here again.
            let near = unsafe { &mut *self.near.get() };
            if !near.iter().any(|held| held.is(row, lane)) {
                near.push(Token::count(row, lane));
            }
        } else {
            self.hold_far(row, lane);
        }
    }

    #[cold]
    #[inline(never)]
    fn hold_far(&self, row: &'static Row, lane: Lane) {
        let mut far = self
            .far
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if !far.iter().any(|held| held.is(row, lane)) {
            far.push(Token::count(row, lane));
        }
    }
}

impl GuestMemory for DmaView {
    type PhysicalMemory = PinnedRam;
    type Bitmap = Written;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        let space = &self.source.space;
        let reader = space.memory().register();
        let view = super::SectionView::new(space.read(&reader), None);
        view.check_range(addr, count, access)
    }

    #[inline]
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Written>>> {
        Ok(Slices::new(self, addr, count, access))
    }
}

guarded_bytes!(DmaView);

/// A [`DmaView`] that can be handed on. A clone is a view of its own: it holds what is looked up
/// by way of it, and nothing of what its original holds.
pub struct DmaMemory(DmaView);

impl Clone for DmaMemory {
    fn clone(&self) -> DmaMemory {
        DmaMemory(DmaView::of(&self.0.source))
    }
}

impl Deref for DmaMemory {
    type Target = DmaView;

    #[inline]
    fn deref(&self) -> &DmaView {
        &self.0
    }
}

/// An address space for devices: its memory is a new [`DmaView`] every time.
///
/// Its views count in a number of its own, so that threads with a clone each share no cache line
/// they write to.
pub struct DmaSpace {
    source: Arc<Source>,
}

impl DmaSpace {
    /// `space` for devices; writes through the traits are told to `log`.
    pub fn new(space: &Arc<AddressSpace>, log: Option<Arc<dyn WriteLog>>) -> DmaSpace {
        let space = Arc::clone(space);
        DmaSpace {
            source: Arc::new(Source { space, log }),
        }
    }
}

impl Clone for DmaSpace {
    fn clone(&self) -> DmaSpace {
        DmaSpace::new(&self.source.space, self.source.log.clone())
    }
}

impl GuestAddressSpace for DmaSpace {
    type M = DmaView;
    type T = DmaMemory;

    #[inline]
    fn memory(&self) -> DmaMemory {
        DmaMemory(DmaView::of(&self.source))
    }
}
