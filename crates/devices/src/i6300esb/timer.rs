// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The clock of the watchdog: a task of an iothread.
//!
//! ```text
//! vCPU ── registers' lock ── Orders::set ──▶ latest order ──▶ serve ── sleep ──▶ expired(number)
//!                                                              ▲                     │
//!                                                              └── registers' lock ◀─┘ number still the latest?
//! ```
//!
//! Only the latest order counts, so a guest that writes without end makes no queue grow. A timer may have run off when
//! the guest reloads it: each run has a number, and who is told that one ended compares it under the lock under which
//! runs are ordered.

use std::future::poll_fn;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use ebbtide_iothread::{Either, Local, race};
use ebbtide_models::seeded;

use crate::sync::{Mutex, lock};

/// A countdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// No two runs of a timer have the same.
    pub number: u64,
    /// How long, from when the order is taken.
    pub length: Duration,
}

/// What the clock is to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Order {
    /// The countdown, if there is one.
    pub run: Option<Run>,
    /// Time stands still.
    pub paused: bool,
}

/// Which run counts. It is kept under the lock under which runs are ordered.
#[derive(Debug, Default)]
pub struct Runs(u64);

impl Runs {
    /// Orders another run, or none, in place of the last.
    pub fn order(&mut self, orders: &Orders, length: Option<Duration>) {
        // In 64 bits they do not come round.
        self.0 = self.0.wrapping_add(1);
        let number = self.0;
        orders.set(|order| order.run = length.map(|length| Run { number, length }));
    }

    /// Whether nothing else was ordered since.
    pub fn is_latest(&self, number: u64) -> bool {
        self.0 == number || seeded!("stale_run_counts")
    }
}

/// The latest order.
#[derive(Default)]
pub struct Orders(Mutex<State>);

#[derive(Default)]
struct State {
    order: Order,
    changed: bool,
    closed: bool,
    waiting: Option<Waker>,
}

impl Orders {
    /// Changes the order.
    pub fn set(&self, change: impl FnOnce(&mut Order)) {
        self.wake(|state| {
            change(&mut state.order);
            state.changed = true;
        });
    }

    /// There will be no other: the clock ends.
    pub fn close(&self) {
        self.wake(|state| state.closed = true);
    }

    fn wake(&self, change: impl FnOnce(&mut State)) {
        let mut state = lock(&self.0);
        change(&mut state);
        let waker = state.waiting.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Waits for another order than the last one taken; `None` at the end.
    pub async fn next(&self) -> Option<Order> {
        poll_fn(|context| {
            let mut state = lock(&self.0);
            if state.closed {
                return Poll::Ready(None);
            }
            if std::mem::take(&mut state.changed) {
                return Poll::Ready(Some(state.order));
            }
            if seeded!("order_missed") {
                drop(state);
                state = lock(&self.0);
            }
            state.waiting = Some(context.waker().clone());
            Poll::Pending
        })
        .await
    }
}

/// A countdown that was begun.
#[derive(Clone, Copy)]
struct Running {
    number: u64,
    until: Instant,
}

/// Runs the timer until the orders end; tells each run that came to its end.
pub(super) async fn serve(local: &Local, orders: &Orders, expired: impl Fn(u64)) {
    let mut running: Option<Running> = None;
    let mut paused_at: Option<Instant> = None;
    loop {
        let next = match (running, paused_at) {
            (Some(run), None) => race(orders.next(), local.sleep_until(run.until)).await,
            _ => Either::Left(orders.next().await),
        };
        match next {
            Either::Left(None) => return,
            Either::Left(Some(order)) => {
                let now = local.now();
                let pause = order.paused.then(|| paused_at.unwrap_or(now));
                running = follow(running, paused_at, order, now);
                paused_at = pause;
            }
            Either::Right(()) => {
                if let Some(run) = running.take() {
                    expired(run.number);
                }
            }
        }
    }
}

/// The countdown after `order`, which is taken at `now`. While time stands still deadlines are those of the moment at
/// which it stopped; they move when it goes on.
fn follow(
    running: Option<Running>,
    paused_at: Option<Instant>,
    order: Order,
    now: Instant,
) -> Option<Running> {
    let time = paused_at.unwrap_or(now);
    let run = order.run?;
    // A deadline no instant can hold is no deadline: the longest run is 18 minutes.
    let until = match running.filter(|running| running.number == run.number) {
        Some(running) => running.until,
        None => time.checked_add(run.length)?,
    };
    let stood = match order.paused {
        true => Duration::ZERO,
        false => now.saturating_duration_since(time),
    };
    Some(Running {
        number: run.number,
        until: until.checked_add(stood)?,
    })
}
