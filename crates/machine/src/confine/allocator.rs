// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the allocator wants to know of the host before threads may open nothing any more.

/// Small enough that the allocator has it on a heap, not in a mapping of its own.
const PIECE_BYTES: usize = 64 << 10;
/// Together so much that, when all are freed, it gives memory back.
const PIECES: usize = 64;

/// Has glibc find out whether the host overcommits memory. It opens a file for that, once, when a thread other than the
/// first frees the end of a heap; in a thread that may open nothing this would be the end of the process. Other allocators
/// do not mind.
pub(super) fn settle() {
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
