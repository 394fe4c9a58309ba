// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use proptest::prelude::*;

use super::*;
use crate::{Access, FlatSection, Region};

fn flats(ranges: &[(u64, u64)]) -> Vec<Arc<Flat>> {
    let region = Region::reservation("r", u64::MAX);
    ranges
        .iter()
        .map(|(start, end)| Flat::new(FlatSection::new(*start..*end, 0, Arc::clone(&region))))
        .collect()
}

fn check(index: &Index, flats: &[Arc<Flat>]) {
    check_view(&index.view(None), flats);
}

fn check_view(view: &View, flats: &[Arc<Flat>]) {
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
        assert!(node.entries().iter().all(|entry| !entry.is_node()));
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
    /// Any set of sections, changed step by step, against a walk of the list; in new views and in
    /// ones that showed what was there three steps before, or the map of another.
    #[test]
    fn updates_match_a_walk(steps in prop::collection::vec((any::<u8>(), 0u32..50, 1u64..5000), 1..60)) {
        let mut map = std::collections::BTreeMap::new();
        let mut index = Index::new();
        let mut keep = Vec::new();
        let mut other = Index::new();
        other.update(&flats(&[(0, 1 << 30)]), std::slice::from_ref(&(0..1 << 30)));
        let mut spares = std::collections::VecDeque::from([other.view(None), other.view(None)]);
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
            let view = index.view(spares.pop_front());
            check_view(&view, &flats);
            spares.push_back(view);
            if spares.len() < 3 {
                spares.push_back(index.view(None));
            }
        }
    }
}

/// What pins find by their windows is what look-ups find, at every border of every cell.
#[test]
fn windows_agree_with_look_ups() {
    let config = crate::MemoryConfig {
        arena_bytes: 1 << 33,
    };
    let memory = crate::Memory::new(config).unwrap();
    let root = Region::container("root", 1 << 48);
    let space = memory.address_space("memory", &root).unwrap();
    let ram = |name: &str, size_bytes, block_size_bytes| {
        let spec = crate::RamSpec {
            name: name.into(),
            size_bytes,
            max_size_bytes: size_bytes,
            backing: crate::Backing::Anon { thp: false },
            prefault: false,
            block_size_bytes,
        };
        memory.ram().add(spec).unwrap()
    };
    let (low, sparse, rom) = (
        ram("low", 3 << 30, None),
        ram("sparse", 1 << 30, Some(1 << 21)),
        ram("rom", 1 << 20, None),
    );
    sparse.plug(0..1 << 28, false).unwrap();
    sparse.plug((1 << 28) + (1 << 21)..1 << 29, false).unwrap();
    let low = Region::ram("low", &low);
    let sparse = Region::ram("sparse", &sparse);
    let places = [
        (Arc::clone(&low), 0, 0),
        (Region::reservation("hole", 0x6_0000), 0xa_0000, 1),
        (Region::rom("rom", &rom), 0x10_0000 - (1 << 16), 2),
        (Region::reservation("bars", 64 << 20), 0xb000_0000, 1),
        // From the middle of a cell to the middle of a block, and a cell of several sections.
        (
            Region::alias("part", &sparse, 0x12_3000, 0x1800_5000),
            (1 << 40) + 0x3000,
            0,
        ),
        (
            Region::alias("far", &sparse, 0, 1 << 30),
            (1 << 46) - (1 << 30),
            0,
        ),
        (
            Region::alias("near", &low, 0, 1 << 20),
            (1 << 46) - (4 << 30),
            0,
        ),
    ];
    memory
        .update(|t| {
            places
                .iter()
                .try_for_each(|(region, at, priority)| t.add(&root, region, *at, *priority))
        })
        .unwrap();
    let reader = memory.register();
    let guard = space.read(&reader);
    let view = guard.view();
    let mut borders: Vec<u64> = (FIRST_CELL..view.end)
        .map(|cell| cell_range(cell).0)
        .collect();
    for section in space.sections().unwrap() {
        borders.extend([section.range.start, section.range.end]);
        let blocks = (section.range.start..section.range.end).step_by(1 << 21);
        borders.extend(blocks.take(200));
    }
    let mut answered = 0;
    for border in borders {
        for (before, len) in [
            (0, 1),
            (1, 1),
            (1, 2),
            (0, 4096),
            (4096, 4096),
            (9, 5),
            (64, 8192),
        ] {
            let at = border.wrapping_sub(before);
            for access in [Access::Read, Access::Write] {
                let wanted = view
                    .lookup(at)
                    .and_then(|entry| entry.window().place_across(at, len, access));
                let naive = naive(view, at, len, access);
                assert_eq!(
                    wanted.as_ref().map(|place| place.host),
                    naive,
                    "{at:#x}+{len:#x}"
                );
                if let Some(place) = view.place(at, len, access) {
                    let wanted = wanted.unwrap();
                    assert_eq!((place.host, place.lane), (wanted.host, wanted.lane));
                    answered += 1;
                }
            }
        }
        assert!(view.place(border, 0, Access::Read).is_none());
        assert!(view.place(border, u64::MAX, Access::Read).is_none());
    }
    assert!(answered > 1000, "{answered}");
}

/// The host address of a range in one section that may be accessed as asked and is plugged.
fn naive(view: &View, at: u64, len: u64, access: Access) -> Option<u64> {
    let section = &view.lookup(at)?.flat().section;
    let SectionKind::Ram {
        block,
        block_offset,
        readonly,
    } = &section.kind
    else {
        return None;
    };
    let offset = block_offset + (at - section.range.start);
    let end = at.checked_add(len)?;
    let inside = end <= section.range.end && !(*readonly && access.writes());
    let plugged = block.plugged(offset..offset + len) == crate::Plugged::All;
    (inside && plugged).then(|| block.host().as_ptr() as u64 + offset)
}
