// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Waiting for a condition between tasks of one thread.

use std::cell::RefCell;
use std::future::poll_fn;
use std::task::{Poll, Waker};

/// Wakes tasks that wait for something to become true.
#[derive(Debug, Default)]
pub(super) struct Signal {
    waiting: RefCell<Vec<Waker>>,
}

impl Signal {
    /// Something changed: everybody looks again.
    pub(super) fn notify(&self) {
        // Taken out first: waking may run anything.
        let waiting = std::mem::take(&mut *self.waiting.borrow_mut());
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Ready when `condition` holds; it is evaluated now and after every [`Signal::notify`].
    pub(super) async fn until(&self, condition: impl Fn() -> bool) {
        poll_fn(|cx| {
            if condition() {
                return Poll::Ready(());
            }
            let mut waiting = self.waiting.borrow_mut();
            if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                waiting.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }
}
