// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A driver that throws random chains at a disk. The disk answers or wants a reset, and never anything else.

mod disk;

use std::sync::Arc;

use disk::{ALL, Options, Rig, SECTOR, SERIAL, pattern};
use ebbtide_lab_driver::blk::{Request, status};
use ebbtide_lab_driver::{Layout, Part, Random, poll};
use ebbtide_memory::{Backing, Gpa, RamBlock, RamSpec, Region};
use ebbtide_virtio::status as device_status;

fn random_part(random: &mut Random, ram: Gpa, writable: bool) -> Part {
    let gpa = match random.below(10) {
        0 => Gpa(random.next()),
        1 => Gpa(1 << 35),
        2 => Gpa((32 << 20) - random.below(600)),
        3 => Gpa(0xe000_0000 + random.below(4096)),
        _ => Gpa(ram.0 + random.below(4096)),
    };
    let len = random.one_of(&[0, 1, 7, 8, 15, 16, 17, 20, 511, 512, 513, 1024, 4096]);
    Part { gpa, len, writable }
}

fn random_chain(random: &mut Random, ram: Gpa) -> Vec<Part> {
    let readable = random.below(4);
    let writable = random.below(4);
    let mut parts: Vec<_> = (0..readable)
        .map(|_| random_part(random, ram, false))
        .collect();
    parts.extend((0..writable).map(|_| random_part(random, ram, true)));
    if parts.is_empty() {
        parts.push(random_part(random, ram, true));
    }
    parts
}

#[test]
fn random_chains() {
    let mut rig = Rig::new();
    let ram = rig.board.ram().clone();
    let area = ram.alloc(16 << 10, 4096);
    let mut random = Random(1);
    let (mut answered, mut resets) = (0, 0);
    for round in 0..3000 {
        // Something that may be a header, everywhere.
        for at in (0..4096).step_by(16) {
            let kind = random.one_of(&[0_u32, 0, 1, 1, 4, 8, 11, 13, 2, 0xffff_ffff]);
            ram.put(Gpa(area.0 + at), &kind);
            ram.put(
                Gpa(area.0 + at + 8),
                &random.one_of(&[0_u64, 1, 8191, 8192, u64::MAX, 1 << 55]),
            );
        }
        let chain = random_chain(&mut random, area);
        let layout = random.one_of(&[Layout::Direct, Layout::Indirect, Layout::Mixed(1)]);
        rig.queue.add(&chain, layout).unwrap();
        rig.driver.kick(0);
        let mut used = None;
        assert!(
            ebbtide_lab_driver::poll(|| {
                used = rig.queue.poll_used();
                used.is_some() || rig.driver.needs_reset()
            }),
            "round {round}: neither an answer nor a wish for a reset for {chain:?}"
        );
        match used {
            Some(used) => {
                answered += 1;
                let room: u32 = chain
                    .iter()
                    .filter(|part| part.writable)
                    .map(|part| part.len)
                    .sum();
                assert!(used.written <= room, "{used:?} for {chain:?}");
            }
            None => {
                resets += 1;
                rig.restart(ALL);
            }
        }
    }
    assert!(
        answered > 500 && resets > 100,
        "{answered} answers, {resets} resets: the chains are not random enough"
    );
    rig.assert_works();
}

#[test]
fn an_id_that_does_not_fit_is_cut() {
    let mut rig = Rig::new();
    for len in [0_usize, 1, 19, 20] {
        let request = Request::raw(rig.board.ram(), 8, 0, &[], Some(len));
        let used = rig
            .driver
            .roundtrip(0, &mut rig.queue, &request.parts(), Layout::Direct)
            .unwrap();
        assert_eq!(request.status(), status::OK);
        assert_eq!(request.data(), &SERIAL.as_bytes()[..len]);
        assert_eq!(used.written as usize, len + 1, "no gap before the status");
    }
    // In pieces, the status in one with the end of the ID.
    let request = Request::get_id(rig.board.ram());
    let answer = rig.board.ram().alloc(21, 1);
    let mut parts = vec![request.parts()[0]];
    for (at, len) in [(0, 7), (7, 1), (8, 13)] {
        parts.push(Part::writable(Gpa(answer.0 + at), len));
    }
    rig.run_laid_out(&request, &parts, Layout::Direct);
    let mut expected = SERIAL.as_bytes()[..20].to_vec();
    expected.push(status::OK);
    assert_eq!(rig.board.ram().read(answer, 21), expected);
}

/// 2 MiB of RAM that is nowhere yet.
fn ram_block(rig: &Rig, name: &str) -> Arc<RamBlock> {
    let spec = RamSpec {
        name: name.into(),
        size_bytes: 2 << 20,
        max_size_bytes: 2 << 20,
        backing: Backing::Anon { thp: false },
        prefault: false,
        block_size_bytes: None,
    };
    rig.board.memory().ram().add(spec).unwrap()
}

/// More RAM right behind the board's own, which ends at 32 MiB.
fn more_ram(rig: &Rig) -> Gpa {
    let at = Gpa(32 << 20);
    let block = ram_block(rig, "more");
    let region = Region::ram("more", &block);
    rig.board
        .memory()
        .update(|map| map.add(rig.board.root(), &region, at.0, 0))
        .unwrap();
    at
}

/// A buffer may lie across two RAM regions, and in so many descriptors that one system call does not do.
#[test]
fn buffers_across_regions_in_many_pieces() {
    let mut rig = Rig::new();
    let border = more_ram(&rig);
    let ram = rig.board.ram().clone();
    let start = Gpa(border.0 - 256);
    let request = Request::read(&ram, 0, SECTOR);
    let [header, _, answer] = request.parts()[..] else {
        panic!("three parts")
    };
    // All name the same bytes: the last to be moved are the ones that stay.
    const PIECES: usize = 1022;
    let mut parts = vec![Part::writable(start, SECTOR); PIECES + 2];
    parts[0] = header;
    parts[PIECES + 1] = answer;
    let used = rig
        .driver
        .roundtrip(0, &mut rig.queue, &parts, Layout::Indirect)
        .unwrap();
    assert_eq!(request.status(), status::OK);
    assert_eq!(used.written as usize, PIECES * SECTOR + 1);
    let all = pattern(PIECES * SECTOR, 0);
    assert_eq!(ram.read(start, SECTOR), all[(PIECES - 1) * SECTOR..]);
    // One more is more than there may be.
    parts.insert(1, Part::writable(start, SECTOR));
    rig.queue.add(&parts, Layout::Indirect).unwrap();
    rig.driver.kick(0);
    assert!(rig.driver.wait_needs_reset());
    rig.restart(ALL);
    rig.assert_works();
}

/// As many pieces as the device says there may be are taken, also from a driver that chose a smaller queue: Linux does not
/// look at the size of its queue then.
#[test]
fn as_many_segments_as_are_told_in_a_small_queue() {
    for queue_size in [256, 1024, 4096, 32768] {
        let mut rig = Rig::with(Options {
            queue_size,
            ..Options::default()
        });
        let told = rig.driver.read_config(12, 4) as usize;
        assert!((254..=1022).contains(&told), "{told} for {queue_size}");
        let request = Request::read(rig.board.ram(), 0, SECTOR);
        let mut parts = request.parts();
        let piece = parts[1];
        parts.splice(1..2, vec![piece; told]);
        let status = rig.run_laid_out(&request, &parts, Layout::Indirect);
        assert_eq!(status, status::OK, "{told} for {queue_size}");
        let all = pattern(told * SECTOR, 0);
        assert_eq!(request.data(), all[(told - 1) * SECTOR..]);
    }
}

/// What has no end in RAM is refused as a whole: nothing is read into the part that is there.
#[test]
fn a_buffer_that_leaves_ram_is_not_begun() {
    let mut rig = Rig::new();
    let ram = rig.board.ram().clone();
    let last = Gpa((32 << 20) - 512);
    ram.write(last, &[0xee; 512]);
    let request = Request::read(&ram, 0, 2 * SECTOR);
    let mut parts = request.parts();
    parts[1].gpa = last;
    assert_eq!(
        rig.run_laid_out(&request, &parts, Layout::Direct),
        status::IOERR
    );
    assert_eq!(ram.read(last, 512), [0xee; 512]);
    more_ram(&rig);
    assert_eq!(
        rig.run_laid_out(&request, &parts, Layout::Direct),
        status::OK
    );
    assert_eq!(ram.read(last, 1024), pattern(1024, 0));
}

/// Registers are no memory: a transfer to its own BAR is a mistake of the driver's and reaches no register.
#[test]
fn a_transfer_to_the_devices_own_registers_is_refused() {
    let mut rig = Rig::new();
    let request = Request::read(rig.board.ram(), 0, SECTOR);
    let mut parts = request.parts();
    for bar in [0, 2] {
        parts[1].gpa = Gpa(rig.driver.pci().bar(bar));
        assert_eq!(
            rig.run_laid_out(&request, &parts, Layout::Direct),
            status::IOERR
        );
        rig.assert_works();
    }
}

/// ROM is memory to read from: headers and data to be written may lie there, data that are read and a status may not.
#[test]
fn requests_in_rom() {
    let mut rig = Rig::new();
    let ram = rig.board.ram().clone();
    let (shown, rom) = (Gpa(64 << 20), Gpa(96 << 20));
    let block = ram_block(&rig, "rom");
    let regions = [
        (shown, Region::ram("shown", &block)),
        (rom, Region::rom("rom", &block)),
    ];
    rig.board
        .memory()
        .update(|map| {
            regions
                .iter()
                .try_for_each(|(at, region)| map.add(rig.board.root(), region, at.0, 0))
        })
        .unwrap();
    ram.write(shown, &pattern(SECTOR, 9));

    let write = Request::write(&ram, 3, &[0; SECTOR]);
    let mut parts = write.parts();
    ram.write(Gpa(shown.0 + 4096), &ram.read(parts[0].gpa, 16));
    (parts[0].gpa, parts[1].gpa) = (Gpa(rom.0 + 4096), rom);
    let written = rig.run_laid_out(&write, &parts, Layout::Direct);
    assert_eq!(written, status::OK);
    assert_eq!(rig.image_bytes(3 * 512, SECTOR), pattern(SECTOR, 9));

    let read = Request::read(&ram, 0, SECTOR);
    let mut parts = read.parts();
    parts[1].gpa = rom;
    let answer = rig.run_laid_out(&read, &parts, Layout::Direct);
    assert_eq!(answer, status::IOERR);
    // Half of the data in RAM: that half is not begun either.
    let mut parts = read.parts();
    let [first, second] = parts[1].split(256);
    ram.write(first.gpa, &[0xee; 256]);
    parts.splice(1..2, [first, Part { gpa: rom, ..second }]);
    let answer = rig.run_laid_out(&read, &parts, Layout::Direct);
    assert_eq!(answer, status::IOERR);
    assert_eq!(ram.read(first.gpa, 256), [0xee; 256]);
    assert_eq!(ram.read(shown, SECTOR), pattern(SECTOR, 9));

    let read = Request::read(&ram, 0, SECTOR);
    let mut parts = read.parts();
    parts[2].gpa = rom;
    rig.queue.add(&parts, Layout::Direct).unwrap();
    rig.driver.kick(0);
    assert!(rig.driver.wait_needs_reset());
    assert_eq!(ram.read(shown, SECTOR), pattern(SECTOR, 9));
    rig.restart(ALL);
    rig.assert_works();
}

/// The bus is reset, as by a write to the reset register, with requests in flight.
#[test]
fn a_reset_of_the_bus_at_any_moment() {
    let mut rig = Rig::new();
    let ram = rig.board.ram().clone();
    for round in 0..40 {
        let requests: Vec<_> = (0..40).map(|i| Request::read(&ram, i, SECTOR)).collect();
        rig.add_all(&requests);
        std::thread::sleep(std::time::Duration::from_micros(round * 11));
        rig.board.bridge().reset();
        rig.board.bridge().assign_bars().unwrap();
        rig.driver.pci().enable();
        rig.driver.pci().enable_msix();
        assert!(poll(|| rig.driver.status() == 0));
        let used = rig.queue.device_used_idx();
        std::thread::sleep(std::time::Duration::from_micros(200));
        assert_eq!(rig.queue.device_used_idx(), used, "touched after a reset");
        rig.restart(ALL);
        rig.assert_works();
    }
}

#[test]
fn a_driver_without_queues_has_a_device_that_does_nothing() {
    let mut rig = Rig::with(Options {
        queues: 4,
        ..Options::default()
    });
    rig.driver.negotiate(ALL).unwrap();
    rig.driver.driver_ok().unwrap();
    (0..5).for_each(|queue| rig.driver.kick(queue));
    assert_eq!(rig.driver.status() & device_status::NEEDS_RESET, 0);
    // Only the last of them.
    rig.driver.negotiate(ALL).unwrap();
    let mut queue = rig.driver.add_queue(3, 16);
    rig.driver.driver_ok().unwrap();
    let request = Request::read(rig.board.ram(), 0, SECTOR);
    rig.driver
        .roundtrip(3, &mut queue, &request.parts(), Layout::Direct)
        .unwrap();
    assert_eq!(request.status(), status::OK);
    rig.restart(ALL);
    rig.assert_works();
}
