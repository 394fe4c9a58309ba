// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Running the lab: real guests, on this machine's KVM or in the capsule.

use std::process::Command;

use anyhow::Result;

use crate::build;

/// The lab's command `task`, with Ebbtide built beside it.
///
/// # Errors
/// When a build fails.
pub fn command(task: &str) -> Result<Command> {
    let bin = build::release(&["ebbtide", "ebbtide-lab"])?;
    let mut command = Command::new(bin.join("ebbtide-lab"));
    command
        .current_dir(build::root())
        .arg(task)
        .arg("--ebbtide")
        .arg(bin.join("ebbtide"))
        .arg("--out")
        .arg(build::target_dir());
    Ok(command)
}

/// Builds Ebbtide and the lab, and what the lab's tasks need.
///
/// # Errors
/// When a build fails, or something is not to be had.
pub fn prepare() -> Result<()> {
    build::run(&mut command("prepare")?)
}
