// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Those who use memory: by pins, in sections, through cached translations.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender};

use ebbtide_memory::{Access, CachedMap, Gpa, Pin, ReadGuard};

use crate::counts::add;
use crate::world::{BLOCK, DIMMS, PAGE, Random, VMEM_AT, World, generation};

/// A pinned page.
pub struct Held {
    pin: Pin,
    /// The head of the page; 0 while that is not known.
    generation: u64,
    /// Where the thread that took it has written what, if it goes on with it itself.
    stamp: Option<(usize, u64)>,
}

fn word(pin: &Pin, offset: usize) -> Result<u64, ebbtide_memory::AccessError> {
    let mut bytes = [0; 8];
    pin.read_at(offset, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

impl Held {
    /// Pins the page at `gpa`, and checks that it is one of the block that the section shows.
    fn take(world: &World, guard: ReadGuard<'_>, gpa: u64) -> Option<Held> {
        let shown = guard.lookup(Gpa(gpa)).and_then(|s| generation(s.region()));
        let pinned = guard.pin(Gpa(gpa), PAGE as usize, Access::ReadWrite);
        drop(guard);
        let Ok(pin) = pinned else {
            add(&world.done.pins_refused);
            return None;
        };
        let head = world.wrong.note(word(&pin, 0))?;
        if shown.is_some_and(|shown| shown != head) {
            add(&world.wrong.stale_pages);
        }
        Some(Held {
            pin,
            generation: head,
            stamp: None,
        })
    }

    /// At the end: the page is the one that was pinned, with what was written.
    fn check(&self, world: &World) {
        let Some(head) = world.wrong.note(word(&self.pin, 0)) else {
            return;
        };
        // The block of a page that was new when it was pinned may have been numbered since.
        if self.generation != 0 && head != self.generation {
            add(&world.wrong.stale_pages);
        }
        let Some((offset, stamp)) = self.stamp else {
            return;
        };
        if world.wrong.note(word(&self.pin, offset)) != Some(stamp) {
            add(&world.wrong.lost_writes);
        }
    }
}

/// Pins, writes on a line of its own, holds, checks; some pins are dropped by another thread, as
/// they are or as clones.
pub fn pinner(world: &World, thread: u64, away: &SyncSender<Held>) {
    let mut random = Random(0x1234_5678 + thread);
    let reader = world.register();
    let mut held: Vec<Held> = Vec::new();
    let mut stamp = thread << 48;
    let offset = (thread as usize + 1) * 64;
    while world.running() {
        let page = world.page(&mut random);
        // Two pins of one page would overwrite each other's stamp.
        if held.iter().any(|other| other.pin.gpa() == Gpa(page)) {
            continue;
        }
        let guard = world.space.read(&reader);
        if let Some(mut pinned) = Held::take(world, guard, page) {
            stamp += 1;
            let written = pinned.pin.write_at(offset, &stamp.to_le_bytes());
            world.wrong.note(written);
            pinned.stamp = Some((offset, stamp));
            held.push(pinned);
        }
        if held.len() > 20 {
            let pinned = held.swap_remove(random.next(20) as usize);
            pinned.check(world);
            // The line may be written anew by this thread before the other is done.
            let generation = pinned.generation;
            let send = |pin| {
                let stamp = None;
                let _ = away.send(Held {
                    pin,
                    generation,
                    stamp,
                });
            };
            match random.next(8) {
                0 => send(pinned.pin),
                1 => {
                    let clone = pinned.pin.clone();
                    drop(pinned);
                    add(&world.done.pins_cloned);
                    send(clone);
                }
                _ => add(&world.done.pins_home),
            }
        }
    }
    held.iter().for_each(|pinned| pinned.check(world));
}

/// Drops what pinners hand over.
pub fn drop_away(world: &World, received: &Receiver<Held>) {
    while let Ok(pinned) = received.recv() {
        pinned.check(world);
        add(&world.done.pins_remote);
    }
}

/// Sections, loads, cached translations.
pub fn looker(world: &World, thread: u64) {
    let mut random = Random(0x9876_5432 + thread);
    let reader = world.register();
    let rings: Vec<CachedMap> = (0..8)
        .map(|at| {
            let gpa = Gpa(if at % 2 == 0 {
                VMEM_AT + at * BLOCK
            } else {
                (at % DIMMS) << 30
            });
            CachedMap::new(&world.space, gpa, PAGE as usize, Access::ReadWrite)
        })
        .collect();
    while world.running() {
        let guard = world.space.read(&reader);
        for ring in &rings {
            if let Ok(slice) = ring.get(&guard) {
                let stored = slice.store_u32(thread as usize * 64, 7, Ordering::Relaxed);
                world.wrong.note(stored);
                add(&world.done.cached);
            }
        }
        let address = world.page(&mut random) + thread * 64;
        let mut bytes = [0; 200];
        world.wrong.note(guard.read_bytes(Gpa(address), &mut bytes));
        world
            .wrong
            .note(guard.write_bytes(Gpa(address), &bytes[..64]));
        let page = Gpa(world.page(&mut random));
        let shown = guard.lookup(page).and_then(|s| generation(s.region()));
        let head = world.wrong.note(guard.read::<u64>(page));
        if shown.is_some() && head != shown {
            add(&world.wrong.stale_pages);
        }
        drop(guard);
        add(&world.done.look_ups);
        world.space.load(&reader, address, 8);
        add(&world.done.loads);
    }
}
