// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands: names, and what each takes and returns.

use serde_json::Value;

use crate::schema::{Command, Empty};
use crate::types::acpi::AcpiOstInfo;
use crate::types::block::{
    BlockDeviceInfo, BlockInfo, BlockdevDel, BlockdevOptions, QueryNamedBlockNodes,
};
use crate::types::chardev::{ChardevAdd, ChardevInfo, ChardevRemove, ChardevReturn};
use crate::types::device::{
    CpuInfoFast, DeviceAdd, DeviceDel, HotpluggableCpu, IothreadInfo, TypeName,
};
use crate::types::ebbtide::{
    DeviceId, FaultRelease, FaultReleased, Holdings, Memory, Pins, QueryResize, Removal, Resize,
    Status, VcpuStay, Wait, Waited,
};
use crate::types::introspection::SchemaEntity;
use crate::types::memory::{Balloon, BalloonInfo, Memdev, MemoryDeviceInfo, MemorySizeSummary};
use crate::types::monitor::{CommandName, HumanMonitorCommand, QmpCapabilities, VersionInfo};
use crate::types::net::{NetdevAdd, NetdevDel, SetLink};
use crate::types::pci::PciInfo;
use crate::types::qom::{
    ObjectAdd, ObjectDel, ObjectPropertyInfo, ObjectTypeInfo, QomGet, QomList, QomListTypes, QomSet,
};
use crate::types::run_state::{StatusInfo, Watchdog};

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

/// The types of objects there are.
pub const QOM_LIST_TYPES: Command<QomListTypes, Vec<ObjectTypeInfo>> =
    Command::new("qom-list-types");
/// The properties objects of a type have.
pub const QOM_LIST_PROPERTIES: Command<TypeName, Vec<ObjectPropertyInfo>> =
    Command::new("qom-list-properties");

/// Plugs a device in.
pub const DEVICE_ADD: Command<DeviceAdd, Empty> = Command::new("device_add");
/// Asks the guest to let go of a device; `DEVICE_DELETED` follows when nothing of it is left.
pub const DEVICE_DEL: Command<DeviceDel, Empty> = Command::new("device_del");
/// The properties devices of a type have.
pub const DEVICE_LIST_PROPERTIES: Command<TypeName, Vec<ObjectPropertyInfo>> =
    Command::new("device-list-properties");
/// Makes an object: a memory backend, an iothread.
pub const OBJECT_ADD: Command<ObjectAdd, Empty> = Command::new("object-add");
/// Destroys an object nothing uses.
pub const OBJECT_DEL: Command<ObjectDel, Empty> = Command::new("object-del");

/// Makes a block node.
pub const BLOCKDEV_ADD: Command<BlockdevOptions, Empty> = Command::new("blockdev-add");
/// Closes a block node nothing uses.
pub const BLOCKDEV_DEL: Command<BlockdevDel, Empty> = Command::new("blockdev-del");
/// The disks.
pub const QUERY_BLOCK: Command<Empty, Vec<BlockInfo>> = Command::new("query-block");
/// The block nodes.
pub const QUERY_NAMED_BLOCK_NODES: Command<QueryNamedBlockNodes, Vec<BlockDeviceInfo>> =
    Command::new("query-named-block-nodes");

/// Makes a network backend.
pub const NETDEV_ADD: Command<NetdevAdd, Empty> = Command::new("netdev_add");
/// Destroys a network backend.
pub const NETDEV_DEL: Command<NetdevDel, Empty> = Command::new("netdev_del");
/// Plugs a network device's cable in, or pulls it.
pub const SET_LINK: Command<SetLink, Empty> = Command::new("set_link");

/// Makes a character device.
pub const CHARDEV_ADD: Command<ChardevAdd, ChardevReturn> = Command::new("chardev-add");
/// Destroys a character device nothing uses.
pub const CHARDEV_REMOVE: Command<ChardevRemove, Empty> = Command::new("chardev-remove");
/// The character devices.
pub const QUERY_CHARDEV: Command<Empty, Vec<ChardevInfo>> = Command::new("query-chardev");

/// The PCI buses.
pub const QUERY_PCI: Command<Empty, Vec<PciInfo>> = Command::new("query-pci");
/// What the guest said last about its DIMM slots.
pub const QUERY_ACPI_OSPM_STATUS: Command<Empty, Vec<AcpiOstInfo>> =
    Command::new("query-acpi-ospm-status");
/// The iothreads.
pub const QUERY_IOTHREADS: Command<Empty, Vec<IothreadInfo>> = Command::new("query-iothreads");
/// The vCPUs and their threads.
pub const QUERY_CPUS_FAST: Command<Empty, Vec<CpuInfoFast>> = Command::new("query-cpus-fast");
/// The slots for vCPUs.
pub const QUERY_HOTPLUGGABLE_CPUS: Command<Empty, Vec<HotpluggableCpu>> =
    Command::new("query-hotpluggable-cpus");
/// What happens when the guest lets its watchdog run out.
pub const WATCHDOG_SET_ACTION: Command<Watchdog, Empty> = Command::new("watchdog-set-action");

/// The memory backends.
pub const QUERY_MEMDEV: Command<Empty, Vec<Memdev>> = Command::new("query-memdev");
/// How much memory the balloon leaves to the guest.
pub const QUERY_BALLOON: Command<Empty, BalloonInfo> = Command::new("query-balloon");
/// Asks the guest to let the balloon leave it so much memory.
pub const BALLOON: Command<Balloon, Empty> = Command::new("balloon");
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
/// How long exits have kept each vCPU out of the guest; begins anew with each answer.
pub const EBBTIDE_QUERY_VCPUS: Command<Empty, Vec<VcpuStay>> =
    Command::new("x-ebbtide-query-vcpus");
/// What the hypervisor has of the machine: slots, ioeventfds, irqfds, messages.
pub const EBBTIDE_QUERY_KVM: Command<Empty, Holdings> = Command::new("x-ebbtide-query-kvm");
/// Who keeps memory of the guest from being given back: pins of requests under way.
pub const EBBTIDE_QUERY_PINS: Command<Empty, Vec<Pins>> = Command::new("x-ebbtide-query-pins");
/// The guest's memory and what it costs the host.
pub const EBBTIDE_QUERY_MEMORY: Command<Empty, Memory> = Command::new("x-ebbtide-query-memory");
/// How far a memory device has come towards its requested size.
pub const EBBTIDE_QUERY_RESIZE: Command<QueryResize, Resize> =
    Command::new("x-ebbtide-query-resize");
/// The devices that are on their way out.
pub const EBBTIDE_QUERY_REMOVALS: Command<Empty, Vec<Removal>> =
    Command::new("x-ebbtide-query-removals");
/// Waits until a device has come so far on its way out. An error when the guest refuses, the removal is withdrawn, or the
/// time is over.
pub const EBBTIDE_WAIT: Command<Wait, Waited> = Command::new("x-ebbtide-wait");
/// Goes on with a removal that is held up: without the guest's consent, and without what does not end.
pub const EBBTIDE_DEVICE_FORCE: Command<DeviceId, Empty> = Command::new("x-ebbtide-device-force");
/// Withdraws a removal the guest has not consented to yet.
pub const EBBTIDE_DEVICE_CANCEL: Command<DeviceId, Empty> = Command::new("x-ebbtide-device-cancel");
/// Lets operations go that a block node `x-ebbtide-fault` holds.
pub const EBBTIDE_FAULT_RELEASE: Command<FaultRelease, FaultReleased> =
    Command::new("x-ebbtide-fault-release");
/// Lets the guest see a device that was added with `x-ebbtide-announce=off`, with all that was added below it.
pub const EBBTIDE_DEVICE_ANNOUNCE: Command<DeviceId, Empty> =
    Command::new("x-ebbtide-device-announce");
