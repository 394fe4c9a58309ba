// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The registers, and the AML that uses them, evaluated against them.

use std::sync::Mutex as Lock;
use std::sync::atomic::{AtomicBool, Ordering};

use ebbtide_gate::Gate;
use ebbtide_memory::{Memory, MemoryConfig};
use proptest::prelude::*;

use super::*;
use crate::acpi::interpreter::Interpreter;
use crate::acpi::parser::{Object, Value};
use crate::acpi::tests::{description, dsdt};
use crate::acpi::{Description, EVENT_PORT};
use crate::irq::IrqLine;
use crate::pci::{Config, Devfn, Function, Ids, Windows};

struct Plain(Config);
impl Function for Plain {
    fn config(&self) -> &Config {
        &self.0
    }
}

#[derive(Default)]
struct Ejects(Lock<Vec<u8>>);
impl EjectSink for Ejects {
    fn eject(&self, slot: &SlotAddress) {
        assert_eq!(&*slot.bus, HostBridge::BUS);
        self.0.lock().unwrap().push(slot.slot);
    }
}

#[derive(Default)]
struct Line(AtomicBool);
impl IrqLine for Line {
    fn set(&self, high: bool) {
        self.0.store(high, Ordering::SeqCst);
    }
}

/// A bus with functions in slots 3 and 31.
struct Rig {
    host: Arc<HostBridge>,
    registers: Arc<PciHotplug>,
    events: Arc<EventDevice>,
    line: Arc<Line>,
    ejects: Arc<Ejects>,
}

fn rig() -> Rig {
    let memory = Memory::new(MemoryConfig {
        arena_bytes: 1 << 20,
    })
    .unwrap();
    let windows = Windows {
        mmio32: 0xc000_0000..0xe000_0000,
        mmio64: 1 << 36..1 << 37,
        io: 0xc000..0x1_0000,
    };
    let host = HostBridge::new(&memory, windows).unwrap();
    let (line, ejects) = (Arc::new(Line::default()), Arc::new(Ejects::default()));
    let events = Arc::new(EventDevice::new(line.clone()));
    let registers = PciHotplug::new(&host, ejects.clone(), events.clone());
    let rig = Rig {
        host,
        registers,
        events,
        line,
        ejects,
    };
    rig.attach(3);
    rig.attach(31);
    rig
}

impl Rig {
    fn attach(&self, slot: u8) {
        let ids = Ids {
            vendor: 0x1234,
            device: 1,
            revision: 0,
            class: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        };
        let config = Config::new(&Gate::new(format!("device{slot}")), ids);
        self.host
            .attach(Some(slot), Arc::new(Plain(config)))
            .unwrap();
    }

    fn detach(&self, slot: u8) {
        let devfn = Devfn::new(slot, 0).unwrap();
        let function = self.host.bus().function(devfn).unwrap();
        function.config().gate().close();
        self.host.detach_at(devfn).unwrap();
        self.slot(slot).detached();
    }

    fn slot(&self, slot: u8) -> Arc<dyn HotplugSlot> {
        self.registers.slot(slot).unwrap()
    }

    fn read(&self, offset: u64) -> u32 {
        self.registers.read(offset, 4) as u32
    }

    fn ejected(&self) -> Vec<u8> {
        std::mem::take(&mut *self.ejects.0.lock().unwrap())
    }

    fn line(&self) -> bool {
        self.line.0.load(Ordering::SeqCst)
    }

    /// Handles an event as a guest does, if there is one: returns what was notified.
    fn guest(&self) -> Vec<(String, u64)> {
        if !self.line() {
            return Vec::new();
        }
        let mut guest = self.interpreter();
        guest.call("\\_SB_.GED_._EVT", &[9]);
        let names = guest.notified.into_iter();
        names
            .map(|(path, value)| (path.rsplit_once('.').unwrap().1.to_owned(), value))
            .collect()
    }

    fn interpreter(&self) -> Interpreter<'_> {
        let description = Description {
            pci_hotplug: true,
            ..description()
        };
        let ports: Vec<(u64, &dyn Mmio)> = vec![
            (EVENT_PORT.into(), &*self.events),
            (PCI_HOTPLUG_PORTS.start.into(), &*self.registers),
        ];
        Interpreter::new(dsdt(&description), ports)
    }
}

fn notified(slot: &str, value: u64) -> Vec<(String, u64)> {
    vec![(slot.to_owned(), value)]
}

/// Something came to the slot, or went: bus check, device check.
fn changed(slot: &str) -> Vec<(String, u64)> {
    [notified(slot, 0), notified(slot, 1)].concat()
}

#[test]
fn a_function_comes_and_goes() {
    let rig = rig();
    rig.attach(5);
    rig.slot(5).plugged();
    assert_eq!(rig.guest(), changed("S28_"));
    assert!(!rig.line());
    rig.slot(5).plugged();
    assert!(!rig.line(), "known");
    assert_eq!(rig.slot(5).request_removal(), Ok(Removal::Asked));
    assert!(rig.slot(5).state().requested);
    let both = [notified("S28_", 3), changed("S28_")].concat();
    assert_eq!(
        rig.guest(),
        both,
        "the slot is still one that something came to"
    );
    rig.interpreter().call("\\_SB_.PCI0.S28_._EJ0", &[1]);
    assert_eq!(rig.ejected(), [5]);
    let state = rig.slot(5).state();
    assert!(state.ejected && state.occupied && !state.requested);
    assert_eq!(
        (rig.read(UP), rig.read(DOWN)),
        (1 << 5, 0),
        "up until it is detached"
    );
    assert_eq!(rig.slot(5).request_removal(), Ok(Removal::Unused));
    rig.detach(5);
    assert_eq!((rig.read(UP), rig.read(DOWN)), (0, 0));
    assert!(!rig.line(), "the guest knows");
    assert!(!rig.slot(5).state().occupied);
    assert_eq!(rig.slot(5).request_removal(), Err(HotplugError::Empty));
}

#[test]
fn a_request_waits_for_a_guest_that_listens() {
    let rig = rig();
    assert_eq!(rig.slot(3).request_removal(), Ok(Removal::Asked));
    // Another guest starts.
    rig.events.reset();
    rig.registers.reset();
    assert_eq!(rig.guest(), notified("S18_", 3));
    assert_eq!(rig.guest(), [], "told once");
    assert_eq!(rig.slot(3).request_removal(), Ok(Removal::Asked));
    assert_eq!(
        rig.guest(),
        notified("S18_", 3),
        "and again when asked again"
    );
    rig.slot(3).cancel();
    rig.events.reset();
    rig.registers.reset();
    assert_eq!(rig.guest(), []);
    assert_eq!(rig.ejected(), []);
}

#[test]
fn an_eject_that_is_not_wanted_is_something_new() {
    let rig = rig();
    rig.interpreter().call("\\_SB_.PCI0.S18_._EJ0", &[1]);
    assert_eq!(rig.ejected(), [3]);
    rig.interpreter().call("\\_SB_.PCI0.S18_._EJ0", &[1]);
    assert_eq!(rig.ejected(), [], "told once");
    rig.slot(3).plugged();
    assert_eq!(rig.guest(), changed("S18_"));
    assert!(!rig.slot(3).state().ejected);
    rig.interpreter().call("\\_SB_.PCI0.S18_._EJ0", &[1]);
    assert_eq!(rig.ejected(), [3]);
}

#[test]
fn what_is_taken_away_is_let_go_of_once() {
    let rig = rig();
    rig.detach(3);
    assert_eq!(rig.guest(), notified("S18_", 3));
    rig.attach(4);
    rig.slot(4).plugged();
    assert_eq!(rig.guest(), changed("S20_"));

    // Asked for, not seen by the guest, gone; something else is there by then.
    assert_eq!(rig.slot(4).request_removal(), Ok(Removal::Asked));
    rig.detach(4);
    rig.attach(4);
    rig.slot(4).plugged();
    let both = [notified("S20_", 3), changed("S20_")].concat();
    assert_eq!(rig.guest(), both);

    // Seen by the guest, which is not told again.
    assert_eq!(rig.slot(4).request_removal(), Ok(Removal::Asked));
    assert_eq!(rig.guest(), both);
    rig.detach(4);
    assert!(!rig.line());
    rig.attach(4);
    rig.slot(4).plugged();
    assert_eq!(rig.guest(), changed("S20_"));
    // A request the guest has seen, but that was taken back.
    assert_eq!(rig.slot(4).request_removal(), Ok(Removal::Asked));
    assert_eq!(rig.guest(), both);
    rig.slot(4).cancel();
    rig.detach(4);
    assert_eq!(rig.guest(), notified("S20_", 3));
}

#[test]
fn only_what_is_there_and_removable_is_ejected() {
    let rig = rig();
    rig.registers.set_removable(31, false);
    assert_eq!(rig.read(REMOVABLE), 0x7fff_fffe);
    rig.registers.write(EJECT, 4, u64::MAX);
    assert_eq!(rig.ejected(), [3]);
    assert_eq!(
        rig.slot(31).request_removal(),
        Err(HotplugError::NotHotpluggable)
    );
    rig.registers.set_removable(31, true);
    rig.registers.write(EJECT, 2, 1 << 31);
    rig.registers.write(BUS, 4, 1);
    rig.registers.write(EJECT, 4, 1 << 31);
    assert_eq!(rig.ejected(), [], "half a register, and another bus");
    assert_eq!((rig.read(REMOVABLE), rig.read(BUS)), (0, 1));
    rig.registers.write(BUS, 4, 0);
    rig.registers.write(EJECT, 4, 1 << 31);
    assert_eq!(rig.ejected(), [31]);
    assert_eq!(rig.read(EJECT), 0, "no further features");
    assert!(rig.registers.slot(0).is_none() && rig.registers.slot(32).is_none());
}

#[test]
fn an_instance_number_belongs_to_what_is_in_the_slot() {
    let rig = rig();
    rig.registers.set_index(3, 0x1234_5678);
    let index = |slot: u32| {
        let mut guest = rig.interpreter();
        guest.call("\\_SB_.PCI0.AIDX", &[1 << slot]).integer()
    };
    assert_eq!((index(3), index(31)), (0x1234_5678, 0));
    rig.registers.write(INDEX, 4, 0);
    assert_eq!(rig.read(INDEX), 0, "of no slot");
    assert_eq!(rig.registers.slot_of_index(0x1234_5678), Some(3));
    rig.detach(3);
    assert_eq!(index(3), 0);
    assert_eq!(rig.registers.slot_of_index(0x1234_5678), None);
}

#[test]
fn each_slot_is_a_device() {
    let objects = dsdt(&Description {
        pci_hotplug: true,
        ..description()
    });
    for slot in 1..32_u64 {
        let path = |name| format!("\\_SB_.PCI0.S{:02X}_.{name}", slot << 3);
        assert_eq!(
            objects[&path("_ADR")],
            Object::Value(Value::Integer(slot << 16))
        );
        assert_eq!(objects[&path("_SUN")], Object::Value(Value::Integer(slot)));
        assert!(matches!(
            objects[&path("_EJ0")],
            Object::Method { arguments: 1, .. }
        ));
        assert!(matches!(
            objects[&path("_DSM")],
            Object::Method { arguments: 4, .. }
        ));
    }
    assert!(!objects.contains_key("\\_SB_.PCI0.S00_"));
    let region = Object::Region {
        space: 1,
        offset: 0xae00,
        length: 0x18,
    };
    assert_eq!(objects["\\_SB_.PCI0.PCST"], region);
    assert!(
        !dsdt(&description())
            .keys()
            .any(|path| path.contains("PCNT"))
    );
}

#[test]
fn parts_of_registers_read_as_such() {
    let rig = rig();
    for (offset, size, value) in [
        (REMOVABLE, 1, 0xfe),
        (REMOVABLE + 1, 1, 0xff),
        (REMOVABLE + 2, 2, 0xffff),
        (REMOVABLE + 3, 2, 0xffff),
        (REMOVABLE, 8, u64::MAX),
        (0x18, 4, 0xffff_ffff),
        (u64::MAX, 4, 0xffff_ffff),
    ] {
        assert_eq!(
            rig.registers.read(offset, size),
            value,
            "{offset:#x}, {size}"
        );
    }
}

proptest! {
    /// Whatever a guest writes and the control thread does: an eject is told only of what is there and removable, and once
    /// until the slot is plugged again; no register says more than there are slots.
    #[test]
    fn any_access(steps in prop::collection::vec((0u8..12, any::<u64>(), any::<u64>()), 1..80)) {
        let rig = rig();
        let mut present = 1u32 << 3 | 1 << 31;
        let mut told = 0u32;
        for (step, a, value) in steps {
            let slot = 1 + (a >> 8) as u8 % 31;
            let bit = 1 << slot;
            match step {
                0 if present & bit == 0 => {
                    rig.attach(slot);
                    rig.slot(slot).plugged();
                    present |= bit;
                    told &= !bit;
                }
                0 | 1 => {
                    rig.slot(slot).plugged();
                    told &= !bit;
                }
                2 if present & bit != 0 => {
                    rig.detach(slot);
                    present &= !bit;
                    told &= !bit;
                }
                3 => drop(rig.slot(slot).request_removal()),
                4 => rig.slot(slot).cancel(),
                5 => rig.registers.reset(),
                6 => rig.registers.write(BUS, 4, 0),
                7 => rig.registers.write(EJECT, 4, value),
                _ => {
                    let size = [1, 2, 4, 8, 3, 0][(a % 6) as usize];
                    rig.registers.write(a >> 3 & 0x1f, size, value);
                    rig.registers.read(a >> 3 & 0x1f, size);
                }
            }
            for slot in rig.ejected() {
                let bit = 1u32 << slot;
                prop_assert!(present & bit != 0 && told & bit == 0, "slot {slot}");
                told |= bit;
            }
            for register in [UP, DOWN, REMOVABLE] {
                prop_assert_eq!(rig.read(register) & 1, 0);
            }
        }
    }
}
