// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the tests of this module put around it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use ebbtide_gate::Gate;
use ebbtide_memory::{AddressSpace, Memory, MemoryConfig, Mmio, Region};

use super::{
    BarKind, BarSpec, Config, EjectSink, Function, HostBridge, Ids, Msix, SlotAddress, Windows,
};
use crate::gated;
use crate::irq::{IrqError, IrqLine, MsiController, MsiMessage, MsiRoute};

/// Remembers what its routes delivered.
#[derive(Default)]
pub(super) struct FakeController {
    pub(super) routes: Mutex<Vec<Arc<FakeRoute>>>,
    pub(super) limit: Option<usize>,
}

#[derive(Default)]
pub(super) struct FakeRoute {
    state: Mutex<RouteState>,
    pub(super) refuse: AtomicBool,
}

#[derive(Default)]
struct RouteState {
    message: Option<MsiMessage>,
    delivered: Vec<MsiMessage>,
    programmed: usize,
}

impl MsiController for FakeController {
    fn route(&self) -> Result<Arc<dyn MsiRoute>, IrqError> {
        let mut routes = self.routes.lock().unwrap();
        match self.limit {
            Some(limit) if routes.len() >= limit => Err(IrqError::Exhausted { limit }),
            _ => {
                let route = Arc::new(FakeRoute::default());
                routes.push(route.clone());
                Ok(route)
            }
        }
    }
}

impl FakeController {
    pub(super) fn route_of(&self, vector: usize) -> Arc<FakeRoute> {
        self.routes.lock().unwrap()[vector].clone()
    }
}

impl FakeRoute {
    /// The messages delivered since the last call.
    pub(super) fn delivered(&self) -> Vec<MsiMessage> {
        std::mem::take(&mut self.state.lock().unwrap().delivered)
    }

    /// How often the route was programmed since the last call.
    pub(super) fn programmed(&self) -> usize {
        std::mem::take(&mut self.state.lock().unwrap().programmed)
    }

    pub(super) fn message(&self) -> Option<MsiMessage> {
        self.state.lock().unwrap().message
    }
}

impl MsiRoute for FakeRoute {
    fn program(&self, message: Option<MsiMessage>) -> Result<(), IrqError> {
        let mut state = self.state.lock().unwrap();
        state.programmed += 1;
        if self.refuse.load(Ordering::SeqCst) {
            state.message = None;
            return Err(IrqError::host(
                "route an interrupt",
                std::io::ErrorKind::Other,
            ));
        }
        state.message = message;
        Ok(())
    }

    fn signal(&self) {
        let mut state = self.state.lock().unwrap();
        let message = state.message;
        state.delivered.extend(message);
    }
}

/// An input of an interrupt controller.
#[derive(Default)]
pub(super) struct Level {
    high: AtomicBool,
    changes: AtomicUsize,
}

impl Level {
    pub(super) fn is_high(&self) -> bool {
        self.high.load(Ordering::SeqCst)
    }

    /// How often it was driven to the other level.
    pub(super) fn changes(&self) -> usize {
        self.changes.load(Ordering::SeqCst)
    }
}

impl IrqLine for Level {
    fn set(&self, high: bool) {
        if self.high.swap(high, Ordering::SeqCst) != high {
            self.changes.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// A machine with a PCI bus and nothing else: root, address space, bridge.
pub(super) struct Machine {
    pub(super) memory: Arc<Memory>,
    pub(super) root: Arc<Region>,
    pub(super) space: Arc<AddressSpace>,
    pub(super) bridge: Arc<HostBridge>,
    pub(super) ecam: Arc<dyn Mmio>,
    pub(super) ports: Arc<dyn Mmio>,
}

pub(super) fn windows() -> Windows {
    Windows {
        mmio32: 0xc000_0000..0xe000_0000,
        mmio64: 1 << 36..1 << 37,
        io: 0xc000..0x1_0000,
    }
}

impl Machine {
    pub(super) fn new() -> Self {
        Self::with(windows())
    }

    pub(super) fn with(windows: Windows) -> Self {
        let memory = Memory::new(MemoryConfig {
            arena_bytes: 1 << 30,
        })
        .unwrap();
        let root = Region::container("root", 1 << 64);
        let bridge = HostBridge::new(&memory, windows).unwrap();
        memory
            .update(|change| change.add(&root, bridge.container(), 0, HostBridge::PRIORITY))
            .unwrap();
        let space = memory.address_space("memory", &root).unwrap();
        let (ecam, ports) = (bridge.ecam(), bridge.ports());
        Self {
            memory,
            root,
            space,
            bridge,
            ecam,
            ports,
        }
    }

    /// What a CPU reads at `address`.
    pub(super) fn load(&self, address: u64, size: u8) -> u64 {
        self.space.load(&self.memory.register(), address, size)
    }

    pub(super) fn store(&self, address: u64, size: u8, value: u64) {
        self.space
            .store(&self.memory.register(), address, size, value);
    }

    /// A configuration read through memory, function 0 of `slot`.
    pub(super) fn config(&self, slot: u8, register: u64, size: u8) -> u32 {
        self.ecam.read(u64::from(slot) << 15 | register, size) as u32
    }

    pub(super) fn set_config(&self, slot: u8, register: u64, size: u8, value: u32) {
        self.ecam
            .write(u64::from(slot) << 15 | register, size, value.into());
    }
}

/// Remembers ejects.
#[derive(Default)]
pub(super) struct Ejects(Mutex<Vec<SlotAddress>>);

impl EjectSink for Ejects {
    fn eject(&self, slot: &SlotAddress) {
        self.0.lock().unwrap().push(slot.clone());
    }
}

impl Ejects {
    /// The slots ejected since the last call.
    pub(super) fn take(&self) -> Vec<String> {
        let taken = std::mem::take(&mut *self.0.lock().unwrap());
        taken.iter().map(ToString::to_string).collect()
    }
}

/// Registers that all read as the same value.
pub(super) struct Signature(pub(super) u64);

impl Mmio for Signature {
    fn read(&self, _offset: u64, size: u8) -> u64 {
        self.0 & crate::gated::all_ones(size)
    }
    fn write(&self, _offset: u64, _size: u8, _value: u64) {}
}

/// A function with BAR 0 (32 bits, 8 KiB, reads 0xb0), BAR 2 (64 bits prefetchable, 1 MiB, reads 0xb2) and MSI-X with 3
/// vectors in BAR 1.
pub(super) struct Device {
    config: Config,
}

pub(super) const DEVICE_IDS: Ids = Ids {
    vendor: 0x1234,
    device: 0x5678,
    revision: 9,
    class: 0x01_02_03,
    subsystem_vendor: 0xabcd,
    subsystem: 0xef01,
};

impl Device {
    pub(super) fn new(name: &str, controller: &FakeController) -> Arc<Self> {
        let gate = Gate::new(name);
        let mut config = Config::new(&gate, DEVICE_IDS);
        let shows = |value, size| {
            Region::mmio(
                format!("{value:x}"),
                size,
                gated::behind(&gate, Arc::new(Signature(value))),
            )
        };
        config
            .add_bar(
                0,
                BarSpec {
                    size_bytes: 8192,
                    kind: BarKind::Mem32,
                },
                shows(0xb0, 8192),
            )
            .unwrap();
        let large = BarSpec {
            size_bytes: 1 << 20,
            kind: BarKind::Mem64 { prefetchable: true },
        };
        config.add_bar(2, large, shows(0xb2, 1 << 20)).unwrap();
        config
            .add_msix(1, &Msix::new(3, controller).unwrap())
            .unwrap();
        Arc::new(Self { config })
    }
}

impl Function for Device {
    fn config(&self) -> &Config {
        &self.config
    }
}
