// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A model's run through its schedules.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Steps of one schedule: whoever takes more goes round in circles.
const MAX_BRANCHES: usize = 100_000;

/// Runs `body` in every schedule with at most `preemptions` forced switches, then says that `model` holds, and with it
/// `invariant`. LOOM_MAX_PREEMPTIONS sets another bound, which looks further for as long as it takes.
///
/// # Panics
/// As soon as `body` does, and as [`holds`](crate::holds) does.
pub fn explore(
    model: &str,
    invariant: &str,
    preemptions: usize,
    body: impl Fn() + Sync + Send + 'static,
) {
    let schedules = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&schedules);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(preemptions));
    builder.max_branches = MAX_BRANCHES;
    builder.check(move || {
        count.fetch_add(1, Relaxed);
        body();
    });
    crate::holds(model, invariant, schedules.load(Relaxed));
}
