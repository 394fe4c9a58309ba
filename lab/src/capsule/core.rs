// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One core of the host for each capsule.
//!
//! QEMU's emulation of SVM changes a processor's pending interrupts without a
//! lock or an atomic instruction whenever a nested guest enters or leaves,
//! while other threads raise interrupts. On several cores one of the two
//! changes is lost now and then: the capsule's kernel waits for ever for an
//! interrupt, or a guest gets one that nobody sent (a triple fault, a wild
//! page fault). Guests of any VMM die of it, with four processors about every
//! third. Each of those changes is one instruction, so threads that share a
//! core can't split it: on one core no boot in hundreds failed. And two
//! capsules run side by side on two.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use anyhow::{Context, Result};
use rustix::thread::{CpuSet, sched_getaffinity};

/// A core that no other capsule of this machine takes while this value lives,
/// unless there are more capsules than cores.
#[derive(Debug)]
pub(super) struct Core {
    pub number: usize,
    /// Holds a name of the kernel's that goes with this process, however it ends.
    _claim: Option<UnixListener>,
}

impl Core {
    /// Takes a free core of those this thread may run on, from the last down:
    /// the first is the one everything else is found on.
    ///
    /// # Errors
    /// The kernel does not tell which cores there are.
    pub fn take() -> Result<Core> {
        let allowed = sched_getaffinity(None).context("which cores may be used")?;
        let numbers: Vec<usize> = (0..CpuSet::MAX_CPU)
            .rev()
            .filter(|&number| allowed.is_set(number))
            .collect();
        for &number in &numbers {
            if let Some(claim) = claim(number)? {
                return Ok(Core {
                    number,
                    _claim: Some(claim),
                });
            }
        }
        let shared = std::process::id() as usize % numbers.len().max(1);
        let number = *numbers.get(shared).context("no core may be used")?;
        Ok(Core {
            number,
            _claim: None,
        })
    }
}

/// None: another process has it.
fn claim(number: usize) -> Result<Option<UnixListener>> {
    let name = format!("ebbtide-capsule-core-{number}");
    let address = SocketAddr::from_abstract_name(name).context("name of a core")?;
    match UnixListener::bind_addr(&address) {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Ok(None),
        Err(error) => Err(error).with_context(|| format!("claim core {number}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_is_taken_once_and_given_back() {
        // No other process claims it.
        let number = 1_000_000 + std::process::id() as usize;
        let first = claim(number).unwrap().unwrap();
        assert!(claim(number).unwrap().is_none());
        drop(first);
        assert!(claim(number).unwrap().is_some());
    }

    #[test]
    fn more_capsules_than_cores_share_them() {
        let all: Vec<Core> = (0..CpuSet::MAX_CPU.min(64))
            .map(|_| Core::take().unwrap())
            .collect();
        let allowed = sched_getaffinity(None).unwrap();
        assert!(all.iter().all(|core| allowed.is_set(core.number)));
    }
}
