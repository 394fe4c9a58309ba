// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Disks are torn out by their guest while requests of theirs are under way: what the processor that does it, management
//! and another disk notice, under Ebbtide and under Debian's QEMU.
//!
//! The guest writes the eject register itself, as one does that is hostile or has crashed: Linux's driver would wait for
//! its requests first. A request is under way because a disk that comes is looked at for partitions, and the first read
//! takes [`LATENCY`]. So that this holds up no more than itself, the guest's virtio bus binds no driver of its own
//! accord: each disk is bound by a process of its own.

mod host;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ebbtide_agent::protocol::{Command, DiskStart, PortValue};
use ebbtide_hostile::ejector::registers;

use super::{Cpu, PEER, Row, ms, row};
use crate::ejects::{self, CPUS, LIMIT, Measured, STEADY, Sample, Slow, Watch, longest_stay};
use crate::image::Image;
use crate::vmm::{Program, Vmm};

pub use host::run as run_on_host;

/// What each request of the disks that are torn out takes.
const LATENCY: Duration = Duration::from_secs(20);
/// The disks that are torn out.
const SLOW: Slow = Slow {
    slots: 7..17,
    latency: LATENCY,
};
/// So many of them are ejected under QEMU: the first write outlasts the requests of all.
const PEER_EJECTS: usize = 1;
/// The disk that stays.
const WORK: &str = "/dev/vda";
/// How often the guest is asked how far it is.
const LOOK: Duration = Duration::from_millis(200);

/// What may be noticed of an eject, in milliseconds.
const WRITE_BUDGET: f64 = 1.0;
const ANSWER_BUDGET: f64 = 10.0;
const GAP_BUDGET: f64 = 100.0;

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
        SLOW.slots.len(),
        LATENCY.as_nanos()
    );
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}");
        let program = Program::Ebbtide(ebbtide.to_owned());
        ours.push(sample("Ebbtide", program, image).context("Ebbtide")?);
        peers.push(sample(PEER, Program::Qemu, image).context(PEER)?);
    }
    let ids = ["eject/write", "eject/qmp_max", "eject/other_disk_gap"];
    print(ids, &ours, &peers)
}

/// The rows: the write, the slowest answer, the longest gap of the other disk.
fn print(ids: [&'static str; 3], ours: &[Sample], peers: &[Sample]) -> Result<()> {
    let [write, answer, gap] = ids;
    // What this machine's scheduling adds to any write, whoever answers it, and to whatever any thread does.
    let floor = |of: fn(&Sample) -> f64| Some(row("", "ms", ours, peers, of).ours);
    let rows = [
        Row {
            floor: floor(|s| s.idle_write_ms),
            cpu: cpu(ours, peers, |s| s.write_cpu_ms),
            ..budgeted(write, WRITE_BUDGET, ours, peers, |s| s.write_ms)
        },
        Row {
            floor: floor(|s| s.still_ms),
            cpu: cpu(ours, peers, |s| Some(s.answer_cpu_ms)),
            ..budgeted(answer, ANSWER_BUDGET, ours, peers, |s| s.answer_ms)
        },
        Row {
            floor: floor(|s| s.still_ms),
            ..budgeted(gap, GAP_BUDGET, ours, peers, |s| s.gap_ms)
        },
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
    let (machine, watched) = ejects::machine(program, image, ground.path())?;
    let mut vmm = Vmm::start(&machine)?;
    vmm.wait_ready(LIMIT)?;
    let result = eject(&mut vmm, watched.as_deref(), ebbtide);
    let measured = result.with_context(|| vmm.log())?;
    ejects::end(vmm, ebbtide)?;
    Ok(measured.told(name))
}

fn eject(vmm: &mut Vmm, watched: Option<&Path>, ebbtide: bool) -> Result<Measured> {
    let submitted = requests_under_way(vmm, ebbtide).context("put requests under way")?;
    vmm.guest().disk_start(DiskStart {
        path: WORK.into(),
        seed: 0xe1ec,
        verify: true,
        pause_us: 5_000,
        span_bytes: 0,
    })?;
    std::thread::sleep(STEADY);
    let ejects = if ebbtide {
        SLOW.slots.len()
    } else {
        PEER_EJECTS
    };
    let mut idle = Vec::new();
    for _ in SLOW.slots {
        let took = vmm
            .guest()
            .port_write(registers::BUS, registers::BUS_0, LIMIT)?;
        idle.push(ms(took));
    }
    if ebbtide {
        // What came before does not count.
        longest_stay(vmm)?;
    }
    let pid = vmm.process().pid();
    let watch = Watch::start(watched.map_or_else(|| vmm.qmp_path(), Path::to_owned), pid)?;
    let mut writes = Vec::new();
    for slot in SLOW.slots.take(ejects) {
        ensure!(
            submitted.elapsed() < LATENCY,
            "the requests have ended before slot {slot} was ejected: this machine is too busy"
        );
        writes.push(ms(vmm.guest().port_write(
            registers::EJECT,
            1 << slot,
            LIMIT,
        )?));
    }
    let stay = if ebbtide {
        let stay = longest_stay(vmm)?;
        let result = SLOW.gone_in_order(vmm, submitted, |vmm| {
            let look = Command::PortRead {
                port: registers::UP,
                width: 4,
            };
            let up: PortValue = vmm.guest().call(look, LIMIT)?;
            Ok(up.value)
        });
        result.context("the way out of the disks")?;
        Some(stay)
    } else {
        vmm.qmp().wait_event("DEVICE_DELETED", LIMIT)?;
        None
    };
    let answers = watch.stop()?;
    let disk = vmm.guest().disk_status(WORK)?;
    ensure!(disk.ok && disk.writes > 0, "the other disk: {disk:?}");
    Ok(Measured {
        writes,
        idle,
        stay,
        answers,
        operations: disk.reads + disk.writes + disk.syncs,
        gap_ms: disk.longest_gap_ms as f64,
    })
}

/// Plugs the disks and waits until each has a request under way. No request was submitted before the time returned.
fn requests_under_way(vmm: &mut Vmm, ebbtide: bool) -> Result<Instant> {
    shell(vmm, "echo 0 > /sys/bus/virtio/drivers_autoprobe")?;
    SLOW.plug(vmm, ebbtide)?;
    let all: Vec<String> = SLOW
        .slots
        .map(|slot| format!("0000:00:{slot:02x}.0"))
        .collect();
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
        if counted.trim() == SLOW.slots.len().to_string() {
            return Ok(());
        }
        if begun.elapsed() > limit {
            bail!("{} of {} after {limit:?}", counted.trim(), SLOW.slots.len());
        }
        std::thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slots_have_bits() {
        assert!(SLOW.slots.end <= 32 && SLOW.slots.len() >= PEER_EJECTS);
    }
}
