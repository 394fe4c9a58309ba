// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Drivers of a memory device that keep to the letter of the specification and to nothing else, and such that do not.

mod plugging;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ebbtide_iothread::Local;
use ebbtide_lab_driver::mem::{Answer, Kind, Request, State};
use ebbtide_lab_driver::{DriverQueue, GuestRam, Layout, Random, block_on, common, poll};
use ebbtide_virtio::status;
use plugging::{BASE, BLOCK, GIB, LATER, MIB, Rig};

/// A driver fills its queues before DRIVER_OK (3.1.1) and may not kick before it.
#[test]
fn a_request_from_before_driver_ok_needs_no_kick() {
    let mut rig = Rig::new(GIB, 64 * MIB);
    rig.driver.negotiate(u64::MAX).unwrap();
    rig.queue = rig.driver.add_queue(0, 128);
    let request = Request::new(rig.board.ram(), Kind::Plug, BASE, 2);
    rig.queue.add(&request.parts(), Layout::Direct).unwrap();
    std::thread::sleep(plugging::SOON);
    assert_eq!(rig.queue.device_used_idx(), 0, "served before DRIVER_OK");
    rig.driver.driver_ok().unwrap();
    assert_eq!(rig.end(&request), Answer::Ack);
    assert_eq!(rig.plugged(), 2 * BLOCK);
    assert_eq!(rig.plug(2, 1), Answer::Ack, "and kicks still count");
}

/// A queue that is never empty keeps its device busy, not the thread: other devices live there.
#[test]
fn a_stream_of_requests_does_not_keep_others_out() {
    let mut rig = Rig::new(GIB, 64 * MIB);
    let most = Arc::new(AtomicU64::new(0));
    let (mem, told) = (Arc::downgrade(&rig.mem), Arc::clone(&most));
    let neighbour = move |local: Local| async move {
        let mut before = 0;
        while let Some(mem) = mem.upgrade() {
            let now = mem.metrics().state.ack;
            told.fetch_max(now - before, Ordering::Relaxed);
            before = now;
            drop(mem);
            local.yield_now().await;
        }
    };
    rig.board.remote().spawn(neighbour).unwrap();
    let request = Request::new(rig.board.ram(), Kind::State, BASE, 1);
    let head = rig.queue.add(&request.parts(), Layout::Direct).unwrap();
    for _ in 1..128 {
        rig.queue.make_available(head);
    }
    rig.driver.kick(0);
    assert!(poll(|| rig.queue.device_used_idx() == 128));
    let most = most.load(Ordering::Relaxed);
    assert!(
        most < 16,
        "{most} requests between two turns of another task"
    );
}

#[test]
fn a_driver_without_a_queue_needs_a_reset() {
    let mut rig = Rig::new(GIB, 64 * MIB);
    rig.driver.negotiate(u64::MAX).unwrap();
    rig.driver.set_status(status::DRIVER_OK);
    assert!(rig.driver.needs_reset());
    rig.driver.kick(0);
    rig.restart();
    rig.assert_works();
    assert_eq!(rig.state(0, 1), Some(State::Unplugged));
}

/// The machine is reset in the middle of a resize: memory is gone, and the next driver finds an empty device.
#[test]
fn system_resets_at_any_moment() {
    let mut rig = Rig::with(4 * GIB, GIB, |spec| spec.pacing.kicks_max = 0);
    let mut random = Random(4);
    for round in 0..60 {
        let target = random.below(512) * BLOCK;
        rig.mem.set_requested(target).unwrap();
        let requests: Vec<_> = (0..12)
            .map(|i| {
                let kind = [Kind::Plug, Kind::Plug, Kind::Unplug, Kind::UnplugAll]
                    [random.below(4) as usize];
                Request::new(rig.board.ram(), kind, BASE + i * 8 * BLOCK, 8)
            })
            .collect();
        for request in &requests {
            rig.queue.add(&request.parts(), Layout::Direct).unwrap();
        }
        rig.driver.kick(0);
        std::thread::sleep(Duration::from_micros(random.below(1500)));
        // The operator goes on meanwhile.
        let next = random.below(512) * BLOCK;
        block_on(rig.function.quiesce(), LATER).unwrap();
        let reset = rig.mem.system_reset();
        rig.mem.set_requested(next).unwrap();
        block_on(reset, LATER).unwrap().unwrap();
        assert_eq!(rig.block.plugged_bytes(), 0, "round {round}");
        let status = rig.mem.status();
        let usable = if next == 0 { 0 } else { 4 * GIB };
        assert_eq!(
            (
                status.plugged_bytes,
                status.requested_bytes,
                status.usable_bytes
            ),
            (0, next, usable)
        );
        rig.restart();
        if next > 0 {
            assert_eq!(rig.plug(0, 1), Answer::Ack);
            assert_eq!(rig.unplug(0, 1), Answer::Ack);
        }
    }
}

/// The memory is taken, the answer has no place to go: only a reset helps, and finds the memory unplugged.
#[test]
fn a_driver_that_unplugs_its_own_rings() {
    let mut rig = Rig::new(GIB, 64 * MIB);
    assert_eq!(rig.plug(0, 4), Answer::Ack);
    let there = GuestRam::new(rig.board.space(), BASE..BASE + BLOCK);
    rig.driver.negotiate(u64::MAX).unwrap();
    let mut queue = DriverQueue::new(&there, 16, true);
    rig.driver.program_queue(0, queue.config());
    rig.driver.write_common(common::QUEUE_ENABLE, 2, 1);
    rig.driver.driver_ok().unwrap();
    let request = Request::new(rig.board.ram(), Kind::Unplug, BASE, 1);
    queue.add(&request.parts(), Layout::Direct).unwrap();
    rig.driver.kick(0);
    assert!(rig.driver.wait_needs_reset());
    assert_eq!(request.answer(), Answer::Ack, "which nobody is told of");
    assert_eq!(rig.mem.status().plugged_bytes, 3 * BLOCK);
    rig.restart();
    assert_eq!(rig.plugged(), 3 * BLOCK);
    rig.assert_works();
    // The same with everything.
    assert_eq!(rig.plug(0, 1), Answer::Ack);
    rig.driver.negotiate(u64::MAX).unwrap();
    let mut queue = DriverQueue::new(&there, 16, true);
    rig.driver.program_queue(0, queue.config());
    rig.driver.write_common(common::QUEUE_ENABLE, 2, 1);
    rig.driver.driver_ok().unwrap();
    let request = Request::new(rig.board.ram(), Kind::UnplugAll, 0, 0);
    queue.add(&request.parts(), Layout::Direct).unwrap();
    rig.driver.kick(0);
    assert!(rig.driver.wait_needs_reset());
    rig.restart();
    assert_eq!(rig.plugged(), 0);
    rig.assert_works();
}
