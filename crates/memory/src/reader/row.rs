// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A thread's row: its read section, and the pins taken from it.
//!
//! Rows are never freed, only used again (README, I6): the last thing an unpin does, after it
//! has let go, is to look at its row.

use std::ptr;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::barrier::light;
use super::hub::Hub;
use crate::sync::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Mutex};

/// Slots of pin counters per chunk, and chunks per row.
#[cfg(not(loom))]
pub(crate) const CHUNK_SLOTS: usize = 256;
#[cfg(not(loom))]
pub(crate) const CHUNKS: usize = 256;
#[cfg(loom)]
pub(crate) const CHUNK_SLOTS: usize = 2;
#[cfg(loom)]
pub(crate) const CHUNKS: usize = 1;

/// The worker waits for this row's read section to end.
pub(crate) const WATCH_SECTION: u32 = 1;
/// The worker waits for pins; which ones is in `Chunk::armed`.
pub(crate) const WATCH_PINS: u32 = 2;

/// Two lines apart: the adjacent-line prefetcher makes pairs of lines travel together.
#[repr(align(128))]
pub(crate) struct Line<T>(pub(crate) T);

/// A row. Fields on the first line are written by the owning thread all the time; the rest is
/// written rarely and read by all.
#[repr(C)]
pub(crate) struct Row {
    own: Line<Own>,
    shared: Line<Shared>,
}

struct Own {
    /// 0 outside read sections, else the grace number the section began under.
    section: AtomicU64,
    /// How many read guards are nested. Only the owner touches it.
    depth: AtomicU64,
}

struct Shared {
    watch: AtomicU32,
    fenced: AtomicBool,
    /// Token of the owning thread; 0 when the row is free to be adopted.
    owner: AtomicU64,
    /// Readers of the owning thread that share the row. Changed under the registry's lock.
    handles: AtomicU32,
    hub: AtomicPtr<Hub>,
    /// Names the owner in reports; only ever changed under the registry's lock.
    name: Mutex<String>,
    chunks: [AtomicPtr<Chunk>; CHUNKS],
}

/// Pin counters of `CHUNK_SLOTS` slots.
pub(crate) struct Chunk {
    home: [Home; CHUNK_SLOTS],
    away: [Line<Away>; CHUNK_SLOTS],
    armed: [AtomicBool; CHUNK_SLOTS],
}

/// Pins taken and let go by the owning thread, per bank: plain stores. A slot's counters share
/// one line of 32 bytes with nothing another thread writes.
#[repr(align(32))]
struct Home {
    acquired: [AtomicU64; 2],
    released: [AtomicU64; 2],
}

/// Pins of this row cloned or let go by other threads, per bank: atomic additions.
struct Away {
    acquired: [AtomicU64; 2],
    released: [AtomicU64; 2],
}

fn pair() -> [AtomicU64; 2] {
    [AtomicU64::new(0), AtomicU64::new(0)]
}

impl Chunk {
    fn new() -> Box<Chunk> {
        Box::new(Chunk {
            home: std::array::from_fn(|_| Home {
                acquired: pair(),
                released: pair(),
            }),
            away: std::array::from_fn(|_| {
                Line(Away {
                    acquired: pair(),
                    released: pair(),
                })
            }),
            armed: std::array::from_fn(|_| AtomicBool::new(false)),
        })
    }
}

#[cfg(not(loom))]
thread_local! {
    /// Names this thread among all of the process; 0 until it first registers a reader.
    static TOKEN: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}
#[cfg(loom)]
loom::thread_local! {
    static TOKEN: std::cell::Cell<u64> = std::cell::Cell::new(0);
}

/// This thread's token, or 0 if it has never registered.
#[inline(always)]
pub(crate) fn token() -> u64 {
    TOKEN.try_with(std::cell::Cell::get).unwrap_or(0)
}

/// This thread's token, made at the first call.
pub(crate) fn make_token() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    let current = token();
    if current != 0 {
        return current;
    }
    let fresh = NEXT.fetch_add(1, Relaxed);
    TOKEN.with(|token| token.set(fresh));
    fresh
}

impl Row {
    pub(super) fn new() -> Box<Row> {
        Box::new(Row {
            own: Line(Own {
                section: AtomicU64::new(0),
                depth: AtomicU64::new(0),
            }),
            shared: Line(Shared {
                watch: AtomicU32::new(0),
                fenced: AtomicBool::new(false),
                owner: AtomicU64::new(0),
                handles: AtomicU32::new(0),
                hub: AtomicPtr::new(ptr::null_mut()),
                name: Mutex::new(String::new()),
                chunks: std::array::from_fn(|_| AtomicPtr::new(ptr::null_mut())),
            }),
        })
    }

    // --- the owner's side -------------------------------------------------------------------

    /// Opens a read section, or nests in the open one. Only the owner calls this.
    #[inline(always)]
    pub(crate) fn enter(&self, hub: &Hub) {
        let own = &self.own.0;
        let depth = own.depth.load(Relaxed);
        if depth == 0 {
            // Constants, not increments: the stores of one section must not wait for the loads
            // of the one before.
            own.depth.store(1, Relaxed);
            own.section.store(hub.grace_number(), Relaxed);
            #[cfg(not(seeded = "no_reader_fence"))]
            self.light();
        } else {
            own.depth.store(depth + 1, Relaxed);
        }
    }

    /// Closes the innermost read section. Only the owner calls this.
    #[inline(always)]
    pub(crate) fn leave(&self) {
        let own = &self.own.0;
        let depth = own.depth.load(Relaxed);
        if depth == 1 {
            own.depth.store(0, Relaxed);
            own.section.store(0, Release);
            #[cfg(not(seeded = "no_leave_fence"))]
            self.light();
            if self.shared.0.watch.load(Relaxed) & WATCH_SECTION != 0 {
                self.section_ended();
            }
        } else {
            own.depth.store(depth - 1, Relaxed);
        }
    }

    #[cold]
    fn section_ended(&self) {
        self.shared.0.watch.fetch_and(!WATCH_SECTION, Relaxed);
        self.hub().wake().signal();
    }

    /// How deep the owner's read sections are nested.
    pub(crate) fn depth(&self) -> u64 {
        self.own.0.depth.load(Relaxed)
    }

    // --- pins -------------------------------------------------------------------------------

    /// Whether the calling thread owns the row.
    #[inline(always)]
    fn is_home(&self) -> bool {
        let token = token();
        token != 0 && self.shared.0.owner.load(Relaxed) == token
    }

    /// Counts a pin taken inside a read section of the owner.
    #[inline(always)]
    pub(crate) fn acquire_home(&self, slot: u32, bank: usize) {
        let (chunk, at) = self.chunk(slot);
        let count = &chunk.home[at].acquired[bank & 1];
        count.store(count.load(Relaxed).wrapping_add(1), Relaxed);
    }

    /// Counts a further pin made from one that is held; on any thread.
    pub(crate) fn acquire_clone(&self, slot: u32, bank: usize) {
        if self.is_home() {
            self.acquire_home(slot, bank);
        } else {
            let (chunk, at) = self.chunk(slot);
            chunk.away[at].0.acquired[bank & 1].fetch_add(1, Relaxed);
        }
    }

    /// Lets a pin go; on any thread.
    #[inline(always)]
    pub(crate) fn release(&self, slot: u32, bank: usize) {
        let (chunk, at) = self.chunk(slot);
        if self.is_home() {
            let count = &chunk.home[at].released[bank & 1];
            count.store(count.load(Relaxed).wrapping_add(1), Release);
        } else {
            chunk.away[at].0.released[bank & 1].fetch_add(1, Release);
        }
        #[cfg(not(seeded = "no_unpin_fence"))]
        self.light();
        if self.shared.0.watch.load(Relaxed) & WATCH_PINS != 0 {
            self.pin_released(slot);
        }
    }

    #[cold]
    fn pin_released(&self, slot: u32) {
        // The pin is gone and with it perhaps the `Memory`; row, chunk and hub are still there
        // (I6). Should they serve another memory by now, that one's worker wakes for nothing.
        let (chunk, at) = self.chunk(slot);
        if chunk.armed[at].load(Relaxed) {
            self.hub().wake().signal();
        }
    }

    // --- the worker's side ------------------------------------------------------------------

    /// Whether the row is in a section that began before grace number `target`.
    pub(super) fn is_before(&self, target: u64) -> bool {
        let section = self.own.0.section.load(Acquire);
        section != 0 && section < target
    }

    /// Makes the end of the current section wake the worker. Returns whether it did not already.
    pub(super) fn watch_section(&self) -> bool {
        let watch = &self.shared.0.watch;
        if watch.load(Relaxed) & WATCH_SECTION != 0 {
            return false;
        }
        watch.fetch_or(WATCH_SECTION, Relaxed);
        true
    }

    /// Makes the release of pins of `slot` wake the worker, or no longer so. `any` is whether
    /// any slot is waited for.
    pub(super) fn watch_pins(&self, slot: u32, armed: bool, any: bool) {
        let (chunk, at) = self.chunk(slot);
        chunk.armed[at].store(armed, Relaxed);
        if any {
            self.shared.0.watch.fetch_or(WATCH_PINS, Relaxed);
        } else {
            self.shared.0.watch.fetch_and(!WATCH_PINS, Relaxed);
        }
    }

    /// Pins let go so far, of one bank.
    pub(super) fn released(&self, slot: u32, bank: usize) -> u64 {
        let (chunk, at) = self.chunk(slot);
        let home = chunk.home[at].released[bank & 1].load(Acquire);
        home.wrapping_add(chunk.away[at].0.released[bank & 1].load(Acquire))
    }

    /// Pins taken so far, of one bank.
    pub(super) fn acquired(&self, slot: u32, bank: usize) -> u64 {
        let (chunk, at) = self.chunk(slot);
        let home = chunk.home[at].acquired[bank & 1].load(Acquire);
        home.wrapping_add(chunk.away[at].0.acquired[bank & 1].load(Acquire))
    }

    // --- the registry's side (under its lock) -----------------------------------------------

    pub(super) fn owner(&self) -> u64 {
        self.shared.0.owner.load(Relaxed)
    }

    pub(super) fn handles(&self) -> u32 {
        self.shared.0.handles.load(Relaxed)
    }

    pub(super) fn set_handles(&self, handles: u32) {
        self.shared.0.handles.store(handles, Relaxed);
    }

    pub(super) fn set_owner(&self, token: u64, name: &str) {
        if token != 0 {
            name.clone_into(&mut crate::sync::lock(&self.shared.0.name));
        }
        self.shared.0.owner.store(token, Relaxed);
    }

    pub(super) fn name(&self) -> String {
        crate::sync::lock(&self.shared.0.name).clone()
    }

    /// Makes the row serve `hub`, with counters for `chunks` chunks, all zero.
    pub(super) fn attach(&self, hub: &'static Hub, fenced: bool, chunks: usize) {
        self.shared.0.fenced.store(fenced, Relaxed);
        self.shared.0.watch.store(0, Relaxed);
        self.shared
            .0
            .hub
            .store(ptr::from_ref(hub).cast_mut(), Release);
        for chunk in &self.shared.0.chunks {
            let chunk = chunk.load(Acquire);
            if !chunk.is_null() {
                // SAFETY: a chunk once stored is never freed (I6).
                unsafe { &*chunk }.clear();
            }
        }
        self.grow(chunks);
    }

    /// Makes sure the first `chunks` chunks exist.
    pub(super) fn grow(&self, chunks: usize) {
        for place in self.shared.0.chunks.iter().take(chunks) {
            if place.load(Relaxed).is_null() {
                place.store(Box::into_raw(Chunk::new()), Release);
            }
        }
    }

    /// Frees the row; only the models do, which know that all threads have ended.
    #[cfg(loom)]
    pub(super) fn free(row: &'static Row) {
        let row = ptr::from_ref(row).cast_mut();
        // SAFETY: made by `Box::leak`; the model has joined every thread that knew it.
        let row = unsafe { Box::from_raw(row) };
        for chunk in &row.shared.0.chunks {
            let chunk = chunk.load(Relaxed);
            if !chunk.is_null() {
                // SAFETY: made by `Box::into_raw` in `grow`, and gone with the row.
                drop(unsafe { Box::from_raw(chunk) });
            }
        }
    }

    #[inline(always)]
    fn light(&self) {
        light(self.shared.0.fenced.load(Relaxed));
    }

    #[inline(always)]
    fn chunk(&self, slot: u32) -> (&Chunk, usize) {
        let slot = slot as usize;
        let chunk = self.shared.0.chunks[(slot / CHUNK_SLOTS) % CHUNKS].load(Relaxed);
        // SAFETY: the registry made the chunk before it handed out the slot, in every row (I5);
        // whoever knows the slot learnt of it after that. Chunks are never freed (I6).
        (unsafe { &*chunk }, slot % CHUNK_SLOTS)
    }

    fn hub(&self) -> &'static Hub {
        // SAFETY: set by `attach` before anyone could know the row; hubs are never freed (I6).
        unsafe { &*self.shared.0.hub.load(Acquire) }
    }
}

impl Chunk {
    fn clear(&self) {
        let banks = |counts: &[AtomicU64; 2]| counts.iter().for_each(|c| c.store(0, Relaxed));
        for (home, away) in self.home.iter().zip(&self.away) {
            banks(&home.acquired);
            banks(&home.released);
            banks(&away.0.acquired);
            banks(&away.0.released);
        }
        for armed in &self.armed {
            armed.store(false, Relaxed);
        }
    }
}
