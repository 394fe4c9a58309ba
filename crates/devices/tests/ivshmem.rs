// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Shared memory on the PCI bus: what both sides see, and its removal while somebody uses it.

mod board;

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use board::{Board, Random, Slot, ready_within, wait};
use ebbtide_bus::pci::{Devfn, Function};
use ebbtide_devices::ivshmem::{IvshmemPlain, check_driver};
use ebbtide_memory::{Access, Backing, Error, Gpa, Phase, RamBlock, RamSpec};

const MIB: u64 = 1 << 20;

fn spec(name: &str, size_bytes: u64, backing: Backing) -> RamSpec {
    RamSpec {
        name: name.into(),
        size_bytes,
        max_size_bytes: size_bytes,
        backing,
        prefault: false,
        block_size_bytes: None,
    }
}

fn memdev(board: &Board) -> Arc<RamBlock> {
    let backing = Backing::Memfd { thp: false };
    board.memory.ram().add(spec("shm0", MIB, backing)).unwrap()
}

fn plug(board: &Board) -> (Arc<IvshmemPlain>, Slot<'_>) {
    let device = IvshmemPlain::new("ivshmem0", &board.memory, &memdev(board)).unwrap();
    let slot = board.plug(device.clone());
    (device, slot)
}

#[test]
fn it_is_revision_1_with_registers_that_do_nothing() {
    let board = Board::new();
    let (_device, slot) = plug(&board);
    assert_eq!(slot.config(0, 4), 0x1110_1af4);
    assert_eq!(slot.config(8, 4), 0x0500_0001);
    assert_eq!(slot.config(0x3d, 1), 0, "no interrupt");
    slot.set_config(0x18, 4, u32::MAX);
    assert_eq!(
        slot.config(0x18, 4),
        0xfff0_000c,
        "1 MiB, 64 bits, prefetchable"
    );
    board.bridge.assign_bars().unwrap();
    assert!(slot.bar(2) >= 1 << 36);
    for register in (0..256).step_by(4) {
        slot.store(0, register, 4, u64::MAX);
        assert_eq!(slot.load(0, register, 4), 0);
    }
}

#[test]
fn both_sides_see_one_memory_wherever_the_guest_puts_it() {
    let board = Board::new();
    let (device, slot) = plug(&board);
    let fd = device.block().fd().unwrap().try_clone_to_owned().unwrap();
    let other = std::fs::File::from(fd);
    slot.store(2, 0x1_2348, 8, 0x0123_4567_89ab_cdef);
    let mut bytes = [0; 8];
    other.read_exact_at(&mut bytes, 0x1_2348).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), 0x0123_4567_89ab_cdef);
    other.write_all_at(b"hello", MIB - 5).unwrap();
    slot.set_config(0x18, 4, 0x4000_0000);
    slot.set_config(0x1c, 4, 0x10);
    assert_eq!(slot.bar(2), 0x10_4000_0000);
    assert_eq!(slot.load(2, MIB - 1, 1), u64::from(b'o'));
    slot.set_config(4, 2, 0);
    assert_eq!(slot.load(2, 0x1_2348, 4), 0xffff_ffff, "not decoded");
    board.bridge.reset();
    board.bridge.assign_bars().unwrap();
    assert_eq!(slot.load(2, 0x1_2348, 4), 0x89ab_cdef, "a reset keeps it");
}

#[test]
fn memory_that_cannot_be_shared_is_refused_by_name() {
    let board = Board::new();
    let file = tempfile::NamedTempFile::new().unwrap();
    let private = Backing::File {
        path: file.path().to_owned(),
        share: false,
        readonly: false,
    };
    let memfd = Backing::Memfd { thp: false };
    let sparse = RamSpec {
        block_size_bytes: Some(MIB),
        ..spec("sparse", 4 * MIB, memfd.clone())
    };
    for (spec, reason) in [
        (spec("anon", MIB, Backing::Anon { thp: false }), "share=on"),
        (spec("file", MIB, private), "share=on"),
        (spec("odd", 3 * MIB, memfd), "its size 3145728"),
        (sparse, "sparse"),
    ] {
        let block = board.memory.ram().add(spec).unwrap();
        let error = IvshmemPlain::new("ivshmem0", &board.memory, &block);
        let error = error.err().unwrap().to_string();
        let start = format!("ivshmem0: memdev {}: ", block.name());
        assert!(
            error.starts_with(&start) && error.contains(reason),
            "{error}"
        );
    }
}

#[test]
fn only_the_plain_device_is_there() {
    check_driver("ivshmem-plain").unwrap();
    let error = check_driver("ivshmem-doorbell").unwrap_err().to_string();
    assert!(
        error.contains("ivshmem-doorbell") && error.contains("server"),
        "{error}"
    );
    let error = check_driver("ivshmem").unwrap_err().to_string();
    assert!(error.contains("ivshmem-plain"), "{error}");
}

#[test]
fn the_memory_stays_for_a_request_that_uses_it_and_goes_after() {
    let board = Board::new();
    let (device, slot) = plug(&board);
    let reader = board.memory.register();
    let address = slot.bar(2) + 0x1000;
    // A disk reads into the shared memory.
    let pin = board
        .space
        .read(&reader)
        .pin(Gpa(address), 512, Access::Write)
        .unwrap();
    let registers = slot.bar(0);
    let closed = device.close();
    assert_eq!(board.space.load(&reader, registers, 4), 0xffff_ffff);
    // Isolated: the guest's own accesses to the memory are still valid.
    board.space.store(&reader, address + 8, 4, 7);
    assert_eq!(board.space.load(&reader, address + 8, 4), 7);
    assert!(matches!(device.retire(), Err(Error::StillMapped { .. })));
    board
        .bridge
        .unmap(Devfn::new(slot.slot, 0).unwrap())
        .unwrap();
    assert_eq!(board.space.load(&reader, address, 4), 0xffff_ffff);
    let read = board.space.read(&reader);
    assert!(read.pin(Gpa(address), 8, Access::Read).is_err());
    drop(read);
    wait(closed);
    let ticket = device.retire().unwrap();
    assert!(matches!(device.retire(), Err(Error::Unplugged(_))));
    wait(ticket.reached(Phase::Draining));
    drop(board.bridge.detach(slot.slot).unwrap());
    pin.write_at(0, b"late but fine").unwrap();
    assert!(ready_within(ticket.drained(), Duration::from_millis(40)).is_none());
    assert!(
        ticket
            .holders()
            .iter()
            .any(|holder| holder.what.starts_with("pins of"))
    );
    drop(pin);
    wait(ticket.drained());
    let block = Arc::downgrade(device.block());
    drop(device);
    ticket
        .destroy()
        .unwrap_or_else(|(_, error)| panic!("{error}"));
    board.memory.synchronize();
    assert!(block.upgrade().is_none(), "nobody knows it any more");
    assert!(board.memory.ram().blocks().is_empty());
}

#[test]
fn it_can_be_shown_again_by_another_function() {
    let board = Board::new();
    let (device, slot) = plug(&board);
    slot.store(2, 0, 8, 42);
    let block = Arc::clone(device.block());
    drop(slot.remove(device.close()));
    drop(device);
    let again = IvshmemPlain::new("ivshmem1", &board.memory, &block).unwrap();
    let slot = board.plug(again.clone());
    assert_eq!(slot.load(2, 0, 8), 42);
    drop(slot.remove(again.close()));
}

#[test]
fn any_access_is_harmless() {
    let board = Board::new();
    let (device, slot) = plug(&board);
    let mut random = Random(0xdead_beef_cafe_f00d);
    for _ in 0..5_000 {
        let (value, size) = (random.next(), [1, 2, 4, 8][random.below(4) as usize]);
        match random.below(6) {
            0 => slot.store(0, random.below(4096), size, value),
            1 => drop(slot.load(0, random.below(4096), size)),
            2 => slot.store(2, random.below(MIB + 16), size, value),
            3 => slot.set_config(random.below(64), size.min(4), value as u32),
            4 => slot.set_config(0x1c, 4, 0x10 | value as u32 & 7),
            _ => slot.set_config(4, 2, value as u32),
        }
        for info in device.config().bars() {
            assert!(!info.mapped || device.config().command().memory());
        }
    }
    board.bridge.reset();
    board.bridge.assign_bars().unwrap();
    slot.store(2, 8, 4, 1);
    assert_eq!(slot.load(2, 8, 4), 1);
    drop(slot.remove(device.close()));
}
