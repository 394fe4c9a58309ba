// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Timers of one executor, by deadline.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use crate::executor::Core;

/// Names a timer: its deadline, and a number that tells apart those of one deadline and keeps their order.
pub(crate) type TimerKey = (Instant, u64);

/// Who is to be woken when. An ordered map rather than a heap, for most timers are withdrawn before they are due.
#[derive(Default)]
pub(crate) struct Timers {
    next: u64,
    pending: BTreeMap<TimerKey, Waker>,
}

impl Timers {
    pub fn insert(&mut self, deadline: Instant, waker: Waker) -> TimerKey {
        self.next += 1;
        let key = (deadline, self.next);
        self.pending.insert(key, waker);
        key
    }

    /// Replaces the waker of a timer; hands back what it does not need.
    pub fn replace(&mut self, key: TimerKey, waker: Waker) -> Option<Waker> {
        self.pending.insert(key, waker)
    }

    pub fn remove(&mut self, key: TimerKey) -> Option<Waker> {
        self.pending.remove(&key)
    }

    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    pub fn next_deadline(&self) -> Option<Instant> {
        self.pending
            .first_key_value()
            .map(|((deadline, _), _)| *deadline)
    }

    /// Takes out one that is due, the earliest first.
    pub fn pop_due(&mut self, now: Instant) -> Option<Waker> {
        let first = self.pending.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }

    pub fn clear(&mut self) -> BTreeMap<TimerKey, Waker> {
        std::mem::take(&mut self.pending)
    }
}

/// Resolves at its deadline. Made by [`Local::sleep`](crate::Local::sleep).
#[must_use = "futures do nothing unless polled"]
pub struct Sleep {
    core: Rc<Core>,
    deadline: Instant,
    key: Option<TimerKey>,
}

impl Sleep {
    pub(crate) fn new(core: Rc<Core>, deadline: Instant) -> Sleep {
        Sleep {
            core,
            deadline,
            key: None,
        }
    }

    /// When it resolves.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.core.now() >= self.deadline {
            return Poll::Ready(());
        }
        let waker = cx.waker().clone();
        let core = Rc::clone(&self.core);
        let mut timers = core.timers();
        let replaced = match self.key {
            Some(key) => timers.replace(key, waker),
            None => {
                self.key = Some(timers.insert(self.deadline, waker));
                None
            }
        };
        drop(timers);
        drop(replaced);
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let withdrawn = self.core.timers().remove(key);
        drop(withdrawn);
    }
}

impl fmt::Debug for Sleep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sleep")
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}
