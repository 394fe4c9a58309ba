// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which blocks are logged for whom, as those who write find it.
//!
//! A block is known by its pin slot. What a writer needs is two tables indexed by slot: a mask of
//! clients, one byte, and the bitmaps. Everything else is behind a lock that writers never take.

use std::collections::BTreeMap;
use std::hint::cold_path;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use ebbtide_models::seeded;

use super::bitmap::{Bitmap, mark_page, mark_pages};
use super::{CLIENTS, DirtyClient, PAGE_BYTES, PAGE_SHIFT};
use crate::Error;
use crate::ram::fence::Fence;
use crate::reader::barrier::{Barrier, light};
use crate::reader::counters::{Lane, PerSlot, Zero};
use crate::sync::{AtomicPtr, AtomicU8, AtomicU64, Mutex, fence, lock};

/// In a mask: writers need a real fence before they ask for clients.
const FENCED: u8 = 1 << 7;

/// The bitmaps of a slot, as `Bitmap::word_zero`.
#[derive(Default)]
struct Bitmaps {
    /// That of the only client, if one client is on and no fence is needed, else null.
    only: AtomicPtr<AtomicU64>,
    /// By client; null before its first start.
    by_client: [AtomicPtr<AtomicU64>; CLIENTS],
}
// SAFETY: all zeroes are null pointers.
unsafe impl Zero for Bitmaps {}

/// The dirty log of all blocks of one memory.
///
/// A bitmap that a writer can find is freed only by `remove`, when the block has drained, and by
/// `clear`, when the memory has no pins and no readers: writers are inside a section that shows
/// the block, or hold a pin on it.
pub(crate) struct Table {
    state: Mutex<State>,
    masks: PerSlot<AtomicU8>,
    bitmaps: PerSlot<Bitmaps>,
}

struct State {
    barrier: Barrier,
    /// Clients that want all blocks, those that are yet to come included.
    everywhere: u8,
    blocks: BTreeMap<u32, Logged>,
}

/// Names a block: its slot, and the host address of its first byte, as slots are used again.
pub(crate) type Key = (u32, u64);

/// What the log needs to know of a block.
pub(crate) struct BlockInfo {
    /// For messages.
    pub(crate) name: String,
    /// Host address of its first byte; tells it from others that had the slot.
    pub(crate) host: u64,
    /// Bytes it may grow to, at least 1.
    pub(crate) max_bytes: u64,
    /// Bytes in use.
    pub(crate) used_bytes: u64,
    /// What of it is plugged, and the block size in bytes.
    pub(crate) sparse: Option<(Arc<Fence>, u64)>,
}

struct Logged {
    info: BlockInfo,
    /// Clients that want this block.
    own: u8,
    maps: [Option<Arc<Bitmap>>; CLIENTS],
}

impl Table {
    /// Sets up the table at `at`.
    ///
    /// # Safety
    /// As for [`PerSlot::set_up`].
    pub(crate) unsafe fn set_up(at: *mut Table, barrier: Barrier) {
        let state = State {
            barrier,
            everywhere: 0,
            blocks: BTreeMap::new(),
        };
        // SAFETY: as for this function.
        unsafe {
            (&raw mut (*at).state).write(Mutex::new(state));
            PerSlot::set_up(&raw mut (*at).masks);
            PerSlot::set_up(&raw mut (*at).bitmaps);
        }
    }

    /// Serves another memory, which orders its readers by `barrier`.
    #[cfg(not(loom))]
    pub(crate) fn begin(&self, barrier: Barrier) {
        lock(&self.state).barrier = barrier;
    }

    /// Forgets all blocks; the memory is gone, with its readers and pins.
    pub(crate) fn clear(&self) {
        let mut state = lock(&self.state);
        state.everywhere = 0;
        for (slot, _) in std::mem::take(&mut state.blocks) {
            self.unpublish(slot);
        }
    }

    // --- writers ----------------------------------------------------------------------------

    /// Marks what was written: `len` bytes at host address `host` of the block of `slot`. Call
    /// after the bytes are written.
    ///
    /// # Safety
    /// The bytes are the block's. The caller is in a section whose view shows the block, or holds
    /// a pin on it.
    #[inline(always)]
    pub(crate) unsafe fn mark(&self, slot: u32, host: u64, len: u64) {
        light(false);
        let mask = self.masks.at(slot).load(Relaxed);
        if mask != 0 {
            // SAFETY: as for this function.
            unsafe { self.mark_logged(mask, slot, host, len) };
        }
    }

    /// As [`Table::mark`], by a lane of the slot; fast where the block is logged for one client and one
    /// page is written.
    ///
    /// # Safety
    /// As for [`Table::mark`], and `len` is not 0.
    #[inline(always)]
    pub(crate) unsafe fn mark_expected(&self, lane: Lane, host: u64, len: u64) {
        light(false);
        let word_zero = self.bitmaps.of(lane).only.load(Acquire);
        let across = (host & (PAGE_BYTES - 1)) + len > PAGE_BYTES;
        if word_zero.is_null() || across {
            cold_path();
            // SAFETY: as for this function.
            return unsafe { self.mark(lane.slot(), host, len) };
        }
        // SAFETY: as in `mark_logged`.
        unsafe { mark_page(word_zero, host >> PAGE_SHIFT) };
    }

    /// Out of line: whoever writes should not lose registers to it.
    ///
    /// # Safety
    /// As for [`Table::mark`].
    #[cold]
    #[inline(never)]
    unsafe fn mark_logged(&self, mask: u8, slot: u32, host: u64, len: u64) {
        let mut clients = mask;
        if mask & FENCED != 0 {
            light(true);
            clients = self.masks.at(slot).load(Relaxed) & !FENCED;
        }
        if len == 0 {
            return;
        }
        // Pairs with the release of the mask: the bitmaps of its clients are seen.
        fence(Acquire);
        let (first, last) = (host >> PAGE_SHIFT, (host + (len - 1)) >> PAGE_SHIFT);
        while clients != 0 {
            let client = clients.trailing_zeros() as usize % CLIENTS;
            clients &= clients - 1;
            let word_zero = self.bitmaps.at(slot).by_client[client].load(Relaxed);
            #[cfg(loom)]
            assert!(!word_zero.is_null(), "a client is on before its bitmap");
            // SAFETY: the bitmap was published before its client's bit, has all pages of the
            // block, and stays until the block has drained, which waits for the caller.
            unsafe {
                if first == last {
                    mark_page(word_zero, first);
                } else {
                    mark_pages(word_zero, first, last);
                }
            }
        }
    }

    // --- blocks -----------------------------------------------------------------------------

    /// Takes a new block in, with the bitmaps of the clients that want all blocks: all of it is
    /// dirty to them. Nobody else knows the block yet.
    pub(crate) fn add(&self, slot: u32, info: BlockInfo) -> Result<(), Error> {
        let mut state = lock(&self.state);
        let mut block = Logged {
            info,
            own: 0,
            maps: Default::default(),
        };
        for client in DirtyClient::ALL {
            if state.everywhere & client.bit() != 0 {
                block.map(client)?;
                self.show(slot, &block, client);
            }
        }
        self.publish(&state, slot, 0);
        state.blocks.insert(slot, block);
        Ok(())
    }

    /// Forgets a block that has drained, or that nobody got to know.
    pub(crate) fn remove(&self, (slot, host): Key) {
        let mut state = lock(&self.state);
        if state.block(slot, host).is_some() {
            self.unpublish(slot);
            state.blocks.remove(&slot);
        }
    }

    /// A block uses more of what it may: the rest is dirty.
    pub(crate) fn grown(&self, (slot, host): Key, used_bytes: u64) {
        let mut state = lock(&self.state);
        if let Some(block) = state.blocks.get_mut(&slot).filter(|b| b.info.host == host) {
            let old = std::mem::replace(&mut block.info.used_bytes, used_bytes);
            state.set(slot, old..used_bytes);
        }
    }

    /// Makes the pages that `range` (bytes) touches dirty to all clients that are on.
    pub(crate) fn set(&self, (slot, host): Key, range: Range<u64>) {
        let state = lock(&self.state);
        if state.block(slot, host).is_some() {
            state.set(slot, range);
        }
    }

    /// As [`Table::set`], for the pages whose bits are set in `bits`; the first bit is that of
    /// page `first`.
    pub(crate) fn merge(&self, (slot, host): Key, first: u64, bits: &[u64]) {
        let state = lock(&self.state);
        let clients = state.clients(slot);
        if let Some(block) = state.block(slot, host) {
            block.each(clients, |map| map.merge(first, bits));
        }
    }

    /// Whether any client wants the block.
    pub(crate) fn is_logged(&self, (slot, host): Key) -> bool {
        let state = lock(&self.state);
        state.block(slot, host).is_some() && state.clients(slot) != 0
    }

    /// Whether any client wants any block, or those that are yet to come.
    pub(crate) fn has_clients(&self) -> bool {
        let state = lock(&self.state);
        state.everywhere != 0 || state.blocks.values().any(|block| block.own != 0)
    }

    /// The bitmap of a client that is on.
    pub(super) fn bitmap(&self, (slot, host): Key, client: DirtyClient) -> Option<Arc<Bitmap>> {
        let state = lock(&self.state);
        let block = state.block(slot, host)?;
        let on = state.clients(slot) & client.bit() != 0;
        block.maps[client as usize].clone().filter(|_| on)
    }

    /// Between a harvest and the reading of the pages.
    pub(super) fn settle(&self) {
        if !seeded!("no_harvest_barrier") {
            let barrier = lock(&self.state).barrier;
            barrier.heavy();
        }
    }

    // --- clients ----------------------------------------------------------------------------

    /// Starts a client, for one block or for all. All RAM it gets to see is dirty. Returns the
    /// slots that no client wanted before, ascending.
    pub(crate) fn start(&self, client: DirtyClient, only: Option<Key>) -> Result<Vec<u32>, Error> {
        let mut state = lock(&self.state);
        let slots = state.slots(only);
        for slot in &slots {
            if let Some(block) = state.blocks.get_mut(slot) {
                block.map(client)?;
            }
        }
        let old: Vec<u8> = slots.iter().map(|slot| state.clients(*slot)).collect();
        if only.is_none() {
            state.everywhere |= client.bit();
        }
        for slot in &slots {
            let Some(block) = state.blocks.get_mut(slot) else {
                continue;
            };
            if only.is_some() {
                block.own |= client.bit();
            }
            let own = block.own;
            if seeded!("client_before_bitmap") {
                self.publish(&state, *slot, own);
            }
            if let Some(block) = state.blocks.get(slot) {
                self.show(*slot, block, client);
            }
            self.publish(&state, *slot, own);
        }
        // Whoever wrote and did not see the client is seen by what the client reads after its first
        // harvest: all is dirty, so that one has a barrier.
        let fresh = slots.into_iter().zip(old).filter(|(_, old)| *old == 0);
        Ok(fresh.map(|(slot, _)| slot).collect())
    }

    /// Stops a client that was started for one block, or for all. Returns the slots that no
    /// client wants any more, ascending.
    pub(crate) fn stop(&self, client: DirtyClient, only: Option<Key>) -> Vec<u32> {
        let mut state = lock(&self.state);
        let slots = state.slots(only);
        let old: Vec<u8> = slots.iter().map(|slot| state.clients(*slot)).collect();
        if only.is_none() {
            state.everywhere &= !client.bit();
        }
        let mut idle = Vec::new();
        for (slot, old) in slots.into_iter().zip(old) {
            let Some(block) = state.blocks.get_mut(&slot) else {
                continue;
            };
            if only.is_some() {
                block.own &= !client.bit();
            }
            let own = block.own;
            let clients = self.publish(&state, slot, own);
            if old & client.bit() != 0 && clients & client.bit() == 0 {
                if let Some(map) = state
                    .blocks
                    .get(&slot)
                    .and_then(|b| b.maps[client as usize].as_ref())
                {
                    map.forget();
                }
                if clients == 0 {
                    idle.push(slot);
                }
            }
        }
        idle
    }

    /// Makes a block's bitmap findable, with everything in it dirty. Before the client's bit.
    fn show(&self, slot: u32, block: &Logged, client: DirtyClient) {
        if let Some(map) = &block.maps[client as usize] {
            block.info.each_used(|pages| map.set(pages));
            let word_zero = map.word_zero(block.info.host);
            let shown = &self.bitmaps.at(slot).by_client[client as usize];
            shown.store(word_zero, Release);
        }
    }

    /// Lets writers know who wants the block of `slot`, which `own` want alone, and says so.
    fn publish(&self, state: &State, slot: u32, own: u8) -> u8 {
        let clients = own | state.everywhere;
        let bitmaps = self.bitmaps.at(slot);
        let (mask, only) = match (state.barrier, clients.count_ones()) {
            (Barrier::Fence, _) => (clients | FENCED, std::ptr::null_mut()),
            (Barrier::Membarrier, 1) => {
                let client = clients.trailing_zeros() as usize % CLIENTS;
                (clients, bitmaps.by_client[client].load(Relaxed))
            }
            (Barrier::Membarrier, _) => (clients, std::ptr::null_mut()),
        };
        bitmaps.only.store(only, Release);
        self.masks.at(slot).store(mask, Release);
        clients
    }

    fn unpublish(&self, slot: u32) {
        self.masks.at(slot).store(0, Release);
        let bitmaps = self.bitmaps.at(slot);
        for bitmap in bitmaps.by_client.iter().chain([&bitmaps.only]) {
            bitmap.store(std::ptr::null_mut(), Release);
        }
    }
}

impl State {
    fn block(&self, slot: u32, host: u64) -> Option<&Logged> {
        self.blocks.get(&slot).filter(|b| b.info.host == host)
    }

    /// The slot of one block, if it is still there, or of all.
    fn slots(&self, only: Option<Key>) -> Vec<u32> {
        match only {
            Some((slot, host)) => self.block(slot, host).map(|_| slot).into_iter().collect(),
            None => self.blocks.keys().copied().collect(),
        }
    }

    /// The clients that want the block of `slot`.
    fn clients(&self, slot: u32) -> u8 {
        self.blocks
            .get(&slot)
            .map_or(0, |block| block.own | self.everywhere)
    }

    fn set(&self, slot: u32, range: Range<u64>) {
        let pages = range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES);
        if let Some(block) = self.blocks.get(&slot) {
            block.each(self.clients(slot), |map| map.set(pages.clone()));
        }
    }
}

impl Logged {
    /// Has the bitmap of a client made.
    fn map(&mut self, client: DirtyClient) -> Result<(), Error> {
        let map = &mut self.maps[client as usize];
        if map.is_none() {
            let pages = self.info.max_bytes.div_ceil(PAGE_BYTES);
            let made = Bitmap::new(pages).map_err(|source| Error::DirtyBitmap {
                block: self.info.name.clone(),
                pages,
                source,
            })?;
            *map = Some(Arc::new(made));
        }
        Ok(())
    }

    fn each(&self, clients: u8, f: impl Fn(&Bitmap)) {
        for client in DirtyClient::ALL {
            if let (true, Some(map)) = (clients & client.bit() != 0, &self.maps[client as usize]) {
                f(map);
            }
        }
    }
}

impl BlockInfo {
    /// Calls `f` with the pages in use, or plugged.
    fn each_used(&self, f: impl Fn(Range<u64>)) {
        let Some((fence, block_bytes)) = &self.sparse else {
            return f(0..self.used_bytes.div_ceil(PAGE_BYTES));
        };
        for block in 0..self.max_bytes / block_bytes {
            if fence.map().count(block..block + 1) != 0 {
                let pages = |at: u64| (at * block_bytes).div_ceil(PAGE_BYTES);
                f(pages(block)..pages(block + 1));
            }
        }
    }
}

/// Where what is written through a slice of guest memory is marked.
#[derive(Clone, Copy)]
pub(crate) struct SlotLog {
    table: &'static Table,
    slot: u32,
}

impl SlotLog {
    #[inline(always)]
    pub(crate) fn new(table: &'static Table, slot: u32) -> SlotLog {
        SlotLog { table, slot }
    }

    /// See [`Table::mark`].
    ///
    /// # Safety
    /// As for [`Table::mark`].
    #[inline(always)]
    pub(crate) unsafe fn mark(&self, host: *const u8, len: usize) {
        // SAFETY: as for this function.
        unsafe { self.table.mark(self.slot, host as u64, len as u64) };
    }
}
