// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bridges there are: ports of PCI Express and bridges to conventional PCI.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ebbtide_gate::{Entry, Gate, Lease};

use super::express::{
    ExpressType, LINK_ACTIVE, LINK_STATUS, SLOT_CONTROL, SLOT_STATUS, SlotCapabilities,
};
use super::hotplug::{EjectSink, HotplugError, HotplugSlot, Removal, SlotAddress, SlotState};
use super::registers::touches;
use super::slot::{Controller, Effects};
use super::{
    Bridge, Bus, BusKind, Config, ErrorSeverity, Function, HostBridge, Ids, Msix, MsixVector,
    PciError, Reservation,
};
use crate::irq::MsiController;

const CLASS_BRIDGE: u32 = 0x06_04_00;
/// The BAR with the MSI-X table of a port.
const MSIX_BAR: u8 = 0;
/// The slot of a link.
const LINK_SLOT: u8 = 0;

/// A model of bridge. Names and ids are those guests and tools know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PortModel {
    /// A root port without a history.
    RootPort,
    /// A root port of Intel's 5520 I/O hub.
    Ioh3420,
    /// The upstream port of TI's XIO3130 switch.
    X3130Upstream,
    /// A downstream port of that switch.
    Xio3130Downstream,
    /// A bridge to conventional PCI without a history.
    PciBridge,
    /// The bridge to conventional PCI of Intel's ICH9.
    I82801b11,
}

impl PortModel {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::RootPort,
        Self::Ioh3420,
        Self::X3130Upstream,
        Self::Xio3130Downstream,
        Self::PciBridge,
        Self::I82801b11,
    ];

    /// The name of the driver, as `device_add` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::RootPort => "pcie-root-port",
            Self::Ioh3420 => "ioh3420",
            Self::X3130Upstream => "x3130-upstream",
            Self::Xio3130Downstream => "xio3130-downstream",
            Self::PciBridge => "pci-bridge",
            Self::I82801b11 => "i82801b11-bridge",
        }
    }

    /// The model of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|model| model.name() == name)
    }

    /// Whether it has a slot whose device can come and go.
    pub fn has_slot(self) -> bool {
        self.bus_kind() == BusKind::Link
    }

    fn ids(self) -> Ids {
        let (vendor, device, revision) = match self {
            Self::RootPort => (0x1b36, 0x000c, 0),
            Self::Ioh3420 => (0x8086, 0x3420, 2),
            Self::X3130Upstream => (0x104c, 0x8232, 2),
            Self::Xio3130Downstream => (0x104c, 0x8233, 1),
            Self::PciBridge => (0x1b36, 0x0001, 0),
            Self::I82801b11 => (0x8086, 0x244e, 0x92),
        };
        Ids {
            vendor,
            device,
            revision,
            class: CLASS_BRIDGE,
            subsystem_vendor: 0,
            subsystem: 0,
        }
    }

    /// What it is in the PCI Express hierarchy, if anything.
    fn express(self) -> Option<ExpressType> {
        match self {
            Self::RootPort | Self::Ioh3420 => Some(ExpressType::RootPort),
            Self::X3130Upstream => Some(ExpressType::Upstream),
            Self::Xio3130Downstream => Some(ExpressType::Downstream),
            Self::PciBridge | Self::I82801b11 => None,
        }
    }

    fn bus_kind(self) -> BusKind {
        match self {
            Self::RootPort | Self::Ioh3420 | Self::Xio3130Downstream => BusKind::Link,
            Self::X3130Upstream => BusKind::Switch,
            Self::PciBridge | Self::I82801b11 => BusKind::Conventional,
        }
    }

    /// Whether it can be on a bus of this kind.
    fn fits(self, kind: BusKind) -> bool {
        match self {
            Self::RootPort | Self::Ioh3420 | Self::I82801b11 => kind == BusKind::Root,
            Self::X3130Upstream => kind == BusKind::Link,
            Self::Xio3130Downstream => kind == BusKind::Switch,
            Self::PciBridge => kind != BusKind::Switch,
        }
    }
}

/// What a port is made from.
pub struct PortSpec {
    /// Its id, which is also the name of the bus behind it.
    pub name: String,
    /// The model.
    pub model: PortModel,
    /// Physical slot number, 0 to 8191: a guest names the slot by it, so no two ports should have the same.
    pub slot_number: u16,
    /// Who is told of ejects; `None` for a slot whose device stays, and of a model without a slot.
    pub hotplug: Option<Arc<dyn EjectSink>>,
    /// What is kept free behind it. `None`: the default for a hot-plug slot, nothing for others.
    pub reservation: Option<Reservation>,
}

/// A bridge of one of the [models](PortModel).
///
/// Its gate guards the registers, also those of the slot. Interrupts, of hot-plug and of errors, are its MSI-X vector 0.
pub struct Port {
    model: PortModel,
    slot_number: u16,
    config: Config,
    bus: Arc<Bus>,
    address: SlotAddress,
    vector: Option<MsixVector>,
    slot: Option<Slot>,
}

/// The hot-plug slot of a port.
struct Slot {
    sink: Arc<dyn EjectSink>,
    /// Where the PCI Express capability is.
    express: u16,
    /// Locked before the configuration space, which mirrors the controller's registers.
    controller: Mutex<Controller>,
}

impl Port {
    /// A port for the hierarchy of `host`, not on a bus yet.
    ///
    /// # Errors
    /// There are no interrupt routes left, or the slot number is above 8191.
    pub fn new(
        host: &HostBridge,
        spec: PortSpec,
        interrupts: &dyn MsiController,
    ) -> Result<Arc<Self>, PciError> {
        let PortSpec {
            name,
            model,
            slot_number,
            hotplug,
            reservation,
        } = spec;
        if slot_number > 0x1fff {
            return Err(PciError::SlotNumber { name, slot_number });
        }
        let hotplug = hotplug.filter(|_| model.has_slot());
        let reservation = reservation.or_else(|| hotplug.is_some().then(Reservation::default));
        let bus = host.bus().behind(&name, model.bus_kind());
        let address = SlotAddress {
            bus: Arc::clone(bus.name()),
            slot: LINK_SLOT,
        };
        let bridge = Bridge::new(Arc::clone(&bus), reservation);
        let mut config = Config::new_bridge(&Gate::new(name), model.ids(), bridge)?;
        let (mut vector, mut slot) = (None, None);
        if let Some(kind) = model.express() {
            let capabilities = model.has_slot().then_some(SlotCapabilities {
                number: slot_number,
                hotplug: hotplug.is_some(),
            });
            let express = config.add_express_port(kind, capabilities)?;
            config.add_error_reporting(kind == ExpressType::RootPort)?;
            if model.has_slot() {
                let msix = Msix::new(1, interrupts)?;
                config.add_msix(MSIX_BAR, &msix)?;
                vector = msix.vector(0);
            }
            slot = hotplug.map(|sink| Slot {
                sink,
                express,
                controller: Mutex::new(Controller::new(false)),
            });
        }
        let port = Self {
            model,
            slot_number,
            config,
            bus,
            address,
            vector,
            slot,
        };
        port.settle();
        Ok(Arc::new(port))
    }

    /// The model.
    pub fn model(&self) -> PortModel {
        self.model
    }

    /// Its physical slot number; None: it has no slot.
    pub fn slot_number(&self) -> Option<u16> {
        self.model.has_slot().then_some(self.slot_number)
    }

    /// The bus behind it.
    pub fn bus(&self) -> &Arc<Bus> {
        &self.bus
    }

    /// Its slot, if what is in it can come and go.
    pub fn slot(self: &Arc<Self>) -> Option<Arc<dyn HotplugSlot>> {
        self.slot
            .is_some()
            .then(|| Arc::clone(self) as Arc<dyn HotplugSlot>)
    }

    /// Does a step of the controller, shows the outcome to the guest, and does what follows: an eject first, so that the
    /// guest is interrupted only when what it ejected is isolated.
    fn step<T>(&self, slot: &Slot, step: impl FnOnce(&mut Controller) -> (T, Effects)) -> T {
        let mut controller = slot.controller();
        let (result, effects) = step(&mut controller);
        slot.show(&controller, &self.config);
        drop(controller);
        if effects.eject {
            slot.sink.eject(&self.address);
        }
        if effects.interrupt {
            self.interrupt();
        }
        result
    }

    fn interrupt(&self) {
        if let Some(vector) = &self.vector {
            vector.signal();
        }
    }

    /// The slot, from the control thread, with a lease on the port.
    fn enter(&self) -> Result<(&Slot, Lease), HotplugError> {
        let slot = self.slot.as_ref().ok_or(HotplugError::NotHotpluggable)?;
        let lease = self.config.gate().enter(Entry::Io);
        Ok((slot, lease.ok_or(HotplugError::PortRemoved)?))
    }

    fn act(&self, action: impl FnOnce(&mut Controller) -> Effects) {
        if let Ok((slot, _lease)) = self.enter() {
            self.step(slot, |controller| ((), action(controller)));
        }
    }

    /// A message has come as far as it goes. Always false: nothing goes on from a root port.
    fn receive_at_root(&self, severity: ErrorSeverity, requester: u16) -> bool {
        if self.config.receive_at_root(severity, requester) {
            self.interrupt();
        }
        false
    }

    /// Power-on state of the slot, with what is in it now.
    fn power_on(&self) {
        let present = self.bus.is_occupied(LINK_SLOT);
        if let Some(slot) = &self.slot {
            let mut controller = slot.controller();
            *controller = Controller::new(present);
            slot.show(&controller, &self.config);
        } else if let (true, Some(express)) = (self.model.has_slot(), self.config.express) {
            // Without a controller there is nothing to command, but presence and link are visible.
            let controller = Controller::new(present);
            self.config
                .set(express + SLOT_STATUS, &controller.status().to_le_bytes());
            show_link(&self.config, express, controller.link_active());
        }
    }

    /// A guest's write to slot control and status, which are one dword.
    fn write_slot(&self, slot: &Slot, offset: u16, size: u8, value: u32) {
        let first = slot.express + SLOT_CONTROL;
        let bytes = value.to_le_bytes().into_iter().take(size.into());
        let written: Vec<(usize, u8)> = bytes
            .enumerate()
            .filter_map(|(at, byte)| {
                let at = usize::from(offset) + at;
                Some((at.checked_sub(first.into())?, byte))
            })
            .collect();
        self.step(slot, |controller| {
            let mut control = controller.control().to_le_bytes();
            let mut status = [0; 2];
            for (at, byte) in &written {
                let target = control.iter_mut().chain(&mut status).nth(*at);
                if let Some(target) = target {
                    *target = *byte;
                }
            }
            // Events are cleared first: the command's own completion is a new one.
            let cleared = controller.write_status(u16::from_le_bytes(status));
            let commanded = match written.iter().any(|(at, _)| *at < control.len()) {
                true => controller.write_control(u16::from_le_bytes(control)),
                false => Effects::default(),
            };
            ((), cleared.and(commanded))
        });
    }
}

impl Slot {
    fn controller(&self) -> MutexGuard<'_, Controller> {
        self.controller
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the registers say what the controller says.
    fn show(&self, controller: &Controller, config: &Config) {
        let [a, b] = controller.control().to_le_bytes();
        let [c, d] = controller.status().to_le_bytes();
        config.set(self.express + SLOT_CONTROL, &[a, b, c, d]);
        show_link(config, self.express, controller.link_active());
    }
}

fn show_link(config: &Config, express: u16, active: bool) {
    config.change(|registers| {
        let was = registers.read_u16(express + LINK_STATUS) & !LINK_ACTIVE;
        let is = was | if active { LINK_ACTIVE } else { 0 };
        registers.set(express + LINK_STATUS, &is.to_le_bytes());
    });
}

impl Function for Port {
    fn config(&self) -> &Config {
        &self.config
    }

    fn write_config(&self, offset: u16, size: u8, value: u32) {
        match &self.slot {
            Some(slot) if touches(offset, size, slot.express + SLOT_CONTROL, 4) => {
                self.write_slot(slot, offset, size, value);
            }
            _ => self.config.write(offset, size, value),
        }
    }

    fn reset(&self) {
        self.config.reset();
        self.power_on();
    }

    fn settle(&self) {
        self.power_on();
    }

    fn reach_behind(&self) {
        if let Some(slot) = &self.slot {
            let mut controller = slot.controller();
            if controller.reach() {
                slot.show(&controller, &self.config);
            }
        }
    }

    fn fits(&self, kind: BusKind) -> bool {
        self.model.fits(kind)
    }

    fn receive_own_error(&self, severity: ErrorSeverity, requester: u16) -> bool {
        match self.model.express() {
            Some(ExpressType::RootPort) => self.receive_at_root(severity, requester),
            _ => true,
        }
    }

    fn receive_error(&self, severity: ErrorSeverity, requester: u16) -> bool {
        if !self.config.forwards_errors() {
            return false;
        }
        match self.model.express() {
            Some(ExpressType::RootPort) => self.receive_at_root(severity, requester),
            Some(_) => true,
            // Conventional PCI has no messages.
            None => false,
        }
    }
}

impl HotplugSlot for Port {
    fn address(&self) -> &SlotAddress {
        &self.address
    }

    fn plugged(&self) {
        let state = self.state();
        if !state.occupied || state.ejected {
            self.bus.settle(LINK_SLOT);
        }
        self.act(Controller::plug);
    }

    fn request_removal(&self) -> Result<Removal, HotplugError> {
        let (slot, _lease) = self.enter()?;
        self.step(slot, Controller::request)
    }

    fn cancel(&self) {
        self.act(Controller::cancel);
    }

    fn detached(&self) {
        self.act(Controller::detach);
    }

    fn state(&self) -> SlotState {
        match &self.slot {
            Some(slot) => slot.controller().state(),
            None => Controller::new(self.bus.is_occupied(LINK_SLOT)).state(),
        }
    }
}
