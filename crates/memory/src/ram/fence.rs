// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The range fence of a sparse block: which blocks are plugged, and the bank new pins go to.
//!
//! ```text
//!   pin (in a section)          seal, then the worker
//!   1. load the bank            1. clear the bits
//!   2. test the bits            2. flip the bank
//!   3. count in that bank       3. grace period
//!                               4. wait for the old bank to reach zero
//! ```
//!
//! A pin that found its bits set counted in the old bank, or loaded the new bank: then its test
//! came after the flip and so after the clearing, and failed if it lay in the range (README,
//! M7). After the grace period nobody new counts in the old bank, so step 4 ends whatever load
//! there is on the rest of the block. Seals that come while a fence runs clear their bits at
//! once and share the next fence.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire};

use ebbtide_models::seeded;

use crate::reader::hub::Hub;
use crate::reader::wake::Level;
use crate::sync::{AtomicU64, Mutex, lock};

/// The plugged bitmap. Blocks are numbered by their host addresses, divided by the block size, so
/// that a pin finds its bit without knowing where the RAM block starts.
pub(crate) struct BlockMap {
    /// Number of the first block.
    first: u64,
    words: Box<[AtomicU64]>,
}

impl BlockMap {
    /// A map of `blocks` unplugged blocks, of which the first has number `first`.
    fn new(first: u64, blocks: u64) -> BlockMap {
        let words = (first + blocks).div_ceil(64) - first / 64;
        BlockMap {
            first,
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Where the word of block 0 would be.
    pub(crate) fn word_zero(&self) -> *const AtomicU64 {
        self.words.as_ptr().wrapping_sub((self.first / 64) as usize)
    }

    /// The words of `blocks` (counted from the first) with a mask each.
    fn parts(&self, blocks: Range<u64>) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let first_word = self.first / 64;
        let parts = masks(self.first + blocks.start..self.first + blocks.end);
        parts.map(move |(word, mask)| (&self.words[(word - first_word) as usize], mask))
    }

    /// Sets the bits of `blocks`, counted from the first.
    pub(crate) fn set(&self, blocks: Range<u64>) {
        self.parts(blocks).for_each(|(word, mask)| {
            word.fetch_or(mask, AcqRel);
        });
    }

    /// Clears the bits of `blocks`, counted from the first.
    fn clear(&self, blocks: Range<u64>) {
        self.parts(blocks).for_each(|(word, mask)| {
            word.fetch_and(!mask, AcqRel);
        });
    }

    /// How many of `blocks`, counted from the first, are plugged.
    pub(crate) fn count(&self, blocks: Range<u64>) -> u64 {
        self.parts(blocks)
            .map(|(word, mask)| u64::from((word.load(Acquire) & mask).count_ones()))
            .sum()
    }
}

/// Numbers of the words that hold the bits of `blocks`, with a mask each.
pub(crate) fn masks(blocks: Range<u64>) -> impl Iterator<Item = (u64, u64)> {
    let mut next = blocks.start;
    std::iter::from_fn(move || {
        if next >= blocks.end {
            return None;
        }
        let first = next % 64;
        let count = (64 - first).min(blocks.end - next);
        let word = next / 64;
        next += count;
        Some((word, (u64::MAX >> (64 - count)) << first))
    })
}

/// Whether a block is plugged, and if so how far the lane to count a pin of it in is from that in bank 0.
/// Call inside a read section. `current` is [`Hub::bank`] of the slot of the RAM block.
///
/// # Safety
/// `word_zero` is that of the [`BlockMap`] of that RAM block, and `block` one of its blocks.
#[inline(always)]
pub(crate) unsafe fn admit_one(
    current: &AtomicU64,
    word_zero: *const AtomicU64,
    block: u64,
) -> Option<u64> {
    // SAFETY: the map has the words of all its blocks.
    let word = unsafe { &*word_zero.wrapping_add((block / 64) as usize) };
    let plugged = || word.load(Acquire) >> (block % 64) & 1 == 1;
    if seeded!("bank_after_bits") {
        return plugged().then(|| current.load(Acquire));
    }
    let step = current.load(Acquire);
    plugged().then_some(step)
}

/// As [`admit_one`], for the blocks `first..=last`.
///
/// # Safety
/// As for [`admit_one`], of all the blocks.
pub(crate) unsafe fn admit(
    current: &AtomicU64,
    word_zero: *const AtomicU64,
    first: u64,
    last: u64,
) -> Option<u64> {
    let step = current.load(Acquire);
    let mut plugged = masks(first..last + 1).map(|(word, mask)| {
        // SAFETY: the map has the words of all its blocks.
        let word = unsafe { &*word_zero.wrapping_add(word as usize) };
        word.load(Acquire) & mask == mask
    });
    plugged.all(|plugged| plugged).then_some(step)
}

/// The fence of one sparse block.
pub(crate) struct Fence {
    hub: &'static Hub,
    slot: u32,
    map: BlockMap,
    state: Mutex<FenceState>,
}

#[derive(Default)]
struct FenceState {
    /// The worker knows of the fence.
    active: bool,
    old_bank: usize,
    /// Seals whose bits are cleared, not yet part of a flip.
    queued: Vec<Arc<Level>>,
    /// Seals the running fence is for.
    running: Vec<Arc<Level>>,
    /// The block is gone; its slot goes with the last fence.
    orphaned: bool,
}

impl Fence {
    /// The fence of a RAM block of `blocks` blocks; for `first` see [`BlockMap`].
    pub(crate) fn new(hub: &'static Hub, slot: u32, first: u64, blocks: u64) -> Arc<Fence> {
        let map = BlockMap::new(first, blocks);
        Arc::new(Fence {
            hub,
            slot,
            map,
            state: Mutex::default(),
        })
    }

    pub(crate) fn map(&self) -> &BlockMap {
        &self.map
    }

    pub(crate) fn slot(&self) -> u32 {
        self.slot
    }

    /// Clears the bits of `blocks` and queues a fence that raises the level to 1. Returns
    /// whether the fence must be submitted to the worker.
    pub(crate) fn seal(&self, blocks: Range<u64>, level: Arc<Level>) -> bool {
        self.map.clear(blocks);
        // Before the worker can know of the seal: its grace period must also end the sections
        // that still trust a cached translation.
        if !seeded!("no_seal_bump") {
            self.hub.bump_generation();
        }
        let mut state = lock(&self.state);
        state.queued.push(level);
        !std::mem::replace(&mut state.active, true)
    }

    /// Worker: flips the bank, just before a grace period begins.
    pub(crate) fn begin(&self) {
        let mut state = lock(&self.state);
        state.running = std::mem::take(&mut state.queued);
        state.old_bank = self.hub.flip_bank(self.slot);
    }

    pub(crate) fn old_bank(&self) -> usize {
        lock(&self.state).old_bank
    }

    /// Worker: the old bank is empty. Returns whether more seals are queued.
    pub(crate) fn finish(&self) -> bool {
        let mut state = lock(&self.state);
        let done = std::mem::take(&mut state.running);
        state.active = !state.queued.is_empty();
        let (again, orphaned) = (state.active, state.orphaned);
        drop(state);
        done.iter().for_each(|level| level.raise(1));
        if orphaned && !again {
            self.hub.free_slot(self.slot);
        }
        again
    }

    /// The block is gone, and there will be no seals any more. Frees its slot, or has the fence that is under way do so:
    /// seals may have been taken back while it was to begin, and it flips the bank of that slot (M5).
    pub(crate) fn give_up_slot(&self) {
        let mut state = lock(&self.state);
        let early = seeded!("slot_before_fence");
        state.orphaned = !early;
        if !state.active || early {
            drop(state);
            self.hub.free_slot(self.slot);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::reader::barrier::Barrier;
    use crate::reader::counters::Lane;

    #[test]
    fn masks_cover_exactly_the_range() {
        for (start, end) in [(0, 1), (0, 64), (63, 65), (5, 200), (64, 128), (7, 7)] {
            let mut blocks = Vec::new();
            for (word, mask) in masks(start..end) {
                blocks.extend(
                    (0..64)
                        .filter(|b| mask >> b & 1 == 1)
                        .map(|b| word * 64 + b),
                );
            }
            assert_eq!(blocks, (start..end).collect::<Vec<_>>());
        }
    }

    #[test]
    fn admission_needs_every_block() {
        let hub = Hub::take(Barrier::choose());
        for first in [0, 3, 64, 0x7f12_3456_7800, 0x3_ffff_ffff] {
            let map = BlockMap::new(first, 200);
            // SAFETY: blocks of the map.
            let many =
                |from, to| unsafe { admit(hub.bank(5), map.word_zero(), first + from, first + to) };
            // SAFETY: as above.
            let one = |block| unsafe { admit_one(hub.bank(5), map.word_zero(), first + block) };
            let bank = hub.bank(5).load(Acquire);
            map.set(10..140);
            assert_eq!(map.count(0..200), 130);
            assert_eq!((many(10, 10), many(10, 139)), (Some(bank), Some(bank)));
            assert_eq!(
                (many(9, 10), many(10, 140), many(0, 199)),
                (None, None, None)
            );
            assert_eq!(
                (one(9), one(10), one(139), one(140)),
                (None, Some(bank), Some(bank), None)
            );
            map.clear(70..71);
            assert_eq!((many(10, 139), many(71, 139)), (None, Some(bank)));
            assert_eq!(hub.flip_bank(5) as u64, bank / Lane::STEP);
            assert_eq!(many(71, 139), Some(Lane::STEP - bank));
            assert_eq!(map.count(60..80), 19);
        }
        hub.give_back();
    }
}
