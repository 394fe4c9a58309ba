// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Three ways to take something away that is in use: what they cost each use, and what a use that does not end holds up.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use ebbtide_gate::{Entry, Owned};
use ebbtide_memory::{Access, Backing, Gpa, Pin, Region};
use vm_memory::GuestRegionMmap;

use crate::contenders::{Ours, VmMemory};
use crate::measure::{Plan, Row};
use crate::together::at_once;
use crate::unplug::{block, block_on, gone};

/// A request that nobody can cancel.
const REQUEST: Duration = Duration::from_millis(300);
/// How often it is looked whether memory has been given back that tells nobody.
const LOOK: Duration = Duration::from_micros(20);
/// Rounds in which there is one.
const ROUNDS: usize = 5;
const USES: usize = 256;
/// What goes, and what stays.
const GOES: u64 = 1 << 40;
const SIZE: u64 = 2 << 20;
const STAYS: u64 = 0;

pub fn rows(plan: &Plan) {
    entries(plan, "gate/enter", |f| f());
    entries(plan, "gate/enter2", |f| at_once(f));
    leases(plan);
    others(plan);
    stall(plan);
}

/// Entering and leaving, on as many threads as `on` has.
fn entries(plan: &Plan, id: &str, on: impl Fn(&(dyn Fn() -> f64 + Sync)) -> f64) {
    if !plan.wants(id) {
        return;
    }
    let owned = Owned::new("device", 7u64);
    let handle = owned.handle();
    let shared = Arc::new(7u64);
    let mut row = Row::beside(id, "an Arc");
    for _ in 0..plan.rounds {
        let ours = on(&|| {
            plan.time(USES, || {
                for _ in 0..USES {
                    black_box(handle.enter(Entry::Mmio).map(|device| *device));
                }
            })
        });
        let peer = on(&|| {
            plan.time(USES, || {
                for _ in 0..USES {
                    black_box(*Arc::clone(black_box(&shared)));
                }
            })
        });
        row.add(ours, peer, on(&|| plan.time(USES, count)));
    }
    row.print();
}

/// What belongs to a request and goes where it goes.
fn leases(plan: &Plan) {
    if !plan.wants("gate/lease") {
        return;
    }
    let owned = Owned::new("device", 7u64);
    let gate = owned.gate();
    let shared = Arc::new(7u64);
    let mut row = Row::beside("gate/lease", "an Arc");
    for _ in 0..plan.rounds {
        let ours = plan.time(USES, || {
            for _ in 0..USES {
                drop(black_box(gate.enter(Entry::Io)));
            }
        });
        let peer = plan.time(USES, || {
            for _ in 0..USES {
                drop(black_box(Arc::clone(&shared)));
            }
        });
        row.add(ours, peer, plan.time(USES, count));
    }
    row.print();
}

/// The floor: a counter that nobody else sees goes up and down.
fn count() {
    let mut uses = 0u64;
    for _ in 0..USES {
        uses = black_box(uses) + 1;
        uses = black_box(uses) - 1;
    }
    black_box(uses);
}

/// From the removal of memory until it has been given back, while a request into *other* memory is in flight.
fn others(plan: &Plan) {
    if !plan.wants("held/others") {
        return;
    }
    let mut row = Row::beside("held/others", "vm-memory 0.18").in_unit("ms");
    for _ in 0..ROUNDS {
        let ours = Ours::new(&[(STAYS, SIZE)], None);
        let region = added(&ours);
        let beside = in_flight(|| pinned(&ours, STAYS), || ours_goes(&ours, region));
        let alone = ours_goes(&ours, added(&ours));
        let peer = VmMemory::new(&[(STAYS, SIZE)]);
        let region = peer.extra(GOES);
        peer.add(&region);
        // A request into memory that stays; what it keeps is the map.
        let peers = in_flight(|| peer.hold(), || peer_goes(&peer, region));
        row.add(beside, peers, alone);
    }
    row.print();
}

/// The longest time without a look-up of a thread that does nothing else, in memory that stays, while other memory goes
/// from under a request.
fn stall(plan: &Plan) {
    if !plan.wants("held/stall") {
        return;
    }
    let mut row = Row::beside("held/stall", "stop the machine").in_unit("ms");
    for _ in 0..ROUNDS {
        let ours = Ours::new(&[(STAYS, SIZE)], None);
        let (memory, space) = (&ours.memory, &*ours.space);
        let looks = || {
            let reader = memory.register();
            move || {
                let guard = space.read(&reader);
                black_box(guard.lookup(Gpa(STAYS)).is_some());
            }
        };
        let region = added(&ours);
        let rundown = longest_gap(&looks, || {
            in_flight(|| pinned(&ours, GOES), || ours_goes(&ours, region));
        });
        // Everybody works under the lock's one side. Who takes memory away holds the other one, and waits in it for what
        // is in flight.
        let machine = RwLock::new(7u64);
        let works = || || drop(black_box(machine.read().unwrap()));
        let stopped = longest_gap(&works, || {
            let request = thread::spawn(|| thread::sleep(REQUEST));
            let stop = machine.write().unwrap();
            request.join().unwrap();
            drop(stop);
        });
        let floor = longest_gap(&works, || thread::sleep(REQUEST));
        row.add(rundown, stopped, floor);
    }
    row.print();
}

/// Memory that is to go.
fn added(ours: &Ours) -> Arc<Region> {
    let region = block(ours, Backing::Anon { thp: false }, SIZE, false);
    ours.memory
        .update(|t| t.add(ours.root(), &region, GOES, 0))
        .unwrap();
    region
}

/// Takes it away; milliseconds until it has been given back.
fn ours_goes(ours: &Ours, region: Arc<Region>) -> f64 {
    let start = Instant::now();
    let ticket = ours.memory.update(|t| t.unplug(&region)).unwrap();
    drop(region);
    block_on(ticket.drained());
    gone(ticket);
    ms(start.elapsed())
}

fn pinned(ours: &Ours, at: u64) -> Pin {
    let guard = ours.space.read(&ours.reader);
    guard.pin(Gpa(at), 4096, Access::Write).unwrap()
}

fn peer_goes(peer: &VmMemory, region: Arc<GuestRegionMmap<()>>) -> f64 {
    let start = Instant::now();
    let left = peer.remove(region);
    while left.strong_count() > 0 {
        thread::sleep(LOOK);
    }
    ms(start.elapsed())
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// What `f` gives while a request holds what `take` gave it.
fn in_flight<H: Send, T>(take: impl FnOnce() -> H, f: impl FnOnce() -> T) -> T {
    let held = take();
    thread::scope(|scope| {
        scope.spawn(move || {
            thread::sleep(REQUEST);
            drop(held);
        });
        f()
    })
}

/// The longest time, in milliseconds, between two uses on a thread of its own, while `f` runs. `make` is called there.
fn longest_gap<U: FnMut()>(make: &(impl Fn() -> U + Sync), f: impl FnOnce()) -> f64 {
    let (over, uses) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let mut work = make();
            let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
            while !over.load(Ordering::Relaxed) {
                work();
                let now = Instant::now();
                longest = longest.max(now - last);
                last = now;
                uses.fetch_add(1, Ordering::Relaxed);
            }
            longest
        });
        while uses.load(Ordering::Relaxed) == 0 {
            thread::yield_now();
        }
        f();
        over.store(true, Ordering::Relaxed);
        ms(worker.join().unwrap())
    })
}
