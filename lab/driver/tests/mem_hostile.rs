// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Drivers of a memory device that keep to the letter of the specification and to nothing else, and such that do not.

mod plugging;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ebbtide_iothread::Local;
use ebbtide_lab_driver::mem::{Answer, Kind, Request, State};
use ebbtide_lab_driver::{Layout, poll};
use ebbtide_virtio::status;
use plugging::{BASE, BLOCK, GIB, MIB, Rig};

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
