// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every device model, with every behaviour of what is at its other end, at every step of its driver's: reset, taken away,
//! stopped, given up. In a time that is made, so that twenty seconds cost none; and in an order that a seed decides.
//!
//! After each cycle: every request was answered once or lost with its device, after the guest was told nothing of its
//! memory was touched (it is filled with a pattern by then, and something comes late), and nothing is left: descriptors,
//! threads, routes, regions, ioeventfds, pins, tickets, RAM blocks, references, ids, slots, backends in use. Of heap that
//! is said after blocks of cycles.
//!
//! Normally a round of each model, in which each event comes at each step. `EBBTIDE_MATRIX_CYCLES` makes it more cycles,
//! `EBBTIDE_MATRIX_SEED` decides which, and `EBBTIDE_MATRIX_ONLY` is the line that a failure prints: that is
//! `cargo xtask matrix`.

#[path = "../device/mod.rs"]
mod device;

mod cycle;
mod heap;
mod plain;
mod storage;
mod streams;
mod virtio;
mod world;

use ebbtide_lab_driver::Random;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::time::Instant;

use cycle::{Behaviour, Event, Line, Step, Subject};
use device::Residue;
use storage::Image;
use virtio::{Made, Virtio};
use world::World;

/// How a model is made.
enum Make {
    Virtio(fn(&Rc<World>, &Image, Behaviour, &mut Random) -> Made),
    Plain(fn(&Rc<World>, Behaviour) -> Box<dyn Subject>),
}

/// The models; how their other ends can behave.
const MODELS: &[(&str, Make, &[Behaviour])] = &[
    ("virtio-blk", Make::Virtio(storage::blk), Behaviour::ALL),
    ("virtio-scsi", Make::Virtio(storage::scsi), Behaviour::ALL),
    ("virtio-net", Make::Virtio(streams::net), Behaviour::ALL),
    (
        "virtio-console",
        Make::Virtio(streams::console),
        Behaviour::ALL,
    ),
    ("virtio-rng", Make::Virtio(streams::rng), Behaviour::ALL),
    (
        "virtio-balloon",
        Make::Virtio(storage::balloon),
        &[Behaviour::Prompt],
    ),
    ("pci-serial", Make::Plain(plain::serial), Behaviour::ALL),
    (
        "i6300esb",
        Make::Plain(plain::watchdog),
        &[Behaviour::Delay],
    ),
    (
        "ivshmem-plain",
        Make::Plain(plain::shared_memory),
        &[Behaviour::Prompt, Behaviour::Never],
    ),
    (
        "pci-testdev",
        Make::Plain(plain::testdev),
        &[Behaviour::Prompt],
    ),
    (
        "pcie-root-port",
        Make::Plain(plain::root_port),
        &[Behaviour::Prompt],
    ),
];

/// Cycles of each model, if nobody says how many: a round.
const CYCLES: usize = Step::ALL.len() * Event::ALL.len();
/// The part of them that is lived through again for what is left on the heap.
const AGAIN: usize = 6;
const SEED: u64 = 0x00eb_b71d;

/// What a model is tried with.
struct Bench {
    world: Rc<World>,
    image: Image,
}

impl Bench {
    fn new() -> Bench {
        Bench {
            world: World::new(),
            image: Image::new(),
        }
    }

    fn cycle(&self, make: &Make, line: Line, seed: u64) {
        match line.event {
            // The world ends with it: another one.
            Event::Quit => live(&World::new(), &self.image, make, line, seed),
            _ => live(&self.world, &self.image, make, line, seed),
        }
    }
}

fn live(world: &Rc<World>, image: &Image, make: &Make, line: Line, seed: u64) {
    let mut random = Random(seed);
    let subject = match make {
        Make::Virtio(make) => {
            let made = make(world, image, line.behaviour, &mut random);
            Virtio::on_bench(world, made, &mut random)
        }
        Make::Plain(make) => make(world, line.behaviour),
    };
    cycle::run(world, subject, line);
}

/// The cycles of a model: each event at each step once in a round, with another behaviour in the next; in an order that
/// the seed decides.
fn lines(behaviours: &[Behaviour], cycles: usize, random: &mut Random) -> Vec<(Line, u64)> {
    let steps = Step::ALL.iter();
    let pairs = steps.flat_map(|&step| Event::ALL.iter().map(move |&event| (step, event)));
    let mut pairs: Vec<_> = pairs.enumerate().collect();
    let mut lines = Vec::new();
    for round in 0.. {
        for last in (1..pairs.len()).rev() {
            pairs.swap(last, random.below(last as u64 + 1) as usize);
        }
        for &(number, (step, event)) in &pairs {
            if lines.len() == cycles {
                return lines;
            }
            let behaviour = behaviours[(number + round) % behaviours.len()];
            let line = Line {
                behaviour,
                step,
                event,
            };
            lines.push((line, random.next()));
        }
    }
    lines
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn number(text: &str) -> u64 {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn text(model: &str, line: Line, seed: u64) -> String {
    let (behaviour, step, event) = (line.behaviour.name(), line.step.name(), line.event.name());
    format!("{model}/{behaviour}/{step}/{event}/{seed:#x}")
}

/// What [`text`] made.
fn parse(only: &str) -> (&'static str, &'static Make, Line, u64) {
    let parts: Vec<&str> = only.split('/').collect();
    let &[model, behaviour, step, event, seed] = &parts[..] else {
        panic!("{only}: not MODEL/BEHAVIOUR/STEP/EVENT/SEED");
    };
    let line = Line {
        behaviour: of(Behaviour::ALL, Behaviour::name, behaviour),
        step: of(Step::ALL, Step::name, step),
        event: of(Event::ALL, Event::name, event),
    };
    let found = MODELS.iter().find(|(name, ..)| *name == model);
    let (name, make, _) = found.unwrap_or_else(|| panic!("{model}: no such model"));
    (name, make, line, number(seed))
}

fn of<T: Copy>(all: &[T], name: fn(T) -> &'static str, wanted: &str) -> T {
    let found = all.iter().find(|it| name(**it) == wanted);
    *found.unwrap_or_else(|| {
        panic!(
            "{wanted}: none of {:?}",
            all.iter().map(|it| name(*it)).collect::<Vec<_>>()
        )
    })
}

/// Has a cycle and looks at what it leaves. A failure says how to have it again.
fn checked(
    bench: &Bench,
    residue: Option<&Residue>,
    (model, make): (&str, &Make),
    line: Line,
    seed: u64,
) {
    let lived = catch_unwind(AssertUnwindSafe(|| {
        bench.cycle(make, line, seed);
        if let Some(residue) = residue {
            let board = &bench.world.board;
            // A device that the guest had not let go of leaves the register that its driver waits for.
            let left = board.memory().mtree(false).matches("-detached").count();
            assert!(left <= 1, "the remnants of {left} devices in one place");
            board.bridge().forget_remnants();
            residue.assert_same(board);
            assert_eq!(board.memory().ram().blocks().len(), 1, "the guest's own");
            let asserted = board.lines().iter().any(|line| line.is_high());
            assert!(!asserted, "somebody interrupts");
        }
    }));
    if let Err(why) = lived {
        eprintln!(
            "again: cargo xtask matrix --only {}",
            text(model, line, seed)
        );
        resume_unwind(why);
    }
}

#[test]
fn every_model_in_every_state() {
    if let Some(only) = variable("EBBTIDE_MATRIX_ONLY") {
        let (model, make, line, seed) = parse(&only);
        let bench = Bench::new();
        // The first device may make what stays: the next is measured.
        checked(&bench, None, (model, make), line, seed);
        bench.world.board.bridge().forget_remnants();
        let residue = Residue::settled(&bench.world.board);
        return checked(&bench, Some(&residue), (model, make), line, seed);
    }
    let cycles = variable("EBBTIDE_MATRIX_CYCLES").map_or(CYCLES, |it| number(&it) as usize);
    let seed = variable("EBBTIDE_MATRIX_SEED").map_or(SEED, |it| number(&it));
    println!("seed {seed:#x}, {cycles} cycles of each model");
    let bench = Bench::new();
    for (model, make, behaviours) in MODELS {
        let warm_up = Line {
            behaviour: behaviours[0],
            step: Step::InBackend,
            event: Event::Unplug,
        };
        checked(&bench, None, (model, make), warm_up, seed);
    }
    bench.world.board.bridge().forget_remnants();
    let residue = Residue::settled(&bench.world.board);
    for (model, make, behaviours) in MODELS {
        let began = Instant::now();
        let lines = lines(behaviours, cycles, &mut Random(seed));
        let live = |lines: &[(Line, u64)]| {
            for (line, seed) in lines {
                checked(&bench, Some(&residue), (model, make), *line, *seed);
            }
        };
        live(&lines);
        // What ends with a world ends on threads of its own, some time.
        let stays = |(line, _): &(Line, u64)| line.event != Event::Quit;
        let again: Vec<_> = lines.iter().copied().filter(stays).collect();
        let again = &again[..again.len().div_ceil(AGAIN)];
        let left = heap::check(&bench.world.board, again.len(), || live(again));
        let left = left.unwrap_or_else(|left| {
            eprintln!("again: cargo xtask matrix --cycles {cycles} --seed {seed}");
            let cycles = again.len();
            panic!("{model}: {cycles} cycles leave {left:?} bytes on the heap, each time")
        });
        let time = began.elapsed();
        println!("{model}: {cycles} cycles in {time:.2?}, left on the heap: {left:?}");
    }
}
