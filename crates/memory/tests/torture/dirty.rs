// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Writers, and one who harvests as a migration does, while blocks and other clients come and go:
//! what arrives must be what is there, and what is told what was written.

use std::collections::HashSet;
use std::sync::Barrier;
use std::sync::atomic::Ordering;

use ebbtide_memory::DirtyClient::{Code, Display, Migration};
use ebbtide_memory::{Access, AddressSpace, CachedMap, Gpa, Reader, Region};

use crate::counts::add;
use crate::world::{LOGGED_AT, PAGE, Random, World, ram};

pub const WRITERS: u64 = 3;
/// Few pages, so that writers and harvester meet.
pub const PAGES: u64 = 96;
/// Harvests in a round, while others write.
const HARVESTS: u32 = 12;
const OTHER_AT: u64 = 1 << 42;

/// Writes the number of the round into each of its pages once, in every way there is, so that a
/// mark that is lost is not made up for; the pages of one word are those of all writers. A round
/// goes from one meeting at `meet` to the next.
pub fn write(world: &World, writer: u64, meet: &Barrier) {
    let space = &world.space;
    let reader = world.register();
    let mut random = Random(0x9e37_79b9 + writer);
    let map = |page| {
        let gpa = Gpa(LOGGED_AT + page * PAGE);
        CachedMap::new(space, gpa, PAGE as usize, Access::ReadWrite)
    };
    let maps: Vec<CachedMap> = (0..PAGES).map(map).collect();
    let mut round = 0;
    loop {
        meet.wait();
        if world.last_round.load(Ordering::Relaxed) {
            return;
        }
        round += 1;
        let first = random.next(PAGES);
        let pages = (first..PAGES).chain(0..first);
        for page in pages.filter(|page| page % WRITERS == writer) {
            let way = random.next(4);
            write_one(space, &reader, &maps[page as usize], writer * 8, round, way);
            add(&world.done.writes);
        }
        meet.wait();
    }
}

/// Writes `value` at `offset` of the page of `map`.
fn write_one(
    space: &AddressSpace,
    reader: &Reader,
    map: &CachedMap,
    offset: u64,
    value: u64,
    way: u64,
) {
    let gpa = Gpa(map.gpa().0 + offset);
    match way {
        0 => space.read(reader).write(gpa, value).unwrap(),
        1 => space.store(reader, gpa.0, 8, value),
        2 => {
            let guard = space.read(reader);
            let slice = map.get(&guard).unwrap();
            slice
                .store_u64(offset as usize, value, Ordering::Relaxed)
                .unwrap();
        }
        _ => {
            let pin = space.read(reader).pin(gpa, 8, Access::Write).unwrap();
            let at = pin.as_ptr().cast::<u64>();
            // SAFETY: the pin's eight bytes, aligned, written by this thread alone.
            unsafe { at.write_volatile(value) };
        }
    }
}

/// What a migration has sent.
struct Sent {
    there: Vec<u8>,
    /// Pages that were told in this round.
    told: HashSet<u64>,
}

/// One harvest: copies what is dirty; how many pages that are.
fn harvest(world: &World, reader: &Reader, sent: &mut Sent) -> u64 {
    let taken = world.logged.snapshot_and_clear(Migration, 0..u64::MAX);
    let snapshot = taken.unwrap();
    for range in &snapshot {
        let part = &mut sent.there[range.start as usize..range.end as usize];
        let guard = world.space.read(reader);
        let gpa = Gpa(LOGGED_AT + range.start);
        guard.read_bytes(gpa, part).unwrap();
        sent.told.extend(range.start / PAGE..range.end / PAGE);
    }
    let pages = snapshot.pages();
    world
        .done
        .pages_harvested
        .fetch_add(pages, Ordering::Relaxed);
    pages
}

/// Harvests while the writers write; after each round all must have been told, and nothing else.
pub fn harvest_rounds(world: &World, meet: &Barrier) {
    world.memory.dirty_log().start(Migration).unwrap();
    let reader = world.register();
    let bytes = (PAGES * PAGE) as usize;
    let mut sent = Sent {
        there: vec![0; bytes],
        told: HashSet::new(),
    };
    let mut here = vec![0; bytes];
    // All is dirty when a client starts.
    harvest(world, &reader, &mut sent);
    while world.running() {
        sent.told.clear();
        meet.wait();
        for _ in 0..HARVESTS {
            harvest(world, &reader, &mut sent);
        }
        meet.wait();
        harvest(world, &reader, &mut sent);
        let phantoms = harvest(world, &reader, &mut sent);
        let guard = world.space.read(&reader);
        guard.read_bytes(Gpa(LOGGED_AT), &mut here).unwrap();
        drop(guard);
        let differs = |page: &u64| {
            let bytes = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
            here[bytes.clone()] != sent.there[bytes]
        };
        let lost = (0..PAGES).filter(|page| differs(page) || !sent.told.contains(page));
        let lost = lost.count() as u64;
        world.wrong.lost_bits.fetch_add(lost, Ordering::Relaxed);
        world
            .wrong
            .phantom_bits
            .fetch_add(phantoms, Ordering::Relaxed);
    }
    world.last_round.store(true, Ordering::Relaxed);
    meet.wait();
    world.memory.dirty_log().stop(Migration).unwrap();
}

/// Another block is plugged, written and unplugged, and other clients start and stop.
pub fn disturb(world: &World) {
    let (memory, space) = (&world.memory, &world.space);
    let reader = world.register();
    let mut rounds = 0;
    while world.running() {
        rounds += 1;
        let block = ram(memory, "other", PAGES * PAGE, PAGES * PAGE, None);
        let region = Region::ram("other", &block);
        let added = memory.update(|t| t.add(&world.root, &region, OTHER_AT, 0));
        added.unwrap();
        let log = memory.dirty_log();
        let client = if rounds % 2 == 0 { Display } else { Code };
        log.start(client).unwrap();
        let taken = block.snapshot_and_clear(client, 0..u64::MAX).unwrap();
        assert_eq!(taken.pages(), PAGES);
        space.store(&reader, OTHER_AT + 3 * PAGE, 8, rounds);
        let taken = block.snapshot_and_clear(client, 0..u64::MAX).unwrap();
        assert!(taken.pages() == 1 && taken.contains(3 * PAGE));
        log.stop(client).unwrap();
        world.unplug(&region);
        add(&world.done.blocks_logged);
    }
}
