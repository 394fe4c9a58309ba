// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device's view that lasts as long as an I/O.

use std::sync::{Arc, Mutex};

use smallvec::SmallVec;

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::{GuestMemorySliceIterator, Result};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory, Permissions, VolatileSlice};

use super::pieces::{Pieces, Slices};
use super::{Marks, PinnedRam, WriteLog, Written};
use crate::pin::Token;
use crate::{Access, AccessError, AddressSpace, Gpa, RamBlock, SectionKind};

/// A pin, and the block it is on.
type Held = (Token, Arc<RamBlock>);

/// Guest memory as a device sees it for the length of one I/O, on whatever threads.
///
/// Each access sees the map as it is at that moment. What it finds is pinned until the view is
/// dropped, one pin per block and thread, so that slices stay valid; unplugs of blocks that were
/// not accessed do not wait. Make one per request or per batch of them, and drop it: a view kept
/// for ever holds up the unplugs of all it has met.
pub struct DmaView {
    space: Arc<AddressSpace>,
    log: Option<Arc<dyn WriteLog>>,
    /// Only ever grows.
    held: Mutex<SmallVec<[Held; 2]>>,
}

impl DmaView {
    /// A view of `space` that has pinned nothing yet; writes through the traits are told to
    /// `log`.
    pub fn new(space: &Arc<AddressSpace>, log: Option<Arc<dyn WriteLog>>) -> DmaView {
        DmaView {
            space: Arc::clone(space),
            log,
            held: Mutex::default(),
        }
    }

    /// Keeps a pin, and the block it is on for as long as the view lives.
    fn hold(&self, token: Token, block: &Arc<RamBlock>) -> &RamBlock {
        let mut held = self
            .held
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let at = held.iter().position(|(other, _)| *other == token);
        let at = at.unwrap_or_else(|| {
            held.push((token, Arc::clone(block)));
            held.len() - 1
        });
        let block: *const RamBlock = Arc::as_ptr(&held[at].1);
        // SAFETY: the view has a share in the block, and gives up none before it is dropped.
        unsafe { &*block }
    }
}

impl Pieces for DmaView {
    fn piece(
        &self,
        gpa: Gpa,
        len: u64,
        access: Access,
    ) -> std::result::Result<VolatileSlice<'_, Marks<'_>>, AccessError> {
        let reader = self.space.memory().register();
        let guard = self.space.read(&reader);
        let (entry, _, count) = guard.ram(gpa.raw(), len, access)?;
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
        let block = self.hold(Token::take(&reader, place.lane), block);
        let offset = block_offset + (gpa.raw() - section.range.start);
        let marks = Marks::new(self.log.as_deref(), block, offset);
        let host = place.host as *mut u8;
        // SAFETY: pinned until the view is dropped (M3); everybody else accesses it as vm-memory
        // does, with volatile accesses.
        Ok(unsafe { VolatileSlice::with_bitmap(host, count as usize, marks, None) })
    }
}

impl GuestMemory for DmaView {
    type PhysicalMemory = PinnedRam;
    type Bitmap = Written;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        let reader = self.space.memory().register();
        let view = super::SectionView::new(self.space.read(&reader), None);
        view.check_range(addr, count, access)
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

/// An address space for devices: its memory is a new [`DmaView`] every time.
#[derive(Clone)]
pub struct DmaSpace {
    space: Arc<AddressSpace>,
    log: Option<Arc<dyn WriteLog>>,
}

impl DmaSpace {
    /// `space` for devices; writes through the traits are told to `log`.
    pub fn new(space: &Arc<AddressSpace>, log: Option<Arc<dyn WriteLog>>) -> DmaSpace {
        DmaSpace {
            space: Arc::clone(space),
            log,
        }
    }
}

impl GuestAddressSpace for DmaSpace {
    type M = DmaView;
    type T = Arc<DmaView>;

    fn memory(&self) -> Arc<DmaView> {
        Arc::new(DmaView::new(&self.space, self.log.clone()))
    }
}
