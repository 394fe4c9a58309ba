// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What reads and writes cost, and a write's mark in the dirty log.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ebbtide_memory::{Access, DirtyClient, Gpa, RamBlock};
use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap,
    MmapRegion,
};

use crate::contenders::Ours;
use crate::measure::{Plan, Row, spread};
use crate::{COUNTS, uniform};

const GIB: u64 = 1 << 30;

/// vm-memory behind `GuestMemoryAtomic`, with or without a dirty bitmap.
struct Peer<B: NewBitmap + 'static>(GuestMemoryAtomic<GuestMemoryMmap<B>>);

impl<B: NewBitmap + 'static> Peer<B> {
    fn new(regions: &[(u64, u64)]) -> Peer<B> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let region = |(start, length): &(u64, u64)| {
            let mapped = MmapRegion::build(None, *length as usize, protection, flags).unwrap();
            Arc::new(GuestRegionMmap::new(mapped, GuestAddress(*start)).unwrap())
        };
        let regions = regions.iter().map(region).collect();
        let map = GuestMemoryMmap::from_arc_regions(regions).unwrap();
        Peer(GuestMemoryAtomic::new(map))
    }

    fn read(&self, addresses: &[u64]) -> u64 {
        let read = |address: &u64| -> u64 {
            let memory = self.0.memory();
            memory.read_obj(GuestAddress(*address)).unwrap()
        };
        addresses.iter().map(read).fold(0, u64::wrapping_add)
    }

    fn write(&self, addresses: &[u64]) {
        for address in addresses {
            let memory = self.0.memory();
            memory.write_obj(*address, GuestAddress(*address)).unwrap();
        }
    }
}

/// The same memory without any protection: an address is a constant away from its host address.
struct Plain {
    memory: *mut u8,
    length: usize,
}

impl Plain {
    fn new(regions: &[(u64, u64)]) -> Plain {
        let length = regions.last().map_or(0, |(start, length)| start + length) as usize;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let memory = unsafe {
            let memory = libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0);
            // The contenders' memory is in small pages as well.
            libc::madvise(memory, length, libc::MADV_NOHUGEPAGE);
            memory
        };
        assert_ne!(memory, libc::MAP_FAILED);
        Plain {
            memory: memory.cast(),
            length,
        }
    }

    fn read(&self, addresses: &[u64]) -> u64 {
        let read = |address: &u64| {
            assert!(*address as usize + 8 <= self.length);
            // SAFETY: inside the mapping, aligned.
            unsafe {
                let at = self.memory.add(*address as usize).cast::<u64>();
                at.read_volatile()
            }
        };
        addresses.iter().map(read).fold(0, u64::wrapping_add)
    }

    fn write(&self, addresses: &[u64]) {
        for address in addresses {
            assert!(*address as usize + 8 <= self.length);
            // SAFETY: inside the mapping, aligned.
            unsafe {
                let at = self.memory.add(*address as usize).cast::<u64>();
                at.write_volatile(*address);
            }
        }
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `new`.
        unsafe { libc::munmap(self.memory.cast(), self.length) };
    }
}

fn read(ours: &Ours, addresses: &[u64]) -> u64 {
    let read = |address: &u64| -> u64 {
        let guard = ours.space.read(&ours.reader);
        guard.read(Gpa(*address)).unwrap()
    };
    addresses.iter().map(read).fold(0, u64::wrapping_add)
}

fn write(ours: &Ours, addresses: &[u64]) {
    for address in addresses {
        let guard = ours.space.read(&ours.reader);
        guard.write(Gpa(*address), *address).unwrap();
    }
}

/// All rows.
pub fn rows(plan: &Plan) {
    for count in COUNTS {
        read_u64(plan, count);
    }
    for count in COUNTS {
        write_u64::<()>(plan, &format!("write_u64/{count}"), count, false);
    }
    for count in COUNTS {
        write_u64::<AtomicBitmap>(plan, &format!("write_u64_dirty/{count}"), count, true);
    }
    dirty_mark(plan);
    dirty_harvest(plan);
}

fn read_u64(plan: &Plan, count: usize) {
    let id = format!("read_u64/{count}");
    if !plan.wants(&id) {
        return;
    }
    let regions = uniform(count);
    let addresses = spread(&regions);
    let (ours, peer) = (Ours::new(&regions, None), Peer::<()>::new(&regions));
    let floor = Plain::new(&regions);
    // So that there are pages to read.
    write(&ours, &addresses);
    peer.write(&addresses);
    floor.write(&addresses);
    assert_eq!(read(&ours, &addresses), peer.read(&addresses));
    let mut row = Row::new(&id);
    for _ in 0..plan.rounds {
        row.add(
            plan.time(addresses.len(), || read(&ours, &addresses)),
            plan.time(addresses.len(), || peer.read(&addresses)),
            plan.time(addresses.len(), || floor.read(&addresses)),
        );
    }
    row.print();
}

fn write_u64<B: NewBitmap + 'static>(plan: &Plan, id: &str, count: usize, logged: bool) {
    if !plan.wants(id) {
        return;
    }
    let regions = uniform(count);
    let addresses = spread(&regions);
    let (ours, peer) = (Ours::new(&regions, None), Peer::<B>::new(&regions));
    if logged {
        ours.memory
            .dirty_log()
            .start(DirtyClient::Migration)
            .unwrap();
    }
    let floor = Plain::new(&regions);
    let mut row = Row::new(id);
    for _ in 0..plan.rounds {
        row.add(
            plan.time(addresses.len(), || write(&ours, &addresses)),
            plan.time(addresses.len(), || peer.write(&addresses)),
            plan.time(addresses.len(), || floor.write(&addresses)),
        );
    }
    row.print();
}

/// The row `dirty_mark`: a page is marked that is dirty already, under a pin.
fn dirty_mark(plan: &Plan) {
    const ID: &str = "dirty_mark";
    if !plan.wants(ID) {
        return;
    }
    let offsets = spread(&[(0, GIB)]);
    let (ours, _block) = logged();
    let guard = ours.space.read(&ours.reader);
    let pin = guard.pin(Gpa(0), GIB as usize, Access::Write).unwrap();
    drop(guard);
    let peer = AtomicBitmap::new(GIB as usize, NonZeroUsize::MIN.saturating_add(4095));
    let floor: Vec<AtomicU64> = (0..GIB >> 18).map(|_| AtomicU64::new(u64::MAX)).collect();
    let marks = |mark: &dyn Fn(&[u64])| plan.time(offsets.len(), || mark(&offsets));
    let mut row = Row::new(ID);
    for _ in 0..plan.rounds {
        row.add(
            marks(&|all| {
                all.iter()
                    .for_each(|at| pin.mark_dirty(*at as usize, 8).unwrap())
            }),
            marks(&|all| all.iter().for_each(|at| peer.mark_dirty(*at as usize, 8))),
            marks(&|all| all.iter().for_each(|at| test_and_set(&floor, *at))),
        );
    }
    row.print();
}

/// The least that a mark can be.
#[inline(always)]
fn test_and_set(words: &[AtomicU64], at: u64) {
    let bit = 1 << (at >> 12 & 63);
    let word = &words[(at >> 18) as usize];
    if word.load(Ordering::Relaxed) & bit == 0 {
        word.fetch_or(bit, Ordering::Release);
    }
}

/// The row `dirty_harvest_1G`: 1 GiB of which `FEW` pages are dirty.
fn dirty_harvest(plan: &Plan) {
    const ID: &str = "dirty_harvest_1G";
    const FEW: usize = 16;
    if !plan.wants(ID) {
        return;
    }
    let offsets: Vec<u64> = spread(&[(0, GIB)])[..FEW].to_vec();
    let (ours, block) = logged();
    let guard = ours.space.read(&ours.reader);
    let pin = guard.pin(Gpa(0), GIB as usize, Access::Write).unwrap();
    drop(guard);
    let peer = AtomicBitmap::new(GIB as usize, NonZeroUsize::MIN.saturating_add(4095));
    let floor: Vec<AtomicU64> = (0..GIB >> 18).map(|_| AtomicU64::new(0)).collect();
    let mut row = Row::new(ID);
    for _ in 0..plan.rounds {
        // Marking is part of a turn, as a harvest leaves nothing for the next one.
        row.add(
            plan.time(1, || {
                let mark = |at: &u64| pin.mark_dirty(*at as usize, 8).unwrap();
                offsets.iter().for_each(mark);
                block
                    .snapshot_and_clear(DirtyClient::Migration, 0..GIB)
                    .unwrap()
            }),
            plan.time(1, || {
                offsets
                    .iter()
                    .for_each(|at| peer.mark_dirty(*at as usize, 8));
                peer.get_and_reset()
            }),
            plan.time(1, || {
                offsets.iter().for_each(|at| test_and_set(&floor, *at));
                let dirty = floor
                    .iter()
                    .filter(|word| word.load(Ordering::Relaxed) != 0);
                dirty
                    .map(|word| word.swap(0, Ordering::AcqRel))
                    .fold(0, u64::wrapping_add)
            }),
        );
    }
    row.print();
}

/// 1 GiB of RAM with a client on.
fn logged() -> (Ours, Arc<RamBlock>) {
    let ours = Ours::new(&[(0, GIB)], None);
    ours.memory
        .dirty_log()
        .start(DirtyClient::Migration)
        .unwrap();
    let block = ours.memory.ram().blocks().remove(0);
    // Once all, so that all of the bitmap has memory.
    block
        .snapshot_and_clear(DirtyClient::Migration, 0..GIB)
        .unwrap();
    (ours, block)
}
