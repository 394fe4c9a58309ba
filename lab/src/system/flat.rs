// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that is its own kernel ejects disks whose requests are under way, as `cargo xtask bench unplug` measures it, so
//! that guest and measurement work when they are needed: what is in order there must be, and nobody waits for a request.

use std::time::Duration;

use anyhow::{Result, bail};

use super::Ground;
use crate::ejects::{Sample, Slow, flat};
use crate::stalls::Stalls;
use crate::vmm::Program;

/// What the requests take: where the machine is too busy for one, the next is tried.
const LATENCIES: [Duration; 3] = [
    Duration::from_secs(8),
    Duration::from_secs(16),
    Duration::from_secs(32),
];

/// See the module.
pub fn ejects(ground: &Ground) -> Result<()> {
    for latency in LATENCIES {
        let slow = Slow {
            slots: 7..10,
            latency,
        };
        let stalls = Stalls::watch();
        let program = Program::Ebbtide(ground.ebbtide.clone());
        match flat::eject(program, &ground.ejector, &slow, slow.slots.len()) {
            Ok(measured) => return nobody_waits(&measured.told("flat"), latency, &stalls),
            Err(e) => match e.downcast_ref::<flat::TooLate>() {
                Some(late) => println!("      {late}"),
                None => return Err(e),
            },
        }
    }
    bail!("each time the requests ended before all disks were ejected")
}

/// Far less than a request takes is far more than a busy machine adds.
fn nobody_waits(worst: &Sample, latency: Duration, stalls: &Stalls) -> Result<()> {
    for (what, ms) in [
        ("an eject", worst.write_ms),
        ("an answer", worst.answer_ms),
        ("an operation of the other disk", worst.gap_ms),
    ] {
        stalls.within(latency / 2, Duration::from_secs_f64(ms / 1e3), what)?;
    }
    Ok(())
}
