// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupt controllers that keep what they are told.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ebbtide_bus::irq::{IrqError, IrqLine, MsiController, MsiMessage, MsiRoute};

/// Counts the messages devices send, by message. Clones are the same.
#[derive(Clone, Default)]
pub struct Interrupts(Arc<Shared>);

#[derive(Default)]
struct Shared {
    counts: Mutex<HashMap<MsiMessage, u64>>,
    arrived: Condvar,
    routes: Mutex<usize>,
}

impl Interrupts {
    /// How often `message` arrived.
    pub fn count(&self, message: MsiMessage) -> u64 {
        lock(&self.0.counts).get(&message).copied().unwrap_or(0)
    }

    /// Waits until `message` arrived at least `count` times; false when it did not within `limit`.
    pub fn wait(&self, message: MsiMessage, count: u64, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let mut counts = lock(&self.0.counts);
        while counts.get(&message).copied().unwrap_or(0) < count {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            counts = self
                .0
                .arrived
                .wait_timeout(counts, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    /// Routes that are allocated.
    pub fn routes(&self) -> usize {
        *lock(&self.0.routes)
    }
}

impl MsiController for Interrupts {
    fn route(&self) -> Result<Arc<dyn MsiRoute>, IrqError> {
        *lock(&self.0.routes) += 1;
        Ok(Arc::new(Route {
            shared: Arc::clone(&self.0),
            message: Mutex::new(None),
        }))
    }
}

struct Route {
    shared: Arc<Shared>,
    message: Mutex<Option<MsiMessage>>,
}

impl MsiRoute for Route {
    fn program(&self, message: Option<MsiMessage>) -> Result<(), IrqError> {
        *lock(&self.message) = message;
        Ok(())
    }

    fn signal(&self) {
        if let Some(message) = *lock(&self.message) {
            *lock(&self.shared.counts).entry(message).or_default() += 1;
            self.shared.arrived.notify_all();
        }
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        *lock(&self.shared.routes) -= 1;
    }
}

/// An input of the interrupt controller.
#[derive(Default)]
pub struct Level(AtomicBool);

impl Level {
    /// Whether somebody asserts it.
    pub fn is_high(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

impl IrqLine for Level {
    fn set(&self, high: bool) {
        self.0.store(high, Ordering::SeqCst);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
