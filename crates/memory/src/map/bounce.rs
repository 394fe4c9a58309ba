// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests that do not end in RAM alone.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use smallvec::SmallVec;

use super::budget::BounceGrant;
use super::plan::{Piece, Plan};
use crate::busy::{Busy, EntryPoint};
use crate::dispatch::{self, Bytes, OnError};
use crate::iommu::Flight;
use crate::{Access, AccessError, Dma, PinList, Reader};

/// Bytes that others point into; zeroed when made, so that nothing of the VMM is ever seen in them.
struct Buffer {
    start: NonNull<[u8]>,
}

// SAFETY: owns its bytes as a box does; whoever holds pointers into it obeys the rules of guest
// memory, which others change at any time.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    fn new(bytes: usize) -> Buffer {
        let boxed = vec![0u8; bytes].into_boxed_slice();
        // Not a box: one that moves takes back the pointers given out into it.
        Buffer {
            start: NonNull::from(Box::leak(boxed)),
        }
    }

    /// # Safety
    /// `offset` is at most the length.
    unsafe fn at(&self, offset: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { self.start.cast::<u8>().as_ptr().add(offset) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: came from a box in `new`, and goes back once.
        drop(unsafe { Box::from_raw(self.start.as_ptr()) });
    }
}

/// A mapping that is bounced in part: its pieces in order, some pinned RAM, some a buffer that
/// stands for registers.
pub struct Bounced {
    dma: Dma,
    pieces: Vec<Piece>,
    iovecs: SmallVec<[libc::iovec; 4]>,
    access: Access,
    total_len: usize,
    _flights: Vec<Flight>,
    /// What the device reads and writes; dropped before the pins and the grant.
    _buffer: Buffer,
    _pins: PinList,
    _grant: BounceGrant,
}

// SAFETY: the pointers lead into memory that the pins and the buffer keep, on whatever thread.
unsafe impl Send for Bounced {}
// SAFETY: shared use gives the pointers only.
unsafe impl Sync for Bounced {}

impl Bounced {
    /// Pins what is RAM, and reads what is not if the device is to read it.
    pub(super) fn new(
        dma: &Dma,
        reader: &Reader,
        plan: Plan,
        access: Access,
        grant: BounceGrant,
    ) -> Result<Bounced, AccessError> {
        let bytes = plan.bounced.map_or(0, |(_, bytes)| bytes) as usize;
        let buffer = Buffer::new(bytes);
        let mut pins = PinList::new();
        let mut iovecs = SmallVec::new();
        let (mut used, mut total_len) = (0, 0);
        for piece in &plan.pieces {
            let (space, len) = (
                piece.space.as_ref().unwrap_or(dma.space()),
                piece.len as usize,
            );
            total_len += len;
            if !piece.bounce {
                let before = pins.iovecs().len();
                pin(space, reader, piece, access, &mut pins)?;
                iovecs.extend(pins.iovecs().iter().skip(before).copied());
                continue;
            }
            // SAFETY: the buffer has room for all bounced pieces, of which this is the next.
            let start = unsafe { buffer.at(used) };
            if access.reads() {
                // SAFETY: `len` bytes of the buffer, which nobody else knows yet.
                let bytes = unsafe { std::slice::from_raw_parts_mut(start, len) };
                let _busy = Busy::note(dma.gate(), EntryPoint::Dma);
                let into = Bytes::Load(bytes);
                dispatch::transfer(space, reader, piece.gpa.raw(), into, OnError::Stop)?;
            }
            iovecs.push(libc::iovec {
                iov_base: start.cast(),
                iov_len: len,
            });
            used += len;
        }
        Ok(Bounced {
            dma: dma.clone(),
            pieces: plan.pieces,
            iovecs,
            access,
            total_len,
            _flights: plan.flights,
            _buffer: buffer,
            _pins: pins,
            _grant: grant,
        })
    }

    /// The pieces in order, valid until the mapping is completed or dropped; writable if it was
    /// mapped for writing.
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs
    }

    /// Bytes in all.
    pub fn total_len(&self) -> usize {
        self.total_len
    }

    /// Ends the mapping: of what the device wrote, the first `len` bytes go to the registers they
    /// were written for. 0 for a request that failed. More than all is all.
    ///
    /// # Errors
    /// What the first part that did not take its bytes says; what lies behind it is not written.
    pub fn complete(self, reader: &Reader, len: usize) -> Result<(), AccessError> {
        if !self.access.writes() {
            return Ok(());
        }
        let _busy = Busy::note(self.dma.gate(), EntryPoint::Dma);
        let mut left = len.min(self.total_len);
        let mut iovecs = self.iovecs.iter();
        for piece in &self.pieces {
            if left == 0 {
                break;
            }
            let count = (piece.len as usize).min(left);
            left -= count;
            if !piece.bounce {
                self.skip(piece, &mut iovecs);
                continue;
            }
            let Some(iovec) = iovecs.next() else { break };
            // SAFETY: a piece of the buffer, which the device is done with: `self` is used up.
            let bytes = unsafe { std::slice::from_raw_parts(iovec.iov_base.cast::<u8>(), count) };
            let space = piece.space.as_ref().unwrap_or(self.dma.space());
            let from = Bytes::Store(bytes);
            dispatch::transfer(space, reader, piece.gpa.raw(), from, OnError::Stop)?;
        }
        Ok(())
    }

    /// Skips the iovecs of a pinned piece, of which there may be several.
    fn skip<'a>(&self, piece: &Piece, iovecs: &mut impl Iterator<Item = &'a libc::iovec>) {
        let mut len = piece.len as usize;
        while len > 0 {
            let Some(iovec) = iovecs.next() else { return };
            len = len.saturating_sub(iovec.iov_len);
        }
    }
}

/// Appends the pins of a piece of RAM.
pub(super) fn pin(
    space: &Arc<crate::AddressSpace>,
    reader: &Reader,
    piece: &Piece,
    access: Access,
    pins: &mut PinList,
) -> Result<(), AccessError> {
    // A range of a request has at most 32 bits, and so has each of its pieces.
    let len = u32::try_from(piece.len).unwrap_or(u32::MAX);
    space
        .read(reader)
        .pin_list(&[(piece.gpa, len)], access, pins)
}

impl fmt::Debug for Bounced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pieces = self.pieces.len();
        write!(f, "Bounced({} bytes in {pieces} pieces)", self.total_len)
    }
}
