// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The SRAT: which node processors and memory belong to (ACPI 6.5, 5.2.16).
//!
//! It is there for a single node too. Memory that appears later is only given to its node, and the guest only keeps
//! DMA-able addresses and direct-map space for it, when a hot-pluggable range announced it.

use acpi_tables::Aml;
use acpi_tables::sdt::Sdt;
use acpi_tables::srat::MemoryAffinity;

use super::{Cpu, Description, MemoryRange, sdt};

const SRAT_REVISION: u8 = 3;

pub(super) fn srat(description: &Description) -> Sdt {
    let mut srat = sdt(b"SRAT", SRAT_REVISION);
    srat.append_slice(&1u32.to_le_bytes()); // for revision 1 readers
    srat.append_slice(&[0; 8]);
    for cpu in &description.cpus {
        srat.append_slice(&processor(cpu));
    }
    for memory in &description.ram {
        append(&mut srat, affinity(memory).enabled());
    }
    let dimms = description.dimms.iter().map(|dimms| &dimms.area);
    for memory in description.hotplug.iter().chain(dimms) {
        append(&mut srat, affinity(memory).enabled().hotpluggable());
    }
    srat
}

/// Processor Local APIC affinity (5.2.16.1). The node's bytes are apart: the upper three were added later.
fn processor(cpu: &Cpu) -> [u8; 16] {
    const TYPE: u8 = 0;
    const ENABLED: u32 = 1;
    let [node0, node1, node2, node3] = cpu.node.to_le_bytes();
    let [f0, f1, f2, f3] = ENABLED.to_le_bytes();
    [
        TYPE,
        16,
        node0,
        cpu.apic_id,
        f0,
        f1,
        f2,
        f3,
        0,
        node1,
        node2,
        node3,
        0,
        0,
        0,
        0,
    ]
}

fn affinity(memory: &MemoryRange) -> MemoryAffinity {
    MemoryAffinity::new(
        memory.node,
        memory.range.start,
        memory.range.end.saturating_sub(memory.range.start),
    )
}

fn append(srat: &mut Sdt, memory: MemoryAffinity) {
    let mut bytes = Vec::new();
    memory.to_aml_bytes(&mut bytes);
    srat.append_slice(&bytes);
}
