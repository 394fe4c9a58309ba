// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where an executor's time comes from: the system, or a test that turns it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::inbox::Shared;

/// The time source of an executor; all its timers go by it.
#[derive(Clone, Debug, Default)]
pub struct Clock(Source);

#[derive(Clone, Debug, Default)]
enum Source {
    #[default]
    System,
    Manual(Arc<Manual>),
}

#[derive(Debug)]
struct Manual {
    state: Mutex<ManualState>,
}

#[derive(Debug)]
struct ManualState {
    now: Instant,
    watchers: Vec<Weak<Shared>>,
}

impl Manual {
    fn lock(&self) -> MutexGuard<'_, ManualState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clock {
    /// The system's monotonic clock.
    pub fn system() -> Clock {
        Clock(Source::System)
    }

    pub(crate) fn now(&self) -> Instant {
        match &self.0 {
            Source::System => Instant::now(),
            Source::Manual(manual) => manual.lock().now,
        }
    }

    /// How long the kernel may wait for a timer due at `deadline`; `None` when somebody wakes us for it.
    pub(crate) fn wait_until(&self, deadline: Instant) -> Option<Duration> {
        match &self.0 {
            Source::System => Some(deadline.saturating_duration_since(Instant::now())),
            Source::Manual(_) => None,
        }
    }

    pub(crate) fn watch(&self, executor: &Arc<Shared>) {
        if let Source::Manual(manual) = &self.0 {
            manual.lock().watchers.push(Arc::downgrade(executor));
        }
    }
}

/// A clock that stands still until it is advanced.
#[derive(Clone, Debug)]
pub struct ManualClock(Arc<Manual>);

impl ManualClock {
    /// Starts at some instant and stays there.
    #[allow(clippy::new_without_default)] // two of them are not equal: each starts at its own instant
    pub fn new() -> ManualClock {
        let state = ManualState {
            now: Instant::now(),
            watchers: Vec::new(),
        };
        ManualClock(Arc::new(Manual {
            state: Mutex::new(state),
        }))
    }

    /// What to put into [`Config::clock`](crate::Config::clock).
    pub fn clock(&self) -> Clock {
        Clock(Source::Manual(Arc::clone(&self.0)))
    }

    /// The time it shows.
    pub fn now(&self) -> Instant {
        self.0.lock().now
    }

    /// Turns it forward and lets every executor on it see what is due.
    pub fn advance(&self, by: Duration) {
        let mut state = self.0.lock();
        state.now += by;
        state.watchers.retain(|watcher| watcher.strong_count() > 0);
        let watchers = state.watchers.clone();
        drop(state);
        for executor in watchers.iter().filter_map(Weak::upgrade) {
            executor.notify();
        }
    }
}
