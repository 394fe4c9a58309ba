// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the readers of one memory share: the grace number, the rows, the pin slots.

use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};

use ebbtide_models::seeded;

use super::barrier::Barrier;
use super::counters::{Lane, MAX_SLOTS, PerSlot, Zero, never_freed};
use super::row::{Line, NOBODY, Row};
use super::wake::Wake;
use crate::Error;
use crate::dirty::{DirtyClient, Key, Table};
use crate::sync::{AtomicU64, Mutex, lock, try_lock};
use crate::ticket::Drain;

/// Shared by the readers of one memory. Never freed, only used again (M6).
#[repr(C)]
pub(crate) struct Hub {
    /// Counts grace periods; readers load it at the start of a section.
    grace: Line<AtomicU64>,
    /// Counts published views and seals; a [`crate::CachedMap`] compares it.
    generation: Line<AtomicU64>,
    /// Counts the memories the hub has served, for what threads keep (see `here`).
    life: Line<AtomicU64>,
    wake: Wake,
    registry: Mutex<Registry>,
    dirty: Table,
    /// By slot, the bank new pins of a sparse block count in.
    banks: Pages<PerSlot<Bank>>,
}

/// How far the lane of new pins is from that in bank 0. Not at the beginning, see [`Pages`].
#[derive(Default)]
#[repr(C, align(32))]
struct Bank([u64; 2], AtomicU64);
// SAFETY: an atomic.
unsafe impl Zero for Bank {}

/// Begins with a page, as hubs and rows do. A processor takes a load for one of what it is just storing
/// when the two are at the same place of different pages, and waits for the store. What a pin loads of the
/// hub is therefore never where it stores in its row: a slot's bank and its counters are one table's
/// distance apart whatever the slot, and sections are stored where neither banks are nor what the hub has
/// at the beginning of its lines.
#[repr(C, align(4096))]
struct Pages<T>(T);
const _: () =
    assert!(size_of::<Bank>() == Lane::SLOT as usize && !Row::COUNTERS.is_multiple_of(4096));

struct Registry {
    barrier: Barrier,
    rows: Vec<&'static Row>,
    /// Rows for the next memory, of a model.
    #[cfg(loom)]
    spare: Vec<&'static Row>,
    /// Slots handed out so far, the free ones included.
    slots: u32,
    free: Vec<u32>,
    /// Slots whose pins somebody waits for.
    armed: Vec<u32>,
    /// The dirty log may have a client.
    logged: bool,
    /// Unplugs that wait for the pins of their slot, and for nothing else but holds. Whoever lets one
    /// of these pins go, and the worker, look whether it was the last; who takes the unplug out of
    /// here tells that it is over.
    drains: Vec<Arc<Drain>>,
}

/// Rows and hubs that no memory uses. The only global: they outlive their memories (M6).
#[cfg(not(loom))]
static SPARE: Mutex<(Vec<&'static Hub>, Vec<&'static Row>)> = Mutex::new((Vec::new(), Vec::new()));

impl Hub {
    pub(crate) fn take(barrier: Barrier) -> &'static Hub {
        #[cfg(not(loom))]
        if let Some(hub) = lock(&SPARE).0.pop() {
            lock(&hub.registry).barrier = barrier;
            hub.dirty.begin(barrier);
            return hub;
        }
        let registry = Registry {
            barrier,
            rows: Vec::new(),
            #[cfg(loom)]
            spare: Vec::new(),
            slots: 0,
            free: Vec::new(),
            armed: Vec::new(),
            logged: false,
            drains: Vec::new(),
        };
        let hub = never_freed::<Hub>().cast::<Hub>();
        let at = hub.as_ptr();
        // SAFETY: room for a hub, that nobody knows yet; it has all its parts then.
        unsafe {
            (&raw mut (*at).grace).write(Line(AtomicU64::new(1)));
            (&raw mut (*at).generation).write(Line(AtomicU64::new(1)));
            (&raw mut (*at).life).write(Line(AtomicU64::new(1)));
            (&raw mut (*at).wake).write(Wake::new());
            (&raw mut (*at).registry).write(Mutex::new(registry));
            Table::set_up(&raw mut (*at).dirty, barrier);
            PerSlot::set_up(&raw mut (*at).banks.0);
            hub.as_ref()
        }
    }

    /// Ends the hub's life with a memory; which rows are for the next. The caller knows that there
    /// are no readers, no pins and no worker left.
    fn end_life(&self) -> Vec<&'static Row> {
        let mut registry = lock(&self.registry);
        // What threads have kept is worth nothing from here on: whoever uses it borrows the memory.
        self.life.0.fetch_add(1, Relaxed);
        let mut rows = std::mem::take(&mut registry.rows);
        rows.iter().for_each(|row| row.take_back_kept());
        // A row whose owner forgot a guard stays in its section for ever.
        rows.retain(|row| row.owner() == NOBODY);
        rows.iter().for_each(|row| row.clear(registry.slots));
        registry.slots = 0;
        // With what they have on the heap: a checker of leaks does not look for its owner in a mapping.
        registry.free = Vec::new();
        registry.armed = Vec::new();
        registry.logged = false;
        registry.drains = Vec::new();
        drop(registry);
        self.dirty.clear();
        rows
    }

    /// Makes hub and rows available to the next memory. The caller knows what [`Hub::end_life`]
    /// asks for.
    #[cfg(not(loom))]
    pub(crate) fn give_back(&'static self) {
        let rows = self.end_life();
        let mut spare = lock(&SPARE);
        spare.0.push(self);
        spare.1.extend(rows);
    }

    /// As [`Hub::give_back`] and then [`Hub::take`], of the one hub that a model has.
    #[cfg(loom)]
    pub(crate) fn begin_next_life(&self) {
        let rows = self.end_life();
        lock(&self.registry).spare.extend(rows);
    }

    /// Frees hub and rows; the models have joined every thread.
    #[cfg(loom)]
    pub(crate) fn give_back(&'static self) {
        let mut registry = lock(&self.registry);
        let rows = std::mem::take(&mut registry.rows);
        let spare = std::mem::take(&mut registry.spare);
        drop(registry);
        rows.into_iter().chain(spare).for_each(Row::free);
        // SAFETY: made by `never_freed` in `take`; nobody knows it any more.
        drop(unsafe { Box::from_raw(std::ptr::from_ref(self).cast_mut()) });
    }

    pub(crate) fn wake(&self) -> &Wake {
        &self.wake
    }

    /// Who follows what changes.
    #[inline(always)]
    pub(crate) fn dirty(&self) -> &Table {
        &self.dirty
    }

    #[inline(always)]
    pub(crate) fn grace_number(&self) -> u64 {
        self.grace.0.load(Acquire)
    }

    #[inline(always)]
    pub(crate) fn generation(&self) -> u64 {
        self.generation.0.load(Acquire)
    }

    /// Makes every cached translation stale. Call after the change is visible.
    pub(crate) fn bump_generation(&self) {
        self.generation.0.fetch_add(1, AcqRel);
    }

    /// How far the lane that new pins of a sparse block count in is from that in bank 0.
    pub(crate) fn bank(&self, slot: u32) -> &AtomicU64 {
        &self.banks.0.at(slot).1
    }

    /// Makes new pins count in the other bank; returns the one they counted in.
    pub(crate) fn flip_bank(&self, slot: u32) -> usize {
        (self.bank(slot).fetch_xor(Lane::STEP, AcqRel) / Lane::STEP) as usize
    }

    // --- the dirty log ----------------------------------------------------------------------

    /// Starts a client of the dirty log, see [`Table::start`].
    pub(crate) fn start_client(
        &self,
        client: DirtyClient,
        only: Option<Key>,
    ) -> Result<Vec<u32>, Error> {
        let fresh = self.dirty.start(client, only)?;
        self.tell_rows_of_clients();
        Ok(fresh)
    }

    /// Stops a client of the dirty log, see [`Table::stop`].
    pub(crate) fn stop_client(&self, client: DirtyClient, only: Option<Key>) -> Vec<u32> {
        let idle = self.dirty.stop(client, only);
        self.tell_rows_of_clients();
        idle
    }

    /// Lets those who end pins know whether there are clients: a look at their own row then does for
    /// them. Who does not see yet that a client has started is seen by what the client reads after
    /// its first harvest, see [`Table::start`].
    fn tell_rows_of_clients(&self) {
        let mut registry = lock(&self.registry);
        registry.logged = self.dirty.has_clients();
        if seeded!("rows_unlogged") {
            return;
        }
        for row in &registry.rows {
            row.set_logged(registry.logged);
        }
    }

    // --- rows -------------------------------------------------------------------------------

    /// The row of the thread `token` names; a free or new one at its first call.
    pub(crate) fn adopt(&'static self, token: u64, name: impl FnOnce() -> String) -> &'static Row {
        let mut registry = lock(&self.registry);
        if let Some(row) = registry.rows.iter().find(|row| row.owner() == token) {
            row.set_handles(row.handles() + 1);
            return row;
        }
        // A free row keeps its counters: the pins still out are counted where they were taken,
        // and the new owner goes on counting from there. The lock orders the two owners.
        let row = match registry.rows.iter().find(|row| row.owner() == NOBODY) {
            Some(row) => row,
            None => registry.add_row(self),
        };
        row.set_owner(token, &name());
        row.set_handles(1);
        row
    }

    /// Which of its memories the hub serves.
    #[inline(always)]
    pub(crate) fn life(&self) -> u64 {
        self.life.0.load(Relaxed)
    }

    /// As [`Hub::adopt`], for the calling thread, which keeps the handle beyond the memory: until
    /// the life that comes with it is over.
    pub(crate) fn adopt_kept(&'static self) -> (&'static Row, u64) {
        let row = self.adopt(super::row::make_token(), super::thread_name);
        row.set_kept(true);
        (row, self.life())
    }

    /// Gives up a handle that was kept, if its life is not over: which is looked at under the lock
    /// that ends it.
    pub(crate) fn disown_kept(&self, life: u64, row: &'static Row) {
        let early = seeded!("life_looked_at_unlocked") && self.life() == life;
        let registry = lock(&self.registry);
        if early || self.life() == life {
            row.set_kept(false);
            registry.let_go(row);
        }
    }

    /// Gives up one handle on a row; the last frees it for adoption.
    pub(crate) fn disown(&self, row: &'static Row) {
        lock(&self.registry).let_go(row);
    }

    // --- grace periods ----------------------------------------------------------------------

    /// Begins a grace period; it has passed when [`Hub::grace_passed`] says so.
    pub(crate) fn begin_grace(&self) -> u64 {
        let barrier = lock(&self.registry).barrier;
        let target = self.grace.0.fetch_add(1, AcqRel) + 1;
        barrier.heavy();
        target
    }

    /// Whether every section that could have begun before the grace period has ended. If not,
    /// the end of one that remains signals the hub's wake.
    pub(crate) fn grace_passed(&self, target: u64) -> bool {
        let registry = lock(&self.registry);
        if seeded!("no_grace") {
            return true;
        }
        // A section that is not seen to have ended after the barrier has its end see the watch.
        // One that was not late yet when the others were watched (its reader had loaded the old
        // number but not stored it) gets its turn in the next round.
        let mut rounds = 0;
        loop {
            let (mut late, mut fresh) = (false, false);
            for row in registry.rows.iter().filter(|row| row.is_before(target)) {
                late = true;
                fresh |= row.watch_section();
            }
            if !late {
                return true;
            }
            if !fresh || (seeded!("watch_once") && rounds > 0) {
                return false;
            }
            registry.barrier.heavy();
            rounds += 1;
        }
    }

    /// Begins a grace period and says whether it has passed already. Never waits for anybody: when
    /// somebody else is at the rows, it has not.
    pub(crate) fn try_grace(&self) -> bool {
        let Some(registry) = try_lock(&self.registry) else {
            return false;
        };
        if seeded!("no_grace") {
            return true;
        }
        let target = self.grace.0.fetch_add(1, AcqRel) + 1;
        if !seeded!("reclaim_unfenced") {
            registry.barrier.heavy();
        }
        !registry.rows.iter().any(|row| row.is_before(target))
    }

    /// Names of the threads whose sections hold up the grace period.
    pub(crate) fn late_readers(&self, target: u64) -> Vec<String> {
        let registry = lock(&self.registry);
        registry
            .rows
            .iter()
            .filter(|row| row.is_before(target))
            .map(|row| row.name())
            .collect()
    }

    // --- pin slots --------------------------------------------------------------------------

    /// A slot for the pins of one RAM block, or `None` when all are taken.
    pub(crate) fn allocate_slot(&self) -> Option<u32> {
        let mut registry = lock(&self.registry);
        if let Some(slot) = registry.free.pop() {
            return Some(slot);
        }
        let slot = registry.slots;
        if slot as usize >= MAX_SLOTS {
            return None;
        }
        registry.slots += 1;
        Some(slot)
    }

    /// Takes a slot back. The caller knows that no view shows it and no pin is out.
    pub(crate) fn free_slot(&self, slot: u32) {
        lock(&self.registry).free.push(slot);
    }

    /// Makes the release of pins of `slot` signal the wake. Nests.
    pub(crate) fn arm(&self, slot: u32) {
        lock(&self.registry).arm(slot);
        // The caller sums next, and `outstanding` begins with a heavy barrier.
    }

    /// Undoes one [`Hub::arm`].
    pub(crate) fn disarm(&self, slot: u32) {
        lock(&self.registry).disarm(slot);
    }

    /// Pins of `slot` that are out, summed over `banks`. An upper bound while pins come and go;
    /// 0 is the truth, once no read section can take new ones (M4).
    pub(crate) fn outstanding(&self, slot: u32, banks: &[usize]) -> u64 {
        let registry = lock(&self.registry);
        registry.barrier.heavy();
        registry.outstanding(slot, banks, true)
    }

    // --- the end of an unplug ---------------------------------------------------------------

    /// Has the last unpin end an unplug whose grace period is over. The caller looks next, by
    /// [`Hub::end_drain`], whether there are any pins.
    pub(crate) fn begin_drain(&self, drain: &Arc<Drain>) {
        let mut registry = lock(&self.registry);
        registry.arm(drain.slot());
        registry.drains.push(Arc::clone(drain));
    }

    /// Ends an unplug if nobody uses its memory. Returns whether it is over, by this or before.
    pub(crate) fn end_drain(&self, drain: &Arc<Drain>) -> bool {
        let mut registry = lock(&self.registry);
        let Some(at) = registry.drains.iter().position(|d| Arc::ptr_eq(d, drain)) else {
            return true;
        };
        if drain.has_holds() {
            return false;
        }
        // Who let go and did not see that it is waited for is seen after this.
        registry.barrier.heavy();
        if registry.outstanding(drain.slot(), &[0, 1], true) != 0 {
            return false;
        }
        registry.drains.swap_remove(at);
        registry.disarm(drain.slot());
        drop(registry);
        drain.finish();
        true
    }

    /// A pin of `slot`, which is armed, was let go by the calling thread. Ends the unplug that waits
    /// for it if it was the last.
    ///
    /// There is no barrier: pins that are out were taken before the grace period that ended before the
    /// unplug was put where this finds it, or cloned from such. Whoever lets another go at the same
    /// time comes here as well, before this or behind it, as there is a lock; or finds the lock taken
    /// and has the worker look. Who did not see that the slot is armed is the worker's, which looks
    /// after a barrier.
    #[cold]
    pub(super) fn pin_released(&self, slot: u32) {
        let Some(mut registry) = try_lock(&self.registry) else {
            if !seeded!("busy_tells_nobody") {
                self.wake.signal();
            }
            return;
        };
        let waits = registry.armed.iter().filter(|armed| **armed == slot);
        let waits = waits.count();
        let at = registry.drains.iter().position(|d| d.slot() == slot);
        let Some(at) = at.filter(|_| waits == 1) else {
            // A seal, or the end of the memory.
            drop(registry);
            return self.wake.signal();
        };
        // The last hold wakes the worker.
        if registry.drains[at].has_holds() || registry.outstanding(slot, &[0, 1], false) != 0 {
            return;
        }
        let drain = registry.drains.swap_remove(at);
        registry.disarm(slot);
        drop(registry);
        drain.finish();
    }

    /// Pins of `slot` by the thread that took them.
    pub(crate) fn holders(&self, slot: u32) -> Vec<(String, u64)> {
        let registry = lock(&self.registry);
        let mut holders = Vec::new();
        for row in &registry.rows {
            let both = |count: fn(&Row, Lane) -> u64| {
                count(row, Lane::new(slot, 0)).wrapping_add(count(row, Lane::new(slot, 1)))
            };
            let released = both(Row::released);
            let count = both(Row::acquired).wrapping_sub(released);
            if count != 0 {
                holders.push((row.name(), count));
            }
        }
        holders
    }

    /// What decides what comes next: of each row, and of each slot the pins that are out.
    #[cfg(loom)]
    pub(crate) fn state(&self) -> String {
        let (slots, now) = (self.slots(), self.grace_number());
        let pins: Vec<_> = (0..slots).map(|slot| self.holders(slot)).collect();
        let registry = lock(&self.registry);
        let rows: Vec<_> = registry.rows.iter().map(|row| row.state(now)).collect();
        format!("{rows:?} {pins:?} {:?} {:?}", registry.armed, registry.free)
    }

    /// Slots handed out, the free ones included.
    pub(crate) fn slots(&self) -> u32 {
        lock(&self.registry).slots
    }
}

impl Registry {
    /// Makes the release of pins of `slot` call [`Hub::pin_released`]. Nests.
    fn arm(&mut self, slot: u32) {
        self.armed.push(slot);
        for row in &self.rows {
            row.watch_pins(slot, true, true);
        }
    }

    /// Undoes one [`Registry::arm`].
    fn disarm(&mut self, slot: u32) {
        if let Some(at) = self.armed.iter().position(|s| *s == slot) {
            self.armed.swap_remove(at);
        }
        let still = self.armed.contains(&slot);
        let any = !self.armed.is_empty();
        for row in &self.rows {
            row.watch_pins(slot, still, any);
        }
    }

    /// See [`Hub::outstanding`]; with a barrier between the sums where pins may still be taken.
    fn outstanding(&self, slot: u32, banks: &[usize], barrier: bool) -> u64 {
        let sum = |count: fn(&Row, Lane) -> u64| {
            let rows = self.rows.iter();
            let counts = rows.flat_map(|row| banks.iter().map(|b| count(row, Lane::new(slot, *b))));
            counts.fold(0, u64::wrapping_add)
        };
        if seeded!("acquired_first") {
            let acquired = sum(Row::acquired);
            return acquired.wrapping_sub(sum(Row::released));
        }
        // Released first: whoever is seen to have let go is then seen to have taken, and a clone
        // made before its original was let go is not missed.
        let released = sum(Row::released);
        if barrier {
            self.barrier.heavy();
        }
        sum(Row::acquired).wrapping_sub(released)
    }

    fn add_row(&mut self, hub: &'static Hub) -> &'static Row {
        #[cfg(not(loom))]
        let spare = lock(&SPARE).1.pop();
        #[cfg(loom)]
        let spare = self.spare.pop();
        let row = spare.unwrap_or_else(Row::make);
        row.attach(hub, self.barrier == Barrier::Fence);
        if !seeded!("new_row_unlogged") {
            row.set_logged(self.logged);
        }
        for slot in &self.armed {
            row.watch_pins(*slot, true, true);
        }
        self.rows.push(row);
        row
    }

    fn let_go(&self, row: &Row) {
        if row.let_go() && seeded!("exit_forgets_pins") {
            row.clear(self.slots);
        }
    }
}
