// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands about objects, network backends and the balloon.

use std::sync::Arc;

use ebbtide_device::Phase;
use ebbtide_qmp::schema::Empty;
use ebbtide_qmp::types::device::IothreadInfo;
use ebbtide_qmp::types::memory::BalloonInfo;
use ebbtide_qmp::types::net::SetLink;
use ebbtide_qmp::types::qom::ObjectPropertyInfo;
use ebbtide_qmp::{CommandTable, QmpError, commands};
use ebbtide_virtio::balloon::VirtioBalloon;
use ebbtide_virtio::net::VirtioNet;

use crate::hotplug::{Face, Object, drivers, netdevs, shared};
use crate::machine::Machine;

/// Adds them to `table`.
pub(super) fn add(table: CommandTable<Machine>) -> CommandTable<Machine> {
    table
        .on(commands::QOM_LIST_PROPERTIES, async |_, _, args| {
            list_properties(&args.typename)
        })
        .on(commands::QUERY_IOTHREADS, async |m, _, Empty {}| {
            Ok(iothreads(&m))
        })
        .on(commands::NETDEV_ADD, async |m, _, args| {
            netdevs::add(&m.devices, args).await?;
            Ok(Empty {})
        })
        .on(commands::NETDEV_DEL, async |m, _, args| {
            netdevs::remove(&m.devices, &args.id).await?;
            Ok(Empty {})
        })
        .on(commands::SET_LINK, async |m, _, args| set_link(&m, &args))
        .on(commands::QUERY_BALLOON, async |m, _, Empty {}| query(&m))
        .on(commands::BALLOON, async |m, _, args| {
            balloon(&m, args.value)
        })
}

fn list_properties(type_name: &str) -> Result<Vec<ObjectPropertyInfo>, QmpError> {
    let property =
        |(name, kind): &(&'static str, &'static str)| ObjectPropertyInfo::new(*name, *kind);
    if let Some((_, properties)) = shared::TYPES.iter().find(|(name, _)| *name == type_name) {
        return Ok(properties.iter().map(property).collect());
    }
    let driver = drivers::find(type_name).map_err(|_| QmpError::class_not_found(type_name))?;
    Ok(driver.all_properties().map(property).collect())
}

/// What `query-iothreads` answers.
pub(super) fn iothreads(machine: &Machine) -> Vec<IothreadInfo> {
    let mut infos = Vec::new();
    for (id, object, _) in machine.devices.objects().list() {
        let Object::Iothread(iothread) = &*object else {
            continue;
        };
        infos.push(IothreadInfo {
            id,
            thread_id: iothread.thread_id,
            poll_max_ns: 0,
            poll_grow: 0,
            poll_shrink: 0,
            aio_max_batch: 0,
        });
    }
    infos
}

/// The card with this id, or with the network backend of this id.
fn find_card(machine: &Machine, name: &str) -> Option<Arc<VirtioNet>> {
    let tree = machine.devices.tree().borrow();
    tree.iter().find_map(|(_, node)| match &node.info.face {
        Face::Net { card, netdev } => {
            let named = node.identity.id.as_deref() == Some(name) || netdev == name;
            card.upgrade().filter(|_| named)
        }
        _ => None,
    })
}

fn set_link(machine: &Machine, args: &SetLink) -> Result<Empty, QmpError> {
    let card =
        find_card(machine, &args.name).ok_or_else(|| QmpError::device_not_found(&args.name))?;
    card.set_link(args.up);
    Ok(Empty {})
}

fn find_balloon(machine: &Machine) -> Result<Arc<VirtioBalloon>, QmpError> {
    let tree = machine.devices.tree().borrow();
    let mut working = tree
        .iter()
        .filter(|(_, node)| node.phase() < Phase::Draining);
    working
        .find_map(|(_, node)| match &node.info.face {
            Face::Balloon(balloon) => balloon.upgrade(),
            _ => None,
        })
        .ok_or_else(QmpError::no_balloon)
}

/// What the guest has without a balloon.
fn ram_bytes(machine: &Machine) -> u64 {
    machine.boot_ram_bytes() + machine.plugged_bytes()
}

/// What `query-balloon` answers.
pub(super) fn query(machine: &Machine) -> Result<BalloonInfo, QmpError> {
    let actual = find_balloon(machine)?.actual_bytes(ram_bytes(machine));
    Ok(BalloonInfo {
        actual: i64::try_from(actual).unwrap_or(i64::MAX),
    })
}

fn balloon(machine: &Machine, value: i64) -> Result<Empty, QmpError> {
    let balloon = find_balloon(machine)?;
    let size = u64::try_from(value).ok().filter(|size| *size > 0);
    let size = size.ok_or_else(|| {
        QmpError::generic(format!(
            "Parameter 'value' does not accept value '{value}': a size in bytes is expected"
        ))
    })?;
    balloon
        .set_size(size, ram_bytes(machine))
        .map_err(|e| QmpError::generic(e.to_string()))?;
    Ok(Empty {})
}
