// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! When the guest hears of a device.
//!
//! A guest looks at a bridge once, when it is told of it: of what comes onto a bus without hot-plug slots after that, it is
//! not told. So a bridge with such a bus, a switch above all, is put together out of its sight:
//!
//! ```text
//! device_add x3130-upstream,id=sw,bus=rp,x-ebbtide-announce=off    not on the bus, as far as the guest can see
//! device_add xio3130-downstream,id=dp0,bus=sw                      and what is below it neither
//! device_add virtio-blk-pci,id=d0,bus=dp0
//! x-ebbtide-device-announce sw                                     one notice, for all of it
//! device_add virtio-blk-pci,id=d1,bus=dp1                          by the slot of its port, from here on
//! ```

use ebbtide_device::{NodeId, RemoveError};
use ebbtide_qmp::{Properties, QmpError};

use super::requests::refuse;
use super::{Devices, Place, Site, Slot};

/// The property of every device on PCI that says so.
pub(super) const PROPERTY: &str = "x-ebbtide-announce";

/// How the guest hears of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Announced {
    /// It finds it when it starts.
    AtBoot,
    /// It is told when the device is plugged.
    Now,
    /// It is told when management says so, and does not see the device until then.
    Later,
}

/// Takes the property.
///
/// # Errors
/// It is no boolean.
pub(super) fn take(properties: &mut Properties, cold: bool) -> Result<Announced, QmpError> {
    Ok(match (properties.take_bool(PROPERTY)?, cold) {
        (Some(false), _) => Announced::Later,
        (_, true) => Announced::AtBoot,
        (_, false) => Announced::Now,
    })
}

impl Announced {
    /// Whether this can be had at a place.
    ///
    /// # Errors
    /// Nothing there could tell the guest later.
    pub(super) fn check(self, place: &Place) -> Result<(), QmpError> {
        match self {
            Announced::Later if place.slot.is_none() => Err(QmpError::generic(format!(
                "Parameter '{PROPERTY}' does not accept value 'off': bus '{}' has no hot-plug slot that could announce the device later",
                place.bus.name()
            ))),
            _ => Ok(()),
        }
    }
}

impl Devices {
    /// Whether a guest does not see a device yet, because of itself or of something above.
    pub(super) fn is_out_of_sight(&self, node: NodeId) -> bool {
        let tree = self.tree.borrow();
        let above = std::iter::successors(tree.get(node), |node| tree.get(node.parent()?));
        above
            .into_iter()
            .any(|node| node.info.announced == Announced::Later)
    }

    /// Tells the guest of a device that was added out of its sight, with all that is below.
    ///
    /// # Errors
    /// The guest knows it already, or it is being removed.
    pub(crate) fn announce(&self, node: NodeId) -> Result<(), QmpError> {
        let mut tree = self.tree.borrow_mut();
        let Some(entry) = tree.get_mut(node) else {
            return Ok(());
        };
        let name = entry.identity.name().to_owned();
        if entry.model().is_none() {
            return Err(refuse(&RemoveError::Leaving(name)));
        }
        let info = &mut entry.info;
        let (Announced::Later, Site::Pci { bus, at, .. }, Some(Slot::Pci(slot))) =
            (info.announced, &info.site, &info.slot)
        else {
            return Err(QmpError::generic(format!(
                "Device '{name}' was announced already: only what was added with {PROPERTY}=off is announced later"
            )));
        };
        info.announced = Announced::Now;
        bus.show(*at);
        slot.plugged();
        Ok(())
    }

    /// Removes a device that the guest does not see: there is nobody to ask.
    ///
    /// # Errors
    /// It is being removed already.
    pub(super) fn remove_unseen(&self, node: NodeId) -> Result<(), QmpError> {
        let leaving = {
            let tree = self.tree.borrow();
            let entry = tree.get(node).filter(|entry| entry.model().is_none());
            entry.map(|entry| entry.identity.name().to_owned())
        };
        match leaving {
            Some(name) => Err(refuse(&RemoveError::Leaving(name))),
            None => {
                drop(self.remove(node));
                Ok(())
            }
        }
    }
}
