// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! New memory for the next guest while devices use that of the last one.
#![cfg(not(loom))]
#![allow(
    clippy::single_range_in_vec_init,
    reason = "lists of ranges, some of one"
)]

use std::fs;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ebbtide_memory::DirtyClient::{Display, Migration};
use ebbtide_memory::{
    Access, AddressSpace, Backing, CachedMap, DiscardListener, DmaSpace, Error, FlatSection, Gpa,
    Listener, ListenerError, Memory, MemoryConfig, Phase, Pin, RamBlock, RamNotifier, RamSpace,
    RamSpec, Region, RegionHold, Ticket,
};
use vm_memory::{GuestAddress, GuestAddressSpace};

const LONG: Duration = Duration::from_secs(60);
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
    let old = machine.shown.ram_block().unwrap();
    let is_named = |block: &Arc<RamBlock>| {
        let named = memory.ram().by_name("ram");
        named.is_some_and(|named| Arc::ptr_eq(&named, block))
    };
    assert!(is_named(&new), "it is tried again as it is");
    let ticket = memory.update(|t| t.retire(&new)).unwrap();
    // The guest has the old one, which has its name again.
    let is_taken = || {
        let added = memory.ram().add(RamSpec::anon("ram", SIZE));
        matches!(added, Err(Error::DuplicateName(_)))
    };
    // At the next change of the list as well as before it.
    assert!(is_named(old) && is_taken());
    assert!(ticket.wait(Phase::Drained, LONG));
    drop((region, new));
    ticket.destroy().map_err(|(_, error)| error).unwrap();
    assert!(is_named(old) && is_taken());
    // It can be tried again.
    let again = memory.ram().renew(old).unwrap();
    assert!(again.name() == "ram" && is_named(&again) && is_taken());
}

/// Memory that was plugged goes, as it can, while what was there before it is still in use: nobody has the name then.
#[test]
fn a_name_is_free_when_the_block_that_has_it_is_gone() {
    let mut machine = Machine::new(Backing::Anon { thp: false });
    let stuck = machine.pin(0..PAGE, Access::Write);
    let (old, _) = machine.renew();
    let ticket = machine.memory.update(|t| t.unplug(&machine.shown)).unwrap();
    assert!(machine.memory.ram().by_name("ram").is_some());
    assert!(ticket.wait(Phase::Drained, LONG));
    ticket.destroy().map_err(|(_, error)| error).unwrap();
    assert!(machine.memory.ram().by_name("ram").is_none());
    let again = machine.memory.ram().add(RamSpec::anon("ram", SIZE));
    let again = again.unwrap();
    let named = || machine.memory.ram().by_name("ram").unwrap();
    assert!(Arc::ptr_eq(&named(), &again));
    drop(stuck);
    assert!(old.wait(Phase::Drained, LONG));
    old.destroy().map_err(|(_, error)| error).unwrap();
    assert!(Arc::ptr_eq(&named(), &again));
}

/// Keeps the memory that it is shown until it is told to let go, as a process that has it mapped does.
#[derive(Clone, Default)]
struct Mapper(Arc<Mutex<Vec<RegionHold>>>);

impl Listener for Mapper {
    fn region_add(&mut self, section: &FlatSection) -> Result<(), ListenerError> {
        self.0.lock().unwrap().push(section.hold_as("backend"));
        Ok(())
    }

    fn region_del(&mut self, _section: &FlatSection) {}
}

#[test]
fn what_others_have_mapped_or_may_not_lose_is_kept_whole() {
    let mut machine = Machine::new(Backing::Memfd { thp: false });
    let mapper = Mapper::default();
    let listener = Box::new(mapper.clone());
    let listener = machine.space.add_listener(listener, 0).unwrap();
    let stuck = machine.pin(0..PAGE, Access::Write);
    let (ticket, _) = machine.renew();
    let pinned = [stuck.host_range()];
    // Of what the backend does with it nobody here knows.
    assert_eq!(ticket.free_but(&pinned).unwrap(), SIZE);
    let far = machine.shown.ram_block().unwrap().size_bytes() - PAGE;
    let byte = |ticket: &Ticket| {
        // SAFETY: memory of the block, which the pin keeps.
        unsafe { ticket.block().host().add(far as usize).read_volatile() }
    };
    assert_eq!(byte(&ticket), (far / PAGE) as u8 | 1);
    machine.space.remove_listener(listener).unwrap();
    mapper.0.lock().unwrap().clear();

    let token = machine.memory.discards().disable("gpu0").unwrap();
    assert_eq!(ticket.free_but(&pinned).unwrap(), SIZE);
    assert_eq!(byte(&ticket), (far / PAGE) as u8 | 1);
    drop(token);
    assert_eq!(ticket.free_but(&pinned).unwrap(), PAGE);
    assert_eq!(byte(&ticket), 0);
    drop(stuck);
    assert!(ticket.wait(Phase::Drained, LONG));
    ticket.destroy().map_err(|(_, error)| error).unwrap();
}

#[test]
fn what_is_in_a_file_stays_there() {
    let directory = tempfile::tempdir().unwrap();
    for (share, kept) in [(true, SIZE), (false, PAGE)] {
        let path = directory.path().join(format!("ram-{share}"));
        fs::write(&path, vec![0x55; SIZE as usize]).unwrap();
        let machine = Machine::new(Backing::File {
            path: path.clone(),
            share,
            readonly: false,
        });
        let before = fs::read(&path).unwrap();
        assert_eq!(before[9 * PAGE as usize], if share { 9 } else { 0x55 });
        let stuck = machine.pin(0..PAGE, Access::Write);
        let ticket = machine.memory.update(|t| t.unplug(&machine.shown)).unwrap();
        assert!(ticket.wait(Phase::Draining, LONG));
        assert_eq!(ticket.free_but(&[stuck.host_range()]).unwrap(), kept);
        assert!(fs::read(&path).unwrap() == before, "share {share}");
        drop(stuck);
        assert!(ticket.wait(Phase::Drained, LONG));
        ticket.destroy().map_err(|(_, error)| error).unwrap();
        assert!(fs::read(&path).unwrap() == before, "share {share}");
    }
}

/// What a notifier of the list has heard.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Vec<(bool, u64, u64)>>>);

impl Heard {
    fn note(&self, there: bool, host: NonNull<u8>, used: u64) {
        let host = host.as_ptr() as u64;
        self.0.lock().unwrap().push((there, host, used));
    }
}

impl RamNotifier for Heard {
    fn added(&mut self, host: NonNull<u8>, used: u64, _max: u64) {
        self.note(true, host, used);
    }

    fn removed(&mut self, host: NonNull<u8>, used: u64, _max: u64) {
        self.note(false, host, used);
    }

    fn resized(&mut self, _host: NonNull<u8>, _old: u64, _new: u64) {}
}

#[test]
fn the_list_has_both_as_long_as_both_are_in_use() {
    let mut machine = Machine::new(Backing::Anon { thp: false });
    let (early, late) = (Heard::default(), Heard::default());
    let memory = Arc::clone(&machine.memory);
    let list = memory.ram();
    list.add_notifier(Box::new(early.clone()));
    let old = Arc::clone(machine.shown.ram_block().unwrap());
    let (walk, version) = (list.snapshot(), list.version());
    let stuck = machine.pin(0..PAGE, Access::Write);
    let (ticket, new) = machine.renew();
    list.add_notifier(Box::new(late.clone()));
    assert_eq!(list.version(), version + 1);
    assert_eq!((walk.version(), walk.len()), (version, 1));
    assert_ne!(old.ram_offset(), new.ram_offset());
    for block in [&old, &new] {
        let host = block.host().as_ptr().wrapping_add(9);
        let by_host = list.by_host(host).unwrap();
        let by_offset = list.by_ram_offset(block.ram_offset() + 9).unwrap();
        for (found, offset) in [by_host, by_offset] {
            assert!(Arc::ptr_eq(&found, block) && offset == 9);
        }
    }
    assert_eq!(list.dump().lines().count(), 3);
    drop(stuck);
    assert!(ticket.wait(Phase::Drained, LONG));
    ticket.destroy().map_err(|(_, error)| error).unwrap();
    assert!(list.by_host(old.host().as_ptr()).is_none());
    assert_eq!(list.version(), version + 2);
    let at = |block: &RamBlock| block.host().as_ptr() as u64;
    let end = [(true, at(&new), SIZE), (false, at(&old), SIZE)];
    assert_eq!(early.0.lock().unwrap()[1..], end);
    let heard = late.0.lock().unwrap();
    let mut first = heard[..2].to_vec();
    first.sort_by_key(|(_, host, _)| *host);
    let both = [(true, at(&old), SIZE), (true, at(&new), SIZE)];
    assert_eq!(first, both, "one that comes late is told of both");
    assert_eq!(heard[2..], end[1..]);
}

/// Whether the tracker found the block of what it was shown logged.
#[derive(Clone, Default)]
struct Tracker(Arc<Mutex<Vec<bool>>>);

impl Listener for Tracker {
    fn region_add(&mut self, section: &FlatSection) -> Result<(), ListenerError> {
        let block = section.region.ram_block().unwrap();
        self.0.lock().unwrap().push(block.is_logged());
        Ok(())
    }

    fn region_del(&mut self, _section: &FlatSection) {}
}

#[test]
fn each_has_dirty_pages_of_its_own() {
    let mut machine = Machine::new(Backing::Anon { thp: false });
    let memory = Arc::clone(&machine.memory);
    let log = memory.dirty_log();
    let old = Arc::clone(machine.shown.ram_block().unwrap());
    log.start(Migration).unwrap();
    log.start_block(Display, &old).unwrap();
    let tracker = Tracker::default();
    let listener = Box::new(tracker.clone());
    machine.space.add_listener(listener, 0).unwrap();
    let take = |block: &RamBlock, client| {
        let taken = block.snapshot_and_clear(client, 0..SIZE).unwrap();
        taken.ranges().collect::<Vec<_>>()
    };
    take(&old, Migration);
    take(&old, Display);
    let stuck = machine.pin(3 * PAGE..4 * PAGE, Access::Write);
    let (ticket, new) = machine.renew();
    assert_eq!(*tracker.0.lock().unwrap(), [true, true]);
    // A client for all blocks has the new one from the start; one for the old one has that.
    assert_eq!(take(&new, Migration), [0..SIZE]);
    let error = new.dirty(Display, 0..SIZE).unwrap_err();
    assert!(matches!(error, Error::NotLogged { .. }), "{error}");
    machine.write(7 * PAGE, &[1]);
    drop(stuck);
    assert_eq!(take(&new, Migration), [7 * PAGE..8 * PAGE]);
    assert_eq!(take(&old, Migration), [3 * PAGE..4 * PAGE]);
    assert_eq!(take(&old, Display), [3 * PAGE..4 * PAGE]);
    assert!(ticket.wait(Phase::Drained, LONG));
    ticket.destroy().map_err(|(_, error)| error).unwrap();
    machine.write(9 * PAGE, &[1]);
    assert_eq!(take(&new, Migration), [9 * PAGE..10 * PAGE]);
}

/// Whoever keeps a way to guest memory has the new one at the next use, and what he has of the old one until he lets go.
#[test]
fn kept_ways_lead_to_the_new_memory() {
    let mut machine = Machine::new(Backing::Anon { thp: false });
    let space = Arc::clone(&machine.space);
    let reader = machine.memory.register();
    let ring = CachedMap::new(&space, Gpa(PAGE), 64, Access::ReadWrite);
    let of_ring = || {
        let guard = space.read(&reader);
        let slice = ring.get(&guard).unwrap();
        slice.load_u8(0, Ordering::Relaxed).unwrap()
    };
    assert_eq!(of_ring(), 1);
    let all = RamSpace::new(&space, None);
    let table = all.memory();
    let view = DmaSpace::new(&space, None).memory();
    let at = GuestAddress(2 * PAGE);
    assert_eq!(view.read_obj::<u8>(at).unwrap(), 3);
    let (ticket, new) = machine.renew();
    assert_eq!(ticket.block().pins(), 2, "table and view");
    assert_eq!(of_ring(), 0);
    assert_eq!(view.read_obj::<u8>(at).unwrap(), 0);
    assert_eq!(all.memory().read_obj::<u8>(at).unwrap(), 0);
    assert_eq!(table.read_obj::<u8>(at).unwrap(), 3);
    table.write_obj(0x66_u8, at).unwrap();
    assert_eq!(view.read_obj::<u8>(at).unwrap(), 0);
    drop(table);
    assert!(!ticket.wait(Phase::Drained, Duration::ZERO));
    drop(view);
    assert!(ticket.wait(Phase::Drained, LONG));
    ticket.destroy().map_err(|(_, error)| error).unwrap();
    assert_eq!((new.pins(), of_ring()), (0, 0));
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
