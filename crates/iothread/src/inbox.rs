// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What other threads see of an executor: where they put tasks to run and jobs to start.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Wake;
use std::thread::ThreadId;

use async_task::Runnable;

use crate::doorbell::Doorbell;
use crate::error::Stopped;
use crate::event;
use crate::local::Local;

/// Starts a task from another thread: runs on the executor's.
pub(crate) type Job = Box<dyn FnOnce(&Local) + Send>;

/// What came from other threads since the last look.
#[derive(Default)]
pub(crate) struct Arrived {
    pub runnables: VecDeque<Runnable>,
    pub jobs: VecDeque<Job>,
}

#[derive(Default)]
struct Inbox {
    arrived: Arrived,
    closed: bool,
}

/// The part of an executor that is shared between threads.
pub(crate) struct Shared {
    name: Box<str>,
    ready: ThreadBound<RefCell<VecDeque<Runnable>>>,
    inbox: Mutex<Inbox>,
    main_woken: AtomicBool,
    abandoned: AtomicUsize,
    doorbell: Doorbell,
    bell: Arc<OwnedFd>,
}

impl Shared {
    /// The shared part of an executor that runs on this thread; `bell` is the eventfd that its ring reads.
    pub fn new(name: &str, bell: Arc<OwnedFd>) -> Arc<Shared> {
        Arc::new(Shared {
            name: name.into(),
            ready: ThreadBound::new(RefCell::default()),
            inbox: Mutex::default(),
            main_woken: AtomicBool::new(true),
            abandoned: AtomicUsize::new(0),
            doorbell: Doorbell::new(),
            bell,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn doorbell(&self) -> &Doorbell {
        &self.doorbell
    }

    /// Makes the executor look for work, also when it sleeps.
    pub fn notify(&self) {
        if self.doorbell.notify() {
            event::ring(&self.bell);
        }
    }

    /// Queues a task that was woken, from whatever thread.
    pub fn schedule(&self, runnable: Runnable) {
        match self.ready.get() {
            // The executor itself: it looks into this queue before it sleeps.
            Some(ready) => ready.borrow_mut().push_back(runnable),
            None => {
                self.inbox().arrived.runnables.push_back(runnable);
                self.notify();
            }
        }
    }

    /// Queues a job, unless the executor is stopping.
    pub fn start(&self, job: Job) -> Result<(), Stopped> {
        let mut inbox = self.inbox();
        if inbox.closed {
            return Err(Stopped);
        }
        inbox.arrived.jobs.push_back(job);
        drop(inbox);
        self.notify();
        Ok(())
    }

    /// Everything that other threads put in; on the executor's thread.
    pub fn arrived(&self) -> Arrived {
        std::mem::take(&mut self.inbox().arrived)
    }

    /// Refuses jobs from now on; woken tasks still arrive.
    pub fn close(&self) {
        self.inbox().closed = true;
    }

    /// The next task to poll. On the executor's thread; elsewhere there is none.
    pub fn next_ready(&self) -> Option<Runnable> {
        self.ready
            .get()
            .and_then(|ready| ready.borrow_mut().pop_front())
    }

    pub fn has_ready(&self) -> bool {
        self.ready_count() > 0
    }

    /// How many tasks wait to be polled. On the executor's thread.
    pub fn ready_count(&self) -> usize {
        self.ready.get().map_or(0, |ready| ready.borrow().len())
    }

    /// Whether the main future was woken since the last call.
    pub fn take_main_woken(&self) -> bool {
        self.main_woken.swap(false, Ordering::Acquire)
    }

    /// Operations whose memory was given up for good because the kernel never finished them.
    pub fn abandoned(&self) -> usize {
        self.abandoned.load(Ordering::Acquire)
    }

    pub fn set_abandoned(&self, operations: usize) {
        self.abandoned.store(operations, Ordering::Release);
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// Wakes the executor's main future.
pub(crate) struct MainWaker(pub Arc<Shared>);

impl Wake for MainWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.main_woken.store(true, Ordering::Release);
        self.0.notify();
    }
}

/// A value that only the thread that made it can reach.
struct ThreadBound<T> {
    owner: ThreadId,
    value: T,
}

impl<T> ThreadBound<T> {
    fn new(value: T) -> ThreadBound<T> {
        ThreadBound {
            owner: this_thread(),
            value,
        }
    }

    fn get(&self) -> Option<&T> {
        (self.owner == this_thread()).then_some(&self.value)
    }
}

// SAFETY: `get` gives the value to its owner thread only, and thread ids are never reused, so it is never shared
// between threads; it may still be dropped on another thread, hence `T: Send`.
unsafe impl<T: Send> Sync for ThreadBound<T> {}

fn this_thread() -> ThreadId {
    // `thread::current` counts a reference each time; waking a task is worth caching the id.
    std::thread_local! {
        static ID: ThreadId = std::thread::current().id();
    }
    ID.try_with(|id| *id)
        .unwrap_or_else(|_| std::thread::current().id())
}
