// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The gate on real threads: the states, the drain in its two forms, who drops the value where.
#![cfg(not(loom))]

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use ebbtide_gate::{Drained, Entry, Gate, Handle, Held, Lease, Live, Owned, Stalled};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

#[derive(Default)]
struct Count(AtomicU32);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Count {
    fn get(&self) -> u32 {
        self.0.load(Ordering::SeqCst)
    }
}

#[test]
fn a_closed_gate_never_admits_again() {
    let gate = Gate::new("vda");
    let lease = gate.enter(Entry::Mmio).expect("open");
    assert_eq!(gate.held(), Held { mmio: 1, io: 0 });
    assert!(gate.close(), "the first close is the one");
    assert!(!gate.close());
    assert!(gate.is_closed());
    assert!(gate.enter(Entry::Io).is_none());
    assert!(!gate.is_drained());
    drop(lease);
    assert!(gate.is_drained());
    assert!(gate.enter(Entry::Io).is_none());
    assert_eq!(gate.name(), "vda");
}

#[test]
fn an_open_gate_is_not_drained_even_when_empty() {
    let gate = Gate::new("vda");
    let stalled = gate.drain_blocking(Instant::now()).expect_err("open");
    assert_eq!(
        stalled,
        Stalled {
            name: "vda".into(),
            held: Held::default()
        }
    );
    gate.close();
    gate.drain_blocking(Instant::now())
        .expect("closed and empty, even with no time left");
}

#[test]
fn a_stalled_drain_says_who_is_inside_and_frees_nothing() {
    let gate = Gate::new("vda");
    let leases = [Entry::Io, Entry::Io, Entry::Mmio].map(|kind| gate.enter(kind).expect("open"));
    gate.close();
    let began = Instant::now();
    let stalled = gate
        .drain_blocking(began + Duration::from_millis(20))
        .expect_err("held");
    assert!(began.elapsed() >= Duration::from_millis(20));
    assert_eq!(
        stalled.to_string(),
        "gate `vda` is not drained: 1 mmio, 2 io still inside"
    );
    drop(leases);
    gate.drain_blocking(soon()).expect("empty now");
}

#[test]
fn all_drainers_are_woken_once_and_a_withdrawn_one_is_not() {
    let gate = Gate::new("vda");
    let lease = gate.enter(Entry::Io).expect("open");
    let counts: [Arc<Count>; 3] = Default::default();
    let mut drains: Vec<Drained> = (0..3).map(|_| gate.drained()).collect();
    for (drained, count) in drains.iter_mut().zip(&counts) {
        let waker = Waker::from(Arc::clone(count));
        let mut cx = Context::from_waker(&waker);
        // Twice: the second poll replaces the waker, it does not add one.
        assert_eq!(pin!(&mut *drained).poll(&mut cx), Poll::Pending);
        assert_eq!(pin!(drained).poll(&mut cx), Poll::Pending);
    }
    drop(drains.remove(1));
    assert_eq!(
        Arc::strong_count(&counts[1]),
        1,
        "its waker is gone with it"
    );
    gate.close();
    assert_eq!(counts.each_ref().map(|count| count.get()), [0, 0, 0]);
    drop(lease);
    assert_eq!(counts.each_ref().map(|count| count.get()), [1, 0, 1]);
    for drained in &mut drains {
        assert!(
            pin!(drained)
                .poll(&mut Context::from_waker(Waker::noop()))
                .is_ready()
        );
    }
}

#[test]
fn closing_an_empty_gate_wakes_who_waited_for_it() {
    let gate = Gate::new("vda");
    let count = Arc::new(Count::default());
    let waker = Waker::from(Arc::clone(&count));
    let mut drained = gate.drained();
    assert!(
        pin!(&mut drained)
            .poll(&mut Context::from_waker(&waker))
            .is_pending()
    );
    gate.close();
    assert_eq!(count.get(), 1);
}

#[test]
fn a_waker_may_come_back_to_the_gate() {
    struct Reenter(Arc<Gate>, AtomicBool);
    impl Wake for Reenter {
        fn wake(self: Arc<Self>) {
            let mut again = self.0.drained();
            let ready = pin!(&mut again)
                .poll(&mut Context::from_waker(Waker::noop()))
                .is_ready();
            self.1.store(ready, Ordering::SeqCst);
        }
    }
    let gate = Gate::new("vda");
    let lease = gate.enter(Entry::Io).expect("open");
    let reenter = Arc::new(Reenter(Arc::clone(&gate), AtomicBool::new(false)));
    let waker = Waker::from(Arc::clone(&reenter));
    let mut drained = gate.drained();
    assert!(
        pin!(&mut drained)
            .poll(&mut Context::from_waker(&waker))
            .is_pending()
    );
    gate.close();
    drop(lease);
    assert!(reenter.1.load(Ordering::SeqCst));
}

/// Knows which thread dropped it.
struct Tracked(Arc<AtomicU32>, thread::ThreadId);

impl Drop for Tracked {
    fn drop(&mut self) {
        assert_eq!(
            thread::current().id(),
            self.1,
            "dropped by somebody who only used it"
        );
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn the_value_comes_out_only_after_the_drain() {
    let drops = Arc::new(AtomicU32::new(0));
    let owned = Owned::new("vda", Tracked(Arc::clone(&drops), thread::current().id()));
    let handle = owned.handle();
    let owned = owned.try_into_inner().err().expect("still open");
    let live = handle.enter(Entry::Mmio).expect("open");
    owned.close();
    let owned = owned.try_into_inner().err().expect("somebody is inside");
    assert_eq!(owned.gate().held().mmio, 1);
    drop(live);
    let value = owned.try_into_inner().expect("drained");
    assert_eq!(drops.load(Ordering::SeqCst), 0);
    drop(value);
    assert_eq!(drops.load(Ordering::SeqCst), 1);
    assert!(handle.enter(Entry::Mmio).is_none());
}

#[test]
fn dropping_the_owner_frees_the_value_unless_somebody_is_inside() {
    let drops = Arc::new(AtomicU32::new(0));
    let tracked = || Tracked(Arc::clone(&drops), thread::current().id());
    let owned = Owned::new("vda", tracked());
    let handle = owned.handle();
    drop(owned);
    assert_eq!(drops.load(Ordering::SeqCst), 1);
    assert!(handle.enter(Entry::Io).is_none());

    let owned = Owned::new("vdb", tracked());
    let handle = owned.handle();
    let live = handle.enter(Entry::Io).expect("open");
    drop(owned);
    assert_eq!(
        live.1,
        thread::current().id(),
        "leaked, so still readable under the lease"
    );
    drop(live);
    assert_eq!(
        drops.load(Ordering::SeqCst),
        1,
        "leaked, not freed late by the user"
    );
    assert!(handle.enter(Entry::Io).is_none());
}

/// Users hammer the gate while it is closed: nobody gets in after the drain, and all they did is seen.
#[test]
fn stress_close_against_users() {
    const USERS: u64 = 4;
    for round in 0..200 {
        let inside = AtomicU64::new(0);
        let owned = Owned::new("vda", inside);
        let gone = Arc::new(AtomicBool::new(false));
        let users: Vec<_> = (0..USERS)
            .map(|user| {
                let (handle, gone) = (owned.handle(), Arc::clone(&gone));
                let kind = if user % 2 == 0 {
                    Entry::Mmio
                } else {
                    Entry::Io
                };
                thread::spawn(move || {
                    let mut entered = 0;
                    while let Some(live) = handle.enter(kind) {
                        assert!(!gone.load(Ordering::SeqCst), "inside after the drain");
                        // Relaxed: only the gate orders this against the owner's read.
                        live.fetch_add(1, Ordering::Relaxed);
                        entered += 1;
                    }
                    entered
                })
            })
            .collect();
        thread::sleep(Duration::from_micros(round % 20 * 10));
        owned.close();
        owned.gate().drain_blocking(soon()).expect("users leave");
        gone.store(true, Ordering::SeqCst);
        let total = owned.try_into_inner().expect("drained").into_inner();
        let entered: u64 = users
            .into_iter()
            .map(|user| user.join().expect("no panic"))
            .sum();
        assert_eq!(total, entered);
    }
}

#[test]
fn the_types_travel_as_documented() {
    fn send<T: Send + 'static>() {}
    fn send_sync<T: Send + Sync + Clone + 'static>() {}
    send::<Lease>();
    send::<Drained>();
    send::<Owned<String>>();
    send_sync::<Handle<String>>();
    fn live_is_send<'a>(live: Live<'a, String>) -> impl Send + 'a {
        live
    }
    let owned = Owned::new("vda", String::from("state"));
    let handle = owned.handle();
    let live = live_is_send(handle.enter(Entry::Io).expect("open"));
    drop(live);
    assert_eq!(owned.get(), "state");
}
