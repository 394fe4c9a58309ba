// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guests that keep a DIMM for a while: their kernel tries for ever, or refuses, until what stands in the way is gone.

use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ebbtide_agent::protocol::{Command, PinnedMemory, Place};
use serde_json::{Value, json};

use super::held::{GAP, WorkingDisk};
use super::{GUEST, LOOK, SECTION, machine, said, wait_for_end, wait_total};
use crate::stalls::Stalls;
use crate::system::hotplug::{deleted, shell};
use crate::system::{BOOT, GIB, Ground, STEP_LIMIT, finish, no_acpi_error};
use crate::vmm::Vmm;

/// The guest's kernel is watched while it tries, in the long form and in the short one.
const TRIES: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(4));
/// How much memory is in the way: what a pipe takes.
pub(super) const PINNED: u64 = 64 << 10;
/// The monitor answers within this, whatever the guest does.
const ANSWER: Duration = Duration::from_secs(1);
/// Part of a block that the guest has already comes within this.
const PART: Duration = Duration::from_secs(10);
const MILLISECOND: Duration = Duration::from_millis(1);
/// A guest that refuses says so within this.
const REFUSAL: Duration = Duration::from_secs(5);

/// What the guest's kernel can't move keeps a DIMM of memory that it should be able to: it tries for ever and says
/// nothing. The removal tells how far it is and since when, all else works, and once the memory is let go of the DIMM goes.
pub fn no_answer(ground: &Ground) -> Result<()> {
    let tries = if ground.long { TRIES.0 } else { TRIES.1 };
    let mut machine = machine(ground, "");
    machine.max_bytes = Some(BOOT + GIB);
    let mut vmm = ground.start(&machine)?;
    let disk = WorkingDisk::start(&mut vmm, "vda")?;
    let before = vmm.guest().report()?.mem_total;
    let range = plug(&mut vmm)?;
    pin(&mut vmm, &range)?;
    // The kernel holds its lock of hot-plug while it tries: virtio-mem works in blocks of memory that are there.
    vmm.resize(BOOT + SECTION / 2, STEP_LIMIT)?;
    wait_total(&mut vmm, before + SECTION + SECTION / 2, true)?;
    online(&mut vmm)?;

    let stalls = Stalls::watch();
    let asked = Instant::now();
    vmm.qmp().execute("device_del", json!({"id": "dimm0"}))?;
    let begun = asked..Instant::now();
    in_phase(&mut vmm, "dimm0", "guest-offlining")?;
    let took = vmm.resize(BOOT + SECTION, STEP_LIMIT);
    let took = took.context("virtio-mem while the DIMM is to go")?;
    stalls.within(PART, took, "virtio-mem while the DIMM is to go")?;
    watch(&mut vmm, &begun, tries)?;
    disk.goes_on(&mut vmm)?;
    let said = vmm.qmp().execute("query-acpi-ospm-status", Value::Null)?;
    ensure!(said[0]["status"] == 0x84, "{}", said[0]);
    // What it can't do now it does later.
    vmm.request_total(BOOT + GIB)?;
    // It may be asked again.
    vmm.qmp().execute("device_del", json!({"id": "dimm0"}))?;

    vmm.guest().call::<PinnedMemory>(Command::Unpin, GUEST)?;
    deleted(&mut vmm, "dimm0")?;
    vmm.qmp().execute("object-del", json!({"id": "m0"}))?;
    vmm.wait_total(BOOT + GIB, STEP_LIMIT)
        .context("the target that was set meanwhile")?;
    vmm.resize(BOOT, STEP_LIMIT)?;
    wait_total(&mut vmm, before, false)?;
    disk.stop(&mut vmm, if ground.long { GAP.0 } else { GAP.1 })?;
    no_acpi_error(&mut vmm)?;
    finish(vmm)
}

/// Waits until the guest uses all memory that it has.
fn online(vmm: &mut Vmm) -> Result<()> {
    let begun = Instant::now();
    loop {
        let blocks = vmm.guest().report()?.blocks;
        if blocks.offline == 0 {
            return Ok(());
        }
        ensure!(begun.elapsed() < GUEST, "{blocks:?}");
        std::thread::sleep(LOOK);
    }
}

/// For a while the removal is where it is, gets older, and the monitor says so at once. It was asked for within `begun`.
fn watch(vmm: &mut Vmm, begun: &Range<Instant>, tries: Duration) -> Result<()> {
    let mut last = Duration::ZERO;
    let stalls = Stalls::watch();
    while begun.end.elapsed() < tries {
        let asked = Instant::now();
        let removals = vmm.qmp().execute("x-ebbtide-query-removals", Value::Null)?;
        let answered = Instant::now();
        stalls.within(ANSWER, answered - asked, "an answer")?;
        let removal = &removals[0];
        ensure!(removal["phase"] == "guest-offlining", "{removals}");
        let age = Duration::from_millis(removal["age-ms"].as_u64().context("age-ms")?);
        // Looked at between question and answer, and told in whole milliseconds.
        let possible = (asked - begun.end).saturating_sub(MILLISECOND)..=answered - begun.start;
        ensure!(
            age >= last && possible.contains(&age),
            "{age:?} old, which is not within {possible:?}: {removals}"
        );
        last = age;
        std::thread::sleep(LOOK);
    }
    for event in vmm.qmp().take_events()? {
        let end = ["DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR"];
        ensure!(!end.contains(&&*event.name), "{event:?}");
    }
    Ok(())
}

/// A request is withdrawn while the guest's kernel works on it, which ejects the DIMM all the same once it can: that is
/// not asked for any more. The DIMM stays, the guest finds it again, and lets go of it when asked again.
pub fn withdrawn(ground: &Ground) -> Result<()> {
    let mut vmm = ground.start(&machine(ground, ""))?;
    let before = vmm.guest().report()?.mem_total;
    let range = plug(&mut vmm)?;
    pin(&mut vmm, &range)?;
    let id = json!({"id": "dimm0"});
    vmm.qmp().execute("device_del", id.clone())?;
    in_phase(&mut vmm, "dimm0", "guest-offlining")?;
    vmm.qmp().execute("x-ebbtide-device-cancel", id.clone())?;
    ensure!(!wait_for_end(&mut vmm)?, "it goes");

    vmm.guest().call::<PinnedMemory>(Command::Unpin, GUEST)?;
    said(&mut vmm, &["the guest ejects a dimm that it may not eject"])?;
    wait_total(&mut vmm, before + SECTION, true).context("the guest finds it again")?;
    ensure!(place_of(&mut vmm, "dimm0")? == range, "it is elsewhere");
    vmm.guest().fill(SECTION / 2, 1, GUEST)?;
    vmm.guest().check(GUEST)?;
    vmm.guest().free()?;
    vmm.qmp().execute("device_del", id)?;
    deleted(&mut vmm, "dimm0")?;
    vmm.qmp().execute("object-del", json!({"id": "m0"}))?;
    wait_total(&mut vmm, before, false)?;
    no_acpi_error(&mut vmm)?;
    finish(vmm)
}

/// A DIMM is refused for as long as the guest has a reason, and goes when asked again after that.
pub fn refusal_undone(ground: &Ground) -> Result<()> {
    let mut vmm = ground.start(&machine(ground, ""))?;
    let before = vmm.guest().report()?.mem_total;
    for (reason, prepare, undo, status) in REASONS {
        let refused = refuse_then_remove(&mut vmm, prepare, undo, *status);
        refused.with_context(|| (*reason).to_owned())?;
        wait_total(&mut vmm, before, false)?;
    }
    finish(vmm)
}

/// Why, how it comes to be and to an end, and with which status of `_OST` the guest refuses.
const REASONS: &[(&str, &str, &str, u32)] = &[
    (
        "huge pages that are free and promised to a file system",
        "echo 16 > /proc/sys/vm/nr_hugepages && mkdir /huge && mount -t hugetlbfs -o min_size=32M none /huge && \
         grep -q 'HugePages_Rsvd: *16$' /proc/meminfo",
        "umount /huge && rmdir /huge && echo 0 > /proc/sys/vm/nr_hugepages",
        0x82,
    ),
    (
        "the guest's administrator has said that memory does not go",
        "echo 0 > /sys/firmware/acpi/hotplug/memory/enabled",
        "echo 1 > /sys/firmware/acpi/hotplug/memory/enabled",
        0x80,
    ),
];

fn refuse_then_remove(vmm: &mut Vmm, prepare: &str, undo: &str, status: u32) -> Result<()> {
    plug(vmm)?;
    shell(vmm, prepare)?;
    for _ in 0..2 {
        let (stalls, begun) = (Stalls::watch(), Instant::now());
        vmm.qmp().execute("device_del", json!({"id": "dimm0"}))?;
        ensure!(!wait_for_end(vmm)?, "it has gone");
        stalls.within(REFUSAL, begun.elapsed(), "the refusal")?;
        let said = vmm.qmp().execute("query-acpi-ospm-status", Value::Null)?;
        let refused = json!({"device": "dimm0", "slot": "0", "slot-type": "DIMM", "source": 3, "status": status});
        ensure!(said[0] == refused, "{}", said[0]);
        let removals = vmm.qmp().execute("x-ebbtide-query-removals", Value::Null)?;
        ensure!(removals == json!([]), "{removals}");
    }
    // It is as before, and in use.
    vmm.guest().fill(SECTION / 2, 1, GUEST)?;
    vmm.guest().check(GUEST)?;
    vmm.guest().free()?;
    shell(vmm, undo)?;
    vmm.qmp().execute("device_del", json!({"id": "dimm0"}))?;
    deleted(vmm, "dimm0")?;
    vmm.qmp().execute("object-del", json!({"id": "m0"}))?;
    no_acpi_error(vmm)
}

/// Gives the guest a DIMM of the smallest size; returns where it is.
pub(super) fn plug(vmm: &mut Vmm) -> Result<Range<u64>> {
    let before = vmm.guest().report()?.mem_total;
    let object = json!({"qom-type": "memory-backend-ram", "id": "m0", "size": SECTION});
    vmm.qmp().execute("object-add", object)?;
    let dimm = json!({"driver": "pc-dimm", "id": "dimm0", "memdev": "m0"});
    vmm.qmp().execute("device_add", dimm)?;
    wait_total(vmm, before + SECTION, true)?;
    place_of(vmm, "dimm0")
}

/// Where a memory device is.
fn place_of(vmm: &mut Vmm, id: &str) -> Result<Range<u64>> {
    let devices = vmm.qmp().execute("query-memory-devices", Value::Null)?;
    let items = devices.as_array().into_iter().flatten();
    let data = items.map(|it| &it["data"]).find(|it| it["id"] == id);
    let number = |name: &str| data.and_then(|it| it[name].as_u64());
    match (number("addr"), number("size")) {
        (Some(addr), Some(size)) => Ok(addr..addr + size),
        _ => bail!("{id} is not there: {devices}"),
    }
}

/// What [`Command::Pin`] and its like are asked for.
pub(super) fn within(range: &Range<u64>) -> Place {
    Place {
        bytes: PINNED,
        from: range.start,
        to: range.end,
    }
}

fn pin(vmm: &mut Vmm, range: &Range<u64>) -> Result<()> {
    let pinned: PinnedMemory = vmm.guest().call(Command::Pin(within(range)), GUEST)?;
    ensure!(
        pinned.bytes == PINNED,
        "{} KiB are pinned",
        pinned.bytes >> 10
    );
    Ok(())
}

/// The removal of `id`, once it has come so far.
pub(super) fn in_phase(vmm: &mut Vmm, id: &str, phase: &str) -> Result<Value> {
    let begun = Instant::now();
    loop {
        let removals = vmm.qmp().execute("x-ebbtide-query-removals", Value::Null)?;
        let mut items = removals.as_array().into_iter().flatten();
        if let Some(removal) = items.find(|it| it["id"] == id && it["phase"] == phase) {
            return Ok(removal.clone());
        }
        ensure!(begun.elapsed() < GUEST, "{id} is not {phase}: {removals}");
        std::thread::sleep(LOOK);
    }
}
