// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The VM ends in order: exit code, sockets, children, with memory plugged and a disk at work.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ebbtide_agent::protocol::DiskStart;
use rustix::process::Signal;
use serde_json::Value;

use super::{BOOT_LIMIT, GIB, Ground, MIB, STEP_LIMIT};
use crate::vmm::{Disk, Vmm};

const END_LIMIT: Duration = Duration::from_secs(20);
const DISK: &str = "/dev/vda";

/// SIGTERM and SIGINT (Ctrl-C).
pub fn signals(ground: &Ground) -> Result<()> {
    for (signal, name) in [(Signal::TERM, "SIGTERM"), (Signal::INT, "SIGINT")] {
        let work = tempfile::tempdir()?;
        let mut vmm = busy(ground, work.path())?;
        vmm.process().signal(signal)?;
        let event = vmm.qmp().wait_event("SHUTDOWN", END_LIMIT)?;
        ensure!(
            event.data["reason"] == "host-signal" && event.data["guest"] == false,
            "{name}: SHUTDOWN says {}",
            event.data
        );
        ended_well(vmm).context(name)?;
    }
    Ok(())
}

/// The `quit` command.
pub fn quit(ground: &Ground) -> Result<()> {
    let work = tempfile::tempdir()?;
    let mut vmm = busy(ground, work.path())?;
    vmm.qmp().execute("quit", Value::Null)?;
    let event = vmm.qmp().wait_event("SHUTDOWN", END_LIMIT)?;
    ensure!(
        event.data["reason"] == "host-qmp-quit",
        "SHUTDOWN says {}",
        event.data
    );
    ended_well(vmm)
}

fn busy(ground: &Ground, work: &std::path::Path) -> Result<Vmm> {
    let disk = work.join("disk.img");
    std::fs::File::create(&disk)?.set_len(64 * MIB)?;
    let mut machine = ground.machine(1, 2 * GIB);
    machine.disks.push(Disk {
        id: "disk0".into(),
        path: disk,
        readonly: false,
    });
    let mut vmm = Vmm::start(&machine)?;
    vmm.wait_ready(BOOT_LIMIT)?;
    vmm.guest().disk_start(DiskStart {
        path: DISK.into(),
        seed: 1,
        verify: true,
        pause_us: 0,
        span_bytes: 0,
    })?;
    vmm.resize(2 * GIB, STEP_LIMIT)?;
    Ok(vmm)
}

fn ended_well(mut vmm: Vmm) -> Result<()> {
    let socket = vmm.qmp_path();
    let status = vmm.wait_exit(END_LIMIT)?;
    ensure!(status.success(), "the VMM ended with {status}{}", vmm.log());
    ensure!(!socket.exists(), "{} is left behind", socket.display());
    ensure!(
        !socket.with_file_name("serial").exists(),
        "the serial socket is left behind"
    );
    Ok(())
}
