// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The end of an unplug: the last pin goes, the memory goes.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::pin::pin;
use std::ptr;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex};
use std::task::{Context, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Instant;

use ebbtide_memory::{Access, Backing, Gpa, Phase, RamSpec, Region, Ticket};
use vm_memory::{FileOffset, MmapRegion};

use crate::contenders::Ours;
use crate::measure::{Plan, Row, median};

const GIB: usize = 1 << 30;
/// Samples of one stretch of `drained`.
const SAMPLES: usize = 100;
/// Rounds of `destroy_1G`, each of which touches 3 GiB.
const ROUNDS: usize = 5;

pub fn rows(plan: &Plan) {
    drained(plan);
    for kind in [Kind::Thp, Kind::Small, Kind::Memfd] {
        destroy(plan, kind);
    }
}

fn drained(plan: &Plan) {
    if !plan.wants("drained") {
        return;
    }
    let ours = Ours::new(&[(0, 1 << 20)], None);
    let mut row = Row::beside("drained", "an Arc a request and a Condvar");
    let sample = |f: &dyn Fn() -> f64| {
        let mut all: Vec<f64> = (0..SAMPLES).map(|_| f()).collect();
        median(&mut all)
    };
    for _ in 0..plan.rounds {
        row.add(sample(&|| unpin(&ours)), sample(&drop_arc), sample(&unpark));
    }
    row.print();
}

/// From the last unpin until a thread that waits for it goes on.
fn unpin(ours: &Ours) -> f64 {
    let region = block(ours, Backing::Anon { thp: false }, 2 << 20, false);
    let memory = &ours.memory;
    let at = Gpa(1 << 40);
    memory
        .update(|t| t.add(ours.root(), &region, at.0, 0))
        .unwrap();
    let held = ours
        .space
        .read(&ours.reader)
        .pin(at, 4096, Access::Read)
        .unwrap();
    let ticket = memory.update(|t| t.unplug(&region)).unwrap();
    let drained = ticket.drained();
    let nanos = waits(
        move || block_on(drained),
        || {
            while ticket.phase() != Phase::Draining {
                thread::yield_now();
            }
        },
        || drop(held),
    );
    gone(ticket);
    nanos
}

/// What a VMM would write by hand: a request holds an Arc, whose last drop wakes a waiter.
fn drop_arc() -> f64 {
    struct Counted(Arc<(Mutex<bool>, Condvar)>);
    impl Drop for Counted {
        fn drop(&mut self) {
            *self.0.0.lock().unwrap() = true;
            self.0.1.notify_all();
        }
    }
    let done = Arc::new((Mutex::new(false), Condvar::new()));
    let request = Arc::new(Counted(Arc::clone(&done)));
    waits(
        move || {
            let mut ready = done.0.lock().unwrap();
            while !*ready {
                ready = done.1.wait(ready).unwrap();
            }
        },
        || (),
        move || drop(request),
    )
}

/// A thread is woken, no more.
fn unpark() -> f64 {
    let (send, receive) = sync_channel(1);
    waits(
        move || {
            send.send(thread::current()).unwrap();
            thread::park();
        },
        || (),
        move || receive.recv().unwrap().unpark(),
    )
}

/// Nanoseconds from `go` on this thread to the end of `wait` on another, that sleeps by then.
fn waits(wait: impl FnOnce() + Send, ready: impl FnOnce(), go: impl FnOnce()) -> f64 {
    thread::scope(|scope| {
        let waiter = scope.spawn(move || {
            wait();
            Instant::now()
        });
        ready();
        thread::sleep(std::time::Duration::from_micros(200));
        let start = Instant::now();
        go();
        let end = waiter.join().unwrap();
        end.saturating_duration_since(start).as_nanos() as f64
    })
}

#[derive(Clone, Copy)]
enum Kind {
    Thp,
    Small,
    Memfd,
}

fn destroy(plan: &Plan, kind: Kind) {
    let (id, backing) = match kind {
        Kind::Thp => ("destroy_1G/thp", Backing::Anon { thp: true }),
        Kind::Small => ("destroy_1G/4k", Backing::Anon { thp: false }),
        Kind::Memfd => ("destroy_1G/memfd", Backing::Memfd { thp: false }),
    };
    if !plan.wants(id) {
        return;
    }
    let ours = Ours::new(&[(0, 1 << 20)], None);
    let mut row = Row::new(id);
    for _ in 0..ROUNDS {
        row.add(give_back(&ours, backing.clone()), unmap(kind), cover(kind));
    }
    row.print();
}

/// Nanoseconds that `destroy` takes of 1 GiB that has been touched.
fn give_back(ours: &Ours, backing: Backing) -> f64 {
    let region = block(ours, backing, GIB as u64, true);
    ours.memory
        .update(|t| t.add(ours.root(), &region, 1 << 40, 0))
        .unwrap();
    let ticket = ours.memory.update(|t| t.unplug(&region)).unwrap();
    drop(region);
    block_on(ticket.drained());
    let start = worked();
    gone(ticket);
    worked() - start
}

/// Nanoseconds that this thread has had a processor: what gives back a GiB is interrupted often on a
/// machine that others use.
fn worked() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure is ours.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(result, 0);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

/// The same by dropping a region of vm-memory.
fn unmap(kind: Kind) -> f64 {
    let file = matches!(kind, Kind::Memfd).then(|| FileOffset::new(memfd(), 0));
    let region = match file {
        Some(file) => MmapRegion::<()>::from_file(file, GIB).unwrap(),
        None => MmapRegion::<()>::new(GIB).unwrap(),
    };
    touch(region.as_ptr(), kind);
    let start = worked();
    drop(region);
    worked() - start
}

/// The floor: inaccessible memory is mapped over the pages.
fn cover(kind: Kind) -> f64 {
    let file = matches!(kind, Kind::Memfd).then(memfd);
    let (fd, sharing) = match &file {
        Some(file) => (file.as_raw_fd(), libc::MAP_SHARED),
        None => (-1, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
    };
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping.
    let at = unsafe {
        libc::mmap(
            ptr::null_mut(),
            GIB,
            access,
            sharing | libc::MAP_NORESERVE,
            fd,
            0,
        )
    };
    assert_ne!(at, libc::MAP_FAILED);
    touch(at.cast(), kind);
    let over = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let start = worked();
    // SAFETY: over the mapping above, which nobody else knows.
    let covered = unsafe { libc::mmap(at, GIB, libc::PROT_NONE, over, -1, 0) };
    drop(file);
    let nanos = worked() - start;
    assert_eq!(covered, at);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::munmap(at, GIB) }, 0);
    nanos
}

fn touch(at: *mut u8, kind: Kind) {
    let advice = match kind {
        Kind::Thp => libc::MADV_HUGEPAGE,
        Kind::Small | Kind::Memfd => libc::MADV_NOHUGEPAGE,
    };
    // SAFETY: a mapping of ours of this size.
    unsafe {
        assert_eq!(libc::madvise(at.cast(), GIB, advice), 0);
        assert_eq!(libc::madvise(at.cast(), GIB, libc::MADV_POPULATE_WRITE), 0);
    }
}

fn memfd() -> File {
    // SAFETY: a new descriptor, which becomes ours alone.
    let file = unsafe {
        let fd = libc::memfd_create(c"bench".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(GIB as u64).unwrap();
    file
}

pub fn block(ours: &Ours, backing: Backing, size_bytes: u64, prefault: bool) -> Arc<Region> {
    let spec = RamSpec {
        name: "dimm".into(),
        size_bytes,
        max_size_bytes: size_bytes,
        backing,
        prefault,
        block_size_bytes: None,
    };
    let block = ours.memory.ram().add(spec).unwrap();
    Region::ram("dimm", &block)
}

pub fn gone(ticket: Ticket) {
    if let Err((_, error)) = ticket.destroy() {
        panic!("{error}");
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

pub fn block_on(future: impl Future<Output = ()>) {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    while future.as_mut().poll(&mut context).is_pending() {
        thread::park();
    }
}
