// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands about block nodes.

use ebbtide_qmp::schema::Empty;
use ebbtide_qmp::types::block::BlockDeviceInfo;
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

fn nodes(machine: &Machine) -> Vec<BlockDeviceInfo> {
    let nodes = machine.devices.blocks().list();
    nodes
        .iter()
        .map(|(_, node, _)| node.info().clone())
        .collect()
}
