// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A memory with one address space, and registers that remember what is done to them.
#![allow(dead_code)]

use std::sync::{Arc, Mutex};

use ebbtide_memory::{
    AddressSpace, Backing, Error, Memory, MemoryConfig, Mmio, RamBlock, RamSpec, Region,
    Transaction,
};

pub struct Map {
    pub memory: Arc<Memory>,
    pub root: Arc<Region>,
    pub space: Arc<AddressSpace>,
}

impl Map {
    pub fn new() -> Map {
        let memory = Memory::new(MemoryConfig {
            arena_bytes: 4 << 30,
        })
        .unwrap();
        let root = Region::container("root", 1 << 48);
        let space = memory.address_space("memory", &root).unwrap();
        Map {
            memory,
            root,
            space,
        }
    }

    pub fn block(&self, name: &str, size_bytes: u64) -> Arc<RamBlock> {
        let spec = RamSpec {
            name: name.to_owned(),
            size_bytes,
            max_size_bytes: size_bytes,
            backing: Backing::Anon { thp: false },
            prefault: false,
            block_size_bytes: None,
        };
        self.memory.ram().add(spec).unwrap()
    }

    pub fn ram(&self, name: &str, size_bytes: u64) -> Arc<Region> {
        Region::ram(name, &self.block(name, size_bytes))
    }

    pub fn add(&self, region: &Arc<Region>, offset: u64) {
        self.change(|map| map.add(&self.root, region, offset, 0));
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
