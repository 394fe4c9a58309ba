// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;

use ebbtide_iothread::{Config, ManualClock};
use ebbtide_memory::{
    Access, AddressSpace, Backing, Gpa, MemoryConfig, Pin, RamSpec, Reader, Region,
};

use super::*;
use crate::guest_ram::Shown;

const PAGE: u64 = 4096;
const LOW: Range<u64> = 0..2 << 20;
const HIGH: Range<u64> = 4 << 30..(4 << 30) + (1 << 20);
/// What the last guest's disk gives, late.
const LATE: u8 = 0x66;

/// The memory of a machine, and what a disk has of it.
struct World {
    memory: Arc<Memory>,
    space: Arc<AddressSpace>,
    reader: Reader,
    ram: GuestRam,
    blocking: Arc<Blocking>,
    local: Local,
    /// What the disk says that it has pinned.
    pinned: Rc<RefCell<Vec<PinnedList>>>,
    ending: Rc<RefCell<Option<ShutdownCause>>>,
    /// What monitors are told that the reset waits for.
    waited_for: Rc<RefCell<Vec<String>>>,
}

fn run<F: Future>(test: impl FnOnce(World) -> F) {
    with(Backing::Anon { thp: false }, test);
}

fn with<F: Future>(backing: Backing, test: impl FnOnce(World) -> F) {
    with_config(Config::default(), backing, test);
}

fn with_config<F: Future>(config: Config, backing: Backing, test: impl FnOnce(World) -> F) {
    let ran = ebbtide_iothread::run_with("test", config, |local| async move {
        let memory = Memory::new(MemoryConfig {
            arena_bytes: 1 << 30,
        })
        .unwrap();
        let root = Region::container("system", 1 << 40);
        let space = memory.address_space("memory", &root).unwrap();
        let bytes = LOW.end + HIGH.end - HIGH.start;
        let spec = RamSpec {
            backing,
            ..RamSpec::anon("ram", bytes)
        };
        let block = memory.ram().add(spec).unwrap();
        let parts = Shown::Parts(vec![("low", LOW), ("high", HIGH)]);
        let ram = GuestRam::new(&memory, &root, block, parts).unwrap();
        let world = World {
            reader: memory.register(),
            blocking: Arc::new(Blocking::new("blocking", 1).unwrap()),
            memory,
            space,
            ram,
            local,
            pinned: Rc::default(),
            ending: Rc::default(),
            waited_for: Rc::default(),
        };
        test(world).await;
    });
    ran.unwrap();
}

impl World {
    /// A request of a disk for one page that the host has, and does not answer.
    fn request(&self, at: u64, access: Access) -> Pin {
        let pin = self.unknown(at, access);
        self.pinned.borrow_mut().push(vec![pin.host_range()]);
        pin
    }

    /// Somebody who does not say what he has.
    fn unknown(&self, at: u64, access: Access) -> Pin {
        let guard = self.space.read(&self.reader);
        guard.pin(Gpa(at), PAGE as usize, access).unwrap()
    }

    fn page(&self, at: u64) -> Vec<u8> {
        let mut page = vec![0; PAGE as usize];
        let guard = self.space.read(&self.reader);
        guard.read_bytes(Gpa(at), &mut page).unwrap();
        page
    }

    fn fill(&self, at: u64, byte: u8) {
        let guard = self.space.read(&self.reader);
        guard.write_bytes(Gpa(at), &[byte; PAGE as usize]).unwrap();
    }

    /// Whether the guest has `byte` anywhere.
    fn holds(&self, byte: u8) -> bool {
        let mut pages = LOW.chain(HIGH).step_by(PAGE as usize);
        pages.any(|at| self.page(at).contains(&byte))
    }

    async fn part(&self) -> Option<ShutdownCause> {
        self.part_of(&[&self.ram]).await
    }

    async fn part_of(&self, places: &[&dyn Place]) -> Option<ShutdownCause> {
        let parting = Parting {
            memory: &self.memory,
            blocking: &self.blocking,
            local: &self.local,
            patience: Duration::from_secs(1),
            pinned: &|| self.pinned.borrow().clone(),
            ending: &|| *self.ending.borrow(),
            waits_for: &|memory| *self.waited_for.borrow_mut() = memory,
        };
        parting.part(places).await
    }

    fn blocks(&self) -> usize {
        self.memory.ram().blocks().len()
    }

    async fn until(&self, what: impl Fn(&World) -> bool) {
        let limit = self.local.now() + Duration::from_secs(60);
        while !what(self) {
            assert!(self.local.now() < limit, "it does not come to that");
            self.local.sleep(LOOK).await;
        }
    }
}

#[test]
fn what_the_host_has_in_flight_is_not_in_the_memory_of_the_next_guest() {
    run(|world| async move {
        world.fill(HIGH.start, 0x11);
        let read = world.request(LOW.start + 5 * PAGE, Access::Write);
        let write = world.request(HIGH.start, Access::Read);
        // As long as it is one guest's memory the read is seen.
        read.write_at(0, &[LATE; 8]).unwrap();
        assert!(world.holds(LATE));

        let old = world.ram.block();
        assert!(world.part().await.is_none());
        let new = world.ram.block();
        assert!(!Arc::ptr_eq(&old, &new));
        assert_eq!((new.name(), new.size_bytes()), ("ram", old.size_bytes()));
        assert!(!world.holds(LATE) && !world.holds(0x11), "it is not empty");
        world.fill(LOW.start + 5 * PAGE, 0x22);
        world.fill(HIGH.start, 0x33);

        read.write_at(0, &[LATE; PAGE as usize]).unwrap();
        assert!(!world.holds(LATE), "the read is in the next guest's memory");
        let mut written = [0; PAGE as usize];
        write.read_at(0, &mut written).unwrap();
        assert_eq!(
            written, [0x11; PAGE as usize],
            "the disk is written other data"
        );
        let next = [world.page(LOW.start + 5 * PAGE), world.page(HIGH.start)];
        assert_eq!(next, [vec![0x22; PAGE as usize], vec![0x33; PAGE as usize]]);

        drop((old, read));
        world.local.sleep(LOOK * 4).await;
        assert_eq!(
            world.blocks(),
            2,
            "it is free before the last request ended"
        );
        drop(write);
        world.until(|world| world.blocks() == 1).await;
    });
}

#[test]
fn memory_that_nobody_uses_stays() {
    let clock = ManualClock::new();
    let config = Config {
        clock: clock.clock(),
        ..Config::default()
    };
    with_config(config, Backing::Anon { thp: false }, |world| async move {
        let request = world.request(0, Access::Write);
        let old = world.ram.block();
        let (local, pinned) = (world.local.clone(), Rc::clone(&world.pinned));
        let memory = Arc::clone(&world.memory);
        // It was given up, and lets go: while there is time, which stands still until then.
        let ends = world.local.spawn(async move {
            memory.grace().await;
            for _ in 0..SETTLE.as_millis() / LOOK.as_millis() / 4 {
                clock.advance(LOOK);
                local.yield_now().await;
            }
            pinned.borrow_mut().clear();
            drop(request);
            loop {
                clock.advance(LOOK);
                local.yield_now().await;
            }
        });
        assert!(world.part().await.is_none());
        drop(ends);
        assert!(Arc::ptr_eq(&old, &world.ram.block()));
        assert_eq!(world.blocks(), 1);
    });
}

#[test]
fn who_does_not_say_what_is_in_use_has_all_of_it_kept() {
    run(|world| async move {
        for at in [0, PAGE, HIGH.start] {
            world.fill(at, 0x11);
        }
        let known = world.request(0, Access::Read);
        let unknown = world.unknown(HIGH.start, Access::Read);
        assert!(world.part().await.is_none());
        let mut written = [0; PAGE as usize];
        for pin in [&known, &unknown] {
            pin.read_at(0, &mut written).unwrap();
            assert_eq!(written, [0x11; PAGE as usize]);
        }
        assert!(!world.holds(0x11));
        drop((known, unknown));
        world.until(|world| world.blocks() == 1).await;
    });
}

#[test]
fn a_reset_after_the_other_keeps_one_page_for_each_request_that_is_never_answered() {
    run(|world| async move {
        let mut requests = Vec::new();
        for reset in 0..6 {
            let at = reset * PAGE;
            for page in LOW.step_by(PAGE as usize) {
                world.fill(page, 0x11);
            }
            requests.push(world.request(at, Access::Write));
            let old = world.ram.block();
            assert!(resident(&old) >= LOW.end);
            assert!(world.part().await.is_none());
            assert_eq!(resident(&old), PAGE);
            assert_eq!(world.blocks() as u64, reset + 2);
        }
        // None of its old requests is in the way of a reset that has no new one.
        assert!(world.part().await.is_none());
        assert_eq!(world.blocks(), 7);
        for request in requests {
            request.write_at(0, &[LATE; PAGE as usize]).unwrap();
        }
        assert!(!world.holds(LATE));
        world.until(|world| world.blocks() == 1).await;
    });
}

/// Bytes that the host has given to a block.
fn resident(block: &RamBlock) -> u64 {
    let start = block.host().as_ptr() as u64;
    let all = start..start + block.size_bytes();
    let (mut inside, mut kib) = (false, 0);
    for line in std::fs::read_to_string("/proc/self/smaps").unwrap().lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((from, _)) = first.split_once('-') {
            inside = u64::from_str_radix(from, 16).is_ok_and(|from| all.contains(&from));
        } else if inside && first == "Rss:" {
            kib += words.next().unwrap().parse::<u64>().unwrap();
        }
    }
    kib * 1024
}

fn file(directory: &tempfile::TempDir) -> Backing {
    let path: PathBuf = directory.path().join("ram");
    Backing::File {
        path,
        share: true,
        readonly: false,
    }
}

#[test]
fn a_file_has_no_other_in_its_place_and_is_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    with(file(&directory), |world| async move {
        let read = world.request(0, Access::Write);
        let old = world.ram.block();
        let local = world.local.clone();
        let ended = Rc::new(RefCell::new(false));
        let says = Rc::clone(&ended);
        let ends = world.local.spawn(async move {
            local.sleep(SETTLE * 3).await;
            *says.borrow_mut() = true;
            drop(read);
        });
        assert!(world.part().await.is_none());
        assert!(*ended.borrow(), "the reset did not wait");
        ends.await;
        assert!(Arc::ptr_eq(&old, &world.ram.block()));
    });
}

#[test]
fn who_waits_for_ever_says_for_what_and_can_be_ended() {
    let directory = tempfile::tempdir().unwrap();
    with(file(&directory), |world| async move {
        let _never = world.request(0, Access::Write);
        let (local, ending) = (world.local.clone(), Rc::clone(&world.ending));
        let waited_for = Rc::clone(&world.waited_for);
        let ends = world.local.spawn(async move {
            while waited_for.borrow().is_empty() {
                local.sleep(LOOK).await;
            }
            assert_eq!(*waited_for.borrow(), ["ram"]);
            *ending.borrow_mut() = Some(ShutdownCause::HostQmpQuit);
        });
        assert_eq!(world.part().await, Some(ShutdownCause::HostQmpQuit));
        ends.await;
    });
}

/// A place that shows what it shows.
struct Stubborn<'w>(&'w GuestRam);

impl Place for Stubborn<'_> {
    fn block(&self) -> Option<Arc<RamBlock>> {
        Place::block(self.0)
    }

    fn replace(&self, _new: &Arc<RamBlock>) -> Result<Ticket, String> {
        Err("it is on its way out".into())
    }
}

#[test]
fn what_cannot_be_replaced_after_all_is_waited_for_and_nothing_is_left_over() {
    run(|world| async move {
        let _never = world.request(0, Access::Write);
        *world.ending.borrow_mut() = Some(ShutdownCause::HostSignal);
        let stubborn = Stubborn(&world.ram);
        let ended = world.part_of(&[&stubborn]).await;
        assert_eq!(ended, Some(ShutdownCause::HostSignal));
        world.until(|world| world.blocks() == 1).await;
        // The guest still has what it had, and a later reset can replace it.
        assert!(world.part().await.is_none());
        assert_eq!(world.blocks(), 2);
    });
}
