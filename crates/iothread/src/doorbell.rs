// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! When a thread may sleep, and who has to wake it.
//!
//! ```text
//!              notify                        try_sleep (the sleeper)
//!   NOTIFIED ◄───────── AWAKE ──────────────────────────────► SLEEPING
//!      │                 ▲  ▲                                    │ │
//!      └─────────────────┘  └────────────────────────────────────┘ │
//!          take: true            take: false (woken by I/O)        │
//!      ▲                                                           │
//!      └───────────────────────────────────────────────────────────┘
//!                         notify: true, ring the bell
//! ```
//!
//! Work is put where the sleeper will look *before* [`notify`](Doorbell::notify); the sleeper looks for work
//! *after* [`take`](Doorbell::take). Every step is a read-modify-write of one word, so a notification either comes
//! before the attempt to sleep, which then fails, or after it, and then sees SLEEPING. With a plain store and a
//! plain load instead, each side could miss the other's.

use ebbtide_models::seeded;

use crate::sync::{AtomicU32, Ordering};

const AWAKE: u32 = 0;
const NOTIFIED: u32 = 1;
const SLEEPING: u32 = 2;

/// One sleeper, any number of notifiers. The bell itself (an eventfd) is the callers' business.
#[derive(Debug)]
pub struct Doorbell {
    state: AtomicU32,
}

impl Doorbell {
    /// A doorbell whose owner is awake.
    #[allow(clippy::new_without_default)] // loom's atomics have no const default and neither need we
    pub fn new() -> Doorbell {
        Doorbell {
            state: AtomicU32::new(AWAKE),
        }
    }

    /// Says that there is work. True when the sleeper sleeps: the caller, and only this one, must ring the bell.
    #[must_use = "when true the bell has to be rung"]
    pub fn notify(&self) -> bool {
        if seeded!("notify_load_first") && self.state.load(Ordering::SeqCst) == AWAKE {
            return false;
        }
        // Release: the work put down before is seen by who takes the notification.
        self.state.swap(NOTIFIED, Ordering::AcqRel) == SLEEPING
    }

    /// The sleeper, awake: true when it was notified since the last time and has to look for work.
    pub fn take(&self) -> bool {
        // A stale AWAKE is harmless, for try_sleep does not go by it.
        if self.state.load(Ordering::Relaxed) == AWAKE {
            return false;
        }
        self.state.swap(AWAKE, Ordering::AcqRel) == NOTIFIED
    }

    /// The sleeper, with nothing left to do: true when it may sleep; false when it was notified meanwhile.
    #[must_use = "sleeping after a refusal loses the notification"]
    pub fn try_sleep(&self) -> bool {
        if seeded!("sleep_without_recheck") {
            self.state.store(SLEEPING, Ordering::SeqCst);
            return true;
        }
        self.state
            .compare_exchange(AWAKE, SLEEPING, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }
}
