// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest reads blocks of 4 KiB at random, with a fixed number of requests under way: from a disk that answers at once
//! and forgets (`null-co`), and from a raw file that is in the host's page cache. Under Ebbtide and under Debian's QEMU, an
//! iothread each.
//!
//! How many requests a second there are is up to the guest's processor. What the VMM adds is the time its other threads
//! take for each request.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ebbtide_agent::protocol::{Command, DiskLoad, DiskLoaded};

use super::{PEER, Ratio, Row, ms, paired, row};
use crate::image::Image;
use crate::scheduled::Scheduled;
use crate::vmm::{Machine, Program, Vmm};

/// Requests under way.
const DEPTHS: [u32; 3] = [1, 32, 128];
/// The disks: what their rows are called, the guest's name for them.
const DISKS: [(&str, &str); 2] = [("blk", "/dev/vda"), ("blk_file", "/dev/vdb")];
const NULL_BYTES: u64 = 1 << 30;
const FILE_BYTES: u64 = 64 << 20;
/// Before it is measured: caches fill, batches find their size.
const WARM_UP: Duration = Duration::from_millis(300);
const MEASURED: Duration = Duration::from_secs(2);
const LIMIT: Duration = Duration::from_secs(90);

/// What may be asked, of the peer's of the same round.
const IOPS_MIN: f64 = 1.0;
const CPU_MAX: f64 = 0.8;

/// One disk at one depth.
#[derive(Clone, Copy)]
struct Point {
    iops: f64,
    /// Time of all threads of the VMM but the vCPU's, for one request.
    cpu_us: f64,
    /// Of the vCPU's thread, the guest's own time included.
    vcpu_us: f64,
}

/// One guest's life: the depths of the first disk, then those of the second.
type Sample = Vec<Point>;

/// Measures and prints one JSON row a line; words for people go to standard error.
///
/// # Errors
/// When a guest of either VMM does not do its part. A budget that is missed is no error: it is in the rows.
pub fn run(ebbtide: &Path, image: &Image, rounds: usize) -> Result<()> {
    eprintln!(
        "random reads of 4 KiB, {DEPTHS:?} under way, {} ms each; null-co and a raw file in memory, one iothread",
        ms(MEASURED)
    );
    let (mut ours, mut peers): (Vec<Sample>, Vec<Sample>) = (Vec::new(), Vec::new());
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}");
        let program = Program::Ebbtide(ebbtide.to_owned());
        ours.push(sample("Ebbtide", program, image).context("Ebbtide")?);
        peers.push(sample(PEER, Program::Qemu, image).context(PEER)?);
    }
    for (index, (disk, _)) in DISKS.iter().enumerate() {
        for (at, depth) in (index * DEPTHS.len()..).zip(DEPTHS) {
            for row in rows(disk, depth, at, &ours, &peers) {
                println!("{}", serde_json::to_string(&row)?);
            }
        }
    }
    Ok(())
}

fn rows(disk: &str, depth: u32, at: usize, ours: &[Sample], peers: &[Sample]) -> [Row; 2] {
    let point = move |sample: &Sample, of: fn(&Point) -> f64| sample.get(at).map_or(f64::NAN, of);
    let iops = move |sample: &Sample| point(sample, |point| point.iops);
    let cpu_us = move |sample: &Sample| point(sample, |point| point.cpu_us);
    [
        Row {
            ratio: Some(Ratio {
                ratio: paired(ours, peers, iops),
                ratio_min: Some(IOPS_MIN),
                ratio_max: None,
            }),
            ..row(format!("{disk}_iops/{depth}"), "1/s", ours, peers, iops)
        },
        Row {
            ratio: Some(Ratio {
                ratio: paired(ours, peers, cpu_us),
                ratio_min: None,
                ratio_max: Some(CPU_MAX),
            }),
            ..row(format!("{disk}_cpu_us/{depth}"), "us", ours, peers, cpu_us)
        },
    ]
}

fn sample(name: &str, program: Program, image: &Image) -> Result<Sample> {
    let ground = tempfile::tempdir()?;
    let mut vmm = Vmm::start(&machine(program, image, ground.path())?)?;
    vmm.wait_ready(LIMIT)?;
    let mut points = Vec::new();
    for (disk, path) in DISKS {
        for depth in DEPTHS {
            load(&mut vmm, path, depth, WARM_UP)?;
            let point = measure(&mut vmm, path, depth)?;
            eprintln!(
                "  {name:<14} {disk:<8} {depth:>3} under way: {:>8.0} 1/s, {:>7.2} us of the VMM and {:>7.2} us of its vCPU each",
                point.iops, point.cpu_us, point.vcpu_us
            );
            points.push(point);
        }
    }
    vmm.power_off(LIMIT)?;
    Ok(points)
}

/// Both disks on one iothread, in this order.
fn machine(program: Program, image: &Image, ground: &Path) -> Result<Machine> {
    let path = ground.join("raw.img");
    fill(&path).with_context(|| format!("write {}", path.display()))?;
    let path = path.display();
    // Options are spelled the same, with one dash less.
    let dashes = if program == Program::Qemu { "-" } else { "--" };
    let options = [
        ("object", "iothread,id=io0".to_owned()),
        (
            "blockdev",
            format!("null-co,node-name=null0,size={NULL_BYTES}"),
        ),
        (
            "device",
            "virtio-blk-pci,drive=null0,iothread=io0".to_owned(),
        ),
        ("blockdev", format!("file,node-name=file0,filename={path}")),
        (
            "device",
            "virtio-blk-pci,drive=file0,iothread=io0".to_owned(),
        ),
    ];
    let mut more: Vec<String> = options
        .into_iter()
        .flat_map(|(option, value)| [format!("{dashes}{option}"), value])
        .collect();
    if program == Program::Qemu {
        // So that its threads are told apart.
        more.extend(["-name".to_owned(), "guest,debug-threads=on".to_owned()]);
    }
    Ok(Machine {
        more,
        ..Machine::new(program, image.clone())
    })
}

/// With data: holes would be read in no time.
fn fill(path: &Path) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    let chunk = vec![0x5a; 1 << 20];
    for _ in 0..FILE_BYTES >> 20 {
        file.write_all(&chunk)?;
    }
    Ok(())
}

fn load(vmm: &mut Vmm, path: &str, depth: u32, time: Duration) -> Result<DiskLoaded> {
    let load = DiskLoad {
        path: path.to_owned(),
        depth,
        ms: u64::try_from(time.as_millis()).unwrap_or(u64::MAX),
        seed: u64::from(depth),
    };
    vmm.guest().call(Command::DiskLoad(load), LIMIT)
}

fn measure(vmm: &mut Vmm, path: &str, depth: u32) -> Result<Point> {
    let pid = vmm.process().pid();
    let before = Spent::of(pid)?;
    let loaded = load(vmm, path, depth, MEASURED)?;
    let after = Spent::of(pid)?;
    ensure!(loaded.reads > 0 && loaded.ns > 0, "{path}: {loaded:?}");
    let reads = loaded.reads as f64;
    let vcpus_ns = after.vcpus_ns.saturating_sub(before.vcpus_ns);
    let all_ns = after.all_ns.saturating_sub(before.all_ns);
    Ok(Point {
        iops: reads * 1e9 / loaded.ns as f64,
        cpu_us: all_ns.saturating_sub(vcpus_ns) as f64 / 1e3 / reads,
        vcpu_us: vcpus_ns as f64 / 1e3 / reads,
    })
}

/// Processor time of a VMM, in nanoseconds.
struct Spent {
    /// All its threads, those that have ended, too.
    all_ns: u64,
    vcpus_ns: u64,
}

impl Spent {
    fn of(pid: u32) -> Result<Spent> {
        let (mut vcpus, mut vcpus_ns) = (0, 0);
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let task = task?.path();
            let file = task.join("comm");
            let name = match fs::read_to_string(&file) {
                Ok(name) => name,
                Err(error) if has_ended(&error) => continue,
                Err(error) => bail!("read {}: {error}", file.display()),
            };
            if !is_vcpu(&name) {
                continue;
            }
            vcpus_ns += nanos(Scheduled::of_thread(&task)?.ran);
            vcpus += 1;
        }
        ensure!(
            vcpus > 0,
            "process {pid} has no thread that is called as vCPUs are"
        );
        Ok(Spent {
            all_ns: process_ns(pid)?,
            vcpus_ns,
        })
    }
}

/// Whether a thread's file cannot be read because the thread ended after it was listed: before
/// the file was opened or after.
fn has_ended(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Whether a thread is a vCPU: Ebbtide's are called `vcpu0`, QEMU's `CPU 0/KVM`.
fn is_vcpu(name: &str) -> bool {
    name.starts_with("vcpu") || name.starts_with("CPU ")
}

fn process_ns(pid: u32) -> Result<u64> {
    let mut clock = 0;
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: both pointers are to variables of the right types, which outlive the calls.
    let result = unsafe {
        match libc::clock_getcpuclockid(pid as libc::pid_t, &mut clock) {
            0 => libc::clock_gettime(clock, &mut time),
            error => error,
        }
    };
    ensure!(
        result == 0,
        "the processor time of process {pid} is not to be had"
    );
    let ns = time.tv_sec * 1_000_000_000 + time.tv_nsec;
    u64::try_from(ns).context("processor time")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_vcpus() {
        assert!(is_vcpu("vcpu0\n") && is_vcpu("CPU 1/KVM\n"));
        assert!(!is_vcpu("io0\n") && !is_vcpu("IO io0\n") && !is_vcpu("iou-wrk-7\n"));
    }

    #[test]
    fn a_process_has_spent_time_and_must_have_vcpus() {
        let pid = std::process::id();
        assert!(process_ns(pid).unwrap() > 0);
        let error = Spent::of(pid).err().unwrap().to_string();
        assert!(error.contains("has no thread"), "{error}");
    }

    #[test]
    fn rows_are_of_their_disk_and_depth() {
        let point = |iops| Point {
            iops,
            cpu_us: 2.0,
            vcpu_us: 9.0,
        };
        let (ours, peers) = (
            vec![vec![point(5.0), point(6.0)]],
            vec![vec![point(4.0), point(3.0)]],
        );
        let [iops, cpu] = rows("blk", 32, 1, &ours, &peers);
        assert_eq!(
            (iops.id.as_str(), iops.ours, iops.peer),
            ("blk_iops/32", 6.0, 3.0)
        );
        assert_eq!(iops.ratio.map(|ratio| ratio.ratio), Some(2.0));
        assert_eq!(
            (cpu.id.as_str(), cpu.ours, cpu.peer),
            ("blk_cpu_us/32", 2.0, 2.0)
        );
    }
}
