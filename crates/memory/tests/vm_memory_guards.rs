// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! By vm-memory's traits: what is written is dirty, RAM of devices is no RAM of the machine, and a
//! file that is cut short is an error.
#![cfg(not(loom))]

mod setup;

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ebbtide_memory::{
    Backing, DirtyClient, DmaSpace, LocalSpace, PinnedRam, RamBlock, Region, Written,
};
use setup::{Map, spec};
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryBackend, GuestMemoryRegion,
    MemoryRegionAddress, Permissions,
};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// The dirty pages of a block, clean from then on.
fn take(block: &RamBlock) -> Vec<u64> {
    let all = 0..block.size_bytes();
    let snapshot = block.snapshot_and_clear(DirtyClient::Migration, all);
    let ranges = snapshot.unwrap();
    let pages = ranges.ranges().flat_map(|r| r.start / PAGE..r.end / PAGE);
    pages.collect()
}

/// As whoever is generic over memory writes.
fn write_by_trait(memory: &impl GuestMemory, at: u64) {
    memory.write_obj(7u32, GuestAddress(at)).unwrap();
}

#[test]
fn what_is_written_by_the_traits_is_dirty_at_once() {
    let map = Map::new();
    let block = map.block("ram", MIB);
    map.add(&Region::ram("ram", &block), MIB);
    let reader = map.memory.register();
    map.memory
        .dirty_log()
        .start(DirtyClient::Migration)
        .unwrap();
    take(&block);
    let dma = DmaSpace::new(&map.space, None).memory();
    write_by_trait(&*dma, MIB + 3 * PAGE);
    assert_eq!(take(&block), [3]);
    dma.store(1u32, GuestAddress(MIB + 4 * PAGE), Ordering::Release)
        .unwrap();
    assert_eq!(take(&block), [4]);
    dma.write_slice(&[1; 2], GuestAddress(MIB + 6 * PAGE - 1))
        .unwrap();
    let _: u32 = dma.read_obj(GuestAddress(MIB)).unwrap();
    assert_eq!(take(&block), [5, 6]);
    let local = LocalSpace::new(&map.space, &reader, None).memory();
    write_by_trait(&*local, MIB + 7 * PAGE);
    assert_eq!(take(&block), [7]);
    drop((local, dma));
    let ram = PinnedRam::new(&map.space, &reader).unwrap();
    write_by_trait(&ram, MIB + 8 * PAGE);
    ram.write_obj(1u8, GuestAddress(MIB + 9 * PAGE)).unwrap();
    let region = ram.find_region(GuestAddress(MIB)).unwrap();
    let bytes = [1; 8];
    region
        .write_slice(&bytes, MemoryRegionAddress(11 * PAGE))
        .unwrap();
    assert_eq!(take(&block), [8, 9, 11]);
    // By hand, and past the end of the block.
    region.bitmap().mark_dirty(12 * PAGE as usize, 1);
    region.bitmap().mark_dirty((MIB - 1) as usize, usize::MAX);
    region.bitmap().mark_dirty(usize::MAX, usize::MAX);
    Written::new(&block, None).mark_dirty(14 * PAGE as usize, 1);
    assert_eq!(take(&block), [12, 14, 255]);
}

#[test]
fn ram_of_a_device_is_for_devices_and_not_in_a_snapshot() {
    let map = Map::new();
    map.add(&map.ram("ram", MIB), 0);
    let bar = Region::ram_device("bar", &map.block("bar", MIB));
    map.add(&bar, 16 * MIB);
    let reader = map.memory.register();
    let ram = PinnedRam::new(&map.space, &reader).unwrap();
    let starts: Vec<u64> = ram.iter().map(|region| region.start_addr().0).collect();
    assert_eq!(starts, [0]);
    assert!(ram.read_obj::<u8>(GuestAddress(16 * MIB)).is_err());
    let at = GuestAddress(16 * MIB + 8);
    write_by_trait(&*DmaSpace::new(&map.space, None).memory(), at.0);
    let local = LocalSpace::new(&map.space, &reader, None).memory();
    assert_eq!(local.read_obj::<u32>(at).unwrap(), 7);
    drop(local);
    // A snapshot holds up no unplug of it.
    map.unplug(&bar);
}

/// 16 pages of a file that is there, and its block at 1 MiB.
fn on_a_file(map: &Map) -> (Arc<File>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ram");
    let backing = Backing::File {
        path: path.clone(),
        share: true,
        readonly: false,
    };
    let spec = spec("ram", 16 * PAGE, backing);
    let block = map.memory.ram().add(spec).unwrap();
    map.add(&Region::ram("ram", &block), MIB);
    let file = File::options().write(true).open(path).unwrap();
    (Arc::new(file), dir)
}

/// Whatever is asked of a view by the trait is looked at before: all that a file lacks is refused.
fn check_refused(memory: &impl GuestMemory) {
    let (there, gone) = (GuestAddress(MIB), GuestAddress(MIB + 8 * PAGE));
    memory.write_obj(1u64, there).unwrap();
    assert_eq!(memory.read_obj::<u64>(there).unwrap(), 1);
    let error = memory.read_obj::<u64>(gone).unwrap_err().to_string();
    assert!(error.contains("host does not provide"), "{error}");
    assert!(memory.write_obj(1u64, gone).is_err());
    assert!(memory.load::<u32>(gone, Ordering::Acquire).is_err());
    assert!(memory.store(1u32, gone, Ordering::Release).is_err());
    let mut bytes = [0; 2 * PAGE as usize];
    // From what is there into what is not.
    let edge = GuestAddress(MIB + 7 * PAGE);
    assert!(memory.read_slice(&mut bytes, edge).is_err());
    let mut slices = memory.get_slices(edge, 64, Permissions::Read).unwrap();
    assert!(slices.next().unwrap().is_ok());
}

#[test]
#[cfg(target_arch = "x86_64")]
fn memory_that_a_file_lacks_is_refused_and_kills_nobody() {
    let map = Map::new();
    let (file, _dir) = on_a_file(&map);
    let reader = map.memory.register();
    let ram = PinnedRam::new(&map.space, &reader).unwrap();
    let dma = DmaSpace::new(&map.space, None).memory();
    dma.write_slice(&[9; 16 * PAGE as usize], GuestAddress(MIB))
        .unwrap();
    file.set_len(8 * PAGE).unwrap();
    check_refused(&*dma);
    check_refused(&*LocalSpace::new(&map.space, &reader, None).memory());
    check_refused(&ram);
}

/// Cut between look-up and copy: what a view copies itself is an error still.
#[test]
#[cfg(target_arch = "x86_64")]
fn copies_of_the_views_survive_a_cut_in_their_middle() {
    let map = Map::new();
    let (file, _dir) = on_a_file(&map);
    let reader = map.memory.register();
    let ram = PinnedRam::new(&map.space, &reader).unwrap();
    let region = ram.find_region(GuestAddress(MIB)).unwrap();
    let dma = DmaSpace::new(&map.space, None).memory();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                file.set_len(2 * PAGE).unwrap();
                file.set_len(16 * PAGE).unwrap();
            }
        });
        let mut bytes = [0; 16 * PAGE as usize];
        let (mut good, mut bad) = (0, 0);
        let (start, at) = (Instant::now(), GuestAddress(MIB));
        // Most are refused for what is missing at their end, some for what goes missing.
        while start.elapsed() < Duration::from_millis(500) || good == 0 || bad == 0 {
            assert!(start.elapsed() < Duration::from_secs(60), "{good} {bad}");
            for result in [
                region.read_slice(&mut bytes, MemoryRegionAddress(0)),
                region.write_slice(&bytes, MemoryRegionAddress(0)),
                dma.read_slice(&mut bytes, at),
                dma.write_slice(&bytes, at),
                ram.read_slice(&mut bytes, at),
            ] {
                match result {
                    Ok(()) => good += 1,
                    Err(_) => bad += 1,
                }
            }
        }
        over.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_region_copies_what_it_has_and_nothing_behind() {
    let map = Map::new();
    map.add(&map.ram("ram", 16 * PAGE), MIB);
    let ram = PinnedRam::new(&map.space, &map.memory.register()).unwrap();
    let region = ram.find_region(GuestAddress(MIB)).unwrap();
    let (last, end) = (
        MemoryRegionAddress(16 * PAGE - 2),
        MemoryRegionAddress(16 * PAGE),
    );
    assert_eq!(region.write(&[1, 2, 3], last).unwrap(), 2);
    let mut got = [0; 3];
    assert_eq!(region.read(&mut got, last).unwrap(), 2);
    assert_eq!(got, [1, 2, 0]);
    assert!(region.read_slice(&mut got, last).is_err());
    assert!(region.write_slice(&got, last).is_err());
    assert!(region.read(&mut got, end).is_err() && region.write(&got, end).is_err());
    assert!(
        region
            .read(&mut got, MemoryRegionAddress(u64::MAX))
            .is_err()
    );
    assert_eq!(region.read(&mut [], end).unwrap(), 0);
    let at = MemoryRegionAddress(8);
    region.store(0x1234u16, at, Ordering::SeqCst).unwrap();
    assert_eq!(region.load::<u16>(at, Ordering::SeqCst).unwrap(), 0x1234);
    assert!(region.load::<u16>(end, Ordering::SeqCst).is_err());
    let mut source = &[5u8; 4][..];
    let read = region.read_volatile_from(last, &mut source, 4);
    assert_eq!(read.unwrap(), 2);
    let mut target = Vec::new();
    region.write_all_volatile_to(last, &mut target, 2).unwrap();
    assert_eq!(target, [5, 5]);
    assert!(region.write_all_volatile_to(last, &mut target, 3).is_err());
    assert!(
        region
            .read_exact_volatile_from(last, &mut source, 3)
            .is_err()
    );
}
