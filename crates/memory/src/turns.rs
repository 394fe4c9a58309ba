// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Taking turns: a lock's queue, first come, first served.
//!
//! A mutex of the host's lets whoever runs take it, so that a guest whose vCPUs move BARs all the
//! time could keep the control thread from the map for as long as it likes. Whoever draws a
//! number here waits for those with lower numbers and for nobody else.

use ebbtide_models::seeded;

use crate::sync::{AtomicU64, Condvar, Mutex, Ordering, lock};

/// Those who wait sleep in that many groups: a turn's end wakes one of them.
#[cfg(not(loom))]
const BAYS: usize = 16;
/// All in one, so that a model of few threads has several in a group.
#[cfg(loom)]
const BAYS: usize = 1;

/// A number drawn.
const DRAW: u64 = 1 << 32;

/// The numbers drawn, and the one whose turn it is.
pub(crate) struct Turns {
    /// How many were drawn in the upper half, whose turn it is in the lower one: in one word, so that
    /// one who draws and one who passes the turn on cannot miss each other.
    state: AtomicU64,
    /// Held from a look at `state` to the sleep that it leads to, and to wake.
    asleep: Mutex<()>,
    bays: [Condvar; BAYS],
}

/// One's turn, until dropped.
pub(crate) struct Turn<'a>(&'a Turns);

/// The number that is drawn next, and the one whose turn it is.
#[inline(always)]
fn parts(state: u64) -> (u32, u32) {
    ((state >> 32) as u32, state as u32)
}

impl Turns {
    pub(crate) fn new() -> Turns {
        Turns {
            state: AtomicU64::new(0),
            asleep: Mutex::new(()),
            bays: std::array::from_fn(|_| Condvar::new()),
        }
    }

    /// Waits for one's turn. Those who called before come first.
    pub(crate) fn take(&self) -> Turn<'_> {
        let (number, serving) = parts(self.state.fetch_add(DRAW, Ordering::Acquire));
        if number != serving {
            self.wait_for(number);
        }
        Turn(self)
    }

    #[cold]
    fn wait_for(&self, number: u32) {
        let mut asleep = lock(&self.asleep);
        while parts(self.state.load(Ordering::Acquire)).1 != number {
            let bay = self.bay(number);
            asleep = bay.wait(asleep).unwrap_or_else(|p| p.into_inner());
        }
    }

    /// One's turn, if nobody has it or waits for it.
    pub(crate) fn try_take(&self) -> Option<Turn<'_>> {
        let state = self.state.load(Ordering::Relaxed);
        let (drawn, serving) = parts(state);
        if drawn != serving {
            return None;
        }
        let next = state.wrapping_add(DRAW);
        let (success, failure) = (Ordering::Acquire, Ordering::Relaxed);
        let taken = self.state.compare_exchange(state, next, success, failure);
        // Made only if it is had: dropping one passes the turn on.
        taken.is_ok().then(|| Turn(self))
    }

    /// How many have the turn or wait for it.
    #[cfg(test)]
    pub(crate) fn queued(&self) -> u64 {
        let (drawn, serving) = parts(self.state.load(Ordering::Relaxed));
        drawn.wrapping_sub(serving).into()
    }

    fn bay(&self, number: u32) -> &Condvar {
        &self.bays[number as usize % BAYS]
    }

    /// Wakes the one whose turn is `number`, which was drawn.
    #[cold]
    fn wake(&self, number: u32) {
        let _asleep = lock(&self.asleep);
        let bay = self.bay(number);
        if seeded!("turn_wakes_one") {
            bay.notify_one();
        } else {
            bay.notify_all();
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let turns = self.0;
        let (success, failure) = (Ordering::Release, Ordering::Relaxed);
        let mut state = turns.state.load(Ordering::Relaxed);
        loop {
            let (drawn, serving) = parts(state);
            // No carry into the other half.
            let next = serving.wrapping_add(1);
            let new = state & !u64::from(u32::MAX) | u64::from(next);
            let passed = turns
                .state
                .compare_exchange_weak(state, new, success, failure);
            match passed {
                // Whoever draws a number from here on sees whose turn it is.
                Ok(_) if drawn == next => return,
                Ok(_) => return turns.wake(next),
                Err(now) => state = now,
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Mutex;
    use std::thread;

    use super::*;

    fn wait_for(turns: &Turns, queued: u64) {
        while turns.queued() != queued {
            thread::yield_now();
        }
    }

    /// More than there are bays, so that some share one.
    #[test]
    fn turns_come_in_the_order_of_the_calls() {
        let (turns, order) = (Turns::new(), Mutex::new(Vec::new()));
        thread::scope(|scope| {
            let first = turns.take();
            for at in 0..40 {
                let (turns, order) = (&turns, &order);
                scope.spawn(move || {
                    let _turn = turns.take();
                    order.lock().unwrap().push(at);
                });
                wait_for(turns, at + 2);
            }
            assert!(turns.try_take().is_none());
            drop(first);
        });
        assert_eq!(order.into_inner().unwrap(), (0..40).collect::<Vec<_>>());
        assert_eq!(turns.queued(), 0);
        drop(turns.try_take().unwrap());
        drop(turns.take());
    }

    /// After 2^32 turns they begin anew, with somebody waiting on either side of the end.
    #[test]
    fn numbers_wrap() {
        let (turns, order) = (Turns::new(), Mutex::new(Vec::new()));
        let last = u64::from(u32::MAX - 1);
        turns.state.store(last << 32 | last, Ordering::Relaxed);
        thread::scope(|scope| {
            let first = turns.take();
            for at in 0..4 {
                let (turns, order) = (&turns, &order);
                scope.spawn(move || {
                    let _turn = turns.take();
                    order.lock().unwrap().push(at);
                });
                wait_for(turns, at + 2);
            }
            drop(first);
        });
        assert_eq!(order.into_inner().unwrap(), [0, 1, 2, 3]);
        assert_eq!(turns.queued(), 0);
        assert_eq!(parts(turns.state.load(Ordering::Relaxed)), (3, 3));
    }
}
