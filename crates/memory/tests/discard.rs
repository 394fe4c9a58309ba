// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Listeners to the discards of a sparse block: what they are told, in which order, and what a
//! veto leaves behind.
#![cfg(not(loom))]

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ebbtide_memory::{
    AddressSpace, Backing, DiscardListener, DiscardSubscription, Error, ListenerError, Memory,
    MemoryConfig, Plugged, RamBlock, RamSpec, Region, Seal,
};

const BLOCK: u64 = 64 << 10;
const BLOCKS: u64 = 16;

struct World {
    memory: Arc<Memory>,
    space: Arc<AddressSpace>,
    block: Arc<RamBlock>,
}

impl World {
    fn new(backing: Backing) -> World {
        let memory = Memory::new(MemoryConfig {
            arena_bytes: 1 << 30,
        })
        .unwrap();
        let spec = RamSpec {
            name: "vmem0".into(),
            size_bytes: BLOCKS * BLOCK,
            max_size_bytes: BLOCKS * BLOCK,
            backing,
            prefault: false,
            block_size_bytes: Some(BLOCK),
        };
        let block = memory.ram().add(spec).unwrap();
        let root = Region::container("root", 1 << 40);
        let space = memory.address_space("memory", &root).unwrap();
        memory
            .update(|t| t.add(&root, &Region::ram("vmem0", &block), 0, 0))
            .unwrap();
        World {
            memory,
            space,
            block,
        }
    }

    fn subscribe(
        &self,
        range: Range<u64>,
        log: &Log,
        name: &str,
    ) -> Result<DiscardSubscription, Error> {
        self.block.subscribe(range, log.listener(name))
    }
}

fn anon() -> World {
    World::new(Backing::Anon { thp: false })
}

fn blocks(range: Range<u64>) -> Range<u64> {
    range.start * BLOCK..range.end * BLOCK
}

fn drained(seal: Seal) -> Seal {
    let end = Instant::now() + Duration::from_secs(60);
    while !seal.is_drained() {
        assert!(Instant::now() < end, "a seal does not drain");
        std::thread::yield_now();
    }
    seal
}

fn unplug(block: &Arc<RamBlock>, range: Range<u64>) {
    let seal = drained(block.seal(range).unwrap());
    seal.discard()
        .unwrap_or_else(|(_, error)| panic!("{error}"));
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Told {
    Populate,
    Discard,
    Restore,
}

type Entry = (String, Told, Range<u64>);

/// What all listeners heard, in blocks, and who refuses what.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<LogState>>);

#[derive(Default)]
struct LogState {
    heard: Vec<Entry>,
    veto: Option<(String, u64)>,
}

impl Log {
    fn listener(&self, name: &str) -> Box<dyn DiscardListener> {
        Box::new(Listener {
            name: name.to_owned(),
            log: self.clone(),
        })
    }

    fn take(&self) -> Vec<Entry> {
        std::mem::take(&mut self.0.lock().unwrap().heard)
    }

    /// `name` refuses ranges with this block, once.
    fn veto(&self, name: &str, block: u64) {
        self.0.lock().unwrap().veto = Some((name.to_owned(), block));
    }
}

struct Listener {
    name: String,
    log: Log,
}

impl Listener {
    fn heard(&self, told: Told, range: Range<u64>) {
        assert!(range.start.is_multiple_of(BLOCK) && range.end.is_multiple_of(BLOCK));
        let range = range.start / BLOCK..range.end / BLOCK;
        let mut state = self.log.0.lock().unwrap();
        state.heard.push((self.name.clone(), told, range));
    }
}

impl DiscardListener for Listener {
    fn name(&self) -> &str {
        &self.name
    }

    fn populate(&mut self, range: Range<u64>) -> Result<(), ListenerError> {
        let mut state = self.log.0.lock().unwrap();
        if let Some((name, block)) = &state.veto
            && *name == self.name
            && range.contains(&(block * BLOCK))
        {
            state.veto = None;
            return Err(ListenerError {
                what: "container 7".into(),
                reason: "65535 mappings are in use".into(),
            });
        }
        drop(state);
        self.heard(Told::Populate, range);
        Ok(())
    }

    fn discard(&mut self, range: Range<u64>) {
        self.heard(Told::Discard, range);
    }

    fn restore(&mut self, range: Range<u64>) {
        self.heard(Told::Restore, range);
    }
}

/// What the host lets this process do at an offset of the block.
fn permissions(block: &RamBlock, offset: u64) -> String {
    let address = block.host().as_ptr() as u64 + offset;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mut lines = maps.lines().map(|line| line.split_once(' ').unwrap());
    let number = |text| u64::from_str_radix(text, 16).unwrap();
    let line = lines.find(|(range, _)| {
        let (start, end) = range.split_once('-').unwrap();
        (number(start)..number(end)).contains(&address)
    });
    line.unwrap().1[..4].to_owned()
}

fn entry(name: &str, told: Told, range: Range<u64>) -> Entry {
    (name.to_owned(), told, range)
}

#[test]
fn plugs_are_told_forwards_and_unplugs_backwards() {
    let world = anon();
    let log = Log::default();
    let _a = world.subscribe(blocks(0..16), &log, "a").unwrap();
    let _b = world.subscribe(blocks(4..8), &log, "b").unwrap();
    world.block.plug(blocks(2..6), false).unwrap();
    assert_eq!(
        log.take(),
        [
            entry("a", Told::Populate, 2..6),
            entry("b", Told::Populate, 4..6)
        ]
    );
    world.block.plug(blocks(10..12), true).unwrap();
    assert_eq!(log.take(), [entry("a", Told::Populate, 10..12)]);
    let seal = drained(world.block.seal(blocks(3..6)).unwrap());
    assert_eq!(log.take(), []);
    // Sealed is still theirs.
    assert_eq!(
        world.block.populated(blocks(0..16)).unwrap(),
        [blocks(2..6), blocks(10..12)]
    );
    seal.discard()
        .unwrap_or_else(|(_, error)| panic!("{error}"));
    assert_eq!(
        log.take(),
        [
            entry("b", Told::Discard, 4..6),
            entry("a", Told::Discard, 3..6)
        ]
    );
    assert_eq!(
        world.block.populated(blocks(0..16)).unwrap(),
        [blocks(2..3), blocks(10..12)]
    );
    assert_eq!(
        world.block.discarded(blocks(1..12)).unwrap(),
        [blocks(1..2), blocks(3..10)]
    );
}

#[test]
fn an_undone_seal_is_not_told() {
    let world = anon();
    let log = Log::default();
    let _a = world.subscribe(blocks(0..16), &log, "a").unwrap();
    world.block.plug(blocks(0..4), false).unwrap();
    log.take();
    drained(world.block.seal(blocks(0..4)).unwrap()).undo();
    assert_eq!(log.take(), []);
    assert_eq!(world.block.plugged(blocks(0..4)), Plugged::All);
}

#[test]
fn a_veto_takes_the_plug_back_and_names_who() {
    for populate in [false, true] {
        let world = anon();
        let log = Log::default();
        let _all: Vec<_> = ["a", "b", "c", "d"]
            .map(|name| world.subscribe(blocks(0..16), &log, name).unwrap())
            .into();
        world.block.plug(blocks(8..9), populate).unwrap();
        log.take();
        log.veto("c", 3);
        let error = world.block.plug(blocks(2..5), populate).unwrap_err();
        assert_eq!(
            error.to_string(),
            "RAM block vmem0: c refuses range 0x20000..0x50000: container 7: 65535 mappings are in use"
        );
        assert_eq!(
            log.take(),
            [
                entry("a", Told::Populate, 2..5),
                entry("b", Told::Populate, 2..5),
                entry("b", Told::Discard, 2..5),
                entry("a", Told::Discard, 2..5)
            ]
        );
        assert_eq!(world.block.plugged(blocks(0..8)), Plugged::None);
        assert_eq!(permissions(&world.block, 3 * BLOCK), "---p");
        assert_eq!(permissions(&world.block, 8 * BLOCK), "rw-p");
        assert_eq!(world.block.plugged_bytes(), BLOCK);
        assert_eq!(
            world.block.populated(blocks(0..16)).unwrap(),
            [blocks(8..9)]
        );
        let reader = world.memory.register();
        assert_eq!(world.space.load(&reader, 3 * BLOCK, 8), u64::MAX);
        // Nothing is in the way of the next try.
        world.block.plug(blocks(2..5), populate).unwrap();
        assert_eq!(world.space.load(&reader, 3 * BLOCK, 8), 0);
    }
}

#[test]
fn one_that_comes_late_is_told_what_there_is() {
    let world = anon();
    let log = Log::default();
    for range in [0..2, 5..9, 12..16] {
        world.block.plug(blocks(range), false).unwrap();
    }
    // A range on its way out is still told, and told again when it goes.
    let seal = drained(world.block.seal(blocks(6..7)).unwrap());
    let late = world.subscribe(blocks(1..13), &log, "late").unwrap();
    let told = |told| [1..2, 5..9, 12..13].map(|range| entry("late", told, range));
    assert_eq!(log.take(), told(Told::Populate));
    seal.discard()
        .unwrap_or_else(|(_, error)| panic!("{error}"));
    assert_eq!(log.take(), [entry("late", Told::Discard, 6..7)]);
    drop(late);
    let mut ended = [1..2, 5..6, 7..9, 12..13].map(|range| entry("late", Told::Discard, range));
    ended.reverse();
    assert_eq!(log.take(), ended);
    world.block.plug(blocks(6..7), false).unwrap();
    assert_eq!(log.take(), []);
    assert_eq!(world.block.discard_listeners(), [""; 0]);
    log.veto("choosy", 12);
    let error = world.subscribe(blocks(0..16), &log, "choosy").unwrap_err();
    assert!(
        matches!(&error, Error::PopulateVetoed { listener, start, end, .. }
            if listener == "choosy" && *start == 12 * BLOCK && *end == 16 * BLOCK),
        "{error}"
    );
    assert_eq!(
        log.take(),
        [
            entry("choosy", Told::Populate, 0..2),
            entry("choosy", Told::Populate, 5..9),
            entry("choosy", Told::Discard, 5..9),
            entry("choosy", Told::Discard, 0..2)
        ]
    );
    assert_eq!(world.block.discard_listeners(), [""; 0]);
}

/// Reads the block's memory behind the guest's back.
struct Looker(File, Arc<Mutex<Vec<u8>>>);

impl DiscardListener for Looker {
    fn name(&self) -> &str {
        "looker"
    }

    fn populate(&mut self, _: Range<u64>) -> Result<(), ListenerError> {
        Ok(())
    }

    fn discard(&mut self, range: Range<u64>) {
        let mut byte = [0];
        self.0.read_exact_at(&mut byte, range.start).unwrap();
        self.1.lock().unwrap().push(byte[0]);
    }
}

#[test]
fn the_pages_are_there_until_all_have_been_told() {
    let world = World::new(Backing::Memfd { thp: false });
    let file = File::from(world.block.fd().unwrap().try_clone_to_owned().unwrap());
    let seen = Arc::new(Mutex::new(Vec::new()));
    let looker = Looker(file.try_clone().unwrap(), Arc::clone(&seen));
    let _looker = world
        .block
        .subscribe(blocks(0..16), Box::new(looker))
        .unwrap();
    world.block.plug(blocks(0..1), false).unwrap();
    let reader = world.memory.register();
    world.space.store(&reader, 0, 1, 0x5a);
    unplug(&world.block, blocks(0..1));
    assert_eq!(*seen.lock().unwrap(), [0x5a]);
    let mut byte = [1];
    file.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [0]);
}

#[test]
fn what_the_host_does_not_take_is_restored() {
    // A file whose pages cannot be given back once it is sealed.
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: a terminated string and flags.
    let fd = unsafe { libc::memfd_create(c"sealable".as_ptr(), flags) };
    assert!(fd >= 0);
    // SAFETY: a descriptor just made.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(BLOCKS * BLOCK).unwrap();
    let world = World::new(Backing::File {
        path: format!("/proc/self/fd/{fd}").into(),
        share: true,
        readonly: false,
    });
    let log = Log::default();
    let _a = world.subscribe(blocks(0..16), &log, "a").unwrap();
    let _b = world.subscribe(blocks(0..2), &log, "b").unwrap();
    world.block.plug(blocks(0..4), false).unwrap();
    let reader = world.memory.register();
    world.space.store(&reader, BLOCK, 8, 0x1234);
    // SAFETY: integers only.
    let sealed = unsafe {
        libc::fcntl(
            file.as_raw_fd(),
            libc::F_ADD_SEALS,
            libc::F_SEAL_FUTURE_WRITE,
        )
    };
    assert_eq!(sealed, 0);
    log.take();
    let mut seal = drained(world.block.seal(blocks(1..3)).unwrap());
    for try_ in 0..2 {
        let (left, error) = seal.discard().unwrap_err();
        assert!(matches!(error, Error::Host { .. }), "{error}");
        // Told once, however often it is tried.
        let told = [
            entry("b", Told::Discard, 1..2),
            entry("a", Told::Discard, 1..3),
        ];
        assert_eq!(log.take(), if try_ == 0 { told.to_vec() } else { vec![] });
        assert_eq!(world.block.plugged(blocks(1..3)), Plugged::None);
        seal = left;
    }
    seal.undo();
    let told = [
        entry("a", Told::Restore, 1..3),
        entry("b", Told::Restore, 1..2),
    ];
    assert_eq!(log.take(), told);
    assert_eq!(world.space.load(&reader, BLOCK, 8), 0x1234);
    assert_eq!(
        world.block.populated(blocks(0..16)).unwrap(),
        [blocks(0..4)]
    );
}

#[test]
fn ranges_and_kinds_are_checked() {
    let world = anon();
    let log = Log::default();
    for range in [
        0..0,
        0..BLOCK / 2,
        1..BLOCK,
        Range {
            start: BLOCK,
            end: 0,
        },
        0..17 * BLOCK,
        u64::MAX - 1..u64::MAX,
    ] {
        let error = world.subscribe(range.clone(), &log, "a").unwrap_err();
        assert!(
            matches!(error, Error::BadRange { .. }),
            "{range:?}: {error}"
        );
        assert!(world.block.populated(range.clone()).is_err());
        assert!(world.block.discarded(range).is_err());
    }
    let spec = RamSpec {
        name: "boot".into(),
        size_bytes: 1 << 20,
        max_size_bytes: 1 << 20,
        backing: Backing::Anon { thp: false },
        prefault: false,
        block_size_bytes: None,
    };
    let boot = world.memory.ram().add(spec).unwrap();
    let error = boot.subscribe(0..1 << 20, log.listener("a")).unwrap_err();
    assert!(matches!(error, Error::NotSparse(_)), "{error}");
}

#[test]
fn a_block_is_not_destroyed_while_somebody_listens() {
    let memory = Memory::new(MemoryConfig {
        arena_bytes: 1 << 30,
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
    let log = Log::default();
    let listening = block
        .subscribe(blocks(0..16), log.listener("vfio gpu0"))
        .unwrap();
    assert!(
        block.dump().contains("listener   vfio gpu0"),
        "{}",
        block.dump()
    );
    let mut ticket = memory.update(|t| t.retire(&block)).unwrap();
    memory.synchronize();
    let error = loop {
        let (left, error) = ticket.destroy().unwrap_err();
        ticket = left;
        if !error.to_string().ends_with("is not drained: ") {
            break error;
        }
        std::thread::yield_now();
    };
    assert_eq!(
        error.to_string(),
        "RAM block vmem0 is not drained: discard listeners: vfio gpu0"
    );
    assert_eq!(memory.ram().snapshot().len(), 1);
    assert!(
        block
            .subscribe(blocks(0..16), log.listener("late"))
            .is_err()
    );
    drop(listening);
    ticket
        .destroy()
        .unwrap_or_else(|(_, error)| panic!("{error}"));
    assert_eq!(memory.ram().snapshot().len(), 0);
}
