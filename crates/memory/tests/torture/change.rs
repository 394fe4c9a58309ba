// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Those who change the map and what is plugged.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use ebbtide_memory::{Gpa, Reader, Region};

use crate::counts::add;
use crate::world::{
    BLOCK, BLOCKS, DIMM_BYTES, DIMM_MAX_BYTES, DIMMS, PAGE, Random, Registers, Removed, VMEM_AT,
    WINDOW_AT, World, ram, stamp, wait,
};

/// Looks at what was removed, as a backend does that is busy, and lets it go.
pub fn acknowledge(world: &World, removals: &Receiver<Removed>) {
    while let Ok(removed) = removals.recv() {
        // SAFETY: the hold keeps it mapped.
        let head = unsafe { (removed.host as *const u64).read_volatile() };
        if head != removed.generation {
            add(&world.wrong.stale_pages);
        }
        drop(removed.hold);
        add(&world.done.mappings);
    }
}

/// Plugs, grows, renews and unplugs DIMMs.
pub fn plugger(world: &World) {
    let mut random = Random(42);
    let mut present: Vec<Option<(u64, Arc<Region>)>> = (0..DIMMS).map(|_| None).collect();
    let mut round = 0u64;
    while world.running() {
        round += 1;
        let at = random.next(DIMMS);
        match present[at as usize].take() {
            None => {
                let region = plug(world, round, at << 30);
                present[at as usize] = Some((round, region));
            }
            Some((number, region)) if random.next(3) == 0 && grow(world, number, &region) => {
                present[at as usize] = Some((number, region));
            }
            Some((_, region)) if random.next(3) == 0 => {
                let region = renew(world, round, at << 30, &region);
                present[at as usize] = Some((round, region));
            }
            Some((_, region)) => world.unplug(&region),
        }
    }
    for (_, region) in present.iter().flatten() {
        world.unplug(region);
    }
    // No removal is to come: the acknowledging thread ends.
    world.remove_mapper();
}

fn plug(world: &World, number: u64, at: u64) -> Arc<Region> {
    let name = format!("dimm{number}");
    let block = ram(&world.memory, &name, DIMM_BYTES, DIMM_MAX_BYTES, None);
    stamp(&block, 0..DIMM_BYTES, number);
    let region = Region::ram(name, &block);
    world
        .memory
        .update(|t| t.add(&world.root, &region, at, 0))
        .unwrap();
    add(&world.done.plugs);
    region
}

/// Other memory takes its place.
fn renew(world: &World, number: u64, at: u64, old: &Arc<Region>) -> Arc<Region> {
    let block = old.ram_block().unwrap();
    let block = world.memory.ram().renew(block).unwrap();
    stamp(&block, 0..block.size_bytes(), number);
    let region = Region::ram(format!("dimm{number}"), &block);
    let ticket = world.memory.update(|t| {
        let ticket = t.unplug(old)?;
        t.add(&world.root, &region, at, 0)?;
        Ok(ticket)
    });
    world.give_back(ticket.unwrap());
    add(&world.done.renewals);
    region
}

/// Whether it was to grow.
fn grow(world: &World, number: u64, region: &Arc<Region>) -> bool {
    let Some(block) = region.ram_block() else {
        return false;
    };
    if block.size_bytes() == DIMM_MAX_BYTES {
        return false;
    }
    world.memory.ram().grow(block, DIMM_MAX_BYTES).unwrap();
    stamp(block, DIMM_BYTES..DIMM_MAX_BYTES, number);
    world.memory.update(|t| t.set_size(region)).unwrap();
    add(&world.done.resizes);
    true
}

/// Moves registers about; the first load after the change finds them.
pub fn mover(world: &World) {
    let reader = world.register();
    let mut random = Random(4711);
    let bar = Region::mmio("bar", PAGE, Arc::new(Registers(0x5a)));
    let mut at = WINDOW_AT;
    let place = world.memory.update(|t| t.add(&world.root, &bar, at, 0));
    place.unwrap();
    while world.running() {
        let to = WINDOW_AT + random.next(4096) * PAGE;
        let moved = world.memory.update(|t| t.set_offset(&bar, to));
        moved.unwrap();
        assert_eq!(world.space.load(&reader, to + 8, 8), 0x5a, "new place");
        if at != to {
            assert_eq!(world.space.load(&reader, at + 8, 8), u64::MAX, "old place");
        }
        at = to;
        add(&world.done.publications);
    }
    world.memory.update(|t| t.remove(&bar)).unwrap();
}

/// Seals ranges of the sparse block; discards some, takes others back, plugs them again.
pub fn sealer(world: &World, thread: u64) {
    let mut random = Random(77 + thread);
    let reader = world.register();
    // Each sealer has its own half.
    let (low, count) = (thread * BLOCKS / 2, BLOCKS / 2);
    let mut number = 1 + thread;
    while world.running() {
        let first = low + random.next(count - 3);
        let range = first * BLOCK..(first + 1 + random.next(3)) * BLOCK;
        let Ok(seal) = world.vmem.seal(range.clone()) else {
            let populate = random.next(4) == 0;
            if world.vmem.plug(range.clone(), populate).is_ok() {
                add(if populate {
                    &world.done.populates
                } else {
                    &world.done.refills
                });
                number += 2;
                fill(world, &reader, range, number);
            }
            continue;
        };
        match random.next(4) {
            0 => {
                seal.undo();
                add(&world.done.seals_undone);
            }
            _ => {
                wait("a seal", seal.drained());
                seal.discard()
                    .unwrap_or_else(|(_, error)| panic!("{error}"));
                add(&world.done.discards);
            }
        }
    }
}

/// Numbers the pages of what was plugged, which had no number: what was there before is gone.
fn fill(world: &World, reader: &Reader, range: std::ops::Range<u64>, number: u64) {
    let guard = world.space.read(reader);
    for page in range.step_by(PAGE as usize) {
        let gpa = Gpa(VMEM_AT + page);
        let head = world.wrong.note(guard.read::<u64>(gpa));
        if head != Some(0) {
            add(&world.wrong.stale_pages);
        }
        world.wrong.note(guard.write(gpa, number));
    }
}
