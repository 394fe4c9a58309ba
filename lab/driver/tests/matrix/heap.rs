// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is left on the heap, by an allocator that counts.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use ebbtide_lab_driver::Board;

struct Counting;

static LIVE_BYTES: AtomicI64 = AtomicI64::new(0);

// SAFETY: the system's allocator does it all; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE_BYTES.fetch_add(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE_BYTES.fetch_sub(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Blocks at most until one leaves nothing.
const BLOCKS: usize = 24;
/// Less than half a pointer for each cycle.
const SLACK_BYTES: usize = 4;
/// Between two looks at the heap; so many of the same in a row, so many in all.
const PAUSE: Duration = Duration::from_millis(10);
const LOOKS: u32 = 4;
const LOOKS_MAX: u32 = 200;

/// Lives through a block of cycles again and again until one of them leaves nothing, and takes nothing of what others left:
/// what leaks, leaks every time, while tables and queues of other threads grow, and what has ended there goes, once. The
/// bytes each left.
///
/// # Panics
/// When each block leaves something.
pub fn check(board: &Board, cycles: usize, block: impl Fn()) -> Vec<i64> {
    let mut before = live(board);
    let mut grown = Vec::new();
    for _ in 0..BLOCKS {
        block();
        let now = live(board);
        grown.push(now - before);
        if (now - before).unsigned_abs() < (SLACK_BYTES * cycles) as u64 {
            return grown;
        }
        before = now;
    }
    panic!("{cycles} cycles leave {grown:?} bytes on the heap");
}

/// What there is once everything that is on its way out has gone: views are retired, tasks dropped, by other threads, and
/// what the memory keeps for the next view goes when it has been left alone for a while.
fn live(board: &Board) -> i64 {
    board.memory().synchronize();
    let (mut live, mut looks) = (i64::MAX, 0);
    for _ in 0..LOOKS_MAX {
        std::thread::sleep(PAUSE);
        let now = LIVE_BYTES.load(Ordering::Relaxed);
        looks = if now == live { looks + 1 } else { 0 };
        live = now;
        if looks == LOOKS {
            break;
        }
    }
    live
}
