// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Delays between what a test asks, at random: a test that expects its next question to come before the VMM or the
//! guest has gone on fails with them, and would have failed one day on a machine that is busy.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ebbtide_hostile::Random;

/// Most questions come at once, some late, a few very late: bounds in microseconds, in this proportion.
const BOUNDS: [u64; 8] = [0, 0, 0, 0, 2_000, 20_000, 80_000, 600_000];

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
    std::thread::sleep(Duration::from_micros(wait));
}
