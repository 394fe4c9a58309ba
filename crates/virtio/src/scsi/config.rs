// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration space (virtio 1.3, 5.6.4).

use std::sync::atomic::{AtomicU32, Ordering};

use ebbtide_scsi::Lun;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes};

use super::request::EVENT_BYTES;

#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Layout {
    num_queues: U32,
    seg_max: U32,
    max_sectors: U32,
    cmd_per_lun: U32,
    event_info_size: U32,
    sense_size: U32,
    cdb_size: U32,
    max_channel: U16,
    max_target: U16,
    max_lun: U32,
}

/// The two fields a driver can write.
const SENSE_SIZE_OFFSET: u64 = 20;
const CDB_SIZE_OFFSET: u64 = 24;

const SENSE_SIZE: u32 = 96;
const CDB_SIZE: u32 = 32;
/// No sense data has more than 252 bytes and no CDB more than 260; what a driver asks for beyond that is not set.
const SENSE_SIZE_MAX: u32 = 1024;
const CDB_SIZE_MAX: u32 = 260;

/// How long the parts of a command are that the driver can choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    pub sense: u32,
    pub cdb: u32,
}

/// What the driver is told, and what it chose.
#[derive(Debug)]
pub(super) struct Config {
    pub queues: u16,
    /// Most buffers of one command.
    pub segments_max: u32,
    pub max_sectors: u32,
    pub cmd_per_lun: u32,
    sense_size: AtomicU32,
    cdb_size: AtomicU32,
}

impl Config {
    pub(super) fn new(
        queues: u16,
        segments_max: u32,
        max_sectors: u32,
        cmd_per_lun: u32,
    ) -> Config {
        Config {
            queues,
            segments_max,
            max_sectors,
            cmd_per_lun,
            sense_size: AtomicU32::new(SENSE_SIZE),
            cdb_size: AtomicU32::new(CDB_SIZE),
        }
    }

    /// As after a reset.
    pub(super) fn reset(&self) {
        self.sense_size.store(SENSE_SIZE, Ordering::Relaxed);
        self.cdb_size.store(CDB_SIZE, Ordering::Relaxed);
    }

    pub(super) fn sizes(&self) -> Sizes {
        Sizes {
            sense: self.sense_size.load(Ordering::Relaxed),
            cdb: self.cdb_size.load(Ordering::Relaxed),
        }
    }

    /// Fills `data` from byte `offset` on; zero behind the end.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let sizes = self.sizes();
        let layout = Layout {
            num_queues: U32::new(self.queues.into()),
            seg_max: U32::new(self.segments_max),
            max_sectors: U32::new(self.max_sectors),
            cmd_per_lun: U32::new(self.cmd_per_lun),
            event_info_size: U32::new(EVENT_BYTES as u32),
            sense_size: U32::new(sizes.sense),
            cdb_size: U32::new(sizes.cdb),
            max_channel: U16::new(0),
            max_target: U16::new(u8::MAX.into()),
            max_lun: U32::new(Lun::MAX.number().into()),
        };
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = layout.as_bytes().get(start..).unwrap_or_default();
        for (to, from) in data
            .iter_mut()
            .zip(rest.iter().chain(std::iter::repeat(&0)))
        {
            *to = *from;
        }
    }

    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        let &[b0, b1, b2, b3] = data else { return };
        let value = u32::from_le_bytes([b0, b1, b2, b3]);
        match offset {
            SENSE_SIZE_OFFSET if value <= SENSE_SIZE_MAX => {
                self.sense_size.store(value, Ordering::Relaxed);
            }
            CDB_SIZE_OFFSET if value <= CDB_SIZE_MAX => {
                self.cdb_size.store(value, Ordering::Relaxed);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(config: &Config, offset: u64) -> u32 {
        let mut data = [0xaa; 4];
        config.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn offsets_of_the_specification() {
        let config = Config::new(3, 254, 0xffff, 128);
        let expected = [3, 254, 0xffff, 128, 16, 96, 32, 255 << 16, 16383, 0];
        for (offset, value) in (0..).step_by(4).zip(expected) {
            assert_eq!(read(&config, offset), value, "{offset}");
        }
        assert_eq!(read(&config, u64::MAX), 0);
    }

    #[test]
    fn two_fields_can_be_written() {
        let config = Config::new(1, 1, 1, 1);
        for offset in (0..36).step_by(4) {
            config.write(offset, &40_u32.to_le_bytes());
        }
        let changed = Sizes { sense: 40, cdb: 40 };
        assert_eq!(config.sizes(), changed);
        assert_eq!(read(&config, 0), 1);
        config.write(SENSE_SIZE_OFFSET, &1025_u32.to_le_bytes());
        config.write(CDB_SIZE_OFFSET, &u32::MAX.to_le_bytes());
        config.write(CDB_SIZE_OFFSET, &[1]);
        assert_eq!(config.sizes(), changed);
        config.reset();
        assert_eq!(config.sizes(), Sizes { sense: 96, cdb: 32 });
    }
}
