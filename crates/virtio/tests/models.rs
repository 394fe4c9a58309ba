// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Loom models of what a device's threads and the driver's accesses do to each other.
//! Run with `RUSTFLAGS='--cfg loom' cargo test -p ebbtide-virtio --test models --release`.
//!
//! Each seeded bug is a deviation from the protocol, chosen by `EBBTIDE_SEEDED=<bug>`; with it the model must fail:
//!
//! seeded: reset_before_drain breaks model_reset
//! seeded: needs_reset_any_session breaks model_reset
//! seeded: answers_stay_open breaks model_late_answer
//! seeded: answer_not_waited_for breaks model_late_answer
//! seeded: removal_closes_first breaks model_removal
//! seeded: removal_waits_for_gate_alone breaks model_removal
//! seeded: removal_waits_for_ended_task breaks model_removal_of_broken_queue
//! seeded: config_change_unlocked breaks model_config_change
//! seeded: silent_change_keeps_generation breaks model_config_silent
//! seeded: driver_ok_unlocked breaks model_config_pending
//! seeded: early_needs_reset_unannounced breaks model_early_needs_reset
//! seeded: under_way_before_noted breaks model_flights
//! seeded: forgotten_under_way breaks model_flights
//! seeded: function_does_not_wait breaks model_task_management
//! seeded: wakes_before_it_is_gone breaks model_task_management
#![cfg(loom)]

use std::sync::Arc;

use ebbtide_gate::{Entry, Gate};
use ebbtide_models::explore;
use ebbtide_virtio::modelled::Chain;
use ebbtide_virtio::scsi::modelled::Commands;
use ebbtide_virtio::{Change, Interrupts, Link, Removal, Reset, status};
use loom::cell::UnsafeCell;
use loom::future::block_on;
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;

/// Counts configuration interrupts.
#[derive(Default)]
struct Announced(AtomicU32);

impl Interrupts for Announced {
    fn queue(&self, _index: u16) {}

    fn config(&self) {
        // Release: a driver that takes the interrupt sees what was done before it.
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

/// Guest memory that the driver gives to the device and takes back: loom reports an access of one that is not ordered
/// against the other's.
struct Ring(UnsafeCell<u32>);

// SAFETY: loom checks every access.
unsafe impl Sync for Ring {}
// SAFETY: as above.
unsafe impl Send for Ring {}

impl Ring {
    fn new() -> Ring {
        Ring(UnsafeCell::new(0))
    }

    fn write(&self, value: u32) {
        // SAFETY: loom checks that nobody else accesses it meanwhile.
        self.0.with_mut(|cell| unsafe { *cell = value });
    }
}

#[test]
fn model_reset() {
    const INVARIANT: &str = "when the status reads 0, nothing of the ended activation touches the rings any more, and \
                             no error of it marks the device";
    explore("virtio/reset", INVARIANT, 3, || {
        let link = Link::new(Arc::new(Announced::default()));
        let gate = Gate::new("modelled");
        let ring = Arc::new(Ring::new());
        let session = link.driver_ok();
        let control = link.control(Some(session));

        // A request that is in flight when the reset comes, and one that arrives then.
        let in_flight = gate.enter(Entry::Io).expect("open");
        let device = {
            let (gate, ring, control) = (Arc::clone(&gate), Arc::clone(&ring), control.clone());
            thread::spawn(move || {
                ring.write(1);
                drop(in_flight);
                if let Some(lease) = gate.enter(Entry::Io) {
                    ring.write(2);
                    drop(lease);
                }
                // Too late for anything: it has no lease, and its session may be over.
                control.needs_reset();
            })
        };

        let reset = Reset::begin(&link, &gate);
        block_on(reset.drained());
        reset.finish();
        assert_eq!(link.status().get(), 0);
        ring.write(3);
        link.status().set(status::ACKNOWLEDGE);
        device.join().expect("device");
        assert_eq!(
            link.status().get(),
            status::ACKNOWLEDGE,
            "marked by an earlier session"
        );
    });
}

/// Two requests that outlast a reset of the machine end while it happens.
#[test]
fn model_late_answer() {
    const INVARIANT: &str = "once answers have ended, no request of the last guest writes to memory that the next one has";
    explore("virtio/late_answer", INVARIANT, 3, || {
        let link = Link::new(Arc::new(Announced::default()));
        let memory = Arc::new([Ring::new(), Ring::new()]);
        let requests = [0, 1].map(|at| {
            let (link, memory) = (Arc::clone(&link), Arc::clone(&memory));
            thread::spawn(move || {
                if let Some(right) = link.answer() {
                    memory[at].write(1);
                    drop(right);
                }
            })
        });

        block_on(link.end_answers());
        // The next guest's from here on.
        memory.iter().for_each(|place| place.write(2));
        assert!(
            link.answer().is_none(),
            "a request has the right to answer the last guest"
        );
        for request in requests {
            request.join().expect("request");
        }
    });
}

#[test]
fn model_removal() {
    const INVARIANT: &str = "a removal drains after the queue's task has answered what is there, and nothing touches \
                             the rings after that";
    explore("virtio/removal", INVARIANT, 3, || {
        let gate = Gate::new("modelled");
        let ring = Arc::new(Ring::new());
        let (removal, removed) = Removal::new();
        removed.listen();
        let task = {
            let (gate, ring) = (Arc::clone(&gate), Arc::clone(&ring));
            thread::spawn(move || {
                if let Some(lease) = gate.enter(Entry::Io) {
                    ring.write(1);
                    drop(lease);
                }
                let mut drained = gate.drained();
                block_on(removed.ended(&mut drained));
                let lease = removed.take();
                let answers = lease.is_some();
                if answers {
                    ring.write(2);
                }
                drop(lease);
                answers
            })
        };

        Removal::begin(&gate, &[removal]);
        block_on(gate.drained());
        ring.write(3);
        assert!(task.join().expect("task"), "requests are left unanswered");
    });
}

#[test]
fn model_removal_of_broken_queue() {
    const INVARIANT: &str =
        "a removal drains although the task of a queue has ended or ends meanwhile";
    explore("virtio/removal_of_broken_queue", INVARIANT, 3, || {
        let gate = Gate::new("modelled");
        let (removal, removed) = Removal::new();
        removed.listen();
        let task = thread::spawn(move || drop(removed));

        // A transport keeps its half until the gate has drained.
        let removals = [removal];
        Removal::begin(&gate, &removals);
        task.join().expect("task");
        assert!(gate.is_drained(), "a lease is left that nobody has");
    });
}

#[test]
fn model_config_change() {
    const INVARIANT: &str = "a driver whose two reads of the generation agree has read one state, and a change is \
                             followed by an interrupt";
    explore("virtio/config_change", INVARIANT, 3, || {
        let announced = Arc::new(Announced::default());
        let link = Link::new(Arc::clone(&announced) as _);
        link.driver_ok();
        // A 64-bit field, which a driver reads in two halves.
        let halves = Arc::new([AtomicU32::new(0), AtomicU32::new(0)]);
        let device = {
            let (control, halves) = (link.control(None), Arc::clone(&halves));
            thread::spawn(move || {
                control.change_config(|| {
                    halves[0].store(1, Ordering::Relaxed);
                    halves[1].store(1, Ordering::Relaxed);
                });
            })
        };

        let interrupts = announced.0.load(Ordering::Acquire);
        let before = link.config_generation();
        let low = link.read_config(|| halves[0].load(Ordering::Relaxed));
        let high = link.read_config(|| halves[1].load(Ordering::Relaxed));
        if link.config_generation() == before {
            assert_eq!(low, high, "torn");
            assert!(
                interrupts == 0 || low == 1,
                "interrupted before the change could be read"
            );
        }
        device.join().expect("device");
        assert_eq!(announced.0.load(Ordering::Acquire), 1);
    });
}

#[test]
fn model_config_silent() {
    const INVARIANT: &str =
        "a change that is not announced is as whole for a reading driver, and never interrupts it";
    explore("virtio/config_silent", INVARIANT, 3, || {
        let announced = Arc::new(Announced::default());
        let link = Link::new(Arc::clone(&announced) as _);
        link.driver_ok();
        let halves = Arc::new([AtomicU32::new(0), AtomicU32::new(0)]);
        let device = {
            let (control, halves) = (link.control(None), Arc::clone(&halves));
            thread::spawn(move || {
                control.update_config(|| {
                    halves[0].store(1, Ordering::Relaxed);
                    halves[1].store(1, Ordering::Relaxed);
                    ((), Change::Silent)
                });
            })
        };

        let before = link.config_generation();
        let low = link.read_config(|| halves[0].load(Ordering::Relaxed));
        let high = link.read_config(|| halves[1].load(Ordering::Relaxed));
        if link.config_generation() == before {
            assert_eq!(low, high, "torn");
        }
        device.join().expect("device");
        assert_eq!(announced.0.load(Ordering::Acquire), 0);
    });
}

#[test]
fn model_config_pending() {
    const INVARIANT: &str =
        "a change while the driver sets itself up is either read by it or announced";
    explore("virtio/config_pending", INVARIANT, 3, || {
        let announced = Arc::new(Announced::default());
        let link = Link::new(Arc::clone(&announced) as _);
        link.status().set(status::ACKNOWLEDGE | status::DRIVER);
        let field = Arc::new(AtomicU32::new(0));
        let device = {
            let (control, field) = (link.control(None), Arc::clone(&field));
            thread::spawn(move || control.change_config(|| field.store(1, Ordering::Relaxed)))
        };

        let read = link.read_config(|| field.load(Ordering::Relaxed));
        link.driver_ok();
        device.join().expect("device");
        let interrupts = announced.0.load(Ordering::Acquire);
        assert!(read == 1 || interrupts > 0, "the driver never hears of it");
        assert!(interrupts < 2, "it hears of it once");
    });
}

#[test]
fn model_early_needs_reset() {
    const INVARIANT: &str =
        "a driver that is set up hears of an error that came while it set itself up";
    explore("virtio/early_needs_reset", INVARIANT, 3, || {
        let announced = Arc::new(Announced::default());
        let link = Link::new(Arc::clone(&announced) as _);
        link.status().set(status::ACKNOWLEDGE | status::DRIVER);
        let device = {
            let control = link.control(None);
            thread::spawn(move || control.needs_reset())
        };

        link.driver_ok();
        device.join().expect("device");
        assert_ne!(link.status().get() & status::NEEDS_RESET, 0);
        assert_eq!(announced.0.load(Ordering::Acquire), 1, "announced once");
    });
}

#[test]
fn model_flights() {
    const INVARIANT: &str = "a reset knows all or nothing of what a request has pinned that begins and ends meanwhile, \
                             and nothing once it has ended";
    explore("virtio/flights", INVARIANT, 3, || {
        let chain = Arc::new(Chain::new());
        let device = {
            let chain = Arc::clone(&chain);
            thread::spawn(move || {
                chain.begin(3);
                chain.end();
            })
        };
        let pinned = chain.pinned();
        assert!(
            pinned.is_empty() || pinned == [1..2, 2..3, 3..4],
            "{pinned:?}"
        );
        device.join().expect("device");
        assert!(chain.pinned().is_empty());
    });
}

#[test]
fn model_task_management() {
    const INVARIANT: &str = "when a function is answered, the commands it aborted do not touch their memory any more; \
                             and it is answered";
    explore("virtio/task_management", INVARIANT, 3, || {
        let commands = Commands::new(2);
        let memory = [0, 1].map(|_| Arc::new(Ring::new()));
        let disks: Vec<_> = (0..2)
            .map(|queue| {
                let (command, memory) = (commands.begin(queue), Arc::clone(&memory[queue]));
                thread::spawn(move || {
                    memory.write(1);
                    drop(command);
                })
            })
            .collect();
        block_on(commands.abort());
        // The driver uses the memory for something else.
        memory.iter().for_each(|memory| memory.write(2));
        for disk in disks {
            disk.join().expect("disk");
        }
    });
}
