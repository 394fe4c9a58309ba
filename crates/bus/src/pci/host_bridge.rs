// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The root of the PCI hierarchy: bus 0, and the two ways to the configuration space of everything on it and below.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use ebbtide_gate::Gate;
use ebbtide_memory::{Memory, Mmio, Region};

use super::bar::{BarSpace, Windows};
use super::bridge::Upstream;
use super::{Bus, BusKind, Config, Devfn, Function, Ids, IntxWires, PciError, firmware};
use crate::gated::all_ones;

/// The bridge's own function. The project has no vendor id of its own; this is the one registered for a PCIe host bridge
/// that exists in software only, and no driver or quirk takes it for a chipset.
const BRIDGE_IDS: Ids = Ids {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_00_00,
    subsystem_vendor: 0,
    subsystem: 0,
};

/// Bytes of configuration space of one bus.
const BUS_BYTES: u64 = 1 << 20;
/// CONFIG_ADDRESS: the access is to configuration space.
const ADDRESS_ENABLE: u32 = 1 << 31;

/// A PCIe host bridge with bus 0.
///
/// BARs appear in [`container`](Self::container), which the machine adds to its memory at guest-physical 0 with a priority
/// below everything else ([`HostBridge::PRIORITY`]); I/O BARs in [`io_container`](Self::io_container), for port 0 likewise.
pub struct HostBridge {
    root: Arc<Bus>,
    config_address: AtomicU32,
    last_bus: AtomicU8,
}

struct OwnFunction(Config);

impl Function for OwnFunction {
    fn config(&self) -> &Config {
        &self.0
    }
}

impl HostBridge {
    /// The container's priority: RAM and platform registers hide a BAR a guest put over them.
    pub const PRIORITY: i32 = -1;
    /// Bytes of memory-mapped configuration space: 256 buses.
    pub const ECAM_BYTES: u64 = 256 * BUS_BYTES;
    /// Ports of configuration mechanism #1, from 0xcf8 on.
    pub const PORTS_BYTES: u64 = 8;
    /// The name of bus 0.
    pub const BUS: &str = "pcie.0";

    /// A bridge that forwards `windows`, with itself as function 00.0.
    ///
    /// # Errors
    /// The memory map refused it.
    pub fn new(memory: &Arc<Memory>, windows: Windows) -> Result<Arc<Self>, PciError> {
        let container = Region::container("pci", 1 << 64);
        let space = BarSpace {
            memory: Arc::clone(memory),
            root: Arc::clone(&container),
            container,
            io_container: Region::container("pci-io", 1 << 16),
            windows,
            upstream: Arc::new(Upstream::Memory),
        };
        let bridge = Arc::new(Self {
            root: Bus::new(Self::BUS, BusKind::Root, space),
            config_address: AtomicU32::new(0),
            last_bus: AtomicU8::new(u8::MAX),
        });
        let own = OwnFunction(Config::new(&Gate::new("pci-host-bridge"), BRIDGE_IDS));
        bridge.attach(Some(0), Arc::new(own))?;
        Ok(bridge)
    }

    /// The region the BARs appear in, 2^64 bytes.
    pub fn container(&self) -> &Arc<Region> {
        &self.root.space().container
    }

    /// The region the I/O BARs of bus 0 appear in, 2^16 ports. Bridges forward no ports: a function with an I/O BAR is
    /// refused behind one.
    pub fn io_container(&self) -> &Arc<Region> {
        &self.root.space().io_container
    }

    /// Wires the interrupt pins of bus 0, and so of the buses behind its bridges; without, functions that have one are
    /// refused.
    pub fn wire_interrupts(&self, wires: IntxWires) {
        self.root.wire(Some(&wires));
    }

    /// Bus 0.
    pub fn bus(&self) -> &Arc<Bus> {
        &self.root
    }

    /// [`Bus::attach`] for bus 0.
    ///
    /// # Errors
    /// As there.
    pub fn attach(&self, slot: Option<u8>, function: Arc<dyn Function>) -> Result<u8, PciError> {
        self.root.attach(slot, function)
    }

    /// [`Bus::attach_at`] for bus 0.
    ///
    /// # Errors
    /// As there.
    pub fn attach_at(&self, devfn: Devfn, function: Arc<dyn Function>) -> Result<(), PciError> {
        self.root.attach_at(devfn, function)
    }

    /// [`Bus::unmap`] for bus 0.
    ///
    /// # Errors
    /// As there.
    pub fn unmap(&self, devfn: Devfn) -> Result<(), PciError> {
        self.root.unmap(devfn)
    }

    /// Takes function 0 out of `slot` of bus 0. See [`Bus::detach_at`].
    ///
    /// # Errors
    /// As there.
    pub fn detach(&self, slot: u8) -> Result<Arc<dyn Function>, PciError> {
        self.detach_at(Devfn::new(slot, 0).ok_or(PciError::NoSuchSlot(slot))?)
    }

    /// [`Bus::detach_at`] for bus 0.
    ///
    /// # Errors
    /// As there.
    pub fn detach_at(&self, devfn: Devfn) -> Result<Arc<dyn Function>, PciError> {
        self.root.detach_at(devfn)
    }

    /// The functions on bus 0, in order of their addresses.
    pub fn functions(&self) -> Vec<(Devfn, Arc<dyn Function>)> {
        self.root.functions()
    }

    /// Sets the highest bus number there is: the last one the guest is told of. 255 without it.
    pub fn set_last_bus(&self, last_bus: u8) {
        self.last_bus.store(last_bus, Ordering::Relaxed);
    }

    /// The highest bus number a bridge answers for, as programmed now; 0 without bridges.
    pub fn highest_bus_in_use(&self) -> u8 {
        let subordinate = |(_, function): (Devfn, Arc<dyn Function>)| {
            Some(function.config().bridge()?.subordinate())
        };
        let all = self.functions().into_iter().filter_map(subordinate);
        all.max().unwrap_or(0)
    }

    /// Does what firmware does before it starts an operating system: numbers the buses, gives every BAR and every bridge's
    /// windows addresses, with what is to be kept free for later ([`Reservation`](super::Reservation)), turns decoding on,
    /// and forgets hot-plug events of what is there already. Addresses are kept: after a [`reset`](Self::reset) each BAR
    /// gets the one it had. Bus mastering is turned on for bridges, for others it is left to the drivers.
    ///
    /// # Errors
    /// [`PciError::NoRoom`] and [`PciError::NoRoomBehind`] name what was left without an address,
    /// [`PciError::NoBusNumber`] a bridge without a bus number; everything else has been given its own.
    pub fn assign_bars(&self) -> Result<(), PciError> {
        firmware::start(&self.root, self.last_bus.load(Ordering::Relaxed))
    }

    /// Power-on state of the bridge and of every function. BARs are not assigned any more, and nothing is left of functions
    /// that are gone.
    pub fn reset(&self) {
        self.config_address.store(0, Ordering::Relaxed);
        for function in self.root.functions_below() {
            function.reset();
        }
        self.forget_remnants();
    }

    /// Takes away what is left of functions that are gone ([`Remnant`](super::Remnant)): no driver waits for it any more.
    pub fn forget_remnants(&self) {
        self.root.forget_remnants();
    }

    /// Memory-mapped configuration space (PCIe 5.0, 7.2.2) of 256 buses, [`ECAM_BYTES`](Self::ECAM_BYTES) long.
    pub fn ecam(self: &Arc<Self>) -> Arc<dyn Mmio> {
        Arc::new(Ecam(Arc::clone(self)))
    }

    /// Ports 0xcf8 to 0xcff: configuration mechanism #1 (PCI 3.0, 3.2.2.3.2). Byte accesses to 0xcf9 go nowhere; see
    /// [`ports_with_reset`](Self::ports_with_reset).
    pub fn ports(self: &Arc<Self>) -> Arc<dyn Mmio> {
        Arc::new(Ports {
            bridge: Arc::clone(self),
            reset_control: None,
        })
    }

    /// The same, with the reset control register at 0xcf9: it is what a byte access there reaches (as its offset 0),
    /// while a dword access to 0xcf8 covers the same port and is CONFIG_ADDRESS.
    pub fn ports_with_reset(self: &Arc<Self>, reset_control: Arc<dyn Mmio>) -> Arc<dyn Mmio> {
        Arc::new(Ports {
            bridge: Arc::clone(self),
            reset_control: Some(reset_control),
        })
    }

    fn read_config(&self, target: (u8, Devfn), offset: u16, size: u8) -> u32 {
        self.root.read_config(0, target, offset, size)
    }

    fn write_config(&self, target: (u8, Devfn), offset: u16, size: u8, value: u32) {
        self.root.write_config(0, target, offset, size, value);
    }
}

/// The memory-mapped way.
struct Ecam(Arc<HostBridge>);

/// Address bits: 27 to 20 the bus, 19 to 12 the function, 11 to 0 the register.
fn ecam_target(offset: u64) -> Option<((u8, Devfn), u16)> {
    let bus = u8::try_from(offset / BUS_BYTES).ok()?;
    let devfn = Devfn::from_bits((offset >> 12) as u8);
    Some(((bus, devfn), offset as u16 & 0xfff))
}

impl Mmio for Ecam {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let Some((target, register)) = ecam_target(offset) else {
            return all_ones(size);
        };
        // A qword is two dword requests.
        if size == 8 && register % 8 == 0 {
            let dword = |register| u64::from(self.0.read_config(target, register, 4));
            return dword(register + 4) << 32 | dword(register);
        }
        u64::from(self.0.read_config(target, register, size)) & all_ones(size)
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        let Some((target, register)) = ecam_target(offset) else {
            return;
        };
        if size == 8 && register % 8 == 0 {
            self.0.write_config(target, register, 4, value as u32);
            self.0
                .write_config(target, register + 4, 4, (value >> 32) as u32);
        } else {
            self.0.write_config(target, register, size, value as u32);
        }
    }
}

/// The way through ports: CONFIG_ADDRESS at 0, CONFIG_DATA at 4.
struct Ports {
    bridge: Arc<HostBridge>,
    reset_control: Option<Arc<dyn Mmio>>,
}

const CONFIG_DATA: u64 = 4;
const RESET_CONTROL: u64 = 1;

impl Ports {
    /// The function and register CONFIG_ADDRESS selects, for an access at `offset` of the ports.
    fn target(&self, offset: u64) -> Option<((u8, Devfn), u16)> {
        let address = self.bridge.config_address.load(Ordering::Relaxed);
        if address & ADDRESS_ENABLE == 0 || !(CONFIG_DATA..8).contains(&offset) {
            return None;
        }
        let register = (address & 0xfc) as u16 + (offset - CONFIG_DATA) as u16;
        let devfn = Devfn::from_bits((address >> 8) as u8);
        Some((((address >> 16) as u8, devfn), register))
    }
}

impl Mmio for Ports {
    fn read(&self, offset: u64, size: u8) -> u64 {
        match (offset, size, &self.reset_control) {
            (0, 4, _) => self.bridge.config_address.load(Ordering::Relaxed).into(),
            (RESET_CONTROL, 1, Some(reset_control)) => reset_control.read(0, 1),
            _ => match self.target(offset) {
                Some((target, register)) => {
                    u64::from(self.bridge.read_config(target, register, size)) & all_ones(size)
                }
                None => all_ones(size),
            },
        }
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        match (offset, size, &self.reset_control) {
            // The low two bits and bits 30 to 24 are reserved and read as zero.
            (0, 4, _) => self
                .bridge
                .config_address
                .store(value as u32 & 0x80ff_fffc, Ordering::Relaxed),
            (RESET_CONTROL, 1, Some(reset_control)) => reset_control.write(0, 1, value),
            _ => {
                if let Some((target, register)) = self.target(offset) {
                    self.bridge
                        .write_config(target, register, size, value as u32);
                }
            }
        }
    }
}
