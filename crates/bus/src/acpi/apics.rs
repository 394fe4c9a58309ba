// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The MADT: local APICs and the I/O APIC (ACPI 6.5, 5.2.12).
//!
//! No interrupt source overrides: a hardware-reduced platform has no ISA interrupts, every device names its GSI in the
//! DSDT. No PCAT_COMPAT flag: there are no 8259s the guest has to mask.

use acpi_tables::Aml;
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::sdt::Sdt;

use super::{Cpu, sdt};

/// Where processors find their local APIC at reset.
pub const LOCAL_APIC_BASE: u32 = 0xfee0_0000;
/// Where the I/O APIC is; its inputs are GSIs 0 to 23.
pub const IO_APIC_BASE: u32 = 0xfec0_0000;

/// Of ACPI 6.5.
const MADT_REVISION: u8 = 6;
/// The `_UID` that means all processors.
const ALL_PROCESSORS: u8 = 0xff;

pub(super) fn madt(cpus: &[Cpu]) -> Sdt {
    let mut madt = sdt(b"APIC", MADT_REVISION);
    madt.append_slice(&LOCAL_APIC_BASE.to_le_bytes());
    madt.append_slice(&0u32.to_le_bytes()); // flags
    for cpu in cpus {
        append(
            &mut madt,
            &ProcessorLocalApic::new(cpu.apic_id, cpu.apic_id, EnabledStatus::Enabled),
        );
    }
    append(&mut madt, &IoApic::new(0, IO_APIC_BASE, 0));
    madt.append_slice(&local_apic_nmi());
    madt
}

/// NMI arrives at LINT1 of every local APIC, with the polarity and trigger of its bus (5.2.12.7).
fn local_apic_nmi() -> [u8; 6] {
    const TYPE: u8 = 4;
    const LINT1: u8 = 1;
    [TYPE, 6, ALL_PROCESSORS, 0, 0, LINT1]
}

fn append(table: &mut Sdt, structure: &dyn Aml) {
    let mut bytes = Vec::new();
    structure.to_aml_bytes(&mut bytes);
    table.append_slice(&bytes);
}
