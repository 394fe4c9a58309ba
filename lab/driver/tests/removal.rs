// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device goes while its driver is alive: whatever is in its queues is answered, once, with an interrupt; after that
//! nothing of the driver's memory is touched.

mod device;
mod disk;
mod hba;

use std::collections::HashSet;
use std::pin::pin;
use std::time::Duration;

use disk::{Options, Rig, SECTOR, pattern_at};
use ebbtide_block::fault::{Fault, Faults, Order, Rule};
use ebbtide_iothread::ManualClock;
use ebbtide_lab_driver::blk::{Request, status};
use ebbtide_lab_driver::scsi::{self, Answer, Command, Control, function, response};
use ebbtide_lab_driver::{DriverQueue, LIMIT, Layout, block_on, common, poll};

const SOON: Duration = Duration::from_millis(50);
/// Of a time that is turned.
const MOMENT: Duration = Duration::from_millis(5);
const POISON: u8 = 0xa5;

fn hold(faults: &Faults) {
    faults.inject(Rule::always(Fault::Hold));
}

/// Lets go of what is held; nothing is held any more.
fn release(faults: &Faults) {
    faults.clear();
    faults.release(Order::Reverse);
}

fn reads(rig: &Rig, count: u64) -> Vec<Request> {
    let ram = rig.board.ram();
    (0..count).map(|i| Request::read(ram, i, SECTOR)).collect()
}

impl Rig {
    /// Reads that the backend has and does not answer.
    fn in_flight(&mut self, count: u64) -> (Vec<Request>, Vec<u16>) {
        hold(&self.faults);
        let requests = reads(self, count);
        let heads = self.add_all(&requests);
        assert!(poll(|| self.faults.held() as u64 == count));
        (requests, heads)
    }

    /// Requests that nobody has looked at: there is no kick.
    fn unseen(&mut self, count: u64) -> (Vec<Request>, Vec<u16>) {
        let requests = reads(self, count);
        let add = |request: &Request| self.queue.add(&request.parts(), Layout::Direct);
        let heads = requests.iter().map(add).collect::<Option<_>>();
        (requests, heads.expect("room in the queue"))
    }
}

/// A rig with a time that only the test turns.
fn with_clock() -> (Rig, ManualClock) {
    let clock = ManualClock::new();
    let options = Options {
        clock: Some(clock.clone()),
        ..Options::default()
    };
    (Rig::with(options), clock)
}

/// Whether a removal is over in much less time than a driver is waited for.
fn is_soon(rig: &Rig, clock: &ManualClock, closed: impl Future) -> bool {
    let mut closed = pin!(closed);
    let seen = (0..20).any(|_| {
        clock.advance(MOMENT);
        device::goes_round(&rig.board.remote());
        block_on(closed.as_mut(), Duration::ZERO).is_some()
    });
    // From here on it stands still; only other threads may still have to run.
    seen || block_on(closed, LIMIT).is_some()
}

/// The heads of so many answers.
fn answered(queue: &mut DriverQueue, count: usize) -> HashSet<u16> {
    let mut heads = HashSet::new();
    let all = poll(|| {
        while let Some(used) = queue.poll_used() {
            assert!(heads.insert(used.head), "{} is answered twice", used.head);
        }
        heads.len() >= count
    });
    assert!(all, "{} of {count} are answered", heads.len());
    assert_eq!(heads.len(), count);
    heads
}

#[test]
fn what_is_in_flight_and_what_is_not_begun_is_answered() {
    let mut rig = Rig::new();
    let (flying, flying_heads) = rig.in_flight(8);
    let (unseen, unseen_heads) = rig.unseen(20);
    assert!(!rig.queue.enable_interrupts());
    let message = rig.driver.queue_message(0);
    let before = rig.driver.interrupts(message);
    let mut closed = Box::pin(rig.function.close());
    assert!(!rig.driver.pci().is_there());

    assert!(rig.driver.wait_interrupt(message, before + 1));
    let heads = answered(&mut rig.queue, 20);
    assert_eq!(heads, unseen_heads.into_iter().collect());
    assert!(unseen.iter().all(|it| it.status() == status::IOERR));
    assert!(flying.iter().all(|it| it.status() == status::UNTOUCHED));
    assert!(block_on(&mut closed, SOON).is_none(), "requests in flight");
    let in_flight = rig.function.in_flight();
    assert_eq!(in_flight.requests, 8);
    assert!(in_flight.oldest.is_some_and(|age| age >= SOON));

    assert!(!rig.queue.enable_interrupts());
    let before = rig.driver.interrupts(message);
    release(&rig.faults);
    assert!(rig.driver.wait_interrupt(message, before + 1));
    let heads = answered(&mut rig.queue, 8);
    assert_eq!(heads, flying_heads.into_iter().collect());
    for (sector, request) in flying.iter().enumerate() {
        assert_eq!(request.status(), status::OK);
        assert_eq!(request.data(), pattern_at(sector * SECTOR, SECTOR, 0));
    }
    assert!(block_on(closed, LIMIT).is_some());
    assert_eq!(rig.function.in_flight().requests, 0);
    let metrics = rig.blk.metrics();
    assert_eq!((metrics.refused, metrics.in_flight), (20, 0));
    assert_eq!(rig.queue.device_used_idx(), 28);
}

#[test]
fn nothing_is_touched_after_the_end() {
    let mut rig = Rig::new();
    let (flying, _) = rig.in_flight(4);
    let closed = rig.function.close();
    release(&rig.faults);
    assert!(block_on(closed, LIMIT).is_some());
    answered(&mut rig.queue, 4);
    let ram = rig.board.ram().clone();
    let (late, _) = rig.unseen(4);
    rig.driver.kick(0);
    for request in flying.iter().chain(&late) {
        for part in request.parts().iter().filter(|part| part.writable) {
            ram.write(part.gpa, &vec![POISON; part.len as usize]);
        }
    }
    std::thread::sleep(4 * SOON);
    assert_eq!(rig.queue.device_used_idx(), 4);
    for request in flying.iter().chain(&late) {
        assert_eq!(request.status(), POISON);
        assert_eq!(request.data(), [POISON; SECTOR]);
    }
}

/// A writer has its next request ready as soon as one is answered, and does not know of the removal yet.
#[test]
fn a_driver_that_goes_on_is_answered_while_the_device_drains() {
    let mut rig = Rig::new();
    let (flying, _) = rig.in_flight(1);
    let mut closed = Box::pin(rig.function.close());
    for _ in 0..10 {
        let (next, heads) = rig.unseen(1);
        assert_eq!(answered(&mut rig.queue, 1), heads.into_iter().collect());
        assert_eq!(next[0].status(), status::IOERR);
        assert!(block_on(&mut closed, Duration::ZERO).is_none());
    }
    release(&rig.faults);
    answered(&mut rig.queue, 1);
    assert_eq!(flying[0].status(), status::OK);
    // One that waited for this answer.
    let (last, _) = rig.unseen(1);
    answered(&mut rig.queue, 1);
    assert_eq!(last[0].status(), status::IOERR);
    assert!(block_on(closed, LIMIT).is_some());
}

#[test]
fn a_driver_that_never_stops_does_not_hold_up_its_removal() {
    let (mut rig, clock) = with_clock();
    let mut closed = Box::pin(rig.function.close());
    let (mut requests, mut answers, mut gone) = (Vec::new(), 0, false);
    // A request all the time, in a time that goes on with each answer.
    for _ in 0..2000 {
        if rig.queue.free_descriptors() >= 8 {
            requests.extend(rig.unseen(1).0);
        }
        clock.advance(MOMENT);
        device::goes_round(&rig.board.remote());
        gone = block_on(&mut closed, Duration::ZERO).is_some();
        if gone {
            break;
        }
        while rig.queue.poll_used().is_some() {
            answers += 1;
        }
    }
    assert!(gone, "it never goes");
    assert!(answers > 10, "{answers} answers");
}

/// A guest that has ejected its disk, before or while that is taken away, is not waited for; what it had asked for before is
/// answered all the same.
#[test]
fn a_guest_that_has_let_go_is_not_waited_for() {
    let (mut rig, clock) = with_clock();
    let (_unseen, _) = rig.unseen(3);
    rig.function.guest_let_go();
    let closed = rig.function.close();
    assert!(is_soon(&rig, &clock, closed));
    assert_eq!(rig.queue.device_used_idx(), 3);

    let (mut rig, clock) = with_clock();
    let (flying, _) = rig.in_flight(1);
    let mut closed = Box::pin(rig.function.close());
    rig.function.guest_let_go();
    assert!(block_on(&mut closed, SOON).is_none(), "a request in flight");
    release(&rig.faults);
    // What the host has to do takes the host's time.
    assert!(poll(|| rig.function.in_flight().requests == 0));
    assert!(is_soon(&rig, &clock, closed));
    assert_eq!(flying[0].status(), status::OK);
    assert_eq!(rig.queue.device_used_idx(), 1);
}

/// A reset is another end: the driver takes its queue back.
#[test]
fn a_reset_does_not_touch_what_is_not_begun() {
    let mut rig = Rig::new();
    let (flying, _) = rig.in_flight(4);
    let (unseen, _) = rig.unseen(10);
    rig.driver.write_common(common::STATUS, 1, 0);
    release(&rig.faults);
    assert!(poll(|| rig.driver.status() == 0));
    std::thread::sleep(4 * SOON);
    assert_eq!(rig.queue.device_used_idx(), 0, "a reset queue was touched");
    assert!(unseen.iter().all(|it| it.status() == status::UNTOUCHED));
    drop(flying);
    // The removal finds nothing to answer.
    assert!(block_on(rig.function.close(), LIMIT).is_some());
    assert_eq!(rig.queue.device_used_idx(), 0, "a reset queue was touched");
    assert_eq!(rig.blk.metrics().refused, 0);
}

/// The machine is reset while the device is on its way out: from then on the queue is not touched.
#[test]
fn a_reset_amid_a_removal() {
    let mut rig = Rig::new();
    let (flying, _) = rig.in_flight(3);
    let (_unseen, _) = rig.unseen(5);
    let closed = rig.function.close();
    answered(&mut rig.queue, 5);
    let reset = rig.function.quiesce();
    std::thread::sleep(4 * SOON);
    let (late, _) = rig.unseen(2);
    std::thread::sleep(4 * SOON);
    release(&rig.faults);
    assert!(block_on(reset, LIMIT).is_some());
    assert!(block_on(closed, LIMIT).is_some());
    assert_eq!(rig.queue.device_used_idx(), 5, "a reset queue was touched");
    assert!(late.iter().all(|it| it.status() == status::UNTOUCHED));
    drop(flying);
}

/// Who gives the backend up lets what waits for its turn fail; what the backend has begun ends when it ends.
#[test]
fn a_backend_that_is_given_up() {
    let mut rig = Rig::new();
    let (flying, _) = rig.in_flight(2);
    let mut closed = Box::pin(rig.function.close());
    assert!(rig.function.abandon());
    assert!(block_on(&mut closed, 4 * SOON).is_none(), "freed under it");
    assert_eq!(rig.function.in_flight().requests, 2);
    assert!(flying.iter().all(|it| it.status() == status::UNTOUCHED));
    release(&rig.faults);
    answered(&mut rig.queue, 2);
    assert!(flying.iter().all(|it| it.status() == status::IOERR));
    assert!(block_on(closed, LIMIT).is_some());
}

#[test]
fn a_queue_the_driver_broke_does_not_hold_up_its_removal() {
    let mut rig = Rig::new();
    // More than the queue can hold.
    rig.queue.set_avail_idx(0x4000);
    rig.driver.kick(0);
    assert!(rig.driver.wait_needs_reset());
    assert!(block_on(rig.function.close(), LIMIT).is_some());

    let mut rig = Rig::new();
    let (flying, _) = rig.in_flight(1);
    rig.queue.set_avail_idx(0x4000);
    let closed = rig.function.close();
    release(&rig.faults);
    assert!(block_on(closed, LIMIT).is_some());
    drop(flying);
}

#[test]
fn an_adapter_goes_under_its_commands() {
    let (mut rig, image) = hba::Rig::with_unit();
    hold(&image.faults);
    let ram = rig.board.ram().clone();
    let command = |tag| Command::read(&ram, scsi::address(0, 0), tag, 4, 1);
    let (flying, unseen) = (command(7), command(8));
    rig.send(0, &flying);
    assert!(poll(|| image.faults.held() == 1));
    let queue = &mut rig.requests[0];
    queue.add(&unseen.parts(), Layout::Direct).expect("room");
    let query = Control::function(&ram, function::QUERY_TASK, scsi::address(0, 0), 7);
    let control = &mut rig.control;
    control.add(&query.parts(), Layout::Direct).expect("room");
    let mut closed = Box::pin(rig.function.close());

    answered(&mut rig.requests[0], 1);
    assert_eq!(unseen.answer().response, response::BAD_TARGET);
    answered(&mut rig.control, 1);
    assert_eq!(query.response(), response::BAD_TARGET);
    assert!(block_on(&mut closed, SOON).is_none(), "a command in flight");
    let in_flight = rig.function.in_flight();
    assert_eq!(in_flight.requests, 1);
    assert!(in_flight.oldest.is_some_and(|age| age >= SOON));
    release(&image.faults);
    answered(&mut rig.requests[0], 1);
    assert_eq!(flying.answer(), Answer::GOOD);
    assert_eq!(flying.data(), hba::pattern(4 * 512, 512, 0));
    assert!(block_on(closed, LIMIT).is_some());
}
