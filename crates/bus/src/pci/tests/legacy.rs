// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Functions from before PCI Express: I/O BARs and interrupt pins.

use std::sync::Arc;

use ebbtide_gate::Gate;
use ebbtide_memory::{AddressSpace, Region};

use super::*;
use crate::gated;
use crate::irq::IrqLine;
use crate::pci::fakes::{DEVICE_IDS, Level, Signature, windows};
use crate::pci::{
    BarKind, BarSpec, Config, HostBridge, InterruptPin, IntxPin, IntxWires, PciError, Windows,
};

const IO: u32 = 1;
const INTX_DISABLE: u32 = 1 << 10;

/// A function with an I/O BAR of 8 ports (reads 0x10), a memory BAR of a page and INTA#.
struct Legacy {
    config: Config,
    pin: Arc<InterruptPin>,
}

impl Function for Legacy {
    fn config(&self) -> &Config {
        &self.config
    }
}

fn legacy(name: &str) -> Arc<Legacy> {
    let gate = Gate::new(name);
    let mut config = Config::new(&gate, DEVICE_IDS);
    for (index, kind, size_bytes) in [(0, BarKind::Io, 8), (1, BarKind::Mem32, 4096)] {
        let registers = gated::behind(&gate, Arc::new(Signature(0x1010_1010)));
        let region = Region::mmio(format!("{name}-{index}"), size_bytes, registers);
        config
            .add_bar(index, BarSpec { size_bytes, kind }, region)
            .unwrap();
    }
    let pin = InterruptPin::new(IntxPin::A);
    config.add_interrupt_pin(&pin);
    Arc::new(Legacy { config, pin })
}

struct Bench {
    machine: Machine,
    ports: Arc<AddressSpace>,
    lines: Vec<Arc<Level>>,
}

impl Bench {
    fn new() -> Self {
        let machine = Machine::new();
        let root = Region::container("io", 1 << 16);
        let container = machine.bridge.io_container();
        machine
            .memory
            .update(|change| change.add(&root, container, 0, HostBridge::PRIORITY))
            .unwrap();
        let ports = machine.memory.address_space("I/O", &root).unwrap();
        let lines: Vec<Arc<Level>> = (0..8).map(|_| Arc::default()).collect();
        let inputs = (16..).zip(lines.iter().map(|line| Arc::clone(line) as _));
        machine
            .bridge
            .wire_interrupts(IntxWires::new(inputs).unwrap());
        Self {
            machine,
            ports,
            lines,
        }
    }

    fn attach(&self, slot: u8) -> Arc<Legacy> {
        let device = legacy(&format!("legacy{slot}"));
        self.machine
            .bridge
            .attach(Some(slot), device.clone())
            .unwrap();
        device
    }

    fn inb(&self, port: u32) -> u64 {
        self.ports
            .load(&self.machine.memory.register(), port.into(), 1)
    }
}

#[test]
fn an_io_bar_tells_its_size_and_moves() {
    let bench = Bench::new();
    let (machine, device) = (&bench.machine, bench.attach(3));
    machine.set_config(3, 0x10, 4, u32::MAX);
    assert_eq!(machine.config(3, 0x10, 4), 0xffff_fff9);
    machine.bridge.assign_bars().unwrap();
    assert_eq!(machine.config(3, COMMAND, 2), IO | MEMORY);
    let port = machine.config(3, 0x10, 4) & !3;
    assert!(windows().io.contains(&port.into()));
    assert_eq!(bench.inb(port + 7), 0x10);
    assert_eq!(bench.inb(port + 8), 0xff);
    machine.set_config(3, 0x10, 4, 0xd100);
    assert_eq!(
        (bench.inb(port), bench.inb(0xd100)),
        (0xff, 0x10),
        "at once"
    );
    machine.set_config(3, COMMAND, 2, MEMORY);
    assert_eq!(bench.inb(0xd100), 0xff);
    assert!(device.config().bars()[1].mapped);
    machine.set_config(3, COMMAND, 2, IO);
    assert_eq!(bench.inb(0xd100), 0x10);
    assert!(!device.config().bars()[1].mapped);
    for outside in [0, 0x3f8, 0xbff8, 0x1_0000, 0xffff_fff8] {
        machine.set_config(3, 0x10, 4, outside);
        assert!(!device.config().bars()[0].mapped, "{outside:#x}");
    }
    machine.bridge.reset();
    machine.bridge.assign_bars().unwrap();
    assert_eq!(machine.config(3, 0x10, 4) & !3, port, "the address stays");
    device.config().gate().close();
    assert_eq!(bench.inb(port), 0xff, "closed");
    machine
        .bridge
        .unmap(crate::pci::Devfn::new(3, 0).unwrap())
        .unwrap();
    assert!(machine.bridge.detach(3).is_ok());
}

#[test]
fn a_bus_without_ports_or_wires_refuses_who_needs_them() {
    let machine = Machine::new();
    let refused = |bridge: &HostBridge| bridge.attach(Some(4), legacy("old")).unwrap_err();
    let error = refused(&machine.bridge);
    assert!(matches!(&error, PciError::NoIntx { name } if name == "old"));
    let no_ports = Windows {
        io: 0..0,
        ..windows()
    };
    let bridge = HostBridge::new(&machine.memory, no_ports).unwrap();
    let wire = (16, Arc::new(Level::default()) as Arc<dyn IrqLine>);
    bridge.wire_interrupts(IntxWires::new([wire]).unwrap());
    let error = refused(&bridge);
    assert!(matches!(&error, PciError::NoIoSpace { name } if name == "old"));
    assert!(error.to_string().contains("old needs i/o ports"), "{error}");
    assert!(bridge.functions().iter().all(|(at, _)| at.slot() == 0));
}

#[test]
fn a_function_that_is_on_the_bus_keeps_its_wire_when_another_slot_refuses_it() {
    let bench = Bench::new();
    let device = bench.attach(2);
    device.pin.set(true);
    let refused = bench.machine.bridge.attach(Some(3), device.clone());
    assert!(matches!(refused, Err(PciError::Memory { .. })));
    assert!(bench.lines[2].is_high() && !bench.lines[3].is_high());
}

#[test]
fn io_bars_are_from_4_to_256_ports() {
    let mut config = Config::new(&Gate::new("io"), DEVICE_IDS);
    for size_bytes in [0, 1, 2, 3, 12, 512, 4096] {
        let region = Region::mmio("io", size_bytes.max(1), Arc::new(Signature(0)));
        let kind = BarKind::Io;
        let error = config.add_bar(0, BarSpec { size_bytes, kind }, region);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("from 4 to 256"), "{size_bytes}: {error}");
    }
}

#[test]
fn status_shows_the_pin_and_intx_disable_keeps_it_from_the_wire() {
    let bench = Bench::new();
    let (machine, device) = (&bench.machine, bench.attach(5));
    assert_eq!(machine.config(5, 0x3c, 2), 0x0100 | (16 + 5), "INTA# on 21");
    let line = &bench.lines[5];
    let status = || {
        let word = machine.config(5, 6, 2);
        assert_eq!(machine.config(5, 4, 4) >> 16, word);
        assert_eq!(machine.config(5, 6, 1), word & 0xff);
        assert_eq!(machine.config(5, 7, 1), word >> 8);
        word & 8 != 0
    };
    assert!(!status());
    device.pin.set(true);
    assert!(status() && line.is_high());
    machine.set_config(5, 5, 1, INTX_DISABLE >> 8);
    assert!(status() && !line.is_high());
    machine.set_config(5, COMMAND, 2, 0);
    assert!(status() && line.is_high());
    machine.set_config(5, COMMAND, 2, INTX_DISABLE);
    machine.bridge.reset();
    assert!(!device.config().command().intx_disable());
    assert!(line.is_high(), "the device has not let go");
    assert_eq!(machine.config(5, 0x3c, 2), 0x0100 | (16 + 5));
}

#[test]
fn a_removed_function_does_not_hold_the_wire_of_those_who_stay() {
    let bench = Bench::new();
    let (gone, stays) = (bench.attach(2), bench.attach(10));
    let line = &bench.lines[2];
    gone.pin.set(true);
    stays.pin.set(true);
    stays.pin.set(false);
    assert!(line.is_high());
    gone.config().gate().close();
    let at = crate::pci::Devfn::new(2, 0).unwrap();
    bench.machine.bridge.unmap(at).unwrap();
    assert!(!line.is_high());
    gone.pin.set(true);
    assert!(!line.is_high(), "a late one reaches nobody");
    stays.pin.set(true);
    assert!(line.is_high());
    bench.machine.bridge.detach(2).unwrap();
    assert!(line.is_high());
}

/// A function with INTA# and nothing else.
fn pin_only(name: &str) -> Arc<Legacy> {
    let mut config = Config::new(&Gate::new(name), DEVICE_IDS);
    let pin = InterruptPin::new(IntxPin::A);
    config.add_interrupt_pin(&pin);
    Arc::new(Legacy { config, pin })
}

impl Bench {
    fn bridge(&self, name: &str, model: PortModel) -> Arc<Port> {
        port(&self.machine, name, model, None, &FakeController::default())
    }

    /// The only line that is high, as its number from 0 on.
    fn high(&self) -> Option<usize> {
        let mut high = self.lines.iter().enumerate().filter(|(_, it)| it.is_high());
        let first = high.next().map(|(index, _)| index);
        assert!(high.next().is_none(), "one line only");
        first
    }
}

/// What Linux makes of a pin behind bridges: at each it is rotated by the slot, and the root's table has the last word.
fn swizzled(slots: &[u8], pin: u8) -> usize {
    let (root, below) = slots.split_first().unwrap();
    let pin = below.iter().rev().fold(pin, |pin, slot| (pin + slot) % 4);
    usize::from(root + pin) % 8
}

#[test]
fn a_pin_behind_bridges_is_rotated_by_slot_at_each() {
    let bench = Bench::new();
    let (outer, inner) = (
        bench.bridge("outer", PortModel::PciBridge),
        bench.bridge("inner", PortModel::PciBridge),
    );
    let root = bench.machine.bridge.bus();
    root.attach(Some(6), outer.clone()).unwrap();
    outer.bus().attach(Some(9), inner.clone()).unwrap();
    for slot in [0, 1, 2, 3, 7, 30] {
        let device = pin_only(&format!("pin{slot}"));
        inner.bus().attach(Some(slot), device.clone()).unwrap();
        device.pin.set(true);
        let expected = swizzled(&[6, 9, slot], 0);
        assert_eq!(bench.high(), Some(expected), "slot {slot}");
        assert_eq!(device.config().read(0x3c, 1) as usize, 16 + expected);
        device.pin.set(false);
        assert_eq!(bench.high(), None);
    }
}

#[test]
fn what_was_behind_a_bridge_before_it_is_plugged_gets_its_wire_then() {
    let bench = Bench::new();
    let (outer, inner) = (
        bench.bridge("outer", PortModel::PciBridge),
        bench.bridge("inner", PortModel::PciBridge),
    );
    let device = pin_only("pin");
    inner.bus().attach(Some(2), device.clone()).unwrap();
    outer.bus().attach(Some(1), inner.clone()).unwrap();
    device.pin.set(true);
    assert_eq!(bench.high(), None, "no way to the interrupt controller yet");
    let unwired = HostBridge::new(&bench.machine.memory, windows()).unwrap();
    let refused = unwired.attach(Some(4), outer.clone()).unwrap_err();
    assert!(matches!(&refused, PciError::NoIntx { name } if name == "pin"));
    bench.machine.bridge.attach(Some(4), outer.clone()).unwrap();
    assert_eq!(bench.high(), Some(swizzled(&[4, 1, 2], 0)));
    // The whole goes, from below.
    for (bus, slot, function) in [
        (inner.bus(), 2, device.config()),
        (outer.bus(), 1, inner.config()),
        (bench.machine.bridge.bus(), 4, outer.config()),
    ] {
        let at = crate::pci::Devfn::new(slot, 0).unwrap();
        function.gate().close();
        bus.unmap(at).unwrap();
        bus.detach_at(at).unwrap();
        assert_eq!(bench.high(), None);
    }
}

#[test]
fn an_io_bar_is_refused_behind_a_bridge() {
    let bench = Bench::new();
    let bridge = bench.bridge("br0", PortModel::PciBridge);
    bench
        .machine
        .bridge
        .attach(Some(4), bridge.clone())
        .unwrap();
    let error = bridge.bus().attach(Some(1), legacy("old")).unwrap_err();
    assert!(matches!(&error, PciError::NoIoSpace { name } if name == "old"));
    assert!(bridge.bus().is_empty());
}
