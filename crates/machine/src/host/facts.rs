// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the host's kernel offers, found out by trying it.

use std::fs;
use std::path::Path;

use serde::Serialize;

/// `MADV_GUARD_INSTALL` (Linux 6.13), not in every libc yet.
const MADV_GUARD_INSTALL: libc::c_int = 102;
/// `MEMBARRIER_CMD_QUERY`.
const MEMBARRIER_CMD_QUERY: libc::c_long = 0;
/// `MEMBARRIER_CMD_PRIVATE_EXPEDITED`.
const MEMBARRIER_PRIVATE_EXPEDITED: libc::c_long = 1 << 3;

/// What the machine offers besides KVM.
#[derive(Clone, Debug, Serialize)]
pub struct Facts {
    /// Huge pages.
    pub huge_pages: HugePages,
    /// The membarrier system call.
    pub membarrier: Membarrier,
    /// io_uring.
    pub io_uring: Uring,
    /// Whether `MADV_GUARD_INSTALL` works (Linux 6.13 and newer).
    pub memory_guard: bool,
    /// Whether threads can be given filters of system calls (seccomp).
    pub seccomp: bool,
    /// Version of landlock, which limits the files that can be opened.
    pub landlock: Option<u32>,
    /// Bytes of memory that may be used.
    pub available_bytes: Option<u64>,
    /// Which limit that is.
    pub available_limit: Option<String>,
}

/// Transparent and reserved huge pages.
#[derive(Clone, Debug, Serialize)]
pub struct HugePages {
    /// `always`, `madvise` or `never`, for anonymous memory.
    pub transparent: String,
    /// The same for shared memory (memfd).
    pub transparent_shared: String,
    /// Reserved pages of 2 MiB, and how many of them are free.
    pub reserved_2m: u64,
    /// Free ones.
    pub free_2m: u64,
}

/// The membarrier system call.
#[derive(Clone, Debug, Serialize)]
pub struct Membarrier {
    /// Whether the private expedited command is there; without it each read section costs a fence.
    pub private_expedited: bool,
}

/// io_uring.
#[derive(Clone, Debug, Serialize)]
pub struct Uring {
    /// Whether a ring can be made.
    pub available: bool,
    /// Why not.
    pub reason: Option<String>,
}

impl Facts {
    /// Looks, and tries.
    pub fn gather() -> Facts {
        let available = super::available(Path::new("/"));
        let (seccomp, landlock) = crate::confine::offered();
        Facts {
            huge_pages: huge_pages(Path::new("/")),
            membarrier: Membarrier {
                private_expedited: membarrier(),
            },
            io_uring: uring(),
            memory_guard: memory_guard(),
            seccomp,
            landlock,
            available_bytes: available.as_ref().map(|a| a.bytes),
            available_limit: available.map(|a| a.limit),
        }
    }
}

fn huge_pages(root: &Path) -> HugePages {
    let dir = root.join("sys/kernel/mm");
    let count = |file: &str| {
        fs::read_to_string(dir.join("hugepages/hugepages-2048kB").join(file))
            .ok()
            .and_then(|t| t.trim().parse().ok())
            .unwrap_or(0)
    };
    HugePages {
        transparent: chosen(&dir.join("transparent_hugepage/enabled")),
        transparent_shared: chosen(&dir.join("transparent_hugepage/shmem_enabled")),
        reserved_2m: count("nr_hugepages"),
        free_2m: count("free_hugepages"),
    }
}

/// The word in brackets: `always [madvise] never`.
fn chosen(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.split(['[', ']']).nth(1).unwrap_or("absent").to_owned()
}

fn membarrier() -> bool {
    // SAFETY: the query takes no pointer and changes nothing.
    let offered = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_QUERY, 0, 0) };
    offered > 0 && offered & MEMBARRIER_PRIVATE_EXPEDITED != 0
}

fn uring() -> Uring {
    match ebbtide_iothread::run("doctor", |_| async {}) {
        Ok(()) => Uring {
            available: true,
            reason: None,
        },
        Err(e) => Uring {
            available: false,
            reason: Some(e.to_string()),
        },
    }
}

fn memory_guard() -> bool {
    const PAGE: usize = 4096;
    // SAFETY: a new private mapping at an address of the kernel's choice overlaps nothing.
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if page == libc::MAP_FAILED {
        return false;
    }
    // SAFETY: the page was mapped above, nobody else knows it, and it is unmapped right after.
    unsafe {
        let works = libc::madvise(page, PAGE, MADV_GUARD_INSTALL) == 0;
        libc::munmap(page, PAGE);
        works
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_chosen_word() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("enabled");
        fs::write(&file, "always [madvise] never\n").unwrap();
        assert_eq!(chosen(&file), "madvise");
        assert_eq!(chosen(&dir.path().join("none")), "absent");
    }

    #[test]
    fn facts_serialize() {
        let facts = serde_json::to_value(Facts::gather()).unwrap();
        assert!(facts["seccomp"].is_boolean());
        assert!(facts["io_uring"]["available"].is_boolean());
        assert!(facts["available_bytes"].as_u64().is_some());
    }
}
