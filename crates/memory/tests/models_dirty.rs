// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The dirty log under loom. Each model is listed in `models.toml` with the bugs it must find.
//!
//! A page is a number that a writer raises from 0. Whoever harvests reads what it finds marked,
//! as a migration does; at the end every page either arrived or is marked again.
#![cfg(loom)]

use std::sync::Arc;

use ebbtide_memory::modelled::{Core, Dirty, ViewPointer};
use ebbtide_models::{explore, seeded};
use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use loom::thread;

/// The pages of a block.
type Block = Arc<[AtomicU64; 2]>;

fn block() -> Block {
    Arc::new([AtomicU64::new(0), AtomicU64::new(0)])
}

/// One harvest: reads what is marked.
fn harvest(dirty: Dirty, slot: u32, pages: &Block, there: &mut [u64; 2]) {
    for (page, marked) in dirty.harvest(slot).into_iter().enumerate() {
        if marked {
            there[page] = pages[page].load(Relaxed);
        }
    }
}

fn write(dirty: Dirty, slot: u32, pages: &Block, page: usize, value: u64) {
    if seeded!("mark_before_write") {
        dirty.mark(slot, page as u64);
    }
    pages[page].store(value, Relaxed);
    if !seeded!("mark_before_write") {
        dirty.mark(slot, page as u64);
    }
}

/// A client that starts and harvests once; what it has then.
fn client(dirty: Dirty, slot: u32, pages: &Block) -> thread::JoinHandle<[u64; 2]> {
    let pages = Arc::clone(pages);
    thread::spawn(move || {
        let mut there = [0; 2];
        dirty.start();
        harvest(dirty, slot, &pages, &mut there);
        there
    })
}

// In all models the first thread writes, as loom runs it first: what a harvester loads then
// conflicts with a store it has seen. The other way around, a writer's own test of its bit would
// hide from loom that its setting of the bit conflicts with the harvester's earlier load.

#[test]
fn model_dirty_mark() {
    explore(
        "memory/dirty-mark",
        "what is written is read by the harvest that takes its bit, or is still marked",
        4,
        || {
            let core = Core::default();
            let (dirty, slot) = (Dirty::of(&core), core.slot());
            dirty.add_block(slot);
            dirty.start();
            let pages = block();
            let mut there = [0; 2];
            harvest(dirty, slot, &pages, &mut there);
            let other = {
                let pages = Arc::clone(&pages);
                thread::spawn(move || write(dirty, slot, &pages, 1, 1))
            };
            let harvester = {
                let pages = Arc::clone(&pages);
                thread::spawn(move || {
                    harvest(dirty, slot, &pages, &mut there);
                    there
                })
            };
            write(dirty, slot, &pages, 0, 1);
            write(dirty, slot, &pages, 0, 2);
            other.join().unwrap();
            there = harvester.join().unwrap();
            harvest(dirty, slot, &pages, &mut there);
            assert_eq!(there, [2, 1], "a page was lost");
        },
    );
}

#[test]
fn model_client_start() {
    explore(
        "memory/client-start",
        "no write by way of a pin is lost when a client starts, whoever comes first",
        4,
        || {
            let core = Core::default();
            let (dirty, slot) = (Dirty::of(&core), core.slot());
            dirty.add_block(slot);
            let pages = block();
            let client = client(dirty, slot, &pages);
            let thread = core.register();
            pages[0].store(1, Relaxed);
            dirty.mark_pinned(&thread, slot, 0);
            let mut there = client.join().unwrap();
            harvest(dirty, slot, &pages, &mut there);
            assert_eq!(there[0], 1, "a page was lost");
        },
    );
}

#[test]
fn model_block_publish() {
    explore(
        "memory/block-publish",
        "no write to a block that appears while a client starts is lost",
        4,
        || {
            let core = Core::default();
            let (dirty, slot) = (Dirty::of(&core), core.slot());
            let view = Arc::new(ViewPointer::<Option<Block>>::new(None));
            let pages = block();
            let adder = {
                let (view, pages) = (Arc::clone(&view), Arc::clone(&pages));
                thread::spawn(move || {
                    dirty.add_block(slot);
                    // The old view goes when everybody is done.
                    view.replace(Some(pages))
                })
            };
            let client = client(dirty, slot, &pages);
            let thread = core.register();
            thread.enter();
            // SAFETY: inside the section.
            if let Some(pages) = unsafe { view.get() } {
                write(dirty, slot, pages, 0, 1);
            }
            thread.leave();
            let old = adder.join().unwrap();
            let mut there = client.join().unwrap();
            drop(old);
            harvest(dirty, slot, &pages, &mut there);
            assert_eq!(there[0], pages[0].load(Relaxed), "a page was lost");
        },
    );
}
