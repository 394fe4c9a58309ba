// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What regions and readers take of the host's memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicIsize, Ordering};
use std::thread;

use ebbtide_memory::{Access, Gpa};

use crate::contenders::{Direct, Ours, VmMemory};
use crate::measure::{Plan, Row};
use crate::uniform;

/// Regions, and readers, of which one is measured as a share.
const REGIONS: usize = 4096;
const READERS: usize = 64;
/// Each is exact, so that a few do; what varies is how full the pages are.
const ROUNDS: usize = 3;
/// Of stack that a thread has before it is measured, in bytes.
const STACK: usize = 64 << 10;

/// Counts what is allocated and not freed, on all threads, while it is told to.
pub struct Counting;

static ON: AtomicBool = AtomicBool::new(false);
static LIVE: AtomicIsize = AtomicIsize::new(0);

#[inline]
fn count(bytes: isize) {
    if ON.load(Ordering::Relaxed) {
        LIVE.fetch_add(bytes, Ordering::Relaxed);
    }
}

// SAFETY: all is handed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as for this function.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as for this function.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes of private memory that is present and neither heap nor stack. Of Linux's accounts the one
/// that is exact.
fn mapped() -> isize {
    let text = fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut bytes, mut counts) = (0, false);
    for line in text.lines() {
        let first = line.split_ascii_whitespace().next().unwrap_or("");
        if !first.ends_with(':') {
            counts = !line.ends_with(']');
        } else if counts && first == "Anonymous:" {
            let kib: isize = line
                .split_ascii_whitespace()
                .nth(1)
                .unwrap()
                .parse()
                .unwrap();
            bytes += kib << 10;
        }
    }
    bytes
}

pub fn rows(plan: &Plan) {
    let (region, reader) = ("bytes_per_region", "bytes_per_reader");
    if !plan.wants(region) && !plan.wants(reader) {
        return;
    }
    // Everything on one heap, which is counted by the allocator and not by the kernel.
    // SAFETY: two numbers.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
    }
    ON.store(true, Ordering::Relaxed);
    if plan.wants(reader) {
        per_readers(reader);
    }
    if plan.wants(region) {
        per_regions(region);
    }
    ON.store(false, Ordering::Relaxed);
}

fn per_regions(id: &str) {
    let regions = uniform(REGIONS);
    let mut row = Row::new(id).in_unit("B");
    for _ in 0..ROUNDS {
        row.add(
            per_region(|few| {
                let ours = Ours::new(&regions[..few], None);
                // What is only waiting to be freed does not count.
                ours.memory.synchronize();
                ours
            }),
            per_region(|few| VmMemory::new(&regions[..few])),
            per_region(|few| Direct::plain(&regions[..few])),
        );
    }
    row.print();
}

/// Once: what a reader had serves the next one.
fn per_readers(id: &str) {
    let regions = uniform(8);
    let (ours, peer) = (Ours::new(&regions, None), VmMemory::new(&regions));
    let (memory, space) = (&ours.memory, &*ours.space);
    let mut row = Row::new(id).in_unit("B");
    let a = per_reader(|| {
        let reader = memory.register();
        drop(space.read(&reader).pin(Gpa(0), 64, Access::Read));
        reader
    });
    let b = per_reader(|| peer.lookup(0));
    row.add(a, b, per_reader(|| ()));
    row.print();
}

/// Bytes that are in use.
fn used() -> isize {
    let mapped = mapped();
    LIVE.load(Ordering::Relaxed) + mapped
}

/// The difference between many regions and a few.
fn per_region<T>(make: impl Fn(usize) -> T) -> f64 {
    const FEW: usize = 64;
    let size = |count: usize| {
        let before = used();
        let made = make(count);
        let size = used() - before;
        drop(made);
        size
    };
    let (few, many) = (size(FEW), size(REGIONS));
    (many - few) as f64 / (REGIONS - FEW) as f64
}

/// What `register` leaves, per thread, while all threads are there.
fn per_reader<T>(register: impl Fn() -> T + Sync) -> f64 {
    let gate = Barrier::new(READERS + 1);
    let run = || {
        black_box([1u8; STACK]);
        gate.wait();
        gate.wait();
        let reader = register();
        gate.wait();
        gate.wait();
        drop(reader);
    };
    thread::scope(|scope| {
        (0..READERS).for_each(|_| drop(scope.spawn(run)));
        gate.wait();
        let before = used();
        gate.wait();
        gate.wait();
        let bytes = used() - before;
        gate.wait();
        bytes as f64 / READERS as f64
    })
}
