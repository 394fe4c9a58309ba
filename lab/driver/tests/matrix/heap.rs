// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is left on the heap, by an allocator that counts.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use ebbtide_lab_driver::Board;

struct Counting;

/// Bytes in pieces below [`LARGE_BYTES`], and in others.
static SMALL: AtomicI64 = AtomicI64::new(0);
static LARGE: AtomicI64 = AtomicI64::new(0);

/// From here on pieces are tables of the memory map, of which some are kept for the next map, now larger ones and now
/// smaller ones.
const LARGE_BYTES: usize = 4096;

fn count(layout: Layout) -> (&'static AtomicI64, i64) {
    let counter = if layout.size() < LARGE_BYTES {
        &SMALL
    } else {
        &LARGE
    };
    (counter, layout.size() as i64)
}

// SAFETY: the system's allocator does it all; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let (counter, bytes) = count(layout);
        counter.fetch_add(bytes, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        let (counter, bytes) = count(layout);
        counter.fetch_sub(bytes, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Blocks at most until one leaves nothing.
const BLOCKS: usize = 12;
/// Less than half a pointer for each cycle.
const SLACK_BYTES: usize = 4;
/// Between two looks at the heap; so many of the same in a row, so many in all.
const PAUSE: Duration = Duration::from_millis(10);
const LOOKS: u32 = 4;
const LOOKS_MAX: u32 = 200;

/// What a block of cycles has left, in small pieces and in large ones.
type Left = (i64, i64);

/// Lives through a block of cycles again and again until one of them leaves nothing, and takes nothing of what others left:
/// what leaks, leaks every time, while tables and queues of other threads grow, and what has ended there goes, once. What
/// each left.
///
/// # Errors
/// The same, when each block leaves something.
pub fn check(board: &Board, cycles: usize, block: impl Fn()) -> Result<Vec<Left>, Vec<Left>> {
    let mut left = Vec::with_capacity(BLOCKS);
    let mut before = live(board);
    for _ in 0..BLOCKS {
        block();
        let now = live(board);
        let (small, large) = (now.0 - before.0, now.1 - before.1);
        left.push((small, large));
        let none = small.unsigned_abs() < (SLACK_BYTES * cycles) as u64;
        if none && large < (LARGE_BYTES * cycles / 2) as i64 {
            return Ok(left);
        }
        before = now;
    }
    Err(left)
}

/// What there is once everything that is on its way out has gone: views are retired, tasks dropped, by other threads, and
/// what the memory keeps for the next view goes when it has been left alone for a while.
fn live(board: &Board) -> Left {
    board.memory().synchronize();
    let (mut live, mut looks) = ((0, 0), 0);
    for _ in 0..LOOKS_MAX {
        std::thread::sleep(PAUSE);
        let now = (SMALL.load(Ordering::Relaxed), LARGE.load(Ordering::Relaxed));
        looks = if now == live { looks + 1 } else { 0 };
        live = now;
        if looks == LOOKS {
            break;
        }
    }
    live
}
