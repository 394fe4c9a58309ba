// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Proves the lab itself: every agent command and everything [`crate::vmm`]
//! does, against a VMM that is known to work.

use std::fmt::Display;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ebbtide_agent::protocol::{Command, DiskStart, DiskStatus, Done, Report};

use crate::deny;
use crate::image::Image;
use crate::vmm::{Disk, Machine, Program, Vmm};

const DISK_BYTES: u64 = 256 << 20;
const DISKS: [(&str, &str); 2] = [("disk0", "/dev/vda"), ("disk1", "/dev/vdb")];
const MAX_BYTES: u64 = 4 << 30;
const BOOT: Duration = Duration::from_secs(120);
/// In [`boots`], where a guest that hangs is one of several.
const BOOT_LIMIT: Duration = Duration::from_secs(40);
const LONG: Duration = Duration::from_secs(300);

/// Prints what happens and when.
struct Timeline {
    begun: Instant,
}

impl Timeline {
    fn say(&self, what: impl Display) {
        println!("{:8.2} s  {what}", self.begun.elapsed().as_secs_f64());
    }
}

/// Boots a guest and runs it through everything. `fill_bytes` is how much of
/// its memory is filled with a pattern.
///
/// # Errors
/// The first thing that is not as it should be.
pub fn run(program: &Program, image: &Image, cpus: u32, fill_bytes: u64) -> Result<()> {
    let time = Timeline {
        begun: Instant::now(),
    };
    time.say(format_args!("{} with {cpus} CPUs", image.version));
    let directory = tempfile::tempdir().context("temporary directory")?;
    let machine = machine(program, image, cpus, directory.path())?;
    let mut vmm = Vmm::start(&machine)?;
    let boot = vmm.wait_ready(BOOT)?;
    time.say(format_args!(
        "agent is ready {boot:.2?} after exec; {}",
        memory(&mut vmm)?
    ));
    if let Some(ready) = vmm.ready() {
        let (started, loaded) = (ready.started_ms, ready.uptime_ms);
        time.say(format_args!(
            "guest time: agent started at {started} ms, modules loaded at {loaded} ms"
        ));
    }

    check_report(&vmm.guest().report()?, &machine)?;
    vmm.guest().disk_start(DiskStart {
        path: DISKS[0].1.to_owned(),
        seed: 11,
        verify: true,
        pause_us: 2000,
        span_bytes: 0,
    })?;
    small_commands(&mut vmm)?;
    time.say("small commands work");

    resize(&time, &mut vmm, &machine, MAX_BYTES)?;
    let filled = vmm.guest().fill(fill_bytes, 7, LONG)?;
    time.say(format_args!(
        "{} MiB filled in {} ms; {}",
        filled.bytes >> 20,
        filled.ms,
        memory(&mut vmm)?
    ));
    let checked = vmm.guest().check(LONG)?;
    time.say(format_args!(
        "{} MiB checked in {} ms",
        checked.bytes >> 20,
        checked.ms
    ));
    let held = vmm.guest().hold_in_pipes(32 << 20, LONG)?;
    vmm.guest().free_pipes()?;
    time.say(format_args!("{} MiB were held in pipes", held.bytes >> 20));
    vmm.guest().free()?;
    resize(&time, &mut vmm, &machine, machine.boot_bytes)?;

    disks(&time, &mut vmm)?;
    dmesg_is_clean(&mut vmm)?;
    time.say("kernel log is clean");
    vmm.guest().reboot()?;
    vmm.wait_ready(BOOT)?;
    time.say(format_args!("rebooted; {}", memory(&mut vmm)?));
    dmesg_is_clean(&mut vmm)?;
    let sockets = vmm.qmp_path();
    vmm.power_off(Duration::from_secs(30))?;
    ensure!(!sockets.exists(), "{} is still there", sockets.display());
    time.say("powered off");
    Ok(())
}

fn machine(program: &Program, image: &Image, cpus: u32, directory: &Path) -> Result<Machine> {
    let mut machine = Machine {
        cpus,
        max_bytes: Some(MAX_BYTES),
        ..Machine::new(program.clone(), image.clone())
    };
    for (id, _) in DISKS {
        let path = directory.join(id);
        let file = std::fs::File::create(&path).context("disk image")?;
        file.set_len(DISK_BYTES).context("disk image")?;
        machine.disks.push(Disk {
            id: id.to_owned(),
            path,
            readonly: false,
        });
    }
    Ok(machine)
}

fn memory(vmm: &mut Vmm) -> Result<String> {
    let total = vmm.total()? >> 20;
    Ok(format!(
        "RAM {total} MiB, VMM uses {} MiB",
        vmm.rss_bytes()? >> 20
    ))
}

fn check_report(report: &Report, machine: &Machine) -> Result<()> {
    ensure!(
        report.cpus == machine.cpus,
        "{} CPUs, not {}",
        report.cpus,
        machine.cpus
    );
    let expected = machine.boot_bytes / 4 * 3..=machine.boot_bytes;
    ensure!(
        expected.contains(&report.mem_total),
        "MemTotal {} not in {expected:?}",
        report.mem_total
    );
    ensure!(
        report.virtio_mem.devices == 1,
        "virtio-mem: {:?}",
        report.virtio_mem
    );
    ensure!(
        report.blocks.size > 0 && report.blocks.offline == 0,
        "{:?}",
        report.blocks
    );
    Ok(())
}

fn small_commands(vmm: &mut Vmm) -> Result<()> {
    let guest = vmm.guest();
    let done = guest.exec(&["busybox", "uname", "-m"], Duration::from_secs(30))?;
    ensure!(
        done.code == Some(0) && done.output == "x86_64\n",
        "uname: {done:?}"
    );
    // Requests run side by side: the later one is answered first.
    let slow = guest.send(Command::Sleep { ms: 1500 })?;
    guest.report()?;
    ensure!(!guest.is_answered(slow)?, "sleep was answered at once");
    guest.wait::<Done>(slow, Duration::from_secs(30))?;
    let refused = guest
        .fill(1 << 40, 1, LONG)
        .expect_err("1 TiB can't be filled");
    ensure!(format!("{refused:#}").contains("available"), "{refused:#}");
    ensure!(
        guest.check(LONG).is_err(),
        "check without fill was no error"
    );
    let hit = guest.denied_kernel_messages(&["Linux version".to_owned()])?;
    ensure!(
        hit.len() == 1,
        "the kernel log does not name the kernel: {hit:?}"
    );
    ensure!(vmm.status()? == "running", "the VMM is not running");
    Ok(())
}

fn resize(time: &Timeline, vmm: &mut Vmm, machine: &Machine, total_bytes: u64) -> Result<()> {
    let took = vmm.resize(total_bytes, LONG)?;
    // The driver removes a memory block some time after it has unplugged the last of it.
    let (expected, deadline) = (
        total_bytes - machine.boot_bytes,
        Instant::now() + Duration::from_secs(30),
    );
    while vmm.guest().report()?.virtio_mem.added != expected {
        ensure!(
            Instant::now() < deadline,
            "the guest does not show {expected} bytes of virtio-mem"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    let event = vmm
        .qmp()
        .wait_event("MEMORY_DEVICE_SIZE_CHANGE", Duration::from_secs(5))?;
    ensure!(event.data["id"] == "vmem0", "{event:?}");
    time.say(format_args!("resized in {took:.2?}; {}", memory(vmm)?));
    Ok(())
}

fn disks(time: &Timeline, vmm: &mut Vmm) -> Result<()> {
    let busy = vmm.guest().disk_stop_verified(DISKS[0].1, LONG)?;
    ensure!(
        busy.writes > 0 && busy.reads > 0 && busy.syncs > 0,
        "{busy:?}"
    );
    let once = Command::DiskOnce {
        path: DISKS[1].1.to_owned(),
        bytes: 8 << 20,
        seed: 3,
    };
    let once: DiskStatus = vmm.guest().call(once, LONG)?;
    ensure!(
        once.ok && once.verified_all && once.bytes_verified == 8 << 20,
        "{once:?}"
    );
    time.say(format_args!(
        "disks: {} KiB written, {} KiB verified, slowest {} ms",
        (busy.bytes_written + once.bytes_written) >> 10,
        (busy.bytes_verified + once.bytes_verified) >> 10,
        busy.slowest_ms
    ));
    Ok(())
}

fn dmesg_is_clean(vmm: &mut Vmm) -> Result<()> {
    let denied = vmm.guest().denied_kernel_messages(&deny::patterns())?;
    ensure!(
        denied.is_empty(),
        "the guest's kernel log holds:\n{}",
        denied.join("\n")
    );
    Ok(())
}

/// Boots the guest `times` times and counts how often that failed: what tells
/// a VMM's fault from one of the machine it runs on.
///
/// # Errors
/// A boot failed; the others have been tried.
pub fn boots(program: &Program, image: &Image, cpus: u32, times: u32) -> Result<()> {
    let directory = tempfile::tempdir().context("temporary directory")?;
    let machine = machine(program, image, cpus, directory.path())?;
    let mut failed = 0;
    for attempt in 1..=times {
        let result = boot_once(&machine);
        match &result {
            Ok(took) => println!("{attempt:>4}  ready after {took:.2?}"),
            Err(error) => {
                failed += 1;
                println!("{attempt:>4}  {error:#}");
            }
        }
    }
    println!(
        "{} with {cpus} CPUs: {failed} of {times} boots failed",
        image.version
    );
    ensure!(failed == 0, "{failed} of {times} boots failed");
    Ok(())
}

fn boot_once(machine: &Machine) -> Result<Duration> {
    let mut vmm = Vmm::start(machine)?;
    let took = vmm.wait_ready(BOOT_LIMIT)?;
    check_report(&vmm.guest().report()?, machine)?;
    dmesg_is_clean(&mut vmm)?;
    vmm.power_off(Duration::from_secs(30))?;
    Ok(took)
}
