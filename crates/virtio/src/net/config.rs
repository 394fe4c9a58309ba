// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration space of a network card (virtio 1.3, 5.1.4).

use ebbtide_net::MacAddress;
use zerocopy::little_endian::U16;
use zerocopy::{Immutable, IntoBytes};

/// The link is up.
const STATUS_LINK_UP: u16 = 1;

/// `struct virtio_net_config` up to the MTU. What is behind belongs to features that are not offered.
#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Layout {
    mac: [u8; 6],
    status: U16,
    max_virtqueue_pairs: U16,
    mtu: U16,
}

/// What the driver is told about a card.
#[derive(Debug, Clone, Copy)]
pub(super) struct Config {
    pub mac: MacAddress,
    pub link_is_up: bool,
    /// 0: nothing is said.
    pub mtu: u16,
}

impl Config {
    /// Fills `data` from byte `offset` on; zero behind the end.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let layout = Layout {
            mac: self.mac.0,
            status: U16::new(if self.link_is_up { STATUS_LINK_UP } else { 0 }),
            max_virtqueue_pairs: U16::new(0),
            mtu: U16::new(self.mtu),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_of_the_specification() {
        let config = Config {
            mac: MacAddress([1, 2, 3, 4, 5, 6]),
            link_is_up: true,
            mtu: 0x0708,
        };
        let mut whole = [0xaa; 20];
        config.read(0, &mut whole);
        assert_eq!(whole[..12], [1, 2, 3, 4, 5, 6, 1, 0, 0, 0, 8, 7]);
        assert_eq!(whole[12..], [0; 8]);
        for offset in 0..20 {
            for width in [1, 2, 4, 8] {
                let mut data = vec![0xaa; width];
                config.read(offset as u64, &mut data);
                let expected: Vec<u8> = (offset..offset + width)
                    .map(|i| whole.get(i).copied().unwrap_or(0))
                    .collect();
                assert_eq!(data, expected);
            }
        }
        let mut data = [0xaa; 8];
        config.read(u64::MAX, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
