// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Waiting on a test's thread.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// How long a device may take for anything a test waits for.
pub const LIMIT: Duration = Duration::from_secs(60);

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs a future on this thread; `None` when it is not ready within `limit`.
pub fn block_on<T>(future: impl Future<Output = T>, limit: Duration) -> Option<T> {
    let end = Instant::now() + limit;
    drive(future, || {
        let left = end.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            std::thread::park_timeout(left);
        }
        !left.is_zero()
    })
}

/// Polls a future whenever `pass` returns; `None` when that says that it is enough.
pub(crate) fn drive<T>(
    future: impl Future<Output = T>,
    mut pass: impl FnMut() -> bool,
) -> Option<T> {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return Some(value);
        }
        if !pass() {
            return None;
        }
    }
}

/// Looks again and again until `done`; false when it is not within [`LIMIT`].
pub fn poll(mut done: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + LIMIT;
    while !done() {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    true
}
