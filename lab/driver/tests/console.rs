// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The console device: ports, their bytes, what the driver is told and tells.

mod device;
mod ports;

use std::sync::Arc;

use device::ALL;
use ebbtide_devices::chardev::Wire;
use ebbtide_iothread::Receiver;
use ebbtide_lab_driver::{Board, Layout, Part, poll};
use ebbtide_virtio::console::{
    ConsoleError, ConsoleEvent, ConsoleSpec, PortSpec, Size, VirtioConsole, feature,
};
use ebbtide_virtio::features;
use ports::{Rig, TO_DRIVER, console, event, message, rx, serial, tx};

fn next_event(events: &mut Receiver<ConsoleEvent>) -> (String, bool) {
    let mut event = None;
    assert!(poll(|| {
        event = events.try_recv();
        event.is_some()
    }));
    let Some(ConsoleEvent::PortChange { id, open }) = event else {
        unreachable!("it came")
    };
    (id, open)
}

fn change(id: &str, open: bool) -> (String, bool) {
    (id.into(), open)
}

#[test]
fn what_is_offered() {
    let mut rig = Rig::with(ALL);
    rig.driver.reset().unwrap();
    assert_eq!(rig.driver.pci().read_config(2, 2), 0x1043);
    let own = feature::SIZE | feature::MULTIPORT;
    assert_eq!(rig.driver.offered(), own | features::TRANSPORT);
    assert_eq!(rig.driver.read_config(0, 2), 132);
    assert_eq!(rig.driver.read_config(2, 2), 43);
    assert_eq!(rig.driver.read_config(4, 4), 3);
    rig.driver.write_config(8, 4, u64::from(b'x'));
    assert_eq!(rig.driver.read_config(8, 4), 0);
    let sizes: Vec<_> = (0..9).map(|i| rig.driver.max_queue_size(i)).collect();
    assert_eq!(sizes, [128, 128, 32, 32, 128, 128, 128, 128, 0]);
}

#[test]
fn a_console_alone_has_no_control_queues() {
    let board = Board::new(16 << 20).unwrap();
    let spec = ConsoleSpec {
        max_ports: 1,
        ..ConsoleSpec::new("serial0")
    };
    let device = VirtioConsole::new(spec, board.remote()).unwrap();
    let wire = Wire::new();
    wire.listen(true);
    device.add_port(console("hvc"), &wire).unwrap();
    let mut rig = device::Rig::new(board, device, ALL, &[64, 64]);
    assert_eq!(rig.driver.features() & 3, 0);
    assert_eq!(rig.driver.max_queue_size(2), 0);
    let gpa = rig.board.ram().alloc(5, 1);
    rig.board.ram().write(gpa, b"hello");
    rig.add(1, &[Part::readable(gpa, 5)], Layout::Direct);
    rig.used(1);
    assert_eq!(wire.take(), b"hello");
    wire.receive(b"back!");
    rig.add(0, &[Part::writable(gpa, 5)], Layout::Direct);
    assert_eq!(rig.used(0).written, 5);
    assert_eq!(rig.board.ram().read(gpa, 5), b"back!");
}

/// A driver that does not know of ports has the console.
#[test]
fn without_multiport() {
    let mut rig = Rig::with(ALL & !feature::MULTIPORT);
    rig.assert_works();
    rig.make_available(tx(1), b"nobody serves it");
    assert!(rig.stays_unused(tx(1)));
}

#[test]
fn ports_are_told_in_order() {
    let mut rig = Rig::with(ALL);
    rig.post_for_messages(1);
    assert!(rig.stays_unused(TO_DRIVER), "the driver has not asked");
    rig.wires[1].listen(true);
    rig.post_for_messages(9);
    rig.say(0, event::DEVICE_READY, 1);
    for port in [0, 1] {
        assert_eq!(rig.hear(), message(port, event::DEVICE_ADD, 0));
    }
    rig.say(1, event::PORT_READY, 1);
    let name = (1, event::PORT_NAME, 1, b"org.ebbtide.1".to_vec());
    assert_eq!(rig.hear(), name);
    assert_eq!(rig.hear(), message(1, event::PORT_OPEN, 1));
    rig.say(0, event::PORT_READY, 1);
    assert_eq!(rig.hear(), message(0, event::CONSOLE_PORT, 1));
    assert_eq!(rig.hear(), message(0, event::PORT_OPEN, 1));
    assert!(rig.stays_unused(TO_DRIVER));
    // Each driver hears it anew.
    rig.restart(ALL);
    rig.set_up();
    rig.assert_works();
}

#[test]
fn bytes_in_order_out_of_whatever_buffers() {
    let mut rig = Rig::new();
    let ram = rig.board.ram().clone();
    let text: Vec<u8> = (0..20_000_u32).map(|i| (i % 249) as u8).collect();
    for port in [0, 1] {
        let wire = Arc::clone(&rig.wires[port as usize]);
        wire.listen(true);
        let gpa = ram.alloc(text.len(), 1);
        ram.write(gpa, &text);
        let [front, rest] = Part::readable(gpa, text.len()).split(3);
        let [middle, back] = rest.split(9000);
        for layout in [Layout::Direct, Layout::Indirect, Layout::Mixed(1)] {
            rig.add(tx(port), &[front, middle, back], layout);
            rig.used(tx(port));
            assert!(wire.take() == text);
        }
        // The other way, into small buffers.
        for _ in 0..40 {
            rig.post(rx(port), 100);
        }
        wire.receive(&text[..3999]);
        let mut received = Vec::new();
        while received.len() < 3999 {
            received.extend(rig.buffer(rx(port)));
        }
        assert!(received == text[..3999]);
    }
    assert_eq!(rig.console.metrics().sent_bytes, 6 * 20_000);
    assert_eq!(rig.console.metrics().received_bytes, 2 * 3999);
}

/// What comes while the driver has no buffers, or has the port closed, waits.
#[test]
fn input_waits_for_the_driver() {
    let mut rig = Rig::new();
    rig.wires[1].receive(b"first");
    rig.say(1, event::PORT_OPEN, 0);
    rig.post(rx(1), 100);
    assert!(rig.stays_unused(rx(1)), "the port is closed");
    rig.wires[1].receive(b" second");
    rig.say(1, event::PORT_OPEN, 1);
    assert_eq!(rig.buffer(rx(1)), b"first second");
}

#[test]
fn management_hears_of_open_ports() {
    let mut rig = Rig::new();
    assert_eq!(next_event(&mut rig.events), change("hvc", true));
    assert_eq!(next_event(&mut rig.events), change("pipe", true));
    rig.say(1, event::PORT_OPEN, 1);
    rig.say(1, event::PORT_OPEN, 0);
    assert_eq!(next_event(&mut rig.events), change("pipe", false));
    // The end of the driver closes what it had open.
    rig.driver.reset().unwrap();
    assert_eq!(next_event(&mut rig.events), change("hvc", false));
    assert_eq!(rig.events.try_recv(), None);
    rig.restart(ALL);
    rig.set_up();
    assert_eq!(next_event(&mut rig.events), change("hvc", true));
    assert_eq!(next_event(&mut rig.events), change("pipe", true));
    rig.console.remove_port(1).unwrap();
    assert_eq!(next_event(&mut rig.events), change("pipe", false));
}

#[test]
fn the_driver_hears_who_listens() {
    let mut rig = Rig::new();
    for open in [true, false, true] {
        rig.wires[1].listen(open);
        assert_eq!(rig.hear(), message(1, event::PORT_OPEN, open.into()));
    }
    // A console is open always.
    rig.wires[0].listen(false);
    assert!(rig.stays_unused(TO_DRIVER));
    // While nobody listens bytes go nowhere, at once.
    rig.transmit(tx(0), b"nobody");
    assert!(!rig.wires[0].has_output());
    rig.wires[0].listen(true);
    rig.assert_works();
}

#[test]
fn ports_come_and_go() {
    let mut rig = Rig::new();
    let wire = Wire::new();
    wire.listen(true);
    let added = rig
        .console
        .add_port(serial("third", "org.ebbtide.2"), &wire);
    assert_eq!(added, Ok(2));
    assert_eq!(rig.hear(), message(2, event::DEVICE_ADD, 0));
    rig.say(2, event::PORT_READY, 1);
    let name = (2, event::PORT_NAME, 1, b"org.ebbtide.2".to_vec());
    assert_eq!(rig.hear(), name);
    assert_eq!(rig.hear(), message(2, event::PORT_OPEN, 1));
    rig.say(2, event::PORT_OPEN, 1);
    rig.transmit(tx(2), b"through the third");
    assert_eq!(wire.take(), b"through the third");
    rig.post(rx(2), 50);
    rig.console.remove_port(2).unwrap();
    assert_eq!(rig.hear(), message(2, event::DEVICE_REMOVE, 0));
    // Neither way anything goes to or comes from the wire any more.
    rig.transmit(tx(2), b"too late");
    wire.receive(b"too late");
    assert!(!wire.has_output() && rig.stays_unused(rx(2)));
    let gone = rig.console.remove_port(2).unwrap_err();
    assert_eq!(gone.to_string(), "serial0: there is no port 2");
    // Number, name and wire can be used again; the buffer that was there waits still.
    let added = rig
        .console
        .add_port(serial("again", "org.ebbtide.2"), &wire);
    assert_eq!(added, Ok(2));
    assert_eq!(rig.hear(), message(2, event::DEVICE_ADD, 0));
    rig.say(2, event::PORT_READY, 1);
    assert_eq!(rig.hear(), name);
    assert_eq!(rig.hear(), message(2, event::PORT_OPEN, 1));
    rig.say(2, event::PORT_OPEN, 1);
    assert_eq!(rig.buffer(rx(2)), b"too late");
    rig.assert_works();
}

/// Added, removed and added again before the driver had room for a message: it hears what is so now.
#[test]
fn a_driver_that_listens_late() {
    let mut rig = Rig::with(ALL);
    rig.say(0, event::DEVICE_READY, 1);
    let wire = Wire::new();
    for name in ["a", "b", "c"] {
        rig.console.remove_port(1).unwrap();
        let added = rig.console.add_port(serial(name, name), &wire);
        assert_eq!(added, Ok(1));
    }
    rig.post_for_messages(9);
    assert_eq!(rig.hear(), message(0, event::DEVICE_ADD, 0));
    assert_eq!(rig.hear(), message(1, event::DEVICE_ADD, 0));
    rig.say(1, event::PORT_READY, 1);
    assert_eq!(rig.hear(), (1, event::PORT_NAME, 1, b"c".to_vec()));
    // One it has heard of is taken away before another is added.
    rig.console.remove_port(1).unwrap();
    let added = rig.console.add_port(serial("d", "d"), &wire);
    assert_eq!(added, Ok(1));
    assert_eq!(rig.hear(), message(1, event::DEVICE_REMOVE, 0));
    assert_eq!(rig.hear(), message(1, event::DEVICE_ADD, 0));
    assert!(rig.stays_unused(TO_DRIVER));
}

#[test]
fn ports_that_cannot_be() {
    let rig = Rig::with(ALL);
    let wire = Wire::new();
    let refused = |spec: PortSpec| rig.console.add_port(spec, &wire).unwrap_err().to_string();
    let numbered = |spec: PortSpec, number| PortSpec {
        number: Some(number),
        ..spec
    };
    for (spec, expected) in [
        (
            numbered(console("x"), 3),
            "serial0: port number 3 is not below max_ports=3",
        ),
        (
            numbered(serial("x", "x"), 0),
            "serial0: port 0 is for a virtconsole, `x` is none",
        ),
        (
            numbered(serial("x", "x"), 1),
            "serial0: port 1 is taken by `pipe`",
        ),
        (
            serial("x", "org.ebbtide.1"),
            "serial0: there is a port named `org.ebbtide.1` already",
        ),
    ] {
        assert_eq!(refused(spec), expected);
    }
    for name in ["", "a/b", "a\0b", &"n".repeat(256)] {
        assert!(refused(serial("x", name)).contains("does not have 1 to 255 bytes"));
    }
    assert_eq!(rig.console.add_port(serial("x", "x"), &wire), Ok(2));
    assert_eq!(
        refused(serial("y", "y")),
        "serial0: no port is free for `y`, max_ports=3"
    );
    for max_ports in [0, 32] {
        let spec = ConsoleSpec {
            max_ports,
            ..ConsoleSpec::new("serial1")
        };
        let made = VirtioConsole::new(spec, rig.board.remote());
        assert!(matches!(made, Err(ConsoleError::MaxPorts { .. })));
    }
}

#[test]
fn another_size() {
    let mut rig = Rig::new();
    let message = rig.driver.config_message();
    let before = rig.driver.interrupts(message);
    let size = Size {
        columns: 200,
        rows: 50,
    };
    rig.console.resize(0, size).unwrap();
    assert!(rig.driver.wait_interrupt(message, before + 1));
    assert_eq!(rig.driver.read_config(0, 2), 200);
    assert_eq!(rig.driver.read_config(2, 2), 50);
    assert_eq!(rig.hear(), (0, event::RESIZE, 0, vec![200, 0, 50, 0]));
    assert!(rig.console.resize(2, size).is_err());
    let board = Board::new(1 << 20).unwrap();
    let console = VirtioConsole::new(ConsoleSpec::new("serial1"), board.remote()).unwrap();
    assert!(matches!(
        console.resize(0, size),
        Err(ConsoleError::NoSize { .. })
    ));
}

#[test]
fn all_ports_of_a_device() {
    let board = Board::new(64 << 20).unwrap();
    let device = VirtioConsole::new(ConsoleSpec::new("serial0"), board.remote()).unwrap();
    let wires: Vec<_> = (0..31).map(|_| Wire::new()).collect();
    for (number, wire) in (0..).zip(&wires) {
        wire.listen(true);
        let spec = match number {
            0 => console("hvc"),
            _ => serial(&format!("port{number}"), &format!("name{number}")),
        };
        assert_eq!(device.add_port(spec, wire), Ok(number));
    }
    let mut rig = device::Rig::new(board, device, ALL, &[16; 64]);
    for port in 0..31_u16 {
        let queue = if port == 0 { 1 } else { 2 * port + 3 };
        let gpa = rig.board.ram().alloc(2, 1);
        rig.board.ram().put(gpa, &port);
        rig.add(queue, &[Part::readable(gpa, 2)], Layout::Direct);
        rig.used(queue);
        assert_eq!(wires[usize::from(port)].take(), port.to_le_bytes());
    }
    rig.close_ends();
}
