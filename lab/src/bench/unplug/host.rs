// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The same by a guest that is its own kernel, on this machine's own KVM, which may be one that carries no other: so the
//! VMMs have real processors, and nobody waits for the only emulated one.

use std::path::Path;

use anyhow::{Context, Result};

use super::{PEER_EJECTS, SLOW, print};
use crate::bench::PEER;
use crate::ejects::flat;
use crate::vmm::Program;

/// Measures and prints one JSON row a line, as [`super::run`] does; `kernel` is the guest.
///
/// # Errors
/// As [`super::run`].
pub fn run(ebbtide: &Path, kernel: &Path, rounds: usize) -> Result<()> {
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    eprintln!(
        "ejects on this machine's own KVM, by a guest that is its own kernel: {} disks as in the capsule",
        SLOW.slots.len()
    );
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}");
        let program = Program::Ebbtide(ebbtide.to_owned());
        let measured = flat::eject(program, kernel, &SLOW, SLOW.slots.len()).context("Ebbtide")?;
        ours.push(measured.told("Ebbtide"));
        let measured = flat::eject(Program::Qemu, kernel, &SLOW, PEER_EJECTS).context(PEER)?;
        peers.push(measured.told(PEER));
    }
    let ids = [
        "eject_host/write",
        "eject_host/qmp_max",
        "eject_host/other_disk_gap",
    ];
    print(ids, &ours, &peers)
}
