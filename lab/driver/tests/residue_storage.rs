// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is left of SCSI units, host devices and balloons that are gone: nothing. One test, for it counts what the
//! process has.

mod device;

use std::sync::Arc;

use device::Residue;
use ebbtide_block::{Disk, DiskSpec};
use ebbtide_iothread::{ManualClock, channel};
use ebbtide_lab_driver::scsi::{self, Answer, Command, Data, function, response};
use ebbtide_lab_driver::{Board, DriverQueue, LIMIT, Layout, Part, VirtioDriver, block_on, poll};
use ebbtide_scsi::Identity;
use ebbtide_virtio::balloon::{BalloonSpec, VirtioBalloon};
use ebbtide_virtio::scsi::{ScsiSpec, VirtioScsi};
use ebbtide_virtio::{VirtioDevice, VirtioPci};

/// A function with its driver, taken away again in the middle of its use.
fn with_function(
    board: &Board,
    device: Arc<dyn VirtioDevice>,
    queues: u16,
    work: impl FnOnce(&VirtioDriver, &mut [DriverQueue]),
) {
    let (space, interrupts) = (board.space(), board.interrupts());
    let function = VirtioPci::new("function", device, space, interrupts, &board.remote());
    let function = function.expect("a function");
    let pci = board.attach(Arc::clone(&function) as _).expect("a slot");
    pci.enable_msix();
    let slot = pci.devfn().slot();
    let mut driver = VirtioDriver::new(board, pci).expect("a virtio device");
    driver.negotiate(u64::MAX).expect("features");
    let mut queues: Vec<_> = (0..queues).map(|at| driver.add_queue(at, 32)).collect();
    driver.driver_ok().expect("activation");
    work(&driver, &mut queues);
    let closed = function.close();
    let devfn = driver.pci().devfn();
    board.bridge().unmap(devfn).expect("it is there");
    board.wait(closed).expect("nothing is in flight");
    queues.into_iter().for_each(DriverQueue::free);
    drop(board.bridge().detach(slot).expect("it has drained"));
}

fn command(driver: &VirtioDriver, queue: &mut DriverQueue, cdb: &[u8], data: Data<'_>) -> Answer {
    let command = Command::new(driver.ram(), scsi::address(0, 0), 1, cdb, data);
    driver
        .roundtrip(scsi::REQUEST, queue, &command.parts(), Layout::Indirect)
        .expect("an answer");
    command.answer()
}

fn use_scsi(board: &Board, image: &std::path::Path) {
    let device = VirtioScsi::new(ScsiSpec::new("scsi0"), board.remote());
    with_function(board, Arc::clone(&device) as _, 3, |driver, queues| {
        for _ in 0..3 {
            let disk = Arc::new(Disk::open(&DiskSpec::new(image)).expect("a disk"));
            device
                .add_lun(0, 0, disk, Identity::new())
                .expect("a free place");
            let requests = &mut queues[usize::from(scsi::REQUEST)];
            assert_eq!(command(driver, requests, &[0; 6], Data::None).status, 2);
            let read = scsi::cdb10(0x28, 0, 8);
            let answer = command(driver, requests, &read, Data::In(4096));
            assert_eq!(answer, Answer::GOOD);
            let lun = scsi::address(0, 0);
            let reset = function::LOGICAL_UNIT_RESET;
            let reset = scsi::Control::function(driver.ram(), reset, lun, 0);
            driver
                .roundtrip(
                    scsi::CONTROL,
                    &mut queues[0],
                    &reset.parts(),
                    Layout::Direct,
                )
                .expect("an answer");
            assert_eq!(reset.response(), response::OK);
            // The image can be opened again at once: nobody keeps it.
            let removal = device.remove_lun(0, 0).expect("it is there");
            let disk = block_on(removal.gone(), LIMIT).expect("nothing is in flight");
            drop(disk.expect("removed once"));
        }
        // One stays, and goes with the device.
        let disk = Arc::new(Disk::open(&DiskSpec::new(image)).expect("a disk"));
        device
            .add_lun(0, 0, disk, Identity::new())
            .expect("a free place");
    });
}

fn use_balloon(board: &Board) {
    let mut spec = BalloonSpec::new("balloon0");
    spec.free_page_reporting = true;
    let (events, _hear) = channel();
    let device = VirtioBalloon::new(spec, board.remote(), events);
    with_function(board, Arc::clone(&device) as _, 4, |driver, queues| {
        let list = driver.ram().alloc(4096, 4096);
        for (index, part) in [
            (0, Part::readable(list, 8)),
            (1, Part::readable(list, 8)),
            (3, Part::writable(list, 4096)),
        ] {
            let queue = &mut queues[usize::from(index)];
            driver
                .roundtrip(index, queue, &[part], Layout::Direct)
                .expect("an answer");
        }
        // The buffer of the statistics stays with the device.
        queues[2].add(&[Part::readable(list, 20)], Layout::Direct);
        driver.kick(2);
        assert!(poll(|| device.metrics().stats == 1));
        driver.ram().free(list, 4096);
    });
}

#[test]
fn nothing_is_left_of_what_is_gone() {
    // Each removal goes on until its driver has been quiet for a while.
    let board = Board::with_clock(16 << 20, &ManualClock::new()).expect("a board");
    let image = tempfile::NamedTempFile::new().expect("an image");
    image.as_file().set_len(1 << 20).expect("a length");
    // The first time may allocate what stays: the slot's place in the windows, for instance.
    use_scsi(&board, image.path());
    use_balloon(&board);
    let before = Residue::settled(&board);
    for _ in 0..20 {
        use_scsi(&board, image.path());
        use_balloon(&board);
    }
    before.assert_same(&board);
}
