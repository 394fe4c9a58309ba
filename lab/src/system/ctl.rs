// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an operator types: `ebbtide ctl` plugs and unplugs, and its exit codes say how that went.

mod network;

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::hotplug::wait_for;
use super::{BOOT, Ground, MIB, finish};
use crate::vmm::Vmm;
pub use network::user_network;

fn command(ground: &Ground, vmm: &Vmm, arguments: &[&str]) -> Command {
    let mut command = Command::new(&ground.ebbtide);
    command
        .arg("ctl")
        .arg("--json")
        .arg("--qmp")
        .arg(vmm.qmp_path())
        .args(arguments);
    command
}

/// What a command printed, if it ended with `code`.
fn ctl(ground: &Ground, vmm: &Vmm, arguments: &[&str], code: i32) -> Result<Value> {
    let output = command(ground, vmm, arguments).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.code() == Some(code),
        "ctl {arguments:?} ended with {}, not {code}: {said}",
        output.status
    );
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    match printed.trim() {
        "" => Ok(Value::String(said)),
        json => serde_json::from_str(json).with_context(|| format!("ctl {arguments:?}: {json}")),
    }
}

/// DIMMs and disks come and go by hand.
pub fn by_hand(ground: &Ground) -> Result<()> {
    let mut machine = ground.machine(1, BOOT);
    machine.memory_slots = 2;
    let mut vmm = ground.start(&machine)?;
    let directory = tempfile::tempdir()?;
    let image = directory.path().join("data.img");
    std::fs::File::create(&image)?.set_len(64 * MIB)?;
    let path = |path: &Path| path.to_string_lossy().into_owned();

    ctl(ground, &vmm, &["plug-dimm", "128M", "--id", "d0"], 0)?;
    let memory = ctl(ground, &vmm, &["memory"], 0)?;
    ensure!(memory["plugged"] == json!(128 * MIB), "{memory}");
    ctl(
        ground,
        &vmm,
        &["disk", "add", &path(&image), "--id", "data"],
        0,
    )?;
    wait_for(&mut vmm, "/dev/vda", true)?;

    let taken = ctl(
        ground,
        &vmm,
        &["disk", "add", &path(&image), "--id", "data"],
        1,
    )?;
    ensure!(taken.to_string().contains("data"), "{taken}");
    let taken = ctl(
        ground,
        &vmm,
        &["disk", "add", &path(&image), "--id", "other"],
        1,
    )?;
    ensure!(taken.to_string().contains("data.img"), "{taken}");
    let unknown = ctl(ground, &vmm, &["unplug", "nope", "--wait"], 1)?;
    ensure!(unknown.to_string().contains("nope"), "{unknown}");
    let odd = ctl(ground, &vmm, &["plug-dimm", "100M"], 1)?;
    ensure!(odd.to_string().contains("0x8000000"), "{odd}");
    ctl(ground, &vmm, &["plug-dimm", "much"], 2)?;

    let gone = ctl(
        ground,
        &vmm,
        &["disk", "remove", "data", "--wait", "--timeout", "30"],
        0,
    )?;
    ensure!(gone["result"] == json!("deleted"), "{gone}");
    wait_for(&mut vmm, "/dev/vda", false)?;
    let gone = ctl(
        ground,
        &vmm,
        &["unplug", "d0", "--wait", "--timeout", "30"],
        0,
    )?;
    ensure!(gone["result"] == json!("deleted"), "{gone}");
    let memory = ctl(ground, &vmm, &["memory"], 0)?;
    ensure!(memory["plugged"] == json!(0), "{memory}");
    // What the commands made for the devices has gone with them.
    for (what, command) in [
        ("nodes", "query-named-block-nodes"),
        ("backends", "query-memdev"),
    ] {
        let left = vmm.qmp().execute(command, Value::Null)?;
        ensure!(left == json!([]), "{what} are left: {left}");
    }
    finish(vmm)
}
