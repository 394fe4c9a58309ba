// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use proptest::prelude::*;

use super::*;
use crate::{FlatSection, Region};

fn flats(ranges: &[(u64, u64)]) -> Vec<Arc<Flat>> {
    let region = Region::reservation("r", u64::MAX);
    ranges
        .iter()
        .map(|(start, end)| Flat::new(FlatSection::new(*start..*end, 0, &region)))
        .collect()
}

fn check(index: &Index, flats: &[Arc<Flat>]) {
    let view = index.view();
    let mut probes = vec![0, u64::MAX];
    for flat in flats {
        let Range { start, end } = flat.section.range;
        probes.extend([
            start,
            end - 1,
            start + (end - start) / 2,
            end,
            start.saturating_sub(1),
        ]);
    }
    for address in probes {
        let found = view
            .lookup(address)
            .map(|entry| entry.flat().section.range.clone());
        let wanted = flats
            .iter()
            .map(|flat| flat.section.range.clone())
            .find(|r| r.contains(&address));
        assert_eq!(found, wanted, "at {address:#x}");
    }
}

#[test]
fn cells_tile_the_address_space() {
    let mut next = 0u64;
    for cell in FIRST_CELL..FIRST_CELL + ((64 - LOW_BITS as usize + 1) << CELL_BITS) {
        let (first, last) = cell_range(cell);
        assert_eq!(first, next);
        assert_eq!((cell_of(first), cell_of(last)), (cell, cell));
        next = last.wrapping_add(1);
    }
    assert_eq!(next, 0);
}

#[test]
fn a_pc_map_is_found_in_two_steps() {
    let mut ranges = vec![(0, 0xa0000), (0x10_0000, 0xc000_0000), (1 << 32, 9 << 30)];
    ranges.extend((0..4000).map(|bar| {
        (
            0xc000_0000 + bar * 0x4000,
            0xc000_0000 + bar * 0x4000 + 0x4000,
        )
    }));
    ranges.push(((1 << 46) - (1 << 30), 1 << 46));
    ranges.sort_unstable();
    let flats = flats(&ranges);
    let mut index = Index::new();
    index.update(&flats, std::slice::from_ref(&(0..1 << 46)));
    check(&index, &flats);
    assert!(index.cells.len() * size_of::<usize>() < 32 << 10);
    for node in index.nodes.iter().flatten() {
        assert!(node.entries().iter().all(|entry| entry.kind != NODE));
    }
}

#[test]
fn fine_borders_far_apart_get_further_nodes() {
    let ranges = [
        (1 << 45, (1 << 45) + 0x1000),
        ((1 << 45) + (1 << 38) + 1, (1 << 45) + (1 << 38) + 3),
    ];
    let flats = flats(&ranges);
    let mut index = Index::new();
    index.update(&flats, std::slice::from_ref(&(0..1 << 46)));
    check(&index, &flats);
}

#[test]
fn the_end_of_the_address_space_is_reached() {
    let flats = flats(&[(0, 1), (u64::MAX - 5, u64::MAX)]);
    let mut index = Index::new();
    index.update(&flats, std::slice::from_ref(&(0..u64::MAX)));
    check(&index, &flats);
}

proptest! {
    /// Any set of sections, changed step by step, against a walk of the list.
    #[test]
    fn updates_match_a_walk(steps in prop::collection::vec((any::<u8>(), 0u32..50, 1u64..5000), 1..60)) {
        let mut map = std::collections::BTreeMap::new();
        let mut index = Index::new();
        let mut keep = Vec::new();
        for (low, shift, length) in steps {
            let start = (u64::from(low) << shift) | (u64::from(low) & 7);
            let mut range = start..start + (length << (shift / 3));
            let overlaps = |r: &Range<u64>| r.start < range.end && range.start < r.end;
            let hit = map.values().find(|f: &&Arc<Flat>| overlaps(&f.section.range)).cloned();
            match hit {
                Some(flat) => {
                    range = flat.section.range.clone();
                    map.remove(&range.start);
                    keep.push(flat);
                }
                None => {
                    let flat = flats(&[(range.start, range.end)]).remove(0);
                    map.insert(range.start, flat);
                }
            }
            let flats: Vec<_> = map.values().cloned().collect();
            index.update(&flats, std::slice::from_ref(&range));
            check(&index, &flats);
        }
    }
}
