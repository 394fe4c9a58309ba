// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! ACPI: the tables a guest finds the machine by, and the registers they name.
//!
//! The platform is *hardware-reduced* (ACPI 6.5, 4.1): no PM1 blocks, no SCI, no GPEs, no legacy interrupt controllers or
//! timers. Events arrive through a Generic Event Device, sleep states are entered through the sleep control register.
//!
//! ```text
//! RSDP ─ XSDT ─┬─ FACP ─ DSDT   \_S5, \_SB: PCI0 with its slots, MBRD (what no driver may claim), COM1, PWRB, GED, one
//!              │                 device per CPU, MHPC with one device per DIMM slot
//!              ├─ APIC          local APICs, I/O APIC
//!              ├─ MCFG          configuration space in memory
//!              └─ SRAT          which node CPUs and memory belong to, where memory may appear later
//! ```
//!
//! [`Description::build`] writes them; [`SleepRegisters`], [`EventDevice`], [`PciHotplug`] and [`MemoryHotplug`] are the
//! registers behind them.

mod affinity;
mod apics;
mod dsdt;
mod event_device;
mod memory_hotplug;
mod pci_hotplug;
mod platform;
mod routing;
mod sleep;

#[cfg(test)]
mod interpreter;
#[cfg(test)]
mod parser;
#[cfg(test)]
mod tests;

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

pub use apics::{IO_APIC_BASE, LOCAL_APIC_BASE};
pub use event_device::{Event, EventDevice};
pub use memory_hotplug::{
    Arrival, DimmEjectSink, DimmPlace, GuestEject, MAX_DIMM_SLOTS, MEMORY_HOTPLUG_PORTS,
    MemoryHotplug, SlotError, SlotState,
};
pub use pci_hotplug::{PCI_HOTPLUG_PORTS, PciHotplug};
pub use sleep::{SLEEP_TYPE_S5, SleepRegisters};

use crate::pci::Windows;

const OEM_ID: [u8; 6] = *b"EBBTID";
const OEM_TABLE_ID: [u8; 8] = *b"EBBTIDE ";
const OEM_REVISION: u32 = 1;

/// I/O ports of the ACPI registers: [`SleepRegisters`] at the first two, [`EventDevice`] at the last four.
///
/// Ports and not memory: a guest writes the sleep control register with interrupts off, when it can no longer map
/// memory, and a port access needs no instruction decoding by the hypervisor.
pub const REGISTER_PORTS: Range<u16> = 0x600..0x608;
/// First port of [`SleepRegisters`].
pub const SLEEP_PORT: u16 = 0x600;
/// First port of [`EventDevice`].
pub const EVENT_PORT: u16 = 0x604;
/// The reset control register, 8 bits wide.
pub const RESET_PORT: u16 = 0xcf9;
/// What to write there for a full reset.
pub const RESET_VALUE: u8 = 6;

/// One processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// Initial APIC id, as CPUID gives it; also the processor's `_UID`. 255 means "all" and is not an id.
    pub apic_id: u8,
    /// NUMA node.
    pub node: u32,
}

/// A range of guest-physical memory and the node it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// Guest-physical addresses, not empty.
    pub range: Range<u64>,
    /// NUMA node.
    pub node: u32,
}

/// DIMM slots and where their modules appear.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dimms {
    /// How many slots, at most [`MAX_DIMM_SLOTS`].
    pub slots: u16,
    /// The addresses modules are placed in, and the node of a guest that asks before there is one.
    pub area: MemoryRange,
}

/// Memory-mapped configuration space: 1 MiB for each bus from 0 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ecam {
    /// Guest-physical address of bus 0, 1 MiB aligned, below 4 GiB with all of its buses.
    pub base: u64,
    /// The last bus decoded.
    pub last_bus: u8,
}

impl Ecam {
    /// Length in bytes.
    pub fn size_bytes(&self) -> u64 {
        (u64::from(self.last_bus) + 1) << 20
    }
}

/// A 16550 at eight ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SerialPort {
    /// First of its ports.
    pub port: u16,
    /// Its interrupt: edge-triggered, active high.
    pub gsi: u32,
}

/// What the machine is made of, as far as its tables tell.
#[derive(Clone, Debug)]
pub struct Description {
    /// Processors, the boot processor first. At least one.
    pub cpus: Vec<Cpu>,
    /// Memory present at boot, in address order.
    pub ram: Vec<MemoryRange>,
    /// Where memory may appear while the guest runs.
    pub hotplug: Vec<MemoryRange>,
    /// DIMM slots, if there are any.
    pub dimms: Option<Dimms>,
    /// Configuration space.
    pub ecam: Ecam,
    /// What the PCI host bridge decodes.
    pub windows: Windows,
    /// Whether the slots of bus 0 can be hot-plugged: [`PciHotplug`] is there.
    pub pci_hotplug: bool,
    /// The serial port, if there is one.
    pub serial: Option<SerialPort>,
    /// The event device's interrupt: level-triggered, active high.
    pub event_gsi: u32,
    /// The wires of the root bus's interrupt pins ([`IntxWires`](crate::pci::IntxWires)), in order; empty when there are
    /// none.
    pub intx_gsis: Vec<u32>,
}

/// The finished tables, to be copied to guest memory as they are.
#[derive(Clone, Debug)]
pub struct Tables {
    /// Guest-physical address of the RSDP and of `bytes`.
    pub address: u64,
    /// RSDP first, then everything it leads to.
    pub bytes: Vec<u8>,
}

/// What a description lacks.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AcpiError {
    /// The RSDP must be on a 16-byte boundary, and the tables below the end of the address space.
    #[error("acpi tables can't be placed at {0:#x}: not 16-byte aligned or too high")]
    Address(u64),
    /// No processor given.
    #[error("acpi tables need at least one cpu")]
    NoCpu,
    /// APIC id 255 is the broadcast id.
    #[error("apic id {0} is the broadcast id")]
    ApicId(u8),
    /// A range is empty or inverted.
    #[error("{what} {range:#x?} is empty")]
    EmptyRange {
        /// Which.
        what: &'static str,
        /// The range.
        range: Range<u64>,
    },
    /// No slots, or more than there can be.
    #[error("{0} dimm slots: there can be 1 to {MAX_DIMM_SLOTS}")]
    DimmSlots(u16),
    /// The 32-bit window must end at or below 4 GiB.
    #[error("32-bit pci window {0:#x?} reaches past 4 GiB")]
    Window(Range<u64>),
    /// Ports end at 64 KiB.
    #[error("pci i/o window {0:#x?} reaches past 64 KiB")]
    IoWindow(Range<u64>),
    /// ECAM must be 1 MiB aligned and below 4 GiB.
    #[error("ecam at {0:#x} is not 1 MiB aligned or reaches past 4 GiB")]
    Ecam(u64),
    /// A serial port's eight ports must not wrap.
    #[error("serial port {0:#x} has no room for 8 ports")]
    Serial(u16),
}

impl Description {
    /// Writes the tables for the RSDP being at guest-physical `rsdp_addr`, everything else right behind it.
    ///
    /// # Errors
    /// [`AcpiError`] when the description contradicts itself.
    pub fn build(&self, rsdp_addr: u64) -> Result<Tables, AcpiError> {
        self.check(rsdp_addr)?;
        let mut image = Image {
            address: rsdp_addr,
            bytes: vec![0; Rsdp::len()],
        };
        let dsdt = image.place(&dsdt::table(self));
        let tables = [
            image.place(&platform::fadt(dsdt)),
            image.place(&apics::madt(&self.cpus)),
            image.place(&self.mcfg()),
            image.place(&affinity::srat(self)),
        ];
        let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        for table in tables {
            xsdt.add_entry(table);
        }
        let xsdt = image.place(&xsdt);
        let mut rsdp = Vec::new();
        Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
        for (to, from) in image.bytes.iter_mut().zip(rsdp) {
            *to = from;
        }
        Ok(Tables {
            address: rsdp_addr,
            bytes: image.bytes,
        })
    }

    fn mcfg(&self) -> MCFG {
        let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        mcfg.add_ecam(self.ecam.base, 0, 0, self.ecam.last_bus);
        mcfg
    }

    fn check(&self, rsdp_addr: u64) -> Result<(), AcpiError> {
        /// The tables of 255 processors are a fraction of this.
        const ROOM: u64 = 1 << 20;
        if !rsdp_addr.is_multiple_of(16) || rsdp_addr.checked_add(ROOM).is_none() {
            return Err(AcpiError::Address(rsdp_addr));
        }
        if self.cpus.is_empty() {
            return Err(AcpiError::NoCpu);
        }
        if let Some(cpu) = self.cpus.iter().find(|cpu| cpu.apic_id == u8::MAX) {
            return Err(AcpiError::ApicId(cpu.apic_id));
        }
        if let Some(Dimms { slots, .. }) = self.dimms
            && !(1..=MAX_DIMM_SLOTS).contains(&slots)
        {
            return Err(AcpiError::DimmSlots(slots));
        }
        let memory = self
            .ram
            .iter()
            .chain(&self.hotplug)
            .chain(self.dimms.iter().map(|dimms| &dimms.area))
            .map(|memory| ("memory range", &memory.range));
        let windows = [
            ("pci window", &self.windows.mmio32),
            ("pci window", &self.windows.mmio64),
        ];
        for (what, range) in memory.chain(windows) {
            if range.is_empty() {
                return Err(AcpiError::EmptyRange {
                    what,
                    range: range.clone(),
                });
            }
        }
        if self.windows.mmio32.end > 1 << 32 {
            return Err(AcpiError::Window(self.windows.mmio32.clone()));
        }
        if self.windows.io.end > 1 << 16 {
            return Err(AcpiError::IoWindow(self.windows.io.clone()));
        }
        let ecam_end = self.ecam.base.checked_add(self.ecam.size_bytes());
        if !self.ecam.base.is_multiple_of(1 << 20) || ecam_end.is_none_or(|end| end > 1 << 32) {
            return Err(AcpiError::Ecam(self.ecam.base));
        }
        match self.serial {
            Some(serial) if serial.port.checked_add(7).is_none() => {
                Err(AcpiError::Serial(serial.port))
            }
            _ => Ok(()),
        }
    }
}

/// Tables laid out one behind the other from a guest-physical address on.
struct Image {
    address: u64,
    bytes: Vec<u8>,
}

impl Image {
    /// Appends a table and returns its address. Tables start on 16-byte boundaries; only some have to.
    fn place(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let address = self.address + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

/// An empty table with the project's identification.
fn sdt(signature: &[u8; 4], revision: u8) -> Sdt {
    /// Bytes of the header all tables share.
    const HEADER: u32 = 36;
    Sdt::new(
        *signature,
        HEADER,
        revision,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    )
}
