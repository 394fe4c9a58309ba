// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whole guests side by side: Ebbtide and Debian's QEMU in turn, same kernel, initrd, command line
//! and machine.

pub mod blk;
pub mod unplug;

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::image::Image;
use crate::vmm::{Machine, Program, Vmm};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const BOOT: u64 = 512 * MIB;
const TOP: u64 = 4 * GIB;
const RUNS: usize = 5;
const LIMIT: Duration = Duration::from_secs(180);
/// Mappings from this size on are guest RAM; nothing else of a VMM is as large.
const GUEST_RAM_FROM: u64 = 128 * MIB;
const PEER: &str = "QEMU of Debian";

/// One row, as the summary holds it.
#[derive(Debug, Serialize)]
struct Row {
    id: String,
    ours: f64,
    peer: f64,
    peer_name: &'static str,
    floor: Option<f64>,
    unit: &'static str,
    n: usize,
    min: f64,
    max: f64,
    /// What every run of ours has to stay below.
    #[serde(skip_serializing_if = "Option::is_none")]
    budget: Option<f64>,
    /// How ours compares with the peer's of the same round, and how it should.
    #[serde(flatten)]
    ratio: Option<Ratio>,
    /// How much of it was processor time, where that is known.
    #[serde(flatten)]
    cpu: Option<Cpu>,
}

/// Processor time of the threads that are waited for, at worst, in the unit of the row.
#[derive(Clone, Copy, Debug, Serialize)]
struct Cpu {
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_peer: Option<f64>,
}

/// Ours divided by the peer's.
#[derive(Clone, Copy, Debug, Serialize)]
struct Ratio {
    /// The median of all rounds.
    ratio: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio_min: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio_max: Option<f64>,
}

/// What one guest's life gives.
struct Sample {
    boot_ms: f64,
    grow_ms: f64,
    shrink_ms: f64,
    rss_kib: f64,
}

/// Measures and prints one JSON row a line; words for people go to standard error.
///
/// # Errors
/// When a guest of either VMM does not do its part: there is no row without its peer.
pub fn run(ebbtide: &Path, image: &Image) -> Result<()> {
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    for round in 1..=RUNS {
        eprintln!("guests: round {round} of {RUNS}");
        let program = Program::Ebbtide(ebbtide.to_owned());
        ours.push(sample("Ebbtide", program, image).context("Ebbtide")?);
        peers.push(sample(PEER, Program::Qemu, image).context(PEER)?);
    }
    let rows = [
        row("boot/ms", "ms", &ours, &peers, |s| s.boot_ms),
        row("grow_3584M/ms", "ms", &ours, &peers, |s| s.grow_ms),
        row("shrink_3584M/ms", "ms", &ours, &peers, |s| s.shrink_ms),
        row("vmm_rss/KiB", "KiB", &ours, &peers, |s| s.rss_kib),
    ];
    for row in rows {
        println!("{}", serde_json::to_string(&row)?);
    }
    Ok(())
}

fn sample(name: &str, program: Program, image: &Image) -> Result<Sample> {
    let plain = Machine::new(program, image.clone());
    // The row of the boot is without the memory device: that is the command line both agree on.
    let mut vmm = Vmm::start(&plain)?;
    let boot = vmm.wait_ready(LIMIT)?;
    std::thread::sleep(Duration::from_secs(1));
    let rss_kib = overhead_kib(vmm.process().pid())?;
    vmm.power_off(LIMIT)?;
    let mut vmm = Vmm::start(&Machine {
        max_bytes: Some(TOP),
        ..plain
    })?;
    vmm.wait_ready(LIMIT)?;
    let grow = vmm.resize(TOP, LIMIT).context("grow")?;
    let shrink = vmm.resize(BOOT, LIMIT).context("shrink")?;
    vmm.power_off(LIMIT)?;
    eprintln!(
        "  {name:<14} boot {:>6.0} ms   grow {:>6.0} ms   shrink {:>6.0} ms   overhead {rss_kib:>7.0} KiB",
        ms(boot),
        ms(grow),
        ms(shrink)
    );
    Ok(Sample {
        boot_ms: ms(boot),
        grow_ms: ms(grow),
        shrink_ms: ms(shrink),
        rss_kib,
    })
}

pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// Resident memory of a process without the guest's RAM.
fn overhead_kib(pid: u32) -> Result<f64> {
    let file = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
    Ok(resident_of_small_mappings(&text) as f64)
}

fn resident_of_small_mappings(smaps: &str) -> u64 {
    let value = |line: &str| {
        line.split_whitespace()
            .nth(1)
            .and_then(|n| n.parse::<u64>().ok())
            .unwrap_or(0)
    };
    let (mut sum, mut size) = (0, 0);
    for line in smaps.lines() {
        if line.starts_with("Size:") {
            size = value(line);
        } else if line.starts_with("Rss:") && size * 1024 < GUEST_RAM_FROM {
            sum += value(line);
        }
    }
    sum
}

fn row<S>(
    id: impl Into<String>,
    unit: &'static str,
    ours: &[S],
    peers: &[S],
    of: impl Fn(&S) -> f64,
) -> Row {
    let mut mine: Vec<f64> = ours.iter().map(&of).collect();
    let mut theirs: Vec<f64> = peers.iter().map(&of).collect();
    mine.sort_by(f64::total_cmp);
    theirs.sort_by(f64::total_cmp);
    Row {
        id: id.into(),
        ours: median(&mine),
        peer: median(&theirs),
        peer_name: PEER,
        floor: None,
        unit,
        n: mine.len(),
        min: mine.first().copied().unwrap_or(f64::NAN),
        max: mine.last().copied().unwrap_or(f64::NAN),
        budget: None,
        ratio: None,
        cpu: None,
    }
}

/// The median of what the rounds give.
fn paired<S>(ours: &[S], peers: &[S], of: impl Fn(&S) -> f64) -> f64 {
    let mut ratios: Vec<f64> = ours
        .iter()
        .zip(peers)
        .map(|(ours, peer)| of(ours) / of(peer))
        .collect();
    ratios.sort_by(f64::total_cmp);
    median(&ratios)
}

pub(crate) fn median(sorted: &[f64]) -> f64 {
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_left_out() {
        let smaps = "a-b rw-p\nSize: 524288 kB\nRss: 100000 kB\nPss: 3 kB\n\
                     c-d rw-p\nSize: 132 kB\nRss: 100 kB\nSwap: 0 kB\n\
                     e-f r--p\nSize: 4 kB\nRss: 4 kB\n";
        assert_eq!(resident_of_small_mappings(smaps), 104);
    }
}
