// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The slots of bus 0 in AML: in `\_SB.PCI0` the registers, what all slots share, and a device for each slot (ACPI 6.5,
//! 6.1.1 `_ADR`, 6.1.8 `_SUN`, 6.3.3 `_EJ0`; PCI Firmware 3.3, 4.6.7 `_DSM`).
//!
//! Whatever selects a bus does so under the mutex `BLCK`. No method waits for the host: Linux holds its hot-plug lock while
//! it evaluates `_EJ0`, and would let nothing else come or go meanwhile. There is no `_STA`: whether something is in a slot
//! is seen in configuration space, which is empty from the eject on.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Acquire, And, Arg, BufferData, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Index, LessThan, Local, Method, MethodCall, Mutex,
    Name, Notify, OpRegion, OpRegionSpace, Package, Path, Release, ResourceTemplate, Return, Scope,
    Store, Uuid, ZERO,
};

use super::{PCI_HOTPLUG_PORTS, PciHotplug, SLOTS};
use crate::acpi::dsdt::Written;

/// `Notify` values of all devices (ACPI 6.5, table 5.157).
const BUS_CHECK: u8 = 0;
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

/// Functions of the `_DSM` of PCI devices, and the first revision that has the one for names.
const QUERY: u8 = 0;
const NAME: u8 = 7;
const NAME_REVISION: u8 = 2;
/// The bits of these two functions.
const QUERY_AND_NAME: u8 = 1 << QUERY | 1 << NAME;

/// The only bus that has slots of this kind.
const BUS_0: u8 = 0;
/// Without end.
const FOREVER: u16 = 0xffff;

/// What the event device does when the registers are to be looked at.
pub(in crate::acpi) fn scan() -> Written {
    Written::from(&MethodCall::new(Path::new("\\_SB_.PCI0.PCNT"), Vec::new()))
}

/// Everything, for the scope `\_SB`.
pub(in crate::acpi) fn slots(out: &mut Vec<u8>) {
    let mut parts = Vec::new();
    registers(&mut parts);
    scan_methods(&mut parts);
    eject_method(&mut parts);
    index_method(&mut parts);
    name_method(&mut parts);
    SLOTS.for_each(|number| slot(number, &mut parts));
    out.extend(Scope::raw("\\_SB_.PCI0".into(), parts));
}

/// The register block, claimed by a device of its own.
fn registers(out: &mut Vec<u8>) {
    let (first, length) = (PCI_HOTPLUG_PORTS.start, PciHotplug::SIZE_BYTES as u8);
    Device::new(
        "PHPR".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A06")),
            &Name::new("_UID".into(), &"PCI hot-plug registers"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(first, first, 1, length)]),
            ),
        ],
    )
    .to_aml_bytes(out);
    OpRegion::new("PCST".into(), OpRegionSpace::SystemIO, &first, &length).to_aml_bytes(out);
    let names = [b"PCIU", b"PCID", b"PCEJ", b"PCIR", b"BNUM", b"PIDX"];
    Field::new(
        "PCST".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        names.map(|name| FieldEntry::Named(*name, 32)).to_vec(),
    )
    .to_aml_bytes(out);
    Mutex::new("BLCK".into(), 0).to_aml_bytes(out);
}

/// `PCNT` looks at the registers, `DVNT(slots, value)` notifies slots.
///
/// Something new is a device check, at which a guest looks at the whole bus from its parent on. Linux (6.1, 6.12) then goes
/// through the slots in their order, and binds drivers of all it has found after each: that of a bridge in a higher slot
/// before it has looked behind it, given it bus numbers or opened its windows, which it does not do any more for a bridge
/// that is in use. So it is asked to look at the slot itself first; what is known then is not looked at again. What is to go
/// comes before that: the slot may have something new in it.
fn scan_methods(out: &mut Vec<u8>) {
    let (up, down) = (Local(0), Local(1));
    Method::new(
        "PCNT".into(),
        0,
        true,
        vec![
            &Acquire::new("BLCK".into(), FOREVER),
            &Store::new(&Path::new("BNUM"), &BUS_0),
            &Store::new(&up, &Path::new("PCIU")),
            &Store::new(&down, &Path::new("PCID")),
            &Release::new("BLCK".into()),
            &MethodCall::new("DVNT".into(), vec![&down, &EJECT_REQUEST]),
            &MethodCall::new("DVNT".into(), vec![&up, &BUS_CHECK]),
            &MethodCall::new("DVNT".into(), vec![&up, &DEVICE_CHECK]),
        ],
    )
    .to_aml_bytes(out);
    let tests: Vec<Written> = SLOTS
        .map(|slot| {
            Written::from(&If::new(
                &And::new(&ZERO, &Arg(0), &bit(slot)),
                vec![&Notify::new(&Path::new(&name(slot)), &Arg(1))],
            ))
        })
        .collect();
    let tests = tests.iter().map(|test| test as &dyn Aml).collect();
    Method::new("DVNT".into(), 2, true, tests).to_aml_bytes(out);
}

/// `SLEJ(slots)` ejects.
fn eject_method(out: &mut Vec<u8>) {
    Method::new(
        "SLEJ".into(),
        1,
        true,
        vec![
            &Acquire::new("BLCK".into(), FOREVER),
            &Store::new(&Path::new("BNUM"), &BUS_0),
            &Store::new(&Path::new("PCEJ"), &Arg(0)),
            &Release::new("BLCK".into()),
        ],
    )
    .to_aml_bytes(out);
}

/// `AIDX(slots)` is the instance number of what is in a slot.
fn index_method(out: &mut Vec<u8>) {
    let index = Local(0);
    Method::new(
        "AIDX".into(),
        1,
        true,
        vec![
            &Acquire::new("BLCK".into(), FOREVER),
            &Store::new(&Path::new("BNUM"), &BUS_0),
            &Store::new(&Path::new("PIDX"), &Arg(0)),
            &Store::new(&index, &Path::new("PIDX")),
            &Release::new("BLCK".into()),
            &Return::new(&index),
        ],
    )
    .to_aml_bytes(out);
}

/// `PDSM(uuid, revision, function, slots)`: instance number and an empty label, for a slot that has a number.
fn name_method(out: &mut Vec<u8>) {
    let (uuid, revision, function) = (Arg(0), Arg(1), Arg(2));
    let (index, label) = (Local(0), Local(1));
    let nothing = BufferData::new(vec![0]);
    let none = Return::new(&nothing);
    Method::new(
        "PDSM".into(),
        4,
        true,
        vec![
            &If::new(
                &Equal::new(&uuid, &Uuid::new("E5C937D0-3553-4D7A-9117-EA4D19C3434D")),
                vec![
                    &If::new(&LessThan::new(&revision, &NAME_REVISION), vec![&none]),
                    &Store::new(&index, &MethodCall::new("AIDX".into(), vec![&Arg(3)])),
                    &If::new(&Equal::new(&index, &ZERO), vec![&none]),
                    &If::new(
                        &Equal::new(&function, &QUERY),
                        vec![&Return::new(&BufferData::new(vec![QUERY_AND_NAME]))],
                    ),
                    &If::new(
                        &Equal::new(&function, &NAME),
                        vec![
                            &Store::new(&label, &Package::new(vec![&ZERO, &""])),
                            &Store::new(&Index::new(&ZERO, &label, &ZERO), &index),
                            &Return::new(&label),
                        ],
                    ),
                ],
            ),
            &none,
        ],
    )
    .to_aml_bytes(out);
}

fn slot(number: u8, out: &mut Vec<u8>) {
    Device::new(
        Path::new(&name(number)),
        vec![
            &Name::new("_ADR".into(), &(u32::from(number) << 16)),
            &Name::new("_SUN".into(), &number),
            &Method::new(
                "_EJ0".into(),
                1,
                true,
                vec![&MethodCall::new("SLEJ".into(), vec![&bit(number)])],
            ),
            &Method::new(
                "_DSM".into(),
                4,
                true,
                vec![&Return::new(&MethodCall::new(
                    "PDSM".into(),
                    vec![&Arg(0), &Arg(1), &Arg(2), &bit(number)],
                ))],
            ),
        ],
    )
    .to_aml_bytes(out);
}

/// A slot's device is named after its place, function 0.
fn name(slot: u8) -> String {
    format!("S{:02X}_", slot << 3)
}

fn bit(slot: u8) -> u32 {
    1 << slot
}
