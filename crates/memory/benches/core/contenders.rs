// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is measured: this crate, vm-memory, and what no protection at all would cost.

use std::cell::Cell;
use std::hint::black_box;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use ebbtide_memory::{
    Access, AccessError, AddressSpace, Backing, DmaSpace, Gpa, LocalSpace, Memory, MemoryConfig,
    Pin, RamSpec, Reader, Region, SectionKind,
};
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryMmap, GuestRegionMmap, MmapRegion, Permissions,
};

/// This crate.
pub struct Ours {
    pub memory: Arc<Memory>,
    pub space: Arc<AddressSpace>,
    root: Arc<Region>,
    pub reader: Reader,
}

impl Ours {
    /// RAM regions (start, length); with `block` the last is sparse and fully plugged.
    pub fn new(regions: &[(u64, u64)], block: Option<u64>) -> Ours {
        let memory = Memory::new(MemoryConfig {
            arena_bytes: 1 << 40,
        })
        .unwrap();
        let root = Region::container("root", 1 << 48);
        let space = memory.address_space("memory", &root).unwrap();
        let added: Vec<_> = regions
            .iter()
            .enumerate()
            .map(|(at, (start, length))| {
                let block = block.filter(|_| at + 1 == regions.len());
                (Ours::ram(&memory, *start, *length, block), *start)
            })
            .collect();
        memory
            .update(|t| {
                added
                    .iter()
                    .try_for_each(|(ram, start)| t.add(&root, ram, *start, 0))
            })
            .unwrap();
        let reader = memory.register();
        Ours {
            memory,
            space,
            root,
            reader,
        }
    }

    /// What the address space shows.
    pub fn root(&self) -> &Arc<Region> {
        &self.root
    }

    fn ram(
        memory: &Memory,
        start: u64,
        size_bytes: u64,
        block_size_bytes: Option<u64>,
    ) -> Arc<Region> {
        let spec = RamSpec {
            name: format!("ram{start:x}"),
            size_bytes,
            max_size_bytes: size_bytes,
            backing: Backing::Anon { thp: false },
            prefault: false,
            block_size_bytes,
        };
        let block = memory.ram().add(spec).unwrap();
        if block_size_bytes.is_some() {
            block.plug(0..size_bytes, false).unwrap();
        }
        Region::ram(format!("ram{start:x}"), &block)
    }

    #[inline(always)]
    pub fn lookup(&self, address: u64) -> u64 {
        let guard = self.space.read(&self.reader);
        let host = guard
            .lookup(Gpa(address))
            .and_then(|section| section.host());
        host.map_or(0, |host| host.as_ptr() as u64)
    }

    pub fn lookups(&self, addresses: &[u64]) -> u64 {
        addresses
            .iter()
            .fold(0, |sum, address| sum ^ self.lookup(*address))
    }

    /// The host address of a slice of 64 bytes.
    #[inline(always)]
    pub fn slice(&self, address: u64) -> u64 {
        let guard = self.space.read(&self.reader);
        let slice = guard.slice(Gpa(address), 64, Access::Read);
        slice.map_or(0, |slice| black_box(slice.as_ptr()) as u64)
    }

    pub fn slices(&self, addresses: &[u64]) -> u64 {
        addresses
            .iter()
            .fold(0, |sum, address| sum ^ self.slice(*address))
    }

    pub fn pins(&self, addresses: &[u64]) -> u64 {
        pins(&self.space, &self.reader, addresses)
    }

    pub fn pinned(&self, addresses: &[u64]) -> Vec<Pin> {
        pinned(&self.space, &self.reader, addresses)
    }

    /// Panics unless all addresses can be pinned, and are in a sparse block whose plugged bitmap
    /// is asked.
    pub fn check_pins(&self, addresses: &[u64]) {
        let guard = self.space.read(&self.reader);
        for address in addresses {
            guard.pin(Gpa(*address), 64, Access::Write).unwrap();
        }
        let address = addresses[0];
        let section = guard.lookup(Gpa(address)).unwrap();
        let SectionKind::Ram {
            block,
            block_offset,
            ..
        } = section.kind()
        else {
            panic!("{address:#x} is no RAM");
        };
        let size = block.block_size_bytes().unwrap();
        let at = (block_offset + (address - section.range().start)) / size * size;
        let seal = block.seal(at..at + size).unwrap();
        let refusal = guard.pin(Gpa(address), 64, Access::Write).unwrap_err();
        assert!(matches!(refusal, AccessError::Unplugged { .. }));
        seal.undo();
        guard.pin(Gpa(address), 64, Access::Write).unwrap();
    }

    /// A view by vm-memory's traits, and a slice of it, per address.
    pub fn section_views(&self, addresses: &[u64]) -> u64 {
        let local = LocalSpace::new(&self.space, &self.reader, None);
        addresses
            .iter()
            .fold(0, |sum, address| sum ^ slice(&*local.memory(), *address))
    }

    /// The same with views that pin.
    pub fn dma_views(&self, addresses: &[u64]) -> u64 {
        let dma = DmaSpace::new(&self.space, None);
        addresses
            .iter()
            .fold(0, |sum, address| sum ^ slice(&*dma.memory(), *address))
    }

    /// A region to add and remove.
    pub fn extra(&self, place: u64) -> (Arc<Region>, u64) {
        (Ours::ram(&self.memory, place, 1 << 20, None), place)
    }

    pub fn publish_twice(&self, (region, place): &mut (Arc<Region>, u64)) {
        self.memory
            .update(|t| t.add(&self.root, region, *place, 0))
            .unwrap();
        self.memory.update(|t| t.remove(region)).unwrap();
    }
}

#[inline(always)]
fn pin(space: &AddressSpace, reader: &Reader, address: u64) -> Pin {
    let guard = space.read(reader);
    match guard.pin(Gpa(address), 64, Access::Write) {
        Ok(pin) => pin,
        // A panic would need the guard in memory to unwind it. Why is for `check_pins`.
        Err(_) => std::process::abort(),
    }
}

/// Pins each address, on any thread.
pub fn pins(space: &AddressSpace, reader: &Reader, addresses: &[u64]) -> u64 {
    addresses.iter().fold(0, |sum, address| {
        let pin = pin(space, reader, *address);
        sum ^ black_box(pin.as_ptr()) as u64
    })
}

/// Pins all addresses, on any thread.
pub fn pinned(space: &AddressSpace, reader: &Reader, addresses: &[u64]) -> Vec<Pin> {
    let pin = |address: &u64| pin(space, reader, *address);
    addresses.iter().map(pin).collect()
}

/// The host address of 64 bytes, by way of vm-memory's `GuestMemory`.
#[inline(always)]
fn slice<M: GuestMemory>(memory: &M, address: u64) -> u64 {
    let mut slices = memory
        .get_slices(GuestAddress(address), 64, Permissions::Write)
        .unwrap();
    let slice = slices.next().unwrap().unwrap();
    slice.ptr_guard().as_ptr() as u64
}

type Map = GuestMemoryMmap<()>;

/// vm-memory behind `GuestMemoryAtomic`, as VMMs use it.
pub struct VmMemory {
    memory: GuestMemoryAtomic<Map>,
}

impl VmMemory {
    pub fn new(regions: &[(u64, u64)]) -> VmMemory {
        let regions: Vec<_> = regions
            .iter()
            .map(|(start, length)| VmMemory::ram(*start, *length))
            .collect();
        VmMemory {
            memory: GuestMemoryAtomic::new(Map::from_arc_regions(regions).unwrap()),
        }
    }

    fn ram(start: u64, length: u64) -> Arc<GuestRegionMmap<()>> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let region = MmapRegion::build(
            None,
            length as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
        )
        .unwrap();
        Arc::new(GuestRegionMmap::new(region, GuestAddress(start)).unwrap())
    }

    #[inline(always)]
    pub fn lookup(&self, address: u64) -> u64 {
        let memory = self.memory.memory();
        memory
            .get_host_address(GuestAddress(address))
            .map_or(0, |host| host as u64)
    }

    pub fn lookups(&self, addresses: &[u64]) -> u64 {
        addresses
            .iter()
            .fold(0, |sum, address| sum ^ self.lookup(*address))
    }

    /// The host address of a slice of 64 bytes.
    #[inline(always)]
    pub fn slice(&self, address: u64) -> u64 {
        let memory = self.memory.memory();
        let slice = GuestMemoryBackend::get_slice(&*memory, GuestAddress(address), 64);
        slice.map_or(0, |slice| black_box(slice.ptr_guard().as_ptr()) as u64)
    }

    pub fn slices(&self, addresses: &[u64]) -> u64 {
        addresses
            .iter()
            .fold(0, |sum, address| sum ^ self.slice(*address))
    }

    pub fn views(&self, addresses: &[u64]) -> u64 {
        addresses.iter().fold(0, |sum, address| {
            sum ^ slice(&*self.memory.memory(), *address)
        })
    }

    /// What keeps memory across an I/O: the whole map.
    pub fn pinning_views(&self, addresses: &[u64]) -> u64 {
        addresses.iter().fold(0, |sum, address| {
            sum ^ slice(&*self.memory.memory().into_inner(), *address)
        })
    }

    /// What keeps memory across an I/O: the whole map.
    #[inline(always)]
    fn pin(&self, address: u64) -> (Arc<Map>, u64) {
        let map = self.memory.memory().into_inner();
        let host = map
            .get_host_address(GuestAddress(address))
            .map_or(0, |host| host as u64);
        (map, host)
    }

    pub fn pins(&self, addresses: &[u64]) -> u64 {
        addresses.iter().fold(0, |sum, address| {
            let (map, host) = self.pin(*address);
            black_box(&map);
            sum ^ black_box(host)
        })
    }

    pub fn pinned(&self, addresses: &[u64]) -> Vec<(Arc<Map>, u64)> {
        addresses.iter().map(|address| self.pin(*address)).collect()
    }

    pub fn extra(&self, place: u64) -> Arc<GuestRegionMmap<()>> {
        VmMemory::ram(place, 1 << 20)
    }

    /// What a request keeps.
    pub fn hold(&self) -> Arc<Map> {
        self.memory.memory().into_inner()
    }

    pub fn add(&self, region: &Arc<GuestRegionMmap<()>>) {
        let lock = self.memory.lock().unwrap();
        let added = self.memory.memory().insert_region(Arc::clone(region));
        lock.replace(added.unwrap());
    }

    /// Takes a region out of the map; it is unmapped when nobody has it any more.
    pub fn remove(&self, region: Arc<GuestRegionMmap<()>>) -> Weak<GuestRegionMmap<()>> {
        use vm_memory::GuestMemoryRegion;
        let lock = self.memory.lock().unwrap();
        let (start, length) = (region.start_addr(), region.len());
        let (without, removed) = self.memory.memory().remove_region(start, length).unwrap();
        lock.replace(without);
        drop(region);
        Arc::downgrade(&removed)
    }

    pub fn publish_twice(&self, region: &mut Arc<GuestRegionMmap<()>>) {
        use vm_memory::GuestMemoryRegion;
        // As its documentation has it: who changes the map holds the lock from its look at it on.
        let lock = self.memory.lock().unwrap();
        let added = self.memory.memory().insert_region(Arc::clone(region));
        lock.replace(added.unwrap());
        let (start, length) = (region.start_addr(), region.len());
        let lock = self.memory.lock().unwrap();
        let (removed, _) = self.memory.memory().remove_region(start, length).unwrap();
        lock.replace(removed);
    }
}

/// No protection, no change, and a search that knows the map: a sorted array for a PC's map, one
/// index for a uniform one. Pins are two plain counters at home, one addition away.
pub struct Direct {
    starts: Vec<u64>,
    hosts: Vec<u64>,
    counts: Vec<[Cell<u64>; 2]>,
    away: Vec<AtomicU64>,
    uniform: bool,
}

/// A pin of the floor.
pub struct Counted<'a>(&'a AtomicU64);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Release);
    }
}

impl Direct {
    pub fn new(regions: &[(u64, u64)]) -> Direct {
        let starts: Vec<u64> = regions.iter().map(|region| region.0).collect();
        let uniform = starts
            .iter()
            .enumerate()
            .all(|(at, start)| *start == (at as u64) << 21);
        Direct {
            hosts: starts
                .iter()
                .map(|start| 0x7000_0000_0000 + start * 3)
                .collect(),
            counts: regions.iter().map(|_| Default::default()).collect(),
            away: regions.iter().map(|_| AtomicU64::new(0)).collect(),
            starts,
            uniform,
        }
    }

    /// Two numbers per region, and no more.
    pub fn plain(regions: &[(u64, u64)]) -> Vec<(u64, u64)> {
        regions.to_vec()
    }

    #[inline(always)]
    fn at(&self, address: u64) -> usize {
        if self.uniform {
            (address >> 21) as usize
        } else {
            self.starts.partition_point(|start| *start <= address) - 1
        }
    }

    #[inline(always)]
    pub fn lookup(&self, address: u64) -> u64 {
        let at = self.at(address);
        self.hosts[at] + (address - self.starts[at])
    }

    pub fn lookups(&self, addresses: &[u64]) -> u64 {
        addresses
            .iter()
            .fold(0, |sum, address| sum ^ self.lookup(*address))
    }

    pub fn pins(&self, addresses: &[u64]) -> u64 {
        addresses.iter().fold(0, |sum, address| {
            let at = self.at(*address);
            let [acquired, released] = &self.counts[at];
            acquired.set(acquired.get() + 1);
            let host = black_box(self.hosts[at] + (address - self.starts[at]));
            released.set(released.get() + 1);
            sum ^ host
        })
    }

    pub fn pinned(&self, addresses: &[u64]) -> Vec<(Counted<'_>, u64)> {
        self.pinned_by(&self.away[0], addresses)
    }

    /// The same, let go by an addition to `away`.
    pub fn pinned_by<'a>(&self, away: &'a AtomicU64, addresses: &[u64]) -> Vec<(Counted<'a>, u64)> {
        let pin = |address: &u64| {
            let at = self.at(*address);
            let acquired = &self.counts[at][0];
            acquired.set(acquired.get() + 1);
            (Counted(away), self.hosts[at] + (address - self.starts[at]))
        };
        addresses.iter().map(pin).collect()
    }

    /// A copy of the map, twice.
    pub fn copy_twice(&self) {
        black_box((self.starts.clone(), self.hosts.clone()));
        black_box((self.starts.clone(), self.hosts.clone()));
    }
}
