// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests for a memory device (virtio 1.3, 5.15.6).

use ebbtide_memory::Gpa;

use crate::queue::Part;
use crate::ram::GuestRam;

/// Bytes of a request.
pub const REQUEST_BYTES: usize = 24;
/// Bytes of a response.
pub const RESPONSE_BYTES: usize = 10;

/// `type` of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// Plug blocks.
    Plug = 0,
    /// Unplug blocks.
    Unplug = 1,
    /// Unplug everything.
    UnplugAll = 2,
    /// Are blocks plugged?
    State = 3,
}

/// `type` of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Ack,
    /// Not now: over the target.
    Nack,
    /// Not now: later.
    Busy,
    /// Never: the request is wrong.
    Error,
    /// No such response exists.
    Unknown(u16),
}

/// State of a range, in the response to [`Kind::State`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// All plugged.
    Plugged,
    /// None plugged.
    Unplugged,
    /// Some plugged.
    Mixed,
    /// No such state exists.
    Unknown(u16),
}

/// Offsets in the device's configuration (5.15.4).
pub mod config {
    /// Block size in bytes.
    pub const BLOCK_SIZE: u64 = 0;
    /// NUMA node.
    pub const NODE_ID: u64 = 8;
    /// Where the region begins.
    pub const ADDR: u64 = 16;
    /// Bytes of the region.
    pub const REGION_SIZE: u64 = 24;
    /// Bytes of it that may be plugged now.
    pub const USABLE_REGION_SIZE: u64 = 32;
    /// Bytes plugged.
    pub const PLUGGED_SIZE: u64 = 40;
    /// Bytes that should be.
    pub const REQUESTED_SIZE: u64 = 48;
}

/// A request in guest RAM and room for its response.
pub struct Request {
    ram: GuestRam,
    request: Gpa,
    response: Gpa,
}

impl Request {
    /// Any request. Padding is filled with ones, which the device has to ignore.
    pub fn raw(ram: &GuestRam, kind: u16, addr: u64, blocks: u16) -> Self {
        let mut bytes = [0xff; REQUEST_BYTES];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&addr.to_le_bytes());
        bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
        let request = ram.alloc(REQUEST_BYTES, 8);
        ram.write(request, &bytes);
        let response = ram.alloc(RESPONSE_BYTES, 8);
        ram.write(response, &[0xff; RESPONSE_BYTES]);
        Self {
            ram: ram.clone(),
            request,
            response,
        }
    }

    /// A request about `blocks` blocks from `addr` on.
    pub fn new(ram: &GuestRam, kind: Kind, addr: u64, blocks: u16) -> Self {
        Self::raw(ram, kind as u16, addr, blocks)
    }

    /// The buffers, one for the request, one for the response.
    pub fn parts(&self) -> Vec<Part> {
        vec![
            Part::readable(self.request, REQUEST_BYTES),
            Part::writable(self.response, RESPONSE_BYTES),
        ]
    }

    /// The response as it is now.
    pub fn answer(&self) -> Answer {
        match self
            .ram
            .get::<zerocopy::little_endian::U16>(self.response)
            .get()
        {
            0 => Answer::Ack,
            1 => Answer::Nack,
            2 => Answer::Busy,
            3 => Answer::Error,
            other => Answer::Unknown(other),
        }
    }

    /// The state in the response.
    pub fn state(&self) -> State {
        match self
            .ram
            .get::<zerocopy::little_endian::U16>(Gpa(self.response.0 + 8))
            .get()
        {
            0 => State::Plugged,
            1 => State::Unplugged,
            2 => State::Mixed,
            other => State::Unknown(other),
        }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        self.ram.free(self.request, REQUEST_BYTES);
        self.ram.free(self.response, RESPONSE_BYTES);
    }
}
