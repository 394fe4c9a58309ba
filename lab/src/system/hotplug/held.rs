// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests that a backend holds until it is told to let go: what waits for them, and what does not.

use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::force::{end, force, in_phase, until, writing};
use super::{GUEST, LOOK, deleted, shell, wait_for};
use crate::qmp::{Qmp, QmpError};
use crate::system::{BOOT, BOOT_LIMIT, GIB, Ground, MIB, STEP_LIMIT, USUAL_CPUS};
use crate::vmm::Vmm;

/// How long a wait is that is to be in vain.
const IN_VAIN: Duration = Duration::from_secs(1);
/// In which everything else is answered meanwhile, by an emulated machine.
const MEANWHILE: Duration = Duration::from_millis(500);
/// What the guest's memory is filled with, so that a write to it would be found.
const FILLED: u64 = 704 * MIB;
/// Reads of several processes at once, a part of the guest's memory for each.
const READERS: &str = "for i in 0 1 2 3 4 5 6 7; do \
                       dd if=/dev/vda of=/dev/null bs=1M iflag=direct skip=$i count=16 < /dev/null > /dev/null 2>&1 & \
                       done";

/// A wait on a connection of its own, by which others are not held up; its answer.
struct Waiting(mpsc::Receiver<Result<Value, String>>);

impl Waiting {
    fn begin(socket: &Path, arguments: Value) -> Result<Waiting> {
        let mut qmp = Qmp::connect(socket)?;
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            let answer = qmp.execute("x-ebbtide-wait", arguments);
            // Who asked may have given up.
            let _ = tell.send(answer.map_err(|e| format!("{e:#}")));
        });
        Ok(Waiting(told))
    }

    fn is_over(&self) -> bool {
        !matches!(self.0.try_recv(), Err(mpsc::TryRecvError::Empty))
    }

    fn answer(self) -> Result<Result<Value, String>> {
        self.0.recv_timeout(GUEST).context("x-ebbtide-wait")
    }
}

/// Whoever waits for a removal hears of its end, of its withdrawal and of the end of his time, and holds up nobody.
pub fn waited_for(ground: &Ground) -> Result<()> {
    let medium = json!({"driver": "null-co", "node-name": "m0", "size": 64 << 20});
    let rules = ["fault=hold,op=write"];
    let held =
        json!({"driver": "x-ebbtide-fault", "node-name": "n0", "file": "m0", "rules": rules});
    let mut vmm = writing(ground, [medium, held])?;
    let socket = vmm.qmp_path();
    withdrawn(&mut vmm, &socket)?;
    ask_again(&mut vmm)?;
    force(&mut vmm)?;
    in_phase(&mut vmm, "draining")?;

    let limited = json!({"id": "d0", "phase": "drained", "timeout": IN_VAIN.as_secs_f64()});
    let begun = Instant::now();
    let late = Waiting::begin(&socket, limited)?.answer()?;
    let said = late.err().context("a drain that does not end has ended")?;
    ensure!(said.contains("draining"), "{said}");
    ensure!(begun.elapsed() >= IN_VAIN, "after {:?}", begun.elapsed());

    let waiting = Waiting::begin(&socket, json!({"id": "d0", "phase": "deleted"}))?;
    for _ in 0..20 {
        answers_meanwhile(&mut vmm)?;
    }
    ensure!(!waiting.is_over(), "the wait is over before the drain");
    refused(&mut vmm, "x-ebbtide-fault-release", "m0", "holds nothing")?;
    refused(&mut vmm, "x-ebbtide-fault-release", "none", "none")?;
    let release = json!({"node-name": "n0", "forget": true});
    let released = vmm.qmp().execute("x-ebbtide-fault-release", release)?;
    ensure!(
        released == json!({"released": 1, "held": 0}),
        "released: {released}"
    );
    let answer = waiting.answer()?.map_err(anyhow::Error::msg)?;
    ensure!(answer["phase"] == "deleted", "it waited for {answer}");
    deleted(&mut vmm, "d0")?;

    let gone = vmm
        .qmp()
        .execute("x-ebbtide-wait", json!({"id": "d0", "phase": "deleted"}));
    let error = gone.err().context("there is a device that has gone")?;
    ensure!(
        error
            .downcast_ref::<QmpError>()
            .is_some_and(|e| e.class == "DeviceNotFound"),
        "{error:#}"
    );
    until(&mut vmm, "the writer ends", "[ -s /ended ]")?;
    for node in ["n0", "m0"] {
        vmm.qmp()
            .execute("blockdev-del", json!({"node-name": node}))?;
    }
    end(vmm)
}

/// The guest takes five seconds to let go, in which the removal is withdrawn.
fn withdrawn(vmm: &mut Vmm, socket: &Path) -> Result<()> {
    vmm.qmp().execute("device_del", json!({"id": "d0"}))?;
    let waiting = Waiting::begin(socket, json!({"id": "d0", "phase": "isolated"}))?;
    vmm.qmp()
        .execute("x-ebbtide-device-cancel", json!({"id": "d0"}))?;
    let said = waiting.answer()?.err().context("it has not gone")?;
    ensure!(said.contains("stays plugged in"), "{said}");
    Ok(())
}

/// Asks for the removal of d0, as soon as the guest is through with the one that was withdrawn.
fn ask_again(vmm: &mut Vmm) -> Result<()> {
    let begun = Instant::now();
    loop {
        let Err(error) = vmm.qmp().execute("device_del", json!({"id": "d0"})) else {
            return Ok(());
        };
        let is_busy = format!("{error:#}").contains("is blinking");
        ensure!(is_busy && begun.elapsed() < GUEST, "{error:#}");
        std::thread::sleep(LOOK);
    }
}

fn refused(vmm: &mut Vmm, command: &str, node: &str, part: &str) -> Result<()> {
    let Err(error) = vmm.qmp().execute(command, json!({"node-name": node})) else {
        bail!("{command} of {node} is not refused");
    };
    ensure!(format!("{error:#}").contains(part), "{error:#}");
    Ok(())
}

/// How many operations a node holds; none is let go.
fn held_by(vmm: &mut Vmm, node: &str) -> Result<u64> {
    let none = json!({"node-name": node, "count": 0});
    let answer = vmm.qmp().execute("x-ebbtide-fault-release", none)?;
    answer["held"].as_u64().context("held")
}

/// Reads that outlast a reset of the machine: of one disk they have not begun, the other's medium has them and gives its data
/// when the next guest is at work. That guest meets neither disk and not a byte of what they read, in no kind of its memory.
pub fn outlasted(ground: &Ground) -> Result<()> {
    let mut machine = ground.machine(USUAL_CPUS, GIB);
    machine
        .more
        .extend(["--drain-timeout", "2"].map(Into::into));
    let mut vmm = ground.start(&machine)?;
    // A guest takes the memory of its processes from what was plugged, and from the rest when that is used up.
    vmm.resize(GIB, STEP_LIMIT)?;
    for (number, (drive, point)) in [("vda", "before"), ("vdb", "begun")].iter().enumerate() {
        reading(&mut vmm, number, drive, point)?;
    }
    let before = ram_blocks(&mut vmm)?;
    vmm.qmp().execute("system_reset", Value::Null)?;
    vmm.qmp().wait_event("RESET", STEP_LIMIT)?;
    vmm.wait_ready(BOOT_LIMIT).context("the next guest")?;
    for said in [
        "d0: requests did not end",
        "d1: requests did not end",
        "is still in use for the last guest: the next one gets new memory",
    ] {
        ensure!(vmm.log().contains(said), "no '{said}' in:{}", vmm.log());
    }
    ensure!(
        ram_blocks(&mut vmm)? > before,
        "the next guest has the memory of the last one"
    );
    // The target still stands.
    vmm.wait_total(GIB, STEP_LIMIT)?;
    wait_for(&mut vmm, "/sys/block/vda", false)?;
    wait_for(&mut vmm, "/sys/block/vdb", false)?;
    vmm.guest().fill(FILLED, 3, STEP_LIMIT)?;
    in_phase(&mut vmm, "draining")?;
    for (node, forget) in [("n0", true), ("n1", false)] {
        let release = json!({"node-name": node, "forget": forget});
        let released = vmm.qmp().execute("x-ebbtide-fault-release", release)?;
        ensure!(
            released["released"].as_u64() > Some(0),
            "{node} held nothing: {released}"
        );
    }
    deleted(&mut vmm, "d0")?;
    deleted(&mut vmm, "d1")?;
    vmm.guest()
        .check(STEP_LIMIT)
        .context("a read of the last guest")?;
    vmm.guest().free()?;
    let begun = Instant::now();
    while ram_blocks(&mut vmm)? > before {
        ensure!(begun.elapsed() < GUEST, "the old memory is kept");
        std::thread::sleep(LOOK);
    }
    end(vmm)
}

/// Memory that is a file has no other in its place. The reset waits: first for the medium, which lets go, then for one that
/// does not until the VM is ended.
pub fn awaited(ground: &Ground) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut machine = ground.machine(USUAL_CPUS, BOOT);
    machine.max_bytes = None;
    machine.memory_file = Some(folder.path().join("ram"));
    machine
        .more
        .extend(["--drain-timeout", "2"].map(Into::into));
    let mut vmm = ground.start(&machine)?;
    reading(&mut vmm, 0, "vda", "begun")?;
    vmm.qmp().execute("system_reset", Value::Null)?;
    waits(&mut vmm, 1)?;
    let release = json!({"node-name": "n0"});
    vmm.qmp().execute("x-ebbtide-fault-release", release)?;
    vmm.qmp().wait_event("RESET", STEP_LIMIT)?;
    vmm.wait_ready(BOOT_LIMIT).context("the next guest")?;
    deleted(&mut vmm, "d0")?;

    reading(&mut vmm, 1, "vda", "begun")?;
    vmm.qmp().execute("system_reset", Value::Null)?;
    waits(&mut vmm, 2)?;
    vmm.qmp().execute("quit", Value::Null)?;
    let status = vmm.wait_exit(STEP_LIMIT)?;
    ensure!(status.code() == Some(1), "the VMM ended with {status}");
    Ok(())
}

/// The monitor answers one who does not wait.
fn answers_meanwhile(vmm: &mut Vmm) -> Result<()> {
    let begun = Instant::now();
    vmm.qmp().execute("query-status", Value::Null)?;
    ensure!(
        begun.elapsed() < MEANWHILE,
        "query-status took {:?}",
        begun.elapsed()
    );
    Ok(())
}

/// The `count`-th reset does not end, and everything else is answered.
fn waits(vmm: &mut Vmm, count: usize) -> Result<()> {
    const SAID: &str = "the reset waits for requests of the last guest in memory ram, for 0 s";
    let begun = Instant::now();
    while vmm.log().matches(SAID).count() < count {
        ensure!(begun.elapsed() < GUEST, "it does not wait:{}", vmm.log());
        std::thread::sleep(LOOK);
    }
    for _ in 0..20 {
        answers_meanwhile(vmm)?;
        std::thread::sleep(LOOK);
    }
    let status = vmm.qmp().execute("x-ebbtide-query-status", Value::Null)?;
    let reset = &status["reset"];
    ensure!(
        reset["step"] == "memory" && reset["memory"] == json!(["ram"]),
        "monitors are told of the reset: {status}"
    );
    ensure!(
        vmm.log().matches("new memory").count() == 0,
        "memory in a file was replaced"
    );
    Ok(())
}

/// A disk of which a guest reads, by several processes, what it does not get.
fn reading(vmm: &mut Vmm, number: usize, drive: &str, point: &str) -> Result<()> {
    let (medium, node) = (format!("m{number}"), format!("n{number}"));
    let null =
        json!({"driver": "null-co", "node-name": medium, "size": 64 << 20, "read-zeroes": true});
    vmm.qmp().execute("blockdev-add", null)?;
    // The kernel's own look at a new disk is let through.
    let rules = [format!("fault=hold,op=read,skip=40,point={point}")];
    let held =
        json!({"driver": "x-ebbtide-fault", "node-name": node, "file": medium, "rules": rules});
    vmm.qmp().execute("blockdev-add", held)?;
    let id = format!("d{number}");
    let disk = json!({"driver": "virtio-blk-pci", "id": id, "drive": node});
    vmm.qmp().execute("device_add", disk)?;
    wait_for(vmm, &format!("/dev/{drive}"), true)?;
    shell(vmm, &READERS.replace("vda", drive))?;
    let begun = Instant::now();
    while held_by(vmm, &node)? == 0 {
        ensure!(begun.elapsed() < GUEST, "no read of {drive} is held");
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// How many blocks of RAM there are.
fn ram_blocks(vmm: &mut Vmm) -> Result<usize> {
    let command = json!({"command-line": "info ramblock"});
    let table = vmm.qmp().execute("human-monitor-command", command)?;
    let table = table.as_str().context("info ramblock")?;
    // Without the heading.
    Ok(table.lines().count().saturating_sub(1))
}
