// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests that a backend holds until it is told to let go: what waits for them, and what does not.

use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::force::{HELD, end, force, in_phase, until, writing};
use super::holding::{delete, wait_held};
use super::{GUEST, LOOK, all_deleted, ask, deleted, shell, wait_for};
use crate::qmp::{Qmp, QmpError};
use crate::system::{BOOT, BOOT_LIMIT, GIB, Ground, MIB, STEP_LIMIT, USUAL_CPUS};
use crate::vmm::Vmm;

/// How long a wait is that is to be in vain.
const IN_VAIN: Duration = Duration::from_secs(1);
/// In which everything else is answered meanwhile, by an emulated machine that is not held up itself.
const MEANWHILE: Duration = Duration::from_millis(500);
/// How often something else is asked for meanwhile, and how often at least it is answered by then.
const QUESTIONS: usize = 20;
const AT_ONCE: usize = QUESTIONS / 2;
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
        Ok(Waiting::on(Qmp::connect(socket)?, arguments))
    }

    fn on(mut qmp: Qmp, arguments: Value) -> Waiting {
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            let answer = qmp.execute("x-ebbtide-wait", arguments);
            // Who asked may have given up.
            let _ = tell.send(answer.map_err(|e| format!("{e:#}")));
        });
        Waiting(told)
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
    let mut vmm = writing(ground, HELD)?;
    let socket = vmm.qmp_path();
    withdrawn(&mut vmm, &socket)?;
    // As soon as the guest is through with the one that was withdrawn.
    ask(&mut vmm, "d0")?;
    force(&mut vmm)?;
    in_phase(&mut vmm, "draining")?;

    let limited = json!({"id": "d0", "phase": "drained", "timeout": IN_VAIN.as_secs_f64()});
    let begun = Instant::now();
    let late = Waiting::begin(&socket, limited)?.answer()?;
    let said = late.err().context("a drain that does not end has ended")?;
    ensure!(said.contains("draining"), "{said}");
    ensure!(begun.elapsed() >= IN_VAIN, "after {:?}", begun.elapsed());

    let waiting = Waiting::begin(&socket, json!({"id": "d0", "phase": "deleted"}))?;
    answers_meanwhile(&mut vmm, Duration::ZERO)?;
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
    delete(&mut vmm)?;
    end(vmm)
}

/// The guest takes five seconds to let go, in which the removal is withdrawn.
fn withdrawn(vmm: &mut Vmm, socket: &Path) -> Result<()> {
    let qmp = Qmp::connect(socket)?;
    ask(vmm, "d0")?;
    let waiting = Waiting::on(qmp, json!({"id": "d0", "phase": "isolated"}));
    vmm.qmp()
        .execute("x-ebbtide-device-cancel", json!({"id": "d0"}))?;
    let said = waiting.answer()?.err().context("it has not gone")?;
    ensure!(said.contains("stays plugged in"), "{said}");
    Ok(())
}

fn refused(vmm: &mut Vmm, command: &str, node: &str, part: &str) -> Result<()> {
    let Err(error) = vmm.qmp().execute(command, json!({"node-name": node})) else {
        bail!("{command} of {node} is not refused");
    };
    ensure!(format!("{error:#}").contains(part), "{error:#}");
    Ok(())
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
        ensure!(vmm.said()?.contains(said), "no '{said}' in:{}", vmm.log());
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
    all_deleted(&mut vmm, &["d0", "d1"])?;
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
    reset_waits(&mut vmm)?;
    let release = json!({"node-name": "n0"});
    vmm.qmp().execute("x-ebbtide-fault-release", release)?;
    vmm.qmp().wait_event("RESET", STEP_LIMIT)?;
    vmm.wait_ready(BOOT_LIMIT).context("the next guest")?;
    deleted(&mut vmm, "d0")?;

    reading(&mut vmm, 1, "vda", "begun")?;
    reset_waits(&mut vmm)?;
    vmm.qmp().execute("quit", Value::Null)?;
    let status = vmm.wait_exit(STEP_LIMIT)?;
    ensure!(status.code() == Some(1), "the VMM ended with {status}");
    Ok(())
}

/// The monitor answers one who does not wait, and at once but for when the machine stands still.
fn answers_meanwhile(vmm: &mut Vmm, pause: Duration) -> Result<()> {
    let mut took = Vec::new();
    for _ in 0..QUESTIONS {
        let begun = Instant::now();
        vmm.qmp().execute("query-status", Value::Null)?;
        took.push(begun.elapsed());
        std::thread::sleep(pause);
    }
    let at_once = took.iter().filter(|it| **it < MEANWHILE).count();
    ensure!(at_once >= AT_ONCE, "query-status took {took:?}");
    Ok(())
}

/// A reset does not end, and everything else is answered.
fn reset_waits(vmm: &mut Vmm) -> Result<()> {
    const SAID: &str = "the reset waits for requests of the last guest in memory ram, for ";
    let said_before = vmm.said()?.len();
    vmm.qmp().execute("system_reset", Value::Null)?;
    let begun = Instant::now();
    loop {
        let status = vmm.qmp().execute("x-ebbtide-query-status", Value::Null)?;
        let reset = &status["reset"];
        if reset["step"] == "memory" && reset["memory"] == json!(["ram"]) {
            break;
        }
        ensure!(
            begun.elapsed() < GUEST,
            "monitors are not told that the reset waits: {status}"
        );
        std::thread::sleep(LOOK);
    }
    answers_meanwhile(vmm, LOOK)?;
    let status = vmm.qmp().execute("x-ebbtide-query-status", Value::Null)?;
    ensure!(
        status["reset"]["step"] == "memory",
        "the reset is over before the request: {status}"
    );
    let log = vmm.said()?;
    let is_said = log.get(said_before..).is_some_and(|it| it.contains(SAID));
    ensure!(is_said, "the log does not say so:{log}");
    ensure!(!log.contains("new memory"), "memory in a file was replaced");
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
    wait_held(vmm, &node)
}

/// How many blocks of RAM there are.
fn ram_blocks(vmm: &mut Vmm) -> Result<usize> {
    let command = json!({"command-line": "info ramblock"});
    let table = vmm.qmp().execute("human-monitor-command", command)?;
    let table = table.as_str().context("info ramblock")?;
    // Without the heading.
    Ok(table.lines().count().saturating_sub(1))
}
