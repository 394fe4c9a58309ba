// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands about devices that come and go.

use std::time::{Duration, Instant};

use ebbtide_device::{Holder, Node, NodeId, Phase};
use ebbtide_qmp::schema::Empty;
use ebbtide_qmp::types::device::{DeviceAdd, DevicePath};
use ebbtide_qmp::types::ebbtide::{
    Removal, RemovalHolder, RemovalPhase, RemovalStep, Wait, WaitPhase, Waited,
};
use ebbtide_qmp::types::events;
use ebbtide_qmp::types::qom::{ObjectPropertyInfo, ObjectTypeInfo};
use ebbtide_qmp::{CommandTable, QmpError, commands};

use crate::hotplug::{Info, MEMORY_BACKENDS, dimm, drivers, shared};
use crate::machine::Machine;

/// Adds them to `table`.
pub(super) fn add(table: CommandTable<Machine>) -> CommandTable<Machine> {
    table
        .on(commands::DEVICE_ADD, async |m, _, args| {
            device_add(&m, args).await
        })
        .on(commands::DEVICE_DEL, async |m, _, args| {
            device_del(&m, &args.id)
        })
        .on(commands::DEVICE_LIST_PROPERTIES, async |_, _, args| {
            list_properties(&args.typename)
        })
        .on(commands::QOM_LIST_TYPES, async |_, _, args| {
            Ok(list_types(args.implements.as_deref()))
        })
        .on(commands::EBBTIDE_QUERY_REMOVALS, async |m, _, Empty {}| {
            Ok(removals(&m))
        })
        .on(commands::EBBTIDE_WAIT, async |m, _, args| {
            wait(&m, args).await
        })
        .waits(commands::EBBTIDE_WAIT)
        .on(commands::EBBTIDE_DEVICE_FORCE, async |m, _, args| {
            force(&m, &args.id)
        })
        .on(commands::EBBTIDE_DEVICE_CANCEL, async |m, _, args| {
            cancel(&m, &args.id)
        })
        .on(commands::EBBTIDE_DEVICE_ANNOUNCE, async |m, _, args| {
            announce(&m, &args.id)
        })
}

async fn device_add(machine: &Machine, args: DeviceAdd) -> Result<Empty, QmpError> {
    machine.devices.device_add(args, false).await?;
    Ok(Empty {})
}

/// The device with this id or path.
fn find(machine: &Machine, id: &str) -> Result<NodeId, QmpError> {
    let tree = machine.devices.tree().borrow();
    let by_path = || {
        let mut nodes = tree.iter();
        nodes
            .find(|(_, node)| node.identity.path == id)
            .map(|(node, _)| node)
    };
    tree.by_id(id)
        .or_else(by_path)
        .ok_or_else(|| QmpError::device_not_found(id))
}

fn device_del(machine: &Machine, id: &str) -> Result<Empty, QmpError> {
    let node = find(machine, id)?;
    machine.devices.request_removal(node)?;
    Ok(Empty {})
}

fn cancel(machine: &Machine, id: &str) -> Result<Empty, QmpError> {
    let node = find(machine, id)?;
    if !machine.devices.cancel_removal(node) {
        return Err(QmpError::generic(format!(
            "Device '{id}' has no removal that can be cancelled"
        )));
    }
    machine.devices.refused(node);
    Ok(Empty {})
}

fn force(machine: &Machine, id: &str) -> Result<Empty, QmpError> {
    let node = find(machine, id)?;
    machine.devices.force(node)?;
    Ok(Empty {})
}

fn announce(machine: &Machine, id: &str) -> Result<Empty, QmpError> {
    let node = find(machine, id)?;
    machine.devices.announce(node)?;
    Ok(Empty {})
}

fn list_properties(type_name: &str) -> Result<Vec<ObjectPropertyInfo>, QmpError> {
    let property =
        |(name, kind): &(&'static str, &'static str)| ObjectPropertyInfo::new(*name, *kind);
    if type_name == dimm::DRIVER {
        return Ok(dimm::PROPERTIES.iter().map(property).collect());
    }
    // Without the reason why there is none: QEMU's class, by which clients see whether there is one.
    let driver = drivers::find(type_name).map_err(|_| QmpError::device_not_found(type_name))?;
    Ok(driver.all_properties().map(property).collect())
}

fn list_types(implements: Option<&str>) -> Vec<ObjectTypeInfo> {
    let of = |parent: &str, name: &str| ObjectTypeInfo {
        name: name.to_owned(),
        is_abstract: None,
        parent: Some(parent.to_owned()),
    };
    let device = |name: &str| of("device", name);
    let object = |name: &str| of("object", name);
    let devices = drivers::names().chain([dimm::DRIVER]).map(device);
    let shared = shared::TYPES.iter().map(|(name, _)| *name);
    let objects = MEMORY_BACKENDS.iter().copied().chain(shared).map(object);
    match implements {
        Some("device") => devices.collect(),
        None | Some("object") => devices.chain(objects).collect(),
        // Nothing else is a type that others implement.
        Some(_) => Vec::new(),
    }
}

fn removals(machine: &Machine) -> Vec<Removal> {
    let now = machine.local.now();
    let tree = machine.devices.tree().borrow();
    tree.iter()
        .filter(|(_, node)| node.phase() != Phase::Plugged)
        .map(|(_, node)| removal(node, now))
        .collect()
}

fn removal(node: &Node<Info>, now: Instant) -> Removal {
    let history = node.history();
    // A request that was withdrawn before is another story.
    let last_plugged = history
        .iter()
        .rposition(|(phase, _)| *phase == Phase::Plugged);
    let steps = history.iter().skip(last_plugged.map_or(0, |at| at + 1));
    let began = steps.clone().next().map_or(now, |(_, at)| *at);
    let holders = match node.model() {
        Some(model) if node.phase() >= Phase::Draining => model.holders(),
        _ => node.holders().to_vec(),
    };
    Removal {
        id: node.identity.id.clone(),
        path: node.identity.path.clone(),
        phase: phase(node.phase()),
        age_ms: millis(now.saturating_duration_since(began)),
        holders: holders.iter().map(holder).collect(),
        history: steps
            .map(|(step, at)| RemovalStep {
                phase: phase(*step),
                ms: millis(at.saturating_duration_since(began)),
            })
            .collect(),
    }
}

fn holder(holder: &Holder) -> RemovalHolder {
    RemovalHolder {
        what: holder.what.clone(),
        age_ms: holder.age.map(millis),
    }
}

fn phase(phase: Phase) -> RemovalPhase {
    match phase {
        Phase::Plugged => RemovalPhase::Plugged,
        Phase::Requested => RemovalPhase::Requested,
        Phase::GuestOfflining => RemovalPhase::GuestOfflining,
        Phase::Draining => RemovalPhase::Draining,
        Phase::Quarantined => RemovalPhase::Quarantined,
        Phase::Detached => RemovalPhase::Detached,
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Waits until a removal has come far enough, or can't come there any more.
async fn wait(machine: &Machine, args: Wait) -> Result<Waited, QmpError> {
    let node = find(machine, &args.id)?;
    let began = machine.local.now();
    let limit = match args.timeout {
        None => None,
        Some(seconds) => Some(Duration::try_from_secs_f64(seconds).map_err(|_| {
            // In the short form: the largest number has 309 digits before its point.
            QmpError::generic(format!(
                "Parameter 'timeout' expects a number of seconds from 0 to 1e19, not {seconds:e}"
            ))
        })?),
    };
    let arrival = machine.devices.arrival(node, args.phase);
    let arrived = match limit {
        None => arrival.await,
        Some(limit) => machine
            .local
            .timeout(limit, arrival)
            .await
            .map_err(|_| timed_out(machine, node, &args))?,
    };
    let elapsed = machine.local.now().saturating_duration_since(began);
    match arrived {
        Some(phase) => Ok(Waited {
            phase,
            elapsed_ms: millis(elapsed),
        }),
        None => Err(QmpError::generic(format!(
            "Device '{}' stays plugged in: the guest keeps it, or the removal was cancelled",
            args.id
        ))),
    }
}

fn timed_out(machine: &Machine, node: NodeId, args: &Wait) -> QmpError {
    let tree = machine.devices.tree().borrow();
    let phase = tree.get(node).map_or("gone", |node| node.phase().name());
    QmpError::generic(format!(
        "Device '{}' is not {} within {} s: it is {phase}",
        args.id,
        wait_name(args.phase),
        args.timeout.unwrap_or_default()
    ))
}

fn wait_name(phase: WaitPhase) -> &'static str {
    match phase {
        WaitPhase::Isolated => "isolated",
        WaitPhase::Drained => "drained",
        WaitPhase::Detached => "detached",
        WaitPhase::Deleted => "deleted",
    }
}

impl crate::hotplug::Devices {
    /// Tells management that the guest keeps a device.
    pub(crate) fn refused(&self, node: NodeId) {
        let tree = self.tree().borrow();
        let Some(node) = tree.get(node) else { return };
        self.emit(events::DEVICE_UNPLUG_GUEST_ERROR.with(DevicePath {
            device: node.identity.id.clone(),
            path: node.identity.path.clone(),
        }));
    }
}

#[cfg(test)]
mod tests {
    use ebbtide_qmp::ErrorClass;

    use super::*;

    #[test]
    fn each_model_is_listed_and_has_the_properties_that_are_listed() {
        let devices = list_types(Some("device"));
        let named = |name: &str| devices.iter().any(|device| device.name == name);
        assert!(named("virtio-blk-pci") && named("pc-dimm") && !named("iothread"));
        assert_eq!(list_types(None).len(), list_types(Some("object")).len());
        assert!(list_types(None).len() > devices.len());
        assert!(list_types(Some("nothing")).is_empty());
        for device in &devices {
            let properties = list_properties(&device.name).unwrap();
            let mut names: Vec<&str> = properties.iter().map(|it| &*it.name).collect();
            names.sort_unstable();
            let all = names.len();
            names.dedup();
            assert_eq!(names.len(), all, "{}: one is listed twice", device.name);
        }
        let disk = list_properties("virtio-blk-pci").unwrap();
        for (name, kind) in [("drive", "str"), ("num-queues", "uint16"), ("addr", "str")] {
            let found = disk.iter().find(|it| it.name == name);
            assert_eq!(found.map(|it| &*it.type_name), Some(kind), "{name}");
        }
        let unknown = list_properties("nope").unwrap_err();
        assert!(unknown.desc.contains("'nope'"), "{}", unknown.desc);
        assert_eq!(unknown.class, ErrorClass::DeviceNotFound);
    }
}
