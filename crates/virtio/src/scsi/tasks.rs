// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands under way, for task management functions.
//!
//! ```text
//!   running ──── answer published ────► gone ◄── a function waits for this
//!      │                                  ▲
//!      └─ abort ─► aborted ── backend operation ended, answer "aborted" published
//! ```
//!
//! A command that the backend has cannot be taken back: its memory may still be written to. So aborting one decides
//! what is answered and keeps it from beginning another operation, and the function is answered when the command is
//! gone. Drivers rely on that order: when the function is answered, they look for the command's answer.
//!
//! Each queue has its own list, which only its own thread and task management lock.

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::sync::Arc;
use std::task::{Poll, Waker};

use ebbtide_models::seeded;

use super::request::Address;
use crate::sync::{Mutex, MutexGuard, lock};

/// What is to become of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is answered with its result.
    Running,
    /// A function aborted it.
    Aborted,
    /// A function reset its unit.
    Reset,
}

/// What functions tell commands apart by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub address: Address,
    pub tag: u64,
    fate: Fate,
}

#[derive(Default)]
struct Queue {
    last: u64,
    running: BTreeMap<u64, Entry>,
    /// Functions that wait for one of them.
    waiters: Vec<Waker>,
}

/// The lists of all queues.
pub(super) struct Tasks {
    queues: Vec<Mutex<Queue>>,
}

/// A command under way; it is gone when this is dropped.
pub(super) struct Task {
    tasks: Arc<Tasks>,
    queue: usize,
    number: u64,
}

impl Tasks {
    pub(super) fn new(queues: usize) -> Arc<Tasks> {
        let queues = (0..queues).map(|_| Mutex::new(Queue::default())).collect();
        Arc::new(Tasks { queues })
    }

    fn queue(&self, queue: usize) -> Option<MutexGuard<'_, Queue>> {
        self.queues.get(queue).map(lock)
    }

    /// A command begins on `queue`.
    pub(super) fn begin(self: &Arc<Self>, queue: usize, address: Address, tag: u64) -> Task {
        let mut number = 0;
        if let Some(mut list) = self.queue(queue) {
            list.last += 1;
            number = list.last;
            let fate = Fate::Running;
            let entry = Entry { address, tag, fate };
            list.running.insert(number, entry);
        }
        Task {
            tasks: Arc::clone(self),
            queue,
            number,
        }
    }

    /// Whether one of those that `matching` chooses is under way.
    pub(super) fn any(&self, matching: impl Fn(&Entry) -> bool) -> bool {
        let mut queues = self.queues.iter();
        queues.any(|queue| lock(queue).running.values().any(&matching))
    }

    /// Seals the fate of those that `matching` chooses now. Ready when all of them are gone; those that begin later do
    /// not matter.
    pub(super) fn end(
        self: &Arc<Self>,
        fate: Fate,
        matching: impl Fn(&Entry) -> bool,
    ) -> impl Future<Output = ()> + 'static {
        let mut chosen = Vec::new();
        for (at, queue) in self.queues.iter().enumerate() {
            for (number, entry) in &mut lock(queue).running {
                if matching(entry) {
                    entry.fate = fate;
                    chosen.push((at, *number));
                }
            }
        }
        let tasks = Arc::clone(self);
        poll_fn(move |cx| {
            if seeded!("function_does_not_wait") {
                chosen.clear();
            }
            while let Some(&(queue, number)) = chosen.last() {
                if let Some(mut list) = tasks.queue(queue)
                    && list.running.contains_key(&number)
                {
                    // Under the lock that its end takes.
                    if !list.waiters.iter().any(|w| w.will_wake(cx.waker())) {
                        list.waiters.push(cx.waker().clone());
                    }
                    return Poll::Pending;
                }
                chosen.pop();
            }
            Poll::Ready(())
        })
    }
}

impl Task {
    pub(super) fn fate(&self) -> Fate {
        self.tasks
            .queue(self.queue)
            .and_then(|list| Some(list.running.get(&self.number)?.fate))
            .unwrap_or(Fate::Running)
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        let Some(mut list) = self.tasks.queue(self.queue) else {
            return;
        };
        if seeded!("wakes_before_it_is_gone") {
            let waiters = std::mem::take(&mut list.waiters);
            drop(list);
            waiters.into_iter().for_each(Waker::wake);
            if let Some(mut list) = self.tasks.queue(self.queue) {
                list.running.remove(&self.number);
            }
            return;
        }
        list.running.remove(&self.number);
        let waiters = std::mem::take(&mut list.waiters);
        drop(list);
        waiters.into_iter().for_each(Waker::wake);
    }
}

/// For the models.
#[cfg(loom)]
#[doc(hidden)]
pub mod modelled {
    use ebbtide_scsi::Lun;

    use super::*;

    /// The commands of a unit.
    pub struct Commands(Arc<Tasks>);

    /// One under way until it is dropped.
    pub struct Command {
        _task: Task,
    }

    impl Commands {
        /// None yet, on as many queues.
        pub fn new(queues: usize) -> Commands {
            Commands(Tasks::new(queues))
        }

        /// One begins.
        pub fn begin(&self, queue: usize) -> Command {
            let lun = Lun::from_bytes([0, 0]).expect("the first");
            let address = Address { target: 0, lun };
            Command {
                _task: self.0.begin(queue, address, 0),
            }
        }

        /// Aborts all there are.
        pub fn abort(&self) -> impl Future<Output = ()> + 'static {
            self.0.end(Fate::Aborted, |_| true)
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::pin::pin;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Wake};

    use ebbtide_scsi::Lun;

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn address(target: u8) -> Address {
        let lun = Lun::new(0).unwrap();
        Address { target, lun }
    }

    #[test]
    fn a_function_waits_for_what_was_there() {
        let tasks = Tasks::new(2);
        let first = tasks.begin(0, address(1), 7);
        let second = tasks.begin(1, address(1), 7);
        let other = tasks.begin(1, address(2), 7);
        let mut end = pin!(tasks.end(Fate::Aborted, |entry| entry.address == address(1)));
        let late = tasks.begin(0, address(1), 7);
        assert_eq!(
            (first.fate(), second.fate()),
            (Fate::Aborted, Fate::Aborted)
        );
        assert_eq!((other.fate(), late.fate()), (Fate::Running, Fate::Running));
        let count = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&count));
        let mut cx = Context::from_waker(&waker);
        assert!(end.as_mut().poll(&mut cx).is_pending());
        assert!(end.as_mut().poll(&mut cx).is_pending());
        drop(second);
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
        assert!(end.as_mut().poll(&mut cx).is_pending());
        drop(first);
        assert_eq!(count.0.load(Ordering::SeqCst), 2);
        assert!(end.as_mut().poll(&mut cx).is_ready());
        assert!(tasks.any(|entry| entry.address == address(1)));
        drop(late);
        assert!(!tasks.any(|entry| entry.address == address(1)));
        drop(other);
        assert!(!tasks.any(|_| true));
    }

    #[test]
    fn nothing_to_wait_for() {
        let tasks = Tasks::new(1);
        let mut end = pin!(tasks.end(Fate::Reset, |_| true));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(end.as_mut().poll(&mut cx).is_ready());
    }
}
