// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is left of devices that are over, with what they waited for: nothing. One test, for it counts what the process
//! has.

mod device;

use std::any::Any;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use device::{ALL, Residue, Rig};
use ebbtide_devices::chardev::Wire;
use ebbtide_iothread::ManualClock;
use ebbtide_lab_driver::{Board, DriverQueue, Layout, Part};
use ebbtide_net::{MacAddress, Netdev};
use ebbtide_virtio::VirtioDevice;
use ebbtide_virtio::console::{ConsoleSpec, PortKind, PortSpec, VirtioConsole};
use ebbtide_virtio::net::{NetSpec, VirtioNet};
use ebbtide_virtio::rng::{EntropySource, Reading, RngBackend, RngSpec, VirtioRng};

/// A device with what is at its other end.
type Made = (Arc<dyn VirtioDevice>, Box<dyn Any>);

/// A device, the sizes of its queues, and what a driver does with it that is not over when the driver goes.
struct Kind {
    make: fn(&Board) -> Made,
    sizes: &'static [u16],
    work: fn(&mut Rig),
}

fn life(board: Board, kind: &Kind, activations: usize) -> Board {
    let (device, other_end) = (kind.make)(&board);
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
    drop(other_end);
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
        let rng = VirtioRng::new(RngSpec::new("rng0"), &backend, board.remote());
        (rng.expect("a device"), Box::new(()))
    },
    sizes: &[8],
    work: |rig| with_buffer(rig, 0, Part::writable),
};

/// A card whose peer reads nothing and sends more than there are buffers for.
const NET: Kind = Kind {
    make: |board| {
        let (ours, mut theirs) = UnixStream::pair().expect("a socket");
        for _ in 0..40 {
            let frame = [&[0, 0, 8, 0][..], &[0xff; 2048]].concat();
            std::io::Write::write_all(&mut theirs, &frame).expect("room");
        }
        let netdev = Netdev::stream_of("net0", ours.into()).expect("a backend");
        let spec = NetSpec::new("card0", MacAddress::of_card(0));
        let card = VirtioNet::new(spec, &netdev, board.remote());
        (card.expect("a device"), Box::new(theirs))
    },
    sizes: &[16, 16, 16],
    work: |rig| {
        with_buffer(rig, 0, Part::writable);
        (0..4).for_each(|_| with_buffer(rig, 1, Part::readable));
        with_buffer(rig, 2, Part::writable);
    },
};

/// A console and a port whose wires are full.
const CONSOLE: Kind = Kind {
    make: |board| {
        let spec = ConsoleSpec {
            max_ports: 2,
            ..ConsoleSpec::new("serial0")
        };
        let console = VirtioConsole::new(spec, board.remote()).expect("a device");
        let wires = [PortKind::Console, PortKind::Serial].map(|kind| {
            let wire = Wire::new();
            wire.listen(true);
            wire.put(&[b'.'; 1 << 20]);
            let spec = PortSpec {
                id: "port".into(),
                kind,
                number: None,
                name: None,
            };
            console.add_port(spec, &wire).expect("a port");
            wire
        });
        (console, Box::new(wires))
    },
    sizes: &[16; 6],
    work: |rig| {
        let ready = rig.board.ram().alloc(8, 1);
        rig.board.ram().write(ready, &[0, 0, 0, 0, 0, 0, 1, 0]);
        rig.add(3, &[Part::readable(ready, 8)], Layout::Direct);
        rig.used(3);
        rig.board.ram().free(ready, 8);
        for queue in [0, 2, 4] {
            with_buffer(rig, queue, Part::writable);
            with_buffer(rig, queue + 1, Part::readable);
        }
    },
};

#[test]
fn nothing_is_left_of_devices_that_are_over() {
    // Each removal goes on until its driver has been quiet for a while.
    let mut board = Board::with_clock(16 << 20, &ManualClock::new()).expect("a board");
    for kind in [RNG, NET, CONSOLE] {
        // The first time may allocate what stays: the slot's place in the windows, for instance.
        board = life(board, &kind, 1);
        let before = Residue::settled(&board);
        board = life(board, &kind, 100);
        before.assert_same(&board);
        for _ in 0..20 {
            board = life(board, &kind, 1);
        }
        before.assert_same(&board);
    }
}
