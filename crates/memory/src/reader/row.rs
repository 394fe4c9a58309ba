// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A thread's row: its read section, and the pins taken from it.
//!
//! Rows are never freed, only used again (README, M6): the last thing an unpin does, after it
//! has let go, is to look at its row.

use std::hint::cold_path;
use std::ptr;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use ebbtide_models::seeded;

use super::barrier::light;
use super::counters::{Counters, Lane, never_freed};
use super::hub::Hub;
use crate::sync::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Mutex, load_own};

/// Owner of a free row; no thread's token, nor 0, which threads have that never registered.
pub(super) const NOBODY: u64 = u64::MAX;

/// The worker waits for this row's read section to end.
pub(crate) const WATCH_SECTION: u32 = 1;
/// The worker waits for pins; which ones is in `Counters::armed`.
pub(crate) const WATCH_PINS: u32 = 2;

/// No watch: readers need real fences.
const WATCH_FENCED: u32 = 4;
/// No watch: the dirty log may have a client, so that what was written is to be marked.
const LOGGED: u32 = 8;
/// Added to the nesting where readers need real fences, and `AT_REST_FENCED` is what the section
/// is between sections then: the fast paths, which ask for 0, are never taken.
const FENCED: u64 = 1 << 63;
const AT_REST_FENCED: u64 = u64::MAX;

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
    counters: Counters,
}

#[repr(C)]
struct Own {
    /// Other than where any word is that a section or a pin loads of the hub, or of a slot: what is
    /// stored here would hold those loads up, see `hub::Pages`.
    _apart: [u64; 8],
    /// The grace number the section began under; 0 outside, or `AT_REST_FENCED`.
    section: AtomicU64,
    /// How many read guards there are besides the first, plus `FENCED`. Only the owner touches
    /// it, and hardly ever: a store that every section makes is what a section would wait for.
    nesting: AtomicU64,
}

struct Shared {
    /// `WATCH_` flags, `WATCH_FENCED`, and `LOGGED`.
    watch: AtomicU32,
    /// Token of the owning thread, or `NOBODY` when the row is free to be adopted.
    owner: AtomicU64,
    /// Readers of the owning thread that share the row. Changed under the registry's lock.
    handles: AtomicU32,
    /// Whether one of the handles is the thread's own (see `here`), which outlives the memory.
    kept: AtomicBool,
    hub: AtomicPtr<Hub>,
    /// Names the owner in reports; only ever changed under the registry's lock.
    name: Mutex<String>,
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

/// Has the calling thread act as the one that `token` names: a search plays all threads on one.
#[cfg(loom)]
pub(crate) fn set_token(token: u64) {
    TOKEN.with(|own| own.set(token));
}

impl Row {
    /// Where the counters begin, in bytes.
    pub(super) const COUNTERS: usize = std::mem::offset_of!(Row, counters);

    pub(super) fn make() -> &'static Row {
        let row = never_freed::<Row>().cast::<Row>();
        let at = row.as_ptr();
        let own = Own {
            _apart: [0; 8],
            section: AtomicU64::new(0),
            nesting: AtomicU64::new(0),
        };
        let shared = Shared {
            watch: AtomicU32::new(0),
            owner: AtomicU64::new(NOBODY),
            handles: AtomicU32::new(0),
            kept: AtomicBool::new(false),
            hub: AtomicPtr::new(ptr::null_mut()),
            name: Mutex::new(String::new()),
        };
        // SAFETY: room for a row, that nobody knows yet; it has all its parts then.
        unsafe {
            (&raw mut (*at).own).write(Line(own));
            (&raw mut (*at).shared).write(Line(shared));
            Counters::set_up(&raw mut (*at).counters);
            row.as_ref()
        }
    }

    // --- the owner's side -------------------------------------------------------------------

    /// Opens a read section, or nests in the open one. Only the owner calls this.
    #[inline(always)]
    pub(crate) fn enter(&self, hub: &Hub) {
        let own = &self.own.0;
        // SAFETY: the owner's own word, and this is the owner.
        if unsafe { load_own(&own.section) } == 0 {
            own.section.store(hub.grace_number(), Relaxed);
            if !seeded!("no_reader_fence") {
                light(false);
            }
        } else {
            self.enter_slowly(hub);
        }
    }

    /// A nested section, or one of a process without `membarrier`.
    #[cold]
    #[inline(never)]
    fn enter_slowly(&self, hub: &Hub) {
        let own = &self.own.0;
        if own.section.load(Relaxed) == AT_REST_FENCED {
            own.section.store(hub.grace_number(), Relaxed);
            light(true);
        } else {
            own.nesting.store(own.nesting.load(Relaxed) + 1, Relaxed);
        }
    }

    /// Closes the innermost read section. Only the owner calls this.
    #[inline(always)]
    pub(crate) fn leave(&self) {
        let own = &self.own.0;
        // SAFETY: as in `enter`.
        if unsafe { load_own(&own.nesting) } == 0 {
            own.section.store(0, Release);
            if !seeded!("no_leave_fence") {
                light(false);
            }
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
        let nesting = own.nesting.load(Relaxed);
        if nesting != FENCED {
            own.nesting.store(nesting - 1, Relaxed);
        } else {
            own.section.store(AT_REST_FENCED, Release);
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

    /// Whether the owner has a read section open. Only the owner asks.
    pub(crate) fn in_section(&self) -> bool {
        !matches!(self.own.0.section.load(Relaxed), 0 | AT_REST_FENCED)
    }

    // --- pins -------------------------------------------------------------------------------

    /// Whether the calling thread owns the row.
    #[inline(always)]
    pub(crate) fn is_home(&self) -> bool {
        self.shared.0.owner.load(Relaxed) == token()
    }

    /// Counts a pin taken inside a read section of the owner.
    #[inline(always)]
    pub(crate) fn acquire_home(&self, lane: Lane) {
        let count = &self.counters.home(lane).acquired;
        count.store(count.load(Relaxed).wrapping_add(1), Relaxed);
    }

    /// Counts a further pin made from one that is held; on any thread.
    pub(crate) fn acquire_clone(&self, lane: Lane) {
        if self.is_home() {
            self.acquire_home(lane);
        } else {
            let away = self.counters.away(lane);
            away.acquired.fetch_add(1, Relaxed);
        }
    }

    /// Lets a pin go; on any thread.
    #[inline(always)]
    pub(crate) fn release(&self, lane: Lane) {
        if self.is_home() {
            let count = &self.counters.home(lane).released;
            count.store(count.load(Relaxed).wrapping_add(1), Release);
        } else {
            // Not rare, but what is to come next in memory is the other.
            cold_path();
            let away = self.counters.away(lane);
            away.released.fetch_add(1, Release);
        }
        if !seeded!("no_unpin_fence") {
            light(false);
        }
        if self.shared.0.watch.load(Relaxed) & (WATCH_PINS | WATCH_FENCED) != 0 {
            self.pin_released(lane);
        }
    }

    /// Whether what was written may have to be marked in the dirty log; asked after the write.
    #[inline(always)]
    pub(crate) fn may_be_logged(&self) -> bool {
        light(false);
        self.shared.0.watch.load(Relaxed) & (LOGGED | WATCH_FENCED) != 0
    }

    #[cold]
    #[inline(never)]
    fn pin_released(&self, lane: Lane) {
        if self.shared.0.watch.load(Relaxed) & WATCH_FENCED != 0 {
            light(true);
        }
        // The pin is gone and with it perhaps the `Memory`; row and hub are still there (M6).
        // Should they serve another memory by now, that one is looked at for nothing.
        if self.counters.armed(lane.slot()).load(Relaxed) {
            self.hub().pin_released(lane.slot());
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
        self.counters.armed(slot).store(armed, Relaxed);
        if any {
            self.shared.0.watch.fetch_or(WATCH_PINS, Relaxed);
        } else {
            self.shared.0.watch.fetch_and(!WATCH_PINS, Relaxed);
        }
    }

    /// Makes writers ask the dirty log what is to be marked, or no longer so.
    pub(super) fn set_logged(&self, logged: bool) {
        if logged {
            self.shared.0.watch.fetch_or(LOGGED, Relaxed);
        } else {
            self.shared.0.watch.fetch_and(!LOGGED, Relaxed);
        }
    }

    /// Pins let go so far.
    pub(super) fn released(&self, lane: Lane) -> u64 {
        let counters = &self.counters;
        let home = counters.home(lane).released.load(Acquire);
        home.wrapping_add(counters.away(lane).released.load(Acquire))
    }

    /// Pins taken so far.
    pub(super) fn acquired(&self, lane: Lane) -> u64 {
        let counters = &self.counters;
        let home = counters.home(lane).acquired.load(Acquire);
        home.wrapping_add(counters.away(lane).acquired.load(Acquire))
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

    /// Whether the owner keeps a handle beyond its readers.
    pub(super) fn set_kept(&self, kept: bool) {
        self.shared.0.kept.store(kept, Relaxed);
    }

    /// Takes back what the owner has kept; the memory is gone, with all readers.
    pub(super) fn take_back_kept(&self) {
        if self.shared.0.kept.swap(false, Relaxed) {
            self.let_go();
        }
    }

    /// Gives up one handle; true: it was the last, and the row can be adopted.
    pub(super) fn let_go(&self) -> bool {
        let handles = self.handles() - 1;
        self.set_handles(handles);
        // A forgotten guard keeps its section open for ever; nobody may inherit that.
        let free = handles == 0 && !self.in_section();
        if free {
            self.set_owner(NOBODY, "");
        }
        free
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
        let (at_rest, nesting, watch) = if fenced {
            (AT_REST_FENCED, FENCED, WATCH_FENCED)
        } else {
            (0, 0, 0)
        };
        own.section.store(at_rest, Relaxed);
        own.nesting.store(nesting, Relaxed);
        let shared = &self.shared.0;
        shared.watch.store(watch, Relaxed);
        shared.hub.store(ptr::from_ref(hub).cast_mut(), Release);
    }

    /// Forgets its last owner and the pins of the first `slots` slots, for the next memory.
    pub(super) fn clear(&self, slots: u32) {
        *crate::sync::lock(&self.shared.0.name) = String::new();
        self.counters.clear(slots);
    }

    /// What decides what comes next, but for the counters: owner, section (open, and before the
    /// last grace period), flags.
    #[cfg(loom)]
    pub(super) fn state(&self, now: u64) -> String {
        let section = self.own.0.section.load(Relaxed);
        let section = (section != 0, self.is_before(now));
        let watch = self.shared.0.watch.load(Relaxed);
        format!("{}:{section:?}:{watch}", self.owner())
    }

    /// Frees the row; only the models do, which know that all threads have ended.
    #[cfg(loom)]
    pub(super) fn free(row: &'static Row) {
        let row = ptr::from_ref(row).cast_mut();
        // SAFETY: made by `never_freed`; the model has joined every thread that knew it.
        drop(unsafe { Box::from_raw(row) });
    }

    #[inline(always)]
    pub(crate) fn hub(&self) -> &'static Hub {
        // SAFETY: set by `attach` before anyone could know the row; hubs are never freed (M6).
        unsafe { &*self.shared.0.hub.load(Acquire) }
    }
}
