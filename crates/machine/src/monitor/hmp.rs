// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The monitor commands people type, through `human-monitor-command`.
//!
//! An error is an answer like any other here: text for a person.

use std::fmt::Write;

use ebbtide_qmp::types::memory::MemoryDeviceInfo;
use ebbtide_qmp::types::run_state::{RunState, ShutdownCause};
use ebbtide_qmp::{QmpError, sizes};

use super::{go, memory, qom, stop};
use crate::lifecycle::Request;
use crate::machine::Machine;

const HELP: &str = "\
cont -- resume emulation
help -- show this list
info mtree [-f] -- memory regions, or the flat views of them
info ramblock -- RAM blocks
info memory-devices -- memory devices
info memory_size_summary -- memory at boot and plugged
info status -- whether the guest runs
qom-get path property -- print a property
qom-list path -- list the properties of an object
qom-set path property value -- set a property; sizes may have a suffix
quit -- end the VM
stop -- stop emulation
system_powerdown -- press the power button
system_reset -- reset the machine
";

/// Runs one command line.
pub(super) async fn run(machine: &Machine, line: &str) -> Result<String, QmpError> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let done = match words.as_slice() {
        [] => Ok(String::new()),
        ["help" | "?"] => Ok(HELP.into()),
        ["info"] => Ok(HELP.lines().filter(|l| l.starts_with("info")).fold(
            String::new(),
            |mut text, line| {
                text.push_str(line);
                text.push('\n');
                text
            },
        )),
        ["info", rest @ ..] => info(machine, rest),
        ["stop"] => stop(machine).await.map(|_| String::new()),
        ["cont" | "c"] => go(machine).await.map(|_| String::new()),
        ["system_reset"] => {
            machine.requests().reset(ShutdownCause::HostQmpSystemReset);
            Ok(String::new())
        }
        ["system_powerdown"] => {
            machine.requests().send(Request::PowerButton);
            Ok(String::new())
        }
        ["quit" | "q"] => {
            machine.requests().shutdown(ShutdownCause::HostQmpQuit);
            Ok(String::new())
        }
        ["qom-get", path, property] => qom::get_text(machine, path, property).map(|t| t + "\r\n"),
        ["qom-list", path] => qom::list_text(machine, path),
        ["qom-set", path, property, value] => {
            qom::set_text(machine, path, property, value).map(|_| String::new())
        }
        [command, ..] => Ok(format!("unknown command: '{command}'\r\n")),
    };
    Ok(done.unwrap_or_else(|e| format!("Error: {}\r\n", e.desc)))
}

fn info(machine: &Machine, words: &[&str]) -> Result<String, QmpError> {
    Ok(match words {
        ["mtree"] => machine.memory().mtree(false),
        ["mtree", "-f"] => machine.memory().mtree(true),
        ["ramblock"] => machine.memory().ram().dump(),
        ["memory-devices"] => memory_devices(machine),
        ["memory_size_summary"] => {
            let summary = memory::summary(machine);
            let plugged = summary.plugged_memory.unwrap_or(0);
            format!(
                "base memory: {}\r\nplugged memory: {plugged}\r\n",
                summary.base_memory
            )
        }
        ["status"] => match machine.state() {
            RunState::Running => "VM status: running\r\n".into(),
            RunState::Paused => "VM status: paused\r\n".into(),
            other => format!("VM status: paused ({other})\r\n"),
        },
        _ => format!("unknown command: 'info {}'\r\n", words.join(" ")),
    })
}

fn memory_devices(machine: &Machine) -> String {
    let mut text = String::new();
    for device in memory::devices(machine) {
        let MemoryDeviceInfo::VirtioMem(d) = device;
        // Writing to a String can't fail.
        let _ = write!(
            text,
            "Memory device [virtio-mem]: \"{}\"\r\n  memaddr: {:#x}\r\n  node: {}\r\n  requested-size: {}\r\n  size: {}\r\n  max-size: {}\r\n  block-size: {}\r\n  memdev: {}\r\n",
            d.id.as_deref().unwrap_or(""),
            d.memaddr,
            d.node,
            d.requested_size,
            d.size,
            d.max_size,
            sizes::exact(d.block_size),
            d.memdev
        );
    }
    text
}
