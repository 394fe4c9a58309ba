// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is left of sessions and functions that are over: nothing. One test, for it counts what the process has.

mod device;
mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use device::Residue;
use ebbtide_lab_driver::{Board, DriverQueue, LIMIT, Layout, Part, VirtioDriver, block_on, poll};
use ebbtide_virtio::{VirtioPci, features};
use support::Echo;

fn echo_once(driver: &VirtioDriver, queue: &mut DriverQueue) {
    let gpa = driver.ram().alloc(2, 1);
    let parts = [Part::readable(gpa, 1), Part::writable(gpa, 1)];
    driver
        .roundtrip(0, queue, &parts, Layout::Indirect)
        .expect("an echo");
    driver.ram().free(gpa, 2);
}

fn session(driver: &mut VirtioDriver) {
    driver.negotiate(features::TRANSPORT).expect("features");
    let mut queue = driver.add_queue(0, 16);
    driver.driver_ok().expect("activation");
    echo_once(driver, &mut queue);
    driver.reset().expect("a reset");
    queue.free();
}

fn function(board: &Board, sessions: usize) {
    let echo = Echo::new(board.remote());
    let function = VirtioPci::new(
        "echo0",
        Arc::clone(&echo) as _,
        board.space(),
        board.interrupts(),
        &board.remote(),
    )
    .expect("a function");
    let pci = board.attach(Arc::clone(&function) as _).expect("a slot");
    pci.enable_msix();
    let slot = pci.devfn().slot();
    let mut driver = VirtioDriver::new(board, pci).expect("a virtio device");
    for _ in 0..sessions {
        session(&mut driver);
    }
    // It is taken away while it is in use.
    driver.negotiate(features::TRANSPORT).expect("features");
    let mut queue = driver.add_queue(0, 16);
    driver.driver_ok().expect("activation");
    echo_once(&driver, &mut queue);
    let closed = function.close();
    board
        .bridge()
        .unmap(driver.pci().devfn())
        .expect("it is there");
    block_on(closed, LIMIT).expect("nothing is in flight");
    queue.free();
    drop(board.bridge().detach(slot).expect("it has drained"));
    assert!(poll(|| echo.tasks.load(Ordering::SeqCst) == 0));
}

#[test]
fn nothing_is_left_of_what_is_over() {
    let board = Board::new(16 << 20).expect("a board");
    // The first time may allocate what stays: the slot's place in the windows, for instance.
    function(&board, 1);
    let before = Residue::settled(&board);
    function(&board, 100);
    before.assert_same(&board);
    for _ in 0..20 {
        function(&board, 1);
    }
    before.assert_same(&board);
}
