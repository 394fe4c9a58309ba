// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands: names, and what each takes and returns.

use serde_json::Value;

use crate::schema::{Command, Empty};
use crate::types::ebbtide::{Memory, QueryResize, Resize, Status};
use crate::types::introspection::SchemaEntity;
use crate::types::memory::{MemoryDeviceInfo, MemorySizeSummary};
use crate::types::monitor::{CommandName, HumanMonitorCommand, QmpCapabilities, VersionInfo};
use crate::types::qom::{ObjectPropertyInfo, QomGet, QomList, QomSet};
use crate::types::run_state::StatusInfo;

/// Ends the negotiation; the server answers it itself.
pub const QMP_CAPABILITIES: Command<QmpCapabilities, Empty> = Command::new("qmp_capabilities");
/// Who is speaking; the server answers it itself.
pub const QUERY_VERSION: Command<Empty, VersionInfo> = Command::new("query-version");
/// The commands there are; the server answers it itself.
pub const QUERY_COMMANDS: Command<Empty, Vec<CommandName>> = Command::new("query-commands");
/// What commands take and return; the server answers it itself.
pub const QUERY_QMP_SCHEMA: Command<Empty, Vec<SchemaEntity>> = Command::new("query-qmp-schema");

/// Whether the guest runs.
pub const QUERY_STATUS: Command<Empty, StatusInfo> = Command::new("query-status");
/// Stops the vCPUs.
pub const STOP: Command<Empty, Empty> = Command::new("stop");
/// Lets the vCPUs run.
pub const CONT: Command<Empty, Empty> = Command::new("cont");
/// Resets the machine.
pub const SYSTEM_RESET: Command<Empty, Empty> = Command::new("system_reset");
/// Presses the power button.
pub const SYSTEM_POWERDOWN: Command<Empty, Empty> = Command::new("system_powerdown");
/// Ends the machine at once.
pub const QUIT: Command<Empty, Empty> = Command::new("quit");

/// The properties of an object.
pub const QOM_LIST: Command<QomList, Vec<ObjectPropertyInfo>> = Command::new("qom-list");
/// A property's value.
pub const QOM_GET: Command<QomGet, Value> = Command::new("qom-get");
/// Changes a property.
pub const QOM_SET: Command<QomSet, Empty> = Command::new("qom-set");

/// The memory devices.
pub const QUERY_MEMORY_DEVICES: Command<Empty, Vec<MemoryDeviceInfo>> =
    Command::new("query-memory-devices");
/// How much memory the guest has.
pub const QUERY_MEMORY_SIZE_SUMMARY: Command<Empty, MemorySizeSummary> =
    Command::new("query-memory-size-summary");

/// A command as a person types it; the answer is text.
pub const HUMAN_MONITOR_COMMAND: Command<HumanMonitorCommand, String> =
    Command::new("human-monitor-command");

/// State, vCPUs, process id, version.
pub const EBBTIDE_QUERY_STATUS: Command<Empty, Status> = Command::new("x-ebbtide-query-status");
/// The guest's memory and what it costs the host.
pub const EBBTIDE_QUERY_MEMORY: Command<Empty, Memory> = Command::new("x-ebbtide-query-memory");
/// How far a memory device has come towards its requested size.
pub const EBBTIDE_QUERY_RESIZE: Command<QueryResize, Resize> =
    Command::new("x-ebbtide-query-resize");
