// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The serial port on the PCI bus, as Linux's 8250 drivers use it, and its removal.

mod board;

use std::sync::Arc;
use std::time::Duration;

use board::{Board, INTX_DISABLE, Random, Slot, ready_within};
use ebbtide_bus::pci::Function;
use ebbtide_devices::chardev::Wire;
use ebbtide_devices::serial_pci::SerialPci;
use ebbtide_gate::Entry;

const IER: u64 = 1;
const IIR: u64 = 2;
const MCR: u64 = 4;
const LSR: u64 = 5;

fn plug<'a>(board: &'a Board, wire: &Arc<Wire>) -> (Arc<SerialPci>, Slot<'a>) {
    wire.listen(true);
    let device = SerialPci::new("serial1", wire).unwrap();
    let slot = board.plug(device.clone());
    (device, slot)
}

/// What an interrupt routine does: until no interrupt is left, or too often.
fn interrupt(slot: &Slot<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..512 {
        if slot.inp(IIR, 1) & 1 != 0 {
            return bytes;
        }
        while slot.inp(LSR, 1) & 1 != 0 {
            bytes.push(slot.inp(0, 1) as u8);
        }
    }
    panic!("the interrupt does not end");
}

#[test]
fn linux_finds_a_single_16550_with_one_io_bar() {
    let (board, wire) = (Board::new(), Wire::new());
    let (_device, slot) = plug(&board, &wire);
    assert_eq!(slot.config(0, 4), 0x0002_1b36);
    assert_eq!(slot.config(8, 4) >> 8, 0x07_00_02);
    assert_eq!(slot.config(0x3d, 1), 1, "INTA#");
    slot.set_config(0x10, 4, u32::MAX);
    assert_eq!(slot.config(0x10, 4), !7 | 1, "8 ports");
    for other in 1..6 {
        assert_eq!(slot.config(0x10 + 4 * other, 4), 0);
    }
    slot.set_config(0x10, 4, 0xd008);
    // autoconfig(): the interrupt enable register has four bits, the scratch register eight, loopback works, a 16550A.
    slot.outp(IER, 1, 0xff);
    assert_eq!(slot.inp(IER, 1), 0x0f);
    slot.outp(IER, 1, 0);
    slot.outp(MCR, 1, 0x1a);
    assert_eq!(slot.inp(6, 1) & 0xf0, 0x90, "DCD and CTS");
    slot.outp(MCR, 1, 8);
    slot.outp(IIR, 1, 1);
    assert_eq!(slot.inp(IIR, 1) >> 6, 3);
}

#[test]
fn a_long_input_arrives_with_one_level_and_then_it_ends() {
    let (board, wire) = (Board::new(), Wire::new());
    let (_device, slot) = plug(&board, &wire);
    slot.outp(IIR, 1, 0x81);
    slot.outp(IER, 1, 1);
    let sent: Vec<u8> = (0..1000u16).map(|n| n as u8).collect();
    wire.receive(&sent);
    assert!(slot.line().is_high());
    assert_eq!(interrupt(&slot), sent);
    assert!(!slot.line().is_high());
    assert_eq!(slot.line().rises(), 1);
    wire.receive(b"more");
    assert!(slot.line().is_high() && slot.config(6, 2) & 8 != 0);
    slot.set_config(4, 2, slot.config(4, 2) | INTX_DISABLE);
    assert!(!slot.line().is_high());
    assert_eq!(interrupt(&slot), b"more", "polled");
}

#[test]
fn the_transmit_interrupt_ends_when_it_is_identified() {
    let (board, wire) = (Board::new(), Wire::new());
    let (_device, slot) = plug(&board, &wire);
    slot.outp(IER, 1, 2);
    assert!(slot.line().is_high(), "empty already");
    assert_eq!(slot.inp(IIR, 1) & 0xf, 2);
    assert!(!slot.line().is_high());
    slot.outp(0, 4, 0x0307_0200 | u64::from(b'h'));
    assert_eq!(wire.take(), b"h", "the other bytes go to their registers");
    assert_eq!(slot.inp(0, 4) >> 24, 3, "line control");
    assert_eq!(slot.inp(IIR, 1), 0xc1, "identified by the wide read");
    slot.outp(0, 1, b'!'.into());
    assert!(slot.line().is_high());
    assert_eq!(wire.take(), b"!");
}

#[test]
fn reset_is_power_on_and_keeps_what_was_typed() {
    let (board, wire) = (Board::new(), Wire::new());
    let (_device, slot) = plug(&board, &wire);
    slot.outp(IER, 1, 3);
    assert!(slot.line().is_high());
    wire.receive(&[b'a'; 100]);
    board.bridge.reset();
    board.bridge.assign_bars().unwrap();
    assert!(!slot.line().is_high());
    assert_eq!((slot.inp(IER, 1), slot.inp(3, 1)), (0, 0));
    let mut kept = 0;
    while slot.inp(LSR, 1) & 1 != 0 {
        assert_eq!(slot.inp(0, 1), u64::from(b'a'));
        kept += 1;
    }
    assert_eq!(kept, 99, "the chip held one");
}

#[test]
fn quiesced_it_asserts_nothing() {
    let (board, wire) = (Board::new(), Wire::new());
    let (device, slot) = plug(&board, &wire);
    slot.outp(IER, 1, 2);
    assert!(slot.line().is_high());
    board::wait(device.quiesce());
    assert!(!slot.line().is_high());
    assert_eq!(slot.inp(IER, 1), 0);
}

#[test]
fn it_is_removed_at_once_with_a_full_character_device() {
    let (board, wire) = (Board::new(), Wire::new());
    let (device, slot) = plug(&board, &wire);
    slot.outp(IER, 1, 1);
    // Nobody reads: more than the wire keeps of what is sent, as much as it takes of what is typed.
    wire.put(&vec![b'.'; 256 << 10]);
    (0..100).for_each(|_| slot.outp(0, 1, b'x'.into()));
    wire.receive(&[b'y'; 10_000]);
    assert!(slot.line().is_high() && wire.dropped_bytes() == 100);
    let (bar, line) = (slot.bar(0), slot.line());
    let closed = device.close();
    assert!(!wire.has_input_listener());
    assert_eq!(
        board.ports.load(&board.memory.register(), bar + LSR, 1),
        0xff
    );
    wire.receive(b"late");
    drop(slot.remove(closed));
    assert!(!line.is_high());
    assert_eq!(Arc::strong_count(&device), 1);
    drop(device);
    assert_eq!(Arc::strong_count(&wire), 1);
    // The character device is as good as before, for the next port.
    assert_eq!(wire.take().len(), 256 << 10);
    let (next, slot) = plug(&board, &wire);
    assert_eq!(interrupt_polled(&slot), b'y');
    drop(slot.remove(next.close()));
}

/// A byte read without interrupts.
fn interrupt_polled(slot: &Slot<'_>) -> u8 {
    assert_eq!(slot.inp(LSR, 1) & 1, 1);
    slot.inp(0, 1) as u8
}

#[test]
fn the_removal_waits_for_an_access_that_is_under_way_and_a_successor_keeps_its_input() {
    let (board, wire) = (Board::new(), Wire::new());
    let (device, slot) = plug(&board, &wire);
    let access = device.gate().enter(Entry::Mmio).unwrap();
    let closed = device.close();
    let successor = SerialPci::new("serial2", &wire).unwrap();
    assert!(wire.has_input_listener());
    let mut closed = Box::pin(closed);
    assert!(ready_within(&mut closed, Duration::from_millis(20)).is_none());
    drop(access);
    drop(slot.remove(closed));
    board::wait(device.close());
    drop(device);
    assert!(wire.has_input_listener(), "the successor's");
    drop(successor);
    assert!(!wire.has_input_listener());
}

#[test]
fn any_access_is_harmless() {
    let (board, wire) = (Board::new(), Wire::new());
    let (device, slot) = plug(&board, &wire);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..50_000 {
        let (offset, value) = (random.below(10), random.next());
        let size = [1, 2, 4, 8][random.below(4) as usize];
        match random.below(8) {
            0..=2 => slot.outp(offset, size, value),
            3 | 4 => drop(slot.inp(offset, size)),
            5 => wire.receive(&value.to_le_bytes()[..random.below(8) as usize]),
            6 => drop(wire.take()),
            _ => slot.set_config(4, 2, 1 | value as u32 & INTX_DISABLE),
        }
        let enabled = device.config().command().0 & INTX_DISABLE as u16 == 0;
        let asserted = slot.config(6, 2) & 8 != 0;
        assert_eq!(slot.line().is_high(), asserted && enabled);
    }
    // Whatever it was told, it can be set up again.
    slot.set_config(4, 2, 1);
    board.bridge.reset();
    board.bridge.assign_bars().unwrap();
    assert!(!slot.line().is_high());
    assert_eq!(slot.inp(LSR, 1) & 0x60, 0x60);
}
