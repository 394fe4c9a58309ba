// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a pin needs to know of a section of RAM.

use std::ptr;

use crate::ram::fence;
use crate::reader::counters::Lane;
use crate::sync::AtomicU64;
use crate::{Access, FlatSection, SectionKind};

/// A section of RAM as pins see it: what they ask in the order in which they ask.
#[repr(C)]
pub(crate) struct Window {
    start: u64,
    /// Bytes that devices may write; none of ROM.
    writable: u64,
    /// Bytes that devices may read; 0 if the section is not RAM.
    readable: u64,
    /// Host address of address 0, were it in this section (wrapping).
    bias: u64,
    /// log2 of the block size of a sparse block; 0 for others.
    shift: u32,
    /// Where pins count; of a sparse block, in bank 0.
    lane: Lane,
    /// The `word_zero` of a sparse block's map.
    words: *const AtomicU64,
    /// The bank new pins of a sparse block count in.
    bank: *const AtomicU64,
}

// SAFETY: immutable; the pointers name atomics that live as long as the RAM block, which the
// section keeps (M2).
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

/// The window of what is not RAM.
static NONE: Window = Window {
    start: 0,
    writable: 0,
    readable: 0,
    bias: 0,
    shift: 0,
    lane: Lane::NONE,
    words: ptr::null(),
    bank: ptr::null(),
};

/// Where a pin points to, and where it counts.
pub(crate) struct Place {
    pub(crate) host: u64,
    pub(crate) lane: Lane,
}

impl Window {
    /// One that refuses everything.
    pub(crate) fn none() -> &'static Window {
        &NONE
    }

    pub(crate) fn new(section: &FlatSection) -> Window {
        let SectionKind::Ram {
            block,
            block_offset,
            readonly,
        } = &section.kind
        else {
            return Window { ..NONE };
        };
        let start = section.range.start;
        let bytes = section.range.end - start;
        let host = (block.host().as_ptr() as u64).wrapping_add(*block_offset);
        let fence = block.fence();
        Window {
            start,
            writable: if *readonly { 0 } else { bytes },
            readable: bytes,
            bias: host.wrapping_sub(start),
            shift: fence.map_or(0, |(_, shift)| shift),
            lane: Lane::new(block.slot(), 0),
            words: fence.map_or(ptr::null(), |(fence, _)| fence.map().word_zero()),
            bank: block.bank(),
        }
    }

    /// Bytes from `address`, which is in the section of RAM, to its end.
    #[inline(always)]
    pub(crate) fn rest(&self, address: u64) -> u64 {
        self.readable - (address - self.start)
    }

    /// The slot of the section's block.
    pub(crate) fn slot(&self) -> u32 {
        self.lane.slot()
    }

    /// The place of `len` bytes at `address`, if they are in the window, allowed, and plugged in
    /// one block. In a section whose view has the window.
    #[inline(always)]
    pub(crate) fn place(&self, address: u64, len: u64, access: Access) -> Option<Place> {
        let allowed = if access.writes() {
            self.writable
        } else {
            self.readable
        };
        // An address below the start is an offset far beyond the end, or one whose sum overflows.
        let end = address.wrapping_sub(self.start).checked_add(len)?;
        if end > allowed || len == 0 {
            return None;
        }
        let host = self.bias.wrapping_add(address);
        let mut lane = self.lane;
        if self.shift != 0 {
            // SAFETY: the window is not empty and sparse, and the bytes lie in it.
            lane = unsafe { self.admit_one(host, len) }?;
        }
        Some(Place { host, lane })
    }

    /// As [`Window::place`], across blocks.
    pub(crate) fn place_across(&self, address: u64, len: u64, access: Access) -> Option<Place> {
        let whole = Window { shift: 0, ..*self };
        let mut place = whole.place(address, len, access)?;
        if self.shift != 0 {
            let (first, last) = (place.host, place.host + (len - 1));
            // SAFETY: bank and words are those of the block (M2), in which the bytes lie.
            let step = unsafe {
                let (first, last) = (first >> self.shift, last >> self.shift);
                fence::admit(&*self.bank, self.words, first, last)
            }?;
            place.lane = self.lane.step(step);
        }
        Some(place)
    }

    /// Of `len` bytes at host address `host`, those up to the first unplugged one. Inside a read
    /// section.
    ///
    /// # Safety
    /// `len` bytes from `host` on are in the window.
    pub(crate) unsafe fn plugged_prefix(&self, host: u64, len: u64) -> u64 {
        if self.shift == 0 {
            return len;
        }
        let block = 1u64 << self.shift;
        let mut done = 0;
        while done < len {
            let at = host + done;
            let step = (block - (at & (block - 1))).min(len - done);
            // SAFETY: in the window, by the caller's promise.
            if unsafe { self.admit_one(at, step) }.is_none() {
                break;
            }
            done += step;
        }
        done
    }

    /// Whether `len` bytes (at least 1) at host address `host` lie in one plugged block, and the
    /// lane a pin of them counts in. Inside a read section.
    ///
    /// # Safety
    /// The window is that of a sparse block, and the bytes lie in it.
    #[inline(always)]
    unsafe fn admit_one(&self, host: u64, len: u64) -> Option<Lane> {
        let shift = self.shift;
        // SAFETY: the log2 of a `u64`. Known to be so small, it needs no mask.
        unsafe { std::hint::assert_unchecked(shift < u64::BITS) };
        if ((host + (len - 1)) ^ host) >> shift != 0 {
            return None;
        }
        // SAFETY: bank and words are those of the block, which the section keeps (M2).
        let step = unsafe { fence::admit_one(&*self.bank, self.words, host >> shift) }?;
        Some(self.lane.step(step))
    }
}
