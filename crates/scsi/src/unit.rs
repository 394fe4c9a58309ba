// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A direct-access logical unit: which command it takes when, and what is to be done for it.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::RANGE_MAX_BYTES;
use crate::attention::{Attention, Condition};
use crate::cdb::{Cdb, op};
use crate::inquiry::{self, Identity};
use crate::lun::Lun;
use crate::mode;
use crate::parameters::{self, Effect, Extent, ParameterList};
use crate::sense::Sense;

/// The medium, as it is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Number of logical blocks.
    pub blocks: u64,
    /// Bytes of one: a power of two from 512.
    pub block_bytes: u32,
    /// Bytes of a physical block: a power of two, at least a logical block.
    pub physical_block_bytes: u32,
    /// It cannot be written.
    pub readonly: bool,
    /// Space can be given back.
    pub unmap: bool,
}

impl Geometry {
    /// A range in bytes.
    ///
    /// # Errors
    /// LOGICAL BLOCK ADDRESS OUT OF RANGE.
    pub(crate) fn extent(&self, lba: u64, blocks: u64) -> Result<Extent, Sense> {
        let end = lba.checked_add(blocks).ok_or(Sense::LBA_OUT_OF_RANGE)?;
        if end > self.blocks {
            return Err(Sense::LBA_OUT_OF_RANGE);
        }
        let bytes = |blocks: u64| {
            blocks
                .checked_mul(self.block_bytes.into())
                .ok_or(Sense::LBA_OUT_OF_RANGE)
        };
        Ok(Extent {
            offset: bytes(lba)?,
            len: bytes(blocks)?,
        })
    }
}

/// What is to be done for a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// Nothing more: GOOD.
    Done,
    /// Data for the initiator.
    Reply {
        /// At most as many as it allows.
        data: Vec<u8>,
        /// The allocation length.
        allocation: u32,
    },
    /// Blocks for the initiator.
    Read {
        /// Which.
        extent: Extent,
        /// They have to be on the medium first.
        fua: bool,
    },
    /// Blocks from the initiator.
    Write {
        /// Where to.
        extent: Extent,
        /// They have to be on the medium afterwards.
        fua: bool,
    },
    /// The medium can be read; with `compare`, and holds what the initiator sends.
    Verify {
        /// Which blocks.
        extent: Extent,
        /// As many bytes come from the initiator.
        compare: bool,
    },
    /// One block of the initiator, again and again.
    WriteSame {
        /// Where to.
        extent: Extent,
        /// Bytes of the block; `None`: it is zeroes and is not sent.
        block_bytes: Option<u32>,
        /// Zeroes may be made by giving space back.
        unmap: bool,
    },
    /// What was written has to be on the medium.
    Flush,
    /// Needs a parameter list: give it to [`LogicalUnit::parameters`].
    Parameters {
        /// Its bytes.
        length: u32,
        /// What for.
        list: ParameterList,
    },
}

impl Work {
    /// Bytes the initiator is to have room for.
    pub fn data_in_bytes(&self) -> u64 {
        match self {
            Work::Reply { allocation, .. } => (*allocation).into(),
            Work::Read { extent, .. } => extent.len,
            _ => 0,
        }
    }

    /// Bytes the initiator is to send.
    pub fn data_out_bytes(&self) -> u64 {
        match self {
            Work::Write { extent, .. } => extent.len,
            Work::Verify {
                extent,
                compare: true,
            } => extent.len,
            Work::WriteSame { block_bytes, .. } => block_bytes.unwrap_or(0).into(),
            Work::Parameters { length, .. } => (*length).into(),
            _ => 0,
        }
    }
}

pub(crate) fn reply(mut data: Vec<u8>, allocation: u32) -> Work {
    data.truncate(allocation as usize);
    Work::Reply { data, allocation }
}

/// The state of a disk besides its blocks. Any thread.
#[derive(Debug)]
pub struct LogicalUnit {
    identity: Identity,
    attention: Attention,
    /// The write cache is on: see [`LogicalUnit::writeback`].
    writeback: AtomicBool,
    stopped: AtomicBool,
}

impl LogicalUnit {
    /// At power-on, with its write cache on.
    pub fn new(identity: Identity) -> LogicalUnit {
        let unit = LogicalUnit {
            identity,
            attention: Attention::default(),
            writeback: AtomicBool::new(true),
            stopped: AtomicBool::new(false),
        };
        unit.reset(Condition::PowerOn);
        unit
    }

    /// What the initiator is to hear of.
    pub fn attention(&self) -> &Attention {
        &self.attention
    }

    /// Whether written data may stay in a cache until a flush. Otherwise each write ends with one.
    pub fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    /// Back to the state at power-on; `condition` says why.
    pub fn reset(&self, condition: Condition) {
        self.writeback.store(true, Ordering::Relaxed);
        self.stopped.store(false, Ordering::Relaxed);
        self.attention.establish(condition);
    }

    /// Judges a command. `luns` lists the units of the target.
    ///
    /// # Errors
    /// The sense data: CHECK CONDITION, and nothing has been done.
    pub fn begin(
        &self,
        cdb: &[u8],
        geometry: &Geometry,
        luns: impl FnOnce() -> Vec<Lun>,
    ) -> Result<Work, Sense> {
        let cdb = Cdb::new(cdb)?;
        match cdb.opcode() {
            // These never report an attention with CHECK CONDITION.
            op::INQUIRY => inquiry::present(cdb, &self.identity, geometry),
            op::REPORT_LUNS => {
                let work = report_luns(cdb, &luns())?;
                self.attention.clear(Condition::LunsChanged);
                Ok(work)
            }
            op::REQUEST_SENSE => {
                let otherwise = self.ready(geometry).err().unwrap_or(Sense::NONE);
                request_sense(cdb, &self.attention, otherwise)
            }
            _ => {
                if let Some(sense) = self.attention.take() {
                    return Err(sense);
                }
                self.attended(cdb, geometry)
            }
        }
    }

    fn attended(&self, cdb: Cdb<'_>, geometry: &Geometry) -> Result<Work, Sense> {
        match cdb.opcode() {
            op::MODE_SENSE_6 | op::MODE_SENSE_10 => mode::sense(cdb, geometry, self.writeback()),
            op::MODE_SELECT_6 | op::MODE_SELECT_10 => mode::select(cdb),
            op::START_STOP_UNIT => self.start_stop(cdb),
            _ => medium(cdb, geometry, || self.ready(geometry)),
        }
    }

    fn ready(&self, geometry: &Geometry) -> Result<(), Sense> {
        if geometry.blocks == 0 {
            return Err(Sense::NO_MEDIUM);
        }
        if self.stopped.load(Ordering::Relaxed) {
            return Err(Sense::STOPPED);
        }
        Ok(())
    }

    /// SBC-3, 5.20. There are no power conditions and nothing to eject.
    fn start_stop(&self, cdb: Cdb<'_>) -> Result<Work, Sense> {
        let flags = cdb.byte(4)?;
        let (condition, no_flush) = (flags >> 4, flags & 1 << 2 != 0);
        let (eject, start) = (flags & 1 << 1 != 0, flags & 1 != 0);
        if eject || condition != 0 {
            return Err(Sense::INVALID_FIELD);
        }
        self.stopped.store(!start, Ordering::Relaxed);
        Ok(if start || no_flush {
            Work::Done
        } else {
            Work::Flush
        })
    }

    /// Carries out the parameter list of [`Work::Parameters`].
    ///
    /// # Errors
    /// The sense data: CHECK CONDITION, and nothing has changed.
    pub fn parameters(
        &self,
        list: ParameterList,
        bytes: &[u8],
        geometry: &Geometry,
    ) -> Result<Effect, Sense> {
        match list {
            ParameterList::Unmap => Ok(match parameters::unmap(bytes, geometry)? {
                none if none.is_empty() => Effect::None,
                extents => Effect::Unmap(extents),
            }),
            ParameterList::Mode { ten } => {
                let chosen = mode::selected(bytes, ten, geometry, self.writeback())?;
                let Some(writeback) = chosen else {
                    return Ok(Effect::None);
                };
                let before = self.writeback.swap(writeback, Ordering::Relaxed);
                Ok(if before && !writeback {
                    Effect::Flush
                } else {
                    Effect::None
                })
            }
        }
    }
}

/// Commands that need the medium.
fn medium(
    cdb: Cdb<'_>,
    geometry: &Geometry,
    ready: impl FnOnce() -> Result<(), Sense>,
) -> Result<Work, Sense> {
    let judge: fn(Cdb<'_>, &Geometry) -> Result<Work, Sense> = match cdb.opcode() {
        op::TEST_UNIT_READY => |_, _| Ok(Work::Done),
        op::READ_CAPACITY_10 => capacity_10,
        op::SERVICE_ACTION_IN_16 if cdb.byte(1)? & 0x1f == 0x10 => capacity_16,
        op::SERVICE_ACTION_IN_16 => return Err(Sense::INVALID_FIELD),
        op::READ_6 | op::READ_10 | op::READ_12 | op::READ_16 => read,
        op::WRITE_6 | op::WRITE_10 | op::WRITE_12 | op::WRITE_16 => write,
        op::VERIFY_10 | op::VERIFY_12 | op::VERIFY_16 => verify,
        op::SYNCHRONIZE_CACHE_10 | op::SYNCHRONIZE_CACHE_16 => synchronize,
        op::UNMAP if geometry.unmap => unmap,
        op::WRITE_SAME_10 | op::WRITE_SAME_16 => write_same,
        _ => return Err(Sense::INVALID_OPCODE),
    };
    ready()?;
    judge(cdb, geometry)
}

fn extent_of(cdb: Cdb<'_>, geometry: &Geometry) -> Result<Extent, Sense> {
    let (lba, blocks) = cdb.extent()?;
    geometry.extent(lba, blocks.into())
}

fn writable(geometry: &Geometry) -> Result<(), Sense> {
    if geometry.readonly {
        Err(Sense::WRITE_PROTECTED)
    } else {
        Ok(())
    }
}

fn read(cdb: Cdb<'_>, geometry: &Geometry) -> Result<Work, Sense> {
    cdb.no_protection()?;
    Ok(Work::Read {
        extent: extent_of(cdb, geometry)?,
        fua: cdb.fua()?,
    })
}

fn write(cdb: Cdb<'_>, geometry: &Geometry) -> Result<Work, Sense> {
    cdb.no_protection()?;
    writable(geometry)?;
    Ok(Work::Write {
        extent: extent_of(cdb, geometry)?,
        fua: cdb.fua()?,
    })
}

fn verify(cdb: Cdb<'_>, geometry: &Geometry) -> Result<Work, Sense> {
    cdb.no_protection()?;
    let compare = match cdb.byte(1)? >> 1 & 3 {
        0 => false,
        1 => true,
        // One block compared with all, and what is reserved.
        _ => return Err(Sense::INVALID_FIELD),
    };
    let extent = extent_of(cdb, geometry)?;
    Ok(Work::Verify { extent, compare })
}

/// The whole cache is written, whatever the range; but the range has to be one. No blocks: to the end.
fn synchronize(cdb: Cdb<'_>, geometry: &Geometry) -> Result<Work, Sense> {
    extent_of(cdb, geometry)?;
    Ok(Work::Flush)
}

fn unmap(cdb: Cdb<'_>, geometry: &Geometry) -> Result<Work, Sense> {
    // Anchored blocks are not offered.
    if cdb.bit(1, 0)? {
        return Err(Sense::INVALID_FIELD);
    }
    writable(geometry)?;
    Ok(Work::Parameters {
        length: cdb.be16(7)?.into(),
        list: ParameterList::Unmap,
    })
}

fn write_same(cdb: Cdb<'_>, geometry: &Geometry) -> Result<Work, Sense> {
    cdb.no_protection()?;
    let (anchor, unmap) = (cdb.bit(1, 4)?, cdb.bit(1, 3)?);
    // Obsolete ways to number the blocks, or (in the form of 16 bytes) "no data-out buffer".
    let (no_data, numbered) = match cdb.opcode() {
        op::WRITE_SAME_16 => (cdb.bit(1, 0)?, cdb.byte(1)? & 0x06),
        _ => (false, cdb.byte(1)? & 0x07),
    };
    if anchor || numbered != 0 || unmap && !geometry.unmap {
        return Err(Sense::INVALID_FIELD);
    }
    writable(geometry)?;
    let extent = extent_of(cdb, geometry)?;
    if extent.len == 0 || extent.len > RANGE_MAX_BYTES {
        return Err(Sense::INVALID_FIELD);
    }
    Ok(Work::WriteSame {
        extent,
        block_bytes: (!no_data).then_some(geometry.block_bytes),
        unmap,
    })
}

/// SBC-3, 5.12. A partial medium indicator is obsolete, and with it the address.
fn capacity_10(cdb: Cdb<'_>, geometry: &Geometry) -> Result<Work, Sense> {
    if cdb.bit(8, 0)? || cdb.be32(2)? != 0 {
        return Err(Sense::INVALID_FIELD);
    }
    let last = u32::try_from(geometry.blocks.saturating_sub(1)).unwrap_or(u32::MAX);
    let mut data = last.to_be_bytes().to_vec();
    data.extend(geometry.block_bytes.to_be_bytes());
    Ok(reply(data, 8))
}

/// SBC-3, 5.13.
fn capacity_16(cdb: Cdb<'_>, geometry: &Geometry) -> Result<Work, Sense> {
    /// Space is given back by UNMAP or WRITE SAME.
    const LBPME: u8 = 0x80;
    let per_physical = geometry.physical_block_bytes / geometry.block_bytes.max(1);
    let exponent = per_physical.checked_ilog2().unwrap_or(0) as u8 & 0x0f;
    let last = geometry.blocks.saturating_sub(1);
    let mut data = last.to_be_bytes().to_vec();
    data.extend(geometry.block_bytes.to_be_bytes());
    data.extend([0, exponent, if geometry.unmap { LBPME } else { 0 }, 0]);
    data.resize(32, 0);
    Ok(reply(data, cdb.be32(10)?))
}

/// SPC-4, 6.33.
pub(crate) fn report_luns(cdb: Cdb<'_>, luns: &[Lun]) -> Result<Work, Sense> {
    let allocation = cdb.be32(6)?;
    if allocation < 16 {
        return Err(Sense::INVALID_FIELD);
    }
    let listed = match cdb.byte(2)? {
        0 | 2 => luns,
        // Well-known units only: there are none.
        1 => &[],
        _ => return Err(Sense::INVALID_FIELD),
    };
    let bytes = u32::try_from(listed.len() * 8).unwrap_or(u32::MAX);
    let mut data = bytes.to_be_bytes().to_vec();
    data.extend([0; 4]);
    for lun in listed {
        data.extend(lun.to_bytes());
        data.extend([0; 6]);
    }
    Ok(reply(data, allocation))
}

/// SPC-4, 6.39: an attention that is pending, else `otherwise`.
pub(crate) fn request_sense(
    cdb: Cdb<'_>,
    attention: &Attention,
    otherwise: Sense,
) -> Result<Work, Sense> {
    let (descriptor, allocation) = (cdb.bit(1, 0)?, cdb.byte(4)?.into());
    let sense = attention.take().unwrap_or(otherwise);
    let data = if descriptor {
        sense.descriptor().to_vec()
    } else {
        sense.fixed().to_vec()
    };
    Ok(reply(data, allocation))
}
