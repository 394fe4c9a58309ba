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
//! I7). After the grace period nobody new counts in the old bank, so step 4 ends whatever load
//! there is on the rest of the block. Seals that come while a fence runs clear their bits at
//! once and share the next fence.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire};

use crate::reader::hub::Hub;
use crate::reader::wake::Level;
use crate::sync::{AtomicU64, Mutex, lock};

/// The plugged bitmap and the bank, in one allocation: the bank first, so that a pin of a small
/// device touches one line.
pub(crate) struct BlockMap {
    words: Box<[AtomicU64]>,
}

impl BlockMap {
    /// A map of `blocks` unplugged blocks.
    pub(crate) fn new(blocks: u64) -> BlockMap {
        let words = usize::try_from(blocks.div_ceil(64)).unwrap_or(usize::MAX);
        BlockMap {
            words: (0..=words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// The words: bank, then bits.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        &self.words
    }

    fn flip(&self) -> usize {
        (self.words[0].fetch_xor(1, AcqRel) & 1) as usize
    }

    /// Sets the bits of `blocks`.
    pub(crate) fn set(&self, blocks: Range<u64>) {
        masks(blocks).for_each(|(word, mask)| {
            self.words[word].fetch_or(mask, AcqRel);
        });
    }

    /// Clears the bits of `blocks`.
    pub(crate) fn clear(&self, blocks: Range<u64>) {
        masks(blocks).for_each(|(word, mask)| {
            self.words[word].fetch_and(!mask, AcqRel);
        });
    }

    /// How many of `blocks` are plugged.
    pub(crate) fn count(&self, blocks: Range<u64>) -> u64 {
        masks(blocks)
            .map(|(word, mask)| u64::from((self.words[word].load(Acquire) & mask).count_ones()))
            .sum()
    }
}

/// The words that hold the bits of `blocks`, with a mask each.
fn masks(blocks: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let mut next = blocks.start;
    std::iter::from_fn(move || {
        if next >= blocks.end {
            return None;
        }
        let first = next % 64;
        let count = (64 - first).min(blocks.end - next);
        let word = 1 + (next / 64) as usize;
        next += count;
        Some((word, (u64::MAX >> (64 - count)) << first))
    })
}

/// Whether `block` is plugged, and if so the bank to count in. Call inside a read section.
///
/// # Safety
/// `words` are those of a [`BlockMap`], and `block` is one of its blocks.
#[inline(always)]
pub(crate) unsafe fn admit_one(words: *const AtomicU64, block: u64) -> Option<usize> {
    // SAFETY: a map has the bank and the word of each of its blocks.
    let (bank, word) = unsafe { (&*words, &*words.add((block / 64) as usize + 1)) };
    #[cfg(not(seeded = "bank_after_bits"))]
    let bank = bank.load(Acquire);
    let plugged = word.load(Acquire) >> (block % 64) & 1 == 1;
    #[cfg(seeded = "bank_after_bits")]
    let bank = bank.load(Acquire);
    plugged.then_some((bank & 1) as usize)
}

/// As [`admit_one`], for the blocks `first..=last`.
pub(crate) fn admit(words: &[AtomicU64], first: u64, last: u64) -> Option<usize> {
    let bank = words.first()?.load(Acquire);
    let mut plugged = masks(first..last + 1).map(|(word, mask)| {
        words
            .get(word)
            .is_some_and(|word| word.load(Acquire) & mask == mask)
    });
    plugged
        .all(|plugged| plugged)
        .then_some((bank & 1) as usize)
}

/// The fence of one sparse block.
pub(crate) struct Fence {
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
}

impl Fence {
    pub(crate) fn new(slot: u32, blocks: u64) -> Arc<Fence> {
        Arc::new(Fence {
            slot,
            map: BlockMap::new(blocks),
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
    pub(crate) fn seal(&self, blocks: Range<u64>, level: Arc<Level>, hub: &Hub) -> bool {
        self.map.clear(blocks);
        // Before the worker can know of the seal: its grace period must also end the sections
        // that still trust a cached translation.
        #[cfg(not(seeded = "no_seal_bump"))]
        hub.bump_generation();
        #[cfg(seeded = "no_seal_bump")]
        let _ = hub;
        let mut state = lock(&self.state);
        state.queued.push(level);
        !std::mem::replace(&mut state.active, true)
    }

    /// Worker: flips the bank, just before a grace period begins.
    pub(crate) fn begin(&self) {
        let mut state = lock(&self.state);
        state.running = std::mem::take(&mut state.queued);
        state.old_bank = self.map.flip();
    }

    pub(crate) fn old_bank(&self) -> usize {
        lock(&self.state).old_bank
    }

    /// Worker: the old bank is empty. Returns whether more seals are queued.
    pub(crate) fn finish(&self) -> bool {
        let mut state = lock(&self.state);
        let done = std::mem::take(&mut state.running);
        state.active = !state.queued.is_empty();
        let again = state.active;
        drop(state);
        done.iter().for_each(|level| level.raise(1));
        again
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn masks_cover_exactly_the_range() {
        for (start, end) in [(0, 1), (0, 64), (63, 65), (5, 200), (64, 128), (7, 7)] {
            let mut blocks = Vec::new();
            for (word, mask) in masks(start..end) {
                blocks.extend(
                    (0..64)
                        .filter(|b| mask >> b & 1 == 1)
                        .map(|b| (word as u64 - 1) * 64 + b),
                );
            }
            assert_eq!(blocks, (start..end).collect::<Vec<_>>());
        }
    }

    #[test]
    fn admit_needs_every_block() {
        let map = BlockMap::new(200);
        map.set(10..140);
        assert_eq!(admit(map.words(), 10, 10), Some(0));
        // SAFETY: blocks of the map.
        let one = |block| unsafe { admit_one(map.words().as_ptr(), block) };
        assert_eq!(
            (one(9), one(10), one(139), one(140)),
            (None, Some(0), Some(0), None)
        );
        assert_eq!(admit(map.words(), 10, 139), Some(0));
        assert_eq!(admit(map.words(), 9, 10), None);
        assert_eq!(admit(map.words(), 10, 140), None);
        assert_eq!(admit(map.words(), 199, 100_000), None);
        map.clear(70..71);
        assert_eq!(admit(map.words(), 10, 139), None);
        assert_eq!(admit(map.words(), 71, 139), Some(0));
        assert_eq!(map.flip(), 0);
        assert_eq!(admit(map.words(), 71, 139), Some(1));
        assert_eq!(map.count(0..200), 129);
    }
}
