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
use super::{GUEST, LOOK, machine, wait_total};
use crate::stalls::Stalls;
use crate::system::hotplug::{release_one, until, wait_for, wait_held};
use crate::system::{Ground, MIB, STEP_LIMIT, finish, no_acpi_error};
use crate::vmm::Vmm;

/// A request is held for so long at least, in the long form and in the short one.
const HELD: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3));
/// After the end of the request the DIMM is gone within this.
const SOON: Duration = Duration::from_secs(15);
/// No operation of the disk that works takes this long, in the long form and in the short one; had it been held up, then
/// for longer.
pub(super) const GAP: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(5));
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
    slow_disk(&mut vmm, &image)?;
    let before = vmm.guest().report()?.mem_total;
    for (seed, forced) in [(1, false), (2, true), (3, false)] {
        let what = format!(
            "request {seed}, {}",
            if forced { "by force" } else { "asked" }
        );
        let gone = one_request(&mut vmm, seed, forced, held, &other);
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
    other.stop(&mut vmm, if ground.long { GAP.0 } else { GAP.1 })?;
    no_acpi_error(&mut vmm)?;
    finish(vmm)
}

fn one_request(
    vmm: &mut Vmm,
    seed: u64,
    forced: bool,
    held: Duration,
    other: &WorkingDisk,
) -> Result<()> {
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
    let phase = if forced {
        "draining"
    } else {
        "guest-offlining"
    };
    std::thread::sleep(held.saturating_sub(begun.elapsed()));
    other.goes_on(vmm).context("while the request is held")?;
    ensure!(
        !vmm.guest().is_answered(write)?,
        "the request has ended, and nobody let it"
    );
    in_phase(vmm, "dimm0", phase)?;
    stays(vmm)?;

    let (stalls, released) = (Stalls::watch(), Instant::now());
    wait_held(vmm, "slow")?;
    release_one(vmm, "slow")?;
    let gone = vmm.qmp().wait_event("DEVICE_DELETED", GUEST)?;
    ensure!(gone.data["device"] == "dimm0", "{}", gone.data);
    let after = gone.at.saturating_duration_since(released);
    stalls.within(SOON, after, "the DIMM's way out after the request")?;
    vmm.guest().wait::<Written>(write, GUEST)?;
    vmm.qmp().execute("object-del", json!({"id": "m0"}))?;
    Ok(())
}

/// No device has gone.
fn stays(vmm: &mut Vmm) -> Result<()> {
    let events = vmm.qmp().take_events()?;
    let gone = events.iter().find(|it| it.name == "DEVICE_DELETED");
    ensure!(
        gone.is_none(),
        "it has gone under the request: {:?}",
        gone.map(|it| &it.data)
    );
    Ok(())
}

/// On memory that can go there is nothing but the pages of the request.
const ONLY_PINNED_LEFT: &str = "cat /proc/sys/vm/stat_refresh; \
     awk '/^Node/ { movable = $4 == \"Movable\" } movable && /nr_zone_(in)?active_/ { pages += $2 } \
     END { exit pages > 16 }' /proc/zoneinfo";

/// The disk vdb on `image`, each write of which waits to be let go.
fn slow_disk(vmm: &mut Vmm, image: &Path) -> Result<()> {
    File::create(image)?.set_len(DISK)?;
    let rule = "fault=hold,op=write";
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
    stalls: Stalls,
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
        let stalls = Stalls::watch();
        vmm.guest().disk_start(DiskStart {
            path: format!("/dev/{name}"),
            seed: 7,
            verify: true,
            pause_us: 2000,
            span_bytes: 0,
        })?;
        Ok(WorkingDisk {
            name,
            stalls,
            _directory: directory,
        })
    }

    /// Waits for a write that begins from now on to end.
    pub(super) fn goes_on(&self, vmm: &mut Vmm) -> Result<()> {
        let path = format!("/dev/{}", self.name);
        let begun = Instant::now();
        let before = vmm.guest().disk_status(&path)?;
        loop {
            let now = vmm.guest().disk_status(&path)?;
            // One may have been under way.
            if now.writes > before.writes + 1 {
                return Ok(());
            }
            ensure!(begun.elapsed() < GUEST, "{before:?}, and then {now:?}");
            std::thread::sleep(LOOK);
        }
    }

    /// Ends the work: nothing was wrong, and no operation ended later than `gap` after the one before.
    pub(super) fn stop(self, vmm: &mut Vmm, gap: Duration) -> Result<()> {
        let path = format!("/dev/{}", self.name);
        let status = vmm.guest().disk_stop_verified(&path, STEP_LIMIT)?;
        let longest = Duration::from_millis(status.longest_gap_ms);
        ensure!(status.writes > 0, "{path}: {status:?}");
        let within = self.stalls.within(gap, longest, "the longest gap");
        within.with_context(|| format!("{path}: {status:?}"))
    }
}
