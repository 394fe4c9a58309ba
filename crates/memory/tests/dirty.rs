// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The dirty log: what marks, for whom, and what a harvest brings in.
#![cfg(not(loom))]
#![allow(
    clippy::single_range_in_vec_init,
    reason = "lists of dirty ranges, some of one"
)]

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use ebbtide_memory::DirtyClient::{Code, Display, Migration};
use ebbtide_memory::{
    Access, AddressSpace, Backing, CachedMap, DirtyClient, Error, FlatSection, Gpa, Listener,
    ListenerError, Memory, MemoryConfig, PinList, RamBlock, RamSpec, Reader, Region, SectionKind,
};
use proptest::prelude::*;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

struct World {
    memory: Arc<Memory>,
    root: Arc<Region>,
    space: Arc<AddressSpace>,
    reader: Reader,
}

impl World {
    fn new() -> World {
        let memory = Memory::new(MemoryConfig {
            arena_bytes: 64 << 30,
        })
        .unwrap();
        let root = Region::container("root", 1 << 40);
        let space = memory.address_space("memory", &root).unwrap();
        let reader = memory.register();
        World {
            memory,
            root,
            space,
            reader,
        }
    }

    fn block(&self, name: &str, used: u64, max: u64, sparse: Option<u64>) -> Arc<RamBlock> {
        let spec = RamSpec {
            name: name.to_owned(),
            size_bytes: used,
            max_size_bytes: max,
            backing: Backing::Anon { thp: false },
            prefault: false,
            block_size_bytes: sparse,
        };
        self.memory.ram().add(spec).unwrap()
    }

    fn show(&self, block: &Arc<RamBlock>, gpa: u64) -> Arc<Region> {
        let region = Region::ram(block.name(), block);
        self.memory
            .update(|t| t.add(&self.root, &region, gpa, 0))
            .unwrap();
        region
    }

    /// 1 MiB of RAM at 0.
    fn ram(&self) -> Arc<RamBlock> {
        let block = self.block("ram", MIB, MIB, None);
        self.show(&block, 0);
        block
    }

    fn start(&self, client: DirtyClient) {
        self.memory.dirty_log().start(client).unwrap();
    }

    /// As `start`, with nothing dirty.
    fn start_clean(&self, client: DirtyClient) {
        self.start(client);
        for block in self.memory.ram().blocks() {
            take(&block, client);
        }
    }

    fn write(&self, gpa: u64) {
        let guard = self.space.read(&self.reader);
        guard.write(Gpa(gpa), 1u8).unwrap();
    }
}

/// What is dirty, in pages; clean from then on.
fn take(block: &RamBlock, client: DirtyClient) -> Vec<Range<u64>> {
    let snapshot = block.snapshot_and_clear(client, 0..u64::MAX).unwrap();
    let ranges = snapshot.ranges().map(|r| r.start / PAGE..r.end / PAGE);
    ranges.collect()
}

#[test]
fn every_way_to_write_marks_what_it_wrote() {
    let world = World::new();
    let block = world.ram();
    world.start_clean(Migration);
    let dirty = || take(&block, Migration);
    assert_eq!(dirty(), []);
    {
        let guard = world.space.read(&world.reader);
        guard.write(Gpa(5 * PAGE), 7u32).unwrap();
        guard.write_bytes(Gpa(9 * PAGE - 1), &[1, 2]).unwrap();
        let mut bytes = [0; 64];
        guard.read_bytes(Gpa(20 * PAGE), &mut bytes).unwrap();
        guard.read::<u64>(Gpa(21 * PAGE)).unwrap();
    }
    assert_eq!(dirty(), [5..6, 8..10]);

    world.space.store(&world.reader, 11 * PAGE + 4094, 4, 0);
    world.space.load(&world.reader, 30 * PAGE, 8);
    assert_eq!(dirty(), [11..13]);

    let ring = CachedMap::new(
        &world.space,
        Gpa(40 * PAGE),
        8 * PAGE as usize,
        Access::Write,
    );
    {
        let guard = world.space.read(&world.reader);
        let slice = ring.get(&guard).unwrap();
        assert!(
            !block.is_dirty(Migration, 0..MIB).unwrap(),
            "only looked at"
        );
        slice.store_u16(2, 1, Ordering::Relaxed).unwrap();
        let page = PAGE as usize;
        slice.write(2 * page - 1, 5u16).unwrap();
        let part = slice.subslice(5 * page, page).unwrap();
        part.copy_from(0, &[1; 8]).unwrap();
        part.copy_to(0, &mut [0; 8]).unwrap();
        part.store_u64(8, 1, Ordering::Relaxed).unwrap();
        slice.load_u8(6 * page, Ordering::Relaxed).unwrap();
        assert!(slice.write(8 * page - 1, 5u16).is_err());
    }
    assert_eq!(dirty(), [40..43, 45..46]);
}

#[test]
fn pins_mark_before_they_let_go() {
    let world = World::new();
    let block = world.ram();
    world.start_clean(Migration);
    let dirty = || take(&block, Migration);
    let pin = |gpa, access| {
        let guard = world.space.read(&world.reader);
        guard.pin(Gpa(gpa), 2 * PAGE as usize, access).unwrap()
    };
    drop(pin(0, Access::Read));
    let written = pin(4 * PAGE + 1, Access::Write);
    written.write_at(0, &[1]).unwrap();
    written.mark_dirty(PAGE as usize, 1).unwrap();
    assert!(
        written
            .mark_dirty(PAGE as usize, PAGE as usize + 1)
            .is_err()
    );
    assert_eq!(dirty(), [5..6]);
    let clone = written.clone();
    std::thread::spawn(move || drop(written)).join().unwrap();
    assert_eq!(dirty(), [4..7]);
    drop(clone);
    assert_eq!(dirty(), [4..7]);

    let mut list = PinList::new();
    {
        let guard = world.space.read(&world.reader);
        let page = PAGE as u32;
        guard
            .pin_list(&[(Gpa(10 * PAGE), page)], Access::Read, &mut list)
            .unwrap();
        guard
            .pin_list(
                &[(Gpa(20 * PAGE), 1), (Gpa(30 * PAGE), page)],
                Access::Write,
                &mut list,
            )
            .unwrap();
        guard
            .pin_list(
                &[(Gpa(50 * PAGE), 1), (Gpa(MIB - 1), 2)],
                Access::Write,
                &mut list,
            )
            .unwrap_err();
    }
    dirty();
    list.clear();
    assert_eq!(dirty(), [20..21, 30..31]);
    let guard = world.space.read(&world.reader);
    guard
        .pin_list(&[(Gpa(60 * PAGE), 1)], Access::ReadWrite, &mut list)
        .unwrap();
    drop(guard);
    drop(list);
    assert_eq!(dirty(), [60..61]);
}

#[test]
fn clients_come_and_go_one_by_one() {
    let world = World::new();
    let block = world.ram();
    let log = world.memory.dirty_log();
    let off = |client| match block.dirty(client, 0..MIB) {
        Err(Error::NotLogged { block, client: c }) => assert_eq!((&*block, c), ("ram", client)),
        other => panic!("{other:?}"),
    };
    DirtyClient::ALL.into_iter().for_each(off);
    assert!(!block.is_logged());

    world.start(Migration);
    assert_eq!(take(&block, Migration), [0..256], "all is new");
    world.write(0);
    log.start_block(Display, &block).unwrap();
    take(&block, Display);
    world.write(PAGE);
    assert_eq!(take(&block, Display), [1..2]);
    assert_eq!(take(&block, Migration), [0..2]);
    off(Code);

    // The one for all blocks and the one for this block are two things.
    log.stop(Display).unwrap();
    world.write(2 * PAGE);
    log.stop(Migration).unwrap();
    off(Migration);
    assert_eq!(take(&block, Display), [2..3]);
    log.stop_block(Display, &block).unwrap();
    off(Display);
    assert!(!block.is_logged());
    world.write(3 * PAGE);

    world.start_clean(Migration);
    world.write(4 * PAGE);
    assert_eq!(take(&block, Migration), [4..5], "nothing is left of before");
}

#[test]
fn blocks_come_grow_and_go_while_a_client_is_on() {
    let world = World::new();
    world.start(Migration);
    let block = world.block("dimm", MIB, 2 * MIB, None);
    assert_eq!(take(&block, Migration), [0..256]);
    let region = world.show(&block, 0);
    world.write(7);
    assert_eq!(take(&block, Migration), [0..1]);
    world.memory.ram().grow(&block, MIB + 2 * PAGE).unwrap();
    assert_eq!(take(&block, Migration), [256..258]);

    let pin = world
        .space
        .read(&world.reader)
        .pin(Gpa(5 * PAGE), 1, Access::Write)
        .unwrap();
    let ticket = world.memory.update(|t| t.unplug(&region)).unwrap();
    let log = world.memory.dirty_log();
    let refused = log.start_block(Code, &block).unwrap_err();
    assert!(matches!(refused, Error::Unplugged(_)), "{refused}");
    assert_eq!(take(&block, Migration), []);
    drop(pin);
    assert_eq!(take(&block, Migration), [5..6], "gone, but marked");
    drop(region);
    while ticket.phase() != ebbtide_memory::Phase::Drained {
        world.memory.synchronize();
    }
    ticket.destroy().map_err(|(_, error)| error).unwrap();
    assert!(block.dirty(Migration, 0..MIB).is_err() && !block.is_logged());
    block.mark_dirty(0..MIB);

    // The next block has the slot of the one that is gone, and nothing else of it.
    let next = world.block("next", MIB, MIB, None);
    world.show(&next, 0);
    take(&next, Migration);
    world.write(PAGE);
    block.mark_dirty(0..MIB);
    assert!(block.dirty(Migration, 0..MIB).is_err());
    assert_eq!(take(&next, Migration), [1..2]);
}

#[test]
fn plugged_blocks_are_new_and_unplugged_ones_are_not() {
    let world = World::new();
    let block = world.block("vmem", 16 * MIB, 16 * MIB, Some(2 * MIB));
    world.show(&block, 0);
    block.plug(2 * MIB..4 * MIB, false).unwrap();
    world.start(Migration);
    assert_eq!(take(&block, Migration), [512..1024]);
    block.plug(8 * MIB..10 * MIB, false).unwrap();
    assert_eq!(take(&block, Migration), [2048..2560]);
    let seal = block.seal(8 * MIB..10 * MIB).unwrap();
    world.memory.dirty_log().start(Display).unwrap();
    assert_eq!(take(&block, Display), [512..1024]);
    seal.undo();
    assert_eq!(take(&block, Display), [2048..2560]);
}

#[test]
fn external_bitmaps_are_merged_at_any_page() {
    let world = World::new();
    let block = world.ram();
    block.merge_dirty(0, &[u64::MAX]);
    world.start_clean(Migration);
    world.start_clean(Display);
    block.merge_dirty(3 * PAGE, &[1 << 63 | 1, 0, 0b11]);
    let expected = [3..4, 66..67, 131..133];
    assert_eq!(take(&block, Migration), expected);
    assert_eq!(take(&block, Display), expected);
    block.merge_dirty(250 * PAGE, &[u64::MAX, u64::MAX]);
    block.merge_dirty(MIB, &[u64::MAX]);
    block.merge_dirty(!(PAGE - 1), &[u64::MAX]);
    assert_eq!(take(&block, Migration), [250..256], "the block ends there");
}

#[test]
fn ranges_are_asked_and_taken_alone() {
    let world = World::new();
    let block = world.ram();
    world.start_clean(Migration);
    block.mark_dirty(10 * PAGE..200 * PAGE);
    let ask = |range: Range<u64>| block.is_dirty(Migration, range).unwrap();
    assert!(!ask(0..10 * PAGE) && ask(0..10 * PAGE + 1) && ask(199 * PAGE..MIB));
    assert!(!ask(200 * PAGE..u64::MAX) && !ask(50 * PAGE..50 * PAGE) && !ask(MIB..2 * MIB));
    let part = block
        .snapshot_and_clear(Migration, 63 * PAGE + 5..130 * PAGE)
        .unwrap();
    assert_eq!(part.pages(), 67);
    assert!(part.contains(63 * PAGE) && !part.contains(130 * PAGE));
    let kept = block.dirty(Migration, 0..MIB).unwrap();
    assert_eq!(take(&block, Migration), [10..63, 130..200]);
    assert_eq!(kept.pages(), 53 + 70);
}

/// What a tracker was told, and what it would tell.
#[derive(Default)]
struct Told {
    calls: Vec<String>,
    refuses: bool,
}

struct Tracker(Arc<Mutex<Told>>);

impl Tracker {
    fn note(&self, what: &str, section: &FlatSection) {
        let start = section.range.start;
        self.0
            .lock()
            .unwrap()
            .calls
            .push(format!("{what} {start:#x}"));
    }
}

impl Listener for Tracker {
    fn region_add(&mut self, section: &FlatSection) -> Result<(), ListenerError> {
        if let SectionKind::Ram { block, .. } = &section.kind {
            let logged = if block.is_logged() {
                "add logged"
            } else {
                "add"
            };
            self.note(logged, section);
        }
        Ok(())
    }
    fn region_del(&mut self, _section: &FlatSection) {}
    fn log_start(&mut self, section: &FlatSection) -> Result<(), ListenerError> {
        if self.0.lock().unwrap().refuses && section.range.start != 0 {
            return Err(ListenerError {
                what: "tracker".to_owned(),
                reason: "no more".to_owned(),
            });
        }
        self.note("start", section);
        Ok(())
    }
    fn log_stop(&mut self, section: &FlatSection) {
        self.note("stop", section);
    }
    fn log_sync_begin(&mut self) {
        self.0.lock().unwrap().calls.push("begin".to_owned());
    }
    fn log_sync(&mut self, section: &FlatSection) {
        self.note("sync", section);
        if let SectionKind::Ram {
            block,
            block_offset,
            ..
        } = &section.kind
        {
            block.merge_dirty(*block_offset, &[0b100]);
        }
    }
}

#[test]
fn trackers_follow_from_the_first_client_to_the_last() {
    let world = World::new();
    let ram = world.ram();
    let told = Arc::new(Mutex::new(Told::default()));
    let calls = |told: &Mutex<Told>| std::mem::take(&mut told.lock().unwrap().calls);
    world
        .space
        .add_listener(Box::new(Tracker(Arc::clone(&told))), 0)
        .unwrap();
    let high = world.block("high", MIB, MIB, None);
    world.show(&high, 16 * MIB);
    let log = world.memory.dirty_log();
    assert_eq!(calls(&told), ["add 0x0", "add 0x1000000"]);

    log.sync().unwrap();
    assert_eq!(calls(&told), ["begin"], "nothing is logged");
    log.start_block(Display, &high).unwrap();
    log.sync().unwrap();
    log.start(Migration).unwrap();
    assert_eq!(
        calls(&told),
        ["start 0x1000000", "begin", "sync 0x1000000", "start 0x0"]
    );
    let late = world.block("late", MIB, MIB, None);
    world.show(&late, 32 * MIB);
    take(&late, Migration);
    take(&ram, Migration);
    log.sync_block(&late).unwrap();
    assert_eq!(take(&late, Migration), [2..3]);
    assert_eq!(take(&ram, Migration), []);
    log.stop(Migration).unwrap();
    let expected = [
        "add logged 0x2000000",
        "begin",
        "sync 0x2000000",
        "stop 0x0",
        "stop 0x2000000",
    ];
    assert_eq!(calls(&told), expected);
    log.stop_block(Display, &high).unwrap();
    assert_eq!(calls(&told), ["stop 0x1000000"]);

    told.lock().unwrap().refuses = true;
    let refused = log.start(Migration).unwrap_err().to_string();
    assert!(refused.contains("tracker: no more"), "{refused}");
    assert_eq!(calls(&told), ["start 0x0", "stop 0x0"]);
    assert!(!ram.is_logged() && ram.dirty(Migration, 0..MIB).is_err());
}

#[test]
fn the_log_of_another_memory_is_refused() {
    let (world, other) = (World::new(), World::new());
    let block = other.ram();
    let log = world.memory.dirty_log();
    for refused in [
        log.start_block(Display, &block),
        log.stop_block(Display, &block),
        log.sync_block(&block),
    ] {
        assert!(matches!(refused, Err(Error::Foreign(_))), "{refused:?}");
    }
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64, u64),
    Pin(u64, u64),
    Mark(Range<u64>),
    Merge(u64, Vec<u64>),
    Look(DirtyClient, Range<u64>),
    Take(DirtyClient, Range<u64>),
    Start(DirtyClient),
    Stop(DirtyClient),
}

/// Pages of the block of the property test: not a number of words.
const PAGES: u64 = 333;

fn op() -> impl Strategy<Value = Op> {
    let bytes = PAGES * PAGE;
    let client = || prop::sample::select(&DirtyClient::ALL[..]);
    let range = move || (0..bytes + 9, 0..bytes + 9).prop_map(|(a, b)| a.min(b)..a.max(b));
    let place =
        move || (0..bytes, 1..3 * PAGE).prop_map(move |(at, len)| (at, len.min(bytes - at)));
    prop_oneof![
        4 => place().prop_map(|(at, len)| Op::Write(at, len)),
        2 => place().prop_map(|(at, len)| Op::Pin(at, len)),
        1 => range().prop_map(Op::Mark),
        1 => (0..PAGES + 9, prop::collection::vec(any::<u64>(), 0..7))
            .prop_map(|(page, words)| Op::Merge(page * PAGE, words)),
        2 => (client(), range()).prop_map(|(client, range)| Op::Look(client, range)),
        3 => (client(), range()).prop_map(|(client, range)| Op::Take(client, range)),
        1 => client().prop_map(Op::Start),
        1 => client().prop_map(Op::Stop),
    ]
}

/// The pages that a range touches, inside the block.
fn touched(range: &Range<u64>) -> Range<u64> {
    if range.is_empty() {
        return 0..0;
    }
    range.start / PAGE..range.end.div_ceil(PAGE).min(PAGES)
}

/// Each client's dirty pages, if it is on.
type Oracle = [Option<BTreeSet<u64>>; 3];

fn mark(oracle: &mut Oracle, pages: impl Iterator<Item = u64> + Clone) {
    for set in oracle.iter_mut().flatten() {
        set.extend(pages.clone().filter(|page| *page < PAGES));
    }
}

fn step(world: &World, block: &Arc<RamBlock>, oracle: &mut Oracle, op: &Op) {
    match op {
        Op::Write(at, len) => {
            let guard = world.space.read(&world.reader);
            guard
                .write_bytes(Gpa(*at), &vec![1; *len as usize])
                .unwrap();
            mark(oracle, touched(&(*at..at + len)));
        }
        Op::Pin(at, len) => {
            let guard = world.space.read(&world.reader);
            drop(guard.pin(Gpa(*at), *len as usize, Access::Write).unwrap());
            mark(oracle, touched(&(*at..at + len)));
        }
        Op::Mark(range) => {
            block.mark_dirty(range.clone());
            mark(oracle, touched(range));
        }
        Op::Merge(offset, words) => {
            block.merge_dirty(*offset, words);
            let bit = |n: &u64| words[(n / 64) as usize] >> (n % 64) & 1 == 1;
            let bits = (0..words.len() as u64 * 64).filter(bit);
            mark(oracle, bits.map(|n| offset / PAGE + n));
        }
        Op::Look(client, range) | Op::Take(client, range) => {
            let takes = matches!(op, Op::Take(..));
            let found = if takes {
                block.snapshot_and_clear(*client, range.clone())
            } else {
                block.dirty(*client, range.clone())
            };
            let Some(set) = &mut oracle[*client as usize] else {
                assert!(found.is_err());
                return;
            };
            let found: BTreeSet<u64> = found
                .unwrap()
                .ranges()
                .flat_map(|r| r.start / PAGE..r.end / PAGE)
                .collect();
            let pages = touched(range);
            let (inside, outside): (BTreeSet<u64>, BTreeSet<u64>) =
                set.iter().partition(|page| pages.contains(page));
            assert_eq!(found, inside);
            if takes {
                *set = outside;
            }
        }
        Op::Start(client) => {
            world.memory.dirty_log().start(*client).unwrap();
            oracle[*client as usize] = Some((0..PAGES).collect());
        }
        Op::Stop(client) => {
            world.memory.dirty_log().stop(*client).unwrap();
            oracle[*client as usize] = None;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn the_log_is_a_set_of_pages_for_each_client(ops in prop::collection::vec(op(), 1..60)) {
        let world = World::new();
        let block = world.block("ram", PAGES * PAGE, PAGES * PAGE, None);
        world.show(&block, 0);
        let mut oracle = Oracle::default();
        for op in &ops {
            step(&world, &block, &mut oracle, op);
        }
    }
}
