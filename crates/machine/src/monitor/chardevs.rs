// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands about character devices and watchdogs.

use ebbtide_qmp::schema::Empty;
use ebbtide_qmp::types::chardev::ChardevReturn;
use ebbtide_qmp::{CommandTable, commands};

use crate::machine::Machine;

/// Adds them to `table`.
pub(super) fn add(table: CommandTable<Machine>) -> CommandTable<Machine> {
    table
        .on(commands::CHARDEV_ADD, async |m, _, args| {
            m.devices.add_chardev(args).await?;
            Ok(ChardevReturn { pty: None })
        })
        .on(commands::CHARDEV_REMOVE, async |m, _, args| {
            m.devices.remove_chardev(&args.id).await?;
            Ok(Empty {})
        })
        .on(commands::QUERY_CHARDEV, async |m, _, Empty {}| {
            Ok(m.devices.chardev_infos(&m.config.serial.chardev()))
        })
        .on(commands::WATCHDOG_SET_ACTION, async |m, _, args| {
            m.devices.set_watchdog_action(args.action)?;
            Ok(Empty {})
        })
}
