// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Disks that hold requests until they are told to let go: what is looked at meanwhile stays as it is, however slow or fast
//! the VMM, the guest and the test are.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{GUEST, LOOK};
use crate::system::MIB;
use crate::vmm::Vmm;

/// What each of these disks holds.
const SIZE: u64 = 64 * MIB;

/// Node `n0` on the medium `m0`, which holds by `rule`.
pub(in crate::system) fn holding(rule: &str) -> [Value; 2] {
    let medium = json!({"driver": "null-co", "node-name": "m0", "size": SIZE});
    let rules = [format!("fault=hold,{rule}")];
    let node =
        json!({"driver": "x-ebbtide-fault", "node-name": "n0", "file": "m0", "rules": rules});
    [medium, node]
}

/// Waits until `node` holds an operation: it has come to the backend, not only to the guest's queue.
pub(in crate::system) fn wait_held(vmm: &mut Vmm, node: &str) -> Result<()> {
    let begun = Instant::now();
    while held_by(vmm, node)? == 0 {
        ensure!(begun.elapsed() < GUEST, "{node} holds nothing");
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// How many operations a node holds; none is let go.
fn held_by(vmm: &mut Vmm, node: &str) -> Result<u64> {
    let none = json!({"node-name": node, "count": 0});
    let answer = vmm.qmp().execute("x-ebbtide-fault-release", none)?;
    answer["held"].as_u64().context("held")
}

/// Lets go of the one operation that `node` holds.
pub(in crate::system) fn release_one(vmm: &mut Vmm, node: &str) -> Result<()> {
    let node = json!({"node-name": node});
    let released = vmm.qmp().execute("x-ebbtide-fault-release", node)?;
    let one = json!({"released": 1, "held": 0});
    ensure!(released == one, "released: {released}");
    Ok(())
}

/// Deletes `n0` and `m0`, which nothing uses any more.
pub(in crate::system) fn delete(vmm: &mut Vmm) -> Result<()> {
    for node in ["n0", "m0"] {
        vmm.qmp()
            .execute("blockdev-del", json!({"node-name": node}))?;
    }
    Ok(())
}
