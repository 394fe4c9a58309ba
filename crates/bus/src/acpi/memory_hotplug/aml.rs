// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The slots in AML: `\_SB.MHPC` with the registers and what all slots share, and in it a memory device (ACPI 6.5, 9.11)
//! for each slot.
//!
//! Whatever selects a slot does so under the mutex `MLCK`. No method waits for the host: Linux holds its hot-plug lock
//! while it evaluates `_EJ0`, and would let no other memory come or go meanwhile.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Acquire, Add, AddressSpace, AddressSpaceCacheable, Arg, CreateQWordField, Device, EISAName,
    Else, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If,
    LessThan, Local, Method, MethodCall, Mutex, Name, NotEqual, Notify, ONE, OpRegion,
    OpRegionSpace, Path, Release, ResourceTemplate, Return, Store, Subtract, While, ZERO,
};

use super::{MEMORY_HOTPLUG_PORTS, PORT_COUNT};
use crate::acpi::dsdt::Written;

/// `Notify` values of all devices (ACPI 6.5, table 5.157).
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

/// `_STA` (6.3.7): present, enabled, shown, functioning; and all of it but enabled.
const IN_USE: u8 = 0x0f;
const LET_GO: u8 = 0x0d;

/// Where the fields of a QWord address space descriptor are, in bytes (6.4.3.5.1).
const MINIMUM: u8 = 14;
const MAXIMUM: u8 = 22;
const RANGE_LENGTH: u8 = 38;

/// Without end.
const FOREVER: u16 = 0xffff;

/// What the event device does when the registers are to be looked at.
pub(in crate::acpi) fn scan() -> Written {
    Written::from(&MethodCall::new(Path::new("\\_SB_.MHPC.MSCN"), Vec::new()))
}

/// The devices, for the scope `\_SB`, of a machine with `slots` slots.
pub(in crate::acpi) fn devices(slots: u16, out: &mut Vec<u8>) {
    let mut parts = vec![
        Written::from(&Name::new("_HID".into(), &EISAName::new("PNP0A06"))),
        Written::from(&Name::new("_UID".into(), &"DIMM slots")),
        resources(),
        region(),
        current(),
        flags(),
        written(),
        Written::from(&Mutex::new("MLCK".into(), 0)),
        scan_method(slots),
        notify_method(slots),
    ];
    parts.extend(methods());
    parts.extend((0..slots).map(slot));
    let parts = parts.iter().map(|part| part as &dyn Aml).collect();
    Device::new("MHPC".into(), parts).to_aml_bytes(out);
}

/// The ports are the container's.
fn resources() -> Written {
    let first = MEMORY_HOTPLUG_PORTS.start;
    let ports = IO::new(first, first, 1, PORT_COUNT as u8);
    Written::from(&Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![&ports]),
    ))
}

fn region() -> Written {
    Written::from(&OpRegion::new(
        "MREG".into(),
        OpRegionSpace::SystemIO,
        &MEMORY_HOTPLUG_PORTS.start,
        &PORT_COUNT,
    ))
}

/// What is read of the selected slot. Integers have 64 bits: the DSDT is of revision 2.
fn current() -> Written {
    Written::from(&Field::new(
        "MREG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        vec![
            FieldEntry::Named(*b"MADR", 64),
            FieldEntry::Named(*b"MLEN", 64),
            FieldEntry::Named(*b"MPXM", 32),
        ],
    ))
}

/// Each bit is written alone: zeroes change nothing.
fn flags() -> Written {
    Written::from(&Field::new(
        "MREG".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![
            FieldEntry::Reserved(0x14 * 8),
            FieldEntry::Named(*b"MENA", 1),
            FieldEntry::Named(*b"MINS", 1),
            FieldEntry::Named(*b"MRMV", 1),
            FieldEntry::Named(*b"MEJE", 1),
        ],
    ))
}

/// What is only written.
fn written() -> Written {
    Written::from(&Field::new(
        "MREG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![
            FieldEntry::Named(*b"MSEL", 32),
            FieldEntry::Named(*b"MOEV", 32),
            FieldEntry::Named(*b"MOSC", 32),
        ],
    ))
}

/// `method`, serialized, of so many arguments: `body` with the slot in its first argument selected, then `result`.
fn with_slot(method: &str, arguments: u8, body: Vec<&dyn Aml>, result: Vec<&dyn Aml>) -> Written {
    let (acquire, release) = (
        Acquire::new("MLCK".into(), FOREVER),
        Release::new("MLCK".into()),
    );
    let selector = Path::new("MSEL");
    let select = Store::new(&selector, &Arg(0));
    let mut all: Vec<&dyn Aml> = vec![&acquire, &select];
    all.extend(body);
    all.push(&release);
    all.extend(result);
    Written::from(&Method::new(method.into(), arguments, true, all))
}

/// What the methods of all slots call, with the slot's number first.
fn methods() -> [Written; 5] {
    [
        status_method(),
        resources_method(),
        with_slot(
            "MPRX",
            1,
            vec![&Store::new(&Local(0), &Path::new("MPXM"))],
            vec![&Return::new(&Local(0))],
        ),
        with_slot(
            "MEJC",
            1,
            vec![&Store::new(&Path::new("MEJE"), &ONE)],
            vec![],
        ),
        with_slot(
            "MOST",
            3,
            vec![
                &Store::new(&Path::new("MOEV"), &Arg(1)),
                &Store::new(&Path::new("MOSC"), &Arg(2)),
            ],
            vec![],
        ),
    ]
}

fn status_method() -> Written {
    let (enabled, length) = (Path::new("MENA"), Path::new("MLEN"));
    with_slot(
        "MSTA",
        1,
        vec![
            &Store::new(&Local(0), &ZERO),
            &If::new(
                &Equal::new(&enabled, &ONE),
                vec![&Store::new(&Local(0), &IN_USE)],
            ),
            &Else::new(vec![&If::new(
                &NotEqual::new(&length, &ZERO),
                vec![&Store::new(&Local(0), &LET_GO)],
            )]),
        ],
        vec![&Return::new(&Local(0))],
    )
}

/// The template is made anew for each call, in a local: a named one would belong to one call at a time.
fn resources_method() -> Written {
    let (buffer, base, length) = (Local(0), Local(1), Local(2));
    let range = AddressSpace::<u64>::new_memory(AddressSpaceCacheable::Cacheable, true, 0, 0, None);
    let template = ResourceTemplate::new(vec![&range]);
    let (min, max, len) = (Path::new("MIN_"), Path::new("MAX_"), Path::new("LEN_"));
    with_slot(
        "MCRS",
        1,
        vec![
            &Store::new(&base, &Path::new("MADR")),
            &Store::new(&length, &Path::new("MLEN")),
        ],
        vec![
            &Store::new(&buffer, &template),
            &CreateQWordField::new(&min, &buffer, &MINIMUM),
            &CreateQWordField::new(&max, &buffer, &MAXIMUM),
            &CreateQWordField::new(&len, &buffer, &RANGE_LENGTH),
            &Store::new(&min, &base),
            &Store::new(&len, &length),
            &Add::new(&base, &base, &length),
            // An empty slot has a range of no bytes at 0.
            &If::new(
                &NotEqual::new(&length, &ZERO),
                vec![&Subtract::new(&base, &base, &ONE)],
            ),
            &Store::new(&max, &base),
            &Return::new(&buffer),
        ],
    )
}

/// `MSCN`: tells the guest of every slot with an event. An event is acknowledged before it is told: one that comes
/// meanwhile is told again.
fn scan_method(slots: u16) -> Written {
    let slot = Local(0);
    let (inserted, remove) = (Path::new("MINS"), Path::new("MRMV"));
    let tell = |value: &dyn Aml| {
        Written::from(&MethodCall::new(Path::new("MTFY"), vec![&Local(0), value]))
    };
    let when = |bit: &Path, value: u8| {
        Written::from(&If::new(
            &Equal::new(bit, &ONE),
            vec![&Store::new(bit, &ONE), &tell(&value)],
        ))
    };
    let selector = Path::new("MSEL");
    let each = Written::from(&While::new(
        &LessThan::new(&slot, &slots),
        vec![
            &Store::new(&selector, &slot),
            &when(&inserted, DEVICE_CHECK),
            &when(&remove, EJECT_REQUEST),
            &Add::new(&slot, &slot, &ONE),
        ],
    ));
    Written::from(&Method::new(
        "MSCN".into(),
        0,
        true,
        vec![
            &Acquire::new("MLCK".into(), FOREVER),
            &Store::new(&slot, &ZERO),
            &each,
            &Release::new("MLCK".into()),
        ],
    ))
}

/// `MTFY(slot, value)`: a device cannot be named by a number.
fn notify_method(slots: u16) -> Written {
    let tests: Vec<Written> = (0..slots)
        .map(|slot| {
            Written::from(&If::new(
                &Equal::new(&Arg(0), &slot),
                vec![&Notify::new(&Path::new(&name(slot)), &Arg(1))],
            ))
        })
        .collect();
    let tests = tests.iter().map(|test| test as &dyn Aml).collect();
    Written::from(&Method::new("MTFY".into(), 2, true, tests))
}

/// `M000` and so on.
fn name(slot: u16) -> String {
    format!("M{:03X}", slot & 0xfff)
}

/// The memory device of a slot.
fn slot(slot: u16) -> Written {
    let call = |method: &str, arguments: Vec<&dyn Aml>| {
        let mut all: Vec<&dyn Aml> = vec![&slot];
        all.extend(arguments);
        Written::from(&MethodCall::new(Path::new(method), all))
    };
    let answer = |name: &str, method: &str| {
        let value = call(method, Vec::new());
        Written::from(&Method::new(
            name.into(),
            0,
            false,
            vec![&Return::new(&value)],
        ))
    };
    Written::from(&Device::new(
        Path::new(&name(slot)),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C80")),
            &Name::new("_UID".into(), &slot),
            &answer("_STA", "MSTA"),
            &answer("_CRS", "MCRS"),
            &answer("_PXM", "MPRX"),
            &Method::new("_EJ0".into(), 1, false, vec![&call("MEJC", Vec::new())]),
            &Method::new(
                "_OST".into(),
                3,
                false,
                vec![&call("MOST", vec![&Arg(0), &Arg(1)])],
            ),
        ],
    ))
}
