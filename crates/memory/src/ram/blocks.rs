// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The RAM blocks at one moment.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use super::RamBlock;

/// The RAM blocks of a [`super::RamList`] as they were at one version of it. Never changes: who
/// walks it is not disturbed by blocks that come and go. A block in it may be gone since; its
/// addresses are then inaccessible and belong to nobody else.
pub struct RamBlocks {
    version: u64,
    /// Largest first: what an address most likely lies in.
    blocks: Vec<Arc<RamBlock>>,
    /// Ascending; the second number is an index of `blocks`, as in the next two.
    by_host: Vec<(u64, usize)>,
    by_offset: Vec<(u64, usize)>,
    by_name: Vec<usize>,
    /// The index of the block that the last look-up by host address found. Written only when it
    /// changes, so that look-ups in one block share no cache line they write to.
    recent: AtomicUsize,
}

impl RamBlocks {
    pub(super) fn new(version: u64, mut blocks: Vec<Arc<RamBlock>>) -> RamBlocks {
        blocks.sort_by_key(|block| std::cmp::Reverse(block.max_size_bytes()));
        let sorted = |key: fn(&RamBlock) -> u64| {
            let mut places: Vec<_> = blocks.iter().map(|block| key(block)).zip(0..).collect();
            places.sort_unstable();
            places
        };
        let mut by_name: Vec<usize> = (0..blocks.len()).collect();
        // Of one name the older comes first: the sort above is stable, and they have one size.
        by_name.sort_by_key(|at| blocks[*at].name());
        RamBlocks {
            version,
            by_host: sorted(|block| block.host().as_ptr() as u64),
            by_offset: sorted(RamBlock::ram_offset),
            by_name,
            blocks,
            recent: AtomicUsize::new(0),
        }
    }

    /// Counts the changes of the list: blocks added, removed, resized. Who keeps a position
    /// across accesses to the list starts again when [`super::RamList::version`] is another.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// How many blocks there are.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// The blocks, largest first.
    pub fn iter(&self) -> std::slice::Iter<'_, Arc<RamBlock>> {
        self.blocks.iter()
    }

    /// The block of that name (QEMU: idstr); of one that was [renewed](super::RamList::renew) the new one, unless that is
    /// on its way out and the old one is not: the change that was to show it has failed.
    pub fn by_name(&self, name: &str) -> Option<&Arc<RamBlock>> {
        let end = self
            .by_name
            .partition_point(|at| self.blocks[*at].name() <= name);
        let newest_first = self.by_name[..end].iter().rev().map(|at| &self.blocks[*at]);
        let mut same = newest_first.take_while(|block| block.name() == name);
        same.clone()
            .find(|block| block.is_live())
            // One on its way out that has given its name away is found by no name.
            .or_else(|| same.find(|block| !block.is_renewed()))
    }

    /// The block at a host address, and the offset in it in bytes, which is below its maximum
    /// size.
    pub fn by_host(&self, host: *const u8) -> Option<(&Arc<RamBlock>, u64)> {
        let host = host as u64;
        let recent = self.recent.load(Relaxed);
        if let Some(found) = self.at(recent, host, |block| block.host().as_ptr() as u64) {
            return Some(found);
        }
        let at = last_at_or_below(&self.by_host, host)?;
        let found = self.at(at, host, |block| block.host().as_ptr() as u64)?;
        self.recent.store(at, Relaxed);
        Some(found)
    }

    /// The block at a RAM offset, and the offset in it in bytes, which is below its maximum size.
    pub fn by_ram_offset(&self, ram_offset: u64) -> Option<(&Arc<RamBlock>, u64)> {
        let at = last_at_or_below(&self.by_offset, ram_offset)?;
        self.at(at, ram_offset, RamBlock::ram_offset)
    }

    fn at(
        &self,
        at: usize,
        address: u64,
        start: impl Fn(&RamBlock) -> u64,
    ) -> Option<(&Arc<RamBlock>, u64)> {
        let block = self.blocks.get(at)?;
        let offset = address.checked_sub(start(block))?;
        (offset < block.max_size_bytes()).then_some((block, offset))
    }

    /// The blocks as the table of `info ramblock`.
    pub fn dump(&self) -> String {
        let mut text = format!(
            "{:>24} {:>8}  {:>18} {:>18} {:>18} {:>18} {:>3}\n",
            "Block Name", "PSize", "Offset", "Used", "Total", "HVA", "RO"
        );
        for block in &self.blocks {
            let _ = writeln!(
                text,
                "{:>24} {:>8}  {:#018x} {:#018x} {:#018x} {:#018x} {:>3}",
                block.name(),
                short_size(block.page_size_bytes()),
                block.ram_offset(),
                block.size_bytes(),
                block.max_size_bytes(),
                block.host().as_ptr() as u64,
                if block.is_readonly() { "ro" } else { "rw" },
            );
        }
        text
    }

    /// The same with `block` in addition.
    pub(super) fn with(&self, block: &Arc<RamBlock>) -> RamBlocks {
        let mut blocks = self.blocks.clone();
        blocks.push(Arc::clone(block));
        RamBlocks::new(self.version + 1, blocks)
    }

    /// The same without `block`; `None` when it is not there.
    pub(super) fn without(&self, block: &Arc<RamBlock>) -> Option<RamBlocks> {
        let mut blocks = self.blocks.clone();
        blocks.retain(|other| !Arc::ptr_eq(other, block));
        (blocks.len() < self.len()).then(|| RamBlocks::new(self.version + 1, blocks))
    }

    /// The same, after a block was resized.
    pub(super) fn resized(&self) -> RamBlocks {
        RamBlocks::new(self.version + 1, self.blocks.clone())
    }

    /// The lowest RAM offset at which `bytes` fit between the blocks; a multiple of `align`.
    pub(super) fn lowest_gap(&self, bytes: u64, align: u64) -> Option<u64> {
        let mut candidate = 0u64;
        for (start, at) in &self.by_offset {
            if *start >= candidate && start - candidate >= bytes {
                break;
            }
            let end = start.checked_add(self.blocks[*at].max_size_bytes())?;
            candidate = candidate.max(end).checked_next_multiple_of(align)?;
        }
        candidate.checked_add(bytes).map(|_| candidate)
    }
}

impl<'a> IntoIterator for &'a RamBlocks {
    type Item = &'a Arc<RamBlock>;
    type IntoIter = std::slice::Iter<'a, Arc<RamBlock>>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// Of places sorted by address, the index that belongs to the last one at or below `address`.
fn last_at_or_below(places: &[(u64, usize)], address: u64) -> Option<usize> {
    let after = places.partition_point(|(start, _)| *start <= address);
    Some(places[after.checked_sub(1)?].1)
}

pub(super) fn short_size(bytes: u64) -> String {
    match bytes {
        b if b >= 1 << 30 => format!("{} GiB", b >> 30),
        b if b >= 1 << 20 => format!("{} MiB", b >> 20),
        b => format!("{} KiB", b >> 10),
    }
}
