// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `ctl map`

use ebbtide_qmp::commands::HUMAN_MONITOR_COMMAND;
use ebbtide_qmp::types::monitor::HumanMonitorCommand;
use serde_json::json;

use super::{Failure, Outcome, Session};

pub(super) fn show(session: &mut Session<'_>) -> Result<Outcome, Failure> {
    let mtree = ask(session, "info mtree")?;
    let devices = ask(session, "info memory-devices")?;
    if session.json {
        session.print_json(&json!({"mtree": mtree, "memory_devices": devices}))?;
    } else {
        write!(session.out, "{mtree}")?;
        if !devices.is_empty() {
            write!(session.out, "\n{devices}")?;
        }
    }
    Ok(Outcome::Done)
}

fn ask(session: &mut Session<'_>, line: &str) -> Result<String, Failure> {
    let arguments = HumanMonitorCommand {
        command_line: line.to_owned(),
        cpu_index: None,
    };
    let text = session.client.call(&HUMAN_MONITOR_COMMAND, arguments)?;
    Ok(text.replace("\r\n", "\n"))
}
