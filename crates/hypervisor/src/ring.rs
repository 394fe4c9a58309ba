// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Dirty rings: what vCPUs have written, harvested while they run (`Documentation/virt/kvm/api.rst`, 8.29).
//!
//! Each vCPU has a ring. The kernel appends the page of each first write, the host takes entries in order and hands them
//! back with *reset*, which also has the pages watched anew.
//!
//! ```text
//!          kernel: first write to a page          host: take                kernel: reset
//!   free ──────────────────────────────► dirty ─────────────► harvested ─────────────────► free
//!
//!   harvest   lock the rings → take → reset → mark in the block's log → unlock
//!   sync      raise each vCPU that is in the guest out of it, wait until it is out → harvest all rings
//! ```
//!
//! - *Reset before mark*: whoever sees a mark reads the page, and a write after that must be noted again.
//! - *One reset at a time*: of two, the later may find that the earlier has taken its entries along, and return before the
//!   earlier has made the processors forget that they may write.
//! - *Rings stay locked until all is marked*: a sync that finds a ring empty may rely on its entries being in the log.
//! - *Out of the guest*: a processor may keep what was written to itself until it leaves the guest.
//!
//! Whose ring is full is on its own thread and outside of the guest: it harvests its own ring and goes on. Nobody else
//! stops.

use ebbtide_models::seeded;

use crate::sync::{AtomicU32, AtomicU64, Condvar, Mutex, MutexGuard, Ordering};

/// The kernel has filled the entry in.
const DIRTY: u32 = 1 << 0;
/// The host has taken it.
const HARVESTED: u32 = 1 << 1;

/// An entry as the kernel has it (`struct kvm_dirty_gfn`).
#[repr(C)]
#[derive(Debug)]
pub struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

/// A page that was written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Written {
    /// Number of the memory slot; address space in the upper half.
    pub slot: u32,
    /// Page in the slot.
    pub page: u64,
}

/// A vCPU's ring, of a power of two of entries, and how far it is harvested.
pub struct Ring<E> {
    entries: E,
    next: Mutex<u64>,
}

impl<E: AsRef<[Entry]>> Ring<E> {
    /// A ring nobody has harvested from.
    pub fn new(entries: E) -> Self {
        Self {
            entries,
            next: Mutex::new(0),
        }
    }

    /// Takes what is in the ring, in order: at most as many as it has entries, for none is free before it is reset.
    fn take(&self, next: &mut u64, written: &mut Vec<Written>) {
        let entries = self.entries.as_ref();
        let mask = (entries.len() as u64).wrapping_sub(1);
        // The mask keeps the index inside.
        while let Some(entry) = entries.get((*next & mask) as usize) {
            // What the kernel filled in before it set the flag is visible after.
            if entry.flags.load(Ordering::Acquire) & (DIRTY | HARVESTED) != DIRTY {
                break;
            }
            written.push(Written {
                slot: entry.slot.load(Ordering::Relaxed),
                page: entry.offset.load(Ordering::Relaxed),
            });
            // The kernel reads the entry once more, and reuses it only after that.
            entry.flags.store(HARVESTED, Ordering::Release);
            *next = next.wrapping_add(1);
        }
    }
}

/// The machine's right to reset its rings.
#[derive(Default)]
pub struct Resets(Mutex<()>);

impl Resets {
    /// As default; loom's has none.
    pub fn new() -> Self {
        Self(Mutex::new(()))
    }
}

/// Moves what is in `rings` into the dirty log: `reset` asks the kernel to reset the rings of the machine, `mark` marks.
/// Returns how many entries there were.
///
/// # Errors
/// What `reset` returns. What was taken is marked all the same.
pub fn harvest<'a, E: AsRef<[Entry]> + 'a, F>(
    rings: impl Iterator<Item = &'a Ring<E>>,
    resets: &Resets,
    reset: impl FnOnce() -> Result<(), F>,
    mark: impl FnOnce(&mut [Written]),
) -> Result<usize, F> {
    let mut written = Vec::new();
    // In the order of the machine's vCPUs: two harvests never wait for each other.
    let held: Vec<_> = rings
        .map(|ring| {
            let mut next = lock(&ring.next);
            ring.take(&mut next, &mut written);
            next
        })
        .collect();
    if written.is_empty() {
        return Ok(0);
    }
    let reset = || {
        let one = (!seeded!("ring_resets_together")).then(|| lock(&resets.0));
        let result = reset();
        drop(one);
        result
    };
    if seeded!("ring_unlocked_mark") {
        let result = reset();
        drop(held);
        mark(&mut written);
        return result.map(|()| written.len());
    }
    let result;
    if seeded!("ring_mark_before_reset") {
        mark(&mut written);
        result = reset();
    } else {
        result = reset();
        mark(&mut written);
    }
    drop(held);
    result.map(|()| written.len())
}

/// Whether a vCPU is in the guest, and a way to wait until it has been out.
pub struct Crossing {
    state: Mutex<State>,
    out: Condvar,
}

struct State {
    inside: bool,
    exits: u64,
    waiting: u32,
}

/// A stay in the guest that is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stay(u64);

impl Crossing {
    /// A vCPU outside of the guest.
    pub fn new() -> Self {
        Self {
            state: Mutex::new(State {
                inside: false,
                exits: 0,
                waiting: 0,
            }),
            out: Condvar::new(),
        }
    }

    /// The vCPU's thread is about to enter the guest.
    pub fn enter(&self) {
        lock(&self.state).inside = true;
    }

    /// It is back.
    pub fn leave(&self) {
        let mut state = lock(&self.state);
        state.inside = false;
        state.exits += 1;
        if state.waiting > 0 && !seeded!("crossing_leaves_silently") {
            self.out.notify_all();
        }
    }

    /// The stay that is going on. Who wants it to end kicks the vCPU and [waits](Self::wait).
    pub fn stay(&self) -> Option<Stay> {
        let state = lock(&self.state);
        state.inside.then_some(Stay(state.exits))
    }

    /// Waits until `stay` is over: not for the next one, though the vCPU may be in the guest again.
    pub fn wait(&self, stay: Stay) {
        if seeded!("crossing_not_awaited") {
            return;
        }
        let mut state = lock(&self.state);
        state.waiting += 1;
        while state.exits == stay.0 {
            state = match self.out.wait(state) {
                Ok(state) => state,
                Err(poisoned) => poisoned.into_inner(),
            };
        }
        state.waiting -= 1;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    match mutex.lock() {
        Ok(guard) => guard,
        // Nothing panics while it is held; what it guards is complete after each step.
        Err(poisoned) => poisoned.into_inner(),
    }
}

/// The kernel's side of an entry, for those who play it.
#[cfg(any(test, loom))]
impl Entry {
    /// A free entry.
    pub fn free() -> Self {
        Self {
            flags: AtomicU32::new(0),
            slot: AtomicU32::new(0),
            offset: AtomicU64::new(0),
        }
    }

    /// Fills in a free entry.
    pub fn fill(&self, written: Written) {
        assert_eq!(self.flags.load(Ordering::Acquire), 0, "the entry is free");
        self.slot.store(written.slot, Ordering::Relaxed);
        self.offset.store(written.page, Ordering::Relaxed);
        self.flags.store(DIRTY, Ordering::Release);
    }

    /// Frees an entry that was harvested; what it said.
    pub fn reset(&self) -> Option<Written> {
        if self.flags.load(Ordering::Acquire) & HARVESTED == 0 {
            return None;
        }
        let written = Written {
            slot: self.slot.load(Ordering::Relaxed),
            page: self.offset.load(Ordering::Relaxed),
        };
        self.flags.store(0, Ordering::Release);
        Some(written)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::convert::Infallible;
    use std::sync::Arc;
    use std::thread;

    use proptest::prelude::*;

    /// A ring with the kernel's two places in it: where it fills in next, and where it resets next.
    struct Fake {
        entries: Arc<[Entry]>,
        filled: u64,
        reset: u64,
    }

    impl Fake {
        fn new(entries: usize) -> Fake {
            Fake {
                entries: (0..entries).map(|_| Entry::free()).collect(),
                filled: 0,
                reset: 0,
            }
        }

        fn at(&self, index: u64) -> &Entry {
            &self.entries[index as usize % self.entries.len()]
        }

        fn is_full(&self) -> bool {
            self.filled - self.reset == self.entries.len() as u64
        }

        fn fill(&mut self, written: Written) {
            self.at(self.filled).fill(written);
            self.filled += 1;
        }

        fn reset(&mut self) -> Vec<Written> {
            let mut all = Vec::new();
            while let Some(written) = self.at(self.reset).reset() {
                self.reset += 1;
                all.push(written);
            }
            all
        }
    }

    fn written(page: u64) -> Written {
        Written {
            slot: (page % 3) as u32,
            page,
        }
    }

    proptest! {
        /// However filling and harvesting alternate: all is taken once, in order, and given back.
        #[test]
        fn entries_are_taken_once_and_in_order(steps in prop::collection::vec(0..12u8, 1..300)) {
            let mut fake = Fake::new(8);
            let ring = Ring::new(Arc::clone(&fake.entries));
            let resets = Resets::new();
            let (mut next, mut marked) = (0, Vec::new());
            for step in steps {
                if step < 9 && !fake.is_full() {
                    fake.fill(written(next));
                    next += 1;
                    continue;
                }
                let mut handed_back = Vec::new();
                let reset = || { handed_back = fake.reset(); Ok::<(), Infallible>(()) };
                let mut taken = Vec::new();
                let count = harvest([&ring].into_iter(), &resets, reset, |w| taken = w.to_vec());
                prop_assert_eq!(count, Ok(taken.len()));
                prop_assert_eq!(&handed_back, &taken);
                prop_assert_eq!(fake.filled, fake.reset);
                marked.extend(taken);
            }
            let expected: Vec<_> = (0..fake.reset).map(written).collect();
            prop_assert_eq!(marked, expected);
        }
    }

    #[test]
    fn what_a_failed_reset_took_is_marked_and_the_failure_told() {
        let mut fake = Fake::new(4);
        let ring = Ring::new(Arc::clone(&fake.entries));
        let resets = Resets::new();
        fake.fill(written(1));
        let mut marked = Vec::new();
        let result = harvest(
            [&ring].into_iter(),
            &resets,
            || Err("refused"),
            |w| marked = w.to_vec(),
        );
        assert_eq!((result, marked), (Err("refused"), vec![written(1)]));
        // Not reset: not taken again.
        let again = harvest([&ring].into_iter(), &resets, || Err(()), |_| {});
        assert_eq!(again, Ok(0));
    }

    /// A processor that fills its ring and empties it itself when it is full, and another thread that harvests, too.
    #[test]
    fn nothing_is_lost_between_two_who_harvest() {
        const PAGES: u64 = 20_000;
        let fake = Arc::new(Mutex::new(Fake::new(16)));
        let ring = Arc::new(Ring::new(Arc::clone(&lock(&fake).entries)));
        let (resets, marked) = (Arc::new(Resets::new()), Arc::new(Mutex::default()));
        let harvester = {
            let (fake, marked) = (Arc::clone(&fake), Arc::clone(&marked));
            move || {
                let reset = || {
                    lock(&fake).reset();
                    Ok::<(), Infallible>(())
                };
                let mark = |w: &mut [Written]| {
                    let mut marked: MutexGuard<'_, Vec<Written>> = lock(&marked);
                    marked.extend_from_slice(w);
                };
                harvest([&*ring].into_iter(), &resets, reset, mark).unwrap();
            }
        };
        let vcpu = {
            let (fake, make_room) = (Arc::clone(&fake), harvester.clone());
            thread::spawn(move || {
                for page in 0..PAGES {
                    while lock(&fake).is_full() {
                        make_room();
                    }
                    lock(&fake).fill(written(page));
                }
            })
        };
        while !vcpu.is_finished() {
            harvester();
        }
        vcpu.join().unwrap();
        harvester();
        let marked = lock(&marked);
        assert_eq!(marked.len() as u64, PAGES, "each once");
        let pages: BTreeSet<_> = marked.iter().map(|w| w.page).collect();
        assert_eq!(pages.len() as u64, PAGES);
    }

    #[test]
    fn only_the_stay_that_was_seen_is_awaited() {
        let crossing = Arc::new(Crossing::new());
        assert_eq!(crossing.stay(), None);
        crossing.enter();
        let stay = crossing.stay().unwrap();
        let waiter = {
            let crossing = Arc::clone(&crossing);
            thread::spawn(move || crossing.wait(stay))
        };
        crossing.leave();
        crossing.enter();
        // Inside again, but not the stay that was to end.
        waiter.join().unwrap();
        assert_ne!(crossing.stay(), Some(stay));
    }
}
