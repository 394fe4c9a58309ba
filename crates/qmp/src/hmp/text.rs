// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Answers as text.

use crate::error::QmpError;
use crate::types::memory::{MemoryDeviceInfo, MemorySizeSummary};
use crate::types::monitor::VersionInfo;
use crate::types::qom::ObjectPropertyInfo;
use crate::types::run_state::{RunState, StatusInfo};

/// A command that failed.
pub fn error(error: &QmpError) -> String {
    format!("Error: {}\r\n", error.desc)
}

/// `info status`
pub fn status(info: &StatusInfo) -> String {
    let detail = match info.status {
        RunState::Running | RunState::Paused => String::new(),
        other => format!(" ({other})"),
    };
    format!(
        "VM status: {}{detail}\r\n",
        if info.running { "running" } else { "paused" }
    )
}

/// `info version`
pub fn version(info: &VersionInfo) -> String {
    format!(
        "{}.{}.{}{}\r\n",
        info.qemu.major, info.qemu.minor, info.qemu.micro, info.package
    )
}

/// `info memory-devices`
pub fn memory_devices(devices: &[MemoryDeviceInfo]) -> String {
    devices.iter().map(memory_device).collect()
}

fn memory_device(device: &MemoryDeviceInfo) -> String {
    match device {
        MemoryDeviceInfo::Dimm(info) => format!(
            "Memory device [dimm]: \"{}\"\r\n  addr: {:#x}\r\n  slot: {}\r\n  node: {}\r\n  size: {}\r\n  memdev: {}\r\n  \
             hotplugged: {}\r\n  hotpluggable: {}\r\n",
            info.id.as_deref().unwrap_or_default(),
            info.addr,
            info.slot,
            info.node,
            info.size,
            info.memdev,
            info.hotplugged,
            info.hotpluggable
        ),
        MemoryDeviceInfo::VirtioMem(info) => format!(
            "Memory device [virtio-mem]: \"{}\"\r\n  memaddr: {:#x}\r\n  node: {}\r\n  requested-size: {}\r\n  size: {}\r\n  \
             max-size: {}\r\n  block-size: {}\r\n  memdev: {}\r\n",
            info.id.as_deref().unwrap_or_default(),
            info.memaddr,
            info.node,
            info.requested_size,
            info.size,
            info.max_size,
            info.block_size,
            info.memdev
        ),
    }
}

/// `info memory_size_summary`
pub fn memory_size_summary(info: &MemorySizeSummary) -> String {
    let plugged = info
        .plugged_memory
        .map(|bytes| format!("plugged memory: {bytes}\r\n"));
    format!(
        "base memory: {}\r\n{}",
        info.base_memory,
        plugged.unwrap_or_default()
    )
}

/// `qom-list`
pub fn properties(properties: &[ObjectPropertyInfo]) -> String {
    properties
        .iter()
        .map(|property| format!("{} ({})\r\n", property.name, property.type_name))
        .collect()
}
