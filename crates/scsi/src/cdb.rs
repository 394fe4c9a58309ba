// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Command descriptor blocks (SPC-4, 4.2): fields, and the command they are.

use crate::sense::Sense;

/// Operation codes (SPC-4, annex F).
pub(crate) mod op {
    pub const TEST_UNIT_READY: u8 = 0x00;
    pub const REQUEST_SENSE: u8 = 0x03;
    pub const READ_6: u8 = 0x08;
    pub const WRITE_6: u8 = 0x0a;
    pub const INQUIRY: u8 = 0x12;
    pub const MODE_SELECT_6: u8 = 0x15;
    pub const MODE_SENSE_6: u8 = 0x1a;
    pub const START_STOP_UNIT: u8 = 0x1b;
    pub const READ_CAPACITY_10: u8 = 0x25;
    pub const READ_10: u8 = 0x28;
    pub const WRITE_10: u8 = 0x2a;
    pub const VERIFY_10: u8 = 0x2f;
    pub const SYNCHRONIZE_CACHE_10: u8 = 0x35;
    pub const WRITE_SAME_10: u8 = 0x41;
    pub const UNMAP: u8 = 0x42;
    pub const MODE_SELECT_10: u8 = 0x55;
    pub const MODE_SENSE_10: u8 = 0x5a;
    pub const READ_16: u8 = 0x88;
    pub const WRITE_16: u8 = 0x8a;
    pub const VERIFY_16: u8 = 0x8f;
    pub const SYNCHRONIZE_CACHE_16: u8 = 0x91;
    pub const WRITE_SAME_16: u8 = 0x93;
    pub const SERVICE_ACTION_IN_16: u8 = 0x9e;
    pub const REPORT_LUNS: u8 = 0xa0;
    pub const READ_12: u8 = 0xa8;
    pub const WRITE_12: u8 = 0xaa;
    pub const VERIFY_12: u8 = 0xaf;
}

/// A CDB. Fields outside of what the initiator gave are INVALID FIELD IN CDB.
#[derive(Clone, Copy)]
pub(crate) struct Cdb<'a>(&'a [u8]);

impl<'a> Cdb<'a> {
    /// Cuts the bytes to the length the operation code says. The NACA bit is refused: there is no auto contingent
    /// allegiance.
    pub(crate) fn new(bytes: &'a [u8]) -> Result<Cdb<'a>, Sense> {
        let opcode = *bytes.first().ok_or(Sense::INVALID_FIELD)?;
        let length = match opcode >> 5 {
            0 => 6,
            1 | 2 => 10,
            4 => 16,
            5 => 12,
            _ => return Err(Sense::INVALID_OPCODE),
        };
        let cdb = Cdb(bytes.get(..length).ok_or(Sense::INVALID_FIELD)?);
        let control = cdb.byte(length - 1)?;
        if control & 1 << 2 != 0 {
            return Err(Sense::INVALID_FIELD);
        }
        Ok(cdb)
    }

    pub(crate) fn opcode(&self) -> u8 {
        self.0.first().copied().unwrap_or(0xff)
    }

    pub(crate) fn byte(&self, at: usize) -> Result<u8, Sense> {
        self.0.get(at).copied().ok_or(Sense::INVALID_FIELD)
    }

    /// Whether bit `bit` of byte `at` is set.
    pub(crate) fn bit(&self, at: usize, bit: u8) -> Result<bool, Sense> {
        Ok(self.byte(at)? & 1 << bit != 0)
    }

    pub(crate) fn be16(&self, at: usize) -> Result<u16, Sense> {
        self.array(at).map(u16::from_be_bytes)
    }

    pub(crate) fn be32(&self, at: usize) -> Result<u32, Sense> {
        self.array(at).map(u32::from_be_bytes)
    }

    pub(crate) fn be64(&self, at: usize) -> Result<u64, Sense> {
        self.array(at).map(u64::from_be_bytes)
    }

    fn array<const N: usize>(&self, at: usize) -> Result<[u8; N], Sense> {
        self.0
            .get(at..)
            .and_then(|rest| rest.first_chunk())
            .copied()
            .ok_or(Sense::INVALID_FIELD)
    }

    /// Address and number of blocks of READ, WRITE, VERIFY, WRITE SAME and SYNCHRONIZE CACHE, by the length of the CDB.
    pub(crate) fn extent(&self) -> Result<(u64, u32), Sense> {
        match self.0.len() {
            6 => {
                let lba = self.be32(0)? & 0x1f_ffff;
                let blocks = match self.byte(4)? {
                    0 => 256,
                    blocks => u32::from(blocks),
                };
                Ok((lba.into(), blocks))
            }
            10 => Ok((self.be32(2)?.into(), self.be16(7)?.into())),
            12 => Ok((self.be32(2)?.into(), self.be32(6)?)),
            _ => Ok((self.be64(2)?, self.be32(10)?)),
        }
    }

    /// Protection information is asked for with READ, WRITE and VERIFY of ten bytes and more; there is none.
    pub(crate) fn no_protection(&self) -> Result<(), Sense> {
        if self.0.len() > 6 && self.byte(1)? >> 5 != 0 {
            return Err(Sense::INVALID_FIELD);
        }
        Ok(())
    }

    /// Force unit access, which READ and WRITE of six bytes do not have.
    pub(crate) fn fua(&self) -> Result<bool, Sense> {
        Ok(self.0.len() > 6 && self.bit(1, 3)?)
    }
}
