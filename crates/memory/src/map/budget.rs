// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How much bounce buffer one device may have at once, and who waits for it.
//!
//! Waiters are served in the order they came, also when a later one would fit earlier: else a
//! large request could wait for ever behind small ones. What is given back is handed to the
//! waiter while the lock is held, so no newcomer can take it before the waiter runs.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use ebbtide_models::seeded;

use crate::sync::{Mutex, lock};

/// The bytes of one device.
pub(crate) struct Budget {
    limit: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    used: u64,
    last_key: u64,
    /// First come, first served.
    queue: VecDeque<Waiter>,
    /// Served, but not told yet.
    served: Vec<u64>,
}

struct Waiter {
    key: u64,
    bytes: u64,
    waker: Option<Waker>,
}

impl State {
    /// Serves who is first in the queue for as long as there is room; whom to wake is added to
    /// `wakers`.
    fn serve(&mut self, limit: u64, wakers: &mut Vec<Waker>) {
        while let Some(first) = self.queue.front() {
            if self.used + first.bytes > limit {
                return;
            }
            let Some(mut first) = self.queue.pop_front() else {
                return;
            };
            self.used += first.bytes;
            self.served.push(first.key);
            wakers.extend(first.waker.take());
            if seeded!("bounce_serves_one") {
                return;
            }
        }
    }

    fn take_served(&mut self, key: u64) -> bool {
        let at = self.served.iter().position(|served| *served == key);
        at.map(|at| self.served.swap_remove(at)).is_some()
    }
}

impl Budget {
    pub(crate) fn new(limit: u64) -> Arc<Budget> {
        Arc::new(Budget {
            limit,
            state: Mutex::new(State::default()),
        })
    }

    /// The bytes there are in all.
    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    /// The bytes in use.
    pub(crate) fn used(&self) -> u64 {
        lock(&self.state).used
    }

    /// `bytes` (at most the limit) at once, or a place in the queue for them.
    pub(crate) fn take(self: &Arc<Self>, bytes: u64) -> Result<BounceGrant, BounceWait> {
        let mut state = lock(&self.state);
        if state.queue.is_empty() && state.used + bytes <= self.limit {
            state.used += bytes;
            return Ok(BounceGrant {
                budget: Arc::clone(self),
                bytes,
            });
        }
        if seeded!("bounce_queue_late") {
            drop(state);
            state = lock(&self.state);
        }
        state.last_key += 1;
        let key = state.last_key;
        state.queue.push_back(Waiter {
            key,
            bytes,
            waker: None,
        });
        drop(state);
        Err(BounceWait {
            budget: Arc::clone(self),
            key,
            bytes,
            done: false,
        })
    }

    fn give_back(&self, bytes: u64) {
        let mut wakers = Vec::new();
        let mut state = lock(&self.state);
        state.used -= bytes;
        state.serve(self.limit, &mut wakers);
        drop(state);
        // Outside the lock: a waker may run anything, also code that maps again.
        wakers.into_iter().for_each(Waker::wake);
    }
}

/// The right to some bytes of a device's bounce buffer; given back when dropped.
pub struct BounceGrant {
    budget: Arc<Budget>,
    bytes: u64,
}

impl BounceGrant {
    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn is_of(&self, budget: &Arc<Budget>) -> bool {
        Arc::ptr_eq(&self.budget, budget)
    }
}

impl Drop for BounceGrant {
    fn drop(&mut self) {
        self.budget.give_back(self.bytes);
    }
}

impl fmt::Debug for BounceGrant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BounceGrant({} bytes)", self.bytes)
    }
}

/// A place in the queue for bounce buffer. It counts from when it was made, not from its first
/// poll. Dropped, it gives its place up.
#[must_use = "dropping it gives the place in the queue up"]
pub struct BounceWait {
    budget: Arc<Budget>,
    key: u64,
    bytes: u64,
    done: bool,
}

impl BounceWait {
    /// Bytes waited for.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Future for BounceWait {
    type Output = BounceGrant;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<BounceGrant> {
        let this = &mut *self;
        let waker = cx.waker().clone();
        let mut state = lock(&this.budget.state);
        if state.take_served(this.key) {
            this.done = true;
            let (budget, bytes) = (Arc::clone(&this.budget), this.bytes);
            return Poll::Ready(BounceGrant { budget, bytes });
        }
        let mut queue = state.queue.iter_mut();
        let waiter = queue.find(|waiter| waiter.key == this.key);
        let replaced = waiter.and_then(|waiter| waiter.waker.replace(waker));
        drop(state);
        // Outside the lock: dropping a waker may drop a task, and with it a grant.
        drop(replaced);
        Poll::Pending
    }
}

impl Drop for BounceWait {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let mut wakers = Vec::new();
        let mut state = lock(&self.budget.state);
        if state.take_served(self.key) {
            if seeded!("bounce_keeps_unclaimed") {
                return;
            }
            state.used -= self.bytes;
        }
        let at = state.queue.iter().position(|waiter| waiter.key == self.key);
        let withdrawn = at.and_then(|at| state.queue.remove(at));
        // Who was behind may fit now.
        state.serve(self.budget.limit, &mut wakers);
        drop(state);
        drop(withdrawn);
        wakers.into_iter().for_each(Waker::wake);
    }
}

impl fmt::Debug for BounceWait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BounceWait({} bytes)", self.bytes)
    }
}
