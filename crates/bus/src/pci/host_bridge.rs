// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The root of the PCI hierarchy: bus 0, its functions, and the two ways to their configuration space.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{
    Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
};

use ebbtide_gate::{Entry, Gate};
use ebbtide_memory::{Memory, Mmio, Region};

use super::bar::{BarSpace, Windows, bar_offset};
use super::placement::{Placement, Request};
use super::registers::COMMAND;
use super::{CONFIG_SIZE_BYTES, Config, Devfn, Entered, Function, Ids, IntxWires, PciError};
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

const DEVFNS: usize = 256;
/// Bytes of configuration space of one bus.
const BUS_BYTES: u64 = 1 << 20;
/// CONFIG_ADDRESS: the access is to configuration space.
const ADDRESS_ENABLE: u32 = 1 << 31;

/// A PCIe host bridge with bus 0.
///
/// A function's BARs appear in [`container`](Self::container), which the machine adds to its memory at guest-physical 0
/// with a priority below everything else ([`HostBridge::PRIORITY`]); I/O BARs in [`io_container`](Self::io_container), for
/// port 0 likewise.
pub struct HostBridge {
    space: BarSpace,
    functions: RwLock<Box<Slots>>,
    placement: Mutex<Placement>,
    config_address: AtomicU32,
    intx: OnceLock<IntxWires>,
}

/// The functions of the bus, by [`Devfn`].
type Slots = [Option<Arc<dyn Function>>];

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

    /// A bridge that forwards `windows`, with itself as function 00.0.
    ///
    /// # Errors
    /// The memory map refused it.
    pub fn new(memory: &Arc<Memory>, windows: Windows) -> Result<Arc<Self>, PciError> {
        let container = Region::container("pci", 1 << 64);
        let bridge = Arc::new(Self {
            space: BarSpace {
                memory: Arc::clone(memory),
                container,
                io_container: Region::container("pci-io", 1 << 16),
                windows,
            },
            functions: RwLock::new(vec![None; DEVFNS].into_boxed_slice()),
            placement: Mutex::default(),
            config_address: AtomicU32::new(0),
            intx: OnceLock::new(),
        });
        let own = OwnFunction(Config::new(&Gate::new("pci-host-bridge"), BRIDGE_IDS));
        bridge.attach(Some(0), Arc::new(own))?;
        Ok(bridge)
    }

    /// The region the BARs appear in, 2^64 bytes.
    pub fn container(&self) -> &Arc<Region> {
        &self.space.container
    }

    /// The region the I/O BARs appear in, 2^16 ports.
    pub fn io_container(&self) -> &Arc<Region> {
        &self.space.io_container
    }

    /// Wires the interrupt pins of the bus; without, functions that have one are refused. Only the first call counts.
    pub fn wire_interrupts(&self, wires: IntxWires) {
        let _ = self.intx.set(wires);
    }

    /// Puts a single-function device into slot `slot`, or into the lowest free one. Returns the slot.
    ///
    /// # Errors
    /// No such slot, or it is taken, or the memory map refused a BAR's region.
    pub fn attach(&self, slot: Option<u8>, function: Arc<dyn Function>) -> Result<u8, PciError> {
        let devfn = match slot {
            Some(slot) => Devfn::new(slot, 0).ok_or(PciError::NoSuchSlot(slot))?,
            None => self.free_slot().ok_or(PciError::Full)?,
        };
        self.attach_at(devfn, function)?;
        Ok(devfn.slot())
    }

    /// Puts a function at `devfn`. Function 0 of a slot with several says so ([`Config::set_multifunction`]); a guest
    /// that scans sees the others only through it.
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub fn attach_at(&self, devfn: Devfn, function: Arc<dyn Function>) -> Result<(), PciError> {
        // Held to the end: it is also what serialises changes of the bus.
        let _placement = self.placement();
        if self.read().get(devfn.index()).is_some_and(Option::is_some) {
            return Err(PciError::InUse(devfn));
        }
        let (config, wires) = (function.config(), self.intx.get());
        config.check_wires(wires)?;
        config.attach(&self.space)?;
        config.wire(wires, devfn);
        if let Some(entry) = self.write().get_mut(devfn.index()) {
            *entry = Some(function);
        }
        Ok(())
    }

    /// Takes the BARs of the function at `devfn` out of the memory map for good. Part of the drain of a device whose gate
    /// is closed.
    ///
    /// # Errors
    /// Nothing is there, or the memory map refused.
    pub fn unmap(&self, devfn: Devfn) -> Result<(), PciError> {
        self.function(devfn)
            .ok_or(PciError::Empty(devfn))?
            .config()
            .release()
    }

    /// Takes function 0 out of `slot`. See [`detach_at`](Self::detach_at).
    ///
    /// # Errors
    /// As [`detach_at`](Self::detach_at).
    pub fn detach(&self, slot: u8) -> Result<Arc<dyn Function>, PciError> {
        self.detach_at(Devfn::new(slot, 0).ok_or(PciError::NoSuchSlot(slot))?)
    }

    /// Takes the function at `devfn` off the bus, BARs included. From now on the guest sees nothing there. The bridge
    /// keeps no reference to it.
    ///
    /// # Errors
    /// Nothing is there; its gate is open or has not drained; the memory map refused.
    pub fn detach_at(&self, devfn: Devfn) -> Result<Arc<dyn Function>, PciError> {
        let mut placement = self.placement();
        let function = self.function(devfn).ok_or(PciError::Empty(devfn))?;
        let gate = function.config().gate();
        if !gate.is_closed() || !gate.is_drained() {
            return Err(PciError::NotDrained {
                name: gate.name().to_owned(),
                devfn,
            });
        }
        function.config().release()?;
        if let Some(entry) = self.write().get_mut(devfn.index()) {
            *entry = None;
        }
        placement.forget(devfn);
        Ok(function)
    }

    /// The functions on the bus, in order of their addresses.
    pub fn functions(&self) -> Vec<(Devfn, Arc<dyn Function>)> {
        let all = (0..=u8::MAX).map(Devfn::from_bits);
        all.zip(self.read().iter())
            .filter_map(|(devfn, function)| Some((devfn, function.clone()?)))
            .collect()
    }

    /// Gives every BAR an address and turns decoding on, as firmware does before it starts an operating system. Addresses
    /// are kept: after a [`reset`](Self::reset) each BAR gets the one it had. Bus mastering is left to the drivers.
    ///
    /// # Errors
    /// [`PciError::NoRoom`] names a BAR that was left without an address; all others have theirs.
    pub fn assign_bars(&self) -> Result<(), PciError> {
        let functions = self.functions();
        let mut placement = self.placement();
        let requests = functions.iter().flat_map(|(devfn, function)| {
            let request = |bar: super::BarInfo| Request {
                devfn: *devfn,
                index: bar.index,
                spec: bar.spec,
            };
            function.config().bars().into_iter().map(request)
        });
        let result = placement.place(&self.space.windows, requests.collect());
        for (devfn, function) in &functions {
            program_bars(&**function, |index| placement.address(*devfn, index));
        }
        result
    }

    /// Power-on state of the bridge and of every function. BARs are not assigned any more.
    pub fn reset(&self) {
        self.config_address.store(0, Ordering::Relaxed);
        for (_, function) in self.functions() {
            function.reset();
        }
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

    fn free_slot(&self) -> Option<Devfn> {
        let functions = self.read();
        let empty = |devfn: &Devfn| {
            functions
                .get(devfn.index()..devfn.index() + 8)
                .is_some_and(|f| f.iter().all(Option::is_none))
        };
        (0..32).filter_map(|slot| Devfn::new(slot, 0)).find(empty)
    }

    fn function(&self, devfn: Devfn) -> Option<Arc<dyn Function>> {
        self.read().get(devfn.index())?.clone()
    }

    /// The function at `devfn`, if there is one and its gate is open. The reference is taken while a lease is held, so
    /// that it is never the last one.
    fn enter(&self, devfn: Devfn) -> Option<Entered> {
        let functions = self.read();
        let function = functions.get(devfn.index())?.as_ref()?;
        let lease = function.config().gate().enter(Entry::Mmio)?;
        Some(Entered {
            function: Arc::clone(function),
            _lease: lease,
        })
    }

    fn read_config(&self, devfn: Devfn, offset: u16, size: u8) -> u32 {
        match self.enter(devfn) {
            Some(entered) if within_dword(offset, size) => {
                entered.function.read_config(offset, size)
            }
            _ => u32::MAX,
        }
    }

    fn write_config(&self, devfn: Devfn, offset: u16, size: u8, value: u32) {
        if within_dword(offset, size)
            && let Some(entered) = self.enter(devfn)
        {
            entered.function.write_config(offset, size, value);
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Box<Slots>> {
        self.functions
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Box<Slots>> {
        self.functions
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn placement(&self) -> MutexGuard<'_, Placement> {
        self.placement
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes a function's BARs with decoding off, then turns it on: one change of the memory map.
fn program_bars(function: &dyn Function, address_of: impl Fn(u8) -> Option<u64>) {
    let command = function.read_config(COMMAND, 2);
    let bars = function.config().bars();
    let decode = bars
        .iter()
        .fold(0, |bits, bar| bits | bar.spec.kind.enable());
    function.write_config(COMMAND, 2, command & !u32::from(decode));
    for bar in &bars {
        let Some(address) = address_of(bar.index) else {
            continue;
        };
        function.write_config(bar_offset(bar.index), 4, address as u32);
        if bar.spec.kind.is_64bit() {
            function.write_config(bar_offset(bar.index + 1), 4, (address >> 32) as u32);
        }
    }
    if !bars.is_empty() {
        function.write_config(COMMAND, 2, command | u32::from(decode));
    }
}

/// Configuration requests are for 1, 2 or 4 bytes of one dword.
fn within_dword(offset: u16, size: u8) -> bool {
    matches!(size, 1 | 2 | 4) && offset % 4 + u16::from(size) <= 4 && offset < CONFIG_SIZE_BYTES
}

/// The memory-mapped way.
struct Ecam(Arc<HostBridge>);

/// Address bits: 27 to 20 the bus, 19 to 12 the function, 11 to 0 the register.
fn ecam_target(offset: u64) -> Option<(Devfn, u16)> {
    (offset < BUS_BYTES).then(|| {
        (
            Devfn::from_bits((offset >> 12) as u8),
            offset as u16 & 0xfff,
        )
    })
}

impl Mmio for Ecam {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let Some((devfn, register)) = ecam_target(offset) else {
            return all_ones(size);
        };
        // A qword is two dword requests.
        if size == 8 && register % 8 == 0 {
            let dword = |register| u64::from(self.0.read_config(devfn, register, 4));
            return dword(register + 4) << 32 | dword(register);
        }
        u64::from(self.0.read_config(devfn, register, size)) & all_ones(size)
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        let Some((devfn, register)) = ecam_target(offset) else {
            return;
        };
        if size == 8 && register % 8 == 0 {
            self.0.write_config(devfn, register, 4, value as u32);
            self.0
                .write_config(devfn, register + 4, 4, (value >> 32) as u32);
        } else {
            self.0.write_config(devfn, register, size, value as u32);
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
    fn target(&self, offset: u64) -> Option<(Devfn, u16)> {
        let address = self.bridge.config_address.load(Ordering::Relaxed);
        let bus = address >> 16 & 0xff;
        if address & ADDRESS_ENABLE == 0 || bus != 0 || !(CONFIG_DATA..8).contains(&offset) {
            return None;
        }
        let register = (address & 0xfc) as u16 + (offset - CONFIG_DATA) as u16;
        Some((Devfn::from_bits((address >> 8) as u8), register))
    }
}

impl Mmio for Ports {
    fn read(&self, offset: u64, size: u8) -> u64 {
        match (offset, size, &self.reset_control) {
            (0, 4, _) => self.bridge.config_address.load(Ordering::Relaxed).into(),
            (RESET_CONTROL, 1, Some(reset_control)) => reset_control.read(0, 1),
            _ => match self.target(offset) {
                Some((devfn, register)) => {
                    u64::from(self.bridge.read_config(devfn, register, size)) & all_ones(size)
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
                if let Some((devfn, register)) = self.target(offset) {
                    self.bridge
                        .write_config(devfn, register, size, value as u32);
                }
            }
        }
    }
}
