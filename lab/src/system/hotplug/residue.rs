// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a VMM holds: the same before and after devices have come and gone.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{GUEST, LOOK};
use crate::vmm::Vmm;

/// Workers of rings are the kernel's: they end when they have been idle for a while.
const RING_WORKER: &str = "iou-wrk";

/// How the register of a device is called that was forced out.
const REMNANT: &str = "-detached";
/// What goes after a device is gone has gone when nothing has changed for so long, or by then.
const QUIET: Duration = Duration::from_millis(300);
/// So often all threads were asleep meanwhile: one that is held up with what it has to do is not.
const ASLEEP: u32 = 3;
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
    /// The RAM blocks, in order: what each is called, its size, and whether it can be written. A reset that a request
    /// outlasts puts another in its place, elsewhere.
    blocks: Vec<String>,
    /// What KVM has: memory slots, ioeventfds, irqfds, messages.
    kvm: Value,
}

impl Residue {
    /// Of a VMM, once it stays as it is: what only old views of the memory map knew of a device is closed when those are
    /// gone, on a thread of its own.
    ///
    /// # Errors
    /// Its process or its monitor can't be read.
    pub fn of(vmm: &mut Vmm) -> Result<Residue> {
        let (begun, mut since, mut asleep) = (Instant::now(), Instant::now(), 0);
        let mut left = Residue::now(vmm)?;
        while (since.elapsed() < QUIET || asleep < ASLEEP) && begun.elapsed() < SWEPT {
            std::thread::sleep(LOOK);
            asleep += u32::from(all_asleep(&tasks(vmm))?);
            let now = Residue::now(vmm)?;
            if now != left {
                (left, since, asleep) = (now, Instant::now(), 0);
            }
        }
        Ok(left)
    }

    /// Waits until a VMM holds the same again.
    ///
    /// # Errors
    /// Names what stays different; as [`Residue::of`].
    pub fn again(&self, vmm: &mut Vmm) -> Result<()> {
        let begun = Instant::now();
        loop {
            let compared = self.compare(&Residue::now(vmm)?);
            if compared.is_ok() || begun.elapsed() > SWEPT {
                return compared;
            }
            std::thread::sleep(LOOK);
        }
    }

    fn now(vmm: &mut Vmm) -> Result<Residue> {
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
            threads: names(&tasks(vmm))?,
            maps,
            regions,
            blocks: in_any_place(&blocks)?,
            kvm,
        })
    }

    fn compare(&self, later: &Residue) -> Result<()> {
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
            "RAM blocks: {blocks:#?}, then {:#?}",
            later.blocks
        );
        ensure!(*kvm == later.kvm, "KVM has {kvm}, then {}", later.kvm);
        Ok(())
    }
}

/// The lines of `info ramblock` without where each block is, in order.
fn in_any_place(table: &str) -> Result<Vec<String>> {
    let mut lines = table.lines();
    let head = lines.find(|line| line.contains("Block Name"));
    let columns = head.context("info ramblock has no head")?;
    // "Block Name" is one column of two words.
    let columns: Vec<&str> = columns.split_whitespace().skip(1).collect();
    let mut blocks = Vec::new();
    for line in lines {
        // A page size is two words: "4 KiB".
        let line = line
            .replace(" KiB", "KiB")
            .replace(" MiB", "MiB")
            .replace(" GiB", "GiB");
        let mut shown = Vec::new();
        for (column, word) in columns.iter().zip(line.split_whitespace()) {
            if !["Offset", "HVA"].contains(column) {
                shown.push(format!("{column} {word}"));
            }
        }
        blocks.push(shown.join(", "));
    }
    blocks.sort();
    Ok(blocks)
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

/// Where the threads of a VMM are.
fn tasks(vmm: &mut Vmm) -> String {
    format!("/proc/{}/task", vmm.process().pid())
}

/// Each thread's directory.
fn threads(directory: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).context("task")?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

/// Whether every thread sleeps, or has ended.
fn all_asleep(directory: &str) -> Result<bool> {
    Ok(threads(directory)?.iter().all(|thread| {
        let stat = fs::read_to_string(thread.join("stat")).unwrap_or_default();
        // The name may hold anything, the state follows it.
        let state = stat.rsplit_once(") ");
        state.is_none_or(|(_, rest)| rest.starts_with('S'))
    }))
}

fn names(directory: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for thread in threads(directory)? {
        let name = fs::read_to_string(thread.join("comm")).unwrap_or_default();
        let name = name.trim();
        if !name.starts_with(RING_WORKER) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}
