// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The end of an unplug: by whoever lets the last pin go, and as those see it who wait.
#![cfg(not(loom))]

mod setup;

use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::task::{Context, Wake, Waker};
use std::thread::{self, ThreadId};
use std::time::Duration;

use ebbtide_memory::{Access, Gpa, Phase, Pin, Ticket};
use setup::Map;

const DIMM: u64 = 1 << 32;
const SIZE: u64 = 1 << 20;
const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(20);

/// RAM on its way out, and `count` pins on it.
fn unplugged(map: &Map, count: u64) -> (Ticket, Vec<Pin>) {
    let region = map.ram("dimm", SIZE);
    map.add(&region, DIMM);
    let reader = map.memory.register();
    let pin = |at| {
        map.space
            .read(&reader)
            .pin(Gpa(DIMM + at), 64, Access::Read)
    };
    let pins = (0..count).map(|at| pin(at * 64).unwrap()).collect();
    (map.change(|t| t.unplug(&region)), pins)
}

/// The thread that was the first to wake it.
#[derive(Default)]
struct Woken(Mutex<Option<ThreadId>>);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.lock().unwrap().get_or_insert(thread::current().id());
    }
}

#[test]
fn it_wakes_who_waits_without_a_thread_between() {
    let map = Map::new();
    // The worker may be at it at that moment, and is then left to it: not every time.
    let own = (0..50).any(|_| {
        let (ticket, mut pins) = unplugged(&map, 2);
        assert!(ticket.wait(Phase::Draining, LONG));
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(Arc::clone(&woken));
        let mut drained = pin!(ticket.drained());
        assert!(
            drained
                .as_mut()
                .poll(&mut Context::from_waker(&waker))
                .is_pending()
        );
        thread::sleep(Duration::from_millis(5));
        pins.pop();
        assert_eq!(ticket.phase(), Phase::Draining);
        pins.pop();
        assert!(ticket.wait(Phase::Drained, LONG));
        let by = woken.0.lock().unwrap().take();
        map.end(ticket);
        by == Some(thread::current().id())
    });
    assert!(own);
}

#[test]
fn pins_that_go_at_once_leave_nobody_waiting() {
    const THREADS: u64 = 8;
    let map = Map::new();
    for _ in 0..100 {
        let (ticket, pins) = unplugged(&map, THREADS);
        let gate = Barrier::new(THREADS as usize);
        thread::scope(|scope| {
            for pin in pins {
                scope.spawn(|| {
                    gate.wait();
                    drop(pin);
                });
            }
        });
        assert!(ticket.wait(Phase::Drained, LONG), "{}", ticket.report());
        map.end(ticket);
    }
}

#[test]
fn a_wait_ends_with_the_pins_or_with_its_time() {
    let map = Map::new();
    let (ticket, pins) = unplugged(&map, 1);
    assert!(ticket.wait(Phase::Draining, LONG));
    assert!(!ticket.wait(Phase::Drained, SHORT));
    assert!(!ticket.wait(Phase::Drained, Duration::ZERO));
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(SHORT);
            drop(pins);
        });
        assert!(ticket.wait(Phase::Drained, Duration::MAX));
    });
    map.end(ticket);

    let sparse = map.sparse("sparse", 4 * SIZE, SIZE, 2 * SIZE);
    let region = ebbtide_memory::Region::ram("sparse", &sparse);
    map.add(&region, 2 * DIMM);
    let reader = map.memory.register();
    let guard = map.space.read(&reader);
    let held = guard.pin(Gpa(2 * DIMM), 64, Access::Write).unwrap();
    drop(guard);
    let seal = sparse.seal(0..SIZE).unwrap();
    assert!(!seal.wait(SHORT));
    drop(held);
    assert!(seal.wait(LONG));
    seal.discard().map_err(|(_, error)| error).unwrap();
}

type Waiting = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

/// A task that waits for the same unplug, and that nobody knows but who wakes it.
struct Task {
    _waits: Mutex<Waiting>,
}

impl Wake for Task {
    fn wake(self: Arc<Self>) {}
}

/// With a waker that is given up may go a task, and with the task another who waits.
#[test]
fn a_waker_that_goes_may_take_another_who_waits_along() {
    for replaced in [true, false] {
        let map = Map::new();
        let (ticket, pins) = unplugged(&map, 1);
        let future = |ticket: &Ticket| -> Waiting { Box::pin(ticket.drained()) };
        let mut inner = future(&ticket);
        let noop = &mut Context::from_waker(Waker::noop());
        assert!(inner.as_mut().poll(noop).is_pending());
        let task = Waker::from(Arc::new(Task {
            _waits: Mutex::new(inner),
        }));
        let mut outer = future(&ticket);
        let polled = outer.as_mut().poll(&mut Context::from_waker(&task));
        assert!(polled.is_pending());
        drop(task);
        let (said, says) = mpsc::channel();
        thread::spawn(move || {
            if replaced {
                let noop = &mut Context::from_waker(Waker::noop());
                assert!(outer.as_mut().poll(noop).is_pending());
            }
            drop(outer);
            said.send(()).unwrap();
        });
        if says.recv_timeout(LONG).is_err() {
            // Their ends would wait as well.
            std::mem::forget((map, ticket, pins));
            panic!("it waits for itself, replaced: {replaced}");
        }
        drop(pins);
        assert!(ticket.wait(Phase::Drained, LONG));
        map.end(ticket);
    }
}
