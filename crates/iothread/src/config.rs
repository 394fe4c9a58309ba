// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an executor can be told at its start.

use std::time::Duration;

use crate::clock::Clock;

/// Settings of one executor. The defaults are right for everything but tests.
#[derive(Clone, Debug)]
pub struct Config {
    /// Submission queue entries of the ring. More operations than this may be in flight; they are handed to the
    /// kernel in several calls then.
    pub entries: u32,
    /// How long stopping waits for operations that were cancelled and do not end. What is left then keeps its
    /// memory for good, and is logged.
    pub stop_limit: Duration,
    /// The time source of its timers.
    pub clock: Clock,
    /// Use only what an older kernel has. For tests of those paths.
    #[doc(hidden)]
    pub kernel: Kernel,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            entries: 256,
            stop_limit: Duration::from_secs(10),
            clock: Clock::system(),
            kernel: Kernel::Newest,
        }
    }
}

/// Generations of io_uring as far as they differ for an executor.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Linux 6.1: completions are posted when the ring's thread asks for them, without interrupting it.
    Newest,
    /// Linux 5.19: completions are posted at the next system call, without an interrupt.
    Linux5_19,
    /// Linux 5.6: neither, and a wait has no time-out of its own (5.11).
    Linux5_6,
}
