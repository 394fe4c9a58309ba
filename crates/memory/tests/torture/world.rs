// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the threads share.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use ebbtide_memory::{
    AddressSpace, Backing, FlatSection, Listener, ListenerError, ListenerId, Memory, MemoryConfig,
    Mmio, RamBlock, RamSpec, Reader, Region, RegionHold, Ticket,
};

use crate::counts::{Done, Wrong, add};
use crate::dirty;

pub const PAGE: u64 = 4096;
/// Blocks of the sparse block.
pub const BLOCK: u64 = 1 << 20;
pub const BLOCKS: u64 = 100;
/// Places of DIMMs, and their bytes at first and at most.
pub const DIMMS: u64 = 6;
pub const DIMM_BYTES: u64 = 1 << 20;
pub const DIMM_MAX_BYTES: u64 = 2 << 20;
pub const VMEM_AT: u64 = 1 << 40;
pub const LOGGED_AT: u64 = 1 << 41;
/// Where registers are moved about.
pub const WINDOW_AT: u64 = 0x7f_0000_0000;

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits for a future; a minute is for ever.
pub fn wait<T>(what: &str, future: impl Future<Output = T>) -> T {
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

pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % below
    }
}

/// Registers that say their number.
pub struct Registers(pub u64);

impl Mmio for Registers {
    fn read(&self, _: u64, _: u8) -> u64 {
        self.0
    }
    fn write(&self, _: u64, _: u8, _: u64) {}
}

/// RAM that was removed: where it is, which DIMM it was, and the right to look at it.
pub struct Removed {
    pub host: usize,
    pub generation: u64,
    pub hold: RegionHold,
}

/// An external mapper of DIMMs, which is told of removals and acknowledges them on a thread of its
/// own.
struct Mapper {
    held: Vec<(u64, Removed)>,
    removals: SyncSender<Removed>,
}

impl Listener for Mapper {
    fn region_add(&mut self, section: &FlatSection) -> Result<(), ListenerError> {
        if let Some(generation) = generation(&section.region) {
            let removed = Removed {
                host: section.host().unwrap().as_ptr() as usize,
                generation,
                hold: section.hold_as("mapper"),
            };
            self.held.push((section.range.start, removed));
        }
        Ok(())
    }

    fn region_del(&mut self, section: &FlatSection) {
        let at = section.range.start;
        if let Some(at) = self.held.iter().position(|(start, _)| *start == at) {
            // It does not wait under the map's lock: what does not fit is let go at once.
            let _ = self.removals.try_send(self.held.swap_remove(at).1);
        }
    }
}

pub struct World {
    pub memory: Arc<Memory>,
    pub space: Arc<AddressSpace>,
    pub root: Arc<Region>,
    pub vmem: Arc<RamBlock>,
    pub logged: Arc<RamBlock>,
    /// Of the blocks above.
    regions: [Arc<Region>; 2],
    mapper: Mutex<Option<ListenerId>>,
    pub stop: AtomicBool,
    /// No round of writers is to come.
    pub last_round: AtomicBool,
    /// Threads that have registered.
    pub readers: AtomicU64,
    /// Tickets that are out.
    pub tickets: AtomicI64,
    pub done: Done,
    pub wrong: Wrong,
}

impl World {
    pub fn new() -> World {
        let memory = Memory::new(MemoryConfig {
            arena_bytes: 32 << 40,
        })
        .unwrap();
        let root = Region::container("root", 1 << 48);
        let space = memory.address_space("memory", &root).unwrap();
        let vmem = ram(&memory, "vmem", BLOCKS * BLOCK, BLOCKS * BLOCK, Some(BLOCK));
        let bytes = dirty::PAGES * PAGE;
        let logged = ram(&memory, "logged", bytes, bytes, None);
        let regions = [Region::ram("vmem", &vmem), Region::ram("logged", &logged)];
        memory
            .update(|t| {
                t.add(&root, &regions[0], VMEM_AT, 0)?;
                t.add(&root, &regions[1], LOGGED_AT, 0)
            })
            .unwrap();
        World {
            memory,
            space,
            root,
            vmem,
            logged,
            regions,
            mapper: Mutex::default(),
            stop: AtomicBool::new(false),
            last_round: AtomicBool::new(false),
            readers: AtomicU64::new(0),
            tickets: AtomicI64::new(0),
            done: Done::default(),
            wrong: Wrong::default(),
        }
    }

    pub fn add_mapper(&self, removals: SyncSender<Removed>) {
        let held = Vec::new();
        let mapper = Box::new(Mapper { held, removals });
        let id = self.space.add_listener(mapper, 0).unwrap();
        *self.mapper.lock().unwrap() = Some(id);
    }

    /// No removals are told any more.
    pub fn remove_mapper(&self) {
        let id = self.mapper.lock().unwrap().take();
        assert!(id.is_some_and(|id| self.space.remove_listener(id).is_some()));
    }

    /// Makes the calling thread, which does so once, a reader.
    pub fn register(&self) -> Reader {
        let reader = self.memory.register();
        add(&self.readers);
        reader
    }

    pub fn running(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// An address at the start of a page somewhere in what may or may not be there.
    pub fn page(&self, random: &mut Random) -> u64 {
        let (start, length) = match random.next(3) {
            0 => (random.next(DIMMS) << 30, DIMM_MAX_BYTES),
            _ => (VMEM_AT, BLOCKS * BLOCK),
        };
        start + random.next(length / PAGE) * PAGE
    }

    /// Unplugs RAM, waits for its users and gives it back.
    pub fn unplug(&self, region: &Arc<Region>) {
        let ticket = self.memory.update(|t| t.unplug(region)).unwrap();
        self.give_back(ticket);
        add(&self.done.unplugs);
    }

    /// Waits for the users of RAM on its way out and gives it back.
    pub fn give_back(&self, ticket: Ticket) {
        self.tickets.fetch_add(1, Ordering::Relaxed);
        wait("an unplug", ticket.drained());
        ticket
            .destroy()
            .unwrap_or_else(|(_, error)| panic!("{error}"));
        self.tickets.fetch_sub(1, Ordering::Relaxed);
    }

    /// Unplugs the blocks that have been there all the time; the regions there were.
    pub fn unplug_the_rest(&self) -> Vec<Weak<Region>> {
        self.regions.iter().for_each(|region| self.unplug(region));
        let regions = self.regions.iter().chain([&self.root]);
        regions.map(Arc::downgrade).collect()
    }
}

pub fn ram(
    memory: &Memory,
    name: &str,
    size_bytes: u64,
    max_size_bytes: u64,
    block_size_bytes: Option<u64>,
) -> Arc<RamBlock> {
    let spec = RamSpec {
        name: name.into(),
        size_bytes,
        max_size_bytes,
        backing: Backing::Anon { thp: false },
        prefault: false,
        block_size_bytes,
    };
    memory.ram().add(spec).unwrap()
}

/// The number of a DIMM, of which each page says it at its start.
pub fn generation(region: &Region) -> Option<u64> {
    region.name().strip_prefix("dimm")?.parse().ok()
}

/// Writes the number of a DIMM into pages that nobody can find yet.
pub fn stamp(block: &RamBlock, bytes: std::ops::Range<u64>, generation: u64) {
    for page in bytes.step_by(PAGE as usize) {
        // SAFETY: inside the block, which is mapped and which no region shows there.
        unsafe {
            let head = block.host().as_ptr().add(page as usize).cast::<u64>();
            head.write_volatile(generation);
        }
    }
}
