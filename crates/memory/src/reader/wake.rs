// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Wake-ups: of the grace worker, and of those who wait for a phase.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::sync::{Condvar, Mutex, lock};

/// A flag one thread sleeps on. A signal is never lost: it stays set until it is taken.
pub(crate) struct Wake {
    set: Mutex<bool>,
    changed: Condvar,
}

impl Wake {
    pub(crate) fn new() -> Wake {
        Wake {
            set: Mutex::new(false),
            changed: Condvar::new(),
        }
    }

    /// Wakes the sleeper, now or when it next goes to sleep.
    pub(crate) fn signal(&self) {
        let was_set = std::mem::replace(&mut *lock(&self.set), true);
        // Outside the lock, which the sleeper takes first of all.
        if !was_set {
            self.changed.notify_one();
        }
    }

    /// Whether a sleeper would be woken.
    #[cfg(loom)]
    pub(crate) fn is_set(&self) -> bool {
        *lock(&self.set)
    }

    /// Sleeps until signalled, or for `limit`; takes the signal and returns whether there was one.
    pub(crate) fn wait(&self, limit: Option<Duration>) -> bool {
        let mut set = lock(&self.set);
        while !*set {
            match limit {
                None => set = self.changed.wait(set).unwrap_or_else(|p| p.into_inner()),
                Some(limit) => {
                    let (guard, timeout) = self
                        .changed
                        .wait_timeout(set, limit)
                        .unwrap_or_else(|p| p.into_inner());
                    set = guard;
                    if timeout.timed_out() {
                        break;
                    }
                }
            }
        }
        std::mem::replace(&mut *set, false)
    }
}

/// A number that only grows, and those who wait for it to reach a value.
pub(crate) struct Level {
    state: Mutex<LevelState>,
    changed: Condvar,
}

struct LevelState {
    level: u8,
    next_key: u64,
    waiting: Vec<Waiting>,
}

struct Waiting {
    key: u64,
    wanted: u8,
    waker: Waker,
}

impl Level {
    pub(crate) fn new(level: u8) -> Arc<Level> {
        let state = LevelState {
            level,
            next_key: 0,
            waiting: Vec::new(),
        };
        Arc::new(Level {
            state: Mutex::new(state),
            changed: Condvar::new(),
        })
    }

    pub(crate) fn get(&self) -> u8 {
        lock(&self.state).level
    }

    /// Raises the level and wakes those who wait for it. Lowering is ignored.
    pub(crate) fn raise(&self, level: u8) {
        let mut state = lock(&self.state);
        if level <= state.level {
            return;
        }
        state.level = level;
        let ready: Vec<Waiting> = state
            .waiting
            .extract_if(.., |w| w.wanted <= level)
            .collect();
        self.changed.notify_all();
        drop(state);
        for waiting in ready {
            waiting.waker.wake();
        }
    }

    /// Blocks this thread until the level is reached.
    pub(crate) fn wait(&self, wanted: u8) {
        let mut state = lock(&self.state);
        while state.level < wanted {
            state = self.changed.wait(state).unwrap_or_else(|p| p.into_inner());
        }
    }

    /// Blocks this thread until the level is reached, or for `limit`. Returns whether it was.
    pub(crate) fn wait_for(&self, wanted: u8, limit: Duration) -> bool {
        let from = Instant::now();
        let mut state = lock(&self.state);
        while state.level < wanted {
            let left = limit.saturating_sub(from.elapsed());
            if left.is_zero() {
                return false;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(|p| p.into_inner()).0;
        }
        true
    }

    /// Ready once the level is reached.
    pub(crate) fn reached(self: &Arc<Self>, wanted: u8) -> Reached {
        Reached {
            level: Arc::clone(self),
            wanted,
            key: None,
        }
    }
}

/// The future of [`Level::reached`].
pub(crate) struct Reached {
    level: Arc<Level>,
    wanted: u8,
    key: Option<u64>,
}

impl Future for Reached {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let level = Arc::clone(&self.level);
        let waker = cx.waker().clone();
        let mut state = lock(&level.state);
        if state.level >= self.wanted {
            self.key = None;
            return Poll::Ready(());
        }
        let key = self.key;
        let old = key.and_then(|key| state.waiting.iter_mut().find(|w| w.key == key));
        let replaced = match old {
            Some(waiting) => Some(std::mem::replace(&mut waiting.waker, waker)),
            None => {
                let key = state.next_key;
                state.next_key += 1;
                self.key = Some(key);
                let wanted = self.wanted;
                state.waiting.push(Waiting { key, wanted, waker });
                None
            }
        };
        drop(state);
        // Outside the lock: with a waker may go a task, and with it another who waits.
        drop(replaced);
        Poll::Pending
    }
}

impl Drop for Reached {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let mut state = lock(&self.level.state);
        let at = state.waiting.iter().position(|w| w.key == key);
        let waiting = at.map(|at| state.waiting.remove(at));
        drop(state);
        // As above.
        drop(waiting);
    }
}
