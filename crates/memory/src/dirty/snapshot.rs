// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a harvest brings in.

use std::fmt;
use std::ops::Range;

use super::PAGE_BYTES;

/// A word of a bitmap that is not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Word {
    /// Page of the first bit.
    page: u64,
    bits: u64,
}

impl Word {
    /// The word with number `at` of a bitmap.
    pub(super) fn new(at: usize, bits: u64) -> Word {
        let page = at as u64 * 64;
        Word { page, bits }
    }
}

/// The dirty pages of a RAM block at one moment. Pages are of 4 KiB, offsets in bytes from the
/// start of the block.
///
/// Pages of a sparse block that were unplugged since may be among them.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct DirtySnapshot {
    /// Ascending; as long as something is dirty, not as the block is large.
    words: Vec<Word>,
}

impl DirtySnapshot {
    pub(super) fn new(words: Vec<Word>) -> DirtySnapshot {
        DirtySnapshot { words }
    }

    /// Whether no page is dirty.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// How many pages are dirty.
    pub fn pages(&self) -> u64 {
        let ones = |word: &Word| u64::from(word.bits.count_ones());
        self.words.iter().map(ones).sum()
    }

    /// Whether the page at `offset` is dirty.
    pub fn contains(&self, offset: u64) -> bool {
        let page = offset / PAGE_BYTES;
        let found = self
            .words
            .binary_search_by_key(&(page & !63), |word| word.page);
        found.is_ok_and(|at| self.words[at].bits >> (page % 64) & 1 == 1)
    }

    /// The dirty ranges in order, whole pages, as long as they can be.
    pub fn ranges(&self) -> DirtyRanges<'_> {
        DirtyRanges {
            left: self.words.iter(),
            word: Word { page: 0, bits: 0 },
        }
    }
}

impl<'a> IntoIterator for &'a DirtySnapshot {
    type Item = Range<u64>;
    type IntoIter = DirtyRanges<'a>;

    fn into_iter(self) -> DirtyRanges<'a> {
        self.ranges()
    }
}

impl fmt::Debug for DirtySnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.ranges()).finish()
    }
}

/// The ranges of a [`DirtySnapshot`], in bytes from the start of the block.
#[derive(Clone)]
pub struct DirtyRanges<'a> {
    left: std::slice::Iter<'a, Word>,
    /// The word under way, with the bits that are still to come.
    word: Word,
}

impl DirtyRanges<'_> {
    /// The next run of bits that ends in its word at the latest, in pages.
    fn run(&mut self) -> Option<Range<u64>> {
        while self.word.bits == 0 {
            self.word = *self.left.next()?;
        }
        let Word { page, bits } = self.word;
        let first = bits.trailing_zeros();
        let count = (bits >> first).trailing_ones();
        self.word.bits = bits & !((u64::MAX >> (64 - count)) << first);
        let start = page + u64::from(first);
        Some(start..start + u64::from(count))
    }
}

impl Iterator for DirtyRanges<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let mut run = self.run()?;
        while run.end.is_multiple_of(64) && self.word.bits == 0 {
            // It may go on in the next word.
            match self.left.as_slice().first() {
                Some(next) if next.page == run.end && next.bits & 1 == 1 => {
                    run.end = self.run().map_or(run.end, |more| more.end);
                }
                _ => break,
            }
        }
        Some(run.start * PAGE_BYTES..run.end * PAGE_BYTES)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn runs_cross_words_and_stop_at_gaps() {
        let words = vec![
            Word::new(0, 1 << 63 | 0b110),
            Word::new(1, u64::MAX),
            Word::new(2, 1),
            Word::new(4, 1),
        ];
        let snapshot = DirtySnapshot::new(words);
        let pages = |range: Range<u64>| range.start / PAGE_BYTES..range.end / PAGE_BYTES;
        let ranges: Vec<_> = snapshot.ranges().map(pages).collect();
        assert_eq!(ranges, [1..3, 63..129, 256..257]);
        assert_eq!(snapshot.pages(), 2 + 66 + 1);
        assert!(snapshot.contains(64 * PAGE_BYTES + 5) && !snapshot.contains(0));
        assert!(!snapshot.contains(192 * PAGE_BYTES) && snapshot.contains(256 * PAGE_BYTES));
    }

    #[test]
    fn nothing_has_no_ranges() {
        let empty = DirtySnapshot::default();
        assert!(empty.is_empty() && empty.ranges().next().is_none());
        assert_eq!((empty.pages(), empty.contains(0)), (0, false));
    }
}
