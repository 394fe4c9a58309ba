// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests for a SCSI host device (virtio 1.3, 5.6.6).

use ebbtide_memory::Gpa;

use crate::queue::Part;
use crate::ram::GuestRam;

/// The control queue.
pub const CONTROL: u16 = 0;
/// The event queue.
pub const EVENT: u16 = 1;
/// The first request queue.
pub const REQUEST: u16 = 2;

/// Bytes of sense data and of CDBs that drivers get without asking.
pub const SENSE_SIZE: usize = 96;
/// See [`SENSE_SIZE`].
pub const CDB_SIZE: usize = 32;

/// `response` of commands and functions.
#[allow(missing_docs)]
pub mod response {
    pub const OK: u8 = 0;
    pub const OVERRUN: u8 = 1;
    pub const ABORTED: u8 = 2;
    pub const BAD_TARGET: u8 = 3;
    pub const RESET: u8 = 4;
    pub const FAILURE: u8 = 9;
    pub const FUNCTION_SUCCEEDED: u8 = 10;
    pub const FUNCTION_REJECTED: u8 = 11;
    pub const INCORRECT_LUN: u8 = 12;
    /// Not written by the device.
    pub const UNTOUCHED: u8 = 0xff;
}

/// Task management functions.
#[allow(missing_docs)]
pub mod function {
    pub const ABORT_TASK: u32 = 0;
    pub const ABORT_TASK_SET: u32 = 1;
    pub const CLEAR_ACA: u32 = 2;
    pub const CLEAR_TASK_SET: u32 = 3;
    pub const I_T_NEXUS_RESET: u32 = 4;
    pub const LOGICAL_UNIT_RESET: u32 = 5;
    pub const QUERY_TASK: u32 = 6;
    pub const QUERY_TASK_SET: u32 = 7;
}

/// The eight bytes that name a unit.
pub fn address(target: u8, lun: u16) -> [u8; 8] {
    let [high, low] = lun.to_be_bytes();
    [1, target, high | 0x40, low, 0, 0, 0, 0]
}

/// Data of a command.
#[derive(Clone, Copy, Debug)]
pub enum Data<'a> {
    /// None.
    None,
    /// Room for as many bytes.
    In(usize),
    /// These bytes.
    Out(&'a [u8]),
}

/// What a command came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// One of [`response`].
    pub response: u8,
    /// SCSI status.
    pub status: u8,
    /// Bytes not moved.
    pub residual: u32,
    /// Sense key, additional sense code and qualifier, if there is sense data.
    pub sense: Option<(u8, u8, u8)>,
}

impl Answer {
    /// Success of all of it.
    pub const GOOD: Answer = Answer {
        response: response::OK,
        status: 0,
        residual: 0,
        sense: None,
    };
}

/// A command in guest RAM: header, response, data, each allocated.
pub struct Command {
    ram: GuestRam,
    header: Gpa,
    header_len: usize,
    response: Gpa,
    sense_size: usize,
    data: Gpa,
    data_len: usize,
    data_writable: bool,
}

impl Command {
    /// A command for the unit at `lun` (see [`address`]).
    pub fn new(ram: &GuestRam, lun: [u8; 8], tag: u64, cdb: &[u8], data: Data<'_>) -> Command {
        Command::sized(ram, lun, tag, cdb, data, CDB_SIZE, SENSE_SIZE)
    }

    /// The same for a driver that chose other sizes.
    pub fn sized(
        ram: &GuestRam,
        lun: [u8; 8],
        tag: u64,
        cdb: &[u8],
        data: Data<'_>,
        cdb_size: usize,
        sense_size: usize,
    ) -> Command {
        let mut bytes = lun.to_vec();
        bytes.extend(tag.to_le_bytes());
        bytes.extend([0; 3]);
        bytes.extend(cdb);
        bytes.resize(19 + cdb_size, 0);
        let header = ram.alloc(bytes.len(), 8);
        ram.write(header, &bytes);
        let response = ram.alloc(12 + sense_size, 4);
        ram.write(response, &vec![response::UNTOUCHED; 12 + sense_size]);
        let (data_len, data_writable) = match data {
            Data::None => (0, false),
            Data::In(len) => (len, true),
            Data::Out(bytes) => (bytes.len(), false),
        };
        let at = ram.alloc(data_len, 512);
        if let Data::Out(bytes) = data {
            ram.write(at, bytes);
        }
        Command {
            ram: ram.clone(),
            header,
            header_len: bytes.len(),
            response,
            sense_size,
            data: at,
            data_len,
            data_writable,
        }
    }

    /// Reads whole blocks of 512 bytes, with READ (10).
    pub fn read(ram: &GuestRam, lun: [u8; 8], tag: u64, block: u32, blocks: u16) -> Command {
        let data = Data::In(usize::from(blocks) * 512);
        Command::new(ram, lun, tag, &cdb10(0x28, block, blocks), data)
    }

    /// Writes whole blocks of 512 bytes, with WRITE (10).
    pub fn write(ram: &GuestRam, lun: [u8; 8], tag: u64, block: u32, data: &[u8]) -> Command {
        let blocks = u16::try_from(data.len() / 512).expect("few blocks");
        Command::new(ram, lun, tag, &cdb10(0x2a, block, blocks), Data::Out(data))
    }

    /// The buffers: header, data to send, response, room for data.
    pub fn parts(&self) -> Vec<Part> {
        let data = Part {
            writable: self.data_writable,
            ..Part::readable(self.data, self.data_len)
        };
        let mut parts = vec![
            Part::readable(self.header, self.header_len),
            Part::writable(self.response, 12 + self.sense_size),
        ];
        if self.data_len > 0 {
            parts.insert(if self.data_writable { 2 } else { 1 }, data);
        }
        parts
    }

    /// What the device answered.
    pub fn answer(&self) -> Answer {
        let bytes = self.ram.read(self.response, 12 + self.sense_size);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"));
        let sense_len = word(0);
        let sense = (sense_len != u32::MAX && sense_len >= 14)
            .then(|| (bytes[12 + 2], bytes[12 + 12], bytes[12 + 13]));
        Answer {
            response: bytes[11],
            status: bytes[10],
            residual: word(4),
            sense,
        }
    }

    /// The data as they are now.
    pub fn data(&self) -> Vec<u8> {
        self.ram.read(self.data, self.data_len)
    }

    /// Where the data are.
    pub fn data_gpa(&self) -> Gpa {
        self.data
    }
}

impl Drop for Command {
    fn drop(&mut self) {
        self.ram.free(self.header, self.header_len);
        self.ram.free(self.response, 12 + self.sense_size);
        self.ram.free(self.data, self.data_len);
    }
}

/// A CDB of ten bytes with an address and a number of blocks.
pub fn cdb10(opcode: u8, block: u32, blocks: u16) -> [u8; 10] {
    let [b0, b1, b2, b3] = block.to_be_bytes();
    let [n0, n1] = blocks.to_be_bytes();
    [opcode, 0, b0, b1, b2, b3, 0, n0, n1, 0]
}

/// A request of the control queue in guest RAM.
pub struct Control {
    ram: GuestRam,
    request: Gpa,
    request_len: usize,
    answer: Gpa,
    answer_len: usize,
}

impl Control {
    /// Any bytes, and room for the answer.
    pub fn raw(ram: &GuestRam, request: &[u8], answer_len: usize) -> Control {
        let at = ram.alloc(request.len(), 8);
        ram.write(at, request);
        let answer = ram.alloc(answer_len, 4);
        ram.write(answer, &vec![response::UNTOUCHED; answer_len]);
        Control {
            ram: ram.clone(),
            request: at,
            request_len: request.len(),
            answer,
            answer_len,
        }
    }

    /// A task management function.
    pub fn function(ram: &GuestRam, function: u32, lun: [u8; 8], tag: u64) -> Control {
        let mut request = vec![0; 4];
        request.extend(function.to_le_bytes());
        request.extend(lun);
        request.extend(tag.to_le_bytes());
        Control::raw(ram, &request, 1)
    }

    /// The buffers.
    pub fn parts(&self) -> Vec<Part> {
        vec![
            Part::readable(self.request, self.request_len),
            Part::writable(self.answer, self.answer_len),
        ]
    }

    /// The answer as it is now.
    pub fn answer(&self) -> Vec<u8> {
        self.ram.read(self.answer, self.answer_len)
    }

    /// The last byte of it.
    pub fn response(&self) -> u8 {
        self.answer().last().copied().unwrap_or(response::UNTOUCHED)
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.ram.free(self.request, self.request_len);
        self.ram.free(self.answer, self.answer_len);
    }
}
