// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What functions with interrupt pins and I/O BARs need of the PCI root's description.

use acpi_tables::Aml;
use acpi_tables::aml::{AddressSpace, Name, Package};

use crate::pci::Windows;
use crate::pci::intx::{IntxPin, wire};

/// Slots of a bus.
const SLOTS: u8 = 32;
/// The function number that means all functions of the slot (ACPI 6.5, table 6.15).
const ALL_FUNCTIONS: u32 = 0xffff;

/// The ports the root forwards.
pub(super) fn io_window(windows: &Windows) -> Option<AddressSpace<u16>> {
    // Both ends were checked to be ports.
    let (first, last) = (
        windows.io.start as u16,
        windows.io.end.wrapping_sub(1) as u16,
    );
    (!windows.io.is_empty()).then(|| AddressSpace::new_io(first, last, None))
}

/// `_PRT` (ACPI 6.5, 6.2.13): which input each pin of each slot is wired to, whether something is plugged there or not.
/// Numbers instead of link devices, for the wires cannot be changed. Empty without wires.
pub(super) fn interrupts(gsis: &[u32]) -> Vec<u8> {
    let places = (0..SLOTS).flat_map(|slot| IntxPin::ALL.map(|pin| (slot, pin)));
    let entries: Vec<Entry> = places
        .filter_map(|(slot, pin)| {
            let gsi = *gsis.get(wire(slot, pin, gsis.len()))?;
            Some((u32::from(slot) << 16 | ALL_FUNCTIONS, pin as u8, 0u8, gsi))
        })
        .collect();
    let mut aml = Vec::new();
    if entries.is_empty() {
        return aml;
    }
    let packages: Vec<Package> = entries
        .iter()
        .map(|(address, pin, source, gsi)| Package::new(vec![address, pin, source, gsi]))
        .collect();
    let table = Package::new(packages.iter().map(|package| package as &dyn Aml).collect());
    Name::new("_PRT".into(), &table).to_aml_bytes(&mut aml);
    aml
}

/// Address, pin, no link device, input.
type Entry = (u32, u8, u8, u32);
