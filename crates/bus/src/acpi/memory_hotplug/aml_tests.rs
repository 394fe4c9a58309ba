// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The AML of the slots, evaluated against the registers as a guest's interpreter would.

use super::tests::{Board, Told, place};
use super::*;
use crate::acpi::interpreter::{Data, Interpreter};
use crate::acpi::parser::{Object, Resource, Value, namespace, resources, tables};
use crate::acpi::tests::description;
use crate::acpi::{Description, Dimms, EVENT_PORT, MemoryRange};

const SLOTS: u16 = 20;

fn with_dimms(slots: u16) -> Description {
    Description {
        dimms: Some(Dimms {
            slots,
            area: MemoryRange {
                range: 14 << 30..16 << 30,
                node: 3,
            },
        }),
        ..description()
    }
}

fn objects(slots: u16) -> std::collections::BTreeMap<String, Object> {
    let image = with_dimms(slots).build(0xe_0000).unwrap();
    namespace(&tables(image.address, &image.bytes)["DSDT"].bytes[36..])
}

fn guest(board: &Board) -> Interpreter<'_> {
    Interpreter::new(
        objects(SLOTS),
        vec![
            (u64::from(EVENT_PORT), &*board.events as &dyn Mmio),
            (u64::from(MEMORY_HOTPLUG_PORTS.start), &board.registers),
        ],
    )
}

impl Interpreter<'_> {
    /// What a guest does when the event device interrupts: the notifications.
    fn interrupt(&mut self) -> Vec<(String, u64)> {
        self.call("\\_SB_.GED_._EVT", &[9]);
        std::mem::take(&mut self.notified)
    }

    fn slot(&mut self, slot: u16, method: &str, arguments: &[u64]) -> Data {
        self.call(&format!("\\_SB_.MHPC.M{slot:03X}.{method}"), arguments)
    }

    fn status(&mut self, slot: u16) -> u64 {
        self.slot(slot, "_STA", &[]).integer()
    }

    fn memory(&mut self, slot: u16) -> (u64, u64, u64) {
        let Data::Buffer(bytes) = self.slot(slot, "_CRS", &[]) else {
            panic!("a buffer")
        };
        let field = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        (field(14), field(22), field(38))
    }
}

fn device(slot: u16) -> String {
    format!("\\_SB_.MHPC.M{slot:03X}")
}

#[test]
fn every_slot_is_a_memory_device() {
    let objects = objects(SLOTS);
    for slot in 0..SLOTS {
        assert_eq!(objects[&device(slot)], Object::Device);
        let uid = &objects[&(device(slot) + "._UID")];
        assert_eq!(*uid, Object::Value(Value::Integer(slot.into())));
        // PNP0C80, compressed.
        let hid = &objects[&(device(slot) + "._HID")];
        assert_eq!(*hid, Object::Value(Value::Integer(0x800c_d041)));
    }
    assert!(!objects.contains_key(&device(SLOTS)));
    let Object::Value(Value::Buffer(bytes)) = &objects["\\_SB_.MHPC._CRS"] else {
        panic!("a buffer")
    };
    let ports = Resource::Io {
        first: 0xa00,
        length: 0x18,
    };
    assert_eq!(resources(bytes), [ports]);
}

#[test]
fn a_module_comes_and_goes() {
    let board = Board::new(SLOTS);
    let mut guest = guest(&board);
    assert_eq!(guest.status(17), 0);
    assert_eq!(guest.memory(17), (0, 0, 0));
    let dimm = place(GuestEject::Requested);
    board.registers.plug(17, dimm, Arrival::Hot).unwrap();
    assert_eq!(guest.interrupt(), [(device(17), 1)]);
    assert_eq!(guest.interrupt(), []);
    assert!(!board.interrupts());
    assert_eq!((guest.status(17), guest.status(16)), (0x0f, 0));
    let last = dimm.base + dimm.size_bytes - 1;
    assert_eq!(guest.memory(17), (dimm.base, last, dimm.size_bytes));
    let Data::Buffer(bytes) = guest.slot(17, "_CRS", &[]) else {
        panic!("a buffer")
    };
    let memory = Resource::Space {
        kind: 0,
        attributes: 3,
        first: dimm.base,
        last,
    };
    assert_eq!(resources(&bytes), [memory]);
    assert_eq!(guest.slot(17, "_PXM", &[]).integer(), u64::from(dimm.node));

    board.registers.request_removal(17).unwrap();
    assert_eq!(guest.interrupt(), [(device(17), 3)]);
    guest.slot(17, "_OST", &[3, 0x84, 0]);
    guest.slot(17, "_EJ0", &[1]);
    assert_eq!(board.sink.take(), [Told::Ost(17, 3, 0x84), Told::Eject(17)]);
    assert_eq!(guest.status(17), 0x0d, "let go, and still there");
    guest.slot(17, "_OST", &[3, 0, 0]);
    assert_eq!(board.sink.take(), [Told::Ost(17, 3, 0)]);
    board.registers.detach(17).unwrap();
    assert_eq!(guest.status(17), 0);
    assert_eq!(guest.interrupt(), []);
}

#[test]
fn all_that_happened_is_told_at_once() {
    let board = Board::new(SLOTS);
    let mut guest = guest(&board);
    let dimm = place(GuestEject::Requested);
    board.registers.plug(0, dimm, Arrival::AtBoot).unwrap();
    board.registers.plug(1, dimm, Arrival::Hot).unwrap();
    board.registers.plug(19, dimm, Arrival::Hot).unwrap();
    board.registers.request_removal(19).unwrap();
    board.registers.request_removal(0).unwrap();
    board.events.press_power_button();
    let button = ("\\_SB_.PWRB".to_owned(), 0x80);
    let expected = [
        button,
        (device(0), 3),
        (device(1), 1),
        (device(19), 1),
        (device(19), 3),
    ];
    assert_eq!(guest.interrupt(), expected);
    assert_eq!(guest.interrupt(), []);
}

#[test]
fn a_refusal_arrives_with_source_and_status() {
    let board = Board::new(SLOTS);
    let mut guest = guest(&board);
    let dimm = place(GuestEject::Requested);
    board.registers.plug(5, dimm, Arrival::AtBoot).unwrap();
    board.registers.request_removal(5).unwrap();
    assert_eq!(guest.interrupt(), [(device(5), 3)]);
    guest.slot(5, "_OST", &[3, 0x82, 0]);
    assert_eq!(board.sink.take(), [Told::Ost(5, 3, 0x82), Told::Refused(5)]);
    assert_eq!(guest.status(5), 0x0f);
    // Uninvited now: it does not go, but the guest is to believe so until it is done, and then finds it again.
    guest.slot(5, "_EJ0", &[1]);
    assert_eq!(board.sink.take(), []);
    assert_eq!(guest.status(5), 0x0d);
    assert_eq!(guest.interrupt(), []);
    guest.slot(5, "_OST", &[3, 0, 0]);
    assert_eq!(board.sink.take(), [Told::Ost(5, 3, 0)]);
    assert_eq!(guest.status(5), 0x0f);
    assert_eq!(guest.interrupt(), [(device(5), 1)]);
    guest.slot(5, "_OST", &[3, 0, 0]);
    assert_eq!(guest.interrupt(), []);
    assert_eq!(board.registers.state(5), Ok(SlotState::Plugged));
}

#[test]
fn the_most_slots_fit_below_the_bios() {
    let image = with_dimms(MAX_DIMM_SLOTS).build(0xe_0000).unwrap();
    assert!(image.bytes.len() < 0x1_f000, "{} bytes", image.bytes.len());
    let board = Board::new(MAX_DIMM_SLOTS);
    let ports = vec![(0xa00, &board.registers as &dyn Mmio)];
    let mut guest = Interpreter::new(objects(MAX_DIMM_SLOTS), ports);
    let dimm = place(GuestEject::Requested);
    board.registers.plug(255, dimm, Arrival::Hot).unwrap();
    guest.call("\\_SB_.MHPC.MSCN", &[]);
    assert_eq!(guest.notified, [(device(255), 1)]);
}

#[test]
fn without_slots_there_is_nothing_of_it() {
    let image = description().build(0xe_0000).unwrap();
    let objects = namespace(&tables(image.address, &image.bytes)["DSDT"].bytes[36..]);
    assert!(objects.keys().all(|path| !path.contains("MHPC")));
}
