// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! RAM to start from, a memory with one address space, and registers that remember what is done to them.
#![allow(dead_code)]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ebbtide_memory::{
    AddressSpace, Backing, Error, Memory, MemoryConfig, Mmio, Phase, RamBlock, RamSpec, Region,
    Ticket, Transaction,
};

/// A memory for RAM blocks of `arena_bytes` in all.
pub fn memory(arena_bytes: u64) -> Arc<Memory> {
    Memory::new(MemoryConfig { arena_bytes }).unwrap()
}

/// A block that is neither growing, sparse nor touched beforehand.
pub fn spec(name: &str, size_bytes: u64, backing: Backing) -> RamSpec {
    RamSpec {
        name: name.to_owned(),
        size_bytes,
        max_size_bytes: size_bytes,
        backing,
        prefault: false,
        block_size_bytes: None,
    }
}

/// Small pages that belong to nobody else.
pub const ANON: Backing = Backing::Anon { thp: false };

/// A plain block, or a sparse one with nothing plugged.
pub fn block(
    memory: &Memory,
    name: &str,
    size_bytes: u64,
    block_size_bytes: Option<u64>,
) -> Arc<RamBlock> {
    let spec = RamSpec {
        block_size_bytes,
        ..spec(name, size_bytes, ANON)
    };
    memory.ram().add(spec).unwrap()
}

pub struct Map {
    pub memory: Arc<Memory>,
    pub root: Arc<Region>,
    pub space: Arc<AddressSpace>,
}

impl Map {
    pub fn new() -> Map {
        let memory = memory(4 << 30);
        let root = Region::container("root", 1 << 48);
        let space = memory.address_space("memory", &root).unwrap();
        Map {
            memory,
            root,
            space,
        }
    }

    pub fn block(&self, name: &str, size_bytes: u64) -> Arc<RamBlock> {
        block(&self.memory, name, size_bytes, None)
    }

    /// A sparse block of which `plugged_bytes` from its start on are plugged.
    pub fn sparse(
        &self,
        name: &str,
        size_bytes: u64,
        block_size_bytes: u64,
        plugged_bytes: u64,
    ) -> Arc<RamBlock> {
        let sparse = block(&self.memory, name, size_bytes, Some(block_size_bytes));
        sparse.plug(0..plugged_bytes, false).unwrap();
        sparse
    }

    pub fn ram(&self, name: &str, size_bytes: u64) -> Arc<Region> {
        Region::ram(name, &self.block(name, size_bytes))
    }

    pub fn add(&self, region: &Arc<Region>, offset: u64) {
        self.add_over(region, offset, 0);
    }

    pub fn add_over(&self, region: &Arc<Region>, offset: u64, priority: i32) {
        self.change(|map| map.add(&self.root, region, offset, priority));
    }

    /// Takes a region out of the map, and gives its memory back once nobody uses it.
    pub fn unplug(&self, region: &Arc<Region>) {
        self.end(self.change(|map| map.unplug(region)));
    }

    /// Waits for the end of an unplug, and gives the memory back.
    pub fn end(&self, ticket: Ticket) {
        let end = Instant::now() + Duration::from_secs(60);
        while ticket.phase() != Phase::Drained {
            assert!(Instant::now() < end, "{:?}", ticket.holders());
            self.memory.synchronize();
        }
        ticket
            .destroy()
            .unwrap_or_else(|(_, error)| panic!("{error}"));
    }

    pub fn change<T>(&self, f: impl FnOnce(&mut Transaction<'_>) -> Result<T, Error>) -> T {
        self.memory.update(f).unwrap()
    }

    /// The flat view: start, end, region, offset in the region.
    pub fn flat(&self) -> Vec<(u64, u64, String, u64)> {
        let sections = self.space.sections().unwrap();
        let line = |s: &ebbtide_memory::FlatSection| {
            let name = s.region.name().to_owned();
            (s.range.start, s.range.end, name, s.offset_in_region)
        };
        sections.iter().map(line).collect()
    }
}

/// An access to registers: whether a store, offset, size, value.
pub type Seen = (bool, u64, u8, u64);

/// Registers that hold what was stored, byte by byte, and remember each access.
pub struct Scratch {
    pub bytes: Mutex<Vec<u8>>,
    pub seen: Mutex<Vec<Seen>>,
}

impl Scratch {
    pub fn new(bytes: usize) -> Arc<Scratch> {
        Arc::new(Scratch {
            bytes: Mutex::new(vec![0; bytes]),
            seen: Mutex::default(),
        })
    }

    pub fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

impl Mmio for Scratch {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let mut value = [0; 8];
        let (start, size_of) = (offset as usize, usize::from(size));
        value[..size_of].copy_from_slice(&self.bytes.lock().unwrap()[start..start + size_of]);
        let value = u64::from_le_bytes(value);
        self.seen.lock().unwrap().push((false, offset, size, value));
        value
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        let (start, size_of) = (offset as usize, usize::from(size));
        self.bytes.lock().unwrap()[start..start + size_of]
            .copy_from_slice(&value.to_le_bytes()[..size_of]);
        self.seen.lock().unwrap().push((true, offset, size, value));
    }
}
