// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tasks of one executor, and the list of those that are alive.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use crate::executor::Core;

/// A task: resolves to what its future returned. Dropping it cancels the task; [`detach`](Self::detach) lets it
/// run on by itself.
///
/// A cancelled task's future is dropped by its executor, soon but not at once; [`cancel`](Self::cancel) waits
/// for that.
///
/// # Panics
/// Awaiting a task panics when its executor has stopped before the task was done.
#[must_use = "dropping a task cancels it; detach() lets it run"]
pub struct Task<T>(async_task::Task<T>);

impl<T> Task<T> {
    /// Lets the task run to its end without anybody waiting for it.
    pub fn detach(self) {
        self.0.detach();
    }

    /// Cancels the task and waits until its future is dropped; its result if it had ended before.
    pub async fn cancel(self) -> Option<T> {
        self.0.cancel().await
    }

    /// True once its future has returned or was dropped.
    pub fn is_finished(&self) -> bool {
        self.0.is_finished()
    }
}

impl<T> Future for Task<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        Pin::new(&mut self.0).poll(cx)
    }
}

impl<T> fmt::Debug for Task<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Task")
            .field("finished", &self.is_finished())
            .finish()
    }
}

/// The tasks whose futures are alive: what stopping has to drop.
#[derive(Default)]
pub(crate) struct Registry {
    wakers: Vec<Option<Waker>>,
    free: Vec<usize>,
}

impl Registry {
    fn reserve(&mut self) -> usize {
        self.free.pop().unwrap_or_else(|| {
            self.wakers.push(None);
            self.wakers.len() - 1
        })
    }

    fn release(&mut self, at: usize) -> Option<Waker> {
        self.free.push(at);
        self.wakers.get_mut(at).and_then(Option::take)
    }

    pub fn is_empty(&self) -> bool {
        self.free.len() == self.wakers.len()
    }

    pub fn wakers(&self) -> Vec<Waker> {
        self.wakers.iter().flatten().cloned().collect()
    }
}

/// A future that is in the registry as long as it exists.
struct Registered<F> {
    future: F,
    _entry: Entry,
}

/// Dropped after the future it stands for.
struct Entry {
    core: Rc<Core>,
    at: usize,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let waker = self.core.tasks().release(self.at);
        drop(waker);
    }
}

impl<F: Future> Future for Registered<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        // SAFETY: `future` is pinned whenever `self` is: it is never moved out, and `Registered` has no Drop and
        // is Unpin only if F is.
        unsafe { self.map_unchecked_mut(|this| &mut this.future) }.poll(cx)
    }
}

pub(crate) fn spawn<T: 'static>(
    core: &Rc<Core>,
    future: impl Future<Output = T> + 'static,
) -> Task<T> {
    let at = core.tasks().reserve();
    let entry = Entry {
        core: Rc::clone(core),
        at,
    };
    let shared = Arc::clone(core.shared());
    let schedule = move |runnable| shared.schedule(runnable);
    let (runnable, task) = async_task::spawn_local(
        Registered {
            future,
            _entry: entry,
        },
        schedule,
    );
    if core.is_stopping() {
        // Dropped here, never polled: there is no loop any more that would.
        drop(runnable);
    } else {
        core.tasks().wakers[at] = Some(runnable.waker());
        runnable.schedule();
    }
    Task(task)
}
