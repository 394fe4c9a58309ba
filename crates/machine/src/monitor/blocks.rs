// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands about block nodes.

use ebbtide_block::fault::Order;
use ebbtide_qmp::schema::Empty;
use ebbtide_qmp::types::block::BlockDeviceInfo;
use ebbtide_qmp::types::ebbtide::{FaultRelease, FaultReleased};
use ebbtide_qmp::{CommandTable, QmpError, commands};

use crate::hotplug::blocks;
use crate::machine::Machine;

/// Adds them to `table`.
pub(super) fn add(table: CommandTable<Machine>) -> CommandTable<Machine> {
    table
        .on(commands::BLOCKDEV_ADD, async |m, _, options| {
            let devices = &m.devices;
            let failures = &devices.news().disk;
            blocks::add(devices.blocks(), devices.opener(), failures, options).await?;
            Ok(Empty {})
        })
        .on(commands::BLOCKDEV_DEL, async |m, _, args| {
            remove(&m, &args.node_name).await
        })
        .on(commands::EBBTIDE_FAULT_RELEASE, async |m, _, args| {
            release(&m, &args)
        })
        .on(commands::QUERY_NAMED_BLOCK_NODES, async |m, _, _args| {
            Ok(nodes(&m))
        })
}

async fn remove(machine: &Machine, name: &str) -> Result<Empty, QmpError> {
    let node = machine.devices.blocks().remove(name)?;
    // Closing may block: it writes back, it asks a server.
    if let Some(node) = std::rc::Rc::into_inner(node) {
        let disk = node.into_disk();
        machine.devices.blocking().run(move || drop(disk)).await;
    }
    Ok(Empty {})
}

/// Lets go what the faults of a node hold.
fn release(machine: &Machine, args: &FaultRelease) -> Result<FaultReleased, QmpError> {
    let FaultRelease {
        node_name,
        count,
        forget,
    } = args;
    let node = machine
        .devices
        .blocks()
        .get(node_name)
        .ok_or_else(|| QmpError::node_not_found(node_name))?;
    let faults = node.disk().faults().ok_or_else(|| {
        QmpError::generic(format!(
            "Node '{node_name}' holds nothing: it does not stand on an x-ebbtide-fault node"
        ))
    })?;
    if *forget == Some(true) {
        faults.clear();
    }
    let released = match *count {
        None => faults.release(Order::Arrival) as u64,
        // No more than there are now: what is let go may be followed by more.
        Some(count) => (0..count.min(faults.held() as u64))
            .take_while(|_| faults.release_one())
            .count() as u64,
    };
    Ok(FaultReleased {
        released,
        held: faults.held() as u64,
    })
}

fn nodes(machine: &Machine) -> Vec<BlockDeviceInfo> {
    let nodes = machine.devices.blocks().list();
    nodes
        .iter()
        .map(|(_, node, _)| node.info().clone())
        .collect()
}
