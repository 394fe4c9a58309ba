// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that does to its devices what no driver would (`lab/hostile`), while management adds and removes them.
//!
//! In each round all devices are made, the guest is let go at them, and meanwhile devices come and go and questions are
//! asked at random. Then the guest is stopped and reset and everything is taken away, by force. What has to hold:
//!
//! - the VMM lives, each question is answered within a bound, and no exit keeps a vCPU longer than that;
//! - a device goes only if its policy lets the guest eject it, if that was asked for, or with what it is behind;
//! - what is written to the log, and what memory the process has, is bounded;
//! - after a round nothing is left that was not there after the one before.
//!
//! `EBBTIDE_SEED` repeats a run: the same guest and the same commands, whose timing differs.

mod management;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ebbtide_hostile::Random;
use serde_json::Value;

use super::hotplug::Residue;
use super::{Ground, MIB, STEP_LIMIT};
use crate::image::Image;
use crate::resident;
use crate::vmm::{Machine, Program, Vmm};
use management::Management;

/// Repeats a run.
const SEED: &str = "EBBTIDE_SEED";
/// Rounds, and how long the guest is let go in each: short form and long.
const SHORT: (u32, Duration) = (2, Duration::from_secs(5));
const LONG: (u32, Duration) = (20, Duration::from_secs(30));
/// A guest that has not come further within this is reset: it may have halted its own processors.
const STALLED: Duration = Duration::from_secs(3);
/// Words of the guest that a round waits for, and how long at most, where the machine is busy with other things.
const FEW: u64 = 3;
const SLOW: Duration = Duration::from_secs(60);
/// Acts between two words of the guest.
const WORD: u64 = 200;
/// Boot RAM, which the guest knows.
const RAM: u64 = 128 * MIB;
/// What the VMM may have beside the guest's boot RAM when all devices are gone.
const OWN: u64 = 96 * MIB;
/// What the VMM may log in a round: a handful of lines for each call site and device.
const LOG_BYTES: u64 = 256 << 10;
/// Ports and bridges that stay: `guest-eject=off`.
const BOARD: &[&str] = &[
    "pcie-root-port,id=rp0,guest-eject=off",
    "pcie-root-port,id=rp1,guest-eject=off",
    "pcie-root-port,id=rp2,guest-eject=off",
    "pci-bridge,id=pb0,guest-eject=off",
    "x3130-upstream,id=up0,bus=rp0,guest-eject=off",
    "xio3130-downstream,id=down0,bus=up0,guest-eject=off",
    "xio3130-downstream,id=down1,bus=up0,guest-eject=off",
];

/// See the module.
pub fn run(ground: &Ground) -> Result<()> {
    let seed = seed()?;
    println!("{:<5} a hostile guest: {SEED}={seed}", ground.series);
    rounds(ground, seed).with_context(|| format!("{SEED}={seed}"))
}

fn seed() -> Result<u64> {
    if let Ok(text) = std::env::var(SEED) {
        return text.parse().with_context(|| format!("{SEED}={text}"));
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    // Short enough to be typed.
    Ok(u64::from(now.subsec_nanos()) ^ now.as_secs() & 0xffff)
}

fn rounds(ground: &Ground, seed: u64) -> Result<()> {
    let mut vmm = Vmm::start(&machine(ground, seed)?)?;
    let mut management = Management::new(Random::new(seed));
    // As after each round: what is furnished below is furnished undisturbed, however long that takes here.
    management.stand_still(&mut vmm)?;
    let (rounds, length) = if ground.long { LONG } else { SHORT };
    let mut before: Option<Residue> = None;
    let mut seen = Seen::default();
    for round in 0..rounds {
        let logged = log_bytes(ground)?;
        let during = one_round(&mut vmm, &mut management, length);
        seen.add(&during.with_context(|| format!("round {round}"))?);
        within(ground, &mut vmm, logged).with_context(|| format!("round {round}"))?;
        match &before {
            Some(before) => {
                let same = before.again(&mut vmm);
                same.with_context(|| format!("left of round {round}"))?;
            }
            None => before = Some(Residue::of(&mut vmm)?),
        }
    }
    println!(
        "{:<5} a hostile guest: {seen}; {management}; {} KiB of log",
        ground.series,
        log_bytes(ground)? >> 10
    );
    vmm.qmp().execute("quit", Value::Null)?;
    let status = vmm.wait_exit(STEP_LIMIT)?;
    ensure!(status.success(), "it ended with {status}");
    ensure!(!vmm.qmp_path().exists(), "its socket is left behind");
    Ok(())
}

/// What must not grow without bound, when all devices are gone.
fn within(ground: &Ground, vmm: &mut Vmm, logged: u64) -> Result<()> {
    let logged = log_bytes(ground)? - logged;
    ensure!(
        logged <= LOG_BYTES,
        "{logged} bytes were logged, {LOG_BYTES} are enough"
    );
    resident::beside_boot_ram_within(vmm, OWN).context("with no device left")
}

fn log_bytes(ground: &Ground) -> Result<u64> {
    Ok(std::fs::metadata(&ground.log).context("log")?.len())
}

fn machine(ground: &Ground, seed: u64) -> Result<Machine> {
    let image = Image {
        version: "hostile".into(),
        kernel: ground.hostile.clone(),
        initrd: None,
    };
    let mut more: Vec<String> = Vec::new();
    for device in BOARD {
        more.extend(["--device".into(), (*device).into()]);
    }
    Ok(Machine {
        command_line: format!("seed={seed} cpus=2"),
        cpus: 2,
        boot_bytes: RAM,
        max_bytes: Some(2 * RAM),
        memory_slots: 4,
        more,
        log: Some(ground.log.clone()),
        ..Machine::new(Program::Ebbtide(ground.ebbtide.clone()), image)
    })
}

/// How far the guest came.
#[derive(Clone, Copy, Default)]
struct Seen {
    /// Words of its on the serial line: each after so many acts of its first processor.
    words: u64,
    /// How often it began.
    lives: u64,
    /// How often it had to be reset because it came no further.
    stalls: u64,
}

impl Seen {
    fn of(vmm: &mut Vmm) -> Result<Seen> {
        let text = vmm.guest().console().text();
        ensure!(!text.contains("panicked"), "the guest itself is at fault");
        let count = |what: &str| text.matches(what).count() as u64;
        Ok(Seen {
            words: count("hostile: acts "),
            lives: count("hostile: life "),
            stalls: 0,
        })
    }

    fn add(&mut self, other: &Seen) {
        self.words += other.words;
        self.lives += other.lives;
        self.stalls += other.stalls;
    }
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Seen {
            words,
            lives,
            stalls,
        } = self;
        write!(
            f,
            "{} acts in {lives} lives, {stalls} ended from outside",
            words * WORD
        )
    }
}

/// All devices come, the guest is let go at them for `length`, and all devices go.
fn one_round(vmm: &mut Vmm, management: &mut Management, length: Duration) -> Result<Seen> {
    let first = Seen::of(vmm)?;
    management.furnish(vmm)?;
    management.ask(vmm, "cont", Value::Null)??;
    let begun = Instant::now();
    let mut last = (first, begun);
    let mut stalls = 0;
    while begun.elapsed() < length || (last.0.words < first.words + FEW && begun.elapsed() < SLOW) {
        management.step(vmm)?;
        let now = Seen::of(vmm)?;
        let further = (now.words, now.lives) != (last.0.words, last.0.lives);
        let stands = management.is_standing(vmm)?;
        if further && !stands {
            last = (now, Instant::now());
        } else if stands || last.1.elapsed() > STALLED {
            stalls += 1;
            management.ask(vmm, "system_reset", Value::Null)??;
            management.go_on(vmm)?;
            last = (now, Instant::now());
        }
    }
    let now = Seen::of(vmm)?;
    management.stand_still(vmm)?;
    management.check_stays(vmm)?;
    management.clear(vmm)?;
    let round = Seen {
        words: now.words.saturating_sub(first.words),
        lives: now.lives.saturating_sub(first.lives),
        stalls,
    };
    ensure!(round.words > 0, "the guest did next to nothing: {round}");
    Ok(round)
}
