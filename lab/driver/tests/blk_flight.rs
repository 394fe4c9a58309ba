// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The block device with requests in flight: batches, reordering, resets, memory that goes.

mod disk;

use std::time::{Duration, Instant};

use disk::{ALL, Rig, SECTOR, pattern, pattern_at};
use ebbtide_block::OpKind;
use ebbtide_block::fault::{Fault, Order, Point, Rule};
use ebbtide_lab_driver::blk::{Request, status};
use ebbtide_lab_driver::{DriverQueue, GuestRam, Layout, Part, block_on, poll};
use ebbtide_memory::{Backing, Gpa, RamSpec, Region};
use ebbtide_virtio::virtq::Descriptor;
use ebbtide_virtio::{features, status as device_status};

const SOON: Duration = Duration::from_millis(50);
const LATER: Duration = Duration::from_secs(60);

fn hold_all(rig: &Rig, point: Point) {
    rig.faults.inject(Rule::always(Fault::Hold).at(point));
}

fn wait_held(rig: &Rig, count: usize) {
    assert!(
        poll(|| rig.faults.held() == count),
        "{} of {count} held",
        rig.faults.held()
    );
}

#[test]
fn a_batch_gets_one_interrupt() {
    let mut rig = Rig::new();
    hold_all(&rig, Point::After);
    let ram = rig.board.ram().clone();
    let requests: Vec<_> = (0..64).map(|i| Request::read(&ram, i, SECTOR)).collect();
    rig.add_all(&requests);
    wait_held(&rig, 64);
    assert!(!rig.queue.enable_interrupts());
    let message = rig.driver.queue_message(0);
    let before = rig.driver.interrupts(message);
    rig.faults.clear();
    rig.faults.release(Order::Shuffled { seed: 5 });
    // A driver that takes answers as they come wants to be told of the next.
    assert!(rig.driver.wait_interrupt(message, before + 1));
    assert!(poll(|| rig.queue.device_used_idx() == 64));
    std::thread::sleep(SOON);
    assert_eq!(rig.driver.interrupts(message) - before, 1);
    for _ in 0..64 {
        rig.driver.wait_used(&mut rig.queue).unwrap();
    }
    for (sector, request) in requests.iter().enumerate() {
        assert_eq!(request.status(), status::OK);
        assert_eq!(request.data(), pattern_at(sector * SECTOR, SECTOR, 0));
    }
}

#[test]
fn answers_in_any_order_go_to_their_requests() {
    let mut rig = Rig::new();
    for seed in 0..8 {
        hold_all(
            &rig,
            if seed % 2 == 0 {
                Point::Before
            } else {
                Point::After
            },
        );
        let ram = rig.board.ram().clone();
        let requests: Vec<_> = (0..32_u64)
            .map(|i| match i % 2 {
                0 => Request::read(&ram, i * 8, 4096),
                _ => Request::write(&ram, i * 8, &pattern(4096, i as u8)),
            })
            .collect();
        let heads = rig.add_all(&requests);
        wait_held(&rig, 32);
        rig.faults.clear();
        rig.faults.release(Order::Shuffled { seed });
        let mut seen: Vec<_> = (0..32)
            .map(|_| rig.driver.wait_used(&mut rig.queue).unwrap().head)
            .collect();
        seen.sort_unstable();
        let mut heads = heads;
        heads.sort_unstable();
        assert_eq!(seen, heads);
        for (i, request) in requests.iter().enumerate() {
            assert_eq!(request.status(), status::OK);
            let expected = if i % 2 == 0 {
                pattern_at(i * 4096, 4096, 0)
            } else {
                pattern(4096, i as u8)
            };
            assert_eq!(rig.image_bytes(i as u64 * 4096, 4096), expected);
            assert_eq!(request.data(), expected);
        }
    }
}

#[test]
fn a_full_queue_again_and_again() {
    let mut rig = Rig::new();
    let ram = rig.board.ram().clone();
    for round in 0..20 {
        let requests: Vec<_> = (0..85)
            .map(|i| Request::read(&ram, i + round, SECTOR))
            .collect();
        rig.add_all(&requests);
        for _ in 0..requests.len() {
            rig.driver.wait_used(&mut rig.queue).unwrap();
        }
        assert!(
            requests
                .iter()
                .all(|request| request.status() == status::OK)
        );
    }
    assert_eq!(rig.blk.metrics().read.requests, 20 * 85);
    assert_eq!(rig.blk.metrics().in_flight, 0);
}

/// Chains that arrive while the device is about to sleep: it must not, or the driver waits for ever.
#[test]
fn chains_at_the_moment_the_device_falls_asleep() {
    for wanted in [ALL, ALL & !features::RING_EVENT_IDX] {
        let mut rig = Rig::new();
        rig.restart(wanted);
        let request = Request::get_id(rig.board.ram());
        for round in 0..4000_u32 {
            for _ in 0..round % 211 * 8 {
                std::hint::spin_loop();
            }
            rig.queue.add(&request.parts(), Layout::Direct).unwrap();
            if rig.queue.needs_kick() {
                rig.driver.kick(0);
            }
            let began = Instant::now();
            while rig.queue.poll_used().is_none() {
                assert!(began.elapsed() < LATER, "round {round}: the device sleeps");
            }
        }
    }
}

/// Answers that arrive while the driver is about to sleep: an interrupt must follow, or it sleeps for ever.
#[test]
fn answers_at_the_moment_the_driver_falls_asleep() {
    for wanted in [ALL, ALL & !features::RING_EVENT_IDX] {
        let mut rig = Rig::new();
        rig.restart(wanted);
        let request = Request::get_id(rig.board.ram());
        let message = rig.driver.queue_message(0);
        for round in 0..3000_u32 {
            rig.queue.disable_interrupts();
            rig.queue.add(&request.parts(), Layout::Direct).unwrap();
            if rig.queue.needs_kick() {
                rig.driver.kick(0);
            }
            for _ in 0..round % 307 * 8 {
                std::hint::spin_loop();
            }
            while rig.queue.poll_used().is_none() {
                let seen = rig.driver.interrupts(message);
                if !rig.queue.enable_interrupts() {
                    assert!(
                        rig.driver.wait_interrupt(message, seen + 1),
                        "round {round}: no interrupt, used index {}",
                        rig.queue.device_used_idx()
                    );
                }
            }
        }
    }
}

#[test]
fn a_driver_that_polls_gets_no_interrupts() {
    for wanted in [ALL, ALL & !features::RING_EVENT_IDX] {
        let mut rig = Rig::new();
        rig.restart(wanted);
        let before = rig.driver.interrupts(rig.driver.queue_message(0));
        for _ in 0..50 {
            rig.queue.disable_interrupts();
            rig.assert_works();
        }
        assert_eq!(rig.driver.interrupts(rig.driver.queue_message(0)), before);
    }
}

#[test]
fn without_event_indices() {
    let mut rig = Rig::new();
    rig.restart(ALL & !features::RING_EVENT_IDX);
    for _ in 0..100 {
        rig.assert_works();
    }
}

/// A reset waits for the backend; what comes late touches neither memory nor rings.
#[test]
fn reset_with_requests_in_flight() {
    let mut rig = Rig::new();
    hold_all(&rig, Point::Before);
    let ram = rig.board.ram().clone();
    let requests: Vec<_> = (0..8).map(|i| Request::read(&ram, i, SECTOR)).collect();
    rig.add_all(&requests);
    wait_held(&rig, 8);
    rig.driver
        .write_common(ebbtide_lab_driver::common::STATUS, 1, 0);
    std::thread::sleep(SOON);
    assert_ne!(
        rig.driver.status(),
        0,
        "the reset is complete with requests in flight"
    );
    assert_eq!(rig.queue.device_used_idx(), 0);
    rig.faults.release(Order::Reverse);
    assert!(poll(|| rig.driver.status() == 0));
    assert_eq!(rig.queue.device_used_idx(), 0, "a reset queue was touched");
    assert_eq!(rig.blk.metrics().in_flight, 0);
    rig.faults.clear();
    rig.restart(ALL);
    rig.assert_works();
}

#[test]
fn requests_that_come_with_a_reset_are_not_touched() {
    let mut rig = Rig::new();
    hold_all(&rig, Point::Before);
    let ram = rig.board.ram().clone();
    let first = [Request::read(&ram, 0, SECTOR)];
    rig.add_all(&first);
    wait_held(&rig, 1);
    rig.driver
        .write_common(ebbtide_lab_driver::common::STATUS, 1, 0);
    let late = Request::write(&ram, 0, &[0xee; 512]);
    rig.queue.add(&late.parts(), Layout::Direct).unwrap();
    rig.driver.kick(0);
    rig.faults.clear();
    rig.faults.release(Order::Arrival);
    assert!(poll(|| rig.driver.status() == 0));
    std::thread::sleep(SOON);
    assert_eq!(late.status(), status::UNTOUCHED);
    assert_eq!(rig.image_bytes(0, 512), pattern(512, 0));
}

#[test]
fn resets_at_any_moment() {
    let mut rig = Rig::new();
    let ram = rig.board.ram().clone();
    for round in 0..60_u64 {
        if round % 3 == 0 {
            rig.faults.inject(Rule {
                count: 20,
                ..Rule::always(Fault::Delay(Duration::from_millis(round % 5)))
            });
        }
        let requests: Vec<_> = (0..40).map(|i| Request::read(&ram, i, SECTOR)).collect();
        rig.add_all(&requests);
        if round % 4 == 0 {
            std::thread::sleep(Duration::from_micros(round * 20));
        }
        rig.driver.reset().unwrap();
        let used = rig.queue.device_used_idx();
        std::thread::sleep(Duration::from_micros(200));
        assert_eq!(
            rig.queue.device_used_idx(),
            used,
            "a reset queue was touched"
        );
        rig.faults.clear();
        rig.restart(ALL);
        rig.assert_works();
    }
}

/// A request may name so many ranges that the host zeroes for minutes: the reset waits for one of them, not for all.
#[test]
fn a_reset_ends_a_request_between_two_ranges() {
    let mut rig = Rig::new();
    hold_all(&rig, Point::After);
    let ram = rig.board.ram().clone();
    let segment = |sector| ebbtide_lab_driver::blk::Segment {
        sector,
        sectors: 1,
        flags: 0,
    };
    let segments: Vec<_> = (0..32).map(segment).collect();
    rig.add_all(&[Request::write_zeroes(&ram, &segments)]);
    wait_held(&rig, 1);
    rig.driver
        .write_common(ebbtide_lab_driver::common::STATUS, 1, 0);
    rig.faults.release(Order::Arrival);
    assert!(poll(|| rig.driver.status() == 0));
    assert_eq!(rig.image_bytes(0, SECTOR), [0; SECTOR]);
    assert_eq!(
        rig.image_bytes(SECTOR as u64, SECTOR),
        pattern_at(SECTOR, SECTOR, 0)
    );
    rig.faults.clear();
    rig.restart(ALL);
    rig.assert_works();
}

#[test]
fn quiescing_waits_for_the_backend_and_says_so() {
    let mut rig = Rig::new();
    hold_all(&rig, Point::After);
    let ram = rig.board.ram().clone();
    let requests = [Request::write(&ram, 0, &[1; 512])];
    rig.add_all(&requests);
    wait_held(&rig, 1);
    assert!(block_on(rig.function.quiesce(), SOON).is_none());
    assert_eq!(rig.blk.metrics().in_flight, 1);
    rig.faults.release(Order::Arrival);
    assert!(block_on(rig.function.quiesce(), LATER).is_some());
    assert_eq!(rig.blk.metrics().in_flight, 0);
}

/// A sparse block at 8 GiB with one plugged block of 2 MiB.
fn pluggable(rig: &Rig) -> (std::sync::Arc<ebbtide_memory::RamBlock>, Gpa) {
    let block = rig
        .board
        .memory()
        .ram()
        .add(RamSpec {
            name: "dimm".into(),
            size_bytes: 16 << 20,
            max_size_bytes: 16 << 20,
            backing: Backing::Anon { thp: false },
            prefault: false,
            block_size_bytes: Some(2 << 20),
        })
        .unwrap();
    let at = Gpa(8 << 30);
    let region = Region::ram("dimm", &block);
    rig.board
        .memory()
        .update(|map| map.add(rig.board.root(), &region, at.0, 0))
        .unwrap();
    block.plug(0..2 << 20, false).unwrap();
    (block, at)
}

#[test]
fn a_buffer_in_unplugged_memory_fails_its_request_only() {
    let mut rig = Rig::new();
    let (_block, base) = pluggable(&rig);
    let ram = rig.board.ram().clone();
    let request = Request::read(&ram, 0, SECTOR);
    let mut parts = request.parts();
    parts[1].gpa = base;
    assert_eq!(
        rig.run_laid_out(&request, &parts, Layout::Direct),
        status::OK
    );
    assert_eq!(ram.read(base, SECTOR), pattern(SECTOR, 0));
    let unplugged = Gpa(base.0 + (2 << 20));
    parts[1].gpa = unplugged;
    assert_eq!(
        rig.run_laid_out(&request, &parts, Layout::Direct),
        status::IOERR
    );
    // Half in, half out.
    parts[1].gpa = Gpa(unplugged.0 - 256);
    assert_eq!(
        rig.run_laid_out(&request, &parts, Layout::Direct),
        status::IOERR
    );
    // A status there cannot be written; the chain comes back all the same, and the device goes on.
    let parts = [parts[0], Part::writable(unplugged, 1)];
    let used = rig
        .driver
        .roundtrip(0, &mut rig.queue, &parts, Layout::Direct)
        .unwrap();
    assert_eq!(used.written, 0);
    rig.assert_works();
}

/// A request's memory stays as long as the request does.
#[test]
fn memory_under_a_request_is_not_given_back() {
    let mut rig = Rig::new();
    let (block, base) = pluggable(&rig);
    hold_all(&rig, Point::Before);
    let ram = rig.board.ram().clone();
    let request = Request::read(&ram, 0, SECTOR);
    let mut parts = request.parts();
    parts[1].gpa = base;
    rig.queue.add(&parts, Layout::Direct).unwrap();
    rig.driver.kick(0);
    wait_held(&rig, 1);
    let seal = block.seal(0..2 << 20).unwrap();
    std::thread::sleep(SOON);
    assert!(!seal.is_drained());
    rig.faults.release(Order::Arrival);
    assert!(block_on(seal.drained(), LATER).is_some());
    rig.driver.wait_used(&mut rig.queue).unwrap();
    assert_eq!(request.status(), status::OK);
    assert!(seal.discard().is_ok());
}

/// Nobody pins rings: the answer to a request finds them gone, and the device wants a reset.
#[test]
fn rings_that_go_while_an_answer_is_on_its_way() {
    let mut rig = Rig::new();
    let (block, base) = pluggable(&rig);
    let there = GuestRam::new(rig.board.space(), base.0..base.0 + (2 << 20));
    rig.driver.negotiate(ALL).unwrap();
    let mut queue = DriverQueue::new(&there, 64, true);
    rig.driver.program_queue(0, queue.config());
    rig.driver
        .write_common(ebbtide_lab_driver::common::QUEUE_ENABLE, 2, 1);
    rig.driver.driver_ok().unwrap();
    hold_all(&rig, Point::Before);
    let request = Request::read(rig.board.ram(), 0, SECTOR);
    queue.add(&request.parts(), Layout::Direct).unwrap();
    rig.driver.kick(0);
    wait_held(&rig, 1);
    let seal = block.seal(0..2 << 20).unwrap();
    assert!(block_on(seal.drained(), LATER).is_some());
    assert!(seal.discard().is_ok());
    rig.faults.clear();
    rig.faults.release(Order::Arrival);
    assert!(rig.driver.wait_needs_reset());
    // The device may have looked at the ring, and so wanted the reset, before the request ended.
    assert!(
        poll(|| request.status() == status::OK),
        "its own memory is there"
    );
    // The memory comes back, the queue does not.
    block.plug(0..2 << 20, false).unwrap();
    rig.driver.kick(0);
    std::thread::sleep(SOON);
    assert_eq!(there.read(base, 4096), [0; 4096]);
    rig.restart(ALL);
    rig.assert_works();
}

#[test]
fn a_table_in_unplugged_memory_breaks_the_queue() {
    let mut rig = Rig::new();
    let (_block, base) = pluggable(&rig);
    // Its first descriptor is plugged, its second is not.
    let table = Gpa(base.0 + (2 << 20) - 16);
    let request = Request::flush(rig.board.ram());
    let header = request.parts()[0];
    let descriptor = |flags, next| Descriptor::new(header.gpa.0, header.len, flags, next);
    rig.board.ram().put(table, &descriptor(Descriptor::NEXT, 1));
    let head = Descriptor::new(table.0, 32, Descriptor::INDIRECT, 0);
    rig.queue.set_descriptor(0, &head);
    rig.queue.make_available(0);
    rig.driver.kick(0);
    assert!(rig.driver.wait_needs_reset());
    assert_eq!(rig.queue.device_used_idx(), 0);
    rig.restart(ALL);
    rig.assert_works();
}

#[test]
fn a_silent_backend_keeps_only_its_request() {
    let mut rig = Rig::new();
    rig.faults
        .inject(Rule::once(Fault::Hold).only(OpKind::Write));
    let ram = rig.board.ram().clone();
    let stuck = [Request::write(&ram, 100, &[1; 512])];
    rig.add_all(&stuck);
    wait_held(&rig, 1);
    for _ in 0..50 {
        rig.assert_works();
    }
    assert_eq!(stuck[0].status(), status::UNTOUCHED);
    assert_eq!(rig.driver.status() & device_status::NEEDS_RESET, 0);
    rig.faults.release(Order::Arrival);
    rig.driver.wait_used(&mut rig.queue).unwrap();
    assert_eq!(stuck[0].status(), status::OK);
}

/// Which of two requests an answer is for could not be told; and what the first has pinned is known by the head.
#[test]
fn a_chain_that_is_made_available_again_in_flight_breaks_the_queue() {
    let mut rig = Rig::new();
    hold_all(&rig, Point::Before);
    let ram = rig.board.ram().clone();
    let first = Request::read(&ram, 0, SECTOR);
    let heads = rig.add_all(std::slice::from_ref(&first));
    wait_held(&rig, 1);
    let pinned = rig.function.pinned();
    assert_eq!(rig.board.ram_block().pins(), pinned.len() as u64);
    // The same descriptors, for other data.
    let second = Request::read(&ram, 1, 2 * SECTOR);
    for (part, index) in second.parts().iter().zip(heads[0]..) {
        let flags = if part.writable { Descriptor::WRITE } else { 0 };
        let flags = flags | if part.len > 1 { Descriptor::NEXT } else { 0 };
        let descriptor = Descriptor::new(part.gpa.0, part.len, flags, index + 1);
        rig.queue.set_descriptor(index, &descriptor);
    }
    rig.queue.make_available(heads[0]);
    rig.driver.kick(0);
    assert!(rig.driver.wait_needs_reset());
    assert_eq!(rig.blk.metrics().malformed, 1);
    assert_eq!(rig.function.in_flight().requests, 1);
    assert_eq!(rig.function.pinned(), pinned);
    assert_eq!(rig.board.ram_block().pins(), pinned.len() as u64);
    rig.faults.clear();
    assert_eq!(rig.faults.release(Order::Arrival), 1);
    assert!(poll(|| rig.blk.metrics().in_flight == 0));
    assert!(poll(|| rig.board.ram_block().pins() == 0));
    assert_eq!(rig.queue.device_used_idx(), 0);
    assert_eq!(second.status(), status::UNTOUCHED);
    rig.restart(ALL);
    rig.assert_works();
}

/// A head is free as soon as its chain is given back, however many requests are under way.
#[test]
fn a_head_may_be_used_again_among_others_in_flight() {
    let mut rig = Rig::new();
    rig.faults
        .inject(Rule::always(Fault::Hold).only(OpKind::Write));
    let ram = rig.board.ram().clone();
    let stuck = [Request::write(&ram, 100, &[1; 512])];
    rig.add_all(&stuck);
    wait_held(&rig, 1);
    let mut seen = Vec::new();
    for sector in 0..600 {
        let request = Request::read(&ram, sector, SECTOR);
        let heads = rig.add_all(std::slice::from_ref(&request));
        rig.driver.wait_used(&mut rig.queue).unwrap();
        assert_eq!(request.status(), status::OK);
        seen.extend(heads);
    }
    seen.sort_unstable();
    seen.dedup();
    assert!(seen.len() < 100, "heads are used again");
    assert!(!rig.driver.needs_reset());
    rig.faults.clear();
    rig.faults.release(Order::Arrival);
    rig.driver.wait_used(&mut rig.queue).unwrap();
    assert_eq!(rig.blk.metrics().malformed, 0);
}
