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

/// The numbers drawn, and the one whose turn it is.
pub(crate) struct Turns {
    drawn: AtomicU64,
    serving: Mutex<u64>,
    bays: [Condvar; BAYS],
}

/// One's turn, until dropped.
pub(crate) struct Turn<'a>(&'a Turns);

impl Turns {
    pub(crate) fn new() -> Turns {
        Turns {
            drawn: AtomicU64::new(0),
            serving: Mutex::new(0),
            bays: std::array::from_fn(|_| Condvar::new()),
        }
    }

    /// Waits for one's turn. Those who called before come first.
    pub(crate) fn take(&self) -> Turn<'_> {
        let number = self.drawn.fetch_add(1, Ordering::Relaxed);
        let mut serving = lock(&self.serving);
        while *serving != number {
            let bay = self.bay(number);
            serving = bay.wait(serving).unwrap_or_else(|p| p.into_inner());
        }
        Turn(self)
    }

    /// One's turn, if nobody has it or waits for it.
    pub(crate) fn try_take(&self) -> Option<Turn<'_>> {
        let serving = lock(&self.serving);
        let (free, drawn) = (*serving, *serving + 1);
        let order = Ordering::Relaxed;
        let taken = self.drawn.compare_exchange(free, drawn, order, order);
        // Made only if it is had: dropping one passes the turn on.
        taken.is_ok().then(|| Turn(self))
    }

    /// How many have the turn or wait for it.
    #[cfg(test)]
    pub(crate) fn queued(&self) -> u64 {
        let serving = lock(&self.serving);
        self.drawn.load(Ordering::Relaxed) - *serving
    }

    fn bay(&self, number: u64) -> &Condvar {
        &self.bays[number as usize % BAYS]
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let turns = self.0;
        let mut serving = lock(&turns.serving);
        *serving += 1;
        // Whoever sleeps drew its number before it took the lock, so that the number is seen
        // here; who takes the lock later sees its turn.
        if turns.drawn.load(Ordering::Relaxed) == *serving {
            return;
        }
        let bay = turns.bay(*serving);
        if seeded!("turn_wakes_one") {
            bay.notify_one();
        } else {
            bay.notify_all();
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
}
