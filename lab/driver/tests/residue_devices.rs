// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is left of devices that are over, with what they waited for: nothing. One test, for it counts what the process
//! has.

mod device;

use std::sync::Arc;

use device::{ALL, Residue, Rig};
use ebbtide_lab_driver::{Board, DriverQueue, Layout, Part};
use ebbtide_virtio::VirtioDevice;
use ebbtide_virtio::rng::{EntropySource, Reading, RngBackend, RngSpec, VirtioRng};

/// A device, the sizes of its queues, and what a driver does with it that is not over when the driver goes.
struct Kind {
    make: fn(&Board) -> Arc<dyn VirtioDevice>,
    sizes: &'static [u16],
    work: fn(&mut Rig),
}

fn life(board: Board, kind: &Kind, activations: usize) -> Board {
    let device = (kind.make)(&board);
    let before = board.ram().free_bytes();
    let mut rig = Rig::new(board, device, ALL, kind.sizes);
    for _ in 0..activations {
        (kind.work)(&mut rig);
        rig.driver.reset().expect("a reset");
        rig.queues.drain(..).for_each(DriverQueue::free);
        rig.restart(ALL);
    }
    (kind.work)(&mut rig);
    let board = rig.remove();
    assert_eq!(board.ram().free_bytes(), before);
    board
}

/// A source that never answers.
struct Never;

impl EntropySource for Never {
    fn read<'a>(&'a self, _: &'a ebbtide_iothread::Local, _: usize) -> Reading<'a> {
        Box::pin(std::future::pending())
    }
}

fn with_buffer(rig: &mut Rig, index: u16, part: fn(ebbtide_memory::Gpa, usize) -> Part) {
    let gpa = rig.board.ram().alloc(2048, 1);
    rig.add(index, &[part(gpa, 2048)], Layout::Direct);
    rig.board.ram().free(gpa, 2048);
}

const RNG: Kind = Kind {
    make: |board| {
        let backend = RngBackend::new("source0", Never);
        VirtioRng::new(RngSpec::new("rng0"), &backend, board.remote()).expect("a device")
    },
    sizes: &[8],
    work: |rig| with_buffer(rig, 0, Part::writable),
};

#[test]
fn nothing_is_left_of_devices_that_are_over() {
    let mut board = Board::new(16 << 20).expect("a board");
    for kind in [RNG] {
        // The first time may allocate what stays: the slot's place in the windows, for instance.
        board = life(board, &kind, 1);
        std::thread::sleep(std::time::Duration::from_millis(100));
        let before = Residue::of(&board);
        board = life(board, &kind, 100);
        before.assert_same(&board);
        for _ in 0..20 {
            board = life(board, &kind, 1);
        }
        before.assert_same(&board);
    }
}
