// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the process has, before and after.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::sync::atomic::{AtomicI64, Ordering};

/// The system's allocator, with a count of what is out.
pub struct Counting;

static HEAP: AtomicI64 = AtomicI64::new(0);

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HEAP.fetch_add(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        HEAP.fetch_sub(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(block, layout) }
    }
}

/// Bytes and numbers of things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Residue {
    pub heap_bytes: i64,
    pub fds: i64,
    pub mappings: i64,
    pub threads: i64,
}

/// Has all threads share one heap: one for each would be mapped at the allocator's whim. Whether
/// the allocator knows how; where it is a sanitizer's, mappings come and go as it likes.
pub fn one_heap() -> bool {
    // SAFETY: sets a number; no other thread allocates a heap at the same time.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) != 0 }
}

fn entries(path: &str) -> i64 {
    fs::read_dir(path).unwrap().count() as i64
}

/// The spans of addresses that are mapped.
pub fn mappings() -> Vec<(u64, u64)> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let number = |text: &str| u64::from_str_radix(text, 16).unwrap();
    let span = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some((number(start), number(end)))
    };
    maps.lines().filter_map(span).collect()
}

impl Residue {
    pub fn now() -> Residue {
        // In this order: to look allocates.
        let heap_bytes = HEAP.load(Ordering::Relaxed);
        Residue {
            heap_bytes,
            fds: entries("/proc/self/fd"),
            mappings: mappings().len() as i64,
            threads: entries("/proc/self/task"),
        }
    }

    /// What has come since `before`.
    pub fn since(self, before: Residue) -> Residue {
        Residue {
            heap_bytes: self.heap_bytes - before.heap_bytes,
            fds: self.fds - before.fds,
            mappings: self.mappings - before.mappings,
            threads: self.threads - before.threads,
        }
    }
}
