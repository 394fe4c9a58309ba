// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The DSDT: the devices that can't be enumerated, in AML (ACPI 6.5, 19 and 20).

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local,
    Memory32Fixed, Method, Name, NotEqual, Notify, OpRegion, OpRegionSpace, Or, Package, Path,
    ResourceTemplate, Return, Scope, Store, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{
    Cpu, Description, Event, REGISTER_PORTS, SLEEP_TYPE_S5, SerialPort, memory_hotplug,
    pci_hotplug, routing, sdt,
};
use crate::acpi::EVENT_PORT;

/// 2: integers have 64 bits.
const DSDT_REVISION: u8 = 2;

pub(super) fn table(description: &Description) -> Sdt {
    let mut devices = Vec::new();
    host_bridge(description, &mut devices);
    motherboard(description, &mut devices);
    if let Some(serial) = description.serial {
        serial_port(serial, &mut devices);
    }
    power_button(&mut devices);
    if description.pci_hotplug {
        pci_hotplug::slots(&mut devices);
    }
    if let Some(dimms) = &description.dimms {
        memory_hotplug::devices(dimms.slots, &mut devices);
    }
    event_device(description, &mut devices);
    for (index, cpu) in description.cpus.iter().enumerate() {
        processor(index, cpu, &mut devices);
    }

    let mut aml = Vec::new();
    Name::new(
        "_S5_".into(),
        &Package::new(vec![&SLEEP_TYPE_S5, &0u8, &0u8, &0u8]),
    )
    .to_aml_bytes(&mut aml);
    aml.extend(Scope::raw("\\_SB_".into(), devices));

    let mut dsdt = sdt(b"DSDT", DSDT_REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

/// The PCIe root (PCI Firmware 3.3, 4.2). `_PRT` only where interrupt pins are wired, an I/O window only where there is one.
fn host_bridge(description: &Description, out: &mut Vec<u8>) {
    let windows = &description.windows;
    // Both ends were checked to be in 32 bits.
    let (first32, last32) = (
        windows.mmio32.start as u32,
        windows.mmio32.end.wrapping_sub(1) as u32,
    );
    let (first64, last64) = (windows.mmio64.start, windows.mmio64.end.wrapping_sub(1));
    // CONFIG_ADDRESS and CONFIG_DATA.
    let config = IO::new(0xcf8, 0xcf8, 1, 8);
    let bus_numbers = AddressSpace::new_bus_number(0u16, u16::from(description.ecam.last_bus));
    let (not_cacheable, cacheable) = (
        AddressSpaceCacheable::NotCacheable,
        AddressSpaceCacheable::Cacheable,
    );
    let memory32 = AddressSpace::new_memory(not_cacheable, true, first32, last32, None);
    let memory64 = AddressSpace::new_memory(cacheable, true, first64, last64, None);
    let ports = routing::io_window(windows);
    let mut resources: Vec<&dyn Aml> = vec![&bus_numbers, &config];
    resources.extend(ports.as_ref().map(|ports| ports as &dyn Aml));
    resources.extend([&memory32 as &dyn Aml, &memory64]);
    Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_SEG".into(), &0u8),
            &Name::new("_BBN".into(), &0u8),
            // DMA is coherent.
            &Name::new("_CCA".into(), &1u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
            &operating_system_capabilities(),
            &Written(routing::interrupts(&description.intx_gsis)),
        ],
    )
    .to_aml_bytes(out);
}

/// What `_OSC` grants (PCI Firmware 3.3, 4.5.1, control field): PCIe hot-plug, PME, AER and the capability structure. The
/// SHPC (bit 1) is not: there is none.
const GRANTED_CONTROLS: u8 = 0x1d;
/// `_OSC` status bits, in the first dword it returns.
const OSC_UNRECOGNIZED_UUID: u8 = 1 << 2;
const OSC_UNRECOGNIZED_REVISION: u8 = 1 << 3;
const OSC_CAPABILITIES_MASKED: u8 = 1 << 4;

/// AML that is written already.
pub(super) struct Written(Vec<u8>);

impl Written {
    pub(super) fn from(aml: &dyn Aml) -> Self {
        let mut bytes = Vec::new();
        aml.to_aml_bytes(&mut bytes);
        Self(bytes)
    }
}

impl Aml for Written {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// `_OSC(uuid, revision, count, capabilities)`. Serialized, for it creates names.
fn operating_system_capabilities() -> Written {
    let (status, control) = (Path::new("CDW1"), Path::new("CDW3"));
    let (uuid, revision, capabilities) = (Arg(0), Arg(1), Arg(3));
    let granted = Local(0);
    let mut method = Vec::new();
    Method::new(
        "_OSC".into(),
        4,
        true,
        vec![
            &CreateDWordField::new(&status, &capabilities, &0u8),
            &If::new(
                &Equal::new(&uuid, &Uuid::new("33DB4D5B-1FF7-401C-9657-7441C03DD766")),
                vec![
                    &CreateDWordField::new(&control, &capabilities, &8u8),
                    &And::new(&granted, &control, &GRANTED_CONTROLS),
                    &If::new(
                        &NotEqual::new(&revision, &1u8),
                        vec![&Or::new(&status, &status, &OSC_UNRECOGNIZED_REVISION)],
                    ),
                    &If::new(
                        &NotEqual::new(&control, &granted),
                        vec![&Or::new(&status, &status, &OSC_CAPABILITIES_MASKED)],
                    ),
                    &Store::new(&control, &granted),
                ],
            ),
            &Else::new(vec![&Or::new(&status, &status, &OSC_UNRECOGNIZED_UUID)]),
            &Return::new(&capabilities),
        ],
    )
    .to_aml_bytes(&mut method);
    Written(method)
}

/// What is decoded but belongs to no driver. Linux uses the memory-mapped configuration space only if something like
/// this (or the memory map) reserves it.
fn motherboard(description: &Description, out: &mut Vec<u8>) {
    let ecam = description.ecam;
    let register_ports = REGISTER_PORTS.end.wrapping_sub(REGISTER_PORTS.start) as u8;
    Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, ecam.base as u32, ecam.size_bytes() as u32),
                    &IO::new(
                        REGISTER_PORTS.start,
                        REGISTER_PORTS.start,
                        1,
                        register_ports,
                    ),
                ]),
            ),
        ],
    )
    .to_aml_bytes(out);
}

fn serial_port(serial: SerialPort, out: &mut Vec<u8>) {
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(serial.port, serial.port, 1, 8),
                    &Interrupt::new(true, true, false, false, serial.gsi),
                ]),
            ),
        ],
    )
    .to_aml_bytes(out);
}

fn power_button(out: &mut Vec<u8>) {
    Device::new(
        "PWRB".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
            &Name::new("_UID".into(), &0u8),
        ],
    )
    .to_aml_bytes(out);
}

/// `Notify` values: "status changed" of a power button (ACPI 6.5, table 5.161).
const BUTTON_PRESSED: u8 = 0x80;

/// What is done about each event.
fn reactions(description: &Description) -> Vec<(Event, Written)> {
    let button = Written::from(&Notify::new(&Path::new("\\_SB_.PWRB"), &BUTTON_PRESSED));
    let mut reactions = vec![(Event::PowerButton, button)];
    if description.pci_hotplug {
        reactions.push((Event::Pci, pci_hotplug::scan()));
    }
    if description.dimms.is_some() {
        reactions.push((Event::Memory, memory_hotplug::scan()));
    }
    reactions
}

/// The Generic Event Device (ACPI 6.5, 5.6.9). `_EVT` reads the events, which clears them and lowers the line, and then
/// reacts to each.
fn event_device(description: &Description, out: &mut Vec<u8>) {
    let events = Local(0);
    let mut evt = Vec::new();
    Store::new(&events, &Path::new("ESTS")).to_aml_bytes(&mut evt);
    for (event, reaction) in reactions(description) {
        If::new(&And::new(&ZERO, &events, &event.mask()), vec![&reaction]).to_aml_bytes(&mut evt);
    }
    Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(
                    true,
                    false,
                    false,
                    false,
                    description.event_gsi,
                )]),
            ),
            &OpRegion::new("EREG".into(), OpRegionSpace::SystemIO, &EVENT_PORT, &4u8),
            &Field::new(
                "EREG".into(),
                FieldAccessType::DWord,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"ESTS", 32)],
            ),
            &Method::new("_EVT".into(), 1, true, vec![&Written(evt)]),
        ],
    )
    .to_aml_bytes(out);
}

/// A processor; its `_UID` leads to the local APIC in the MADT.
fn processor(index: usize, cpu: &Cpu, out: &mut Vec<u8>) {
    Device::new(
        Path::new(&format!("C{:03X}", index & 0xfff)),
        vec![
            &Name::new("_HID".into(), &"ACPI0007"),
            &Name::new("_UID".into(), &cpu.apic_id),
        ],
    )
    .to_aml_bytes(out);
}
