// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! New memory for the next guest while devices use that of the last one.
#![cfg(not(loom))]

use std::fs;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use ebbtide_memory::{
    Access, AddressSpace, Backing, DiscardListener, Error, Gpa, ListenerError, Memory,
    MemoryConfig, Phase, Pin, RamBlock, RamSpec, Region, Ticket,
};

const LONG: Duration = Duration::from_secs(10);
const SIZE: u64 = 4 << 20;
const PAGE: u64 = 4096;

struct Machine {
    memory: Arc<Memory>,
    space: Arc<AddressSpace>,
    root: Arc<Region>,
    shown: Arc<Region>,
}

impl Machine {
    /// Memory from 0 on, each page full of its number.
    fn new(backing: Backing) -> Machine {
        let memory = Memory::new(MemoryConfig {
            arena_bytes: 1 << 30,
        })
        .unwrap();
        let root = Region::container("root", 1 << 48);
        let space = memory.address_space("memory", &root).unwrap();
        let spec = RamSpec {
            backing,
            ..RamSpec::anon("ram", SIZE)
        };
        let block = memory.ram().add(spec).unwrap();
        let shown = Region::ram("ram", &block);
        memory.update(|t| t.add(&root, &shown, 0, 0)).unwrap();
        let machine = Machine {
            memory,
            space,
            root,
            shown,
        };
        for page in 0..SIZE / PAGE {
            machine.write(page * PAGE, &[page as u8 | 1; PAGE as usize]);
        }
        machine
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let reader = self.memory.register();
        self.space
            .read(&reader)
            .write_bytes(Gpa(at), bytes)
            .unwrap();
    }

    fn contents(&self) -> Vec<u8> {
        let reader = self.memory.register();
        let mut bytes = vec![0; SIZE as usize];
        self.space
            .read(&reader)
            .read_bytes(Gpa(0), &mut bytes)
            .unwrap();
        bytes
    }

    fn pin(&self, range: Range<u64>, access: Access) -> Pin {
        let reader = self.memory.register();
        let length = (range.end - range.start) as usize;
        self.space
            .read(&reader)
            .pin(Gpa(range.start), length, access)
            .unwrap()
    }

    /// What a reset does: other memory at the same place.
    fn renew(&mut self) -> (Ticket, Arc<RamBlock>) {
        let block = self
            .memory
            .ram()
            .renew(self.shown.ram_block().unwrap())
            .unwrap();
        let region = Region::ram("ram", &block);
        let ticket = self.memory.update(|t| {
            let ticket = t.unplug(&self.shown)?;
            t.add(&self.root, &region, 0, 0)?;
            Ok(ticket)
        });
        let ticket = ticket.unwrap();
        self.shown = region;
        assert!(ticket.wait(Phase::Draining, LONG));
        (ticket, block)
    }
}

fn resident_kib(block: &RamBlock) -> u64 {
    let start = block.host().as_ptr() as u64;
    let range = start..start + block.size_bytes();
    let (mut inside, mut kib) = (false, 0);
    for line in fs::read_to_string("/proc/self/smaps").unwrap().lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((from, _)) = first.split_once('-') {
            inside = u64::from_str_radix(from, 16).is_ok_and(|from| range.contains(&from));
        } else if inside && first == "Rss:" {
            kib += words.next().unwrap().parse::<u64>().unwrap();
        }
    }
    kib
}

#[test]
fn what_comes_late_is_not_in_the_memory_of_the_next_guest() {
    for backing in [Backing::Anon { thp: false }, Backing::Memfd { thp: false }] {
        let mut machine = Machine::new(backing);
        let (reads, writes) = (7 * PAGE - 8..8 * PAGE, 20 * PAGE..22 * PAGE);
        let disk_read = machine.pin(reads.clone(), Access::Write);
        let disk_write = machine.pin(writes, Access::Read);
        let old = Arc::clone(machine.shown.ram_block().unwrap());
        assert_eq!(old.pins(), 2);
        let (ticket, new) = machine.renew();
        let pinned = [disk_read.host_range(), disk_write.host_range()];
        assert_eq!(ticket.free_but(&pinned).unwrap(), 4 * PAGE);
        assert_eq!(resident_kib(&old), 4 * PAGE / 1024);
        assert_eq!((new.name(), new.size_bytes(), new.pins()), ("ram", SIZE, 0));
        assert!(
            machine.contents().iter().all(|byte| *byte == 0),
            "new memory is not empty"
        );
        // The next guest uses the same addresses before the host is done with them.
        machine.write(reads.start, &[0x22; PAGE as usize]);
        let late = vec![0x66; disk_read.len()];
        disk_read.write_at(0, &late).unwrap();
        let contents = machine.contents();
        assert!(
            !contents.contains(&0x66),
            "a late read is in the next guest's memory"
        );
        let new_bytes = &contents[reads.start as usize..][..PAGE as usize];
        assert!(new_bytes.iter().all(|byte| *byte == 0x22));
        // A write of the last guest writes what that guest has given it.
        let mut written = vec![0; disk_write.len()];
        disk_write.read_at(0, &mut written).unwrap();
        assert!(written[..PAGE as usize].iter().all(|byte| *byte == 21));
        assert!(written[PAGE as usize..].iter().all(|byte| *byte == 21));

        assert!(!ticket.wait(Phase::Drained, Duration::ZERO));
        drop(disk_read);
        assert!(!ticket.wait(Phase::Drained, Duration::ZERO));
        drop(disk_write);
        assert!(ticket.wait(Phase::Drained, LONG));
        assert_eq!(machine.memory.ram().blocks().len(), 2);
        ticket.destroy().map_err(|(_, error)| error).unwrap();
        assert_eq!(machine.memory.ram().blocks().len(), 1);
        let named = machine.memory.ram().by_name("ram").unwrap();
        assert!(Arc::ptr_eq(&named, &new));
    }
}

/// One request after the other is never answered: each keeps its own pages.
#[test]
fn resets_in_a_row_keep_what_is_in_use_and_no_more() {
    let mut machine = Machine::new(Backing::Anon { thp: false });
    let mut kept: Vec<(Ticket, Pin)> = Vec::new();
    for reset in 0..8 {
        let at = reset * 3 * PAGE;
        machine.write(at, &[reset as u8 + 1; PAGE as usize]);
        let stuck = machine.pin(at..at + PAGE, Access::Write);
        let (ticket, _) = machine.renew();
        assert_eq!(ticket.free_but(&[stuck.host_range()]).unwrap(), PAGE);
        kept.push((ticket, stuck));
        machine.write(at, &[9; PAGE as usize]);
    }
    let old = kept
        .iter()
        .map(|(ticket, _)| resident_kib(ticket.block()))
        .sum::<u64>();
    assert_eq!(old, 8 * PAGE / 1024);
    assert_eq!(machine.memory.ram().blocks().len(), 9);
    for (at, (_, stuck)) in kept.iter().enumerate() {
        stuck.write_at(0, &[0x66; 8]).unwrap();
        assert!(!machine.contents().contains(&0x66), "of reset {at}");
    }
    for (ticket, stuck) in kept {
        drop(stuck);
        assert!(ticket.wait(Phase::Drained, LONG));
        ticket.destroy().map_err(|(_, error)| error).unwrap();
    }
    assert_eq!(machine.memory.ram().blocks().len(), 1);
}

struct Follower;

impl DiscardListener for Follower {
    fn name(&self) -> &str {
        "follower"
    }

    fn populate(&mut self, _range: Range<u64>) -> Result<(), ListenerError> {
        Ok(())
    }

    fn discard(&mut self, _range: Range<u64>) {}
}

#[test]
fn what_cannot_be_renewed_is_refused() {
    let mut machine = Machine::new(Backing::Anon { thp: false });
    let memory = Arc::clone(&machine.memory);
    let ram = memory.ram();
    let refusal = |block: &Arc<RamBlock>| ram.renew(block).unwrap_err().to_string();
    let sparse = RamSpec {
        block_size_bytes: Some(2 << 20),
        ..RamSpec::anon("sparse", SIZE)
    };
    let sparse = ram.add(sparse).unwrap();
    sparse.plug(0..2 << 20, false).unwrap();
    let follower = sparse.subscribe(0..SIZE, Box::new(Follower)).unwrap();
    let error = refusal(&sparse);
    assert!(error.contains("followed"), "{error}");
    drop(follower);
    let fresh = ram.renew(&sparse).unwrap();
    assert_eq!(
        (fresh.block_size_bytes(), fresh.plugged_bytes()),
        (Some(2 << 20), 0)
    );
    fresh.plug(2 << 20..4 << 20, false).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = RamSpec {
        backing: Backing::File {
            path: directory.path().join("ram"),
            share: true,
            readonly: false,
        },
        ..RamSpec::anon("of-file", SIZE)
    };
    let error = refusal(&ram.add(file).unwrap());
    assert!(error.contains("a file's"), "{error}");
    let large = ram.add(RamSpec::anon("large", 600 << 20)).unwrap();
    assert!(matches!(ram.renew(&large), Err(Error::ArenaFull { .. })));
    assert!(Arc::ptr_eq(&ram.by_name("large").unwrap(), &large));

    let old = Arc::clone(machine.shown.ram_block().unwrap());
    let (ticket, _) = machine.renew();
    assert!(matches!(ram.renew(&old), Err(Error::Unplugged(_))));
    assert!(ticket.wait(Phase::Drained, LONG));
    ticket.destroy().map_err(|(_, error)| error).unwrap();
    let other = Machine::new(Backing::Anon { thp: false });
    let foreign = other.shown.ram_block().unwrap();
    assert!(matches!(ram.renew(foreign), Err(Error::Foreign(_))));
}

#[test]
fn a_change_that_fails_leaves_the_old_memory_in_its_place() {
    let machine = Machine::new(Backing::Anon { thp: false });
    let memory = &machine.memory;
    let new = memory
        .ram()
        .renew(machine.shown.ram_block().unwrap())
        .unwrap();
    let region = Region::ram("ram", &new);
    let failed = memory.update(|t| {
        let _ticket = t.unplug(&machine.shown)?;
        t.add(&machine.root, &region, 1, 0)
    });
    failed.unwrap_err();
    assert_eq!(machine.contents()[..4], [1; 4]);
    let ticket = memory.update(|t| t.retire(&new)).unwrap();
    assert!(ticket.wait(Phase::Drained, LONG));
    drop((region, new));
    ticket.destroy().map_err(|(_, error)| error).unwrap();
    // It can be tried again.
    let again = memory.ram().renew(machine.shown.ram_block().unwrap());
    assert_eq!(again.unwrap().name(), "ram");
}

#[test]
fn what_is_to_be_allocated_is_so_when_asked_for() {
    let memory = Memory::new(MemoryConfig {
        arena_bytes: 1 << 30,
    })
    .unwrap();
    let spec = RamSpec {
        prefault: true,
        backing: Backing::Anon { thp: false },
        ..RamSpec::anon("ram", SIZE)
    };
    let mut block = memory.ram().add(spec).unwrap();
    for _ in 0..2 {
        assert_eq!(resident_kib(&block), SIZE / 1024);
        block = memory.ram().renew(&block).unwrap();
        assert_eq!(resident_kib(&block), 0);
        block.prefault().unwrap();
    }
}
