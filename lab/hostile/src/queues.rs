// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Queues that point anywhere (virtio 1.3, 2.7 and 4.1.4.3).

use crate::functions::Function;
use crate::{Board, Random, Width, map};

const VIRTIO_BLK: u16 = 0x1042;
/// Offsets in the common structure.
pub(crate) const FEATURE_SELECT: u64 = 0x00;
pub(crate) const FEATURES: u64 = 0x04;
pub(crate) const DRIVER_FEATURE_SELECT: u64 = 0x08;
pub(crate) const DRIVER_FEATURES: u64 = 0x0c;
const QUEUES: u64 = 0x12;
pub(crate) const STATUS: u64 = 0x14;
pub(crate) const QUEUE_SELECT: u64 = 0x16;
pub(crate) const QUEUE_SIZE: u64 = 0x18;
pub(crate) const QUEUE_ENABLE: u64 = 0x1c;
pub(crate) const QUEUE_NOTIFY: u64 = 0x1e;
pub(crate) const QUEUE_DESCRIPTORS: u64 = 0x20;
/// Its bytes, by which a write at random is in it.
pub const COMMON_BYTES: u64 = 0x40;

/// Acknowledge, driver, features taken, ready.
const STEPS: [u64; 4] = [1, 3, 11, 15];
pub(crate) const NEXT: u64 = 1;
pub(crate) const WRITE: u64 = 2;
const INDIRECT: u64 = 4;
pub(crate) const DESCRIPTOR_BYTES: u64 = 16;
const SIZE: u64 = 64;
/// Descriptors, available ring and used ring of one queue.
const QUEUE_BYTES: u64 = 0x1000;
pub(crate) const AVAILABLE: u64 = 0x600;
pub(crate) const USED: u64 = 0x800;
/// Queues a device is given at most.
const MOST: u64 = 4;

/// Where a queue's memory is.
fn home(function: &Function, queue: u64) -> u64 {
    let mixed = (function.config >> 12).wrapping_mul(0x9e37_79b9) ^ queue;
    map::ARENA.start + mixed % 2048 * QUEUE_BYTES
}

/// An address that a device is given for its DMA.
pub fn target(random: &mut Random) -> u64 {
    let arena = map::ARENA.start + random.below(map::ARENA.end - map::ARENA.start);
    match random.below(256) {
        0 => map::CODE + random.below(0x10_0000),
        1 | 2 => map::ECAM + random.below(0x100_0000),
        3..=6 => map::WINDOW.start + random.below(map::WINDOW.end - map::WINDOW.start),
        // The edge of RAM, and beyond.
        7..=9 => (128 << 20) - random.below(0x2000),
        10..=12 => random.below(map::END),
        13 => u64::MAX - random.below(0x2000),
        14 => random.any(),
        _ => arena,
    }
}

/// Brings a device up as its driver would, with queues of this guest's.
pub fn bring_up<B: Board>(board: &mut B, random: &mut Random, function: &Function) {
    let common = function.common;
    if common == 0 {
        return;
    }
    board.write(common + STATUS, Width::Byte, 0);
    // Ready when the reset is over, which may take as long as its requests do.
    for _ in 0..20 {
        if board.read(common + STATUS, Width::Byte) == 0 {
            break;
        }
    }
    for step in STEPS {
        match step {
            11 => take_features(board, random, common),
            15 => set_queues(board, random, function),
            _ => {}
        }
        board.write(common + STATUS, Width::Byte, step);
    }
}

fn take_features<B: Board>(board: &mut B, random: &mut Random, common: u64) {
    for half in 0..2 {
        board.write(common + FEATURE_SELECT, Width::Dword, half);
        let mut offered = board.read(common + FEATURES, Width::Dword);
        if half == 0 && random.once_in(2) {
            offered &= random.any();
        }
        board.write(common + DRIVER_FEATURE_SELECT, Width::Dword, half);
        board.write(common + DRIVER_FEATURES, Width::Dword, offered);
    }
}

fn set_queues<B: Board>(board: &mut B, random: &mut Random, function: &Function) {
    let common = function.common;
    let count = board.read(common + QUEUES, Width::Word).min(MOST);
    for queue in 0..count {
        board.write(common + QUEUE_SELECT, Width::Word, queue);
        board.write(common + QUEUE_SIZE, Width::Word, SIZE);
        let mut base = home(function, queue);
        for offset in [0, AVAILABLE, USED] {
            board.write(base + offset, Width::Qword, 0);
        }
        if random.once_in(16) {
            base = target(random);
        }
        for (register, part) in (0u64..).zip([0, AVAILABLE, USED]) {
            let address = base.wrapping_add(part);
            board.write(
                common + QUEUE_DESCRIPTORS + register * 8,
                Width::Dword,
                address,
            );
            let high = common + QUEUE_DESCRIPTORS + register * 8 + 4;
            board.write(high, Width::Dword, address >> 32);
        }
        board.write(common + QUEUE_ENABLE, Width::Word, 1);
    }
}

/// Writes descriptors, makes some available and rings.
pub fn kick<B: Board>(board: &mut B, random: &mut Random, function: &Function) {
    if function.common == 0 || function.notify == 0 {
        return;
    }
    let queue = random.below(MOST);
    let base = home(function, queue);
    let heads = 1 + random.below(4);
    for slot in 0..heads {
        let head = random.below(SIZE - 4);
        if function.device == VIRTIO_BLK && !random.once_in(4) {
            disk_request(board, random, base, head);
        } else {
            chain(board, random, base, head);
        }
        let next = board.read(base + AVAILABLE + 2, Width::Word) + slot;
        let entry = base + AVAILABLE + 4 + next % SIZE * 2;
        board.write(entry, Width::Word, head);
    }
    let index = board.read(base + AVAILABLE + 2, Width::Word);
    let step = if random.once_in(64) {
        random.value()
    } else {
        heads
    };
    board.write(base + AVAILABLE + 2, Width::Word, index.wrapping_add(step));
    let common = function.common;
    board.write(common + QUEUE_SELECT, Width::Word, queue);
    let place = board.read(common + QUEUE_NOTIFY, Width::Word) & 0xff;
    let bell = function.notify + place * (function.notify_step & 0xff);
    board.write(bell, Width::Word, queue);
}

struct Descriptor {
    address: u64,
    length: u64,
    flags: u64,
    next: u64,
}

fn write_descriptor<B: Board>(board: &mut B, base: u64, index: u64, descriptor: &Descriptor) {
    let at = base + index % SIZE * DESCRIPTOR_BYTES;
    board.write(at, Width::Qword, descriptor.address);
    board.write(at + 8, Width::Dword, descriptor.length);
    board.write(at + 12, Width::Word, descriptor.flags);
    board.write(at + 14, Width::Word, descriptor.next);
}

/// A request as a disk expects it: header, data, status byte. Its data may be anywhere.
fn disk_request<B: Board>(board: &mut B, random: &mut Random, base: u64, head: u64) {
    let header = base + 0xc00 + head * 16;
    let kind = random.of(&[0, 0, 0, 1, 1, 4, 8, 11, 13]);
    board.write(header, Width::Qword, kind);
    board.write(header + 8, Width::Qword, random.below(1 << 17));
    let data_flags = if kind == 1 { NEXT } else { NEXT | WRITE };
    let parts = [
        (header, 16, NEXT),
        (target(random), 512 << random.below(8), data_flags),
        (base + 0xb00 + head, 1, WRITE),
    ];
    for (place, (address, length, flags)) in (0u64..).zip(parts) {
        let descriptor = Descriptor {
            address,
            length,
            flags,
            next: head + place + 1,
        };
        write_descriptor(board, base, head + place, &descriptor);
    }
}

/// Anything.
fn chain<B: Board>(board: &mut B, random: &mut Random, base: u64, head: u64) {
    for place in 0..1 + random.below(4) {
        let length = match random.below(8) {
            0 => random.any(),
            1 => 0,
            _ => random.below(0x4000),
        };
        let next = match random.below(8) {
            0 => random.any(),
            1 => head,
            _ => head + place + 1,
        };
        let flags = match random.below(16) {
            0 => random.any(),
            1 => INDIRECT,
            2..=5 => 0,
            6..=9 => NEXT,
            10..=12 => NEXT | WRITE,
            _ => WRITE,
        };
        let descriptor = Descriptor {
            address: target(random),
            length,
            flags,
            next,
        };
        write_descriptor(board, base, head + place, &descriptor);
    }
}
