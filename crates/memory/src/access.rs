// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a device does to guest memory, and why it may not.

use thiserror::Error;

use crate::Gpa;
use crate::fault::Fault;

/// What the *device* does to guest memory (the opposite of what the driver calls its buffers).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// The device reads guest memory.
    Read,
    /// The device writes guest memory.
    Write,
    /// The device does both.
    ReadWrite,
}

impl Access {
    /// Whether the device writes.
    pub const fn writes(self) -> bool {
        matches!(self, Access::Write | Access::ReadWrite)
    }

    /// Whether the device reads.
    pub const fn reads(self) -> bool {
        matches!(self, Access::Read | Access::ReadWrite)
    }
}

/// Why a guest address cannot be accessed by a device. All of these but the last a guest can
/// provoke.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum AccessError {
    /// Nothing answers at the address.
    #[error("nothing is mapped at {gpa} (length {len})")]
    Unmapped {
        /// First address of the part that failed.
        gpa: Gpa,
        /// Bytes asked for from there.
        len: u64,
    },
    /// The device wants to write to ROM.
    #[error("read-only memory at {gpa} (length {len})")]
    ReadOnly {
        /// First address of the part that failed.
        gpa: Gpa,
        /// Bytes asked for from there.
        len: u64,
    },
    /// The address lies in a sparse block whose memory is unplugged.
    #[error("unplugged memory at {gpa} (length {len})")]
    Unplugged {
        /// First address of the part that failed.
        gpa: Gpa,
        /// Bytes asked for from there.
        len: u64,
    },
    /// Device registers or a reservation answer at the address.
    #[error("not RAM at {gpa} (length {len})")]
    NotRam {
        /// First address of the part that failed.
        gpa: Gpa,
        /// Bytes asked for from there.
        len: u64,
    },
    /// The range crosses from one region into another where one contiguous piece is needed.
    #[error("range at {gpa} (length {len}) spans several regions")]
    SpansRegions {
        /// First address of the range.
        gpa: Gpa,
        /// Bytes asked for.
        len: u64,
    },
    /// Registers refuse the access: its size or direction is against their rules, or the gate of
    /// their device is closed.
    #[error("bus error at {gpa} (length {len}): the device does not take the access")]
    Refused {
        /// First address of the part that failed.
        gpa: Gpa,
        /// Bytes asked for from there.
        len: u64,
    },
    /// The DMA of a device ends at registers of a device that is being served on this thread.
    #[error("bus error at {gpa} (length {len}): the device there is busy with what led here")]
    Reentrant {
        /// First address of the part that failed.
        gpa: Gpa,
        /// Bytes asked for from there.
        len: u64,
    },
    /// An IOMMU does not translate the address, not for this access, or its translations run in
    /// a circle.
    #[error("no translation of {gpa} (length {len})")]
    Untranslated {
        /// First address of the part that failed.
        gpa: Gpa,
        /// Bytes asked for from there.
        len: u64,
    },
    /// One request needs more bounce buffer than its device may ever have.
    #[error("{len} bytes at {gpa} need a bounce buffer, of which there are {limit} bytes")]
    BounceLimit {
        /// First address of the request that is not RAM.
        gpa: Gpa,
        /// Bytes that need to be bounced.
        len: u64,
        /// Bytes the device may have.
        limit: u64,
    },
    /// The range wraps around the end of the address space, or an offset lies outside its slice.
    #[error("range at {gpa} (length {len}) overflows")]
    Overflow {
        /// First address of the range.
        gpa: Gpa,
        /// Bytes asked for.
        len: u64,
    },
    /// The host does not provide the memory: the file behind it was cut short, its filesystem is
    /// full, the page is broken. What lies before the address was copied.
    #[error("the host does not provide the memory at {gpa} (length {len})")]
    HostFault {
        /// First address of the part that failed.
        gpa: Gpa,
        /// Bytes asked for from there.
        len: u64,
    },
}

impl AccessError {
    /// The error of a copy of `len` bytes at `gpa` that the host let down.
    #[cold]
    pub(crate) fn host_fault(gpa: Gpa, len: usize, fault: Fault) -> AccessError {
        AccessError::HostFault {
            gpa: Gpa(gpa.0.wrapping_add(fault.done as u64)),
            len: (len - fault.done) as u64,
        }
    }
}
