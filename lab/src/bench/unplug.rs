// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Disks are torn out by their guest while requests of theirs are under way: what the processor that does it, management
//! and another disk notice, under Ebbtide and under Debian's QEMU.
//!
//! The guest writes the eject register itself, as one does that is hostile or has crashed: Linux's driver would wait for
//! its requests first. A request is under way because a disk that comes is looked at for partitions, and the first read
//! takes [`LATENCY`]. So that this holds up no more than itself, the guest's virtio bus binds no driver of its own
//! accord: each disk is bound by a process of its own.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use ebbtide_agent::protocol::{Command, DiskStart, PortValue};
use serde_json::{Value, json};

use super::scheduled::Scheduled;
use super::{Cpu, PEER, Row, median, ms, row};
use crate::image::Image;
use crate::qmp::Qmp;
use crate::vmm::{Disk, Machine, Program, Vmm, log_tail};

/// What each request of the disks that are torn out takes.
const LATENCY: Duration = Duration::from_secs(20);
/// The slots they are in.
const SLOTS: std::ops::Range<u32> = 7..17;
/// So many of them are ejected under QEMU: the first write outlasts the requests of all.
const PEER_EJECTS: usize = 1;
/// QEMU's board whose bus 0 has hot-plug slots. With SMM, VMware's port and the APIC's `vapic` (see `machine`) as they are by
/// default, user mode's port accesses fault in the capsule; without the three they do not. Which of them it is, and why, is
/// not known: a task register that KVM loads anew, marked busy, would explain it.
const PEER_BOARD: &str = "pc,smm=off,vmport=off";
/// The registers of PCI hot-plug through ACPI, the same on both VMMs; which bus they speak of.
const UP: u16 = 0xae00;
const EJECT: u16 = 0xae08;
const BUS: u16 = 0xae10;
const BUS_0: u32 = 0;
/// The disk that stays.
const WORK: &str = "/dev/vda";
const WORK_BYTES: u64 = 64 << 20;
const SLOW_BYTES: u64 = 64 << 20;
/// vCPUs: one that ejects and one that could go on.
const CPUS: u32 = 2;
/// Management asks again this long after an answer.
const ASK: Duration = Duration::from_millis(5);
/// How often the guest is asked what is in its slots.
const LOOK: Duration = Duration::from_millis(200);
/// The other disk works for so long before anything happens.
const STEADY: Duration = Duration::from_secs(1);
const LIMIT: Duration = Duration::from_secs(90);

/// What may be noticed of an eject, in milliseconds.
const WRITE_BUDGET: f64 = 1.0;
const ANSWER_BUDGET: f64 = 10.0;
const GAP_BUDGET: f64 = 100.0;

/// The worst of one guest's life.
struct Sample {
    write_ms: f64,
    /// Processor time of the exit that took most of it; only Ebbtide tells.
    write_cpu_ms: Option<f64>,
    /// Of as many writes of the same registers that eject nothing.
    idle_write_ms: f64,
    answer_ms: f64,
    /// Processor time of the VMM's main thread while the slowest answer was waited for.
    answer_cpu_ms: f64,
    gap_ms: f64,
}

/// Measures and prints one JSON row a line; words for people go to standard error.
///
/// # Errors
/// When a guest of either VMM does not do its part, or is told of the end of a device before its requests have ended, or
/// management before the guest. A budget that is missed is no error: it is in the rows.
pub fn run(ebbtide: &Path, image: &Image, rounds: usize) -> Result<()> {
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    eprintln!(
        "ejects: {} disks on null-co with latency-ns={} and a request under way each, {CPUS} vCPUs; all are ejected under \
         Ebbtide, {PEER_EJECTS} under {PEER}",
        SLOTS.len(),
        LATENCY.as_nanos()
    );
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}");
        let program = Program::Ebbtide(ebbtide.to_owned());
        ours.push(sample("Ebbtide", program, image).context("Ebbtide")?);
        peers.push(sample(PEER, Program::Qemu, image).context(PEER)?);
    }
    // What this machine's scheduling adds to any write, whoever answers it.
    let floor = row("", "ms", &ours, &peers, |s| s.idle_write_ms).ours;
    let rows = [
        Row {
            floor: Some(floor),
            cpu: cpu(&ours, &peers, |s| s.write_cpu_ms),
            ..budgeted("eject/write", WRITE_BUDGET, &ours, &peers, |s| s.write_ms)
        },
        Row {
            cpu: cpu(&ours, &peers, |s| Some(s.answer_cpu_ms)),
            ..budgeted("eject/qmp_max", ANSWER_BUDGET, &ours, &peers, |s| {
                s.answer_ms
            })
        },
        budgeted("eject/other_disk_gap", GAP_BUDGET, &ours, &peers, |s| {
            s.gap_ms
        }),
    ];
    for row in rows {
        println!("{}", serde_json::to_string(&row)?);
    }
    Ok(())
}

fn budgeted(
    id: &'static str,
    budget: f64,
    ours: &[Sample],
    peers: &[Sample],
    of: fn(&Sample) -> f64,
) -> Row {
    Row {
        budget: Some(budget),
        ..row(id, "ms", ours, peers, of)
    }
}

/// The worst of all rounds.
fn cpu(ours: &[Sample], peers: &[Sample], of: impl Fn(&Sample) -> Option<f64>) -> Option<Cpu> {
    let worst = |samples: &[Sample]| samples.iter().filter_map(&of).reduce(f64::max);
    Some(Cpu {
        cpu: worst(ours),
        cpu_peer: worst(peers),
    })
}

fn sample(name: &str, program: Program, image: &Image) -> Result<Sample> {
    let ground = tempfile::tempdir()?;
    let ebbtide = program != Program::Qemu;
    let (machine, watched) = machine(program, image, ground.path())?;
    let mut vmm = Vmm::start(&machine)?;
    vmm.wait_ready(LIMIT)?;
    let result = eject(name, &mut vmm, watched.as_deref(), ebbtide);
    let sample = result.with_context(|| log_tail(machine_log(&machine)))?;
    if !ebbtide {
        // It would wait for the other disks' requests, one after the other.
        return Ok(sample);
    }
    vmm.qmp().execute("quit", Value::Null)?;
    let status = vmm.wait_exit(LIMIT)?;
    ensure!(status.success(), "it ended with {status}{}", vmm.log());
    Ok(sample)
}

fn machine_log(machine: &Machine) -> &Path {
    machine.log.as_deref().unwrap_or(Path::new(""))
}

/// The machine, and the monitor's second socket where the first one serves one client only.
fn machine(program: Program, image: &Image, ground: &Path) -> Result<(Machine, Option<PathBuf>)> {
    let work = ground.join("work.img");
    std::fs::File::create(&work)?.set_len(WORK_BYTES)?;
    let mut machine = Machine {
        cpus: CPUS,
        qemu_board: PEER_BOARD,
        log: Some(ground.join("log")),
        ..Machine::new(program, image.clone())
    };
    if machine.program != Program::Qemu {
        machine.disks.push(Disk {
            id: "work".into(),
            path: work,
            readonly: false,
        });
        return Ok((machine, None));
    }
    // A thread of its own for the disk that stays, as Ebbtide's disks have one.
    let watched = ground.join("watched");
    machine.more = vec![
        // See `PEER_BOARD`.
        "-global".into(),
        "apic-common.vapic=off".into(),
        "-object".into(),
        "iothread,id=io0".into(),
        "-drive".into(),
        format!("if=none,id=work-file,format=raw,file={}", work.display()),
        "-device".into(),
        "virtio-blk-pci,id=work,drive=work-file,iothread=io0".into(),
        "-qmp".into(),
        format!("unix:{},server=on,wait=off", watched.display()),
    ];
    Ok((machine, Some(watched)))
}

fn eject(name: &str, vmm: &mut Vmm, watched: Option<&Path>, ebbtide: bool) -> Result<Sample> {
    let submitted = requests_under_way(vmm, ebbtide).context("put requests under way")?;
    vmm.guest().disk_start(DiskStart {
        path: WORK.into(),
        seed: 0xe1ec,
        verify: true,
        pause_us: 5_000,
        span_bytes: 0,
    })?;
    std::thread::sleep(STEADY);
    let ejects = if ebbtide { SLOTS.len() } else { PEER_EJECTS };
    let mut idle = Vec::new();
    for _ in 0..SLOTS.len() {
        idle.push(ms(vmm.guest().port_write(BUS, BUS_0, LIMIT)?));
    }
    if ebbtide {
        // What came before does not count.
        longest_stay(vmm)?;
    }
    let pid = vmm.process().pid();
    let watch = Watch::start(watched.map_or_else(|| vmm.qmp_path(), Path::to_owned), pid)?;
    let mut writes = Vec::new();
    for slot in SLOTS.take(ejects) {
        ensure!(
            submitted.elapsed() < LATENCY,
            "the requests have ended before slot {slot} was ejected: this machine is too busy"
        );
        writes.push(ms(vmm.guest().port_write(EJECT, 1 << slot, LIMIT)?));
    }
    let stay = if ebbtide {
        let stay = longest_stay(vmm)?;
        gone_in_order(vmm, submitted).context("the way out of the disks")?;
        Some(stay)
    } else {
        vmm.qmp().wait_event("DEVICE_DELETED", LIMIT)?;
        None
    };
    let Answers {
        count: answers,
        worst,
        main,
    } = watch.stop()?;
    let disk = vmm.guest().disk_status(WORK)?;
    ensure!(disk.ok && disk.writes > 0, "the other disk: {disk:?}");
    let sample = Sample {
        write_ms: writes.iter().copied().fold(0.0, f64::max),
        write_cpu_ms: stay.map(|stay| stay.cpu_us as f64 / 1e3),
        idle_write_ms: idle.iter().copied().fold(0.0, f64::max),
        answer_ms: ms(worst),
        answer_cpu_ms: ms(main.ran),
        gap_ms: disk.longest_gap_ms as f64,
    };
    writes.sort_by(f64::total_cmp);
    idle.sort_by(f64::total_cmp);
    let stay = stay.map_or_else(String::new, |Stay { us, cpu_us }| {
        format!(
            ", its vCPU out of the guest for {:.3} ms, at most {:.3} ms of it at work",
            us as f64 / 1e3,
            cpu_us as f64 / 1e3
        )
    });
    eprintln!(
        "  {name:<14} eject written in {:>9.3} ms, at worst of {} in {:>9.3} ms{stay} (a write that ejects nothing: {:.3} ms, at worst {:.3} ms); {answers} answers, the slowest {:>8.1} ms, in which the main thread worked for {:.1} ms and waited for a processor for {:.1} ms; \
         {} operations of the other disk, the longest gap {:>5} ms",
        median(&writes),
        writes.len(),
        sample.write_ms,
        median(&idle),
        sample.idle_write_ms,
        sample.answer_ms,
        ms(main.ran),
        ms(main.waited),
        disk.reads + disk.writes + disk.syncs,
        disk.longest_gap_ms,
    );
    Ok(sample)
}

/// Plugs the disks and waits until each has a request under way. No request was submitted before the time returned.
fn requests_under_way(vmm: &mut Vmm, ebbtide: bool) -> Result<Instant> {
    shell(vmm, "echo 0 > /sys/bus/virtio/drivers_autoprobe")?;
    for slot in SLOTS {
        let node = json!({"driver": "null-co", "node-name": format!("slow{slot}"), "size": SLOW_BYTES,
            "latency-ns": LATENCY.as_nanos() as u64});
        vmm.qmp().execute("blockdev-add", node)?;
        let mut disk = json!({"driver": "virtio-blk-pci", "id": id(slot), "drive": format!("slow{slot}"),
            "addr": format!("{slot:x}")});
        if ebbtide {
            disk["guest-eject"] = json!("on");
        } else {
            // QEMU would read the disk to find these out, and answer nobody meanwhile.
            for (geometry, value) in [("cyls", 16), ("heads", 16), ("secs", 63)] {
                disk[geometry] = json!(value);
            }
        }
        vmm.qmp().execute("device_add", disk)?;
    }
    let all: Vec<String> = SLOTS.map(|slot| format!("0000:00:{slot:02x}.0")).collect();
    let seen = format!(
        "n=0; for d in {}; do [ -e /sys/bus/pci/devices/$d/virtio* ] && n=$((n+1)); done; echo $n",
        all.join(" ")
    );
    wait_count(vmm, &seen, LIMIT).context("the disks are not seen by the guest")?;
    let submitted = Instant::now();
    let bind = format!(
        "for d in {}; do for v in /sys/bus/pci/devices/$d/virtio*; do \
         (echo ${{v##*/}} > /sys/bus/virtio/drivers/virtio_blk/bind) > /dev/null 2>&1 & done; done",
        all.join(" ")
    );
    shell(vmm, &bind)?;
    let busy = format!(
        "n=0; for f in /sys/block/vd*/inflight; do read r w < $f; \
         [ $f != /sys/block/{}/inflight ] && [ $r -gt 0 ] && n=$((n+1)); done; echo $n",
        WORK.trim_start_matches("/dev/")
    );
    // What is under way ends after that, and the count would never be reached.
    wait_count(vmm, &busy, LATENCY).context("not every disk has a request under way")?;
    Ok(submitted)
}

fn id(slot: u32) -> String {
    format!("dev{slot}")
}

/// Runs a script in the guest; what it printed.
fn shell(vmm: &mut Vmm, script: &str) -> Result<String> {
    let done = vmm
        .guest()
        .exec(&["/bin/busybox", "sh", "-c", script], LIMIT)?;
    ensure!(done.code == Some(0), "{script}: {done:?}");
    Ok(done.output)
}

/// Waits until `script` counts all slow disks.
fn wait_count(vmm: &mut Vmm, script: &str, limit: Duration) -> Result<()> {
    let begun = Instant::now();
    loop {
        let counted = shell(vmm, script)?;
        if counted.trim() == SLOTS.len().to_string() {
            return Ok(());
        }
        if begun.elapsed() > limit {
            bail!("{} of {} after {limit:?}", counted.trim(), SLOTS.len());
        }
        std::thread::sleep(LOOK);
    }
}

/// The longest that an exit has kept a vCPU out of the guest, and the most processor time that one took, in microseconds.
#[derive(Clone, Copy)]
struct Stay {
    us: u64,
    cpu_us: u64,
}

/// Since this was last asked.
fn longest_stay(vmm: &mut Vmm) -> Result<Stay> {
    let vcpus = vmm.qmp().execute("x-ebbtide-query-vcpus", Value::Null)?;
    let longest = |name: &str| {
        let stays = vcpus.as_array().into_iter().flatten();
        let longest = stays.filter_map(|vcpu| vcpu.get(name)?.as_u64()).max();
        longest.with_context(|| format!("x-ebbtide-query-vcpus: {vcpus}"))
    };
    Ok(Stay {
        us: longest("longest-exit-us")?,
        cpu_us: longest("longest-exit-cpu-us")?,
    })
}

/// Waits until all disks are gone. A disk's slot is empty in the guest's eyes only when its request has ended, and
/// management is told after the guest.
fn gone_in_order(vmm: &mut Vmm, submitted: Instant) -> Result<()> {
    let mut deleted: HashMap<String, Instant> = HashMap::new();
    loop {
        let asked = Instant::now();
        let up: PortValue = vmm
            .guest()
            .call(Command::PortRead { port: UP, width: 4 }, LIMIT)?;
        let seen = Instant::now();
        for slot in SLOTS {
            let occupied = up.value & (1 << slot) != 0;
            check_slot(
                slot,
                occupied,
                (asked, seen),
                submitted,
                deleted.get(&id(slot)),
            )?;
        }
        if deleted.len() == SLOTS.len() {
            return Ok(());
        }
        ensure!(
            submitted.elapsed() < LATENCY + LIMIT,
            "only {} of {} are deleted",
            deleted.len(),
            SLOTS.len()
        );
        std::thread::sleep(LOOK);
        for event in vmm.qmp().take_events()? {
            if let Some(device) = event.data["device"].as_str()
                && event.name == "DEVICE_DELETED"
            {
                let earlier = deleted.insert(device.to_owned(), event.at);
                ensure!(earlier.is_none(), "{device} is deleted twice");
            }
        }
    }
}

/// One look at a slot, which happened between `asked` and `seen`. Its request was submitted at `submitted` or later.
fn check_slot(
    slot: u32,
    occupied: bool,
    (asked, seen): (Instant, Instant),
    submitted: Instant,
    deleted: Option<&Instant>,
) -> Result<()> {
    let ended = submitted + LATENCY;
    ensure!(
        occupied || seen >= ended,
        "slot {slot} is empty in the guest's eyes {:?} before its request can have ended",
        ended - seen
    );
    if let Some(&at) = deleted {
        ensure!(
            at >= ended,
            "DEVICE_DELETED of slot {slot} comes {:?} before its request can have ended",
            ended - at
        );
        ensure!(
            !occupied || asked < at,
            "slot {slot} is occupied in the guest's eyes after DEVICE_DELETED"
        );
    }
    Ok(())
}

/// A client of its own that asks for the state over and over.
struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Answers>>,
}

/// What it got.
#[derive(Default)]
struct Answers {
    count: u32,
    /// How long the slowest took.
    worst: Duration,
    /// What the VMM's main thread, which answers, did meanwhile.
    main: Scheduled,
}

impl Watch {
    fn start(socket: PathBuf, pid: u32) -> Result<Watch> {
        let mut qmp = Qmp::connect(&socket)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut answers = Answers::default();
            while !stopped.load(Ordering::Relaxed) {
                let before = Scheduled::of_main_thread(pid)?;
                let begun = Instant::now();
                qmp.execute("query-status", Value::Null)?;
                let took = begun.elapsed();
                if took > answers.worst {
                    answers.worst = took;
                    answers.main = Scheduled::of_main_thread(pid)?.since(&before);
                }
                answers.count += 1;
                std::thread::sleep(ASK);
            }
            Ok(answers)
        });
        Ok(Watch { stop, thread })
    }

    fn stop(self) -> Result<Answers> {
        self.stop.store(true, Ordering::Relaxed);
        let result = self.thread.join();
        let answers = result.map_err(|_| anyhow!("the watching client panicked"))??;
        ensure!(answers.count > 0, "the watching client got no answer");
        Ok(answers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_that_is_empty_too_soon_or_full_too_late_is_found() {
        let submitted = Instant::now();
        let at = |seconds: u64| submitted + Duration::from_secs(seconds);
        let look = |occupied, asked, deleted: Option<u64>| {
            let deleted = deleted.map(at);
            check_slot(
                7,
                occupied,
                (at(asked), at(asked)),
                submitted,
                deleted.as_ref(),
            )
        };
        for (occupied, asked, deleted) in [
            (true, 1, None),
            (true, 21, None),
            (false, 20, None),
            (false, 22, Some(21)),
            (true, 20, Some(21)),
        ] {
            assert!(
                look(occupied, asked, deleted).is_ok(),
                "{occupied} {asked} {deleted:?}"
            );
        }
        for (occupied, asked, deleted) in [
            (false, 19, None),
            (false, 22, Some(19)),
            (true, 22, Some(21)),
        ] {
            assert!(
                look(occupied, asked, deleted).is_err(),
                "{occupied} {asked} {deleted:?}"
            );
        }
    }

    #[test]
    fn the_slots_have_bits() {
        assert!(SLOTS.end <= 32 && SLOTS.len() >= PEER_EJECTS);
    }
}
