// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The state of the guest, read from /proc and /sys.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::boot::uptime_ms;
use crate::protocol::{MemoryBlocks, Ready, Report, VirtioMem};

/// Reads everything a [`Report`] holds.
///
/// # Errors
/// /proc/meminfo can't be read or lacks a field every kernel has.
pub fn report() -> Result<Report> {
    let meminfo = meminfo()?;
    let field = |name: &str| {
        meminfo
            .get(name)
            .copied()
            .with_context(|| format!("/proc/meminfo has no {name}"))
    };
    Ok(Report {
        uptime_ms: uptime_ms(),
        cpus: cpus_online(),
        mem_total: field("MemTotal")?,
        mem_free: field("MemFree")?,
        mem_available: field("MemAvailable")?,
        blocks: memory_blocks(Path::new("/sys/devices/system/memory")),
        virtio_mem: virtio_mem(),
        meminfo,
    })
}

/// The agent's first message.
pub fn ready(started_ms: u64, mut problems: Vec<String>) -> Ready {
    let mem_total = meminfo()
        .map(|all| all.get("MemTotal").copied().unwrap_or(0))
        .unwrap_or_else(|error| {
            problems.push(format!("{error:#}"));
            0
        });
    Ready {
        kernel: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
        cpus: cpus_online(),
        mem_total,
        started_ms,
        uptime_ms: uptime_ms(),
        problems,
    }
}

/// Bytes that can be had without swapping.
///
/// # Errors
/// /proc/meminfo can't be read.
pub fn available_bytes() -> Result<u64> {
    meminfo()?
        .get("MemAvailable")
        .copied()
        .context("/proc/meminfo has no MemAvailable")
}

/// CPUs that run, as far as the scheduler shows; at least 1.
pub fn cpus_online() -> u32 {
    std::thread::available_parallelism().map_or(1, |count| count.get() as u32)
}

fn meminfo() -> Result<BTreeMap<String, u64>> {
    let text = fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    Ok(parse_meminfo(&text))
}

fn parse_meminfo(text: &str) -> BTreeMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (name, rest) = line.split_once(':')?;
            let mut words = rest.split_whitespace();
            let value: u64 = words.next()?.parse().ok()?;
            let unit = if words.next() == Some("kB") { 1024 } else { 1 };
            Some((name.to_owned(), value.saturating_mul(unit)))
        })
        .collect()
}

fn memory_blocks(directory: &Path) -> MemoryBlocks {
    let size = fs::read_to_string(directory.join("block_size_bytes"))
        .ok()
        .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
        .unwrap_or(0);
    let mut blocks = MemoryBlocks {
        size,
        ..MemoryBlocks::default()
    };
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        match fs::read_to_string(entry.path().join("state"))
            .as_deref()
            .map(str::trim)
        {
            Ok("online") => blocks.online += 1,
            Ok(_) => blocks.offline += 1,
            Err(_) => {}
        }
    }
    blocks
}

fn virtio_mem() -> VirtioMem {
    let bound = fs::read_dir("/sys/bus/virtio/drivers/virtio_mem")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| {
            entry
                .file_name()
                .to_string_lossy()
                .strip_prefix("virtio")
                .is_some_and(is_number)
        })
        .count();
    let added = fs::read_to_string("/proc/iomem").map_or(0, |text| added_by_virtio_mem(&text));
    VirtioMem {
        devices: bound as u32,
        added,
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn added_by_virtio_mem(iomem: &str) -> u64 {
    iomem
        .lines()
        .filter_map(|line| {
            let (range, name) = line.trim().split_once(" : ")?;
            let (first, last) = range.split_once('-')?;
            if name != "System RAM (virtio_mem)" {
                return None;
            }
            let first = u64::from_str_radix(first, 16).ok()?;
            let last = u64::from_str_radix(last, 16).ok()?;
            last.checked_sub(first)?.checked_add(1)
        })
        .fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_in_bytes() {
        let all =
            parse_meminfo("MemTotal:         498564 kB\nHugePages_Total:       3\nodd line\n");
        assert_eq!(all["MemTotal"], 498_564 * 1024);
        assert_eq!(all["HugePages_Total"], 3);
        assert_eq!(all.len(), 2);
    }

    #[test]
    fn only_ranges_of_virtio_mem_count() {
        let iomem = "00001000-0009fbff : System RAM\n\
                     100000000-17fffffff : virtio0\n  \
                     100000000-107ffffff : System RAM (virtio_mem)\n  \
                     110000000-117ffffff : System RAM (virtio_mem)\n";
        assert_eq!(added_by_virtio_mem(iomem), 256 << 20);
    }
}
