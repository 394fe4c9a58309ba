// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What libraries want to know of the host, once, before threads may ask nothing any more: they would find out on whatever
//! thread needs it first, by calls that its filter forbids, which is the end of the process.

/// Small enough that the allocator has it on a heap, not in a mapping of its own.
const PIECE_BYTES: usize = 64 << 10;
/// Together so much that, when all are freed, it gives memory back.
const PIECES: usize = 64;

/// Has all of it found out.
pub(super) fn all() {
    limit_arenas();
    give_memory_back();
    read_clock();
}

/// Tells the allocator how many arenas it may have. It would look the number of processors up in a file otherwise, on
/// whatever thread makes the ninth.
fn limit_arenas() {
    const ARENAS_PER_PROCESSOR: usize = 8;
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let arenas = processors.saturating_mul(ARENAS_PER_PROCESSOR);
    let arenas = libc::c_int::try_from(arenas).unwrap_or(libc::c_int::MAX);
    // SAFETY: sets a number; it may be called at any time.
    if unsafe { libc::mallopt(libc::M_ARENA_MAX, arenas) } == 0 {
        tracing::warn!("the allocator takes no limit of its arenas");
    }
}

/// Has glibc find out whether the host overcommits memory: it opens a file for that when a thread other than the first
/// frees the end of a heap. Other allocators do not mind.
fn give_memory_back() {
    let thread = std::thread::Builder::new().name("allocator".into());
    let settled = thread.spawn(|| {
        let pieces: Vec<Vec<u8>> = (0..PIECES).map(|_| vec![1; PIECE_BYTES]).collect();
        drop(std::hint::black_box(pieces));
    });
    // Without a thread to be had the machine will not start either.
    if let Ok(thread) = settled {
        let _ = thread.join();
    }
}

/// Has rustix look for the kernel's own clock in this process: it asks for its auxiliary vector by prctl(2).
fn read_clock() {
    let _ = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
}
