// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Everything at once: look-ups, cached translations, pins dropped here and elsewhere, DIMMs that
//! come and go, ranges that are sealed, discarded and plugged again.
//!
//! What was given back is inaccessible, so that a pin or a section that is not waited for ends
//! the test with SIGSEGV; and what is written through a pin must be there until it is dropped.
//! EBBTIDE_TORTURE_SECONDS sets the length.
#![cfg(not(loom))]

use std::fs;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use ebbtide_memory::{
    Access, AddressSpace, Backing, CachedMap, Error, Gpa, Memory, MemoryConfig, Mmio, Pin,
    RamBlock, RamSpec, Region,
};

const BLOCK: u64 = 1 << 20;
const BLOCKS: u64 = 100;
const DIMMS: u64 = 6;
const DIMM_BYTES: u64 = 1 << 20;
const VMEM_AT: u64 = 1 << 40;

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits for a future; a minute is for ever.
fn wait<T>(what: &str, future: impl Future<Output = T>) -> T {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return value;
        }
        assert!(Instant::now() < end, "{what} takes for ever");
        thread::park_timeout(Duration::from_secs(1));
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % below
    }
}

struct Registers;

impl Mmio for Registers {
    fn read(&self, offset: u64, _: u8) -> u64 {
        offset & 0xff
    }
    fn write(&self, _: u64, _: u8, _: u64) {}
}

struct World {
    memory: Arc<Memory>,
    space: Arc<AddressSpace>,
    root: Arc<Region>,
    vmem: Arc<RamBlock>,
    stop: AtomicBool,
    pins: AtomicU64,
    refusals: AtomicU64,
    lookups: AtomicU64,
    unplugs: AtomicU64,
    discards: AtomicU64,
}

impl World {
    fn running(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn ram(
        memory: &Memory,
        name: &str,
        size: u64,
        block: Option<u64>,
    ) -> Result<Arc<RamBlock>, Error> {
        memory.ram().add(RamSpec {
            name: name.into(),
            size_bytes: size,
            max_size_bytes: size,
            backing: Backing::Anon { thp: false },
            prefault: false,
            block_size_bytes: block,
        })
    }

    fn new() -> World {
        let memory = Memory::new(MemoryConfig {
            arena_bytes: 32 << 40,
        })
        .unwrap();
        let root = Region::container("root", 1 << 48);
        let space = memory.address_space("memory", &root).unwrap();
        let vmem = World::ram(&memory, "vmem", BLOCKS * BLOCK, Some(BLOCK)).unwrap();
        memory
            .update(|t| t.add(&root, &Region::ram("vmem", &vmem), VMEM_AT, 0))
            .unwrap();
        World {
            memory,
            space,
            root,
            vmem,
            stop: AtomicBool::new(false),
            pins: AtomicU64::new(0),
            refusals: AtomicU64::new(0),
            lookups: AtomicU64::new(0),
            unplugs: AtomicU64::new(0),
            discards: AtomicU64::new(0),
        }
    }

    /// An address somewhere in what may or may not be there, on a line of the thread's own.
    fn address(&self, random: &mut Random, thread: u64) -> u64 {
        let (start, length) = match random.next(3) {
            0 => (random.next(DIMMS) << 30, DIMM_BYTES),
            _ => (VMEM_AT, BLOCKS * BLOCK),
        };
        start + random.next(length / 4096) * 4096 + thread * 64
    }

    /// Pins, writes, holds, checks; some pins are checked and dropped by another thread.
    fn pinner(&self, thread: u64, away: &SyncSender<(Pin, u64)>) {
        let mut random = Random(0x1234_5678 + thread);
        let reader = self.memory.register();
        let mut held: Vec<(Pin, u64)> = Vec::new();
        let mut stamp = thread << 48;
        while self.running() {
            let address = self.address(&mut random, thread);
            let guard = self.space.read(&reader);
            match guard.pin(Gpa(address), 64, Access::ReadWrite) {
                Ok(pin) => {
                    drop(guard);
                    // Two pins of one line would overwrite each other's stamp.
                    if held.iter().any(|(other, _)| other.gpa() == pin.gpa()) {
                        continue;
                    }
                    stamp += 1;
                    pin.write_at(0, &stamp.to_le_bytes()).unwrap();
                    held.push((pin, stamp));
                    self.pins.fetch_add(1, Ordering::Relaxed);
                }
                Err(_) => {
                    self.refusals.fetch_add(1, Ordering::Relaxed);
                }
            }
            if held.len() > 20 {
                let (pin, stamp) = held.swap_remove(random.next(20) as usize);
                if random.next(4) == 0 {
                    let clone = pin.clone();
                    drop(pin);
                    // The line may be pinned anew by this thread only once the other is done.
                    let _ = away.send((clone, stamp));
                } else {
                    check(&pin, stamp);
                }
            }
        }
        held.iter().for_each(|(pin, stamp)| check(pin, *stamp));
    }

    /// Sections, loads, cached translations.
    fn looker(&self, thread: u64) {
        let mut random = Random(0x9876_5432 + thread);
        let reader = self.memory.register();
        let rings: Vec<CachedMap> = (0..8)
            .map(|at| {
                let gpa = Gpa(if at % 2 == 0 {
                    VMEM_AT + at * BLOCK
                } else {
                    (at % DIMMS) << 30
                });
                CachedMap::new(&self.space, gpa, 4096, Access::ReadWrite)
            })
            .collect();
        while self.running() {
            let guard = self.space.read(&reader);
            for ring in &rings {
                if let Ok(slice) = ring.get(&guard) {
                    slice
                        .store_u32(thread as usize * 64, 7, Ordering::Relaxed)
                        .unwrap();
                }
            }
            let address = self.address(&mut random, thread);
            let mut bytes = [0; 200];
            let _ = guard.read_bytes(Gpa(address), &mut bytes);
            let _ = guard.write_bytes(Gpa(address), &bytes[..64]);
            drop(guard);
            self.space.load(&reader, address, 8);
            assert_eq!(self.space.load(&reader, 0x7f_0000_0008, 1) & !0xff, 0);
            self.lookups.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Plugs and unplugs DIMMs, and a device's registers.
    fn plugger(&self) {
        let mut random = Random(42);
        let mut present: Vec<Option<Arc<Region>>> = (0..DIMMS).map(|_| None).collect();
        let device = Region::mmio("device", 4096, Arc::new(Registers));
        let mut round = 0u64;
        while self.running() {
            round += 1;
            let at = random.next(DIMMS) as usize;
            match present[at].take() {
                None => {
                    let name = format!("dimm{round}");
                    let block = World::ram(&self.memory, &name, DIMM_BYTES, None).unwrap();
                    let region = Region::ram(name, &block);
                    self.memory
                        .update(|t| t.add(&self.root, &region, (at as u64) << 30, 0))
                        .unwrap();
                    present[at] = Some(region);
                }
                Some(region) => self.unplug(&region),
            }
            let toggled = self.memory.update(|t| match round % 2 {
                0 => t.remove(&device),
                _ => t.add(&self.root, &device, 0x7f_0000_0000, 0),
            });
            toggled.unwrap();
        }
        present
            .iter()
            .flatten()
            .for_each(|region| self.unplug(region));
    }

    fn unplug(&self, region: &Arc<Region>) {
        let ticket = self.memory.update(|t| t.unplug(region)).unwrap();
        wait("an unplug", ticket.drained());
        ticket
            .destroy()
            .unwrap_or_else(|(_, error)| panic!("{error}"));
        self.unplugs.fetch_add(1, Ordering::Relaxed);
    }

    /// Seals ranges of the sparse block; discards some, takes others back.
    fn sealer(&self, thread: u64) {
        let mut random = Random(77 + thread);
        // Each sealer has its own half.
        let (low, count) = (thread * BLOCKS / 2, BLOCKS / 2);
        while self.running() {
            let first = low + random.next(count - 3);
            let range = first * BLOCK..(first + 1 + random.next(3)) * BLOCK;
            let Ok(seal) = self.vmem.seal(range.clone()) else {
                let _ = self.vmem.plug(range, random.next(4) == 0);
                continue;
            };
            match random.next(4) {
                0 => seal.undo(),
                _ => {
                    wait("a seal", seal.drained());
                    seal.discard()
                        .unwrap_or_else(|(_, error)| panic!("{error}"));
                    self.discards.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }
}

fn check(pin: &Pin, stamp: u64) {
    let mut bytes = [0; 8];
    pin.read_at(0, &mut bytes).unwrap();
    assert_eq!(
        u64::from_le_bytes(bytes),
        stamp,
        "{pin:?} lost what was written through it"
    );
}

fn arena_is_mapped(host: u64) -> bool {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let spans = maps
        .lines()
        .filter_map(|line| line.split_once(' ')?.0.split_once('-'));
    let number = |text| u64::from_str_radix(text, 16).unwrap();
    spans
        .map(|(start, end)| (number(start), number(end)))
        .any(|(s, e)| s <= host && host < e)
}

#[test]
fn nothing_is_given_back_too_early_and_nothing_stays() {
    let seconds = std::env::var("EBBTIDE_TORTURE_SECONDS")
        .ok()
        .and_then(|s| s.parse().ok());
    let length = Duration::from_secs_f64(seconds.unwrap_or(2.0));
    let world = World::new();
    let threads_before = fs::read_dir("/proc/self/task").unwrap().count();
    let (away, received) = sync_channel::<(Pin, u64)>(16);
    let received = Mutex::new(received);
    thread::scope(|scope| {
        let world = &world;
        let received = &received;
        scope.spawn(move || {
            while let Ok((pin, _)) = received.lock().unwrap().recv() {
                // Not a word about the contents: the pinner may have stamped the line again.
                pin.read_at(0, &mut [0; 64]).unwrap();
            }
        });
        for thread in 0..3 {
            let away = away.clone();
            scope.spawn(move || world.pinner(thread, &away));
        }
        drop(away);
        scope.spawn(|| world.looker(10));
        scope.spawn(|| world.plugger());
        for thread in 0..2 {
            scope.spawn(move || world.sealer(thread));
        }
        thread::sleep(length);
        world.stop.store(true, Ordering::Relaxed);
    });
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    println!(
        "{} pins, {} refused, {} look-up rounds, {} unplugs, {} discards",
        count(&world.pins),
        count(&world.refusals),
        count(&world.lookups),
        count(&world.unplugs),
        count(&world.discards),
    );
    for counter in [
        &world.pins,
        &world.refusals,
        &world.lookups,
        &world.unplugs,
        &world.discards,
    ] {
        assert!(count(counter) > 0);
    }
    assert_eq!(world.memory.ram().blocks().len(), 1);
    // Everything can go: the whole sparse block, then the memory.
    for at in 0..BLOCKS {
        if let Ok(seal) = world.vmem.seal(at * BLOCK..(at + 1) * BLOCK) {
            wait("a seal", seal.drained());
            seal.discard()
                .unwrap_or_else(|(_, error)| panic!("{error}"));
        }
    }
    assert_eq!(world.vmem.plugged_bytes(), 0);
    assert_eq!(
        fs::read_dir("/proc/self/task").unwrap().count(),
        threads_before
    );
    let host = world.vmem.host().as_ptr() as u64;
    assert!(arena_is_mapped(host));
    drop(world);
    assert!(!arena_is_mapped(host));
    assert_eq!(
        fs::read_dir("/proc/self/task").unwrap().count(),
        threads_before - 1
    );
}
