// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Getting a vCPU out of the guest without ever losing the request.
//!
//! A signal alone is lost when it arrives between the thread's last look at its work and the entry into the guest: the
//! handler runs and nothing remembers it. A flag alone does not reach a guest that is running. So a kick is both, in
//! this order, and the hypervisor looks at the flag after it has begun to hold back signals:
//!
//! ```text
//!   kicker   work made visible → raise flag → signal the thread
//!   thread   look for work → enter { flag raised? out : run until signal or exit } → lower flag → look for work
//! ```
//!
//! The flag is lowered only after the hypervisor gave it as the reason, and before the thread looks for work again: a
//! kick that arrives in between is served by that look.

use ebbtide_models::seeded;

use crate::sync::{AtomicU8, Ordering::AcqRel, Ordering::Release};

// The hypervisor looks whether the flag is 0.

/// A kick has not been served.
const KICKED: u8 = 1;
/// The thread itself does not want the guest to run.
const HELD: u8 = 2;

/// The kicker's side. The work must have been made visible before.
pub fn kick(flag: &AtomicU8, signal: impl FnOnce()) {
    if !seeded!("kick_without_flag") {
        // A read-modify-write, so that a second kick does not hide the first one's work from `after_interruption`.
        flag.fetch_or(KICKED, AcqRel);
    }
    signal();
}

/// The thread's side, before it enters the guest.
pub fn before_entry(flag: &AtomicU8) {
    if seeded!("kick_lowered_on_entry") {
        flag.fetch_and(!KICKED, AcqRel);
    }
}

/// The thread's side, when the hypervisor turned back; to be followed by a look for work.
pub fn after_interruption(flag: &AtomicU8) {
    if seeded!("kick_lowered_by_store") {
        flag.store(0, Release);
    } else {
        // Reads what it overwrites: the work of a kick whose flag is lowered here is seen by the look that follows,
        // which a plain store would let pass before itself.
        flag.fetch_and(!KICKED, AcqRel);
    }
}

/// The thread's side: enters the hypervisor by `entry` for its own sake, not to run the guest. A kick that comes
/// meanwhile stays.
pub fn without_guest<T>(flag: &AtomicU8, entry: impl FnOnce() -> T) -> T {
    flag.fetch_or(HELD, AcqRel);
    let result = entry();
    if seeded!("hold_lowers_all") {
        flag.swap(0, AcqRel);
    } else {
        flag.fetch_and(!HELD, AcqRel);
    }
    result
}
