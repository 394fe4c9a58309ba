// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver against a board with one disk, whose registers are where this guest does not reach.

use std::collections::HashMap;

use super::*;
use crate::{Functions, map};

const SLOT: u64 = 3;
const CONFIG: u64 = map::ECAM | SLOT << 15;
const BAR: u64 = 0x20;
const BAR_BYTES: u64 = 0x4000;
const FAR: u64 = 256 << 30;
const REACH: u64 = 4 << 30;
const BELLS: u64 = 0x3000;
/// The queue's doorbell, and the distance of two.
const BELL: u64 = 2;
const STEP: u64 = 4;
const NOTIFY: u64 = BELLS + BELL * STEP;

/// All bytes that were ever written, but for what the device does itself.
struct OneDisk {
    memory: HashMap<u64, u8>,
    accepts: bool,
    /// Sector and kind of each request.
    requests: Vec<(u64, u64)>,
    status: u64,
}

impl OneDisk {
    fn new() -> OneDisk {
        let mut disk = OneDisk {
            memory: HashMap::new(),
            accepts: true,
            requests: Vec::new(),
            status: OK,
        };
        let capability = |kind: u64, next: u64| 0x09 | next << 8 | kind << 24 | 4 << 32;
        for (register, bytes, value) in [
            (0, 4, 0x1042_1af4),
            (BAR, 8, FAR | 0xc),
            (0x34, 1, 0x40),
            (0x40, 8, capability(1, 0x60)),
            (0x60, 8, capability(2, 0)),
            (0x68, 8, BELLS),
            (0x70, 4, STEP),
        ] {
            disk.store(CONFIG + register, bytes, value);
        }
        disk
    }

    fn load(&self, at: u64, bytes: u64) -> u64 {
        let byte = |i: u64| u64::from(self.memory.get(&(at + i)).copied().unwrap_or(0)) << (8 * i);
        (0..bytes).map(byte).sum()
    }

    fn store(&mut self, at: u64, bytes: u64, value: u64) {
        for i in 0..bytes {
            self.memory.insert(at + i, (value >> (8 * i)) as u8);
        }
    }

    /// Where the registers are.
    fn base(&self) -> u64 {
        self.load(CONFIG + BAR, 8) & !0xf
    }

    /// Serves the last chain that was made available.
    fn serve(&mut self) {
        let common = self.base();
        let [table, available, used] =
            [0, 8, 16].map(|part| self.load(common + QUEUE_DESCRIPTORS + part, 8));
        let index = self.load(available + 2, 2);
        let head = self.load(available + 4 + (index - 1) % SIZE * 2, 2);
        let part = |n: u64| self.load(table + (head + n) * DESCRIPTOR_BYTES, 8);
        let (header, answer) = (part(0), part(2));
        self.requests
            .push((self.load(header + 8, 8), self.load(header, 4)));
        self.store(answer, 1, self.status);
        self.store(used + 2, 2, index);
    }
}

fn bytes(width: Width) -> u64 {
    1 << width as u64
}

impl Board for OneDisk {
    fn port_read(&mut self, _: u16, _: Width) -> u32 {
        u32::MAX
    }
    fn port_write(&mut self, _: u16, _: Width, _: u32) {}
    fn read(&mut self, at: u64, width: Width) -> u64 {
        let common = self.base();
        let config = (CONFIG..CONFIG + 0x1000).contains(&at);
        if (map::ECAM..map::ECAM + 0x1000_0000).contains(&at) && !config {
            return u64::MAX >> (64 - 8 * bytes(width));
        }
        if at == common + FEATURES {
            return self.load(common + FEATURE_SELECT, 4);
        }
        if at == common + QUEUE_NOTIFY {
            return BELL;
        }
        if at == common + QUEUE_SIZE && self.load(at, 2) == 0 {
            return 128;
        }
        self.load(at, bytes(width))
    }
    fn write(&mut self, at: u64, width: Width, value: u64) {
        // It has no other BAR.
        if (CONFIG + 0x10..CONFIG + BAR).contains(&at) {
            return;
        }
        let (common, bytes) = (self.base(), bytes(width));
        let refused = at == common + STATUS && value == 11 && !self.accepts;
        self.store(at, bytes, if refused { 3 } else { value });
        if at == CONFIG + BAR {
            let kept = value & !(BAR_BYTES - 1) | 0xc;
            self.store(at, 4, kept);
        }
        if at == common + NOTIFY {
            self.serve();
        }
    }
    fn fault(&mut self) {
        unreachable!("nobody asks for it");
    }
}

fn found(board: &mut OneDisk) -> Function {
    let mut functions = Functions::none(REACH, map::HOLE);
    functions.refresh(board);
    assert_eq!(functions.known().len(), 1);
    functions.known()[0]
}

#[test]
fn registers_out_of_reach_are_moved_and_the_disk_works() {
    let mut board = OneDisk::new();
    let function = found(&mut board);
    assert_eq!(board.base(), map::HOLE);
    assert_eq!(function.common, map::HOLE);
    let mut disk = Disk::bring_up(&mut board, &function, map::ARENA.start).unwrap();
    assert_eq!((disk.slot(), disk.config()), (SLOT as u32, CONFIG));
    for round in 0..2 * SIZE {
        disk.submit(&mut board, Operation::Write, round * 8);
        assert_eq!(disk.answered(&mut board), Some(true));
    }
    let expected: Vec<_> = (0..2 * SIZE).map(|round| (round * 8, 1)).collect();
    assert_eq!(board.requests, expected);
}

#[test]
fn a_request_is_answered_when_the_device_says_so() {
    let mut board = OneDisk::new();
    let function = found(&mut board);
    let mut disk = Disk::bring_up(&mut board, &function, map::ARENA.start).unwrap();
    disk.set_data(&mut board, 7);
    assert_eq!(disk.data(&mut board), 7);
    board.status = 1;
    disk.submit(&mut board, Operation::Read, 0);
    assert_eq!(disk.answered(&mut board), Some(false));
    // What the device does not take stays unanswered.
    disk.bell += STEP;
    disk.submit(&mut board, Operation::Read, 0);
    assert_eq!(disk.answered(&mut board), None);
}

#[test]
fn what_is_no_disk_or_refuses_is_not_brought_up() {
    let mut board = OneDisk::new();
    board.accepts = false;
    let function = found(&mut board);
    let refused = Disk::bring_up(&mut board, &function, map::ARENA.start);
    assert_eq!(refused.unwrap_err(), Refusal::NotReady);
    let mut other = function;
    other.device = 0x1041;
    let refused = Disk::bring_up(&mut board, &other, map::ARENA.start);
    assert_eq!(refused.unwrap_err(), Refusal::NoDisk);
}
