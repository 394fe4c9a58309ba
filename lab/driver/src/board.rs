// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A machine without CPUs: memory, a PCI bus, interrupts, an iothread. The test is the CPU.

use std::sync::Arc;

use ebbtide_bus::pci::{Devfn, Function, HostBridge, Windows};
use ebbtide_iothread::{IoThread, Remote};
use ebbtide_memory::{AddressSpace, Backing, Memory, MemoryConfig, RamSpec, Region};

use crate::interrupts::Interrupts;
use crate::pci::PciDevice;
use crate::ram::GuestRam;

/// Where configuration space is.
const ECAM: u64 = 0xe000_0000;
const WINDOW32: std::ops::Range<u64> = 0xc000_0000..0xe000_0000;
const WINDOW64: std::ops::Range<u64> = 1 << 36..1 << 37;
/// Address space for all RAM blocks of a test.
const ARENA_BYTES: u64 = 1 << 36;

/// The machine. RAM begins at 0 and ends below 3 GiB; what a test adds belongs between 4 GiB and 64 GiB.
pub struct Board {
    memory: Arc<Memory>,
    root: Arc<Region>,
    space: Arc<AddressSpace>,
    bridge: Arc<HostBridge>,
    interrupts: Interrupts,
    ram: GuestRam,
    iothread: IoThread,
}

impl Board {
    /// A board with `ram_bytes` of RAM, the first page of which is never allocated to anybody.
    ///
    /// # Errors
    /// The host has no memory, or no io_uring.
    pub fn new(ram_bytes: u64) -> anyhow::Result<Board> {
        let memory = Memory::new(MemoryConfig {
            arena_bytes: ARENA_BYTES,
        })?;
        let block = memory.ram().add(RamSpec {
            name: "ram".into(),
            size_bytes: ram_bytes,
            max_size_bytes: ram_bytes,
            backing: Backing::Anon { thp: false },
            prefault: false,
            block_size_bytes: None,
        })?;
        let root = Region::container("system", 1 << 64);
        let windows = Windows {
            mmio32: WINDOW32,
            mmio64: WINDOW64,
            io: 0..0,
        };
        let bridge = HostBridge::new(&memory, windows)?;
        memory.update(|map| {
            map.add(&root, &Region::ram("ram", &block), 0, 0)?;
            map.add(
                &root,
                &Region::mmio("ecam", HostBridge::ECAM_BYTES, bridge.ecam()),
                ECAM,
                0,
            )?;
            map.add(&root, bridge.container(), 0, -1)
        })?;
        let space = memory.address_space("memory", &root)?;
        let ram = GuestRam::new(&space, 4096..ram_bytes);
        let iothread = IoThread::spawn("iothread0")?;
        Ok(Board {
            memory,
            root,
            space,
            bridge,
            interrupts: Interrupts::default(),
            ram,
            iothread,
        })
    }

    /// The memory core.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// The root of the memory map; regions a test adds go in here.
    pub fn root(&self) -> &Arc<Region> {
        &self.root
    }

    /// What devices and CPUs access.
    pub fn space(&self) -> &Arc<AddressSpace> {
        &self.space
    }

    /// The PCI bus.
    pub fn bridge(&self) -> &Arc<HostBridge> {
        &self.bridge
    }

    /// The interrupt controller.
    pub fn interrupts(&self) -> &Interrupts {
        &self.interrupts
    }

    /// RAM for the driver's rings and buffers.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The thread devices serve their queues on.
    pub fn remote(&self) -> Remote {
        self.iothread.remote()
    }

    /// Plugs a function in, assigns its BARs and turns it on.
    ///
    /// # Errors
    /// The bus is full, or a BAR found no room.
    pub fn attach(&self, function: Arc<dyn Function>) -> anyhow::Result<PciDevice> {
        let slot = self.bridge.attach(None, function)?;
        self.bridge.assign_bars()?;
        let device = self.device(slot);
        device.enable();
        Ok(device)
    }

    /// Function 0 of a slot of bus 0, whether there is one or not.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn device(&self, slot: u8) -> PciDevice {
        let devfn = Devfn::new(slot, 0).expect("slots are 0 to 31");
        PciDevice::new(&self.space, ECAM, devfn)
    }
}
