// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Instance numbers of devices on bus 0, which the guest reads through ACPI (PCI Firmware 3.3, 4.6.7) and names cards
//! after: `acpi-index=7` makes `eno7` of one in whatever slot it is.

use ebbtide_device::Node;
use ebbtide_qmp::{Properties, QmpError};

use super::{Devices, Info, Place, Site};

/// The property of every device on PCI that gives it one; 0 is none.
pub(super) const PROPERTY: &str = "acpi-index";

/// The largest: what network names are made of has 14 bits.
const MAX: u32 = (1 << 14) - 1;

impl Devices {
    /// Takes the property of a device that comes to `place`.
    ///
    /// # Errors
    /// The number is too large or another device's, or the place has no device in ACPI that could tell it.
    pub(super) fn take_instance(
        &self,
        place: &mut Place,
        properties: &mut Properties,
    ) -> Result<(), QmpError> {
        let Some(number) = properties
            .take_uint::<u32>(PROPERTY)?
            .filter(|number| *number != 0)
        else {
            return Ok(());
        };
        let refused = |why: String| {
            QmpError::generic(format!(
                "Parameter '{PROPERTY}' does not accept value '{number}': {why}"
            ))
        };
        if number > MAX {
            return Err(refused(format!("the largest is {MAX}")));
        }
        let Some(slots) = self.root_slots.get().filter(|_| place.parent.is_none()) else {
            let bus = place.bus.name();
            return Err(refused(format!(
                "bus '{bus}' has no slots of ACPI, which only bus 0 has"
            )));
        };
        if let Some(slot) = slots.slot_of_index(number) {
            return Err(refused(format!(
                "the device in slot {slot:#x} of bus 0 has it"
            )));
        }
        place.instance = Some(number);
        Ok(())
    }

    /// The number of a device.
    pub(crate) fn instance(&self, node: &Node<Info>) -> Option<u32> {
        let slots = self.root_slots.get()?;
        match &node.info.site {
            Site::Pci { at, .. } if node.parent().is_none() => slots.index(at.slot()),
            _ => None,
        }
    }

    /// Has the guest find the number of `place`. It is gone with the device.
    pub(super) fn set_instance(&self, place: &Place) {
        if let (Some(slots), Some(number)) = (self.root_slots.get(), place.instance) {
            slots.set_index(place.at.slot(), number);
        }
    }
}
