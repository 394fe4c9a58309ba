// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Slots whose functions come and go while the guest runs: what the control thread and the hot-plug hardware say to each
//! other. The hardware is a PCI Express port ([`Port`](super::Port)) or, for bus 0, the ACPI registers
//! ([`PciHotplug`](crate::acpi::PciHotplug)); neither knows what a device's life is.
//!
//! ```text
//! control                    slot                       guest
//! attach, plugged() ───────▶ presence, interrupt ─────▶ finds it, uses it
//! request_removal() ───────▶ button, interrupt ───────▶ lets go of it
//!         EjectSink::eject ◀─ power off, or _EJ0 ◀───── (on the vCPU's thread)
//! drain, detach_at, detached() ─▶ empty, interrupt ───▶ sees the slot empty
//! ```
//!
//! An eject that is not wanted is answered with [`plugged`](HotplugSlot::plugged): to the guest something new is in the
//! slot then.

use std::fmt;
use std::sync::Arc;

/// A slot of a bus, whatever number the guest gave the bus.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotAddress {
    /// The bus's name: that of the bridge it is behind, or the root's.
    pub bus: Arc<str>,
    /// The slot.
    pub slot: u8,
}

impl fmt::Display for SlotAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} slot {}", self.bus, self.slot)
    }
}

/// Who is told that the guest has let go of what is in a slot.
pub trait EjectSink: Send + Sync {
    /// On the vCPU's thread, in the write that ejects: closes gates, posts a message, returns at once. No lock of a slot is
    /// held. The guest may eject what it was not asked for.
    fn eject(&self, slot: &SlotAddress);
}

/// A hot-plug slot, for the control thread. No method blocks or waits for the guest.
pub trait HotplugSlot: Send + Sync {
    /// Which one it is.
    fn address(&self) -> &SlotAddress;

    /// Tells the guest that the function that was attached is there, with everything behind it. Without effect when the guest knows already; takes
    /// back an eject that is not wanted and a request.
    fn plugged(&self);

    /// Asks the guest to let go of what is in the slot. May be repeated: a guest that was not listening yet has missed the
    /// first time.
    ///
    /// # Errors
    /// [`HotplugError`]; nothing was asked.
    fn request_removal(&self) -> Result<Removal, HotplugError>;

    /// Takes the request back as far as the hardware can; an eject may come nevertheless.
    fn cancel(&self);

    /// Tells the guest that the slot is empty. What was in it has been detached.
    fn detached(&self);

    /// What the slot looks like now.
    fn state(&self) -> SlotState;
}

/// What came of asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// The guest was asked and will eject when it is ready, if it ever is.
    Asked,
    /// The guest does not use what is in the slot: it has ejected it or never turned it on. There is nothing to wait for.
    Unused,
}

/// Why the guest could not be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HotplugError {
    /// It is still turning the slot on or off; asking again would cancel that.
    #[error("the guest is busy with the slot: its power indicator is blinking")]
    GuestBusy,
    /// There is nothing to remove.
    #[error("the slot is empty")]
    Empty,
    /// The port itself is being removed.
    #[error("the port of the slot is being removed")]
    PortRemoved,
    /// The slot is not one whose functions come and go.
    #[error("the slot does not support hot-plug")]
    NotHotpluggable,
}

/// An indicator as the guest has set it (PCIe 5.0, 6.7.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Indicator {
    /// Lit.
    On,
    /// Something is under way.
    Blinking,
    /// Dark.
    Off,
}

/// What a slot looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotState {
    /// Something is in it, as far as the guest can see.
    pub occupied: bool,
    /// The guest was asked to let go and has not answered.
    pub requested: bool,
    /// The guest has let go; it was not detached yet.
    pub ejected: bool,
    /// The guest has turned it on. Always true of ACPI slots, which have no power control.
    pub powered: bool,
    /// The power indicator; ACPI slots have none, it is on.
    pub power_indicator: Indicator,
}

impl SlotState {
    /// Whether the guest is turning the slot on or off right now.
    pub fn guest_is_busy(&self) -> bool {
        self.power_indicator == Indicator::Blinking
    }
}
