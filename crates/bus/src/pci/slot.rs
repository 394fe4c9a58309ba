// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The hot-plug controller of a port (PCIe 5.0, 6.7): slot control and slot status as a state machine without a device,
//! a guest or a thread around it.
//!
//! ```text
//!            plug                        guest: power on
//!   Empty ──────────▶ Present, unpowered ───────────────▶ In use ◀──┐ plug (the eject is not wanted)
//!     ▲                      │                              │       │
//!     │ detach               │ detach           guest: power off,   │
//!     │                      ▼                  indicator off       │
//!     └──────────────────────┴───────── Ejected ◀──────────┘────────┘
//! ```
//!
//! Linux answers the attention button by blinking the power indicator for five seconds, in which a second press cancels.
//! Between its taking note of the press and its blinking another press would be the same one, or a second one: so there
//! is none. Who wants the device back then has the button pressed again when the guest blinks.
//! It then removes the device, cuts the power, waits a second and turns the indicator off: that last write is the eject.
//! Link and presence changes within that second are dropped by it. After it, a change while presence or link is still
//! there means *something new* to it, so between eject and detach the link goes down without an event; that event comes
//! with the detach, when both are gone.
//!
//! As long as no driver listens (hot-plug interrupts are off), the slot takes the part of firmware: what is plugged stays
//! off until somebody looks behind the port, which is an operating system's scan of the buses and turns it on. A driver
//! that starts later finds on what the scan has found, as it expects, and off what came after the scan, which it then turns
//! on itself.

use super::hotplug::{HotplugError, Indicator, Removal, SlotState};

/// Slot control (7.5.3.10).
mod control {
    pub const ATTENTION_INDICATOR: u16 = 3 << 6;
    pub const POWER_INDICATOR: u16 = 3 << 8;
    /// Set: off.
    pub const POWER_OFF: u16 = 1 << 10;
    pub const HOTPLUG_INTERRUPT: u16 = 1 << 5;
    pub const LINK_CHANGED_ENABLE: u16 = 1 << 12;
    /// The enables of the events at the same bits of the status.
    pub const EVENT_ENABLES: u16 = 0x1f;
    /// Everything but the interlock, which is not there.
    pub const WRITABLE: u16 = EVENT_ENABLES
        | HOTPLUG_INTERRUPT
        | ATTENTION_INDICATOR
        | POWER_INDICATOR
        | POWER_OFF
        | LINK_CHANGED_ENABLE;
}

/// Slot status (7.5.3.11).
mod status {
    pub const BUTTON_PRESSED: u16 = 1;
    pub const PRESENCE_CHANGED: u16 = 1 << 3;
    pub const COMMAND_COMPLETED: u16 = 1 << 4;
    pub const PRESENT: u16 = 1 << 6;
    pub const LINK_CHANGED: u16 = 1 << 8;
    /// What a guest clears by writing ones. Power faults and latches do not occur; their bits stay clear.
    pub const EVENTS: u16 = BUTTON_PRESSED | PRESENCE_CHANGED | COMMAND_COMPLETED | LINK_CHANGED;
}

/// The indicators' encoding, at either field.
const ON: u16 = 1;
const BLINK: u16 = 2;
const OFF: u16 = 3;

/// What is on or off with the slot.
const POWER: u16 = control::POWER_OFF | control::POWER_INDICATOR;

/// These bits of a slot that is on, or off.
fn power(on: bool) -> u16 {
    if on {
        ON << 8
    } else {
        OFF << 8 | control::POWER_OFF
    }
}

/// What a step makes the port do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub(super) struct Effects {
    /// Send the hot-plug message.
    pub(super) interrupt: bool,
    /// The guest has let go of what is in the slot.
    pub(super) eject: bool,
}

impl Effects {
    /// Of this step and the next one.
    pub(super) fn and(self, next: Self) -> Self {
        Self {
            interrupt: self.interrupt || next.interrupt,
            eject: self.eject || next.eject,
        }
    }
}

/// A hot-plug controller.
#[derive(Clone, Debug)]
pub(super) struct Controller {
    control: u16,
    events: u16,
    present: bool,
    link: bool,
    ejected: bool,
    requested: bool,
    /// A driver has cleared the press and does not blink yet.
    heard: bool,
    /// The press that is on its way is to be taken back by another, as soon as the guest blinks.
    withdrawn: bool,
    /// Whether the condition of the interrupt held after the last step: a message is sent when it becomes true (6.7.3.4).
    asserted: bool,
}

impl Controller {
    /// At power-on, with or without something in the slot.
    pub(super) fn new(present: bool) -> Self {
        Self {
            control: OFF << 6 | power(present),
            events: 0,
            present,
            link: present,
            ejected: false,
            requested: false,
            heard: false,
            withdrawn: false,
            asserted: false,
        }
    }

    /// The slot control register.
    pub(super) fn control(&self) -> u16 {
        self.control
    }

    /// The slot status register.
    pub(super) fn status(&self) -> u16 {
        let present = if self.present { status::PRESENT } else { 0 };
        self.events | present
    }

    /// Data link layer link active, of the link status.
    pub(super) fn link_active(&self) -> bool {
        self.link
    }

    /// A guest's write of slot control: a command, completed at once.
    pub(super) fn write_control(&mut self, value: u16) -> Effects {
        let was_off = self.is_off();
        let mut next = value & control::WRITABLE;
        // An indicator has no state 0: what is written so keeps what it had.
        for field in [control::ATTENTION_INDICATOR, control::POWER_INDICATOR] {
            if next & field == 0 {
                next |= self.control & field;
            }
        }
        self.control = next;
        self.events |= status::COMMAND_COMPLETED;
        self.heard &= self.has_driver() && self.power_indicator() == Indicator::On;
        if !self.has_driver() && std::mem::take(&mut self.withdrawn) {
            self.events &= !status::BUTTON_PRESSED;
        }
        let eject = self.present && !self.ejected && self.is_off() && !was_off;
        if eject {
            self.ejected = true;
            self.requested = false;
            self.withdrawn = false;
            self.link = false;
        }
        self.press_again();
        self.settle(eject)
    }

    /// A guest's write of slot status: ones clear events.
    pub(super) fn write_status(&mut self, value: u16) -> Effects {
        let cleared = self.events & value;
        self.events &= !(value & status::EVENTS);
        // A driver that starts clears what it has not looked at, before it turns its interrupts on.
        if cleared & status::BUTTON_PRESSED != 0 {
            self.heard = self.has_driver() && self.power_indicator() == Indicator::On;
        }
        let settled = self.settle(false);
        self.press_again();
        settled.and(self.settle(false))
    }

    /// Presses the button for a request that was taken back before the guest blinked.
    fn press_again(&mut self) {
        let is_answered = self.events & status::BUTTON_PRESSED == 0
            && self.power_indicator() == Indicator::Blinking;
        if self.withdrawn && is_answered {
            self.withdrawn = false;
            self.events |= status::BUTTON_PRESSED;
        }
    }

    /// Something is in the slot, or the guest's eject of it is not wanted.
    pub(super) fn plug(&mut self) -> Effects {
        let is_new = !self.present || self.ejected;
        if is_new && !self.has_driver() {
            self.control = self.control & !POWER | power(false);
        }
        self.forget_request();
        if is_new {
            self.events |= status::PRESENCE_CHANGED;
            if !self.link {
                self.events |= status::LINK_CHANGED;
            }
        }
        (self.present, self.link, self.ejected) = (true, true, false);
        self.settle(false)
    }

    /// A configuration request goes through the port to what is in the slot. Returns whether that changed anything.
    pub(super) fn reach(&mut self) -> bool {
        let turn_on = self.present && !self.ejected && !self.has_driver() && self.is_off();
        if turn_on {
            self.control = self.control & !POWER | power(true);
        }
        turn_on
    }

    /// Presses the attention button, unless that would say something else than "remove".
    pub(super) fn request(&mut self) -> (Result<Removal, HotplugError>, Effects) {
        if !self.present {
            return (Err(HotplugError::Empty), Effects::default());
        }
        // The button would turn on what is off.
        if self.ejected || self.is_off() {
            return (Ok(Removal::Unused), Effects::default());
        }
        if self.power_indicator() == Indicator::Blinking {
            return (Err(HotplugError::GuestBusy), Effects::default());
        }
        self.requested = true;
        self.withdrawn = false;
        if !self.heard {
            self.events |= status::BUTTON_PRESSED;
        }
        (Ok(Removal::Asked), self.settle(false))
    }

    /// Takes the request back. A press that nobody listens for is forgotten. One that a driver may have read is followed by
    /// another, once it has made the guest blink.
    pub(super) fn cancel(&mut self) -> Effects {
        if !std::mem::take(&mut self.requested) {
            return Effects::default();
        }
        let is_pressed = self.events & status::BUTTON_PRESSED != 0;
        if is_pressed && !self.has_driver() {
            self.events &= !status::BUTTON_PRESSED;
        } else {
            self.withdrawn =
                is_pressed || self.heard || self.power_indicator() == Indicator::Blinking;
            self.press_again();
        }
        self.settle(false)
    }

    /// Nothing is asked for any more, and nobody is to hear that it was.
    fn forget_request(&mut self) {
        self.events &= !status::BUTTON_PRESSED;
        (self.requested, self.heard, self.withdrawn) = (false, false, false);
    }

    /// The slot is empty, whether the guest had let go or not.
    pub(super) fn detach(&mut self) -> Effects {
        if self.present {
            self.events |= status::PRESENCE_CHANGED | status::LINK_CHANGED;
        }
        // A press that is seen on an empty slot would be a wish to turn it on.
        self.forget_request();
        (self.present, self.link, self.ejected) = (false, false, false);
        self.settle(false)
    }

    /// What it looks like.
    pub(super) fn state(&self) -> SlotState {
        SlotState {
            occupied: self.present,
            requested: self.requested,
            ejected: self.ejected,
            powered: self.control & control::POWER_OFF == 0,
            power_indicator: self.power_indicator(),
        }
    }

    fn power_indicator(&self) -> Indicator {
        match self.control >> 8 & 3 {
            ON => Indicator::On,
            BLINK => Indicator::Blinking,
            _ => Indicator::Off,
        }
    }

    /// Whether the guest has a driver that listens.
    fn has_driver(&self) -> bool {
        self.control & control::HOTPLUG_INTERRUPT != 0
    }

    /// Power and power indicator are off: the guest does not use what is in the slot.
    fn is_off(&self) -> bool {
        self.control & control::POWER_OFF != 0 && self.power_indicator() == Indicator::Off
    }

    fn settle(&mut self, eject: bool) -> Effects {
        let mut enabled = self.control & control::EVENT_ENABLES;
        if self.control & control::LINK_CHANGED_ENABLE != 0 {
            enabled |= status::LINK_CHANGED;
        }
        let asserted = self.control & control::HOTPLUG_INTERRUPT != 0 && self.events & enabled != 0;
        let was_asserted = std::mem::replace(&mut self.asserted, asserted);
        Effects {
            interrupt: asserted && !was_asserted,
            eject,
        }
    }
}

#[cfg(test)]
mod tests;
