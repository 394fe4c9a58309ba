// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Loom models of the iothread. Run with
//! `RUSTFLAGS='--cfg loom' cargo test -p ebbtide-iothread --test models --release`.
//!
//! Each seeded bug is a deviation from the protocol, chosen by `EBBTIDE_SEEDED=<bug>`; with it the model must fail:
//!
//! seeded: sleep_without_recheck breaks model_doorbell
//! seeded: notify_load_first breaks model_doorbell
//! seeded: signal_registers_late breaks model_signal
#![cfg(loom)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use ebbtide_iothread::Signal;
use ebbtide_iothread::doorbell::Doorbell;
use ebbtide_models::explore;
use loom::sync::{Mutex, Notify};
use loom::thread;

/// An executor as far as its sleep goes: the inbox, the doorbell and the eventfd.
struct Executor {
    inbox: Mutex<Vec<u32>>,
    doorbell: Doorbell,
    bell: Notify,
}

impl Executor {
    fn send(&self, work: u32) {
        self.inbox.lock().unwrap().push(work);
        if self.doorbell.notify() {
            self.bell.notify();
        }
    }

    /// Turns until everything has arrived; the same steps as the executor's loop.
    fn receive(&self, expected: usize) -> Vec<u32> {
        let mut received = Vec::new();
        loop {
            if self.doorbell.take() {
                received.append(&mut self.inbox.lock().unwrap());
            }
            if received.len() == expected {
                return received;
            }
            if self.doorbell.try_sleep() {
                // A lost wake-up ends here: loom reports a deadlock.
                self.bell.wait();
            }
        }
    }
}

#[test]
fn model_doorbell() {
    const INVARIANT: &str = "a sleeping thread is woken by every notification that it has not taken, and finds the work";
    explore("iothread/doorbell", INVARIANT, 2, || {
        let executor = Arc::new(Executor {
            inbox: Mutex::new(Vec::new()),
            doorbell: Doorbell::new(),
            bell: Notify::new(),
        });
        let senders = [1, 2].map(|work| {
            let executor = Arc::clone(&executor);
            thread::spawn(move || executor.send(work))
        });
        // A completion wakes the executor as well, at any time, and brings no work.
        let completing = Arc::clone(&executor);
        let completion = thread::spawn(move || completing.bell.notify());
        let mut received = executor.receive(2);
        received.sort_unstable();
        assert_eq!(received, [1, 2]);
        completion.join().unwrap();
        for sender in senders {
            sender.join().unwrap();
        }
    });
}

#[test]
fn model_signal() {
    const INVARIANT: &str = "a task that waits for a signal is woken by every raise it has not seen, and sees what was changed before";
    explore("iothread/signal", INVARIANT, 3, || {
        let signal = Arc::new(Signal::new());
        let changes = Arc::new(loom::sync::atomic::AtomicU32::new(0));
        let raisers = [(), ()].map(|()| {
            let (signal, changes) = (Arc::clone(&signal), Arc::clone(&changes));
            thread::spawn(move || {
                changes.fetch_add(1, Ordering::Relaxed);
                signal.raise();
            })
        });
        // A lost wake-up ends here: loom reports a deadlock.
        loom::future::block_on(async {
            let mut seen = 0;
            while changes.load(Ordering::Relaxed) < 2 {
                signal.changed(&mut seen).await;
            }
        });
        for raiser in raisers {
            raiser.join().unwrap();
        }
    });
}
