// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The tables as a guest would read them.

use super::parser::{
    Object, Resource, Value, namespace, resources, structures, tables, u16_at, u32_at, u64_at,
};
use std::sync::Arc;

use super::*;
use crate::irq::IrqLine;
use crate::pci::{IntxPin, IntxWires};

const RSDP: u64 = 0xe_0000;

pub(super) fn description() -> Description {
    Description {
        cpus: (0..4)
            .map(|apic_id| Cpu {
                apic_id,
                node: u32::from(apic_id / 2),
            })
            .collect(),
        ram: vec![
            MemoryRange {
                range: 0..3 << 30,
                node: 0,
            },
            MemoryRange {
                range: 4 << 30..5 << 30,
                node: 1,
            },
        ],
        hotplug: vec![MemoryRange {
            range: 6 << 30..14 << 30,
            node: 0x0102_0304,
        }],
        dimms: None,
        ecam: Ecam {
            base: 0xe000_0000,
            last_bus: 255,
        },
        windows: Windows {
            mmio32: 0xc000_0000..0xe000_0000,
            mmio64: 16 << 30..528 << 30,
            io: 0xc000..0x1_0000,
        },
        pci_hotplug: false,
        serial: Some(SerialPort {
            port: 0x3f8,
            gsi: 4,
        }),
        event_gsi: 9,
        intx_gsis: (16..24).collect(),
    }
}

/// The DSDT's namespace.
pub(super) fn dsdt(description: &Description) -> std::collections::BTreeMap<String, Object> {
    let image = description.build(RSDP).unwrap();
    namespace(&tables(image.address, &image.bytes)["DSDT"].bytes[36..])
}

fn value(object: &Object) -> &Value {
    match object {
        Object::Value(value) => value,
        other => panic!("{other:?} is no value"),
    }
}

fn value_of(name: &str, description: &Description) -> Value {
    value(&dsdt(description)[name]).clone()
}

fn crs(objects: &std::collections::BTreeMap<String, Object>, device: &str) -> Vec<Resource> {
    match value(&objects[&format!("{device}._CRS")]) {
        Value::Buffer(bytes) => resources(bytes),
        other => panic!("{other:?} is no buffer"),
    }
}

/// A compressed EISA id as the integer it is in AML (6.1.5).
fn eisa(id: &str) -> Value {
    let bytes = id.as_bytes();
    let letters = bytes[..3]
        .iter()
        .fold(0u32, |value, letter| value << 5 | u32::from(letter - 0x40));
    let product = u32::from_str_radix(&id[3..], 16).unwrap();
    Value::Integer((letters << 16 | product).swap_bytes().into())
}

#[test]
fn every_table_is_found_where_it_is_and_aligned() {
    let image = description().build(RSDP).unwrap();
    let found = tables(image.address, &image.bytes);
    let names: Vec<_> = found.keys().map(String::as_str).collect();
    assert_eq!(names, ["APIC", "DSDT", "FACP", "MCFG", "SRAT"]);
    for table in found.values() {
        assert_eq!(table.address % 16, 0);
        assert!(table.address + table.bytes.len() as u64 <= RSDP + image.bytes.len() as u64);
    }
    assert!(
        image.bytes.len() < 0x1_0000,
        "{} bytes don't fit below the BIOS area",
        image.bytes.len()
    );
}

#[test]
fn fadt_is_hardware_reduced() {
    let image = description().build(RSDP).unwrap();
    let found = tables(image.address, &image.bytes);
    let fadt = &found["FACP"];
    assert_eq!((fadt.revision, fadt.bytes[131]), (6, 5));
    assert_eq!(fadt.bytes.len(), 276);
    assert_eq!(u64_at(fadt.bytes, 140), found["DSDT"].address);
    let flags = u32_at(fadt.bytes, 112);
    assert_eq!(flags, 1 << 20 | 1 << 12 | 1 << 10 | 1 << 5 | 1 << 4 | 1);
    assert_eq!(
        u16_at(fadt.bytes, 109),
        1 << 2 | 1 << 5,
        "boot architecture"
    );
    let port = |address: u16| {
        let mut gas = vec![1, 8, 0, 1];
        gas.extend(u64::from(address).to_le_bytes());
        gas
    };
    assert_eq!(fadt.bytes[116..128], port(0xcf9));
    assert_eq!(fadt.bytes[128], 6);
    assert_eq!(fadt.bytes[244..256], port(0x600));
    assert_eq!(fadt.bytes[256..268], port(0x601));
    assert_eq!(&fadt.bytes[268..276], b"EBBTIDE\0");
}

#[test]
fn madt_has_cpus_io_apic_and_nmi() {
    let image = description().build(RSDP).unwrap();
    let found = tables(image.address, &image.bytes);
    let madt = found["APIC"].bytes;
    assert_eq!(u32_at(madt, 36), 0xfee0_0000);
    assert_eq!(u32_at(madt, 40), 0, "no 8259s");
    let entries = structures(madt, 44);
    for (id, (kind, bytes)) in (0..4).zip(&entries) {
        assert_eq!((*kind, *bytes), (0, &[0, 8, id, id, 1, 0, 0, 0][..]));
    }
    assert_eq!(
        entries[4],
        (1, &[1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0][..])
    );
    assert_eq!(entries[5], (4, &[4, 6, 0xff, 0, 0, 1][..]));
    assert_eq!(entries.len(), 6);
}

#[test]
fn mcfg_covers_all_buses() {
    let image = description().build(RSDP).unwrap();
    let found = tables(image.address, &image.bytes);
    let mcfg = found["MCFG"].bytes;
    assert_eq!(mcfg.len(), 60);
    assert_eq!(u64_at(mcfg, 44), 0xe000_0000);
    assert_eq!(&mcfg[52..60], &[0, 0, 0, 255, 0, 0, 0, 0]);
}

#[test]
fn srat_tells_nodes_and_where_memory_may_appear() {
    let image = description().build(RSDP).unwrap();
    let found = tables(image.address, &image.bytes);
    let entries = structures(found["SRAT"].bytes, 48);
    let cpus: Vec<_> = entries.iter().filter(|(kind, _)| *kind == 0).collect();
    assert_eq!(cpus.len(), 4);
    for (id, (_, bytes)) in (0..4).zip(cpus) {
        assert_eq!(
            (bytes.len(), bytes[2], bytes[3], u32_at(bytes, 4)),
            (16, id / 2, id, 1)
        );
    }
    let memory: Vec<_> = entries
        .iter()
        .filter(|(kind, _)| *kind == 1)
        .map(|(_, bytes)| {
            (
                u32_at(bytes, 2),
                u64_at(bytes, 8),
                u64_at(bytes, 16),
                u32_at(bytes, 28),
            )
        })
        .collect();
    let expected = [
        (0, 0, 3 << 30, 1),
        (1, 4 << 30, 1 << 30, 1),
        (0x0102_0304, 6 << 30, 8 << 30, 3),
    ];
    assert_eq!(memory, expected);
    assert_eq!(entries.len(), 7);
}

#[test]
fn srat_covers_where_dimms_appear() {
    let dimms = Dimms {
        slots: 1,
        area: MemoryRange {
            range: 14 << 30..16 << 30,
            node: 3,
        },
    };
    let image = Description {
        dimms: Some(dimms),
        ..description()
    }
    .build(RSDP)
    .unwrap();
    let found = tables(image.address, &image.bytes);
    let entries = structures(found["SRAT"].bytes, 48);
    let (kind, bytes) = entries[7];
    assert_eq!((kind, u32_at(bytes, 2), u32_at(bytes, 28)), (1, 3, 3));
    assert_eq!((u64_at(bytes, 8), u64_at(bytes, 16)), (14 << 30, 2 << 30));
}

#[test]
fn pci_root_has_its_windows() {
    let objects = dsdt(&description());
    assert_eq!(*value(&objects["\\_SB_.PCI0._HID"]), eisa("PNP0A08"));
    assert_eq!(*value(&objects["\\_SB_.PCI0._CID"]), eisa("PNP0A03"));
    for zero in ["_SEG", "_BBN", "_UID"] {
        assert_eq!(
            *value(&objects[&format!("\\_SB_.PCI0.{zero}")]),
            Value::Integer(0)
        );
    }
    let expected = [
        Resource::Space {
            kind: 2,
            attributes: 0,
            first: 0,
            last: 255,
        },
        Resource::Io {
            first: 0xcf8,
            length: 8,
        },
        Resource::Space {
            kind: 1,
            attributes: 3,
            first: 0xc000,
            last: 0xffff,
        },
        Resource::Space {
            kind: 0,
            attributes: 1,
            first: 0xc000_0000,
            last: 0xdfff_ffff,
        },
        Resource::Space {
            kind: 0,
            attributes: 3,
            first: 16 << 30,
            last: (528 << 30) - 1,
        },
    ];
    assert_eq!(crs(&objects, "\\_SB_.PCI0"), expected);
    assert!(matches!(
        objects["\\_SB_.PCI0._OSC"],
        Object::Method { arguments: 4, .. }
    ));
}

#[test]
fn every_pin_of_every_slot_is_routed_as_the_bus_wires_it() {
    let Value::Package(entries) = &value_of("\\_SB_.PCI0._PRT", &description()) else {
        panic!("no package");
    };
    assert_eq!(entries.len(), 32 * 4);
    let line = |gsi| (gsi, Arc::new(NoLine) as Arc<dyn IrqLine>);
    let wires = IntxWires::new((16..24).map(line)).unwrap();
    for (index, entry) in (0..).zip(entries) {
        let (slot, pin) = (index / 4, IntxPin::ALL[usize::from(index) % 4]);
        let expected = [
            u64::from(slot) << 16 | 0xffff,
            pin as u64,
            0,
            wires.gsi(slot, pin).into(),
        ];
        assert_eq!(*entry, Value::Package(expected.map(Value::Integer).into()));
    }
}

#[test]
fn without_wires_and_ports_the_root_says_nothing_of_them() {
    let mut bare = description();
    bare.intx_gsis.clear();
    bare.windows.io = 0..0;
    let objects = dsdt(&bare);
    assert!(!objects.contains_key("\\_SB_.PCI0._PRT"));
    let ports = |resource: &Resource| matches!(resource, Resource::Space { kind: 1, .. });
    assert!(!crs(&objects, "\\_SB_.PCI0").iter().any(ports));
    bare.windows.io = 0xf000..0x1_0008;
    let error = bare.build(RSDP).unwrap_err();
    assert_eq!(error, AcpiError::IoWindow(0xf000..0x1_0008));
}

struct NoLine;

impl IrqLine for NoLine {
    fn set(&self, _high: bool) {}
}

#[test]
fn configuration_space_and_registers_are_reserved() {
    let objects = dsdt(&description());
    assert_eq!(*value(&objects["\\_SB_.MBRD._HID"]), eisa("PNP0C02"));
    let expected = [
        Resource::Memory32 {
            base: 0xe000_0000,
            length: 0x1000_0000,
        },
        Resource::Io {
            first: 0x600,
            length: 8,
        },
    ];
    assert_eq!(crs(&objects, "\\_SB_.MBRD"), expected);
}

#[test]
fn serial_port_is_edge_triggered_on_its_own_line() {
    let objects = dsdt(&description());
    assert_eq!(*value(&objects["\\_SB_.COM1._HID"]), eisa("PNP0501"));
    let expected = [
        Resource::Io {
            first: 0x3f8,
            length: 8,
        },
        Resource::Interrupt {
            consumer: true,
            edge: true,
            active_low: false,
            shared: false,
            number: 4,
        },
    ];
    assert_eq!(crs(&objects, "\\_SB_.COM1"), expected);

    let objects = dsdt(&Description {
        serial: None,
        ..description()
    });
    assert!(!objects.contains_key("\\_SB_.COM1"));
}

#[test]
fn event_device_reads_its_register_and_notifies_the_button() {
    let objects = dsdt(&description());
    assert_eq!(
        *value(&objects["\\_SB_.GED_._HID"]),
        Value::Text("ACPI0013".into())
    );
    assert_eq!(*value(&objects["\\_SB_.PWRB._HID"]), eisa("PNP0C0C"));
    let expected = [Resource::Interrupt {
        consumer: true,
        edge: false,
        active_low: false,
        shared: false,
        number: 9,
    }];
    assert_eq!(crs(&objects, "\\_SB_.GED_"), expected);
    assert_eq!(
        objects["\\_SB_.GED_.EREG"],
        Object::Region {
            space: 1,
            offset: 0x604,
            length: 4
        }
    );
    assert_eq!(
        objects["\\_SB_.GED_.EREG fields"],
        Object::Fields(vec![("ESTS".into(), 32)])
    );
    let Object::Method { arguments: 1, body } = &objects["\\_SB_.GED_._EVT"] else {
        panic!("_EVT takes one argument");
    };
    // Store(ESTS, Local0), If(And(Local0, 2)) { Notify(\\_SB.PWRB, 0x80) }
    let mut expected = b"\x70ESTS\x60".to_vec();
    expected.extend([0xa0, 0x13, 0x7b, 0x60, 0x0a, 2, 0x00]);
    expected.extend(b"\x86\\\x2e_SB_PWRB\x0a\x80");
    assert_eq!(*body, expected);
}

#[test]
fn power_off_is_sleep_type_5() {
    let Value::Package(s5) = value(&dsdt(&description())["\\_S5_"]).clone() else {
        panic!("a package")
    };
    assert_eq!(s5, [5, 0, 0, 0].map(Value::Integer));
}

#[test]
fn each_cpu_is_a_device() {
    let objects = dsdt(&description());
    for id in 0..4 {
        assert_eq!(
            *value(&objects[&format!("\\_SB_.C{id:03X}._HID")]),
            Value::Text("ACPI0007".into())
        );
        assert_eq!(
            *value(&objects[&format!("\\_SB_.C{id:03X}._UID")]),
            Value::Integer(id)
        );
    }
    assert!(!objects.contains_key("\\_SB_.C004"));
}

#[test]
fn large_machines_have_well_formed_tables_too() {
    let cpus = (0..255).map(|apic_id| Cpu { apic_id, node: 0 }).collect();
    let objects = dsdt(&Description {
        cpus,
        ..description()
    });
    assert!(objects.contains_key("\\_SB_.C0FE"));
}

#[test]
fn contradictions_are_refused() {
    let check = |change: fn(&mut Description), expected: AcpiError| {
        let mut description = description();
        change(&mut description);
        assert_eq!(description.build(RSDP).unwrap_err(), expected);
    };
    check(|d| d.cpus.clear(), AcpiError::NoCpu);
    check(|d| d.cpus[0].apic_id = 255, AcpiError::ApicId(255));
    check(|d| d.ecam.base = 0xe008_0000, AcpiError::Ecam(0xe008_0000));
    check(|d| d.ecam.base = 0xf010_0000, AcpiError::Ecam(0xf010_0000));
    check(
        |d| d.windows.mmio32.end = 5 << 30,
        AcpiError::Window(0xc000_0000..5 << 30),
    );
    check(
        |d| d.ram[0].range = 5..5,
        AcpiError::EmptyRange {
            what: "memory range",
            range: 5..5,
        },
    );
    check(
        |d| d.windows.mmio64 = 9..9,
        AcpiError::EmptyRange {
            what: "pci window",
            range: 9..9,
        },
    );
    check(
        |d| {
            d.serial = Some(SerialPort {
                port: 0xfffe,
                gsi: 4,
            })
        },
        AcpiError::Serial(0xfffe),
    );
    for slots in [0, 257] {
        let area = description().hotplug.remove(0);
        let dimms = Some(Dimms { slots, area });
        let error = Description {
            dimms,
            ..description()
        }
        .build(RSDP);
        assert_eq!(error.unwrap_err(), AcpiError::DimmSlots(slots));
    }
    assert_eq!(description().build(8).unwrap_err(), AcpiError::Address(8));
    assert_eq!(
        description().build(!15).unwrap_err(),
        AcpiError::Address(!15)
    );
}
