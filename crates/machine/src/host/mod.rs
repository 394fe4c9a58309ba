// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the host can give: memory of the machine and of this process's control group.

mod facts;

use std::fs;
use std::path::{Path, PathBuf};

pub use facts::{Facts, HugePages, Membarrier, Uring};

use ebbtide_memory::Backing;

use crate::Error;

/// A limit on memory and what it leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Available {
    /// Bytes that may still be used.
    pub bytes: u64,
    /// Which limit is the tightest.
    pub limit: String,
}

/// Refuses boot RAM that the host can't give. What a memory device may grow to is not asked for
/// at start and may exceed the host.
///
/// Only what comes out of the host's ordinary memory is asked for: reserved huge pages are not
/// part of it, and their pool refuses by itself; a file's pages go back to the file.
///
/// # Errors
/// [`Error::HostMemory`] with the figures.
pub fn admit_boot_ram(asked_bytes: u64, backing: &Backing) -> Result<(), Error> {
    match backing {
        Backing::Anon { .. } | Backing::Memfd { .. } => {}
        Backing::Hugetlb { .. } | Backing::File { .. } => return Ok(()),
    }
    match available(Path::new("/")) {
        Some(Available { bytes, limit }) if bytes < asked_bytes => Err(Error::HostMemory {
            asked_bytes,
            available_bytes: bytes,
            limit,
        }),
        _ => Ok(()),
    }
}

/// The tightest of the host's free memory and the limits of the control groups this process is
/// in; None where the kernel tells neither. `root` is the file system to look in.
pub fn available(root: &Path) -> Option<Available> {
    let mut limits: Vec<Available> = cgroup_limits(root);
    limits.extend(host_available(root));
    limits.into_iter().min_by_key(|l| l.bytes)
}

fn host_available(root: &Path) -> Option<Available> {
    let text = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let kib: u64 = text
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()?;
    Some(Available {
        bytes: kib * 1024,
        limit: "the host's MemAvailable".into(),
    })
}

/// Limits of the process's cgroup v2 and of its ancestors.
fn cgroup_limits(root: &Path) -> Vec<Available> {
    let Ok(text) = fs::read_to_string(root.join("proc/self/cgroup")) else {
        return Vec::new();
    };
    let Some(own) = text.lines().find_map(|l| l.strip_prefix("0::/")) else {
        return Vec::new();
    };
    let top = root.join("sys/fs/cgroup");
    let own = top.join(own);
    own.ancestors()
        .take_while(|dir| dir.starts_with(&top))
        .filter_map(cgroup_limit)
        .collect()
}

fn cgroup_limit(dir: &Path) -> Option<Available> {
    let number = |file: PathBuf| fs::read_to_string(file).ok()?.trim().parse::<u64>().ok();
    // "max" does not parse: no limit here.
    let max = number(dir.join("memory.max"))?;
    let current = number(dir.join("memory.current")).unwrap_or(0);
    Some(Available {
        bytes: max.saturating_sub(current.saturating_sub(cached(dir))),
        limit: format!("memory.max of {}", dir.display()),
    })
}

/// Bytes charged to the group for copies of files, which go when memory is wanted.
fn cached(dir: &Path) -> u64 {
    let text = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let count = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok())
            .unwrap_or(0)
    };
    count("inactive_file ").saturating_add(count("active_file "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(root: &Path, file: &str, text: &str) {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn tightest_limit_wins() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        assert_eq!(available(root), None);
        put(
            root,
            "proc/meminfo",
            "MemTotal: 9 kB\nMemAvailable:  2048 kB\n",
        );
        assert_eq!(available(root).unwrap().bytes, 2 << 20);
        put(root, "proc/self/cgroup", "0::/a/b\n");
        put(root, "sys/fs/cgroup/a/b/memory.max", "max\n");
        put(root, "sys/fs/cgroup/a/memory.max", "1048576\n");
        put(root, "sys/fs/cgroup/a/memory.current", "1000\n");
        let tight = available(root).unwrap();
        assert_eq!(tight.bytes, 1_047_576);
        assert!(tight.limit.contains("cgroup/a"), "{}", tight.limit);
        // Of what is in use, 300 bytes are copies of files.
        put(
            root,
            "sys/fs/cgroup/a/memory.stat",
            "anon 500\nfile 400\ninactive_file 100\nactive_file 200\n",
        );
        assert_eq!(available(root).unwrap().bytes, 1_047_876);
    }

    #[test]
    fn the_impossible_is_refused_with_figures() {
        let anon = Backing::Anon { thp: true };
        let err = admit_boot_ram(1 << 60, &anon).unwrap_err().to_string();
        assert!(err.contains("size=1152921504606846976"), "{err}");
        assert!(err.contains("1 EiB"), "{err}");
        admit_boot_ram(4096, &anon).unwrap();
        let page_size_bytes = 2 << 20;
        admit_boot_ram(1 << 60, &Backing::Hugetlb { page_size_bytes }).unwrap();
    }
}
