// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A small pool of threads for calls that block: open, close, munmap, preallocation.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::thread::JoinHandle;

use crate::error::Error;
use crate::oneshot;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut queue = self.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                job();
                queue = self.lock();
            } else if queue.closed {
                return;
            } else {
                queue = self
                    .changed
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

/// The pool. Every job that was given to it runs, also when nobody waits for it any more and when the pool is
/// dropped: a job may be what closes or unmaps something. Dropping the pool runs what is queued and joins.
pub struct Blocking {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Blocking {
    /// Starts `threads` threads (at least one) called `name`.
    ///
    /// # Errors
    /// [`Error::Thread`] when the kernel gives no thread; those started before are stopped again.
    pub fn new(name: &str, threads: usize) -> Result<Blocking, Error> {
        let mut pool = Blocking {
            shared: Arc::default(),
            threads: Vec::new(),
        };
        for _ in 0..threads.max(1) {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || shared.work())
                .map_err(|source| Error::Thread {
                    name: name.to_owned(),
                    source,
                })?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Queues `job` at once; the future resolves to its result. Dropping the future does not stop the job.
    ///
    /// # Panics
    /// The future panics with the job's own panic when the job did.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Finished<T> {
        let (done, result) = oneshot::channel();
        let job = Box::new(move || {
            // Nobody may be waiting any more; the job was run for its effect then.
            if let Err(Err(panic)) = done.send(catch_unwind(AssertUnwindSafe(job))) {
                drop(panic);
                tracing::error!("a blocking job that nobody waits for panicked");
            }
        });
        self.shared.lock().jobs.push_back(job);
        self.shared.changed.notify_one();
        Finished { result }
    }
}

impl Drop for Blocking {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        let here = std::thread::current().id();
        for thread in self.threads.drain(..) {
            // A job may own the pool's last reference: a thread cannot wait for itself.
            if thread.thread().id() != here && thread.join().is_err() {
                tracing::error!("a thread of the blocking pool died of a panic");
            }
        }
    }
}

impl fmt::Debug for Blocking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blocking")
            .field("threads", &self.threads.len())
            .finish_non_exhaustive()
    }
}

/// The result of a job to come. Made by [`Blocking::run`].
#[must_use = "futures do nothing unless polled (the job runs all the same)"]
pub struct Finished<T> {
    result: oneshot::Receiver<std::thread::Result<T>>,
}

impl<T> Future for Finished<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        match Pin::new(&mut self.result).poll(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(Ok(value))) => Poll::Ready(value),
            Poll::Ready(Some(Err(panic))) => resume_unwind(panic),
            // Every queued job is run and every run sends: only a second poll gets here.
            Poll::Ready(None) => panic!("a finished blocking job was polled again"),
        }
    }
}

impl<T> fmt::Debug for Finished<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Finished")
    }
}
