// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From the pages a driver names to pages of the host.
//!
//! Pages of RAM that is made of larger ones are kept in a bitmap, a bit for each 4 KiB. A host's page whose bits are all
//! set is given back. One bit cleared and set again gives it back again: the guest may have used the whole of it
//! meanwhile.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Weak};

use ebbtide_memory::{Gpa, RamBlock, ReadGuard, SectionKind};

use super::PAGE_BYTES;

/// A part of a RAM block, in bytes.
pub(super) struct Piece {
    pub block: Arc<RamBlock>,
    pub range: Range<u64>,
}

/// The RAM at `gpa`, as far as it goes and `len` bytes at most. `None`: there is none that can be written.
pub(super) fn piece(guard: &ReadGuard<'_>, gpa: Gpa, len: u64) -> Option<Piece> {
    let section = guard.lookup(gpa)?;
    let SectionKind::Ram {
        block,
        block_offset,
        readonly: false,
    } = section.kind()
    else {
        return None;
    };
    let start = block_offset + (gpa.0 - section.range().start);
    let range = start..start + len.min(section.remaining());
    let block = Arc::clone(block);
    Some(Piece { block, range })
}

/// Adds a piece to those before, as one with the last if it goes on there.
pub(super) fn push(pieces: &mut Vec<Piece>, piece: Piece) {
    match pieces.last_mut() {
        Some(last)
            if Arc::ptr_eq(&last.block, &piece.block) && last.range.end == piece.range.start =>
        {
            last.range.end = piece.range.end;
        }
        _ => pieces.push(piece),
    }
}

/// Which pages of 4 KiB are in the balloon, for RAM of larger pages.
#[derive(Default)]
pub(super) struct Tracker {
    /// By the offset of the block.
    blocks: BTreeMap<u64, Tracked>,
}

struct Tracked {
    /// Whose bits they are: an offset may be used again.
    block: Weak<RamBlock>,
    bits: Bits,
}

impl Tracker {
    /// A page of 4 KiB goes into the balloon; what can be given back now.
    pub(super) fn inflate(&mut self, page: Piece) -> Option<Piece> {
        let host_page = page.block.page_size_bytes();
        if host_page <= PAGE_BYTES {
            return Some(page);
        }
        let bits = self.bits(&page.block);
        bits.set(page.range.start / PAGE_BYTES, true);
        let whole = bits.whole(page.range.start / PAGE_BYTES, host_page / PAGE_BYTES)?;
        Some(Piece {
            range: whole.start * PAGE_BYTES..whole.end * PAGE_BYTES,
            ..page
        })
    }

    /// A page of 4 KiB comes out.
    pub(super) fn deflate(&mut self, page: &Piece) {
        if page.block.page_size_bytes() > PAGE_BYTES {
            self.bits(&page.block)
                .set(page.range.start / PAGE_BYTES, false);
        }
    }

    fn bits(&mut self, block: &Arc<RamBlock>) -> &mut Bits {
        self.blocks
            .retain(|_, tracked| tracked.block.strong_count() > 0);
        let tracked = self
            .blocks
            .entry(block.ram_offset())
            .or_insert_with(|| Tracked::new(block));
        if !std::ptr::eq(tracked.block.as_ptr(), Arc::as_ptr(block)) {
            *tracked = Tracked::new(block);
        }
        &mut tracked.bits
    }
}

impl Tracked {
    fn new(block: &Arc<RamBlock>) -> Tracked {
        Tracked {
            block: Arc::downgrade(block),
            bits: Bits::default(),
        }
    }
}

/// A set of page numbers, as long as its largest has needed.
#[derive(Default)]
struct Bits(Vec<u64>);

impl Bits {
    fn set(&mut self, page: u64, on: bool) {
        let Ok(word) = usize::try_from(page / 64) else {
            return;
        };
        if self.0.len() <= word {
            if !on {
                return;
            }
            self.0.resize(word + 1, 0);
        }
        if let Some(word) = self.0.get_mut(word) {
            let mask = 1 << (page % 64);
            *word = if on { *word | mask } else { *word & !mask };
        }
    }

    fn has(&self, page: u64) -> bool {
        let word = usize::try_from(page / 64).ok().and_then(|w| self.0.get(w));
        word.is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    /// The `count` pages (a power of two) that `page` is one of, if all of them are in the set.
    fn whole(&self, page: u64, count: u64) -> Option<Range<u64>> {
        let first = page / count * count;
        let range = first..first + count;
        range.clone().all(|page| self.has(page)).then_some(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_whole_when_its_last_part_is_there() {
        let mut bits = Bits::default();
        for page in (512..1024).rev().filter(|page| *page != 700) {
            bits.set(page, true);
            assert_eq!(bits.whole(page, 512), None);
        }
        bits.set(700, true);
        assert_eq!(bits.whole(700, 512), Some(512..1024));
        assert_eq!(bits.whole(511, 512), None);
        bits.set(1023, false);
        assert_eq!(bits.whole(700, 512), None);
        bits.set(1023, true);
        assert_eq!(bits.whole(1023, 512), Some(512..1024));
        bits.set(1 << 40, false);
        assert_eq!(bits.0.len(), 16);
    }
}
