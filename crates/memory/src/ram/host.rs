// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What memory the host and this process's control group can give.

use std::fmt;
use std::fs;

/// The host's figures, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// RAM and swap of the host.
    pub total_bytes: u64,
    /// What could be allocated now without swapping.
    pub available_bytes: u64,
    /// The tightest limit of this process's control groups.
    pub cgroup_limit_bytes: Option<u64>,
    /// What is left below the tightest limit; the control group's page cache counts as free.
    pub cgroup_available_bytes: Option<u64>,
}

impl HostMemory {
    /// Reads the figures. What cannot be read does not limit.
    pub fn read() -> HostMemory {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let field = |name: &str| kib_field(&meminfo, name);
        let total =
            field("MemTotal:").map(|total| total.saturating_add(field("SwapTotal:").unwrap_or(0)));
        let cgroups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let (limit, available) = cgroup_figures(&cgroups);
        HostMemory {
            total_bytes: total.unwrap_or(u64::MAX),
            available_bytes: field("MemAvailable:").unwrap_or(u64::MAX),
            cgroup_limit_bytes: limit,
            cgroup_available_bytes: available,
        }
    }

    /// The most that could ever be given.
    pub fn limit_bytes(&self) -> u64 {
        self.total_bytes
            .min(self.cgroup_limit_bytes.unwrap_or(u64::MAX))
    }

    /// What can be given now.
    pub fn headroom_bytes(&self) -> u64 {
        self.available_bytes
            .min(self.cgroup_available_bytes.unwrap_or(u64::MAX))
    }
}

impl fmt::Display for HostMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "host has {} bytes of RAM and swap, {} available",
            self.total_bytes, self.available_bytes
        )?;
        if let (Some(limit), Some(available)) =
            (self.cgroup_limit_bytes, self.cgroup_available_bytes)
        {
            write!(f, "; control group is limited to {limit}, {available} left")?;
        }
        Ok(())
    }
}

fn kib_field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim()
        .trim_end_matches("kB")
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

/// The tightest limit and the least room of the control groups above this process.
fn cgroup_figures(cgroups: &str) -> (Option<u64>, Option<u64>) {
    let mut limit = None;
    let mut available = None;
    let tighten = |slot: &mut Option<u64>, value: u64| {
        *slot = Some(slot.map_or(value, |old: u64| old.min(value)))
    };
    for line in cgroups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let v1 = controllers.split(',').any(|c| c == "memory");
        if !v1 && !controllers.is_empty() {
            continue;
        }
        let (root, max, current, stat_cache) = if v1 {
            (
                "/sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        } else {
            (
                "/sys/fs/cgroup",
                "memory.max",
                "memory.current",
                "inactive_file",
            )
        };
        let mut path = path;
        loop {
            let file = |name: &str| fs::read_to_string(format!("{root}{path}/{name}")).ok();
            let number = |name: &str| file(name)?.trim().parse::<u64>().ok();
            // v1 writes "no limit" as a number near 2^63.
            if let Some(max) = number(max).filter(|max| *max < 1 << 62) {
                let used = number(current).unwrap_or(0);
                let cache = file("memory.stat")
                    .and_then(|stat| stat_field(&stat, stat_cache))
                    .unwrap_or(0);
                tighten(&mut limit, max);
                tighten(
                    &mut available,
                    max.saturating_sub(used.saturating_sub(cache)),
                );
            }
            match path.trim_end_matches('/').rfind('/') {
                Some(at) => path = &path[..at],
                None => break,
            }
        }
    }
    (limit, available)
}

fn stat_field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        line.strip_prefix(name)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    })
}

/// The figures of a pool of huge pages, for messages.
pub(crate) fn huge_page_figures(page_size_bytes: u64) -> String {
    let kib = page_size_bytes / 1024;
    let read = |name: &str| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/{name}");
        fs::read_to_string(path).map_or_else(|_| "?".to_owned(), |text| text.trim().to_owned())
    };
    let (pages, free, reserved) = (
        read("nr_hugepages"),
        read("free_hugepages"),
        read("resv_hugepages"),
    );
    if pages == "?" {
        return format!("the host has no pool of {kib} KiB pages");
    }
    format!("pool of {kib} KiB pages: {pages} pages, {free} free, {reserved} of them reserved")
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn meminfo_fields_are_read_in_bytes() {
        let text = "MemTotal:       24000000 kB\nMemAvailable:    1024 kB\n";
        assert_eq!(kib_field(text, "MemAvailable:"), Some(1 << 20));
        assert_eq!(kib_field(text, "SwapTotal:"), None);
    }

    #[test]
    fn this_host_has_memory() {
        let host = HostMemory::read();
        assert!(host.total_bytes > 0 && host.headroom_bytes() <= host.available_bytes);
        assert!(host.limit_bytes() <= host.total_bytes);
    }

    #[test]
    fn a_missing_pool_is_named() {
        assert!(huge_page_figures(3 << 10).contains("no pool of 3 KiB pages"));
    }
}
