// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! "Something has changed", from any thread to any number of tasks.
//!
//! A signal carries no value: who is woken looks at the thing itself. It counts, so that a change between a look and the
//! wait for the next one is not missed, and many changes wake once. Works with any executor.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use ebbtide_models::seeded;

use crate::sync::Mutex;

/// See the module.
///
/// ```
/// # use ebbtide_iothread::{Signal, run};
/// # use std::sync::{Arc, atomic::{AtomicBool, Ordering}};
/// # run("doc", |_| async {
/// let (done, signal) = (Arc::new(AtomicBool::new(false)), Arc::new(Signal::new()));
/// let other = { let (done, signal) = (Arc::clone(&done), Arc::clone(&signal)); move || {
///     done.store(true, Ordering::Release);
///     signal.raise();
/// }};
/// std::thread::spawn(other);
/// let mut seen = 0;
/// while !done.load(Ordering::Acquire) {
///     signal.changed(&mut seen).await;
/// }
/// # }).unwrap();
/// ```
pub struct Signal {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    count: u64,
    waiting: BTreeMap<u64, Waker>,
    next_key: u64,
}

impl Signal {
    /// One that was never raised.
    pub fn new() -> Signal {
        Signal {
            state: Mutex::new(State::default()),
        }
    }

    /// Wakes everybody who waits. To be called after the change was made.
    pub fn raise(&self) {
        let woken = self.locked(|state| {
            state.count = state.count.wrapping_add(1);
            std::mem::take(&mut state.waiting)
        });
        // Outside of the lock: a waker may run anything.
        woken.into_values().for_each(Waker::wake);
    }

    /// Waits until it was raised since `seen`, which starts at 0 and is then brought up to date. Ready at once if it has
    /// been. Look at what changes after this, not before. Dropping the future loses nothing.
    pub fn changed<'a>(&'a self, seen: &'a mut u64) -> Changed<'a> {
        Changed {
            signal: self,
            seen,
            key: None,
        }
    }

    fn locked<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self
            .state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        f(&mut state)
    }

    fn register(&self, key: &mut Option<u64>, waker: Waker) -> Option<Waker> {
        self.locked(|state| state.register(key, waker))
    }
}

impl State {
    /// The waker that was there before.
    fn register(&mut self, key: &mut Option<u64>, waker: Waker) -> Option<Waker> {
        let key = *key.get_or_insert_with(|| {
            self.next_key += 1;
            self.next_key
        });
        self.waiting.insert(key, waker)
    }
}

impl Default for Signal {
    fn default() -> Signal {
        Signal::new()
    }
}

impl fmt::Debug for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Signal")
    }
}

/// Made by [`Signal::changed`].
#[must_use = "futures do nothing unless polled"]
pub struct Changed<'a> {
    signal: &'a Signal,
    seen: &'a mut u64,
    key: Option<u64>,
}

impl Future for Changed<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let waker = cx.waker().clone();
        if seeded!("signal_registers_late") {
            if this.signal.locked(|state| state.count) == *this.seen {
                drop(this.signal.register(&mut this.key, waker));
                return Poll::Pending;
            }
            *this.seen = this.signal.locked(|state| state.count);
            return Poll::Ready(());
        }
        // Under one lock: a raise comes either before, and is counted, or after, and finds the waker.
        let (seen, key) = (&mut *this.seen, &mut this.key);
        let registered = this.signal.locked(|state| {
            if state.count == *seen {
                return Some(state.register(key, waker));
            }
            *seen = state.count;
            None
        });
        match registered {
            // Outside of the lock, and only now: dropping a waker may drop a task, and with it such a future.
            Some(replaced) => {
                drop(replaced);
                Poll::Pending
            }
            None => Poll::Ready(()),
        }
    }
}

impl Drop for Changed<'_> {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            let withdrawn = self.signal.locked(|state| state.waiting.remove(&key));
            drop(withdrawn);
        }
    }
}

impl fmt::Debug for Changed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Changed")
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::{Either, race, run};
    use std::rc::Rc;

    fn waiting(signal: &Signal) -> usize {
        signal.locked(|state| state.waiting.len())
    }

    #[test]
    fn many_raises_wake_once_and_none_is_missed() {
        run("signal", |_| async {
            let signal = Signal::new();
            let mut seen = 0;
            signal.raise();
            signal.raise();
            signal.changed(&mut seen).await;
            let again = race(signal.changed(&mut seen), std::future::ready(())).await;
            assert_eq!(again, Either::Right(()), "nothing is new");
            signal.raise();
            signal.changed(&mut seen).await;
        })
        .unwrap();
    }

    #[test]
    fn everybody_is_woken_and_who_gave_up_leaves_nothing() {
        run("signal", |local| async move {
            let signal = Rc::new(Signal::new());
            let tasks: Vec<_> = (0..3)
                .map(|_| {
                    let signal = Rc::clone(&signal);
                    local.spawn(async move {
                        let mut seen = 0;
                        signal.changed(&mut seen).await;
                    })
                })
                .collect();
            let given_up = Rc::clone(&signal);
            let task = local.spawn(async move {
                let mut seen = 0;
                given_up.changed(&mut seen).await;
            });
            local.yield_now().await;
            assert_eq!(waiting(&signal), 4);
            drop(task);
            local.yield_now().await;
            assert_eq!(waiting(&signal), 3);
            signal.raise();
            for task in tasks {
                task.await;
            }
            assert_eq!(waiting(&signal), 0);
        })
        .unwrap();
    }
}
