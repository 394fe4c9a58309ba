// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The handle that tasks have to their executor.

use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use io_uring::squeue;

use crate::error::Elapsed;
use crate::executor::Core;
use crate::op::Op;
use crate::task::{self, Task};
use crate::thread::Remote;
use crate::timers::Sleep;

/// For durations that no instant can hold.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// The executor of this thread. It stays on its thread; [`remote`](Self::remote) makes the handle that travels.
#[derive(Clone)]
pub struct Local {
    core: Rc<Core>,
}

impl Local {
    pub(crate) fn new(core: Rc<Core>) -> Local {
        Local { core }
    }

    pub(crate) fn core(&self) -> &Rc<Core> {
        &self.core
    }

    /// Starts a task. It is first polled after the caller has yielded.
    ///
    /// When the executor is stopping the future is dropped at once.
    pub fn spawn<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> Task<T> {
        task::spawn(&self.core, future)
    }

    /// The handle for other threads.
    pub fn remote(&self) -> Remote {
        Remote::new(Arc::clone(self.core.shared()))
    }

    /// The time of this executor's clock: the only time its timers know.
    pub fn now(&self) -> Instant {
        self.core.now()
    }

    /// The time at which this turn of the executor first asked for it: for who would ask the clock once per request.
    pub fn turn_time(&self) -> Instant {
        self.core.turn_time()
    }

    /// Resolves after `duration`.
    pub fn sleep(&self, duration: Duration) -> Sleep {
        let now = self.now();
        self.sleep_until(now.checked_add(duration).unwrap_or(now + FOREVER))
    }

    /// Resolves at `deadline`. Timers of one deadline fire in the order in which they were first polled.
    pub fn sleep_until(&self, deadline: Instant) -> Sleep {
        Sleep::new(Rc::clone(&self.core), deadline)
    }

    /// Waits for `future`, but no longer than `duration` from the first poll; then drops it.
    ///
    /// # Errors
    /// [`Elapsed`] when the time ran out first. A future that is ready in time wins.
    pub async fn timeout<T>(
        &self,
        duration: Duration,
        future: impl Future<Output = T>,
    ) -> Result<T, Elapsed> {
        let mut future = pin!(future);
        let mut sleep = pin!(self.sleep(duration));
        poll_fn(|cx| match future.as_mut().poll(cx) {
            Poll::Ready(result) => Poll::Ready(Ok(result)),
            Poll::Pending => sleep.as_mut().poll(cx).map(|()| Err(Elapsed)),
        })
        .await
    }

    /// Lets the other tasks that are ready, and completions, go first.
    pub async fn yield_now(&self) {
        let mut yielded = false;
        poll_fn(|cx| {
            if yielded {
                return Poll::Ready(());
            }
            yielded = true;
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    /// Yields if this task has made too many calls in a row that did not have to wait.
    pub(crate) async fn share(&self) {
        if self.core.spend_call() {
            self.yield_now().await;
        }
    }

    /// Submits one operation. It resolves to the kernel's result (a negated errno is an error) and `keep`.
    ///
    /// It is staged now and handed to the kernel at the end of the executor's turn, whether it is polled or not.
    /// `keep` belongs to the ring until the operation's CQE, also when the future or the whole executor is
    /// dropped; dropping the future asks the kernel to cancel. An executor that is stopping answers `-ECANCELED`.
    /// So whatever must outlast the operation belongs into `keep`: buffers, files, but also a lease that holds up
    /// a drain until the kernel is through.
    ///
    /// # Safety
    /// - Every pointer and every descriptor in `entry` stays valid as long as `keep` lives, wherever `keep` is
    ///   moved to, and what the kernel writes to is not accessed in any other way meanwhile.
    /// - `entry` sets none of the flags `IO_LINK`, `IO_HARDLINK`, `IO_DRAIN`, `SKIP_SUCCESS`, and posts exactly
    ///   one CQE without `F_MORE`, its last.
    pub unsafe fn submit<K: 'static>(&self, entry: squeue::Entry, keep: K) -> Op<K> {
        // SAFETY: the caller's promise.
        unsafe { Op::new(&self.core, keep, |_| entry) }
    }

    /// As [`submit`](Self::submit), with the entry made from `keep` once that is in its final place: so the entry
    /// may point into `keep` itself (an inline iovec array, a socket address).
    ///
    /// # Safety
    /// As [`submit`](Self::submit), except that `keep` does not move until the operation has ended.
    pub unsafe fn submit_with<K: 'static>(
        &self,
        keep: K,
        prepare: impl FnOnce(&mut K) -> squeue::Entry,
    ) -> Op<K> {
        // SAFETY: the caller's promise.
        unsafe { Op::new(&self.core, keep, prepare) }
    }
}

impl fmt::Debug for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Local")
            .field("name", &self.core.shared().name())
            .finish_non_exhaustive()
    }
}
