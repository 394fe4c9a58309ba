// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A card, a console, a source of entropy go while their drivers are alive: whatever a driver waits for is given back, once,
//! with an interrupt, although what it waits for at the other end never comes. What it offers to receive into is not.

mod device;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use device::Rig;
use ebbtide_devices::chardev::Wire;
use ebbtide_iothread::{Local, ManualClock};
use ebbtide_lab_driver::{Board, Layout, Part, block_on, common};
use ebbtide_memory::Gpa;
use ebbtide_net::{MacAddress, Netdev};
use ebbtide_virtio::VirtioDevice;
use ebbtide_virtio::console::{ConsoleSpec, PortKind, PortSpec, VirtioConsole};
use ebbtide_virtio::net::{NetSpec, VirtioNet};
use ebbtide_virtio::rng::{EntropySource, Reading, RngBackend, RngSpec, VirtioRng};

const ALL: u64 = u64::MAX;
/// A driver has put nothing into its queue for so long, and more.
const QUIET: Duration = Duration::from_secs(2);

fn rig(sizes: &[u16], make: impl FnOnce(&Board) -> Arc<dyn VirtioDevice>) -> Rig {
    let board = Board::with_clock(16 << 20, &ManualClock::new()).unwrap();
    let device = make(&board);
    Rig::new(board, device, ALL, sizes)
}

/// A chain in guest memory that nobody is told of.
fn put(rig: &mut Rig, queue: u16, parts: &[Part]) -> u16 {
    let queue = &mut rig.queues[usize::from(queue)];
    queue.add(parts, Layout::Direct).expect("room")
}

fn readable(rig: &Rig, bytes: &[u8]) -> Part {
    let gpa = rig.board.ram().alloc(bytes.len(), 4);
    rig.board.ram().write(gpa, bytes);
    Part::readable(gpa, bytes.len())
}

fn writable(rig: &Rig, len: usize) -> Part {
    let gpa = rig.board.ram().alloc(len, 4);
    rig.board.ram().write(gpa, &vec![0xee; len]);
    Part::writable(gpa, len)
}

/// The next answer on a queue: its head, and the bytes that were written.
fn answer(rig: &mut Rig, queue: u16) -> (u16, u32) {
    let mut used = None;
    let rings = &mut rig.queues[usize::from(queue)];
    rig.board.poll(|| {
        used = rings.poll_used();
        used.is_some()
    });
    let used = used.expect("an answer");
    (used.head, used.written)
}

fn byte(rig: &Rig, gpa: Gpa) -> u8 {
    rig.board.ram().get(gpa)
}

/// A card whose peer reads nothing.
fn card() -> (Rig, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&ours, 4608).unwrap();
    let netdev = Netdev::stream_of("net0", ours.into()).unwrap();
    let rig = rig(&[16, 32, 16], |board| {
        let spec = NetSpec::new("card0", MacAddress::of_card(0));
        VirtioNet::new(spec, &netdev, board.remote()).unwrap()
    });
    (rig, theirs)
}

const COMMAND: &[u8] = &[0, 0, 1];

#[test]
fn a_card_gives_frames_and_commands_back() {
    let (mut rig, _peer) = card();
    let room = writable(&rig, 2048);
    rig.add(0, &[room], Layout::Direct);
    let frame = [&[0; 12][..], &[0xff; 12], &[8, 0], &[7; 1400]].concat();
    let frame = readable(&rig, &frame);
    let mut frames: Vec<u16> = (0..12).map(|_| put(&mut rig, 1, &[frame])).collect();
    rig.driver.kick(1);
    // Some fit the socket, the others never will.
    let mut moving = true;
    while moving {
        let before = frames.len();
        std::thread::sleep(device::SOON);
        while let Some(used) = rig.queues[1].poll_used() {
            frames.retain(|head| *head != used.head);
        }
        moving = before != frames.len() || before == 12;
    }
    assert!(!frames.is_empty(), "the socket takes all");
    // A command nobody has looked at.
    let (command, ack) = (readable(&rig, COMMAND), writable(&rig, 1));
    let unseen = put(&mut rig, 2, &[command, ack]);
    let messages = [1, 2].map(|queue| rig.driver.queue_message(queue));
    let before = messages.map(|it| rig.driver.interrupts(it));
    for queue in [1, 2] {
        assert!(!rig.queues[queue].enable_interrupts());
    }

    let mut closed = Box::pin(rig.function.close());
    assert!(block_on(&mut closed, Duration::ZERO).is_none());
    for head in frames {
        assert_eq!(answer(&mut rig, 1), (head, 0));
    }
    assert_eq!(answer(&mut rig, 2), (unseen, 1));
    assert_eq!(byte(&rig, ack.gpa), 1, "VIRTIO_NET_ERR");
    for (message, before) in messages.into_iter().zip(before) {
        assert!(rig.driver.wait_interrupt(message, before + 1));
    }
    // A driver that does not know of it goes on.
    rig.board.ram().write(ack.gpa, &[0xee]);
    let next = put(&mut rig, 2, &[command, ack]);
    assert_eq!(answer(&mut rig, 2), (next, 1));
    assert_eq!(byte(&rig, ack.gpa), 1);
    assert!(rig.board.wait(closed).is_some());
    assert!(rig.queues[0].poll_used().is_none(), "an empty packet");
    assert_eq!(byte(&rig, room.gpa), 0xee);
    // From now on nothing is read.
    put(&mut rig, 2, &[command, ack]);
    rig.board.pass(QUIET);
    assert!(rig.queues[2].poll_used().is_none());
}

/// A console with a port; nobody takes what they send.
fn console() -> Rig {
    rig(&[16; 6], |board| {
        let spec = ConsoleSpec {
            max_ports: 2,
            ..ConsoleSpec::new("serial0")
        };
        let console = VirtioConsole::new(spec, board.remote()).unwrap();
        for kind in [PortKind::Console, PortKind::Serial] {
            let wire = Wire::new();
            wire.listen(true);
            wire.put(&vec![b'.'; 1 << 20]);
            let spec = PortSpec {
                id: "port".into(),
                kind,
                number: None,
                name: None,
            };
            console.add_port(spec, &wire).unwrap();
        }
        console
    })
}

#[test]
fn a_console_gives_output_and_messages_back() {
    let mut rig = console();
    let room = writable(&rig, 64);
    for queue in [0, 2, 4] {
        put(&mut rig, queue, &[room]);
    }
    let text = readable(&rig, &[b'x'; 100]);
    let output = [1, 5].map(|queue| {
        // The second waits behind the first, which the port has taken.
        let heads = [0, 1].map(|_| put(&mut rig, queue, &[text]));
        rig.driver.kick(queue);
        heads.map(|head| (queue, head))
    });
    for queue in [1, 5] {
        assert!(rig.stays_unused(queue), "the wire is full");
    }
    let ready = readable(&rig, &[0, 0, 0, 0, 0, 0, 1, 0]);
    let message = put(&mut rig, 3, &[ready]);

    let mut closed = Box::pin(rig.function.close());
    assert!(block_on(&mut closed, Duration::ZERO).is_none());
    for (queue, head) in output.into_iter().flatten() {
        assert_eq!(answer(&mut rig, queue), (head, 0));
    }
    assert_eq!(answer(&mut rig, 3), (message, 0));
    assert!(rig.board.wait(closed).is_some());
    for queue in [0, 2, 4] {
        assert!(rig.queues[queue].poll_used().is_none(), "queue {queue}");
    }
}

/// A driver that broke its queue is waited for by nobody.
#[test]
fn a_broken_queue_does_not_hold_up_a_removal() {
    for queue in [1, 3] {
        let mut rig = console();
        rig.queues[usize::from(queue)].set_avail_idx(0x4000);
        rig.driver.kick(queue);
        assert!(rig.driver.wait_needs_reset());
        assert!(rig.board.wait(rig.function.close()).is_some());
    }
    let (mut rig, _peer) = card();
    rig.queues[1].set_avail_idx(0x4000);
    let closed = rig.function.close();
    assert!(rig.board.wait(closed).is_some());
}

/// A source that never answers.
struct Never;

impl EntropySource for Never {
    fn read<'a>(&'a self, _: &'a Local, _: usize) -> Reading<'a> {
        Box::pin(std::future::pending())
    }
}

fn entropy() -> Rig {
    rig(&[8], |board| {
        let backend = RngBackend::new("source0", Never);
        VirtioRng::new(RngSpec::new("rng0"), &backend, board.remote()).unwrap()
    })
}

#[test]
fn who_waits_for_entropy_waits_no_longer() {
    let mut rig = entropy();
    let room = writable(&rig, 16);
    let heads = [0, 1, 2].map(|_| put(&mut rig, 0, &[room]));
    rig.driver.kick(0);
    assert!(rig.stays_unused(0));
    let mut closed = Box::pin(rig.function.close());
    assert!(block_on(&mut closed, Duration::ZERO).is_none());
    for head in heads {
        assert_eq!(answer(&mut rig, 0), (head, 0));
    }
    assert!(rig.board.wait(closed).is_some());
    assert_eq!(rig.queues[0].device_used_idx(), 3);
    assert_eq!(byte(&rig, room.gpa), 0xee);
}

/// A reset is another end, also amid a removal: the driver takes its queues back.
#[test]
fn a_reset_gives_nothing_back() {
    let mut rig = entropy();
    let room = writable(&rig, 16);
    put(&mut rig, 0, &[room]);
    rig.driver.kick(0);
    assert!(rig.stays_unused(0));
    rig.driver.write_common(common::STATUS, 1, 0);
    assert!(rig.board.poll(|| rig.driver.status() == 0));
    assert!(rig.board.wait(rig.function.close()).is_some());
    assert_eq!(rig.queues[0].device_used_idx(), 0);

    let mut rig = entropy();
    let closed = rig.function.close();
    let reset = rig.function.quiesce();
    assert!(rig.board.wait(reset).is_some());
    put(&mut rig, 0, &[room]);
    assert!(rig.board.wait(closed).is_some());
    rig.board.pass(QUIET);
    assert_eq!(rig.queues[0].device_used_idx(), 0);
}
