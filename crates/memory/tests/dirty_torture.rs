// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Real threads write and pin while another harvests, as a migration does, and blocks and other
//! clients come and go: what arrives must be what is there.
#![cfg(not(loom))]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ebbtide_memory::DirtyClient::{Code, Display, Migration};
use ebbtide_memory::{
    Access, AddressSpace, Backing, CachedMap, Gpa, Memory, MemoryConfig, Phase, RamBlock, RamSpec,
    Reader, Region,
};

const PAGE: u64 = 4096;
const WRITERS: u64 = 3;
/// Few pages, so that writers and harvester meet; each writer has a word of each page.
const PAGES: u64 = 96;
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

/// Writes rising numbers in every way there is, until told to stop.
fn write(space: &Arc<AddressSpace>, writer: u64, stop: &AtomicBool) -> u64 {
    let reader = space.memory().register();
    let mut state = 0x9e37_79b9 + writer;
    let maps: Vec<CachedMap> = (0..PAGES)
        .map(|page| CachedMap::new(space, Gpa(page * PAGE), PAGE as usize, Access::ReadWrite))
        .collect();
    let mut value = 0;
    while !stop.load(Ordering::Relaxed) {
        value += 1;
        let page = random(&mut state) % PAGES;
        let (offset, gpa) = (writer * 8, Gpa(page * PAGE + writer * 8));
        match random(&mut state) % 4 {
            0 => space.read(&reader).write(gpa, value).unwrap(),
            1 => space.store(&reader, gpa.0, 8, value),
            2 => {
                let guard = space.read(&reader);
                let slice = maps[page as usize].get(&guard).unwrap();
                slice
                    .store_u64(offset as usize, value, Ordering::Relaxed)
                    .unwrap();
            }
            _ => {
                let pin = space.read(&reader).pin(gpa, 8, Access::Write).unwrap();
                let at = pin.as_ptr().cast::<u64>();
                // SAFETY: the pin's eight bytes, aligned, written by this thread alone.
                unsafe { at.write_volatile(value) };
            }
        }
    }
    value
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
    let stop = AtomicBool::new(false);
    let (mut harvests, mut pages) = (0u64, 0);
    let (writes, rounds) = thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                scope.spawn({
                    let (space, stop) = (&space, &stop);
                    move || write(space, writer, stop)
                })
            })
            .collect();
        let disturber = scope.spawn(|| disturb(&space, &root, &stop));
        let began = Instant::now();
        while began.elapsed() < LASTING {
            pages += harvest(&block, &space, &reader, &mut there);
            harvests += 1;
        }
        stop.store(true, Ordering::Relaxed);
        let writes: u64 = writers.into_iter().map(|w| w.join().unwrap()).sum();
        (writes, disturber.join().unwrap())
    });
    harvest(&block, &space, &reader, &mut there);
    let mut here = vec![0; there.len()];
    space.read(&reader).read_bytes(Gpa(0), &mut here).unwrap();
    let lost: Vec<usize> = (0..PAGES as usize)
        .filter(|page| {
            let bytes = page * PAGE as usize..(page + 1) * PAGE as usize;
            here[bytes.clone()] != there[bytes]
        })
        .collect();
    assert!(lost.is_empty(), "pages that did not arrive: {lost:?}");
    assert!(here.iter().any(|byte| *byte != 0));
    println!(
        "{writes} writes, {harvests} harvests of {pages} pages, {rounds} blocks came and went"
    );
}
