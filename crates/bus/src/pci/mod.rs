// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! PCI: configuration space, BARs, MSI-X, and the host bridge they hang on.
//!
//! ```text
//! guest ── ECAM / ports 0xcf8.. ──▶ HostBridge ──▶ Bus ── gate ──▶ Function ──▶ Config ──┬─▶ BARs: Memory::update
//!                                                  ▲               │                   └─▶ Msix: table in a BAR, routes
//!                                                  └──── Bridge ◀──┘
//! device ── MsixVector::signal ──▶ Msix ──▶ MsiRoute
//! device ── InterruptPin::set ──▶ InterruptPin ──▶ wire shared by several functions ──▶ IrqLine
//! ```
//!
//! Locks, in the order they may be taken: a bus's placement of BARs and its remnants (control thread only), a port's
//! slot controller, a function's configuration space, then either a bridge's windows and the memory map's writer lock,
//! or MSI-X (function, then one vector), or the interrupt pin (then its wire). A bus's table of functions is locked
//! only to look one up (that of a bus above before that of one below), its interrupt wires only to copy them, never
//! during an access.

mod aer;
mod bar;
mod bridge;
mod bus;
mod config;
mod express;
mod firmware;
mod host_bridge;
mod hotplug;
pub mod intx;
mod msix;
mod placement;
mod port;
mod registers;
mod remnant;
mod slot;

#[cfg(test)]
mod fakes;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use aer::{CorrectableError, ErrorSeverity, InjectedError, UncorrectableError};
pub use bar::{BarInfo, BarKind, BarSpec, Windows};
pub use bridge::Bridge;
pub use bus::{Bus, BusKind};
pub use config::{Command, Config, Ids};
pub use express::ExpressType;
pub use firmware::Reservation;
pub use host_bridge::HostBridge;
pub use hotplug::{
    EjectSink, HotplugError, HotplugSlot, Indicator, Removal, SlotAddress, SlotState,
};
pub use intx::{InterruptPin, IntxPin, IntxWires};
pub use msix::{Msix, MsixVector};
pub use port::{Port, PortModel, PortSpec};
pub use remnant::Remnant;

/// Bytes of one function's configuration space.
pub const CONFIG_SIZE_BYTES: u16 = 4096;

/// Where a function is on its bus: slot 0 to 31, function 0 to 7.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Devfn(u8);

impl Devfn {
    /// Function `function` of slot `slot`, or `None` when there is no such place.
    pub fn new(slot: u8, function: u8) -> Option<Self> {
        (slot < 32 && function < 8).then_some(Self(slot << 3 | function))
    }

    /// As it is encoded in a requester id and in configuration addresses.
    pub const fn from_bits(bits: u8) -> Self {
        Self(bits)
    }

    /// The reverse of [`from_bits`](Self::from_bits).
    pub fn bits(self) -> u8 {
        self.0
    }

    /// Slot (device number), 0 to 31.
    pub fn slot(self) -> u8 {
        self.0 >> 3
    }

    /// Function number, 0 to 7.
    pub fn function(self) -> u8 {
        self.0 & 7
    }

    fn index(self) -> usize {
        self.0.into()
    }
}

impl std::fmt::Display for Devfn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:02x}.{}", self.slot(), self.function())
    }
}

impl std::fmt::Debug for Devfn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// One PCI function. Every method may be called from any vCPU thread and must not block.
///
/// The bridge enters the gate of [`config`](Self::config) around each access: once that is closed the function is not
/// called any more, the guest reads all ones and its writes are dropped.
pub trait Function: Send + Sync {
    /// The function's configuration space.
    fn config(&self) -> &Config;

    /// A guest's read of 1, 2 or 4 bytes that don't cross a dword boundary.
    fn read_config(&self, offset: u16, size: u8) -> u32 {
        self.config().read(offset, size)
    }

    /// A guest's write of 1, 2 or 4 bytes that don't cross a dword boundary.
    fn write_config(&self, offset: u16, size: u8, value: u32) {
        self.config().write(offset, size, value);
    }

    /// Back to the power-on state, configuration space included. The machine has stopped the vCPUs.
    fn reset(&self) {
        self.config().reset();
    }

    /// The guest has not seen the function yet (it is about to start, or to be told of what is plugged): what is here now
    /// is here from the beginning, not hot-plugged.
    fn settle(&self) {}

    /// What is to answer for it once it is detached, where its BAR was: registers that a driver waits for which did not let
    /// go of it. Asked for after its drain.
    fn remnant(&self) -> Option<Remnant> {
        None
    }

    /// Whether it can be on a bus of this kind.
    fn fits(&self, kind: BusKind) -> bool {
        kind != BusKind::Switch
    }

    /// A configuration request passes the function, a bridge, to the bus right behind it.
    fn reach_behind(&self) {}

    /// The function sends an error message. Returns whether it goes towards the root.
    fn receive_own_error(&self, _severity: ErrorSeverity, _requester: u16) -> bool {
        true
    }

    /// An error message from behind the function arrives, sent by `requester` (bus number and place, as in a requester
    /// id). Returns whether it goes on towards the root.
    fn receive_error(&self, _severity: ErrorSeverity, _requester: u16) -> bool {
        false
    }
}

/// Why the PCI bus could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// There are 32 slots.
    #[error("pci slot {0} does not exist: slots are 0 to 31")]
    NoSuchSlot(u8),
    /// A link leads to one device.
    #[error("pci slot {slot} does not exist on {bus}: a link has slot 0 only")]
    SingleSlot {
        /// The bus.
        bus: String,
        /// The slot asked for.
        slot: u8,
    },
    /// Switches have ports inside, and ports are on certain buses only.
    #[error("{name} can't be on the bus {bus} ({kind:?})")]
    WrongBus {
        /// The device.
        name: String,
        /// The bus.
        bus: String,
        /// What the bus is.
        kind: BusKind,
    },
    /// Another function is there.
    #[error("pci address {0} is in use")]
    InUse(Devfn),
    /// Every slot is taken.
    #[error("no free pci slot")]
    Full,
    /// Nothing is there.
    #[error("pci address {0} is empty")]
    Empty(Devfn),
    /// A function is only detached after its gate was closed and has drained.
    #[error("{name} at pci address {devfn} is still in use: its gate has not drained")]
    NotDrained {
        /// The device.
        name: String,
        /// Where it is.
        devfn: Devfn,
    },
    /// A bridge is only detached after what is behind it.
    #[error("{name} at pci address {devfn} still has functions behind it")]
    NotEmpty {
        /// The bridge.
        name: String,
        /// Where it is.
        devfn: Devfn,
    },
    /// A BAR that can't be.
    #[error("{name}: bar {index} of {size_bytes:#x} bytes: {reason}")]
    BadBar {
        /// The device.
        name: String,
        /// Which BAR.
        index: u8,
        /// Its size.
        size_bytes: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// The capability list is full.
    #[error("{name}: no room for a capability of {bytes} bytes")]
    CapabilitySpace {
        /// The device.
        name: String,
        /// Bytes asked for.
        bytes: usize,
    },
    /// 1 to 2048 vectors are possible.
    #[error("{0} msi-x vectors: 1 to 2048 are possible")]
    VectorCount(u16),
    /// Neither window has room for a BAR.
    #[error("no room in the pci windows for bar {index} ({size_bytes:#x} bytes) of {devfn}")]
    NoRoom {
        /// Where the function is.
        devfn: Devfn,
        /// Which BAR.
        index: u8,
        /// Its size.
        size_bytes: u64,
    },
    /// Neither window has room for what is behind a bridge.
    #[error("no room in the pci windows for {size_bytes:#x} bytes behind the bridge {devfn}")]
    NoRoomBehind {
        /// Where the bridge is.
        devfn: Devfn,
        /// The size of its window.
        size_bytes: u64,
    },
    /// All bus numbers are in use or reserved.
    #[error("no bus number is left for {name} at pci address {devfn}: the last one is {last_bus}")]
    NoBusNumber {
        /// The bridge.
        name: String,
        /// Where it is.
        devfn: Devfn,
        /// The highest number there is.
        last_bus: u8,
    },
    /// Physical slot numbers have 13 bits.
    #[error("{name}: slot number {slot_number}: 0 to 8191 are possible")]
    SlotNumber {
        /// The port.
        name: String,
        /// The number asked for.
        slot_number: u16,
    },
    /// An error can't be injected into a function that cannot report it.
    #[error("{0} has no advanced error reporting, or there is no such function")]
    NoErrorReporting(String),
    /// The memory map refused a BAR.
    #[error("{name}: {source}")]
    Memory {
        /// The device.
        name: String,
        /// Why.
        #[source]
        source: ebbtide_memory::Error,
    },
    /// The function has an I/O BAR, the bus forwards no ports.
    #[error("{name} needs i/o ports: this pci bus has none")]
    NoIoSpace {
        /// The device.
        name: String,
    },
    /// The function has an interrupt pin, the bus no wires.
    #[error("{name} needs an interrupt wire (INTx): this pci bus has none")]
    NoIntx {
        /// The device.
        name: String,
    },
    /// No interrupt route.
    #[error(transparent)]
    Irq(#[from] crate::irq::IrqError),
}

/// A function the caller may use although others can close it: the lease is held as long as this lives.
struct Entered {
    // Dropped first: after the lease is gone the owner may rely on being the last one to hold the function.
    function: Arc<dyn Function>,
    _lease: ebbtide_gate::Lease,
}
