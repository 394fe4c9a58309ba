// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The region tree as an address space shows it.
#![cfg(not(loom))]

mod setup;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ebbtide_memory::{
    AddressSpace, Error, FlatIoeventfd, FlatSection, Gpa, Ioeventfd, Listener, ListenerError,
    Memory, MemoryConfig, Mmio, RamBlock, Region,
};
use setup::memory;

const ARENA: u64 = 64 << 30;

fn ram(memory: &Memory, name: &str, size_bytes: u64) -> Arc<RamBlock> {
    setup::block(memory, name, size_bytes, None)
}

/// Remembers the last write.
struct Register(AtomicU64);

impl Mmio for Register {
    fn read(&self, offset: u64, size: u8) -> u64 {
        self.0.load(Ordering::SeqCst) + offset * 256 + u64::from(size)
    }
    fn write(&self, offset: u64, size: u8, value: u64) {
        self.0.store(
            value << 16 | offset << 8 | u64::from(size),
            Ordering::SeqCst,
        );
    }
}

fn mmio(name: &str, size: u64) -> Arc<Region> {
    Region::mmio(name, size, Arc::new(Register(AtomicU64::new(0))))
}

/// The flat view: start, end, region, offset in the region.
fn flat(space: &AddressSpace) -> Vec<(u64, u64, String, u64)> {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let id = space
        .add_listener(
            Box::new(Recorder {
                seen: Arc::clone(&seen),
                refuse: None,
            }),
            0,
        )
        .unwrap();
    let lines = seen.lock().unwrap().clone();
    space.remove_listener(id);
    let add = |line: &Heard| match line {
        Heard::Add(range, name, offset) => Some((range.start, range.end, name.clone(), *offset)),
        _ => None,
    };
    lines.iter().filter_map(add).collect()
}

#[derive(Clone, Debug, PartialEq)]
enum Heard {
    Begin,
    Add(std::ops::Range<u64>, String, u64),
    Del(std::ops::Range<u64>, String),
    AddEvent(u64),
    DelEvent(u64),
    Commit,
}

struct Recorder {
    seen: Arc<Mutex<Vec<Heard>>>,
    /// Refuses the section of this region.
    refuse: Option<&'static str>,
}

impl Recorder {
    fn push(&self, heard: Heard) {
        self.seen.lock().unwrap().push(heard);
    }
}

impl Listener for Recorder {
    fn begin(&mut self) {
        self.push(Heard::Begin);
    }
    fn region_add(&mut self, section: &FlatSection) -> Result<(), ListenerError> {
        let name = section.region.name().to_owned();
        if self.refuse == Some(&name) {
            return Err(ListenerError {
                what: "recorder".into(),
                reason: format!("no {name}"),
            });
        }
        self.push(Heard::Add(
            section.range.clone(),
            name,
            section.offset_in_region,
        ));
        Ok(())
    }
    fn region_del(&mut self, section: &FlatSection) {
        self.push(Heard::Del(
            section.range.clone(),
            section.region.name().to_owned(),
        ));
    }
    fn ioeventfd_add(&mut self, ioeventfd: &FlatIoeventfd) -> Result<(), ListenerError> {
        self.push(Heard::AddEvent(ioeventfd.addr));
        Ok(())
    }
    fn ioeventfd_del(&mut self, ioeventfd: &FlatIoeventfd) {
        self.push(Heard::DelEvent(ioeventfd.addr));
    }
    fn commit(&mut self) {
        self.push(Heard::Commit);
    }
}

fn entry(start: u64, last: u64, name: &str, offset: u64) -> (u64, u64, String, u64) {
    (start, last + 1, name.to_owned(), offset)
}

#[test]
fn a_region_of_the_whole_address_space_is_shown_to_its_last_byte() {
    let memory = Memory::new(MemoryConfig {
        arena_bytes: 1 << 20,
    })
    .unwrap();
    let root = Region::container("everything", 1 << 64);
    let _space = memory.address_space("memory", &root).unwrap();
    let text = memory.mtree(false);
    let line = "  0000000000000000-ffffffffffffffff (prio 0, container): everything\n";
    assert!(text.contains(line), "{text}");
}

/// The map that QEMU's docs/devel/memory.rst takes as its example.
#[test]
fn the_example_map_of_the_qemu_documentation() {
    let memory = memory(ARENA);
    let block = ram(&memory, "pc.ram", 4 << 30);
    let video = ram(&memory, "vga.vram", 16 << 20);
    let ram = Region::ram("ram", &block);
    let vram = Region::ram("vram", &video);
    let system = Region::container("system", 1 << 48);
    let pci = Region::container("pci", 1 << 32);
    let space = memory.address_space("memory", &system).unwrap();
    memory
        .update(|t| {
            t.add(&system, &Region::alias("lomem", &ram, 0, 0xe000_0000), 0, 0)?;
            t.add(
                &system,
                &Region::alias("himem", &ram, 0xe000_0000, 0x2000_0000),
                1 << 32,
                0,
            )?;
            t.add(
                &system,
                &Region::alias("vga-window", &pci, 0xa0000, 0x20000),
                0xa0000,
                1,
            )?;
            t.add(
                &system,
                &Region::alias("pci-hole", &pci, 0xe000_0000, 0x2000_0000),
                0xe000_0000,
                0,
            )?;
            let area = Region::container("vga-area", 0x20000);
            t.add(&pci, &area, 0xa0000, 0)?;
            t.add(&area, &Region::alias("bank0", &vram, 0x10000, 0x8000), 0, 0)?;
            t.add(
                &area,
                &Region::alias("bank1", &vram, 0x20000, 0x8000),
                0x8000,
                0,
            )?;
            t.add(&pci, &vram, 0xe100_0000, 0)?;
            t.add(&pci, &mmio("vga-mmio", 0x10000), 0xe200_0000, 0)
        })
        .unwrap();
    let wanted = [
        entry(0, 0x9ffff, "ram", 0),
        entry(0xa0000, 0xa7fff, "vram", 0x10000),
        entry(0xa8000, 0xaffff, "vram", 0x20000),
        entry(0xb0000, 0xdfff_ffff, "ram", 0xb0000),
        entry(0xe100_0000, 0xe1ff_ffff, "vram", 0),
        entry(0xe200_0000, 0xe200_ffff, "vga-mmio", 0),
        entry(0x1_0000_0000, 0x1_1fff_ffff, "ram", 0xe000_0000),
    ];
    assert_eq!(flat(&space), wanted);
    let text = memory.mtree(true);
    let golden = "\
FlatView #0
 AS \"memory\", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): ram
  00000000000a0000-00000000000a7fff (prio 0, ram): vram @0000000000010000
  00000000000a8000-00000000000affff (prio 0, ram): vram @0000000000020000
  00000000000b0000-00000000dfffffff (prio 0, ram): ram @00000000000b0000
  00000000e1000000-00000000e1ffffff (prio 0, ram): vram
  00000000e2000000-00000000e200ffff (prio 0, i/o): vga-mmio
  0000000100000000-000000011fffffff (prio 0, ram): ram @00000000e0000000

";
    assert_eq!(text, golden);
    let text = memory.mtree(false);
    let line = "    00000000000a0000-00000000000bffff (prio 1, container): alias vga-window @pci 00000000000a0000-00000000000bffff";
    assert!(text.contains(line), "{text}");
    assert!(
        text.contains(
            "memory-region: ram\n  0000000000000000-00000000ffffffff (prio 0, ram): ram\n"
        ),
        "{text}"
    );
    // The banks hide RAM; both windows show the same memory.
    let reader = memory.register();
    space.store(&reader, 0xa0010, 4, 0x1234_5678);
    assert_eq!(space.load(&reader, 0xe101_0010, 4), 0x1234_5678);
    assert_eq!(
        space
            .read(&reader)
            .lookup(Gpa(0xe000_0000))
            .map(|s| s.range()),
        None
    );
}

#[test]
fn higher_priority_hides_and_the_later_of_equals_wins() {
    let memory = memory(ARENA);
    let root = Region::container("root", 0x10000);
    let space = memory.address_space("memory", &root).unwrap();
    let (low, first, second) = (
        mmio("low", 0x3000),
        mmio("first", 0x1000),
        mmio("second", 0x1000),
    );
    memory
        .update(|t| {
            t.add(&root, &first, 0x1000, 5)?;
            t.add(&root, &low, 0, -1)?;
            t.add(&root, &second, 0x1800, 5)
        })
        .unwrap();
    let wanted = [
        entry(0, 0xfff, "low", 0),
        entry(0x1000, 0x17ff, "first", 0),
        entry(0x1800, 0x27ff, "second", 0),
        entry(0x2800, 0x2fff, "low", 0x2800),
    ];
    assert_eq!(flat(&space), wanted);
    memory.update(|t| t.set_enabled(&second, false)).unwrap();
    assert_eq!(
        flat(&space)[1..],
        [
            entry(0x1000, 0x1fff, "first", 0),
            entry(0x2000, 0x2fff, "low", 0x2000)
        ]
    );
    memory.update(|t| t.remove(&first)).unwrap();
    assert_eq!(flat(&space), [entry(0, 0x2fff, "low", 0)]);
    memory.update(|t| t.set_offset(&low, 0xf000)).unwrap();
    assert_eq!(flat(&space), [entry(0xf000, 0xffff, "low", 0)]);
    memory.update(|t| t.set_enabled(&root, false)).unwrap();
    assert_eq!(flat(&space), []);
}

#[test]
fn a_region_with_children_answers_between_them() {
    let memory = memory(ARENA);
    let root = Region::container("root", u128::from(u64::MAX) + 1);
    let space = memory.address_space("memory", &root).unwrap();
    let bar = mmio("bar", 0x4000);
    let table = mmio("table", 0x800);
    memory
        .update(|t| {
            t.add(&bar, &table, 0x1000, 0)?;
            t.add(&root, &bar, u64::MAX - 0x4000, 0)
        })
        .unwrap();
    let base = u64::MAX - 0x4000;
    let wanted = [
        entry(base, base + 0xfff, "bar", 0),
        entry(base + 0x1000, base + 0x17ff, "table", 0),
        entry(base + 0x1800, u64::MAX - 1, "bar", 0x1800),
    ];
    assert_eq!(flat(&space), wanted);
}

#[test]
fn address_spaces_share_what_they_show() {
    let memory = memory(ARENA);
    let block = ram(&memory, "ram", 1 << 20);
    let shared = Region::container("shared", 1 << 30);
    let system = Region::container("system", 1 << 40);
    let device = Region::container("device", 1 << 40);
    let cpu = memory.address_space("memory", &system).unwrap();
    let dma = memory.address_space("dma", &device).unwrap();
    let window = Region::alias("window", &shared, 0, 1 << 30);
    memory
        .update(|t| {
            t.add(&system, &shared, 1 << 32, 0)?;
            t.add(&device, &window, 0, 0)
        })
        .unwrap();
    let region = Region::ram("ram", &block);
    memory
        .update(|t| t.add(&shared, &region, 0x1000, 0))
        .unwrap();
    let reader = memory.register();
    cpu.store(&reader, (1 << 32) + 0x1000, 8, 42);
    assert_eq!(dma.load(&reader, 0x1000, 8), 42);
    drop(dma);
    memory.update(|t| t.set_offset(&region, 0)).unwrap();
    assert_eq!(cpu.load(&reader, 1 << 32, 8), 42);
}

#[test]
fn loads_and_stores_are_split_as_the_map_wants() {
    let memory = memory(ARENA);
    let block = ram(&memory, "ram", 0x2000);
    let root = Region::container("root", 0x10_0000);
    let space = memory.address_space("memory", &root).unwrap();
    memory
        .update(|t| {
            t.add(&root, &Region::ram("ram", &block), 0, 0)?;
            t.add(&root, &mmio("device", 0x1000), 0x2000, 0)?;
            t.add(
                &root,
                &Region::rom("rom", &ram(&memory, "rom", 0x1000)),
                0x3000,
                0,
            )?;
            t.add(&root, &Region::reservation("kept", 0x1000), 0x5000, 0)
        })
        .unwrap();
    let reader = memory.register();
    // Aligned: one access.
    space.store(&reader, 0x2010, 4, 0xab);
    assert_eq!(
        space.load(&reader, 0x2000, 2),
        (((0xab << 16) | (0x10 << 8) | 4) + 2) & 0xffff
    );
    // At offset 1, 4 bytes: 1 + 2 + 1; the last store went to offset 4.
    space.store(&reader, 0x2001, 4, 0x4433_2211);
    assert_eq!(
        space.load(&reader, 0x2000, 8),
        (0x44 << 16 | 4 << 8 | 1) + 8
    );
    // Across RAM and device, 3 bytes: one of RAM, then 2 at offset 0.
    space.store(&reader, 0x1fff, 3, 0x33_2211);
    assert_eq!(space.load(&reader, 0x1fff, 1), 0x11);
    assert_eq!(space.load(&reader, 0x2000, 8), (0x3322 << 16 | 2) + 8);
    // ROM drops stores, nothing and reservations give ones.
    space.store(&reader, 0x3000, 4, 1);
    assert_eq!(space.load(&reader, 0x3000, 4), 0);
    assert_eq!(space.load(&reader, 0x4000, 4), 0xffff_ffff);
    assert_eq!(space.load(&reader, 0x5000, 8), u64::MAX);
    assert_eq!(space.load(&reader, u64::MAX - 1, 8), u64::MAX);
    assert_eq!(space.load(&reader, 0x3ffe, 4), 0xffff_0000);
}

#[test]
fn listeners_hear_removals_first_and_reversed() {
    let memory = memory(ARENA);
    let root = Region::container("root", 0x10000);
    let space = memory.address_space("memory", &root).unwrap();
    let (a, b) = (mmio("a", 0x1000), mmio("b", 0x1000));
    memory.update(|t| t.add(&root, &a, 0, 0)).unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let recorder = |refuse| {
        Box::new(Recorder {
            seen: Arc::clone(&seen),
            refuse,
        })
    };
    let id = space.add_listener(recorder(None), 10).unwrap();
    assert_eq!(
        *seen.lock().unwrap(),
        [
            Heard::Begin,
            Heard::Add(0..0x1000, "a".into(), 0),
            Heard::Commit
        ]
    );
    seen.lock().unwrap().clear();
    memory
        .update(|t| {
            t.set_offset(&a, 0x4000)?;
            t.add(&root, &b, 0x1000, 0)
        })
        .unwrap();
    let wanted = [
        Heard::Begin,
        Heard::Del(0..0x1000, "a".into()),
        Heard::Add(0x1000..0x2000, "b".into(), 0),
        Heard::Add(0x4000..0x5000, "a".into(), 0),
        Heard::Commit,
    ];
    assert_eq!(*seen.lock().unwrap(), wanted);
    seen.lock().unwrap().clear();
    // A change that changes nothing tells nobody.
    memory.update(|t| t.set_offset(&a, 0x4000)).unwrap();
    assert_eq!(*seen.lock().unwrap(), []);
    space.remove_listener(id);
    let wanted = [
        Heard::Begin,
        Heard::Del(0x4000..0x5000, "a".into()),
        Heard::Del(0x1000..0x2000, "b".into()),
        Heard::Commit,
    ];
    assert_eq!(*seen.lock().unwrap(), wanted);
}

#[test]
fn a_refusal_takes_the_whole_change_back() {
    let memory = memory(ARENA);
    let root = Region::container("root", 0x10000);
    let space = memory.address_space("memory", &root).unwrap();
    let (a, b, c) = (mmio("a", 0x1000), mmio("b", 0x1000), mmio("c", 0x1000));
    memory.update(|t| t.add(&root, &a, 0, 0)).unwrap();
    let (first, second) = (
        Arc::new(Mutex::new(Vec::new())),
        Arc::new(Mutex::new(Vec::new())),
    );
    let listener = |seen: &Arc<Mutex<Vec<Heard>>>, refuse| {
        Box::new(Recorder {
            seen: Arc::clone(seen),
            refuse,
        })
    };
    space.add_listener(listener(&first, None), 0).unwrap();
    space.add_listener(listener(&second, Some("c")), 1).unwrap();
    first.lock().unwrap().clear();
    second.lock().unwrap().clear();
    let result = memory.update(|t| {
        t.remove(&a)?;
        t.add(&root, &b, 0x1000, 0)?;
        t.add(&root, &c, 0x2000, 0)
    });
    let error = result.unwrap_err().to_string();
    assert_eq!(error, "address space memory: recorder: no c");
    let wanted = [
        Heard::Begin,
        Heard::Del(0..0x1000, "a".into()),
        Heard::Add(0x1000..0x2000, "b".into(), 0),
        Heard::Add(0x2000..0x3000, "c".into(), 0),
        Heard::Del(0x2000..0x3000, "c".into()),
        Heard::Del(0x1000..0x2000, "b".into()),
        Heard::Add(0..0x1000, "a".into(), 0),
        Heard::Commit,
    ];
    assert_eq!(*first.lock().unwrap(), wanted);
    let heard = second.lock().unwrap().clone();
    assert_eq!(
        heard[heard.len() - 3..],
        [
            Heard::Del(0x1000..0x2000, "b".into()),
            Heard::Add(0..0x1000, "a".into(), 0),
            Heard::Commit
        ]
    );
    assert_eq!(flat(&space), [entry(0, 0xfff, "a", 0)]);
    // The tree is as it was: what was taken back can be done again.
    memory.update(|t| t.add(&root, &b, 0x3000, 0)).unwrap();
    assert_eq!(flat(&space).len(), 2);
    // A listener that refuses what exists is not added.
    let error = space
        .add_listener(listener(&second, Some("b")), 0)
        .unwrap_err();
    assert!(matches!(error, Error::Listener { .. }));
}

#[test]
fn an_error_of_the_closure_takes_the_change_back() {
    let memory = memory(ARENA);
    let root = Region::container("root", 0x10000);
    let space = memory.address_space("memory", &root).unwrap();
    let (a, b) = (mmio("a", 0x1000), mmio("b", 0x1000));
    memory
        .update(|t| {
            t.add(&root, &a, 0, 0)?;
            t.add(&root, &b, 0, 0)
        })
        .unwrap();
    let error = memory
        .update(|t| {
            t.remove(&b)?;
            t.set_offset(&a, 0x2000)?;
            t.set_enabled(&a, false)?;
            t.remove(&b)
        })
        .unwrap_err();
    assert_eq!(error.to_string(), "region b has no parent");
    assert_eq!(flat(&space), [entry(0, 0xfff, "b", 0)]);
    memory.update(|t| t.remove(&b)).unwrap();
    assert_eq!(flat(&space), [entry(0, 0xfff, "a", 0)]);
}

#[test]
fn misuse_is_refused_by_name() {
    let memory = memory(ARENA);
    let other = self::memory(ARENA);
    let root = Region::container("root", 0x10000);
    let inner = Region::container("inner", 0x1000);
    let _space = memory.address_space("memory", &root).unwrap();
    memory.update(|t| t.add(&root, &inner, 0, 0)).unwrap();
    let error = |f: &dyn Fn(&mut ebbtide_memory::Transaction<'_>) -> Result<(), Error>| {
        memory.update(|t| f(t)).unwrap_err().to_string()
    };
    assert_eq!(
        error(&|t| t.add(&root, &inner, 0, 0)),
        "region inner has a parent already"
    );
    let alias = Region::alias("alias", &root, 0, 0x1000);
    assert_eq!(
        error(&|t| t.add(&inner, &alias, 0, 0)),
        "region alias would contain itself"
    );
    assert!(error(&|t| t.add(&alias, &mmio("x", 1), 0, 0)).contains("an alias has no children"));
    assert!(error(&|t| t.add(&root, &mmio("x", 2), u64::MAX, 0)).contains("ends past 2^64"));
    let foreign = Region::ram("r", &ram(&other, "foreign", 0x1000));
    assert_eq!(
        error(&|t| t.add(&root, &foreign, 0, 0)),
        "RAM block foreign belongs to another memory"
    );
    let window = Region::alias("window", &foreign, 0, 0x1000);
    let deep = Region::alias("deep", &window, 0, 0x1000);
    assert_eq!(
        error(&|t| t.add(&root, &deep, 0x2000, 0)),
        "RAM block foreign belongs to another memory"
    );
    let theirs = Region::container("theirs", 0x1000);
    other.update(|t| t.add(&theirs, &foreign, 0, 0)).unwrap();
    let window = Region::alias("window", &theirs, 0, 0x1000);
    assert_eq!(
        error(&|t| t.add(&root, &window, 0x2000, 0)),
        "region theirs belongs to another memory"
    );
    assert!(memory.address_space("x", &window).is_err());
    // Where it belongs it can still go.
    other
        .update(|t| t.add(&theirs, &mmio("x", 8), 0, 1))
        .unwrap();
    assert!(other.address_space("y", &window).is_ok());
    assert!(other.address_space("x", &root).is_err());
    let nested = memory.update(|_| memory.update(|_| Ok(()))).unwrap_err();
    assert_eq!(
        nested.to_string(),
        "the memory map cannot be changed from within a change of it"
    );
}

#[test]
fn ioeventfds_follow_their_region() {
    let memory = memory(ARENA);
    let root = Region::container("root", 0x10000);
    let space = memory.address_space("memory", &root).unwrap();
    let bar = mmio("bar", 0x1000);
    let fd: Arc<OwnedFd> = Arc::new(File::open("/dev/null").unwrap().into());
    let notify = Ioeventfd {
        offset: 0x10,
        size: 2,
        datamatch: None,
        fd,
    };
    let seen = Arc::new(Mutex::new(Vec::new()));
    space
        .add_listener(
            Box::new(Recorder {
                seen: Arc::clone(&seen),
                refuse: None,
            }),
            0,
        )
        .unwrap();
    memory
        .update(|t| {
            t.add(&root, &bar, 0x1000, 0)?;
            t.add_ioeventfd(&bar, notify.clone())
        })
        .unwrap();
    memory.update(|t| t.set_offset(&bar, 0x3000)).unwrap();
    let events = |seen: &Mutex<Vec<Heard>>| {
        let heard = std::mem::take(&mut *seen.lock().unwrap());
        heard
            .into_iter()
            .filter(|h| matches!(h, Heard::AddEvent(_) | Heard::DelEvent(_)))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        events(&seen),
        [
            Heard::AddEvent(0x1010),
            Heard::DelEvent(0x1010),
            Heard::AddEvent(0x3010)
        ]
    );
    assert!(
        memory
            .mtree(true)
            .contains("ioeventfd 0000000000003010 size 2")
    );
    let again = memory
        .update(|t| t.add_ioeventfd(&bar, notify.clone()))
        .unwrap_err();
    assert_eq!(
        again.to_string(),
        "region bar: ioeventfd at 0x10 exists already"
    );
    // Hidden by another region: gone; seen again: back.
    let cover = Region::reservation("cover", 0x20);
    memory.update(|t| t.add(&root, &cover, 0x3000, 1)).unwrap();
    memory.update(|t| t.remove(&cover)).unwrap();
    assert_eq!(
        events(&seen),
        [Heard::DelEvent(0x3010), Heard::AddEvent(0x3010)]
    );
    memory
        .update(|t| t.remove_ioeventfd(&bar, &notify))
        .unwrap();
    assert_eq!(events(&seen), [Heard::DelEvent(0x3010)]);
    assert!(
        memory
            .update(|t| t.remove_ioeventfd(&bar, &notify))
            .is_err()
    );
}
