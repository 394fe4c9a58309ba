// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Random trees, changed step by step, against a naive walk for each address.
#![cfg(not(loom))]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use ebbtide_memory::{
    AddressSpace, FlatSection, Gpa, Listener, ListenerError, Memory, MemoryConfig, Mmio, Reader,
    Region,
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

enum Kind {
    Container,
    Leaf,
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
        matches!(this.kind, Kind::Leaf).then_some((node, offset))
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
}

const SPACE: u64 = 1 << 14;

fn step(nodes: usize) -> impl Strategy<Value = Step> {
    let offset = prop_oneof![0..SPACE, (0..16u64).prop_map(|n| n << 10)];
    prop_oneof![
        4 => (1..nodes, 0..nodes, offset.clone(), -2..3i32)
            .prop_map(|(child, parent, offset, priority)| Step::Place { child, parent, offset, priority }),
        1 => (1..nodes).prop_map(Step::Remove),
        2 => (1..nodes, offset).prop_map(|(child, offset)| Step::Move(child, offset)),
        1 => (0..nodes).prop_map(Step::Toggle),
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

fn apply(memory: &Memory, model: &mut Model, step: Step) {
    let region = |at: usize| Arc::clone(&model.nodes[at].region);
    match step {
        Step::Place {
            child,
            parent,
            offset,
            priority,
        } => {
            let (c, p) = (region(child), region(parent));
            if memory.update(|t| t.add(&p, &c, offset, priority)).is_ok() {
                model.clock += 1;
                model.nodes[child].place = Some((parent, offset, priority, model.clock));
            }
        }
        Step::Remove(child) => {
            let c = region(child);
            if memory.update(|t| t.remove(&c)).is_ok() {
                model.nodes[child].place = None;
            }
        }
        Step::Move(child, offset) => {
            let c = region(child);
            if memory.update(|t| t.set_offset(&c, offset)).is_ok()
                && let Some(place) = &mut model.nodes[child].place
            {
                place.1 = offset;
            }
        }
        Step::Toggle(node) => {
            let enabled = !model.nodes[node].enabled;
            let r = region(node);
            memory.update(|t| t.set_enabled(&r, enabled)).unwrap();
            model.nodes[node].enabled = enabled;
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
        sizes in prop::collection::vec((0..3u8, 1..SPACE, 0..6usize, 0..SPACE), 5..12),
        steps in prop::collection::vec(step(12), 1..60),
    ) {
        let memory = Memory::new(MemoryConfig { arena_bytes: 1 << 30 }).unwrap();
        let root = Region::container("0", SPACE.into());
        let mut model = Model { nodes: vec![], clock: 0 };
        model.nodes.push(Node { region: root, size: SPACE, kind: Kind::Container, enabled: true, place: None });
        for (kind, size, target, base) in sizes {
            let name = model.nodes.len().to_string();
            let (region, kind) = match kind {
                0 => (Region::container(name, size.into()), Kind::Container),
                1 => (Region::mmio(name, size, Arc::new(Nothing)), Kind::Leaf),
                _ => {
                    let target = target.min(model.nodes.len() - 1);
                    let region = Region::alias(name, &model.nodes[target].region, base, size);
                    (region, Kind::Alias(target, base))
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
        for step in steps {
            let fits = match step {
                Step::Place { child, parent, .. } => child < count && parent < count,
                Step::Remove(at) | Step::Move(at, _) | Step::Toggle(at) => at < count,
            };
            if fits {
                apply(&memory, &mut model, step);
                compare(&model, 0, &space, &reader);
                compare(&model, 1, &second, &reader);
            }
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
