// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The split virtqueue against the `virtio-queue` crate: the same operations on the same bytes have the same results.
//!
//! Each case is a random sequence of what a well-behaved driver and a device do to one queue. Two copies of guest memory
//! get the same writes from the driver; our queue works on one, the oracle on the other. After each operation the chains
//! taken, the decisions about notifications and every byte of both memories must agree.
#![cfg(not(loom))]

use std::collections::VecDeque;
use std::num::Wrapping;
use std::sync::Arc;

use ebbtide_memory::{AddressSpace, Backing, Gpa, Memory, MemoryConfig, RamSpec, Reader, Region};
use ebbtide_virtio::features;
use ebbtide_virtio::virtq::{Chain, Descriptor, Queue, QueueConfig, QueueState};
use proptest::prelude::*;
use virtio_queue::{Queue as Oracle, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::IntoBytes;

const RAM_BYTES: usize = 0x10000;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x3000;
const USED: u64 = 0x4000;
/// Indirect tables, one area for each head.
const TABLES: u64 = 0x8000;
const TABLE_BYTES: u64 = 16 * 32;
const MAX_SIZE: u16 = 32;

#[derive(Clone, Debug)]
enum Shape {
    Direct,
    Indirect,
    /// So many direct descriptors, the rest in an indirect table.
    Mixed(u8),
}

#[derive(Clone, Debug)]
enum Step {
    /// The driver makes a chain available: readable and writable lengths.
    Post {
        readable: Vec<u16>,
        writable: Vec<u16>,
        shape: Shape,
    },
    /// The device takes a chain.
    Pop,
    /// The device gives back one of those it has.
    Use {
        which: usize,
        written: u32,
    },
    /// The device asks whether to interrupt.
    Ask,
    /// The driver sets its event index relative to the device's used index.
    Event(i8),
    EnableKick,
    DisableKick,
    SaveAndRestore,
}

fn step() -> impl Strategy<Value = Step> {
    let shape = prop_oneof![
        Just(Shape::Direct),
        Just(Shape::Indirect),
        (1u8..3).prop_map(Shape::Mixed)
    ];
    let lengths = || proptest::collection::vec(prop_oneof![Just(0u16), any::<u16>()], 0..5);
    prop_oneof![
        4 => (lengths(), lengths(), shape)
            .prop_map(|(readable, writable, shape)| Step::Post { readable, writable, shape }),
        4 => Just(Step::Pop),
        4 => (any::<usize>(), any::<u32>()).prop_map(|(which, written)| Step::Use { which, written }),
        2 => Just(Step::Ask),
        2 => any::<i8>().prop_map(Step::Event),
        1 => Just(Step::EnableKick),
        1 => Just(Step::DisableKick),
        1 => Just(Step::SaveAndRestore),
    ]
}

/// The two sides and the driver's books.
struct World {
    space: Arc<AddressSpace>,
    reader: Reader,
    theirs: GuestMemoryMmap<()>,
    queue: Queue,
    oracle: Oracle,
    config: QueueConfig,
    event_idx: bool,
    free: VecDeque<u16>,
    /// Descriptors of a chain, by its head.
    chains: Vec<Vec<u16>>,
    avail_idx: Wrapping<u16>,
    in_flight: Vec<u16>,
    added: u32,
}

impl World {
    fn new(size: u16, event_idx: bool, start: u16) -> World {
        let memory = Memory::new(MemoryConfig {
            arena_bytes: 1 << 30,
        })
        .unwrap();
        let spec = RamSpec {
            name: "ram".into(),
            size_bytes: RAM_BYTES as u64,
            max_size_bytes: RAM_BYTES as u64,
            backing: Backing::Anon { thp: false },
            prefault: false,
            block_size_bytes: None,
        };
        let ram = memory.ram().add(spec).unwrap();
        let root = Region::container("root", 1 << 32);
        memory
            .update(|map| map.add(&root, &Region::ram("ram", &ram), 0, 0))
            .unwrap();
        let space = memory.address_space("memory", &root).unwrap();
        let reader = memory.register();
        let theirs = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).unwrap();

        let config = QueueConfig {
            size,
            desc: Gpa(DESC),
            avail: Gpa(AVAIL),
            used: Gpa(USED),
        };
        let state = QueueState {
            config,
            indirect: true,
            event_idx,
            next_avail: start,
            next_used: start,
            unsignalled: 0,
        };
        let queue = Queue::restore(&space, &state).unwrap();
        let mut oracle = Oracle::new(MAX_SIZE).unwrap();
        oracle.set_size(size);
        oracle
            .try_set_desc_table_address(GuestAddress(DESC))
            .unwrap();
        oracle
            .try_set_avail_ring_address(GuestAddress(AVAIL))
            .unwrap();
        oracle
            .try_set_used_ring_address(GuestAddress(USED))
            .unwrap();
        oracle.set_event_idx(event_idx);
        oracle.set_next_avail(start);
        oracle.set_next_used(start);
        oracle.set_ready(true);
        let mut world = World {
            space,
            reader,
            theirs,
            queue,
            oracle,
            config,
            event_idx,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            avail_idx: Wrapping(start),
            in_flight: Vec::new(),
            added: 0,
        };
        world.write(AVAIL + 2, &start.to_le_bytes());
        world.write(USED + 2, &start.to_le_bytes());
        world
    }

    /// The driver writes to guest memory.
    fn write(&mut self, at: u64, bytes: &[u8]) {
        self.space
            .read(&self.reader)
            .write_bytes(Gpa(at), bytes)
            .unwrap();
        self.theirs.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    fn post(&mut self, readable: &[u16], writable: &[u16], shape: &Shape) {
        let sides = readable
            .iter()
            .map(|len| (*len, 0))
            .chain(writable.iter().map(|len| (*len, Descriptor::WRITE)));
        let parts: Vec<(u16, u16)> = sides.take(usize::from(self.config.size)).collect();
        let direct = match shape {
            Shape::Direct => parts.len(),
            Shape::Indirect => 0,
            Shape::Mixed(direct) => usize::from(*direct).min(parts.len()),
        };
        let (direct, table) = parts.split_at(direct);
        let needed = direct.len() + usize::from(!table.is_empty());
        if needed == 0 || needed > self.free.len() {
            return;
        }
        let indices: Vec<u16> = self.free.drain(..needed).collect();
        for (at, index) in indices.iter().enumerate() {
            let next = indices.get(at + 1);
            let flags = if next.is_some() { Descriptor::NEXT } else { 0 };
            let next = next.copied().unwrap_or(0xdead);
            let descriptor = match direct.get(at) {
                Some((len, write)) => {
                    Descriptor::new(buffer(at), (*len).into(), flags | write, next)
                }
                None => {
                    let bytes = 16 * u32::try_from(table.len()).unwrap();
                    Descriptor::new(table_at(indices[0]), bytes, Descriptor::INDIRECT, next)
                }
            };
            self.write(DESC + 16 * u64::from(*index), descriptor.as_bytes());
        }
        self.write_table(indices[0], table);
        let slot = u64::from(self.avail_idx.0 % self.config.size);
        self.write(AVAIL + 4 + 2 * slot, &indices[0].to_le_bytes());
        self.avail_idx += 1;
        self.write(AVAIL + 2, &self.avail_idx.0.to_le_bytes());
        let head = usize::from(indices[0]);
        self.chains[head] = indices;
    }

    fn write_table(&mut self, head: u16, parts: &[(u16, u16)]) {
        for (at, (len, write)) in parts.iter().enumerate() {
            let last = at + 1 == parts.len();
            let flags = write | if last { 0 } else { Descriptor::NEXT };
            let next = if last {
                0xdead
            } else {
                u16::try_from(at).unwrap() + 1
            };
            let descriptor = Descriptor::new(buffer(at), (*len).into(), flags, next);
            self.write(
                table_at(head) + 16 * u64::try_from(at).unwrap(),
                descriptor.as_bytes(),
            );
        }
    }

    fn pop(&mut self) {
        let ours = self.queue.pop(&self.space.read(&self.reader)).unwrap();
        let theirs = self.oracle.pop_descriptor_chain(&self.theirs);
        match (ours, theirs) {
            (None, None) => {}
            (Some(chain), Some(oracle)) => {
                assert_eq!(chain.head, oracle.head_index());
                let expected: Vec<_> = oracle
                    .filter(|d| d.len() > 0)
                    .map(|d| (Gpa(d.addr().0), d.len(), d.is_write_only()))
                    .collect();
                assert_eq!(flattened(&chain), expected);
                self.in_flight.push(chain.head);
            }
            (ours, theirs) => panic!(
                "ours {ours:?}, theirs {:?}",
                theirs.map(|chain| chain.head_index())
            ),
        }
    }

    fn give_back(&mut self, which: usize, written: u32) {
        if self.in_flight.is_empty() {
            return;
        }
        let head = self.in_flight.swap_remove(which % self.in_flight.len());
        self.queue
            .push_used(&self.space.read(&self.reader), head, written)
            .unwrap();
        self.oracle.add_used(&self.theirs, head, written).unwrap();
        self.added += 1;
        let indices = std::mem::take(&mut self.chains[usize::from(head)]);
        self.free.extend(indices);
    }

    fn ask(&mut self) {
        let ours = self
            .queue
            .needs_interrupt(&self.space.read(&self.reader))
            .unwrap();
        let theirs = self.oracle.needs_notification(&self.theirs).unwrap();
        // Without event indices the oracle also says yes when nothing was used.
        assert_eq!(ours, theirs && self.added > 0);
        self.added = 0;
    }

    fn run(&mut self, step: &Step) {
        match step {
            Step::Post {
                readable,
                writable,
                shape,
            } => self.post(readable, writable, shape),
            Step::Pop => self.pop(),
            Step::Use { which, written } => self.give_back(*which, *written),
            Step::Ask => self.ask(),
            Step::Event(delta) => {
                let event = self.oracle.next_used().wrapping_add_signed((*delta).into());
                self.write(
                    AVAIL + 4 + 2 * u64::from(self.config.size),
                    &event.to_le_bytes(),
                );
            }
            Step::EnableKick => {
                let ours = self
                    .queue
                    .enable_kick(&self.space.read(&self.reader))
                    .unwrap();
                assert_eq!(ours, self.oracle.enable_notification(&self.theirs).unwrap());
            }
            Step::DisableKick => {
                self.queue
                    .disable_kick(&self.space.read(&self.reader))
                    .unwrap();
                self.oracle.disable_notification(&self.theirs).unwrap();
            }
            Step::SaveAndRestore => {
                let state = self.queue.save();
                assert_eq!(state.event_idx, self.event_idx);
                self.queue = Queue::restore(&self.space, &state).unwrap();
                assert_eq!(self.queue.save(), state);
            }
        }
    }

    fn assert_same_bytes(&self) {
        let (mut ours, mut theirs) = (vec![0; RAM_BYTES], vec![0; RAM_BYTES]);
        self.space
            .read(&self.reader)
            .read_bytes(Gpa(0), &mut ours)
            .unwrap();
        self.theirs
            .read_slice(&mut theirs, GuestAddress(0))
            .unwrap();
        if ours != theirs {
            let differs = ours.iter().zip(&theirs).position(|(a, b)| a != b);
            panic!("memories differ at {differs:#x?}");
        }
    }
}

/// Somewhere; buffers are compared, not accessed.
fn buffer(at: usize) -> u64 {
    0x1_0000_0000 + 0x1_0000 * u64::try_from(at).unwrap()
}

fn table_at(head: u16) -> u64 {
    TABLES + TABLE_BYTES * u64::from(head)
}

fn flattened(chain: &Chain) -> Vec<(Gpa, u32, bool)> {
    let readable = chain.readable.iter().map(|&(gpa, len)| (gpa, len, false));
    readable
        .chain(chain.writable.iter().map(|&(gpa, len)| (gpa, len, true)))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_virtio_queue(
        order in 0u32..6,
        event_idx: bool,
        start in prop_oneof![Just(0u16), Just(65530), any::<u16>()],
        steps in proptest::collection::vec(step(), 1..120),
    ) {
        let mut world = World::new(1 << order, event_idx, start);
        for step in &steps {
            world.run(step);
            world.assert_same_bytes();
        }
    }
}

/// The features word and the saved state say the same about a queue.
#[test]
fn features_select_what_the_queue_does() {
    let world = World::new(8, true, 0);
    let all = features::RING_INDIRECT_DESC | features::RING_EVENT_IDX;
    for wanted in [
        0,
        features::RING_INDIRECT_DESC,
        features::RING_EVENT_IDX,
        all,
    ] {
        let state = Queue::new(&world.space, world.config, wanted | features::VERSION_1)
            .unwrap()
            .save();
        assert_eq!(state.indirect, wanted & features::RING_INDIRECT_DESC != 0);
        assert_eq!(state.event_idx, wanted & features::RING_EVENT_IDX != 0);
    }
    assert!(Queue::new(&world.space, world.config, features::RING_PACKED).is_err());
}
