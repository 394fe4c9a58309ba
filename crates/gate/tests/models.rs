// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Loom models of the gate. Run with `RUSTFLAGS='--cfg loom' cargo test -p ebbtide-gate --test models --release`.
//!
//! Each seeded bug is a deviation from the protocol, chosen by `EBBTIDE_SEEDED=<bug>`; with it the model must fail:
//!
//! seeded: enter_check_then_add breaks model_drain
//! seeded: leave_relaxed breaks model_drain
//! seeded: drain_wake_lost breaks model_wakeup
//! seeded: take_out_undrained breaks model_owner
//! seeded: leave_relaxed breaks model_owner
#![cfg(loom)]

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use ebbtide_gate::{Entry, Gate, Owned};
use ebbtide_models::explore;
use loom::cell::UnsafeCell;
use loom::future::block_on;
use loom::thread;

/// What is behind the gate: loom reports an access that is not ordered against another one.
struct Guarded(UnsafeCell<u32>);

// SAFETY: loom checks every access.
unsafe impl Sync for Guarded {}
// SAFETY: as above.
unsafe impl Send for Guarded {}

impl Guarded {
    fn new() -> Guarded {
        Guarded(UnsafeCell::new(7))
    }

    fn read(&self) -> u32 {
        // SAFETY: loom checks that nobody writes meanwhile.
        self.0.with(|value| unsafe { *value })
    }

    /// As the owner does when it frees the value.
    fn poison(&self) {
        // SAFETY: loom checks that nobody else accesses it meanwhile.
        self.0.with_mut(|value| unsafe { *value = u32::MAX });
    }
}

fn use_under_lease(gate: &Arc<Gate>, kind: Entry, guarded: &Guarded) {
    if let Some(lease) = gate.enter(kind) {
        assert_eq!(guarded.read(), 7, "entered a gate whose value is gone");
        drop(lease);
    }
}

#[test]
fn model_drain() {
    const INVARIANT: &str =
        "once drained, no lease exists and none will, and what was done under a lease is seen";
    explore("gate/drain", INVARIANT, 4, || {
        let gate = Gate::new("modelled");
        let guarded = Arc::new(Guarded::new());
        let users = [Entry::Mmio, Entry::Io].map(|kind| {
            let (gate, guarded) = (Arc::clone(&gate), Arc::clone(&guarded));
            thread::spawn(move || use_under_lease(&gate, kind, &guarded))
        });
        assert!(gate.close());
        block_on(gate.drained());
        assert!(gate.held().is_empty());
        guarded.poison();
        assert!(gate.enter(Entry::Io).is_none());
        for user in users {
            user.join().unwrap();
        }
        assert!(gate.is_drained(), "a drained gate counts somebody again");
    });
}

#[test]
fn model_wakeup() {
    const INVARIANT: &str =
        "every drainer is woken, whether the last lease or the close comes last";
    explore("gate/wakeup", INVARIANT, 4, || {
        let gate = Gate::new("modelled");
        let lease = gate.enter(Entry::Io).expect("open");
        let leaver = thread::spawn(move || drop(lease));
        let closing = Arc::clone(&gate);
        let closer = thread::spawn(move || assert!(closing.close()));
        // Two drainers, each with a waker of its own entry.
        let (mut first, mut second) = (gate.drained(), gate.drained());
        block_on(poll_fn(|cx| {
            let (first, second) = (
                Pin::new(&mut first).poll(cx),
                Pin::new(&mut second).poll(cx),
            );
            if first.is_ready() && second.is_ready() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        }));
        assert!(gate.is_drained());
        leaver.join().unwrap();
        closer.join().unwrap();
    });
}

#[test]
fn model_owner() {
    const INVARIANT: &str =
        "the owner takes the value out exclusively, and a handle reaches it only before that";
    explore("gate/owner", INVARIANT, 4, || {
        // The value itself is behind an Arc, so that a seeded bug is found by loom and not as a crash.
        let guarded = Arc::new(Guarded::new());
        let owned = Owned::new("modelled", Arc::clone(&guarded));
        let users = [Entry::Mmio, Entry::Io].map(|kind| {
            let handle = owned.handle();
            thread::spawn(move || {
                if let Some(live) = handle.enter(kind) {
                    assert_eq!(live.read(), 7, "entered a gate whose value is gone");
                }
            })
        });
        owned.close();
        // The owner may look at any time; it gets the value only when nobody can reach it.
        match owned.try_into_inner() {
            Ok(value) => value.poison(),
            Err(owned) => {
                block_on(owned.gate().drained());
                owned.try_into_inner().expect("drained").poison();
            }
        }
        for user in users {
            user.join().unwrap();
        }
    });
}
