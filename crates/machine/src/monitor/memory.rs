// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands about memory.

use std::rc::Rc;
use std::sync::Arc;

use ebbtide_devices::dimm::DimmInfo;
use ebbtide_memory::RamBlock;
use ebbtide_qmp::schema::Empty;
use ebbtide_qmp::types::ebbtide::{Memory, MemoryDevice, Pins, Resize, ResizeState};
use ebbtide_qmp::types::memory::{
    MemoryDeviceInfo, MemorySizeSummary, PcDimmDeviceInfo, VirtioMemDeviceInfo,
};
use ebbtide_qmp::types::run_state::RunState;
use ebbtide_qmp::{CommandTable, QmpError, commands};
use ebbtide_virtio::mem::Progress;

use crate::hotplug::MemoryObject;
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
        .on(commands::OBJECT_ADD, async |m, _, args| {
            m.devices.add_object(args).await?;
            Ok(Empty {})
        })
        .on(commands::OBJECT_DEL, async |m, _, args| {
            m.devices.remove_object(&args.id).await?;
            Ok(Empty {})
        })
        .on(commands::QUERY_MEMDEV, async |m, _, Empty {}| {
            let objects = m.devices.memory_objects().list();
            let describe = |(id, object, _): (String, Rc<MemoryObject>, _)| object.describe(&id);
            Ok(objects.into_iter().map(describe).collect())
        })
        .on(commands::QUERY_ACPI_OSPM_STATUS, async |m, _, Empty {}| {
            Ok(m.devices.ospm_status())
        })
        .on(commands::EBBTIDE_QUERY_MEMORY, async |m, _, Empty {}| {
            memory(&m)
        })
        .on(commands::EBBTIDE_QUERY_PINS, async |m, _, Empty {}| {
            Ok(pins(&m))
        })
        .on(commands::EBBTIDE_QUERY_RESIZE, async |m, _, args| {
            m.memory_slot(&args.id)
                .map(|slot| resize(slot, m.state()))
                .ok_or_else(|| QmpError::device_not_found(&args.id))
        })
}

fn pins(machine: &Machine) -> Vec<Pins> {
    let blocks = machine.memory().ram().blocks();
    let of = |block: &Arc<RamBlock>| {
        let name = block.name().to_owned();
        block
            .pin_holders()
            .into_iter()
            .map(move |(thread, count)| Pins {
                block: name.clone(),
                thread,
                count,
            })
    };
    blocks.iter().flat_map(of).collect()
}

/// What `query-memory-devices` answers.
pub(super) fn devices(machine: &Machine) -> Vec<MemoryDeviceInfo> {
    let dimms = machine.devices.dimm_infos().into_iter().map(dimm);
    let slots = machine.memory_slots().iter().map(|slot| {
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
    });
    dimms.chain(slots).collect()
}

fn dimm(dimm: DimmInfo) -> MemoryDeviceInfo {
    let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    MemoryDeviceInfo::Dimm(PcDimmDeviceInfo {
        id: Some(dimm.id),
        addr: signed(dimm.addr),
        size: signed(dimm.size_bytes),
        slot: dimm.slot.into(),
        node: dimm.node.into(),
        memdev: format!("/objects/{}", dimm.memdev),
        hotplugged: dimm.hotplugged,
        hotpluggable: true,
    })
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
    let dimms = machine.devices.dimm_infos();
    let dimm_bytes: u64 = dimms.iter().map(|dimm| dimm.size_bytes).sum();
    let slots = machine.memory_slots();
    Ok(Memory {
        boot,
        plugged,
        total: boot + plugged,
        max: boot + dimm_bytes + slots.iter().map(|s| s.config.size_bytes).sum::<u64>(),
        rss: resident_bytes()
            .map_err(|e| QmpError::generic(format!("/proc/self/status can't be read: {e}")))?,
        devices: dimms
            .iter()
            .map(dimm_device)
            .chain(slots.iter().map(device))
            .collect(),
    })
}

fn dimm_device(dimm: &DimmInfo) -> MemoryDevice {
    MemoryDevice {
        id: dimm.id.clone(),
        kind: "dimm".into(),
        node: dimm.node.into(),
        memaddr: dimm.addr,
        block_size: dimm.size_bytes,
        requested: dimm.size_bytes,
        size: dimm.size_bytes,
        max: dimm.size_bytes,
    }
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

fn resize(slot: &MemorySlot, machine: RunState) -> Resize {
    let status = slot.status();
    let (state, reason) = standing(status.progress, machine);
    Resize {
        id: slot.config.id.clone(),
        target: status.requested_bytes,
        plugged: status.plugged_bytes,
        state,
        reason,
        since_ms: u64::try_from(slot.target_age().as_millis()).unwrap_or(u64::MAX),
    }
}

/// Where a resize stands. A device can't tell a driver that does not want to go on from one whose
/// vCPUs do not run: of a machine that does not run, that is the reason.
fn standing(progress: Progress, machine: RunState) -> (ResizeState, Option<String>) {
    match (progress, machine) {
        (Progress::Reached, _) => (ResizeState::Reached, None),
        // It can go on at any time, and the guest then follows.
        (_, RunState::Paused | RunState::PreLaunch) => (
            ResizeState::Working,
            Some(format!("the guest does not run ({machine})")),
        ),
        (_, RunState::InternalError) => (
            ResizeState::Stalled,
            Some(format!(
                "the guest does not run ({machine}) and needs a system_reset"
            )),
        ),
        (Progress::Working, _) => (ResizeState::Working, None),
        (Progress::Partial(reason), _) => (ResizeState::Partial, Some(reason.to_string())),
        (Progress::Stalled(reason), _) => (ResizeState::Stalled, Some(reason.to_string())),
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
    use ebbtide_virtio::mem::Reason;

    use super::*;

    #[test]
    fn a_guest_that_does_not_run_is_not_blamed() {
        let idle = Progress::Stalled(Reason::DriverIdle);
        let (state, reason) = standing(idle, RunState::Paused);
        assert_eq!(state, ResizeState::Working);
        assert!(reason.unwrap().contains("paused"));
        let (state, reason) = standing(Progress::Working, RunState::InternalError);
        assert_eq!(state, ResizeState::Stalled);
        assert!(reason.unwrap().contains("system_reset"));
        assert_eq!(standing(idle, RunState::Running).0, ResizeState::Stalled);
        assert_eq!(
            standing(Progress::Reached, RunState::Paused),
            (ResizeState::Reached, None)
        );
    }

    #[test]
    fn this_process_is_resident() {
        assert!(super::resident_bytes().unwrap() > 100 * 1024);
    }
}
