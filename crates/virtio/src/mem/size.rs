// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The sizes a driver sees: requested, usable, plugged; and the configuration space that holds them (5.15.4).

use zerocopy::little_endian::{U16, U64};
use zerocopy::{Immutable, IntoBytes};

/// What usable sizes are rounded to, and how far they reach beyond the requested size. Guests with much memory hot-plug
/// in units of up to 2 GiB, and find nothing usable where the usable region ends within a unit.
const USABLE_UNIT_BYTES: u64 = 2 << 30;

/// What never changes while a device lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Region {
    /// Guest-physical start, a multiple of a block.
    pub addr: u64,
    /// Length, a multiple of a block.
    pub bytes: u64,
    /// A power of two.
    pub block_bytes: u64,
    pub node: Option<u16>,
}

/// What the operator and the driver change, under the device's lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// What the operator wants plugged.
    pub requested: u64,
    /// How far into the region the driver may plug. Only shrinks when everything was unplugged.
    pub usable: u64,
    /// What is plugged, as of the last answer.
    pub plugged: u64,
}

impl Region {
    /// Sizes at power-on: nothing is plugged.
    pub(crate) fn fresh(&self, requested: u64) -> Sizes {
        Sizes {
            requested,
            usable: self.usable_for(requested),
            plugged: 0,
        }
    }

    /// The least usable size for a requested one. Nothing requested, nothing usable.
    pub(crate) fn usable_for(&self, requested: u64) -> u64 {
        if requested == 0 {
            return 0;
        }
        requested
            .checked_next_multiple_of(USABLE_UNIT_BYTES)
            .and_then(|rounded| rounded.checked_add(USABLE_UNIT_BYTES))
            .map_or(self.bytes, |usable| usable.min(self.bytes))
    }

    /// The part of the region, as offsets, that `blocks` names; `None` when it is empty, not aligned or not in the
    /// usable part.
    pub(crate) fn usable_range(
        &self,
        sizes: &Sizes,
        blocks: super::request::Blocks,
    ) -> Option<std::ops::Range<u64>> {
        let len = u64::from(blocks.count).checked_mul(self.block_bytes)?;
        let start = blocks.addr.checked_sub(self.addr)?;
        let end = start.checked_add(len)?;
        let aligned = start.is_multiple_of(self.block_bytes);
        (len > 0 && aligned && end <= sizes.usable).then_some(start..end)
    }

    /// Fills `data` from byte `offset` of the configuration space on; zero behind its end.
    pub(crate) fn read_config(&self, sizes: &Sizes, offset: u64, data: &mut [u8]) {
        let layout = Layout {
            block_size: U64::new(self.block_bytes),
            node_id: U16::new(self.node.unwrap_or(0)),
            padding: [0; 6],
            addr: U64::new(self.addr),
            region_size: U64::new(self.bytes),
            usable_region_size: U64::new(sizes.usable),
            plugged_size: U64::new(sizes.plugged),
            requested_size: U64::new(sizes.requested),
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
}

impl Sizes {
    /// The operator wants `requested` bytes. The usable part grows as needed.
    pub(crate) fn request(&mut self, region: &Region, requested: u64) {
        self.requested = requested;
        self.usable = self.usable.max(region.usable_for(requested));
    }

    /// Everything was unplugged: the one occasion at which the usable part may shrink. True when it did.
    pub(crate) fn emptied(&mut self, region: &Region) -> bool {
        self.plugged = 0;
        let usable = region.usable_for(self.requested);
        std::mem::replace(&mut self.usable, usable) != usable
    }
}

/// `struct virtio_mem_config`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Layout {
    block_size: U64,
    node_id: U16,
    padding: [u8; 6],
    addr: U64,
    region_size: U64,
    usable_region_size: U64,
    plugged_size: U64,
    requested_size: U64,
}

#[cfg(test)]
mod tests {
    use super::super::request::Blocks;
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    const REGION: Region = Region {
        addr: 4 * GIB,
        bytes: 8 * GIB,
        block_bytes: 2 * MIB,
        node: Some(3),
    };

    #[test]
    fn usable_is_generous_and_bounded() {
        assert_eq!(REGION.usable_for(0), 0);
        assert_eq!(REGION.usable_for(2 * MIB), 4 * GIB);
        assert_eq!(REGION.usable_for(2 * GIB), 4 * GIB);
        assert_eq!(REGION.usable_for(2 * GIB + 2 * MIB), 6 * GIB);
        assert_eq!(REGION.usable_for(7 * GIB), 8 * GIB);
        let endless = Region {
            bytes: !(2 * MIB - 1),
            ..REGION
        };
        assert_eq!(endless.usable_for(endless.bytes), endless.bytes);
    }

    #[test]
    fn usable_shrinks_only_when_emptied() {
        let mut sizes = REGION.fresh(6 * GIB);
        assert_eq!(sizes.usable, 8 * GIB);
        sizes.request(&REGION, 0);
        assert_eq!(sizes.usable, 8 * GIB);
        sizes.request(&REGION, GIB);
        assert_eq!(sizes.usable, 8 * GIB);
        assert!(sizes.emptied(&REGION));
        assert_eq!(sizes.usable, 4 * GIB);
        assert!(!sizes.emptied(&REGION));
        sizes.request(&REGION, 0);
        assert!(sizes.emptied(&REGION));
        assert_eq!(sizes.usable, 0);
    }

    #[test]
    fn ranges() {
        let sizes = REGION.fresh(GIB); // usable: 4 GiB
        let range = |addr, count| REGION.usable_range(&sizes, Blocks { addr, count });
        assert_eq!(range(4 * GIB, 1), Some(0..2 * MIB));
        assert_eq!(
            range(8 * GIB - 2 * MIB, 1),
            Some(4 * GIB - 2 * MIB..4 * GIB)
        );
        for (addr, count) in [
            (4 * GIB, 0),
            (4 * GIB + MIB, 1),
            (4 * GIB - 2 * MIB, 1),
            (4 * GIB - 2 * MIB, 2),
            (8 * GIB, 1),
            (8 * GIB - 2 * MIB, 2),
            (4 * GIB, u16::MAX),
            (u64::MAX - 2 * MIB + 1, 1),
            (u64::MAX - 2 * MIB + 1, u16::MAX),
            (0, 1),
        ] {
            assert_eq!(range(addr, count), None, "{addr:#x} {count}");
        }
    }

    #[test]
    fn config_space_of_the_specification() {
        let sizes = Sizes {
            requested: 1,
            usable: 2,
            plugged: 3,
        };
        let read = |offset| {
            let mut data = [0xaa; 8];
            REGION.read_config(&sizes, offset, &mut data);
            u64::from_le_bytes(data)
        };
        let words: Vec<u64> = (0..9).map(|i| read(8 * i)).collect();
        assert_eq!(words, [2 * MIB, 3, 4 * GIB, 8 * GIB, 2, 3, 1, 0, 0]);
        assert_eq!(read(52), 0);
        assert_eq!(read(u64::MAX), 0);
    }
}
