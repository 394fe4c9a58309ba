// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a thousand of each PCI function leave behind: heap, descriptors, threads, mappings. Measured in the process, so
//! this is its only test.

mod board;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use board::{Board, Slot, wait};
use ebbtide_devices::chardev::Wire;
use ebbtide_devices::i6300esb::{I6300Esb, SharedAction};
use ebbtide_devices::ivshmem::IvshmemPlain;
use ebbtide_devices::serial_pci::SerialPci;
use ebbtide_iothread::{IoThread, Remote};
use ebbtide_memory::{Backing, RamSpec};

/// Counts the bytes that are allocated.
struct Counting;

static LIVE_BYTES: AtomicI64 = AtomicI64::new(0);

// SAFETY: the system's allocator does it all; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE_BYTES.fetch_add(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE_BYTES.fetch_sub(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const WARM_UP: usize = 64;
const CYCLES: usize = 1000;
const BATCHES: usize = 4;
/// What ends on other threads has mostly ended by then, and in any case by that.
const SETTLED: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(60);
/// Less than half a pointer for each cycle.
const SLACK_BYTES: i64 = 4 * CYCLES as i64;

struct Bench {
    board: Board,
    remote: Remote,
    wire: Arc<Wire>,
    action: Arc<SharedAction>,
}

#[derive(Debug, PartialEq, Eq)]
struct Residue {
    fds: usize,
    threads: usize,
    mappings: usize,
}

fn entries(folder: &str) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

impl Residue {
    fn of_process() -> Residue {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let shared = maps.lines().filter(|line| line.contains("memfd")).count();
        Residue {
            fds: entries("/proc/self/fd"),
            threads: entries("/proc/self/task"),
            mappings: shared,
        }
    }
}

impl Bench {
    /// What there is once everything that is on its way out has gone: views are retired, tasks dropped, by other threads.
    /// They are waited for if there should be but what was `before`.
    fn residue(&self, before: Option<&Residue>) -> (i64, Residue) {
        let mut least = i64::MAX;
        let begun = Instant::now();
        loop {
            self.board.memory.synchronize();
            least = least.min(LIVE_BYTES.load(Ordering::Relaxed));
            std::thread::sleep(Duration::from_millis(5));
            let (time, now) = (begun.elapsed(), Residue::of_process());
            let same = before.is_none_or(|before| now == *before);
            if (time > SETTLED && same) || time > LONG {
                return (least, now);
            }
        }
    }

    fn serial(&self) {
        let device = SerialPci::new("serial1", &self.wire).unwrap();
        let slot = self.board.plug(device.clone());
        slot.outp(1, 1, 3);
        slot.outp(0, 1, b'x'.into());
        self.wire.receive(b"typed");
        drop(slot.remove(device.close()));
    }

    fn watchdog(&self) {
        let bark = Box::new(|_| panic!("nobody waits that long"));
        let device = I6300Esb::new("watchdog0", &self.remote, &self.action, bark).unwrap();
        let slot = self.board.plug(device.clone());
        start(&slot);
        drop(slot.remove(device.close()));
    }

    fn shared_memory(&self) {
        let size_bytes = 1 << 16;
        let spec = RamSpec {
            name: "shm0".into(),
            size_bytes,
            max_size_bytes: size_bytes,
            backing: Backing::Memfd { thp: false },
            prefault: false,
            block_size_bytes: None,
        };
        let memory = &self.board.memory;
        let block = memory.ram().add(spec).unwrap();
        let device = IvshmemPlain::new("ivshmem0", memory, &block).unwrap();
        let slot = self.board.plug(device.clone());
        slot.store(2, 0, 8, 1);
        drop(slot.remove(device.close()));
        let ticket = device.retire().unwrap();
        wait(ticket.drained());
        ticket
            .destroy()
            .unwrap_or_else(|(_, error)| panic!("{error}"));
    }

    /// Of several thousands one leaves no more than a few bytes: what leaks, leaks every time, while tables and queues of
    /// other threads grow once.
    fn check(&self, name: &str, cycle: impl Fn(&Self)) {
        (0..WARM_UP).for_each(|_| cycle(self));
        let (mut bytes, before) = self.residue(None);
        let mut grown = Vec::new();
        for _ in 0..BATCHES {
            (0..CYCLES).for_each(|_| cycle(self));
            let (bytes_now, now) = self.residue(Some(&before));
            assert_eq!(now, before, "{name}");
            grown.push(bytes_now - bytes);
            bytes = bytes_now;
            if grown.last().is_some_and(|grown| *grown < SLACK_BYTES) {
                break;
            }
        }
        let least = grown.iter().min().unwrap();
        assert!(*least < SLACK_BYTES, "{name}: {grown:?} bytes");
        assert!(
            self.board.lines.iter().all(|line| !line.is_high()),
            "{name}"
        );
        assert_eq!(self.board.bridge.functions().len(), 1, "{name}: the bridge");
    }
}

/// Both stages of a quarter of an hour, running.
fn start(slot: &Slot<'_>) {
    slot.store(0, 12, 2, 0x80);
    slot.store(0, 12, 2, 0x86);
    slot.store(0, 12, 2, 0x100);
    slot.set_config(0x68, 1, 2);
}

#[test]
fn a_thousand_of_each_leave_nothing() {
    let thread = IoThread::spawn("timers").unwrap();
    let bench = Bench {
        board: Board::new(),
        remote: thread.remote(),
        wire: Wire::new(),
        action: Arc::default(),
    };
    bench.wire.listen(true);
    // The wire keeps what nobody takes, up to its limits: it is filled to both before.
    bench.wire.put(&vec![b'.'; 256 << 10]);
    bench.wire.receive(&[b'.'; 4096]);
    bench.check("serial-pci", Bench::serial);
    bench.check("i6300esb", Bench::watchdog);
    bench.check("ivshmem-plain", Bench::shared_memory);
    assert_eq!(Arc::strong_count(&bench.wire), 1);
    assert_eq!(Arc::strong_count(&bench.action), 1);
    assert!(bench.board.memory.ram().blocks().is_empty());
}
