// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The demo: a guest that grows, uses what it got, and gives it back, with a disk at work.

use std::fs;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ebbtide_agent::protocol::DiskStart;
use serde::Serialize;

use crate::deny;
use crate::image::Image;
use crate::vmm::{Disk, Machine, Program, Vmm};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const BOOT: u64 = 512 * MIB;
const GROWN: u64 = 4 * GIB;
const PATTERN: u64 = 3 * GIB;
const SEED: u64 = 0xebb;
const DISK_BYTES: u64 = 256 * MIB;
const DISK: &str = "/dev/vda";
/// After the shrink, until the host's memory is back at the latest.
const SETTLE: Duration = Duration::from_secs(5);
/// What may stay with the VMM after the shrink, beyond what it had at boot: the guest's own page
/// tables and caches, and boot RAM it had not touched before.
const RETURNED_SLACK: u64 = 512 * MIB;
const BOOT_LIMIT: Duration = Duration::from_secs(90);
const STEP_LIMIT: Duration = Duration::from_secs(240);

/// What is written to `summary.json`.
#[derive(Debug, Serialize)]
pub struct Summary {
    kvm: &'static str,
    kernel: String,
    boot_ms: u64,
    grow: Resize,
    pattern: Verified,
    shrink: Resize,
    disk: Verified,
    host_rss: HostRss,
    ok: bool,
}

#[derive(Debug, Serialize)]
struct Resize {
    from: u64,
    to: u64,
    ms: u64,
}

#[derive(Debug, Serialize)]
struct Verified {
    bytes: u64,
    ok: bool,
}

#[derive(Debug, Serialize)]
struct HostRss {
    boot: u64,
    peak: u64,
    end: u64,
}

/// Runs the demo with the KVM of this machine and writes `DIR/summary.json`.
///
/// # Errors
/// The first step that fails, with the reason.
pub fn run(ebbtide: &Path, image: Image, kvm: &'static str, dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let file = dir.join("summary.json");
    // A demo that fails must not leave the summary of one that did not.
    match fs::remove_file(&file) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("remove {}", file.display()));
        }
        _ => {}
    }
    let work = tempfile::tempdir()?;
    let disk = make_disk(work.path())?;
    let mut machine = Machine::new(Program::Ebbtide(ebbtide.to_owned()), image.clone());
    machine.max_bytes = Some(GROWN);
    machine.disks.push(Disk {
        id: "disk0".into(),
        path: disk,
        readonly: false,
    });
    let mut show = Timeline::new();
    show.say(&format!(
        "starting Debian {} with {} MiB, 1 vCPU, a disk",
        image.version,
        BOOT / MIB
    ));
    let summary = live(machine, image.version, kvm, &mut show)?;
    fs::write(&file, serde_json::to_string(&summary)? + "\n")
        .with_context(|| format!("write {}", file.display()))?;
    table(&summary);
    println!("summary: {}", file.display());
    ensure!(
        summary.ok,
        "the demo did not do what it is for: see the table"
    );
    Ok(())
}

fn live(
    machine: Machine,
    kernel: String,
    kvm: &'static str,
    show: &mut Timeline,
) -> Result<Summary> {
    let mut vmm = Vmm::start(&machine)?;
    let boot = vmm.wait_ready(BOOT_LIMIT).context("boot")?;
    let rss_boot = vmm.rss_bytes()?;
    show.say(&format!(
        "the guest's agent is up; the VMM holds {}",
        size(rss_boot)
    ));
    vmm.guest()
        .disk_start(disk_work())
        .context("start the work on the disk")?;
    show.say("the disk is written, read and verified from now on");

    let grow = resize(&mut vmm, BOOT, GROWN, show).context("grow")?;
    show.say(&format!("filling {} with a pattern", size(PATTERN)));
    vmm.guest()
        .fill(PATTERN, SEED, STEP_LIMIT)
        .context("fill")?;
    let rss_peak = vmm.rss_bytes()?;
    show.say(&format!("filled; the VMM holds {}", size(rss_peak)));
    let checked = vmm.guest().check(STEP_LIMIT).context("check")?;
    let pattern = Verified {
        bytes: checked.bytes,
        ok: checked.ok,
    };
    show.say(&format!(
        "checked {}: {}",
        size(checked.bytes),
        verdict(checked.ok)
    ));
    vmm.guest().free().context("free")?;

    let shrink = resize(&mut vmm, GROWN, BOOT, show).context("shrink")?;
    let rss_end = given_back(&vmm, rss_boot + RETURNED_SLACK)?;
    show.say(&format!("the VMM holds {}", size(rss_end)));
    let status = vmm
        .guest()
        .disk_stop_verified(DISK, STEP_LIMIT)
        .context("verify the disk")?;
    let disk = Verified {
        bytes: status.bytes_verified,
        ok: status.ok && status.verified_all,
    };
    show.say(&format!(
        "disk: {} written, {} verified: {}",
        size(status.bytes_written),
        size(status.bytes_verified),
        verdict(disk.ok)
    ));
    let complaints = vmm.guest().denied_kernel_messages(&deny::patterns())?;
    if !complaints.is_empty() {
        bail!("the guest's kernel complains:\n{}", complaints.join("\n"));
    }
    vmm.power_off(STEP_LIMIT).context("power off")?;
    show.say("the guest has powered off");
    let ok = pattern.ok && disk.ok && rss_end <= rss_boot + RETURNED_SLACK;
    Ok(Summary {
        kvm,
        kernel,
        boot_ms: millis(boot),
        grow,
        pattern,
        shrink,
        disk,
        host_rss: HostRss {
            boot: rss_boot,
            peak: rss_peak,
            end: rss_end,
        },
        ok,
    })
}

/// What the VMM holds, once that is no more than `bytes`, or is not within [`SETTLE`].
fn given_back(vmm: &Vmm, bytes: u64) -> Result<u64> {
    let begun = Instant::now();
    loop {
        let rss = vmm.rss_bytes()?;
        if rss <= bytes || begun.elapsed() >= SETTLE {
            return Ok(rss);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn disk_work() -> DiskStart {
    DiskStart {
        path: DISK.into(),
        seed: SEED,
        verify: true,
        // The one vCPU is to have time for the memory, too.
        pause_us: 20_000,
        span_bytes: DISK_BYTES,
    }
}

fn make_disk(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("disk.img");
    fs::File::create(&path)?.set_len(DISK_BYTES)?;
    Ok(path)
}

/// Resizes with progress.
fn resize(vmm: &mut Vmm, from: u64, to: u64, show: &mut Timeline) -> Result<Resize> {
    let begun = Instant::now();
    vmm.request_total(to)?;
    loop {
        let total = vmm.total()?;
        show.progress(&format!("{} of {}", size(total), size(to)));
        if total == to {
            break;
        }
        if begun.elapsed() > STEP_LIMIT {
            bail!("{} of {} after {STEP_LIMIT:?}", size(total), size(to));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let ms = millis(begun.elapsed());
    show.say(&format!("{} -> {} in {ms} ms", size(from), size(to)));
    Ok(Resize { from, to, ms })
}

fn table(s: &Summary) {
    println!();
    println!("  KVM            {}", s.kvm);
    println!("  kernel         {}", s.kernel);
    println!("  boot           {:>7} ms   exec to the agent", s.boot_ms);
    for (name, r) in [("grow", &s.grow), ("shrink", &s.shrink)] {
        println!(
            "  {name:<14} {:>7} ms   {} -> {}",
            r.ms,
            size(r.from),
            size(r.to)
        );
    }
    for (name, v) in [("pattern", &s.pattern), ("disk", &s.disk)] {
        println!("  {name:<14} {:>10}   {}", size(v.bytes), verdict(v.ok));
    }
    println!(
        "  host memory    {} at boot, {} at its peak, {} after the shrink",
        size(s.host_rss.boot),
        size(s.host_rss.peak),
        size(s.host_rss.end)
    );
    println!("  result         {}", if s.ok { "ok" } else { "FAILED" });
}

fn verdict(ok: bool) -> &'static str {
    if ok { "verified" } else { "WRONG" }
}

fn size(bytes: u64) -> String {
    if bytes >= GIB {
        format!("{:.2} GiB", bytes as f64 / GIB as f64)
    } else {
        format!("{} MiB", bytes / MIB)
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Prints what happens with the seconds since the start; progress only on a terminal.
struct Timeline {
    begun: Instant,
    terminal: bool,
}

impl Timeline {
    fn new() -> Timeline {
        Timeline {
            begun: Instant::now(),
            terminal: std::io::stdout().is_terminal(),
        }
    }

    fn say(&mut self, text: &str) {
        let clear = if self.terminal { "\r\x1b[K" } else { "" };
        println!(
            "{clear}{:>6.1} s  {text}",
            self.begun.elapsed().as_secs_f64()
        );
    }

    fn progress(&mut self, text: &str) {
        if self.terminal {
            print!(
                "\r\x1b[K{:>6.1} s  {text}",
                self.begun.elapsed().as_secs_f64()
            );
            // A terminal that has gone is noticed at the next line.
            let _ = std::io::stdout().flush();
        }
    }
}
