// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Writes the ACPI tables of a typical machine to files, for `iasl -d` (see the crate's README).

use std::path::PathBuf;

use ebbtide_bus::acpi::{Cpu, Description, Dimms, Ecam, MAX_DIMM_SLOTS, MemoryRange, SerialPort};
use ebbtide_bus::pci::Windows;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = PathBuf::from(
        std::env::args_os()
            .nth(1)
            .ok_or("usage: dump_acpi FOLDER")?,
    );
    let description = Description {
        cpus: (0..4).map(|apic_id| Cpu { apic_id, node: 0 }).collect(),
        ram: vec![MemoryRange {
            range: 0..512 << 20,
            node: 0,
        }],
        hotplug: vec![MemoryRange {
            range: 4 << 30..12 << 30,
            node: 0,
        }],
        dimms: Some(Dimms {
            slots: MAX_DIMM_SLOTS,
            area: MemoryRange {
                range: 12 << 30..16 << 30,
                node: 0,
            },
        }),
        ecam: Ecam {
            base: 0xe000_0000,
            last_bus: 255,
        },
        windows: Windows {
            mmio32: 0xc000_0000..0xe000_0000,
            mmio64: 16 << 30..528 << 30,
            io: 0xc000..0x1_0000,
        },
        pci_hotplug: true,
        serial: Some(SerialPort {
            port: 0x3f8,
            gsi: 4,
        }),
        event_gsi: 9,
        intx_gsis: (16..24).collect(),
    };
    let tables = description.build(0xe_0000)?;
    // The RSDP has 36 bytes; each table starts on the next 16-byte boundary and says its length.
    let mut at = 48;
    while let Some(table) = tables.bytes.get(at..).filter(|rest| rest.len() >= 8) {
        let length = u32::from_le_bytes(table[4..8].try_into()?) as usize;
        let path = folder.join(String::from_utf8_lossy(&table[..4]).to_lowercase() + ".dat");
        std::fs::write(&path, &table[..length])?;
        println!("{} {length} bytes", path.display());
        at = (at + length).next_multiple_of(16);
    }
    Ok(())
}
