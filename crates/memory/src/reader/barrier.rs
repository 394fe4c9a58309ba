// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The asymmetric barrier: free for readers, a system call for the grace worker.
//!
//! A reader puts [`light`] between a store and a load that must not be exchanged; the worker
//! puts [`Barrier::heavy`] between its own. Whenever the worker's store and the reader's load
//! miss each other, the reader's store and the worker's load cannot miss each other as well
//! (README, M1). With `membarrier` the light side is a compiler fence: the system call runs a
//! full barrier on every running thread of the process, so each thread's program order is cut
//! at some instruction boundary during the call. Without it both sides are full fences.
//!
//! No model checker knows `membarrier`; under loom both sides are `fence(SeqCst)`, which gives
//! the same guarantee and no more.

#[cfg(not(loom))]
use crate::sync::fence;
#[cfg(not(loom))]
use std::sync::atomic::{Ordering, compiler_fence};

/// How this process orders readers against the worker; chosen once, when a `Memory` is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Barrier {
    /// `membarrier(PRIVATE_EXPEDITED)` against compiler fences.
    Membarrier,
    /// Full fences on both sides.
    Fence,
}

/// The reader's side; `fenced` where [`Barrier::Fence`] was chosen.
#[cfg(not(loom))]
#[inline(always)]
pub(crate) fn light(fenced: bool) {
    if fenced {
        fence(Ordering::SeqCst);
    } else {
        compiler_fence(Ordering::SeqCst);
    }
}

#[cfg(loom)]
pub(crate) fn light(_fenced: bool) {
    loom::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}

#[cfg(loom)]
impl Barrier {
    /// Readers take the way they take with `membarrier`, with fences on it.
    pub(crate) fn choose() -> Barrier {
        Barrier::Membarrier
    }

    pub(crate) fn heavy(self) {
        loom::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }
}

#[cfg(not(loom))]
impl Barrier {
    /// Registers the process for expedited membarriers, if the host has them.
    pub(crate) fn choose() -> Barrier {
        if cfg!(miri) || membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED).is_err() {
            return Barrier::Fence;
        }
        match membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED) {
            Ok(()) => Barrier::Membarrier,
            Err(_) => Barrier::Fence,
        }
    }

    /// The worker's side.
    pub(crate) fn heavy(self) {
        fence(Ordering::SeqCst);
        if self == Barrier::Membarrier {
            // The kernel may lack memory for a CPU mask. Readers rely on this call, so there is
            // no going on without it.
            while let Err(error) = membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED) {
                tracing::error!(%error, "membarrier failed, trying again");
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
        fence(Ordering::SeqCst);
    }
}

#[cfg(not(loom))]
fn membarrier(command: libc::c_int) -> std::io::Result<()> {
    // SAFETY: membarrier takes three integers and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, command, 0u32, 0i32) };
    if result < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}
