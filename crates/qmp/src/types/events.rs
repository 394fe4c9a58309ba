// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the machine tells its clients unasked.

use std::time::Duration;

use crate::schema::{Empty, EventInfo, EventKind, RateLimit, qapi_struct};
use crate::types::run_state::ShutdownCause;

qapi_struct! {
    /// Data of `SHUTDOWN` and `RESET`.
    #[derive(Copy, Eq)]
    pub struct Cause {
        /// The guest itself asked for it.
        guest as "guest": bool,
        /// Why.
        reason as "reason": ShutdownCause,
    }
}

impl Cause {
    /// A shutdown or reset for this reason.
    pub fn new(reason: ShutdownCause) -> Self {
        use ShutdownCause::{GuestPanic, GuestReset, GuestShutdown};
        Self {
            guest: matches!(reason, GuestShutdown | GuestReset | GuestPanic),
            reason,
        }
    }
}

qapi_struct! {
    /// Data of `MEMORY_DEVICE_SIZE_CHANGE`.
    #[derive(Eq)]
    pub struct MemoryDeviceSizeChange {
        /// The device's id.
        id as "id": Option<String>,
        /// How much it provides now, bytes.
        size as "size": u64,
        /// Its path in the object tree.
        qom_path as "qom-path": String,
    }
}

/// The machine ends.
pub const SHUTDOWN: EventKind<Cause> = EventKind::new("SHUTDOWN");
/// The machine was reset.
pub const RESET: EventKind<Cause> = EventKind::new("RESET");
/// The vCPUs were stopped.
pub const STOP: EventKind<Empty> = EventKind::new("STOP");
/// The vCPUs run again.
pub const RESUME: EventKind<Empty> = EventKind::new("RESUME");
/// The power button was pressed.
pub const POWERDOWN: EventKind<Empty> = EventKind::new("POWERDOWN");
/// A memory device provides more or less than before; at most once a second for each device.
pub const MEMORY_DEVICE_SIZE_CHANGE: EventKind<MemoryDeviceSizeChange> = EventKind::limited(
    "MEMORY_DEVICE_SIZE_CHANGE",
    RateLimit {
        interval: Duration::from_secs(1),
        per_member: Some("qom-path"),
    },
);

/// Every event there is.
pub const ALL: &[EventInfo] = &[
    SHUTDOWN.info(),
    RESET.info(),
    STOP.info(),
    RESUME.info(),
    POWERDOWN.info(),
    MEMORY_DEVICE_SIZE_CHANGE.info(),
];
