// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From one reset to the next: features, activation, and the reset that ends it.
//!
//! ```text
//!   Idle ──── DRIVER_OK ────▶ Active ──── status 0, quiesce, drop ─────▶ Resetting
//!    ▲  ▲ status 0 │                      (the gate closes)                  │
//!    │  └──────────┘                  │                                      │
//!    │                                └─ close ─▶ Removing ── reset, drained ─┤
//!    └─────────── the gate is drained: registers as at power-on ─────────────┘
//! ```

use std::sync::Arc;

use ebbtide_gate::{Entry, Gate, Handle};
use ebbtide_iothread::{Event, Notifier};
use ebbtide_memory::Ioeventfd;

use super::layout;
use super::registers::Registers;
use super::transport::{State, Transport};
use crate::device::{ActivateError, Activation, ActiveQueue};
use crate::features;
use crate::interrupt::QueueInterrupt;
use crate::removal::Removal;
use crate::reset::Reset;
use crate::status::{self, Session};
use crate::sync::lock;
use crate::virtq::Queue;

/// Whether the device serves queues.
pub(super) enum Phase {
    /// It does not; the driver sets it up.
    Idle,
    /// It does.
    Active(Wires),
    /// It is being removed: it answers what is in its queues and takes nothing else from the driver.
    Removing(Wires),
    /// It must not any more but has requests in flight; the driver waits for the status to read 0.
    Resetting {
        wires: Wires,
        reset: Reset,
        awaited: bool,
    },
}

/// What an activation set up and its reset takes down.
pub(super) struct Wires {
    gate: Arc<Gate>,
    kicks: Vec<(u16, Notifier)>,
    ioeventfds: Vec<Ioeventfd>,
    removals: Vec<Removal>,
}

impl Phase {
    pub(super) fn is_active(&self) -> bool {
        matches!(self, Phase::Active(_))
    }

    /// Whether the activation has ended and has not drained yet, as far as is known.
    pub(super) fn is_ending(&self) -> bool {
        matches!(self, Phase::Removing(_) | Phase::Resetting { .. })
    }

    /// The gate of the activation, if there is one.
    pub(super) fn gate(&self) -> Option<&Arc<Gate>> {
        match self {
            Phase::Idle => None,
            Phase::Active(wires) | Phase::Removing(wires) | Phase::Resetting { wires, .. } => {
                Some(&wires.gate)
            }
        }
    }

    /// Wakes the device for a queue, if it serves that one.
    pub(super) fn kick(&self, queue: u64) {
        let Phase::Active(wires) = self else { return };
        if let Some((_, kick)) = wires
            .kicks
            .iter()
            .find(|(index, _)| u64::from(*index) == queue)
        {
            kick.notify();
        }
    }
}

impl Transport {
    /// The driver writes the status register (2.1, 3.1.1).
    pub(super) fn write_status(&self, state: &mut State, value: u8) {
        if value == 0 {
            self.reset_for_driver(state);
            return;
        }
        let before = self.link.status().get();
        let mut value = value;
        if value & !before & status::FEATURES_OK != 0 && !self.features_are_ok(&state.registers) {
            value &= !status::FEATURES_OK;
        }
        let driver_ok = value & !before & status::DRIVER_OK != 0;
        let ready = (value | before) & status::FEATURES_OK != 0;
        self.link.status().set(value & !status::DRIVER_OK);
        if !driver_ok {
            return;
        }
        if ready && before & status::NEEDS_RESET == 0 {
            self.activate(state);
        } else {
            self.complain(|| format!("DRIVER_OK on status {before:#x}"));
            self.link
                .control(Some(self.link.status().session()))
                .needs_reset();
        }
    }

    /// Whether the driver's choice of features is one that works (2.2.2).
    fn features_are_ok(&self, registers: &Registers) -> bool {
        let chosen = registers.driver_features;
        let offered = self.offered();
        let ok = !registers.driver_features_beyond
            && chosen & !offered == 0
            && chosen & features::VERSION_1 != 0
            && self.device.accept_features(chosen);
        if !ok {
            self.complain(|| format!("features {chosen:#x} are refused, {offered:#x} are offered"));
        }
        ok
    }

    /// DRIVER_OK: the queues go to the device.
    fn activate(&self, state: &mut State) {
        let session = self.link.driver_ok();
        let gate = Gate::new(self.name.clone());
        let result =
            self.build(&state.registers, session, &gate)
                .and_then(|(wires, activation)| {
                    let mut wires = wires;
                    if !self.add_ioeventfds(&wires.ioeventfds) {
                        wires.ioeventfds.clear();
                    }
                    state.phase = Phase::Active(wires);
                    self.device.activate(activation)
                });
        if let Err(error) = result {
            self.complain(|| format!("cannot serve the driver: {error}"));
            gate.close();
            self.link.control(Some(session)).needs_reset();
        }
    }

    fn build(
        &self,
        registers: &Registers,
        session: Session,
        gate: &Arc<Gate>,
    ) -> Result<(Wires, Activation), ActivateError> {
        let features = registers.driver_features;
        let mut queues = Vec::new();
        let mut wires = Wires {
            gate: Arc::clone(gate),
            kicks: Vec::new(),
            ioeventfds: Vec::new(),
            removals: Vec::new(),
        };
        for (index, queue) in (0u16..).zip(&registers.queues) {
            if !queue.enabled {
                continue;
            }
            let queue = Queue::new(&self.space, queue.config, features)
                .map_err(|source| ActivateError::Queue { index, source })?;
            let kick = Event::new().map_err(host("an eventfd for kicks"))?;
            wires.kicks.push((index, kick.notifier()));
            wires.ioeventfds.push(ioeventfd(index, &kick));
            let interrupt = QueueInterrupt::new(&self.link, session, index);
            let (queue, removal) = ActiveQueue::new(index, queue, kick, interrupt);
            queues.push(queue);
            wires.removals.push(removal);
        }
        let activation = Activation {
            features,
            queues,
            memory: Arc::clone(&self.space),
            gate: Arc::clone(gate),
            control: self.link.control(Some(session)),
        };
        Ok((wires, activation))
    }

    /// Without them kicks arrive all the same, by way of the vCPU thread.
    fn add_ioeventfds(&self, ioeventfds: &[Ioeventfd]) -> bool {
        let Some(wiring) = self.wiring.get() else {
            return false;
        };
        let added = self.space.memory().update(|map| {
            ioeventfds
                .iter()
                .try_for_each(|it| map.add_ioeventfd(&wiring.region, it.clone()))
        });
        if let Err(error) = &added {
            self.complain(|| format!("kicks take the long way: {error}"));
        }
        added.is_ok()
    }

    fn remove_ioeventfds(&self, ioeventfds: &[Ioeventfd]) {
        let Some(wiring) = self.wiring.get() else {
            return;
        };
        let removed = self.space.memory().update(|map| {
            ioeventfds
                .iter()
                .try_for_each(|it| map.remove_ioeventfd(&wiring.region, it))
        });
        if let Err(error) = removed {
            self.complain(|| format!("ioeventfds not removed: {error}"));
        }
    }

    /// The function is reset.
    pub(super) fn reset_from_outside(&self) {
        self.reset_for_driver(&mut lock(&self.state));
    }

    /// The driver wrote 0. It polls until the status reads 0.
    fn reset_for_driver(&self, state: &mut State) {
        let Some(reset) = self.begin_reset(state) else {
            return;
        };
        if reset.is_drained() {
            self.end_reset(state, &reset);
            return;
        }
        let (Phase::Resetting { awaited, .. }, Some(wiring)) =
            (&mut state.phase, self.wiring.get())
        else {
            return;
        };
        if std::mem::replace(awaited, true) {
            return;
        }
        let handle = wiring.handle.clone();
        if self
            .remote
            .spawn(move |_| finish_when_drained(reset, handle))
            .is_err()
        {
            // The machine is going down: whoever takes it down waits for the gate itself.
            tracing::warn!(device = self.name, "reset during shutdown");
        }
    }

    /// Ends the activation, if there is one; the reset to wait for, if it is not complete at once.
    pub(super) fn begin_reset(&self, state: &mut State) -> Option<Reset> {
        match std::mem::replace(&mut state.phase, Phase::Idle) {
            Phase::Idle => {
                let session = self.link.begin_reset();
                self.power_on(state);
                self.link.finish_reset(session);
                None
            }
            Phase::Active(wires) | Phase::Removing(wires) => {
                let reset = Reset::begin(&self.link, &wires.gate);
                state.phase = Phase::Resetting {
                    wires,
                    reset: reset.clone(),
                    awaited: false,
                };
                Some(reset)
            }
            Phase::Resetting {
                wires,
                reset,
                awaited,
            } => {
                state.phase = Phase::Resetting {
                    wires,
                    reset: reset.clone(),
                    awaited,
                };
                Some(reset)
            }
        }
    }

    /// The device is removed: the tasks of its queues answer what is there and end. Returns the gate of the activation,
    /// if there is one: it has drained when they have. The interrupts work until the [reset](Self::begin_reset) after that.
    pub(super) fn begin_removal(&self, state: &mut State) -> Option<Arc<Gate>> {
        state.phase = match std::mem::replace(&mut state.phase, Phase::Idle) {
            Phase::Active(wires) => {
                Removal::begin(&wires.gate, &wires.removals);
                Phase::Removing(wires)
            }
            other => other,
        };
        state.phase.gate().cloned()
    }

    /// `reset` is drained. Does nothing when it is complete already.
    pub(super) fn finish_reset(&self, reset: &Reset) {
        self.end_reset(&mut lock(&self.state), reset);
    }

    fn end_reset(&self, state: &mut State, ended: &Reset) {
        match std::mem::replace(&mut state.phase, Phase::Idle) {
            Phase::Resetting { wires, reset, .. } if reset.is(ended) => {
                self.remove_ioeventfds(&wires.ioeventfds);
                self.power_on(state);
                // A vCPU thread may be here, which must not be the one to close descriptors. Without the iothread the
                // machine is going down.
                let _ = self.remote.spawn(move |_| {
                    drop(wires);
                    std::future::ready(())
                });
                // Last: it is what the driver waits for.
                reset.finish();
            }
            other => state.phase = other,
        }
    }

    /// All registers but the status as at power-on.
    fn power_on(&self, state: &mut State) {
        state.registers = Registers::new(self.device.queue_sizes());
        self.vectors.reset();
    }
}

/// Waits for `reset` and completes it, unless the function is gone by then.
pub(super) async fn finish_when_drained(reset: Reset, transport: Handle<Transport>) {
    reset.drained().await;
    if let Some(transport) = transport.enter(Entry::Io) {
        transport.finish_reset(&reset);
    }
}

fn ioeventfd(queue: u16, kick: &Event) -> Ioeventfd {
    // Size 0: a write of any width, which the kernel can match without decoding the instruction.
    Ioeventfd {
        offset: layout::notify_offset(queue),
        size: 0,
        datamatch: None,
        fd: Arc::clone(kick.fd()),
    }
}

fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> ActivateError {
    move |source| ActivateError::Host { what, source }
}
