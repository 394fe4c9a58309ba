// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Random plugs, unplugs, vetoes, subscriptions and their ends, against a model made of sets.
#![cfg(not(loom))]

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use ebbtide_memory::{
    Backing, DiscardListener, DiscardSubscription, Error, ListenerError, Memory, MemoryConfig,
    RamBlock, RamSpec, Seal,
};
use proptest::prelude::*;

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 70;

type Blocks = BTreeSet<u64>;

/// What one listener has, by what it was told.
#[derive(Default)]
struct Mapped {
    blocks: Blocks,
    /// It refuses ranges with one of these.
    refuses: Blocks,
}

struct Mapper(Arc<Mutex<Mapped>>);

fn set(range: &Range<u64>) -> Blocks {
    (range.start / BLOCK..range.end / BLOCK).collect()
}

impl DiscardListener for Mapper {
    fn name(&self) -> &str {
        "mapper"
    }

    fn populate(&mut self, range: Range<u64>) -> Result<(), ListenerError> {
        let mut mapped = self.0.lock().unwrap();
        let range = set(&range);
        assert!(
            !range.is_empty() && mapped.blocks.is_disjoint(&range),
            "told twice"
        );
        if !mapped.refuses.is_disjoint(&range) {
            return Err(ListenerError {
                what: "mapper".into(),
                reason: "no".into(),
            });
        }
        mapped.blocks.extend(range);
        Ok(())
    }

    fn discard(&mut self, range: Range<u64>) {
        let mut mapped = self.0.lock().unwrap();
        let range = set(&range);
        assert!(
            !range.is_empty() && mapped.blocks.is_superset(&range),
            "never told"
        );
        mapped.blocks.retain(|block| !range.contains(block));
    }
}

struct Listening {
    range: Blocks,
    mapped: Arc<Mutex<Mapped>>,
    subscription: DiscardSubscription,
}

struct World {
    /// Held for its worker.
    _memory: Arc<Memory>,
    block: Arc<RamBlock>,
    plugged: Blocks,
    seals: Vec<(Blocks, Seal)>,
    listening: Vec<Listening>,
}

#[derive(Clone, Debug)]
enum Step {
    Plug(Range<u64>, bool),
    Seal(Range<u64>),
    Discard(usize),
    Undo(usize),
    Subscribe(Range<u64>, Option<u64>),
    Unsubscribe(usize),
    /// A listener refuses a block from now on, or again accepts all.
    Refuse(usize, Option<u64>),
}

fn range() -> impl Strategy<Value = Range<u64>> {
    // Also empty ones and ones past the end.
    (0..BLOCKS, 0..12u64).prop_map(|(start, count)| start..start + count)
}

/// Listeners follow large parts, so that they meet.
fn large_range() -> impl Strategy<Value = Range<u64>> {
    (0..BLOCKS / 2, 0..BLOCKS - 10).prop_map(|(start, count)| start..start + count)
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let refused = || proptest::option::of(0..BLOCKS);
    let step = prop_oneof![
        6 => (range(), any::<bool>()).prop_map(|(range, populate)| Step::Plug(range, populate)),
        4 => range().prop_map(Step::Seal),
        3 => any::<usize>().prop_map(Step::Discard),
        1 => any::<usize>().prop_map(Step::Undo),
        3 => (large_range(), refused()).prop_map(|(range, refused)| Step::Subscribe(range, refused)),
        1 => any::<usize>().prop_map(Step::Unsubscribe),
        3 => (any::<usize>(), refused()).prop_map(|(at, refused)| Step::Refuse(at, refused)),
    ];
    proptest::collection::vec(step, 1..120)
}

fn bytes(range: &Range<u64>) -> Range<u64> {
    range.start * BLOCK..range.end * BLOCK
}

fn fits(range: &Range<u64>) -> bool {
    range.start < range.end && range.end <= BLOCKS
}

impl World {
    fn new() -> World {
        let memory = Memory::new(MemoryConfig {
            arena_bytes: 64 << 20,
        })
        .unwrap();
        let spec = RamSpec {
            name: "vmem0".into(),
            size_bytes: BLOCKS * BLOCK,
            max_size_bytes: BLOCKS * BLOCK,
            backing: Backing::Anon { thp: false },
            prefault: false,
            block_size_bytes: Some(BLOCK),
        };
        let block = memory.ram().add(spec).unwrap();
        World {
            _memory: memory,
            block,
            plugged: Blocks::new(),
            seals: Vec::new(),
            listening: Vec::new(),
        }
    }

    fn sealed(&self) -> Blocks {
        self.seals
            .iter()
            .flat_map(|(blocks, _)| blocks.clone())
            .collect()
    }

    /// Whether a listener is in the way of `blocks`.
    fn refused(&self, blocks: &Blocks) -> bool {
        self.listening.iter().any(|listening| {
            let refuses = listening.mapped.lock().unwrap().refuses.clone();
            // It hears of its whole part, and refuses that for one block of it.
            let part: Blocks = listening.range.intersection(blocks).copied().collect();
            !refuses.is_disjoint(&part)
        })
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Plug(range, populate) => self.plug(range, *populate),
            Step::Seal(range) => self.seal(range),
            Step::Discard(at) if !self.seals.is_empty() => {
                let (_, seal) = self.seals.remove(at % self.seals.len());
                while !seal.is_drained() {
                    std::thread::yield_now();
                }
                seal.discard()
                    .unwrap_or_else(|(_, error)| panic!("{error}"));
            }
            Step::Undo(at) if !self.seals.is_empty() => {
                let (blocks, seal) = self.seals.remove(at % self.seals.len());
                seal.undo();
                self.plugged.extend(blocks);
            }
            Step::Subscribe(range, refused) => self.subscribe(range, *refused),
            Step::Unsubscribe(at) if !self.listening.is_empty() => {
                let listening = self.listening.remove(at % self.listening.len());
                drop(listening.subscription);
                assert_eq!(listening.mapped.lock().unwrap().blocks, Blocks::new());
            }
            Step::Refuse(at, refused) if !self.listening.is_empty() => {
                let listening = &self.listening[at % self.listening.len()];
                listening.mapped.lock().unwrap().refuses = refused.iter().copied().collect();
            }
            Step::Discard(_) | Step::Undo(_) | Step::Unsubscribe(_) | Step::Refuse(..) => {}
        }
    }

    fn plug(&mut self, range: &Range<u64>, populate: bool) {
        let blocks: Blocks = range.clone().collect();
        let result = self.block.plug(bytes(range), populate);
        if !fits(range) {
            assert!(matches!(result, Err(Error::BadRange { .. })), "{result:?}");
        } else if !self.plugged.is_disjoint(&blocks) || !self.sealed().is_disjoint(&blocks) {
            assert!(matches!(result, Err(Error::BadState { .. })), "{result:?}");
        } else if self.refused(&blocks) {
            assert!(
                matches!(result, Err(Error::PopulateVetoed { .. })),
                "{result:?}"
            );
        } else {
            result.unwrap();
            self.plugged.extend(blocks);
        }
    }

    fn seal(&mut self, range: &Range<u64>) {
        let blocks: Blocks = range.clone().collect();
        let result = self.block.seal(bytes(range));
        if !fits(range) {
            assert!(matches!(result.map(drop), Err(Error::BadRange { .. })));
        } else if !self.plugged.is_superset(&blocks) {
            assert!(matches!(result.map(drop), Err(Error::BadState { .. })));
        } else {
            self.plugged.retain(|block| !blocks.contains(block));
            self.seals.push((blocks, result.unwrap()));
        }
    }

    fn subscribe(&mut self, range: &Range<u64>, refused: Option<u64>) {
        let mapped = Arc::new(Mutex::new(Mapped {
            blocks: Blocks::new(),
            refuses: refused.into_iter().collect(),
        }));
        let mapper = Box::new(Mapper(Arc::clone(&mapped)));
        let result = self.block.subscribe(bytes(range), mapper);
        let populated: Blocks = self.plugged.union(&self.sealed()).copied().collect();
        if !fits(range) {
            assert!(matches!(result.map(drop), Err(Error::BadRange { .. })));
        } else if refused.is_some_and(|block| range.contains(&block) && populated.contains(&block))
        {
            assert!(matches!(
                result.map(drop),
                Err(Error::PopulateVetoed { .. })
            ));
            assert_eq!(mapped.lock().unwrap().blocks, Blocks::new());
        } else {
            self.listening.push(Listening {
                range: range.clone().collect(),
                mapped,
                subscription: result.unwrap(),
            });
        }
    }

    fn check(&self) {
        let populated: Blocks = self.plugged.union(&self.sealed()).copied().collect();
        for listening in &self.listening {
            let wanted: Blocks = listening.range.intersection(&populated).copied().collect();
            assert_eq!(listening.mapped.lock().unwrap().blocks, wanted);
        }
        let all = 0..BLOCKS * BLOCK;
        let runs = |runs: Vec<Range<u64>>| -> Blocks {
            assert!(
                runs.windows(2).all(|pair| pair[0].end < pair[1].start),
                "not the longest"
            );
            runs.iter().flat_map(set).collect()
        };
        assert_eq!(runs(self.block.populated(all.clone()).unwrap()), populated);
        let others: Blocks = (0..BLOCKS)
            .filter(|block| !populated.contains(block))
            .collect();
        assert_eq!(runs(self.block.discarded(all).unwrap()), others);
        assert_eq!(
            self.block.plugged_bytes(),
            self.plugged.len() as u64 * BLOCK
        );
        assert_eq!(self.block.discard_listeners().len(), self.listening.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn listeners_have_what_is_populated(steps in steps()) {
        let mut world = World::new();
        for step in &steps {
            world.step(step);
            world.check();
        }
    }
}
