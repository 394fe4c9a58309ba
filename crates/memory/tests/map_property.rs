// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Random scatter lists over RAM, registers and what an IOMMU translates, against a byte array.
#![cfg(not(loom))]

mod setup;

use std::sync::Arc;

use ebbtide_gate::Gate;
use ebbtide_memory::{
    Access, AddressSpace, Dma, Gpa, Iommu, Mapping, Mmio, Region, Registers, Translation,
};
use proptest::prelude::*;
use setup::{Map, Scratch};

/// Pages of 4 KiB: RAM, registers, and again, in another order, by the IOMMU.
const PAGES: u64 = 8;
const SPACE: u64 = (2 * PAGES) << 12;

/// Shows the pages in reverse.
struct Reverse(Arc<AddressSpace>);

impl Iommu for Reverse {
    fn translate(&self, offset: u64, _: Access) -> Option<Translation> {
        Some(Translation {
            space: Arc::clone(&self.0),
            target: Gpa(reverse(offset)),
            len: 0x1000 - offset % 0x1000,
            access: Access::ReadWrite,
        })
    }
}

fn reverse(offset: u64) -> u64 {
    ((PAGES - 1 - (offset >> 12)) << 12) + offset % 0x1000
}

/// Where an address of the space really is.
fn place(address: u64) -> usize {
    let behind = address.checked_sub(PAGES << 12);
    behind.map_or(address, reverse) as usize
}

struct Parts {
    map: Map,
    dma: Dma,
}

/// Even pages are RAM, odd ones registers; from page 8 on, the IOMMU.
fn parts() -> Parts {
    let map = Map::new();
    let inner = Region::container("inner", u128::from(PAGES) << 12);
    let space = map.memory.address_space("inner", &inner).unwrap();
    map.change(|t| {
        for page in 0..PAGES {
            let name = format!("page{page}");
            let region = if page % 2 == 0 {
                map.ram(&name, 0x1000)
            } else {
                let scratch = Scratch::new(0x1000) as Arc<dyn Mmio>;
                Region::registers(name, 0x1000, Registers::new(scratch))
            };
            t.add(&inner, &region, page << 12, 0)?;
        }
        let window = Region::alias("window", &inner, 0, PAGES << 12);
        t.add(&map.root, &window, 0, 0)?;
        let size = u128::from(PAGES) << 12;
        let iommu = Region::iommu("iommu", size, Arc::new(Reverse(Arc::clone(&space))));
        t.add(&map.root, &iommu, PAGES << 12, 0)
    });
    let dma = Dma::new(&map.space, &Gate::new("device"));
    Parts { map, dma }
}

fn pieces(mapping: &Mapping) -> impl Iterator<Item = *mut u8> {
    mapping.iovecs().iter().flat_map(|iovec| {
        let start = iovec.iov_base.cast::<u8>();
        (0..iovec.iov_len).map(move |at| start.wrapping_add(at))
    })
}

fn ranges() -> impl Strategy<Value = Vec<(u64, u32)>> {
    let range = (0..SPACE, prop_oneof![0..40u32, 0..9000u32])
        .prop_map(|(at, len)| (at, len.min((SPACE - at) as u32)));
    prop::collection::vec(range, 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn what_is_mapped_is_what_is_there(
        requests in prop::collection::vec((ranges(), 0..20_000usize, any::<u8>(), 0..3u8), 1..8),
    ) {
        let Parts { map, dma } = parts();
        let reader = map.memory.register();
        let mut wanted = vec![0u8; (PAGES << 12) as usize];
        for (ranges, completed, seed, way) in requests {
            let list: Vec<_> = ranges.iter().map(|(at, len)| (Gpa(*at), *len)).collect();
            let places: Vec<usize> = ranges
                .iter()
                .flat_map(|(at, len)| (*at..at + u64::from(*len)).map(place))
                .collect();
            let access = [Access::Read, Access::Write, Access::ReadWrite][usize::from(way)];
            let mapping = dma.map(&reader, &list, access).unwrap();
            prop_assert_eq!(mapping.total_len(), places.len());
            if access.reads() {
                for (byte, place) in pieces(&mapping).zip(&places) {
                    // SAFETY: mapped for reading.
                    prop_assert_eq!(unsafe { byte.read() }, wanted[*place]);
                }
            }
            if access.writes() {
                // As a device does that transfers `completed` bytes and stops.
                let count = completed.min(places.len());
                for (at, byte) in pieces(&mapping).take(count).enumerate() {
                    // SAFETY: mapped for writing.
                    unsafe { byte.write(seed.wrapping_add(at as u8)) };
                }
                // A place that is in several pieces is written by RAM at once, by registers in order.
                for (at, place) in places.iter().take(count).enumerate() {
                    wanted[*place] = seed.wrapping_add(at as u8);
                }
            }
            mapping.complete(&reader, completed).unwrap();
            prop_assert_eq!(dma.bounced_bytes(), 0);
        }
        for address in 0..SPACE {
            prop_assert_eq!(map.space.load(&reader, address, 1) as u8, wanted[place(address)], "{:#x}", address);
        }
    }
}
