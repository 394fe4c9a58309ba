// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Delays between what a test asks, at random: a test that expects its next question to come before the VMM or the
//! guest has gone on fails with them, and would have failed one day on a machine that is busy.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ebbtide_hostile::Random;

/// Most questions come at once, some late, a few very late: bounds in microseconds, in this proportion.
const BOUNDS: [u64; 8] = [0, 0, 0, 0, 2_000, 20_000, 80_000, 600_000];

static PASSED_US: AtomicU64 = AtomicU64::new(0);
static DELAYS: Mutex<Option<Random>> = Mutex::new(None);

/// From now on [`pass`] waits, by the sequence of `seed`.
pub fn begin(seed: u64) {
    *DELAYS.lock().unwrap_or_else(PoisonError::into_inner) = Some(Random::new(seed));
}

/// Waits at random if [`begin`] was called; otherwise returns at once.
pub(crate) fn pass() {
    let wait = match &mut *DELAYS.lock().unwrap_or_else(PoisonError::into_inner) {
        None => return,
        Some(random) => {
            let bound = random.of(&BOUNDS);
            random.below(bound)
        }
    };
    let begun = Instant::now();
    std::thread::sleep(Duration::from_micros(wait));
    let passed = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
    PASSED_US.fetch_add(passed, Ordering::Relaxed);
}

/// All that [`pass`] has waited.
pub(crate) fn passed() -> Duration {
    Duration::from_micros(PASSED_US.load(Ordering::Relaxed))
}
