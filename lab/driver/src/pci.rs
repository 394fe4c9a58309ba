// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A PCI function as the guest's kernel sees it: loads and stores, nothing else.

use std::sync::Arc;

use ebbtide_bus::irq::MsiMessage;
use ebbtide_bus::pci::Devfn;
use ebbtide_memory::AddressSpace;

const COMMAND: u16 = 0x04;
const COMMAND_MEMORY_AND_MASTER: u32 = 0x6;
const BAR0: u16 = 0x10;
const CAPABILITIES: u16 = 0x34;
const CAPABILITY_MSIX: u8 = 0x11;
const MSIX_ENABLE: u32 = 0x8000;
/// Where the messages of the local APIC go.
const APIC: u64 = 0xfee0_0000;

/// A capability in a function's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its ID.
    pub id: u8,
    /// Where it is in configuration space.
    pub at: u16,
}

/// A function on a bus.
#[derive(Clone)]
pub struct PciDevice {
    space: Arc<AddressSpace>,
    ecam: u64,
    bus: u8,
    devfn: Devfn,
}

impl PciDevice {
    /// The function at `devfn` of bus 0 of the hierarchy whose configuration space is at `ecam`.
    pub fn new(space: &Arc<AddressSpace>, ecam: u64, devfn: Devfn) -> Self {
        Self {
            space: Arc::clone(space),
            ecam,
            bus: 0,
            devfn,
        }
    }

    /// The function at `devfn` of bus `bus` of the same hierarchy.
    pub fn other(&self, bus: u8, devfn: Devfn) -> Self {
        Self {
            bus,
            devfn,
            ..self.clone()
        }
    }

    /// The number of its bus.
    pub fn bus(&self) -> u8 {
        self.bus
    }

    /// Where it is on its bus.
    pub fn devfn(&self) -> Devfn {
        self.devfn
    }

    /// Whether something answers.
    pub fn is_there(&self) -> bool {
        self.read_config(0, 4) != u32::MAX
    }

    /// Turns memory decoding and bus mastering on.
    pub fn enable(&self) {
        self.write_config(COMMAND, 2, COMMAND_MEMORY_AND_MASTER);
    }

    /// A load, as a CPU does it.
    pub fn load(&self, address: u64, size: u8) -> u64 {
        let reader = self.space.memory().register();
        self.space.load(&reader, address, size)
    }

    /// A store, as a CPU does it.
    pub fn store(&self, address: u64, size: u8, value: u64) {
        let reader = self.space.memory().register();
        self.space.store(&reader, address, size, value);
    }

    /// Reads configuration space.
    pub fn read_config(&self, offset: u16, size: u8) -> u32 {
        // Sizes are at most 4.
        self.load(self.config(offset), size) as u32
    }

    /// Writes configuration space.
    pub fn write_config(&self, offset: u16, size: u8, value: u32) {
        self.store(self.config(offset), size, value.into());
    }

    fn config(&self, offset: u16) -> u64 {
        let function = u64::from(self.bus) << 8 | u64::from(self.devfn.bits());
        self.ecam + (function << 12) + u64::from(offset)
    }

    /// The capabilities in their order.
    ///
    /// # Panics
    /// When the list is a loop.
    pub fn capabilities(&self) -> Vec<Capability> {
        let mut list = Vec::new();
        let mut at = self.read_config(CAPABILITIES, 1) as u16;
        while at != 0 {
            assert!(list.len() < 48, "the capability list is a loop");
            list.push(Capability {
                id: self.read_config(at, 1) as u8,
                at,
            });
            at = self.read_config(at + 1, 1) as u16;
        }
        list
    }

    /// Address of a memory BAR.
    pub fn bar(&self, index: u8) -> u64 {
        let at = BAR0 + 4 * u16::from(index);
        let low = u64::from(self.read_config(at, 4));
        let high = if low & 6 == 4 {
            u64::from(self.read_config(at + 4, 4))
        } else {
            0
        };
        high << 32 | low & !0xf
    }

    /// Turns MSI-X on, with a message for each vector, all unmasked.
    ///
    /// # Panics
    /// When the function has no MSI-X.
    pub fn enable_msix(&self) {
        let at = self.msix();
        let table = self.msix_table();
        for vector in 0..self.vectors() {
            let entry = table + 16 * u64::from(vector);
            let MsiMessage { address, data } = self.message(vector);
            self.store(entry, 4, address & 0xffff_ffff);
            self.store(entry + 4, 4, address >> 32);
            self.store(entry + 8, 4, data.into());
            self.store(entry + 12, 4, 0);
        }
        self.write_config(at + 2, 2, MSIX_ENABLE);
    }

    /// Masks or unmasks one vector.
    pub fn mask_vector(&self, vector: u16, masked: bool) {
        self.store(
            self.msix_table() + 16 * u64::from(vector) + 12,
            4,
            masked.into(),
        );
    }

    /// Vectors in the function's table.
    pub fn vectors(&self) -> u16 {
        (self.read_config(self.msix() + 2, 2) & 0x7ff) as u16 + 1
    }

    /// The message [`enable_msix`](Self::enable_msix) gives to `vector`: another one for each vector of the hierarchy, of
    /// the first 256 of a function.
    pub fn message(&self, vector: u16) -> MsiMessage {
        let function = u32::from(self.bus) << 8 | u32::from(self.devfn.bits());
        MsiMessage {
            address: APIC,
            data: function << 8 | u32::from(vector),
        }
    }

    /// Where the capability with ID `id` is, if there is one.
    pub fn capability(&self, id: u8) -> Option<u16> {
        let mut list = self.capabilities().into_iter();
        Some(list.find(|capability| capability.id == id)?.at)
    }

    fn msix(&self) -> u16 {
        let found = self.capability(CAPABILITY_MSIX);
        found.expect("the function has MSI-X")
    }

    fn msix_table(&self) -> u64 {
        let table = self.read_config(self.msix() + 4, 4);
        self.bar((table & 7) as u8) + u64::from(table & !7)
    }
}
