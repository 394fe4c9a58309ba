// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Real threads write and pin while another harvests, as a migration does, and blocks and other
//! clients come and go: what arrives must be what is there.
#![cfg(not(loom))]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use ebbtide_memory::DirtyClient::{Code, Display, Migration};
use ebbtide_memory::{
    Access, AddressSpace, Backing, CachedMap, Gpa, Memory, MemoryConfig, Phase, RamBlock, RamSpec,
    Reader, Region,
};

const PAGE: u64 = 4096;
const WRITERS: u64 = 3;
/// Few pages, so that writers and harvester meet.
const PAGES: u64 = 96;
/// Harvests in a round, while others write.
const HARVESTS: u32 = 12;
const LASTING: Duration = Duration::from_millis(1500);

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn ram(memory: &Memory, name: &str) -> Arc<RamBlock> {
    let spec = RamSpec {
        name: name.to_owned(),
        size_bytes: PAGES * PAGE,
        max_size_bytes: PAGES * PAGE,
        backing: Backing::Anon { thp: false },
        prefault: false,
        block_size_bytes: None,
    };
    memory.ram().add(spec).unwrap()
}

/// Writes the number of the round into each of its pages once, in every way there is, so that a mark
/// that is lost is not made up for; the pages of one word are those of all writers. A round goes from one meeting at `meet` to the next.
fn write(space: &Arc<AddressSpace>, writer: u64, meet: &Barrier, stop: &AtomicBool) -> u64 {
    let reader = space.memory().register();
    let mut state = 0x9e37_79b9 + writer;
    let maps: Vec<CachedMap> = (0..PAGES)
        .map(|page| CachedMap::new(space, Gpa(page * PAGE), PAGE as usize, Access::ReadWrite))
        .collect();
    let mut round = 0;
    loop {
        meet.wait();
        if stop.load(Ordering::Relaxed) {
            return round;
        }
        round += 1;
        let first = random(&mut state) % PAGES;
        let pages = (first..PAGES).chain(0..first);
        for page in pages.filter(|page| page % WRITERS == writer) {
            let way = random(&mut state) % 4;
            write_one(space, &reader, &maps[page as usize], writer * 8, round, way);
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

/// One harvest: copies what is dirty.
fn harvest(block: &RamBlock, space: &AddressSpace, reader: &Reader, there: &mut [u8]) -> u64 {
    let snapshot = block.snapshot_and_clear(Migration, 0..u64::MAX).unwrap();
    for range in &snapshot {
        let part = &mut there[range.start as usize..range.end as usize];
        let guard = space.read(reader);
        guard.read_bytes(Gpa(range.start), part).unwrap();
    }
    snapshot.pages()
}

/// Another block is plugged, written and unplugged, and other clients start and stop.
fn disturb(space: &Arc<AddressSpace>, root: &Arc<Region>, stop: &AtomicBool) -> u64 {
    let memory = Arc::clone(space.memory());
    let reader = memory.register();
    let mut rounds = 0;
    while !stop.load(Ordering::Relaxed) {
        rounds += 1;
        let block = ram(&memory, "dimm");
        let region = Region::ram("dimm", &block);
        memory.update(|t| t.add(root, &region, 1 << 30, 0)).unwrap();
        let log = memory.dirty_log();
        let client = if rounds % 2 == 0 { Display } else { Code };
        log.start(client).unwrap();
        let taken = block.snapshot_and_clear(Migration, 0..u64::MAX).unwrap();
        assert_eq!(taken.pages(), PAGES);
        space.store(&reader, (1 << 30) + 3 * PAGE, 8, rounds);
        let taken = block.snapshot_and_clear(Migration, 0..u64::MAX).unwrap();
        assert!(taken.pages() == 1 && taken.contains(3 * PAGE));
        log.stop(client).unwrap();
        let ticket = memory.update(|t| t.unplug(&region)).unwrap();
        drop((region, block));
        while ticket.phase() != Phase::Drained {
            memory.synchronize();
        }
        ticket.destroy().map_err(|(_, error)| error).unwrap();
    }
    rounds
}

#[test]
fn no_write_is_lost() {
    let memory = Memory::new(MemoryConfig {
        arena_bytes: 1 << 40,
    })
    .unwrap();
    let root = Region::container("root", 1 << 40);
    let space = memory.address_space("memory", &root).unwrap();
    let block = ram(&memory, "ram");
    let region = Region::ram("ram", &block);
    memory.update(|t| t.add(&root, &region, 0, 0)).unwrap();
    memory.dirty_log().start(Migration).unwrap();
    let reader = memory.register();
    let mut there = vec![0; (PAGES * PAGE) as usize];
    let (stop, meet) = (AtomicBool::new(false), Barrier::new(WRITERS as usize + 1));
    let (mut harvests, mut pages) = (0u64, 0);
    let mut lost = Vec::new();
    let (rounds, blocks) = thread::scope(|scope| {
        let writer = |writer| {
            let (space, stop, meet) = (&space, &stop, &meet);
            scope.spawn(move || write(space, writer, meet, stop))
        };
        let writers: Vec<_> = (0..WRITERS).map(writer).collect();
        let disturber = scope.spawn(|| disturb(&space, &root, &stop));
        let began = Instant::now();
        let mut here = vec![0; there.len()];
        while began.elapsed() < LASTING && lost.is_empty() {
            meet.wait();
            for _ in 0..HARVESTS {
                pages += harvest(&block, &space, &reader, &mut there);
                harvests += 1;
            }
            meet.wait();
            harvest(&block, &space, &reader, &mut there);
            let guard = space.read(&reader);
            guard.read_bytes(Gpa(0), &mut here).unwrap();
            let differs = |page: &usize| {
                let bytes = page * PAGE as usize..(page + 1) * PAGE as usize;
                here[bytes.clone()] != there[bytes]
            };
            lost.extend((0..PAGES as usize).filter(differs));
        }
        stop.store(true, Ordering::Relaxed);
        meet.wait();
        let rounds: Vec<u64> = writers.into_iter().map(|w| w.join().unwrap()).collect();
        (rounds[0], disturber.join().unwrap())
    });
    assert!(lost.is_empty(), "pages that did not arrive: {lost:?}");
    assert!(rounds > 0 && there.iter().any(|byte| *byte != 0));
    println!(
        "{rounds} rounds, {harvests} harvests of {pages} pages, {blocks} blocks came and went"
    );
}
