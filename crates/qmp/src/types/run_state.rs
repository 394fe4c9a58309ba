// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether the guest runs, and why not.

use crate::schema::{qapi_enum, qapi_struct};

qapi_enum! {
    /// What the machine is doing.
    pub enum RunState {
        /// Stopped by a debugger.
        Debug = "debug",
        /// Waiting for an incoming migration.
        InMigrate = "inmigrate",
        /// An internal error stopped the machine.
        InternalError = "internal-error",
        /// A failed I/O stopped the machine.
        IoError = "io-error",
        /// Stopped by `stop`.
        Paused = "paused",
        /// Stopped after a migration.
        PostMigrate = "postmigrate",
        /// Not started yet.
        PreLaunch = "prelaunch",
        /// Stopped to finish a migration.
        FinishMigrate = "finish-migrate",
        /// Restoring its state.
        RestoreVm = "restore-vm",
        /// The guest runs.
        Running = "running",
        /// Saving its state.
        SaveVm = "save-vm",
        /// The guest has shut down.
        Shutdown = "shutdown",
        /// The guest is suspended.
        Suspended = "suspended",
        /// The watchdog stopped the machine.
        Watchdog = "watchdog",
        /// The guest has panicked.
        GuestPanicked = "guest-panicked",
        /// Paused by COLO.
        Colo = "colo",
    }
}

qapi_enum! {
    /// Why the machine shuts down or resets.
    pub enum ShutdownCause {
        /// No shutdown was asked for.
        None = "none",
        /// An error of the host.
        HostError = "host-error",
        /// The `quit` command.
        HostQmpQuit = "host-qmp-quit",
        /// The `system_reset` command.
        HostQmpSystemReset = "host-qmp-system-reset",
        /// A signal, such as SIGINT.
        HostSignal = "host-signal",
        /// A user interface.
        HostUi = "host-ui",
        /// The guest powered off.
        GuestShutdown = "guest-shutdown",
        /// The guest reset itself and resets end the machine.
        GuestReset = "guest-reset",
        /// The guest panicked.
        GuestPanic = "guest-panic",
        /// A reset of one subsystem.
        SubsystemReset = "subsystem-reset",
        /// A snapshot was loaded.
        SnapshotLoad = "snapshot-load",
    }
}

qapi_struct! {
    /// The answer to `query-status`.
    pub struct StatusInfo {
        /// True when the vCPUs run.
        running as "running": bool,
        /// More exactly.
        status as "status": RunState,
    }
}

impl StatusInfo {
    /// The answer for a machine in this state.
    pub fn new(status: RunState) -> Self {
        Self {
            running: matches!(status, RunState::Running),
            status,
        }
    }
}

qapi_enum! {
    /// What happens when the guest has let its watchdog run out.
    pub enum WatchdogAction {
        /// The machine is reset.
        Reset = "reset",
        /// The power button is pressed.
        Shutdown = "shutdown",
        /// The machine ends.
        Poweroff = "poweroff",
        /// The vCPUs are stopped.
        Pause = "pause",
        /// It is logged.
        Debug = "debug",
        /// Nothing.
        None = "none",
        /// All vCPUs get an NMI.
        InjectNmi = "inject-nmi",
    }
}

qapi_struct! {
    /// Arguments of `watchdog-set-action`, and data of `WATCHDOG`.
    #[derive(Copy, Eq)]
    pub struct Watchdog {
        /// What happens.
        action as "action": WatchdogAction,
    }
}
