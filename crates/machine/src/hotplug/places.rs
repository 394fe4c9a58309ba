// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where a device goes: its bus, its slot there, and what tells the guest of it.

use std::collections::BTreeSet;
use std::sync::Arc;

use ebbtide_bus::pci::{Bus, BusKind, Devfn, HotplugSlot, PciError};
use ebbtide_device::{NodeId, Phase};
use ebbtide_qmp::{Properties, QmpError};

use super::{Devices, Driver, Site};

/// The slots of bus 0 have the numbers below this.
const SLOTS_OF_BUS_0: u16 = 32;

/// The only slot behind a port.
const LINK_SLOT: Devfn = Devfn::from_bits(0);

/// A free place.
#[derive(Clone)]
pub(crate) struct Place {
    /// The bus.
    pub(crate) bus: Arc<Bus>,
    /// Where on it.
    pub(crate) at: Devfn,
    /// The bridge the bus is behind; None for bus 0.
    pub(crate) parent: Option<NodeId>,
    /// Its slot, where what is in it can come and go.
    pub(crate) slot: Option<Arc<dyn HotplugSlot>>,
    /// The instance number of what comes there.
    pub(crate) instance: Option<u32>,
}

impl Devices {
    /// The place that `bus` and the property `addr` name; the first free one where they leave it open.
    ///
    /// # Errors
    /// No such bus, it is going, it does not take hot-plug (unless the device is `cold`), the slot is occupied.
    pub(crate) fn place(
        &self,
        driver: &Driver,
        bus: Option<&str>,
        properties: &mut Properties,
        cold: bool,
    ) -> Result<Place, QmpError> {
        if !cold && !driver.hotpluggable {
            return Err(QmpError::not_hotpluggable(driver.name));
        }
        let address = properties.take_pci_address("addr")?;
        let (bus, parent) = self.find_bus(bus)?;
        let at = match address {
            Some(address) if address.function != 0 => {
                return Err(QmpError::generic(format!(
                    "PCI: function {} of slot {:#x}: devices of several functions are not supported",
                    address.function, address.slot
                )));
            }
            Some(address) => Devfn::new(address.slot, 0)
                .ok_or_else(|| pci_error(&PciError::NoSuchSlot(address.slot)))?,
            // Whoever is in the only slot is named.
            None if bus.kind() == BusKind::Link => LINK_SLOT,
            None => bus.free_slot().ok_or_else(|| {
                QmpError::generic(format!("PCI: no slot available on bus '{}'", bus.name()))
            })?,
        };
        self.check_empty(&bus, at)?;
        let slot = self.slot_at(&bus, parent, at, driver.hotpluggable);
        let out_of_sight = parent.is_some_and(|parent| self.is_out_of_sight(parent));
        if slot.is_none() && !cold && !out_of_sight {
            return Err(QmpError::bus_not_hotpluggable(bus.name()));
        }
        Ok(Place {
            bus,
            at,
            parent,
            slot,
            instance: None,
        })
    }

    /// The bus of this name with the bridge it is behind.
    fn find_bus(&self, name: Option<&str>) -> Result<(Arc<Bus>, Option<NodeId>), QmpError> {
        let root = self.bridge().bus();
        let Some(name) = name.filter(|name| *name != &**root.name()) else {
            return Ok((Arc::clone(root), None));
        };
        let tree = self.tree.borrow();
        for (id, node) in tree.iter() {
            let Some(port) = node
                .info
                .site
                .port()
                .filter(|port| &**port.bus().name() == name)
            else {
                continue;
            };
            if node.phase() >= Phase::Draining {
                return Err(QmpError::generic(format!(
                    "Bus '{name}': its bridge is being removed"
                )));
            }
            return Ok((Arc::clone(port.bus()), Some(id)));
        }
        Err(QmpError::bus_not_found(name))
    }

    /// Whether there is a bus of this name, which may be on its way out.
    pub(crate) fn has_bus(&self, name: &str) -> bool {
        let tree = self.tree.borrow();
        let mut ports = tree.iter().filter_map(|(_, node)| node.info.site.port());
        name == &**self.bridge().bus().name() || ports.any(|port| &**port.bus().name() == name)
    }

    /// What is in a slot has to be gone, not only unreachable.
    fn check_empty(&self, bus: &Arc<Bus>, at: Devfn) -> Result<(), QmpError> {
        if bus.function(at).is_none() {
            return Ok(());
        }
        let tree = self.tree.borrow();
        let mut nodes = tree.iter().map(|(_, node)| node);
        let owner = nodes.find(|node| match &node.info.site {
            Site::Pci {
                bus: its,
                at: there,
                ..
            } => Arc::ptr_eq(its, bus) && *there == at,
            Site::Dimm(_) | Site::Below => false,
        });
        let owner = owner.map_or("the host bridge".to_owned(), |node| {
            let leaving = if node.phase() >= Phase::Draining {
                ", which is being removed"
            } else {
                ""
            };
            format!("'{}'{leaving}", node.identity.name())
        });
        Err(QmpError::generic(format!(
            "PCI: slot {:#x} of bus '{}' is in use by {owner}",
            at.slot(),
            bus.name()
        )))
    }

    /// The hot-plug slot at a place, if there is one and what comes there is `removable`.
    pub(crate) fn slot_at(
        &self,
        bus: &Arc<Bus>,
        parent: Option<NodeId>,
        at: Devfn,
        removable: bool,
    ) -> Option<Arc<dyn HotplugSlot>> {
        let Some(parent) = parent else {
            let slots = self.root_slots.get()?;
            slots.set_removable(at.slot(), removable);
            return slots.slot(at.slot()).filter(|_| removable);
        };
        let tree = self.tree.borrow();
        let port = tree.get(parent)?.info.site.port()?;
        debug_assert!(Arc::ptr_eq(port.bus(), bus));
        port.slot().filter(|_| removable)
    }

    /// The lowest physical slot number no port has, nor a slot of bus 0, which guests name in the same way.
    pub(crate) fn free_slot_number(&self) -> u16 {
        let tree = self.tree.borrow();
        let ports = tree.iter().filter_map(|(_, node)| node.info.site.port());
        let taken: BTreeSet<u16> = ports.filter_map(|port| port.slot_number()).collect();
        (SLOTS_OF_BUS_0..)
            .find(|number| !taken.contains(number))
            .unwrap_or(0)
    }
}

fn pci_error(error: &PciError) -> QmpError {
    QmpError::generic(format!("PCI: {error}"))
}
