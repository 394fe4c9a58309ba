// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pins on two threads at once: what a cache line that both write to would cost.

use std::hint::black_box;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::contenders::{Direct, Ours, VmMemory, pinned, pins};
use crate::measure::{Plan, Row, median, spread};
use crate::with_device;

const THREADS: usize = 2;
/// Pins that change hands together.
const BATCH: usize = 256;

pub fn rows(plan: &Plan, count: usize) {
    let home = format!("pin/home2/{count}");
    let remote = format!("pin/remote2/{count}");
    if !plan.wants(&home) && !plan.wants(&remote) {
        return;
    }
    let (regions, device) = with_device(count);
    let addresses = spread(&[device]);
    let ours = Ours::new(&regions, Some(2 << 20));
    ours.check_pins(&addresses);
    let (memory, space) = (&ours.memory, &*ours.space);
    let peer = VmMemory::new(&regions);
    if plan.wants(&home) {
        let mut row = Row::new(&home);
        for _ in 0..plan.rounds {
            let a = at_once(|| {
                let reader = memory.register();
                plan.time(addresses.len(), || pins(space, &reader, &addresses))
            });
            let b = at_once(|| plan.time(addresses.len(), || peer.pins(&addresses)));
            let c = at_once(|| {
                // Counters of its own: there is nothing to share.
                let floor = Direct::new(&[device]);
                plan.time(addresses.len(), || floor.pins(&addresses))
            });
            row.add(a, b, c);
        }
        row.print();
    }
    if plan.wants(&remote) {
        let batch = &addresses[..BATCH];
        let mut row = Row::new(&remote);
        for _ in 0..plan.rounds {
            let a = exchange(plan, || {
                let reader = memory.register();
                move || pinned(space, &reader, batch)
            });
            let b = exchange(plan, || || peer.pinned(batch));
            let away: [Apart; THREADS] = Default::default();
            let next = AtomicUsize::new(0);
            let c = exchange(plan, || {
                let away = &away[next.fetch_add(1, Ordering::Relaxed)];
                let floor = Direct::new(&[device]);
                move || floor.pinned_by(&away.0, batch)
            });
            row.add(a, b, c);
        }
        row.print();
    }
}

/// On a line of its own.
#[derive(Default)]
#[repr(align(128))]
struct Apart(AtomicU64);

/// What `f` gives on all threads at once, the mean.
pub fn at_once(f: impl Fn() -> f64 + Sync) -> f64 {
    let gate = Gate::default();
    let run = || {
        gate.pass();
        f()
    };
    let all: Vec<f64> = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(run)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    all.iter().sum::<f64>() / all.len() as f64
}

/// Nanoseconds per pin that one thread takes and the other lets go, while the other does the same.
/// `make` is called on each thread and gives what makes a batch there.
fn exchange<T: Send, M: FnMut() -> Vec<T>>(plan: &Plan, make: impl Fn() -> M + Sync) -> f64 {
    let gate = Gate::default();
    let slots: [Mutex<Vec<T>>; THREADS] = Default::default();
    let end = Instant::now() + plan.slice();
    let over = AtomicUsize::new(0);
    let run = |me: usize| {
        let mut make = make();
        let mut stretches = Vec::new();
        loop {
            gate.pass();
            let start = Instant::now();
            let made = black_box(make());
            let making = start.elapsed();
            *slots[me].lock().unwrap() = made;
            if me == 0 && Instant::now() >= end {
                over.store(1, Ordering::Relaxed);
            }
            gate.pass();
            let mut got = std::mem::take(&mut *slots[(me + 1) % THREADS].lock().unwrap());
            let last = over.load(Ordering::Relaxed) != 0;
            gate.pass();
            let start = Instant::now();
            got.clear();
            let dropping = start.elapsed();
            stretches.push(per_pin(making + dropping));
            if last {
                return median(&mut stretches);
            }
        }
    };
    let run = &run;
    let all: Vec<f64> = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|me| scope.spawn(move || run(me)))
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    all.iter().sum::<f64>() / all.len() as f64
}

fn per_pin(time: Duration) -> f64 {
    time.as_nanos() as f64 / BATCH as f64
}

/// Lets threads through together, and awake: a sleeper would come late.
#[derive(Default)]
struct Gate(AtomicUsize);

impl Gate {
    fn pass(&self) {
        let turn = self.0.fetch_add(1, Ordering::AcqRel) / THREADS;
        let mut spins = 0u32;
        while self.0.load(Ordering::Acquire) / THREADS == turn {
            spins += 1;
            if spins.is_multiple_of(1000) {
                thread::yield_now();
            }
            std::hint::spin_loop();
        }
    }
}
