// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Loom models of the dirty rings, with the kernel and the guest played. Run by `cargo xtask models`; `models.toml` lists
//! them.
#![cfg(loom)]

use std::convert::Infallible;

use ebbtide_hypervisor::models::{Crossing, Entry, Resets, Ring, Written, harvest};
use ebbtide_models::explore;
use loom::sync::atomic::{AtomicBool, Ordering::SeqCst};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

const VCPUS: usize = 2;
const ENTRIES: usize = 4;
/// The page the models are about, and another that only fills a ring.
const PAGE: u64 = 7;
const OTHER: u64 = 8;

/// Shared by kernel and host. No step depends on the counting of references.
type Entries = std::sync::Arc<[Entry]>;

/// What the kernel and the processors know of the page.
#[derive(Default)]
struct Page {
    data: u64,
    /// The page tables let writes pass.
    writable: bool,
    /// So does the translation each processor keeps.
    cached: [bool; VCPUS],
}

struct Machine {
    rings: Vec<Ring<Entries>>,
    entries: Vec<Entries>,
    resets: Resets,
    page: Mutex<Page>,
    /// Where the kernel fills in each ring.
    filled: Mutex<[usize; VCPUS]>,
    /// Where it resets, with the lock under which it does.
    reset: Mutex<[usize; VCPUS]>,
    /// The page's bit in the dirty log.
    dirty: AtomicBool,
}

impl Machine {
    fn new() -> Arc<Machine> {
        let ring = |_| (0..ENTRIES).map(|_| Entry::free()).collect();
        let entries: Vec<Entries> = (0..VCPUS).map(ring).collect();
        Arc::new(Machine {
            rings: entries.iter().cloned().map(Ring::new).collect(),
            entries,
            resets: Resets::new(),
            page: Mutex::new(Page::default()),
            filled: Mutex::new([0; VCPUS]),
            reset: Mutex::new([0; VCPUS]),
            dirty: AtomicBool::new(false),
        })
    }

    fn append(&self, vcpu: usize, page: u64) {
        let mut filled = self.filled.lock().unwrap();
        let entry = &self.entries[vcpu][filled[vcpu] % ENTRIES];
        filled[vcpu] += 1;
        entry.fill(Written { slot: 0, page });
    }

    /// The guest writes to the page.
    fn write(&self, vcpu: usize, data: u64) {
        let mut page = self.page.lock().unwrap();
        if !page.cached[vcpu] {
            if !page.writable {
                page.writable = true;
                self.append(vcpu, PAGE);
            }
            page.cached[vcpu] = true;
        }
        page.data = data;
    }

    /// KVM_RESET_DIRTY_RINGS: entries are freed and pages protected under a lock; then the processors forget.
    fn reset(&self) {
        let mut cleared = false;
        let mut reset = self.reset.lock().unwrap();
        for (entries, at) in self.entries.iter().zip(reset.iter_mut()) {
            while let Some(written) = entries[*at % ENTRIES].reset() {
                *at += 1;
                cleared = true;
                if written.page == PAGE {
                    self.page.lock().unwrap().writable = false;
                }
            }
        }
        drop(reset);
        if cleared {
            self.page.lock().unwrap().cached = [false; VCPUS];
        }
    }

    fn harvest(&self, vcpus: std::ops::Range<usize>) {
        let mark = |written: &mut [Written]| {
            if written.iter().any(|w| w.page == PAGE) {
                // As the log does: a read-modify-write, which no earlier taking of the bit can hide.
                self.dirty.fetch_or(true, SeqCst);
            }
        };
        let reset = || {
            self.reset();
            Ok::<(), Infallible>(())
        };
        harvest(self.rings[vcpus].iter(), &self.resets, reset, mark).unwrap();
    }

    /// What a client of the log does: takes the bit, then reads the page.
    fn copy(&self, copy: &mut u64) {
        if self.dirty.swap(false, SeqCst) {
            *copy = self.page.lock().unwrap().data;
        }
    }
}

/// Two processors do what they are told while a client looks once; what it has in the end is what is there.
fn check(vcpus: [fn(&Machine); VCPUS]) {
    let machine = Machine::new();
    let threads = vcpus.map(|steps| {
        let machine = machine.clone();
        thread::spawn(move || steps(&machine))
    });
    let mut copy = 0;
    machine.copy(&mut copy);
    for thread in threads {
        thread.join().unwrap();
    }
    machine.harvest(0..VCPUS);
    machine.copy(&mut copy);
    assert_eq!(copy, machine.page.lock().unwrap().data);
}

#[test]
fn no_write_is_lost_to_a_harvest() {
    const INVARIANT: &str = "who takes a page's bit and then reads the page has its last write, or finds the bit set again";
    explore("hypervisor/dirty-ring", INVARIANT, 4, || {
        check([
            |machine| {
                machine.write(0, 1);
                machine.harvest(0..1);
            },
            |machine| machine.write(1, 2),
        ]);
    });
}

#[test]
fn no_write_is_lost_between_two_harvests() {
    const INVARIANT: &str = "so also when another ring's harvest resets the page's entry";
    explore("hypervisor/dirty-rings", INVARIANT, 4, || {
        check([
            |machine| {
                machine.write(0, 1);
                machine.harvest(0..1);
                machine.write(0, 2);
            },
            |machine| {
                machine.append(1, OTHER);
                machine.harvest(1..2);
            },
        ]);
    });
}

/// A processor that keeps what it writes to itself until it leaves the guest, which it does when it is kicked.
struct Inside {
    machine: Arc<Machine>,
    crossing: Crossing,
    kicked: Mutex<bool>,
    kick: Condvar,
    written: AtomicBool,
}

impl Inside {
    fn run(&self) {
        self.crossing.enter();
        self.written.store(true, SeqCst);
        let mut kicked = self.kicked.lock().unwrap();
        while !*kicked {
            kicked = self.kick.wait(kicked).unwrap();
        }
        drop(kicked);
        self.machine.append(0, PAGE);
        self.crossing.leave();
        // As if its ring were full.
        self.machine.harvest(0..1);
    }

    fn kick(&self) {
        *self.kicked.lock().unwrap() = true;
        self.kick.notify_all();
    }
}

#[test]
fn a_sync_finds_all_that_was_written() {
    const INVARIANT: &str = "what a processor wrote before a sync is in the log after it, also if it was in the guest or harvests itself";
    explore("hypervisor/dirty-ring-sync", INVARIANT, 4, || {
        let inside = Arc::new(Inside {
            machine: Machine::new(),
            crossing: Crossing::new(),
            kicked: Mutex::new(false),
            kick: Condvar::new(),
            written: AtomicBool::new(false),
        });
        let vcpu = {
            let inside = inside.clone();
            thread::spawn(move || inside.run())
        };
        if inside.written.load(SeqCst) {
            if let Some(stay) = inside.crossing.stay() {
                inside.kick();
                inside.crossing.wait(stay);
            }
            inside.machine.harvest(0..VCPUS);
            assert!(inside.machine.dirty.load(SeqCst));
        } else {
            inside.kick();
        }
        vcpu.join().unwrap();
    });
}
