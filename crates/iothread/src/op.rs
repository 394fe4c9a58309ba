// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One operation on a ring, as a future.

use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use io_uring::squeue;

use crate::executor::Core;
use crate::ring::Dropped;
use crate::slots::Key;

/// An operation under way: resolves to the kernel's result (≥ 0, or a negated errno) and what was kept for it.
///
/// It is under way whether it is polled or not. Dropping it asks the kernel to cancel the operation; the ring owns
/// what was kept until the kernel has answered, however long that takes. Made by
/// [`Local::submit`](crate::Local::submit).
#[must_use = "dropping an operation cancels it"]
pub struct Op<K: 'static> {
    core: Rc<Core>,
    state: State<K>,
    _kept: PhantomData<K>,
}

enum State<K> {
    InFlight(Key),
    /// The executor is stopping: never submitted.
    Refused(Box<K>),
    Finished,
}

// Nothing is pinned inside: what the kernel points to is in a box of its own.
impl<K> Unpin for Op<K> {}

impl<K: 'static> Op<K> {
    /// # Safety
    /// As [`Local::submit`](crate::Local::submit), where `prepare` makes the entry from the kept value in its
    /// final place.
    pub(crate) unsafe fn new(
        core: &Rc<Core>,
        keep: K,
        prepare: impl FnOnce(&mut K) -> squeue::Entry,
    ) -> Op<K> {
        let mut keep = Box::new(keep);
        let entry = prepare(&mut keep);
        // SAFETY: the caller's promise; the box is owned by the ring from here and does not move.
        let submitted = unsafe { core.ring().submit(entry, keep) };
        let state = match submitted {
            Ok(key) => State::InFlight(key),
            Err(keep) => State::Refused(typed(keep)),
        };
        Op {
            core: Rc::clone(core),
            state,
            _kept: PhantomData,
        }
    }

    /// Asks the kernel to cancel the operation, which still resolves: to `-ECANCELED` or `-EINTR` if it was
    /// cancelled in time, else to its result. Does nothing once it has ended.
    pub fn cancel(&self) {
        if let State::InFlight(key) = self.state {
            self.core.ring().cancel(key);
        }
    }
}

fn typed<K: 'static>(keep: crate::slots::Keep) -> Box<K> {
    // The ring hands back the box it was given for this key.
    keep.downcast()
        .unwrap_or_else(|_| unreachable!("the ring mixed up two operations"))
}

impl<K: 'static> Future for Op<K> {
    type Output = (i32, K);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<(i32, K)> {
        match std::mem::replace(&mut self.state, State::Finished) {
            State::Refused(keep) => Poll::Ready((-libc::ECANCELED, *keep)),
            State::InFlight(key) => {
                let polled = self.core.ring().poll(key, cx.waker());
                match polled {
                    Some(Ok((result, keep))) => Poll::Ready((result, *typed(keep))),
                    Some(Err(replaced)) => {
                        self.state = State::InFlight(key);
                        drop(replaced);
                        Poll::Pending
                    }
                    None => unreachable!("the ring lost an operation"),
                }
            }
            State::Finished => panic!("a finished operation was polled again"),
        }
    }
}

impl<K: 'static> Drop for Op<K> {
    fn drop(&mut self) {
        let State::InFlight(key) = self.state else {
            return;
        };
        // The ring is not borrowed any more when what it gives back is dropped: that may run any code.
        let dropped = self.core.ring().abandon(key);
        match dropped {
            Dropped::Free(operation) => drop(operation),
            Dropped::Cancelling(phase) => drop(phase),
            Dropped::Gone => {}
        }
    }
}

impl<K> fmt::Debug for Op<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Op")
    }
}
