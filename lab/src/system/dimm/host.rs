// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DIMMs whose memory the host can't provide: a file system is full, a file is cut short.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command as Program;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ebbtide_agent::protocol::{Command, Filled};
use serde_json::{Value, json};

use super::{GUEST, LOOK, SECTION, machine, said, wait_total};
use crate::stalls::Stalls;
use crate::system::{BOOT_LIMIT, Ground, MIB, finish};
use crate::vmm::Vmm;

/// What the file system holds: a DIMM and a little.
const ROOM: u64 = 160 * MIB;
/// What others put on it.
const FILLER: u64 = 112 * MIB;
/// What the guest uses of its DIMM then, which is more than is left.
const USED: u64 = 96 * MIB;
/// A guest whose memory is lost is stopped within this.
const STOP: Duration = Duration::from_secs(10);
/// One that waits for memory is seen to for so long, in the long form and in the short one.
const WAITS: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(3));

/// A small file system in memory.
struct Small(tempfile::TempDir);

impl Small {
    fn mount() -> Result<Small> {
        let directory = tempfile::tempdir()?;
        let options = format!("size={ROOM}");
        let mounted = Program::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "none"])
            .arg(directory.path())
            .output()
            .context("mount")?;
        ensure!(
            mounted.status.success(),
            "a file system of {ROOM} bytes can't be mounted, which takes root: {}",
            String::from_utf8_lossy(&mounted.stderr)
        );
        Ok(Small(directory))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Lazily: the VMM may still have the file.
        let _ = Program::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

/// A file system has no room for a DIMM: that is refused. It had, and others fill it: the log warns, who uses memory in
/// the guest that can't be had waits, everything else goes on, and so does the guest once there is room.
pub fn full(ground: &Ground) -> Result<()> {
    let small = Small::mount()?;
    let file = small.file("dimm");
    let mut vmm = ground.start(&machine(ground, ""))?;
    for prealloc in [false, true] {
        let mut object = backend(&file);
        object["size"] = json!(2 * SECTION);
        object["prealloc"] = json!(prealloc);
        let Err(error) = vmm.qmp().execute("object-add", object) else {
            bail!("{} bytes are had of a file system of {ROOM}", 2 * SECTION);
        };
        let error = format!("{error:#}");
        for word in ["m0", &*file.to_string_lossy(), "is full"] {
            ensure!(error.contains(word), "{word} is not named: {error}");
        }
        ensure!(!file.exists(), "the file that was made stays");
    }

    plug(&mut vmm, &file)?;
    let filler = small.file("filler");
    fs::write(&filler, vec![1; usize::try_from(FILLER)?])?;
    said(
        &mut vmm,
        &["m0", &file.to_string_lossy(), "is full", "wait"],
    )?;
    let fill = Command::Fill {
        bytes: USED,
        seed: 1,
    };
    let filled = vmm.guest().send(fill)?;
    no_room(&small)?;
    let (begun, waits) = (Instant::now(), if ground.long { WAITS.0 } else { WAITS.1 });
    while begun.elapsed() < waits {
        vmm.qmp().execute("query-memory-devices", Value::Null)?;
        ensure!(vmm.status()? == "running", "the VM is {}", vmm.status()?);
        ensure!(
            !vmm.guest().is_answered(filled)?,
            "more than there is was filled"
        );
        std::thread::sleep(LOOK);
    }
    fs::remove_file(filler)?;
    vmm.guest().wait::<Filled>(filled, GUEST)?;
    vmm.guest().check(GUEST)?;
    vmm.guest().free()?;
    finish(vmm)
}

/// The file of a DIMM is cut short while the guest has it.
pub fn truncated(ground: &Ground) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("dimm");
    let mut vmm = ground.start(&machine(ground, ""))?;
    plug(&mut vmm, &file)?;
    vmm.guest().fill(SECTION / 2, 1, GUEST)?;
    vmm.guest().check(GUEST)?;
    File::options().write(true).open(&file)?.set_len(0)?;
    stopped(&mut vmm)?;
    said(&mut vmm, &["m0", &file.to_string_lossy(), "0 bytes"])?;
    let refused = vmm.qmp().execute("cont", Value::Null);
    ensure!(refused.is_err(), "the guest goes on");
    vmm.qmp().execute("query-memory-devices", Value::Null)?;
    // The same file, whole again, is memory again.
    File::options().write(true).open(&file)?.set_len(SECTION)?;
    vmm.qmp().execute("system_reset", Value::Null)?;
    vmm.wait_ready(BOOT_LIMIT)?;
    vmm.guest().fill(SECTION / 2, 2, GUEST)?;
    vmm.guest().check(GUEST)?;
    vmm.guest().free()?;
    finish(vmm)
}

fn backend(file: &Path) -> Value {
    json!({"qom-type": "memory-backend-file", "id": "m0", "size": SECTION, "mem-path": file, "share": true})
}

fn plug(vmm: &mut Vmm, file: &Path) -> Result<()> {
    let before = vmm.guest().report()?.mem_total;
    vmm.qmp().execute("object-add", backend(file))?;
    let dimm = json!({"driver": "pc-dimm", "id": "dimm0", "memdev": "m0"});
    vmm.qmp().execute("device_add", dimm)?;
    wait_total(vmm, before + SECTION, true)?;
    ensure!(fs::metadata(file)?.len() == SECTION, "the file is shorter");
    Ok(())
}

/// Waits until the guest has used what there was.
fn no_room(small: &Small) -> Result<()> {
    let begun = Instant::now();
    loop {
        let left = rustix::fs::statvfs(small.0.path()).context("statvfs")?;
        if left.f_bavail == 0 {
            return Ok(());
        }
        ensure!(begun.elapsed() < GUEST, "{} blocks are left", left.f_bavail);
        std::thread::sleep(LOOK);
    }
}

/// The guest is stopped.
fn stopped(vmm: &mut Vmm) -> Result<()> {
    let (stalls, begun) = (Stalls::watch(), Instant::now());
    loop {
        let status = vmm.status()?;
        if status == "internal-error" {
            return Ok(());
        }
        stalls.within(STOP, begun.elapsed(), &format!("a stop from {status}"))?;
        std::thread::sleep(LOOK);
    }
}
