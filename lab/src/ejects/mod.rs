// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Disks are ejected by their guest while requests of theirs are under way: what is the same whatever guest does it, and
//! [`flat`], a guest that is its own kernel.

pub(crate) mod flat;

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};

use crate::bench::{median, ms};
use crate::image::Image;
use crate::qmp::Qmp;
use crate::scheduled::{self, Scheduled};
use crate::vmm::{Disk, Machine, Program, Vmm};

/// QEMU's board whose bus 0 has hot-plug slots. With SMM, VMware's port and the APIC's `vapic` (see [`machine`]) as they are
/// by default, user mode's port accesses fault in the capsule; without the three they do not. Which of them it is, and why,
/// is not known: a task register that KVM loads anew, marked busy, would explain it.
const PEER_BOARD: &str = "pc,smm=off,vmport=off";
/// Of the disk that stays, and of those that are ejected.
const WORK_BYTES: u64 = 64 << 20;
const SLOW_BYTES: u64 = 64 << 20;
/// vCPUs: one that ejects and one that could go on.
pub(crate) const CPUS: u32 = 2;
/// Management asks again this long after an answer.
const ASK: Duration = Duration::from_millis(5);
/// What it asks, in turn: what both VMMs know and answer at any time.
const QUESTIONS: [&str; 7] = [
    "query-status",
    "query-block",
    "query-named-block-nodes",
    "query-pci",
    "query-memory-devices",
    "query-iothreads",
    "query-chardev",
];
/// How often the guest is asked what is in its slots.
const LOOK: Duration = Duration::from_millis(200);
/// The other disk works for so long before anything happens.
pub(crate) const STEADY: Duration = Duration::from_secs(1);
pub(crate) const LIMIT: Duration = Duration::from_secs(90);

/// The worst of one guest's life.
pub(crate) struct Sample {
    pub write_ms: f64,
    /// Processor time of the exit that took most of it; only Ebbtide tells.
    pub write_cpu_ms: Option<f64>,
    /// Of as many writes of the same registers that eject nothing.
    pub idle_write_ms: f64,
    pub answer_ms: f64,
    /// Processor time of the VMM's main thread while the slowest answer was waited for.
    pub answer_cpu_ms: f64,
    pub gap_ms: f64,
    /// The longest that a thread lay still which had nothing to do with any of this.
    pub still_ms: f64,
}

/// What was measured of one guest's life.
pub(crate) struct Measured {
    /// What each eject took, in milliseconds, and each write that ejects nothing.
    pub writes: Vec<f64>,
    pub idle: Vec<f64>,
    /// Only Ebbtide tells.
    pub stay: Option<Stay>,
    pub answers: Answers,
    /// Of the other disk: operations, and the longest time without the end of one.
    pub operations: u64,
    pub gap_ms: f64,
}

impl Measured {
    /// Says it for people, on standard error, and keeps the worst.
    pub(crate) fn told(mut self, name: &str) -> Sample {
        self.writes.sort_by(f64::total_cmp);
        self.idle.sort_by(f64::total_cmp);
        let worst = |sorted: &[f64]| sorted.last().copied().unwrap_or(f64::NAN);
        let Answers {
            count: answers,
            worst: longest,
            slowest,
            main,
            idle,
            stolen,
        } = self.answers;
        let sample = Sample {
            write_ms: worst(&self.writes),
            write_cpu_ms: self.stay.map(|stay| stay.cpu_us as f64 / 1e3),
            idle_write_ms: worst(&self.idle),
            answer_ms: ms(longest),
            answer_cpu_ms: ms(main.ran),
            gap_ms: self.gap_ms,
            still_ms: ms(idle),
        };
        let stay = self.stay.map_or_else(String::new, |Stay { us, cpu_us }| {
            format!(
                ", its vCPU out of the guest for {:.3} ms, at most {:.3} ms of it at work",
                us as f64 / 1e3,
                cpu_us as f64 / 1e3
            )
        });
        eprintln!(
            "  {name:<14} eject written in {:>9.3} ms, at worst of {} in {:>9.3} ms{stay} (a write that ejects nothing: {:.3} ms, at worst {:.3} ms); {answers} answers, the slowest, to {slowest}, {:>8.1} ms, in which the main thread worked for {:.1} ms and waited for a processor for {:.1} ms; \
             {} operations of the other disk, the longest gap {:>6.1} ms; \
             a thread without work slept {:.0} ms for at most {:.1} ms, this machine's own host took {:.0} ms of its processors",
            median(&self.writes),
            self.writes.len(),
            sample.write_ms,
            median(&self.idle),
            sample.idle_write_ms,
            sample.answer_ms,
            ms(main.ran),
            ms(main.waited),
            self.operations,
            self.gap_ms,
            ms(ASK),
            sample.still_ms,
            ms(stolen),
        );
        sample
    }
}

/// A guest with a disk that stays, on a thread of its own; and the monitor's second socket where the first one serves one
/// client only.
pub(crate) fn machine(
    program: Program,
    image: &Image,
    ground: &Path,
) -> Result<(Machine, Option<PathBuf>)> {
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

/// Ends a VMM whose disks have been ejected.
///
/// # Errors
/// It does not end well.
pub(crate) fn end(mut vmm: Vmm, ebbtide: bool) -> Result<()> {
    if !ebbtide {
        // It would wait for the other disks' requests, one after the other.
        return Ok(());
    }
    vmm.qmp().execute("quit", Value::Null)?;
    let status = vmm.wait_exit(LIMIT)?;
    ensure!(status.success(), "it ended with {status}{}", vmm.log());
    Ok(())
}

/// The disks that are ejected.
#[derive(Clone, Debug)]
pub(crate) struct Slow {
    /// Where they are.
    pub slots: Range<u32>,
    /// What each request of theirs takes.
    pub latency: Duration,
}

impl Slow {
    /// The id of the disk in a slot.
    pub(crate) fn id(slot: u32) -> String {
        format!("dev{slot}")
    }

    /// Plugs them.
    pub(crate) fn plug(&self, vmm: &mut Vmm, ebbtide: bool) -> Result<()> {
        for slot in self.slots.clone() {
            let node = json!({"driver": "null-co", "node-name": format!("slow{slot}"), "size": SLOW_BYTES,
                "latency-ns": self.latency.as_nanos() as u64});
            vmm.qmp().execute("blockdev-add", node)?;
            let mut disk = json!({"driver": "virtio-blk-pci", "id": Slow::id(slot), "drive": format!("slow{slot}"),
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
        Ok(())
    }

    /// Waits until all disks are gone. A disk's slot is empty in the guest's eyes, which `look` sees by bit, only when its
    /// request has ended, and management is told after the guest. No request was submitted before `submitted`.
    pub(crate) fn gone_in_order(
        &self,
        vmm: &mut Vmm,
        submitted: Instant,
        mut look: impl FnMut(&mut Vmm) -> Result<u32>,
    ) -> Result<()> {
        let ended = submitted + self.latency;
        let mut deleted: HashMap<String, Instant> = HashMap::new();
        loop {
            let asked = Instant::now();
            let up = look(vmm)?;
            let seen = Instant::now();
            for slot in self.slots.clone() {
                let occupied = up & (1 << slot) != 0;
                let told = deleted.get(&Slow::id(slot));
                check_slot(slot, occupied, (asked, seen), ended, told)?;
            }
            if deleted.len() == self.slots.len() {
                return Ok(());
            }
            ensure!(
                seen < ended + LIMIT,
                "only {} of {} are deleted",
                deleted.len(),
                self.slots.len()
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
}

/// The longest that an exit has kept a vCPU out of the guest, and the most processor time that one took, in microseconds.
#[derive(Clone, Copy)]
pub(crate) struct Stay {
    pub us: u64,
    pub cpu_us: u64,
}

/// Since this was last asked.
pub(crate) fn longest_stay(vmm: &mut Vmm) -> Result<Stay> {
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

/// One look at a slot, which happened between `asked` and `seen`. Its request ended at `ended` or later.
fn check_slot(
    slot: u32,
    occupied: bool,
    (asked, seen): (Instant, Instant),
    ended: Instant,
    deleted: Option<&Instant>,
) -> Result<()> {
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

/// A client of its own that asks one question after the other; beside it a thread that does nothing but see how late it
/// wakes up, which is what this machine does to anybody.
pub(crate) struct Watch {
    stop: Stop,
    thread: JoinHandle<Result<Answers>>,
    idler: JoinHandle<Duration>,
    stolen: Duration,
}

/// What it got.
#[derive(Default)]
pub(crate) struct Answers {
    count: u32,
    /// How long the slowest took, and what was asked.
    worst: Duration,
    slowest: &'static str,
    /// What the VMM's main thread, which answers, did meanwhile.
    main: Scheduled,
    /// The longest that a thread lay still which wanted to sleep for [`ASK`].
    idle: Duration,
    /// What this machine's own host took of its processors.
    stolen: Duration,
}

impl Watch {
    pub(crate) fn start(socket: PathBuf, pid: u32) -> Result<Watch> {
        let mut qmp = Qmp::connect(&socket)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut answers = Answers::default();
            for question in QUESTIONS.into_iter().cycle() {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let before = Scheduled::of_main_thread(pid)?;
                let begun = Instant::now();
                qmp.execute(question, Value::Null)?;
                let took = begun.elapsed();
                if took > answers.worst {
                    (answers.worst, answers.slowest) = (took, question);
                    answers.main = Scheduled::of_main_thread(pid)?.since(&before);
                }
                answers.count += 1;
                std::thread::sleep(ASK);
            }
            Ok(answers)
        });
        let stopped = Arc::clone(&stop);
        let idler = std::thread::spawn(move || longest_sleep(&stopped));
        Ok(Watch {
            stop: Stop(stop),
            thread,
            idler,
            stolen: scheduled::stolen()?,
        })
    }

    pub(crate) fn stop(self) -> Result<Answers> {
        drop(self.stop);
        let result = self.thread.join();
        let mut answers = result.map_err(|_| anyhow!("the watching client panicked"))??;
        ensure!(answers.count > 0, "the watching client got no answer");
        let idle = self.idler.join();
        answers.idle = idle.map_err(|_| anyhow!("the thread that sleeps panicked"))?;
        answers.stolen = scheduled::stolen()?.saturating_sub(self.stolen);
        Ok(answers)
    }
}

/// Ends the threads, also when nobody asks for what they saw.
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn longest_sleep(stopped: &AtomicBool) -> Duration {
    let mut longest = Duration::ZERO;
    while !stopped.load(Ordering::Relaxed) {
        let begun = Instant::now();
        std::thread::sleep(ASK);
        longest = longest.max(begun.elapsed());
    }
    longest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_that_is_empty_too_soon_or_full_too_late_is_found() {
        let begun = Instant::now();
        let at = |seconds: u64| begun + Duration::from_secs(seconds);
        let look = |occupied, asked, deleted: Option<u64>| {
            let deleted = deleted.map(at);
            check_slot(
                7,
                occupied,
                (at(asked), at(asked)),
                at(20),
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
}
