// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The models that come and go: a line for each says how it is made, seen and used.

mod legacy;

use std::path::Path;

use anyhow::{Result, ensure};
use ebbtide_agent::protocol::{Command, DiskStart, DiskStatus};
use serde_json::{Value, json};

use crate::system::{MIB, STEP_LIMIT};
use crate::vmm::Vmm;

/// A model of device and a use of it.
pub struct Model {
    /// Its driver's name.
    pub driver: &'static str,
    /// What it needs before it can be made.
    pub prepare: fn(&mut Vmm, &Path) -> Result<()>,
    /// Its properties.
    pub arguments: fn() -> Value,
    /// A path in the guest that is there as long as the device is.
    pub present: &'static str,
    /// The guest begins to use it.
    pub start: fn(&mut Vmm) -> Result<()>,
    /// The device has gone under the use.
    pub stop: fn(&mut Vmm) -> Result<()>,
    /// Takes back what was prepared.
    pub clean_up: fn(&mut Vmm) -> Result<()>,
}

/// All of them.
pub const ALL: &[Model] = &[
    BLK,
    legacy::SERIAL,
    legacy::WATCHDOG,
    legacy::TEST_DEVICE,
    legacy::SHARED_MEMORY,
];

/// Models with I/O BARs: bridges forward no ports.
pub const ROOT_BUS_ONLY: &[&str] = &["pci-serial"];

/// Models whose driver not every kernel has, with the module.
const MODULES: &[(&str, &str)] = &[("i6300esb", "i6300esb.ko")];

const BLK: Model = Model {
    driver: "virtio-blk-pci",
    prepare: disk_image,
    arguments: || json!({"drive": "image"}),
    present: "/dev/vda",
    start: write_disk,
    stop: disk_is_gone,
    clean_up: |vmm| node_gone(vmm, "image"),
};

impl Model {
    /// The module this guest would need for it and does not have.
    pub fn missing_module(&self, vmm: &mut Vmm) -> Result<Option<&'static str>> {
        let named = MODULES.iter().find(|(driver, _)| *driver == self.driver);
        let Some((_, module)) = named else {
            return Ok(None);
        };
        let list = vmm
            .guest()
            .exec(&["/bin/busybox", "cat", "/modules/list"], STEP_LIMIT)?;
        ensure!(list.code == Some(0), "{list:?}");
        let loaded = list.output.lines().any(|line| line == *module);
        Ok((!loaded).then_some(*module))
    }
}

fn disk_image(vmm: &mut Vmm, ground: &Path) -> Result<()> {
    let path = ground.join("image");
    std::fs::File::create(&path)?.set_len(64 * MIB)?;
    let node = json!({"driver": "file", "node-name": "image", "filename": path});
    vmm.qmp().execute("blockdev-add", node)?;
    Ok(())
}

fn node_gone(vmm: &mut Vmm, name: &str) -> Result<()> {
    vmm.qmp()
        .execute("blockdev-del", json!({"node-name": name}))?;
    Ok(())
}

/// Writes and verifies, and goes on with that.
fn write_disk(vmm: &mut Vmm) -> Result<()> {
    let guest = vmm.guest();
    guest.disk_start(DiskStart {
        path: "/dev/vda".into(),
        seed: 7,
        verify: true,
        pause_us: 0,
        span_bytes: 0,
    })?;
    let verified: DiskStatus = guest.call(
        Command::DiskVerify {
            path: "/dev/vda".into(),
        },
        STEP_LIMIT,
    )?;
    ensure!(verified.ok, "{verified:?}");
    Ok(())
}

/// What was under way has ended, well or with an error; nothing that was completed was wrong.
fn disk_is_gone(vmm: &mut Vmm) -> Result<()> {
    let status: DiskStatus = vmm.guest().call(
        Command::DiskStop {
            path: "/dev/vda".into(),
            verify: false,
        },
        STEP_LIMIT,
    )?;
    ensure!(status.mismatches == 0, "{status:?}");
    ensure!(status.writes > 0, "nothing was written: {status:?}");
    Ok(())
}
