// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory device when the host fails, when transfers are in the way, and when the driver leaves in the middle.

mod plugging;

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ebbtide_lab_driver::mem::{Answer, Kind, State};
use ebbtide_lab_driver::{Layout, common, poll};
use ebbtide_memory::{Access, DiscardListener, DiscardSubscription, ListenerError, Pin};
use ebbtide_virtio::mem::Patience;
use ebbtide_virtio::mem::fault::Step;
use plugging::{BLOCK, GIB, MIB, Rig, SOON, impatient};

const HOUR: Duration = Duration::from_secs(3600);
/// A driver is never told that the host is busy.
const PATIENT: Patience = Patience {
    drain: HOUR,
    host: HOUR,
};

fn pin(rig: &Rig, block: u64) -> Pin {
    let reader = rig.board.memory().register();
    rig.board
        .space()
        .read(&reader)
        .pin(rig.gpa(block), 4096, Access::ReadWrite)
        .unwrap()
}

#[test]
fn a_plug_that_fails_at_first_is_answered_late() {
    for populate in [false, true] {
        let mut rig = Rig::with(GIB, 64 * MIB, |spec| {
            spec.populate = populate;
            spec.patience = PATIENT;
        });
        rig.faults.fail(Step::Plug, 2);
        assert_eq!(rig.plug(0, 4), Answer::Ack);
        assert_eq!(rig.faults.left(Step::Plug), 0);
        assert_eq!(rig.plugged(), 4 * BLOCK);
        assert_eq!(rig.mem.metrics().host_failures, 2);
        assert!(rig.mem.metrics().plug.latency_max >= Duration::from_millis(300));
    }
}

#[test]
fn a_plug_that_keeps_failing_is_busy_and_changes_nothing() {
    let mut rig = Rig::with(GIB, 64 * MIB, |spec| spec.patience = impatient());
    rig.faults.fail(Step::Plug, u32::MAX);
    assert_eq!(rig.plug(0, 4), Answer::Busy);
    assert_eq!(rig.plugged(), 0);
    assert_eq!(rig.state(0, 4), Some(State::Unplugged));
    rig.faults.fail(Step::Plug, 0);
    assert_eq!(rig.plug(0, 4), Answer::Ack);
    assert_eq!(rig.mem.metrics().plug.busy, 1);
    assert_eq!(rig.mem.metrics().plug.error, 0);
}

#[test]
fn a_plug_that_became_too_much_while_it_failed_is_a_nack() {
    let mut rig = Rig::new(GIB, 64 * MIB);
    rig.faults.fail(Step::Plug, u32::MAX);
    let request = rig.begin(Kind::Plug, 0, 4);
    assert!(poll(|| rig.mem.metrics().host_failures > 0));
    rig.mem.set_requested(2 * BLOCK).unwrap();
    assert_eq!(rig.end(&request), Answer::Nack);
    assert_eq!(rig.plugged(), 0);
}

#[test]
fn an_unplug_that_fails_at_first_is_answered_late() {
    let mut rig = Rig::with(GIB, 64 * MIB, |spec| spec.patience = PATIENT);
    assert_eq!(rig.plug(0, 4), Answer::Ack);
    rig.faults.fail(Step::Discard, 2);
    assert_eq!(rig.unplug(0, 4), Answer::Ack);
    assert_eq!(rig.plugged(), 0);
    assert_eq!(rig.mem.metrics().host_failures, 2);
}

#[test]
fn an_unplug_that_keeps_failing_is_busy_and_changes_nothing() {
    let mut rig = Rig::with(GIB, 64 * MIB, |spec| spec.patience = impatient());
    assert_eq!(rig.plug(0, 4), Answer::Ack);
    rig.board.ram().write(rig.gpa(2), b"ebbtide!");
    for step in [Step::Discard, Step::Seal] {
        rig.faults.fail(step, u32::MAX);
        assert_eq!(rig.unplug(1, 2), Answer::Busy, "{step:?}");
        assert_eq!(rig.unplug_all(), Answer::Busy, "{step:?}");
        assert_eq!(rig.plugged(), 4 * BLOCK);
        assert_eq!(rig.state(0, 4), Some(State::Plugged));
        assert_eq!(rig.board.ram().read(rig.gpa(2), 8), b"ebbtide!");
        rig.faults.fail(step, 0);
    }
    assert_eq!(rig.asks_again(|rig| rig.unplug(1, 2)), Answer::Ack);
    assert_eq!(rig.asks_again(Rig::unplug_all), Answer::Ack);
    assert_eq!(rig.mem.metrics().unplug.error, 0);
}

/// More than is worth doing on the device's own thread.
#[test]
fn big_discards_and_populated_plugs() {
    let mut rig = Rig::with(GIB, 256 * MIB, |spec| {
        spec.populate = true;
        spec.patience = PATIENT;
    });
    for _ in 0..2 {
        assert_eq!(rig.plug(0, 64), Answer::Ack);
        assert_eq!(rig.plugged(), 128 * MIB);
        rig.faults.fail(Step::Discard, 1);
        assert_eq!(rig.unplug(0, 64), Answer::Ack);
        assert_eq!(rig.plugged(), 0);
    }
}

#[test]
fn a_transfer_in_the_range_delays_the_answer_and_keeps_its_memory() {
    let mut rig = Rig::new(GIB, 64 * MIB);
    assert_eq!(rig.plug(0, 4), Answer::Ack);
    let pin = pin(&rig, 2);
    pin.write_at(0, b"in flight").unwrap();
    let request = rig.begin(Kind::Unplug, 1, 2);
    std::thread::sleep(SOON);
    assert_eq!(rig.queue.device_used_idx(), 1, "answered under a transfer");
    let mut bytes = [0; 9];
    pin.read_at(0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"in flight", "discarded under a transfer");
    // Nothing new gets in, and what is elsewhere goes on.
    let reader = rig.board.memory().register();
    assert!(
        rig.board
            .space()
            .read(&reader)
            .pin(rig.gpa(1), 4096, Access::Read)
            .is_err()
    );
    assert!(
        rig.board
            .space()
            .read(&reader)
            .pin(rig.gpa(3), 4096, Access::Read)
            .is_ok()
    );
    drop(reader);
    assert_eq!(
        rig.mem.status().plugged_bytes,
        4 * BLOCK,
        "as of the last answer"
    );
    drop(pin);
    assert_eq!(rig.end(&request), Answer::Ack);
    assert_eq!(rig.plugged(), 2 * BLOCK);
    assert_eq!(rig.mem.metrics().fence_waits, 1);
}

#[test]
fn a_transfer_elsewhere_delays_nothing_for_good() {
    let mut rig = Rig::new(GIB, 64 * MIB);
    assert_eq!(rig.plug(0, 4), Answer::Ack);
    let pins: Vec<_> = (0..8).map(|_| pin(&rig, 0)).collect();
    // The fence of a region waits for all pins that were there when it began.
    let request = rig.begin(Kind::Unplug, 2, 1);
    std::thread::sleep(SOON);
    drop(pins);
    assert_eq!(rig.end(&request), Answer::Ack);
}

#[test]
fn a_transfer_that_does_not_end_is_busy_and_undone() {
    let mut rig = Rig::with(GIB, 64 * MIB, |spec| spec.patience = impatient());
    assert_eq!(rig.plug(0, 4), Answer::Ack);
    let pin = pin(&rig, 2);
    pin.write_at(0, b"in flight").unwrap();
    let began = Instant::now();
    assert_eq!(rig.unplug(1, 2), Answer::Busy);
    assert!(began.elapsed() >= impatient().drain);
    assert_eq!(rig.plugged(), 4 * BLOCK);
    assert_eq!(rig.state(0, 4), Some(State::Plugged));
    assert_eq!(rig.board.ram().read(rig.gpa(2), 9), b"in flight");
    assert_eq!(rig.unplug_all(), Answer::Busy);
    drop(pin);
    assert_eq!(rig.asks_again(|rig| rig.unplug(1, 2)), Answer::Ack);
}

#[test]
fn a_reset_ends_a_request_that_waits() {
    let mut rig = Rig::with(GIB, 64 * MIB, |spec| {
        spec.patience = PATIENT;
    });
    assert_eq!(rig.plug(0, 4), Answer::Ack);
    let pin = pin(&rig, 2);
    for step in [None, Some(Step::Plug)] {
        let (kind, first) = match step {
            None => (Kind::Unplug, 0),
            Some(step) => {
                rig.faults.fail(step, u32::MAX);
                (Kind::Plug, 8)
            }
        };
        let _request = rig.begin(kind, first, 4);
        std::thread::sleep(SOON);
        let used = rig.queue.device_used_idx();
        rig.driver.write_common(common::STATUS, 1, 0);
        let reset = poll(|| rig.driver.status() == 0);
        assert!(reset, "a reset waits for a transfer");
        assert_eq!(
            rig.queue.device_used_idx(),
            used,
            "a reset queue was touched"
        );
        assert_eq!(rig.block.plugged_bytes(), 4 * BLOCK);
        rig.faults.fail(Step::Plug, 0);
        rig.restart();
        assert_eq!(rig.state(0, 4), Some(State::Plugged));
    }
    let metrics = rig.mem.metrics();
    assert_eq!((metrics.unplug.dropped, metrics.plug.dropped), (1, 1));
    drop(pin);
    assert_eq!(rig.unplug(0, 4), Answer::Ack);
}

#[test]
fn resets_at_any_moment() {
    let mut rig = Rig::new(GIB, 512 * MIB);
    for round in 0..100_u64 {
        let plugged = rig.block.plugged_bytes() / BLOCK;
        let requests: Vec<_> = (0..10_u64)
            .map(|i| {
                let kind = if (i + round) % 3 == 0 {
                    Kind::UnplugAll
                } else {
                    Kind::Plug
                };
                let first = (plugged + i) % 256;
                ebbtide_lab_driver::mem::Request::new(rig.board.ram(), kind, rig.gpa(first).0, 1)
            })
            .collect();
        for request in &requests {
            rig.queue.add(&request.parts(), Layout::Direct).unwrap();
        }
        rig.driver.kick(0);
        std::thread::sleep(Duration::from_micros(round * 7));
        rig.driver.reset().unwrap();
        let (used, bytes) = (rig.queue.device_used_idx(), rig.block.plugged_bytes());
        std::thread::sleep(Duration::from_micros(300));
        assert_eq!(
            (rig.queue.device_used_idx(), rig.block.plugged_bytes()),
            (used, bytes),
            "a reset device moved"
        );
        rig.restart();
        assert_eq!(rig.plugged(), bytes);
    }
}

/// The answer is to be written where memory has just been taken away.
#[test]
fn a_driver_that_unplugs_its_own_answer() {
    let mut rig = Rig::new(GIB, 64 * MIB);
    assert_eq!(rig.plug(0, 4), Answer::Ack);
    let request =
        ebbtide_lab_driver::mem::Request::new(rig.board.ram(), Kind::Unplug, rig.gpa(0).0, 4);
    let mut parts = request.parts();
    parts[1].gpa = rig.gpa(1);
    let used = rig
        .driver
        .roundtrip(0, &mut rig.queue, &parts, Layout::Direct)
        .unwrap();
    assert_eq!(used.written, 0);
    assert_eq!(rig.plugged(), 0);
    rig.assert_works();
}

#[test]
fn a_system_reset_that_the_host_refuses_says_so() {
    let mut rig = Rig::new(GIB, 64 * MIB);
    assert_eq!(rig.plug(0, 4), Answer::Ack);
    ebbtide_lab_driver::block_on(rig.function.quiesce(), plugging::LATER).unwrap();
    rig.faults.fail(Step::Discard, 1);
    ebbtide_lab_driver::block_on(rig.mem.system_reset(), plugging::LATER)
        .unwrap()
        .unwrap();
    assert_eq!(rig.mem.status().plugged_bytes, 0);
    rig.block.plug(0..BLOCK, false).unwrap();
    rig.faults.fail(Step::Discard, 100);
    let error = ebbtide_lab_driver::block_on(rig.mem.system_reset(), plugging::LATER)
        .unwrap()
        .unwrap_err();
    assert!(error.to_string().contains("vmem0"), "{error}");
    assert_eq!(rig.mem.status().plugged_bytes, BLOCK);
}

#[test]
fn a_system_reset_waits_for_transfers() {
    let mut rig = Rig::new(GIB, 64 * MIB);
    assert_eq!(rig.plug(0, 4), Answer::Ack);
    ebbtide_lab_driver::block_on(rig.function.quiesce(), plugging::LATER).unwrap();
    let pin = pin(&rig, 1);
    assert!(ebbtide_lab_driver::block_on(rig.mem.system_reset(), SOON).is_none());
    assert_eq!(
        rig.block.plugged_bytes(),
        4 * BLOCK,
        "given up, nothing has changed"
    );
    drop(pin);
    ebbtide_lab_driver::block_on(rig.mem.system_reset(), plugging::LATER)
        .unwrap()
        .unwrap();
    assert_eq!(rig.block.plugged_bytes(), 0);
}

/// What maps the region for a device: what it has mapped, in blocks, and how many more it refuses.
#[derive(Default)]
struct Mapped {
    ranges: Vec<Range<u64>>,
    refusals: u32,
}

struct Mapper(Arc<Mutex<Mapped>>);

impl DiscardListener for Mapper {
    fn name(&self) -> &str {
        "vfio gpu0"
    }

    fn populate(&mut self, range: Range<u64>) -> Result<(), ListenerError> {
        let mut mapped = self.0.lock().unwrap();
        if mapped.refusals > 0 {
            mapped.refusals -= 1;
            return Err(ListenerError {
                what: "container".into(),
                reason: "65535 mappings are in use".into(),
            });
        }
        mapped.ranges.push(range.start / BLOCK..range.end / BLOCK);
        Ok(())
    }

    fn discard(&mut self, range: Range<u64>) {
        let range = range.start / BLOCK..range.end / BLOCK;
        let mut mapped = self.0.lock().unwrap();
        let before = mapped.ranges.len();
        mapped.ranges.retain(|other| *other != range);
        assert_eq!(mapped.ranges.len() + 1, before);
    }
}

fn map(rig: &Rig) -> (Arc<Mutex<Mapped>>, DiscardSubscription) {
    let mapped = Arc::default();
    let mapper = Box::new(Mapper(Arc::clone(&mapped)));
    let all = 0..rig.block.size_bytes();
    (mapped, rig.block.subscribe(all, mapper).unwrap())
}

#[test]
fn a_mapper_follows_what_is_plugged() {
    let mut rig = Rig::new(GIB, 64 * MIB);
    assert_eq!(rig.plug(0, 2), Answer::Ack);
    let (mapped, subscription) = map(&rig);
    let ranges = || mapped.lock().unwrap().ranges.clone();
    assert_eq!(rig.plug(4, 2), Answer::Ack);
    assert_eq!(ranges(), [0..2, 4..6]);
    // Nothing is taken from it while a transfer is under way.
    let transfer = pin(&rig, 5);
    let request = rig.begin(Kind::Unplug, 4, 2);
    std::thread::sleep(SOON);
    assert_eq!(ranges(), [0..2, 4..6]);
    drop(transfer);
    assert_eq!(rig.end(&request), Answer::Ack);
    assert_eq!(ranges(), vec![0..2]);
    drop(subscription);
    assert_eq!(ranges(), []);
}

#[test]
fn a_mapper_that_refuses_is_asked_again_and_then_the_driver_is_told_busy() {
    for populate in [false, true] {
        let rig = |patience| {
            Rig::with(GIB, 64 * MIB, |spec| {
                spec.patience = patience;
                spec.populate = populate;
            })
        };
        let mut patient = rig(PATIENT);
        let (mapped, subscription) = map(&patient);
        mapped.lock().unwrap().refusals = 1;
        assert_eq!(patient.plug(0, 4), Answer::Ack);
        assert_eq!(patient.mem.metrics().plug.busy, 0);
        drop((subscription, patient));

        let mut rig = rig(impatient());
        let (mapped, _subscription) = map(&rig);
        assert_eq!(rig.plug(0, 4), Answer::Ack);
        mapped.lock().unwrap().refusals = u32::MAX;
        assert_eq!(rig.plug(8, 4), Answer::Busy);
        assert_eq!(rig.plugged(), 4 * BLOCK);
        assert_eq!(rig.state(8, 4), Some(State::Unplugged));
        mapped.lock().unwrap().refusals = 0;
        assert_eq!(rig.asks_again(|rig| rig.plug(8, 4)), Answer::Ack);
        let metrics = rig.mem.metrics();
        assert!(metrics.plug.busy >= 1);
        assert_eq!(metrics.plug.error, 0);
    }
}

#[test]
fn the_device_and_who_cannot_bear_discards_exclude_each_other() {
    let rig = Rig::new(GIB, 0);
    let rules = rig.board.memory().discards().clone();
    let error = rules.disable("pmem1").unwrap_err().to_string();
    assert!(error.contains("vmem0"), "{error}");
    drop(rules.disable_uncoordinated("vfio gpu0").unwrap());
    assert_eq!(rules.counts().coordinated_required, 1);
}
