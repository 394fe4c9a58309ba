// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One RAM block.

use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64};
use std::sync::{Arc, Mutex};

use super::arena::Arena;
use super::backing::Mapping;
use super::fence::Fence;
use super::source::Source;
use super::{Plugged, RamPolicy, RamSpec, Seal};
use crate::discard;
use crate::grace::{Grace, Job};
use crate::reader::wake::Level;
use crate::ticket::Holds;
use crate::{DiscardRules, Error};

const LIVE: u8 = 0;
const UNPLUGGED: u8 = 1;
const GONE: u8 = 2;

/// A block of RAM at a fixed place of the arena.
///
/// A *sparse* block is made of equal blocks that are plugged and unplugged one by one. What is
/// not plugged is inaccessible and holds no memory of the host. The bitmap of plugged blocks is
/// the only truth: every pin and every guarded access reads it inside its read section.
pub struct RamBlock {
    /// What it was made from, its name among it.
    spec: RamSpec,
    /// Another block has its name.
    renewed: AtomicBool,
    /// All of it is to be allocated, whenever it was made.
    prefault: AtomicBool,
    ram_offset: u64,
    host: NonNull<u8>,
    size: AtomicU64,
    max_bytes: u64,
    slot: u32,
    life: AtomicU8,
    /// Few blocks are.
    sparse: Option<Box<Sparse>>,
    holds: Arc<Holds>,
    mapping: Mapping,
    grace: Arc<Grace>,
    discards: DiscardRules,
    /// Last: the addresses stay reserved for as long as somebody knows the block.
    _arena: Arc<Arena>,
}

// SAFETY: `host` is an address; it is used through system calls here and through pins and
// sections elsewhere, which have their own rules. Everything else is `Send`.
unsafe impl Send for RamBlock {}
// SAFETY: as above; state is in atomics and locks.
unsafe impl Sync for RamBlock {}

pub(super) struct Sparse {
    block_bytes: u64,
    fence: Arc<Fence>,
    plugged_bytes: AtomicU64,
    pub(super) listeners: discard::Source,
    /// One bit per block that is being plugged or is sealed.
    busy: Mutex<Vec<u64>>,
}

impl RamBlock {
    pub(super) fn new(
        spec: &RamSpec,
        policy: &RamPolicy,
        ram_offset: u64,
        (grace, discards): (&Arc<Grace>, &DiscardRules),
        arena: &Arc<Arena>,
        slot: u32,
    ) -> Result<RamBlock, Error> {
        let source = Source::open(spec)?;
        spec.check_against(&source)?;
        let (host, placed) = arena.place(
            &spec.name,
            spec.max_size_bytes,
            spec.block_size_bytes.unwrap_or(1),
        )?;
        let mapping = match Mapping::new(spec, policy, host, source) {
            Ok(mapping) => mapping,
            Err(error) => {
                // Blocks are made one at a time: there was no other placing since.
                arena.take_back(placed);
                return Err(error);
            }
        };
        let sparse = spec.block_size_bytes.map(|block_bytes| {
            let blocks = spec.max_size_bytes / block_bytes;
            Box::new(Sparse {
                block_bytes,
                fence: Fence::new(
                    grace.hub(),
                    slot,
                    host.as_ptr() as u64 / block_bytes,
                    blocks,
                ),
                plugged_bytes: AtomicU64::new(0),
                listeners: discard::Source::new(block_bytes, blocks),
                busy: Mutex::new(vec![0; blocks.div_ceil(64) as usize]),
            })
        });
        let block = RamBlock {
            spec: spec.clone(),
            renewed: AtomicBool::new(false),
            prefault: AtomicBool::new(spec.prefault),
            ram_offset,
            host,
            size: AtomicU64::new(spec.size_bytes),
            max_bytes: spec.max_size_bytes,
            slot,
            life: AtomicU8::new(LIVE),
            sparse,
            holds: Holds::new(grace.hub()),
            mapping,
            grace: Arc::clone(grace),
            discards: discards.clone(),
            _arena: Arc::clone(arena),
        };
        let sparse = block.sparse.as_ref();
        let entered = block.enter_log(sparse.map(|s| (&s.fence, s.block_bytes)));
        if let Err(error) = entered {
            block.mapping.destroy()?;
            return Err(error);
        }
        Ok(block)
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Where the block starts in the space of RAM offsets, in bytes.
    pub fn ram_offset(&self) -> u64 {
        self.ram_offset
    }

    /// Where the block starts in this process. For system calls that describe memory (KVM slots,
    /// `/proc` look-ups); access to its contents goes through sections and pins.
    pub fn host(&self) -> NonNull<u8> {
        self.host
    }

    /// Bytes in use.
    pub fn size_bytes(&self) -> u64 {
        self.size.load(Acquire)
    }

    /// Bytes it may grow to.
    pub fn max_size_bytes(&self) -> u64 {
        self.max_bytes
    }

    /// Bytes of a page of its backing.
    pub fn page_size_bytes(&self) -> u64 {
        self.mapping.page_size_bytes()
    }

    /// The descriptor behind it, if other processes can map it.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.mapping.fd().map(AsFd::as_fd)
    }

    /// Whether nobody may write to it: a shared file that is only read.
    pub fn is_readonly(&self) -> bool {
        self.mapping.is_readonly()
    }

    /// Whether what is written to it can be seen by others who map the same: a memfd, huge pages, a file that is
    /// shared.
    pub fn is_shared(&self) -> bool {
        self.mapping.is_shared()
    }

    /// Whether it is not on its way out, nor gone.
    pub fn is_live(&self) -> bool {
        self.life.load(Acquire) == LIVE
    }

    /// How the host treats its memory.
    pub fn policy(&self) -> &RamPolicy {
        self.mapping.policy()
    }

    /// Who requires and who disables discarding of RAM.
    pub fn discards(&self) -> &DiscardRules {
        &self.discards
    }

    /// Bytes of the blocks of a sparse block.
    pub fn block_size_bytes(&self) -> Option<u64> {
        self.sparse.as_ref().map(|sparse| sparse.block_bytes)
    }

    /// Whether the blocks that `range` (bytes) touches are plugged. What lies outside the block
    /// is not; a block that is not sparse is.
    pub fn plugged(&self, range: Range<u64>) -> Plugged {
        let size = self.size_bytes();
        let Some(sparse) = &self.sparse else {
            return match (range.start < size, range.end <= size) {
                (true, true) => Plugged::All,
                (true, false) => Plugged::Mixed,
                (false, _) => Plugged::None,
            };
        };
        let first = range.start / sparse.block_bytes;
        let last = range.end.div_ceil(sparse.block_bytes).max(first);
        let inside = (size / sparse.block_bytes).min(last);
        let plugged = sparse.fence.map().count(first.min(inside)..inside);
        match plugged {
            0 => Plugged::None,
            n if n == last - first => Plugged::All,
            _ => Plugged::Mixed,
        }
    }

    /// Bytes plugged; all of a block that is not sparse.
    pub fn plugged_bytes(&self) -> u64 {
        self.sparse.as_ref().map_or_else(
            || self.size_bytes(),
            |sparse| sparse.plugged_bytes.load(Relaxed),
        )
    }

    /// Plugs unplugged blocks: makes `range` (bytes, whole blocks) accessible, all zeroes, and
    /// with `populate` allocates its memory now. All or nothing.
    ///
    /// With `populate` it takes as long as the host takes to find and clear the pages; and as long
    /// as the discard listeners take.
    ///
    /// # Errors
    /// `NotSparse`, `BadRange`; `BadState` when some of it is plugged, sealed or being plugged;
    /// `NoHostMemory`, `NoHugePages` with the host's figures; `PopulateVetoed` by a discard
    /// listener; `Unplugged`; `Host`. Nothing has changed then.
    pub fn plug(&self, range: Range<u64>, populate: bool) -> Result<(), Error> {
        let sparse = self.sparse()?;
        let blocks = self.whole_blocks(sparse, &range)?;
        {
            let mut busy = lock(&sparse.busy);
            if self.life.load(Acquire) != LIVE {
                return Err(Error::Unplugged(self.name().to_owned()));
            }
            if sparse.fence.map().count(blocks.clone()) != 0 {
                return Err(self.bad_state(&range, "is plugged, at least in part"));
            }
            if bits(&busy, blocks.clone()) != 0 {
                return Err(
                    self.bad_state(&range, "is being plugged or unplugged, at least in part")
                );
            }
            set_bits(&mut busy, blocks.clone(), true);
        }
        let result = self.make_accessible(&range, populate);
        let result = result.and_then(|()| self.tell_populate(sparse, &range));
        let mut busy = lock(&sparse.busy);
        if result.is_ok() {
            sparse
                .plugged_bytes
                .fetch_add(range.end - range.start, Relaxed);
            sparse.fence.map().set(blocks.clone());
            // Zeroes are news, too.
            self.mark_dirty(range);
        }
        set_bits(&mut busy, blocks, false);
        result
    }

    fn make_accessible(&self, range: &Range<u64>, populate: bool) -> Result<(), Error> {
        self.mapping.protect(range.clone(), true)?;
        if !populate {
            return Ok(());
        }
        self.mapping
            .populate(range.clone())
            .inspect_err(|_| self.take_plug_back(range))
    }

    fn tell_populate(&self, sparse: &Sparse, range: &Range<u64>) -> Result<(), Error> {
        sparse.listeners.populate(range).map_err(|veto| {
            self.take_plug_back(range);
            self.vetoed(veto)
        })
    }

    fn take_plug_back(&self, range: &Range<u64>) {
        // Inaccessible first, so that no guest can bring pages back after the freeing.
        let undone = self.mapping.protect(range.clone(), false);
        if let Err(error) = undone.and(self.mapping.free_pages(range.clone())) {
            tracing::error!(block = self.name(), %error, "cannot take a failed plug back");
        }
    }

    /// Begins to unplug plugged blocks: `range` (bytes, whole blocks) is unplugged for every pin
    /// and every guarded access from now on. Never waits.
    ///
    /// The seal is drained when all sections and pins that began before are gone. Vcpus are not
    /// fenced: their guest has been told, or is on its own.
    ///
    /// # Errors
    /// `NotSparse`, `BadRange`; `BadState` when some of it is not plugged; `Unplugged` once the block is gone.
    pub fn seal(self: &Arc<Self>, range: Range<u64>) -> Result<Seal, Error> {
        let sparse = self.sparse()?;
        let blocks = self.whole_blocks(sparse, &range)?;
        let level = Level::new(0);
        let submit = {
            let mut busy = lock(&sparse.busy);
            if self.is_gone() {
                return Err(Error::Unplugged(self.name().to_owned()));
            }
            if sparse.fence.map().count(blocks.clone()) != blocks.end - blocks.start {
                return Err(self.bad_state(&range, "is not plugged, at least in part"));
            }
            set_bits(&mut busy, blocks.clone(), true);
            sparse
                .plugged_bytes
                .fetch_sub(range.end - range.start, Relaxed);
            sparse.fence.seal(blocks, Arc::clone(&level))
        };
        if submit {
            self.grace.submit(Job::Fence(Arc::clone(&sparse.fence)));
        }
        Ok(Seal::new(Arc::clone(self), range, level))
    }

    /// Frees the pages of a drained seal, after telling the discard listeners unless they have been
    /// `told`.
    pub(super) fn discard_sealed(&self, range: &Range<u64>, told: &mut bool) -> Result<(), Error> {
        let sparse = self.sparse()?;
        let blocks = self.whole_blocks(sparse, range)?;
        // Inaccessible first, so that no guest can bring pages back after the freeing.
        self.mapping.protect(range.clone(), false)?;
        if !std::mem::replace(told, true) {
            sparse.listeners.discard(range);
        }
        if let Err(error) = self.mapping.free_pages(range.clone()) {
            self.mapping.protect(range.clone(), true)?;
            return Err(error);
        }
        set_bits(&mut lock(&sparse.busy), blocks, false);
        Ok(())
    }

    /// Takes a seal back, of which the discard listeners may have been `told`.
    pub(super) fn unseal(&self, range: &Range<u64>, told: bool) {
        let Some(sparse) = &self.sparse else { return };
        let Ok(blocks) = self.whole_blocks(sparse, range) else {
            return;
        };
        if told {
            sparse.listeners.restore(range);
        }
        let mut busy = lock(&sparse.busy);
        if self.life.load(Acquire) != GONE {
            sparse
                .plugged_bytes
                .fetch_add(range.end - range.start, Relaxed);
            sparse.fence.map().set(blocks.clone());
            // A client that has started meanwhile took it for unplugged.
            self.mark_dirty(range.clone());
        }
        set_bits(&mut busy, blocks, false);
    }

    pub(super) fn sparse(&self) -> Result<&Sparse, Error> {
        self.sparse
            .as_deref()
            .ok_or_else(|| Error::NotSparse(self.name().to_owned()))
    }

    /// The numbers of the blocks that `range` is made of.
    pub(super) fn whole_blocks(
        &self,
        sparse: &Sparse,
        range: &Range<u64>,
    ) -> Result<Range<u64>, Error> {
        let size = sparse.block_bytes;
        let whole = range.start.is_multiple_of(size) && range.end.is_multiple_of(size);
        if !whole || range.start >= range.end || range.end > self.size_bytes() {
            let (start, end) = (range.start, range.end);
            return Err(Error::BadRange {
                name: self.name().to_owned(),
                start,
                end,
                block_size: size,
            });
        }
        Ok(range.start / size..range.end / size)
    }

    fn bad_state(&self, range: &Range<u64>, state: &'static str) -> Error {
        Error::BadState {
            name: self.name().to_owned(),
            start: range.start,
            end: range.end,
            state,
        }
    }

    // --- for the crate ----------------------------------------------------------------------

    pub(crate) fn slot(&self) -> u32 {
        self.slot
    }

    pub(crate) fn holds(&self) -> &Arc<Holds> {
        &self.holds
    }

    pub(crate) fn grace(&self) -> &Arc<Grace> {
        &self.grace
    }

    /// How many pins there are, by the thread that took them: an instant's view while threads take and let go.
    pub fn pin_holders(&self) -> Vec<(String, u64)> {
        let holders = self.grace.hub().holders(self.slot);
        // Of one that is gone they are another's.
        if self.is_gone() { Vec::new() } else { holders }
    }

    /// Whether its slot may be another block's. What was counted before that was asked is its own if not.
    pub(super) fn is_gone(&self) -> bool {
        self.life.load(Acquire) == GONE
    }

    /// It is gone: its slot can serve again.
    pub(super) fn give_up_slot(&self) {
        match &self.sparse {
            Some(sparse) => sparse.fence.give_up_slot(),
            None => self.grace.hub().free_slot(self.slot),
        }
    }

    /// The fence and the shift from offsets to blocks, for the hot path.
    pub(crate) fn fence(&self) -> Option<(&Fence, u32)> {
        self.sparse
            .as_ref()
            .map(|sparse| (&*sparse.fence, sparse.block_bytes.trailing_zeros()))
    }

    /// See [`Hub::bank`](crate::reader::hub::Hub::bank).
    pub(crate) fn bank(&self) -> &'static crate::sync::AtomicU64 {
        self.grace.hub().bank(self.slot)
    }

    /// What it was made from.
    pub(super) fn spec(&self) -> &RamSpec {
        &self.spec
    }

    /// Whether its name is that of the block that has taken its place.
    pub(super) fn is_renewed(&self) -> bool {
        self.renewed.load(Relaxed)
    }

    /// Takes the place of `old`. Under the lock of whoever adds blocks.
    pub(super) fn inherit(&self, old: &RamBlock) {
        self.prefault.store(old.wants_prefault(), Relaxed);
        old.renewed.store(true, Relaxed);
    }

    /// Whether all of it is to be allocated.
    pub(super) fn wants_prefault(&self) -> bool {
        self.prefault.load(Relaxed)
    }

    /// Marks the block as unplugged, or takes that back with the rest of a failed change.
    pub(crate) fn set_unplugged(&self, unplugged: bool) {
        self.life
            .store(if unplugged { UNPLUGGED } else { LIVE }, Release);
    }

    pub(super) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Where in its life it is, in a word.
    pub(super) fn state(&self) -> &'static str {
        match self.life.load(Acquire) {
            LIVE => "live",
            UNPLUGGED => "being unplugged",
            _ => "gone",
        }
    }

    pub(super) fn make_room(&self, new: u64) -> Result<(), Error> {
        self.mapping.grow(self.size_bytes(), new)
    }

    /// From here on the block has the size there was [made room](Self::make_room) for.
    pub(super) fn set_size(&self, new: u64) {
        self.size.store(new, Release);
        self.log_growth();
    }

    /// Whether no range is on its way in or out and nobody listens to its discards.
    pub(super) fn check_destroyable(&self) -> Result<(), Error> {
        self.sparse.as_ref().map_or(Ok(()), |sparse| {
            self.check_idle(sparse, &lock(&sparse.busy))
        })
    }

    fn check_idle(&self, sparse: &Sparse, busy: &[u64]) -> Result<(), Error> {
        let listeners = sparse.listeners.listeners();
        let holders = if !listeners.is_empty() {
            format!("discard listeners: {}", listeners.join(", "))
        } else if busy.iter().any(|word| *word != 0) {
            "a range is sealed or being plugged".to_owned()
        } else {
            return Ok(());
        };
        let what = format!("RAM block {}", self.name());
        Err(Error::NotDrained { what, holders })
    }

    /// Makes the whole block inaccessible for good. Nobody uses it any more.
    pub(super) fn destroy(&self) -> Result<(), Error> {
        if let Some(sparse) = &self.sparse {
            let busy = lock(&sparse.busy);
            self.check_idle(sparse, &busy)?;
            // Until none has come in between.
            while !sparse.listeners.close() {
                self.check_idle(sparse, &busy)?;
            }
            self.life.store(GONE, Release);
        }
        let first = self.life.swap(GONE, AcqRel);
        debug_assert_ne!(first, LIVE, "destroyed without an unplug");
        self.leave_log();
        self.mapping.destroy()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn bits(words: &[u64], blocks: Range<u64>) -> u64 {
    blocks
        .filter(|b| words[(b / 64) as usize] >> (b % 64) & 1 == 1)
        .count() as u64
}

fn set_bits(words: &mut [u64], blocks: Range<u64>, on: bool) {
    for block in blocks {
        let mask = 1 << (block % 64);
        let word = &mut words[(block / 64) as usize];
        *word = if on { *word | mask } else { *word & !mask };
    }
}

impl fmt::Debug for RamBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamBlock")
            .field("name", &self.name())
            .field("host", &self.host)
            .field("size_bytes", &self.size_bytes())
            .finish_non_exhaustive()
    }
}
