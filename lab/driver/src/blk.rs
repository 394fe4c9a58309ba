// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests for a block device (virtio 1.3, 5.2.6).

use ebbtide_memory::Gpa;

use crate::queue::Part;
use crate::ram::GuestRam;

/// Bytes of a sector, the unit of all positions.
pub const SECTOR_BYTES: usize = 512;

/// `type` of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Read.
    In = 0,
    /// Write.
    Out = 1,
    /// Write back caches.
    Flush = 4,
    /// Read the device's ID string.
    GetId = 8,
    /// Contents may be dropped.
    Discard = 11,
    /// Contents become zero.
    WriteZeroes = 13,
}

/// `status` of a request.
pub mod status {
    /// It succeeded.
    pub const OK: u8 = 0;
    /// The device failed, or the driver asked for nonsense.
    pub const IOERR: u8 = 1;
    /// The device has no such request.
    pub const UNSUPP: u8 = 2;
    /// Not written by the device.
    pub const UNTOUCHED: u8 = 0xff;
}

/// Bit of a write-zeroes segment: the device may deallocate.
pub const UNMAP: u32 = 1;

/// A range to discard or to zero.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// First sector.
    pub sector: u64,
    /// How many.
    pub sectors: u32,
    /// [`UNMAP`] or 0.
    pub flags: u32,
}

/// A request in guest RAM: header, data, status, each allocated.
pub struct Request {
    ram: GuestRam,
    header: Gpa,
    data: Gpa,
    data_len: usize,
    data_writable: bool,
    status: Gpa,
}

impl Request {
    /// Any request. `data` is what the device reads, or, when `reply_len` is given, room for what it writes.
    pub fn raw(
        ram: &GuestRam,
        kind: u32,
        sector: u64,
        data: &[u8],
        reply_len: Option<usize>,
    ) -> Self {
        let header = ram.alloc(16, 8);
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        ram.write(header, &bytes);
        let data_len = reply_len.unwrap_or(data.len());
        let at = ram.alloc(data_len, 512);
        ram.write(at, &data[..data_len.min(data.len())]);
        let status = ram.alloc(1, 1);
        ram.write(status, &[status::UNTOUCHED]);
        Self {
            ram: ram.clone(),
            header,
            data: at,
            data_len,
            data_writable: reply_len.is_some(),
            status,
        }
    }

    /// Reads `len` bytes from `sector` on.
    pub fn read(ram: &GuestRam, sector: u64, len: usize) -> Self {
        Self::raw(ram, Kind::In as u32, sector, &[], Some(len))
    }

    /// Writes `data` from `sector` on.
    pub fn write(ram: &GuestRam, sector: u64, data: &[u8]) -> Self {
        Self::raw(ram, Kind::Out as u32, sector, data, None)
    }

    /// Makes what was written durable.
    pub fn flush(ram: &GuestRam) -> Self {
        Self::raw(ram, Kind::Flush as u32, 0, &[], None)
    }

    /// Asks for the ID string.
    pub fn get_id(ram: &GuestRam) -> Self {
        Self::raw(ram, Kind::GetId as u32, 0, &[], Some(20))
    }

    /// Discards ranges.
    pub fn discard(ram: &GuestRam, segments: &[Segment]) -> Self {
        Self::raw(ram, Kind::Discard as u32, 0, &encode(segments), None)
    }

    /// Zeroes ranges.
    pub fn write_zeroes(ram: &GuestRam, segments: &[Segment]) -> Self {
        Self::raw(ram, Kind::WriteZeroes as u32, 0, &encode(segments), None)
    }

    /// The buffers, one for each of header, data (if any) and status.
    pub fn parts(&self) -> Vec<Part> {
        let data = Part {
            writable: self.data_writable,
            ..Part::readable(self.data, self.data_len)
        };
        let data = (self.data_len > 0).then_some(data);
        let parts = [
            Some(Part::readable(self.header, 16)),
            data,
            Some(Part::writable(self.status, 1)),
        ];
        parts.into_iter().flatten().collect()
    }

    /// The status byte as it is now.
    pub fn status(&self) -> u8 {
        self.ram.get(self.status)
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

impl Drop for Request {
    fn drop(&mut self) {
        self.ram.free(self.header, 16);
        self.ram.free(self.data, self.data_len);
        self.ram.free(self.status, 1);
    }
}

fn encode(segments: &[Segment]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for Segment {
        sector,
        sectors,
        flags,
    } in segments
    {
        bytes.extend_from_slice(&sector.to_le_bytes());
        bytes.extend_from_slice(&sectors.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
    }
    bytes
}
