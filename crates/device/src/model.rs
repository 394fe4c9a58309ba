// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the lifecycle asks of a device model.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use ebbtide_gate::Gate;

/// The end of a device's activity, as [`Model::drain`] gives it.
pub type Draining = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Something that keeps a device from draining.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// What it is, as a person reads it: `2 requests`, `pin of region dimm0`.
    pub what: String,
    /// How long it has been there, where that is known.
    pub age: Option<Duration>,
}

impl Holder {
    /// Who is inside `gate`.
    pub fn inside(gate: &Gate) -> Vec<Holder> {
        let held = gate.held();
        let mmio = Holder::count(held.mmio.into(), "register access", "es", None);
        let io = Holder::count(held.io.into(), "request", "s", None);
        mmio.into_iter().chain(io).collect()
    }

    /// So many requests; `None` for none of them.
    pub fn requests(count: u64, oldest: Option<Duration>) -> Option<Holder> {
        Holder::count(count, "request", "s", oldest)
    }

    fn count(count: u64, what: &str, plural: &str, age: Option<Duration>) -> Option<Holder> {
        (count > 0).then(|| Holder {
            what: format!("{count} {what}{}", if count == 1 { "" } else { plural }),
            age,
        })
    }
}

/// A device as its life sees it, whatever it does.
///
/// A model does nothing about the order of its end: it is called in that order. It must not be reachable for anybody but
/// through its gate, and must not keep itself alive from a thread of its own: dropping it is the end of it.
pub trait Model: Send {
    /// What [`Eject`](crate::Eject) shuts. Once it is closed the guest reads all-ones from the device and its writes are
    /// dropped; nothing new begins.
    fn gate(&self) -> &Arc<Gate>;

    /// Ends what is under way; the gate is closed. Called once, on the control thread, and must not block: take the
    /// registers off the memory map, cancel what can be cancelled, answer what has not begun. The future is ready when
    /// nothing of the device is in use any more: no register access, no request, no timer, no pin.
    fn drain(&mut self) -> Draining;

    /// Who keeps it from draining, for reports.
    fn holders(&self) -> Vec<Holder> {
        Holder::inside(self.gate())
    }

    /// Gives up what the drain waits for: kills a process, closes a connection, abandons a backend. What is in flight
    /// then ends by itself, or never will; nothing is freed under it. False when there is nothing to give up.
    fn force(&mut self) -> bool {
        false
    }
}
