// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The RAM list and where its memory comes from.
#![cfg(not(loom))]

mod setup;

use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use ebbtide_memory::{Backing, Error, HostMemory, Memory, MemoryConfig, RamNotifier, Region};
use setup::{memory, spec};

const ARENA: u64 = 64 << 30;
const ANON: Backing = Backing::Anon { thp: true };

#[derive(Clone, Debug, PartialEq)]
enum Heard {
    Added(usize, u64, u64),
    Removed(usize, u64, u64),
    Resized(usize, u64, u64),
}

struct Recorder(Arc<Mutex<Vec<Heard>>>);

impl RamNotifier for Recorder {
    fn added(&mut self, host: NonNull<u8>, used: u64, max: u64) {
        self.0
            .lock()
            .unwrap()
            .push(Heard::Added(host.addr().get(), used, max));
    }
    fn removed(&mut self, host: NonNull<u8>, used: u64, max: u64) {
        self.0
            .lock()
            .unwrap()
            .push(Heard::Removed(host.addr().get(), used, max));
    }
    fn resized(&mut self, host: NonNull<u8>, old: u64, new: u64) {
        self.0
            .lock()
            .unwrap()
            .push(Heard::Resized(host.addr().get(), old, new));
    }
}

#[test]
fn blocks_are_found_by_name_address_and_offset() {
    let memory = memory(ARENA);
    let list = memory.ram();
    let small = list.add(spec("small", 1 << 20, ANON)).unwrap();
    let large = list
        .add(spec("large", 8 << 20, Backing::Memfd { thp: false }))
        .unwrap();
    assert_eq!(list.version(), 2);
    let names: Vec<_> = list.blocks().iter().map(|b| b.name().to_owned()).collect();
    assert_eq!(names, ["large", "small"]);
    assert!(list.by_name("small").is_some() && list.by_name("none").is_none());
    for _ in 0..2 {
        let (block, offset) = list
            .by_host(small.host().as_ptr().wrapping_add(0x123))
            .unwrap();
        assert_eq!((block.name(), offset), ("small", 0x123));
        let (block, offset) = list.by_host(large.host().as_ptr()).unwrap();
        assert_eq!((block.name(), offset), ("large", 0));
    }
    assert!(
        list.by_host(small.host().as_ptr().wrapping_add(1 << 20))
            .is_none()
    );
    let (block, offset) = list.by_ram_offset(large.ram_offset() + 5).unwrap();
    assert_eq!((block.name(), offset), ("large", 5));
    assert!(small.fd().is_none() && large.fd().is_some());
    assert_eq!(large.page_size_bytes(), 4096);
    let error = list.add(spec("small", 4096, ANON)).unwrap_err();
    assert_eq!(error.to_string(), "RAM block small exists already");
    let dump = list.dump();
    let lines: Vec<_> = dump.lines().collect();
    assert_eq!(lines.len(), 3);
    assert!(
        lines[0].contains("PSize") && lines[1].contains("large") && lines[2].contains("small"),
        "{dump}"
    );
    assert!(
        lines[1].contains("4 KiB") && lines[1].contains("0x0000000000800000"),
        "{dump}"
    );
}

#[test]
fn notifiers_see_what_exists_and_what_changes() {
    let memory = memory(ARENA);
    let list = memory.ram();
    let first = list.add(spec("first", 1 << 20, ANON)).unwrap();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let id = list.add_notifier(Box::new(Recorder(Arc::clone(&heard))));
    let at = |block: &ebbtide_memory::RamBlock| block.host().addr().get();
    let mut growing = spec("growing", 1 << 20, Backing::Memfd { thp: false });
    growing.max_size_bytes = 4 << 20;
    let growing = list.add(growing).unwrap();
    list.grow(&growing, 3 << 20).unwrap();
    assert!(list.grow(&growing, 1 << 20).is_err());
    assert!(list.grow(&growing, 5 << 20).is_err());
    let ticket = memory.update(|t| t.retire(&first)).unwrap();
    memory.synchronize();
    let mut ticket = Some(ticket);
    while let Some(still) = ticket.take() {
        ticket = still.destroy().err().map(|(ticket, _)| ticket);
    }
    let wanted = [
        Heard::Added(at(&first), 1 << 20, 1 << 20),
        Heard::Added(at(&growing), 1 << 20, 4 << 20),
        Heard::Resized(at(&growing), 1 << 20, 3 << 20),
        Heard::Removed(at(&first), 1 << 20, 1 << 20),
    ];
    assert_eq!(*heard.lock().unwrap(), wanted);
    list.remove_notifier(id);
    list.add(spec("late", 4096, ANON)).unwrap();
    assert_eq!(heard.lock().unwrap().len(), 4);
}

#[test]
fn a_grown_block_is_shown_after_set_size() {
    let memory = memory(ARENA);
    let mut growing = spec("ram", 1 << 20, ANON);
    growing.max_size_bytes = 4 << 20;
    let block = memory.ram().add(growing).unwrap();
    let root = Region::container("root", 1 << 40);
    let space = memory.address_space("memory", &root).unwrap();
    let region = Region::ram("ram", &block);
    memory.update(|t| t.add(&root, &region, 0, 0)).unwrap();
    let reader = memory.register();
    space.store(&reader, 0, 4, 7);
    memory.ram().grow(&block, 2 << 20).unwrap();
    assert_eq!(space.load(&reader, 1 << 20, 4), 0xffff_ffff);
    memory.update(|t| t.set_size(&region)).unwrap();
    assert_eq!(space.load(&reader, 1 << 20, 4), 0);
    assert_eq!(space.load(&reader, 0, 4), 7);
    let failed = memory.update(|t| {
        memory.ram().grow(&block, 3 << 20)?;
        t.set_size(&region)?;
        t.remove(&root)
    });
    assert!(failed.is_err());
    assert_eq!(space.load(&reader, 2 << 20, 4), 0xffff_ffff);
}

#[test]
fn files_are_shared_or_not() {
    let dir = tempfile::tempdir().unwrap();
    let memory = memory(ARENA);
    let root = Region::container("root", 1 << 40);
    let space = memory.address_space("memory", &root).unwrap();
    let reader = memory.register();
    for share in [true, false] {
        let path = dir.path().join(format!("ram-{share}"));
        std::fs::write(&path, vec![0x55; 1 << 20]).unwrap();
        let name = format!("file-{share}");
        let backing = Backing::File {
            path: path.clone(),
            share,
            readonly: false,
        };
        let block = memory
            .ram()
            .add(spec(&name, 1 << 20, backing.clone()))
            .unwrap();
        let region = Region::ram(name, &block);
        memory.update(|t| t.add(&root, &region, 0, 0)).unwrap();
        assert_eq!(space.load(&reader, 99, 2), 0x5555);
        space.store(&reader, 0, 1, 0xaa);
        memory.update(|t| t.remove(&region)).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(
            (bytes.len(), bytes[0]),
            (1 << 20, if share { 0xaa } else { 0x55 })
        );
        let mut sparse = spec("sparse", 1 << 20, backing);
        sparse.block_size_bytes = Some(1 << 16);
        assert_eq!(memory.ram().add(sparse).is_ok(), share);
    }
    let missing = Backing::File {
        path: dir.path().join("no/such"),
        share: true,
        readonly: false,
    };
    let error = memory
        .ram()
        .add(spec("missing", 4096, missing))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("no/such") && error.contains("cannot open"),
        "{error}"
    );
}

#[test]
fn what_the_host_cannot_give_is_refused_with_the_figures() {
    let memory = Memory::new(MemoryConfig {
        arena_bytes: 8 << 40,
    })
    .unwrap();
    let host = HostMemory::read();
    let size = (host.limit_bytes() + (1 << 30)).next_multiple_of(1 << 21);
    let error = memory.ram().add(spec("boot", size, ANON)).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::NoHostMemory { .. }), "{text}");
    assert!(text.contains(&host.total_bytes.to_string()), "{text}");
    let error = Memory::new(MemoryConfig {
        arena_bytes: 1 << 60,
    })
    .map(drop)
    .unwrap_err()
    .to_string();
    assert!(
        error.contains("cannot reserve 1152921504606846976 bytes"),
        "{error}"
    );
    let tight = Memory::new(MemoryConfig {
        arena_bytes: 4 << 20,
    })
    .unwrap();
    let error = tight
        .ram()
        .add(spec("boot", 8 << 20, ANON))
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "RAM block boot: 8388608 bytes do not fit the 4194304 bytes left of the address reservation"
    );
}

#[test]
fn slots_are_used_again_and_limited() {
    let memory = memory(ARENA);
    for round in 0..3 {
        for at in 0..300 {
            memory
                .ram()
                .add(spec(&format!("{round}-{at}"), 4096, ANON))
                .unwrap();
        }
        let tickets: Vec<_> = memory
            .update(|t| {
                memory
                    .ram()
                    .blocks()
                    .iter()
                    .map(|b| t.retire(b))
                    .collect::<Result<_, _>>()
            })
            .unwrap();
        for ticket in tickets {
            let mut ticket = Some(ticket);
            while let Some(still) = ticket.take() {
                ticket = still.destroy().err().map(|(ticket, _)| ticket);
                std::thread::yield_now();
            }
        }
    }
    assert_eq!(memory.ram().blocks().len(), 0);
}
