// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk as its driver keeps to the rules with it: one queue, one request at a time, answers polled (virtio 1.3, 2.7,
//! 3.1 and 5.2).

use crate::functions::Function;
use crate::queues::{
    AVAILABLE, DESCRIPTOR_BYTES, DRIVER_FEATURE_SELECT, DRIVER_FEATURES, FEATURE_SELECT, FEATURES,
    NEXT, QUEUE_DESCRIPTORS, QUEUE_ENABLE, QUEUE_NOTIFY, QUEUE_SELECT, QUEUE_SIZE, STATUS, USED,
    WRITE,
};
use crate::{Board, Width};

/// Device numbers: of now, and of a device that could speak virtio 0.9, too.
const VIRTIO_BLK: [u16; 2] = [0x1042, 0x1001];
const ACKNOWLEDGE: u64 = 1;
const DRIVER: u64 = 2;
const FEATURES_OK: u64 = 8;
const DRIVER_OK: u64 = 4;
/// Bit 32 of the features: VIRTIO_F_VERSION_1.
const VERSION_1: u64 = 1;
/// Descriptors of a queue.
const SIZE: u64 = 8;
/// Where a request's header, its status byte and its data are in the disk's memory, behind the queue.
const HEADER: u64 = 0xb00;
const ANSWER: u64 = 0xc00;
const DATA: u64 = 0x1000;
const DATA_BYTES: u64 = 4096;
/// What the device writes to a request's status byte when all is well, and what no device does.
const OK: u64 = 0;
const NO_ANSWER: u64 = 0xff;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// From the disk into memory.
    Read,
    /// From memory to the disk.
    Write,
}

/// Why a disk was not brought up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It is no virtio-blk function, or its registers were not found.
    NoDisk,
    /// It did not take the features, or has no such queue.
    NotReady,
}

/// A disk that has been brought up.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    function: Function,
    bell: u64,
    memory: u64,
    submitted: u64,
}

impl Disk {
    /// Bytes of memory that a disk needs.
    pub const MEMORY: u64 = DATA + DATA_BYTES;

    /// Whether it is one.
    pub fn is(function: &Function) -> bool {
        VIRTIO_BLK.contains(&function.device)
    }

    /// Resets a disk and brings it up with its queue and its data in [`Disk::MEMORY`] bytes of memory from `memory` on.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn bring_up<B: Board>(
        board: &mut B,
        function: &Function,
        memory: u64,
    ) -> Result<Disk, Refusal> {
        let common = function.common;
        if !Disk::is(function) || common == 0 || function.notify == 0 {
            return Err(Refusal::NoDisk);
        }
        board.write(common + STATUS, Width::Byte, 0);
        if board.read(common + STATUS, Width::Byte) != 0 {
            return Err(Refusal::NotReady);
        }
        let mut status = ACKNOWLEDGE | DRIVER;
        board.write(common + STATUS, Width::Byte, status);
        for (half, taken) in [(0, 0), (1, VERSION_1)] {
            board.write(common + DRIVER_FEATURE_SELECT, Width::Dword, half);
            board.write(common + DRIVER_FEATURES, Width::Dword, taken);
        }
        board.write(common + FEATURE_SELECT, Width::Dword, 1);
        let offered = board.read(common + FEATURES, Width::Dword);
        status |= FEATURES_OK;
        board.write(common + STATUS, Width::Byte, status);
        if offered & VERSION_1 == 0 || board.read(common + STATUS, Width::Byte) != status {
            return Err(Refusal::NotReady);
        }
        let bell = set_queue(board, function, memory).ok_or(Refusal::NotReady)?;
        status |= DRIVER_OK;
        board.write(common + STATUS, Width::Byte, status);
        Ok(Disk {
            function: *function,
            bell,
            memory,
            submitted: 0,
        })
    }

    /// Where its configuration space is.
    pub fn config(&self) -> u64 {
        self.function.config
    }

    /// Its slot on its bus.
    pub fn slot(&self) -> u32 {
        (self.function.config >> 15 & 0x1f) as u32
    }

    /// Makes a request of 4 KiB from `sector` on available and rings. The one before must have been answered.
    pub fn submit<B: Board>(&mut self, board: &mut B, operation: Operation, sector: u64) {
        let (kind, data_flags) = match operation {
            Operation::Read => (0, NEXT | WRITE),
            Operation::Write => (1, NEXT),
        };
        let (header, answer) = (self.memory + HEADER, self.memory + ANSWER);
        board.write(header, Width::Qword, kind);
        board.write(header + 8, Width::Qword, sector);
        board.write(answer, Width::Byte, NO_ANSWER);
        let parts = [
            (header, 16, NEXT),
            (self.memory + DATA, DATA_BYTES, data_flags),
            (answer, 1, WRITE),
        ];
        for (index, (address, length, flags)) in (0u64..).zip(parts) {
            let at = self.memory + index * DESCRIPTOR_BYTES;
            board.write(at, Width::Qword, address);
            board.write(at + 8, Width::Dword, length);
            board.write(at + 12, Width::Word, flags);
            board.write(at + 14, Width::Word, index + 1);
        }
        let available = self.memory + AVAILABLE;
        let entry = available + 4 + self.submitted % SIZE * 2;
        board.write(entry, Width::Word, 0);
        self.submitted = (self.submitted + 1) & 0xffff;
        board.write(available + 2, Width::Word, self.submitted);
        board.write(self.bell, Width::Word, 0);
    }

    /// Whether the last request was answered; then whether with success.
    pub fn answered<B: Board>(&self, board: &mut B) -> Option<bool> {
        let used = board.read(self.memory + USED + 2, Width::Word);
        (used == self.submitted).then(|| board.read(self.memory + ANSWER, Width::Byte) == OK)
    }

    /// The first 8 bytes of the data.
    pub fn data<B: Board>(&self, board: &mut B) -> u64 {
        board.read(self.memory + DATA, Width::Qword)
    }

    /// Changes them.
    pub fn set_data<B: Board>(&self, board: &mut B, value: u64) {
        board.write(self.memory + DATA, Width::Qword, value);
    }
}

/// Gives the device its only queue; where its doorbell is. There must be a queue.
fn set_queue<B: Board>(board: &mut B, function: &Function, memory: u64) -> Option<u64> {
    let common = function.common;
    board.write(common + QUEUE_SELECT, Width::Word, 0);
    if board.read(common + QUEUE_SIZE, Width::Word) < SIZE {
        return None;
    }
    board.write(common + QUEUE_SIZE, Width::Word, SIZE);
    for (register, part) in (0u64..).zip([0, AVAILABLE, USED]) {
        let address = memory + part;
        let at = common + QUEUE_DESCRIPTORS + register * 8;
        // Flags and index.
        if part != 0 {
            board.write(address, Width::Dword, 0);
        }
        board.write(at, Width::Dword, address & 0xffff_ffff);
        board.write(at + 4, Width::Dword, address >> 32);
    }
    board.write(common + QUEUE_ENABLE, Width::Word, 1);
    let place = board.read(common + QUEUE_NOTIFY, Width::Word);
    Some(function.notify + place * function.notify_step)
}

#[cfg(test)]
mod tests;
