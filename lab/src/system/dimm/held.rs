// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A DIMM goes while a disk's request has hold of its memory.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ebbtide_agent::placed::words;
use ebbtide_agent::protocol::{Command, DiskStart, Written};
use serde_json::json;

use super::kept::{PINNED, in_phase, plug, within};
use super::{GUEST, machine, wait_total};
use crate::system::hotplug::{until, wait_for};
use crate::system::{Ground, MIB, STEP_LIMIT, finish, no_acpi_error};
use crate::vmm::Vmm;

/// The request takes this long, in the long form and in the short one.
const HELD: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(15));
/// After the end of the request the DIMM is gone within this.
const SOON: Duration = Duration::from_secs(15);
const DISK: u64 = 16 * MIB;

/// A disk writes, slowly, from memory on a DIMM that is to go. Once the guest waits for the request, which it can't move
/// out of the way; then management does not wait for the guest. Each time the DIMM goes when the request has ended and not
/// before, the disk has got what was in the memory, and the guest's other disk never notices.
pub fn in_flight(ground: &Ground) -> Result<()> {
    let held = if ground.long { HELD.0 } else { HELD.1 };
    let mut vmm = ground.start(&machine(ground, ""))?;
    let other = WorkingDisk::start(&mut vmm, "vda")?;
    let directory = tempfile::tempdir()?;
    let image = directory.path().join("slow.img");
    slow_disk(&mut vmm, &image, held)?;
    let before = vmm.guest().report()?.mem_total;
    for (seed, forced) in [(1, false), (2, true), (3, false)] {
        let what = format!(
            "request {seed}, {}",
            if forced { "by force" } else { "asked" }
        );
        let gone = one_request(&mut vmm, seed, forced, held);
        gone.with_context(|| what.clone())?;
        wait_total(&mut vmm, before, false)?;
        let bytes = fs::read(&image)?;
        let (found, _) = bytes.as_chunks();
        let found = found.iter().map(|word| u64::from_ne_bytes(*word));
        ensure!(
            found
                .zip(words(seed))
                .take(PINNED as usize / 8)
                .all(|(a, b)| a == b),
            "{what}: the disk holds something else than the memory did"
        );
    }
    // Had it been held up, then as long as the request.
    other.stop(&mut vmm, held / 2)?;
    no_acpi_error(&mut vmm)?;
    finish(vmm)
}

fn one_request(vmm: &mut Vmm, seed: u64, forced: bool, held: Duration) -> Result<()> {
    let range = plug(vmm)?;
    let begun = Instant::now();
    let write = vmm.guest().send(Command::WriteFrom {
        path: "/dev/vdb".into(),
        place: within(&range),
        seed,
    })?;
    let in_flight = "read r w < /sys/block/vdb/inflight && [ $w -gt 0 ]";
    until(vmm, "the write is in flight", in_flight)?;
    vmm.qmp().execute("device_del", json!({"id": "dimm0"}))?;
    in_phase(vmm, "dimm0", "guest-offlining")?;
    if forced {
        until(vmm, "all else is off the DIMM", ONLY_PINNED_LEFT)?;
        vmm.qmp()
            .execute("x-ebbtide-device-force", json!({"id": "dimm0"}))?;
        let removal = in_phase(vmm, "dimm0", "draining")?;
        let held = removal["holders"].as_array().map_or(0, Vec::len);
        ensure!(
            held > 0,
            "who has hold of the memory is not named: {removal}"
        );
    }
    ensure!(
        begun.elapsed() < held,
        "the request has ended: this machine is too busy"
    );
    let gone = vmm.qmp().wait_event("DEVICE_DELETED", held + SOON)?;
    ensure!(gone.data["device"] == "dimm0", "{}", gone.data);
    let after = gone.at.saturating_duration_since(begun);
    ensure!(
        after >= held,
        "it has gone after {after:?}, under the request"
    );
    ensure!(after < held + SOON, "it has gone after {after:?}");
    vmm.guest().wait::<Written>(write, GUEST)?;
    vmm.qmp().execute("object-del", json!({"id": "m0"}))?;
    Ok(())
}

/// On memory that can go there is nothing but the pages of the request.
const ONLY_PINNED_LEFT: &str = "cat /proc/sys/vm/stat_refresh; \
     awk '/^Node/ { movable = $4 == \"Movable\" } movable && /nr_zone_(in)?active_/ { pages += $2 } \
     END { exit pages > 16 }' /proc/zoneinfo";

/// The disk vdb on `image`, which takes long for each write.
fn slow_disk(vmm: &mut Vmm, image: &Path, latency: Duration) -> Result<()> {
    File::create(image)?.set_len(DISK)?;
    let rule = format!("fault=delay,op=write,delay-ns={}", latency.as_nanos());
    for node in [
        json!({"driver": "file", "node-name": "medium", "filename": image}),
        json!({"driver": "x-ebbtide-fault", "node-name": "slow", "file": "medium", "rules": [rule]}),
    ] {
        vmm.qmp().execute("blockdev-add", node)?;
    }
    let disk = json!({"driver": "virtio-blk-pci", "id": "slow0", "drive": "slow"});
    vmm.qmp().execute("device_add", disk)?;
    wait_for(vmm, "/dev/vdb", true)
}

/// A disk that the guest works on all the while.
pub(super) struct WorkingDisk {
    name: &'static str,
    _directory: tempfile::TempDir,
}

impl WorkingDisk {
    /// Plugs the disk, which the guest calls `name`, and has it written to and verified.
    pub(super) fn start(vmm: &mut Vmm, name: &'static str) -> Result<WorkingDisk> {
        let directory = tempfile::tempdir()?;
        let image = directory.path().join("image");
        File::create(&image)?.set_len(DISK)?;
        let node = json!({"driver": "file", "node-name": name, "filename": image});
        vmm.qmp().execute("blockdev-add", node)?;
        let disk = json!({"driver": "virtio-blk-pci", "id": name, "drive": name});
        vmm.qmp().execute("device_add", disk)?;
        wait_for(vmm, &format!("/dev/{name}"), true)?;
        vmm.guest().disk_start(DiskStart {
            path: format!("/dev/{name}"),
            seed: 7,
            verify: true,
            pause_us: 2000,
            span_bytes: 0,
        })?;
        Ok(WorkingDisk {
            name,
            _directory: directory,
        })
    }

    /// Ends the work: nothing was wrong, and no operation ended later than `gap` after the one before.
    pub(super) fn stop(self, vmm: &mut Vmm, gap: Duration) -> Result<()> {
        let path = format!("/dev/{}", self.name);
        let status = vmm.guest().disk_stop_verified(&path, STEP_LIMIT)?;
        let longest = Duration::from_millis(status.longest_gap_ms);
        ensure!(status.writes > 0 && longest <= gap, "{path}: {status:?}");
        Ok(())
    }
}
