// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory grows and shrinks; what is written to it stays, what is given back reaches the host.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{BOOT, GIB, Ground, MIB, STEP_LIMIT, USUAL_CPUS, clean_kernel_log, finish};

/// How far the host's memory after a round may be from that after the first.
const RSS_SLACK: u64 = 64 * MIB;
/// After the last change of the target, until the guest has followed.
const FOLLOW_LIMIT: Duration = Duration::from_secs(30);
const BLOCK: u64 = 2 * MIB;
/// After a shrink, until what the guest gave back is off the books.
const SETTLE: Duration = Duration::from_secs(1);

/// Rounds of grow, fill, check, free, shrink.
pub fn rounds(ground: &Ground) -> Result<()> {
    let (rounds, top) = if ground.long {
        (10, 8 * GIB)
    } else {
        (2, 2 * GIB)
    };
    let mut vmm = ground.boot(USUAL_CPUS, top)?;
    let mut first = None;
    for round in 0..rounds {
        vmm.resize(top, STEP_LIMIT)
            .with_context(|| format!("round {round}: grow"))?;
        let pattern = (top - BOOT) / 10 * 9;
        vmm.guest()
            .fill(pattern, round, STEP_LIMIT)
            .with_context(|| format!("round {round}: fill"))?;
        let checked = vmm.guest().check(STEP_LIMIT)?;
        ensure!(checked.ok, "round {round}: {:?}", checked.mismatch);
        vmm.guest().free()?;
        vmm.resize(BOOT, STEP_LIMIT)
            .with_context(|| format!("round {round}: shrink"))?;
        std::thread::sleep(SETTLE);
        let rss = vmm.rss_bytes()?;
        let first = *first.get_or_insert(rss);
        ensure!(
            rss <= first + RSS_SLACK,
            "round {round}: the VMM holds {} MiB, {} after the first round",
            rss / MIB,
            first / MIB
        );
        clean_kernel_log(&mut vmm)?;
    }
    finish(vmm)
}

/// The target changes while the guest still follows the last one; in the end it is reached, and
/// the driver is alive.
pub fn random_targets(ground: &Ground) -> Result<()> {
    let changes = if ground.long { 500 } else { 20 };
    let top = 3 * GIB;
    let mut vmm = ground.boot(1, top)?;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let blocks = (top - BOOT) / BLOCK;
    for change in 0..changes {
        let total = BOOT + random.below(blocks + 1) * BLOCK;
        vmm.request_total(total)
            .with_context(|| format!("change {change}"))?;
        std::thread::sleep(Duration::from_millis(random.below(400)));
    }
    for last in [GIB, BOOT] {
        vmm.request_total(last)?;
        vmm.wait_total(last, FOLLOW_LIMIT)
            .context("the last target")?;
    }
    finish(vmm)
}

/// xorshift64: a test must be able to run again as it was.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}
