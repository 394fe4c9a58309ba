// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! INTx: the interrupt pins of functions that have no messages (PCI 3.0, 2.2.6 and 6.2.4).
//!
//! ```text
//! device ── InterruptPin::set ──▶ InterruptPin ── INTX_DISABLE ──▶ shared input (wired or) ──▶ IrqLine
//!                                     └─▶ STATUS, bit 3
//! ```
//!
//! A pin is a level. Several functions share an input of the interrupt controller, which is high as long as one of them
//! asserts; the guest's driver makes its device let go, and whoever is left keeps the input high. Which input a pin
//! leads to follows from slot and pin alone, so that the tables can say it before anything is plugged.
//!
//! Locks: a pin, then its input; nothing is taken below them but what the line itself takes.

use std::sync::Arc;

use ebbtide_models::seeded;

use super::Devfn;
use crate::irq::IrqLine;
use crate::sync::{Mutex, lock};

/// Pins a function can have.
pub const PINS: u8 = 4;

/// Which of its slot's four pins a function drives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum IntxPin {
    /// INTA#, the only one for a function that is alone in its slot.
    A = 0,
    /// INTB#.
    B = 1,
    /// INTC#.
    C = 2,
    /// INTD#.
    D = 3,
}

impl IntxPin {
    /// All of them, in order.
    pub const ALL: [IntxPin; PINS as usize] = [Self::A, Self::B, Self::C, Self::D];
}

/// The wire that `pin` of `slot` is on, of a bus that has `wires` of them: neighbours use different ones, and with four
/// it is what every guest expects behind a bridge (PCI-to-PCI Bridge Architecture 1.2, 9.1).
pub(crate) fn wire(slot: u8, pin: IntxPin, wires: usize) -> usize {
    (usize::from(slot) + pin as usize) % wires.max(1)
}

/// An input of the interrupt controller that several functions drive.
struct Input {
    gsi: u32,
    line: Arc<dyn IrqLine>,
    asserting: Mutex<u32>,
}

impl Input {
    /// Counts one more or one less that asserts. The line is driven under the lock: a level that is decided by one
    /// thread and set by it after another's would stay wrong for ever.
    fn drive(&self, assert: bool) {
        let mut asserting = lock(&self.asserting);
        let before = *asserting;
        *asserting = match assert {
            true => before.saturating_add(1),
            false => before.saturating_sub(1),
        };
        let high = *asserting > 0;
        if seeded!("intx_level_unlocked") {
            drop(asserting);
        }
        if high != (before > 0) {
            self.line.set(high);
        }
    }
}

/// The interrupt wires of one bus.
#[derive(Clone)]
pub struct IntxWires(Arc<[Arc<Input>]>);

impl IntxWires {
    /// The wires of a root bus: inputs of the interrupt controller by number (GSI), level-triggered, for nobody else's
    /// use. `None` without any.
    pub fn new(inputs: impl IntoIterator<Item = (u32, Arc<dyn IrqLine>)>) -> Option<Self> {
        let input = |(gsi, line)| {
            Arc::new(Input {
                gsi,
                line,
                asserting: Mutex::new(0),
            })
        };
        let wires: Arc<[_]> = inputs.into_iter().map(input).collect();
        (!wires.is_empty()).then_some(Self(wires))
    }

    /// The wires of the bus behind the bridge in `slot`: its four pins.
    pub fn behind(&self, slot: u8) -> Self {
        let wires = IntxPin::ALL
            .into_iter()
            .filter_map(|pin| self.input(slot, pin));
        Self(wires.cloned().collect())
    }

    /// The interrupt controller's input that `pin` of `slot` leads to.
    pub fn gsi(&self, slot: u8, pin: IntxPin) -> u32 {
        self.input(slot, pin).map_or(0, |input| input.gsi)
    }

    /// There is one: a bus has at least one wire.
    fn input(&self, slot: u8, pin: IntxPin) -> Option<&Arc<Input>> {
        self.0.get(wire(slot, pin, self.0.len()))
    }
}

/// The interrupt pin of a function. High is asserted, whatever the polarity of the wire.
///
/// The device drives it as the level of its interrupt condition, from any thread; nothing happens while the guest has
/// set INTX_DISABLE, or while the function is on no bus. Dropping it lets go.
pub struct InterruptPin {
    pin: IntxPin,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    asserted: bool,
    disabled: bool,
    input: Option<Arc<Input>>,
}

impl State {
    fn drives(&self) -> Option<&Arc<Input>> {
        self.input
            .as_ref()
            .filter(|_| self.asserted && !self.disabled)
    }
}

impl InterruptPin {
    /// A pin that is on no wire and not asserted.
    pub fn new(pin: IntxPin) -> Arc<Self> {
        Arc::new(Self {
            pin,
            state: Mutex::default(),
        })
    }

    /// The value of the Interrupt Pin register.
    pub(super) fn register(&self) -> u8 {
        self.pin as u8 + 1
    }

    /// Whether the device asserts it: the Interrupt Status bit, which INTX_DISABLE does not change.
    pub fn is_asserted(&self) -> bool {
        lock(&self.state).asserted
    }

    /// What the guest wrote to INTX_DISABLE.
    pub(super) fn set_disabled(&self, disabled: bool) {
        self.change(|state| state.disabled = disabled);
    }

    /// Puts it on the wire of its place on a bus. Returns the interrupt controller's input.
    pub(super) fn connect(&self, wires: &IntxWires, devfn: Devfn) -> u32 {
        self.change(|state| state.input = wires.input(devfn.slot(), self.pin).cloned());
        wires.gsi(devfn.slot(), self.pin)
    }

    /// Takes it off the wire for good: what the device still drives reaches nobody.
    pub(super) fn disconnect(&self) {
        self.change(|state| state.input = None);
    }

    /// A new input is raised before the old one is let go: they may be the same.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = lock(&self.state);
        let before = state.drives().cloned();
        change(&mut state);
        let after = state.drives().cloned();
        let same = match (&before, &after) {
            (Some(before), Some(after)) => Arc::ptr_eq(before, after),
            (before, after) => before.is_none() && after.is_none(),
        };
        if same {
            return;
        }
        // Otherwise kept to the end: two changes reach the wire in the order in which they were made.
        if seeded!("intx_pin_unlocked") {
            drop(state);
        }
        if let Some(input) = after {
            input.drive(true);
        }
        if let Some(input) = before {
            input.drive(false);
        }
    }
}

impl IrqLine for InterruptPin {
    fn set(&self, high: bool) {
        self.change(|state| state.asserted = high);
    }
}

impl Drop for InterruptPin {
    fn drop(&mut self) {
        self.disconnect();
    }
}

/// What the models need of a bus: two pins on one wire.
#[cfg(loom)]
#[doc(hidden)]
pub fn pins_on_one_wire(line: Arc<dyn IrqLine>) -> [Arc<InterruptPin>; 2] {
    let wires = IntxWires::new([(16, line)]);
    [0, 1].map(|slot| {
        let pin = InterruptPin::new(IntxPin::A);
        if let (Some(wires), Some(devfn)) = (&wires, Devfn::new(slot, 0)) {
            pin.connect(wires, devfn);
        }
        pin
    })
}

/// What a guest does to a pin.
#[cfg(loom)]
#[doc(hidden)]
pub fn set_intx_disable(pin: &InterruptPin, disabled: bool) {
    pin.set_disabled(disabled);
}

#[cfg(all(test, not(loom)))]
mod tests;
