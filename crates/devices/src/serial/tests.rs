// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The port as a 16550 driver uses it.

use super::*;
use std::sync::atomic::{AtomicUsize, Ordering};

const IER: u64 = 1;
const IIR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const RECEIVE: u64 = 1;
const TRANSMIT: u64 = 2;

/// Counts edges; the level must be low in between.
#[derive(Default)]
struct Line {
    edges: AtomicUsize,
    level: std::sync::atomic::AtomicBool,
}

impl IrqLine for Line {
    fn set(&self, high: bool) {
        if high && !self.level.swap(high, Ordering::SeqCst) {
            self.edges.fetch_add(1, Ordering::SeqCst);
        }
        self.level.store(high, Ordering::SeqCst);
    }
}

struct Bench {
    port: Owned<SerialPort>,
    wire: Arc<Wire>,
    line: Arc<Line>,
}

fn bench() -> Bench {
    let (wire, line) = (Wire::new(), Arc::new(Line::default()));
    let port = SerialPort::new("serial0", line.clone(), &wire);
    wire.listen(true);
    Bench { port, wire, line }
}

impl Bench {
    fn read(&self, register: u64) -> u8 {
        self.port.get().read(register, 1) as u8
    }

    fn write(&self, register: u64, byte: u8) {
        self.port.get().write(register, 1, byte.into());
    }

    fn edges(&self) -> usize {
        self.line.edges.swap(0, Ordering::SeqCst)
    }

    /// What a driver's interrupt routine does.
    fn receive(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.read(LSR) & 1 != 0 {
            bytes.push(self.read(0));
        }
        bytes
    }
}

#[test]
fn output_goes_to_the_wire_in_order() {
    let bench = bench();
    for byte in *b"hello" {
        assert_eq!(bench.read(LSR) & 0x60, 0x60, "always ready");
        bench.write(0, byte);
    }
    assert_eq!(bench.wire.take(), b"hello");
}

#[test]
fn a_16550a_is_detected() {
    let bench = bench();
    bench.write(2, 1);
    assert_eq!(bench.read(IIR) >> 6, 3, "fifo enabled");
    bench.write(7, 0x5a);
    assert_eq!(bench.read(7), 0x5a, "scratch");
    bench.write(LCR, 0x83);
    bench.write(0, 1);
    bench.write(1, 0);
    assert_eq!((bench.read(0), bench.read(1)), (1, 0), "divisor");
    bench.write(LCR, 0x03);
    bench.write(IER, 0xff);
    assert_eq!(bench.read(IER), 0x0f, "no bits of later chips");
}

#[test]
fn sending_raises_one_edge_until_it_is_identified() {
    let bench = bench();
    bench.write(0, b'a');
    assert_eq!(bench.edges(), 0);
    bench.write(IER, TRANSMIT as u8);
    assert_eq!(bench.edges(), 1, "empty already");
    for byte in *b"0123456789abcdef" {
        bench.write(0, byte);
    }
    assert_eq!(bench.edges(), 0, "pending already");
    assert_eq!(bench.read(IIR) & 0xf, 2);
    assert_eq!(bench.read(IIR) & 0xf, 1, "none");
    bench.write(0, b'x');
    assert_eq!(bench.edges(), 1);
}

#[test]
fn enabling_the_transmit_interrupt_twice_raises_it_twice() {
    // What Linux does at start to find out whether it has to poll.
    let bench = bench();
    for _ in 0..2 {
        bench.write(IER, TRANSMIT as u8);
        assert_eq!(bench.read(IIR) & 0xf, 2);
        bench.write(IER, 0);
    }
    assert_eq!(bench.edges(), 2);
}

#[test]
fn input_arrives_beyond_the_fifo_without_being_asked_for() {
    let bench = bench();
    bench.write(IER, RECEIVE as u8);
    let sent: Vec<u8> = (0..1000u16).map(|n| n as u8).collect();
    bench.wire.receive(&sent);
    assert_eq!(bench.edges(), 1);
    assert_eq!(bench.read(IIR) & 0xf, 4);
    assert_eq!(bench.receive(), sent);
    assert_eq!(bench.read(LSR) & 1, 0);
    bench.read(IIR);
    bench.edges();
    bench.wire.receive(b"more");
    assert_eq!(bench.edges(), 1, "and again");
}

#[test]
fn input_during_masked_interrupts_is_announced_when_they_are_unmasked() {
    // Linux masks interrupts around each message it prints.
    let bench = bench();
    bench.wire.receive(b"x");
    assert_eq!(bench.edges(), 0);
    bench.write(IER, RECEIVE as u8);
    assert_eq!(bench.edges(), 1);
    assert_eq!(bench.receive(), b"x");
}

#[test]
fn loopback_sees_its_own_bytes_and_keeps_the_others_waiting() {
    let bench = bench();
    bench.write(MCR, LOOPBACK);
    bench.wire.receive(b"outside");
    bench.write(0, b'l');
    assert_eq!(bench.receive(), b"l");
    assert!(bench.wire.take().is_empty());
    bench.write(MCR, 0);
    assert_eq!(bench.receive(), b"outside");
}

#[test]
fn reset_is_power_on_and_keeps_what_was_typed() {
    let bench = bench();
    bench.write(IER, RECEIVE as u8);
    bench.write(LCR, 0x80);
    bench.wire.receive(&[b'a'; 100]);
    bench.port.get().reset();
    assert_eq!(bench.read(IER), 0);
    assert_eq!(bench.read(LCR), 0x03);
    let kept = bench.receive();
    assert!(
        kept.len() >= 36 && kept.iter().all(|&byte| byte == b'a'),
        "{}",
        kept.len()
    );
}

#[test]
fn a_closed_port_takes_no_input_and_answers_nothing() {
    let Bench { port, wire, line } = bench();
    let registers = ebbtide_bus::gated::registers(port.handle());
    registers.write(IER, 1, RECEIVE);
    port.close();
    wire.receive(b"late");
    assert_eq!(line.edges.load(Ordering::SeqCst), 0);
    assert_eq!(registers.read(LSR, 1), 0xff);
    registers.write(0, 1, b'x'.into());
    assert!(wire.take().is_empty());
}

#[test]
fn any_access_is_harmless() {
    let bench = bench();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..200_000 {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let offset = if seed & 0x100 == 0 { seed % 10 } else { seed };
        let size = [1, 2, 4, 8, 3, 0, 255, 1][(seed >> 20) as usize % 8];
        match seed >> 62 {
            0 => bench.port.get().write(offset, size, seed.rotate_left(9)),
            1 => drop(bench.port.get().read(offset, size)),
            2 => bench
                .wire
                .receive(&seed.to_le_bytes()[..(seed >> 40) as usize % 8]),
            _ => drop(bench.wire.take()),
        }
    }
    bench.port.get().reset();
    bench.receive();
    assert_eq!(bench.read(LSR), 0x60);
}
