// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sections, cached translations and pins.
#![cfg(not(loom))]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ebbtide_memory::{
    Access, AccessError, AddressSpace, Backing, CachedMap, DirtyClient, Gpa, Memory, MemoryConfig,
    Mmio, PinList, RamSpec, Region,
};

struct Nothing;

impl Mmio for Nothing {
    fn read(&self, _: u64, _: u8) -> u64 {
        0
    }
    fn write(&self, _: u64, _: u8, _: u64) {}
}

struct Map {
    memory: Arc<Memory>,
    space: Arc<AddressSpace>,
    root: Arc<Region>,
}

/// RAM a 0..64K, RAM b 64K..128K, ROM 128K..132K, registers 132K..136K, a hole, and sparse RAM
/// (4 blocks of 64K, the first two plugged) from 1M.
fn map() -> Map {
    let memory = Memory::new(MemoryConfig {
        arena_bytes: 1 << 30,
    })
    .unwrap();
    let root = Region::container("root", 1 << 48);
    let space = memory.address_space("memory", &root).unwrap();
    let ram = |name: &str, size_bytes: u64, block_size_bytes: Option<u64>| {
        let backing = Backing::Anon { thp: false };
        let spec = RamSpec {
            name: name.into(),
            size_bytes,
            max_size_bytes: size_bytes,
            backing,
            prefault: false,
            block_size_bytes,
        };
        memory.ram().add(spec).unwrap()
    };
    let sparse = ram("sparse", 4 << 16, Some(1 << 16));
    sparse.plug(0..2 << 16, false).unwrap();
    memory
        .update(|t| {
            t.add(&root, &Region::ram("a", &ram("a", 1 << 16, None)), 0, 0)?;
            t.add(
                &root,
                &Region::ram("b", &ram("b", 1 << 16, None)),
                1 << 16,
                0,
            )?;
            t.add(
                &root,
                &Region::rom("rom", &ram("rom", 4096, None)),
                2 << 16,
                0,
            )?;
            t.add(
                &root,
                &Region::mmio("io", 4096, Arc::new(Nothing)),
                (2 << 16) + 4096,
                0,
            )?;
            t.add(&root, &Region::ram("sparse", &sparse), 1 << 20, 0)
        })
        .unwrap();
    Map {
        memory,
        space,
        root,
    }
}

#[test]
fn bytes_go_across_regions_and_stop_where_they_must() {
    let Map { memory, space, .. } = map();
    let reader = memory.register();
    let guard = space.read(&reader);
    let text: Vec<u8> = (0..100).collect();
    guard.write_bytes(Gpa(0xffd0), &text).unwrap();
    let mut back = vec![0; 100];
    guard.read_bytes(Gpa(0xffd0), &mut back).unwrap();
    assert_eq!(back, text);
    assert_eq!(
        guard.read::<u32>(Gpa(0xfffe)).unwrap(),
        u32::from_le_bytes([46, 47, 48, 49])
    );
    guard.write(Gpa(0xfffe), 0x0403_0201u32).unwrap();
    assert_eq!(guard.read::<[u8; 4]>(Gpa(0xfffe)).unwrap(), [1, 2, 3, 4]);
    guard.read_bytes(Gpa(0x2_0000), &mut [0; 8]).unwrap();
    let error = guard.write_bytes(Gpa(0x1_fffc), &[0; 8]).unwrap_err();
    assert_eq!(
        error,
        AccessError::ReadOnly {
            gpa: Gpa(0x2_0000),
            len: 4
        }
    );
    let error = guard.read_bytes(Gpa(0x2_0ffe), &mut [0; 4]).unwrap_err();
    assert_eq!(
        error,
        AccessError::NotRam {
            gpa: Gpa(0x2_1000),
            len: 2
        }
    );
    let error = guard.read_bytes(Gpa(0x9_0000), &mut [0; 4]).unwrap_err();
    assert_eq!(
        error,
        AccessError::Unmapped {
            gpa: Gpa(0x9_0000),
            len: 4
        }
    );
    let error = guard.read_bytes(Gpa(0x11_fffc), &mut [0; 8]).unwrap_err();
    assert_eq!(
        error,
        AccessError::Unplugged {
            gpa: Gpa(0x12_0000),
            len: 4
        }
    );
    assert_eq!(error.to_string(), "unplugged memory at 0x120000 (length 4)");
    let error = guard.read::<u64>(Gpa(u64::MAX - 3)).unwrap_err();
    assert_eq!(
        error,
        AccessError::Overflow {
            gpa: Gpa(u64::MAX - 3),
            len: 8
        }
    );
}

#[test]
fn a_pin_is_one_piece_of_one_region() {
    let Map { memory, space, .. } = map();
    let reader = memory.register();
    let guard = space.read(&reader);
    let refused = |gpa, len, access| guard.pin(Gpa(gpa), len, access).unwrap_err();
    assert!(matches!(
        refused(0xfff0, 0x20, Access::Read),
        AccessError::SpansRegions { .. }
    ));
    assert!(matches!(
        refused(0x2_0000, 8, Access::ReadWrite),
        AccessError::ReadOnly { .. }
    ));
    assert!(matches!(
        refused(0x2_1000, 8, Access::Read),
        AccessError::NotRam { .. }
    ));
    assert!(matches!(
        refused(0x5_0000, 8, Access::Read),
        AccessError::Unmapped { .. }
    ));
    assert!(matches!(
        refused(0x11_fff0, 0x20, Access::Read),
        AccessError::Unplugged { .. }
    ));
    assert!(matches!(
        refused(0, 0, Access::Read),
        AccessError::Overflow { .. }
    ));
    assert!(matches!(
        refused(u64::MAX, 2, Access::Read),
        AccessError::Overflow { .. }
    ));
    assert!(matches!(
        refused(0x13_fff0, 0x20, Access::Read),
        AccessError::Unmapped { .. }
    ));
    let pin = guard.pin(Gpa(0x10_fff0), 0x20, Access::Write).unwrap();
    drop(guard);
    pin.write_at(0x10, b"ebb").unwrap();
    let mut bytes = [0; 3];
    pin.read_at(0x10, &mut bytes).unwrap();
    assert_eq!(&bytes, b"ebb");
    assert!(pin.write_at(0x1e, b"ebb").is_err());
    assert!(pin.read_at(usize::MAX, &mut bytes).is_err());
    let read_only = space.read(&reader).pin(Gpa(0), 8, Access::Read).unwrap();
    assert!(matches!(
        read_only.write_at(0, b"x"),
        Err(AccessError::ReadOnly { .. })
    ));
    assert_eq!(
        space.load(&reader, 0x11_0000, 4),
        u64::from(u32::from_le_bytes(*b"ebb\0"))
    );
}

#[test]
fn a_list_splits_at_regions_and_is_all_or_nothing() {
    let Map { memory, space, .. } = map();
    let reader = memory.register();
    let guard = space.read(&reader);
    let mut list = PinList::new();
    guard
        .pin_list(
            &[(Gpa(0xfff0), 0x20), (Gpa(0x100), 4), (Gpa(5), 0)],
            Access::Write,
            &mut list,
        )
        .unwrap();
    assert_eq!((list.iovecs().len(), list.total_len()), (3, 0x24));
    let failed = guard.pin_list(
        &[(Gpa(0x200), 8), (Gpa(0x2_1000), 1)],
        Access::Write,
        &mut list,
    );
    assert!(matches!(failed, Err(AccessError::NotRam { .. })));
    assert_eq!((list.iovecs().len(), list.total_len()), (3, 0x24));
    drop(guard);
    let text: Vec<u8> = (0..0x24).collect();
    list.copy_from(0, &text).unwrap();
    let mut back = [0; 8];
    list.copy_to(0x1c, &mut back).unwrap();
    assert_eq!(back[..], text[0x1c..]);
    assert!(list.copy_to(0x1d, &mut back).is_err());
    assert_eq!(space.load(&reader, 0xfff0, 2), 0x0100);
    assert_eq!(space.load(&reader, 0x1_0000, 2), 0x1110);
    assert_eq!(space.load(&reader, 0x100, 4), 0x2322_2120);
    assert_eq!(format!("{list:?}"), "PinList(36 bytes in 3 pieces, 2 pins)");
    let sent = std::thread::spawn(move || drop(list));
    sent.join().unwrap();
    let mut list = PinList::new();
    space
        .read(&reader)
        .pin_list(&[(Gpa(0), 4)], Access::Read, &mut list)
        .unwrap();
    assert!(matches!(
        list.copy_from(0, &[1]),
        Err(AccessError::ReadOnly { .. })
    ));
    list.clear();
    assert!(list.is_empty());
}

#[test]
fn a_cached_translation_follows_the_map() {
    let Map {
        memory,
        space,
        root,
    } = map();
    let reader = memory.register();
    let ring = CachedMap::new(&space, Gpa(0x1000), 0x100, Access::ReadWrite);
    {
        let guard = space.read(&reader);
        let slice = ring.get(&guard).unwrap();
        slice.store_u16(2, 7, Ordering::Release).unwrap();
        slice.write(4, 0xdead_beefu32).unwrap();
        assert_eq!(
            slice.load_u64(0, Ordering::Acquire).unwrap(),
            0xdead_beef_0007_0000
        );
        assert!(slice.load_u32(2, Ordering::Relaxed).is_err());
        assert!(slice.load_u32(0x100, Ordering::Relaxed).is_err());
        assert_eq!(
            slice.subslice(4, 2).unwrap().read::<u16>(0).unwrap(),
            0xbeef
        );
        assert!(slice.subslice(0xff, 2).is_err());
        let mut two = [0; 2];
        slice.copy_to(6, &mut two).unwrap();
        assert_eq!(two, [0xad, 0xde]);
        slice.copy_from(0xfe, &two).unwrap();
        assert!(slice.copy_from(0xff, &two).is_err());
    }
    let cover = Region::mmio("cover", 0x1000, Arc::new(Nothing));
    memory.update(|t| t.add(&root, &cover, 0x1000, 1)).unwrap();
    {
        let guard = space.read(&reader);
        assert!(matches!(ring.get(&guard), Err(AccessError::NotRam { .. })));
    }
    // A section that is older than the newest view must not keep what it finds.
    let old = space.read(&reader);
    memory.update(|t| t.remove(&cover)).unwrap();
    assert!(ring.get(&old).is_err());
    drop(old);
    let old = space.read(&reader);
    assert!(ring.get(&old).is_ok());
    memory.update(|t| t.add(&root, &cover, 0x1000, 1)).unwrap();
    assert!(ring.get(&old).is_ok());
    drop(old);
    assert!(ring.get(&space.read(&reader)).is_err());
    memory.update(|t| t.remove(&cover)).unwrap();
    assert!(ring.get(&space.read(&reader)).is_ok());
    let read_only = CachedMap::new(&space, Gpa(0), 8, Access::Read);
    let guard = space.read(&reader);
    let error = read_only
        .get(&guard)
        .unwrap()
        .store_u8(3, 1, Ordering::Relaxed)
        .unwrap_err();
    assert_eq!(
        error,
        AccessError::ReadOnly {
            gpa: Gpa(3),
            len: 1
        }
    );
}

#[test]
fn a_seal_ends_cached_translations() {
    let Map { memory, space, .. } = map();
    let reader = memory.register();
    let block = memory.ram().by_name("sparse").unwrap();
    let ring = CachedMap::new(&space, Gpa(0x11_0000), 0x100, Access::ReadWrite);
    assert!(ring.get(&space.read(&reader)).is_ok());
    let seal = block.seal(0x1_0000..0x2_0000).unwrap();
    let error = ring.get(&space.read(&reader)).unwrap_err();
    assert!(matches!(error, AccessError::Unplugged { .. }));
    seal.undo();
    assert!(ring.get(&space.read(&reader)).is_ok());
}

#[test]
fn sections_nest_and_grace_waits_for_the_outermost() {
    let Map { memory, space, .. } = map();
    let reader = memory.register();
    let again = memory.register();
    let outer = space.read(&reader);
    let inner = space.read(&again);
    drop(outer);
    assert!(again.in_section());
    let waiting = Arc::clone(&memory);
    let (told, heard) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        waiting.synchronize();
        told.send(Instant::now()).unwrap();
    });
    assert!(heard.recv_timeout(Duration::from_millis(50)).is_err());
    let end = Instant::now();
    drop(inner);
    assert!(heard.recv_timeout(Duration::from_secs(60)).unwrap() >= end);
    thread.join().unwrap();
}

#[test]
#[should_panic(expected = "a read section waits for itself")]
fn synchronize_inside_a_section_is_a_bug() {
    let Map { memory, space, .. } = map();
    let reader = memory.register();
    let _guard = space.read(&reader);
    memory.synchronize();
}

#[test]
#[should_panic(expected = "a reader of another memory")]
fn a_foreign_reader_is_a_bug() {
    let one = map();
    let other = map();
    let reader = other.memory.register();
    let _guard = one.space.read(&reader);
}

#[test]
fn a_slice_is_one_piece_of_one_region_and_marks_what_is_written() {
    let Map { memory, space, .. } = map();
    memory.dirty_log().start(DirtyClient::Migration).unwrap();
    let block = memory.ram().by_name("b").unwrap();
    let take = || {
        let snapshot = block.snapshot_and_clear(DirtyClient::Migration, 0..1 << 16);
        snapshot.unwrap().pages()
    };
    take();
    let reader = memory.register();
    let guard = space.read(&reader);
    let slice = guard.slice(Gpa(0x1_0ffc), 64, Access::Write).unwrap();
    assert_eq!((slice.len(), slice.gpa()), (64, Gpa(0x1_0ffc)));
    slice.write(2, 0x0102_0304u32).unwrap();
    assert_eq!(guard.read::<u32>(Gpa(0x1_0ffe)).unwrap(), 0x0102_0304);
    assert_eq!(take(), 2);
    assert!(slice.write(62, 0u32).is_err());
    // Across blocks of the sparse region, all of them plugged.
    let across = guard.slice(Gpa(0x10_fff8), 16, Access::ReadWrite).unwrap();
    across.write(4, 5u64).unwrap();
    assert_eq!(guard.read::<u64>(Gpa(0x10_fffc)).unwrap(), 5);
    let refused = |gpa, len, access| guard.slice(Gpa(gpa), len, access).map(|_| ()).unwrap_err();
    let spans = refused(0xffff, 2, Access::Read);
    assert!(matches!(spans, AccessError::SpansRegions { .. }), "{spans}");
    let rom = refused(0x2_0000, 1, Access::Write);
    assert!(matches!(rom, AccessError::ReadOnly { .. }), "{rom}");
    let unplugged = refused(0x11_fff8, 16, Access::Read);
    assert!(
        matches!(unplugged, AccessError::Unplugged { .. }),
        "{unplugged}"
    );
    let rom = guard.slice(Gpa(0x2_0000), 8, Access::Read).unwrap();
    assert!(matches!(
        rom.write(0, 1u8),
        Err(AccessError::ReadOnly { .. })
    ));
    let empty = refused(0, 0, Access::Read);
    assert!(matches!(empty, AccessError::Overflow { .. }), "{empty}");
}
