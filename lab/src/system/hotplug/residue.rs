// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a VMM holds: the same before and after devices have come and gone.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{GUEST, LOOK};
use crate::vmm::Vmm;

/// Workers of rings are the kernel's: they end when they have been idle for a while.
const RING_WORKER: &str = "iou-wrk";

/// How the register of a device is called that was forced out.
const REMNANT: &str = "-detached";
/// What goes after the devices is gone when nothing has changed for so long, or by then.
const QUIET: Duration = Duration::from_secs(1);
const SWEPT: Duration = Duration::from_secs(20);
/// No scenario has more places for devices at a time.
const PLACES: usize = 40;

/// What can be counted from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Residue {
    /// Open files: each is listed by what it is.
    files: Vec<String>,
    /// Locks of files.
    locks: usize,
    threads: Vec<String>,
    /// Lines of /proc/PID/maps that are not the heap of an allocator.
    maps: usize,
    /// The memory maps, flat: RAM slots, registers, ioeventfds.
    regions: String,
    blocks: String,
    /// What KVM has: memory slots, ioeventfds, irqfds, messages.
    kvm: Value,
}

impl Residue {
    /// Of a VMM, when it has been the same for a while. What only old views of the memory map knew of a device is closed when
    /// those are gone, on a thread of its own.
    ///
    /// # Errors
    /// As [`Residue::of`].
    pub fn settled(vmm: &mut Vmm) -> Result<Residue> {
        let (begun, mut since) = (Instant::now(), Instant::now());
        let mut left = Residue::of(vmm)?;
        while since.elapsed() < QUIET && begun.elapsed() < SWEPT {
            std::thread::sleep(LOOK);
            let now = Residue::of(vmm)?;
            if now != left {
                (left, since) = (now, Instant::now());
            }
        }
        Ok(left)
    }

    /// Of a VMM, now.
    ///
    /// # Errors
    /// Its process or its monitor can't be read.
    pub fn of(vmm: &mut Vmm) -> Result<Residue> {
        let process = format!("/proc/{}", vmm.process().pid());
        let mut hmp = |line: &str| -> Result<String> {
            let answer = vmm
                .qmp()
                .execute("human-monitor-command", json!({"command-line": line}))?;
            Ok(answer.as_str().unwrap_or_default().to_owned())
        };
        let (regions, blocks) = (hmp("info mtree -f")?, hmp("info ramblock")?);
        // What forced devices leave for their drivers: one in a place, until another was in use there.
        let (left, regions): (Vec<&str>, Vec<&str>) = regions
            .lines()
            .partition(|line| line.trim_end().ends_with(REMNANT));
        ensure!(left.len() <= PLACES, "forced devices leave {left:#?}");
        let regions = regions.join("\n");
        let kvm = vmm.qmp().execute("x-ebbtide-query-kvm", Value::Null)?;
        let maps = fs::read_to_string(format!("{process}/maps")).context("maps")?;
        // Arenas of the allocator come with threads and stay; they are no device's.
        let maps = maps.lines().filter(|line| line.contains('/')).count();
        Ok(Residue {
            files: links(&format!("{process}/fd"))?,
            locks: locks(&format!("{process}/fdinfo"))?,
            threads: names(&format!("{process}/task"))?,
            maps,
            regions,
            blocks,
            kvm,
        })
    }

    /// Compares with a later one.
    ///
    /// # Errors
    /// Names what is different.
    pub fn compare(&self, later: &Residue) -> Result<()> {
        let Residue {
            files,
            locks,
            threads,
            maps,
            regions,
            blocks,
            kvm,
        } = self;
        ensure!(
            *files == later.files,
            "open files: {files:?}, then {:?}",
            later.files
        );
        ensure!(
            *locks == later.locks,
            "locked files: {locks}, then {}",
            later.locks
        );
        ensure!(
            *threads == later.threads,
            "threads: {threads:?}, then {:?}",
            later.threads
        );
        ensure!(*maps == later.maps, "mappings: {maps}, then {}", later.maps);
        ensure!(
            *regions == later.regions,
            "memory map:\n{regions}\nthen\n{}",
            later.regions
        );
        ensure!(
            *blocks == later.blocks,
            "RAM blocks:\n{blocks}\nthen\n{}",
            later.blocks
        );
        ensure!(*kvm == later.kvm, "KVM has {kvm}, then {}", later.kvm);
        Ok(())
    }
}

/// What the descriptors of a process are, numbers of sockets and pipes left out.
fn links(directory: &str) -> Result<Vec<String>> {
    let mut kinds = Vec::new();
    for entry in fs::read_dir(directory).context("fd")? {
        // One that is closed meanwhile was none that stays.
        if let Ok(target) = fs::read_link(entry?.path()) {
            let target = target.to_string_lossy().into_owned();
            let kind = target.split(":[").next().unwrap_or_default().to_owned();
            kinds.push(kind);
        }
    }
    kinds.sort();
    Ok(kinds)
}

/// How many locks the open files of a process have.
fn locks(directory: &str) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(directory).context("fdinfo")? {
        let info = fs::read_to_string(entry?.path()).unwrap_or_default();
        count += info
            .lines()
            .filter(|line| line.starts_with("lock:"))
            .count();
    }
    Ok(count)
}

/// Where nothing is at work nothing is pinned, soon.
///
/// # Errors
/// Something is, and stays so.
pub fn nothing_is_pinned(vmm: &mut Vmm) -> Result<()> {
    let begun = Instant::now();
    loop {
        let pins = vmm.qmp().execute("x-ebbtide-query-pins", Value::Null)?;
        if pins == json!([]) {
            return Ok(());
        }
        ensure!(begun.elapsed() < GUEST, "pins are left: {pins}");
        std::thread::sleep(LOOK);
    }
}

fn names(directory: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).context("task")? {
        let name = fs::read_to_string(entry?.path().join("comm")).unwrap_or_default();
        let name = name.trim();
        if !name.starts_with(RING_WORKER) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}
