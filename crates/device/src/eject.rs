// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the guest's eject write does: the one word that the control thread and a vCPU decide about a removal with.
//!
//! ```text
//!              request()                eject(), by the vCPU
//!   ┌─────────┐ ───────────► ┌───────────┐ ───────────► ┌──────────┐
//!   │ plugged │              │ requested │              │ isolated │  (for good)
//!   └─────────┘ ◄─────────── └───────────┘              └──────────┘
//!        │        cancel()                                   ▲
//!        └────── isolate(), by the control thread; or eject(), where the guest may do so uninvited
//! ```
//!
//! Every transition is one read-modify-write of the word, so that of a cancellation and an eject that race exactly one
//! wins. Whoever wins the transition to *isolated* shuts the gates of the device and of everything below it.
//!
//! The list of those gates changes while the guest may eject: a device is plugged below. Invariant (I): *once the word
//! says isolated, every gate that is or ever will be on the list is closed.* Who adds a gate publishes the list first
//! and touches the word after; who isolates does it the other way round. So one of them sees the other, and the gate is
//! closed by the one or the other. The same order tells when an old list is not read any more: see [`Eject::cover`].

use std::fmt;
use std::sync::{Arc, PoisonError};

use ebbtide_gate::Gate;
use ebbtide_models::seeded;

use crate::sync::{AtomicPtr, AtomicU8, Mutex, Ordering};

const PLUGGED: u8 = 0;
const REQUESTED: u8 = 1;
const ISOLATED: u8 = 2;

/// When a guest may eject a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GuestEject {
    /// At any time.
    On,
    /// Never: management alone takes it away.
    Off,
    /// When management has asked for it, and has not withdrawn that.
    #[default]
    Requested,
}

/// What came of a guest's eject.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "who isolated has to see to the drain"]
pub enum Answer {
    /// The device is isolated now, by this call.
    Isolated,
    /// It was before.
    Already,
    /// The guest may not do that (now).
    Refused,
}

type Gates = Vec<Arc<Gate>>;

/// The eject of one plugged device: its word and the gates it shuts. Shared by the hot-plug registers, on vCPU threads,
/// and the control thread.
pub struct Eject {
    state: AtomicU8,
    policy: GuestEject,
    /// The current list, from `Box::into_raw`.
    gates: AtomicPtr<Gates>,
    /// Held by who changes the list. Lists that may still be read: only there are any once the word says isolated.
    #[expect(
        clippy::vec_box,
        reason = "who reads a list has a pointer to what is in the box"
    )]
    retired: Mutex<Vec<Box<Gates>>>,
}

impl Eject {
    /// Of a device with this gate; nothing is below it yet.
    pub fn new(policy: GuestEject, gate: &Arc<Gate>) -> Arc<Eject> {
        let gates = Box::new(vec![Arc::clone(gate)]);
        Arc::new(Eject {
            state: AtomicU8::new(PLUGGED),
            policy,
            gates: AtomicPtr::new(Box::into_raw(gates)),
            retired: Mutex::new(Vec::new()),
        })
    }

    /// Management asks the guest to let go. False when the device is isolated already.
    pub fn request(&self) -> bool {
        self.change(PLUGGED, REQUESTED) || !self.is_isolated()
    }

    /// Management withdraws its request, or the guest has refused it. False when there is none, or when it is too late:
    /// the device is isolated.
    pub fn cancel(&self) -> bool {
        self.change(REQUESTED, PLUGGED)
    }

    /// Whether a request is pending.
    pub fn is_requested(&self) -> bool {
        self.state.load(Ordering::Acquire) == REQUESTED
    }

    /// Whether the gates are shut, or about to be by whoever isolated.
    pub fn is_isolated(&self) -> bool {
        self.state.load(Ordering::Acquire) == ISOLATED
    }

    /// The guest ejects the device. On the vCPU thread, inside the register write: takes no lock, waits for nothing.
    pub fn eject(&self) -> Answer {
        let allowed = match self.policy {
            GuestEject::On => self.change(REQUESTED, ISOLATED) || self.change(PLUGGED, ISOLATED),
            GuestEject::Requested => self.change(REQUESTED, ISOLATED),
            GuestEject::Off => false,
        };
        if allowed {
            self.shut();
            Answer::Isolated
        } else if self.is_isolated() {
            Answer::Already
        } else {
            Answer::Refused
        }
    }

    /// Isolates without the guest. True when this call did it.
    pub fn isolate(&self) -> bool {
        let before = self.state.swap(ISOLATED, Ordering::AcqRel);
        if before != ISOLATED {
            self.shut();
        }
        before != ISOLATED
    }

    /// From now on an eject shuts `gate`, too: that of a device plugged below this one. False when it is too late: this
    /// device is isolated, and `gate` has been closed.
    pub fn cover(&self, gate: &Arc<Gate>) -> bool {
        let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.gates.load(Ordering::Relaxed);
        // SAFETY: `old` is the current list; only the holder of the lock replaces and frees one.
        let mut gates = unsafe { (*old).clone() };
        // Of devices that have gone.
        gates.retain(|gate| !gate.is_drained());
        gates.push(Arc::clone(gate));
        let early = seeded!("cover_looks_first").then(|| self.state.load(Ordering::Acquire));
        self.gates
            .store(Box::into_raw(Box::new(gates)), Ordering::Release);
        // A read-modify-write, not a load: it reads the newest state, and whoever isolates after it has seen it and
        // with it the new list.
        let state = early.unwrap_or_else(|| self.state.fetch_or(0, Ordering::AcqRel));
        // SAFETY: from Box::into_raw, freed or retired once: it is not the current list any more.
        let old = unsafe { Box::from_raw(old) };
        if state == ISOLATED {
            // Somebody may be reading it.
            retired.push(old);
            gate.close();
            return false;
        }
        // Nobody reads a list before it has isolated, and who does that from here on finds the new one.
        drop(old);
        true
    }

    fn change(&self, from: u8, to: u8) -> bool {
        if seeded!("eject_looks_then_writes") {
            let is = self.state.load(Ordering::Acquire) == from;
            if is {
                self.state.store(to, Ordering::Release);
            }
            return is;
        }
        self.state
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    fn shut(&self) {
        // SAFETY: the word says isolated. A list that was current when it began to, or became so after, is freed only
        // when `self` is dropped (see `cover`).
        let gates = unsafe { &*self.gates.load(Ordering::Acquire) };
        for gate in gates {
            gate.close();
        }
    }
}

impl Drop for Eject {
    fn drop(&mut self) {
        // SAFETY: the current list, and nobody else is there any more.
        drop(unsafe { Box::from_raw(self.gates.load(Ordering::Relaxed)) });
    }
}

impl fmt::Debug for Eject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Eject")
            .field("state", &self.state.load(Ordering::Relaxed))
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_policy_decides_what_an_uninvited_eject_does() {
        let gate = Gate::new("d");
        let eject = Eject::new(GuestEject::Requested, &gate);
        assert_eq!(eject.eject(), Answer::Refused);
        assert!(!gate.is_closed());
        assert!(eject.request() && eject.is_requested());
        assert_eq!(eject.eject(), Answer::Isolated);
        assert!(gate.is_closed());
        assert_eq!(eject.eject(), Answer::Already);
        assert!(!eject.request() && !eject.cancel());

        let gate = Gate::new("d");
        assert_eq!(Eject::new(GuestEject::On, &gate).eject(), Answer::Isolated);
        let off = Eject::new(GuestEject::Off, &Gate::new("d"));
        assert!(off.request());
        assert_eq!(off.eject(), Answer::Refused);
        assert!(off.isolate() && !off.isolate());
    }

    #[test]
    fn a_cancelled_request_is_none() {
        let gate = Gate::new("d");
        let eject = Eject::new(GuestEject::Requested, &gate);
        assert!(!eject.cancel());
        assert!(eject.request() && eject.request() && eject.cancel());
        assert_eq!(eject.eject(), Answer::Refused);
        assert!(!gate.is_closed());
    }

    #[test]
    fn what_is_below_goes_with_it_and_what_comes_late_is_shut_out() {
        let gates: Vec<_> = (0..4).map(|n| Gate::new(format!("d{n}"))).collect();
        let eject = Eject::new(GuestEject::On, &gates[0]);
        assert!(eject.cover(&gates[1]) && eject.cover(&gates[2]));
        assert_eq!(eject.eject(), Answer::Isolated);
        assert!(gates[..3].iter().all(|g| g.is_closed()));
        assert!(!eject.cover(&gates[3]));
        assert!(gates[3].is_closed());
    }

    #[test]
    fn a_thousand_devices_that_came_and_went_leave_nothing() {
        let eject = Eject::new(GuestEject::On, &Gate::new("port"));
        for n in 0..1000 {
            let gate = Gate::new(format!("d{n}"));
            assert!(eject.cover(&gate));
            gate.close();
        }
        // SAFETY: nobody changes the list.
        let listed = unsafe { (*eject.gates.load(Ordering::Relaxed)).len() };
        assert!(listed <= 2, "{listed}");
        assert!(eject.retired.lock().unwrap().is_empty());
    }
}
