// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! New memory in the place of memory that is still in use: for a guest that is not to meet what devices have in flight
//! for the one before it.
//!
//! ```text
//!   renew: a block like it ─► one change: unplug the old one, show the new one there ─► ticket of the old one
//!                                                        [Draining] ─► free_but(what is pinned)
//!                                                            └─ last unpin ─► [Drained] ─► destroy
//! ```
//!
//! The two never share a page, nor an address (README, M8): whatever still comes for the old one, by a page that the
//! kernel has pinned or by an address, comes there. Two blocks have the same name meanwhile; it finds the new one.

use std::ops::Range;
use std::sync::Arc;

use super::{RamBlock, RamList};
use crate::Error;

impl RamList {
    /// Makes a block as `old` was made: of its name, size, backing and policy, with nothing in it, or plugged. It is for the same
    /// place in the map; `old`, which goes, is found by the name no more. Memory is allocated as it is touched, or by
    /// [`RamBlock::prefault`] once `old` has given back what it can; huge pages of the host's pool are taken now. A client of
    /// the dirty log that was started for `old` alone is not on for it.
    ///
    /// # Errors
    /// As [`RamList::add_with`]; `BadSpec` for one that is made from a file, which means something to others, or whose
    /// discards somebody follows; `Unplugged`, `Foreign`. Nothing has changed then.
    pub fn renew(&self, old: &Arc<RamBlock>) -> Result<Arc<RamBlock>, Error> {
        if !Arc::ptr_eq(old.grace(), self.shared().grace()) {
            return Err(Error::Foreign(format!("RAM block {}", old.name())));
        }
        if !old.is_live() {
            return Err(Error::Unplugged(old.name().to_owned()));
        }
        let reason = if old.has_discard_listeners() {
            "its discards are followed"
        } else if old.mapping().is_file() {
            "its memory is a file's"
        } else {
            let mut spec = old.spec().clone();
            spec.size_bytes = old.size_bytes();
            spec.prefault = false;
            return self.add_in_place_of(old, spec);
        };
        old.spec().refuse(format!("it can't be renewed: {reason}"))
    }
}

impl RamBlock {
    /// How many pins there are on it: never too few, and exactly as many once nobody can take or let go of any.
    pub fn pins(&self) -> u64 {
        let pins = self.grace().hub().outstanding(self.slot(), &[0, 1]);
        if self.is_gone() { 0 } else { pins }
    }

    /// Allocates all of it, if it was made to have that: for one that was [renewed](RamList::renew). Takes as long as the
    /// host takes to find and clear the pages.
    ///
    /// # Errors
    /// `NoHostMemory`, `NoHugePages`, `Host`; some of it may be allocated then.
    pub fn prefault(&self) -> Result<(), Error> {
        match self.wants_prefault() {
            true => self.mapping().populate(0..self.size_bytes()),
            false => Ok(()),
        }
    }

    /// Gives all pages back but those that `kept` (bytes of the block) touches; returns how many bytes it has kept. May
    /// block.
    pub(crate) fn free_but(&self, kept: &[Range<u64>]) -> Result<u64, Error> {
        let size = self.size_bytes();
        if self.is_file() && self.is_shared() {
            // Its pages are the file's contents, which stay when the block goes.
            return Ok(size);
        }
        let kept = whole_pages(kept, self.page_size_bytes(), size);
        let free = || {
            let mut next = 0;
            for range in kept.iter().chain([&(size..size)]) {
                if next < range.start {
                    self.mapping().free_pages(next..range.start)?;
                }
                next = range.end;
            }
            Ok(kept.iter().map(|range| range.end - range.start).sum())
        };
        // Disabled: somebody has mapped them who would not be told. They go with the block.
        self.discards().uncoordinated(free).unwrap_or(Ok(size))
    }
}

/// The pages that `ranges` touch below `size`, in order, none twice.
fn whole_pages(ranges: &[Range<u64>], page: u64, size: u64) -> Vec<Range<u64>> {
    let whole = |range: &Range<u64>| {
        let end = range.end.min(size).next_multiple_of(page).min(size);
        (range.start / page * page).min(end)..end
    };
    let mut pages: Vec<_> = ranges.iter().map(whole).collect();
    pages.retain(|range| !range.is_empty());
    pages.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in pages {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(all(test, not(loom)))]
#[expect(clippy::single_range_in_vec_init, reason = "a list of one range")]
mod tests {
    use super::*;

    #[test]
    fn pages_are_whole_and_merged() {
        const PAGE: u64 = 4096;
        let size = 10 * PAGE;
        let pages = |ranges: &[Range<u64>]| whole_pages(ranges, PAGE, size);
        assert!(pages(&[]).is_empty());
        assert_eq!(pages(&[1..2]), [0..PAGE]);
        assert_eq!(pages(&[PAGE - 1..PAGE + 1]), [0..2 * PAGE]);
        let out_of_order = [5 * PAGE..5 * PAGE + 1, 0..10, 4 * PAGE..5 * PAGE, 7..8];
        assert_eq!(pages(&out_of_order), [0..PAGE, 4 * PAGE..6 * PAGE]);
        // What is not in the block is nobody's.
        assert_eq!(
            pages(&[9 * PAGE + 1..20 * PAGE, 30 * PAGE..31 * PAGE]),
            [9 * PAGE..size]
        );
        assert!(pages(&[PAGE..PAGE]).is_empty());
    }
}
