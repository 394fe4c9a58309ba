// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands about memory.

use ebbtide_qmp::schema::Empty;
use ebbtide_qmp::types::ebbtide::{Memory, MemoryDevice, Resize, ResizeState};
use ebbtide_qmp::types::memory::{MemoryDeviceInfo, MemorySizeSummary, VirtioMemDeviceInfo};
use ebbtide_qmp::{CommandTable, QmpError, commands};
use ebbtide_virtio::mem::Progress;

use crate::machine::{Machine, MemorySlot};

/// Adds them to `table`.
pub(super) fn add(table: CommandTable<Machine>) -> CommandTable<Machine> {
    table
        .on(commands::QUERY_MEMORY_DEVICES, async |m, _, Empty {}| {
            Ok(devices(&m))
        })
        .on(
            commands::QUERY_MEMORY_SIZE_SUMMARY,
            async |m, _, Empty {}| Ok(summary(&m)),
        )
        .on(commands::EBBTIDE_QUERY_MEMORY, async |m, _, Empty {}| {
            memory(&m)
        })
        .on(commands::EBBTIDE_QUERY_RESIZE, async |m, _, args| {
            m.memory_slot(&args.id)
                .map(resize)
                .ok_or_else(|| QmpError::device_not_found(&args.id))
        })
}

/// What `query-memory-devices` answers.
pub(super) fn devices(machine: &Machine) -> Vec<MemoryDeviceInfo> {
    machine
        .memory_slots()
        .iter()
        .map(|slot| {
            let status = slot.status();
            MemoryDeviceInfo::VirtioMem(VirtioMemDeviceInfo {
                id: Some(slot.config.id.clone()),
                memaddr: slot.range.start,
                requested_size: status.requested_bytes,
                size: status.plugged_bytes,
                max_size: slot.config.size_bytes,
                block_size: slot.config.block_size_bytes,
                node: u64::from(slot.config.node),
                memdev: format!("/objects/{}", slot.config.memdev),
            })
        })
        .collect()
}

/// What `query-memory-size-summary` answers.
pub(super) fn summary(machine: &Machine) -> MemorySizeSummary {
    MemorySizeSummary {
        base_memory: machine.boot_ram_bytes(),
        plugged_memory: Some(machine.plugged_bytes()),
    }
}

fn memory(machine: &Machine) -> Result<Memory, QmpError> {
    let boot = machine.boot_ram_bytes();
    let plugged = machine.plugged_bytes();
    let slots = machine.memory_slots();
    Ok(Memory {
        boot,
        plugged,
        total: boot + plugged,
        max: boot + slots.iter().map(|s| s.config.size_bytes).sum::<u64>(),
        rss: resident_bytes()
            .map_err(|e| QmpError::generic(format!("/proc/self/status can't be read: {e}")))?,
        devices: slots.iter().map(device).collect(),
    })
}

fn device(slot: &MemorySlot) -> MemoryDevice {
    let status = slot.status();
    MemoryDevice {
        id: slot.config.id.clone(),
        kind: "virtio-mem".into(),
        node: u64::from(slot.config.node),
        memaddr: slot.range.start,
        block_size: slot.config.block_size_bytes,
        requested: status.requested_bytes,
        size: status.plugged_bytes,
        max: slot.config.size_bytes,
    }
}

fn resize(slot: &MemorySlot) -> Resize {
    let status = slot.status();
    let (state, reason) = match status.progress {
        Progress::Reached => (ResizeState::Reached, None),
        Progress::Working => (ResizeState::Working, None),
        Progress::Partial(reason) => (ResizeState::Partial, Some(reason)),
        Progress::Stalled(reason) => (ResizeState::Stalled, Some(reason)),
    };
    Resize {
        id: slot.config.id.clone(),
        target: status.requested_bytes,
        plugged: status.plugged_bytes,
        state,
        reason: reason.map(|r| r.to_string()),
        since_ms: u64::try_from(slot.target_age().as_millis()).unwrap_or(u64::MAX),
    }
}

/// VmRSS of this process.
fn resident_bytes() -> std::io::Result<u64> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let kib: Option<u64> = text
        .lines()
        .find_map(|l| l.strip_prefix("VmRSS:"))
        .and_then(|l| l.split_whitespace().next())
        .and_then(|n| n.parse().ok());
    kib.map(|k| k * 1024)
        .ok_or_else(|| std::io::Error::other("no VmRSS line"))
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_process_is_resident() {
        assert!(super::resident_bytes().unwrap() > 100 * 1024);
    }
}
