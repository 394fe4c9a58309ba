// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sense data (SPC-4, 4.5).

use std::io;

/// Bytes of sense data in fixed format.
pub const SENSE_BYTES: usize = 18;

/// Sense keys (SPC-4, table 43), as far as a disk has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Key {
    NoSense = 0x0,
    NotReady = 0x2,
    MediumError = 0x3,
    HardwareError = 0x4,
    IllegalRequest = 0x5,
    UnitAttention = 0x6,
    DataProtect = 0x7,
    AbortedCommand = 0xb,
    Miscompare = 0xe,
}

/// What is wrong with a command: sense key, additional sense code and its qualifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sense {
    /// The sense key.
    pub key: Key,
    /// Additional sense code.
    pub asc: u8,
    /// Its qualifier.
    pub ascq: u8,
}

impl Sense {
    /// Nothing is wrong.
    pub const NONE: Sense = Sense::new(Key::NoSense, 0, 0);
    /// INVALID COMMAND OPERATION CODE.
    pub const INVALID_OPCODE: Sense = Sense::new(Key::IllegalRequest, 0x20, 0);
    /// LOGICAL BLOCK ADDRESS OUT OF RANGE.
    pub const LBA_OUT_OF_RANGE: Sense = Sense::new(Key::IllegalRequest, 0x21, 0);
    /// INVALID FIELD IN CDB.
    pub const INVALID_FIELD: Sense = Sense::new(Key::IllegalRequest, 0x24, 0);
    /// LOGICAL UNIT NOT SUPPORTED.
    pub const LUN_NOT_SUPPORTED: Sense = Sense::new(Key::IllegalRequest, 0x25, 0);
    /// INVALID FIELD IN PARAMETER LIST.
    pub const INVALID_PARAMETER: Sense = Sense::new(Key::IllegalRequest, 0x26, 0);
    /// PARAMETER LIST LENGTH ERROR.
    pub const PARAMETER_LENGTH: Sense = Sense::new(Key::IllegalRequest, 0x1a, 0);
    /// SAVING PARAMETERS NOT SUPPORTED.
    pub const SAVING_NOT_SUPPORTED: Sense = Sense::new(Key::IllegalRequest, 0x39, 0);
    /// WRITE PROTECTED.
    pub const WRITE_PROTECTED: Sense = Sense::new(Key::DataProtect, 0x27, 0);
    /// SPACE ALLOCATION FAILED WRITE PROTECT.
    pub const NO_SPACE: Sense = Sense::new(Key::DataProtect, 0x27, 0x07);
    /// LOGICAL UNIT NOT READY, INITIALIZING COMMAND REQUIRED: it was stopped.
    pub const STOPPED: Sense = Sense::new(Key::NotReady, 0x04, 0x02);
    /// MEDIUM NOT PRESENT.
    pub const NO_MEDIUM: Sense = Sense::new(Key::NotReady, 0x3a, 0);
    /// UNRECOVERED READ ERROR.
    pub const READ_ERROR: Sense = Sense::new(Key::MediumError, 0x11, 0);
    /// WRITE ERROR.
    pub const WRITE_ERROR: Sense = Sense::new(Key::MediumError, 0x0c, 0);
    /// INTERNAL TARGET FAILURE.
    pub const TARGET_FAILURE: Sense = Sense::new(Key::HardwareError, 0x44, 0);
    /// MISCOMPARE DURING VERIFY OPERATION.
    pub const MISCOMPARE: Sense = Sense::new(Key::Miscompare, 0x1d, 0);
    /// DATA PHASE ERROR: memory of the initiator could not be read or written.
    pub const DATA_PHASE: Sense = Sense::new(Key::AbortedCommand, 0x4b, 0);

    /// These codes.
    pub const fn new(key: Key, asc: u8, ascq: u8) -> Sense {
        Sense { key, asc, ascq }
    }

    /// What a backend's error is for the initiator.
    pub fn of_backend(error: &io::Error, writing: bool) -> Sense {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Sense::NO_SPACE,
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Sense::WRITE_PROTECTED
            }
            io::ErrorKind::InvalidInput => Sense::LBA_OUT_OF_RANGE,
            io::ErrorKind::NotConnected | io::ErrorKind::OutOfMemory => Sense::TARGET_FAILURE,
            _ if writing => Sense::WRITE_ERROR,
            _ => Sense::READ_ERROR,
        }
    }

    /// Fixed format, current error (SPC-4, 4.5.3).
    pub fn fixed(&self) -> [u8; SENSE_BYTES] {
        let (key, asc, ascq) = (self.key as u8, self.asc, self.ascq);
        let rest = SENSE_BYTES as u8 - 8;
        [
            0x70, 0, key, 0, 0, 0, 0, rest, 0, 0, 0, 0, asc, ascq, 0, 0, 0, 0,
        ]
    }

    /// Descriptor format without descriptors, current error (SPC-4, 4.5.2).
    pub fn descriptor(&self) -> [u8; 8] {
        [0x72, self.key as u8, self.asc, self.ascq, 0, 0, 0, 0]
    }
}
