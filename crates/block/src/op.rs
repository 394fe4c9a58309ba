// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The operations of a disk.

/// One operation. Offsets and lengths are in bytes; those of reads and writes cover what their buffer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Fill the buffer from the image.
    Read {
        /// Where in the image.
        offset: u64,
    },
    /// Put the buffer into the image.
    Write {
        /// Where in the image.
        offset: u64,
    },
    /// What was written before this is on the medium when it is done (fdatasync).
    Flush,
    /// The contents of the range are not needed any more. A hint: it succeeds where the host cannot give space back.
    Discard {
        /// Start of the range.
        offset: u64,
        /// Its length.
        len: u64,
    },
    /// The range reads as zeroes from now on.
    WriteZeroes {
        /// Start of the range.
        offset: u64,
        /// Its length.
        len: u64,
        /// Space of the range may be given back to the host.
        may_unmap: bool,
    },
}

/// What sort of operation an [`Op`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OpKind {
    /// [`Op::Read`]
    Read,
    /// [`Op::Write`]
    Write,
    /// [`Op::Flush`]
    Flush,
    /// [`Op::Discard`]
    Discard,
    /// [`Op::WriteZeroes`]
    WriteZeroes,
}

impl Op {
    /// The sort of operation.
    pub fn kind(&self) -> OpKind {
        match self {
            Op::Read { .. } => OpKind::Read,
            Op::Write { .. } => OpKind::Write,
            Op::Flush => OpKind::Flush,
            Op::Discard { .. } => OpKind::Discard,
            Op::WriteZeroes { .. } => OpKind::WriteZeroes,
        }
    }

    /// Whether the image may look different afterwards.
    pub fn modifies(&self) -> bool {
        match self {
            Op::Read { .. } | Op::Flush => false,
            Op::Write { .. } | Op::Discard { .. } | Op::WriteZeroes { .. } => true,
        }
    }

    /// The bytes of the image it concerns, when its buffer holds `buffer_bytes`. `None`: the range has no end in 64 bits.
    pub(crate) fn range(&self, buffer_bytes: u64) -> Option<std::ops::Range<u64>> {
        let (start, len) = match *self {
            Op::Read { offset } | Op::Write { offset } => (offset, buffer_bytes),
            Op::Flush => (0, 0),
            Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => (offset, len),
        };
        Some(start..start.checked_add(len)?)
    }
}
