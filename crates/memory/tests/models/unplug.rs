// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! All that can happen to RAM on its way out, in every order.
//!
//! The search plays two device threads, the control thread, an external mapper that acknowledges
//! when it likes, or never, and the grace worker, on a real memory: one step is one call. It goes
//! through every order of steps, breadth first; two orders that lead to the same state are
//! continued once. As steps cannot be taken back, each state is reached anew by its steps.
//!
//! The worker runs only when something has woken it, so that a wake-up that is forgotten shows as
//! an unplug that never ends.

use std::collections::{HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex};

use ebbtide_memory::modelled::{self, WorkerThread};
use ebbtide_memory::{
    Access, AddressSpace, Backing, Error, FlatSection, Gpa, Listener, ListenerError, Memory,
    MemoryConfig, Phase, Pin, RamBlock, RamSpec, ReadGuard, Reader, Region, RegionHold, Ticket,
};
use ebbtide_models::holds;

/// What there is in one search.
#[derive(Clone, Copy, Debug)]
struct Limits {
    threads: usize,
    /// Blocks that are plugged, one after the other, at the same address.
    blocks: usize,
    /// Sections that are opened, by all threads.
    sections: usize,
    /// Pins that are taken.
    pins: usize,
}

/// All that two blocks can meet at one address; and all that a block can meet when threads come
/// and go. Together they would be too much to go through.
const SEARCHES: [Limits; 2] = [
    Limits {
        threads: 1,
        blocks: 2,
        sections: 2,
        pins: 2,
    },
    Limits {
        threads: 2,
        blocks: 1,
        sections: 2,
        pins: 2,
    },
];

/// The control thread; the others count from 0.
const CONTROL: usize = 9;
const AT: Gpa = Gpa(0x10_0000);
const BYTES: u64 = 4096;
/// At the start of each block.
const STAMP: u64 = 0x5a5a_5a5a_5a5a_5a5a;

#[derive(Clone, Copy, Debug)]
enum Step {
    Plug,
    Unplug(usize),
    /// Other memory takes its place in the change that unplugs it.
    Replace(usize),
    /// By a thread, which registers if it has to.
    Enter(usize),
    Leave(usize),
    Pin(usize),
    /// Of a pin, by a thread.
    Unpin(usize, usize),
    /// The thread ends, or at least gives up its reader.
    Exit(usize),
    /// Of a removal, by the mapper.
    Acknowledge(usize),
    Work,
    Destroy(usize),
}

struct Mapping {
    block: usize,
    _hold: RegionHold,
    removed: bool,
}

type Mappings = Arc<Mutex<Vec<Mapping>>>;

/// A backend that is told of removals and answers later.
struct Mapper(Mappings);

fn number(section: &FlatSection) -> usize {
    section.region.name().parse().unwrap()
}

impl Listener for Mapper {
    fn region_add(&mut self, section: &FlatSection) -> Result<(), ListenerError> {
        self.0.lock().unwrap().push(Mapping {
            block: number(section),
            _hold: section.hold_as("backend"),
            removed: false,
        });
        Ok(())
    }

    fn region_del(&mut self, section: &FlatSection) {
        let mut mappings = self.0.lock().unwrap();
        let mut of_block = mappings.iter_mut().filter(|m| m.block == number(section));
        of_block.next().unwrap().removed = true;
    }
}

#[derive(Default)]
struct Thread {
    reader: Option<&'static Reader>,
    /// The open section, and the block that its view shows.
    section: Option<(ReadGuard<'static>, Option<usize>)>,
}

struct Plugged {
    region: Arc<Region>,
    block: Arc<RamBlock>,
    ticket: Option<Ticket>,
    phase: Phase,
}

struct World {
    memory: Arc<Memory>,
    worker: WorkerThread,
    root: Arc<Region>,
    space: Arc<AddressSpace>,
    mappings: Mappings,
    limits: Limits,
    threads: Vec<Thread>,
    /// With the thread that took it and the block.
    pins: Vec<(Pin, usize, usize)>,
    blocks: Vec<Plugged>,
    opened: usize,
    taken: usize,
}

impl World {
    fn new(limits: Limits) -> World {
        play(CONTROL);
        let config = MemoryConfig {
            arena_bytes: 64 << 20,
        };
        let (memory, mut worker) = modelled::memory(config).unwrap();
        let root = Region::container("root", 1 << 32);
        let space = memory.address_space("memory", &root).unwrap();
        let mappings = Mappings::default();
        let mapper = Mapper(Arc::clone(&mappings));
        space.add_listener(Box::new(mapper), 0).unwrap();
        worker.turn();
        World {
            memory,
            worker,
            root,
            space,
            mappings,
            limits,
            threads: (0..limits.threads).map(|_| Thread::default()).collect(),
            pins: Vec::new(),
            blocks: Vec::new(),
            opened: 0,
            taken: 0,
        }
    }

    /// The block that new sections find.
    fn shown(&self) -> Option<usize> {
        self.blocks.iter().position(|b| b.phase == Phase::Live)
    }

    /// What can happen next.
    fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        if self.shown().is_none() && self.blocks.len() < self.limits.blocks {
            steps.push(Step::Plug);
        }
        let more = self.blocks.len() < self.limits.blocks;
        for (at, plugged) in self.blocks.iter().enumerate() {
            match plugged.phase {
                Phase::Live => {
                    steps.push(Step::Unplug(at));
                    steps.extend(more.then_some(Step::Replace(at)));
                }
                Phase::Drained => steps.push(Step::Destroy(at)),
                _ => {}
            }
        }
        for (at, thread) in self.threads.iter().enumerate() {
            match (&thread.section, thread.reader) {
                (Some((_, shown)), _) => {
                    steps.push(Step::Leave(at));
                    steps.extend(
                        (shown.is_some() && self.taken < self.limits.pins).then_some(Step::Pin(at)),
                    );
                }
                (None, reader) => {
                    steps.extend(reader.map(|_| Step::Exit(at)));
                    steps.extend((self.opened < self.limits.sections).then_some(Step::Enter(at)));
                }
            }
        }
        for pin in 0..self.pins.len() {
            steps.extend((0..self.limits.threads).map(|by| Step::Unpin(pin, by)));
        }
        let mappings = self.mappings.lock().unwrap();
        let removed = mappings.iter().enumerate().filter(|(_, m)| m.removed);
        steps.extend(removed.map(|(at, _)| Step::Acknowledge(at)));
        if self.worker.is_woken() {
            steps.push(Step::Work);
        }
        steps
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Plug => self.plug(),
            Step::Unplug(at) => {
                play(CONTROL);
                let region = &self.blocks[at].region;
                let ticket = self.memory.update(|t| t.unplug(region)).unwrap();
                self.blocks[at].ticket = Some(ticket);
            }
            Step::Replace(at) => self.replace(at),
            Step::Enter(by) => {
                play(by);
                self.opened += 1;
                let memory = &self.memory;
                let shown = self.shown();
                let thread = &mut self.threads[by];
                let reader = *thread
                    .reader
                    .get_or_insert_with(|| Box::leak(Box::new(memory.register())));
                thread.section = Some((self.space.read(reader), shown));
            }
            Step::Leave(by) => {
                play(by);
                self.threads[by].section = None;
            }
            Step::Pin(by) => self.pin(by),
            Step::Unpin(pin, by) => {
                play(by);
                self.pins.remove(pin);
            }
            Step::Exit(by) => {
                play(by);
                self.exit(by);
            }
            Step::Acknowledge(at) => {
                let mapping = self.mappings.lock().unwrap().remove(at);
                drop(mapping);
            }
            Step::Work => self.worker.turn(),
            Step::Destroy(at) => {
                play(CONTROL);
                self.destroy(at);
            }
        }
        self.note_phases();
    }

    fn plug(&mut self) {
        play(CONTROL);
        let name = self.blocks.len().to_string();
        let spec = RamSpec {
            name: name.clone(),
            size_bytes: BYTES,
            max_size_bytes: BYTES,
            backing: Backing::Anon { thp: false },
            prefault: false,
            block_size_bytes: None,
        };
        let block = self.memory.ram().add(spec).unwrap();
        let region = Region::ram(name, &block);
        let add = self.memory.update(|t| t.add(&self.root, &region, AT.0, 0));
        add.unwrap();
        self.plugged(region, block);
    }

    fn plugged(&mut self, region: Arc<Region>, block: Arc<RamBlock>) {
        // SAFETY: the block's first word, which nobody else writes to.
        unsafe { block.host().cast::<u64>().write_volatile(STAMP) };
        self.blocks.push(Plugged {
            region,
            block,
            ticket: None,
            phase: Phase::Live,
        });
    }

    fn replace(&mut self, at: usize) {
        play(CONTROL);
        let old = Arc::clone(&self.blocks[at].region);
        let block = self.memory.ram().renew(&self.blocks[at].block).unwrap();
        let region = Region::ram(self.blocks.len().to_string(), &block);
        let ticket = self.memory.update(|t| {
            let ticket = t.unplug(&old)?;
            t.add(&self.root, &region, AT.0, 0)?;
            Ok(ticket)
        });
        self.blocks[at].ticket = Some(ticket.unwrap());
        self.plugged(region, block);
    }

    /// Gives back what is not used of memory on its way out.
    fn free_unused(&self, at: usize) {
        play(CONTROL);
        let Some(ticket) = &self.blocks[at].ticket else {
            return;
        };
        let pins = self.pins.iter().filter(|(_, _, block)| *block == at);
        let pinned: Vec<_> = pins.map(|(pin, _, _)| pin.host_range()).collect();
        match ticket.free_but(&pinned) {
            Ok(kept) => assert_eq!(kept != 0, self.is_used(at), "it keeps {kept} bytes"),
            Err(error) => assert!(ticket.phase() < Phase::Draining, "{error}"),
        }
    }

    /// The word that was written to a block when it was plugged.
    fn stamp(&self, at: usize) -> u64 {
        // SAFETY: a word of a block that is not gone.
        unsafe { self.blocks[at].block.host().cast::<u64>().read_volatile() }
    }

    fn unplug_again(&mut self, at: usize) {
        play(CONTROL);
        let before = self.memory.mtree(true) + &self.memory.ram().dump();
        let Plugged { region, block, .. } = &self.blocks[at];
        let unplug = self.memory.update(|t| t.unplug(region));
        let retire = self.memory.update(|t| t.retire(block));
        for result in [unplug, retire] {
            let refused = matches!(result, Err(Error::Unplugged(_)));
            assert!(refused, "unplugged twice: {:?}", result.err());
        }
        assert_eq!(self.memory.mtree(true) + &self.memory.ram().dump(), before);
    }

    fn pin(&mut self, by: usize) {
        play(by);
        let Some((guard, shown)) = &self.threads[by].section else {
            return;
        };
        match (guard.pin(AT, 8, Access::Read), *shown) {
            (Ok(pin), Some(at)) => {
                assert_eq!(pin.as_ptr(), self.blocks[at].block.host().as_ptr());
                self.pins.push((pin, by, at));
                self.taken += 1;
            }
            (Err(_), None) => {}
            (found, shown) => panic!("the view shows {shown:?}, the pin says {found:?}"),
        }
    }

    fn exit(&mut self, by: usize) {
        if let Some(reader) = self.threads[by].reader.take() {
            // SAFETY: leaked at the thread's first section; it has none open.
            drop(unsafe { Box::from_raw(std::ptr::from_ref(reader).cast_mut()) });
        }
    }

    fn destroy(&mut self, at: usize) {
        let used = self.is_used(at);
        let Some(ticket) = self.blocks[at].ticket.take() else {
            return;
        };
        let phases = ticket.phases();
        match ticket.destroy() {
            Ok(()) => {
                assert!(!used, "given back while used");
                assert_eq!(phases.current(), Phase::Gone);
                self.blocks[at].phase = Phase::Gone;
                let blocks = self.memory.ram().blocks();
                let block = &self.blocks[at].block;
                assert!(!blocks.iter().any(|other| Arc::ptr_eq(other, block)));
            }
            Err((ticket, error)) => {
                assert!(matches!(error, Error::NotDrained { .. }), "{error}");
                assert!(ticket.phase() < Phase::Drained);
                self.blocks[at].ticket = Some(ticket);
            }
        }
    }

    fn is_seen(&self, at: usize) -> bool {
        let mut sections = self.threads.iter().filter_map(|t| t.section.as_ref());
        sections.any(|(_, shown)| *shown == Some(at))
    }

    fn held(&self, at: usize) -> usize {
        let mappings = self.mappings.lock().unwrap();
        mappings
            .iter()
            .filter(|mapping| mapping.block == at)
            .count()
    }

    fn pinned(&self, at: usize) -> usize {
        self.pins
            .iter()
            .filter(|(_, _, block)| *block == at)
            .count()
    }

    /// Whether anybody could still touch the block.
    fn is_used(&self, at: usize) -> bool {
        self.is_seen(at) || self.held(at) + self.pinned(at) > 0
    }

    fn note_phases(&mut self) {
        for plugged in &mut self.blocks {
            if let Some(ticket) = &plugged.ticket {
                assert!(ticket.phase() >= plugged.phase, "a phase came back");
                plugged.phase = ticket.phase();
            }
        }
    }

    /// What must hold in every state.
    fn check(&mut self) {
        for at in 0..self.blocks.len() {
            if (Phase::Unpublished..Phase::Drained).contains(&self.blocks[at].phase) {
                self.unplug_again(at);
                // Too early, says the check in there.
                self.destroy(at);
                self.free_unused(at);
            }
        }
        for (at, plugged) in self.blocks.iter().enumerate() {
            assert!(
                plugged.phase < Phase::Draining || !self.is_seen(at),
                "still seen"
            );
            assert!(
                plugged.phase < Phase::Drained || !self.is_used(at),
                "still used"
            );
            if self.is_used(at) {
                assert_eq!(self.stamp(at), STAMP, "freed while used");
            }
            let Some(ticket) = plugged.ticket.as_ref() else {
                continue;
            };
            if ticket.phase() == Phase::Draining {
                let named: u64 = ticket.holders().iter().map(|holder| holder.count).sum();
                assert_eq!(named as usize, self.held(at) + self.pinned(at), "holders");
            }
        }
        for (pin, _, _) in &self.pins {
            let mut word = [0; 8];
            pin.read_at(0, &mut word).unwrap();
            assert_eq!(u64::from_ne_bytes(word), STAMP);
        }
        if let Some(at) = self.shown() {
            let block = &self.blocks[at].block;
            let named = self.memory.ram().by_name(block.name());
            assert!(named.is_some_and(|named| Arc::ptr_eq(&named, block)));
        }
    }

    /// What tells this state from others.
    fn state(&self) -> String {
        let mut text = self.worker.state();
        let mut pins: Vec<_> = self.pins.iter().map(|(_, by, at)| (by, at)).collect();
        pins.sort_unstable();
        let mappings = self.mappings.lock().unwrap();
        let mut mapped: Vec<_> = mappings.iter().map(|m| (m.block, m.removed)).collect();
        mapped.sort_unstable();
        let phases: Vec<_> = self.blocks.iter().map(|plugged| plugged.phase).collect();
        let spent = (self.opened, self.taken);
        text += &format!(" {pins:?} {mapped:?} {phases:?} {spent:?}");
        for thread in &self.threads {
            let section = thread.section.as_ref().map(|(_, shown)| shown);
            text += &format!(" {:?}{section:?}", thread.reader.is_some());
        }
        text
    }

    fn work(&mut self) {
        while self.worker.is_woken() {
            self.step(Step::Work);
        }
    }

    /// Nobody uses anything any more.
    fn leave(&mut self) {
        for by in 0..self.limits.threads {
            self.step(Step::Leave(by));
        }
        while !self.pins.is_empty() {
            self.step(Step::Unpin(0, 0));
        }
        for by in 0..self.limits.threads {
            self.step(Step::Exit(by));
        }
        self.work();
    }

    /// From every state: when threads and requests have ended, what no mapper holds drains by
    /// itself; when the mappers have answered, the rest does; and all can be given back.
    fn end(mut self) {
        self.leave();
        self.check();
        for at in 0..self.blocks.len() {
            let held = self.held(at) > 0;
            match self.blocks[at].phase {
                Phase::Live => self.step(Step::Unplug(at)),
                Phase::Draining => assert!(held, "nobody is left, and nobody tells the worker"),
                Phase::Drained | Phase::Gone => assert!(!held),
                phase => panic!("{phase} for ever"),
            }
        }
        self.work();
        while self.mappings.lock().unwrap().iter().any(|m| m.removed) {
            self.step(Step::Acknowledge(0));
        }
        self.work();
        for at in 0..self.blocks.len() {
            let phase = self.blocks[at].phase;
            assert!(phase >= Phase::Drained, "{phase} for ever");
            play(CONTROL);
            self.destroy(at);
            assert_eq!(self.blocks[at].phase, Phase::Gone);
        }
        // Old views know their blocks; they go before the memory does.
        self.work();
        assert!(self.memory.ram().blocks().is_empty());
    }
}

fn play(thread: usize) {
    modelled::play(thread as u64);
}

type Seen = Arc<Mutex<HashSet<String>>>;

/// What can happen after `steps`, unless they lead to a state that was seen before.
fn replay(limits: Limits, steps: &[Step], seen: &Seen) -> Vec<Step> {
    let next = Arc::new(Mutex::new(Vec::new()));
    let (found, seen, steps) = (Arc::clone(&next), Arc::clone(seen), steps.to_vec());
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 20_000;
    builder.check(move || {
        let mut world = World::new(limits);
        steps.iter().for_each(|step| world.step(*step));
        if seen.lock().unwrap().insert(world.state()) {
            *found.lock().unwrap() = world.steps();
            world.check();
            world.end();
        } else {
            world.leave();
        }
    });
    std::mem::take(&mut *next.lock().unwrap())
}

/// Every order of steps; how many were played, and how many states there are.
fn search(limits: Limits) -> (u64, usize) {
    let seen = Seen::default();
    let mut waiting = VecDeque::from([Vec::new()]);
    let mut orders = 0;
    while let Some(steps) = waiting.pop_front() {
        orders += 1;
        let result = catch_unwind(AssertUnwindSafe(|| replay(limits, &steps, &seen)));
        let next = result.unwrap_or_else(|panic| {
            println!("with {limits:?}, after {steps:?}");
            resume_unwind(panic)
        });
        waiting.extend(next.into_iter().map(|step| {
            let mut steps = steps.clone();
            steps.push(step);
            steps
        }));
    }
    let states = seen.lock().unwrap().len();
    (orders, states)
}

#[test]
fn search_unplug() {
    const INVARIANT: &str = "in every order of plug, unplug, unplug again, replacement, sections, pins, ends of threads, acknowledgements and their loss: nothing is given back while used, and what is not used drains";
    let mut orders = 0;
    for limits in SEARCHES {
        let (played, states) = search(limits);
        println!("{limits:?}: {states} states, {played} orders of steps");
        orders += played;
    }
    holds("memory/unplug", INVARIANT, orders);
}
