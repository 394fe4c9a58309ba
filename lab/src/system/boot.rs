// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stock kernels boot and see what they were given.

use anyhow::{Context, Result, ensure};

use super::{BOOT, GIB, Ground, finish};

/// Boots with each number of vCPUs and powers off.
pub fn processors(ground: &Ground) -> Result<()> {
    // Guests of other scenarios have one.
    let numbers: &[u32] = if ground.long { &[1, 2, 4] } else { &[2] };
    for &cpus in numbers {
        boot(ground, cpus).with_context(|| format!("{cpus} vCPUs"))?;
    }
    Ok(())
}

fn boot(ground: &Ground, cpus: u32) -> Result<()> {
    let mut vmm = ground.boot(cpus, GIB)?;
    let report = vmm.guest().report()?;
    ensure!(report.cpus == cpus, "the guest has {} CPUs", report.cpus);
    let expected = BOOT / 4 * 3..=BOOT;
    ensure!(
        expected.contains(&report.mem_total),
        "MemTotal {} is not within {expected:?}",
        report.mem_total
    );
    ensure!(
        report.virtio_mem.devices == 1,
        "the guest has {} virtio-mem devices",
        report.virtio_mem.devices
    );
    finish(vmm)
}
