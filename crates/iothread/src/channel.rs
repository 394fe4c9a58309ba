// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A queue of messages from many senders to one task. Works on any executor and between any threads.
//!
//! It has no bound: who can send without limit (a guest, a client) has to be limited before it gets here.

use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

struct State<T> {
    queue: VecDeque<T>,
    waker: Option<Waker>,
    senders: usize,
    receiver_alive: bool,
}

struct Shared<T>(Mutex<State<T>>);

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a channel.
pub fn channel<T: Send>() -> (Sender<T>, Receiver<T>) {
    let state = State {
        queue: VecDeque::new(),
        waker: None,
        senders: 1,
        receiver_alive: true,
    };
    let shared = Arc::new(Shared(Mutex::new(state)));
    (
        Sender {
            shared: Arc::clone(&shared),
        },
        Receiver {
            shared,
            in_a_row: 0,
        },
    )
}

/// Puts messages in. Clone it for each who sends.
pub struct Sender<T> {
    shared: Arc<Shared<T>>,
}

impl<T> Sender<T> {
    /// Queues `message`; never blocks. False (and the message is dropped) when the receiver is gone.
    pub fn send(&self, message: T) -> bool {
        let mut state = self.shared.lock();
        if !state.receiver_alive {
            return false;
        }
        state.queue.push_back(message);
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.shared.lock().senders += 1;
        Sender {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.senders -= 1;
        let waker = if state.senders == 0 {
            state.waker.take()
        } else {
            None
        };
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// How many messages are taken in a row before the executor's other tasks get a turn.
const MESSAGES_IN_A_ROW: u32 = 128;

/// Takes messages out, in the order of their `send`.
pub struct Receiver<T> {
    shared: Arc<Shared<T>>,
    in_a_row: u32,
}

impl<T> Receiver<T> {
    /// The next message; `None` when the queue is empty and all senders are gone. Dropping the future loses nothing.
    ///
    /// A task that receives without end still lets others run: now and then this yields although there are messages.
    pub async fn recv(&mut self) -> Option<T> {
        poll_fn(|cx| self.poll_recv(cx)).await
    }

    /// The next message if there is one now.
    pub fn try_recv(&mut self) -> Option<T> {
        self.shared.lock().queue.pop_front()
    }

    /// [`recv`](Self::recv) for hand-written futures.
    pub fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Option<T>> {
        if self.in_a_row == MESSAGES_IN_A_ROW {
            self.in_a_row = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let waker = cx.waker().clone();
        let mut state = self.shared.lock();
        if let Some(message) = state.queue.pop_front() {
            self.in_a_row += 1;
            return Poll::Ready(Some(message));
        }
        self.in_a_row = 0;
        if state.senders == 0 {
            return Poll::Ready(None);
        }
        let replaced = state.waker.replace(waker);
        drop(state);
        drop(replaced);
        Poll::Pending
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.receiver_alive = false;
        let leftovers = (std::mem::take(&mut state.queue), state.waker.take());
        drop(state);
        // Outside the lock: a message may own a sender of this very channel.
        drop(leftovers);
    }
}

impl<T> fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sender")
    }
}

impl<T> fmt::Debug for Receiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Receiver")
    }
}
