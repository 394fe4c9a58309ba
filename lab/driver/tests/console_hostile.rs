// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The console device with drivers that are wrong, character devices that are full, and resets in between.

mod device;
mod ports;

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use device::ALL;
use ebbtide_devices::chardev::{Chardev, ChardevSpec, Wire};
use ebbtide_iothread::IoThread;
use ebbtide_lab_driver::{LIMIT, Layout, Part, poll};
use ebbtide_memory::Gpa;
use ports::{FROM_DRIVER, Rig, TO_DRIVER, event, message, rx, serial, tx};

const NOWHERE: Gpa = Gpa(1 << 35);

/// Sends chains of these bytes until the device takes no more; how many it took. One more waits then.
fn fill(rig: &mut Rig, port: u32, bytes: &[u8]) -> usize {
    let gpa = rig.board.ram().alloc(bytes.len(), 1);
    rig.board.ram().write(gpa, bytes);
    for taken in 0.. {
        rig.add(
            tx(port),
            &[Part::readable(gpa, bytes.len())],
            Layout::Direct,
        );
        if rig.stays_unused_by_the_board(tx(port)) {
            return taken;
        }
    }
    unreachable!("a wire is not endless")
}

fn text(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 241) as u8).collect()
}

/// What a wire has no room for stays with the driver, and all of it arrives in order.
#[test]
fn a_full_wire_loses_nothing() {
    let mut rig = Rig::new();
    let text = text(30_000);
    let taken = fill(&mut rig, 0, &text);
    assert!(taken > 0);
    let mut received = Vec::new();
    let wire = Arc::clone(&rig.wires[0]);
    let all = (taken + 1) * text.len();
    assert!(poll(|| {
        received.extend(wire.take());
        received.len() >= all
    }));
    assert!(received.chunks(text.len()).all(|chunk| chunk == text));
    assert_eq!(received.len(), all);
    rig.used(tx(0));
    assert_eq!(wire.dropped_bytes(), 0);
    rig.assert_works();
}

#[test]
fn a_full_wire_holds_nothing_up() {
    let mut rig = Rig::new();
    let text = text(30_000);
    let first = fill(&mut rig, 0, &text);
    assert!(first > 0);
    for _ in 0..3 {
        rig.reset_ends();
        rig.restart(ALL);
        rig.set_up();
        // Still full; other ports are not.
        assert_eq!(fill(&mut rig, 0, &text), 0);
        rig.wires[1].listen(true);
        rig.transmit(tx(1), b"past it");
        assert_eq!(rig.wires[1].take(), b"past it");
        rig.wires[1].listen(false);
    }
    // What was taken is there, up to a piece of one that was not; the resets dropped what waited.
    let held = rig.wires[0].take();
    assert!(held.starts_with(&text) && held.len() >= first * text.len());
    assert!(fill(&mut rig, 0, &text) > 0);
    rig.close_ends();
}

#[test]
fn a_port_with_a_full_wire_can_go() {
    let mut rig = Rig::new();
    rig.wires[1].listen(true);
    assert_eq!(rig.hear(), message(1, event::PORT_OPEN, 1));
    let text = text(30_000);
    assert!(fill(&mut rig, 1, &text) > 0);
    let before = rig.wires[1].take().len();
    assert!(fill(&mut rig, 1, &text) > 0);
    rig.console.remove_port(1).unwrap();
    assert_eq!(rig.hear(), message(1, event::DEVICE_REMOVE, 0));
    // The chain that waited is given back, so is everything after it, and nothing of it gets to the wire.
    while rig.rig.queues[usize::from(tx(1))].free_descriptors() < 64 {
        rig.used(tx(1));
    }
    let held = rig.wires[1].take().len();
    rig.transmit(tx(1), &text);
    assert!(!rig.wires[1].has_output());
    assert!(before > 0 && held > 0);
    rig.assert_works();
}

/// A socket whose client reads nothing: nothing is lost while the port is there, and it can go.
#[test]
fn a_full_socket_loses_nothing_and_holds_nothing_up() {
    let mut rig = Rig::new();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("port.sock");
    let wire = Wire::new();
    let chardev = Chardev::open(&ChardevSpec::Unix(path.clone())).unwrap();
    let attached = chardev.attach(&wire);
    let thread = IoThread::spawn("chardev").unwrap();
    thread
        .remote()
        .spawn(move |local| attached.serve(local))
        .unwrap();
    let added = rig.console.add_port(serial("socket", "socket"), &wire);
    assert_eq!(added, Ok(2));
    let mut client = UnixStream::connect(&path).unwrap();
    client.set_read_timeout(Some(LIMIT)).unwrap();
    assert!(poll(|| wire.is_listening()));
    let text = text(30_000);
    let taken = fill(&mut rig, 2, &text);
    assert!(taken > 0);
    let mut received = vec![0; (taken + 1) * text.len()];
    client.read_exact(&mut received).unwrap();
    assert!(received.chunks(text.len()).all(|chunk| chunk == text));
    rig.used(tx(2));
    // Full again, with a chain that waits.
    assert!(fill(&mut rig, 2, &text) > 0);
    rig.console.remove_port(2).unwrap();
    rig.used(tx(2));
    rig.close_ends();
    // The character device is somebody else's; what it had taken it still delivers.
    let mut first = vec![0; text.len()];
    client.read_exact(&mut first).unwrap();
    assert!(first == text);
}

#[test]
fn control_messages_that_are_none() {
    let mut rig = Rig::new();
    let gpa = rig.board.ram().alloc(64, 1);
    let mut malformed = 0;
    for len in 0..8 {
        rig.add(FROM_DRIVER, &[Part::readable(gpa, len)], Layout::Direct);
        rig.used(FROM_DRIVER);
        malformed += 1;
    }
    rig.add(FROM_DRIVER, &[Part::writable(gpa, 64)], Layout::Direct);
    assert_eq!(rig.used(FROM_DRIVER).written, 0);
    malformed += 1;
    for (port, event, value) in [
        (3, event::PORT_READY, 1),
        (u32::MAX, event::PORT_OPEN, 1),
        (0, event::DEVICE_ADD, 1),
        (0, event::PORT_NAME, 1),
        (0, 8, 1),
        (0, u16::MAX, u16::MAX),
        (2, event::PORT_READY, 1),
    ] {
        rig.say(port, event, value);
        malformed += 1;
    }
    assert_eq!(rig.console.metrics().malformed, malformed);
    rig.add(FROM_DRIVER, &[Part::readable(NOWHERE, 8)], Layout::Direct);
    rig.used(FROM_DRIVER);
    assert_eq!(rig.console.metrics().bad_memory, 1);
    // Ports there are not can be opened as often as one likes.
    rig.say(2, event::PORT_OPEN, 1);
    rig.say(0, event::PORT_READY, 0);
    rig.say(0, event::DEVICE_READY, 0);
    rig.assert_works();
}

/// A driver that asks without end and takes no answer makes nothing grow: it hears each thing once.
#[test]
fn a_driver_that_only_asks() {
    let mut rig = Rig::with(ALL);
    for _ in 0..500 {
        rig.say(0, event::DEVICE_READY, 1);
        rig.say(0, event::PORT_READY, 1);
        rig.say(1, event::PORT_READY, 1);
    }
    rig.post_for_messages(20);
    assert_eq!(rig.hear(), message(0, event::DEVICE_ADD, 0));
    assert_eq!(rig.hear(), message(0, event::CONSOLE_PORT, 1));
    assert_eq!(rig.hear(), message(0, event::PORT_OPEN, 1));
    assert_eq!(rig.hear(), message(1, event::DEVICE_ADD, 0));
    let name = (1, event::PORT_NAME, 1, b"org.ebbtide.1".to_vec());
    assert_eq!(rig.hear(), name);
    assert!(rig.stays_unused(TO_DRIVER));
}

#[test]
fn buffers_for_messages_that_are_too_small() {
    let mut rig = Rig::with(ALL);
    for len in 0..8 {
        rig.post(TO_DRIVER, len);
    }
    rig.post(TO_DRIVER, 8);
    rig.say(0, event::DEVICE_READY, 1);
    for _ in 0..8 {
        assert!(rig.buffer(TO_DRIVER).is_empty());
    }
    assert_eq!(rig.hear(), message(0, event::DEVICE_ADD, 0));
    rig.post(TO_DRIVER, 8);
    assert_eq!(rig.hear(), message(1, event::DEVICE_ADD, 0));
    // A name that has no room is cut off.
    rig.post(TO_DRIVER, 11);
    rig.say(1, event::PORT_READY, 1);
    assert_eq!(rig.hear(), (1, event::PORT_NAME, 1, b"org".to_vec()));
    // A message to nowhere is lost.
    rig.add(TO_DRIVER, &[Part::writable(NOWHERE, 64)], Layout::Direct);
    rig.say(0, event::PORT_READY, 1);
    assert_eq!(rig.used(TO_DRIVER).written, 0);
    rig.post(TO_DRIVER, 8);
    assert_eq!(rig.hear(), message(0, event::PORT_OPEN, 1));
}

#[test]
fn chains_that_make_no_sense() {
    let mut rig = Rig::new();
    let gpa = rig.board.ram().alloc(64, 1);
    for parts in [
        vec![Part::readable(gpa, 0)],
        vec![Part::writable(gpa, 64)],
        vec![Part::readable(NOWHERE, 64)],
        vec![Part::readable(gpa, 8), Part::readable(NOWHERE, 8)],
    ] {
        rig.add(tx(0), &parts, Layout::Direct);
        assert_eq!(rig.used(tx(0)).written, 0);
    }
    assert_eq!(rig.console.metrics().bad_memory, 2);
    // No room at all comes back at once, room that is none with the bytes it loses.
    rig.add(rx(0), &[Part::readable(gpa, 64)], Layout::Direct);
    assert_eq!(rig.used(rx(0)).written, 0);
    rig.add(rx(0), &[Part::writable(NOWHERE, 64)], Layout::Direct);
    rig.wires[0].receive(b"lost");
    assert_eq!(rig.used(rx(0)).written, 0);
    assert_eq!(rig.console.metrics().bad_memory, 3);
    rig.wires[0].take();
    rig.assert_works();
}

#[test]
fn broken_queues_want_a_reset() {
    let mut rig = Rig::new();
    for index in [rx(0), tx(0), TO_DRIVER, FROM_DRIVER, rx(1), tx(1)] {
        rig.queues[usize::from(index)].set_avail_idx(1000);
        rig.driver.kick(index);
        rig.wires[0].receive(b"?");
        // The queue for messages is looked at when those taken before are used up.
        let broken = poll(|| {
            rig.wires[1].listen(!rig.wires[1].is_listening());
            rig.driver.needs_reset()
        });
        assert!(broken, "queue {index}");
        rig.wires[0].get(&mut [0; 10]);
        rig.wires[1].listen(false);
        rig.restart(ALL);
        rig.set_up();
        rig.assert_works();
    }
}

#[test]
fn resets_at_any_moment() {
    let mut rig = Rig::with(ALL);
    rig.wires[1].listen(true);
    let text = text(3000);
    let gpa = rig.board.ram().alloc(text.len(), 1);
    rig.board.ram().write(gpa, &text);
    for round in 0..80_u64 {
        rig.post_for_messages(10);
        let ready = [0, 0, 0, 0, 0, 0, 1, 0];
        rig.make_available(FROM_DRIVER, &ready);
        for port in [0, 1] {
            for _ in 0..10 {
                rig.add(tx(port), &[Part::readable(gpa, 3000)], Layout::Indirect);
                rig.post(rx(port), 10);
            }
            rig.wires[port as usize].receive(b"something to read");
        }
        if round % 3 == 0 {
            let wire = Arc::clone(&rig.wires[1]);
            let added = rig.console.add_port(serial("x", "x"), &wire);
            assert_eq!(added, Ok(2));
            rig.console.remove_port(2).unwrap();
        }
        std::thread::sleep(Duration::from_micros(round * 17 % 700));
        rig.driver.reset().unwrap();
        let used = |rig: &Rig| -> Vec<u16> {
            let queues = &rig.rig.queues;
            queues.iter().map(|it| it.device_used_idx()).collect()
        };
        let before = used(&rig);
        std::thread::sleep(Duration::from_micros(300));
        assert_eq!(used(&rig), before, "a reset queue was touched");
        rig.wires.iter().for_each(|wire| drop(wire.take()));
        rig.restart(ALL);
    }
    rig.close_ends();
}
