// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The list of RAM blocks.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::arena::Arena;
use super::backing::Source;
use super::{Backing, HostMemory, NotifierId, RamBlock, RamNotifier, RamSpec};
use crate::Error;
use crate::grace::Grace;
use crate::reader::counters::MAX_SLOTS;

/// Blocks of sparse RAM are aligned to their size in this process, as pins look them up by host
/// address, and the arena goes no further than this.
const MAX_BLOCK: u64 = 1 << 30;
/// Alignment of RAM offsets: the bits of two blocks never share a word of a dirty bitmap.
const OFFSET_ALIGN: u64 = 64 * 4096;

/// The RAM blocks of one memory.
pub struct RamList {
    shared: Arc<ListShared>,
    grace: Arc<Grace>,
    arena: Arc<Arena>,
}

/// What tickets share with the list.
pub(crate) struct ListShared {
    inner: Mutex<Inner>,
    /// Serialises the calls that make blocks, which may take long, outside `inner`.
    adding: Mutex<()>,
    version: AtomicU64,
}

struct Inner {
    /// Largest first, as the list is walked to find an address.
    blocks: Vec<Arc<RamBlock>>,
    /// Where the last look-up by host address found its block.
    recent: usize,
    notifiers: Vec<(NotifierId, Box<dyn RamNotifier>)>,
    next_notifier: u64,
}

impl RamSpec {
    fn refuse<T>(&self, reason: String) -> Result<T, Error> {
        Err(Error::BadSpec {
            name: self.name.clone(),
            reason,
        })
    }

    fn check(&self) -> Result<(), Error> {
        if self.max_size_bytes < self.size_bytes {
            return self.refuse(format!(
                "size {} is above its maximum {}",
                self.size_bytes, self.max_size_bytes
            ));
        }
        if self.max_size_bytes == 0 {
            return self.refuse("size is 0".to_owned());
        }
        if let Some(block) = self.block_size_bytes {
            if !block.is_power_of_two() || block > MAX_BLOCK {
                let reason = "is not a power of two up to 1 GiB";
                return self.refuse(format!("block size {block} {reason}"));
            }
            if self.size_bytes != self.max_size_bytes || !self.size_bytes.is_multiple_of(block) {
                let (size, max) = (self.size_bytes, self.max_size_bytes);
                return self.refuse(format!(
                    "size {size} (maximum {max}) is not a number of {block}-byte blocks"
                ));
            }
        } else if matches!(self.backing, Backing::Anon { .. } | Backing::Memfd { .. }) {
            let host = HostMemory::read();
            if self.size_bytes > host.limit_bytes() {
                let (name, detail) = (self.name.clone(), host.to_string());
                return Err(Error::NoHostMemory {
                    name,
                    bytes: self.size_bytes,
                    detail,
                });
            }
        }
        Ok(())
    }

    pub(super) fn check_against(&self, source: &Source) -> Result<(), Error> {
        let page = source.page_size_bytes();
        for (what, bytes) in [
            ("size", self.size_bytes),
            ("maximum size", self.max_size_bytes),
        ] {
            if !bytes.is_multiple_of(page) {
                return self.refuse(format!(
                    "{what} {bytes} is not a multiple of the page size {page}"
                ));
            }
        }
        if let Some(block) = self.block_size_bytes {
            if block < page {
                return self.refuse(format!("block size {block} is below the page size {page}"));
            }
            if !source.can_be_sparse() {
                return self.refuse("a private mapping of a file cannot be sparse".to_owned());
            }
        }
        Ok(())
    }
}

impl RamList {
    pub(crate) fn new(grace: &Arc<Grace>, arena: Arc<Arena>) -> RamList {
        let inner = Inner {
            blocks: Vec::new(),
            recent: 0,
            notifiers: Vec::new(),
            next_notifier: 0,
        };
        let shared = ListShared {
            inner: Mutex::new(inner),
            adding: Mutex::new(()),
            version: AtomicU64::new(0),
        };
        RamList {
            shared: Arc::new(shared),
            grace: Arc::clone(grace),
            arena,
        }
    }

    pub(crate) fn shared(&self) -> &Arc<ListShared> {
        &self.shared
    }

    /// Makes a block and tells the notifiers. With `prefault` it takes as long as the host takes
    /// to find and clear the pages.
    ///
    /// # Errors
    /// `DuplicateName`, `BadSpec`, `NoHostMemory` with the host's figures, `ArenaFull`,
    /// `TooManyBlocks`, `Host`.
    pub fn add(&self, spec: RamSpec) -> Result<Arc<RamBlock>, Error> {
        spec.check()?;
        let _adding = self.shared.adding.lock().unwrap_or_else(|p| p.into_inner());
        let ram_offset = {
            let inner = self.shared.lock();
            if inner.blocks.iter().any(|block| block.name() == spec.name) {
                return Err(Error::DuplicateName(spec.name));
            }
            let end = |block: &Arc<RamBlock>| block.ram_offset() + block.max_size_bytes();
            let taken = inner
                .blocks
                .iter()
                .map(|block| (block.ram_offset(), end(block)));
            lowest_gap(taken.collect(), spec.max_size_bytes)
        };
        let slot = self
            .grace
            .hub()
            .allocate_slot()
            .ok_or(Error::TooManyBlocks(MAX_SLOTS))?;
        let block = match RamBlock::new(&spec, ram_offset, &self.grace, &self.arena, slot) {
            Ok(block) => Arc::new(block),
            Err(error) => {
                self.grace.hub().free_slot(slot);
                return Err(error);
            }
        };
        let mut inner = self.shared.lock();
        let at = inner
            .blocks
            .partition_point(|b| b.max_size_bytes() >= block.max_size_bytes());
        inner.blocks.insert(at, Arc::clone(&block));
        inner.recent = 0;
        self.shared.version.fetch_add(1, Ordering::Release);
        for (_, notifier) in &mut inner.notifiers {
            notifier.added(block.host(), block.size_bytes(), block.max_size_bytes());
        }
        Ok(block)
    }

    /// Grows `block` to `new_bytes`, at most its maximum. The regions that show it keep their
    /// size until [`crate::Transaction::set_size`].
    ///
    /// # Errors
    /// `BadSpec` when it would shrink, exceed its maximum, or is sparse; `NoHostMemory`, `Host`.
    pub fn grow(&self, block: &Arc<RamBlock>, new_bytes: u64) -> Result<(), Error> {
        let _adding = self.shared.adding.lock().unwrap_or_else(|p| p.into_inner());
        let refuse = |reason: String| {
            Err(Error::BadSpec {
                name: block.name().to_owned(),
                reason,
            })
        };
        let (old, max, page) = (
            block.size_bytes(),
            block.max_size_bytes(),
            block.page_size_bytes(),
        );
        if block.block_size_bytes().is_some() {
            return refuse("a sparse block has a fixed size".to_owned());
        }
        if !block.is_live() {
            return Err(Error::Unplugged(block.name().to_owned()));
        }
        if new_bytes < old || new_bytes > max || !new_bytes.is_multiple_of(page) {
            return refuse(format!(
                "size {new_bytes} is not {old} to {max} in steps of {page}"
            ));
        }
        if new_bytes == old {
            return Ok(());
        }
        block.grow(new_bytes)?;
        let mut inner = self.shared.lock();
        self.shared.version.fetch_add(1, Ordering::Release);
        for (_, notifier) in &mut inner.notifiers {
            notifier.resized(block.host(), old, new_bytes);
        }
        Ok(())
    }

    /// All blocks, largest first.
    pub fn blocks(&self) -> Vec<Arc<RamBlock>> {
        self.shared.lock().blocks.clone()
    }

    /// The block of that name.
    pub fn by_name(&self, name: &str) -> Option<Arc<RamBlock>> {
        self.shared
            .lock()
            .blocks
            .iter()
            .find(|block| block.name() == name)
            .cloned()
    }

    /// The block at a host address, and the offset in it in bytes.
    pub fn by_host(&self, host: *const u8) -> Option<(Arc<RamBlock>, u64)> {
        let mut inner = self.shared.lock();
        let offset = |block: &RamBlock| {
            let offset = (host as u64).checked_sub(block.host().as_ptr() as u64)?;
            (offset < block.max_size_bytes()).then_some(offset)
        };
        if let Some(block) = inner.blocks.get(inner.recent)
            && let Some(offset) = offset(block)
        {
            return Some((Arc::clone(block), offset));
        }
        let (at, found) = inner
            .blocks
            .iter()
            .enumerate()
            .find_map(|(at, b)| Some((at, offset(b)?)))?;
        inner.recent = at;
        Some((Arc::clone(&inner.blocks[at]), found))
    }

    /// The block at a RAM offset, and the offset in it in bytes.
    pub fn by_ram_offset(&self, ram_offset: u64) -> Option<(Arc<RamBlock>, u64)> {
        let inner = self.shared.lock();
        inner.blocks.iter().find_map(|block| {
            let offset = ram_offset.checked_sub(block.ram_offset())?;
            (offset < block.max_size_bytes()).then(|| (Arc::clone(block), offset))
        })
    }

    /// Counts the changes of the list.
    pub fn version(&self) -> u64 {
        self.shared.version.load(Ordering::Acquire)
    }

    /// The blocks as a table.
    pub fn dump(&self) -> String {
        let inner = self.shared.lock();
        let mut text = format!(
            "{:>24} {:>9} {:>18} {:>18} {:>18} {:>18}\n",
            "Block", "PageSize", "Offset", "Used", "Total", "HVA"
        );
        for block in &inner.blocks {
            let _ = writeln!(
                text,
                "{:>24} {:>9} {:#018x} {:#018x} {:#018x} {:#018x}",
                block.name(),
                short_size(block.page_size_bytes()),
                block.ram_offset(),
                block.size_bytes(),
                block.max_size_bytes(),
                block.host().as_ptr() as u64,
            );
        }
        text
    }

    /// Adds a notifier, and shows it the blocks that exist.
    pub fn add_notifier(&self, mut notifier: Box<dyn RamNotifier>) -> NotifierId {
        let mut inner = self.shared.lock();
        for block in &inner.blocks {
            notifier.added(block.host(), block.size_bytes(), block.max_size_bytes());
        }
        inner.next_notifier += 1;
        let id = NotifierId(inner.next_notifier);
        inner.notifiers.push((id, notifier));
        id
    }

    /// Removes a notifier; it hears nothing more.
    pub fn remove_notifier(&self, id: NotifierId) {
        self.shared
            .lock()
            .notifiers
            .retain(|(other, _)| *other != id);
    }
}

impl ListShared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Forgets a drained block and gives its memory back. May block.
    pub(crate) fn destroy(&self, block: &Arc<RamBlock>) -> Result<(), Error> {
        {
            let mut inner = self.lock();
            if let Some(at) = inner
                .blocks
                .iter()
                .position(|other| Arc::ptr_eq(other, block))
            {
                inner.blocks.remove(at);
                inner.recent = 0;
                self.version.fetch_add(1, Ordering::Release);
                for (_, notifier) in &mut inner.notifiers {
                    notifier.removed(block.host(), block.size_bytes(), block.max_size_bytes());
                }
            }
        }
        block.destroy()?;
        block.grace().hub().free_slot(block.slot());
        Ok(())
    }
}

/// The lowest offset at which `bytes` fit between the `taken` ranges.
fn lowest_gap(mut taken: Vec<(u64, u64)>, bytes: u64) -> u64 {
    taken.sort_unstable();
    let mut candidate = 0u64;
    for (start, end) in taken {
        if start >= candidate && start - candidate >= bytes {
            break;
        }
        candidate = candidate.max(end).next_multiple_of(OFFSET_ALIGN);
    }
    candidate
}

fn short_size(bytes: u64) -> String {
    match bytes {
        b if b >= 1 << 30 => format!("{} GiB", b >> 30),
        b if b >= 1 << 20 => format!("{} MiB", b >> 20),
        b => format!("{} KiB", b >> 10),
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_found_lowest_first() {
        let a = OFFSET_ALIGN;
        assert_eq!(lowest_gap(vec![], 10), 0);
        assert_eq!(lowest_gap(vec![(0, a)], 10), a);
        assert_eq!(lowest_gap(vec![(4 * a, 5 * a), (0, a)], 3 * a), a);
        assert_eq!(lowest_gap(vec![(4 * a, 5 * a), (0, a)], 4 * a), 5 * a);
        assert_eq!(lowest_gap(vec![(2 * a, 3 * a)], 2 * a), 0);
    }
}
