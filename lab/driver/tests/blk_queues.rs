// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk whose queues are spread over several iothreads.

mod disk;

use std::sync::mpsc;
use std::time::Duration;

use disk::{ALL, Options, QUEUE_SIZE, Rig, SECTOR, pattern_at};
use ebbtide_block::fault::{Fault, Order, Rule};
use ebbtide_iothread::IoThread;
use ebbtide_lab_driver::blk::{Request, status};
use ebbtide_lab_driver::{DriverQueue, Layout, common, poll};

/// Three queues on two threads; the queue the rig made is the first.
fn spread(second: &IoThread) -> (Rig, Vec<DriverQueue>) {
    let mut rig = Rig::with(Options {
        queues: 3,
        more_iothreads: vec![second.remote()],
        ..Options::default()
    });
    rig.driver.negotiate(ALL).unwrap();
    let queues = (0..3)
        .map(|index| rig.driver.add_queue(index, QUEUE_SIZE))
        .collect();
    rig.driver.driver_ok().unwrap();
    (rig, queues)
}

fn send(rig: &Rig, queues: &mut [DriverQueue], index: u16, request: &Request) {
    let queue = &mut queues[usize::from(index)];
    queue.add(&request.parts(), Layout::Direct).unwrap();
    if queue.needs_kick() {
        rig.driver.kick(index);
    }
}

/// Keeps a thread busy until the sender is dropped.
fn occupy(thread: &IoThread) -> mpsc::Sender<()> {
    let (release, released) = mpsc::channel::<()>();
    let (began, begun) = mpsc::channel();
    thread
        .remote()
        .spawn(move |_| async move {
            began.send(()).unwrap();
            let _ = released.recv();
        })
        .unwrap();
    begun.recv().unwrap();
    release
}

/// Queue i is served by thread i mod n: while the second thread is busy, only the second queue waits.
#[test]
fn each_queue_has_its_thread() {
    let second = IoThread::spawn("iothread1").unwrap();
    let (rig, mut queues) = spread(&second);
    let busy = occupy(&second);
    let ram = rig.board.ram().clone();
    let requests: Vec<_> = (0..3).map(|at| Request::read(&ram, at, SECTOR)).collect();
    for (index, request) in (0..).zip(&requests) {
        send(&rig, &mut queues, index, request);
    }
    for index in [0, 2] {
        rig.driver.wait_used(&mut queues[index]).unwrap();
        assert_eq!(requests[index].status(), status::OK);
        assert_eq!(
            requests[index].data(),
            pattern_at(index * SECTOR, SECTOR, 0)
        );
    }
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(requests[1].status(), status::UNTOUCHED);
    drop(busy);
    rig.driver.wait_used(&mut queues[1]).unwrap();
    assert_eq!(requests[1].status(), status::OK);
}

#[test]
fn all_queues_at_once() {
    let second = IoThread::spawn("iothread1").unwrap();
    let (rig, mut queues) = spread(&second);
    let ram = rig.board.ram().clone();
    for round in 0..50_usize {
        let requests: Vec<_> = (0..60)
            .map(|at| Request::read(&ram, (at + round) as u64, SECTOR))
            .collect();
        for (at, request) in requests.iter().enumerate() {
            send(&rig, &mut queues, (at % 3) as u16, request);
        }
        for at in 0..requests.len() {
            rig.driver.wait_used(&mut queues[at % 3]).unwrap();
        }
        for (at, request) in requests.iter().enumerate() {
            let expected = pattern_at((at + round) * SECTOR, SECTOR, 0);
            assert_eq!((request.status(), request.data()), (status::OK, expected));
        }
    }
    assert_eq!(rig.blk.metrics().in_flight, 0);
}

/// A reset waits for the requests of all threads.
#[test]
fn a_reset_is_one_for_all_queues() {
    let second = IoThread::spawn("iothread1").unwrap();
    let (rig, mut queues) = spread(&second);
    rig.faults.inject(Rule::always(Fault::Hold));
    let ram = rig.board.ram().clone();
    let requests: Vec<_> = (0..3).map(|at| Request::read(&ram, at, SECTOR)).collect();
    for (index, request) in (0..).zip(&requests) {
        send(&rig, &mut queues, index, request);
    }
    assert!(poll(|| rig.faults.held() == 3));
    rig.driver.write_common(common::STATUS, 1, 0);
    for left in [2, 1, 0] {
        std::thread::sleep(Duration::from_millis(20));
        assert_ne!(rig.driver.status(), 0, "{left} and one more in flight");
        assert!(rig.faults.release_one());
    }
    assert_eq!(rig.faults.release(Order::Arrival), 0);
    assert!(poll(|| rig.driver.status() == 0));
    assert!(queues.iter().all(|queue| queue.device_used_idx() == 0));
}
