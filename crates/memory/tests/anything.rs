// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Calls of all kinds in random order, sensible or not: what is refused is refused, nothing that is gone is shown or
//! marked, and what is pinned stays where it is with its contents.
//!
//! EBBTIDE_ANYTHING_SEEDS sets how many orders.
#![cfg(not(loom))]

mod setup;

use std::sync::Arc;
use std::time::Duration;

use ebbtide_memory::DirtyClient::{self, Code, Display, Migration};
use ebbtide_memory::{
    Access, AddressSpace, CachedMap, Error, Gpa, Mmio, Phase, Pin, PinnedRam, RamBlock, RamSpec,
    Reader, Region, Registers, Seal, SectionKind, Ticket, Transaction,
};
use setup::{ANON, Map, Scratch};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

const PAGE: u64 = 4096;
/// Of a sparse block, which has four.
const BLOCK: u64 = 4 * PAGE;
const SIZE: u64 = 4 * BLOCK;
const SPACE: u64 = 64 * PAGE;
const STEPS: usize = 400;

struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 11) % below as u64) as usize
    }

    fn page(&mut self) -> u64 {
        self.next((SPACE / PAGE) as usize) as u64 * PAGE
    }

    fn of<'a, T>(&mut self, things: &'a [T]) -> Option<&'a T> {
        let count = things.len();
        (count > 0).then(|| &things[self.next(count)])
    }

    fn out_of<T>(&mut self, things: &mut Vec<T>) -> Option<T> {
        let count = things.len();
        (count > 0).then(|| things.swap_remove(self.next(count)))
    }
}

/// Memory that a device has: what it is in, and what is written there.
struct Held {
    pin: Pin,
    block: Arc<RamBlock>,
    stamp: Option<[u8; 8]>,
}

struct World {
    map: Map,
    reader: Reader,
    random: Random,
    blocks: Vec<Arc<RamBlock>>,
    regions: Vec<Arc<Region>>,
    spaces: Vec<Arc<AddressSpace>>,
    rings: Vec<CachedMap>,
    tickets: Vec<Ticket>,
    seals: Vec<Seal>,
    held: Vec<Held>,
    tables: Vec<PinnedRam>,
    stamps: u64,
    /// Changes, renewals, ends, discards, pins, tables.
    done: [usize; 6],
}

impl World {
    fn new(seed: u64) -> World {
        let map = Map::new();
        let reader = map.memory.register();
        World {
            regions: vec![Arc::clone(&map.root)],
            spaces: vec![Arc::clone(&map.space)],
            map,
            reader,
            random: Random(seed),
            blocks: Vec::new(),
            rings: Vec::new(),
            tickets: Vec::new(),
            seals: Vec::new(),
            held: Vec::new(),
            tables: Vec::new(),
            stamps: 0,
            done: [0; 6],
        }
    }

    fn step(&mut self) {
        match self.random.next(32) {
            0 | 1 => self.add_block(),
            2..=5 => self.add_region(),
            6..=11 => self.change(),
            12 => self.spaces(),
            13 => self.retire(),
            14 => self.renew(),
            15 | 16 => self.end(),
            17 => self.plug(),
            18..=20 => self.seal(),
            21 => self.log(),
            22..=26 => self.pin(),
            27 | 28 => self.write(),
            29 => self.ring(),
            _ => self.table(),
        }
    }

    fn add_block(&mut self) {
        let sparse = self.random.next(2) == 0;
        let spec = RamSpec {
            backing: ANON,
            block_size_bytes: sparse.then_some(BLOCK),
            ..RamSpec::anon(format!("b{}", self.random.next(8)), SIZE)
        };
        let Ok(block) = self.map.memory.ram().add(spec) else {
            return;
        };
        let _ = block.plug(0..SIZE, false);
        self.blocks.push(block);
        // Some that are gone are kept.
        if self.random.next(3) == 0 {
            self.blocks.retain(|block| block.is_live());
        }
    }

    fn add_region(&mut self) {
        let (block, target) = (self.random.of(&self.blocks), self.regions.len());
        let Some(block) = block.cloned() else { return };
        let target = Arc::clone(&self.regions[self.random.next(target)]);
        let page = self.random.page();
        let region = match self.random.next(7) {
            0 => Region::container("c", SPACE.into()),
            1 => Region::ram_device("d", &block),
            2 => Region::rom("r", &block),
            3 => {
                let registers = Registers::new(Scratch::new(SIZE as usize) as Arc<dyn Mmio>);
                Region::rom_device("f", &block, registers)
            }
            4 => Region::alias("a", &target, page, SIZE),
            _ => Region::ram("m", &block),
        };
        // Most go where they can be seen.
        if self.random.next(4) > 0 {
            let page = self.random.page();
            let priority = self.random.next(5) as i32 - 2;
            let add = |t: &mut Transaction<'_>| t.add(&self.map.root, &region, page, priority);
            let _ = self.map.memory.update(add);
        }
        self.regions.push(region);
        if self.regions.len() > 40 {
            self.regions.truncate(25);
        }
    }

    fn change(&mut self) {
        let count = self.regions.len();
        let child = Arc::clone(&self.regions[self.random.next(count).max(count.min(2) - 1)]);
        let parent = Arc::clone(&self.regions[self.random.next(count.min(3))]);
        let (page, priority) = (self.random.page(), self.random.next(5) as i32 - 2);
        let what = self.random.next(8);
        let change = |t: &mut Transaction<'_>| match what {
            0..=2 => t.add(&parent, &child, page, priority),
            3 => t.remove(&child),
            4 => t.set_offset(&child, page),
            5 => t.set_enabled(&child, page % (2 * PAGE) == 0),
            6 => t.set_priority(&child, priority),
            _ => t.set_rom_direct(&child, page % (2 * PAGE) == 0),
        };
        let made = self.map.memory.update(change);
        self.done[0] += usize::from(made.is_ok());
    }

    fn spaces(&mut self) {
        if self.random.next(2) == 0 && self.spaces.len() > 1 {
            let at = 1 + self.random.next(self.spaces.len() - 1);
            let gone = self.spaces.swap_remove(at);
            self.rings.retain(|ring| !Arc::ptr_eq(ring.space(), &gone));
            return;
        }
        let count = self.regions.len();
        let root = Arc::clone(&self.regions[self.random.next(count)]);
        let made = self.map.memory.address_space("s", &root);
        self.spaces.extend(made.ok());
    }

    fn retire(&mut self) {
        let Some(block) = self.random.of(&self.blocks).cloned() else {
            return;
        };
        let shown = self.regions.iter();
        let shown: Vec<_> = shown
            .filter(|region| region.ram_block().is_some_and(|of| Arc::ptr_eq(of, &block)))
            .cloned()
            .collect();
        let ticket = self.map.memory.update(|t| {
            // Those that are somewhere; others keep it.
            shown.iter().for_each(|region| drop(t.remove(region)));
            t.retire(&block)
        });
        self.tickets.extend(ticket.ok());
    }

    fn renew(&mut self) {
        let Some(old) = self.random.of(&self.blocks).cloned() else {
            return;
        };
        if let Ok(new) = self.map.memory.ram().renew(&old) {
            self.blocks.push(new);
            self.done[1] += 1;
        }
    }

    fn end(&mut self) {
        let Some(ticket) = self.random.out_of(&mut self.tickets) else {
            return;
        };
        let block = Arc::clone(ticket.block());
        let pinned: Vec<_> = self.held.iter().map(|held| held.pin.host_range()).collect();
        let tables = self.tables.iter().flat_map(|table| table.iter());
        let tables: Vec<_> = tables
            .map(|region| {
                let host = region.get_host_address(vm_memory::MemoryRegionAddress(0));
                let host = host.unwrap() as u64;
                host..host + region.len()
            })
            .collect();
        let early = ticket.phase() < Phase::Draining;
        let freed = ticket.free_but(&[pinned, tables].concat());
        assert!(freed.is_ok() || early);
        ticket.wait(Phase::Drained, Duration::from_millis(20));
        match ticket.destroy() {
            Ok(()) => {
                let held = self
                    .held
                    .iter()
                    .any(|held| Arc::ptr_eq(&held.block, &block));
                assert!(!held, "gone under a pin");
                self.done[2] += 1;
                // Who keeps a block that is gone calls it all the same.
                assert!(block.seal(0..BLOCK).is_err() && block.plug(0..BLOCK, false).is_err());
                assert_eq!(block.pins(), 0);
                block.mark_dirty(0..SIZE);
            }
            Err((ticket, _)) => self.tickets.push(ticket),
        }
    }

    fn range(&mut self) -> std::ops::Range<u64> {
        let first = self.random.next(4) as u64;
        first * BLOCK..(first + 1 + self.random.next(2) as u64) * BLOCK
    }

    fn plug(&mut self) {
        let range = self.range();
        if let Some(block) = self.random.of(&self.blocks) {
            let _ = block.plug(range, false);
        }
    }

    fn seal(&mut self) {
        let range = self.range();
        match self.random.next(3) {
            0 => self.seals.extend(
                self.random
                    .of(&self.blocks)
                    .and_then(|block| block.seal(range).ok()),
            ),
            1 => drop(self.random.out_of(&mut self.seals)),
            _ => {
                let Some(seal) = self.random.out_of(&mut self.seals) else {
                    return;
                };
                let (block, range) = (Arc::clone(seal.block()), seal.range());
                seal.wait(Duration::from_millis(20));
                match seal.discard() {
                    Ok(()) => {
                        let start = block.host().as_ptr() as u64;
                        let range = start + range.start..start + range.end;
                        let under = self.held.iter().map(|held| held.pin.host_range());
                        let meets = |pin: &std::ops::Range<u64>| {
                            pin.start < range.end && range.start < pin.end
                        };
                        assert!(!under.into_iter().any(|pin| meets(&pin)), "under a pin");
                        self.done[3] += 1;
                    }
                    Err((seal, _)) => self.seals.push(seal),
                }
            }
        }
    }

    fn log(&mut self) {
        let client = [Display, Code, Migration][self.random.next(3)];
        let log = self.map.memory.dirty_log();
        match (self.random.next(4), self.random.of(&self.blocks)) {
            (0, _) => log.start(client).unwrap(),
            (1, _) => log.stop(client).unwrap(),
            (2, Some(block)) => drop(log.start_block(client, block)),
            (_, Some(block)) => log.stop_block(client, block).unwrap(),
            (_, None) => {}
        }
    }

    fn pin(&mut self) {
        if self.random.next(2) == 0 {
            if let Some(held) = self.random.out_of(&mut self.held) {
                held.check();
            }
            return;
        }
        let page = self.random.page();
        let access = [Access::Read, Access::Write][self.random.next(2)];
        let Some(space) = self.random.of(&self.spaces) else {
            return;
        };
        let guard = space.read(&self.reader);
        let Ok(pin) = guard.pin(Gpa(page), PAGE as usize, access) else {
            return;
        };
        let Some(SectionKind::Ram { block, .. }) = guard.lookup(Gpa(page)).map(|s| s.kind()) else {
            panic!("a pin of what is no RAM");
        };
        let block = Arc::clone(block);
        drop(guard);
        let start = block.host().as_ptr() as u64;
        let range = pin.host_range();
        assert!(start <= range.start && range.end <= start + SIZE);
        // Two writers of one page would not know what is there.
        let others = self
            .held
            .iter()
            .filter(|held| held.pin.host_range() == range);
        let stamp = (access.writes() && others.count() == 0).then(|| {
            self.stamps += 1;
            self.stamps.to_le_bytes()
        });
        if let Some(stamp) = &stamp {
            pin.write_at(0, stamp).unwrap();
        }
        self.held.push(Held { pin, block, stamp });
        self.done[4] += 1;
    }

    fn write(&mut self) {
        let page = self.random.page();
        let Some(space) = self.random.of(&self.spaces) else {
            return;
        };
        let guard = space.read(&self.reader);
        let written = guard.write(Gpa(page + 64), 7u8);
        let Some(section) = guard.lookup(Gpa(page + 64)) else {
            return assert!(written.is_err());
        };
        let SectionKind::Ram {
            block,
            block_offset,
            ..
        } = section.kind()
        else {
            return assert!(written.is_err());
        };
        let offset = block_offset + (page + 64 - section.range().start);
        for client in DirtyClient::ALL {
            match block.dirty(client, 0..SIZE) {
                Ok(dirty) => assert!(written.is_err() || dirty.contains(offset), "not marked"),
                Err(error) => assert!(matches!(error, Error::NotLogged { .. })),
            }
        }
    }

    fn ring(&mut self) {
        let page = self.random.page();
        if let Some(space) = self.random.of(&self.spaces).cloned() {
            self.rings
                .push(CachedMap::new(&space, Gpa(page), 64, Access::Write));
        }
        for ring in &self.rings {
            let guard = ring.space().read(&self.reader);
            let found = ring.get(&guard);
            let fresh = guard.pin(ring.gpa(), ring.len(), Access::Write);
            assert_eq!(found.is_ok(), fresh.is_ok(), "{ring:?}");
            if let Ok(slice) = found {
                slice.write(8, 1u8).unwrap();
            }
        }
        self.rings.truncate(12);
    }

    fn table(&mut self) {
        if self.random.next(2) == 0 {
            drop(self.random.out_of(&mut self.tables));
            return;
        }
        let Some(space) = self.random.of(&self.spaces) else {
            return;
        };
        let table = PinnedRam::new(space, &self.reader).unwrap();
        for region in table.iter() {
            region.bitmap().mark_dirty(0, 1);
        }
        self.tables.push(table);
        self.done[5] += 1;
    }

    /// What holds at any time.
    fn check(&self) {
        for space in &self.spaces {
            for section in space.sections().unwrap() {
                if let SectionKind::Ram { block, .. } = &section.kind {
                    assert!(block.is_live(), "{section:?} shows what is not there");
                }
            }
        }
        let blocks = self.map.memory.ram().snapshot();
        for block in blocks.iter() {
            let named = blocks.by_name(block.name());
            assert!(!block.is_live() || named.is_some_and(|named| named.is_live()));
        }
        self.held.iter().for_each(Held::check);
    }
}

impl Held {
    fn check(&self) {
        let mut now = [0; 8];
        self.pin.read_at(0, &mut now).unwrap();
        if let Some(stamp) = &self.stamp {
            assert_eq!(now, *stamp, "what was written under a pin");
        }
    }
}

#[test]
fn anything_goes_that_is_not_refused() {
    let mut done = [0; 6];
    let seeds = std::env::var("EBBTIDE_ANYTHING_SEEDS");
    let seeds = seeds.map_or(60, |text| {
        text.parse().expect("EBBTIDE_ANYTHING_SEEDS: a number")
    });
    for seed in 1..=seeds {
        let mut world = World::new(u64::wrapping_mul(seed, 0x9e37_79b9_7f4a_7c15));
        for _ in 0..STEPS {
            world.step();
            world.check();
        }
        for (all, one) in done.iter_mut().zip(world.done) {
            *all += one;
        }
    }
    let [changes, renewals, ends, discards, pins, tables] = done;
    println!(
        "{changes} changes, {renewals} renewals, {ends} ends, {discards} discards, {pins} pins, {tables} tables"
    );
    assert!(done.iter().all(|count| *count > 0), "{done:?}");
}
