// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that is its own kernel ejects disks whose requests are under way, as `cargo xtask bench unplug` measures it, so
//! that guest and measurement work when they are needed: what is in order there must be, and nobody waits for a request.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::Ground;
use crate::ejects::{Slow, flat};
use crate::vmm::Program;

const SLOW: Slow = Slow {
    slots: 7..10,
    latency: Duration::from_secs(12),
};
/// Far below what the requests take, and far above what a busy machine adds.
const BOUND_MS: f64 = 6000.0;

/// See the module.
pub fn ejects(ground: &Ground) -> Result<()> {
    let program = Program::Ebbtide(ground.ebbtide.clone());
    let all = SLOW.slots.len();
    let worst = flat::eject(program, &ground.ejector, &SLOW, all)?.told("flat");
    for (what, ms) in [
        ("an eject", worst.write_ms),
        ("an answer", worst.answer_ms),
        ("an operation of the other disk", worst.gap_ms),
    ] {
        ensure!(
            ms < BOUND_MS,
            "{what} took {ms} ms with requests of {:?} under way",
            SLOW.latency
        );
    }
    Ok(())
}
