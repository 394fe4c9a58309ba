// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration space of a disk (virtio 1.3, 5.2.4).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::request::{SECTOR_BYTES, SEGMENT_SECTORS_MAX, SEGMENTS_MAX};

/// `struct virtio_blk_config` up to the fields of write-zeroes. What is behind belongs to features that are not
/// offered.
#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Layout {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    cylinders: U16,
    heads: u8,
    sectors: u8,
    blk_size: U32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: U16,
    opt_io_size: U32,
    writeback: u8,
    unused0: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

/// Where the one writable field is.
pub(crate) const WRITEBACK_OFFSET: u64 = 32;

/// What the driver is told about a disk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Config {
    pub capacity_bytes: u64,
    pub logical_block_bytes: u32,
    pub physical_block_bytes: u32,
    /// Most buffers of one request.
    pub segments_max: u32,
    pub queues: u16,
    pub discard: bool,
    pub write_zeroes: bool,
}

impl Config {
    /// Fills `data` from byte `offset` on; zero behind the end.
    pub(crate) fn read(&self, writeback: bool, offset: u64, data: &mut [u8]) {
        let layout = self.layout(writeback);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = layout.as_bytes().get(start..).unwrap_or_default();
        for (to, from) in data
            .iter_mut()
            .zip(rest.iter().chain(std::iter::repeat(&0)))
        {
            *to = *from;
        }
    }

    fn layout(&self, writeback: bool) -> Layout {
        let logical = self.logical_block_bytes.max(1);
        let physical_exp = (self.physical_block_bytes / logical)
            .checked_ilog2()
            .unwrap_or(0);
        let per_physical = u16::try_from(self.physical_block_bytes / logical).unwrap_or(0);
        // In sectors: what a discard of less than this has no effect on.
        let discard_alignment = (u64::from(self.physical_block_bytes) / SECTOR_BYTES).max(1);
        let discard = |value: u32| U32::new(if self.discard { value } else { 0 });
        let zeroes = |value: u32| U32::new(if self.write_zeroes { value } else { 0 });
        Layout {
            capacity: U64::new(self.capacity_bytes / SECTOR_BYTES),
            size_max: U32::new(0),
            seg_max: U32::new(self.segments_max),
            cylinders: U16::new(0),
            heads: 0,
            sectors: 0,
            blk_size: U32::new(self.logical_block_bytes),
            physical_block_exp: u8::try_from(physical_exp).unwrap_or(0),
            alignment_offset: 0,
            min_io_size: U16::new(per_physical),
            opt_io_size: U32::new(0),
            writeback: u8::from(writeback),
            unused0: 0,
            num_queues: U16::new(self.queues),
            max_discard_sectors: discard(SEGMENT_SECTORS_MAX),
            max_discard_seg: discard(SEGMENTS_MAX),
            discard_sector_alignment: discard(u32::try_from(discard_alignment).unwrap_or(1)),
            max_write_zeroes_sectors: zeroes(SEGMENT_SECTORS_MAX),
            max_write_zeroes_seg: zeroes(SEGMENTS_MAX),
            write_zeroes_may_unmap: u8::from(self.write_zeroes && self.discard),
            unused1: [0; 3],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: Config = Config {
        capacity_bytes: 3 << 30,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        segments_max: 254,
        queues: 1,
        discard: true,
        write_zeroes: true,
    };

    fn read<const N: usize>(config: &Config, offset: u64) -> [u8; N] {
        let mut data = [0xaa; N];
        config.read(true, offset, &mut data);
        data
    }

    #[test]
    fn offsets_of_the_specification() {
        assert_eq!(u64::from_le_bytes(read(&CONFIG, 0)), 3 << 21);
        assert_eq!(u32::from_le_bytes(read(&CONFIG, 12)), 254);
        assert_eq!(u32::from_le_bytes(read(&CONFIG, 20)), 512);
        assert_eq!(read(&CONFIG, 24), [3_u8]);
        assert_eq!(u16::from_le_bytes(read(&CONFIG, 26)), 8);
        assert_eq!(read(&CONFIG, WRITEBACK_OFFSET), [1_u8]);
        assert_eq!(u16::from_le_bytes(read(&CONFIG, 34)), 1);
        assert_eq!(u32::from_le_bytes(read(&CONFIG, 36)), SEGMENT_SECTORS_MAX);
        assert_eq!(u32::from_le_bytes(read(&CONFIG, 40)), SEGMENTS_MAX);
        assert_eq!(u32::from_le_bytes(read(&CONFIG, 44)), 8);
        assert_eq!(u32::from_le_bytes(read(&CONFIG, 48)), SEGMENT_SECTORS_MAX);
        assert_eq!(u32::from_le_bytes(read(&CONFIG, 52)), SEGMENTS_MAX);
        assert_eq!(read(&CONFIG, 56), [1_u8]);
        assert_eq!(size_of::<Layout>(), 60);
    }

    #[test]
    fn reads_of_any_width_and_place() {
        let mut whole = [0; 80];
        CONFIG.read(true, 0, &mut whole);
        for offset in 0..80 {
            for width in [1, 2, 4, 8] {
                let mut data = vec![0xaa; width];
                CONFIG.read(true, offset as u64, &mut data);
                let expected: Vec<_> = (offset..offset + width)
                    .map(|i| whole.get(i).copied().unwrap_or(0))
                    .collect();
                assert_eq!(data, expected);
            }
        }
        assert!(whole[60..].iter().all(|byte| *byte == 0));
        assert_eq!(read(&CONFIG, u64::MAX), [0_u8; 8]);
    }

    #[test]
    fn what_is_not_offered_reads_zero() {
        let config = Config {
            discard: false,
            write_zeroes: false,
            ..CONFIG
        };
        assert_eq!(read(&config, 36), [0_u8; 24]);
    }
}
