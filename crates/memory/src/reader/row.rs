// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A thread's row: its read section, and the pins taken from it.
//!
//! Rows are never freed, only used again (README, I6): the last thing an unpin does, after it
//! has let go, is to look at its row.

use std::ptr;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::barrier::light;
use super::counters::Counters;
use super::hub::Hub;
use crate::sync::{AtomicPtr, AtomicU32, AtomicU64, Mutex};

/// Owner of a free row; no thread's token, nor 0, which threads have that never registered.
pub(super) const NOBODY: u64 = u64::MAX;

/// The worker waits for this row's read section to end.
pub(crate) const WATCH_SECTION: u32 = 1;
/// The worker waits for pins; which ones is in `Counters::armed`.
pub(crate) const WATCH_PINS: u32 = 2;

/// No watch: readers need real fences.
const WATCH_FENCED: u32 = 4;
/// Added to the depth where readers need real fences: the fast path, which asks for 0 and 1, is
/// then never taken.
const FENCED: u64 = 1 << 63;

/// Two lines apart: the adjacent-line prefetcher makes pairs of lines travel together.
#[derive(Default)]
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
    /// How many read guards are nested, plus `FENCED`. Only the owner touches it.
    depth: AtomicU64,
}

struct Shared {
    /// `WATCH_` flags, and `WATCH_FENCED`.
    watch: AtomicU32,
    /// Token of the owning thread, or `NOBODY` when the row is free to be adopted.
    owner: AtomicU64,
    /// Readers of the owning thread that share the row. Changed under the registry's lock.
    handles: AtomicU32,
    hub: AtomicPtr<Hub>,
    /// Names the owner in reports; only ever changed under the registry's lock.
    name: Mutex<String>,
    counters: Counters,
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
                owner: AtomicU64::new(NOBODY),
                handles: AtomicU32::new(0),
                hub: AtomicPtr::new(ptr::null_mut()),
                name: Mutex::new(String::new()),
                counters: Counters::new(),
            }),
        })
    }

    // --- the owner's side -------------------------------------------------------------------

    /// Opens a read section, or nests in the open one. Only the owner calls this.
    #[inline(always)]
    pub(crate) fn enter(&self, hub: &Hub) {
        let own = &self.own.0;
        if own.depth.load(Relaxed) == 0 {
            // Constants, not increments: the stores of one section must not wait for the loads
            // of the one before.
            own.depth.store(1, Relaxed);
            own.section.store(hub.grace_number(), Relaxed);
            #[cfg(not(seeded = "no_reader_fence"))]
            light(false);
        } else {
            self.enter_slowly(hub);
        }
    }

    /// A nested section, or one of a process without `membarrier`.
    #[cold]
    #[inline(never)]
    fn enter_slowly(&self, hub: &Hub) {
        let own = &self.own.0;
        let depth = own.depth.load(Relaxed);
        own.depth.store(depth + 1, Relaxed);
        if depth == FENCED {
            own.section.store(hub.grace_number(), Relaxed);
            light(true);
        }
    }

    /// Closes the innermost read section. Only the owner calls this.
    #[inline(always)]
    pub(crate) fn leave(&self) {
        let own = &self.own.0;
        if own.depth.load(Relaxed) == 1 {
            own.depth.store(0, Relaxed);
            own.section.store(0, Release);
            #[cfg(not(seeded = "no_leave_fence"))]
            light(false);
            if self.shared.0.watch.load(Relaxed) & WATCH_SECTION != 0 {
                self.section_ended();
            }
        } else {
            self.leave_slowly();
        }
    }

    #[cold]
    #[inline(never)]
    fn leave_slowly(&self) {
        let own = &self.own.0;
        let depth = own.depth.load(Relaxed) - 1;
        own.depth.store(depth, Relaxed);
        if depth == FENCED {
            own.section.store(0, Release);
            light(true);
            if self.shared.0.watch.load(Relaxed) & WATCH_SECTION != 0 {
                self.section_ended();
            }
        }
    }

    #[cold]
    fn section_ended(&self) {
        self.shared.0.watch.fetch_and(!WATCH_SECTION, Relaxed);
        self.hub().wake().signal();
    }

    /// How deep the owner's read sections are nested.
    pub(crate) fn depth(&self) -> u64 {
        self.own.0.depth.load(Relaxed) & !FENCED
    }

    // --- pins -------------------------------------------------------------------------------

    /// Whether the calling thread owns the row.
    #[inline(always)]
    fn is_home(&self) -> bool {
        self.shared.0.owner.load(Relaxed) == token()
    }

    /// Counts a pin taken inside a read section of the owner.
    #[inline(always)]
    pub(crate) fn acquire_home(&self, slot: u32, bank: usize) {
        let count = &self.shared.0.counters.home.at(slot).acquired[bank & 1];
        count.store(count.load(Relaxed).wrapping_add(1), Relaxed);
    }

    /// Counts a further pin made from one that is held; on any thread.
    pub(crate) fn acquire_clone(&self, slot: u32, bank: usize) {
        if self.is_home() {
            self.acquire_home(slot, bank);
        } else {
            self.shared.0.counters.away.at(slot).0.acquired[bank & 1].fetch_add(1, Relaxed);
        }
    }

    /// Lets a pin go; on any thread.
    #[inline(always)]
    pub(crate) fn release(&self, slot: u32, bank: usize) {
        if self.is_home() {
            let count = &self.shared.0.counters.home.at(slot).released[bank & 1];
            count.store(count.load(Relaxed).wrapping_add(1), Release);
        } else {
            self.shared.0.counters.away.at(slot).0.released[bank & 1].fetch_add(1, Release);
        }
        #[cfg(not(seeded = "no_unpin_fence"))]
        light(false);
        if self.shared.0.watch.load(Relaxed) & (WATCH_PINS | WATCH_FENCED) != 0 {
            self.pin_released(slot);
        }
    }

    #[cold]
    #[inline(never)]
    fn pin_released(&self, slot: u32) {
        if self.shared.0.watch.load(Relaxed) & WATCH_FENCED != 0 {
            light(true);
        }
        // The pin is gone and with it perhaps the `Memory`; row and hub are still there (I6).
        // Should they serve another memory by now, that one's worker wakes for nothing.
        if self.shared.0.counters.armed.at(slot).load(Relaxed) {
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
        self.shared.0.counters.armed.at(slot).store(armed, Relaxed);
        if any {
            self.shared.0.watch.fetch_or(WATCH_PINS, Relaxed);
        } else {
            self.shared.0.watch.fetch_and(!WATCH_PINS, Relaxed);
        }
    }

    /// Pins let go so far, of one bank.
    pub(super) fn released(&self, slot: u32, bank: usize) -> u64 {
        let counters = &self.shared.0.counters;
        let home = counters.home.at(slot).released[bank & 1].load(Acquire);
        home.wrapping_add(counters.away.at(slot).0.released[bank & 1].load(Acquire))
    }

    /// Pins taken so far, of one bank.
    pub(super) fn acquired(&self, slot: u32, bank: usize) -> u64 {
        let counters = &self.shared.0.counters;
        let home = counters.home.at(slot).acquired[bank & 1].load(Acquire);
        home.wrapping_add(counters.away.at(slot).0.acquired[bank & 1].load(Acquire))
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
        if token != NOBODY {
            name.clone_into(&mut crate::sync::lock(&self.shared.0.name));
        }
        self.shared.0.owner.store(token, Relaxed);
    }

    pub(super) fn name(&self) -> String {
        crate::sync::lock(&self.shared.0.name).clone()
    }

    /// Makes the row serve `hub`, whose memory uses no slots yet but the first `slots`.
    pub(super) fn attach(&self, hub: &'static Hub, fenced: bool) {
        let own = &self.own.0;
        own.depth.store(if fenced { FENCED } else { 0 }, Relaxed);
        let shared = &self.shared.0;
        shared
            .watch
            .store(if fenced { WATCH_FENCED } else { 0 }, Relaxed);
        shared.hub.store(ptr::from_ref(hub).cast_mut(), Release);
    }

    /// Forgets the pins of the first `slots` slots, for the next memory.
    pub(super) fn clear(&self, slots: u32) {
        self.shared.0.counters.clear(slots);
    }

    /// Frees the row; only the models do, which know that all threads have ended.
    #[cfg(loom)]
    pub(super) fn free(row: &'static Row) {
        let row = ptr::from_ref(row).cast_mut();
        // SAFETY: made by `Box::leak`; the model has joined every thread that knew it.
        let row = unsafe { Box::from_raw(row) };
        row.shared.0.counters.free();
    }

    #[inline(always)]
    pub(crate) fn hub(&self) -> &'static Hub {
        // SAFETY: set by `attach` before anyone could know the row; hubs are never freed (I6).
        unsafe { &*self.shared.0.hub.load(Acquire) }
    }
}
