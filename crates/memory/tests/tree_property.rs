// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Random trees, changed step by step, against a naive walk for each address.
#![cfg(not(loom))]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use ebbtide_memory::{
    AddressSpace, Backing, Error, FlatSection, Gpa, Listener, ListenerError, Memory, MemoryConfig,
    Mmio, RamSpec, Reader, Region, Registers,
};
use proptest::prelude::*;

struct Nothing;

impl Mmio for Nothing {
    fn read(&self, _: u64, _: u8) -> u64 {
        0
    }
    fn write(&self, _: u64, _: u8, _: u64) {}
}

/// Our own record of a region.
struct Node {
    region: Arc<Region>,
    size: u64,
    kind: Kind,
    enabled: bool,
    /// Parent, offset, priority, and when it was placed.
    place: Option<(usize, u64, i32, usize)>,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Container,
    Leaf,
    Ram,
    RomDevice,
    Alias(usize, u64),
}

struct Model {
    nodes: Vec<Node>,
    clock: usize,
}

impl Model {
    /// What answers at `offset` of `node`: the leaf and the offset in it.
    fn resolve(&self, node: usize, offset: u64) -> Option<(usize, u64)> {
        let this = &self.nodes[node];
        if !this.enabled || offset >= this.size {
            return None;
        }
        if let Kind::Alias(target, base) = this.kind {
            return self.resolve(target, offset.checked_add(base)?);
        }
        let mut children: Vec<_> = (0..self.nodes.len())
            .filter_map(|at| {
                self.nodes[at]
                    .place
                    .filter(|p| p.0 == node)
                    .map(|p| (at, p))
            })
            .collect();
        children.sort_by_key(|(_, (_, _, priority, placed))| (-priority, usize::MAX - placed));
        for (at, (_, base, _, _)) in children {
            let inside = offset
                .checked_sub(base)
                .and_then(|offset| self.resolve(at, offset));
            if inside.is_some() {
                return inside;
            }
        }
        (this.kind != Kind::Container).then_some((node, offset))
    }

    /// Whether it, or what it is an alias of, is RAM.
    fn is_ram(&self, node: usize) -> bool {
        match self.nodes[node].kind {
            Kind::Ram => true,
            Kind::Alias(target, _) => self.is_ram(target),
            _ => false,
        }
    }

    /// RAM that overlaps other RAM at its priority: there must be none.
    fn overlap(&self) -> Option<(usize, usize)> {
        let rams: Vec<_> = (0..self.nodes.len())
            .filter(|at| self.is_ram(*at) && self.nodes[*at].enabled)
            .filter_map(|at| self.nodes[at].place.map(|place| (at, place)))
            .collect();
        for (at, (parent, start, priority, _)) in &rams {
            for (other, (their_parent, their_start, their_priority, _)) in &rams {
                let meet = *start < their_start + self.nodes[*other].size
                    && *their_start < start + self.nodes[*at].size;
                if at != other && parent == their_parent && priority == their_priority && meet {
                    return Some((*at, *other));
                }
            }
        }
        None
    }
}

#[derive(Clone, Debug)]
enum Step {
    Place {
        child: usize,
        parent: usize,
        offset: u64,
        priority: i32,
    },
    Remove(usize),
    Move(usize, u64),
    Toggle(usize),
    Resize(usize, u64),
    Reprioritize(usize, i32),
    Direct(usize, bool),
}

impl Step {
    fn fits(&self, count: usize) -> bool {
        match *self {
            Step::Place { child, parent, .. } => child < count && parent < count,
            Step::Remove(at)
            | Step::Move(at, _)
            | Step::Toggle(at)
            | Step::Resize(at, _)
            | Step::Reprioritize(at, _)
            | Step::Direct(at, _) => at < count,
        }
    }

    fn child(&self) -> usize {
        match *self {
            Step::Place { child: at, .. }
            | Step::Remove(at)
            | Step::Move(at, _)
            | Step::Toggle(at)
            | Step::Resize(at, _)
            | Step::Reprioritize(at, _)
            | Step::Direct(at, _) => at,
        }
    }
}

const SPACE: u64 = 1 << 14;

fn way() -> impl Strategy<Value = Way> {
    prop_oneof![5 => Just(Way::Alone), 2 => Just(Way::Nested), 1 => Just(Way::TakenBack)]
}

fn step(nodes: usize) -> impl Strategy<Value = Step> {
    let offset = prop_oneof![0..SPACE, (0..16u64).prop_map(|n| n << 10)];
    prop_oneof![
        4 => (1..nodes, 0..nodes, offset.clone(), -2..3i32)
            .prop_map(|(child, parent, offset, priority)| Step::Place { child, parent, offset, priority }),
        1 => (1..nodes).prop_map(Step::Remove),
        2 => (1..nodes, offset).prop_map(|(child, offset)| Step::Move(child, offset)),
        1 => (0..nodes).prop_map(Step::Toggle),
        1 => (0..nodes, 0..2 * SPACE).prop_map(|(at, size)| Step::Resize(at, size)),
        1 => (1..nodes, -2..3i32).prop_map(|(at, priority)| Step::Reprioritize(at, priority)),
        1 => (1..nodes, any::<bool>()).prop_map(|(at, direct)| Step::Direct(at, direct)),
    ]
}

/// Keeps its own map from what it is told.
struct Mirror(Arc<Mutex<Told>>);

/// By start: end, region, offset in the region.
type Told = BTreeMap<u64, (u64, usize, u64)>;

impl Listener for Mirror {
    fn region_add(&mut self, section: &FlatSection) -> Result<(), ListenerError> {
        let node = section.region.name().parse().unwrap();
        let mut map = self.0.lock().unwrap();
        let clash = map
            .range(..section.range.end)
            .next_back()
            .is_some_and(|(_, v)| v.0 > section.range.start);
        assert!(!clash, "added over what is there: {section:?}");
        map.insert(
            section.range.start,
            (section.range.end, node, section.offset_in_region),
        );
        Ok(())
    }
    fn region_del(&mut self, section: &FlatSection) {
        let gone = self.0.lock().unwrap().remove(&section.range.start);
        assert_eq!(gone.map(|gone| gone.0), Some(section.range.end));
    }
}

/// Makes the step, in a change of its own, in one that goes on after a failure, or in one that is
/// taken back; and in the model if it was made.
fn apply(memory: &Memory, model: &mut Model, step: &Step, way: Way) {
    let region = |at: usize| Arc::clone(&model.nodes[at].region);
    let change = |t: &mut ebbtide_memory::Transaction<'_>| match *step {
        Step::Place {
            child,
            parent,
            offset,
            priority,
        } => t.add(&region(parent), &region(child), offset, priority),
        Step::Remove(child) => t.remove(&region(child)),
        Step::Move(child, offset) => t.set_offset(&region(child), offset),
        Step::Toggle(at) => t.set_enabled(&region(at), !model.nodes[at].enabled),
        Step::Resize(at, size) => t.resize(&region(at), size),
        Step::Reprioritize(child, priority) => t.set_priority(&region(child), priority),
        Step::Direct(at, direct) => t.set_rom_direct(&region(at), direct),
    };
    let made = match way {
        Way::Alone => memory.update(change).is_ok(),
        Way::Nested => memory.update(|t| Ok(t.nested(change).is_ok())).unwrap(),
        Way::TakenBack => {
            let nowhere = Region::container("nowhere", 1);
            let back = |t: &mut ebbtide_memory::Transaction<'_>| -> Result<(), Error> {
                change(t)?;
                t.remove(&nowhere)
            };
            assert!(memory.update(|t| Ok(t.nested(back).is_ok())).is_ok());
            assert!(memory.update(back).is_err());
            false
        }
    };
    if made {
        model.make(step);
    }
}

#[derive(Clone, Copy, Debug)]
enum Way {
    Alone,
    Nested,
    TakenBack,
}

impl Model {
    fn make(&mut self, step: &Step) {
        self.clock += 1;
        let clock = self.clock;
        let node = &mut self.nodes[step.child()];
        match *step {
            Step::Place {
                parent,
                offset,
                priority,
                ..
            } => node.place = Some((parent, offset, priority, clock)),
            Step::Remove(_) => node.place = None,
            Step::Toggle(_) => node.enabled = !node.enabled,
            Step::Resize(_, size) => node.size = size,
            Step::Direct(..) => {}
            Step::Move(_, offset) => {
                if let Some(place) = &mut node.place {
                    place.1 = offset;
                }
            }
            Step::Reprioritize(_, priority) => {
                if let Some(place) = &mut node.place {
                    (place.2, place.3) = (priority, clock);
                }
            }
        }
    }
}

fn compare(model: &Model, root: usize, space: &AddressSpace, reader: &Reader) {
    let guard = space.read(reader);
    // Every byte of one part, and samples of the rest.
    for address in (0..SPACE + 100).step_by(13).chain(0x3f0..0x420) {
        let found = guard
            .lookup(Gpa(address))
            .map(|s| (s.region().name().parse().unwrap(), s.offset_in_region()));
        assert_eq!(found, model.resolve(root, address), "at {address:#x}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn views_match_a_naive_walk(
        sizes in prop::collection::vec((0..6u8, 1..SPACE, 0..6usize, 0..SPACE), 5..12),
        steps in prop::collection::vec((step(12), way()), 1..60),
    ) {
        let memory = Memory::new(MemoryConfig { arena_bytes: 1 << 30 }).unwrap();
        let root = Region::container("0", SPACE.into());
        let mut model = Model { nodes: vec![], clock: 0 };
        model.nodes.push(Node { region: root, size: SPACE, kind: Kind::Container, enabled: true, place: None });
        for (kind, size, target, base) in sizes {
            let name = model.nodes.len().to_string();
            let pages = size.next_multiple_of(4096);
            let block = || {
                let spec = RamSpec {
                    name: name.clone(),
                    size_bytes: pages,
                    max_size_bytes: pages,
                    backing: Backing::Anon { thp: false },
                    prefault: false,
                    block_size_bytes: None,
                };
                memory.ram().add(spec).unwrap()
            };
            let (region, size, kind) = match kind {
                0 => (Region::container(name, size.into()).growing_to(SPACE), size, Kind::Container),
                1 => (Region::mmio(name, size, Arc::new(Nothing)), size, Kind::Leaf),
                2 => (Region::ram(&name, &block()), pages, Kind::Ram),
                3 => {
                    let registers = Registers::new(Arc::new(Nothing));
                    (Region::rom_device(&name, &block(), registers), pages, Kind::RomDevice)
                }
                _ => {
                    let target = target.min(model.nodes.len() - 1);
                    let region = Region::alias(name, &model.nodes[target].region, base, size);
                    (region.growing_to(SPACE), size, Kind::Alias(target, base))
                }
            };
            model.nodes.push(Node { region, size, kind, enabled: true, place: None });
        }
        let space = memory.address_space("memory", &model.nodes[0].region).unwrap();
        let second = memory.address_space("second", &model.nodes[1].region).unwrap();
        let mirrored = Arc::new(Mutex::new(BTreeMap::new()));
        space.add_listener(Box::new(Mirror(Arc::clone(&mirrored))), 0).unwrap();
        let reader = memory.register();
        let count = model.nodes.len();
        for (step, way) in steps.into_iter().filter(|(step, _)| step.fits(count)) {
            apply(&memory, &mut model, &step, way);
            prop_assert_eq!(model.overlap(), None);
            compare(&model, 0, &space, &reader);
            compare(&model, 1, &second, &reader);
        }
        // What the listener was told adds up to the view, in as few sections as possible.
        let map = mirrored.lock().unwrap().clone();
        let mut last: Option<(u64, usize, u64)> = None;
        for (start, (end, node, offset)) in &map {
            for address in [*start, *end - 1] {
                let told = Some((*node, *offset + (address - start)));
                prop_assert_eq!(told, model.resolve(0, address));
            }
            if let Some((at, before, next)) = last {
                prop_assert!(!(at == *start && before == *node && next == *offset), "two sections for one at {:#x}", start);
            }
            last = Some((*end, *node, offset + (end - start)));
        }
        let covered: u64 = map.iter().map(|(start, (end, ..))| end - start).sum();
        let wanted = (0..SPACE).filter(|address| model.resolve(0, *address).is_some()).count() as u64;
        prop_assert_eq!(covered, wanted);
    }
}
