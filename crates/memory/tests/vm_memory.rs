// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The vm-memory traits: access rights, what holds up an unplug, vhost, the write log.
#![cfg(not(loom))]

mod setup;

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ebbtide_memory::{
    Backing, DmaSpace, DmaView, Gpa, LocalSpace, Phase, PinnedRam, RamBlock, RamSpace, Reader,
    Region, WriteLog,
};
use setup::{Map, spec};
use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::net::Net;
use vhost::{Error as VhostError, VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryBackend, GuestMemoryRegion,
    MemoryRegionAddress, Permissions, VolatileSlice,
};

const MIB: u64 = 1 << 20;

/// RAM at 0..4 MiB, with a hole in it; ROM behind; registers at 16 MiB; a sparse region at 32 MiB of
/// which the first MiB is plugged.
fn machine() -> (Map, Reader) {
    let map = Map::new();
    map.add(&map.ram("low", 4 * MIB), 0);
    map.add_over(&Region::reservation("hole", MIB), MIB, 1);
    map.add(&Region::rom("rom", &map.block("rom", MIB)), 4 * MIB);
    map.add(&Region::reservation("registers", MIB), 16 * MIB);
    let sparse = map.sparse("sparse", 4 * MIB, MIB, MIB);
    map.add(&Region::ram("sparse", &sparse), 32 * MIB);
    let reader = map.memory.register();
    (map, reader)
}

/// Notes pages of 4 KiB by block name.
#[derive(Default)]
struct Pages(Mutex<BTreeSet<(String, u64)>>);

impl WriteLog for Pages {
    fn wrote(&self, block: &RamBlock, range: Range<u64>) {
        let pages = (range.start >> 12)..range.end.div_ceil(4096);
        let mut noted = self.0.lock().unwrap();
        noted.extend(pages.map(|page| (block.name().to_owned(), page)));
    }

    fn is_dirty(&self, block: &RamBlock, offset: u64) -> bool {
        let page = (block.name().to_owned(), offset >> 12);
        self.0.lock().unwrap().contains(&page)
    }
}

/// What any view of [`machine`] must allow and refuse.
fn check_rights<M: GuestMemory>(view: &M) {
    use Permissions::{Read, ReadWrite, Write};
    let may = |at: u64, len: u64, access| view.check_range(GuestAddress(at), len as usize, access);
    assert!(may(0, MIB, ReadWrite) && may(2 * MIB, 2 * MIB, Write));
    // Into the hole; over its end.
    assert!(!may(MIB - 1, 2, Read) && !may(MIB, 1, Read) && may(MIB, 0, Read));
    assert!(may(4 * MIB, MIB, Read));
    assert!(!may(4 * MIB, 1, Write) && !may(4 * MIB, 1, ReadWrite));
    // From RAM into ROM: as far as reading goes.
    assert!(may(4 * MIB - 8, 16, Read) && !may(4 * MIB - 8, 16, Write));
    assert!(!may(16 * MIB, 1, Read) && !may(1 << 40, 1, Read));
    assert!(may(32 * MIB, MIB, Write) && !may(33 * MIB - 1, 2, Read));
    assert!(!may(u64::MAX, 2, Read) && !may(u64::MAX - 1, 1 << 40, Read));

    view.write_obj(0x1122_3344_5566_7788u64, GuestAddress(4 * MIB - 8))
        .unwrap();
    let across: [u8; 16] = view.read_obj(GuestAddress(4 * MIB - 8)).unwrap();
    assert_eq!(across[..8], 0x1122_3344_5566_7788u64.to_le_bytes());
    assert_eq!(across[8..], [0; 8]);
    let refused = view.write_obj(1u8, GuestAddress(4 * MIB)).unwrap_err();
    assert!(refused.to_string().contains("read-only"), "{refused}");
    assert!(
        view.write_slice(&[1; 16], GuestAddress(4 * MIB - 8))
            .is_err()
    );
    assert!(
        view.store(1u32, GuestAddress(5 * MIB - 4), Ordering::Release)
            .is_err()
    );
    assert_eq!(
        view.load::<u32>(GuestAddress(5 * MIB - 4), Ordering::Acquire)
            .unwrap(),
        0
    );
    let mut into_rom = std::io::Cursor::new(vec![7u8; 8]);
    let read = view.read_volatile_from(GuestAddress(4 * MIB), &mut into_rom, 8);
    assert!(read.is_err());
    assert!(view.read_obj::<u64>(GuestAddress(33 * MIB - 4)).is_err());
    assert!(view.physical_memory().is_none());
}

#[test]
fn devices_have_rights_to_what_is_ram_and_no_other() {
    let (machine, reader) = machine();
    check_rights(&*DmaSpace::new(&machine.space, None).memory());
    check_rights(&*LocalSpace::new(&machine.space, &reader, None).memory());
    assert!(!reader.in_section());
    // Nothing of it reached the ROM.
    assert_eq!(machine.space.load(&reader, 4 * MIB, 8), 0);
}

#[test]
fn a_snapshot_has_no_rom_and_cannot_be_written_past_it() {
    let (machine, _) = machine();
    let ram = RamSpace::new(&machine.space, None).memory();
    let regions: Vec<_> = ram
        .iter()
        .map(|r| (r.start_addr().0 / MIB, r.len() / MIB))
        .collect();
    assert_eq!(regions, [(0, 1), (2, 2), (32, 1)]);
    assert!(ram.write_obj(1u8, GuestAddress(4 * MIB)).is_err());
    assert!(GuestMemory::check_range(
        &*ram,
        GuestAddress(0),
        MIB as usize,
        Permissions::Write
    ));
}

#[test]
fn a_view_pins_what_it_has_met_and_nothing_else() {
    let (machine, _) = machine();
    let dimm = |name: &str, at: u64| {
        let region = machine.ram(name, MIB);
        machine.add(&region, at);
        region
    };
    let (met, other) = (dimm("met", 1 << 30), dimm("other", 2 << 30));
    let view = DmaSpace::new(&machine.space, None).memory();
    assert!(view.check_range(GuestAddress(2 << 30), 8, Permissions::Write));
    let slices: Vec<VolatileSlice<_>> = view
        .get_slices(GuestAddress(1 << 30), 4096, Permissions::Write)
        .unwrap()
        .map(Result::unwrap)
        .collect();
    // A second access is not a second pin.
    view.write_obj(3u8, GuestAddress((1 << 30) + 5000)).unwrap();
    let unplug = |region: &Arc<Region>| {
        let ticket = machine.memory.update(|t| t.unplug(region));
        machine.memory.synchronize();
        ticket.unwrap()
    };
    let other = unplug(&other);
    machine.end(other);
    let ticket = unplug(&met);
    assert_eq!(ticket.phase(), Phase::Draining);
    assert_eq!(ticket.holders()[0].count, 1);
    // The memory is not in the map any more, and still there.
    assert!(!view.check_range(GuestAddress(1 << 30), 1, Permissions::Read));
    slices[0].write_obj(9u8, 100).unwrap();
    assert_eq!(slices[0].read_obj::<u8>(100).unwrap(), 9);
    drop(slices);
    let elsewhere = std::thread::spawn(move || drop(view));
    elsewhere.join().unwrap();
    machine.end(ticket);
}

#[test]
fn a_section_holds_up_a_seal_and_its_end_lets_it_go() {
    let (machine, reader) = machine();
    let sparse = machine.memory.ram().by_name("sparse").unwrap();
    let local = LocalSpace::new(&machine.space, &reader, None);
    let view = local.memory();
    let again = Clone::clone(&view);
    view.write_obj(5u32, GuestAddress(32 * MIB)).unwrap();
    let seal = sparse.seal(0..MIB).unwrap();
    assert!(view.read_obj::<u32>(GuestAddress(32 * MIB)).is_err());
    drop(view);
    assert!(reader.in_section() && !seal.is_drained());
    drop(again);
    assert!(!reader.in_section());
    while !seal.is_drained() {
        machine.memory.synchronize();
    }
    seal.undo();
    assert_eq!(
        local
            .memory()
            .read_obj::<u32>(GuestAddress(32 * MIB))
            .unwrap(),
        5
    );
}

#[test]
fn a_log_is_told_of_every_write_and_of_no_read() {
    let (machine, reader) = machine();
    let pages = Arc::new(Pages::default());
    let log: Arc<dyn WriteLog> = pages.clone();
    let dma = DmaView::new(&machine.space, Some(Arc::clone(&log)));
    let local = LocalSpace::new(&machine.space, &reader, Some(Arc::clone(&log))).memory();
    let ram = PinnedRam::with_log(&machine.space, &reader, Some(&log)).unwrap();
    let take = || std::mem::take(&mut *pages.0.lock().unwrap());
    let low = |pages: &[u64]| {
        pages
            .iter()
            .map(|p| ("low".to_owned(), *p))
            .collect::<BTreeSet<_>>()
    };

    dma.write_slice(&[1; 4098], GuestAddress(2 * MIB + 4095))
        .unwrap();
    assert_eq!(take(), low(&[512, 513, 514]));
    local
        .store(1u32, GuestAddress(8192), Ordering::Relaxed)
        .unwrap();
    assert_eq!(take(), low(&[2]));
    let mut source = std::io::Cursor::new(vec![1u8; 5000]);
    let read = dma.read_exact_volatile_from(GuestAddress(0), &mut source, 5000);
    read.unwrap();
    assert_eq!(take(), low(&[0, 1]));
    ram.write_obj(1u8, GuestAddress(32 * MIB + 4096)).unwrap();
    assert_eq!(take(), BTreeSet::from([("sparse".to_owned(), 1)]));
    assert!(dma.write_slice(&[1; 16], GuestAddress(4 * MIB)).is_err());
    let _: [u8; 32] = dma.read_obj(GuestAddress(0)).unwrap();
    let _: u8 = local.read_obj(GuestAddress(0)).unwrap();
    let _: u8 = ram.read_obj(GuestAddress(0)).unwrap();
    assert_eq!(take(), BTreeSet::new());

    // What is written through a pointer is told by hand, as vm-memory's users do.
    let region = ram.find_region(GuestAddress(2 * MIB)).unwrap();
    let bitmap = region.bitmap();
    assert!(!bitmap.dirty_at(4096));
    bitmap.slice_at(4096).mark_dirty(0, 1);
    assert!(bitmap.dirty_at(4096) && !bitmap.dirty_at(0));
    assert_eq!(take(), low(&[513]));
}

/// Notes where in this process the last write was.
#[derive(Default)]
struct LastWrite(AtomicU64);

impl WriteLog for LastWrite {
    fn wrote(&self, block: &RamBlock, range: Range<u64>) {
        let at = block.host().as_ptr() as u64 + range.start;
        self.0.store(at, Ordering::Relaxed);
    }

    fn is_dirty(&self, _block: &RamBlock, _offset: u64) -> bool {
        false
    }
}

/// The map changes while a snapshot of it is taken: each region marks the block that it has pinned.
#[test]
fn a_snapshot_of_a_map_that_changes_knows_what_it_has_pinned() {
    let map = Map::new();
    let regions = [map.ram("one", MIB), map.ram("other", 2 * MIB)];
    map.add(&regions[0], 0);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (map, done) = (&map, &done);
        scope.spawn(move || {
            for at in (0..2).cycle() {
                if done.load(Ordering::Relaxed) {
                    return;
                }
                map.change(|t| {
                    t.remove(&regions[at])?;
                    t.add(&map.root, &regions[1 - at], 0, 0)
                });
            }
        });
        let log = Arc::new(LastWrite::default());
        let space = RamSpace::new(&map.space, Some(Arc::clone(&log) as Arc<dyn WriteLog>));
        let mut wrong = 0;
        let mut seen = BTreeSet::new();
        let begun = Instant::now();
        // Until each was seen, and for a while.
        while seen.len() < 2 || begun.elapsed() < Duration::from_secs(1) {
            assert!(begun.elapsed() < Duration::from_secs(60), "{seen:?}");
            for region in space.memory().iter() {
                let host = region.get_host_address(MemoryRegionAddress(4096)).unwrap();
                region.bitmap().mark_dirty(4096, 1);
                wrong += u64::from(log.0.load(Ordering::Relaxed) != host as u64);
                seen.insert(region.len());
            }
        }
        done.store(true, Ordering::Relaxed);
        assert_eq!(wrong, 0, "marks of a block that is not pinned");
        assert!(seen.contains(&MIB) && seen.contains(&(2 * MIB)), "{seen:?}");
    });
}

#[test]
fn a_region_of_a_shared_block_names_its_file() {
    let (machine, _) = machine();
    let spec = spec("shared", 4 * MIB, Backing::Memfd { thp: false });
    let shared = Region::ram("shared", &machine.memory.ram().add(spec).unwrap());
    machine.add(&Region::alias("part", &shared, MIB, MIB), 1 << 30);
    let ram = RamSpace::new(&machine.space, None).memory();
    let at = GuestAddress((1 << 30) + 16);
    ram.write_obj(0x77u8, at).unwrap();
    let region = ram.find_region(at).unwrap();
    let file = region.file_offset().unwrap();
    assert_eq!(file.start(), MIB);
    let mut byte = [0];
    file.file().read_exact_at(&mut byte, MIB + 16).unwrap();
    assert_eq!(byte, [0x77]);
    let anonymous = ram.find_region(GuestAddress(0)).unwrap();
    assert!(anonymous.file_offset().is_none());
}

/// A vhost device whose descriptor is not one: what the crate does before its system calls is
/// done, what it asks the kernel fails.
struct NoVhost {
    fd: File,
    space: RamSpace,
}

impl AsRawFd for NoVhost {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl VhostKernBackend for NoVhost {
    type AS = RamSpace;

    fn mem(&self) -> &RamSpace {
        &self.space
    }
}

fn rings(at: u64) -> VringConfigData {
    VringConfigData {
        queue_max_size: 256,
        queue_size: 256,
        flags: 0,
        desc_table_addr: at,
        avail_ring_addr: at + 0x1000,
        used_ring_addr: at + 0x2000,
        log_addr: None,
    }
}

/// The memory table of a snapshot.
fn table(ram: &PinnedRam) -> Vec<VhostUserMemoryRegionInfo> {
    ram.iter()
        .map(|region| {
            let host = region.get_host_address(vm_memory::MemoryRegionAddress(0));
            VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: host.unwrap() as u64,
                mmap_offset: 0,
                mmap_handle: -1,
            }
        })
        .collect()
}

#[test]
fn vhost_finds_rings_and_memory() {
    let (machine, reader) = machine();
    let vhost = NoVhost {
        fd: File::open("/dev/null").unwrap(),
        space: RamSpace::new(&machine.space, None),
    };
    assert!(vhost.is_valid(&rings(0x1000)));
    // Over the hole; in ROM; in registers; in what is unplugged.
    for bad in [MIB - 0x1000, 4 * MIB, 16 * MIB, 33 * MIB] {
        assert!(!vhost.is_valid(&rings(bad)), "{bad:#x}");
    }
    let address = rings(2 * MIB).to_vhost_vring_addr(3, vhost.mem()).unwrap();
    let host = |gpa| machine.space.read(&reader).lookup(Gpa(gpa)).unwrap().host();
    let host = |gpa| host(gpa).unwrap().as_ptr() as u64;
    assert_eq!(address.index, 3);
    assert_eq!(address.desc_user_addr, host(2 * MIB));
    assert_eq!(address.avail_user_addr, host(2 * MIB + 0x1000));
    assert_eq!(address.used_user_addr, host(2 * MIB + 0x2000));
    // As far as the kernel, which knows no such request for this file.
    let refused = vhost.set_vring_addr(0, &rings(2 * MIB)).unwrap_err();
    assert!(matches!(refused, VhostError::IoctlError(_)), "{refused}");
    let refused = vhost.set_vring_addr(0, &rings(16 * MIB)).unwrap_err();
    assert!(matches!(refused, VhostError::InvalidQueue), "{refused}");
    let ram = vhost.mem().memory();
    assert_eq!(table(&ram).len(), 3);
    let refused = vhost.set_mem_table(&table(&ram)).unwrap_err();
    assert!(matches!(refused, VhostError::IoctlError(_)), "{refused}");
}

/// A vhost device follows the map: the table it has keeps its memory until it has the next.
#[test]
fn a_memory_table_holds_up_the_unplug_until_the_next_one() {
    let (machine, _) = machine();
    let block = machine.block("dimm", MIB);
    let dimm = Region::ram("dimm", &block);
    machine.add(&dimm, 1 << 30);
    let space = RamSpace::new(&machine.space, None);
    let first = space.memory();
    assert_eq!(
        table(&first).last().unwrap().userspace_addr,
        block.host().as_ptr() as u64
    );
    let ticket = machine.memory.update(|t| t.unplug(&dimm)).unwrap();
    machine.memory.synchronize();
    let second = space.memory();
    assert_eq!((table(&first).len(), table(&second).len()), (4, 3));
    assert_eq!(ticket.phase(), Phase::Draining);
    drop(first);
    machine.end(ticket);
}

/// With a kernel that has vhost-net, the same through its device.
#[test]
fn vhost_net_takes_the_memory_table_where_there_is_one() {
    let (machine, _) = machine();
    let net = match Net::new(RamSpace::new(&machine.space, None)) {
        Ok(net) => net,
        Err(VhostError::VhostOpen(error)) => {
            eprintln!("SKIPPED: no vhost-net here: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    net.set_owner().unwrap();
    net.set_features(net.get_features().unwrap()).unwrap();
    let ram = net.mem().memory();
    net.set_mem_table(&table(&ram)).unwrap();
    net.set_vring_num(0, 256).unwrap();
    net.set_vring_addr(0, &rings(2 * MIB)).unwrap();
}
