// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What no honest driver does: to the transport, to the rings, to every device there is.
//!
//! Nothing of it may panic, hang a vCPU or stop the device for good: at worst the device asks for a reset, and after the
//! reset it works. (A panic on the iothread shows as a device that does not work any more.)

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ebbtide_block::{Disk, DiskSpec};
use ebbtide_iothread::{Blocking, Receiver, channel};
use ebbtide_lab_driver::{Board, DriverQueue, Layout, Part, Random, VirtioDriver, blk, mem};
use ebbtide_memory::{Backing, Gpa, RamSpec, Region};
use ebbtide_virtio::blk::{BlkSpec, VirtioBlk};
use ebbtide_virtio::mem::{MemEvent, MemSpec, VirtioMem};
use ebbtide_virtio::virtq::Descriptor;
use ebbtide_virtio::{VirtioDevice, VirtioPci, features, status};
use support::Echo;

const RAM_BYTES: u64 = 16 << 20;
const QUEUE_SIZE: u16 = 16;
const MEM_ADDR: u64 = 8 << 30;
const BLOCK_BYTES: u64 = 2 << 20;
/// Offset of the device status in the BAR.
const STATUS: u64 = 0x14;
const NEXT: u16 = Descriptor::NEXT;
const WRITE: u16 = Descriptor::WRITE;
const INDIRECT: u16 = Descriptor::INDIRECT;

/// Numbers at which things change, and any.
fn number(random: &mut Random) -> u64 {
    match random.below(6) {
        0 => 0,
        1 => u64::MAX,
        2 => u64::MAX << random.below(64),
        3 => 1 << random.below(64),
        4 => random.below(0x100),
        _ => random.next(),
    }
}

/// A device under attack.
struct Victim {
    board: Board,
    driver: VirtioDriver,
    works: fn(&VirtioDriver, &mut DriverQueue),
    /// What has to live as long as the device.
    _kept: Box<dyn std::any::Any>,
}

impl Victim {
    fn new(
        device: impl FnOnce(&Board) -> (Arc<dyn VirtioDevice>, Box<dyn std::any::Any>),
        works: fn(&VirtioDriver, &mut DriverQueue),
    ) -> Victim {
        let board = Board::new(RAM_BYTES).expect("a board");
        let (device, kept) = device(&board);
        let function = VirtioPci::new(
            "victim",
            device,
            board.space(),
            board.interrupts(),
            &board.remote(),
        )
        .expect("a function");
        let pci = board.attach(function).expect("a slot");
        pci.enable_msix();
        let driver = VirtioDriver::new(&board, pci).expect("a virtio device");
        Victim {
            board,
            driver,
            works,
            _kept: kept,
        }
    }

    fn echo() -> Victim {
        Self::new(
            |board| {
                let echo = Echo::new(board.remote());
                (Arc::clone(&echo) as _, Box::new(echo))
            },
            |driver, queue| {
                let gpa = driver.ram().alloc(2, 1);
                let parts = [Part::readable(gpa, 1), Part::writable(Gpa(gpa.0 + 1), 1)];
                let used = driver
                    .roundtrip(0, queue, &parts, Layout::Direct)
                    .expect("an echo");
                assert_eq!(used.written, 1);
            },
        )
    }

    fn blk() -> Victim {
        Self::new(
            |board| {
                let image = tempfile::NamedTempFile::new().expect("a file");
                image.as_file().set_len(1 << 20).expect("a size");
                let disk = Disk::open(&DiskSpec::new(image.path())).expect("a disk");
                let blk = VirtioBlk::new(BlkSpec::new("disk0"), Arc::new(disk), board.remote());
                (blk as _, Box::new(image))
            },
            |driver, queue| {
                let request = blk::Request::read(driver.ram(), 0, 512);
                driver
                    .roundtrip(0, queue, &request.parts(), Layout::Direct)
                    .expect("a read");
                assert_eq!(request.status(), blk::status::OK);
            },
        )
    }

    fn mem() -> Victim {
        Self::new(
            |board| {
                let size_bytes = 16 * BLOCK_BYTES;
                let spec = RamSpec {
                    name: "vmem0".into(),
                    size_bytes,
                    max_size_bytes: size_bytes,
                    backing: Backing::Anon { thp: false },
                    prefault: false,
                    block_size_bytes: Some(BLOCK_BYTES),
                };
                let block = board.memory().ram().add(spec).expect("a block");
                let region = Region::ram("vmem0", &block);
                board
                    .memory()
                    .update(|map| map.add(board.root(), &region, MEM_ADDR, 0))
                    .expect("a place");
                let blocking = Arc::new(Blocking::new("blocking", 1).expect("a thread"));
                let (events, heard): (_, Receiver<MemEvent>) = channel();
                let spec = MemSpec {
                    requested_bytes: size_bytes / 2,
                    ..MemSpec::new("vmem0", &block, Gpa(MEM_ADDR))
                };
                let mem = VirtioMem::new(spec, board.remote(), Arc::clone(&blocking), events)
                    .expect("a device");
                (mem as _, Box::new((blocking, heard)))
            },
            |driver, queue| {
                let request = mem::Request::new(driver.ram(), mem::Kind::State, MEM_ADDR, 1);
                driver
                    .roundtrip(0, queue, &request.parts(), Layout::Direct)
                    .expect("an answer");
                assert_eq!(request.answer(), mem::Answer::Ack);
            },
        )
    }

    fn all() -> [(&'static str, Victim); 3] {
        [
            ("echo", Self::echo()),
            ("blk", Self::blk()),
            ("mem", Self::mem()),
        ]
    }

    /// (Re)starts the driver with queue 0.
    fn start(&mut self) -> DriverQueue {
        self.driver.negotiate(!support::DISLIKED).expect("features");
        let queue = self.driver.add_queue(0, QUEUE_SIZE);
        self.driver.driver_ok().expect("activation");
        queue
    }

    /// The device works after a reset.
    fn assert_works(&mut self) {
        let mut queue = self.start();
        (self.works)(&self.driver, &mut queue);
        assert!(!self.driver.needs_reset());
    }

    /// The board is reset and its BARs are assigned again.
    fn reboot(&mut self) {
        self.board.bridge().reset();
        self.board.bridge().assign_bars().expect("room");
        let pci = self.driver.pci().clone();
        pci.enable();
        pci.enable_msix();
        self.driver = VirtioDriver::new(&self.board, pci).expect("a virtio device");
    }
}

/// All widths at every offset they are aligned to: the kernel splits others.
fn at_every_offset(len: u64, sizes: &[u8], mut access: impl FnMut(u64, u8)) {
    for offset in 0..len {
        for &size in sizes
            .iter()
            .filter(|size| offset.is_multiple_of(u64::from(**size)))
        {
            access(offset, size);
        }
    }
}

#[test]
fn registers_take_every_width_at_every_offset() {
    for (name, mut victim) in Victim::all() {
        let mut random = Random(1);
        let bar = victim.driver.pci().bar(0);
        for keep_active in [true, false] {
            victim.start();
            at_every_offset(0x4000, &[1, 2, 4, 8], |offset, size| {
                if !(keep_active && offset == STATUS && size == 1) {
                    victim
                        .driver
                        .pci()
                        .store(bar + offset, size, number(&mut random));
                }
                victim.driver.pci().load(bar + offset, size);
            });
            assert!(
                !keep_active || victim.driver.status() & status::DRIVER_OK != 0,
                "{name}"
            );
        }
        victim.assert_works();
        println!("{name}: fine");
    }
}

#[test]
fn msix_takes_every_width_at_every_offset() {
    let mut victim = Victim::echo();
    let mut random = Random(2);
    let mut queue = victim.start();
    let bar = victim.driver.pci().bar(2);
    at_every_offset(0x1000, &[1, 2, 4, 8], |offset, size| {
        victim
            .driver
            .pci()
            .store(bar + offset, size, number(&mut random));
        victim.driver.pci().load(bar + offset, size);
    });
    // Vectors go nowhere now, chains still do.
    (victim.works)(&victim.driver, &mut queue);
    victim.reboot();
    victim.assert_works();
}

#[test]
fn configuration_space_takes_every_width_at_every_offset() {
    for (name, mut victim) in Victim::all() {
        let mut random = Random(3);
        victim.start();
        for round in 0..2 {
            at_every_offset(
                if round == 0 { 4096 } else { 256 },
                &[1, 2, 4],
                |offset, size| {
                    let offset = u16::try_from(offset).expect("a small offset");
                    victim
                        .driver
                        .pci()
                        .write_config(offset, size, number(&mut random) as u32);
                    victim.driver.pci().read_config(offset, size);
                },
            );
        }
        victim.reboot();
        victim.assert_works();
        println!("{name}: fine");
    }
}

#[test]
fn several_cpus_write_everywhere_while_the_device_works() {
    for (name, mut victim) in Victim::all() {
        let mut queue = victim.start();
        let bar = victim.driver.pci().bar(0);
        let stop = AtomicBool::new(false);
        let pci = victim.driver.pci().clone();
        std::thread::scope(|scope| {
            for seed in 0..2 {
                let (pci, stop) = (&pci, &stop);
                scope.spawn(move || {
                    let mut random = Random(100 + seed);
                    while !stop.load(Ordering::Relaxed) {
                        let size = 1 << random.below(4);
                        // The common configuration above all, and of that the status.
                        let offset = match random.below(4) {
                            0 => random.below(0x4000 / size) * size,
                            1 => STATUS,
                            _ => random.below(0x40 / size) * size,
                        };
                        let value = if offset == STATUS && random.below(3) > 0 {
                            0xf
                        } else {
                            number(&mut random)
                        };
                        pci.store(bar + offset, u8::try_from(size).expect("a width"), value);
                        pci.load(bar + offset, 4);
                    }
                });
            }
            // Meanwhile a driver tries to do its work.
            for _ in 0..200 {
                let part = Part::readable(victim.board.ram().alloc(64, 8), 64);
                if queue.add(&[part], Layout::Direct).is_none() {
                    queue = DriverQueue::new(victim.board.ram(), QUEUE_SIZE, true);
                }
                victim.driver.program_queue(0, queue.config());
                victim.driver.write_common(0x1c, 2, 1);
                victim.driver.set_status(status::DRIVER_OK);
                victim.driver.kick(0);
            }
            stop.store(true, Ordering::Relaxed);
        });
        victim.assert_works();
        println!("{name}: fine");
    }
}

/// Writes a descriptor.
type Write<'a> = &'a dyn Fn(u16, u64, u32, u16, u16);
/// What is wrong, how to write it (descriptor 0 is the head), and the available index.
type WrongRing = (&'static str, Box<dyn Fn(Write<'_>)>, u16);

/// Rings no device can make sense of.
fn wrong_rings(table: u64) -> Vec<WrongRing> {
    let buffer = 0x8000;
    let one = move |flags: u16, address: u64, length: u32, next: u16| {
        Box::new(move |write: Write<'_>| write(0, address, length, flags, next))
            as Box<dyn Fn(Write<'_>)>
    };
    vec![
        ("a loop of one", one(NEXT, buffer, 1, 0), 1),
        (
            "a loop of two",
            Box::new(move |write| {
                write(0, buffer, 1, NEXT, 1);
                write(1, buffer, 1, NEXT, 0);
            }),
            1,
        ),
        (
            "a link outside the table",
            one(NEXT, buffer, 1, QUEUE_SIZE),
            1,
        ),
        (
            "a link far outside the table",
            one(NEXT, buffer, 1, 0xffff),
            1,
        ),
        (
            "more than 4 GiB",
            Box::new(move |write| {
                write(0, buffer, u32::MAX, NEXT, 1);
                write(1, buffer, u32::MAX, WRITE, 0);
            }),
            1,
        ),
        ("a buffer around the end", one(0, u64::MAX, 2, 0), 1),
        (
            "readable behind writable",
            Box::new(move |write| {
                write(0, buffer, 16, WRITE | NEXT, 1);
                write(1, buffer, 16, 0, 0);
            }),
            1,
        ),
        ("an empty table", one(INDIRECT, table, 0, 0), 1),
        ("a crooked table", one(INDIRECT, table, 17, 0), 1),
        (
            "a table that is no RAM",
            one(INDIRECT, 0x7_0000_0000, 16, 0),
            1,
        ),
        (
            "a table around the end",
            one(INDIRECT, u64::MAX - 15, 32, 0),
            1,
        ),
        ("a huge table", one(INDIRECT, table, !15, 0), 1),
        (
            "a table and a successor",
            one(INDIRECT | NEXT, table, 16, 1),
            1,
        ),
        ("a jump of the index", one(0, buffer, 1, 0), QUEUE_SIZE + 1),
        ("a far jump of the index", one(0, buffer, 1, 0), 0x8000),
        ("an index that goes back", one(0, buffer, 1, 0), 0xffff),
    ]
}

#[test]
fn wrong_rings_make_every_device_ask_for_a_reset() {
    for (name, mut victim) in Victim::all() {
        let ram = victim.board.ram().clone();
        let table = ram.alloc(64 << 10, 16);
        // The table's first descriptor points to the table: indirect in indirect, where the table itself is fine.
        let nested = Descriptor::new(table.0, 16, INDIRECT, 0);
        ram.put(table, &nested);
        let mut cases = wrong_rings(table.0);
        cases.push((
            "indirect in indirect",
            Box::new(move |write| write(0, table.0, 16, INDIRECT, 0)),
            1,
        ));
        for (what, case, index) in cases {
            let mut queue = victim.start();
            case(&|at, address, length, flags, next| {
                queue.set_descriptor(at, &Descriptor::new(address, length, flags, next));
            });
            queue.make_available(0);
            queue.set_avail_idx(index);
            victim.driver.kick(0);
            assert!(victim.driver.wait_needs_reset(), "{name}: {what}");
            assert_eq!(queue.device_used_idx(), 0, "{name}: {what}");
        }
        victim.assert_works();
    }
}

#[test]
fn a_head_outside_the_table_makes_every_device_ask_for_a_reset() {
    for (name, mut victim) in Victim::all() {
        for head in [QUEUE_SIZE, 0xffff] {
            let mut queue = victim.start();
            queue.make_available(head);
            victim.driver.kick(0);
            assert!(victim.driver.wait_needs_reset(), "{name}: {head}");
        }
        victim.assert_works();
    }
}

/// One random ring: descriptors, available entries, index.
fn scribble(random: &mut Random, victim: &Victim, queue: &mut DriverQueue, area: Gpa) {
    for at in 0..QUEUE_SIZE {
        let address = match random.below(4) {
            0 => number(random),
            1 => MEM_ADDR + random.below(BLOCK_BYTES * 20),
            _ => area.0 + random.below(0x4000),
        };
        let length = match random.below(3) {
            0 => number(random) as u32,
            1 => 16 * random.below(40) as u32,
            _ => [0, 1, 10, 16, 24, 512, 513][random.below(7) as usize],
        };
        let flags = if random.below(8) == 0 {
            random.next() as u16
        } else {
            random.below(4) as u16
        };
        let next = if random.below(8) == 0 {
            random.next() as u16
        } else {
            random.below(16) as u16
        };
        queue.set_descriptor(at, &Descriptor::new(address, length, flags, next));
    }
    let bytes: Vec<u8> = (0..0x4000 / 8)
        .flat_map(|_| number(random).to_le_bytes())
        .collect();
    victim.board.ram().write(area, &bytes);
    for _ in 0..1 + random.below(4) {
        queue.make_available(random.below(u64::from(QUEUE_SIZE)) as u16);
    }
}

#[test]
fn random_rings_break_nothing_for_good() {
    for (name, mut victim) in Victim::all() {
        let mut random = Random(7);
        let area = victim.board.ram().alloc(0x4000, 4096);
        for _ in 0..150 {
            let mut queue = victim.start();
            scribble(&mut random, &victim, &mut queue, area);
            victim.driver.kick(0);
            // Sometimes the reset comes while it is still at it.
            if random.below(2) == 0 {
                std::thread::sleep(std::time::Duration::from_micros(random.below(500)));
            }
        }
        victim.assert_works();
        println!("{name}: fine");
    }
}

#[test]
fn a_driver_that_never_takes_its_chains_back_is_stopped() {
    let mut victim = Victim::echo();
    let mut queue = victim.start();
    queue.set_descriptor(0, &Descriptor::new(0x8000, 1, 0, 0));
    // The device returns each chain at once, so the same one may be available again and again.
    for _ in 0..1000 {
        queue.make_available(0);
        victim.driver.kick(0);
        assert!(ebbtide_lab_driver::poll(
            || queue.device_used_idx() == queue.avail_idx()
        ));
    }
    assert!(!victim.driver.needs_reset());
    // Once more than the queue holds, at once.
    (0..=QUEUE_SIZE).for_each(|_| queue.make_available(0));
    victim.driver.kick(0);
    assert!(victim.driver.wait_needs_reset());
    victim.assert_works();
}

#[test]
fn features_no_device_has_are_never_negotiated() {
    for (name, mut victim) in Victim::all() {
        let mut random = Random(11);
        let offered = victim.driver.offered();
        for _ in 0..100 {
            let wanted = number(&mut random) | features::VERSION_1;
            victim.driver.reset().expect("a reset");
            victim
                .driver
                .set_status(status::ACKNOWLEDGE | status::DRIVER);
            victim.driver.set_features(wanted);
            victim.driver.set_status(status::FEATURES_OK);
            let accepted = victim.driver.status() & status::FEATURES_OK != 0;
            assert!(!accepted || wanted & !offered == 0, "{name}: {wanted:#x}");
        }
        victim.assert_works();
    }
}
