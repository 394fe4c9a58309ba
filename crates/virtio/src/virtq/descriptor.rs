// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The descriptor as it lies in guest memory.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// One entry of a descriptor table, direct or indirect (2.7.5).
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct Descriptor {
    address: U64,
    length: U32,
    flags: U16,
    next: U16,
}

impl Descriptor {
    /// Bytes one descriptor takes in guest memory.
    pub const SIZE_BYTES: u32 = 16;
    /// `flags`: the chain continues with the descriptor that `next` names.
    pub const NEXT: u16 = 1;
    /// `flags`: the device writes the buffer; otherwise it reads it.
    pub const WRITE: u16 = 2;
    /// `flags`: the buffer holds a table of descriptors.
    pub const INDIRECT: u16 = 4;

    /// A descriptor with these fields.
    pub fn new(address: u64, length: u32, flags: u16, next: u16) -> Self {
        Self {
            address: address.into(),
            length: length.into(),
            flags: flags.into(),
            next: next.into(),
        }
    }

    /// Guest-physical address of the buffer or table.
    pub fn address(&self) -> u64 {
        self.address.get()
    }

    /// Bytes of the buffer or table.
    pub fn length(&self) -> u32 {
        self.length.get()
    }

    /// The descriptor that follows, if the chain goes on.
    pub fn next(&self) -> Option<u16> {
        (self.flags.get() & Self::NEXT != 0).then(|| self.next.get())
    }

    /// Whether the device writes the buffer.
    pub fn is_writable(&self) -> bool {
        self.flags.get() & Self::WRITE != 0
    }

    /// Whether the buffer is a table of descriptors.
    pub fn is_indirect(&self) -> bool {
        self.flags.get() & Self::INDIRECT != 0
    }
}
