// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Waiting for a gate to drain, as a future and as a blocking call.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

use crate::gate::Gate;
use crate::sync::Mutex;
use crate::word::Held;

/// A gate was not empty when its drain's deadline passed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("gate `{name}` is not drained: {held} still inside")]
pub struct Stalled {
    /// The gate's name.
    pub name: String,
    /// Who is still inside.
    pub held: Held,
}

/// The wakers of those who wait. Each future has its own key, so that it can replace or withdraw its waker.
#[derive(Default)]
pub(crate) struct Waiters {
    next_key: u64,
    wakers: Vec<(u64, Waker)>,
}

impl Waiters {
    /// Stores `waker` for `key` (a new key when `None`) and hands back the one it replaces.
    fn put(&mut self, key: &mut Option<u64>, waker: Waker) -> Option<Waker> {
        let key = *key.get_or_insert_with(|| {
            self.next_key += 1;
            self.next_key
        });
        if let Some((_, old)) = self.wakers.iter_mut().find(|(k, _)| *k == key) {
            return Some(std::mem::replace(old, waker));
        }
        self.wakers.push((key, waker));
        None
    }

    fn take(&mut self, key: u64) -> Option<Waker> {
        let at = self.wakers.iter().position(|(k, _)| *k == key)?;
        Some(self.wakers.swap_remove(at).1)
    }
}

/// Wakes everybody, outside the lock: a waker may run anything, also code that comes back to this gate.
pub(crate) fn wake_all(waiters: &Mutex<Waiters>) {
    let woken = std::mem::take(
        &mut waiters
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .wakers,
    );
    for (_, waker) in woken {
        waker.wake();
    }
}

/// Resolves once its gate is closed and nobody is inside. Made by [`Gate::drained`].
#[must_use = "futures do nothing unless polled"]
pub struct Drained {
    gate: Arc<Gate>,
    key: Option<u64>,
}

impl Drained {
    pub(crate) fn new(gate: Arc<Gate>) -> Drained {
        Drained { gate, key: None }
    }

    /// The gate it waits for, for reports about a drain that takes long.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }
}

impl Future for Drained {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        if this.gate.is_drained() {
            return Poll::Ready(());
        }
        let waker = cx.waker().clone();
        let mut waiters = this
            .gate
            .waiters()
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if this.gate.announce_waiter() {
            drop(waiters);
            return Poll::Ready(());
        }
        let replaced = waiters.put(&mut this.key, waker);
        drop(waiters);
        // Outside the lock: dropping a waker may drop a task, and with it a lease of this gate.
        drop(replaced);
        Poll::Pending
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let mut waiters = self
            .gate
            .waiters()
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let withdrawn = waiters.take(key);
        drop(waiters);
        drop(withdrawn);
    }
}

impl fmt::Debug for Drained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Drained")
            .field("gate", &self.gate)
            .finish_non_exhaustive()
    }
}

/// Unparks the thread that blocks in a drain.
struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

pub(crate) fn block(gate: &Arc<Gate>, deadline: Instant) -> Result<(), Stalled> {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut drained = gate.drained();
    loop {
        if Pin::new(&mut drained)
            .poll(&mut Context::from_waker(&waker))
            .is_ready()
        {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Stalled {
                name: gate.name().to_owned(),
                held: gate.held(),
            });
        }
        std::thread::park_timeout(left);
    }
}
