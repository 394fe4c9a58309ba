// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The removal of a device whose driver is alive: what is in its queues is answered before its drain ends.
//!
//! ```text
//!   transport                                       the task of a queue
//!   a lease for each queue that listens ── put ──▶  take: pop what is there, answer with an error, give back what ends,
//!   close the gate                                  interrupt; drop the lease
//!   the gate has drained ◀────────────────────────────┘
//! ```
//!
//! A reset closes the gate only: nobody touches the queue any more, and no lease is left for it.

pub(crate) mod rest;

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Poll, Waker};

use ebbtide_gate::{Drained, Entry, Gate, Lease};
use ebbtide_models::seeded;

use crate::sync::{Mutex, lock};

/// What is said to the task of one queue.
#[derive(Default)]
struct State {
    /// Somebody will take the lease, or drop it.
    listens: bool,
    lease: Option<Lease>,
    waker: Option<Waker>,
}

/// The transport's way to the task of a queue.
pub struct Removal(Arc<Mutex<State>>);

/// The end of the task of a queue: dropped with it.
pub struct Removed(Arc<Mutex<State>>);

impl Removal {
    /// A pair for one queue of one activation. As long as nobody [listens](Removed::listen), a removal is the end as a
    /// reset is.
    pub fn new() -> (Removal, Removed) {
        let state = Arc::new(Mutex::new(State::default()));
        (Removal(Arc::clone(&state)), Removed(state))
    }

    /// Ends the activation behind `gate` because its device is removed. Never waits: the gate drains when the tasks of
    /// `queues` have answered what there is.
    pub fn begin(gate: &Arc<Gate>, queues: &[Removal]) {
        if seeded!("removal_closes_first") {
            gate.close();
        }
        for queue in queues {
            // None: the activation has ended.
            if let Some(lease) = gate.enter(Entry::Io) {
                queue.put(lease);
            }
        }
        gate.close();
    }

    fn put(&self, lease: Lease) {
        let mut state = lock(&self.0);
        if !state.listens {
            // The lease goes after the lock: it may be the last one.
            drop(state);
            return drop(lease);
        }
        state.lease = Some(lease);
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Removed {
    /// From now on a removal waits until the lease was taken and dropped, or this is dropped. To be called before the
    /// device's activation returns.
    pub fn listen(&self) {
        lock(&self.0).listens = true;
    }

    /// The right to answer what is in the queue; `None`: no removal has begun.
    pub fn take(&self) -> Option<Lease> {
        lock(&self.0).lease.take()
    }

    /// Ready when there is something to [`take`](Self::take). One task waits at a time.
    pub fn poll(&self, waker: &Waker) -> Poll<()> {
        let mut state = lock(&self.0);
        if state.lease.is_some() {
            return Poll::Ready(());
        }
        state.waker = Some(waker.clone());
        Poll::Pending
    }

    /// Ready when the task of the queue is to end: there is something to [`take`](Self::take), or the activation's gate
    /// has drained. Whoever waits for the gate alone waits for itself once it [listens](Self::listen).
    pub async fn ended(&self, drained: &mut Drained) {
        if seeded!("removal_waits_for_gate_alone") {
            return drained.await;
        }
        poll_fn(|cx| match self.poll(cx.waker()) {
            Poll::Ready(()) => Poll::Ready(()),
            Poll::Pending => Pin::new(&mut *drained).poll(cx),
        })
        .await;
    }
}

impl Drop for Removed {
    fn drop(&mut self) {
        if seeded!("removal_waits_for_ended_task") {
            return;
        }
        let mut state = lock(&self.0);
        state.listens = false;
        let lease = state.lease.take();
        drop(state);
        drop(lease);
    }
}
