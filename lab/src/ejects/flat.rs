// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest that is its own kernel ([`ebbtide_hostile::ejector`]) ejects disks. It runs where Debian's kernel does not:
//! on a KVM that emulates a kernel's code instruction by instruction.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ebbtide_hostile::ejector;
use serde_json::Value;

use super::{LIMIT, Measured, STEADY, Slow, Watch, longest_stay, machine};
use crate::image::Image;
use crate::vmm::{Machine, Program, Vmm};

/// The guest knows of so much RAM.
const RAM: u64 = 128 << 20;
/// What QEMU needs for it: firmware that such a KVM gets through, which is not SeaBIOS, and no register that KVM lacks.
const PEER_OPTIONS: [&str; 4] = ["-bios", "qboot.rom", "-cpu", "host,arch-capabilities=off"];
/// The guest's first word comes within this, however slow its machine.
const FIRST: Duration = Duration::from_secs(30);
/// What a register reads as when nobody answers.
const NOBODY: u64 = 0xffff_ffff;

/// Starts the guest `kernel`, has it eject `ejects` of the disks while all have a request under way, and waits until those
/// are gone. Of Ebbtide everything is checked: that an ejected disk's registers read all ones at once, and that its slot
/// is empty and management told only after its request was answered, and then in this order.
///
/// # Errors
/// When the guest does not do its part, or the VMM breaks one of these rules.
pub(crate) fn eject(
    program: Program,
    kernel: &Path,
    slow: &Slow,
    ejects: usize,
) -> Result<Measured> {
    let ground = tempfile::tempdir()?;
    let ebbtide = program != Program::Qemu;
    let image = Image {
        version: "flat".into(),
        kernel: kernel.to_owned(),
        initrd: None,
    };
    let (machine, watched) = machine(program, &image, ground.path())?;
    let mut machine = Machine {
        command_line: "flat".into(),
        boot_bytes: RAM,
        ..machine
    };
    if !ebbtide {
        machine.more.extend(PEER_OPTIONS.map(str::to_owned));
    }
    let mut vmm = Vmm::start(&machine)?;
    let result = measure(&mut vmm, watched.as_deref(), slow, ejects, ebbtide);
    let measured = result.with_context(|| vmm.log())?;
    super::end(vmm, ebbtide)?;
    Ok(measured)
}

fn measure(
    vmm: &mut Vmm,
    watched: Option<&Path>,
    slow: &Slow,
    ejects: usize,
    ebbtide: bool,
) -> Result<Measured> {
    first_word(vmm)?;
    slow.plug(vmm, ebbtide)?;
    let submitted = Instant::now();
    let [count] = ask(vmm, ejector::SUBMIT)?;
    ensure!(
        count == slow.slots.len() as u64,
        "the guest gave a read to {count} of {} disks",
        slow.slots.len()
    );
    let first = Clock::read(vmm)?;
    let [] = ask(vmm, ejector::WORK)?;
    std::thread::sleep(STEADY);
    let mut idle = Vec::new();
    for _ in slow.slots.clone() {
        let [ticks] = ask(vmm, ejector::IDLE)?;
        idle.push(ticks);
    }
    if ebbtide {
        // What came before does not count.
        longest_stay(vmm)?;
    }
    let pid = vmm.process().pid();
    let watch = Watch::start(watched.map_or_else(|| vmm.qmp_path(), Path::to_owned), pid)?;
    let writes = write_each(vmm, slow, ejects, submitted)?;
    let stay = if ebbtide {
        let stay = longest_stay(vmm)?;
        let result = slow.gone_in_order(vmm, submitted, |vmm| look(vmm, slow));
        result.context("the way out of the disks")?;
        Some(stay)
    } else {
        vmm.qmp().wait_event("DEVICE_DELETED", LIMIT)?;
        None
    };
    let answers = watch.stop()?;
    let [operations, gap, errors] = ask(vmm, ejector::REPORT)?;
    ensure!(
        operations > 0 && errors == 0,
        "the other disk: {operations} operations, {errors} errors"
    );
    let per_ms = first.ticks_per_ms(&Clock::read(vmm)?)?;
    let in_ms = |ticks: u64| ticks as f64 / per_ms;
    Ok(Measured {
        writes: writes.into_iter().map(in_ms).collect(),
        idle: idle.into_iter().map(in_ms).collect(),
        stay,
        answers,
        operations,
        gap_ms: in_ms(gap),
    })
}

/// The requests have ended before all disks were ejected: nothing is known.
#[derive(Debug, thiserror::Error)]
#[error("the requests have ended before slot {slot} was ejected: this machine is too busy")]
pub(crate) struct TooLate {
    slot: u32,
}

/// Waits until the guest can be asked. What it says before anybody is at the other end of its line is lost: then it begins
/// again.
fn first_word(vmm: &mut Vmm) -> Result<()> {
    let mut line = vmm.guest().wait_line(FIRST);
    if line.is_err() {
        eprintln!("the guest's first word did not come: it is reset");
        vmm.qmp().execute("system_reset", Value::Null)?;
        line = vmm.guest().wait_line(LIMIT);
    }
    numbers::<1>(&line?, ejector::READY).map(drop)
}

/// What each of the first `ejects` took, in ticks.
fn write_each(vmm: &mut Vmm, slow: &Slow, ejects: usize, submitted: Instant) -> Result<Vec<u64>> {
    let mut writes = Vec::new();
    for slot in slow.slots.clone().take(ejects) {
        let late = submitted.elapsed() >= slow.latency;
        ensure!(!late, TooLate { slot });
        let [ejected, ticks, config] = ask(vmm, ejector::EJECT)?;
        ensure!(
            ejected == u64::from(slot),
            "the guest ejected slot {ejected}, not {slot}"
        );
        ensure!(
            config == NOBODY,
            "the configuration space of slot {slot} reads {config:#x} after its eject"
        );
        writes.push(ticks);
    }
    Ok(writes)
}

/// Which slots are occupied. One that is not has had its request answered, with success.
fn look(vmm: &mut Vmm, slow: &Slow) -> Result<u32> {
    let [up, answered, failed] = ask(vmm, ejector::LOOK)?;
    for slot in slow.slots.clone() {
        let bit = 1 << slot;
        ensure!(failed & bit == 0, "the read of slot {slot} has failed");
        ensure!(
            up & bit != 0 || answered & bit != 0,
            "slot {slot} is empty in the guest's eyes and its read not answered"
        );
    }
    u32::try_from(up).with_context(|| format!("slots {up:#x}"))
}

/// The guest's clock and ours at the same time, or nearly.
struct Clock {
    ticks: u64,
    at: Instant,
}

impl Clock {
    fn read(vmm: &mut Vmm) -> Result<Clock> {
        let begun = Instant::now();
        let [ticks] = ask(vmm, ejector::CLOCK)?;
        let at = begun + begun.elapsed() / 2;
        Ok(Clock { ticks, at })
    }

    fn ticks_per_ms(&self, later: &Clock) -> Result<f64> {
        let time = later.at.saturating_duration_since(self.at);
        let ticks = later.ticks.checked_sub(self.ticks);
        let ticks = ticks.with_context(|| {
            format!(
                "the guest's clock went from {} to {}",
                self.ticks, later.ticks
            )
        })?;
        ensure!(
            ticks > 0 && time > Duration::ZERO,
            "{ticks} ticks of the guest's clock in {time:?}"
        );
        Ok(ticks as f64 / (time.as_secs_f64() * 1e3))
    }
}

/// Has the guest do something; its answer.
fn ask<const N: usize>(vmm: &mut Vmm, command: u8) -> Result<[u64; N]> {
    let word = ejector::word(command).context("no such command")?;
    vmm.guest().send_byte(command)?;
    let line = vmm.guest().wait_line(LIMIT).context(word)?;
    numbers(&line, word)
}

fn numbers<const N: usize>(line: &str, word: &str) -> Result<[u64; N]> {
    let mut words = line.split(' ');
    match words.next() {
        Some(first) if first == word => {}
        Some(ejector::FAILED) => bail!("the guest can't go on: {line}"),
        _ => bail!("the guest says {line:?}, not {word}"),
    }
    let numbers: Option<Vec<u64>> = words.map(|it| it.parse().ok()).collect();
    numbers
        .and_then(|it| it.try_into().ok())
        .with_context(|| format!("the guest says {line:?}, not {N} numbers"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_a_word_and_numbers() {
        assert_eq!(numbers("clock 7", "clock").unwrap(), [7]);
        assert!(numbers::<0>("working", "working").is_ok());
        assert_eq!(numbers("slots 1 2 3", "slots").unwrap(), [1, 2, 3]);
        for wrong in ["clock", "clock 1 2", "clock x", "idle 1", "failed 1", ""] {
            assert!(numbers::<1>(wrong, "clock").is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_clocks_are_compared() {
        let begun = Instant::now();
        let first = Clock {
            ticks: 5_000,
            at: begun,
        };
        let at = |ticks, ms| Clock {
            ticks,
            at: begun + Duration::from_millis(ms),
        };
        assert_eq!(first.ticks_per_ms(&at(25_000, 10)).unwrap(), 2_000.0);
        assert!(first.ticks_per_ms(&at(4_000, 10)).is_err());
        assert!(first.ticks_per_ms(&at(6_000, 0)).is_err());
    }
}
