// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The list of RAM blocks.
//!
//! ```text
//!   add ─► make the block ─┐                        ┌─► readers, in a section or by a snapshot
//!   grow ─► map more ──────┼─► publish a new ───────┤
//!   destroy ───────────────┘   RamBlocks            └─► notifiers, in order of the changes
//! ```
//!
//! Readers take no lock: they follow the published set inside a read section. Old sets are
//! dropped a grace period later.

use std::ops::Deref;
use std::ptr;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Arc, Mutex, MutexGuard};

use ebbtide_models::seeded;

use super::arena::Arena;
use super::{NotifierId, RamBlock, RamBlocks, RamNotifier, RamPolicy, RamSpec};
use crate::grace::{Grace, Job};
use crate::reader::counters::MAX_SLOTS;
use crate::reader::published::Published;
use crate::sweeper::Sweeper;
use crate::{DiscardRules, Error, Reader};

/// Alignment of RAM offsets: the bits of two blocks never share a word of a dirty bitmap.
const OFFSET_ALIGN: u64 = 64 * 4096;

/// The RAM blocks of one memory.
pub struct RamList {
    shared: Arc<ListShared>,
    arena: Arc<Arena>,
}

/// What tickets share with the list.
pub(crate) struct ListShared {
    grace: Arc<Grace>,
    sweeper: Arc<Sweeper>,
    /// For readers inside sections.
    published: Published<Arc<RamBlocks>>,
    /// The same for everybody else. Held to copy or replace the pointer, never longer.
    current: Mutex<Arc<RamBlocks>>,
    version: AtomicU64,
    discards: DiscardRules,
    /// Held from before a change is published until all have heard of it.
    notifiers: Mutex<Notifiers>,
    /// Serialises the calls that make and grow blocks, which may take long.
    adding: Mutex<()>,
}

#[derive(Default)]
struct Notifiers {
    list: Vec<(NotifierId, Box<dyn RamNotifier>)>,
    last_id: u64,
}

/// The RAM blocks inside a read section: no lock, no reference count. Drop it before anything that
/// can block.
pub struct RamListGuard<'r> {
    reader: &'r Reader,
    blocks: &'r RamBlocks,
}

impl Deref for RamListGuard<'_> {
    type Target = RamBlocks;

    fn deref(&self) -> &RamBlocks {
        self.blocks
    }
}

impl Drop for RamListGuard<'_> {
    fn drop(&mut self) {
        self.reader.leave();
    }
}

impl RamList {
    pub(crate) fn new(grace: &Arc<Grace>, sweeper: &Arc<Sweeper>, arena: Arc<Arena>) -> RamList {
        let empty = Arc::new(RamBlocks::new(0, Vec::new()));
        let shared = ListShared {
            grace: Arc::clone(grace),
            sweeper: Arc::clone(sweeper),
            published: Published::new(Box::new(Arc::clone(&empty))),
            current: Mutex::new(empty),
            version: AtomicU64::new(0),
            discards: DiscardRules::default(),
            notifiers: Mutex::default(),
            adding: Mutex::new(()),
        };
        RamList {
            shared: Arc::new(shared),
            arena,
        }
    }

    pub(crate) fn shared(&self) -> &Arc<ListShared> {
        &self.shared
    }

    /// As [`RamList::add_with`], with the default policy.
    ///
    /// # Errors
    /// As [`RamList::add_with`].
    pub fn add(&self, spec: RamSpec) -> Result<Arc<RamBlock>, Error> {
        self.add_with(spec, &RamPolicy::default())
    }

    /// Makes a block and tells the notifiers. With `prefault` it takes as long as the host takes
    /// to find and clear the pages.
    ///
    /// # Errors
    /// `DuplicateName`, `BadSpec`, `NoNode`, `NoHostMemory` and `NoHugePages` with the host's
    /// figures, `BackingTooShort`, `BackingUnwritable`, `ArenaFull`, `TooManyBlocks`, `Host`.
    /// Nothing has changed then, and a file that was made is gone.
    pub fn add_with(&self, spec: RamSpec, policy: &RamPolicy) -> Result<Arc<RamBlock>, Error> {
        self.add_as(spec, policy, None)
    }

    /// Makes a block of `spec`, with the policy of `old`, that has its name from it.
    pub(super) fn add_in_place_of(
        &self,
        old: &RamBlock,
        spec: RamSpec,
    ) -> Result<Arc<RamBlock>, Error> {
        self.add_as(spec, old.policy(), Some(old))
    }

    fn add_as(
        &self,
        spec: RamSpec,
        policy: &RamPolicy,
        of: Option<&RamBlock>,
    ) -> Result<Arc<RamBlock>, Error> {
        spec.check(policy)?;
        if let Some(numa) = &policy.numa {
            numa.check(&spec.name)?;
        }
        let _adding = lock(&self.shared.adding);
        let now = self.snapshot();
        let named = now.by_name(&spec.name);
        if named.is_some_and(|named| of.is_none_or(|of| !ptr::eq(&**named, of))) {
            return Err(Error::DuplicateName(spec.name));
        }
        self.arena.check_room(&spec.name, spec.max_size_bytes)?;
        let ram_offset = now.lowest_gap(spec.max_size_bytes, OFFSET_ALIGN);
        let Some(ram_offset) = ram_offset else {
            return spec.refuse("there is no room for it among the RAM offsets".to_owned());
        };
        let grace = &self.shared.grace;
        let slot = grace
            .hub()
            .allocate_slot()
            .ok_or(Error::TooManyBlocks(MAX_SLOTS))?;
        let discards = &self.shared.discards;
        let made = RamBlock::new(
            &spec,
            policy,
            ram_offset,
            (grace, discards),
            &self.arena,
            slot,
        );
        let block = match made {
            Ok(block) => Arc::new(block),
            Err(error) => {
                grace.hub().free_slot(slot);
                return Err(error);
            }
        };
        if let Some(of) = of {
            block.inherit(of);
        }
        self.shared.change(
            |blocks| Some(blocks.with(&block)),
            |notifier| {
                notifier.added(block.host(), block.size_bytes(), block.max_size_bytes());
            },
        );
        Ok(block)
    }

    /// Grows `block` to `new_bytes`, at most its maximum. The regions that show it keep their
    /// size until [`crate::Transaction::set_size`].
    ///
    /// # Errors
    /// `BadResize` when it would shrink or exceed its maximum; `BadSpec` when it is sparse;
    /// `Unplugged`, `Foreign`; `BackingTooShort` when its file was cut short; `NoHostMemory`,
    /// `NoHugePages`, `Host`. Nothing has changed then.
    pub fn grow(&self, block: &Arc<RamBlock>, new_bytes: u64) -> Result<(), Error> {
        let _adding = lock(&self.shared.adding);
        let name = || block.name().to_owned();
        if !Arc::ptr_eq(block.grace(), &self.shared.grace) {
            return Err(Error::Foreign(format!("RAM block {}", block.name())));
        }
        if block.block_size_bytes().is_some() {
            let reason = "a sparse block has a fixed size".to_owned();
            return Err(Error::BadSpec {
                name: name(),
                reason,
            });
        }
        if !block.is_live() {
            return Err(Error::Unplugged(name()));
        }
        let (used, max) = (block.size_bytes(), block.max_size_bytes());
        let page_size_bytes = block.page_size_bytes();
        if new_bytes < used || new_bytes > max || !new_bytes.is_multiple_of(page_size_bytes) {
            return Err(Error::BadResize {
                name: name(),
                bytes: new_bytes,
                used,
                max,
                page_size_bytes,
            });
        }
        if new_bytes == used {
            return Ok(());
        }
        block.make_room(new_bytes)?;
        self.shared.change(
            // With the notifiers locked: one that comes now is told the size before or the size after, and then no resize.
            |blocks| {
                block.set_size(new_bytes);
                Some(blocks.resized())
            },
            |notifier| notifier.resized(block.host(), used, new_bytes),
        );
        Ok(())
    }

    /// The blocks, for as long as a read section lasts. Takes no lock.
    ///
    /// # Panics
    /// When `reader` is registered with another memory.
    pub fn read<'r>(&self, reader: &'r Reader) -> RamListGuard<'r> {
        assert!(
            ptr::eq(reader.hub(), self.shared.grace.hub()),
            "a reader of another memory"
        );
        reader.enter();
        // SAFETY: the section just opened lasts as long as the guard, which borrows the reader.
        let blocks = unsafe { self.shared.published.get() };
        RamListGuard { reader, blocks }
    }

    /// The blocks as they are now, to keep and to walk for as long as it takes.
    pub fn snapshot(&self) -> Arc<RamBlocks> {
        Arc::clone(&lock(&self.shared.current))
    }

    /// Who requires and who disables discarding of RAM.
    pub fn discards(&self) -> &DiscardRules {
        &self.shared.discards
    }

    /// All blocks, largest first.
    pub fn blocks(&self) -> Vec<Arc<RamBlock>> {
        self.snapshot().iter().cloned().collect()
    }

    /// The block of that name.
    pub fn by_name(&self, name: &str) -> Option<Arc<RamBlock>> {
        self.snapshot().by_name(name).cloned()
    }

    /// The block at a host address, and the offset in it in bytes.
    pub fn by_host(&self, host: *const u8) -> Option<(Arc<RamBlock>, u64)> {
        let blocks = self.snapshot();
        let (block, offset) = blocks.by_host(host)?;
        Some((Arc::clone(block), offset))
    }

    /// The block at a RAM offset, and the offset in it in bytes.
    pub fn by_ram_offset(&self, ram_offset: u64) -> Option<(Arc<RamBlock>, u64)> {
        let blocks = self.snapshot();
        let (block, offset) = blocks.by_ram_offset(ram_offset)?;
        Some((Arc::clone(block), offset))
    }

    /// Counts the changes of the list: blocks added, removed, resized.
    pub fn version(&self) -> u64 {
        self.shared.version.load(Acquire)
    }

    /// The blocks as the table of `info ramblock`.
    pub fn dump(&self) -> String {
        self.snapshot().dump()
    }

    /// Adds a notifier, and shows it the blocks that exist.
    pub fn add_notifier(&self, mut notifier: Box<dyn RamNotifier>) -> NotifierId {
        let mut notifiers = lock(&self.shared.notifiers);
        for block in &*self.snapshot() {
            notifier.added(block.host(), block.size_bytes(), block.max_size_bytes());
        }
        notifiers.last_id += 1;
        let id = NotifierId(notifiers.last_id);
        notifiers.list.push((id, notifier));
        id
    }

    /// Removes a notifier; it hears nothing more.
    pub fn remove_notifier(&self, id: NotifierId) {
        let removed = {
            let mut notifiers = lock(&self.shared.notifiers);
            let list = &mut notifiers.list;
            let at = list.iter().position(|(other, _)| *other == id);
            at.map(|at| list.remove(at))
        };
        // Outside the lock: its end may have a say in the list.
        drop(removed);
    }
}

impl ListShared {
    pub(super) fn grace(&self) -> &Arc<Grace> {
        &self.grace
    }

    /// Publishes what `change` makes of the blocks, if anything, and tells the notifiers.
    fn change(
        &self,
        change: impl FnOnce(&RamBlocks) -> Option<RamBlocks>,
        tell: impl Fn(&mut dyn RamNotifier),
    ) {
        let mut notifiers = lock(&self.notifiers);
        let old = {
            let mut current = lock(&self.current);
            let Some(new) = change(&current) else { return };
            *current = Arc::new(new);
            let old = self.published.replace(Box::new(Arc::clone(&current)));
            self.version.store(current.version(), Release);
            old
        };
        let sweeper = Arc::clone(&self.sweeper);
        let retire = move || sweeper.drop_blocks(*old);
        self.grace.submit(Job::Retire(Box::new(retire)));
        for (_, notifier) in &mut notifiers.list {
            tell(&mut **notifier);
        }
    }

    /// Forgets a drained block and gives its memory back. May block.
    pub(crate) fn destroy(&self, block: &Arc<RamBlock>) -> Result<(), Error> {
        block.check_destroyable()?;
        self.change(
            |blocks| blocks.without(block),
            |notifier| notifier.removed(block.host(), block.size_bytes(), block.max_size_bytes()),
        );
        block.destroy()?;
        if !seeded!("slot_at_unpublish") {
            block.give_up_slot();
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}
