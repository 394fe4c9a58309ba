// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Everything at once, on real memory: pins dropped at home, elsewhere and as clones, look-ups,
//! cached translations, an external mapper, DIMMs that come, grow, are renewed and go, ranges that are sealed,
//! discarded and plugged again, registers that move, writes and harvests of the dirty log.
//!
//! What was given back is inaccessible, so that a pin or a section that is not waited for ends
//! the test with SIGSEGV. Each page says which block it belongs to, so that a stale translation
//! shows; and what is written through a pin must be there until it is dropped. In the end nothing
//! is left: the same is done twice, and the second time must leave no more than the first.
//!
//! EBBTIDE_TORTURE_SECONDS sets the length. The last line is a summary: `TORTURE {json}`.
#![cfg(not(loom))]

mod change;
mod counts;
mod dirty;
mod pins;
mod residue;
mod world;

use std::io::{self, Write};
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};
use std::{panic, process, thread};

use counts::json;
use dirty::WRITERS;
use residue::{Counting, Residue, mappings};
use world::{BLOCK, BLOCKS, World, wait};

#[global_allocator]
static HEAP: Counting = Counting;

/// Before it is measured what stays: tables of the crate that are used again, stacks, buffers.
const WARM_UP: Duration = Duration::from_millis(700);
/// Bytes of the heap that a run of any length may leave: the host's thread-locals and buffers grow
/// at times. A hundredth of a leak per unplug would be more.
const HEAP_SLACK: i64 = 16 << 10;
/// Neighbours that the host has or has not made one mapping of.
const MAPPINGS_SLACK: i64 = 4;
/// Threads that register as readers.
const READERS: u64 = 3 + 1 + 1 + 2 + WRITERS + 2;

/// A loaded host takes its time; two minutes are for ever.
fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(120);
    while !holds() && Instant::now() < end {
        thread::sleep(Duration::from_millis(10));
    }
    assert!(holds(), "not within two minutes: {what}");
}

/// Runs all threads for `length`; what was counted.
fn run(length: Duration) -> World {
    let world = World::new();
    let (away, received) = sync_channel(16);
    let (removed, removals) = sync_channel(64);
    world.add_mapper(removed);
    let meet = Barrier::new(WRITERS as usize + 1);
    // Who fails ends the process: others would wait for it for ever.
    panic::set_hook(Box::new(|info| {
        let _ = writeln!(io::stderr(), "{:?}: {info}", thread::current().name());
        process::abort();
    }));
    thread::scope(|scope| {
        let (world, meet) = (&world, &meet);
        scope.spawn(move || pins::drop_away(world, &received));
        scope.spawn(move || change::acknowledge(world, &removals));
        for thread in 0..3 {
            let away = away.clone();
            scope.spawn(move || pins::pinner(world, thread, &away));
        }
        drop(away);
        scope.spawn(|| pins::looker(world, 10));
        scope.spawn(|| change::plugger(world));
        scope.spawn(|| change::mover(world));
        for thread in 0..2 {
            scope.spawn(move || change::sealer(world, thread));
        }
        for writer in 0..WRITERS {
            scope.spawn(move || dirty::write(world, writer, meet));
        }
        scope.spawn(|| dirty::harvest_rounds(world, meet));
        scope.spawn(|| dirty::disturb(world));
        // Tables of readers are used again, so that what stays depends on how many there are at
        // a time: all of them, also where a thread waits long for its first turn.
        wait_until("all threads run", || {
            world.readers.load(Ordering::Relaxed) == READERS
        });
        thread::sleep(length);
        let all_done = || world.done.all().iter().all(|(_, count)| *count > 0);
        wait_until("everything has happened", all_done);
        world.stop.store(true, Ordering::Relaxed);
    });
    drop(panic::take_hook());
    world
}

/// Takes everything away that a run has left, up to the memory itself. What it says is left.
fn end(world: World) -> Vec<(&'static str, i64)> {
    let memory = Arc::clone(&world.memory);
    for at in 0..BLOCKS {
        if let Ok(seal) = world.vmem.seal(at * BLOCK..(at + 1) * BLOCK) {
            wait("a seal", seal.drained());
            seal.discard()
                .unwrap_or_else(|(_, error)| panic!("{error}"));
        }
    }
    assert_eq!(world.vmem.plugged_bytes(), 0);
    let regions = world.unplug_the_rest();
    let host = world.vmem.host().as_ptr() as u64;
    let is_mapped = || {
        mappings()
            .iter()
            .any(|(start, end)| (start..end).contains(&&host))
    };
    assert!(is_mapped());
    let blocks = memory.ram().blocks().len() as i64;
    let tickets = world.tickets.load(Ordering::Relaxed);
    drop(world);
    // Old views know regions; they go with this grace period at the latest.
    memory.synchronize();
    let regions = regions.iter().filter(|region| region.strong_count() > 0);
    let left = vec![
        ("ram_blocks", blocks),
        ("tickets", tickets),
        ("regions", regions.count() as i64),
        // Each holds the memory.
        ("readers", Arc::strong_count(&memory) as i64 - 1),
    ];
    drop(memory);
    assert!(!is_mapped(), "the reservation stays");
    left
}

#[test]
fn nothing_is_given_back_too_early_and_nothing_stays() {
    let seconds = std::env::var("EBBTIDE_TORTURE_SECONDS")
        .ok()
        .map(|text| text.parse().expect("EBBTIDE_TORTURE_SECONDS: seconds"));
    let length = Duration::from_secs_f64(seconds.unwrap_or(2.0));
    let uncounted = if residue::one_heap() {
        "[]"
    } else {
        "[\"mappings\"]"
    };
    end(run(WARM_UP));
    let before = Residue::now();
    let world = run(length);
    let (done, wrong) = (world.done.all(), world.wrong.all());
    let mut left = end(world);
    let Residue {
        heap_bytes,
        fds,
        mappings,
        threads,
    } = Residue::now().since(before);
    left.extend([
        ("heap_bytes", heap_bytes),
        ("fds", fds),
        ("threads", threads),
    ]);
    left.extend((uncounted == "[]").then_some(("mappings", mappings)));
    println!(
        "\nTORTURE {{\"seconds\":{},\"operations\":{},\"wrong\":{},\"residue\":{},\"uncounted\":{uncounted}}}",
        length.as_secs_f64(),
        json(&done),
        json(&wrong),
        json(&left)
    );
    for (what, count) in &done {
        assert!(*count > 0, "no {what} at all");
    }
    for (what, count) in &wrong {
        assert_eq!(*count, 0, "{what}");
    }
    for (what, count) in &left {
        let slack = match *what {
            "heap_bytes" => HEAP_SLACK,
            "mappings" => MAPPINGS_SLACK,
            _ => 0,
        };
        assert!(*count <= slack, "{count} {what} are left");
    }
}
