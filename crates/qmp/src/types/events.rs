// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the machine tells its clients unasked.

use std::time::Duration;

use crate::schema::{Empty, EventInfo, EventKind, RateLimit, qapi_struct};
use crate::types::acpi::AcpiDeviceOst;
use crate::types::block::BlockIoError;
use crate::types::chardev::VserportChange;
use crate::types::device::DevicePath;
use crate::types::memory::BalloonInfo;
use crate::types::net::NetdevId;
use crate::types::run_state::{ShutdownCause, Watchdog};

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
/// What a guest can make happen as often as it likes is sent once a second.
const fn once_a_second(per_member: Option<&'static str>) -> RateLimit {
    RateLimit {
        interval: Duration::from_secs(1),
        per_member,
    }
}

/// A memory device provides more or less than before; at most once a second for each device.
pub const MEMORY_DEVICE_SIZE_CHANGE: EventKind<MemoryDeviceSizeChange> =
    EventKind::limited("MEMORY_DEVICE_SIZE_CHANGE", once_a_second(Some("qom-path")));
/// A device is gone: nothing of it is left, its id and its backend are free.
pub const DEVICE_DELETED: EventKind<DevicePath> = EventKind::new("DEVICE_DELETED");
/// The guest does not let go of a device; it stays plugged in.
pub const DEVICE_UNPLUG_GUEST_ERROR: EventKind<DevicePath> =
    EventKind::new("DEVICE_UNPLUG_GUEST_ERROR");
/// The guest said how far it is with a device.
pub const ACPI_DEVICE_OST: EventKind<AcpiDeviceOst> = EventKind::new("ACPI_DEVICE_OST");
/// A disk's request failed; at most once a second for each device.
pub const BLOCK_IO_ERROR: EventKind<BlockIoError> =
    EventKind::limited("BLOCK_IO_ERROR", once_a_second(Some("qom-path")));
/// The guest's balloon has grown or shrunk; at most once a second.
pub const BALLOON_CHANGE: EventKind<BalloonInfo> =
    EventKind::limited("BALLOON_CHANGE", once_a_second(None));
/// The peer of a network backend is gone for good.
pub const NETDEV_STREAM_DISCONNECTED: EventKind<NetdevId> =
    EventKind::new("NETDEV_STREAM_DISCONNECTED");
/// The guest has opened or closed a port of a console device; at most once a second for each.
pub const VSERPORT_CHANGE: EventKind<VserportChange> =
    EventKind::limited("VSERPORT_CHANGE", once_a_second(Some("id")));
/// The guest has let its watchdog run out; at most once a second.
pub const WATCHDOG: EventKind<Watchdog> = EventKind::limited("WATCHDOG", once_a_second(None));

/// Every event there is.
pub const ALL: &[EventInfo] = &[
    SHUTDOWN.info(),
    RESET.info(),
    STOP.info(),
    RESUME.info(),
    POWERDOWN.info(),
    MEMORY_DEVICE_SIZE_CHANGE.info(),
    DEVICE_DELETED.info(),
    DEVICE_UNPLUG_GUEST_ERROR.info(),
    ACPI_DEVICE_OST.info(),
    BLOCK_IO_ERROR.info(),
    BALLOON_CHANGE.info(),
    NETDEV_STREAM_DISCONNECTED.info(),
    VSERPORT_CHANGE.info(),
    WATCHDOG.info(),
];
