// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Allocates large pieces of memory with several threads.
//!
//! What takes long is to clear the pages, and processors do that side by side.

use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;

/// What a thread takes at a time: large against the cost of the call, small enough that a failure
/// stops the others soon.
const PIECE: u64 = 64 << 20;
/// More threads than this get in each other's way in the host's allocator.
const MOST_THREADS: usize = 16;

/// Threads worth their starting for `bytes`; `wanted` is 0 for as many as help.
fn threads_for(bytes: u64, wanted: usize) -> u64 {
    let processors = || thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let most = if wanted == 0 { processors() } else { wanted };
    (bytes / PIECE).clamp(1, most.clamp(1, MOST_THREADS) as u64)
}

/// Calls `one` with pieces of `range`, together all of it, on several threads where that helps.
/// After the first error no further pieces are begun.
pub(super) fn in_pieces(
    range: Range<u64>,
    wanted_threads: usize,
    one: impl Fn(Range<u64>) -> io::Result<()> + Sync,
) -> io::Result<()> {
    let bytes = range.end - range.start;
    let threads = threads_for(bytes, wanted_threads);
    if threads == 1 {
        return one(range);
    }
    let next = AtomicU64::new(range.start);
    let failed: Mutex<Option<io::Error>> = Mutex::new(None);
    let work = || {
        loop {
            let start = next.fetch_add(PIECE, Relaxed);
            if start >= range.end {
                return;
            }
            if let Err(error) = one(start..start.saturating_add(PIECE).min(range.end)) {
                next.store(range.end, Relaxed);
                lock(&failed).get_or_insert(error);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            let builder = thread::Builder::new().name("memory-prefault".to_owned());
            // Without the thread it takes longer.
            let _ = builder.spawn_scoped(scope, work);
        }
        work();
    });
    lock(&failed).take().map_or(Ok(()), Err)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn pieces_tile_the_range_whatever_the_number_of_threads() {
        for (start, bytes, threads) in [(0, 1 << 20, 4), (4096, 1 << 30, 3), (2 << 20, 5 << 30, 0)]
        {
            let seen = Mutex::new(Vec::new());
            in_pieces(start..start + bytes, threads, |piece| {
                lock(&seen).push(piece);
                Ok(())
            })
            .unwrap();
            let mut seen = seen.into_inner().unwrap();
            seen.sort_by_key(|piece| piece.start);
            assert_eq!(seen[0].start, start);
            assert_eq!(seen.last().unwrap().end, start + bytes);
            assert!(seen.windows(2).all(|pair| pair[0].end == pair[1].start));
        }
    }

    #[test]
    fn the_first_error_ends_it() {
        let calls = AtomicU64::new(0);
        let result = in_pieces(0..1 << 40, 2, |_| {
            calls.fetch_add(1, Relaxed);
            Err(io::Error::from_raw_os_error(libc::EFAULT))
        });
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EFAULT));
        assert!(calls.load(Relaxed) <= 2);
    }

    #[test]
    fn small_pieces_are_not_worth_a_thread() {
        assert_eq!(threads_for(2 << 20, 0), 1);
        assert_eq!(threads_for(8 << 30, 3), 3);
        assert_eq!(threads_for(128 << 20, 8), 2);
        assert_eq!(threads_for(1 << 40, 1000), MOST_THREADS as u64);
    }
}
